"""docs/behind-the-export.md: every tool has a recipe, every recipe runs, and the tables are of all tools and graphs that there are."""

from __future__ import annotations

import json
import re
import tomllib
import warnings
from pathlib import Path

import pytest

import portnorm as pn
from benchmarks import behind
from benchmarks.behind import CELLS, RESULTS, measure, rows_of
from benchmarks.behind_graphs import GRAPHS
from benchmarks.behind_tools import ROUNDED, TOOLS, Tool
from benchmarks.readme import filled
from benchmarks.tables import ROOT
from tests.tolerances import MADE_SMALLER

PAGE = ROOT / "docs" / "behind-the-export.md"
TEXT = PAGE.read_text()
RECIPES = dict(re.findall(r"^##+ ([^\n]+)\n(.*?)(?=^##+ |\Z)", TEXT, flags=re.DOTALL | re.MULTILINE))
FIRST = "The recipes"
"""Makes the file that all others begin with."""
ELSEWHERE = ("onnxsim", "onnxoptimizer")
"""Sections whose package no test environment has: `make behind` runs the same calls."""
PEERS = ("onnxslim", "onnxscript's optimizer")
LOOKS = ("netron", "quantize_static", "nncf")
"""No code: one is for looking, the others are advised against."""
HERE = [name for name, text in RECIPES.items() if "```python" in text and name not in (*ELSEWHERE, *PEERS, FIRST)]


def blocks(section: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", RECIPES[section], flags=re.DOTALL)


def test_the_tables_are_made_of_what_was_kept() -> None:
    assert filled(TEXT) == TEXT, "run `make readme`"
    kept = json.loads(RESULTS.read_text())
    assert [(r["tool"], r["graph"], r["target"]) for r in kept["rows"]] == [(tool.name, *cell) for tool in TOOLS for cell in CELLS]
    rows = [line.split(" | ")[0].removeprefix("| ") for line in TEXT.splitlines() if line.startswith("| ")]
    assert [rows.count(tool.name) for tool in TOOLS] == [2] * len(TOOLS)


def test_every_word_of_the_table_is_explained() -> None:
    kept = json.loads(RESULTS.read_text())["rows"]
    computes, holds = (
        TEXT.partition(f"## What the {what} afterwards")[2].partition("\n## ")[0] for what in ("graph computes", "file holds")
    )
    for section, word in ((computes, "word"), (holds, "load")):
        assert {r[word] for r in kept} - {None} == set(re.findall(r"^- \*\*([a-z ]+)\*\*", section, flags=re.MULTILINE))


def test_every_tool_has_a_recipe_and_every_recipe_is_run() -> None:
    sections = {tool.section for tool in TOOLS}
    assert sections <= RECIPES.keys()
    assert {name for name in sections if "```" not in RECIPES[name]} == {*LOOKS} - {"netron"}
    assert {*HERE} == {*sections, "After a tool that rounds"} - {*ELSEWHERE, *PEERS, *LOOKS}
    assert sum(len(blocks(name)) for name in RECIPES) == TEXT.count("```python")


def test_every_tool_is_in_the_extra() -> None:
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["tools"]
    packages = {p for tool in TOOLS for p in tool.packages} - {"onnx", "onnxruntime"}
    assert packages <= {name.partition(">=")[0] for name in named}


def test_what_is_allowed_is_what_the_tests_allow() -> None:
    assert ROUNDED == MADE_SMALLER


def run(sections: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tools
        for section in sections:
            for block in blocks(section):
                exec(compile(block, f"{PAGE.name}: {section}", "exec"), names)


def test_recipes_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run([FIRST, *HERE], tmp_path, monkeypatch)
    made = {"model", "optimized", "int8", "dynamic", "half", "opset20", "outside", "beside", "whole", "part"}
    assert {p.stem for p in tmp_path.glob("*.onnx")} == made
    assert (tmp_path / "ort" / "model.ort").exists()


@pytest.mark.peers
@pytest.mark.parametrize("section", PEERS)
def test_recipes_of_peers_run(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run([FIRST, section], tmp_path, monkeypatch)


@pytest.mark.parametrize("section", ELSEWHERE)
def test_recipes_of_other_packages_are_rows_that_came_out_the_same(section: str) -> None:
    for block in blocks(section):
        compile(block, f"{PAGE.name}: {section}", "exec")
    kept = json.loads(RESULTS.read_text())["rows"]
    tools = {tool.name for tool in TOOLS if tool.section == section}
    assert {r["word"] for r in kept if r["tool"] in tools} == {"same"}


# -- how it is measured --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["quantize_dynamic", "onnxruntime float16, keep_io_types", "external data, from 64 bytes", "utils.extract_model"]
)
def test_a_row_comes_out_as_it_was_kept(name: str, tmp_path: Path) -> None:
    cell = ("LN-LSTM", "portable")
    pn.export(GRAPHS[cell[0]].layer(), tmp_path / f"{CELLS.index(cell)}.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = measure(next(tool for tool in TOOLS if tool.name == name), *cell, tmp_path)
    kept = next(r for r in json.loads(RESULTS.read_text())["rows"] if (r["tool"], r["graph"], r["target"]) == (name, *cell))
    assert (row["word"], row["load"]) == (kept["word"], kept["load"])
    assert row["difference"] == pytest.approx(kept["difference"], rel=0.5)  # another processor sums in another order
    assert str(tmp_path) not in row["said"]


@pytest.mark.parametrize(("ends", "word"), [("exit 3", "ends its process"), ("exec sleep 60", "gives no answer")])
def test_a_tool_that_ends_or_hangs_costs_one_row(ends: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text(f"""#!/bin/sh\necho '{{"word": "same"}}'\n{ends}\n""")
    program.chmod(0o755)
    monkeypatch.setattr(behind.sys, "executable", str(program))
    monkeypatch.setattr(behind, "SECONDS", 1)
    monkeypatch.setattr(behind, "CELLS", CELLS[:3])
    words = [row["word"] for row in rows_of(tmp_path, Tool("a tool", "", (), TOOLS[0].run))]
    assert words == ["same", word, "same"]


def test_a_tool_that_is_not_installed_is_said_to_be_so(tmp_path: Path) -> None:
    rows = list(rows_of(tmp_path, Tool("a tool", "", ("no-such-package-here",), TOOLS[0].run)))
    assert [(r["graph"], r["target"]) for r in rows] == CELLS
    assert {(r["word"], r["said"]) for r in rows} == {("not installed", "no-such-package-here")}
