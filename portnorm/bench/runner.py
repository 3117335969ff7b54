"""Starts each engine in a process of its own, pinned, and gathers times; in turns, so that a busy machine slows all alike."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from portnorm.bench.engines import ENGINES, FLOORS
from portnorm.bench.works import Work
from portnorm.errors import UnsupportedError

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def measure(
    works: Iterable[Work],
    engines: Iterable[str] | None = None,
    *,
    cores: int = 1,
    seconds: float = 0.5,
    rounds: int = 2,
    alone: bool = False,
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """One row per work: `{"work", "shape", "backward", "times": {engine: {"min", "median", "runs", "error", "peak_kb"}}}`, in milliseconds.

    Engines that are not installed are left out. Each gets `cores` cores and as many threads, and goes through all works `rounds` times, the
    engines taking turns. `alone` gives every work a process of its own, whose peak memory is then that of the work. Raises
    `UnsupportedError` for an engine that is not known and where a process ends early.
    """
    works, names = list(works), list(ENGINES if engines is None else engines)
    for name in names:
        if name not in ENGINES:
            raise UnsupportedError(f"`engines` has {name!r}; expected some of {', '.join(ENGINES)}")
    rows: list[dict[str, Any]] = [
        {"work": work.name, "what": work.what, "shape": list(work.shape), "backward": work.backward, "times": {}} for work in works
    ]
    parts = [[k] for k in range(len(works))] if alone else [list(range(len(works)))]
    for turn in range(rounds):
        for name in (name for name in names if ENGINES[name].is_there):
            if progress is not None:
                progress(f"round {turn + 1} of {rounds}: {name}")
            for part in parts:
                for k, found in zip(part, _run(name, [works[k] for k in part], cores, seconds), strict=True):
                    if found is not None:
                        before = rows[k]["times"].get(name)
                        rows[k]["times"][name] = found if before is None or found["min"] < before["min"] else before
    return rows


def _run(name: str, works: list[Work], cores: int, seconds: float) -> list[dict[str, Any] | None]:
    lines = "".join(json.dumps([work.what, work.shape, work.backward]) + "\n" for work in works)
    environment = {**os.environ, **dict.fromkeys(_THREADS, str(cores)), "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "0"}
    if cores == 1:
        environment["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    command = [sys.executable, "-m", "portnorm.bench.worker", name, str(seconds), str(cores)]
    where = sorted(os.sched_getaffinity(0))[:cores] if hasattr(os, "sched_getaffinity") else None
    before = None if where is None else os.sched_getaffinity(0)
    try:
        if where is not None:
            os.sched_setaffinity(0, where)  # the child has what its parent had when it started
        done = subprocess.run(command, input=lines, env=environment, capture_output=True, text=True, check=False)
    finally:
        if before is not None:
            os.sched_setaffinity(0, before)
    if done.returncode:
        raise UnsupportedError(f"the process of {name} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def best_peer(row: dict[str, Any]) -> tuple[str, float] | None:
    """Name and minimum of the fastest engine of another library, `None` where there is none."""
    peers = {name: t["min"] for name, t in row["times"].items() if not ENGINES[name].own and name not in FLOORS}
    if not peers:
        return None
    name = min(peers, key=lambda k: peers[k])
    return name, peers[name]


def ratio(row: dict[str, Any], own: str = "") -> float | None:
    """The fastest of this library's engines, or the one named `own`, over the fastest peer; `None` where one of them is missing."""
    mine = [t["min"] for name, t in row["times"].items() if ENGINES[name].own and own in ("", name)]
    peer = best_peer(row)
    return None if peer is None or not mine else min(mine) / peer[1]


def laid_out(rows: list[dict[str, Any]]) -> str:
    """A table for a terminal: milliseconds, the ratio to the best peer, and GB/s or GFLOP/s of the fastest of this library's engines."""
    names = [name for name in ENGINES if any(name in row["times"] for row in rows)]
    lines = [("work", *names, "ratio", "GB/s or GFLOP/s")]
    for row in rows:
        cells = [f"{row['times'][name]['min']:.3f}" if name in row["times"] else "–" for name in names]
        found, speed = ratio(row), rate(row)
        lines.append((row["work"], *cells, "–" if found is None else f"{found:.2f}", "–" if speed is None else f"{speed:.1f}"))
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def rate(row: dict[str, Any], name: str = "") -> float | None:
    """GB/s of a normalization, GFLOP/s of a recurrent layer's matrix products, by one engine or the fastest of this library's."""
    times = [t["min"] for n, t in row["times"].items() if (n == name if name else ENGINES[n].own)]
    work = Work(row["what"], tuple(row["shape"]), row["backward"])
    return (work.flops if work.recurrent else work.bytes) / min(times) / 1e6 if times else None


def machine() -> dict[str, str]:
    """The processor and the versions of what was measured."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next((line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")), model)
    found = {"processor": model, "cores": str(os.cpu_count()), "system": platform.system()}
    for name in ("numpy", "numba", "torch", "jax", "onnxruntime"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
