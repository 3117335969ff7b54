"""`portnorm conform`: conformance."""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
import time
from pathlib import Path
from typing import Any

import portnorm
from portnorm.arrays import require_extra
from portnorm.errors import UnsupportedError
from portnorm.files import written_whole
from portnorm.libraries import SUPPORT


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "subjects", nargs="*", metavar="SUBJECT", help="libraries and runtimes, or `all` (default: libraries that are installed)"
    )
    parser.add_argument("--operation", action="append", help="only this operation (may be repeated; no recurrent cells then)")
    parser.add_argument("--regime", action="append", help="only this regime of values (may be repeated)")
    parser.add_argument("--dtype", action="append", help="only this type (may be repeated)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with a heat map")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write JUnit XML")
    parser.add_argument(
        "--vectors", type=Path, metavar="DIR", help="write the cases in the layout of ONNX's backend tests, and measure nothing"
    )
    parser.add_argument(
        "--import", dest="modules", action="append", default=[], metavar="MODULE", help="import a module that adds cases or runtimes"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    from portnorm import conform
    from portnorm.conform import report
    from portnorm.conform.libraries import LIBRARIES

    for module in options.modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UnsupportedError(f"`--import` names {module!r}: {error}") from None
    chosen = (options.operation, options.regime, options.dtype)
    if options.vectors is not None:
        names = require_extra("portnorm_onnx.conformance", "onnx").write_vectors(options.vectors, conform.cases(*chosen))
        if not options.json:
            print(f"{options.vectors}: {len(names)} cases")
        return {"vectors": str(options.vectors), "cases": names}
    if not any(True for _ in conform.cases(*chosen)):
        raise UnsupportedError(f"no case is left; operations are {', '.join(conform.OPERATIONS)}; regimes are {', '.join(conform.REGIMES)}")
    subjects = options.subjects or [*SUPPORT]
    if "all" in subjects:
        runtimes = require_extra("portnorm_onnx.runtimes", "onnx").RUNTIMES
        subjects = [*LIBRARIES, *runtimes]
    started, count = time.monotonic(), 0
    interactive = sys.stderr.isatty() and not options.json

    def progress(what: str) -> None:
        nonlocal count
        count += 1
        if interactive:
            print(f"\r\x1b[K{count:5d}  {time.monotonic() - started:5.0f} s  {what}", end="", file=sys.stderr, flush=True)

    results = list(conform.measure(subjects, operations=chosen[0], regimes=chosen[1], dtypes=chosen[2], progress=progress))
    if interactive:
        print("\r\x1b[K", end="", file=sys.stderr)
    about = {"portnorm": portnorm.__version__, "python": platform.python_version(), "machine": platform.machine()}
    for path, text in ((options.html, report.to_html), (options.junit, lambda found, _: report.to_junit(found))):
        if path is not None:
            with written_whole(path) as file:
                file.write(text(results, about).encode())
    if not options.json:
        print(report.laid_out(report.table(results)))
        for r in results:
            if r.failed:
                print(f"{r.status}: {r.subject} / {r.operation} / {r.regime} / {r.dtype} / {r.side}: {r.detail}")
    options.failed = any(r.failed for r in results)
    return {"about": about, "results": [r.to_dict() for r in results]}
