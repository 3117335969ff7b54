"""The updates of optimizers for NumPy arrays: each value of a parameter, its gradient and what is remembered is read and written once.

Operation for operation what the definitions in `portnorm.descent` do, so that the bits are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy

from portnorm.arrays import Kernel
from portnorm_backends.cpu import memory
from portnorm_backends.cpu.layout import RANGE, NumPyArray
from portnorm_backends.cpu.residuals import is_much, plan
from portnorm_backends.cpu.warming import ready

_AS_MUCH = 4
"""An update of a value takes as long as normalizing so many."""

_LINES = 64
"""Values of which a range has whole multiples, so that no two threads write into one line of a cache."""


def _flat(arrays: tuple[Any, ...]) -> bool:
    """Whether these are values of one type that lie in memory in one order, and a kernel is there."""
    first = arrays[0]
    if type(first) is not numpy.ndarray or first.dtype not in RANGE or not first.size:
        return False
    for a in arrays:
        if type(a) is not numpy.ndarray or a.dtype != first.dtype or a.shape != first.shape:
            return False
        flags = a.flags
        if not (flags.c_contiguous and flags.aligned):
            return False
    return ready("updates", first.dtype)


@functools.cache
def _loop(name: str, dtype: Any, numbers: int) -> Callable[..., bool]:
    from portnorm_backends.cpu import descending

    return descending.compiled_for(name, dtype, numbers)


def _of(name: str, count: int) -> Kernel:
    """The kernel of an update, which is given the parameter, its gradient and `count` − 1 arrays that are remembered, then numbers."""

    def accepts(*given: Any, out: tuple[NumPyArray, ...] | None = None) -> bool:
        return _flat(given[: count + 1])

    def call(*given: Any, out: tuple[NumPyArray, ...] | None = None) -> tuple[NumPyArray, ...]:
        arrays, numbers = given[: count + 1], tuple(float(n) for n in given[count + 1 :] if n is not None)
        if out is None:
            found = [memory.room_and_cold(arrays[0].shape, arrays[0].dtype) for _ in range(count)]
            made, past = tuple(a for a, _ in found), all(cold for _, cold in found)
        else:  # those of the arguments that change, which have just been read
            made, past = out, False
        kernel, flat = _loop(name, arrays[0].dtype, len(numbers)), [a.reshape(-1) for a in (*arrays, *made)]
        size = flat[0].size

        if is_much(_AS_MUCH * size):
            from portnorm_backends.cpu import sharing

            sharing.call(kernel, plan(size, _AS_MUCH * size, _LINES), size, tuple(flat), whole=(numbers, past))
        else:
            kernel(*flat, numbers, past)
        return made

    return Kernel(call=call, accepts=accepts)


KERNELS = {name: _of(name, count) for name, count in (("sgd_step", 2), ("rmsprop_step", 2), ("adam_step", 3))}
"""By the name of the Op; how many arrays it gives."""
