"""NumPy, as one writes it down: two passes for statistics, no backward."""

from __future__ import annotations

from typing import Any

import numpy

from portnorm.bench.formulas import Functions, cell, input_term, normalization
from portnorm.bench.works import EPS, Arrays, Run, Work


def make(work: Work, data: Arrays) -> Run | None:
    return None if work.backward else {"norm": _norm, "sequence": _sequence}[work.room](work, data)


def _normalized(a: Any, axis: Any) -> Any:
    d = a - a.mean(axis=axis, keepdims=True)
    return d / numpy.sqrt((d * d).mean(axis=axis, keepdims=True) + EPS)


_LIB = Functions(
    split=lambda a, n: numpy.split(a, n, axis=-1),
    concat=lambda parts: numpy.concatenate(parts, axis=-1),
    sigmoid=lambda a: 1 / (1 + numpy.exp(-a)),
    tanh=numpy.tanh,
    norm=_normalized,
)


def _norm(work: Work, data: Arrays) -> Run:
    return lambda: (normalization(work, _LIB, data["x"], data),)


def _sequence(work: Work, data: Arrays) -> Run:
    x = data["x"]

    def run() -> Any:
        state: Any = (numpy.zeros((x.shape[1], work.hidden), x.dtype),) * work.states
        y = numpy.empty((*x.shape[:2], work.hidden), x.dtype)
        for t, u in enumerate(input_term(work, _LIB, data, x)):
            state = cell(work, _LIB, data, u, state)
            y[t] = state[0]
        return (y,)

    return run
