"""A layer without its arrays as JSON, and back: the configuration that stands in the metadata of safetensors files and of graphs."""

from __future__ import annotations

import json
from typing import Any

from portnorm.arrays import DType, Namespace
from portnorm.cells.variants import Variant
from portnorm.errors import CheckpointError, PortnormError
from portnorm.layers.channels import BatchNorm, BatchRenorm, GroupNorm, InstanceNorm
from portnorm.layers.embedding import Embedding
from portnorm.layers.initial import without_values
from portnorm.layers.layer import Layer
from portnorm.layers.linear import Linear
from portnorm.layers.norms import LayerNorm, RMSNorm
from portnorm.layers.recurrent import GRU, LSTM, RNN
from portnorm.layers.sequential import Sequential

_CLASSES = (LSTM, GRU, RNN, Embedding, Linear, LayerNorm, RMSNorm, BatchNorm, BatchRenorm, GroupNorm, InstanceNorm)

OWN_KEY = "portnorm"
"""Under which metadata of a file have the configuration."""

LAYERS: dict[str, type[Layer]] = {c.__name__: c for c in _CLASSES}
"""Layers that a checkpoint can name."""


def to_json(layer: Layer) -> str:
    """The configuration of a layer, without its arrays. Raises `CheckpointError` where these would not fit a layer that is made of it."""
    _require_own(layer)
    return layer.told()


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


def _require_own(layer: Layer) -> None:
    if isinstance(layer, Sequential):
        for part in layer.parts:
            _require_own(part)
    elif type(layer) is not LAYERS.get(type(layer).__name__):
        raise CheckpointError(f"{type(layer).__name__} is no layer of portnorm's own; save its state_dict() instead")


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
