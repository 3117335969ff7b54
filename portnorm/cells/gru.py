"""The GRU step with its normalizer slots (Cho et al. 2014), with the reset gate after the hidden matrix product.

    u = N_ih(x Wᵀ) + b_ih,   a = N_hh(h Uᵀ) + b_hh
    r = σ(u_r + a_r),   z = σ(u_z + a_z)
    n = tanh(u_n + r ⊙ a_n)
    h' = (1 − z) ⊙ n + z ⊙ h

as torch, Keras with reset_after, ONNX with linear_before_reset, and Ba, Kiros & Hinton 2016 have it.
The gates are in the order of torch: r, z, n. Keras, haste and ONNX have z first. In Ba et al. and Kiros' code 1 − z stands for z here.
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
    hidden_n: Array  # a_n, the hidden term of the candidate
    normalized: dict[str, tuple[Any, ...]]


class GRUCell(RecurrentCell):
    """One GRU step."""

    gates = 3
    states = ("h",)
    hidden_bias = True
    takes = {"terms": ("separate",), "cell": (None,), "runtime_forget_bias": (0.0,)}  # noqa: RUF012

    def step(self, params: Params, state: State, x: tuple[Array, ...], active: Array | None) -> tuple[State, State, GRUResiduals]:
        (h,) = state
        xp = xp_of(h)
        norm = Slots(self.slots(), params, active, x[1:])
        u_r, u_z, u_n = split(x[0], self.gates)
        a_r, a_z, a_n = split(norm("norm_hh", xp.matmul(h, xp.matrix_transpose(params["weight_hh"]))), self.gates)
        r, z = sigmoid(u_r + a_r), sigmoid(u_z + a_z)
        n = xp.tanh(u_n + r * a_n)
        return (n + z * (h - n),), tuple(norm.statistics), GRUResiduals(h, r, z, n, a_n, norm.residuals)

    def step_vjp(
        self, params: Params, residuals: GRUResiduals, dstate: State, active: Array | None
    ) -> tuple[State, tuple[Array, ...], Params]:
        h, r, z, n, a_n, normalized = residuals
        (dh,) = dstate
        xp, norm_vjp = xp_of(h), SlotsVjp(self.slots(), normalized, active)
        dn = dh * (1.0 - z) * (1.0 - n * n)
        dr = dn * a_n * r * (1.0 - r)
        dz = dh * (h - n) * z * (1.0 - z)
        dhidden = norm_vjp("norm_hh", xp.concat((dr, dz, dn * r), axis=-1))
        before = dh * z + xp.matmul(dhidden, params["weight_hh"])
        return (before,), (xp.concat((dr, dz, dn), axis=-1), dhidden, h), norm_vjp.shares
