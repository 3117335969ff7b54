"""Each `Scan` of a graph as a `Loop` that takes its steps by `Gather`, for a runtime that has the one and not the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import onnx
from onnx import helper, numpy_helper

from portnorm.errors import ExportError


def as_loops(proto: onnx.ModelProto) -> None:
    """Change them in place."""
    nodes: list[onnx.NodeProto] = []
    for n in proto.graph.node:
        nodes += _loop(n, proto.graph) if n.op_type == "Scan" else [n]
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(copies)


def _loop(scan: onnx.NodeProto, graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes that stand for one: the number of steps, and the loop. A step is reshaped, so that its shape is known inside."""
    given = {a.name: helper.get_attribute_value(a) for a in scan.attribute}
    if any(given.get("scan_input_directions", [])):
        raise ExportError(f"{scan.name} goes backward, which only a graph of training does")
    body, name = given["body"], scan.name
    states = len(scan.input) - given["num_scan_inputs"]
    step, going = f"{name}_step", f"{name}_going"
    taken: list[onnx.NodeProto] = []
    for k, (outer, inner) in enumerate(zip(scan.input[states:], body.input[states:], strict=True)):
        dims = [d.dim_value or -1 for d in inner.type.tensor_type.shape.dim]
        shape = f"{name}_shape_{k}"
        body.initializer.append(numpy_helper.from_array(numpy.array(dims, numpy.int64), shape))
        taken += [
            helper.make_node("Gather", [outer, step], [f"{inner.name}_row"], f"{name}_gather_{k}", axis=0),
            helper.make_node("Reshape", [f"{inner.name}_row", shape], [inner.name], f"{name}_reshape_{k}"),
        ]
    inner_nodes = [*taken, *body.node, helper.make_node("Identity", [going], [f"{going}_on"], f"{going}_on")]
    loop_body = helper.make_graph(
        inner_nodes,
        body.name,
        [
            helper.make_tensor_value_info(step, onnx.TensorProto.INT64, []),
            helper.make_tensor_value_info(going, onnx.TensorProto.BOOL, []),
            *body.input[:states],
        ],
        [helper.make_tensor_value_info(f"{going}_on", onnx.TensorProto.BOOL, []), *body.output],
        list(body.initializer),
    )
    first, steps, always = f"{name}_first", f"{name}_steps", f"{name}_always"
    graph.initializer.append(numpy_helper.from_array(numpy.array(0), first))
    graph.initializer.append(numpy_helper.from_array(numpy.array(True), always))
    starts, apart = _apart(scan.input[:states], body.input[:states], graph, name)
    return [
        helper.make_node("Shape", [scan.input[states]], [f"{steps}_shape"], f"{steps}_shape"),
        helper.make_node("Gather", [f"{steps}_shape", first], [steps], steps, axis=0),
        *apart,
        helper.make_node("Loop", [steps, always, *starts], list(scan.output), name, body=loop_body),
    ]


def _apart(
    outer: Sequence[str], inner: Sequence[onnx.ValueInfoProto], graph: onnx.GraphProto, name: str
) -> tuple[list[str], list[onnx.NodeProto]]:
    """First states, each a value of its own: OpenCV computes a state in the memory of what it begins as, whoever else reads that."""
    starts: list[str] = []
    nodes = []
    for k, (start, value) in enumerate(zip(outer, inner, strict=True)):
        own, zero = f"{name}_start_{k}", f"{name}_zero_{k}"
        kind = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        graph.initializer.append(numpy_helper.from_array(numpy.zeros(1, kind), zero))
        nodes.append(helper.make_node("Add", [start, zero], [own], own))
        starts.append(own)
    return starts, nodes
