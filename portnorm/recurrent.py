"""One direction of one recurrent layer: everything that is not inside the time loop, once for the whole sequence.

    u = N_ih(x W_ihᵀ) + b            one matrix product over all steps, and its normalization
    h, c = scan(cell, u)             the loop
    dW = Σ duᵀ·x,  dU = Σ daᵀ·h      one matrix product each over all steps, after the backward loop

where a = h W_hhᵀ is the hidden term.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from portnorm.arrays import Array, Namespace, device_of, xp_of
from portnorm.cells.lstm import LSTMCell
from portnorm.cells.variants import Variant
from portnorm.linear import linear, weight_cotangent
from portnorm.norm.normalize import Axes, Normalized, normalize
from portnorm.scan import Params, State, reverse_sequences, scan, sequence_mask
from portnorm.statistics import at_steps, update

Buffers = dict[str, Array]


class RecurrentResiduals(NamedTuple):
    """What the vjp of a direction needs."""

    params: Params
    x: Array  # (time, batch, inputs), in the order of the steps, 0 in the padding
    lengths: Array | None
    normalized: Normalized | None  # of norm_ih
    scan: Any


@dataclass(frozen=True)
class Direction:
    """One direction of a recurrent layer, as pure functions of its parameters, buffers and inputs."""

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
        """`(y, state, buffers, residuals)` for `x` (time, batch, inputs); `y` is (time, batch, hidden), or (batch, hidden) of the
        last step without `sequences`. `time` counts the steps that came before this call (batch normalization only)."""
        xp = xp_of(x)
        batch = self.variant.norm == "batch"
        cell = LSTMCell(self.variant, training)
        mask = sequence_mask(x, lengths) if lengths is not None and (keep or (batch and training)) else None
        if mask is not None:
            x = xp.where(mask, x, 0.0)
        if self.reverse:
            x = reverse_sequences(x, lengths)
        given = at_steps(buffers, time, x) if batch and not training else {}
        u, normalized = self._input_term(params, x, mask if training else None, given.get("norm_ih"))
        rows = tuple(table for slot in cell.slots() for table in given.get(slot, ()))
        (state, outputs), scanned = scan.forward(
            (u, *rows), state, self._loop_params(params), cell=cell, lengths=lengths, sequences=self.sequences, keep=keep
        )
        y, further = (outputs[0], outputs[1:]) if self.sequences else (state[0], outputs)
        if batch and training:
            seen = {"norm_ih": tuple(s[:, 0, :] for s in normalized.statistics())} if normalized is not None else {}
            seen.update(zip(cell.slots(), zip(further[::2], further[1::2], strict=True), strict=True))
            buffers = update(buffers, seen, time, lengths, self.momentum)
        if self.reverse and self.sequences:
            y = reverse_sequences(y, lengths)
        return y, state, buffers, RecurrentResiduals(params, x, lengths, normalized, scanned)

    def vjp(self, residuals: RecurrentResiduals, dy: Array | None, dstate: State, *, training: bool = False) -> tuple[Array, State, Params]:
        """`(dx, dstate, dparams)` from the cotangents of `y` (or `None`) and of the last state."""
        params, x, lengths, normalized, scanned = residuals
        if not self.sequences and dy is not None:
            dy, dstate = None, (dstate[0] + dy, *dstate[1:])
        if self.reverse and dy is not None:
            dy = reverse_sequences(dy, lengths)
        (du, dhidden, h), dstate, shares = scan.vjp(scanned, (dstate, dy), cell=LSTMCell(self.variant, training))
        grads = {"weight_hh": weight_cotangent(dhidden, h), **shares}
        dx, input_grads = self._input_term_vjp(params, x, lengths, normalized, du, grads, training)
        grads.update(input_grads)
        if self.reverse:
            dx = reverse_sequences(dx, lengths)
        return dx, dstate, {name: grads[name] for name in params}

    def _input_term(
        self, params: Params, x: Array, mask: Array | None, given: tuple[Array, Array] | None
    ) -> tuple[Array, Normalized | None]:
        """u (time, batch, gates · hidden), with every bias that is added after normalization, and the residuals of `norm_ih`."""
        if "norm_ih.weight" not in params:
            bias = None if "norm_sum.weight" in params else self._late_bias(params)
            return linear(x, params["weight_ih"], bias), None
        mean, var = (None, None) if given is None else (s[:, None, :] for s in given)
        return normalize.forward(
            linear(x, params["weight_ih"]),
            params["norm_ih.weight"],
            self._late_bias(params),
            eps=self.variant.eps,
            mean=mean,
            var=var,
            mask=mask if self.variant.norm == "batch" else None,
            **self._input_axes(),
        )

    def _input_term_vjp(
        self,
        params: Params,
        x: Array,
        lengths: Array | None,
        normalized: Normalized | None,
        du: Array,
        shares: Params,
        training: bool,
    ) -> tuple[Array, Params]:
        """(dx, cotangents of the parameters outside the loop); `shares` are those of the parameters inside."""
        xp = xp_of(x)
        grads: Params = {}
        if normalized is not None:
            batch = self.variant.norm == "batch"
            mean = normalized.mean if batch and not training else None
            mask = sequence_mask(x, lengths) if batch and training and lengths is not None else None
            du, grads["norm_ih.weight"], late = normalize.vjp(normalized, du, mean=mean, mask=mask, **self._input_axes())
        else:
            late = shares["norm_sum.bias"] if "norm_sum.bias" in shares else xp.sum(du, axis=(0, 1))
        grads.update(dict.fromkeys(self._late_biases(params), late))
        grads["weight_ih"] = weight_cotangent(du, x)
        return linear.vjp((x, params["weight_ih"], None), du)[0], grads

    def _input_axes(self) -> Axes:
        return {"axes": (1,) if self.variant.norm == "batch" else (2,), "param_axes": (2,)}

    def _late_biases(self, params: Params) -> tuple[str, ...]:
        """The parameters that are added after normalization: their sum is one vector, with one cotangent for each of them."""
        names = (*self.variant.biases, "norm_ih.bias", "norm_hh.bias", "norm_sum.bias")
        return tuple(name for name in names if name in params)

    def _late_bias(self, params: Params) -> Array | None:
        """Their sum, with the constant that a variant adds to the forget gate."""
        terms = [params[name] for name in self._late_biases(params)]
        if self.variant.runtime_forget_bias:
            weight = params["weight_hh"]
            terms.append(forget_bias(xp_of(weight), weight, self.hidden_size, self.variant.runtime_forget_bias))
        return sum(terms[1:], start=terms[0]) if terms else None

    def _loop_params(self, params: Params) -> Params:
        inside = {"weight_hh", "norm_hh.weight", "norm_sum.weight", "norm_c.weight", "norm_c.bias"}
        loop = {name: p for name, p in params.items() if name in inside}
        if "norm_sum.weight" in params:
            late = self._late_bias(params)
            loop["norm_sum.bias"] = xp_of(params["norm_sum.weight"]).zeros_like(params["norm_sum.weight"]) if late is None else late
        return loop


def forget_bias(xp: Namespace, like: Array, hidden_size: int, value: float) -> Array:
    """(4·hidden,): `value` in the slice of the forget gate, 0 elsewhere."""
    zeros, device = xp.zeros(hidden_size, dtype=like.dtype, device=device_of(like)), device_of(like)
    forget = xp.full(hidden_size, value, dtype=like.dtype, device=device)
    return xp.concat([forget if k == LSTMCell.forget_gate else zeros for k in range(LSTMCell.gates)])
