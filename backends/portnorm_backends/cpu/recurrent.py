"""The time loop of LSTM, GRU and RNN on NumPy arrays, in compiled calls of many steps, all room made once per call; where nothing is kept,
with the input term, of so many steps at a time that it stays in a near cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy

from portnorm.arrays import Array, Kernel
from portnorm.cells.cell import RecurrentCell
from portnorm.cells.gru import GRUCell
from portnorm.cells.lstm import LSTMCell
from portnorm.norm.normalize import bessel
from portnorm.recurrent import linear_scan
from portnorm.scan import Params, State, scan
from portnorm_backends.cpu import memory, threads
from portnorm_backends.cpu.input_terms import AT_ONCE, Feed, at_once, input_terms
from portnorm_backends.cpu.layout import OWN, ROWS, SHIFT, NumPyArray, Shares, Terms, rooms, writable
from portnorm_backends.cpu.loops import LOOPS, accepts, accepts_inputs, kernels_of, of_cell
from portnorm_backends.cpu.sizes import sizes_of, slot_of
from portnorm_backends.cpu.steps import integers_in_turn, of_one_step, take_integers

_WORTH = 2**27
"""Multiplications from which a thread pays: a few milliseconds."""

_TILE = 4
"""Threads have whole multiples of so many sequences, which the product takes at once."""


class LoopResiduals(NamedTuple):
    """What the vjp of the loop needs. Arrays of all steps are (time, batch, …); all but h have one step where `every` says that segments of
    so many steps are computed again, in room of the vjp's own: others may call it at the same time, and h is what the layer gave.
    """

    params: Params
    lengths: NumPyArray
    h: NumPyArray  # (time + 1, batch, hidden), from the first state on
    c: NumPyArray | None
    gates: NumPyArray
    inner: NumPyArray  # tanh(c), or what the reset gate is multiplied with
    slots: tuple[Any, ...]
    every: int = 0
    term: NumPyArray | None = None  # the input term, for segments that are computed again
    starts: NumPyArray | None = None  # c before each segment


def _forward(
    xs: tuple[Array, ...],
    state: State,
    params: Params,
    *,
    cell: Any,
    lengths: Any = None,
    sequences: bool = True,
    keep: bool = True,
    recompute: int | None = None,
) -> tuple[tuple[State, tuple[Array, ...]], Any]:
    u, every = writable(xs[0]), 0 if not keep or recompute is None or recompute >= xs[0].shape[0] else recompute
    found = _run(u.shape, lambda _: at_once(u), xs[1:], state, params, cell, lengths, sequences, keep, every)
    if found is None:
        attrs = {"cell": cell, "lengths": lengths, "sequences": sequences, "keep": keep, "recompute": recompute}
        return scan.definition(xs, state, params, **attrs)
    results, residuals = found
    return results, residuals._replace(term=u) if every else residuals


def _forward_of_inputs(
    x: Array, params: Params, state: State, loop: Params, *, cell: Any, lengths: Any = None, sequences: bool = True
) -> tuple[tuple[State, tuple[Array, ...]], None]:
    found: tuple[tuple[State, tuple[Array, ...]], None] | None
    if cell.quantize is not None:
        found = integers_in_turn(x, params, state, loop, cell=cell, sequences=sequences)
    else:
        shape = (*x.shape[:2], params["weight_ih"].shape[0])
        found = _run(shape, lambda one: input_terms(x, params, cell, one), (), state, loop, cell, lengths, sequences, False)
    return linear_scan.definition(x, params, state, loop, cell=cell, lengths=lengths, sequences=sequences) if found is None else found


def _again(
    x: NumPyArray, params: Params, state: State, loop: Params, *, cell: Any, sequences: bool, **attrs: Any
) -> Callable[[NumPyArray, State], tuple[State, tuple[NumPyArray, ...]] | None]:
    """What computes such calls for other `x` and states of the same shapes and types."""
    step = of_one_step(x, params, loop, cell=cell)
    if step is None:
        return lambda x, state: _forward_of_inputs(x, params, state, loop, cell=cell, sequences=sequences)[0]

    def run(x: NumPyArray, state: State) -> tuple[State, tuple[NumPyArray, ...]] | None:
        after = step(x, state)
        return None if after is None else (after, (after[0].copy()[None],) if sequences else ())

    return run


def _run(
    shape: tuple[int, ...],
    feeding: Callable[[NumPyArray], Feed],
    given: tuple[Array, ...],
    state: State,
    params: Params,
    cell: Any,
    lengths: Any,
    sequences: bool,
    keep: bool,
    every: int = 0,
) -> tuple[tuple[State, tuple[Array, ...]], Any] | None:
    """The loop over input terms of this shape; `None` where a variance left its range."""
    weights = params["weight_hh"]
    (time, batch, _), dtype = shape, weights.dtype
    sizes = sizes_of(cell, batch, weights.shape[1], dtype)
    room = sizes.room(1 if every else time, True) if keep else sizes.rooms.take()
    _, _, c, gates, inner, own, _ = room
    counts = sizes.no_lengths if lengths is None else numpy.array(lengths, dtype=numpy.int64)
    h = memory.room(((time if keep or (sequences and lengths is None) else 1) + 1, batch, sizes.size), dtype)
    h[0] = state[0]
    if c is not None:
        c[0] = state[1]
    y = memory.room((time, batch, sizes.size), dtype) if sequences and lengths is not None else sizes.none
    known = dict(zip(cell.given(), given, strict=True)) if given else {}
    slots = tuple([slot_of(slot, place, time, known, params) for slot, place in zip(sizes.slots, own, strict=True)])
    packed = _packed(h[0], weights, slots[0].bias if slots[0].mode == SHIFT else None, time, room.a)
    function, entry = kernels_of(LOOPS[type(cell)].module).forward, kernels_of("compiling").entry
    feed, own_of_cell = feeding(room.term), of_cell(cell, c, gates, inner, slots)
    starts = None if c is None or not every else numpy.empty((-(-time // every), batch, sizes.size), dtype)
    fine = []

    def through(first: int, last: int) -> None:
        count, of_steps = feed(first, last)
        steps = room.steps if last - first == batch else sizes.of_steps(last - first)
        for t, stop in _chunks(0, time, min(count, _steps_at_once(batch, weights)), every or time):
            if starts is not None and c is not None and t % every == 0:
                starts[t // every, first:last] = c[t % c.shape[0], first:last]
            terms = of_steps(t, stop)
            arguments = (t, stop, first, last, packed, steps, terms, counts, room.a, h, y, *own_of_cell)
            fine.append(terms is not None and entry(function, dtype, arguments)(*arguments))
            if not fine[-1]:
                return

    threads.each(_ranges(time, batch, weights, sizes.apart), through)
    if not all(fine):
        return None
    last = (h[time % h.shape[0]].copy(), *(() if c is None else (c[time % c.shape[0]].copy(),)))
    if not keep:
        sizes.rooms.give(room)
    hidden = () if not sequences else (h[1:],) if lengths is None else (y,)
    residuals = LoopResiduals(params, counts, h, c, gates, inner, slots, every, None, starts) if keep else None
    return (last, (*hidden, *(_statistics(cell, slots, counts, batch) if sizes.tracked else ()))), residuals


def _chunks(start: int, stop: int, count: int, segment: int) -> list[tuple[int, int]]:
    """Steps from `start` to before `stop` in parts of at most `count`, none of which lies in two segments."""
    if stop - start <= min(count, segment):
        return [(start, stop)]
    ends = sorted({*range(start + segment, stop, segment), stop})
    return [(t, min(t + count, end)) for begin, end in itertools.pairwise((start, *ends)) for t in range(begin, end, count)]


def _steps_of(a: NumPyArray, steps: int) -> NumPyArray:
    """Room like that of `a`, for so many steps; an array without values is itself."""
    return memory.room((steps, *a.shape[1:]), a.dtype) if a.size else a


def _packed(h: NumPyArray, weights: NumPyArray, shift: NumPyArray | None, time: int, a: NumPyArray) -> NumPyArray:
    """The hidden weights as the loop takes them; for one step of few sequences nothing, and their product with h is in `a` already."""
    products = kernels_of("products")
    few = time == 1 and h.shape[0] <= products.FEW
    if few:
        products.straight(h, weights, shift, a)
    packed: NumPyArray = products.nothing(h.dtype) if few else products.pack(weights.T, shift)
    return packed


def _ranges(time: int, batch: int, weights: NumPyArray, apart: bool) -> list[tuple[int, int]]:
    """The sequences of each thread: all in one where they are not apart, since statistics are taken over the batch."""
    cost = time * batch * weights.size / _WORTH
    return threads.parts(batch, cost, _TILE) if apart and cost >= 2 else [(0, batch)]


def _steps_at_once(batch: int, weights: NumPyArray) -> int:
    return max(1, AT_ONCE // (batch * weights.size))


def _statistics(cell: RecurrentCell, slots: tuple[Any, ...], counts: NumPyArray, batch: int) -> list[NumPyArray]:
    """Mean and variance of each step, by slot, as running averages take them."""
    found = []
    for arrays in slots:
        if arrays.mode == OWN:
            var = arrays.var
            if cell.variant.variance == "running":
                steps = numpy.arange(var.shape[0])[:, None]
                count = (steps < counts).sum(axis=1, keepdims=True) if counts.size else numpy.full((len(steps), 1), batch)
                var = var * bessel(var, count.astype(var.dtype), var.shape, ())
            found += [arrays.mean, var]
    return found


def _vjp(
    residuals: LoopResiduals, cotangents: tuple[State, Array | None], *, cell: Any, **attrs: Any
) -> tuple[tuple[Array, ...], State, Params]:
    params, counts, h, c, gates, inner, slots, every, term, starts = residuals
    dstate, dy = cotangents
    weights, (_, batch, features), dtype, time = params["weight_hh"], gates.shape, h.dtype, h.shape[0] - 1
    if every:
        c = None if c is None else _steps_of(c, every + 1)
        gates, inner = _steps_of(gates, every), _steps_of(inner, every)
        slots = tuple(s._replace(xhat=_steps_of(s.xhat, every), rstd=_steps_of(s.rstd, every)) for s in slots)
    none = numpy.empty((0, 0, 0), dtype=dtype)
    dh, *dothers = (numpy.array(d, dtype=dtype, order="C") for d in dstate)
    given = none if dy is None else writable(dy.astype(dtype, copy=False))
    back, dx = numpy.zeros(dh.shape, dtype=dtype), memory.room((time, batch, features), dtype)
    apart = type(cell) is GRUCell or slots[0].mode > SHIFT
    dhidden = memory.room(dx.shape, dtype) if apart else none
    function, entry = kernels_of(LOOPS[type(cell)].module).backward, kernels_of("compiling").entry
    own: tuple[Any, ...] = (h, *slots)
    further: tuple[Any, ...] = ()
    if type(cell) is LSTMCell:
        own, further = (*dothers, c, gates, inner, *slots), (cell.variant.cell == "copy",)
    elif type(cell) is GRUCell:
        own = (h, gates, inner, *slots)
    packed, count, shares = kernels_of("products").pack(weights), _steps_at_once(batch, weights), dict[int, tuple[Shares, ...]]()
    if every:
        a, forward, again = memory.aligned((batch, features), dtype), kernels_of(LOOPS[type(cell)].module).forward, _steps_of(h, every + 1)
        weighed = _packed(h[0], weights, slots[0].bias if slots[0].mode == SHIFT else None, time, a)
        terms, before = Terms(term, 0, 0), of_cell(cell, c, gates, inner, slots)

    def through(first: int, last: int) -> None:
        product = kernels_of("products").product_of(last - first, weights.shape[0], dtype)
        room = rooms(cell.gates, dh.shape[1], batch, dtype, product, 0)
        parts = tuple(_shares(s.weight.size, dtype) for s in slots)
        shares[first] = parts
        if every:
            anew = sizes_of(cell, batch, dh.shape[1], dtype).of_steps(last - first)
        for begin in reversed(range(0, time, every or time)):
            chunks = _chunks(begin, min(begin + (every or time), time), count, time)
            if every:
                again[begin % again.shape[0], first:last] = h[begin, first:last]
                if starts is not None and c is not None:
                    c[begin % c.shape[0], first:last] = starts[begin // every, first:last]
                for t, stop in chunks:
                    arguments = (t, stop, first, last, weighed, anew, terms, counts, a, again, none, *before)
                    entry(forward, dtype, arguments)(*arguments)
            for stop, t in reversed(chunks):
                steps = (t, stop, first, last, packed, room, given, counts, back, dh)
                arguments = (*steps, *own, *parts, dx, dhidden, *further)
                entry(function, dtype, arguments)(*arguments)

    threads.each(_ranges(time, batch, weights, all(slot.mode <= ROWS for slot in slots)), through)
    dh += back
    ordered = [shares[first] for first in sorted(shares)]  # the same sums whoever was first
    found = {}
    for name, parts in zip(LOOPS[type(cell)].slots, zip(*ordered, strict=True), strict=True):
        found[f"{name}.weight"] = sum(s.dweight[0] + s.weight[0] for s in parts)
        found[f"{name}.bias"] = sum(s.dbias[0] + s.bias[0] for s in parts)
    over = dhidden if apart else dx
    return (dx, over, h[:-1]), (dh, *dothers), {name: found[name].astype(params[name].dtype) for name in cell.shared()}


def _shares(size: int, dtype: numpy.dtype[Any]) -> Shares:
    (dweight, dbias), (weight, bias) = numpy.zeros((2, 2, size)), numpy.zeros((2, 3, size), dtype=dtype)
    return Shares(dweight, dbias, weight, bias, numpy.zeros(1, dtype=numpy.int64))


KERNEL = Kernel(
    call=lambda *args, **attrs: _forward(*args, **attrs)[0], forward=_forward, vjp=_vjp, residuals=LoopResiduals, accepts=accepts
)
FROM_INPUTS = Kernel(
    call=lambda *args, **attrs: _forward_of_inputs(*args, **attrs)[0],
    forward=_forward_of_inputs,
    accepts=lambda *args, **attrs: accepts_inputs(*args, **attrs) or take_integers(*args, **attrs),
    again=_again,
)
