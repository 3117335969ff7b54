"""Steps of the GRU whose reset gate comes after the hidden product, forward and backward; see `slots`."""

from __future__ import annotations

from typing import Any

from portnorm_backends.cpu.compiling import bare, compiled, copy, fill
from portnorm_backends.cpu.layout import SHIFT
from portnorm_backends.cpu.pointwise import sigmoid, tanh
from portnorm_backends.cpu.products import product
from portnorm_backends.cpu.slots import arrives, gives, hidden_back, normalized, prepared, runs, stays, term
from portnorm_backends.cpu.vectors import Vector, elementwise, fused

Five = tuple[Vector, Vector, Vector, Vector, Vector]


@elementwise
def _step(u_r: Vector, u_z: Vector, u_n: Vector, r: Vector, z: Vector, reset: Vector, before: Vector) -> Five:
    """(r, z, n, what r is multiplied with, h) of the input and the hidden terms."""
    r, z = sigmoid(u_r + r), sigmoid(u_z + z)
    n = tanh(fused(r, reset, u_n))
    return r, z, n, reset, fused(z, before - n, n)


@compiled(inner=True)
def _gates(row: Any) -> Any:
    """The three slices of a row."""
    size = row.size // 3
    return row[:size], row[size : 2 * size], row[2 * size :]


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
    gates: Any,
    reset: Any,
    hidden: Any,
) -> bool:
    """As `lstm.forward`; `reset` (steps, batch, hidden) keeps what r is multiplied with."""
    packed, room, terms, lengths, a, h = bare(packed), bare(room), bare(terms), bare(lengths), bare(a), bare(h)
    y, gates, reset, hidden = bare(y), bare(gates), bare(reset), bare(hidden)
    size, made, zeros, fine = h.shape[2], room.row, room.zeros, True
    for t in range(start, stop):
        before, after, k = t % h.shape[0], (t + 1) % h.shape[0], t % gates.shape[0]
        product(h[before, first:last], packed, a[first:last], room.product)
        fine &= prepared(hidden, t, a, lengths, room.over_batch, room.sums)
        for b in range(first, last):
            if not runs(lengths, b, t):
                stays(t, b, h, y)
                continue
            if hidden.mode > SHIFT:
                fine &= normalized(hidden, t, b, a[b], zeros, room.sums, made)
            inside = a[b] if hidden.mode <= SHIFT else made.reshape(3 * size)
            found = (*_gates(gates[k, b]), reset[k, b], h[after, b])
            _step(size, (*_gates(term(terms, t, b)), *_gates(inside), h[before, b]), found)
            gives(t, b, h, y)
    return fine


@elementwise
def _cotangents(dh: Vector, r: Vector, z: Vector, n: Vector, reset: Vector, before: Vector) -> Five:
    """Cotangents of r, z and n before their nonlinearities, of what r is multiplied with, and of h before the step."""
    dn = dh * (1.0 - z) * (1.0 - n * n)
    return dn * reset * r * (1.0 - r), dh * (before - n) * z * (1.0 - z), dn, dn * r, dh * z


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
    gates: Any,
    reset: Any,
    hidden: Any,
    shares: Any,
    dx: Any,
    dhidden: Any,
) -> None:
    """As `lstm.backward`."""
    packed, room, dy, lengths, back, dh = bare(packed), bare(room), bare(dy), bare(lengths), bare(back), bare(dh)
    h, gates, reset, dx, dhidden = bare(h), bare(gates), bare(reset), bare(dx), bare(dhidden)
    hidden, shares = bare(hidden), bare(shares)
    size = dh.shape[1]
    sums, row = room.sums, room.row.reshape(3 * size)
    for t in range(start - 1, stop - 1, -1):
        k = t % gates.shape[0]
        for b in range(first, last):
            d, over = dx[t, b], dhidden[t, b]
            if not arrives(t, b, back, dy, lengths, dh):
                fill(d, 0)
                fill(over, 0)
                continue
            found = (*_gates(d), over[2 * size :], dh[b])
            _cotangents(size, (dh[b], *_gates(gates[k, b]), reset[k, b], h[t, b]), found)
            copy(d[: 2 * size], over[: 2 * size])
        hidden_back(first, last, t, hidden, shares, lengths, dx, dhidden, sums, row, packed, back, room.product)
