"""Weights that a graph holds, and the forms in which one of ours can lie there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy

from portnorm_onnx.symbolic import NumPyArray

Entry = dict[str, Any]
"""What is kept of an array, as JSON says it."""
Base = Callable[[str, str, str, tuple[int, ...]], "NumPyArray | None"]
"""A weight by its name, form, checksum and shape; `None` where the graph has it no more."""


class Weight(Protocol):
    """A weight of a graph, which is read when it is asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self) -> NumPyArray: ...


@dataclass(frozen=True)
class Form:
    """How a weight lies in the graph: the way back to ours, and from ours to its shape there."""

    suffix: str
    back: Callable[[NumPyArray, tuple[int, ...]], NumPyArray]
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]


def _in_our_order(values: NumPyArray, order: tuple[int, ...]) -> NumPyArray:
    blocks = values[0].reshape(len(order), -1, *values.shape[2:])
    found: NumPyArray = blocks[numpy.argsort(order)].reshape(values.shape[1:])
    return found


FORMS = {
    form.suffix: form
    for form in (
        Form("", lambda v, _: v, lambda shape: shape),
        Form(".T", lambda v, _: v.T, lambda shape: shape[::-1]),
        Form(".gates", _in_our_order, lambda shape: (1, *shape)),
        Form(".steps", lambda v, _: v[:, 0], lambda shape: (*shape[:1], 1, *shape[1:])),
    )
}
"""By the end of a name: as it is, transposed, with the gates in ONNX's order, with room for a batch in each row of a table."""


def forms(weight: Weight, shape: tuple[int, ...], order: tuple[int, ...]) -> Iterator[tuple[str, NumPyArray]]:
    """A weight of the graph in every form in which it can be an array of this shape of ours."""
    for suffix, form in FORMS.items():
        if form.shape(shape) == weight.shape and (order or suffix != ".gates"):
            yield suffix, form.back(in_float32(weight.read()), order)


def in_float32(values: NumPyArray) -> NumPyArray:
    """NumPy has no bfloat16 of its own, and neither has a layer on it."""
    return values.astype(numpy.float32) if values.dtype == ml_dtypes.bfloat16 else values
