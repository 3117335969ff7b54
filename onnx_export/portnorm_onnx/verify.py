"""Does a graph compute what the model computes? Two gates, since one tolerance cannot serve a recurrent net.

**One step, hard.** From the eager states before every step t, one step of the graph agrees with one eager step to a few units in the last
place of the state (2e-6 in float32). This is where a wrong gate order, a wrong epsilon or a missing bias shows.

**Trajectory, relative.** A normalized recurrent net can be chaotic: two correct float32 runs part by 1e-6 after ten steps and by order 1
after a thousand. So the distance of the graph to the float64 run is compared with the distance of the eager run to it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy
import onnx
from onnx import helper, numpy_helper
from onnx.inliner import inline_local_functions

from portnorm.arrays import leaves, mapped, to_numpy
from portnorm.errors import ConformanceError, ExportError, MissingExtraError, UnsupportedError
from portnorm.layers.embedding import Embedding
from portnorm.layers.layer import Layer
from portnorm.layers.quantized import with_rounded_weights
from portnorm.quantization import rounding_moved
from portnorm_onnx.loops import BEFORE, OPERATORS, count_given, loops_of, state_type
from portnorm_onnx.metadata import changes_of, graph_facts, on_numpy, read_layer, rounded
from portnorm_onnx.nothing import empty_cases, floats, guarded, unanswered
from portnorm_onnx.report import Comparison, Outcome, Report
from portnorm_onnx.runtimes import RUNTIMES, runtime_of, session_of
from portnorm_onnx.signature import TIME, batch_axis, by_place, mask_dims, named_state, recurrent_places, state_names, time_axis
from portnorm_onnx.storage import WIDE, Draft, size_of
from portnorm_onnx.workers import Session

T = TypeVar("T")
NumPyArray = numpy.ndarray[Any, Any]
Inputs = tuple[NumPyArray, NumPyArray | None]
"""`x`, and the lengths or the mask, if the graph takes one."""
Stated = tuple[NumPyArray, NumPyArray | None, Any]
"""The same and a state to begin with; `None` for the first one."""

# One step: units in the last place of the largest value, at least of 1; 16 units of float32 are 1.9e-6. A matrix product summed in another
# order moves a state by a few units. float64 has more room, since runtimes keep epsilon and some tables of constants in float32.
STEP_ULP = {"float16": 16, "bfloat16": 16, "float32": 16, "float64": 2**14}
EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
# Where one step amplifies rounding by itself (a gain of 3 over a small variance), eager float32 is further from float64 than that; then
# the graph may be a few times as far.
STEP_FACTOR = 4.0
# How far eager float32 is from float64 is a matter of luck in a net that amplifies rounding: a graph that looks wrong gets a second look
# at the worst of this many eager runs, each with inputs moved by at most one unit in the last place. For one step inputs alone show too
# little, since layer normalization takes back what scales all gates alike, as a change of a single pixel does: there weights are moved too.
ROUNDINGS = 8
# Of a step between two integers: numbers so near to the middle may be rounded to either. What goes into a rounding may differ by the units
# in the last place of the first gate, and is at most 127 steps.
TURN = 127 * 16 * 2.0**-23
# A graph of a fixed number of steps: the states that they are tried from.
ROUNDS = 3
# Trajectory: a multiple of the eager run's own distance to float64, and a floor for where that is zero by chance. Nothing more exact than
# a float64 run is at hand, so there the floor is relative.
FACTOR = 10.0
FLOOR = {"float16": 4e-3, "bfloat16": 4e-2, "float32": 1e-6, "float64": 1e-11}

# (time, batch) of the cases; with `lengths`, every case but the first is ragged, with `mask` it has gaps.
CASES = ((1, 1), (1, 3), (5, 2), (24, 7))
# Of weights from `WIDE` bytes on, where each step reads all of them. There the eager run is held against runs of inputs moved by a unit in
# the last place instead of a float64 run, whose weights alone were twice what the model has.
WIDE_CASES = ((1, 1), (3, 2))
WIDE_ROUNDINGS = 2


ALL = "all"
"""Names every runtime that there is a row for."""


def verify(
    path: str | os.PathLike[str],
    model: Layer | None = None,
    *,
    runtimes: Sequence[str] | str = ("onnxruntime",),
    inputs: Iterable[Any] | None = None,
    tolerance: float | None = None,
) -> Report:
    """Check the ONNX file at `path` against `model`, or the layer that the file says it holds, in the named runtimes.

    The file passes onnx's checker and strict shape inference; then it runs on random inputs of several (time, batch), ragged where it
    takes `lengths`, with gaps where it takes `mask`, or on `inputs`, each `x`, `(x, lengths)` or `(x, mask)`. See this module for the two
    gates. Random input also has nothing to compute: sequences without steps that come with a state, a batch of none, no steps, wherever the
    runtime has an answer (`report.empty`); of `inputs` such a case is refused where it has none. Returns a `Report`.

    What a tool has changed in the file since it was exported stands in `report.changes`, and behind what an error says. A graph that was
    made smaller on purpose, in float16 or with integers for weights, passes no gate for rounding: `tolerance` takes the place of both, the
    largest difference of any output to the float64 run, and of any state after one step, relative to the largest number in it if that is
    more than 1. A file that was exported with `metadata=False` says nothing of its layer and needs `model`.

    Raises `ConformanceError` with the first output and step that differs, `ExportError` where the file is no valid graph or a runtime does
    not run it, and `MissingExtraError` where a runtime is not installed. With `runtimes="all"` every runtime has its row in
    `report.outcomes`, those that are not installed named as such, and what failed is there instead of raised.

    >>> import portnorm as pn, tempfile, os
    >>> path, lstm = os.path.join(tempfile.mkdtemp(), "m.onnx"), pn.LSTM(3, 4, norm="layer", rng=0)
    >>> _ = pn.export(lstm, path)
    >>> report = pn.verify(path, lstm, runtimes=["onnxruntime", "reference"])
    >>> [(outcome.runtime, outcome.status) for outcome in report.outcomes]
    [('onnxruntime', 'passed'), ('reference', 'passed')]
    """
    if model is not None and not isinstance(model, Layer):
        raise UnsupportedError(f"`model` is a {type(model).__name__}; expected a layer of portnorm")
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise UnsupportedError(f"`tolerance` is {tolerance!r}; expected a number that is not negative")
    try:
        proto = onnx.load(os.fspath(path), load_external_data=False)
    except Exception as error:
        raise ExportError(f"cannot read {os.fspath(path)!r} as an ONNX model: {error}") from error
    holds = graph_facts(proto)["holds"]
    if holds:
        raise UnsupportedError(f"{os.fspath(path)!r} holds {holds}, which was checked when it was exported; this checks graphs of layers")
    if model is None:
        model, _ = read_layer(path)
    cases = None if inputs is None else [item if isinstance(item, tuple) else (item, None) for item in inputs]
    changed = changes_of(proto)
    told = ""
    if changed:
        way = "" if tolerance is not None else "; `tolerance=` checks a graph that was made smaller on purpose"
        told = f". A tool has changed the file: {'; '.join(changed)}{way}"
    with Draft(proto, path) as draft:
        try:
            report = check(draft, model, runtimes=runtimes, cases=cases, tolerance=tolerance)
        except (ConformanceError, ExportError) as error:
            raise type(error)(f"{error}{told}") from error
    report.changes = changed
    return report


def check(
    draft: Draft,
    model: Layer,
    *,
    runtimes: Sequence[str] | str,
    cases: Sequence[Inputs] | None = None,
    tolerance: float | None = None,
) -> Report:
    """`verify`, of a model that may not be in its place yet."""
    draft.check_form()
    graph = Graph.of(draft, model, tolerance)
    made = cases if cases is not None else random_cases(graph)
    names = tuple(RUNTIMES) if runtimes == ALL else (runtimes,) if isinstance(runtimes, str) else tuple(runtimes)
    if not made or not names:
        raise UnsupportedError(f"`{'runtimes' if made else 'inputs'}` is empty; expected at least one, or nothing would be checked")
    report = Report.of(draft.proto, draft.path)
    for name in names:
        row = runtime_of(name)
        try:
            version = row.version()
            trajectories, steps, empty = _checked(graph, name, made, with_empty=cases is None)
            report.trajectories += trajectories
            report.steps += steps
            report.empty += empty
            report.outcomes.append(Outcome(name, version, "passed", row.note))
        except MissingExtraError as error:
            if runtimes != ALL:
                raise
            report.outcomes.append(Outcome(name, "", "not installed", str(error)))
        except (ConformanceError, ExportError) as error:
            if runtimes != ALL:
                raise
            status = "differs" if isinstance(error, ConformanceError) else "does not run"
            report.outcomes.append(Outcome(name, version, status, str(error)))
    return report


def _checked(graph: Graph, runtime: str, cases: Sequence[Inputs], *, with_empty: bool) -> tuple[list[Comparison], ...]:
    """(trajectories, steps, cases with nothing to compute), one session after the other, and none beside eager runs of many steps."""
    longest = max(cases, key=lambda case: _steps(graph.model, case[0]))
    session = graph.session(runtime)
    run = graph.stepwise(session) if graph.streaming else session
    empty = _empty(graph, runtime, longest[0]) if with_empty else []
    tried: list[Stated] = [*empty, *((x, counted, None) for x, counted in ([longest] if graph.streaming else cases))]
    outputs = [run(graph.feed(*case)) for case in tried]
    steps = [_one_step(graph, session, runtime, longest)] if graph.streaming else []
    del session, run
    found = [_trajectory(graph, runtime, case, given) for case, given in zip(tried, outputs, strict=True)]
    if not graph.streaming and graph.model.recurrent and any(n.op_type in ("Scan", *OPERATORS) for n in graph.proto.graph.node):
        steps = [_one_step(graph, graph.session(runtime, with_states(graph)), runtime, longest)]
    return found[len(empty) :], steps, found[: len(empty)]


def _empty(graph: Graph, runtime: str, like: NumPyArray) -> list[Stated]:
    """Sequences without steps that come with a state, a batch of none, no steps: wherever the runtime has an answer."""
    found: list[Stated] = []
    for x, counted, state in empty_cases(graph.model, graph.dims, like, graph.counts, streaming=graph.streaming):
        given = numpy.take(x, 0, axis=time_axis(graph.model)) if graph.streaming else x
        if not unanswered(runtime, graph.proto, graph.model, given.shape, streaming=graph.streaming):
            found.append((x, counted, state if graph.stated else None))
    return found


def streaming_trajectory(draft: Draft, whole: Draft, model: Layer, runtime: str) -> list[Comparison]:
    """Step by step through the streaming graph against the sequence graph of the same weights, both in the runtime."""
    graph, sequence = Graph.of(draft, model), Graph.of(whole, model)
    case = random_cases(graph)[-1]
    feed = graph.feed(case[0], None, None)
    stepped = graph.stepwise(graph.session(runtime))(feed)
    found = sequence.session(runtime)(feed)
    own = _trajectory(graph, runtime, (*case, None), stepped)
    comparisons = [
        Comparison(
            runtime,
            name,
            "step by step against the sequence",
            _steps(model, case[0]),
            _distance(name, stepped[name], found[name]),
            2 * own.allowed,
            own.eager_difference,
        )
        for name in stepped
        if not name.endswith("time_n")
    ]
    for c in comparisons:
        if not c.difference <= c.allowed:
            raise ConformanceError(f"{runtime}: {c.output!r} of the streaming graph is {c.difference:.3g} from that of the sequence graph")
    return [max(comparisons, key=lambda c: c.difference)]


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
        run = guarded(session_of(runtime, self.draft.loadable(proto)), runtime, proto, self.model, streaming=self.streaming)
        types = {i.name: helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type) for i in proto.graph.input}

        def typed(feed: Mapping[str, Any]) -> dict[str, Any]:
            given = {n: a for n, a in feed.items() if n in types or not (n == BEFORE or n.endswith(f"{TIME}_0"))}
            return run({n: a.astype(types[n], copy=False) if a.dtype.kind == "f" and n in types else a for n, a in given.items()})

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
        batch, steps = x.shape[batch_axis(self.model)], _steps(self.model, x)
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


def _renamed(proto: onnx.ModelProto, names: Mapping[str, str]) -> onnx.ModelProto:
    """A copy without functions, with inputs and outputs renamed."""
    copy = onnx.ModelProto()
    copy.CopyFrom(inline_local_functions(proto) if proto.functions else proto)
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


def of_turned_rounding(run: Callable[..., T], *args: Any) -> list[T]:
    """Results where what is rounded to integers is taken for a little less, and for a little more."""
    found = []
    for by in (-TURN, TURN):
        with rounding_moved(by):
            found.append(run(*args))
    return found


def random_cases(graph: Graph) -> list[Inputs]:
    """Standard normal inputs for the named lengths of the graph's `x`, with ragged lengths or a mask if it takes them."""
    return random_inputs(graph.model, graph.dims, graph.counts, WIDE_CASES if graph.wide else CASES)


def random_inputs(model: Layer, dims: Sequence[int | str], counts: str | None, sizes: Sequence[tuple[int, int]] = CASES) -> list[Inputs]:
    """The same for a model and the shape of its `x`."""
    rng = numpy.random.default_rng(0)
    cases: list[Inputs] = []
    for steps, batch in sizes:
        # Without time the second length is space: more than one value, or the variance of every channel would be 0.
        usual = {batch_axis(model): batch} | ({time_axis(model): steps} if model.recurrent else {1: steps + 4})
        shape = [d if isinstance(d, int) else usual.get(axis, 5) for axis, d in enumerate(dims)]
        if model.recurrent:  # some may be fixed
            steps, batch = (shape[axis] for axis in (1 if model.batch_first else 0, batch_axis(model)))
        x = rng.standard_normal(shape).astype(model.dtype) if not model.takes_integers else rng.integers(0, _entries(model), shape)
        ragged = rng.integers(1, steps + 1, size=batch)
        ragged[0] = steps
        cases.append((x, None if counts is None else ragged if counts == "lengths" else _random_mask(model, shape, rng)))
    return cases


def _random_mask(model: Layer, shape: Sequence[Any], rng: numpy.random.Generator) -> NumPyArray:
    """Gaps anywhere but in the first case; then, in turn, nothing at all, padding in front, and padding behind."""
    dims: Any = mask_dims(model, shape)
    mask: NumPyArray = rng.uniform(size=dims) < (1.0 if math.prod(dims) == 1 else 0.7)
    if model.recurrent and math.prod(dims) > 1:
        steps = mask if model.batch_first else mask.T  # (batch, time)
        count, order = steps.sum(axis=1, keepdims=True), numpy.arange(steps.shape[1])
        for first, rows in enumerate((numpy.zeros_like(steps), order >= steps.shape[1] - count, order < count)):
            steps[1 + first :: 4] = rows[1 + first :: 4]
    return mask


def _entries(model: Layer) -> int:
    """How many integers a model that starts with an embedding takes."""
    return next(layer.num_embeddings for layer in model.layers() if isinstance(layer, Embedding))


def _trajectory(graph: Graph, runtime: str, case: Stated, outputs: Mapping[str, NumPyArray]) -> Comparison:
    """The graph's distance to the float64 run against the eager run's distance to it, over the whole input, from the state."""
    model, dtype, (x, counted, state) = graph.model, graph.dtype, case
    given: dict[str, Any] = {} if counted is None or graph.counts is None else {graph.counts: counted}
    given |= {} if state is None else {"state": state}
    eager = _outputs(model, x, given)
    exact = eager if graph.wide else _outputs(graph.exact, floats(wide, x), floats(wide, given))
    others: list[dict[str, NumPyArray]] = []
    comparisons = []
    for name, result in outputs.items():
        if name.endswith("time_n"):
            continue
        difference, eager_difference = _distance(name, result, exact[name]), _distance(name, eager[name], exact[name])
        floor = FLOOR[dtype] * (max(1.0, _largest(exact[name])) if dtype in ("float64", "bfloat16") else 1.0)
        if graph.tolerance is None and not difference <= FACTOR * eager_difference + floor:
            if not others:
                others = [_outputs(model, nudged(x, seed, dtype), given) for seed in graph.roundings]
                others += graph.turned(_outputs, model, x, given)
            eager_difference = max(eager_difference, *(_distance(name, other[name], exact[name]) for other in others))
        allowed = graph.allowed(FACTOR * eager_difference + floor, _largest(exact[name]))
        comparisons.append(
            Comparison(runtime, name, _case_name(model, (x, counted)), _steps(model, x), difference, allowed, eager_difference)
        )
        if not difference <= allowed:
            raise ConformanceError(
                f"{runtime}: output {name!r} is {difference:.3g} from the {'eager' if graph.wide else 'float64'} run at "
                f"{comparisons[-1].case}; eager {dtype} is {eager_difference:.3g} from it, "
                f"{'so' if graph.tolerance is None else 'and'} at most {allowed:.3g} is allowed"
                f"{_first_difference(result, exact[name], allowed)}{graph.hint}"
            )
    return max(comparisons, key=lambda c: c.share)


def _one_step(graph: Graph, session: Session, runtime: str, case: Inputs) -> Comparison:
    """From the eager states before every step: one step of the graph against one eager step, left out where a mask says so.

    Where the graph takes so many steps and no other number, all of them take the place of one, from three states.
    """
    model, dtype, (x, counted) = graph.model, graph.dtype, case
    axis, batch, fixed = 1 if model.batch_first else 0, x.shape[batch_axis(model)], graph.steps
    steps = ROUNDS if fixed else _steps(model, x)
    ones = numpy.full(batch, fixed or 1)
    mask = counted if graph.counts == "mask" and not fixed else None
    title = f"{fixed} steps from each of {ROUNDS} states" if fixed else f"one step at each of {steps}"
    title += ", counted as the first" if graph.counts_from_zero and not fixed else ""
    state, worst = model.initial_state(batch), Comparison(runtime, "", title, fixed or steps, 0.0, math.inf, 0.0)
    for t in range(steps):
        step = x if fixed else numpy.take(x, [t], axis=axis)
        now = None if mask is None else numpy.take(mask, [t], axis=axis)
        before = first(state) if graph.counts_from_zero else state
        expected, after = _stepped(graph, model, step, before, now)
        exact = expected if graph.wide else _stepped(graph, graph.exact, floats(wide, step), floats(wide, before), now)[0]
        feed = graph.feed(step, now if now is not None else ones if graph.counts == "lengths" else None, before)
        if graph.streaming:
            feed["x"] = numpy.take(feed["x"], 0, axis=axis)
        else:
            feed |= {name: graph._own(a) for name, a in _scan_states(model, before, "in").items()}
            counts = [a for name, a in named_state(model, before, "").items() if name.endswith(TIME)]
            feed |= {BEFORE: numpy.asarray(counts[0])} if counts else {}
        result = session(feed)
        result, expected, exact = ({n: _live(graph, n, d[n], now) for n in expected} for d in (result, expected, exact))
        for name, values in expected.items():
            difference, eager_difference = _distance(name, result[name], values), _distance(name, values, exact[name])
            allowed = graph.allowed(STEP_ULP[dtype] * EPS[dtype] * max(1.0, _largest(values)), _largest(values))
            if graph.tolerance is None and not difference <= allowed:
                others = [
                    _stepped(graph, other, nudged(step, seed, dtype), nudged(before, seed, dtype), now)[0][name]
                    for seed, other in graph.moved
                ]
                others += [found[name] for found, _ in graph.turned(_stepped, graph, model, step, before, now)]
                others = [_live(graph, name, other, now) for other in others]
                eager_difference = max(eager_difference, *(_distance(name, other, exact[name]) for other in others))
                allowed = max(allowed, STEP_FACTOR * eager_difference)
            if not difference <= allowed:
                raise ConformanceError(
                    f"{runtime}: {name!r} differs by {difference:.3g} at step {t}, from the same state; "
                    f"allowed is {allowed:.3g}{graph.hint}"
                )
            found = Comparison(runtime, name, title, worst.steps, difference, allowed, eager_difference)
            worst = found if found.share >= worst.share else worst
        if graph.counts_from_zero and not fixed:
            after = _stepped(graph, model, step, state, now)[1]
        state = first(after) if fixed else after  # steps are counted in the graph
    return worst


def _stepped(graph: Graph, model: Layer, x: NumPyArray, state: Any, mask: NumPyArray | None) -> tuple[dict[str, NumPyArray], Any]:
    """One eager step: its result and new states under the names of the graph that is asked, and the state as it is."""
    y, after = model(x, state, mask=mask)
    if graph.streaming:
        y = numpy.squeeze(y, axis=1 if model.batch_first else 0) if model.keeps_time else y
        return {"y": y, **{n: numpy.asarray(a) for n, a in named_state(model, after, "_n").items() if not n.endswith(f"{TIME}_n")}}, after
    return {"y": y, **_scan_states(model, after, "out")}, after


def _live(graph: Graph, name: str, values: NumPyArray, mask: NumPyArray | None) -> NumPyArray:
    """What the graph has to give for the sequences that a step is there for; of the others too where these are seen to hold their state.

    An operator without lengths goes on with a state that nobody reads; and a graph without states of its own repeats the one that it
    starts from, and not what is put into its loops.
    """
    if mask is None or (name == "y" and graph.stated):
        return values
    axis = 1 if name == "y" and graph.model.keeps_time and not graph.model.batch_first else 0
    return numpy.compress(mask.ravel(), values, axis=axis)


def first(state: Any) -> Any:
    """The same state before the first step."""
    return mapped(lambda a: a if a.dtype.kind == "f" else a * 0, state)


def wide(a: NumPyArray) -> NumPyArray:
    """In float64."""
    return a.astype(numpy.float64)


def nudged(values: Any, seed: int, dtype: str | None = None) -> Any:
    """Every number moved by at most one unit in its last place, in its own type or `dtype`: as good an input as the one given."""
    rng = numpy.random.default_rng(seed)

    def change(a: NumPyArray) -> NumPyArray:
        unit = numpy.finfo(a.dtype).eps if dtype is None else EPS[dtype]
        return (a * (1 + unit * rng.integers(-1, 2, a.shape))).astype(a.dtype)

    return floats(change, values)


def _largest(values: NumPyArray) -> float:
    return float(numpy.max(numpy.abs(values), initial=0.0))


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


def _scan_states(model: Layer, state: Any, side: str) -> dict[str, NumPyArray]:
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


def _outputs(model: Layer, x: NumPyArray, given: Mapping[str, Any]) -> dict[str, NumPyArray]:
    """The eager results under the names of the graph's outputs; `given` are the lengths or the mask, and the state, by name."""
    if not model.recurrent:
        return {"y": model(x, **given)}
    y, state = model(x, **given)
    return {"y": y, **{name: numpy.asarray(a) for name, a in named_state(model, state, "_n").items()}}


def _distance(name: str, result: NumPyArray, expected: NumPyArray) -> float:
    """Largest absolute difference; NaN against NaN is none."""
    if result.shape != expected.shape:
        raise ConformanceError(f"{name!r} has shape {result.shape} in the runtime but {expected.shape} eagerly")
    both_nan = numpy.isnan(result) & numpy.isnan(expected)
    difference = numpy.where(both_nan, 0.0, numpy.abs(result.astype(numpy.float64) - expected.astype(numpy.float64)))
    return float(numpy.max(difference, initial=0.0))


def _first_difference(result: NumPyArray, expected: NumPyArray, allowed: float) -> str:
    wrong = numpy.argwhere(~(numpy.abs(result.astype(numpy.float64) - expected) <= allowed))
    return f"; first at index {tuple(int(i) for i in wrong[0])}" if len(wrong) else ""


def _steps(model: Layer, x: NumPyArray) -> int:
    axis = time_axis(model)
    return 1 if axis is None else int(x.shape[axis])


def _case_name(model: Layer, case: Inputs) -> str:
    x, counted = case
    if counted is None:
        return f"x {tuple(x.shape)}"
    if counted.dtype == bool:
        return f"x {tuple(x.shape)} with a mask"
    return f"x {tuple(x.shape)}" + (" ragged" if len(set(map(int, counted))) > 1 else " with lengths")
