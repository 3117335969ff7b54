"""The graphs of layers in the places of the nodes that stand for them in a model that another exporter made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx
from onnx import helper

from portnorm.errors import ExportError
from portnorm_onnx.build import Names


@dataclass(frozen=True)
class Inserted:
    """What replaces one node: the layer's inputs and outputs by place, where its weights are named, and the graph under given names."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    place: str
    """What stands before the names of the layer's weights."""
    alone: bool
    """Whether no other node is of the same weights."""
    graph: Callable[[Names, tuple[str, ...]], onnx.ModelProto]
    """`graph(names, outputs)`: the model with those outputs."""


def spliced(proto: onnx.ModelProto, domain: str, inserted: dict[str, Inserted]) -> onnx.ModelProto:
    """`proto` with every node of `domain` replaced by the graph of its operator type; weights of one place are there once.

    Raises `ExportError` where a node lies inside another one's graph.
    """
    graph = proto.graph
    read = {name for n in graph.node for name in _read_by(n)} | {o.name for o in graph.output}
    known = {t.name: t for t in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    count = 0
    for n in graph.node:
        if n.domain != domain:
            nodes.append(n)
            continue
        part = inserted[n.op_type]
        outputs = {name: given for name, given in zip(part.outputs, n.output, strict=False) if given and given in read}
        apart = not part.alone or any(name.startswith(part.place) for name in known)
        prefix = f"{part.place}call_{count}." if apart else part.place
        count += apart
        if not outputs:
            continue
        inner = part.graph(Names(prefix, {**dict(zip(part.inputs, n.input, strict=False)), **outputs}), tuple(outputs))
        renamed = {}
        for t in inner.graph.initializer:
            name = part.place + t.name.removeprefix(prefix)
            if name not in known:
                known[name] = graph.initializer.add()
                known[name].CopyFrom(t)
                known[name].name = name
            elif not _same(known[name], t):
                graph.initializer.add().CopyFrom(t)
                continue
            renamed[t.name] = name
        _rename(inner.graph, renamed)
        nodes.extend(inner.graph.node)
    del graph.node[:]
    graph.node.extend(nodes)
    left = [n.name for n in _all_nodes(graph) if n.domain == domain]
    if left:
        raise ExportError(f"the nodes {left} lie inside a branch or loop of the model, where the exporter does not look")
    opsets = [o for o in proto.opset_import if o.domain != domain]
    del proto.opset_import[:]
    proto.opset_import.extend(opsets)
    proto.ir_version = max(proto.ir_version, helper.find_min_ir_version_for([o for o in opsets if o.domain == ""]))
    return proto


def without_traces(proto: onnx.ModelProto) -> None:
    """Leave out what an exporter wrote of the source: stack traces, with the paths of files on the machine it ran on."""
    graph = proto.graph
    for entry in (*_all_nodes(graph), *graph.input, *graph.output, *graph.value_info, *graph.initializer, graph, proto):
        entry.ClearField("metadata_props")
        entry.ClearField("doc_string")


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph, and of the graphs inside them."""
    for n in graph.node:
        yield n
        for inner in _inside(n):
            yield from _all_nodes(inner)


def _inside(n: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [g for a in n.attribute for g in ((a.g,) if a.type == onnx.AttributeProto.GRAPH else a.graphs)]


def _read_by(n: onnx.NodeProto) -> Iterator[str]:
    """Names that a node reads, also from inside."""
    yield from n.input
    for inner in _inside(n):
        yield from (o.name for o in inner.output)
        for m in inner.node:
            yield from _read_by(m)


def _rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    for n in _all_nodes(graph):
        for k, name in enumerate(n.input):
            n.input[k] = names.get(name, name)


def _same(a: onnx.TensorProto, b: onnx.TensorProto) -> bool:
    return (a.data_type, a.dims, a.raw_data) == (b.data_type, b.dims, b.raw_data)
