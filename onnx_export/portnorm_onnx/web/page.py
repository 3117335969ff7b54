"""onnxruntime-web in a page of headless Chromium: this process serves the page, the package and the model, and trades arrays with it."""

from __future__ import annotations

import io
import json
import queue
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from portnorm.errors import ExportError
from portnorm_onnx.runtimes import receive, send
from portnorm_onnx.storage import Loadable, beside

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
    """A model in a page: call it with named arrays."""

    def __init__(self, model: Loadable, package: Path, browser: str):
        self._files = {"model": model if isinstance(model, bytes) else Path(model).read_bytes()}
        weights = [] if isinstance(model, bytes) else beside(model)
        self._files |= {f"weights/{name}": (Path(str(model)).parent / name).read_bytes() for name in weights}
        self._files["weights"] = json.dumps(weights).encode()
        self._package = package
        self._inputs: queue.Queue[bytes] = queue.Queue()
        self._answers: queue.Queue[bytes] = queue.Queue()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._profile = tempfile.TemporaryDirectory(prefix="portnorm-", ignore_cleanup_errors=True)
        address = f"http://127.0.0.1:{self._server.server_port}/page.html"
        command = [browser, *_QUIET, f"--user-data-dir={self._profile.name}", address]
        self._browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._answer("does not load")

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        packed = io.BytesIO()
        send(packed, inputs)
        self._inputs.put(packed.getvalue())
        return self._answer("does not run")

    def _answer(self, failed: str) -> dict[str, Any]:
        try:
            found = receive(io.BytesIO(self._answers.get(timeout=TIMEOUT)))
        except queue.Empty:
            raise ExportError(f"the page {failed} the graph: no answer within {TIMEOUT:.0f} s") from None
        except ExportError as error:
            raise ExportError(f"the page {failed} the graph: {error}") from None
        return found or {}

    def __del__(self) -> None:
        if hasattr(self, "_browser"):
            self._browser.kill()
            self._browser.wait()
            self._server.shutdown()
            self._server.server_close()
            self._profile.cleanup()


def _handler(page: Page) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.removeprefix("/")
            if name in page._files:
                self._give(page._files[name], "application/octet-stream")
            elif name == "next":
                try:
                    self._give(page._inputs.get(timeout=20), "application/octet-stream")
                except queue.Empty:
                    self._give(b"", "application/octet-stream")
            elif name == "page.html":
                self._give((Path(__file__).parent / name).read_bytes(), "text/html")
            elif (file := page._package / "dist" / Path(name).name).is_file():
                self._give(file.read_bytes(), _TYPES.get(file.suffix, "application/octet-stream"))
            else:
                self.send_error(404)

        def do_POST(self) -> None:
            page._answers.put(self.rfile.read(int(self.headers["Content-Length"])))
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
