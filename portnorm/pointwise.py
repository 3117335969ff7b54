"""The pointwise operations that gates are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

from portnorm.arrays import Array, device_of, xp_of
from portnorm.op import op


@op
def sigmoid(x: Array) -> tuple[Array, tuple[Array]]:
    """Logistic function σ(x) = 1 / (1 + e⁻ˣ) in the dtype of `x`; never overflows, and keeps its relative accuracy in both tails.

    >>> import numpy as np
    >>> sigmoid(np.array([-1000.0, 0.0, 2.0])).round(4)
    array([0.    , 0.5   , 0.8808])
    """
    xp = xp_of(x)
    # e⁻ˣ at the limit is the largest power below the overflow of the type.
    limit = math.floor(math.log(float(xp.finfo(x.dtype).max)))
    y = 1.0 / (1.0 + xp.exp(xp.minimum(-x, float(limit))))
    return y, (y,)


@sigmoid.backward
def _(residuals: tuple[Array], dy: Array) -> tuple[Array]:
    """dx = dy · σ · (1 − σ)"""
    (y,) = residuals
    return (dy * y * (1.0 - y),)


@op
def split(x: Array, parts: int | tuple[int, ...]) -> tuple[tuple[Array, ...], None]:
    """`x` cut along its last axis into equal `parts`, or in the ratio that they state."""
    ratio = (1,) * parts if isinstance(parts, int) else parts
    unit, ends = x.shape[-1] // sum(ratio), list(accumulate(ratio))
    return tuple(x[..., start * unit : end * unit] for start, end in zip([0, *ends], ends, strict=False)), None


@split.backward
def _(residuals: None, dy: tuple[Array, ...]) -> tuple[Array, None]:
    return xp_of(dy[0]).concat(dy, axis=-1), None


class Activation(NamedTuple):
    """A nonlinearity, and its vjp from its result and the result's cotangent."""

    of: Callable[[Array], Array]
    vjp: Callable[[Array, Array], Array]


def _relu(x: Array) -> Array:
    xp = xp_of(x)
    return xp.maximum(x, xp.asarray(0.0, dtype=x.dtype, device=device_of(x)))


def _hard_sigmoid(slope: float) -> Activation:
    """clip(slope · x + ½, 0, 1)"""

    def vjp(y: Array, dy: Array) -> Array:
        xp = xp_of(y)
        return xp.where(xp.logical_and(y > 0, y < 1), slope * dy, 0.0)

    return Activation(lambda x: xp_of(x).clip(slope * x + 0.5, 0.0, 1.0), vjp)


ACTIVATIONS = {
    "sigmoid": Activation(sigmoid, lambda y, dy: dy * y * (1.0 - y)),
    "hard_sigmoid_5": _hard_sigmoid(1 / 5),
    "hard_sigmoid_6": _hard_sigmoid(1 / 6),
    "tanh": Activation(lambda x: xp_of(x).tanh(x), lambda y, dy: dy * (1.0 - y * y)),
    "relu": Activation(_relu, lambda y, dy: xp_of(y).where(y > 0, dy, 0.0)),
}
