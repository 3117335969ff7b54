"""Runtimes that have an environment of their own, since what they ask for does not go together: where each is found, and how it is started.

An environment is a folder: this one, those that the variable PORTNORM_RUNTIMES names, and those that `make runtimes-more` and
`make accuracy` make beside this one or in the working directory (`.venv-more-NAME`, `.venv-accuracy-NAME`). The first that has all packages
is taken.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from portnorm.errors import MissingExtraError
from portnorm_onnx.storage import Loadable
from portnorm_onnx.workers import Session, Worker

VARIABLE = "PORTNORM_RUNTIMES"


@dataclass(frozen=True)
class Engine:
    """A runtime, by the packages that it is made of; the first is the one whose version is told."""

    name: str
    packages: tuple[str, ...]
    note: str
    node: bool = False
    """Whether it is a package of npm."""


ENGINES: dict[str, Engine] = {
    row.name: row
    for row in (
        Engine("litert", ("ai-edge-litert", "onnx2tf"), "LiteRT, converted by onnx2tf"),
        Engine("mnn", ("MNN", "onnx"), "MNN, converted by its own converter"),
        Engine("ncnn", ("ncnn", "pnnx", "onnx"), "ncnn, converted by pnnx"),
        Engine("iree", ("iree-base-compiler", "iree-base-runtime", "onnx"), "IREE, compiled for this processor (llvm-cpu)"),
        Engine("tvm", ("apache-tvm", "onnx"), "TVM's relax, compiled by LLVM, not tuned"),
        Engine("tinygrad", ("tinygrad", "onnx"), "tinygrad's runner of ONNX, compiled by clang"),
        Engine("c", ("emx-onnx-cgen", "onnx"), "C that emx-onnx-cgen writes, compiled by cc -O3"),
        Engine("opencv", ("opencv-python-headless", "onnx"), "OpenCV's cv2.dnn, its new engine"),
        Engine("onnx2pytorch", ("onnx2pytorch", "torch", "onnx"), "a torch module"),
        Engine("onnxruntime-openvino", ("onnxruntime-openvino", "onnx"), "onnxruntime with OpenVINO's provider"),
        Engine("onnxruntime-node", ("onnxruntime-node",), "onnxruntime in Node.js", node=True),
    )
}


def environments() -> Iterator[Path]:
    """Folders in which a runtime is looked for, in order."""
    yield Path(sys.prefix)
    yield from (Path(folder) for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder)
    for beside in dict.fromkeys((Path(sys.prefix).parent, Path.cwd())):
        yield from (folder for kind in ("more", "accuracy") for folder in sorted(beside.glob(f".venv-{kind}-*")))


def _has(folder: Path, packages: tuple[str, ...]) -> str | None:
    """The version of the first package, where all are there."""
    places = [str(place) for pattern in ("lib/python*/site-packages", "Lib/site-packages") for place in folder.glob(pattern)]
    found = []
    for package in packages:
        there = next(iter(importlib.metadata.distributions(name=package, path=places)), None) if places else None
        if there is None:
            return None
        found.append(there.version)
    return found[0]


@functools.cache
def _place(name: str, where: tuple[Path, ...]) -> tuple[Path, str]:
    engine = ENGINES[name]
    for folder in where:
        if engine.node:
            package = folder / "node_modules" / engine.packages[0]
            if (package / "package.json").is_file():
                return package, str(json.loads((package / "package.json").read_text())["version"])
        elif version := _has(folder, engine.packages):
            return next(p for p in (folder / "bin" / "python", folder / "Scripts" / "python.exe") if p.exists()), version
    asked = (
        f"npm install --ignore-scripts --prefix FOLDER {engine.packages[0]}" if engine.node else f"pip install {' '.join(engine.packages)}"
    )
    raise MissingExtraError(
        f"{engine.packages[0]} is not installed: `make runtimes-more` in a checkout of portnorm, or `{asked}` in an environment that "
        f"{VARIABLE} names"
    )


def version_of(name: str) -> str:
    """Its version; raises `MissingExtraError` where it is in no environment."""
    return _place(name, tuple(environments()))[1]


def place_of(name: str) -> Path:
    """The Python of its environment, or the folder of a package of npm; raises `MissingExtraError` where it is in none."""
    return _place(name, tuple(environments()))[0]


def worker_of(name: str) -> Worker:
    """The process of a runtime; "onnxruntime" is the one of this environment."""
    place = Path(sys.executable) if name == "onnxruntime" else place_of(name)
    if name == "onnxruntime" or not ENGINES[name].node:
        return Worker.of(name, [str(place), "-P", str(Path(__file__).with_name("engine_worker.py")), name])
    if shutil.which("node") is None:
        raise MissingExtraError("Node.js is not installed")
    return Worker.of(name, ["node", str(Path(__file__).parent / "web" / "worker.mjs"), str(place)])


def load(name: str, model: Loadable) -> Session:
    """A model in the process of a runtime."""
    return worker_of(name).load(model)
