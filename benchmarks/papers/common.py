"""What the scripts share: the command, progress, a table of published and measured values, a JSON file, a picture."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

import portnorm as pn
from portnorm.files import written_whole

matplotlib.use("Agg")
from matplotlib import pyplot
from rich.progress import Progress

RESULTS = Path(__file__).parent.parent / "results" / "papers"
COLORS = {"plain": "tab:gray", "BN": "tab:blue", "LN": "tab:orange", "WN": "tab:green", "RMS": "tab:red"}


@dataclass
class Result:
    """What one script found."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    finding: str
    settings: dict[str, Any]
    measured: dict[str, Any] = field(default_factory=dict)

    def table(self) -> str:
        """As Markdown."""
        lines = [self.columns, tuple("---" for _ in self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(name: str, run: Callable[[bool], Result], draw: Callable[[Result, Any], None], size: tuple[float, float] = (10.0, 4.0)) -> None:
    """The command of a script: run it, print its table, and write its JSON file and picture unless it was a quick run."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.papers.{name}")
    parser.add_argument("--quick", action="store_true", help="a small run that writes nothing")
    options = parser.parse_args()
    start = time.perf_counter()
    result = run(options.quick)
    sys.stdout.write(f"{result.title}\n\n{result.table()}\n\n{result.finding}\n")
    figure = pyplot.figure(figsize=size, layout="constrained")
    draw(result, figure)
    if options.quick:
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    versions = {"numpy": np.__version__, "portnorm": pn.__version__}
    report = {"name": name, **asdict(result), "versions": versions, "seconds": round(time.perf_counter() - start, 1)}
    with written_whole(RESULTS / f"{name}.json") as file:
        file.write(json.dumps(report, indent=1).encode())
    with written_whole(RESULTS / f"{name}.png") as file:
        figure.savefig(file, format="png", dpi=110)


@contextmanager
def progress(text: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar, and the function that moves it on by one."""
    with Progress(transient=True) as bars:
        task = bars.add_task(text, total=total)
        yield lambda: bars.advance(task)


def spread(values: Iterable[float], digits: int = 1, unit: str = "") -> str:
    """Mean ± standard deviation."""
    array = np.asarray(list(values))
    return f"{array.mean():.{digits}f} ± {array.std():.{digits}f}{unit}"


def band(axes: Any, curves: Sequence[Sequence[float]], label: str, **style: Any) -> None:
    """The median of several curves, and the range between the lowest and the highest."""
    array = np.asarray(curves)
    x = np.arange(1, array.shape[1] + 1)
    axes.plot(x, np.median(array, axis=0), label=label, **style)
    axes.fill_between(x, array.min(axis=0), array.max(axis=0), alpha=0.2, **style)
