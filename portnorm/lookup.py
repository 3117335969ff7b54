"""Rows of a table, chosen by integers."""

from __future__ import annotations

import math

from portnorm.arrays import Array, device_of, is_concrete, namespace, require_given, require_lengths, xp_of
from portnorm.dtypes import default_integer, is_kind, require_floating, statistics_dtype
from portnorm.errors import DTypeError, ShapeError
from portnorm.op import op

_BLOCK = 2**22  # entries of the one-hot matrix that are made at a time


@op
def embedding(ids: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    """y = weight[ids], for integer `ids` of any shape and `weight` (entries, features); result (…, features).

    Raises `DTypeError` for ids that are no integers, and `ShapeError` for ids outside 0 … entries − 1.

    >>> import numpy as np, portnorm as pn
    >>> pn.embedding(np.array([2, 0]), np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    array([[5., 6.],
           [1., 2.]])
    """
    xp = namespace(ids=ids, weight=weight)
    require_given(weight=weight)
    require_floating(xp, weight=weight)
    require_lengths(ids=ids)
    if weight.ndim != 2:
        raise ShapeError(f"`weight` has shape {tuple(weight.shape)}; expected (entries, features)")
    if not is_kind(xp, ids.dtype, "integral"):
        raise DTypeError(f"`ids` has dtype {ids.dtype}; expected integers")
    if is_concrete(ids) and 0 not in ids.shape and (int(xp.min(ids)) < 0 or int(xp.max(ids)) >= weight.shape[0]):
        raise ShapeError(f"`ids` reach from {int(xp.min(ids))} to {int(xp.max(ids))}; expected 0 to {weight.shape[0] - 1}")
    if ids.dtype != xp.int32 and ids.dtype != xp.int64:
        ids = xp.astype(ids, default_integer(xp))  # a narrow type could not name every entry, and some libraries take none by it
    rows = xp.take(weight, xp.reshape(ids, (math.prod(ids.shape),)), axis=0)
    return xp.reshape(rows, (*ids.shape, weight.shape[1])), (ids, weight)


@embedding.backward
def _(residuals: tuple[Array, Array], dy: Array) -> tuple[None, Array]:
    """dweight = Σ one-hot(ids)ᵀ · dy in at least float32, in blocks of cases: the standard has no scattered addition."""
    ids, weight = residuals
    xp, entries = xp_of(weight), weight.shape[0]
    flat, dtype = xp.reshape(ids, (-1, 1)), statistics_dtype(xp, weight.dtype)
    rows = xp.astype(xp.reshape(dy, (-1, weight.shape[1])), dtype, copy=False)
    classes = xp.arange(entries, dtype=flat.dtype, device=device_of(ids))
    total, block = xp.zeros_like(weight, dtype=dtype), max(1, _BLOCK // entries)
    for start in range(0, flat.shape[0], block):
        part = slice(start, min(start + block, flat.shape[0]))
        chosen = xp.astype(flat[part, :] == classes, dtype)
        total = total + xp.matmul(xp.matrix_transpose(chosen), rows[part, :])
    return None, xp.astype(total, weight.dtype, copy=False)
