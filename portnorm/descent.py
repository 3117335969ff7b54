"""The equation of each optimizer, for one parameter: what `portnorm.optimizers` does to each by itself, and a library may have as one loop.

A parameter `p` keeps its dtype. Its gradient `g`, widened by whoever calls, and what is remembered have that of `portnorm.updates.wide`;
numbers are floats, or arrays without axes where they depend on a count that cannot be looked at. `out` are the arguments that change, where
they get the results.
"""

from __future__ import annotations

from typing import Any

from portnorm.arrays import Array, xp_of
from portnorm.op import op

Two = tuple[Array, Array]
Three = tuple[Array, Array, Array]


def moved(p: Array, step: Array) -> Array:
    """p − step in the dtype of p, rounded once."""
    if step.dtype == p.dtype:
        return p - step
    xp = xp_of(p)
    return xp.astype(xp.astype(p, step.dtype) - step, p.dtype)


def written(out: Any, found: Any) -> Any:
    """What was found, in the arrays `out` where there are any."""
    if out is None:
        return found
    for place, value in zip(out, found, strict=True):
        place[...] = value
    return out


@op
def sgd_step(p: Array, g: Array, velocity: Array, lr: Any, momentum: float, *, out: Two | None = None) -> tuple[Two, None]:
    """v ← momentum · v + g;  θ ← θ − lr · v.  Both, the parameter first."""
    velocity = momentum * velocity + g
    return written(out, (moved(p, lr * velocity), velocity)), None


@op
def rmsprop_step(p: Array, g: Array, square: Array, lr: Any, decay: float, eps: float, *, out: Two | None = None) -> tuple[Two, None]:
    """s ← decay · s + (1 − decay) · g²;  θ ← θ − lr · g / (√s + eps)."""
    square = decay * square + (1.0 - decay) * g * g
    return written(out, (moved(p, lr * g / (xp_of(p).sqrt(square) + eps)), square)), None


@op
def adam_step(
    p: Array,
    g: Array,
    mean: Array,
    square: Array,
    scale: Any,
    root: Any,
    beta1: float,
    beta2: float,
    eps: float,
    decay: Any = None,
    *,
    out: Three | None = None,
) -> tuple[Three, None]:
    """m ← β₁m + (1−β₁)g;  s ← β₂s + (1−β₂)g²;  θ ← θ − (scale · m / (root · √s + eps) + decay · θ).

    scale = lr / (1 − β₁ᵗ) and root = 1 / √(1 − β₂ᵗ) take the bias from the moments.
    """
    xp = xp_of(p)
    mean = beta1 * mean + (1.0 - beta1) * g
    square = beta2 * square + (1.0 - beta2) * g * g
    step = scale * mean / (root * xp.sqrt(square) + eps)
    if decay is not None:
        step = step + decay * xp.astype(p, step.dtype, copy=False)
    return written(out, (moved(p, step), mean, square)), None
