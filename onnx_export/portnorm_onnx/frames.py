"""How a process that runs models is spoken to: a line of JSON, then the bytes of the arrays that it announces. Needs NumPy alone."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy

Session = Callable[[Mapping[str, Any]], dict[str, Any]]
"""A loaded model: named input arrays to named output arrays."""


def send(stream: IO[bytes], arrays: Mapping[str, Any], session: int = 0, **more: Any) -> None:
    """Write named arrays: a line of JSON that tells their names, types and shapes, and `more`, then their bytes."""
    values = {name: numpy.ascontiguousarray(a) for name, a in arrays.items()}
    head = [{"name": n, "dtype": str(a.dtype), "shape": list(numpy.shape(arrays[n]))} for n, a in values.items()]
    stream.write(json.dumps({"session": session, "arrays": head, **more}).encode() + b"\n")
    for a in values.values():
        stream.write(a.tobytes())
    stream.flush()


def arrays_of(head: Mapping[str, Any], stream: IO[bytes]) -> dict[str, Any]:
    """The arrays that a head announces."""
    found = {}
    for entry in head["arrays"]:
        dtype, shape = numpy.dtype(entry["dtype"]), tuple(entry["shape"])
        data = stream.read(dtype.itemsize * int(numpy.prod(shape, dtype=int)))
        found[entry["name"]] = numpy.frombuffer(data, dtype=dtype).reshape(shape).copy()
    return found


TURNS, SECONDS = 30, 2.0
"""So many runs of all steps, or those that begin within so many seconds: after another's turn the first ones warm up."""


def looped(session: Session, given: Mapping[str, Any], fed: Mapping[str, str]) -> dict[str, Any]:
    """Steps of `x` (steps, …), what an output gives fed into the input that `fed` names: `y` of each, and microseconds per step by turn.

    The loop is in Python, or where a session has `steps` of its own, in the language of that.
    """
    steps: Callable[..., Any] = getattr(session, "steps", None) or functools.partial(_steps, session)
    times, begun = [], time.perf_counter()
    for _ in range(TURNS):
        started = time.perf_counter()
        ys = steps(given, fed)
        times.append((time.perf_counter() - started) * 1e6 / len(given["x"]))
        if time.perf_counter() - begun > SECONDS:
            break
    return {"y": numpy.asarray(ys), "microseconds": numpy.array(times)}


def _steps(session: Session, given: Mapping[str, Any], fed: Mapping[str, str]) -> list[Any]:
    feed, ys = dict(given), []
    for x in given["x"]:
        feed["x"] = x
        found = session(feed)
        for output, taken in fed.items():
            feed[taken] = found[output]
        ys.append(found["y"])
    return ys


def answer(asked: IO[bytes], answers: IO[bytes], load: Callable[[str], Session]) -> None:
    """Answer once for every model that is loaded, and once for every set of inputs, until nothing more is asked."""
    sessions: dict[int, Session] = {}
    while line := asked.readline():
        head = json.loads(line)
        try:
            if "load" in head:
                sessions[head["session"]] = load(head["load"])
                send(answers, {})
                continue
            given, session = arrays_of(head, asked), sessions[head["session"]]
            send(answers, looped(session, given, head["fed"]) if "fed" in head else session(given))
        except Exception as error:
            said = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            answers.write(json.dumps({"error": " / ".join(said)[:400]}).encode() + b"\n")
            answers.flush()
