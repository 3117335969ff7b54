"""The compiled time loops: which there are, and which calls they take.

A cell that the kernels do not know in every detail (peepholes, projections, zoneout, …) stays with the definition, `portnorm.scan.scan`.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple

import numpy

from portnorm.arrays import Array
from portnorm.cells.cell import RecurrentCell
from portnorm.cells.gru import GRUCell
from portnorm.cells.lstm import LSTMCell
from portnorm.cells.rnn import RNNCell
from portnorm.scan import Params, State
from portnorm_backends.cpu.families import BY_BATCH, TRAINING
from portnorm_backends.cpu.layout import RANGE
from portnorm_backends.cpu.warming import ready

Shape = tuple[int, ...]
Shapes = tuple[Shape, ...]
Names = tuple[str, ...]


class Loop(NamedTuple):
    """The compiled loop of a cell."""

    name: str
    """Of its family of kernels."""
    module: str
    slots: tuple[str, ...]
    """Those that it knows."""


LOOPS = {
    LSTMCell: Loop("LSTM", "lstm", ("norm_hh", "norm_sum", "norm_c")),
    GRUCell: Loop("GRU", "gru", ("norm_hh",)),
    RNNCell: Loop("RNN", "rnn", ("norm_hh", "norm_sum")),
}


@functools.cache
def kernels_of(module: str) -> Any:
    """A module of kernels, imported with numba when the first array comes that it takes."""
    return importlib.import_module(f"portnorm_backends.cpu.{module}")


def accepts(
    xs: tuple[Array, ...],
    state: State,
    params: Params,
    *,
    cell: Any,
    lengths: Any = None,
    sequences: bool = True,
    keep: bool = True,
    recompute: int | None = None,
) -> bool:
    """A cell in its plain form or with normalizers of rows or of the batch, on arrays of one type, and at least one step."""
    shapes = _shapes_of((*xs, *state, *params.values())) if _is_known(cell) else None
    if shapes is None or not _fit(cell, (*params,), len(xs), shapes):
        return False
    return _are_counts(lengths, xs[0].shape[1]) and _are_ready(cell, keep, xs[0].dtype)


def accepts_inputs(x: Array, params: Params, state: State, loop: Params, *, cell: Any, lengths: Any = None, sequences: bool = True) -> bool:
    """The same with an input term that is normalized by rows or not at all."""
    shapes = _shapes_of((x, *params.values(), *state, *loop.values())) if _is_known(cell) else None
    if shapes is None or not _inputs_fit(cell, (*params,), (*loop,), shapes):
        return False
    return _are_counts(lengths, x.shape[1]) and _are_ready(cell, False, x.dtype)


@functools.lru_cache(maxsize=256)
def _inputs_fit(cell: RecurrentCell, names: Names, loop: Names, shapes: Shapes) -> bool:
    """`_fit`, and the same of what makes an input term: `shapes` are those of x, of what has the first `names`, and then as there."""
    (x, *own), rest = shapes[: 1 + len(names)], shapes[1 + len(names) :]
    params, known = dict(zip(names, own, strict=True)), _known_outside(cell)
    weight = params.pop("weight_ih")
    if known is None or len(x) != 3 or 0 in x or weight[1:] != x[2:] or not params.keys() <= known:
        return False
    return all(shape == weight[:1] for shape in params.values()) and _fit(cell, loop, 1, ((*x[:2], weight[0]), *rest))


def _are_ready(cell: RecurrentCell, keep: bool, dtype: Any) -> bool:
    """The kernels that this call, and where it keeps something its backward call, will take."""
    name, by_batch = _families(cell, keep)
    return ready(name, dtype) and (not by_batch or ready(BY_BATCH, dtype))


@functools.lru_cache(maxsize=64)
def _families(cell: RecurrentCell, keep: bool) -> tuple[str, bool]:
    """The loop's own, and whether it takes that of statistics over the batch too."""
    by_batch = any(slot.normalizes and slot.is_batch for slot in cell.slots.values())
    return f"{LOOPS[type(cell)].name}{TRAINING if keep else ''}", by_batch


@functools.lru_cache(maxsize=64)
def _known_outside(cell: RecurrentCell) -> frozenset[str] | None:
    """What an input term may have beside its weights; `None` where it is normalized over the batch."""
    slot = cell.input_slot
    if slot is not None and slot.is_batch:
        return None
    return frozenset({"bias", *(() if slot is None else (f"norm_ih.{p}" for p in slot.parameters()))})


def _shapes_of(arrays: tuple[Any, ...]) -> Shapes | None:
    """Those of arrays of NumPy that are all of one type for which there are kernels; `None` of others."""
    dtype, shapes = getattr(arrays[0], "dtype", None), []
    for a in arrays:
        if type(a) is not numpy.ndarray or a.dtype != dtype:
            return None
        shapes.append(a.shape)
    return tuple(shapes) if dtype in RANGE else None


def _are_counts(lengths: Any, batch: int) -> bool:
    return lengths is None or numpy.shape(lengths) == (batch,)


@functools.lru_cache(maxsize=256)
def _fit(cell: RecurrentCell, names: Names, xs: int, shapes: Shapes) -> bool:
    """Whether all shapes are those that compiled code relies on; it does not look where it reads.

    They are those of so many `xs`, of which the first is the input term, of the state, and of the parameters with these names.
    """
    (shape, *given), state, params = shapes[:xs], shapes[xs : xs + len(cell.states)], shapes[-len(names) :]
    if len(shapes) != xs + len(cell.states) + len(names) or len(shape) != 3 or 0 in shape or shape[2] % cell.gates:
        return False
    time, batch, size = shape[0], shape[1], shape[2] // cell.gates
    return (
        dict(zip(names, params, strict=True)) == _shapes(cell, size)
        and all(own == (batch, size) for own in state)
        and all(own == (time, cell.width(name.partition(".")[0]) * size) for name, own in zip(cell.given(), given, strict=True))
    )


def _shapes(cell: RecurrentCell, size: int) -> dict[str, tuple[int, ...]]:
    """Of what a cell of this hidden size reads in every step."""
    slots = {f"{name}.{p}": (cell.width(name) * size,) for name, slot in cell.slots.items() for p in slot.parameters()}
    return {"weight_hh": (cell.gates * size, size), **{name: slots.get(name, ()) for name in cell.shared()}}


@functools.lru_cache(maxsize=64)
def _is_known(cell: Any) -> bool:
    if cell.quantize is not None or type(cell) not in LOOPS or not set(cell.slots) <= set(LOOPS[type(cell)].slots):
        return False
    v = cell.variant
    plain = (v.recurrence, v.zoneout, v.peepholes, v.clip, v.affine, *v.activations()) == (
        "matrix",
        0.0,
        False,
        None,
        "shared",
        "sigmoid",
        "tanh",
        "tanh",
    )
    by_batch = v.norm == "batch" and any(slot.normalizes for slot in cell.slots.values())
    known = v.eps_place == "variance" and v.variance != "unbiased" and not (by_batch and ("norm_sum" in cell.slots or not v.timed))
    known = known and cell.reduce is None  # statistics over processes are the definition's
    return plain and known and (type(cell) is not GRUCell or (v.reset, v.update) == ("after", "keep"))


def of_cell(cell: Any, c: Any, gates: Any, inner: Any, slots: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the forward loop of a cell takes beside that of all."""
    if type(cell) is LSTMCell:
        return (c, gates, inner, *slots, cell.variant.cell == "copy")
    return (gates, inner, *slots) if type(cell) is GRUCell else slots
