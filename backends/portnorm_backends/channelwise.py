"""Normalization over all axes but the channels, as batch normalization in training does it; compiled by numba like `rowwise`.

`columns`: the channels are the last axis, (rows, channels). The loops go along the channels and hold sums for each, in groups of rows.
`channels`: (outer, channels, inner), every (outer, channel) a contiguous block. Statistics as in `rowwise`. The gain w of a channel is one
number, so that the cotangent is dx = w · rstd · (dy − Σ dy / n − x̂ · Σ dy x̂ / n).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numba
import numpy

from portnorm_backends.rowwise import compiled, sum_of_differences, sum_of_squares, sums_of_cotangents

_GROUP = 64
"""Rows that are added to one sum before it is added to the others."""


# -- (rows, channels) --------------------------------------------------------------------------------------------------------------------


@compiled()
def _add(total: Any, lost: Any, part: Any) -> None:
    """total += part with what rounding loses carried along (Kahan 1965): there can be many groups."""
    for c in range(total.size):
        term = part[c] - lost[c]
        more = total[c] + term
        lost[c] = (more - total[c]) - term
        total[c] = more


@compiled()
def _column_averages(x: Any, high: Any, low: Any, squared: bool, part: Any, total: Any) -> None:
    """total[c] = Σ z / n, or Σ z² / n, of z = (x − high[c]) − low[c]."""
    rows, channels = x.shape
    lost = numpy.zeros(channels)
    total[:] = 0.0
    for start in range(0, rows, _GROUP):
        part[:] = 0.0
        for k in range(start, min(start + _GROUP, rows)):
            row = x[k]
            if squared:
                for c in range(channels):
                    z = (row[c] - high[c]) - low[c]
                    part[c] += z * z
            else:
                for c in range(channels):
                    part[c] += (row[c] - high[c]) - low[c]
        _add(total, lost, part)
    for c in range(channels):
        total[c] /= rows


def _columns_forward(
    x: Any, weight: Any, bias: Any, eps: float, center: bool, smallest: float, largest: float, y: Any, mean: Any, var: Any, rstd: Any
) -> bool:
    rows, channels = x.shape
    high, low, part = numpy.zeros(channels), numpy.zeros(channels), numpy.zeros(channels)
    if center:
        first = x[0].astype(numpy.float64)
        _column_averages(x, first, low, False, part, high)
        for c in range(channels):
            high[c] += first[c]
        if x.itemsize == 8:
            rest_of_mean = numpy.empty(channels)
            _column_averages(x, high, low, False, part, rest_of_mean)
            low = rest_of_mean
    _column_averages(x, high, low, True, part, var)
    fine = True
    room = numpy.empty((4, channels), x.dtype)
    near, rest, gain, shift = room[0], room[1], room[2], room[3]
    for c in range(channels):
        if not (smallest < var[c] + eps < largest):
            fine = False
        rstd[c] = 1.0 / math.sqrt(var[c] + eps)
        mean[c, 0], mean[c, 1] = high[c], low[c]
        near[c] = high[c]
        rest[c] = high[c] - near[c] + low[c]
        gain[c] = rstd[c] * (weight[c] if weight.size else 1.0)
        shift[c] = bias[c] if bias.size else 0.0
    for k in range(rows):
        row, out = x[k], y[k]
        for c in range(channels):
            out[c] = ((row[c] - near[c]) - rest[c]) * gain[c] + shift[c]
    return fine


def _columns_backward(x: Any, dy: Any, weight: Any, mean: Any, rstd: Any, center: bool, dx: Any, dweight: Any, dbias: Any) -> None:
    rows, channels = x.shape
    room = numpy.empty((6, channels), x.dtype)
    near, rest, factor, gain, a, b = room[0], room[1], room[2], room[3], room[4], room[5]
    first, second, lost = numpy.zeros(channels), numpy.zeros(channels), numpy.zeros((2, channels))
    for c in range(channels):
        near[c], factor[c] = mean[c, 0], rstd[c]
        rest[c] = mean[c, 0] - near[c] + mean[c, 1]
        gain[c] = rstd[c] * (weight[c] if weight.size else 1.0)
        dweight[c] = dbias[c] = 0.0
    for start in range(0, rows, _GROUP):
        first[:] = 0.0
        second[:] = 0.0
        for k in range(start, min(start + _GROUP, rows)):
            row, given = x[k], dy[k]
            for c in range(channels):
                first[c] += given[c]
                second[c] += given[c] * (((row[c] - near[c]) - rest[c]) * factor[c])
        _add(dbias, lost[0], first)
        _add(dweight, lost[1], second)
    for c in range(channels):
        a[c], b[c] = dbias[c] / rows if center else 0.0, dweight[c] / rows
    for k in range(rows):
        row, given, out = x[k], dy[k], dx[k]
        for c in range(channels):
            out[c] = gain[c] * ((given[c] - a[c]) - ((row[c] - near[c]) - rest[c]) * factor[c] * b[c])


# -- (outer, channels, inner) ------------------------------------------------------------------------------------------------------------


def _channels_forward(
    x: Any, weight: Any, bias: Any, eps: float, center: bool, smallest: float, largest: float, y: Any, mean: Any, var: Any, rstd: Any
) -> bool:
    outer, channels, inner = x.shape
    n, fine = outer * inner, True
    for c in range(channels):
        m = d = total = 0.0
        if center:
            first = float(x[0, c, 0])
            for k in range(outer):
                total += sum_of_differences(x[k, c], first)
            m, total = first + total / n, 0.0
            if x.itemsize == 8:
                for k in range(outer):
                    total += sum_of_differences(x[k, c], m)
                d, total = total / n, 0.0
        for k in range(outer):
            total += sum_of_squares(x[k, c], m, d)
        spread = total / n
        if not (smallest < spread + eps < largest):
            fine = False
        mean[c, 0], mean[c, 1], var[c], rstd[c] = m, d, spread, 1.0 / math.sqrt(spread + eps)
        near = x.dtype.type(m)
        rest, gain = x.dtype.type(m - near + d), x.dtype.type(rstd[c] * (weight[c] if weight.size else 1.0))
        shift = bias[c] if bias.size else x.dtype.type(0)
        for k in range(outer):
            block, out = x[k, c], y[k, c]
            for i in range(inner):
                out[i] = ((block[i] - near) - rest) * gain + shift
    return fine


def _channels_backward(x: Any, dy: Any, weight: Any, mean: Any, rstd: Any, center: bool, dx: Any, dweight: Any, dbias: Any) -> None:
    outer, channels, inner = x.shape
    n = outer * inner
    for c in range(channels):
        near, factor = x.dtype.type(mean[c, 0]), x.dtype.type(rstd[c])
        rest, gain = x.dtype.type(mean[c, 0] - near + mean[c, 1]), x.dtype.type(rstd[c] * (weight[c] if weight.size else 1.0))
        first = second = 0.0
        for k in range(outer):
            a, b = sums_of_cotangents(x[k, c], dy[k, c], near, rest, factor)
            first += a
            second += b
        dbias[c], dweight[c] = first, second
        one, two = x.dtype.type(first / n if center else 0.0), x.dtype.type(second / n)
        for k in range(outer):
            block, given, out = x[k, c], dy[k, c], dx[k, c]
            for i in range(inner):
                out[i] = gain * ((given[i] - one) - ((block[i] - near) - rest) * factor * two)


@functools.cache
def forward(dtype: str, inner: bool) -> Callable[..., bool]:
    """The forward kernel for one type of values: `_channels_forward`, or without an inner axis `_columns_forward`."""
    t, wide, ndim = numba.from_dtype(numpy.dtype(dtype)), numba.float64, 3 if inner else 2
    given = numba.types.Array(t, ndim, "C", readonly=True)
    parameter, made = numba.types.Array(t, 1, "C", readonly=True), numba.types.Array(t, ndim, "C")
    statistics = (wide[:, ::1], wide[::1], wide[::1])
    signature = numba.boolean(given, parameter, parameter, wide, numba.boolean, wide, wide, made, *statistics)
    return compiled(signatures=signature)(_channels_forward if inner else _columns_forward)


@functools.cache
def backward(dtype: str, inner: bool) -> Callable[..., None]:
    """The backward kernel for one type of values."""
    t, wide, ndim = numba.from_dtype(numpy.dtype(dtype)), numba.float64, 3 if inner else 2
    given = numba.types.Array(t, ndim, "C", readonly=True)
    parameter, made = numba.types.Array(t, 1, "C", readonly=True), numba.types.Array(t, ndim, "C")
    statistics = (numba.types.Array(wide, 2, "C", readonly=True), numba.types.Array(wide, 1, "C", readonly=True))
    signature = numba.void(given, given, parameter, *statistics, numba.boolean, made, wide[::1], wide[::1])
    return compiled(signatures=signature)(_channels_backward if inner else _columns_backward)
