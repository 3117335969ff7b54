"""NumPy: kernels compiled by numba where it is installed (extra `fast`), else the definitions but for what NumPy itself has better.

numba itself is imported when the first array comes that a kernel takes.
"""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import numpy

from portnorm.arrays import Kernel, Library
from portnorm.lookup import embedding
from portnorm.norm.layer import layer_norm
from portnorm.norm.rms import rms_norm
from portnorm_backends import bfloat16
from portnorm_backends.cpu import affine, channels, descent, integers, memory, normalize, recurrent, rows

_COMPILED = {
    "normalize": normalize.KERNEL,
    "layer_norm": rows.last_axis(layer_norm, center=True),
    "batch_norm": channels.BATCH_NORM,
    "rms_norm": rows.last_axis(rms_norm, center=False),
    **affine.KERNELS,
    "fake_quantize": integers.ROUNDED,
    "integer_product": integers.PRODUCT,
    "scan": recurrent.KERNEL,
    "linear_scan": recurrent.FROM_INPUTS,
    **descent.KERNELS,
}


_ROWS = 2**12
"""Rows that are added up at a time: what is made of them on the way stays in a cache."""


def _rows_added(rows: numpy.ndarray[Any, Any], ids: numpy.ndarray[Any, Any], *, entries: int) -> numpy.ndarray[Any, Any]:
    """In the order of their numbers, so that those of one number lie beside each other; in float64."""
    total, order = numpy.zeros((entries, rows.shape[1]), rows.dtype), numpy.argsort(ids, kind="stable")
    ordered = ids[order]
    starts = numpy.flatnonzero(numpy.diff(ordered, prepend=-1))
    parts = numpy.unique([*numpy.searchsorted(starts, numpy.arange(0, len(ids), _ROWS)), len(starts)])
    for first, last in itertools.pairwise(parts):
        begin, end = starts[first], starts[last] if last < len(starts) else len(ids)
        total[ordered[starts[first:last]]] = numpy.add.reduceat(
            rows[order[begin:end]], starts[first:last] - begin, axis=0, dtype=numpy.float64
        )
    return total


def _looks_up(ids: Any, weight: Any) -> bool:
    """Integers that NumPy takes for places, and a table."""
    of_numpy = type(ids) is numpy.ndarray and type(weight) is numpy.ndarray
    return of_numpy and ids.dtype.kind == "i" and weight.dtype.kind == "f" and weight.dtype.char != "g" and weight.ndim == 2


def _embedding(ids: numpy.ndarray[Any, Any], weight: numpy.ndarray[Any, Any]) -> Any:
    try:
        if not ids.size or ids.min() >= 0:
            return weight.take(ids, axis=0)
    except IndexError:
        pass
    return embedding.definition(ids, weight)[0]  # which says what is wrong


def _stored(x: numpy.ndarray[Any, Any], dtype: Any) -> numpy.ndarray[Any, Any]:
    """A copy; a matrix begins with a cache line, else AVX-512 reads each register from two, and a step takes up to half as long again."""
    return memory.aligned_copy(x, numpy.dtype(dtype)) if x.ndim > 1 and x.size else x.astype(dtype)


def _fixed(x: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
    """A copy that nobody can write to: over bytes, which Python never changes."""
    return numpy.frombuffer(x.tobytes(), x.dtype).reshape(x.shape)


_OWN = {
    "embedding": Kernel(call=_embedding, accepts=_looks_up),
    "rows_added": Kernel(call=_rows_added, accepts=lambda rows, *_, **__: rows.dtype.kind == "f"),
}


# 16 MB in float32: enough rows for what is done once for them all, and little enough for a cache.
LIBRARY = Library(
    "numpy",
    kernels=_OWN | (_COMPILED if importlib.util.find_spec("numba") is not None else {}),
    at_once=2**22,
    stored=_stored,
    fixed=_fixed,
    narrow=bfloat16.NARROW,
    more_dtypes={"bfloat16": bfloat16.dtype},
    release=memory.release,
)
