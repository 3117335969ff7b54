"""What the compiled loops are given: arrays of one type, contiguous and aligned, and what belongs together as one tuple.

Of bfloat16 they are given the bits, beside parameters and statistics in float32.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy

from portnorm.arrays import is_bfloat16

NumPyArray = numpy.ndarray[Any, Any]

RANGE = {numpy.dtype("float32"): (1e-28, 1e32), numpy.dtype("float64"): (1e-280, 1e280)}
"""Bounds of σ² + ε: beyond them sums of squares may leave the type or lose bits, and the definition scales the row first."""


SHORT = 32
"""Values of the longest rows of which many are normalized at once, by two sums of `sums.TERMS` each; a longer one pays for itself."""


def computed(dtype: Any) -> Any:
    """The type in which kernels compute with such values: float32 for bfloat16."""
    return numpy.dtype("float32") if is_bfloat16(dtype) else dtype


def bits(x: NumPyArray) -> NumPyArray:
    """The values as compiled code sees them: those of bfloat16 by their bits, of which it makes numbers in its registers."""
    return x.view(numpy.uint16) if is_bfloat16(x.dtype) else x


def taken(p: Any, dtype: Any, shape: tuple[int, ...]) -> NumPyArray:
    """A parameter or a cotangent as a kernel takes it: of this type, contiguous and aligned, empty where there is none."""
    if p is None:
        return numpy.empty((0,) * len(shape), dtype=dtype)
    if p.shape == shape and p.dtype == dtype and p.flags.c_contiguous and p.flags.aligned:
        found: NumPyArray = p
        return found
    values = numpy.ascontiguousarray(p, dtype=dtype)
    return (values if values.flags.aligned else values.copy()).reshape(shape)


def writable(a: NumPyArray) -> NumPyArray:
    """`a` as compiled code takes it: contiguous, aligned, and of the one type that arrays have which can be written."""
    if a.flags.carray:  # all of that
        return a
    a = numpy.ascontiguousarray(a)
    return a if a.flags.aligned and a.flags.writeable else a.copy()


def can_take(out: Any, *others: Any) -> bool:
    """Whether a kernel can write into `out` while it reads the others."""
    contiguous = type(out) is numpy.ndarray and out.flags.c_contiguous and out.flags.aligned and out.flags.writeable
    return bool(contiguous and not any(p is not None and numpy.may_share_memory(out, p) for p in others))


# -- the time loop ---------------------------------------------------------------------------------------------------------------------

NONE, SHIFT, ROWS, OWN, GIVEN = range(5)
"""What a slot does: nothing, a shift alone, statistics of each row, of each feature over the batch, given statistics of each feature."""


class Terms(NamedTuple):
    """The input terms of some steps and sequences."""

    u: Any  # (steps, sequences, features)
    step: int  # the first of those steps
    sequence: int


class SlotArrays(NamedTuple):
    """A normalizer inside the loop: y = x̂ · weight + bias. A shift alone is in the packed weights already."""

    mode: int
    ends: Any  # (parts + 1,): where the parts of a row with statistics of their own begin and end
    weight: Any  # (features,)
    bias: Any  # (features,)
    xhat: Any  # (steps, batch, features)
    rstd: Any  # (steps, batch, parts), or of features (steps, 1, features)
    mean: Any  # (time, features), given or the batch's own; else (0, 0)
    var: Any
    eps: float
    center: bool
    smallest: float  # bounds of σ² + ε
    largest: float


class Shares(NamedTuple):
    """Cotangents of a slot's gain and shift: sums over all steps but for the last rows, and those."""

    dweight: Any  # (2, features) float64, with what rounding has lost
    dbias: Any
    weight: Any  # (3, features) in the type of the values: the last rows; the rows of a step before them, with what rounding has lost
    bias: Any
    rows: Any  # (1,): how many the last rows are


@functools.lru_cache(maxsize=64)
def idle(dtype: numpy.dtype[Any], size: int) -> SlotArrays:
    """A slot that does nothing. Nobody writes into it."""
    none, ones, zeros = numpy.empty((0, 0, 0), dtype=dtype), numpy.ones(size, dtype=dtype), numpy.zeros(size, dtype=dtype)
    statistics = none.reshape(0, 0)
    ends = numpy.zeros(1, dtype=numpy.int64)
    return SlotArrays(NONE, ends, ones, zeros, none, none, statistics, statistics, 0.0, True, *RANGE[dtype])


class Product(NamedTuple):
    """How a step multiplies."""

    address: int  # of the compiled function
    near: Any  # (rows, columns), what it reads of its rows at a time


class Rooms(NamedTuple):
    """What a step writes and nobody reads after it."""

    sums: Any  # (9, features): statistics of the hidden term over the batch
    narrow: Any  # (9, hidden): of the cell state
    z: Any  # (gates, hidden)
    row: Any  # (gates, hidden)
    states: Any  # (batch, hidden)
    small: Any  # (hidden,)
    zeros: Any  # (features,)
    product: Product
    over_batch: int  # the address of what takes statistics over the batch; 0 where nothing does


def rooms(gates: int, size: int, batch: int, dtype: Any, product: Product, over_batch: int) -> Rooms:
    """Zeroed room for the steps of one loop."""
    wide, both = gates * size, (gates, size)
    shapes: tuple[Any, ...] = ((9, wide), (9, size), both, both, (batch, size), size, wide)
    sums, narrow, z, row, states, small, zeros = (numpy.zeros(shape, dtype=dtype) for shape in shapes)
    return Rooms(sums, narrow, z, row, states, small, zeros, product, over_batch)
