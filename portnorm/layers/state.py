"""The state of a recurrent layer, as it comes with a call and as its directions take it."""

from __future__ import annotations

from typing import Any, NamedTuple

from portnorm.arrays import Array, device_of, is_concrete, namespace, xp_of
from portnorm.dtypes import default_integer, is_kind
from portnorm.errors import DTypeError, ShapeError, UnsupportedError

H_BOUND = 1.0 + 2.0**-7
"""The largest |h| that may come where |h| ≤ 1 is taken for granted: so much is rounding in the narrowest type."""


class PlacedState(NamedTuple):
    """A state as the directions take it: that of each layer and direction, and the number of steps that have gone before."""

    places: list[tuple[Array, ...]] | None  # `None`: those that the layer starts from by itself
    time: Array | None


def checked_time(x: Array, time: Any) -> Array:
    """The number of steps that have gone before, one for all sequences, as an integer array without axes."""
    xp = xp_of(x)
    if isinstance(time, int):
        time = xp.asarray(time, dtype=default_integer(xp), device=device_of(x))
    namespace(x=x, state=time)
    if not is_kind(xp, time.dtype, "integral"):
        raise DTypeError(f"`state` has time of dtype {time.dtype}; expected an integer, the number of steps before")
    if time.ndim:
        raise ShapeError(
            f"`state` has time of shape {tuple(time.shape)}; expected (), the number of steps before, which all sequences of a call "
            "share: call once for the sequences of each time"
        )
    if is_concrete(time) and int(time) < 0:
        raise UnsupportedError(f"`state` has time {int(time)}; expected the number of steps before, at least 0")
    return time


def is_of_one_cell(state: Any, count: int) -> bool:
    """Whether the first `count` parts of a state are (batch, hidden), as one cell has them, without an axis for layers."""
    if not isinstance(state, (tuple, list)) or len(state) < count:
        return False
    return all(getattr(a, "ndim", None) == 2 for a in state[:count])


def of_layers(state: Any, count: int) -> tuple[Any, ...]:
    """A state of one cell as that of a stack of one layer."""
    return (*[a[None, ...] for a in state[:count]], *state[count:])


def of_one_cell(state: Any, count: int) -> tuple[Any, ...]:
    """A state of a stack of one layer as that of one cell."""
    return (*[a[0, ...] for a in state[:count]], *state[count:])
