"""The plot of docs/accuracy.md: error over mean / standard deviation, a line for each library and operator, readable in black and white."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

from benchmarks.accuracy import MEANS, SHOWN
from portnorm.conform.cases import OPERATIONS
from portnorm.conform.formulas import FOLDED, ONE_PASS, SUBTRACTED, TWO_PASSES

LOWEST, HIGHEST, NOT_FINITE = 1e-8, 1e4, 3e5
OFF = 30.0
"""A line is named where an error is more than so many times that of the two-pass formula."""
MARKERS = "os^Dv*XP<>dhp"
DASHES = ("-", "--", "-.", ":")
TITLES = {"batch_norm of a map": "batch_norm in training", "batch_norm with statistics": "batch_norm with given statistics"}


def errors(row: dict[str, Any], operation: str) -> dict[str, float]:
    """Error by regime in float32; above the axis where a value is not finite."""
    cells = [c for c in row.get("cells", ()) if c[0] == operation and c[2] == "float32" and c[1] in MEANS and not isinstance(c[3], str)]
    return {regime: NOT_FINITE if nonfinite else max(error, LOWEST) for _, regime, _, error, nonfinite in cells}


def digest(kept: dict[str, Any]) -> str:
    """A word for all that is drawn, which the picture holds, so that a test sees whether it is that of what is kept."""
    drawn = [[name, {operation: errors(row, operation) for operation in SHOWN}] for name, row in kept["subjects"].items()]
    return hashlib.sha256(json.dumps([drawn, kept["yardsticks"]]).encode()).hexdigest()[:16]


def draw(kept: dict[str, Any], path: Path) -> None:
    """A panel for each operation, one below the other, so that a phone shows it too."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams |= {"svg.hashsalt": "portnorm", "svg.fonttype": "path", "font.size": 11}
    figure, panels = pyplot.subplots(len(SHOWN), 1, figsize=(6.2, 4.6 * len(SHOWN)), layout="constrained")
    for axes, operation in zip(panels, SHOWN, strict=True):
        _panel(axes, operation, kept)
    figure.savefig(path, metadata={"Date": None, "Description": digest(kept)}, facecolor="white")
    pyplot.close(figure)


def _panel(axes: Any, operation: str, kept: dict[str, Any]) -> None:
    given = OPERATIONS[operation].given
    sticks = kept["yardsticks"][operation]
    near, far = (SUBTRACTED, FOLDED) if given else (TWO_PASSES, ONE_PASS)
    marks, plain = itertools.cycle(zip(MARKERS, itertools.cycle(DASHES))), 0
    x = [*MEANS.values()]
    for name, row in kept["subjects"].items():
        found = errors(row, operation)
        if not found:
            continue
        y = [found[regime] for regime in MEANS]
        bad = any(found[regime] > OFF * max(sticks[near][regime] or 0.0, 1e-7) for regime in MEANS) and operation != "rms_norm"
        if bad:
            marker, dash = next(marks)
            axes.plot(
                x, y, linestyle=dash, marker=marker, markersize=5, linewidth=1, color="black", markerfacecolor="white", label=name, zorder=3
            )
        else:
            own = name.startswith("portnorm")
            axes.plot(x, y, linewidth=1.4 if own else 0.8, color="0.25" if own else "0.72", linestyle=(0, (1, 1)) if own else "-", zorder=2)
            plain += not own
    if operation != "rms_norm":
        for form, dash, words in ((near, "-", near), (far, (0, (6, 2)), far)):
            y = [min(sticks[form][regime], HIGHEST) if sticks[form][regime] is not None else NOT_FINITE for regime in MEANS]
            axes.plot(
                x,
                [max(v, LOWEST) for v in y],
                color="black",
                linewidth=3,
                alpha=0.35,
                linestyle=dash,
                label=f"{words}, by formula",
                zorder=1,
            )
    axes.plot([], [], color="0.25", linewidth=1.4, linestyle=(0, (1, 1)), label="portnorm, on five libraries")
    axes.plot([], [], color="0.72", linewidth=0.8, label=f"the other {plain}")
    axes.set(xscale="log", yscale="log", ylim=(LOWEST, NOT_FINITE * 3), title=TITLES.get(operation, operation))
    axes.set_xticks(x, ["3", "10", "100", "1e3", "1e4", "1e6"])
    axes.set_yticks([1e-8, 1e-6, 1e-4, 1e-2, 1, 100, 1e4, NOT_FINITE], ["1e-8", "1e-6", "1e-4", "0.01", "1", "100", "1e4", "NaN"])
    axes.minorticks_off()
    axes.axhspan(HIGHEST * 3, NOT_FINITE * 3, color="0.93", zorder=0)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_xlabel("mean / standard deviation")
    axes.set_ylabel("largest error")
    axes.legend(loc="upper center", bbox_to_anchor=(0.46, -0.17), ncols=2, fontsize=9, frameon=False, handlelength=3.2)
