"""Layers to and from files: a safetensors file with the configuration beside the arrays, or a graph that portnorm exported."""

from __future__ import annotations

import os
from typing import Any

from portnorm.arrays import DType, Namespace, require_extra, to_numpy
from portnorm.checkpoint import safetensors
from portnorm.checkpoint.described import from_json, to_json
from portnorm.errors import CheckpointError, UnsupportedError
from portnorm.layers.layer import Layer

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
    arrays = {name: to_numpy(a) for name, a in layer.state_dict().items()}
    safetensors.write(path, arrays, {_KEY: to_json(layer), "format": "np"})


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
