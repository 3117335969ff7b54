"""The LSTM step with its normalizer slots (Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000).

    (i, f, g, o) = split( N_ih(x Wᵀ) + N_hh(h Uᵀ) + b )        or  N_sum(x Wᵀ + h Uᵀ)
    c' = σ(f) ⊙ c + σ(i) ⊙ tanh(g)                             with cell="state":  c' = N_c(…)
    h' = σ(o) ⊙ tanh(c')                                       with cell="copy":   h' = σ(o) ⊙ tanh(N_c(c'))

The gates are in the order of torch: i, f, g, o. The input term, normalized or not, with all biases that are added after normalization,
comes into the step ready made (`x[0]`): it is computed for all steps at once (`portnorm/recurrent.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from portnorm.arrays import Array, xp_of
from portnorm.cells.slots import NO_STATISTICS, Slot
from portnorm.cells.variants import Variant
from portnorm.norm.normalize import Normalized
from portnorm.pointwise import sigmoid, split
from portnorm.scan import Params, State


class LSTMResiduals(NamedTuple):
    """What the vjp of one step needs; every array is (batch, hidden)."""

    h: Array  # before the step
    c: Array  # before the step
    gates: tuple[Array, Array, Array, Array]  # σ(i), σ(f), tanh(g), σ(o)
    tanh_c: Array
    normalized: dict[str, Normalized]  # residuals of the slots that are filled


@dataclass(frozen=True)
class LSTMCell:
    """One LSTM step for `portnorm.scan`, its variant fixed; a batch-norm slot takes the batch's statistics when `training`."""

    variant: Variant
    training: bool = False

    gates: ClassVar[int] = 4
    forget_gate: ClassVar[int] = 1
    states: ClassVar[tuple[str, ...]] = ("h", "c")

    def slots(self) -> dict[str, Slot]:
        """The normalizers inside the time loop, by the name of their slot; the bias of `norm_hh` is added with the input term."""
        v = self.variant
        gates = {name: Slot(v, self.gates if v.per_gate else 1, self.training, shift=name == "norm_sum") for name in v.gate_slots()}
        cell = {"norm_c": Slot(v, 1, self.training)} if v.cell is not None else {}
        return {name: slot for name, slot in (gates | cell).items() if name != "norm_ih"}

    def shared(self) -> tuple[str, ...]:
        return tuple(f"{name}.{p}" for name, slot in self.slots().items() for p in slot.parameters())

    def step(self, params: Params, state: State, x: tuple[Array, ...], active: Array | None) -> tuple[State, State, LSTMResiduals]:
        """`x` is the input term (batch, 4·hidden), then per batch-norm slot its mean and variance unless training."""
        h, c_before = state
        xp = xp_of(h)
        slots, normalized = self.slots(), {}
        further: list[Array] = []
        given = dict(zip(slots, zip(x[1::2], x[2::2], strict=True), strict=False))

        def norm(name: str, z: Array) -> Array:
            if name not in slots:
                return z
            y, normalized[name], statistics = slots[name](params, name, z, active, given.get(name, NO_STATISTICS))
            further.extend(statistics)
            return y

        z = norm("norm_sum", x[0] + norm("norm_hh", xp.matmul(h, xp.matrix_transpose(params["weight_hh"]))))
        i, f, g, o = split(z, self.gates)
        i, f, g, o = sigmoid(i), sigmoid(f), xp.tanh(g), sigmoid(o)
        c = f * c_before + i * g
        c_normalized = norm("norm_c", c)
        tanh_c = xp.tanh(c_normalized)
        state = (o * tanh_c, c_normalized if self.variant.cell == "state" else c)
        return state, tuple(further), LSTMResiduals(h, c_before, (i, f, g, o), tanh_c, normalized)

    def step_vjp(
        self, params: Params, residuals: LSTMResiduals, dstate: State, active: Array | None
    ) -> tuple[State, tuple[Array, ...], Params]:
        """Stacked over time: cotangent of the input term; of hUᵀ; and h before the step (the last two make the gradient of U)."""
        h, c_before, (i, f, g, o), tanh_c, normalized = residuals
        dh, dc = dstate
        xp, slots, shares = xp_of(h), self.slots(), {}

        def norm_vjp(name: str, dy: Array) -> Array:
            if name not in slots:
                return dy
            dz, cotangents = slots[name].vjp(normalized[name], dy, active)
            shares.update({f"{name}.{p}": d for p, d in cotangents.items()})
            return dz

        do = dh * tanh_c * o * (1.0 - o)
        dtanh = dh * o * (1.0 - tanh_c * tanh_c)
        dc = norm_vjp("norm_c", dc + dtanh) if self.variant.cell == "state" else dc + norm_vjp("norm_c", dtanh)
        di = dc * g * i * (1.0 - i)
        df = dc * c_before * f * (1.0 - f)
        dg = dc * i * (1.0 - g * g)
        dx = norm_vjp("norm_sum", xp.concat((di, df, dg, do), axis=-1))
        dhidden = norm_vjp("norm_hh", dx)
        return (xp.matmul(dhidden, params["weight_hh"]), dc * f), (dx, dhidden, h), shares
