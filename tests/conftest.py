"""Array libraries as a test parameter, and what is left out unless it is asked for; what was asked for and is missing is an error.

`--peers` adds torch, JAX, Dask, MLX and PaddlePaddle, and CuPy, which is skipped by name where it finds no GPU.
`--models` adds the real models of docs/real-models.md, and fails where a package of theirs is missing.
`--runtimes openvino,tract` adds tests marked `runtime(name)`; `--runtimes installed` adds those that are there, and the head of the report
names the others.
`--registers 16` (or 32, 64) compiles the kernels for NumPy arrays for vector registers of so many bytes.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("JAX_ENABLE_X64", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("KERAS_BACKEND", "numpy")
os.environ.setdefault("PORTNORM_KERNELS", "wait")

import numpy as np
import pytest

from benchmarks import models
from portnorm.arrays import load_namespace, to_numpy
from portnorm.dtypes import load_dtype
from portnorm.errors import MissingExtraError
from portnorm.libraries import SUPPORT, Support
from portnorm_backends.cpu import registers
from portnorm_onnx.runtimes import RUNTIMES, Runtime, _openvino_module

collect_ignore = ["torch_cells.py"]  # has no tests, and imports torch


@dataclass(frozen=True)
class Library:
    """Arrays of a library of `portnorm.libraries.SUPPORT`, as the tests make them."""

    name: str
    support: Support
    dtypes: tuple[str, ...]

    @property
    def xp(self) -> Any:
        xp = load_namespace(self.support.name)
        if self.name == "array_api_strict":
            xp.set_array_api_strict_flags(boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=())
        return xp

    @property
    def widest(self) -> str:
        """The floating type in which it holds an array of float64."""
        return self.support.dtypes[-1]

    def array(self, values: Any, dtype: str | None = None) -> Any:
        """An array of this library, from anything that NumPy takes; `None` stays `None`. Those of a lazy one are in chunks of two."""
        if values is None:
            return None
        if dtype == "bfloat16":
            return self.xp.asarray(np.array(values, dtype="float32"), dtype=load_dtype(self.xp, dtype))
        values = np.array(values, dtype=dtype)
        if self.name == "numpy-readonly":
            values.flags.writeable = False
        if self.support.lazy:
            return self.xp.asarray(values, chunks=2) if values.ndim else self.xp.asarray(values)
        return values if self.support.name == "numpy" else self.xp.asarray(values)

    def values(self, arrays: Iterable[Any]) -> list[Any]:
        """What these arrays hold, in NumPy; those of a lazy library are computed together."""
        arrays = list(arrays)
        if self.support.lazy:
            arrays = importlib.import_module(self.support.name).compute(*arrays, optimize_graph=False)
        return [to_numpy(a) for a in arrays]

    def marks(self) -> list[pytest.MarkDecorator]:
        """When its tests run: always, with `--peers`, and where it needs a GPU only if there is one."""
        if self.support.always:
            return []
        if not self.support.gpu:
            return [pytest.mark.peers]
        try:
            self.support.version()
        except MissingExtraError as error:
            return [pytest.mark.peers, pytest.mark.skip(reason=f"no test ran on {self.name}: {error}")]
        return [pytest.mark.peers]


LIBRARIES = {row.name: Library(row.name, row, row.dtypes) for row in SUPPORT.values()}
LIBRARIES["numpy-readonly"] = Library("numpy-readonly", SUPPORT["numpy"], ("float32",))


def pytest_addoption(parser: Any) -> None:
    parser.addoption(
        "--peers", action="store_true", help="also run what needs torch, JAX, Dask, MLX or PaddlePaddle; fails if they are not installed"
    )
    parser.addoption("--models", action="store_true", help="also run the real models; fails if their packages are not installed")
    parser.addoption("--runtimes", default="", help="also run what needs these inference runtimes, by commas, or all that are 'installed'")
    parser.addoption("--registers", type=int, choices=(16, 32, 64), help="compile the kernels for vector registers of so many bytes")
    parser.addoption("--update-golden", action="store_true", help="write tests/golden anew from what the exporter makes")


def pytest_configure(config: Any) -> None:
    config.addinivalue_line("markers", "peers: needs torch, JAX, Dask, MLX or PaddlePaddle; runs with --peers only")
    config.addinivalue_line("markers", "models: needs the packages of docs/examples/real-models.txt; runs with --models only")
    config.addinivalue_line("markers", "runtime(name): needs an inference runtime besides onnxruntime; runs with --runtimes only")
    if config.getoption("--registers"):
        assert "portnorm_backends.cpu.vectors" not in sys.modules, "kernels are loaded already"
        registers.WIDTH = config.getoption("--registers")
    if config.getoption("--peers"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # paddle's, that a compiler's cache is not installed
            for row in SUPPORT.values():
                if not row.gpu:
                    importlib.import_module(row.module)
    if config.getoption("--models"):
        try:
            models.packages()
        except importlib.metadata.PackageNotFoundError as error:
            raise pytest.UsageError(f"--models: not installed here: {error.name}") from error
    asked = config.getoption("--runtimes")
    config.missing_runtimes = [name for name in _OTHERS if not _is_installed(name)] if asked else []
    config.asked_runtimes = set(_OTHERS) - set(config.missing_runtimes) if asked == "installed" else set(filter(None, asked.split(",")))
    if missing := config.asked_runtimes & {*config.missing_runtimes} | (config.asked_runtimes - {*_OTHERS}):
        raise pytest.UsageError(f"--runtimes: not installed here: {', '.join(sorted(missing))}")


_OTHERS = [name for name in RUNTIMES if name not in ("onnxruntime", "reference")]


def _is_installed(runtime: str) -> bool:
    try:
        return bool(RUNTIMES[runtime].version()) and not (runtime == "openvino-default" and _rounds_by_itself())
    except MissingExtraError:
        return False


def _rounds_by_itself() -> bool:
    """Whether OpenVINO, left alone, computes in bfloat16 on this processor: then its results are not to be held to those of float32."""
    return str(_openvino_module().Core().get_property("CPU", "INFERENCE_PRECISION_HINT")) != "<Type: 'float32'>"


def pytest_report_header(config: Any) -> str | None:
    return (
        f"runtimes not installed, or not in float32 on this processor, so not tested: {', '.join(config.missing_runtimes)}"
        if config.missing_runtimes
        else None
    )


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """What was not asked for is deselected, and counted as such in the last line."""

    def asked(item: Any) -> bool:
        runtime = item.get_closest_marker("runtime")
        if runtime is not None and runtime.args[0] not in config.asked_runtimes:
            return False
        return all(config.getoption(f"--{name}") or not item.get_closest_marker(name) for name in ("peers", "models"))

    config.hook.pytest_deselected(items=[item for item in items if not asked(item)])
    items[:] = [item for item in items if asked(item)]


def pytest_generate_tests(metafunc: Any) -> None:
    """`library` is every library, `eager` each that computes at once."""
    for fixture in {"library", "eager"} & {*metafunc.fixturenames}:
        each = "dtype_of_library" in metafunc.fixturenames
        rows = []
        for row in LIBRARIES.values():
            if fixture == "eager" and row.support.lazy:
                continue
            for dtype in row.dtypes if each else [None]:
                values, name = ((row, dtype), f"{row.name}-{dtype}") if each else ((row,), row.name)
                rows.append(pytest.param(*values, marks=row.marks(), id=name))
        metafunc.parametrize((fixture, "dtype_of_library") if each else (fixture,), rows)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20261120)


@pytest.fixture
def runtimes() -> Iterator[dict[str, Runtime]]:
    """The table of runtimes, as a test may change it; afterwards it is as before, in the order that documents list."""
    before = dict(RUNTIMES)
    yield RUNTIMES
    RUNTIMES.clear()
    RUNTIMES.update(before)
