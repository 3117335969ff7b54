"""What a tool has changed in a file since it was exported: facts of the graph as they were written, against those that are there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import onnx
from onnx.inliner import inline_local_functions

from portnorm.checkpoint.onnx_constants import graphs, tensors

Facts = dict[str, Any]


def facts(proto: onnx.ModelProto) -> Facts:
    """Operator sets, inputs and outputs, how many nodes there are of each operator, and how many weights of each type."""
    whole = inline_local_functions(proto) if proto.functions else proto
    parts = list(graphs(whole.graph))
    return {
        "opsets": {o.domain or "ai.onnx": o.version for o in whole.opset_import if o.domain != "portnorm"},
        "inputs": [_typed(v) for v in whole.graph.input],
        "outputs": [_typed(v) for v in whole.graph.output],
        "nodes": Counter(_operator(n) for g in parts for n in g.node),
        "weights": Counter(_type(t.data_type) for g in parts for t in tensors(g)),
    }


def changes(recorded: Any, now: Facts) -> tuple[str, ...]:
    """What is not as it was recorded, each in some words."""
    if not isinstance(recorded, dict):
        return ()
    found = []
    for what in ("inputs", "outputs"):
        before = recorded.get(what)
        if before is not None and before != now[what]:
            found.append(f"{what} {', '.join(now[what])} instead of {', '.join(map(str, before))}")
    for what in ("nodes", "weights", "opsets"):
        before = recorded.get(what)
        if isinstance(before, dict) and before != dict(now[what]):
            found.append(f"{what}: {_differences(before, now[what])}")
    return tuple(found)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    names = [name for name in sorted({*before, *now}) if before.get(name, 0) != now.get(name, 0)]
    return ", ".join(f"{name} {now.get(name, 'none')} instead of {before.get(name, 'none')}" for name in names)


def _operator(n: onnx.NodeProto) -> str:
    return n.op_type if n.domain in ("", "ai.onnx") else f"{n.domain}.{n.op_type}"


def _typed(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    dims = [str(d.dim_value) if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim]
    return f"{value.name} {_type(tensor.elem_type)}[{', '.join(dims)}]"


def _type(code: int) -> str:
    return str(onnx.TensorProto.DataType.Name(code)).lower()
