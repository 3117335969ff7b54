"""Normalization over all axes but the channels, as batch normalization in training does it; compiled by numba like `rowwise`.

`columns`: the channels are the last axis, (rows, channels), with statistics for each group of rows, such as a step of a sequence; rows
from `ends[g]` to `ends[g + 1]` are group g; of these numbers `places` has the rows themselves, where not all count. The loops go along the
channels and hold sums for each, some rows at a time.
`channels`: (outer, channels, inner), every (outer, channel) a contiguous block. Statistics as in `rowwise`: from a first guess m of the
mean, with d what it lacks. The gain w of a channel is one number, so that dx = w · rstd · (dy − Σ dy / n − x̂ · Σ dy x̂ / n).
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
from portnorm_backends.cpu.rowwise import guess, scaled, scaled_asking, sums, sums_of_cotangents
from portnorm_backends.cpu.sharing import shared
from portnorm_backends.cpu.sums import GROUP, TERMS, carried, carry
from portnorm_backends.cpu.vectors import Vector, elementwise, fused, like, prefetch

_FIRST = 64
"""Rows that the first guess of a mean is taken of."""

_AHEAD = 4096
"""Bytes between what is read and what is asked for."""


# -- (rows, channels) -------------------------------------------------------------------------------------------------------------------


@elementwise
def same(x: Vector) -> tuple[Vector]:
    """The values, in the type of where they are written."""
    return (x,)


@elementwise
def _add_moments(x: Vector, m: Vector, first: Vector, second: Vector) -> tuple[Vector, Vector]:
    z = x - m
    return first + z, fused(z, z, second)


@elementwise
def _add_moments_of_four(x: Vector, x1: Vector, x2: Vector, x3: Vector, m: Vector, first: Vector, second: Vector) -> tuple[Vector, Vector]:
    """The same of four rows."""
    z, z1, z2, z3 = x - m, x1 - m, x2 - m, x3 - m
    return first + ((z + z1) + (z2 + z3)), second + (fused(z, z, z1 * z1) + fused(z2, z2, z3 * z3))


@elementwise
def _add_cotangents(x: Vector, dy: Vector, m: Vector, d: Vector, rstd: Vector, alone: Vector, with_x: Vector) -> tuple[Vector, Vector]:
    return alone + dy, fused(dy, ((x - m) - d) * rstd, with_x)


@elementwise
def _back(x: Vector, dy: Vector, gain: Vector, m: Vector, d: Vector, rstd: Vector, a: Vector, b: Vector) -> tuple[Vector]:
    """dx, where a and b are the means of dy and dy · x̂, and the gain has 1 / σ."""
    return (gain * ((dy - a) - ((x - m) - d) * rstd * b),)


@compiled(inner=True)
def _row(x: Any, places: Any, k: int, start: int, columns: int) -> Any:
    """So many values of row k of those that count, from `start` on."""
    return row_of(x, places[k] if places.size else k)[start : start + columns]


@compiled(inner=True)
def _column_sums(x: Any, places: Any, at: int, rows: int, start: int, m: Any, first: Any, second: Any) -> None:
    """Σ (x − m) and Σ (x − m)² of each column from `start` on, over so many rows from `at` on."""
    columns = m.size
    part, lost = numpy.zeros((4, columns), m.dtype), numpy.zeros((2, columns))
    fill(first, 0)
    fill(second, 0)
    a, b, c, d = part[0], part[1], part[2], part[3]
    for begin in range(at, at + rows, 4 * TERMS):
        end = min(begin + 4 * TERMS, at + rows)
        eights = begin + (end - begin) // 8 * 8
        for k in range(begin, eights, 4):  # two sums of half as many terms
            one, two = _row(x, places, k, start, columns), _row(x, places, k + 1, start, columns)
            three, four = _row(x, places, k + 2, start, columns), _row(x, places, k + 3, start, columns)
            if (k - begin) % 8:
                _add_moments_of_four(columns, (one, two, three, four, m, c, d), (c, d))
            else:
                _add_moments_of_four(columns, (one, two, three, four, m, a, b), (a, b))
        for k in range(eights, end):
            _add_moments(columns, (_row(x, places, k, start, columns), m, a, b), (a, b))
        for i in range(columns):
            a[i], b[i], c[i], d[i] = a[i] + c[i], b[i] + d[i], 0, 0
        carry(first, lost[0], a)
        carry(second, lost[1], b)


@compiled(inner=True)
def _column_statistics(x: Any, places: Any, at: int, rows: int, start: int, center: bool, m: Any, d: Any, var: Any) -> None:
    """m, d and σ² of each column from `start` on, over so many rows from `at` on; m and d in the type of the values."""
    columns = m.size
    total, again = numpy.empty(columns), False
    fill(m, 0)
    if center:
        same(columns, (_row(x, places, at, start, columns),), (m,))
        _column_sums(x, places, at, min(_FIRST, rows), start, m, total, var)
        for c in range(columns):
            m[c] += total[c] / min(_FIRST, rows)
    _column_sums(x, places, at, rows, start, m, total, var)
    for c in range(columns):
        mean = total[c] / rows if center else 0.0
        var[c] = var[c] / rows - mean * mean
        d[c] = mean
        if not mean * mean <= 2.0 * var[c]:
            again = True
    if again and center:
        for c in range(columns):
            m[c] += d[c]
        _column_sums(x, places, at, rows, start, m, total, var)
        for c in range(columns):
            mean = total[c] / rows
            var[c] = max(var[c] / rows - mean * mean, 0.0)
            d[c] = mean


def _columns_forward(
    start: int,
    stop: int,
    x: Any,
    ends: Any,
    places: Any,
    weight: Any,
    bias: Any,
    eps: float,
    center: bool,
    smallest: float,
    largest: float,
    y: Any,
    kept: Any,
    var: Any,
) -> bool:
    x, ends, weight, bias, y, kept, var = bare(x), bare(ends), bare(weight), bare(bias), bare(y), bare(kept), bare(var)
    places, columns = bare(places), stop - start
    fine, gain, shift = True, numpy.empty(columns, kept.dtype), numpy.zeros(columns, kept.dtype)
    for g in range(ends.size - 1):
        m, d, rstd, spread = kept[0, g, start:stop], kept[1, g, start:stop], kept[2, g, start:stop], var[g, start:stop]
        _column_statistics(x, places, ends[g], ends[g + 1] - ends[g], start, center, m, d, spread)
        for c in range(columns):
            if not (smallest < spread[c] + eps < largest):
                fine = False
            rstd[c] = 1.0 / math.sqrt(spread[c] + eps)
            gain[c] = rstd[c] * weight[start + c] if weight.size else rstd[c]
            if bias.size:
                shift[c] = bias[start + c]
        for k in range(ends[g], ends[g + 1]):
            scaled(columns, (_row(x, places, k, start, columns), m, d, gain, shift), (_row(y, places, k, start, columns),))
    return fine


@compiled(inner=True)
def _column_cotangents(
    x: Any, dy: Any, places: Any, at: int, rows: int, start: int, m: Any, d: Any, rstd: Any, first: Any, second: Any
) -> None:
    """Σ dy and Σ dy · x̂ of each column from `start` on, over so many rows from `at` on."""
    columns = m.size
    part, lost = numpy.zeros((2, columns), m.dtype), numpy.zeros((2, columns))
    fill(first, 0)
    fill(second, 0)
    a, b = part[0], part[1]
    for begin in range(at, at + rows, 2 * GROUP):
        for k in range(begin, min(begin + 2 * GROUP, at + rows)):
            given = _row(dy, places, k, start, columns)
            _add_cotangents(columns, (_row(x, places, k, start, columns), given, m, d, rstd, a, b), (a, b))
        carry(first, lost[0], a)
        carry(second, lost[1], b)


def _columns_scaled(start: int, stop: int, x: Any, ends: Any, places: Any, weight: Any, bias: Any, kept: Any, y: Any) -> bool:
    """With statistics that are given."""
    x, ends, weight, bias, kept, y = bare(x), bare(ends), bare(weight), bare(bias), bare(kept), bare(y)
    places, columns = bare(places), stop - start
    gain, shift = numpy.empty(columns, kept.dtype), numpy.zeros(columns, kept.dtype)
    for g in range(ends.size - 1):
        m, d, rstd = kept[0, g, start:stop], kept[1, g, start:stop], kept[2, g, start:stop]
        for c in range(columns):
            gain[c] = rstd[c] * weight[start + c] if weight.size else rstd[c]
            if bias.size:
                shift[c] = bias[start + c]
        for k in range(ends[g], ends[g + 1]):
            scaled(columns, (_row(x, places, k, start, columns), m, d, gain, shift), (_row(y, places, k, start, columns),))
    return True


def _columns_backward(
    start: int,
    stop: int,
    x: Any,
    ends: Any,
    places: Any,
    dy: Any,
    weight: Any,
    kept: Any,
    center: bool,
    own: bool,
    dx: Any,
    dweight: Any,
    dbias: Any,
) -> bool:
    """`own`: the statistics were those of x; else they are constants."""
    x, dy, weight, kept, dx, dweight, dbias = bare(x), bare(dy), bare(weight), bare(kept), bare(dx), bare(dweight), bare(dbias)
    ends, places, columns = bare(ends), bare(places), stop - start
    room, found, lost = numpy.empty((3, columns), kept.dtype), numpy.empty((2, columns)), numpy.zeros((2, columns))
    gain, a, b, first, second = room[0], room[1], room[2], found[0], found[1]
    dweight, dbias = dweight[start:stop], dbias[start:stop]
    fill(dweight, 0)
    fill(dbias, 0)
    for g in range(ends.size - 1):
        m, d, rstd = kept[0, g, start:stop], kept[1, g, start:stop], kept[2, g, start:stop]
        rows = ends[g + 1] - ends[g]
        _column_cotangents(x, dy, places, ends[g], rows, start, m, d, rstd, first, second)
        for c in range(columns):
            gain[c] = rstd[c] * weight[start + c] if weight.size else rstd[c]
            a[c], b[c] = first[c] / rows if own and center else 0.0, second[c] / rows if own else 0.0
            dbias[c], lost[0, c] = carried(dbias[c], lost[0, c], first[c])
            dweight[c], lost[1, c] = carried(dweight[c], lost[1, c], second[c])
        for k in range(ends[g], ends[g + 1]):
            values, given = _row(x, places, k, start, columns), _row(dy, places, k, start, columns)
            _back(columns, (values, given, gain, m, d, rstd, a, b), (_row(dx, places, k, start, columns),))
    return True


# -- (outer, channels, inner) ------------------------------------------------------------------------------------------------------------


@compiled(inner=True)
def _ahead(x: Any, k: int, c: int) -> None:
    """Ask for the block of a channel that is read some kilobytes after block k; the processor sees no pattern in blocks that are short."""
    k += max(1, _AHEAD // (x.shape[2] * x.itemsize))
    if k < x.shape[0]:
        prefetch(x[k, c])


@compiled(inner=True)
def _channel_sums(x: Any, c: int, m: Any) -> tuple[float, float]:
    """Σ (x − m) and Σ (x − m)² of one channel."""
    first = second = lost_first = lost_second = 0.0
    for k in range(x.shape[0]):
        _ahead(x, k, c)
        a, b = sums(x[k, c], m)
        first, lost_first = carried(first, lost_first, a)
        second, lost_second = carried(second, lost_second, b)
    return first, second


@compiled(inner=True)
def _channel_cotangents(x: Any, dy: Any, c: int, m: Any, d: Any, rstd: Any) -> tuple[float, float]:
    """Σ dy and Σ dy · x̂ of one channel."""
    first = second = lost_first = lost_second = 0.0
    for k in range(x.shape[0]):
        _ahead(x, k, c)
        _ahead(dy, k, c)
        a, b = sums_of_cotangents(x[k, c], dy[k, c], m, d, rstd)
        first, lost_first = carried(first, lost_first, a)
        second, lost_second = carried(second, lost_second, b)
    return first, second


def _channels_forward(
    start: int,
    stop: int,
    x: Any,
    weight: Any,
    bias: Any,
    eps: float,
    center: bool,
    smallest: float,
    largest: float,
    y: Any,
    kept: Any,
    var: Any,
) -> bool:
    x, weight, bias, y, kept, var = bare(x), bare(weight), bare(bias), bare(y), bare(kept), bare(var)
    outer, inner = x.shape[0], x.shape[2]
    n, fine = outer * inner, True
    for c in range(start, stop):
        m = guess(x[0, c]) if center else like(x, 0)
        a, b = _channel_sums(x, c, m)
        d = a / n if center else 0.0
        spread = b / n - d * d
        if not d * d <= 2.0 * spread:
            m = like(x, m + d)
            a, b = _channel_sums(x, c, m)
            d, spread = a / n, max(b / n - (a / n) ** 2, 0.0)
        if not (smallest < spread + eps < largest):
            fine = False
        rest, rstd, var[c] = like(x, d), like(x, 1.0 / math.sqrt(spread + eps)), spread
        kept[0, c], kept[1, c], kept[2, c] = m, rest, rstd
        gain, shift = weight[c] * rstd if weight.size else rstd, bias[c] if bias.size else like(x, 0)
        for k in range(outer):
            _ahead(y, k, c)
            scaled(inner, (x[k, c], m, rest, gain, shift), (y[k, c],))
    return fine


def _channels_scaled(start: int, stop: int, x: Any, weight: Any, bias: Any, kept: Any, y: Any) -> bool:
    """Blocks `start` to before `stop`, in the order of memory."""
    x, weight, bias, kept, y = bare(x), bare(weight), bare(bias), bare(kept), bare(y)
    channels, inner = x.shape[1], x.shape[2]
    for block in range(start, stop):
        k, c = block // channels, block % channels
        gain, shift = weight[c] * kept[2, c] if weight.size else kept[2, c], bias[c] if bias.size else like(x, 0)
        scaled_asking(inner, (x[k, c], kept[0, c], kept[1, c], gain, shift), (y[k, c],))
    return True


def _channels_backward(
    start: int, stop: int, x: Any, dy: Any, weight: Any, kept: Any, center: bool, own: bool, dx: Any, dweight: Any, dbias: Any
) -> bool:
    x, dy, weight, kept, dx, dweight, dbias = bare(x), bare(dy), bare(weight), bare(kept), bare(dx), bare(dweight), bare(dbias)
    outer, inner = x.shape[0], x.shape[2]
    n = outer * inner
    for c in range(start, stop):
        m, d, rstd = kept[0, c], kept[1, c], kept[2, c]
        gain = weight[c] * rstd if weight.size else rstd
        first, second = _channel_cotangents(x, dy, c, m, d, rstd)
        dbias[c], dweight[c] = first, second
        one, two = like(x, first / n if own and center else 0.0), like(x, second / n if own else 0.0)
        for k in range(outer):
            _ahead(dx, k, c)
            _back(inner, (x[k, c], dy[k, c], gain, m, d, rstd, one, two), (dx[k, c],))
    return True


def _given(v: Any, inner: bool) -> tuple[Any, ...]:
    """The types of values, `ends` and `places`. Inputs are declared read-only, so that those which are need no version of their own."""
    if inner:
        return (numba.types.Array(v, 3, "C", readonly=True),)
    return numba.types.Array(v, 2, "C", readonly=True), *(numba.types.Array(numba.int64, 1, "C", readonly=True),) * 2


@functools.cache
def forward(dtype: numpy.dtype[Any], inner: bool) -> Callable[..., bool]:
    """The forward kernel for one type of values: `_channels_forward`, or without an inner axis `_columns_forward`."""
    v, t, wide, at = *kinds(dtype), numba.float64, numba.int64
    parameter = numba.types.Array(t, 1, "C", readonly=True)
    y, kept, var = (v[:, :, ::1], t[:, ::1], wide[::1]) if inner else (v[:, ::1], t[:, :, ::1], wide[:, ::1])
    signature = numba.boolean(at, at, *_given(v, inner), parameter, parameter, wide, numba.boolean, wide, wide, y, kept, var)
    made: Callable[..., bool] = shared(compiled(signatures=signature)(_channels_forward if inner else _columns_forward))
    return made


@functools.cache
def scale(dtype: numpy.dtype[Any], inner: bool) -> Callable[..., bool]:
    """The kernel for given statistics."""
    v, t, at = *kinds(dtype), numba.int64
    parameter = numba.types.Array(t, 1, "C", readonly=True)
    kept, y = (t[:, ::1], v[:, :, ::1]) if inner else (t[:, :, ::1], v[:, ::1])
    signature = numba.boolean(at, at, *_given(v, inner), parameter, parameter, kept, y)
    made: Callable[..., bool] = shared(compiled(signatures=signature)(_channels_scaled if inner else _columns_scaled))
    return made


@functools.cache
def backward(dtype: numpy.dtype[Any], inner: bool) -> Callable[..., bool]:
    """The backward kernel for one type of values."""
    v, t, wide, at = *kinds(dtype), numba.float64, numba.int64
    x, *ends = _given(v, inner)
    parameter, kept = (numba.types.Array(t, ndim, "C", readonly=True) for ndim in (1, 2 if inner else 3))
    dx = v[:, :, ::1] if inner else v[:, ::1]
    signature = numba.boolean(at, at, x, *ends, x, parameter, kept, numba.boolean, numba.boolean, dx, wide[::1], wide[::1])
    made: Callable[..., bool] = shared(compiled(signatures=signature)(_channels_backward if inner else _columns_backward))
    return made
