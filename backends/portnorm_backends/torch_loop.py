"""The time loop of an exported program: torch's `while_loop` operator, so that the numbers of steps and of sequences stay open.

What is written out instead has the steps that it was exported with, and compilers of such programs do not check that: they give as many
steps for any input. Autograd differentiates the operator.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from portnorm.arrays import Array, leaves
from portnorm.errors import UnsupportedError
from portnorm.scan import Body
from portnorm_backends.flat import put_together, taken_apart


def is_open(carry: Any, xs: Any, kept: Any = None, *, body: Body, reverse: bool = False) -> bool:
    """Whether a program is exported now whose number of steps is told when it runs. One with a fixed number is written out."""
    return kept is None and torch.compiler.is_exporting() and isinstance(next(leaves(xs)).shape[0], torch.SymInt)


def loop(carry: Any, xs: Any, kept: Any = None, *, body: Body, reverse: bool = False) -> tuple[Any, tuple[Array, ...], None]:
    """`portnorm.scan.loop` forward in time, of a body that keeps nothing. Raises `UnsupportedError` for others."""
    first = next(leaves(xs))
    steps = first.shape[0]
    before, form = taken_apart(carry, torch.is_tensor)
    before = [a.clone() for a in before]  # of parts of one array, as the states of two directions are, torch would fix the batch
    none = tuple(None if x is None else x.new_zeros(x.shape[1:]) for x in xs)
    _, shapes, keep = body(carry, none, None)
    if reverse or keep is not None:
        raise UnsupportedError("a vjp of portnorm is not exported with open time; differentiate the exported program, or fix the steps")
    outputs = [y.new_zeros((steps, *y.shape)) for y in shapes]

    def goes_on(t: Array, *_: Array) -> Array:
        return t < steps

    def step(t: Array, *state: Array) -> tuple[Array, ...]:
        at = t.reshape(1)
        x = tuple(None if x is None else x.index_select(0, at).squeeze(0) for x in xs)
        after, ys, _ = body(put_together(form, state[: len(before)]), x, None)
        arrays, _ = taken_apart(after, torch.is_tensor)
        written = [whole.index_copy(0, at, y.unsqueeze(0)) for whole, y in zip(state[len(before) :], ys, strict=True)]
        return t + 1, *[a.clone() for a in arrays], *written  # a state may be what came in, which the operator does not give back

    with warnings.catch_warnings():  # the operator looks at a gradient that nobody asks for, and warns of that
        warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor", UserWarning)
        _, *found = torch.while_loop(goes_on, step, (torch.zeros((), dtype=torch.int64, device=first.device), *before, *outputs))
    return put_together(form, found[: len(before)]), tuple(found[len(before) :]), None
