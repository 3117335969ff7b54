"""The GRU step with its normalizer slots (Cho et al. 2014), with the reset gate after or before the candidate's matrix product.

    u = N_ih(x Wᵀ) + b
    r = σ(u_r + a_r),   z = σ(u_z + a_z),   h' = (1 − z) ⊙ n + z ⊙ h

    reset="after":   a = N_hh(h Uᵀ) + b_hh,                  n = tanh(u_n + r ⊙ a_n)
    reset="before":  a = N_hh(h U_gᵀ),  a_n = N_hn((r ⊙ h) U_nᵀ),   n = tanh(u_n + a_n)

"after" is what torch, Keras with reset_after, ONNX with linear_before_reset=1 and Ba, Kiros & Hinton 2016 have; "before" is the first
paper, Keras without reset_after, and ONNX with linear_before_reset=0. The gates are in the order of torch: r, z, n. Keras, haste and ONNX
have z first. In Ba et al. and Kiros' code 1 − z stands for z here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from portnorm.arrays import Array, xp_of
from portnorm.cells.cell import RecurrentCell
from portnorm.cells.slots import Slots, SlotsVjp
from portnorm.pointwise import sigmoid, split
from portnorm.scan import Params, State


class GRUResiduals(NamedTuple):
    """What the vjp of one step needs; arrays are (batch, hidden)."""

    h: Array  # before the step
    r: Array
    z: Array
    n: Array
    hidden: Array  # reset after: a_n, the hidden term of the candidate; before: r ⊙ h
    normalized: dict[str, tuple[Any, ...]]


class GRUCell(RecurrentCell):
    """One GRU step."""

    gates = 3
    states = ("h",)
    takes = {"terms": ("separate", "input"), "cell": (None,), "runtime_forget_bias": (0.0,)}  # noqa: RUF012

    @property
    def _before(self) -> bool:
        return self.variant.reset == "before"

    @property
    def hidden_bias(self) -> bool:
        return not self._before

    def width(self, slot: str) -> int:
        return 2 if slot == "norm_hh" and self._before else super().width(slot)

    def step(self, params: Params, state: State, x: tuple[Array, ...], active: Array | None) -> tuple[State, State, GRUResiduals]:
        (h,) = state
        xp = xp_of(h)
        norm = Slots(self.slots(), params, active, x[1:])
        u_r, u_z, u_n = split(x[0], self.gates)
        weights = xp.matrix_transpose(params["weight_hh"])
        if self._before:
            gates = 2 * h.shape[-1]
            a_r, a_z = split(norm("norm_hh", xp.matmul(h, weights[:, :gates])), 2)
            r, z = sigmoid(u_r + a_r), sigmoid(u_z + a_z)
            hidden = r * h
            n = xp.tanh(u_n + norm("norm_hn", xp.matmul(hidden, weights[:, gates:])))
        else:
            a_r, a_z, hidden = split(norm("norm_hh", xp.matmul(h, weights)), self.gates)
            r, z = sigmoid(u_r + a_r), sigmoid(u_z + a_z)
            n = xp.tanh(u_n + r * hidden)
        return (n + z * (h - n),), tuple(norm.statistics), GRUResiduals(h, r, z, n, hidden, norm.residuals)

    def step_vjp(
        self, params: Params, residuals: GRUResiduals, dstate: State, active: Array | None
    ) -> tuple[State, tuple[Array, ...], Params]:
        h, r, z, n, hidden, normalized = residuals
        (dh,) = dstate
        xp, norm_vjp, weights = xp_of(h), SlotsVjp(self.slots(), normalized, active), params["weight_hh"]
        dn = dh * (1.0 - z) * (1.0 - n * n)
        dz = dh * (h - n) * z * (1.0 - z)
        if self._before:
            gates = 2 * h.shape[-1]
            dcandidate = norm_vjp("norm_hn", dn)
            dreset = xp.matmul(dcandidate, weights[gates:, :])
            dr = dreset * h * r * (1.0 - r)
            dgates = norm_vjp("norm_hh", xp.concat((dr, dz), axis=-1))
            before = dh * z + dreset * r + xp.matmul(dgates, weights[:gates, :])
            terms: tuple[Array, ...] = (dgates, h, dcandidate, hidden)
        else:
            dr = dn * hidden * r * (1.0 - r)
            dhidden = norm_vjp("norm_hh", xp.concat((dr, dz, dn * r), axis=-1))
            before = dh * z + xp.matmul(dhidden, weights)
            terms = (dhidden, h)
        return (before,), (xp.concat((dr, dz, dn), axis=-1), *terms), norm_vjp.shares
