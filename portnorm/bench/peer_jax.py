"""JAX under `jit`, which fuses what is written out; time is `lax.scan`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy

from portnorm.bench.formulas import Functions, cell, input_term, normalization
from portnorm.bench.works import ADAM, EPS, RATE, UPDATES, Arrays, Run, Work, parameters


def make(work: Work, data: Arrays) -> Run:
    import jax

    made = {"norm": _norm, "sequence": _sequence, "step": _step, "update": _update}[work.room]
    if work.dtype != "float64":
        return made(work, data)
    with jax.enable_x64(True):  # for this work alone
        run = made(work, data)

    def wide() -> Any:
        with jax.enable_x64(True):
            return run()

    return wide


@functools.cache
def _functions(transposed: bool) -> Functions:
    """`transposed` matrices of weights are (inputs, outputs)."""
    import jax
    from jax import numpy as jnp

    def norm(a: Any, axis: Any) -> Any:
        d = a - a.mean(axis=axis, keepdims=True)
        return d * jax.lax.rsqrt((d * d).mean(axis=axis, keepdims=True) + EPS)

    return Functions(
        linear=jnp.matmul if transposed else lambda a, w: a @ w.T,
        split=lambda a, n: jnp.split(a, n, -1),
        concat=lambda parts: jnp.concatenate(parts, -1),
        sigmoid=jax.nn.sigmoid,
        tanh=jnp.tanh,
        rsqrt=jax.lax.rsqrt,
        where=jnp.where,
        norm=norm,
    )


def _arrays(work: Work, data: Arrays) -> tuple[dict[str, Any], dict[str, Any]]:
    """What comes in, with a mask as factors along the features, and the parameters.

    Matrices are (inputs, outputs), as JAX's libraries keep them, in forward works: the other way round XLA takes up to 25 times as long for
    a step, but for a backward pass up to 15 % less.
    """
    from jax import numpy as jnp

    p = {name: jnp.asarray(a if work.backward else numpy.ascontiguousarray(a.T)) for name, a in parameters(data).items()}
    given = {name: jnp.asarray(a) for name, a in data.items() if name not in p}
    return given | ({"mask": given["mask"][..., None].astype(work.dtype)} if "mask" in given else {}), p


def _run(work: Work, forward: Callable[[Any, Any, Any], Any], data: Arrays) -> Run:
    """`forward` of x, the parameters and what else comes in, or that and the cotangents of x and the parameters."""
    import jax

    given, p = _arrays(work, data)
    x, dy = given.pop("x"), given.pop("dy")
    if not work.backward:
        run = jax.jit(forward)
        return lambda: (jax.block_until_ready(run(x, p, given)),)

    def both(x: Any, p: Any, given: Any, dy: Any) -> Any:
        y, pullback = jax.vjp(lambda x, p: forward(x, p, given), x, p)
        return y, *pullback(dy)

    step = jax.jit(both)
    return lambda: jax.block_until_ready(step(x, p, given, dy))[:2]


def _norm(work: Work, data: Arrays) -> Run:
    return _run(work, lambda x, p, given: normalization(work, _functions(not work.backward), x, p | given), data)


def _sequence(work: Work, data: Arrays) -> Run:
    import jax
    from jax import numpy as jnp

    lib = _functions(not work.backward)

    def forward(x: Any, p: Any, given: Any) -> Any:
        mask = given.get("mask")

        def step(state: Any, at: Any) -> Any:
            state = cell(work, lib, p, at[0], state, at[1])
            return state, state[0]

        zeros = jnp.zeros((x.shape[1], work.hidden), x.dtype)
        _, y = jax.lax.scan(step, (zeros,) * len(work.states), (input_term(work, lib, p, x, mask), mask))
        return y if mask is None else y * mask

    return _run(work, forward, data)


def _step(work: Work, data: Arrays) -> Run:
    import jax

    lib, (given, p) = _functions(not work.backward), _arrays(work, data)
    step = jax.jit(lambda x, state, p: cell(work, lib, p, input_term(work, lib, p, x), state))
    x, state = given["x"], tuple(given[name] for name in work.states)
    return lambda: jax.block_until_ready(step(x, state, p))


def _update(work: Work, data: Arrays) -> Run:
    """Each goes on from the one before, whose arrays are given away."""
    import jax
    from jax import numpy as jnp

    @functools.partial(jax.jit, donate_argnums=(0,))
    def update(state: Any, grads: Any) -> Any:
        *arrays, steps = state
        steps, new = steps + 1, []
        for p, m, v, g in zip(*arrays, grads, strict=True):
            m, v = ADAM.beta1 * m + (1 - ADAM.beta1) * g, ADAM.beta2 * v + (1 - ADAM.beta2) * g**2
            new.append((p - RATE / (1 - ADAM.beta1**steps) * m / (jnp.sqrt(v / (1 - ADAM.beta2**steps)) + ADAM.eps), m, v))
        return *map(list, zip(*new, strict=True)), steps

    params, grads, mean, square = ([*map(jnp.asarray, data[name])] for name in "pgmv")
    state = params, mean, square, jnp.asarray(UPDATES, work.dtype)

    def run() -> Any:
        nonlocal state
        state = jax.block_until_ready(update(state, grads))
        return [a for arrays in state[:3] for a in arrays]

    return run
