"""The array libraries as they are measured."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy

from portnorm.arrays import load_namespace, to_numpy, without_kernels
from portnorm.dtypes import load_dtype
from portnorm.errors import UnsupportedError
from portnorm.libraries import SUPPORT, Support


@dataclass(frozen=True)
class Library(Support):
    """One array library, and how it is measured."""

    subnormals: bool = True
    """Whether numbers below the smallest normal one are kept; else they are 0, and cases of them are not measured."""
    context: Callable[[], Any] = contextlib.nullcontext
    """What a measurement runs in."""
    compiled: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function
    """What makes a program of a function of arrays, where that is how the library is used."""

    def array(self, values: Any, dtype: str) -> Any:
        """An array of float64 values in a type of the library."""
        xp = load_namespace(self.module)
        made = xp.asarray(values, dtype=load_dtype(xp, dtype))
        if type(made) is numpy.ndarray and self.module != "numpy":
            raise UnsupportedError(
                f"arrays of {self.module} are those of NumPy, which computes with them: {self.module} would not be called. Give it a "
                "type of its own, or measure its functions by conform.of_function"
            )
        return made

    def values(self, a: Any) -> Any:
        """A NumPy float64 array of the values of an array."""
        return to_numpy(a).astype(numpy.float64)


def _wide_jax() -> Any:
    import jax

    return jax.enable_x64(True)


def _jitted(function: Callable[..., Any]) -> Callable[..., Any]:
    import jax

    return jax.jit(function)  # type: ignore[no-any-return]


def _computed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Results computed at once, so that what they share is computed once."""
    import dask

    return lambda made: dask.compute(function(made), scheduler="synchronous")[0]


def _kernels() -> Any:
    """The kernels are what is measured, so each call waits for them."""
    return importlib.import_module("portnorm_backends.cpu.warming").waiting()


def _of(row: Support, **how: Any) -> Library:
    return Library(**{**vars(row), **how})


# What XLA compiles at once it fuses: the harder test of the definitions, in half the time of one operation after the other.
_HOW: dict[str, dict[str, Any]] = {
    "jax": {"subnormals": False, "context": _wide_jax, "compiled": _jitted},
    "dask": {"compiled": _computed},
}

LIBRARIES: dict[str, Library] = {
    row.name: row
    for row in (
        _of(SUPPORT["numpy"], context=_kernels),
        _of(SUPPORT["numpy"], name="numpy-definitions", context=lambda: without_kernels(numpy.ndarray)),
        *(_of(row, **_HOW.get(name, {})) for name, row in SUPPORT.items() if name != "numpy"),
    )
}
"""Array libraries by name, and NumPy without its kernels."""
