"""What calls of the time loop with the same cell and sizes share: what hangs on those alone, and room for one call after another."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy

from portnorm.cells.cell import RecurrentCell
from portnorm.cells.lstm import LSTMCell
from portnorm.dtypes import float32_value
from portnorm.scan import Params
from portnorm_backends.cpu import memory
from portnorm_backends.cpu.layout import GIVEN, NONE, OWN, ROWS, SHIFT, NumPyArray, Rooms, SlotArrays, idle, rooms, writable
from portnorm_backends.cpu.loops import LOOPS, kernels_of


class Still(NamedTuple):
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
def still_slot(cell: RecurrentCell, name: str, dtype: numpy.dtype[Any], hidden: int) -> Still:
    slot, size = cell.slots.get(name), hidden * cell.width(name)
    still, parts = idle(dtype, size), 0
    if slot is None:
        return Still(still, 0, size, None, None, "", "")
    own, mode, ends = slot.parameters(), SHIFT, still.ends
    if slot.normalizes and not slot.is_batch:
        parts, ends, mode = len(slot.partition), ends_of(slot.partition, size), ROWS
    elif slot.normalizes:
        mode = OWN if slot.training else GIVEN
    still = still._replace(mode=mode, ends=ends, eps=float32_value(cell.variant.eps), center=cell.variant.norm != "rms")
    weight, bias = (f"{name}.{p}" if p in own else None for p in ("weight", "bias"))
    return Still(still, parts, size, weight, bias, f"{name}.mean", f"{name}.var")


def slot_of(still: Still, room: tuple[NumPyArray, NumPyArray], time: int, given: dict[str, Any], params: Params) -> SlotArrays:
    """A slot as the kernels take it, with room for what it finds."""
    mode, ends, weight, bias, _, _, mean, var, eps, center, smallest, largest = still.arrays
    if mode == NONE:
        return still.arrays
    xhat, rstd = room
    weight = weight if still.weight is None else writable(params[still.weight])
    bias = bias if still.bias is None else writable(params[still.bias])
    if mode == OWN:
        mean, var = (numpy.empty((time, still.size), weight.dtype) for _ in range(2))
    elif mode == GIVEN:
        mean, var = writable(given[still.mean]), writable(given[still.var])
    return SlotArrays(mode, ends, weight, bias, xhat, rstd, mean, var, eps, center, smallest, largest)


@functools.lru_cache(maxsize=64)
def ends_of(partition: tuple[int, ...], size: int) -> NumPyArray:
    """Where the parts of a row with statistics of their own begin and end. Nobody writes into it."""
    return numpy.cumsum((0, *partition), dtype=numpy.int64) * (size // sum(partition))


class Room(NamedTuple):
    """What a loop writes beside its result."""

    a: NumPyArray  # (batch, features), the hidden term of a step
    term: NumPyArray  # (1, batch, features), the input term of one
    c: NumPyArray | None  # (steps + 1, batch, hidden)
    gates: NumPyArray
    inner: NumPyArray
    slots: tuple[tuple[NumPyArray, NumPyArray], ...]  # x̂ and 1 / σ
    steps: Rooms


class Sizes:
    """What calls with so many sequences share, whatever their arrays: what hangs on sizes alone, and room for one call after another."""

    def __init__(self, cell: RecurrentCell, batch: int, size: int, dtype: numpy.dtype[Any]) -> None:
        self.cell, self.batch, self.size, self.dtype, self.features = cell, batch, size, dtype, cell.gates * size
        self.slots = tuple(still_slot(cell, name, dtype, size) for name in LOOPS[type(cell)].slots)
        modes = [slot.arrays.mode for slot in self.slots]
        self.plain = type(cell) is LSTMCell and max(modes) <= SHIFT
        """Whether a loop that keeps nothing has no use for gates."""
        self.apart = max(modes) <= ROWS
        """Whether no sequence knows of the others."""
        self.tracked = OWN in modes
        self.none, self.no_lengths = numpy.empty((0, 0, 0), dtype), numpy.zeros(0, numpy.int64)
        """Nobody writes into them, nor can."""
        self.rooms = memory.Turns(lambda: self.room(1, False), batch * self.features * dtype.itemsize)

    def room(self, kept: int, keep: bool) -> Room:
        """New room for so many steps."""
        batch, size, dtype = self.batch, self.size, self.dtype
        a, term = (memory.aligned((*one, batch, self.features), dtype) for one in ((), (1,)))
        c = memory.room((kept + 1, batch, size), dtype) if len(self.cell.states) > 1 else None
        unread = self.plain and not keep
        gates, inner = (self.none if unread else memory.room((kept, batch, n), dtype) for n in (self.features, size))
        return Room(a, term, c, gates, inner, tuple(self._of_slot(slot, kept) for slot in self.slots), self.of_steps(batch))

    def _of_slot(self, slot: Still, kept: int) -> tuple[NumPyArray, NumPyArray]:
        if slot.arrays.mode <= SHIFT:
            return slot.arrays.xhat, slot.arrays.rstd
        lines = (self.batch, slot.arrays.ends.size - 1) if slot.arrays.mode == ROWS else (1, slot.size)
        return memory.room((kept, self.batch, slot.size), self.dtype), numpy.empty((kept, *lines), self.dtype)

    def of_steps(self, sequences: int) -> Rooms:
        """Zeroed room for the steps of so many of them."""
        product = kernels_of("products").product_of(sequences, self.size, self.dtype)
        over_batch = 0 if self.apart else kernels_of("slots").over_batch(self.dtype)
        return rooms(self.cell.gates, self.size, self.batch, self.dtype, product, over_batch)


sizes_of = functools.lru_cache(maxsize=64)(Sizes)
