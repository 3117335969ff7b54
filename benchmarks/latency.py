"""Latency of exported graphs in onnxruntime, one thread: normalized LSTMs as a `Scan` against the plain `LSTM` operator, same weights.

`python -m benchmarks.latency` measures in turns, so that a busy machine slows all alike, and writes benchmarks/results/latency.json.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

import portnorm as pn

RESULTS = Path(__file__).parent / "results" / "latency.json"
SHAPES = ((64, 64, 512, 1024), (100, 32, 128, 256), (64, 1, 64, 128))
"""(time, batch, inputs, hidden)"""
GRAPHS: dict[str, tuple[str | None, int | None]] = {
    "plain": (None, None),
    "LN-LSTM": ("layer", None),
    "LN-LSTM, opset 18": ("layer", 18),
    "BN-LSTM": ("batch", None),
}
"""norm and opset"""
TURNS = 25


def session(layer: pn.Layer, opset: int | None) -> ort.InferenceSession:
    """The layer's graph for onnxruntime, without `lengths`, in one thread."""
    report = pn.export(layer, None, target="onnxruntime", lengths=False, opset=opset)
    assert report.model is not None
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(report.model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def measure(shape: tuple[int, int, int, int]) -> dict[str, Any]:
    """Milliseconds of each norm, and the ratio to the plain operator, from turns that are taken one after the other."""
    steps, batch, inputs, hidden = shape
    x = np.random.default_rng(0).standard_normal((steps, batch, inputs)).astype(np.float32)
    runs = {name: session(pn.LSTM(inputs, hidden, norm=norm, t_max=steps, rng=0), opset) for name, (norm, opset) in GRAPHS.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(TURNS + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run.run(None, {"x": x})
            if turn:
                times[name].append((time.perf_counter() - started) * 1e3)
    ratios = {name: [a / b for a, b in zip(t, times["plain"], strict=True)] for name, t in times.items()}
    return {
        "shape": list(shape),
        "milliseconds": {name: {"min": min(t), "median": statistics.median(t)} for name, t in times.items()},
        "ratio": {
            name: {"of minima": min(times[name]) / min(times["plain"]), "median": statistics.median(r), "spread": [min(r), max(r)]}
            for name, r in ratios.items()
        },
    }


def main() -> None:
    """Measure on one core and write."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rows = []
    for shape in SHAPES:
        rows.append(measure(shape))
        ratios = "  ".join(f"{name} {r['of minima']:.2f} (median {r['median']:.2f})" for name, r in rows[-1]["ratio"].items())
        print(f"{shape}: plain {rows[-1]['milliseconds']['plain']['min']:.2f} ms; {ratios}")
    about = {"onnxruntime": ort.__version__, "machine": platform.machine(), "turns": TURNS}
    RESULTS.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
