"""`scan` on CuPy arrays: the time loop with one matrix product and one kernel for each step, in buffers that are made once for a call.

Nothing in the loop is read back: which sequences have ended is decided on the device.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import cupy
import numpy

from portnorm.arrays import Array
from portnorm.cells.cell import RecurrentCell
from portnorm.cells.gru import GRUCell
from portnorm.cells.lstm import LSTMCell
from portnorm.cells.rnn import RNNCell
from portnorm.cells.slots import Slot
from portnorm.dtypes import float32_value
from portnorm.scan import Params, State
from portnorm_backends.cuda.kernels import CELLS, THREADS, TYPES, UNITS, launch
from portnorm_backends.cuda.normalize import Plan, column_parts, statistics_dtype, sum_parts

_CELLS: dict[type, str] = dict(zip((LSTMCell, GRUCell, RNNCell), CELLS, strict=True))
_SLOTS = ("norm_hh", "norm_sum", "norm_c")
_PARAMETERS = {"weight_hh", "bias_hh", *(f"{slot}.{p}" for slot in _SLOTS for p in ("weight", "bias"))}

# The numbers of the enumerations in recurrent.cu.
_KIND = {None: 0, "weight": 0, "layer": 1, "rms": 2, "batch": 3}
_PLACE = {None: 0, "norm_hh": 1, "norm_sum": 2}
_PARTITION = {"all": 0, "candidate": 1, "gate": 2}
_STATE = {None: 0, "copy": 1, "state": 2}

_ADDRESSES = (
    *("u", "a", "h", "c", "raw", "y", "gates", "statistics", "cell_statistics", "early", "gain", "shift", "cell_gain", "cell_shift"),
    *("lengths", "mean", "variance", "cell_mean", "cell_variance"),
    *("seen_mean", "seen_variance", "seen_cell_mean", "seen_cell_variance"),
    *("dy", "dh", "direct", "dc", "du", "da", "dn", "dnc", "sums", "cell_sums"),
)
_NUMBERS = ("batch", "hidden", "h_step", "c_step", "a_step", "kind", "place", "partition", "state", "relu", "training", "unbiased")
STEP = numpy.dtype([*((name, "u8") for name in _ADDRESSES), *((name, "i8") for name in _NUMBERS), ("eps", "f8")])
"""`struct Step` of recurrent.cu."""


class ScanKernelResiduals(NamedTuple):
    """What the vjp of a scan needs: the buffers of the forward loop, as they are."""

    params: Params
    buffers: dict[str, Array]  # by their names in `struct Step`


class _Shape(NamedTuple):
    steps: int
    batch: int
    hidden: int
    gates: int


def accepts(
    xs: Any, state: Any, params: Any, *, cell: Any, lengths: Any = None, sequences: bool = True, keep: bool = True, **attrs: Any
) -> bool:
    """The three cells with the usual places of normalizers and biases; floating values of one dtype, and at least one step, all kept."""
    if attrs.get("recompute") is not None:
        return False
    if type(cell) not in _CELLS or not set(params) <= _PARAMETERS or not {"norm_hn", "norm_n"}.isdisjoint(cell.slots):
        return False
    v = cell.variant
    if (
        cell.reduce is not None
        or cell.quantize is not None
        or v.zoneout
        or v.peepholes
        or v.clip is not None
        or v.affine != "shared"
        or v.recurrence != "matrix"
        or v.eps_place != "variance"
        or v.variance == "unbiased"
        or v.gate_activation != "sigmoid"
        or v.activation not in (("tanh",) if isinstance(cell, LSTMCell) else ("tanh", "relu"))
        or v.output_activation not in (None, "tanh")
    ):
        return False
    if (isinstance(cell, GRUCell) and ((v.reset, v.update) != ("after", "keep") or "norm_sum" in cell.slots)) or (
        v.norm == "batch" and v.cell == "state"
    ):
        return False
    arrays = (xs[0], *state, *params.values())
    if any(type(a) is not cupy.ndarray or a.dtype != xs[0].dtype for a in arrays) or xs[0].dtype.name not in TYPES:
        return False
    if any(type(a) is not cupy.ndarray for a in xs):
        return False
    return bool(xs[0].size) and bool(state[0].shape[-1] <= THREADS * max(UNITS))


def forward(
    xs: tuple[Array, ...],
    state: State,
    params: Params,
    *,
    cell: RecurrentCell,
    lengths: Array | None = None,
    sequences: bool = True,
    keep: bool = True,
) -> tuple[tuple[State, tuple[Array, ...]], ScanKernelResiduals]:
    """`portnorm.scan.scan`."""
    u = cupy.ascontiguousarray(xs[0])
    with u.device:
        shape = _Shape(u.shape[0], u.shape[1], state[0].shape[-1], cell.gates)
        steps, batch, hidden, _ = shape
        place, batchwise = _place(cell), _is_batchwise(cell)
        of_statistics = statistics_dtype(TYPES[u.dtype.name])
        given = {name: cupy.ascontiguousarray(a, dtype=of_statistics) for name, a in zip(cell.given(), xs[1:], strict=True)}
        whole = keep or (sequences and lengths is None)
        b: dict[str, Any] = {
            "u": u,
            "a": _empty(u, steps if keep else 1, batch, shape.gates * hidden),
            "h": _states(state[0], steps if whole else 0),
            "lengths": lengths,
            "early": _contiguous(params.get("bias_hh")),
            **_affine(params, place),
            **{f"cell_{name}": a for name, a in _affine(params, "norm_c").items()},
        }
        if len(state) == 2:
            b["c"] = _states(state[1], steps if keep else 0)
        if keep or batchwise:
            b["gates"] = _empty(u, *b["a"].shape)
        if sequences and not (whole and lengths is None):
            b["y"] = _empty(u, steps, batch, hidden)
        if keep and cell.variant.cell == "state":
            b["raw"] = _empty(u, steps, batch, hidden)
        _prepare_statistics(cell, shape, given, b, keep)
        step = _step(cell, shape, b)
        block, grid, template = _grid(cell, shape, TYPES[u.dtype.name])
        name = "batch_forward" if batchwise else "step_forward"
        weights, a, h = params["weight_hh"].T, b["a"], b["h"]
        for t in range(steps):
            cupy.matmul(h[t if whole else 0], weights, out=a[t if keep else 0])
            launch(name, template, grid, block, step, t)
        last = tuple(b[name][-1] for name in ("h", "c") if name in b)
        y = () if not sequences else (b["y"] if "y" in b else h[1:],)
        seen = tuple(b[name] for name in _SEEN if name in b)
        return (last, (*y, *seen)), ScanKernelResiduals(params, b if keep else {})


def vjp(
    residuals: ScanKernelResiduals, cotangents: tuple[State, Array | None], *, cell: RecurrentCell, **attrs: Any
) -> tuple[tuple[Array, ...], State, Params]:
    """The vjp of `portnorm.scan.scan`."""
    dstate, dy = cotangents
    params, b = residuals.params, dict(residuals.buffers)
    u = b["u"]
    with u.device:
        shape = _Shape(u.shape[0], u.shape[1], b["h"].shape[-1], cell.gates)
        steps, batch, hidden, gates = shape
        place, batchwise = _place(cell), _is_batchwise(cell)
        b["dy"] = _contiguous(dy)
        b["dh"], b["direct"] = cupy.zeros((batch, hidden), dtype=u.dtype), _copy(dstate[0])
        if "c" in b:
            b["dc"] = _copy(dstate[1])
        b["da"] = _empty(u, *u.shape)
        # Of LSTM and RNN, what is added to u is what N gives out; N's input has the same cotangent where it is the sum, or there is no N.
        apart, normalized = isinstance(cell, GRUCell), _normalizes(cell, place)
        b["du"] = _empty(u, *u.shape) if apart or (normalized and place == "norm_hh") else b["da"]
        b["dn"] = b["du"] if not apart and b["du"] is not b["da"] else _empty(u, *u.shape) if normalized else b["da"]
        if not batchwise and cell.variant.cell is not None:
            b["dnc"] = _empty(u, steps, batch, hidden)
        if batchwise:
            b["sums"] = cupy.empty((steps, 2, gates * hidden), dtype="float64")
            b["cell_sums"] = cupy.empty((steps, 2, hidden), dtype="float64")
        step = _step(cell, shape, b)
        block, grid, template = _grid(cell, shape, TYPES[u.dtype.name])
        name = "batch_backward" if batchwise else "step_backward"
        weights, da, dh = params["weight_hh"], b["da"], b["dh"]
        for t in reversed(range(steps)):
            launch(name, template, grid, block, step, t)
            cupy.matmul(da[t], weights, out=dh)
        first = (dh + b["direct"], *((b["dc"],) if "dc" in b else ()))
        return (b["du"], da, b["h"][:steps]), first, _shares(cell, shape, b)


# -- buffers -----------------------------------------------------------------------------------------------------------------------------


def _empty(like: Array, *shape: int) -> Array:
    return cupy.empty(shape, dtype=like.dtype)


def _contiguous(a: Any) -> Any:
    return None if a is None else cupy.ascontiguousarray(a)


def _copy(a: Array) -> Array:
    made = _empty(a, *a.shape)
    made[...] = a
    return made


def _states(first: Array, steps: int) -> Array:
    """Room for the state before each of so many steps and after the last."""
    made = _empty(first, steps + 1, *first.shape)
    made[0, ...] = first
    return made


def _place(cell: RecurrentCell) -> str:
    """The slot of the gates, which has no normalizer, but perhaps a shift, where none is filled."""
    return "norm_sum" if "norm_sum" in cell.slots else "norm_hh"


def _normalizes(cell: RecurrentCell, name: str) -> bool:
    slot: Slot | None = cell.slots.get(name)
    return slot is not None and slot.normalizes


def _is_batchwise(cell: RecurrentCell) -> bool:
    return cell.variant.norm == "batch" and any(_normalizes(cell, name) for name in cell.slots)


def _affine(params: Params, slot: str) -> dict[str, Any]:
    return {name: _contiguous(params.get(f"{slot}.{p}")) for name, p in (("gain", "weight"), ("shift", "bias"))}


_SEEN = ("seen_mean", "seen_variance", "seen_cell_mean", "seen_cell_variance")


def _prepare_statistics(cell: RecurrentCell, shape: _Shape, given: dict[str, Array], b: dict[str, Any], keep: bool) -> None:
    """Room for statistics, or the given ones, of the slots of the gates and of the cell state."""
    steps, batch, hidden, gates = shape
    u, batchwise = b["u"], _is_batchwise(cell)
    of_statistics = statistics_dtype(TYPES[u.dtype.name])
    for prefix, slot, width in (("", _place(cell), gates), ("cell_", "norm_c", 1)):
        if not _normalizes(cell, slot):
            continue
        if keep:
            rows = (steps, width * hidden) if batchwise else (steps, batch, width)
            b[f"{prefix}statistics"] = cupy.empty((*rows, 4), dtype=of_statistics)
        if batchwise and cell.training:
            room = (steps, width * hidden)
            b[f"seen_{prefix}mean"], b[f"seen_{prefix}variance"] = (cupy.empty(room, dtype=of_statistics) for _ in range(2))
        elif batchwise:
            b[f"{prefix}mean"], b[f"{prefix}variance"] = given[f"{slot}.mean"], given[f"{slot}.var"]


def _step(cell: RecurrentCell, shape: _Shape, b: dict[str, Any]) -> Any:
    """`struct Step`: addresses and numbers that are the same for all steps."""
    v, place = cell.variant, _place(cell)
    step = numpy.zeros((), dtype=STEP)
    for name in _ADDRESSES:
        step[name] = 0 if b.get(name) is None else b[name].data.ptr
    row = shape.batch * shape.hidden
    numbers = {
        "batch": shape.batch,
        "hidden": shape.hidden,
        "h_step": row if b["h"].shape[0] > 1 else 0,
        "c_step": row if "c" in b and b["c"].shape[0] > 1 else 0,
        "a_step": row * shape.gates if b["a"].shape[0] > 1 else 0,
        "kind": _KIND[v.norm],
        "place": _PLACE[place if _normalizes(cell, place) else None],
        "partition": _PARTITION[v.groups],
        "state": _STATE[v.cell],
        "relu": v.activation == "relu",
        "training": cell.training,
        "unbiased": v.variance == "running",
        "eps": float32_value(v.eps),
    }
    for name, number in numbers.items():
        step[name] = number
    return step


def _grid(cell: RecurrentCell, shape: _Shape, t: str) -> tuple[tuple[int, int], tuple[int, int], tuple[Any, ...]]:
    """(block, grid, template arguments)"""
    if _is_batchwise(cell):
        return (8, 32), (math.ceil(shape.hidden / 8), 1), (t, _CELLS[type(cell)])
    units = next(n for n in UNITS if shape.hidden <= n * THREADS)
    return (32 * math.ceil(shape.hidden / (32 * units)), 1), (shape.batch, 1), (t, _CELLS[type(cell)], units)


# -- cotangents of gain and shift --------------------------------------------------------------------------------------------------------


def _shares(cell: RecurrentCell, shape: _Shape, b: dict[str, Any]) -> Params:
    """Σ dn · x̂ and Σ dn over all steps and rows, for the slots of the gates and of the cell state."""
    steps, batch, hidden, gates = shape
    found: Params = {}
    state = b["raw"] if "raw" in b else b["c"][1:] if "c" in b else None
    places = (
        (_place(cell), gates, b["a"], b["dn"], b.get("statistics"), b.get("sums")),
        ("norm_c", 1, state, b.get("dnc"), b.get("cell_statistics"), b.get("cell_sums")),
    )
    for slot, width, x, d, statistics, sums in places:
        wanted = [name for name in cell.shared() if name.startswith(f"{slot}.")]
        if not wanted:
            continue
        made = {p: _empty(b["u"], width * hidden) if f"{slot}.{p}" in wanted else None for p in ("weight", "bias")}
        t = TYPES[b["u"].dtype.name]
        plan = Plan(t, t, steps * batch * width, hidden, width, 1, b["u"].dtype)
        if sums is None:
            sums = _sums_over_rows(plan, x, d, statistics)
        sum_parts(plan, sums, list(made.values()))
        found.update({f"{slot}.{p}": a for p, a in made.items() if a is not None})
    return {name: found[name] for name in cell.shared()}


def _sums_over_rows(plan: Plan, x: Array, d: Array, statistics: Array | None) -> Array:
    """Parts of Σ d · x̂ and Σ d for every feature. A slot that only shifts has no statistics: its x̂ is nothing that is used."""
    if statistics is None:
        statistics = cupy.zeros((plan.rows, 4), dtype=statistics_dtype(plan.t))
    return column_parts(plan, x, d, statistics)
