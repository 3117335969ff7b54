"""The time loop of LSTM, GRU and RNN on NumPy arrays, in compiled calls of many steps, all room made once per call; where nothing is kept,
with the input term, of as many steps at a time as fill a tall matrix product, so that it stays in a near cache.

A cell that the kernels do not know in every detail (peepholes, projections, zoneout, …) stays with the definition, `portnorm.scan.scan`.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy

from portnorm.arrays import Array, Kernel
from portnorm.cells.cell import RecurrentCell
from portnorm.cells.gru import GRUCell
from portnorm.cells.lstm import LSTMCell
from portnorm.cells.rnn import RNNCell
from portnorm.dtypes import float32_value
from portnorm.norm.normalize import bessel
from portnorm.recurrent import linear_scan
from portnorm.scan import Params, State, scan
from portnorm_backends.cpu import memory, threads
from portnorm_backends.cpu.families import BY_BATCH, TRAINING
from portnorm_backends.cpu.layout import (
    GIVEN,
    NONE,
    OWN,
    RANGE,
    ROWS,
    SHIFT,
    NumPyArray,
    Rooms,
    Shares,
    SlotArrays,
    Terms,
    idle,
    rooms,
    taken,
    writable,
)
from portnorm_backends.cpu.warming import ready

_AT_ONCE = 2**31
"""Multiplications of hidden products in one compiled call, some tens of milliseconds, during which Python does not see an interrupt."""

_WORTH = 2**27
"""Multiplications from which a thread pays: a few milliseconds."""

_TILE = 4
"""Threads have whole multiples of so many sequences, which the product takes at once."""


Shape = tuple[int, ...]
Shapes = tuple[Shape, ...]
Names = tuple[str, ...]

Feed = Callable[[int, int], tuple[int, Callable[[int, int], Terms | None]]]
"""For the sequences of a thread: how many steps it takes at a time, and what gives it their terms; `None` where they left their range."""


class _Loop(NamedTuple):
    """The compiled loop of a cell."""

    name: str
    """Of its family of kernels."""
    module: str
    slots: tuple[str, ...]
    """Those that it knows."""


_LOOPS = {
    LSTMCell: _Loop("LSTM", "lstm", ("norm_hh", "norm_sum", "norm_c")),
    GRUCell: _Loop("GRU", "gru", ("norm_hh",)),
    RNNCell: _Loop("RNN", "rnn", ("norm_hh", "norm_sum")),
}


@functools.cache
def _compiled(module: str) -> Any:
    """A module of kernels, imported with numba when the first array comes that it takes."""
    return importlib.import_module(f"portnorm_backends.cpu.{module}")


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


def _accepts(
    xs: tuple[Array, ...],
    state: State,
    params: Params,
    *,
    cell: Any,
    lengths: Any = None,
    sequences: bool = True,
    keep: bool = True,
    recompute: int | None = None,
) -> bool:
    """A cell in its plain form or with normalizers of rows or of the batch, on arrays of one type, and at least one step."""
    shapes = _shapes_of((*xs, *state, *params.values())) if _is_known(cell) else None
    if shapes is None or not _fit(cell, (*params,), len(xs), shapes):
        return False
    return _are_counts(lengths, xs[0].shape[1]) and _are_ready(cell, keep, xs[0].dtype)


def _accepts_inputs(
    x: Array, params: Params, state: State, loop: Params, *, cell: Any, lengths: Any = None, sequences: bool = True
) -> bool:
    """The same with an input term that is normalized by rows or not at all."""
    shapes = _shapes_of((x, *params.values(), *state, *loop.values())) if _is_known(cell) else None
    if shapes is None or not _inputs_fit(cell, (*params,), (*loop,), shapes):
        return False
    return _are_counts(lengths, x.shape[1]) and _are_ready(cell, False, x.dtype)


@functools.lru_cache(maxsize=256)
def _inputs_fit(cell: RecurrentCell, names: Names, loop: Names, shapes: Shapes) -> bool:
    """`_fit`, and the same of what makes an input term: `shapes` are those of x, of what has the first `names`, and then as there."""
    (x, *own), rest = shapes[: 1 + len(names)], shapes[1 + len(names) :]
    params, known = dict(zip(names, own, strict=True)), _known_outside(cell)
    weight = params.pop("weight_ih")
    if known is None or len(x) != 3 or 0 in x or weight[1:] != x[2:] or not params.keys() <= known:
        return False
    return all(shape == weight[:1] for shape in params.values()) and _fit(cell, loop, 1, ((*x[:2], weight[0]), *rest))


def _are_ready(cell: RecurrentCell, keep: bool, dtype: Any) -> bool:
    """The kernels that this call, and where it keeps something its backward call, will take."""
    name, by_batch = _families(cell, keep)
    return ready(name, dtype) and (not by_batch or ready(BY_BATCH, dtype))


@functools.lru_cache(maxsize=64)
def _families(cell: RecurrentCell, keep: bool) -> tuple[str, bool]:
    """The loop's own, and whether it takes that of statistics over the batch too."""
    by_batch = any(slot.normalizes and slot.is_batch for slot in cell.slots.values())
    return f"{_LOOPS[type(cell)].name}{TRAINING if keep else ''}", by_batch


@functools.lru_cache(maxsize=64)
def _known_outside(cell: RecurrentCell) -> frozenset[str] | None:
    """What an input term may have beside its weights; `None` where it is normalized over the batch."""
    slot = cell.input_slot
    if slot is not None and slot.is_batch:
        return None
    return frozenset({"bias", *(() if slot is None else (f"norm_ih.{p}" for p in slot.parameters()))})


def _shapes_of(arrays: tuple[Any, ...]) -> Shapes | None:
    """Those of arrays of NumPy that are all of one type for which there are kernels; `None` of others."""
    dtype, shapes = getattr(arrays[0], "dtype", None), []
    for a in arrays:
        if type(a) is not numpy.ndarray or a.dtype != dtype:
            return None
        shapes.append(a.shape)
    return tuple(shapes) if dtype in RANGE else None


def _are_counts(lengths: Any, batch: int) -> bool:
    return lengths is None or numpy.shape(lengths) == (batch,)


@functools.lru_cache(maxsize=256)
def _fit(cell: RecurrentCell, names: Names, xs: int, shapes: Shapes) -> bool:
    """Whether all shapes are those that compiled code relies on; it does not look where it reads.

    They are those of so many `xs`, of which the first is the input term, of the state, and of the parameters with these names.
    """
    (shape, *given), state, params = shapes[:xs], shapes[xs : xs + len(cell.states)], shapes[-len(names) :]
    if len(shapes) != xs + len(cell.states) + len(names) or len(shape) != 3 or 0 in shape or shape[2] % cell.gates:
        return False
    time, batch, size = shape[0], shape[1], shape[2] // cell.gates
    return (
        dict(zip(names, params, strict=True)) == _shapes(cell, size)
        and all(own == (batch, size) for own in state)
        and all(own == (time, cell.width(name.partition(".")[0]) * size) for name, own in zip(cell.given(), given, strict=True))
    )


def _shapes(cell: RecurrentCell, size: int) -> dict[str, tuple[int, ...]]:
    """Of what a cell of this hidden size reads in every step."""
    slots = {f"{name}.{p}": (cell.width(name) * size,) for name, slot in cell.slots.items() for p in slot.parameters()}
    return {"weight_hh": (cell.gates * size, size), **{name: slots.get(name, ()) for name in cell.shared()}}


@functools.lru_cache(maxsize=64)
def _is_known(cell: Any) -> bool:
    if cell.quantize is not None or type(cell) not in _LOOPS or not set(cell.slots) <= set(_LOOPS[type(cell)].slots):
        return False
    v = cell.variant
    plain = (v.recurrence, v.zoneout, v.peepholes, v.clip, v.affine, *v.activations()) == (
        "matrix",
        0.0,
        False,
        None,
        "shared",
        "sigmoid",
        "tanh",
        "tanh",
    )
    by_batch = v.norm == "batch" and any(slot.normalizes for slot in cell.slots.values())
    known = v.eps_place == "variance" and v.variance != "unbiased" and not (by_batch and ("norm_sum" in cell.slots or not v.timed))
    known = known and cell.reduce is None  # statistics over processes are the definition's
    return plain and known and (type(cell) is not GRUCell or (v.reset, v.update) == ("after", "keep"))


class _Still(NamedTuple):
    """A slot without what a call brings."""

    arrays: SlotArrays
    parts: int
    """With statistics of their own, of a row; 0 where it normalizes none."""
    size: int
    weight: str | None
    """The name of its own gain, if it has one; likewise of its shift, and of given statistics."""
    bias: str | None
    mean: str
    var: str


@functools.lru_cache(maxsize=256)
def _still(cell: RecurrentCell, name: str, dtype: numpy.dtype[Any], hidden: int) -> _Still:
    slot, size = cell.slots.get(name), hidden * cell.width(name)
    still, parts = idle(dtype, size), 0
    if slot is None:
        return _Still(still, 0, size, None, None, "", "")
    own, mode, ends = slot.parameters(), SHIFT, still.ends
    if slot.normalizes and not slot.is_batch:
        parts, ends, mode = len(slot.partition), _ends(slot.partition, size), ROWS
    elif slot.normalizes:
        mode = OWN if slot.training else GIVEN
    still = still._replace(mode=mode, ends=ends, eps=float32_value(cell.variant.eps), center=cell.variant.norm != "rms")
    weight, bias = (f"{name}.{p}" if p in own else None for p in ("weight", "bias"))
    return _Still(still, parts, size, weight, bias, f"{name}.mean", f"{name}.var")


def _slot(still: _Still, room: tuple[NumPyArray, NumPyArray], time: int, given: dict[str, Any], params: Params) -> SlotArrays:
    """A slot as the kernels take it, with room for what it finds."""
    mode, ends, weight, bias, _, _, mean, var, eps, center, smallest, largest = still.arrays
    xhat, rstd = room
    weight = weight if still.weight is None else writable(params[still.weight])
    bias = bias if still.bias is None else writable(params[still.bias])
    if mode == OWN:
        mean, var = (numpy.empty((time, still.size), weight.dtype) for _ in range(2))
    elif mode == GIVEN:
        mean, var = writable(given[still.mean]), writable(given[still.var])
    return SlotArrays(mode, ends, weight, bias, xhat, rstd, mean, var, eps, center, smallest, largest)


@functools.lru_cache(maxsize=64)
def _ends(partition: tuple[int, ...], size: int) -> NumPyArray:
    """Where the parts of a row with statistics of their own begin and end. Nobody writes into it."""
    return numpy.cumsum((0, *partition), dtype=numpy.int64) * (size // sum(partition))


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
    found = _run(u.shape, lambda _: _at_once(u), xs[1:], state, params, cell, lengths, sequences, keep, every)
    if found is None:
        attrs = {"cell": cell, "lengths": lengths, "sequences": sequences, "keep": keep, "recompute": recompute}
        return scan.definition(xs, state, params, **attrs)
    results, residuals = found
    return results, residuals._replace(term=u) if every else residuals


def _at_once(u: NumPyArray | None) -> Feed:
    """The terms of all steps."""
    whole = None if u is None else Terms(u, 0, 0)
    return lambda *_: (_AT_ONCE, lambda *_: whole)


def _forward_of_inputs(
    x: Array, params: Params, state: State, loop: Params, *, cell: Any, lengths: Any = None, sequences: bool = True
) -> tuple[tuple[State, tuple[Array, ...]], None]:
    shape = (*x.shape[:2], params["weight_ih"].shape[0])
    found = _run(shape, lambda one: _input_terms(x, params, cell, one), (), state, loop, cell, lengths, sequences, False)
    return linear_scan.definition(x, params, state, loop, cell=cell, lengths=lengths, sequences=sequences) if found is None else found


def _input_terms(x: NumPyArray, params: Params, cell: RecurrentCell, one: NumPyArray) -> Feed:
    """The terms of so many steps at a time that their product with the weights is a tall one; `one` is room for those of one step."""
    products, weight, dtype = _compiled("products"), params["weight_ih"], x.dtype
    (time, batch, features), size = x.shape, weight.shape[0]
    inputs, bias = taken(x, dtype, x.shape), params.get("bias")
    normalize = None if cell.input_slot is None else _normalizer(params, cell, dtype, size)
    if time == 1 and batch <= products.FEW:
        products.straight(inputs[0], weight, bias, one[0])
        return _at_once(one if normalize is None or normalize(one[0]) else None)
    multiply = products.affine_map(weight.T, bias, time * batch)

    def of_thread(first: int, last: int) -> tuple[int, Callable[[int, int], Terms | None]]:
        sequences, count = last - first, max(1, products.ROWS // (last - first))
        u = memory.aligned((min(count, time), sequences, size), dtype)

        def of_steps(t: int, stop: int) -> Terms | None:
            terms = u[: stop - t]
            rows = terms.reshape(-1, size)
            multiply(inputs[t:stop, first:last].reshape(-1, features), rows)
            return Terms(terms, t, first) if normalize is None or normalize(rows) else None

        return count, of_steps

    return of_thread


def _normalizer(params: Params, cell: RecurrentCell, dtype: numpy.dtype[Any], size: int) -> Callable[[NumPyArray], bool]:
    """What normalizes rows of the input term in their place, unless a variance leaves its range."""
    forward, ends, how, none = _outside(cell, dtype, size)
    weight, bias = (none if p is None else taken(p, dtype, (size,)) for p in map(params.get, ("norm_ih.weight", "norm_ih.bias")))
    if len(ends) == 1:
        return lambda rows: bool(forward(rows, weight, bias, *how, rows, numpy.empty((1, 3), dtype)))

    def normalize(rows: NumPyArray) -> bool:
        fine = True
        for i, j in ends:
            part = rows[:, i:j]
            fine &= forward(part, weight[i:j], bias[i:j], *how, part, numpy.empty((1, 3), dtype))
        return fine

    return normalize


@functools.lru_cache(maxsize=64)
def _outside(
    cell: RecurrentCell, dtype: numpy.dtype[Any], size: int
) -> tuple[Any, tuple[tuple[int, int], ...], tuple[Any, ...], NumPyArray]:
    """The kernel of the input term's normalizer, the parts of a row, what the kernel is told of them, and a parameter that is not there."""
    slot = cell.input_slot
    assert slot is not None
    how = (1, float32_value(cell.variant.eps), cell.variant.norm != "rms", *RANGE[dtype], False)
    ends = tuple(itertools.pairwise(map(int, _ends(slot.partition, size))))
    return _compiled("rowwise").forward(dtype), ends, how, numpy.empty(0, dtype)


class _Room(NamedTuple):
    """What a loop writes beside its result."""

    a: NumPyArray  # (batch, features), the hidden term of a step
    term: NumPyArray  # (1, batch, features), the input term of one
    c: NumPyArray | None  # (steps + 1, batch, hidden)
    gates: NumPyArray
    inner: NumPyArray
    slots: tuple[tuple[NumPyArray, NumPyArray], ...]  # x̂ and 1 / σ
    steps: Rooms


class _Sizes:
    """What calls with so many sequences share, whatever their arrays: what hangs on sizes alone, and room for one call after another."""

    def __init__(self, cell: RecurrentCell, batch: int, size: int, dtype: numpy.dtype[Any]) -> None:
        self.cell, self.batch, self.size, self.dtype, self.features = cell, batch, size, dtype, cell.gates * size
        self.slots = tuple(_still(cell, name, dtype, size) for name in _LOOPS[type(cell)].slots)
        modes = [slot.arrays.mode for slot in self.slots]
        self.plain = type(cell) is LSTMCell and max(modes) <= SHIFT
        """Whether a loop that keeps nothing has no use for gates."""
        self.apart = max(modes) <= ROWS
        """Whether no sequence knows of the others."""
        self.tracked = OWN in modes
        self.none, self.no_lengths = numpy.empty((0, 0, 0), dtype), numpy.zeros(0, numpy.int64)
        """Nobody writes into them, nor can."""
        self.rooms = memory.Turns(lambda: self.room(1, False), batch * self.features * dtype.itemsize)

    def room(self, kept: int, keep: bool) -> _Room:
        """New room for so many steps."""
        batch, size, dtype = self.batch, self.size, self.dtype
        a, term = (memory.aligned((*one, batch, self.features), dtype) for one in ((), (1,)))
        c = memory.room((kept + 1, batch, size), dtype) if len(self.cell.states) > 1 else None
        unread = self.plain and not keep
        gates, inner = (self.none if unread else memory.room((kept, batch, n), dtype) for n in (self.features, size))
        return _Room(a, term, c, gates, inner, tuple(self._of_slot(slot, kept) for slot in self.slots), self.of_steps(batch))

    def _of_slot(self, slot: _Still, kept: int) -> tuple[NumPyArray, NumPyArray]:
        if slot.arrays.mode <= SHIFT:
            return slot.arrays.xhat, slot.arrays.rstd
        lines = (self.batch, slot.arrays.ends.size - 1) if slot.arrays.mode == ROWS else (1, slot.size)
        return memory.room((kept, self.batch, slot.size), self.dtype), numpy.empty((kept, *lines), self.dtype)

    def of_steps(self, sequences: int) -> Rooms:
        """Zeroed room for the steps of so many of them."""
        product = _compiled("products").product_of(sequences, self.size, self.dtype)
        over_batch = 0 if self.apart else _compiled("slots").over_batch(self.dtype)
        return rooms(self.cell.gates, self.size, self.batch, self.dtype, product, over_batch)


_sizes = functools.lru_cache(maxsize=64)(_Sizes)


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
    sizes = _sizes(cell, batch, weights.shape[1], dtype)
    room = sizes.room(1 if every else time, True) if keep else sizes.rooms.take()
    _, _, c, gates, inner, own, _ = room
    counts = sizes.no_lengths if lengths is None else numpy.array(lengths, dtype=numpy.int64)
    h = memory.room(((time if keep or (sequences and lengths is None) else 1) + 1, batch, sizes.size), dtype)
    h[0] = state[0]
    if c is not None:
        c[0] = state[1]
    y = memory.room((time, batch, sizes.size), dtype) if sequences and lengths is not None else sizes.none
    known = dict(zip(cell.given(), given, strict=True)) if given else {}
    slots = tuple(
        [
            slot.arrays if slot.arrays.mode == NONE else _slot(slot, place, time, known, params)
            for slot, place in zip(sizes.slots, own, strict=True)
        ]
    )
    packed = _packed(h[0], weights, slots[0].bias if slots[0].mode == SHIFT else None, time, room.a)
    function, entry = _compiled(_LOOPS[type(cell)].module).forward, _compiled("compiling").entry
    feed, of_cell = feeding(room.term), _of_cell(cell, c, gates, inner, slots)
    starts = None if c is None or not every else numpy.empty((-(-time // every), batch, sizes.size), dtype)
    fine = []

    def through(first: int, last: int) -> None:
        count, of_steps = feed(first, last)
        steps = room.steps if last - first == batch else sizes.of_steps(last - first)
        for t, stop in _chunks(0, time, min(count, _steps_at_once(batch, weights)), every or time):
            if starts is not None and c is not None and t % every == 0:
                starts[t // every, first:last] = c[t % c.shape[0], first:last]
            terms = of_steps(t, stop)
            arguments = (t, stop, first, last, packed, steps, terms, counts, room.a, h, y, *of_cell)
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


def _of_cell(cell: Any, c: Any, gates: Any, inner: Any, slots: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the forward loop of a cell takes beside that of all."""
    if type(cell) is LSTMCell:
        return (c, gates, inner, *slots, cell.variant.cell == "copy")
    return (gates, inner, *slots) if type(cell) is GRUCell else slots


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
    products = _compiled("products")
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
    return max(1, _AT_ONCE // (batch * weights.size))


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
    function, entry = _compiled(_LOOPS[type(cell)].module).backward, _compiled("compiling").entry
    own: tuple[Any, ...] = (h, *slots)
    further: tuple[Any, ...] = ()
    if type(cell) is LSTMCell:
        own, further = (*dothers, c, gates, inner, *slots), (cell.variant.cell == "copy",)
    elif type(cell) is GRUCell:
        own = (h, gates, inner, *slots)
    packed, count, shares = _compiled("products").pack(weights), _steps_at_once(batch, weights), dict[int, tuple[Shares, ...]]()
    if every:
        a, forward, again = memory.aligned((batch, features), dtype), _compiled(_LOOPS[type(cell)].module).forward, _steps_of(h, every + 1)
        weighed = _packed(h[0], weights, slots[0].bias if slots[0].mode == SHIFT else None, time, a)
        terms, before = Terms(term, 0, 0), _of_cell(cell, c, gates, inner, slots)

    def through(first: int, last: int) -> None:
        product = _compiled("products").product_of(last - first, weights.shape[0], dtype)
        room = rooms(cell.gates, dh.shape[1], batch, dtype, product, 0)
        parts = tuple(_shares(s.weight.size, dtype) for s in slots)
        shares[first] = parts
        if every:
            anew = _sizes(cell, batch, dh.shape[1], dtype).of_steps(last - first)
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
    for name, parts in zip(_LOOPS[type(cell)].slots, zip(*ordered, strict=True), strict=True):
        found[f"{name}.weight"] = sum(s.dweight[0] + s.weight[0] for s in parts)
        found[f"{name}.bias"] = sum(s.dbias[0] + s.bias[0] for s in parts)
    over = dhidden if apart else dx
    return (dx, over, h[:-1]), (dh, *dothers), {name: found[name].astype(params[name].dtype) for name in cell.shared()}


def _shares(size: int, dtype: numpy.dtype[Any]) -> Shares:
    (dweight, dbias), (weight, bias) = numpy.zeros((2, 2, size)), numpy.zeros((2, 3, size), dtype=dtype)
    return Shares(dweight, dbias, weight, bias, numpy.zeros(1, dtype=numpy.int64))


KERNEL = Kernel(
    call=lambda *args, **attrs: _forward(*args, **attrs)[0], forward=_forward, vjp=_vjp, residuals=LoopResiduals, accepts=_accepts
)
FROM_INPUTS = Kernel(call=lambda *args, **attrs: _forward_of_inputs(*args, **attrs)[0], forward=_forward_of_inputs, accepts=_accepts_inputs)
