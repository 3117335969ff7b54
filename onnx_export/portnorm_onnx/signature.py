"""Names of a graph's inputs and outputs, and which state belongs to which layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from portnorm.arrays import leaves, mapped
from portnorm.layers.layer import Layer
from portnorm.layers.recurrent import Recurrent
from portnorm.layers.sequential import Sequential
from portnorm.layers.state import PlacedState
from portnorm_onnx.symbolic import Opset, SymbolicArray, constant, graph_input

TIME = "time"
"""The state that counts the steps before."""


def recurrent_places(model: Layer) -> list[tuple[str, Recurrent]]:
    """The recurrent layers, each with what stands before the names of its states: its number, or nothing where it is the only one."""
    found = list(places(model))
    return [("", layer) for _, layer in found] if len(found) == 1 else found


def places(layer: Layer, prefix: str = "") -> Iterator[tuple[str, Recurrent]]:
    """The recurrent layers, each with what stands before the names of its parameters."""
    if isinstance(layer, Recurrent):
        yield prefix, layer
    elif isinstance(layer, Sequential):
        for k, part in enumerate(layer.parts):
            yield from places(part, f"{prefix}{k}.")


def state_names(model: Layer) -> list[str]:
    """The states of all recurrent layers, in the order of the leaves of `model.initial_state`: `h`, `c`, `time`, or `1.h`, …"""
    return [
        f"{prefix}{name}" for prefix, layer in recurrent_places(model) for name in (*layer.cell.states, *((TIME,) if layer.timed else ()))
    ]


def named_state(model: Layer, state: Any, suffix: str) -> dict[str, Any]:
    """A state under the names of a graph's inputs ("_0") or outputs ("_n")."""
    return {f"{name}{suffix}": a for name, a in zip(state_names(model), leaves(state), strict=True)}


def state_inputs(model: Layer, opset: Opset, dtype: Any) -> tuple[list[SymbolicArray], Any]:
    """Inputs of a graph for the states, and the same as the state that the model takes."""
    inputs = []
    for prefix, layer in recurrent_places(model):
        places = layer.num_layers * layer.num_directions
        for name, size in zip(layer.cell.states, layer.state_sizes(), strict=True):
            inputs.append(graph_input(f"{prefix}{name}_0", dtype, (places, "batch", size), opset))
        if layer.timed:
            inputs.append(graph_input(f"{prefix}{TIME}_0", "int64", (), opset))
    flat = iter(inputs)
    return inputs, mapped(lambda _: next(flat), model.initial_state(1))


def batch_axis(model: Layer) -> int:
    """The axis of `x` that is the batch."""
    return 1 if model.recurrent and not model.batch_first else 0


def time_axis(model: Layer) -> int | None:
    """The axis of `x` that is time; `None` for a model without."""
    return (1 if model.batch_first else 0) if model.recurrent else None


def mask_dims(model: Layer, dims: Sequence[int | str]) -> tuple[int | str, ...]:
    """The shape of the mask for an input of this shape: without its features."""
    features = model.feature_axes(len(dims))
    return tuple(d for axis, d in enumerate(dims) if axis not in features)


def first_states(model: Layer) -> Any:
    """The states that layers start from by themselves. The number of steps before is a named constant, so that a check can set it."""
    prefixes = iter([prefix for prefix, _ in recurrent_places(model)])

    def of(layer: Layer) -> Any:
        if isinstance(layer, Sequential):
            return tuple(of(part) for part in layer.parts if part.recurrent)
        if not isinstance(layer, Recurrent):
            return None
        time = constant(0, f"{next(prefixes)}{TIME}_0")
        return PlacedState(None, time if layer.timed else None)

    return of(model)
