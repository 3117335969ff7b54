"""Speed against the peers: `python -m benchmarks.speed` measures on one core and on two, and how time and memory grow.

Writes benchmarks/results/speed.json, with the machine and the commit, and speed.svg; `make readme` makes the tables of it.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.speed_tables import GROWING
from portnorm import bench

matplotlib.use("Agg")
from matplotlib import pyplot

RESULTS = Path(__file__).parent / "results"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The ratio to the best peer of every work, on a logarithmic axis: left of 1 is faster."""
    shown = [(row["work"], found) for row in rows if (found := bench.ratio(row)) is not None]
    figure, axes = pyplot.subplots(figsize=(8, 0.22 * len(shown) + 1), layout="constrained")
    axes.barh(
        [name for name, _ in shown], [math.log2(r) for _, r in shown], color=["tab:blue" if r <= 1 else "tab:orange" for _, r in shown]
    )
    ticks = (0.125, 0.25, 0.5, 1, 2, 4)
    axes.set_xticks([math.log2(t) for t in ticks], [str(t) for t in ticks])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("time over that of the fastest peer, one core")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure everything and write."""

    def progress(what: str) -> None:
        sys.stdout.write(f"{what}\n")
        sys.stdout.flush()

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    found: dict[str, Any] = {"machine": bench.machine(), "commit": commit}
    parts: dict[str, Callable[[], Any]] = {
        "cores 1": lambda: bench.measure(bench.WORKS, progress=progress),
        "growth": lambda: bench.measure(bench.GROWTH, GROWING, rounds=1, alone=True, progress=progress),
        "cores 2": lambda: bench.measure(bench.WORKS, cores=2, rounds=2, progress=progress),
    }
    for name in parts:
        found[name] = parts[name]()
        (RESULTS / "speed.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found["cores 1"], RESULTS / "speed.svg")


if __name__ == "__main__":
    main()
