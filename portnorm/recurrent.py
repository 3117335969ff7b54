"""One direction of one recurrent layer: everything that is not inside the time loop, once for the whole sequence.

    u = N_ih(x W_ihᵀ) + b            one matrix product over all steps, and its normalization
    h, c = scan(cell, u)             the loop
    dW = Σ duᵀ·x,  dU = Σ daᵀ·h      one matrix product each over all steps, after the backward loop

where a = h W_hhᵀ is the hidden term.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from portnorm.affine import linear, weight_cotangent
from portnorm.arrays import Array, device_of, xp_of
from portnorm.cells.cell import RecurrentCell
from portnorm.cells.slots import NO_STATISTICS, Statistics
from portnorm.cells.variants import Variant
from portnorm.norm.weight import weight_norm
from portnorm.scan import Params, State, reverse_sequences, scan, sequence_mask
from portnorm.statistics import at_steps, update

Buffers = dict[str, Array]


class RecurrentResiduals(NamedTuple):
    """What the vjp of a direction needs."""

    params: Params  # with the weights themselves where they are normalized
    weights: dict[str, Any]  # residuals of weight normalization, by matrix
    x: Array  # (time, batch, inputs), in the order of the steps, 0 in the padding
    lengths: Array | None
    input_slot: tuple[Any, ...]  # residuals of norm_ih
    scan: Any


@dataclass(frozen=True)
class Direction:
    """One direction of a recurrent layer, as pure functions of its parameters, buffers and inputs."""

    cell: type[RecurrentCell]
    variant: Variant
    hidden_size: int
    reverse: bool = False
    sequences: bool = True
    momentum: float | None = 0.1

    def forward(
        self,
        params: Params,
        buffers: Buffers,
        x: Array,
        state: State,
        *,
        time: Array | None = None,
        lengths: Array | None = None,
        training: bool = False,
        keep: bool = True,
    ) -> tuple[Array, State, Buffers, RecurrentResiduals]:
        """`(y, state, buffers, residuals)` for `x` (time, batch, inputs).

        `y` is (time, batch, hidden), or (batch, hidden) of the last step without `sequences`. `time` counts the steps that came before
        this call (batch normalization only).
        """
        xp = xp_of(x)
        params, weights = _normalized_weights(params)
        batch, cell = self.variant.norm == "batch", self.cell(self.variant, training)
        mask = sequence_mask(x, lengths) if lengths is not None and (keep or (batch and training)) else None
        if mask is not None:
            x = xp.where(mask, x, 0.0)
        if self.reverse:
            x = reverse_sequences(x, lengths)
        given = at_steps(buffers, time, x) if batch and not training else {}
        u, input_residuals, seen = self._input_term(cell, params, x, mask, given.get("norm_ih", NO_STATISTICS))
        tracked = [name for name, slot in cell.slots().items() if slot.normalizes]
        rows = tuple(table for name in tracked for table in given.get(name, ()))
        (state, outputs), scanned = scan.forward(
            (u, *rows), state, self._loop_params(params), cell=cell, lengths=lengths, sequences=self.sequences, keep=keep
        )
        y, further = (outputs[0], outputs[1:]) if self.sequences else (state[0], outputs)
        if batch and training and x.shape[0] != 0:
            inside = dict(zip(tracked, zip(further[::2], further[1::2], strict=True), strict=True))
            buffers = update(buffers, inside | ({"norm_ih": seen} if seen else {}), time, lengths, self.momentum)
        if self.reverse and self.sequences:
            y = reverse_sequences(y, lengths)
        return y, state, buffers, RecurrentResiduals(params, weights, x, lengths, input_residuals, scanned)

    def vjp(self, residuals: RecurrentResiduals, dy: Array | None, dstate: State, *, training: bool = False) -> tuple[Array, State, Params]:
        """`(dx, dstate, dparams)` from the cotangents of `y` (or `None`) and of the last state."""
        params, weights, x, lengths, _, scanned = residuals
        cell = self.cell(self.variant, training)
        if not self.sequences and dy is not None:
            dy, dstate = None, (dstate[0] + dy, *dstate[1:])
        if self.reverse and dy is not None:
            dy = reverse_sequences(dy, lengths)
        (du, *hidden), dstate, shares = scan.vjp(scanned, (dstate, dy), cell=cell)
        dxw, outside = self._input_term_vjp(cell, residuals, du)
        rows = [weight_cotangent(d, h) for d, h in zip(hidden[::2], hidden[1::2], strict=True)]
        grads = {"weight_ih": weight_cotangent(dxw, x), **shares, **outside}
        grads["weight_hh"] = rows[0] if len(rows) == 1 else xp_of(x).concat(rows, axis=0)
        for slot, names in self._late_biases(params).items():
            grads.update(dict.fromkeys(names, grads.get(f"{slot}.bias")))
        dx = linear.vjp((x, params["weight_ih"], None), dxw)[0]
        if self.reverse:
            dx = reverse_sequences(dx, lengths)
        for name, kept in weights.items():
            grads[f"{name}.v"], grads[f"{name}.g"] = weight_norm.vjp(kept, grads.pop(name))
        return dx, dstate, {name: grads[name] for name in params if name not in weights}

    # -- the input term ------------------------------------------------------------------------------------------------------------

    def _input_term(
        self, cell: RecurrentCell, params: Params, x: Array, mask: Array | None, given: Statistics
    ) -> tuple[Array, tuple[Any, ...], tuple[Array, ...]]:
        """u (time, batch, gates · hidden) with its late biases, the residuals of `norm_ih`, and the batch's statistics in training."""
        slot, bias = cell.input_slot(), self._late_bias(params, "norm_ih")
        if slot is None:
            return linear(x, params["weight_ih"], bias), (), ()
        mean, var = (None if s is None else xp_of(s).expand_dims(s, axis=-2) for s in given)
        return slot({**params, "norm_ih.bias": bias}, "norm_ih", linear(x, params["weight_ih"]), mask, (mean, var))

    def _input_term_vjp(self, cell: RecurrentCell, residuals: RecurrentResiduals, du: Array) -> tuple[Array, Params]:
        """(cotangent of x·W_ihᵀ, cotangents of gain and shift of `norm_ih`)"""
        slot = cell.input_slot()
        if slot is None:
            return du, {"norm_ih.bias": xp_of(du).sum(du, axis=(0, 1))}
        mask = None if residuals.lengths is None else sequence_mask(residuals.x, residuals.lengths)
        dxw, cotangents = slot.vjp(residuals.input_slot, du, mask)
        return dxw, {f"norm_ih.{p}": d for p, d in cotangents.items()}

    # -- biases that are added after normalization -----------------------------------------------------------------------------------

    def _late_biases(self, params: Params) -> dict[str, tuple[str, ...]]:
        """By the slot whose shift their sum is: the parameters that are added after normalization."""
        names = tuple(n for n in (*self.variant.biases, "norm_ih.bias", "norm_hh.bias", "norm_sum.bias") if n in params)
        if "norm_sum.weight" in params:
            return {"norm_sum": names}
        stays = self.cell(self.variant).hidden_bias
        hidden = tuple(n for n in names if stays and n in ("bias_hh", "norm_hh.bias"))
        return {"norm_ih": tuple(n for n in names if n not in hidden), "norm_hh": hidden}

    def _late_bias(self, params: Params, slot: str) -> Array | None:
        """Their sum, with the constant that a variant adds to the forget gate."""
        names = self._late_biases(params).get(slot)
        if names is None:
            return None
        terms = [params[name] for name in names]
        if self.variant.runtime_forget_bias and slot != "norm_hh":
            terms.append(self._forget_bias(params["weight_hh"]))
        return sum(terms[1:], start=terms[0]) if terms else None

    def _forget_bias(self, weight: Array) -> Array:
        """(gates · hidden,): the constant in the slice of the forget gate, 0 elsewhere."""
        xp, place = xp_of(weight), {"dtype": weight.dtype, "device": device_of(weight)}
        zeros, ones = xp.zeros(self.hidden_size, **place), xp.full(self.hidden_size, self.variant.runtime_forget_bias, **place)
        return xp.concat([ones if k == self.cell.forget_gate else zeros for k in range(self.cell.gates)])

    def _loop_params(self, params: Params) -> Params:
        """What the cell reads in every step: the hidden weights, and gain and shift of each slot inside the loop."""
        loop = {"weight_hh": params["weight_hh"]}
        for name in self.cell(self.variant).shared():
            slot, _, kind = name.partition(".")
            if kind == "bias" and slot != "norm_c":
                late = self._late_bias(params, slot)
                loop[name] = xp_of(params["weight_hh"]).zeros_like(params["weight_hh"][:, 0]) if late is None else late
            else:
                loop[name] = params[name]
        return loop


def _normalized_weights(params: Params) -> tuple[Params, dict[str, Any]]:
    """Parameters with the matrix beside its direction `.v` and lengths `.g` where it is given by them, and the residuals of each."""
    found, residuals = dict(params), {}
    for name in ("weight_ih", "weight_hh"):
        if f"{name}.v" in params:
            found[name], residuals[name] = weight_norm.forward(params[f"{name}.v"], params[f"{name}.g"])
    return found, residuals
