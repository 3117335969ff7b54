"""Matrix products y = x · w + shift whose w is packed once for many x; compiled by numba from LLVM vectors.

The product of a recurrent step is too small for a BLAS to pay for its own packing, which it does again in every step. Here w (k, n) is
laid out in panels of `2 · lanes` columns, each a contiguous (1 + k, columns) that begins with the shift: a tile of y, some rows of one
panel, stays in registers while k runs; each k loads two vectors of w, which all rows of the tile use, and one value of x per row (Goto &
van de Geijn 2008). One or two rows would wait for their sums, so they take several panels at once.

The sum over k is taken in its order, in blocks whose panel stays in the nearest cache, and the sums of blocks are added up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from portnorm_backends.cpu import threads
from portnorm_backends.cpu.compiling import address_of, bare, call_at, compiled, copy, row_of
from portnorm_backends.cpu.layout import NumPyArray, Product, taken
from portnorm_backends.cpu.memory import aligned
from portnorm_backends.cpu.places import Memory, transposed
from portnorm_backends.cpu.registers import WIDTH
from portnorm_backends.cpu.sharing import call, shared
from portnorm_backends.cpu.tiles import HEIGHTS, SHARES, VECTORS, columns_of, tile
from portnorm_backends.cpu.vectors import Vector, elementwise, fused, summed

_NEAR = 2**21
"""Bytes of w up to which the caches have it from one step to the next."""

_PACKED = 2**19
"""Bytes of panels that are packed and read again before the next ones."""

_PANEL = 2**15
"""Bytes of the part of a panel that is read again and again."""

_WORTH = 2**25
"""Multiplications from which a thread pays: half a millisecond."""

_READ = 2**20
"""Bytes of w, read for few rows, from which a thread that listens pays: some twenty microseconds."""

_NARROW = 4
"""Columns of x up to which the sums are not worth a tile."""

FEW = 4
"""Rows of x in all for which w is read as it lies: to pack it would take longer than the product."""

ROWS = 240
"""Rows of x that go through all panels before the next ones do."""


_HIGHEST, _HIGH = HEIGHTS[0], HEIGHTS[-2 if len(HEIGHTS) > 1 else 0]
_highest, _high, _four = (tile(rows, 1) for rows in (_HIGHEST, _HIGH, 4))
_MANY = 8 if WIDTH == 64 else 4
"""Panels that a single row takes at once, so that sixteen sums of AVX-512, or eight, are on their way."""

_two, _two_beside, _one, _one_beside = tile(2, 1), tile(2, _MANY // 2), tile(1, 1), tile(1, _MANY)


@compiled(inner=True)
def _next(packed: Any, p: int, start: int, stop: int, tiles: int) -> int:
    """Where in `packed` the tile after so many of panel p asks for its part of the next panel."""
    columns = packed.shape[2]
    if tiles >= SHARES or p + 1 >= packed.shape[0] or packed.size * packed.itemsize <= _NEAR:
        return 0
    place: int = ((p + 1) * packed.shape[1] + 1 + start) * columns + tiles * (stop - start) * (columns // SHARES)
    return place


@compiled(inner=True)
def _few_rows(x: Any, packed: Any, y: Any, i: int, first: int, last: int, start: int, stop: int, origin: int, adds: bool) -> None:
    """The up to three last rows, from row i on, of panels `first` to before `last`."""
    if i + 2 <= x.shape[0]:
        p = first
        while p + _MANY // 2 <= last:
            _two_beside(x, packed, y, i, p, start, stop, origin, 0, adds)
            p += _MANY // 2
        while p < last:
            _two(x, packed, y, i, p, start, stop, origin, 0, adds)
            p += 1
        i += 2
    if i < x.shape[0]:
        p = first
        while p + _MANY <= last:
            _one_beside(x, packed, y, i, p, start, stop, origin, 0, adds)
            p += _MANY
        while p < last:
            _one(x, packed, y, i, p, start, stop, origin, 0, adds)
            p += 1


@compiled(inner=True)
def _block(x: Any, packed: Any, y: Any, start: int, stop: int, origin: int, adds: bool) -> None:
    """All rows and panels, of k in start … stop − 1."""
    panels, rows = packed.shape[0], x.shape[0]
    highest = rows // _HIGHEST
    high = (rows - highest * _HIGHEST) // _HIGH
    fours = (rows - highest * _HIGHEST - high * _HIGH) // 4
    to_high = highest * _HIGHEST
    to_fours = to_high + high * _HIGH
    for first in range(0, panels, _MANY):
        last = min(panels, first + _MANY)
        for p in range(first, last if rows >= 4 else first):
            for k in range(highest):
                _highest(x, packed, y, k * _HIGHEST, p, start, stop, origin, _next(packed, p, start, stop, k), adds)
            for k in range(high):
                _high(x, packed, y, to_high + k * _HIGH, p, start, stop, origin, _next(packed, p, start, stop, highest + k), adds)
            for k in range(fours):
                _four(x, packed, y, to_fours + k * 4, p, start, stop, origin, _next(packed, p, start, stop, highest + high + k), adds)
        _few_rows(x, packed, y, to_fours + fours * 4, first, last, start, stop, origin, adds)


def _product(x: Any, packed: Any, y: Any, near: Any) -> None:
    """y (m, n) = x (m, k) · w + shift, from what `pack` made of w (k, n), with the room that `near` makes for x."""
    x, packed, y, near = bare(x), bare(packed), bare(y), bare(near)
    length, block = x.shape[1], _PANEL // (packed.shape[2] * x.itemsize)
    for i in range(0, x.shape[0], ROWS):
        rows, into = x[i : i + ROWS], y[i : i + ROWS]
        for start in range(0, max(length, 1), block):
            stop = min(length, start + block)
            source, origin = rows, start - start
            if near.size:
                for r in range(rows.shape[0]):
                    copy(rows[r, start:stop], near[r, : stop - start])
                source, origin = near[: rows.shape[0]], start
            _block(source, packed, into, start, stop, origin, start > 0)


@compiled(inner=True)
def product(x: Any, packed: Any, y: Any, how: Any) -> None:
    """The same, for a loop that is compiled: `how` is the `Product` of its room."""
    call_at(how.address, (x, packed, y, how.near), None)


@elementwise
def _line(w: Vector, x: Vector, before: Vector) -> tuple[Vector]:
    return (fused(x, w, before),)


def _narrow(x: Any, w: Any, shift: Any, y: Any) -> None:
    """The same of so few columns of x that a tile would only be begun and ended: row by row. w (k, n), shift (n,)."""
    x, w, shift, y = bare(x), bare(w), bare(shift), bare(y)
    for i in range(x.shape[0]):
        _line(shift.size, (w[0], x[i, 0], shift), (y[i],))
        for k in range(1, w.shape[0]):
            _line(shift.size, (w[k], x[i, k], y[i]), (y[i],))


_BESIDE = 4
"""Rows of w that are read at once: their sums do not wait for each other, and share what is read of x."""

_APART = 2**22 if WIDTH == 64 else 2**20
"""Bytes of w from which two rows are read at once, half of w apart: memory gives half as much again to two long walks as to one, or to four
that go side by side.
"""


@summed(_BESIDE)
def _along_four(x: Vector, *rows: Vector) -> tuple[Vector, ...]:
    return tuple(row * x for row in rows)


@summed(2)
def _along_two(x: Vector, first: Vector, second: Vector) -> tuple[Vector, Vector]:
    return first * x, second * x


@summed(1)
def _along(x: Vector, row: Vector) -> tuple[Vector]:
    return (row * x,)


def _direct(start: int, stop: int, x: Any, w: Any, shift: Any, y: Any) -> bool:
    """Columns `start` to before `stop` of the same, from w (n, k) itself, of which only each row need be contiguous."""
    x, w, shift, y = bare(x), bare(w), bare(shift), bare(y)
    far = w.size * w.itemsize > _APART
    half, fours = (stop - start) // 2 if far else 0, start if far else stop - (stop - start) % _BESIDE
    for j in range(start, start + half):
        two = row_of(w, j), row_of(w, j + half)
        for i in range(x.shape[0]):
            first, second = _along_two(x.shape[1], (x[i], *two))
            y[i, j], y[i, j + half] = first + shift[j], second + shift[j + half]
    for j in range(start, fours, _BESIDE):
        four = row_of(w, j), row_of(w, j + 1), row_of(w, j + 2), row_of(w, j + 3)
        for i in range(x.shape[0]):
            found = _along_four(x.shape[1], (x[i], *four))
            for q in range(_BESIDE):
                y[i, j + q] = found[q] + shift[j + q]
    for j in range(max(fours, start + 2 * half), stop):
        row = row_of(w, j)
        for i in range(x.shape[0]):
            y[i, j] = _along(x.shape[1], (x[i], row))[0] + shift[j]
    return True


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def _turn(typing: Any, w: Any, j: Any, k: Any, packed: Any, p: Any, column: Any) -> Any:
    """w[j : j + lanes, k : k + lanes], turned, into the columns from `column` on of panel p."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        size, (j, k), (p, column) = w.dtype.bitwidth // 8, args[1:3], args[4:]
        source, target = (context.make_array(t)(context, builder, v) for t, v in ((w, args[0]), (packed, args[3])))
        lanes, index = WIDTH // size, ir.IntType(64)
        memory, many = Memory(builder, ir.VectorType(context.get_value_type(w.dtype), lanes), size), builder.mul

        def n(number: int) -> Any:
            return ir.Constant(index, number)

        stride = builder.extract_value(source.strides, 0)
        start = cgutils.pointer_add(builder, source.data, builder.add(many(j, stride), many(k, n(size))))
        rows = [memory.load(memory.at(cgutils.pointer_add(builder, start, many(n(r), stride)), n(0))) for r in range(lanes)]
        turned = transposed(builder, rows)
        columns = columns_of(size)
        first = builder.add(many(p, many(builder.extract_value(target.shape, 1), n(columns))), column)
        for r in range(lanes):
            memory.store(turned[r], memory.at(target.data, builder.add(first, many(builder.add(k, n(1 + r)), n(columns)))))
        return context.get_dummy_value()

    return types.void(w, types.int64, types.int64, packed, types.int64, types.int64), generate


def _fill_panels(w: Any, turned: bool, shift: Any, begin: int, packed: Any) -> None:
    """The panels of the columns of w from `begin` on, as many as there is room for.

    `turned`: w is (n, k), of which each row becomes a column.
    """
    w, shift, packed = bare(w), bare(shift), bare(packed)
    panels, length, columns = packed.shape
    count, lanes = w.shape[0] if turned else w.shape[1], columns // VECTORS
    for p in range(panels):
        first = begin + p * columns
        here = max(0, min(columns, count - first))
        if turned:
            whole, depth = here // lanes * lanes, (length - 1) // lanes * lanes
            for column in range(0, whole, lanes):
                for k in range(0, depth, lanes):
                    _turn(w, first + column, k, packed, p, column)
            for column in range(here):
                row = row_of(w, first + column)
                for k in range(depth if column < whole else 0, length - 1):
                    packed[p, 1 + k, column] = row[k]
        else:
            for k in range(length - 1):
                copy(row_of(w, k)[first : first + here], packed[p, 1 + k])
        for column in range(columns):
            packed[p, 0, column] = shift[first + column] if shift.size and column < here else 0
        for k in range(1, length):
            for column in range(here, columns):
                packed[p, k, column] = 0


fill_panels = compiled(inner=True)(_fill_panels)


def _in_panels(x: Any, w: Any, turned: bool, shift: Any, first: int, last: int, packed: Any, part: Any, how: Any, y: Any) -> None:
    """The product of few rows: the columns `first` to before `last`, some panels after the others, each read just after it was packed.

    `packed` has room for those at a time, `part` (rows · columns,) for their product.
    """
    x, w, shift, packed, part, y = bare(x), bare(w), bare(shift), bare(packed), bare(part), bare(y)
    rows, columns = x.shape[0], packed.shape[2]
    for begin in range(first, last, packed.shape[0] * columns):
        here = min(packed.shape[0] * columns, last - begin)
        own, wide = packed[: -(-here // columns)], part[: rows * here].reshape((rows, here))
        fill_panels(w, turned, shift, begin, own)
        product(x, own, wide, how)
        for i in range(rows):
            copy(wide[i], y[i, begin : begin + here])


KERNELS: dict[str, Callable[..., Any]] = {
    "fill": _fill_panels,
    "product": _product,
    "in panels": _in_panels,
    "narrow": _narrow,
    "direct": _direct,
}
"""What Python calls, each compiled when it is first called, or all of them before (`families`)."""


@functools.cache
def compiled_for(name: str, dtype: numpy.dtype[Any]) -> Any:
    """One of them for one type of values."""
    t = numba.from_dtype(dtype)
    w, shift, x = (types.Array(t, ndim, layout, readonly=True) for ndim, layout in ((2, "A"), (1, "C"), (2, "C")))
    packed, y = t[:, :, ::1], t[:, ::1]
    how = types.NamedTuple((types.int64, y), Product)
    given = {
        "fill": (w, types.boolean, shift, types.int64, packed),
        "in panels": (x, w, types.boolean, shift, types.int64, types.int64, packed, t[::1], how, y),
        "product": (x, packed, y, y),
        "narrow": (x, x, shift, y),
        "direct": (types.int64, types.int64, x, w, shift, y),
    }
    if name == "direct":
        return shared(compiled(signatures=types.boolean(*given[name]))(_direct))
    return compiled(signatures=types.void(*given[name]))(KERNELS[name])


def pack(w: NumPyArray, shift: NumPyArray | None = None) -> NumPyArray:
    """w (k, n) and shift (n,) as `product` takes them: (panels, 1 + k, columns). Any strides."""
    columns, dtype = columns_of(w.itemsize), w.dtype
    packed = aligned((-(-w.shape[1] // columns), 1 + w.shape[0], columns), dtype)
    compiled_for("fill", dtype)(*_as_it_lies(w, shift), 0, packed)
    return packed


def _as_it_lies(w: NumPyArray, shift: NumPyArray | None) -> tuple[NumPyArray, bool, NumPyArray]:
    """w (k, n) or, where that is how its rows are contiguous, (n, k); whether it is that; and the shift, empty where there is none."""
    turned = w.strides[0] == w.itemsize and w.shape[0] > 1
    rows = w.T if turned else w
    if not rows.flags.aligned or rows.strides[1] != rows.itemsize:
        rows = rows.copy("C")
    return rows, turned, numpy.empty(0, w.dtype) if shift is None else numpy.require(shift, requirements=["C", "A"])


@functools.cache
def nothing(dtype: numpy.dtype[Any]) -> NumPyArray:
    """Packed weights of no columns: their product leaves y as it is."""
    return numpy.empty((0, 1, columns_of(dtype.itemsize)), dtype)


def near(rows: int, length: int, dtype: Any) -> NumPyArray:
    """Room for what a product reads of its rows at a time, (0, 0) where it may as well read the rows themselves.

    The same columns of rows that lie a multiple of 2 KB apart share so few places in the nearest cache that a tile of them does not fit.
    """
    if rows < 4 or length * dtype.itemsize % 2048:
        return numpy.empty((0, 0), dtype)
    block = _PANEL // (columns_of(dtype.itemsize) * dtype.itemsize)
    return numpy.empty((min(rows, ROWS), block + 64 // dtype.itemsize), dtype)


def product_of(rows: int, length: int, dtype: numpy.dtype[Any]) -> Product:
    """What `product` takes for so many rows of x."""
    return Product(_address(dtype), near(rows, length, dtype))


@functools.cache
def _address(dtype: numpy.dtype[Any]) -> int:
    return address_of(compiled_for("product", dtype))


def shift_of(shift: NumPyArray | None, count: int, dtype: numpy.dtype[Any]) -> NumPyArray:
    return _zeros(count, dtype) if shift is None else taken(shift, dtype, (count,))


@functools.lru_cache(maxsize=64)
def _zeros(count: int, dtype: numpy.dtype[Any]) -> NumPyArray:
    """Nobody writes into it."""
    return numpy.zeros(count, dtype)


def from_rows(w: NumPyArray, shift: NumPyArray | None) -> Callable[[NumPyArray, NumPyArray], None]:
    """What writes x · wᵀ + shift into y (m, n), for few rows of x and w (n, k) with contiguous rows, which threads share if it is large."""
    count, direct, added = len(w), compiled_for("direct", w.dtype), shift_of(shift, len(w), w.dtype)
    if w.nbytes < 2 * _READ:
        return lambda x, y: direct(0, count, x, w, added, y)

    def multiply(x: NumPyArray, y: NumPyArray) -> None:
        plan = threads.plan(count, w.nbytes / _READ, 64 // w.itemsize, 1, w.nbytes // _NEAR)
        if plan.threads == 1:
            direct(0, count, x, w, added, y)
        else:
            call(direct, plan, count, whole=(x, w, added, y))

    return multiply


def straight(x: NumPyArray, w: NumPyArray, shift: NumPyArray | None, y: NumPyArray) -> None:
    """Writes x · wᵀ + shift into y, for at most `FEW` rows of x, and w (n, k)."""
    if w.strides[1] == w.itemsize and w.flags.aligned:
        from_rows(w, shift)(x, y)
    else:
        affine_map(w.T, shift, x.shape[0])(x, y)


def affine_map(w: NumPyArray, shift: NumPyArray | None = None, rows: int = ROWS) -> Callable[[NumPyArray, NumPyArray], None]:
    """What writes x · w + shift into y, for contiguous x (m, k) and y (m, n), of which there will be so many `rows` in all."""
    lies = rows <= FEW and w.flags.aligned and (w.strides[0] == w.itemsize or w.shape[0] == 1)
    if lies or w.shape[0] <= _NARROW:
        if lies:
            return from_rows(w.T, shift)
        added = shift_of(shift, w.shape[1], w.dtype)
        few, narrow = numpy.require(w, requirements=["C", "A"]), compiled_for("narrow", w.dtype)
        return lambda x, y: narrow(x, few, added, y)
    packed, multiply = pack(w, shift), compiled_for("product", w.dtype)
    return lambda x, y: multiply(x, packed, y, near(x.shape[0], x.shape[1], x.dtype))


def _goes_in_panels(w: NumPyArray, rows: int) -> bool:
    """Whether few rows read so much of w that it would leave the near caches between its packing and its reading."""
    return FEW < rows <= ROWS and w.nbytes > _NEAR and w.shape[0] > _NARROW


def _multiply_in_panels(x: NumPyArray, w: NumPyArray, shift: NumPyArray | None, y: NumPyArray) -> None:
    """Threads have a part of the columns each."""
    own, kernel, columns = _as_it_lies(w, shift), compiled_for("in panels", w.dtype), columns_of(w.itemsize)
    panels = max(1, min(-(-w.shape[1] // columns), _PACKED // ((1 + w.shape[0]) * columns * w.itemsize)))

    def some(first: int, last: int) -> None:
        packed, part = aligned((panels, 1 + w.shape[0], columns), w.dtype), aligned((x.shape[0] * panels * columns,), w.dtype)
        kernel(x, *own, first, last, packed, part, product_of(x.shape[0], x.shape[1], x.dtype), y)

    threads.each(threads.parts(w.shape[1], x.shape[0] * w.size / _WORTH, panels * columns), some)


def affine(x: NumPyArray, w: NumPyArray, shift: NumPyArray | None = None) -> NumPyArray:
    """x · w + shift for contiguous x (m, k)."""
    y = aligned((x.shape[0], w.shape[1]), x.dtype)
    if _goes_in_panels(w, x.shape[0]):
        _multiply_in_panels(x, w, shift, y)
        return y
    into = affine_map(w, shift, x.shape[0])
    ranges = threads.parts(x.shape[0], x.shape[0] * w.size / _WORTH, _HIGHEST)
    threads.each(ranges, lambda first, last: into(x[first:last], y[first:last]))
    return y
