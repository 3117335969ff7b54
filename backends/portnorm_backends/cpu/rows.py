"""Normalizations of contiguous rows of NumPy arrays: which a kernel takes, and in which form."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy

from portnorm.arrays import Kernel
from portnorm.dtypes import float32_value
from portnorm.norm.arguments import LARGEST
from portnorm_backends.cpu import memory
from portnorm_backends.cpu.layout import RANGE, SHORT, NumPyArray, bits, can_take, computed, taken
from portnorm_backends.cpu.residuals import KernelResiduals, as_wide_as, cotangents, is_much, plan
from portnorm_backends.cpu.warming import READY, ready


def are_rows(x: NumPyArray, axes: tuple[int, ...], param_axes: tuple[int, ...]) -> bool:
    """Whether the axes are the last ones, and those with parameters begin before or with them and lie beside each other."""
    if not axes or not param_axes:
        return False
    first, last = axes[0], param_axes[-1] + 1
    return axes[-1] - first == x.ndim - 1 - first == len(axes) - 1 and param_axes[0] <= first <= last == param_axes[0] + len(param_axes)


def as_rows(x: NumPyArray, first: int) -> NumPyArray | None:
    """A view (rows, n) of n values from axis `first` on that lie beside each other; `None` where there is none."""
    if x.flags.c_contiguous:
        return x.reshape(-1, math.prod(x.shape[first:]))
    step = x.itemsize
    for axis in reversed(range(x.ndim)):
        if axis == first - 1:
            step = x.strides[axis]
        if x.shape[axis] != 1 and x.strides[axis] != step:
            return None
        step *= x.shape[axis]
    shape = (math.prod(x.shape[:first]), math.prod(x.shape[first:]))
    return numpy.lib.stride_tricks.as_strided(x, shape, (x.strides[first - 1], x.itemsize)) if first else None


def forward_of_rows(
    x: NumPyArray, weight: Any, bias: Any, axes: tuple[int, ...], param_axes: tuple[int, ...], eps: float, center: bool, y: NumPyArray
) -> KernelResiduals | None:
    """`y`; `None` where the definition has to do it. A row of parameters for each of the last rows, a value for each run of neighbours."""
    from portnorm_backends.cpu import abreast, rowwise

    first, last = axes[0], param_axes[-1] + 1
    rows = as_rows(x, first)
    assert rows is not None
    shape = (math.prod(x.shape[param_axes[0] : first]), math.prod(x.shape[first:last]))
    own = computed(x.dtype)
    kept, parameters = numpy.empty((rows.shape[0], 3), dtype=own), tuple(taken(p, own, shape).reshape(-1) for p in (weight, bias))
    how, into = (shape[0], eps, center, *RANGE[own]), bits(y.reshape(rows.shape))
    short = _are_short(rows, shape, weight is None and bias is None)
    kernel = (abreast if short else rowwise).forward(x.dtype)
    if not _each_row(kernel, bits(rows), parameters, how, into, kept, shape[0]):
        return None
    return KernelResiduals(x, kept, weight, bias, shape, None)


def _are_short(rows: NumPyArray, shape: tuple[int, int], alone: bool) -> bool:
    """Whether these are rows for the kernel that takes many at once: with a value of the parameters for each of theirs, or none."""
    return (alone or shape == (1, rows.shape[1])) and _is_short(rows.shape[1], rows.size, rows.dtype)


_MANY = 2**14
"""Values from which a kernel for short rows is compiled. Once there it takes fewer too, so that a row has the same bits."""


def _is_short(n: int, size: int, dtype: Any) -> bool:
    return n <= SHORT and (dtype in _SHORT_ROWS or (size >= _MANY and ready("short rows", dtype)))


_ROWS_OF_SHARES = 32
"""Rows of a range at least that has shares of its own: these take as much as eight rows of float32."""


def _each_row(kernel: Any, rows: NumPyArray, parameters: Any, how: tuple[Any, ...], y: NumPyArray, kept: NumPyArray, multiple: int) -> bool:
    """The kernel over all rows, in threads where there are many; `kept` has a row for each, or none."""
    if not is_much(rows.size):
        return bool(kernel(rows, y, kept, *parameters, *how, False))
    from portnorm_backends.cpu import sharing

    whole = (*parameters, *how, y.nbytes >= memory.CACHED)
    return sharing.call(kernel, plan(rows.shape[0], rows.size, multiple), rows.shape[0], (rows, y, kept), whole=whole)


def vjp_of_rows(
    residuals: KernelResiduals, dy: NumPyArray, *, axes: tuple[int, ...] = (-1,), center: bool = True, **attrs: Any
) -> tuple[Any, Any, Any]:
    x, kept, weight, bias, shape, *_ = residuals
    x = as_wide_as(x, dy)
    first, dtype, computing = axes[0] % x.ndim, x.dtype, kept.dtype
    rows = x if x.ndim == 2 and first == 1 else as_rows(x, first)
    assert shape is not None
    assert rows is not None
    given = as_rows(dy, first) if type(dy) is numpy.ndarray and dy.dtype == dtype and dy.flags.aligned else None
    by_value = shape[1] == rows.shape[1] and not (weight is None and bias is None)
    dx, parts = memory.room(rows.shape, dtype), (2, *(shape if by_value else (0, 0)))
    sums = [(2, *(shape if p is not None else (0, 0))) for p in (weight, bias)]
    given = taken(dy, dtype, rows.shape) if given is None else given
    short = _are_short(rows, shape, weight is None and bias is None)
    backward, own = _backward(dtype, short and rows.shape[1]), taken(weight, computing, shape)
    values, given, into = bits(rows), bits(given), bits(dx)
    if not is_much(rows.size):
        dweight, dbias = (numpy.empty(s) for s in sums)
        backward(values, given, kept, into, numpy.empty(parts, computing), dweight, dbias, own, center)
    else:
        from portnorm_backends.cpu import sharing

        planned = plan(rows.shape[0], rows.size, -(-_ROWS_OF_SHARES // shape[0]) * shape[0], 2)
        part, *shares = numpy.empty((planned.ranges, *parts), computing), *(numpy.empty((planned.ranges, *s)) for s in sums)
        sharing.call(backward, planned, rows.shape[0], (values, given, kept, into), (part, *shares), (own, center))
        dweight, dbias = (numpy.add.reduce(s[:, :1]) for s in shares)
    dx = dx if rows is x else dx.reshape(x.shape)
    return dx if dy.dtype is dtype else dx.astype(dy.dtype, copy=False), cotangents(weight, dweight[0]), cotangents(bias, dbias[0])


# -- the last axis -------------------------------------------------------------------------------------------------------------------------


_ROWS = READY["rows"]
_SHORT_ROWS = READY["short rows"]


class LastAxisResiduals(KernelResiduals):
    """Residuals of a normalization of the last axis that was taken without detours."""


@functools.cache
def _plain(dtype: Any, short: bool) -> tuple[Any, ...]:
    """For rows of one type, short ones or others: the kernel, what it takes for no parameter, the bounds of σ² + ε, and no room for
    statistics, which nobody reads.
    """
    from portnorm_backends.cpu import abreast, rowwise

    kernel = (abreast if short else rowwise).forward(dtype)
    return kernel, numpy.empty((0,), dtype=dtype), *RANGE[dtype], numpy.empty((0, 3), dtype)


@functools.cache
def _backward(dtype: Any, short: int) -> Any:
    """The kernel for rows of one type; `short` says how long they are where they are short."""
    from portnorm_backends.cpu import abreast_back, rowwise

    fits = short and abreast_back.fits(short, computed(dtype).itemsize)
    return (abreast_back if fits else rowwise).backward(dtype)


def _is_plain(x: Any, weight: Any = None, bias: Any = None, *, axis: Any = -1, eps: float = 1e-5, out: Any = None) -> bool:
    """Whether the arguments of a public function need no further look: contiguous arrays of one type, and the last axis."""
    if type(x) is not numpy.ndarray or type(axis) is not int or axis != -1 or type(eps) is not float or not 0 <= eps <= LARGEST:
        return False
    dtype, shape, flags = x.dtype, x.shape, x.flags
    if not (flags.c_contiguous and flags.aligned and x.size and shape and dtype in RANGE and (dtype in _ROWS or ready("rows", dtype))):
        return False
    for p in (weight, bias):
        if p is not None:
            if type(p) is not numpy.ndarray or p.dtype != dtype or p.shape != shape[-1:]:
                return False
            flags = p.flags
            if not (flags.c_contiguous and flags.aligned):
                return False
    return out is None or (can_take(out, x, weight, bias) and out.dtype == x.dtype and out.shape == x.shape)


def last_axis(op: Any, center: bool) -> Kernel:
    """The kernel of a public function for the arguments that most calls have; what others need is done by its definition."""

    def call(x: NumPyArray, weight: Any = None, bias: Any = None, *, eps: float = 1e-5, out: Any = None, **attrs: Any) -> Any:
        kernel, none, smallest, largest, unread = _plain(x.dtype, _is_short(x.shape[-1], x.size, x.dtype))
        rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        y, w, b = memory.like(x) if out is None else out, none if weight is None else weight, none if bias is None else bias
        into = y if x.ndim == 2 else y.reshape(rows.shape)
        if not _each_row(kernel, rows, (w, b), (1, float32_value(eps), center, smallest, largest), into, unread, 1):
            return op.definition(x, weight, *(() if bias is None else (bias,)), eps=eps, out=out)[0]
        return y

    def forward(x: NumPyArray, weight: Any = None, bias: Any = None, *, eps: float = 1e-5, out: Any = None, **attrs: Any) -> Any:
        kernel, none, smallest, largest, _ = _plain(x.dtype, _is_short(x.shape[-1], x.size, x.dtype))
        rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        y, w, b = memory.like(x) if out is None else out, none if weight is None else weight, none if bias is None else bias
        kept = numpy.empty((rows.shape[0], 3), x.dtype)
        if not _each_row(kernel, rows, (w, b), (1, float32_value(eps), center, smallest, largest), y.reshape(rows.shape), kept, 1):
            return op.definition(x, weight, *(() if bias is None else (bias,)), eps=eps, out=out)
        return y, LastAxisResiduals(x, kept, weight, bias, (1, x.shape[-1]), None)

    def vjp(residuals: LastAxisResiduals, dy: NumPyArray, **attrs: Any) -> tuple[Any, ...]:
        return vjp_of_rows(residuals, dy, center=center)

    return Kernel(call=call, forward=forward, vjp=vjp, residuals=LastAxisResiduals, accepts=_is_plain)
