"""What the tables of results share: where results are kept, and Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def kept_of(name: str) -> Any:
    """The kept result of a script in this folder."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def milliseconds(t: float | None) -> str:
    return "–" if t is None else f"{t:.4f}" if t < 0.1 else f"{t:.2f}" if t < 10 else f"{t:.0f}"
