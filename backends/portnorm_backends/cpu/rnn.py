"""Steps of the simple recurrent network with tanh, forward and backward; see `slots`."""

from __future__ import annotations

from typing import Any

from portnorm_backends.cpu.compiling import bare, compiled, copy, fill
from portnorm_backends.cpu.layout import NONE, SHIFT
from portnorm_backends.cpu.pointwise import tanh
from portnorm_backends.cpu.products import product
from portnorm_backends.cpu.slots import One, add, arrives, gives, hidden_back, normalized, prepared, runs, stays, sum_back, term
from portnorm_backends.cpu.vectors import Vector, elementwise


@elementwise
def _tanh(z: Vector) -> One:
    return (tanh(z),)


@elementwise
def _through_tanh(dh: Vector, y: Vector) -> One:
    return (dh * (1.0 - y * y),)


@compiled()
def forward(
    start: int,
    stop: int,
    first: int,
    last: int,
    packed: Any,
    room: Any,
    terms: Any,
    lengths: Any,
    a: Any,
    h: Any,
    y: Any,
    hidden: Any,
    total: Any,
) -> bool:
    """As `lstm.forward`."""
    packed, room, terms, lengths, a, h = bare(packed), bare(room), bare(terms), bare(lengths), bare(a), bare(h)
    y, hidden, total = bare(y), bare(hidden), bare(total)
    z, row, zeros, fine = room.z, room.row, room.zeros, True
    summed = row if total.mode != NONE else z
    for t in range(start, stop):
        before, after = t % h.shape[0], (t + 1) % h.shape[0]
        product(h[before, first:last], packed, a[first:last], room.product)
        fine &= prepared(hidden, t, a, lengths, room.over_batch, room.sums)
        for b in range(first, last):
            if not runs(lengths, b, t):
                stays(t, b, h, y)
                continue
            if hidden.mode <= SHIFT:
                add(h.shape[2], (a[b], term(terms, t, b)), (summed[0],))
            else:
                fine &= normalized(hidden, t, b, a[b], term(terms, t, b), room.sums, summed)
            if total.mode != NONE:
                fine &= normalized(total, t, b, row[0], zeros, room.sums, z)
            _tanh(h.shape[2], (z[0],), (h[after, b],))
            gives(t, b, h, y)
    return fine


@compiled()
def backward(
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
    """As `lstm.backward`; `h` (steps + 1, batch, hidden) has the results."""
    packed, room, dy, lengths, back, dh = bare(packed), bare(room), bare(dy), bare(lengths), bare(back), bare(dh)
    h, dx, dhidden = bare(h), bare(dx), bare(dhidden)
    hidden, total, hidden_shares, total_shares = bare(hidden), bare(total), bare(hidden_shares), bare(total_shares)
    sums, row = room.sums, room.row[0]
    for t in range(start - 1, stop - 1, -1):
        for b in range(first, last):
            if arrives(t, b, back, dy, lengths, dh):
                _through_tanh(dh.shape[1], (dh[b], h[t + 1, b]), (dx[t, b],))
                fill(dh[b], 0)
            else:
                fill(dx[t, b], 0)
            if dhidden.size:
                copy(dx[t, b], dhidden[t, b])
        sum_back(first, last, t, total, total_shares, lengths, dx, dhidden, sums, row)
        hidden_back(first, last, t, hidden, hidden_shares, lengths, dx, dhidden, sums, row, packed, back, room.product)
