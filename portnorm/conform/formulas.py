"""The float32 formulas by which normalizations are computed in the field, each written out: what a subject is compared with.

    two passes               m = Σx / n,  v = Σ(x − m)² / n
    sums in order            the same, each sum one term after the other, where NumPy adds halves to halves
    one pass                 m = Σx / n,  v = Σx² / n − m²,  which is rounding alone where m² ≫ v, and may be negative
    cut off at 0             the same with max(v, 0)
    exact                    two passes in float64, rounded once at the end
    folded, subtracted       given statistics, as x · s + t with s = γ / √(v + ε) and t = β − m · s; or as (x − m) · s + β
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy

from portnorm.conform.cases import Case, NumPyArray

Formula = Callable[[Case, dict[str, NumPyArray]], NumPyArray]
"""y of the arrays of a case, in the shape of `Operation.grouped`."""

Mean = Callable[[NumPyArray, tuple[int, ...]], NumPyArray]


def _halves(a: NumPyArray, axes: tuple[int, ...]) -> NumPyArray:
    found: NumPyArray = numpy.mean(a, axis=axes, keepdims=True, dtype=a.dtype)
    return found


def _in_order(a: NumPyArray, axes: tuple[int, ...]) -> NumPyArray:
    last = tuple(range(-len(axes), 0))
    moved = numpy.moveaxis(a, axes, last)
    rows = numpy.ascontiguousarray(moved).reshape(*moved.shape[: a.ndim - len(axes)], -1)
    sums = numpy.add.accumulate(rows, axis=-1, dtype=a.dtype)[..., -1]
    kept = [1 if k in axes else n for k, n in enumerate(a.shape)]
    found: NumPyArray = (sums / a.dtype.type(rows.shape[-1])).reshape(kept)
    return found


def _laid(case: Case, arrays: dict[str, NumPyArray], kind: Any) -> tuple[dict[str, NumPyArray], tuple[int, ...], Any]:
    """The arrays in a type, in shapes that broadcast; the axes of a statistic; ε."""
    op, shape = case.operation, case.operation.grouped(case.shape)
    along = [n if a == 1 or (op.groups is not None and a == 2) else 1 for a, n in enumerate(shape)]
    laid = {name: a.astype(kind).reshape(shape if name in ("x", "dy") else along) for name, a in arrays.items()}
    return laid, op.axes(shape), numpy.dtype(kind).type(case.eps)


def _in_lanes(a: NumPyArray, axes: tuple[int, ...]) -> NumPyArray:
    """Eight sums in order, as the lanes of a vector register, and those added."""
    last = tuple(range(-len(axes), 0))
    moved = numpy.moveaxis(a, axes, last)
    rows = numpy.ascontiguousarray(moved).reshape(*moved.shape[: a.ndim - len(axes)], -1)
    count = rows.shape[-1]
    rows = numpy.concatenate([rows, numpy.zeros((*rows.shape[:-1], -count % 8), rows.dtype)], axis=-1)
    lanes = numpy.add.accumulate(rows.reshape(*rows.shape[:-1], -1, 8), axis=-2, dtype=a.dtype)[..., -1, :]
    kept = [1 if k in axes else n for k, n in enumerate(a.shape)]
    found: NumPyArray = (lanes.sum(axis=-1, dtype=a.dtype) / a.dtype.type(count)).reshape(kept)
    return found


def _two_passes(mean: Mean, kind: Any = numpy.float32, *, folded: bool = False) -> Formula:
    def formula(case: Case, arrays: dict[str, NumPyArray]) -> NumPyArray:
        a, axes, eps = _laid(case, arrays, kind)
        if folded:
            m = mean(a["x"], axes)
            s = a["weight"] / numpy.sqrt(mean((a["x"] - m) ** 2, axes) + eps)
            return a["x"] * s + (a["bias"] - m * s)  # type: ignore[no-any-return]
        z = a["x"] - mean(a["x"], axes) if case.operation.center else a["x"]
        return z / numpy.sqrt(mean(z * z, axes) + eps) * a["weight"] + a["bias"]  # type: ignore[no-any-return]

    return formula


def _one_pass(mean: Mean, *, cut: bool) -> Formula:
    def formula(case: Case, arrays: dict[str, NumPyArray]) -> NumPyArray:
        a, axes, eps = _laid(case, arrays, numpy.float32)
        m = mean(a["x"], axes)
        v = mean(a["x"] * a["x"], axes) - m * m
        v = numpy.maximum(v, numpy.float32(0)) if cut else v
        return (a["x"] - m) / numpy.sqrt(v + eps) * a["weight"] + a["bias"]  # type: ignore[no-any-return]

    return formula


def _subtracted(case: Case, arrays: dict[str, NumPyArray]) -> NumPyArray:
    a, _, eps = _laid(case, arrays, numpy.float32)
    return (a["x"] - a["mean"]) * (a["weight"] / numpy.sqrt(a["var"] + eps)) + a["bias"]  # type: ignore[no-any-return]


def _folded(case: Case, arrays: dict[str, NumPyArray]) -> NumPyArray:
    a, _, eps = _laid(case, arrays, numpy.float32)
    s = a["weight"] / numpy.sqrt(a["var"] + eps)
    return a["x"] * s + (a["bias"] - a["mean"] * s)  # type: ignore[no-any-return]


TWO_PASSES, ONE_PASS, FOLDED, SUBTRACTED = "two passes", "one pass", "folded, x·s + t", "subtracted, (x − m)·s"

CENTRED: dict[str, tuple[Formula, ...]] = {
    "exact": (_two_passes(_halves, numpy.float64),),
    TWO_PASSES: (_two_passes(_halves), _two_passes(_halves, folded=True)),
    "two passes, sums in order": (_two_passes(_in_order), _two_passes(_in_order, folded=True), _two_passes(_in_lanes)),
    "one pass, cut off at 0": (_one_pass(_halves, cut=True), _one_pass(_in_order, cut=True)),
    ONE_PASS: (_one_pass(_halves, cut=False), _one_pass(_in_order, cut=False)),
}
"""Forms of what takes its own statistics, by name, the more exact first. A form is what any of its formulas gives."""

NOT_CENTRED = {
    "mean of squares": (_two_passes(_halves),),
    "mean of squares, sums in order": (_two_passes(_in_order), _two_passes(_in_lanes)),
}
GIVEN = {SUBTRACTED: (_subtracted,), FOLDED: (_folded,)}

HALF: dict[str, tuple[Formula, ...]] = {
    "statistics in float32": (_two_passes(_halves),),
    "statistics in float16": (_two_passes(_halves, numpy.float16), _two_passes(_in_order, numpy.float16)),
}
"""Forms of what takes float16 values."""


def formulas_of(case: Case) -> dict[str, tuple[Formula, ...]]:
    """The forms that a case may have been computed by."""
    if case.operation.given:
        return GIVEN
    if case.dtype == "float16":
        return HALF
    return CENTRED if case.operation.center else NOT_CENTRED
