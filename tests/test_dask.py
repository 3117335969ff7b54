"""Dask arrays: lazy, chunk by chunk, and larger than what one process may hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from benchmarks.readme import ROOT
from tests.processes import output_of
from tests.tolerances import relative

da = pytest.importorskip("dask.array")
from dask.callbacks import Callback  # noqa: E402


class Watched(Callback):  # type: ignore[misc]
    """How often something was computed, and the largest array that a task gave."""

    def __init__(self) -> None:
        super().__init__()
        self.computations, self.largest = 0, 0

    def _start(self, dsk: Any) -> None:
        self.computations += 1

    def _posttask(self, key: Any, value: Any, dsk: Any, state: Any, worker: Any) -> None:
        parts = value if isinstance(value, tuple | list) else [value]
        self.largest = max([self.largest, *(p.nbytes for p in parts if isinstance(p, np.ndarray))])


@pytest.fixture
def watched() -> Iterator[Watched]:
    with Watched() as watch:
        yield watch


ROWS, CHANNELS = 3000, 6
MASK = np.arange(ROWS)[:, None] % 7 != 0

NORMS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
    "layer_norm": (pn.layer_norm, (), {}),
    "layer_norm over the long axis": (pn.layer_norm, (), {"axis": 0}),
    "rms_norm": (pn.rms_norm, (), {}),
    "group_norm": (pn.group_norm, (2,), {}),
    "batch_norm": (pn.batch_norm, (), {}),
    "batch_norm, masked": (pn.batch_norm, (), {"mask": MASK}),
}


@pytest.mark.parametrize("rows", [512, 700], ids=["chunks of 512", "chunks of 700"])
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_is_lazy_and_goes_chunk_by_chunk(name: str, rows: int, watched: Watched, rng: np.random.Generator) -> None:
    op, extra, keywords = NORMS[name]
    x, dy = 30.0 + rng.standard_normal((ROWS, CHANNELS)), rng.standard_normal((ROWS, CHANNELS))
    lazy = {k: da.from_array(v, chunks=(rows, 1)) if isinstance(v, np.ndarray) else v for k, v in keywords.items()}
    parted, their_dy = (da.from_array(a, chunks=(rows, CHANNELS)) for a in (x, dy))
    y, pullback = pn.vjp(op, parted, *extra, **lazy)
    (dx, *_) = pullback(their_dy)
    assert watched.computations == 0
    assert y.chunks == dx.chunks == parted.chunks
    expected, their_pullback = pn.vjp(op, x, *extra, **keywords)
    for mine, theirs in ((y, expected), (dx, their_pullback(dy)[0])):
        assert float(abs(mine - da.from_array(theirs, chunks=(rows, CHANNELS))).max().compute()) < 1e-10
    assert watched.largest <= rows * CHANNELS * 8


def test_running_statistics_of_a_layer_are_lazy(watched: Watched, rng: np.random.Generator) -> None:
    x = 3.0 + rng.standard_normal((1000, 4))
    layer, reference = pn.BatchNorm(4, dtype="float64", xp="dask"), pn.BatchNorm(4, dtype="float64")
    layer(da.from_array(x, chunks=(100, 4)), training=True)
    assert watched.computations == 0
    reference(x, training=True)
    for name, buffer in reference.buffers.items():
        np.testing.assert_allclose(layer.buffers[name].compute(), buffer, **relative("float64"))


def test_lengths_are_not_looked_at(watched: Watched, rng: np.random.Generator) -> None:
    layer = pn.LSTM(2, 3, norm="layer", dtype="float64", rng=0)
    x, lengths = rng.standard_normal((4, 6, 2)), np.array([4, 1, 2, 3, 4, 0])
    theirs = layer.to(xp="dask")
    y, _ = theirs(da.from_array(x, chunks=(4, 2, 2)), lengths=da.from_array(lengths, chunks=2))
    assert watched.computations == 0
    np.testing.assert_allclose(y.compute(), layer(x, lengths=lengths)[0], **relative("float64"))


CLUSTER = """
import dask.array as da, numpy as np, portnorm as pn, tempfile
from distributed import Client, LocalCluster

limit = 256 * 2**20
with tempfile.TemporaryDirectory() as place, LocalCluster(
    n_workers=2, threads_per_worker=1, memory_limit=limit, local_directory=place, dashboard_address=None
) as cluster, Client(cluster) as client:
    x = da.random.default_rng(0).normal(30.0, 2.0, size=(8_500_000, 8), chunks=(85_000, 8))
    assert x.nbytes > 2 * limit  # of both workers together
    layer = pn.BatchNorm(8, xp="dask", dtype="float64", momentum=1.0)
    _, _, buffers = layer.apply(layer.params, layer.buffers, x, training=True)
    mean, var = da.compute(buffers["running_mean"], buffers["running_var"])
    count, total, squares = 0, 0.0, 0.0
    for k in range(x.numblocks[0]):
        block = x.blocks[k].compute()
        count, total, squares = count + len(block), total + (block - 30.0).sum(0), squares + ((block - 30.0) ** 2).sum(0)
expected = total / count
np.testing.assert_allclose(mean, 30.0 + expected, rtol=1e-10)
np.testing.assert_allclose(var, (squares / count - expected**2) * count / (count - 1), rtol=1e-8)
print("equal")
"""


@pytest.mark.slow
def test_statistics_of_more_than_the_workers_may_hold() -> None:
    """A cluster of two processes, whose memory limits together are less than the array."""
    pytest.importorskip("distributed")
    assert output_of(CLUSTER, timeout=600).splitlines()[-1] == "equal"


def test_the_code_of_the_page_runs() -> None:
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "beyond-one-machine.md").read_text(), flags=re.DOTALL)
    ours = [block for block in blocks if "dask" in block or "da." in block]
    assert len(ours) == 2
    for block in ours:
        exec(compile(block, "beyond-one-machine.md", "exec"), names)
