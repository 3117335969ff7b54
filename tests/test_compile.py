"""`pn.compile`: the same call, the same result, from onnxruntime; from many threads, and after a fork."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import portnorm as pn
from tests.cases import HEAVY_PRESETS
from tests.processes import in_threads, output_of
from tests.test_export import LAYERS, lstm, recurrent


@pytest.mark.parametrize("keywords", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=["one", "stack"])
@pytest.mark.parametrize(("cell", "norm"), HEAVY_PRESETS)
def test_every_preset_gives_what_the_layer_gives(cell: str, norm: str | None, keywords: dict[str, Any], rng: np.random.Generator) -> None:
    layer = recurrent(cell, norm, **keywords)
    fast, x = pn.compile(layer), rng.standard_normal((3, 3, 5)).astype(np.float32)
    state = layer.initial_state(3, noise=0.1, rng=rng)
    for given in ({}, {"lengths": [3, 1, 2]}, {"state": state}, {"mask": np.array([[1, 1, 1], [1, 1, 1], [1, 1, 1]], bool)}):
        (y, after), (expected, last) = fast(x, **given), layer(x, **given)
        np.testing.assert_allclose(y, expected, atol=2e-5)
        assert len(after) == len(last)
        for a, b in zip(after, last, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(("layer", "keywords", "nodes"), LAYERS, ids=lambda v: repr(v) if isinstance(v, pn.Layer) else None)
def test_layers_without_time(layer: pn.Layer, keywords: dict[str, Any], nodes: int | None, rng: np.random.Generator) -> None:
    dims = keywords.get("input_shape") or layer.input_dims()
    x: Any = rng.standard_normal([d if isinstance(d, int) else 4 for d in dims]).astype(np.float32)
    if layer.takes_integers:
        x = rng.integers(0, 2, x.shape)
    np.testing.assert_allclose(pn.compile(layer)(x), layer(x), atol=2e-5)


def test_a_whole_model_and_its_states(rng: np.random.Generator) -> None:
    parts = (pn.Embedding(9, 4, rng=0), pn.GRU(4, 8, norm="layer", rng=0), pn.LSTM(8, 8, norm="batch", rng=0), pn.Linear(8, 3, rng=0))
    model = pn.Sequential(*parts)
    fast, x = pn.compile(model), rng.integers(0, 9, (6, 2))
    y, state = fast(x[:4])
    rest, _ = fast(x[4:], state)
    expected, _ = model(x)
    np.testing.assert_allclose(np.concatenate([y, rest]), expected, atol=2e-5)


def test_it_is_a_snapshot() -> None:
    layer = lstm("layer")
    fast, x = pn.compile(layer), np.ones((2, 1, 5), np.float32)
    before, _ = layer(x)
    layer.params["weight_ih_l0"] *= 0
    np.testing.assert_allclose(fast(x)[0], before, atol=2e-6)


def test_sequences_of_no_steps_and_wrong_input() -> None:
    fast = pn.compile(lstm("layer"))
    y, (h, c) = fast(np.zeros((0, 2, 5), np.float32))
    assert (y.shape, h.shape, c.shape) == ((0, 2, 8), (1, 2, 8), (1, 2, 8))
    with pytest.raises(pn.ShapeError, match="`x` has shape"):
        fast(np.zeros((4, 2, 3), np.float32))
    with pytest.raises(pn.ShapeError, match=r"`state` has arrays of shapes .*expected h \(1, 2, 8\), c \(1, 2, 8\)"):
        fast(np.zeros((4, 2, 5), np.float32), (np.zeros((1, 3, 8), np.float32),) * 2)
    with pytest.raises(pn.DTypeError, match="`x`"):
        fast(np.zeros((4, 2, 5)))
    with pytest.raises(pn.UnsupportedError, match="expected a NumPy array"):
        fast([[[1.0] * 5]])  # type: ignore[arg-type]
    with pytest.raises(pn.UnsupportedError, match="`threads` is 0"):
        pn.compile(lstm(None), threads=0)
    with pytest.raises(pn.UnsupportedError, match="expected a layer"):
        pn.compile(print)  # type: ignore[arg-type]


def test_many_threads_at_once(rng: np.random.Generator) -> None:
    """8 threads × 1,000 calls, the first of which compile: each gets its own numbers."""
    layer = lstm("layer")
    fast, failed = pn.compile(layer), []
    given = rng.standard_normal((8, 3, 2, 5)).astype(np.float32)
    expected = [layer(x)[0] for x in given]

    def work(k: int) -> None:
        for _ in range(1000):
            if not np.allclose(fast(given[k])[0], expected[k], atol=1e-5):
                failed.append(k)

    in_threads(work)
    assert failed == []


def test_after_a_fork() -> None:
    """In a process of its own, since other tests bring in libraries that warn of forks."""
    code = """
import os
import numpy as np, portnorm as pn
x, fast = np.ones((3, 2, 5), np.float32), pn.compile(pn.LSTM(5, 8, norm="layer", rng=0))
expected = fast(x)[0]
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(fast(x)[0], expected) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert output_of(code) == "0"
