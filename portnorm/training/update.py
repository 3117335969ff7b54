"""One update of a run: loss, gradients, clipping; what is not finite is refused before anything is changed."""

from __future__ import annotations

import math
from typing import Any

import numpy

from portnorm.arrays import xp_of
from portnorm.checkpoint.training import Training
from portnorm.dtypes import dtype_name
from portnorm.errors import PortnormError
from portnorm.layers.layer import Layer
from portnorm.layers.recurrent import Recurrent
from portnorm.op import vjp
from portnorm.training.cases import Cases
from portnorm.training.history import History
from portnorm.training.targets import Loss, target_of
from portnorm.updates import Arrays, clip_by_global_norm

_DIVIDING = ("layer", "rms", "batch")
"""Norms of a cell that divide by a spread, which is √eps where all that is normalized is alike."""


def update(run: Training, part: Cases, loss: Loss, clip: float | None, noise: float, history: History) -> None:
    """θ ← optimizer(θ, clip(∂ loss / ∂θ)) on one batch.

    Raises `PortnormError` where the loss or a gradient is not finite; the model is then as it was before.
    """
    model, weights, buffers = run.model, part.counted(), dict(run.model.buffers)
    try:
        if model.recurrent:
            state = model.initial_state(part.count, noise=noise, rng=run.rng) if noise else None
            y, _, pullback = model.vjp(part.x, state, part.lengths, training=True, rng=run.rng)
        else:
            y, pullback = model.vjp(part.x, training=True, rng=run.rng)
        value, loss_pullback = vjp(loss, y, target_of(y, part.y, loss), *(() if weights is None else (weights,)))
        number = float(value)
        if not math.isfinite(number):
            rate = "try a smaller learning rate, or " if run.step else ""
            raise PortnormError(f"the loss is {number} after {run.step} updates; {rate}look for NaN and very large numbers in `x` and `y`")
        with numpy.errstate(over="ignore", divide="ignore", invalid="ignore"):  # what comes of it is told below, by name
            grads = pullback(loss_pullback(xp_of(value).ones_like(value))[0])[-1]
            clipped, norm = (grads, None) if clip is None else clip_by_global_norm(grads, clip)
        if not (_finite(grads) if norm is None else math.isfinite(float(norm))):
            raise PortnormError(_not_finite(model, grads, run.step, number, noise))
    except BaseException:
        model.assign(model.parameters(), buffers)
        raise
    run.update(clipped)
    history.losses.append(number)
    if norm is not None:
        history.gradient_norms.append(float(norm))


def _finite(grads: Arrays) -> bool:
    found: Any = None
    for g in grads.values():
        xp = xp_of(g)
        finite = xp.all(xp.isfinite(g))
        found = finite if found is None else xp.logical_and(found, finite)
    return bool(found)


def _not_finite(model: Layer, grads: Arrays, step: int, loss: float, noise: float) -> str:
    """Which gradients are not finite, and what most likely brought them there."""
    names = [name for name, g in grads.items() if not _finite({name: g})]
    others = f" and {len(names) - 1} more of {len(grads)}" if len(names) > 1 else ""
    named = f"the gradient of `{names[0]}`{others} is" if names else "the global norm of the gradients is"
    found = f"{named} not finite at update {step + 1}, while the loss is {loss:.4g}; the model is as it was before that update"
    causes = []
    cells = [layer for layer in model.layers() if isinstance(layer, Recurrent)]
    dividing = next((cell.variant.norm for cell in cells if cell.variant.norm in _DIVIDING), None)
    if dividing and not noise:
        noisy = "" if any(cell.learned_state for cell in cells) else "give state_noise=0.1 (a first state that is not 0), "
        causes.append(
            f"{dividing} normalization inside a cell multiplies a gradient by up to 1/√eps at each step at which all that it normalizes is "
            f"alike, such as steps of zeros in front while the state is 0 too; `clip` comes too late for that: {noisy}put padding behind "
            "the steps and give `lengths`, or take a variant with a larger eps"
        )
    if dtype_name(model.xp, model.dtype) == "float16":
        causes.append("float16 ends at 65,504; train in float32, model.to(dtype='float32')")
    if not causes:
        causes.append("look for very large numbers in `x` and `y`" + (", or try a smaller learning rate" if step else ""))
    return f"{found}. {'. '.join(cause[0].upper() + cause[1:] for cause in causes)}"
