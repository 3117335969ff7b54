"""A graph beside the model that it was made from, as the gates call both; and the same graph with the states of every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy
import onnx
from onnx import helper, numpy_helper
from onnx.inliner import inline_local_functions

from portnorm.arrays import leaves, mapped, to_numpy
from portnorm.errors import ExportError
from portnorm.layers.layer import Layer
from portnorm.layers.quantized import with_rounded_weights
from portnorm_onnx.bounds import ROUNDINGS, NumPyArray, T, nudged, of_turned_rounding
from portnorm_onnx.inputs import CASES, WIDE_CASES, WIDE_ROUNDINGS, Inputs, far_inputs, random_inputs, steps_of
from portnorm_onnx.loops import BEFORE, OPERATORS, count_given, loops_of, state_type
from portnorm_onnx.metadata import graph_facts, on_numpy, rounded
from portnorm_onnx.nothing import guarded
from portnorm_onnx.runtimes import session_of
from portnorm_onnx.signature import TIME, batch_axis, by_place, mask_dims, named_state, recurrent_places, state_names, time_axis
from portnorm_onnx.storage import WIDE, Draft, size_of
from portnorm_onnx.workers import Session


@dataclass
class Graph:
    """A graph beside the model it was made from, with inputs and outputs under the names that the exporter gives them by itself."""

    draft: Draft
    proto: onnx.ModelProto
    model: Layer
    dtype: str
    streaming: bool
    tolerance: float | None = None
    """What is allowed instead of the two gates."""
    counts_from_zero: bool = False
    """Whether the steps before cannot be given, since a tool has folded their count away."""

    @classmethod
    def of(cls, draft: Draft, model: Layer, tolerance: float | None = None) -> Graph:
        facts = graph_facts(draft.proto)
        if facts["quantize"] is not None:
            model = with_rounded_weights(_as_recorded(model, facts["quantize"]))
        there = {v.name for v in (*draft.proto.graph.input, *draft.proto.graph.output)}
        if not (facts["described"] and {facts["names"].get(name, name) for name in ("x", "y")} <= there):
            facts |= by_place(draft.proto, model)
        proto = _renamed(draft.proto, {given: name for name, given in facts["names"].items()})
        dtype = facts["dtype"]
        eager = on_numpy(model, "float32" if dtype == "bfloat16" else dtype)
        dtype = dtype or numpy.dtype(eager.dtype).name
        given = [i.name for i in proto.graph.input]
        states = [f"{name}_0" for name in state_names(eager)]
        if not given or given[0] != "x" or not set(given) <= {"x", "lengths", "mask", *states}:
            raise ExportError(f"the graph has inputs {given}; expected x, and perhaps lengths, mask or {', '.join(states)}")
        return cls(draft, proto, rounded(eager, dtype), dtype, facts["streaming"], tolerance)

    @cached_property
    def wide(self) -> bool:
        """Whether its weights are so large that checks are counted."""
        if self.model.quantizes is None:
            return size_of(self.draft.proto) > WIDE
        own: int = sum(to_numpy(a).nbytes for a in self.model.params.values())  # those of the eager runs, which have no integers
        return own > WIDE

    @property
    def steps(self) -> int | None:
        """How many steps it takes, where that is fixed and more than one."""
        axis = time_axis(self.model)
        length = None if axis is None or self.streaming else self.dims[axis]
        return length if isinstance(length, int) and length > 1 else None

    @property
    def roundings(self) -> range:
        """Seeds of the runs that show what rounding does."""
        return range(WIDE_ROUNDINGS if self.wide else ROUNDINGS)

    @cached_property
    def moved(self) -> list[tuple[int, Layer]]:
        """The same seeds, and models whose numbers are moved, unless they are too many to copy."""
        if self.wide:
            return [(seed, self.model) for seed in self.roundings]
        models = [self.model.copy() for _ in self.roundings]
        for seed, model in enumerate(models):
            model.assign({n: nudged(to_numpy(a), ROUNDINGS + seed, self.dtype) for n, a in model.params.items()})
        return list(enumerate(models))

    def turned(self, run: Callable[..., T], *args: Any) -> list[T]:
        """Of a model that computes with integers, the runs in which every number near the middle of two is rounded to the other one.

        The graph's float32 numbers are a few units in the last place from the eager ones, which moves one in a thousand or so by a whole
        step: a run beside it may have none of these.
        """
        return of_turned_rounding(run, *args) if self.model.quantizes is not None else []

    @property
    def hint(self) -> str:
        """What may be the reason where it differs."""
        return (
            "" if self.model.quantizes is None else "; sums of integers that saturate, or weights that were changed, give such a difference"
        )

    @cached_property
    def exact(self) -> Layer:
        """The model that runs are held against: in float64 unless it is wide."""
        return self.model if self.wide else on_numpy(self.model, "float64")

    @property
    def inputs(self) -> list[str]:
        return [i.name for i in self.proto.graph.input]

    def session(self, runtime: str, proto: onnx.ModelProto | None = None) -> Session:
        """The graph in a runtime; numbers come in the types that its inputs have, and a count that no step asks for is not given."""
        proto = self.proto if proto is None else proto
        run = guarded(session_of(runtime, self.draft.loadable(proto), proto), runtime, proto, self.model, streaming=self.streaming)
        types = {i.name: helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type) for i in proto.graph.input}
        ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in (*proto.graph.input, *proto.graph.output)}
        own = {f"{name}_n": 0 if name.endswith(TIME) else 3 for name in state_names(self.model)}

        def typed(feed: Mapping[str, Any]) -> dict[str, Any]:
            given = {n: a for n, a in feed.items() if n in types or not (n == BEFORE or n.endswith(f"{TIME}_0"))}
            found = run({n: _of_rank(a.astype(types[n], copy=False) if a.dtype.kind == "f" else a, ranks[n]) for n, a in given.items()})
            return {n: _of_rank(a, own.get(n, a.ndim)) for n, a in found.items()}

        return typed

    def allowed(self, usual: float, largest: float) -> float:
        """What a gate allows, or what was asked for."""
        return usual if self.tolerance is None else self.tolerance * max(1.0, largest)

    @property
    def dims(self) -> list[int | str]:
        """The shape of `x` with time, and with names for the lengths that are open."""
        dims = [d.dim_value or d.dim_param for d in self.proto.graph.input[0].type.tensor_type.shape.dim]
        if self.streaming:
            dims.insert(1 if self.model.batch_first else 0, "time")
        return dims

    @property
    def counts(self) -> str | None:
        """The name of the input that says what counts."""
        return next((name for name in ("lengths", "mask") if name in self.inputs), None)

    @property
    def stated(self) -> bool:
        """Whether it takes states."""
        return any(name not in ("x", "lengths", "mask") for name in self.inputs)

    def feed(self, x: NumPyArray, counted: NumPyArray | None, state: Any) -> dict[str, NumPyArray]:
        """The inputs of the graph. Without `state` the states are those before the first step, without lengths or a mask all counts."""
        found = {"x": x if self.model.takes_integers else x.astype(self._element)}
        batch, steps = x.shape[batch_axis(self.model)], steps_of(self.model, x)
        if "lengths" in self.inputs:
            found["lengths"] = numpy.full(batch, steps) if counted is None else numpy.asarray(counted, dtype=numpy.int64)
        if "mask" in self.inputs:
            found["mask"] = numpy.ones(mask_dims(self.model, x.shape), bool) if counted is None else numpy.asarray(counted)
        if self.stated:
            state = self.model.initial_state(batch) if state is None else state
            found |= {name: self._own(a) for name, a in named_state(self.model, state, "_0").items()}
        return found

    @property
    def _element(self) -> Any:
        return helper.tensor_dtype_to_np_dtype(self.proto.graph.output[0].type.tensor_type.elem_type)

    def _own(self, a: Any) -> NumPyArray:
        values = numpy.asarray(a)
        return values.astype(self._element) if values.dtype.kind == "f" else values

    def stepwise(self, session: Session) -> Session:
        """A streaming graph as one that takes the whole sequence."""
        axis = 1 if self.model.batch_first else 0

        def run(feed: Mapping[str, Any]) -> dict[str, Any]:
            x, values, ys = feed["x"], {n: a for n, a in feed.items() if n not in ("x", "lengths", "mask")}, []
            for t in range(x.shape[axis]):
                found = session({"x": numpy.take(x, t, axis=axis), **values})
                values = {f"{n.removesuffix('_n')}_0": a for n, a in found.items() if n != "y"}
                ys.append(found["y"])
            last = {f"{n.removesuffix('_0')}_n": a for n, a in values.items()}
            return {"y": numpy.stack(ys, axis=axis) if self.model.keeps_time else ys[-1], **last}

        return run


def _of_rank(a: NumPyArray, rank: int) -> NumPyArray:
    """A state with as many axes as the graph has for it, or the model: first ones of length 1 come or go."""
    while a.ndim > rank and a.shape[0] == 1:
        a = a[0]
    return a.reshape((1,) * (rank - a.ndim) + a.shape) if a.ndim < rank else a


def _renamed(proto: onnx.ModelProto, names: Mapping[str, str]) -> onnx.ModelProto:
    """A copy without functions, with inputs and outputs renamed. Raises `ExportError` where one of the new names is inside already."""
    copy = onnx.ModelProto()
    copy.CopyFrom(inline_local_functions(proto) if proto.functions else proto)
    inside = {name for n in copy.graph.node for name in n.output} | {i.name for i in copy.graph.input}
    taken = sorted((set(names.values()) - set(names)) & inside)
    if taken:
        ends = ", ".join(v.name for v in (*copy.graph.input, *copy.graph.output))
        raise ExportError(
            f"the graph, of {ends}, has {', '.join(map(repr, taken))} inside: it holds more than the layer, as after a merge; verify the "
            "layer's graph before that, or give the layer of the whole as `model`, made of parts that were exported with a `prefix` each"
        )
    for value in (*copy.graph.input, *copy.graph.output):
        value.name = names.get(value.name, value.name)
    for n in copy.graph.node:
        for ends in (n.input, n.output):
            for k, end in enumerate(ends):
                ends[k] = names.get(end, end)
    return copy


def _as_recorded(model: Layer, names: Sequence[Any]) -> Layer:
    """A model that says itself what it rounds, or one of which the file says which parts."""
    parts = list(model.layers())
    if model.quantizes is not None or len(parts) != len(names):
        return model
    copy = model.copy()
    for part, name in zip(copy.layers(), names, strict=True):
        if name is not None:
            part.quantize = name
    return copy


def random_cases(graph: Graph) -> list[Inputs]:
    """Standard normal inputs for the named lengths of the graph's `x`, with ragged lengths or a mask if it takes them."""
    cases = random_inputs(graph.model, graph.dims, graph.counts, WIDE_CASES if graph.wide else CASES)
    return [*cases, *far_inputs(graph.model, graph.dtype, cases)]


def first(state: Any) -> Any:
    """The same state before the first step."""
    return mapped(lambda a: a if a.dtype.kind == "f" else a * 0, state)


_FIRST_STATE = 5
"""The place of the initial h among the inputs of these operators."""


def with_states(graph: Graph) -> onnx.ModelProto:
    """A copy whose loops take their states as inputs (`h_in_0`, …, numbered by loop; `time_0`) and give them out (`h_out_0`, …)."""
    copy = onnx.ModelProto()
    copy.CopyFrom(graph.proto)
    inner, before, model = copy.graph, [], graph.model
    loops, expected = loops_of(inner), _state_names(model)
    if len(loops) != len(expected):
        raise ExportError(f"the graph has {len(loops)} loops; expected {len(expected)}, one for each direction of each layer")
    for k, (loop, names) in enumerate(zip(loops, expected, strict=True)):
        plain, found = loop.op_type in OPERATORS, helper.get_node_attr_value
        element = state_type(copy, loop)
        states = 0 if plain else len(loop.input) - found(loop, "num_scan_inputs")
        for i, (name, size) in enumerate(names):
            given, last = f"{name}_in_{k}", f"{name}_out_{k}"
            entry = [helper.make_tensor_value_info(v, element, [graph.dims[batch_axis(model)], size]) for v in (given, last)]
            inner.input.append(entry[0])
            inner.output.append(entry[1])
            if plain:  # the operator's state has an axis for the direction
                before.append(helper.make_node("Unsqueeze", [given, "states_axis"], [f"{given}_1"]))
                while len(loop.input) <= _FIRST_STATE + i:
                    loop.input.append("")
                loop.input[_FIRST_STATE + i] = f"{given}_1"
                place, change = 1 + i, helper.make_node("Squeeze", [f"{last}_1", "states_axis"], [last])
            else:
                place = states - len(names) + i
                loop.input[place] = given
                change = helper.make_node("Identity", [f"{last}_1"], [last])
            while len(loop.output) <= place:
                loop.output.append("")
            loop.output[place] = change.input[0] = loop.output[place] or f"{last}_1"
            inner.node.append(change)
    if before:
        inner.initializer.append(numpy_helper.from_array(numpy.array([0]), "states_axis"))
        for n in reversed(before):
            inner.node.insert(0, n)
    counts = [f"{name}_0" for name in state_names(model) if name.endswith(TIME)]
    if counts and not set(counts) & set(graph.inputs):
        graph.counts_from_zero = not count_given(copy)
    return copy


def _state_names(model: Layer) -> list[list[tuple[str, int]]]:
    """Names and sizes of the states of every loop, in the order of the loops."""
    return [
        list(zip(layer.cell.states, layer.state_sizes(), strict=True))
        for _, layer in recurrent_places(model)
        for _ in range(layer.num_layers * layer.num_directions)
    ]


def scan_states(model: Layer, state: Any, side: str) -> dict[str, NumPyArray]:
    """The state under the names of `with_states`: numbered through all layers and directions."""
    flat, named, k = leaves(state), {}, 0
    for _, layer in recurrent_places(model):
        part = [next(flat) for _ in layer.cell.states]
        if layer.timed:
            next(flat)
        for place in range(layer.num_layers * layer.num_directions):
            named.update({f"{name}_{side}_{k}": values[place] for name, values in zip(layer.cell.states, part, strict=True)})
            k += 1
    return named
