"""The LSTM step with its normalizer slots (Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000).

    (i, f, g, o) = split( N_ih(x Wᵀ) + N_hh(h Uᵀ) + b )        or  N_sum(x Wᵀ + h Uᵀ)
    c' = σ(f) ⊙ c + σ(i) ⊙ tanh(g)                             with cell="state":  c' = N_c(…)
    h' = σ(o) ⊙ tanh(c')                                       with cell="copy":   h' = σ(o) ⊙ tanh(N_c(c'))

The gates are in the order of torch: i, f, g, o. The input term, normalized or not, with all biases that are added after normalization,
comes into the step ready made (`x[0]`): it is computed for all steps at once (`portnorm/recurrent.py`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from portnorm.arrays import Array, xp_of
from portnorm.cells.cell import RecurrentCell
from portnorm.cells.slots import Slots, SlotsVjp
from portnorm.pointwise import sigmoid, split
from portnorm.scan import Params, State


class LSTMResiduals(NamedTuple):
    """What the vjp of one step needs; every array is (batch, hidden)."""

    h: Array  # before the step
    c: Array  # before the step
    gates: tuple[Array, Array, Array, Array]  # σ(i), σ(f), tanh(g), σ(o)
    tanh_c: Array
    normalized: dict[str, tuple[Any, ...]]  # residuals of the slots that are filled


class LSTMCell(RecurrentCell):
    """One LSTM step."""

    gates = 4
    forget_gate = 1
    states = ("h", "c")
    takes = {"reset": ("after",), "groups": ("all", "gate")}  # noqa: RUF012  # a table, never written to

    def step(self, params: Params, state: State, x: tuple[Array, ...], active: Array | None) -> tuple[State, State, LSTMResiduals]:
        h, c_before = state
        xp = xp_of(h)
        norm = Slots(self.slots(), params, active, x[1:])
        z = norm("norm_sum", x[0] + norm("norm_hh", xp.matmul(h, xp.matrix_transpose(params["weight_hh"]))))
        i, f, g, o = split(z, self.gates)
        i, f, g, o = sigmoid(i), sigmoid(f), xp.tanh(g), sigmoid(o)
        c = f * c_before + i * g
        c_normalized = norm("norm_c", c)
        tanh_c = xp.tanh(c_normalized)
        state = (o * tanh_c, c_normalized if self.variant.cell == "state" else c)
        return state, tuple(norm.statistics), LSTMResiduals(h, c_before, (i, f, g, o), tanh_c, norm.residuals)

    def step_vjp(
        self, params: Params, residuals: LSTMResiduals, dstate: State, active: Array | None
    ) -> tuple[State, tuple[Array, ...], Params]:
        h, c_before, (i, f, g, o), tanh_c, normalized = residuals
        dh, dc = dstate
        xp, norm_vjp = xp_of(h), SlotsVjp(self.slots(), normalized, active)
        do = dh * tanh_c * o * (1.0 - o)
        dtanh = dh * o * (1.0 - tanh_c * tanh_c)
        dc = norm_vjp("norm_c", dc + dtanh) if self.variant.cell == "state" else dc + norm_vjp("norm_c", dtanh)
        di = dc * g * i * (1.0 - i)
        df = dc * c_before * f * (1.0 - f)
        dg = dc * i * (1.0 - g * g)
        dx = norm_vjp("norm_sum", xp.concat((di, df, dg, do), axis=-1))
        dhidden = norm_vjp("norm_hh", dx)
        return (xp.matmul(dhidden, params["weight_hh"]), dc * f), (dx, dhidden, h), norm_vjp.shares
