"""The accuracy table of the field: `make accuracy`, which measures in an environment for each group of libraries, and draws.

    python -m benchmarks.accuracy measure [SUBJECT …]   what of the field is installed here; what is not stays as it was
    python -m benchmarks.accuracy draw                  docs/static/accuracy.svg

Writes benchmarks/results/field.json, from which `make readme` makes the tables of docs/accuracy.md.
"""

from __future__ import annotations

import datetime
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy

from portnorm.bench.runner import machine
from portnorm.commands.progress import ProgressLine
from portnorm.conform.apart import measure_apart
from portnorm.conform.cases import OPERATIONS, REGIMES, cases
from portnorm.conform.forms import Form, error_of, forms
from portnorm.conform.formulas import CENTRED, FOLDED, GIVEN, ONE_PASS, SUBTRACTED, TWO_PASSES
from portnorm.conform.result import Result
from portnorm.conform.subjects import Subject, subjects_of_others

ROOT = Path(__file__).parent.parent
RESULTS, PICTURE = ROOT / "benchmarks" / "results" / "field.json", ROOT / "docs" / "static" / "accuracy.svg"

OWN = ("numpy", "torch", "jax", "mlx", "paddle")
"""The arrays on which portnorm's definitions are a row of the table."""
DTYPES = ("float32", "float16")
SHOWN = [name for name, row in OPERATIONS.items() if row.field]
FIELD = [name for name, row in REGIMES.items() if row.field]
MEANS = {"mean 3 std": 3.0, "mean 10 std": 10.0, "mean 1e2 std": 1e2, "mean 1e3 std": 1e3, "mean 1e4 std": 1e4, "mean 1e6 std": 1e6}


def kept() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"subjects": {}}
    return found


def _rounded(value: float | None) -> float | None:
    return None if value is None or math.isinf(value) else float(f"{value:.2g}")


def yardsticks() -> dict[str, Any]:
    """The errors of the two formulas that everything is held against, by operation and form, for each regime of float32."""
    found: dict[str, Any] = {}
    for operation in SHOWN:
        table = GIVEN if OPERATIONS[operation].given else CENTRED
        for form in (SUBTRACTED, FOLDED) if OPERATIONS[operation].given else (TWO_PASSES, ONE_PASS):
            row = found.setdefault(operation, {}).setdefault(form, {})
            for case in cases([operation], FIELD, ["float32"]):
                arrays = case.arrays()
                with numpy.errstate(all="ignore"):
                    row[case.regime.name] = _rounded(error_of(table[form][0](case, arrays), case, arrays))
    return found


def _row_of(name: str, results: list[Result], others: dict[str, Subject], named: list[Form]) -> dict[str, Any]:
    """What is kept of a subject: `[operation, regime, dtype, error, values that are not finite]`, or why there is no error."""
    row: dict[str, Any] = {"date": datetime.date.today().isoformat(), "version": results[0].version}
    row |= (
        {key: getattr(others[name], key) for key in ("note", "advice", "eager")}
        if name in others
        else {"note": "this library", "eager": None}
    )
    row["forms"] = [f.to_dict() for f in named if f.subject == results[0].subject]
    row["cells"] = [
        [r.operation, r.regime, r.dtype, _rounded(r.max_abs), r.nonfinite]
        if r.max_abs is not None
        else [r.operation, r.regime, r.dtype, f"{r.status}: {r.detail}"]
        for r in results
        if r.side == "forward"
    ]
    return row


def measure(names: list[str]) -> None:
    """Measure, and keep what is not measured here as it was."""
    others = subjects_of_others()
    found, own = kept(), [name for name in OWN if name in names or not names]
    results: dict[str, list[Result]] = {}
    asked = {"operations": SHOWN, "regimes": FIELD, "dtypes": list(DTYPES)}
    for result in measure_apart(
        [*own, *(name for name in others if name in names or not names)],
        asked=asked,
        progress=ProgressLine(),
    ):
        results.setdefault(result.subject, []).append(result)
    print(file=sys.stderr)
    named = forms([r for part in results.values() for r in part], others)
    for name, part in results.items():
        shown = name if name in others else f"portnorm-{name}"
        if any(r.status == "not installed" for r in part):
            if shown not in found["subjects"]:
                found["subjects"][shown] = {"absent": part[0].detail}
        else:
            found["subjects"][shown] = _row_of(name, part, others, named)
    order = [*(f"portnorm-{name}" for name in OWN), *others]
    found["subjects"] = {name: found["subjects"][name] for name in sorted(found["subjects"], key=order.index)}
    found |= {"machine": {key: machine()[key] for key in ("processor", "cores", "system")}, "yardsticks": yardsticks()}
    RESULTS.write_text(_text(found))


def _text(found: dict[str, Any]) -> str:
    """JSON with a line for each cell."""
    marks: dict[str, str] = {}
    for k, row in enumerate(found["subjects"].values()):
        for key in ("cells", "forms"):
            if key in row:
                marks[f"{key} of {k}"] = ",\n    ".join(json.dumps(cell, ensure_ascii=False) for cell in row[key])
                row[key] = f"{key} of {k}"
    text = json.dumps(found, indent=1, ensure_ascii=False)
    for mark, lines in marks.items():
        text = text.replace(f'"{mark}"', f"[\n    {lines}\n   ]")
    return text + "\n"


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(sys.argv[2:])
    elif sys.argv[1:] == ["draw"]:
        from benchmarks.accuracy_plot import draw

        draw(kept(), PICTURE)
    else:
        sys.exit(__doc__)
