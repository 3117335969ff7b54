"""The graphs that the tools get, with layers whose every number is random, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx

import portnorm as pn
from portnorm_onnx.metadata import graph_facts

INPUTS, HIDDEN = 32, 64
DIMS = {"time": 20, "batch": 3}


@dataclass(frozen=True)
class Graph:
    """A layer and how it is exported."""

    layer: Callable[[], pn.Layer]
    keywords: dict[str, Any] = field(default_factory=dict)


def random_numbers(layer: pn.Layer) -> pn.Layer:
    """The layer with shifts that are not 0 and statistics that differ by step; gains around 0.5, so that it does not amplify roundings."""
    rng = np.random.default_rng(1)
    params = {
        name: p if p.ndim > 1 else 0.5 * p + 0.1 * rng.standard_normal(p.shape).astype(p.dtype) for name, p in layer.parameters().items()
    }
    buffers = {n: b + (1 if n.startswith("num") else rng.uniform(0.1, 1.0, b.shape).astype(b.dtype)) for n, b in layer.buffers.items()}
    layer.assign(params, buffers)
    return layer


def lstm(norm: str | None, **keywords: Any) -> Callable[[], pn.Layer]:
    return lambda: random_numbers(pn.LSTM(INPUTS, HIDDEN, norm=norm, rng=0, t_max=4, **keywords))


def gru(norm: str | None) -> Callable[[], pn.Layer]:
    return lambda: random_numbers(pn.GRU(INPUTS, HIDDEN, norm=norm, rng=0))


GRAPHS = {
    "LSTM": Graph(lstm(None)),
    "GRU": Graph(gru(None)),
    "LN-LSTM": Graph(lstm("layer")),
    "LN-GRU": Graph(gru("layer")),
    "BN-LSTM": Graph(lstm("batch")),
    "LN-LSTM, two directions": Graph(lstm("layer", bidirectional=True)),
    "LN-LSTM step": Graph(lstm("layer"), {"streaming": True}),
    "LSTM int8": Graph(lstm(None), {"quantize": "int8"}),
    "LN-LSTM int8": Graph(lstm("layer"), {"quantize": "int8"}),
    "LayerNorm": Graph(lambda: random_numbers(pn.LayerNorm(HIDDEN))),
}
TARGETS: tuple[Literal["portable", "onnxruntime"], ...] = ("portable", "onnxruntime")


def target_of(model: onnx.ModelProto) -> Literal["portable", "onnxruntime"]:
    """Which of the two a graph was exported for; each has an opset of its own."""
    return "portable" if model.opset_import[0].version == 18 else "onnxruntime"


def feed_of(model: onnx.ModelProto, seed: int) -> dict[str, Any]:
    """Random inputs of a graph: `x`, ragged lengths, states within ±0.5."""
    rng, feed = np.random.default_rng(seed), {}
    for given in model.graph.input:
        dims = [DIMS.get(d.dim_param, d.dim_value or DIMS["batch"]) for d in given.type.tensor_type.shape.dim]
        kind = onnx.helper.tensor_dtype_to_np_dtype(given.type.tensor_type.elem_type)
        if np.issubdtype(kind, np.integer):
            feed[given.name] = np.array([20, 13, 7][: dims[0]] if dims else 0, kind)
        else:
            drawn = rng.standard_normal(dims) if not given.name.endswith("_0") else rng.uniform(-0.5, 0.5, dims)
            feed[given.name] = drawn.astype(kind)
    return feed


def sequence_of(model: onnx.ModelProto, seed: int) -> tuple[Any, ...]:
    """`x`, and lengths where the graph takes them, as `portnorm.verify` takes them: of a streaming graph, the steps of a sequence."""
    x, *counted = (a for name, a in feed_of(model, seed).items() if not name.endswith("_0"))
    if graph_facts(model)["streaming"]:
        x = np.random.default_rng(seed).standard_normal((DIMS["time"], *x.shape)).astype(x.dtype)
    return (x, *counted) if counted else (x, None)
