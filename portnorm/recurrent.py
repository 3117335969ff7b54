"""One direction of one recurrent layer: everything that is not inside the time loop, once for the whole sequence.

    u = N_ih(x W_ihᵀ) + b            one matrix product over all steps, and its normalization
    h, c = scan(cell, u)             the loop
    h, c = linear_scan(cell, x)      both, where nothing is kept: then u is never there of all steps
    dW = Σ duᵀ·x,  dU = Σ daᵀ·h      one matrix product each over all steps, after the backward loop

where a = h W_hhᵀ is the hidden term.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from portnorm.affine import input_cotangent, linear, weight_cotangent
from portnorm.arrays import Array, device_of, library, xp_of
from portnorm.cells.cell import RecurrentCell
from portnorm.dtypes import default_integer, statistics_dtype
from portnorm.norm.normalize import Reduce
from portnorm.norm.weight import weight_norm
from portnorm.op import op
from portnorm.quantization import SCHEMES, Scheme, fake_quantize, integer_product
from portnorm.scan import Params, State, reverse_sequences, scan, sequence_mask
from portnorm.statistics import VALUES, at_steps, rows_of_steps, update
from portnorm.sums import total_like

Buffers = dict[str, Array]
Sum = Callable[[list[Array]], Array | None]
"""What adds up biases; who computes again notes which sums it has to make anew."""


def _sum(terms: list[Array]) -> Array | None:
    """`None` of none."""
    if len(terms) == 1:
        return terms[0]
    return sum(terms[1:], start=terms[0]) if terms else None


class RecurrentResiduals(NamedTuple):
    """What the vjp of a direction needs."""

    params: Params  # with the weights themselves where they are normalized
    weights: dict[str, Any]  # residuals of weight normalization, by matrix
    x: Array  # (time, batch, inputs), in the order of the steps, finite in the padding
    lengths: Array | None
    rows: Array | None  # (time,) which row of γ and β each step takes, where each has its own
    input_slot: tuple[Any, ...]  # residuals of norm_ih
    scan: Any
    again: tuple[Params, Array | None, Array | None] | None = None  # where the steps are computed again: what `input_term` took, `moves`


@op
def linear_scan(
    x: Array,
    params: Params,
    state: State,
    loop: Params,
    *,
    cell: RecurrentCell,
    lengths: Array | None = None,
    sequences: bool = True,
) -> tuple[tuple[State, tuple[Array, ...]], None]:
    """`scan` without `keep` over the input term of `x` (time, batch, inputs), for a cell to which all steps are alike.

    `params` are those of the input term (see `input_term`), `loop` those of a step.
    """
    found = []
    for _, part, left in in_parts(x, params["weight_ih"].shape[0], lengths):
        u, _, _ = input_term(cell, params, part)
        state, outputs = scan((u,), state, loop, cell=cell, lengths=left, sequences=sequences, keep=False)
        found.append(outputs)
    return (state, found[0] if len(found) == 1 else tuple(xp_of(x).concat(column) for column in zip(*found, strict=True))), None


def in_parts(x: Array, features: int, lengths: Array | None) -> list[tuple[int, Array, Array | None]]:
    """(first step, steps of `x`, lengths from there on): so many steps at a time that the library likes their `features` at once."""
    xp, limit = xp_of(x), library(x).at_once
    steps = x.shape[0] if limit is None else max(1, limit // max(1, x.shape[1] * features))
    if limit is None or x.shape[0] <= steps:
        return [(0, x, lengths)]
    left = [None if lengths is None else xp.where(lengths > start, lengths - start, 0) for start in range(0, x.shape[0], steps)]
    return [(k * steps, x[k * steps : (k + 1) * steps, ...], those) for k, those in enumerate(left)]


def input_term(
    cell: RecurrentCell, params: Params, x: Array, mask: Array | None = None
) -> tuple[Array, tuple[Any, ...], tuple[Array, ...]]:
    """u = N_ih(x W_ihᵀ + b) of all steps of `x`, the residuals of `norm_ih`, and the batch's statistics in training.

    `params` has `weight_ih`; where there are early biases their sum `bias`; what `norm_ih` takes, and without a normalizer `norm_ih.bias`,
    each of all steps (features,) or with a row for each.
    """
    slot, bias = cell.input_slot, params.get("bias")
    if cell.quantize is not None:
        u = integer_product(x, params["weight_ih"], block=SCHEMES[cell.quantize].inputs.block)
        u = u if bias is None else u + bias
    else:
        u = linear(x, params["weight_ih"], bias)
    if slot is not None:
        return slot(params, "norm_ih", u, mask)
    late = params.get("norm_ih.bias")
    return (u if late is None else u + xp_of(x).expand_dims(late, axis=1)), (), ()


@dataclass(frozen=True)
class Direction:
    """One direction of a recurrent layer, as pure functions of its parameters, buffers and inputs."""

    cells: tuple[RecurrentCell, RecurrentCell, RecurrentCell]  # in inference, in training, and in training with a draw of zoneout
    hidden_size: int
    t_max: int
    reverse: bool = False
    sequences: bool = True
    backwards: bool = False
    """In reverse: whether `y` stays in the order of the computation, the last step of `x` first."""

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
        recompute: int | None = None,
        momentum: float | None,
        hidden_mask: Array | None = None,
        moves: Array | None = None,
    ) -> tuple[Array, State, Buffers, RecurrentResiduals | None]:
        """`(y, state, buffers, residuals)` for `x` (time, batch, inputs).

        `y` is (time, batch, outputs), or (batch, outputs) of the last step without `sequences`. `time` counts the steps that came before
        this call (batch normalization only). `hidden_mask` (batch, outputs) is what every step multiplies h with before its matrix product;
        `moves` (time, batch, outputs), in the order of the steps, is False where zoneout leaves h as it was. With `recompute` what is kept
        are the states before every so many steps, and `y`.
        """
        cell = self.cells[training if moves is None else 2]
        by_batch = cell.variant.norm == "batch"
        whole = keep or (by_batch and training) or moves is not None
        params, weights = _normalized_weights(params, whole)
        mask = sequence_mask(x, lengths) if lengths is not None and (keep or (by_batch and training)) else None
        if self.reverse:
            x = reverse_sequences(x, lengths)
        if cell.quantize is not None:
            scheme = SCHEMES[cell.quantize]
            params = _quantized_weights(cell, params, scheme)
            x = fake_quantize(x, **scheme.inputs.arguments) if keep else x
        residuals = None
        masked = {} if hidden_mask is None else {"hidden_mask": hidden_mask}
        if whole:
            drawn = {} if moves is None else {"zoneout": moves}
            y, state, buffers, residuals = self._run(
                params, buffers, x, state, time, lengths, mask, training, keep, momentum, cell, masked, drawn, recompute
            )
            residuals = residuals._replace(weights=weights)
        elif by_batch or cell.variant.affine != "shared":
            y, state = self._run_in_parts(params, buffers, x, state, time, lengths, training)
        else:
            terms, loop = self._shared(cell, params)
            state, outputs = linear_scan(x, terms, state, {**loop, **masked}, cell=cell, lengths=lengths, sequences=self.sequences)
            y = outputs[0] if self.sequences else state[0]
        if self.reverse and self.sequences and not self.backwards:
            y = reverse_sequences(y, lengths)
        return y, state, buffers, residuals

    @property
    def repeats(self) -> bool:
        """Whether there may be an `again`: not where a step has parameters of its own, in reverse, or with normalized weights."""
        v = self.cells[0].variant
        return not self.reverse and v.norm not in ("batch", "weight") and v.affine == "shared"

    def again(self, params: Params, x: Array, state: State) -> Callable[[Array, State], tuple[Array, State] | None] | None:
        """What computes calls like `forward(params, {}, x, state, keep=False)` that come again: a function of `x` and `state`, shaped like
        these, to `(y, state)`, or to `None` where `forward` has to do it.

        It holds `params`, and reads them anew in each call but for weights that are quantized, which nobody may change. `None` where no
        kernel has such a function.
        """
        cell, sequences = self.cells[0], self.sequences
        if cell.quantize is not None:
            params = _quantized_weights(cell, params, SCHEMES[cell.quantize])
        sums: list[tuple[Array, list[Array]]] = []

        def noted(terms: list[Array]) -> Array | None:
            total = _sum(terms)
            if len(terms) > 1:
                sums.append((total, terms))
            return total

        own, loop = self._shared(cell, params, noted)
        scanned = linear_scan.again(x, own, state, loop, cell=cell, sequences=sequences)
        if scanned is None:
            return None

        def run(x: Array, state: State) -> tuple[Array, State] | None:
            for total, terms in sums:
                total[...] = _sum(terms)
            found = scanned(x, state)
            if found is None:
                return None
            state, outputs = found
            return (outputs[0] if sequences else state[0]), state

        return run

    def _shared(self, cell: RecurrentCell, params: Params, add: Sum = _sum) -> tuple[Params, Params]:
        """What `linear_scan` takes of parameters that all steps share: that of the input term, and that of the loop."""
        return self._input_params(cell, params, {}, None, add), self._loop_params(cell, params, add)

    def _run_in_parts(
        self, params: Params, buffers: Buffers, x: Array, state: State, time: Array | None, lengths: Array | None, training: bool
    ) -> tuple[Array, State]:
        """Without residuals, where each step has statistics, or gain and shift, of its own."""
        found = []
        for start, part, left in in_parts(x, params["weight_ih"].shape[0], lengths):
            now = time + start if start and time is not None else time
            y, state, _, _ = self._run(params, buffers, part, state, now, left, None, training, False, None, self.cells[training], {}, {})
            found.append(y)
        return (found[0] if len(found) == 1 else xp_of(x).concat(found) if self.sequences else found[-1]), state

    def _run(
        self,
        params: Params,
        buffers: Buffers,
        x: Array,
        state: State,
        time: Array | None,
        lengths: Array | None,
        mask: Array | None,
        training: bool,
        keep: bool,
        momentum: float | None,
        cell: RecurrentCell,
        masked: Params,
        drawn: Params,
        recompute: int | None = None,
    ) -> tuple[Array, State, Buffers, RecurrentResiduals]:
        """The input term and the loop, in the order of the steps."""
        xp = xp_of(x)
        batch, reduce = cell.variant.norm == "batch", cell.reduce
        given = at_steps(buffers, time, x) if batch and not training else {}
        rows = None if cell.variant.affine == "shared" else rows_of_steps(time, x, self.t_max)
        loop = {**self._loop_params(cell, params), **masked}
        steps = {**given, **drawn, **{name: xp.take(loop.pop(name), rows, axis=0) for name in cell.stepwise()}}
        terms = self._input_params(cell, params, given, rows)
        u, input_residuals, seen = input_term(cell, terms, x, mask)
        xs, again = (u, *(steps[name] for name in cell.given())), None if recompute is None or recompute >= x.shape[0] else recompute
        partly = {} if again is None else {"recompute": again}
        (state, outputs), scanned = scan.forward(xs, state, loop, cell=cell, lengths=lengths, sequences=self.sequences, keep=keep, **partly)
        if again is not None:
            scanned, input_residuals = scanned._replace(term=None), ()
        y, further = (outputs[0], outputs[1:]) if self.sequences else (state[0], outputs)
        if batch and training and x.shape[0] != 0:
            tracked = [name for name, slot in cell.slots.items() if slot.normalizes]
            inside = dict(zip(tracked, zip(further[::2], further[1::2], strict=True), strict=True))
            counted = _counted_steps(x, lengths, reduce, cell.variant.timed)
            values = _values(x, lengths, reduce, cell.variant.timed) if VALUES in buffers else None
            buffers = update(buffers, inside | ({"norm_ih": seen} if seen else {}), time, counted, momentum, values)
        made = None if again is None else (terms, mask, drawn.get("zoneout"))
        return y, state, buffers, RecurrentResiduals(params, {}, x, lengths, rows, input_residuals, scanned, made)

    def vjp(self, residuals: RecurrentResiduals, dy: Array | None, dstate: State, *, training: bool = False) -> tuple[Array, State, Params]:
        """`(dx, dstate, dparams)` from the cotangents of `y` (or `None`) and of the last state."""
        params, weights, x, lengths, rows, _, scanned, again = residuals
        cell = self.cells[training]
        if again is not None:
            terms, mask, moves = again
            cell = self.cells[training if moves is None else 2]
            u, made, _ = input_term(cell, terms, x, mask)
            residuals, scanned = residuals._replace(input_slot=made), scanned._replace(term=u)
            del u
        if not self.sequences and dy is not None:
            dy, dstate = None, (dstate[0] + dy, *dstate[1:])
        if self.reverse and dy is not None and not self.backwards:
            dy = reverse_sequences(dy, lengths)
        (du, *hidden), dstate, shares = scan.vjp(scanned, (dstate, dy), cell=cell)
        del scanned
        dxw, outside = self._input_term_vjp(cell, residuals, du)
        stepwise = cell.stepwise()
        hidden, by_step = hidden[: len(hidden) - len(stepwise)], dict(zip(stepwise, hidden[len(hidden) - len(stepwise) :], strict=True))
        if rows is not None:
            outside = {name: d if d.ndim == 1 else self._by_row(d, rows) for name, d in outside.items()}
            shares = {**shares, **{name: self._by_row(d, rows) for name, d in by_step.items()}}
        outside = dict(outside)
        if "weight_hr" in params:
            *hidden, d, unprojected = hidden
            outside["weight_hr"] = weight_cotangent(d, unprojected)
        pairs = zip(hidden[::2], hidden[1::2], strict=True)
        if cell.variant.recurrence == "diagonal":
            blocks = [xp_of(x).sum(d * h, axis=(0, 1))[:, None] for d, h in pairs]
        else:
            blocks = [weight_cotangent(d, h) for d, h in pairs]
        grads = {"weight_ih": weight_cotangent(dxw, x), **shares, **outside}
        grads["weight_hh"] = blocks[0] if len(blocks) == 1 else xp_of(x).concat(blocks, axis=0)
        grads.update(self._bias_cotangents(cell, params, grads, dxw, hidden[::2]))
        dx = input_cotangent(dxw, params["weight_ih"])
        if self.reverse:
            dx = reverse_sequences(dx, lengths)
        for name, kept in weights.items():
            grads[f"{name}.v"], grads[f"{name}.g"] = weight_norm.vjp(kept, grads.pop(name))
        return dx, dstate, {name: grads[name] for name in params if name not in weights}

    # -- the input term ------------------------------------------------------------------------------------------------------------

    def _input_params(self, cell: RecurrentCell, params: Params, given: Params, rows: Array | None, add: Sum = _sum) -> Params:
        """What `input_term` takes; `given` has the statistics of each step, `rows` say which row of a parameter it has."""
        xp, slot = xp_of(params["weight_ih"]), cell.input_slot
        early, late = add([params[name] for name in cell.early_biases[0]]), self._late_bias(cell, params, "norm_ih", add)
        if slot is None and late is not None and late.ndim == 1:
            early, late = add([late] if early is None else [early, late]), None
        own: Params = {"weight_ih": params["weight_ih"]}
        for name in ("norm_ih.mean", "norm_ih.var") if given else ():
            if name in given:
                own[name] = xp.expand_dims(given[name], axis=-2)
        if slot is not None and slot.scale and slot.normalizes:
            own["norm_ih.weight"] = self._at(params["norm_ih.weight"], rows)
        if late is not None:
            own["norm_ih.bias"] = self._at(late, rows)
        if early is not None:
            own["bias"] = early
        return own

    def _input_term_vjp(self, cell: RecurrentCell, residuals: RecurrentResiduals, du: Array) -> tuple[Array, Params]:
        """(cotangent of x·W_ihᵀ, cotangents of gain and shift of `norm_ih`)"""
        slot = cell.input_slot
        if slot is None:
            return du, {"norm_ih.bias": total_like(du, (1,) if residuals.rows is not None else (0, 1))}
        mask = None if residuals.lengths is None else sequence_mask(residuals.x, residuals.lengths)
        dxw, cotangents = slot.vjp(residuals.input_slot, du, mask)
        return dxw, {f"norm_ih.{p}": d for p, d in cotangents.items()}

    def _at(self, parameter: Array, rows: Array | None) -> Array:
        """A parameter of all steps, or what each step takes of it: (time, features)."""
        return parameter if rows is None else xp_of(parameter).take(_rows(parameter, self.t_max), rows, axis=0)

    def _by_row(self, d: Array, rows: Array) -> Array:
        """Cotangents (time, features) of what each step took, summed by the row that it took: (t_max, features)."""
        xp = xp_of(d)
        table = xp.arange(self.t_max, dtype=rows.dtype, device=device_of(d))
        return xp.matmul(xp.astype(xp.equal(table[:, None], rows[None, :]), d.dtype), d)

    # -- biases --------------------------------------------------------------------------------------------------------------------

    def _late_bias(self, cell: RecurrentCell, params: Params, slot: str, add: Sum = _sum) -> Array | None:
        """The sum of what is added to a slot's result, with the constant that a variant adds to the forget gate."""
        if slot not in cell.late_biases:
            return None
        terms = [params[name] if "." in name else self._of_gates(params[name], *cell.portion(slot)) for name in cell.late_biases[slot]]
        if cell.variant.runtime_forget_bias and slot != "norm_hh":
            terms.append(self._forget_bias(cell, params["weight_hh"]))
        return add(terms)

    def _of_gates(self, bias: Array, first: int, last: int) -> Array:
        """The part of a bias vector that belongs to the gates from `first` to before `last`."""
        start, stop = first * self.hidden_size, last * self.hidden_size
        return bias if stop - start == bias.shape[-1] else bias[start:stop]

    def _bias_cotangents(self, cell: RecurrentCell, params: Params, grads: Params, dxw: Array, dhidden: list[Array]) -> Params:
        """Cotangents of the biases, each the sum over the places where it is added."""
        xp = xp_of(dxw)
        late: dict[str, list[Array]] = {}
        for slot, names in cell.late_biases.items():
            for name in names:
                d = grads[f"{slot}.bias"]
                late.setdefault(name, []).append(d if d.ndim == params[name].ndim else total_like(d, (0,)))
        found = {name: parts[0] if len(parts) == 1 else xp.concat(parts, axis=-1) for name, parts in late.items()}
        outside, inside = cell.early_biases
        for names, terms in ((outside, [dxw]), (inside, dhidden)):
            for name in names:
                d = xp.concat([total_like(term, (0, 1)) for term in terms])
                found[name] = found[name] + d if name in found else d
        return found

    def _forget_bias(self, cell: RecurrentCell, weight: Array) -> Array:
        """(gates · hidden,): the constant in the slice of the forget gate, 0 elsewhere."""
        xp, place = xp_of(weight), {"dtype": weight.dtype, "device": device_of(weight)}
        zeros, ones = xp.zeros(self.hidden_size, **place), xp.full(self.hidden_size, cell.variant.runtime_forget_bias, **place)
        return xp.concat([ones if k == cell.forget_gate else zeros for k in range(cell.gates)])

    def _loop_params(self, cell: RecurrentCell, params: Params, add: Sum = _sum) -> Params:
        """What the cell reads in every step: the hidden weights, and gain and shift of each slot inside the loop."""
        loop, stepwise = {"weight_hh": params["weight_hh"]}, cell.stepwise()
        if "weight_hr" in params:
            loop["weight_hr"] = params["weight_hr"]
        for name, slot in cell.inside:
            value = params[name] if slot is None else self._late_bias(cell, params, slot, add)
            loop[name] = _rows(value, self.t_max) if name in stepwise else value
        return loop


def _values(x: Array, lengths: Array | None, reduce: Reduce | None, timed: bool) -> Array:
    """How many sequences, of all processes, reach each step of `x` (time, batch, …): (time,); or () of all steps together."""
    xp, (steps, batch) = xp_of(x), x.shape[:2]
    live = xp.ones((steps, batch, 1), dtype=xp.bool, device=device_of(x)) if lengths is None else sequence_mask(x, lengths)
    counts = xp.sum(xp.astype(live, statistics_dtype(xp, x.dtype)), axis=(1, 2) if timed else None)
    return counts if reduce is None else reduce(counts)


def _counted_steps(x: Array, lengths: Array | None, reduce: Reduce | None, timed: bool) -> Array | None:
    """(1,): the number of steps of `x` (time, batch, …) that have a variance, of two sequences at least; `None` where that is all.

    Where the steps share their statistics it is 1 or 0, for two frames in all. The sequences are those of every process.
    """
    xp, (steps, batch) = xp_of(x), x.shape[:2]
    if lengths is None and reduce is None and batch != 0:
        return None
    integer = default_integer(xp) if lengths is None else lengths.dtype
    if lengths is None:
        lengths = xp.full((batch,), steps, dtype=integer, device=device_of(x))
    alive = sequence_mask(x, lengths)
    count = xp.sum(xp.astype(alive, xp.float32), axis=(1, 2)) if timed else xp.sum(xp.astype(alive, xp.float32), keepdims=True)[:, 0, 0]
    return xp.sum(xp.astype((count if reduce is None else reduce(count)) > 1, integer), keepdims=True)


def _rows(parameter: Array, t_max: int) -> Array:
    """A parameter of all steps as one row for each of them."""
    xp = xp_of(parameter)
    return parameter if parameter.ndim == 2 else xp.broadcast_to(parameter[None, :], (t_max, parameter.shape[0]))


def _normalized_weights(params: Params, keep: bool) -> tuple[Params, dict[str, Any]]:
    """Parameters with the matrix beside its direction `.v` and lengths `.g` where it is given by them, and to `keep` the residuals of each,
    which are as large.
    """
    found, residuals = dict(params), {}
    for name in ("weight_ih", "weight_hh"):
        if f"{name}.v" in params:
            found[name], residuals[name] = weight_norm.forward(params[f"{name}.v"], params[f"{name}.g"])
            if not keep:
                del residuals[name]
    return found, residuals


def _quantized_weights(cell: RecurrentCell, params: Params, scheme: Scheme) -> Params:
    """Parameters with the matrices of products as integers can say them; a gradient of one is that of the matrix itself."""
    names = [name for name in ("weight_ih", "weight_hh", "weight_hr") if name in params]
    matrices = [name for name in names if name != "weight_hh" or cell.variant.recurrence == "matrix"]
    return {**params, **{name: fake_quantize(params[name], **scheme.weights.arguments) for name in matrices}}
