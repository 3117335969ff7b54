"""Runs models in tract: `python -m portnorm_onnx.tract_worker`, told what to do on its standard input. See `workers.py`."""

from __future__ import annotations

import sys

import onnx

from portnorm_onnx.frames import Session, answer


def main() -> None:
    """Answer once for every model that is loaded, and once for every set of inputs."""
    answer(sys.stdin.buffer, sys.stdout.buffer, _loaded)


def _loaded(path: str) -> Session:
    import tract  # here, since this module is also read where there is none

    graph = onnx.load(path, load_external_data=False).graph
    runnable = tract.onnx().load(path).into_model().into_runnable()
    inputs, outputs = [v.name for v in graph.input], [v.name for v in graph.output]
    return lambda given: {n: a.to_numpy() for n, a in zip(outputs, runnable.run([given[name] for name in inputs]), strict=True)}


if __name__ == "__main__":
    main()
