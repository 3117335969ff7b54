"""From symbolic arrays to a model: collect what the outputs need, merge what is the same, and give names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import onnx
from onnx import helper, numpy_helper

from portnorm.errors import ExportError
from portnorm_onnx.symbolic import Body, Node, SymbolicArray, type_of


def build(
    inputs: tuple[SymbolicArray, ...], outputs: Mapping[str, SymbolicArray], opset: int, name: str, metadata: Mapping[str, str]
) -> onnx.ModelProto:
    """The model that computes `outputs` (by name) from `inputs`."""
    graph = _Graph()
    for a in inputs:
        graph.names[a] = a.name or ""
    emitted = graph.emit(inputs, tuple(outputs.values()), tuple(outputs), 0)
    proto = helper.make_graph(
        emitted,
        name,
        [helper.make_value_info(a.name or "", type_of(a)) for a in inputs],
        [helper.make_value_info(n, type_of(a)) for n, a in outputs.items()],
        list(graph.initializers.values()),
    )
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(proto, opset_imports=opsets, producer_name="portnorm", ir_version=helper.find_min_ir_version_for(opsets))
    helper.set_model_props(model, dict(metadata))
    return model


class _Graph:
    """Names and initializers of one model, shared by its graph and the bodies inside."""

    def __init__(self) -> None:
        self.names: dict[SymbolicArray, str] = {}
        self.initializers: dict[str, onnx.TensorProto] = {}
        self._by_content: dict[Any, str] = {}
        self._used: dict[str, int] = {}

    def emit(
        self, inputs: tuple[SymbolicArray, ...], outputs: tuple[SymbolicArray, ...], output_names: tuple[str, ...], first_serial: int
    ) -> list[onnx.NodeProto]:
        """The nodes that `outputs` need, in order, the outputs named."""
        protos: list[onnx.NodeProto] = []
        made: dict[Any, Node] = {}
        wanted = dict(zip(reversed(outputs), reversed(output_names), strict=True))
        for n in sorted(_needed(outputs, inputs, first_serial), key=lambda n: n.serial):
            key = (n.op_type, tuple(self._name(a) for a in n.inputs), repr(sorted(n.attributes.items())), id(n.body))
            same = made.setdefault(key, n)
            if same is not n:
                self.names.update({a: self._name(b) for a, b in zip(n.outputs, same.outputs, strict=True)})
                continue
            for a in n.outputs:
                self.names[a] = wanted[a] if a in wanted else self._numbered(n.op_type.lower())
            protos.append(self._proto(n))
        for a, name in zip(outputs, output_names, strict=True):
            if self._name(a) != name:
                protos.append(helper.make_node("Identity", [self._name(a)], [name], name=self._numbered("Identity")))
        return protos

    def _proto(self, n: Node) -> onnx.NodeProto:
        attributes = dict(n.attributes)
        if n.body is not None:
            attributes["body"] = self._body(n.body)
        names = [self._name(a) for a in n.inputs]
        while names and not names[-1]:
            names.pop()
        return helper.make_node(n.op_type, names, [self.names[a] for a in n.outputs], name=self._numbered(n.op_type), **attributes)

    def _body(self, body: Body) -> onnx.GraphProto:
        for a in body.inputs:
            self.names[a] = self._numbered("step_in")
        names = tuple(self._numbered("step_out") for _ in body.outputs)
        protos = self.emit(body.inputs, body.outputs, names, body.first_serial)
        return helper.make_graph(
            protos,
            self._numbered("step"),
            [helper.make_value_info(self.names[a], type_of(a)) for a in body.inputs],
            [helper.make_value_info(name, type_of(a)) for name, a in zip(names, body.outputs, strict=True)],
        )

    def _name(self, a: SymbolicArray | None) -> str:
        if a is None:
            return ""
        if a.constant is not None and a not in self.names:
            self.names[a] = self._initializer(a)
        return self.names[a]

    def _initializer(self, a: SymbolicArray) -> str:
        assert a.constant is not None
        key = (str(a.dtype), a.constant.shape, a.constant.tobytes(), a.name)
        if key not in self._by_content:
            name = self._by_content[key] = self._unique(a.name) if a.name else self._numbered("constant")
            self.initializers[name] = numpy_helper.from_array(a.constant.copy(), name)
        return self._by_content[key]

    def _numbered(self, stem: str) -> str:
        count = self._used[stem] = self._used.get(stem, -1) + 1
        return f"{stem}_{count}"

    def _unique(self, name: str) -> str:
        return self._numbered(name) if name in self.initializers else name


def _needed(outputs: tuple[SymbolicArray, ...], inputs: Iterable[SymbolicArray], first_serial: int) -> set[Node]:
    """Every node that `outputs` depend on, down to `inputs` and constants."""
    found: set[Node] = set()
    known = set(inputs)
    waiting = list(outputs)
    while waiting:
        a = waiting.pop()
        if a in known or a.constant is not None:
            continue
        if a.producer is None or a.producer.serial < first_serial:
            where = "computed outside of it" if a.producer else "no input of its own"
            raise ExportError(f"a graph uses {a}, which is {where}; the body of a loop takes states, scanned inputs and constants only")
        if a.producer not in found:
            found.add(a.producer)
            waiting.extend(b for b in a.producer.inputs if b is not None)
    return found
