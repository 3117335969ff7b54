"""Inputs that a graph is checked on, where none are given: random numbers of a few lengths, ragged or with gaps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy

from portnorm.errors import UnsupportedError
from portnorm.layers.channels import GroupNorm, InstanceNorm
from portnorm.layers.embedding import Embedding
from portnorm.layers.layer import Layer
from portnorm.layers.norms import LayerNorm, RMSNorm
from portnorm_onnx.bounds import NumPyArray
from portnorm_onnx.signature import batch_axis, mask_dims, time_axis

Inputs = tuple[NumPyArray, NumPyArray | None]
"""`x`, and the lengths or the mask, if the graph takes one."""
Stated = tuple[NumPyArray, NumPyArray | None, Any]
"""The same and a state to begin with; `None` for the first one."""


def checked_cases(inputs: Any) -> list[tuple[Any, ...]]:
    """Each of `inputs` as a tuple; raises `UnsupportedError` for what is no arrays to check a graph on."""
    if not hasattr(inputs, "__iter__") or isinstance(inputs, str | bytes) or (hasattr(inputs, "ndim") and not inputs.ndim):
        raise UnsupportedError(f"`inputs` is {inputs!r}; expected a list of x, (x, lengths) or (x, mask)")
    cases = [item if isinstance(item, tuple) else (item, None) for item in inputs]
    for k, case in enumerate(cases):
        if len(case) != 2 or not getattr(case[0], "ndim", 0):
            what = f"a tuple of {len(case)}" if len(case) != 2 else f"a {type(case[0]).__name__}"
            raise UnsupportedError(f"`inputs` has {what} at {k}; expected x, (x, lengths) or (x, mask), arrays")
    return cases


# (time, batch) of the cases; with `lengths`, every case but the first is ragged, with `mask` it has gaps.
CASES = ((1, 1), (1, 3), (5, 2), (24, 7))
# Of weights from `WIDE` bytes on, where each step reads all of them. There the eager run is held against runs of inputs moved by a unit in
# the last place instead of a float64 run, whose weights alone were twice what the model has.
WIDE_CASES = ((1, 1), (3, 2))
WIDE_ROUNDINGS = 2


def random_inputs(model: Layer, dims: Sequence[int | str], counts: str | None, sizes: Sequence[tuple[int, int]] = CASES) -> list[Inputs]:
    """Standard normal inputs for a model whose `x` has this shape, with ragged lengths or a mask if the graph `counts` by one."""
    rng = numpy.random.default_rng(0)
    cases: list[Inputs] = []
    for steps, batch in sizes:
        # Without time the second length is space: more than one value, or the variance of every channel would be 0.
        usual = {batch_axis(model): batch} | ({time_axis(model): steps} if model.recurrent else {1: steps + 4})
        shape = [d if isinstance(d, int) else usual.get(axis, 5) for axis, d in enumerate(dims)]
        if model.recurrent:  # some may be fixed
            steps, batch = (shape[axis] for axis in (1 if model.batch_first else 0, batch_axis(model)))
        x = rng.standard_normal(shape).astype(model.dtype) if not model.takes_integers else rng.integers(0, _entries(model), shape)
        ragged = rng.integers(1, steps + 1, size=batch)
        ragged[0] = steps
        cases.append((x, None if counts is None else ragged if counts == "lengths" else _random_mask(model, shape, rng)))
    return cases


MEANS = {"float16": (100.0,), "bfloat16": (), "float32": (100.0, 1e4), "float64": (100.0, 1e4)}
"""By type: means of which a spread of 1 can still be told."""
SPREAD = 300.0
"""One of which squares leave float16."""


def far_inputs(model: Layer, dtype: str, cases: Sequence[Inputs]) -> list[Inputs]:
    """Of a model that begins by normalizing values to their own mean, also values far from 0, where one pass for the variance cancels, as
    temperatures in Kelvin or times have it; in float16 also some whose squares are too large for it.
    """
    if not centres_first(model):
        return []
    x, counted = max(cases, key=lambda case: case[0].size)
    rng = numpy.random.default_rng(1)
    drawn: NumPyArray = numpy.asarray(rng.standard_normal(x.shape))
    values: list[NumPyArray] = [drawn + mean for mean in MEANS[dtype]] + [SPREAD * drawn] * (dtype == "float16")
    return [(v.astype(model.dtype), counted) for v in values]


def centres_first(model: Layer) -> bool:
    """Whether the first part of a model takes the mean and the variance of its input's values."""
    part = next(iter(model.layers()), model)
    tracks = isinstance(part, InstanceNorm) and part.track_running_stats
    own = isinstance(part, LayerNorm | GroupNorm | InstanceNorm) and not isinstance(part, RMSNorm)
    return own and not tracks and not model.takes_integers


def _random_mask(model: Layer, shape: Sequence[Any], rng: numpy.random.Generator) -> NumPyArray:
    """Gaps anywhere but in the first case; then, in turn, nothing at all, padding in front, and padding behind."""
    dims: Any = mask_dims(model, shape)
    mask: NumPyArray = rng.uniform(size=dims) < (1.0 if math.prod(dims) == 1 else 0.7)
    if model.recurrent and math.prod(dims) > 1:
        steps = mask if model.batch_first else mask.T  # (batch, time)
        count, order = steps.sum(axis=1, keepdims=True), numpy.arange(steps.shape[1])
        for first, rows in enumerate((numpy.zeros_like(steps), order >= steps.shape[1] - count, order < count)):
            steps[1 + first :: 4] = rows[1 + first :: 4]
    return mask


def _entries(model: Layer) -> int:
    """How many integers a model that starts with an embedding takes."""
    return next(layer.num_embeddings for layer in model.layers() if isinstance(layer, Embedding))


def steps_of(model: Layer, x: NumPyArray) -> int:
    axis = time_axis(model)
    return 1 if axis is None else int(x.shape[axis])


def case_name(model: Layer, case: Inputs) -> str:
    x, counted = case
    if counted is None:
        return f"x {tuple(x.shape)}{_far(x)}"
    if counted.dtype == bool:
        return f"x {tuple(x.shape)}{_far(x)} with a mask"
    return f"x {tuple(x.shape)}{_far(x)}" + (" ragged" if len(set(map(int, counted))) > 1 else " with lengths")


def _far(x: NumPyArray) -> str:
    """That the values are far from 0, where they are."""
    if x.dtype.kind != "f" or x.size < 2:
        return ""
    mean, spread = float(x.mean(dtype=numpy.float64)), float(x.std(dtype=numpy.float64))
    return f" of mean/std {mean / spread:.0e}" if 0.0 < spread < abs(mean) / 50 else ""
