"""Loops that are written out: the same definition as often as there are steps, for runtimes that have no loop."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import portnorm as pn
from portnorm.__main__ import main
from portnorm_onnx import scan
from portnorm_onnx.runtimes import RUNTIMES
from tests.cases import PRESETS, random_recurrent

STEPS = 5
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "whole": ({}, {"lengths": False}),
    "ragged": ({}, {}),
    "with a mask": ({}, {"mask": True}),
    "from a state": ({}, {"lengths": False, "state": True}),
    "in both directions": ({"bidirectional": True}, {}),
    "two layers, batch first": ({"num_layers": 2, "batch_first": True}, {"state": True}),
    "last step of a reverse one": ({"direction": "reverse", "return_sequences": False}, {"lengths": False}),
}


def unrolled(layer: Any, unroll: bool = True, **keywords: Any) -> Any:
    shape = ("batch", STEPS, 3) if layer.batch_first else (STEPS, "batch", 3)
    return pn.export(layer, None, input_shape=shape, unroll=unroll, **keywords)


CASES = [(*preset, "from a state") for preset in PRESETS] + [
    (cell, norm, form) for cell, norm in (("LSTM", "layer"), ("LSTM", "batch"), ("GRU", "layer"), ("RNN", None)) for form in FORMS
]


@pytest.mark.parametrize(("cell", "norm", "form"), dict.fromkeys(CASES))
def test_every_step_is_written_out(cell: str, norm: Any, form: str, rng: np.random.Generator) -> None:
    """Each weight is there once; the graph passes the gate at its number of steps, where it takes a state also from those after a run."""
    options, keywords = FORMS[form]
    layer = random_recurrent(cell, norm, rng, 3, 4, **options).to(dtype="float32")
    report = unrolled(layer, **keywords)
    types = [n.op_type for n in report.model.graph.node]
    assert not {"Scan", "Loop", "If"} & set(types)
    looped = unrolled(layer, unroll=False, **keywords)
    further = 2 if keywords.get("state") and set(types).isdisjoint({"LSTM", "GRU", "RNN"}) else 0
    assert len(report.trajectories) == len(looped.trajectories) + further
    whole = sum(math.prod(t.dims) for t in report.model.graph.initializer if len(t.dims) > 1 and min(t.dims) > 1)
    loop = looped.model.graph
    bodies = [a.g for n in loop.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH]
    of_loop = sum(math.prod(t.dims) for g in (loop, *bodies) for t in g.initializer if len(t.dims) > 1 and min(t.dims) > 1)
    assert whole <= of_loop


def test_the_layer_comes_back(tmp_path: Path) -> None:
    layer, path = pn.LSTM(3, 4, norm="layer", rng=0), tmp_path / "m.onnx"
    pn.export(layer, path, input_shape=(STEPS, "batch", 3), unroll=True)
    again = pn.load(path)
    for name, array in layer.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name], array)
    assert pn.verify(path).outcomes[0].status == "passed"


@pytest.mark.parametrize(
    "runtime", [pytest.param(n, marks=pytest.mark.runtime(n)) for n in RUNTIMES if n not in ("onnxruntime", "reference")]
)
def test_other_runtimes_run_it(runtime: str, tmp_path: Path) -> None:
    layer, path = pn.GRU(3, 4, norm="layer", bidirectional=True, rng=0), tmp_path / "m.onnx"
    pn.export(layer, path, input_shape=(STEPS, "batch", 3), unroll=True)
    assert pn.verify(path, runtimes=[runtime]).outcomes[0].status == "passed"


def test_what_cannot_be_written_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = pn.LSTM(3, 4, norm="layer", rng=0)
    with pytest.raises(
        pn.UnsupportedError, match=r"`unroll` writes every step out, but their number is open \('time'\); give it by `input_shape`"
    ):
        pn.export(layer, None, unroll=True)
    with pytest.raises(pn.UnsupportedError, match="`unroll` is for sequences"):
        pn.export(layer, None, unroll=True, streaming=True)
    assert unrolled(layer, lengths=False).nodes < 100
    monkeypatch.setattr(scan, "NODES", 70)
    message = r"`unroll` would write 7\d nodes for 5 steps; expected at most 70: give fewer steps by `input_shape`.*`streaming=True`"
    with pytest.raises(pn.UnsupportedError, match=message):
        unrolled(layer, lengths=False)
    monkeypatch.setattr(scan, "NODES", 140)  # of one loop twice as many as it has, of two of them too few
    for keywords in ({"num_layers": 2}, {"bidirectional": True}):
        with pytest.raises(pn.UnsupportedError, match=r"`unroll` would write 1\d\d nodes for 5 steps; expected at most 140"):
            unrolled(pn.LSTM(3, 4, norm="layer", rng=0, **keywords), lengths=False)


SHAPES = {
    "time=5,batch=1": [5, 1, 3],
    "time=5": [5, "batch", 3],
    "5,batch,3": [5, "batch", 3],
    " 5, 1 ,3": [5, 1, 3],
}


@pytest.mark.parametrize("text", SHAPES)
def test_the_command_line_fixes_lengths(text: str, tmp_path: Path) -> None:
    pn.save(pn.LSTM(3, 4, norm="layer", rng=0), tmp_path / "m.safetensors")
    out = tmp_path / "m.onnx"
    assert main(["export", str(tmp_path / "m.safetensors"), "-o", str(out), "--shape", text, "--unroll"]) == 0
    graph = onnx.load(out).graph
    assert [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == SHAPES[text]
    assert "Scan" not in {n.op_type for n in graph.node}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps=5", "`--shape` names 'steps'; LSTM has time, batch"),
        ("time=five", "'time=five' is neither lengths by name, as time=5,batch=1, nor all in order"),
        ("time=5,3", "'time=5,3' is neither"),
        ("5,,3", "'5,,3' is neither"),
        ("5,1", "`input_shape`"),
    ],
)
def test_a_shape_that_does_not_fit_writes_nothing(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pn.save(pn.LSTM(3, 4, rng=0), tmp_path / "m.safetensors")
    with pytest.raises(SystemExit) if "neither" in message else contextlib.nullcontext():
        assert main(["export", str(tmp_path / "m.safetensors"), "-o", str(tmp_path / "m.onnx"), "--shape", text]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "m.onnx").exists()
