"""MLX: its transformations go through the hand-written vjps, and its arrays come and go."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from portnorm.arrays import leaves, to_numpy
from tests.cases import OPS, PRESETS, OpCase, random_recurrent, random_state
from tests.tolerances import RECURRENT, relative

pytestmark = pytest.mark.peers

FLOAT32 = relative("float32")


@pytest.fixture
def mx() -> Any:
    return importlib.import_module("mlx.core")


def arrays_of(mx: Any, tree: Any) -> Any:
    return pn.arrays.mapped(lambda a: mx.array(a) if isinstance(a, np.ndarray) else a, tree)


def assert_same(found: Any, expected: Any, tolerance: dict[str, float] = FLOAT32) -> None:
    mine, theirs = [*leaves(found)], [*leaves(expected)]
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(to_numpy(a), b, **tolerance)


def rounded(tree: Any) -> Any:
    """The values of float32 in float64."""
    return pn.arrays.mapped(
        lambda a: a.astype("float32").astype("float64") if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a, tree
    )


def case_of(case: OpCase, rng: np.random.Generator) -> tuple[list[Any], dict[str, Any], list[int]]:
    """Arguments, with small means, keywords, and the places of what is differentiated."""
    given = [
        a - 30.0 if k == 0 and isinstance(a, np.ndarray) and a.size and a.mean() > 20 else a for k, a in enumerate(case.arguments(rng))
    ]
    given, keywords = rounded(given), rounded({k: v - 30.0 if k == "mean" else v for k, v in case.keywords.items()})
    return given, keywords, [k for k, a in enumerate(given) if isinstance(a, np.ndarray) and a.dtype == np.float64]


@pytest.mark.parametrize("case", OPS, ids=lambda case: case.name)
def test_grad_vmap_and_checkpoint_of_an_op(case: OpCase, mx: Any, rng: np.random.Generator) -> None:
    given, keywords, places = case_of(case, rng)
    y, pullback = pn.vjp(case.op, *given, **keywords)
    dy = rounded(np.asarray(rng.standard_normal(np.shape(y))))
    expected = [pullback(dy)[k] for k in places]
    fixed, weight = arrays_of(mx, keywords), mx.array(dy)

    def value(*changed: Any) -> Any:
        arguments = arrays_of(mx, given)
        for k, a in zip(places, changed, strict=True):
            arguments[k] = a
        y = case.op(*arguments, **fixed) * weight
        return mx.sum(y) if y.size else mx.array(0.0)  # MLX itself does not always come back from an empty one

    wanted, numbers = [mx.array(given[k]) for k in places], tuple(range(len(places)))
    assert_same(mx.grad(value, numbers)(*wanted), expected)
    assert_same(mx.grad(mx.checkpoint(value), numbers)(*wanted), expected)
    loss, gradients = mx.value_and_grad(value, numbers)(*wanted)
    assert_same((loss, gradients), (np.sum(y * dy), expected), {"rtol": 1e-5, "atol": 1e-5})
    twice = [mx.stack([a, a]) for a in wanted]
    assert_same(mx.vmap(mx.grad(value, numbers))(*twice), [np.stack([d, d]) for d in expected])


def layer_of(mx: Any, cell: str, norm: Any, rng: np.random.Generator) -> tuple[Any, Any, Any, Any, Any]:
    """A layer of NumPy in float64, one of MLX, an input, a state, and the cotangents of y and of each state."""
    reference = random_recurrent(cell, norm, rng, bidirectional=True)
    reference.assign(rounded(reference.params), rounded(reference.buffers))
    x, state = rounded((rng.standard_normal((5, 3, 4)), random_state(reference, 3, rng)))
    count = len(reference.cell.states)
    cotangents = rounded((rng.standard_normal((5, 3, 6)), tuple(rng.standard_normal(s.shape) for s in state[:count])))
    return reference, reference.to(xp="mlx", dtype="float32"), x, state, cotangents


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_grad_of_a_recurrent_layer(cell: str, norm: str | None, training: bool, mx: Any, rng: np.random.Generator) -> None:
    """Of parameters by name, the input and the state; buffers are what else comes out. Two of them compiled too, which takes MLX long."""
    reference, layer, x, state, (dy, dlast) = layer_of(mx, cell, norm, rng)
    count, lengths = len(dlast), np.array([5, 2, 3])
    y, last, buffers, pullback = reference.pure_vjp(reference.params, reference.buffers, x, state, lengths, training)
    dx, dstate, grads = pullback(dy, dlast)
    counted, weights, times = mx.array(lengths), arrays_of(mx, (dy, *dlast)), arrays_of(mx, state[count:])

    def loss(params: Any, x: Any, start: Any) -> Any:
        y, last, buffers = layer.apply(params, layer.buffers, x, (*start, *times), counted, training)
        return sum(mx.sum(a * w) for a, w in zip((y, *last[:count]), weights, strict=True)), buffers

    given = (layer.params, mx.array(x), arrays_of(mx, state[:count]))
    whole = sum(np.sum(a * w) for a, w in zip((y, *last[:count]), (dy, *dlast), strict=True))
    transforms = [mx.value_and_grad(loss, (0, 1, 2))]
    if (cell, norm) in (("LSTM", "layer"), ("GRU", "batch")) and training:
        transforms.append(mx.compile(transforms[0]))
    for transformed in transforms:
        (value, after), (dparams, their_dx, their_dstart) = transformed(*given)
        assert_same((value, after), (whole, buffers), relative("float32", RECURRENT))
        assert_same((dparams, their_dx, their_dstart), (grads, dx, dstate[:count]), relative("float32", RECURRENT))


def test_a_layer_holds_the_statistics_that_grad_sees_and_none_that_compile_makes(mx: Any, rng: np.random.Generator) -> None:
    layer = pn.BatchNorm(3, channel_axis=-1, xp="mlx")
    x = mx.array(5.0 + rng.standard_normal((8, 3)).astype("float32"))

    def loss(params: Any) -> Any:
        layer.assign(params)
        return mx.sum(layer(x, training=True) ** 2)

    params = layer.parameters()
    mx.grad(loss)(params)
    layer.assign(params)
    np.testing.assert_allclose(to_numpy(layer.buffers["running_mean"]), 0.1 * to_numpy(x).mean(0), rtol=1e-5)
    with pytest.raises(pn.UnsupportedError, match="took statistics inside a transformation"):
        mx.compile(loss)(params)


def test_a_gradient_of_a_gradient(mx: Any, rng: np.random.Generator) -> None:
    """That of the squared length of a gradient, against differences."""
    x, weight, dy = (rng.standard_normal((2, 5)).astype("float32"), *rng.standard_normal((2, 5)).astype("float32"))

    def length(x: Any) -> Any:
        first = mx.grad(lambda x: mx.sum(pn.layer_norm(x, mx.array(weight)) * mx.array(dy)))(x)
        return mx.sum(first**2)

    found = to_numpy(mx.grad(length)(mx.array(x)))
    exact = x.astype("float64")

    def value(x: Any) -> Any:
        return np.sum(pn.vjp(pn.layer_norm, x, weight.astype("float64"))[1](np.broadcast_to(dy.astype("float64"), x.shape))[0] ** 2)

    assert np.abs(found).max() > 0.1
    for _ in range(3):
        t = rng.standard_normal(x.shape)
        expected = (value(exact + 1e-6 * t) - value(exact - 1e-6 * t)) / 2e-6
        np.testing.assert_allclose(np.sum(found * t), expected, rtol=1e-3)


def test_a_gradient_of_a_gradient_of_a_layer(mx: Any, rng: np.random.Generator) -> None:
    """Of ⟨gradient, direction⟩ by the input: differences of gradients along the direction."""
    reference, layer, x, state, (dy, _) = layer_of(mx, "LSTM", "layer", rng)
    direction, counted = rounded(rng.standard_normal(x.shape)), mx.array([5, 2, 3])

    def loss(x: Any) -> Any:
        return mx.sum(layer.apply(layer.params, layer.buffers, x, arrays_of(mx, state), counted)[0] * mx.array(dy))

    found = mx.grad(lambda x: mx.sum(mx.grad(loss)(x) * mx.array(direction)))(mx.array(x))

    def gradient(x: Any) -> Any:
        return reference.vjp(x, state, [5, 2, 3])[2](dy)[0]

    expected = (gradient(x + 1e-6 * direction) - gradient(x - 1e-6 * direction)) / 2e-6
    assert_same(found, expected, {"rtol": 0, "atol": 1e-3 * np.abs(expected).max()})


def test_a_key_draws_inside_of_compile(mx: Any) -> None:
    layer = pn.LSTM(3, 4, num_layers=2, dropout=0.5, xp="mlx", rng=0)
    x = mx.ones((5, 2, 3))

    def results(key: Any) -> Any:
        return layer.apply(layer.params, {}, x, training=True, rng=key)[0]

    first, again, other = (to_numpy(f(mx.random.key(k))) for f, k in ((results, 0), (mx.compile(results), 0), (results, 1)))
    np.testing.assert_allclose(again, first, atol=1e-6)
    assert np.abs(other - first).max() > 1e-3
    with pytest.raises(pn.UnsupportedError, match="`rng` is 0 inside a transformation of mlx"):
        mx.compile(lambda x: layer.apply(layer.params, {}, x, training=True, rng=0)[0])(x)
    with pytest.raises(pn.UnsupportedError, match=r"expected a key, such as mx\.random\.key\(0\)"):
        layer(x, training=True, rng=mx.zeros(3))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_sums_of_many_values_keep_their_digits(dtype: str, mx: Any, rng: np.random.Generator) -> None:
    """MLX itself adds one after the other, in the type of the array, on a processor: the mean of 10⁶ like numbers is off by 1 %."""
    xp = pn.LayerNorm(3, xp="mlx").xp
    for values in (np.full(10**6, 0.1, "float32"), 1 + rng.uniform(size=10**6).astype("float32")):
        a = mx.array(values).astype(getattr(mx, dtype))
        exact = to_numpy(a).astype("float64").mean()
        np.testing.assert_allclose(float(xp.mean(a)), exact, rtol={"float16": 5e-4, "bfloat16": 4e-3, "float32": 1e-6}[dtype])
        pair = mx.stack([a, a], axis=1)
        np.testing.assert_allclose(to_numpy(xp.sum(pair.astype(mx.float32), axis=0)), 10**6 * exact, rtol=1e-6)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("keepdims", [False, True])
def test_mlx_reduces_no_empty_arrays(shape: tuple[int, ...], keepdims: bool, mx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not always come back from that, which hung a run of all tests twice."""
    xp, x = pn.LayerNorm(3, xp="mlx").xp, np.empty(shape, "float32")
    for name in ("sum", "max", "min", "any", "all"):
        monkeypatch.setattr(mx, name, None)
        given = mx.zeros(shape, dtype=mx.bool_ if name in ("any", "all") else mx.float32)
        for axis in (None, *range(len(shape)), tuple(range(len(shape)))):
            if name in ("max", "min") and not np.prod(shape if axis is None else np.take(shape, axis)):
                continue  # an error, as in NumPy
            found = getattr(xp, name)(given, axis=axis, keepdims=keepdims)
            assert found.dtype == given.dtype
            np.testing.assert_array_equal(to_numpy(found), getattr(np, name)(x, axis=axis, keepdims=keepdims))


def test_arrays_come_and_go(mx: Any, rng: np.random.Generator) -> None:
    """By NumPy's buffers and by DLPack; bfloat16, which NumPy has not, as float32."""
    layer = pn.LSTM(3, 4, xp="mlx", rng=0)
    state = {name: np.from_dlpack(a) for name, a in layer.state_dict().items()}
    other = pn.LSTM(3, 4, rng=1)
    other.load_state_dict(state)
    x = rng.standard_normal((5, 2, 3)).astype("float32")
    np.testing.assert_allclose(other(x)[0], to_numpy(layer(mx.array(x))[0]), atol=1e-6)
    narrow = layer.to(dtype="bfloat16")
    for name, a in narrow.to(xp="numpy").state_dict().items():
        np.testing.assert_array_equal(a.astype("float32"), to_numpy(narrow.state_dict()[name]))


def test_what_mlx_cannot_is_refused(mx: Any) -> None:
    with pytest.raises(pn.DTypeError, match=r"`dtype` is 'float64', which mlx\.core does not have"):
        pn.LSTM(3, 4, xp="mlx", dtype="float64")
    with pytest.raises(pn.DTypeError, match=r"`x` has dtype mlx\.core\.float64; expected a real floating-point type such as float32"):
        pn.layer_norm(mx.zeros((2, 3), dtype=mx.float64, stream=mx.cpu))
    for call in (lambda: pn.LSTM(3, 4, xp="mlx", device="gpu"), lambda: pn.LSTM(3, 4, xp="mlx").to(device=mx.cpu)):
        with pytest.raises(pn.PortnormError, match=r"`device` is .*, but arrays of MLX have none: mx\.set_default_device"):
            call()
    with pytest.raises(pn.ShapeError, match="`labels` reach from 0 to 9"):
        pn.softmax_cross_entropy(mx.zeros((2, 3)), mx.array([0, 9]))
    assert np.isnan(float(mx.compile(pn.softmax_cross_entropy)(mx.zeros((2, 3)), mx.array([0, 9]))))
    rows = to_numpy(mx.compile(pn.embedding)(mx.array([[1, 3], [-1, 0]]), mx.ones((3, 2))))
    np.testing.assert_array_equal(np.isnan(rows), [[[False] * 2, [True] * 2], [[True] * 2, [False] * 2]])
    with pytest.raises(pn.UnsupportedError, match="`weight` is an array of numpy but `x` is one of mlx; convert one of them first"):
        pn.layer_norm(mx.zeros((2, 3)), np.ones(3))


def test_layers_are_exported_compiled_and_saved(mx: Any, tmp_path: Any, rng: np.random.Generator) -> None:
    x = rng.standard_normal((5, 2, 3)).astype("float32")
    for dtype in ("float32", "bfloat16"):
        layer = pn.LSTM(3, 4, norm="layer", xp="mlx", dtype=dtype, rng=0)
        pn.save(layer, tmp_path / "m.safetensors")
        again = pn.load(tmp_path / "m.safetensors", xp="mlx")
        for name, a in layer.state_dict().items():
            assert again.state_dict()[name].dtype == a.dtype
            np.testing.assert_array_equal(to_numpy(again.state_dict()[name]), to_numpy(a))
    layer = pn.LSTM(3, 4, norm="layer", xp="mlx", rng=0)
    expected = to_numpy(layer(mx.array(x))[0])
    np.testing.assert_allclose(pn.compile(layer)(x)[0], expected, atol=1e-5)
    pn.export(layer, tmp_path / "m.onnx")
    np.testing.assert_array_equal(to_numpy(pn.load(tmp_path / "m.onnx", xp="mlx")(mx.array(x))[0]), expected)
