"""A recurrent layer under `torch.compile`: one node of its graph, so that what is compiled does not grow with the number of steps.

`portnorm::layer` computes a layer and `portnorm::layer_vjp` its cotangents, both as they are computed without a compiler. Their first
argument says in words which layer that is and how it is called: torch keeps compiled graphs on disk, for other processes to read.
"""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from portnorm.arrays import Array, Differentiable, leaves, mapped
from portnorm.checkpoint.described import LAYERS, of_description
from portnorm.errors import UnsupportedError
from portnorm.layers.layer import Layer
from portnorm.layers.pure import LayerFunction
from portnorm.layers.recurrent import Recurrent
from portnorm.layers.sequential import Sequential
from portnorm.padding import Mask
from portnorm_backends.flat import Place, cotangents_of_call, put_together, taken_apart

_TAGS = (torch.Tag.cudagraph_unsafe,)  # checks of what came look at its values
_PROBED = 2
"""Time and batch of what the shapes of results are found by."""


torch.compiler.assume_constant_result(Layer.told)  # as long as `Layer.changes` stay the same


def call(function: Differentiable, args: tuple[Any, ...]) -> Any:
    """`function(*args)` as one node. The compiler follows this, and compares what is read here before it calls the graph again."""
    assert isinstance(function, LayerFunction)
    layer, (params, buffers, x, state, lengths, random) = function.layer, args
    assert isinstance(layer, Layer)
    state = mapped(lambda a: a if torch.is_tensor(a) else torch.scalar_tensor(a, dtype=torch.int64, device=x.device), state)
    arrays, form = taken_apart((params, buffers, x, state, lengths, random), torch.is_tensor)
    every = _every(layer)
    text = _written((layer.told(), [part.changes for part in every], [part.evaluates for part in every], function.training, form))
    y, *rest = torch.ops.portnorm.layer(text, arrays)
    count = len(rest) - (len(buffers) if function.training else 0)
    new = dict(zip(buffers, rest[count:], strict=True)) if function.training else buffers
    return y, _nested(layer, rest[:count]), new


def is_told(layer: Layer) -> bool:
    """Whether a text can say all that the layer computes: it has no names for classes and functions of users'."""
    every = _every(layer)
    return all((isinstance(part, Sequential) or type(part) in LAYERS.values()) and getattr(part, "reduce", None) is None for part in every)


def _nested(layer: Layer, states: list[Array]) -> tuple[Any, ...]:
    """The state of a layer of the arrays in it, which are taken out of the list."""
    if isinstance(layer, Sequential):
        return tuple([_nested(part, states) for part in layer.parts if part.recurrent])
    assert isinstance(layer, Recurrent)
    return tuple([states.pop(0) for _ in range(len(layer.cell.states) + layer.timed)])


# -- which layer, and how it is called: as a text ----------------------------------------------------------------------------------------


def _written(value: Any) -> str:
    """A literal of Python. The compiler follows this, but not `repr` of what holds other things."""
    if isinstance(value, Place):
        return f"{{'place': {value.index}}}"
    if isinstance(value, Mask):
        return f"{{'mask': {_written(value.values)}, 'axes': {_written(value.axes)}}}"
    if isinstance(value, tuple | list):
        return "(" + "".join([f"{_written(item)}, " for item in value]) + ")"
    if isinstance(value, dict):
        return "{" + "".join([f"{name!r}: {_written(item)}, " for name, item in value.items()]) + "}"
    return f"{value!r}"


class _Call(NamedTuple):
    """What a text says."""

    function: LayerFunction
    form: Any
    """That of `(params, buffers, x, state, lengths, random)`."""


@functools.cache
def _read(text: str) -> _Call:
    told, _, evaluates, training, form = ast.literal_eval(text)
    return _Call(LayerFunction(_layer(json.loads(told)["layer"], evaluates), training), _form(form))


def _form(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"place"}:
        return Place(value["place"])
    if isinstance(value, dict) and value.keys() == {"mask", "axes"}:
        return Mask(_form(value["mask"]), value["axes"])
    if isinstance(value, dict):
        return {name: _form(item) for name, item in value.items()}
    return tuple(map(_form, value)) if isinstance(value, tuple) else value


_SMALL = {"input_size": 1, "hidden_size": 2, "proj_size": 1, "t_max": 1}


def _layer(description: dict[str, Any], evaluates: tuple[bool, ...]) -> Layer:
    """A layer that computes as the described one does. Of its arrays nothing but the names is asked for, so they are small."""
    told = _every_told(description)
    sizes = [{name: value for name, value in d.get("config", {}).items() if name in _SMALL} for d in told]
    for d, own in zip(told, sizes, strict=True):
        d.get("config", {}).update({name: min(value, _SMALL[name]) for name, value in own.items()})
    layer = of_description(description, {"xp": "torch", "device": "meta", "dtype": "float32"})
    for part, own, stays in zip(_every(layer), sizes, evaluates, strict=True):
        part.evaluates = stays
        if isinstance(part, Recurrent):
            part.resize(own)
    return layer


def _every(layer: Layer) -> list[Layer]:
    """The layer, and those inside it."""
    inside = layer.parts if isinstance(layer, Sequential) else ()
    return [layer, *[inner for part in inside for inner in _every(part)]]


def _every_told(description: dict[str, Any]) -> list[dict[str, Any]]:
    """Their descriptions, in the same order."""
    parts = description.get("parts", ())
    inside = [parts[part["as"]] if "as" in part else part for part in parts]
    return [description, *[inner for part in inside for inner in _every_told(part)]]


# -- the nodes -------------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("portnorm::layer", mutates_args=(), tags=_TAGS)  # type: ignore[untyped-decorator]
def _layer_node(text: str, arrays: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """`y`, the arrays of the state, and in training the new buffers in the order of those that came."""
    function, form = _read(text)
    args = put_together(form, arrays)
    with torch.no_grad():
        y, state, buffers = function(*args)
    found = [y, *leaves(state), *([buffers[name] for name in args[1]] if function.training else [])]
    return _apart(found, arrays)


def _apart(found: list[Array], arrays: Sequence[torch.Tensor]) -> list[Array]:
    """The same, none of which shares memory with another or with what came: torch relies on that."""
    used = {a.untyped_storage().data_ptr() for a in arrays}
    result = []
    for a in found:
        a = a.contiguous()
        a = a.clone() if a.untyped_storage().data_ptr() in used else a
        used.add(a.untyped_storage().data_ptr())
        result.append(a)
    return result


@_layer_node.register_fake  # type: ignore[untyped-decorator]
def _(text: str, arrays: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Shapes are those that the layer gives in evaluation for a short sequence without a state, with the true time and batch put in."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily  # torch.asarray makes a real tensor in its mode, which it then refuses

    function, form = _read(text)
    layer = function.layer
    params, buffers, x, *_ = put_together(form, arrays)
    time, batch = (1, 0) if layer.batch_first else (0, 1)
    with unset_fake_temporarily(), torch.no_grad():
        shape = [_PROBED if axis < 2 else int(n) for axis, n in enumerate(x.shape)]
        y, state, _ = LayerFunction(layer, False)(*mapped(_without_values, (params, buffers)), _without_values(x, shape), None, None, None)
    along = {time: x.shape[time], batch: x.shape[batch]} if layer.keeps_time else {0: x.shape[batch]}
    found = [x.new_empty([along.get(axis, n) for axis, n in enumerate(y.shape)], dtype=y.dtype)]
    for a in leaves(state):  # (places, batch, features), or a number of steps
        found.append(x.new_empty([x.shape[batch] if axis == 1 else n for axis, n in enumerate(a.shape)], dtype=a.dtype))
    return [*found, *(a.new_empty(a.shape) for a in (buffers.values() if function.training else ()))]


def _without_values(a: Array, shape: Sequence[int] | None = None) -> Array:
    """An array like `a`, perhaps of another shape."""
    return torch.empty(tuple(map(int, a.shape)) if shape is None else tuple(shape), dtype=a.dtype, device="meta")


@torch.library.custom_op("portnorm::layer_vjp", mutates_args=(), tags=_TAGS)  # type: ignore[untyped-decorator]
def _vjp_node(text: str, arrays: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The cotangent of each floating array: it computes the layer once more, since a graph cannot keep residuals whose number varies."""
    function, form = _read(text)
    args = put_together(form, arrays)
    with torch.no_grad():
        (_, state, _), residuals = function.forward(*args)
        rest = iter(cotangents[1:])
        found = function.vjp(residuals, (cotangents[0], mapped(lambda _: next(rest), state), None))
    by_place = cotangents_of_call((form, {}), found)
    return _apart([by_place.get(k, torch.zeros_like(a)) for k, a in enumerate(arrays) if a.is_floating_point()], [*arrays, *cotangents])


@_vjp_node.register_fake  # type: ignore[untyped-decorator]
def _(text: str, arrays: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [a.new_empty(a.shape) for a in arrays if a.is_floating_point()]


def _setup(ctx: Any, inputs: tuple[str, Sequence[torch.Tensor]], output: list[torch.Tensor]) -> None:
    ctx.text, arrays = inputs
    ctx.save_for_backward(*arrays)


def _backward(ctx: Any, cotangents: list[torch.Tensor]) -> tuple[None, list[torch.Tensor | None]]:
    arrays = ctx.saved_tensors
    found = iter(torch.ops.portnorm.layer_vjp(ctx.text, arrays, cotangents))
    return None, [next(found) if a.is_floating_point() else None for a in arrays]


_layer_node.register_autograd(_backward, setup_context=_setup)


def second_derivative() -> UnsupportedError:
    """What is said to who asks for a graph of the backward pass."""
    return UnsupportedError(
        "`create_graph=True` asks for the backward pass of a portnorm function as a graph, which autograd does not have; "
        "for second derivatives use torch.func (torch.func.grad, hessian, ...), or portnorm.vjp, whose results autograd records"
    )


def _refuse(ctx: Any, cotangents: list[torch.Tensor]) -> None:
    raise second_derivative()


_vjp_node.register_autograd(_refuse)
