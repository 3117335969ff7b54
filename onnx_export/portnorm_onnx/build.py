"""From symbolic arrays to a model: collect what the outputs need, merge what is the same, and give names."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy
import onnx
from onnx import helper

from portnorm.errors import ExportError
from portnorm_onnx.symbolic import Body, Node, NumPyArray, SymbolicArray, type_of


def build(
    inputs: tuple[SymbolicArray, ...],
    outputs: Mapping[str, SymbolicArray],
    opset: int,
    name: str,
    *,
    names: Names | None = None,
    defaults: Mapping[str, NumPyArray] | None = None,
    captures: bool = False,
) -> onnx.ModelProto:
    """The model that computes `outputs` (by name) from `inputs`, which take the values in `defaults` where none are given.

    With `captures` the bodies of loops may read values from outside that are no constants, which not every runtime can do.
    """
    names = names or Names()
    graph = _Graph(names.prefix)
    for a in inputs:
        graph.names[a] = names.of(a.name or "")
    outputs = {names.of(n): a for n, a in outputs.items()}
    plan = planned(outputs.values())
    _check_closed(plan, set(inputs), captures)
    emitted = graph.emit(plan, tuple(outputs.values()), tuple(outputs))
    proto = helper.make_graph(
        emitted,
        names.prefix + name,
        [helper.make_value_info(graph.names[a], type_of(a)) for a in inputs],
        [helper.make_value_info(n, type_of(a)) for n, a in outputs.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    least = helper.find_min_ir_version_for(opsets)
    opsets += [helper.make_opsetid(domain, 1) for domain in sorted(graph.domains)]
    model = helper.make_model(proto, opset_imports=opsets, producer_name="portnorm", ir_version=least)
    weights = {**graph.initializers, **(defaults or {})}
    for a in graph.names:
        a.constant = None  # so that each is there once more at most, while it is put into the model
    del graph
    if sum(a.nbytes for a in weights.values()) > _WIDE:
        gc.collect()  # symbolic arrays and nodes know each other
    while weights:
        label = next(iter(weights))
        _put(model.graph.initializer.add(), label, weights.pop(label))
    keep_transposed(model)
    copy_shared(model.graph)
    return model


_WIDE = 2**24
"""Bytes of weights from which on memory is looked after."""


def keep_transposed(proto: onnx.ModelProto) -> None:
    """Keep a Transpose apart from the product behind it in a float16 graph, by a node that changes nothing.

    onnxruntime's CPU (1.24 to 1.32, x86-64) ended the process when it optimized some float16 graphs; all that are written so load. That
    node is a Reshape, or where all lengths are known and it would be optimized away, a Slice of everything.
    """
    graph = proto.graph
    types = {*(t.data_type for t in graph.initializer), *(i.type.tensor_type.elem_type for i in graph.input)}
    if onnx.TensorProto.FLOAT16 not in types:
        return
    fixed = all(d.HasField("dim_value") for i in graph.input for d in i.type.tensor_type.shape.dim)
    makers = {name: n for n in graph.node for name in n.output}
    turned = {source for n in graph.node if n.op_type == "MatMul" for name in n.input if (source := _turned(name, makers))}
    nodes = []
    for n in graph.node:
        nodes.append(n)
        if n.output[0] not in turned:
            continue
        name, kept, rank = n.output[0], f"{n.output[0]}_kept", len(_perm(n))
        n.output[0] = f"{name}_turned"
        places = {"starts": [0], "ends": [2**31 - 1], "axes": [0]} if fixed else {"lengths": [0] * rank}
        for place, numbers in places.items():
            _put(graph.initializer.add(), f"{name}_{place}", numpy.array(numbers, numpy.int64))
        inputs = [n.output[0], *(f"{name}_{place}" for place in places)]
        nodes.append(helper.make_node("Slice" if fixed else "Reshape", inputs, [name], kept))
    if turned:
        nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
        del graph.node[:]
        graph.node.extend(nodes)


def _turned(name: str, makers: Mapping[str, onnx.NodeProto]) -> str | None:
    """What a Transpose of several axes gives, of which this is the value or a Cast."""
    maker = makers.get(name)
    if maker is not None and maker.op_type == "Cast":
        return _turned(maker.input[0], makers)
    return name if maker is not None and maker.op_type == "Transpose" and len(_perm(maker)) > 2 else None


def _perm(n: onnx.NodeProto) -> list[int]:
    return next((list(a.ints) for a in n.attribute if a.name == "perm"), [])


def _put(tensor: onnx.TensorProto, name: str, values: NumPyArray) -> None:
    """Fill a tensor in its place: to copy a message of protocol buffers is to serialize it, which ends at 2 GB."""
    tensor.name, tensor.data_type = name, int(helper.np_dtype_to_tensor_dtype(values.dtype))
    tensor.dims.extend(values.shape)
    tensor.raw_data = values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()


def copy_shared(graph: onnx.GraphProto) -> None:
    """Give each loop weights of its own where others read them too: tools do not look for what a body reads from outside."""
    given = {i.name for i in graph.input}
    readers = _readers(graph)
    for tensor in [t for t in graph.initializer if t.name not in given and len(readers.get(t.name, [])) > 1]:
        name, (_, *others) = tensor.name, readers[tensor.name]
        for k, inner in enumerate(others, 1):  # the first reader keeps the weight and its name
            own = inner.initializer.add()
            own.CopyFrom(tensor)
            own.name = f"{name}_inside_{k}"
            for n in inner.node:
                _rename(n, name, own.name)


def keep_apart(graph: onnx.GraphProto, prefix: str = "") -> None:
    """Let no node read an output of the graph, but an Identity give it: converters to float16 put a cast behind the node that gives an
    output, and others that read it are left with the other type.
    """
    read = {name for n in graph.node for name in (*n.input, *(end for body in _bodies(n) for m in body.node for end in m.input))}
    made = {name for n in graph.node for name in n.output}
    taken = made | {v.name for v in (*graph.input, *graph.initializer)}
    for output in [o.name for o in graph.output if o.name in read & made]:
        inside = f"{prefix}{output.removeprefix(prefix)}_inside"
        while inside in taken:
            inside += "_"
        for n in graph.node:
            _rename(n, output, inside)
        graph.node.append(helper.make_node("Identity", [inside], [output], name=f"{inside}_out"))


def put_inside(proto: onnx.ModelProto) -> None:
    """Move what only one loop reads into its body: onnxruntime then does not pass it in anew at every step."""
    graph = proto.graph
    readers, given = _readers(graph), {i.name for i in graph.input}
    for tensor in list(graph.initializer):
        found = readers.get(tensor.name, [])
        if len(found) == 1 and found[0] is not graph and tensor.name not in given:
            found[0].initializer.append(tensor)
            graph.initializer.remove(tensor)


def _readers(graph: onnx.GraphProto) -> dict[str, list[onnx.GraphProto]]:
    """Which of a graph and the bodies in it read a value, by its name."""
    readers: dict[str, list[onnx.GraphProto]] = {}
    for inner in (graph, *(body for n in graph.node for body in _bodies(n))):
        for name in {name for n in inner.node for name in n.input} | {o.name for o in inner.output}:
            readers.setdefault(name, []).append(inner)
    return readers


def _bodies(n: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [a.g for a in n.attribute if a.type == onnx.AttributeProto.GRAPH]


def _rename(n: onnx.NodeProto, name: str, other: str) -> None:
    """In what a node gives and takes, in the bodies in it too."""
    for ends in (n.output, n.input):
        if name in ends:
            ends[:] = [other if end == name else end for end in ends]
    for inner in (m for body in _bodies(n) for m in body.node):
        _rename(inner, name, other)


@dataclass(frozen=True)
class Names:
    """How the names in a graph are made: those of inputs and outputs that were asked for, and what stands before all others."""

    prefix: str = ""
    given: Mapping[str, str] = field(default_factory=dict)

    def of(self, name: str) -> str:
        """The name of an input or output."""
        return self.given.get(name, self.prefix + name)


class _Graph:
    """Names and initializers of one model, shared by its graph and the bodies inside."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.names: dict[SymbolicArray, str] = {}
        self.initializers: dict[str, NumPyArray] = {}
        self.domains: set[str] = set()
        """Those of operators that are not ONNX's own."""
        self._by_content: dict[Any, str] = {}
        self._used: dict[str, int] = {}

    def emit(self, plan: Plan, outputs: tuple[SymbolicArray, ...], output_names: tuple[str, ...]) -> list[onnx.NodeProto]:
        """The nodes of a plan, in order, the outputs named."""
        protos: list[onnx.NodeProto] = []
        made: dict[Any, Node] = {}
        wanted = dict(zip(reversed(outputs), reversed(output_names), strict=True))
        for n in plan.nodes:
            if n.body is None:
                key = (n.op_type, tuple(self._name(a) for a in n.inputs), repr(sorted(n.attributes.items())))
                same = made.setdefault(key, n)
                if same is not n:
                    self.names.update({a: self._name(b) for a, b in zip(n.outputs, same.outputs, strict=True)})
                    continue
            for a in n.outputs:
                self.names[a] = wanted[a] if a in wanted else self._numbered(n.op_type.lower())
            protos.append(self._proto(n) if n.body is None else self._loop(n, plan.loops[n]))
        for a, name in zip(outputs, output_names, strict=True):
            if self._name(a) != name:
                protos.append(helper.make_node("Identity", [self._name(a)], [name], name=self._numbered("Identity")))
        return protos

    def _proto(self, n: Node) -> onnx.NodeProto:
        self.domains |= {n.domain} - {""}
        names = [self._name(a) for a in n.inputs]
        while names and not names[-1]:
            names.pop()
        return helper.make_node(
            n.op_type, names, [self.names[a] for a in n.outputs], name=self._numbered(n.op_type), domain=n.domain or None, **n.attributes
        )

    def _loop(self, n: Node, part: Loop) -> onnx.NodeProto:
        """A `Scan` of what is needed of it: all states, and the scanned inputs and outputs that matter."""
        body = n.body
        assert body is not None
        for a in part.inputs:
            self.names[a] = self._numbered("step_in")
        names = tuple(self._numbered("step_out") for _ in part.outputs)
        protos = self.emit(part.plan, part.outputs, names)
        graph = helper.make_graph(
            protos,
            self._numbered("step"),
            [helper.make_value_info(self.names[a], type_of(a)) for a in part.inputs],
            [helper.make_value_info(name, type_of(a)) for name, a in zip(names, part.outputs, strict=True)],
        )
        scanned, stacked = len(part.inputs) - body.states, len(part.outputs) - body.states
        attributes: dict[str, Any] = {"num_scan_inputs": scanned, "body": graph}
        if body.reverse:
            attributes |= {"scan_input_directions": [1] * scanned, "scan_output_directions": [1] * stacked}
        outer_inputs = [self._name(n.inputs[body.inputs.index(a)]) for a in part.inputs]
        return helper.make_node(
            n.op_type, outer_inputs, [self.names[n.outputs[k]] for k in part.kept], name=self._numbered(n.op_type), **attributes
        )

    def _name(self, a: SymbolicArray | None) -> str:
        if a is None:
            return ""
        if a.constant is not None and a not in self.names:
            self.names[a] = self._initializer(a)
        return self.names[a]

    def _initializer(self, a: SymbolicArray) -> str:
        assert a.constant is not None
        turned = a.constant.flags.f_contiguous
        values = numpy.ascontiguousarray(a.constant.T if turned else a.constant).reshape(-1).view(numpy.uint8)  # no copy of a wide one
        key = (str(a.dtype), a.constant.shape, turned, hashlib.sha256(values.data).digest(), a.name)
        if key not in self._by_content:
            name = self._by_content[key] = self._unique(a.name) if a.name else self._numbered("constant")
            self.initializers[name] = a.constant
        return self._by_content[key]

    def _numbered(self, stem: str) -> str:
        count = self._used[stem] = self._used.get(stem, -1) + 1
        return f"{self.prefix}{stem}_{count}"

    def _unique(self, name: str) -> str:
        name = self.prefix + name
        return f"{name}_{len(self.initializers)}" if name in self.initializers else name


@dataclass
class Loop:
    """What is needed of a `Scan`: inputs and outputs of its body, the places of the latter, and what the body reads from outside."""

    plan: Plan
    inputs: tuple[SymbolicArray, ...]
    outputs: tuple[SymbolicArray, ...]
    kept: tuple[int, ...]
    captured: tuple[SymbolicArray, ...]


@dataclass
class Plan:
    """The nodes that some outputs need, in order, and what is needed of each loop among them."""

    nodes: list[Node]
    loops: dict[Node, Loop]
    outside: tuple[SymbolicArray, ...] = ()
    """Inputs that are read, and, in the body of a loop, values from outside."""


def planned(outputs: Iterable[SymbolicArray], body: Body | None = None) -> Plan:
    """Everything that `outputs` depend on, down to inputs and constants; in a body, down to what does not depend on the step."""
    inner = None if body is None else _dependent(outputs, body)
    loops: dict[Node, Loop] = {}
    found: set[Node] = set()
    outside: dict[SymbolicArray, None] = {}
    wanted: dict[Node, set[int]] = {}
    waiting, seen = list(outputs), set()
    while waiting:
        a = waiting.pop()
        if a in seen or a.constant is not None:
            continue
        seen.add(a)
        n = a.producer
        if n is None or (inner is not None and n not in inner):
            outside[a] = None
        elif n.body is not None:
            places = wanted.setdefault(n, set(range(n.body.states)))
            places.add(n.outputs.index(a))
            found.add(n)
            loops[n] = _needed_of(n.body, tuple(sorted(places)))
            waiting.extend(b for b in (n.inputs[n.body.inputs.index(i)] for i in loops[n].inputs) if b is not None)
            waiting.extend(loops[n].captured)
        elif n not in found:
            found.add(n)
            waiting.extend(b for b in n.inputs if b is not None)
    return Plan(sorted(found, key=lambda n: n.serial), loops, tuple(outside))


def _needed_of(body: Body, kept: tuple[int, ...]) -> Loop:
    outputs = tuple(body.outputs[k] for k in kept)
    plan = planned(outputs, body)
    states, read = body.inputs[: body.states], set(plan.outside)
    inputs = (*states, *(a for a in body.inputs[body.states :] if a in read))
    return Loop(plan, inputs, outputs, kept, tuple(a for a in plan.outside if a not in set(body.inputs)))


def _dependent(outputs: Iterable[SymbolicArray], body: Body) -> set[Node]:
    """Nodes whose result depends on the step; the others belong outside of the loop, where they run once. What is made of constants alone
    stays too: a runtime computes it when it loads the graph, and not each can read it from outside.
    """
    inputs, depends = set(body.inputs), {}

    def visit(a: SymbolicArray | None) -> bool:
        if a is None or a.constant is not None:
            return False
        if a in inputs:
            return True
        n = a.producer
        if n is None or n.serial < body.first_serial:
            return False
        if n not in depends:
            found = [visit(b) for b in n.inputs]
            depends[n] = any(found) or all(b is None or b.constant is not None for b in n.inputs)
        return depends[n]

    for a in outputs:
        visit(a)
    return {n for n, inside in depends.items() if inside}


def _check_closed(plan: Plan, inputs: set[SymbolicArray], captures: bool) -> None:
    for a in plan.outside:
        if a not in inputs:
            raise ExportError(f"the graph uses {a}, which is no input of its own")
    for part in plan.loops.values():
        if part.captured and not captures:
            raise ExportError(
                f"the body of a loop reads {part.captured[0]} from outside; it takes states, scanned inputs and constants only"
            )
