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
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

import portnorm as pn

RESULTS = Path(__file__).parent / "results" / "latency.json"
SHAPES = ((64, 64, 512, 1024), (100, 32, 128, 256), (784, 64, 1, 100), (64, 1, 64, 128))
"""(time, batch, inputs, hidden)"""
GRAPHS: dict[str, tuple[str | None, int | None]] = {
    "plain": (None, None),
    "LN-LSTM": ("layer", None),
    "LN-LSTM, opset 18": ("layer", 18),
    "BN-LSTM": ("batch", None),
}
"""norm and opset"""
FLOORS = {"product, sum, split": False, "with three norms": True}
"""What an LN-LSTM takes before it has a gate: loops of these nodes alone, and whether they are normalized."""
TURNS = 25


def exported(layer: pn.Layer, opset: int | None) -> onnx.ModelProto:
    """The layer's graph for onnxruntime, without `lengths`."""
    report = pn.export(layer, None, target="onnxruntime", lengths=False, opset=opset)
    assert report.model is not None
    return report.model


def floor(inputs: int, hidden: int, *, normalized: bool) -> onnx.ModelProto:
    """x·W before a loop that adds h·U and splits the sum: h, c and y are parts of it."""
    rng, gates = np.random.default_rng(0), 4 * hidden
    weights = {"W": rng.standard_normal((inputs, gates)), "U": rng.standard_normal((hidden, gates)) / hidden}
    weights |= {"gains": np.ones(gates), "gain": np.ones(hidden)} if normalized else {}
    known = {name: numpy_helper.from_array(a.astype(np.float32), name) for name, a in weights.items()}

    def norm(kind: str, x: str, gain: str, y: str) -> onnx.NodeProto:
        return helper.make_node(kind if normalized else "Identity", [x, gain] if normalized else [x], [y])

    def typed(name: str, *dims: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)

    step = [
        norm("LayerNormalization", "u", "gains", "u'"),
        helper.make_node("MatMul", ["h", "U"], ["a"]),
        norm("RMSNormalization", "a", "gains", "a'"),
        helper.make_node("Add", ["u'", "a'"], ["z"]),
        helper.make_node("Split", ["z"], ["h'", "part", "y", "unused"], axis=-1, num_outputs=4),
        norm("LayerNormalization", "part", "gain", "c'"),
    ]
    states, sums = [typed("h", "batch", hidden), typed("c", "batch", hidden)], typed("u", "batch", gates)
    after = [typed(name, "batch", hidden) for name in ("h'", "c'", "y")]
    body = helper.make_graph(step, "step", [*states, sums], after, [a for name, a in known.items() if name != "W"])
    first = [
        helper.make_node("Shape", ["x"], ["batch"], start=1, end=2),
        helper.make_node("Concat", ["batch", "hidden"], ["shape"], axis=0),
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("MatMul", ["x", "W"], ["terms"]),
        helper.make_node("Scan", ["zeros", "zeros", "terms"], ["last h", "last c", "all"], num_scan_inputs=1, body=body),
    ]
    given = [known["W"], numpy_helper.from_array(np.array([hidden]), "hidden")]
    graph = helper.make_graph(first, "floor", [typed("x", "time", "batch", inputs)], [typed("all", "time", "batch", hidden)], given)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    """In one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def measure(shape: tuple[int, int, int, int]) -> dict[str, Any]:
    """Milliseconds of each norm, and the ratio to the plain operator, from turns that are taken one after the other."""
    steps, batch, inputs, hidden = shape
    x = np.random.default_rng(0).standard_normal((steps, batch, inputs)).astype(np.float32)
    layers = {name: (pn.LSTM(inputs, hidden, norm=norm, t_max=steps, rng=0), opset) for name, (norm, opset) in GRAPHS.items()}
    runs = {name: session(exported(*given)) for name, given in layers.items()}
    runs |= {name: session(floor(inputs, hidden, normalized=normalized)) for name, normalized in FLOORS.items()}
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
