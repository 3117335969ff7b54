"""Dask: nothing is computed before it is asked for, so no value of an array can be looked at; a chunk is an array of NumPy."""

from __future__ import annotations

import functools
from typing import Any

import dask.array

from portnorm.arrays import Array, Kernel, Library
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


def _by_sequence(op: Op[..., Any]) -> Kernel:
    """An Op of (time, batch, features) and a mask (time, batch), with each sequence in one piece."""

    def call(x: Array, mask: Array, **attrs: Any) -> Array:
        whole, steps = x.rechunk({0: -1}), mask.rechunk({0: -1})
        return dask.array.blockwise(functools.partial(op, **attrs), "tbf", whole, "tbf", steps, "tb", dtype=x.dtype, meta=whole._meta)

    return Kernel(call, lambda x, mask, **attrs: (call(x, mask, **attrs), mask))


LIBRARY = Library(
    "dask",
    kernels={
        "reverse_sequences": Kernel(_reversed, _forward),
        "pack_steps": _by_sequence(pack_steps),
        "unpack_steps": _by_sequence(unpack_steps),
    },
    is_concrete=lambda x: False,
)
