"""Runs one model in tract: `python -m portnorm_onnx.tract_worker model.onnx`, arrays in, arrays out. See `runtimes.py`."""

from __future__ import annotations

import json
import sys

import onnx
import tract  # type: ignore[import-untyped]

from portnorm_onnx.runtimes import receive, send


def main(path: str) -> None:
    """Answer once when the model is loaded, then once for every set of inputs."""
    answers = sys.stdout.buffer
    graph = onnx.load(path, load_external_data=False).graph
    inputs, outputs = [v.name for v in graph.input], [v.name for v in graph.output]
    try:
        runnable = tract.onnx().load(path).into_model().into_runnable()
        send(answers, {})
        while (given := receive(sys.stdin.buffer)) is not None:
            found = runnable.run([given[name] for name in inputs])
            send(answers, {name: a.to_numpy() for name, a in zip(outputs, found, strict=True)})
    except Exception as error:
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        answers.write(json.dumps({"error": " / ".join(said)[:400]}).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
