"""Exported graphs: small, dynamic, equal to the model by two gates, and written only then."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

import portnorm as pn
import portnorm_onnx.export as export_module
from portnorm.layers.recurrent import Recurrent
from portnorm_onnx.bounds import STEP_ULP, nudged
from portnorm_onnx.lowering import OPSETS
from portnorm_onnx.storage import weights_of
from tests.cases import COMBINATIONS, HEAVY_PRESETS, IMPLEMENTATIONS, random_recurrent
from tests.tolerances import ONNX_OPERATOR


def recurrent(cell: str, norm: str | pn.Variant | None, **keywords: Any) -> Recurrent:
    """A float32 layer with random parameters and statistics."""
    return random_recurrent(cell, norm, np.random.default_rng(3), inputs=5, hidden=8, **keywords).to(dtype="float32")


def lstm(norm: str | None, **keywords: Any) -> Recurrent:
    return recurrent("LSTM", norm, **keywords)


def run(model: onnx.ModelProto, **inputs: Any) -> list[Any]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


FUSED = (None, "weight", "batch-input")


@pytest.mark.parametrize("opset", sorted(OPSETS))
@pytest.mark.parametrize(("cell", "norm"), HEAVY_PRESETS)
def test_every_preset_at_every_opset(cell: str, norm: str | None, opset: int) -> None:
    report = pn.export(recurrent(cell, norm), None, opset=opset, target="portable" if opset <= 26 else "onnxruntime")
    assert report.opset == opset
    assert len(report.body_nodes) == (norm not in FUSED)  # a plain cell, or one whose norms fold away, is an operator instead of a loop
    assert report.worst_step is not None
    assert len(report.trajectories) == 4


@pytest.mark.parametrize(
    "keywords",
    [{"num_layers": 2, "bidirectional": True}, {"batch_first": True}, {"return_sequences": False, "bidirectional": True}],
    ids=["stack of both directions", "batch first", "last state"],
)
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize(("cell", "norm"), HEAVY_PRESETS)
def test_every_arrangement(cell: str, norm: str | None, keywords: dict[str, Any], state: bool, lengths: bool) -> None:
    layer = recurrent(cell, norm, **keywords)
    report = pn.export(layer, None, state=state, lengths=lengths)
    assert report.model is not None
    names = [i.name for i in report.model.graph.input]
    assert names == ["x"] + ["lengths"] * lengths + ([f"{s}_0" for s in layer.cell.states] + ["time_0"] * layer.timed) * state


@pytest.mark.parametrize(("cell", "name"), [row for row in IMPLEMENTATIONS if row[1] != "fastrnns-decomposed"])
def test_published_cell(cell: str, name: str) -> None:
    """Without ε (fastrnns-decomposed) the zero state that a graph starts from has no direction: NaN there and here."""
    assert pn.export(recurrent(cell, name, bidirectional=True), None).worst_step is not None


@pytest.mark.parametrize("norm", [None, "layer", "batch"])
def test_projection(norm: str | None) -> None:
    layer = recurrent("LSTM", norm, proj_size=2, num_layers=2)
    assert pn.export(layer, None, state=True).worst_step is not None
    assert pn.export(layer, None).worst_step is not None


@pytest.mark.parametrize(("cell", "variant"), COMBINATIONS)
def test_any_row_that_a_user_may_write(cell: str, variant: pn.Variant) -> None:
    assert pn.export(recurrent(cell, variant), None).worst_step is not None


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("place", "variance"), [("std", "biased"), ("variance", "unbiased"), ("variance", "biased")])
@pytest.mark.parametrize("terms", ["sum", "hidden", "separate"])
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_statistics_that_all_steps_share(cell: str, terms: Any, place: Any, variance: Any, streaming: bool) -> None:
    variant = pn.Variant("mine", norm="batch", terms=terms, eps_place=place, variance=variance, early=("bias",))
    report = pn.export(recurrent(cell, variant, t_max=1), None, streaming=streaming)
    assert report.worst_step is not None


LAYERS = [
    (pn.LayerNorm(7), {}, 1),
    (pn.LayerNorm((3, 7)), {}, 1),
    (pn.LayerNorm(7, bias=False), {}, 1),
    (pn.LayerNorm(7, affine=False), {}, 1),
    (pn.RMSNorm(7), {"opset": 23}, 1),
    (pn.RMSNorm(7), {"opset": 18}, None),
    (pn.BatchNorm(3), {}, 1),
    (pn.BatchNorm(3), {"input_shape": ("batch", 3, "height", "width")}, 1),
    (pn.BatchNorm(3, channel_axis=-1), {"input_shape": ("batch", "space", 3)}, None),
    (pn.InstanceNorm(3, affine=True), {}, 1),
    (pn.InstanceNorm(3), {"input_shape": ("batch", 3, "height", "width")}, 1),
    (pn.InstanceNorm(3, track_running_stats=True), {"input_shape": ("batch", 3, "height")}, 1),
    (pn.GroupNorm(2, 6), {"input_shape": ("batch", 6, 5)}, None),
    (pn.GroupNorm(2, 6), {"input_shape": ("batch", 6, "height", "width")}, None),
    (pn.GroupNorm(2, 6, channel_axis=-1), {}, None),
    (pn.Linear(3, 4), {}, 2),
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("layer", "keywords", "nodes"), LAYERS, ids=lambda v: repr(v) if isinstance(v, pn.Layer) else None)
def test_layers_without_time(layer: pn.Layer, keywords: dict[str, Any], nodes: int | None, dtype: str) -> None:
    rng = np.random.default_rng(1)
    layer = layer.to(dtype=dtype)
    layer.load_state_dict({n: a + rng.uniform(0.1, 1.0, a.shape) if a.ndim else a for n, a in layer.state_dict().items()})
    report = pn.export(layer, None, **keywords)
    traced = dtype == "float64" and isinstance(layer, pn.InstanceNorm)  # onnxruntime has no InstanceNormalization for float64
    assert nodes is None or traced or report.nodes == nodes


@pytest.mark.parametrize("layer", [pn.LayerNorm(7), pn.InstanceNorm(3, affine=True)], ids=repr)
def test_float16_layers_are_one_operator(layer: pn.Layer) -> None:
    assert pn.export(layer, None, dtype="float16", target="onnxruntime").nodes == 1


def test_statistics_in_a_float16_graph_are_wide() -> None:
    """A variance beyond float16 is no infinity there."""
    layer = pn.BatchNorm(3)
    layer.assign(layer.params, {**layer.buffers, "running_var": np.array([1e5, 4.0, 1e-9], "float32")})
    x = (np.array([300.0, 2.0, 1e-2]) * np.random.default_rng(0).standard_normal((50, 3))).astype("float32")
    report = pn.export(layer, None, dtype="float16", inputs=[x.astype("float16")])
    assert report.model is not None
    kept = [onnx.numpy_helper.to_array(i) for i in report.model.graph.initializer if i.name.startswith("running")]
    assert kept
    assert all(a.dtype == np.float32 for a in kept)


def test_a_model_of_several_layers() -> None:
    model = pn.Sequential(
        pn.Linear(3, 5, rng=0), pn.BatchNorm(5, channel_axis=-1), lstm("batch"), pn.LayerNorm(8), lstm_of_8(), pn.Linear(8, 2)
    )
    report = pn.export(model, None)
    assert len(report.body_nodes) == 2
    assert report.worst_step is not None


def test_embedding_recurrent_linear_is_one_graph() -> None:
    model = pn.Sequential(pn.Embedding(96, 16, rng=0), pn.GRU(16, 8, norm="layer", num_layers=2, rng=0), pn.Linear(8, 96, rng=0))
    report = pn.export(model, None)
    assert report.model is not None
    assert report.model.graph.input[0].type.tensor_type.elem_type == 7
    assert report.worst_step is not None


def lstm_of_8() -> pn.LSTM:
    return pn.LSTM(8, 8, norm="layer", rng=0)


def test_size_and_speed_of_the_ln_lstm() -> None:
    model, seconds = pn.LSTM(64, 128, norm="layer", rng=0), []
    for _ in range(3):  # the machine may be busy with other tests: the best of three
        started = time.perf_counter()
        report = pn.export(model, None)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1.0
    assert report.nodes <= 8
    assert report.body_nodes[0] <= 20
    assert len(report.body_nodes) == 1


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("steps", [1, 64, 1000])
def test_one_file_runs_at_any_length_and_batch(steps: int, batch: int, tmp_path: Path) -> None:
    model, path = pn.LSTM(5, 8, norm="layer", rng=0), tmp_path / "m.onnx"
    pn.export(model, path)
    x = np.random.default_rng(0).standard_normal((steps, batch, 5)).astype(np.float32)
    report = pn.verify(path, model, inputs=[x])
    assert report.trajectories[0].case == f"x {(steps, batch, 5)}"
    assert report.steps[0].case == f"one step at each of {steps}"


def test_dimensions_have_names() -> None:
    model = pn.export(lstm("layer"), None).model
    dims = {v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim] for v in (*model.graph.input, *model.graph.output)}
    assert dims == {"x": ["time", "batch", 5], "lengths": ["batch"], "y": ["time", "batch", 8]}


# Places of portnorm's gates in the order of ONNX (LSTM: i, o, f, g; GRU: z, r, n).
ONNX_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
RESET_BEFORE = pn.Variant(source="Cho et al. 2014", biases=("bias_ih", "bias_hh"), reset="before")


@pytest.mark.parametrize(
    ("cell", "norm", "attributes"),
    [("LSTM", None, {}), ("GRU", None, {"linear_before_reset": 1}), ("GRU", RESET_BEFORE, {"linear_before_reset": 0}), ("RNN", None, {})],
    ids=["LSTM", "GRU", "GRU, reset before", "RNN"],
)
def test_plain_layer_is_onnxruntimes_operator(cell: str, norm: Any, attributes: dict[str, int]) -> None:
    rng, layer = np.random.default_rng(0), recurrent(cell, norm, bidirectional=True)
    x, lengths = rng.standard_normal((5, 3, 5)).astype(np.float32), np.array([5, 2, 4])
    state = tuple(rng.standard_normal((2, 3, 8)).astype(np.float32) for _ in layer.cell.states)
    order = ONNX_GATES[cell]

    def weights(name: str) -> Any:
        """(directions, gates, …) in the order of ONNX."""
        rows = [layer.params[f"{name}_l0{suffix}"].reshape(len(order), 8, -1)[list(order)] for suffix in ("", "_reverse")]
        return np.stack([row.reshape(len(order) * 8, -1) for row in rows])

    bias = np.concatenate([weights("bias_ih"), weights("bias_hh")], axis=1)[..., 0]
    inputs = {"X": x, "W": weights("weight_ih"), "R": weights("weight_hh"), "B": bias, "lengths": lengths.astype(np.int32)}
    inputs |= dict(zip(layer.cell.states, state, strict=True))
    results = ["Y", "Y_h", "Y_c"][: 1 + len(state)]
    node = helper.make_node(cell, list(inputs), results, hidden_size=8, direction="bidirectional", **attributes)
    values = [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in inputs.items()]
    outputs = [helper.make_tensor_value_info(n, 1, None) for n in results]
    model = helper.make_model(helper.make_graph([node], "g", values, outputs), opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    their_y, *their_state = run(model, **inputs)
    y, last = layer(x, state, lengths)
    np.testing.assert_allclose(y, their_y.transpose(0, 2, 1, 3).reshape(5, 3, 16), rtol=0, atol=ONNX_OPERATOR)
    for mine, other in zip(last, their_state, strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=ONNX_OPERATOR)


# -- a wrong graph is found, and leaves nothing behind -----------------------------------------------------------------------------------


def spoiled(model: onnx.ModelProto, name: str, change: Any) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in weights_of(copy.graph):
        if name in tensor.name:
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(change(values).astype(values.dtype), tensor.name))
            return copy
    raise AssertionError(name)


def a_little_off(w: Any) -> Any:
    """By 1e-4, not by a factor or a shift of all, to which normalization is blind."""
    return w + 1e-4 * np.random.default_rng(0).choice([-1.0, 1.0], w.shape)


@pytest.mark.parametrize("name", ["weight_hh_l0", "weight_ih_l0", "norm_c_l0.weight", "norm_hh_l0.weight"])
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_a_wrong_weight_is_found(norm: str, name: str, tmp_path: Path) -> None:
    model = lstm(norm)
    path = tmp_path / "m.onnx"
    wrong = spoiled(pn.export(model, None, fold=False).model, name, a_little_off)
    path.write_bytes(wrong.SerializeToString())
    with pytest.raises(pn.ConformanceError, match=r"onnxruntime: .*'y'|_out_0"):
        pn.verify(path, model)


def test_the_one_step_gate_sees_what_the_trajectory_of_a_chaotic_net_hides(tmp_path: Path) -> None:
    """Gain 3: after 400 steps float32 itself is far from float64, and only the one-step gate can tell a wrong gain."""
    variant = pn.Variant(source="test", norm="layer", cell="copy", gain=3.0)
    model = pn.LSTM(5, 32, norm=variant, rng=0)
    path = tmp_path / "m.onnx"
    wrong = spoiled(pn.export(model, None).model, "norm_hh_l0.weight", a_little_off)
    path.write_bytes(wrong.SerializeToString())
    x = np.random.default_rng(0).standard_normal((400, 2, 5)).astype(np.float32)
    with pytest.raises(pn.ConformanceError, match="at step"):
        pn.verify(path, model, inputs=[x])


@pytest.mark.parametrize("cell", [pn.LSTM, pn.GRU, pn.RNN], ids=lambda c: c.__name__)
def test_weights_that_differ_by_rounding_pass(cell: Any, tmp_path: Path) -> None:
    """Gains of 10 over a single input, as training on pixels makes them: one step amplifies rounding."""
    for seed in range(6):
        rng, path = np.random.default_rng(seed), tmp_path / f"{seed}.onnx"
        model = cell(1, 48, norm="layer", rng=seed)
        weights = {n: np.asarray(a) for n, a in model.params.items()}
        model.assign({n: (a + 10 * rng.standard_normal(a.shape)).astype(a.dtype) if "norm" in n else a for n, a in weights.items()})
        pn.export(model, path)
        model.assign({n: nudged(np.asarray(a), 100 + seed) for n, a in model.params.items()})
        pn.verify(path, model)


def test_a_failed_check_writes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace, path = export_module.trace, tmp_path / "m.onnx"
    monkeypatch.setattr(export_module, "trace", lambda *a, **k: spoiled(trace(*a, **k), "weight_hh", a_little_off))
    with pytest.raises(pn.ConformanceError):
        pn.export(lstm("layer"), path)
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"what was there before")
    with pytest.raises(pn.ConformanceError):
        pn.export(lstm("layer"), path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert path.read_bytes() == b"what was there before"


@pytest.mark.parametrize(
    ("error", "seen"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError("no space left"), pn.PortnormError)],
    ids=["interrupt", "disk full"],
)
def test_an_interrupted_write_leaves_what_was_there(error: Any, seen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"before")

    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr("portnorm.files.os.replace", fail)
    with pytest.raises(seen):
        pn.export(lstm(None), path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert path.read_bytes() == b"before"


@pytest.mark.parametrize("opset", [-1, 0, 16, 29, "18", True])
def test_unknown_opset(opset: Any) -> None:
    with pytest.raises(pn.UnsupportedError, match=r"`opset` is .*expected a number from 17 to 26 for target 'portable'$"):
        pn.export(lstm(None), None, opset=opset)


NEWEST = [v for v in OPSETS if v > 26]


@pytest.mark.parametrize("opset", NEWEST)
@pytest.mark.parametrize("target", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.runtime("openvino")),
                                    pytest.param("tract", marks=pytest.mark.runtime("tract"))])  # fmt: skip
@pytest.mark.parametrize("norm", [None, "layer", "batch"])
def test_the_newest_opsets_where_they_are_read(norm: str | None, target: Any, opset: int, tmp_path: Path) -> None:
    path, layer = tmp_path / "m.onnx", lstm(norm)
    assert pn.export(layer, path, opset=opset, target=target).opset == opset
    assert pn.verify(path, layer, runtimes=target).outcomes[0].status == "passed"


@pytest.mark.parametrize("opset", NEWEST)
@pytest.mark.parametrize("target", ["portable", "web", "tensorrt"])
def test_the_newest_opsets_where_they_are_not_read(target: Any, opset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    last = 22 if target == "tensorrt" else 26
    with pytest.raises(pn.UnsupportedError, match=rf"`opset` is {opset}; expected .* 17 to {last} for .*target='onnxruntime' or"):
        pn.export(lstm(None), None, opset=opset, target=target)
    monkeypatch.setattr(export_module, "loads_opset", lambda version: False)
    with pytest.raises(pn.UnsupportedError, match=rf"`opset` is {opset}, which the installed onnxruntime does not load; expected .* 26"):
        pn.export(lstm(None), None, opset=opset, target="onnxruntime")


def test_verify_of_what_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with pytest.raises(pn.ExportError, match="cannot read"):
        pn.verify(path, lstm(None))
    path.write_bytes(b"\x00\x01 no model")
    with pytest.raises(pn.ExportError, match=r"is no ONNX model$"):
        pn.verify(path, lstm(None))


def test_verify_against_another_shape(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    pn.export(lstm("layer"), path)
    with pytest.raises(pn.PortnormError):
        pn.verify(path, pn.LSTM(6, 8, norm="layer"))
    with pytest.raises(pn.PortnormError):
        pn.verify(path, lstm("layer"), runtimes=("no-such-runtime",))


def test_a_check_of_nothing_is_refused(tmp_path: Path) -> None:
    for layer in (lstm("layer"), pn.LayerNorm(5)):
        pn.export(layer, tmp_path / "m.onnx")
        with pytest.raises(pn.UnsupportedError, match="`inputs` is empty"):
            pn.verify(tmp_path / "m.onnx", layer, inputs=[])
        with pytest.raises(pn.UnsupportedError, match="`runtimes` is empty"):
            pn.verify(tmp_path / "m.onnx", layer, runtimes=())


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("shape", [("a", "b"), ("a", 5), (2, 5), ("a", "b", "c")], ids=str)
def test_an_input_that_does_not_fit_a_linear_is_named(shape: tuple[int | str, ...], quantize: Any) -> None:
    with pytest.raises(pn.ShapeError, match="expected"):
        pn.export(pn.Sequential(pn.Linear(4, 3, quantize=quantize, rng=0), pn.LayerNorm(3)), None, input_shape=shape)


def test_the_bound_of_one_step_is_what_is_promised() -> None:
    assert STEP_ULP["float32"] * np.finfo(np.float32).eps <= 2e-6


def test_population_statistics_are_in_the_graph() -> None:
    """A BN-LSTM is exported with its running statistics: other statistics, another graph."""
    layer = lstm("batch")
    x = np.random.default_rng(0).standard_normal((6, 3, 5)).astype(np.float32)
    before = run(pn.export(layer, None).model, x=x, lengths=np.full(3, 6))[0]
    layer.estimate_population([x * 2 + 1])
    after = run(pn.export(layer, None).model, x=x, lengths=np.full(3, 6))[0]
    np.testing.assert_allclose(after, layer(x)[0], atol=1e-5)
    assert np.max(np.abs(after - before)) > 1e-2


def test_inference_of_batch_renormalization_is_the_graph_of_batch_normalization() -> None:
    for settings in ({}, {"channel_axis": -1}):
        graphs = [pn.export(kind(4, **settings), None, metadata=False).model.graph for kind in (pn.BatchNorm, pn.BatchRenorm)]
        assert graphs[0].input[0] == graphs[1].input[0]
        assert [n.op_type for n in graphs[0].node] == [n.op_type for n in graphs[1].node]
