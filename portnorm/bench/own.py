"""This library's engines: its functions and layers on NumPy, their results in memory that is there, and its graphs in onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy

import portnorm
from portnorm.bench import peer_onnxruntime
from portnorm.bench.works import ADAM, GROUPS, NORMS, UPDATES, Arrays, Run, Work
from portnorm.op import vjp


def make(work: Work, data: Arrays) -> Run | None:
    return {"norm": _norm, "sequence": _sequence, "step": _step, "update": _update}[work.room](work, data)


def _norm(work: Work, data: Arrays) -> Run:
    op, (arguments, options) = NORMS[work.what], _call(work, data)
    if not work.backward:
        return lambda: (op(*arguments, **options),)

    def both() -> Any:
        y, pullback = vjp(op, *arguments, **options)
        return y, pullback(data["dy"])[0]

    return both


def _call(work: Work, data: Arrays) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a normalization."""
    options: dict[str, Any] = {name: data[name] for name in ("mean", "var", "mask") if name in data}
    if work.kind == "with mask":
        options["channel_axis"] = 2
    groups = (GROUPS,) if work.what == "GN" else ()
    return (data["x"], *groups, data["weight"], data["bias"]), options


def _sequence(work: Work, data: Arrays) -> Run:
    layer, x, dy, lengths = _layer(work, data), data["x"], data["dy"], data.get("lengths")
    if not work.backward:
        return lambda: (layer(x, lengths=lengths, training=work.what == "BN-LSTM")[0],)

    def both() -> Any:
        y, _, pullback = layer.vjp(x, lengths=lengths, training=True)
        return y, pullback(dy)[0]

    return both


def _step(work: Work, data: Arrays) -> Run:
    layer, x, state = _layer(work, data), data["x"], tuple(data[name] for name in work.states)

    def run() -> Any:
        _, after = layer.step(x, state)
        return after

    return run


def _layer(work: Work, data: Arrays) -> Any:
    layer = work.layer(str(data["x"].dtype))
    layer.load_state_dict({name: data[name] for name in layer.parameters()} | layer.buffers)
    return layer


def _update(work: Work, data: Arrays, *, in_place: bool = False) -> Run:
    """Each goes on from the one before, as in training."""
    params, grads, mean, square = ({str(k): a for k, a in enumerate(data[name])} for name in "pgmv")
    state: dict[str, Any] = {"mean": mean, "square": square, "steps": numpy.asarray(UPDATES)}

    def run() -> Any:
        nonlocal params, state
        params, state = ADAM.update(params, grads, state, in_place=in_place)
        return [*params.values(), *state["mean"].values(), *state["square"].values()]

    return run


def out(work: Work, data: Arrays) -> Run | None:
    """A normalization, or an update, into memory that is there."""
    if work.room == "update":
        return _update(work, data, in_place=True)
    if work.room != "norm" or work.backward:
        return None
    op, (arguments, options), there = NORMS[work.what], _call(work, data), numpy.empty_like(data["x"])
    return lambda: (op(*arguments, **options, out=there),)


def compiled(work: Work, data: Arrays) -> Run | None:
    """Our graph in onnxruntime: of sequences, or of a step, whose states come in and go out."""
    if not work.recurrent or work.backward or work.what == "BN-LSTM":
        return None
    layer = _layer(work, data)
    if work.room == "sequence":
        model = portnorm.compile(layer, threads=peer_onnxruntime.threads())
        return lambda: (model(data["x"])[0],)
    report = portnorm.export(layer, None, streaming=True, target="onnxruntime", dtype=work.dtype)
    feed, after = {"x": data["x"], **{f"{name}_0": data[name][None] for name in work.states}}, [f"{name}_n" for name in work.states]
    session = peer_onnxruntime.session(report.model)
    return lambda: session.run(after, feed)
