"""Speed against the peers: `python -m benchmarks.speed [PART …]`, where parts are "cores 1", "held avx2", "cores 2" and "growth".

Writes benchmarks/results/speed.json, with the machine and the commit of each part, and speed.svg; `make readme` makes the tables of it.
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

from benchmarks.speed_tables import GROWING, PARTS, part_of
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


def parts() -> dict[str, Callable[[Callable[[str], None]], list[dict[str, Any]]]]:
    """What is measured, by its name in the kept results; what cannot be measured on this processor is not among it."""
    held = {"held avx2": lambda progress: bench.measure(bench.WORKS, isa="avx2", rounds=3, progress=progress)}
    return {
        "cores 1": lambda progress: bench.measure(bench.WORKS, rounds=3, progress=progress),
        **(held if "AVX-512" in bench.machine()["isa"] else {}),
        "cores 2": lambda progress: bench.measure(bench.WORKS, cores=2, rounds=2, progress=progress),
        "growth": lambda progress: bench.measure(bench.GROWTH, GROWING, rounds=1, alone=True, progress=progress),
    }


def main(names: list[str]) -> None:
    """Measure these parts, or all, and keep the others as they are. What is measured is written part by part."""
    there, file = parts(), RESULTS / "speed.json"
    if unknown := [name for name in names if name not in there]:
        raise SystemExit(f"no part is called {', '.join(unknown)} here; expected some of {', '.join(there)}")
    kept = json.loads(file.read_text()) if file.exists() else {}
    found = {name: part for name in PARTS if (part := part_of(kept, name)) is not None}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    for name in names or there:

        def progress(what: str, name: str = name) -> None:
            sys.stdout.write(f"{name}: {what}\n")
            sys.stdout.flush()

        found[name] = {"machine": bench.machine(), "commit": commit, "rows": there[name](progress)}
        file.write_text(json.dumps({name: found[name] for name in PARTS if name in found}, indent=1) + "\n")
    if "cores 1" in found:
        draw(found["cores 1"]["rows"], RESULTS / "speed.svg")


if __name__ == "__main__":
    main(sys.argv[1:])
