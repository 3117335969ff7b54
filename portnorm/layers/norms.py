"""The normalization layers: parameters and running statistics around the functions of `portnorm.norm`."""

from __future__ import annotations

from typing import Any

import numpy

from portnorm.arrays import Array, DType, Namespace, xp_of
from portnorm.errors import ShapeError
from portnorm.layers.layer import Arrays, Layer
from portnorm.norm.batch import batch_norm
from portnorm.norm.batch_renorm import batch_renorm
from portnorm.norm.group import group_norm
from portnorm.norm.instance import instance_norm
from portnorm.norm.layer import layer_norm
from portnorm.norm.normalize import Reduce, bessel
from portnorm.norm.rms import rms_norm
from portnorm.op import Op
from portnorm.scan import sequence_mask
from portnorm.statistics import check_momentum, moving_average


class _Norm(Layer):
    """A layer that calls one normalization Op with its weight and bias."""

    op: Op[..., Any]

    def __init__(
        self,
        config: dict[str, Any],
        shape: tuple[int, ...],
        weight: bool,
        bias: bool,
        xp: Namespace | str | None,
        device: Any,
        dtype: DType,
    ):
        super().__init__(config, xp, device, dtype)
        if weight:
            self.params["weight"] = self._new(numpy.ones(shape))
        if bias:
            self.params["bias"] = self._new(numpy.zeros(shape))

    def operation(self, training: bool) -> Op[..., Any]:
        """The Op that is called."""
        return self.op

    def arguments(self, params: Arrays) -> tuple[Any, ...]:
        """What the Op takes after `x`."""
        return params.get("weight"), params.get("bias")

    def attributes(self, buffers: Arrays, x: Array, lengths: Array | None, training: bool) -> dict[str, Any]:
        """The Op's keyword arguments."""
        return {}

    def forward(
        self, params: Arrays, buffers: Arrays, x: Array, state: Any, lengths: Array | None, training: bool, keep: bool
    ) -> tuple[Array, Any, Arrays, Any]:
        attributes = self.attributes(buffers, x, lengths, training)
        if not keep and not training:
            return self.operation(training)(x, *self.arguments(params), **attributes), state, buffers, None
        y, residuals = self.operation(training).forward(x, *self.arguments(params), **attributes)
        return y, state, self.new_buffers(buffers, residuals, training), (residuals, attributes, tuple(params))

    def new_buffers(self, buffers: Arrays, residuals: Any, training: bool) -> Arrays:
        return buffers

    def backward(self, residuals: Any, dy: Array | None, dstate: Any, training: bool) -> tuple[Array, Any, Arrays]:
        residuals, attributes, names = residuals
        dx, *cotangents = self.operation(training).vjp(residuals, dy, **attributes)
        return dx, dstate, dict(zip(names, [d for d in cotangents if d is not None], strict=True))


class LayerNorm(_Norm):
    """Layer normalization over the last axes, of shape `normalized_shape`. See `portnorm.layer_norm`; same as `torch.nn.LayerNorm`.

    >>> import numpy as np, portnorm as pn
    >>> pn.LayerNorm(3, dtype="float64")(np.array([[1.0, 2.0, 3.0]])).round(4)
    array([[-1.2247,  0.    ,  1.2247]])
    """

    op: Op[..., Any] = layer_norm

    def __init__(
        self,
        normalized_shape: int | tuple[int, ...],
        *,
        eps: float = 1e-5,
        affine: bool = True,
        bias: bool = True,
        xp: Namespace | str | None = None,
        device: Any = None,
        dtype: DType = "float32",
    ):
        shape = _shape(normalized_shape)
        config = {"normalized_shape": list(shape), "eps": eps, "affine": affine, "bias": bias}
        super().__init__(config, shape, affine, affine and bias, xp, device, dtype)
        self.axis: int | tuple[int, ...] = -1 if len(shape) == 1 else tuple(range(-len(shape), 0))
        self.shape, self.eps = shape, eps

    def input_dims(self) -> tuple[int | str, ...]:
        return ("batch", *self.shape)

    def attributes(self, buffers: Arrays, x: Array, lengths: Array | None, training: bool) -> dict[str, Any]:
        if tuple(x.shape[-len(self.shape) :]) != self.shape:
            raise ShapeError(f"`x` has shape {tuple(x.shape)}; expected (…, {', '.join(map(str, self.shape))})")
        return {"axis": self.axis, "eps": self.eps}


class RMSNorm(LayerNorm):
    """RMS normalization over the last axes, of shape `normalized_shape`. See `portnorm.rms_norm`."""

    op: Op[..., Any] = rms_norm

    def __init__(
        self,
        normalized_shape: int | tuple[int, ...],
        *,
        eps: float = 1e-5,
        affine: bool = True,
        xp: Namespace | str | None = None,
        device: Any = None,
        dtype: DType = "float32",
    ):
        super().__init__(normalized_shape, eps=eps, affine=affine, bias=False, xp=xp, device=device, dtype=dtype)
        del self.config["bias"]

    def arguments(self, params: Arrays) -> tuple[Any, ...]:
        return (params.get("weight"),)


class _ChannelNorm(_Norm):
    """A normalization with one weight and bias per channel, and a mask from `lengths` where `x` is (time, batch, features)."""

    def __init__(self, config: dict[str, Any], xp: Namespace | str | None, device: Any, dtype: DType):
        affine = config["affine"]
        super().__init__(config, (config["num_features"],), affine, affine, xp, device, dtype)
        self.num_features, self.channel_axis, self.eps = config["num_features"], config["channel_axis"], config["eps"]

    def input_dims(self) -> tuple[int | str, ...]:
        space = () if type(self) is BatchNorm else ("space",)
        return ("batch", self.num_features, *space) if self.channel_axis == 1 else ("batch", *space, self.num_features)

    def attributes(self, buffers: Arrays, x: Array, lengths: Array | None, training: bool) -> dict[str, Any]:
        if x.ndim < 2 or not -x.ndim <= self.channel_axis < x.ndim or x.shape[self.channel_axis] != self.num_features:
            raise ShapeError(f"`x` has shape {tuple(x.shape)}; expected length {self.num_features} at axis {self.channel_axis}")
        mask = None if lengths is None else _mask(x, lengths, self.channel_axis)
        return {"channel_axis": self.channel_axis, "eps": self.eps, "mask": mask}


class _Tracking(_ChannelNorm):
    """A normalization that keeps running statistics of its channels."""

    momentum: float | None

    def _start_statistics(self) -> None:
        self.buffers = {
            "running_mean": self._new(numpy.zeros(self.num_features)),
            "running_var": self._new(numpy.ones(self.num_features)),
            "num_batches_tracked": self._new(0, integer=True),
        }

    def forget_statistics(self) -> None:
        self.momentum = None
        self._start_statistics()

    def _followed(self, buffers: Arrays, mean: Array, var: Array, seen: Array | None) -> Arrays:
        """The running statistics after a batch of these; a batch in which nothing counts (`seen`) has none, and changes none."""
        xp, before = xp_of(mean), buffers["num_batches_tracked"]
        seen = xp.ones_like(before) > 0 if seen is None else seen
        tracked = before + xp.astype(seen, before.dtype)
        new = {"num_batches_tracked": tracked}
        for name, batch in {"running_mean": mean, "running_var": var}.items():
            average = xp.astype(moving_average(buffers[name], batch, self.momentum, tracked), buffers[name].dtype)
            new[name] = xp.where(seen, average, buffers[name])
        return {name: new[name] for name in buffers}


class InstanceNorm(_Tracking):
    """Instance normalization of `num_features` channels. See `portnorm.instance_norm`; torch's default is `affine=False` as here.

    With `track_running_stats` inference takes running statistics in place of each case's own, as torch does: the averages over the cases
    of a batch of their means and of their unbiased variances, which training follows by `momentum`.
    """

    op: Op[..., Any] = instance_norm

    def __init__(
        self,
        num_features: int,
        *,
        channel_axis: int = 1,
        eps: float = 1e-5,
        affine: bool = False,
        track_running_stats: bool = False,
        momentum: float | None = 0.1,
        xp: Namespace | str | None = None,
        device: Any = None,
        dtype: DType = "float32",
    ):
        config: dict[str, Any] = {"num_features": num_features, "channel_axis": channel_axis, "eps": eps, "affine": affine}
        config |= {"track_running_stats": True, "momentum": momentum} if track_running_stats else {}
        super().__init__(config, xp, device, dtype)
        self.track_running_stats, self.momentum = track_running_stats, momentum
        check_momentum(momentum)
        if track_running_stats:
            self._start_statistics()

    def forget_statistics(self) -> None:
        if self.track_running_stats:
            super().forget_statistics()

    def operation(self, training: bool) -> Op[..., Any]:
        return batch_norm if self.track_running_stats and not training else self.op

    def attributes(self, buffers: Arrays, x: Array, lengths: Array | None, training: bool) -> dict[str, Any]:
        given = self.track_running_stats and not training
        running = {"mean": buffers["running_mean"], "var": buffers["running_var"]} if given else {}
        return {**super().attributes(buffers, x, lengths, training), **running}

    def forward(
        self, params: Arrays, buffers: Arrays, x: Array, state: Any, lengths: Array | None, training: bool, keep: bool
    ) -> tuple[Array, Any, Arrays, Any]:
        y, state, buffers, residuals = super().forward(params, buffers, x, state, lengths, training, keep)
        if training and self.track_running_stats:
            buffers = self._after(buffers, x, None if lengths is None else _mask(x, lengths, self.channel_axis))
        return y, state, buffers, residuals

    def _after(self, buffers: Arrays, x: Array, mask: Array | None) -> Arrays:
        """The running statistics after a batch: each channel of each case is a channel of its own to batch normalization."""
        xp, channel, cases = xp_of(x), self.channel_axis % x.ndim, x.shape[0]
        order = (*(a for a in range(1, x.ndim) if a != channel), 0, channel)
        apart, seen = (
            None if a is None else xp.reshape(xp.permute_dims(a, order), (-1, cases * self.num_features))
            for a in (x, None if mask is None else xp.broadcast_to(mask, x.shape))
        )
        _, residuals = batch_norm.forward(apart, channel_axis=1, mask=seen)
        mean, var = (xp.reshape(s, (cases, self.num_features)) for s in residuals.statistics())
        count = None if residuals.counted is None else xp.reshape(residuals.counted, mean.shape)
        var = var * bessel(var, count, residuals.shape, (0,))
        if count is None:
            return self._followed(buffers, xp.mean(mean, axis=0), xp.mean(var, axis=0), None)
        counts = xp.astype(count > 0, mean.dtype)
        found = xp.sum(counts, axis=0)
        mean, var = (xp.sum(s * counts, axis=0) / xp.where(found > 0, found, 1.0) for s in (mean, var))
        return self._followed(buffers, mean, var, xp.max(found) > 0)


class GroupNorm(_ChannelNorm):
    """Group normalization of `num_features` channels in `num_groups` groups. See `portnorm.group_norm`; as `torch.nn.GroupNorm`."""

    op: Op[..., Any] = group_norm

    def __init__(
        self,
        num_groups: int,
        num_features: int,
        *,
        channel_axis: int = 1,
        eps: float = 1e-5,
        affine: bool = True,
        xp: Namespace | str | None = None,
        device: Any = None,
        dtype: DType = "float32",
    ):
        if num_groups < 1 or num_features % num_groups:
            raise ShapeError(f"`num_groups` is {num_groups}; expected a divisor of `num_features` {num_features}")
        config = {"num_groups": num_groups, "num_features": num_features, "channel_axis": channel_axis, "eps": eps, "affine": affine}
        super().__init__(config, xp, device, dtype)
        self.num_groups = num_groups

    def arguments(self, params: Arrays) -> tuple[Any, ...]:
        return self.num_groups, params.get("weight"), params.get("bias")


class BatchNorm(_Tracking):
    """Batch normalization of `num_features` channels, with running statistics. See `portnorm.batch_norm`; as `torch.nn.BatchNorm1d…3d`.

    In training the batch's own statistics normalize, and the running ones follow: running + momentum · (batch − running), where
    `momentum` is the weight of the new value and `None` means the plain average of all batches. As in torch the running variance is
    the unbiased one (n/(n−1)); `unbiased=False` keeps the biased one, as ONNX, flax and Keras 3 do. With `lengths`, `x` is
    (time, batch, features) or what `channel_axis` says, and padding enters no statistic. `reduce`, which is not saved with
    the layer, sums an array over the processes that have a part of the batch each: see `portnorm.batch_norm`.

    >>> import numpy as np, portnorm as pn
    >>> layer = pn.BatchNorm(1, momentum=None, dtype="float64")
    >>> _ = layer(np.array([[1.0], [3.0]]), training=True)
    >>> layer.state_dict()["running_mean"], layer.state_dict()["running_var"]
    (array([2.]), array([2.]))
    """

    op: Op[..., Any] = batch_norm

    def __init__(
        self,
        num_features: int,
        *,
        channel_axis: int = 1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        unbiased: bool = True,
        reduce: Reduce | None = None,
        xp: Namespace | str | None = None,
        device: Any = None,
        dtype: DType = "float32",
    ):
        config = {"num_features": num_features, "channel_axis": channel_axis, "eps": eps, "momentum": momentum, "affine": affine}
        super().__init__({**config, "unbiased": unbiased}, xp, device, dtype)
        self.momentum, self.unbiased, self.reduce = momentum, unbiased, reduce
        check_momentum(momentum)
        self._start_statistics()

    def attributes(self, buffers: Arrays, x: Array, lengths: Array | None, training: bool) -> dict[str, Any]:
        running = {"mean": buffers["running_mean"], "var": buffers["running_var"]}
        return {**super().attributes(buffers, x, lengths, training), **({"reduce": self.reduce} if training else running)}

    def new_buffers(self, buffers: Arrays, residuals: Any, training: bool) -> Arrays:
        if not training:
            return buffers
        xp = xp_of(residuals.mean)
        mean, var = (xp.reshape(s, (self.num_features,)) for s in residuals.statistics())
        if self.unbiased:
            axes = tuple(a for a in range(len(residuals.shape)) if a != self.channel_axis % len(residuals.shape))
            count = residuals.counted
            count = None if count is None else xp.reshape(xp.broadcast_to(count, residuals.mean.shape), var.shape)
            var = var * bessel(var, count, residuals.shape, axes)
        return self._followed(buffers, mean, var, None if residuals.counted is None else xp.max(residuals.counted) > 0)


class BatchRenorm(BatchNorm):
    """Batch renormalization of `num_features` channels (Ioffe 2017). See `portnorm.batch_renorm`; inference is that of `BatchNorm`.

    `r_max` and `d_max` can be set between updates, as the paper's schedule asks. The running variance is the biased one.

    >>> import numpy as np, portnorm as pn
    >>> layer = pn.BatchRenorm(1, dtype="float64")
    >>> x = np.array([[1.0], [3.0]])
    >>> layer(x, training=True).round(4)  # the running statistics were 0 and 1
    array([[1.],
           [3.]])
    """

    def __init__(
        self,
        num_features: int,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        channel_axis: int = 1,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        xp: Namespace | str | None = None,
        device: Any = None,
        dtype: DType = "float32",
    ):
        place = {"xp": xp, "device": device, "dtype": dtype}
        super().__init__(num_features, channel_axis=channel_axis, eps=eps, momentum=momentum, affine=affine, unbiased=False, **place)
        del self.config["unbiased"]
        self.config |= {"r_max": r_max, "d_max": d_max}
        self.r_max, self.d_max = r_max, d_max

    def operation(self, training: bool) -> Op[..., Any]:
        return batch_renorm if training else self.op

    def attributes(self, buffers: Arrays, x: Array, lengths: Array | None, training: bool) -> dict[str, Any]:
        bounds = {"r_max": self.r_max, "d_max": self.d_max} if training else {}
        return {**super().attributes(buffers, x, lengths, False), **bounds}

    def new_buffers(self, buffers: Arrays, residuals: Any, training: bool) -> Arrays:
        return super().new_buffers(buffers, residuals.normalized if training else residuals, training)


def _shape(normalized_shape: int | tuple[int, ...]) -> tuple[int, ...]:
    return (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)


def _mask(x: Array, lengths: Array, channel_axis: int) -> Array:
    if x.ndim != 3 or channel_axis % 3 != 2:
        raise ShapeError(f"`lengths` needs `x` as (time, batch, features) and channel_axis=-1; got {tuple(x.shape)} and {channel_axis}")
    return sequence_mask(x, lengths)
