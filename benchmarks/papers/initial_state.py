"""A learned initial state in a BN-LSTM (Cooijmans et al. 2016, arXiv 1603.09025, whose code learns h0 and c0).

All sequences of a batch start from the same row h0, so all rows of h0·W_h are alike, and batch normalization makes β of them whatever h0
is: ∂loss/∂h0 = 0. c0 has a gradient, through the forget gate. Measured: norms of both gradients for random values of h0, c0 and of the
loss's cotangent.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import portnorm as pn
from benchmarks.papers.common import COLORS, Result, main

MODELS: dict[str, Any] = {"plain": None, "BN": "batch", "LN": "layer"}
STEPS, BATCH, SIZE = 20, 16, 32


def run(quick: bool) -> Result:
    seeds = 2 if quick else 50
    found: dict[str, dict[str, list[float]]] = {}
    for name, norm in MODELS.items():
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            layer = pn.LSTM(SIZE, SIZE, norm=norm, dtype="float64", t_max=STEPS, rng=rng)
            h0, c0 = (np.repeat(rng.standard_normal((1, 1, SIZE)), BATCH, axis=1) for _ in range(2))
            state = (h0, c0, np.asarray(0)) if layer.timed else (h0, c0)
            y, _, pullback = layer.vjp(rng.standard_normal((STEPS, BATCH, SIZE)), state, training=True)
            dh, dc = (np.sum(d, axis=1) for d in pullback(rng.standard_normal(y.shape))[1][:2])
            entry = found.setdefault(name, {"h0": [], "c0": []})
            entry["h0"].append(float(np.linalg.norm(dh)))
            entry["c0"].append(float(np.linalg.norm(dc)))
    rows = [
        (name, "0" if name == "BN" else "not 0", f"{max(e['h0']):.1e}", f"{min(e['h0']):.1e}", f"{np.median(e['c0']):.2g}")
        for name, e in found.items()
    ]
    finding = (
        f"Over {seeds} random layers the gradient of h0 is at most {max(found['BN']['h0']):.0e} in the BN-LSTM, which is "
        f"rounding, and at least "
        f"{min(found['plain']['h0']):.1g} (plain) and {min(found['LN']['h0']):.1g} (LN) elsewhere. A learned h0 is a parameter "
        f"that never learns."
    )
    settings = {"steps": STEPS, "batch": BATCH, "hidden": SIZE, "seeds": seeds, "dtype": "float64"}
    columns = ("LSTM", "‖∂loss/∂h0‖, by the argument", "measured, largest", "measured, smallest", "‖∂loss/∂c0‖, median")
    return Result("A learned initial state (Cooijmans et al. 2016)", columns, rows, finding, settings, found)


def draw(result: Result, figure: Any) -> None:
    axes = figure.subplots()
    for k, (name, entry) in enumerate(result.measured.items()):
        for shift, key, marker in ((-0.1, "h0", "o"), (0.1, "c0", "x")):
            values = np.maximum(entry[key], 1e-18)
            axes.scatter(np.full(len(values), k + shift), values, marker=marker, color=COLORS[name], label=key if k == 0 else None, s=14)
    axes.set_yscale("log")
    axes.set_xticks(range(len(result.measured)), list(result.measured))
    axes.set_ylabel("norm of the gradient")
    axes.legend()


if __name__ == "__main__":
    main("initial_state", run, draw, (6.0, 3.6))
