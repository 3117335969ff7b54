"""What TensorFlow has below Keras, eager, as a graph and in XLA: `tf.nn.moments` with `batch_normalization`, and the fused operator."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy

from portnorm.conform.cases import STATISTICS, NumPyArray
from portnorm.conform.subjects import Call, Subject, installed

Way = Callable[[Call], Call]
"""How a function is run: eager, or compiled."""


def _array(a: NumPyArray, dtype: str) -> Any:
    import tensorflow as tf

    return tf.constant(a)


def _values(a: Any) -> NumPyArray:
    import tensorflow as tf

    return numpy.asarray(tf.cast(a, tf.float32))


def _last(x: Any) -> Any:
    import tensorflow as tf

    return tf.transpose(x, [0, *range(2, len(x.shape)), 1])


def _first(y: Any) -> Any:
    import tensorflow as tf

    last = len(y.shape) - 1
    return tf.transpose(y, [0, last, *range(1, last)])


def _moments(x: Any, axes: list[int], weight: Any, bias: Any, eps: float) -> Any:
    import tensorflow as tf

    mean, var = tf.nn.moments(x, axes, keepdims=True)
    return tf.nn.batch_normalization(x, mean, var, bias, weight, tf.cast(eps, x.dtype))


def _layer(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    return _moments(x, [-1], weight, bias, eps)


def _instance(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    return _first(_moments(_last(x), [1, 2], weight, bias, eps))


def _group(x: Any, weight: Any, bias: Any, eps: float, groups: int) -> Any:
    import tensorflow as tf

    n, c, h, w = x.shape
    cut = [1, groups, c // groups, 1, 1]
    y = _moments(tf.reshape(x, [n, groups, c // groups, h, w]), [2, 3, 4], tf.reshape(weight, cut), tf.reshape(bias, cut), eps)
    return tf.reshape(y, x.shape)


def _training(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    import tensorflow as tf

    weight, bias = tf.cast(weight, tf.float32), tf.cast(bias, tf.float32)
    y, mean, var = tf.compat.v1.nn.fused_batch_norm(_last(x), weight, bias, epsilon=eps, is_training=True)
    count = numpy.prod(x.shape) // x.shape[1]
    return _first(y), mean, var * ((count - 1) / count)  # which is divided by n − 1


def _given(x: Any, weight: Any, bias: Any, eps: float, mean: Any, var: Any) -> Any:
    import tensorflow as tf

    weight, bias = tf.cast(weight, tf.float32), tf.cast(bias, tf.float32)
    return _first(tf.compat.v1.nn.fused_batch_norm(_last(x), weight, bias, mean, var, eps, is_training=False)[0])


def _later(call: Call, **keywords: Any) -> Call:
    """A function compiled at its first call, and traced anew for another shape, type or ε."""

    @cache
    def compiled() -> Any:
        import tensorflow as tf

        return tf.function(call, reduce_retracing=False, **keywords)

    return lambda *given, **more: compiled()(*given, **more)


def _rows(
    name: str, way: Way, note: str, eager: str | None = None, advice: str = "cast float16 to float32 before tf.nn.moments"
) -> Subject:
    calls: dict[str, Call] = {
        "layer_norm": _layer,
        "group_norm": _group,
        "instance_norm": _instance,
        "batch_norm": _training,
        STATISTICS: _given,
    }
    return Subject(
        name,
        installed("tensorflow"),
        {operation: way(call) for operation, call in calls.items()},
        _array,
        _values,
        dtypes=("float32", "float16"),
        refused={"rms_norm": "has no rms_norm but that of Keras"},
        eager=eager,
        note=f"{note}: tf.nn.moments and batch_normalization; fused_batch_norm for batch_norm",
        advice=advice,
    )


SUBJECTS = (
    _rows("tensorflow-eager", lambda call: call, "eager"),
    _rows("tensorflow-function", lambda call: _later(call), "tf.function", "tensorflow-eager"),
    _rows(
        "tensorflow-xla",
        lambda call: _later(call, jit_compile=True),
        "tf.function(jit_compile=True)",
        "tensorflow-eager",
        "no fused_batch_norm (tf_keras' BatchNormalization) in training under jit_compile: tf.nn.moments, or Keras 3, is right there",
    ),
)
