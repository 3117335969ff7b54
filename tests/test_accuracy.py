"""The accuracy table of the field: others' normalizations as subjects, their forms, and what is kept of them for docs/accuracy.md."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from benchmarks import accuracy_tables
from benchmarks.accuracy import FIELD, PICTURE, SHOWN, yardsticks
from benchmarks.accuracy_plot import digest
from portnorm import conform
from portnorm.conform import formulas, oracle
from portnorm.conform.apart import measure_apart
from portnorm.conform.cases import Case
from portnorm.conform.forms import TELLING, Form, forms
from portnorm.conform.oracle import truth
from portnorm.conform.runner import of_subject
from portnorm.conform.subjects import GROUP, Subject, kind_of, subjects_of_others
from portnorm.errors import UnsupportedError
from portnorm_onnx import operators
from tests.processes import output_of
from tests.toy import installed

# -- a library from outside ----------------------------------------------------------------------------------------------------------------

MODULE = """
import os
import time
import numpy
from portnorm.conform import Subject

def layer_norm(x, weight, bias, eps):
    mean = x.mean(axis=-1, keepdims=True)
    var = (x * x).mean(axis=-1, keepdims=True) - mean * mean
    return (x - mean) / numpy.sqrt(var + numpy.float32(eps)) * weight + bias

def ends(x, weight, bias, eps):
    print("the last words", file=__import__("sys").stderr, flush=True)
    os._exit(7)

def ends_at_a_large_mean(x, weight, bias, eps):
    return ends(x, weight, bias, eps) if abs(x.mean()) > 1000 else x

def hangs(x, weight, bias, eps):
    time.sleep(600)

def raises(x, weight, bias, eps):
    raise ZeroDivisionError("by nothing")

SUBJECTS = [
    Subject(name, lambda: "1.5", {"layer_norm": call}, dtypes=("float32",))
    for name, call in (("toyone", layer_norm), ("toyends", ends), ("toysometimes", ends_at_a_large_mean), ("toyhangs", hangs),
                       ("toyraises", raises))
]
"""

FILES = {
    "toynorms.py": MODULE,
    "toynorms-1.5.dist-info/METADATA": "Metadata-Version: 2.1\nName: toynorms\nVersion: 1.5\n",
    "toynorms-1.5.dist-info/entry_points.txt": f"[{GROUP}]\ntoynorms = toynorms:SUBJECTS\n",
}


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    installed(tmp_path, FILES)
    monkeypatch.syspath_prepend(str(tmp_path))
    subjects_of_others.cache_clear()
    yield tmp_path
    subjects_of_others.cache_clear()
    sys.modules.pop("toynorms", None)


ASKED = {"operations": ["layer_norm", "rms_norm"], "regimes": ["normal", "mean 1e2 std", *TELLING["float32"]], "dtypes": ["float32"]}


def test_a_library_of_others_is_measured_and_its_form_is_named(toys: Path, capsys: Any) -> None:
    """By the command, from its entry point: in the table, on the page, and by name where it has nothing."""
    from portnorm.__main__ import main

    options = [word for key, values in ASKED.items() for value in values for word in (f"--{key[:-1]}", value)]
    assert main(["conform", "toyone", *options, "--html", str(toys / "r.html")]) == 1
    told = capsys.readouterr().out
    assert "toyone 1.5" in told
    assert "toyone computes by: one pass; not finite at mean 1e4 std" in told
    page = (toys / "r.html").read_text()
    assert '"form": "one pass"' in page
    assert "has no rms_norm" in page


def rows(names: list[str], regimes: list[str], **how: Any) -> dict[str, list[tuple[str, str, str]]]:
    """By subject: regime, status and detail of layer_norm forward, each measured in a process of its own."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    asked = {"operations": ["layer_norm"], "regimes": regimes, "dtypes": ["float32"]}
    for r in measure_apart(names, asked=asked, **how):
        if r.side == "forward":
            found.setdefault(r.subject, []).append((r.regime, r.status, r.detail))
    return found


ENDED = "its process ended with exit status 7: the last words"


def test_a_process_that_ends_is_a_row_in_words(toys: Path) -> None:
    """And what comes after it is measured."""
    found = rows(["toysometimes"], ["normal", "mean 1e4 std", "constant 0.1"])["toysometimes"]
    assert [status for _, status, _ in found] == ["beyond", "does not run", "beyond"]
    assert found[1][2] == ENDED


@pytest.mark.slow
def test_a_process_that_ends_again_and_again_or_hangs_is_left_out(toys: Path) -> None:
    said, left_out = "no answer in 8 s", "; the rest of its cases is left out"
    regimes = ["normal", "mean 1e2 std", "mean 1e4 std", "constant 0.1"]
    assert rows(["toyhangs", "toyends", "numpy"], regimes, seconds=8.0) == {
        "toyhangs": [("normal", "does not run", said), ("all", "does not run", said + left_out)],
        "toyends": [(name, "does not run", ENDED) for name in regimes[:3]] + [("all", "does not run", ENDED + left_out)],
        "numpy": [(name, "ok", mock.ANY) for name in regimes],
    }


def test_an_exception_of_a_subject_is_a_row(toys: Path) -> None:
    case = conform.find("layer_norm", "normal")
    (found,) = of_subject(subjects_of_others()["toyraises"], "1", case)
    assert (found.status, found.detail) == ("does not run", "ZeroDivisionError: by nothing")


def test_two_subjects_of_one_name_are_refused(toys: Path) -> None:
    second = {"other-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: other\nVersion: 1.0\n"}
    second["other-1.0.dist-info/entry_points.txt"] = f"[{GROUP}]\nother = toynorms:SUBJECTS\n"
    installed(toys, second)
    with pytest.raises(UnsupportedError, match=r"gives a second 'toyone'; expected subjects with names of their own"):
        subjects_of_others()


def test_our_own_families_come_by_the_same_door_and_import_nothing() -> None:
    """Each module that pyproject.toml names; no library is imported for its table."""
    import tomllib

    from benchmarks.tables import ROOT

    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]
    code = f"""
import importlib, sys
rows = [row for e in {[*entries.values()]!r} for row in getattr(importlib.import_module(e.split(":")[0]), e.split(":")[1])]
heavy = {{"torch", "jax", "keras", "tensorflow", "mlx", "paddle", "onnxruntime", "openvino", "cv2"}} & {{*sys.modules}}
print(sorted(heavy), len(rows), len({{row.name for row in rows}}), all(row.calls and row.dtypes for row in rows))
"""
    found = os.pathsep.join(str(ROOT / folder) for folder in (".", "backends", "onnx_export"))
    heavy, count, names, whole = output_of(code, PYTHONPATH=found).rsplit(" ", 3)
    assert (heavy, whole) == ("[]", "True")
    assert count == names
    assert int(count) >= 20


# -- forms ---------------------------------------------------------------------------------------------------------------------------------


def computed_by(formula: formulas.Formula, operation: str, dtype: str = "float32") -> Form:
    """The form of a subject that computes by a formula, found out as that of any other."""

    class ByFormula(Subject):
        def run(self, case: Case, arrays: Any) -> Any:
            return {"forward": formula(case, arrays).astype(np.float64).reshape(case.shape)}

    subject = ByFormula("mine", lambda: "1", {kind_of(operation): print})
    cases = conform.cases([operation], [name for name in FIELD if name != "near the largest"], [dtype])
    (found,) = forms((r for case in cases for r in of_subject(subject, "1", case)), {"mine": subject})
    return found


FORMS = [
    (op, dtype, form) for op in SHOWN for dtype in TELLING for form in formulas.formulas_of(conform.find(op, TELLING[dtype][0], dtype))
]


@pytest.mark.parametrize(("operation", "dtype", "form"), [row for row in FORMS if row[:2] != ("batch_norm with statistics", "float16")])
def test_a_formula_is_found_out(operation: str, dtype: str, form: str) -> None:
    formula = formulas.formulas_of(conform.find(operation, TELLING[dtype][0], dtype))[form][0]
    assert computed_by(formula, operation, dtype).form == form


def test_what_is_none_of_the_formulas_is_said_with_its_error() -> None:
    """A hundredth more, which no formula is off by at every mean."""
    exact = formulas.CENTRED["exact"][0]
    assert computed_by(lambda case, arrays: 1.01 * exact(case, arrays), "layer_norm").form.startswith("none of these: 0.0")


def test_a_compiled_subject_unlike_its_eager_twin_is_told() -> None:
    def rows(name: str, error: float) -> list[conform.Result]:
        return [conform.Result(name, "1", "layer_norm", regime, "float32", "forward", "ok", max_abs=error) for regime in TELLING["float32"]]

    subjects = {name: Subject(name, lambda: "1", {}, eager=twin) for name, twin in (("plain", None), ("compiled", "plain"))}
    found = forms(rows("plain", 3e-3) + rows("compiled", 3e-5), subjects)
    assert [f.besides for f in found] == [(), ("100 times more exact than plain at mean 1e2 std",)]


def test_a_negative_variance_is_told() -> None:
    def call(x: Any, weight: Any, bias: Any, eps: float) -> Any:
        one = np.ones(x.shape[1], np.float32)
        return x, one, -one

    subject = Subject("mine", lambda: "1", {"batch_norm": call})
    results = [
        r for case in conform.cases(["batch_norm of a map"], TELLING["float32"], ["float32"]) for r in of_subject(subject, "1", case)
    ]
    assert {r.detail for r in results if r.side == "variance"} == {"-1 is a negative variance"}
    assert forms(results, {})[0].besides == ("returns a variance of -1 at mean 1e2 std",)


# -- the truth -----------------------------------------------------------------------------------------------------------------------------

SMALL = [case for case in conform.cases(dtypes=["float64"]) if (case.regime.values or 0) <= 2**12]


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="longdouble is no wider here: there is nothing to compare with")
@pytest.mark.parametrize("operation", conform.OPERATIONS)
def test_two_doubles_are_as_true_as_a_wider_type(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To less than a unit in the last place of float64, which rounding to one double may cost."""
    for case in SMALL:
        if case.operation.name != operation or 0 in case.shape:
            continue
        wide = truth(case)
        with monkeypatch.context() as patch:
            patch.setattr(oracle, "WIDE", np.float64)
            found = truth(case)
            assert oracle.of_two_doubles(case)
        with np.errstate(all="ignore"):
            for mine, other in ((found.y, wide.y), (found.dx, wide.dx))[: 1 + case.regime.gradient]:
                finite = np.isfinite(other) & (np.abs(other) <= np.finfo(np.float64).max)
                np.testing.assert_array_equal(np.isnan(mine), np.isnan(other))
                largest = np.max(np.where(finite, np.abs(other), 0), axis=wide.axes, keepdims=True).astype(np.float64)
                off = np.where(finite, np.abs(mine - other), 0) / np.spacing(np.maximum(largest, np.finfo(np.float64).tiny))
                limit = 2.0 if case.regime.name == "subnormal" else 1.0  # values below the normal ones are rounded twice
                assert np.max(off) <= limit, f"{case.name}: {float(np.max(off))}"


# -- graphs of one node --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", SHOWN)
@pytest.mark.parametrize("name", ["onnx-onnxruntime", "onnx-reference"])
def test_an_operator_of_onnx_computes_the_operation(name: str, operation: str) -> None:
    subject = next(row for row in operators.SUBJECTS if row.name == name)
    case = conform.find(operation, "normal")
    for result in of_subject(subject, "1", case):
        assert result.max_abs is not None, result.detail
        assert result.max_abs < 1e-5, result


# -- the page ------------------------------------------------------------------------------------------------------------------------------

KEPT = accuracy_tables.kept()
OTHERS = {name: row for name, row in accuracy_tables.present(KEPT).items() if not name.startswith("portnorm")}


def worst(name: str, operation: str, column: str) -> float:
    """The largest error of a column, infinite where a value is not finite."""
    keys = accuracy_tables.COLUMNS[column]
    cells = [c for c in OTHERS[name]["cells"] if c[0] == operation and (c[1], c[2]) in keys]
    return max(np.inf if c[4] else c[3] for c in cells)


def test_every_cell_is_measured_or_refused_by_name() -> None:
    """Twenty libraries and more, six operations, every regime and type."""
    assert len(OTHERS) >= 20
    assert len(SHOWN) == 6
    assert all(conform.REGIMES[name].like and conform.REGIMES[name].shows for name in FIELD)
    for name, row in OTHERS.items():
        cells = {(c[0], c[1], c[2]): c for c in row["cells"]}
        for case in conform.cases(SHOWN, FIELD, ["float32", "float16"]):
            cell = cells[case.operation.name, case.regime.name, case.dtype]
            assert not isinstance(cell[3], str) or cell[3].partition(": ")[2], f"{name}: {case.name}"


def test_every_subject_is_right_where_nothing_is_hard() -> None:
    """Else it would be the row that is wrong. Runtimes that ignore training are named by their form."""
    for name, row in OTHERS.items():
        ignored = {f["operation"] for f in row["forms"] if f["form"].startswith("training ignored")}
        for operation, regime, dtype, *rest in row["cells"]:
            if regime == "normal" and dtype == "float32" and not isinstance(rest[0], str) and operation not in ignored:
                assert rest[0] < 1e-5, f"{name}: {operation}"


SURPRISES: dict[str, Callable[[], bool]] = {
    "torch's group_norm, channels last": lambda: (
        worst("torch-channels-last", "group_norm", "100") > 1e-3 > 10 * worst("torch-eager", "group_norm", "100")
    ),
    "which compiling makes right": lambda: worst("torch-compiled-channels-last", "group_norm", "100") < 1e-4,
    "Keras on torch": lambda: worst("keras-torch", "group_norm", "100") > 1e-3 and np.isinf(worst("keras-torch", "group_norm", "1e4")),
    "XLA makes fused_batch_norm wrong": lambda: (
        worst("tensorflow-xla", "batch_norm of a map", "100") > 1e-3 > 10 * worst("tensorflow-eager", "batch_norm of a map", "100")
    ),
    "GroupNormalization by its function body": lambda: all(
        worst(f"onnx-{name}", "group_norm", "100") > 1e-3 for name in ("onnxruntime", "reference", "tvm")
    ),
    "onnx.reference in float16": lambda: worst("onnx-reference", "layer_norm", "float16") > 1,
    "Paddle's group_norm": lambda: worst("paddle-nn", "group_norm", "100") > 1e-3,
    "haiku's BatchNorm": lambda: np.isinf(worst("haiku", "batch_norm of a map", "1e4")),
    "flax as it comes": lambda: worst("flax", "layer_norm", "100") > 1e-3 > 10 * worst("flax-two-pass", "layer_norm", "100"),
    "OpenCV": lambda: worst("onnx-opencv", "layer_norm", "100") > 1e-3,
}


@pytest.mark.parametrize("surprise", SURPRISES)
def test_the_table_shows_what_was_measured(surprise: str) -> None:
    assert SURPRISES[surprise]()


def test_ours_are_exact_in_it() -> None:
    for name, row in KEPT["subjects"].items():
        if name.startswith("portnorm"):
            assert all(f["form"].startswith(("exact", "mean of squares", "subtracted", "statistics in float32")) for f in row["forms"])
            assert not any(f["besides"] for f in row["forms"])


def test_the_picture_is_drawn_of_what_is_kept() -> None:
    assert digest(KEPT) in PICTURE.read_text(), "run `python -m benchmarks.accuracy draw`"


def test_the_yardsticks_are_of_every_case() -> None:
    found = yardsticks()
    assert [*found] == list(SHOWN)
    for operation, forms_of in found.items():
        regimes = {case.regime.name for case in conform.cases([operation], FIELD, ["float32"])}
        assert all(row.keys() == regimes for row in forms_of.values())
        assert len(forms_of) == 2
