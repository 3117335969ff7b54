"""The tables of layers, targets and runtimes in docs/runtimes.md and docs/arrays.md, from benchmarks/conformance.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.tables import kept_of, table
from portnorm.conform import LIBRARIES, REGIMES
from portnorm_onnx.runtimes import RUNTIMES
from portnorm_onnx.targets import TARGETS


def targets() -> str:
    """What a target's graphs avoid, from the rows that the exporter reads."""
    rows = ((f"`{t.name}`", str(t.last_opset), ", ".join(t.dtypes), t.reason) for t in TARGETS.values())
    return table(("`target=`", "opset up to", "types", "what it says of the runtime"), rows)


def runtimes() -> str:
    """The adapters, and the versions that were measured."""
    versions = kept_of("support")["versions"]
    rows = (
        (f"`{name}`", row.note, versions[name] or "not installed", _operators(row.no_steps), _operators(row.no_sequences))
        for name, row in RUNTIMES.items()
    )
    return table(("`--runtime`", "what it is", "measured", "no answer for no steps", "for no sequences"), rows)


def _operators(names: frozenset[str]) -> str:
    return ", ".join(f"`{name}`" if name.isidentifier() else name for name in sorted(names))


def support() -> str:
    """Layers × targets, each checked in the runtime of the target; the portable graph in every runtime that was there."""
    kept, own = kept_of("support"), [t.name for t in TARGETS.values() if not t.further]
    there = [name for name, version in kept["versions"].items() if version]
    found: dict[str, dict[str, Any]] = {}
    for r in kept["rows"]:
        found.setdefault(r["layer"], {})[r.get("target") or f"in {r['runtime']}"] = r
    marks = {"passed": "✓", "differs": "differs", "does not run": "no", "failed": "no"}
    rows = []
    for layer, cells in found.items():
        made = [cells[t]["nodes"] if cells[t]["status"] == "passed" else "no" for t in own]
        rows.append((layer, *made, *(marks[cells[f"in {name}"]["status"]] for name in there)))
    return table(("layer", *(f"`{t}`" for t in own), *there), rows)


def unsupported() -> str:
    """Every cell of the support table that is not a success: for each target and runtime the layers, and the reason of the first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for r in kept_of("support")["rows"]:
        if r["status"] not in ("passed", "not installed"):
            found.setdefault(r.get("target") or r["runtime"], []).append(r)
    lines = [
        f"- `{where}`: {', '.join(r['layer'] for r in rows)}. The first: {rows[0]['detail'].removeprefix(f'{where}: ')}"
        for where, rows in found.items()
    ]
    return "\n".join(lines) or "None: every layer is exported for every target, and every portable graph agrees in every runtime above."


_SHOWN = [name for name in REGIMES if name not in ("no values", "NaN and Inf")]


def _number(row: dict[str, Any]) -> str:
    """ULP of the worst operation, and what failed beside."""
    shown = "–" if row["max_ulp"] is None else f"{row['max_ulp']:.1f}" if row["max_ulp"] < 100 else f"{row['max_ulp']:.0e}"
    return f"**{shown}**" if row["failed"] else shown


def accuracy(side: str, dtypes: tuple[str, ...], subjects: Iterable[str]) -> str:
    """The worst of all operations by regime, in ULP of the row's largest output."""
    kept = {(r["subject"], r["regime"], r["dtype"]): r for r in kept_of("accuracy") if r["side"] == side}
    columns = [(s, d) for s in subjects for d in dtypes if (s, "normal", d) in kept]
    rows = []
    for regime in _SHOWN:
        cells = [kept.get((s, regime, d)) for s, d in columns]
        if any(cells):
            rows.append((regime, *("–" if r is None or not r["cases"] else _number(r) for r in cells)))
    return table(("regime", *(f"{s} {d}" if len(dtypes) > 1 else s for s, d in columns)), rows)


def definitions_forward() -> str:
    absent = {r["subject"] for r in kept_of("accuracy") if r["absent"]}
    return (
        accuracy("forward", ("float32", "float64"), LIBRARIES)
        + f"\n\nNot run here: {', '.join(n for n in LIBRARIES if n in absent) or 'none'}."
    )


def definitions_gradient() -> str:
    return accuracy("gradient", ("float32", "float64"), LIBRARIES)


def definitions_half() -> str:
    return accuracy("forward", ("float16", "bfloat16"), LIBRARIES)


def operators() -> str:
    return accuracy("forward", ("float32",), [name for name in RUNTIMES if name != "web-page"])


TABLES = {
    "targets": targets,
    "runtimes": runtimes,
    "support": support,
    "unsupported": unsupported,
    "definitions_forward": definitions_forward,
    "definitions_gradient": definitions_gradient,
    "definitions_half": definitions_half,
    "operators": operators,
}
"""What a page may hold, by name."""
