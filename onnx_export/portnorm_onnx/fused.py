"""Plain cells as one operator: `scan` of a cell without normalizers, or with ones that fold away, is ONNX's LSTM, GRU or RNN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
from onnx import numpy_helper

from portnorm.cells.cell import RecurrentCell
from portnorm.cells.gru import GRUCell
from portnorm.cells.lstm import LSTMCell
from portnorm.cells.rnn import RNNCell
from portnorm.dtypes import float32_value
from portnorm.norm.normalize import standard_deviation
from portnorm.scan import sequence_mask
from portnorm_onnx.namespace import NAMESPACE
from portnorm_onnx.symbolic import NumPyArray, SymbolicArray, constant, nodes


@dataclass(frozen=True)
class Operator:
    """An ONNX operator, and where each of its gates is among ours."""

    name: str
    gates: tuple[int, ...]
    functions: slice
    """Which it has of a variant's functions: of the gates, of the candidate, of the cell state."""


OPERATORS: dict[type, Operator] = {
    LSTMCell: Operator("LSTM", (0, 3, 1, 2), slice(0, 3)),
    GRUCell: Operator("GRU", (1, 0, 2), slice(0, 2)),
    RNNCell: Operator("RNN", (0,), slice(1, 2)),
}
_FUNCTIONS: dict[str, tuple[str, dict[str, float]]] = {
    "sigmoid": ("Sigmoid", {}),
    "tanh": ("Tanh", {}),
    "relu": ("Relu", {}),
    "hard_sigmoid_5": ("HardSigmoid", {"alpha": 1 / 5, "beta": 0.5}),
    "hard_sigmoid_6": ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
}
"""Names in ONNX, and numbers."""
_USUAL = ("sigmoid", "tanh", "tanh")
_DTYPES = ("float16", "float32")
"""onnxruntime loads these operators in float64, and fails when they run."""


def _is_plain(cell: RecurrentCell, params: Any) -> bool:
    """Whether the step is the operator's, but for normalizers that may fold away."""
    v = cell.variant
    special = (
        v.zoneout or v.clip is not None or "weight_hr" in params or v.affine != "shared" or v.update != "keep" or v.recurrence != "matrix"
    )
    resets: tuple[str | None, ...] = ("after", "before") if type(cell) is GRUCell else (v.reset,)
    slots = {name for name, slot in cell.slots.items() if slot.normalizes}
    return not special and type(cell) in OPERATORS and v.reset in resets and slots <= ({"norm_hh"} if v.norm == "batch" else set())


def accepts(xs: Any, state: Any, params: Any, *, cell: Any, lengths: Any = None, sequences: bool = True, keep: bool = True) -> bool:
    """Whether the operator computes this: the input term is a known affine map of the input, and the hidden weights are known."""
    u = xs[0]
    if keep or u.opset is None or not u.opset.fold or not u.opset.target.fused or numpy.dtype(u.dtype).name not in _DTYPES:
        return False
    if u.affine is None or not isinstance(cell, RecurrentCell) or cell.quantize is not None or not _is_plain(cell, params):
        return False
    if type(cell) is GRUCell and cell.variant.reset == "before" and not u.opset.target.resets_before:
        return False
    if cell.variant.peepholes and not u.opset.target.peepholes:
        return False
    if OPERATORS[type(cell)].name in u.opset.target.without:
        return False
    if not u.opset.target.functions and not _has_usual_functions(cell):
        return False
    if lengths is not None and not u.opset.target.fused_lengths and u.opset.final_state and len(cell.states) > 1:
        return False
    return _hidden(xs, params, cell) is not None


def _has_usual_functions(cell: RecurrentCell) -> bool:
    """Whether the functions are the operator's own, or ReLU in the place of its only tanh."""
    functions = cell.variant.activations()
    return functions == _USUAL or (type(cell) is not LSTMCell and functions[:2] == ("sigmoid", "relu"))


def _hidden(xs: Any, params: Any, cell: RecurrentCell) -> tuple[NumPyArray, NumPyArray] | None:
    """(weights, bias) of the hidden term, statistics that are the same at every step folded in; `None` where they are not known."""
    given = dict(zip(cell.given(), xs[1:], strict=True))
    weight = params["weight_hh"].constant
    bias = numpy.zeros(weight.shape[0])
    if "bias_hh" in params:
        bias = bias + params["bias_hh"].constant
    slot = cell.slots.get("norm_hh")
    if slot is not None and slot.normalizes:
        mean, var = (_only_row(given[f"norm_hh.{s}"]) for s in ("mean", "var"))
        if mean is None or var is None or cell.width("norm_hh") != cell.gates:
            return None
        scale = 1.0 / standard_deviation(numpy, var, float32_value(cell.variant.eps), cell.variant.eps_place)
        if "norm_hh.weight" in params:
            scale = scale * params["norm_hh.weight"].constant
        weight, bias = weight.astype(numpy.float64) * scale[:, None], (bias - mean) * scale
    if "norm_hh.bias" in params:
        bias = bias + params["norm_hh.bias"].constant
    return weight, bias


def _only_row(table: SymbolicArray) -> NumPyArray | None:
    """The statistics, where every step has the same."""
    if table.rows_of is None or table.rows_of[0].dims[0] != 1:
        return None
    row: NumPyArray = table.rows_of[0].constant[0].astype(numpy.float64)
    return row


def fused(
    xs: Any, state: Any, params: Any, *, cell: Any, lengths: Any = None, sequences: bool = True, keep: bool = True
) -> tuple[tuple[SymbolicArray, ...], tuple[SymbolicArray, ...]]:
    """`portnorm.scan.scan` as one node. Where `sequence_lens` is not safe, the padding is masked, and h is taken at each sequence's end."""
    u, operator = xs[0], OPERATORS[type(cell)]
    weights = _hidden(xs, params, cell)
    assert weights is not None
    hidden, x = weights[0].shape[1], u.affine.x
    dtype, count = u.dtype, len(operator.gates)

    def ordered(values: NumPyArray) -> NumPyArray:
        return values.reshape(count, hidden, -1)[list(operator.gates)].reshape(count * hidden, *values.shape[1:])

    slot = cell.slots.get("norm_hh")
    changed = ".folded" if slot is not None and slot.normalizes else ""
    w, r = (
        constant(ordered(m.astype(dtype, copy=False))[None], f"{name}.gates")
        for m, name in ((u.affine.matrix(dtype).T, u.affine.name.replace(".T", "")), (weights[0], f"{params['weight_hh'].name}{changed}"))
    )
    b = constant(numpy.concatenate([ordered(u.affine.shift), ordered(weights[1])])[None].astype(dtype))
    by_operator = lengths is not None and u.opset.target.fused_lengths
    xp = NAMESPACE
    initial = [None if u.opset.target.fused_start and _is_zero(s) else xp.expand_dims(s, axis=0) for s in state]
    inputs = [x, w, r, b, xp.astype(lengths, "int32") if by_operator else None, *initial]
    attributes: dict[str, Any] = {"hidden_size": hidden}
    if operator.name == "GRU":
        attributes["linear_before_reset"] = int(cell.variant.reset == "after")
    if cell.variant.activations() != _USUAL:
        named, numbers = zip(*(_FUNCTIONS[f] for f in cell.variant.activations()[operator.functions]), strict=True)
        attributes["activations"] = list(named)
        attributes |= {f"activation_{k}": [n[k] for n in numbers if n] for k in ("alpha", "beta") if any(numbers)}
    if cell.variant.peepholes:
        i, f, o = params["peephole"].constant
        inputs.append(constant(numpy.concatenate([i, o, f])[None].astype(dtype)))
    y, *last = nodes(operator.name, 1 + len(state), *inputs, **attributes)
    every, *ends = xp.squeeze(y, axis=1), *(xp.squeeze(s, axis=0) for s in last)
    if lengths is not None and not by_operator:
        ends, every = [_at_end(every, state[0], lengths)], xp.where(sequence_mask(every, lengths), every, 0.0)
    else:  # runtimes give 0, or anything, for the last state of a sequence without steps
        some = xp.expand_dims(lengths > 0, axis=1) if by_operator else _has_steps(x)
        ends = ends if some is None else [xp.where(some, e, s) for e, s in zip(ends, state, strict=True)]
    return tuple(ends), (every,) if sequences else ()


def _at_end(every: SymbolicArray, before: SymbolicArray, lengths: SymbolicArray) -> SymbolicArray:
    """h (batch, hidden) after each sequence's last step, of those after every step; of a sequence without steps, that before."""
    xp = NAMESPACE
    states = xp.concat([xp.expand_dims(before, axis=0), every], axis=0)
    index = xp.broadcast_to(lengths[None, :, None], (1, *every.shape[1:]))
    ends: SymbolicArray = xp.squeeze(xp.take_along_axis(states, index, axis=0), axis=0)
    return ends


def _has_steps(x: SymbolicArray) -> SymbolicArray | None:
    """Whether there are any steps, (1,); `None` where it is known that there are."""
    steps = x.shape[0]
    if isinstance(steps, int):
        return None
    some: SymbolicArray = NAMESPACE.expand_dims(steps.number(), axis=0) > 0
    return some


def _is_zero(state: SymbolicArray) -> bool:
    """Whether a state is the one that the operator starts from by itself."""
    if state.constant is not None:
        return not state.constant.any()
    made = state.producer
    if made is None or made.op_type != "ConstantOfShape":
        return False
    return not numpy_helper.to_array(made.attributes["value"]).any()


fused.accepts = accepts  # type: ignore[attr-defined]
