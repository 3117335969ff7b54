"""Tiles of a matrix product, which stay in the registers while their sums run; made of LLVM vectors (Goto & van de Geijn 2008).

A tile is some rows of y in the columns of one panel of w, `2 · lanes` of them. Each term of its sums takes two vectors of w, which all its
rows use, and one value of x for each row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from portnorm_backends.cpu.places import Memory, ask, mask_of, opaque, splat
from portnorm_backends.cpu.registers import WIDTH
from portnorm_backends.cpu.vectors import Vector, fused

HEIGHTS = {64: (12, 8, 4), 32: (6, 4)}.get(WIDTH, (4,))
"""Rows of the tiles that fit into the registers of such a processor."""

VECTORS = 2
"""Vectors beside each other in a panel."""

SHARES = 4
"""Tiles of a panel that each ask for a part of the next one."""

_AT_ONCE = 4
"""Terms of the sums in one round of their loop, so that its bookkeeping does not keep the processor from multiplying."""

_THIRD = 3
"""Rows that share an address: of each row its own, there would not be registers enough, and time would go into adding them up."""

_Place = Callable[[int, int], Any]


def columns_of(itemsize: int) -> int:
    """Of a panel."""
    return VECTORS * WIDTH // itemsize


def tile(rows: int, panels: int, *, turned: bool = False) -> Any:
    """`tile(x, packed, y, i, p, start, stop, origin, following, adds)`: of y[i : i + rows], in the columns of panels p … p + panels − 1,
    Σ over k in start … stop − 1 and the shift, or where it `adds` what is there, which comes last: so a sum of many terms is one of sums of
    fewer, whose rounding does not grow with their number. x begins with column `origin`. Ask for what stands at `following` in `packed`,
    unless that is 0.

    `turned`: x is (parts, k, rows), and has the values that a term takes beside each other.
    """

    @intrinsic  # type: ignore[untyped-decorator, unused-ignore]
    def tile(
        typing: Any, x: Any, packed: Any, y: Any, i: Any, p: Any, start: Any, stop: Any, origin: Any, following: Any, adds: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            arrays = [context.make_array(t)(context, builder, v) for t, v in zip(signature.args[:3], args[:3], strict=True)]
            size, (i, p, start, stop, origin, following, adds) = x.dtype.bitwidth // 8, args[3:]
            value, index, lanes = context.get_value_type(x.dtype), ir.IntType(64), WIDTH // size
            memory, many = Memory(builder, ir.VectorType(value, lanes), size), builder.mul

            def n(number: int) -> Any:
                return ir.Constant(index, number)

            length, width, columns = builder.extract_value(arrays[0].shape, 1), builder.extract_value(arrays[2].shape, 1), columns_of(size)
            of_x = builder.gep(arrays[0].data, [builder.sub(many(i, length), many(origin, n(rows if turned else 1)))])
            panel = many(builder.extract_value(arrays[1].shape, 1), n(columns))
            of_w, of_next = builder.gep(arrays[1].data, [many(p, panel)]), arrays[1].data
            of_y = builder.gep(arrays[2].data, [builder.add(many(i, width), many(p, n(columns)))])
            left = builder.sub(width, many(p, n(columns)))
            beside = [(q, v) for q in range(panels) for v in range(VECTORS)]
            masks = {(q, v): mask_of(builder, builder.sub(left, n(q * columns + v * lanes)), lanes) for q, v in beside}
            keys = [(r, q, v) for r in range(rows) for q, v in beside]
            places = {(r, q, v): memory.at(of_y, builder.add(many(n(r), width), n(q * columns + v * lanes))) for r, q, v in keys}
            for place in places.values():  # it is written to when the sums are done
                ask(builder, place)
            shifts = {(q, v): memory.load(memory.at(of_w, builder.add(many(n(q), panel), n(v * lanes)))) for q, v in beside}
            if not turned:
                rows_at = [opaque(builder, builder.gep(of_x, [many(n(r), length)])) for r in range(0, rows, _THIRD)]
                offsets = [opaque(builder, many(n(j), length)) for j in range(min(_THIRD, rows))]

            def values_from(k: Any) -> _Place:
                """Where the value of a row is, so many terms after k."""
                if turned:
                    line = many(k, n(rows))
                    return lambda r, more: builder.gep(of_x, [builder.add(line, n(more * rows + r))])
                between = [builder.add(k, offset) for offset in offsets]
                return lambda r, more: builder.gep(rows_at[r // _THIRD], [builder.add(between[r % _THIRD], n(more))])

            def multiplied(k: Any, count: int, sums: dict[Any, Any]) -> dict[Any, Any]:
                """The sums with `count` more terms, from k on."""
                value_of = values_from(k)
                if count == _AT_ONCE and not turned:
                    with builder.if_then(builder.icmp_signed(">", following, n(0))):
                        asked = builder.add(following, many(builder.sub(k, start), n(columns // SHARES)))
                        for line in range(0, columns * size, 64):
                            ask(builder, memory.at(of_next, builder.add(asked, n(line // size))), 2)
                for more in range(count):
                    w = {}
                    for q, v in beside:
                        offset = builder.add(builder.add(many(n(q), panel), many(builder.add(k, n(1 + more)), n(columns))), n(v * lanes))
                        w[q, v] = memory.load(memory.at(of_w, offset))
                    for r in range(rows):
                        one = Vector(builder, (splat(builder, builder.load(value_of(r, more)), lanes),))
                        for q, v in beside:
                            sums[r, q, v] = fused(Vector(builder, (w[q, v],)), one, Vector(builder, (sums[r, q, v],))).value
                return sums

            def summed(start: Any, step: int, sums: dict[Any, Any]) -> tuple[Any, dict[Any, Any]]:
                """As many terms from `start` on as come in whole steps: where it ends, and the sums."""
                entry, head, body, end = (builder.block, *(builder.append_basic_block() for _ in range(3)))
                builder.branch(head)
                builder.position_at_end(head)
                k, before = builder.phi(index), {key: builder.phi(memory.vector) for key in keys}
                builder.cbranch(builder.icmp_signed("<=", builder.add(k, n(step)), stop), body, end)
                builder.position_at_end(body)
                after = multiplied(k, step, dict(before))
                for phi, first, then in ((k, start, builder.add(k, n(step))), *((before[key], sums[key], after[key]) for key in keys)):
                    phi.add_incoming(first, entry)
                    phi.add_incoming(then, builder.block)
                builder.branch(head)
                builder.position_at_end(end)
                return k, before

            def with_found(sums: dict[Any, Any]) -> dict[Any, Any]:
                """The sums, and where the tile adds to what is there that too."""
                entry, again, ready = builder.block, builder.append_basic_block(), builder.append_basic_block()
                builder.cbranch(follows, again, ready)
                builder.position_at_end(again)
                other = {key: builder.fadd(sums[key], memory.load(places[key], masks[key[1:]])) for key in keys}
                builder.branch(ready)
                builder.position_at_end(ready)
                either = {key: builder.phi(memory.vector) for key in keys}
                for key, phi in either.items():
                    phi.add_incoming(sums[key], entry)
                    phi.add_incoming(other[key], again)
                return either

            follows, zero = builder.icmp_signed("!=", adds, ir.Constant(adds.type, 0)), ir.Constant(memory.vector, None)
            k, sums = summed(start, _AT_ONCE, {key: builder.select(follows, zero, shifts[key[1:]]) for key in keys})
            _, sums = summed(k, 1, sums)
            sums = with_found(sums)
            for key in keys:
                memory.store(sums[key], places[key], masks[key[1:]])
            return context.get_dummy_value()

        return types.void(x, packed, y, *[types.int64] * 6, types.boolean), generate

    return tile
