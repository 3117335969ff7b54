"""Sums of many values: in at least float32, and in blocks where a library would add one value after the other."""

from __future__ import annotations

import math

from portnorm.arrays import Array, xp_of
from portnorm.dtypes import statistics_dtype

_BLOCK = 64
"""Values that are added one after the other where a sum is not along the last axis."""


def _parted(a: Array, axes: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """`axes` as those before and those at the end of the shape: NumPy adds in pairs along the latter only."""
    ends = 0
    while ends < len(axes) and axes[-1 - ends] == a.ndim - 1 - ends:
        ends += 1
    return axes[: len(axes) - ends], axes[len(axes) - ends :]


def is_long(a: Array, axes: tuple[int, ...]) -> bool:
    """Whether a sum over `axes` could add many values one after the other."""
    before, _ = _parted(a, axes)
    known = [n for n in (a.shape[axis] for axis in (before if _in_order(a) else axes)) if isinstance(n, int)]
    return math.prod(known) > 2 * _BLOCK


def _in_order(a: Array) -> bool:
    """Whether what is beside each other along the last axis is so in memory, by whose order NumPy and CuPy add."""
    strides = getattr(a, "strides", None)
    if not (isinstance(strides, tuple) and hasattr(a, "flags") and strides and a.shape[-1] > 1):
        return True
    return all(abs(strides[-1]) <= abs(step) for step, n in zip(strides, a.shape, strict=True) if n > 1)


def total(a: Array, axes: tuple[int, ...], keepdims: bool = False) -> Array:
    """Sum over `axes` in at least float32; long axes in blocks, and their sums again: the error grows with the logarithm of a length."""
    xp = xp_of(a)
    a = xp.astype(a, statistics_dtype(xp, a.dtype), copy=False)
    if not axes:
        return a
    if not is_long(a, axes):
        return xp.sum(a, axis=axes, keepdims=keepdims)
    before, ends = _parted(a, axes)
    a = a if _in_order(a) else a.copy("C")
    a = xp.sum(a, axis=ends, keepdims=True) if ends else a
    for axis in before:
        while isinstance(a.shape[axis], int) and a.shape[axis] > 2 * _BLOCK:
            whole = a.shape[axis] // _BLOCK
            index = (slice(None),) * axis
            blocks = xp.reshape(a[(*index, slice(whole * _BLOCK), ...)], (*a.shape[:axis], whole, _BLOCK, *a.shape[axis + 1 :]))
            rest = xp.sum(a[(*index, slice(whole * _BLOCK, None), ...)], axis=axis, keepdims=True)
            a = xp.concat((xp.sum(blocks, axis=axis + 1), rest), axis=axis)
        a = xp.sum(a, axis=axis, keepdims=True)
    return a if keepdims else xp.sum(a, axis=axes)


def total_like(a: Array, axes: tuple[int, ...]) -> Array:
    """Sum over `axes` in the dtype of `a`, computed in at least float32: the cotangent of a parameter that many cases share."""
    return xp_of(a).astype(total(a, axes), a.dtype, copy=False)
