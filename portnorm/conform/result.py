"""How far values are from the truth: in units in the last place, and how much further than the textbook formula."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy

from portnorm.conform.cases import Case, NumPyArray
from portnorm.conform.oracle import naive, of_two_doubles
from portnorm.conform.tolerances import limit


@dataclass(frozen=True)
class Result:
    """One subject on one case."""

    subject: str
    """A library, a runtime, or another's own normalization."""
    version: str
    operation: str
    regime: str
    dtype: str
    side: str
    """`forward`, `gradient`, `mean` and `variance` that are returned, `one step` or `trajectory`."""
    status: str
    """`ok`, `beyond` the limit, `not installed`, `does not run`, or `not measured` where it does not apply."""
    max_ulp: float | None = None
    """Units in the last place of the largest value of the same statistic."""
    p99_ulp: float | None = None
    max_abs: float | None = None
    naive_ratio: float | None = None
    """The largest error over that of the textbook formula in float32."""
    limit: float | None = None
    nonfinite: int = 0
    """Values that are not finite where the truth is, or the other way."""
    detail: str = ""
    reproduce: str = ""

    @property
    def failed(self) -> bool:
        return self.status in ("beyond", "does not run")

    def beyond(self, detail: str) -> Result:
        """The same, named as wrong for a reason that no number says."""
        return replace(self, status="beyond", detail=detail)

    def __str__(self) -> str:
        """In a line: how far off, and of what is not `ok` where or why."""
        if self.max_ulp is None:
            return f"{self.status}: {self.detail}"
        far = f"{self.nonfinite} values are not finite" if self.nonfinite else f"{self.max_ulp:.4g} of {self.limit:g} ULP"
        return f"{self.status}: {far}" + (f", {self.detail}" if self.failed else "")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_MANTISSA = {"float16": 10, "bfloat16": 7, "float32": 23, "float64": 52}
_LOWEST = {"float16": -14, "bfloat16": -126, "float32": -126, "float64": -1022}
_LARGEST = {"float16": 65504.0, "bfloat16": 3.3895e38, "float32": 3.4028e38, "float64": 1.797e308}


_SAMPLE = 2**17
"""So many values at most are put in order for the 99th percentile."""


def ulp(largest: NumPyArray, dtype: str) -> NumPyArray:
    """The unit in the last place of values of this size."""
    with numpy.errstate(divide="ignore"):
        exponent = numpy.floor(numpy.log2(numpy.abs(largest).astype(numpy.float64)))
    unit: NumPyArray = numpy.exp2(numpy.maximum(exponent, _LOWEST[dtype]) - _MANTISSA[dtype])
    return unit


def compared(
    about: tuple[str, str, str, str, str],
    side: str,
    values: NumPyArray,
    exact: NumPyArray,
    case: Case,
    arrays: dict[str, NumPyArray],
    axes: tuple[int, ...],
    dtype: str = "",
) -> Result:
    """What the values are off by, in units of the case's type or of `dtype`. A value that the type cannot hold may be infinite."""
    dtype = dtype or case.dtype
    bound = limit(dtype, side)
    values = numpy.asarray(values).reshape(exact.shape)
    if values.size == 0:
        return Result(*about, side, "ok", 0.0, 0.0, 0.0, None, bound)
    with numpy.errstate(all="ignore"):
        holds = numpy.isfinite(exact) & (numpy.abs(exact) <= _LARGEST[dtype])
        wrong = holds & ~numpy.isfinite(values) | (numpy.isnan(exact) & numpy.isfinite(values))
        both = holds & numpy.isfinite(values)
        largest = numpy.max(numpy.where(holds, numpy.abs(exact), 0), axis=axes, keepdims=True)
        error = numpy.where(both, numpy.abs(values.astype(exact.dtype, copy=False) - exact), 0).astype(numpy.float64, copy=False)
        units = error / ulp(largest, dtype)
    worst, count = float(units.max()), int(wrong.sum())
    place = numpy.unravel_index(int(numpy.argmax(numpy.where(wrong, numpy.inf, units))), units.shape)
    ratio = None
    if side == "forward" and (textbook := naive(case, arrays)) is not None:
        with numpy.errstate(all="ignore"):
            other = numpy.where(both, numpy.abs(textbook - exact), 0)
            other = numpy.where(numpy.isfinite(other), other, numpy.inf)
        ratio = float(error.max() / other.max()) if other.max() > 0 else None
    status = "ok" if worst <= bound and not count else "beyond"
    where = f"at {tuple(map(int, place))}: {float(values[place])!r}, the truth is {float(exact[place])!r}"
    where += ", which is computed in two doubles and rounded to one" if of_two_doubles(case) else ""
    some = units.reshape(-1)[:: 1 + units.size // _SAMPLE]
    return Result(
        *about, side, status, worst, float(numpy.quantile(some, 0.99)), float(error.max()), ratio, bound, count, where, case.reproduce()
    )
