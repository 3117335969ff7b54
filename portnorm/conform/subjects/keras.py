"""Keras' layers on each of its backends. A process has one backend, so each is measured in a process of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy

from portnorm.conform.cases import STATISTICS, NumPyArray
from portnorm.conform.subjects import Call, Subject, installed
from portnorm.errors import MissingExtraError


def _keras(backend: str) -> Any:
    """Keras with this backend; raises `MissingExtraError` where this process has it with another."""
    if "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = backend
    import keras

    if keras.backend.backend() != backend:
        raise MissingExtraError(
            f"keras is imported with the backend {keras.backend.backend()} in this process: measure keras-{backend} alone"
        )
    return keras


def _version(backend: str, package: str) -> Callable[[], str]:
    def version() -> str:
        found = installed("keras", package)()
        _keras(backend)
        return f"{found} on {installed(package)()}"

    return version


def _policy(x: NumPyArray) -> str:
    """float16 as Keras recommends it: variables in float32."""
    return "mixed_float16" if x.dtype == numpy.float16 else str(x.dtype)


def _normalized(make: Callable[[Any, dict[str, Any]], Any]) -> Call:
    """A layer made, its gain and shift set, and called."""

    def call(x: Any, weight: Any, bias: Any, eps: float, **more: Any) -> Any:
        import keras

        given = keras.ops.convert_to_tensor(x)
        made = make(keras.layers, {"epsilon": eps, "dtype": _policy(x), **more})
        made.build(given.shape)
        for name, values in (("gamma", weight), ("scale", weight), ("beta", bias)):
            if hasattr(getattr(made, name, None), "assign"):
                getattr(made, name).assign(values)
        return made(given)

    return call


def _batch(layer: Any, x: Any, weight: Any, bias: Any) -> Any:
    import keras

    given = keras.ops.convert_to_tensor(x)
    layer.build(given.shape)
    layer.gamma.assign(weight)
    layer.beta.assign(bias)
    return given


def _training(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    import keras

    layer = keras.layers.BatchNormalization(axis=1, momentum=0.0, epsilon=eps, dtype=_policy(x))
    y = layer(_batch(layer, x, weight, bias), training=True)
    return y, layer.moving_mean, layer.moving_variance


def _given(x: Any, weight: Any, bias: Any, eps: float, mean: Any, var: Any) -> Any:
    import keras

    layer = keras.layers.BatchNormalization(axis=1, epsilon=eps, dtype=_policy(x))
    given = _batch(layer, x, weight, bias)
    layer.moving_mean.assign(mean)
    layer.moving_variance.assign(var)
    return layer(given, training=False)


CALLS: dict[str, Call] = {
    "layer_norm": _normalized(lambda layers, more: layers.LayerNormalization(**more)),
    "rms_norm": _normalized(lambda layers, more: layers.RMSNormalization(**more)),
    "group_norm": _normalized(lambda layers, more: layers.GroupNormalization(axis=1, **more)),
    "instance_norm": _normalized(lambda layers, more: layers.GroupNormalization(groups=-1, axis=1, **more)),
    "batch_norm": _training,
    STATISTICS: _given,
}


def _values(a: Any) -> NumPyArray:
    import keras

    return numpy.asarray(keras.ops.convert_to_numpy(keras.ops.cast(a, "float32")))


SUBJECTS = tuple(
    Subject(
        f"keras-{backend}",
        _version(backend, package),
        CALLS,
        values=_values,
        dtypes=("float32", "float16"),
        note=f"layers of Keras 3 on {backend}; instance_norm is GroupNormalization(groups=-1)",
        advice=advice,
    )
    for backend, package, advice in (
        ("jax", "jax", ""),
        ("torch", "torch", "take another backend, or torch's own layers, for Group and BatchNormalization of data that is not centred"),
        ("tensorflow", "tensorflow", ""),
    )
)
