"""Sums of many values: in at least float32, and in blocks where a library would add one value after the other."""

from __future__ import annotations

from portnorm.arrays import Array, statistics_dtype, xp_of

_BLOCK = 64
"""Values that are added one after the other where a sum is not along the last axis."""


def is_long(a: Array, axes: tuple[int, ...]) -> bool:
    """Whether a sum over `axes` could add many values one after the other: NumPy sums in pairs along the last axis only."""
    return bool(axes) and axes[-1] != a.ndim - 1 and isinstance(a.shape[axes[0]], int) and a.shape[axes[0]] > 2 * _BLOCK


def total(a: Array, axes: tuple[int, ...], keepdims: bool = False) -> Array:
    """Sum over `axes` in at least float32; a long first axis in blocks, and their sums again: the error grows with its logarithm."""
    xp = xp_of(a)
    a = xp.astype(a, statistics_dtype(xp, a.dtype), copy=False)
    while is_long(a, axes):
        axis = axes[0]
        whole = a.shape[axis] // _BLOCK
        index = (slice(None),) * axis
        blocks = xp.reshape(a[(*index, slice(whole * _BLOCK), ...)], (*a.shape[:axis], whole, _BLOCK, *a.shape[axis + 1 :]))
        rest = xp.sum(a[(*index, slice(whole * _BLOCK, None), ...)], axis=axis, keepdims=True)
        a = xp.concat((xp.sum(blocks, axis=axis + 1), rest), axis=axis)
    return xp.sum(a, axis=axes, keepdims=keepdims) if axes else a


def total_like(a: Array, axes: tuple[int, ...]) -> Array:
    """Sum over `axes` in the dtype of `a`, computed in at least float32: the cotangent of a parameter that many cases share."""
    xp = xp_of(a)
    return xp.sum(a, axis=axes) if xp.finfo(a.dtype).bits >= 32 else xp.astype(total(a, axes), a.dtype)
