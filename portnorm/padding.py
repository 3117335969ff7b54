"""What is padding: `lengths` and `mask`, what they mean for an array, and sequences whose steps are not side by side.

A masked step of a recurrent layer is no step at all. `pack_steps` moves the steps that count to the front of each sequence, so that all
that is inside knows lengths alone; `unpack_steps` brings the results back to where they belong, and repeats them where nothing happened.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

from portnorm.arrays import Array, device_of, namespace, seen, xp_of
from portnorm.dtypes import default_integer, statistics_dtype
from portnorm.errors import ShapeError
from portnorm.norm.arguments import checked_mask
from portnorm.op import op
from portnorm.scan import loop, steps_at


class Mask(NamedTuple):
    """Which values of an array count, where lengths do not say it."""

    values: Array
    """bool, True for what counts."""
    axes: tuple[int, ...]
    """The axes of the array along which `values` lies: all but those of the features, or every one where it varies along these too."""


Counted: TypeAlias = Array | Mask | None
"""What of a layer's input counts: the lengths (batch,) of its sequences, a mask, or all of it."""


def mask_of(x: Array, mask: Array, features: tuple[int, ...]) -> Mask:
    """A `mask` as the functions of `portnorm.norm` take it, for `x` with its features along these axes. Raises as they do."""
    xp = namespace(x=x, mask=mask)
    full: Any = checked_mask(xp, x, mask, features)
    axes = tuple(range(x.ndim))
    if mask.ndim < x.ndim:
        return Mask(mask, tuple(a for a in axes if a not in features))
    if any(full.shape[a] != 1 for a in features):
        return Mask(full, axes)
    return Mask(xp.squeeze(full, axis=features) if features else full, tuple(a for a in axes if a not in features))


def is_whole(mask: Mask) -> bool:
    """Whether a mask is known to leave nothing out."""
    known = seen(mask.values)
    return known is not None and bool(xp_of(known).all(known))


def valid(x: Array, counted: Array | Mask, features: tuple[int, ...], batch_first: bool, channels: bool) -> Array:
    """True where `x`, with its features along these axes, counts; broadcastable to `x`. Raises `ShapeError`.

    `channels` says whether a mask may vary along the features.
    """
    xp = xp_of(x)
    if not isinstance(counted, Mask):
        if x.ndim < 2 + len(features) or any(a < 2 for a in features):
            raise ShapeError(f"`lengths` needs `x` as (time, batch, features); got {tuple(x.shape)} with features along {features}")
        return _wide(steps_of(x, counted, batch_first), x.ndim)
    if len(counted.axes) == x.ndim and (channels or not features):
        return counted.values
    if counted.axes != tuple(a for a in range(x.ndim) if a not in features):
        raise _does_not_fit(x, counted, f"all but {features}, which hold its features")
    values = counted.values
    for axis in features:
        values = xp.expand_dims(values, axis=axis)
    return values


def steps_of(x: Array, lengths: Array, batch_first: bool = False) -> Array:
    """(time, batch), or (batch, time): True for the steps of `x` (time, batch, …) that come before the end of their sequence."""
    steps = xp_of(x).arange(x.shape[1 if batch_first else 0], dtype=lengths.dtype, device=device_of(x))
    return steps[None, :] < lengths[:, None] if batch_first else steps[:, None] < lengths[None, :]


def leading(y: Array, mask: Mask) -> Array:
    """`mask` broadcastable to `y`, whose first axes it lies along; raises `ShapeError` for another."""
    values = mask.values
    if values.ndim >= y.ndim or mask.axes != tuple(range(values.ndim)):
        raise _does_not_fit(y, mask, "the first ones, and not the last")
    return _wide(values, y.ndim)


def _wide(mask: Array, ndim: int) -> Array:
    """`mask` with axes of length 1 behind its own, `ndim` in all."""
    while mask.ndim < ndim:
        mask = mask[..., None]
    return mask


def _does_not_fit(x: Array, mask: Mask, expected: str) -> ShapeError:
    return ShapeError(
        f"`mask` {tuple(mask.values.shape)} lies along the axes {mask.axes} of the input; expected along the axes of {tuple(x.shape)}, a "
        f"value inside the model, {expected}"
    )


def are_in_front(mask: Array) -> bool:
    """Whether the steps of a mask (time, batch) are known to be the first ones of each sequence already."""
    known = seen(mask)
    return known is not None and not bool(xp_of(known).any(known[1:, :] & ~known[:-1, :]))


@op
def without_padding(x: Array, there: Array) -> tuple[Array, Array]:
    """`x` with 0 where `there`, which is broadcastable to it, is False, whatever stood there: neither value nor gradient can come of it."""
    return xp_of(x).where(there, x, 0), there


@without_padding.backward
def _(there: Array, dy: Array) -> tuple[Array, None]:
    return xp_of(dy).where(there, dy, 0.0), None


@op
def pack_steps(x: Array, mask: Array) -> tuple[Array, Array]:
    """`x` (time, batch, features) with the steps where `mask` (time, batch) is True first in each sequence, in order; then 0."""
    xp = xp_of(x)
    x = xp.where(mask[:, :, None], x, 0.0)
    order = xp.argsort(xp.astype(xp.logical_not(mask), xp.uint8), axis=0, stable=True)
    return steps_at(x, order), mask


@pack_steps.backward
def _(mask: Array, dy: Array) -> tuple[Array, None]:
    xp = xp_of(dy)
    none = xp.zeros(dy.shape[1:], dtype=dy.dtype, device=device_of(dy))
    return xp.where(mask[:, :, None], unpack_steps(dy, mask, none), 0.0), None


@op
def steps_so_far(mask: Array) -> tuple[Array, None]:
    """(time, batch): how many steps of `mask` are True up to each and at it."""
    xp = xp_of(mask)
    return xp.cumulative_sum(xp.astype(mask, default_integer(xp)), axis=0), None


@op
def unpack_steps(y: Array, mask: Array, first: Array) -> tuple[Array, Array]:
    """What a sequence gives where its steps lie: y[t] is that of the last step at or before t where `mask` (time, batch) is True.

    `y` (time, batch, features) has the steps in front, as `pack_steps` leaves them. Where there is none yet y[t] is `first`, of
    (batch, features).
    """
    xp = xp_of(y)
    place = steps_so_far(mask) - 1
    there = place >= 0
    found = steps_at(y, xp.where(there, place, 0))
    return xp.where(there[:, :, None], found, xp.expand_dims(first, axis=0)), mask


@unpack_steps.backward
def _(mask: Array, dy: Array) -> tuple[Array, None, Array]:
    """Each step has the sum of the cotangents of the places that repeat it, and `first` that of the places before all steps."""
    xp = xp_of(dy)
    wide = xp.astype(dy, statistics_dtype(xp, dy.dtype), copy=False)

    def body(waiting: Array, x: Any, _: Any) -> tuple[Array, tuple[Array, ...], None]:
        d, here = x
        total = waiting + d
        return xp.where(here, 0.0, total), (xp.where(here, total, 0.0),), None

    start = xp.zeros(dy.shape[1:], dtype=wide.dtype, device=device_of(dy))
    before, (sums,), _ = loop(start, (wide, mask[:, :, None]), body=body, reverse=True)
    sums, before = (xp.astype(a, dy.dtype, copy=False) for a in (sums, before))
    return pack_steps(sums, mask), None, before
