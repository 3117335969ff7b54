"""How long a call of a graph takes in each runtime, from the second on: a step whose states are fed back, or a whole sequence.

Any ONNX file is taken. In what `export` wrote the inputs are known by their roles. In another file floating-point numbers are random, and
integers 0 unless the name has "len" in it. What the output `h_n` gives goes into the input `h_0` of the next call, or `h_out` into `h_in`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy
import onnx
from onnx import helper

from portnorm.errors import ExportError, MissingExtraError, UnsupportedError
from portnorm_onnx.metadata import graph_facts
from portnorm_onnx.runtimes import RUNTIMES, session_of
from portnorm_onnx.storage import Loadable, read_model
from portnorm_onnx.symbolic import NumPyArray
from portnorm_onnx.workers import Session

USUAL = {"batch": 1, "time": 100}
"""Open lengths by name; of another name they are 16."""
_OTHERWISE = 16
_PAIRS = (("_0", "_n"), ("_in", "_out"), ("_init", "_final"))


@dataclass
class Latency:
    """One graph in one runtime; times are in microseconds."""

    file: str
    runtime: str
    version: str
    status: str
    """`measured`, `not installed`, or `does not run`."""
    detail: str = ""
    p50: float = math.nan
    p95: float = math.nan
    least: float = math.nan
    calls: int = 0
    difference: float | None = None
    """The largest of any output from the first runtime that is measured, after one call."""
    steps: int | None = None
    """Of a call, where the graph takes sequences."""
    fed: tuple[str, ...] = ()
    """The inputs that take what the call before gave."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without numbers where there are none."""
        return {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in asdict(self).items()}


@dataclass
class _Call:
    """The inputs of a graph, and which outputs become which inputs."""

    feed: dict[str, NumPyArray]
    pairs: dict[str, str] = field(default_factory=dict)
    steps: int | None = None


def measure(
    path: Path,
    runtimes: Sequence[str] | None = None,
    *,
    dims: Mapping[str, int] | None = None,
    seconds: float = 0.1,
    rounds: int = 5,
    progress: Callable[[str], None] = lambda what: None,
) -> list[Latency]:
    """A row for each of the named runtimes, or all that are installed, which take turns, `rounds` times `seconds`.

    `dims` are numbers for lengths that are open, by name. Raises `ExportError` where the file holds no graph, or no runtime runs it,
    `UnsupportedError` for an unknown runtime or length, and `MissingExtraError` for a named runtime that is not installed.
    """
    for name in runtimes or ():
        if name not in RUNTIMES:
            raise UnsupportedError(f"`--runtime` is {name!r}; expected some of {', '.join(RUNTIMES)}")
    proto = read_model(path)
    call = _call_of(proto, dims or {})
    rows: list[Latency] = []
    times: dict[str, list[float]] = {}
    runs: dict[str, Callable[[], dict[str, Any]]] = {}
    first: dict[str, Any] | None = None
    for name in runtimes or RUNTIMES:
        progress(f"{path}: {name}")
        try:
            version = RUNTIMES[name].version()
        except MissingExtraError as error:
            if runtimes:
                raise
            rows.append(Latency(str(path), name, "", "not installed", str(error)))
            continue
        row = Latency(str(path), name, version, "measured", RUNTIMES[name].note, steps=call.steps, fed=tuple(call.pairs.values()))
        rows.append(row)
        try:
            session = session_of(name, _loadable(path, proto), proto)
            found = session(call.feed)
            runs[name], times[name] = _again(session, call), []
            for _ in range(2):
                runs[name]()
        except Exception as error:  # that of a runtime of one's own may be any
            row.status = "does not run"
            row.detail = str(error) if isinstance(error, ExportError) else f"{type(error).__name__}: {error}"
            runs.pop(name, None)
            continue
        row.difference = None if first is None else _difference(first, found)
        first = found if first is None else first
    if not runs:
        raise ExportError(f"no runtime runs {str(path)!r}: {'; '.join(f'{r.runtime}: {r.detail}' for r in rows)}")
    for k in range(rounds):
        for name, run in runs.items():
            progress(f"{path}: {name}, turn {k + 1} of {rounds}")
            times[name] += _turn(run, seconds)
    for row in rows:
        if found_times := times.get(row.runtime) if row.status == "measured" else None:
            row.p50, row.p95 = (float(numpy.quantile(found_times, q)) for q in (0.5, 0.95))
            row.least, row.calls = min(found_times), len(found_times)
    return rows


def _loadable(path: Path, proto: onnx.ModelProto) -> Loadable:
    external = any(t.data_location == onnx.TensorProto.EXTERNAL for t in proto.graph.initializer)
    return str(path) if external else proto.SerializeToString()


def _turn(run: Callable[[], Any], seconds: float) -> list[float]:
    """Microseconds of each call in this time, one at least."""
    found: list[float] = []
    until = time.perf_counter() + seconds
    while not found or time.perf_counter() < until:
        started = time.perf_counter()
        run()
        found.append((time.perf_counter() - started) * 1e6)
    return found


def _again(session: Session, call: _Call) -> Callable[[], dict[str, Any]]:
    """A call with what the one before gave."""
    feed = dict(call.feed)

    def run() -> dict[str, Any]:
        found = session(feed)
        for given, taken in call.pairs.items():
            feed[taken] = found[given]
        return found

    return run


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    found = 0.0
    for name, a in one.items():
        b = numpy.asarray(other[name]).astype(numpy.float64)
        with numpy.errstate(all="ignore"):
            apart = numpy.abs(numpy.asarray(a).astype(numpy.float64) - b)
        found = max(found, float(numpy.max(apart, initial=0.0)))
    return found


# -- what a graph is given -----------------------------------------------------------------------------------------------------------------


def _call_of(proto: onnx.ModelProto, dims: Mapping[str, int]) -> _Call:
    facts = graph_facts(proto)
    own = {given: name for name, given in facts["names"].items()}
    weights = {t.name for t in proto.graph.initializer}
    inputs = [v for v in proto.graph.input if v.name not in weights]
    shapes = {v.name: _dims(v) for v in inputs}
    known = {d for shape in shapes.values() for d in shape if isinstance(d, str)}
    if unknown := [name for name in dims if name not in known]:
        raise UnsupportedError(f"`--dim` names {unknown[0]!r}; lengths that are open are {', '.join(sorted(known)) or 'none'}")
    sizes = {d: dims.get(d, USUAL.get(d, _OTHERWISE)) for d in known}
    steps = sizes.get("time")
    feed = {}
    for v in inputs:
        shape = tuple(sizes[d] if isinstance(d, str) else d for d in shapes[v.name])
        feed[v.name] = _value(v, own.get(v.name, v.name), shape, steps, facts["described"])
    return _Call(feed, _fed(own, feed, [o.name for o in proto.graph.output]), steps)


def _dims(value: onnx.ValueInfoProto) -> list[int | str]:
    """Lengths, and names for those that are open: its own, or one by the place."""
    if not value.type.HasField("tensor_type"):
        raise ExportError(f"the input {value.name!r} is no tensor, so that nothing can be made for it")
    dims = value.type.tensor_type.shape.dim
    return [d.dim_value if d.HasField("dim_value") else d.dim_param or f"{value.name}.{k}" for k, d in enumerate(dims)]


def _value(value: onnx.ValueInfoProto, role: str, shape: tuple[int, ...], steps: int | None, described: bool) -> NumPyArray:
    kind = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    if kind.kind in "OSU":
        raise ExportError(f"the input {value.name!r} is of strings, of which none are made here")
    if kind.kind == "b":
        return numpy.ones(shape, kind)
    if kind.kind in "iu":
        counts = role == "lengths" if described else "len" in role.lower()
        return numpy.full(shape, steps or 1 if counts else 0, kind)
    if any(role.endswith(taken) for taken, _ in _PAIRS):
        return numpy.zeros(shape, kind)
    return numpy.random.default_rng(0).standard_normal(shape).astype(kind)


def _fed(own: Mapping[str, str], feed: Mapping[str, NumPyArray], outputs: Sequence[str]) -> dict[str, str]:
    """Outputs that the next call takes, and as which input."""
    by_role = {own.get(name, name): name for name in outputs}
    found = {}
    for name in feed:
        role = own.get(name, name)
        for taken, given in _PAIRS:
            other = by_role.get(f"{role.removesuffix(taken)}{given}")
            if role.endswith(taken) and other is not None:
                found[other] = name
    return found


# -- for a terminal ------------------------------------------------------------------------------------------------------------------------


def laid_out(rows: Sequence[Latency]) -> list[list[str]]:
    """A table of the rows of one file: times, and those of a step where a call has many."""
    steps = next((row.steps for row in rows if row.steps), None)
    table = [["runtime", "version", "p50", "p95", "least", *(["p50 of a step"] if steps else []), "calls", "differs", ""]]
    for row in rows:
        if row.status != "measured":
            table.append([row.runtime, row.version, *[""] * (5 + bool(steps)), f"{row.status}: {' '.join(row.detail.split())[:120]}"])
            continue
        of_step = [_written(row.p50 / steps)] if steps else []
        apart = "" if row.difference is None else f"{row.difference:.1e}"
        table.append(
            [row.runtime, row.version, *map(_written, (row.p50, row.p95, row.least)), *of_step, f"{row.calls:,}", apart, row.detail]
        )
    return table


def _written(microseconds: float) -> str:
    if microseconds < 1000:
        return f"{microseconds:.1f} µs"
    return f"{microseconds / 1e3:.2f} ms" if microseconds < 1e6 else f"{microseconds / 1e6:.2f} s"
