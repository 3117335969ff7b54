"""docs/runtimes.md and docs/deploy.md: the kept tables are of all that there is, and every word of them is explained."""

from __future__ import annotations

import runpy
import sys
from typing import Any

import pytest

from benchmarks import further_tables
from benchmarks.further import KINDS, SUBJECTS, WAYS
from benchmarks.further_tables import shown
from benchmarks.tables import ROOT
from portnorm_onnx.elsewhere import ENGINES
from portnorm_onnx.targets import TARGETS

EXPLAINED = ("right", "batch open", "refuses", "differs", "does not run", "no answer", "not installed", "none")


def test_every_cell_is_there() -> None:
    kept = further_tables.kept()
    assert {*SUBJECTS} == {"onnxruntime", *ENGINES}
    assert {(r["subject"], r["kind"], r["way"]) for r in kept["rows"]} == {(s, k, w) for s in SUBJECTS for k in KINDS for w in WAYS}
    assert {r["word"] for r in kept["rows"]} <= {*EXPLAINED}
    assert {*kept["about"]["versions"]} == {*SUBJECTS}
    for r in kept["rows"]:
        assert bool(r["said"]) == (r["word"] not in ("right", "batch open", "none")), r
        assert ("difference" in r) == (r["word"] in ("right", "batch open")), r
    assert all({r["subject"] for r in rows} == {*SUBJECTS} for rows in kept["steps"].values())


@pytest.mark.parametrize(
    ("kind", "limit"),
    [
        ("LayerNorm, mean 10,000 σ, `accurate=True`", 1e-6),
        ("LayerNorm of 4,096, mean 10,000 σ", 2e-3),
        ("InstanceNorm of 64 × 64, mean 10,000 σ", 3e-3),
        ("BatchNorm of images", 1e-6),
    ],
)
def test_graphs_are_right_at_a_large_mean_in_every_runtime(kind: str, limit: float) -> None:
    """As good as two passes, and better where they are centred. OpenVINO's provider takes one pass, and says so."""
    rows = [r for r in further_tables.kept()["rows"] if r["kind"] == kind and r["way"] == "fixed"]
    wrong = {r["subject"]: r.get("difference", r["word"]) for r in rows if not ("difference" in r and r["difference"] < limit)}
    assert wrong == ({"onnxruntime-openvino": "differs"} if kind.startswith("LayerNorm of") else {})


def test_every_word_is_explained() -> None:
    text = (ROOT / "docs" / "runtimes.md").read_text()
    for word in {r["word"] for r in further_tables.kept()["rows"]} - {"right", "batch open", "none"}:
        assert f"**{word}**" in text
    assert shown({"word": "right", "difference": 1.2e-7}) == "✓ 1e-7"
    assert shown({"word": "batch open", "difference": 0.0}) == "✓ 0, steps fixed"
    assert shown({"word": "none"}) == "–"
    assert shown({"word": "does not run"}) == "does not run"


def test_every_target_is_in_the_table_of_its_runtime() -> None:
    lines = further_tables.runtimes().splitlines()
    for name, row in TARGETS.items():
        assert any(line.startswith(f"| `{name}` |") for line in lines) == row.further


def test_the_page_of_places_names_each_program() -> None:
    folder, page = ROOT / "docs" / "examples" / "deploy", (ROOT / "docs" / "deploy.md").read_text()
    for program in folder.glob("in_*"):
        assert f"(examples/deploy/{program.name})" in page


def test_the_stream_in_python(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example beside the layer; the other places by `make runtimes-more`."""
    monkeypatch.setattr(sys, "argv", ["everywhere.py", "Python"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "docs" / "examples" / "deploy" / "everywhere.py"), run_name="__main__")
    assert ended.value.code == 0
    assert "target 'portable': y differs by" in capsys.readouterr().out
