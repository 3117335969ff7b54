"""Normalization of contiguous rows, compiled by numba. Held against `portnorm.norm.normalize` by the tests.

    d = Σ (x − m) / n,  σ² = Σ (x − m)² / n − d²,  y = ((x − m) − d) · rstd · weight + bias

in one pass over a row for its statistics and one for its result. m is the mean of the row's first values, taken of their differences to the
first of all. Nothing cancels as long as m lies within √2 σ of the mean; where the first values say little about the row the pass is made
again from m + d. What is left of d then comes from rounding, and the σ² of values of one binade is at least half of Σ (x − m)² / n.

Sums are taken in lanes of the type of the values, a few terms at a time (`sums`). A row whose variance leaves the range in which squares
keep their accuracy is reported.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numba
import numpy

from portnorm_backends.cpu.compiling import bare, compiled, fill, row_of
from portnorm_backends.cpu.places import kinds
from portnorm_backends.cpu.sharing import shared
from portnorm_backends.cpu.sums import GROUP, carried, carry
from portnorm_backends.cpu.vectors import Vector, asking, elementwise, fused, leading, like, product, settle, streamed, summed

_FIRST = 64
"""Values that the first guess of a mean is taken of."""


@summed(1)
def _beside(x: Vector, first: Vector) -> tuple[Vector]:
    return (x - first,)


@summed(2)
def _moments(x: Vector, m: Vector) -> tuple[Vector, Vector]:
    z = x - m
    return z, product(z, z)


@summed(1)
def _squares(x: Vector) -> tuple[Vector]:
    return (product(x, x),)


@summed(2)
def _cotangents(x: Vector, g: Vector, m: Vector, d: Vector, factor: Vector) -> tuple[Vector, Vector]:
    return g, product(g, ((x - m) - d) * factor)


@summed(2)
def _cotangents_with_gains(x: Vector, dy: Vector, gain: Vector, m: Vector, d: Vector, factor: Vector) -> tuple[Vector, Vector]:
    g = dy * gain
    return g, product(g, ((x - m) - d) * factor)


@compiled(inner=True)
def guess(row: Any) -> Any:
    """The mean of the first values of a row."""
    count = min(_FIRST, row.size)
    return leading(row) + like(row, _beside(count, (row, leading(row)))[0] / count)


@compiled(inner=True)
def sums(row: Any, m: Any) -> tuple[float, float]:
    """Σ (x − m) and Σ (x − m)²."""
    found: tuple[float, float] = _moments(row.size, (row, m))
    return found


@compiled(inner=True)
def sums_of_cotangents(row: Any, g: Any, m: Any, d: Any, factor: Any) -> tuple[float, float]:
    """Σ g and Σ g · x̂."""
    found: tuple[float, float] = _cotangents(row.size, (row, g, m, d, factor))
    return found


@compiled(inner=True)
def statistics(row: Any, center: bool) -> tuple[Any, Any, float]:
    """(m, d, σ²) of a row; m and d in the type of the row, 0 unless `center`."""
    n, zero = row.size, like(row, 0)
    if not center:
        return zero, zero, _squares(n, (row,))[0] / n
    m = guess(row)
    a, b = sums(row, m)
    d, var = a / n, b / n - (a / n) ** 2
    if not d * d <= 2.0 * var:
        m = like(row, m + d)
        a, b = sums(row, m)
        d, var = a / n, max(b / n - (a / n) ** 2, 0.0)
    return m, like(row, d), var


def normalized(x: Vector, gain: Vector, shift: Vector, m: Vector, d: Vector, factor: Vector) -> tuple[Vector]:
    """((x − m) − d) · factor · gain + shift"""
    return (fused(((x - m) - d) * factor, gain, shift),)


def _scaled(x: Vector, m: Vector, d: Vector, gain: Vector, shift: Vector) -> tuple[Vector]:
    """((x − m) − d) · gain + shift"""
    return (fused((x - m) - d, gain, shift),)


scaled, scaled_asking = elementwise(_scaled), asking(_scaled)
_scaled_once, _scaled_twice = streamed(_scaled), streamed(normalized)


def _forward(
    x: Any,
    y: Any,
    kept: Any,
    weight: Any,
    bias: Any,
    turns: int,
    eps: float,
    center: bool,
    smallest: float,
    largest: float,
    past: bool,
) -> bool:
    """y of x, both (rows, n), of which only each row need be contiguous.

    Fills `kept` (rows, 3), or (0, 3) where nobody reads it, with m, d and 1 / sqrt(σ² + ε).

    `weight` and `bias` are (turns · k,), or (0,) where there is none: row r takes k values from r mod `turns`, each for n / k neighbours.
    False where σ² + ε is not between `smallest` and `largest`: then the result is not to be used. `past`: y goes past the caches.
    """
    x, weight, bias, y, kept = bare(x), bare(weight), bare(bias), bare(y), bare(kept)
    n, fine = x.shape[1], True
    k = max(weight.size, bias.size) // turns
    wide, by_value = n // k if k else n, k == n
    for r in range(x.shape[0]):
        row, out = row_of(x, r), row_of(y, r)
        m, d, var = statistics(row, center)
        if not (smallest < var + eps < largest):
            fine = False
        factor = like(x, 1.0 / math.sqrt(var + eps))
        if kept.size:
            kept[r, 0], kept[r, 1], kept[r, 2] = m, d, factor
        first = r % turns * k
        if not by_value:
            for s in range(n // wide):
                i, j = s * wide, (s + 1) * wide
                gain = weight[first + s] * factor if weight.size else factor
                shift = bias[first + s] if bias.size else like(x, 0)
                scaled(wide, (row[i:j], m, d, gain, shift), (out[i:j],))
        elif weight.size and bias.size:
            _scaled_twice(n, (row, weight[first : first + n], bias[first : first + n], m, d, factor), (out,), past)
        elif weight.size:
            _scaled_twice(n, (row, weight[first : first + n], 0.0, m, d, factor), (out,), past)
        else:
            _scaled_once(n, (row, m, d, factor, bias[first : first + n]), (out,), past)
    if past:
        settle()
    return fine


Three = tuple[Vector, Vector, Vector]


@elementwise
def _back_with_gains(
    x: Vector, dy: Vector, gain: Vector, m: Vector, d: Vector, factor: Vector, a: Vector, b: Vector, with_x: Vector, alone: Vector
) -> Three:
    """dx of one row, where a and b are the means of g and g · x̂; with_x + dy · x̂ and alone + dy."""
    xhat = ((x - m) - d) * factor
    return factor * ((dy * gain - a) - xhat * b), fused(dy, xhat, with_x), alone + dy


@elementwise
def _back_with_shifts(
    x: Vector, dy: Vector, m: Vector, d: Vector, factor: Vector, a: Vector, b: Vector, alone: Vector
) -> tuple[Vector, Vector]:
    """The same without gains."""
    return factor * ((dy - a) - ((x - m) - d) * factor * b), alone + dy


@elementwise
def back(x: Vector, dy: Vector, gain: Vector, m: Vector, d: Vector, factor: Vector, a: Vector, b: Vector) -> tuple[Vector]:
    """The same of values with one gain and one shift."""
    return (factor * ((dy * gain - a) - ((x - m) - d) * factor * b),)


def _backward(x: Any, dy: Any, kept: Any, dx: Any, part: Any, dweight: Any, dbias: Any, weight: Any, center: bool) -> bool:
    """dx = rstd · (g − Σ g / n − x̂ · Σ g x̂ / n) with g = dy · weight; Σ dy · x̂ and Σ dy into the float64 `dweight` and `dbias`.

    `weight` is (p, k), or (0, 0); row r takes that of r mod p. `dweight` and `dbias` are (2, p, k), the sums and what rounding lost of
    them, or (2, 0, 0). `part` (2, p, k), or (2, 0, 0), is room for sums over a few rows.
    """
    x, dy, weight, kept, part, dx = bare(x), bare(dy), bare(weight), bare(kept), bare(part), bare(dx)
    dweight, dbias = bare(dweight), bare(dbias)
    fill(part.reshape(part.size), 0)
    fill(dweight.reshape(dweight.size), 0)
    fill(dbias.reshape(dbias.size), 0)
    n, wide = x.shape[1], x.shape[1]
    if weight.size:
        wide = n // weight.shape[1]
    elif dbias.size:
        wide = n // dbias.shape[2]
    by_value, turns = part.size > 0, max(weight.shape[0], dbias.shape[1], 1)
    for r in range(x.shape[0]):
        row, given, out, p = row_of(x, r), row_of(dy, r), row_of(dx, r), r % turns
        m, d, factor = kept[r, 0], kept[r, 1], kept[r, 2]
        first = second = lost_first = lost_second = 0.0
        if by_value and weight.size:
            first, second = _cotangents_with_gains(n, (row, given, weight[p], m, d, factor))
        elif by_value:
            first, second = sums_of_cotangents(row, given, m, d, factor)
        else:
            for s in range(n // wide):
                block, own = row[s * wide : (s + 1) * wide], given[s * wide : (s + 1) * wide]
                shift, with_x = sums_of_cotangents(block, own, m, d, factor)
                gain = float(weight[p, s]) if weight.size else 1.0
                first, lost_first = carried(first, lost_first, shift * gain)
                second, lost_second = carried(second, lost_second, with_x * gain)
                if dweight.size:
                    dweight[0, p, s], dweight[1, p, s] = carried(dweight[0, p, s], dweight[1, p, s], with_x)
                if dbias.size:
                    dbias[0, p, s], dbias[1, p, s] = carried(dbias[0, p, s], dbias[1, p, s], shift)
        a, b = like(x, first / n if center else 0.0), like(x, second / n)
        if not by_value:
            for s in range(n // wide):
                i, j = s * wide, (s + 1) * wide
                gain = weight[p, s] if weight.size else like(x, 1)
                back(wide, (row[i:j], given[i:j], gain, m, d, factor, a, b), (out[i:j],))
        elif weight.size:
            with_x, alone = part[0, p], part[1, p]
            _back_with_gains(n, (row, given, weight[p], m, d, factor, a, b, with_x, alone), (out, with_x, alone))
        else:
            _back_with_shifts(n, (row, given, m, d, factor, a, b, part[1, p]), (out, part[1, p]))
        if by_value and ((r + 1) % (GROUP * turns) == 0 or r == x.shape[0] - 1):
            for k in range(turns):
                if dweight.size:
                    carry(dweight[0, k], dweight[1, k], part[0, k])
                if dbias.size:
                    carry(dbias[0, k], dbias[1, k], part[1, k])
    return True


def forward_of(kernel: Any, dtype: numpy.dtype[Any]) -> Callable[..., bool]:
    """A forward kernel for one type of values. Inputs are declared read-only, so that those which are need no version of their own."""
    v, t, wide = *kinds(dtype), numba.float64
    apart, given = numba.types.Array(v, 2, "A", readonly=True), numba.types.Array(t, 1, "C", readonly=True)
    how = (numba.int64, wide, numba.boolean, wide, wide, numba.boolean)
    made: Callable[..., bool] = shared(compiled(signatures=numba.boolean(apart, v[:, :], t[:, ::1], given, given, *how))(kernel), 3)
    return made


@functools.cache
def forward(dtype: numpy.dtype[Any]) -> Callable[..., bool]:
    """`_forward` for one type of values."""
    return forward_of(_forward, dtype)


def backward_of(kernel: Any, dtype: numpy.dtype[Any]) -> Callable[..., bool]:
    """A backward kernel, likewise."""
    v, t, wide = *kinds(dtype), numba.float64[:, :, ::1]
    apart, given = numba.types.Array(v, 2, "A", readonly=True), numba.types.Array(t, 2, "C", readonly=True)
    signature = numba.boolean(apart, apart, given, v[:, :], t[:, :, ::1], wide, wide, given, numba.boolean)
    made: Callable[..., bool] = shared(compiled(signatures=signature)(kernel), 4, 3)
    return made


@functools.cache
def backward(dtype: numpy.dtype[Any]) -> Callable[..., bool]:
    """`_backward` for one type of values."""
    return backward_of(_backward, dtype)
