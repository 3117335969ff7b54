"""Which graph runs in which of the further runtimes: `python -m benchmarks.further [TARGET …] [LAYER …]`, or `make runtimes-more`.

Every kind of layer is exported for every target in three ways, and verified in the target's runtime, which runs in a process of its own in
an environment of its own. Writes benchmarks/results/further.json, from which `make readme` makes tables of docs/runtimes.md.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import portnorm as pn
from benchmarks.behind_graphs import random_numbers
from benchmarks.ways_out import short
from portnorm.bench.runner import machine
from portnorm.errors import ConformanceError, ExportError, MissingExtraError, PortnormError, UnsupportedError
from portnorm.layers.recurrent import Recurrent, recurrent_parts
from portnorm_onnx.elsewhere import ENGINES
from portnorm_onnx.runtimes import runtime_of
from portnorm_onnx.storage import Draft
from portnorm_onnx.targets import TARGETS
from portnorm_onnx.verify import check
from portnorm_onnx.workers import Worker

RESULTS = Path(__file__).parent / "results" / "further.json"
SECONDS = 300
"""Longer than this for one cell is no answer."""
INPUTS, HIDDEN, STEPS = 6, 8, 5
FAR = 1e4
WAYS = ("step", "fixed", "open")
"""A streaming graph of one sequence; a graph of five steps of one sequence; one of any lengths."""

SUBJECTS: dict[str, tuple[str, str]] = {
    "onnxruntime": ("portable", "onnxruntime"),
    **{name: (name, name) for name, row in TARGETS.items() if row.further},
    **{name: ("portable", name) for name in ENGINES if name.startswith("onnxruntime-")},
}
"""Rows of the table: target and runtime; onnxruntime as the yardstick."""


@dataclass(frozen=True)
class Kind:
    """A layer, and the shapes of its `x`."""

    make: Callable[[], pn.Layer]
    fixed: tuple[int, ...]
    open: tuple[int | str, ...]
    batch_open: tuple[int | str, ...]
    step: tuple[int, ...] = (1, INPUTS)
    mean: float = 0.0
    """Of the values that it is tried on, in standard deviations."""
    accurate: bool = False
    """Whether it is exported so."""


def _recurrent(cell: type[Recurrent], norm: Any, **keywords: Any) -> Kind:
    return Kind(
        lambda: random_numbers(cell(INPUTS, HIDDEN, norm=norm, t_max=4, rng=0, **keywords)),
        (STEPS, 1, INPUTS),
        ("time", "batch", INPUTS),
        (STEPS, "batch", INPUTS),
    )


def _rows(make: Callable[[], pn.Layer], mean: float = 0.0, values: int = INPUTS, accurate: bool = False) -> Kind:
    return Kind(make, (3, values), ("batch", values), ("batch", values), mean=mean, accurate=accurate)


def _images(make: Callable[[], pn.Layer], mean: float = 0.0, side: int = 4) -> Kind:
    fixed = (3, INPUTS, side, side)
    return Kind(lambda: random_numbers(make()), fixed, ("batch", INPUTS, "height", "width"), ("batch", *fixed[1:]), mean=mean)


def _far() -> pn.Layer:
    layer = random_numbers(pn.BatchNorm(INPUTS))
    statistics = {"running_mean": np.full(INPUTS, FAR, np.float32), "running_var": np.linspace(0.5, 1.5, INPUTS, dtype="float32")}
    layer.assign(layer.parameters(), {**layer.buffers, **statistics})
    return layer


def _tagger() -> pn.Layer:
    lstm = random_numbers(pn.LSTM(INPUTS, HIDDEN, norm="layer", rng=1))
    return pn.Sequential(pn.Embedding(9, INPUTS, rng=0), lstm, pn.Linear(HIDDEN, 3, rng=2))


_BEFORE = pn.Variant(source="Cho et al. 2014", biases=("bias_ih", "bias_hh"), reset="before")
KINDS: dict[str, Kind] = {
    "LSTM": _recurrent(pn.LSTM, None),
    "GRU": _recurrent(pn.GRU, None),
    "GRU, reset before": _recurrent(pn.GRU, _BEFORE),
    "RNN": _recurrent(pn.RNN, None),
    "LN-LSTM": _recurrent(pn.LSTM, "layer"),
    "LN-GRU": _recurrent(pn.GRU, "layer"),
    "BN-LSTM": _recurrent(pn.LSTM, "batch"),
    "LSTM, two directions": _recurrent(pn.LSTM, None, bidirectional=True),
    "LN-LSTM, two directions": _recurrent(pn.LSTM, "layer", bidirectional=True),
    "two layers of LN-GRU, batch first": Kind(
        lambda: random_numbers(pn.GRU(INPUTS, HIDDEN, norm="layer", num_layers=2, batch_first=True, rng=0)),
        (1, STEPS, INPUTS),
        ("batch", "time", INPUTS),
        ("batch", STEPS, INPUTS),
    ),
    "Embedding, LN-LSTM, Linear": Kind(_tagger, (STEPS, 1), ("time", "batch"), (STEPS, "batch"), (1,)),
    "LayerNorm": _rows(lambda: random_numbers(pn.LayerNorm(INPUTS))),
    "LayerNorm, mean 10,000 σ": _rows(lambda: random_numbers(pn.LayerNorm(INPUTS)), FAR),
    "LayerNorm, mean 10,000 σ, `accurate=True`": _rows(lambda: random_numbers(pn.LayerNorm(INPUTS)), FAR, accurate=True),
    "LayerNorm of 4,096, mean 10,000 σ": _rows(lambda: random_numbers(pn.LayerNorm(4096)), FAR, 4096),
    "RMSNorm": _rows(lambda: random_numbers(pn.RMSNorm(INPUTS))),
    "BatchNorm": _rows(lambda: random_numbers(pn.BatchNorm(INPUTS))),
    "BatchNorm, mean 10,000 σ": _rows(_far, FAR),
    "BatchNorm of images": _images(lambda: pn.BatchNorm(INPUTS)),
    "GroupNorm": _images(lambda: pn.GroupNorm(2, INPUTS)),
    "InstanceNorm": _images(lambda: pn.InstanceNorm(INPUTS, affine=True)),
    "InstanceNorm of 64 × 64, mean 10,000 σ": _images(lambda: pn.InstanceNorm(INPUTS, affine=True), FAR, 64),
}


def goes_back(layer: pn.Layer) -> bool:
    return any(part.goes_back for part in recurrent_parts(layer))


def shape_of(kind: Kind, way: str) -> tuple[int | str, ...]:
    return {"step": kind.step, "fixed": kind.fixed, "open": kind.open, "batch open": kind.batch_open}[way]


def cell(subject: str, name: str, way: str) -> dict[str, Any]:
    """A word for what comes of it, with the largest difference or what was said."""
    target, runtime = SUBJECTS[subject]
    kind = KINDS[name]
    layer = kind.make()
    if way == "step" and (not layer.recurrent or goes_back(layer)):
        return {"word": "none", "said": ""}
    shape = shape_of(kind, way)
    cases = None
    if kind.mean:
        x = kind.mean + np.random.default_rng(0).standard_normal(kind.fixed)
        cases = [(x.astype("float32"), None)]
    given: Any = {"target": target, "input_shape": shape, "streaming": way == "step", "inputs": cases and [x for x, _ in cases]}
    given |= {"accurate": True} if kind.accurate else {}
    try:
        report = pn.export(layer, None, **given)
    except (UnsupportedError, ExportError) as error:
        return {"word": "refuses", "said": str(error)}
    assert report.model is not None
    late = threading.Event()

    def end() -> None:
        late.set()
        Worker.end(runtime)

    timer = threading.Timer(SECONDS, end)
    timer.start()
    try:
        found = check(Draft(report.model), layer, runtimes=(runtime,), cases=cases)
    except MissingExtraError as error:
        return {"word": "not installed", "said": str(error)}
    except PortnormError as error:
        word = "no answer" if late.is_set() else "differs" if isinstance(error, ConformanceError) else "does not run"
        return {"word": word, "said": short(str(error), Path("/tmp"))}
    finally:
        timer.cancel()
    worst = max(c.difference for c in (*found.steps, *found.trajectories) if kind.mean or "mean/std" not in c.case)
    return {"word": "right", "said": "", "difference": float(f"{worst:.2g}"), "nodes": report.nodes}


def rows_of(subject: str, kinds: list[str]) -> list[dict[str, Any]]:
    found = []
    for name in kinds:
        for way in WAYS:
            row = cell(subject, name, way)
            if way == "open" and row["word"] != "right" and KINDS[name].make().recurrent:
                fewer = cell(subject, name, "batch open")
                if fewer["word"] == "right":
                    row = fewer | {"word": "batch open"}
            print(f"{subject:<22} {name:<26} {way:<6} {row['word']:<14} {row.get('difference', '')}", row["said"][:200], flush=True)
            found.append({"subject": subject, "kind": name, "way": way, **row})
    return found


def version(subject: str) -> str | None:
    try:
        return runtime_of(SUBJECTS[subject][1]).version()
    except MissingExtraError:
        return None


def main(names: list[str]) -> None:
    """Measure all, or the targets and the layers that are named, and keep the rest as it was."""
    chosen = [s for s in SUBJECTS if s in names] or [*SUBJECTS]
    kinds = [k for k in KINDS if k in names] or [*KINDS]
    kept = json.loads(RESULTS.read_text()) if names and RESULTS.exists() else {"rows": [], "about": {"versions": {}}}
    rows = [r for r in kept["rows"] if r["subject"] not in chosen or r["kind"] not in kinds]
    for subject in chosen:
        rows += rows_of(subject, kinds)
    rows.sort(key=lambda r: (list(SUBJECTS).index(r["subject"]), list(KINDS).index(r["kind"]), WAYS.index(r["way"])))
    versions = {s: version(s) if s in chosen else kept["about"]["versions"].get(s) for s in SUBJECTS}
    RESULTS.write_text(json.dumps(kept | {"about": machine() | {"versions": versions}, "rows": rows}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
