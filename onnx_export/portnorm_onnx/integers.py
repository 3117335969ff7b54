"""Products of integers in a graph: what `portnorm.quantization.integer_product` becomes, and what `fake_quantize` is for it.

    int8    QuantizeLinear(x / m, 1/127, 128) → MatMulInteger(uint8, int8) → Cast → Mul(s_w / 127) → Mul(m)
    int4    MatMulNBits(x, nibbles, steps), which rounds x by itself

A number that is none stays none: NaN is added to the rows that have one.

The operators of the former are of the ONNX standard alone, so that every target reads them; onnxruntime makes one of some. m is the largest
|x| of each row, and left out where a bound of 1 is known. The latter is onnxruntime's own. Weights come as numbers that integers can say;
their steps are found again from the largest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
from onnx import TensorProto

from portnorm.op import OPS
from portnorm.quantization import INPUTS, integers_of
from portnorm_onnx.symbolic import NumPyArray, SymbolicArray, constant, foreign_node, node, reduction

_ZERO = 128
_BYTES_AS_THEY_ARE = 4
"""The `accuracy_level` of MatMulNBits with which it rounds its input to eight bits."""
_LEAST_BLOCK = 16


@dataclass(frozen=True, eq=False)
class Integers:
    """What an array is the product of: integers around 128, a step for all, and the largest number of each row or `None` for 1."""

    q: SymbolicArray
    step: NumPyArray
    largest: SymbolicArray | None


def fake_quantize(
    x: SymbolicArray, *, levels: int = INPUTS, bound: float | None = None, block: int | None = None, lopsided: bool = False
) -> SymbolicArray:
    """Integers that are read as such by a product, and as numbers by whatever else asks."""
    largest = None
    if x.dims[-1] != 0 and bound is None:
        least = constant(numpy.asarray(numpy.finfo(x.dtype).smallest_normal, x.dtype))
        largest = node("Max", reduction("ReduceMax", node("Abs", x), _last(x), keepdims=1), least)
        largest = node("Add", largest, _no_number(x))  # what is largest beside a NaN may be any number
    elif bound not in (None, 1.0):
        largest = constant(numpy.asarray(bound, x.dtype))
    step = numpy.asarray(1.0 / levels, x.dtype)
    q = node("QuantizeLinear", x if largest is None else node("Div", x, largest), constant(step), constant(numpy.uint8(_ZERO)))
    y = node("DequantizeLinear", q, constant(step), constant(numpy.uint8(_ZERO)))
    y = y if largest is None else node("Mul", y, largest)
    y.integers, y.shaped_as = Integers(q, step, largest), x
    return y


def _no_number(x: SymbolicArray) -> SymbolicArray:
    """0 for each row, or NaN where a number of it is infinite or NaN, which an integer cannot be."""
    return reduction("ReduceL1", node("Sub", x, x), _last(x), keepdims=1)


def _last(x: SymbolicArray) -> tuple[int, ...]:
    """The last axis, counted from the front: onnxruntime 1.30 does not reduce a batch of none over an axis that is counted from behind."""
    return (x.ndim - 1,)


fake_quantize.accepts = lambda x, **attrs: numpy.dtype(x.dtype) == numpy.float32 and set(attrs) <= {"levels", "bound"}  # type: ignore[attr-defined]


def of_constant(x: SymbolicArray, **attrs: Any) -> SymbolicArray:
    """A weight as integers can say it, under its name."""
    assert x.constant is not None
    found = constant(OPS["fake_quantize"](x.constant[...], **attrs), x.name)
    found.integers = attrs
    return found


def product_of_bytes(x: SymbolicArray, matrix: NumPyArray, name: str) -> SymbolicArray:
    """x · matrix for an `x` that has `integers` and a matrix (inputs, outputs) whose columns are integers within ±64 times a step."""
    given = x.integers
    q, step = integers_of(matrix.T)
    sums = node("MatMulInteger", given.q, constant(q.T, f"{name}.int8"), constant(numpy.uint8(_ZERO)))
    y = node("Mul", node("Cast", sums, to=TensorProto.FLOAT), constant(step * given.step, f"{name}.step"))
    return y if given.largest is None else node("Mul", y, given.largest)


def product_of_nibbles(x: SymbolicArray, matrix: NumPyArray, name: str, *, block: int) -> SymbolicArray:
    """x · matrix for a matrix (inputs, outputs) of which each block of a column is integers from −8 to 7 times a step."""
    q, steps, size = in_nibbles(matrix.T, block)
    y = foreign_node(
        "com.microsoft",
        "MatMulNBits",
        x,
        constant(q, f"{name}.int4"),
        constant(steps, f"{name}.steps"),
        like=x,
        features=matrix.shape[1],
        K=matrix.shape[0],
        N=matrix.shape[1],
        bits=4,
        block_size=size,
        accuracy_level=_BYTES_AS_THEY_ARE,
    )
    return node("Add", y, _no_number(x))


def in_nibbles(rows: NumPyArray, block: int) -> tuple[NumPyArray, NumPyArray, int]:
    """Integers plus 8, two in a byte (rows, blocks, bytes); the steps (rows, blocks); and the size of a block, a power of 2."""
    count, inputs = rows.shape
    size = min(block, max(_LEAST_BLOCK, 1 << (inputs - 1).bit_length()))
    blocks = -(-inputs // size)
    whole = numpy.zeros((count, blocks * size), rows.dtype)
    whole[:, :inputs] = rows
    parts = whole.reshape(count, blocks, size)
    largest = numpy.take_along_axis(parts, numpy.abs(parts).argmax(axis=-1)[..., None], axis=-1)
    steps = (largest / rows.dtype.type(-8)).astype(rows.dtype)
    q = numpy.rint(parts / numpy.where(steps == 0, 1, steps)).astype(numpy.int8) + 8
    return (q[..., ::2] | q[..., 1::2] << 4).astype(numpy.uint8), steps[..., 0], size


def rows_of_bytes(ids: SymbolicArray, table: SymbolicArray) -> SymbolicArray:
    """Rows of a table whose rows are integers times a step."""
    assert table.constant is not None
    q, step = integers_of(table.constant)
    rows = node("Gather", constant(q, f"{table.name or 'weight'}.int8"), ids, axis=0)
    steps = node("Gather", constant(step[:, None], f"{table.name or 'weight'}.step"), ids, axis=0)
    return node("Mul", node("Cast", rows, to=TensorProto.FLOAT), steps)
