"""`portnorm bench`: how fast this library and its peers are, or graphs in the runtimes that are installed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from portnorm import bench
from portnorm.arrays import require_extra
from portnorm.bench.isa import HELD
from portnorm.commands.modules import add_option
from portnorm.commands.progress import ProgressLine
from portnorm.conform.modules import load_modules
from portnorm.errors import UnsupportedError
from portnorm.scalars import real_number, whole_number


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="*", metavar="ENGINE or FILE.onnx", help="only these engines, or these graphs (default: all engines)")
    parser.add_argument(
        "--only", action="append", default=[], help="of engines: only works whose name has this in it; may be repeated (default: all)"
    )
    parser.add_argument("--cores", type=int, default=1, help="of engines: cores and threads of each (default: 1)")
    parser.add_argument("--isa", choices=[*HELD], help="of engines: hold them to this instruction set (default: what the processor has)")
    parser.add_argument(
        "--runtime",
        "--runtimes",
        action="append",
        default=[],
        metavar="NAME",
        help="of graphs: only in this runtime; may be repeated, or several with commas (default: all that are installed)",
    )
    parser.add_argument(
        "--dim",
        action="append",
        default=[],
        metavar="NAME=N",
        help="of graphs: the number for a length that is open; may be repeated (default: batch=1, time=100, others 16)",
    )
    parser.add_argument("--seconds", type=float, default=0.1, help="time per work, engine and round (default: 0.1)")
    parser.add_argument("--rounds", type=int, default=5, help="how often engines, or runtimes, take turns (default: 5)")
    add_option(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    load_modules(options.modules)
    whole_number("--cores", options.cores, 1), whole_number("--rounds", options.rounds, 1)
    real_number("--seconds", options.seconds, 0.0, 3600.0, "a number from 0 to 3600")
    graphs = [name for name in options.what if name not in bench.ENGINES and (name.endswith(".onnx") or Path(name).exists())]
    engines = [name for name in options.what if name not in graphs]
    if graphs and engines:
        raise UnsupportedError(f"graphs and engines are measured apart; {', '.join(engines)} is no file that is there")
    for name in ("runtime", "dim") if not graphs else ("only", "isa"):
        if getattr(options, name):
            raise UnsupportedError(f"`--{name}` is of {'engines' if graphs else 'graphs'}, and what is measured is the other")
    return _of_graphs(graphs, options) if graphs else _of_engines(engines, options)


def _of_graphs(names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    latency = require_extra("portnorm_onnx.latency", "onnx")
    runtimes = [name.strip() for given in options.runtime for name in given.split(",")]
    dims, progress, rows = dict(map(_dim, options.dim)), ProgressLine(options.json), []
    for name in names:
        found = latency.measure(Path(name), runtimes or None, dims=dims, seconds=options.seconds, rounds=options.rounds, progress=progress)
        progress.clear()
        rows += found
        if not options.json:
            print(f"{name}: {_call(found, dims)}")
            print(_laid_out(latency.laid_out(found)))
    if not options.json:
        print("calls from Python; onnxruntime in one thread; where a runtime is a process of its own, the way to it is in the times")
    return {"rows": [row.to_dict() for row in rows]}


def _call(rows: list[Any], dims: dict[str, int]) -> str:
    row = next(row for row in rows if row.status == "measured")
    what = [f"{row.steps} steps" if row.steps else "a step" if row.fed else "a call", f"batch {dims.get('batch', 1)}"]
    what += [f"{name} {number}" for name, number in dims.items() if name not in ("batch", "time")]
    return ", ".join([*what, *([f"{', '.join(row.fed)} fed back"] if row.fed else [])])


def _laid_out(table: list[list[str]]) -> str:
    """Columns: names and what is said to the left, numbers to the right."""
    last, widths = len(table[0]) - 1, [max(len(row[k]) for row in table) for k in range(len(table[0]))]
    lines = []
    for row in table:
        cells = [cell.ljust(widths[k]) if k in (0, 1, last) else cell.rjust(widths[k]) for k, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _dim(given: str) -> tuple[str, int]:
    name, _, number = given.rpartition("=")
    if not name or not number.isdecimal() or int(number) < 1:
        raise UnsupportedError(f"`--dim` is {given!r}; expected NAME=N with a whole number from 1 on, such as time=64")
    return name, int(number)


def _of_engines(names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    works = [work for work in bench.WORKS if not options.only or any(part in work.name for part in options.only)]
    if not works:
        raise UnsupportedError(
            f"`--only` {' '.join(options.only)} leaves no work; works are {', '.join(work.name for work in bench.WORKS)}"
        )

    def progress(what: str) -> None:
        if not options.json:
            print(what, file=sys.stderr, flush=True)

    free = [name for name in names or bench.ENGINES if name in bench.ENGINES and not bench.ENGINES[name].holds] if options.isa else []
    if names and set(names) <= set(free):
        raise UnsupportedError(f"nothing holds {', '.join(free)} to {options.isa}; leave `--isa` out, or name other engines")
    rows = bench.measure(
        works, names or None, cores=options.cores, seconds=options.seconds, rounds=options.rounds, isa=options.isa, progress=progress
    )
    about = bench.machine()
    if not options.json:
        print(bench.laid_out(rows))
        print(about["processor"] + (f", held to {options.isa}" if options.isa else f", {about['isa']}" if about["isa"] else ""))
        if free:
            print(f"left out, since nothing holds them to {options.isa}: {', '.join(free)}")
    return {"machine": about, "cores": options.cores, "isa": options.isa, "rows": rows}
