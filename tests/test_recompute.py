"""`recompute=k`: states before every k-th step are kept, the rest is computed again, and nobody sees it in a number."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from portnorm.arrays import leaves, to_numpy, without_kernels
from tests.cases import COMBINATIONS, PRESETS, random_recurrent, random_state
from tests.conftest import Library
from tests.processes import in_threads, output_of
from tests.test_kernels import parted
from tests.tolerances import RECURRENT, relative

BATCH, TIME = 3, 7
LENGTHS = {"whole": None, "ragged": np.array([7, 0, 3])}


def run(
    layer: Any, recompute: int | None, seed: int = 3, time: int = TIME, batch: int = BATCH, given_state: bool = True, **given: Any
) -> list[Any]:
    """Everything that a call with its vjp gives: results, running statistics, cotangents."""
    rng, layer = np.random.default_rng(seed), layer.copy()
    x = rng.standard_normal((time, batch, 4)).astype(layer.dtype)
    state = tuple(s.astype(layer.dtype) if s.dtype.kind == "f" else s for s in random_state(layer, batch, rng))
    y, after, pullback = layer.vjp(x, state if given_state else None, recompute=recompute, **given)
    dy = rng.standard_normal(y.shape).astype(y.dtype)
    count = len(layer.cell.states)
    dstate = tuple(rng.standard_normal(s.shape).astype(y.dtype) for s in after[:count])
    return [y, *leaves(after), *layer.buffers.values(), *leaves(pullback(dy, dstate)), *leaves(pullback(None, dstate))]


def assert_same_bits(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "definitions"])
@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_every_bit_is_as_without(cell: str, norm: Any, kernels: bool, lengths: str, rng: np.random.Generator) -> None:
    layer = random_recurrent(cell, norm, rng, num_layers=2, bidirectional=True).to(dtype="float32")
    with nullcontext() if kernels else without_kernels(np.ndarray):
        for training in (True, False):
            expected = run(layer, None, lengths=LENGTHS[lengths], training=training)
            for every in (1, 3, 7, 100):
                assert_same_bits(run(layer, every, lengths=LENGTHS[lengths], training=training), expected)


@pytest.mark.parametrize(("cell", "variant"), COMBINATIONS)
def test_every_combination_of_fields(cell: str, variant: pn.Variant, rng: np.random.Generator) -> None:
    layer = random_recurrent(cell, variant, rng)
    assert_same_bits(run(layer, 3, lengths=LENGTHS["ragged"], training=True), run(layer, None, lengths=LENGTHS["ragged"], training=True))


@pytest.mark.parametrize("time", [0, 1, 2])
@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("norm", [None, "layer", "batch"])
def test_few_steps_and_sequences(norm: Any, batch: int, time: int, rng: np.random.Generator) -> None:
    layer = random_recurrent("LSTM", norm, rng).to(dtype="float32")
    assert_same_bits(run(layer, 1, time=time, batch=batch), run(layer, None, time=time, batch=batch))


@pytest.mark.parametrize(
    "keywords",
    [
        {"dropout": 0.5, "num_layers": 2, "recurrent_dropout": 0.3},
        {"norm": pn.Variant(source="with zoneout", norm="layer", zoneout=0.3)},
        {"return_sequences": False},
        {"direction": "reverse"},
        {"proj_size": 2},
        {"learned_state": True},
        {"quantize": "int8", "given_state": False},
    ],
    ids=str,
)
def test_what_a_layer_can_be(keywords: dict[str, Any], rng: np.random.Generator) -> None:
    given = {"norm": None, **keywords}
    given_state = given.pop("given_state", True)
    layer = random_recurrent("LSTM", given.pop("norm"), rng, **given)
    expected = run(layer, None, given_state=given_state, training=True, rng=0)
    assert_same_bits(run(layer, 2, given_state=given_state, training=True, rng=0), expected)


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_a_pullback_writes_into_nothing_of_others(cell: str, rng: np.random.Generator) -> None:
    """Several may be called at once, each with its own cotangent, and what the layer gave stays as it is."""
    layer = random_recurrent(cell, "layer", rng, hidden=16).to(dtype="float32")
    x, dys = rng.standard_normal((50, 8, 4)).astype("float32"), rng.standard_normal((4, 50, 8, 16)).astype("float32")
    y, _, pullback = layer.vjp(x, training=True, recompute=7)
    expected = [[*leaves(pullback(dy))] for dy in dys]
    failed = []

    def work(k: int) -> None:
        for _ in range(20):
            if not all(np.array_equal(a, b) for a, b in zip(leaves(pullback(dys[k])), expected[k], strict=True)):
                failed.append(k)

    in_threads(work, len(dys))
    assert failed == []
    y[3] += 1
    changed = y.copy()
    pullback(dys[0])
    np.testing.assert_array_equal(y, changed)


def test_sequences_in_threads(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    layer = random_recurrent("LSTM", "layer", rng).to(dtype="float32")
    ranges = parted(monkeypatch)
    expected = run(layer, None, batch=9)
    assert [(0, 4), (4, 8), (8, 9)] in ranges
    found = run(layer, 3, batch=9)
    for a, b in zip(found, expected, strict=True):  # sums over sequences as the threads come
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * max(1.0, float(np.max(np.abs(b), initial=0.0))))


@pytest.mark.parametrize("norm", [None, "layer", "batch"])
def test_libraries_agree(library: Library, norm: Any, rng: np.random.Generator) -> None:
    layer = random_recurrent("LSTM", norm, rng)
    given = rng.standard_normal((TIME, BATCH, 4)), np.array([7, 1, 3])
    dy = rng.standard_normal((TIME, BATCH, 3))
    y, _, pullback = layer.copy().vjp(given[0], lengths=given[1], training=True)
    expected = [y, *leaves(pullback(dy))]
    theirs = layer.to(xp=library.support.name, dtype=library.widest)
    x, lengths, dtheirs = library.array(given[0], library.widest), library.array(given[1]), library.array(dy, library.widest)
    y, _, pullback = theirs.vjp(x, lengths=lengths, training=True, recompute=3)
    for a, b in zip(library.values([y, *leaves(pullback(dtheirs))]), expected, strict=True):
        np.testing.assert_allclose(a, b, **relative(library.widest, RECURRENT))


def test_a_model_passes_it_on(rng: np.random.Generator) -> None:
    model = pn.Sequential(pn.LSTM(4, 3, norm="layer", rng=0), pn.LayerNorm(3), pn.GRU(3, 2, rng=1), pn.Linear(2, 5, rng=2))
    x, dy = rng.standard_normal((TIME, BATCH, 4)).astype("float32"), rng.standard_normal((TIME, BATCH, 5)).astype("float32")

    def gradients(recompute: int | None) -> list[Any]:
        y, _, pullback = model.vjp(x, training=True, recompute=recompute)
        return [y, *map(to_numpy, leaves(pullback(dy)))]

    assert_same_bits(gradients(3), gradients(None))
    y, _, _, pullback = model.pure_vjp(model.params, model.buffers, x, training=True, recompute=2)
    assert_same_bits([y, *leaves(pullback(dy))], gradients(None))


def test_it_takes_less_memory() -> None:
    """17 numbers for each step, sequence and hidden feature in place of 30, beside what both have; each in a process of its own."""
    code = """
import numpy as np, portnorm as pn
from tests.processes import peak
def call(steps):
    y, _, pullback = layer.vjp(np.ones((steps, 16, 16), "float32"), training=True, recompute=RECOMPUTE)
    pullback(y)
layer = pn.LSTM(16, 64, norm="layer", rng=0)
call(40)
print(peak(lambda: call(2000)))
"""
    whole, partly = (float(output_of(code.replace("RECOMPUTE", given), PORTNORM_KERNELS="wait")) for given in ("None", "20"))
    assert whole > 100
    assert partly < 0.75 * whole


@pytest.mark.parametrize("recompute", [0, -1, 1.5, True, "3"])
def test_what_is_no_number_of_steps_is_refused(recompute: Any) -> None:
    with pytest.raises(pn.UnsupportedError, match="`recompute` is"):
        pn.LSTM(3, 4).vjp(np.ones((5, 2, 3), "float32"), recompute=recompute)
