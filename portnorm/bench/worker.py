"""One engine in a process of its own, started by `runner` with its cores and threads set: works come in, results go out as JSON lines."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from portnorm.arrays import without_kernels
from portnorm.bench.engines import ENGINES, FLOORS
from portnorm.bench.works import ALLOWED, Run, Work


def expected(work: Work) -> Sequence[Any]:
    """What a work gives, by this library's definitions in float64. The peers are written without them, and have to give the same."""
    data = {name: a.astype(numpy.float64) if a.dtype.kind == "f" else a for name, a in work.data().items()}
    with without_kernels(numpy.ndarray):
        run = ENGINES["portnorm"].make(work, data)
        assert run is not None
        return run()


def difference(name: str, work: Work) -> float:
    """The largest difference from float64, relative to the largest value."""
    run = ENGINES[name].make(work, work.data())
    assert run is not None
    pairs = zip(map(numpy.asarray, run()), expected(work), strict=True)
    return max(float(numpy.max(numpy.abs(a.reshape(e.shape) - e)) / numpy.max(numpy.abs(e))) for a, e in pairs)


def peak_kilobytes() -> int:
    """The most memory that this process had. Where there is no /proc, that of the process that started it counts too, if it was more."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Turns:
    """An engine at one work, which may come again.

    When it comes first, the same with few steps or rows is compared with float64. Raises `ArithmeticError` where it is farther off than
    `ALLOWED`.
    """

    def __init__(self, name: str, work: Work) -> None:
        self.work = work
        self.run: Run | None = None
        self.error: float | None = None
        self.times: list[float] = []
        self.best: list[float] = []
        if ENGINES[name].make(work.shortened(), work.shortened().data()) is None:
            return
        self.error = None if name in FLOORS else difference(name, work.shortened())
        if self.error is not None and not self.error < ALLOWED[work.dtype]:
            raise ArithmeticError(f"{name} is {self.error:.1e} off in {work.name}")
        self.run = ENGINES[name].make(work, work.data())

    def take(self, seconds: float) -> dict[str, Any] | None:
        """Minimum and median of all runs so far, and the minimum of each turn, in milliseconds.

        A turn has one run that is not counted, unless that is more than its time, and then as many as fit into `seconds`, at least one.
        `None` where the engine has no such thing.
        """
        if self.run is None:
            return None
        if not self.times or self.times[-1] < seconds * 1e3:
            self.run()
        found: list[float] = []
        until = time.perf_counter() + seconds
        while not found or time.perf_counter() < until:
            started = time.perf_counter()
            self.run()
            found.append((time.perf_counter() - started) * 1e3)
        self.times += found
        self.best.append(min(found))
        best, middle = min(self.best), statistics.median(self.times)
        about = {"runs": len(self.times), "error": self.error, "peak_kb": peak_kilobytes()}
        return {"min": best, "turns": self.best, "median": middle, **about}


def main() -> None:
    """Engine and seconds are arguments; threads are those of the environment."""
    name, seconds = sys.argv[1], float(sys.argv[2])
    if "torch" in name:
        import torch

        torch.set_num_threads(int(sys.argv[3]))
    turns: Turns | None = None
    for line in sys.stdin:
        what, shape, *further = json.loads(line)
        work = Work(what, tuple(shape), *further)
        if turns is None or turns.work != work:
            turns = Turns(name, work)
        print(json.dumps(turns.take(seconds)), flush=True)


if __name__ == "__main__":
    main()
