"""Tables that the product tests run over: every Op with arguments, every preset of a recurrent layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from portnorm.dropout import dropout
from portnorm.layers.recurrent import Recurrent
from portnorm.lookup import rows_added
from portnorm.op import Op
from portnorm.padding import pack_steps, unpack_steps, without_padding
from portnorm.pointwise import sigmoid, split
from portnorm.quantization import integer_product

Arrays = tuple[Any, ...]


@dataclass(frozen=True)
class OpCase:
    """An Op with positional arguments (float64 NumPy arrays, or what is no array) and keywords."""

    name: str
    op: Op[..., Any]
    arguments: Callable[[np.random.Generator], Arrays]
    keywords: dict[str, Any] = field(default_factory=dict)
    straight_through: bool = False
    """Whether its vjp passes by what it computes, so that differences say nothing of it."""
    at_zero: tuple[int, ...] = ()
    """Weights of which some are 0: what these weigh does not count, and they have no gradient, whatever differences say."""


def _norm(shape: tuple[int, ...], *parameters: tuple[int, ...], extra: Arrays = (), mean: float = 30.0) -> Callable[..., Arrays]:
    """`x` with |mean| ≫ std, then parameters that are not 1."""

    def make(rng: np.random.Generator) -> Arrays:
        return (mean + rng.standard_normal(shape), *extra, *(rng.uniform(0.5, 2.0, p) for p in parameters))

    return make


def _rows_beside_eps(rng: np.random.Generator) -> Arrays:
    """Directions of length 0, below, and above 0.25, and lengths."""
    v = rng.standard_normal((4, 7))
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    return v * np.array([0.0, 0.125, 0.5, 2.0])[:, None], rng.uniform(0.5, 2.0, 4)


MASK = np.array([[True, True, False], [True, False, False]])
GAPS = np.array([[False, True, False], [True, False, False], [False, True, False], [True, False, False]])
STATISTICS = {"mean": np.array([29.0, 30.0, 31.0]), "var": np.array([0.5, 1.0, 2.0])}

_SIXTEENTHS = np.array([[16, -3, 0, 5, 8, -16, 1], [2, 16, 7, -9, 4, 0, 3]]) / 16

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
    OpCase(
        "batch_renorm at its bounds",
        pn.batch_renorm,
        _norm((5, 3), (3,), (3,)),
        {"mean": np.array([10.0, 10.0, 50.0]), "var": np.array([90.0, 1e-3, 90.0]), "r_max": 2.0, "d_max": 0.5},
    ),
    OpCase("instance_norm", pn.instance_norm, _norm((2, 3, 5), (3,), (3,))),
    OpCase("instance_norm, masked", pn.instance_norm, _norm((2, 4, 3), (4,), (4,)), {"mask": MASK}),
    OpCase("group_norm", pn.group_norm, _norm((2, 6, 5), (6,), (6,), extra=(3,))),
    OpCase("group_norm, channels last", pn.group_norm, _norm((2, 5, 6), (6,), (6,), extra=(2,)), {"channel_axis": -1}),
    OpCase("group_norm, masked", pn.group_norm, _norm((2, 6, 3), (6,), (6,), extra=(2,)), {"mask": MASK}),
    OpCase("linear", pn.linear, lambda rng: (rng.standard_normal((2, 3, 4)), rng.standard_normal((5, 4)), rng.standard_normal(5))),
    OpCase("fake_quantize", pn.fake_quantize, _norm((4, 7), mean=1.0), straight_through=True),
    OpCase("fake_quantize within a bound", pn.fake_quantize, _norm((4, 7), mean=0.5), {"levels": 5, "bound": 1.0}, straight_through=True),
    OpCase("integer_product", integer_product, _norm((2, 3, 7), extra=(_SIXTEENTHS,), mean=0.5), straight_through=True),
    OpCase("weight_norm", pn.weight_norm, _norm((4, 7), (4,), mean=1.0)),
    OpCase("weight_norm of columns, as torch shapes it", pn.weight_norm, _norm((4, 7), (1, 7), mean=1.0), {"axis": 1}),
    OpCase("weight_norm of two axes", pn.weight_norm, _norm((2, 3, 4), (2, 4), mean=1.0), {"axis": (0, 2)}),
    OpCase("weight_norm of the whole", pn.weight_norm, _norm((4, 7), (), mean=1.0), {"axis": None}),
    OpCase("weight_norm of rows beside eps", pn.weight_norm, _rows_beside_eps, {"eps": 0.25}),
    OpCase("weight_norm of empty rows", pn.weight_norm, _norm((4, 0), (4,))),
    OpCase("embedding", pn.embedding, lambda rng: (np.array([[0, 2, 2], [4, 0, 2]]), rng.standard_normal((5, 3)))),
    OpCase("rows_added", rows_added, lambda rng: (rng.standard_normal((6, 3)), np.array([0, 2, 2, 4, 0, 2])), {"entries": 5}),
    OpCase("without_padding", without_padding, lambda rng: (rng.standard_normal((2, 3, 4)), MASK[:, :, None])),
    OpCase("pack_steps", pack_steps, lambda rng: (rng.standard_normal((4, 3, 2)), GAPS)),
    OpCase("unpack_steps", unpack_steps, lambda rng: (rng.standard_normal((4, 3, 2)), GAPS, rng.standard_normal((3, 2)))),
    OpCase("dropout", dropout, lambda rng: (rng.standard_normal((2, 3, 4)), rng.random((2, 3, 4)) < 0.5), {"p": 0.4}),
    OpCase("sigmoid", sigmoid, lambda rng: (rng.standard_normal((3, 4)) * 4,)),
    OpCase("mean_squared_error", pn.mean_squared_error, lambda rng: tuple(rng.standard_normal((2, 3, 4)))),
    OpCase(
        "mean_squared_error, weighed",
        pn.mean_squared_error,
        lambda rng: (*rng.standard_normal((2, 3, 4)), rng.uniform(0.5, 2.0, (3, 4))),
    ),
    OpCase(
        "mean_squared_error of the frames of a mask",
        pn.mean_squared_error,
        lambda rng: (*rng.standard_normal((2, 2, 3, 4)), MASK * 1.0),
        at_zero=(2,),
    ),
    OpCase(
        "mean_squared_error of weighed frames",
        pn.mean_squared_error,
        lambda rng: (*rng.standard_normal((2, 2, 3, 4)), rng.uniform(0.5, 2.0, (2, 3))),
    ),
    OpCase("mean_squared_error of nothing", pn.mean_squared_error, lambda rng: (*np.ones((2, 3)), np.zeros(3)), at_zero=(2,)),
    OpCase("softmax_cross_entropy", pn.softmax_cross_entropy, lambda rng: (rng.standard_normal((6, 4)), np.array([0, 1, 2, 3, 0, 1]))),
    OpCase(
        "softmax_cross_entropy, weighed",
        pn.softmax_cross_entropy,
        lambda rng: (rng.standard_normal((2, 3, 4)), np.array([[0, 1, 2], [3, 0, 1]]), rng.uniform(0.5, 2.0, (2, 3))),
    ),
    OpCase(
        "softmax_cross_entropy, weighed, with labels to ignore",
        pn.softmax_cross_entropy,
        lambda rng: (rng.standard_normal((6, 4)), np.array([0, -100, 2, 3, -100, 1]), np.array([0.5, 2.0, 0.0, 1.0, 0.0, 0.25])),
        at_zero=(2,),
    ),
    OpCase(
        "softmax_cross_entropy with a class to ignore",
        pn.softmax_cross_entropy,
        lambda rng: (rng.standard_normal((5, 4)), np.array([0, 3, 2, 3, 1], dtype=np.uint8)),
        {"ignore_index": 3},
    ),
    OpCase(
        "softmax_cross_entropy of nothing",
        pn.softmax_cross_entropy,
        lambda rng: (rng.standard_normal((3, 4)), np.array([1, -100, 9]), np.array([0.0, 1.0, 0.0])),
        at_zero=(2,),
    ),
]

NOT_TESTED_AS_ARRAYS_OF_NUMBERS = {
    split.name,
    "normalize",
    "loop",
    "scan",
    "linear_scan",
    "reverse_sequences",
    "steps_at",
    "steps_so_far",
    "times_transposed",
    "input_cotangent",
    "weight_cotangent",
    "sgd_step",
    "rmsprop_step",
    "adam_step",
}
"""Ops that other tests cover: core and products through the public functions, the loop through layers, updates through optimizers."""

PRESETS = [(cell, name) for cell, table in pn.VARIANTS.items() for name in table]
"""Every recurrent layer and preset: the product tests run over all of them."""

IMPLEMENTATIONS = [(cell, name) for cell, table in pn.IMPLEMENTATIONS.items() for name in table]
"""Published cells that differ from the presets."""

_ALSO = ("layer-gates", "layer-state")
HEAVY_PRESETS = [
    pytest.param(cell, name, marks=() if cell == "LSTM" and name not in _ALSO else pytest.mark.slow, id=f"{cell}-{name}")
    for cell, name in PRESETS
]
"""The same for the largest products: `make test` has those of the LSTM, `make test-all` has all."""


def _combinations() -> Iterator[tuple[str, pn.Variant]]:
    """Every row of slots that a cell takes, then every other field of a row, one or two at a time."""
    choices = itertools.product(
        LAYERS,
        (("layer", "all"), ("layer", "candidate"), ("layer", "gate"), ("batch", "all")),
        ("separate", "sum", "input", "hidden", None),
        (None, "copy", "state"),
        ((True, ("bias",)), (False, ("bias_ih", "bias_hh")), (False, ())),
        ("after", "before", "sum", None),
    )
    for cell, (norm, groups), terms, state, (shift, biases), reset in choices:
        constant = 0.5 if cell == "LSTM" else 0.0
        row: Any = {"norm": norm, "groups": groups, "terms": terms, "cell": state, "shift": shift, "biases": biases, "reset": reset}
        yield from _fitting(cell, runtime_forget_bias=constant, **row)
    early: list[Any] = [{"early": ("bias",), "biases": biases} for biases in (("bias",), ())]
    early += [{"early": ("bias_ih", "bias_hh"), "biases": biases, "scale": False} for biases in ((), ("bias_ih", "bias_hh"))]
    places: list[Any] = [{"norm": norm, "terms": terms} for norm in ("layer", "batch") for terms in ("separate", "sum", "input")]
    details: list[Any] = [
        {"norm": "rms", "groups": "gate", "cell": "copy"},
        {"norm": "rms", "terms": "sum", "eps_place": "std"},
        {"norm": "layer", "eps_place": "std", "variance": "unbiased", "cell": "state"},
        {"norm": "layer", "variance": "unbiased", "groups": "gate"},
        {"norm": "batch", "eps_place": "std", "variance": "unbiased"},
        {"norm": "batch", "variance": "running", "cell": "copy", "scale": False},
        *(
            {"norm": "batch", "affine": "step", "terms": terms, "cell": state}
            for terms in ("separate", "sum", "hidden")
            for state in (None, "copy")
        ),
        {"norm": "batch", "affine": "step", "biases": (), "shift": False},
        {"norm": "batch", "affine": "step", "biases": ("bias_ih", "bias_hh"), "scale": False},
        {"peepholes": True},
        {"peepholes": True, "clip": 0.3},
        {"norm": "layer", "terms": "sum", "cell": "state", "peepholes": True, "clip": 0.3},
        {"norm": "layer", "cell": "copy", "peepholes": True, "clip": 0.3},
        {"activation": "relu"},
        *({"recurrence": "diagonal", **row} for row in ({}, {"activation": "relu"}, {"norm": "layer"}, {"norm": "batch", "terms": "sum"})),
        *({"update": "replace", **row} for row in ({}, {"norm": "layer", "groups": "candidate"}, {"norm": "batch", "terms": "sum"})),
        {"gate_activation": "hard_sigmoid_5"},
        {"gate_activation": "hard_sigmoid_6", "activation": "relu", "output_activation": "tanh"},
        {"gate_activation": "hard_sigmoid_6", "activation": "relu"},
        {"gate_activation": "relu", "activation": "sigmoid"},
        {"activation": "hard_sigmoid_5", "output_activation": "hard_sigmoid_6", "peepholes": True, "clip": 0.3},
        {"norm": "layer", "cell": "copy", "gate_activation": "hard_sigmoid_5", "output_activation": "relu"},
        {"norm": "batch", "terms": "sum", "gate_activation": "hard_sigmoid_6", "activation": "relu"},
        {"activation": "relu", "norm": "batch", "terms": "input", "statistics": "sequence", "variance": "running"},
    ]
    for cell, reset in itertools.product(LAYERS, ("after", "before", "sum", None)):
        for row in (*({**e, **p} for e in early for p in places), *details):
            yield from _fitting(cell, **{"reset": reset, **row})


def _fitting(layer: str, **row: Any) -> Iterator[tuple[str, pn.Variant]]:
    """The row if the cell takes it. ε is not small, so that differences of short sequences are smooth."""
    if row.get("norm") is not None and row.get("terms", "separate") is None and row.get("cell") is None:
        return  # no place for the normalizer
    variant = pn.Variant(source=" ".join(f"{k}={v}" for k, v in row.items()), eps=0.01, **row)
    if all(getattr(variant, name) in allowed for name, allowed in LAYERS[layer].cell.takes.items()):
        yield layer, variant


LAYERS: dict[str, type[Recurrent]] = {"LSTM": pn.LSTM, "GRU": pn.GRU, "RNN": pn.RNN}


COMBINATIONS = [
    pytest.param(cell, variant, id=f"{cell} {variant.source}", marks=() if k % 4 == 0 else pytest.mark.slow)
    for k, (cell, variant) in enumerate(_combinations())
]
"""`make test` has every fourth of them, `make test-all` has all."""


def random_recurrent(
    cell: str, norm: str | pn.Variant | None, rng: np.random.Generator, inputs: int = 4, hidden: int = 3, **keywords: Any
) -> Recurrent:
    """A float64 layer whose every parameter and statistic is random, with statistics for four steps unless stated."""
    layer = LAYERS[cell](inputs, hidden, norm=norm, dtype="float64", rng=rng, **{"t_max": 4, **keywords})
    params = {name: p + 0.3 * rng.standard_normal(p.shape) for name, p in layer.parameters().items()}
    buffers = {name: b + (1 if name.startswith("num") else rng.uniform(0.1, 1.0, b.shape)) for name, b in layer.buffers.items()}
    layer.assign(params, buffers)
    return layer


def random_lstm(norm: str | pn.Variant | None, rng: np.random.Generator, **keywords: Any) -> Recurrent:
    return random_recurrent("LSTM", norm, rng, **keywords)


def random_state(layer: Recurrent, batch: int, rng: np.random.Generator, time: int = 1) -> Any:
    """A state that is not zero, after `time` steps."""
    places = layer.num_layers * layer.num_directions
    state = tuple(rng.standard_normal((places, batch, size)) for size in layer.state_sizes())
    return (*state, np.asarray(time)) if layer.timed else state
