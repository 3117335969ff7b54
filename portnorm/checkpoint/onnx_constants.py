"""What is known of the values in an ONNX graph before it runs: initializers, and what nodes make of them alone."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import onnx
from onnx import helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from portnorm.checkpoint.stored import NumPyArray
from portnorm.errors import CheckpointError

_OWN, _MICROSOFT, _QUANTIZED = ("", "ai.onnx"), "com.microsoft", ("DequantizeLinear", "QuantizeLinear")
"""Domains of ONNX' own operators, and what onnxruntime has for more types and older files, where it means the same."""
_RANDOM = frozenset({"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"})
"""Operators whose result is another one in each run, or may be."""
_LABORIOUS = frozenset({"Einsum", "Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "DeformConv", "LSTM", "GRU", "RNN", "Attention"})
"""Operators whose work is not bounded by the sizes of what they read and give."""
_MOVED = frozenset({"Identity", "Cast", "Unsqueeze", "Squeeze", "Slice", "Concat", "Reshape", "Transpose", "Split", "Gather", "Flatten"})
_MOVED |= {"Expand", "Tile"}
"""Operators whose result has the values of their first input, or of all where it is Concat."""
_FOLLOWED = frozenset({"Expand", "Tile", "Identity", "Cast", "Slice", "Unsqueeze", "Add"})
"""Operators that repeat the rows of a first state for a batch, or leave them as they are."""
_OLDER = {"Softmax": 13, "LogSoftmax": 13, "Hardmax": 13, "Resize": 11, "Upsample": 99, "GroupNormalization": 21, "Concat": 4, "Selu": 6}
"""Operators that meant something else before an operator set; what they mean since then is computed here."""
WAY_OUT = "give the arrays as a mapping, or a file in which a tool such as onnxruntime's optimizer has made a constant of it"
_DEPTH = 200
_ROOM = 2**20
_SPARSE = 2**26
"""Entries that an array of a `sparse_initializer` may have."""


@dataclass(frozen=True)
class Entry:
    """What an input of a body is given by the node around it."""

    node: onnx.NodeProto
    scope: Scope
    """Of the graph around."""
    name: str
    """Of the value there."""
    kind: str
    """`"carried"` from run to run, a `"slice"` of a value, or the `"count"` of runs and their condition."""
    axis: int | None = 0
    """Along which a slice is taken."""
    backwards: bool = False
    """Whether the last slice is the first one."""
    after: str = ""
    """The output of the body that the next run takes."""


def entries(node: onnx.NodeProto, body: onnx.GraphProto, scope: Scope) -> dict[str, Entry]:
    """What a body is given, by the names of its inputs."""
    inputs, outputs = [i.name for i in body.input], [o.name for o in body.output]
    if node.op_type == "Loop":
        given = [*node.input[2:]]
        carried = zip(inputs[2:], given, outputs[1:], strict=False)
        return {name: Entry(node, scope, "", "count") for name in inputs[:2]} | {
            name: Entry(node, scope, outside, "carried", after=after) for name, outside, after in carried
        }
    if node.op_type != "Scan":
        return {}
    said = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    given = list(node.input)[
        scope.file.version() < 9 :
    ]  # lengths come first in operator set 8, whose values have the batch before the steps
    states = len(given) - int(said.get("num_scan_inputs", 0))
    found = {
        name: Entry(node, scope, outside, "carried", after=after)
        for name, outside, after in zip(inputs[:states], given, outputs, strict=False)
    }
    backwards, axes = said.get("scan_input_directions", said.get("directions", ())), said.get("scan_input_axes", ())
    for k, (name, outside) in enumerate(zip(inputs[states:], given[states:], strict=False)):
        axis = None if scope.file.version() < 9 else int(axes[k]) if k < len(axes) else 0
        found[name] = Entry(node, scope, outside, "slice", axis, k < len(backwards) and bool(backwards[k]))
    return found


class Scope:
    """The names of a graph, inside those of the graph around it."""

    def __init__(self, graph: onnx.GraphProto, outer: Scope | None, file: File, around: onnx.NodeProto | None = None):
        self.graph, self.outer, self.file, self.around = graph, outer, file, around
        self.tensors: dict[str, onnx.TensorProto | onnx.SparseTensorProto] = {t.name: t for t in graph.initializer}
        self.tensors |= {t.values.name: t for t in graph.sparse_initializer}
        self.nodes = {name: node for node in graph.node for name in node.output if name}
        self.own = {*self.tensors, *self.nodes, *(i.name for i in graph.input)}
        self.entries = {} if outer is None or around is None else entries(around, graph, outer)
        self.values: dict[str, NumPyArray] = {}
        self.known: dict[str, bool] = {}
        self.made_by: dict[str, frozenset[str]] = {}
        self.starts: dict[str, str] = {}
        self.varying: dict[str, bool] = {}
        self.chosen: dict[str, tuple[Scope | None, str] | None] = {}

    def at(self, name: str) -> tuple[Scope | None, str]:
        """The scope that a name belongs to, and what it is called there; what a body hands on as it is belongs to the graph around."""
        if name not in self.own:
            return (None, name) if self.outer is None else self.outer.at(name)
        entry = self.entries.get(name)
        if entry is None or not entry.name or self._unchanged(entry.after) != name:
            return self._chosen(name) or (self, name)
        return entry.scope.at(entry.name)

    def branches(self, node: onnx.NodeProto) -> list[tuple[Scope, onnx.GraphProto]]:
        """The bodies of an `If` that may run: one where its condition is constant."""
        bodies = {a.name: a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH}
        wanted = ["then_branch", "else_branch"]
        if self.is_constant(node.input[0]):
            wanted = [wanted[0 if numpy.all(self.value(node.input[0])) else 1]]
        return [(Scope(bodies[name], self, self.file, node), bodies[name]) for name in wanted if name in bodies]

    def _chosen(self, name: str) -> tuple[Scope | None, str] | None:
        """The value in a body that a value is, where it comes out of an `If` whose condition is constant."""
        node = self.nodes.get(name)
        if node is None or node.op_type != "If":
            return None
        if name not in self.chosen:
            self.chosen[name] = None  # for graphs that go in circles
            found = self.branches(node)
            place = list(node.output).index(name)
            alone = len(found) == 1 and place < len(found[0][1].output)
            self.chosen[name] = found[0][0].at(found[0][1].output[place].name) if alone else None
        return self.chosen[name]

    def _unchanged(self, name: str) -> str:
        """What a value is called before nodes that do nothing."""
        for _ in range(_DEPTH):
            node = self.nodes.get(name)
            if node is None or node.op_type != "Identity":
                break
            name = node.input[0]
        return name

    def is_constant(self, name: str, depth: int = 0) -> bool:
        """Whether a value can be known before the graph runs."""
        scope, name = self.at(name)
        if scope is None or depth > _DEPTH:
            return False
        if name not in scope.known:
            scope.known[name] = name in scope.tensors or scope._is_made(scope.nodes.get(name), depth)
        return scope.known[name]

    def _is_made(self, node: onnx.NodeProto | None, depth: int) -> bool:
        if node is None or hinders(node, self.file.version()) is not None:
            return False
        return all(self.is_constant(i, depth + 1) for i in node.input if i)

    def maker(self, name: str, depth: int = 0) -> str:
        """Why a value is no constant: what it comes from, in words."""
        scope, name = self.at(name)
        node = None if scope is None else scope.nodes.get(name)
        if scope is None or node is None or depth > _DEPTH:
            around = None if scope is None else scope.around
            return f"{name!r}, an input of the {'graph' if around is None else f'body of {around.op_type} {around.name!r}'}"
        if (why := hinders(node, self.file.version())) is not None:
            return f"the node {node.name or name!r} ({node.op_type}), {why}"
        return scope.maker(next((i for i in node.input if i and not self.is_constant(i)), ""), depth + 1)

    def operators(self, name: str) -> frozenset[str]:
        """The operators that a constant is made by."""
        scope, name = self.at(name)
        assert scope is not None
        if name not in scope.made_by:
            node = None if name in scope.tensors else scope.nodes[name]
            inner = () if node is None else (scope.operators(i) for i in node.input if i)
            scope.made_by[name] = frozenset({node.op_type} if node is not None else ()).union(*inner)
        return scope.made_by[name]

    def shape(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and type of a constant."""
        scope, name = self.at(name)
        assert scope is not None
        if name in scope.tensors:
            tensor = scope.tensors[name]
            values = tensor.values if isinstance(tensor, onnx.SparseTensorProto) else tensor
            return tuple(tensor.dims), helper.tensor_dtype_to_np_dtype(values.data_type).name
        value = scope.value(name)
        return value.shape, value.dtype.name

    def value(self, name: str) -> NumPyArray:
        """A constant's values."""
        scope, name = self.at(name)
        assert scope is not None
        if name in scope.tensors:
            return self.file.read(scope.tensors[name])
        if name not in scope.values:
            node = scope.nodes[name]
            made = (
                [_constant(node, self.file)]
                if node.op_type == "Constant"
                else self.file.run(node, [scope.value(i) if i else None for i in node.input])
            )
            scope.values |= dict(zip(node.output, made, strict=False))
        return scope.values[name]

    def start(self, name: str, depth: int = 0) -> str:
        """What a first state is: "zeros", "learned" (values that are in the file), "given" by whoever runs the graph, or "computed"."""
        if self.is_constant(name):
            return "learned" if numpy.any(self.value(name)) else "zeros"
        scope, name = self.at(name)
        node = None if scope is None else scope.nodes.get(name)
        entry = None if scope is None else scope.entries.get(name)
        if entry is not None and depth <= _DEPTH:
            kind = entry.scope.start(entry.name, depth + 1) if entry.name else "computed"
            return "computed" if kind == "learned" and entry.kind == "slice" else kind
        if scope is None or node is None or depth > _DEPTH:
            return "given"
        if name not in scope.starts:
            scope.starts[name] = scope._start_of(node, name, depth)
        return scope.starts[name]

    def first(self, name: str) -> NumPyArray | None:
        """The values of a first state that are in the file, before they are repeated for a batch; `None` where they cannot be known."""
        if self.is_constant(name):
            return self.value(name)
        scope, name = self.at(name)
        node = None if scope is None else scope.nodes.get(name)
        if scope is not None and name in scope.entries:
            return scope.entries[name].scope.first(scope.entries[name].name)
        if scope is None or node is None or node.op_type not in _FOLLOWED:
            return None
        inner = scope.first(next((i for i in node.input[:2] if self.start(i) == "learned"), node.input[0]))
        if inner is None or node.op_type in ("Expand", "Tile", "Add") or (node.op_type == "Unsqueeze" and inner.ndim == 1):
            return inner
        if inner.ndim != (2 if node.op_type == "Unsqueeze" else 3) or not all(scope.is_constant(i) for i in node.input[1:] if i):
            return None
        return self.file.run(node, [inner, *(scope.value(i) if i else None for i in node.input[1:])])[0]

    def carried(self, name: str) -> Entry | None:
        """The value that a `Loop` or `Scan` carries from run to run, where a first state is made of one."""
        for scope, found in self.sources(name, _MOVED | {"Add"}):
            entry = scope.entries.get(found)
            if entry is not None and entry.kind == "carried":
                return entry
        return None

    def is_made_of(self, name: str, wanted: Collection[str]) -> bool:
        """Whether a value is one of some values here, but for its layout and for sequences that have ended."""
        return any(scope is self and found in wanted for scope, found in self.sources(name, _MOVED | {"Where"}))

    def sources(self, name: str, through: Collection[str]) -> Iterator[tuple[Scope, str]]:
        """A value and all that it is made of through nodes of some operators, each once."""
        waiting, seen = [self.at(name)], set[tuple[int, str]]()
        while waiting:
            scope, name = waiting.pop()
            if scope is None or (id(scope), name) in seen:
                continue
            seen.add((id(scope), name))
            yield scope, name
            node = scope.nodes.get(name)
            if node is not None and node.op_type in through:
                data = {"Where": node.input[1:], "Concat": node.input, "Add": node.input}.get(node.op_type, node.input[:1])
                waiting += [scope.at(i) for i in reversed(data) if i]

    def _start_of(self, node: onnx.NodeProto, name: str, depth: int) -> str:
        if node.op_type == "ConstantOfShape":
            fill = [numpy_helper.to_array(a.t) for a in node.attribute if a.name == "value"]
            return "learned" if any(numpy.any(f) for f in fill) else "zeros"
        if node.op_type == "Add":  # of zeros, which say how many rows there are
            kinds = {self.start(i, depth + 1) for i in node.input}
            if kinds <= {"learned", "zeros"} and "zeros" in kinds:
                return "learned" if "learned" in kinds else "zeros"
        if node.op_type == "If":
            return self._start_of_branches(node, list(node.output).index(name), depth)
        if node.op_type not in _MOVED:
            return "given" if self._varies(node, depth) else "computed"
        found = {self.start(i, depth + 1) for i in (node.input if node.op_type == "Concat" else node.input[:1])}
        return next(kind for kind in ("computed", "learned", "given", "zeros") if kind in found)

    def _start_of_branches(self, node: onnx.NodeProto, place: int, depth: int) -> str:
        """What a first state is that comes out of an `If`: what is in the file of it is one of several."""
        kinds = {inside.start(body.output[place].name, depth + 1) for inside, body in self.branches(node) if place < len(body.output)}
        if kinds & {"learned", "computed"}:
            return "computed"
        return "zeros" if kinds == {"zeros"} else "given"

    def _varies(self, node: onnx.NodeProto, depth: int) -> bool:
        """Whether what a node computes depends on the values of a graph's inputs, and not on their shapes alone."""
        if node.op_type in ("Shape", "Size"):
            return False
        if depth > _DEPTH:
            return True
        inside = [inner for a in node.attribute if a.type == onnx.AttributeProto.GRAPH for inner in graphs(a.g)]
        own = {name for g in inside for n in g.node for name in n.output} | {t.name for g in inside for t in (*g.initializer, *g.input)}
        taken = {name for g in inside for n in g.node for name in n.input} | {o.name for g in inside for o in g.output}
        return any(self._is_varying(i, depth + 1) for i in {*node.input, *(taken - own)} if i and not self.is_constant(i))

    def _is_varying(self, name: str, depth: int) -> bool:
        scope, name = self.at(name)
        node = None if scope is None else scope.nodes.get(name)
        if scope is None or node is None:
            return True
        if name not in scope.varying:
            scope.varying[name] = scope._varies(node, depth)
        return scope.varying[name]


class File:
    """A model's file, out of which one tensor is read at a time."""

    def __init__(self, path: Path, model: onnx.ModelProto):
        self.path, self.model, self.opsets = path, model, list(model.opset_import)
        every = list(graphs(model.graph))
        self.limit = _ROOM + 4 * sum(math.prod(t.dims) for graph in every for t in tensors(graph))
        self.limit += min(sum(math.prod(t.dims) for graph in every for t in graph.sparse_initializer), _SPARSE)

    @cached_property
    def _shapes(self) -> dict[str, list[int | None] | None]:
        found: dict[str, list[int | None] | None] = {}
        try:
            inferred = shape_inference.infer_shapes(self.model)
        except Exception:  # of a graph that is wrong somewhere, which is no reason not to read another part of it
            return found
        for graph in graphs(inferred.graph):
            for value in (*graph.value_info, *graph.input, *graph.output):
                if value.type.tensor_type.HasField("shape"):
                    shape = [d.dim_value if d.HasField("dim_value") else None for d in value.type.tensor_type.shape.dim]
                    found[value.name] = shape if found.get(value.name, shape) == shape else None
        return found

    def shape(self, name: str) -> list[int | None] | None:
        """The shape of a value, as far as ONNX knows it; bodies side by side may have values of one name that differ."""
        return self._shapes.get(name)

    def read(self, tensor: onnx.TensorProto | onnx.SparseTensorProto) -> NumPyArray:
        if isinstance(tensor, onnx.SparseTensorProto):
            return self._dense(tensor)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:  # a copy, which does not keep what is read
            copied = onnx.TensorProto()
            copied.CopyFrom(tensor)
            tensor = copied
        try:
            array: NumPyArray = numpy_helper.to_array(tensor, str(self.path.parent))
        except Exception as error:  # onnx has its own errors for files that are not there, or lie elsewhere
            raise CheckpointError(f"{str(self.path)!r}: the values of {tensor.name!r} cannot be read: {error}") from error
        return array

    def _dense(self, sparse: onnx.SparseTensorProto) -> NumPyArray:
        """An array of which only the entries that are not 0 are stored: at places in all of it, or at one along each axis."""
        values, places, shape = self.read(sparse.values), self.read(sparse.indices), tuple(sparse.dims)
        if math.prod(shape) > _SPARSE:
            raise CheckpointError(
                f"{str(self.path)!r}: the sparse {sparse.values.name!r} has the shape {shape}, more than is made dense here"
            )
        try:
            dense = numpy.zeros(shape, values.dtype)
            dense[numpy.unravel_index(places, shape) if places.ndim == 1 else tuple(places.T)] = values
        except (ValueError, IndexError, TypeError) as error:
            raise CheckpointError(f"{str(self.path)!r}: the places of the sparse {sparse.values.name!r} do not fit: {error}") from error
        return dense

    def version(self) -> int:
        """That of ONNX' own operators."""
        return next((int(o.version) for o in self.opsets if o.domain in ("", "ai.onnx")), 1)

    def run(self, node: onnx.NodeProto, inputs: list[NumPyArray | None]) -> list[NumPyArray]:
        """What a node makes of constants."""
        names = {n: a for n, a in zip(node.input, inputs, strict=True) if a is not None}
        opsets = _SINCE_19 if node.op_type == "DequantizeLinear" and self.version() < 19 else self.opsets
        if node.domain == _MICROSOFT:
            given, node, opsets = node, onnx.NodeProto(), _SINCE_21
            node.CopyFrom(given)
            node.domain = ""
        values = [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in names.items()]
        outputs = [onnx.ValueInfoProto(name=n) for n in node.output if n]
        try:
            proto = helper.make_model(helper.make_graph([node], "constant", values, outputs), opset_imports=opsets)
            size = _size(proto, names)
            if size <= self.limit:
                made = list(ReferenceEvaluator(proto).run(None, names))
        except Exception as error:  # the evaluator raises what NumPy raises
            why = next(iter(str(error).splitlines()), "")
            named = f"{str(self.path)!r}: the node {node.name!r} ({node.op_type}) of constants"
            raise CheckpointError(f"{named} cannot be computed: {why}; {WAY_OUT}") from error
        if size > self.limit:
            why = (
                "constants of the node {} grow beyond what the file holds"
                if size < math.inf
                else "how large the node {} grows is not known"
            )
            raise CheckpointError(f"{str(self.path)!r}: {why.format(f'{node.name!r} ({node.op_type})')}; {WAY_OUT}")
        return made


def hinders(node: onnx.NodeProto, version: int) -> str | None:
    """Why a node of a file of an operator set is not computed here, even if all that it reads is constant."""
    if not (node.domain in _OWN or (node.domain == _MICROSOFT and node.op_type in _QUANTIZED)):
        return f"which is of the domain {node.domain!r}"
    if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
        return "which has a body"
    if node.op_type == "Constant":
        return None if any(a.name in _CONSTANTS for a in node.attribute) else "which is no array of numbers"
    if node.op_type in _OLDER and version < _OLDER[node.op_type]:
        return f"which meant something else in operator set {version} than it does now"
    if node.op_type in _LABORIOUS:
        return "which is not computed here"
    return "which is another one in each run" if node.op_type in _RANDOM else None


def _size(model: onnx.ModelProto, inputs: dict[str, NumPyArray]) -> float:
    """How many entries the results of a model of one node have, at least those that it reads; endless where ONNX cannot tell."""
    known = onnx.ModelProto()
    known.CopyFrom(model)
    known.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in inputs.items() if a.size <= _SHORT)
    found = shape_inference.infer_shapes(known, data_prop=True).graph.output
    sizes = [sum(a.size for a in inputs.values())]
    for value in found:
        dims = value.type.tensor_type.shape.dim if value.type.tensor_type.HasField("shape") else None
        if dims is None or any(not d.HasField("dim_value") for d in dims):
            return math.inf
        sizes.append(math.prod(d.dim_value for d in dims))
    return max(sizes)


_SINCE_19, _SINCE_21 = ([helper.make_opsetid("", version)] for version in (19, 21))
"""For nodes that the evaluator has since then, and that have meant the same since they are there."""


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and all bodies inside it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from graphs(inner)


def tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Initializers and constants of one graph."""
    yield from graph.initializer
    yield from (a.t for node in graph.node if node.op_type == "Constant" for a in node.attribute if a.HasField("t"))


_SHORT = 64
_CONSTANTS = ("value", "sparse_value", "value_float", "value_floats", "value_int", "value_ints")


def _constant(node: onnx.NodeProto, file: File) -> NumPyArray:
    (attribute,) = (a for a in node.attribute if a.name in _CONSTANTS)
    if attribute.name in ("value", "sparse_value"):
        return file.read(attribute.t if attribute.name == "value" else attribute.sparse_tensor)
    kind: Any = numpy.float32 if "float" in attribute.name else numpy.int64
    return numpy.asarray(helper.get_attribute_value(attribute), dtype=kind)
