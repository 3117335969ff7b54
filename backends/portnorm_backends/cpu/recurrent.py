"""The time loop of LSTM, GRU and RNN on NumPy arrays, in compiled calls of many steps, all room made once per call.

A cell that the kernels do not know in every detail (peepholes, projections, zoneout, …) stays with the definition, `portnorm.scan.scan`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy

from portnorm.arrays import Array, Kernel, float32_value
from portnorm.cells.cell import RecurrentCell
from portnorm.cells.gru import GRUCell
from portnorm.cells.lstm import LSTMCell
from portnorm.cells.rnn import RNNCell
from portnorm.cells.slots import Slot
from portnorm.norm.normalize import bessel
from portnorm.scan import Params, State, scan
from portnorm_backends.cpu import memory, threads
from portnorm_backends.cpu.layout import GIVEN, NONE, OWN, RANGE, ROWS, SHIFT, NumPyArray, Shares, SlotArrays, rooms, writable

_AT_ONCE = 2**31
"""Multiplications of hidden products in one compiled call, some tens of milliseconds, during which Python does not see an interrupt."""

_WORTH = 2**27
"""Multiplications from which a thread pays: a few milliseconds."""

_TILE = 4
"""Threads have whole multiples of so many sequences, which the product takes at once."""


class _Loop(NamedTuple):
    """The compiled loop of a cell."""

    module: str
    slots: tuple[str, ...]
    """Those that it knows."""


_LOOPS = {
    LSTMCell: _Loop("lstm", ("norm_hh", "norm_sum", "norm_c")),
    GRUCell: _Loop("gru", ("norm_hh",)),
    RNNCell: _Loop("rnn", ("norm_hh", "norm_sum")),
}


@functools.cache
def _compiled(module: str) -> Any:
    """A module of kernels, imported with numba when the first array comes that it takes."""
    return importlib.import_module(f"portnorm_backends.cpu.{module}")


class LoopResiduals(NamedTuple):
    """What the vjp of the loop needs. Arrays of all steps are (time, batch, …)."""

    params: Params
    lengths: NumPyArray
    h: NumPyArray  # (time + 1, batch, hidden), from the first state on
    c: NumPyArray | None
    gates: NumPyArray
    inner: NumPyArray  # tanh(c), or what the reset gate is multiplied with
    slots: tuple[Any, ...]


def _accepts(
    xs: tuple[Array, ...], state: State, params: Params, *, cell: Any, lengths: Any = None, sequences: bool = True, keep: bool = True
) -> bool:
    """A cell in its plain form or with normalizers of rows or of the batch, on arrays of one type, and at least one step."""
    u = xs[0]
    if type(cell) not in _LOOPS or not set(cell.slots) <= set(_LOOPS[type(cell)].slots) or not _is_known(cell):
        return False
    arrays = (*xs, *state, *params.values())
    if any(type(a) is not numpy.ndarray or a.dtype != u.dtype for a in arrays) or u.dtype not in RANGE:
        return False
    return bool(u.size) and {"weight_hh", *cell.shared()} == set(params) and _fit(u, xs[1:], state, params, cell, lengths)


def _fit(u: NumPyArray, given: tuple[Array, ...], state: State, params: Params, cell: RecurrentCell, lengths: Any) -> bool:
    """Whether all shapes are those that compiled code relies on; it does not look where it reads."""
    if u.ndim != 3 or u.shape[2] % cell.gates:
        return False
    (time, batch, features), size = u.shape, u.shape[2] // cell.gates
    slots = {name: cell.width(name) * size for name in cell.slots}
    return (
        params["weight_hh"].shape == (features, size)
        and all(s.shape == (batch, size) for s in state)
        and all(params[f"{name}.{p}"].shape == (n,) for name, n in slots.items() for p in cell.slots[name].parameters())
        and all(a.shape == (time, slots[name.partition(".")[0]]) for name, a in zip(cell.given(), given, strict=True))
        and (lengths is None or numpy.shape(lengths) == (batch,))
    )


def _is_known(cell: RecurrentCell) -> bool:
    v = cell.variant
    plain = (v.zoneout, v.peepholes, v.clip, v.affine, v.activation) == (0.0, False, None, "shared", "tanh")
    by_batch = v.norm == "batch" and any(slot.normalizes for slot in cell.slots.values())
    known = v.eps_place == "variance" and v.variance != "unbiased" and not (by_batch and ("norm_sum" in cell.slots or not v.timed))
    known = known and cell.reduce is None  # statistics over processes are the definition's
    return plain and known and (type(cell) is not GRUCell or v.reset == "after")


def _slot(cell: RecurrentCell, name: str, xs: tuple[Array, ...], params: Params, batch: int, keep: bool) -> Any:
    """A slot as the kernels take it, with room for what it finds."""
    slot, dtype, size = cell.slots.get(name), xs[0].dtype, params["weight_hh"].shape[1] * cell.width(name)
    idle = _idle(dtype, size)
    if slot is None:
        return idle
    mode, ends, weight, bias, room, rstd, mean, var, *_ = idle
    own = {p: writable(params[f"{name}.{p}"]) for p in slot.parameters()}
    weight, bias, mode = own.get("weight", weight), own.get("bias", bias), SHIFT
    if slot.normalizes:
        time = xs[0].shape[0]
        kept = time if keep else 1
        room = memory.room((kept, batch, size), dtype)
        if not slot.is_batch:
            unit = size // sum(slot.partition)
            ends, mode = numpy.cumsum((0, *slot.partition), dtype=numpy.int64) * unit, ROWS
            rstd = numpy.empty((kept, batch, len(slot.partition)), dtype=dtype)
        else:
            rstd, mode = numpy.empty((kept, 1, size), dtype=dtype), OWN if slot.training else GIVEN
            given = dict(zip(cell.given(), xs[1:], strict=True))
            made = numpy.empty((time, size), dtype=dtype)
            mean, var = (made, made.copy()) if slot.training else (writable(given[f"{name}.{s}"]) for s in ("mean", "var"))
    eps, center = float32_value(cell.variant.eps), cell.variant.norm != "rms"
    return SlotArrays(mode, ends, weight, bias, room, rstd, mean, var, eps, center, *RANGE[dtype])


@functools.lru_cache(maxsize=64)
def _idle(dtype: numpy.dtype[Any], size: int) -> Any:
    """A slot that does nothing. Nobody writes into it."""
    none, ones, zeros = numpy.empty((0, 0, 0), dtype=dtype), numpy.ones(size, dtype=dtype), numpy.zeros(size, dtype=dtype)
    statistics = none.reshape(0, 0)
    ends = numpy.zeros(1, dtype=numpy.int64)
    return SlotArrays(NONE, ends, ones, zeros, none, none, statistics, statistics, 0.0, True, *RANGE[dtype])


def _forward(
    xs: tuple[Array, ...],
    state: State,
    params: Params,
    *,
    cell: Any,
    lengths: Any = None,
    sequences: bool = True,
    keep: bool = True,
) -> tuple[tuple[State, tuple[Array, ...]], Any]:
    u, weights = writable(xs[0]), params["weight_hh"]
    (time, batch, features), size, dtype = u.shape, weights.shape[1], u.dtype
    counts = numpy.zeros(0, dtype=numpy.int64) if lengths is None else numpy.array(lengths, dtype=numpy.int64)
    kept = time if keep else 1
    h, a = _from(state[0], time if keep or (sequences and lengths is None) else 1), memory.aligned((batch, features), dtype)
    y = memory.room((time, batch, size) if sequences and lengths is not None else (0, 0, 0), dtype)
    c = _from(state[1], kept) if len(state) > 1 else None
    slots = tuple(_slot(cell, name, xs, params, batch, keep) for name in _LOOPS[type(cell)].slots)
    unread = not keep and type(cell) is LSTMCell and all(slot.mode <= SHIFT for slot in slots)
    gates, inner = (memory.room((0, 0, 0) if unread else (kept, batch, n), dtype) for n in (features, size))
    packed = _compiled("products").pack(weights.T, slots[0].bias if slots[0].mode == SHIFT else None)
    run: Callable[..., bool] = _compiled(_LOOPS[type(cell)].module).forward
    own: tuple[Any, ...] = slots
    if type(cell) is LSTMCell:
        own = (c, gates, inner, *slots, cell.variant.cell == "copy")
    elif type(cell) is GRUCell:
        own = (gates, inner, *slots)
    ranges, count, fine = _ranges(time, batch, weights, slots), _steps_at_once(batch, weights), []

    def through(first: int, last: int) -> None:
        room = rooms(cell.gates, size, batch, dtype)
        for t in range(0, time, count):
            fine.append(run(t, min(t + count, time), first, last, packed, room, u, counts, a, h, y, *own))

    threads.each(ranges, through)
    if not all(fine):
        return scan.definition(xs, state, params, cell=cell, lengths=lengths, sequences=sequences, keep=keep)
    last = (h[time % h.shape[0]].copy(), *(() if c is None else (c[time % c.shape[0]].copy(),)))
    hidden = () if not sequences else (h[1:],) if lengths is None else (y,)
    residuals = LoopResiduals(params, counts, h, c, gates, inner, slots) if keep else None
    return (last, (*hidden, *_statistics(cell, slots, counts, batch))), residuals


def _ranges(time: int, batch: int, weights: NumPyArray, slots: tuple[Any, ...]) -> list[tuple[int, int]]:
    """The sequences of each thread: all in one where statistics are taken over the batch."""
    apart = all(slot.mode <= ROWS for slot in slots)
    return threads.parts(batch, time * batch * weights.size / _WORTH, _TILE) if apart else [(0, batch)]


def _steps_at_once(batch: int, weights: NumPyArray) -> int:
    return max(1, _AT_ONCE // (batch * weights.size))


def _from(state: NumPyArray, steps: int) -> NumPyArray:
    """Room for a state before and after each of the steps, with the first in its place."""
    room = memory.room((steps + 1, *state.shape), state.dtype)
    room[0] = state
    return room


def _statistics(cell: RecurrentCell, slots: tuple[Any, ...], counts: NumPyArray, batch: int) -> list[NumPyArray]:
    """Mean and variance of each step, by slot, as running averages take them."""
    found = []
    for name, arrays in zip(_LOOPS[type(cell)].slots, slots, strict=True):
        slot: Slot | None = cell.slots.get(name)
        if slot is not None and slot.normalizes and slot.is_batch and slot.training:
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
    params, counts, h, c, gates, inner, slots = residuals
    dstate, dy = cotangents
    weights, (time, batch, _), dtype = params["weight_hh"], gates.shape, h.dtype
    none = numpy.empty((0, 0, 0), dtype=dtype)
    dh, *dothers = (numpy.array(d, dtype=dtype, order="C") for d in dstate)
    given = none if dy is None else writable(dy.astype(dtype, copy=False))
    back, dx = numpy.zeros(dh.shape, dtype=dtype), memory.room(gates.shape, dtype)
    apart = type(cell) is GRUCell or slots[0].mode > SHIFT
    dhidden = memory.room(gates.shape, dtype) if apart else none
    run: Callable[..., None] = _compiled(_LOOPS[type(cell)].module).backward
    own: tuple[Any, ...] = (h, *slots)
    further: tuple[Any, ...] = ()
    if type(cell) is LSTMCell:
        own, further = (*dothers, c, gates, inner, *slots), (cell.variant.cell == "copy",)
    elif type(cell) is GRUCell:
        own = (h, gates, inner, *slots)
    packed, count, shares = _compiled("products").pack(weights), _steps_at_once(batch, weights), list[tuple[Shares, ...]]()

    def through(first: int, last: int) -> None:
        room = rooms(cell.gates, dh.shape[1], batch, dtype)
        parts = tuple(Shares(*numpy.zeros((2, s.weight.size)), *numpy.zeros((2, s.weight.size), dtype=dtype)) for s in slots)
        shares.append(parts)
        for t in range(time, 0, -count):
            run(t, max(t - count, 0), first, last, packed, room, given, counts, back, dh, *own, *parts, dx, dhidden, *further)

    threads.each(_ranges(time, batch, weights, slots), through)
    dh += back
    found = {}
    for name, parts in zip(_LOOPS[type(cell)].slots, zip(*shares, strict=True), strict=True):
        found[f"{name}.weight"], found[f"{name}.bias"] = (sum(getattr(s, d) for s in parts) for d in ("dweight", "dbias"))
    over = dhidden if apart else dx
    return (dx, over, h[:-1]), (dh, *dothers), {name: found[name].astype(params[name].dtype) for name in cell.shared()}


KERNEL = Kernel(
    call=lambda *args, **attrs: _forward(*args, **attrs)[0], forward=_forward, vjp=_vjp, residuals=LoopResiduals, accepts=_accepts
)
