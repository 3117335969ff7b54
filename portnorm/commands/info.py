"""`portnorm info`: what is installed and compiled here, or what is in a checkpoint."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
from pathlib import Path
from typing import Any

import portnorm
from portnorm.errors import MissingExtraError, install
from portnorm.libraries import SUPPORT, Support

_OF_DEVELOPERS = ("all", "test", "tools")
"""Extras that bring nothing of their own, or what only tests and measurements of this project need."""
_NOT_INSTALLED = "not installed"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, nargs="?", help="show what is in this checkpoint, or .onnx file, instead")


def run(options: argparse.Namespace) -> dict[str, Any]:
    return _of_checkpoint(options) if options.checkpoint is not None else _of_here(options)


def _of_checkpoint(options: argparse.Namespace) -> dict[str, Any]:
    layer = portnorm.load(options.checkpoint)
    arrays = {name: {"dtype": str(a.dtype), "shape": list(a.shape)} for name, a in layer.state_dict().items()}
    found = {"layer": repr(layer), "parameters": sum(int(p.size) for p in layer.parameters().values()), "arrays": arrays}
    if not options.json:
        print(f"{layer}\n{found['parameters']:,} parameters")
        for name, a in arrays.items():
            print(f"  {name:<32} {a['dtype']:<10} {tuple(a['shape'])}")
    return found


def _of_here(options: argparse.Namespace) -> dict[str, Any]:
    packages, extras, runtimes = _packages(), _extras(), _runtimes()
    libraries = {row.name: _of_library(row) for row in SUPPORT.values()}
    kernels = importlib.import_module("portnorm_backends.cpu.warming").state()
    here = {"portnorm": portnorm.__version__, "python": platform.python_version()}
    if not options.json:
        where = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
        print(f"portnorm {here['portnorm']}, Python {here['python']}, {where}, in {Path(portnorm.__file__).parent}")
        _print("array libraries", [(n, v, "" if v else SUPPORT[n].remedy().partition(";")[0]) for n, v in libraries.items()])
        _print("inference runtimes", [(name, row["version"], row["note"]) for name, row in runtimes.items()])
        _print("packages", [(n, v, _note_of(n, v, extras)) for n, v in packages.items()])
        _print("kernels for NumPy arrays", _of_kernels(kernels))
    return {**here, **packages, "libraries": libraries, "runtimes": runtimes, "kernels": kernels}


def _note_of(package: str, version: str | None, extras: dict[str, str]) -> str:
    """The extra that brings a package; how to install it where it is not there."""
    extra = extras.get(package)
    return "" if extra is None else f"extra {extra}" if version else install(extra)


def _print(title: str, rows: list[tuple[str, str | None, str]]) -> None:
    print(f"\n{title}")
    for name, found, note in rows:
        print(f"  {name:<20} {found or _NOT_INSTALLED:<15} {note}".rstrip())


def _extras() -> dict[str, str]:
    """The packages that extras bring, each with the extra that brings least beside it; nothing where portnorm was not installed by pip."""
    try:
        required = importlib.metadata.requires("portnorm") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    extras: dict[str, list[str]] = {}
    for line in required:
        if marked := re.search(r"extra == ['\"]([^'\"]+)", line):
            extras.setdefault(marked[1], []).append(re.split(r"[\s\[<>=!~;]", line, maxsplit=1)[0])
    found: dict[str, str] = {}
    for extra, packages in sorted(extras.items(), key=lambda item: (len(item[1]), item[0])):
        for package in packages if extra not in _OF_DEVELOPERS else ():
            found.setdefault(package, extra)
    return found


def _packages() -> dict[str, str | None]:
    """Versions of what portnorm needs and may use."""
    names = ("array-api-compat", "numpy", "onnx", "onnxruntime", "numba", *(row.package for row in SUPPORT.values()), *_extras())
    return {name: _version(name) for name in dict.fromkeys(names)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _of_library(row: Support) -> str | None:
    """Its version without an import, which takes seconds for some; a package of another name may bring it, as those of CuPy do."""
    root = row.module.partition(".")[0]
    if importlib.util.find_spec(root) is None:
        return None
    return _version(row.package) or next(
        (_version(package) for package in importlib.metadata.packages_distributions().get(root, ())), "of an unknown version"
    )


def _runtimes() -> dict[str, dict[str, Any]]:
    """Every runtime that graphs are checked in, with its version, and what it is or what is missing."""
    if importlib.util.find_spec("onnx") is None or importlib.util.find_spec("ml_dtypes") is None:
        return {"onnxruntime": {"version": None, "note": f"{install('onnx')}; then the others are listed too"}}
    found = {}
    for name, row in importlib.import_module("portnorm_onnx.runtimes").RUNTIMES.items():
        try:
            found[name] = {"version": row.version(), "note": row.note}
        except MissingExtraError as error:
            found[name] = {"version": None, "note": str(error).removeprefix(f"{name} is not installed: ")}
    return found


def _of_kernels(kernels: dict[str, Any]) -> list[tuple[str, str | None, str]]:
    if not kernels["numba"]:
        return [("numba", None, f"definitions alone compute; {install('fast')}")]
    families_of = importlib.import_module("portnorm_backends.cpu.families").families_of
    how = "compiles in the background" if kernels["mode"] == "background" else "compiles while a call waits"
    rows: list[tuple[str, str | None, str]] = [("numba", kernels["numba"], how)]
    for kind, there in kernels["compiled"].items():
        families = families_of(kind)
        missing = [name for name in families if name not in there]
        said = [", ".join(there)] if there else []
        said += [f"not yet: {', '.join(missing)} (`portnorm warm --dtype {kind}`)"] if missing else []
        rows.append((kind, f"{len(there)} of {len(families)}", "; ".join(said)))
    return [*rows, ("cache", "in", kernels["cache"])]
