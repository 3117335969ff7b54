"""Losses over cases: which one a target is for, whether it fits the model, and the mean over many batches."""

from __future__ import annotations

from typing import Any

import numpy

from portnorm.arrays import Array, is_concrete, to_numpy, xp_of
from portnorm.dtypes import default_integer, is_kind
from portnorm.errors import DTypeError, ShapeError, UnsupportedError
from portnorm.layers.layer import Layer
from portnorm.losses import mean_squared_error, softmax_cross_entropy
from portnorm.op import Op
from portnorm.training.cases import Cases, told_of_argument

Loss = Op[..., Any]

IGNORED = -100
"""The label that `softmax_cross_entropy` leaves out."""


def loss_of(loss: Any, cases: Cases) -> Loss:
    """The loss that is meant; raises `UnsupportedError` for what is none, `DTypeError` where the targets are not of its type."""
    if loss is None:
        return softmax_cross_entropy if is_kind(xp_of(cases.y), cases.y.dtype, "integral") else mean_squared_error
    if not isinstance(loss, Op):
        raise UnsupportedError(f"`loss` is {loss!r}; expected an Op of result, target and weights, such as portnorm.softmax_cross_entropy")
    if loss is softmax_cross_entropy and not is_kind(xp_of(cases.y), cases.y.dtype, "integral"):
        raise DTypeError(f"`y` has dtype {cases.y.dtype}; expected integers, the classes of `softmax_cross_entropy`: y.astype(int)")
    return loss


def target_of(result: Array, y: Array, loss: Loss) -> Array:
    """`y`, with an axis of one behind it where the model gives one number for each and `y` has no axis for it."""
    plain = loss is mean_squared_error and y.ndim + 1 == result.ndim and result.shape[-1] == 1
    return y[..., None] if plain else y


def check_targets(model: Layer, cases: Cases, loss: Loss) -> None:
    """Raise where a target does not fit what the model gives, by a call on the first case."""
    one, y = cases.take(numpy.arange(1)), cases.y
    with told_of_argument(cases.name):
        result = model(one.x, lengths=one.lengths)[0] if model.recurrent else model(one.x)
    at = cases.axis if cases.each_step else 0
    gives: tuple[int, ...] = (*result.shape[:at], cases.count, *result.shape[at + 1 :])
    if loss is softmax_cross_entropy:
        if not is_kind(xp_of(y), y.dtype, "integral"):
            raise DTypeError(f"`{cases.name}y` has dtype {y.dtype}; expected integers, the classes of the model: y.astype(int)")
        _check_shape(cases, gives[:-1], gives, _way_out_of_classes(tuple(y.shape), gives))
        _check_labels(cases, gives[-1])
    elif loss is mean_squared_error and tuple(target_of(result, one.y, loss).shape) != tuple(result.shape):
        lacks_an_axis = y.ndim + 1 == len(gives)
        _check_shape(cases, gives, gives, "; where these are classes give integers, y.astype(int)" if lacks_an_axis else "")


def _check_shape(cases: Cases, expected: tuple[int, ...], gives: tuple[int, ...], way_out: str) -> None:
    found = tuple(cases.y.shape)
    if found != expected:
        raise ShapeError(
            f"`{cases.name}y` has shape {found} and dtype {cases.y.dtype}; expected {expected} for a model that gives {gives}{way_out}"
        )


def _way_out_of_classes(shape: tuple[int, ...], gives: tuple[int, ...]) -> str:
    """What helps where classes have an axis too many."""
    if len(shape) == len(gives) and shape[-1] == 1:
        return "; that is y[..., 0]"
    return "; of one-hot classes that is y.argmax(-1)" if shape == gives else ""


def _check_labels(cases: Cases, classes: int) -> None:
    if not is_concrete(cases.y):
        return
    xp, weights = xp_of(cases.y), cases.counted()
    labels = xp.astype(cases.y, default_integer(xp), copy=False)
    wrong = (labels != IGNORED) & ((labels < 0) | (labels >= classes))
    if weights is not None:
        wrong = wrong & (weights != 0)
    if bool(xp.any(wrong)):
        first = tuple(int(k) for k in numpy.argwhere(to_numpy(wrong))[0])
        raise ShapeError(
            f"`{cases.name}y` has the label {int(labels[first])} at {first}; expected 0 to {classes - 1}, "
            f"the classes of the model, or {IGNORED}; integers are classes, give floating-point numbers, y.astype(float), for other targets"
        )


def evaluate(model: Layer, cases: Cases, loss: Loss, batch: int = 32) -> float:
    """The loss of all cases in inference mode: the mean over every target that counts."""
    found: list[tuple[float, float]] = []
    for part in cases.batches(batch):
        result = model(part.x, lengths=part.lengths) if model.recurrent else model(part.x)
        weights = part.counted()
        result = result[0] if model.recurrent else result
        value = loss(result, target_of(result, part.y, loss), *(() if weights is None else (weights,)))
        found.append((float(value), _counting(part, weights, loss)))
    whole = sum(share for _, share in found)
    return sum(value * share for value, share in found if share) / whole if whole else 0.0


def _counting(part: Cases, weights: Array | None, loss: Loss) -> float:
    """How much of a batch counts: what its mean is divided by."""
    xp = xp_of(part.y)
    labels = xp.astype(part.y, default_integer(xp), copy=False) if loss is softmax_cross_entropy else None
    if weights is None:
        return float(part.count if labels is None else xp.sum(xp.astype(labels != IGNORED, xp.float32)))
    return float(xp.sum(weights if labels is None else xp.where(labels != IGNORED, weights, 0.0)))
