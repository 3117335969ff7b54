"""Layers that learn the state before their first step: as if it were given, in values and gradients, everywhere a layer goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from tests.cases import random_recurrent
from tests.conftest import Library
from tests.tolerances import DIFFERENCES, ONNX_OPERATOR, RECURRENT

LEARNING: list[tuple[str, str | None, dict[str, Any]]] = [
    ("LSTM", None, {}),
    ("LSTM", None, {"proj_size": 2, "bidirectional": True, "num_layers": 2}),
    ("LSTM", "layer", {"batch_first": True}),
    ("LSTM", "batch", {}),
    ("GRU", "layer", {"bidirectional": True}),
    ("GRU", "li-gru", {"num_layers": 2}),
    ("RNN", "weight", {"return_sequences": False}),
]
IDS = [f"{cell}-{norm}-{'-'.join(options) or 'plain'}" for cell, norm, options in LEARNING]


def made(row: tuple[str, str | None, dict[str, Any]], rng: np.random.Generator) -> tuple[Any, Any]:
    """A layer with random first states, and an input for six sequences."""
    cell, norm, options = row
    layer = random_recurrent(cell, norm, rng, learned_state=True, **options)
    return layer, rng.standard_normal((6, 5, 4) if options.get("batch_first") else (5, 6, 4))


@pytest.mark.parametrize("row", LEARNING, ids=IDS)
@pytest.mark.parametrize("lengths", [None, [5, 3, 1, 5, 2, 4]], ids=["whole", "lengths"])
def test_sequences_start_from_it(lengths: Any, row: Any, rng: np.random.Generator) -> None:
    layer, x = made(row, rng)
    training = layer.variant.norm == "batch"
    y, last, pullback = layer.vjp(x, lengths=lengths, training=training)
    given_y, given_last, given_pullback = layer.copy().vjp(x, layer.initial_state(6), lengths, training=training)
    np.testing.assert_allclose(y, given_y, rtol=1e-12)
    dy, dlast = rng.standard_normal(y.shape), tuple(rng.standard_normal(s.shape) for s in last[: len(layer.learned)])
    dx, _, grads = pullback(dy, dlast)
    given_dx, given_dstate, given_grads = given_pullback(dy, dlast)
    np.testing.assert_allclose(dx, given_dx, rtol=1e-12)
    names = [name for name in layer.params if name.startswith(("h0", "c0"))]
    assert len(names) == len(layer.learned) * layer.num_layers * layer.num_directions
    for k, state in enumerate(layer.learned):
        for place, name in enumerate(n for n in names if n.startswith(state)):
            np.testing.assert_allclose(grads[name], given_dstate[k][place].sum(0), rtol=1e-9, atol=1e-12)
            assert not given_grads[name].any()  # nobody started there
    np.testing.assert_allclose(last[0], given_last[0], rtol=1e-12)


@pytest.mark.parametrize("row", LEARNING, ids=IDS)
def test_gradients_are_differences(row: Any, rng: np.random.Generator) -> None:
    layer, x = made(row, rng)
    training = layer.variant.norm == "batch"
    y, _, pullback = layer.vjp(x, training=training)
    dy, step, before = rng.standard_normal(y.shape), 1e-6, layer.parameters()
    grads = pullback(dy)[2]
    for name in [n for n in before if n.startswith(("h0", "c0"))]:
        direction, ends = rng.standard_normal(before[name].shape), []
        for sign in (1, -1):
            layer.assign({**before, name: before[name] + sign * step * direction})
            ends.append(np.sum(layer.vjp(x, training=training)[0] * dy))
        layer.assign(before)
        difference = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(
            np.sum(grads[name] * direction), difference, rtol=DIFFERENCES, atol=DIFFERENCES * max(1, abs(difference))
        )


@pytest.mark.parametrize("row", LEARNING, ids=IDS)
def test_it_passes_through_files_and_graphs(row: Any, tmp_path: Path, rng: np.random.Generator) -> None:
    layer, x = made(row, rng)
    layer, x = layer.to(dtype="float32"), x.astype("float32")
    expected = layer(x)[0]
    pn.save(layer, tmp_path / "m.safetensors")
    pn.export(layer, tmp_path / "m.onnx")
    for file in ("m.safetensors", "m.onnx"):
        np.testing.assert_array_equal(pn.load(tmp_path / file)(x)[0], expected)
    np.testing.assert_allclose(pn.compile(layer)(x)[0], expected, rtol=ONNX_OPERATOR, atol=ONNX_OPERATOR)


@pytest.mark.parametrize("row", LEARNING, ids=IDS)
def test_every_library_starts_there(library: Library, row: Any, rng: np.random.Generator) -> None:
    layer, x = made(row, rng)
    dtype = "float64" if "float64" in library.dtypes else "float32"
    theirs = layer.to(library.xp, dtype=dtype)
    (y,) = library.values([theirs(library.array(x, dtype))[0]])
    np.testing.assert_allclose(y, layer(x)[0], rtol=RECURRENT[dtype], atol=RECURRENT[dtype])


def test_nothing_is_learned_unless_asked_for() -> None:
    assert set(pn.LSTM(3, 4).params) == {f"{kind}_{side}_l0" for kind in ("weight", "bias") for side in ("ih", "hh")}
    layer = pn.LSTM(3, 4, learned_state=True)
    assert all(not layer.params[name].any() for name in ("h0_l0", "c0_l0"))
    assert "learned_state=True" in repr(layer)


@pytest.mark.peers
def test_torch_trains_it(rng: np.random.Generator) -> None:
    import torch

    layer, x = made(("GRU", "layer", {}), rng)
    _, _, pullback = layer.vjp(x)
    dy = rng.standard_normal((5, 6, 3))
    module = pn.torch_module(layer.to(torch))
    (module(torch.asarray(x))[0] * torch.asarray(dy)).sum().backward()
    found = {name.replace(".", ""): p.grad for name, p in module.named_parameters() if "h0" in name}
    assert len(found) == 1
    np.testing.assert_allclose(next(iter(found.values())), pullback(dy)[2]["h0_l0"], rtol=1e-9)


@pytest.mark.peers
def test_jax_trains_it(rng: np.random.Generator) -> None:
    import jax

    layer, x = made(("LSTM", None, {}), rng)
    dy = rng.standard_normal((5, 6, 3))
    grads = layer.vjp(x)[2](dy)[2]
    theirs = layer.to(jax.numpy)

    @jax.jit
    def total(params: Any) -> Any:
        return (theirs.apply(params, theirs.buffers, jax.numpy.asarray(x), None, None, False)[0] * dy).sum()

    found = jax.grad(total)(theirs.params)
    for name in ("h0_l0", "c0_l0", "weight_hh_l0"):
        np.testing.assert_allclose(found[name], grads[name], rtol=1e-9)
