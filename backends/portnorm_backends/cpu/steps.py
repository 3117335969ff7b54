"""One step of few sequences after another, as in a stream: what sizes and parameters settle is settled once, and Python's part of a step is
to say where its values lie.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy

from portnorm.arrays import Array
from portnorm.cells.cell import RecurrentCell
from portnorm.quantization import SCHEMES, is_rounding_moved
from portnorm.scan import Params, State
from portnorm_backends.cpu import integers, memory
from portnorm_backends.cpu.input_terms import normalizer
from portnorm_backends.cpu.layout import SHIFT, NumPyArray, Terms, taken
from portnorm_backends.cpu.loops import LOOPS, accepts_inputs, kernels_of, of_cell
from portnorm_backends.cpu.sizes import Room, sizes_of, slot_of

Step = Callable[[NumPyArray, tuple[NumPyArray, ...]], tuple[NumPyArray, ...] | None]
"""Of `x` (1, batch, inputs) and the state, the state after it; `None` where that is the definition's, as a variance left its range."""

Multiply = Callable[[NumPyArray, NumPyArray], None]
"""Writes the product of its first argument with a weight, and a shift, into its second."""


def of_one_step(x: NumPyArray, params: Params, loop: Params, *, cell: Any) -> Step | None:
    """What computes one step of few sequences after another; `None` for more, and for parameters that would have to be copied."""
    products, (time, batch, _), dtype = kernels_of("products"), x.shape, x.dtype
    weights = params["weight_ih"], loop["weight_hh"]
    read = [p for p in (*params.values(), *loop.values()) if cell.quantize is None or p.ndim == 1]
    if time != 1 or (batch > products.FEW and cell.quantize is None) or not all(p.flags.carray for p in read):
        return None
    features, size = weights[1].shape
    sizes = sizes_of(_of_numbers(cell), batch, size, dtype)
    hidden = sizes.slots[0]
    shift = loop[hidden.bias] if hidden.bias is not None and hidden.arrays.mode == SHIFT else None
    outside, inside = _multiply(weights[0], params.get("bias"), cell, None), _multiply(weights[1], shift, cell, cell.h_bound)
    normalize = None if cell.input_slot is None else normalizer(params, cell, dtype, features)
    function, entry = kernels_of(LOOPS[type(cell)].module).forward, kernels_of("compiling").entry

    # With the gains and shifts themselves, which are read in every step: what is made later is room alone.
    slots = [slot_of(still, place, 1, {}, loop) for still, place in zip(sizes.slots, sizes.room(1, False).slots, strict=True)]

    def make() -> tuple[Room, NumPyArray, tuple[Any, ...]]:
        made, h = sizes.room(1, False), memory.aligned((2, batch, size), dtype)
        in_room = tuple([slot._replace(xhat=xhat, rstd=rstd) for slot, (xhat, rstd) in zip(slots, made.slots, strict=True)])
        steps = (products.nothing(dtype), made.steps, Terms(made.term, 0, 0), sizes.no_lengths, made.a, h, sizes.none)
        return made, h, (0, 1, 0, batch, *steps, *of_cell(cell, made.c, made.gates, made.inner, in_room))

    rooms = memory.Turns(make, batch * features * dtype.itemsize)
    loops = entry(function, dtype, make()[2])

    def step(x: NumPyArray, state: tuple[NumPyArray, ...]) -> tuple[NumPyArray, ...] | None:
        if cell.quantize is not None and is_rounding_moved():
            return None
        own = rooms.take()
        made, h, arguments = own
        h[0] = state[0]
        c, term = made.c, made.term[0]
        if c is not None:
            c[0] = state[1]
        outside(x[0] if x.flags.carray else taken(x, dtype, x.shape)[0], term)
        inside(h[0], made.a)
        fine = (normalize is None or normalize(term)) and loops(*arguments)
        after = (h[1].copy(),) if c is None else (h[1].copy(), c[1].copy())
        rooms.give(own)
        return after if fine else None

    return step


def _multiply(weight: NumPyArray, shift: NumPyArray | None, cell: RecurrentCell, bound: float | None) -> Multiply:
    """With the weight as it lies, or with its integers where the cell is to `quantize`; what is multiplied lies within the `bound`."""
    if cell.quantize is None:
        from_rows: Multiply = kernels_of("products").from_rows(weight, shift)
        return from_rows
    into = integers.into(weight, bound)
    if shift is None:
        return into

    def multiply(x: NumPyArray, y: NumPyArray) -> None:
        into(x, y)
        numpy.add(y, shift, out=y)

    return multiply


@functools.lru_cache(maxsize=64)
def _of_numbers(cell: RecurrentCell) -> RecurrentCell:
    """The cell whose products are those of the numbers themselves."""
    return dataclasses.replace(cell, quantize=None)


def take_integers(x: Any, params: Params, state: State, loop: Params, *, cell: Any, lengths: Any = None, sequences: bool = True) -> bool:
    """Whether `integers_in_turn` takes the call: products of integers for few sequences, with weights whose integers are known."""
    if cell.quantize is None or lengths is not None or x.dtype != numpy.float32:
        return False
    block = SCHEMES[cell.quantize].inputs.block
    weights = (params["weight_ih"], None), (loop["weight_hh"], cell.h_bound)
    known = all(integers.take(weight, x.shape[1], bound, block) for weight, bound in weights)
    return known and accepts_inputs(x, params, state, loop, cell=_of_numbers(cell))


def integers_in_turn(
    x: NumPyArray, params: Params, state: State, loop: Params, *, cell: Any, sequences: bool
) -> tuple[tuple[State, tuple[Array, ...]], None] | None:
    """`linear_scan` step by step; `None` where a variance left its range."""
    step = of_one_step(x[:1], params, loop, cell=cell)
    if step is None:
        return None
    h = memory.room((len(x), *state[0].shape), x.dtype) if sequences else None
    for t in range(len(x)):
        after = step(x[t : t + 1], state)
        if after is None:
            return None
        state = after
        if h is not None:
            h[t] = state[0]
    return (state, () if h is None else (h,)), None
