"""Array libraries as a test parameter, and what is left out unless it is asked for; what was asked for and is missing is an error.

`--peers` adds torch and JAX. `--runtimes openvino,tract` adds tests marked `runtime(name)`; `--runtimes installed` adds those that are
there, and the head of the report names the others.
"""

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

from portnorm.errors import MissingExtraError
from portnorm_onnx.runtimes import RUNTIMES

collect_ignore = ["torch_cells.py"]  # has no tests, and imports torch


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
    parser.addoption("--runtimes", default="", help="also run what needs these inference runtimes, by commas, or all that are 'installed'")
    parser.addoption("--update-golden", action="store_true", help="write tests/golden anew from what the exporter makes")


def pytest_configure(config: Any) -> None:
    config.addinivalue_line("markers", "peers: needs torch or JAX; runs with --peers only")
    config.addinivalue_line("markers", "runtime(name): needs an inference runtime besides onnxruntime; runs with --runtimes only")
    if config.getoption("--peers"):
        for library in PEERS:
            importlib.import_module(library.namespace)
    asked = config.getoption("--runtimes")
    config.missing_runtimes = [name for name in _OTHERS if not _is_installed(name)] if asked else []
    config.asked_runtimes = set(_OTHERS) - set(config.missing_runtimes) if asked == "installed" else set(filter(None, asked.split(",")))
    if missing := config.asked_runtimes & {*config.missing_runtimes} | (config.asked_runtimes - {*_OTHERS}):
        raise pytest.UsageError(f"--runtimes: not installed here: {', '.join(sorted(missing))}")


_OTHERS = [name for name in RUNTIMES if name not in ("onnxruntime", "reference")]


def _is_installed(runtime: str) -> bool:
    try:
        return bool(RUNTIMES[runtime].version())
    except MissingExtraError:
        return False


def pytest_report_header(config: Any) -> str | None:
    return f"runtimes not installed, so not tested: {', '.join(config.missing_runtimes)}" if config.missing_runtimes else None


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """What was not asked for is deselected, and counted as such in the last line."""

    def asked(item: Any) -> bool:
        runtime = item.get_closest_marker("runtime")
        if runtime is not None and runtime.args[0] not in config.asked_runtimes:
            return False
        return config.getoption("--peers") or not item.get_closest_marker("peers")

    config.hook.pytest_deselected(items=[item for item in items if not asked(item)])
    items[:] = [item for item in items if asked(item)]


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
