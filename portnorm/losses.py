"""Losses, as Ops with a vjp. Both are means over the cases that count, taken in at least float32."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from portnorm.arrays import Array, DType, Namespace, device_of, is_concrete, namespace, require_given
from portnorm.dtypes import default_integer, is_kind, require_floating, require_real, statistics_dtype
from portnorm.errors import DTypeError, ShapeError
from portnorm.op import op
from portnorm.scalars import whole_number
from portnorm.sums import total


class Entropy(NamedTuple):
    """Residuals of `softmax_cross_entropy`, in at least float32."""

    exponentials: Array  # (…, classes), of logits less their maximum
    sums: Array  # (…, 1), of these
    losses: Array  # (…,)
    chosen: Array  # (…, classes), True at the label
    share: Array  # (…,) of each case in the mean; 0 where it does not count, NaN where its label is none
    logits: Array
    weights: Array | None


@op
def softmax_cross_entropy(
    logits: Array, labels: Array, weights: Array | None = None, *, ignore_index: int | None = -100
) -> tuple[Array, Entropy]:
    """Mean cross-entropy in nats of integer `labels` (…,) under the softmax of `logits` (…, classes).

    loss = Σ w · (logΣₖ exp(zₖ) − z_label) / Σ w, with w = 1, or `weights` (…,), for example a mask of valid frames. A case with the label
    `ignore_index` (as in torch; `None` for no such label) or with weight 0 does not count: whatever is there, its gradient is 0, and so is
    that of its weight. Where no case counts the loss is 0, and so is every gradient.

    A scalar in the dtype of `logits`, computed in at least float32. Labels may be integers of any width. Raises `ShapeError`, also for a
    label that counts and is not one of 0 … classes − 1, and `DTypeError`. Where values cannot be looked at (under `jax.jit` or
    `torch.compile`, in Dask, in a graph), such a label makes the loss and the gradient of its case NaN.

    >>> import numpy as np, portnorm as pn
    >>> logits = np.array([[0.0, 0.0], [0.0, np.log(3.0)]])
    >>> float(pn.softmax_cross_entropy(logits, np.array([0, 1])).round(4))
    0.4904
    >>> float(pn.softmax_cross_entropy(logits, np.array([0, -100])).round(4))
    0.6931
    """
    require_given(labels=labels)
    xp = namespace(logits=logits, labels=labels, weights=weights)
    require_floating(xp, logits=logits)
    require_real(xp, weights=weights)
    if logits.ndim == 0:
        raise ShapeError("`logits` has shape (); expected (…, classes)")
    cases, classes = tuple(logits.shape[:-1]), logits.shape[-1]
    if tuple(labels.shape) != cases:
        raise ShapeError(f"`labels` has shape {tuple(labels.shape)}; expected {cases} for `logits` {tuple(logits.shape)}")
    if weights is not None and tuple(weights.shape) != cases:
        raise ShapeError(f"`weights` has shape {tuple(weights.shape)}; expected {cases}, one for each of `labels`")
    z = xp.astype(logits, statistics_dtype(xp, logits.dtype), copy=False)
    labels, share, counts = _shares(xp, labels, weights, ignore_index, z)
    if counts is not None:
        z = xp.where(counts[..., None], z, 0.0)
    shifted = z - xp.max(z, axis=-1, keepdims=True)
    exponentials = xp.exp(shifted)
    sums = xp.sum(exponentials, axis=-1, keepdims=True)
    chosen = xp.equal(labels[..., None], xp.arange(classes, dtype=labels.dtype, device=device_of(logits)))
    losses = xp.log(sums[..., 0]) - xp.sum(xp.where(chosen, shifted, 0.0), axis=-1)
    residuals = Entropy(exponentials, sums, losses, chosen, share, logits, weights)
    return xp.astype(_total(losses * share), logits.dtype, copy=False), residuals


@softmax_cross_entropy.backward
def _(residuals: Entropy, dy: Array, *, ignore_index: int | None = -100) -> tuple[Array, None, Array | None]:
    """dlogits = dy · (softmax − one-hot) · w / Σ w,  dw = dy · (loss of the case − loss) / Σ w"""
    exponentials, sums, losses, chosen, share, logits, weights = residuals
    xp = namespace(exponentials=exponentials)
    d = (exponentials / sums - xp.astype(chosen, share.dtype)) * (share[..., None] * _of(dy, share))
    dweights = None
    if weights is not None and is_kind(xp, weights.dtype, "real floating"):
        dweights = _of_weights(xp, losses, share, weights, dy)
    return xp.astype(d, logits.dtype, copy=False), None, dweights


def _of_weights(xp: Namespace, losses: Array, share: Array, weights: Array, dy: Any) -> Array:
    """dw = dy · (losses − loss) / Σ w where a case counts."""
    counts = _not_zero(xp, share)
    loss = _total(xp.where(counts, losses * share, 0.0))
    along = xp.reshape(xp.astype(weights, share.dtype), (*weights.shape, *(1 for _ in range(share.ndim - weights.ndim))))
    whole = _total(xp.where(counts, xp.broadcast_to(along, share.shape), 0.0))
    d = xp.where(counts, (losses - loss) / xp.where(_not_zero(xp, whole), whole, 1.0), 0.0)
    d = total(d, tuple(range(weights.ndim, d.ndim)))
    return xp.astype(d * _of(dy, d), weights.dtype, copy=False)


def _shares(xp: Namespace, labels: Array, weights: Array | None, ignore_index: int | None, z: Array) -> tuple[Array, Array, Array | None]:
    """Labels as the default integer, the share of each case in the mean, and which cases count: `None` where all are known to.

    Raises `ShapeError` for a label that counts and is no class; where that cannot be seen, the share of its case is NaN.
    """
    labels, ignore_index = _checked_labels(xp, labels, ignore_index)
    cases, classes = tuple(z.shape[:-1]), z.shape[-1]
    there = (labels >= 0) & (labels < classes)
    ignores_a_class = ignore_index is not None and 0 <= ignore_index < classes
    if weights is None and not ignores_a_class and is_concrete(there) and bool(xp.all(there)):
        return labels, xp.full(cases, 1.0 / max(1, math.prod(cases)), dtype=z.dtype, device=device_of(z)), None
    counts = xp.ones_like(there) if ignore_index is None else xp.logical_not(xp.equal(labels, ignore_index))
    if weights is None:
        w = xp.astype(counts, z.dtype)
    else:
        w = xp.where(counts, xp.astype(weights, z.dtype), 0.0)
        counts = _not_zero(xp, w)
        w = xp.where(counts, w, 0.0)  # a constant to who differentiates this
    share = _share(xp, w, _total(w if weights is None else xp.abs(w)))
    wrong = xp.logical_and(counts, xp.logical_not(there))
    if not (is_concrete(labels) and is_concrete(counts)):
        return labels, xp.where(wrong, math.nan, share), counts
    if bool(xp.any(wrong)):
        that_count = xp.where(counts, labels, 0)
        raise ShapeError(
            f"`labels` reach from {int(xp.min(that_count))} to {int(xp.max(that_count))}; expected 0 to {classes - 1}, the classes of "
            f"`logits` {tuple(z.shape)}, or `ignore_index` ({ignore_index})"
        )
    return labels, share, None if bool(xp.all(counts)) else counts


def _checked_labels(xp: Namespace, labels: Array, ignore_index: int | None) -> tuple[Array, int | None]:
    """Labels as the default integer, which holds every class, and the one to be ignored, `None` where no label can be it."""
    if not is_kind(xp, labels.dtype, "integral"):
        raise DTypeError(f"`labels` has dtype {labels.dtype}; expected integers")
    unsigned = is_kind(xp, labels.dtype, "unsigned integer")
    labels = xp.astype(labels, default_integer(xp), copy=False)
    if ignore_index is not None:
        ignore_index = whole_number("ignore_index", ignore_index)
        if (unsigned and ignore_index < 0) or (abs(ignore_index) >= 2**31 and not _holds(xp, labels.dtype, ignore_index)):
            ignore_index = None
    return labels, ignore_index


def _holds(xp: Namespace, dtype: DType, number: int) -> bool:
    limits = xp.iinfo(dtype)
    return bool(limits.min <= number <= limits.max)


def _share(xp: Namespace, w: Array, size: Array) -> Array:
    """w / Σ w; 0 where `size`, a sum of magnitudes, says that all are 0."""
    return w / xp.where(size > 0, _total(w), 1.0)


def _total(a: Array) -> Array:
    return total(a, tuple(range(a.ndim)))


def _not_zero(xp: Namespace, a: Array) -> Array:
    return xp.logical_not(xp.equal(a, 0.0))


def _of(dy: Any, like: Array) -> Any:
    """The cotangent of a loss, an array or a number, for a product with `like`."""
    return namespace(like=like).astype(dy, like.dtype, copy=False) if hasattr(dy, "dtype") else dy


def _size(xp: Namespace, a: Array) -> Any:
    """How many values `a` has, at least 1."""
    count = math.prod(a.shape)
    return max(1, count) if isinstance(count, int) else xp.astype(xp.maximum(count, 1), a.dtype)


class SquaredError(NamedTuple):
    """Residuals of `mean_squared_error`, `error` and `share` in at least float32."""

    error: Array  # like y; 0 where it does not count
    share: Array | None  # like y, of each value in the mean; None where all count alike
    y: Array
    target: Array
    weights: Array | None


@op
def mean_squared_error(y: Array, target: Array, weights: Array | None = None) -> tuple[Array, SquaredError]:
    """Mean of (y − target)² over all values; `target` has the shape of `y`.

    loss = Σ w · (y − target)² / Σ w, with w = 1, or `weights` in the shape of `y` or of its first axes: a mask (time, batch) of the valid
    frames of `y` (time, batch, features). A value with weight 0 does not count: whatever is there, its gradient is 0, and so is that of its
    weight. Where no value counts the loss is 0, and so is every gradient. A scalar in the dtype of `y`, computed in at least float32.
    Raises `ShapeError`, `DTypeError`.

    >>> import numpy as np, portnorm as pn
    >>> float(pn.mean_squared_error(np.array([1.0, 2.0]), np.array([1.0, 5.0])))
    4.5
    >>> float(pn.mean_squared_error(np.array([1.0, 2.0]), np.array([1.0, 5.0]), np.array([2.0, 1.0])))
    3.0
    """
    require_given(target=target)
    xp = namespace(y=y, target=target, weights=weights)
    require_floating(xp, y=y)
    require_real(xp, target=target, weights=weights)
    if tuple(target.shape) != tuple(y.shape):
        raise ShapeError(f"`target` has shape {tuple(target.shape)}; expected {tuple(y.shape)}, that of `y`")
    dtype = statistics_dtype(xp, y.dtype)
    error, share = xp.astype(y, dtype, copy=False) - xp.astype(target, dtype, copy=False), None
    if weights is None:
        losses = error * error / _size(xp, error)
    else:
        if tuple(weights.shape) != tuple(y.shape[: weights.ndim]):
            raise ShapeError(f"`weights` has shape {tuple(weights.shape)}; expected {tuple(y.shape)}, that of `y`, or its first axes")
        along = xp.reshape(xp.astype(weights, dtype), (*weights.shape, *(1 for _ in range(y.ndim - weights.ndim))))
        along = xp.broadcast_to(xp.where(_not_zero(xp, along), along, 0.0), y.shape)
        share = _share(xp, along, _total(xp.abs(along)))
        error = xp.where(_not_zero(xp, share), error, 0.0)
        losses = error * error * share
    return xp.astype(_total(losses), y.dtype, copy=False), SquaredError(error, share, y, target, weights)


@mean_squared_error.backward
def _(residuals: SquaredError, dy: Array) -> tuple[Array, Array | None, Array | None]:
    """dy_i = 2 · (y − target) · w / Σ w,  dw = dy · ((y − target)² − loss) / Σ w"""
    error, share, y, target, weights = residuals
    xp = namespace(error=error)
    d = 2.0 * error * _of(dy, error)
    d = d / _size(xp, error) if share is None else d * share
    dtarget = xp.astype(-d, target.dtype, copy=False) if is_kind(xp, target.dtype, "real floating") else None
    dweights = None
    if weights is not None and share is not None and is_kind(xp, weights.dtype, "real floating"):
        dweights = _of_weights(xp, error * error, share, weights, dy)
    return xp.astype(d, y.dtype, copy=False), dtarget, dweights
