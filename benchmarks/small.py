"""Microseconds of small calls, in which checks and the choice of a kernel weigh more than arithmetic: `python benchmarks/small.py 0.5`.

Prints JSON, {call: least microseconds}; `benchmarks.against` runs it on two trees. Imports nothing of this tree but `portnorm`.
"""

from __future__ import annotations

import json
import sys
import timeit
from collections.abc import Callable
from typing import Any

import numpy as np

import portnorm as pn


def calls() -> dict[str, Callable[[], Any]]:
    """The calls by name; all arrays float32."""
    draw = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return draw.standard_normal(shape, dtype=np.float32)

    found: dict[str, Callable[[], Any]] = {}
    for op in (pn.layer_norm, pn.rms_norm):
        for rows, features in ((1, 64), (32, 256)):
            x, dy, parameters = normal(rows, features), normal(rows, features), [normal(features)] * (2 if op is pn.layer_norm else 1)
            found[f"{op.name} ({rows}, {features})"] = lambda op=op, x=x, p=parameters: op(x, *p)
            found[f"{op.name} ({rows}, {features}) and vjp"] = lambda op=op, x=x, p=parameters, dy=dy: pn.vjp(op, x, *p)[1](dy)
    x, w = normal(32, 64), normal(64)
    found["group_norm (32, 64), 2 groups"] = lambda: pn.group_norm(x, 2, w, w)
    found["batch_norm (32, 64), given statistics"] = lambda: pn.batch_norm(x, w, w, mean=w, var=np.abs(w))
    batch = pn.BatchNorm(64)
    found["BatchNorm (32, 64)"] = lambda: batch(x)
    found["BatchNorm (32, 64), training"] = lambda: batch(x, training=True)
    one, several = normal(1, 1, 64), normal(20, 4, 64)
    for cell in (pn.LSTM, pn.GRU):
        for norm in (None, "layer", "batch"):
            layer = cell(64, 64, norm=norm, rng=0)
            name = f"{cell.__name__} {norm or 'plain'}"
            found[f"{name}, one step of one sequence"] = lambda layer=layer: layer(one)
            found[f"{name} (20, 4, 64)"] = lambda layer=layer: layer(several)
    plain = pn.LSTM(64, 64, rng=0)
    found["LSTM plain (20, 4, 64) with lengths"] = lambda: plain(several, lengths=[20, 13, 7, 1])
    model = pn.Sequential(pn.LSTM(64, 32, norm="layer", rng=0), pn.Linear(32, 3, rng=0))
    found["LN-LSTM and Linear (20, 4, 64)"] = lambda: model(several)
    params, adam = model.parameters(), pn.Adam()
    state, grads = adam.init(params), {name: 0.1 * p for name, p in params.items()}
    found["Adam, its update"] = lambda: adam.update(params, grads, state)
    logits, labels = normal(256, 10), np.arange(256) % 10
    found["softmax_cross_entropy (256, 10) and vjp"] = lambda: pn.vjp(pn.softmax_cross_entropy, logits, labels)[1](np.float32(1))
    return found


def least(call: Callable[[], Any], seconds: float) -> float:
    """Microseconds of the fastest of many turns, in about so many seconds."""
    timer = timeit.Timer(call)
    timer.timeit(3)
    count, took = timer.autorange(None)
    count = max(1, round(count * 0.02 / took))
    return min(timer.repeat(max(3, round(seconds / 0.02)), count)) / count * 1e6


if __name__ == "__main__":
    found = {name: least(call, float(sys.argv[1])) for name, call in calls().items()}
    sys.stdout.write(json.dumps(found) + "\n")
