"""Time. The only loop over time steps, and the scan of a cell that is made of two of them: one forward, one backward.

A cell is two pure functions of one step (see `Cell`). `scan` runs it over a sequence; `scan.vjp` runs the cell's vjp over the same
sequence in the opposite order, as one more loop. What lengths and direction mean is said here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from portnorm.arrays import Array, device_of, leaves, xp_of
from portnorm.dtypes import statistics_dtype
from portnorm.op import op

Params = dict[str, Array]
State = tuple[Array, ...]
Body = Callable[[Any, Any, Any], tuple[Any, tuple[Array, ...], Any]]


class Cell(Protocol):
    """One time step and its vjp. The first state is the output (batch, hidden); every state has the batch as its first axis."""

    def step(self, params: Params, state: State, x: tuple[Array, ...], active: Array | None) -> tuple[State, State, Any]:
        """(state, further outputs of this step, residuals). `active` (batch, 1) is True for the sequences that have not ended."""

    def step_vjp(self, params: Params, residuals: Any, dstate: State, active: Array | None) -> tuple[State, tuple[Array, ...], Params]:
        """(dstate before the step, cotangents to be stacked over time, this step's share of the parameters' cotangents)."""

    def shared(self) -> tuple[str, ...]:
        """Names of the parameters whose cotangents `step_vjp` sums up."""


@op
def loop(carry: Any, xs: Any, kept: Any = None, *, body: Body, reverse: bool = False) -> tuple[tuple[Any, Any, Any], None]:
    """Fold `body(carry, x, kept) -> (carry, outputs, kept)` over the first axis of the arrays in the tuple `xs`.

    Returns the last carry, the outputs stacked over time, and what the body kept for a later loop over the same steps, in whatever
    form the array library likes (a list here, stacked arrays under `jax.lax.scan`); it is only ever given back as `kept`.
    A sequence of no steps gives the carry back and outputs of length 0.
    """
    length = len(kept.steps) if kept is not None else next(leaves(xs)).shape[0]
    if length == 0:
        return _loop_of_no_steps(carry, xs, kept, body), None
    outputs, keeps = [], []
    for t in reversed(range(length)) if reverse else range(length):
        x = tuple(None if a is None else a[t, ...] for a in xs)
        carry, out, keep = body(carry, x, None if kept is None else kept.steps[t])
        outputs.append(out)
        keeps.append(keep)
    if reverse:
        outputs.reverse()
        keeps.reverse()
    return (carry, tuple(xp_of(column[0]).stack(column) for column in zip(*outputs, strict=True)), Kept(keeps)), None


class Kept(NamedTuple):
    """What a loop kept, one entry per step; after a loop of no steps, `probe` is what one step would have kept."""

    steps: list[Any]
    probe: Any = None


def _loop_of_no_steps(carry: Any, xs: Any, kept: Any, body: Body) -> tuple[Any, tuple[Array, ...], Kept]:
    """The carry as it came, and outputs of length 0 whose shapes come from one step on zeros."""
    xp = xp_of(next(leaves((carry, xs))))
    step = tuple(None if a is None else xp.zeros(a.shape[1:], dtype=a.dtype, device=device_of(a)) for a in xs)
    _, outputs, keep = body(carry, step, None if kept is None else kept.probe)
    return carry, tuple(xp.zeros((0, *a.shape), dtype=a.dtype, device=device_of(a)) for a in outputs), Kept([], keep)


def sequence_mask(x: Array, lengths: Array) -> Array:
    """(time, batch, 1), True for the steps of `x` (time, batch, …) that come before the end of their sequence."""
    xp = xp_of(x)
    steps = xp.arange(x.shape[0], dtype=lengths.dtype, device=device_of(x))
    return steps[:, None, None] < lengths[None, :, None]


@op
def steps_at(x: Array, place: Array) -> tuple[Array, None]:
    """y[t, b] = x[place[t, b], b] for `x` (time, batch, features) and `place` (time, batch)."""
    xp = xp_of(x)
    return xp.take_along_axis(x, xp.broadcast_to(place[:, :, None], x.shape), axis=0), None


@op
def reverse_sequences(x: Array, lengths: Array | None = None) -> tuple[Array, Array | None]:
    """`x` (time, batch, features) with each sequence in the opposite order; padding after `lengths` (batch,) stays where it is."""
    xp = xp_of(x)
    if lengths is None:
        return xp.flip(x, axis=0), None
    steps = xp.arange(x.shape[0], dtype=lengths.dtype, device=device_of(x))[:, None]
    source = xp.where(steps < lengths[None, :], lengths[None, :] - 1 - steps, steps)
    return steps_at(x, source), lengths


@reverse_sequences.backward
def _(residuals: Array | None, dy: Array) -> tuple[Array, None]:
    return reverse_sequences(dy, residuals), None


class ScanResiduals(NamedTuple):
    params: Params
    kept: Any  # per step: (residuals of the cell, active)


class SegmentResiduals(NamedTuple):
    """What a scan that is computed again needs: where each segment began, and what it was given."""

    params: Params
    term: Any  # the first of `xs`, which is as large as all others: who can make it again may keep it out until the vjp
    given: tuple[Array, ...]
    starts: list[Any]  # (steps left, state) before each segment
    every: int  # steps of a segment


@op
def scan(
    xs: tuple[Array, ...],
    state: State,
    params: Params,
    *,
    cell: Cell,
    lengths: Array | None = None,
    sequences: bool = True,
    keep: bool = True,
    recompute: int | None = None,
) -> tuple[tuple[State, tuple[Array, ...]], ScanResiduals | SegmentResiduals]:
    """Run `cell` over the first axis of each array in `xs` (time, batch, …), from `state`.

    Returns `(state, outputs)`: the state after each sequence's last step, and the outputs stacked over time: with `sequences` first
    the hidden state (time, batch, hidden), 0 after a sequence's end, then whatever else the cell gives out. `lengths` (batch,) counts
    the steps of each sequence; a sequence that has ended keeps its state. A scan from the end is `reverse_sequences` before and after.
    Without `keep` there are no residuals and nothing of a step outlives it. With `recompute` the residuals are the states before every
    so many steps, from which the vjp computes the others again.
    """
    left = None if lengths is None else xp_of(state[0]).expand_dims(lengths, axis=1)
    if not keep or recompute is None:
        (_, state), outputs, kept = loop((left, state), xs, body=_forward(cell, params, sequences, keep))
        return (state, outputs), ScanResiduals(params, kept)
    carry, starts, found = (left, state), [], []
    for segment in _segments(xs, xs[0].shape[0], recompute):
        starts.append(carry)
        carry, outputs, _ = loop(carry, segment, body=_forward(cell, params, sequences, False))
        found.append(outputs)
    return (carry[1], _joined(found)), SegmentResiduals(params, xs[0], xs[1:], starts, recompute)


def _segments(xs: tuple[Array | None, ...], time: int, every: int) -> list[tuple[Array | None, ...]]:
    """The arrays that there are, of so many steps at a time."""
    ends = [(t, min(t + every, time)) for t in range(0, max(1, time), every)]
    return [tuple(None if a is None else a[start:stop, ...] for a in xs) for start, stop in ends]


def _joined(parts: list[tuple[Array, ...]]) -> tuple[Array, ...]:
    """Arrays of segments as those of all steps."""
    return parts[0] if len(parts) == 1 else tuple(xp_of(column[0]).concat(column) for column in zip(*parts, strict=True))


def _forward(cell: Cell, params: Params, sequences: bool, keep: bool) -> Body:
    """A step, with (steps left, state) for a carry."""

    def body(carry: Any, x: Any, _: Any) -> tuple[Any, tuple[Array, ...], Any]:
        left, state = carry
        active, xp = None if left is None else left > 0, xp_of(state[0])
        new, further, residuals = cell.step(params, state, x, active)
        y = new[0]
        if active is not None:
            y = xp.where(active, y, 0.0)
            new = tuple(xp.where(active, n, s) for n, s in zip(new, state, strict=True))
            left = left - 1
        return (left, new), ((y, *further) if sequences else further), (residuals, active) if keep else None

    return body


@scan.backward
def _(
    residuals: ScanResiduals | SegmentResiduals,
    cotangents: tuple[State, Array | None],
    *,
    cell: Cell,
    **attrs: Any,
) -> tuple[tuple[Array, ...], State, Params]:
    """From the cotangents of the last state and of the hidden states (time, batch, hidden), or `None` for the latter:

    the cotangents that the cell's vjp stacks over time, in the order of the loop; of the first state; and of the shared parameters.
    """
    dstate, dy = cotangents
    params = residuals.params
    xp = xp_of(dstate[0])
    names = cell.shared()

    def body(carry: Any, x: Any, kept: Any) -> tuple[Any, tuple[Array, ...], None]:
        dstate, dparams = carry
        (dy,) = x
        step_residuals, active = kept
        through = dstate if dy is None else (dstate[0] + dy, *dstate[1:])
        if active is not None:
            through = tuple(xp.where(active, d, 0.0) for d in through)
        before, stacked, shares = cell.step_vjp(params, step_residuals, through, active)
        if active is not None:
            before = tuple(xp.where(active, b, d) for b, d in zip(before, dstate, strict=True))
        summed = tuple(d + xp.astype(shares[name], d.dtype, copy=False) for name, d in zip(names, dparams, strict=True))
        return (before, summed), stacked, None

    carry = dstate, tuple(xp.zeros_like(params[name], dtype=statistics_dtype(xp, params[name].dtype)) for name in names)
    if isinstance(residuals, ScanResiduals):
        carry, stacked, _ = loop(carry, (dy,), residuals.kept, body=body, reverse=True)
    else:
        found: list[tuple[Array, ...]] = []
        terms = (residuals.term, *residuals.given)
        parts = [_segments(arrays, terms[0].shape[0], residuals.every) for arrays in (terms, (dy,))]
        for start, segment, own in reversed([*zip(residuals.starts, *parts, strict=True)]):
            _, _, kept = loop(start, segment, body=_forward(cell, params, False, True))
            carry, stacked, _ = loop(carry, own, kept, body=body, reverse=True)
            found.insert(0, stacked)
        stacked = _joined(found)
    dstate, dparams = carry
    return stacked, dstate, {n: xp.astype(d, params[n].dtype, copy=False) for n, d in zip(names, dparams, strict=True)}


scan.differentiable = False  # what its vjp gives for `xs` is stacked as the cell has it: the layer around the scan is differentiated
