"""onnxruntime-web in a page of headless Chromium: this process serves the page, the package and the models, and trades arrays with it."""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any, ClassVar

from portnorm.errors import ExportError
from portnorm.interrupts import held_back, undone
from portnorm_onnx.storage import Loadable, beside
from portnorm_onnx.workers import Session, receive, send

TIMEOUT = 120.0
"""Seconds to wait for one answer of the page."""

_TYPES = {".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm", ".html": "text/html"}
_QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Page:
    """A browser with one page that runs models; what it is told is as in `runtimes.Worker`, and what it loads it gets by HTTP."""

    _open: ClassVar[Page | None] = None

    def __init__(self, package: Path, browser: str):
        self.files: dict[str, bytes] = {}
        self.package = package
        self.told: queue.Queue[bytes] = queue.Queue()
        self.answers: queue.Queue[bytes] = queue.Queue()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._profile = tempfile.TemporaryDirectory(prefix="portnorm-", ignore_cleanup_errors=True)
        address = f"http://127.0.0.1:{self._server.server_port}/page.html"
        command = [browser, *_QUIET, f"--user-data-dir={self._profile.name}", address]
        # In a group of its own, because a browser is many processes and all have to end.
        with held_back():
            self._browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
            undone(self.close)
        self._sessions = 0
        atexit.register(self.close)

    @classmethod
    def of(cls, package: Path, browser: str) -> Page:
        """The page that is open, or a new one."""
        if cls._open is None or cls._open._browser.poll() is not None:
            cls._open = cls(package, browser)
        return cls._open

    def load(self, model: Loadable) -> Session:
        self._sessions += 1
        session = self._sessions
        weights = [] if isinstance(model, bytes) else beside(model)
        parts = {name: (Path(str(model)).parent / name).read_bytes() for name in weights}
        parts["model"] = model if isinstance(model, bytes) else Path(model).read_bytes()
        served = {f"{session}/{name}": data for name, data in parts.items()}
        self.files |= served
        head = json.dumps({"session": session, "load": f"{session}/model", "beside": weights}).encode() + b"\n"
        try:
            self._asked("does not load", lambda stream: stream.write(head))
        finally:
            for name in served:
                del self.files[name]
        return lambda inputs: self._asked("does not run", lambda stream: send(stream, inputs, session))

    def _asked(self, failed: str, ask: Callable[[IO[bytes]], Any]) -> dict[str, Any]:
        told = io.BytesIO()
        ask(told)
        self.told.put(told.getvalue())
        try:
            return receive(io.BytesIO(self.answers.get(timeout=TIMEOUT))) or {}
        except queue.Empty:
            self.close()  # an answer that comes too late must not be taken for the next one
            raise ExportError(f"the page {failed} the graph: no answer within {TIMEOUT:.0f} s") from None
        except ExportError as error:
            raise ExportError(f"the page {failed} the graph: {error}") from None

    def close(self) -> None:
        """End the browser and the server."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._browser.pid, signal.SIGKILL)
        self._browser.wait()
        self._server.shutdown()
        self._server.server_close()
        self._profile.cleanup()


def _handler(page: Page) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.removeprefix("/")
            if name in page.files:
                self._give(page.files[name], "application/octet-stream")
            elif name == "next":
                try:
                    self._give(page.told.get(timeout=20), "application/octet-stream")
                except queue.Empty:
                    self._give(b"", "application/octet-stream")
            elif name == "page.html":
                self._give((Path(__file__).parent / name).read_bytes(), "text/html")
            elif (file := page.package / "dist" / Path(name).name).is_file():
                self._give(file.read_bytes(), _TYPES.get(file.suffix, "application/octet-stream"))
            else:
                self.send_error(404)

        def do_POST(self) -> None:
            page.answers.put(self.rfile.read(int(self.headers["Content-Length"])))
            self._give(b"", "text/plain")

        def _give(self, data: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: Any) -> None:
            pass

    return Handler
