"""Normalizations of channels: batch, instance and group, with the running statistics of the first two."""

from __future__ import annotations

import math
from typing import Any

import numpy

from portnorm.arrays import Array, DType, Namespace, device_of, xp_of
from portnorm.errors import ShapeError
from portnorm.layers.norms import Norm
from portnorm.layers.pure import Arrays, Keep
from portnorm.norm.arguments import checked_eps
from portnorm.norm.batch import batch_norm
from portnorm.norm.batch_renorm import batch_renorm, checked_bounds
from portnorm.norm.group import group_norm
from portnorm.norm.instance import instance_norm
from portnorm.norm.normalize import Normalized, Reduce, bessel
from portnorm.op import Op
from portnorm.padding import Counted, Mask
from portnorm.scalars import switch, whole_number
from portnorm.statistics import BATCHES, VALUES, checked_momentum, moved


class _ChannelNorm(Norm):
    """A normalization with one weight and bias per channel. It takes a mask, or `lengths` where `x` is (time, batch, features)."""

    masks = masks_channels = True

    num_features: int
    channel_axis: int
    eps: float
    affine: bool

    def __init__(self, config: dict[str, Any], xp: Namespace | str | None, device: Any, dtype: DType):
        checked = {
            **config,
            "num_features": whole_number("num_features", config["num_features"], 1),
            "channel_axis": whole_number("channel_axis", config["channel_axis"]),
            "eps": checked_eps(config["eps"]),
            "affine": switch("affine", config["affine"]),
        }
        super().__init__(checked, (checked["num_features"],), checked["affine"], checked["affine"], xp, device, dtype)

    def input_dims(self) -> tuple[int | str, ...]:
        space = () if isinstance(self, BatchNorm) else ("space",)
        return ("batch", self.num_features, *space) if self.channel_axis == 1 else ("batch", *space, self.num_features)

    def attributes(self, buffers: Arrays, x: Array, lengths: Counted, training: bool) -> dict[str, Any]:
        if x.ndim < 2 or not -x.ndim <= self.channel_axis < x.ndim or x.shape[self.channel_axis] != self.num_features:
            raise ShapeError(f"`x` has shape {tuple(x.shape)}; expected length {self.num_features} at axis {self.channel_axis}")
        mask = None if lengths is None else self.valid(x, lengths)
        return {"channel_axis": self.channel_axis, "eps": self.eps, "mask": mask}

    def feature_axes(self, ndim: int) -> tuple[int, ...]:
        return (self.channel_axis % ndim,)

    def valid(self, x: Array, counted: Array | Mask) -> Array:
        if not isinstance(counted, Mask) and (x.ndim != 3 or self.channel_axis % 3 != 2):
            raise ShapeError(
                f"`lengths` needs `x` as (time, batch, features) and channel_axis=-1; got {tuple(x.shape)} and {self.channel_axis}; "
                "`mask` says for any shape what counts"
            )
        return super().valid(x, counted)


class _Tracking(_ChannelNorm):
    """A normalization that keeps running statistics of its channels."""

    momentum: float | None

    def _start_statistics(self) -> None:
        self.buffers = {
            "running_mean": self._new(numpy.zeros(self.num_features), statistic=True),
            "running_var": self._new(numpy.ones(self.num_features), statistic=True),
            BATCHES: self._new(0, integer=True),
        }

    def forget_statistics(self) -> None:
        self.momentum = None
        self._start_statistics()

    def _followed(self, buffers: Arrays, mean: Array, var: Array, values: Array | int, seen: Array | bool) -> Arrays:
        """The running statistics after a batch of these, of channels that were `seen`; the others have none, and change none.

        `values` and `seen` are (channels,), or one for all: how many each was taken of, and whether these are enough.
        """
        if seen is False:
            return buffers
        xp, before = xp_of(mean), buffers[BATCHES]
        new = {BATCHES: before + (1 if seen is True else xp.astype(xp.any(seen), before.dtype))}
        part: Any = self.momentum
        if VALUES in buffers:
            values = xp.asarray(values, dtype=var.dtype, device=device_of(var)) if isinstance(values, int) else xp.astype(values, var.dtype)
            new[VALUES] = buffers[VALUES] + xp.where(seen, values, 0.0)
            part = values / xp.where(new[VALUES] > 0, new[VALUES], 1.0)
        elif part is None:
            part = 1.0 / xp.astype(xp.where(new[BATCHES] > 0, new[BATCHES], 1), var.dtype)
        for name, batch in {"running_mean": mean, "running_var": var}.items():
            average = xp.astype(moved(buffers[name], batch, part), buffers[name].dtype, copy=False)
            new[name] = average if seen is True else xp.where(seen, average, buffers[name])
        return {name: new[name] for name in buffers}


class InstanceNorm(_Tracking):
    """Instance normalization of `num_features` channels. See `portnorm.instance_norm`; torch's default is `affine=False` as here.

    With `track_running_stats` inference takes running statistics in place of each case's own, as torch does: the averages over the cases
    of a batch of their means and of their unbiased variances, which training follows by `momentum`.

    >>> import numpy as np, portnorm as pn
    >>> pn.InstanceNorm(2, dtype="float64")(np.array([[[1.0, 3.0], [10.0, 30.0]]])).round(4)
    array([[[-1.,  1.],
            [-1.,  1.]]])
    """

    op: Op[..., Any] = instance_norm

    track_running_stats: bool

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
        tracking = {"track_running_stats": switch("track_running_stats", track_running_stats), "momentum": checked_momentum(momentum)}
        super().__init__({**config, **tracking}, xp, device, dtype)
        if self.track_running_stats:
            self._start_statistics()

    @property
    def config(self) -> dict[str, Any]:
        found = super().config
        return found if self.track_running_stats else {n: v for n, v in found.items() if n not in ("track_running_stats", "momentum")}

    def forget_statistics(self) -> None:
        if self.track_running_stats:
            super().forget_statistics()

    def operation(self, training: bool) -> Op[..., Any]:
        return batch_norm if self.track_running_stats and not training else self.op

    def attributes(self, buffers: Arrays, x: Array, lengths: Counted, training: bool) -> dict[str, Any]:
        given = self.track_running_stats and not training
        running = {"mean": buffers["running_mean"], "var": buffers["running_var"]} if given else {}
        return {**super().attributes(buffers, x, lengths, training), **running}

    def forward(
        self,
        params: Arrays,
        buffers: Arrays,
        x: Array,
        state: Any,
        lengths: Counted,
        training: bool,
        keep: Keep,
        random: Arrays | None = None,
    ) -> tuple[Array, Any, Arrays, Any]:
        y, state, buffers, residuals = super().forward(params, buffers, x, state, lengths, training, keep, random)
        if training and self.track_running_stats and 0 not in x.shape:
            buffers = self._after(buffers, x, None if lengths is None else self.valid(x, lengths))
        return y, state, buffers, residuals

    def _after(self, buffers: Arrays, x: Array, mask: Array | None) -> Arrays:
        """The running statistics after a batch: each channel of each case is a channel of its own to batch normalization."""
        if mask is None and math.prod([n for a, n in enumerate(x.shape) if a not in (0, self.channel_axis % x.ndim)]) == 1:
            raise ShapeError(f"`x` {tuple(x.shape)} has one value per channel of a case; expected more to take running statistics of")
        xp, channel, cases = xp_of(x), self.channel_axis % x.ndim, x.shape[0]
        order = (*(a for a in range(1, x.ndim) if a != channel), 0, channel)
        apart, there = (
            None if a is None else xp.reshape(xp.permute_dims(a, order), (-1, cases * self.num_features))
            for a in (x, None if mask is None else xp.broadcast_to(mask, x.shape))
        )
        _, residuals = batch_norm.forward(apart, channel_axis=1, mask=there)
        mean, var = (xp.reshape(s, (cases, self.num_features)) for s in residuals.statistics())
        count = None if residuals.counted is None else xp.reshape(residuals.counted, mean.shape)
        var = var * bessel(var, count, residuals.shape, (0,))
        counts = xp.ones_like(mean) if count is None else xp.astype(count > 1, mean.dtype)
        found = xp.sum(counts, axis=0)
        mean, var = (xp.sum(s * counts, axis=0) / xp.where(found > 0, found, 1.0) for s in (mean, var))
        return self._followed(buffers, mean, var, found, found > 0)


class GroupNorm(_ChannelNorm):
    """Group normalization of `num_features` channels in `num_groups` groups. See `portnorm.group_norm`; as `torch.nn.GroupNorm`.

    >>> import numpy as np, portnorm as pn
    >>> pn.GroupNorm(2, 4, dtype="float64")(np.array([[[1.0], [3.0], [10.0], [30.0]]]))[..., 0].round(4)
    array([[-1.,  1., -1.,  1.]])
    """

    op: Op[..., Any] = group_norm

    num_groups: int

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
        groups, features = whole_number("num_groups", num_groups), whole_number("num_features", num_features, 1)
        if groups < 1 or features % groups:
            raise ShapeError(f"`num_groups` is {groups}; expected a divisor of `num_features` {features}")
        config = {"num_groups": groups, "num_features": features, "channel_axis": channel_axis, "eps": eps, "affine": affine}
        super().__init__(config, xp, device, dtype)

    def arguments(self, params: Arrays) -> tuple[Any, ...]:
        return self.num_groups, params.get("weight"), params.get("bias")


class BatchNorm(_Tracking):
    """Batch normalization of `num_features` channels, with running statistics. See `portnorm.batch_norm`; as `torch.nn.BatchNorm1d…3d`.

    In training the batch's own statistics normalize, and the running ones, in at least float32, follow:
    (1 − momentum) · running + momentum · batch, where `momentum` is the weight of the new value and `None` means the plain average of all
    batches. As in torch the running variance is the unbiased one (n/(n−1)); `unbiased=False` keeps the biased one, as ONNX, flax and
    Keras 3 do. Padding, by `lengths` where `x` is (time, batch, features), or by a `mask` as `portnorm.batch_norm` takes it, enters no
    statistic. A batch that is empty, or of whose channel fewer than two values count, changes no running statistic of it, and no count of
    batches. `reduce`, which is not saved with the layer, sums an array over the processes that have a part of the batch each: see
    `portnorm.batch_norm`.

    >>> import numpy as np, portnorm as pn
    >>> layer = pn.BatchNorm(1, momentum=None, dtype="float64")
    >>> _ = layer(np.array([[1.0], [3.0]]), training=True)
    >>> layer.state_dict()["running_mean"], layer.state_dict()["running_var"]
    (array([2.]), array([2.]))
    """

    op: Op[..., Any] = batch_norm

    momentum: float | None
    unbiased: bool

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
        config["momentum"] = checked_momentum(momentum)
        super().__init__({**config, "unbiased": switch("unbiased", unbiased)}, xp, device, dtype)
        self.reduce = reduce
        self._start_statistics()

    def attributes(self, buffers: Arrays, x: Array, lengths: Counted, training: bool) -> dict[str, Any]:
        running = {"mean": buffers["running_mean"], "var": buffers["running_var"]}
        return {**super().attributes(buffers, x, lengths, training), **({"reduce": self.reduce} if training else running)}

    def new_buffers(self, buffers: Arrays, residuals: Any, training: bool) -> Arrays:
        if not training:
            return buffers
        xp = xp_of(residuals.mean)
        mean, var = (xp.reshape(s, (self.num_features,)) for s in residuals.statistics())
        axes = tuple(a for a in range(len(residuals.shape)) if a != self.channel_axis % len(residuals.shape))
        count = residuals.counted
        count = None if count is None else xp.reshape(xp.broadcast_to(count, residuals.mean.shape), var.shape)
        if self.unbiased:
            var = var * bessel(var, count, residuals.shape, axes)
        values = _count(residuals, axes)
        return self._followed(buffers, mean, var, values, values > 1)


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

    is_one_op = False

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
        self.r_max, self.d_max = checked_bounds(r_max, d_max)
        self._settings = (*(name for name in self._settings if name != "unbiased"), "r_max", "d_max")

    def operation(self, training: bool) -> Op[..., Any]:
        return batch_renorm if training else self.op

    def attributes(self, buffers: Arrays, x: Array, lengths: Counted, training: bool) -> dict[str, Any]:
        bounds = {"r_max": self.r_max, "d_max": self.d_max} if training else {}
        return {**super().attributes(buffers, x, lengths, False), **bounds}

    def new_buffers(self, buffers: Arrays, residuals: Any, training: bool) -> Arrays:
        return super().new_buffers(buffers, residuals.normalized if training else residuals, training)


def _count(residuals: Normalized, axes: tuple[int, ...]) -> Array | int:
    """(channels,), or one for all: how many values entered the statistics."""
    xp = xp_of(residuals.mean)
    if residuals.counted is not None:
        return xp.reshape(xp.broadcast_to(residuals.counted, residuals.mean.shape), (-1,))
    count: Array | int = math.prod([residuals.shape[a] for a in axes])
    return count
