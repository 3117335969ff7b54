"""What is known before the graph runs is folded away: chains of affine maps into weights, functions of table rows into the table.

Four rules, each applied while the graph is traced:

    (x·W + b) ⊙ s + t       is  x·(W ⊙ s) + (b ⊙ s + t)      batch normalization with fixed statistics disappears into the weights
    f(table[rows])          is  f(table)[rows]                one gain per step instead of a variance and a root
    f(step of xs)           is  a step of f(xs)               pointwise work on scanned inputs happens once, before the loop
    (a + s) + (b + t)       is  (a + b) + (s + t)             what a step has of two tables becomes one sum, known before the loop

The first is applied behind a matrix product only, whose rounding is of the same order; folding in front of one would cancel where
|mean| ≫ std.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy

from portnorm_onnx.symbolic import NumPyArray, Opset, SymbolicArray, constant, node, nodes, opset_of

Multiply = Callable[[SymbolicArray, NumPyArray, str], SymbolicArray]
"""How an array is multiplied with a known matrix (inputs, outputs) of a name."""


def plain_product(x: SymbolicArray, matrix: NumPyArray, name: str) -> SymbolicArray:
    """As numbers."""
    if not turned(x):
        return node("MatMul", x, constant(matrix, name))
    weight = constant(matrix.T, name.replace(".T", ""))
    if x.ndim == 2:
        return node("Gemm", x, weight, transB=1)
    rows, lengths = (numpy.array(shape, dtype=numpy.int64) for shape in ((-1, x.dims[-1]), (*x.dims[:-1], matrix.shape[1])))
    return node("Reshape", node("Gemm", node("Reshape", x, constant(rows)), weight, transB=1), constant(lengths))


def turned(x: SymbolicArray) -> bool:
    """Whether the target wants weights as they are stored, a row for each output."""
    opset = opset_of(x)
    return opset is not None and opset.target.output_rows and all(isinstance(d, int) for d in x.dims)


class Affine(NamedTuple):
    """An array as x·(weight ⊙ scale) + shift; scale and shift in float64. The weight stays what was given: wide ones are not held twice."""

    x: SymbolicArray
    weight: NumPyArray
    scale: NumPyArray | None
    shift: NumPyArray
    name: str
    multiply: Multiply
    product: NumPyArray | None = None
    """weight ⊙ scale where that was made already."""

    def matrix(self, dtype: Any) -> NumPyArray:
        """weight ⊙ scale, rounded once."""
        if self.scale is None:
            return self.weight.astype(dtype, copy=False)
        if self.product is not None and self.product.dtype == dtype:
            return self.product
        rounded: NumPyArray = numpy.empty(self.weight.shape, dtype)
        # In float64 piece by piece, in NumPy's own buffers: wide weights are not there in it as a whole.
        return numpy.multiply(self.weight, self.scale, out=rounded, dtype=numpy.float64, casting="unsafe")


def product(
    x: SymbolicArray, weight: SymbolicArray, bias: SymbolicArray | None, multiply: Multiply = plain_product
) -> SymbolicArray | None:
    """x · weightᵀ + bias with constant weights; `None` where this is not known or not to be folded."""
    opset = opset_of(x)
    if opset is None or not opset.fold or weight.constant is None or (bias is not None and bias.constant is None):
        return None
    matrix = weight.constant.T
    shift = numpy.zeros(matrix.shape[1]) if bias is None or bias.constant is None else bias.constant.astype(numpy.float64)
    return _made(Affine(x, matrix, None, shift, f"{weight.name or 'weight'}.T", multiply), x.dtype)


def _made(a: Affine, dtype: Any) -> SymbolicArray:
    matrix = a.matrix(dtype)
    y = a.multiply(a.x, matrix, a.name)
    if a.shift.any():
        y = node("Add", y, constant(a.shift.astype(dtype)))
    y.affine = a._replace(product=None if a.scale is None else matrix)
    return y


def scaled(y: SymbolicArray, scale: NumPyArray, shift: NumPyArray) -> SymbolicArray:
    """y ⊙ scale + shift, folded into the product that gives `y`."""
    a = y.affine
    if not numpy.any(scale != 1.0):  # the weight stays as it is, and keeps its name
        return _made(a._replace(shift=a.shift + numpy.asarray(shift, dtype=numpy.float64).reshape(-1)), y.dtype)
    scale, shift = (numpy.asarray(v, dtype=numpy.float64).reshape(-1) for v in (scale, shift))
    name = a.name if a.name.endswith(".folded") else f"{a.name}.folded"
    whole = scale if a.scale is None else a.scale * scale
    return _made(a._replace(scale=whole, shift=a.shift * scale + shift, name=name, product=None), y.dtype)


def folded(op_type: str, args: tuple[SymbolicArray, ...], function: Callable[..., Any], row: Callable[..., SymbolicArray]) -> Any:
    """A pointwise operation of which something is known, or `None`."""
    opset = opset_of(*args)
    if opset is None or not opset.fold:
        return None
    for found in (_into_product(op_type, args), _into_table(args, function), _before_loop(args, function, row)):
        if found is not None:
            return found
    return _one_shift(op_type, args, row)


def _one_shift(op_type: str, args: tuple[SymbolicArray, ...], row: Callable[..., SymbolicArray]) -> SymbolicArray | None:
    """(a + s) + (b + t) as (a + b) + (s + t), where s and t are what all rows of a step have alike: s + t is known before the loop."""
    if op_type != "Add":
        return None
    first, second = (_shifted(a) for a in args)
    if first is None or second is None:
        return None
    return row(row(first[0], second[0]), row(first[1], second[1]))


def _shifted(a: SymbolicArray) -> tuple[SymbolicArray, SymbolicArray] | None:
    """An array in a loop as a sum with a step of a table, where it is one, there or before the loop."""
    if a.step_of is not None:
        frame, outer = a.step_of
        if not (frame.opset.target.late_terms and _is_of_rows(outer, "Add")) or _is_one_row(outer):
            return None
        a = frame.again(outer)
    if a.producer is None or a.producer.op_type != "Add":
        return None
    found, shift = a.producer.inputs
    assert found is not None
    assert shift is not None
    is_row = shift.step_of is not None and shift.step_of[1].rows_of is not None and shift.ndim == 1
    return (found, shift) if is_row else None


def _into_product(op_type: str, args: tuple[SymbolicArray, ...]) -> SymbolicArray | None:
    if len(args) != 2 or op_type not in ("Add", "Sub", "Mul", "Div"):
        return None
    first, second = args
    y, other = (first, second) if first.affine is not None else (second, first)
    if y.affine is None or other.constant is None or not _along_last(other.constant, y):
        return None
    c = other.constant.astype(numpy.float64)
    if y is second and op_type in ("Sub", "Div"):
        return scaled(y, numpy.asarray(-1.0), c) if op_type == "Sub" else None
    if op_type == "Div":
        return None if not c.all() else scaled(y, 1.0 / c, numpy.asarray(0.0))
    one, zero = numpy.asarray(1.0), numpy.asarray(0.0)
    factor, term = {"Add": (one, c), "Sub": (one, -c), "Mul": (c, zero)}[op_type]
    return scaled(y, factor, term)


def _along_last(values: NumPyArray, y: SymbolicArray) -> bool:
    """Whether a constant broadcasts along the last axis of `y` only, and leaves its shape as it is."""
    return values.ndim <= len(y.dims) and values.size in (1, y.dims[-1]) and (values.size == 1 or values.shape[-1] == values.size)


def table_rows(table: SymbolicArray, rows: SymbolicArray) -> SymbolicArray:
    """table[rows], remembered as such."""
    found = node("Gather", table, rows, axis=0)
    found.rows_of = (table, rows)
    return found


def _into_table(args: tuple[SymbolicArray, ...], function: Callable[..., Any]) -> SymbolicArray | None:
    looked = [a.rows_of for a in args if a.rows_of is not None]
    if not looked or any(a.rows_of is None and a.constant is None for a in args) or any(rows is not looked[0][1] for _, rows in looked):
        return None
    if any(a.constant is not None and a.constant.ndim >= len(looked[0][0].dims) for a in args):
        return None
    values = function(*(a.constant if a.rows_of is None else a.rows_of[0].constant for a in args))
    return table_rows(constant(values), looked[0][1])


def one_row(a: SymbolicArray) -> SymbolicArray:
    """`a`, or where it is rows of a table that has only one: that one, which broadcasts to what it was."""
    if a.rows_of is None or a.rows_of[0].dims[0] != 1 or a.opset is None or not a.opset.fold:
        return a
    return constant(a.rows_of[0].constant)


class Frame:
    """The loop whose body is being traced: its scanned inputs, of which there can be more than were given."""

    def __init__(self, opset: Opset) -> None:
        self.opset = opset
        self.scanned: list[SymbolicArray] = []
        self.steps: list[SymbolicArray] = []

    def step(self, outer: SymbolicArray) -> SymbolicArray:
        """One step of a scanned input; where all steps are the same known row, that."""
        only = one_row(outer)
        if only is not outer and only.constant is not None:
            return constant(only.constant[0])
        for other, symbol in zip(self.scanned, self.steps, strict=True):
            if other is outer:
                return symbol
        if (inside := self._inside(outer)) is not None:
            return inside
        symbol = SymbolicArray(outer.dtype, outer.dims[1:], self.opset)
        symbol.step_of = (self, outer)
        self.scanned.append(outer)
        self.steps.append(symbol)
        return symbol

    def _inside(self, outer: SymbolicArray) -> SymbolicArray | None:
        """One step of what is better made of the step itself: a row is then in the cache when the loop reads it."""
        late = self.opset.fold and self.opset.target.late_terms and _is_late(outer)
        return self.again(outer) if (late or _is_normalized(outer)) and not _is_one_row(outer) else None

    def again(self, outer: SymbolicArray) -> SymbolicArray:
        """One step of what a node gives, as the node of a step."""
        n, inputs = outer.producer, []
        assert n is not None
        for a in n.inputs:
            if a is None or a.constant is not None:
                inputs.append(a)
            else:
                inputs.append(self.again(a) if _is_of_rows(a, "Mul") else self.step(_of_step(a)))
        axis = {"axis": outer.ndim - 2} if "axis" in n.attributes else {}
        return nodes(n.op_type, len(n.outputs), *inputs, **{**n.attributes, **axis})[n.outputs.index(outer)]


_NARROW = 16
"""Inputs up to which a product is made in the loop. On one core, AVX-512, onnxruntime and OpenVINO then take 0.8 to 0.9 of the time for 64
rows of 100 features, and 1.03 to 1.05 for one row."""


def _is_late(a: SymbolicArray) -> bool:
    """Whether it is the product of a few inputs, a part of it, or that times and plus what all rows have alike; or parts, normalized."""
    n = a.producer
    if n is None or n.attributes.get("axis", -1) not in (-1, a.ndim - 1):
        return False
    first, *others = (i for i in n.inputs if i is not None)
    if n.op_type == "Concat":
        return all(_is_normalized(part) for part in (first, *others))
    if n.op_type == "MatMul":
        wide_enough = numpy.dtype(a.dtype).itemsize >= 4  # narrow types are converted around each product
        return wide_enough and others[0].constant is not None and int(others[0].dims[0]) <= _NARROW
    if n.op_type in ("Mul", "Add") and not _is_of_rows(a, n.op_type):
        return others[0].constant is not None and others[0].ndim == 1 and _is_late(first)
    return n.op_type in ("Split", "Mul", "Add") and _is_late(first)


def _is_of_rows(a: SymbolicArray, op_type: str) -> bool:
    """Whether it is something times or plus what all rows of a step have alike, of a table."""
    n = a.producer
    if n is None or n.op_type != op_type or n.inputs[1] is None:
        return False
    return n.inputs[1].rows_of is not None and n.inputs[1].dims[1:-1] == (1,)


def _is_normalized(a: SymbolicArray) -> bool:
    """Whether it is a normalization of its last axis, with constant gain and shift."""
    n = a.producer
    if n is None or n.op_type not in ("LayerNormalization", "RMSNormalization") or n.attributes["axis"] != a.ndim - 1:
        return False
    x, *others = n.inputs
    return x is not None and all(other is None or other.constant is not None for other in others)


def _of_step(a: SymbolicArray) -> SymbolicArray:
    """Rows of a table that stand for all rows of a step, without an axis for these."""
    if a.rows_of is None or a.dims[1:-1] != (1,):
        return a
    table, rows = a.rows_of
    return table_rows(constant(table.constant[:, 0]), rows)


def _is_one_row(a: SymbolicArray) -> bool:
    """Whether a step of it is known to be one row, for which a node in the loop takes longer than the row."""
    return a.dims[1:-1] == (1,) * (a.ndim - 2)


def _before_loop(args: tuple[SymbolicArray, ...], function: Callable[..., Any], row: Callable[..., SymbolicArray]) -> SymbolicArray | None:
    steps = [a for a in args if a.step_of is not None]
    if not steps or any(a.step_of is None and a.constant is None for a in args):
        return None
    frame = steps[0].step_of[0]
    if any(a.step_of[0] is not frame for a in steps) or len({a.dims for a in steps}) > 1 or len(steps[0].dims) != 1:
        return None
    if any(a.constant is not None and a.constant.ndim > 1 for a in args):
        return None
    whole = [a if a.step_of is None else a.step_of[1] for a in args]
    known = all(a.constant is not None for a in whole)
    result: SymbolicArray = frame.step(constant(function(*(a.constant for a in whole))) if known else row(*whole))
    return result
