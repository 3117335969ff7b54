"""Time: direction, lengths, carry in and out, no steps and one step; a chunked run equals a whole one; padding does not exist."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from portnorm import arrays
from portnorm.scan import loop, reverse_sequences
from tests.cases import PRESETS, random_lstm, random_recurrent, random_state
from tests.tolerances import relative

CLOSE = relative("float64")


def test_loop_is_a_fold_in_either_direction() -> None:
    xs = np.arange(5.0)[:, None]

    def body(carry: Any, x: Any, kept: Any) -> Any:
        return carry * 2 + x[0], (carry,), x[0] * 10

    carry, (before,), kept = loop(np.zeros(1), (xs,), body=body)
    assert carry[0] == 0 * 16 + 1 * 8 + 2 * 4 + 3 * 2 + 4
    np.testing.assert_array_equal(before[:, 0], [0, 0, 1, 4, 11])
    assert [float(k[0]) for k in kept.steps] == [0, 10, 20, 30, 40]
    carry, (before,), _ = loop(np.zeros(1), (xs,), body=body, reverse=True)
    assert carry[0] == 4 * 16 + 3 * 8 + 2 * 4 + 1 * 2 + 0
    np.testing.assert_array_equal(before[:, 0], [49, 24, 11, 4, 0])


def test_reverse_leaves_padding_where_it_is(rng: np.random.Generator) -> None:
    x = rng.standard_normal((4, 3, 2))
    reversed_x = reverse_sequences(x, np.array([4, 2, 0]))
    np.testing.assert_array_equal(reversed_x[:, 0], x[::-1, 0])
    np.testing.assert_array_equal(reversed_x[:, 1], x[[1, 0, 2, 3], 1])
    np.testing.assert_array_equal(reversed_x[:, 2], x[:, 2])
    np.testing.assert_array_equal(reverse_sequences(x), x[::-1])


@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_each_ragged_sequence_is_as_if_it_were_alone(cell: str, norm: str | None, rng: np.random.Generator) -> None:
    layer = random_recurrent(cell, norm, rng, bidirectional=True, num_layers=2)
    x, state, lengths = rng.standard_normal((5, 3, 4)), random_state(layer, 3, rng), [5, 2, 0]
    y, last = layer(x, state, lengths)
    for row, length in enumerate(lengths):
        alone, alone_last = layer(x[:length, row : row + 1], tuple(s[:, row : row + 1] if s.ndim else s for s in state))
        np.testing.assert_allclose(y[:length, row : row + 1], alone, **CLOSE)
        np.testing.assert_array_equal(y[length:, row], 0.0)
        for a, b in zip(last, alone_last, strict=True):
            if a.ndim:
                np.testing.assert_allclose(a[:, row : row + 1], b, **CLOSE)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("both", [False, True], ids=["forward", "both directions"])
@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_appending_padding_changes_nothing(cell: str, norm: str | None, both: bool, training: bool, rng: np.random.Generator) -> None:
    """Values, gradients and running statistics, whatever the padding holds."""
    first = random_recurrent(cell, norm, rng, bidirectional=both)
    second = first.copy()
    x, lengths = rng.standard_normal((5, 3, 4)), [5, 2, 3]
    padded = np.concatenate([x, np.full((3, 3, 4), np.nan)])
    for row, length in enumerate(lengths):
        padded[length:, row] = [np.nan, np.inf, -1e300, 7.0]
    y, last, pullback = first.vjp(x, lengths=lengths, training=training)
    padded_y, padded_last, padded_pullback = second.vjp(padded, lengths=lengths, training=training)
    np.testing.assert_allclose(padded_y[:5], y, **CLOSE)
    np.testing.assert_array_equal(padded_y[5:], 0.0)
    for a, b in zip(last[: len(first.cell.states)], padded_last, strict=False):
        np.testing.assert_allclose(a, b, **CLOSE)
    dy = rng.standard_normal(y.shape)
    dx, dstate, grads = pullback(dy)
    padded_dx, padded_dstate, padded_grads = padded_pullback(np.concatenate([dy, np.full((3, *dy.shape[1:]), 5.0)]))
    np.testing.assert_allclose(padded_dx[:5], dx, **CLOSE)
    np.testing.assert_array_equal(padded_dx[5:], 0.0)
    for a, b in zip((*dstate, *grads.values()), (*padded_dstate, *padded_grads.values()), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)
    for name, buffer in first.buffers.items():
        np.testing.assert_allclose(second.buffers[name], buffer, **CLOSE)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_step_by_step_equals_the_whole_sequence(cell: str, norm: str | None, batch_first: bool, rng: np.random.Generator) -> None:
    layer = random_recurrent(cell, norm, rng, num_layers=2, batch_first=batch_first)
    x = rng.standard_normal((7, 3, 4))
    whole, last = layer(x.transpose(1, 0, 2) if batch_first else x)
    whole = whole.transpose(1, 0, 2) if batch_first else whole
    state = None
    for t in range(7):
        h, state = layer.step(x[t], state)
        np.testing.assert_allclose(h, whole[t], **CLOSE)
    for a, b in zip(state, last, strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


@pytest.mark.parametrize("cut", [0, 1, 3, 6, 7])
@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_chunks_equal_the_whole(cell: str, norm: str | None, cut: int, rng: np.random.Generator) -> None:
    layer = random_recurrent(cell, norm, rng)
    x, state = rng.standard_normal((7, 3, 4)), random_state(layer, 3, rng, time=0)
    whole, last = layer(x, state)
    first, between = layer(x[:cut], state)
    second, end = layer(x[cut:], between)
    np.testing.assert_allclose(np.concatenate([first, second]), whole, **CLOSE)
    for a, b in zip(end, last, strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


@pytest.mark.parametrize("kernels", [False, True], ids=["definition", "kernels"])
@pytest.mark.parametrize("lengths", [None, [7, 2, 4]], ids=["whole", "ragged"])
@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_parts_that_a_library_asks_for_equal_the_whole(
    cell: str, norm: str | None, lengths: Any, kernels: bool, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inference, two or three steps at a time, from a state that has seen steps; the hidden states or the last one alone."""
    own = arrays.library(np.zeros(1))
    for keeps_time in (True, False):
        layer = random_recurrent(cell, norm, rng, return_sequences=keeps_time)
        x, state = rng.standard_normal((7, 3, 4)), random_state(layer, 3, rng)
        whole, last = layer(x, state, lengths=lengths)
        features = layer.params["weight_ih_l0" if "weight_ih_l0" in layer.params else "weight_ih_l0.v"].shape[0]
        for steps in (2, 3):
            limited = dataclasses.replace(own, kernels=own.kernels if kernels else {}, at_once=steps * 3 * features)
            monkeypatch.setitem(arrays._libraries, np.ndarray, limited)
            found, end = layer(x, state, lengths=lengths)
            monkeypatch.setitem(arrays._libraries, np.ndarray, own)
            for a, b in zip((found, *end), (whole, *last), strict=True):
                np.testing.assert_allclose(a, b, **CLOSE)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("lengths", [None, [0, 0]], ids=["whole", "ragged"])
@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_no_steps(cell: str, norm: str | None, lengths: Any, training: bool, rng: np.random.Generator) -> None:
    layer = random_recurrent(cell, norm, rng, bidirectional=True)
    buffers = dict(layer.buffers)
    state = random_state(layer, 2, rng)
    y, last, pullback = layer.vjp(np.zeros((0, 2, 4)), state, lengths, training=training)
    assert y.shape == (0, 2, 6)
    for a, b in zip(last, state, strict=True):
        np.testing.assert_array_equal(a, b)
    dlast = tuple(rng.standard_normal(s.shape) for s in state if s.ndim)
    dx, dstate, grads = pullback(y, dlast)
    assert dx.shape == (0, 2, 4)
    for a, b in zip(dstate, dlast, strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(g.shape == layer.params[name].shape and not np.any(g) for name, g in grads.items())
    assert all(np.array_equal(layer.buffers[name], b) for name, b in buffers.items())


@pytest.mark.parametrize(("cell", "norm"), [row for row in PRESETS if not str(row[1]).startswith("batch")])
def test_one_step_of_one_sequence(cell: str, norm: str | None, rng: np.random.Generator) -> None:
    layer = random_recurrent(cell, norm, rng)
    y, (h, *_), pullback = layer.vjp(rng.standard_normal((1, 1, 4)), training=True)
    np.testing.assert_array_equal(y, h)
    assert pullback(np.ones_like(y))[0].shape == (1, 1, 4)


def test_reverse_direction_is_the_forward_one_on_the_reversed_sequence(rng: np.random.Generator) -> None:
    both = random_lstm("layer", rng, bidirectional=True)
    forward = pn.LSTM(4, 3, norm="layer", dtype="float64")
    forward.load_state_dict({n.replace("_reverse", ""): a for n, a in both.state_dict().items() if "_reverse" in n})
    x = rng.standard_normal((5, 2, 4))
    np.testing.assert_allclose(both(x)[0][..., 3:], forward(x[::-1].copy())[0][::-1], **CLOSE)


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_mask_says_what_lengths_say(batch_first: bool, rng: np.random.Generator) -> None:
    """Where there are steps; behind them a mask repeats the last result, whose cotangent is then the sum."""
    layer, lengths = random_lstm("batch", rng, batch_first=batch_first), np.array([5, 0, 2])
    mask = np.arange(5)[:, None] < lengths
    x = rng.standard_normal((3, 5, 4) if batch_first else (5, 3, 4))
    mask = mask.T if batch_first else mask
    for training in (False, True):
        y, _, pullback = layer.copy().vjp(x, mask=mask, training=training)
        expected, _, expected_pullback = layer.copy().vjp(x, lengths=lengths, training=training)
        np.testing.assert_array_equal(np.where(mask[..., None], y, 0.0), expected)
        np.testing.assert_array_equal(pullback(expected)[0], expected_pullback(expected)[0])
