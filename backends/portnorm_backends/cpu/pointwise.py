"""Sigmoid and tanh of vectors.

    eˣ = 2ᵏ (1 + q),  k = round(x / ln 2),  q = eʳ − 1 as a polynomial of r = x − k ln 2,  |r| ≤ ln 2 / 2

    σ(x) = 1 / (1 + e⁻ˣ),   tanh x = E / (E + 2) with E = e²ˣ − 1 = 2ᵏ q + (2ᵏ − 1)

Both within 4 ULP where the result is a normal number (float32: measured 2.4 and 3.0), and without overflow. The polynomial in float32 is
that of Cephes' expf (Moshier), in float64 Taylor's of degree 13, whose remainder is below 5e-18.
"""

from __future__ import annotations

import math

from portnorm_backends.cpu.vectors import Vector, fused, reciprocal

_SINGLE = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_DOUBLE = tuple(1.0 / math.factorial(n) for n in range(13, 1, -1))
_LN2_SINGLE = (0.693359375, -2.12194440e-4)
_LN2_DOUBLE = (6.93145751953125e-1, 1.42860682030941723212e-6)
"""ln 2 as a sum whose first term times a whole k is exact."""


def _exponential(x: Vector) -> tuple[Vector, Vector]:
    """(q, 2ᵏ) of eˣ."""
    polynomial, (high, low), to_whole = (_SINGLE, _LN2_SINGLE, 1.5 * 2.0**23) if x.is_single else (_DOUBLE, _LN2_DOUBLE, 1.5 * 2.0**52)
    k = fused(1 / math.log(2), x, to_whole) - to_whole
    r = fused(-low, k, fused(-high, k, x))
    p = fused(polynomial[0], r, polynomial[1])
    for c in polynomial[2:]:
        p = fused(p, r, c)
    return fused(p, r * r, r), k.power_of_two()


def sigmoid(x: Vector) -> Vector:
    """σ(x)"""
    q, two = _exponential((0.0 - x).clipped(88 if x.is_single else 709))
    return reciprocal(1.0 + fused(q, two, two))


def tanh(x: Vector) -> Vector:
    """tanh x"""
    q, two = _exponential((x + x).clipped(20 if x.is_single else 40))
    e = fused(q, two, two - 1.0)
    return e * reciprocal(e + 2.0)
