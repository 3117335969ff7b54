"""The loops of `descent`, compiled by numba."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy

from portnorm_backends.cpu.compiling import compiled
from portnorm_backends.cpu.vectors import Vector, elementwise

Two = tuple[Vector, Vector]
Three = tuple[Vector, Vector, Vector]


@elementwise
def _sgd(p: Vector, g: Vector, v: Vector, lr: Vector, momentum: Vector) -> Two:
    v = momentum * v + g
    return p - lr * v, v


@elementwise
def _rmsprop(p: Vector, g: Vector, s: Vector, lr: Vector, kept: Vector, new: Vector, eps: Vector) -> Two:
    s = kept * s + new * g * g
    return p - lr * g / (s.root() + eps), s


@elementwise
def _adam(
    p: Vector,
    g: Vector,
    m: Vector,
    s: Vector,
    scale: Vector,
    root: Vector,
    beta1: Vector,
    new1: Vector,
    beta2: Vector,
    new2: Vector,
    eps: Vector,
) -> Three:
    m, s = beta1 * m + new1 * g, beta2 * s + new2 * g * g
    return p - scale * m / (root * s.root() + eps), m, s


@elementwise
def _adamw(
    p: Vector,
    g: Vector,
    m: Vector,
    s: Vector,
    scale: Vector,
    root: Vector,
    beta1: Vector,
    new1: Vector,
    beta2: Vector,
    new2: Vector,
    eps: Vector,
    decay: Vector,
) -> Three:
    m, s = beta1 * m + new1 * g, beta2 * s + new2 * g * g
    return p - (scale * m / (root * s.root() + eps) + decay * p), m, s


def _sgd_step(p: Any, g: Any, v: Any, p_new: Any, v_new: Any, lr: float, momentum: float) -> None:
    _sgd(p.size, (p, g, v, lr, momentum), (p_new, v_new))


def _rmsprop_step(p: Any, g: Any, s: Any, p_new: Any, s_new: Any, lr: float, decay: float, eps: float) -> None:
    _rmsprop(p.size, (p, g, s, lr, decay, 1.0 - decay, eps), (p_new, s_new))


def _adam_step(
    p: Any,
    g: Any,
    m: Any,
    s: Any,
    p_new: Any,
    m_new: Any,
    s_new: Any,
    scale: float,
    root: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    _adam(p.size, (p, g, m, s, scale, root, beta1, 1.0 - beta1, beta2, 1.0 - beta2, eps), (p_new, m_new, s_new))


def _adamw_step(
    p: Any,
    g: Any,
    m: Any,
    s: Any,
    p_new: Any,
    m_new: Any,
    s_new: Any,
    scale: float,
    root: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
) -> None:
    _adamw(p.size, (p, g, m, s, scale, root, beta1, 1.0 - beta1, beta2, 1.0 - beta2, eps, decay), (p_new, m_new, s_new))


STEPS: dict[str, tuple[Callable[..., None], int, int, int]] = {
    "sgd_step": (_sgd_step, 3, 2, 2),
    "rmsprop_step": (_rmsprop_step, 3, 2, 3),
    "adam_step": (_adamw_step, 4, 3, 6),
    "adam_step without decay": (_adam_step, 4, 3, 5),
}
"""By name: the loop, and how many arrays it reads, arrays it writes, and numbers it is given."""


@functools.cache
def compiled_for(name: str, dtype: numpy.dtype[Any]) -> Callable[..., None]:
    """The loop for one type of values. Inputs are declared read-only, so that those which are need no version of their own."""
    loop, read, written, numbers = STEPS[name]
    value = numba.from_dtype(dtype)
    given = (numba.types.Array(value, 1, "C", readonly=True),) * read
    made: Callable[..., None] = compiled(signatures=numba.void(*given, *(value[::1],) * written, *(numba.float64,) * numbers))(loop)
    return made
