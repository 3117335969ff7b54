"""Products xᵀ · y of matrices with many rows, as gradients of weights are: sums of the outer products of rows; compiled by numba.

Some rows of x and y at a time are laid out for the tiles (`tiles`): y in panels of so many columns as a tile has, x in parts of so many
columns as a tile has rows. No matrix is turned: what a term of a tile's sums takes of x and of y lies beside each other in both.

The sum over these rows is made apart, and then added to that of the rows before them.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy
from numba import types

from portnorm_backends.cpu import threads
from portnorm_backends.cpu.compiling import bare, compiled, copy, row_of
from portnorm_backends.cpu.layout import NumPyArray
from portnorm_backends.cpu.memory import aligned
from portnorm_backends.cpu.products import fill_panels
from portnorm_backends.cpu.registers import WIDTH
from portnorm_backends.cpu.tiles import HEIGHTS, columns_of, tile

PAYS = WIDTH == 64
"""Whether NumPy's BLAS is slower: where registers are shorter it is as fast or faster."""

_ROWS = 256
"""Rows of x and y that are laid out at a time: a panel of so many stays in the nearest cache."""

_HIGHEST = HEIGHTS[0]

_WIDE = 480 // _HIGHEST * _HIGHEST
"""Columns of x whose parts stay in the second cache while all panels go by."""

_BYTES = columns_of(1)
"""Of a row of a panel."""

_WORTH = 2**25
"""Multiplications from which a thread pays: half a millisecond."""

_tile = tile(_HIGHEST, 1, turned=True)


@compiled(inner=True)
def _fill_parts(x: Any, start: int, first: int, last: int, parts: Any) -> None:
    """Columns `first` to before `last` of as many rows of x from `start` on as there is room for in `parts` (parts, rows, columns)."""
    count, rows, _ = parts.shape
    whole = (last - first) // _HIGHEST
    for part in range(count):
        column = first + part * _HIGHEST
        for k in range(rows):
            row, into = row_of(x, start + k), parts[part, k]
            if part < whole:
                for r in range(_HIGHEST):  # a number that the compiler knows: a few vectors
                    into[r] = row[column + r]
            else:
                for r in range(_HIGHEST):
                    into[r] = row[column + r] if column + r < last else 0


def _sum(x: Any, y: Any, first: int, last: int, room_x: Any, room_y: Any, rest: Any, none: Any, into: Any) -> None:
    """Rows `first` to before `last` of `into` (m, n) = xᵀ · y, from x (rows, m) and y (rows, n), with room for their layouts and for the
    last tiles, `rest` (rows of a tile, n).
    """
    x, y, room_x, room_y, rest, none, into = bare(x), bare(y), bare(room_x), bare(room_y), bare(rest), bare(none), bare(into)
    rows, columns = x.shape[0], _BYTES // y.itemsize
    panels, blocks = -(-y.shape[1] // columns), -(-rows // _ROWS)
    depth = -(-rows // blocks)
    for start in range(0, rows, depth):
        count, adds = min(depth, rows - start), start > 0
        packed = room_y[: panels * (1 + count) * columns].reshape(panels, 1 + count, columns)
        fill_panels(y[start : start + count], False, none, 0, packed)
        for begin in range(first, last, _WIDE):
            end = min(begin + _WIDE, last)
            whole, number = (end - begin) // _HIGHEST, -(-(end - begin) // _HIGHEST)
            parts = room_x[: number * count * _HIGHEST].reshape(number, count, _HIGHEST)
            _fill_parts(x, start, begin, end, parts)
            for p in range(panels):
                for part in range(whole):
                    _tile(parts, packed, into[begin:end], part * _HIGHEST, p, 0, count, 0, 0, adds)
                if whole < number:
                    _tile(parts[whole:], packed, rest, 0, p, 0, count, 0, 0, adds)
    left = (last - first) % _HIGHEST
    for r in range(left):
        copy(rest[r], into[last - left + r])


@functools.cache
def compiled_for(dtype: numpy.dtype[Any]) -> Any:
    """`_sum` for one type of values."""
    t = numba.from_dtype(dtype)
    x, room, rest = types.Array(t, 2, "A", readonly=True), t[::1], t[:, ::1]
    return compiled(signatures=types.void(x, x, types.int64, types.int64, room, room, rest, room, rest))(_sum)


def is_worth(columns: int, itemsize: int) -> bool:
    """Whether it is faster than BLAS for y of so many columns: most of those of the panels have to be there."""
    panel = columns_of(itemsize)
    return PAYS and 3 * panel * -(-columns // panel) <= 4 * columns


def product(x: NumPyArray, y: NumPyArray) -> NumPyArray:
    """xᵀ · y (m, n) of x (rows, m) and y (rows, n), none of which is 0."""
    (rows, m), n, dtype = x.shape, y.shape[1], x.dtype
    x, y = (a if a.flags.aligned and a.strides[1] == a.itemsize else a.copy("C") for a in (x, y))
    into, depth, columns = aligned((m, n), dtype), min(rows, _ROWS), columns_of(dtype.itemsize)
    add, none = compiled_for(dtype), numpy.empty(0, dtype)

    def through(first: int, last: int) -> None:
        room_x = aligned((-(-min(last - first, _WIDE) // _HIGHEST) * _HIGHEST * depth,), dtype)
        room_y = aligned((-(-n // columns) * (1 + depth) * columns,), dtype)
        add(x, y, first, last, room_x, room_y, numpy.empty((_HIGHEST, n), dtype), none, into)

    threads.each(threads.parts(m, x.size * n / _WORTH, _HIGHEST), through)
    return into
