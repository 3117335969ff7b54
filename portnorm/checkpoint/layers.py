"""Layers to and from files: a safetensors file with the configuration beside the arrays, or a graph that portnorm exported."""

from __future__ import annotations

import os
from typing import Any, Literal, overload

from portnorm.arrays import DType, Namespace, require_extra, to_numpy, xp_of
from portnorm.checkpoint import safetensors
from portnorm.checkpoint.described import OWN_KEY, from_json, to_json
from portnorm.checkpoint.training import TRAINING_KEY, Training, described, given_out, loaded, parted
from portnorm.dtypes import dtype_name
from portnorm.errors import CheckpointError, UnsupportedError
from portnorm.files import checked_path
from portnorm.layers.layer import Layer
from portnorm.optimizers import Optimizer
from portnorm.scalars import switch


def save(layer: Layer | Training, path: str | os.PathLike[str]) -> None:
    """Write a layer with its parameters, buffers and configuration as a safetensors file, complete or not at all.

    A `portnorm.Training` is written with its optimizer and that one's state, the number of updates, the generator and the notes as well.
    Raises `CheckpointError` where the arrays of a layer do not fit its attributes, so that they could not be loaded again, and for what no
    file can hold; a file that was there then stays as it was.

    >>> import portnorm as pn, tempfile, os
    >>> path = os.path.join(tempfile.mkdtemp(), "m.safetensors")
    >>> pn.save(pn.Linear(2, 3, rng=0), path)
    >>> pn.load(path)
    Linear(in_features=2, out_features=3, bias=True)
    """
    checked_path("path", path)
    model = layer.model if isinstance(layer, Training) else layer
    if not isinstance(model, Layer):
        raise UnsupportedError(f"`layer` is a {type(layer).__name__}; expected a layer of portnorm, or a portnorm.Training")
    values = given_out(layer) if isinstance(layer, Training) else model.state_dict()
    halved = {name for name, a in values.items() if dtype_name(xp_of(a), a.dtype) == "bfloat16"}
    arrays = {name: to_numpy(a) for name, a in values.items()}
    about = {TRAINING_KEY: described(layer, arrays)} if isinstance(layer, Training) else {}
    safetensors.write(path, arrays, {OWN_KEY: to_json(model), "format": "np", **about}, halved=halved)


@overload
def load(
    path: str | os.PathLike[str],
    *,
    xp: Namespace | str | None = ...,
    device: Any = ...,
    dtype: DType | None = ...,
    prefix: str | None = ...,
    training: Literal[False] = ...,
) -> Layer: ...


@overload
def load(
    path: str | os.PathLike[str],
    *,
    xp: Namespace | str | None = ...,
    device: Any = ...,
    dtype: DType | None = ...,
    training: Literal[True],
    optimizer: Optimizer | None = ...,
) -> Training: ...


def load(
    path: str | os.PathLike[str],
    *,
    xp: Namespace | str | None = None,
    device: Any = None,
    dtype: DType | None = None,
    prefix: str | None = None,
    training: bool = False,
    optimizer: Optimizer | None = None,
) -> Layer | Training:
    """The layer that `save` or `export` wrote, on NumPy or in the library, on the device and of the dtype asked for.

    With `training=True` the `portnorm.Training` that was saved; without it a file of one gives the model alone: its `result`, where it has
    one (of a run of `fit` what that returned, or the best so far). `optimizer` takes the place
    of the one in the file, whose state it goes on from; it is needed where a function (a schedule) is among the settings, since files hold
    no functions.
    A file that ends in `.onnx` is a graph of `portnorm.export`, `export_torch` or `export_training_step`: its configuration and weights
    give the layer back as it was exported, bit by bit, also after a tool has renamed, merged or folded them. Where several layers are in
    it, `prefix` is that of the names of the one that is meant; a layer in a torch model has the module's path ("encoder.rnn").
    Where a tool has changed the numbers themselves, such as a conversion to float16, what the file holds now is loaded, with a
    `ChangedFileWarning` that names the arrays; numbers of the graph that are only made of them are named too.
    Raises `CheckpointError` where the file cannot be read, is damaged, does not hold an array any more, or was not written by portnorm.
    """
    name = checked_path("path", path)
    training = switch("training", training)
    if optimizer is not None and not training:
        raise UnsupportedError("`optimizer` is given, but without training=True a model alone is loaded")
    if name.endswith(".onnx"):
        if training:
            raise CheckpointError(f"{name!r} is a graph, which holds a model and no state of its training; use training=False")
        made = require_extra("portnorm_onnx.metadata", "onnx")
        layer: Layer = made.load_layer(path, xp=xp, device=device, dtype=dtype, prefix=prefix)
        return layer
    if prefix is not None:
        raise UnsupportedError(f"`prefix` is {prefix!r}, and {name!r} is no .onnx file; only in those there are several layers")
    arrays, metadata = safetensors.read(path)
    if OWN_KEY not in metadata:
        raise CheckpointError(f"{name!r} holds arrays but no configuration of portnorm; make the layer and use load_state_dict")
    own, beside, about = parted(arrays, metadata, path)
    if training and about is None:
        raise CheckpointError(f"{name!r} holds a model and no state of its training, which portnorm.save writes of a portnorm.Training")
    layer = from_json(metadata[OWN_KEY], xp=xp, device=device, dtype=dtype)
    layer.load_state_dict(own)
    return loaded(layer, beside, about, optimizer, dtype, path) if training else layer
