"""Array libraries as a test parameter. Peers (torch, JAX) run with `--peers`; then a missing one is an error, never a skip."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("JAX_ENABLE_X64", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("KERAS_BACKEND", "numpy")

import numpy as np
import pytest


@dataclass(frozen=True)
class Library:
    name: str
    namespace: str
    dtypes: tuple[str, ...]

    @property
    def xp(self) -> Any:
        xp = importlib.import_module(self.namespace)
        if self.name == "array_api_strict":
            xp.set_array_api_strict_flags(boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=())
        return xp

    def array(self, values: Any, dtype: str | None = None) -> Any:
        """An array of this library, from anything that NumPy takes; `None` stays `None`."""
        if values is None:
            return None
        values = np.array(values, dtype=dtype)
        if self.name == "numpy-readonly":
            values.flags.writeable = False
        return values if self.name.startswith("numpy") else self.xp.asarray(values)


ALWAYS = (
    Library("numpy", "array_api_compat.numpy", ("float16", "float32", "float64")),
    Library("numpy-readonly", "array_api_compat.numpy", ("float32",)),
    Library("array_api_strict", "array_api_strict", ("float32", "float64")),
)
PEERS = (
    Library("torch", "array_api_compat.torch", ("float16", "float32", "float64")),
    Library("jax", "jax.numpy", ("float16", "float32", "float64")),
)


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--peers", action="store_true", help="also run what needs torch and JAX; fails if they are not installed")


def pytest_configure(config: Any) -> None:
    config.addinivalue_line("markers", "peers: needs torch or JAX; runs with --peers only")
    if config.getoption("--peers"):
        for library in PEERS:
            importlib.import_module(library.namespace)


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Without `--peers` those tests are deselected, and counted as such in the last line."""
    if not config.getoption("--peers"):
        left = [item for item in items if item.get_closest_marker("peers")]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if not item.get_closest_marker("peers")]


def pytest_generate_tests(metafunc: Any) -> None:
    if "library" in metafunc.fixturenames:
        each = "dtype_of_library" in metafunc.fixturenames
        rows = []
        for row in (*ALWAYS, *PEERS):
            marks = [pytest.mark.peers] if row in PEERS else []
            for dtype in row.dtypes if each else [None]:
                values, name = ((row, dtype), f"{row.name}-{dtype}") if each else ((row,), row.name)
                rows.append(pytest.param(*values, marks=marks, id=name))
        metafunc.parametrize(("library", "dtype_of_library") if each else ("library",), rows)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20261120)
