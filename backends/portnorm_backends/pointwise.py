"""Sigmoid and tanh for loops that the compiler vectorizes, compiled by numba.

    eˣ = 2ᵏ (1 + q),  k = round(x / ln 2),  q = eʳ − 1 as a polynomial of r = x − k ln 2,  |r| ≤ ln 2 / 2

    σ(x) = 1 / (1 + e⁻ˣ),   tanh x = E / (E + 2) with E = e²ˣ − 1 = 2ᵏ q + (2ᵏ − 1)

Both within 4 ULP where the result is a normal number (float32: measured 1.9 and 2.5), and without overflow. The polynomial in float32 is
that of Cephes' expf (Moshier), in float64 Taylor's of degree 13, whose remainder is below 5e-18.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy
from numba.extending import overload

from portnorm_backends.rowwise import compiled

_SINGLE = tuple(
    numpy.float32(c) for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)
_DOUBLE = tuple(1.0 / math.factorial(n) for n in range(13, 1, -1))
_PER_LN2, _ROUND_SINGLE, _ROUND_DOUBLE = 1.4426950408889634, numpy.float32(1.5 * 2.0**23), 1.5 * 2.0**52


def _parts(x: Any) -> Any:
    """(q, 2ᵏ) of eˣ."""
    raise NotImplementedError("compiled by numba")


@overload(_parts, jit_options={"fastmath": {"contract"}, "error_model": "numpy"})  # type: ignore[untyped-decorator, unused-ignore]
def _(x: Any) -> Any:
    per_ln2, high, low = numpy.float32(_PER_LN2), numpy.float32(0.693359375), numpy.float32(-2.12194440e-4)
    a, b, c, d, e, f = _SINGLE
    wide_high, wide_low = 6.93145751953125e-1, 1.42860682030941723212e-6

    def single(x: Any) -> Any:
        k = (x * per_ln2 + _ROUND_SINGLE) - _ROUND_SINGLE
        r = (x - k * high) - k * low
        p = ((((a * r + b) * r + c) * r + d) * r + e) * r + f
        two = numpy.int32((numpy.int32(k) + numpy.int32(127)) << 23).view(numpy.float32)
        return p * (r * r) + r, two

    def double(x: Any) -> Any:
        k = (x * _PER_LN2 + _ROUND_DOUBLE) - _ROUND_DOUBLE
        r = (x - k * wide_high) - k * wide_low
        p = 0.0
        for i in numba.literal_unroll(_DOUBLE):
            p = p * r + i
        two = numpy.int64((numpy.int64(k) + 1023) << 52).view(numpy.float64)
        return p * (r * r) + r, two

    return single if x == numba.float32 else double


LANES = 32
"""The loops below go to the next multiple of this: the compiler vectorizes so many at once, and a rest of single values would cost more."""


@compiled()
def padded(size: int) -> int:
    """`size` or the next multiple of `LANES`: the length of a vector that `sigmoid` and `tanh` may read or write from a place on."""
    return -(-size // LANES) * LANES


@compiled(contract=True)
def sigmoid(x: Any, y: Any, size: int) -> None:
    """y = σ(x) for the first `size` values of two vectors with room for `padded(size)`."""
    one, limit = x.dtype.type(1), x.dtype.type(88 if x.itemsize == 4 else 709)
    for i in range(padded(size)):
        q, two = _parts(min(max(-x[i], -limit), limit))
        y[i] = one / (one + (q * two + two))


@compiled(contract=True)
def tanh(x: Any, y: Any, size: int) -> None:
    """y = tanh(x), likewise."""
    one, limit = x.dtype.type(1), x.dtype.type(20 if x.itemsize == 4 else 40)
    for i in range(padded(size)):
        q, two = _parts(min(max(x[i] + x[i], -limit), limit))
        e = q * two + (two - one)
        y[i] = e / (e + x.dtype.type(2))
