"""Batch renormalization: Ioffe 2017, arXiv 1702.03275, algorithm 1.

    y = (x̂ · r + d) · weight + bias,   r = clip(σ_B / σ, 1 / r_max, r_max),   d = clip((μ_B − μ) / σ, −d_max, d_max)

x̂ is x with the batch's own μ_B and σ_B, and μ and σ are the running ones: training sees what inference will, as far as the clips allow.
r and d are constants to the gradient. It is batch normalization with gain weight · r and shift weight · d + bias.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from portnorm.arrays import Array, constant, require_given, require_lengths, xp_of
from portnorm.dtypes import float32_value
from portnorm.norm.arguments import check_affine, checked_channel_axis, checked_eps, checked_namespace
from portnorm.norm.batch import batch_norm
from portnorm.norm.normalize import Normalized
from portnorm.op import op
from portnorm.scalars import real_number


class Renormalized(NamedTuple):
    """Residuals of `batch_renorm`."""

    normalized: Normalized
    r: Array  # (channels,)
    d: Array  # (channels,)
    weight: Array | None
    bias: Array | None


@op
def batch_renorm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    mean: Array,
    var: Array,
    r_max: float = 3.0,
    d_max: float = 5.0,
    channel_axis: int = 1,
    eps: float = 1e-5,
    mask: Array | None = None,
) -> tuple[Array, Renormalized]:
    """Batch normalization in training, corrected towards the running `mean` and `var` of each channel.

    With r_max = 1 and d_max = 0 it is `batch_norm`; with no bounds (`inf`) its values are those of `batch_norm` with `mean` and `var`. The
    paper starts with the former and relaxes to r_max = 3, d_max = 5. Shapes, mask, dtype and errors are those of `batch_norm`, and
    `UnsupportedError` for bounds below 1 and 0.

    >>> import numpy as np, portnorm as pn
    >>> x = np.array([[1.0], [3.0]])
    >>> pn.batch_renorm(x, mean=np.array([1.0]), var=np.array([4.0]), eps=0.0)
    array([[0.],
           [1.]])
    """
    require_given(mean=mean, var=var)
    xp = checked_namespace(x, weight, bias, mean=mean, var=var, mask=mask)
    require_lengths(x=x)
    r_max, d_max = checked_bounds(r_max, d_max)
    channel = checked_channel_axis(x, channel_axis, 2)
    check_affine(x, (channel,), weight=weight, bias=bias, mean=mean, var=var)
    own = batch_norm.forward(x, channel_axis=channel_axis, eps=eps, mask=mask)[1]
    own_mean, own_var = (xp.reshape(s, mean.shape) for s in own.statistics())
    eps = checked_eps(eps)
    mean, var = (xp.astype(s, own_var.dtype, copy=False) for s in (mean, var))
    std = xp.sqrt(var + float32_value(eps))
    r = xp.clip(xp.sqrt(own_var + float32_value(eps)) / std, 1.0 / r_max, r_max)
    d = xp.clip((own_mean - mean) / std, -d_max, d_max)
    r, d = constant(r), constant(d)  # as the paper has them, also to who differentiates these lines by itself
    gain, shift = (r, d) if weight is None else (xp.astype(weight, r.dtype, copy=False) * s for s in (r, d))
    shift = shift if bias is None else shift + xp.astype(bias, r.dtype, copy=False)
    y, normalized = batch_norm.forward(x, gain, shift, channel_axis=channel_axis, eps=eps, mask=mask)
    return y, Renormalized(normalized, r, d, weight, bias)


@batch_renorm.backward
def _(residuals: Renormalized, dy: Array, *, channel_axis: int = 1, mask: Array | None = None, **attrs: Any) -> tuple[Any, ...]:
    dx, dgain, dshift = batch_norm.vjp(residuals.normalized, dy, channel_axis=channel_axis, mask=mask)
    weight = residuals.weight
    dweight = None if weight is None else xp_of(dy).astype(dgain * residuals.r + dshift * residuals.d, weight.dtype, copy=False)
    return dx, dweight, None if residuals.bias is None else xp_of(dy).astype(dshift, residuals.bias.dtype, copy=False)


def checked_bounds(r_max: float, d_max: float) -> tuple[float, float]:
    """Both bounds as floats; raises `UnsupportedError` for one that would forbid what batch normalization does."""
    infinite = float("inf")
    return (
        real_number("r_max", r_max, 1, infinite, "a number of at least 1"),
        real_number("d_max", d_max, 0, infinite, "a number of at least 0"),
    )
