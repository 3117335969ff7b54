"""Products of integers: what the layers compute, what their gradients are, and graphs that are held to them."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import portnorm as pn
from portnorm.__main__ import main
from portnorm.layers.quantized import with_rounded_weights
from portnorm.quantization import INPUTS, SCHEMES, WEIGHTS, integer_product, rounding_moved
from portnorm_onnx.runtimes import RUNTIMES
from portnorm_onnx.storage import weights_of
from portnorm_onnx.targets import TARGETS
from tests.cases import HEAVY_PRESETS, IMPLEMENTATIONS, LAYERS, PRESETS, random_recurrent
from tests.test_export import recurrent, run, spoiled
from tests.tolerances import INTEGERS, INTEGERS_KERNEL, OPERATION

_EVERY_SHAPE = ("portable", "onnxruntime")
SHAPES: list[dict[str, Any]] = [{}, {"streaming": True}, {"lengths": False}, {"mask": True}, {"state": True}, {"fold": False}]
INTEGERS_OF = [
    pytest.param(target.name, quantize, shape, id=f"{target.name}-{quantize}-{shape}")
    for target in TARGETS.values()
    for quantize in target.integers
    for shape in SHAPES[: None if target.name in _EVERY_SHAPE and quantize == "int8" else 2]
]
"""The targets differ in what they avoid, which is tested for float graphs."""


# -- the op ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1, 64, 127])
def test_every_number_is_the_nearest_of_the_grid(levels: int, rng: np.random.Generator) -> None:
    x = rng.standard_normal((5, 33))
    y, m = pn.fake_quantize(x, levels=levels), np.abs(x).max(axis=-1, keepdims=True)
    grid = m * np.arange(-levels, levels + 1) / levels
    nearest = np.take_along_axis(grid, np.abs(x[:, :, None] - grid[:, None, :]).argmin(axis=-1), axis=-1)
    np.testing.assert_allclose(y, nearest, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_weights_that_are_quantized_stay_as_they_are(dtype: str, rng: np.random.Generator) -> None:
    w = (rng.standard_normal((64, 96)) * rng.uniform(1e-3, 1e3, (64, 1))).astype(dtype)
    once = pn.fake_quantize(w, levels=WEIGHTS)
    assert once.dtype == w.dtype
    np.testing.assert_array_equal(pn.fake_quantize(once, levels=WEIGHTS), once)
    assert max(len(np.unique(row)) for row in once) > 32


def test_rows_of_zeros_and_rows_of_tiny_numbers() -> None:
    x = np.array([[0.0, 0.0], [1e-45, 0.0], [1e-30, -5e-31], [3e38, 1e38]], dtype=np.float32)
    y = pn.fake_quantize(x, levels=4)
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y[[0, 2]], x[[0, 2]])
    np.testing.assert_allclose(y[3], [3e38, 0.75e38], rtol=1e-6)


def test_what_is_beyond_a_bound_is_the_bound_and_has_no_gradient() -> None:
    x = np.array([[-3.0, -1.0, 0.4, 1.5]])
    y, residuals = pn.fake_quantize.forward(x, levels=4, bound=1.0)
    np.testing.assert_allclose(y, [[-1.0, -1.0, 0.5, 1.0]])
    np.testing.assert_array_equal(pn.fake_quantize.vjp(residuals, np.ones((1, 4)), levels=4, bound=1.0)[0], [[0.0, 1.0, 1.0, 0.0]])


def test_the_gradients_of_a_product(rng: np.random.Generator) -> None:
    """Those of x̃ · wᵀ, of which that of x goes straight through, and is 0 beyond a bound."""
    x, w = rng.uniform(-1.5, 1.5, (4, 7)), pn.fake_quantize(rng.standard_normal((5, 7)), levels=WEIGHTS)
    rounded, dy = pn.fake_quantize(x, bound=1.0), rng.standard_normal((4, 5))
    y, pullback = pn.vjp(integer_product, x, w, bound=1.0)
    dx, dw = pullback(dy)
    np.testing.assert_allclose(y, rounded @ w.T, rtol=0, atol=1e-14)
    np.testing.assert_allclose(dw, dy.T @ rounded, rtol=0, atol=1e-14)
    np.testing.assert_allclose(dx, np.where(np.abs(x) <= 1.0, dy @ w, 0.0), rtol=0, atol=1e-14)


@pytest.mark.parametrize("value", [0, -1, 2.5, float("inf"), "a", None, True])
def test_levels_that_are_none(value: Any) -> None:
    with pytest.raises(pn.UnsupportedError, match="`levels` is"):
        pn.fake_quantize(np.ones((1, 2)), levels=value)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan"), "a", np.ones(3)], ids=str)
def test_bounds_that_are_none(value: Any) -> None:
    with pytest.raises(pn.UnsupportedError, match="`bound` is"):
        pn.fake_quantize(np.ones((1, 2)), bound=value)


@pytest.mark.parametrize("features", [1, 127, 128, 129, 300])
def test_blocks_of_a_row_have_steps_of_their_own(features: int, rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 2, features)) * rng.uniform(0.1, 10.0, features)
    parts = [pn.fake_quantize(x[..., start : start + 128], levels=8, lopsided=True) for start in range(0, features, 128)]
    np.testing.assert_array_equal(pn.fake_quantize(x, levels=8, block=128, lopsided=True), np.concatenate(parts, axis=-1))


def test_four_bits_are_sixteen_numbers(rng: np.random.Generator) -> None:
    w = rng.standard_normal((64, 128)).astype(np.float32)
    y = pn.fake_quantize(w, **SCHEMES["int4"].weights.arguments)
    largest = np.take_along_axis(w, np.abs(w).argmax(axis=1)[:, None], axis=1)
    q = np.rint(y / (largest / -8))
    assert (q.min(), q.max()) == (-8, 7)
    np.testing.assert_array_equal(np.take_along_axis(y, np.abs(w).argmax(axis=1)[:, None], axis=1), largest)
    np.testing.assert_array_equal(pn.fake_quantize(y, **SCHEMES["int4"].weights.arguments), y)


# -- layers ------------------------------------------------------------------------------------------------------------------------------


def integers(a: Any, levels: int, bound: float | None = None) -> tuple[Any, Any]:
    """Exact integers and what each row of them is multiplied with."""
    m = np.abs(a).max(axis=-1, keepdims=True) if bound is None else np.full((len(a), 1), bound)
    return np.rint(a / m * levels).astype(np.int64), m / levels


def product(a: Any, w: Any, bound: float | None = None) -> Any:
    (q, s), (p, t) = integers(a, INPUTS, bound), integers(w, WEIGHTS)
    return (q @ p.T) * s * t.T


def sigmoid(x: Any) -> Any:
    return 1.0 / (1.0 + np.exp(-x))


def test_an_lstm_is_the_one_with_exact_integers(rng: np.random.Generator) -> None:
    layer = random_recurrent("LSTM", None, rng, inputs=7, hidden=6)
    p, x = layer.parameters(), rng.standard_normal((9, 4, 7))
    h, c = (rng.uniform(-1.0, 1.0, (4, 6)) for _ in range(2))
    y, (last, _) = pn.quantized(layer)(x, (h[None], c[None]))
    for x_t, y_t in zip(x, y, strict=True):
        z = product(x_t, p["weight_ih_l0"]) + product(h, p["weight_hh_l0"], 1.0) + p["bias_ih_l0"] + p["bias_hh_l0"]
        i, f, g, o = np.split(z, 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        np.testing.assert_allclose(y_t, h, rtol=0, atol=OPERATION["float64"])
    np.testing.assert_allclose(last[0], h, rtol=0, atol=OPERATION["float64"])


@pytest.mark.parametrize("reset", ["after", "before"])
def test_a_gru_is_the_one_with_exact_integers(reset: Any, rng: np.random.Generator) -> None:
    layer = random_recurrent("GRU", dataclasses.replace(pn.VARIANTS["GRU"][None], reset=reset), rng, inputs=7, hidden=6)
    p, x, h = layer.parameters(), rng.standard_normal((9, 4, 7)), np.zeros((4, 6))
    y, _ = pn.quantized(layer)(x)
    u_r, u_z, u_n = np.split(p["weight_hh_l0"], 3)
    b_r, b_z, b_n = np.split(p["bias_hh_l0"], 3)
    for x_t, y_t in zip(x, y, strict=True):
        a_r, a_z, a_n = np.split(product(x_t, p["weight_ih_l0"]) + p["bias_ih_l0"], 3, axis=-1)
        r, z = (sigmoid(a + product(h, u, 1.0) + b) for a, u, b in ((a_r, u_r, b_r), (a_z, u_z, b_z)))
        n = a_n + (r * (product(h, u_n, 1.0) + b_n) if reset == "after" else product(r * h, u_n, 1.0) + b_n)
        h = (1 - z) * np.tanh(n) + z * h
        np.testing.assert_allclose(y_t, h, rtol=0, atol=OPERATION["float64"])


def test_linear_and_embedding(rng: np.random.Generator) -> None:
    linear, table = pn.Linear(7, 5, dtype="float64", rng=0), pn.Embedding(11, 7, dtype="float64", rng=0)
    x = rng.standard_normal((2, 3, 7))
    expected = product(x.reshape(6, 7), linear.params["weight"]).reshape(2, 3, 5) + linear.params["bias"]
    np.testing.assert_allclose(pn.quantized(linear)(x), expected, rtol=0, atol=1e-12)
    q, s = integers(table.params["weight"], WEIGHTS)
    np.testing.assert_allclose(pn.quantized(table)(np.arange(11)[:, None])[:, 0], q * s, rtol=0, atol=1e-12)


@pytest.mark.parametrize("quantize", SCHEMES)
@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_sequences_do_not_depend_on_what_is_beside_them(cell: str, norm: str | None, quantize: Any, rng: np.random.Generator) -> None:
    """Every row has a step of its own: another sequence, padding, or a later step changes no bit."""
    layer = pn.quantized(random_recurrent(cell, norm, rng, inputs=5, hidden=6), quantize)
    x = rng.standard_normal((6, 3, 5))
    other = x.copy()
    other[:, 1:] *= 1000.0
    other[4:] *= -10.0
    np.testing.assert_array_equal(layer(x)[0][:4, 0], layer(other)[0][:4, 0])
    steps, state = [], layer.initial_state(3)
    for x_t in x:
        y, state = layer.step(x_t, state)
        steps.append(y)
    np.testing.assert_allclose(np.stack(steps), layer(x)[0], rtol=0, atol=OPERATION["float64"])


def exact(layer: Any) -> Any:
    """A model whose products see the same numbers, but which does not round: that of the straight-through gradients."""
    rounded = with_rounded_weights(layer)
    rounded.quantize = None
    return rounded


@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_gradients_go_straight_through(cell: str, norm: str | None, rng: np.random.Generator) -> None:
    """Where everything lies on the grid the quantized layer is the other one: input in eighths, one step, from a first state of 0."""
    layer = pn.quantized(random_recurrent(cell, norm, rng, inputs=5, hidden=6))
    grid = rng.integers(-INPUTS, INPUTS + 1, (1, 4, 5)) / INPUTS
    grid[:, :, 0] = 1.0
    y, _, pullback = layer.vjp(grid)
    y0, _, pullback0 = exact(layer).vjp(grid)
    np.testing.assert_allclose(y, y0, rtol=0, atol=1e-12)
    dy = rng.standard_normal(y.shape)
    dx, dstate, grads = pullback(dy)
    dx0, dstate0, grads0 = pullback0(dy)
    np.testing.assert_allclose(dx, dx0, rtol=0, atol=1e-10)
    for d, d0 in zip(dstate[:1], dstate0[:1], strict=True):
        np.testing.assert_allclose(d, d0, rtol=0, atol=1e-10)
    for name in grads0.keys() & grads.keys():
        np.testing.assert_allclose(grads[name], grads0[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("cell", "norm"), [("LSTM", "layer"), ("GRU", None), ("RNN", "layer"), ("LSTM", "batch")])
def test_training_lowers_the_loss_of_the_rounded_net(cell: str, norm: str | None, rng: np.random.Generator) -> None:
    layer = pn.quantized(random_recurrent(cell, norm, rng, inputs=5, hidden=6))
    x, target, optimizer = rng.standard_normal((5, 8, 5)), rng.uniform(-0.5, 0.5, (5, 8, 6)), pn.Adam(1e-2)
    losses = []
    state = optimizer.init(layer.parameters())
    for _ in range(40):
        y, _, pullback = layer.vjp(x, training=True)
        loss, pull = pn.vjp(pn.mean_squared_error, y, target)
        _, _, grads = pullback(pull(np.ones_like(loss))[0])
        params, state = optimizer.update(layer.parameters(), grads, state)
        layer.assign(params)
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    assert layer.quantizes == "int8"


def test_a_setting_like_any_other(tmp_path: Path) -> None:
    layer, x = pn.LSTM(3, 4, norm="layer", rng=0), np.random.default_rng(0).standard_normal((5, 2, 3)).astype(np.float32)
    plain = layer(x)[0]
    assert "quantize" not in layer.config
    layer.quantize = "int8"
    assert repr(layer).endswith("quantize='int8')")
    rounded = layer(x)[0]
    assert 0 < np.abs(rounded - plain).max() < 0.1
    pn.save(layer, tmp_path / "m.safetensors")
    back = pn.load(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(back(x)[0], rounded)
    layer.quantize = None
    np.testing.assert_array_equal(layer(x)[0], plain)
    with pytest.raises(pn.UnsupportedError, match=r"`quantize` is 'int3'; expected 'int8' or 'int4', or None"):
        layer.quantize = "int3"  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pn.quantized(pn.LayerNorm(3)), "LayerNorm has no weights to quantize"),
        (lambda: pn.quantized(pn.Linear(3, 2), "int2"), "`quantize` is 'int2'"),  # type: ignore[arg-type]
        (lambda: pn.quantized(np.ones(3)), "`layer` is a ndarray"),  # type: ignore[arg-type]
        (lambda: pn.quantized(with_weights(0.0)), "`weight_hh_l0` of GRU is 0 everywhere"),
        (lambda: pn.quantized(with_weights(np.nan)), "`weight_hh_l0` of GRU is not finite"),
        (lambda: pn.quantized(with_weights(np.inf)), "`weight_hh_l0` of GRU is not finite"),
        (lambda: pn.quantized(pn.GRU(3, 4, rng=0))(X, (np.full((1, 2, 4), 1.5, np.float32),)), "`state` has an h of up to 1.5"),
    ],
)
def test_what_cannot_be_quantized(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(pn.UnsupportedError, match=message):
        make()


X = np.ones((5, 2, 3), dtype=np.float32)


def with_weights(value: float) -> pn.GRU:
    layer = pn.GRU(3, 4, rng=0)
    layer.params["weight_hh_l0"] = np.full((12, 4), value, dtype=np.float32)
    return layer


# -- graphs ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 8, 9])
@pytest.mark.parametrize(("cell", "norm"), HEAVY_PRESETS)
def test_a_few_rows_are_read_as_integers(cell: str, norm: str | None, rows: int, rng: np.random.Generator) -> None:
    """Kernels and definitions round alike, also with weights that were changed since, which nobody has the integers of."""
    layer = pn.quantized(recurrent(cell, norm))
    x, state = rng.standard_normal((1, rows, 5)).astype(np.float32), layer.initial_state(rows)
    for _ in range(2):
        known = norm != "weight"
        assert all(a.flags.writeable is not known for name, a in layer.params.items() if name in ("weight_ih_l0", "weight_hh_l0"))
        with pn.arrays.without_kernels(np.ndarray):
            expected = layer(x, state)
        found = layer(x, state)
        for a, b in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=INTEGERS_KERNEL)
        params = {name: a + 0.1 * rng.standard_normal(a.shape).astype(np.float32) for name, a in layer.params.items()}
        layer.assign(params)
        other, _ = layer(x, state)
        assert np.abs(other - found[0]).max() > 1e-3
        layer = pn.quantized(layer)


@pytest.mark.parametrize("rows", [1, 2, 8, 9])
@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_steps_in_turn_are_those_of_a_sequence(cell: str, norm: str | None, rows: int, rng: np.random.Generator) -> None:
    """And those of the definition; a variance that leaves the range of the kernels, and a state beyond its bound, are noticed in each."""
    layer = pn.quantized(recurrent(cell, norm))
    x = rng.standard_normal((6, rows, 5)).astype(np.float32)
    x[4] *= 1e17
    with pn.arrays.without_kernels(np.ndarray), np.errstate(all="ignore"):
        expected = layer(x)
    with np.errstate(all="ignore"):
        found, state, hs = layer(x), None, []
        for row in x:
            h, state = layer.step(row, state)
            hs.append(h)
    for a, b, c in zip((found[0], *found[1]), (expected[0], *expected[1]), (np.stack(hs), *state), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=INTEGERS_KERNEL)
        np.testing.assert_allclose(a, c, rtol=0, atol=INTEGERS_KERNEL)
    other = layer.copy()
    layer.step(x[0], state)
    with rounding_moved(0.4):
        np.testing.assert_array_equal(layer.step(x[0], state)[0], other.step(x[0], state)[0])
    if layer.bounds_h:
        with pytest.raises(pn.UnsupportedError, match="expected at most 1"):
            layer.step(x[0], (state[0] + 2, *state[1:]))
    spoiled_state = (np.where(np.arange(state[0].size).reshape(state[0].shape) == 0, np.nan, state[0]).astype("float32"), *state[1:])
    assert np.isnan(layer.step(x[0], spoiled_state)[0][0]).any()


def test_layers_without_weights_and_models_of_several(rng: np.random.Generator) -> None:
    model = pn.Sequential(pn.Linear(5, 8, rng=0), pn.LayerNorm(8), pn.Linear(8, 2, rng=1))
    with pytest.raises(pn.UnsupportedError, match="`quantize` is 'int8', but LayerNorm has no weights to quantize"):
        model.parts[1].quantize = "int8"  # type: ignore[attr-defined]
    x = rng.standard_normal((4, 5)).astype(np.float32)
    before = model(x)
    model.quantize = "int8"
    assert [getattr(part, "quantize", None) for part in model.parts] == ["int8", None, "int8"]
    assert model.quantize == model.quantizes == "int8"
    np.testing.assert_allclose(model(x), pn.quantized(model)(x), rtol=0, atol=INTEGERS_KERNEL)
    model.quantize = None
    np.testing.assert_array_equal(model(x), before)


def test_a_model_of_which_a_part_is_quantized(tmp_path: Path) -> None:
    """The file says which, so that the float model can be held against it."""
    model, path = model_of_words(), tmp_path / "m.onnx"
    other = model.copy()
    model.parts[1].quantize = "int8"  # type: ignore[attr-defined]
    pn.export(model, path)
    assert pn.verify(path, other).steps
    assert pn.verify(path, model).steps
    assert pn.verify(path).steps


@pytest.mark.parametrize("gates", ["relu", "tanh"])
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_gates_that_are_no_shares_leave_h_without_a_bound(cell: str, gates: Any, rng: np.random.Generator) -> None:
    variant = dataclasses.replace(pn.VARIANTS[cell][None], gate_activation=gates)
    layer = pn.quantized(LAYERS[cell](5, 8, norm=variant, rng=0))
    x, state, steps = (4 * rng.standard_normal((4, 3, 5))).astype(np.float32), None, []
    for x_t in x:
        y, state = layer.step(x_t, state)
        steps.append(y)
    np.testing.assert_allclose(np.stack(steps), layer(x)[0], rtol=1e-4, atol=1e-5)
    assert np.abs(layer(x)[0] - exact_of(layer)(x)[0]).max() < 0.2 * max(1.0, np.abs(layer(x)[0]).max())


def exact_of(layer: Any) -> Any:
    copy = layer.copy()
    copy.quantize = None
    return copy


def test_what_is_no_number_stays_none_in_a_graph() -> None:
    x = np.array([[1, np.nan, 2], [np.inf, 1, 2], [-np.inf, 1, 2], [1, 2, 3]], np.float32)
    linear, rnn = pn.Linear(3, 2, rng=0), pn.RNN(3, 4, rng=0)
    for quantize in SCHEMES:
        found = run(pn.export(linear, None, quantize=quantize, target="onnxruntime").model, x=x)[0]
        assert not np.isfinite(found[:3]).any()
        assert np.isfinite(found[3]).all()
    sequence = np.ones((4, 1, 3), np.float32)
    sequence[1, 0, 2] = np.nan
    found = run(pn.export(rnn, None, quantize="int8", lengths=False).model, x=sequence)[0]
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1:]).all()


@pytest.mark.parametrize("keywords", [{"xp": "array_api_strict"}, {"dtype": "float64"}, {"dtype": "float16"}], ids=str)
def test_a_model_elsewhere_or_of_another_type_is_converted_first(keywords: dict[str, Any], tmp_path: Path) -> None:
    layer, path = pn.LSTM(5, 8, rng=0, **keywords), tmp_path / "m.onnx"
    report = pn.export(layer, path, quantize="int8", dtype="float32")
    assert report.change is not None
    assert pn.verify(path).steps


@pytest.mark.parametrize("cell", ["GRU", "LSTM", "RNN"])
def test_states_at_their_bound(cell: str) -> None:
    layer = LAYERS[cell](20, 24, rng=0)
    layer.assign({name: 20 * a for name, a in layer.params.items()})
    assert pn.export(layer, None, quantize="int8").worst_step is not None


def test_formats_that_have_no_integers() -> None:
    with pytest.raises(pn.UnsupportedError, match="computes with integers, which no format says"):
        pn.to_format(pn.quantized(pn.GRU(3, 4, rng=0)), "torch")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_training_step_of_a_rounded_net(dtype: str) -> None:
    model = pn.Sequential(pn.Embedding(9, 5, rng=0), pn.GRU(5, 8, rng=0, return_sequences=False), pn.Linear(8, 4, rng=1)).to(dtype=dtype)
    report = pn.export_training_step(pn.quantized(model), pn.softmax_cross_entropy, pn.SGD(0.1), None)
    assert report.trajectories


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 3, 6])
def test_what_is_no_number_stays_none_in_a_kernel(place: int, value: float, rng: np.random.Generator) -> None:
    """Wherever it stands in its row, and in that row alone; also in an h whose bound is known."""
    layer, x = pn.quantized(pn.Linear(7, 5, rng=0)), rng.standard_normal((3, 7)).astype(np.float32)
    x[1, place] = value
    y = layer(x)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()
    weight = pn.fake_quantize(layer.params["weight"], levels=WEIGHTS)
    h = rng.uniform(-1.0, 1.0, (3, 7)).astype(np.float32)
    h[1, place] = np.nan
    for product in (integer_product, lambda *args, **attrs: integer_product.definition(*args, **attrs)[0]):
        y = product(h, weight, bound=1.0)
        assert np.isnan(y[1]).all()
        assert np.isfinite(y[[0, 2]]).all()


def test_a_matrix_of_a_quantized_layer_cannot_be_changed_in_its_place() -> None:
    layer = pn.quantized(pn.LSTM(3, 4, rng=0))
    with pytest.raises(ValueError, match="read-only"):
        layer.params["weight_hh_l0"][0] = 0.0


def test_integers_are_forgotten_with_their_weights() -> None:
    from portnorm_backends.cpu.integers import _of_rounded, _of_weight

    gc.collect()
    before = len(_of_weight), len(_of_rounded)
    layer = pn.quantized(pn.LSTM(3, 4, rng=0))
    layer(X)
    assert (len(_of_weight), len(_of_rounded)) == (before[0] + 2, before[1] + 2)
    del layer
    gc.collect()
    assert (len(_of_weight), len(_of_rounded)) == before


@pytest.mark.parametrize(("target", "quantize", "keywords"), INTEGERS_OF)
@pytest.mark.parametrize(("cell", "norm"), HEAVY_PRESETS)
def test_every_preset_for_every_target(
    cell: str, norm: str | None, target: Any, quantize: Any, keywords: dict[str, Any], tmp_path: Path
) -> None:
    """Checked against the rounded layer as any graph is against its own; its products are integers; the file gives that layer back."""
    layer, path = recurrent(cell, norm), tmp_path / "m.onnx"
    report = pn.export(layer, path, target=target, quantize=quantize, **keywords)
    assert report.worst_step is not None
    assert report.change is not None
    assert report.model is not None
    operators = [n.op_type for n in nodes_of(report.model.graph)]
    assert "MatMul" not in operators
    assert operators.count("MatMulInteger" if quantize == "int8" else "MatMulNBits") >= 2
    assert {n.domain for n in nodes_of(report.model.graph)} - {"", "ai.onnx"} == ({"com.microsoft"} if quantize == "int4" else set())
    if quantize == "int8":
        own = [numpy_helper.to_array(t) for t in weights_of(report.model.graph) if t.data_type == onnx.TensorProto.INT8]
        assert 32 <= max(int(np.abs(q.astype(int)).max()) for q in own) <= WEIGHTS
    back = pn.load(path)
    assert back.quantizes == quantize
    x = np.random.default_rng(0).standard_normal((6, 2, 5)).astype(np.float32)
    np.testing.assert_array_equal(back(x)[0], with_rounded_weights(pn.quantized(layer, quantize))(x)[0])
    assert pn.verify(path, layer).steps
    assert pn.verify(path).steps


def nodes_of(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    found = list(graph.node)
    for n in graph.node:
        for a in n.attribute:
            found += nodes_of(a.g) if a.type == onnx.AttributeProto.GRAPH else []
    return found


@pytest.mark.parametrize(("cell", "name"), [row for row in IMPLEMENTATIONS if row[1] != "fastrnns-decomposed"])
def test_every_published_cell(cell: str, name: str) -> None:
    report = pn.export(recurrent(cell, name, bidirectional=True), None, quantize="int8")
    assert report.worst_step is not None


@pytest.mark.parametrize(
    "keywords",
    [
        {"num_layers": 2, "bidirectional": True},
        {"batch_first": True, "return_sequences": False},
        {"direction": "reverse"},
        {"learned_state": True},
        {"proj_size": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("norm", [None, "layer", "batch"])
@pytest.mark.parametrize("quantize", SCHEMES)
def test_every_arrangement(norm: str | None, keywords: dict[str, Any], quantize: Any) -> None:
    report = pn.export(recurrent("LSTM", norm, **keywords), None, quantize=quantize, state=True, target="onnxruntime")
    assert report.worst_step is not None
    assert report.model is not None
    assert "MatMul" not in [n.op_type for n in nodes_of(report.model.graph)]


def model_of_words() -> pn.Sequential:
    return pn.Sequential(pn.Embedding(32, 12, rng=0), pn.LSTM(12, 16, norm="layer", bidirectional=True, rng=1), pn.Linear(32, 5, rng=2))


def test_a_model_of_several_layers(tmp_path: Path) -> None:
    model, path = model_of_words(), tmp_path / "m.onnx"
    report = pn.export(model, path, quantize="int8")
    assert report.model is not None
    names = {t.name for t in weights_of(report.model.graph) if t.data_type == onnx.TensorProto.INT8}
    assert {"0.weight.int8", "2.weight.T.int8", "1.weight_ih_l0.T.int8", "1.weight_hh_l0_reverse.T.int8"} <= names
    assert not [t.name for t in weights_of(report.model.graph) if t.data_type == onnx.TensorProto.FLOAT and np.prod(t.dims) > 100]
    ids = np.random.default_rng(0).integers(0, 32, (7, 3))
    np.testing.assert_array_equal(pn.load(path)(ids)[0], with_rounded_weights(pn.quantized(model))(ids)[0])


def test_layers_that_are_quantized_already_and_some_that_are_not() -> None:
    model = model_of_words()
    model.parts[1].quantize = "int8"  # type: ignore[attr-defined]
    report = pn.export(model, None)
    assert report.model is not None
    operators = [n.op_type for n in nodes_of(report.model.graph)]
    assert operators.count("MatMulInteger") == 4
    assert operators.count("MatMul") == 1


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("norm", ["layer", "weight"])
def test_the_file_is_a_quarter_or_a_seventh(norm: Any, dtype: str, tmp_path: Path) -> None:
    layer = pn.LSTM(256, 384, norm=norm, rng=0, dtype=dtype)
    for name in (None, "int8", "int4"):
        pn.export(layer, tmp_path / f"{name}.onnx", quantize=name, target="onnxruntime", dtype="float32")  # type: ignore[arg-type]
    sizes = [os.path.getsize(tmp_path / f"{name}.onnx") for name in ("None", "int8", "int4")]
    assert sizes[1] < 0.27 * sizes[0]
    assert sizes[2] < 0.16 * sizes[0]


def test_the_change_is_told_on_the_inputs_that_are_given(rng: np.random.Generator) -> None:
    model = pn.Sequential(pn.GRU(5, 16, return_sequences=False, rng=0), pn.Linear(16, 4, rng=1))
    x = rng.standard_normal((9, 64, 5)).astype(np.float32)
    report = pn.export(model, None, quantize="int8", inputs=[x])
    assert report.change is not None
    before, after = model(x)[0], with_rounded_weights(pn.quantized(model))(x)[0]
    assert report.change.largest == pytest.approx(np.abs(before - after).max(), rel=1e-5)
    assert report.change.mean == pytest.approx(np.abs(before - after).mean(), rel=1e-4)
    assert report.change.same == (before.argmax(-1) == after.argmax(-1)).mean()
    assert "changed by integers: " in str(report)
    assert "hardly take less time" in str(report)
    assert "hardly" not in str(pn.export(pn.LSTM(256, 256, rng=0), None, quantize="int8"))
    assert report.to_dict()["change"] == dataclasses.asdict(report.change)


@pytest.mark.parametrize("name", ["weight_hh_l0.T.int8", "weight_ih_l0.T.int8", "weight_hh_l0.T.step", "norm_c_l0.weight"])
def test_an_integer_that_is_off_by_one_is_found(name: str, tmp_path: Path) -> None:
    layer, path = recurrent("LSTM", "layer"), tmp_path / "m.onnx"
    report = pn.export(layer, path, quantize="int8")
    assert report.model is not None

    def change(w: Any) -> Any:
        w = w.copy()
        w.reshape(-1)[w.size // 2] += 1 if w.dtype == np.int8 else 0.01 * w.reshape(-1)[w.size // 2]
        return w

    path.write_bytes(spoiled(report.model, name, change).SerializeToString())
    with pytest.raises(pn.ConformanceError, match="sums of integers that saturate, or weights that were changed"):
        pn.verify(path, layer)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2])
@pytest.mark.parametrize(("cell", "norm"), [("GRU", None), ("LSTM", None), ("LSTM", "layer")])
def test_wrong_integers_are_found_in_wide_layers(cell: str, norm: str | None, share: float, tmp_path: Path) -> None:
    """One, or a part of them, off by one step."""
    layer, path, rng = LAYERS[cell](64, 128, norm=norm, rng=0), tmp_path / "m.onnx", np.random.default_rng(0)
    report = pn.export(layer, path, quantize="int8")
    assert report.model is not None

    def change(w: Any) -> Any:
        wrong = rng.uniform(size=w.shape) < share
        wrong.flat[w.size // 2] = True
        return np.where(wrong, w + np.where(w < 0, 1, -1), w)

    path.write_bytes(spoiled(report.model, "weight_hh_l0.T.int8", change).SerializeToString())
    with pytest.raises(pn.ConformanceError, match="sums of integers that saturate"):
        pn.verify(path, layer)


def test_a_runtime_that_saturates_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As processors without VNNI add up in 16 bits what has eight unsigned and eight signed ones."""
    row = RUNTIMES["onnxruntime"]

    def load(model: Any) -> Any:
        proto = onnx.load_from_string(model)
        for graph in (proto.graph, *(a.g for n in proto.graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH)):
            for at, n in reversed(list(enumerate(graph.node))):
                if n.op_type == "Cast" and n.input[0].startswith("matmulinteger"):
                    given, bounds = n.input[0], [f"{n.output[0]}_low", f"{n.output[0]}_high"]
                    graph.initializer.extend(numpy_helper.from_array(np.int32(b), k) for b, k in zip((-9000, 9000), bounds, strict=True))
                    graph.node.insert(at, helper.make_node("Clip", [given, *bounds], [f"{given}_kept"]))
                    n.input[0] = f"{given}_kept"
        return row.load(proto.SerializeToString())

    monkeypatch.setitem(RUNTIMES, "saturating", dataclasses.replace(row, name="saturating", load=load))
    layer, path = recurrent("LSTM", None), tmp_path / "m.onnx"
    pn.export(layer, path, quantize="int8")
    with pytest.raises(pn.ConformanceError, match=r"saturating: .*sums of integers that saturate"):
        pn.verify(path, layer, runtimes=["saturating"])


def test_weights_cannot_saturate_sixteen_bits() -> None:
    assert 2 * 255 * WEIGHTS < 2**15 <= 2 * 255 * (WEIGHTS + 1)


def test_numbers_in_the_middle_turn_over_where_rounding_is_moved() -> None:
    x = np.array([[1.0, 0.5 / INPUTS + 1e-12, 0.5 / INPUTS - 1e-12]])
    plain = pn.fake_quantize(x)
    with rounding_moved(2.0**-8):
        up = pn.fake_quantize(x)
    with rounding_moved(-(2.0**-8)):
        down = pn.fake_quantize(x)
    np.testing.assert_allclose(np.rint(np.concatenate([plain, up, down]) * INPUTS), [[127, 1, 0], [127, 1, 1], [127, 0, 0]])


@pytest.mark.parametrize(
    ("model", "keywords", "message"),
    [
        (pn.LSTM(3, 4), {"dtype": "float16"}, "`quantize` of a graph in float16; expected float32"),
        (pn.LSTM(3, 4, dtype="float64"), {}, "`quantize` of a graph in float64; expected float32"),
        (pn.LSTM(3, 4), {"target": "tensorrt"}, "target 'tensorrt' has no MatMulInteger; target='portable' or "),
        (pn.LSTM(3, 4), {"quantize": "int4"}, "target 'portable' has no MatMulNBits.*; target='onnxruntime' has it"),
        (pn.LSTM(3, 4), {"quantize": "int5"}, "`quantize` is 'int5'; expected 'int8' or 'int4', or None"),
        (pn.RMSNorm(4), {}, "RMSNorm has no weights to quantize"),
    ],
)
def test_a_graph_that_cannot_be_quantized_is_not_written(model: pn.Layer, keywords: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(pn.UnsupportedError, match=message):
        pn.export(model, tmp_path / "m.onnx", **{"quantize": "int8", **keywords})
    assert not list(tmp_path.iterdir())


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pn.save(pn.LSTM(3, 4, norm="layer", rng=0), tmp_path / "m.safetensors")
    assert main(["export", str(tmp_path / "m.safetensors"), "-o", str(tmp_path / "m.onnx"), "--quantize", "int8"]) == 0
    assert "changed by integers: " in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "m.onnx"), "--against", str(tmp_path / "m.safetensors")]) == 0


def test_compiled(rng: np.random.Generator) -> None:
    layer = pn.quantized(pn.LSTM(5, 8, norm="layer", rng=0))
    x = rng.standard_normal((7, 3, 5)).astype(np.float32)
    fast = pn.compile(layer)
    np.testing.assert_allclose(fast(x, lengths=[7, 0, 3])[0], layer(x, lengths=[7, 0, 3])[0], rtol=0, atol=INTEGERS)


def _runtimes() -> list[Any]:
    four = {runtime for target in TARGETS.values() if "int4" in target.integers for runtime in target.runtimes}
    pairs = [(name, quantize) for name in RUNTIMES for quantize in SCHEMES if quantize == "int8" or name in four]
    usual = ("onnxruntime", "reference")
    return [pytest.param(*pair, marks=[] if pair[0] in usual else pytest.mark.runtime(pair[0]), id="-".join(pair)) for pair in pairs]


@pytest.mark.parametrize(("runtime", "quantize"), _runtimes())
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("cell", "norm"), HEAVY_PRESETS)
def test_every_runtime(cell: str, norm: str | None, streaming: bool, runtime: str, quantize: Any, tmp_path: Path) -> None:
    layer, path = recurrent(cell, norm), tmp_path / "m.onnx"
    pn.export(layer, path, quantize=quantize, streaming=streaming, target="portable" if quantize == "int8" else "onnxruntime")
    assert pn.verify(path, layer, runtimes=runtime).outcomes[0].status == "passed"
