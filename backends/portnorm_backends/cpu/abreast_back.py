"""Backward of `abreast`: short rows, as many at once as a register has lanes, each in a register or two as it lies.

What a row needs of all others of its values are two sums. A sum goes over the lanes of a register, and a tree of additions makes those of
all rows at once: two registers with the terms of two rows become one, half of whose lanes are of the first row and half of the second,
and so on, until each lane has the sum of a row. That takes one addition and two shuffles for a row, where a sum alone takes four of each.
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

from portnorm_backends.cpu.compiling import bare, compiled, copy, fill, row_of
from portnorm_backends.cpu.places import BITS, INDEX, Bits, Memory, ask, computed, exchange, mask_of, splat
from portnorm_backends.cpu.registers import WIDTH
from portnorm_backends.cpu.rowwise import backward_of
from portnorm_backends.cpu.sums import GROUP, carry
from portnorm_backends.cpu.vectors import Vector, fused, product

_AHEAD = 4
"""Blocks of rows between the one that is read and the one that is asked for."""


def _summed(builder: Any, terms: Callable[[int], tuple[Any, ...]], first: int, count: int) -> tuple[Any, ...]:
    """For each of what `terms(k)` gives: in lane k, or with a period of `count` lanes, the sum of the register of row `first` + k."""
    if count == 1:
        return terms(first)
    half = count // 2
    parts = _summed(builder, terms, first, half), _summed(builder, terms, first + half, half)
    lower, upper = exchange(parts[0][0].type.count, half)
    return tuple(
        builder.fadd(builder.shuffle_vector(a, b, lower), builder.shuffle_vector(a, b, upper)) for a, b in zip(*parts, strict=True)
    )


def _block(registers: int) -> Any:
    """`block(x, dy, gains, kept, shares, dx, r, center)`: dx of as many rows from r on as a register has lanes.

    Rows have at most so many registers of values. `shares` (2, n) gets the sums of dy · x̂ and of dy too.
    """

    @intrinsic  # type: ignore[untyped-decorator, unused-ignore]
    def block(typing: Any, x: Any, dy: Any, gains: Any, kept: Any, shares: Any, dx: Any, r: Any, center: Any) -> Any:
        dtype = computed(x.dtype)
        size = dtype.bitwidth // 8
        lanes = WIDTH // size

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            arrays = [context.make_array(t)(context, builder, a) for t, a in zip(signature.args[:6], args[:6], strict=True)]
            of_x, of_dy, of_gains, of_kept, of_shares, of_dx = arrays
            value = context.get_value_type(dtype)
            made = Memory(builder, ir.VectorType(value, lanes), size)
            stored = (Bits if x.dtype == BITS else Memory)(
                builder, ir.VectorType(context.get_value_type(x.dtype), lanes), x.dtype.bitwidth // 8
            )
            n = builder.extract_value(of_x.shape, 1)

            def number(k: int) -> Any:
                return ir.Constant(INDEX, k)

            masks = [mask_of(builder, builder.sub(n, number(j * lanes)), lanes) for j in range(registers)]

            def along(memory: Memory, start: Any, j: int) -> Vector:
                return Vector(builder, (memory.load(memory.at(start, number(j * lanes)), masks[j]),))

            def start_of(array: Any, index: Any) -> Any:
                byte = builder.bitcast(array.data, ir.IntType(8).as_pointer())
                place = builder.gep(byte, [builder.mul(index, builder.extract_value(array.strides, 0))])
                return builder.bitcast(place, array.data.type)

            def share_at(j: int, which: int) -> Any:
                return made.at(of_shares.data, builder.add(number(j * lanes), builder.mul(number(which), n)))

            own = [along(made, of_gains.data, j) for j in range(registers)]
            totals = [[Vector(builder, (made.load(share_at(j, which), masks[j]),)) for which in range(2)] for j in range(registers)]
            nothing = ir.Constant(made.vector, None)

            factors = [start_of(of_kept, builder.add(args[6], number(k))) for k in range(lanes)]
            kept_xhat = [[cgutils.alloca_once(builder, made.vector) for _ in range(registers)] for _ in range(lanes)]

            def kept_of(k: int, which: int) -> Vector:
                return Vector(builder, (splat(builder, builder.load(builder.gep(factors[k], [number(which)])), lanes),))

            def terms(k: int) -> tuple[Any, ...]:
                place, (m, d, factor) = builder.add(args[6], number(k)), (kept_of(k, which) for which in range(3))
                sums: tuple[Vector, Vector] | None = None
                for j in range(registers):
                    for array in (of_x, of_dy, of_dx):
                        start = start_of(array, builder.add(place, number(_AHEAD * lanes)))
                        ask(builder, builder.gep(start, [number(j * lanes)]))
                    values, given = (along(stored, start_of(array, place), j) for array in (of_x, of_dy))
                    xhat = Vector(builder, (builder.select(masks[j], (((values - m) - d) * factor).value, nothing),))
                    builder.store(xhat.value, kept_xhat[k][j])
                    totals[j] = [fused(given, xhat, totals[j][0]), totals[j][1] + given]
                    g = given * own[j]
                    sums = (g, product(g, xhat)) if sums is None else (sums[0] + g, fused(g, xhat, sums[1]))
                assert sums is not None
                return sums[0].value, sums[1].value

            sums = _summed(builder, terms, 0, lanes)
            for j in range(registers):
                for which in range(2):
                    made.store(totals[j][which].value, share_at(j, which), masks[j])
            count = splat(builder, builder.sitofp(n, value), lanes)
            shift, slope = (builder.fdiv(total, count) for total in sums)
            shift = builder.select(builder.icmp_signed("!=", args[7], ir.Constant(args[7].type, 0)), shift, nothing)
            means = [cgutils.alloca_once(builder, made.vector) for _ in range(2)]
            for place, mean in zip(means, (shift, slope), strict=True):
                builder.store(mean, place)
            starts = [builder.bitcast(place, value.as_pointer()) for place in means]
            for k in range(lanes):
                a, b = (Vector(builder, (splat(builder, builder.load(builder.gep(start, [number(k)])), lanes),)) for start in starts)
                place, factor = builder.add(args[6], number(k)), kept_of(k, 2)
                for j in range(registers):
                    given, xhat = along(stored, start_of(of_dy, place), j), Vector(builder, (builder.load(kept_xhat[k][j]),))
                    found = factor * ((given * own[j] - a) - xhat * b)
                    stored.store(found.value, stored.at(start_of(of_dx, place), number(j * lanes)), masks[j])
            return context.get_dummy_value()

        return types.void(x, dy, gains, kept, shares, dx, types.int64, types.boolean), generate

    return block


_one, _two = _block(1), _block(2)


def _backward(x: Any, dy: Any, kept: Any, dx: Any, part: Any, dweight: Any, dbias: Any, weight: Any, center: bool) -> bool:
    """`rowwise._backward` of rows that fit into two registers, with a gain and a shift for each value, or none."""
    x, dy, weight, kept, dx, dweight, dbias = bare(x), bare(dy), bare(weight), bare(kept), bare(dx), bare(dweight), bare(dbias)
    fill(dweight.reshape(dweight.size), 0)
    fill(dbias.reshape(dbias.size), 0)
    n, rows, lanes = x.shape[1], x.shape[0], WIDTH // kept.itemsize
    gains, shares = numpy.ones(n, kept.dtype), numpy.zeros((2, n), kept.dtype)
    if weight.size:
        copy(weight[0], gains)
    whole = rows // lanes * lanes
    for r in range(0, whole, lanes):
        _either(x, dy, gains, kept, shares, dx, r, center)
        if (r + lanes) % GROUP == 0:
            _carried(shares, dweight, dbias)
    if whole < rows:  # with rows of zeros to make a whole
        last_x, last_dy, last_kept = numpy.zeros((lanes, n), x.dtype), numpy.zeros((lanes, n), x.dtype), numpy.zeros((lanes, 3), kept.dtype)
        made = numpy.empty((lanes, n), x.dtype)
        for r in range(whole, rows):
            copy(row_of(x, r), last_x[r - whole])
            copy(row_of(dy, r), last_dy[r - whole])
            copy(kept[r], last_kept[r - whole])
        _either(last_x, last_dy, gains, last_kept, shares, made, 0, center)
        for r in range(whole, rows):
            copy(made[r - whole], row_of(dx, r))
    _carried(shares, dweight, dbias)
    return True


@compiled(inner=True)
def _either(x: Any, dy: Any, gains: Any, kept: Any, shares: Any, dx: Any, r: int, center: bool) -> None:
    if x.shape[1] * kept.itemsize <= WIDTH:
        _one(bare(x), bare(dy), bare(gains), kept, bare(shares), bare(dx), r, center)
    else:
        _two(bare(x), bare(dy), bare(gains), kept, bare(shares), bare(dx), r, center)


@compiled(inner=True)
def _carried(shares: Any, dweight: Any, dbias: Any) -> None:
    if dweight.size:
        carry(dweight[0, 0], dweight[1, 0], shares[0])
    if dbias.size:
        carry(dbias[0, 0], dbias[1, 0], shares[1])


def fits(n: int, itemsize: int) -> bool:
    """Whether two registers have room for such a row."""
    return n * itemsize <= 2 * WIDTH


@functools.cache
def backward(dtype: numpy.dtype[Any]) -> Callable[..., bool]:
    """`rowwise.backward` for rows that fit."""
    return backward_of(_backward, dtype)
