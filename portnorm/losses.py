"""Losses, as Ops with a vjp."""

from __future__ import annotations

from typing import Any

from portnorm.arrays import Array, device_of, namespace
from portnorm.errors import DTypeError, ShapeError
from portnorm.op import op


@op
def softmax_cross_entropy(logits: Array, labels: Array, weights: Array | None = None) -> tuple[Array, tuple[Any, ...]]:
    """Mean cross-entropy in nats of integer `labels` (…,) under the softmax of `logits` (…, classes).

    loss = mean over all cases of logΣₖ exp(zₖ) − z_label, or their mean weighed by `weights` (…,), for example a mask of valid frames.
    A scalar in the dtype of `logits`. Raises `ShapeError` and `DTypeError`.

    >>> import numpy as np, portnorm as pn
    >>> float(pn.softmax_cross_entropy(np.array([[0.0, 0.0], [0.0, np.log(3.0)]]), np.array([0, 1])).round(4))
    0.4904
    """
    xp = namespace(logits=logits, labels=labels, weights=weights)
    if tuple(labels.shape) != tuple(logits.shape[:-1]):
        raise ShapeError(
            f"`labels` has shape {tuple(labels.shape)}; expected {tuple(logits.shape[:-1])} for `logits` {tuple(logits.shape)}"
        )
    if not xp.isdtype(labels.dtype, "integral"):
        raise DTypeError(f"`labels` has dtype {labels.dtype}; expected integers")
    shifted = logits - xp.max(logits, axis=-1, keepdims=True)
    log_probabilities = shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))
    classes = xp.arange(logits.shape[-1], dtype=labels.dtype, device=device_of(logits))
    chosen = xp.equal(xp.expand_dims(labels, axis=-1), classes)
    losses = -xp.sum(xp.where(chosen, log_probabilities, 0.0), axis=-1)
    if weights is None:
        return xp.mean(losses), (log_probabilities, chosen, None)
    share = xp.astype(weights, logits.dtype) / xp.sum(xp.astype(weights, logits.dtype))
    return xp.sum(losses * share), (log_probabilities, chosen, share)


@softmax_cross_entropy.backward
def _(residuals: tuple[Any, ...], dy: Array) -> tuple[Array, None, None]:
    """dlogits = dy · (softmax − one-hot) / cases"""
    log_probabilities, chosen, share = residuals
    xp = namespace(log_probabilities=log_probabilities)
    d = xp.exp(log_probabilities) - xp.astype(chosen, log_probabilities.dtype)
    cases = xp.sum(xp.astype(chosen, log_probabilities.dtype))
    return dy * (d / cases if share is None else d * xp.expand_dims(share, axis=-1)), None, None


@op
def mean_squared_error(y: Array, target: Array) -> tuple[Array, tuple[Any, ...]]:
    """Mean of (y − target)² over all values; `target` has the shape of `y`. A scalar in the dtype of `y`. Raises `ShapeError`.

    >>> import numpy as np, portnorm as pn
    >>> float(pn.mean_squared_error(np.array([1.0, 2.0]), np.array([1.0, 5.0])))
    4.5
    """
    xp = namespace(y=y, target=target)
    if tuple(target.shape) != tuple(y.shape):
        raise ShapeError(f"`target` has shape {tuple(target.shape)}; expected {tuple(y.shape)}, that of `y`")
    error = y - target
    return xp.mean(error * error), (error,)


@mean_squared_error.backward
def _(residuals: tuple[Any, ...], dy: Array) -> tuple[Array, Array]:
    """dy_i = 2 · (y − target) / n"""
    (error,) = residuals
    xp = namespace(error=error)
    d = (2.0 * dy) * error / xp.sum(xp.ones_like(error))
    return d, -d
