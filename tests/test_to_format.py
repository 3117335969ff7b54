"""Layers as other libraries store them: what a format can hold comes back as the same function, what it cannot is named."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from tests.cases import LAYERS
from tests.tolerances import PUBLISHED_FLOAT64

TWO = ("bias_ih", "bias_hh")
ONE_BIAS = [
    ("keras", "LSTM", {}),
    ("keras", "LSTM", {"bidirectional": True}),
    ("keras", "LSTM", {"num_layers": 3}),
    ("keras", "RNN", {"bidirectional": True}),
    ("keras", "GRU", {"norm": pn.Variant("", reset="before", biases=TWO)}),
    ("haste", "LSTM", {}),
    ("haste", "LSTM", {"norm": pn.Variant("", norm="layer", cell="copy", shift=False, biases=TWO)}),
    ("tf-addons", "LSTM", {"norm": pn.Variant("", norm="layer", cell="state", eps=1e-3, biases=TWO)}),
    ("tf-addons", "RNN", {"norm": pn.Variant("", norm="layer", terms="sum", shift=False, biases=TWO)}),
    ("sonnet", "LSTM", {"norm": pn.Variant("", runtime_forget_bias=1.0, biases=TWO)}),
    ("flax", "LSTM", {}),
    ("flax", "RNN", {}),
]


@pytest.mark.parametrize(("format_", "cell", "config"), ONE_BIAS)
def test_two_biases_become_the_one_that_a_format_has(
    format_: str, cell: str, config: dict[str, Any], caplog: pytest.LogCaptureFixture, rng: np.random.Generator
) -> None:
    layer: Any = LAYERS[cell](3, 4, dtype="float64", rng=rng, **config)
    layer.assign({name: a + 0.3 * rng.standard_normal(a.shape) for name, a in layer.params.items()})
    with caplog.at_level(logging.INFO, logger="portnorm"):
        arrays = pn.to_format(layer, format_)
    assert f"bias_ih + bias_hh as the one bias of format {format_!r}" in caplog.text
    again: Any = pn.import_checkpoint(arrays, format_)
    x = rng.standard_normal((5, 2, 3))
    np.testing.assert_allclose(again(x)[0], layer(x)[0], rtol=PUBLISHED_FLOAT64, atol=PUBLISHED_FLOAT64)


def test_a_format_that_there_is_not() -> None:
    with pytest.raises(pn.UnsupportedError, match="`format` is 'pytorch'; expected one of 'torch', 'keras'"):
        pn.to_format(pn.Linear(2, 3, rng=0), "pytorch")


@pytest.mark.parametrize(
    ("layer", "format_", "message"),
    [
        (pn.GRU(3, 4, norm=pn.Variant("", activation="relu", biases=TWO), rng=0), "keras", "activation='tanh' where this has 'relu'"),
        (pn.LSTM(3, 4, norm="layer", rng=0), "keras", "norm=None where this has 'layer'"),
        (pn.LSTM(3, 4, norm="haste", rng=0), "haste", None),
        (pn.LSTM(3, 4, norm=pn.Variant("", gate_activation="hard_sigmoid_5", biases=TWO), rng=0), "torch", "gate_activation='sigmoid'"),
        (pn.LSTM(3, 4, num_layers=2, rng=0), "haste", "no place for 2 layers"),
        (pn.LSTM(3, 4, num_layers=2, bidirectional=True, rng=0), "keras", "no place for 2 layers and 2 directions"),
        (pn.LSTM(3, 4, direction="reverse", rng=0), "torch", "direction='forward' where this has 'reverse'"),
        (pn.LSTM(3, 4, learned_state=True, rng=0), "torch", "learned_state=False where this has True"),
        (pn.LSTM(3, 4, learned_state=True, rng=0), "thinc", None),
        (pn.LSTM(3, 4, proj_size=2, rng=0), "keras", "no place for.*weight_hr_l0"),
        (pn.GRU(3, 4, norm=pn.Variant("", biases=TWO), rng=0), "flax", None),
        (pn.GRU(3, 4, norm=pn.Variant("", biases=("bias",)), rng=0), "keras", "where this has"),
        (pn.Embedding(3, 4, rng=0), "keras", "expected one of"),
    ],
)
def test_what_a_format_does_not_have_is_named(layer: pn.Layer, format_: str, message: str | None) -> None:
    if message is None:
        assert pn.to_format(layer, format_)
        return
    with pytest.raises(pn.UnsupportedError, match=rf"format {format_!r} has no .*{message}"):
        pn.to_format(layer, format_)


@pytest.mark.parametrize("norm", ["sonnet-batch", "sonnet-batch-hidden"])
def test_statistics_of_several_steps_are_not_cut_off(norm: Any, rng: np.random.Generator) -> None:
    layer = pn.LSTM(3, 4, norm=norm, t_max=3, dtype="float64", rng=rng)
    x = rng.standard_normal((5, 2, 3))
    again: Any = pn.import_checkpoint(pn.to_format(layer, "sonnet"), "sonnet")  # those of a new layer are alike
    np.testing.assert_allclose(again(x)[0], layer(x)[0], rtol=PUBLISHED_FLOAT64, atol=PUBLISHED_FLOAT64)
    layer.load_state_dict({n: a + rng.uniform(0, 1, a.shape) if "running" in n else a for n, a in layer.state_dict().items()})
    with pytest.raises(pn.UnsupportedError, match="statistics of one step where this has those of 3, which differ"):
        pn.to_format(layer, "sonnet")


def test_what_is_no_layer_is_named() -> None:
    with pytest.raises(pn.UnsupportedError, match="`layer` is a int; expected a layer of portnorm"):
        pn.to_format(3, "torch")  # type: ignore[arg-type]
