"""Batch normalization: Ioffe & Szegedy 2015, arXiv 1502.03167, algorithm 1; statistics of each channel over everything else.

y = (x − μ) / sqrt(σ² + ε) · weight + bias,   μ and σ² over batch and space
"""

from __future__ import annotations

import math
from typing import Any

from portnorm.arrays import Array, Namespace, device_of, is_concrete, require_lengths
from portnorm.dtypes import default_integer, require_floating
from portnorm.errors import ShapeError, UnsupportedError
from portnorm.norm.arguments import check_affine, check_out, checked_channel_axis, checked_eps, checked_mask, checked_namespace
from portnorm.norm.normalize import Normalized, Reduce, given_statistics_vjp, normalize
from portnorm.op import ByKeyword, op


@op
def batch_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    mean: Array | None = None,
    var: Array | None = None,
    channel_axis: int = 1,
    eps: float = 1e-5,
    mask: Array | None = None,
    reduce: Reduce | None = None,
    out: Array | None = None,
) -> tuple[Array, Normalized]:
    """Batch normalization of `x`: with the given `mean` and `var` of each channel, or with the batch's own.

    y = (x − μ) / sqrt(σ² + eps) · weight + bias. Without `mean` and `var`, μ and the biased σ² of each channel are taken over every other
    axis: batch × height × width for a feature map. Running statistics are kept by the layer `portnorm.BatchNorm`.

    `weight`, `bias`, `mean` and `var` have shape (channels,). `mask` is True where a value counts, shaped like `x` without the channel
    axis, or broadcastable to `x`; where it is False the value enters no statistic and `y` is 0. The result has the shape and dtype of `x`.
    `out`, an array like `x`, takes the result and is returned.

    `reduce` is for batches that are parted among processes: a function that gives the sum of an array over all of them (MPI, NCCL, gloo).
    Every process calls with its part; counts, means and squares go through `reduce`, forward and backward, so that `y` and the
    cotangent of `x` are those of the whole batch. The cotangents of `weight` and `bias` are this part's, to be summed like all others.
    A part may be empty; one that has no values in any process, or a single one, is an error in all of them.

    Raises `ShapeError` (also, as torch does, where the batch's own statistics would come from one value), `DTypeError`, `UnsupportedError`.

    >>> import numpy as np, portnorm as pn
    >>> pn.batch_norm(np.array([[1.0, 10.0], [3.0, 30.0]])).round(4)
    array([[-1., -1.],
           [ 1.,  1.]])
    """
    xp = checked_namespace(x, weight, bias, mean=mean, var=var, mask=mask)
    require_lengths(x=x)
    require_floating(xp, mean=mean, var=var)
    channel = checked_channel_axis(x, channel_axis, 2)
    check_affine(x, (channel,), weight=weight, bias=bias, mean=mean, var=var)
    if (mean is None) != (var is None):
        given, absent = ("mean", "var") if var is None else ("var", "mean")
        raise UnsupportedError(f"`{given}` is given but `{absent}` is not; expected both, or none to use the batch's own")
    axes = _others(x, channel)
    if mean is None and reduce is not None:
        _check_parts(xp, x, axes, reduce)
    elif mean is None and all(x.shape[a] == 1 for a in axes):
        raise ShapeError(f"`x` {tuple(x.shape)} has one value per channel; expected more to take statistics of, or `mean` and `var`")
    mask = checked_mask(xp, x, mask, channel)
    check_out(x, out)
    along = tuple(x.shape[a] if a == channel else 1 for a in range(x.ndim))
    if mean is not None and var is not None:
        mean, var = xp.reshape(mean, along), xp.reshape(var, along)
    how: dict[str, Any] = {"eps": checked_eps(eps), "mask": mask, "mean": mean, "var": var, "reduce": reduce, "out": out}
    return normalize.forward(x, weight, bias, axes=axes, param_axes=(channel,), **how)


@batch_norm.backward
def _(
    residuals: Normalized,
    dy: Array,
    *,
    channel_axis: int = 1,
    mask: Array | None = None,
    mean: Array | None = None,
    var: Array | None = None,
    reduce: Reduce | None = None,
    **attrs: Any,
) -> tuple[Any, ...]:
    xp, channel = checked_namespace(dy, None, None), channel_axis % dy.ndim
    mask = checked_mask(xp, dy, mask, channel)
    found = normalize.vjp(residuals, dy, axes=_others(dy, channel), param_axes=(channel,), mask=mask, mean=mean, reduce=reduce)
    if mean is None or var is None:
        return found

    def of_statistic(which: int, dtype: Any) -> Array:
        return xp.astype(given_statistics_vjp(residuals, dy, (channel,), mask)[which], dtype, copy=False)

    dtypes = mean.dtype, var.dtype
    return (*found, ByKeyword(mean=lambda: of_statistic(0, dtypes[0]), var=lambda: of_statistic(1, dtypes[1])))


def _check_parts(xp: Namespace, x: Array, axes: tuple[int, ...], reduce: Reduce) -> None:
    """Raise `ShapeError`, in every process, unless they have two values of a channel in all: one that raised alone would be waited for."""
    told = reduce(xp.asarray([math.prod([x.shape[a] for a in axes])], dtype=default_integer(xp), device=device_of(x)))
    if is_concrete(told) and int(told[0]) < 2:
        what = "is empty in every process" if int(told[0]) == 0 else "is one value per channel in all processes"
        raise ShapeError(f"`x` {tuple(x.shape)} {what} that `reduce` sums over; expected more to take statistics of")


def _others(x: Array, channel: int) -> tuple[int, ...]:
    return tuple(a for a in range(x.ndim) if a != channel)
