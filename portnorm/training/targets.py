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
from portnorm.training.cases import Cases

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
        raise DTypeError(f"`y` has dtype {cases.y.dtype}; expected integers, the classes of `softmax_cross_entropy`")
    return loss


def check_targets(model: Layer, cases: Cases | None, loss: Loss) -> None:
    """Raise where a target does not fit what the model gives, by a call on the first case."""
    if cases is None:
        return
    one = cases.take(numpy.arange(1))
    result = model(one.x, lengths=one.lengths)[0] if model.recurrent else model(one.x)
    shape = tuple(result.shape)
    expected = shape[:-1] if loss is softmax_cross_entropy else shape
    if loss in (softmax_cross_entropy, mean_squared_error) and tuple(one.y.shape) != expected:
        at = cases.axis if cases.each_step else 0
        given, wanted = ((*s[:at], "cases", *s[at + 1 :]) for s in (tuple(one.y.shape), expected))
        gives = _named((*shape[:at], "cases", *shape[at + 1 :]))
        raise ShapeError(f"`y` has shape {_named(given)}; expected {_named(wanted)} for a model that gives {gives}")
    if loss is not softmax_cross_entropy or not is_concrete(cases.y):
        return
    xp, weights, classes = xp_of(cases.y), cases.counted(), shape[-1]
    labels = xp.astype(cases.y, default_integer(xp), copy=False)
    wrong = (labels != IGNORED) & ((labels < 0) | (labels >= classes))
    if weights is not None:
        wrong = wrong & (weights != 0)
    if bool(xp.any(wrong)):
        first = tuple(int(k) for k in numpy.argwhere(to_numpy(wrong))[0])
        raise ShapeError(
            f"`y` has the label {int(labels[first])} at {first}; expected 0 to {classes - 1}, the classes of the model, or {IGNORED}; "
            "integers are classes, give floating-point numbers for other targets"
        )


def _named(shape: tuple[Any, ...]) -> str:
    return f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"


def evaluate(model: Layer, cases: Cases, loss: Loss, batch: int = 32) -> float:
    """The loss of all cases in inference mode: the mean over every target that counts."""
    found: list[tuple[float, float]] = []
    for part in cases.batches(batch):
        result = model(part.x, lengths=part.lengths) if model.recurrent else model(part.x)
        weights = part.counted()
        value = loss(result[0] if model.recurrent else result, part.y, *(() if weights is None else (weights,)))
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
