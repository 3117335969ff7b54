"""The CUDA kernels of this folder: which there are, compiled by NVRTC for a device when a call first needs one there, and their launch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cupy
import numpy

_SOURCES = Path(__file__).parent

TYPES = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16", "float64": "double"}
"""Names of dtypes in CUDA C++."""

PACK = {"float": 4, "__half": 8, "__nv_bfloat16": 8, "double": 2}
"""Values of 16 bytes."""


def statistics_type(t: str) -> str:
    """The type of statistics of values of type `t`."""
    return "double" if t == "double" else "float"


THREADS = 512
"""The most threads of a block. Where a row is in registers, each has as many values of it as these tables say, by the type of the values:
forward, backward, and backward with the sums for the cotangents of gain and shift."""
FORWARD = {"float": (8, 16, 32), "__half": (8, 16, 32), "__nv_bfloat16": (8, 16, 32), "double": (8, 16)}
BACKWARD = {"float": (8, 16, 32), "__half": (8, 16, 32), "__nv_bfloat16": (8, 16, 32), "double": (8, 16)}
WITH_SUMS = {"float": (8, 16), "__half": (8, 16), "__nv_bfloat16": (8, 16), "double": (8,)}
COLUMN_PACK = 4
"""Channels of a thread where the channels are the last axis."""


CELLS = ("LSTM", "GRU", "RNN")
UNITS = (1, 4, 8)
"""Hidden units of a thread in a step of a recurrent cell."""


class _Family(NamedTuple):
    """A kernel: the file it is in, and the template arguments that it has for values of type t and parameters of type p."""

    file: str
    arguments: Callable[[str, str], list[tuple[Any, ...]]]


def _packs(t: str) -> tuple[int, int]:
    return (1, PACK[t])


KERNELS: dict[str, _Family] = {
    "rows_forward": _Family("rowwise", lambda t, p: [(t, p, v, per) for v in _packs(t) for per in FORWARD[t]]),
    "rows_backward": _Family(
        "rowwise",
        lambda t, p: [
            (t, p, v, per, sums)
            for v in _packs(t)
            for per, sums in (*((n, "false") for n in BACKWARD[t]), *((n, "true") for n in WITH_SUMS[t]))
        ],
    ),
    "run_sums": _Family("rowwise", lambda t, p: [(t,)]),
    "column_sums": _Family("rowwise", lambda t, p: [(t,)]),
    "sum_parts": _Family("rowwise", lambda t, p: [(p,)]),
    "channel_moments": _Family("channelwise", lambda t, p: [(t, v) for v in _packs(t)]),
    "merge_moments": _Family("channelwise", lambda t, p: [()]),
    "channel_write": _Family("channelwise", lambda t, p: [(t, p, v) for v in _packs(t)]),
    "channel_sums": _Family("channelwise", lambda t, p: [(t, p, v) for v in _packs(t)]),
    "merge_sums": _Family("channelwise", lambda t, p: [(p,)]),
    "channel_dx": _Family("channelwise", lambda t, p: [(t, p, v) for v in _packs(t)]),
    "column_moments": _Family("channelwise", lambda t, p: [(t, v) for v in (1, COLUMN_PACK)]),
    "column_write": _Family("channelwise", lambda t, p: [(t, p, v) for v in (1, COLUMN_PACK)]),
    "column_gradients": _Family("channelwise", lambda t, p: [(t, v) for v in (1, COLUMN_PACK)]),
    "column_dx": _Family("channelwise", lambda t, p: [(t, p, v) for v in (1, COLUMN_PACK)]),
    "step_forward": _Family("recurrent", lambda t, p: [(t, cell, units) for cell in CELLS for units in UNITS]),
    "step_backward": _Family("recurrent", lambda t, p: [(t, cell, units) for cell in CELLS for units in UNITS]),
    "batch_forward": _Family("recurrent", lambda t, p: [(t, cell) for cell in CELLS]),
    "batch_backward": _Family("recurrent", lambda t, p: [(t, cell) for cell in CELLS]),
}


def expressions(name: str, t: str, p: str) -> tuple[str, ...]:
    """The C++ name expressions of a kernel for values of type `t` and parameters of type `p`."""
    return tuple(_expression(name, arguments) for arguments in KERNELS[name].arguments(t, p))


def _expression(name: str, arguments: tuple[Any, ...]) -> str:
    return f"{name}<{', '.join(map(str, arguments))}>" if arguments else name


def types() -> Iterator[tuple[str, str]]:
    """Every type of values with the types that its parameters can have."""
    for t in TYPES.values():
        for p in dict.fromkeys((t, statistics_type(t))):
            yield t, p


@functools.cache
def source(file: str) -> str:
    """A `.cu` file with the header that it includes, as one text: CuPy's cache of binaries knows a kernel by its text."""
    return (_SOURCES / f"{file}.cu").read_text().replace('#include "common.cuh"', (_SOURCES / "common.cuh").read_text())


@functools.cache
def _function(name: str, template: tuple[Any, ...], device: int) -> Any:
    """One kernel for one device. Each is a module of its own, since compiling takes a second or so, and a call needs few of them."""
    expression = _expression(name, template)
    module = cupy.RawModule(code=source(KERNELS[name].file), options=("--std=c++17",), name_expressions=(expression,))
    return module.get_function(expression)


def launch(name: str, template: tuple[Any, ...], grid: tuple[int, int], block: tuple[int, int], *arguments: Any) -> None:
    """Run a kernel on the current device and stream. Arrays go as their address, `None` as 0, structures by value."""
    function = _function(name, template, cupy.cuda.runtime.getDevice())
    function((*grid, 1), (*block, 1), tuple(map(_argument, arguments)))


def _argument(value: Any) -> Any:
    if value is None:
        return 0
    if isinstance(value, bool):
        return numpy.bool_(value)
    return value if isinstance(value, int | float | numpy.ndarray) else value.data.ptr
