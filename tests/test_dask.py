"""Dask arrays: lazy, chunk by chunk, and larger than what one process may hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from benchmarks.tables import ROOT
from tests import test_libraries
from tests.cases import OPS, PRESETS, OpCase
from tests.conftest import LIBRARIES
from tests.processes import output_of
from tests.test_libraries import converted
from tests.tolerances import relative

pytestmark = pytest.mark.peers
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


DASK = LIBRARIES["dask"]
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


@pytest.mark.parametrize("case", OPS, ids=lambda case: case.name)
def test_every_op_is_lazy(case: OpCase, watched: Watched, rng: np.random.Generator) -> None:
    """All axes in chunks; the values are those of test_libraries.py."""
    arguments, keywords = case.arguments(rng), case.keywords
    dy = rng.standard_normal(np.shape(case.op(*arguments, **keywords)))
    theirs = [converted(a, DASK, "float64") for a in arguments]
    _, pullback = pn.vjp(case.op, *theirs, **{k: converted(v, DASK, "float64") for k, v in keywords.items()})
    pullback(DASK.array(dy))
    assert watched.computations == 0


@pytest.mark.slow
@pytest.mark.parametrize(("cell", "norm", "training"), [(*p, t) for p in PRESETS for t in (False, True) if t or "batch" in str(p[1])])
def test_recurrent(cell: str, norm: str | None, training: bool, rng: np.random.Generator) -> None:
    """Forward and backward over time, batch and features in chunks."""
    test_libraries.test_recurrent(cell, norm, True, [5, 2, 3], training, DASK, rng)


UNKNOWN: dict[str, Callable[[Any], Any]] = {
    "batch_norm": lambda x: pn.batch_norm(x),
    "batch_renorm": lambda x: pn.batch_renorm(x, mean=DASK.array(np.zeros(3)), var=DASK.array(np.ones(3)), r_max=2.0, d_max=1.0),
    "group_norm": lambda x: pn.group_norm(x, 3),
    "linear": lambda x: pn.linear(x, DASK.array(np.ones((2, 3)))),
    "LSTM": lambda x: pn.LSTM(3, 4, norm="layer", xp="dask", dtype="float64")(x[:, None, :]),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_lengths_that_are_not_known_are_an_error(name: str, rng: np.random.Generator) -> None:
    """Rows that were chosen by their values; where only rows matter they are taken."""
    x = rng.standard_normal((10, 3))
    lazy = da.from_array(x, chunks=(4, 3))
    chosen = lazy[lazy[:, 0] > 0]
    with pytest.raises(pn.ShapeError, match=r"`x` has shape \(nan.*3\), with lengths that are not known yet; x\.compute_chunk_sizes"):
        UNKNOWN[name](chosen)
    np.testing.assert_allclose(pn.layer_norm(chosen).compute(), pn.layer_norm(x[x[:, 0] > 0]), **relative("float64"))
    chosen.compute_chunk_sizes()
    UNKNOWN[name](chosen)


def with_an_empty_chunk(values: Any, axis: int, place: int) -> Any:
    """A Dask array of two chunks along an axis and one without a value, first, in the middle or last."""
    if not isinstance(values, np.ndarray | np.generic):
        return values
    if values.ndim <= axis:
        return DASK.array(values)
    if values.shape[axis] < 2:  # nothing to part; Dask itself cannot broadcast one value in several chunks
        return da.from_array(values, chunks=values.shape)
    half, rest = values.shape[axis] // 2, values.shape[axis] - values.shape[axis] // 2
    lengths = [half, rest]
    lengths.insert(place, 0)
    return da.from_array(values, chunks=tuple(tuple(lengths) if k == axis else (n,) for k, n in enumerate(values.shape)))


EMPTY = pytest.mark.parametrize("place", [0, 1, 2], ids=["first", "middle", "last"])


@EMPTY
@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("case", OPS, ids=lambda case: case.name)
def test_an_op_takes_an_empty_chunk(case: OpCase, axis: int, place: int, rng: np.random.Generator) -> None:
    """Along every axis that one of the arguments has."""
    arguments, keywords = case.arguments(rng), case.keywords
    if axis >= max(np.ndim(a) for a in arguments):
        axis = 0
    y, pullback = pn.vjp(case.op, *arguments, **keywords)
    dy = rng.standard_normal(np.shape(y))
    theirs = [with_an_empty_chunk(a, axis, place) for a in arguments]
    mine, back = pn.vjp(case.op, *theirs, **{k: with_an_empty_chunk(v, axis, place) for k, v in keywords.items()})
    found, expected = [mine, *back(with_an_empty_chunk(dy, axis, place))], [y, *pullback(dy)]
    assert [a is None for a in found] == [a is None for a in expected]
    for one, other in zip(DASK.values(a for a in found if a is not None), (a for a in expected if a is not None), strict=True):
        np.testing.assert_allclose(one, other, **relative("float64"))


LAYERS: dict[str, tuple[Callable[[Any], pn.Layer], tuple[int, ...]]] = {
    "BatchNorm": (lambda xp: pn.BatchNorm(3, dtype="float64", xp=xp), (5, 3)),
    "BatchRenorm": (lambda xp: pn.BatchRenorm(3, dtype="float64", xp=xp), (5, 3)),
    "InstanceNorm": (lambda xp: pn.InstanceNorm(3, affine=True, dtype="float64", xp=xp), (2, 3, 4)),
    "GroupNorm": (lambda xp: pn.GroupNorm(2, 4, dtype="float64", xp=xp), (2, 4, 3)),
    "LayerNorm": (lambda xp: pn.LayerNorm(3, dtype="float64", xp=xp), (2, 4, 3)),
    "RMSNorm": (lambda xp: pn.RMSNorm(3, dtype="float64", xp=xp), (2, 4, 3)),
    "Linear": (lambda xp: pn.Linear(3, 2, dtype="float64", xp=xp, rng=0), (2, 4, 3)),
    **{
        f"{cell} {norm}": (lambda xp, cell=cell, norm=norm: getattr(pn, cell)(3, 2, norm=norm, dtype="float64", xp=xp, rng=0), (2, 4, 3))
        for cell, norm in PRESETS
    },
}


@EMPTY
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if " " not in n or n in ("LSTM layer", "GRU batch") else pytest.mark.slow) for n in LAYERS]
)
def test_a_layer_takes_an_empty_chunk(name: str, place: int, rng: np.random.Generator) -> None:
    make, shape = LAYERS[name]
    x, dy = 3.0 + rng.standard_normal(shape), None
    for axis in range(len(shape)):
        results: list[list[Any]] = []
        for xp in ("numpy", "dask"):
            layer, given = make(xp), x if xp == "numpy" else with_an_empty_chunk(x, axis, place)
            lengths = {"lengths": [2, 0, 1, 2]} if layer.recurrent else {}
            y, *_, pullback = layer.vjp(given, **lengths, training=True)
            dy = rng.standard_normal(y.shape) if xp == "numpy" else with_an_empty_chunk(dy, axis, place)
            dx, *_, grads = pullback(dy)
            results.append([y, dx, *grads.values(), *layer.buffers.values()])
        for one, other in zip(DASK.values(results[1]), results[0], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


@EMPTY
def test_gradients_with_an_empty_chunk_are_clipped(place: int, rng: np.random.Generator) -> None:
    g = rng.standard_normal((4, 3))
    (expected, norm), (clipped, their_norm) = (pn.clip_by_global_norm({"g": a}, 0.5) for a in (g, with_an_empty_chunk(g, 0, place)))
    np.testing.assert_allclose(clipped["g"].compute(), expected["g"], **relative("float64"))
    np.testing.assert_allclose(their_norm.compute(), norm, **relative("float64"))


def test_rows_chosen_by_their_values_leave_a_chunk_empty(rng: np.random.Generator) -> None:
    x = rng.standard_normal((9, 3))
    x[3:6] = -np.abs(x[3:6])
    chosen = da.from_array(x, chunks=(3, 3))
    chosen = chosen[chosen[:, 0] > 0]
    np.testing.assert_allclose(pn.layer_norm(chosen).compute(), pn.layer_norm(x[x[:, 0] > 0]), **relative("float64"))
    chosen.compute_chunk_sizes()
    assert 0 in chosen.chunks[0]
    for norm in (pn.layer_norm, pn.batch_norm):
        np.testing.assert_allclose(norm(chosen).compute(), norm(x[x[:, 0] > 0]), **relative("float64"))


@pytest.mark.parametrize("dtype", ["float64", "float32", "int64", "uint8", "bool"])
@pytest.mark.parametrize("axis", [None, 0, 1, (0, 1)])
def test_the_largest_value_is_that_of_numpy(axis: Any, dtype: str, rng: np.random.Generator) -> None:
    values = rng.integers(-5, 5, (4, 3)).astype(dtype)
    found = DASK.xp.max(with_an_empty_chunk(values, 0, 1), axis=axis, keepdims=True).compute()
    np.testing.assert_array_equal(found, np.max(values, axis=axis, keepdims=True))
    assert found.dtype == dtype


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
    x = da.random.default_rng(0).normal(30.0, 2.0, size=(8_500_000, 8), chunks=(340_000, 8))
    assert x.nbytes > 2 * limit  # of both workers together
    layer = pn.BatchNorm(8, xp="dask", dtype="float64", momentum=1.0)
    _, _, buffers = layer.apply(layer.params, layer.buffers, x, training=True)
    mean, var = da.compute(buffers["running_mean"], buffers["running_var"])
    expected_mean, expected_var = da.compute(x.mean(axis=0), x.var(axis=0, ddof=1))
np.testing.assert_allclose(mean, expected_mean, rtol=1e-10)
np.testing.assert_allclose(var, expected_var, rtol=1e-8)
print("equal")
"""


@pytest.mark.slow
def test_statistics_of_more_than_the_workers_may_hold() -> None:
    """A cluster of two processes, whose memory limits together are less than the array; against Dask's own mean and variance."""
    assert output_of(CLUSTER, timeout=600).splitlines()[-1] == "equal"


def test_the_code_of_the_page_runs() -> None:
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "beyond-one-machine.md").read_text(), flags=re.DOTALL)
    ours = [block for block in blocks if "dask" in block or "da." in block]
    assert len(ours) == 2
    for block in ours:
        exec(compile(block, "beyond-one-machine.md", "exec"), names)
