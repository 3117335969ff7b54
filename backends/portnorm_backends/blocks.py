"""Sums in blocks, for libraries that add one value after the other."""

from __future__ import annotations

from collections.abc import Callable

from portnorm.arrays import Array

_BLOCK = 16
"""Values that are added one after the other."""


def shortened(
    x: Array,
    axis: int,
    add: Callable[[Array, int], Array],
    reshape: Callable[[Array, tuple[int, ...]], Array],
    concat: Callable[[list[Array], int], Array],
) -> Array:
    """`x` with sums of blocks along `axis`, and sums of these, until few are left; `add` sums over one axis, which goes."""
    while x.shape[axis] > 2 * _BLOCK:
        whole, index = x.shape[axis] // _BLOCK, (slice(None),) * axis
        before, after = tuple(x.shape[:axis]), tuple(x.shape[axis + 1 :])
        sums = add(reshape(x[(*index, slice(whole * _BLOCK), ...)], (*before, whole, _BLOCK, *after)), axis + 1)
        if whole * _BLOCK < x.shape[axis]:
            rest = add(x[(*index, slice(whole * _BLOCK, None), ...)], axis)
            sums = concat([sums, reshape(rest, (*before, 1, *after))], axis)
        x = sums
    return x
