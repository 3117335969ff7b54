"""`portnorm conform`: array libraries and runtimes against float64."""

from __future__ import annotations

import argparse
import datetime
import difflib
import platform
from pathlib import Path
from typing import Any

import numpy

import portnorm
from portnorm.arrays import require_extra
from portnorm.commands.modules import add_option
from portnorm.commands.progress import ProgressLine
from portnorm.conform.modules import load_modules
from portnorm.errors import UnsupportedError
from portnorm.files import require_place, written_whole
from portnorm.libraries import SUPPORT


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "subjects", nargs="*", metavar="SUBJECT", help="libraries, runtimes and others' normalizations, or `all` (default: libraries)"
    )
    parser.add_argument("--operation", action="append", help='only this operation or cell ("LSTM layer"); may be repeated (default: all)')
    parser.add_argument("--regime", action="append", help="only this regime of values; may be repeated (default: all)")
    parser.add_argument("--dtype", action="append", help="only this type; may be repeated (default: all)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with a heat map (default: none)")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write JUnit XML (default: none)")
    parser.add_argument(
        "--vectors",
        type=Path,
        metavar="DIR",
        help="write the cases in the layout of ONNX's backend tests; alone it measures nothing (default: none)",
    )
    add_option(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    from portnorm import conform
    from portnorm.conform.recurrent import chosen

    load_modules(options.modules)
    subjects = _subjects(options.subjects)
    asked = (options.operation, options.regime, options.dtype)
    cases = list(conform.cases(*asked))
    if not cases and not chosen(*asked[:2]):
        raise UnsupportedError(f"no case is left of {_named(options)}: they do not go together")
    for option, path in (("--html", options.html), ("--junit", options.junit)):
        if path is not None:
            require_place(option, path)
    found: dict[str, Any] = {}
    if options.vectors is not None:
        names = require_extra("portnorm_onnx.conformance", "onnx").write_vectors(options.vectors, cases)
        if not options.json:
            print(f"{options.vectors}: {len(names)} cases")
        found = {"vectors": str(options.vectors), "cases": names}
        if not (options.subjects or options.html or options.junit):
            return found
    return found | _measured(subjects, options)


def _measured(subjects: list[str], options: argparse.Namespace) -> dict[str, Any]:
    from portnorm import conform
    from portnorm.conform import report
    from portnorm.conform.apart import measure_apart
    from portnorm.conform.forms import forms
    from portnorm.conform.subjects import subjects_of_others

    progress = ProgressLine(options.json)
    asked = {"operations": options.operation, "regimes": options.regime, "dtypes": options.dtype}
    found: dict[str, list[conform.Result]] = {name: [] for name in subjects}
    for result in measure_apart(subjects, asked=asked, modules=options.modules, progress=progress):
        found[result.subject].append(result)
    results = [result for part in found.values() for result in part]
    progress.clear()
    named = forms(results, subjects_of_others())
    about = {
        "portnorm": portnorm.__version__,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "machine": platform.machine(),
        "date": datetime.date.today().isoformat(),
    }
    if options.html is not None:
        _write(options.html, report.to_html(results, about, named))
    if options.junit is not None:
        _write(options.junit, report.to_junit(results))
    if not options.json:
        print(report.laid_out(report.table(results)))
        print("largest error in ULP, units in the last place of the largest value of the same statistic, and its limit")
        for r in results:
            if r.status == "not installed":
                print(f"not installed: {r.subject}: {r.detail}")
        for line in (*report.forms_told(named), *report.failures(results)):
            print(line)
    options.failed = any(r.failed for r in results)
    return {"about": about, "results": [r.to_dict() for r in results], "forms": [f.to_dict() for f in named]}


def _write(path: Path, text: str) -> None:
    with written_whole(path) as file:
        file.write(text.encode())


def _subjects(names: list[str]) -> list[str]:
    """Those that are asked for; raises `UnsupportedError` for one that there is not."""
    from portnorm.conform.libraries import LIBRARIES
    from portnorm.conform.subjects import subjects_of_others

    if not names:
        return [*SUPPORT]
    if set(names) <= {*LIBRARIES}:
        return names
    others = subjects_of_others()
    if set(names) <= {*LIBRARIES, *others}:
        return names
    known = [*LIBRARIES, *require_extra("portnorm_onnx.runtimes", "onnx").RUNTIMES, *others]
    for name in names:
        if name not in (*known, "all"):
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UnsupportedError(f"{name!r} is no library or runtime; {hint}expected all, or some of {', '.join(known)}")
    return known if "all" in names else names


def _named(options: argparse.Namespace) -> str:
    return ", ".join(f"`--{what}` {name!r}" for what in ("operation", "regime", "dtype") for name in getattr(options, what) or ())
