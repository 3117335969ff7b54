"""Dask: nothing is computed before it is asked for, so no value of an array can be looked at; a chunk is an array of NumPy."""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any

import dask.array
import numpy

from portnorm.arrays import Array, DType, Kernel, Library, Namespace
from portnorm.op import Op
from portnorm.padding import pack_steps, unpack_steps
from portnorm.scan import reverse_sequences


def _reversed(x: Array, lengths: Array | None = None) -> Array:
    """`portnorm.scan.reverse_sequences` with each sequence in one piece: Dask has no `take_along_axis`."""
    if lengths is None:
        return dask.array.flip(x, axis=0)
    whole = x.rechunk({0: -1})
    return dask.array.blockwise(_of_chunk, "tbf", whole, "tbf", lengths, "b", dtype=x.dtype, meta=whole._meta)


def _of_chunk(x: Array, lengths: Array) -> Array:
    return reverse_sequences(x, lengths)


def _forward(x: Array, lengths: Array | None = None) -> tuple[Array, Array | None]:
    return _reversed(x, lengths), lengths


class DaskNamespace:
    """Dask's functions of the Array API standard, with a maximum that takes arrays of which some chunks are empty."""

    __name__ = "array_api_compat.dask.array"

    def __init__(self) -> None:
        self.own: Namespace = importlib.import_module(self.__name__)

    def __getattr__(self, name: str) -> Any:
        if name == "own":
            raise AttributeError(name)
        found = getattr(self.own, name)
        setattr(self, name, found)
        return found

    def max(self, x: Array, /, *, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Array:
        """The largest value along `axis`: that of an empty chunk is the smallest of the type."""
        axes = range(x.ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
        if math.prod(x.shape[a] for a in axes) == 0:
            return self.own.max(x, axis=axis, keepdims=keepdims)
        largest = functools.partial(numpy.max, initial=_smallest(x.dtype))
        return dask.array.reduction(x, largest, largest, axis=axis, keepdims=keepdims, dtype=x.dtype, concatenate=True)


def _smallest(dtype: DType) -> Any:
    if dtype.kind == "b":
        return False
    return -numpy.inf if dtype.kind == "f" else numpy.iinfo(dtype).min


def _by_sequence(op: Op[..., Any]) -> Kernel:
    """An Op of (time, batch, features), a mask (time, batch) and perhaps (batch, features), with each sequence in one piece."""

    def call(x: Array, mask: Array, *first: Array) -> Array:
        whole, steps = x.rechunk({0: -1}), mask.rechunk({0: -1})
        others = [part for a in first for part in (a, "bf")]
        return dask.array.blockwise(op, "tbf", whole, "tbf", steps, "tb", *others, dtype=x.dtype, meta=whole._meta)

    return Kernel(call, lambda x, mask, *first: (call(x, mask, *first), mask))


LIBRARY = Library(
    "dask",
    namespace=DaskNamespace,
    kernels={
        "reverse_sequences": Kernel(_reversed, _forward),
        "pack_steps": _by_sequence(pack_steps),
        "unpack_steps": _by_sequence(unpack_steps),
    },
    is_concrete=lambda x: False,
    to_numpy=numpy.asarray,
)
