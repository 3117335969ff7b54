"""One step of few sequences after another, as in a stream: what sizes and parameters settle is settled once, and Python's part of a step is
to say where its values lie.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from portnorm.arrays import Array
from portnorm.scan import Params, State
from portnorm_backends.cpu import memory
from portnorm_backends.cpu.input_terms import normalizer
from portnorm_backends.cpu.layout import SHIFT, NumPyArray, Terms, taken
from portnorm_backends.cpu.loops import LOOPS, kernels_of, of_cell
from portnorm_backends.cpu.sizes import Room, sizes_of, slot_of


def again(
    x: Array, params: Params, state: State, loop: Params, *, cell: Any, **attrs: Any
) -> Callable[[NumPyArray, tuple[NumPyArray, ...]], tuple[NumPyArray, ...] | None] | None:
    """What computes one step of few sequences after another: a function of `x` (1, batch, inputs) and the state to the state after it;
    `None` where a variance left its range.
    """
    products, (time, batch, _), dtype = kernels_of("products"), x.shape, x.dtype
    weight_ih, weight_hh = params["weight_ih"], loop["weight_hh"]
    if time != 1 or batch > products.FEW or not all(p.flags.carray for p in (*params.values(), *loop.values())):
        return None
    sizes, bias, size = sizes_of(cell, batch, weight_hh.shape[1], dtype), params.get("bias"), weight_ih.shape[0]
    normalize = None if cell.input_slot is None else normalizer(params, cell, dtype, size)
    direct, outside = products.compiled_for("direct", dtype), products.shift_of(bias, size, dtype)
    shifts = sizes.slots[0].arrays.mode == SHIFT
    inside = products.shift_of(loop[sizes.slots[0].bias] if shifts and sizes.slots[0].bias else None, size, dtype)
    function, entry = kernels_of(LOOPS[type(cell)].module).forward, kernels_of("compiling").entry

    def make() -> tuple[Room, NumPyArray, tuple[Any, ...]]:
        made, h = sizes.room(1, False), memory.aligned((2, batch, sizes.size), dtype)
        slots = tuple([slot_of(still, place, 1, {}, loop) for still, place in zip(sizes.slots, made.slots, strict=True)])
        steps = (products.nothing(dtype), made.steps, Terms(made.term, 0, 0), sizes.no_lengths, made.a, h, sizes.none)
        return made, h, (0, 1, 0, batch, *steps, *of_cell(cell, made.c, made.gates, made.inner, slots))

    rooms = memory.Turns(make, batch * size * dtype.itemsize)
    loops = entry(function, dtype, make()[2])

    def step(x: NumPyArray, state: tuple[NumPyArray, ...]) -> tuple[NumPyArray, ...] | None:
        own = rooms.take()
        made, h, arguments = own
        h[0] = state[0]
        c, term = made.c, made.term[0]
        if c is not None:
            c[0] = state[1]
        direct(x[0] if x.flags.carray else taken(x, dtype, x.shape)[0], weight_ih, outside, term)
        direct(h[0], weight_hh, inside, made.a)
        fine = (normalize is None or normalize(term)) and loops(*arguments)
        after = (h[1].copy(),) if c is None else (h[1].copy(), c[1].copy())
        rooms.give(own)
        return after if fine else None

    return step
