"""The README's code runs, and its tables are what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.readme import ROOT, filled

README = (ROOT / "README.md").read_text()


def test_code_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors", "model.onnx"}


def test_tables_are_up_to_date() -> None:
    assert filled(README) == README, "run `make readme`"


def test_links_lead_somewhere() -> None:
    for text in (README, (ROOT / "CONTRIBUTING.md").read_text(), (ROOT / "docs" / "design.md").read_text()):
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("http") or (ROOT / target).exists() or (ROOT / "docs" / target).exists(), target
