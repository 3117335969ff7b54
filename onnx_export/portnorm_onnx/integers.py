"""Products of integers in a graph: what `portnorm.fake_quantize` stands for where its result is multiplied with known weights.

    QuantizeLinear(x / m, 1/127, 128) → MatMulInteger(uint8, int8) → Cast → Mul(s_w / 127) → Mul(m)

The operators are of the ONNX standard alone, so that every target reads them; onnxruntime makes one of some. m is the largest |x| of each
row, and left out where a bound of 1 is known. Weights come as numbers that integers can say; their steps are found again from the largest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
from onnx import TensorProto

from portnorm.op import OPS
from portnorm.quantization import INPUTS, WEIGHTS
from portnorm_onnx.symbolic import NumPyArray, SymbolicArray, constant, node

_ZERO = 128


@dataclass(frozen=True, eq=False)
class Integers:
    """What an array is the product of: integers around 128, a step for all, and the largest number of each row or `None` for 1."""

    q: SymbolicArray
    step: NumPyArray
    largest: SymbolicArray | None


def fake_quantize(x: SymbolicArray, *, levels: int = INPUTS, bound: float | None = None) -> SymbolicArray:
    """Integers that are read as such by a product, and as numbers by whatever else asks."""
    largest = None
    if x.dims[-1] != 0 and bound is None:
        least = constant(numpy.asarray(numpy.finfo(x.dtype).smallest_normal, x.dtype))
        largest = node("Max", node("ReduceMax", node("Abs", x), constant(numpy.array([-1])), keepdims=1), least)
    elif bound not in (None, 1.0):
        largest = constant(numpy.asarray(bound, x.dtype))
    step = numpy.asarray(1.0 / levels, x.dtype)
    q = node("QuantizeLinear", x if largest is None else node("Div", x, largest), constant(step), constant(numpy.uint8(_ZERO)))
    y = node("DequantizeLinear", q, constant(step), constant(numpy.uint8(_ZERO)))
    y = y if largest is None else node("Mul", y, largest)
    y.integers, y.shaped_as = Integers(q, step, largest), x
    return y


def of_constant(x: SymbolicArray, **attrs: Any) -> SymbolicArray:
    """A weight as integers can say it, under its name."""
    found = constant(OPS["fake_quantize"].definition(x.constant, **attrs)[0], x.name)
    found.integers = WEIGHTS
    return found


def integer_product(x: SymbolicArray, matrix: NumPyArray, name: str) -> SymbolicArray:
    """x · matrix for an `x` that has `integers` and a matrix (inputs, outputs) whose columns are integers within ±64 times a step."""
    given = x.integers
    q, step = _read(matrix, 0)
    sums = node("MatMulInteger", given.q, constant(q, f"{name}.int8"), constant(numpy.uint8(_ZERO)))
    y = node("Mul", node("Cast", sums, to=TensorProto.FLOAT), constant(step * given.step, f"{name}.step"))
    return y if given.largest is None else node("Mul", y, given.largest)


def integer_rows(ids: SymbolicArray, table: SymbolicArray) -> SymbolicArray:
    """Rows of a table whose rows are integers times a step."""
    assert table.constant is not None
    q, step = _read(table.constant, 1)
    rows = node("Gather", constant(q, f"{table.name or 'weight'}.int8"), ids, axis=0)
    steps = node("Gather", constant(step[:, None], f"{table.name or 'weight'}.step"), ids, axis=0)
    return node("Mul", node("Cast", rows, to=TensorProto.FLOAT), steps)


def _read(values: NumPyArray, axis: int) -> tuple[NumPyArray, NumPyArray]:
    """The integers of rounded weights, and the steps, one for what lies along the axis."""
    step: NumPyArray = numpy.max(numpy.abs(values), axis=axis, initial=0.0).astype(values.dtype) / values.dtype.type(WEIGHTS)
    return numpy.rint(values / numpy.expand_dims(numpy.where(step > 0, step, 1.0), axis)).astype(numpy.int8), step
