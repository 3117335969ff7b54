"""How far a graph may be from its model: what each gate allows, and what rounding alone does to an eager run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy

from portnorm.errors import ConformanceError
from portnorm.quantization import rounding_moved
from portnorm_onnx.nothing import floats

T = TypeVar("T")
NumPyArray = numpy.ndarray[Any, Any]

# One step: units in the last place of the largest value, at least of 1; 16 units of float32 are 1.9e-6. A matrix product summed in another
# order moves a state by a few units. float64 has more room, since runtimes keep epsilon and some tables of constants in float32.
STEP_ULP = {"float16": 16, "bfloat16": 16, "float32": 16, "float64": 2**14}
EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
# Where one step amplifies rounding by itself (a gain of 3 over a small variance), eager float32 is further from float64 than that; then
# the graph may be a few times as far.
STEP_FACTOR = 4.0
# How far eager float32 is from float64 is a matter of luck in a net that amplifies rounding: a graph that looks wrong gets a second look
# at the worst of this many eager runs, each with inputs moved by at most one unit in the last place. For one step inputs alone show too
# little, since layer normalization takes back what scales all gates alike, as a change of a single pixel does: there weights are moved too.
ROUNDINGS = 8
# Of a step between two integers: numbers so near to the middle may be rounded to either. What goes into a rounding may differ by the units
# in the last place of the first gate, and is at most 127 steps.
TURN = 127 * 16 * 2.0**-23
# A graph of a fixed number of steps: the states that they are tried from.
ROUNDS = 3
# Trajectory: a multiple of the eager run's own distance to float64, and a floor for where that is zero by chance. Nothing more exact than
# a float64 run is at hand, so there the floor is relative.
FACTOR = 10.0
FLOOR = {"float16": 4e-3, "bfloat16": 4e-2, "float32": 1e-6, "float64": 1e-11}


def of_turned_rounding(run: Callable[..., T], *args: Any) -> list[T]:
    """Results where what is rounded to integers is taken for a little less, and for a little more."""
    found = []
    for by in (-TURN, TURN):
        with rounding_moved(by):
            found.append(run(*args))
    return found


def wide(a: NumPyArray) -> NumPyArray:
    """In float64."""
    return a.astype(numpy.float64)


def nudged(values: Any, seed: int, dtype: str | None = None) -> Any:
    """Every number moved by at most one unit in its last place, in its own type or `dtype`: as good an input as the one given."""
    rng = numpy.random.default_rng(seed)

    def change(a: NumPyArray) -> NumPyArray:
        unit = numpy.finfo(a.dtype).eps if dtype is None else EPS[dtype]
        return (a * (1 + unit * rng.integers(-1, 2, a.shape))).astype(a.dtype)

    return floats(change, values)


def largest_of(values: NumPyArray) -> float:
    return float(numpy.max(numpy.abs(values), initial=0.0))


def distance(name: str, result: NumPyArray, expected: NumPyArray) -> float:
    """Largest absolute difference; NaN against NaN is none."""
    if result.shape != expected.shape:
        raise ConformanceError(f"{name!r} has shape {result.shape} in the runtime but {expected.shape} eagerly")
    both_nan = numpy.isnan(result) & numpy.isnan(expected)
    difference = numpy.where(both_nan, 0.0, numpy.abs(result.astype(numpy.float64) - expected.astype(numpy.float64)))
    return float(numpy.max(difference, initial=0.0))


def first_difference(result: NumPyArray, expected: NumPyArray, allowed: float) -> str:
    wrong = numpy.argwhere(~(numpy.abs(result.astype(numpy.float64) - expected) <= allowed))
    return f"; first at index {tuple(int(i) for i in wrong[0])}" if len(wrong) else ""
