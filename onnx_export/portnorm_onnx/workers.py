"""Runtimes in a process of their own: told a model's path, then given arrays on standard input, they give arrays on standard output."""

from __future__ import annotations

import atexit
import contextlib
import json
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, ClassVar

from portnorm.errors import ExportError
from portnorm.interrupts import held_back, undone
from portnorm_onnx.frames import Session, arrays_of, send
from portnorm_onnx.storage import Loadable, beside

__all__ = ["Session", "Worker", "arrays_of", "receive", "send"]


def receive(stream: IO[bytes]) -> dict[str, Any] | None:
    """Read what `send` wrote; `None` at the end. Raises `ExportError` with an error that was sent instead."""
    line = stream.readline()
    if not line:
        return None
    head = json.loads(line)
    if "error" in head:
        raise ExportError(str(head["error"]))
    return arrays_of(head, stream)


class Worker:
    """A process that runs models, one line of JSON for each: `{"session": 3, "load": "path", "beside": [...]}`, then arrays."""

    _running: ClassVar[dict[str, Worker]] = {}

    def __init__(self, name: str, command: list[str]):
        self.name = name
        self._folder = tempfile.TemporaryDirectory(prefix="portnorm-")
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        with held_back():
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors)
            undone(self.close)
        self._sessions = 0
        self._lock = threading.Lock()
        atexit.register(self.close)

    @classmethod
    def of(cls, name: str, command: list[str]) -> Worker:
        """The process of a runtime: the one that runs, or a new one where it has ended."""
        worker = cls._running.get(name)
        if worker is None or worker._process.poll() is not None:
            worker = cls._running[name] = cls(name, command)
        return worker

    @classmethod
    def end(cls, name: str) -> None:
        """End the process of a runtime, which whoever waits for an answer of it is told."""
        if name in cls._running:
            cls._running[name]._process.kill()

    def load(self, model: Loadable) -> Session:
        """A session of the model."""
        session = self._loaded(model)
        return lambda inputs: self._asked("does not run", lambda stream: send(stream, inputs, session))

    def load_looped(self, model: Loadable, fed: Mapping[str, str]) -> Session:
        """Steps with states fed back, in that process alone: see `frames.looped`."""
        session = self._loaded(model)
        return lambda inputs: self._asked("does not run", lambda stream: send(stream, inputs, session, fed=dict(fed)))

    def _loaded(self, model: Loadable) -> int:
        self._sessions += 1
        session = self._sessions
        if isinstance(model, bytes):
            path = Path(self._folder.name) / f"model_{session}.onnx"
            path.write_bytes(model)
            model = str(path)
        head = json.dumps({"session": session, "load": model, "beside": beside(model)}).encode() + b"\n"
        self._asked("does not load", lambda stream: (stream.write(head), stream.flush()))
        return session

    def _asked(self, failed: str, ask: Callable[[IO[bytes]], Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            with contextlib.suppress(BrokenPipeError):  # what it ended with is read below
                ask(self._process.stdin)
            try:
                found = receive(self._process.stdout)
            except ExportError as error:
                raise ExportError(f"{self.name} {failed} the graph: {error}") from None
        if found is None:
            code = self._process.wait()
            self._errors.seek(0)
            lines = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
            said = next((line for line in lines if "Err" in line or "error" in line.lower()), lines[0] if lines else "it said nothing")
            raise ExportError(f"{self.name} {failed} the graph: its process ended with {code}: {said.strip()[:300]}")
        return found

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()
        self._folder.cleanup()
