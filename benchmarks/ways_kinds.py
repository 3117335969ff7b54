"""What is taken out of Python by each door: kinds of layers, ways of making an artifact of one, and the sizes that it is then asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import portnorm as pn
from benchmarks.behind_graphs import random_numbers
from portnorm.layers.recurrent import Recurrent

INPUTS, HIDDEN = 4, 6
STEPS, BATCH = 5, 3
"""Of the example that an artifact is made of."""


def _recurrent(cell: type[Recurrent], norm: str | None, **keywords: Any) -> Callable[[], pn.Layer]:
    return lambda: random_numbers(cell(INPUTS, HIDDEN, norm=norm, t_max=4, rng=0, **keywords))


KINDS: dict[str, Callable[[], pn.Layer]] = {
    "LSTM": _recurrent(pn.LSTM, None),
    "GRU": _recurrent(pn.GRU, None),
    "LN-LSTM": _recurrent(pn.LSTM, "layer"),
    "BN-LSTM": _recurrent(pn.LSTM, "batch"),
    "LN-LSTM, two directions": _recurrent(pn.LSTM, "layer", bidirectional=True),
    "LayerNorm": lambda: random_numbers(pn.LayerNorm(INPUTS)),
    "BatchNorm": lambda: random_numbers(pn.BatchNorm(INPUTS, channel_axis=-1)),
    "GroupNorm": lambda: random_numbers(pn.GroupNorm(2, INPUTS, channel_axis=-1)),
}


@dataclass(frozen=True)
class Way:
    """How an artifact is made, and what it has to be right for; it is asked for `others` too, and is to refuse them."""

    name: str
    time: bool
    batch: bool
    sizes: tuple[tuple[int, int], ...]
    """(time, batch), that of the example first."""
    others: tuple[tuple[int, int], ...] = ()
    step: bool = False


WAYS = (
    Way("fixed", False, False, ((STEPS, BATCH),), ((9, BATCH), (10, BATCH), (10, 1), (STEPS, 4))),
    Way("open time", True, True, ((STEPS, BATCH), (9, 2), (40, 1), (1, 4))),
    Way("open batch", False, True, ((STEPS, BATCH), (STEPS, 1), (STEPS, 4)), ((9, 2), (10, 2), (10, 1))),
    Way("step", False, True, ((1, BATCH), (1, 1), (1, 4)), step=True),
    Way("step of one batch", False, False, ((1, BATCH),), step=True),
)
"""The last is for doors that have none before it."""

TRAINING = Way("training", True, True, ((STEPS, BATCH), (9, 2)))
"""Gradients of Σ y ⊙ dy."""


def steps_alone(layer: pn.Layer) -> bool:
    return isinstance(layer, Recurrent) and not layer.goes_back


def inputs_of(layer: pn.Layer, way: Way, size: tuple[int, int]) -> list[Any]:
    """`x`, and behind it the states of a step."""
    rng, (steps, batch) = np.random.default_rng([*size, way.step]), size
    if not way.step:
        return [rng.standard_normal((steps, batch, INPUTS)).astype("float32")]
    assert isinstance(layer, Recurrent)
    states = [rng.uniform(-0.5, 0.5, (batch, n)).astype("float32") for n in layer.state_sizes()]
    return [rng.standard_normal((batch, INPUTS)).astype("float32"), *states, *([np.array(2)] if layer.timed else [])]


def cotangent_of(y: Any) -> Any:
    return np.random.default_rng(y.shape[:2]).standard_normal(y.shape).astype("float32")


def expected_of(layer: pn.Layer, way: Way, inputs: list[Any]) -> list[Any]:
    """What the layer gives in NumPy: results and states, or the gradients of its parameters by name."""
    if way.step:
        assert isinstance(layer, Recurrent)
        h, state = layer.step(inputs[0], tuple(inputs[1:]))
        return [h, *state]
    if not layer.recurrent:
        return [layer(inputs[0])]
    y, state = layer(inputs[0])
    return [y, *state]


def gradients_of(layer: pn.Layer, x: Any) -> dict[str, Any]:
    y, *_, pullback = layer.vjp(x)
    found = pullback(cotangent_of(y))[-1]
    return {name: found[name] for name in sorted(found)}


def update_of(layer: pn.Layer, x: Any, target: Any) -> dict[str, Any]:
    """Parameters and statistics after one update by gradient descent of the mean squared error, with rate 1."""
    y, *_, pullback = layer.vjp(x, training=True)
    grads = pullback((2 / y.size * (y - target)).astype(y.dtype))[-1]
    new = {name: p - grads[name] for name, p in layer.params.items()} | layer.buffers
    return {name: new[name] for name in sorted(new)}


def write(path: Path, arrays: list[Any]) -> Path:
    np.savez(path, **{str(k): a for k, a in enumerate(arrays)})
    return path
