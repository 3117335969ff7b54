"""Tables that the product tests run over: every Op with arguments, every preset of a recurrent layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import portnorm as pn
from portnorm.op import Op
from portnorm.pointwise import sigmoid, split

Arrays = tuple[Any, ...]


@dataclass(frozen=True)
class OpCase:
    """An Op with positional arguments (float64 NumPy arrays, or what is no array) and keywords."""

    name: str
    op: Op[..., Any]
    arguments: Callable[[np.random.Generator], Arrays]
    keywords: dict[str, Any] = field(default_factory=dict)


def _norm(shape: tuple[int, ...], *parameters: tuple[int, ...], extra: Arrays = (), mean: float = 30.0) -> Callable[..., Arrays]:
    """`x` with |mean| ≫ std, then parameters that are not 1."""

    def make(rng: np.random.Generator) -> Arrays:
        return (mean + rng.standard_normal(shape), *extra, *(rng.uniform(0.5, 2.0, p) for p in parameters))

    return make


MASK = np.array([[True, True, False], [True, False, False]])
STATISTICS = {"mean": np.array([29.0, 30.0, 31.0]), "var": np.array([0.5, 1.0, 2.0])}

OPS = [
    OpCase("layer_norm", pn.layer_norm, _norm((4, 7), (7,), (7,))),
    OpCase("layer_norm without parameters", pn.layer_norm, _norm((4, 7))),
    OpCase("layer_norm over two axes", pn.layer_norm, _norm((2, 3, 4), (3, 4), (3, 4)), {"axis": (1, 2)}),
    OpCase("layer_norm over a middle axis", pn.layer_norm, _norm((2, 3, 4), (3,), (3,)), {"axis": 1, "eps": 0.1}),
    OpCase("rms_norm", pn.rms_norm, _norm((4, 7), (7,), mean=1.0)),
    OpCase("rms_norm over two axes", pn.rms_norm, _norm((2, 3, 4), (3, 4)), {"axis": (1, 2)}),
    OpCase("batch_norm", pn.batch_norm, _norm((5, 3), (3,), (3,))),
    OpCase("batch_norm of a feature map", pn.batch_norm, _norm((2, 3, 4, 2), (3,), (3,))),
    OpCase("batch_norm, channels last, masked", pn.batch_norm, _norm((2, 3, 4), (4,), (4,)), {"channel_axis": -1, "mask": MASK}),
    OpCase("batch_norm with statistics", pn.batch_norm, _norm((5, 3), (3,), (3,)), STATISTICS),
    OpCase("batch_norm with statistics, masked", pn.batch_norm, _norm((2, 3, 3), (3,)), {**STATISTICS, "mask": MASK}),
    OpCase("instance_norm", pn.instance_norm, _norm((2, 3, 5), (3,), (3,))),
    OpCase("instance_norm, masked", pn.instance_norm, _norm((2, 4, 3), (4,), (4,)), {"mask": MASK}),
    OpCase("group_norm", pn.group_norm, _norm((2, 6, 5), (6,), (6,), extra=(3,))),
    OpCase("group_norm, channels last", pn.group_norm, _norm((2, 5, 6), (6,), (6,), extra=(2,)), {"channel_axis": -1}),
    OpCase("group_norm, masked", pn.group_norm, _norm((2, 6, 3), (6,), (6,), extra=(2,)), {"mask": MASK}),
    OpCase("linear", pn.linear, lambda rng: (rng.standard_normal((2, 3, 4)), rng.standard_normal((5, 4)), rng.standard_normal(5))),
    OpCase("sigmoid", sigmoid, lambda rng: (rng.standard_normal((3, 4)) * 4,)),
    OpCase("softmax_cross_entropy", pn.softmax_cross_entropy, lambda rng: (rng.standard_normal((6, 4)), np.array([0, 1, 2, 3, 0, 1]))),
    OpCase(
        "softmax_cross_entropy, weighed",
        pn.softmax_cross_entropy,
        lambda rng: (rng.standard_normal((2, 3, 4)), np.array([[0, 1, 2], [3, 0, 1]]), MASK * 1.0),
    ),
]

NOT_TESTED_AS_ARRAYS_OF_NUMBERS = {split.name, "normalize", "loop", "scan", "reverse_sequences"}
"""Ops that other tests cover: the core through the public functions, the loop through the layers."""

PRESETS = list(pn.VARIANTS)


def random_lstm(norm: str | pn.Variant | None, rng: np.random.Generator, inputs: int = 4, hidden: int = 3, **keywords: Any) -> pn.LSTM:
    """A float64 LSTM whose every parameter and statistic is random, with statistics for four steps."""
    layer = pn.LSTM(inputs, hidden, norm=norm, dtype="float64", t_max=4, rng=rng, **keywords)
    params = {name: p + 0.3 * rng.standard_normal(p.shape) for name, p in layer.parameters().items()}
    buffers = {name: b + (1 if name.startswith("num") else rng.uniform(0.1, 1.0, b.shape)) for name, b in layer.buffers.items()}
    layer.assign(params, buffers)
    return layer


def random_state(layer: pn.LSTM, batch: int, rng: np.random.Generator, time: int = 1) -> Any:
    """A state that is not zero, after `time` steps."""
    shape = (layer.num_layers * layer.num_directions, batch, layer.hidden_size)
    state = (rng.standard_normal(shape), rng.standard_normal(shape))
    return (*state, np.asarray(time)) if layer.timed else state
