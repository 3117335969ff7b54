"""The promise of the definitions on hard values, in ULP; and the conformance run itself: its table, its reports, its test vectors."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import unittest
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx.backend.test.loader as loader
import onnx.backend.test.runner as runner
import pytest

import portnorm as pn
from portnorm import conform
from portnorm.__main__ import main
from portnorm.conform import recurrent as cells
from portnorm.conform import report
from portnorm.conform import runner as measuring
from portnorm.conform.recurrent import layer_of
from portnorm_onnx import runtimes
from portnorm_onnx.conformance import write_vectors
from tests.processes import ROOT

pytest_plugins = ["pytester"]

# -- the promise -------------------------------------------------------------------------------------------------------------------------

ADD_IN_BLOCKS = ("mlx", "paddle")
"""Libraries whose sums are those of `portnorm_backends.blocks`, whatever the operation: only layer normalization takes rows of 2^20."""

BETWEEN = ("mean 3 std", "mean 10 std", "constant 0.1", "constant 1e6", "spread of 30", "rows of 64,", "image")
"""Regimes for others' own normalizations: to the definitions they say no more than their neighbours, so NumPy alone tries them."""


def _pairs() -> Iterator[Any]:
    """Every case for every library that is there, the long and the heavy left to `make test-all`."""
    for case in conform.cases():
        large = (case.regime.values or 0) > 2**16 or (case.regime.field and math.prod(case.shape) >= 2**17)
        for name, row in conform.LIBRARIES.items():
            if row.gpu or (name in ADD_IN_BLOCKS and large and case.operation.name != "layer_norm"):
                continue
            if case.regime.name.startswith(BETWEEN) and not name.startswith("numpy"):
                continue
            marks = [pytest.mark.slow] * (large or row.module != "numpy") + [pytest.mark.peers] * (not row.always)
            yield pytest.param(case, name, marks=marks, id=f"{case.name}-{name}")


@pytest.mark.parametrize(("case", "subject"), list(_pairs()))
def test_definitions_are_within_their_ulp(case: conform.Case, subject: str) -> None:
    """Forward ≤ 8 ULP, gradient ≤ 32 (half precision 2 and 4 of its own); finite where the truth is."""
    row = conform.LIBRARIES[subject]
    found = list(measuring.of_library(row, row.version(), case))
    if case.dtype not in row.dtypes:
        assert found == []
        return
    if "forward" in case.regime.subnormal and not row.subnormals:
        assert [r.status for r in found] == ["not measured"]
        return
    keeps = row.subnormals or "gradient" not in case.regime.subnormal
    assert [r.side for r in found] == ["forward", "gradient"][: 1 + (case.regime.gradient and keeps)]
    for r in found:
        assert r.status == "ok", f"{r.side}: {r.max_ulp} ULP, {r.nonfinite} not finite, {r.detail}"


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_weight_norm_of_rows_of_any_size(size: float, rng: np.random.Generator) -> None:
    v, g = (size * rng.standard_normal((5, 7))).astype(np.float32), rng.uniform(0.5, 2.0, 5).astype(np.float32)
    dy = rng.standard_normal((5, 7)).astype(np.float32)
    w, pullback = pn.vjp(pn.weight_norm, v, g)
    exact, exact_pullback = pn.vjp(pn.weight_norm, v.astype(np.float64), g.astype(np.float64))
    np.testing.assert_allclose(w, exact, rtol=1e-6)
    for a, b in zip(pullback(dy), exact_pullback(dy.astype(np.float64)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.max(np.abs(b)))


# -- the run -----------------------------------------------------------------------------------------------------------------------------


def torch_like(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    mean = x.mean(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt((x * x).mean(axis=-1, keepdims=True) - mean * mean + np.float32(eps)) * weight + bias


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_wrong_function_is_beyond_its_limit() -> None:
    found = conform.of_function(torch_like, conform.find("layer_norm", "mean 1e4 std"))
    assert found.failed
    assert found.max_ulp is not None
    assert found.max_ulp > 1000
    assert conform.of_function(torch_like, conform.find("layer_norm", "normal")).status == "ok"


def test_values_that_are_not_finite_are_counted() -> None:
    case = conform.find("layer_norm", "normal")
    found = conform.of_function(lambda x, *_: np.where(np.arange(96) == 3, np.nan, x), case)
    assert (found.status, found.nonfinite) == ("beyond", 16)


def test_the_truth_is_more_exact_than_what_it_judges() -> None:
    """float64 of the case against the extended type, on values that are easy for both."""
    for operation in conform.OPERATIONS:
        case = conform.find(operation, "normal", "float64")
        (forward, gradient) = measuring.of_library(conform.LIBRARIES["numpy"], "", case)
        assert 0.0 < forward.max_ulp < 4.0 and 0.0 < gradient.max_ulp < 16.0  # type: ignore[operator]  # noqa: PT018


def test_a_case_is_reproduced_by_the_lines_it_gives() -> None:
    case = conform.find("group_norm", "tiny variance")
    scope: dict[str, Any] = {}
    exec(case.reproduce(), scope)
    for name, a in case.arrays().items():
        np.testing.assert_array_equal(scope["arrays"][name], a)


def test_a_subject_that_is_not_installed_or_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(conform.LIBRARIES, "absent", conform.Library("absent", "no_such_module", "no-such-package"))
    chosen: dict[str, Any] = {"operations": ["rms_norm"], "regimes": ["normal"], "dtypes": ["float32"]}
    found = list(conform.measure(["absent", "numpy"], **chosen))
    assert [(r.subject, r.status) for r in found] == [("absent", "not installed"), ("numpy", "ok"), ("numpy", "ok")]
    with pytest.raises(pn.UnsupportedError, match="'toaster' is no library or runtime"):
        list(conform.measure(["toaster"]))
    with pytest.raises(pn.UnsupportedError, match="there is no case"):
        conform.find("layer_norm", "nice")


def test_a_library_whose_arrays_are_of_another_is_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mylib.py").write_text("from numpy import *\n\ndef mean(x, axis=None, keepdims=False):\n    return 0.0 * x\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(conform.LIBRARIES, "mylib", conform.Library("mylib", "mylib", "numpy"))
    found = list(conform.measure(["mylib"], operations=["layer_norm"], regimes=["normal"], dtypes=["float32"]))
    assert {r.status for r in found} == {"does not run"}
    assert all("arrays of mylib are those of NumPy, which computes with them: mylib would not be called" in r.detail for r in found)


def test_a_result_says_itself_in_a_line() -> None:
    case = conform.find("layer_norm", "mean 1e4 std")

    def layer_norm(x: Any, weight: Any, bias: Any, eps: float) -> Any:
        return pn.layer_norm(x, weight, bias, eps=eps)

    right, wrong, none = (
        conform.of_function(function, case) for function in (layer_norm, lambda x, w, b, eps: x * w + b, lambda x, w, b, eps: x * np.nan)
    )
    assert str(right).startswith("ok: ")
    assert str(right).endswith(" of 8 ULP")
    assert re.fullmatch(r"beyond: \S+ of 8 ULP, at \(\d+, \d+\): .*, the truth is .*", str(wrong))
    assert str(none).startswith(f"beyond: {math.prod(case.shape)} values are not finite, at (")
    with pytest.raises(pn.ShapeError, match=r"`function` gave shape \(16,\) for .*; expected \(16, 96\), that of `x`"):
        conform.of_function(lambda x, w, b, eps: x[:, 0], case)


def test_a_runtime_of_ones_own_is_verified_and_timed_from_the_command_line(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "own_runtime.py").write_text(
        "from portnorm_onnx.runtimes import RUNTIMES, Runtime, session_of\n"
        "RUNTIMES['own'] = Runtime('own', lambda model: session_of('onnxruntime', model), lambda: '1.0')\n"
    )
    path, own = str(tmp_path / "m.onnx"), str(tmp_path / "own_runtime.py")
    pn.export(pn.LayerNorm(4), path)
    try:
        assert main(["verify", path, "--import", own, "--runtime", "own", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["outcomes"][0]["runtime"] == "own"
        assert main(["bench", path, "--import", own, "--runtime", "own", "--json", "--seconds", "0.001", "--rounds", "1"]) == 0
        assert [row["runtime"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["own"]
    finally:
        runtimes.RUNTIMES.pop("own", None)


def test_a_case_and_a_runtime_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    """A few lines each: a regime is measured everywhere, a runtime on every case; also from the command line with --import."""
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "from portnorm import conform\n"
        "from portnorm_onnx.runtimes import RUNTIMES, Runtime, session_of\n"
        "conform.REGIMES['mine'] = conform.Regime('mine', lambda rng, shape, dtype: rng.uniform(5, 6, shape), dtypes=('float32',))\n"
        "def load(model):\n"
        "    run = session_of('onnxruntime', model)\n"
        "    return lambda inputs: {n: a + np.float32(1e-4) for n, a in run(inputs).items()}\n"
        "RUNTIMES['mine'] = Runtime('mine', load, lambda: '1.0')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        options = ["--operation", "layer_norm", "--regime", "mine", "--import", "mine", "--json"]
        assert main(["conform", "numpy", "onnxruntime", "mine", *options]) == 1
    finally:
        conform.REGIMES.pop("mine", None)
        runtimes.RUNTIMES.pop("mine", None)
    found = json.loads(capsys.readouterr().out)["results"]
    status = {(r["subject"], r["side"]): r["status"] for r in found}
    assert status == {
        ("numpy", "forward"): "ok",
        ("numpy", "gradient"): "ok",
        ("onnxruntime", "forward"): "ok",
        ("mine", "forward"): "beyond",
    }


FAULTS: dict[str, Any] = {
    "does not load": lambda model: 1 / 0,
    "does not run": lambda model: lambda inputs: inputs["no such input"],
    "gives nothing": lambda model: lambda inputs: {},
    "gives another shape": lambda model: lambda inputs: {"y": inputs["x"][:1]},
    "gives one number": lambda model: lambda inputs: {"y": np.float32(1)},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_runtime_of_ones_own_that_fails_is_a_row(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(runtimes.RUNTIMES, "mine", runtimes.Runtime("mine", FAULTS[fault], lambda: "1.0"))
    found = list(conform.measure(["mine"], operations=["rms_norm", "RNN plain"], regimes=["normal"], dtypes=["float32"]))
    assert [(r.operation, r.failed, bool(r.detail)) for r in found] == [("rms_norm", True, True), ("RNN plain", True, True)]


def measured(**asked: Any) -> set[tuple[str, str, str]]:
    return {(r.operation, r.regime, r.dtype) for r in conform.measure(["numpy", "onnxruntime"], **asked)}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (
            {"regimes": ["constant"], "dtypes": ["float32"]},
            {(name, "constant", "float32") for name, row in conform.OPERATIONS.items() if not row.given},
        ),
        ({"operations": ["LSTM layer"], "dtypes": ["float32"]}, {("LSTM layer", "normal", "float32")}),
        ({"operations": ["LSTM layer"], "dtypes": ["float64"]}, {("LSTM layer", "normal", "float64")}),
        ({"operations": ["LSTM layer"], "regimes": ["huge"]}, set()),
        ({"operations": ["LSTM layer"], "dtypes": ["float16"]}, set()),
        (
            {"operations": ["GRU plain", "rms_norm"], "regimes": ["normal"], "dtypes": iter(["float32"])},
            {("GRU plain", "normal", "float32"), ("rms_norm", "normal", "float32")},
        ),
    ],
)
def test_nothing_is_measured_that_was_not_asked_for(asked: Any, expected: set[Any]) -> None:
    """Cells are operations like others, and of the regime "normal"."""
    assert measured(**asked) == expected


def test_a_function_in_a_type_that_its_library_has_not_is_not_measured() -> None:
    def never(*_: Any) -> Any:
        raise AssertionError

    for library in conform.LIBRARIES.values():
        if library.always:
            for dtype in ("float16", "bfloat16"):
                if dtype not in library.dtypes:
                    case = conform.find("layer_norm", "normal", dtype)
                    found = conform.of_function(never, case, library=library.name)
                    assert (found.status, found.failed) == ("not measured", False)
                    assert f"{library.name} has no {dtype}" in found.detail
    case = conform.find("layer_norm", "normal", "bfloat16")
    assert "`library` may be 'numpy'" in conform.of_function(never, case, library="array_api_strict").detail


def test_recurrent_cells_by_one_step_and_a_whole_run() -> None:
    found = list(conform.measure(["numpy", "onnxruntime"], regimes=["normal"], dtypes=["float32"]))
    cells = [r for r in found if r.side in ("one step", "trajectory")]
    presets = {f"{cell} {preset or 'plain'}" for cell, table in pn.VARIANTS.items() for preset in table}
    assert {(r.subject, r.operation) for r in cells} == {(s, p) for s in ("numpy", "onnxruntime") for p in presets}
    assert {r.status for r in cells} == {"ok"}


def test_a_wrong_cell_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured has one weight that the truth has not."""
    truth, measured = layer_of("LSTM", "layer"), layer_of("LSTM", "layer")
    measured.params["weight_hh_l0"][0, 0] += 1e-3
    monkeypatch.setattr(cells, "layer_of", lambda *_: truth)
    monkeypatch.setattr(type(truth), "to", lambda self, **_: measured)
    found = next(iter(cells._of_cell(conform.LIBRARIES["numpy"], "", "LSTM", "layer", "float64")))
    assert (found.side, found.status) == ("one step", "beyond")


def test_the_plugin_runs_somebodys_tests_on_every_case(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        "import numpy as np, portnorm as pn\n"
        "from portnorm import conform\n"
        "pytest_plugins = ['portnorm.conform.plugin']\n"
        "def test_mine(conformance_case):\n"
        "    result = conform.of_function(lambda x, w, b, eps: pn.layer_norm(x, w, b, eps=eps), conformance_case)\n"
        "    assert result.status == 'ok', result.detail\n"
    )
    options = ["--conform-operation", "layer_norm", "--conform-dtype", "float32", "--conform-regime", "normal", "--conform-regime", "huge"]
    result = pytester.runpytest_subprocess("-p", "portnorm.conform.plugin", *options)
    result.assert_outcomes(passed=2)


MINE = """
import pytest
import portnorm as pn
from portnorm import conform
pytest_plugins = ["portnorm.conform.plugin"]

@pytest.mark.conformance(operations=["rms_norm"], dtypes=["float32", "bfloat16"])
def test_rms(conformance_case):
    assert conformance_case.operation.name == "rms_norm"
    result = conform.of_function(lambda x, w, b, eps: pn.rms_norm(x, w, eps=eps), conformance_case)
    assert result.status == "ok", result.detail

@pytest.mark.conformance(operations=["layer_norm"], regimes=["normal", "huge"], library="array_api_strict")
def test_layer(conformance_case):
    assert conformance_case.operation.name == "layer_norm"

@pytest.mark.conformance(library="array_api_strict")
def test_every(conformance_case):
    assert conformance_case.dtype in ("float32", "float64")
"""


PACKAGES = os.pathsep.join(str(ROOT / folder) for folder in ("", "backends", "onnx_export"))
"""What a process outside of this folder finds these packages by."""


def test_each_test_has_its_own_cases(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", PACKAGES)
    pytester.makepyfile(MINE)
    quick = [f"--conform-regime={name}" for name in ("normal", "huge", "constant")]
    result = pytester.runpytest_subprocess("-p", "portnorm.conform.plugin", *quick, "-v")
    rms, layer = 3 + 2, 2 * 2  # float32, and bfloat16 which cannot be huge; float32 and float64 in two regimes
    every = sum(1 for case in conform.cases(regimes=["normal", "huge", "constant"]) if case.dtype in ("float32", "float64"))
    result.assert_outcomes(passed=rms + layer + every)


@pytest.mark.parametrize(
    ("mark", "options", "said"),
    [
        ('operations=["layernorm"]', [], "did you mean 'layer_norm'"),
        ('library="toaster"', [], "toaster"),
        ('operation="layer_norm"', [], "expected operations="),
        ("", ["--conform-regime", "huhe"], "did you mean 'huge'"),
    ],
)
def test_a_wrong_name_in_a_test_is_said(
    mark: str, options: list[str], said: str, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", PACKAGES)
    pytester.makepyfile(f"import pytest\n@pytest.mark.conformance({mark})\ndef test_mine(conformance_case):\n    pass\n")
    result = pytester.runpytest_subprocess("-p", "portnorm.conform.plugin", *options)
    assert result.ret != 0
    assert said in result.stdout.str() + result.stderr.str()


# -- the command ---------------------------------------------------------------------------------------------------------------------------

FEW = ["--operation", "rms_norm", "--regime", "normal", "--dtype", "float32"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--operation", "layernorm"], "there is no operation 'layernorm'; did you mean 'layer_norm'?"),
        (["--operation", "LSTM layr"], "there is no operation 'LSTM layr'; did you mean 'LSTM layer'?"),
        (["--regime", "nromal"], "there is no regime 'nromal'; did you mean 'normal'?"),
        (["--regime", "normal", "--regime", "no such"], "there is no regime 'no such'"),
        (["--dtype", "float23"], "there is no dtype 'float23'; did you mean 'float32'?"),
        (["numpi"], "'numpi' is no library or runtime; did you mean 'numpy'?"),
        (["all", "onnxruntim"], "'onnxruntim' is no library or runtime; did you mean 'onnxruntime'?"),
        (["--regime", "huge", "--dtype", "float16"], "`--regime` 'huge', `--dtype` 'float16': they do not go together"),
        (["--import", "no_such_module"], "`--import` names 'no_such_module': ModuleNotFoundError"),
        (["--import", "no_such_file.py"], "`--import` names 'no_such_file.py': FileNotFoundError"),
        (["--import", "broken.py"], "`--import` names 'broken.py': ZeroDivisionError: division by zero"),
        (["--import", "broken"], "`--import` names 'broken': ZeroDivisionError: division by zero"),
        ([*FEW, "--html", "no/r.html"], "`--html` is 'no/r.html', and there is no directory 'no'"),
        ([*FEW, "--junit", "folder"], "`--junit` is 'folder', which is there and no file"),
    ],
)
def test_a_wrong_name_is_said_before_anything_is_measured(
    arguments: list[str], said: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(conform, "measure", None)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(["conform", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mine", "mine.py", "folder/mine.py"])
def test_a_module_of_the_working_directory_is_imported(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    text = "from portnorm import conform\nfrom portnorm.conform import Regime\n"
    text += "conform.REGIMES['mine'] = Regime('mine', lambda rng, shape, dtype: rng.uniform(5, 6, shape), dtypes=('float32',))\n"
    (tmp_path / ("folder" if "/" in name else ".") / "mine.py").write_text(text)
    code = "import os, sys; os.chdir(sys.argv[1]); sys.path.remove(''); from portnorm.__main__ import main; sys.exit(main(sys.argv[2:]))"
    command = [sys.executable, "-c", code, str(tmp_path), "conform", "numpy", "--import", name, "--regime", "mine"]
    done = subprocess.run(
        [*command, "--operation", "rms_norm", "--json"],
        env=os.environ | {"PYTHONPATH": PACKAGES},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {r["regime"] for r in json.loads(done.stdout)["results"]} == {"mine"}


def test_vectors_beside_a_page_are_both_written(tmp_path: Path, capsys: Any) -> None:
    page, folder = tmp_path / "r.html", tmp_path / "v"
    assert main(["conform", "numpy", *FEW, "--vectors", str(folder), "--html", str(page), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["cases"]) == len(list(folder.iterdir())) == 1
    assert [r["status"] for r in found["results"]] == ["ok", "ok"]
    assert "rms_norm" in page.read_text()
    assert main(["conform", *FEW, "--vectors", str(folder), "--json"]) == 0
    assert "results" not in json.loads(capsys.readouterr().out)


def test_the_terminal_shows_a_screen_and_no_warning(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hard regimes too, in runtimes that fail many of them; pytest makes an error of any warning."""
    hard = [
        part for name in ("largest float16", "huge", "tiny, eps 0", "N(1e4, 0.01)", "NaN and Inf", "normal") for part in ("--regime", name)
    ]
    assert main(["conform", "numpy", "onnxruntime", *hard]) == 1
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert len(lines) < 40
    assert lines[0].split()[:3] == ["operation", "side", "numpy"]
    for name in (*conform.OPERATIONS, "LSTM", "GRU", "RNN"):
        assert any(line.startswith(name) for line in lines)
    assert re.search(r"… and \d+ more", lines[-1])
    assert "beyond: onnxruntime / " in captured.out


# -- reports -----------------------------------------------------------------------------------------------------------------------------


def some_results() -> list[conform.Result]:
    def result(subject: str, regime: str, status: str, **more: Any) -> conform.Result:
        return conform.Result(subject, "1.0", "all" if regime == "all" else "layer_norm", regime, "float32", "forward", status, **more)

    measured = {"p99_ulp": 0.5, "max_abs": 1e-7, "naive_ratio": 0.5, "limit": 8.0}
    return [
        result("numpy", "normal", "ok", max_ulp=0.7, **measured, detail="at (0,)", reproduce="pass"),
        result("numpy", "constant", "ok", max_ulp=0.0, **measured),
        result(
            "runtime", "normal", "beyond", max_ulp=321.0, **measured, detail="</script><b>at (3, 1)", reproduce="find(<case>)" + "x" * 300
        ),
        result("runtime", "constant", "does not run", detail="it said & no"),
        result("runtime", "NaN and Inf", "beyond", max_ulp=0.0, nonfinite=3, **measured, detail="at (1,): nan"),
        result("numpy", "NaN and Inf", "ok", max_ulp=0.1, **measured),
        *(result("numpy", f"regime {k}", "ok", max_ulp=0.1, **measured) for k in range(60)),
        result("absent", "all", "not installed", detail="pip install it"),
        result("runtime", "no values", "not measured", detail="a graph needs one"),
    ]


def test_junit() -> None:
    suite = ElementTree.fromstring(report.to_junit(some_results()))
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("68", "3", "2")
    cases = suite.findall("testcase")
    assert [len(c) for c in cases] == [0, 0, 1, 1, 1, *[0] * 61, 1, 1]
    assert "321.0 ULP, limit 8.0" in str(cases[2][0].get("message"))
    assert "find(<case>)" in str(cases[2][0].text)
    assert [c.tag for case in cases for c in case] == ["failure", "failure", "failure", "skipped", "skipped"]


def test_the_command_writes_all_reports(tmp_path: Path, capsys: Any) -> None:
    html, junit = tmp_path / "r.html", tmp_path / "r.xml"
    options = ["--operation", "rms_norm", "--regime", "normal", "--dtype", "float32", "--html", str(html), "--junit", str(junit)]
    assert main(["conform", "numpy", "onnxruntime", *options]) == 0
    out = capsys.readouterr().out
    assert "rms_norm" in out
    assert "onnxruntime" in out
    assert ElementTree.parse(junit).getroot().get("failures") == "0"
    page = html.read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)\s*=|https?://|@import|url\(", page)  # nothing is fetched
    assert main(["conform", "numpy", "--operation", "no such"]) == 2
    assert main(["conform", "no such"]) == 2
    assert main(["conform", "numpy", "--html", str(tmp_path / "no" / "r.html"), "--operation", "rms_norm", "--regime", "normal"]) == 2


PROBE = """<script>
  const bad = document.querySelector("td button.bad");
  const near = (button) => {
    button.scrollIntoView({ block: "center" });
    const before = scrollY, left = button.getBoundingClientRect().left;
    button.click();
    const at = document.getElementById("detail").getBoundingClientRect(), from = button.getBoundingClientRect();
    return { gap: at.top - from.bottom, moved: Math.abs(scrollY - before) + Math.abs(from.left - left), right: at.right,
      open: document.querySelectorAll("#detail").length };
  };
  const every = [...document.querySelectorAll("td button")];
  const last = near(every[every.length - 1]);
  const infinite = every.find((b) => b.textContent === "NaN, ∞");
  near(infinite);
  const notFinite = document.getElementById("detail").innerText;
  infinite.click();
  const closed = document.querySelectorAll("#detail").length;
  const first = near(bad);
  const pre = document.querySelector("#detail pre");
  const out = document.createElement("pre");
  out.id = "probe";
  out.textContent = JSON.stringify({
    cells: document.querySelectorAll("td button").length,
    red: document.querySelectorAll("td button.bad").length,
    detail: document.getElementById("detail").innerText,
    about: document.getElementById("about").innerText,
    wide: document.documentElement.scrollWidth > innerWidth,
    size: Math.min(...[...document.querySelectorAll("td button, select")].map((e) => e.getBoundingClientRect().height)),
    injected: document.querySelectorAll("b").length,
    first, last, notFinite, closed,
    infinite: [infinite.className, getComputedStyle(infinite).backgroundColor],
    green: getComputedStyle(every[0]).backgroundColor,
    wraps: pre.scrollWidth <= pre.clientWidth,
    legend: document.getElementById("legend").innerText,
    aboutTop: document.getElementById("about").getBoundingClientRect().top + scrollY,
    inner: innerWidth,
  });
  document.body.append(out);
</script>"""


@pytest.mark.runtime("web-page")
@pytest.mark.parametrize("window", ["1280,900", "500,844"], ids=["desk", "phone"])
def test_the_page_in_a_browser(window: str, tmp_path: Path) -> None:
    """Drawn, pressed, and no wider than the screen of a phone (Chromium's narrowest window is 500)."""
    page = tmp_path / "r.html"
    page.write_text(report.to_html(some_results(), {"portnorm": "1", "date": "2026-01-02"}).replace("</html>", PROBE), encoding="utf-8")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={window}", f"--user-data-dir={profile}", "--dump-dom"]
        dumped = subprocess.run([str(runtimes.chromium()), *options, page.as_uri()], capture_output=True, text=True, timeout=60, check=True)
    match = re.search(r'<pre id="probe">(.*?)</pre>', dumped.stdout, re.DOTALL)
    assert match, dumped.stdout[-2000:]
    found = json.loads(match.group(1).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert (found["cells"], found["red"], found["injected"], found["wide"]) == (66, 3, 0, False)
    for click in (found["first"], found["last"]):
        assert 0 <= click["gap"] < 20  # under what was pressed
        assert (click["moved"], click["open"]) == (0, 1)
        assert 0 < click["right"] <= found["inner"]
    assert found["closed"] == 0
    assert (found["infinite"][0], found["wraps"]) == ("bad", True)
    assert found["infinite"][1] != found["green"]
    assert "3 values" in found["notFinite"]
    for text in ("beyond its limit", "not finite", "does not run", "not measured"):
        assert text in found["legend"]
    assert found["aboutTop"] < 120
    for text in ("portnorm 1", "date 2026-01-02", "numpy 1.0", "runtime 1.0"):
        assert text in found["about"]
    assert found["size"] >= 40  # a thumb
    for text in ("321.0 ULP", "limit 8.00", "</script><b>at (3, 1)", "find(<case>)", "To reproduce", conform.REGIMES["normal"].like):
        assert text in found["detail"]
    assert "not installed: absent" in found["about"]


# -- test vectors ------------------------------------------------------------------------------------------------------------------------


def vectors(folder: Path, chosen: list[conform.Case]) -> dict[str, str]:
    """The outcome of each case, by onnx's own runner over onnxruntime."""
    written = write_vectors(folder / "vectors", chosen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "load_model_tests", lambda kind: loader.load_model_tests(str(folder), "vectors") if kind == "simple" else [])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # onnxruntime asks for onnx.version
            backend = importlib.import_module("onnxruntime.backend")
        made = runner.Runner(backend, __name__)
    suite, outcomes = made.test_suite, {}

    class Outcomes(unittest.TestResult):
        def addSuccess(self, test: unittest.TestCase) -> None:  # noqa: N802
            outcomes[test.id().split(".")[-1]] = "ok"

        def addFailure(self, test: unittest.TestCase, err: Any) -> None:  # noqa: N802
            outcomes[test.id().split(".")[-1]] = "differs"

        def addError(self, test: unittest.TestCase, err: Any) -> None:  # noqa: N802
            outcomes[test.id().split(".")[-1]] = f"error: {err[1]}"

    suite.run(Outcomes())
    found = {name.removesuffix("_cpu"): status for name, status in outcomes.items() if name.endswith("_cpu")}
    assert sorted(found) == sorted(written)
    return found


def name_of(case: conform.Case) -> str:
    return "test_portnorm_" + "".join(c if c.isalnum() else "_" for c in case.name.replace(" / ", "__"))


def test_vectors_run_with_the_runner_of_onnx(tmp_path: Path) -> None:
    """onnxruntime passes the easy regimes; its operators fail the hard ones (docs/runtimes.md), or the vectors would tell nothing."""
    dtypes = ("float16", "float32", "float64")
    easy = list(conform.cases(None, ("normal", "tiny", "subnormal", "NaN and Inf"), dtypes))
    hard = list(conform.cases(("layer_norm",), ("N(1e4, 0.01)", "mean 1e6 std", "huge", "tiny, eps 0"), ("float32",)))
    outcomes = vectors(tmp_path, easy + hard)
    assert {name: status for name, status in outcomes.items() if status != "ok"} == {name_of(case): "differs" for case in hard}
    assert len(outcomes) > 50


def test_vectors_from_the_command_line(tmp_path: Path, capsys: Any) -> None:
    assert main(["conform", "--vectors", str(tmp_path / "v"), "--operation", "rms_norm", "--dtype", "float32", "--regime", "normal"]) == 0
    (folder,) = (tmp_path / "v").iterdir()
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == ["data.json", "model.onnx", "test_data_set_0/input_0.pb", "test_data_set_0/output_0.pb"]
