"""Normalization of contiguous rows in one read and one write, compiled by numba. Held against `portnorm.norm.normalize` by the tests.

    m = x₀ + Σ (x − x₀) / n,  d = Σ (x − m) / n,  σ² = Σ ((x − m) − d)² / n,  y = ((x − m) − d) · rstd · weight + bias

as in the definition: the first mean is one of differences, and d is what rounding left of it. Sums are in float64 and in blocks. Only the
functions that add may reassociate, which lets the compiler vectorize them; differences are a function without that leave, so that
(x − m) − d stays as it is written. float64 sums of float32 squares cannot overflow; a row whose variance leaves the range is reported.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy

_BLOCK = 4096
"""Values that are summed in lanes before their sum is added to the others."""


F = TypeVar("F", bound=Callable[..., Any])


def compiled(*, reassociate: bool = False, signatures: Any = None) -> Callable[[F], F]:
    """Decorator: compiled on the first call without the interpreter's lock, and kept on disk where there is a place for it."""
    # False is said, since a function that says nothing takes over what the function has that it is called from.
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "nsz"} if reassociate else False}

    def compile_(function: F) -> F:
        try:
            made: F = numba.njit(signatures, cache=True, **options)(function)
        except RuntimeError:  # no place on disk that can be written
            made = numba.njit(signatures, **options)(function)
        return made

    return compile_


@compiled()
def _less(x: Any, m: Any) -> Any:
    return x - m


@compiled(reassociate=True)
def sum_of_differences(row: Any, m: float) -> float:
    """Σ (x − m)."""
    total = 0.0
    for start in range(0, row.size, _BLOCK):
        block, part = row[start : start + _BLOCK], 0.0
        for i in range(block.size):
            part += _less(block[i], m)
        total += part
    return total


@compiled(reassociate=True)
def sum_of_squares(row: Any, m: float, d: float) -> float:
    """Σ ((x − m) − d)²."""
    total = 0.0
    for start in range(0, row.size, _BLOCK):
        block, part = row[start : start + _BLOCK], 0.0
        for i in range(block.size):
            z = _less(_less(block[i], m), d)
            part += z * z
        total += part
    return total


@compiled(reassociate=True)
def sums_of_cotangents(row: Any, g: Any, high: Any, low: Any, factor: Any) -> tuple[float, float]:
    """Σ g and Σ g · x̂."""
    first, second = 0.0, 0.0
    for start in range(0, row.size, _BLOCK):
        block, given, a, b = row[start : start + _BLOCK], g[start : start + _BLOCK], 0.0, 0.0
        for i in range(block.size):
            a += given[i]
            b += given[i] * (_less(_less(block[i], high), low) * factor)
        first += a
        second += b
    return first, second


@compiled()
def _statistics(row: Any, eps: float, center: bool) -> tuple[float, float, float]:
    """(m, d, σ² + ε) of a row, in float64; the mean of float32 values needs no second look there."""
    n, m, d = row.size, 0.0, 0.0
    if center:
        first = float(row[0])
        m = first + sum_of_differences(row, first) / n
        if row.itemsize == 8:
            d = sum_of_differences(row, m) / n
    return m, d, sum_of_squares(row, m, d) / n + eps


def _forward(
    x: Any, weight: Any, bias: Any, eps: float, center: bool, smallest: float, largest: float, y: Any, mean: Any, rstd: Any
) -> bool:
    """y of x, both (rows, n). Fills `mean` (rows, 2) with m and d, and `rstd` (rows,).

    `weight` and `bias` are (p, k): row r takes row r mod p, each value of it for n / k neighbours; (0, 0) where there is none. False where
    σ² + ε is not between `smallest` and `largest`: then the result is not to be used.
    """
    n, fine, wide = x.shape[1], True, 1
    if weight.size:
        wide = n // weight.shape[1]
    elif bias.size:
        wide = n // bias.shape[1]
    for r in range(x.shape[0]):
        row, out = x[r], y[r]
        m, d, spread = _statistics(row, eps, center)
        if not (smallest < spread < largest):
            fine = False
        scale = 1.0 / math.sqrt(spread)
        mean[r, 0], mean[r, 1], rstd[r] = m, d, scale
        # In the type of the row: (x − m) is exact where it is small, d is what m lost.
        high = x.dtype.type(m)
        low, factor = x.dtype.type(m - high + d), x.dtype.type(scale)
        if wide > 1:
            for s in range(n // wide):
                block, into = row[s * wide : (s + 1) * wide], out[s * wide : (s + 1) * wide]
                gain = weight[r % weight.shape[0], s] if weight.size else x.dtype.type(1)
                shift = bias[r % bias.shape[0], s] if bias.size else x.dtype.type(0)
                for i in range(wide):
                    into[i] = ((block[i] - high) - low) * factor * gain + shift
        elif weight.size and bias.size:
            gains, shifts = weight[r % weight.shape[0]], bias[r % bias.shape[0]]
            for i in range(n):
                out[i] = ((row[i] - high) - low) * factor * gains[i] + shifts[i]
        elif weight.size:
            gains = weight[r % weight.shape[0]]
            for i in range(n):
                out[i] = ((row[i] - high) - low) * factor * gains[i]
        elif bias.size:
            shifts = bias[r % bias.shape[0]]
            for i in range(n):
                out[i] = ((row[i] - high) - low) * factor + shifts[i]
        else:
            for i in range(n):
                out[i] = ((row[i] - high) - low) * factor
    return fine


def _backward(x: Any, dy: Any, weight: Any, mean: Any, rstd: Any, center: bool, g: Any, dx: Any, dweight: Any, dbias: Any) -> None:
    """dx = rstd · (g − Σ g / n − x̂ · Σ g x̂ / n) with g = dy · weight; adds Σ dy · x̂ and Σ dy to the float64 `dweight` and `dbias`.

    `g` (n,) is room for one row. `weight`, `dweight` and `dbias` are (p, k) as in `forward`, or (0, 0).
    """
    n, wide = x.shape[1], 1
    if weight.size:
        wide = n // weight.shape[1]
    elif dbias.size:
        wide = n // dbias.shape[1]
    for r in range(x.shape[0]):
        row, given, out = x[r], dy[r], dx[r]
        high = x.dtype.type(mean[r, 0])
        low, factor = x.dtype.type(mean[r, 0] - high + mean[r, 1]), x.dtype.type(rstd[r])
        if not weight.size:
            for i in range(n):
                g[i] = given[i]
        elif wide == 1:
            gains = weight[r % weight.shape[0]]
            for i in range(n):
                g[i] = given[i] * gains[i]
        else:
            for s in range(n // wide):
                into, block, gain = g[s * wide : (s + 1) * wide], given[s * wide : (s + 1) * wide], weight[r % weight.shape[0], s]
                for i in range(wide):
                    into[i] = block[i] * gain
        first, second = sums_of_cotangents(row, g, high, low, factor)
        a, b = x.dtype.type(first / n if center else 0.0), x.dtype.type(second / n)
        for i in range(n):
            out[i] = factor * ((g[i] - a) - ((row[i] - high) - low) * factor * b)
        if wide == 1:
            if dweight.size:
                sums = dweight[r % dweight.shape[0]]
                for i in range(n):
                    sums[i] += given[i] * (((row[i] - high) - low) * factor)
            if dbias.size:
                sums = dbias[r % dbias.shape[0]]
                for i in range(n):
                    sums[i] += given[i]
        else:
            for s in range(n // wide):
                own, block = given[s * wide : (s + 1) * wide], row[s * wide : (s + 1) * wide]
                all_of, with_x = sums_of_cotangents(block, own, high, low, factor)
                if dweight.size:
                    dweight[r % dweight.shape[0], s] += with_x
                if dbias.size:
                    dbias[r % dbias.shape[0], s] += all_of


@functools.cache
def forward(dtype: str) -> Callable[..., bool]:
    """`_forward` for one type of values. Inputs are declared read-only, so that those which are need no version of their own."""
    t = numba.from_dtype(numpy.dtype(dtype))
    given, made, wide = numba.types.Array(t, 2, "C", readonly=True), t[:, ::1], numba.float64
    signature = numba.boolean(given, given, given, wide, numba.boolean, wide, wide, made, wide[:, ::1], wide[::1])
    return compiled(signatures=signature)(_forward)


@functools.cache
def backward(dtype: str) -> Callable[..., None]:
    """`_backward` for one type of values."""
    t = numba.from_dtype(numpy.dtype(dtype))
    given, made, wide = numba.types.Array(t, 2, "C", readonly=True), t[:, ::1], numba.float64
    statistics = (numba.types.Array(wide, 2, "C", readonly=True), numba.types.Array(wide, 1, "C", readonly=True))
    signature = numba.void(given, given, given, *statistics, numba.boolean, t[::1], made, wide[:, ::1], wide[:, ::1])
    return compiled(signatures=signature)(_backward)
