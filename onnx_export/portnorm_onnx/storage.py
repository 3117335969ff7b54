"""A graph on its way to a file: loadable by a runtime before it is there, with weights inside or beside, and published as a whole."""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import onnx
from onnx import external_data_helper, helper

from portnorm.checkpoint.onnx_constants import graphs, tensors
from portnorm.errors import ExportError
from portnorm.files import written_whole
from portnorm.interrupts import undone

LIMIT = 2**31 - 2**24
"""Bytes of weights that one file can hold, with room for the graph: a message of protocol buffers ends at 2 GB."""
WIDE = 2**24
"""Bytes of weights from which on a model is checked with them in a file of their own: who runs it then maps one copy, and parses none."""
_SMALL = 1024
"""Bytes of a tensor that stays in the file in any case."""

Loadable = bytes | str
"""What a runtime loads: a model's bytes, or the path of one whose weights lie beside it."""


def weights_of(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """The initializers of a graph, and of the bodies of its loops."""
    yield from graph.initializer
    for a in (a for n in graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH):
        yield from weights_of(a.g)


def size_of(proto: onnx.ModelProto) -> int:
    """Bytes of the weights, wherever they are."""
    return sum(_size(t) for t in weights_of(proto.graph))


def _size(tensor: onnx.TensorProto) -> int:
    size: int = math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return size


def is_large(proto: onnx.ModelProto) -> bool:
    """Whether the weights are more than one file can hold."""
    return size_of(proto) > LIMIT


def is_external(proto: onnx.ModelProto) -> bool:
    """Whether weights of the model are in a file of their own."""
    return any(external_data_helper.uses_external_data(t) for graph in graphs(proto.graph) for t in tensors(graph))


def beside(path: str) -> list[str]:
    """Names of the files with weights that a model refers to."""
    whole = onnx.load(path, load_external_data=False).graph
    return sorted({e.value for graph in graphs(whole) for t in tensors(graph) for e in t.external_data if e.key == "location"})


class Draft:
    """A model that is checked before anybody sees it. As a context it removes what it wrote, but for what it published.

    With `external` large weights go into a file beside the model, with `aside` wide ones, only until it is published; either way `proto` is
    then a copy without them, and the model that was given is not held.
    """

    def __init__(self, proto: onnx.ModelProto, path: str | os.PathLike[str] | None = None, external: bool = False, *, aside: bool = False):
        self.proto = proto
        self.path = None if path is None else Path(path)
        self._folder: Path | None = None
        self._own: list[Path] = []
        self._data: Path | None = None
        self.left: tuple[str, ...] = ()
        """Files of weights of earlier models in this place, once it is published."""
        self._forget: Callable[[], None] | None = None
        self._aside = aside and not external and not is_external(proto) and size_of(proto) > WIDE
        if is_external(proto):
            assert self.path is not None
            self._folder = self.path.parent
        elif external or self._aside:
            try:
                self._put_outside()
            except BaseException:
                self._clear()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._clear()

    def _clear(self) -> None:
        """Take away what is only there while the model is made."""
        if self._forget is not None:
            self._forget()
        for file in self._own:
            file.unlink(missing_ok=True)
        if self._data is not None:
            shutil.rmtree(self._data.parent, ignore_errors=True)

    def _put_outside(self) -> None:
        """Write large weights into a file, named after their content, so that an old model keeps its own."""
        if self.path is None and not self._aside:
            raise ExportError("the weights need a file of their own; give a `path`")
        beside = None if self.path is None else self.path.resolve().parent
        name = "model" if self.path is None else self.path.name
        self._folder = Path(tempfile.mkdtemp(dir=beside, prefix=f".{name}."))
        self._data = self._folder / "weights"
        self._forget = undone(self._clear)
        digest, place, moved = hashlib.sha256(), 0, []
        with self._data.open("wb") as file:

            def move(tensor: onnx.TensorProto, left: onnx.TensorProto) -> None:
                nonlocal place
                values = tensor.raw_data
                gap = -place % 4096
                file.write(b"\0" * gap)
                file.write(values)
                digest.update(values)
                left.name, left.data_type, left.raw_data = tensor.name, tensor.data_type, b"-"
                left.dims.extend(tensor.dims)
                external_data_helper.set_external_data(left, "", place + gap, len(values))
                left.ClearField("raw_data")
                place += gap + len(values)
                moved.append(left)

            self.proto = _without_weights(self.proto, move)
        own = f"{name}.{digest.hexdigest()[:12]}.data"
        self._data = self._data.rename(self._folder / own)
        for left in moved:
            for entry in left.external_data:
                if entry.key == "location":
                    entry.value = own

    def put_back(self) -> None:
        """Weights that were only put aside are in the model again."""
        if not self._aside or self._data is None:
            return
        with self._data.open("rb") as file:
            for tensor in weights_of(self.proto.graph):
                if external_data_helper.uses_external_data(tensor):
                    at = external_data_helper.ExternalDataInfo(tensor)
                    file.seek(at.offset or 0)
                    tensor.raw_data = file.read(at.length)
                    tensor.ClearField("external_data")
                    tensor.ClearField("data_location")
        shutil.rmtree(self._data.parent, ignore_errors=True)
        self._data = self._folder = None

    def loadable(self, proto: onnx.ModelProto | None = None) -> Loadable:
        """The model, or one with the same weights, as a runtime loads it."""
        proto = self.proto if proto is None else proto
        if not is_external(proto):
            data: bytes = proto.SerializeToString()
            return data
        handle, name = tempfile.mkstemp(dir=self._folder, prefix=".portnorm.", suffix=".onnx")
        self._own.append(Path(name))
        self._forget = self._forget or undone(self._clear)
        with os.fdopen(handle, "wb") as file:
            file.write(proto.SerializeToString())
        return name

    def check_form(self) -> None:
        """onnx's checker and strict shape inference; raises `ExportError`."""
        try:
            if is_external(self.proto):
                path = str(self.loadable())
                onnx.checker.check_model(path)
                self._own.append(Path(f"{path}.shapes"))
                onnx.shape_inference.infer_shapes_path(path, f"{path}.shapes", check_type=True, strict_mode=True, data_prop=True)
            else:
                onnx.checker.check_model(self.proto, full_check=True)
                onnx.shape_inference.infer_shapes(self.proto, check_type=True, strict_mode=True, data_prop=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(f"the graph is not valid ONNX: {error}{_after_a_tool(self.proto, str(error))}") from error

    def publish(self) -> None:
        """Put the model in its place: weights first, then the model, each whole."""
        self.put_back()
        if self.path is None:
            return
        if self._data is not None:
            os.replace(self._data, self.path.resolve().parent / self._data.name)
        with written_whole(self.path) as file:
            for part in _serialized(self.proto)[0]:
                file.write(part.raw_data if isinstance(part, onnx.TensorProto) else part)
        own = None if self._data is None else self._data.name
        names = (file.name for file in self.path.resolve().parent.iterdir())
        earlier = re.compile(re.escape(self.path.name) + r"\.[0-9a-f]{12}\.data")
        self.left = tuple(sorted(name for name in names if name != own and earlier.fullmatch(name)))


_READ = re.compile(r"input '([^']+)' of node")
_UNKNOWN = re.compile(r"No Op registered for (\S+)")


def _after_a_tool(proto: onnx.ModelProto, said: str) -> str:
    """What a tool has done to a graph of which the checker says this, and the way out."""
    prefix = "; `prefix=` of export gives names that need no renaming"
    read, unknown = _READ.search(said), _UNKNOWN.search(said)
    if unknown is not None and unknown[1] in {f.name for f in proto.functions}:
        return f"; a tool has renamed ONNX's own operator as it did the function of its name, as onnx.compose.add_prefix does{prefix}"
    if read is None or "topologically sorted" not in said:
        return ""
    parts = list(graphs(proto.graph))
    made = {name for g in parts for n in g.node for name in n.output} | {v.name for g in parts for v in (*g.input, *g.initializer)}
    if read[1] not in made:
        return (
            f"; a tool has renamed {read[1]!r} but not where a loop reads it, as onnx.compose.add_prefix does where another tool "
            f"has put the weights of a loop outside of it{prefix}"
        )
    return "; a tool has left the nodes in another order than they run in: sort them, as onnxslim does, and check that file"


def _without_weights(proto: onnx.ModelProto, move: Callable[[onnx.TensorProto, onnx.TensorProto], None]) -> onnx.ModelProto:
    """A copy but for large weights, of which `move` makes what is left: cleared in their place they would keep their room."""
    copy = onnx.ModelProto()
    _copy_fields(proto, copy, ("graph",))
    _copy_graph(proto.graph, copy.graph, move)
    return copy


def _copy_graph(source: onnx.GraphProto, copy: onnx.GraphProto, move: Callable[[onnx.TensorProto, onnx.TensorProto], None]) -> None:
    _copy_fields(source, copy, ("node", "initializer"))
    for n in source.node:
        left = copy.node.add()
        _copy_fields(n, left, ("attribute",))
        for a in n.attribute:
            if a.type == onnx.AttributeProto.GRAPH:
                inner = left.attribute.add(name=a.name, type=a.type)
                _copy_graph(a.g, inner.g, move)
            else:
                left.attribute.add().CopyFrom(a)
    for tensor in source.initializer:
        if _size(tensor) < _SMALL:
            copy.initializer.add().CopyFrom(tensor)
        else:
            move(tensor, copy.initializer.add())


def _copy_fields(source: Any, copy: Any, without: tuple[str, ...]) -> None:
    """What is left out is not looked at: numbers of a tensor come as a copy."""
    for name in (field.name for field in source.DESCRIPTOR.fields if field.name not in without):
        value = getattr(source, name)
        if hasattr(value, "extend"):
            getattr(copy, name).extend(value)
        elif source.HasField(name) and hasattr(value, "CopyFrom"):
            getattr(copy, name).CopyFrom(value)
        elif source.HasField(name):
            setattr(copy, name, value)


_INSIDE = {
    "ModelProto": ("graph",),
    "GraphProto": ("node", "initializer"),
    "NodeProto": ("attribute",),
    "AttributeProto": ("g",),
    "TensorProto": ("raw_data",),
}
"""Fields on the way to the numbers of a tensor."""


def file_size(proto: onnx.ModelProto) -> int:
    """Bytes of the model as a file."""
    return _serialized(proto)[1]


def _serialized(message: Any) -> tuple[list[bytes | onnx.TensorProto], int]:
    """A message as it is written, and its length; a tensor stands for its numbers, since protocol buffers would copy them three times."""
    inside = _INSIDE[message.DESCRIPTOR.name]
    rest = type(message)()
    _copy_fields(message, rest, inside)
    parts: list[bytes | onnx.TensorProto] = [rest.SerializeToString()]
    length = len(parts[0])
    for field in (f for f in message.DESCRIPTOR.fields if f.name in inside):
        if field.name == "raw_data":
            children: Any = [message] if message.HasField("raw_data") else []
        elif hasattr(getattr(message, field.name), "extend"):
            children = getattr(message, field.name)
        else:
            children = [getattr(message, field.name)] if message.HasField(field.name) else []
        for child in children:
            inner, size = ([child], _size(child)) if field.name == "raw_data" else _serialized(child)
            head = _varint(field.number << 3 | 2) + _varint(size)
            parts += [head, *inner]
            length += len(head) + size
    return parts, length


def _varint(number: int) -> bytes:
    """As protocol buffers write it: seven bits a byte, the lowest first."""
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def as_function(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """The same model as one call of a model-local function, whose weights are arguments."""
    graph = proto.graph
    weights = [t.name for t in graph.initializer]
    inputs, outputs = [i.name for i in graph.input], [o.name for o in graph.output]
    function = helper.make_function("portnorm", name, [*inputs, *weights], outputs, list(graph.node), list(proto.opset_import))
    call = helper.make_node(name, [*inputs, *weights], outputs, name=name, domain="portnorm")
    whole = helper.make_graph([call], graph.name, list(graph.input), list(graph.output), list(graph.initializer))
    opsets: list[Any] = [*proto.opset_import, helper.make_opsetid("portnorm", 1)]
    model = helper.make_model(whole, opset_imports=opsets, functions=[function], producer_name="portnorm", ir_version=proto.ir_version)
    helper.set_model_props(model, {p.key: p.value for p in proto.metadata_props})
    return model


def read_model(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """The model of any .onnx file, without weights that lie in files of their own; raises `ExportError` where it holds no graph."""
    name = os.fspath(path)
    try:
        proto = onnx.load(name, load_external_data=False)
    except OSError as error:
        raise ExportError(f"cannot read {name!r}: {error.strerror or error}") from None
    except Exception:  # a parser's words, which say nothing of the file
        raise ExportError(f"{name!r} is no ONNX model{_hint(name)}") from None
    if not proto.graph.output or not proto.opset_import:
        raise ExportError(f"{name!r} holds no graph with outputs{_hint(name)}")
    return proto


def _hint(name: str) -> str:
    return f"; a checkpoint becomes one by `portnorm export {name} -o …`" if name.endswith(".safetensors") else ""
