"""Nothing to compute: sequences without steps that come with a state, a batch of none, no steps; over cells × targets × runtimes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import portnorm as pn
from portnorm.layers.recurrent import Recurrent
from portnorm_onnx import fused
from portnorm_onnx.nothing import unanswered
from portnorm_onnx.runtimes import RUNTIMES, Runtime, session_of
from portnorm_onnx.signature import named_state
from portnorm_onnx.storage import Draft
from portnorm_onnx.targets import TARGETS
from portnorm_onnx.verify import check
from tests.cases import HEAVY_PRESETS, PRESETS
from tests.test_export import LAYERS, lstm, recurrent
from tests.tolerances import ONNX_STEPS

KINDS: dict[str, tuple[int, int, list[int]]] = {
    "some without steps": (3, 4, [3, 0, 2, 0]),
    "all without steps": (3, 2, [0, 0]),
    "no sequences": (3, 0, []),
    "no steps": (0, 2, [0, 0]),
    "neither": (0, 0, []),
}
"""(time, batch, lengths)"""

FORMS: list[dict[str, Any]] = [
    {"lengths": True, "state": True},
    {"lengths": True},
    {"mask": True, "state": True},
    {"lengths": False, "state": True},
    {"lengths": False},
]

ARRANGEMENTS: list[dict[str, Any]] = [{"bidirectional": True}, {"return_sequences": False, "num_layers": 2, "batch_first": True}]

PAIRS = [
    pytest.param(target, name, id=f"{target}-{name}", marks=() if name == "onnxruntime" else pytest.mark.runtime(name))
    for target, row in TARGETS.items()
    for name in row.runtimes
    if not row.further
] + [pytest.param("portable", name, id=f"portable-{name}") for name in ("reference",)]


RUNTIME_NAMES = [pytest.param(n, marks=() if n in ("onnxruntime", "reference") else pytest.mark.runtime(n), id=n) for n in RUNTIMES]


def inputs_of(layer: Recurrent, kind: str, form: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the graph gets, and what the layer gets."""
    (steps, batch, counts), rng = KINDS[kind], np.random.default_rng(0)
    x, lengths = rng.standard_normal((steps, batch, 5)).astype(np.float32), np.array(counts, np.int64)
    mask = np.arange(steps)[:, None] < lengths
    if layer.batch_first:
        x, mask = np.swapaxes(x, 0, 1), mask.T
    given: dict[str, Any] = {"x": x}
    if form.get("mask"):
        given["mask"] = mask
    elif form["lengths"]:
        given["lengths"] = lengths
    feed = dict(given)
    if form.get("state"):
        given["state"] = layer.initial_state(batch, noise=1.0, rng=rng)
        feed |= {name: np.asarray(a) for name, a in named_state(layer, given["state"], "_0").items()}
    return feed, given


def answers(layer: Recurrent, given: Mapping[str, Any]) -> dict[str, Any]:
    y, last = layer(**given)
    return {"y": y} | ({n: np.asarray(a) for n, a in named_state(layer, last, "_n").items()} if "state" in given else {})


@pytest.mark.parametrize(("target", "runtime"), PAIRS)
@pytest.mark.parametrize(("cell", "norm"), HEAVY_PRESETS)
def test_the_runtime_gives_what_the_layer_gives_or_is_not_asked(cell: str, norm: str | None, target: Any, runtime: str) -> None:
    for arrangement in ARRANGEMENTS if runtime == "onnxruntime" else ARRANGEMENTS[:1]:
        layer = recurrent(cell, norm, **arrangement)
        for form in FORMS:
            form = {"mask": False, "state": False, **form}
            proto = pn.export(layer, None, target=target, **form).model
            assert proto is not None
            session = session_of(runtime, proto.SerializeToString())
            for kind in KINDS:
                feed, given = inputs_of(layer, kind, form)
                if unanswered(runtime, proto, layer, feed["x"].shape):
                    assert 0 in feed["x"].shape  # sequences without steps are no reason
                    continue
                found = session(feed)
                for name, expected in answers(layer, given).items():
                    assert found[name].shape == expected.shape
                    np.testing.assert_allclose(found[name], expected, rtol=0, atol=ONNX_STEPS, err_msg=f"{form} {kind} {name}")


def test_who_has_no_answer() -> None:
    """As measured: every operator that is not named here answers, and is asked."""
    plain = {cell: pn.export(recurrent(cell, None), None, lengths=False).model for cell in ("LSTM", "GRU", "RNN")}
    loop = pn.export(lstm("layer"), None, lengths=False).model

    def asked(runtime: str, shape: tuple[int, int, int]) -> list[str]:
        graphs = {"Scan": loop, **plain}
        return [name for name, proto in graphs.items() if proto is not None and not unanswered(runtime, proto, lstm(None), shape)]

    for runtime in ("onnxruntime", "web", "rounded"):
        assert asked(runtime, (0, 2, 5)) == ["LSTM", "RNN"]
        assert asked(runtime, (3, 0, 5)) == ["Scan", "RNN"]
    assert asked("openvino", (0, 2, 5)) == ["LSTM", "GRU", "RNN"]
    for runtime in ("tract", "reference"):
        assert asked(runtime, (0, 2, 5)) == []
    for runtime in ("openvino", "tract", "reference"):
        assert asked(runtime, (3, 0, 5)) == ["Scan", "LSTM", "GRU", "RNN"]
    for runtime in RUNTIMES:
        assert asked(runtime, (3, 2, 5)) == ["Scan", "LSTM", "GRU", "RNN"]


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("runtime", RUNTIME_NAMES)
@pytest.mark.parametrize(("layer", "keywords"), [row[:2] for row in LAYERS], ids=lambda v: repr(v) if isinstance(v, pn.Layer) else None)
def test_layers_without_time_of_an_empty_batch(layer: pn.Layer, keywords: dict[str, Any], runtime: str, mask: bool) -> None:
    proto = pn.export(layer, None, mask=mask, **keywords).model
    assert proto is not None
    (outcome,) = (report := check(Draft(proto), layer, runtimes=(runtime,))).outcomes
    assert outcome.status == "passed"
    assert [c.case.split(",")[0] for c in report.empty] == ["x (0"]


@pytest.mark.parametrize("runtime", RUNTIME_NAMES)
def test_groups_of_one_open_length_have_no_answer_where_the_shape_is_fitted(runtime: str) -> None:
    """To tell the length otherwise does not help: onnxruntime makes a −1 of it."""
    layer = pn.GroupNorm(2, 6)
    proto = pn.export(layer, None).model
    assert proto is not None
    (outcome,) = (report := check(Draft(proto), layer, runtimes=(runtime,))).outcomes
    assert outcome.status == "passed"
    answered = runtime.startswith(("openvino", "tract"))
    assert len(report.empty) == answered
    assert all(c.case.startswith("x (0, 6, ") for c in report.empty)
    refused = unanswered(runtime, proto, layer, (0, 6, 5))
    assert refused == ("" if answered else "no sequences in Reshape to (0, …, −1)")


# -- the gate ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_the_gate_tries_them(cell: str, norm: str | None) -> None:
    report = pn.export(recurrent(cell, norm), None, target="onnxruntime", state=True)
    tried = [c.case for c in report.empty]
    plain = norm in (None, "weight", "batch-input")
    answered = {"Scan": ["x (3, 0, 5) with lengths"], "LSTM": ["x (0, 3, 5) with lengths"], "GRU": [], "RNN": [
        "x (3, 0, 5) with lengths", "x (0, 3, 5) with lengths"]}  # fmt: skip
    assert tried == ["x (3, 3, 5) ragged", *answered[cell if plain else "Scan"]]
    assert report.to_dict()["empty"][0]["case"] == tried[0]


def test_a_state_that_is_not_kept_is_found() -> None:
    """Graphs whose operator gives the last state as it likes."""
    layer = lstm(None)
    report = pn.export(layer, None, target="onnxruntime", state=True)
    assert report.model is not None
    for n in report.model.graph.node:
        if n.op_type == "Where":
            n.op_type = "Identity"
            del n.input[2], n.input[0]
    with pytest.raises(pn.ConformanceError, match=r"'[hc]_n' .*at x \(3, 3, 5\) ragged"):
        check(Draft(report.model), layer, runtimes=("onnxruntime",))


def test_a_state_that_no_steps_change_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_has_steps", lambda x: None)
    with pytest.raises(pn.ConformanceError, match=r"'[hc]_n' .*at x \(0, 3, 5\)"):
        pn.export(lstm(None), None, lengths=False, state=True)


@pytest.mark.parametrize(
    ("layer", "shape", "lacking"),
    [
        (lstm(None), (3, 0, 5), "no sequences in LSTM"),
        (recurrent("GRU", None), (0, 2, 5), "no steps in GRU"),
        (lstm("layer"), (0, 2, 5), "no steps in Scan"),
    ],
    ids=str,
)
def test_what_has_no_answer_is_refused_before_the_runtime_gets_it(
    layer: Recurrent, shape: tuple[int, ...], lacking: str, tmp_path: Path, runtimes: dict[str, Runtime]
) -> None:
    path, x = tmp_path / "m.onnx", np.zeros(shape, np.float32)
    pn.export(layer, path)

    def load(model: Any) -> Any:
        return lambda feed: pytest.fail(f"the runtime got {feed['x'].shape}")

    runtimes["onnxruntime"] = replace(runtimes["onnxruntime"], load=load)
    with pytest.raises(
        pn.ExportError, match=rf"onnxruntime does not run the graph on `x` of shape .*it has no answer for {lacking}; leave"
    ):
        pn.verify(path, layer, inputs=[x])
    for name in runtimes.keys() - {"onnxruntime"}:
        del runtimes[name]
    (outcome,) = pn.verify(path, layer, inputs=[x], runtimes="all").outcomes
    assert outcome.status == "does not run"


# -- compiled ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("cell", "norm"), HEAVY_PRESETS)
def test_a_compiled_model_keeps_the_state(cell: str, norm: str | None, form: dict[str, Any], kind: str) -> None:
    layer = recurrent(cell, norm, **ARRANGEMENTS[0])
    _, given = inputs_of(layer, kind, form)
    (y, after), (expected, last) = pn.compile(layer)(**given), layer(**given)
    for found, a in zip((y, *after), (expected, *last), strict=True):
        assert found.shape == a.shape
        np.testing.assert_allclose(found, a, rtol=0, atol=ONNX_STEPS)


@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_streams_in_chunks_keep_their_state_when_they_end(cell: str, norm: str | None) -> None:
    layer, lengths = recurrent(cell, norm), np.array([9, 4, 0, 6])
    fast, x = pn.compile(layer), np.random.default_rng(0).standard_normal((9, 4, 5)).astype(np.float32)
    state = layer.initial_state(4, noise=1.0, rng=1)
    _, expected = layer(x, state, lengths)
    for t in range(0, 9, 3):
        _, state = fast(x[t : t + 3], state, np.clip(lengths - t, 0, 3))
    for found, a in zip(state, expected, strict=True):
        np.testing.assert_allclose(found, a, rtol=0, atol=ONNX_STEPS)


def test_streaming_graphs_of_an_empty_batch() -> None:
    report = pn.export(lstm("layer"), None, streaming=True)
    assert [c.case for c in report.empty] == ["x (3, 0, 5)"]
    assert report.model is not None
    assert isinstance(report.model, onnx.ModelProto)
