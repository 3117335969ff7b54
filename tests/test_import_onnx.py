"""Nodes of ONNX models: every attribute and input, weights behind constant nodes, bodies of If, Loop and Scan, quantized weights."""

from __future__ import annotations

import contextlib
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import portnorm as pn
from tests.oracles import D, H
from tests.test_import import onnx_model, run_onnx
from tests.tolerances import ONNX_OPERATOR

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
STATES = {"LSTM": ("initial_h", "initial_c"), "GRU": ("initial_h",), "RNN": ("initial_h",)}


def weights(operator: str, rng: np.random.Generator, directions: int = 1) -> dict[str, Any]:
    shapes = {"W": (GATES[operator] * H, D), "R": (GATES[operator] * H, H), "B": (2 * GATES[operator] * H,)}
    return {n: rng.standard_normal((directions, *s)).astype("float32") * 0.5 for n, s in shapes.items()}


def imported(model: Any, path: Path, **keywords: Any) -> Any:
    onnx.save(model, path / "m.onnx")
    return pn.import_checkpoint(path / "m.onnx", **keywords)


FUNCTIONS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "Relu": (["Sigmoid", "Relu", "Relu"], {}),
    "Relu of the candidate": (["Sigmoid", "Relu", "Tanh"], {}),
    "HardSigmoid": (["HardSigmoid", "Tanh", "Tanh"], {}),
    "HardSigmoid of a sixth": (["HardSigmoid", "Tanh", "Relu"], {"activation_alpha": [1 / 6], "activation_beta": [0.5]}),
    "HardSigmoid everywhere": (["HardSigmoid"] * 3, {"activation_alpha": [0.2, 1 / 6, 0.2], "activation_beta": [0.5] * 3}),
    "Sigmoid": (["Relu", "Sigmoid", "Tanh"], {}),
}


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("functions", [None, *FUNCTIONS])
@pytest.mark.parametrize("operator", GATES)
def test_functions_and_directions(operator: str, functions: str | None, direction: str, tmp_path: Path, rng: np.random.Generator) -> None:
    count = 2 if direction == "bidirectional" else 1
    arrays = weights(operator, rng, count)
    attributes: dict[str, Any] = {"direction": direction, "hidden_size": H}
    if functions is not None:
        names, numbers = FUNCTIONS[functions]
        part = {"LSTM": slice(0, 3), "GRU": slice(0, 2), "RNN": slice(1, 2)}[operator]
        attributes["activations"] = names[part] * count if operator == "RNN" else [n.lower() for n in names[part]] * count  # in any case
        where = [k for k, n in enumerate(names) if n.lower() == "hardsigmoid"]
        kept = [j for j, k in enumerate(where) if k in range(3)[part]]
        attributes |= {key: [values[j] for j in kept] * count for key, values in numbers.items() if kept}
    model = onnx_model(operator, arrays, ("x", "W", "R", "B"), **attributes)
    x = rng.standard_normal((6, 3, D)).astype("float32")
    y = imported(model, tmp_path)(x)[0].reshape(6, 3, count, H).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(y, run_onnx(model, x), rtol=ONNX_OPERATOR, atol=5 * ONNX_OPERATOR)  # relu lets states grow


@pytest.mark.parametrize(
    ("operator", "attributes", "named"),
    [
        ("LSTM", {"activations": ["HardSigmoid", "Tanh", "Tanh"], "activation_alpha": [0.3]}, r"activations.*HardSigmoid"),
        ("GRU", {"activations": ["Sigmoid", "Elu"]}, "activations"),
        ("RNN", {"activations": ["Tanh", "Relu"], "direction": "bidirectional"}, "activations.*for every direction alike"),
        ("LSTM", {"clip": 0.5}, r"clip=0\.5"),
        ("GRU", {"clip": 0.5}, r"clip=0\.5"),
        ("RNN", {"clip": 0.0}, r"clip=0\.0"),  # onnxruntime clips at 0
        ("LSTM", {"input_forget": 1}, "input_forget=1"),
    ],
)
def test_attributes_that_no_layer_has_are_named(
    operator: str, attributes: dict[str, Any], named: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    arrays = weights(operator, rng, 2 if "direction" in attributes else 1)
    model = onnx_model(operator, arrays, ("x", "W", "R", "B"), hidden_size=H, **attributes)
    with pytest.raises(pn.CheckpointError, match=f"a_node.*{named}"):
        imported(model, tmp_path)


@pytest.mark.parametrize(
    ("functions", "numbers", "strange", "answer"),
    [
        (["HardSigmoid", "Tanh", "Relu"], {"activation_alpha": [0.3]}, ["gate_activation"], {"gate_activation": "hard_sigmoid_5"}),
        (["Sigmoid", "Elu", "Relu"], {}, ["activation"], {"activation": "relu"}),
        (["Elu", "HardSigmoid", "Relu"], {"activation_alpha": [0.7, 0.2]}, ["gate_activation"], {"gate_activation": "sigmoid"}),
        (
            ["Softsign", "Relu", "Affine"],
            {"activation_alpha": [0.3], "activation_beta": [0.1]},
            ["gate_activation", "output_activation"],
            {"gate_activation": "sigmoid", "output_activation": "relu"},
        ),
    ],
)
def test_each_function_that_no_layer_has_needs_an_answer_of_its_own(
    functions: list[str], numbers: dict[str, Any], strange: list[str], answer: dict[str, str], tmp_path: Path, rng: np.random.Generator
) -> None:
    model = onnx_model("LSTM", weights("LSTM", rng), ("x", "W", "R", "B"), hidden_size=H, activations=functions, **numbers)
    asked = " and ".join(f"{field}=…" for field in strange)
    fields = ["gate_activation", "activation", "output_activation"]
    others = {field: "tanh" for field in fields if field not in strange}
    for said in ({}, others, dict(list(answer.items())[1:])):
        with pytest.raises(pn.CheckpointError, match=f"a_node.*activations=.*say {asked} yourself"):
            imported(model, tmp_path, **said)
    variant = pn.import_checkpoint(tmp_path / "m.onnx", **answer).variant
    known = {"Sigmoid": "sigmoid", "Tanh": "tanh", "Relu": "relu", "HardSigmoid": "hard_sigmoid_5"}
    for field, function in zip(fields, functions, strict=True):
        assert getattr(variant, field) == answer.get(field, known.get(function))


def test_an_attribute_nobody_knows_is_named(tmp_path: Path, rng: np.random.Generator) -> None:
    model = onnx_model("GRU", weights("GRU", rng), ("x", "W", "R", "B"), hidden_size=H, dropout=0.5)
    with pytest.raises(pn.CheckpointError, match=r"a_node.*dropout=0\.5, which is not known here.*ignore=\('dropout',\)"):
        imported(model, tmp_path)
    assert isinstance(pn.import_checkpoint(tmp_path / "m.onnx", ignore=("dropout",)), pn.GRU)


@pytest.mark.parametrize("operator", GATES)
def test_layout(operator: str, tmp_path: Path, rng: np.random.Generator) -> None:
    arrays = weights(operator, rng)
    plain, other = (onnx_model(operator, arrays, ("x", "W", "R", "B"), hidden_size=H, layout=k) for k in (0, 1))
    x = rng.standard_normal((6, 3, D)).astype("float32")
    layer = imported(other, tmp_path)
    assert layer.batch_first
    expected = run_onnx(plain, x)[:, 0].transpose(1, 0, 2)
    np.testing.assert_allclose(layer(x.transpose(1, 0, 2))[0], expected, rtol=ONNX_OPERATOR, atol=ONNX_OPERATOR)


def with_first(operator: str, kind: str, rng: np.random.Generator, directions: int = 1) -> tuple[Any, dict[str, Any]]:
    """A model whose first states are of one kind, and what is in the file of them."""
    states, names, nodes = STATES[operator], [], []
    rows = 1 if kind in ("expanded", "repeated", "one of a stack") else 3
    count = 2 * directions if kind == "one of a stack" else directions
    values = {s: rng.standard_normal((count, 1, H)).astype("float32") for s in states}
    if kind == "each its own":
        values = {s: rng.standard_normal((directions, rows, H)).astype("float32") for s in states}
    values = {s: np.repeat(v, rows // v.shape[1], 1) * np.float32(kind != "zeros") for s, v in values.items()}
    numbers = {"batch": np.array([1, 3, 1]), "sizes": np.array([count, 3, H]), "start": np.array([directions]), "end": np.array([count])}
    for s in states:
        names.append(s if kind in ("zeros", "constant", "each its own", "input") else f"{s}_in")
        if kind == "behind a Cast":
            nodes.append(helper.make_node("Cast", [s], [f"{s}_in"], to=1))
        elif kind == "expanded":
            nodes.append(helper.make_node("Expand", [s, "shape"], [f"{s}_in"]))
        elif kind == "repeated":
            nodes.append(helper.make_node("Tile", [s, "batch"], [f"{s}_in"]))
        elif kind == "one of a stack":
            nodes += [
                helper.make_node("Expand", [s, "shape"], [f"{s}_wide"]),
                helper.make_node("Slice", [f"{s}_wide", "start", "end"], [f"{s}_in"]),
            ]
    arrays = {**weights(operator, rng, directions), **numbers, **({} if kind == "input" else values)}
    direction = "bidirectional" if directions == 2 else "forward"
    model = onnx_model(operator, arrays, ("x",), hidden_size=H, direction=direction)
    model.graph.node[0].input[:] = ["x", "W", "R", "B", "", *names]
    shape = [  # of as many rows as x has
        helper.make_node("Shape", ["x"], ["rows"], start=1, end=2),
        helper.make_node("Constant", [], ["first"], value_ints=[count]),
        helper.make_node("Constant", [], ["last"], value_ints=[H]),
        helper.make_node("Concat", ["first", "rows", "last"], ["shape"], axis=0),
    ]
    for node in reversed([*shape, *nodes]):
        model.graph.node.insert(0, node)
    if kind == "input":
        model.graph.input.extend(helper.make_tensor_value_info(s, TensorProto.FLOAT, [directions, None, H]) for s in states)
    return model, values


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("operator", GATES)
@pytest.mark.parametrize("kind", ["constant", "expanded", "repeated", "one of a stack", "behind a Cast"])
def test_first_states_in_the_file_are_learned(operator: str, kind: str, directions: int, tmp_path: Path, rng: np.random.Generator) -> None:
    model, _ = with_first(operator, kind, rng, directions)
    layer, x = imported(model, tmp_path), rng.standard_normal((6, 3, D)).astype("float32")
    assert layer.learned_state
    assert "initial_h is not zero: the layer learns its first state" in layer.provenance
    y = layer(x)[0].reshape(6, 3, directions, H).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(y, run_onnx(model, x), rtol=ONNX_OPERATOR, atol=ONNX_OPERATOR)
    plain = pn.import_checkpoint(tmp_path / "m.onnx", ignore=STATES[operator])
    assert not plain.learned_state


@pytest.mark.parametrize("operator", GATES)
@pytest.mark.parametrize("kind", ["zeros", "input"])
def test_first_states_that_need_nothing(operator: str, kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    layer = imported(with_first(operator, kind, rng)[0], tmp_path)
    assert not layer.learned_state
    assert ("initial_h is in the `state` of a call" in layer.provenance) == (kind == "input")


@pytest.mark.parametrize("depends_on_x", [False, True])
def test_first_states_that_the_graph_computes(depends_on_x: bool, tmp_path: Path, rng: np.random.Generator) -> None:
    """Out of what is in the file they are not dropped; what comes with a call is in its state."""
    model, _ = with_first("GRU", "expanded", rng)
    start, *nodes = ("x_row" if depends_on_x else "initial_h_in"), helper.make_node("ReduceSum", ["x"], ["x_row"], keepdims=1)
    for k in range(40):  # twice as many ways back with every node
        nodes.append(helper.make_node("Mul", [start, start], [f"m{k}"]))
        start = f"m{k}"
    for node in reversed(nodes):
        model.graph.node.insert(len(model.graph.node) - 1, node)
    model.graph.node[-1].input[5] = start
    if depends_on_x:
        assert "initial_h is in the `state` of a call" in imported(model, tmp_path).provenance
    else:
        with pytest.raises(pn.CheckpointError, match=r"a first state that the graph computes \(initial_h\).*ignore=\('initial_h',\)"):
            imported(model, tmp_path)


@pytest.mark.parametrize("operator", GATES)
def test_first_states_of_an_export_come_back(operator: str, tmp_path: Path, rng: np.random.Generator) -> None:
    layer = getattr(pn, operator)(D, H, learned_state=True, rng=rng)
    layer.load_state_dict({n: rng.standard_normal(a.shape).astype("float32") for n, a in layer.state_dict().items()})
    pn.export(layer, tmp_path / "m.onnx")
    x = rng.standard_normal((6, 3, D)).astype("float32")
    np.testing.assert_allclose(pn.import_checkpoint(tmp_path / "m.onnx")(x)[0], layer(x)[0], rtol=ONNX_OPERATOR, atol=ONNX_OPERATOR)


@pytest.mark.parametrize("operator", GATES)
def test_first_states_that_differ_within_the_batch_are_named(operator: str, tmp_path: Path, rng: np.random.Generator) -> None:
    model, values = with_first(operator, "each its own", rng)
    with pytest.raises(
        pn.CheckpointError, match=r"a_node.*first state of its own \(initial_h is not zero\), which differs.*ignore=\('initial_h',\)"
    ):
        imported(model, tmp_path)
    layer, x = pn.import_checkpoint(tmp_path / "m.onnx", ignore=STATES[operator]), rng.standard_normal((6, 3, D)).astype("float32")
    np.testing.assert_allclose(layer(x, tuple(values.values()))[0], run_onnx(model, x)[:, 0], rtol=ONNX_OPERATOR, atol=ONNX_OPERATOR)


def stepping(kind: str, operator: str, rng: np.random.Generator, first: str = "zeros", **scan: Any) -> Any:
    """A model whose `Scan` or `Loop` computes one step after another by the operator, and carries its states."""
    info, states, arrays = helper.make_tensor_value_info, STATES[operator], weights(operator, rng)
    rows = rng.standard_normal((1, 3 if first == "each its own" else 1, H)).astype("float32") * np.float32(first != "zeros")
    arrays |= {s: np.repeat(rows, 3 // rows.shape[1], 1) for s in states}
    arrays |= {"zero": np.array([0]), "count": np.array(6), "true": np.array(True), "half": np.float32(0.5)}
    after = [s.replace("initial", "next") for s in states]
    step = helper.make_node(operator, ["step_x", "W", "R", "B", "", *(f"{s}_c" for s in states)], ["", *after], name="cell", hidden_size=H)
    nodes, carried = [step, helper.make_node("Squeeze", [after[0], "zero"], ["step_y"])], list(after)
    if first == "changed":
        nodes.append(helper.make_node("Mul", [after[0], "half"], ["halved"]))
        carried[0] = "halved"
    before = [info(f"{s}_c", TensorProto.FLOAT, [1, 3, H]) for s in states]
    results = [*(info(n, TensorProto.FLOAT, [1, 3, H]) for n in carried), info("step_y", TensorProto.FLOAT, [3, H])]
    last = [s.replace("initial", "last") for s in states]
    if kind == "Scan":
        body = helper.make_graph(
            [helper.make_node("Unsqueeze", ["one", "zero"], ["step_x"]), *nodes],
            "body",
            [*before, info("one", TensorProto.FLOAT, [3, D])],
            results,
        )
        around = helper.make_node("Scan", [*states, "x"], [*last, "y"], name="along", body=body, num_scan_inputs=1, **scan)
    else:
        nodes = [
            helper.make_node("Gather", ["x", "k"], ["one"], axis=0),
            helper.make_node("Unsqueeze", ["one", "zero"], ["step_x"]),
            *nodes,
            helper.make_node("Identity", ["go"], ["go_on"]),
        ]
        before = [info("k", TensorProto.INT64, []), info("go", TensorProto.BOOL, []), *before]
        body = helper.make_graph(nodes, "body", before, [info("go_on", TensorProto.BOOL, []), *results])
        around = helper.make_node("Loop", ["count", "true", *states], [*last, "y"], name="again", body=body)
    graph = helper.make_graph(
        [around],
        "g",
        [info("x", TensorProto.FLOAT, [None, None, D])],
        [info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("operator", GATES)
@pytest.mark.parametrize("kind", ["Scan", "Loop"])
@pytest.mark.parametrize("first", ["zeros", "constant", "each its own", "changed"])
def test_first_states_that_a_body_carries(first: str, kind: str, operator: str, tmp_path: Path, rng: np.random.Generator) -> None:
    model = stepping(kind, operator, rng, first)
    if first in ("each its own", "changed"):
        why = "differs within the batch" if first == "each its own" else f"the {kind} around carries from run to run, and changes"
        with pytest.raises(pn.CheckpointError, match=rf"cell.*first state of its own \(initial_h is not zero\), which {why}"):
            imported(model, tmp_path)
        return
    layer, x = imported(model, tmp_path), rng.standard_normal((6, 3, D)).astype("float32")
    assert layer.learned_state == (first == "constant")
    assert f"initial_h is carried from run to run by the {kind} around" in layer.provenance
    np.testing.assert_allclose(layer(x)[0], run_onnx(model, x), rtol=ONNX_OPERATOR, atol=ONNX_OPERATOR)


@pytest.mark.parametrize("changed", [False, True])
def test_weights_that_a_body_hands_on_as_they_are(changed: bool, tmp_path: Path, rng: np.random.Generator) -> None:
    model = stepping("Loop", "GRU", rng)
    (around,) = model.graph.node
    body = next(a.g for a in around.attribute if a.name == "body")
    around.input.append("W")
    around.output.insert(1, "W_last")
    body.input.append(helper.make_tensor_value_info("W_c", TensorProto.FLOAT, [1, 3 * H, D]))
    body.output.insert(2, helper.make_tensor_value_info("W_next", TensorProto.FLOAT, [1, 3 * H, D]))
    body.node.append(helper.make_node("Neg" if changed else "Identity", ["W_c"], ["W_next"]))
    next(n for n in body.node if n.op_type == "GRU").input[1] = "W_c"
    if changed:
        with pytest.raises(pn.CheckpointError, match=r"the input W is computed .*'W_c', an input of the body of Loop 'again'"):
            imported(model, tmp_path)
        return
    x = rng.standard_normal((6, 3, D)).astype("float32")
    np.testing.assert_allclose(imported(model, tmp_path)(x)[0], run_onnx(model, x), rtol=ONNX_OPERATOR, atol=ONNX_OPERATOR)


@pytest.mark.parametrize("momentum", [None, 0.75])
def test_momentum_of_batch_normalization(momentum: float | None, tmp_path: Path, rng: np.random.Generator) -> None:
    arrays = {n: rng.uniform(0.5, 1.5, 6).astype("float32") for n in ("scale", "bias", "mean", "var")}
    attributes = {} if momentum is None else {"momentum": momentum}
    layer = imported(onnx_model("BatchNormalization", arrays, ("x", *arrays), **attributes), tmp_path)
    assert layer.momentum == pytest.approx(0.1 if momentum is None else 0.25)
    with pytest.raises(pn.CheckpointError, match="training_mode=1"):
        imported(onnx_model("BatchNormalization", arrays, ("x", *arrays), training_mode=1), tmp_path)


STASHED = {"LayerNormalization": {}, "RMSNormalization": {}, "GroupNormalization": {"num_groups": 2}}


@pytest.mark.parametrize("operator", STASHED)
@pytest.mark.parametrize(
    ("stash", "kind", "named"),
    [
        (None, "float32", None),
        (1, "float32", None),
        (11, "float64", None),
        (11, "float32", r"stash_type=11 \(double\)"),
        (10, "float32", r"stash_type=10 \(float16\)"),
        (16, "float32", r"stash_type=16 \(bfloat16\)"),
        (99, "float32", r"stash_type=99 \(no type\)"),
    ],
)
def test_the_type_of_statistics(operator: str, stash: int | None, kind: str, named: str | None, tmp_path: Path, rng: Any) -> None:
    names = ("scale",) if operator == "RMSNormalization" else ("scale", "bias")
    arrays = {n: rng.uniform(0.5, 1.5, 6).astype(kind) for n in names}
    attributes = {**STASHED[operator], **({} if stash is None else {"stash_type": stash})}
    model = onnx_model(operator, arrays, ("x", *names), **attributes)
    if named is not None:
        with pytest.raises(pn.CheckpointError, match=f"a_node.*{named}.*expected 1.*ignore=\\('stash_type',\\)"):
            imported(model, tmp_path)
        imported(model, tmp_path, ignore=("stash_type",))
        return
    x = rng.standard_normal((4, 6, 6)).astype(kind)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.DOUBLE if kind == "float64" else TensorProto.FLOAT
    np.testing.assert_allclose(imported(model, tmp_path)(x), run_onnx(model, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operator", ["LayerNormalization", "RMSNormalization"])
@pytest.mark.parametrize(("axis", "known"), [(-1, True), (2, True), (-2, True), (1, True), (2, False), (1, "scale of one axis")])
def test_axis(operator: str, axis: int, known: Any, tmp_path: Path, rng: np.random.Generator) -> None:
    wide = axis % 3 == 1 and known is True
    names = ("scale", "bias") if operator == "LayerNormalization" else ("scale",)
    arrays = {n: rng.uniform(0.5, 1.5, (5, 6) if wide else 6).astype("float32") for n in names}
    model = onnx_model(operator, arrays, ("x", *names), axis=axis)
    if known is False:
        model.graph.input[0].type.tensor_type.ClearField("shape")
    if known is not True:
        with pytest.raises(pn.CheckpointError, match=r"a_node.*axis="):
            imported(model, tmp_path)
        return
    x = rng.standard_normal((4, 5, 6)).astype("float32")
    np.testing.assert_allclose(imported(model, tmp_path)(x), run_onnx(model, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operator", ["LayerNormalization", "RMSNormalization"])
@pytest.mark.parametrize(
    ("axis", "shape"), [(-1, (1,)), (-1, ()), (-2, (6,)), (1, (1, 6)), (-2, (5, 1)), (1, (1, 1)), (-1, (1, 6)), (-2, (4,))]
)
def test_parameters_that_are_the_same_along_axes(
    operator: str, axis: int, shape: tuple[int, ...], tmp_path: Path, rng: np.random.Generator
) -> None:
    arrays, fits = {"scale": rng.uniform(0.5, 1.5, shape).astype("float32")}, (axis, shape) not in ((-1, (1, 6)), (-2, (4,)))
    if operator == "LayerNormalization":
        arrays["bias"] = rng.uniform(0.5, 1.5, (5, 6)[axis % 3 - 1 :] if fits else shape).astype("float32")
    model = onnx_model(operator, arrays, ("x", *arrays), axis=axis)
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 5, 6]))
    if not fits:
        with pytest.raises(pn.CheckpointError, match=r"a_node.*axis=.*parameters of shape.*expected one gain for each value"):
            imported(model, tmp_path)
        return
    x = rng.standard_normal((4, 5, 6)).astype("float32")
    np.testing.assert_allclose(imported(model, tmp_path)(x), run_onnx(model, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("version", [9, 13, 15])
def test_batch_normalization_with_more_outputs_is_of_training(version: int, tmp_path: Path, rng: np.random.Generator) -> None:
    """Five outputs said so before there was an attribute for it."""
    arrays = {n: rng.uniform(0.5, 1.5, 6).astype("float32") for n in ("scale", "bias", "mean", "var")}
    x = rng.standard_normal((3, 6, 4)).astype("float32")
    model = onnx_model("BatchNormalization", arrays, ("x", *arrays))
    model.opset_import[0].version = version
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 6, None]))
    np.testing.assert_allclose(imported(model, tmp_path)(x), run_onnx(model, x), rtol=1e-5, atol=1e-5)
    if version < 14:
        model.graph.node[-1].output.extend(["mean_out", "var_out", "saved_mean", "saved_var"])
        with pytest.raises(pn.CheckpointError, match=r"more than one output.*batch's own statistics.*ignore=\('outputs',\)"):
            imported(model, tmp_path)


@pytest.mark.parametrize("known", [True, False])
def test_gains_of_groups(known: bool, tmp_path: Path, rng: np.random.Generator) -> None:
    """Before operator set 21 there is one gain for each group; how many channels it has says the input."""
    arrays = {n: rng.uniform(0.5, 1.5, 2).astype("float32") for n in ("scale", "bias")}
    model = onnx_model("GroupNormalization", arrays, ("x", "scale", "bias"), num_groups=2)
    model.opset_import[0].version = 18
    if not known:
        with pytest.raises(pn.CheckpointError, match=r"a_node.*one gain for each of 2 groups"):
            imported(model, tmp_path)
        return
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 6, None]))
    layer, x = imported(model, tmp_path), rng.standard_normal((3, 6, 4)).astype("float32")
    assert layer.num_features == 6
    np.testing.assert_array_equal(layer.params["weight"], np.repeat(arrays["scale"], 3))
    np.testing.assert_allclose(layer(x), run_onnx(model, x), rtol=1e-5, atol=1e-5)


# -- weights behind nodes ----------------------------------------------------------------------------------------------------------------


def with_folded(operator: str, rng: np.random.Generator) -> tuple[Any, dict[str, Any]]:
    """A model whose W, R and B are made of constants by many nodes, and what they are."""
    arrays, count = weights(operator, rng), GATES[operator] * H
    initial = {
        "w_in": arrays["W"][0].T.astype("float64"),  # Cast, Transpose, Unsqueeze
        "r_top": arrays["R"][0, : count // 2],  # Concat, Unsqueeze
        "r_all": np.concatenate([np.zeros((2, H), "float32"), arrays["R"][0, count // 2 :]]),  # Slice
        "b_flat": arrays["B"].reshape(-1, 2),  # Reshape
        "axes": np.array([0]),
        "two": np.array([2]),
        "end": np.array([2**31 - 1]),
        "shape": np.array([1, -1]),
    }
    nodes = [
        helper.make_node("Transpose", ["w_in"], ["w1"], perm=[1, 0]),
        helper.make_node("Cast", ["w1"], ["w2"], to=1),
        helper.make_node("Unsqueeze", ["w2", "axes"], ["w3"]),
        helper.make_node("Identity", ["w3"], ["W"]),
        helper.make_node("Slice", ["r_all", "two", "end", "axes"], ["r1"]),
        helper.make_node("Concat", ["r_top", "r1"], ["r2"], axis=0),
        helper.make_node("Unsqueeze", ["r2", "axes"], ["R"]),
        helper.make_node("Reshape", ["b_flat", "shape"], ["B"]),
    ]
    model = onnx_model(operator, initial, ("x",), hidden_size=H)
    model.graph.node[0].input[:] = ["x", "W", "R", "B"]
    for node in reversed(nodes):
        model.graph.node.insert(0, node)
    return model, arrays


@pytest.mark.parametrize("operator", GATES)
def test_weights_behind_nodes_of_constants(operator: str, tmp_path: Path, rng: np.random.Generator) -> None:
    model, _ = with_folded(operator, rng)
    x = rng.standard_normal((6, 3, D)).astype("float32")
    np.testing.assert_allclose(imported(model, tmp_path)(x)[0], run_onnx(model, x)[:, 0], rtol=ONNX_OPERATOR, atol=ONNX_OPERATOR)


def test_weights_that_the_graph_computes_are_named(tmp_path: Path, rng: np.random.Generator) -> None:
    arrays = weights("GRU", rng)
    model = onnx_model("GRU", {**arrays, "w": arrays["W"]}, ("x", "W", "R", "B"), hidden_size=H)
    model.graph.node[0].input[1] = "computed"
    model.graph.node.insert(0, helper.make_node("Mul", ["w", "scale"], ["computed"]))
    model.graph.input.append(helper.make_tensor_value_info("scale", TensorProto.FLOAT, []))
    with pytest.raises(pn.CheckpointError, match="node 'a_node': the input W is computed in the graph; expected a constant"):
        imported(model, tmp_path)


def behind(operator: str, rng: np.random.Generator) -> tuple[list[Any], dict[str, np.ndarray]]:
    """Nodes that make `made` of constants, and the constants."""
    w, other = (rng.standard_normal((1, 4 * H, D)).astype("float32") * np.float32(0.5) for _ in range(2))
    numbers: dict[str, Any] = {
        "Pow": {"w": w, "two": np.float32(2)},
        "MatMul": {"w": rng.standard_normal((1, 4 * H, 2)).astype("float32"), "right": rng.standard_normal((2, D)).astype("float32")},
        "CastLike": {"w": w.astype("float16"), "right": np.float32(0)},
        "Sum": {"w": w, "w2": other, "w3": w},
        "Max": {"w": w, "w2": other},
        "Where": {"which": other > 0, "w": w, "w2": other},
        "Pad": {"w": w[:, :, :-1], "by": np.array([0, 0, 0, 0, 0, 1])},
        "Clip": {"w": w, "low": np.float32(-0.3), "high": np.float32(0.3)},
        "ReduceSum": {"w": np.stack([w, other]), "axes": np.array([0])},
        "Tanh": {"w": w},
    }
    initial = numbers[operator]
    return [helper.make_node(operator, list(initial), ["made"], **({"keepdims": 0} if operator == "ReduceSum" else {}))], initial


@pytest.mark.parametrize("operator", ["Pow", "MatMul", "CastLike", "Sum", "Max", "Where", "Pad", "Clip", "ReduceSum", "Tanh"])
def test_weights_are_read_whatever_makes_them_of_constants(operator: str, tmp_path: Path, rng: np.random.Generator) -> None:
    nodes, initial = behind(operator, rng)
    arrays = {k: v for k, v in weights("LSTM", rng).items() if k != "W"}
    model = onnx_model("LSTM", {**arrays, **initial}, ("x", "W", "R", "B"), hidden_size=H)
    model.graph.node[0].input[1] = "made"
    for node in reversed(nodes):
        model.graph.node.insert(0, node)
    x = rng.standard_normal((6, 3, D)).astype("float32")
    np.testing.assert_allclose(imported(model, tmp_path)(x)[0], run_onnx(model, x)[:, 0], rtol=ONNX_OPERATOR, atol=ONNX_OPERATOR)


@pytest.mark.parametrize("places", ["flat", "by axis"])
@pytest.mark.parametrize("where", ["sparse_initializer", "Constant"])
def test_sparse_weights(where: str, places: str, tmp_path: Path, rng: np.random.Generator) -> None:
    arrays = weights("GRU", rng)
    w = np.where(rng.random(arrays["W"].shape) < 0.4, arrays["W"], np.float32(0))
    at = np.flatnonzero(w) if places == "flat" else np.argwhere(w)
    values, indices = numpy_helper.from_array(w[w != 0], "W"), numpy_helper.from_array(at, "W_at")
    sparse = helper.make_sparse_tensor(values, indices, list(w.shape))
    model = onnx_model("GRU", {k: v for k, v in arrays.items() if k != "W"}, ("x", "W", "R", "B"), hidden_size=H)
    model.graph.node[0].input[1] = "W"
    if where == "Constant":
        model.graph.node.insert(0, helper.make_node("Constant", [], ["W"], sparse_value=sparse))
    else:
        model.graph.sparse_initializer.append(sparse)
    dense = onnx_model("GRU", {**arrays, "W": w}, ("x", "W", "R", "B"), hidden_size=H)
    x = rng.standard_normal((6, 3, D)).astype("float32")
    np.testing.assert_allclose(imported(model, tmp_path)(x)[0], run_onnx(dense, x)[:, 0], rtol=ONNX_OPERATOR, atol=ONNX_OPERATOR)
    huge = model.graph.node[0].attribute[0].sparse_tensor if where == "Constant" else model.graph.sparse_initializer[0]
    huge.dims[:] = [2**20, 2**20, 2**20]
    with pytest.raises(pn.CheckpointError, match=r"the sparse 'W' has the shape .* more than is made dense here"):
        imported(model, tmp_path)


@pytest.mark.parametrize(
    ("node", "named"),
    [
        (helper.make_node("RandomNormal", [], ["w"], name="noise", shape=[1, 3 * H, D]), r"'noise' \(RandomNormal\), which is another one"),
        (helper.make_node("Einsum", ["W"], ["w"], name="sums", equation="...->..."), r"'sums' \(Einsum\), which is not computed here"),
        (helper.make_node("Mine", ["W"], ["w"], name="own", domain="mine"), r"'own' \(Mine\), which is of the domain 'mine'"),
        (helper.make_node("Identity", ["x"], ["w"]), "'x', an input of the graph"),
    ],
)
def test_what_makes_a_weight_is_named(node: Any, named: str, tmp_path: Path, rng: np.random.Generator) -> None:
    model = onnx_model("GRU", weights("GRU", rng), ("x", "W", "R", "B"), hidden_size=H)
    model.graph.node[0].input[1] = "w_again"
    model.graph.node.insert(0, helper.make_node("Neg", ["w"], ["w_again"]))
    model.graph.node.insert(0, node)
    model.opset_import.append(helper.make_opsetid("mine", 1))
    with pytest.raises(
        pn.CheckpointError, match=f"the input W is computed in the graph.*it comes from .*{named}.*give the arrays as a mapping"
    ):
        imported(model, tmp_path)


def test_constants_that_grow_are_not_followed(tmp_path: Path, rng: np.random.Generator) -> None:
    """Each node doubles what it reads; the file is small."""
    model = onnx_model("RNN", weights("RNN", rng), ("x", "W", "R", "B"), hidden_size=H)
    nodes = [helper.make_node("Concat", [name, name], [f"w{k}"], axis=1) for k, name in enumerate(["W", *(f"w{k}" for k in range(60))])]
    for node in reversed(nodes):
        model.graph.node.insert(0, node)
    model.graph.node[-1].input[1] = "w60"
    with pytest.raises(pn.CheckpointError, match="grow beyond what the file holds"):
        imported(model, tmp_path)


@pytest.mark.parametrize("operator", ["ConstantOfShape", "Expand", "Tile"])
@pytest.mark.parametrize("size", [1, 2**40])
def test_biases_that_a_node_fills(operator: str, size: int, tmp_path: Path, rng: np.random.Generator) -> None:
    shape = np.array([1, 2 * H * size])
    arrays = {**weights("RNN", rng), "shape": shape, "one": np.full((1, 1), 0.25, "float32")}
    value = numpy_helper.from_array(np.array([0.25], "float32"))
    made = helper.make_node(operator, ["one", "shape"], ["filled"])
    if operator == "ConstantOfShape":
        made = helper.make_node(operator, ["shape"], ["filled"], value=value)
    model = onnx_model("RNN", arrays, ("x", "W", "R", "B"), hidden_size=H)
    model.graph.node[0].input[3] = "filled"
    model.graph.node.insert(0, made)
    if size > 1:
        with pytest.raises(pn.CheckpointError, match="grow beyond what the file holds"):
            imported(model, tmp_path)
        return
    x = rng.standard_normal((6, 3, D)).astype("float32")
    np.testing.assert_allclose(imported(model, tmp_path)(x)[0], run_onnx(model, x)[:, 0], rtol=ONNX_OPERATOR, atol=ONNX_OPERATOR)


@pytest.mark.parametrize("version", [10, 13, 17, 23])
@pytest.mark.parametrize("operator", GATES)
def test_weights_behind_dequantization(operator: str, version: int, tmp_path: Path, rng: np.random.Generator) -> None:
    arrays, scale = weights(operator, rng), np.float32(0.02)
    whole = {n: np.clip(np.round(a / scale), -128, 127).astype("int8") for n, a in arrays.items() if n != "B"}
    initial = {f"{n}_q": a for n, a in whole.items()} | {"B": arrays["B"], "scale": scale, "zero": np.int8(3)}
    model = onnx_model(operator, {n: np.asarray(a) for n, a in initial.items()}, ("x",), hidden_size=H)
    model.graph.node[0].input[:] = ["x", "W", "R", "B"]
    for n in whole:
        model.graph.node.insert(0, helper.make_node("DequantizeLinear", [f"{n}_q", "scale", "zero"], [n]))
    model.opset_import[0].version = version
    layer, x = imported(model, tmp_path), rng.standard_normal((6, 3, D)).astype("float32")
    assert "W is dequantized" in layer.provenance
    assert "R is dequantized" in layer.provenance
    np.testing.assert_allclose(layer(x)[0], run_onnx(model, x)[:, 0], rtol=ONNX_OPERATOR, atol=ONNX_OPERATOR)


@pytest.mark.parametrize("kind", ["int8", "uint8", "int16"])
@pytest.mark.parametrize("version", [11, 17, 22])
def test_weights_behind_dequantization_of_onnxruntime(version: int, kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """In its own domain, by which its tools write types that ONNX did not have yet; a scale for each row of W."""
    arrays, scale = weights("LSTM", rng), rng.uniform(0.01, 0.03, 4 * H).astype("float32")
    whole = np.round(arrays["W"] / scale[None, :, None]).clip(0 if kind == "uint8" else -128, 127).astype(kind)
    initial = {"W_q": whole, "R": arrays["R"], "B": arrays["B"], "scale": scale, "zero": np.full(4 * H, 3, kind)}
    model = onnx_model("LSTM", initial, ("x",), hidden_size=H)
    model.graph.node[0].input[:] = ["x", "W", "R", "B"]
    made = helper.make_node("DequantizeLinear", ["W_q", "scale", "zero"], ["W"], domain="com.microsoft", axis=1)
    model.graph.node.insert(0, made)
    model.opset_import[0].version = version
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    layer, x = imported(model, tmp_path), rng.standard_normal((6, 3, D)).astype("float32")
    assert "W is dequantized" in layer.provenance
    np.testing.assert_allclose(layer(x)[0], run_onnx(model, x)[:, 0], rtol=ONNX_OPERATOR, atol=ONNX_OPERATOR)


@pytest.mark.parametrize("by_gate", [False, True])
@pytest.mark.parametrize("directions", [1, 2])
def test_dynamically_quantized_lstm(by_gate: bool, directions: int, tmp_path: Path, rng: np.random.Generator) -> None:
    """What the operator computes with weights of 8 bits and inputs that it rounds: close to the layer with the weights alone rounded."""
    arrays, initial = weights("LSTM", rng, directions), {}
    exact: dict[str, Any] = {"B": arrays["B"]}
    for n in ("W", "R"):
        largest = np.abs(arrays[n]).max(axis=2) if by_gate else np.abs(arrays[n]).max(axis=(1, 2))
        scale = (largest / 127).astype("float32")
        wide = scale[:, :, None] if by_gate else scale[:, None, None]
        q = np.round(arrays[n] / wide).astype("int8")
        initial |= {n: q.transpose(0, 2, 1).copy(), f"{n}_scale": scale, f"{n}_zero": np.zeros_like(scale, dtype="int8")}
        exact[n] = (q * wide).astype("float32")
    direction = "bidirectional" if directions == 2 else "forward"
    model = onnx_model("LSTM", {**initial, "B": arrays["B"]}, ("x",), hidden_size=H, direction=direction)
    (node,) = model.graph.node
    node.op_type, node.domain = "DynamicQuantizeLSTM", "com.microsoft"
    node.input[:] = ["x", "W", "R", "B", "", "", "", "", "W_scale", "W_zero", "R_scale", "R_zero"]
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    layer, x = imported(model, tmp_path), rng.standard_normal((6, 3, D)).astype("float32")
    assert "W is dequantized; the operator also rounds" in layer.provenance
    y = layer(x)[0].reshape(6, 3, directions, H).transpose(0, 2, 1, 3)
    plain = onnx_model("LSTM", exact, ("x", "W", "R", "B"), hidden_size=H, direction=direction)
    np.testing.assert_allclose(y, run_onnx(plain, x), rtol=ONNX_OPERATOR, atol=ONNX_OPERATOR)
    np.testing.assert_allclose(y, run_onnx(model, x), atol=0.1)


# -- bodies and functions ----------------------------------------------------------------------------------------------------------------


def inside(kind: str, operator: str, rng: np.random.Generator) -> tuple[Any, dict[str, Any]]:
    """A model with the operator in a body, whose weights are outside."""
    arrays = weights(operator, rng)
    node = helper.make_node(operator, ["x", "W", "R", "B"], ["y"], name="cell", hidden_size=H)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None, D])
    initial = [numpy_helper.from_array(a, n) for n, a in arrays.items() if n != "B"]
    outer = [helper.make_node("Constant", [], ["B"], value=numpy_helper.from_array(arrays["B"]))]
    if kind == "If":
        other = helper.make_graph([helper.make_node("Identity", ["x"], ["z"])], "else", [], [helper.make_tensor_value_info("z", 1, None)])
        outer += [
            helper.make_node(
                "If", ["yes"], ["y_out"], name="choice", then_branch=helper.make_graph([node], "then", [], [y]), else_branch=other
            )
        ]
        initial.append(numpy_helper.from_array(np.array(True), "yes"))
        way = "choice/then_branch/"
    elif kind == "Loop":
        ins = [helper.make_tensor_value_info("k", 7, []), helper.make_tensor_value_info("go", 9, [])]
        body = [node, helper.make_node("Identity", ["go"], ["go_out"])]
        graph = helper.make_graph(body, "body", ins, [helper.make_tensor_value_info("go_out", 9, []), y])
        outer += [helper.make_node("Loop", ["once", ""], ["y_out"], name="again", body=graph)]
        initial.append(numpy_helper.from_array(np.array(1), "once"))
        way = "again/body/"
    elif kind == "Scan":
        ins = [helper.make_tensor_value_info("one", 1, [None, None, D])]
        node.input[0] = "one"
        graph = helper.make_graph([node], "body", ins, [y])
        outer += [
            helper.make_node("Unsqueeze", ["x", "zero"], ["xs"]),
            helper.make_node("Scan", ["xs"], ["y_out"], name="along", body=graph, num_scan_inputs=1),
        ]
        initial.append(numpy_helper.from_array(np.array([0]), "zero"))
        way = "along/body/"
    else:
        outer += [helper.make_node("Mine", ["x", "W", "R", "B"], ["y_out"], domain="own", name="call")]
        way = ""
    model = helper.make_model(
        helper.make_graph(outer, "g", [x], [helper.make_tensor_value_info("y_out", TensorProto.FLOAT, None)], initial),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("own", 1)],
        ir_version=10,
    )
    if kind == "function":
        model.functions.append(helper.make_function("own", "Mine", ["x", "W", "R", "B"], ["y"], [node], [helper.make_opsetid("", 20)]))
    return model, {"way": way}


@pytest.mark.parametrize("operator", GATES)
@pytest.mark.parametrize("kind", ["If", "Loop", "Scan", "function"])
def test_nodes_in_bodies_with_weights_outside(kind: str, operator: str, tmp_path: Path, rng: np.random.Generator) -> None:
    model, where = inside(kind, operator, rng)
    layer, x = imported(model, tmp_path, prefix=where["way"]), rng.standard_normal((6, 3, D)).astype("float32")
    np.testing.assert_allclose(layer(x)[0], run_onnx(model, x).reshape(6, 3, H), rtol=ONNX_OPERATOR, atol=ONNX_OPERATOR)


def test_a_name_in_a_body_hides_the_one_outside(tmp_path: Path, rng: np.random.Generator) -> None:
    model, _ = inside("If", "GRU", rng)
    body = next(a.g for a in model.graph.node[-1].attribute if a.name == "then_branch")
    own = rng.standard_normal((1, 3 * H, D)).astype("float32")
    body.initializer.append(numpy_helper.from_array(own, "W"))
    np.testing.assert_array_equal(np.sort(imported(model, tmp_path).params["weight_ih_l0"], axis=None), np.sort(own, axis=None))


def test_nodes_of_one_name_stay_two(tmp_path: Path, rng: np.random.Generator) -> None:
    model = onnx_model("GRU", weights("GRU", rng), ("x", "W", "R", "B"), hidden_size=H)
    again = model.graph.node.add()
    again.CopyFrom(model.graph.node[0])
    again.output[:] = ["y2"]
    with pytest.raises(pn.CheckpointError, match=r"more than one layer.*prefix='a_node/' \(onnx GRU\).*prefix='a_node_/' \(onnx GRU\)"):
        imported(model, tmp_path)


def test_what_is_not_asked_for_does_not_stop_what_is(tmp_path: Path, rng: np.random.Generator) -> None:
    model = onnx_model("GRU", weights("GRU", rng), ("x", "W", "R", "B"), hidden_size=H)
    bad = model.graph.node.add()
    bad.CopyFrom(helper.make_node("LSTM", ["x", "x", "x"], ["z"], name="bad", clip=1.0, hidden_size=H))
    assert isinstance(imported(model, tmp_path, prefix="a_node/"), pn.GRU)
    with pytest.raises(pn.CheckpointError, match="node 'bad': the input W is computed"):
        pn.import_checkpoint(tmp_path / "m.onnx", prefix="bad/")


def test_external_weights_are_read_one_by_one(tmp_path: Path, rng: np.random.Generator) -> None:
    model = onnx_model("LSTM", weights("LSTM", rng), ("x", "W", "R", "B"), hidden_size=H)
    x = rng.standard_normal((6, 3, D)).astype("float32")
    expected = run_onnx(model, x)[:, 0]
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
    np.testing.assert_allclose(pn.import_checkpoint(tmp_path / "m.onnx")(x)[0], expected, rtol=ONNX_OPERATOR, atol=ONNX_OPERATOR)
    (tmp_path / "m.bin").unlink()
    with pytest.raises(pn.CheckpointError, match="the values of 'W' cannot be read"):
        pn.import_checkpoint(tmp_path / "m.onnx")


def test_external_weights_outside_the_folder_are_not_read(tmp_path: Path, rng: np.random.Generator) -> None:
    model = onnx_model("LSTM", weights("LSTM", rng), ("x", "W", "R", "B"), hidden_size=H)
    (tmp_path / "in").mkdir()
    onnx.save(model, tmp_path / "in" / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
    (tmp_path / "in" / "m.bin").rename(tmp_path / "m.bin")
    found = onnx.load(tmp_path / "in" / "m.onnx", load_external_data=False)
    for tensor in found.graph.initializer:
        next(e for e in tensor.external_data if e.key == "location").value = "../m.bin"
    (tmp_path / "in" / "m.onnx").write_bytes(found.SerializeToString())
    with pytest.raises(pn.CheckpointError, match="cannot be read"):
        pn.import_checkpoint(tmp_path / "in" / "m.onnx")


@pytest.mark.parametrize("kind", ["folded", "inside", "groups", "stepping", "around"])
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # of a constant whose bytes were damaged
def test_damaged_bytes_give_a_layer_or_one_family_of_errors(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    if kind == "folded":
        model = with_folded("LSTM", rng)[0]
    elif kind == "inside":
        model = inside("If", "GRU", rng)[0]
    elif kind == "stepping":
        model = stepping("Scan", "GRU", rng, "constant", scan_input_axes=[1], scan_output_axes=[1])
    elif kind == "around":
        model = around(rng, TURNED["Split and Concat"][1], LEAVES, NUMBERS)
    else:
        arrays = {n: np.ones(6, "float32") for n in ("scale", "bias")}
        model = onnx_model("GroupNormalization", arrays, ("x", "scale", "bias"), num_groups=2)
    whole = model.SerializeToString()
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[rng.integers(len(damaged))] = rng.integers(256)
        (tmp_path / "m.onnx").write_bytes(bytes(damaged))
        with contextlib.suppress(pn.PortnormError):
            assert isinstance(pn.import_checkpoint(tmp_path / "m.onnx"), pn.Layer)


# -- what lies around a node ---------------------------------------------------------------------------------------------------------------

STEPS = 6
Nodes = list[tuple[str, list[str], list[str], dict[str, Any]]]
DOWN = np.arange(STEPS)[::-1].copy()


def around(
    rng: np.random.Generator,
    before: Nodes,
    after: Nodes = (),  # type: ignore[assignment]
    numbers: dict[str, Any] | None = None,
    *,
    operator: str = "LSTM",
    **attributes: Any,
) -> Any:
    """A model that makes `xr` of `x`, `y` of it by the operator, and `out` of `y`; `out` is `y` where there is nothing after."""
    count = 2 if attributes.get("direction") == "bidirectional" else 1
    model = onnx_model(operator, {**weights(operator, rng, count), **(numbers or {})}, ("x", "W", "R", "B"), hidden_size=H, **attributes)
    (node,) = model.graph.node
    node.input[0] = "xr" if before else "x"
    made = [helper.make_node(kind, i, o, **more) for kind, i, o, more in (*before, *after)]
    del model.graph.node[:]
    model.graph.node.extend([*made[: len(before)], node, *made[len(before) :]])
    if after:
        model.graph.output[0].name = "out"
    return model


SLICE: Nodes = [("Slice", ["x", "minus", "far", "zero", "minus"], ["xr"], {})]
SWAP = {"perm": [1, 0, 2]}
AT = {"minus": np.array([-1]), "far": np.array([-100]), "zero": np.array([0]), "down": DOWN, "one": np.array([1])}
TURNED: dict[str, tuple[str, Nodes]] = {
    "Slice": ("Slice", SLICE),
    "Slice before a Transpose and back": (
        "Slice",
        [
            ("Transpose", ["x"], ["x1"], {"perm": [1, 2, 0]}),
            ("Slice", ["x1", "minus", "far", "minus", "minus"], ["x2"], {}),
            ("Transpose", ["x2"], ["xr"], {"perm": [2, 0, 1]}),
        ],
    ),
    "Slice behind what computes each step": (
        "Slice",
        [("Slice", SLICE[0][1], ["x1"], {}), ("Relu", ["x1"], ["x2"], {}), ("Mul", ["x2", "half"], ["xr"], {})],
    ),
    "Gather": ("Gather", [("Gather", ["x", "down"], ["xr"], {"axis": 0})]),
    "Gather by places that count down": (
        "Gather",
        [("Range", ["last", "minus_0", "minus_0"], ["places"], {}), ("Gather", ["x", "places"], ["xr"], {"axis": 0})],
    ),
    "GatherND": ("GatherND", [("Unsqueeze", ["down", "one"], ["places"], {}), ("GatherND", ["x", "places"], ["xr"], {})]),
    "GatherElements": (
        "GatherElements",
        [
            ("Shape", ["x"], ["shape"], {}),
            ("Unsqueeze", ["down", "axes"], ["places"], {}),
            ("Expand", ["places", "shape"], ["wide"], {}),
            ("GatherElements", ["x", "wide"], ["xr"], {"axis": 0}),
        ],
    ),
    "ReverseSequence": ("ReverseSequence", [("ReverseSequence", ["x", "lengths"], ["xr"], {"time_axis": 0, "batch_axis": 1})]),
    "Split and Concat": (
        "Concat",
        [
            ("Split", ["x"], [f"p{k}" for k in range(STEPS)], {"axis": 0, "num_outputs": STEPS}),
            ("Concat", [f"p{k}" for k in DOWN], ["xr"], {"axis": 0}),
        ],
    ),
    "steps one by one": (
        "Concat",
        [
            *(("Gather", ["x", f"n{k}"], [f"g{k}"], {"axis": 0}) for k in range(STEPS)),
            *(("Unsqueeze", [f"g{k}", "zero"], [f"u{k}"], {}) for k in range(STEPS)),
            ("Concat", [f"u{k}" for k in DOWN], ["xr"], {"axis": 0}),
        ],
    ),
}
NUMBERS = {
    **AT,
    "half": np.float32(1),
    "last": np.array(STEPS - 1),
    "minus_0": np.array(-1),
    "axes": np.array([1, 2]),
    "lengths": np.full(3, STEPS),
    **{f"n{k}": np.array(k) for k in range(STEPS)},
}


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("operator", GATES)
@pytest.mark.parametrize("kind", TURNED)
def test_steps_that_the_graph_around_turns_are_named(
    kind: str, operator: str, back: bool, tmp_path: Path, rng: np.random.Generator
) -> None:
    by, before = TURNED[kind]
    after: Nodes = [("Slice", ["y", "minus", "far", "zero", "minus"], ["out"], {})] if back else []
    model = around(rng, before, after, NUMBERS, operator=operator)
    direction: Any = "reverse" if back else "backwards"
    named = rf"a_node.*goes from the last step to the first, or in another order, by {by} of the graph around.*direction={direction!r} here"
    with pytest.raises(pn.CheckpointError, match=named):
        imported(model, tmp_path)
    x = np.abs(rng.standard_normal((STEPS, 3, D)).astype("float32"))
    layer = pn.import_checkpoint(tmp_path / "m.onnx", direction=direction)
    np.testing.assert_allclose(layer(x)[0], run_onnx(model, x)[:, 0], rtol=ONNX_OPERATOR, atol=ONNX_OPERATOR)


@pytest.mark.parametrize("back", [False, True])
def test_steps_that_are_turned_with_the_batch_first(back: bool, tmp_path: Path, rng: np.random.Generator) -> None:
    turn = ("Slice", ["x", "minus", "far", "one", "minus"], ["x1"], {})
    before: Nodes = [turn, ("Transpose", ["x1"], ["xr"], SWAP)]
    after: Nodes = [("Squeeze", ["y", "one"], ["y1"], {}), ("Transpose", ["y1"], ["out"], SWAP)]
    if back:
        after = [("Squeeze", ["y", "one"], ["y1"], {}), ("Transpose", ["y1"], ["y2"], SWAP), ("Slice", ["y2", *turn[1][1:]], ["out"], {})]
    model = around(rng, before, after, NUMBERS)
    direction: Any = "reverse" if back else "backwards"
    with pytest.raises(pn.CheckpointError, match=f"by Slice of the graph around.*direction={direction!r} here"):
        imported(model, tmp_path)
    x = rng.standard_normal((3, STEPS, D)).astype("float32")
    layer = pn.import_checkpoint(tmp_path / "m.onnx", direction=direction)
    assert layer.batch_first
    np.testing.assert_allclose(layer(x)[0], run_onnx(model, x), rtol=ONNX_OPERATOR, atol=ONNX_OPERATOR)


@pytest.mark.peers
@pytest.mark.parametrize("batch_first", [False, True])
def test_packed_sequences_of_torch(batch_first: bool, tmp_path: Path) -> None:
    """Its exporter sorts the batch by lengths before the node, and back behind it."""
    torch = pytest.importorskip("torch")

    class Packed(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.rnn = torch.nn.LSTM(D, H, batch_first=batch_first)

        def forward(self, x: Any, lengths: Any) -> Any:
            packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=False)
            return torch.nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=batch_first)[0]

    model, lengths, x = Packed().eval(), torch.tensor([2, 6, 3]), torch.randn(3, 6, D)
    x = x if batch_first else x.transpose(0, 1).contiguous()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = {"input_names": ["x", "lengths"], "dynamic_axes": {"x": {0: "a", 1: "b"}, "lengths": {0: "batch"}}}
        torch.onnx.export(model, (x, lengths), tmp_path / "m.onnx", dynamo=False, verbose=False, **names)
    layer = pn.import_checkpoint(tmp_path / "m.onnx")
    assert layer.batch_first == batch_first
    assert "sequence_lens is `lengths` of a call" in layer.provenance
    y = layer(x.numpy(), lengths=lengths.numpy())[0]
    np.testing.assert_allclose(y, model(x, lengths).detach().numpy(), rtol=ONNX_OPERATOR, atol=ONNX_OPERATOR)


@pytest.mark.parametrize("where", ["input", "output"])
def test_steps_that_are_turned_twice_give_no_advice(where: str, tmp_path: Path, rng: np.random.Generator) -> None:
    turn = ["minus", "far", "zero", "minus"]
    before: Nodes = [("Slice", ["x", *turn], ["xr"], {})]
    if where == "input":
        before = [("Slice", ["x", *turn], ["x1"], {}), ("Gather", ["x1", "down"], ["xr"], {"axis": 0})]
    after: Nodes = [("Slice", ["y", *turn], ["y1"], {}), ("Gather", ["y1", "down"], ["out"], {"axis": 0})] if where == "output" else []
    with pytest.raises(pn.CheckpointError, match=r"or in another order, by (Gather and Slice|Slice) of the graph around") as caught:
        imported(around(rng, before, after, NUMBERS), tmp_path)
    assert "direction='" not in str(caught.value)


@pytest.mark.parametrize(
    "before",
    [
        [("Split", ["x"], ["a", "b"], {"axis": 0, "num_outputs": 2}), ("Concat", ["a", "b"], ["xr"], {"axis": 0})],
        [("Slice", ["x", "minus", "far", "one", "minus"], ["xr"], {})],  # of the batch
        [("Gather", ["x", "places"], ["xr"], {"axis": 2})],
        [("Gather", ["x", "up"], ["xr"], {"axis": 0})],
        [("Range", ["n0", "last", "n1"], ["some"], {}), ("Gather", ["x", "some"], ["xr"], {"axis": 0})],
        [("Split", ["x"], ["a", "b"], {"axis": 2, "num_outputs": 2}), ("Concat", ["b", "a"], ["xr"], {"axis": 2})],
        [("Transpose", ["x"], ["a"], {"perm": [2, 1, 0]}), ("Transpose", ["a"], ["xr"], {"perm": [2, 1, 0]})],
    ],
)
def test_steps_that_stay_in_their_order_are_taken(before: Nodes, tmp_path: Path, rng: np.random.Generator) -> None:
    numbers = {**NUMBERS, "places": np.arange(D)[::-1].copy(), "up": np.array([0, 2, 2, 5])}
    layer = imported(around(rng, before, (), numbers), tmp_path)  # type: ignore[arg-type]
    assert isinstance(layer, pn.LSTM)
    assert layer.direction == "forward"
    assert not layer.batch_first


def test_steps_that_a_table_is_asked_for_in_another_order_are_named(tmp_path: Path, rng: np.random.Generator) -> None:
    before: Nodes = [
        ("Slice", ["x", "minus", "far", "zero", "minus"], ["ids"], {}),
        ("Gather", ["table", "ids"], ["xr"], {"axis": 0}),
    ]
    numbers = {**NUMBERS, "table": rng.standard_normal((9, D)).astype("float32")}
    with pytest.raises(pn.CheckpointError, match="or in another order, by Slice of the graph around"):
        imported(around(rng, before, (), numbers), tmp_path)
    assert isinstance(imported(around(rng, [("Gather", ["table", "x"], ["xr"], {})], (), numbers), tmp_path), pn.LSTM)


@pytest.mark.parametrize("operator", GATES)
@pytest.mark.parametrize(("into", "out"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_directions_of_a_scan(into: int, out: int, operator: str, tmp_path: Path, rng: np.random.Generator) -> None:
    model = stepping("Scan", operator, rng, scan_input_directions=[into], scan_output_directions=[out])
    x = rng.standard_normal((6, 3, D)).astype("float32")
    expected, direction = run_onnx(model, x), {(0, 0): "forward", (1, 1): "reverse", (1, 0): "backwards"}.get((into, out))
    if into:
        with pytest.raises(pn.CheckpointError, match=rf"Scan \(scan_input_directions\) of the graph around.*direction={direction!r}"):
            imported(model, tmp_path)
        y = pn.import_checkpoint(tmp_path / "m.onnx", direction=direction)(x)[0]
    else:
        layer = imported(model, tmp_path)
        assert ("Scan (scan_output_directions) of the graph around puts the steps of the output" in layer.provenance) == bool(out)
        y = layer(x)[0][:: -1 if out else 1]
    np.testing.assert_allclose(y, expected, rtol=ONNX_OPERATOR, atol=ONNX_OPERATOR)


def test_a_loop_that_counts_down(tmp_path: Path, rng: np.random.Generator) -> None:
    model = stepping("Loop", "LSTM", rng)
    body = next(a.g for a in model.graph.node[0].attribute if a.name == "body")
    model.graph.initializer.append(numpy_helper.from_array(np.array(5), "five"))
    next(n for n in body.node if n.op_type == "Gather").input[1] = "place"
    body.node.insert(0, helper.make_node("Sub", ["five", "k"], ["place"]))
    with pytest.raises(pn.CheckpointError, match="or in another order, by Gather of the graph around"):
        imported(model, tmp_path)
    x = rng.standard_normal((6, 3, D)).astype("float32")
    y = pn.import_checkpoint(tmp_path / "m.onnx", direction="backwards")(x)[0]
    np.testing.assert_allclose(y, run_onnx(model, x), rtol=ONNX_OPERATOR, atol=ONNX_OPERATOR)


ENTERS: Nodes = [("Transpose", ["x"], ["xr"], SWAP)]
LEAVES: Nodes = [("Squeeze", ["y", "one"], ["y1"], {}), ("Transpose", ["y1"], ["out"], SWAP)]
ORDERS: dict[str, tuple[Nodes, Nodes, dict[str, Any], bool, str]] = {
    "both, as torch writes it": (ENTERS, LEAVES, {}, True, r"the graph around has its axes in the order \(batch, time, …\) \(Transpose\)"),
    "both, of two directions": (
        ENTERS,
        [
            ("Transpose", ["y"], ["y1"], {"perm": [0, 2, 1, 3]}),
            ("Reshape", ["y1", "flat"], ["y2"], {}),
            ("Transpose", ["y2"], ["out"], SWAP),
        ],
        {"direction": "bidirectional"},
        True,
        r"\(batch, time, …\) \(Transpose\)",
    ),
    "both, by shapes of the call": (
        ENTERS,
        [
            ("Transpose", ["y"], ["y1"], {"perm": [0, 2, 1, 3]}),
            ("Shape", ["xr"], ["shape"], {"end": 2}),
            ("Concat", ["shape", "minus"], ["wide"], {"axis": 0}),
            ("Reshape", ["y1", "wide"], ["y2"], {}),
            ("Transpose", ["y2"], ["out"], SWAP),
        ],
        {},
        True,
        r"\(batch, time, …\) \(Transpose\)",
    ),
    "both, of a node that has the batch first": (
        ENTERS,
        [("Squeeze", ["y", "two"], ["y1"], {}), ("Transpose", ["y1"], ["out"], SWAP)],
        {"layout": 1},
        False,
        r"\(time, batch, …\) \(Transpose\)",
    ),
    "the input alone": (ENTERS, LEAVES[:1], {}, False, r"as the node does; the input of the graph around is \(batch, time, …\)"),
    "the output alone": ([], LEAVES, {}, False, r"as the node does; the output of the graph around is \(batch, time, …\)"),
}


@pytest.mark.parametrize("kind", ORDERS)
def test_the_order_of_axes_around(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    before, after, attributes, batch_first, said = ORDERS[kind]
    after = [(op, i, ["out"] if k == len(after) - 1 else o, more) for k, (op, i, o, more) in enumerate(after)]
    numbers = {**NUMBERS, "flat": np.array([0, 0, -1]), "two": np.array([2])}
    model = around(rng, before, after, numbers, **attributes)
    if attributes.get("layout"):  # which onnxruntime does not have
        layer = imported(model, tmp_path)
        assert layer.batch_first == batch_first
        return
    layer, x = imported(model, tmp_path), rng.standard_normal((5, 3, D)).astype("float32")
    assert layer.batch_first == batch_first
    assert re.search(said, layer.provenance)
    own = x if batch_first or not before else x.transpose(1, 0, 2)
    y = layer(own)[0]
    y = y.transpose(1, 0, 2) if kind == "the output alone" else y
    np.testing.assert_allclose(y, run_onnx(model, x), rtol=ONNX_OPERATOR, atol=ONNX_OPERATOR)


def test_the_order_of_axes_of_layers_that_follow_each_other_is_that_of_the_nodes(tmp_path: Path, rng: np.random.Generator) -> None:
    """One after the other they fit, as their nodes do."""
    model = around(rng, ENTERS, [("Squeeze", ["y", "one"], ["y1"], {})], NUMBERS)
    again = weights("LSTM", rng)
    again["W"] = rng.standard_normal((1, 4 * H, H)).astype("float32")
    model.graph.initializer.extend(numpy_helper.from_array(a, f"{n}2") for n, a in again.items())
    model.graph.node.append(helper.make_node("LSTM", ["y1", "W2", "R2", "B2"], ["z"], name="second", hidden_size=H))
    model.graph.node.append(helper.make_node("Squeeze", ["z", "one"], ["z1"]))
    model.graph.node.append(helper.make_node("Transpose", ["z1"], ["out"], **SWAP))
    x = rng.standard_normal((5, 3, D)).astype("float32")
    model.graph.output[0].name = "out"
    layers = [imported(model, tmp_path, prefix=f"{name}/") for name in ("a_node", "second")]
    assert [layer.batch_first for layer in layers] == [False, False]
    y = layers[1](layers[0](x.transpose(1, 0, 2))[0])[0].transpose(1, 0, 2)
    np.testing.assert_allclose(y, run_onnx(model, x), rtol=ONNX_OPERATOR, atol=5 * ONNX_OPERATOR)


@pytest.mark.parametrize("operator", GATES)
def test_axes_of_a_scan(operator: str, tmp_path: Path, rng: np.random.Generator) -> None:
    model = stepping("Scan", operator, rng, scan_input_axes=[1], scan_output_axes=[1])
    layer, x = imported(model, tmp_path), rng.standard_normal((3, 5, D)).astype("float32")
    assert layer.batch_first
    np.testing.assert_allclose(layer(x)[0], run_onnx(model, x), rtol=ONNX_OPERATOR, atol=ONNX_OPERATOR)


@pytest.mark.parametrize("operator", GATES)
@pytest.mark.parametrize("arguments", [{"batch_first": True}, {"batch_first": True, "bidirectional": True}])
def test_the_order_of_axes_of_an_export_comes_back(operator: str, arguments: dict[str, Any], tmp_path: Path, rng: Any) -> None:
    layer = getattr(pn, operator)(D, H, rng=rng, **arguments)
    pn.export(layer, tmp_path / "m.onnx")
    first = next(n.name or f"node{k}" for k, n in enumerate(onnx.load(tmp_path / "m.onnx").graph.node) if n.op_type == operator)
    assert pn.import_checkpoint(tmp_path / "m.onnx", prefix=f"{first}/").batch_first


@pytest.mark.parametrize("condition", ["a constant", "shapes", "values"])
@pytest.mark.parametrize("yes", [False, True])
def test_what_comes_out_of_an_if(yes: bool, condition: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """Each branch has constants of its own: which of them is known where the condition is."""
    arrays = weights("GRU", rng)

    def branch(name: str, factor: float) -> Any:
        values = {"W": arrays["W"] * np.float32(factor), "h": np.full((1, 3, H), factor, "float32")}
        nodes = [helper.make_node("Constant", [], [f"{k}_{name}"], value=numpy_helper.from_array(v)) for k, v in values.items()]
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(f"{k}_{name}", TensorProto.FLOAT, None) for k in values])

    reads: Nodes = {
        "a constant": [("Less", ["a", "b"], ["yes"], {})],
        "shapes": [("Size", ["x"], ["size"], {}), ("Less", ["size", "b"], ["yes"], {})],
        "values": [
            ("ReduceMax", ["x"], ["most"], {"keepdims": 0}),
            ("Cast", ["most"], ["m"], {"to": 7}),
            ("Less", ["m", "b"], ["yes"], {}),
        ],
    }[condition]
    choose = ("If", ["yes"], ["W_in", "h_in"], {"then_branch": branch("then", 0.5), "else_branch": branch("else", 0.25)})
    model = around(rng, [*reads, choose, ("Identity", ["x"], ["xr"], {})], (), {"a": np.array(0), "b": np.array(int(yes))}, operator="GRU")  # type: ignore[arg-type]
    node = next(n for n in model.graph.node if n.op_type == "GRU")
    node.input.extend(["", "h_in"])
    if condition != "a constant":
        with pytest.raises(pn.CheckpointError, match=r"a first state that the graph computes \(initial_h\)"):
            imported(model, tmp_path)
        node.input[1] = "W_in"
        with pytest.raises(pn.CheckpointError, match=r"the input W is computed in the graph.*\(If\), which has a body"):
            imported(model, tmp_path, ignore=("initial_h",))
        return
    node.input[1] = "W_in"
    x = rng.standard_normal((5, 3, D)).astype("float32")
    np.testing.assert_allclose(imported(model, tmp_path)(x)[0], run_onnx(model, x)[:, 0], rtol=ONNX_OPERATOR, atol=ONNX_OPERATOR)


def test_operators_that_meant_something_else_are_not_computed(tmp_path: Path, rng: np.random.Generator) -> None:
    arrays = weights("GRU", rng)
    model = onnx_model("GRU", {**arrays, "w": arrays["W"]}, ("x", "W", "R", "B"), hidden_size=H)
    model.graph.node[0].input[1] = "made"
    model.graph.node.insert(0, helper.make_node("Softmax", ["w"], ["made"], name="soft", axis=1))
    x = rng.standard_normal((5, 3, D)).astype("float32")
    np.testing.assert_allclose(imported(model, tmp_path)(x)[0], run_onnx(model, x)[:, 0], rtol=ONNX_OPERATOR, atol=ONNX_OPERATOR)
    model.opset_import[0].version = 11
    with pytest.raises(pn.CheckpointError, match=r"'soft' \(Softmax\), which meant something else in operator set 11"):
        imported(model, tmp_path)


@pytest.mark.parametrize(("node", "why"), [("Scatter", "cannot be computed"), ("Unique", "grows is not known")])
def test_operators_that_cannot_be_computed_are_named(node: str, why: str, tmp_path: Path, rng: np.random.Generator) -> None:
    arrays = weights("GRU", rng)
    initial = {**arrays, "w": arrays["W"], "at": np.zeros((1, 1, 1), "int64"), "one": np.zeros((1, 1, 1), "float32")}
    model = onnx_model("GRU", initial, ("x", "W", "R", "B"), hidden_size=H)
    model.graph.node[0].input[1] = "made"
    model.graph.node.insert(0, helper.make_node(node, ["w", "at", "one"] if node == "Scatter" else ["w"], ["made"], name="it"))
    model.opset_import[0].version = 11
    with pytest.raises(pn.CheckpointError, match=rf"'it' \({node}\).*{why}.*; give the arrays as a mapping"):
        imported(model, tmp_path)


@pytest.mark.parametrize("operator", ["BatchNormalization", "LayerNormalization"])
def test_axes_that_the_graph_around_a_normalization_moves_are_named(operator: str, tmp_path: Path, rng: np.random.Generator) -> None:
    arrays = {n: rng.uniform(0.5, 1.5, 4).astype("float32") for n in ("scale", "bias", "mean", "var")[: 4 if operator[0] == "B" else 2]}
    model, x = onnx_model(operator, arrays, ("x", *arrays)), rng.standard_normal((3, 4, 4)).astype("float32")
    assert "moves the axes" not in imported(model, tmp_path).provenance
    model.graph.node[0].input[0] = "turned"
    model.graph.node.insert(0, helper.make_node("Transpose", ["x"], ["turned"], perm=[0, 2, 1]))
    layer = imported(model, tmp_path)
    assert "Transpose of the graph around moves the axes of the input; the layer takes them as the node does" in layer.provenance
    np.testing.assert_allclose(layer(x.transpose(0, 2, 1)), run_onnx(model, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("before", "named"),
    [
        ([("Gather", ["x", "places"], ["xr"], {"axis": 2})], "Gather"),
        ([("Split", ["x"], ["a", "b"], {"axis": 2, "num_outputs": 2}), ("Concat", ["b", "a"], ["xr"], {"axis": 2})], "Concat, Split"),
        ([("Slice", ["x", "zero", "one", "zero"], ["xr"], {})], "Slice"),
    ],
)
def test_what_makes_the_input_of_another_value_is_named(before: Nodes, named: str, tmp_path: Path, rng: np.random.Generator) -> None:
    layer = imported(around(rng, before, (), {**NUMBERS, "places": np.arange(D)[::-1].copy()}), tmp_path)  # type: ignore[arg-type]
    assert f"{named} of the graph around makes the input of another value; the layer takes what the node does" in layer.provenance
    assert "of another value" not in imported(stepping("Loop", "LSTM", rng), tmp_path).provenance


def test_an_output_that_the_graph_rounds_is_named(tmp_path: Path, rng: np.random.Generator) -> None:
    after: Nodes = [("QuantizeLinear", ["y", "scale"], ["q"], {}), ("DequantizeLinear", ["q", "scale"], ["out"], {})]
    layer = imported(around(rng, [], after, {"scale": np.float32(0.1)}), tmp_path)
    assert re.search("(Deq|Q)uantizeLinear of the graph around rounds the output, and this does not", layer.provenance)


@pytest.mark.parametrize("operator", ["Add", "Concat", "Where"])
def test_values_that_are_read_twice_again_and_again_are_followed_once(operator: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """Twice as many ways back with every node."""
    model = stepping("Scan", "GRU", rng)
    body = next(a.g for a in model.graph.node[0].attribute if a.name == "body")
    last = "initial_h_c"
    for k in range(60):
        inputs = ["yes", last, last] if operator == "Where" else [last, last]
        body.node.insert(k, helper.make_node(operator, inputs, [f"again{k}"], **({"axis": 0} if operator == "Concat" else {})))
        last = f"again{k}"
    next(n for n in body.node if n.op_type == "GRU").input[5] = last
    body.output[0].name = last
    with contextlib.suppress(pn.CheckpointError):
        assert isinstance(imported(model, tmp_path), pn.GRU)
    model = around(
        rng,
        [(operator, *([["x", "x"]] if operator != "Where" else [["yes", "x", "x"]]), ["xr"], {"axis": 2} if operator == "Concat" else {})],
    )
    for k in range(60):
        previous = model.graph.node[0].input[-1]
        inputs = ["yes", "x", "x"] if operator == "Where" else ["x", "x"]
        model.graph.node.insert(0, helper.make_node(operator, inputs, [f"more{k}"], **({"axis": 2} if operator == "Concat" else {})))
        for j, name in enumerate(model.graph.node[1].input):
            if name == previous:
                model.graph.node[1].input[j] = f"more{k}"
    assert isinstance(imported(model, tmp_path), pn.LSTM)


NONE = {"value": numpy_helper.from_array(np.array([0]))}
LENGTHS: dict[str, tuple[Nodes, str | None]] = {
    "all steps": ([("Expand", ["steps", "rows"], ["lens"], {})], None),
    "all steps, repeated": ([("Tile", ["steps", "rows"], ["lens"], {})], None),
    "all steps, added to 0": ([("ConstantOfShape", ["rows"], ["none"], NONE), ("Add", ["none", "steps"], ["lens"], {})], None),
    "a constant": ([("ConstantOfShape", ["rows"], ["none"], NONE), ("Add", ["none", "three"], ["lens"], {})], "a constant sequence_lens"),
    "a constant, expanded": ([("Expand", ["three", "rows"], ["lens"], {})], "a constant sequence_lens"),
    "a constant, repeated": ([("Tile", ["three", "rows"], ["lens"], {})], "a constant sequence_lens"),
    "one step fewer": (
        [("Sub", ["steps", "one"], ["fewer"], {}), ("Expand", ["fewer", "rows"], ["lens"], {})],
        "a sequence_lens that the graph makes of shapes, other than all steps",
    ),
    "as many as rows": ([("Expand", ["rows", "rows"], ["lens"], {})], "a sequence_lens that the graph makes of shapes"),
}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("kind", LENGTHS)
def test_lengths_that_nodes_make(kind: str, swapped: bool, tmp_path: Path, rng: np.random.Generator) -> None:
    nodes, refused = LENGTHS[kind]
    time = 1 if swapped else 0
    shapes: Nodes = [
        ("Shape", ["x"], ["steps"], {"start": time, "end": time + 1}),
        ("Shape", ["x"], ["rows"], {"start": 1 - time, "end": 2 - time}),
    ]
    before = [*(ENTERS if swapped else [("Identity", ["x"], ["xr"], {})]), *shapes, *nodes, ("Cast", ["lens"], ["narrow"], {"to": 6})]
    model = around(rng, before, LEAVES if swapped else (), {**NUMBERS, "three": np.array([3])})  # type: ignore[arg-type]
    next(n for n in model.graph.node if n.op_type == "LSTM").input.append("narrow")
    if refused is not None:
        with pytest.raises(pn.CheckpointError, match=rf"a_node.*{refused}.*ignore=\('sequence_lens',\)"):
            imported(model, tmp_path)
        return
    layer, x = imported(model, tmp_path), rng.standard_normal((5, 3, D)).astype("float32")
    assert "sequence_lens" not in layer.provenance
    np.testing.assert_allclose(layer(x)[0], run_onnx(model, x)[slice(None) if swapped else (slice(None), 0)], rtol=1e-5, atol=1e-5)


def test_lengths_that_come_with_a_call_are_its_own(tmp_path: Path, rng: np.random.Generator) -> None:
    model = around(rng, [("Identity", ["x"], ["xr"], {}), ("Cast", ["lengths_in"], ["narrow"], {"to": 6})], (), NUMBERS)  # type: ignore[arg-type]
    model.graph.input.append(helper.make_tensor_value_info("lengths_in", TensorProto.INT64, [None]))
    next(n for n in model.graph.node if n.op_type == "LSTM").input.append("narrow")
    assert "sequence_lens is `lengths` of a call" in imported(model, tmp_path).provenance


@pytest.mark.parametrize("kind", ["QuantizeLinear", "Cast"])
def test_an_input_that_the_graph_rounds_is_named(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    rounding: Nodes = [("QuantizeLinear", ["x", "scale"], ["q"], {}), ("DequantizeLinear", ["q", "scale"], ["xr"], {})]
    if kind == "Cast":
        rounding = [("Cast", ["x"], ["q"], {"to": 10}), ("Cast", ["q"], ["xr"], {"to": 1})]
    layer = imported(around(rng, rounding, (), {"scale": np.float32(0.1)}), tmp_path)  # type: ignore[arg-type]
    assert re.search("(DequantizeLinear|Cast) of the graph around rounds the input, and this does not", layer.provenance)


@pytest.mark.parametrize("direction", ["reverse", "backwards"])
def test_a_direction_that_our_graph_has_outside_of_its_node_is_not_lost(direction: Any, tmp_path: Any) -> None:
    """The node itself goes forward; read alone it would be another layer, without a word."""
    layer = pn.LSTM(3, 4, direction=direction, rng=0)
    pn.export(layer, tmp_path / "m.onnx")
    with pytest.raises(pn.CheckpointError, match=r"portnorm\.load gives the layer"):
        pn.import_checkpoint(tmp_path / "m.onnx")
    assert getattr(pn.load(tmp_path / "m.onnx"), "direction", None) == direction
