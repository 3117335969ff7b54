"""x · Wᵀ of a few rows, both as integers; compiled by numba.

A processor that multiplies bytes takes those of the weights beside those of `x`, which have no sign there: they are 128 more, and the
result is less by 128 times the sum of the weights. VNNI adds up four products, AVX2 two, in 16 bits, which weights within ±64 do not
leave. Elsewhere `x` is of 16 bits: LLVM finds what multiplies and adds pairs of those.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from portnorm_backends.cpu.compiling import compiled
from portnorm_backends.cpu.registers import has_avx2, has_products_of_bytes

_STEP = np.float32(1.0) / np.float32(127.0)
_LEAST = np.finfo(np.float32).smallest_normal
_BYTES = 64 if has_products_of_bytes() else 32
"""Those of a register."""
_TURNS = 4
"""Sums in turn, so that one need not wait for the other."""


@intrinsic  # type: ignore[untyped-decorator]
def _multiplied(typing: Any, x: Any, weight: Any, registers: Any) -> Any:
    """The sum over `registers` of products of bytes, those at the address `x` without a sign, those at `weight` with one."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, weight, registers = args
        lane = ir.IntType(32)
        vector = ir.VectorType(lane, _BYTES // 4)
        x, weight = (builder.inttoptr(a, vector.as_pointer()) for a in (x, weight))
        add_up = _four if has_products_of_bytes() else _two_and_two
        totals = [cgutils.alloca_once_value(builder, ir.Constant(vector, [0] * vector.count)) for _ in range(_TURNS)]
        turns = builder.udiv(registers, registers.type(_TURNS))

        def take(at: Any, total: Any) -> None:
            pair = [builder.load(builder.gep(a, [at]), align=1) for a in (x, weight)]
            builder.store(add_up(builder, builder.load(total), *pair), total)

        with cgutils.for_range(builder, turns) as loop:
            start = builder.mul(loop.index, loop.index.type(_TURNS))
            for k, total in enumerate(totals):
                at = builder.add(start, start.type(k))
                take(at, total)
        with cgutils.for_range(builder, builder.urem(registers, registers.type(_TURNS))) as loop:
            take(builder.add(builder.mul(turns, turns.type(_TURNS)), loop.index), totals[0])
        whole = builder.load(totals[0])
        for total in totals[1:]:
            whole = builder.add(whole, builder.load(total))
        add = cgutils.get_or_insert_function(builder.module, ir.FunctionType(lane, [vector]), f"llvm.vector.reduce.add.v{vector.count}i32")
        return builder.call(add, [whole])

    return types.int32(types.intp, types.intp, types.intp), codegen


def _four(builder: Any, total: Any, x: Any, weight: Any) -> Any:
    of = ir.FunctionType(total.type, [total.type] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, of, "llvm.x86.avx512.vpdpbusd.512"), [total, x, weight])


def _two_and_two(builder: Any, total: Any, x: Any, weight: Any) -> Any:
    count = total.type.count
    bytes_, words = ir.VectorType(ir.IntType(8), count * 4), ir.VectorType(ir.IntType(16), count * 2)
    first, second = (
        cgutils.get_or_insert_function(builder.module, ir.FunctionType(to, [of, of]), f"llvm.x86.avx2.pmadd.{name}")
        for of, to, name in ((bytes_, words, "ub.sw"), (words, total.type, "wd"))
    )
    pairs = builder.call(first, [builder.bitcast(a, bytes_) for a in (x, weight)])
    return builder.add(total, builder.call(second, [pairs, ir.Constant(words, [1] * words.count)]))


@compiled()
def of_bytes(q: Any, weight: Any, sums: Any, totals: Any) -> None:
    """Rows of `weight` (outputs, inputs), whose sums are `sums`, times `q` (inputs,), which are 128 more than they should be."""
    outputs, inputs = weight.shape
    registers, x, start = inputs // _BYTES, q.ctypes.data, weight.ctypes.data
    for j in range(outputs):
        total = _multiplied(x, start + j * inputs, registers)
        for i in range(registers * _BYTES, inputs):
            total += np.int32(weight[j, i]) * np.int32(q[i])
        totals[j] = np.int32(total) - np.int32(128) * sums[j]


@compiled()
def of_words(q: Any, weight: Any, sums: Any, totals: Any) -> None:
    """The same where `q` are as they are."""
    outputs, inputs = weight.shape
    for j in range(outputs):
        total = np.int32(0)
        for i in range(inputs):
            total += np.int32(weight[j, i]) * np.int32(q[i])
        totals[j] = np.int32(total)  # numba adds up in 64 bits, of which LLVM then knows that 32 do


if has_products_of_bytes() or has_avx2():
    INTEGER: Any = np.uint8
    _OFFSET, _multiply = np.float32(128.0), of_bytes
else:
    INTEGER = np.int16
    _OFFSET, _multiply = np.float32(0.0), of_words


@compiled()
def product(x: Any, bounded: bool, q: Any, weight: Any, sums: Any, steps: Any, y: Any) -> None:
    """y (rows, outputs) = x (rows, inputs) · (weight ⊙ steps)ᵀ, with `x` rounded into `q`, of type `INTEGER`, as `fake_quantize` does."""
    totals = np.empty(weight.shape[0], np.int32)
    for r in range(x.shape[0]):
        largest, none = np.float32(1.0), np.float32(0.0)  # the latter NaN where a number of the row is none, which an integer cannot be
        if bounded:
            for i in range(x.shape[1]):
                none += np.float32(0.0) if x[r, i] == x[r, i] else x[r, i]
        else:
            largest = _LEAST
            for i in range(x.shape[1]):
                largest, none = max(largest, abs(x[r, i])), none + (x[r, i] - x[r, i])
        for i in range(x.shape[1]):
            share = np.rint((x[r, i] / largest) / _STEP)
            q[r, i] = min(max(share, np.float32(-127.0)), np.float32(127.0)) + _OFFSET
        factor = _STEP * largest + none
        _multiply(q[r], weight, sums, totals)
        for j in range(weight.shape[0]):
            y[r, j] = np.float32(totals[j]) * (steps[j] * factor)
