"""Table 1 of Ba, Kiros & Hinton 2016 (arXiv 1607.06450): under which transforms of weights and data a normalized layer stays as it is.

a = xW, normalized over the batch (BN), over the units (LN), by its root mean square over the units (RMS, not in the paper), or with
columns of W of fixed length (WN); ε = 0, since the statements are exact only there. Re-centring adds one vector to the incoming weights of
every unit, or one to every case. Measured is the largest change of any output, relative to the outputs' standard deviation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import portnorm as pn
from benchmarks.papers.common import Result, main

CASES, INPUTS, UNITS = 64, 20, 32
PUBLISHED = {"BN": "yes no yes yes yes no", "WN": "yes no yes no no no", "LN": "yes yes no yes no yes"}
NORMS: dict[str, Callable[[Any, Any], Any]] = {
    "BN": lambda x, w: pn.batch_norm(x @ w, eps=0.0),
    "WN": lambda x, w: x @ pn.weight_norm(w, np.ones(UNITS), axis=1),
    "LN": lambda x, w: pn.layer_norm(x @ w, eps=0.0),
    "RMS": lambda x, w: pn.rms_norm(x @ w, eps=0.0),
}


def transforms(rng: np.random.Generator) -> dict[str, Callable[[Any, Any], tuple[Any, Any]]]:
    case = np.where(np.arange(CASES) == 2, 3.0, 1.0)[:, None]
    vector, units, shift = rng.standard_normal((INPUTS, 1)), rng.uniform(0.5, 2.0, UNITS), rng.standard_normal(INPUTS)
    return {
        "weight matrix re-scaled": lambda x, w: (x, 3.0 * w),
        "weight matrix re-centred": lambda x, w: (x, w + vector),
        "weight vectors re-scaled": lambda x, w: (x, w * units),
        "dataset re-scaled": lambda x, w: (3.0 * x, w),
        "dataset re-centred": lambda x, w: (x + shift, w),
        "one case re-scaled": lambda x, w: (x * case, w),
    }


def run(quick: bool) -> Result:
    rng = np.random.default_rng(0)
    x, w, changed = rng.standard_normal((CASES, INPUTS)), rng.standard_normal((INPUTS, UNITS)), transforms(rng)
    change = {
        norm: {name: float(np.max(np.abs(f(*t(x, w)) - f(x, w))) / np.std(f(x, w))) for name, t in changed.items()}
        for norm, f in NORMS.items()
    }
    rows, wrong = [], 0
    for norm, found in change.items():
        published = PUBLISHED[norm].split() if norm in PUBLISHED else ["–"] * len(found)
        cells = [f"{p} / {'yes' if v < 1e-9 else 'no'} ({v:.0e})" for p, v in zip(published, found.values(), strict=True)]
        wrong += sum(p != "–" and (p == "yes") != (v < 1e-9) for p, v in zip(published, found.values(), strict=True))
        rows.append((norm, *cells))
    finding = (
        f"{18 - wrong} of the 18 cells of the table are as published (published / measured, and the largest change). The paper's "
        f"text says that "
        "every method is invariant to re-scaling the dataset; its table says that weight normalization is not, and the table is right."
    )
    settings = {"cases": CASES, "inputs": INPUTS, "units": UNITS, "dtype": "float64", "eps": 0.0, "seed": 0}
    return Result("Invariances (Ba et al. 2016, table 1)", ("invariant?", *changed), rows, finding, settings, {"change": change})


def draw(result: Result, figure: Any) -> None:
    change = result.measured["change"]
    axes = figure.subplots()
    values = np.log10(np.maximum([list(row.values()) for row in change.values()], 1e-17))
    image = axes.imshow(values, cmap="viridis", vmin=-17, vmax=1, aspect="auto")
    axes.set_xticks(range(values.shape[1]), [name.replace(" re-", "\nre-") for name in result.columns[1:]])
    axes.set_yticks(range(values.shape[0]), list(change))
    for (i, j), value in np.ndenumerate(values):
        norm = list(change)[i]
        text = PUBLISHED[norm].split()[j] if norm in PUBLISHED else "–"
        axes.text(j, i, text, ha="center", va="center", color="white" if value < -6 else "black")
    axes.set_title("Largest relative change of the outputs; in the cells: invariant according to the paper")
    figure.colorbar(image, label="log₁₀")


if __name__ == "__main__":
    main("invariances", run, draw, (10.0, 3.5))
