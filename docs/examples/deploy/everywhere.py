"""The same stream in every place of docs/deploy.md: `python docs/examples/deploy/everywhere.py [PLACE …]`.

One layer is exported for each place and converted there; then the place's own program, which knows nothing of portnorm, runs a hundred
steps, and what it wrote is held against the layer. A place whose tools are not installed is said, and is no success.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

import portnorm as pn
from portnorm.errors import MissingExtraError
from portnorm_onnx.elsewhere import place_of
from portnorm_onnx.engine_c import C_OPTIONS, CC_OPTIONS
from portnorm_onnx.runtimes import chromium, web_package

HERE = Path(__file__).parent
STEPS, INPUTS, HIDDEN = 100, 16, 32
CLOSE = 2e-5
"""A hundred steps of a normalized net in float32, in another order of sums."""


def command(*words: str | Path, folder: Path) -> None:
    """Run it with the programs of its own environment in front."""
    path = os.pathsep.join([str(Path(words[0]).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        list(map(str, words)), cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False, timeout=300
    )
    if done.returncode:
        raise RuntimeError(f"{Path(words[0]).name} ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-300:]}")


def of_environment(name: str, program: str) -> Path:
    return place_of(name).with_name(program)


def in_python(folder: Path) -> None:
    command(sys.executable, HERE / "in_python.py", folder, folder=folder)


def in_node(folder: Path) -> None:
    node = shutil.which("node")
    if node is None:
        raise MissingExtraError("Node.js is not installed")
    (folder / "node_modules").symlink_to(place_of("onnxruntime-node").parent)
    shutil.copy(HERE / "in_node.cjs", folder)
    command(node, "in_node.cjs", folder, folder=folder)


def in_browser(folder: Path) -> None:
    browser = chromium()
    if browser is None:
        raise MissingExtraError("Chromium is not installed")
    for file in (web_package() / "dist").glob("ort*wasm*"):
        shutil.copy(file, folder)
    shutil.copy(HERE / "in_browser.html", folder)
    written = threading.Event()

    class Handler(SimpleHTTPRequestHandler):
        def do_POST(self) -> None:
            (folder / "y.bin").write_bytes(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()
            written.set()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/in_browser.html"
    profile = folder / "profile"
    page = subprocess.Popen(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", address],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        if not written.wait(120):
            raise RuntimeError("the page gave no answer in 120 s")
    finally:
        page.kill()
        page.wait()
        server.shutdown()


def in_c(folder: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise MissingExtraError("there is no C compiler")
    command(of_environment("c", "emx-onnx-cgen"), "compile", "c.onnx", "model.c", "--model-name", "model", *C_OPTIONS, folder=folder)
    command(compiler, *CC_OPTIONS, HERE / "in_c.c", "model.c", "-o", "stream", "-lm", folder=folder)
    command(folder / "stream", folder, folder=folder)


def in_litert(folder: Path) -> None:
    command(of_environment("litert", "onnx2tf"), "-i", "litert.onnx", "-o", folder, "-n", "-kat", "x", "h_0", "c_0", folder=folder)
    command(place_of("litert"), HERE / "in_litert.py", folder, folder=folder)


def in_mnn(folder: Path) -> None:
    convert = (
        "import _tools; _tools.mnnconvert(['', '-f', 'ONNX', '--modelFile', 'mnn.onnx', '--MNNModel', 'mnn.mnn', '--useOriginRNNImpl'])"
    )
    command(place_of("mnn"), "-c", convert, folder=folder)
    command(place_of("mnn"), HERE / "in_mnn.py", folder, folder=folder)


def in_ncnn(folder: Path) -> None:
    shapes = f"inputshape=[1,{INPUTS}]f32,[1,{HIDDEN}]f32,[1,{HIDDEN}]f32"
    command(of_environment("ncnn", "pnnx"), "ncnn.onnx", shapes, "fp16=0", folder=folder)
    command(place_of("ncnn"), HERE / "in_ncnn.py", folder, folder=folder)


PLACES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "Python": ("portable", in_python),
    "Node.js": ("portable", in_node),
    "a browser": ("portable", in_browser),
    "C": ("c", in_c),
    "LiteRT": ("litert", in_litert),
    "MNN": ("mnn", in_mnn),
    "ncnn": ("ncnn", in_ncnn),
}


def difference(target: str, run: Callable[[Path], None]) -> float:
    """How far what a place wrote is from the layer."""
    layer = pn.LSTM(INPUTS, HIDDEN, norm="layer", rng=0)
    x = np.random.default_rng(0).standard_normal((STEPS, 1, INPUTS)).astype("float32")
    with tempfile.TemporaryDirectory(prefix="portnorm-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        pn.export(layer, folder / f"{target}.onnx", target=target, streaming=True, input_shape=(1, INPUTS))  # type: ignore[arg-type]
        x.tofile(folder / "x.bin")
        run(folder)
        y = np.fromfile(folder / "y.bin", np.float32).reshape(STEPS, 1, HIDDEN)
    return float(np.max(np.abs(y - layer(x)[0])))


def main(names: list[str]) -> int:
    """Run the named places, or all."""
    failed = 0
    for place, (target, run) in PLACES.items():
        if names and place not in names:
            continue
        try:
            apart = difference(target, run)
        except MissingExtraError as error:
            print(f"{place:<10} not run: {error}")
            continue
        failed += not apart <= CLOSE
        print(f"{place:<10} target {target!r}: y differs by {apart:.1e}{'' if apart <= CLOSE else ', which is too much'}")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
