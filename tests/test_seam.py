"""The seam: a library's kernel is used where it takes the arguments, the definition elsewhere, and third parties can join."""

from __future__ import annotations

import importlib.metadata
from typing import Any, NamedTuple

import numpy as np
import pytest

import portnorm as pn
import portnorm.arrays as registry
from portnorm.arrays import Kernel, Library
from portnorm.norm.normalize import normalize
from portnorm.pointwise import sigmoid


class ToyResiduals(NamedTuple):
    y: Any


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """NumPy with a kernel for `sigmoid` of float64; records what it was asked."""
    calls: list[str] = []

    def call(x: Any) -> Any:
        calls.append("call")
        return 0.5 * (1 + np.tanh(x / 2))

    def forward(x: Any) -> Any:
        calls.append("forward")
        y = 0.5 * (1 + np.tanh(x / 2))
        return y, ToyResiduals(y)

    def vjp(residuals: ToyResiduals, dy: Any) -> Any:
        calls.append("vjp")
        return (dy * residuals.y * (1 - residuals.y),)

    kernel = Kernel(call, forward, vjp, ToyResiduals, accepts=lambda x: x.dtype == np.float64)
    monkeypatch.setitem(registry._libraries, np.ndarray, Library("numpy", kernels={"sigmoid": kernel}))
    return calls


def test_a_kernel_takes_the_place_of_the_definition(toy: list[str], rng: np.random.Generator) -> None:
    x, dy = rng.standard_normal((2, 3, 4))[:2]
    y, residuals = sigmoid.definition(x)
    np.testing.assert_allclose(sigmoid(x), y, rtol=1e-15)
    mine, pullback = pn.vjp(sigmoid, x)
    np.testing.assert_allclose(mine, y, rtol=1e-15)
    np.testing.assert_allclose(pullback(dy)[0], sigmoid.vjp(residuals, dy)[0], rtol=1e-14)
    assert toy == ["call", "forward", "vjp"]


def test_arguments_that_a_kernel_refuses_go_to_the_definition(toy: list[str], rng: np.random.Generator) -> None:
    x = rng.standard_normal(5).astype(np.float32)
    np.testing.assert_array_equal(sigmoid(x), sigmoid.definition(x)[0])
    pn.vjp(sigmoid, x)[1](x)
    assert toy == []


def test_layers_use_the_kernel(toy: list[str], rng: np.random.Generator) -> None:
    layer = pn.LSTM(2, 3, norm="layer", dtype="float64", rng=0)
    layer(rng.standard_normal((4, 2, 2)))
    assert toy == ["call"] * 12


class Foreign:
    """An array of a library that portnorm does not know: NumPy's, in a wrapper that only registration lets in."""

    __module__ = "toyarrays.core"

    def __init__(self, values: Any):
        self.values = values
        self.dtype, self.shape, self.ndim = values.dtype, values.shape, values.ndim


def test_a_third_party_joins_through_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library("toyarrays", kernels={"sigmoid": Kernel(call=lambda x: Foreign(np.tanh(x.values)))})

    class Entry:
        name = "toyarrays"

        def load(self) -> Library:
            return library

    def entry_points(*, group: str, name: str) -> list[Entry]:
        return [Entry()] if (group, name) == ("portnorm.backends", "toyarrays") else []

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    x = Foreign(np.ones(3))
    try:
        np.testing.assert_array_equal(sigmoid(x).values, np.tanh(np.ones(3)))
        assert registry.library(x) is library
    finally:
        registry._libraries.pop(Foreign, None)


def test_an_op_looks_like_its_function() -> None:
    import inspect

    assert list(inspect.signature(pn.layer_norm).parameters) == ["x", "weight", "bias", "axis", "eps", "out"]
    assert pn.layer_norm.__doc__ is not None
    assert pn.layer_norm.__name__ == "layer_norm"
    assert repr(normalize) == "<Op normalize>"


@pytest.mark.peers
def test_time_loop_under_jax_is_lax_scan(rng: np.random.Generator) -> None:
    """What is traced does not grow with the number of steps; and the layer works under jit and grad."""
    import jax
    import jax.numpy as jnp

    layer = pn.LSTM(3, 4, norm="layer", xp=jnp, dtype="float32", rng=0)

    def loss(params: Any, x: Any) -> Any:
        return jnp.sum(layer.apply(params, layer.buffers, x)[0] ** 2)

    sizes = [len(str(jax.make_jaxpr(loss)(layer.params, jnp.ones((steps, 2, 3), dtype="float32")))) for steps in (5, 50)]
    assert sizes[1] < sizes[0] * 1.1
    x = jnp.asarray(rng.standard_normal((5, 2, 3)), dtype="float32")
    y, _, pullback = layer.vjp(x)
    by_jax = jax.jit(jax.grad(loss))(layer.params, x)
    for name, gradient in pullback(2 * y)[2].items():
        np.testing.assert_allclose(gradient, by_jax[name], rtol=2e-4, atol=2e-4)
