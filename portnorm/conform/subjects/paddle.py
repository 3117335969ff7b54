"""PaddlePaddle's own normalizations."""

from __future__ import annotations

from typing import Any

import numpy

from portnorm.conform.cases import STATISTICS, NumPyArray
from portnorm.conform.subjects import Subject, installed


def _array(a: NumPyArray, dtype: str) -> Any:
    import paddle

    return paddle.to_tensor(a.astype(numpy.float32)).astype("bfloat16") if dtype == "bfloat16" else paddle.to_tensor(a)


def _values(a: Any) -> NumPyArray:
    found: NumPyArray = a.astype("float64").numpy()
    return found


def _layer(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    import paddle

    return paddle.nn.functional.layer_norm(x, weight.shape, weight, bias, eps)


def _rms(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    import paddle

    return paddle.nn.functional.rms_norm(x, weight.shape, weight, eps)


def _group(x: Any, weight: Any, bias: Any, eps: float, groups: int) -> Any:
    import paddle

    return paddle.nn.functional.group_norm(x, groups, eps, weight, bias)


def _instance(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    import paddle

    return paddle.nn.functional.instance_norm(x, weight=weight, bias=bias, eps=eps)


def _training(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    import paddle

    kept = "float64" if x.dtype == paddle.float64 else "float32"
    mean, var = paddle.zeros([x.shape[1]], kept), paddle.ones([x.shape[1]], kept)
    y = paddle.nn.functional.batch_norm(x, mean, var, weight, bias, training=True, momentum=0.0, epsilon=eps)
    return y, mean, var


def _given(x: Any, weight: Any, bias: Any, eps: float, mean: Any, var: Any) -> Any:
    import paddle

    return paddle.nn.functional.batch_norm(x, mean, var, weight, bias, training=False, epsilon=eps)


SUBJECTS = (
    Subject(
        "paddle-nn",
        installed("paddlepaddle"),
        {
            "layer_norm": _layer,
            "rms_norm": _rms,
            "group_norm": _group,
            "instance_norm": _instance,
            "batch_norm": _training,
            STATISTICS: _given,
        },
        _array,
        _values,
        dtypes=("float32", "float16"),
        note="paddle.nn.functional",
        advice="instance_norm and layer_norm are right; group_norm only for centred data. Float16 on a GPU only",
    ),
)
