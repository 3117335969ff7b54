"""Exported graphs in every inference runtime that is installed; what is not installed is said, what crashes is an error."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import portnorm as pn
from portnorm.__main__ import main
from portnorm_onnx.conformance import layers
from portnorm_onnx.runtimes import RUNTIMES, Runtime, session_of
from portnorm_onnx.storage import Draft
from portnorm_onnx.verify import check
from portnorm_onnx.workers import Worker
from tests.processes import output_of
from tests.test_export import a_little_off, lstm, spoiled

BFLOAT16, FLOAT = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT

NAMES = [pytest.param(name, marks=[] if name in ("onnxruntime", "reference") else pytest.mark.runtime(name), id=name) for name in RUNTIMES]
EVERY = [pytest.param(layer, keywords, id=name) for name, layer, keywords in layers()]


@pytest.mark.slow
@pytest.mark.parametrize("runtime", NAMES)
@pytest.mark.parametrize(("layer", "keywords"), EVERY)
def test_every_portable_graph(layer: pn.Layer, keywords: dict[str, Any], runtime: str) -> None:
    report = pn.export(layer, None, **keywords)
    (outcome,) = check(Draft(report.model), layer, runtimes=(runtime,)).outcomes
    assert outcome.status == "passed"
    assert outcome.version


@pytest.mark.parametrize("runtime", NAMES)
@pytest.mark.parametrize(
    "keywords",
    [
        {"streaming": True},
        {"state": True},
        {"fold": False},
        {"function": True, "prefix": "a/"},
        {"names": {"x": "in", "y": "out"}},
        {"dtype": "float16"},
        {"external_data": True},
        {"opset": 23},
    ],
    ids=str,
)
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_every_form_of_a_graph(norm: str, keywords: dict[str, Any], runtime: str, tmp_path: Path) -> None:
    layer, path = lstm(norm), tmp_path / "m.onnx"
    pn.export(layer, path, **keywords)
    assert pn.verify(path, layer, runtimes=runtime).outcomes[0].status == "passed"


@pytest.mark.parametrize("runtime", NAMES)
def test_a_wrong_graph_is_found(runtime: str) -> None:
    layer = lstm("layer")
    wrong = spoiled(pn.export(layer, None).model, "weight_hh_l0", a_little_off)
    with pytest.raises(pn.ConformanceError, match=f"^{runtime}: "):
        check(Draft(wrong), layer, runtimes=(runtime,))


@pytest.mark.parametrize("runtime", NAMES)
def test_what_is_no_model_is_an_error_and_the_next_model_runs(runtime: str) -> None:
    nothing = helper.make_model(
        helper.make_graph(
            [helper.make_node("NoSuchOperator", ["x"], ["y"])],
            "g",
            [helper.make_tensor_value_info("x", 1, [2])],
            [helper.make_tensor_value_info("y", 1, [2])],
        )
    )
    with pytest.raises(pn.ExportError):
        session_of(runtime, nothing.SerializeToString())({"x": np.zeros(2, np.float32)})
    report = pn.export(pn.LayerNorm(4), None)
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    found = session_of(runtime, report.model.SerializeToString())({"x": x})
    np.testing.assert_allclose(found["y"], pn.LayerNorm(4)(x), atol=2e-6)


def test_bfloat16_by_float32_and_rounding() -> None:
    """Bit by bit what every result rounded gives, in a loop too; operators whose float32 results are exact or correctly rounded."""

    def info(name: str, dtype: int, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, dtype, list(shape))

    factor = np.array([0.9], ml_dtypes.bfloat16)
    body = helper.make_graph(
        [helper.make_node("Mul", ["c", "factor"], ["scaled"]), helper.make_node("Add", ["scaled", "x_t"], ["next"])],
        "body",
        [info("c", BFLOAT16, 3), info("x_t", BFLOAT16, 3)],
        [info("next", BFLOAT16, 3)],
        [numpy_helper.from_array(factor, "factor")],
    )
    wide = [helper.make_node("Cast", ["last"], ["wide"], to=FLOAT), helper.make_node("Sqrt", ["wide"], ["root"])]
    graph = helper.make_graph(
        [helper.make_node("Scan", ["zero", "x"], ["last"], body=body, num_scan_inputs=1), *wide],
        "g",
        [info("zero", BFLOAT16, 3), info("x", BFLOAT16, "time", 3)],
        [info("last", BFLOAT16, 3), info("root", FLOAT, 3)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()
    x = np.abs(np.random.default_rng(0).standard_normal((40, 3))).astype(ml_dtypes.bfloat16)
    expected, exact = np.zeros(3, ml_dtypes.bfloat16), np.zeros(3, np.float32)
    for x_t in x:
        expected = (expected * factor).astype(ml_dtypes.bfloat16) + x_t
        exact = exact * factor.astype(np.float32) + x_t.astype(np.float32)
    feed = {"zero": np.zeros(3, ml_dtypes.bfloat16), "x": x}
    found = session_of("rounded", model)(feed)
    assert (found["last"].dtype, found["root"].dtype) == (ml_dtypes.bfloat16, np.float32)
    np.testing.assert_array_equal(found["last"].view(np.uint16), expected.view(np.uint16))
    np.testing.assert_array_equal(found["root"], np.sqrt(expected.astype(np.float32)))  # what is float32 is not rounded
    np.testing.assert_allclose(session_of("unrounded", model)(feed)["last"], exact, rtol=1e-6)
    assert np.max(np.abs(expected.astype(np.float32) - exact)) > 1e-2


def test_bfloat16_of_an_unknown_type_is_not_left_unrounded() -> None:
    unknown = helper.make_model(
        helper.make_graph(
            [helper.make_node("NoSuchOperator", ["x"], ["z"], name="n"), helper.make_node("Identity", ["z"], ["y"])],
            "g",
            [helper.make_tensor_value_info("x", BFLOAT16, [2])],
            [helper.make_tensor_value_info("y", BFLOAT16, [2])],
        )
    )
    with pytest.raises(pn.ExportError, match=r"does not tell the type of 'z', which NoSuchOperator \(node 'n'\) gives"):
        session_of("rounded", unknown.SerializeToString())


@pytest.mark.parametrize(
    "layer",
    [pn.LSTM(16, 512, norm="layer", rng=0), pn.Sequential(pn.Linear(64, 1024, rng=0), pn.LayerNorm(1024))],
    ids=["LSTM", "LayerNorm"],
)
def test_bfloat16_of_wide_layers(layer: pn.Layer, tmp_path: Path) -> None:
    """onnx's evaluator, with its sums in bfloat16, refuses these."""
    path = tmp_path / "m.onnx"
    report = pn.export(layer, path, dtype="bfloat16", target="openvino", external_data=True)
    assert {c.runtime for c in (*report.steps, *report.trajectories)} == {"rounded"}
    with pytest.raises(pn.ConformanceError, match=r"^reference: "):
        pn.verify(path, runtimes="reference")
    assert pn.verify(path, runtimes="rounded").outcomes[0].status == "passed"
    inside = pn.export(layer, None, dtype="bfloat16", target="openvino").model
    wrong = spoiled(inside, "weight_hh_l0" if layer.recurrent else "0.weight", np.zeros_like)
    with pytest.raises(pn.ConformanceError, match=r"^rounded: "):
        check(Draft(wrong), layer, runtimes=("rounded",))


@pytest.mark.runtime("openvino")
def test_openvino_forks_nothing_and_sends_nothing() -> None:
    code = """
import os, sys, time
os.register_at_fork(before=lambda: os.write(1, b"fork "))
import numpy as np, portnorm as pn
from portnorm_onnx.runtimes import session_of
session_of("openvino", pn.export(pn.LayerNorm(4), None).model.SerializeToString())({"x": np.ones((2, 4), np.float32)})
time.sleep(1)
print(any(name.startswith("openvino_telemetry.") for name in sys.modules))
"""
    assert output_of(code) == "False"


ENDS_ITSELF = """
import json, os, signal, sys
import onnx
from portnorm_onnx.workers import arrays_of, send
asked, answers, models = sys.stdin.buffer, sys.stdout.buffer, {}
def obey(order):
    if order == "exit":
        os._exit(3)
    if order == "signal":
        os.kill(os.getpid(), signal.SIGKILL)
while line := asked.readline():
    head = json.loads(line)
    if "load" in head:
        at_load, models[head["session"]] = onnx.load(head["load"]).producer_name.split()
        obey(at_load)
        send(answers, {})
    else:
        given = arrays_of(head, asked)
        obey(models[head["session"]])
        send(answers, {"y": 2 * given["x"]})
"""
"""A worker that does what the producer of a model says, one word when it is loaded and one when it runs: it goes on, or ends itself."""


def told(words: str) -> bytes:
    return helper.make_model(helper.make_graph([], "g", [], []), producer_name=words).SerializeToString()


@pytest.mark.parametrize(("end", "code"), [("exit", "3"), ("signal", "-9")])
@pytest.mark.parametrize(("model", "failed"), [("{} go", "does not load"), ("go {}", "does not run")], ids=["load", "run"])
def test_a_worker_that_ends_is_an_error_and_the_next_model_runs(
    model: str, failed: str, end: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Worker, "_running", {})
    command, x = [sys.executable, "-c", ENDS_ITSELF], np.ones(3, np.float32)
    for _ in range(2):
        with pytest.raises(pn.ExportError, match=f"^thing {failed} the graph: its process ended with {code}: it said nothing$"):
            Worker.of("thing", command).load(told(model.format(end)))({"x": x})
        after = Worker.of("thing", command)
        np.testing.assert_array_equal(after.load(told("go go"))({"x": x})["y"], 2 * x)
        assert Worker.of("thing", command) is after
    after.close()


@pytest.mark.runtime("tract")
def test_when_the_process_of_tract_was_ended_the_next_model_runs() -> None:
    layer = lstm(None)
    report = pn.export(layer, None)
    session = session_of("tract", report.model.SerializeToString())
    Worker._running["tract"]._process.kill()
    with pytest.raises(pn.ExportError, match="tract does not run the graph: its process ended with -9"):
        session({"x": np.ones((2, 3, 5), np.float32)})
    assert check(Draft(report.model), layer, runtimes=("tract",)).outcomes[0].status == "passed"


def test_a_process_that_ends_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Worker, "_running", {})
    worker = Worker.of("thing", [sys.executable, "-c", "import sys; sys.stderr.write('an error: no luck'); sys.exit(3)"])
    with pytest.raises(pn.ExportError, match="thing does not load the graph: its process ended with 3: an error: no luck"):
        worker.load(b"")


def test_what_is_not_installed_is_named_and_never_passes(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, version = tmp_path / "m.onnx", importlib.metadata.version

    def without(name: str) -> str:
        if name in ("openvino", "tract"):
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    pn.export(lstm("layer"), path)
    monkeypatch.setattr(importlib.metadata, "version", without)
    monkeypatch.setattr("portnorm_onnx.runtimes.shutil.which", lambda name: None)
    outcomes = {o.runtime: o for o in pn.verify(path, runtimes="all").outcomes}
    assert outcomes.keys() == RUNTIMES.keys()
    for name in ("openvino", "openvino-default", "tract"):
        assert outcomes[name].status == "not installed"
        assert 'pip install ".[runtimes]"' in outcomes[name].detail
    assert outcomes["web"].status == outcomes["web-page"].status == "not installed"
    assert outcomes["onnxruntime"].status == outcomes["reference"].status == "passed"
    with pytest.raises(pn.MissingExtraError, match="openvino is not installed"):
        pn.verify(path, runtimes="openvino")
    assert main(["verify", str(path), "--runtime", "all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(RUNTIMES)  # one row per runtime
    assert main(["verify", str(path), "--runtime", "tract"]) == 2
    with pytest.raises(pn.UnsupportedError, match="expected all, or some of onnxruntime"):
        pn.verify(path, runtimes="toaster")


def test_a_graph_that_differs_fails_the_command(tmp_path: Path, capsys: Any, runtimes: dict[str, Runtime]) -> None:
    path = tmp_path / "m.onnx"
    for name in runtimes.keys() - {"onnxruntime", "reference"}:
        del runtimes[name]
    onnx.save(spoiled(pn.export(lstm("layer"), None).model, "weight_hh_l0", a_little_off), path)
    pn.save(lstm("layer"), tmp_path / "m.safetensors")
    assert main(["verify", str(path), "--against", str(tmp_path / "m.safetensors"), "--runtime", "all"]) == 1
    assert "differs" in capsys.readouterr().out


FAR = {
    "long rows": (pn.LayerNorm(4096), "tract", {}),
    "float16, instances": (pn.InstanceNorm(6, dtype="float16"), "portable", {"input_shape": ("batch", 6, 40, 40)}),
    "float16, groups": (pn.GroupNorm(3, 6, dtype="float16"), "tract", {"input_shape": ("batch", 6, "height", "width")}),
    "float16, long rows": (pn.LayerNorm(4096, dtype="float16"), "tract", {}),
}
"""Where tract's sums go one after the other, or are of float16: as written for other targets it is far off, or gives NaN."""


@pytest.mark.runtime("tract")
@pytest.mark.parametrize("case", FAR)
def test_statistics_of_values_far_from_zero_in_tract(case: str) -> None:
    layer, target, keywords = FAR[case]
    report = pn.export(layer, None, target=target, **keywords)
    (outcome,) = check(Draft(report.model), layer, runtimes=("tract",)).outcomes
    assert outcome.status == "passed"


@pytest.mark.runtime("tract")
@pytest.mark.parametrize("case", ["long rows", "float16, instances"])
def test_the_gate_finds_what_the_target_is_for(case: str) -> None:
    layer, _, keywords = FAR[case]
    report = pn.export(layer, None, target="onnxruntime", **keywords)
    with pytest.raises(pn.ConformanceError, match="tract: output 'y' is"):
        check(Draft(report.model), layer, runtimes=("tract",))


LONG = {"rows": (pn.LayerNorm(4096), {}), "images": (pn.InstanceNorm(2), {"input_shape": ("batch", 2, 64, 64)})}


@pytest.mark.runtime("web")
@pytest.mark.parametrize("case", LONG)
def test_long_rows_in_web(case: str) -> None:
    """Its sums go one after the other: at a mean of 10,000 it is over ten times further off in the portable graph."""
    layer, keywords = LONG[case]
    found = {}
    for target in ("portable", "web"):
        report = pn.export(layer, None, target=target, **keywords)
        sizes = [d.dim_value or 2 for d in report.model.graph.input[0].type.tensor_type.shape.dim]
        x = (1e4 + np.random.default_rng(3).standard_normal(sizes)).astype("f4")
        exact = layer.to(dtype="float64")(x.astype(np.float64))
        found[target] = np.max(np.abs(RUNTIMES["web"].load(report.model.SerializeToString())({"x": x})["y"] - exact))
    assert found["web"] < 1e-4 < found["portable"] / 10


# -- what a runtime of one's own may give ------------------------------------------------------------------------------------------------

BROKEN: dict[str, tuple[Any, str]] = {
    "nothing": (lambda y: {}, r"mine gave nothing; expected arrays by the names of the outputs, y"),
    "other names": (lambda y: {"z": y}, r"mine gave \['z'\]; expected arrays by the names of the outputs, y"),
    "no mapping": (lambda y: [y], r"mine gave list; expected arrays by the names of the outputs, y"),
    "a list": (lambda y: {"y": y.tolist()}, r"mine gave list for 'y'; expected an array of NumPy"),
    "a wider type": (lambda y: {"y": y.astype(np.float64)}, r"mine gave float64 for 'y', which the graph says is float32"),
    "an axis less": (lambda y: {"y": y.reshape(-1)}, r"mine gave 'y' with 1 axes, the graph says 2"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_result_that_is_not_what_the_graph_says_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, message = BROKEN[fault]

    def load(model: Any) -> Any:
        session = session_of("onnxruntime", model)
        return lambda feed: change(session(feed)["y"])

    monkeypatch.setitem(RUNTIMES, "mine", Runtime("mine", load, lambda: "1.0"))
    layer = pn.LayerNorm(4)
    report = pn.export(layer, None)
    with pytest.raises(pn.ConformanceError, match=message):
        check(Draft(report.model), layer, runtimes=("mine",))


def test_what_a_runtime_has_no_answer_for_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def load(model: Any) -> Any:
        session = session_of("onnxruntime", model)

        def run(feed: Any) -> Any:
            if 0 in feed["x"].shape:
                raise IndexError("0 is out of range")
            return session(feed)

        return run

    layer, path = pn.RNN(3, 4, norm="layer", rng=0), tmp_path / "m.onnx"
    pn.export(layer, path)
    empty = r"mine does not run the graph on x \(0, 7, 3\), .*: IndexError: 0 is out of range; if it has no answer .* `no_steps`"
    monkeypatch.setitem(RUNTIMES, "mine", Runtime("mine", load, lambda: "1.0"))
    with pytest.raises(pn.ExportError, match=empty.replace("0, 7", r"\d+, \d+")):
        pn.verify(path, layer, runtimes=["mine"])
    for names in (("Scan",), ["Scan"], {"Scan"}):
        row = Runtime("mine", load, lambda: "1.0", no_steps=names, no_sequences=names)  # type: ignore[arg-type]
        monkeypatch.setitem(RUNTIMES, "mine", row)
        assert pn.verify(path, layer, runtimes=["mine"]).outcomes[0].status == "passed"
    with pytest.raises(
        pn.UnsupportedError, match=r"`no_steps` of the runtime 'mine' is 'Scan'; expected names of operators, as \('Scan',\)"
    ):
        Runtime("mine", load, lambda: "1.0", no_steps="Scan")  # type: ignore[arg-type]
