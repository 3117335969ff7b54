"""Products of integers in NumPy: the integers of weights that nobody can change are made once, and a few rows read them as they are.

One step of one sequence is as fast as its weights can be read, and these have a quarter of the bytes. Rows from `_ROWS` on are multiplied
by BLAS, as the definition has it, with rounded weights that are made once as well.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy

from portnorm.arrays import Kernel
from portnorm.quantization import INPUTS, SCHEMES, WEIGHTS, Grid, fake_quantize, integers_of, is_rounding_moved
from portnorm_backends.cpu import memory
from portnorm_backends.cpu.layout import NumPyArray
from portnorm_backends.cpu.warming import ready

_ROWS = 8
_WIDE, _PART = 2**22, 2**20
"""Bytes of a matrix that is rounded by so many bytes of its rows at a time."""
_FLOAT32 = numpy.dtype("float32")


class _Integers(NamedTuple):
    """A weight (outputs, inputs) that was rounded: itself, and where it has eight bits its integers, their sum and the step of each row."""

    rounded: NumPyArray
    q: NumPyArray
    sums: NumPyArray
    steps: NumPyArray


_empty = numpy.empty(0)
_GRIDS = {scheme.weights for scheme in SCHEMES.values()}

_of_weight: dict[tuple[int, Grid], tuple[weakref.ref[NumPyArray], _Integers]] = {}
_of_rounded: dict[int, _Integers] = {}
"""By the address of an array that lives: a weight goes with its entry in the first, a rounded one lives in that entry."""


def _is_fixed(x: Any, *, levels: int = INPUTS, bound: float | None = None, block: int | None = None, lopsided: bool = False) -> bool:
    """A matrix of weights that nobody can write to."""
    if type(levels) is not int or type(lopsided) is not bool or not (block is None or type(block) is int):  # which the definition looks at
        return False
    if Grid(levels, block, lopsided) not in _GRIDS or bound is not None or type(x) is not numpy.ndarray or x.dtype != _FLOAT32:
        return False
    return x.ndim == 2 and x.size > 0 and x.flags.c_contiguous and isinstance(_owner(x), bytes)


def _owner(x: NumPyArray) -> object:
    """What has the memory of an array. One that can only be read, but has its own, can be made one that can be written to."""
    found: object = x
    while isinstance(found, numpy.ndarray) and found.base is not None:
        found = found.base
    return found


def _is_wide(x: Any, *, bound: float | None = None, **attrs: Any) -> bool:
    """A matrix of which several are not to be there at a time."""
    return bound is None and type(x) is numpy.ndarray and x.ndim == 2 and x.dtype in (_FLOAT32, numpy.float64) and x.nbytes >= _WIDE


def _by_rows(x: NumPyArray, **attrs: Any) -> NumPyArray:
    rounded, count = numpy.empty(x.shape, x.dtype), max(1, len(x) * _PART // x.nbytes)
    for start in range(0, len(x), count):
        rounded[start : start + count] = fake_quantize.definition(x[start : start + count], **attrs)[0]
    return rounded


def _rounded(x: NumPyArray, **attrs: Any) -> NumPyArray:
    if not _is_fixed(x, **attrs):
        return _by_rows(x, **attrs)
    grid = Grid(**attrs)
    known = _of_weight.get((id(x), grid))
    if known is not None and known[0]() is x:
        return known[1].rounded
    rounded = _by_rows(x, **attrs) if _is_wide(x) else fake_quantize.definition(x, **attrs)[0]
    rounded.flags.writeable = False
    q, steps = integers_of(rounded) if grid.levels == WEIGHTS else (_empty, _empty)
    q, steps = memory.aligned_copy(q, q.dtype), numpy.ascontiguousarray(steps)
    made, key = _Integers(rounded, q, q.sum(axis=-1, dtype=numpy.int32), steps), (id(x), grid)

    def forget(_: Any) -> None:
        _of_rounded.pop(id(made.rounded), None)
        _of_weight.pop(key, None)

    _of_weight[key] = weakref.ref(x, forget), made
    _of_rounded[id(rounded)] = made
    return rounded


def take(weight: Any, rows: int, bound: float | None, block: int | None) -> bool:
    """Whether the kernel multiplies so many rows with it now: few, and weights whose integers are known."""
    known = _of_rounded.get(id(weight))
    if known is None or known.rounded is not weight or block is not None or bound not in (None, 1.0):
        return False
    return 0 < rows <= _ROWS and not is_rounding_moved() and ready("integers", _FLOAT32)


def _is_few(x: Any, weight: Any, *, bound: float | None = None, block: int | None = None) -> bool:
    if type(x) is not numpy.ndarray or x.dtype != _FLOAT32 or x.ndim == 0 or x.shape[-1] == 0:
        return False
    return take(weight, x.size // x.shape[-1], bound, block) and bool(x.shape[-1] == weight.shape[1])


def into(weight: NumPyArray, bound: float | None) -> Callable[[NumPyArray, NumPyArray], None]:
    """What writes x · weightᵀ into y, for contiguous x (rows, inputs) and y (rows, outputs), and a weight that `take` was asked of."""
    from portnorm_backends.cpu import integer_rows

    known, bounded = _of_rounded[id(weight)], bound is not None

    def multiply(x: NumPyArray, y: NumPyArray) -> None:
        x = x if x.flags.writeable else x.copy()  # else all would be compiled again for arrays that can only be read
        integer_rows.product(x, bounded, numpy.empty(x.shape, integer_rows.INTEGER), known.q, known.sums, known.steps, y)

    return multiply


def _product(x: NumPyArray, weight: NumPyArray, *, bound: float | None = None, block: None = None) -> NumPyArray:
    rows = numpy.ascontiguousarray(x).reshape(-1, x.shape[-1])
    y = numpy.empty((len(rows), len(weight)), numpy.float32)
    into(weight, bound)(rows, y)
    return y.reshape(*x.shape[:-1], len(weight))


ROUNDED = Kernel(
    call=_rounded,
    forward=lambda x, **attrs: (_rounded(x, **attrs), ()),
    accepts=lambda x, **attrs: _is_fixed(x, **attrs) or _is_wide(x, **attrs),
)
PRODUCT = Kernel(call=_product, accepts=_is_few)
