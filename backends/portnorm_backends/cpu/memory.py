"""Room for large results in memory that earlier ones have left: a fresh page costs more than the arithmetic on its values.

The C library gives large blocks back to the system when they are freed, and the system clears every page of the next one: of a layer
normalization forward and backward of 4096 × 768 values that is half of the time. Here a block goes to a list when the last array on it is
gone, as in the memory pools of CuPy and torch, and at most `KEPT` bytes wait there.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy

T = TypeVar("T")

KEPT = 2**28
"""Bytes that may wait for their next use."""

CACHED = 2**25
"""Bytes that a cache may hold: what was handed out before so many others has left it."""

_LARGE = 2**20
"""Bytes from which the C library hands out fresh pages."""

SMALL = 2**16
"""Bytes of the largest array of a room that waits for the next call."""

_LINE = 64
"""Bytes of a cache line: a vector that lies in two of them is read and written as two."""

_waiting: dict[int, list[numpy.ndarray[Any, Any]]] = {}


def room(shape: tuple[int, ...], dtype: numpy.dtype[Any]) -> numpy.ndarray[Any, Any]:
    """An array whose values are not set; a large one begins with a cache line."""
    return room_and_cold(shape, dtype)[0]


def room_and_cold(shape: tuple[int, ...], dtype: numpy.dtype[Any]) -> tuple[numpy.ndarray[Any, Any], bool]:
    """The same, and whether it has left the caches since somebody had it: what is written there may as well go past them."""
    count = math.prod(shape) * dtype.itemsize
    if count < _LARGE:
        return numpy.empty(shape, dtype), False
    block, cold = _block(count)
    return block.view(dtype).reshape(shape), cold


def like(x: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
    """The same of the shape and type of a contiguous array, where every microsecond counts."""
    return numpy.empty_like(x) if x.nbytes < _LARGE else room(x.shape, x.dtype)


def aligned(shape: tuple[int, ...], dtype: numpy.dtype[Any]) -> numpy.ndarray[Any, Any]:
    """An array that begins with a cache line, whatever its size."""
    count = math.prod(shape) * dtype.itemsize
    return room(shape, dtype) if count >= _LARGE else _from_a_line(shape, dtype)


def _from_a_line(shape: tuple[int, ...], dtype: numpy.dtype[Any]) -> numpy.ndarray[Any, Any]:
    count = math.prod(shape) * dtype.itemsize
    block = numpy.empty(count + _LINE, dtype=numpy.uint8)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(block.data)) % _LINE
    return block[start : start + count].view(dtype).reshape(shape)


def aligned_copy(x: numpy.ndarray[Any, Any], dtype: numpy.dtype[Any]) -> numpy.ndarray[Any, Any]:
    """The values in a type, from the beginning of a cache line on; nothing waits for others when they are gone."""
    copy = _from_a_line(x.shape, dtype)
    copy[...] = x
    return copy


def release() -> None:
    """Give back to the system what waits."""
    _waiting.clear()
    _when.clear()


class Turns(Generic[T]):
    """Room that calls take in turns: what one has given back the next may have, and those at the same time, in other threads, have others.

    What is made for more than `SMALL` bytes is not kept: there a call does so much that its room costs nothing beside it.
    """

    def __init__(self, make: Callable[[], T], count: int) -> None:
        self._make, self._keeps = make, count <= SMALL
        self._waiting: list[T] = []

    def take(self) -> T:
        try:
            return self._waiting.pop()
        except IndexError:
            return self._make()

    def give(self, room: T) -> None:
        if self._keeps:
            self._waiting.append(room)


_handed = 0
"""Bytes handed out so far."""

_when: dict[int, int] = {}
"""By the address of a block that waits, how many these were when it was handed out."""


def _block(count: int) -> tuple[numpy.ndarray[Any, Any], bool]:
    global _handed  # which may miss something of another thread
    size = -(-(count + _LINE) // _LARGE) * _LARGE
    try:
        block = _waiting[size].pop()
    except (KeyError, IndexError):
        block = numpy.empty(size, dtype=numpy.uint8)
    cold = _handed - _when.pop(block.ctypes.data, _handed) >= CACHED
    # An array keeps its owner alive, which nobody else does; the block itself lives on.
    owner = (ctypes.c_char * size).from_buffer(block.data)
    weakref.finalize(owner, _keep, block, _handed).atexit = False
    _handed += count
    return numpy.frombuffer(memoryview(owner), dtype=numpy.uint8, count=count, offset=-ctypes.addressof(owner) % _LINE), cold


def _keep(block: numpy.ndarray[Any, Any], when: int) -> None:
    if block.nbytes > KEPT:
        return
    if block.nbytes + sum(size * len(blocks) for size, blocks in list(_waiting.items())) > KEPT:
        release()  # rather the sizes of now than those of before
    _when[block.ctypes.data] = when
    _waiting.setdefault(block.nbytes, []).append(block)
