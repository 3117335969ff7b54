"""Vectors at places in memory, and what else the generators of LLVM code share."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy
from llvmlite import ir
from numba import from_dtype, types
from numba.core import cgutils

from portnorm.arrays import is_bfloat16

INDEX = ir.IntType(64)
PLACE = ir.IntType(32)
BITS = types.uint16
"""How compiled code sees bfloat16."""


def splat(builder: Any, one: Any, lanes: int) -> Any:
    """A vector of the same value in every lane."""
    undefined = ir.Constant(ir.VectorType(one.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, one, ir.Constant(PLACE, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(PLACE, lanes), [0] * lanes))


def mask_of(builder: Any, left: Any, lanes: int) -> Any:
    """Which of the lanes are among the `left` next values."""
    numbers = ir.Constant(ir.VectorType(INDEX, lanes), list(range(lanes)))
    return builder.icmp_signed("<", numbers, splat(builder, left, lanes))


def exchange(lanes: int, step: int) -> tuple[Any, Any]:
    """Shuffles of two registers, for blocks of `step` lanes: those that keep their place, and the others, each with the second register's
    where the number of a lane has the bit `step`.
    """
    kind = ir.VectorType(PLACE, lanes)
    kept = [k & ~step | (lanes if k & step else 0) for k in range(lanes)]
    return ir.Constant(kind, kept), ir.Constant(kind, [k | step for k in kept])


def transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """The columns of as many registers as each has lanes: blocks off the diagonal change places, of one value, then of two, of four …"""
    found, lanes, step = list(rows), len(rows), 1
    while step < lanes:
        for i in range(lanes):
            if not i & step:
                pair = found[i], found[i + step]
                found[i], found[i + step] = (builder.shuffle_vector(*pair, order) for order in exchange(lanes, step))
        step *= 2
    return found


def computed(dtype: Any) -> Any:
    """The numba type that loops over such values compute in."""
    return types.float32 if dtype == BITS else dtype


def kinds(dtype: numpy.dtype[Any]) -> tuple[Any, Any]:
    """The numba types of values as a kernel is given them, and of what it computes of them."""
    given = BITS if is_bfloat16(dtype) else from_dtype(dtype)
    return given, computed(given)


class Memory(NamedTuple):
    """Vectors at places in memory, of values of one type."""

    builder: Any
    vector: Any  # the LLVM type
    size: int  # bytes of a value

    def _function(self, what: str, result: Any, *arguments: Any) -> Any:
        letter = "i" if isinstance(self.vector.element, ir.IntType) else "f"
        name = f"llvm.masked.{what}.v{self.vector.count}{letter}{8 * self.size}.p0"
        return cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(result, arguments), name)

    def at(self, start: Any, offset: Any) -> Any:
        """The place `offset` values after `start`."""
        return self.builder.bitcast(self.builder.gep(start, [offset]), self.vector.as_pointer())

    def load(self, place: Any, mask: Any = None) -> Any:
        """The vector there; 0 where it is masked out, which is not read."""
        if mask is None:
            return self.builder.load(place, align=self.size)
        function = self._function("load", self.vector, place.type, PLACE, mask.type, self.vector)
        return self.builder.call(function, [place, ir.Constant(PLACE, self.size), mask, ir.Constant(self.vector, None)])

    def store(self, value: Any, place: Any, mask: Any = None) -> None:
        """Write the vector there, but not where it is masked out."""
        if mask is None:
            self.builder.store(value, place, align=self.size)
        else:
            function = self._function("store", ir.VoidType(), self.vector, place.type, PLACE, mask.type)
            self.builder.call(function, [value, place, ir.Constant(PLACE, self.size), mask])

    def store_past(self, value: Any, place: Any) -> None:
        """Write the vector there, at a multiple of its size, past the caches: the processor does not read the line that it overwrites."""
        written = self.builder.store(value, place, align=self.vector.count * self.size)
        written.set_metadata("nontemporal", self.builder.module.add_metadata([ir.Constant(PLACE, 1)]))


class Bits(Memory):
    """Vectors of float32 of which memory holds the upper halves: bfloat16."""

    def load(self, place: Any, mask: Any = None) -> Any:
        """The vector there, as numbers."""
        return number_of(self.builder, super().load(place, mask))

    def store(self, value: Any, place: Any, mask: Any = None) -> None:
        """Round the vector to the nearest, ties to even, and write it there; what is not a number stays none."""
        super().store(self._rounded(value), place, mask)

    def store_past(self, value: Any, place: Any) -> None:
        """The same past the caches."""
        super().store_past(self._rounded(value), place)

    def _rounded(self, value: Any) -> Any:
        builder, lanes = self.builder, self.vector.count
        wide = ir.VectorType(ir.IntType(32), lanes)

        def number(n: int) -> Any:
            return ir.Constant(wide, [n] * lanes)

        bits = builder.bitcast(value, wide)
        upper = builder.lshr(bits, number(16))
        nearest = builder.lshr(builder.add(builder.add(bits, number(0x7FFF)), builder.and_(upper, number(1))), number(16))
        rounded = builder.select(builder.fcmp_unordered("uno", value, value), number(0x7FC0), nearest)
        return builder.trunc(rounded, self.vector)


def number_of(builder: Any, bits: Any) -> Any:
    """The float32 of which these are the upper halves: vectors, or one."""
    whole, kind = ir.IntType(32), ir.FloatType()
    shift: Any = ir.Constant(whole, 16)
    if isinstance(bits.type, ir.VectorType):
        lanes = bits.type.count
        whole, kind, shift = ir.VectorType(whole, lanes), ir.VectorType(kind, lanes), ir.Constant(ir.VectorType(whole, lanes), [16] * lanes)
    return builder.bitcast(builder.shl(builder.zext(bits, whole), shift), kind)


def opaque(builder: Any, value: Any) -> Any:
    """The same value, of which LLVM does not know where it comes from."""
    return builder.asm(ir.FunctionType(value.type, [value.type]), "", "=r,0", [value], side_effect=False)


def ask(builder: Any, place: Any, level: int = 1) -> None:
    """Ask for the cache line of a place in memory, into the nearest cache or that of another level."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, PLACE, PLACE, PLACE])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    read, nearness, data = (ir.Constant(PLACE, n) for n in (0, 4 - level, 1))
    builder.call(function, [builder.bitcast(place, byte), read, nearness, data])
