"""What a graph can be made for: targets, types, streaming, names, functions, external data; and the way back from the file."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import compose, helper

import portnorm as pn
from portnorm.layers.recurrent import Recurrent
from portnorm_onnx.inputs import centres_first
from portnorm_onnx.keys import props_of, set_props
from portnorm_onnx.lowering import OPSETS
from portnorm_onnx.signature import named_state
from portnorm_onnx.storage import LIMIT, Draft, weights_of
from portnorm_onnx.targets import TARGETS
from portnorm_onnx.verify import check
from tests.cases import HEAVY_PRESETS, IMPLEMENTATIONS, random_recurrent
from tests.processes import output_of
from tests.test_export import FUSED, LAYERS, lstm, recurrent
from tests.tolerances import ONNX_STEPS


def run(model: onnx.ModelProto, **inputs: Any) -> dict[str, Any]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, inputs), strict=True))


def operators(report: Any) -> list[str]:
    return [n.op_type for n in report.model.graph.node]


ANY_SHAPE = [name for name, row in TARGETS.items() if not row.further]

# -- targets and folding -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [t if t in ("portable", "onnxruntime") else pytest.param(t, marks=pytest.mark.slow) for t in ANY_SHAPE])
@pytest.mark.parametrize(("cell", "norm"), HEAVY_PRESETS)
def test_every_preset_for_every_target(cell: str, norm: str | None, target: str) -> None:
    assert pn.export(recurrent(cell, norm), None, target=target).worst_step is not None


@pytest.mark.parametrize("target", [t if t in ("portable", "onnxruntime") else pytest.param(t, marks=pytest.mark.slow) for t in ANY_SHAPE])
@pytest.mark.parametrize(("layer", "keywords", "nodes"), LAYERS, ids=lambda v: repr(v) if isinstance(v, pn.Layer) else None)
def test_every_layer_for_every_target(layer: pn.Layer, keywords: dict[str, Any], nodes: int | None, target: str) -> None:
    keywords = {**keywords, "opset": min(keywords.get("opset", 18), TARGETS[target].last_opset)}
    report = pn.export(layer, None, target=target, **keywords)
    assert not TARGETS[target].without & set(operators(report))


FUSED_CELLS = [(c, n) for c in ("LSTM", "GRU", "RNN") for n in FUSED]


@pytest.mark.parametrize(("cell", "norm"), FUSED_CELLS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_plain_and_folded_cells_are_one_operator(cell: str, norm: str | None, bidirectional: bool) -> None:
    layer = recurrent(cell, norm, bidirectional=bidirectional)
    for keywords in ({"lengths": False}, {"lengths": False, "state": True}, {"target": "onnxruntime"}):
        report = pn.export(layer, None, **keywords)
        assert operators(report).count(cell) == 1 + bidirectional
        assert report.body_nodes == ()
    visible = pn.export(layer, None, fold=False)
    assert len(visible.body_nodes) == 1 + bidirectional
    assert cell not in operators(visible)


def test_statistics_shared_by_all_steps_fold_into_the_hidden_weights_too() -> None:
    variant = pn.Variant(source="test", norm="batch", cell=None)
    layer = random_recurrent("LSTM", variant, np.random.default_rng(0), inputs=5, hidden=8).to(dtype="float32")
    one = pn.LSTM(5, 8, norm=variant, t_max=1, rng=0)
    rows = {n: b if n.startswith("num") else b[:1] for n, b in layer.buffers.items()}
    one.assign(layer.params, {n: b[:1] if n.startswith("num") else b for n, b in rows.items()})
    report = pn.export(one, None, lengths=False)
    assert operators(report).count("LSTM") == 1


def test_lengths_go_to_the_operator_only_where_that_is_safe() -> None:
    layer = lstm(None)

    def lens(report: Any) -> list[str]:
        return ["".join(n.input[4:5]) for n in report.model.graph.node if n.op_type == "LSTM"]

    assert lens(pn.export(layer, None)) == [""]
    assert lens(pn.export(layer, None, target="onnxruntime"))[0]
    assert lens(pn.export(layer, None, state=True)) == []  # c at each sequence's end is in no output of the operator
    x, lengths = np.random.default_rng(0).standard_normal((5, 3, 5)).astype(np.float32), np.array([5, 0, 2])
    expected = layer(x, lengths=lengths)[0]
    for target in ("portable", "onnxruntime"):
        y = run(pn.export(layer, None, target=target).model, x=x, lengths=lengths)["y"]
        np.testing.assert_allclose(y, expected, atol=2e-6)


def test_fold_false_keeps_statistics_visible() -> None:
    """The running statistics are initializers of their own; folded, one gain and one shift per step are left.

    The mean of c stays, because c − μ cancels, and c is no product that a shift could go into.
    """
    names = [t.name for t in weights_of(pn.export(lstm("batch"), None, fold=False).model.graph)]
    assert any("running_mean" in n for n in names)
    assert any("running_var" in n for n in names)
    folded = pn.export(lstm("batch"), None)
    assert not any("running_var" in t.name for t in weights_of(folded.model.graph))
    assert folded.body_nodes[0] < pn.export(lstm("batch"), None, fold=False).body_nodes[0]


def test_batch_norm_behind_a_linear_layer_disappears() -> None:
    rng = np.random.default_rng(0)
    model = pn.Sequential(pn.Linear(3, 5, rng=0), pn.BatchNorm(5), pn.Linear(5, 2, rng=1))
    model.load_state_dict({n: a + rng.uniform(0.1, 1.0, a.shape) if a.ndim else a for n, a in model.state_dict().items()})
    assert operators(pn.export(model, None)) == ["MatMul", "Add", "MatMul", "Add"]
    assert "BatchNormalization" in operators(pn.export(model, None, fold=False))


# -- where the input term is made --------------------------------------------------------------------------------------------------------


def body(report: Any) -> list[str]:
    """The operators in the only loop."""
    (loop,) = (n for n in report.model.graph.node if n.op_type == "Scan")
    return [n.op_type for n in helper.get_node_attr_value(loop, "body").node]


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize(
    ("inputs", "keywords", "inside"),
    [
        (16, {}, True),
        (17, {}, False),
        (16, {"target": "openvino"}, True),
        (16, {"target": "portable"}, False),
        (16, {"fold": False}, False),
        (16, {"dtype": "float16"}, False),
        (16, {"input_shape": ("time", 64, 16)}, True),
        (16, {"input_shape": ("time", 1, 16)}, False),
    ],
    ids=str,
)
def test_few_inputs_are_multiplied_in_the_loop(cell: str, inputs: int, keywords: dict[str, Any], inside: bool) -> None:
    layer = random_recurrent(cell, "layer", np.random.default_rng(0), inputs, 8).to(dtype="float32")
    report = pn.export(layer, None, lengths=False, **{"target": "onnxruntime", **keywords})
    assert (operators(report).count("MatMul"), body(report).count("MatMul")) == ((0, 2) if inside else (1, 1))


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
def test_rows_are_normalized_in_the_loop_unless_a_step_is_one(target: str) -> None:
    def counts(batch: int | str) -> tuple[int, int]:
        report = pn.export(
            pn.LSTM(20, 8, norm="layer", rng=0), None, lengths=False, input_shape=("time", batch, 20), target=target, opset=18
        )
        return operators(report).count("LayerNormalization"), body(report).count("LayerNormalization")

    assert counts("batch") == counts(2) == (0, 3)
    assert counts(1) == (1, 2)


@pytest.mark.parametrize("inputs", [5, 20])
def test_statistics_of_steps_are_one_shift_for_onnxruntime(inputs: int) -> None:
    """Nothing but the product passes over the input term of all steps, and no row is shifted twice."""
    layer = random_recurrent("LSTM", "batch", np.random.default_rng(0), inputs, 8).to(dtype="float32")
    reports = {target: pn.export(layer, None, lengths=False, target=target) for target in ("portable", "onnxruntime")}
    assert operators(reports["portable"]).count("Mul") == 1
    assert operators(reports["onnxruntime"]).count("Mul") == 0
    assert operators(reports["onnxruntime"]).count("Add") == 1  # of numbers of steps
    assert body(reports["onnxruntime"]).count("Add") == body(reports["portable"]).count("Add") == 4
    x = np.random.default_rng(1).standard_normal((6, 3, inputs)).astype(np.float32)
    for report in reports.values():
        np.testing.assert_allclose(run(report.model, x=x)["y"], layer(x)[0], rtol=0, atol=ONNX_STEPS)


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
def test_parts_with_statistics_of_their_own_are_not_put_together_in_the_loop(target: str) -> None:
    layer = random_recurrent("GRU", "layer", np.random.default_rng(0), 20, 8).to(dtype="float32")
    found = body(pn.export(layer, None, lengths=False, target=target))
    assert "Slice" not in found
    assert "Concat" not in found
    assert found.count("Split") == (2 if target == "onnxruntime" else 3)


@pytest.mark.parametrize(("cell", "norm"), HEAVY_PRESETS)
def test_every_preset_of_many_inputs_comes_back_from_onnxruntime(cell: str, norm: str | None, tmp_path: Path) -> None:
    layer = random_recurrent(cell, norm, np.random.default_rng(0), inputs=20, hidden=8, bidirectional=True).to(dtype="float32")
    assert pn.export(layer, tmp_path / "m.onnx", target="onnxruntime").worst_step is not None
    for name, a in pn.load(tmp_path / "m.onnx").state_dict().items():
        np.testing.assert_array_equal(a, layer.state_dict()[name])


# -- accuracy ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (pn.LayerNorm(64), ("batch", 64)),
        (pn.InstanceNorm(4, affine=True), ("batch", 4, "space")),
        (pn.GroupNorm(2, 4), ("batch", 4, "space")),
        (pn.BatchNorm(4), ("batch", 4)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, pn.Layer) else "",
)
def test_accurate_keeps_a_large_mean_right_in_the_runtime(layer: pn.Layer, shape: tuple[Any, ...]) -> None:
    """N(1e4, 0.01): onnxruntime's operators are off by 1e-2 and more."""
    x = (1e4 + 0.01 * np.random.default_rng(0).standard_normal([d if isinstance(d, int) else 32 for d in shape])).astype(np.float32)
    if isinstance(layer, pn.BatchNorm):
        layer.assign(layer.params, {**layer.buffers, "running_mean": x.mean(0), "running_var": np.full(4, 1e-4, np.float32)})
    exact = layer.to(dtype="float64")(x.astype(np.float64))
    error = {}
    for accurate in (False, True):
        report = pn.export(layer, None, accurate=accurate, input_shape=shape)
        error[accurate] = float(np.max(np.abs(run(report.model, x=x)["y"] - exact)))
    assert error[True] < 2e-3 < error[False]


def centred(layer: pn.Layer, shape: tuple[Any, ...], target: Any, **keywords: Any) -> bool:
    """Whether its normalization is of what a mean was subtracted from; shapes that are open stay so where the target takes them."""
    fixed = tuple(d if isinstance(d, int) else 40 for d in shape)
    report = pn.export(layer, None, target=target, input_shape=shape if TARGETS[target].open_shapes else fixed, **keywords)
    made = {name: n.op_type for n in report.model.graph.node for name in n.output}
    (norm,) = [n for n in report.model.graph.node if n.op_type in ("LayerNormalization", "InstanceNormalization")]
    return made.get(norm.input[0]) == "Sub"


@pytest.mark.parametrize("target", TARGETS)
def test_long_rows_are_centred_where_they_are_added_up_in_order(target: Any) -> None:
    """And neither short ones, nor those of a product with weights, which have no mean that is large against their spread."""
    row = TARGETS[target]
    always = "LayerNormalization" in row.one_pass
    layers = "LayerNormalization" in row.sums_in_order
    assert centred(pn.LayerNorm(1000), ("batch", 1000), target) is (layers or always)
    assert centred(pn.LayerNorm(999), ("batch", 999), target) is always
    for bias in (False, True):
        behind = pn.Sequential(pn.Linear(3, 1000, bias=bias, rng=0), pn.LayerNorm(1000))
        assert target == "litert" or centred(behind, ("batch", 3), target) is always
    if "InstanceNormalization" not in row.without:
        instances = "InstanceNormalization" in row.sums_in_order
        assert centred(pn.InstanceNorm(2), ("batch", 2, "height", "width"), target) is (instances or always)
        assert centred(pn.InstanceNorm(2), ("batch", 2, 5, 7), target) is always


@pytest.mark.parametrize("streaming", [False, True])
def test_products_for_litert_have_centred_weights(streaming: bool) -> None:
    """LiteRT takes LayerNormalization apart: behind a product the mean is 0, and the mean of its squares is all that it needs."""
    shape = (1, 3) if streaming else (2, 1, 3)
    report = pn.export(pn.LSTM(3, 4, norm="layer", rng=0), None, target="litert", streaming=streaming, input_shape=shape)
    nodes = report.model.graph.node
    weights = {
        t.name: onnx.numpy_helper.to_array(t)
        for t in report.model.graph.initializer
        if t.name in {n.input[1] for n in nodes if n.op_type == "MatMul"}
    }
    assert len(weights) == 2
    for name, w in weights.items():
        np.testing.assert_allclose(w.mean(axis=1), 0, atol=1e-8, err_msg=name)
    normalized = [n for n in nodes if n.op_type == "LayerNormalization"]
    assert len(normalized) == shape[0]  # c, in each step
    kept = pn.export(pn.LSTM(3, 4, norm="layer", rng=0), None, target="litert", streaming=streaming, input_shape=shape, accurate=True)
    assert sum(n.op_type == "LayerNormalization" for n in kept.model.graph.node) == (3 if streaming else 4)  # h before the first step is 0


def test_every_target_that_adds_up_in_order_says_so() -> None:
    found = {name: sorted(row.sums_in_order) for name, row in TARGETS.items() if row.sums_in_order}
    assert found.keys() == {"tract", "web", "litert", "mnn", "iree", "tvm", "tinygrad"}
    assert all("adds up the values of a row one after the other" in TARGETS[name].reason for name in found)


@pytest.mark.parametrize("shape", [(1, 8), (3, 8), (2, 3, 8)], ids=str)
def test_accurate_rows_for_ncnn_are_images(shape: tuple[int, ...]) -> None:
    """ncnn broadcasts the mean of a row as that of a row in images alone; elsewhere it is subtracted from other values."""
    report = pn.export(pn.LayerNorm(8), None, target="ncnn", input_shape=shape, accurate=True)
    known = {t.name: onnx.numpy_helper.to_array(t).tolist() for t in report.model.graph.initializer}
    first, mean, *_ = report.model.graph.node
    assert [first.op_type, mean.op_type] == ["Reshape", "ReduceMean"]
    assert known[first.input[1]] == [1 if len(shape) == 2 else shape[0], shape[-2], 1, 8]
    assert known[mean.input[1]] == [2, 3]


def test_statistics_of_images_for_ncnn_are_subtracted_by_an_operator() -> None:
    """Two BatchNormalizations, of which the first is x − m in whatever order it is computed: right at any mean."""
    layer = pn.BatchNorm(2)
    statistics = {"running_mean": np.array([1e4, -1e4], "f4"), "running_var": np.array([1e-4, 1.0], "f4")}
    layer.assign(layer.params, {**layer.buffers, **statistics})
    report = pn.export(layer, None, target="ncnn", input_shape=(1, 2, 3, 3))
    first, second = report.model.graph.node
    known = {t.name: onnx.numpy_helper.to_array(t) for t in report.model.graph.initializer}
    assert [first.op_type, second.op_type] == ["BatchNormalization"] * 2
    eps = next(a.f for a in first.attribute if a.name == "epsilon")
    assert np.all(known[first.input[4]] + np.float32(eps) == 1)
    x = (statistics["running_mean"][:, None, None] + 0.01 * np.random.default_rng(0).standard_normal((1, 2, 3, 3))).astype("f4")
    exact = layer.to(dtype="float64")(x.astype(np.float64))
    np.testing.assert_allclose(run(report.model, x=x)["y"], exact, atol=2e-6)


@pytest.mark.parametrize("target", [name for name in TARGETS if "float16" in TARGETS[name].dtypes])
@pytest.mark.parametrize("norm", [None, "layer", "batch"])
def test_accurate_float16_has_products_of_float32(norm: str | None, target: str) -> None:
    """Inside of loops too, with weights of float16; the report of others says for which processors the check holds."""
    layer = pn.LSTM(3, 4, norm=norm, rng=0, dtype="float16")
    plain, wide = (pn.export(layer, None, target=target, accurate=accurate) for accurate in (False, True))
    assert "products of float16 were checked on" in str(plain)
    assert plain.to_dict()["remark"] == plain.remark != ""
    assert wide.remark == ""
    inner = [wide.model.graph, *(a.g for n in wide.model.graph.node for a in n.attribute if a.name == "body")]
    cast = {name: n.input[0] for g in inner for n in g.node if n.op_type == "Cast" for name in n.output}
    products = [n for g in inner for n in g.node if n.op_type == "MatMul"]
    assert len(products) == 2
    weights = {t.name: t.data_type for g in inner for t in g.initializer}
    assert [weights[cast[n.input[1]]] for n in products] == [onnx.TensorProto.FLOAT16] * 2
    assert all(n.input[0] in cast for n in products)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
@pytest.mark.parametrize("first", [pn.LayerNorm(4), pn.GroupNorm(2, 4), pn.InstanceNorm(4)], ids=lambda layer: type(layer).__name__)
def test_the_gate_tries_values_far_from_zero(first: pn.Layer, dtype: str) -> None:
    """Where a model begins by taking the mean of its input; the mean of such cases stands in their names."""
    shape = ("batch", 4) if isinstance(first, pn.LayerNorm) else ("batch", 4, 5)
    target = "onnxruntime" if dtype == "bfloat16" and isinstance(first, pn.LayerNorm) else "openvino" if dtype == "bfloat16" else "portable"
    found = [c.case for c in pn.export(first.to(dtype=dtype), None, input_shape=shape, target=target).trajectories]
    means = {"float16": 1, "bfloat16": 0, "float32": 2, "float64": 2}[dtype]
    assert sum("mean/std" in case for case in found) == means


@pytest.mark.parametrize(
    "first", [pn.RMSNorm(4), pn.BatchNorm(4), pn.Linear(4, 4, rng=0), pn.LSTM(4, 4, rng=0), pn.InstanceNorm(4, track_running_stats=True)]
)
def test_the_gate_tries_no_far_values_where_nothing_could_cancel(first: pn.Layer) -> None:
    assert not centres_first(first)
    assert centres_first(pn.Sequential(pn.LayerNorm(4), first)) is True


def test_one_pass_for_the_variance_is_found_out() -> None:
    """The graph that many write by hand: E[x²] − E[x]². At a mean of 0 it passes."""
    layer = pn.LayerNorm(64, affine=False)
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    one_pass (float[batch, 64] x) => (float[batch, 64] y) {
        axes = Constant <value = int64[1] {1}> ()
        eps = Constant <value = float {0.00001}> ()
        mean = ReduceMean (x, axes)
        squares = Mul (x, x)
        second = ReduceMean (squares, axes)
        of_mean = Mul (mean, mean)
        var = Sub (second, of_mean)
        some = Add (var, eps)
        std = Sqrt (some)
        centred = Sub (x, mean)
        y = Div (centred, std)
    }
    """
    with pytest.raises(pn.ConformanceError, match=r"output 'y' is \S+ from the float64 run at x \(7, 64\) of mean/std 1e\+0[24]"):
        check(Draft(onnx.parser.parse_model(text)), layer, runtimes=("onnxruntime",))


# -- types -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [None, "layer", "batch"])
@pytest.mark.parametrize(("dtype", "target"), [("float16", "portable"), ("float64", "onnxruntime"), ("bfloat16", "openvino")])
def test_types(dtype: str, target: str, norm: str | None) -> None:
    report = pn.export(lstm(norm), None, dtype=dtype, target=target)
    kind = {"float16": 10, "float64": 11, "bfloat16": 16}[dtype]
    assert [report.model.graph.input[0].type.tensor_type.elem_type, report.model.graph.output[0].type.tensor_type.elem_type] == [kind, kind]


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("shape", [None, (2, 5, 3), ("batch", 5, 3), (1, 1, 3)], ids=str)
@pytest.mark.parametrize("accurate", [False, True])
def test_float16_with_the_batch_first(accurate: bool, shape: Any, cell: str) -> None:
    """In a float16 graph no product reads what was transposed, whatever is known of the lengths: then onnxruntime loads it."""
    code = f"""
import portnorm as pn
layers = [getattr(pn, {cell!r})(3, 4, norm="layer", batch_first=True, bidirectional=both, rng=0) for both in (False, True)]
for layer in [*layers, pn.Sequential(layers[0], pn.Linear(4, 2, rng=0))]:
    report = pn.export(layer, None, dtype="float16", lengths=True, accurate={accurate}, input_shape={shape!r})
    nodes = report.model.graph.node
    turned = {{n.output[0] for n in nodes if n.op_type == "Transpose"}}
    turned |= {{n.output[0] for n in nodes if n.op_type == "Cast" and n.input[0] in turned}}
    print(turned.isdisjoint(name for n in nodes if n.op_type == "MatMul" for name in n.input), end=" ")
"""
    assert output_of(code).split() == ["True"] * 3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_norms_keep_float32_statistics(dtype: str) -> None:
    """One operator with stash_type 1, on values whose squares overflow float16."""
    report = pn.export(pn.LayerNorm(64), None, dtype=dtype, target="onnxruntime")
    (node,) = report.model.graph.node
    assert [a.i for a in node.attribute if a.name == "stash_type"] in ([], [1])
    if dtype == "float16":
        x = (1e3 * np.random.default_rng(0).standard_normal((4, 64))).astype(np.float16)
        np.testing.assert_allclose(run(report.model, x=x)["y"], pn.LayerNorm(64)(x.astype(np.float32)), atol=4e-3)


@pytest.mark.parametrize(
    ("dtype", "target", "message"),
    [
        ("bfloat16", "portable", r"'portable' does not compute in bfloat16 .*target='onnxruntime' or 'openvino' or 'tensorrt' does"),
        ("bfloat16", "onnxruntime", r"'onnxruntime' has no \w+ in bfloat16 \(node '\w+'\); target='openvino' or 'tensorrt' has it"),
        ("float64", "openvino", r"'openvino' does not compute in float64 .*target='portable' or 'onnxruntime' or 'web' does"),
        ("float8", "portable", r"`dtype` is 'float8'; expected one of float16, bfloat16, float32, float64"),
    ],
)
def test_a_type_that_a_target_lacks(dtype: str, target: str, message: str) -> None:
    with pytest.raises(pn.UnsupportedError, match=message):
        pn.export(lstm("layer"), None, dtype=dtype, target=target)


def test_unknown_target_and_opset_of_a_target() -> None:
    with pytest.raises(pn.UnsupportedError, match="`target` is 'toaster'; expected one of portable"):
        pn.export(lstm(None), None, target="toaster")
    with pytest.raises(pn.UnsupportedError, match="`opset` is 26; expected a number from 17 to 22"):
        pn.export(lstm(None), None, target="tensorrt", opset=26)


# -- streaming ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cell", "norm"), HEAVY_PRESETS)
def test_step_by_step_equals_the_sequence_graph(cell: str, norm: str | None, tmp_path: Path) -> None:
    layer, path = recurrent(cell, norm, num_layers=2), tmp_path / "step.onnx"
    report = pn.export(layer, path, streaming=True)
    assert report.trajectories[-1].case == "step by step against the sequence"
    assert report.body_nodes == ()  # one step needs no loop
    whole = pn.export(layer, None, lengths=False, state=True).model
    x = np.random.default_rng(0).standard_normal((9, 3, 5)).astype(np.float32)
    names = [i.name for i in report.model.graph.input if i.name != "x"]
    first = dict(zip(names, (np.asarray(a) for a in layer.initial_state(3)), strict=True))
    state, ys = dict(first), []
    for t in range(9):
        found = run(report.model, x=x[t], **state)
        ys.append(found.pop("y"))
        state = {f"{n.removesuffix('_n')}_0": a for n, a in found.items()}
    expected = run(whole, x=x, **first)
    np.testing.assert_allclose(np.stack(ys), expected.pop("y"), atol=2e-5)
    for name, a in expected.items():
        np.testing.assert_allclose(state[f"{name.removesuffix('_n')}_0"], a, atol=2e-5)
    assert pn.verify(path, layer).worst_step is not None


def test_streaming_of_a_whole_model_names_the_states_of_its_parts() -> None:
    parts = (pn.Embedding(9, 4, rng=0), pn.GRU(4, 8, norm="layer", rng=0), pn.LSTM(8, 8, norm="batch", rng=0), pn.Linear(8, 3, rng=0))
    report = pn.export(pn.Sequential(*parts), None, streaming=True)
    assert [i.name for i in report.model.graph.input] == ["x", "1.h_0", "2.h_0", "2.c_0", "2.time_0"]


@pytest.mark.parametrize("layer", [pn.LSTM(3, 4, bidirectional=True), pn.LayerNorm(3)], ids=repr)
def test_streaming_of_what_cannot_stream(layer: pn.Layer) -> None:
    with pytest.raises(pn.UnsupportedError, match="`streaming` needs a recurrent model that goes forward only"):
        pn.export(layer, None, streaming=True)


# -- fixed shapes ------------------------------------------------------------------------------------------------------------------------


def lengths_of(report: Any) -> dict[str, list[Any]]:
    values = (*report.model.graph.input, *report.model.graph.output)
    return {v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim] for v in values}


FIXED: list[tuple[dict[str, Any], tuple[int | str, int | str]]] = [
    ({"lengths": False}, (5, 1)),
    ({"lengths": True}, (5, 1)),
    ({"lengths": True, "state": True}, (5, 2)),
    ({"mask": True, "state": True}, (5, 2)),
    ({"lengths": False}, (1, 1)),
    ({"lengths": False, "state": True}, (1, 3)),
    ({"lengths": True, "state": True}, ("t", 2)),
    ({"lengths": True, "state": True}, (4, "n")),
]


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
@pytest.mark.parametrize(("keywords", "sizes"), FIXED, ids=str)
@pytest.mark.parametrize("arrangement", [{}, {"bidirectional": True, "num_layers": 2}, {"batch_first": True}], ids=str)
@pytest.mark.parametrize(("cell", "norm"), HEAVY_PRESETS)
def test_lengths_of_sequences_can_be_fixed(
    cell: str, norm: Any, arrangement: dict[str, Any], keywords: dict[str, Any], sizes: tuple[Any, Any], target: Any
) -> None:
    layer, (time, batch) = recurrent(cell, norm, **arrangement), sizes
    shape = (batch, time, 5) if layer.batch_first else (time, batch, 5)
    report = pn.export(layer, None, input_shape=shape, target=target, **keywords)
    found = lengths_of(report)
    assert found["x"] == list(shape)
    assert all(found[name][1] == batch for name in found if name in ("h_0", "c_0", "h_n", "c_n"))
    assert found.get("lengths", [batch]) == [batch]
    if time != 1:
        assert report.steps[0].case == (f"{time} steps from each of 3 states" if isinstance(time, int) else "one step at each of 24")
    rng = np.random.default_rng(0)
    x = rng.standard_normal([d if isinstance(d, int) else 3 for d in shape]).astype(np.float32)
    steps, many = (x.shape[1], x.shape[0]) if layer.batch_first else x.shape[:2]
    given: dict[str, Any] = {"mask": np.ones(x.shape[:2], bool)} if keywords.get("mask") else {}
    given |= {"lengths": rng.integers(0, steps + 1, many)} if keywords.get("lengths") and "mask" not in given else {}
    feed = {"x": x, **given}
    if keywords.get("state"):
        given["state"] = layer.initial_state(many, noise=1.0, rng=1)
        feed |= {n: np.asarray(a) for n, a in named_state(layer, given["state"], "_0").items()}
    np.testing.assert_allclose(run(report.model, **feed)["y"], layer(x, **given)[0], rtol=0, atol=ONNX_STEPS)


@pytest.mark.parametrize("shape", [(1, 5), ("n", 5), ("time", 1, 5)], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("cell", "norm"), HEAVY_PRESETS)
def test_the_batch_of_a_streaming_graph_can_be_fixed(cell: str, norm: Any, batch_first: bool, shape: tuple[Any, ...]) -> None:
    layer = recurrent(cell, norm, batch_first=batch_first)
    full = (1, "time", 5) if batch_first and len(shape) == 3 else shape
    report = pn.export(layer, None, streaming=True, input_shape=full)
    found, batch = lengths_of(report), shape[-2]
    assert found["x"] == [batch, 5]
    assert found["h_0"] == found["h_n"] == [1, batch, 8]
    assert report.trajectories[-1].case == "step by step against the sequence"


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"input_shape": (1, 5)}, r"`input_shape` is \(1, 5\); expected \(time, batch, 5\)"),
        ({"input_shape": (5,), "streaming": True}, r"`input_shape` is \(5,\); expected \(batch, 5\)"),
        ({"input_shape": (7, 1, 5), "streaming": True}, r"`input_shape` is \(7, 1, 5\), 7 steps; .* takes no time: \(1, 5\)"),
        ({"input_shape": (0, 1, 5)}, r"`input_shape` is .*expected numbers from 1 on, and strings for lengths that vary, not 0"),
        ({"input_shape": (None, 1, 5)}, r"`input_shape` is .*not None"),
        ({"input_shape": (3, 1, 6)}, r"`x` has shape \(3, 1, 6\)"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises((pn.ShapeError, pn.UnsupportedError), match=message):
        pn.export(lstm("layer"), None, **keywords)


@pytest.mark.parametrize(
    ("layer", "shape", "dims"),
    [
        (pn.BatchNorm(8), (2, 8, 3, 4), ["batch", 8, "space_2", "space_3"]),
        (pn.BatchNorm(8, channel_axis=-1), (2, 3, 4, 8), ["batch", "space_1", "space_2", 8]),
        (pn.InstanceNorm(8), (2, 8, 3, 4), ["batch", 8, "space_2", "space_3"]),
        (pn.GroupNorm(2, 8), (2, 8, 3, 4, 2), ["batch", 8, "space_2", "space_3", "space_4"]),
        (pn.LayerNorm(8), (2, 3, 8), ["batch", "space_1", 8]),
        (pn.LayerNorm((3, 8)), (2, 4, 3, 8), ["batch", "space_1", 3, 8]),
        (pn.RMSNorm(8), (2, 3, 4, 8), ["batch", "space_1", "space_2", 8]),
        (pn.BatchNorm(8), (2, 8), ["batch", 8]),
    ],
    ids=lambda v: repr(v) if isinstance(v, pn.Layer) else "",
)
def test_the_first_input_says_how_many_axes_there_are(layer: pn.Layer, shape: Any, dims: list[Any], tmp_path: Path) -> None:
    path, x = tmp_path / "m.onnx", np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    report = pn.export(layer, path, inputs=[x])
    assert lengths_of(report)["x"] == dims
    assert pn.verify(path, layer).outcomes[0].status == "passed"
    if len(shape) > 2:
        pn.export(layer, path, input_shape=tuple(dims[:1] + dims[2:]) if dims[1] == "space_1" else tuple(dims[:-1]))
        with pytest.raises(pn.ExportError, match=r"`x` of shape .* axes, the graph takes .; export it with `inputs=\[x\]`, or"):
            pn.verify(path, layer, inputs=[x])


# -- into somebody's model ---------------------------------------------------------------------------------------------------------------


def test_names_and_prefix_merge_with_another_model(tmp_path: Path) -> None:
    """Two encoders with the same names inside, and a model in front of them, become one that computes both."""
    layers = [recurrent("LSTM", "layer"), recurrent("LSTM", "batch")]
    models = []
    for k, layer in enumerate(layers):
        path = tmp_path / f"{k}.onnx"
        report = pn.export(layer, path, prefix=f"e{k}/", names={"x": f"in{k}", "y": f"out{k}"}, lengths=False)
        inner = [n.name for n in report.model.graph.node] + [t.name for t in weights_of(report.model.graph)]
        assert all(name.startswith(f"e{k}/") for name in inner)
        assert pn.verify(path, layer).worst_step is not None
        models.append(report.model)
    front = helper.make_graph(
        [helper.make_node("Mul", ["x", "x"], ["a"]), helper.make_node("Neg", ["x"], ["b"])],
        "front",
        [helper.make_tensor_value_info("x", 1, ["time", "batch", 5])],
        [helper.make_tensor_value_info(n, 1, ["time", "batch", 5]) for n in ("a", "b")],
    )
    start = helper.make_model(front, opset_imports=[helper.make_opsetid("", 18)], ir_version=models[0].ir_version)
    merged = compose.merge_models(compose.merge_models(start, models[0], [("a", "in0")]), models[1], [("b", "in1")])
    onnx.checker.check_model(merged, full_check=True)
    x = np.random.default_rng(0).standard_normal((6, 3, 5)).astype(np.float32)
    found = run(merged, x=x)
    np.testing.assert_allclose(found["out0"], layers[0](x * x)[0], atol=2e-5)
    np.testing.assert_allclose(found["out1"], layers[1](-x)[0], atol=2e-5)


@pytest.mark.parametrize("opset", sorted(OPSETS))
@pytest.mark.parametrize("keywords", [{}, {"streaming": True}, {"function": True}, {"dtype": "float16"}], ids=str)
def test_the_ir_version_is_the_one_of_the_opset(opset: int, keywords: dict[str, Any]) -> None:
    ids = [helper.make_opsetid("", opset)]
    report = pn.export(lstm("layer"), None, opset=opset, target="portable" if opset <= 26 else "onnxruntime", **keywords)
    assert report.model.ir_version == helper.find_min_ir_version_for(ids)


@pytest.mark.parametrize(
    ("norm", "prefixes", "by_compose"),
    [
        (None, ("", ""), {"prefix1": "a/", "prefix2": "b/"}),  # which does not reach what the body of a loop holds
        (None, ("a/", "b/"), {}),
        ("layer", ("a/", "b/"), {}),
    ],
    ids=["prefixes of compose", "prefixes of export", "loops"],
)
@pytest.mark.parametrize("opset", [18, 23])
def test_two_graphs_merge_one_behind_the_other(norm: Any, prefixes: Any, by_compose: dict[str, str], opset: int, tmp_path: Path) -> None:
    """Different layers, and so different metadata."""
    rng, path = np.random.default_rng(0), tmp_path / "m.onnx"
    layers = [recurrent("GRU", norm), random_recurrent("LSTM", norm, rng, inputs=8, hidden=4).to(dtype="float32")]
    first, second = (
        pn.export(layer, None, prefix=prefix, names={"x": f"x{k}", "y": f"y{k}"}, lengths=False, opset=opset).model
        for k, (layer, prefix) in enumerate(zip(layers, prefixes, strict=True))
    )
    merged = compose.merge_models(first, second, [("y0", "x1")], **by_compose)
    onnx.checker.check_model(merged, full_check=True)
    x = np.random.default_rng(0).standard_normal((6, 3, 5)).astype(np.float32)
    (y,) = run(merged, **{merged.graph.input[0].name: x}).values()
    np.testing.assert_allclose(y, layers[1](layers[0](x)[0])[0], atol=2e-5)
    onnx.save(merged, path)
    with pytest.raises(pn.CheckpointError, match="was merged of graphs"):
        pn.load(path)


def test_merges_with_a_new_graph_of_the_same_opset() -> None:
    """The IR version that `make_model` takes for an opset, where it is asked for the one that belongs to it."""
    report = pn.export(recurrent("LSTM", None), None, names={"x": "inside"}, lengths=False, opset=23)
    info = [helper.make_tensor_value_info(n, 1, ["time", "batch", 5]) for n in ("x", "z")]
    front = helper.make_graph([helper.make_node("Neg", ["x"], ["z"])], "front", info[:1], info[1:])
    start = helper.make_model_gen_version(front, opset_imports=[helper.make_opsetid("", 23)])
    merged = compose.merge_models(start, report.model, [("z", "inside")])
    x = np.ones((2, 3, 5), np.float32)
    np.testing.assert_allclose(run(merged, x=x)["y"], recurrent("LSTM", None)(-x)[0], atol=2e-6)


@pytest.mark.parametrize("names", [{"z": "a"}, {"x": "same", "y": "same"}])
def test_names_that_do_not_fit(names: dict[str, str]) -> None:
    with pytest.raises(pn.UnsupportedError, match="`names` has"):
        pn.export(lstm("layer"), None, names=names)


def test_a_model_local_function_on_request(tmp_path: Path) -> None:
    path, layer = tmp_path / "m.onnx", lstm("batch")
    report = pn.export(layer, path, function=True)
    assert [f.name for f in report.model.functions] == ["LSTM"]
    assert report.nodes == 1
    assert pn.verify(path, layer).worst_step is not None


def test_external_data(tmp_path: Path) -> None:
    path, layer = tmp_path / "m.onnx", pn.LSTM(32, 64, norm="layer", rng=0)
    pn.export(layer, path, external_data=True)
    first = sorted(p.name for p in tmp_path.iterdir())
    assert len(first) == 2
    assert path.stat().st_size < 20_000
    assert pn.verify(path, layer).worst_step is not None
    np.testing.assert_array_equal(pn.load(path).params["weight_hh_l0"], layer.params["weight_hh_l0"])
    assert sorted(p.name for p in tmp_path.iterdir()) == first  # a check leaves nothing behind
    with pytest.raises(pn.ExportError, match="give a `path`"):
        pn.export(layer, None, external_data=True)
    assert LIMIT < 2**31


def test_weights_of_earlier_exports_stay_and_are_named(tmp_path: Path) -> None:
    """A copy of the earlier model still reads them. A file of somebody else's that is called nearly so is not taken for one."""
    path, copied = tmp_path / "m.onnx", tmp_path / "copied.onnx"
    first, second = (pn.LSTM(32, 64, norm="layer", rng=seed) for seed in range(2))
    assert pn.export(first, path, external_data=True).left == ()
    own = {p.name for p in tmp_path.glob("*.data")}
    (tmp_path / "m.onnx.notes.data").write_bytes(b"mine")
    copied.write_bytes(path.read_bytes())
    for keywords in ({"external_data": True}, {}):
        report = pn.export(second, path, **keywords)
        assert own <= set(report.left)
        assert str(report).count("left of earlier exports") == len(report.left) == len(own) + (not keywords)
        np.testing.assert_array_equal(pn.load(path).params["weight_hh_l0"], second.params["weight_hh_l0"])
        np.testing.assert_array_equal(pn.load(copied).params["weight_hh_l0"], first.params["weight_hh_l0"])
        assert pn.verify(copied, first).worst_step is not None
    assert pn.export(first, path, external_data=True).left == tuple(
        sorted({p.name for p in tmp_path.glob("*.data")} - own - {"m.onnx.notes.data"})
    )


# -- back again --------------------------------------------------------------------------------------------------------------------------


WITH_EPS = [pytest.param(c, n, marks=pytest.mark.slow) for c, n in IMPLEMENTATIONS if pn.IMPLEMENTATIONS[c][n].eps]


@pytest.mark.parametrize(
    "keywords",
    [{}, *(pytest.param(k, marks=pytest.mark.slow) for k in ({"lengths": False}, {"fold": False}, {"prefix": "p.", "function": True}))],
    ids=str,
)
@pytest.mark.parametrize(("cell", "norm"), [*HEAVY_PRESETS, *WITH_EPS])
def test_load_gives_back_the_layer_bit_by_bit(cell: str, norm: str | None, keywords: dict[str, Any], tmp_path: Path) -> None:
    layer, path = recurrent(cell, norm, bidirectional=True), tmp_path / "m.onnx"
    pn.export(layer, path, **keywords)
    back = pn.load(path)
    assert isinstance(back, Recurrent)
    assert back.state_dict().keys() == layer.state_dict().keys()
    for name, a in layer.state_dict().items():
        np.testing.assert_array_equal(back.state_dict()[name], a, err_msg=name)
    pn.verify(path, back)
    pn.verify(path)


def test_unfolded_weights_are_not_stored_twice(tmp_path: Path) -> None:
    for norm in (None, "layer"):
        layer, path = pn.LSTM(64, 128, norm=norm, rng=0), tmp_path / "m.onnx"
        pn.export(layer, path, lengths=False)
        weights = sum(a.nbytes for a in layer.params.values())
        assert path.stat().st_size < 1.1 * weights + 20_000


def test_load_of_what_export_did_not_write(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with pytest.raises(pn.CheckpointError, match="cannot read"):
        pn.load(path)
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [helper.make_tensor_value_info("x", 1, [1])],
                              [helper.make_tensor_value_info("y", 1, [1])])  # fmt: skip
    onnx.save(helper.make_model(graph), path)
    with pytest.raises(pn.CheckpointError, match=r"was not written by portnorm.export"):
        pn.load(path)


@pytest.mark.parametrize("key", ["portnorm", "portnorm.arrays", "portnorm.graph"])
@pytest.mark.parametrize("text", ["", "{", "[]", '{"layer": 3}', '{"bias_l0": {"dtype": "float32", "shape": [99], "data": "AAAA"}}'])
def test_damaged_metadata(key: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    pn.export(lstm("layer"), path)
    model = onnx.load(path)
    set_props(model, props_of(model) | {key: text})
    onnx.save(model, path)
    with contextlib.suppress(pn.CheckpointError):  # and nothing else
        pn.load(path)
