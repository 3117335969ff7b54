"""Rows of a table, chosen by integers."""

from __future__ import annotations

import math

from portnorm.arrays import Array, device_of, namespace, require_given, require_lengths, seen, xp_of
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
    known = seen(ids)
    if known is not None and 0 not in ids.shape:
        low, high = int(xp_of(known).min(known)), int(xp_of(known).max(known))
        if low < 0 or high >= weight.shape[0]:
            raise ShapeError(f"`ids` reach from {low} to {high}; expected 0 to {weight.shape[0] - 1}")
    if ids.dtype != xp.int32 and ids.dtype != xp.int64:
        ids = xp.astype(ids, default_integer(xp))  # a narrow type could not name every entry, and some libraries take none by it
    rows = xp.take(weight, xp.reshape(ids, (math.prod(ids.shape),)), axis=0)
    return xp.reshape(rows, (*ids.shape, weight.shape[1])), (ids, weight)


@embedding.backward
def _(residuals: tuple[Array, Array], dy: Array) -> tuple[None, Array]:
    """dweight: the rows of dy added up by entry, in at least float32."""
    ids, weight = residuals
    xp = xp_of(weight)
    rows = xp.astype(xp.reshape(dy, (-1, weight.shape[1])), statistics_dtype(xp, weight.dtype), copy=False)
    return None, xp.astype(rows_added(rows, xp.reshape(ids, (-1,)), entries=weight.shape[0]), weight.dtype, copy=False)


@op
def rows_added(rows: Array, ids: Array, *, entries: int) -> tuple[Array, Array]:
    """Σ one-hot(ids)ᵀ · rows: of `rows` (n, features) those with the same number in `ids` (n,) added up, (entries, features).

    In blocks of rows, as products of matrices: the standard has no scattered addition.

    >>> import numpy as np
    >>> rows_added(np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), np.array([2, 0, 2]), entries=3)
    array([[3., 4.],
           [0., 0.],
           [6., 8.]])
    """
    xp = xp_of(rows)
    column, classes = ids[:, None], xp.arange(entries, dtype=ids.dtype, device=device_of(ids))
    total, block = xp.zeros((entries, rows.shape[1]), dtype=rows.dtype, device=device_of(rows)), max(1, _BLOCK // entries)
    for start in range(0, rows.shape[0], block):
        part = slice(start, min(start + block, rows.shape[0]))
        chosen = xp.astype(column[part, :] == classes, rows.dtype)
        total = total + xp.matmul(xp.matrix_transpose(chosen), rows[part, :])
    return total, ids


@rows_added.backward
def _(residuals: Array, dy: Array, *, entries: int) -> tuple[Array, None]:
    return xp_of(dy).take(dy, residuals, axis=0), None
