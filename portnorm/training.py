"""Training of a sequence classifier: a recurrent layer, its last hidden state, a linear layer, softmax."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy

from portnorm.arrays import Array, xp_of
from portnorm.cells.variants import NormName, Variant
from portnorm.digits import Dataset
from portnorm.errors import PortnormError, UnsupportedError
from portnorm.layers.layer import Layer
from portnorm.layers.linear import Linear
from portnorm.layers.recurrent import LSTM
from portnorm.layers.sequential import Sequential
from portnorm.losses import softmax_cross_entropy
from portnorm.op import vjp
from portnorm.optimizers import Optimizer
from portnorm.updates import clip_by_global_norm

Progress = Callable[[int, int, float], None]
"""Called after each update with the updates done, the updates in all, and the loss."""


def classifier(norm: NormName | Variant | None, inputs: int, hidden: int, classes: int, steps: int, seed: int = 0) -> Sequential:
    """LSTM and linear layer that read a sequence and name its class. All variants start with a forget bias of 1."""
    lstm = LSTM(inputs, hidden, norm=norm, return_sequences=False, t_max=steps, forget_bias=1.0, rng=seed)
    return Sequential(lstm, Linear(hidden, classes, rng=seed))


@dataclass
class History:
    """What training measured: the loss of every update, in nats, and the norm of every gradient before clipping."""

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)

    def by_thirds(self) -> list[float]:
        """Mean loss at the end of each third of the budget: over its last tenth of all updates."""
        count = len(self.losses)
        ends = [max(1, round(count * k / 3)) for k in (1, 2, 3)]
        return [float(numpy.mean(self.losses[max(0, end - max(1, count // 10)) : end])) for end in ends]


def train(
    model: Layer,
    data: Dataset,
    optimizer: Optimizer,
    *,
    epochs: int,
    batch: int,
    clip: float | None = 1.0,
    state_noise: float = 0.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> History:
    """Train `model` in place on shuffled batches, by its own backward pass; batch normalization ends with population statistics.

    `state_noise` is the standard deviation of the initial h while statistics are taken (see `LSTM.initial_state`).
    The last few sequences of an epoch that do not fill a batch are left out of it. Raises `PortnormError` where the loss is not finite.
    """
    count = len(data.labels)
    if not 1 <= batch <= count:
        raise UnsupportedError(f"`batch` is {batch}; expected 1 to {count}, the number of training sequences")
    rng, history, state = numpy.random.default_rng(seed), History(), optimizer.init(model.parameters())
    for _ in range(epochs):
        order = rng.permutation(count)
        for start in range(0, count - batch + 1, batch):
            loss, grads = loss_and_gradients(
                model, data.take(order[start : start + batch]), model.initial_state(batch, noise=state_noise, rng=rng), rng
            )
            if clip is not None:
                grads, norm = clip_by_global_norm(grads, clip)
                history.gradient_norms.append(float(norm))
            if not numpy.isfinite(loss):
                raise PortnormError(f"the loss is {loss} after {len(history.losses)} updates; try a smaller learning rate")
            params, state = optimizer.update(model.parameters(), grads, state)
            model.assign(params)
            history.losses.append(loss)
            if progress is not None:
                progress(len(history.losses), epochs * (count // batch), loss)
    model.estimate_population((x, n, model.initial_state(x.shape[1], noise=state_noise, rng=rng)) for x, n in data.batches(batch))
    return history


def loss_and_gradients(model: Layer, batch: Dataset, state: Any = None, rng: Any = None) -> tuple[float, dict[str, Array]]:
    """Mean cross-entropy of a batch, and its gradient by every parameter; `rng` is that of a call."""
    logits, _, pullback = model.vjp(batch.x, state, lengths=batch.lengths, training=True, rng=rng)
    loss, loss_pullback = vjp(softmax_cross_entropy, logits, batch.labels)
    grads: dict[str, Array] = pullback(loss_pullback(xp_of(loss).ones_like(loss))[0])[2]
    return float(loss), grads


def predictions(run: Callable[[Any, Any], Any], data: Dataset, batch: int = 500) -> numpy.ndarray[Any, Any]:
    """The class that `run(x, lengths)` gives the highest logit, for every sequence."""
    return numpy.concatenate([numpy.argmax(run(x, lengths), axis=-1) for x, lengths in data.batches(batch)])


def accuracy(model: Layer, data: Dataset) -> float:
    """Share of the sequences whose class the model names, in inference mode."""
    named = predictions(lambda x, lengths: model(x, lengths=lengths)[0], data)
    return float(numpy.mean(named == data.labels))
