"""The simple recurrent step with its normalizer slots (Elman 1990).

h' = tanh( N_ih(x Wᵀ) + N_hh(h Uᵀ) + b )        or  tanh( N_sum(x Wᵀ + h Uᵀ) )   (Ba, Kiros & Hinton 2016, equation 4)
"""

from __future__ import annotations

from typing import Any, NamedTuple

from portnorm.arrays import Array, xp_of
from portnorm.cells.cell import RecurrentCell
from portnorm.cells.slots import Slots, SlotsVjp
from portnorm.scan import Params, State


class RNNResiduals(NamedTuple):
    """What the vjp of one step needs; arrays are (batch, hidden)."""

    before: Array  # h before the step
    after: Array  # h after it
    normalized: dict[str, tuple[Any, ...]]


class RNNCell(RecurrentCell):
    """One step of a tanh RNN."""

    gates = 1
    states = ("h",)
    takes = {"reset": ("after",), "groups": ("all",), "cell": (None,), "runtime_forget_bias": (0.0,)}  # noqa: RUF012

    def step(self, params: Params, state: State, x: tuple[Array, ...], active: Array | None) -> tuple[State, State, RNNResiduals]:
        (before,) = state
        xp = xp_of(before)
        norm = Slots(self.slots(), params, active, x[1:])
        after = xp.tanh(norm("norm_sum", x[0] + norm("norm_hh", xp.matmul(before, xp.matrix_transpose(params["weight_hh"])))))
        return (after,), tuple(norm.statistics), RNNResiduals(before, after, norm.residuals)

    def step_vjp(
        self, params: Params, residuals: RNNResiduals, dstate: State, active: Array | None
    ) -> tuple[State, tuple[Array, ...], Params]:
        before, after, normalized = residuals
        xp, norm_vjp = xp_of(before), SlotsVjp(self.slots(), normalized, active)
        dx = norm_vjp("norm_sum", dstate[0] * (1.0 - after * after))
        dhidden = norm_vjp("norm_hh", dx)
        return (xp.matmul(dhidden, params["weight_hh"]),), (dx, dhidden, before), norm_vjp.shares
