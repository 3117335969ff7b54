"""Layers as text: the class and configuration of each as JSON, and a layer made of it again."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy

from portnorm.arrays import Array, DType, Namespace, dtype_name, to_numpy
from portnorm.cells.variants import Variant
from portnorm.errors import CheckpointError, PortnormError
from portnorm.layers.embedding import Embedding
from portnorm.layers.initial import without_values
from portnorm.layers.layer import Layer
from portnorm.layers.linear import Linear
from portnorm.layers.norms import BatchNorm, BatchRenorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from portnorm.layers.recurrent import GRU, LSTM, RNN
from portnorm.layers.sequential import Sequential

_CLASSES = (LSTM, GRU, RNN, Embedding, Linear, LayerNorm, RMSNorm, BatchNorm, BatchRenorm, GroupNorm, InstanceNorm)

LAYERS: dict[str, type[Layer]] = {c.__name__: c for c in _CLASSES}
"""Layers that a checkpoint can name."""

NumPyArray = numpy.ndarray[Any, Any]

KEY = "portnorm"
"""Under which the metadata of a file has the text."""


def arrays_of(layer: Layer) -> dict[str, NumPyArray]:
    """Parameters and buffers as a file holds them."""
    return {name: writable(a) for name, a in layer.state_dict().items()}


def writable(a: Array) -> NumPyArray:
    """An array of any library as a file holds it: bfloat16, which NumPy does not have, as float32."""
    found: NumPyArray = to_numpy(a)
    return found.astype(numpy.float32) if found.dtype.name == "bfloat16" else found


def to_json(layer: Layer) -> str:
    """The configuration of a layer, without its arrays. Raises `CheckpointError` where these would not fit a layer that is made of it."""
    layer.check_fit()
    return json.dumps({"version": 1, "dtype": dtype_name(layer.xp, layer.dtype), "layer": _description(layer)})


def from_json(text: str, *, xp: Namespace | str | None = None, device: Any = None, dtype: DType | None = None) -> Layer:
    """A layer of this configuration, for arrays that are loaded into it. Raises `CheckpointError` where the text is not understood."""
    try:
        description = json.loads(text)
        with without_values():
            return of_description(description["layer"], {"xp": xp, "device": device, "dtype": dtype or description["dtype"]})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, PortnormError) and not isinstance(error, CheckpointError):
            raise CheckpointError(f"the configuration describes a layer that cannot be made: {error}") from error
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"the configuration is not understood: {error!r}") from error


def _description(layer: Layer) -> dict[str, Any]:
    if isinstance(layer, Sequential):
        return {"type": "Sequential", "parts": [_description(layer.parts[k]) if k == at else {"as": k} for at, k in enumerate(layer.homes)]}
    if type(layer) is not LAYERS.get(type(layer).__name__):
        raise CheckpointError(f"{type(layer).__name__} is no layer of portnorm's own; save its state_dict() instead")
    config = {k: dataclasses.asdict(v) if isinstance(v, Variant) else v for k, v in layer.config.items()}
    return {"type": type(layer).__name__, "config": config}


def of_description(description: Any, place: dict[str, Any]) -> Layer:
    """A layer of this class and configuration, with fresh parameters at `place`: namespace, device and dtype."""
    kind = description["type"]
    if kind == "Sequential":
        parts: list[Layer] = []
        for part in description["parts"]:
            parts.append(parts[part["as"]] if "as" in part else of_description(part, place))  # the one layer that an earlier part is
        return Sequential(*parts)
    if kind not in LAYERS:
        raise CheckpointError(f"the configuration names the layer {kind!r}; expected Sequential or one of {', '.join(LAYERS)}")
    config = dict(description["config"])
    if isinstance(config.get("norm"), dict):
        fields: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in config["norm"].items()}
        config["norm"] = Variant(**fields)
    made: Any = LAYERS[kind]
    layer: Layer = made(**config, **place)
    return layer
