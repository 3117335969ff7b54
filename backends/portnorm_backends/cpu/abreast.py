"""Normalization of short rows, many at once: of a row that hardly fills one register the loops over it are most of the work.

Sums are taken of as many rows as a register has lanes. These are turned, so that a register holds one value of each, and every sum goes
from register to register. What a row becomes hangs on its own values alone, whatever rows are beside it.

One thing is done for all rows at hand before the next: what is read from memory just after it was written is waited for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from portnorm_backends.cpu.compiling import bare, compiled, copy
from portnorm_backends.cpu.places import BITS, INDEX, Bits, Memory, ask, computed, mask_of, transposed
from portnorm_backends.cpu.registers import WIDTH
from portnorm_backends.cpu.rowwise import forward_of, normalized
from portnorm_backends.cpu.vectors import Vector, across, folded, fused

_ROOM = 128
"""Registers of values that are turned before the first of them is read again."""


_FAR = 2**20
"""Bytes of rows from which those of the next turn are asked for: fewer are in a near cache."""


# -- rows as columns ---------------------------------------------------------------------------------------------------------------------


@compiled(inner=True)
def _room(x: Any, dtype: Any) -> Any:
    """Room for turned rows of `x` (blocks, values, lanes), and for four numbers of each (4, rows), which begin as 0.

    Both begin with a cache line.
    """
    lanes = WIDTH // max(4, x.itemsize)
    high = -(-x.shape[1] // lanes) * lanes
    blocks = _ROOM // high
    many, few = blocks * high * lanes, 4 * blocks * lanes
    room = numpy.zeros(many + few + lanes, dtype)
    start = -(room.ctypes.data // room.itemsize) % lanes
    return room[start : start + many].reshape((blocks, high, lanes)), room[start + many : start + many + few].reshape((4, blocks * lanes))


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def _turned(typing: Any, x: Any, r: Any, t: Any) -> Any:
    """t[j, k] = x[r + k, j] for as many rows as a row of `t` is long; the last row again where there are fewer.

    `t` is contiguous, with a whole number of blocks as high as wide; below the values of a row it gets zeros.
    """
    dtype = computed(x.dtype)
    lanes = WIDTH // (dtype.bitwidth // 8)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        matrix, out = context.make_array(x)(context, builder, args[0]), context.make_array(t)(context, builder, args[2])
        vector = ir.VectorType(context.get_value_type(x.dtype), lanes)
        given = (Bits if x.dtype == BITS else Memory)(builder, vector, x.dtype.bitwidth // 8)
        made = Memory(builder, ir.VectorType(context.get_value_type(dtype), lanes), dtype.bitwidth // 8)
        rows, n = (builder.extract_value(matrix.shape, k) for k in range(2))
        stride, last = builder.extract_value(matrix.strides, 0), builder.sub(rows, ir.Constant(INDEX, 1))
        starts = []
        for k in range(lanes):
            row = builder.add(args[1], ir.Constant(INDEX, k))
            row = builder.select(builder.icmp_signed("<", row, last), row, last)
            place = builder.gep(builder.bitcast(matrix.data, ir.IntType(8).as_pointer()), [builder.mul(row, stride)])
            starts.append(builder.bitcast(place, matrix.data.type))

        def block(j: Any) -> None:
            mask = mask_of(builder, builder.sub(n, j), lanes)
            columns = transposed(builder, [given.load(given.at(start, j), mask) for start in starts])
            for k, column in enumerate(columns):
                place = builder.mul(builder.add(j, ir.Constant(INDEX, k)), ir.Constant(INDEX, lanes))
                made.store(column, made.at(out.data, place))

        _blocks(builder, n, lanes, block)
        return context.get_dummy_value()

    return types.void(x, types.int64, t), generate


def _blocks(builder: Any, n: Any, step: int, body: Callable[[Any], None]) -> None:
    """`body(j)` for j = 0, step, … below n, of which there is at least one."""
    inside, end, entry = builder.append_basic_block(), builder.append_basic_block(), builder.block
    builder.branch(inside)
    builder.position_at_end(inside)
    j = builder.phi(INDEX)
    j.add_incoming(ir.Constant(INDEX, 0), entry)
    body(j)
    after = builder.add(j, ir.Constant(INDEX, step))
    j.add_incoming(after, builder.block)
    builder.cbranch(builder.icmp_signed("<", after, n), inside, end)
    builder.position_at_end(end)


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def _asked(typing: Any, x: Any, start: Any, stop: Any) -> Any:
    """Ask for the memory of the rows from `start` to before `stop`, which are next: the processor does not look so far ahead."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        matrix, byte = context.make_array(x)(context, builder, args[0]), ir.IntType(8).as_pointer()
        stride, first = builder.extract_value(matrix.strides, 0), builder.bitcast(matrix.data, byte)
        size = builder.mul(builder.extract_value(matrix.shape, 1), matrix.itemsize)
        with cgutils.for_range_slice(builder, args[1], args[2], ir.Constant(INDEX, 1)) as (r, _):
            row = builder.gep(first, [builder.mul(r, stride)])
            _blocks(builder, size, 64, lambda line: ask(builder, builder.gep(row, [line])))
        return context.get_dummy_value()

    return types.void(x, types.int64, types.int64), generate


# -- statistics and results ----------------------------------------------------------------------------------------------------------------


def _mean(total: Vector, first: Vector, n: Vector) -> tuple[Vector]:
    return (first + total / n,)


@folded(1, _mean)
def _means(x: Vector, first: Vector, n: Vector, total: Vector) -> tuple[Vector]:
    return (total + (x - first),)


def _spread(total: Vector, squares: Vector, m: Vector, n: Vector, eps: Vector) -> tuple[Vector, Vector, Vector]:
    d = total / n
    spread = squares / n - d * d + eps
    return d, spread, 1.0 / spread.root()


@folded(2, _spread)
def _spreads(x: Vector, m: Vector, n: Vector, eps: Vector, total: Vector, squares: Vector) -> tuple[Vector, Vector]:
    z = x - m
    return total + z, fused(z, z, squares)


def _size(squares: Vector, n: Vector, eps: Vector) -> tuple[Vector, Vector]:
    spread = squares / n + eps
    return spread, 1.0 / spread.root()


@folded(1, _size)
def _sizes(x: Vector, n: Vector, eps: Vector, squares: Vector) -> tuple[Vector]:
    return (fused(x, x, squares),)


_normalized = across(normalized)


@compiled(inner=True)
def _statistics(x: Any, r: int, center: bool, eps: float, t: Any, found: Any, y: Any) -> None:
    """m, d, σ² + ε and 1 / √(σ² + ε) of the rows from r on, `found` (4, rows); as in `rowwise`.

    The rows after them are asked for, and the room of their results in `y`: few at a time, since many would be waited for.
    The first guess of a mean is that of the whole row: nothing is left to a second.
    """
    wide, n, lanes = x.shape[1], float(x.shape[1]), t.shape[2]
    blocks = range(min(t.shape[0], -(-(x.shape[0] - r) // lanes)))
    last = x.shape[0] if x.size * x.itemsize >= _FAR else 0
    for b in blocks:
        _turned(x, r + b * lanes, t[b])
        start = r + (t.shape[0] + b) * lanes
        _asked(x, start, min(start + lanes, last))
        _asked(y, start, min(start + lanes, last))
    if center:
        for b in blocks:
            _means(wide, (t[b],), (t[b, 0], n), (found[0, b * lanes : (b + 1) * lanes],))
        for b in blocks:
            own = found[:, b * lanes : (b + 1) * lanes]
            _spreads(wide, (t[b],), (own[0], n, eps), (own[1], own[2], own[3]))
    else:
        for b in blocks:
            own = found[:, b * lanes : (b + 1) * lanes]
            _sizes(wide, (t[b],), (n, eps), (own[2], own[3]))


def _each(
    x: Any, y: Any, kept: Any, weight: Any, bias: Any, turns: int, eps: float, center: bool, smallest: float, largest: float, past: bool
) -> bool:
    x, weight, bias, y, kept = bare(x), bare(weight), bare(bias), bare(y), bare(kept)
    t, found = _room(x, kept.dtype)
    gains, shifts = numpy.ones(x.shape[1], kept.dtype), numpy.zeros(x.shape[1], kept.dtype)
    copy(weight, gains)
    copy(bias, shifts)
    return _forward(x, gains, shifts, eps, center, smallest, largest, y, kept, t, found)


@compiled(inner=True)
def _forward(
    x: Any, gains: Any, shifts: Any, eps: float, center: bool, smallest: float, largest: float, y: Any, kept: Any, t: Any, found: Any
) -> bool:
    gains, shifts, t, found = bare(gains), bare(shifts), bare(t), bare(found)
    rows, many, fine = x.shape[0], found.shape[1], True
    for r in range(0, rows, many):
        count = min(many, rows - r)
        _statistics(x, r, center, eps, t, found, y)
        _normalized((x[r : r + count],), (gains, shifts), (found[0], found[1], found[3]), (y[r : r + count],))
        for i in range(count):
            if not (smallest < found[2, i] < largest):
                fine = False
            if kept.size:
                kept[r + i, 0], kept[r + i, 1], kept[r + i, 2] = found[0, i], found[1, i], found[3, i]
    return fine


@functools.cache
def forward(dtype: numpy.dtype[Any]) -> Callable[..., bool]:
    """`rowwise.forward` for rows of at most `layout.SHORT` values, with `turns` 1."""
    return forward_of(_each, dtype)
