"""The loops of a graph as a check needs them, also after a tool has sorted its nodes anew or folded its constants.

A graph without states starts at step 0. That is a constant in it, which a folder adds to the number of each step, and it is gone. So a
check adds the steps before where the number is used: the rows of tables that a step reads are `table[min(step, last)]`.
"""

from __future__ import annotations

import math
import re

import onnx
from onnx import helper

from portnorm.checkpoint.onnx_constants import graphs, tensors

OPERATORS = ("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM")
"""Those that are a loop; the last is what a tool makes of the first."""
BEFORE = "steps_before"
"""The input of a graph that is asked for one step later than its first."""


def loops_of(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The loops in the order in which the exporter wrote them: it numbers those of one operator, and tools keep the number in the name."""
    found = [n for n in graph.node if n.op_type in ("Scan", *OPERATORS)]
    kinds: dict[str, list[tuple[int, onnx.NodeProto]]] = {}
    for n in found:
        numbers = re.findall(r"\d+", n.name)
        kinds.setdefault(n.op_type, []).append((int(numbers[-1]) if numbers else 0, n))
    turns = {}
    for kind, own in kinds.items():
        apart = len({number for number, _ in own}) == len(own)
        turns[kind] = iter([n for _, n in (sorted(own, key=lambda pair: pair[0]) if apart else own)])
    return [next(turns[n.op_type]) for n in found]


def state_type(proto: onnx.ModelProto, loop: onnx.NodeProto) -> int:
    """The type of a loop's states; a tool may have made it another one than that of the graph's outputs."""
    usual: int = proto.graph.output[0].type.tensor_type.elem_type
    if loop.op_type == "Scan":
        body: onnx.GraphProto = helper.get_node_attr_value(loop, "body")
        stated = [i.type.tensor_type.elem_type for i in body.input]
        floats = [t for t in stated[: len(loop.input) - helper.get_node_attr_value(loop, "num_scan_inputs")] if _is_float(t)]
        return floats[-1] if floats else usual
    weights = {t.name: t.data_type for g in graphs(proto.graph) for t in tensors(g)}
    found = weights.get(loop.input[1], usual)
    return found if _is_float(found) else usual


def _is_float(code: int) -> bool:
    return helper.tensor_dtype_to_np_dtype(code).kind in "fV"


def count_given(proto: onnx.ModelProto) -> bool:
    """Make the steps before an input, `BEFORE`, in place: it is added to the number of every step that tables are read by.

    Returns whether there is such a number. Where there is none the graph has the same statistics at all steps, or a tool has read the
    tables.
    """
    graph = proto.graph
    places = _clamped(graph)
    for k, (at, place) in enumerate(reversed(places)):
        later = helper.make_node("Add", [graph.node[at].input[place], BEFORE], [f"{BEFORE}_{k}"])
        graph.node[at].input[place] = later.output[0]
        graph.node.insert(at, later)
    if places:  # OpenVINO does not find an input that nobody reads
        graph.input.append(helper.make_tensor_value_info(BEFORE, onnx.TensorProto.INT64, []))
    return bool(places)


def _clamped(graph: onnx.GraphProto) -> list[tuple[int, int]]:
    """(place of a node, place of its input) where the number of a row is held below the length of constant tables."""
    constants = _constants(graph)
    rows = {n.input[1] for n in graph.node if n.op_type == "Gather" and n.input[0] in constants and _axis(n) == 0}
    found = []
    for at, n in enumerate(graph.node):
        if n.op_type == "Min" and len(n.input) == 2 and n.output[0] in rows:
            limits = [k for k, name in enumerate(n.input) if name in constants and _is_limit(constants[name])]
            found += [(at, 1 - k) for k in limits[:1]]
    return found


def _constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Initializers and constant nodes of the graph itself, by name."""
    found = {t.name: t for t in graph.initializer}
    return found | {n.output[0]: a.t for n in graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"}


def _is_limit(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_type == onnx.TensorProto.INT64 and math.prod(tensor.dims) == 1)


def _axis(n: onnx.NodeProto) -> int:
    return next((int(a.i) for a in n.attribute if a.name == "axis"), 0)
