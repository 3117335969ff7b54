"""Sigmoid and tanh of vectors.

    eˣ = 2ᵏ (1 + q),  k = round(x / ln 2),  q = eʳ − 1 as a polynomial of r = x − k ln 2,  |r| ≤ ln 2 / 2

    σ(x) = 1 / (1 + e⁻ˣ),   tanh x = E / (E + 2) with E = e²ˣ − 1 = 2ᵏ q + (2ᵏ − 1)

Both within 4 ULP where the result is a normal number (float32: measured 2.5 and 3.0), and without overflow. q is r + r² p(r); in
float32 p has degree 4 and the least greatest error relative to eʳ (by Remez' exchange: 3e-9), in float64 degree 11 by Taylor, whose
remainder is below 5e-18.
"""

from __future__ import annotations

import math

from portnorm_backends.cpu.vectors import Vector, fused, reciprocal

_SINGLE = (1.3814467238e-3, 8.3687808365e-3, 4.1668392718e-2, 1.6666519642e-1, 4.9999994040e-1)
_DOUBLE = tuple(1.0 / math.factorial(n) for n in range(13, 1, -1))
_LN2_SINGLE = (0.693359375, -2.12194440e-4)
_LN2_DOUBLE = (6.93145751953125e-1, 1.42860682030941723212e-6)
"""ln 2 as a sum whose first term times a whole k is exact."""


def _exponential(x: Vector) -> tuple[Vector, Vector]:
    """(q, k) of eˣ."""
    polynomial, (high, low), to_whole = (_SINGLE, _LN2_SINGLE, 1.5 * 2.0**23) if x.is_single else (_DOUBLE, _LN2_DOUBLE, 1.5 * 2.0**52)
    k = fused(1 / math.log(2), x, to_whole) - to_whole
    r = fused(-low, k, fused(-high, k, x))
    p = fused(polynomial[0], r, polynomial[1])
    for c in polynomial[2:]:
        p = fused(p, r, c)
    return fused(p, r * r, r), k


def sigmoid(x: Vector) -> Vector:
    """σ(x)"""
    q, k = _exponential(-x.clipped(88 if x.is_single else 709))
    return reciprocal(1.0 + (1.0 + q).times_power_of_two(k))


def tanh(x: Vector) -> Vector:
    """tanh x"""
    q, k = _exponential((x + x).clipped(20 if x.is_single else 40))
    two = x.same(1.0).times_power_of_two(k)
    e = fused(q, two, two - 1.0)
    return e * reciprocal(e + 2.0)
