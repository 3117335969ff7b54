"""`portnorm info`: what is here."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import portnorm
from portnorm.libraries import SUPPORT

_PEERS = ("array-api-compat", "onnx", "onnxruntime", *(row.package for row in SUPPORT.values()), "scikit-learn")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, nargs="?")


def run(options: argparse.Namespace) -> dict[str, Any]:
    if options.checkpoint is not None:
        layer = portnorm.load(options.checkpoint)
        arrays = {name: {"dtype": str(a.dtype), "shape": list(a.shape)} for name, a in layer.state_dict().items()}
        found = {"layer": repr(layer), "parameters": sum(int(p.size) for p in layer.parameters().values()), "arrays": arrays}
        if not options.json:
            print(f"{layer}\n{found['parameters']:,} parameters")
            for name, a in arrays.items():
                print(f"  {name:<32} {a['dtype']:<10} {tuple(a['shape'])}")
        return found
    versions: dict[str, str | None] = {"portnorm": portnorm.__version__, "python": platform.python_version()}
    versions |= {name: _version(name) for name in _PEERS}
    kernels = _warming().state()
    if not options.json:
        for name, version in versions.items():
            print(f"{name:<18} {version or '- (not installed)'}")
        print(f"{'numba':<18} {kernels['numba'] or '- (not installed: definitions alone on NumPy arrays)'}")
        for kind, names in kernels.get("compiled", {}).items():
            print(f"{'kernels ' + kind:<18} {', '.join(names) or '-'}")
        if kernels["numba"]:
            print(f"{'noted in':<18} {kernels['cache']}")
    return {**versions, "kernels": kernels}


def _warming() -> Any:
    return importlib.import_module("portnorm_backends.cpu.warming")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
