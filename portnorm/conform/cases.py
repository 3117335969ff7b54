"""The table of cases: operation × regime × type, each a few arrays made from a fixed seed."""

from __future__ import annotations

import difflib
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy

import portnorm as pn
from portnorm.errors import UnsupportedError
from portnorm.op import Op

NumPyArray = numpy.ndarray[Any, Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """A normalization over the shared core: how it is called, and over which axes the truth is taken."""

    name: str
    call: Op[..., Any]
    """The Op, called as `call(x, weight, bias, eps=…)`; rms_norm without bias, group_norm with its groups."""
    shape: Shape
    long: Callable[[int], Shape]
    """The same with so many values in a statistic, a power of four."""
    axes: Callable[[Shape], tuple[int, ...]]
    """Axes of a statistic, in the shape of `grouped`."""
    channel: int = 1
    center: bool = True
    groups: int | None = None
    field: bool = True
    """Whether others' normalizations are measured on it unless operations are named."""
    given: bool = False
    """Whether mean and variance are given, as a trained model has them, and are those of `x` rounded to the type that they are kept in."""

    def arguments(self, x: Any, weight: Any, bias: Any) -> tuple[Any, ...]:
        groups = () if self.groups is None else (self.groups,)
        return (x, *groups, weight, bias) if self.center else (x, weight)

    def grouped(self, shape: Shape) -> Shape:
        """The shape in which `axes` are meant: with channels cut into groups where there are any."""
        if self.groups is None:
            return shape
        return (shape[0], self.groups, shape[1] // self.groups, *shape[2:])


def _space(shape: Shape) -> tuple[int, ...]:
    return tuple(range(2, len(shape)))


def _all_but_channels(shape: Shape) -> tuple[int, ...]:
    return tuple(a for a in range(len(shape)) if a != 1)


STATISTICS = "batch_norm with statistics"
"""The operation that a trained batch normalization is."""

OPERATIONS: dict[str, Operation] = {
    row.name: row
    for row in (
        Operation("layer_norm", pn.layer_norm, (16, 96), lambda n: (2, n), lambda s: (1,)),
        Operation("rms_norm", pn.rms_norm, (16, 96), lambda n: (2, n), lambda s: (1,), center=False),
        Operation("group_norm", pn.group_norm, (4, 6, 7, 5), lambda n: (1, 4, n // 4, 2), lambda s: (2, *range(3, len(s))), groups=2),
        Operation("instance_norm", pn.instance_norm, (4, 5, 8, 9), lambda n: (1, 2, math.isqrt(n), math.isqrt(n)), _space),
        Operation("batch_norm", pn.batch_norm, (64, 6), lambda n: (n, 2), _all_but_channels, field=False),
        Operation("batch_norm of a map", pn.batch_norm, (8, 4, 6, 7), lambda n: (n // 64, 2, 8, 8), _all_but_channels),
        Operation(STATISTICS, pn.batch_norm, (8, 4, 6, 7), lambda n: (n // 64, 2, 8, 8), _all_but_channels, given=True),
    )
}


@dataclass(frozen=True)
class Regime:
    """What the values are like."""

    name: str
    make: Callable[[numpy.random.Generator, Shape, Any], NumPyArray]
    """`x` in float64 from a generator, a shape and the type it will be rounded to."""
    eps: float = 1e-5
    values: int | None = None
    """How many values a statistic has, where the long shape is taken."""
    shape: Callable[[Shape], Shape] | None = None
    """What becomes of the operation's shape."""
    dtypes: tuple[str, ...] = ("float16", "bfloat16", "float32", "float64")
    gradient: bool = True
    """Whether the gradient is measured. That of one value is 0, or what is left of a difference of equal terms."""
    subnormal: tuple[str, ...] = ()
    """Sides on which results lie below the smallest normal number: not measured of a library that takes those as 0."""
    like: str = ""
    """What data looks like that."""
    shows: str = ""
    """What an error in it tells of a subject."""
    immense: tuple[str, ...] = ()
    """Types in which the variance is beyond what statistics are kept in, so that none can be given."""
    field: bool = False
    """Whether normalizations of other libraries are measured in it too; the rest is what portnorm promises beyond that."""


def _normal(rng: numpy.random.Generator, shape: Shape, dtype: Any) -> NumPyArray:
    return rng.standard_normal(shape)


def _with_mean(mean: float, std: float = 1.0) -> Callable[..., NumPyArray]:
    return lambda rng, shape, dtype: mean + std * rng.standard_normal(shape)


def _scaled(exponent: Callable[[Any], float]) -> Callable[..., NumPyArray]:
    """Normal values times the power of two that `exponent` names for the range of the type."""
    return lambda rng, shape, dtype: rng.standard_normal(shape).clip(-3, 3) * 2.0 ** exponent(dtype)


def _constant(value: float, jitter: float = 0.0, units: int = 0) -> Callable[..., NumPyArray]:
    """About the same value everywhere: up to `jitter`, or so many units in its last place, to either side."""

    def make(rng: numpy.random.Generator, shape: Shape, dtype: Any) -> NumPyArray:
        whole = as_type(numpy.full(shape, value), dtype)
        if not (jitter or units):
            return whole
        unit = 2.0 ** (math.floor(math.log2(value)) - {"float32": 23, "float64": 52}[dtype])
        return whole + jitter * rng.uniform(-1, 1, shape) + unit * rng.integers(-units, units + 1, shape)

    return make


def _with_holes(rng: numpy.random.Generator, shape: Shape, dtype: Any) -> NumPyArray:
    """A NaN and an infinity, each in one statistic; the others must not see them."""
    x = rng.standard_normal(shape)
    x[(0,) * x.ndim], x[(-1,) * x.ndim] = numpy.nan, numpy.inf
    return x


def _near_the_largest(rng: numpy.random.Generator, shape: Shape, dtype: Any) -> NumPyArray:
    largest = {"float16": 65504.0, "bfloat16": 3.3895e38, "float32": 3.4028e38, "float64": 1.797e308}[dtype]
    return rng.choice([-1.0, 1.0], shape) * rng.uniform(0.5, 0.99, shape) * largest


def _image(shape: Shape) -> Shape:
    """64 channels of 56 × 56, twice; its positions as rows where an operation takes those."""
    return (2, 64, 56, 56) if len(shape) == 4 else (2 * 56 * 56, 64)


_WIDE = ("float32", "float64")
_HALF = ("float16", "bfloat16")

REGIMES: dict[str, Regime] = {
    row.name: row
    for row in (
        Regime(
            "normal",
            _normal,
            like="activations, and inputs that were standardized",
            shows="the row of the table is wrong, or ε is elsewhere",
            field=True,
        ),
        Regime(
            "mean 3 std",
            _with_mean(3.0),
            like="photographs, with pixels from 0 to 255",
            shows="nothing but rounding in any form: the lower end of the plot",
            field=True,
        ),
        Regime(
            "mean 10 std",
            _with_mean(10.0),
            like="kelvin over a year, pulse, blood pressure",
            shows="one pass begins to lose digits",
            field=True,
        ),
        Regime(
            "mean 1e2 std",
            _with_mean(1e2),
            like="kelvin in a room, audio in dB where nobody speaks, CT within the liver",
            shows="one pass: 3 of 7 digits are left",
            field=True,
        ),
        Regime(
            "mean 1e3 std",
            _with_mean(1e3),
            like="air pressure in pascal over a day",
            shows="one pass: a digit is left; x·s + t of given statistics",
            field=True,
        ),
        Regime(
            "mean 1e4 std",
            _with_mean(1e4),
            dtypes=("float16", "float32", "float64"),
            like="the frequency of the grid in hertz, altitude of a satellite in metres",
            shows="one pass: NaN, a variance below 0, or the largest error",
            field=True,
        ),
        Regime(
            "mean 1e6 std",
            _with_mean(1e6),
            dtypes=_WIDE,
            like="timestamps in seconds within an hour",
            shows="a mean that is not taken twice; x·s + t of given statistics",
            field=True,
        ),
        Regime("mean 1e8 std", _with_mean(1e8), dtypes=("float32", "float64")),
        Regime("N(1e4, 0.01)", _with_mean(1e4, 0.01), dtypes=("float32", "float64")),
        Regime("tiny variance", _with_mean(1.0, 1e-6), dtypes=("float32", "float64")),
        Regime("constant", lambda rng, shape, dtype: numpy.full(shape, 1234.5)),
        Regime(
            "constant 0.1",
            _constant(0.1),
            like="padding, a dead channel",
            shows="a mean that is not the value: 1/√ε makes 316 times of what it is off by",
            field=True,
        ),
        Regime(
            "constant 1234",
            _constant(1234.0),
            like="CT outside of the body, a sensor that is stuck",
            shows="the same, and a variance below 0 by more than ε",
            field=True,
        ),
        Regime(
            "constant 1e6",
            _constant(1e6),
            dtypes=("bfloat16", *_WIDE),
            like="a counter that nothing moves",
            shows="the same, tens large",
            field=True,
        ),
        Regime("largest float16", lambda rng, shape, dtype: rng.choice([-1.0, 1.0], shape) * rng.uniform(3e4, 6.5e4, shape)),
        Regime(
            "spread of 30",
            _with_mean(0.0, 30.0),
            dtypes=_HALF,
            like="logits; sums of squares leave float16 at 30 values",
            shows="sums of squares in float16",
            field=True,
        ),
        Regime(
            "±300",
            lambda rng, shape, dtype: rng.choice([-300.0, 300.0], shape) * rng.uniform(0.9, 1.1, shape),
            dtypes=_HALF,
            like="outlier features of a transformer; a square leaves float16",
            shows="squares in float16: the result is the shift alone",
            field=True,
        ),
        Regime(
            "near the largest",
            _near_the_largest,
            subnormal=("gradient",),
            immense=("bfloat16", *_WIDE),
            like="a training run that diverges",
            shows="squares that leave the type of the statistics",
            field=True,
        ),
        *(
            Regime(f"rows of {n}, mean {name} std", _with_mean(mean), values=n, dtypes=_WIDE, like=like, shows=shows, field=True)
            for n, like, shows in (
                (4**3, "a head of attention", "nothing that longer rows do not: the yardstick for them"),
                (4**6, "the width of a language model", "sums that go one after the other"),
                (4**8, "a picture or a second of sound", "the same, sixteen times as much"),
            )
            for name, mean in (("1e2", 1e2), ("1e4", 1e4))
        ),
        Regime(
            "image, mean 1e2 std",
            _with_mean(1e2),
            shape=_image,
            dtypes=_WIDE,
            like="a feature map of a ResNet",
            shows="another kernel for images than for small arrays",
            field=True,
        ),
        # Squares overflow, or underflow, in the type of the statistics.
        Regime("huge", _scaled(lambda d: {"float32": 100.0, "float64": 800.0}[d]), dtypes=("float32", "float64")),
        Regime("tiny", _scaled(lambda d: {"float32": -100.0, "float64": -900.0}[d]), dtypes=("float32", "float64")),
        Regime("tiny, eps 0", _scaled(lambda d: {"float32": -100.0, "float64": -900.0}[d]), eps=0.0, dtypes=("float32", "float64")),
        Regime(
            "subnormal",
            _scaled(lambda d: {"float16": -18.0, "bfloat16": -128.0, "float32": -132.0, "float64": -1040.0}[d]),
            dtypes=("float16", "float32", "float64"),
            subnormal=("forward", "gradient"),
        ),
        # The truth of float64 is slow to compute, and has 65536 values at most above.
        Regime("rows of 2^20", _normal, values=2**20, dtypes=("float32",)),
        Regime("rows of 2^20, mean 1e4 std", _with_mean(1e4), values=2**20, dtypes=("float32",)),
        # Like terms: each addition rounds in the same direction. The square of this value has no zeros at its end.
        *(
            Regime(f"{name}, rows of {values}", _constant(1.9438, jitter, units), values=values, dtypes=("float32", "float64"))
            for values in (4**6, 4**8)
            for name, jitter, units in (("constant", 0.0, 0), ("constant within 1e-3", 1e-3, 0), ("constant within an ULP", 0.0, 1))
        ),
        Regime("NaN and Inf", _with_holes),
        Regime("one value", _normal, gradient=False, shape=lambda s: (*s[:1], 1) if len(s) == 2 else (*s[:2], *(1 for _ in s[2:]))),
        Regime("no values", _normal, shape=lambda s: (0, *s[1:])),
    )
}

DTYPES = ("float32", "float64", "float16", "bfloat16")


@dataclass(frozen=True)
class Case:
    """One operation in one regime and type. The arrays are made anew at every call, from the case's own seed.

    Gain and shift are those of the operation, type and number of channels, so that regimes can share what is compiled of them.
    """

    operation: Operation
    regime: Regime
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.operation.name} / {self.regime.name} / {self.dtype}"

    @property
    def shape(self) -> Shape:
        values = self.regime.values
        shape = self.operation.shape if values is None else self.operation.long(values)
        return shape if self.regime.shape is None else self.regime.shape(shape)

    @property
    def eps(self) -> float:
        return self.regime.eps

    def arrays(self) -> dict[str, NumPyArray]:
        """`x`, `weight`, `bias` and a cotangent `dy`, in float64 but with values of the case's type.

        Where statistics are given, `mean` and `var` too, with values of at least float32.
        """
        rng = numpy.random.default_rng(zlib.crc32(self.name.encode()))
        shape, channels = self.shape, self.shape[self.operation.channel]
        shared = numpy.random.default_rng(zlib.crc32(f"{self.operation.name} {channels} {self.dtype}".encode()))
        made = {
            "x": self.regime.make(rng, shape, self.dtype),
            "weight": shared.uniform(0.5, 2.0, channels),
            "bias": shared.uniform(-1.0, 1.0, channels) if self.operation.center else numpy.zeros(channels),
            "dy": rng.standard_normal(shape),
        }
        found = {name: as_type(a, self.dtype) for name, a in made.items()}
        if self.operation.given:
            axes, kept = self.operation.axes(shape), statistics_type(self.dtype)
            with numpy.errstate(over="ignore", invalid="ignore"):
                statistics = {"mean": (found["x"] * 2.0**-30).mean(axis=axes) * 2.0**30, "var": found["x"].var(axis=axes)}
            found |= {name: as_type(a, kept) for name, a in statistics.items()}
        return found

    def reproduce(self) -> str:
        """Lines of Python that make the arrays."""
        return (
            "from portnorm import conform\n"
            f"case = conform.find({self.operation.name!r}, {self.regime.name!r}, {self.dtype!r})\n"
            "arrays = case.arrays()  # x, weight, bias, dy in float64"
        )


def statistics_type(dtype: str) -> str:
    """What statistics of values of a type are kept in."""
    return "float64" if dtype == "float64" else "float32"


def as_type(a: NumPyArray, dtype: str) -> NumPyArray:
    """Values rounded to a type, in float64."""
    with numpy.errstate(over="ignore"):
        if dtype == "bfloat16":  # to nearest, ties to even, of float32 cut to its upper half
            bits = a.astype(numpy.float32).view(numpy.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            found: NumPyArray = numpy.where(numpy.isnan(a), numpy.nan, rounded.astype(numpy.uint32).view(numpy.float32)).astype(
                numpy.float64
            )
            return found
        return a.astype(dtype).astype(numpy.float64)


def cells() -> list[str]:
    """The recurrent cells that are measured too, by name: `LSTM plain`, `LSTM layer`, …"""
    return [f"{cell} {preset or 'plain'}" for cell, table in pn.VARIANTS.items() for preset in table]


def check_names(operations: Any = None, regimes: Any = None, dtypes: Any = None) -> None:
    """Raise `UnsupportedError` for a name that there is not, with the one that may be meant; `None` is all of a kind."""
    tables = (("operation", operations, [*OPERATIONS, *cells()]), ("regime", regimes, [*REGIMES]), ("dtype", dtypes, [*DTYPES]))
    for what, chosen, known in tables:
        for name in chosen or ():
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise UnsupportedError(f"there is no {what} {name!r}; {hint}expected some of {', '.join(map(repr, known))}")


def cases(operations: Any = None, regimes: Any = None, dtypes: Any = None) -> Iterator[Case]:
    """All cases, or those of the named operations, regimes and types; raises `UnsupportedError` for a name that there is not.

    A recurrent cell may be named among the operations: it is none of these cases, and `measure` takes it beside them.
    """
    operations, regimes, dtypes = (None if some is None else list(some) for some in (operations, regimes, dtypes))
    check_names(operations, regimes, dtypes)
    return _cases(operations, regimes, dtypes)


def _cases(operations: Any, regimes: Any, dtypes: Any) -> Iterator[Case]:
    for operation in OPERATIONS.values():
        for regime in REGIMES.values():
            for dtype in DTYPES:
                wanted = all(
                    chosen is None or name in chosen
                    for chosen, name in ((operations, operation.name), (regimes, regime.name), (dtypes, dtype))
                )
                if wanted and dtype in regime.dtypes and (not operation.given or (regime.field and dtype not in regime.immense)):
                    yield Case(operation, regime, dtype)


def find(operation: str, regime: str, dtype: str = "float32") -> Case:
    """One case by its names; raises `UnsupportedError`."""
    try:
        check_names([operation], [regime], [dtype])
    except UnsupportedError as error:
        raise UnsupportedError(f"there is no case {operation!r}, {regime!r}, {dtype!r}: {error}") from None
    found = next(_cases([operation], [regime], [dtype]), None)
    if found is None:
        row, of = OPERATIONS.get(operation), REGIMES[regime]
        why = f"this regime is of {', '.join(of.dtypes)}"
        if row is not None and row.given and dtype in of.dtypes:
            why = "statistics are given in the regimes of the field, where they are finite"
        raise UnsupportedError(
            f"there is no case {operation!r}, {regime!r}, {dtype!r}; {why}"
            if row is not None
            else f"there is no case {operation!r}, which is a recurrent cell; portnorm.conform.measure takes those"
        )
    return found
