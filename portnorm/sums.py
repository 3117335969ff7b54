"""Sums of many values: in at least float32, and in blocks where a library would add one value after the other."""

from __future__ import annotations

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
    return bool(before) and isinstance(a.shape[before[0]], int) and a.shape[before[0]] > 2 * _BLOCK


def total(a: Array, axes: tuple[int, ...], keepdims: bool = False) -> Array:
    """Sum over `axes` in at least float32; a long first axis in blocks, and their sums again: the error grows with its logarithm."""
    xp = xp_of(a)
    a = xp.astype(a, statistics_dtype(xp, a.dtype), copy=False)
    if not axes:
        return a
    before, ends = _parted(a, axes)
    if not is_long(a, axes):
        return xp.sum(a, axis=axes, keepdims=keepdims)
    a = xp.sum(a, axis=ends, keepdims=True) if ends else a
    while a.shape[before[0]] > 2 * _BLOCK:
        axis = before[0]
        whole = a.shape[axis] // _BLOCK
        index = (slice(None),) * axis
        blocks = xp.reshape(a[(*index, slice(whole * _BLOCK), ...)], (*a.shape[:axis], whole, _BLOCK, *a.shape[axis + 1 :]))
        rest = xp.sum(a[(*index, slice(whole * _BLOCK, None), ...)], axis=axis, keepdims=True)
        a = xp.concat((xp.sum(blocks, axis=axis + 1), rest), axis=axis)
    return xp.sum(a, axis=axes, keepdims=keepdims)


def total_like(a: Array, axes: tuple[int, ...]) -> Array:
    """Sum over `axes` in the dtype of `a`, computed in at least float32: the cotangent of a parameter that many cases share."""
    xp = xp_of(a)
    return xp.sum(a, axis=axes) if xp.finfo(a.dtype).bits >= 32 else xp.astype(total(a, axes), a.dtype)
