"""Matrix products y = x · w with many x and one w, which is packed once; compiled by numba from LLVM vectors.

The product of a recurrent step is too small for a BLAS to pay for its own packing, which it does again in every step. Here w (k, n) is laid
out in panels of `2 · lanes` columns, each panel a contiguous (k, columns): a tile of y, some rows of one panel, stays in registers while k
runs; each k loads two vectors of w, which all rows of the tile use, and one value of x per row (Goto & van de Geijn 2008, without the
packing of x, whose rows are few). One or two rows would wait for their sums, so they take several panels at once.

The sum over k is taken in its order, in blocks whose panel stays in the nearest cache.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
import numpy
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from portnorm_backends.rowwise import bare, compiled


def _register() -> tuple[int, tuple[int, ...]]:
    """Bytes of a vector register of this processor, and the heights of tiles that fit into its registers, a multiple of each other or not."""
    features = llvmlite.binding.get_host_cpu_features()
    if features.get("avx512f"):
        return 64, (12, 8, 4)
    if features.get("avx"):
        return 32, (6, 4)
    return 16, (8, 4) if features.get("neon") else (4,)


_BYTES, _HEIGHTS = _register()
_VECTORS = 2
"""Vectors beside each other in a panel."""

_PANEL = 2**15
"""Bytes of the part of a panel that is read again and again."""


def _columns(itemsize: int) -> int:
    return _VECTORS * _BYTES // itemsize


def _tile(rows: int, panels: int) -> Any:
    """`tile(x, packed, y, i, p, start, stop)`: y[i : i + rows] of the columns of panels p … p + panels − 1 gets, or with start > 0 adds, Σ over k."""

    @intrinsic  # type: ignore[untyped-decorator, unused-ignore]
    def tile(typing: Any, x: Any, packed: Any, y: Any, i: Any, p: Any, start: Any, stop: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            arrays = [context.make_array(t)(context, builder, v) for t, v in zip(signature.args[:3], args[:3], strict=True)]
            size, i, p, start, stop = x.dtype.bitwidth // 8, *args[3:]
            value, index, place = context.get_value_type(x.dtype), ir.IntType(64), ir.IntType(32)
            lanes, many = _BYTES // size, builder.mul
            vector = ir.VectorType(value, lanes)
            bits, some = ir.VectorType(ir.IntType(1), lanes), f"v{lanes}f{8 * size}.p0"
            load = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(vector, [vector.as_pointer(), place, bits, vector]), f"llvm.masked.load.{some}"
            )
            store = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(ir.VoidType(), [vector, vector.as_pointer(), place, bits]), f"llvm.masked.store.{some}"
            )
            zero, unit = ir.Constant(vector, None), ir.Constant(place, size)

            def n(number: int) -> Any:
                return ir.Constant(index, number)

            def everywhere(one: Any) -> Any:
                kind = ir.VectorType(one.type, lanes)
                undefined = ir.Constant(kind, ir.Undefined)
                first = builder.insert_element(undefined, one, ir.Constant(place, 0))
                return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(place, lanes), [0] * lanes))

            def vector_at(base: Any, offset: Any) -> Any:
                return builder.bitcast(builder.gep(base, [offset]), vector.as_pointer())

            length, width, columns = builder.extract_value(arrays[0].shape, 1), builder.extract_value(arrays[2].shape, 1), _columns(size)
            of_x = builder.gep(arrays[0].data, [many(i, length)])
            of_w = builder.gep(arrays[1].data, [many(p, many(length, n(columns)))])
            of_y = builder.gep(arrays[2].data, [builder.add(many(i, width), many(p, n(columns)))])
            left = builder.sub(width, many(p, n(columns)))
            numbers = ir.Constant(ir.VectorType(index, lanes), list(range(lanes)))
            beside = [(q, v) for q in range(panels) for v in range(_VECTORS)]
            inside = {
                (q, v): builder.icmp_signed("<", numbers, everywhere(builder.sub(left, n(q * columns + v * lanes)))) for q, v in beside
            }
            keys = [(r, *key) for r in range(rows) for key in beside]
            places = {(r, q, v): vector_at(of_y, builder.add(many(n(r), width), n(q * columns + v * lanes))) for r, q, v in keys}

            entry, again, head, body, end = (builder.block, *(builder.append_basic_block() for _ in range(4)))
            builder.cbranch(builder.icmp_signed(">", start, n(0)), again, head)
            builder.position_at_end(again)
            found = {key: builder.call(load, [places[key], unit, inside[key[1:]], zero]) for key in keys}
            builder.branch(head)
            builder.position_at_end(head)
            k = builder.phi(index)
            k.add_incoming(start, entry)
            k.add_incoming(start, again)
            sums = {}
            for key in keys:
                sums[key] = builder.phi(vector)
                sums[key].add_incoming(zero, entry)
                sums[key].add_incoming(found[key], again)
            builder.cbranch(builder.icmp_signed("<", k, stop), body, end)
            builder.position_at_end(body)
            w = {}
            for q, v in beside:
                offset = builder.add(many(builder.add(many(n(q), length), k), n(columns)), n(v * lanes))
                w[q, v] = builder.load(vector_at(of_w, offset), align=size)
            for r in range(rows):
                one = everywhere(builder.load(builder.gep(of_x, [builder.add(many(n(r), length), k)])))
                for key in beside:
                    term = builder.fmul(one, w[key], flags=("contract",))
                    sums[r, *key].add_incoming(builder.fadd(term, sums[r, *key], flags=("contract",)), body)
            k.add_incoming(builder.add(k, n(1)), body)
            builder.branch(head)
            builder.position_at_end(end)
            for key in keys:
                builder.call(store, [sums[key], places[key], unit, inside[key[1:]]])
            return context.get_dummy_value()

        return types.void(x, packed, y, types.int64, types.int64, types.int64, types.int64), generate

    return tile


_highest, _high, _four = (_tile(rows, 1) for rows in (_HEIGHTS[0], _HEIGHTS[-2 if len(_HEIGHTS) > 1 else 0], 4))
_two, _two_by_two, _one, _one_by_four = _tile(2, 1), _tile(2, 2), _tile(1, 1), _tile(1, 4)
_HIGHEST, _HIGH = _HEIGHTS[0], _HEIGHTS[-2 if len(_HEIGHTS) > 1 else 0]


@compiled()
def _few_rows(x: Any, packed: Any, y: Any, i: int, first: int, last: int, start: int, stop: int) -> None:
    """The up to three last rows, from row i on, of panels `first` to before `last`."""
    if i + 2 <= x.shape[0]:
        p = first
        while p + 2 <= last:
            _two_by_two(x, packed, y, i, p, start, stop)
            p += 2
        if p < last:
            _two(x, packed, y, i, p, start, stop)
        i += 2
    if i < x.shape[0]:
        p = first
        while p + 4 <= last:
            _one_by_four(x, packed, y, i, p, start, stop)
            p += 4
        while p < last:
            _one(x, packed, y, i, p, start, stop)
            p += 1


@compiled()
def product(x: Any, packed: Any, y: Any) -> None:
    """y (m, n) = x (m, k) · w, from what `pack` made of w (k, n)."""
    x, packed, y = bare(x), bare(packed), bare(y)
    panels, length, columns = packed.shape
    rows, block = x.shape[0], max(1, _PANEL // (columns * x.itemsize))
    for start in range(0, length, block):
        stop = min(length, start + block)
        for first in range(0, panels, 4):
            last = min(panels, first + 4)
            i = 0
            for p in range(first, last if rows >= 4 else first):
                i = 0
                while i + _HIGHEST <= rows:
                    _highest(x, packed, y, i, p, start, stop)
                    i += _HIGHEST
                while i + _HIGH <= rows:
                    _high(x, packed, y, i, p, start, stop)
                    i += _HIGH
                while i + 4 <= rows:
                    _four(x, packed, y, i, p, start, stop)
                    i += 4
            _few_rows(x, packed, y, i, first, last, start, stop)


@compiled()
def _fill_panels(w: Any, packed: Any) -> None:
    panels, length, columns = packed.shape
    for p in range(panels):
        first = p * columns
        count = min(columns, w.shape[1] - first)
        for k in range(length):
            for j in range(count):
                packed[p, k, j] = w[k, first + j]
            for j in range(count, columns):
                packed[p, k, j] = 0


def pack(w: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
    """w (k, n) as `product` takes it: (panels, k, columns), from the beginning of a cache line on. Any strides."""
    columns = _columns(w.itemsize)
    shape = (-(-w.shape[1] // columns), w.shape[0], columns)
    count, line = shape[0] * shape[1] * shape[2], 64 // w.itemsize
    room = numpy.empty(count + line, dtype=w.dtype)
    start = -(room.__array_interface__["data"][0] // w.itemsize) % line
    packed = room[start : start + count].reshape(shape)
    _fill_panels(w, packed)
    return packed
