"""The handwritten digits that ship inside scikit-learn (UCI, 1,797 real images of 8 × 8), as sequences of one pixel per step."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy

from portnorm.arrays import require_extra

NumPyArray = numpy.ndarray[Any, Any]


class Dataset(NamedTuple):
    """Labelled sequences; `x` is (time, cases, features), `labels` is (cases,), `lengths` (cases,) or `None` if all are whole."""

    x: NumPyArray
    labels: NumPyArray
    lengths: NumPyArray | None = None

    def take(self, cases: NumPyArray) -> Dataset:
        """The sequences with these numbers."""
        return Dataset(self.x[:, cases, :], self.labels[cases], None if self.lengths is None else self.lengths[cases])

    def batches(self, size: int) -> list[tuple[NumPyArray, NumPyArray | None]]:
        """All sequences in batches of nearly `size`, as `(x, lengths)`."""
        parts = numpy.array_split(numpy.arange(len(self.labels)), max(1, len(self.labels) // size))
        taken = [self.take(part) for part in parts]
        return [(part.x, part.lengths) for part in taken]


def sequential_digits(held_out: int = 360, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Training and held-out images, row by row from the top left: the task of sequential MNIST (Cooijmans et al. 2016) at 64 steps.

    Grey values are scaled to [0, 1]; the split is a fixed random one.
    """
    digits = require_extra("sklearn.datasets", "demo").load_digits()
    x = (digits.images.reshape(len(digits.target), 64, 1) / 16.0).astype(numpy.float32)
    order = numpy.random.default_rng(seed).permutation(len(x))
    whole = Dataset(numpy.ascontiguousarray(x.transpose(1, 0, 2)), digits.target.astype(numpy.int64))
    return whole.take(order[held_out:]), whole.take(order[:held_out])
