"""The truth: every normalization and its gradient in a type that is wide enough, and what a naive implementation would give."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy

from portnorm.conform.cases import Case, NumPyArray
from portnorm.conform.twofold import Twofold
from portnorm.dtypes import float32_value

WIDE = numpy.longdouble
"""The type of the truth for float64 cases; 64 bits of mantissa on x86. Where it is no wider than float64, two doubles are taken."""


class Truth(NamedTuple):
    """The result and the cotangent of `x`, in the shape of `Operation.grouped`, and the axes of a statistic there."""

    y: NumPyArray
    dx: NumPyArray
    axes: tuple[int, ...]


def of_two_doubles(case: Case) -> bool:
    """Whether the truth of the case is computed in two doubles, and rounded to one, for want of a wider type on this machine."""
    return case.dtype == "float64" and numpy.finfo(WIDE).nmant < 63


def truth(case: Case, arrays: dict[str, NumPyArray] | None = None) -> Truth:
    """The case in float64, a float64 case in `WIDE`, or in two doubles. eps is rounded to float32, as ONNX stores it."""
    made = case.arrays() if arrays is None else arrays
    kind: Any = WIDE if case.dtype == "float64" else numpy.float64
    axes = case.operation.axes(case.operation.grouped(case.shape))
    laid = _laid(case, made, kind)
    if laid["x"].size == 0:
        return Truth(laid["x"], laid["dy"], axes)
    with numpy.errstate(all="ignore"):
        plain = _with_given(case, laid) if case.operation.given else _with_own(case, laid, axes, kind)
        if not of_two_doubles(case):
            return Truth(*plain, axes)
        exact = _given_in_two_doubles(case, laid) if case.operation.given else _in_two_doubles(case, laid, axes)
        finite = numpy.isfinite(numpy.max(numpy.abs(laid["x"]), axis=axes, keepdims=True) + laid.get("var", 0.0))
        y, dx = (numpy.where(finite, a, b) for a, b in zip(exact, plain, strict=True))
        return Truth(y, dx, axes)


def _laid(case: Case, made: dict[str, NumPyArray], kind: Any) -> dict[str, NumPyArray]:
    """The arrays of a case in a type, those of the channels in a shape that broadcasts against `x`."""
    op, shape = case.operation, case.operation.grouped(case.shape)
    along = [n if a == 1 or (op.groups is not None and a == 2) else 1 for a, n in enumerate(shape)]
    return {name: a.astype(kind).reshape(shape if name in ("x", "dy") else along) for name, a in made.items()}


def _with_given(case: Case, laid: dict[str, NumPyArray]) -> tuple[NumPyArray, NumPyArray]:
    eps = laid["x"].dtype.type(float32_value(case.eps))
    rstd = 1 / numpy.sqrt(laid["var"] + eps)
    return (laid["x"] - laid["mean"]) * rstd * laid["weight"] + laid["bias"], laid["dy"] * laid["weight"] * rstd


def _with_own(case: Case, laid: dict[str, NumPyArray], axes: tuple[int, ...], kind: Any) -> tuple[NumPyArray, NumPyArray]:
    x, dy, weight, bias = (laid[name] for name in ("x", "dy", "weight", "bias"))
    # A power of two per statistic keeps squares in range, and is exact.
    largest = numpy.max(numpy.abs(x), axis=axes, keepdims=True)
    scale = numpy.where(numpy.isfinite(largest) & (largest > 0), numpy.exp2(-numpy.floor(numpy.log2(largest))), 1).astype(kind)
    z = x * scale
    if case.operation.center:
        z = z - numpy.mean(z, axis=axes, keepdims=True)
        z = z - numpy.mean(z, axis=axes, keepdims=True)
    eps = kind(float32_value(case.eps))
    rstd = 1 / numpy.sqrt(numpy.mean(z * z, axis=axes, keepdims=True) + eps * scale * scale)
    xhat = z * rstd
    g = dy * weight
    centred = g - numpy.mean(g, axis=axes, keepdims=True) if case.operation.center else g
    dx = (centred - xhat * numpy.mean(g * xhat, axis=axes, keepdims=True)) * rstd * scale
    return xhat * weight + bias, dx


_UP = 400
"""No power of two above this is multiplied with where there is an ε: a variance that small vanishes beside it."""


def _in_two_doubles(case: Case, laid: dict[str, NumPyArray], axes: tuple[int, ...]) -> tuple[NumPyArray, NumPyArray]:
    largest = numpy.max(numpy.abs(laid["x"]), axis=axes, keepdims=True)
    up = numpy.where(numpy.isfinite(largest) & (largest > 0), 1 - numpy.frexp(largest)[1], 0)
    up = up if case.eps == 0 else numpy.minimum(up, _UP)
    z = Twofold.of(numpy.ldexp(numpy.ldexp(laid["x"].astype(numpy.float64), up // 2), up - up // 2))
    dy, weight, bias = (Twofold.of(laid[name]) for name in ("dy", "weight", "bias"))
    if case.operation.center:
        z = z.minus(z.mean(axes))
    eps = numpy.ldexp(float32_value(case.eps), 2 * up) if case.eps else numpy.zeros(up.shape)
    rstd = Twofold.of(1.0).over(z.times(z).mean(axes).plus(Twofold.of(eps)).root())
    xhat = z.times(rstd)
    g = dy.times(weight)
    centred = g.minus(g.mean(axes)) if case.operation.center else g
    dx = centred.minus(xhat.times(g.times(xhat).mean(axes))).times(rstd).high
    y = z.times(rstd.times(weight)).plus(bias)  # one product with z, which may be below all normal numbers
    return y.high, numpy.ldexp(numpy.ldexp(dx, up // 2), up - up // 2)


def _given_in_two_doubles(case: Case, laid: dict[str, NumPyArray]) -> tuple[NumPyArray, NumPyArray]:
    x, dy, weight, bias, mean, var = (Twofold.of(laid[name]) for name in ("x", "dy", "weight", "bias", "mean", "var"))
    rstd = Twofold.of(1.0).over(var.plus(Twofold.of(float32_value(case.eps))).root())
    return x.minus(mean).times(rstd).times(weight).plus(bias).high, dy.times(weight).times(rstd).high


def naive(case: Case, arrays: dict[str, NumPyArray]) -> NumPyArray | None:
    """The textbook formula in float32, two passes: what an error is compared with. `None` where the values do not fit into float32."""
    op, shape = case.operation, case.operation.grouped(case.shape)
    axes = op.axes(shape)
    if case.dtype == "float64" or not all(shape):
        return None
    with numpy.errstate(all="ignore"):
        laid = _laid(case, arrays, numpy.float32)
        x, weight, bias = laid["x"], laid["weight"], laid["bias"]
        if "mean" in laid:
            given: NumPyArray = (x - laid["mean"]) / numpy.sqrt(laid["var"] + numpy.float32(case.eps)) * weight + bias
            return given
        z = x - x.mean(axis=axes, keepdims=True) if op.center else x
        y: NumPyArray = z / numpy.sqrt((z * z).mean(axis=axes, keepdims=True) + numpy.float32(case.eps)) * weight + bias
        return y
