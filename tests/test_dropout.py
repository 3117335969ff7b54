"""Values dropped in training: between layers as torch does it, of h for a whole sequence (Gal & Ghahramani 2016), and by zoneout."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from portnorm.layers.recurrent import Recurrent
from portnorm_backends.cpu.recurrent import LoopResiduals
from tests.cases import HEAVY_PRESETS, IMPLEMENTATIONS, LAYERS, PRESETS, random_recurrent
from tests.conftest import Library
from tests.test_vjp import assert_gradient
from tests.tolerances import RECURRENT, relative

STEPS, BATCH = 4, 3
LENGTHS = np.array([4, 1, 3])
GAPS = np.array([[True, False, True], [False, True, True], [True, False, False], [True, False, True]])
WAYS: list[dict[str, Any]] = [{}, {"bidirectional": True}, {"direction": "reverse"}, {"direction": "backwards", "return_sequences": False}]


def dropping(cell: str, norm: Any, rng: np.random.Generator, *, layers: int = 2, zoneout: float = 0.3, **keywords: Any) -> Recurrent:
    """A layer that drops in every way that there is."""
    between = 0.4 if layers > 1 else 0.0
    layer = random_recurrent(cell, norm, rng, num_layers=layers, dropout=between, recurrent_dropout=0.25, **keywords)
    layer.variant = dataclasses.replace(layer.variant, zoneout=zoneout)
    return layer


def uniform(layer: pn.Layer, rng: np.random.Generator, steps: int = STEPS, batch: int = BATCH) -> dict[str, Any]:
    return {name: rng.random(shape) for name, shape in layer.random_shapes(steps, batch).items()}


# -- gradients -----------------------------------------------------------------------------------------------------------------------------


def check_gradients(layer: Recurrent, rng: np.random.Generator, **counted: Any) -> None:
    """Of a call with `lengths` or a `mask`, NaN beside what counts, against central differences with the same numbers."""
    x, drawn, buffers = rng.standard_normal((STEPS, BATCH, 4)), uniform(layer, rng), dict(layer.buffers)
    params = layer.parameters()
    there = np.arange(STEPS)[:, None] < counted["lengths"] if "lengths" in counted else counted.get("mask", np.ones((STEPS, BATCH), bool))
    padded = np.where(there[:, :, None], x, np.nan)
    y, _, pullback = layer.vjp(padded, **counted, training=True, rng=drawn)
    assert np.all(np.isfinite(y))
    dy = rng.standard_normal(y.shape)
    dx, _, grads = pullback(dy)
    assert np.all(dx[~there] == 0)

    def value(params: Any, x: Any) -> float:
        return float(np.sum(layer.apply(params, buffers, x, None, training=True, rng=drawn, **counted)[0] * dy))

    assert_gradient(lambda a: value(params, a), x, dx, rng)
    for name, parameter in params.items():
        assert_gradient(lambda a, name=name: value({**params, name: a}, x), parameter, grads[name], rng)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(("cell", "norm"), HEAVY_PRESETS)
def test_gradients(cell: str, norm: Any, way: dict[str, Any], rng: np.random.Generator) -> None:
    check_gradients(dropping(cell, norm, rng, **way), rng, lengths=LENGTHS)


@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_gradients_of_one_layer(cell: str, norm: Any, rng: np.random.Generator) -> None:
    check_gradients(dropping(cell, norm, rng, layers=1), rng)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("cell", LAYERS)
def test_gradients_around_gaps(cell: str, way: dict[str, Any], rng: np.random.Generator) -> None:
    check_gradients(dropping(cell, "layer", rng, **way), rng, mask=GAPS)


ROWS: list[tuple[str, Any]] = [
    *(("GRU", pn.Variant("", norm, reset=reset, update=update)) for norm in (None, "layer") for reset, update in (  # type: ignore[arg-type]
        ("before", "keep"), ("sum", "keep"), (None, "keep"), ("after", "replace"))),
    ("GRU", pn.Variant("", "layer", "sum", reset="before")),
    ("RNN", pn.Variant("", recurrence="diagonal", activation="relu")),
    ("LSTM", pn.Variant("", peepholes=True, clip=0.3)),
    ("LSTM", pn.Variant("", "batch", cell="copy", affine="step")),
]  # fmt: skip


@pytest.mark.parametrize(("cell", "norm"), [*ROWS, *IMPLEMENTATIONS], ids=str)
def test_gradients_of_every_cell(cell: str, norm: Any, rng: np.random.Generator) -> None:
    layer = dropping(cell, norm, rng, layers=1)
    layer.variant = dataclasses.replace(layer.variant, eps=0.01)  # differences of three values are smooth then
    check_gradients(layer, rng)


@pytest.mark.parametrize("norm", [None, "layer", "batch", "weight"], ids=str)
def test_gradients_of_a_projection(norm: Any, rng: np.random.Generator) -> None:
    check_gradients(dropping("LSTM", norm, rng, proj_size=2, bidirectional=True), rng, lengths=LENGTHS)


# -- libraries -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cell", "norm"), [(c, n) for c, n in PRESETS if n in (None, "layer", "batch")])
def test_libraries_agree(library: Library, cell: str, norm: Any, rng: np.random.Generator) -> None:
    dtype = library.dtypes[-1]
    layer = dropping(cell, norm, rng, bidirectional=True).to(dtype=dtype)
    layer.variant = dataclasses.replace(layer.variant, eps=0.01)  # a small variance of three values would amplify a last bit
    x, drawn = rng.standard_normal((STEPS, BATCH, 4)).astype(dtype), uniform(layer, rng)
    dy = rng.standard_normal((STEPS, BATCH, 6)).astype(dtype)
    theirs = layer.to(xp=library.xp)
    theirs.params = {name: library.array(a) for name, a in layer.params.items()}
    y, _, pullback = layer.vjp(x, lengths=LENGTHS, training=True, rng=drawn)
    given = {name: library.array(a, dtype) for name, a in drawn.items()}
    counted = library.array(LENGTHS)
    found, _, pull = theirs.vjp(library.array(x), lengths=counted, training=True, rng=given)
    dx, _, grads = pull(library.array(dy))
    wanted = pullback(dy)
    values = library.values([found, dx, *grads.values()])
    for a, b in zip(values, [y, wanted[0], *wanted[2].values()], strict=True):
        np.testing.assert_allclose(a, b, **relative(dtype, RECURRENT))


@pytest.mark.parametrize("cell", LAYERS)
def test_a_seed_drops_the_same_in_every_library(library: Library, cell: str, rng: np.random.Generator) -> None:
    layer = dropping(cell, None, rng).to(dtype="float32")
    x = rng.standard_normal((STEPS, BATCH, 4)).astype("float32")
    theirs = layer.to(xp=library.xp)
    (found,) = library.values([theirs(library.array(x), training=True, rng=7)[0]])
    np.testing.assert_allclose(found, layer(x, training=True, rng=np.random.default_rng(7))[0], **relative("float32", RECURRENT))
    assert not np.allclose(found, layer(x, training=True, rng=8)[0])


# -- what is computed ----------------------------------------------------------------------------------------------------------------------


def sigmoid(v: Any) -> Any:
    return 1 / (1 + np.exp(-v))


def oracle(cell: str, p: dict[str, Any], x: Any, mask: Any, moves: Any, suffix: str) -> Any:
    """The cells of torch in plain NumPy, with h ⊙ mask before the product and zoneout behind the step."""
    h = c = np.zeros((x.shape[1], mask.shape[-1]))
    ys = []
    for t in range(len(x)):
        u = x[t] @ p[f"weight_ih{suffix}"].T + p[f"bias_ih{suffix}"]
        a = (h * mask) @ p[f"weight_hh{suffix}"].T + p[f"bias_hh{suffix}"]
        if cell == "LSTM":
            i, f, g, o = np.split(u + a, 4, axis=-1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            new = sigmoid(o) * np.tanh(c)
        elif cell == "GRU":
            (ur, uz, un), (ar, az, an) = np.split(u, 3, axis=-1), np.split(a, 3, axis=-1)
            z = sigmoid(uz + az)
            new = (1 - z) * np.tanh(un + sigmoid(ur + ar) * an) + z * h
        else:
            new = np.tanh(u + a)
        h = np.where(moves[t], new, h)
        ys.append(h)
    return np.stack(ys)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", LAYERS)
def test_values_are_those_of_plain_numpy(cell: str, bidirectional: bool, rng: np.random.Generator) -> None:
    layer = dropping(cell, None, rng, bidirectional=bidirectional)
    x, drawn = rng.standard_normal((STEPS, BATCH, 4)), uniform(layer, rng)
    hidden, moves = (drawn["recurrent_dropout"] >= 0.25) / 0.75, drawn["zoneout"] >= 0.3
    y = x
    for n in range(2):
        sides = []
        for d, suffix in enumerate((f"_l{n}", f"_l{n}_reverse")[: layer.num_directions]):
            turned = y[::-1] if d else y
            k = n * layer.num_directions + d
            found = oracle(cell, layer.params, turned, hidden[k], moves[k], suffix)
            sides.append(found[::-1] if d else found)
        y = np.concatenate(sides, axis=-1)
        if n == 0:
            y = np.where(drawn["dropout"][0] >= 0.4, y / 0.6, 0.0)
    np.testing.assert_allclose(layer(x, training=True, rng=drawn)[0], y, rtol=1e-12, atol=1e-12)
    kept = {"dropout": drawn["dropout"] >= 0.4, "recurrent_dropout": drawn["recurrent_dropout"] >= 0.25, "zoneout": moves}
    np.testing.assert_array_equal(layer(x, training=True, rng=kept)[0], layer(x, training=True, rng=drawn)[0])


def seen_through(layers: int = 2, **more: Any) -> pn.RNN:
    """A layer whose last part is the identity on positive numbers, so that what was dropped before it is seen."""
    layer = pn.RNN(40, 40, norm=pn.Variant("", biases=(), activation="relu", **more), num_layers=layers, dtype="float64", rng=0)
    layer.params = {name: np.eye(40) if "ih" in name else np.zeros((40, 40)) for name in layer.params}
    return layer


@pytest.mark.parametrize("p", [0.2, 0.7, 1.0])
def test_as_many_are_dropped_as_was_said_and_the_expectation_stays(p: float, rng: np.random.Generator) -> None:
    layer, x = seen_through(), rng.uniform(1.0, 2.0, (50, 50, 40))
    layer.dropout = p
    y = layer(x, training=True, rng=rng)[0]
    assert abs(np.mean(y == 0) - p) < 5 * np.sqrt(p * (1 - p) / x.size) + 1e-15
    np.testing.assert_allclose(y[y != 0], (x / (1 - p))[y != 0] if p < 1 else [], rtol=1e-12)
    if p < 1:
        assert abs(np.mean(y) - np.mean(x)) < 10 * np.sqrt(p / (1 - p) / x.size)


def test_recurrent_dropout_is_the_same_in_every_step(rng: np.random.Generator) -> None:
    layer = seen_through(1)
    layer.recurrent_dropout = 0.3
    layer.params = {name: np.eye(40) for name in layer.params}
    y = layer(np.ones((5, 200, 40)), training=True, rng=rng)[0]  # h ← 1 + h ⊙ m
    dropped = y[-1] == 1
    assert abs(np.mean(dropped) - 0.3) < 0.03
    np.testing.assert_array_equal(y[:, dropped], 1.0)
    kept = y[:, ~dropped]
    np.testing.assert_allclose(kept[1:], 1 + kept[:-1] / 0.7)


def test_zoneout_draws_for_every_step(rng: np.random.Generator) -> None:
    layer, x = seen_through(1, zoneout=0.3), rng.uniform(1.0, 2.0, (40, 50, 40))
    y = layer(x, training=True, rng=rng)[0]
    stayed = y[1:] == y[:-1]
    assert abs(np.mean(stayed) - 0.3) < 0.01
    np.testing.assert_array_equal(y[1:][~stayed], x[1:][~stayed])
    assert np.std(np.mean(stayed, axis=(1, 2))) < 0.05
    np.testing.assert_allclose(np.mean([layer(x, training=True, rng=rng)[0] for _ in range(60)], axis=0), layer(x)[0], atol=0.5)


@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_inference_drops_nothing_and_needs_no_rng(cell: str, norm: Any, rng: np.random.Generator) -> None:
    layer = random_recurrent(cell, norm, rng, num_layers=2)
    x = rng.standard_normal((STEPS, BATCH, 4))
    expected, by_vjp = layer(x)[0], layer.vjp(x)[0]
    layer.dropout, layer.recurrent_dropout = 0.5, 0.5
    np.testing.assert_array_equal(layer(x)[0], expected)
    np.testing.assert_array_equal(layer(x, rng=3)[0], expected)
    np.testing.assert_array_equal(layer.vjp(x)[0], by_vjp)
    layer.eval()
    np.testing.assert_array_equal(layer(x, training=True)[0], expected)


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("cell", LAYERS)
def test_no_step_and_one(cell: str, way: dict[str, Any], steps: int, rng: np.random.Generator) -> None:
    layer = dropping(cell, "layer", rng, **way)
    for batch in (0, BATCH):
        x = rng.standard_normal((steps, batch, 4))
        y, state, pullback = layer.vjp(x, training=True, rng=0)
        np.testing.assert_array_equal(layer(x, training=True, rng=0)[0], y)
        dx, _, grads = pullback(np.ones_like(y))
        assert dx.shape == x.shape
        assert all(grads[name].shape == p.shape for name, p in layer.params.items())
        if steps == 0:
            np.testing.assert_array_equal(state[0], 0.0)


@pytest.mark.parametrize(("cell", "norm"), [("LSTM", None), ("GRU", None), ("RNN", None), ("LSTM", "layer"), ("LSTM", "batch")])
def test_dropout_between_layers_keeps_the_kernels(cell: str, norm: Any, rng: np.random.Generator) -> None:
    layer, x = random_recurrent(cell, norm, rng, num_layers=2, dropout=0.4), rng.standard_normal((STEPS, BATCH, 4))

    def loops() -> list[bool]:
        drawn = uniform(layer, rng)
        found = layer.forward(layer.params, layer.buffers, x, None, None, True, True, drawn)[3]
        return [isinstance(direction.scan, LoopResiduals) for direction in found.directions]

    assert loops() == [True, True]
    layer.recurrent_dropout = 0.1  # which the kernels do not know
    assert loops() == [False, False]


# -- where the randomness comes from -------------------------------------------------------------------------------------------------------


def test_a_call_without_rng_says_what_to_give(rng: np.random.Generator) -> None:
    layer, x = dropping("LSTM", None, rng), np.zeros((STEPS, BATCH, 4))
    said = r"`rng` is missing: LSTM has dropout 0\.4, recurrent_dropout 0\.25, zoneout 0\.3 in training; give rng=0.*random_shapes"
    calls = (
        lambda: layer(x, training=True),
        lambda: layer.vjp(x, training=True),
        lambda: layer.apply(layer.params, {}, x, training=True),
        lambda: layer.pure_vjp(layer.params, {}, x, training=True),
    )
    for call in calls:
        with pytest.raises(pn.ArgumentError, match=said):
            call()


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "a name": ({"drop": np.zeros(1)}, pn.ArgumentError, r"`rng` has 'drop'; expected arrays for 'dropout' \(1, 4, 3, 3\)"),
    "nothing": ({}, pn.ArgumentError, "`rng` has nothing"),
    "a shape": ({"dropout": np.zeros((1, 4, 3))}, pn.ShapeError, r"'dropout' of shape \(1, 4, 3\); expected \(1, 4, 3, 3\)"),
    "a dtype": ({"dropout": np.zeros((1, 4, 3, 3), int)}, pn.DTypeError, "'dropout' of dtype int64"),
    "scaled": ({"dropout": np.full((1, 4, 3, 3), 1.25)}, pn.UnsupportedError, "do not lie from 0 to 1"),
    "NaN": ({"dropout": np.full((1, 4, 3, 3), np.nan)}, pn.UnsupportedError, "do not lie from 0 to 1"),
    "no array": ({"dropout": 0.5}, pn.UnsupportedError, "`rng"),
    "a truth value": (True, pn.UnsupportedError, "`rng` is True; expected a seed"),
    "a negative seed": (-1, pn.UnsupportedError, "`rng` is -1"),
    "a fraction": (0.5, pn.UnsupportedError, r"`rng` is 0\.5"),
    "the old kind": (np.random.RandomState(0), pn.UnsupportedError, "`rng` is RandomState"),
    "an array": (np.zeros(3), pn.UnsupportedError, "`rng` is array"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_refused(what: str) -> None:
    given, kind, said = WRONG[what]
    layer = pn.LSTM(4, 3, num_layers=2, dropout=0.4, dtype="float64", rng=0)
    with pytest.raises(kind, match=said):
        layer(np.zeros((STEPS, BATCH, 4)), training=True, rng=given)


@pytest.mark.parametrize("name", ["dropout", "recurrent_dropout"])
@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), "half"])
def test_a_rate_is_from_0_to_1(name: str, p: Any) -> None:
    with pytest.raises(pn.UnsupportedError, match=f"`{name}` is .*; expected a number from 0 to 1"):
        pn.GRU(2, 3, num_layers=2, **{name: p})
    layer: Any = pn.GRU(2, 3, num_layers=2)
    with pytest.raises(pn.UnsupportedError, match=f"`{name}` is "):
        setattr(layer, name, p)


def test_one_layer_has_nothing_between() -> None:
    with pytest.raises(pn.UnsupportedError, match=r"`dropout` is 0\.2, which is between layers, but `num_layers` is 1"):
        pn.LSTM(2, 3, dropout=0.2)


def test_batch_first_changes_no_draw(rng: np.random.Generator) -> None:
    layer, x = dropping("GRU", None, rng), rng.standard_normal((STEPS, BATCH, 4))
    other = dropping("GRU", None, rng, batch_first=True)
    other.params = layer.params
    drawn = uniform(layer, rng)
    for given in (drawn, 5):
        y = other(x.swapaxes(0, 1), training=True, rng=given)[0]
        np.testing.assert_allclose(y.swapaxes(0, 1), layer(x, training=True, rng=given)[0], rtol=1e-12)


def test_sequential_passes_it_through(rng: np.random.Generator) -> None:
    first, again = dropping("LSTM", None, rng), dropping("RNN", "layer", rng, inputs=3, layers=1)
    model = pn.Sequential(first, pn.LayerNorm(3, dtype="float64"), again, again)
    x = rng.standard_normal((STEPS, BATCH, 4))
    assert [*model.random_shapes(STEPS, BATCH)] == [
        *(f"0.{name}" for name in ("dropout", "recurrent_dropout", "zoneout")),
        *(f"{k}.{name}" for k in (2, 3) for name in ("recurrent_dropout", "zoneout")),
    ]
    drawn = uniform(model, rng)
    parts = [{name.partition(".")[2]: a for name, a in drawn.items() if name.startswith(f"{k}.")} for k in range(4)]
    y = first(x, training=True, rng=parts[0])[0]
    y = again(model.parts[1](y), training=True, rng=parts[2])[0]
    y = again(y, training=True, rng=parts[3])[0]
    np.testing.assert_array_equal(model(x, training=True, rng=drawn)[0], y)
    dy = rng.standard_normal(y.shape)
    _, _, grads = model.vjp(x, training=True, rng=drawn)[2](dy)
    params = model.parameters()

    def value(params: Any) -> float:
        return float(np.sum(model.apply(params, {}, x, training=True, rng=drawn)[0] * dy))

    for name, parameter in params.items():
        assert_gradient(lambda a, name=name: value({**params, name: a}), parameter, grads[name], rng)
    first.eval()
    assert not any(name.startswith("0.") for name in model.random_shapes(STEPS, BATCH))
    model.eval()
    np.testing.assert_array_equal(model(x, training=True)[0], model(x)[0])


def test_population_statistics_are_those_without_drops(rng: np.random.Generator) -> None:
    layer, x = dropping("LSTM", "batch", rng, zoneout=0.0), rng.standard_normal((STEPS, BATCH, 4))
    other = random_recurrent("LSTM", "batch", rng, num_layers=2)
    other.params = layer.params
    for one in (layer, other):
        one.estimate_population([x])
    for name, a in layer.buffers.items():
        np.testing.assert_array_equal(a, other.buffers[name])
    zoned = dropping("LSTM", "batch", rng)
    zoned.estimate_population([x])
    assert all(np.all(np.isfinite(a)) for a in zoned.buffers.values())


def test_a_layer_is_saved_with_it(tmp_path: Path, rng: np.random.Generator) -> None:
    layer, x = dropping("GRU", "layer", rng), rng.standard_normal((STEPS, BATCH, 4))
    pn.save(layer, tmp_path / "m.safetensors")
    pn.export(layer.to(dtype="float32"), tmp_path / "m.onnx")
    for name, dtype in (("m.safetensors", "float64"), ("m.onnx", "float32")):
        loaded: Any = pn.load(tmp_path / name, dtype="float64")
        assert (loaded.dropout, loaded.recurrent_dropout, loaded.variant.zoneout) == (0.4, 0.25, 0.3)
        np.testing.assert_allclose(
            loaded(x, training=True, rng=1)[0], layer(x, training=True, rng=1)[0], **relative(dtype, RECURRENT), err_msg=name
        )
    assert "dropout" not in pn.GRU(2, 3).config


@pytest.mark.parametrize("norm", [None, "layer", "batch"], ids=str)
@pytest.mark.parametrize("cell", LAYERS)
def test_a_training_step_takes_what_is_drawn(cell: str, norm: Any, tmp_path: Path, rng: np.random.Generator) -> None:
    import onnxruntime

    layer = dropping(cell, norm, rng, bidirectional=True).to(dtype="float32")
    model = pn.Sequential(layer, pn.Linear(6, 3, rng=0))
    pn.export_training_step(model, pn.softmax_cross_entropy, pn.SGD(0.1), tmp_path / "m.onnx", lengths=True)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    x, target = rng.standard_normal((STEPS, BATCH, 4)).astype("float32"), rng.integers(0, 3, (STEPS, BATCH))
    drawn = {name: rng.random(shape, dtype="float32") for name, shape in model.random_shapes(STEPS, BATCH).items()}
    feed = {"x": x, "target": target, "lengths": LENGTHS, **{f"random.{name}": a for name, a in drawn.items()}}
    found = dict(zip([o.name for o in session.get_outputs()], session.run(None, feed), strict=True))
    y, _, pullback = model.vjp(x, lengths=LENGTHS, training=True, rng=drawn)
    loss, back = pn.vjp(pn.softmax_cross_entropy, y, target)
    np.testing.assert_allclose(found["loss"], loss, rtol=1e-5)
    for name, gradient in pullback(back(np.float32(1.0))[0])[2].items():
        expected = model.params[name] - np.float32(0.1) * gradient
        np.testing.assert_allclose(found[f"next.{name}"], expected, **relative("float32", RECURRENT), err_msg=name)


# -- JAX and torch -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.peers
@pytest.mark.parametrize("cell", LAYERS)
def test_a_key_of_jax_inside_jit_and_grad(cell: str, rng: np.random.Generator) -> None:
    import jax

    layer = dropping(cell, "layer", rng, bidirectional=True).to(xp="jax")
    x = jax.numpy.asarray(rng.standard_normal((STEPS, BATCH, 4)))

    def loss(params: Any, key: Any) -> Any:
        return jax.numpy.sum(jax.numpy.sin(layer.apply(params, {}, x, training=True, rng=key)[0]))

    step = jax.jit(jax.value_and_grad(loss))
    values = [float(step(layer.params, jax.random.key(k))[0]) for k in (0, 0, 1)]
    assert values[0] == values[1] != values[2]
    y, _, pullback = layer.vjp(x, training=True, rng=jax.random.key(0))
    np.testing.assert_allclose(values[0], float(jax.numpy.sum(jax.numpy.sin(y))), rtol=1e-9)
    found = step(layer.params, jax.random.PRNGKey(0))[1]
    for name, gradient in pullback(jax.numpy.cos(y))[2].items():
        np.testing.assert_allclose(found[name], gradient, rtol=1e-9, atol=1e-9, err_msg=name)
    drawn = {name: jax.numpy.asarray(a) for name, a in uniform(layer, rng).items()}
    y = layer(x, training=True, rng=drawn)[0]
    np.testing.assert_allclose(float(step(layer.params, drawn)[0]), float(jax.numpy.sum(jax.numpy.sin(y))), rtol=1e-9)
    with pytest.raises(pn.UnsupportedError, match=r"`rng` is 0 inside a transformation of jax .*a key of jax\.random"):
        jax.jit(lambda params: loss(params, 0))(layer.params)
    seeded = [float(jax.jit(loss)(layer.params, seed)) for seed in (4, 4, 5)]
    assert seeded[0] == seeded[1] != seeded[2]
    with pytest.raises(pn.UnsupportedError, match=r"`rng` is an array float64\[3\] of JAX; expected a key"):
        layer(x, training=True, rng=jax.numpy.zeros(3))


@pytest.mark.peers
def test_generators_of_torch(rng: np.random.Generator) -> None:
    import torch

    layer = dropping("LSTM", None, rng).to(xp="torch")
    x = torch.asarray(rng.standard_normal((STEPS, BATCH, 4)))
    a, b, c = (layer(x, training=True, rng=torch.Generator().manual_seed(seed))[0] for seed in (0, 0, 1))
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not torch.equal(a, c)
    with pytest.raises(pn.UnsupportedError, match="`rng"):
        layer(x, training=True, rng={name: np.asarray(a) for name, a in uniform(layer, rng).items()})


TORCH: list[tuple[str, dict[str, Any]]] = [
    *((kind, {"bidirectional": both, "batch_first": both}) for kind in ("LSTM", "GRU", "RNN") for both in (False, True)),
    ("LSTM", {"proj_size": 3, "bidirectional": True}),
    ("RNN", {"nonlinearity": "relu"}),
]


@pytest.mark.peers
@pytest.mark.parametrize(("kind", "more"), TORCH, ids=str)
def test_a_swapped_module_drops_what_torch_drops(kind: str, more: dict[str, Any]) -> None:
    """The same seed gives the same values and gradients, and inference drops nothing."""
    import torch

    torch.manual_seed(2)
    theirs = getattr(torch.nn, kind)(4, 5, 3, dropout=0.4, dtype=torch.float64, **more)
    model = torch.nn.ModuleList([theirs])
    pn.replace_modules(model, {torch.nn.RNNBase: "torch"})
    x = torch.randn(6, 6, 4, dtype=torch.float64)
    found = []
    for module in (theirs, model[0]):
        torch.manual_seed(3)
        y = module(x)[0]
        y.sin().sum().backward()
        found.append([y, *(p.grad for _, p in sorted(module.named_parameters()))])
        module.eval()
        found[-1].append(module(x)[0])
        module.train()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(model[0](x)[0], model[0](x)[0])
    assert model[0].to_layer().dropout == 0.4


@pytest.mark.peers
@pytest.mark.parametrize("cell", LAYERS)
def test_every_way_to_drop_by_the_generator_of_torch(cell: str, rng: np.random.Generator) -> None:
    import torch

    layer = pn.Sequential(dropping(cell, "layer", rng), pn.Linear(3, 2, dtype="float64", rng=0))
    module, x = pn.torch_module(layer), torch.asarray(rng.standard_normal((STEPS, BATCH, 4)))
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        y = module(x)[0]
        y.sin().sum().backward()
        found.append((y.detach(), [p.grad for p in module.parameters()]))
        module.zero_grad()
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert not torch.allclose(found[0][0], found[2][0])
    torch.manual_seed(0)
    drawn = module._drawn(x)
    of_torch = layer.to(xp="torch")
    torch.testing.assert_close(of_torch(x, training=True, rng=drawn)[0], found[0][0])
    each = torch.func.vmap(lambda a: module(a)[0], randomness="different")(x.expand(2, *x.shape))
    assert not torch.allclose(each[0], each[1])
    torch.testing.assert_close(module.eval()(x)[0], of_torch(x)[0])


@pytest.mark.peers
def test_torch_compile_draws_anew(rng: np.random.Generator) -> None:
    import torch

    variant = pn.Variant("", biases=("bias_ih", "bias_hh"), zoneout=0.3)
    layer = random_recurrent("GRU", variant, rng, num_layers=2, dropout=0.4, recurrent_dropout=0.25)
    module, x = pn.torch_module(layer), torch.asarray(rng.standard_normal((2, BATCH, 4)))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert not torch.allclose(compiled(x)[0], compiled(x)[0])
    y = compiled(x)[0]
    y.sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    of_torch = layer.to(xp="torch")
    with pytest.raises(Exception, match="`rng` is 0 inside a transformation of torch"):
        torch.compile(lambda a: of_torch(a, training=True, rng=0)[0], backend="eager")(x)


@pytest.mark.peers
@pytest.mark.parametrize("as_number", [False, True])
def test_dropout_of_which_weights_do_not_say_where_it_is(as_number: bool) -> None:
    """A module of somebody that drops values is read with a note, and is not swapped without a word; told where, it drops the same."""
    import torch

    from tests.torch_cells import StackedLSTM

    class Dropping(StackedLSTM):
        """fastrnns' StackedLSTMWithDropout."""

        def __init__(self) -> None:
            super().__init__(4, 8)
            self.drop: Any = None if as_number else torch.nn.Dropout(0.4)
            self.dropout = 0.4

        def forward(self, x: Any, states: Any) -> Any:
            found = []
            for k, (layer, state) in enumerate(zip(self.layers, states, strict=True)):
                x, after = layer(x, state)
                found.append(after)
                if k == 0:
                    x = torch.nn.functional.dropout(x, 0.4, self.training)
            return x, found

    torch.manual_seed(1)
    theirs = Dropping()
    model = torch.nn.ModuleList([theirs])
    with pytest.raises(pn.UnsupportedError, match=r"'0' has dropout=0\.4 of .*pass dropout=… for what is dropped between layers"):
        pn.replace_modules(model, {Dropping: "torch-fastrnns"})
    layer: Any = pn.import_checkpoint(theirs, "torch-fastrnns")
    assert layer.dropout == 0
    assert "dropout=0.4 of " in layer.provenance
    pn.replace_modules(model, {Dropping: "torch-fastrnns"}, dropout=0.4)
    x, states = torch.randn(5, 2, 4), [(torch.randn(2, 8), torch.randn(2, 8)) for _ in range(2)]
    found = []
    for module in (theirs, model[0]):
        torch.manual_seed(0)
        found.append(module(x, states)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.peers
@pytest.mark.parametrize("order", [[5, 4, 2], [2, 5, 4], [3, 3, 3]], ids=str)
@pytest.mark.parametrize(("kind", "more"), TORCH, ids=str)
def test_a_packed_sequence_drops_what_torch_drops(kind: str, more: dict[str, Any], order: list[int]) -> None:
    """torch draws for the values that there are, in the order in which they are packed."""
    import torch

    torch.manual_seed(2)
    theirs = getattr(torch.nn, kind)(4, 5, 3, dropout=0.4, dtype=torch.float64, **more)
    model = torch.nn.ModuleList([theirs])
    pn.replace_modules(model, {torch.nn.RNNBase: "torch"})
    x, found = torch.randn(3, 5, 4, dtype=torch.float64), []
    for module in (theirs, model[0], pn.torch_module(model[0].to_layer())):
        torch.manual_seed(3)
        given = (x if theirs.batch_first else x.transpose(0, 1)).clone().requires_grad_()
        y = module(torch.nn.utils.rnn.pack_padded_sequence(given, order, theirs.batch_first, enforce_sorted=False))[0].data
        found.append([y, *torch.autograd.grad(y.sin().sum(), [given, *(p for _, p in sorted(module.named_parameters()))])])
    for a, *others in zip(*found, strict=True):
        for b in others:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.peers
@pytest.mark.parametrize("way", [{}, {"bidirectional": True}, {"direction": "reverse"}], ids=str)
@pytest.mark.parametrize("cell", LAYERS)
def test_a_packed_sequence_drops_as_the_layer_does_with_the_same_numbers(cell: str, way: dict[str, Any], rng: np.random.Generator) -> None:
    """Between layers, of h, and by zoneout; inside a model too."""
    import torch

    first = dropping(cell, "layer", rng, **way)
    for layer in (first, pn.Sequential(first, pn.Linear(3 * first.num_directions, 2, dtype="float64", rng=0))):
        module, x, lengths = pn.torch_module(layer), torch.asarray(rng.standard_normal((STEPS, BATCH, 4))), [2, 4, 3]
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        torch.manual_seed(0)
        y, _ = module(packed)
        torch.manual_seed(0)
        drawn = module._drawn(x, None, packed)
        assert {name: tuple(a.shape) for name, a in drawn.items()} == layer.random_shapes(STEPS, BATCH)
        expected = layer.to(xp="torch")(x, lengths=torch.asarray(lengths), training=True, rng=drawn)[0]
        torch.testing.assert_close(torch.nn.utils.rnn.pad_packed_sequence(y)[0], expected)


@pytest.mark.peers
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", LAYERS)
def test_steps_drop_the_same_of_h_as_the_whole_sequence(cell: str, batch_first: bool, rng: np.random.Generator) -> None:
    """Values and gradients, whole, in pieces and in steps; another draw is for other sequences, and none is made in evaluation."""
    import torch

    layer = random_recurrent(cell, "layer", rng, num_layers=2, recurrent_dropout=0.5, batch_first=batch_first)
    axis, x = int(batch_first), torch.asarray(rng.standard_normal((STEPS, BATCH, 4)))
    module, x = pn.torch_module(layer), x.transpose(0, 1) if batch_first else x
    torch.manual_seed(0)
    expected, last = module(x)
    torch.manual_seed(0)
    kept = module.kept(BATCH)
    hs, state = [], None
    for one in x.unbind(axis):
        h, state = module.step(one, state, kept)
        hs.append(h)
    front, middle = module(x.narrow(axis, 0, 1), kept=kept)
    end, after = module(x.narrow(axis, 1, STEPS - 1), middle, kept=kept)
    weight = torch.asarray(rng.standard_normal(tuple(expected.shape)))
    wanted = torch.autograd.grad(expected, list(module.parameters()), weight)
    for y, reached in ((torch.stack(hs, axis), state), (torch.cat([front, end], axis), after)):
        torch.testing.assert_close((y, reached), (expected, last))
        torch.testing.assert_close(torch.autograd.grad(y, list(module.parameters()), weight), wanted)
    assert not torch.allclose(module(x, kept=module.kept(BATCH))[0], expected)
    module.eval()
    assert module.kept(BATCH) == {}
    torch.testing.assert_close(module(x, kept=kept), module(x), rtol=0, atol=0)
    torch.testing.assert_close(module.step(x.select(axis, 0), None, module.kept(BATCH))[0], module(x)[0].select(axis, 0))


@pytest.mark.peers
@pytest.mark.parametrize("swapped", [False, True])
def test_a_step_that_would_draw_for_itself_is_refused(swapped: bool, rng: np.random.Generator) -> None:
    import torch

    layer = random_recurrent("LSTM", None, rng, recurrent_dropout=0.5)
    module: Any = pn.torch_module(layer)
    if swapped:
        model = torch.nn.ModuleList([torch.nn.LSTM(4, 3, dtype=torch.float64)])
        pn.replace_modules(model, {"0": "torch"}, recurrent_dropout=0.5)
        module = model[0]
    one = torch.asarray(rng.standard_normal((BATCH, 4)))
    with pytest.raises(pn.ArgumentError, match=r"`kept` is missing: LSTM has recurrent_dropout 0\.5.*kept = m\.kept\(batch\)"):
        module.step(one)
    _, state = module.step(one, None, module.kept(BATCH))
    with pytest.raises(pn.ArgumentError, match="`kept` is missing"):
        module.step(one, state)
    with pytest.raises(pn.ShapeError, match=r"`kept` has 'recurrent_dropout' \(1, 2, 3\); expected .*\(1, 3, 3\).*m\.kept\(3\)"):
        module.step(one, state, module.kept(2))
    (mask,) = module.kept(BATCH).values()
    with pytest.raises(pn.UnsupportedError, match=r"`kept` is a Tensor; expected what m\.kept\(batch\) gives"):
        module.step(one, state, mask)
    with pytest.raises(pn.DTypeError, match=r"`kept` has 'recurrent_dropout' of dtype torch\.int64"):
        module.step(one, state, {"recurrent_dropout": mask.long()})
    module.eval().step(one, state)


@pytest.mark.peers
def test_steps_draw_zoneout_and_dropout_between_layers_anew(rng: np.random.Generator) -> None:
    """As the layer does with the numbers of each step."""
    import torch

    layer = dropping("GRU", "layer", rng)
    module, of_torch = pn.torch_module(layer), layer.to(xp="torch")
    kept, state, other = module.kept(BATCH), None, None
    masks = []
    for step in range(STEPS):
        one = torch.asarray(rng.standard_normal((BATCH, 4)))
        torch.manual_seed(step)
        h, state = module.step(one, state, kept)
        torch.manual_seed(step)
        masks.append(module._drawn(one[None], kept))
        expected, other = of_torch(one[None], other, training=True, rng=masks[-1])
        torch.testing.assert_close((h, state), (expected[0], other))
    for name in ("dropout", "zoneout"):
        assert not torch.equal(masks[0][name], masks[1][name])
