"""How a process that runs models is spoken to: a line of JSON, then the bytes of the arrays that it announces. Needs NumPy alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy

Session = Callable[[Mapping[str, Any]], dict[str, Any]]
"""A loaded model: named input arrays to named output arrays."""


def send(stream: IO[bytes], arrays: Mapping[str, Any], session: int = 0) -> None:
    """Write named arrays: a line of JSON that tells their names, types and shapes, then their bytes."""
    values = {name: numpy.ascontiguousarray(a) for name, a in arrays.items()}
    head = [{"name": n, "dtype": str(a.dtype), "shape": list(numpy.shape(arrays[n]))} for n, a in values.items()]
    stream.write(json.dumps({"session": session, "arrays": head}).encode() + b"\n")
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
            given = arrays_of(head, asked)
            send(answers, sessions[head["session"]](given))
        except Exception as error:
            said = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            answers.write(json.dumps({"error": " / ".join(said)[:400]}).encode() + b"\n")
            answers.flush()
