"""The array libraries: how arrays of each are made, which types it has, and how it is installed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy

from portnorm.arrays import to_numpy, without_kernels
from portnorm.errors import MissingExtraError


@dataclass(frozen=True)
class Library:
    """One array library."""

    name: str
    module: str
    package: str
    dtypes: tuple[str, ...] = ("float32", "float64", "float16", "bfloat16")
    subnormals: bool = True
    """Whether numbers below the smallest normal one are kept; else they are 0, and cases of them are not measured."""
    cells: bool = True
    """Whether recurrent cells are measured: their steps one by one take an array library that computes at once."""
    context: Callable[[], Any] = contextlib.nullcontext
    """What a measurement runs in."""

    def version(self) -> str:
        """The installed version; raises `MissingExtraError` where there is none, or no device that it needs."""
        try:
            module = importlib.import_module(self.module)
            if self.name == "cupy" and not module.cuda.runtime.getDeviceCount():
                raise MissingExtraError("CuPy is installed but there is no CUDA device")
        except MissingExtraError:
            raise
        except Exception as error:
            raise MissingExtraError(f"{self.package} is not usable here: {error}") from None
        return importlib.metadata.version(self.package)

    def array(self, values: Any, dtype: str) -> Any:
        """An array of float64 values in a type of the library."""
        xp = importlib.import_module(self.module)
        return xp.asarray(values, dtype=getattr(xp, dtype))

    def values(self, a: Any) -> Any:
        """A NumPy float64 array of the values of an array."""
        if "bfloat16" in str(getattr(a, "dtype", "")):
            xp = importlib.import_module(self.module)
            a = a.astype(xp.float32) if hasattr(a, "astype") else a.to(xp.float32)
        return to_numpy(a).astype(numpy.float64)


def _wide_jax() -> Any:
    import jax

    return jax.enable_x64(True)


LIBRARIES: dict[str, Library] = {
    row.name: row
    for row in (
        Library("numpy", "numpy", "numpy", ("float32", "float64", "float16")),
        Library("numpy-definitions", "numpy", "numpy", ("float32", "float64", "float16"), context=lambda: without_kernels(numpy.ndarray)),
        Library("array_api_strict", "array_api_strict", "array-api-strict", ("float32", "float64")),
        Library("torch", "torch", "torch"),
        Library("jax", "jax.numpy", "jax", subnormals=False, context=_wide_jax),
        Library("cupy", "cupy", "cupy", ("float32", "float64", "float16")),
        Library("dask", "dask.array", "dask", ("float32", "float64"), cells=False),
    )
}
"""Array libraries by name."""
