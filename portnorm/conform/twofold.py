"""Sums of two doubles, about 32 digits: the truth for float64 where `longdouble` is no wider (Windows, Apple's processors).

T. J. Dekker, "A floating-point technique for extending the available precision", Numerische Mathematik 18 (1971); the sum is Knuth's.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy

NumPyArray = numpy.ndarray[Any, Any]


class Twofold(NamedTuple):
    """The unevaluated sum `high + low`, of which `high` is the nearest double."""

    high: NumPyArray
    low: NumPyArray

    @classmethod
    def of(cls, a: Any) -> Twofold:
        a = numpy.asarray(a, dtype=numpy.float64)
        return cls(a, numpy.zeros_like(a))

    def plus(self, other: Twofold) -> Twofold:
        high, low = _sum(self.high, other.high)
        more, rest = _sum(self.low, other.low)
        high, low = _renormalized(high, low + more)
        return Twofold(*_renormalized(high, low + rest))

    def minus(self, other: Twofold) -> Twofold:
        return self.plus(Twofold(-other.high, -other.low))

    def times(self, other: Twofold) -> Twofold:
        high, low = _product(self.high, other.high)
        return Twofold(*_renormalized(high, low + (self.high * other.low + self.low * other.high)))

    def over(self, other: Twofold) -> Twofold:
        """Two steps of a long division."""
        first = self.high / other.high
        rest = self.minus(other.times(Twofold.of(first)))
        return Twofold.of(first).plus(Twofold.of(rest.high / other.high))

    def root(self) -> Twofold:
        """The square root, by a step of Newton's from that of doubles."""
        first = numpy.sqrt(self.high)
        rest = self.minus(Twofold(*_product(first, first)))
        return Twofold.of(first).plus(Twofold.of(numpy.where(first > 0, rest.high / (2 * numpy.where(first > 0, first, 1)), 0)))

    def mean(self, axes: tuple[int, ...]) -> Twofold:
        """Over axes, which keep length 1; halves are added to halves."""
        shape = [1 if k in axes else n for k, n in enumerate(self.high.shape)]
        count = math.prod(n for k, n in enumerate(self.high.shape) if k in axes)
        last = range(-len(axes), 0)
        parts = Twofold(*(numpy.moveaxis(a, axes, last).reshape(*(n for k, n in enumerate(a.shape) if k not in axes), count) for a in self))
        while (n := parts.high.shape[-1]) > 1:
            middle = n // 2
            halves = [Twofold(*(a[..., place] for a in parts)) for place in (slice(middle), slice(middle, 2 * middle))]
            odd = Twofold(*(a[..., 2 * middle :] for a in parts))
            whole = halves[0].plus(halves[1])
            parts = Twofold(*(numpy.concatenate(pair, axis=-1) for pair in zip(whole, odd, strict=True)))
        return Twofold(*(a.reshape(shape) for a in parts)).over(Twofold.of(float(count)))


def _sum(a: NumPyArray, b: NumPyArray) -> tuple[NumPyArray, NumPyArray]:
    """a + b, and what rounding took from it."""
    whole = a + b
    part = whole - a
    return whole, (a - (whole - part)) + (b - part)


def _renormalized(a: NumPyArray, b: NumPyArray) -> tuple[NumPyArray, NumPyArray]:
    """The same where |a| ≥ |b|."""
    whole = a + b
    return whole, b - (whole - a)


def _halves(a: NumPyArray) -> tuple[NumPyArray, NumPyArray]:
    """The upper 26 bits and the rest."""
    shifted = 134217729.0 * a
    high = shifted - (shifted - a)
    return high, a - high


def _product(a: NumPyArray, b: NumPyArray) -> tuple[NumPyArray, NumPyArray]:
    """a · b, and what rounding took from it."""
    whole = a * b
    (a1, a2), (b1, b2) = _halves(a), _halves(b)
    return whole, ((a1 * b1 - whole) + a1 * b2 + a2 * b1) + a2 * b2
