"""The loops of `descent`, compiled by numba."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy

from portnorm_backends.cpu.compiling import compiled
from portnorm_backends.cpu.sharing import shared
from portnorm_backends.cpu.vectors import Vector, settle, streamed

Two = tuple[Vector, Vector]
Three = tuple[Vector, Vector, Vector]


@streamed
def _sgd(p: Vector, g: Vector, v: Vector, lr: Vector, momentum: Vector) -> Two:
    v = momentum * v + g
    return p - lr * v, v


@streamed
def _rmsprop(p: Vector, g: Vector, s: Vector, lr: Vector, kept: Vector, new: Vector, eps: Vector) -> Two:
    s = kept * s + new * g * g
    return p - lr * g / (s.root() + eps), s


@streamed
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
    *decay: Vector,
) -> Three:
    m, s = beta1 * m + new1 * g, beta2 * s + new2 * g * g
    step = scale * m / (root * s.root() + eps)
    for share in decay:  # one, or none
        step = step + share * p
    return p - step, m, s


Numbers = tuple[float, ...]


def _sgd_step(p: Any, g: Any, v: Any, p_new: Any, v_new: Any, numbers: Numbers, past: bool) -> bool:
    _sgd(p.size, (p, g, v, numbers[0], numbers[1]), (p_new, v_new), past)
    if past:
        settle()
    return True


def _rmsprop_step(p: Any, g: Any, s: Any, p_new: Any, s_new: Any, numbers: Numbers, past: bool) -> bool:
    lr, decay, eps = numbers
    _rmsprop(p.size, (p, g, s, lr, decay, 1.0 - decay, eps), (p_new, s_new), past)
    if past:
        settle()
    return True


def _adam_step(p: Any, g: Any, m: Any, s: Any, p_new: Any, m_new: Any, s_new: Any, numbers: Numbers, past: bool) -> bool:
    scale, root, beta1, beta2, eps = numbers[:5]
    known = (p, g, m, s, scale, root, beta1, 1.0 - beta1, beta2, 1.0 - beta2, eps)
    _adam(p.size, known + numbers[5:], (p_new, m_new, s_new), past)
    if past:
        settle()
    return True


STEPS: dict[str, tuple[Callable[..., bool], int, tuple[int, ...]]] = {
    "sgd_step": (_sgd_step, 2, (2,)),
    "rmsprop_step": (_rmsprop_step, 2, (3,)),
    "adam_step": (_adam_step, 3, (5, 6)),
}
"""By the name of the Op: the loop, how many arrays it writes (it reads one more), and how many numbers it may be given."""


@functools.cache
def compiled_for(name: str, dtype: numpy.dtype[Any], numbers: int) -> Callable[..., bool]:
    """The loop for one type of values and so many numbers. Inputs are declared read-only, so that those which are need no other version."""
    loop, written, _ = STEPS[name]
    value = numba.from_dtype(dtype)
    given = (numba.types.Array(value, 1, "C", readonly=True),) * (written + 1)
    signature = numba.boolean(*given, *(value[::1],) * written, numba.types.UniTuple(numba.float64, numbers), numba.boolean)
    made: Callable[..., bool] = shared(compiled(signatures=signature)(loop), 2 * written + 1)
    return made
