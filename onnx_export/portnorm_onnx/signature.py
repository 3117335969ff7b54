"""Names of a graph's inputs and outputs, and which state belongs to which layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy
import onnx
from onnx import helper

from portnorm.arrays import leaves, mapped
from portnorm.errors import ShapeError, UnsupportedError
from portnorm.layers.layer import Layer
from portnorm.layers.recurrent import Recurrent
from portnorm.layers.sequential import Sequential
from portnorm.layers.state import PlacedState
from portnorm_onnx.namespace import NAMESPACE
from portnorm_onnx.symbolic import Opset, SymbolicArray, constant, graph_input, node

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


def state_inputs(model: Layer, opset: Opset, dtype: Any, batch: int | str) -> tuple[list[SymbolicArray], Any]:
    """Inputs of a graph for the states of `batch` sequences, and the same as the state that the model takes."""
    inputs, states, target = [], [], opset.target
    for prefix, layer in recurrent_places(model):
        places = layer.num_layers * layer.num_directions
        if target.flat_states and places > 1:
            raise UnsupportedError(
                f"target {target.name!r} takes states of one layer, (batch, features), and this one has {places}; make it a "
                "`Sequential` of layers, which have a state each"
            )
        for name, size in zip(layer.cell.states, layer.state_sizes(), strict=True):
            shape = (batch, size) if target.flat_states else (places, batch, size)
            inputs.append(graph_input(f"{prefix}{name}_0", dtype, shape, opset))
            states.append(NAMESPACE.expand_dims(inputs[-1], axis=0) if target.flat_states else inputs[-1])
        if layer.timed:
            inputs.append(graph_input(f"{prefix}{TIME}_0", "int64", () if target.scalars else (1,), opset))
            states.append(inputs[-1] if target.scalars else NAMESPACE.squeeze(inputs[-1], axis=0))
    flat = iter(states)
    return inputs, mapped(lambda _: next(flat), model.initial_state(1))


def state_outputs(model: Layer, opset: Opset, state: Any, y: SymbolicArray) -> dict[str, SymbolicArray]:
    """The outputs of a graph for a state, shaped as its inputs are.

    What is `y` too is a Reshape of it to the shape that it has where converters of flat graphs meet it: they take no Identity there.
    """
    found: dict[str, SymbolicArray] = {}
    for name, a in named_state(model, state, "_n").items():
        counts, target = name.endswith(f"{TIME}_n"), opset.target
        if counts:
            found[name] = a if target.scalars else NAMESPACE.expand_dims(a, axis=0)
        else:
            found[name] = NAMESPACE.squeeze(a, axis=0) if target.flat_states else a
            if target.flat_states and found[name] is y:
                found[name] = node("Reshape", y, constant(numpy.array(y.dims)))
    return found


def batch_axis(model: Layer) -> int:
    """The axis of `x` that is the batch."""
    return 1 if model.recurrent and not model.batch_first else 0


def time_axis(model: Layer) -> int | None:
    """The axis of `x` that is time; `None` for a model without."""
    return (1 if model.batch_first else 0) if model.recurrent else None


def checked_dims(model: Layer, given: Sequence[int | str] | None, *, streaming: bool, like: Any = None) -> tuple[int | str, ...]:
    """The shape of `x` with time, from `input_shape`, from an `x` that the graph shall take, or as the model says.

    A step has no time: for a streaming graph `given` may leave it out, or have a name there, or 1. The sequences that it is held
    against are of any length.
    """
    dims, time = model.input_dims(), time_axis(model)
    if given is None:
        return dims if like is None or len(numpy.shape(like)) == len(dims) or time is not None else _of_rank(model, numpy.ndim(like))
    if not isinstance(given, list | tuple):
        raise UnsupportedError(f"`input_shape` is {given!r}; expected a tuple such as {dims}")
    given = tuple(given)
    wrong = [d for d in given if isinstance(d, bool) or not (isinstance(d, str) or (isinstance(d, int) and d >= 1))]
    if wrong:
        raise UnsupportedError(f"`input_shape` is {given}; expected numbers from 1 on, and strings for lengths that vary, not {wrong[0]!r}")
    if time is None:
        return given
    if len(given) not in ((len(dims) - 1, len(dims)) if streaming else (len(dims),)):
        expected = (*dims[:time], *dims[time + 1 :]) if streaming else dims
        raise ShapeError(f"`input_shape` is {given}; expected ({', '.join(map(str, expected))}), with numbers for lengths that are fixed")
    if streaming:
        steps = given[time] if len(given) == len(dims) else 1
        if not isinstance(steps, str) and steps != 1:
            raise ShapeError(
                f"`input_shape` is {given}, {steps} steps; a streaming graph is one step and takes no time: "
                f"({', '.join(map(str, (*given[:time], *given[time + 1 :])))})"
            )
        without = given if len(given) < len(dims) else (*given[:time], *given[time + 1 :])
        return (*without[:time], "time", *without[time:])
    return given


def _of_rank(model: Layer, ndim: int) -> tuple[int | str, ...]:
    """The shape of feature maps: the lengths of features as the model says, space open."""
    features, lengths = model.feature_axes(ndim), [d for d in model.input_dims() if isinstance(d, int)]
    if len(features) != len(lengths):
        return model.input_dims()
    known = dict(zip(sorted(features), lengths, strict=True))
    return tuple(known.get(axis, "batch" if axis == 0 else f"space_{axis}") for axis in range(ndim))


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


def by_place(proto: onnx.ModelProto, model: Layer) -> dict[str, Any]:
    """What a graph without metadata shows by itself: names by their places, and whether it is one step."""
    inputs, outputs = list(proto.graph.input), list(proto.graph.output)
    types = [(v.type.tensor_type.elem_type, len(v.type.tensor_type.shape.dim)) for v in inputs]
    counted = ["lengths"] if (onnx.TensorProto.INT64, 1) in types[1:2] else ["mask"] if onnx.TensorProto.BOOL in dict(types[1:2]) else []
    own = ["x", *counted, *(f"{name}_0" for name in state_names(model))]
    rank = types[0][1] if types else 0
    given = ["y", *(f"{name}_n" for name in state_names(model))]
    names = {name: v.name for found, known in ((inputs, own), (outputs, given)) for name, v in zip(known, found, strict=False)}
    return {
        "names": {name: there for name, there in names.items() if name != there},
        "dtype": helper.tensor_dtype_to_np_dtype(outputs[0].type.tensor_type.elem_type).name if outputs else None,
        "streaming": model.recurrent and rank == len(model.input_dims()) - 1,
    }
