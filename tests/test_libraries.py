"""The same lines on every array library: values and cotangents equal those of NumPy in float64, in every dtype that the library has."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import portnorm as pn
from portnorm import arrays
from portnorm.arrays import to_numpy, xp_of
from portnorm.dtypes import dtype_name
from tests.cases import IMPLEMENTATIONS, LAYERS, OPS, PRESETS, OpCase, random_recurrent, random_state
from tests.conftest import Library
from tests.tolerances import OPERATION, RECURRENT, relative


def converted(value: Any, library: Library, dtype: str) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    return library.array(value, dtype if value.dtype == np.float64 else None)


def assert_same(result: Any, expected: Any, dtype: str, table: dict[str, float] = OPERATION) -> None:
    """`result`, an array of any library, has the values of `expected`, and the dtype where `expected` has float64."""
    if expected.dtype == np.float64:
        assert dtype_name(xp_of(result), result.dtype) == dtype
    np.testing.assert_allclose(to_numpy(result).astype(np.float64), expected, **relative(dtype, table))


def rounded(value: Any, dtype: str) -> Any:
    """Floating values as `dtype` has them, in float64."""
    if not isinstance(value, np.ndarray) or value.dtype != np.float64:
        return value
    return value.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).astype(np.float64)


@pytest.mark.parametrize("case", OPS, ids=lambda case: case.name)
def test_op(case: OpCase, library: Library, dtype_of_library: str, rng: np.random.Generator) -> None:
    dtype = dtype_of_library
    # Rounded to the narrow type first, so that both sides see the same numbers; small means, since float16 cannot hold 30 ± 1e-3.
    arguments = [a - 30.0 if k == 0 and a.size and a.mean() > 20 else a for k, a in enumerate(case.arguments(rng))]
    arguments = [rounded(a, dtype) for a in arguments]
    keywords = {k: rounded(v - 30.0 if k == "mean" else v, dtype) for k, v in case.keywords.items()}
    expected, expected_pullback = pn.vjp(case.op, *arguments, **keywords)
    dy = rounded(np.asarray(rng.standard_normal(np.shape(expected))), dtype)
    theirs = [converted(a, library, dtype) for a in arguments]
    y, pullback = pn.vjp(case.op, *theirs, **{k: converted(v, library, dtype) for k, v in keywords.items()})
    assert_same(y, np.asarray(expected), dtype)
    assert type(y) is type(case.op(*theirs, **{k: converted(v, library, dtype) for k, v in keywords.items()}))
    cotangents = pullback(converted(dy, library, dtype))
    for mine, other in zip(expected_pullback(dy), cotangents, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            assert_same(other, mine, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("cell", "norm"), [row for row in IMPLEMENTATIONS if row[1] != "fastrnns-decomposed"])
def test_published_cell(cell: str, norm: str, eager: Library, rng: np.random.Generator) -> None:
    """In training where there is float64: in float32 the variance of the two sequences that are left can be as small as chance has it."""
    test_recurrent(cell, norm, True, [5, 2, 3], eager.dtypes[-1] == "float64", eager, rng)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("both", "lengths"), [(False, None), (True, [5, 2, 3])], ids=["forward", "ragged, both directions"])
@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_recurrent(cell: str, norm: str | None, both: bool, lengths: Any, training: bool, eager: Library, rng: np.random.Generator) -> None:
    library, dtype = eager, eager.dtypes[-1]
    reference = random_recurrent(cell, norm, rng, bidirectional=both)
    layer = LAYERS[cell](4, 3, norm=norm, t_max=4, bidirectional=both, xp=library.xp, dtype=dtype)
    layer.load_state_dict(reference.state_dict())
    x, state, n = rng.standard_normal((5, 3, 4)), random_state(reference, 3, rng), len(layer.cell.states)
    y, last, pullback = reference.vjp(x, state, lengths, training=training)
    dy = rng.standard_normal(y.shape)
    dx, dstate, grads = pullback(dy)
    theirs = tuple(library.array(s, dtype) if s.ndim else layer._new(s, integer=True) for s in state)
    their_y, their_last, their_pullback = layer.vjp(library.array(x, dtype), theirs, lengths, training=training)
    their_dx, their_dstate, their_grads = their_pullback(library.array(dy, dtype))
    expected = (y, *last[:n], dx, *dstate, *grads.values(), *reference.buffers.values())
    found = (
        their_y,
        *their_last[:n],
        their_dx,
        *their_dstate,
        *(their_grads[k] for k in grads),
        *(layer.buffers[k] for k in reference.buffers),
    )
    for mine, other in zip(expected, library.values(found), strict=True):
        assert_same(other, mine, dtype, RECURRENT)


@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_layer_moves_between_libraries(cell: str, norm: str | None, library: Library, rng: np.random.Generator) -> None:
    layer = pn.Sequential(LAYERS[cell](3, 4, norm=norm, rng=0), pn.Linear(4, 2, rng=0))
    moved = layer.to(xp=library.xp)
    x = rng.standard_normal((5, 2, 3)).astype(np.float32)
    assert_same(moved(moved._new(x))[0], layer(x)[0].astype(np.float64), "float32")
    for name, array in moved.to(xp="numpy").state_dict().items():
        np.testing.assert_array_equal(array, layer.state_dict()[name])


@pytest.mark.parametrize("optimizer", [pn.SGD(0.1, momentum=0.5), pn.RMSProp(0.1), pn.Adam(0.1)], ids=lambda o: type(o).__name__)
def test_optimizer(optimizer: Any, library: Library, rng: np.random.Generator) -> None:
    params, grads = ({"w": rng.standard_normal((2, 3)).astype("float32"), "b": rng.standard_normal(3).astype("float32")} for _ in range(2))
    results = []
    for convert in (np.array, library.array):
        theirs, their_grads = ({n: convert(a) for n, a in group.items()} for group in (params, grads))
        state = optimizer.init(theirs)
        for _ in range(3):
            clipped, norm = pn.clip_by_global_norm(their_grads, 1.0)
            theirs, state = optimizer.update(theirs, clipped, state)
        results.append({**theirs, "norm": norm})
    for name, array in results[0].items():
        assert_same(results[1][name], np.asarray(array, dtype=np.float64), "float32")


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_a_second_device_is_never_left(cell: str, norm: str | None, training: bool, rng: np.random.Generator) -> None:
    """array-api-strict refuses to mix devices: whatever is made on the way must be made where `x` is."""
    import array_api_strict as xp

    device = xp.Device("device1")
    layer = random_recurrent(cell, norm, rng, bidirectional=True).to(xp=xp, device=device)
    assert all(a.device == device for a in layer.state_dict().values())
    model = pn.Sequential(layer, pn.LayerNorm(6, xp=xp, device=device, dtype="float64"))
    x = xp.asarray(rng.standard_normal((5, 3, 4)), device=device)
    y, state, pullback = model.vjp(x, lengths=[5, 2, 3], training=training)
    dx, dstate, grads = pullback(y)
    for array in (y, dx, *state[0], *dstate[0], *grads.values(), *model.buffers.values()):
        assert array.device == device


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_clipping_keeps_the_direction_of_gradients_of_any_size(size: float, library: Library, rng: np.random.Generator) -> None:
    """In float32 the squares of 1e30 are infinite and those of 1e-30 are 0."""
    direction = rng.standard_normal(5)
    grads = {"w": library.array(size * direction[:3], "float32"), "b": library.array(size * direction[3:], "float32")}
    clipped, norm = pn.clip_by_global_norm(grads, 0.5)
    np.testing.assert_allclose(float(norm), size * np.linalg.norm(direction), rtol=1e-6)
    expected = size * direction * min(1.0, 0.5 / (size * np.linalg.norm(direction)))
    np.testing.assert_allclose(np.concatenate([to_numpy(clipped[n]) for n in ("w", "b")]), expected, rtol=1e-6)


@pytest.mark.parametrize("limit", [1e-7, 1e-3, 1.0])
def test_clipping_of_the_largest_gradients_keeps_all_bits(limit: float, library: Library) -> None:
    """limit / norm is 3e-42 where the gradients are 3e38 and the limit 1e-3, of which float32 has 11 bits."""
    values = 3e38 * np.array([0.6, -0.3, 0.2])
    (clipped,) = pn.clip_by_global_norm({"w": library.array(values, "float32")}, limit)[0].values()
    np.testing.assert_allclose(to_numpy(clipped), limit * values / 3e38 / np.linalg.norm(values / 3e38), rtol=1e-6)


def test_the_row_of_a_library_is_true(library: Library) -> None:
    """What is declared without importing the library, against the library; that `out=` is written to is tested in test_normalize.py."""
    row, zeros = library.support, library.array(np.zeros(3))
    found = arrays.library(zeros)
    assert row.name == found.name
    assert {*row.kernels} == {*found.kernels}
    assert row.autodiff == (found.autodiff is not None)
    assert row.lazy == (not found.is_concrete(zeros))
    every = ("float16", "bfloat16", "float32", "float64")
    assert [d for d in every if hasattr(library.xp, d) or d in found.more_dtypes] == [*row.dtypes]
