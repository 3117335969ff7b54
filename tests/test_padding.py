"""Padding, by lengths or a mask: whatever stands there enters nothing, and a masked step of a recurrent layer is no step at all."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from portnorm.__main__ import main
from portnorm.arrays import leaves
from portnorm.layers.layer import Layer
from tests.cases import LAYERS, PRESETS, random_recurrent, random_state
from tests.conftest import LIBRARIES, Library
from tests.tolerances import AUTODIFF_FLOAT64, DIFFERENCES, LIBRARY_FLOAT32, RECURRENT, relative

CLOSE = relative("float64", RECURRENT)

# (time, batch): whole, padded behind, in front, with gaps, in front and with gaps and behind, a single step, and nothing at all.
MASK = np.array(
    [
        [1, 1, 0, 1, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 0, 1, 0, 0, 1, 0],
        [1, 0, 1, 1, 1, 0, 0],
        [1, 0, 1, 1, 0, 0, 0],
    ],
    dtype=bool,
)
STEPS, BATCH = MASK.shape
KERAS = [("LSTM", "LSTM"), ("GRU", "GRU"), ("RNN", "SimpleRNN")]


def in_front(x: Any) -> Any:
    """`x` (time, batch, …) with the steps of `MASK` first, in order, and 0 behind them."""
    found = np.zeros_like(x)
    for b in range(BATCH):
        kept = x[MASK[:, b], b]
        found[: len(kept), b] = kept
    return found


def shown_at(both: bool, t: int, b: int) -> int | None:
    """Which of the steps in front is seen at t: the last one before or at t; with both directions the one that is there."""
    place = int(MASK[: t + 1, b].sum()) - 1
    return None if place < 0 or (both and not MASK[t, b]) else place


# -- recurrent layers ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.peers
@pytest.mark.parametrize("returns", [True, False], ids=["sequences", "last"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("both", [False, True], ids=["forward", "both directions"])
@pytest.mark.parametrize(("cell", "theirs"), KERAS)
def test_a_mask_means_what_it_means_in_keras(
    cell: str, theirs: str, both: bool, depth: int, returns: bool, rng: np.random.Generator
) -> None:
    """Stacks and both directions; padding in front, gaps, and a sequence in which everything is masked."""
    import keras

    one = getattr(keras.layers, theirs)
    places = [(3, True)] * (depth - 1) + [(3, returns)]
    stack = [one(size, return_sequences=whole, bias_initializer="glorot_uniform") for size, whole in places]
    stack = [keras.layers.Bidirectional(layer) for layer in stack] if both else stack
    x = rng.standard_normal((BATCH, STEPS, 4)).astype("float32")
    expected, state = x, {}
    for k, layer in enumerate(stack):
        expected = np.asarray(layer(expected, mask=MASK.T))
        for reverse, side in enumerate((layer.forward_layer, layer.backward_layer) if both else (layer,)):
            weights = {w.path.rpartition("/")[2]: np.asarray(w) for w in side.weights}
            found = pn.import_checkpoint(weights, "keras", layer=cell)
            state |= {n.replace("_l0", f"_l{k}" + "_reverse" * reverse): a for n, a in found.state_dict().items()}
    mine = LAYERS[cell](4, 3, norm=found.variant, num_layers=depth, bidirectional=both, batch_first=True, return_sequences=returns)
    mine.load_state_dict(state)
    np.testing.assert_allclose(mine(x, mask=MASK.T)[0], expected, **LIBRARY_FLOAT32)


@pytest.mark.peers
@pytest.mark.parametrize("state", [False, True], ids=["from zero", "with a state"])
@pytest.mark.parametrize("returns", [True, False], ids=["sequences", "last"])
@pytest.mark.parametrize("direction", ["forward", "backwards", "reverse", "both"])
@pytest.mark.parametrize(("cell", "theirs"), KERAS)
def test_a_mask_in_every_direction_means_what_it_means_in_keras(
    cell: str, theirs: str, direction: Any, returns: bool, state: bool, rng: np.random.Generator
) -> None:
    """`go_backwards` with a mask, of which a reversed layer gives the result in the order of `x`; from a state too."""
    import keras

    one = getattr(keras.layers, theirs)
    x, count = rng.standard_normal((BATCH, STEPS, 4)).astype("float32"), (2 if cell == "LSTM" else 1) * (2 if direction == "both" else 1)
    keywords = {"return_sequences": returns, "return_state": True, "bias_initializer": "glorot_uniform"}
    layer = one(3, go_backwards=direction in ("backwards", "reverse"), **keywords)
    layer = keras.layers.Bidirectional(layer) if direction == "both" else layer
    before = [rng.standard_normal((BATCH, 3)).astype("float32") for _ in range(count)]
    expected, *last = (np.asarray(a) for a in layer(x, mask=MASK.T, initial_state=before if state else None))
    arrays = {}
    for side, suffix in zip(
        (layer.forward_layer, layer.backward_layer) if direction == "both" else (layer,), ("", "_reverse"), strict=False
    ):
        found = pn.import_checkpoint({w.path.rpartition("/")[2]: np.asarray(w) for w in side.weights}, "keras", layer=cell)
        arrays |= {f"{name}{suffix}": a for name, a in found.state_dict().items()}
    way: Any = {"bidirectional": True} if direction == "both" else {"direction": direction}
    mine = LAYERS[cell](4, 3, norm=found.variant, batch_first=True, return_sequences=returns, **way)
    mine.load_state_dict(arrays)
    size = len(mine.state_sizes())
    given = tuple(np.stack(before[k::size]) for k in range(size))
    y, after = mine(x, given if state else None, mask=MASK.T)
    np.testing.assert_allclose(y[:, ::-1] if direction == "reverse" and returns else y, expected, **LIBRARY_FLOAT32)
    for k, a in enumerate(after):
        np.testing.assert_allclose(a, np.stack(last[k::size]), **LIBRARY_FLOAT32)


@pytest.mark.parametrize("returns", [True, False], ids=["sequences", "last"])
@pytest.mark.parametrize("learned", [False, True], ids=["given", "learned"])
@pytest.mark.parametrize("direction", ["forward", "backwards", "reverse", "both"])
@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_gradients_of_a_masked_layer(
    cell: str, norm: str | None, direction: Any, learned: bool, returns: bool, rng: np.random.Generator
) -> None:
    """Against finite differences along a random direction, by the input, the first state and the parameters."""
    way: Any = {"bidirectional": True} if direction == "both" else {"direction": direction}
    layer = random_recurrent(cell, norm, rng, num_layers=2, return_sequences=returns, learned_state=learned, **way)
    x = rng.standard_normal((STEPS, BATCH, 4))
    state = None if learned else random_state(layer, BATCH, rng)
    training = norm is not None and norm.startswith("batch")
    y, last, pullback = layer.vjp(x, state, mask=MASK, training=training)
    dy, dlast = rng.standard_normal(y.shape), tuple(rng.standard_normal(s.shape) for s in last if s.ndim)
    dx, dstate, grads = pullback(dy, dlast)
    first = () if state is None else tuple(s for s in state if s.ndim)
    rest = () if state is None else state[len(first) :]
    arrays, cotangents = [x, *first, *layer.params.values()], [dx, *dstate[: len(first)], *grads.values()]
    along = [rng.standard_normal(a.shape) for a in arrays]

    def value(by: float) -> float:
        x, *others = (a + by * d for a, d in zip(arrays, along, strict=True))
        here, params = others[: len(first)], dict(zip(layer.params, others[len(first) :], strict=True))
        y, last, _ = layer.apply(params, layer.buffers, x, (*here, *rest) if state is not None else None, None, training, mask=MASK)
        return float(np.sum(y * dy) + sum(np.sum(s * d) for s, d in zip(last, dlast, strict=False)))

    step = 1e-6
    slope = (value(step) - value(-step)) / (2 * step)
    found = sum(float(np.sum(d * g)) for d, g in zip(along, cotangents, strict=True))
    scale = max(1.0, float(np.sqrt(sum(np.sum(g**2) for g in cotangents))))
    np.testing.assert_allclose(found, slope, rtol=DIFFERENCES, atol=DIFFERENCES * scale)


@pytest.mark.parametrize("cell", LAYERS)
def test_a_masked_sequence_in_parts_is_the_whole(cell: str, rng: np.random.Generator) -> None:
    """With the state handed on, wherever it is cut: a part that starts with a masked step repeats the result of the part before."""
    layer, x = random_recurrent(cell, "layer", rng, num_layers=2), rng.standard_normal((STEPS, BATCH, 4))
    expected, _ = layer(x, mask=MASK)
    for cut in range(STEPS + 1):
        y, state = layer(x[:cut], mask=MASK[:cut])
        rest, _ = layer(x[cut:], state, mask=MASK[cut:])
        np.testing.assert_allclose(np.concatenate([y, rest]), expected, **CLOSE)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("returns", [True, False], ids=["sequences", "last"])
@pytest.mark.parametrize("both", [False, True], ids=["forward", "both directions"])
@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_a_masked_step_is_no_step(cell: str, norm: str | None, both: bool, returns: bool, training: bool, rng: np.random.Generator) -> None:
    """The layer gives what it gives for the steps that are left, value, state, statistics and cotangents, where they were."""
    layer = random_recurrent(cell, norm, rng, num_layers=2, bidirectional=both, return_sequences=returns)
    other = layer.copy()
    x, state = rng.standard_normal((STEPS, BATCH, 4)), random_state(layer, BATCH, rng)
    y, last, pullback = layer.vjp(x, state, mask=MASK, training=training)
    inner, inner_last, inner_pullback = other.vjp(in_front(x), state, MASK.sum(0), training=training)

    dy, inner_dy = rng.standard_normal(y.shape), np.zeros_like(inner)
    if returns:
        expected, early = np.zeros_like(y), np.zeros_like(state[0][-1])
        for t, b in np.ndindex(STEPS, BATCH):
            place = shown_at(both, t, b)
            if place is not None:
                expected[t, b] = inner[place, b]
                inner_dy[place, b] += dy[t, b]
            elif not both:
                expected[t, b] = state[0][-1, b]
                early[b] += dy[t, b]
    else:
        expected, inner_dy, early = inner, dy, 0.0
    np.testing.assert_allclose(y, expected, **CLOSE)
    for mine, theirs in zip(last, inner_last, strict=True):
        np.testing.assert_allclose(mine, theirs, **CLOSE)
    assert all(np.array_equal(layer.buffers[name], b) for name, b in other.buffers.items())

    dlast = tuple(rng.standard_normal(s.shape) for s in last if s.ndim)
    (dx, dstate, grads), (inner_dx, inner_dstate, inner_grads) = pullback(dy, dlast), inner_pullback(inner_dy, dlast)
    inner_dstate[0][-1] += early
    np.testing.assert_allclose(in_front(dx), inner_dx, **CLOSE)
    assert not np.any(dx[~MASK])
    for mine, theirs in zip((*dstate, *grads.values()), (*inner_dstate, *inner_grads.values()), strict=True):
        np.testing.assert_allclose(mine, theirs, **CLOSE)


@pytest.mark.parametrize("mask", [MASK, MASK[:, :2]], ids=["gaps", "behind"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time first", "batch first"])
@pytest.mark.parametrize("shape", ["of steps", "with an axis of features"])
def test_the_layout_of_a_mask(mask: Any, batch_first: bool, shape: str, rng: np.random.Generator) -> None:
    """`y` is the same whichever axis comes first; a mask may have an axis of length 1 for the features."""
    layer = random_recurrent("GRU", "layer", rng, bidirectional=True, batch_first=batch_first)
    other = random_recurrent("GRU", "layer", rng, bidirectional=True)
    other.load_state_dict(layer.state_dict())
    x = rng.standard_normal((STEPS, mask.shape[1], 4))
    expected = other(x, mask=mask)[0]
    turned = (lambda a: a.swapaxes(0, 1)) if batch_first else (lambda a: a)
    given = turned(mask) if shape == "of steps" else turned(mask)[..., None]
    np.testing.assert_array_equal(turned(layer(turned(x), mask=given)[0]), expected)


def test_a_mask_that_leaves_nothing_out_is_none(rng: np.random.Generator) -> None:
    layer, x = random_recurrent("LSTM", "batch", rng), rng.standard_normal((STEPS, BATCH, 4))
    np.testing.assert_array_equal(layer(x, mask=np.ones_like(MASK), training=True)[0], layer(x, training=True)[0])


def test_lengths_give_0_where_a_mask_repeats(rng: np.random.Generator) -> None:
    """torch's convention for lengths, Keras' for a mask, for padding that comes last too; the rest is the same."""
    layer, lengths = random_recurrent("LSTM", "layer", rng), np.array([6, 3, 0])
    mask = np.arange(6)[:, None] < lengths
    x = rng.standard_normal((6, 3, 4))
    by_lengths, state = layer(x, lengths=lengths)
    by_mask, same = layer(x, mask=mask)
    np.testing.assert_array_equal(by_mask[mask], by_lengths[mask])
    np.testing.assert_array_equal(by_mask[3:, 1], np.broadcast_to(by_lengths[2, 1], (3, 3)))
    assert not by_lengths[~mask].any()
    assert not by_mask[:, 2].any()
    for a, b in zip(state, same, strict=True):
        np.testing.assert_array_equal(a, b)


# -- whatever stands in the padding --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A model in float64, the shape of its input, and what says what of it counts."""

    made: Callable[[], Layer]
    shape: tuple[int, ...] = (STEPS, BATCH, 4)
    given: tuple[str, ...] = ("lengths", "mask")
    batch_first: bool = False
    training: tuple[bool, ...] = (False, True)

    @property
    def by_channel(self) -> bool:
        return self.shape[1:] == (4, STEPS)

    def keywords(self, name: str) -> tuple[dict[str, Any], Any]:
        """What is given, and where it is True, broadcastable to `x`."""
        mask = np.arange(STEPS)[:, None] < MASK.sum(0) if name == "lengths" else MASK
        mask = mask.T if self.batch_first or self.by_channel else mask
        features = len(self.shape) - 2
        where = mask[:, None, :] if self.by_channel else mask.reshape(*mask.shape, *(1,) * features)
        return {name: MASK.sum(0) if name == "lengths" else mask}, where


def _double(**keywords: Any) -> dict[str, Any]:
    return {"dtype": "float64", "rng": 0, **keywords}


D = {"dtype": "float64"}
FIRST = (BATCH, STEPS, 4)
MODELS: dict[str, Model] = {
    "LSTM": Model(lambda: pn.LSTM(4, 3, **_double())),
    "LSTM, both directions, two layers": Model(lambda: pn.LSTM(4, 3, norm="layer", bidirectional=True, num_layers=2, **_double())),
    "GRU, its last state": Model(lambda: pn.GRU(4, 3, norm="batch", return_sequences=False, **_double())),
    "RNN, batch first": Model(lambda: pn.RNN(4, 3, norm="batch-input", batch_first=True, **_double()), FIRST, batch_first=True),
    "Linear, LSTM": Model(lambda: pn.Sequential(pn.Linear(4, 5, **_double()), pn.LSTM(5, 3, **_double()))),
    "LayerNorm, LSTM": Model(lambda: pn.Sequential(pn.LayerNorm(4, **D), pn.LSTM(4, 3, norm="batch", **_double()))),
    "RMSNorm, GRU, Linear": Model(
        lambda: pn.Sequential(pn.RMSNorm(4, **D), pn.GRU(4, 3, norm="layer", **_double()), pn.Linear(3, 2, **_double()))
    ),
    "Embedding, GRU": Model(lambda: pn.Sequential(pn.Embedding(9, 4, **_double()), pn.GRU(4, 3, **_double())), (STEPS, BATCH)),
    "Embedding, Linear": Model(lambda: pn.Sequential(pn.Embedding(9, 4, **_double()), pn.Linear(4, 2, **_double())), (STEPS, BATCH)),
    "BatchNorm, LSTM, BatchNorm, Linear": Model(
        lambda: pn.Sequential(
            pn.BatchNorm(4, channel_axis=-1, **D),
            pn.LSTM(4, 3, **_double()),
            pn.BatchNorm(3, channel_axis=-1, **D),
            pn.Linear(3, 2, **_double()),
        )
    ),
    "LSTM, BatchNorm, LayerNorm, batch first": Model(
        lambda: pn.Sequential(pn.LSTM(4, 3, batch_first=True, **_double()), pn.BatchNorm(3, channel_axis=-1, **D), pn.LayerNorm(3, **D)),
        FIRST,
        batch_first=True,
    ),
    "Linear": Model(lambda: pn.Linear(4, 2, **_double())),
    "LayerNorm": Model(lambda: pn.LayerNorm(4, **D)),
    "LayerNorm of two axes": Model(lambda: pn.LayerNorm((2, 2), **D), (STEPS, BATCH, 2, 2)),
    "Embedding": Model(lambda: pn.Embedding(9, 4, **_double()), (STEPS, BATCH)),
    "BatchNorm, channels last": Model(lambda: pn.BatchNorm(4, channel_axis=-1, **D)),
    "GroupNorm, channels last": Model(lambda: pn.GroupNorm(2, 4, channel_axis=-1, **D)),
    "BatchNorm": Model(lambda: pn.BatchNorm(4, **D), (BATCH, 4, STEPS), ("mask",)),
    "BatchRenorm": Model(lambda: pn.BatchRenorm(4, **D), (BATCH, 4, STEPS), ("mask",)),
    "GroupNorm": Model(lambda: pn.GroupNorm(2, 4, **D), (BATCH, 4, STEPS), ("mask",)),
    "InstanceNorm": Model(lambda: pn.InstanceNorm(4, affine=True, **D), (BATCH, 4, STEPS), ("mask",)),
    "BatchNorm, InstanceNorm": Model(
        lambda: pn.Sequential(pn.BatchNorm(4, **D), pn.InstanceNorm(4, affine=True, **D)), (BATCH, 4, STEPS), ("mask",)
    ),
}

PADDED = [
    pytest.param(model, given, training, id=f"{name}-{given}-{'training' if training else 'inference'}")
    for name, model in MODELS.items()
    for given in model.given
    for training in model.training
]
"""Every model × lengths and mask × mode."""


def random_model(made: Callable[[], Layer], rng: np.random.Generator) -> Layer:
    layer = made()
    layer.assign({name: p + 0.3 * rng.standard_normal(p.shape) for name, p in layer.parameters().items()})
    return layer


def inputs(layer: Layer, model: Model, where: Any, rng: np.random.Generator) -> tuple[Any, Any]:
    """`x` with something harmless in the padding, and with what must not be looked at."""
    if layer.takes_integers:
        x = rng.integers(0, 9, model.shape)
        return x, np.where(where, x, rng.choice([-5, 99, 2**31 - 1], x.shape))
    x = rng.standard_normal(model.shape)
    return x, np.where(where, x, rng.choice([np.nan, np.inf, -np.inf], x.shape))


def poisoned(dy: Any, layer: Layer, where: Any, given: str) -> Any:
    """`dy` with NaN where the result is not what the layer computed, but 0 or nothing."""
    repeats = layer.recurrent and given == "mask" and not (isinstance(layer, pn.Sequential) and isinstance(layer.parts[-1], pn.BatchNorm))
    if repeats or not layer.keeps_time:
        return dy
    there = where if where.ndim == dy.ndim else where.reshape(*where.shape, *(1,) * (dy.ndim - where.ndim))
    return np.where(there, dy, np.nan)


@pytest.mark.parametrize(
    "of_float64", [pytest.param(row, marks=row.marks(), id=name) for name, row in LIBRARIES.items() if row.dtypes[-1] == "float64"]
)
@pytest.mark.parametrize(("model", "given", "training"), PADDED)
def test_padding_enters_nothing(model: Model, given: str, training: bool, of_float64: Library, rng: np.random.Generator) -> None:
    """NaN, infinities and numbers of no entry in the padding, NaN in its cotangents: the same value, buffers and finite gradients."""
    layer = random_model(model.made, rng)
    keywords, where = model.keywords(given)
    x, worst = inputs(layer, model, where, rng)
    expected, *_, pullback = layer.copy().vjp(x, training=training, **keywords)
    dy = rng.standard_normal(expected.shape)
    *dx, grads = pullback(dy)

    other = layer.to(xp=of_float64.support.name)
    before = dict(other.buffers)
    given_here = {name: of_float64.array(a) for name, a in keywords.items()}
    called = other.copy()
    y = called(of_float64.array(worst), training=training, **given_here)
    mine, *_, their_pullback = other.vjp(of_float64.array(worst), training=training, **given_here)
    *their_dx, their_grads = their_pullback(of_float64.array(poisoned(dy, layer, where, given)))
    found = of_float64.values(
        [y[0] if layer.recurrent else y, mine, *their_grads.values(), *other.buffers.values(), *called.buffers.values()]
    )
    reference = layer.copy()
    reference(x, training=training, **keywords)
    wanted = [expected, expected, *grads.values(), *reference.buffers.values(), *reference.buffers.values()]
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=AUTODIFF_FLOAT64 * max(1.0, float(np.abs(b).max(initial=0.0))))
    if dx[0] is not None:
        (d,) = of_float64.values([their_dx[0]])
        np.testing.assert_allclose(d, dx[0], rtol=0, atol=AUTODIFF_FLOAT64 * max(1.0, float(np.abs(dx[0]).max(initial=0.0))))
        assert not np.any(np.where(where, 0.0, d))
    for a, b in zip(of_float64.values(other.buffers.values()), of_float64.values(before.values()), strict=True):
        assert training or np.array_equal(a, b)


def _assert_gradients(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, g in expected.items():
        np.testing.assert_allclose(
            np.asarray(found[name]), g, rtol=0, atol=AUTODIFF_FLOAT64 * max(1.0, float(np.abs(g).max())), err_msg=name
        )


@pytest.mark.peers
@pytest.mark.parametrize("how", ["autograd", "func", pytest.param("compile", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("model", "given", "training"), PADDED)
def test_padding_enters_no_gradient_of_torch(model: Model, given: str, training: bool, how: str, rng: np.random.Generator) -> None:
    """A `torch_module`, differentiated by autograd, by `torch.func`, and compiled."""
    import torch

    layer = random_model(model.made, rng)
    keywords, where = model.keywords(given)
    x, worst = inputs(layer, model, where, rng)
    expected, *_, pullback = layer.copy().vjp(x, training=training, **keywords)
    dy = rng.standard_normal(expected.shape)
    grads = pullback(dy)[-1]
    module = pn.torch_module(layer).train(training)
    here = {name: torch.tensor(a) for name, a in keywords.items()}

    def loss(params: Any) -> Any:
        y = torch.func.functional_call(module, params, (torch.tensor(worst),), here)
        return ((y[0] if layer.recurrent else y) * torch.tensor(dy)).sum()

    params = dict(module.named_parameters())
    if how == "func":
        buffers = {n: b.clone() for n, b in module.named_buffers()}
        detached = {n: p.detach() for n, p in params.items()}
        found = torch.func.grad(lambda p: loss({**p, **buffers}))(detached) if not training or not buffers else None
        if found is None:  # the buffers of a transformed call are not written to: the pure form is what is differentiated
            pure = layer.to(xp="torch")
            apply = {"lengths": here["lengths"]} if given == "lengths" else {"mask": here["mask"]}
            found = torch.func.grad(
                lambda p: (pure.apply(p, pure.buffers, torch.tensor(worst), training=True, **apply)[0] * torch.tensor(dy)).sum()
            )(dict(pure.params))
    else:
        run = torch.compile(module, fullgraph=False, dynamic=False, backend="aot_eager") if how == "compile" else module
        y = run(torch.tensor(worst), **here)
        ((y[0] if layer.recurrent else y) * torch.tensor(dy)).sum().backward()
        found = {n: p.grad for n, p in params.items()}
    _assert_gradients({n: g.detach().numpy() for n, g in found.items()}, grads)


@pytest.mark.peers
@pytest.mark.parametrize(("model", "given", "training"), PADDED)
def test_padding_enters_no_gradient_of_jax(model: Model, given: str, training: bool, rng: np.random.Generator) -> None:
    """The pure form, compiled and differentiated: the mask and the lengths are traced."""
    import jax
    import jax.numpy as jnp

    layer = random_model(model.made, rng)
    keywords, where = model.keywords(given)
    x, worst = inputs(layer, model, where, rng)
    expected, *_, pullback = layer.copy().vjp(x, training=training, **keywords)
    dy = rng.standard_normal(expected.shape)
    pure = layer.to(xp="jax")

    @jax.jit
    def loss(params: Any, x: Any, counted: Any) -> Any:
        return jnp.sum(pure.apply(params, pure.buffers, x, training=training, **counted)[0] * dy)

    found = jax.grad(loss)(pure.params, jnp.asarray(worst), {name: jnp.asarray(a) for name, a in keywords.items()})
    _assert_gradients(found, pullback(dy)[-1])


# -- what has no statistics changes none ---------------------------------------------------------------------------------------------------

SHAPES = {"empty": 0, "one": 1, "ragged": BATCH, "NaN-padded": BATCH}
"""How many sequences or cases there are."""


def _batch_of(model: Model, count: int) -> tuple[int, ...]:
    at = 0 if model.batch_first or model.by_channel else 1
    return (*model.shape[:at], count, *model.shape[at + 1 :])


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_takes_every_batch(name: str, kind: str, training: bool, rng: np.random.Generator) -> None:
    """No sequence, one, and padding: a result and gradients that are finite where they count, and 0 where there is nothing."""
    model = MODELS[name]
    layer = random_model(model.made, rng)
    shape = _batch_of(model, SHAPES[kind])
    keywords, where = model.keywords(model.given[0])
    x: Any = rng.integers(0, 9, shape) if layer.takes_integers else rng.standard_normal(shape)
    if kind == "NaN-padded":
        x = np.where(where, x, 99 if layer.takes_integers else np.nan)
    before = dict(layer.buffers)
    if kind == "one" and training and name in ("GRU, its last state", "LayerNorm, LSTM"):
        with pytest.raises(pn.ShapeError, match="one sequence"):
            layer(x, training=True)
        return
    y, *_, pullback = layer.vjp(x, training=training, **(keywords if SHAPES[kind] == BATCH else {}))
    *dx, grads = pullback(rng.standard_normal(y.shape))
    for a in (y, *grads.values(), *([] if dx[0] is None else [dx[0]]), *layer.buffers.values()):
        assert np.all(np.isfinite(a))
    if kind == "empty":
        assert y.size == 0
        assert not any(np.any(g) for g in grads.values())
        for n, b in before.items():
            np.testing.assert_array_equal(layer.buffers[n], b)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    ("layer", "shape", "keywords"),
    [
        (pn.BatchNorm, (0, 3), {}),
        (pn.BatchNorm, (0, 3, 5), {}),
        (pn.BatchNorm, (4, 3, 0), {}),
        (pn.BatchNorm, (4, 3, 5), {"mask": np.zeros((4, 5), bool)}),
        (pn.BatchNorm, (4, 3, 5), {"mask": np.arange(20).reshape(4, 5) == 7}),
        (pn.BatchRenorm, (0, 3), {}),
        (pn.BatchRenorm, (4, 3, 5), {"mask": np.arange(20).reshape(4, 5) == 7}),
    ],
    ids=lambda v: getattr(v, "__name__", None) or (str(int(v["mask"].sum())) if v else "all") if not isinstance(v, tuple) else str(v),
)
def test_fewer_than_two_values_change_no_statistics(
    layer: Any, shape: Any, keywords: Any, momentum: float | None, rng: np.random.Generator
) -> None:
    norm = layer(3, momentum=momentum)
    norm(rng.standard_normal((4, 3)).astype("float32"), training=True)
    before = dict(norm.buffers)
    y = norm(rng.standard_normal(shape).astype("float32"), training=True, **keywords)
    assert y.shape == shape
    for name, b in before.items():
        np.testing.assert_array_equal(norm.buffers[name], b)


def test_a_channel_with_values_is_counted_alone(rng: np.random.Generator) -> None:
    """A mask that varies along the channels: the statistics of the channel without values stay."""
    norm, x = pn.BatchNorm(2, dtype="float64"), rng.standard_normal((5, 2, 3))
    mask = np.broadcast_to(np.array([True, False])[:, None], (5, 2, 3))
    norm(x, mask=mask, training=True)
    assert norm.buffers["running_var"][1] == 1.0
    np.testing.assert_allclose(norm.buffers["running_var"][0], 0.9 + 0.1 * x[:, 0].var(ddof=1), **CLOSE)
    assert norm.buffers["num_batches_tracked"] == 1


@pytest.mark.peers
def test_an_empty_batch_is_what_it_is_in_torch() -> None:
    import torch

    theirs, mine = torch.nn.BatchNorm1d(3), pn.BatchNorm(3)
    y = mine(np.zeros((0, 3), "float32"), training=True)
    np.testing.assert_array_equal(y, theirs(torch.zeros(0, 3)).detach().numpy())
    for name in ("running_mean", "running_var"):
        np.testing.assert_array_equal(mine.buffers[name], getattr(theirs, name).numpy())


@pytest.mark.parametrize("shape", [(2, 3, 1), (4, 3, 1, 1)], ids=str)
def test_running_statistics_of_single_values_are_refused_by_the_shape_that_came(shape: Any) -> None:
    with pytest.raises(pn.ShapeError, match=rf"`x` {re.escape(str(shape))} has one value per channel of a case"):
        pn.InstanceNorm(3, track_running_stats=True)(np.ones(shape, "float32"), training=True)


@pytest.mark.parametrize(
    ("made", "shape"),
    [
        (lambda: pn.BatchNorm(3), (0, 3)),
        (lambda: pn.InstanceNorm(3, track_running_stats=True), (0, 3, 5)),
        (lambda: pn.LSTM(3, 2, norm="batch", rng=0), (5, 0, 3)),
        (lambda: pn.Sequential(pn.BatchNorm(3, channel_axis=-1), pn.GRU(3, 2, norm="batch-input", rng=0)), (5, 0, 3)),
    ],
    ids=["BatchNorm", "InstanceNorm", "LSTM", "Sequential"],
)
def test_population_statistics_are_not_taken_of_nothing(made: Any, shape: Any, rng: np.random.Generator) -> None:
    """Batches of which none has statistics: an error, and the statistics that were there stay."""
    layer = made()
    layer(rng.standard_normal([max(n, 2) for n in shape]).astype("float32"), training=True)
    before = dict(layer.buffers)
    with pytest.raises(pn.UnsupportedError, match="`batches` gave 2 without statistics"):
        layer.estimate_population([np.zeros(shape, "float32")] * 2)
    for name, b in before.items():
        np.testing.assert_array_equal(layer.buffers[name], b)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("given", ["lengths", "mask"])
@pytest.mark.parametrize("cell", LAYERS)
def test_a_step_of_one_sequence_changes_no_statistics(cell: str, given: str, momentum: float | None, rng: np.random.Generator) -> None:
    """Eight sequences, of which one goes on: what it leaves behind is what two steps of all of them leave."""
    layer = LAYERS[cell](4, 3, norm="batch", dtype="float64", momentum=momentum, rng=0)
    other, x, lengths = layer.copy(), rng.standard_normal((3, 8, 4)), np.array([3] + [2] * 7)
    y, _ = layer(x, training=True, **({"lengths": lengths} if given == "lengths" else {"mask": np.arange(3)[:, None] < lengths}))
    whole, _ = other(x[:2], training=True)
    np.testing.assert_allclose(y[:2], whole, **CLOSE)
    for name, b in other.buffers.items():
        np.testing.assert_allclose(layer.buffers[name], b, **CLOSE)


@pytest.mark.parametrize("lengths", [[1, 0, 0], [0, 0, 0], None], ids=["one frame", "none", "no sequence"])
@pytest.mark.parametrize("cell", LAYERS)
@pytest.mark.parametrize("norm", ["batch", "batch-input", "batch-input-frame"])
def test_a_batch_without_spread_changes_no_statistics(cell: str, norm: str, lengths: Any, rng: np.random.Generator) -> None:
    layer = random_recurrent(cell, norm, rng, bidirectional=True)
    before = dict(layer.buffers)
    y, _ = layer(rng.standard_normal((4, 0 if lengths is None else 3, 4)), lengths=lengths, training=True)
    assert np.all(np.isfinite(y))
    for name, b in before.items():
        np.testing.assert_array_equal(layer.buffers[name], b)


# -- layers take the masks of the functions ------------------------------------------------------------------------------------------------

_GAPS = np.array([[1, 0, 1, 1, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=bool)  # (batch, time)
_EACH = np.indices((4, 6, 5)).sum(0) % 3 > 0
FUNCTIONS: list[tuple[Any, Any, tuple[int, ...]]] = [
    (pn.BatchNorm, pn.batch_norm, ()),
    (pn.GroupNorm, pn.group_norm, (2,)),
    (pn.InstanceNorm, pn.instance_norm, ()),
]


@pytest.mark.parametrize(
    "mask", [_GAPS, _GAPS[:, None, :], _GAPS[:1, None, :], _EACH], ids=["steps", "with channels", "shared", "each value"]
)
@pytest.mark.parametrize("axis", [1, -1], ids=["channels first", "channels last"])
@pytest.mark.parametrize(
    ("layer", "function", "groups"), FUNCTIONS, ids=lambda v: getattr(v, "__name__", "") if isinstance(v, type) else ""
)
def test_a_norm_layer_takes_the_masks_of_its_function(
    layer: Any, function: Any, groups: Any, axis: int, mask: Any, rng: np.random.Generator
) -> None:
    """Gaps, nothing in a sequence, (batch, time) over (batch, channels, time), what broadcasts, and one for each value."""
    x = 3.0 + rng.standard_normal((4, 6, 5))
    if axis == -1:
        x, mask = x.swapaxes(1, 2), mask if mask.ndim == 2 else mask.swapaxes(1, 2)
    dy = rng.standard_normal(x.shape)
    y, pullback = layer(*groups, 6, channel_axis=axis, dtype="float64").vjp(x, mask=mask, training=True)
    expected, expected_pullback = pn.vjp(function, x, *groups, channel_axis=axis, mask=mask)
    np.testing.assert_allclose(y, expected, **CLOSE)
    np.testing.assert_allclose(pullback(dy)[0], expected_pullback(dy)[0], **CLOSE)


# -- graphs --------------------------------------------------------------------------------------------------------------------------------

GRAPHS = {
    "LSTM": lambda: pn.LSTM(4, 3, norm="layer", bidirectional=True, num_layers=2, rng=0),
    "GRU": lambda: pn.GRU(4, 3, norm="batch", batch_first=True, rng=0),
    "RNN": lambda: pn.RNN(4, 3, return_sequences=False, rng=0),
    "plain LSTM": lambda: pn.LSTM(4, 3, bidirectional=True, rng=0),
    "a model": lambda: pn.Sequential(pn.Embedding(9, 4, rng=0), pn.LSTM(4, 3, norm="batch-input", rng=0), pn.Linear(3, 2, rng=0)),
}


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
@pytest.mark.parametrize("state", [False, True], ids=["from zero", "with states"])
@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_takes_a_mask(name: str, state: bool, target: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """The file is checked with gaps, padding in front and nothing at all; it comes back as the layer, and takes what is no number."""
    import onnxruntime

    model = GRAPHS[name]()
    report = pn.export(model, tmp_path / "m.onnx", mask=True, state=state, target=target)
    assert report.steps
    assert any("mask" in c.case for c in report.trajectories)
    pn.verify(tmp_path / "m.onnx")
    loaded = pn.load(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    mask = MASK.T if model.batch_first else MASK
    assert [i.name for i in session.get_inputs()][:2] == ["x", "mask"]
    x: Any = (
        np.where(MASK, rng.integers(0, 9, MASK.shape), 99)
        if model.takes_integers
        else rng.standard_normal((*mask.shape, 4)).astype("float32")
    )
    if not model.takes_integers:
        x[~mask] = np.nan
    feed = {"x": x, "mask": mask}
    if state:
        names, given = [i.name for i in session.get_inputs()][2:], [np.asarray(a) for a in leaves(model.initial_state(BATCH))]
        feed |= dict(zip(names, given, strict=True))
    np.testing.assert_allclose(session.run(["y"], feed)[0], loaded(x, mask=mask)[0], **relative("float32", RECURRENT))


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
@pytest.mark.parametrize("given", ["lengths", "mask"])
@pytest.mark.parametrize("norm", [None, "layer"])
@pytest.mark.parametrize(
    "keywords",
    [{}, {"return_sequences": False}, {"bidirectional": True}, {"direction": "reverse"}, {"learned_state": True}],
    ids=lambda k: ", ".join(k) or "forward",
)
@pytest.mark.parametrize("cell", LAYERS)
def test_a_graph_keeps_the_state_of_a_sequence_without_steps(
    cell: str, keywords: dict[str, Any], norm: Any, given: str, target: Any, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Where no step counts the last state is the first, given or learned, and so is what is seen of it."""
    import onnxruntime

    layer = random_recurrent(cell, norm, rng, **keywords).to(dtype="float32")
    learned, lengths = "learned_state" in keywords, np.array([STEPS, 0, 3, 1])
    counted = {given: lengths if given == "lengths" else np.arange(STEPS)[:, None] < lengths}
    pn.export(layer, tmp_path / "m.onnx", state=not learned, target=target, **{given: True})
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    x = rng.standard_normal((STEPS, 4, 4)).astype("float32")
    state = None if learned else tuple(s.astype("float32") for s in random_state(layer, 4, rng))
    names = [i.name for i in session.get_inputs()][2:]
    found = session.run(None, {"x": x, **counted, **dict(zip(names, state or (), strict=True))})
    for a, b in zip(found, leaves(layer(x, state, **counted)), strict=False):
        np.testing.assert_allclose(a, b, **relative("float32", RECURRENT))


@pytest.mark.runtime("openvino")
@pytest.mark.runtime("tract")
@pytest.mark.parametrize("name", GRAPHS)
def test_other_runtimes_take_a_mask(name: str, tmp_path: Path) -> None:
    pn.export(GRAPHS[name](), tmp_path / "m.onnx", mask=True)
    pn.verify(tmp_path / "m.onnx", runtimes="openvino")
    if name == "a model":  # tract finds two sizes for the batch there
        with pytest.raises(pn.ExportError, match="does not run the graph"):
            pn.verify(tmp_path / "m.onnx", runtimes="tract")
    else:
        pn.verify(tmp_path / "m.onnx", runtimes="tract")


def test_a_graph_that_ignores_the_mask_is_found(tmp_path: Path) -> None:
    """The gates look at steps that are left out."""
    import onnx

    pn.export(pn.LSTM(4, 3, norm="layer", rng=0), tmp_path / "m.onnx", mask=True)
    model = onnx.load(tmp_path / "m.onnx")
    for n in model.graph.node:
        for k, name in enumerate(n.input):
            n.input[k] = "all" if name == "mask" else name
    model.graph.node.insert(0, onnx.helper.make_node("Or", ["mask", "negated"], ["all"]))
    model.graph.node.insert(0, onnx.helper.make_node("Not", ["mask"], ["negated"]))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(pn.ConformanceError, match="with a mask"):
        pn.verify(tmp_path / "m.onnx")


@pytest.mark.parametrize("name", [*GRAPHS, "BatchNorm", "LayerNorm", "Linear"])
def test_a_compiled_model_takes_a_mask(name: str, rng: np.random.Generator) -> None:
    others: dict[str, Any] = {
        "BatchNorm": lambda: pn.BatchNorm(4, channel_axis=-1),
        "LayerNorm": lambda: pn.LayerNorm(4),
        "Linear": lambda: pn.Linear(4, 2, rng=0),
    }
    model = (GRAPHS | others)[name]()
    fast, mask = pn.compile(model), MASK.T if model.batch_first else MASK
    x: Any = rng.integers(0, 9, mask.shape) if model.takes_integers else rng.standard_normal((*mask.shape, 4)).astype("float32")
    for given in ({"mask": mask}, {"lengths": MASK.sum(0)}, {}):
        found, expected = fast(x, **given), model(x, **given)
        for a, b in zip(leaves(found), leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, **relative("float32", RECURRENT))


def test_the_command_line_exports_a_mask(tmp_path: Path) -> None:
    import onnx

    pn.save(pn.LSTM(4, 3, norm="layer", rng=0), tmp_path / "m.safetensors")
    assert main(["export", str(tmp_path / "m.safetensors"), "-o", str(tmp_path / "m.onnx"), "--mask"]) == 0
    assert [i.name for i in onnx.load(tmp_path / "m.onnx").graph.input] == ["x", "mask"]
    assert main(["verify", str(tmp_path / "m.onnx")]) == 0


def test_a_streaming_graph_takes_no_mask() -> None:
    with pytest.raises(pn.UnsupportedError, match="`mask` is for sequences"):
        pn.export(pn.LSTM(4, 3, rng=0), None, streaming=True, mask=True)


@pytest.mark.peers
def test_a_graph_of_torch_has_the_mask_of_its_layers() -> None:
    """Made inside of the model, of ids that say what is padding, wherever it is; and given from outside."""
    import torch

    class Tagger(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(7, 4)
            self.rnn = pn.torch_module(pn.GRU(4, 3, norm="layer", bidirectional=True, batch_first=True, rng=0))
            self.norm = pn.torch_module(pn.BatchNorm(6, channel_axis=-1))

        def forward(self, ids: Any) -> Any:
            y, _ = self.rnn(self.embed(ids), mask=ids != 0)
            return self.norm(y, mask=ids != 0)

    ids = torch.tensor([[0, 3, 0, 4, 2], [1, 2, 0, 0, 0], [0, 0, 0, 0, 5]])
    report = pn.export_torch(Tagger(), ids, None, dynamic_shapes=({0: "batch", 1: "time"},))
    assert report.trajectories


@pytest.mark.parametrize("batch_first", [False, True])
def test_statistics_behind_a_layer_that_turns_time_are_of_the_steps_that_count(batch_first: bool, rng: np.random.Generator) -> None:
    """`direction="backwards"` gives the last step first; the mask of what takes statistics is turned with it."""
    first = pn.GRU(3, 4, direction="backwards", batch_first=batch_first, dtype="float64", rng=0)
    norm = pn.BatchNorm(4, channel_axis=-1, momentum=1.0, dtype="float64")
    x, mask = rng.standard_normal((6, 5, 3)), rng.random((6, 5)) > 0.4
    given = (x.transpose(1, 0, 2), mask.T) if batch_first else (x, mask)
    pn.Sequential(first, norm)(given[0], mask=given[1], training=True)
    y = first(given[0], mask=given[1])[0]
    frames = (y.transpose(1, 0, 2) if batch_first else y)[::-1][mask]
    np.testing.assert_allclose(norm.buffers["running_mean"], frames.mean(axis=0), **relative("float64"))
    np.testing.assert_allclose(norm.buffers["running_var"], frames.var(axis=0, ddof=1), **relative("float64"))
