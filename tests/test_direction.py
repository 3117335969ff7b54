"""Layers that go from the last step to the first, against a forward layer on turned input: values, gradients, lengths, files, graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import portnorm as pn
from tests.cases import LAYERS, random_recurrent
from tests.tolerances import RECURRENT, relative

WITH_BATCH = [(cell, norm) for cell in LAYERS for norm in (None, "layer", "batch")]


def turned(x: Any, lengths: Any) -> Any:
    """Each sequence from its last step to its first, padding behind."""
    y = np.zeros_like(x)
    for k in range(x.shape[1]):
        n = len(x) if lengths is None else int(lengths[k])
        y[:n, k] = x[:n, k][::-1]
    return y


@pytest.mark.parametrize("lengths", [None, [5, 0, 2, 4]])
@pytest.mark.parametrize("direction", ["reverse", "backwards"])
@pytest.mark.parametrize(("cell", "norm"), WITH_BATCH)
def test_values_and_gradients(cell: str, norm: str | None, direction: str, lengths: Any, rng: np.random.Generator) -> None:
    forward = random_recurrent(cell, norm, rng, num_layers=2)
    layer: Any = LAYERS[cell](4, 3, norm=norm, num_layers=2, t_max=4, dtype="float64", direction=direction)
    layer.load_state_dict(forward.state_dict())
    lengths = None if lengths is None else np.array(lengths)
    x, dy = rng.standard_normal((5, 4, 4)), rng.standard_normal((5, 4, 3))
    y, state, pullback = layer.vjp(x, lengths=lengths, training=norm == "batch")
    expected, last, theirs = forward.vjp(turned(x, lengths), lengths=lengths, training=norm == "batch")
    np.testing.assert_allclose(y, turned(expected, lengths) if direction == "reverse" else expected, **relative("float64", RECURRENT))
    for ours, other in zip(state, last, strict=True):
        np.testing.assert_allclose(ours, other, **relative("float64", RECURRENT))
    given = turned(dy, lengths) if direction == "reverse" else dy
    (dx, _, grads), (dturned, _, shares) = pullback(dy), theirs(given)
    np.testing.assert_allclose(dx, turned(dturned, lengths), **relative("float64", RECURRENT))
    for name, d in grads.items():
        np.testing.assert_allclose(d, shares[name], **relative("float64", RECURRENT))


@pytest.mark.parametrize("direction", ["reverse", "backwards"])
@pytest.mark.parametrize("keywords", [{}, {"batch_first": True}, {"return_sequences": False}])
def test_files_and_graphs(direction: Any, keywords: dict[str, Any], tmp_path: Any, rng: np.random.Generator) -> None:
    layer = pn.GRU(4, 3, norm="layer", num_layers=2, direction=direction, rng=0, **keywords)
    pn.save(layer, tmp_path / "m.safetensors")
    again = pn.load(tmp_path / "m.safetensors")
    x = rng.standard_normal((5, 2, 4)).astype("float32")
    np.testing.assert_array_equal(again(x)[0], layer(x)[0])
    assert repr(again) == repr(layer)
    for lengths in (True, False):
        assert pn.export(layer, tmp_path / "m.onnx", lengths=lengths).worst_step is not None
    assert repr(pn.load(tmp_path / "m.onnx")) == repr(layer)
    assert pn.export(pn.LSTM(4, 3, direction=direction, rng=0, **keywords), None).body_nodes == ()


def test_what_a_direction_excludes() -> None:
    with pytest.raises(pn.UnsupportedError, match="`direction` is 'reverse'; expected 'forward', since `bidirectional` has both"):
        pn.LSTM(3, 4, bidirectional=True, direction="reverse")
    with pytest.raises(pn.UnsupportedError, match="`direction` is 'back'; expected 'forward', 'reverse' or 'backwards'"):
        pn.LSTM(3, 4, direction="back")  # type: ignore[arg-type]
    layer = pn.LSTM(3, 4, direction="reverse")
    with pytest.raises(pn.UnsupportedError, match="direction='reverse' cannot go step by step"):
        layer.step(np.ones((2, 3), "float32"))
    with pytest.raises(pn.UnsupportedError, match="`streaming` needs a recurrent model that goes forward only"):
        pn.export(layer, None, streaming=True)
