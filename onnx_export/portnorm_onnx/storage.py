"""A graph on its way to a file: loadable by a runtime before it is there, with weights inside or beside, and published as a whole."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import onnx
from onnx import external_data_helper, helper

from portnorm.checkpoint.onnx_constants import graphs, tensors
from portnorm.errors import ExportError
from portnorm.files import written_whole

LIMIT = 2**31 - 2**24
"""Bytes of weights that one file can hold, with room for the graph: a message of protocol buffers ends at 2 GB."""
_SMALL = 1024
"""Bytes of a tensor that stays in the file in any case."""

Loadable = bytes | str
"""What a runtime loads: a model's bytes, or the path of one whose weights lie beside it."""


def weights_of(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """The initializers of a graph, and of the bodies of its loops."""
    yield from graph.initializer
    for a in (a for n in graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH):
        yield from weights_of(a.g)


def is_large(proto: onnx.ModelProto) -> bool:
    """Whether the weights are more than one file can hold."""
    return sum(len(t.raw_data) for t in weights_of(proto.graph)) > LIMIT


def is_external(proto: onnx.ModelProto) -> bool:
    """Whether weights of the model are in a file of their own."""
    return any(external_data_helper.uses_external_data(t) for graph in graphs(proto.graph) for t in tensors(graph))


def beside(path: str) -> list[str]:
    """Names of the files with weights that a model refers to."""
    whole = onnx.load(path, load_external_data=False).graph
    return sorted({e.value for graph in graphs(whole) for t in tensors(graph) for e in t.external_data if e.key == "location"})


class Draft:
    """A model that is checked before anybody sees it. As a context it removes what it wrote, but for what it published."""

    def __init__(self, proto: onnx.ModelProto, path: str | os.PathLike[str] | None = None, external: bool = False):
        self.proto = proto
        self.path = None if path is None else Path(path)
        self._folder: Path | None = None
        self._own: list[Path] = []
        self._data: Path | None = None
        if is_external(proto):
            assert self.path is not None
            self._folder = self.path.parent
        elif external:
            self._put_outside()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._own:
            file.unlink(missing_ok=True)
        if self._data is not None:
            shutil.rmtree(self._data.parent, ignore_errors=True)

    def _put_outside(self) -> None:
        """Move large weights into a file beside the model, named after their content, so that an old model keeps its own."""
        if self.path is None:
            raise ExportError("the weights need a file of their own; give a `path`")
        self._folder = Path(tempfile.mkdtemp(dir=self.path.resolve().parent, prefix=f".{self.path.name}."))
        self._data = self._folder / "weights"
        digest, place = hashlib.sha256(), 0
        with self._data.open("wb") as file:
            for tensor in self.proto.graph.initializer:
                values = tensor.raw_data
                if len(values) < _SMALL:
                    continue
                gap = -place % 4096
                file.write(b"\0" * gap)
                file.write(values)
                digest.update(values)
                external_data_helper.set_external_data(tensor, "", place + gap, len(values))
                tensor.ClearField("raw_data")
                place += gap + len(values)
        name = f"{self.path.name}.{digest.hexdigest()[:12]}.data"
        self._data = self._data.rename(self._folder / name)
        for tensor in self.proto.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = name

    def loadable(self, proto: onnx.ModelProto | None = None) -> Loadable:
        """The model, or one with the same weights, as a runtime loads it."""
        proto = self.proto if proto is None else proto
        if not is_external(proto):
            data: bytes = proto.SerializeToString()
            return data
        handle, name = tempfile.mkstemp(dir=self._folder, prefix=".portnorm.", suffix=".onnx")
        with os.fdopen(handle, "wb") as file:
            file.write(proto.SerializeToString())
        self._own.append(Path(name))
        return name

    def check_form(self) -> None:
        """onnx's checker and strict shape inference; raises `ExportError`."""
        try:
            if is_external(self.proto):
                path = str(self.loadable())
                onnx.checker.check_model(path)
                onnx.shape_inference.infer_shapes_path(path, f"{path}.shapes", check_type=True, strict_mode=True, data_prop=True)
                self._own.append(Path(f"{path}.shapes"))
            else:
                onnx.checker.check_model(self.proto, full_check=True)
                onnx.shape_inference.infer_shapes(self.proto, check_type=True, strict_mode=True, data_prop=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(f"the graph is not valid ONNX: {error}") from error

    def publish(self) -> None:
        """Put the model in its place: weights first, then the model, each whole."""
        if self.path is None:
            return
        if self._data is not None:
            os.replace(self._data, self.path.resolve().parent / self._data.name)
        with written_whole(self.path) as file:
            file.write(self.proto.SerializeToString())


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
