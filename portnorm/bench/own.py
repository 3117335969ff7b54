"""This library's engines: its functions and layers on NumPy, their results in memory that is there, and its graphs in onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy

import portnorm
from portnorm.bench import peer_onnxruntime
from portnorm.bench.works import GROUPS, NORMS, Arrays, Run, Work
from portnorm.op import vjp


def make(work: Work, data: Arrays) -> Run | None:
    return {"norm": _norm, "sequence": _sequence}[work.room](work, data)


def _norm(work: Work, data: Arrays) -> Run:
    arguments = _norm_arguments(work, data)
    if not work.backward:
        return lambda: (NORMS[work.what](*arguments),)

    def both() -> Any:
        y, pullback = vjp(NORMS[work.what], *arguments)
        return y, pullback(data["dy"])[0]

    return both


def _norm_arguments(work: Work, data: Arrays) -> tuple[Any, ...]:
    groups = (GROUPS,) if work.what == "GN" else ()
    return data["x"], *groups, data["weight"], data["bias"]


def _sequence(work: Work, data: Arrays) -> Run:
    layer, x, dy = _layer(work, data), data["x"], data["dy"]
    if not work.backward:
        return lambda: (layer(x, training=work.what == "BN-LSTM")[0],)

    def both() -> Any:
        y, _, pullback = layer.vjp(x, training=True)
        return y, pullback(dy)[0]

    return both


def _layer(work: Work, data: Arrays) -> Any:
    layer = work.layer(str(data["x"].dtype))
    layer.load_state_dict({name: data[name] for name in layer.parameters()} | layer.buffers)
    return layer


def out(work: Work, data: Arrays) -> Run | None:
    """A normalization into memory that is there."""
    if work.room != "norm" or work.backward:
        return None
    arguments, there = _norm_arguments(work, data), numpy.empty_like(data["x"])
    return lambda: (NORMS[work.what](*arguments, out=there),)


def compiled(work: Work, data: Arrays) -> Run | None:
    """Our graph in onnxruntime."""
    if work.room != "sequence" or work.backward or work.what == "BN-LSTM":
        return None
    model = portnorm.compile(_layer(work, data), threads=peer_onnxruntime.threads())
    return lambda: (model(data["x"])[0],)
