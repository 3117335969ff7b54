"""The LSTM step with its normalizer slots (Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000).

    (i, f, g, o) = split( N_ih(x Wᵀ) + N_hh(h Uᵀ) + b )        or  N_sum(x Wᵀ + h Uᵀ)
    c' = σ(f) ⊙ c + σ(i) ⊙ tanh(g)                             with cell="state":  c' = N_c(…)
    h' = σ(o) ⊙ tanh(c')                                       with cell="copy":   h' = σ(o) ⊙ tanh(N_c(c'))

A variant may put other functions in the place of σ, of tanh(g) and of tanh(c'). With peepholes p (Gers & Schmidhuber 2000) i and f have p_i
⊙ c and p_f ⊙ c added after normalization, and o has p_o ⊙ c'. With `clip` c' is kept within its bounds before anything reads it. With a
projection (Sak et al. 2014) h' is multiplied by W_hrᵀ. The gates are in the order of torch: i, f, g, o. The input term, normalized or not,
with all biases that are added after normalization, comes into the step ready made (`x[0]`): it is computed for all steps at once
(`portnorm/recurrent.py`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from portnorm.arrays import Array, xp_of
from portnorm.cells.cell import RecurrentCell
from portnorm.cells.slots import SlotsVjp
from portnorm.pointwise import split
from portnorm.scan import Params, State
from portnorm.sums import total_like


class LSTMResiduals(NamedTuple):
    """What the vjp of one step needs; every array is (batch, hidden)."""

    h: Array  # before the step, as the matrix product sees it
    c: Array  # before the step
    gates: tuple[Array, Array, Array, Array]  # σ(i), σ(f), tanh(g), σ(o)
    after: Array | None  # c after the step, where peepholes or clipping need it
    tanh_c: Array  # or what stands in tanh's place
    unprojected: Array | None  # σ(o) ⊙ tanh(…) where it is projected
    normalized: dict[str, tuple[Any, ...]]  # residuals of the slots that are filled
    moves: Array | None  # where zoneout lets h take its new value, if that was drawn


class LSTMCell(RecurrentCell):
    """One LSTM step."""

    gates = 4
    forget_gate = 1
    projects = True
    candidate = 2
    states = ("h", "c")
    takes = {  # noqa: RUF012  # a table, never written to
        "reset": ("after",),
        "update": ("keep",),
        "recurrence": ("matrix",),
        "groups": ("all", "gate"),
    }

    def extra(self) -> tuple[str, ...]:
        return ("peephole",) if self.variant.peepholes else ()

    def step(self, params: Params, state: State, x: tuple[Array, ...], active: Array | None) -> tuple[State, State, LSTMResiduals]:
        h, c_before = state
        v, xp, norm, moves = self.variant, xp_of(h), self.normalizers(params, x, active), self.moves(x)
        opened, candidate, seen = self.functions
        masked = self.dropped(params, h)
        z = norm("norm_sum", x[0] + norm("norm_hh", self.hidden_term(params, masked)))
        i, f, g, o = split(z, self.gates)
        if v.peepholes:
            i, f = i + params["peephole"][0, :] * c_before, f + params["peephole"][1, :] * c_before
        i, f, g = opened.of(i), opened.of(f), candidate.of(g)
        c = f * c_before + i * g
        if v.cell == "state":
            c = norm("norm_c", c)
        unclipped = c
        if v.clip is not None:
            c = xp.clip(c, -v.clip, v.clip)
        o = opened.of(o + params["peephole"][2, :] * c if v.peepholes else o)
        tanh_c = seen.of(norm("norm_c", c) if v.cell == "copy" else c)
        after = unclipped if v.peepholes or v.clip is not None else None
        y, unprojected = o * tanh_c, None
        if "weight_hr" in params:
            y, unprojected = self.product({}, y, params["weight_hr"]), y
        residuals = LSTMResiduals(masked, c_before, (i, f, g, o), after, tanh_c, unprojected, norm.residuals, moves)
        return (self.stays(h, y, moves), c), tuple(norm.statistics), residuals

    def step_vjp(
        self, params: Params, residuals: LSTMResiduals, dstate: State, active: Array | None
    ) -> tuple[State, tuple[Array, ...], Params]:
        h, c_before, (i, f, g, o), after, tanh_c, unprojected, normalized, moves = residuals
        v, xp, norm_vjp = self.variant, xp_of(h), SlotsVjp(self.slots, normalized, active)
        opened, candidate, seen = self.functions
        dh, dc = dstate
        dstays, dh = self.stays_vjp(dh, moves)
        projected: tuple[Array, ...] = ()
        if unprojected is not None:
            projected, dh = (dh, self.factor({}, unprojected)), xp.matmul(dh, params["weight_hr"])
        do = opened.vjp(o, dh * tanh_c)
        dtanh = seen.vjp(tanh_c, dh * o)
        dc = dc + (norm_vjp("norm_c", dtanh) if v.cell == "copy" else dtanh)
        if v.peepholes:
            c = after if v.clip is None else xp.clip(after, -v.clip, v.clip)
            dc = dc + params["peephole"][2, :] * do
        if v.clip is not None:
            dc = xp.where(xp.abs(after) <= v.clip, dc, 0.0)
        if v.cell == "state":
            dc = norm_vjp("norm_c", dc)
        di = opened.vjp(i, dc * g)
        df = opened.vjp(f, dc * c_before)
        dg = candidate.vjp(g, dc * i)
        dc = dc * f
        if v.peepholes:
            dc = dc + params["peephole"][0, :] * di + params["peephole"][1, :] * df
            read = ((di, c_before), (df, c_before), (do, c))
            norm_vjp.shares["peephole"] = xp.stack([total_like(d * state, (0,)) for d, state in read])
        dx = norm_vjp("norm_sum", xp.concat((di, df, dg, do), axis=-1))
        dhidden = norm_vjp("norm_hh", dx)
        by_step = tuple(norm_vjp.shares[name] for name in self.stepwise())
        dbefore = self.dropped(params, xp.matmul(dhidden, params["weight_hh"]))
        return (dbefore + dstays, dc), (dx, dhidden, self.factor(params, h), *projected, *by_step), norm_vjp.shares
