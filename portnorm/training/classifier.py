"""The classifier of the demonstration and of the papers: a recurrent layer, its last hidden state, a linear layer, softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy

from portnorm.arrays import Array, xp_of
from portnorm.cells.variants import NormName, Variant
from portnorm.digits import Dataset
from portnorm.errors import UnsupportedError
from portnorm.layers.layer import Layer
from portnorm.layers.linear import Linear
from portnorm.layers.recurrent import LSTM
from portnorm.layers.sequential import Sequential
from portnorm.losses import softmax_cross_entropy
from portnorm.op import vjp
from portnorm.optimizers import Optimizer
from portnorm.training.history import History
from portnorm.training.loop import Progress, fit


def classifier(
    norm: NormName | Variant | None, inputs: int, hidden: int, classes: int, steps: int, seed: int = 0, batch_first: bool = False
) -> Sequential:
    """LSTM and linear layer that read a sequence and name its class. All variants start with a forget bias of 1."""
    lstm = LSTM(inputs, hidden, norm=norm, return_sequences=False, t_max=steps, forget_bias=1.0, rng=seed, batch_first=batch_first)
    return Sequential(lstm, Linear(hidden, classes, rng=seed))


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
    """`portnorm.fit` on a data set whose last few sequences of an epoch, that do not fill a batch, are left out of it."""
    count = len(data.labels)
    if not 1 <= batch <= count:
        raise UnsupportedError(f"`batch` is {batch}; expected 1 to {count}, the number of training sequences")
    return fit(
        model,
        data.x,
        data.labels,
        data.lengths,
        optimizer=optimizer,
        epochs=epochs,
        batch=batch,
        whole_batches=True,
        clip=clip,
        state_noise=state_noise,
        rng=seed,
        progress=progress or False,
    )


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
