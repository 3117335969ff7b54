"""What was measured, for people and for machines: a table, JSON, JUnit, and one page that needs no network."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any
from xml.etree import ElementTree

from portnorm.conform.cases import REGIMES
from portnorm.conform.forms import Form
from portnorm.conform.result import Result


def to_json(results: Iterable[Result], about: dict[str, Any]) -> str:
    """Everything, with what is known of the machine."""
    return json.dumps({"about": about, "results": [r.to_dict() for r in results]}, indent=1)


def to_junit(results: Sequence[Result]) -> str:
    """One test case for each result; what is not installed or not measured is skipped, and says why."""
    failed = sum(r.failed for r in results)
    skipped = sum(r.status in ("not installed", "not measured") for r in results)
    suite = ElementTree.Element("testsuite", name="portnorm conform", tests=str(len(results)), failures=str(failed), skipped=str(skipped))
    for r in results:
        case = ElementTree.SubElement(suite, "testcase", classname=r.subject, name=f"{r.operation} / {r.regime} / {r.dtype} / {r.side}")
        if r.failed:
            message = f"{r.status}: {r.max_ulp} ULP, limit {r.limit}" if r.max_ulp is not None else r.status
            ElementTree.SubElement(case, "failure", message=message).text = f"{r.detail}\n{r.reproduce}"
        elif r.status != "ok":
            ElementTree.SubElement(case, "skipped", message=f"{r.status}: {r.detail}")
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def to_html(results: Iterable[Result], about: dict[str, Any], named: Sequence[Form] = ()) -> str:
    """One self-contained page: subjects × cases as a heat map, the worst value and how to reproduce it behind every cell, and forms."""
    template = resources.files("portnorm.conform").joinpath("page.html").read_text(encoding="utf-8")
    regimes = {row.name: {"like": row.like, "shows": row.shows} for row in REGIMES.values() if row.like}
    data = json.dumps(
        {"about": about, "results": [r.to_dict() for r in results], "forms": [f.to_dict() for f in named], "regimes": regimes}
    )
    for character, code in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
        data = data.replace(character, code)
    return template.replace("/*DATA*/null", data)


def table(results: Sequence[Result]) -> list[list[str]]:
    """A row for each operation and side, all presets of a cell together, and a column for each subject.

    What stands there is the worst error of all regimes and types, in ULP, with its limit, and how many are beyond theirs.
    """
    subjects = list(dict.fromkeys(r.subject for r in results if r.operation != "all" and r.status != "not measured"))
    versions = {r.subject: r.version for r in results}
    groups: dict[tuple[str, str], dict[str, list[Result]]] = {}
    for r in results:
        if r.subject in subjects:
            what = r.operation.partition(" ")[0] if r.side in ("one step", "trajectory") else r.operation
            groups.setdefault((what, r.side), {}).setdefault(r.subject, []).append(r)
    rows = [["operation", "side", *(f"{name} {versions[name]}" for name in subjects)]]
    for (what, side), found in groups.items():
        rows.append([what, side, *(_cell(found.get(name, [])) for name in subjects)])
    return rows


def _cell(group: Sequence[Result]) -> str:
    measured = [r for r in group if r.max_ulp is not None]
    bad = [r for r in group if r.failed]
    if not measured:
        return bad[0].status if bad else "–"
    worst = max(measured, key=lambda r: (bool(r.nonfinite), (r.max_ulp or 0.0) / (r.limit or 1.0)))
    said = "not finite" if worst.nonfinite else f"{worst.max_ulp:.3g} of {worst.limit:.3g}"
    return said if not bad else f"{said}, {len(bad)} of {len(group)} beyond"


def forms_told(named: Sequence[Form]) -> list[str]:
    """A line for each subject: the forms of its operations, like ones together."""
    lines = []
    for subject in dict.fromkeys(f.subject for f in named):
        found: dict[str, list[str]] = {}
        for f in named:
            if f.subject == subject:
                found.setdefault(str(f), []).append(f.operation + ("" if f.dtype == "float32" else f" in {f.dtype}"))
        lines.append(f"{subject} computes by: " + "; ".join(f"{form} ({', '.join(which)})" for form, which in found.items()))
    return lines


_SHOWN = 12


def failures(results: Sequence[Result]) -> list[str]:
    """A line for each that is beyond its limit or does not run, the worst first; of many those, and how many there are besides."""
    bad = sorted((r for r in results if r.failed), key=lambda r: (not r.nonfinite, -(r.max_ulp or 0.0) / (r.limit or 1.0)))
    lines = [f"{r.status}: {r.subject} / {r.operation} / {r.regime} / {r.dtype} / {r.side}: {r.detail}" for r in bad[:_SHOWN]]
    rest = len(bad) - len(lines)
    return [*lines, *([f"… and {rest} more; --html FILE shows all, --json prints them"] if rest else [])]


def laid_out(rows: Sequence[Sequence[str]]) -> str:
    """A table in columns."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
