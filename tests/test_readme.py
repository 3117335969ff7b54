"""The README's code runs, and its tables are what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.readme import PAGES, ROOT, filled

README = (ROOT / "README.md").read_text()


WRITTEN = {"model.safetensors", "model.onnx", "step.onnx", "part.onnx", "small.onnx", "train.onnx"}


@pytest.mark.parametrize(("page", "blocks", "files"), [(PAGES[0], 7, WRITTEN), (PAGES[1], 1, set())])
def test_code_blocks_run(page: Path, blocks: int, files: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    found = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert len(found) == blocks
    for block in found:
        exec(compile(block, page.name, "exec"), names)
    assert {p.name for p in tmp_path.iterdir()} == files


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_up_to_date(page: Path) -> None:
    assert filled(page.read_text()) == page.read_text(), "run `make readme`"


def test_links_lead_somewhere() -> None:
    for text in (README, *(page.read_text() for page in (ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")))):
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("http") or (ROOT / target).exists() or (ROOT / "docs" / target).resolve().exists(), target
