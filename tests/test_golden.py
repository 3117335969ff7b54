"""The graphs as they were looked at once: operators, edges, types and shapes.

`pytest tests/test_golden.py --update-golden` writes them anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

import portnorm as pn
from tests.cases import random_recurrent
from tests.test_export import lstm, recurrent

FOLDER = Path(__file__).parent / "golden"

GRAPHS: dict[str, tuple[pn.Layer, dict[str, Any]]] = {
    "layer_norm": (pn.LayerNorm(7), {}),
    "rms_norm": (pn.RMSNorm(7), {}),
    "rms_norm_23": (pn.RMSNorm(7), {"opset": 23}),
    "batch_norm": (pn.BatchNorm(3), {"input_shape": ("batch", 3, "height", "width")}),
    "batch_norm_accurate": (pn.BatchNorm(3), {"accurate": True}),
    "instance_norm_float64": (pn.InstanceNorm(3).to(dtype="float64"), {}),
    "group_norm": (pn.GroupNorm(2, 4), {"input_shape": ("batch", 4, "height", "width")}),
    "lstm": (lstm(None), {}),
    "lstm_onnxruntime": (lstm(None), {"target": "onnxruntime"}),
    "ln_lstm": (lstm("layer"), {}),
    "ln_lstm_without_lengths": (lstm("layer"), {"lengths": False}),
    "ln_lstm_backward": (lstm("layer", bidirectional=True), {"lengths": False}),
    "ln_lstm_streaming": (lstm("layer"), {"streaming": True}),
    "ln_lstm_function": (lstm("layer"), {"function": True, "prefix": "a/"}),
    "bn_lstm": (lstm("batch"), {}),
    "bn_lstm_unfolded": (lstm("batch"), {"fold": False}),
    "bn_lstm_state": (lstm("batch"), {"state": True}),
    "bn_lstm_onnxruntime": (
        random_recurrent("LSTM", "batch", np.random.default_rng(3), 20, 8).to(dtype="float32"),
        {"target": "onnxruntime"},
    ),
    "ln_lstm_onnxruntime": (lstm("layer"), {"target": "onnxruntime"}),
    "ln_gru": (recurrent("GRU", "layer"), {}),
    "ln_gru_onnxruntime": (
        random_recurrent("GRU", "layer", np.random.default_rng(3), 20, 8).to(dtype="float32"),
        {"target": "onnxruntime"},
    ),
    "batch_input_rnn": (recurrent("RNN", "batch-input"), {"lengths": False}),
}


def described(model: onnx.ModelProto) -> str:
    """A graph as lines of text, weights by type and shape only."""
    opsets = ", ".join(f"{o.domain or 'ai.onnx'} {o.version}" for o in model.opset_import)
    lines = [f"ir {model.ir_version}, opsets {opsets}"]
    lines += _graph(model.graph, "")
    for f in model.functions:
        lines += ["", f"function {f.name}({', '.join(f.input)}) -> {', '.join(f.output)}", *_nodes(f.node, "  ")]
    return "\n".join(lines) + "\n"


def _graph(graph: onnx.GraphProto, indent: str) -> Iterator[str]:
    for word, values in (("in", graph.input), ("out", graph.output)):
        for v in values:
            yield f"{indent}{word:<4}{v.name}: {_type(v)}"
    for t in graph.initializer:
        yield f"{indent}let {t.name}: {onnx.TensorProto.DataType.Name(t.data_type).lower()}{list(t.dims)}"
    yield from _nodes(graph.node, indent)


def _type(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    dims = [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim]
    return f"{onnx.TensorProto.DataType.Name(tensor.elem_type).lower()}[{', '.join(map(str, dims))}]"


def _nodes(nodes: Any, indent: str) -> Iterator[str]:
    for n in nodes:
        attributes = [a for a in n.attribute if a.type not in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.TENSOR)]
        given = "".join(f" {a.name}={helper.get_attribute_value(a)!r}" for a in attributes)
        yield f"{indent}{', '.join(n.output)} = {n.op_type}({', '.join(n.input)}){given}"
        for a in n.attribute:
            if a.type == onnx.AttributeProto.GRAPH:
                yield from _graph(a.g, indent + "    ")


@pytest.mark.parametrize("name", GRAPHS)
def test_the_graph_is_as_it_was(name: str, pytestconfig: pytest.Config) -> None:
    layer, keywords = GRAPHS[name]
    model = pn.export(layer, None, **keywords).model
    assert model is not None
    text, path = described(model), FOLDER / f"{name}.txt"
    if pytestconfig.getoption("--update-golden"):
        FOLDER.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.exists(), "no such golden graph: run pytest tests/test_golden.py --update-golden, and look at what it writes"
    assert text == path.read_text(encoding="utf-8"), (
        "the graph has changed; if it should have, run with --update-golden and look at the difference"
    )


def test_no_golden_graph_is_left_over() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(GRAPHS)


def test_the_promised_sizes() -> None:
    """LN-LSTM: at most 8 nodes and 20 in the loop, made in less than a second with its checks; a norm that is an operator is one node."""
    report = pn.export(lstm("layer"), None)
    assert report.nodes <= 8
    assert report.body_nodes[0] <= 20
    assert report.seconds < 1.0
    for layer in (pn.LayerNorm(7), pn.BatchNorm(7), pn.InstanceNorm(7)):
        assert pn.export(layer, None).nodes == 1
    assert pn.export(pn.RMSNorm(7), None, opset=23).nodes == 1
