"""Does a graph compute what the model computes? Two gates, since one tolerance cannot serve a recurrent net.

**One step, hard.** From the eager states before every step t, one step of the graph agrees with one eager step to a few units in the last
place of the state (2e-6 in float32). This is where a wrong gate order, a wrong epsilon or a missing bias shows.

**Trajectory, relative.** A normalized recurrent net can be chaotic: two correct float32 runs part by 1e-6 after ten steps and by order 1
after a thousand. So the distance of the graph to the float64 run is compared with the distance of the eager run to it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy

from portnorm.arrays import library
from portnorm.errors import ConformanceError, ExportError, MissingExtraError, UnsupportedError
from portnorm.files import checked_path
from portnorm.layers.layer import Layer
from portnorm.scalars import real_number
from portnorm_onnx.bounds import NumPyArray, distance
from portnorm_onnx.checked import Graph, random_cases, with_states
from portnorm_onnx.gates import from_states, one_step, trajectory
from portnorm_onnx.inputs import Inputs, Stated, checked_cases, steps_of
from portnorm_onnx.loops import OPERATORS
from portnorm_onnx.metadata import changes_of, graph_facts, read_layer
from portnorm_onnx.nothing import empty_cases, unanswered
from portnorm_onnx.report import Comparison, Outcome, Report
from portnorm_onnx.runtimes import RUNTIMES, runtime_of
from portnorm_onnx.signature import time_axis
from portnorm_onnx.storage import Draft, read_model

ALL = "all"
"""Names every runtime that portable graphs are for: the rows of `RUNTIMES`."""


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

    A graph that was exported for one of the further targets ("mnn", "c", …) is checked in its runtime by that name; it runs in an
    environment of its own (docs/runtimes.md), and "all" does not name it.

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
    if tolerance is not None:
        tolerance = real_number("tolerance", tolerance, 0.0, sys.float_info.max, "a number that is not negative")
    checked_path("path", path)
    proto = read_model(path)
    holds = graph_facts(proto)["holds"]
    if holds:
        raise UnsupportedError(f"{os.fspath(path)!r} holds {holds}, which was checked when it was exported; this checks graphs of layers")
    if model is None:
        model, _ = read_layer(path)
    cases = None if inputs is None else checked_cases(inputs)
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
    as_is: bool = False,
) -> Report:
    """`verify`, of a model that may not be in its place yet; `as_is` where it has the graph's rounded weights."""
    draft.check_form()
    graph = Graph.of(draft, model, tolerance, as_is=as_is)
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
    longest = max(cases, key=lambda case: steps_of(graph.model, case[0]))
    session = graph.session(runtime)
    run = graph.stepwise(session) if graph.streaming else session
    empty = _empty(graph, runtime, longest[0]) if with_empty else []
    tried: list[Stated] = [*empty, *((x, counted, None) for x, counted in ([longest] if graph.streaming else cases))]
    looped = any(n.op_type in ("Scan", *OPERATORS) for n in graph.proto.graph.node)
    if graph.stated and not (
        looped or graph.streaming
    ):  # a loop that is written out, which the states that it starts from take the place of
        tried += from_states(graph, longest)
    outputs = [run(graph.feed(*case)) for case in tried]
    steps = [one_step(graph, session, runtime, longest)] if graph.streaming else []
    del session, run
    found = [trajectory(graph, runtime, case, given) for case, given in zip(tried, outputs, strict=True)]
    _make_room(graph, longest[0])
    if not graph.streaming and graph.model.recurrent and looped:
        steps = [one_step(graph, graph.session(runtime, with_states(graph)), runtime, longest)]
        _make_room(graph, longest[0])
    return found[len(empty) :], steps, found[: len(empty)]


def _make_room(graph: Graph, x: NumPyArray) -> None:
    """After eager runs with wide weights: what is made of these is as large."""
    if graph.wide:
        library(x).release()


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
    graph, sequence = Graph.of(draft, model, as_is=True), Graph.of(whole, model, as_is=True)
    case = random_cases(graph)[-1]
    feed = graph.feed(case[0], None, None)
    stepped = graph.stepwise(graph.session(runtime))(feed)
    found = sequence.session(runtime)(feed)
    own = trajectory(graph, runtime, (*case, None), stepped)
    comparisons = [
        Comparison(
            runtime,
            name,
            "step by step against the sequence",
            steps_of(model, case[0]),
            distance(name, stepped[name], found[name]),
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
