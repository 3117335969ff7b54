"""What the scripts about real models share: files of installed packages, an exported graph that runs, and both sides' times."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import portnorm as pn


@dataclass
class Row:
    """One model: how far portnorm and its exported graph are from the original, and the milliseconds of one call at batch 1."""

    model: str
    part: str
    original: str
    largest: float
    """The largest absolute value that the original gives."""
    numpy: float
    """The largest difference of portnorm on NumPy."""
    onnx: float
    """The largest difference of the graph that portnorm exported, in onnxruntime."""
    ms: dict[str, float]

    def __str__(self) -> str:
        times = ", ".join(f"{name} {t:.3f} ms" for name, t in self.ms.items())
        return f"{self.model}, {self.part}: differs by {self.numpy:.1e} (as ONNX {self.onnx:.1e}) of {self.largest:.2g}; {times}"


def package_file(package: str, path: str) -> Path:
    """A file of an installed package, which is not imported."""
    try:
        found = Path(str(importlib.metadata.distribution(package).locate_file(path)))
    except importlib.metadata.PackageNotFoundError as error:
        raise SystemExit(f"{package} is not installed; `make models` installs it") from error
    if not found.exists():
        raise SystemExit(f"{package} {importlib.metadata.version(package)} has no file {path}; `make models` installs the version that has")
    return found


def session(model: Any) -> Any:
    """onnxruntime with one thread on a file, or on a model in memory."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def exported(layer: pn.Layer, **options: Any) -> Callable[..., list[np.ndarray]]:
    """The graph that `portnorm.export` writes, as a function of its inputs by name that gives its outputs."""
    graph = session(pn.export(layer, None, **options).model)
    return lambda **feed: graph.run(None, feed)


def difference(a: Any, b: Any) -> float:
    """The largest; NaN counts."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape, f"{a.shape} beside {b.shape}"
    return float(np.max(np.abs(a - b)))


def milliseconds(calls: dict[str, Callable[[], Any]], turns: int = 9) -> dict[str, float]:
    """The least time of one call of each, measured in turns of some 30 ms; fewer turns where a call takes seconds."""
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()
    began = time.perf_counter()
    for turn in range(turns):
        if turn > 1 and time.perf_counter() - began > 5:
            break
        for name, call in calls.items():
            end = time.perf_counter() + 0.03
            while (start := time.perf_counter()) < end:
                call()
                best[name] = min(best[name], (time.perf_counter() - start) * 1e3)
    return best


def main(compare: Callable[[], list[Row]]) -> None:
    """Print the rows, or with `--json` write them as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true", help="print JSON")
    rows = compare() if (arguments := parser.parse_args()) else []
    print(json.dumps([asdict(row) for row in rows]) if arguments.json else "\n".join(map(str, rows)))
