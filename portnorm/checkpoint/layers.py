"""Saving and loading layers: the state dict as safetensors, the configuration as JSON in its metadata."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

from portnorm.arrays import DType, Namespace, dtype_name, require_extra, to_numpy, xp_of
from portnorm.cells.variants import Variant
from portnorm.checkpoint import safetensors
from portnorm.errors import CheckpointError, PortnormError, UnsupportedError
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

_KEY = "portnorm"


def save(layer: Layer, path: str | os.PathLike[str]) -> None:
    """Write a layer with its parameters, buffers and configuration as a safetensors file, complete or not at all.

    Raises `CheckpointError` where its arrays do not fit its attributes, so that they could not be loaded again.

    >>> import portnorm as pn, tempfile, os
    >>> path = os.path.join(tempfile.mkdtemp(), "m.safetensors")
    >>> pn.save(pn.Linear(2, 3, rng=0), path)
    >>> pn.load(path)
    Linear(in_features=2, out_features=3, bias=True)
    """
    arrays = layer.state_dict()
    halved = {name for name, a in arrays.items() if dtype_name(xp_of(a), a.dtype) == "bfloat16"}
    values = {name: to_numpy(a) for name, a in arrays.items()}
    safetensors.write(path, values, {_KEY: to_json(layer), "format": "np"}, halved=halved)


def load(
    path: str | os.PathLike[str],
    *,
    xp: Namespace | str | None = None,
    device: Any = None,
    dtype: DType | None = None,
    prefix: str | None = None,
) -> Layer:
    """The layer that `save` or `export` wrote, on NumPy or in the library, on the device and of the dtype asked for.

    A file that ends in `.onnx` is a graph of `portnorm.export`, `export_torch` or `export_training_step`: its configuration and weights
    give the layer back as it was exported, bit by bit, also after a tool has renamed, merged or folded them. Where several layers are in
    it, `prefix` is that of the names of the one that is meant; a layer in a torch model has the module's path ("encoder.rnn").
    Where a tool has changed the numbers themselves, such as a conversion to float16, what the file holds now is loaded, with a
    `ChangedFileWarning` that names the arrays; numbers of the graph that are only made of them are named too.
    Raises `CheckpointError` where the file cannot be read, is damaged, does not hold an array any more, or was not written by portnorm.
    """
    if os.fspath(path).endswith(".onnx"):
        made = require_extra("portnorm_onnx.metadata", "onnx")
        layer: Layer = made.load_layer(path, xp=xp, device=device, dtype=dtype, prefix=prefix)
        return layer
    if prefix is not None:
        raise UnsupportedError(f"`prefix` is {prefix!r}, and {os.fspath(path)!r} is no .onnx file; only in those there are several layers")
    arrays, metadata = safetensors.read(path)
    if _KEY not in metadata:
        raise CheckpointError(f"{os.fspath(path)!r} holds arrays but no configuration of portnorm; make the layer and use load_state_dict")
    layer = from_json(metadata[_KEY], xp=xp, device=device, dtype=dtype)
    layer.load_state_dict(arrays)
    return layer


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
