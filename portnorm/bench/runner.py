"""Starts each engine in a process of its own, pinned; they take turns at each work, so that a busy machine slows all alike."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from portnorm.bench.engines import ENGINES, FLOORS
from portnorm.bench.isa import environment_of, shown
from portnorm.bench.works import Work
from portnorm.errors import UnsupportedError
from portnorm.interrupts import held_back, undone

Ask = Callable[[Work], dict[str, Any] | None]
"""One turn of an engine at a work."""

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def measure(
    works: Iterable[Work],
    engines: Iterable[str] | None = None,
    *,
    cores: int = 1,
    seconds: float = 0.1,
    rounds: int = 5,
    alone: bool = False,
    isa: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """One row per work: its name as `"work"`, its fields, and `"times": {engine: {"min", "turns", "median", "runs", "error", "peak_kb"}}`.

    Times are in milliseconds; `turns` has the minimum of each turn. Engines that are not installed are left out. Each gets `cores` cores
    and as many threads; at every work they take turns, `rounds` times `seconds`, and what is reported is of all turns. `alone` gives every
    work new processes, whose peak memory is then that of the work. `isa="avx2"` holds all to AVX2, and leaves out what nothing
    holds. Raises `UnsupportedError` for an engine or an instruction set that is not known, and where a process ends early.
    """
    works, names = list(works), list(ENGINES if engines is None else engines)
    for name in names:
        if name not in ENGINES:
            raise UnsupportedError(f"`engines` has {name!r}; expected some of {', '.join(ENGINES)}")
    environment_of(isa)  # raises for what cannot be held, before a process starts
    names = [name for name in names if ENGINES[name].is_there and (isa is None or ENGINES[name].holds)]
    rows: list[dict[str, Any]] = []
    for part in [[work] for work in works] if alone else [works]:
        with ExitStack() as stack:
            ask = {name: stack.enter_context(engine(name, cores, seconds, isa=isa)) for name in names}
            for work in part:
                if progress is not None:
                    progress(f"{len(rows) + 1} of {len(works)}: {work.name}")
                found: dict[str, Any] = {}
                for _ in range(rounds):
                    for name in names:
                        one = ask[name](work)
                        if one is not None:
                            found[name] = one
                rows.append({"work": work.name, **asdict(work), "shape": list(work.shape), "times": found})
    return rows


def packages_of(tree: Path) -> dict[str, str]:
    """What the environment of a process has that imports the packages of this tree."""
    return {"PYTHONPATH": os.pathsep.join(map(str, (tree, tree / "backends", tree / "onnx_export")))}


@contextmanager
def engine(name: str, cores: int, seconds: float, tree: Path | None = None, isa: str | None = None) -> Iterator[Ask]:
    """A process of one engine, and what asks it for a turn; of the packages of another `tree` of this project where it is given."""
    environment = {**os.environ, **dict.fromkeys(_THREADS, str(cores)), "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "0"}
    environment["PORTNORM_KERNELS"] = "wait"
    held = environment_of(isa)
    environment |= held
    if cores == 1:
        environment["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen=false {held.get('XLA_FLAGS', '')}".strip()
    if tree is not None:
        environment |= packages_of(tree)
    command = [sys.executable, "-m", "portnorm.bench.worker", name, str(seconds), str(cores)]
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    with tempfile.TemporaryFile("w+") as errors:
        with held_back():
            try:
                if before is not None:
                    os.sched_setaffinity(0, sorted(before)[:cores])  # the child has what its parent had when it started
                process = subprocess.Popen(
                    command, cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
                )
            finally:
                if before is not None:
                    os.sched_setaffinity(0, before)
            forget = undone(process.kill)
        assert process.stdin is not None
        assert process.stdout is not None
        given, answers = process.stdin, process.stdout

        def ask(work: Work) -> dict[str, Any] | None:
            try:
                given.write(json.dumps(work.fields) + "\n")
                given.flush()
            except BrokenPipeError:  # said below
                pass
            line = answers.readline()
            if not line:
                errors.seek(0)
                raise UnsupportedError(f"the process of {name} ended with {process.wait()}: {errors.read().strip()[-2000:]}")
            answer: dict[str, Any] | None = json.loads(line)
            return answer

        try:
            yield ask
        finally:
            process.kill()
            process.communicate()
            forget()


def best_peer(row: dict[str, Any]) -> tuple[str, float] | None:
    """Name and minimum of the fastest engine of another library, `None` where there is none."""
    peers = {name: t["min"] for name, t in row["times"].items() if not ENGINES[name].own and name not in FLOORS}
    if not peers:
        return None
    name = min(peers, key=lambda k: peers[k])
    return name, peers[name]


def ratio(row: dict[str, Any], turn: int | None = None) -> float | None:
    """The fastest of this library's engines over the fastest peer, of all turns or of one; `None` where one of them is missing."""
    times = {name: t["min"] if turn is None else t["turns"][turn] for name, t in row["times"].items() if name not in FLOORS}
    own, peers = ([t for name, t in times.items() if ENGINES[name].own is mine] for mine in (True, False))
    return min(own) / min(peers) if own and peers else None


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
    """GB/s of a normalization or update, GFLOP/s of a recurrent layer's matrix products, by one engine or the fastest of this library's."""
    times = [t["min"] for n, t in row["times"].items() if (n == name if name else ENGINES[n].own)]
    work = Work.of(row)
    return (work.flops if work.recurrent else work.bytes) / min(times) / 1e6 if times else None


def machine() -> dict[str, str]:
    """The processor and the versions of what was measured."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next((line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")), model)
    found = {"processor": model, "cores": str(os.cpu_count()), "system": platform.system(), "isa": shown()}
    for name in ("numpy", "numba", "torch", "jax", "onnxruntime"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
