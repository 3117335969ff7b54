"""What form a subject computes by, found out from its errors: those of each formula of `formulas.py` on the same cases, the nearest named.

Values are not compared, since the errors of one form differ from one order of additions to another; their sizes over the regimes do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy

from portnorm.conform.cases import STATISTICS, Case, find
from portnorm.conform.formulas import CUT, ONE_PASS, formulas_of
from portnorm.conform.oracle import truth
from portnorm.conform.result import Result
from portnorm.conform.subjects import Subject

TELLING = {
    "float32": ("mean 1e2 std", "mean 1e3 std", "mean 1e4 std", "rows of 4096, mean 1e4 std", "rows of 65536, mean 1e2 std"),
    "float16": ("±300", "spread of 30"),
}
"""The regimes by which forms differ, for each type."""

NEAR, APART = 0.55, 1.5
"""A form is that of a subject where its errors are within this many powers of ten of the formula's, on average and at most."""

FLOOR = 1e-6
"""Errors below this are rounding of the result, in whatever form; in float16 a thousand times that."""

NONE = "none of these"


@dataclass(frozen=True)
class Form:
    """How one subject computes one operation in one type."""

    subject: str
    operation: str
    dtype: str
    form: str
    """A name of `formulas.py`, or "none of these" with the error at a mean of 100 standard deviations (in float16 at ±300)."""
    besides: tuple[str, ...] = ()
    """What else was seen: NaN, a negative variance, an answer that is not that of the same without a compiler."""

    def __str__(self) -> str:
        return "; ".join((self.form, *self.besides))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@cache
def errors_of_formulas(operation: str, dtype: str) -> dict[str, list[dict[str, float]]]:
    """For each form and formula the largest error in each telling regime."""
    found: dict[str, list[dict[str, float]]] = {}
    for regime in TELLING[dtype]:
        case = find(operation, regime, dtype)
        arrays = case.arrays()
        for form, formulas in formulas_of(case).items():
            rows = found.setdefault(form, [{} for _ in formulas])
            with numpy.errstate(all="ignore"):
                for row, formula in zip(rows, formulas, strict=True):
                    row[regime] = error_of(formula(case, arrays), case, arrays)
    return found


def error_of(values: Any, case: Case, arrays: Mapping[str, Any]) -> float:
    """The largest absolute error, infinite where a value is not finite."""
    with numpy.errstate(all="ignore"):
        off = numpy.abs(values.astype(numpy.float64) - truth(case, dict(arrays)).y)
    return float(off.max()) if numpy.isfinite(off).all() else math.inf


def forms(results: Iterable[Result], subjects: Mapping[str, Subject]) -> list[Form]:
    """The form of every subject, operation and type of which all telling regimes were measured."""
    groups: dict[tuple[str, str, str], dict[str, Result]] = {}
    statistics: dict[tuple[str, str, str], list[Result]] = {}
    for r in results:
        key = (r.subject, r.operation, r.dtype)
        if r.side == "forward" and r.max_abs is not None:
            groups.setdefault(key, {})[r.regime] = r
        elif r.side == "variance":
            statistics.setdefault(key, []).append(r)
    found = []
    for (subject, operation, dtype), measured in groups.items():
        half_given = dtype == "float16" and operation == STATISTICS  # statistics that are given are float32
        if dtype in TELLING and set(TELLING[dtype]) <= {*measured} and not half_given:
            twin = subjects[subject].eager if subject in subjects else None
            besides = (
                *_not_finite(measured),
                *_negative(statistics.get((subject, operation, dtype), [])),
                *(_unlike(measured, groups.get((twin, operation, dtype), {}), twin) if twin else ()),
            )
            found.append(Form(subject, operation, dtype, _nearest(operation, dtype, measured), besides))
    return found


def _nearest(operation: str, dtype: str, measured: Mapping[str, Result]) -> str:
    """The name of the nearest formula that is near. What gives NaN is not cut off at 0, and what gives none is."""
    other = CUT if _not_finite(measured) else ONE_PASS
    mine = {regime: math.inf if measured[regime].nonfinite else measured[regime].max_abs or 0.0 for regime in TELLING[dtype]}
    floor = FLOOR * (1000 if dtype == "float16" else 1)
    best, name = math.inf, NONE
    for form, formulas in errors_of_formulas(operation, dtype).items():
        if form == other:
            continue
        for row in formulas:
            apart = [abs(_power(mine[regime], floor) - _power(row[regime], floor)) for regime in TELLING[dtype]]
            average = sum(apart) / len(apart)
            if average <= NEAR and max(apart) <= APART and average < best - 1e-9:
                best, name = average, form
    if name == NONE:
        regime = TELLING[dtype][0]
        name = f"{NONE}: {mine[regime]:.1g} off at {regime}"
    return name


def _power(error: float, floor: float) -> float:
    """The power of ten of an error. How far beyond ten standard deviations, or whether it is finite, is chance."""
    return math.log10(min(max(error, floor), 10.0))


def _not_finite(measured: Mapping[str, Result]) -> list[str]:
    bad = [regime for regime, r in measured.items() if r.nonfinite and regime != "near the largest"]
    return [f"not finite at {bad[0]}" + (f" and {len(bad) - 1} more" if bad[1:] else "")] if bad else []


def _negative(statistics: Sequence[Result]) -> list[str]:
    bad = [r for r in statistics if r.detail.endswith("is a negative variance")]
    return [f"returns a variance of {bad[0].detail.split()[0]} at {bad[0].regime}"] if bad else []


_MUCH = 10.0
"""So many times is another answer."""


def _unlike(mine: Mapping[str, Result], twin: Mapping[str, Result], name: str) -> list[str]:
    """Where an error is over ten times that of the same without a compiler, or under a tenth: the worst, of constant rows apart."""
    found: dict[bool, tuple[float, str]] = {}
    for regime, r in mine.items():
        if regime in twin and regime != "near the largest":
            a, b = (math.inf if q.nonfinite else max(q.max_abs or 0.0, 2 * FLOOR) for q in (r, twin[regime]))
            times, constant = (1.0 if a == b else max(a, b) / min(a, b)), regime.startswith("constant")
            if times > max(_MUCH, found.get(constant, (0.0, ""))[0]):
                found[constant] = times, f"{_as_times(times)} {'less' if a > b else 'more'} exact than {name} at {regime}"
    return [said for _, (_, said) in sorted(found.items())]


def _as_times(times: float) -> str:
    return "infinitely" if math.isinf(times) else f"{times:.1g} times" if times >= 1e4 else f"{times:.0f} times"
