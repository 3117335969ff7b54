"""The code of the README and of the guides runs, and their tables and pictures are what the code says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import torch_graph
from benchmarks.readme import PAGES, filled
from benchmarks.tables import ROOT

README, DOCS = ROOT / "README.md", ROOT / "docs"


def blocks(page: Path) -> list[str]:
    """What a page shows as Python."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


DOORS = {
    "Train in NumPy": {"waves.safetensors", "model.onnx"},
    "Deploy a torch model": {"tagger.onnx"},
    "Test a library or a runtime": {"cell.onnx"},
}
"""The blocks of the README by their headings, and the files that each leaves."""

GUIDES = {
    "variants.md": (4, set()),
    "training.md": (6, {"run.safetensors", "own.safetensors"}),
    "weights.md": (2, set()),
    "accuracy.md": (1, set()),
    "arrays.md": (1, set()),
    "onnx.md": (6, {"model.onnx", "step.onnx", "part.onnx", "train.onnx", "small.onnx", "fixed.onnx"}),
    "beyond-one-machine.md": (2, set()),
    "ways-out.md": (9, {"model.onnx", "step.onnx", "trainable.onnx", "model.jax", "model.pt2", "model.pt"}),
}
"""Pages whose blocks run one after the other: how many, and the files that they leave."""


def test_the_readme_is_short() -> None:
    """Under 200 lines, with no table in the first screen and a half."""
    lines = README.read_text().splitlines()
    assert len(lines) < 200
    assert not any(line.startswith("|") for line in lines[:60])


def test_every_door_is_here() -> None:
    headings = re.findall(r"^## (.*)\n(?:(?!^## )[^\0])*?```python", README.read_text(), flags=re.MULTILINE)
    assert headings == list(DOORS)


@pytest.mark.parametrize("door", [pytest.param(n, marks=[pytest.mark.peers] * ("torch" in n)) for n in DOORS])
def test_a_door_of_the_readme_opens(door: str, tmp_path: Path) -> None:
    """Each block alone, in a process of its own, as a reader runs it."""
    block = blocks(README)[list(DOORS).index(door)]
    found = os.pathsep.join(str(ROOT / folder) for folder in (".", "backends", "onnx_export"))
    command, environment = [sys.executable, "-c", block], {**os.environ, "PYTHONPATH": found}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == DOORS[door]
    if door == "Train in NumPy":
        assert float(re.findall(r"([\d.]+)% of the held-out waves", done.stdout)[0]) > 90


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*the trace to be incorrect", "ignore:.*the trace might not generalize"
)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.peers] * (n in ("beyond-one-machine.md", "ways-out.md"))) for n in GUIDES]
)
def test_code_of_the_guides_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    count, files = GUIDES[name]
    found = blocks(DOCS / name)
    assert len(found) == count
    for block in found:
        exec(compile(block, name, "exec"), names)
    assert {p.name for p in tmp_path.iterdir()} == files


def test_the_picture_is_what_was_measured() -> None:
    assert torch_graph.PICTURE.read_text() == torch_graph.picture(json.loads(torch_graph.RESULT.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_up_to_date(page: Path) -> None:
    assert filled(page.read_text()) == page.read_text(), "run `make readme`"


def test_links_lead_somewhere() -> None:
    pages = (README, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "papers" / "README.md", *DOCS.rglob("*.md"))
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page}: {target}"


def test_paths_in_contributing_are_there() -> None:
    named = re.findall(r"`([\w.-]+/[\w./-]*)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(named) > 15
    assert [path for path in named if not (ROOT / path).exists()] == []
