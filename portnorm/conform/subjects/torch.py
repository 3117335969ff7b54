"""torch's own normalizations: eager, in channels-last memory, and compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy

from portnorm.conform.cases import STATISTICS, NumPyArray
from portnorm.conform.subjects import Call, Subject, installed


def _array(a: NumPyArray, dtype: str) -> Any:
    import torch

    return torch.from_numpy(a.astype(numpy.float32)).to(torch.bfloat16) if dtype == "bfloat16" else torch.from_numpy(a)


def _values(a: Any) -> NumPyArray:
    found: NumPyArray = a.detach().double().contiguous().numpy()
    return found


def _layer(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    import torch

    return torch.native_layer_norm(x, weight.shape, weight, bias, eps)[0]


def _rms(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    import torch

    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


def _group(x: Any, weight: Any, bias: Any, eps: float, groups: int) -> Any:
    import torch

    return torch.nn.functional.group_norm(x, groups, weight, bias, eps)


def _instance(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    import torch

    return torch.nn.functional.instance_norm(x, None, None, weight, bias, eps=eps)


def _batch(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    import torch

    mean, var = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
    if x.dtype == torch.float64:
        mean, var = mean.double(), var.double()
    kept = mean.dtype  # that of gain and shift too, as autocast has it
    y = torch.nn.functional.batch_norm(x, mean, var, weight.to(kept), bias.to(kept), training=True, momentum=1.0, eps=eps)
    count = x.numel() // x.shape[1]
    return y, mean, var.double() * (count - 1) / count  # the running variance is divided by n − 1


def _given(x: Any, weight: Any, bias: Any, eps: float, mean: Any, var: Any) -> Any:
    import torch

    return torch.nn.functional.batch_norm(x, mean, var, weight.to(mean.dtype), bias.to(mean.dtype), training=False, eps=eps)


CALLS: dict[str, Call] = {
    "layer_norm": _layer,
    "rms_norm": _rms,
    "group_norm": _group,
    "instance_norm": _instance,
    "batch_norm": _batch,
    STATISTICS: _given,
}


def _channels_last(call: Call) -> Call:
    def on(x: Any, *rest: Any, **more: Any) -> Any:
        import torch

        return call(x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x, *rest, **more)

    return on


@cache
def _compiled(call: Call) -> Call:
    import torch

    torch._dynamo.config.cache_size_limit = torch._dynamo.config.recompile_limit = 64
    torch._inductor.config.compile_threads = 1
    compiled: Call = torch.compile(call, dynamic=False)
    return compiled


def _compiled_later(call: Call) -> Call:
    return lambda *given, **more: _compiled(call)(*given, **more)


def _rows(name: str, how: Callable[[Call], Call], note: str, eager: str | None = None, **more: Any) -> Subject:
    calls = {operation: how(call) for operation, call in CALLS.items()}
    return Subject(name, installed("torch"), calls, _array, _values, note=note, eager=eager, **more)


SUBJECTS = (
    _rows(
        "torch-eager",
        lambda call: call,
        "contiguous",
        dtypes=("float32", "float16", "bfloat16", "float64"),
        advice="fine up to a mean of 100 standard deviations; beyond, subtract a common mean first",
    ),
    _rows(
        "torch-channels-last",
        _channels_last,
        "eager, images in channels-last memory",
        advice="give `group_norm` contiguous memory (`x.contiguous()`), or compile the model",
    ),
    _rows(
        "torch-compiled",
        _compiled_later,
        "torch.compile, contiguous",
        "torch-eager",
        dtypes=("float32", "float16"),
        advice="take running variances of more than a thousand values from an eager batch_norm, which keeps more of their digits",
    ),
    _rows(
        "torch-compiled-channels-last",
        lambda call: _channels_last(_compiled_later(call)),
        "torch.compile, images in channels-last memory",
        "torch-channels-last",
        dtypes=("float32", "float16"),
    ),
)
