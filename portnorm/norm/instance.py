"""Instance normalization: Ulyanov, Vedaldi & Lempitsky 2016, arXiv 1607.08022; statistics of each case and channel over space.

y = (x − μ) / sqrt(σ² + ε) · weight + bias,   weight and bias per channel
"""

from __future__ import annotations

from typing import Any

from portnorm.arrays import Array
from portnorm.errors import ShapeError
from portnorm.norm.arguments import check_affine, check_out, checked_channel_axis, checked_eps, checked_mask, checked_namespace
from portnorm.norm.normalize import Axes, Normalized, normalize
from portnorm.op import op


@op
def instance_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    channel_axis: int = 1,
    eps: float = 1e-5,
    mask: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, Normalized]:
    """Instance normalization of `x` (batch, …, channels, …): each channel of each case over all space.

    y = (x − μ) / sqrt(σ² + eps) · weight + bias, with μ and the biased σ² over every axis but batch and channel.

    `weight` and `bias` have shape (channels,). `mask` is True where a value counts, shaped like `x` without the channel axis, or
    broadcastable to `x`; where it is False `y` is 0. The result has the shape and dtype of `x`.
    `out`, an array like `x`, takes the result and is returned.
    Raises `ShapeError`, `DTypeError`, `UnsupportedError`. Same as `torch.nn.functional.instance_norm`.

    >>> import numpy as np, portnorm as pn
    >>> pn.instance_norm(np.array([[[1.0, 3.0], [10.0, 30.0]]])).round(4)
    array([[[-1.,  1.],
            [-1.,  1.]]])
    """
    xp = checked_namespace(x, weight, bias, mask=mask)
    channel = checked_channel_axis(x, channel_axis, 3)
    if channel == 0:
        raise ShapeError(f"`channel_axis` {channel_axis} is the batch axis of `x` {tuple(x.shape)}")
    check_affine(x, (channel,), weight=weight, bias=bias)
    mask = checked_mask(xp, x, mask, channel)
    check_out(x, out)
    return normalize.forward(x, weight, bias, mask=mask, eps=checked_eps(eps), out=out, **_axes(x.ndim, channel))


@instance_norm.backward
def _(residuals: Normalized, dy: Array, *, channel_axis: int = 1, eps: float = 1e-5, mask: Array | None = None) -> tuple[Any, ...]:
    channel = channel_axis % dy.ndim
    mask = checked_mask(checked_namespace(dy, None, None), dy, mask, channel)
    return normalize.vjp(residuals, dy, mask=mask, **_axes(dy.ndim, channel))


def _axes(ndim: int, channel: int) -> Axes:
    """Every axis but batch and channel is normalized; gain and shift lie along the channel."""
    return {"axes": tuple(a for a in range(1, ndim) if a != channel), "param_axes": (channel,)}
