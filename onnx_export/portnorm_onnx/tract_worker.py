"""Runs models in tract: `python -m portnorm_onnx.tract_worker`, told what to do on its standard input. See `workers.py`."""

from __future__ import annotations

import json
import sys
from typing import Any

import onnx

from portnorm_onnx.workers import arrays_of, send


def main() -> None:
    """Answer once for every model that is loaded, and once for every set of inputs."""
    asked, answers, sessions = sys.stdin.buffer, sys.stdout.buffer, {}
    while line := asked.readline():
        head = json.loads(line)
        try:
            if "load" in head:
                sessions[head["session"]] = _loaded(head["load"])
                send(answers, {})
                continue
            given = arrays_of(head, asked)
            runnable, inputs, outputs = sessions[head["session"]]
            found = runnable.run([given[name] for name in inputs])
            send(answers, {name: a.to_numpy() for name, a in zip(outputs, found, strict=True)})
        except Exception as error:
            said = [line.strip() for line in str(error).splitlines() if line.strip()]
            answers.write(json.dumps({"error": " / ".join(said)[:400]}).encode() + b"\n")
            answers.flush()


def _loaded(path: str) -> tuple[Any, list[str], list[str]]:
    import tract  # here, since this module is also read where there is none

    graph = onnx.load(path, load_external_data=False).graph
    return tract.onnx().load(path).into_model().into_runnable(), [v.name for v in graph.input], [v.name for v in graph.output]


if __name__ == "__main__":
    main()
