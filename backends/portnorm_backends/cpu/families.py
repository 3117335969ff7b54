"""The kernels that are compiled together, what compiles them for a type of values, and which of them a layer takes."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy

from portnorm.arrays import load_namespace
from portnorm.dtypes import dtype_name
from portnorm.errors import UnsupportedError
from portnorm.layers.channels import BatchNorm, GroupNorm, InstanceNorm
from portnorm.layers.layer import Layer
from portnorm.layers.linear import Linear
from portnorm.layers.norms import LayerNorm, RMSNorm
from portnorm.layers.recurrent import GRU, LSTM, RNN, Recurrent
from portnorm_backends import bfloat16
from portnorm_backends.cpu.layout import RANGE, SHORT

Family = tuple[str, str]
"""A name of `FAMILIES`, and the name of a type."""


TRAINING = " training"
"""Ends the name of a family that has the backward loops too."""

BY_BATCH = "steps by batch"
"""What the loop of any cell takes for statistics over the batch."""


def _rows(dtype: str) -> None:
    rowwise, kind = importlib.import_module("portnorm_backends.cpu.rowwise"), type_named(dtype)
    rowwise.forward(kind), rowwise.backward(kind)


def _short_rows(dtype: str) -> None:
    for module, way in (("abreast", "forward"), ("abreast_back", "backward")):
        getattr(importlib.import_module(f"portnorm_backends.cpu.{module}"), way)(type_named(dtype))


def _channels(dtype: str) -> None:
    channelwise, kind = importlib.import_module("portnorm_backends.cpu.channelwise"), type_named(dtype)
    for inner in (False, True):
        channelwise.forward(kind, inner), channelwise.scale(kind, inner), channelwise.backward(kind, inner)


def _products(dtype: str) -> None:
    module = importlib.import_module("portnorm_backends.cpu.products")
    for name in module.KERNELS:
        module.compiled_for(name, numpy.dtype(dtype))


def _outer_products(dtype: str) -> None:
    module = importlib.import_module("portnorm_backends.cpu.outer")
    if module.PAYS:
        module.compiled_for(numpy.dtype(dtype))


def _steps_by_batch(dtype: str) -> None:
    importlib.import_module("portnorm_backends.cpu.slots").over_batch(numpy.dtype(dtype))


def _updates(dtype: str) -> None:
    module = importlib.import_module("portnorm_backends.cpu.descending")
    for name, (_, _, counts) in module.STEPS.items():
        for numbers in counts:
            module.compiled_for(name, numpy.dtype(dtype), numbers)


def _integers(dtype: str) -> None:
    """Of float32 alone."""
    module, x = importlib.import_module("portnorm_backends.cpu.integer_rows"), numpy.ones((1, 2), numpy.float32)
    module.product(x, True, x.astype(module.INTEGER), x.astype(numpy.int8), x[0, :1].astype(numpy.int32), x[0, :1], x[:, :1])


def _loop(cell: type[Recurrent], training: bool) -> Callable[[str], None]:
    def calls(dtype: str) -> None:
        layer, x = cell(2, 3, norm="layer", rng=0, dtype=dtype), numpy.ones((3, 2, 2), dtype)
        y, *_, pullback = layer.vjp(x, training=training)
        layer(x)
        if training:
            pullback(y)

    return calls


FAMILIES: dict[str, Callable[[str], None]] = {
    "rows": _rows,
    "short rows": _short_rows,
    "channels": _channels,
    "products": _products,
    "outer products": _outer_products,
    BY_BATCH: _steps_by_batch,
    "updates": _updates,
    "integers": _integers,
    **{cell.__name__: _loop(cell, False) for cell in (LSTM, GRU, RNN)},
    **{f"{cell.__name__}{TRAINING}": _loop(cell, True) for cell in (LSTM, GRU, RNN)},
}
"""What is compiled together, and what compiles all of it for a type of values. That for training has all of inference."""


TYPES = (*map(str, RANGE), "bfloat16")


OF_BITS = ("rows", "short rows", "channels")
"""The families that there are for bfloat16 too; all else computes in float32 what is in it."""


_OF_LAYERS: dict[type[Layer], tuple[str, ...]] = {
    LayerNorm: ("rows",),
    RMSNorm: ("rows",),
    GroupNorm: ("rows",),
    BatchNorm: ("channels",),
    InstanceNorm: ("rows", "channels"),
    Linear: ("products", "outer products"),
    Recurrent: ("rows", "channels", "products", "outer products"),
    **{cell: (f"{cell.__name__}{TRAINING}",) for cell in (LSTM, GRU, RNN)},
}
"""What the calls of a layer take."""


def _narrowest(layer: Layer) -> int:
    """How long the rows are at least that a layer normalizes; 0 where that hangs on what it is given."""
    if isinstance(layer, LayerNorm | RMSNorm):
        return math.prod(layer.normalized_shape)
    return layer.hidden_size if isinstance(layer, Recurrent) else 0


def needed(layers: tuple[Layer, ...]) -> Iterator[Family]:
    for layer in layers:
        if not isinstance(layer, Layer):
            raise UnsupportedError(f"`layers` has a {type(layer).__name__}; expected layers of portnorm")
        for part in layer.layers():
            dtype = dtype_name(part.xp, part.dtype)
            if dtype in TYPES and part.xp is load_namespace("numpy"):
                names = [name for kind, names in _OF_LAYERS.items() if isinstance(part, kind) for name in names]
                names += ["short rows"] if "rows" in names and _narrowest(part) <= SHORT else []
                names += [BY_BATCH] if isinstance(part, Recurrent) and part.variant.norm == "batch" else []
                names += ["integers"] if part.quantizes is not None else []
                yield from (own for name in names for own in parts_of(name, dtype))


def parts_of(name: str, dtype: str) -> list[Family]:
    """What values of a type take of a family: bfloat16 that for float32 too, since what is computed as a whole is so in that."""
    bits = [(name, dtype)] if name in OF_BITS else []
    return [*bits, (name, "float32")] if dtype == "bfloat16" else [(name, dtype)]


def families_of(dtype: str) -> list[str]:
    """Those that have kernels for values of this type."""
    return [name for name in FAMILIES if (name, dtype) in parts_of(name, dtype)]


def type_named(name: str) -> Any:
    return bfloat16.dtype() if name == "bfloat16" else numpy.dtype(name)
