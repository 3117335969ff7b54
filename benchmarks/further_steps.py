"""A hundred steps with states fed back in each of the further runtimes: `python -m benchmarks.further_steps`, or `make runtimes-more`.

The loop is in the process of the runtime, onnxruntime's in one of its own too. They take turns, on one thread. Results stand beside those
of `further.py`, as "steps".
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np

import portnorm as pn
from benchmarks.behind_graphs import random_numbers
from benchmarks.further import RESULTS, SUBJECTS
from portnorm.bench.runner import machine
from portnorm.errors import PortnormError
from portnorm_onnx.elsewhere import worker_of

INPUTS, HIDDEN, STEPS, ROUNDS = 64, 256, 100, 7
UNROLLED = 100
KINDS = {"LN-LSTM": "layer"}


def layer_of(norm: str | None) -> pn.LSTM:
    return random_numbers(pn.LSTM(INPUTS, HIDDEN, norm=norm, rng=0))  # type: ignore[return-value, arg-type]


def in_turns(norm: str | None) -> list[dict[str, Any]]:
    """For each runtime the least time of a step, over that of onnxruntime, also by round, and how far `y` is from the float64 run."""
    layer, rng = layer_of(norm), np.random.default_rng(0)
    x = rng.standard_normal((STEPS, 1, INPUTS)).astype("float32")
    exact, eager = layer.to(dtype="float64")(x.astype("float64"))[0], layer(x)[0]
    times: dict[str, list[float]] = {}
    runs: dict[str, Any] = {}
    found, said = {}, {}
    for name, (target, runtime) in SUBJECTS.items():
        try:
            model = pn.export(layer, None, target=target, streaming=True, input_shape=(1, INPUTS)).model  # type: ignore[arg-type]
            assert model is not None
            states = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input[1:]}
            fed = {f"{n.removesuffix('_0')}_n": n for n in states}
            session = worker_of(runtime).load_looped(model.SerializeToString(), fed)
            runs[name] = session, {"x": x, **{n: np.zeros(shape, np.float32) for n, shape in states.items()}}
        except PortnormError as error:
            said[name] = str(error)
    for turn in range(ROUNDS):
        for name, (session, given) in [*runs.items()]:
            try:
                result = session(given)
            except PortnormError as error:
                said[name] = str(error)
                del runs[name]
                continue
            times.setdefault(name, []).append(float(result["microseconds"].min()))
            found[name] = float(np.max(np.abs(result["y"].reshape(exact.shape) - exact)))
            print(f"{name:<22} turn {turn} {times[name][-1]:.1f} us {found[name]:.1e}", flush=True)
    rows = []
    for name in SUBJECTS:
        row: dict[str, Any] = {"subject": name, "said": said.get(name, "")}
        if name in runs:
            ratios = [t / o for t, o in zip(times[name], times["onnxruntime"], strict=True)]
            row |= {
                "microseconds": round(min(times[name]), 1),
                "ratio": round(min(times[name]) / min(times["onnxruntime"]), 3),
                "ratios": [round(r, 3) for r in ratios],
            }
            row |= {"difference": float(f"{found[name]:.2g}"), "eager": float(f"{np.max(np.abs(eager - exact)):.2g}")}
        rows.append(row)
    return rows


def seconds_of_unrolled() -> float:
    started = time.perf_counter()
    pn.export(layer_of("layer"), None, input_shape=(UNROLLED, 1, INPUTS), unroll=True, lengths=False)
    return round(time.perf_counter() - started, 2)


def main(names: list[str]) -> None:
    """Measure all, and keep it."""
    kept = json.loads(RESULTS.read_text())
    steps = {kind: in_turns(norm) for kind, norm in KINDS.items() if not names or kind in names}
    kept["steps"] = kept.get("steps", {}) | steps
    kept["unrolled"] = {"steps": UNROLLED, "seconds": seconds_of_unrolled()}
    kept["machine of steps"] = machine()
    RESULTS.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
