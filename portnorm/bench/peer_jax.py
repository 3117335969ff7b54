"""JAX under `jit`, which fuses what is written out; time is `lax.scan`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from portnorm.bench.formulas import Functions, cell, input_term, normalization
from portnorm.bench.works import EPS, Arrays, Run, Work


def make(work: Work, data: Arrays) -> Run:
    return {"norm": _norm, "sequence": _sequence}[work.room](work, data)


@functools.cache
def _functions() -> Functions:
    import jax
    from jax import numpy as jnp

    def norm(a: Any, axis: Any) -> Any:
        d = a - a.mean(axis=axis, keepdims=True)
        return d * jax.lax.rsqrt((d * d).mean(axis=axis, keepdims=True) + EPS)

    return Functions(
        split=lambda a, n: jnp.split(a, n, -1),
        concat=lambda parts: jnp.concatenate(parts, -1),
        sigmoid=jax.nn.sigmoid,
        tanh=jnp.tanh,
        norm=norm,
    )


def _run(work: Work, forward: Callable[[Any, Any], Any], data: Arrays) -> Run:
    """`forward` of x and the parameters, or that and the cotangents of both."""
    import jax
    from jax import numpy as jnp

    p = {name: jnp.asarray(value) for name, value in data.items()}
    x, dy = p.pop("x"), p.pop("dy")
    if not work.backward:
        run = jax.jit(forward)
        return lambda: (jax.block_until_ready(run(x, p)),)

    def both(x: Any, p: Any, dy: Any) -> Any:
        y, pullback = jax.vjp(forward, x, p)
        return y, *pullback(dy)

    step = jax.jit(both)
    return lambda: jax.block_until_ready(step(x, p, dy))[:2]


def _norm(work: Work, data: Arrays) -> Run:
    return _run(work, lambda x, p: normalization(work, _functions(), x, p), data)


def _sequence(work: Work, data: Arrays) -> Run:
    import jax
    from jax import numpy as jnp

    lib = _functions()

    def forward(x: Any, p: Any) -> Any:
        def step(state: Any, u: Any) -> Any:
            state = cell(work, lib, p, u, state)
            return state, state[0]

        zeros = jnp.zeros((x.shape[1], work.hidden), x.dtype)
        return jax.lax.scan(step, (zeros,) * work.states, input_term(work, lib, p, x))[1]

    return _run(work, forward, data)
