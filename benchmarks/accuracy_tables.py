"""The tables of docs/accuracy.md, from what `make accuracy` kept."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.accuracy import FIELD, RESULTS, SHOWN
from benchmarks.accuracy_plot import TITLES
from benchmarks.tables import table
from portnorm.conform.cases import OPERATIONS, REGIMES
from portnorm.conform.formulas import SUBTRACTED, TWO_PASSES

COLUMNS: dict[str, tuple[tuple[str, str], ...]] = {
    "100": (("mean 1e2 std", "float32"),),
    "1e4": (("mean 1e4 std", "float32"),),
    "1e6": (("mean 1e6 std", "float32"),),
    "constant": tuple((f"constant {value}", "float32") for value in ("0.1", "1234", "1e6")),
    "float16": (("spread of 30", "float16"), ("±300", "float16")),
}
"""The columns of a table, and of which regimes the worst stands there."""

LEVELS = ((10.0, "as-exact", ""), (100.0, "further", " ▲"), (float("inf"), "far", " ▲▲"))
"""How far from the two-pass formula: up to so many times, the class of a cell, and its mark for those who see no colours."""

HALF = 4e-3
"""Two units in the last place of float16 for values up to 4."""


def kept() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text())
    return found


def present(found: dict[str, Any]) -> dict[str, Any]:
    return {name: row for name, row in found["subjects"].items() if "cells" in row}


def yardstick(found: dict[str, Any], operation: str, regime: str, dtype: str) -> float:
    """What the two-pass formula is off by, or may be."""
    if dtype == "float16":
        return HALF
    if regime.startswith("constant"):  # a mean that is off by half a unit, over the square root of ε
        return float(regime.split()[1]) * 2.0**-23 * 316
    form = SUBTRACTED if OPERATIONS[operation].given else TWO_PASSES
    return max(found["yardsticks"][operation][form][regime] or 0.0, 1e-6)


def cell(found: dict[str, Any], row: dict[str, Any], operation: str, column: str) -> str:
    """The largest error of a column, marked and classed by its distance to the yardstick."""
    cells = {(c[1], c[2]): c for c in row["cells"] if c[0] == operation}
    mine = [(key, cells[key]) for key in COLUMNS[column] if key in cells]
    measured = [(key, c) for key, c in mine if not isinstance(c[3], str)]
    if not measured:
        return "–"
    if any(c[4] for _, c in measured):
        return '<span class="far">NaN ▲▲</span>'
    times = max(c[3] / yardstick(found, operation, *key) for key, c in measured)
    name, mark = next((name, mark) for limit, name, mark in LEVELS if times <= limit)
    error = max(c[3] for _, c in measured)
    return f'<span class="{name}">{_short_number(error)}{mark}</span>'


def _short_number(error: float) -> str:
    if error < 1e-12:
        return "0"
    digit = float(f"{error:.0e}")
    return f"{digit:g}" if 0.01 <= digit < 1000 else f"{digit:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def forms_of(row: dict[str, Any], operation: str) -> str:
    named = {f["dtype"]: f["form"] for f in row["forms"] if f["operation"] == operation}
    half = named.get("float16", "")
    return "; ".join(filter(None, (named.get("float32", "–"), half if half != "statistics in float32" else "")))


def field_of(operation: str) -> str:
    found = kept()
    rows = (
        (name, *(cell(found, row, operation, column) for column in COLUMNS), forms_of(row, operation))
        for name, row in present(found).items()
    )
    return table(("", *COLUMNS, "form"), rows)


def field() -> str:
    """A table for each operation."""
    return "\n\n".join(f"### {TITLES.get(operation, operation)}\n\n{field_of(operation)}" for operation in SHOWN)


def besides() -> str:
    """What else was seen, a line for each subject and operation."""
    lines = []
    for name, row in present(kept()).items():
        for f in row["forms"]:
            lines += (
                [f"- `{name}`, {TITLES.get(f['operation'], f['operation'])}, {f['dtype']}: {'; '.join(f['besides'])}."]
                if f["besides"]
                else []
            )
    return "\n".join(lines)


def refused() -> str:
    """What was not measured, by name, and why."""
    found, lines = kept(), []
    for name, row in found["subjects"].items():
        if "absent" in row:
            lines.append(f"- `{name}`: {row['absent']}.")
            continue
        reasons: dict[tuple[str, str], list[str]] = {}
        for operation, _, dtype, *rest in row["cells"]:
            if isinstance(rest[0], str):
                reasons.setdefault((operation, _short(rest[0])), []).append(dtype)
        for (operation, why), dtypes in reasons.items():
            count = "" if len(dtypes) > 1 else ", one case"
            lines.append(f"- `{name}`, {TITLES.get(operation, operation)}, {' and '.join(sorted(set(dtypes)))}{count}: {why}")
    return "\n".join(lines)


def _short(text: str) -> str:
    """A reason on one line of a page, without what only looks like Markdown or differs from run to run."""
    text = text.partition(": ")[2] if text.startswith(("does not run", "not measured")) else text
    for mark in "`*_<>|[]":
        text = text.replace(mark, " ")
    words = " ".join(w for w in text.split() if "/tmp/" not in w and not w.startswith("/"))
    return words if len(words) <= 160 else f"{words[:155]} …"


def advice() -> str:
    return table(("", "what to do"), ((f"`{name}`", row["advice"]) for name, row in present(kept()).items() if row.get("advice")))


def regimes() -> str:
    """The regimes, what data looks like that, and what an error there tells."""
    rows = ((name, REGIMES[name].like, REGIMES[name].shows, ", ".join(REGIMES[name].dtypes)) for name in FIELD)
    return table(("regime", "data like that", "what an error tells", "types"), rows)


def versions() -> str:
    found = kept()
    rows = present(found)
    dates = sorted({row["date"] for row in rows.values()})
    shown = ", ".join(f"`{name}` {row['version']}" for name, row in rows.items())
    return f"{found['machine']['processor']}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}. {shown}."


def in_short() -> str:
    """How many there are, and who is not right at a mean of 100."""
    found = kept()
    rows = {name: row for name, row in present(found).items() if not name.startswith("portnorm")}
    wrong: dict[str, list[str]] = {}
    for operation in SHOWN:
        for name, row in rows.items():
            if OPERATIONS[operation].given or operation == "rms_norm":
                continue
            if "▲" in cell(found, row, operation, "100"):
                wrong.setdefault(TITLES.get(operation, operation), []).append(f"`{name}`")
    cells = sum(len(row["cells"]) for row in rows.values())
    measured = sum(not isinstance(c[3], str) for row in rows.values() for c in row["cells"])
    lines = [f"- {operation}: {', '.join(names)}" for operation, names in wrong.items()]
    return (
        f"{len(rows)} ways to call others' normalizations, {cells} cases, of which {measured} gave an answer. At a mean of 100 standard "
        "deviations more than ten times further off than the two-pass formula:\n\n" + "\n".join(lines)
    )


TABLES = {
    "accuracy_in_short": in_short,
    "accuracy_regimes": regimes,
    "accuracy_field": field,
    "accuracy_besides": besides,
    "accuracy_refused": refused,
    "accuracy_advice": advice,
    "accuracy_versions": versions,
}
