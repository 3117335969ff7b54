"""`portnorm draw`: every node, constant and shape of a graph stands in the picture, nothing overlaps, and lines lead where values go."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import portnorm as pn
from portnorm.__main__ import main
from portnorm_onnx import draw
from portnorm_onnx.conformance import layers
from portnorm_onnx.layout import GAP, Box, Edge, place

SVG = "{http://www.w3.org/2000/svg}"
LAYERS = {name: (layer, keywords) for name, layer, keywords in layers()}


def words(text: str) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(text).iter(f"{SVG}text")]


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_picture_has_every_node_once(name: str, target: str) -> None:
    layer, keywords = LAYERS[name]
    report = pn.export(layer, None, target=target, **keywords)
    assert report.model is not None
    text, (width, height) = draw.svg(report.model, "m.onnx")
    bodies = [helper.get_node_attr_value(n, "body") for n in report.model.graph.node if n.op_type == "Scan"]
    graphs = [report.model.graph, *bodies]
    expected = sorted(n.op_type for g in graphs for n in g.node if n.op_type != "Constant")
    drawn = words(text)
    assert sorted(word for word in drawn if word in expected) == expected
    for v in (*report.model.graph.input, *report.model.graph.output):
        assert v.name in drawn
    for g in graphs:
        for t in g.initializer:
            if np.prod(t.dims) > 4:
                shape = " × ".join(map(str, t.dims))
                assert any(f"{t.name}: " in word and shape in word for word in drawn), t.name
    root = ElementTree.fromstring(text)
    assert (root.get("width"), root.get("height")) == (str(width), str(height))
    for rect in root.iter(f"{SVG}rect"):
        if rect.get("x"):
            x, y, w, h = (float(rect.get(key) or 0) for key in ("x", "y", "width", "height"))
            assert x >= 0 and x + w <= width and y >= 0 and y + h <= height  # noqa: PT018


def boxes(drawn: Any) -> list[Box]:
    return [item.box for item in drawn.items]


def test_boxes_of_a_graph_and_of_its_bodies_do_not_overlap() -> None:
    report = pn.export(LAYERS["Embedding, LSTM layer in both directions, Linear"][0], None)
    whole = draw._Drawn(draw._with_shapes(report.model).graph, {})
    every = [whole, *(body for item in whole.items for _, body in item.bodies)]
    assert len(every) == 5
    for drawn in every:
        for a, b in itertools.combinations(boxes(drawn), 2):
            apart = a.x + a.width <= b.x or b.x + b.width <= a.x or a.y + a.height <= b.y or b.y + b.height <= a.y
            assert apart
        for edge in drawn.edges:
            assert edge.source.y + edge.source.height <= edge.target.y


def test_lines_end_at_ports() -> None:
    top, middle, low = Box(40, 10, [], [10, 30]), Box(20, 10, [10], [10]), Box(60, 10, [15, 45], [])
    edges = [Edge(top, 0, middle, 0), Edge(middle, 0, low, 0), Edge(top, 1, low, 1)]
    placed = place([top, middle, low], edges)
    assert [(box.layer) for box in (top, middle, low)] == [0, 1, 2]
    assert len(placed.lines[2]) == 3  # past the middle
    for edge, line in zip(edges, placed.lines, strict=True):
        assert line[0][0] == edge.source.x + edge.source.outputs[edge.output]
        assert line[-1][:2] == (edge.target.x + edge.target.inputs[edge.input], edge.target.y)
    assert abs(placed.lines[2][1][0] - (middle.x + 10)) >= GAP


def model(captures: bool = True) -> onnx.ModelProto:
    """A Loop and an If that read values of the graph around them, and an open length."""
    value, node = helper.make_tensor_value_info, helper.make_node
    body = helper.make_graph(
        [node("Add", ["s", "root"], ["s_next"]), node("Identity", ["c"], ["c_next"]), node("Mul", ["s_next", "k"], ["row"])],
        "body",
        [value("i", TensorProto.INT64, []), value("c", TensorProto.BOOL, []), value("s", TensorProto.FLOAT, [3])],
        [value("c_next", TensorProto.BOOL, []), value("s_next", TensorProto.FLOAT, [3]), value("row", TensorProto.FLOAT, [3])],
        [helper.make_tensor("k", TensorProto.FLOAT, [], [2.5])],
    )
    then, other = (
        helper.make_graph([node(op, ["last"], [f"{op}_y"])], op, [], [value(f"{op}_y", TensorProto.FLOAT, [3])]) for op in ("Relu", "Neg")
    )
    graph = helper.make_graph(
        [
            node("Sqrt", ["x"], ["root"]),
            node("Loop", ["n", "cond", "x"], ["last", "rows"], body=body),
            node("If", ["cond"], ["y"], then_branch=then, else_branch=other),
        ],
        "g",
        [value("x", TensorProto.FLOAT, [3]), value("n", TensorProto.INT64, []), value("cond", TensorProto.BOOL, [])],
        [value("y", TensorProto.FLOAT, [3]), value("rows", TensorProto.FLOAT, ["many", 3])],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(made)
    return made


def test_what_a_body_reads_of_the_graph_around_it_comes_from_above() -> None:
    drawn = draw._Drawn(draw._with_shapes(model()).graph, {})
    by_title = {item.title: item for item in drawn.items}
    for source, target in (("Sqrt", "Loop"), ("Loop", "If")):
        assert [e for e in drawn.edges if e.source is by_title[source].box and e.target is by_title[target].box]
    text, _ = draw.svg(model(), "loop.onnx")
    said = words(text)
    for word in ("from outside: root", "from outside: last", "state", "number of the step", "then branch", "else branch", "B = 2.5"):
        assert word in said


def test_lines_of_a_loop_lead_to_the_ends_in_its_body() -> None:
    report = pn.export(LAYERS["LSTM layer"][0], None)
    drawn = draw._Drawn(draw._with_shapes(report.model).graph, {})
    scan = next(item for item in drawn.items if item.title == "Scan")
    ((x, y),), ((_, body),) = draw._corners(scan), scan.bodies
    (node,) = (n for n in report.model.graph.node if n.op_type == "Scan")  # type: ignore[union-attr]
    for k, end in enumerate(body.inputs):
        assert scan.box.inputs[k] == pytest.approx(x + end.box.x + end.box.width / 2)
        assert scan.box.reach[k] == pytest.approx(y + end.box.y)
    assert len(body.inputs) == len(node.input)
    assert {end.box.layer for end in body.inputs} == {0}
    assert len({end.box.layer for end in body.outputs}) == 1


def test_a_name_with_signs_of_xml_is_written_as_it_is() -> None:
    made = model()
    made.graph.input[0].name = made.graph.node[0].input[0] = made.graph.node[1].input[2] = "<x> & co"
    assert "<x> & co" in words(draw.svg(made, "<&>.onnx")[0])


def test_a_function_is_drawn_as_what_it_computes() -> None:
    report = pn.export(pn.Linear(2, 3, rng=0), None, function=True)
    assert report.model is not None
    assert report.model.functions
    assert {"MatMul", "Add"} <= set(words(draw.svg(report.model, "f.onnx")[0])) or "Gemm" in words(draw.svg(report.model, "f.onnx")[0])


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    onnx.save(model(), tmp_path / "m.onnx")
    assert main(["draw", str(tmp_path / "m.onnx")]) == 0
    assert re.search(r"m\.svg: 3 nodes, \d+ × \d+ pixels", capsys.readouterr().out)
    assert ElementTree.parse(tmp_path / "m.svg").getroot().tag == f"{SVG}svg"
    assert main(["draw", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "n.svg"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["picture"].endswith("n.svg")
    assert (tmp_path / "n.svg").read_bytes() == (tmp_path / "m.svg").read_bytes()


NO_GRAPHS = {
    "not there": (None, "No such file"),
    "empty": (b"", "no graph with outputs"),
    "text": (b"import numpy\n", "no ONNX model|no graph with outputs"),
    "an array": (b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }", "no ONNX model|no graph with outputs"),
    "a model without a graph": (onnx.ModelProto(ir_version=8, opset_import=[helper.make_opsetid("", 18)]).SerializeToString(), "no graph"),
}


@pytest.mark.parametrize("command", ["draw", "bench"])
@pytest.mark.parametrize("name", NO_GRAPHS)
def test_a_file_without_a_graph_is_named(name: str, command: str, tmp_path: Path, capsys: Any) -> None:
    data, expected = NO_GRAPHS[name]
    path = tmp_path / "m.onnx"
    if data is not None:
        path.write_bytes(data)
    assert main([command, str(path), *(["-o", str(tmp_path / "m.svg")] if command == "draw" else [])]) == 2
    error = capsys.readouterr().err
    assert re.search(f"ExportError: .*{re.escape(str(path))}.*({expected})", error), error
    assert not (tmp_path / "m.svg").exists()


@pytest.mark.parametrize("command", ["draw", "bench"])
def test_a_checkpoint_is_told_from_a_graph(command: str, tmp_path: Path, capsys: Any) -> None:
    pn.save(pn.Linear(2, 3, rng=0), tmp_path / "m.safetensors")
    picture = ["-o", str(tmp_path / "m.svg")] if command == "draw" else []
    assert main([command, str(tmp_path / "m.safetensors"), *picture]) == 2
    assert "portnorm export" in capsys.readouterr().err


def test_a_picture_of_another_kind_is_refused_before_the_graph_is_read(tmp_path: Path, capsys: Any) -> None:
    assert main(["draw", "nothing.onnx", "-o", str(tmp_path / "m.png")]) == 2
    assert "`--output` is" in capsys.readouterr().err
