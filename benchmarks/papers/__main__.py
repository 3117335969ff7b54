"""The page of all results, from the JSON files that the scripts wrote."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.papers.common import RESULTS, Result

NAMES = ("invariances", "gradients", "sequential_digits", "characters", "small_batches", "initial_state")
PAGE = Path(__file__).parent / "README.md"


def page() -> str:
    """Titles, tables, pictures and findings."""
    parts = [
        "# The papers' own results\n\nMade by `python -m benchmarks.papers` from the files that the scripts wrote; each script's "
        "head says what "
        "stands in for what.\n"
    ]
    for name in NAMES:
        report = json.loads((RESULTS / f"{name}.json").read_text())
        result = Result(**{key: report[key] for key in Result.__dataclass_fields__})
        picture = f"../results/papers/{name}.png"
        parts.append(
            f"## {result.title}\n\n{result.finding}\n\n{result.table()}\n\n![{result.title}]({picture})\n\n"
            f"`python -m benchmarks.papers.{name}`, {report['seconds']:.0f} s; settings and all numbers: "
            f"[{name}.json](../results/papers/{name}.json)\n"
        )
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
