"""The functions that a variant may name for its gates, candidate and cell state: values, kernels that decline, and ONNX's operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import portnorm as pn
from portnorm.pointwise import ACTIVATIONS
from portnorm_onnx.targets import TARGETS
from tests.cases import LAYERS, random_recurrent

NUMPY = {
    "tanh": np.tanh,
    "relu": lambda a: np.maximum(a, 0),
    "sigmoid": lambda a: 1 / (1 + np.exp(-a)),
    "hard_sigmoid_5": lambda a: np.clip(0.2 * a + 0.5, 0, 1),
    "hard_sigmoid_6": lambda a: np.minimum(np.maximum(a + 3, 0), 6) / 6,
}
TWO = ("bias_ih", "bias_hh")


def variants(cell: str) -> list[pn.Variant]:
    """Every function in every place, the others as usual or all the same."""
    found = []
    for name in NUMPY:
        places = {
            "activation": name,
            **({"gate_activation": name} if cell != "RNN" else {}),
            **({"output_activation": name} if cell == "LSTM" else {}),
        }
        rows: list[Any] = [{k: v} for k, v in places.items()] + [places]
        found += [pn.Variant(repr(row), biases=TWO, **row) for row in rows]
    return found


CASES = [pytest.param(cell, v, id=f"{cell} {v.source}") for cell in LAYERS for v in variants(cell)]


def test_every_function_has_a_formula() -> None:
    assert set(NUMPY) == set(ACTIVATIONS)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("cell", "variant"), CASES)
def test_values(cell: str, variant: pn.Variant, dtype: str, rng: np.random.Generator) -> None:
    """In inference and with what training keeps, where NumPy's kernels would take the plain cell."""
    layer = random_recurrent(cell, variant, rng).to(dtype=dtype)
    p = {name.removesuffix("_l0"): a.astype("float64") for name, a in layer.params.items()}
    x = 2 * rng.standard_normal((5, 2, 4)).astype(dtype)
    sigma, phi, psi = (NUMPY[name] for name in variant.activations())
    h = c = np.zeros((2, 3))
    for t in range(5):
        u, a = x[t].astype("float64") @ p["weight_ih"].T + p["bias_ih"], h @ p["weight_hh"].T + p["bias_hh"]
        if cell == "LSTM":
            i, f, g, o = np.split(u + a, 4, -1)
            c = sigma(f) * c + sigma(i) * phi(g)
            h = sigma(o) * psi(c)
        elif cell == "GRU":
            (ur, uz, un), (ar, az, an) = np.split(u, 3, -1), np.split(a, 3, -1)
            z = sigma(uz + az)
            h = (1 - z) * phi(un + sigma(ur + ar) * an) + z * h
        else:
            h = phi(u + a)
    rtol = 1e-10 if dtype == "float64" else 1e-4  # relu lets five steps grow, and with them a last bit
    np.testing.assert_allclose(layer(x)[0][-1], h, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(layer.vjp(x)[0][-1], h, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
@pytest.mark.parametrize(("cell", "variant"), CASES)
def test_graphs(cell: str, variant: pn.Variant, target: str) -> None:
    """One operator where it can say the functions and the runtimes of the target know them, else a loop; the same values either way."""
    layer = LAYERS[cell](4, 3, norm=variant, rng=0)
    grows = cell == "GRU" and variant.gate_activation == "relu"  # z above 1 makes h grow without bound
    x = [0.1 * np.random.default_rng(0).standard_normal((3, 2, 4)).astype("float32")]
    report = pn.export(layer, None, target=target, inputs=x if grows else None)
    usual = variant.activations() == ("sigmoid", "tanh", "tanh") or (cell != "LSTM" and variant.activations()[:2] == ("sigmoid", "relu"))
    fused = cell in [n.op_type for n in report.model.graph.node]
    assert fused == (usual or TARGETS[target].functions)
    if fused:
        (node,) = (n for n in report.model.graph.node if n.op_type == cell)
        kept = next((len(a.strings) for a in node.attribute if a.name == "activations"), None)
        assert kept == (None if variant.activations() == ("sigmoid", "tanh", "tanh") else {"LSTM": 3, "GRU": 2, "RNN": 1}[cell])


@pytest.mark.peers
def test_hard_sigmoid_six_is_that_of_torch_and_jax(rng: np.random.Generator) -> None:
    import jax
    import torch

    x = 4 * rng.standard_normal(50)
    ours = ACTIVATIONS["hard_sigmoid_6"].of(x)
    np.testing.assert_allclose(ours, torch.nn.functional.hardsigmoid(torch.asarray(x)), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(ours, jax.nn.hard_sigmoid(x), rtol=1e-12, atol=1e-12)


@pytest.mark.peers
@pytest.mark.parametrize("xp", ["torch", "jax.numpy", "array_api_strict"])
@pytest.mark.parametrize(("cell", "variant"), CASES)
def test_other_libraries(cell: str, variant: pn.Variant, xp: str, rng: np.random.Generator) -> None:
    layer, x = random_recurrent(cell, variant, rng), rng.standard_normal((3, 2, 4))
    other = layer.to(xp=xp)
    y = np.asarray(other(other.xp.asarray(x))[0])
    np.testing.assert_allclose(y, layer(x)[0], rtol=1e-10, atol=1e-10)
