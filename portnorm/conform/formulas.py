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

import portnorm as pn
from portnorm.conform.cases import Case, NumPyArray

Formula = Callable[[Case, dict[str, NumPyArray]], NumPyArray]
"""y of the arrays of a case, in the shape of `Operation.grouped`."""

Mean = Callable[[NumPyArray, tuple[int, ...]], NumPyArray]


def _mean_by(add: Callable[[NumPyArray], NumPyArray]) -> Mean:
    """A mean over axes, of a function that adds up the last axis; it is rounded to the type."""

    def mean(a: NumPyArray, axes: tuple[int, ...]) -> NumPyArray:
        moved = numpy.moveaxis(a, axes, range(-len(axes), 0))
        rows = numpy.ascontiguousarray(moved).reshape(*moved.shape[: a.ndim - len(axes)], -1)
        sums = add(rows)
        found = (sums / sums.dtype.type(rows.shape[-1])).astype(a.dtype)
        shaped: NumPyArray = found.reshape([1 if k in axes else n for k, n in enumerate(a.shape)])
        return shaped

    return mean


def _in_lanes(rows: NumPyArray) -> NumPyArray:
    """Eight sums in order, as the lanes of a vector register, and those added."""
    padded = numpy.concatenate([rows, numpy.zeros((*rows.shape[:-1], -rows.shape[-1] % 8), rows.dtype)], axis=-1)
    lanes: NumPyArray = numpy.add.accumulate(padded.reshape(*rows.shape[:-1], -1, 8), axis=-2, dtype=rows.dtype)[..., -1, :]
    return numpy.add.reduce(lanes, axis=-1, dtype=rows.dtype)  # type: ignore[no-any-return]


HALVES = _mean_by(lambda rows: numpy.add.reduce(rows, axis=-1, dtype=rows.dtype))
IN_ORDER = _mean_by(lambda rows: numpy.add.accumulate(rows, axis=-1, dtype=rows.dtype)[..., -1])
LANES = _mean_by(_in_lanes)
WIDER = _mean_by(lambda rows: numpy.add.reduce(rows, axis=-1, dtype={2: numpy.float32, 4: numpy.float64, 8: numpy.float64}[rows.itemsize]))
"""Added in a wider type, and rounded."""


def _laid(case: Case, arrays: dict[str, NumPyArray], kind: Any) -> tuple[dict[str, NumPyArray], tuple[int, ...], Any]:
    """The arrays in a type, in shapes that broadcast; the axes of a statistic; ε."""
    op, shape = case.operation, case.operation.grouped(case.shape)
    along = [n if a == 1 or (op.groups is not None and a == 2) else 1 for a, n in enumerate(shape)]
    laid = {name: a.astype(kind).reshape(shape if name in ("x", "dy") else along) for name, a in arrays.items()}
    return laid, op.axes(shape), numpy.dtype(kind).type(case.eps)


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


def _untrained(case: Case, arrays: dict[str, NumPyArray]) -> NumPyArray:
    """What is not told to take the statistics of the batch: mean 0 and variance 1, which running statistics begin with."""
    a, _, eps = _laid(case, arrays, numpy.float32)
    return a["x"] / numpy.sqrt(1 + eps) * a["weight"] + a["bias"]  # type: ignore[no-any-return]


TWO_PASSES, ONE_PASS, CUT = "two passes", "one pass", "one pass, cut off at 0"
FOLDED, SUBTRACTED = "folded, x·s + t", "subtracted, (x − m)·s"

CENTRED: dict[str, tuple[Formula, ...]] = {
    "exact": (_two_passes(HALVES, numpy.float64),),
    TWO_PASSES: tuple(_two_passes(mean, folded=folded) for mean in (HALVES, WIDER) for folded in (False, True)),
    "two passes, sums in order": tuple(_two_passes(mean, folded=folded) for mean in (IN_ORDER, LANES) for folded in (False, True)),
    CUT: tuple(_one_pass(mean, cut=True) for mean in (HALVES, WIDER, LANES, IN_ORDER)),
    ONE_PASS: tuple(_one_pass(mean, cut=False) for mean in (HALVES, WIDER, LANES, IN_ORDER)),
}
"""Forms of what takes its own statistics, by name, the more exact first. A form is what any of its formulas gives."""

TRAINING = {**CENTRED, "training ignored: the given statistics": (_untrained,)}
NOT_CENTRED: dict[str, tuple[Formula, ...]] = {
    "mean of squares": (_two_passes(HALVES), _two_passes(WIDER)),
    "mean of squares, sums in order": (_two_passes(IN_ORDER), _two_passes(LANES)),
}
GIVEN: dict[str, tuple[Formula, ...]] = {SUBTRACTED: (_subtracted,), FOLDED: (_folded,)}

HALF: dict[str, tuple[Formula, ...]] = {
    "statistics in float32": (_two_passes(HALVES),),
    "statistics in float16": tuple(_two_passes(mean, numpy.float16) for mean in (HALVES, IN_ORDER, WIDER)),
}
"""Forms of what takes float16 values."""


def formulas_of(case: Case) -> dict[str, tuple[Formula, ...]]:
    """The forms that a case may have been computed by."""
    if case.operation.given:
        return GIVEN
    if case.dtype == "float16":
        return HALF
    return NOT_CENTRED if not case.operation.center else TRAINING if case.operation.call is pn.batch_norm else CENTRED
