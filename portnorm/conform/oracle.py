"""The truth: every normalization and its gradient in a type that is wide enough, and what a naive implementation would give."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy

from portnorm.conform.cases import Case, NumPyArray
from portnorm.dtypes import float32_value

WIDE = numpy.longdouble
"""The type of the truth for float64 cases; 64 bits of mantissa on x86."""


class Truth(NamedTuple):
    """The result and the cotangent of `x`, in the shape of `Operation.grouped`, and the axes of a statistic there."""

    y: NumPyArray
    dx: NumPyArray
    axes: tuple[int, ...]


def is_measurable(case: Case) -> bool:
    """Whether this machine has a type wider than that of the case."""
    return case.dtype != "float64" or numpy.finfo(WIDE).nmant >= 63


def truth(case: Case, arrays: dict[str, NumPyArray] | None = None) -> Truth:
    """The case in float64, a float64 case in `WIDE`. eps is rounded to float32, as ONNX stores it."""
    made = case.arrays() if arrays is None else arrays
    kind: Any = WIDE if case.dtype == "float64" else numpy.float64
    op, shape = case.operation, case.operation.grouped(case.shape)
    axes = op.axes(shape)
    x, dy = (made[name].astype(kind).reshape(shape) for name in ("x", "dy"))
    along = [n if a == 1 or (op.groups is not None and a == 2) else 1 for a, n in enumerate(shape)]
    weight, bias = (made[name].astype(kind).reshape(along) for name in ("weight", "bias"))
    if x.size == 0:
        return Truth(x, dy, axes)
    with numpy.errstate(all="ignore"):
        # A power of two per statistic keeps squares in range, and is exact.
        largest = numpy.max(numpy.abs(x), axis=axes, keepdims=True)
        scale = numpy.where(numpy.isfinite(largest) & (largest > 0), numpy.exp2(-numpy.floor(numpy.log2(largest))), 1).astype(kind)
        z = x * scale
        if op.center:
            z = z - numpy.mean(z, axis=axes, keepdims=True)
            z = z - numpy.mean(z, axis=axes, keepdims=True)
        eps = kind(float32_value(case.eps))
        rstd = 1 / numpy.sqrt(numpy.mean(z * z, axis=axes, keepdims=True) + eps * scale * scale)
        xhat = z * rstd
        g = dy * weight
        centred = g - numpy.mean(g, axis=axes, keepdims=True) if op.center else g
        dx = (centred - xhat * numpy.mean(g * xhat, axis=axes, keepdims=True)) * rstd * scale
        return Truth(xhat * weight + bias, dx, axes)


def naive(case: Case, arrays: dict[str, NumPyArray]) -> NumPyArray | None:
    """The textbook formula in float32, two passes: what an error is compared with. `None` where the values do not fit into float32."""
    op, shape = case.operation, case.operation.grouped(case.shape)
    axes = op.axes(shape)
    if case.dtype == "float64" or not all(shape):
        return None
    with numpy.errstate(all="ignore"):
        x = arrays["x"].astype(numpy.float32).reshape(shape)
        along = [n if a == 1 or (op.groups is not None and a == 2) else 1 for a, n in enumerate(shape)]
        weight, bias = (arrays[name].astype(numpy.float32).reshape(along) for name in ("weight", "bias"))
        z = x - x.mean(axis=axes, keepdims=True) if op.center else x
        y: NumPyArray = z / numpy.sqrt((z * z).mean(axis=axes, keepdims=True) + numpy.float32(case.eps)) * weight + bias
        return y
