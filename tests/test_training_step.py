"""Training inside an inference runtime: one update as a graph, looped, follows eager training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import portnorm as pn
import portnorm_onnx.training_step as module
from portnorm.digits import sequential_digits
from portnorm.training import classifier, loss_and_gradients
from tests.cases import LAYERS, PRESETS
from tests.test_export import a_little_off

UPDATES, BATCH = 50, 32


@pytest.mark.parametrize(
    ("norm", "rows", "free"),
    [pytest.param("batch", 64, True, marks=pytest.mark.slow), ("layer", 8, True), pytest.param("layer", 64, False, marks=pytest.mark.slow)],
    ids=["BN, pixel by pixel", "LN, row by row", "LN, pixel by pixel, from eager parameters"],
)
def test_fifty_updates_in_onnxruntime_follow_eager_training(norm: str, rows: int, free: bool, tmp_path: Path) -> None:
    """Digits: the loss of every update within 1e-3 of the eager one.

    The LN-LSTM over 64 pixels amplifies rounding so much that after 50 updates two eager runs, float32 and float64, differ by up to 0.1 in
    their losses; there the loop does not run free: each update starts where the eager run is.
    """
    data, _ = sequential_digits()
    x = data.x.reshape(rows, 64 // rows, -1).swapaxes(1, 2)
    model, optimizer, path = classifier(norm, 64 // rows, 16, 10, rows), pn.Adam(0.003), tmp_path / "step.onnx"
    pn.export_training_step(model, pn.softmax_cross_entropy, optimizer, path, clip=1.0, state=True)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names, values = [o.name for o in session.get_outputs()], {}
    rng, state = np.random.default_rng(0), optimizer.init(model.parameters())
    losses = []
    for _ in range(UPDATES):
        batch = data._replace(x=x).take(rng.integers(0, len(data.labels), BATCH))
        before = model.initial_state(BATCH, noise=0.1, rng=rng)
        feed = {"x": batch.x, "target": batch.labels}
        feed |= dict(zip(("h_0", "c_0", "time_0"), (np.asarray(a) for a in before[0]), strict=False))
        results = dict(zip(names, session.run(names, feed | values if free else feed | model.state_dict()), strict=True))
        values = {name.removeprefix("next."): a for name, a in results.items() if name.startswith("next.")}
        loss, grads = loss_and_gradients(model, batch, before)
        params, state = optimizer.update(model.parameters(), pn.clip_by_global_norm(grads, 1.0)[0], state)
        model.assign(params)
        losses.append((loss, float(results["loss"])))
    eager, found = np.array(losses).T
    np.testing.assert_allclose(found, eager, rtol=1e-3)
    assert np.mean(eager[-5:]) < 0.98 * np.mean(eager[:5])
    for name, a in model.buffers.items():
        np.testing.assert_allclose(values[name], a, rtol=1e-2, atol=1e-3, err_msg=name)


@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_every_preset(cell: str, norm: str | None) -> None:
    layer = LAYERS[cell](2, 4, norm=norm, bidirectional=True, rng=0)
    model = pn.Sequential(layer, pn.Linear(8, 3, rng=0))
    report = pn.export_training_step(model, pn.softmax_cross_entropy, pn.RMSProp(), None, clip=1.0, state=layer.timed, lengths=True)
    assert len(report.trajectories) == module.UPDATES
    assert len(report.body_nodes) == 4


@pytest.mark.parametrize("optimizer", [pn.SGD(0.1), pn.SGD(0.1, momentum=0.9), pn.RMSProp(), pn.Adam(), pn.AdamW()], ids=repr)
def test_every_optimizer(optimizer: Any) -> None:
    model = pn.Sequential(pn.Linear(4, 5, rng=0), pn.BatchNorm(5), pn.Linear(5, 3, rng=0))
    report = pn.export_training_step(model, pn.softmax_cross_entropy, optimizer, None)
    assert report.model is not None
    given, found = ({v.name for v in values} for values in (report.model.graph.input, report.model.graph.output))
    changed = {name.removeprefix("next.") for name in found if name.startswith("next.")}
    assert changed == given - {"x", "target"}
    assert "1.running_var" in changed


def test_embedding_and_stack() -> None:
    """The table's gradient is a scattered addition; ids that repeat add up."""
    model = pn.Sequential(pn.Embedding(5, 4, rng=0), pn.GRU(4, 5, norm="layer", num_layers=2, rng=0), pn.Linear(5, 3, rng=0))
    report = pn.export_training_step(model, pn.softmax_cross_entropy, pn.SGD(0.5), None, lengths=True)
    assert report.model is not None
    assert "ScatterND" in {n.op_type for n in report.model.graph.node}


def test_a_loss_on_numbers() -> None:
    report = pn.export_training_step(pn.LSTM(3, 4, norm="layer", rng=0), pn.mean_squared_error, pn.Adam(), None)
    assert report.model is not None
    assert [d.dim_param or d.dim_value for d in report.model.graph.input[1].type.tensor_type.shape.dim] == ["time", "batch", 4]


def test_labels_in_a_graph() -> None:
    """-100 is ignored there too, and what is no class makes the loss NaN."""
    model = pn.Linear(4, 3, rng=0)
    report = pn.export_training_step(model, pn.softmax_cross_entropy, pn.SGD(0.1), None)
    session = ort.InferenceSession(report.model.SerializeToString())
    x = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    for labels, used in (([0, -100, 2, -100], [0, 2]), ([1, 0, 2, 2], [0, 1, 2, 3])):
        (loss,) = session.run(["loss"], {"x": x, "target": np.array(labels)})
        np.testing.assert_allclose(loss, pn.softmax_cross_entropy(model(x[used]), np.array(labels)[used]), rtol=1e-5)
    for wrong in (3, -1):
        assert np.isnan(session.run(["loss"], {"x": x, "target": np.array([0, wrong, 2, 1])})[0])


def test_a_constant_batch_beyond_the_range_of_squares() -> None:
    model = pn.Sequential(pn.BatchNorm(3), pn.Linear(3, 2, rng=0))
    report = pn.export_training_step(model, pn.mean_squared_error, pn.Adam(), None)
    session = ort.InferenceSession(report.model.SerializeToString())
    feed = {"x": np.full((5, 3), 2e15, dtype=np.float32), "target": np.zeros((5, 2), dtype=np.float32)}
    for name, value in zip([o.name for o in session.get_outputs()], session.run(None, feed), strict=True):
        assert np.all(np.isfinite(value)), name


@pytest.mark.parametrize("optimizer", [pn.SGD(0.1, momentum=0.9), pn.RMSProp(), pn.Adam()], ids=repr)
def test_a_step_of_a_narrow_model_keeps_wide_states(optimizer: Any) -> None:
    model = pn.Sequential(pn.Linear(4, 5, rng=0), pn.BatchNorm(5), pn.Linear(5, 3, rng=0)).to(dtype="float16")
    report = pn.export_training_step(model, pn.softmax_cross_entropy, optimizer, None, clip=1.0)
    types = {o.name: o.type.tensor_type.elem_type for o in report.model.graph.output}
    wide = {n: t for n, t in types.items() if "running" in n or (n.startswith("next.optimizer") and not n.endswith("steps"))}
    assert set(wide.values()) == {onnx.TensorProto.FLOAT}
    assert types["next.0.weight"] == onnx.TensorProto.FLOAT16


def test_a_wrong_update_is_found_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = pn.LSTM(3, 4, norm="layer", rng=0)
    wrong.assign({n: a_little_off(p).astype(p.dtype) if n == "weight_hh_l0" else p for n, p in wrong.params.items()})
    trace = module._trace
    other = module._Step(wrong, pn.mean_squared_error, pn.SGD(0.1), None)
    monkeypatch.setattr(module, "_trace", lambda step, *a, **k: trace(other, *a, **k))
    with pytest.raises(pn.ConformanceError, match="from the float64 run after update 1"):
        pn.export_training_step(pn.LSTM(3, 4, norm="layer", rng=0), pn.mean_squared_error, pn.SGD(0.1), tmp_path / "step.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, pn.softmax_cross_entropy, pn.SGD()), "`model`"),
        ((pn.LSTM(2, 3), lambda y, t: y, pn.SGD()), "`loss`"),
    ],
)
def test_bad_arguments(arguments: Any, message: str) -> None:
    with pytest.raises(pn.UnsupportedError, match=message):
        pn.export_training_step(*arguments, None)
