"""The normalizers inside the time loop of LSTM, GRU and RNN, forward and backward, and what their loops share; compiled by numba.

The equations are those of `portnorm/cells`; here every row of the batch goes through a whole step before the next one does, in a few loops
over its values (`vectors`), so that what one loop leaves is still in the nearest cache when the next one reads it. The functions of the
cells (`lstm`, `gru`, `rnn`) go from step `start` to before `stop` (backward: from `start` − 1 down to `stop`), with the hidden weights as
`products.pack` lays them out, and leave their product in `a` (`back`), for the sequences `first` to before `last`, which are all where
there are statistics over the batch. Arrays of all steps have the time first; one that keeps fewer steps is used in turns.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numba
import numpy
from numba import types

from portnorm_backends.cpu.compiling import address_of, call_at, compiled, copy, fill
from portnorm_backends.cpu.layout import GIVEN, NONE, OWN, ROWS, SHIFT, idle
from portnorm_backends.cpu.products import product
from portnorm_backends.cpu.rowwise import statistics
from portnorm_backends.cpu.sums import GROUP, carry
from portnorm_backends.cpu.vectors import Vector, elementwise, fused, prefetch, summed

One = tuple[Vector]
Two = tuple[Vector, Vector]


@compiled(inner=True)
def runs(lengths: Any, b: int, t: int) -> bool:
    """Whether a sequence has a step t; all have where there are no lengths."""
    return bool(lengths.size == 0 or t < lengths[b])


@elementwise
def _add_moments(z: Vector, m: Vector, first: Vector, second: Vector) -> Two:
    """Σ (z − m) and Σ (z − m)² so far."""
    d = z - m
    return first + d, fused(d, d, second)


def _over_batch(slot: Any, t: int, z: Any, lengths: Any, room: Any) -> bool:
    """m, d and 1 / σ of each feature into `room` (9, features), the latter two also into what is kept, of the rows that have a step t.

    False where a variance left its range.
    """
    m, d, rstd, first, second = room[0], room[1], room[2], room[3], room[4]
    before, lost, squares_before, squares_lost = room[5], room[6], room[7], room[8]
    fine, n, count = True, m.size, 0
    if slot.mode == GIVEN:
        for j in range(n):
            m[j], d[j], rstd[j] = slot.mean[t, j], 0, 1.0 / math.sqrt(slot.var[t, j] + slot.eps)
        return fine
    for b in range(z.shape[0]):
        if runs(lengths, b, t):
            if count == 0:
                copy(z[b], m)
            count += 1
    if count == 0:
        fill(m, 0)
    number = z.dtype.type(max(count, 1))
    for turn in range(2):  # from the first value to the mean, and again from there
        rows = 0
        for k in range(3, 9):
            fill(room[k], 0)
        for b in range(z.shape[0]):
            if runs(lengths, b, t):
                _add_moments(n, (z[b], m, first, second), (first, second))
                rows += 1
                if rows % GROUP == 0:
                    carry(before, lost, first)
                    carry(squares_before, squares_lost, second)
        for j in range(n):
            first[j], second[j] = before[j] + first[j], squares_before[j] + second[j]
            d[j] = first[j] / number if slot.center else z.dtype.type(0)
            if turn == 0:
                m[j] = m[j] + d[j] if slot.center else z.dtype.type(0)
    for j in range(n):
        var = second[j] / number - d[j] * d[j]
        if not (slot.smallest < var + slot.eps < slot.largest):
            fine = False
        rstd[j] = 1.0 / math.sqrt(var + slot.eps)
        slot.mean[t, j], slot.var[t, j] = m[j] + d[j], var
    return fine


@functools.cache
def over_batch(dtype: numpy.dtype[Any]) -> int:
    """Where the compiled `_over_batch` begins for one type of values; only loops with statistics over the batch wait for it."""
    t = numba.from_dtype(dtype)
    matrix, slot = t[:, ::1], numba.typeof(idle(dtype, 1))
    kind = types.boolean(slot, types.int64, matrix, types.int64[::1], matrix)
    return address_of(compiled(signatures=kind)(_over_batch))


@elementwise
def _scaled(z: Vector, m: Vector, d: Vector, rstd: Vector, weight: Vector, bias: Vector, plus: Vector) -> Two:
    """(x̂, y = x̂ · weight + bias + plus) with statistics of the row or of each feature."""
    xhat = ((z - m) - d) * rstd
    return xhat, fused(xhat, weight, bias) + plus


@compiled(inner=True)
def normalized(slot: Any, t: int, b: int, z: Any, plus: Any, room: Any, y: Any) -> bool:
    """y = N(z) + plus of one row; `room` has the statistics where they are of features.

    `y` (slices, …) gets the row in equal slices, each from the beginning of a row of its own.
    """
    size, fine = z.size // y.shape[0], True
    k = t % slot.xhat.shape[0]
    xhat = slot.xhat[k, b]
    if slot.mode == ROWS:
        rstd = slot.rstd[k, b]
        for p in range(slot.ends.size - 1):
            start, stop = slot.ends[p], slot.ends[p + 1]
            m, d, var = statistics(z[start:stop], slot.center)
            if not (slot.smallest < var + slot.eps < slot.largest):
                fine = False
            rstd[p] = 1.0 / math.sqrt(var + slot.eps)
            for g in range(start // size, -(-stop // size)):
                i, j = max(g * size, start), min((g + 1) * size, stop)
                into = y[g, i - g * size : j - g * size]
                _scaled(j - i, (z[i:j], m, d, rstd[p], slot.weight[i:j], slot.bias[i:j], plus[i:j]), (xhat[i:j], into))
    else:
        for g in range(y.shape[0]):
            i, j = g * size, (g + 1) * size
            of_feature = (room[0, i:j], room[1, i:j], room[2, i:j], slot.weight[i:j], slot.bias[i:j])
            _scaled(size, (z[i:j], *of_feature, plus[i:j]), (xhat[i:j], y[g]))
    return fine


@compiled(inner=True)
def prepared(slot: Any, t: int, z: Any, lengths: Any, address: int, room: Any) -> bool:
    """What a slot has to know of the whole batch before its rows are normalized, which `over_batch` tells."""
    if slot.mode <= ROWS:
        return True
    fine: bool = call_at(address, (slot, t, z, lengths, room), True)
    copy(room[2], slot.rstd[t % slot.rstd.shape[0], 0])
    return fine


@summed(2)
def _sums(dy: Vector, weight: Vector, xhat: Vector) -> Two:
    """Σ g and Σ g · x̂ of g = dy · weight."""
    g = dy * weight
    return g, g * xhat


@elementwise
def _add_shares(dy: Vector, xhat: Vector, with_xhat: Vector, alone: Vector) -> Two:
    return fused(dy, xhat, with_xhat), dy + alone


@elementwise
def add(a: Vector, b: Vector) -> One:
    return (a + b,)


@elementwise
def _row_cotangent(dy: Vector, weight: Vector, xhat: Vector, a: Vector, b: Vector, rstd: Vector) -> One:
    return (rstd * ((dy * weight - a) - xhat * b),)


@elementwise
def _feature_cotangent(dy: Vector, weight: Vector, xhat: Vector, a: Vector, b: Vector, rstd: Vector) -> One:
    return (rstd * weight * ((dy - a) - xhat * b),)


@compiled(inner=True)
def collected(slot: Any, shares: Any, t: int, b: int, dy: Any) -> None:
    """Add the shares of one row."""
    weight, bias = shares.weight[0], shares.bias[0]
    if slot.mode == SHIFT:
        add(dy.size, (dy, bias), (bias,))
    elif slot.mode != NONE:
        _add_shares(dy.size, (dy, slot.xhat[t % slot.xhat.shape[0], b], weight, bias), (weight, bias))
    shares.rows[0] += 1
    if shares.rows[0] == GROUP:
        _gathered(slot, shares)


@compiled(inner=True)
def _gathered(slot: Any, shares: Any) -> None:
    """Add the last rows to those of the step before them where its sum is wanted, else to all."""
    shares.rows[0] = 0
    if slot.mode == OWN:
        carry(shares.weight[1], shares.weight[2], shares.weight[0])
        carry(shares.bias[1], shares.bias[2], shares.bias[0])
    elif slot.mode != NONE:
        carry(shares.dweight[0], shares.dweight[1], shares.weight[0])
        carry(shares.dbias[0], shares.dbias[1], shares.bias[0])


@compiled(inner=True)
def counted(slot: Any, shares: Any, t: int, lengths: Any, batch: int, room: Any) -> None:
    """The means of dy and dy · x̂ of each feature into `room`, once all rows have given their shares."""
    if slot.mode <= ROWS:
        return
    if slot.mode == GIVEN:
        fill(room[0], 0)
        fill(room[1], 0)
        return
    count = 0
    for b in range(batch):
        count += runs(lengths, b, t)
    _gathered(slot, shares)
    scale = room.dtype.type(1.0 / max(count, 1))
    for j in range(room.shape[1]):
        room[0, j] = shares.bias[1, j] * scale if slot.center else room.dtype.type(0)
        room[1, j] = shares.weight[1, j] * scale


@compiled(inner=True)
def denormalized(slot: Any, t: int, b: int, dy: Any, room: Any, dz: Any) -> None:
    """The cotangent of what a row was normalized from; `dz` is not `dy`."""
    k = t % slot.xhat.shape[0]
    xhat = slot.xhat[k, b]
    if slot.mode == ROWS:
        for p in range(slot.ends.size - 1):
            i, j = slot.ends[p], slot.ends[p + 1]
            n, given = j - i, (dy[i:j], slot.weight[i:j], xhat[i:j])
            first, second = _sums(n, given)
            first = first / n if slot.center else 0.0
            _row_cotangent(n, (*given, first, second / n, slot.rstd[k, b, p]), (dz[i:j],))
    else:
        _feature_cotangent(dz.size, (dy, slot.weight, xhat, room[0], room[1], slot.rstd[k, 0]), (dz,))


@compiled(inner=True)
def settled(slot: Any, shares: Any) -> None:
    """Add the sum of a step, which has been wanted, to what all steps have."""
    if slot.mode == OWN:
        carry(shares.dweight[0], shares.dweight[1], shares.weight[1])
        carry(shares.dbias[0], shares.dbias[1], shares.bias[1])
        fill(shares.weight[2], 0)
        fill(shares.bias[2], 0)


# -- what the loops of the cells share -------------------------------------------------------------------------------------------------


@compiled(inner=True)
def ahead(x: Any, t: int, b: int, first: int, last: int, way: int) -> None:
    """Ask for the row that is read after row b of step t, where the steps go up (`way` 1) or down (−1)."""
    if b + 1 < last:
        prefetch(x[t, b + 1])
    elif 0 <= t + way < x.shape[0]:
        prefetch(x[t + way, first])


@compiled(inner=True)
def term(terms: Any, t: int, b: int) -> Any:
    """The input term of row b of step t."""
    return terms.u[t - terms.step, b - terms.sequence]


@compiled(inner=True)
def stays(t: int, b: int, h: Any, y: Any) -> None:
    """A sequence that has no step t."""
    copy(h[t % h.shape[0], b], h[(t + 1) % h.shape[0], b])
    if y.size:
        fill(y[t, b], 0)


@compiled(inner=True)
def gives(t: int, b: int, h: Any, y: Any) -> None:
    """A sequence that has one, h after it into `y`, where that has room."""
    if y.size:
        copy(h[(t + 1) % h.shape[0], b], y[t, b])


@compiled(inner=True)
def arrives(t: int, b: int, back: Any, dy: Any, lengths: Any, dh: Any) -> bool:
    """Add to dh what comes from the next step and from outside; whether the sequence has a step t."""
    add(dh.shape[1], (back[b], dh[b]), (dh[b],))
    here = runs(lengths, b, t)
    if here and dy.size:
        add(dh.shape[1], (dy[t, b], dh[b]), (dh[b],))
    return here


@compiled(inner=True)
def sum_back(first: int, last: int, t: int, total: Any, shares: Any, lengths: Any, dx: Any, dhidden: Any, room: Any, row: Any) -> None:
    """Through the slot of the sum, in `dx`; the cotangent of both terms, of which `dhidden` gets its own where it has room."""
    if total.mode == NONE:
        return
    for b in range(first, last):
        if runs(lengths, b, t):
            collected(total, shares, t, b, dx[t, b])
            denormalized(total, t, b, dx[t, b], room, row)
            copy(row, dx[t, b])
            if dhidden.size:
                copy(row, dhidden[t, b])
    settled(total, shares)


@compiled(inner=True)
def hidden_back(
    first: int,
    last: int,
    t: int,
    hidden: Any,
    shares: Any,
    lengths: Any,
    dx: Any,
    dhidden: Any,
    room: Any,
    row: Any,
    packed: Any,
    back: Any,
    how: Any,
) -> None:
    """Through the slot of the hidden term, in `dhidden`, or where that is (0, 0, 0) and the slot does not normalize from `dx`; and the
    product with the weights."""
    over = dhidden[t] if dhidden.size else dx[t]
    if hidden.mode != NONE:
        for b in range(first, last):
            if runs(lengths, b, t):
                collected(hidden, shares, t, b, over[b])
        if hidden.mode != SHIFT:
            counted(hidden, shares, t, lengths, over.shape[0], room)
            for b in range(first, last):
                if runs(lengths, b, t):
                    denormalized(hidden, t, b, over[b], room, row)
                    copy(row, over[b])
        settled(hidden, shares)
    product(over[first:last], packed, back[first:last], how)
