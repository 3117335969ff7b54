"""What a graph says of the layer in it, and the way back: configuration as JSON, arrays from the graph's own weights.

An array that the graph holds under its own name, transposed (`.T`) or with the gates in ONNX's order (`.gates`) is read from there; one
that folding changed is kept beside, so that the layer that comes back is the one that was exported, bit by bit.

The keys begin with the prefix of the graph's names (see `keys.py`).
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy
import onnx
from onnx import numpy_helper

from portnorm.arrays import DType, Namespace, load_dtype, load_namespace, to_numpy
from portnorm.checkpoint.layers import from_json, to_json
from portnorm.errors import CheckpointError
from portnorm.layers.layer import Layer
from portnorm_onnx.fused import OPERATORS
from portnorm_onnx.keys import props_of, set_props
from portnorm_onnx.signature import places
from portnorm_onnx.storage import weights_of
from portnorm_onnx.symbolic import NumPyArray

_LAYER, _GRAPH, _ARRAYS = "portnorm", "portnorm.graph", "portnorm.arrays"


def described(proto: onnx.ModelProto, model: Layer, *, names: dict[str, str], prefix: str, dtype: str, streaming: bool) -> None:
    """Write into the model what it takes to check it and to read the layer back."""
    graph = {"names": names, "dtype": dtype, "streaming": streaming}
    props = {f"{prefix}{_LAYER}": to_json(model), f"{prefix}{_GRAPH}": json.dumps(graph)}
    held = {
        name
        for name, own in _found(_initializers(proto, None), model, prefix)
        if numpy.array_equal(own, to_numpy(model.state_dict()[name]))
    }
    beside = {}
    for name, a in model.state_dict().items():
        if name not in held:
            values = to_numpy(a)
            beside[name] = {"dtype": str(values.dtype), "shape": list(values.shape), "data": _packed(values)}
    if beside:
        props[f"{prefix}{_ARRAYS}"] = json.dumps(beside)
    set_props(proto, props)


def graph_facts(proto: onnx.ModelProto) -> dict[str, Any]:
    """What `described` wrote of the graph; the defaults for one that it did not write."""
    props = props_of(proto)
    prefix = next((key.removesuffix(_LAYER) for key in props if key.endswith(_LAYER)), "")
    found = _object(props, f"{prefix}{_GRAPH}")
    return {"names": {}, "dtype": None, "streaming": False, **found, "prefix": prefix}


def _object(props: dict[str, str], key: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(props.get(key, "{}"))
    except ValueError as error:
        raise CheckpointError(f"the metadata {key!r} is not understood: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"the metadata {key!r} is not understood: a {type(found).__name__} where an object is expected")
    return found


def load_layer(path: str | os.PathLike[str], *, xp: Namespace | str | None, device: Any, dtype: DType | None) -> Layer:
    """The layer that `portnorm.export` wrote as `path`; raises `CheckpointError` for any other model."""
    try:
        proto = onnx.load(os.fspath(path), load_external_data=False)
    except Exception as error:
        raise CheckpointError(f"cannot read {os.fspath(path)!r} as an ONNX model: {error}") from error
    props = props_of(proto)
    prefixes = [key.removesuffix(_LAYER) for key in props if key.endswith(_LAYER)]
    if not prefixes:
        raise CheckpointError(
            f"{os.fspath(path)!r} was not written by portnorm.export; "
            "portnorm.import_checkpoint reads the LSTM, GRU, RNN and norm nodes of any model"
        )
    if len(prefixes) > 1:
        raise CheckpointError(f"{os.fspath(path)!r} was merged of graphs with the prefixes {prefixes}; load them before they are merged")
    prefix, key = prefixes[0], f"{prefixes[0]}{_ARRAYS}"
    layer = from_json(props[f"{prefix}{_LAYER}"], xp=xp, device=device, dtype=dtype)
    arrays: dict[str, Any] = dict(_found(_initializers(proto, Path(path).resolve().parent), layer, prefix))
    try:
        arrays |= {name: _unpacked(entry) for name, entry in _object(props, key).items()}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the metadata {key!r} is not understood: {error!r}") from error
    own = layer.state_dict()
    layer.load_state_dict({name: a for name, a in arrays.items() if name in own})
    return layer


def _initializers(proto: onnx.ModelProto, folder: Path | None) -> dict[str, Any]:
    """Weights by name, to be read when they are asked for."""
    base = "" if folder is None else str(folder)
    return {t.name: (lambda t=t: numpy_helper.to_array(t, base)) for t in weights_of(proto.graph)}


def _found(weights: dict[str, Any], model: Layer, prefix: str) -> Iterator[tuple[str, NumPyArray]]:
    """The arrays of a layer that the graph holds, by name, one at a time."""
    for name, a in model.state_dict().items():
        for suffix, back in _BACK.items():
            if f"{prefix}{name}{suffix}" not in weights:
                continue
            values: NumPyArray = weights[f"{prefix}{name}{suffix}"]()
            if values.dtype == ml_dtypes.bfloat16:
                values = values.astype(numpy.float32)
            values = back(values, _order(model, name))
            if values.shape == tuple(a.shape):
                yield name, values
            break


def _order(model: Layer, name: str) -> tuple[int, ...]:
    """Where the gates of ONNX's operator are among ours, for a parameter of a recurrent layer."""
    layers = [(prefix, layer) for prefix, layer in places(model) if name.startswith(prefix)]
    return OPERATORS[layers[-1][1].cell].gates if layers and layers[-1][1].cell in OPERATORS else ()


def _in_our_order(values: NumPyArray, order: tuple[int, ...]) -> NumPyArray:
    blocks = values[0].reshape(len(order), -1, *values.shape[2:])
    found: NumPyArray = blocks[numpy.argsort(order)].reshape(values.shape[1:])
    return found


_BACK: dict[str, Any] = {"": lambda v, _: v, ".T": lambda v, _: v.T, ".gates": _in_our_order}
"""What undoes the change that the end of a weight's name tells of."""


def _packed(values: NumPyArray) -> str:
    return base64.b64encode(numpy.ascontiguousarray(values).tobytes()).decode()


def _unpacked(entry: dict[str, Any]) -> NumPyArray:
    values: NumPyArray = numpy.frombuffer(base64.b64decode(entry["data"]), dtype=entry["dtype"])
    found: NumPyArray = values.reshape(entry["shape"])
    return found


def on_numpy(model: Layer, dtype: DType | None) -> Layer:
    """The model on NumPy in this type: itself where it is so already, since a copy of wide weights is not for nothing."""
    xp = load_namespace("numpy")
    same = model.xp is xp and (dtype is None or load_dtype(xp, dtype) == model.dtype)
    return model if same else model.to(xp="numpy", dtype=dtype)


def rounded(model: Layer, kind: str) -> Layer:
    """A model whose every number is one of the graph's type; a bfloat16 model is float32 with rounded weights."""
    if kind != "bfloat16":
        return model
    other = model.copy()
    other.assign({n: _nearest(to_numpy(a)) for n, a in model.params.items()})
    return other


def _nearest(values: NumPyArray) -> NumPyArray:
    return values.astype(ml_dtypes.bfloat16).astype(values.dtype) if values.dtype.kind == "f" else values
