"""What the functions of `engines.py` share: a graph's lengths and types, results by name, and converters that are programs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import onnx

NumPyArray = numpy.ndarray[Any, Any]
Run = Callable[[Mapping[str, NumPyArray]], dict[str, NumPyArray]]
Load = Callable[[str], Run]


class RefusedError(RuntimeError):
    """A runtime, or its converter, does not take a graph."""


Value = onnx.ValueInfoProto


def graph_of(path: str) -> onnx.GraphProto:
    return onnx.load(path, load_external_data=False).graph


def dims_of(value: Value) -> list[int | str]:
    return [d.dim_param or int(d.dim_value) for d in value.type.tensor_type.shape.dim]


def fixed(value: Value, runtime: str) -> list[int]:
    """The shape of an input; raises `RefusedError` where lengths are open."""
    dims = dims_of(value)
    if any(isinstance(d, str) for d in dims):
        raise RefusedError(f"{runtime} takes fixed shapes only, and {value.name!r} is {dims}: export with numbers in `input_shape`")
    return [d for d in dims if isinstance(d, int)]


def kind_of(value: Value) -> Any:
    return onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)


def naming(outputs: Sequence[Value]) -> Callable[[Sequence[Any]], dict[str, NumPyArray]]:
    """Results by name, in the graph's types and number of axes: some runtimes have no int64, or no array without axes."""
    said = [(o.name, numpy.dtype(kind_of(o)), len(dims_of(o))) for o in outputs]

    def named(arrays: Sequence[Any]) -> dict[str, NumPyArray]:
        found = {}
        for (name, kind, axes), given in zip(said, arrays, strict=True):
            a = numpy.asarray(given)
            if axes == 0 and a.size == 1:
                a = a.reshape(())
            found[name] = a.astype(kind) if a.dtype != kind and a.dtype.kind == kind.kind else a
        return found

    return named


def command(*words: str, folder: str) -> None:
    """Run a converter; raises `RefusedError` with the end of what it says."""
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        raise RefusedError(f"{words[0]} does not convert the graph: {next((line for line in said if 'rror' in line), said[-1])[:250]}")


def inside(path: str, folder: str) -> str:
    """A copy in a folder, with its weights in the file itself: converters write beside what they read."""
    copy = f"{folder}/m.onnx"
    onnx.save(onnx.load(path), copy)
    return copy
