"""The two gates: one step from eager states, and a whole run from the first state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy

from portnorm.errors import ConformanceError
from portnorm.layers.layer import Layer
from portnorm_onnx.bounds import (
    EPS,
    FACTOR,
    FLOOR,
    ROUNDS,
    STEP_FACTOR,
    STEP_ULP,
    NumPyArray,
    distance,
    first_difference,
    largest_of,
    nudged,
    wide,
)
from portnorm_onnx.checked import Graph, first, scan_states
from portnorm_onnx.inputs import Inputs, Stated, case_name, steps_of
from portnorm_onnx.loops import BEFORE
from portnorm_onnx.nothing import floats
from portnorm_onnx.report import Comparison
from portnorm_onnx.signature import TIME, batch_axis, named_state
from portnorm_onnx.workers import Session


def trajectory(graph: Graph, runtime: str, case: Stated, outputs: Mapping[str, NumPyArray]) -> Comparison:
    """The graph's distance to the float64 run against the eager run's distance to it, over the whole input, from the state."""
    model, dtype, (x, counted, state) = graph.model, graph.dtype, case
    given: dict[str, Any] = {} if counted is None or graph.counts is None else {graph.counts: counted}
    given |= {} if state is None else {"state": state}
    eager = outputs_of(model, x, given)
    exact = eager if graph.wide else outputs_of(graph.exact, floats(wide, x), floats(wide, given))
    others: list[dict[str, NumPyArray]] = []
    comparisons = []
    for name, result in outputs.items():
        if name.endswith("time_n"):
            continue
        difference, eager_difference = distance(name, result, exact[name]), distance(name, eager[name], exact[name])
        floor = FLOOR[dtype] * (max(1.0, largest_of(exact[name])) if dtype in ("float64", "bfloat16") else 1.0)
        if graph.tolerance is None and not difference <= FACTOR * eager_difference + floor:
            if not others:
                others = [outputs_of(model, nudged(x, seed, dtype), given) for seed in graph.roundings]
                others += graph.turned(outputs_of, model, x, given)
            eager_difference = max(eager_difference, *(distance(name, other[name], exact[name]) for other in others))
        allowed = graph.allowed(FACTOR * eager_difference + floor, largest_of(exact[name]))
        comparisons.append(
            Comparison(runtime, name, case_name(model, (x, counted)), steps_of(model, x), difference, allowed, eager_difference)
        )
        if not difference <= allowed:
            raise ConformanceError(
                f"{runtime}: output {name!r} is {difference:.3g} from the {'eager' if graph.wide else 'float64'} run at "
                f"{comparisons[-1].case}; eager {dtype} is {eager_difference:.3g} from it, "
                f"{'so' if graph.tolerance is None else 'and'} at most {allowed:.3g} is allowed"
                f"{first_difference(result, exact[name], allowed)}{graph.hint}"
            )
    return max(comparisons, key=lambda c: c.share)


def one_step(graph: Graph, session: Session, runtime: str, case: Inputs) -> Comparison:
    """From the eager states before every step: one step of the graph against one eager step, left out where a mask says so.

    Where the graph takes so many steps and no other number, all of them take the place of one, from three states.
    """
    model, dtype, (x, counted) = graph.model, graph.dtype, case
    axis, batch, fixed = 1 if model.batch_first else 0, x.shape[batch_axis(model)], graph.steps
    steps = ROUNDS if fixed else steps_of(model, x)
    ones = numpy.full(batch, fixed or 1)
    mask = counted if graph.counts == "mask" and not fixed else None
    title = f"{fixed} steps from each of {ROUNDS} states" if fixed else f"one step at each of {steps}"
    title += ", counted as the first" if graph.counts_from_zero and not fixed else ""
    state, worst = model.initial_state(batch), Comparison(runtime, "", title, fixed or steps, 0.0, math.inf, 0.0)
    for t in range(steps):
        step = x if fixed else numpy.take(x, [t], axis=axis)
        now = None if mask is None else numpy.take(mask, [t], axis=axis)
        before = first(state) if graph.counts_from_zero else state
        expected, after = stepped(graph, model, step, before, now)
        exact = expected if graph.wide else stepped(graph, graph.exact, floats(wide, step), floats(wide, before), now)[0]
        feed = graph.feed(step, now if now is not None else ones if graph.counts == "lengths" else None, before)
        if graph.streaming:
            feed["x"] = numpy.take(feed["x"], 0, axis=axis)
        else:
            feed |= {name: graph._own(a) for name, a in scan_states(model, before, "in").items()}
            counts = [a for name, a in named_state(model, before, "").items() if name.endswith(TIME)]
            feed |= {BEFORE: numpy.asarray(counts[0])} if counts else {}
        result = session(feed)
        result, expected, exact = ({n: _live(graph, n, d[n], now) for n in expected} for d in (result, expected, exact))
        for name, values in expected.items():
            difference, eager_difference = distance(name, result[name], values), distance(name, values, exact[name])
            allowed = graph.allowed(STEP_ULP[dtype] * EPS[dtype] * max(1.0, largest_of(values)), largest_of(values))
            if graph.tolerance is None and not difference <= allowed:
                others = [
                    stepped(graph, other, nudged(step, seed, dtype), nudged(before, seed, dtype), now)[0][name]
                    for seed, other in graph.moved
                ]
                others += [found[name] for found, _ in graph.turned(stepped, graph, model, step, before, now)]
                others = [_live(graph, name, other, now) for other in others]
                eager_difference = max(eager_difference, *(distance(name, other, exact[name]) for other in others))
                allowed = max(allowed, STEP_FACTOR * eager_difference)
            if not difference <= allowed:
                raise ConformanceError(
                    f"{runtime}: {name!r} differs by {difference:.3g} at step {t}, from the same state; "
                    f"allowed is {allowed:.3g}{graph.hint}"
                )
            found = Comparison(runtime, name, title, worst.steps, difference, allowed, eager_difference)
            worst = found if found.share >= worst.share else worst
        if graph.counts_from_zero and not fixed:
            after = stepped(graph, model, step, state, now)[1]
        state = first(after) if fixed else after  # steps are counted in the graph
    return worst


def from_states(graph: Graph, case: Inputs) -> list[Stated]:
    """The same input from the eager states after it, and after that."""
    x, counted = case
    given: dict[str, Any] = {} if counted is None or graph.counts is None else {graph.counts: counted}
    found: list[Stated] = []
    state: Any = None
    for _ in range(ROUNDS - 1):
        _, state = graph.model(x, state, **given)
        found.append((x, counted, state))
    return found


def stepped(graph: Graph, model: Layer, x: NumPyArray, state: Any, mask: NumPyArray | None) -> tuple[dict[str, NumPyArray], Any]:
    """One eager step: its result and new states under the names of the graph that is asked, and the state as it is."""
    y, after = model(x, state, mask=mask)
    if graph.streaming:
        y = numpy.squeeze(y, axis=1 if model.batch_first else 0) if model.keeps_time else y
        return {"y": y, **{n: numpy.asarray(a) for n, a in named_state(model, after, "_n").items() if not n.endswith(f"{TIME}_n")}}, after
    return {"y": y, **scan_states(model, after, "out")}, after


def _live(graph: Graph, name: str, values: NumPyArray, mask: NumPyArray | None) -> NumPyArray:
    """What the graph has to give for the sequences that a step is there for; of the others too where these are seen to hold their state.

    An operator without lengths goes on with a state that nobody reads; and a graph without states of its own repeats the one that it
    starts from, and not what is put into its loops.
    """
    if mask is None or (name == "y" and graph.stated):
        return values
    axis = 1 if name == "y" and graph.model.keeps_time and not graph.model.batch_first else 0
    return numpy.compress(mask.ravel(), values, axis=axis)


def outputs_of(model: Layer, x: NumPyArray, given: Mapping[str, Any]) -> dict[str, NumPyArray]:
    """The eager results under the names of the graph's outputs; `given` are the lengths or the mask, and the state, by name."""
    if not model.recurrent:
        return {"y": model(x, **given)}
    y, state = model(x, **given)
    return {"y": y, **{name: numpy.asarray(a) for name, a in named_state(model, state, "_n").items()}}
