"""Steps of the LSTM, forward and backward; see `slots`."""

from __future__ import annotations

from typing import Any

from portnorm_backends.cpu.compiling import bare, compiled, copy, fill
from portnorm_backends.cpu.layout import NONE, SHIFT
from portnorm_backends.cpu.pointwise import sigmoid, tanh
from portnorm_backends.cpu.products import product
from portnorm_backends.cpu.slots import (
    Two,
    add,
    ahead,
    arrives,
    collected,
    counted,
    denormalized,
    gives,
    hidden_back,
    normalized,
    prepared,
    runs,
    settled,
    stays,
    sum_back,
    term,
)
from portnorm_backends.cpu.vectors import Vector, elementwise, fused

Four = tuple[Vector, Vector, Vector, Vector]
Five = tuple[Vector, Vector, Vector, Vector, Vector]
Seven = tuple[Vector, Vector, Vector, Vector, Vector, Vector, Vector]


def _memory(i: Vector, f: Vector, g: Vector, o: Vector, before: Vector) -> Five:
    """The gates and c of a step."""
    i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
    return i, f, g, o, fused(f, before, i * g)


def _output(c: Vector, o: Vector) -> Two:
    """(tanh c, h)"""
    inner = tanh(c)
    return inner, o * inner


_opened, _emitted = elementwise(_memory), elementwise(_output)


@elementwise
def _step(ai: Vector, af: Vector, ag: Vector, ao: Vector, ui: Vector, uf: Vector, ug: Vector, uo: Vector, before: Vector) -> Seven:
    """A whole step without normalizers: the gates, c, tanh c, h."""
    i, f, g, o, c = _memory(ai + ui, af + uf, ag + ug, ao + uo, before)
    return i, f, g, o, c, *_output(c, o)


@elementwise
def _inferred(ai: Vector, af: Vector, ag: Vector, ao: Vector, ui: Vector, uf: Vector, ug: Vector, uo: Vector, before: Vector) -> Two:
    """(c, h) of it."""
    _, _, _, o, c = _memory(ai + ui, af + uf, ag + ug, ao + uo, before)
    return c, _output(c, o)[1]


@compiled(inner=True)
def _gates(row: Any) -> Any:
    """The four slices of a row."""
    size = row.size // 4
    return row[:size], row[size : 2 * size], row[2 * size : 3 * size], row[3 * size :]


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
    c: Any,
    gates: Any,
    tanh_c: Any,
    hidden: Any,
    total: Any,
    cell: Any,
    copies: bool,
) -> bool:
    """`h` and `c` (steps + 1, batch, hidden) begin with the states; `copies`: the normalized c goes into tanh only. `y` may be (0, 0, 0),
    and without normalizers, where nothing is kept, `gates` and `tanh_c` too.

    False where a variance left its range: then nothing of the result is to be used.
    """
    packed, room, terms, lengths, a, h = bare(packed), bare(room), bare(terms), bare(lengths), bare(a), bare(h)
    y, c, gates, tanh_c = bare(y), bare(c), bare(gates), bare(tanh_c)
    hidden, total, cell = bare(hidden), bare(total), bare(cell)
    size, fine = h.shape[2], True
    plain = hidden.mode <= SHIFT and total.mode == NONE and cell.mode == NONE
    z, row, narrow, raw, zeros = room.z, room.row, room.narrow, room.states, room.zeros
    summed = row if total.mode != NONE else z
    for t in range(start, stop):
        before, after = t % h.shape[0], (t + 1) % h.shape[0]
        c_before, c_after = c[t % c.shape[0]], c[(t + 1) % c.shape[0]]
        product(h[before, first:last], packed, a[first:last], room.product)
        if plain:
            for b in range(first, last):
                ahead(terms.u, t - terms.step, b - terms.sequence, first - terms.sequence, last - terms.sequence, 1)
                given = (*_gates(a[b]), *_gates(term(terms, t, b)), c_before[b])
                if not runs(lengths, b, t):
                    stays(t, b, h, y)
                    copy(c_before[b], c_after[b])
                    continue
                if gates.size:
                    k = t % gates.shape[0]
                    _step(size, given, (*_gates(gates[k, b]), c_after[b], tanh_c[k, b], h[after, b]))
                else:
                    _inferred(size, given, (c_after[b], h[after, b]))
                gives(t, b, h, y)
            continue
        k = t % gates.shape[0]
        fine &= prepared(hidden, t, a, lengths, room.over_batch, room.sums)
        for b in range(first, last):
            if not runs(lengths, b, t):
                continue
            if hidden.mode <= SHIFT:
                add(4 * size, (a[b], term(terms, t, b)), (summed.reshape(4 * size),))
            else:
                fine &= normalized(hidden, t, b, a[b], term(terms, t, b), room.sums, summed)
            if total.mode != NONE:
                fine &= normalized(total, t, b, row.reshape(4 * size), zeros, room.sums, z)
            into = raw[b] if cell.mode != NONE and not copies else c_after[b]
            _opened(size, (z[0], z[1], z[2], z[3], c_before[b]), (*_gates(gates[k, b]), into))
        if cell.mode != NONE:
            fine &= prepared(cell, t, c_after if copies else raw, lengths, room.over_batch, narrow)
        for b in range(first, last):
            if not runs(lengths, b, t):
                stays(t, b, h, y)
                copy(c_before[b], c_after[b])
                continue
            if cell.mode != NONE:
                inside, into = (c_after[b], z[:1]) if copies else (raw[b], c_after[b : b + 1])
                fine &= normalized(cell, t, b, inside, zeros[:size], narrow, into)
            inner = z[0] if cell.mode != NONE and copies else c_after[b]
            _emitted(size, (inner, gates[k, b, 3 * size :]), (tanh_c[k, b], h[after, b]))
            gives(t, b, h, y)
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
        k, before = t % gates.shape[0], t % c.shape[0]
        for b in range(first, last):
            if not arrives(t, b, back, dy, lengths, dh):
                continue
            _out_of_cell(size, (dh[b], gates[k, b, 3 * size :], tanh_c[k, b]), (dx[t, b, 3 * size :], inside[b]))
            fill(dh[b], 0)
            if cell.mode == NONE or not copies:
                add(size, (inside[b], dc[b]), (dc[b],))
            if cell.mode != NONE:
                collected(cell, cell_shares, t, b, inside[b] if copies else dc[b])
        if cell.mode != NONE:
            counted(cell, cell_shares, t, lengths, batch, narrow)
            for b in range(first, last):
                if not runs(lengths, b, t):
                    continue
                denormalized(cell, t, b, inside[b] if copies else dc[b], narrow, small)
                if not copies:
                    fill(dc[b], 0)
                add(size, (small, dc[b]), (dc[b],))
            settled(cell, cell_shares)
        for b in range(first, last):
            d = dx[t, b]
            if runs(lengths, b, t):
                (i, f, g, _), (di, df, dg, _) = _gates(gates[k, b]), _gates(d)
                _into_gates(size, (dc[b], i, f, g, c[before, b]), (di, df, dg, dc[b]))
            else:
                fill(d, 0)
            if dhidden.size:
                copy(d, dhidden[t, b])
        sum_back(first, last, t, total, total_shares, lengths, dx, dhidden, sums, row)
        hidden_back(first, last, t, hidden, hidden_shares, lengths, dx, dhidden, sums, row, packed, back, room.product)
