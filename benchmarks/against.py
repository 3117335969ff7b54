"""This tree against another commit: `python -m benchmarks.against COMMIT [TURNS]`, pinned to one core.

The works of `portnorm bench` and the small calls of `benchmarks/small.py`, the two trees by turns. Writes
benchmarks/results/against.json: by work the milliseconds of both, their ratio, and the least and the largest ratio of a turn.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from portnorm import bench

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "against.json"


def small(tree: Path) -> dict[str, float]:
    """Milliseconds of the small calls."""
    threads = {**dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"), "PORTNORM_KERNELS": "wait"}
    pinned = ["taskset", "-c", "0"] if sys.platform == "linux" else []
    command = [*pinned, sys.executable, str(ROOT / "benchmarks" / "small.py"), "0.2"]
    done = subprocess.run(
        command, env={**os.environ, **threads, **bench.packages_of(tree)}, cwd=tree, capture_output=True, text=True, check=True
    )
    return {name: microseconds / 1e3 for name, microseconds in json.loads(done.stdout).items()}


def known(tree: Path) -> list[str]:
    """The names of the works of a tree."""
    code = "import json; from portnorm import bench; print(json.dumps([work.name for work in bench.WORKS]))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **bench.packages_of(tree)}, cwd=tree, capture_output=True, text=True, check=True
    )
    names: list[str] = json.loads(done.stdout)
    return names


def large(trees: dict[str, Path], turns: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of each work that both trees have, of every turn of each tree."""
    names, found = known(trees["before"]), dict[str, dict[str, list[float]]]()
    with ExitStack() as stack:
        ask = {name: stack.enter_context(bench.engine("portnorm", 1, 0.1, tree)) for name, tree in trees.items()}
        for work in (work for work in bench.WORKS if work.name in names):
            for turn in range(turns):
                for name in list(trees)[:: 1 if turn % 2 else -1]:
                    answer = ask[name](work)
                    assert answer is not None
                    found.setdefault(work.name, {}).setdefault(name, []).append(answer["turns"][-1])
            show(work.name, found[work.name])
    return found


def show(name: str, times: dict[str, list[float]]) -> None:
    before, now = times["before"], times["now"]
    ratios = [b / a for a, b in zip(before, now, strict=True)]
    row = f"{name:60s} {min(before):10.4f} {min(now):10.4f} {min(now) / min(before):6.2f}   turns {min(ratios):.2f} to {max(ratios):.2f}"
    sys.stdout.write(row + "\n")
    sys.stdout.flush()


def summary(times: dict[str, list[float]]) -> dict[str, Any]:
    before, now = times["before"], times["now"]
    ratios = [b / a for a, b in zip(before, now, strict=True)]
    return {"before": min(before), "now": min(now), "ratio": min(now) / min(before), "turns": [min(ratios), max(ratios)]}


def main() -> None:
    """Measure and write."""
    commit, turns = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 5
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(other), commit], cwd=ROOT, check=True)
        try:
            trees = {"before": other, "now": ROOT}
            calls: dict[str, dict[str, list[float]]] = {}
            for turn in range(turns):
                for name in list(trees)[:: 1 if turn % 2 else -1]:
                    for call, milliseconds in small(trees[name]).items():
                        calls.setdefault(call, {}).setdefault(name, []).append(milliseconds)
            for call, times in calls.items():
                show(call, times)
            works = large(trees, turns)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(other)], cwd=ROOT, check=True)
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    found = {"machine": bench.machine(), "before": commit, "now": head}
    found |= {"small": {n: summary(t) for n, t in calls.items()}, "works": {n: summary(t) for n, t in works.items()}}
    OUT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
