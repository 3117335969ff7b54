"""A layer-normalized LSTM in MLX's own training loop: the layer's pure form, `mx.value_and_grad`, and an optimizer of mlx.optimizers.

The task: name the class of a noisy sine by its frequency. Run `python docs/examples/mlx_training.py`.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.optimizers

import portnorm as pn


def batch(size: int, key: mx.array) -> tuple[mx.array, mx.array]:
    """Sequences (20, size, 1) and which of three frequencies each has."""
    of_labels, of_noise = mx.random.split(key)
    labels = mx.random.randint(0, 3, (size,), key=of_labels)
    time = mx.arange(20.0)[:, None]
    waves = mx.sin(time * (labels + 1) * 0.3) + 0.1 * mx.random.normal((20, size), key=of_noise)
    return waves[:, :, None], labels


def main(updates: int = 60) -> list[float]:
    """The loss of every update."""
    lstm = pn.LSTM(1, 16, norm="layer", return_sequences=False, xp="mlx", rng=0)
    model = pn.Sequential(lstm, pn.Linear(16, 3, xp="mlx", rng=0))
    optimizer = mlx.optimizers.Adam(learning_rate=0.02)

    def loss_of(params: dict[str, mx.array], x: mx.array, labels: mx.array) -> mx.array:
        logits, _, _ = model.apply(params, model.buffers, x, training=True)
        return pn.softmax_cross_entropy(logits, labels)

    gradient: Any = mx.value_and_grad(loss_of)
    params, losses = model.parameters(), []
    for key in mx.random.split(mx.random.key(0), updates):
        loss, grads = gradient(params, *batch(32, key))
        grads, _ = mlx.optimizers.clip_grad_norm(grads, 1.0)
        params = optimizer.apply_gradients(grads, params)
        mx.eval(params, optimizer.state, loss)  # else the graph of all updates waits
        losses.append(float(loss))
    model.assign(params)
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"cross-entropy {losses[0]:.3f} at first, {losses[-1]:.3f} after {len(losses)} updates")
