"""What is measured, and the numbers that every engine gets: rows of a table, of an operation, its kind, type, directions and shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy

from portnorm.cells.variants import NormName
from portnorm.dtypes import float32_value
from portnorm.layers.recurrent import GRU, LSTM, Recurrent
from portnorm.norm.batch import batch_norm
from portnorm.norm.group import group_norm
from portnorm.norm.layer import layer_norm
from portnorm.op import Op
from portnorm.optimizers import Adam

Arrays = dict[str, numpy.ndarray[Any, Any]]

Run = Callable[[], Sequence[Any]]
"""Computes once, and gives anything that NumPy takes.

That is `(y,)`, or with a backward pass `(y, dx)`; of a step the state after it; of an update parameters and both moments.
"""

NORMS: dict[str, Op[..., Any]] = {"LN": layer_norm, "BN": batch_norm, "GN": group_norm}
GROUPS = 8
EPS = float32_value(1e-5)
"""ε as this library takes it, so that the same is computed in float64."""
CELLS: dict[str, tuple[type[Recurrent], NormName | None]] = {
    "LSTM": (LSTM, None),
    "LN-LSTM": (LSTM, "layer"),
    "BN-LSTM": (LSTM, "batch"),
    "GRU": (GRU, None),
    "LN-GRU": (GRU, "layer"),
}
RATE = 0.1
ADAM = Adam(lr=RATE)
UPDATES = 10
"""Those that an update comes after, with moments that are not 0."""
ALLOWED = {"float32": 1e-3, "float64": 1e-9}
"""By dtype, how far from float64 an engine may be, relative to the largest value."""

_INPUTS = ("x", "dy", "lengths", "mask", "mean", "var", "h", "c")


def parameters(data: Arrays) -> Arrays:
    """What has gradients beside x."""
    return {name: a for name, a in data.items() if name not in _INPUTS}


@dataclass(frozen=True)
class Work:
    """One operation on one shape.

    That is the shape of `x` of a normalization, (time, batch, inputs, hidden) of a recurrent layer, (batch, inputs, hidden) of its step,
    and (arrays, …) of an update of so many arrays.

    `kind` is empty, or says what is different: "with statistics" that are given, "with mask" of the steps that count, "with lengths" of the
    sequences, a "step", or an "update".
    """

    what: str
    shape: tuple[int, ...]
    backward: bool = False  # forward and backward
    kind: str = ""
    dtype: str = "float32"

    @classmethod
    def of(cls, row: dict[str, Any]) -> Work:
        """The work of a row of results, also of one that was kept before there were kinds and dtypes."""
        return cls(row["what"], tuple(row["shape"]), row["backward"], row.get("kind", ""), row.get("dtype", "float32"))

    @property
    def fields(self) -> list[Any]:
        """What it is made of, in order. What is as usual is left out at the end, for workers of earlier commits know no more."""
        further = [self.kind, self.dtype]
        return [self.what, list(self.shape), self.backward, *(further if further != ["", "float32"] else [])]

    @property
    def name(self) -> str:
        way = [] if self.room in ("step", "update") else ["forward+backward" if self.backward else "forward"]
        kind, dtype = [self.kind] if self.kind else [], [self.dtype] if self.dtype != "float32" else []
        return " ".join([self.what, *kind, *way, "×".join(map(str, self.shape)), *dtype])

    @property
    def recurrent(self) -> bool:
        return self.what in CELLS

    @property
    def room(self) -> str:
        """Norm, sequence, step or update: each engine has a function for those that it knows."""
        return self.kind if self.kind in ("step", "update") else "sequence" if self.recurrent else "norm"

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Time, batch, inputs and hidden features of a recurrent work."""
        time, batch, inputs, hidden = self.shape if self.room == "sequence" else (1, *self.shape)
        return time, batch, inputs, hidden

    @property
    def hidden(self) -> int:
        return self.sizes[3]

    @property
    def states(self) -> tuple[str, ...]:
        """The arrays that a recurrent work's state is."""
        return ("h", "c") if "LSTM" in self.what else ("h",)

    @property
    def bytes(self) -> int:
        """What has to be read and written.

        A normalization's x and y; backward also x, dy and dx. An update reads parameters, gradients and two moments, and writes all but the
        gradients.
        """
        arrays = 7 if self.room == "update" else 5 if self.backward else 2
        return numpy.dtype(self.dtype).itemsize * math.prod(self.shape) * arrays

    @property
    def flops(self) -> int:
        """Of the matrix products of a recurrent layer, for the steps that there are; backward has two for each of them."""
        time, batch, inputs, hidden = self.sizes
        gates, steps = 3 if "GRU" in self.what else 4, int(self.lengths().sum()) if self.kind == "with lengths" else time * batch
        return 2 * steps * gates * hidden * (inputs + hidden) * (3 if self.backward else 1)

    def lengths(self) -> Any:
        """Of sequences padded to the same number of steps, (batch,): one is as long as that."""
        time, batch = self.shape[:2]
        return numpy.maximum(numpy.random.default_rng(1).integers(1, time + 1, batch), time * (numpy.arange(batch) == 0))

    def data(self) -> Arrays:
        """The input `x`, the cotangent `dy`, what else comes in, and the parameters; of an update `p`, `g` and the moments `m` and `v`."""
        rng = numpy.random.default_rng(0)

        def normal(*shape: int) -> Any:
            return rng.standard_normal(shape, self.dtype)  # type: ignore[call-overload]  # a name is a dtype

        if self.room == "update":
            g, m, p = (normal(*self.shape) for _ in range(3))
            return {"p": p, "g": g, "m": m, "v": m * m + g * g + 1}
        if self.room == "norm":
            features = self.shape[self._features]
            found = {"x": normal(*self.shape), "dy": normal(*self.shape), "weight": 1 + normal(features), "bias": normal(features)}
            if self.kind == "with statistics":
                found |= {"mean": normal(features), "var": 1 + normal(features) ** 2}
        else:
            time, batch, inputs, hidden = self.sizes
            found = {"x": normal(time, batch, inputs), "dy": normal(time, batch, hidden)}
            found |= {name: p + 0.1 * normal(*p.shape) for name, p in self.layer().parameters().items()}
            if self.room == "step":
                found |= {"x": found["x"][0], **{name: normal(batch, hidden) for name in self.states}}
        if self.kind in ("with mask", "with lengths"):
            lengths = self.lengths()
            found |= {"lengths": lengths, "mask": numpy.arange(self.shape[0])[:, None] < lengths}
        return found

    @property
    def _features(self) -> int:
        """The axis of a normalization's parameters."""
        return -1 if self.what == "LN" or self.kind == "with mask" else 1

    def layer(self, dtype: str = "") -> Recurrent:
        """The layer of a recurrent work, as it starts."""
        time, _, inputs, hidden = self.sizes
        cell, norm = CELLS[self.what]
        return cell(inputs, hidden, norm=norm, t_max=time, rng=0, dtype=dtype or self.dtype)

    def shortened(self) -> Work:
        """The same with few steps or rows: what is compared, since a long run of a normalized recurrent net amplifies rounding at will."""
        shape = (
            (self.shape[0], min(self.shape[1], 8), *self.shape[2:]) if self.room == "update" else (min(self.shape[0], 8), *self.shape[1:])
        )
        return replace(self, shape=shape)


_LN = ((1, 64), (32, 256), (512, 768), (4096, 768), (4096, 4096), (262144, 16))
_BN = ((32, 64, 28, 28), (64, 256, 14, 14))
_LSTM = ((64, 1, 64, 128), (100, 32, 128, 256), (784, 64, 1, 100), (64, 64, 512, 1024))
_ONE = ((100, 32, 128, 256),)
_STEP = ((1, 128, 128), (1, 512, 512), (1, 1024, 1024))
_FORWARD, _BOTH = (False,), (False, True)

_TABLE: tuple[tuple[str, str, str, tuple[bool, ...], tuple[tuple[int, ...], ...]], ...] = (
    ("LN", "", "float32", _BOTH, _LN),
    ("BN", "", "float32", _BOTH, _BN),
    ("BN", "with statistics", "float32", _FORWARD, _BN),
    ("BN", "with mask", "float32", _BOTH, ((100, 32, 512),)),
    ("GN", "", "float32", _BOTH, _BN[:1]),
    ("LSTM", "", "float32", _BOTH, _LSTM),
    ("LN-LSTM", "", "float32", _BOTH, _LSTM),
    ("BN-LSTM", "", "float32", _BOTH, _ONE),
    ("BN-LSTM", "with lengths", "float32", _BOTH, _ONE),
    ("GRU", "", "float32", _BOTH, _ONE),
    ("LN-GRU", "", "float32", _BOTH, _ONE),
    *((what, "step", "float32", _FORWARD, _STEP) for what in ("LSTM", "LN-LSTM", "GRU")),
    ("LN", "", "float64", _BOTH, ((4096, 768),)),
    ("LN-LSTM", "", "float64", _BOTH, _ONE),
    ("Adam", "update", "float32", _FORWARD, ((10, 1000, 1000),)),
)
"""What, kind, dtype, directions, shapes."""

WORKS = tuple(
    Work(what, shape, backward, kind, dtype) for what, kind, dtype, ways, shapes in _TABLE for backward in ways for shape in shapes
)

GROWTH = (
    *(Work("LN", (2**22 // n, n)) for n in (16, 256, 4096, 65536)),
    *(Work("LN-LSTM", (time, 1, 64, 128), backward) for backward in (False, True) for time in (100, 1000, 10000)),
    *(Work("LN-LSTM", (100, batch, 64, 128), True) for batch in (1, 8, 64, 512)),
    *(Work("LN-LSTM", (100, 16, 64, hidden), True) for hidden in (64, 256, 1024)),
)
"""How time and memory grow with the length of a row, steps, batch and hidden size."""
