"""What is measured: float32 throughout, the same numbers for every engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from portnorm.cells.variants import NormName
from portnorm.dtypes import float32_value
from portnorm.layers.recurrent import GRU, LSTM, Recurrent
from portnorm.norm.batch import batch_norm
from portnorm.norm.group import group_norm
from portnorm.norm.layer import layer_norm
from portnorm.op import Op

Arrays = dict[str, numpy.ndarray[Any, Any]]

Run = Callable[[], Sequence[Any]]
"""Computes once, and gives `(y,)`, or with a backward pass `(y, dx)`, as anything that NumPy takes."""

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


@dataclass(frozen=True)
class Work:
    """One operation on one shape: (…) of a normalization, or (time, batch, inputs, hidden)."""

    what: str
    shape: tuple[int, ...]
    backward: bool = False  # forward and backward

    @property
    def name(self) -> str:
        return f"{self.what} {'forward+backward' if self.backward else 'forward'} {'×'.join(map(str, self.shape))}"

    @property
    def recurrent(self) -> bool:
        return self.what in CELLS

    @property
    def room(self) -> str:
        """What kind of work it is: each engine has a function for the kinds that it knows."""
        return "sequence" if self.recurrent else "norm"

    @property
    def hidden(self) -> int:
        """The features of a recurrent work's state."""
        return self.shape[3]

    @property
    def states(self) -> int:
        """How many arrays a recurrent work's state is."""
        return 2 if "LSTM" in self.what else 1

    @property
    def bytes(self) -> int:
        """What a normalization has to read and write: x and y; backward also x, dy and dx."""
        return 4 * math.prod(self.shape) * (5 if self.backward else 2)

    @property
    def flops(self) -> int:
        """Of the matrix products of a recurrent layer; backward has two for each of them."""
        time, batch, inputs, hidden = self.shape
        gates = 3 if "GRU" in self.what else 4
        return 2 * time * batch * gates * hidden * (inputs + hidden) * (3 if self.backward else 1)

    def data(self) -> Arrays:
        """The input `x`, the cotangent `dy`, and the parameters."""
        rng = numpy.random.default_rng(0)
        if not self.recurrent:
            features = self.shape[-1] if self.what == "LN" else self.shape[1]
            x, dy = (rng.standard_normal(self.shape, numpy.float32) for _ in range(2))
            return {
                "x": x,
                "dy": dy,
                "weight": 1 + rng.standard_normal(features, numpy.float32),
                "bias": rng.standard_normal(features, numpy.float32),
            }
        time, batch, inputs, hidden = self.shape
        x, dy = rng.standard_normal((time, batch, inputs), numpy.float32), rng.standard_normal((time, batch, hidden), numpy.float32)
        return {
            "x": x,
            "dy": dy,
            **{n: p + 0.1 * rng.standard_normal(p.shape, numpy.float32) for n, p in self.layer().parameters().items()},
        }

    def layer(self, dtype: str = "float32") -> Recurrent:
        """The layer of a recurrent work, as it starts."""
        time, _, inputs, hidden = self.shape
        cell, norm = CELLS[self.what]
        return cell(inputs, hidden, norm=norm, t_max=time, rng=0, dtype=dtype)

    def shortened(self) -> Work:
        """The same with few steps or rows: what is compared, since a long run of a normalized recurrent net amplifies rounding at will."""
        return Work(self.what, (min(self.shape[0], 8), *self.shape[1:]), self.backward)


_LN = ((1, 64), (32, 256), (512, 768), (4096, 768), (4096, 4096))
_BN = ((32, 64, 28, 28), (64, 256, 14, 14))
_LSTM = ((64, 1, 64, 128), (100, 32, 128, 256), (784, 64, 1, 100), (64, 64, 512, 1024))
_ONE = ((100, 32, 128, 256),)

WORKS = tuple(
    Work(what, shape, backward)
    for what, shapes in {
        "LN": _LN,
        "BN": _BN,
        "GN": _BN[:1],
        "LSTM": _LSTM,
        "LN-LSTM": _LSTM,
        "BN-LSTM": _ONE,
        "GRU": _ONE,
        "LN-GRU": _ONE,
    }.items()
    for backward in (False, True)
    for shape in shapes
)

GROWTH = (
    *(Work("LN", (2**22 // n, n)) for n in (16, 256, 4096, 65536)),
    *(Work("LN-LSTM", (time, 1, 64, 128), backward) for backward in (False, True) for time in (100, 1000, 10000)),
    *(Work("LN-LSTM", (100, batch, 64, 128), True) for batch in (1, 8, 64, 512)),
    *(Work("LN-LSTM", (100, 16, 64, hidden), True) for hidden in (64, 256, 1024)),
)
"""How time and memory grow with the length of a row, steps, batch and hidden size."""
