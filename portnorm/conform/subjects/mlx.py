"""The layers of `mlx.nn`, eager and compiled. They have channels last."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy

from portnorm.conform.cases import STATISTICS, NumPyArray
from portnorm.conform.subjects import Call, Subject, installed


def _array(a: NumPyArray, dtype: str) -> Any:
    import mlx.core as mx

    return mx.array(a.astype(numpy.float32)).astype(mx.bfloat16) if dtype == "bfloat16" else mx.array(a)


def _values(a: Any) -> NumPyArray:
    import mlx.core as mx

    return numpy.asarray(a.astype(mx.float32))


def _made(layer: Any, weight: Any, bias: Any = None) -> Any:
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer


def _last(x: Any) -> Any:
    import mlx.core as mx

    return mx.moveaxis(x, 1, -1)


def _first(y: Any) -> Any:
    import mlx.core as mx

    return mx.moveaxis(y, -1, 1)


@cache
def _layer(kind: str, channels: int, eps: float, groups: int | None, compiled: bool) -> Call:
    """A layer as a function of x and of its arrays, compiled once for all that it is given."""
    import mlx.core as mx
    import mlx.nn as nn

    sizes = {"num_groups": groups} if groups else {}
    more = {"GroupNorm": {"pytorch_compatible": True}, "InstanceNorm": {"affine": True}}.get(kind, {})

    def call(x: Any, *values: Any) -> Any:
        layer = getattr(nn, kind)(dims=channels, eps=eps, **sizes, **more) if kind != "BatchNorm" else nn.BatchNorm(channels, eps=eps)
        for name, a in zip(("weight", "bias", "running_mean", "running_var"), values, strict=False):
            setattr(layer, name, a)
        return layer.eval()(x)

    return mx.compile(call) if compiled else call


def _calls(compiled: bool) -> dict[str, Call]:
    def layer(x: Any, weight: Any, bias: Any, eps: float) -> Any:
        return _layer("LayerNorm", x.shape[-1], eps, None, compiled)(x, weight, bias)

    def rms(x: Any, weight: Any, bias: Any, eps: float) -> Any:
        return _layer("RMSNorm", x.shape[-1], eps, None, compiled)(x, weight)

    def group(x: Any, weight: Any, bias: Any, eps: float, groups: int) -> Any:
        return _first(_layer("GroupNorm", x.shape[1], eps, groups, compiled)(_last(x), weight, bias))

    def instance(x: Any, weight: Any, bias: Any, eps: float) -> Any:
        return _first(_layer("InstanceNorm", x.shape[1], eps, None, compiled)(_last(x), weight, bias))

    def batch(x: Any, weight: Any, bias: Any, eps: float) -> Any:
        import mlx.nn as nn

        layer = nn.BatchNorm(x.shape[1], eps=eps, momentum=1.0)
        layer.weight, layer.bias = weight, bias
        y = _first(layer.train()(_last(x)))
        count = x.size // x.shape[1]
        return y, layer.running_mean, layer.running_var * ((count - 1) / count)  # which is divided by n − 1

    def given(x: Any, weight: Any, bias: Any, eps: float, mean: Any, var: Any) -> Any:
        return _first(_layer("BatchNorm", x.shape[1], eps, None, compiled)(_last(x), weight, bias, mean, var))

    return {
        "layer_norm": layer,
        "rms_norm": rms,
        "group_norm": group,
        "instance_norm": instance,
        "batch_norm": batch,
        STATISTICS: given,
    }


SUBJECTS = (
    Subject("mlx-nn", installed("mlx"), _calls(False), _array, _values, advice="train BatchNorm in float32"),
    Subject("mlx-compiled", installed("mlx"), _calls(True), _array, _values, eager="mlx-nn", note="mx.compile, but for training"),
)
