"""NumPy, as one writes it down: two passes for statistics, no backward."""

from __future__ import annotations

from typing import Any

import numpy

from portnorm.bench.formulas import Functions, cell, input_term, normalization
from portnorm.bench.works import ADAM, EPS, RATE, UPDATES, Arrays, Run, Work


def make(work: Work, data: Arrays) -> Run | None:
    if work.backward:
        return None
    return {"norm": _norm, "sequence": _sequence, "step": _step, "update": _update}[work.room](work, data)


def _normalized(a: Any, axis: Any) -> Any:
    d = a - a.mean(axis=axis, keepdims=True)
    return d / numpy.sqrt((d * d).mean(axis=axis, keepdims=True) + EPS)


_LIB = Functions(
    linear=lambda a, w: a @ w.T,
    split=lambda a, n: numpy.split(a, n, axis=-1),
    concat=lambda parts: numpy.concatenate(parts, axis=-1),
    sigmoid=lambda a: 1 / (1 + numpy.exp(-a)),
    tanh=numpy.tanh,
    rsqrt=lambda a: 1 / numpy.sqrt(a),
    where=numpy.where,
    norm=_normalized,
)


def _mask(data: Arrays) -> Any:
    """As factors along the features; `None` where there is none."""
    return data["mask"][..., None].astype(data["x"].dtype) if "mask" in data else None


def _norm(work: Work, data: Arrays) -> Run:
    data = data | {"mask": _mask(data)}
    return lambda: (normalization(work, _LIB, data["x"], data),)


def _sequence(work: Work, data: Arrays) -> Run:
    x, mask = data["x"], _mask(data)

    def run() -> Any:
        state: Any = (numpy.zeros((x.shape[1], work.hidden), x.dtype),) * len(work.states)
        y = numpy.empty((*x.shape[:2], work.hidden), x.dtype)
        for t, u in enumerate(input_term(work, _LIB, data, x, mask)):
            state = cell(work, _LIB, data, u, state, None if mask is None else mask[t])
            y[t] = state[0]
        return (y if mask is None else y * mask,)

    return run


def _step(work: Work, data: Arrays) -> Run:
    x, state = data["x"], tuple(data[name] for name in work.states)
    return lambda: cell(work, _LIB, data, input_term(work, _LIB, data, x), state)


def _update(work: Work, data: Arrays) -> Run:
    """Each goes on from the one before, in place."""
    parts, steps = [*zip(*(data[name] for name in "pgmv"), strict=True)], UPDATES

    def run() -> Any:
        nonlocal steps
        steps += 1
        for p, g, m, v in parts:
            m *= ADAM.beta1
            m += (1 - ADAM.beta1) * g
            v *= ADAM.beta2
            v += (1 - ADAM.beta2) * g**2
            p -= RATE / (1 - ADAM.beta1**steps) * m / (numpy.sqrt(v / (1 - ADAM.beta2**steps)) + ADAM.eps)
        return [*data["p"], *data["m"], *data["v"]]

    return run
