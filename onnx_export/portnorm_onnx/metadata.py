"""What a graph says of the layer in it, and the way back: configuration as JSON, arrays from the graph's own weights.

An array that the graph holds under its own name, transposed (`.T`) or with the gates in ONNX's order (`.gates`) is read from there; of
one that folding changed, `kept.py` keeps the rest beside. So the layer that comes back is the one that was exported, bit by bit; where a
tool has changed the file so that it is not, that is said.

The keys begin with the prefix of the graph's names (see `keys.py`).
"""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy
import onnx

from portnorm.arrays import DType, Namespace, load_namespace, to_numpy
from portnorm.checkpoint.described import from_json, to_json
from portnorm.checkpoint.onnx_constants import File, graphs
from portnorm.dtypes import load_dtype
from portnorm.errors import ChangedFileWarning, CheckpointError, ExportError
from portnorm.layers.layer import Layer
from portnorm_onnx.changed import changes, facts
from portnorm_onnx.fused import OPERATORS
from portnorm_onnx.held import FORMS, Entry, forms
from portnorm_onnx.kept import entry, restored
from portnorm_onnx.keys import props_of, set_props
from portnorm_onnx.packed import checksum
from portnorm_onnx.signature import places
from portnorm_onnx.storage import read_model
from portnorm_onnx.symbolic import NumPyArray

_LAYER, _GRAPH, _ARRAYS, _TORCH = "portnorm", "portnorm.graph", "portnorm.arrays", "portnorm.torch"
TRAINING = "one update of training"
"""What a graph is that is not its layer alone."""


def described(
    proto: onnx.ModelProto,
    model: Layer,
    *,
    names: Mapping[str, str] | None = None,
    prefix: str = "",
    dtype: str,
    streaming: bool = False,
    holds: str = "",
) -> None:
    """Write into the model what it takes to check it and to read the layer back."""
    weights = _weights(proto, None)
    graph = {"names": names or {}, "dtype": dtype, "streaming": streaming, "holds": holds, "written": facts(proto)}
    graph |= {} if model.quantizes is None else {"quantize": [getattr(part, "quantize", None) for part in model.layers()]}
    graph["numbers"] = {name: checksum(weight.read()) for name, weight in weights.items()}
    set_props(proto, _props(weights, model, prefix, dtype) | {f"{prefix}{_GRAPH}": json.dumps(graph)})


def layers_described(proto: onnx.ModelProto, layers: Mapping[str, tuple[Layer, str]]) -> None:
    """The same for the layers, each with its dtype, in a model that another exporter made around them, by the prefix of their names."""
    weights, props = _weights(proto, None), {_TORCH: json.dumps({"written": facts(proto)})}
    for prefix, (layer, dtype) in layers.items():
        props |= _props(weights, layer, prefix, dtype)
    set_props(proto, props)


def _props(weights: dict[str, _Tensor], model: Layer, prefix: str, dtype: str) -> dict[str, str]:
    arrays = {}
    for name, a in model.state_dict().items():
        values = to_numpy(a)
        own = _named(weights, model, prefix, name, values.shape)
        held = own is not None and numpy.array_equal(own, values)
        del own  # a large one would be there once more while the next is read
        step = "bfloat16" if dtype == "bfloat16" else values.dtype.name
        arrays[name] = entry(values, held, weights, _order(model, name), step)
    return {f"{prefix}{_LAYER}": to_json(model), f"{prefix}{_ARRAYS}": json.dumps(arrays)}


def graph_facts(proto: onnx.ModelProto) -> dict[str, Any]:
    """What `described` wrote of the graph; the defaults for one that it did not write, with `described` False."""
    props = props_of(proto)
    prefix = next(iter(_prefixes(props)), "")
    found = _object(props, f"{prefix}{_GRAPH}")
    usual: dict[str, Any] = {"names": {}, "dtype": None, "streaming": False, "holds": "", "quantize": None, "described": bool(found)}
    return usual | {"holds": "a torch model"} | found if _TORCH in props else usual | found


def changes_of(proto: onnx.ModelProto) -> tuple[str, ...]:
    """What a tool has changed since the model was exported; nothing where it was not, or does not say how it was."""
    props = props_of(proto)
    prefix = next(iter(_prefixes(props)), "")
    recorded = _object(props, _TORCH if _TORCH in props else f"{prefix}{_GRAPH}").get("written")
    return () if recorded is None else changes(recorded, facts(proto))


def _prefixes(props: Mapping[str, str]) -> list[str]:
    return [key.removesuffix(_LAYER) for key in props if key.endswith(_LAYER)]


def _object(props: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(props.get(key, "{}"))
    except ValueError as error:
        raise CheckpointError(f"the metadata {key!r} is not understood: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"the metadata {key!r} is not understood: a {type(found).__name__} where an object is expected")
    return found


# -- and back ---------------------------------------------------------------------------------------------------------------------------


def load_layer(
    path: str | os.PathLike[str], *, xp: Namespace | str | None, device: Any, dtype: DType | None, prefix: str | None = None
) -> Layer:
    """The layer that `portnorm.export` wrote as `path`; raises `CheckpointError` for any other model.

    Warns with `ChangedFileWarning` where a tool has changed the numbers.
    """
    layer, told = read_layer(path, xp=xp, device=device, dtype=dtype, prefix=prefix)
    if told:
        warnings.warn(told, ChangedFileWarning, stacklevel=3)
    return layer


def read_layer(
    path: str | os.PathLike[str],
    *,
    xp: Namespace | str | None = None,
    device: Any = None,
    dtype: DType | None = None,
    prefix: str | None = None,
) -> tuple[Layer, str]:
    """`load_layer`, and what there is to say of the numbers."""
    file = os.fspath(path)
    try:
        proto = read_model(file)
    except ExportError as error:
        raise CheckpointError(str(error)) from None
    props = props_of(proto)
    prefix = _chosen(file, props, prefix)
    layer = from_json(props[f"{prefix}{_LAYER}"], xp=xp, device=device, dtype=dtype)
    entries, weights = _object(props, f"{prefix}{_ARRAYS}"), _weights(proto, Path(path).resolve())
    arrays, missing, other = {}, [], []
    for name, a in layer.state_dict().items():
        kept = entries.get(name)
        if kept is None:
            raise CheckpointError(
                f"the metadata {f'{prefix}{_ARRAYS}'!r} says nothing of {name}; the file was damaged, or another version of "
                "portnorm wrote it"
            )
        try:
            values, sound = _Back(weights, layer, prefix).array(name, tuple(a.shape), kept)
        except (AttributeError, KeyError, TypeError, ValueError, zlib.error) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"the metadata {f'{prefix}{_ARRAYS}'!r} is not understood: {name}: {error!r}") from error
        if values is None:
            missing.append(name)
            continue
        arrays[name] = numpy.asarray(values, order="C")  # as a layer's own: BLAS sums in another order along other strides
        if not sound:
            other.append(f"{name} ({values.dtype})")
    moved = [] if other else _moved(weights, _object(props, f"{prefix}{_GRAPH}").get("numbers"))
    what = "; ".join(changes_of(proto)) if missing or other or moved else ""
    tool = f". A tool has changed the file: {what}" if what else ""
    if missing:
        raise CheckpointError(
            f"{file!r} does not hold {', '.join(missing)} of the {type(layer).__name__} any more; load the file as it was exported{tool}"
        )
    layer.load_state_dict(arrays)
    if not other and not moved:
        return layer, ""
    which = f", and these are what is loaded: {', '.join(other)}" if other else f" in {', '.join(moved)}; the layer is loaded as it was"
    return layer, f"{file!r} holds other numbers than were exported{which}{tool}"


def _moved(weights: Mapping[str, _Tensor], recorded: Any) -> list[str]:
    """Weights of the graph that have other numbers than when it was written; a tool may have taken some away, and made others."""
    if not isinstance(recorded, dict):
        return []
    return [name for name, weight in weights.items() if name in recorded and checksum(weight.read()) != recorded[name]]


def _chosen(file: str, props: Mapping[str, str], asked: str | None) -> str:
    """The prefix of the layer that is meant."""
    prefixes = _prefixes(props)
    if not prefixes and _TORCH not in props:
        raise CheckpointError(
            f"{file!r} was not written by portnorm.export, or with `metadata=False`, or a tool has taken its metadata away; "
            "portnorm.import_checkpoint reads the LSTM, GRU, RNN and norm nodes of any model"
        )
    named = ", ".join(map(repr, prefixes)) or "none"
    if asked is not None:
        found = next((p for p in (asked, f"{asked}.") if p in prefixes), None)
        if found is None:
            raise CheckpointError(f"`prefix` is {asked!r}; {file!r} has {named}")
        return found
    if _TORCH in props and prefixes != [""]:
        raise CheckpointError(
            f"{file!r} was written by portnorm.export_torch: it holds a torch model, which is no layer of portnorm; "
            f"`prefix=` loads one of the layers in it: {named}"
        )
    if len(prefixes) > 1:
        raise CheckpointError(f"{file!r} was merged of graphs with the prefixes {prefixes}; `prefix=` says which one to load")
    return prefixes[0]


@dataclass(frozen=True)
class _Tensor:
    """A weight of the graph in its file, or in memory."""

    proto: onnx.TensorProto
    file: File

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.proto.dims)

    def read(self) -> NumPyArray:
        return self.file.read(self.proto)


def _weights(proto: onnx.ModelProto, path: Path | None) -> dict[str, _Tensor]:
    """Initializers and constants by name, those in the bodies of loops too."""
    file = File(path or Path(), proto)
    return {name: _Tensor(t, file) for graph in graphs(proto.graph) for name, t in _constants(graph)}


def _constants(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    yield from ((t.name, t) for t in graph.initializer)
    yield from ((n.output[0], a.t) for n in graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value")


def _named(weights: Mapping[str, _Tensor], model: Layer, prefix: str, name: str, shape: tuple[int, ...]) -> NumPyArray | None:
    """An array of a layer that the graph holds under the name that the exporter gives it."""
    for suffix in FORMS:
        weight = weights.get(f"{prefix}{name}{suffix}")
        if weight is not None:
            return next((values for form, values in forms(weight, shape, _order(model, name)) if form == suffix), None)
    return None


@dataclass(frozen=True)
class _Back:
    """Reads the arrays of a layer."""

    weights: Mapping[str, _Tensor]
    layer: Layer
    prefix: str

    def array(self, name: str, shape: tuple[int, ...], kept: Entry) -> tuple[NumPyArray | None, bool]:
        """An array, or `None` where the file does not hold it, and whether it is the one that was exported."""
        order = _order(self.layer, name)
        values = restored(kept, lambda of, form, base, shape: self._base(of, form, base, shape, order))
        if values is None and not {"of", "integers", "nibbles"} & kept.keys():
            values = _named(self.weights, self.layer, self.prefix, name, shape)
        if values is not None and _is(values, kept):
            return values, True
        same = next((v for v in self._like(shape, order) if _is(v, kept)), None)
        return (values, False) if same is None else (same, True)

    def _base(self, of: str, form: str, total: str, shape: tuple[int, ...], order: tuple[int, ...]) -> NumPyArray | None:
        """The weight that an array is made of: under its name, under another, or as it is now."""
        named = [v for f, v in forms(self.weights[of], shape, order) if f == form] if of in self.weights else []
        if named and checksum(named[0]) == total:
            return named[0]
        return next((v for v in self._like(shape, order) if checksum(v) == total), named[0] if named else None)

    def _like(self, shape: tuple[int, ...], order: tuple[int, ...]) -> Iterator[NumPyArray]:
        """Everything that could be an array of this shape: a tool may rename weights, and make one of two that are equal."""
        for weight in self.weights.values():
            yield from (values for _, values in forms(weight, shape, order))


def _is(values: NumPyArray, kept: Entry) -> bool:
    return checksum(values.astype(kept["dtype"])) == str(kept["sum"])


def _order(model: Layer, name: str) -> tuple[int, ...]:
    """Where the gates of ONNX's operator are among ours, for a parameter of a recurrent layer."""
    layers = [(prefix, layer) for prefix, layer in places(model) if name.startswith(prefix)]
    return OPERATORS[layers[-1][1].cell].gates if layers and layers[-1][1].cell in OPERATORS else ()


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
