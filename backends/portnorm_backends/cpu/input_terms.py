"""The input term of the time loop, where nothing is kept for a vjp: of as many steps at a time as fill a tall matrix product."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy

from portnorm.cells.cell import RecurrentCell
from portnorm.dtypes import float32_value
from portnorm.scan import Params
from portnorm_backends.cpu import memory
from portnorm_backends.cpu.layout import RANGE, NumPyArray, Terms, taken
from portnorm_backends.cpu.loops import kernels_of
from portnorm_backends.cpu.sizes import ends_of

AT_ONCE = 2**31
"""Multiplications of hidden products in one compiled call, some tens of milliseconds, during which Python does not see an interrupt."""

Feed = Callable[[int, int], tuple[int, Callable[[int, int], Terms | None]]]
"""For the sequences of a thread: how many steps it takes at a time, and what gives it their terms; `None` where they left their range."""


def at_once(u: NumPyArray | None) -> Feed:
    """The terms of all steps."""
    whole = None if u is None else Terms(u, 0, 0)
    return lambda *_: (AT_ONCE, lambda *_: whole)


def input_terms(x: NumPyArray, params: Params, cell: RecurrentCell, one: NumPyArray) -> Feed:
    """The terms of so many steps at a time that their product with the weights is a tall one; `one` is room for those of one step."""
    products, weight, dtype = kernels_of("products"), params["weight_ih"], x.dtype
    (time, batch, features), size = x.shape, weight.shape[0]
    inputs, bias = taken(x, dtype, x.shape), params.get("bias")
    normalize = None if cell.input_slot is None else normalizer(params, cell, dtype, size)
    if time == 1 and batch <= products.FEW:
        products.straight(inputs[0], weight, bias, one[0])
        return at_once(one if normalize is None or normalize(one[0]) else None)
    multiply = products.affine_map(weight.T, bias, time * batch)

    def of_thread(first: int, last: int) -> tuple[int, Callable[[int, int], Terms | None]]:
        sequences, count = last - first, max(1, products.ROWS // (last - first))
        u = memory.aligned((min(count, time), sequences, size), dtype)

        def of_steps(t: int, stop: int) -> Terms | None:
            terms = u[: stop - t]
            rows = terms.reshape(-1, size)
            multiply(inputs[t:stop, first:last].reshape(-1, features), rows)
            return Terms(terms, t, first) if normalize is None or normalize(rows) else None

        return count, of_steps

    return of_thread


def normalizer(params: Params, cell: RecurrentCell, dtype: numpy.dtype[Any], size: int) -> Callable[[NumPyArray], bool]:
    """What normalizes rows of the input term in their place, unless a variance leaves its range."""
    forward, ends, how, none = _outside(cell, dtype, size)
    unread = none.reshape(0, 3)
    weight, bias = (none if p is None else taken(p, dtype, (size,)) for p in map(params.get, ("norm_ih.weight", "norm_ih.bias")))
    if len(ends) == 1:
        return lambda rows: bool(forward(rows, rows, unread, weight, bias, *how))

    def normalize(rows: NumPyArray) -> bool:
        fine = True
        for i, j in ends:
            part = rows[:, i:j]
            fine &= forward(part, part, unread, weight[i:j], bias[i:j], *how)
        return fine

    return normalize


@functools.lru_cache(maxsize=64)
def _outside(
    cell: RecurrentCell, dtype: numpy.dtype[Any], size: int
) -> tuple[Any, tuple[tuple[int, int], ...], tuple[Any, ...], NumPyArray]:
    """The kernel of the input term's normalizer, the parts of a row, what the kernel is told of them, and a parameter that is not there."""
    slot = cell.input_slot
    assert slot is not None
    how = (1, float32_value(cell.variant.eps), cell.variant.norm != "rms", *RANGE[dtype], False)
    ends = tuple(itertools.pairwise(map(int, ends_of(slot.partition, size))))
    return kernels_of("rowwise").forward(dtype), ends, how, numpy.empty(0, dtype)
