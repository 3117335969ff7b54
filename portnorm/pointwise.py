"""The pointwise operations that gates are made of."""

from __future__ import annotations

import math

from portnorm.arrays import Array, xp_of
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
def split(x: Array, parts: int) -> tuple[tuple[Array, ...], None]:
    """`x` cut into equal `parts` along its last axis."""
    size = x.shape[-1] // parts
    return tuple(x[..., k * size : (k + 1) * size] for k in range(parts)), None


@split.backward
def _(residuals: None, dy: tuple[Array, ...]) -> tuple[Array, None]:
    return xp_of(dy[0]).concat(dy, axis=-1), None
