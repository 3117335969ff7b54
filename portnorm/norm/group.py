"""Group normalization: Wu & He 2018, arXiv 1803.08494, equation 7; statistics of each case over a group of channels and space.

y = (x − μ) / sqrt(σ² + ε) · weight + bias,   weight and bias per channel
"""

from __future__ import annotations

from typing import Any

from portnorm.arrays import Array, require_lengths
from portnorm.errors import ShapeError
from portnorm.norm.arguments import check_affine, check_out, checked_channel_axis, checked_eps, checked_mask, checked_namespace
from portnorm.norm.normalize import Axes, Normalized, normalize, written
from portnorm.op import op
from portnorm.scalars import whole_number


@op
def group_norm(
    x: Array,
    num_groups: int,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    channel_axis: int = 1,
    eps: float = 1e-5,
    mask: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, Normalized]:
    """Group normalization of `x` (batch, …, channels, …) in `num_groups` groups of neighbouring channels.

    y = (x − μ) / sqrt(σ² + eps) · weight + bias, with μ and the biased σ² of each case over the channels of a group and all space.

    `weight` and `bias` have shape (channels,). `mask` is True where a value counts, shaped like `x` without the channel axis, or
    broadcastable to `x`; where it is False `y` is 0. One group per channel is instance normalization, one group in all is layer
    normalization over channels and space. The result has the shape and dtype of `x`.
    `out`, an array like `x`, takes the result and is returned.
    Raises `ShapeError` (also where `num_groups` does not divide the channels), `DTypeError`, `UnsupportedError`.

    >>> import numpy as np, portnorm as pn
    >>> pn.group_norm(np.array([[[1.0], [3.0], [10.0], [30.0]]]), 2)[..., 0].round(4)
    array([[-1.,  1., -1.,  1.]])
    """
    xp = checked_namespace(x, weight, bias, mask=mask)
    require_lengths(x=x)
    channel = checked_channel_axis(x, channel_axis, 2)
    channels = x.shape[channel]
    if channel == 0:
        raise ShapeError(f"`channel_axis` {channel_axis} is the batch axis of `x` {tuple(x.shape)}")
    num_groups = whole_number("num_groups", num_groups)
    if num_groups < 1 or channels % num_groups:
        raise ShapeError(
            f"`num_groups` is {num_groups} but axis {channel} of `x` {tuple(x.shape)} has {channels} channels; expected a divisor"
        )
    check_affine(x, (channel,), weight=weight, bias=bias)
    mask = checked_mask(xp, x, mask, channel)
    check_out(x, out)
    grouped = (num_groups, channels // num_groups)
    into = None if out is None else _view(xp, out, _grouped_shape(x, channel, grouped))
    y, residuals = normalize.forward(
        xp.reshape(x, _grouped_shape(x, channel, grouped)),
        None if weight is None else xp.reshape(weight, grouped),
        None if bias is None else xp.reshape(bias, grouped),
        mask=_grouped_mask(xp, mask, channel, grouped),
        eps=checked_eps(eps),
        out=into,
        **_axes(x.ndim, channel),
    )
    return (xp.reshape(y, x.shape) if out is None else out if into is not None else written(xp.reshape(y, x.shape), out)), residuals


@group_norm.backward
def _(residuals: Normalized, dy: Array, *, channel_axis: int = 1, eps: float = 1e-5, mask: Array | None = None) -> tuple[Any, ...]:
    xp = checked_namespace(dy, None, None)
    channel = channel_axis % dy.ndim
    grouped = residuals.shape[channel : channel + 2]
    mask = _grouped_mask(xp, checked_mask(xp, dy, mask, channel), channel, grouped)
    dx, dweight, dbias = normalize.vjp(
        residuals, xp.reshape(dy, _grouped_shape(dy, channel, grouped)), mask=mask, **_axes(dy.ndim, channel)
    )
    flat = [None if d is None else xp.reshape(d, (dy.shape[channel],)) for d in (dweight, dbias)]
    return (xp.reshape(dx, dy.shape), None, *flat)


def _axes(ndim: int, channel: int) -> Axes:
    """Axes of the grouped array: all but batch and group are normalized; gain and shift lie along group and channel."""
    return {"axes": tuple(a for a in range(1, ndim + 1) if a != channel), "param_axes": (channel, channel + 1)}


def _grouped_shape(x: Array, channel: int, grouped: tuple[int, ...]) -> tuple[int, ...]:
    return (*x.shape[:channel], *grouped, *x.shape[channel + 1 :])


def _view(xp: Any, a: Array, shape: tuple[int, ...]) -> Array | None:
    """The same memory in another shape, or `None` where its layout does not allow that."""
    try:
        return xp.reshape(a, shape, copy=False)
    except (ValueError, NotImplementedError, AttributeError):  # the last is Dask's, which has no views
        return None


def _grouped_mask(xp: Any, mask: Array | None, channel: int, grouped: tuple[int, ...]) -> Array | None:
    if mask is None:
        return None
    if mask.shape[channel] == 1:
        return xp.expand_dims(mask, axis=channel)
    return xp.reshape(mask, _grouped_shape(mask, channel, grouped))
