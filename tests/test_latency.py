"""`portnorm bench FILE.onnx`: a graph is called as who uses it would, in every runtime asked for; what is not measured says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import portnorm as pn
from portnorm.__main__ import main
from portnorm.arrays import leaves
from portnorm.errors import ExportError, MissingExtraError
from portnorm_onnx import latency
from portnorm_onnx.runtimes import RUNTIMES, Runtime, session_of

QUICK: dict[str, Any] = {"seconds": 0.0, "rounds": 3}


def counted(runtimes: dict[str, Runtime], calls: list[dict[str, Any]], wrong: float = 0.0) -> str:
    """A runtime that keeps what it is given; its name."""

    def load(model: Any) -> Any:
        run = session_of("onnxruntime", model)

        def session(inputs: Any) -> dict[str, Any]:
            calls.append({name: a.copy() for name, a in inputs.items()})
            return {name: np.asarray(a + a.dtype.type(wrong)) for name, a in run(inputs).items()}

        return session

    runtimes["mine"] = Runtime("mine", load, lambda: "1.0", "of a test")
    return "mine"


def test_a_step_is_fed_what_the_one_before_gave(tmp_path: Path, runtimes: dict[str, Runtime]) -> None:
    layer, calls = pn.LSTM(3, 4, norm="batch", rng=0), []  # type: ignore[var-annotated]
    pn.export(layer, tmp_path / "m.onnx", streaming=True, names={"h_0": "hidden", "x": "frame"})
    rows = latency.measure(tmp_path / "m.onnx", [counted(runtimes, calls)], **QUICK)
    assert (rows[0].steps, rows[0].fed) == (None, ("hidden", "c_0", "time_0"))
    assert len(calls) == 1 + 2 + 3
    assert [int(call["time_0"]) for call in calls] == [0, 0, 1, 2, 3, 4]
    state = layer.initial_state(1)
    for call in calls[1:]:
        np.testing.assert_allclose(call["hidden"], next(iter(leaves(state))), atol=1e-5)
        _, state = layer(call["frame"][None], state)
    assert rows[0].calls == 3
    assert 0 < rows[0].least <= rows[0].p50 <= rows[0].p95


def test_a_sequence_has_the_lengths_asked_for(tmp_path: Path, runtimes: dict[str, Runtime]) -> None:
    calls: list[dict[str, Any]] = []
    pn.export(pn.GRU(3, 4, norm="layer", rng=0), tmp_path / "m.onnx")
    rows = latency.measure(tmp_path / "m.onnx", [counted(runtimes, calls)], dims={"time": 7, "batch": 2}, **QUICK)
    assert rows[0].steps == 7
    assert calls[0]["x"].shape == (7, 2, 3)
    assert calls[0]["lengths"].tolist() == [7, 7]
    usual = latency.measure(tmp_path / "m.onnx", ["mine"], **QUICK)
    assert (usual[0].steps, calls[-1]["x"].shape) == (100, (100, 1, 3))
    with pytest.raises(pn.UnsupportedError, match="`--dim` names 'tim'; lengths that are open are batch, time"):
        latency.measure(tmp_path / "m.onnx", ["mine"], dims={"tim": 3}, **QUICK)


@pytest.mark.parametrize("exported", [{}, {"prefix": "p."}, {"mask": True}, {"state": True}, {"quantize": "int8"}, {"external_data": True}])
def test_every_kind_of_graph_is_called(exported: Any, tmp_path: Path) -> None:
    pn.export(pn.Sequential(pn.Embedding(9, 300, rng=0), pn.LSTM(300, 4, rng=0)), tmp_path / "m.onnx", **exported)
    (row,) = latency.measure(tmp_path / "m.onnx", ["onnxruntime"], dims={"time": 3}, **QUICK)
    assert (row.status, row.calls) == ("measured", 3)


def foreign(tmp_path: Path, *inputs: Any) -> Path:
    nodes = [helper.make_node("Identity", [v.name], [f"{v.name}_y"]) for v in inputs]
    outputs = [helper.make_tensor_value_info(f"{v.name}_y", v.type.tensor_type.elem_type, None) for v in inputs]
    graph = helper.make_graph(nodes, "g", list(inputs), outputs)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), tmp_path / "f.onnx")
    return tmp_path / "f.onnx"


@pytest.mark.parametrize("kind", ["FLOAT", "DOUBLE", "FLOAT16", "INT64", "INT32", "UINT8", "BOOL"])
def test_a_graph_that_portnorm_did_not_write_is_measured(kind: str, tmp_path: Path) -> None:
    path = foreign(tmp_path, helper.make_tensor_value_info("a", getattr(TensorProto, kind), ["rows", None, 2]))
    (row,) = latency.measure(path, ["onnxruntime"], dims={"rows": 3, "a.1": 4}, **QUICK)
    assert row.status == "measured"


def test_inputs_of_strings_are_refused_by_name(tmp_path: Path) -> None:
    path = foreign(tmp_path, helper.make_tensor_value_info("words", TensorProto.STRING, [2]))
    with pytest.raises(ExportError, match="'words' is of strings"):
        latency.measure(path, ["onnxruntime"], **QUICK)


def test_runtimes_take_turns_and_say_how_far_apart_they_are(tmp_path: Path, runtimes: dict[str, Runtime]) -> None:
    def load(model: Any) -> Any:
        raise ExportError("it said no")

    def version() -> str:
        raise MissingExtraError("mine is not installed: ask me")

    counted(runtimes, [], wrong=0.5)
    runtimes["refuses"] = Runtime("refuses", load, lambda: "2.0")
    runtimes["absent"] = Runtime("absent", load, version)
    for name in [*runtimes]:
        if name not in ("onnxruntime", "mine", "refuses", "absent"):
            del runtimes[name]
    pn.export(pn.LayerNorm(5), tmp_path / "m.onnx")
    rows = {row.runtime: row for row in latency.measure(tmp_path / "m.onnx", **QUICK)}
    assert {name: row.status for name, row in rows.items()} == {
        "onnxruntime": "measured",
        "mine": "measured",
        "refuses": "does not run",
        "absent": "not installed",
    }
    assert (rows["onnxruntime"].difference, rows["mine"].difference) == (None, pytest.approx(0.5, abs=1e-6))
    assert "it said no" in rows["refuses"].detail
    assert json.loads(json.dumps(rows["absent"].to_dict()))["p50"] is None
    with pytest.raises(ExportError, match=r"no runtime runs .* refuses: it said no"):
        latency.measure(tmp_path / "m.onnx", ["refuses"], **QUICK)
    with pytest.raises(MissingExtraError, match="ask me"):
        latency.measure(tmp_path / "m.onnx", ["onnxruntime", "absent"], **QUICK)


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    pn.export(pn.LSTM(3, 4, norm="layer", rng=0), tmp_path / "s.onnx", streaming=True)
    pn.export(pn.LSTM(3, 4, norm="layer", rng=0), tmp_path / "m.onnx")
    files = [str(tmp_path / "s.onnx"), str(tmp_path / "m.onnx")]
    quick = ["--seconds", "0.01", "--rounds", "1", "--runtimes", "onnxruntime,reference"]
    assert main(["bench", *files, *quick, "--dim", "time=4"]) == 2  # which the step does not have
    assert "lengths that are open are batch" in capsys.readouterr().err
    assert main(["bench", *files, *quick]) == 0
    out = capsys.readouterr().out
    for word in (
        "a step, batch 1, h_0, c_0 fed back",
        "100 steps, batch 1",
        "p50",
        "p95",
        "µs",
        "p50 of a step",
        "onnxruntime",
        "reference",
    ):
        assert word in out
    assert main(["bench", files[1], *quick, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["runtime"], row["status"], row["steps"]) for row in rows] == [(n, "measured", 100) for n in ("onnxruntime", "reference")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["m.onnx", "--runtime", "toaster"], "`--runtime` is 'toaster'; expected some of onnxruntime"),
        (["m.onnx", "NumPy"], "NumPy is no file"),
        (["m.onnx", "--only", "LN"], "`--only` is of engines"),
        (["--runtime", "onnxruntime"], "`--runtime` is of graphs"),
        (["NumPy", "--dim", "time=3"], "`--dim` is of graphs"),
        (["m.onnx", "--dim", "time"], "`--dim` is 'time'; expected NAME=N"),
        (["m.onnx", "--dim", "time=0"], "`--dim` is 'time=0'; expected NAME=N"),
        (["m.onnx", "--rounds", "0"], "`--rounds` is 0"),
        (["m.onnx", "--seconds", "nan"], "`--seconds` is nan"),
        (["m.onnx", "--cores", "-1"], "`--cores` is -1"),
        (["missing.onnx"], "cannot read 'missing.onnx'"),
        (["missing"], "`engines` has 'missing'"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else "",
)
def test_what_does_not_fit_is_named(arguments: list[str], said: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pn.export(pn.LSTM(3, 4, rng=0), tmp_path / "m.onnx")
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_there_is_a_row_for_each_runtime(tmp_path: Path) -> None:
    pn.export(pn.LayerNorm(5), tmp_path / "m.onnx")
    assert [row.runtime for row in latency.measure(tmp_path / "m.onnx", seconds=0.0, rounds=1)] == [*RUNTIMES]
