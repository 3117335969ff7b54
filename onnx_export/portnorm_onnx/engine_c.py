"""Graphs as C."""

from __future__ import annotations

import ctypes
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy

from portnorm_onnx.engine_parts import NumPyArray, RefusedError, Run, command, fixed, graph_of, inside, kind_of, naming

C_OPTIONS = ("--large-weight-threshold", "0", "--large-temp-threshold", "0")
"""Weights in the C: by itself it puts more than 100 kB into a file that the program has to load first. No memory but the stack."""
WHOLE_NODES = "-DEMX_NODE_FN=static __attribute__((noinline))"
"""Each node a function that stays one: else sums in any order make 0 of the sum of what a mean was subtracted from, as in exact numbers."""
CC_OPTIONS = ("-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-D__FAST_MATH__", WHOLE_NODES)
"""Sums in any order, or no product is vectorized. NaN stays NaN, for which the compiler leaves out the macro; by it glibc gives functions
of vectors."""


_STEPS = """#include <stdint.h>
#include <string.h>
void portnorm_model({types});
void portnorm_steps(const int64_t *n, void **at, const int64_t *bytes, const char *x, char *y, const int64_t *from, const int64_t *into) {{
    for (int64_t t = 0; t < n[0]; ++t) {{
        memcpy(at[n[2]], x + t * bytes[n[2]], bytes[n[2]]);
        portnorm_model({places});
        memcpy(y + t * bytes[n[3]], at[n[3]], bytes[n[3]]);
        for (int64_t k = 0; k < n[1]; ++k)
            memcpy(at[into[k]], at[from[k]], bytes[into[k]]);
    }}
}}
"""
"""A loop in C around a step: `n` holds the numbers of steps and states, and the places of x and y."""


def c(path: str) -> Run:
    """C that emx-onnx-cgen writes, compiled by the C compiler that is there."""
    graph = graph_of(path)
    shapes = [fixed(v, "C") for v in (*graph.input, *graph.output)]
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        raise RefusedError("there is no C compiler: none of cc, gcc, clang")
    with tempfile.TemporaryDirectory(prefix="portnorm-") as folder:
        command("emx-onnx-cgen", "compile", inside(path, folder), "m.c", *C_OPTIONS, "--model-name", "portnorm_model", folder=folder)
        places = [f"at[{k}]" for k in range(len(shapes))]
        Path(folder, "steps.c").write_text(_STEPS.format(types=", ".join(["void *"] * len(shapes)), places=", ".join(places)))
        command(compiler, *CC_OPTIONS, "-shared", "-fPIC", "m.c", "steps.c", "-o", "m.so", "-lm", folder=folder)
        library = ctypes.CDLL(f"{folder}/m.so")
    function, names, named = library.portnorm_model, [i.name for i in graph.input], naming(graph.output)
    function.restype = library.portnorm_steps.restype = None
    arrays = [numpy.zeros(shape, kind_of(v)) for shape, v in zip(shapes, (*graph.input, *graph.output), strict=True)]
    at = [ctypes.c_void_p(a.ctypes.data) for a in arrays]
    count = len(names)

    def run(given: Mapping[str, NumPyArray]) -> dict[str, NumPyArray]:
        for name, a in zip(names, arrays, strict=False):
            if given[name].shape != a.shape:
                raise RefusedError(f"{name!r} has shape {given[name].shape}; expected {a.shape}")
            a[...] = given[name]
        function(*at)
        return named([a.copy() for a in arrays[count:]])

    def steps(given: Mapping[str, NumPyArray], fed: Mapping[str, str]) -> NumPyArray:
        place = {v.name: k for k, v in enumerate((*graph.input, *graph.output))}
        for name in fed.values():
            arrays[place[name]][...] = given[name]
        x = numpy.ascontiguousarray(given["x"], arrays[place["x"]].dtype)
        y = numpy.zeros((len(x), *arrays[place["y"]].shape), arrays[place["y"]].dtype)
        numbers = (
            [len(x), len(fed), place["x"], place["y"]],
            [a.ctypes.data for a in arrays],
            [a.nbytes for a in arrays],
            [place[name] for name in fed],
            [place[name] for name in fed.values()],
        )
        n, pointers, sizes, taken, into = (numpy.array(some, numpy.int64) for some in numbers)
        library.portnorm_steps(*(ctypes.c_void_p(a.ctypes.data) for a in (n, pointers, sizes, x, y, taken, into)))
        return y

    run.steps = steps  # type: ignore[attr-defined]
    return run
