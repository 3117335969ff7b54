"""`predict`: what a model gives for many cases, in batches; the other half of `fit`."""

from __future__ import annotations

from typing import Any

import numpy

from portnorm.arrays import Array, device_of, namespace, xp_of
from portnorm.dtypes import default_integer
from portnorm.errors import ShapeError, UnsupportedError
from portnorm.layers.arguments import checked_lengths
from portnorm.layers.layer import Layer
from portnorm.scalars import whole_number
from portnorm.training.cases import checked_sequences, padded, parts, unpacked


def predict(model: Layer, x: Any, lengths: Any = None, *, batch: int = 256) -> Any:
    """What `model` gives for each case of `x`, as `fit` takes it, in inference mode and in batches of at most `batch`.

    `x` is (time, cases, features), or (cases, time, features) with `batch_first`, with `lengths` (cases,): then the result is that of
    `model(x, lengths=lengths)`, (cases, …) where the model gives one result for a sequence (`return_sequences=False`). Or it is a list of
    arrays (time, features) of different length: then the results are in the order of the list, (cases, …), or a list of arrays (time, …) of
    these lengths where the model gives one for each step. The cases of a batch are of nearly one length, so that little is padding.
    Raises `ShapeError`, `DTypeError`, `UnsupportedError`.

    >>> import numpy as np, portnorm as pn
    >>> sequences = [np.ones((n, 3), "float32") for n in (2, 5, 4)]
    >>> model = pn.Sequential(pn.GRU(3, 8, return_sequences=False, rng=0), pn.Linear(8, 2, rng=1))
    >>> pn.predict(model, sequences).argmax(axis=-1).shape  # classes
    (3,)
    >>> [y.shape for y in pn.predict(pn.GRU(3, 8, rng=0), sequences)]
    [(2, 8), (5, 8), (4, 8)]
    """
    if not isinstance(model, Layer):
        raise UnsupportedError(f"`model` is a {type(model).__name__}; expected a layer of portnorm")
    batch, x = whole_number("batch", batch, 1), unpacked(x)
    if isinstance(x, list | tuple):
        if lengths is not None:
            raise UnsupportedError("`lengths` is given beside a list of sequences, which have lengths of their own")
        return _of_sequences(model, x, batch)
    if not model.recurrent and lengths is not None:
        raise UnsupportedError(f"`lengths` is given, but {type(model).__name__} has no recurrent layer")
    xp, axis = namespace(x=x), 0 if model.batch_first or not model.recurrent else 1
    if x.ndim <= axis:
        raise ShapeError(f"`x` has shape {tuple(x.shape)}; expected (time, cases, features)")
    lengths = None if lengths is None else checked_lengths(xp, x, lengths, model.batch_first)
    found = []
    for numbers in parts(numpy.arange(x.shape[axis]), batch):
        at = xp.asarray(numbers, dtype=default_integer(xp), device=device_of(x))
        found.append(_called(model, xp.take(x, at, axis=axis), None if lengths is None else xp.take(lengths, at, axis=0)))
    along = axis if model.recurrent and model.keeps_time else 0
    return found[0] if len(found) == 1 else xp.concat(found, axis=along)


def _of_sequences(model: Layer, sequences: Any, batch: int) -> Any:
    if not model.recurrent:
        raise UnsupportedError(
            f"`x` is a list of sequences, but {type(model).__name__} has no recurrent layer; expected an array (cases, …)"
        )
    if model.keeps_time and model.turns_time:
        raise UnsupportedError(
            "`model` gives the last step of `x` first, where padding is; give each sequence by itself, model(x[:, None])"
        )
    checked_sequences("x", sequences)
    found: list[Any] = [None] * len(sequences)
    order = numpy.argsort([a.shape[0] for a in sequences], kind="stable")
    for numbers in parts(order, batch):
        y = _called(model, *padded("x", [sequences[k] for k in numbers], model.batch_first))
        for j, k in enumerate(numbers):
            if not model.keeps_time:
                found[k] = y[j, ...]
            else:
                found[k] = y[j, : sequences[k].shape[0], ...] if model.batch_first else y[: sequences[k].shape[0], j, ...]
    return found if model.keeps_time else xp_of(found[0]).stack(found)


def _called(model: Layer, x: Array, lengths: Array | None) -> Array:
    return model(x, lengths=lengths)[0] if model.recurrent else model(x)
