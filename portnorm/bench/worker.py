"""One engine in a process of its own, started by `runner` with its cores and threads set: works come in, results go out as JSON lines."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy

from portnorm.arrays import without_kernels
from portnorm.bench.engines import ENGINES, FLOORS
from portnorm.bench.works import NORMS, Work
from portnorm.op import vjp


def expected(work: Work) -> list[Any]:
    """What a work gives, by the definitions in float64."""
    data = {name: value.astype(numpy.float64) for name, value in work.data().items()}
    with without_kernels(numpy.ndarray):
        if work.recurrent:
            layer = work.layer("float64")
            layer.load_state_dict({name: data[name] for name in layer.parameters()} | layer.buffers)
            training = work.backward or work.what == "BN-LSTM"
            y, _, pullback = layer.vjp(data["x"], training=training)
            return [y, pullback(data["dy"])[0]] if work.backward else [y]
        groups = (8,) if work.what == "GN" else ()
        y, pullback = vjp(NORMS[work.what], data["x"], *groups, data["weight"], data["bias"])
        return [y, pullback(data["dy"])[0]] if work.backward else [y]


def difference(name: str, work: Work) -> float:
    """The largest difference from float64, relative to the largest value."""
    run = ENGINES[name].make(work, work.data())
    assert run is not None
    found = run()
    found = found if work.backward else (found,)
    return max(
        float(numpy.max(numpy.abs(numpy.asarray(a) - e)) / numpy.max(numpy.abs(e))) for a, e in zip(found, expected(work), strict=True)
    )


def peak_kilobytes() -> int:
    """The most memory that this process had. Where there is no /proc, that of the process that started it counts too, if it was more."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def timed(name: str, work: Work, seconds: float) -> dict[str, Any] | None:
    """Minimum and median, in milliseconds, of as many runs as fit into `seconds`, at least three; `None` where there is no such thing.

    Before that the same with few steps or rows is compared with float64. Raises `ArithmeticError` where it is 1e-3 of the largest off.
    """
    if ENGINES[name].make(work.shortened(), work.shortened().data()) is None:
        return None
    error = None if name in FLOORS else difference(name, work.shortened())
    if error is not None and not error < 1e-3:
        raise ArithmeticError(f"{name} is {error:.1e} off in {work.name}")
    run = ENGINES[name].make(work, work.data())
    assert run is not None
    run()
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < until:
        started = time.perf_counter()
        run()
        times.append((time.perf_counter() - started) * 1e3)
    return {"min": min(times), "median": statistics.median(times), "runs": len(times), "error": error, "peak_kb": peak_kilobytes()}


def main() -> None:
    """Engine and seconds are arguments; threads are those of the environment."""
    name, seconds = sys.argv[1], float(sys.argv[2])
    if "torch" in name:
        import torch

        torch.set_num_threads(int(sys.argv[3]))
    for line in sys.stdin:
        what, shape, backward = json.loads(line)
        print(json.dumps(timed(name, Work(what, tuple(shape), backward), seconds)), flush=True)


if __name__ == "__main__":
    main()
