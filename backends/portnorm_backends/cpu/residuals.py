"""What the kernels of normalizations share: what is kept for their vjps, and how many values are worth a thread."""

from __future__ import annotations

from typing import Any, NamedTuple

from portnorm_backends.cpu import threads
from portnorm_backends.cpu.layout import RANGE, NumPyArray, computed


class KernelResiduals(NamedTuple):
    """What the vjp of a kernel needs: the input itself and its statistics. Nothing of the size of the input is made."""

    x: NumPyArray
    kept: NumPyArray  # m, d and 1 / σ of each statistic; the mean is m + d. (rows, 3), (3, channels), or (3, groups, channels)
    weight: NumPyArray | None
    bias: NumPyArray | None
    laid_out: tuple[int, int] | None  # of rows: the shape of the parameters as the kernel takes them
    var: NumPyArray | None  # of channels: σ², of length 1 along the normalized axes
    counted: NumPyArray | None = None  # with a mask: the values that entered each statistic
    masked: tuple[NumPyArray, NumPyArray] | None = None
    """With a mask: the ends of groups among the rows that count, and their places."""

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the array that was normalized."""
        shape: tuple[int, ...] = self.x.shape
        return shape

    @property
    def mean(self) -> NumPyArray:
        """μ of each channel, of length 1 along the normalized axes."""
        assert self.var is not None
        mean: NumPyArray = self.kept[:2].sum(axis=0).reshape(self.var.shape)
        return mean

    def statistics(self, correction: int = 0) -> tuple[NumPyArray, NumPyArray]:
        """μ and the biased σ² of each channel."""
        assert self.var is not None
        return self.mean, self.var


def cotangents(p: Any, d: NumPyArray) -> NumPyArray | None:
    """Those of a parameter, in its type and shape, from their sums."""
    return None if p is None else d.astype(computed(p.dtype)).astype(p.dtype, copy=False).reshape(p.shape)


def as_wide_as(x: NumPyArray, dy: Any) -> NumPyArray:
    """`x`, but for a cotangent of more bits in the type that was computed in: the cotangent is not rounded."""
    return x if x.dtype in RANGE or dy.dtype == x.dtype else x.astype(computed(x.dtype))


_WORTH = 2**16
"""Values from which a thread that listens pays: some ten microseconds."""

_WAKES = 2**18
"""Values for each thread that is woken. With fewer, to wake it takes longer than it saves."""

_PIECES = 4
"""Ranges for each thread: one that woke late takes fewer."""


def is_much(values: int) -> bool:
    """Whether so many values are worth threads."""
    return values >= 2 * _WORTH


def plan(count: int, values: int, multiple: int, pieces: int = _PIECES) -> threads.Plan:
    """The ranges of `count` rows or channels with so many values in all, multiples of `multiple`; so many `pieces` for each thread."""
    return threads.plan(count, values / _WORTH, multiple, pieces, values // _WAKES)
