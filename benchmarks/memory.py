"""Memory of a training step of LN-LSTM (1000, 32, 256, 512): `python -m benchmarks.memory` writes benchmarks/results/memory.json.

Each engine in processes of its own, one core, with few steps and with many: the difference of their peaks is what a step of the sequence
takes. The times are those of the many, the engines by turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

from benchmarks.tables import ROOT
from portnorm import bench
from portnorm.bench.worker import peak_kilobytes

OUT = ROOT / "benchmarks" / "results" / "memory.json"
FEW, MANY, TURNS = 200, 1000, 2
RECOMPUTED = {f"portnorm, recompute={every}": every for every in (8, 32, 100)}
ENGINES = ("portnorm", *RECOMPUTED, "torch", "JAX jit")


def work(steps: int) -> bench.Work:
    return bench.Work("LN-LSTM", (steps, 32, 256, 512), True)


def once(name: str, steps: int) -> dict[str, float]:
    """The peak of this process and the seconds of the second of two training steps."""
    one = work(steps)
    data = one.data()
    if name in RECOMPUTED:
        layer = one.layer()
        layer.load_state_dict({n: data[n] for n in layer.parameters()} | layer.buffers)

        def run() -> None:
            _, _, pullback = layer.vjp(data["x"], training=True, recompute=RECOMPUTED[name])
            pullback(data["dy"])

    else:
        run = bench.ENGINES[name].make(one, data)
    run()
    started = time.perf_counter()
    run()
    return {"seconds": time.perf_counter() - started, "peak_kb": peak_kilobytes()}


def main() -> None:
    """Measure, say on the way what, and write."""
    environment = {
        **os.environ,
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
        "PORTNORM_KERNELS": "wait",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    }
    pinned = ["taskset", "-c", "0"] if sys.platform == "linux" else []
    found: dict[str, Any] = {name: {FEW: [], MANY: []} for name in ENGINES}
    for turn in range(TURNS):
        for name in ENGINES:
            for steps in (FEW, MANY) if turn == 0 else (MANY,):
                print(f"turn {turn + 1} of {TURNS}: {name}, {steps} steps", flush=True)
                command = [*pinned, sys.executable, "-m", "benchmarks.memory", name, str(steps)]
                done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
                found[name][steps].append(json.loads(done.stdout))
    rows = {
        name: {
            "seconds": [one["seconds"] for one in of[MANY]],
            "bytes per step": (min(one["peak_kb"] for one in of[MANY]) - of[FEW][0]["peak_kb"]) * 1024 / (MANY - FEW),
        }
        for name, of in found.items()
    }
    OUT.write_text(json.dumps({"machine": bench.machine(), "work": work(MANY).name, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(once(sys.argv[1], int(sys.argv[2]))))
    else:
        main()
