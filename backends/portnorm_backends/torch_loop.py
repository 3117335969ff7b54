"""The time loop of an exported program: torch's `while_loop` operator, so that the numbers of steps and of sequences stay open.

What is written out instead, where the number of steps is fixed or under `torch.jit.trace`, has the steps that it was made with. It takes
them apart by `reshape` and `unbind`, which are the check that goes into the artifact: a trace, and what OpenVINO makes of one, refuse
another number. (By `unbind` alone OpenVINO makes five steps of two sequences of ten steps of one.) Steps taken one by one would be as many
for any input, without an error. Autograd differentiates both.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import has_static_value

from portnorm.arrays import Array, leaves
from portnorm.errors import UnsupportedError
from portnorm.scan import Body, Kept
from portnorm_backends import torch_plain
from portnorm_backends.flat import put_together, taken_apart


def is_followed(carry: Any, xs: Any, kept: Any = None, *, body: Body, reverse: bool = False) -> bool:
    """Whether a program or a trace is made now of a loop that has steps."""
    if kept is not None or not torch_plain.is_followed():
        return False
    return _is_open(xs) or (not reverse and next(leaves(xs)).shape[0] > 0)


def _is_open(xs: Any) -> bool:
    """Whether the number of steps is told when the program runs."""
    return torch.compiler.is_exporting() and not has_static_value(next(leaves(xs)).shape[0])


def loop(carry: Any, xs: Any, kept: Any = None, *, body: Body, reverse: bool = False) -> tuple[Any, tuple[Array, ...], Any]:
    """`portnorm.scan.loop`, of a body that keeps nothing where the number of steps is open. Raises `UnsupportedError` for others."""
    return _open(carry, xs, body, reverse) if _is_open(xs) else _written_out(carry, xs, body)


def _written_out(carry: Any, xs: Any, body: Body) -> tuple[Any, tuple[Array, ...], Kept]:
    """Each step of the example."""
    steps = len(next(leaves(xs)).unbind(0))  # a number, under a trace too
    columns = [None if x is None else x.reshape(steps, *x.shape[1:]).unbind(0) for x in xs]
    outputs, keeps = [], []
    for t in range(steps):
        carry, out, keep = body(carry, tuple(None if column is None else column[t] for column in columns), None)
        outputs.append(out)
        keeps.append(keep)
    return carry, tuple(torch.stack(column) for column in zip(*outputs, strict=True)), Kept(keeps)


def _open(carry: Any, xs: Any, body: Body, reverse: bool) -> tuple[Any, tuple[Array, ...], None]:
    first = next(leaves(xs))
    steps = first.shape[0]
    before, form = taken_apart(carry, torch.is_tensor)
    none = tuple(None if x is None else x.new_zeros(x.shape[1:]) for x in xs)
    after_one, shapes, keep = body(carry, none, None)
    if reverse or keep is not None:
        raise UnsupportedError("a vjp of portnorm is not exported with open time; differentiate the exported program, or fix the steps")
    recorded = _zero_of([*leaves(after_one), *shapes, *leaves(xs)])
    # Not as they came: of parts of one array, as the states of two directions are, torch would fix the batch.
    before = [a + recorded.to(a.dtype) if a.is_floating_point() else a.clone() for a in before]
    outputs = [y.new_zeros((steps, *y.shape)) + recorded.to(y.dtype) for y in shapes]

    def goes_on(t: Array, *_: Array) -> Array:
        return t < steps

    def step(t: Array, *state: Array) -> tuple[Array, ...]:
        at = t.reshape(1)
        x = tuple(None if x is None else x.index_select(0, at).squeeze(0) for x in xs)
        after, ys, _ = body(put_together(form, state[: len(before)]), x, None)
        arrays, _ = taken_apart(after, torch.is_tensor)
        written = [whole.index_copy(0, at, y.unsqueeze(0)) for whole, y in zip(state[len(before) :], ys, strict=True)]
        return t + 1, *[a.clone() for a in arrays], *written  # a state may be what came in, which the operator does not give back

    start = (torch.zeros((), dtype=torch.int64, device=first.device), *before, *outputs)
    if torch.compiler.is_dynamo_compiling():  # `strict=True`, which does not follow filters of warnings
        _, *found = torch.while_loop(goes_on, step, start)
    else:
        with warnings.catch_warnings():  # the operator looks at a gradient that nobody asks for, and warns of that
            warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor", UserWarning)
            _, *found = torch.while_loop(goes_on, step, start)
    return put_together(form, found[: len(before)]), tuple(found[len(before) :]), None


def _zero_of(arrays: list[Array]) -> Array:
    """0, as a sum of none of the values of `arrays`.

    torch 2.13 passes no cotangent from one step to the step before through a state that began without a gradient: without a word, gradients
    would be those of every step alone. So states and outputs begin at a 0 that has one wherever something in the loop has.
    """
    none: list[Array] = [a.reshape(-1)[:0].sum() for a in arrays if a.is_floating_point()]
    return functools.reduce(torch.add, none)
