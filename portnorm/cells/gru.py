"""The GRU step with its normalizer slots (Cho et al. 2014), in every place where the reset gate has been put.

    u = N_ih(x Wᵀ) + b
    r = σ(u_r + a_r),   z = σ(u_z + a_z),   h' = (1 − z) ⊙ n + z ⊙ h

    reset="after":   a = N_hh(h Uᵀ) + b_hh,                         n = φ(u_n + r ⊙ a_n)
    reset="before":  a = N_hh(h U_gᵀ),  a_n = N_hn((r ⊙ h) U_nᵀ),   n = φ(u_n + a_n)
    reset="sum":     a = N_hh(h Uᵀ),                                n = φ(r ⊙ (u_n + a_n))
    reset=None:      no r,                                          n = φ(u_n + a_n)

With one normalizer on each sum, (r, z) = σ(N_sum(u + a)) and n = φ(N_n(…)) with what φ has in its brackets above; with reset="sum" and None
N_sum has the candidate too. The variant may put another function in the place of φ, which is tanh, and of σ. With
update="replace" z and 1 − z change places in h'.

"after" is what torch, Keras with reset_after, ONNX with linear_before_reset=1 and Ba, Kiros & Hinton 2016 have; "before" is the first
paper, Keras without reset_after, and ONNX with linear_before_reset=0; "sum" is Dreamer's, and `None` is Li-GRU (Ravanelli et al. 2018).
The gates are in the order of torch: r, z, n. Keras, haste and ONNX have z first. In Ba et al. 2016, and with update="replace", z is what
the candidate replaces. With recurrent dropout h ⊙ m stands for h wherever it is multiplied with U, and h itself is carried by z.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from portnorm.arrays import Array, xp_of
from portnorm.cells.cell import RecurrentCell
from portnorm.cells.slots import SlotsVjp
from portnorm.pointwise import split
from portnorm.scan import Params, State


class GRUResiduals(NamedTuple):
    """What the vjp of one step needs; arrays are (batch, hidden)."""

    h: Array  # before the step
    r: Any  # None where there is no reset gate
    z: Array
    n: Array
    reset: Array  # what r is multiplied with; before the product, r ⊙ h with the h that the product sees
    normalized: dict[str, tuple[Any, ...]]
    moves: Array | None  # where zoneout lets h take its new value, if that was drawn


class GRUCell(RecurrentCell):
    """One GRU step."""

    states = ("h",)
    takes = {  # noqa: RUF012  # a table, never written to
        "cell": (None,),
        "runtime_forget_bias": (0.0,),
        "output_activation": (None,),
        "peepholes": (False,),
        "clip": (None,),
        "recurrence": ("matrix",),
    }

    @property
    def gates(self) -> int:
        return 2 if self.variant.reset is None else 3

    @property
    def candidate(self) -> int:  # type: ignore[override]
        return self.gates - 1

    @property
    def hidden_apart(self) -> bool:
        return self.variant.reset == "after"

    @property
    def keeps_hidden_bias(self) -> bool:
        return self.hidden_apart and not self._candidate_apart

    @property
    def _candidate_apart(self) -> bool:
        """Whether the candidate's sum has a normalizer of its own."""
        return "norm_sum" in self.variant.gate_slots() and self.variant.reset in ("after", "before")

    def names(self) -> tuple[str, ...]:
        return (*super().names(), "norm_n") if self._candidate_apart else super().names()

    def width(self, slot: str) -> int:
        if slot in ("norm_hn", "norm_n"):
            return 1
        short = (slot == "norm_hh" and self.variant.reset == "before") or (slot == "norm_sum" and self._candidate_apart)
        return self.gates - 1 if short else self.gates

    def shifts(self, slot: str) -> bool:
        return slot != "norm_hn" and super().shifts(slot)

    def _late_biases(self) -> dict[str, tuple[str, ...]]:
        if not self._candidate_apart:
            return super()._late_biases()
        slots = ("norm_sum", "norm_n")
        return {slot: (*self.variant.biases, *((f"{slot}.bias",) if self.shifts(slot) else ())) for slot in slots}

    def portion(self, slot: str) -> tuple[int, int]:
        if not self._candidate_apart:
            return super().portion(slot)
        return (2, 3) if slot == "norm_n" else (0, 2)

    def step(self, params: Params, state: State, x: tuple[Array, ...], active: Array | None) -> tuple[State, State, GRUResiduals]:
        (h,) = state
        v, norm, masked, moves = self.variant, self.normalizers(params, x, active), self.dropped(params, h), self.moves(x)
        parts, width = (self.gates - 1, 1), (self.gates - 1) * h.shape[-1]
        if v.reset in ("sum", None):
            gates, p = split(norm("norm_sum", x[0] + norm("norm_hh", self.hidden_term(params, masked))), parts)
            r, z = self._opened(gates)
            reset, p = p, p if r is None else r * p
        else:
            u, u_n = split(x[0], parts)
            if v.reset == "before":
                r, z = self._opened(norm("norm_sum", u + norm("norm_hh", self.hidden_term(params, masked, 0, width))))
                reset = r * masked
                p = u_n + norm("norm_hn", self.hidden_term(params, reset, width))
            else:
                a, reset = split(norm("norm_hh", self.hidden_term(params, masked)), parts)
                r, z = self._opened(norm("norm_sum", u + a))
                p = u_n + r * reset
            p = norm("norm_n", p)
        n = self.functions[1].of(p)
        kept, replaced = (h, n) if v.update == "keep" else (n, h)  # by z, by 1 − z
        residuals = GRUResiduals(h, r, z, n, reset, norm.residuals, moves)
        return (self.stays(h, replaced + z * (kept - replaced), moves),), tuple(norm.statistics), residuals

    def _opened(self, gates: Array) -> tuple[Any, Array]:
        """(r or `None`, z) from what goes into the sigmoid."""
        opened = self.functions[0].of(gates)
        return (None, opened) if self.variant.reset is None else split(opened, 2)

    def step_vjp(
        self, params: Params, residuals: GRUResiduals, dstate: State, active: Array | None
    ) -> tuple[State, tuple[Array, ...], Params]:
        h, r, z, n, reset, normalized, moves = residuals
        v, xp, norm_vjp, weights = self.variant, xp_of(h), SlotsVjp(self.slots, normalized, active), params["weight_hh"]
        width, (opened, candidate, _) = (self.gates - 1) * h.shape[-1], self.functions
        masked = self.dropped(params, h)
        dstays, dh = self.stays_vjp(dstate[0], moves)
        kept, replaced = (z, 1.0 - z) if v.update == "keep" else (1.0 - z, z)  # of h, of n
        before = dh * kept + dstays
        terms: tuple[Array, ...] = ()
        dp = candidate.vjp(n, dh * replaced)
        dz = opened.vjp(z, dh * ((h - n) if v.update == "keep" else (n - h)))
        if v.reset in ("sum", None):
            gates = dz if r is None else xp.concat((opened.vjp(r, dp * reset), dz), axis=-1)
            dx = norm_vjp("norm_sum", xp.concat((gates, dp if r is None else dp * r), axis=-1))
            dhidden = norm_vjp("norm_hh", dx)
        else:
            dp = norm_vjp("norm_n", dp)
            if v.reset == "before":
                dcandidate = norm_vjp("norm_hn", dp)
                dreset = xp.matmul(dcandidate, weights[width:, :])
                before, dr, terms = before + self.dropped(params, dreset * r), dreset * masked, (dcandidate, self.factor(params, reset))
            else:
                dr = dp * reset
            gates = norm_vjp("norm_sum", xp.concat((opened.vjp(r, dr), dz), axis=-1))
            dx = xp.concat((gates, dp), axis=-1)
            dhidden = norm_vjp("norm_hh", gates if v.reset == "before" else xp.concat((gates, dp * r), axis=-1))
            weights = weights[:width, :] if v.reset == "before" else weights
        before = before + self.dropped(params, xp.matmul(dhidden, weights))
        by_step = tuple(norm_vjp.shares[name] for name in self.stepwise())
        return (before,), (dx, dhidden, self.factor(params, masked), *terms, *by_step), norm_vjp.shares
