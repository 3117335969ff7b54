"""Calls on NumPy arrays that come again and again, such as the steps of a stream. To look at every argument takes several times as long as
a small step; what one call has settled stays settled, and only values are new.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy

from portnorm.arrays import Array, Library, library
from portnorm.layers.names import without_suffix
from portnorm.layers.state import H_BOUND
from portnorm.scan import State

if TYPE_CHECKING:
    from portnorm.layers.stack import Stack

Run = Callable[[Array, State], tuple[Array, State] | None]


class Again:
    """The calls of a layer on `x` of one shape, as long as the layer stays as it was: in inference, without lengths or a mask.

    A call gives `(y, state)`, or `None` where this is not such a call: then the layer has to look at it. Given the state of one cell,
    without an axis for layers, it gives that too where it is a `step`.
    """

    __slots__ = (
        "_arrays",
        "_bounds_h",
        "_changes",
        "_dtype",
        "_library",
        "_looks",
        "_names",
        "_of_cell",
        "_of_layers",
        "_reduce",
        "_runs",
        "_turned",
        "_zeros",
    )

    def __init__(self, layer: Stack, own: Library, batch: int, runs: list[Run]) -> None:
        self._library, self._runs, self._dtype, self._bounds_h = own, runs, layer.dtype, layer.bounds_h
        self._turned = layer.batch_first
        self._changes, self._reduce = layer.changes, layer.reduce
        self._names, self._arrays = list(layer.params), list(layer.params.values())
        self._looks = _looks(self._arrays)
        self._of_cell = [(batch, size) for size in layer.state_sizes()]
        self._of_layers = [(len(runs), *shape) for shape in self._of_cell]
        self._zeros = None if layer.learned else [tuple([numpy.zeros(shape, layer.dtype) for shape in self._of_cell])] * len(runs)

    def __call__(self, layer: Stack, x: Array, state: Any, step: bool = False) -> tuple[Array, State] | None:
        """`x` is known to be of the shape."""
        if x.dtype != self._dtype or not self.holds(layer):
            return None
        given = self._zeros if state is None else self._placed(state, step)
        if given is None:
            return None
        after: list[State] = []
        y = x.transpose(1, 0, 2) if self._turned else x
        for run, before in zip(self._runs, given, strict=True):
            found = run(y, before)
            if found is None:
                return None
            y = found[0]
            after.append(found[1])
        if y is after[-1][0]:
            y = y.copy()
        elif self._turned:
            y = y.transpose(1, 0, 2)
        if given[0] is state:
            return y, after[0]
        return y, tuple([a[None] for a in after[0]] if len(after) == 1 else [numpy.stack(parts) for parts in zip(*after, strict=True)])

    def _placed(self, state: Any, step: bool) -> list[State] | None:
        """The state as each layer takes it; `None` where it has to be looked at."""
        if type(state) not in (tuple, list):
            return None
        shapes = []
        for a in state:
            if type(a) is not numpy.ndarray or a.dtype != self._dtype:
                return None
            shapes.append(a.shape)
        if self._bounds_h and state and state[0].size and float(numpy.abs(state[0]).max()) > H_BOUND:
            return None
        places = len(self._runs)
        if step and places == 1 and shapes == self._of_cell:
            return [state]
        return [_state_of(state, k) for k in range(places)] if shapes == self._of_layers else None

    def holds(self, layer: Stack) -> bool:
        """Whether the layer, its arrays (not their values) and what computes are those that were looked at."""
        arrays, params = self._arrays, layer.params
        return (
            layer.changes == self._changes
            and layer.reduce is self._reduce
            and library(arrays[0]) is self._library
            and [*params] == self._names
            and all(map(operator.is_, params.values(), arrays))
            and _looks(arrays) == self._looks
        )


def again(layer: Stack, x: Array, state: tuple[Array, ...]) -> Again | None:
    """What computes calls like this one, which was computed, and left the `state` (layers, batch, hidden); `None` where nothing does."""
    own, params, places = library(x), layer.params, layer.places()
    if (
        not all(direction.repeats for _, _, direction in places)
        or not all(type(a) is numpy.ndarray and a.dtype == layer.dtype for a in (x, *state, *params.values()))
        or 0 in x.shape
    ):
        return None
    if layer.quantize is not None and any(a.ndim == 2 and a.flags.writeable for a in params.values()):
        return None  # each call rounds the weights that it finds
    steps, batch = (x.shape[1], x.shape[0]) if layer.batch_first else x.shape[:2]
    runs: list[Run] = []
    for k, (suffix, inputs, direction) in enumerate(places):
        given = without_suffix(params, suffix)
        for name in layer.learned:
            del given[name]
        run = direction.again(given, numpy.empty((steps, batch, inputs), x.dtype), _state_of(state, k))
        if run is None:
            return None
        runs.append(run)
    return Again(layer, own, batch, runs)


def _state_of(state: State, k: int) -> State:
    """That of one layer."""
    return tuple([a[k] for a in state])


def _looks(arrays: list[Any]) -> list[Any]:
    """What can be changed of an array in its place beside its values."""
    return [(a.shape, a.dtype, a.strides, a.flags.writeable) for a in arrays]
