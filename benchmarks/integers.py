"""Graphs with integers for weights against the same graphs in float32: time, size and accuracy, in onnxruntime on one thread.

`python -m benchmarks.integers` measures in turns, so that a busy machine slows all alike, and writes benchmarks/results/integers.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

import portnorm as pn
from benchmarks.tables import ROOT
from portnorm.bench.isa import HELD, environment_of, flags
from portnorm.bench.runner import machine

RESULTS = ROOT / "benchmarks" / "results" / "integers.json"
LAYERS: dict[str, tuple[type[Any], str | None, str]] = {
    "LN-LSTM": (pn.LSTM, "layer", "int8"),
    "BN-LSTM": (pn.LSTM, "batch", "int8"),
    "LSTM": (pn.LSTM, None, "int8"),
    "LN-GRU": (pn.GRU, "layer", "int8"),
    "GRU": (pn.GRU, None, "int8"),
    "LN-LSTM, int4": (pn.LSTM, "layer", "int4"),
    "LSTM, int4": (pn.LSTM, None, "int4"),
}
"""class, norm and integers"""
SHAPES = ((1, 1, 1024, 1024), (100, 1, 512, 512), (20, 32, 512, 512), (1, 1, 256, 256), (1, 1, 128, 128))
"""(time, batch, inputs, hidden); of one step the streaming graph is measured"""
TURNS, SECONDS = 7, 0.1


def session(model: Any) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def products_alone(outputs: int, hidden: int) -> ort.InferenceSession:
    """What a step cannot do without: the products of x and h (1, hidden) with int8 weights, each one node, and nothing else."""
    rng, names, weights = np.random.default_rng(0), ("x", "h"), []
    for name in names:
        for what, values in (
            ("w", rng.integers(-63, 64, (hidden, outputs)).astype(np.int8)),
            ("s", np.full(outputs, 0.01, np.float32)),
            ("z", np.zeros(outputs, np.int8)),
        ):
            weights.append(numpy_helper.from_array(values, what + name))
    made = [helper.make_node("DynamicQuantizeMatMul", [n, f"w{n}", f"s{n}", f"z{n}"], [f"y{n}"], domain="com.microsoft") for n in names]
    given, found = (
        [helper.make_tensor_value_info(letter + n, TensorProto.FLOAT, (1, size)) for n in names]
        for letter, size in (("", hidden), ("y", outputs))
    )
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return session(helper.make_model(helper.make_graph(made, "products", given, found, weights), opset_imports=domains, ir_version=10))


def measure(kind: type[Any], norm: str | None, quantize: str, shape: tuple[int, int, int, int]) -> dict[str, Any]:
    """Times of both graphs, the ratio of their minima and of each turn, the ratio of their files, and how far the results are apart."""
    steps, batch, inputs, hidden = shape
    layer = kind(inputs, hidden, norm=norm, t_max=min(steps, 20), rng=0)
    keywords: dict[str, Any] = {"streaming": True} if steps == 1 else {"lengths": False}
    models = {n: pn.export(layer, None, target="onnxruntime", quantize=n, metadata=False, **keywords).model for n in (None, quantize)}
    runs = {name: session(model) for name, model in models.items()}
    feed, rng = {}, np.random.default_rng(0)
    for given in runs[None].get_inputs():
        dims = [{"batch": batch, "time": steps}.get(d, d) for d in given.shape]
        drawn = rng.standard_normal(dims) if given.name == "x" else rng.uniform(-0.5, 0.5, dims)
        feed[given.name] = drawn.astype(np.float32) if "float" in given.type else np.zeros(dims, np.int64)
    y = {name: run.run(["y"], feed)[0] for name, run in runs.items()}
    feeds = dict.fromkeys([*runs], feed)
    if steps == 1 and quantize == "int8":
        runs["alone"] = products_alone(layer.params["weight_hh_l0"].shape[0], hidden)
        feeds["alone"] = {name: rng.standard_normal((1, hidden)).astype(np.float32) for name in ("x", "h")}
    times: dict[str | None, list[float]] = {name: [] for name in runs}
    for _ in range(TURNS):
        for name, run in runs.items():
            count, started = 0, time.perf_counter()
            while time.perf_counter() - started < SECONDS:
                run.run(None, feeds[name])
                count += 1
            times[name].append((time.perf_counter() - started) / count * 1e3)
    ratios = [b / a for a, b in zip(times[None], times[quantize], strict=True)]
    return {
        "shape": list(shape),
        "milliseconds": {"float32": min(times[None]), quantize: min(times[quantize])},
        "ratio": min(times[quantize]) / min(times[None]),
        "spread": [min(ratios), max(ratios)],
        **({"alone": min(times["alone"]) / min(times[None])} if "alone" in times else {}),
        "file": models[quantize].ByteSize() / models[None].ByteSize(),
        "difference": float(np.abs(y[None] - y[quantize]).mean()),
    }


def eager(kind: type[Any], norm: str | None, quantize: Any) -> dict[str, Any]:
    """The same of `step` in NumPy, for one sequence and 1024 features."""
    layer = kind(1024, 1024, norm=norm, rng=0)
    models = {None: layer, quantize: pn.quantized(layer, quantize)}
    pn.warm(*models.values())
    x = np.random.default_rng(0).standard_normal((1, 1024)).astype(np.float32)
    states = {name: model.step(x)[1] for name, model in models.items()}
    times: dict[str | None, list[float]] = {name: [] for name in models}
    for _ in range(TURNS):
        for name, model in models.items():
            count, started = 0, time.perf_counter()
            while time.perf_counter() - started < SECONDS:
                model.step(x, states[name])
                count += 1
            times[name].append((time.perf_counter() - started) / count * 1e3)
    ratios = [b / a for a, b in zip(times[None], times[quantize], strict=True)]
    return {"ratio": min(times[quantize]) / min(times[None]), "spread": [min(ratios), max(ratios)]}


def in_numpy(isa: str | None) -> list[dict[str, Any]]:
    """The steps in NumPy, in a process that is held to an instruction set."""
    command = [sys.executable, "-c", "import json; from benchmarks import integers as i; print(json.dumps(i.steps_in_numpy()))"]
    done = subprocess.run(command, env={**os.environ, **environment_of(isa)}, cwd=ROOT, capture_output=True, text=True, check=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    print(f"NumPy{f', {isa}' if isa else ''}:", ", ".join(f"{r['layer']} {r['ratio']:.2f}" for r in rows), flush=True)
    return rows


def steps_in_numpy() -> list[dict[str, Any]]:
    return [{"layer": name, **eager(*LAYERS[name])} for name in ("LN-LSTM", "LSTM", "GRU")]


def main() -> None:
    """Measure on one core and write."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rows = []
    for name, row in LAYERS.items():
        for shape in SHAPES:
            rows.append({"layer": name, **measure(*row, shape)})
            r = rows[-1]
            told = f"{r['ratio']:.2f} ({r['spread'][0]:.2f} to {r['spread'][1]:.2f}), file {r['file']:.2f}, {r['difference']:.1e}"
            print(f"{name:<14} {shape!s:<22} {told}", flush=True)
    numpy = {isa: in_numpy(isa) for isa in (None, *HELD) if isa is None or isa in flags()}
    about = machine() | {"vnni": "vnni" in Path("/proc/cpuinfo").read_text(), "turns": TURNS}
    RESULTS.write_text(json.dumps({"about": about, "rows": rows, "numpy": numpy.pop(None), "held": numpy}, indent=1) + "\n")


if __name__ == "__main__":
    main()
