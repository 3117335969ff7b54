"""`portnorm verify`: a graph against its model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import portnorm
from portnorm.commands.modules import add_option
from portnorm.conform.modules import load_modules
from portnorm.errors import ConformanceError


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="an .onnx file")
    parser.add_argument("--against", type=Path, help="checkpoint that the graph should compute (default: what the file says)")
    parser.add_argument("--runtime", action="append", help="runtime to check in, or `all` of them, a row each (default: onnxruntime)")
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="D",
        help="allow this difference instead, for a graph that was made smaller on purpose (default: two gates, see docs)",
    )
    add_option(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    load_modules(options.modules)
    model = None if options.against is None else portnorm.load(options.against)
    runtimes = options.runtime or ["onnxruntime"]
    report = portnorm.verify(options.model, model, runtimes="all" if "all" in runtimes else runtimes, tolerance=options.tolerance)
    if not options.json:
        print(report)
    if report.failures:
        raise ConformanceError("; ".join(f"{o.runtime}: {o.status}" for o in report.failures))
    found: dict[str, Any] = report.to_dict()
    return found
