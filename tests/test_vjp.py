"""Every vjp against central differences in float64: random cotangents, random weights, |mean| much larger than the standard deviation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from portnorm.arrays import without_kernels
from portnorm.lookup import rows_added
from portnorm.op import OPS as ALL_OPS
from tests.cases import (
    COMBINATIONS,
    HEAVY_PRESETS,
    NOT_TESTED_AS_ARRAYS_OF_NUMBERS,
    OPS,
    OpCase,
    random_lstm,
    random_recurrent,
    random_state,
)
from tests.tolerances import DIFFERENCES


def assert_gradient(f: Callable[[Any], float], at: Any, gradient: Any, rng: np.random.Generator, directions: int = 2) -> None:
    """Central differences of `f` along random directions, in which every entry has a part."""
    assert gradient.shape == at.shape
    for _ in range(directions):
        direction, step = rng.standard_normal(at.shape), 1e-6
        difference = (f(at + step * direction) - f(at - step * direction)) / (2 * step)
        scale = max(1.0, float(np.linalg.norm(gradient)))
        np.testing.assert_allclose(np.sum(gradient * direction), difference, rtol=DIFFERENCES, atol=DIFFERENCES * scale)


@pytest.mark.parametrize("case", [case for case in OPS if not case.straight_through], ids=lambda case: case.name)
def test_op(case: OpCase, rng: np.random.Generator) -> None:
    arguments = case.arguments(rng)
    y, pullback = pn.vjp(case.op, *arguments, **case.keywords)
    dy = rng.standard_normal(np.shape(y))
    cotangents = pullback(np.asarray(dy))
    assert len(cotangents) == len(arguments)
    for k, (argument, cotangent) in enumerate(zip(arguments, cotangents, strict=True)):
        if not isinstance(argument, np.ndarray) or argument.dtype != np.float64:
            assert cotangent is None
            continue
        if k in case.at_zero:
            assert not np.any(cotangent[argument == 0])
            continue
        assert_gradient(
            lambda a, k=k: float(np.sum(case.op(*arguments[:k], a, *arguments[k + 1 :], **case.keywords) * dy)), argument, cotangent, rng
        )


def test_every_op_is_in_the_table() -> None:
    own = {name for name, op in ALL_OPS.items() if op.definition.__module__.startswith("portnorm")}  # users make some too
    assert {case.op.name for case in OPS} | NOT_TESTED_AS_ARRAYS_OF_NUMBERS == own


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("lengths", [None, [5, 2, 3]], ids=["whole", "ragged"])
@pytest.mark.parametrize(
    "keywords", [{}, {"num_layers": 2, "bidirectional": True}, {"return_sequences": False}], ids=["one", "stack of both directions", "last"]
)
@pytest.mark.parametrize(("cell", "norm"), HEAVY_PRESETS)
def test_recurrent(
    cell: str, norm: str | None, keywords: dict[str, Any], lengths: list[int] | None, training: bool, rng: np.random.Generator
) -> None:
    layer = random_recurrent(cell, norm, rng, **keywords)
    params, buffers, states = layer.parameters(), dict(layer.buffers), len(layer.cell.states)
    x, state = 30.0 + rng.standard_normal((5, 3, 4)), random_state(layer, 3, rng)
    if norm is None:
        x = x - 30.0  # plain gates would only saturate
    y, last, pullback = layer.vjp(x, state, lengths, training=training)
    dy, dlast = rng.standard_normal(y.shape), tuple(rng.standard_normal(s.shape) for s in last[:states])
    dx, dstate, grads = pullback(dy, dlast)
    assert list(grads) == list(params)
    length_array = None if lengths is None else np.array(lengths)

    def value(params: Any, x: Any, state: Any) -> float:
        y, last, _ = layer.apply(params, buffers, x, state, length_array, training)
        return float(np.sum(y * dy) + sum(np.sum(s * d) for s, d in zip(last, dlast, strict=False)))

    assert_gradient(lambda a: value(params, a, state), x, dx, rng)
    for k in range(states):
        assert_gradient(lambda a, k=k: value(params, x, (*state[:k], a, *state[k + 1 :])), state[k], dstate[k], rng)
    for name, parameter in params.items():
        assert_gradient(lambda a, name=name: value({**params, name: a}, x, state), parameter, grads[name], rng)


@pytest.mark.parametrize(("cell", "variant"), COMBINATIONS)
def test_any_row_that_a_user_may_write(cell: str, variant: pn.Variant, rng: np.random.Generator) -> None:
    layer = random_recurrent(cell, variant, rng)
    params, buffers, x = layer.parameters(), dict(layer.buffers), rng.standard_normal((3, 4, 4))
    lengths = np.array([3, 2, 3, 1])
    for training in (False, True):
        y, _, pullback = layer.vjp(x, lengths=lengths, training=training)
        dy = rng.standard_normal(y.shape)
        dx, _, grads = pullback(dy)

        def value(params: Any, x: Any, dy: Any = dy, training: bool = training) -> float:
            return float(np.sum(layer.apply(params, buffers, x, None, lengths, training)[0] * dy))

        assert_gradient(lambda a: value(params, a), x, dx, rng)
        for name, parameter in params.items():
            assert_gradient(lambda a, name=name: value({**params, name: a}, x), parameter, grads[name], rng)


@pytest.mark.parametrize(
    "norm", [None, "layer", "batch", "layer-gates", "weight", pn.Variant("", "batch", cell="copy", affine="step")], ids=str
)
def test_projection(norm: Any, rng: np.random.Generator) -> None:
    test_recurrent("LSTM", norm, {"proj_size": 2, "num_layers": 2, "bidirectional": True}, [5, 2, 3], True, rng)


def test_cotangents_of_none_are_zero(rng: np.random.Generator) -> None:
    layer = random_lstm("layer", rng)
    y, last, pullback = layer.vjp(rng.standard_normal((5, 3, 4)))
    given = pullback(rng.standard_normal(y.shape) * 0, tuple(np.ones_like(s) for s in last))
    left_out = pullback(None, tuple(np.ones_like(s) for s in last))
    for a, b in zip(given[2].values(), left_out[2].values(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_sequential(rng: np.random.Generator) -> None:
    model = pn.Sequential(pn.Linear(4, 5, dtype="float64", rng=0), random_lstm("layer", rng, inputs=5), pn.LayerNorm(3, dtype="float64"))
    x = rng.standard_normal((5, 3, 4))
    y, _, pullback = model.vjp(x, lengths=[5, 1, 2])
    dy = rng.standard_normal(y.shape)
    dx, _, grads = pullback(dy)
    params = model.parameters()

    def value(params: Any, x: Any) -> float:
        return float(np.sum(model.apply(params, model.buffers, x, None, np.array([5, 1, 2]))[0] * dy))

    assert_gradient(lambda a: value(params, a), x, dx, rng)
    for name, parameter in params.items():
        assert_gradient(lambda a, name=name: value({**params, name: a}, x), parameter, grads[name], rng)


def test_learned_first_state_is_dead_in_bn_lstm(rng: np.random.Generator) -> None:
    """Cooijmans et al. 2016: all rows of h0·U are alike, so batch normalization returns β whatever h0 is."""
    layer = random_lstm("batch", rng)
    h0, c0 = rng.standard_normal((1, 1, 3)), rng.standard_normal((1, 1, 3))
    state = (np.repeat(h0, 6, axis=1), np.repeat(c0, 6, axis=1), np.asarray(0))
    y, _, pullback = layer.vjp(rng.standard_normal((4, 6, 4)), state, training=True)
    dh, dc = (np.sum(d, axis=1) for d in pullback(rng.standard_normal(y.shape))[1])
    np.testing.assert_allclose(dh, 0.0, atol=1e-12)
    assert np.max(np.abs(dc)) > 1e-3


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "definitions"])
def test_rows_added_in_parts_are_those_added_at_once(kernels: bool, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, weight, dy = rng.integers(0, 7, (50, 3)), rng.standard_normal((7, 4)), rng.standard_normal((50, 3, 4))
    expected = np.zeros((7, 4))
    np.add.at(expected, ids, dy)
    for part in (1, 7 * 11, 2**22):
        monkeypatch.setattr("portnorm.lookup._BLOCK", part)
        monkeypatch.setattr("portnorm_backends.numpy._ROWS", part)
        with nullcontext() if kernels else without_kernels(np.ndarray):
            np.testing.assert_allclose(pn.vjp(pn.embedding, ids, weight)[1](dy)[1], expected, rtol=1e-12)


def test_many_rows_of_one_number_lose_nothing() -> None:
    """In float32, one after the other, so many equal terms lose 4 of 10,000."""
    rows = np.full((100_000, 2), 0.1, np.float32)
    found = rows_added(rows, np.zeros(len(rows), int), entries=1)
    np.testing.assert_allclose(found, rows.sum(axis=0, dtype=np.float64, keepdims=True), rtol=1e-7)


def test_no_rows_are_zeros() -> None:
    np.testing.assert_array_equal(rows_added(np.empty((0, 3)), np.empty(0, int), entries=2), np.zeros((2, 3)))
