"""`portnorm warm`: kernels compiled beforehand."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

import portnorm


def add_options(parser: argparse.ArgumentParser) -> None:
    types = importlib.import_module("portnorm_backends.cpu.families").TYPES
    parser.add_argument("--dtype", action="append", help=f"{', '.join(types)}; may be repeated (default: float32)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    there = {dtype: portnorm.warm(dtype=dtype) for dtype in options.dtype or ["float32"]}
    if not options.json:
        for dtype, names in there.items():
            print(
                f"{dtype}: {len(names)} families of kernels are compiled"
                if names
                else f"{dtype}: without numba there is nothing to compile"
            )
    return there
