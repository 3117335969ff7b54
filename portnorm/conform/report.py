"""What was measured, for people and for machines: a table, JSON, JUnit, and one page that needs no network."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any
from xml.etree import ElementTree

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


def to_html(results: Iterable[Result], about: dict[str, Any]) -> str:
    """One self-contained page: subjects × cases as a heat map, the worst value and how to reproduce it behind every cell."""
    template = resources.files("portnorm.conform").joinpath("page.html").read_text(encoding="utf-8")
    data = json.dumps({"about": about, "results": [r.to_dict() for r in results]})
    for character, code in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
        data = data.replace(character, code)
    return template.replace("/*DATA*/null", data)


def table(results: Sequence[Result]) -> list[list[str]]:
    """A row per subject and operation: the worst of all regimes and types, and how many cases were beyond their limit."""
    rows = [["subject", "operation", "side", "cases", "worst ULP", "limit", "worst regime", "status"]]
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for r in results:
        groups.setdefault((r.subject, r.operation, r.side), []).append(r)
    for (subject, operation, side), group in groups.items():
        measured = [r for r in group if r.max_ulp is not None]
        bad = [r for r in group if r.failed]
        if not measured:
            rows.append([subject, operation, side, str(len(group)), "", "", "", group[0].status])
            continue
        worst = max(measured, key=lambda r: (r.max_ulp or 0.0) / (r.limit or 1.0))
        status = "ok" if not bad else f"{len(bad)} of {len(group)} beyond"
        what = f"{worst.regime}, {worst.dtype}"
        rows.append([subject, operation, side, str(len(group)), f"{worst.max_ulp:.3g}", f"{worst.limit:.3g}", what, status])
    return rows


def laid_out(rows: Sequence[Sequence[str]]) -> str:
    """A table in columns."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
