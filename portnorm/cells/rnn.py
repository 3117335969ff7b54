"""The simple recurrent step with its normalizer slots (Elman 1990).

h' = φ( N_ih(x Wᵀ) + N_hh(h Uᵀ) + b )        or  φ( N_sum(x Wᵀ + h Uᵀ) )   (Ba, Kiros & Hinton 2016, equation 4)

φ is tanh, or another function by the variant. With recurrence="diagonal" h ⊙ u stands for h Uᵀ (Li et al. 2018, IndRNN).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from portnorm.arrays import Array, xp_of
from portnorm.cells.cell import RecurrentCell
from portnorm.cells.slots import SlotsVjp
from portnorm.cells.variants import Variant
from portnorm.scan import Params, State


class RNNResiduals(NamedTuple):
    """What the vjp of one step needs; arrays are (batch, hidden)."""

    before: Array  # h before the step, as the matrix product sees it
    y: Array  # φ(…)
    normalized: dict[str, tuple[Any, ...]]
    moves: Array | None  # where zoneout lets h take its new value, if that was drawn


class RNNCell(RecurrentCell):
    """One step of a simple recurrent network."""

    gates = 1
    candidate = 0
    states = ("h",)
    takes = {  # noqa: RUF012  # a table, never written to
        "reset": ("after",),
        "update": ("keep",),
        "groups": ("all",),
        "cell": (None,),
        "runtime_forget_bias": (0.0,),
        "gate_activation": ("sigmoid",),
        "output_activation": (None,),
        "peepholes": (False,),
        "clip": (None,),
    }

    @classmethod
    def bounds_h(cls, variant: Variant) -> bool:
        """Nothing is carried beside the product, and an integer cannot say that h is no number: the largest of a row can."""
        return False

    def step(self, params: Params, state: State, x: tuple[Array, ...], active: Array | None) -> tuple[State, State, RNNResiduals]:
        (before,) = state
        norm, masked, moves = self.normalizers(params, x, active), self.dropped(params, before), self.moves(x)
        z = norm("norm_sum", x[0] + norm("norm_hh", self.hidden_term(params, masked)))
        y = self.functions[1].of(z)
        return (self.stays(before, y, moves),), tuple(norm.statistics), RNNResiduals(masked, y, norm.residuals, moves)

    def step_vjp(
        self, params: Params, residuals: RNNResiduals, dstate: State, active: Array | None
    ) -> tuple[State, tuple[Array, ...], Params]:
        before, y, normalized, moves = residuals
        xp, norm_vjp = xp_of(before), SlotsVjp(self.slots, normalized, active)
        dstays, dh = self.stays_vjp(dstate[0], moves)
        dx = norm_vjp("norm_sum", self.functions[1].vjp(y, dh))
        dhidden = norm_vjp("norm_hh", dx)
        by_step = tuple(norm_vjp.shares[name] for name in self.stepwise())
        if self.variant.recurrence == "diagonal":
            dbefore = dhidden * xp.matrix_transpose(params["weight_hh"])
        else:
            dbefore = xp.matmul(dhidden, params["weight_hh"])
        return (self.dropped(params, dbefore) + dstays,), (dx, dhidden, self.factor(params, before), *by_step), norm_vjp.shares
