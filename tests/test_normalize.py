"""What normalization promises: identities from the papers, accuracy where the mean is large or the range extreme, and masks."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import array_shapes, arrays

import portnorm as pn
from portnorm.arrays import to_numpy
from tests.conftest import Library
from tests.tolerances import LARGE_MEAN, relative


def test_gain_and_shift_can_undo_normalization(rng: np.random.Generator) -> None:
    """Ioffe & Szegedy 2015: with γ = √(σ² + ε) and β = μ the input comes back."""
    x = 5.0 + 3.0 * rng.standard_normal((8, 4))
    weight, bias = np.sqrt(x.var(axis=0) + 1e-5), x.mean(axis=0)
    np.testing.assert_allclose(pn.batch_norm(x, weight, bias), x, **relative("float64"))


def test_one_group_per_channel_is_instance_norm(rng: np.random.Generator) -> None:
    x, weight, bias = rng.standard_normal((2, 6, 5, 3)), rng.standard_normal(6), rng.standard_normal(6)
    np.testing.assert_allclose(pn.group_norm(x, 6, weight, bias), pn.instance_norm(x, weight, bias), **relative("float64"))


def test_one_group_is_layer_norm_over_channels_and_space(rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 6, 5, 3))
    np.testing.assert_allclose(pn.group_norm(x, 1), pn.layer_norm(x, axis=(1, 2, 3)), **relative("float64"))


def test_layer_norm_over_time_and_features(rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 5, 4))
    y = pn.layer_norm(x, axis=(1, 2))
    np.testing.assert_allclose(y.mean(axis=(1, 2)), 0.0, atol=1e-12)
    np.testing.assert_allclose(y.var(axis=(1, 2)), 1.0, rtol=1e-4)
    np.testing.assert_allclose(y.reshape(3, 20), pn.layer_norm(x.reshape(3, 20)), **relative("float64"))


def test_batch_norm_of_a_feature_map_is_over_batch_height_width(rng: np.random.Generator) -> None:
    x = rng.standard_normal((4, 3, 5, 6)) * 3 + 2
    mean, var = x.mean(axis=(0, 2, 3), keepdims=True), x.var(axis=(0, 2, 3), keepdims=True)
    np.testing.assert_allclose(pn.batch_norm(x), (x - mean) / np.sqrt(var + np.float64(np.float32(1e-5))), **relative("float64"))


def test_rms_norm_does_not_centre(rng: np.random.Generator) -> None:
    x = 5.0 + rng.standard_normal((4, 9))
    np.testing.assert_allclose(pn.rms_norm(x, eps=0.0), x / np.sqrt((x * x).mean(axis=1, keepdims=True)), **relative("float64"))


def test_large_mean_in_float32(library: Library, rng: np.random.Generator) -> None:
    """N(1e4, 0.01): one pass is wrong by 8.7, two passes by 0.18; with re-centring what is left is rounding."""
    x = (1e4 + 0.01 * rng.standard_normal((64, 768))).astype(np.float32)
    exact = pn.layer_norm(x.astype(np.float64))
    y = pn.layer_norm(library.array(x))
    from portnorm.arrays import to_numpy

    assert np.max(np.abs(to_numpy(y) - exact)) < LARGE_MEAN


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("power", [-1.0, -0.7, 0.7, 0.95])
def test_squares_outside_the_range_of_the_type(dtype: str, power: float, rng: np.random.Generator) -> None:
    """Rows near the largest and smallest numbers of a type, with ε = 0: exact scaling by a power of two changes nothing but range."""
    limit = np.finfo(dtype).max if power > 0 else 1 / np.finfo(dtype).smallest_normal
    factor = np.exp2(np.floor(np.log2(float(limit)) * power) - 8 * (power > 0))
    x = rng.standard_normal((3, 50)).astype(dtype)
    extreme = x * np.asarray(factor, dtype=dtype)
    assert np.all(np.isfinite(extreme))
    for function in (pn.layer_norm, pn.rms_norm):
        expected = function(x, eps=0.0)
        np.testing.assert_allclose(function(extreme, eps=0.0), expected, rtol=0, atol=1e-2 if power == -1.0 else 1e-6)
        _, pullback = pn.vjp(function, extreme, eps=0.0)
        _, plain = pn.vjp(function, x, eps=0.0)
        dy = rng.standard_normal(x.shape).astype(dtype)
        if power > -1.0 and power < 0.9:
            scaled = pullback(dy)[0].astype(np.float64) * factor
            np.testing.assert_allclose(scaled, plain(dy)[0], rtol=0, atol=1e-5)


def test_constant_rows_give_the_bias_and_finite_gradients() -> None:
    x, weight, bias = np.full((3, 6), 1234.0, dtype=np.float32), np.full(6, 2.0, np.float32), np.full(6, 0.5, np.float32)
    y, pullback = pn.vjp(pn.layer_norm, x, weight, bias)
    np.testing.assert_array_equal(y, 0.5)
    assert all(np.all(np.isfinite(d)) for d in pullback(np.ones_like(x)))


def test_float16_statistics_are_float32() -> None:
    x = np.linspace(-60000, 60000, 4096, dtype=np.float16)[None]
    y = pn.layer_norm(x)
    assert y.dtype == np.float16
    np.testing.assert_allclose(y.astype(np.float64), pn.layer_norm(x.astype(np.float64)), **relative("float16"))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    arrays(np.float32, array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=6), elements=st.floats(-1e3, 1e3, width=32)),
    st.floats(-100, 100),
)
def test_shift_leaves_layer_norm_as_it_is(x: Any, shift: float) -> None:
    x = x.astype(np.float64)
    np.testing.assert_allclose(pn.layer_norm(x + shift, eps=1.0), pn.layer_norm(x, eps=1.0), rtol=1e-7, atol=1e-9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(arrays(np.float64, (4, 6), elements=st.floats(-1e3, 1e3)), arrays(np.bool_, (4,)))
def test_masked_rows_leave_batch_norm_as_if_they_were_not_there(x: Any, counts: Any) -> None:
    x = np.concatenate([x, x[:2] + 1.0])
    mask = np.concatenate([counts, [True, True]])
    y = pn.batch_norm(x[None], channel_axis=-1, mask=mask[None])
    np.testing.assert_allclose(y[0, mask], pn.batch_norm(x[mask]), rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(y[0, ~mask], 0.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize(
    ("function", "shape"), [(pn.batch_norm, (2, 3, 4)), (pn.instance_norm, (2, 3, 4)), (lambda x, **k: pn.group_norm(x, 2, **k), (2, 3, 4))]
)
def test_what_the_padding_holds_does_not_matter(function: Any, shape: tuple[int, ...], value: float, rng: np.random.Generator) -> None:
    x, mask = rng.standard_normal(shape), np.array([[True, True, False], [True, False, False]])
    spoiled = np.where(mask[..., None], x, value)
    np.testing.assert_array_equal(function(spoiled, channel_axis=-1, mask=mask), function(x, channel_axis=-1, mask=mask))


def test_nothing_counted_gives_zero(rng: np.random.Generator) -> None:
    mask = np.zeros((2, 3), dtype=bool)
    y, pullback = pn.vjp(pn.batch_norm, rng.standard_normal((2, 3, 4)), channel_axis=-1, mask=mask)
    np.testing.assert_array_equal(y, 0.0)
    np.testing.assert_array_equal(pullback(np.ones_like(y))[0], 0.0)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (2, 0, 4)])
def test_empty_arrays(shape: tuple[int, ...]) -> None:
    y, pullback = pn.vjp(pn.layer_norm, np.zeros(shape, dtype=np.float32))
    assert y.shape == shape
    assert pullback(y)[0].shape == shape


def test_nan_stays_in_its_row(rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 5))
    x[1, 2] = np.nan
    y = pn.layer_norm(x)
    assert np.all(np.isnan(y[1]))
    assert np.all(np.isfinite(y[[0, 2]]))


def test_arguments_are_not_written_to(rng: np.random.Generator) -> None:
    x, weight = rng.standard_normal((3, 5)), rng.standard_normal(5)
    before = x.copy(), weight.copy()
    _, pullback = pn.vjp(pn.layer_norm, x, weight)
    dy = rng.standard_normal((3, 5))
    pullback(dy)
    np.testing.assert_array_equal(x, before[0])
    np.testing.assert_array_equal(weight, before[1])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_weight_norm_of_extreme_rows(scale: float, rng: np.random.Generator) -> None:
    v = rng.standard_normal((3, 40))
    w = pn.weight_norm((v * scale).astype(np.float32), np.float32([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(w, pn.weight_norm(v, np.array([1.0, 2.0, 3.0])), rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(np.linalg.norm(w.astype(np.float64), axis=1), [1.0, 2.0, 3.0], rtol=1e-6)


OUT: dict[str, Any] = {
    "layer": lambda x, w, **o: pn.layer_norm(x, w, w, **o),
    "rms": lambda x, w, **o: pn.rms_norm(x, w, **o),
    "batch": lambda x, w, **o: pn.batch_norm(x, w, w, channel_axis=-1, **o),
    "batch with statistics": lambda x, w, **o: pn.batch_norm(x, w, w, mean=w, var=w * w, channel_axis=-1, **o),
    "instance": lambda x, w, **o: pn.instance_norm(x, w, w, channel_axis=-1, **o),
    "group": lambda x, w, **o: pn.group_norm(x, 2, w, w, channel_axis=-1, **o),
    "group of the first channels": lambda x, w, **o: pn.group_norm(x, 1, channel_axis=1, **o),
}


@pytest.mark.parametrize("name", OUT)
def test_out_takes_the_result(name: str, library: Library, rng: np.random.Generator) -> None:
    """And is what comes back; also with gaps between its rows, with its axes in another order, and where it is the input itself.

    Before each call one of other values: what memory has by chance is then none of the result.
    """
    if library.name == "numpy-readonly":
        pytest.skip("nothing can be written to")
    x, w = rng.standard_normal((3, 5, 4)), 1.0 + rng.uniform(size=4)
    given_, w = library.array(x, "float32"), library.array(w, "float32")
    expected = np.array(to_numpy(OUT[name](given_, w)))
    if not library.support.out:
        with pytest.raises(pn.UnsupportedError, match="`out` cannot be written to"):
            OUT[name](given_, w, out=given_)
        return
    for out in (
        library.array(np.zeros((3, 5, 4)), "float32"),
        library.array(np.zeros((3, 5, 8)), "float32")[..., ::2],
        library.array(np.zeros((3, 4, 5)), "float32").swapaxes(1, 2) if library.name.startswith("numpy") else library.array(x, "float32"),
        library.array(x, "float32"),
    ):
        OUT[name](library.array(rng.standard_normal((3, 5, 4)), "float32"), w)
        x = out if float(to_numpy(out)[0, 0, 0]) else given_
        assert OUT[name](x, w, out=out) is out
        np.testing.assert_allclose(to_numpy(out), expected, atol=1e-6)
