"""Arrays by name out of a file of any kind that cannot run code: safetensors, npz, HDF5 (Keras), and the nodes of an ONNX model."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy

from portnorm.arrays import require_extra, to_numpy
from portnorm.checkpoint import safetensors
from portnorm.errors import CheckpointError

Arrays = dict[str, numpy.ndarray[Any, Any]]

_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")


def read(source: str | os.PathLike[str] | Mapping[str, Any]) -> Arrays:
    """The arrays of a file, or of a mapping, whose nested mappings are joined by "/".

    Raises `CheckpointError` where the file cannot be read, and for a pickle, which is never opened.
    """
    if isinstance(source, Mapping):
        return dict(_flat(source, ""))
    path = Path(source)
    if path.suffix in _PICKLES:
        raise CheckpointError(
            f"{os.fspath(path)!r} is a pickle, which can run code when it is read; convert it where you trust it: "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'w.safetensors')"
        )
    readers = {
        ".safetensors": lambda p: safetensors.read(p)[0],
        ".npz": _npz,
        ".h5": _hdf5,
        ".hdf5": _hdf5,
        ".keras": _keras,
        ".onnx": _onnx,
    }
    if path.suffix not in readers:
        raise CheckpointError(f"{os.fspath(path)!r} has the ending {path.suffix!r}; expected one of {', '.join(readers)}")
    try:
        return dict(readers[path.suffix](path))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{os.fspath(path)!r} cannot be read: {error}") from error


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
            continue
        if str(getattr(value, "dtype", "")).startswith("key<"):
            continue  # the state of JAX's random numbers, which flax keeps beside the weights
        array = to_numpy(value) if hasattr(value, "dtype") else numpy.asarray(value)
        if array.dtype.kind not in "fiub":
            raise CheckpointError(f"`{prefix}{name}` is {type(value).__name__}; expected an array of numbers")
        yield f"{prefix}{name}", array


def _npz(path: Path) -> Arrays:
    with numpy.load(path, allow_pickle=False) as file:
        if not hasattr(file, "files"):
            raise CheckpointError(f"{os.fspath(path)!r} is a single array; expected an .npz file with names")
        return {name: file[name] for name in file.files}


def _hdf5(file: Any) -> Arrays:
    found: Arrays = {}

    def visit(name: str, entry: Any) -> None:
        if hasattr(entry, "shape") and entry.dtype.kind in "fiu":
            found[name] = entry[()]

    with require_extra("h5py", "import").File(file, "r") as opened:
        opened.visititems(visit)
    return found


def _keras(path: Path) -> Arrays:
    with zipfile.ZipFile(path) as archive:
        return _hdf5(io.BytesIO(archive.read("model.weights.h5")))


# Inputs of the ONNX operators that are read, by name; "" is not read. Those that come once per direction are cut by it.
_ONNX_INPUTS = {
    "LSTM": ("", "W", "R", "B", "", "", "", "P"),
    "GRU": ("", "W", "R", "B"),
    "RNN": ("", "W", "R", "B"),
    "LayerNormalization": ("", "scale", "bias"),
    "InstanceNormalization": ("", "scale", "bias"),
    "GroupNormalization": ("", "scale", "bias"),
    "RMSNormalization": ("", "scale"),
    "BatchNormalization": ("", "scale", "bias", "mean", "var"),
}
_ONNX_DEFAULTS: dict[str, dict[str, Any]] = {
    "LSTM": {"activations": (["Sigmoid", "Tanh", "Tanh"], None), "clip": (None,), "input_forget": (0, None)},
    "GRU": {"activations": (["Sigmoid", "Tanh"], None), "clip": (None,)},
    "RNN": {"activations": (["Tanh"], None), "clip": (None,)},
}
_ONNX_DIRECTIONS = {"forward": 1, "bidirectional": 2}


def _onnx(path: Path) -> Arrays:
    """For every recurrent and normalization node the arrays of its inputs, as `<node>/<operator>/…`."""
    onnx = require_extra("onnx", "onnx")
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf has its own errors
        raise CheckpointError(f"{os.fspath(path)!r} is no ONNX model: {error}") from error
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            constants[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
    found: Arrays = {}
    for k, node in enumerate(n for n in model.graph.node if n.op_type in _ONNX_INPUTS):
        name = node.name or f"node{k}"
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        inputs = {}
        for key, value in zip(_ONNX_INPUTS[node.op_type], node.input, strict=False):
            if key and value:
                if value not in constants:
                    raise CheckpointError(f"node {name!r}: the input {key} is computed in the graph; expected a constant")
                inputs[key] = constants[value]
        found.update({f"{name}/{node.op_type}/{key}": a for key, a in _node_arrays(name, node.op_type, inputs, attributes)})
    if not found:
        raise CheckpointError(f"{os.fspath(path)!r} has no node of {', '.join(_ONNX_INPUTS)}")
    return found


def _node_arrays(name: str, operator: str, inputs: Arrays, attributes: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    if "epsilon" in attributes or operator.endswith("Normalization"):
        yield "epsilon", numpy.asarray(attributes.get("epsilon", 1e-5))
    if operator == "GroupNormalization":
        yield "num_groups", numpy.asarray(attributes["num_groups"])
    if operator.endswith("Normalization"):
        yield from inputs.items()
        return
    direction = _text(attributes.get("direction", "forward"))
    if direction not in _ONNX_DIRECTIONS:
        raise CheckpointError(f"node {name!r} has the direction {direction!r}; expected forward or bidirectional")
    for key, allowed in _ONNX_DEFAULTS[operator].items():
        value = attributes.get(key)
        value = [_text(v) for v in value] if isinstance(value, list) else value
        usual = [a * _ONNX_DIRECTIONS[direction] if isinstance(a, list) else a for a in allowed]
        if value not in usual:
            raise CheckpointError(f"node {name!r} has {key} = {value!r}; expected {usual[0]!r}, which is all that portnorm has")
    before = operator == "GRU" and not attributes.get("linear_before_reset", 0)
    for d in range(_ONNX_DIRECTIONS[direction]):
        for key, array in inputs.items():
            if key == "B":
                half = array.shape[-1] // 2
                yield f"{d}/Wb", array[d][:half]
                yield f"{d}/Rb", array[d][half:]
            else:
                yield f"{d}/{'R before reset' if key == 'R' and before else key}", array[d]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


_READERS: dict[str, Callable[[Path], Arrays]] = {
    ".safetensors": lambda path: safetensors.read(path)[0],
    ".npz": _npz,
    ".h5": _hdf5,
    ".hdf5": _hdf5,
    ".keras": _keras,
    ".onnx": _onnx,
}
