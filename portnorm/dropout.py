"""Dropout (Srivastava et al. 2014): what is kept is told from outside, and scaled so that its expectation is what it was.

y = x / (1 − p) where kept, else 0
"""

from __future__ import annotations

from portnorm.arrays import Array, xp_of
from portnorm.dtypes import is_kind
from portnorm.op import op


def scale(p: float) -> float:
    """What kept values are multiplied with; where all are dropped there are none."""
    return 1.0 / (1.0 - p) if p < 1 else 0.0


def kept(numbers: Array, p: float) -> Array:
    """Where values are kept: where a number uniform in [0, 1) is p at least. Truth values say it themselves."""
    return numbers if is_kind(xp_of(numbers), numbers.dtype, "bool") else numbers >= p


@op
def dropout(x: Array, mask: Array, *, p: float) -> tuple[Array, Array]:
    """`x` with what `mask`, of the same shape, has False for dropped, and the rest divided by 1 − p."""
    return xp_of(x).where(mask, x * scale(p), 0.0), mask


@dropout.backward
def _(mask: Array, dy: Array, *, p: float) -> tuple[Array, None]:
    return xp_of(dy).where(mask, dy * scale(p), 0.0), None
