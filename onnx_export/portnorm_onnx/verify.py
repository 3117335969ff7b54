"""Does a graph compute what the model computes? Two gates, since one tolerance cannot serve a recurrent net.

**One step, hard.** From the eager states before every step t, one step of the graph agrees with one eager step to a few units in the last
place of the state (2e-6 in float32). This is where a wrong gate order, a wrong epsilon or a missing bias shows.

**Trajectory, relative.** A normalized recurrent net can be chaotic: two correct float32 runs part by 1e-6 after ten steps and by order 1
after a thousand. So the distance of the graph to the float64 run is compared with the distance of the eager run to it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy
import onnx
from onnx import helper, numpy_helper

from portnorm.arrays import mapped
from portnorm.errors import ConformanceError, ExportError, UnsupportedError
from portnorm.layers.embedding import Embedding
from portnorm.layers.layer import Layer
from portnorm.layers.recurrent import Recurrent, recurrent_parts
from portnorm_onnx.report import Comparison, Report
from portnorm_onnx.runtimes import Session, session_of

NumPyArray = numpy.ndarray[Any, Any]
Inputs = tuple[NumPyArray, NumPyArray | None]

# One step: units in the last place of the largest value, at least of 1; 16 units of float32 are 1.9e-6. A matrix product summed in another
# order moves a state by a few units. float64 has more room, since runtimes keep epsilon and some tables of constants in float32.
STEP_ULP = {"float16": 16, "float32": 16, "float64": 2**14}
# Where one step amplifies rounding by itself (a gain of 3 over a small variance), eager float32 is further from float64 than that; then
# the graph may be a few times as far.
STEP_FACTOR = 4.0
# How far eager float32 is from float64 is a matter of luck in a net that amplifies rounding: a graph that looks wrong gets a second look
# at the worst of this many eager runs, each with inputs moved by at most one unit in the last place.
ROUNDINGS = 8
# Trajectory: a multiple of the eager run's own distance to float64, and a floor for where that is zero by chance. Nothing more exact than
# a float64 run is at hand, so there the floor is relative.
FACTOR = 10.0
FLOOR = {"float16": 4e-3, "float32": 1e-6, "float64": 1e-11}

# (time, batch) of the cases; with `lengths`, every case but the first is ragged.
CASES = ((1, 1), (1, 3), (5, 2), (24, 7))


def verify(
    path: str | os.PathLike[str],
    model: Layer,
    *,
    runtimes: Sequence[str] = ("onnxruntime",),
    inputs: Iterable[Any] | None = None,
) -> Report:
    """Check the ONNX file at `path` against `model` in the named runtimes.

    The file passes onnx's checker and strict shape inference; then it runs on random inputs of several (time, batch), ragged where it
    takes `lengths`, or on `inputs`, each `x` or `(x, lengths)`. See this module for the two gates. Returns a `Report`.
    Raises `ConformanceError` with the first output and step that differs, and `ExportError` where the file is no valid graph.
    """
    try:
        proto = onnx.load(os.fspath(path))
    except Exception as error:
        raise ExportError(f"cannot read {os.fspath(path)!r} as an ONNX model: {error}") from error
    cases = None if inputs is None else [item if isinstance(item, tuple) else (item, None) for item in inputs]
    return check(proto, model, runtimes=runtimes, cases=cases, path=Path(path))


def check(
    proto: onnx.ModelProto,
    model: Layer,
    *,
    runtimes: Sequence[str],
    cases: Sequence[Inputs] | None = None,
    path: Path | None = None,
) -> Report:
    """`verify`, of a model in memory."""
    check_form(proto)
    eager = model.to(xp="numpy")
    names = [i.name for i in proto.graph.input]
    states = {f"{name}_0" for part in recurrent_parts(eager) for name in (*part.cell.states, "time")}
    if names[0] != "x" or not set(names) <= {"x", "lengths"} | states:
        raise ExportError(f"the graph has inputs {names}; expected x, and perhaps lengths or {', '.join(sorted(states))}")
    dims = [d.dim_value or d.dim_param for d in proto.graph.input[0].type.tensor_type.shape.dim]
    made = cases if cases is not None else random_cases(eager, dims, "lengths" in names)
    if not made or not runtimes:
        raise UnsupportedError(f"`{'runtimes' if made else 'inputs'}` is empty; expected at least one, or nothing would be checked")
    report = Report.of(proto, path)
    for runtime in runtimes:
        whole = session_of(runtime, proto.SerializeToString())
        for case in made:
            report.trajectories.append(_trajectory(eager, proto, whole, runtime, case))
        if eager.recurrent and any(n.op_type in ("Scan", *_OPERATORS) for n in proto.graph.node):
            stepped = session_of(runtime, with_states(proto, eager).SerializeToString())
            report.steps.append(_one_step(eager, proto, stepped, runtime, max(made, key=lambda c: _steps(eager, c[0]))))
    return report


def check_form(proto: onnx.ModelProto) -> None:
    """onnx's checker and strict shape inference; raises `ExportError`."""
    try:
        onnx.checker.check_model(proto, full_check=True)
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the graph is not valid ONNX: {error}") from error


def random_cases(model: Layer, dims: Sequence[int | str], lengths: bool) -> list[Inputs]:
    """Standard normal inputs for the named lengths of the graph's `x`, with ragged lengths if it takes them."""
    rng = numpy.random.default_rng(0)
    cases: list[Inputs] = []
    for steps, batch in CASES:
        # Without time the second length is space: more than one value, or the variance of every channel would be 0.
        free = iter((batch, steps + 4) if not model.recurrent else (batch, steps) if model.batch_first else (steps, batch))
        shape = [d if isinstance(d, int) else next(free, 5) for d in dims]
        x = rng.standard_normal(shape).astype(model.dtype) if not model.takes_integers else rng.integers(0, _entries(model), shape)
        ragged = rng.integers(1, steps + 1, size=batch)
        ragged[0] = steps
        cases.append((x, ragged if lengths else None))
    return cases


def _entries(model: Layer) -> int:
    """How many integers a model that starts with an embedding takes."""
    return next(layer.num_embeddings for layer in model.layers() if isinstance(layer, Embedding))


def _trajectory(model: Layer, proto: onnx.ModelProto, session: Session, runtime: str, case: Inputs) -> Comparison:
    """The graph's distance to the float64 run against the eager run's distance to it, over the whole input."""
    x, lengths = case
    outputs = session(_feed(proto, model, x, lengths, None))
    eager = _outputs(model, x, lengths)
    exact = _outputs(model.to(dtype="float64"), floats(wide, x), lengths)
    dtype = numpy.dtype(model.dtype).name
    comparisons = []
    for name, result in outputs.items():
        if name == "time_n":
            continue
        difference, eager_difference = _distance(name, result, exact[name]), _distance(name, eager[name], exact[name])
        floor = FLOOR[dtype] * (max(1.0, _largest(exact[name])) if dtype == "float64" else 1.0)
        if not difference <= FACTOR * eager_difference + floor:
            others = [_outputs(model, nudged(x, seed), lengths)[name] for seed in range(ROUNDINGS)]
            eager_difference = max(eager_difference, *(_distance(name, other, exact[name]) for other in others))
        allowed = FACTOR * eager_difference + floor
        comparisons.append(Comparison(runtime, name, _case_name(model, case), _steps(model, x), difference, allowed, eager_difference))
        if not difference <= allowed:
            raise ConformanceError(
                f"{runtime}: output {name!r} is {difference:.3g} from the float64 run at {comparisons[-1].case}; eager {dtype} is "
                f"{eager_difference:.3g} from it, so at most {allowed:.3g} is allowed"
                f"{_first_difference(result, exact[name], allowed)}"
            )
    return max(comparisons, key=lambda c: c.difference / c.allowed)


def _one_step(model: Layer, proto: onnx.ModelProto, session: Session, runtime: str, case: Inputs) -> Comparison:
    """From the eager states before every step: one step of the graph against one eager step."""
    x, _ = case
    axis, steps, dtype = 1 if model.batch_first else 0, _steps(model, x), numpy.dtype(model.dtype).name
    double, ones = model.to(dtype="float64"), numpy.ones(x.shape[0 if model.batch_first else 1], dtype=numpy.int64)
    before, worst = model.initial_state(len(ones)), Comparison(runtime, "", f"one step at each of {steps}", steps, 0.0, math.inf, 0.0)
    for t in range(steps):
        step = numpy.take(x, [t], axis=axis)
        expected, after = _stepped(model, step, before)
        exact, _ = _stepped(double, floats(wide, step), floats(wide, before))
        result = session(_feed(proto, model, step, ones, before))
        for name, values in expected.items():
            difference, eager_difference = _distance(name, result[name], values), _distance(name, values, exact[name])
            allowed = STEP_ULP[dtype] * float(numpy.finfo(dtype).eps) * max(1.0, _largest(values))
            if not difference <= allowed:
                others = [_stepped(model, nudged(step, seed), nudged(before, seed))[0][name] for seed in range(ROUNDINGS)]
                eager_difference = max(eager_difference, *(_distance(name, other, exact[name]) for other in others))
                allowed = max(allowed, STEP_FACTOR * eager_difference)
            if not difference <= allowed:
                raise ConformanceError(
                    f"{runtime}: {name!r} differs by {difference:.3g} at step {t}, from the same state; allowed is {allowed:.3g}"
                )
            if difference / allowed >= worst.difference / worst.allowed:
                worst = Comparison(runtime, name, worst.case, steps, difference, allowed, eager_difference)
        before = after
    return worst


def _stepped(model: Layer, x: NumPyArray, state: Any) -> tuple[dict[str, NumPyArray], Any]:
    """One eager step: its result and new states under the names of `with_states`, and the state as it is."""
    y, after = model(x, state)
    return {"y": y, **_scan_states(model, after)}, after


def floats(change: Callable[[NumPyArray], NumPyArray], tree: Any) -> Any:
    """A state, or an array, with every floating-point array changed; counts stay as they are."""
    return mapped(lambda a: change(a) if a.dtype.kind == "f" else a, tree)


def wide(a: NumPyArray) -> NumPyArray:
    """In float64."""
    return a.astype(numpy.float64)


def nudged(values: Any, seed: int) -> Any:
    """Every number moved by at most one unit in its last place: as good a float32 input as the one given."""
    rng = numpy.random.default_rng(seed)
    return floats(lambda a: (a * (1 + numpy.finfo(a.dtype).eps * rng.integers(-1, 2, a.shape))).astype(a.dtype), values)


def _largest(values: NumPyArray) -> float:
    return float(numpy.max(numpy.abs(values), initial=0.0))


_OPERATORS = ("LSTM", "GRU", "RNN")
_FIRST_STATE = 5
"""The place of the initial h among the inputs of these operators."""


def with_states(proto: onnx.ModelProto, model: Layer) -> onnx.ModelProto:
    """A copy whose loops take their states as inputs (`h_in_0`, …, numbered by loop; `time_0`) and give them out (`h_out_0`, …)."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    graph, before = copy.graph, []
    loops = [n for n in graph.node if n.op_type in ("Scan", *_OPERATORS)]
    for k, (loop, names) in enumerate(zip(loops, _state_names(model), strict=True)):
        plain, found = loop.op_type in _OPERATORS, helper.get_node_attr_value
        states = 0 if plain else len(loop.input) - found(loop, "num_scan_inputs")
        for i, (name, size) in enumerate(names):
            given, last = f"{name}_in_{k}", f"{name}_out_{k}"
            entry = [helper.make_tensor_value_info(v, _element(graph, model), ["batch", size]) for v in (given, last)]
            graph.input.append(entry[0])
            graph.output.append(entry[1])
            if plain:  # the operator's state has an axis for the direction
                before.append(helper.make_node("Unsqueeze", [given, "states_axis"], [f"{given}_1"]))
                loop.input[_FIRST_STATE + i] = f"{given}_1"
                place, change = 1 + i, helper.make_node("Squeeze", [f"{last}_1", "states_axis"], [last])
            else:
                place = states - len(names) + i
                loop.input[place] = given
                change = helper.make_node("Identity", [f"{last}_1"], [last])
            while len(loop.output) <= place:
                loop.output.append("")
            loop.output[place] = change.input[0] = loop.output[place] or f"{last}_1"
            graph.node.append(change)
    if before:
        graph.initializer.append(numpy_helper.from_array(numpy.array([0]), "states_axis"))
        for n in reversed(before):
            graph.node.insert(0, n)
    for tensor in list(graph.initializer):
        if tensor.name == "time_0":
            graph.initializer.remove(tensor)
            graph.input.append(helper.make_tensor_value_info("time_0", tensor.data_type, []))
    return copy


def _element(graph: onnx.GraphProto, model: Layer) -> int:
    return int(helper.np_dtype_to_tensor_dtype(numpy.dtype(model.dtype)))


def _state_names(model: Layer) -> list[list[tuple[str, int]]]:
    """Names and sizes of the states of every loop, in the order of the loops."""
    return [
        list(zip(layer.cell.states, layer.state_sizes(), strict=True))
        for layer in recurrent_parts(model)
        for _ in range(layer.num_layers * layer.num_directions)
    ]


def _states_of(model: Layer, state: Any) -> list[Any]:
    return [state] if isinstance(model, Recurrent) else list(state)


def _named(model: Layer, state: Any, suffix: str) -> dict[str, NumPyArray]:
    """The state of the first recurrent part under the names of the graph's inputs ("0") or outputs ("n")."""
    part = recurrent_parts(model)[0]
    names = (*part.cell.states, *(("time",) if part.timed else ()))
    return {f"{name}_{suffix}": numpy.asarray(values) for name, values in zip(names, _states_of(model, state)[0], strict=True)}


def _scan_states(model: Layer, state: Any, suffix: str = "out") -> dict[str, NumPyArray]:
    """The state under the names of `with_states`: numbered through all layers and directions."""
    named, k = {}, 0
    for layer, part in zip(recurrent_parts(model), _states_of(model, state), strict=True):
        for place in range(part[0].shape[0]):
            named.update({f"{name}_{suffix}_{k}": values[place] for name, values in zip(layer.cell.states, part, strict=False)})
            k += 1
    return named


def _feed(proto: onnx.ModelProto, model: Layer, x: NumPyArray, lengths: NumPyArray | None, state: Any) -> dict[str, NumPyArray]:
    """The inputs of the graph, or, with a `state`, those of `with_states`."""
    names = {i.name for i in proto.graph.input}
    feed = {"x": x}
    if "lengths" in names:
        steps, batch = (x.shape[1], x.shape[0]) if model.batch_first else x.shape[:2]
        feed["lengths"] = numpy.full(batch, steps) if lengths is None else numpy.asarray(lengths, dtype=numpy.int64)
    if "h_0" in names:
        feed |= _named(model, state if state is not None else model.initial_state(x.shape[0 if model.batch_first else 1]), "0")
    if state is not None:
        feed |= _scan_states(model, state, "in")
        times = [part[-1] for layer, part in zip(recurrent_parts(model), _states_of(model, state), strict=True) if layer.timed]
        feed |= {"time_0": numpy.asarray(times[0])} if times else {}
    return feed


def _outputs(model: Layer, x: NumPyArray, lengths: NumPyArray | None) -> dict[str, NumPyArray]:
    """The eager results under the names of the graph's outputs."""
    if not model.recurrent:
        return {"y": model(x)}
    y, state = model(x, lengths=lengths)
    return {"y": y, **_named(model, state, "n")}


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
    return x.shape[1 if model.batch_first else 0] if model.recurrent else 1


def _case_name(model: Layer, case: Inputs) -> str:
    x, lengths = case
    return f"x {tuple(x.shape)}" + ("" if lengths is None else " ragged" if len(set(map(int, lengths))) > 1 else " with lengths")
