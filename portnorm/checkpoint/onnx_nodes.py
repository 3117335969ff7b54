"""The recurrent and normalization nodes of an ONNX model, in bodies too: their arrays by name, and what their attributes say."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import onnx
from onnx import TensorProto, helper, inliner

from portnorm.checkpoint.onnx_constants import WAY_OUT, File, Scope
from portnorm.checkpoint.onnx_steps import PLACED, SEVERAL, Axes, Steps, layout
from portnorm.checkpoint.stored import Held, NumPyArray, Refusal, Said, Stored
from portnorm.errors import CheckpointError

_RECURRENT = ("X", "W", "R", "B", "sequence_lens", "initial_h")
INPUTS: dict[str, tuple[str, ...]] = {
    "LSTM": (*_RECURRENT, "initial_c", "P"),
    "GRU": _RECURRENT,
    "RNN": _RECURRENT,
    "DynamicQuantizeLSTM": (*_RECURRENT, "initial_c", "P", "W_scale", "W_zero_point", "R_scale", "R_zero_point"),
    "LayerNormalization": ("X", "scale", "bias"),
    "InstanceNormalization": ("X", "scale", "bias"),
    "GroupNormalization": ("X", "scale", "bias"),
    "RMSNormalization": ("X", "scale"),
    "BatchNormalization": ("X", "scale", "bias", "mean", "var"),
}
"""Operators that are read, and the names of their inputs."""
_LAYERS = {
    "DynamicQuantizeLSTM": "LSTM",
    "LayerNormalization": "LayerNorm",
    "InstanceNormalization": "InstanceNorm",
    "GroupNormalization": "GroupNorm",
    "RMSNormalization": "RMSNorm",
    "BatchNormalization": "BatchNorm",
}
_DIRECTIONS = {"forward": 1, "reverse": 1, "bidirectional": 2}
_FUNCTIONS: dict[str, tuple[str, ...]] = {
    "LSTM": ("gate_activation", "activation", "output_activation"),
    "GRU": ("gate_activation", "activation"),
    "RNN": ("activation",),
}
_USUAL = {"gate_activation": "Sigmoid", "activation": "Tanh", "output_activation": "Tanh"}
_NUMBERS: dict[str, tuple[float, ...]] = {
    "hardsigmoid": (0.2, 0.5),
    "leakyrelu": (0.01,),
    "thresholdedrelu": (1.0,),
    "elu": (1.0,),
    "affine": (1.0, 0.0),
    "scaledtanh": (1.0, 1.0),
}
"""Functions that take numbers, one after the other out of activation_alpha and activation_beta, and the usual ones."""
_KNOWN = {"sigmoid": "sigmoid", "tanh": "tanh", "relu": "relu"}


def held(path: Path) -> Held:
    """For every node the arrays of its inputs, as `<node>/<operator>/…`; a node in a body has the way to it before its name."""
    name = os.fspath(path)
    try:
        model = onnx.load(path, load_external_data=False)
        model = inliner.inline_local_functions(model) if model.functions else model
    except Exception as error:  # protobuf has its own errors
        raise CheckpointError(f"{name!r} is no ONNX model: {error}") from error
    found, taken = Held({}, format="onnx"), set[str]()
    for k, (node, scope, way) in enumerate(_nodes(model, path)):
        own = f"{way}{node.name or f'node{k}'}"
        while own in taken:
            own += "_"
        taken.add(own)
        found.arrays |= _Node(own, node, scope).arrays()
    if not found.arrays:
        raise CheckpointError(f"{name!r} has no node of {', '.join(INPUTS)}, in its graph or in a body inside it")
    return found


def _nodes(model: onnx.ModelProto, path: Path) -> Iterator[tuple[onnx.NodeProto, Scope, str]]:
    """(node, its scope, the way to it) of all nodes that are read."""
    file = File(path, model)

    def walk(scope: Scope, way: str) -> Iterator[tuple[onnx.NodeProto, Scope, str]]:
        for k, node in enumerate(scope.graph.node):
            if node.op_type in INPUTS and node.domain in ("", "ai.onnx", "com.microsoft"):
                yield node, scope, way
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    inside = Scope(attribute.g, scope, file, node)
                    yield from walk(inside, f"{way}{node.name or f'{node.op_type}{k}'}/{attribute.name}/")

    yield from walk(Scope(model.graph, None, file), "")


class _Node:
    """Reads one node."""

    def __init__(self, name: str, node: onnx.NodeProto, scope: Scope):
        self.name, self.node, self.scope = name, node, scope
        self.operator = "LSTM" if node.op_type == "DynamicQuantizeLSTM" else node.op_type
        self.inputs = {key: value for key, value in zip(INPUTS[node.op_type], node.input, strict=False) if value}
        self.attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        self.said = Said(f"the node {name!r} ({node.op_type})", layer=_LAYERS.get(node.op_type, node.op_type))
        self.first: dict[str, NumPyArray] = {}

    def arrays(self) -> dict[str, Stored]:
        extra = self.node.input[len(INPUTS[self.node.op_type]) :]
        if any(extra):
            self._refuse("inputs", f"inputs that are not known: {', '.join(extra)}")
        entries = self._normalization() if self.operator.endswith("Normalization") else self._recurrent()
        found = {}
        for key, of, load in entries:
            full = f"{self.name}/{self.operator}/{key}"
            found[full] = self._stored(full, of, load)
        for key, first in self.first.items():
            full = f"{self.name}/{self.operator}/{key}"
            found[full] = Stored.of(full, first, self.said)
        for name, value in self.attributes.items():
            self._refuse(name, f"{name}={_text(value)}, which is not known here")
        return found

    def _refuse(self, name: str, why: str, *ours: str, every: bool = False) -> None:
        self.said.refused[name] = Refusal(why, ours, every)

    def _stored(self, key: str, of: str, load: Callable[[], NumPyArray]) -> Stored:
        """The array `load` gives, which is made of the input `of`."""
        value = self.inputs[of]
        if not self.scope.is_constant(value):
            why = f"the input {of} is computed in the graph; expected a constant, and it comes from {self.scope.maker(value)}"
            return Stored.unreadable(key, f"node {self.name!r}: {why}; {WAY_OUT}", self.said)
        if "DequantizeLinear" in self.scope.operators(value):
            self._note(f"{of} is dequantized")
        loaded: list[NumPyArray] = []

        def once() -> NumPyArray:
            loaded[:] = loaded or [load()]
            return loaded[0]

        return Stored(key, lambda: (once().shape, once().dtype.name), once, said=self.said)

    def _note(self, text: str) -> None:
        if text not in self.said.notes:
            self.said.notes.append(text)

    def _value(self, key: str) -> NumPyArray:
        return self.scope.value(self.inputs[key])

    # -- recurrent nodes ---------------------------------------------------------------------------------------------------------------

    def _recurrent(self) -> Iterator[tuple[str, str, Callable[[], NumPyArray]]]:
        direction = _text(self.attributes.pop("direction", "forward"))
        count = _DIRECTIONS.get(direction, 1)
        if direction == "reverse":
            self.said.values["direction"] = "reverse"
        elif direction not in _DIRECTIONS:
            self._refuse("direction", f"direction={direction!r}; expected one of {', '.join(_DIRECTIONS)}", "direction")
        self._activations(count)
        batch_first = bool(self.attributes.pop("layout", 0))
        steps = self._around(direction, batch_first)
        for name, usual in (("clip", None), ("input_forget", 0)):
            value = self.attributes.pop(name, usual)
            if value != usual:
                self._refuse(name, f"{name}={value!r}, which no layer here has")
        for inert in ("hidden_size", "output_sequence"):  # the shapes say it
            self.attributes.pop(inert, None)
        before = self.operator == "GRU" and not self.attributes.pop("linear_before_reset", 0)
        self._lengths_of(steps)
        self._states(count, batch_first)
        for d in range(count):
            for key in ("W", "R", "P"):
                if key in self.inputs:
                    yield f"{d}/{'R before reset' if key == 'R' and before else key}", key, self._side(key, d)
            if "B" in self.inputs:
                yield f"{d}/Wb", "B", self._half(d, 0)
                yield f"{d}/Rb", "B", self._half(d, 1)

    def _side(self, key: str, d: int) -> Callable[[], NumPyArray]:
        """One direction of an input."""
        quantized = f"{key}_scale" in self.inputs
        if quantized:
            self._note(f"{key} is dequantized; the operator also rounds what it is multiplied with, step by step, and this does not")
            missing = [k for k in (f"{key}_scale", f"{key}_zero_point") if k in self.inputs and not self.scope.is_constant(self.inputs[k])]
            if missing:
                self._refuse(missing[0], f"{missing[0]}, which is computed in the graph")

        def load() -> NumPyArray:
            whole = self._value(key)
            if whole.ndim == 0 or whole.shape[0] <= d:
                raise CheckpointError(f"node {self.name!r}: {key} has shape {whole.shape}; expected one entry for each direction")
            if not quantized:
                side: NumPyArray = whole[d]
                return side
            scale = self._value(f"{key}_scale")[d]
            zero = self._value(f"{key}_zero_point")[d] if f"{key}_zero_point" in self.inputs else numpy.zeros((), whole.dtype)
            real: NumPyArray = ((whole[d].astype(numpy.int32) - zero.astype(numpy.int32)) * scale).astype(numpy.float32)
            return real.T  # (inputs, gates · hidden) there

        return load

    def _half(self, d: int, half: int) -> Callable[[], NumPyArray]:
        def load() -> NumPyArray:
            side = self._side("B", d)()
            if side.ndim != 1 or side.size % 2:
                raise CheckpointError(f"node {self.name!r}: B has the shape {side.shape} for a direction; expected two biases in a row")
            return side[: side.size // 2] if half == 0 else side[side.size // 2 :]

        return load

    def _around(self, direction: str, batch_first: bool) -> Steps:
        """What the graph does to the order of steps and axes before the node and after it."""
        steps, output = Steps(self.scope), dict(enumerate(self.node.output))
        before = steps.before(self.inputs.get("X", ""), ("b", "t", "f") if batch_first else ("t", "b", "f"))
        wide: tuple[Axes, Axes] = (("b", "t", "d", "f"), ("b", "d", "f")) if batch_first else (("t", "d", "b", "f"), ("d", "b", "f"))
        ends = steps.after({output[k]: axes for k, axes in enumerate(wide) if output.get(k)})
        if before.turned is not None:
            back = {end.turned is not None for end in ends}
            way = "reverse" if True in back else "backwards"
            ours = f"; its output is {'' if True in back else 'not '}turned back: that is direction={way!r} here"
            unsure = any(end.turned in PLACED or SEVERAL in (end.turned or "") for end in ends) or SEVERAL in before.turned
            sure = direction == "forward" and len(back) == 1 and not unsure
            self._refuse(
                "X",
                f"an input that goes from the last step to the first, or in another order, by {before.turned} of the graph around"
                f"{ours if sure else ''} "
                "(of a file of portnorm.export, portnorm.load gives the layer)",
                "direction",
            )
        elif turned := next((end.turned for end in ends if end.turned is not None), None):
            self._note(f"{turned} of the graph around puts the steps of the output into another order, and this does not")
        if before.placed is not None:
            self._note(f"{before.placed} of the graph around takes the input from places that are not known before it runs")
        for rounding, what in ((before.rounded, "input"), (steps.rounded, "output")):
            if rounding is not None:
                self._note(f"{rounding} of the graph around rounds the {what}, and this does not")
        if before.chosen:
            self._note(f"{_listed(before.chosen)} of the graph around makes the input of another value; the layer takes what the node does")
        if steps.chosen:
            self._note(f"{_listed(steps.chosen)} of the graph around makes another value of the output; the layer gives what the node does")
        outside, given = {_order(axes) for axes in before.ends}, {_order(end.axes) for end in ends}
        own, other = _order(wide[0]), "(time, batch, …)" if batch_first else "(batch, time, …)"
        by = f" ({_listed(before.by)})" if before.by else ""
        if outside == {other} and given <= {other}:
            self._note(f"the graph around has its axes in the order {other}{by}, and so has the layer")
            batch_first = not batch_first
        else:
            sides = {"input": outside if before.by or None not in outside else set(), "output": given - {None}}
            for side, orders in sides.items():
                if found := [order or "in an order that is not known" for order in orders if order != own]:
                    self._note(f"the layer takes and gives {own}, as the node does; the {side} of the graph around is {found[0]}")
        self.said.values["batch_first"] = batch_first
        return steps

    def _activations(self, directions: int) -> None:
        fields = _FUNCTIONS[self.operator]
        names = [_text(a) for a in self.attributes.pop("activations", [])] or [_USUAL[f] for f in fields] * directions
        numbers = {k: list(self.attributes.pop(f"activation_{k}", [])) for k in ("alpha", "beta")}
        found = []
        for name in names:
            low = name.lower()
            own = [numbers[k].pop(0) if numbers[k] else usual for k, usual in zip(numbers, _NUMBERS.get(low, ()), strict=False)]
            slope = next((n for n in (5, 6) if low == "hardsigmoid" and abs(own[0] - 1 / n) < 1e-6 and own[1] == 0.5), None)
            plain = _KNOWN.get(low, f"{name}({', '.join(f'{n:g}' for n in own)})" if own else name)
            found.append(f"hard_sigmoid_{slope}" if slope else plain)
        known = {*_KNOWN.values(), "hard_sigmoid_5", "hard_sigmoid_6"}
        fits = len(found) == directions * len(fields) and not any(numbers.values())
        each = {field: found[k :: len(fields)] for k, field in enumerate(fields)}
        strange = {field: own for field, own in each.items() if not fits or len(set(own)) != 1 or own[0] not in known}
        self.said.values |= {field: own[0] for field, own in each.items() if field not in strange}
        if strange:
            which = ", ".join(f"{field} is {' and '.join(own) or 'missing'}" for field, own in strange.items())
            self._refuse(
                "activations",
                f"activations={names!r}{f' with {numbers}' if any(numbers.values()) else ''}, of which {which}; expected, for every "
                f"direction alike, {len(fields)} of {', '.join(sorted(known))}",
                *strange,
                every=True,
            )

    def _lengths_of(self, steps: Steps) -> None:
        """What sequence_lens is: all steps, an argument of the call, or something that no call says."""
        if "sequence_lens" not in self.inputs:
            return
        name, sizes = self.inputs["sequence_lens"], (11, 13)
        found = [steps.number(self.scope, name, {"t": size, "b": size - 8}) for size in sizes]
        values = [set() if n is None else set(n.reshape(-1).tolist()) for n in found]
        kind = self.scope.start(name)
        if values == [{size} for size in sizes]:
            return
        if kind in ("zeros", "learned") or (values[0] and values[0] == values[1]):
            self._refuse("sequence_lens", "a constant sequence_lens, which a call takes as `lengths`")
        elif kind == "computed":
            self._refuse(
                "sequence_lens", "a sequence_lens that the graph makes of shapes, other than all steps; a call takes it as `lengths`"
            )
        else:
            self._note("sequence_lens is `lengths` of a call")

    def _states(self, directions: int, batch_first: bool) -> None:
        kinds = {key: self.scope.start(self.inputs[key]) for key in ("initial_h", "initial_c") if key in self.inputs}
        for key, kind in kinds.items():
            entry = self.scope.carried(self.inputs[key])
            own = self.node.output[:2] if key == "initial_h" else self.node.output[2:]
            if entry is not None and not self.scope.is_made_of(entry.after, [name for name in own if name]):
                if kind in ("learned", "computed"):
                    why = f"which the {entry.node.op_type} around carries from run to run, and changes"
                    self._refuse(key, f"a first state of its own ({key} is not zero), {why}; a call takes it as `state`")
                    continue
                kind = "given"
            elif entry is not None:
                self._note(f"{key} is carried from run to run by the {entry.node.op_type} around, as the `state` of calls is")
            if kind == "given":
                self._note(f"{key} is in the `state` of a call")
            elif kind == "computed":
                self._refuse(key, f"a first state that the graph computes ({key}); a call takes it as `state`")
            elif kind == "learned" and "given" in kinds.values():
                self._refuse(key, f"a first state of its own ({key} is not zero) beside one that the call gives")
            elif kind == "learned":
                self._learned(key, directions, batch_first)

    def _learned(self, key: str, directions: int, batch_first: bool) -> None:
        """A first state that is in the file, where it is the same for the whole batch."""
        values = self.scope.first(self.inputs[key])
        if values is not None and values.ndim <= 3:
            values = values.reshape((1,) * (3 - values.ndim) + values.shape)
            values = numpy.moveaxis(values, 0 if batch_first else 1, 0)
        if values is None or values.ndim != 3 or values.shape[0] < 1 or values.shape[1] not in (1, directions):
            self._refuse(key, f"a first state of its own ({key} is not zero), which the graph computes; a call takes it as `state`")
        elif numpy.any(values != values[:1]):
            self._refuse(key, f"a first state of its own ({key} is not zero), which differs within the batch; a call takes it as `state`")
        else:
            self._note(f"{key} is not zero: the layer learns its first state")
            for d in range(directions):
                self.first[f"{d}/{key}"] = numpy.ascontiguousarray(values[0, min(d, values.shape[1] - 1)])

    # -- normalization nodes -----------------------------------------------------------------------------------------------------------

    def _normalization(self) -> Iterator[tuple[str, str, Callable[[], NumPyArray]]]:
        values = self.said.values
        values["eps"] = float(self.attributes.pop("epsilon", 1e-5))
        self.attributes.pop("consumed_inputs", None)
        stash = self.attributes.pop("stash_type", TensorProto.FLOAT)
        if stash != TensorProto.FLOAT:
            try:
                kind = TensorProto.DataType.Name(stash).lower()
            except ValueError:
                kind = "no type"
            wide = stash == TensorProto.DOUBLE and self._is_constant("scale") and self.scope.shape(self.inputs["scale"])[1] == "float64"
            if not wide:
                self._refuse("stash_type", f"stash_type={stash} ({kind}), the type of its statistics; expected 1 (float), as they are here")
        if moved := layout(self.scope, self.inputs.get("X", "")):
            self._note(f"{_listed(moved)} of the graph around moves the axes of the input; the layer takes them as the node does")
        groups, lengths = None, None
        if self.operator == "BatchNormalization":
            values["momentum"] = round(1.0 - float(self.attributes.pop("momentum", 0.9)), 7)
            old = self.scope.file.version() < 7  # where the batch's own statistics are usual
            for name, usual in (("training_mode", 0), ("spatial", 1), ("is_test", 1)):
                value = self.attributes.pop(name, 0 if name == "is_test" and old else usual)
                if value != usual:
                    self._refuse(name, f"{name}={value}; expected {usual}")
            if 7 <= self.scope.file.version() < 14 and any(self.node.output[1:]):  # since then an attribute says it
                self._refuse("outputs", "more than one output, with which it normalizes by the batch's own statistics")
        if self.operator in ("LayerNormalization", "RMSNormalization"):
            lengths = self._lengths(int(self.attributes.pop("axis", -1)))
        if self.operator == "GroupNormalization":
            groups = values["num_groups"] = int(self.attributes.pop("num_groups"))
        for key in INPUTS[self.node.op_type][1:]:
            if key in self.inputs:
                yield key, key, self._parameter(key, groups) if lengths is None else self._repeated(key, lengths)

    def _parameter(self, key: str, groups: int | None) -> Callable[[], NumPyArray]:
        """Before operator set 21 GroupNormalization has one gain for each group."""
        if groups is None or self.scope.file.version() >= 21:
            return lambda: self._value(key)
        shape = self._shape()
        channels = shape[1] if shape is not None and len(shape) > 1 else None
        if channels is None:
            self._refuse("scale", f"one gain for each of {groups} groups, and an input of unknown shape; expected its channels to be known")
            return lambda: self._value(key)
        return lambda: numpy.repeat(self._value(key), channels // groups)

    def _lengths(self, axis: int) -> tuple[int, ...] | None:
        """The lengths of the axes that are normalized together: those of X, and where they are not known those of the parameters."""
        shape = self._shape()
        if axis >= 0 and shape is None:
            self._refuse("axis", f"axis={axis} of an input of unknown shape; expected one that is counted from the end")
            return None
        count = -axis if axis < 0 or shape is None else len(shape) - axis
        given = [self.scope.shape(self.inputs[key])[0] for key in ("scale", "bias") if self._is_constant(key)]
        if not given:
            return None  # which says it is computed
        wide = [(*[1] * (count - len(own)), *own) for own in given]
        known = [None] * count if shape is None else shape[max(len(shape) - count, 0) :]
        lengths = [n if n is not None else max((own[k] for own in wide), default=1) for k, n in enumerate(known)]
        fits = all(len(own) == len(lengths) and all(n in (1, length) for n, length in zip(own, lengths, strict=True)) for own in wide)
        if not fits or any(n is None and length == 1 for n, length in zip(known, lengths, strict=True)):
            shapes = " and ".join(map(str, given))
            x = "unknown shape" if shape is None else f"shape {tuple(shape)}"
            expected = "expected one gain for each value that is normalized together"
            self._refuse("axis", f"axis={axis}, parameters of shape {shapes} and an input of {x}; {expected}")
            return None
        return tuple(lengths)

    def _is_constant(self, key: str) -> bool:
        return key in self.inputs and self.scope.is_constant(self.inputs[key])

    def _repeated(self, key: str, lengths: tuple[int, ...]) -> Callable[[], NumPyArray]:
        """A parameter for each value, of one that is the same along some axes."""
        return lambda: numpy.ascontiguousarray(numpy.broadcast_to(self._value(key), lengths))

    def _shape(self) -> list[int | None] | None:
        """The shape of X, as far as it is known."""
        return self.scope.file.shape(self.inputs.get("X", ""))


def _order(axes: Axes) -> str | None:
    """The order of the axes of a sequence, in words; `None` where it is not known."""
    if axes is None or not {"b", "t"} <= {*axes}:
        return None
    known = [a for a in axes if a in ("b", "t", "f")]
    names = {"b": "batch", "t": "time"}
    return f"({', '.join(names[a] for a in known[:-1])}, …)" if known[-1] == "f" else "with features before the end"


def _listed(names: list[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
