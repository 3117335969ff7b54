"""A batch-normalized LSTM in JAX's own training loop: the layer's pure form, `jax.value_and_grad`, `jax.jit`, and an optimizer of optax.

The task: name the class of a noisy sine by its frequency. Run `python docs/examples/optax_training.py`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

import portnorm as pn


def batch(size: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sequences (20, size, 1) and which of three frequencies each has."""
    of_labels, of_noise = jax.random.split(key)
    labels = jax.random.randint(of_labels, (size,), 0, 3)
    time = jnp.arange(20.0, dtype="float32")[:, None]
    waves = jnp.sin(time * (labels + 1) * 0.3) + 0.1 * jax.random.normal(of_noise, (20, size), dtype="float32")
    return waves[:, :, None].astype("float32"), labels


def main(updates: int = 60) -> list[float]:
    """The loss of every update."""
    lstm = pn.LSTM(1, 16, norm="batch", t_max=20, return_sequences=False, xp=jnp, rng=0)
    model = pn.Sequential(lstm, pn.Linear(16, 3, xp=jnp, rng=0))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.02))

    def loss_of(params: Any, buffers: Any, x: jax.Array, labels: jax.Array) -> Any:
        logits, _, buffers = model.apply(params, buffers, x, training=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), buffers

    @jax.jit
    def update(params: Any, buffers: Any, state: Any, x: jax.Array, labels: jax.Array) -> Any:
        (loss, buffers), grads = jax.value_and_grad(loss_of, has_aux=True)(params, buffers, x, labels)
        changes, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, changes), buffers, state, loss

    params, buffers, losses = model.parameters(), model.buffers, []
    state = optimizer.init(params)
    for key in jax.random.split(jax.random.key(0), updates):
        params, buffers, state, loss = update(params, buffers, state, *batch(32, key))
        losses.append(float(loss))
    model.assign(params, buffers)
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"cross-entropy {losses[0]:.3f} at first, {losses[-1]:.3f} after {len(losses)} updates")
