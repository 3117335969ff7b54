"""What the scripts about real models share: files of installed packages, an exported graph that runs, and both sides' times."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import portnorm as pn

Call = Callable[[], np.ndarray]


@dataclass
class Case:
    """One model with an input: what portnorm gives on NumPy, what the graph gives that it exported, and what the original gives."""

    model: str
    part: str
    by: str
    """What computes the original."""
    numpy: Call
    onnx: Call
    original: Call
    timed: Callable[[], Any] | None = None
    """The original's own call, where `original` does more than it."""

    def measured(self) -> dict[str, Any]:
        """The largest differences, and the milliseconds of one call."""
        expected = self.original()
        ms = milliseconds({"NumPy": self.numpy, "ONNX": self.onnx, "original": self.timed or self.original})
        differences = {"NumPy": difference(self.numpy(), expected), "ONNX": difference(self.onnx(), expected)}
        return {
            "model": self.model,
            "part": self.part,
            "by": self.by,
            "largest": float(np.max(np.abs(expected))),
            "differences": differences,
            "ms": ms,
        }


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
    """The graph that `portnorm.export` writes for onnxruntime, as a function of its inputs by name that gives its outputs."""
    graph = session(pn.export(layer, None, target="onnxruntime", **options).model)
    return lambda **feed: graph.run(None, feed)


def difference(a: Any, b: Any) -> float:
    """The largest; NaN counts."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape, f"{a.shape} beside {b.shape}"
    return float(np.max(np.abs(a - b)))


def milliseconds(calls: dict[str, Callable[[], Any]], turns: int = 30) -> dict[str, float]:
    """The least processor time of one call of each, which other programs hardly change. In turns of some 30 ms, fewer of slow calls."""
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()
    began = time.perf_counter()
    for turn in range(turns):
        if turn > 1 and time.perf_counter() - began > 10:
            break
        for name, call in calls.items():
            end = time.perf_counter() + 0.03
            while time.perf_counter() < end:
                start = time.process_time()
                call()
                best[name] = min(best[name], (time.process_time() - start) * 1e3)
    return best


def main(cases: Callable[[], Iterator[Case]]) -> None:
    """Print each case, with `--json` as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true", help="print JSON")
    if parser.parse_args().json:
        print(json.dumps([case.measured() for case in cases()]))
        return
    for row in (case.measured() for case in cases()):
        differs, ms = row["differences"], row["ms"]
        print(f"{row['model']}, {row['part']}, beside {row['by']}:")
        print(
            f"  differs by at most {differs['NumPy']:.1e}, as ONNX {differs['ONNX']:.1e}, where the largest value is {row['largest']:.2g}"
        )
        print(f"  {ms['NumPy']:.2f} ms, as ONNX {ms['ONNX']:.2f} ms, the original {ms['original']:.2f} ms")
