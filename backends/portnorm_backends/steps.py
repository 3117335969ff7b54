"""Steps of LSTM, GRU and RNN with their normalizers, forward and backward, compiled by numba.

The equations are those of `portnorm/cells`; here every row of the batch goes through a whole step before the next one does, in a few loops
over its values (`vectors`), so that what one loop leaves is still in the nearest cache when the next one reads it. Each function goes from
step `start` to before `stop` (backward: from `start` − 1 down to `stop`), with the hidden weights as `products.pack` lays them out, and
leaves their product in `a` (`back`), for the sequences `first` to before `last`, which are all where there are statistics over the batch.
Arrays of all steps have the time first; one that keeps fewer steps is used in turns.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy

from portnorm_backends.compiling import bare, compiled, copy, fill
from portnorm_backends.pointwise import sigmoid, tanh
from portnorm_backends.products import product
from portnorm_backends.rowwise import statistics
from portnorm_backends.vectors import Vector, elementwise, fused, summed

One = tuple[Vector]
Two = tuple[Vector, Vector]
Three = tuple[Vector, Vector, Vector]
Four = tuple[Vector, Vector, Vector, Vector]
Five = tuple[Vector, Vector, Vector, Vector, Vector]

NONE, ROWS, OWN, GIVEN = range(4)
"""What a slot does: nothing, statistics of each row, of each feature over the batch, given statistics of each feature."""


class SlotArrays(NamedTuple):
    """A normalizer inside the loop: y = x̂ · weight + bias."""

    mode: int
    ends: Any  # (parts + 1,): where the parts of a row with statistics of their own begin and end
    weight: Any  # (features,)
    bias: Any  # (features,)
    xhat: Any  # (steps, batch, features)
    rstd: Any  # (steps, batch, parts), or of features (steps, 1, features)
    mean: Any  # (time, features), given or the batch's own; else (0, 0)
    var: Any
    eps: float
    center: bool
    smallest: float  # bounds of σ² + ε
    largest: float


class Shares(NamedTuple):
    """Cotangents of a slot's gain and shift: sums over all steps, and what one step adds."""

    dweight: Any  # (features,) float64
    dbias: Any
    weight: Any  # (features,) in the type of the values, 0 between steps
    bias: Any


class Rooms(NamedTuple):
    """What a step writes and nobody reads after it."""

    sums: Any  # (5, features): statistics of the hidden term over the batch
    narrow: Any  # (5, hidden): of the cell state
    z: Any  # (gates, hidden)
    row: Any  # (gates, hidden)
    states: Any  # (batch, hidden)
    small: Any  # (hidden,)
    zeros: Any  # (features,)


def rooms(gates: int, size: int, batch: int, dtype: Any) -> Rooms:
    """Zeroed room for the steps of one loop."""
    shapes = (
        (5, gates * size),
        (5, size),
        *((gates, size),) * 2,
        (batch, size),
        size,
        gates * size,
    )
    return Rooms(*(numpy.zeros(shape, dtype=dtype) for shape in shapes))


# -- slots -----------------------------------------------------------------------------------------------------------------------------


@compiled()
def _runs(lengths: Any, b: int, t: int) -> bool:
    """Whether a sequence has a step t; all have where there are no lengths."""
    return bool(lengths.size == 0 or t < lengths[b])


@elementwise
def _add_moments(z: Vector, m: Vector, first: Vector, second: Vector) -> Two:
    """Σ (z − m) and Σ (z − m)² so far."""
    d = z - m
    return first + d, fused(d, d, second)


@compiled()
def _over_batch(slot: Any, t: int, z: Any, lengths: Any, room: Any) -> bool:
    """m, d and 1 / σ of each feature into `room` (5, features), the latter two also into what is kept, of the rows that have a step t."""
    m, d, rstd, first, second = room[0], room[1], room[2], room[3], room[4]
    fine, n, count = True, m.size, 0
    if slot.mode == GIVEN:
        for j in range(n):
            m[j], d[j], rstd[j] = slot.mean[t, j], 0, 1.0 / math.sqrt(slot.var[t, j] + slot.eps)
        return fine
    for b in range(z.shape[0]):
        if _runs(lengths, b, t):
            if count == 0:
                copy(z[b], m)
            count += 1
    if count == 0:
        fill(m, 0)
    counted = z.dtype.type(max(count, 1))
    for turn in range(2):  # from the first value to the mean, and again from there
        fill(first, 0)
        fill(second, 0)
        for b in range(z.shape[0]):
            if _runs(lengths, b, t):
                _add_moments(n, (z[b], m, first, second), (first, second))
        for j in range(n):
            d[j] = first[j] / counted if slot.center else z.dtype.type(0)
            if turn == 0:
                m[j] = m[j] + d[j] if slot.center else z.dtype.type(0)
    for j in range(n):
        var = second[j] / counted - d[j] * d[j]
        if not (slot.smallest < var + slot.eps < slot.largest):
            fine = False
        rstd[j] = 1.0 / math.sqrt(var + slot.eps)
        slot.mean[t, j], slot.var[t, j] = m[j] + d[j], var
    return fine


@elementwise
def _scaled(z: Vector, m: Vector, d: Vector, rstd: Vector, weight: Vector, bias: Vector, plus: Vector) -> Two:
    """(x̂, y = x̂ · weight + bias + plus) with statistics of the row or of each feature."""
    xhat = ((z - m) - d) * rstd
    return xhat, fused(xhat, weight, bias) + plus


@elementwise
def _sum(z: Vector, bias: Vector, plus: Vector) -> One:
    return (z + bias + plus,)


@compiled()
def _normalized(slot: Any, t: int, b: int, z: Any, plus: Any, room: Any, y: Any) -> bool:
    """y = N(z) + plus of one row; `room` has the statistics where they are of features.

    `y` (slices, …) gets the row in equal slices, each from the beginning of a row of its own.
    """
    size, fine = z.size // y.shape[0], True
    if slot.mode == NONE:
        for g in range(y.shape[0]):
            i, j = g * size, (g + 1) * size
            _sum(size, (z[i:j], slot.bias[i:j], plus[i:j]), (y[g],))
        return fine
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


@compiled()
def _prepared(slot: Any, t: int, z: Any, lengths: Any, room: Any) -> bool:
    """What a slot has to know of the whole batch before its rows are normalized."""
    if slot.mode == NONE or slot.mode == ROWS:
        return True
    fine = _over_batch(slot, t, z, lengths, room)
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
def _add(dy: Vector, y: Vector) -> One:
    return (dy + y,)


@elementwise
def _row_cotangent(dy: Vector, weight: Vector, xhat: Vector, a: Vector, b: Vector, rstd: Vector) -> One:
    return (rstd * ((dy * weight - a) - xhat * b),)


@elementwise
def _feature_cotangent(dy: Vector, weight: Vector, xhat: Vector, a: Vector, b: Vector, rstd: Vector) -> One:
    return (rstd * weight * ((dy - a) - xhat * b),)


@compiled()
def _collected(slot: Any, shares: Any, t: int, b: int, dy: Any) -> None:
    """Add the shares of one row."""
    if slot.mode == NONE:
        _add(dy.size, (dy, shares.bias), (shares.bias,))
    else:
        _add_shares(dy.size, (dy, slot.xhat[t, b], shares.weight, shares.bias), (shares.weight, shares.bias))


@compiled()
def _counted(slot: Any, shares: Any, t: int, lengths: Any, batch: int, room: Any) -> None:
    """The means of dy and dy · x̂ of each feature into `room`, once all rows have given their shares."""
    if slot.mode == NONE or slot.mode == ROWS:
        return
    count = 0
    for b in range(batch):
        count += _runs(lengths, b, t)
    scale = room.dtype.type(1.0 / max(count, 1) if slot.mode == OWN else 0.0)
    for j in range(room.shape[1]):
        room[0, j] = shares.bias[j] * scale if slot.center else room.dtype.type(0)
        room[1, j] = shares.weight[j] * scale


@compiled()
def _denormalized(slot: Any, t: int, b: int, dy: Any, room: Any, dz: Any) -> None:
    """The cotangent of what a row was normalized from; `dz` is not `dy`. Not for a slot that does nothing."""
    xhat = slot.xhat[t, b]
    if slot.mode == ROWS:
        for p in range(slot.ends.size - 1):
            i, j = slot.ends[p], slot.ends[p + 1]
            n, given = j - i, (dy[i:j], slot.weight[i:j], xhat[i:j])
            first, second = _sums(n, given)
            first = first / n if slot.center else 0.0
            _row_cotangent(n, (*given, first, second / n, slot.rstd[t, b, p]), (dz[i:j],))
    else:
        _feature_cotangent(dz.size, (dy, slot.weight, xhat, room[0], room[1], slot.rstd[t, 0]), (dz,))


@compiled()
def _settled(shares: Any) -> None:
    """Add what a step has given to what all steps have."""
    for j in range(shares.weight.size):
        shares.dweight[j] += shares.weight[j]
        shares.dbias[j] += shares.bias[j]
        shares.weight[j] = 0
        shares.bias[j] = 0


# -- LSTM ------------------------------------------------------------------------------------------------------------------------------


@elementwise
def _opened(i: Vector, f: Vector, g: Vector, o: Vector, before: Vector) -> Five:
    """The gates and c of a step."""
    i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
    return i, f, g, o, fused(f, before, i * g)


@elementwise
def _emitted(c: Vector, o: Vector) -> Two:
    """(tanh c, h)"""
    inner = tanh(c)
    return inner, o * inner


@compiled()
def lstm_forward(
    start: int,
    stop: int,
    first: int,
    last: int,
    packed: Any,
    room: Any,
    u: Any,
    lengths: Any,
    a: Any,
    h: Any,
    y: Any,
    c: Any,
    gates: Any,
    tanh_c: Any,
    hidden: Any,
    total: Any,
    cell: Any,
    copies: bool,
) -> bool:
    """`h` and `c` (steps + 1, batch, hidden) begin with the states; `copies`: the normalized c goes into tanh only. `y` may be (0, 0, 0).

    False where a variance left its range: then nothing of the result is to be used.
    """
    packed, u, lengths, a, h = bare(packed), bare(u), bare(lengths), bare(a), bare(h)
    y, c, gates, tanh_c = bare(y), bare(c), bare(gates), bare(tanh_c)
    hidden, total, cell = bare(hidden), bare(total), bare(cell)
    room = bare(room)
    size = h.shape[2]
    z, row, narrow, raw, zeros, fine = room.z, room.row, room.narrow, room.states, room.zeros, True
    flat = row.reshape(4 * size)
    for t in range(start, stop):
        before, after, k = t % h.shape[0], (t + 1) % h.shape[0], t % gates.shape[0]
        c_before, c_after = c[t % c.shape[0]], c[(t + 1) % c.shape[0]]
        product(h[before, first:last], packed, a[first:last])
        fine &= _prepared(hidden, t, a, lengths, room.sums)
        for b in range(first, last):
            if not _runs(lengths, b, t):
                continue
            fine &= _normalized(hidden, t, b, a[b], u[t, b], room.sums, z if total.mode == NONE else row)
            if total.mode != NONE:
                fine &= _normalized(total, t, b, flat, zeros, room.sums, z)
            gate, into = gates[k, b], raw[b] if cell.mode != NONE and not copies else c_after[b]
            i, f, g, o = gate[:size], gate[size : 2 * size], gate[2 * size : 3 * size], gate[3 * size :]
            _opened(size, (z[0], z[1], z[2], z[3], c_before[b]), (i, f, g, o, into))
        if cell.mode != NONE:
            fine &= _prepared(cell, t, c_after if copies else raw, lengths, narrow)
        for b in range(first, last):
            if not _runs(lengths, b, t):
                copy(h[before, b], h[after, b])
                copy(c_before[b], c_after[b])
                if y.size:
                    fill(y[t, b], 0)
                continue
            if cell.mode != NONE:
                inside, into = (c_after[b], z[:1]) if copies else (raw[b], c_after[b : b + 1])
                fine &= _normalized(cell, t, b, inside, zeros[:size], narrow, into)
            inner = z[0] if cell.mode != NONE and copies else c_after[b]
            _emitted(size, (inner, gates[k, b, 3 * size :]), (tanh_c[k, b], h[after, b]))
            if y.size:
                copy(h[after, b], y[t, b])
    return fine


@elementwise
def _out_of_cell(dh: Vector, o: Vector, inner: Vector) -> Two:
    """Cotangents of o before its sigmoid and of c before its tanh."""
    return dh * inner * o * (1.0 - o), dh * o * (1.0 - inner * inner)


@elementwise
def _into_gates(dc: Vector, i: Vector, f: Vector, g: Vector, before: Vector) -> Four:
    """Cotangents of i, f and g before their nonlinearities, and of c before the step."""
    return dc * g * i * (1.0 - i), dc * before * f * (1.0 - f), dc * i * (1.0 - g * g), dc * f


@compiled()
def _back_to_hidden(
    first: int,
    last: int,
    hidden: Any,
    hidden_shares: Any,
    total: Any,
    total_shares: Any,
    t: int,
    lengths: Any,
    dx: Any,
    dhidden: Any,
    room: Any,
    row: Any,
) -> None:
    """Through the slots of the sum and of the hidden term, from the cotangents of the sum's result in `dx` and `dhidden`.

    `dx` (batch, features) becomes the cotangent of the input term; `dhidden`, where it is another array, that of the hidden term.
    """
    if total.mode != NONE:
        for b in range(first, last):
            if _runs(lengths, b, t):
                _collected(total, total_shares, t, b, dx[b])
                _denormalized(total, t, b, dx[b], room, row)
                copy(row, dx[b])
                if dhidden.size:
                    copy(row, dhidden[b])
        _settled(total_shares)
    for b in range(first, last):
        if _runs(lengths, b, t):
            _collected(hidden, hidden_shares, t, b, dhidden[b] if dhidden.size else dx[b])
    if hidden.mode != NONE:
        _counted(hidden, hidden_shares, t, lengths, dx.shape[0], room)
        for b in range(first, last):
            if _runs(lengths, b, t):
                _denormalized(hidden, t, b, dhidden[b], room, row)
                copy(row, dhidden[b])
    _settled(hidden_shares)


@compiled()
def lstm_backward(
    start: int,
    stop: int,
    first: int,
    last: int,
    packed: Any,
    room: Any,
    dy: Any,
    lengths: Any,
    back: Any,
    dh: Any,
    dc: Any,
    c: Any,
    gates: Any,
    tanh_c: Any,
    hidden: Any,
    total: Any,
    cell: Any,
    hidden_shares: Any,
    total_shares: Any,
    cell_shares: Any,
    dx: Any,
    dhidden: Any,
    copies: bool,
) -> None:
    """`dh` and `dc` (batch, hidden) are the cotangents of the states, before and after; `back` what the hidden term adds to the former.

    `dhidden` is (0, 0, 0) where the cotangent of the hidden term is that of the input term. `dy` may be (0, 0, 0).
    """
    packed, dy, lengths, back, dh = bare(packed), bare(dy), bare(lengths), bare(back), bare(dh)
    dc, c, gates, tanh_c, dx, dhidden = bare(dc), bare(c), bare(gates), bare(tanh_c), bare(dx), bare(dhidden)
    hidden, total, cell = bare(hidden), bare(total), bare(cell)
    hidden_shares, total_shares, cell_shares = bare(hidden_shares), bare(total_shares), bare(cell_shares)
    room = bare(room)
    batch, size = dh.shape
    sums, narrow, row, inside, small = room.sums, room.narrow, room.row.reshape(4 * size), room.states, room.small
    for t in range(start - 1, stop - 1, -1):
        for b in range(first, last):
            _add(size, (back[b], dh[b]), (dh[b],))
            if not _runs(lengths, b, t):
                continue
            if dy.size:
                _add(size, (dy[t, b], dh[b]), (dh[b],))
            _out_of_cell(size, (dh[b], gates[t, b, 3 * size :], tanh_c[t, b]), (dx[t, b, 3 * size :], inside[b]))
            fill(dh[b], 0)
            if cell.mode == NONE or not copies:
                _add(size, (inside[b], dc[b]), (dc[b],))
            if cell.mode != NONE:
                _collected(cell, cell_shares, t, b, inside[b] if copies else dc[b])
        if cell.mode != NONE:
            _counted(cell, cell_shares, t, lengths, batch, narrow)
            for b in range(first, last):
                if not _runs(lengths, b, t):
                    continue
                _denormalized(cell, t, b, inside[b] if copies else dc[b], narrow, small)
                if not copies:
                    fill(dc[b], 0)
                _add(size, (small, dc[b]), (dc[b],))
            _settled(cell_shares)
        for b in range(first, last):
            d, gate = dx[t, b], gates[t, b]
            if _runs(lengths, b, t):
                i, f, g = gate[:size], gate[size : 2 * size], gate[2 * size : 3 * size]
                _into_gates(size, (dc[b], i, f, g, c[t, b]), (d[:size], d[size : 2 * size], d[2 * size : 3 * size], dc[b]))
            else:
                fill(d, 0)
            if dhidden.size:
                copy(d, dhidden[t, b])
        over = dhidden[t] if dhidden.size else dhidden[:0].reshape((0, 4 * size))
        _back_to_hidden(first, last, hidden, hidden_shares, total, total_shares, t, lengths, dx[t], over, sums, row)
        source = dhidden[t] if dhidden.size else dx[t]
        product(source[first:last], packed, back[first:last])


# -- GRU -------------------------------------------------------------------------------------------------------------------------------


@elementwise
def _gru_step(u_r: Vector, u_z: Vector, u_n: Vector, r: Vector, z: Vector, reset: Vector, before: Vector) -> Five:
    """(r, z, n, what r is multiplied with, h) of the input and the hidden terms."""
    r, z = sigmoid(u_r + r), sigmoid(u_z + z)
    n = tanh(fused(r, reset, u_n))
    return r, z, n, reset, fused(z, before - n, n)


@compiled()
def gru_forward(
    start: int,
    stop: int,
    first: int,
    last: int,
    packed: Any,
    room: Any,
    u: Any,
    lengths: Any,
    a: Any,
    h: Any,
    y: Any,
    gates: Any,
    reset: Any,
    hidden: Any,
) -> bool:
    """As `lstm_forward`; `reset` (steps, batch, hidden) keeps what r is multiplied with."""
    packed, u, lengths, a, h = bare(packed), bare(u), bare(lengths), bare(a), bare(h)
    y, gates, reset = bare(y), bare(gates), bare(reset)
    hidden = bare(hidden)
    room = bare(room)
    size = h.shape[2]
    term, zeros, fine = room.row, room.zeros, True
    for t in range(start, stop):
        before, after, k = t % h.shape[0], (t + 1) % h.shape[0], t % gates.shape[0]
        product(h[before, first:last], packed, a[first:last])
        fine &= _prepared(hidden, t, a, lengths, room.sums)
        for b in range(first, last):
            if not _runs(lengths, b, t):
                copy(h[before, b], h[after, b])
                if y.size:
                    fill(y[t, b], 0)
                continue
            fine &= _normalized(hidden, t, b, a[b], zeros, room.sums, term)
            part, gate, two = u[t, b], gates[k, b], 2 * size
            hidden_terms = (term[0], term[1], term[2], h[before, b])
            made = (gate[:size], gate[size:two], gate[two:], reset[k, b], h[after, b])
            _gru_step(size, (part[:size], part[size:two], part[two:], *hidden_terms), made)
            if y.size:
                copy(h[after, b], y[t, b])
    return fine


@elementwise
def _gru_cotangents(dh: Vector, r: Vector, z: Vector, n: Vector, reset: Vector, before: Vector) -> Five:
    """Cotangents of r, z and n before their nonlinearities, of what r is multiplied with, and of h before the step."""
    dn = dh * (1.0 - z) * (1.0 - n * n)
    return dn * reset * r * (1.0 - r), dh * (before - n) * z * (1.0 - z), dn, dn * r, dh * z


@compiled()
def gru_backward(
    start: int,
    stop: int,
    first: int,
    last: int,
    packed: Any,
    room: Any,
    dy: Any,
    lengths: Any,
    back: Any,
    dh: Any,
    h: Any,
    gates: Any,
    reset: Any,
    hidden: Any,
    shares: Any,
    dx: Any,
    dhidden: Any,
) -> None:
    """As `lstm_backward`."""
    packed, dy, lengths, back, dh = bare(packed), bare(dy), bare(lengths), bare(back), bare(dh)
    h, gates, reset, dx, dhidden = bare(h), bare(gates), bare(reset), bare(dx), bare(dhidden)
    hidden = bare(hidden)
    shares = bare(shares)
    room = bare(room)
    batch, size = dh.shape
    sums, row, two = room.sums, room.row.reshape(3 * size), 2 * size
    for t in range(start - 1, stop - 1, -1):
        for b in range(first, last):
            d, over, gate = dx[t, b], dhidden[t, b], gates[t, b]
            _add(size, (back[b], dh[b]), (dh[b],))
            if not _runs(lengths, b, t):
                fill(d, 0)
                fill(over, 0)
                continue
            if dy.size:
                _add(size, (dy[t, b], dh[b]), (dh[b],))
            found = (d[:size], d[size:two], d[two:], over[two:], dh[b])
            _gru_cotangents(size, (dh[b], gate[:size], gate[size:two], gate[two:], reset[t, b], h[t, b]), found)
            copy(d[:two], over[:two])
            _collected(hidden, shares, t, b, over)
        if hidden.mode != NONE:
            _counted(hidden, shares, t, lengths, batch, sums)
            for b in range(first, last):
                if _runs(lengths, b, t):
                    _denormalized(hidden, t, b, dhidden[t, b], sums, row)
                    copy(row, dhidden[t, b])
        _settled(shares)
        source = dhidden[t]
        product(source[first:last], packed, back[first:last])


# -- RNN -------------------------------------------------------------------------------------------------------------------------------


@elementwise
def _tanh(z: Vector) -> One:
    return (tanh(z),)


@elementwise
def _through_tanh(dh: Vector, y: Vector) -> One:
    return (dh * (1.0 - y * y),)


@compiled()
def rnn_forward(
    start: int,
    stop: int,
    first: int,
    last: int,
    packed: Any,
    room: Any,
    u: Any,
    lengths: Any,
    a: Any,
    h: Any,
    y: Any,
    hidden: Any,
    total: Any,
) -> bool:
    """As `lstm_forward`."""
    packed, u, lengths, a, h = bare(packed), bare(u), bare(lengths), bare(a), bare(h)
    y = bare(y)
    hidden, total = bare(hidden), bare(total)
    room = bare(room)
    size = h.shape[2]
    z, row, zeros, fine = room.z, room.row, room.zeros, True
    flat = row.reshape(size)
    for t in range(start, stop):
        before, after = t % h.shape[0], (t + 1) % h.shape[0]
        product(h[before, first:last], packed, a[first:last])
        fine &= _prepared(hidden, t, a, lengths, room.sums)
        for b in range(first, last):
            if not _runs(lengths, b, t):
                copy(h[before, b], h[after, b])
                if y.size:
                    fill(y[t, b], 0)
                continue
            fine &= _normalized(hidden, t, b, a[b], u[t, b], room.sums, z if total.mode == NONE else row)
            if total.mode != NONE:
                fine &= _normalized(total, t, b, flat, zeros, room.sums, z)
            _tanh(size, (z[0],), (h[after, b],))
            if y.size:
                copy(h[after, b], y[t, b])
    return fine


@compiled()
def rnn_backward(
    start: int,
    stop: int,
    first: int,
    last: int,
    packed: Any,
    room: Any,
    dy: Any,
    lengths: Any,
    back: Any,
    dh: Any,
    h: Any,
    hidden: Any,
    total: Any,
    hidden_shares: Any,
    total_shares: Any,
    dx: Any,
    dhidden: Any,
) -> None:
    """As `lstm_backward`; `h` (steps + 1, batch, hidden) has the results."""
    packed, dy, lengths, back, dh = bare(packed), bare(dy), bare(lengths), bare(back), bare(dh)
    h, dx, dhidden = bare(h), bare(dx), bare(dhidden)
    hidden, total = bare(hidden), bare(total)
    hidden_shares, total_shares = bare(hidden_shares), bare(total_shares)
    room = bare(room)
    size = dh.shape[1]
    sums, row = room.sums, room.row.reshape(size)
    for t in range(start - 1, stop - 1, -1):
        for b in range(first, last):
            _add(size, (back[b], dh[b]), (dh[b],))
            if _runs(lengths, b, t):
                if dy.size:
                    _add(size, (dy[t, b], dh[b]), (dh[b],))
                _through_tanh(size, (dh[b], h[t + 1, b]), (dx[t, b],))
                fill(dh[b], 0)
            else:
                fill(dx[t, b], 0)
            if dhidden.size:
                copy(dx[t, b], dhidden[t, b])
        over = dhidden[t] if dhidden.size else dhidden[:0].reshape((0, size))
        _back_to_hidden(first, last, hidden, hidden_shares, total, total_shares, t, lengths, dx[t], over, sums, row)
        source = dhidden[t] if dhidden.size else dx[t]
        product(source[first:last], packed, back[first:last])
