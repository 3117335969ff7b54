"""Numbers at the ends of a type: constant rows whose squares are out of range, and sums, counts and states of narrow types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from portnorm.arrays import to_numpy, xp_of
from portnorm.dtypes import dtype_name
from portnorm.op import Op
from tests.cases import LAYERS, PRESETS
from tests.conftest import LIBRARIES, Library
from tests.tolerances import OPERATION, relative

BEYOND = {"float16": (6e4,), "bfloat16": (2e15, 1e38), "float32": (2e15, 1e20, 1e38), "float64": (1e136, 1e150, 1e300)}
"""Values of a type whose squares, or those of a scaled row beside ε, leave its range."""

MASK = np.array([[False, True, True, True, True], [True, True, False, False, True], [False] * 5, [True] * 5])

CONSTANT: dict[str, tuple[Op[..., Any], tuple[Any, ...], int | None, dict[str, Any]]] = {
    "layer_norm": (pn.layer_norm, (), 5, {}),
    "layer_norm without parameters": (pn.layer_norm, (), None, {}),
    "layer_norm of a middle axis": (pn.layer_norm, (), 6, {"axis": 1, "eps": 1e-6}),
    "batch_norm": (pn.batch_norm, (), 6, {}),
    "batch_norm, masked": (pn.batch_norm, (), 6, {"mask": MASK}),
    "batch_norm of parts": (pn.batch_norm, (), 6, {"reduce": lambda a: a + a + a}),
    "group_norm": (pn.group_norm, (3,), 6, {}),
    "group_norm, masked": (pn.group_norm, (3,), 6, {"mask": MASK}),
    "instance_norm": (pn.instance_norm, (), 6, {}),
    "instance_norm, masked": (pn.instance_norm, (), 6, {"mask": MASK}),
}
"""An Op of x (4, 6, 5) with what comes before the parameters, the length of these, and keywords."""


def of(library: Library, value: Any, dtype: str) -> Any:
    return library.array(value, dtype if value.dtype == np.float64 else None) if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize("case", CONSTANT)
def test_a_constant_row_is_the_bias_with_the_gradient_of_any_other(
    case: str, library: Library, dtype_of_library: str, rng: np.random.Generator
) -> None:
    function, more, length, keywords = CONSTANT[case]
    dtype, dy = dtype_of_library, rng.standard_normal((4, 6, 5))
    parameters = () if length is None else (rng.uniform(0.5, 2.0, length), np.full(length, 0.5))
    theirs = [of(library, a, dtype) for a in (*more, *parameters)]
    attributes = {name: of(library, value, dtype) for name, value in keywords.items()}
    expected = np.full((4, 6, 5), 0.0 if length is None else 0.5)
    if "mask" in keywords:
        expected = np.where(MASK[:, None, :], expected, 0.0)

    def found(value: float) -> Any:
        y, pullback = pn.vjp(function, of(library, np.full((4, 6, 5), value), dtype), *theirs, **attributes)
        return library.values([y, *(d for d in pullback(of(library, dy, dtype)) if d is not None)])

    _, *ordinary = found(1.0)
    for value in (*BEYOND[dtype], -BEYOND[dtype][0]):
        y, *cotangents = found(value)
        np.testing.assert_array_equal(y.astype(np.float64), expected)
        for mine, other in zip(cotangents, ordinary, strict=True):
            np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rms_of_a_constant_row_is_its_sign(sign: float, library: Library, dtype_of_library: str) -> None:
    for value in BEYOND[dtype_of_library]:
        y, pullback = pn.vjp(pn.rms_norm, library.array(np.full((2, 6), sign * value), dtype_of_library))
        y, dx = library.values([y, *pullback(library.array(np.ones((2, 6)), dtype_of_library))[:1]])
        np.testing.assert_allclose(y.astype(np.float64), sign, rtol=OPERATION[dtype_of_library])
        np.testing.assert_allclose(dx.astype(np.float64), 0.0, atol=1e-5)


@pytest.mark.parametrize(("cell", "norm"), [row for row in PRESETS if row[1] not in (None, "weight")])
def test_a_recurrent_layer_whose_input_term_is_constant(cell: str, norm: str, eager: Library, rng: np.random.Generator) -> None:
    """Equal weights and equal sequences: every row and every batch of the input term is one number, beyond the range of squares."""
    layer = LAYERS[cell](3, 4, norm=norm, t_max=3, rng=0, xp=eager.xp)
    ones = eager.array(np.ones(layer.params["weight_ih_l0"].shape), "float32")
    layer.assign({**layer.params, "weight_ih_l0": ones})
    y, _, pullback = layer.vjp(eager.array(np.full((1, 2, 3), 2e15), "float32"), training=True)
    dx, _, grads = pullback(eager.array(rng.standard_normal(y.shape), "float32"))
    for array in (y, dx, *grads.values(), *layer.buffers.values()):
        assert np.all(np.isfinite(to_numpy(array)))


# -- narrow types --------------------------------------------------------------------------------------------------------------------------


NARROW = [
    pytest.param((library, dtype), id=f"{library.name}-{dtype}", marks=library.marks())
    for library in LIBRARIES.values()
    for dtype in library.dtypes
    if dtype in ("float16", "bfloat16")
]


@pytest.fixture(params=NARROW)
def narrow_of(request: Any) -> Callable[..., Any]:
    """What makes arrays of a narrow type of a library."""
    library, dtype = request.param
    return lambda values: library.array(np.asarray(values, dtype=np.float64), dtype)


def number(a: Any) -> Any:
    return to_numpy(a).astype(np.float64)


def test_a_mean_over_more_values_than_float16_counts(narrow_of: Any) -> None:
    count = 2**17
    y, target = narrow_of(np.full(count, 64.0)), narrow_of(np.zeros(count))
    loss, pullback = pn.vjp(pn.mean_squared_error, y, target)
    np.testing.assert_allclose(number(loss), 64.0**2, rtol=1e-2)
    np.testing.assert_allclose(number(pullback(narrow_of(1.0))[0]), 2 * 64 / count, rtol=1e-2)
    loss, pullback = pn.vjp(pn.mean_squared_error, y, target, narrow_of(np.full(count, 2.0)))
    np.testing.assert_allclose(number(loss), 64.0**2, rtol=1e-2)
    np.testing.assert_allclose(number(pullback(narrow_of(1.0))[0]), 2 * 64 / count, rtol=1e-2)


@pytest.mark.parametrize("weighed", [False, True])
def test_cross_entropy_over_more_cases_than_float16_counts(weighed: bool, narrow_of: Any) -> None:
    count = 2**17
    weights = narrow_of(np.full(count, 2.0)) if weighed else None
    logits = narrow_of(np.zeros((count, 2)))
    labels = xp_of(logits).zeros(count, dtype=xp_of(logits).int32)
    loss, pullback = pn.vjp(pn.softmax_cross_entropy, logits, labels, weights)
    np.testing.assert_allclose(number(loss), np.log(2.0), rtol=1e-2)
    scale = 1024.0  # as loss scaling has it, since 2^-18 is near the end of float16
    np.testing.assert_allclose(number(pullback(narrow_of(scale))[0])[0], np.array([-0.5, 0.5]) / count * scale, rtol=1e-2)


def test_clipping_by_a_norm_of_many_values(narrow_of: Any) -> None:
    grads, norm = pn.clip_by_global_norm({"a": narrow_of(np.ones(70_000)), "b": narrow_of(np.full(3, 0.5))}, 1.0)
    np.testing.assert_allclose(number(norm), np.sqrt(70_000.75), rtol=1e-6)
    np.testing.assert_allclose(number(grads["a"]), 1 / np.sqrt(70_000.75), rtol=1e-2)
    assert grads["a"].dtype == narrow_of(1.0).dtype


def test_cotangents_of_what_many_rows_share(narrow_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, dy = 8192, narrow_of(np.full((8192, 2), 0.5))
    _, pullback = pn.vjp(pn.linear, narrow_of(np.full((rows, 3), 0.5)), narrow_of(np.zeros((2, 3))), narrow_of(np.zeros(2)))
    _, dweight, dbias = pullback(dy)
    np.testing.assert_array_equal(number(dbias), 4096.0)
    np.testing.assert_array_equal(number(dweight), 2048.0)
    monkeypatch.setattr("portnorm.lookup._BLOCK", 64)
    table = narrow_of(np.zeros((3, 2)))
    ids = xp_of(table).zeros(rows, dtype=xp_of(table).int32)
    np.testing.assert_array_equal(number(pn.vjp(pn.embedding, ids, table)[1](dy)[1])[0], 4096.0)
    _, pullback = pn.vjp(pn.layer_norm, dy, narrow_of(np.ones(2)), narrow_of(np.zeros(2)))
    np.testing.assert_array_equal(number(pullback(dy)[2]), 4096.0)


def test_the_gradient_of_a_bias_is_as_good_for_many_rows_as_for_few(eager: Library, rng: np.random.Generator) -> None:
    """NumPy adds rows one after the other: 100,000 of them were 34 units in the last place off."""
    for rows in (100, 100_000):
        dy = rng.uniform(0.0, 1.0, (rows, 3)).astype("float32")
        given = [eager.array(a, "float32") for a in (np.ones((rows, 2)), np.ones((3, 2)), np.zeros(3))]
        _, pullback = pn.vjp(pn.linear, *given)
        exact = dy.sum(axis=0, dtype=np.float64)
        np.testing.assert_allclose(to_numpy(pullback(eager.array(dy, "float32"))[2]), exact, rtol=3 * 2.0**-23)


@pytest.mark.parametrize(("cell", "norm"), [("RNN", None), ("RNN", "layer"), ("LSTM", None), ("LSTM", "batch"), ("RNN", "batch")])
def test_gradients_of_a_recurrent_layer_over_many_steps(cell: str, norm: str | None, rng: np.random.Generator) -> None:
    """NumPy's float16, where a sum goes value by value: one cotangent at every step, so that sums pass 2048 times what is added."""
    wide = LAYERS[cell](2, 3, norm=norm, t_max=1, rng=0, dtype="float64")
    layer = wide.to(dtype="float16")
    wide.load_state_dict({n: a.astype(np.float64) for n, a in layer.state_dict().items()})
    x = np.tile(rng.standard_normal((1, 8, 2)), (1500, 1, 1)).astype(np.float16)
    found = [m.vjp(a, training=norm == "batch") for m, a in ((layer, x), (wide, x.astype(np.float64)))]
    grads = [pullback(np.full(y.shape, 2.0**-4, dtype=y.dtype))[2] for y, _, pullback in found]
    for name, g in grads[1].items():
        assert grads[0][name].dtype == np.float16
        np.testing.assert_allclose(grads[0][name].astype(np.float64), g, rtol=0, atol=2e-2 * max(1.0, np.abs(g).max()), err_msg=name)


def test_weight_norm_of_long_narrow_rows(narrow_of: Any) -> None:
    """One value among zeros, so that g / √n is far smaller than what comes out."""
    v, g = np.zeros((2, 4096)), narrow_of([1e-4, 1.1e-4])
    v[:, 7] = 300.0
    w, pullback = pn.vjp(pn.weight_norm, narrow_of(v), g)
    np.testing.assert_allclose(number(w)[:, 7], number(g), rtol=2e-3)
    np.testing.assert_allclose(number(pullback(narrow_of(np.ones((2, 4096))))[1]), 1.0, rtol=1e-2)


# -- states --------------------------------------------------------------------------------------------------------------------------------

OPTIMIZERS = [pn.SGD(0.1), pn.SGD(0.1, momentum=0.9), pn.RMSProp(0.01), pn.Adam(0.01), pn.AdamW(0.01, decayed=["*"])]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_an_optimizer_of_narrow_parameters_follows_that_of_wide_ones(optimizer: Any, narrow_of: Any) -> None:
    """What is kept, to rounding of float32; parameters are the rounded result of each update, also where a gradient is 0."""
    start, gradient = np.array([1.0, 2.0, -0.5]), np.array([0.5, 0.0, 2.0**-13])
    params, wide = {"w": narrow_of(start)}, {"w": start}
    state, exact = optimizer.init(params), optimizer.init(wide)
    for _ in range(40):
        before = number(params["w"])
        params, state = optimizer.update(params, {"w": narrow_of(gradient)}, state)
        moved, exact = optimizer.update({"w": before}, {"w": gradient}, exact)
        assert params["w"].dtype == narrow_of(1.0).dtype
        np.testing.assert_array_equal(number(params["w"]), number(narrow_of(moved["w"].astype(np.float32))))
    assert number(params["w"])[1] == 2.0
    for name, kept in state.items():
        if isinstance(kept, dict):
            assert dtype_name(xp_of(kept["w"]), kept["w"].dtype) == "float32"
            np.testing.assert_allclose(number(kept["w"]), exact[name]["w"], rtol=1e-4)
        else:
            assert number(kept) == 40


def test_a_counter_of_updates_passes_what_a_float_counts(library: Library) -> None:
    adam, params = pn.Adam(), {"w": library.array(np.ones(2), "float32")}
    state = adam.init(params)
    xp = xp_of(params["w"])
    state["steps"] = xp.asarray(2**24, dtype=state["steps"].dtype)
    assert int(adam.update(params, params, state)[1]["steps"]) == 2**24 + 1


def test_running_statistics_of_a_narrow_layer(narrow_of: Any) -> None:
    """±400, whose variance float16 does not hold; and a momentum that bfloat16 does not see beside 1."""
    some = narrow_of(0.0)
    dtype = dtype_name(xp_of(some), some.dtype)
    x = np.tile([[400.0], [-400.0]], (8, 3))
    for keywords in ({}, {"momentum": 0.001}, {"momentum": None}):
        layer, wide = (pn.BatchNorm(3, xp=xp, dtype=d, **keywords) for xp, d in ((xp_of(some), dtype), (None, "float64")))
        for _ in range(10):
            layer(narrow_of(x + 8.0), training=True)
            wide(x + 8.0, training=True)
        for name in ("running_mean", "running_var"):
            assert dtype_name(xp_of(some), layer.buffers[name].dtype) == "float32"
            np.testing.assert_allclose(number(layer.buffers[name]), wide.buffers[name], rtol=1e-5)
        y = layer(narrow_of(x))
        assert y.dtype == some.dtype
        np.testing.assert_allclose(number(y), wide(x), rtol=2e-2)


@pytest.mark.parametrize(("cell", "norm"), [row for row in PRESETS if str(row[1]).startswith("batch")])
def test_tables_of_a_narrow_recurrent_layer(cell: str, norm: str, narrow_of: Any, rng: np.random.Generator) -> None:
    some = narrow_of(0.0)
    xp, dtype = xp_of(some), dtype_name(xp_of(some), some.dtype)
    layer = LAYERS[cell](2, 3, norm=norm, t_max=2, rng=0, xp=xp, dtype=dtype)
    for _ in range(4):
        layer(narrow_of(400.0 * rng.standard_normal((3, 6, 2))), training=True)
    tables = {n: b for n, b in layer.buffers.items() if "running" in n}
    assert {dtype_name(xp, b.dtype) for b in tables.values()} == {"float32"}
    assert all(np.all(np.isfinite(to_numpy(b))) for b in tables.values())
    assert np.max(to_numpy(tables["norm_ih_l0.running_var"])) > 1e4
    y, _ = layer(narrow_of(400.0 * rng.standard_normal((3, 6, 2))))
    assert y.dtype == some.dtype
    assert np.all(np.isfinite(number(y)))


def test_statistics_stay_wide_wherever_a_layer_goes(tmp_path: Any) -> None:
    """And a file of a narrow layer whose statistics are narrow is read."""
    layer = pn.Sequential(pn.Linear(3, 3, rng=0), pn.BatchNorm(3), pn.LSTM(3, 4, norm="batch", rng=0)).to(dtype="float16")
    pn.save(layer, tmp_path / "m.safetensors")
    for other in (layer, layer.copy(), layer.to(dtype="float16"), pn.load(tmp_path / "m.safetensors")):
        assert {a.dtype.name for a in other.params.values()} == {"float16"}
        assert {a.dtype.name for n, a in other.buffers.items() if "running" in n} == {"float32"}
    assert {a.dtype.name for n, a in layer.to(dtype="float64").buffers.items() if "running" in n} == {"float64"}
    old = {n: a.astype(np.float16) if "running" in n else a for n, a in layer.state_dict().items()}
    layer.load_state_dict(old)
    assert {a.dtype.name for n, a in layer.buffers.items() if "running" in n} == {"float32"}


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32"])
def test_narrow_ids_name_every_entry(library: Library, dtype: str, rng: np.random.Generator) -> None:
    """The gradient of entry 5 was that of 261 too, which is 5 in 8 bits."""
    ids, weight = np.array([5, 100, 5], dtype=dtype), rng.standard_normal((300, 2)).astype(np.float32)
    dy = rng.standard_normal((3, 2)).astype(np.float32)
    y, pullback = pn.vjp(pn.embedding, library.array(ids, dtype), library.array(weight))
    expected = np.zeros_like(weight)
    np.add.at(expected, ids, dy)
    found, cotangent = library.values([y, pullback(library.array(dy))[1]])
    np.testing.assert_array_equal(found, weight[ids])
    np.testing.assert_allclose(cotangent, expected, **relative("float32"))
