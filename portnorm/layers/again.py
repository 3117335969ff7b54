"""The next step of a stream of NumPy arrays. To look at every argument takes several times as long as a small step; what one step has
settled stays settled, and only values are new.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy

from portnorm.arrays import Array, Library, library
from portnorm.layers.names import without_suffix
from portnorm.scan import State

H_BOUND = 1.0 + 2.0**-7
"""The largest |h| that may come where |h| ≤ 1 is taken for granted: so much is rounding in the narrowest type."""

if TYPE_CHECKING:
    from portnorm.layers.stack import Stack

Step = Callable[[Array, State], State]


class Again:
    """The steps of a layer on `x` (batch, features) of one shape, as long as the layer stays as it was.

    A call gives `(h, state)`, or `None` where this is not such a step: then the layer has to look at it.
    """

    __slots__ = ("_arrays", "_bounds_h", "_changes", "_dtype", "_library", "_looks", "_of_cell", "_of_layers", "_steps")

    def __init__(self, layer: Stack, own: Library, batch: int, steps: list[Step]) -> None:
        self._library, self._steps, self._dtype = own, steps, layer.dtype
        self._bounds_h = layer.bounds_h
        self._changes, self._arrays = layer.changes, list(layer.params.values())
        self._looks = _looks(self._arrays)
        self._of_cell = [(batch, size) for size in layer.state_sizes()]
        self._of_layers = [(len(steps), *shape) for shape in self._of_cell]

    def __call__(self, layer: Stack, x: Array, state: Any) -> tuple[Array, State] | None:
        """`x` is known to be of the shape."""
        if x.dtype != self._dtype or type(state) not in (tuple, list) or not self.holds(layer):
            return None
        shapes = []
        for a in state:
            if type(a) is not numpy.ndarray or a.dtype != self._dtype:
                return None
            shapes.append(a.shape)
        if self._bounds_h and state and float(numpy.abs(state[0]).max()) > H_BOUND:
            return None
        places = len(self._steps)
        if shapes == self._of_cell and places == 1:
            given = [state]
        elif shapes == self._of_layers:
            given = [_state_of(state, k) for k in range(places)]
        else:
            return None
        after: list[State] = []
        for step, before in zip(self._steps, given, strict=True):
            found = step((after[-1][0] if after else x)[None], before)
            if found is None:
                return None
            after.append(found)
        h = after[-1][0].copy()
        if given[0] is state:
            return h, after[0]
        return h, tuple([a[None] for a in after[0]] if places == 1 else [numpy.stack(parts) for parts in zip(*after, strict=True)])

    def holds(self, layer: Stack) -> bool:
        """Whether the layer, its arrays (not their values) and what computes are those that were looked at."""
        arrays, now = self._arrays, layer.params.values()
        return (
            layer.changes == self._changes
            and library(arrays[0]) is self._library
            and len(now) == len(arrays)
            and all(map(operator.is_, now, arrays))
            and _looks(arrays) == self._looks
        )


def again(layer: Stack, x: Array, state: tuple[Array, ...]) -> Again | None:
    """What computes steps like this one, which has been computed; `state` has (layers, batch, hidden). `None` where there is nothing."""
    own, params = library(x), layer.params
    if not all(type(a) is numpy.ndarray and a.dtype == layer.dtype for a in (x, *state, *params.values())):
        return None
    if layer.quantize is not None and any(a.ndim == 2 and a.flags.writeable for a in params.values()):
        return None  # each call rounds the weights that it finds
    steps: list[Step] = []
    for k, (suffix, inputs, direction) in enumerate(layer.places()):
        given = without_suffix(params, suffix)
        for name in layer.learned:
            del given[name]
        step = direction.again(given, x[None] if k == 0 else numpy.empty((1, len(x), inputs), x.dtype), _state_of(state, k))
        if step is None:
            return None
        steps.append(step)
    return Again(layer, own, len(x), steps)


def _state_of(state: State, k: int) -> State:
    """That of one layer."""
    return tuple([a[k] for a in state])


def _looks(arrays: list[Any]) -> list[Any]:
    """What can be changed of an array in its place beside its values."""
    return [(a.shape, a.dtype, a.strides) for a in arrays]
