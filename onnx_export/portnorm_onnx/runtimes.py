"""Inference runtimes behind one small interface: load a model, run it on named arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from portnorm.arrays import require_extra
from portnorm.errors import ExportError, UnsupportedError

Session = Callable[[Mapping[str, Any]], dict[str, Any]]
"""A loaded model: named input arrays to named output arrays."""


def onnxruntime_session(model: bytes) -> Session:
    """onnxruntime on the CPU."""
    ort = require_extra("onnxruntime", "onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"onnxruntime {ort.__version__} does not load the graph: {error}") from error
    names = [o.name for o in session.get_outputs()]

    def run(inputs: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return dict(zip(names, session.run(names, dict(inputs)), strict=True))
        except Exception as error:
            raise ExportError(f"onnxruntime {ort.__version__} does not run the graph: {error}") from error

    return run


RUNTIMES: dict[str, Callable[[bytes], Session]] = {"onnxruntime": onnxruntime_session}
"""Runtimes by name."""


def session_of(runtime: str, model: bytes) -> Session:
    """A model loaded in the named runtime."""
    if runtime not in RUNTIMES:
        raise UnsupportedError(f"`runtimes` names {runtime!r}; expected {', '.join(RUNTIMES)}")
    return RUNTIMES[runtime](model)
