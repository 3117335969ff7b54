"""Padding, by lengths or a mask: whatever stands there enters nothing, and a masked step of a recurrent layer is no step at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from portnorm.layers.layer import Layer
from tests.cases import LAYERS, PRESETS, random_recurrent, random_state
from tests.conftest import LIBRARIES, Library
from tests.tolerances import AUTODIFF_FLOAT64, LIBRARY_FLOAT32, RECURRENT, relative

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


def in_front(x: Any) -> Any:
    """`x` (time, batch, …) with the steps of `MASK` first, in order, and 0 behind them."""
    found = np.zeros_like(x)
    for b in range(BATCH):
        kept = x[MASK[:, b], b]
        found[: len(kept), b] = kept
    return found


def shown_at(reverse: bool, t: int, b: int) -> int | None:
    """Which of the steps in front is seen at t: the last one before or at t, in the reverse direction the next one."""
    place = int(MASK[:t, b].sum()) if reverse else int(MASK[: t + 1, b].sum()) - 1
    return place if 0 <= place < MASK[:, b].sum() else None


# -- recurrent layers ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.peers
@pytest.mark.parametrize("returns", [True, False], ids=["sequences", "last"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("both", [False, True], ids=["forward", "both directions"])
@pytest.mark.parametrize(("cell", "theirs"), [("LSTM", "LSTM"), ("GRU", "GRU"), ("RNN", "SimpleRNN")])
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


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("returns", [True, False], ids=["sequences", "last"])
@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_a_masked_step_is_no_step(cell: str, norm: str | None, returns: bool, training: bool, rng: np.random.Generator) -> None:
    """The layer gives what it gives for the steps that are left, value, state, statistics and cotangents, where they were."""
    layer = random_recurrent(cell, norm, rng, num_layers=2, bidirectional=True, return_sequences=returns)
    other = layer.copy()
    x, state = rng.standard_normal((STEPS, BATCH, 4)), random_state(layer, BATCH, rng)
    y, last, pullback = layer.vjp(x, state, mask=MASK, training=training)
    inner, inner_last, inner_pullback = other.vjp(in_front(x), state, MASK.sum(0), training=training)

    dy, inner_dy = rng.standard_normal(y.shape), np.zeros_like(inner)
    if returns:
        expected = np.zeros_like(y)
        for (t, b), (reverse, half) in ((p, h) for p in np.ndindex(STEPS, BATCH) for h in enumerate((slice(3), slice(3, 6)))):
            place = shown_at(bool(reverse), t, b)
            if place is not None:
                expected[t, b, half] = inner[place, b, half]
                inner_dy[place, b, half] += dy[t, b, half]
    else:
        expected, inner_dy = (np.where(MASK.any(0)[:, None], a, 0.0) for a in (inner, dy))
    np.testing.assert_allclose(y, expected, **CLOSE)
    for mine, theirs in zip(last, inner_last, strict=True):
        np.testing.assert_allclose(mine, theirs, **CLOSE)
    assert all(np.array_equal(layer.buffers[name], b) for name, b in other.buffers.items())

    dlast = tuple(rng.standard_normal(s.shape) for s in last if s.ndim)
    (dx, dstate, grads), (inner_dx, inner_dstate, inner_grads) = pullback(dy, dlast), inner_pullback(inner_dy, dlast)
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
    assert training or all(a is b for a, b in zip(other.buffers.values(), before.values(), strict=True))


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
        run = torch.compile(module, fullgraph=False, dynamic=False) if how == "compile" else module
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
