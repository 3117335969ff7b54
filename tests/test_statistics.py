"""Running statistics: one row per step up to t_max, moving averages, population statistics by a full pass."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from portnorm.arrays import to_numpy
from portnorm.statistics import moved
from tests.cases import random_lstm
from tests.conftest import Library
from tests.tolerances import STATISTICS_ULP, relative

CLOSE = relative("float64")


def fresh(rng: np.random.Generator, **keywords: Any) -> pn.LSTM:
    return pn.LSTM(4, 3, norm="batch", dtype="float64", t_max=4, rng=rng, **keywords)


def input_statistics(layer: pn.LSTM, x: Any) -> tuple[Any, Any]:
    """Mean and biased variance (time, gates) of the input term over the batch."""
    u = x @ layer.params["weight_ih_l0"].T
    return u.mean(axis=1), u.var(axis=1)


def test_moving_average_per_step(rng: np.random.Generator) -> None:
    layer, x = fresh(rng, momentum=0.25), 2.0 + rng.standard_normal((3, 8, 4))
    mean, var = input_statistics(layer, x)
    layer(x, training=True)
    np.testing.assert_allclose(layer.buffers["norm_ih_l0.running_mean"][:3], 0.25 * mean, **CLOSE)
    np.testing.assert_allclose(layer.buffers["norm_ih_l0.running_var"][:3], 0.75 + 0.25 * var, **CLOSE)
    np.testing.assert_array_equal(layer.buffers["norm_ih_l0.running_var"][3:], 1.0)
    np.testing.assert_array_equal(layer.buffers["num_batches_tracked_l0"], [1, 1, 1, 0])


def test_steps_after_t_max_use_the_last_statistics(rng: np.random.Generator) -> None:
    layer, x = random_lstm("batch", rng), rng.standard_normal((6, 5, 4))
    y, _ = layer(x)
    repeated = layer.copy()
    repeated.t_max = 6
    repeated.assign(
        layer.params,
        {n: np.concatenate([b, b[-1:], b[-1:]]) for n, b in layer.buffers.items()},
    )
    np.testing.assert_allclose(repeated(x)[0], y, **CLOSE)


def test_an_attribute_that_is_changed_counts_from_then_on(rng: np.random.Generator) -> None:
    """What a layer makes of its attributes once is made again."""
    layer, x = random_lstm("layer", rng), rng.standard_normal((4, 3, 4))
    before, _ = layer(x)
    variant = dataclasses.replace(layer.variant, eps=0.5)
    layer.variant = variant
    found, _ = layer(x)
    other = pn.LSTM(4, 3, norm=variant, dtype="float64")
    other.assign(layer.params)
    np.testing.assert_array_equal(found, other(x)[0])
    assert np.max(np.abs(found - before)) > 0.01


@pytest.mark.parametrize("momentum", [0.25, None])
@pytest.mark.parametrize("t_max", [1, 3])
@pytest.mark.parametrize("lengths", [None, [5, 4, 2, 1]], ids=["whole", "ragged"])
def test_steps_after_t_max_update_the_last_row_one_after_the_other(
    t_max: int, momentum: float | None, lengths: Any, rng: np.random.Generator
) -> None:
    """As one moving average that is told of every step with a variance; in chunks too. t_max=1 is one set of statistics for all steps."""
    layer, chunked = (pn.LSTM(4, 3, norm="batch", dtype="float64", t_max=t_max, momentum=momentum, rng=0) for _ in range(2))
    x, n = rng.standard_normal((6, 4, 4)), np.asarray([6] * 4 if lengths is None else lengths)
    layer(x, lengths=lengths, training=True)
    _, state = chunked(x[:2], lengths=None if lengths is None else np.minimum(n, 2), training=True)
    chunked(x[2:], state, lengths=None if lengths is None else np.maximum(n - 2, 0), training=True)
    expected, seen = [np.zeros((t_max, 12)), np.ones((t_max, 12))], np.zeros(t_max)
    for t in range(np.sort(n)[-2]):
        u, row = x[t, n > t] @ layer.params["weight_ih_l0"].T, min(t, t_max - 1)
        seen[row] += 1
        for table, batch in zip(expected, (u.mean(0), u.var(0)), strict=True):
            table[row] += (1 / seen[row] if momentum is None else momentum) * (batch - table[row])
    for each in (layer, chunked):
        np.testing.assert_array_equal(each.buffers["num_batches_tracked_l0"], seen)
        for name, table in zip(("mean", "var"), expected, strict=True):
            np.testing.assert_allclose(each.buffers[f"norm_ih_l0.running_{name}"], table, **CLOSE)


def test_steps_without_statistics_use_the_last_that_have_some(rng: np.random.Generator) -> None:
    """Trained on three steps with room for four: the fourth row was never seen and is not used."""
    layer = fresh(rng)
    layer(rng.standard_normal((3, 6, 4)), training=True)
    x = rng.standard_normal((5, 2, 4))
    y, _ = layer(x)
    layer.buffers["norm_hh_l0.running_mean"][3] = 1e6
    np.testing.assert_array_equal(layer(x)[0], y)


@pytest.mark.parametrize("ragged", [False, True])
def test_population_is_the_average_over_minibatches_by_their_sequences(ragged: bool, rng: np.random.Generator) -> None:
    layer = fresh(rng)
    xs = [1.0 + rng.standard_normal((4, size, 4)) for size in (5, 7, 6)]
    lengths = [np.array([4, 4, 2, 2, 1]), np.full(7, 3), np.array([3, 2, 2, 2, 1, 1])] if ragged else [None] * 3
    layer(xs[0] * 10, training=True)  # statistics that must be forgotten
    layer.estimate_population(zip(xs, lengths, strict=True) if ragged else xs)
    assert layer.momentum == 0.1
    for t in range(4):
        rows = [x[t, (n > t) if n is not None else slice(None)] @ layer.params["weight_ih_l0"].T for x, n in zip(xs, lengths, strict=True)]
        rows = [r for r in rows if len(r) > 1]
        weights = [len(r) for r in rows]
        mean, var = (np.average([f(r, axis=0) for r in rows], axis=0, weights=weights) for f in (np.mean, np.var))
        np.testing.assert_allclose(layer.buffers["norm_ih_l0.running_mean"][t], mean, **CLOSE)
        np.testing.assert_allclose(layer.buffers["norm_ih_l0.running_var"][t], var, **CLOSE)
        assert layer.buffers["num_batches_tracked_l0"][t] == len(rows)


def test_population_of_one_batch_gives_what_training_gave(rng: np.random.Generator) -> None:
    layer, x = fresh(rng, bidirectional=True, num_layers=2), rng.standard_normal((4, 9, 4))
    y, _ = layer(x, training=True)
    layer.estimate_population([x])
    np.testing.assert_allclose(layer(x)[0], y, **CLOSE)


def test_chunked_training_updates_the_rows_that_it_saw(rng: np.random.Generator) -> None:
    whole, chunked = fresh(np.random.default_rng(1)), fresh(np.random.default_rng(1))
    x = rng.standard_normal((6, 5, 4))
    whole(x, training=True)
    _, state = chunked(x[:2], training=True)
    chunked(x[2:], state, training=True)
    for name, buffer in whole.buffers.items():
        np.testing.assert_allclose(chunked.buffers[name], buffer, **CLOSE)


def test_a_single_sequence_that_is_left_yields_the_bias(rng: np.random.Generator) -> None:
    """Its variance is 0: finite in both directions, the input term becomes the shared bias, and the statistics of the step stay."""
    layer = fresh(rng)
    x = rng.standard_normal((4, 3, 4))
    y, _, pullback = layer.vjp(x, lengths=[4, 2, 2], training=True)
    dx, _, grads = pullback(rng.standard_normal(y.shape))
    assert np.all(np.isfinite(y))
    assert np.all(np.isfinite(dx))
    assert all(np.all(np.isfinite(g)) for g in grads.values())
    np.testing.assert_array_equal(layer.buffers["norm_ih_l0.running_var"][2:], 1.0)
    np.testing.assert_array_equal(layer.buffers["num_batches_tracked_l0"], [1, 1, 0, 0])


def test_inference_changes_no_statistics(rng: np.random.Generator) -> None:
    layer = random_lstm("batch", rng)
    before = {n: b.copy() for n, b in layer.buffers.items()}
    layer(rng.standard_normal((3, 2, 4)))
    assert all(np.array_equal(layer.buffers[n], b) for n, b in before.items())


def test_apply_is_pure(rng: np.random.Generator) -> None:
    layer = fresh(rng)
    params, buffers = layer.parameters(), dict(layer.buffers)
    before = {n: a.copy() for n, a in {**params, **buffers}.items()}
    _, _, new = layer.apply(params, buffers, rng.standard_normal((3, 4, 4)), training=True)
    assert all(np.array_equal(a, before[n]) for n, a in {**params, **buffers}.items())
    assert not np.array_equal(new["norm_c_l0.running_var"], buffers["norm_c_l0.running_var"])


@pytest.mark.parametrize("unbiased", [False, True])
def test_batch_norm_layer_with_lengths(unbiased: bool, rng: np.random.Generator) -> None:
    layer = pn.BatchNorm(4, channel_axis=-1, momentum=1.0, unbiased=unbiased, dtype="float64")
    x, lengths = rng.standard_normal((5, 3, 4)), [5, 1, 2]
    frames = np.concatenate([x[:n, row] for row, n in enumerate(lengths)])
    y = layer(x, lengths=lengths, training=True)
    np.testing.assert_allclose(y[:2, 2], pn.batch_norm(frames)[-2:], **CLOSE)
    np.testing.assert_allclose(layer.buffers["running_mean"], frames.mean(axis=0), **CLOSE)
    np.testing.assert_allclose(layer.buffers["running_var"], frames.var(axis=0, ddof=int(unbiased)), **CLOSE)


def test_noise_on_the_first_state_keeps_variances_away_from_zero(rng: np.random.Generator) -> None:
    """Cooijmans et al. 2016: with equal inputs at the first steps the gradient explodes, unless h0 has noise."""
    layer = pn.LSTM(1, 8, norm="batch", dtype="float64", rng=0)
    x = np.concatenate([np.zeros((5, 16, 1)), rng.standard_normal((3, 16, 1))])
    norms = []
    for noise in (0.0, 0.1):
        layer.forget_statistics()
        _, _, pullback = layer.vjp(x, layer.initial_state(16, noise=noise, rng=1), training=True)
        norms.append(float(np.linalg.norm(pullback(rng.standard_normal((8, 16, 8)))[1][1])))
        smallest = layer.buffers["norm_hh_l0.running_var"][:5].min()
        assert (smallest < 1e-12) == (noise == 0.0)
    assert all(np.isfinite(norms))


@pytest.mark.parametrize("both", [False, True])
def test_sequence_wise_statistics_are_over_all_unpadded_frames(both: bool, rng: np.random.Generator) -> None:
    """Laurent et al. 2016: mean and variance over batch and time, with as many values as there are frames."""
    layer = pn.LSTM(4, 3, norm="batch-input", dtype="float64", momentum=1.0, bidirectional=both, rng=rng)
    x, lengths = rng.standard_normal((5, 3, 4)), [5, 1, 2]
    layer(x, lengths=lengths, training=True)
    frames = np.concatenate([x[:n, row] for row, n in enumerate(lengths)])
    for suffix in ("_l0", "_l0_reverse")[: 1 + both]:
        u = frames @ layer.params[f"weight_ih{suffix}"].T
        np.testing.assert_allclose(layer.buffers[f"norm_ih{suffix}.running_mean"], u.mean(axis=0), **CLOSE)
        np.testing.assert_allclose(layer.buffers[f"norm_ih{suffix}.running_var"], u.var(axis=0), **CLOSE)
        assert layer.buffers[f"num_batches_tracked{suffix}"] == 1


def test_batch_input_is_batch_norm_before_a_plain_layer(rng: np.random.Generator) -> None:
    """One sequence is enough: its frames are a batch."""
    layer = pn.RNN(4, 3, norm="batch-input", dtype="float64", rng=rng)
    x = rng.standard_normal((6, 1, 4))
    y, _ = layer(x, training=True)
    u = pn.batch_norm(x[:, 0] @ layer.params["weight_ih_l0"].T, layer.params["norm_ih_l0.weight"], layer.params["bias_l0"])
    h = np.zeros(3)
    for t in range(6):
        h = np.tanh(u[t] + layer.params["weight_hh_l0"] @ h)
        np.testing.assert_allclose(y[t, 0], h, **CLOSE)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_in_which_nothing_counts_changes_nothing(momentum: float | None, rng: np.random.Generator) -> None:
    x = rng.standard_normal((5, 3, 4))
    norm = pn.BatchNorm(4, channel_axis=-1, momentum=momentum, dtype="float64")
    norm(x, training=True)
    for layer in (norm, fresh(rng, momentum=momentum), pn.LSTM(4, 3, norm="batch-input", momentum=momentum, dtype="float64")):
        layer(x, training=True)
        before = dict(layer.buffers)
        layer(x, lengths=[0, 0, 0], training=True)
        assert list(layer.buffers) == list(before)
        assert all(np.array_equal(layer.buffers[name], b) for name, b in before.items())


def test_statistics_of_late_steps_only_are_used_for_late_steps(rng: np.random.Generator) -> None:
    """Trained on steps 2 and 3 alone: what follows uses the row of step 3."""
    layer, x = fresh(rng, momentum=1.0), rng.standard_normal((2, 6, 4))
    state = layer.initial_state(6)
    layer(x, (*state[:2], np.asarray(2)), training=True)
    y, _ = layer(x[1:], (*state[:2], np.asarray(3)))
    beyond, _ = layer(x[1:], (*state[:2], np.asarray(9)))
    np.testing.assert_array_equal(beyond, y)
    layer.buffers["norm_ih_l0.running_mean"][1] = 1e6
    np.testing.assert_array_equal(layer(x[1:], (*state[:2], np.asarray(9)))[0], y)


def test_batch_renorm_against_its_paper(rng: np.random.Generator) -> None:
    """Ioffe 2017, algorithm 1, and its two limits."""
    x, gain, shift = 2.0 + rng.standard_normal((8, 3)), rng.uniform(0.5, 2.0, 3), rng.standard_normal(3)
    mean, var = rng.standard_normal(3), rng.uniform(0.5, 2.0, 3)
    std, own = np.sqrt(var), np.std(x, axis=0)
    r, d = np.clip(own / std, 1 / 1.2, 1.2), np.clip((x.mean(0) - mean) / std, -0.3, 0.3)
    expected = gain * ((x - x.mean(0)) / own * r + d) + shift
    bounds: Any = {"mean": mean, "var": var, "eps": 0.0}
    np.testing.assert_allclose(pn.batch_renorm(x, gain, shift, **bounds, r_max=1.2, d_max=0.3), expected, **CLOSE)
    np.testing.assert_allclose(
        pn.batch_renorm(x, gain, shift, **bounds, r_max=np.inf, d_max=np.inf), pn.batch_norm(x, gain, shift, **bounds), **CLOSE
    )
    np.testing.assert_allclose(
        pn.batch_renorm(x, gain, shift, **bounds, r_max=1.0, d_max=0.0), pn.batch_norm(x, gain, shift, eps=0.0), **CLOSE
    )
    # r and d are constants to the gradient: that of batch normalization with gain · r.
    dy = rng.standard_normal(x.shape)
    dx, dgain, dshift = pn.vjp(pn.batch_renorm, x, gain, shift, **bounds, r_max=1.2, d_max=0.3)[1](dy)
    plain = pn.vjp(pn.batch_norm, x, gain * r, shift, eps=0.0)[1](dy)
    np.testing.assert_allclose(dx, plain[0], **CLOSE)
    np.testing.assert_allclose(dgain, np.sum(dy * (expected - shift) / gain, axis=0), **CLOSE)
    np.testing.assert_allclose(dshift, np.sum(dy, axis=0), **CLOSE)
    with pytest.raises(pn.UnsupportedError, match=r"`r_max` is 0\.5"):
        pn.batch_renorm(x, **bounds, r_max=0.5)


def test_batch_renorm_layer(rng: np.random.Generator) -> None:
    layer, x = pn.BatchRenorm(3, dtype="float64", momentum=None), 2.0 + rng.standard_normal((8, 3))
    y, pullback = layer.vjp(x, training=True)
    np.testing.assert_allclose(layer.buffers["running_mean"], x.mean(0), **CLOSE)
    np.testing.assert_allclose(layer.buffers["running_var"], x.var(0), **CLOSE)
    assert set(pullback(y)[1]) == {"weight", "bias"}
    np.testing.assert_allclose(layer(x), (x - x.mean(0)) / np.sqrt(x.var(0) + np.float32(1e-5)), **CLOSE)
    np.testing.assert_allclose(layer(x, training=True), layer(x), **CLOSE)


@pytest.mark.parametrize("shape", [(3, 50), (3, 5, 4)])
def test_channels_may_come_first(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    """Each channel is then a row of memory, and still a channel with statistics."""
    x = (2.0 + rng.standard_normal(shape)).astype(np.float32)
    layer = pn.BatchNorm(3, channel_axis=0, momentum=1.0)
    y = layer(x, training=True)
    mean, var = x.reshape(3, -1).mean(axis=1), x.reshape(3, -1).var(axis=1, ddof=1)
    np.testing.assert_allclose(layer.buffers["running_mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(layer.buffers["running_var"], var, rtol=1e-5)
    np.testing.assert_allclose(y.reshape(3, -1).std(axis=1), 1.0, rtol=1e-4)


@pytest.mark.parametrize("before", [1e10, -1e10, 3.4e38])
def test_a_momentum_of_one_is_the_batch(before: float, library: Library, rng: np.random.Generator) -> None:
    """Whatever the statistics were: running + m · (batch − running) would cancel."""
    batch = 1e-3 * rng.standard_normal(4)
    running, own = (library.array(a, "float32") for a in (np.full(4, before), batch))
    one = library.array(np.ones(4), "float32")
    for part in (1.0, one):
        np.testing.assert_array_equal(library.values([moved(running, own, part)])[0], batch.astype(np.float32))
    for part in (0.0, 0 * one):
        np.testing.assert_array_equal(library.values([moved(running, own, part)])[0], np.float32(before))
    for part in (1e-3, 0.25, 0.5, 0.9):
        (found,) = library.values([moved(running / 1e10, own, part)])
        np.testing.assert_allclose(found, (1 - part) * (before / 1e10) + part * batch, rtol=2e-6, atol=1e-10)


@pytest.mark.parametrize("part", [0.001, 0.1, 0.7])
def test_a_moving_average_rests_where_the_batches_are(part: float) -> None:
    value = np.float32(np.pi) * np.ones(3, dtype=np.float32)
    running = 2 * value
    for _ in range(20_000 if part < 0.01 else 500):
        running = moved(running, value, part)
    np.testing.assert_allclose(running, value, rtol=1e-6 if part > 0.01 else 5e-5)


@pytest.mark.parametrize("norm", ["batch", "batch-input"])
def test_the_first_of_a_plain_average_is_exact(norm: str, library: Library, rng: np.random.Generator) -> None:
    """A variance of 10⁻⁸ after the 1 that the tables start from; with `momentum=1` after any number of batches."""
    x = (3.0 + 1e-4 * rng.standard_normal((1, 16, 3))).astype(np.float32)
    for momentum in (None, 1.0):
        layer = pn.BatchNorm(3, momentum=momentum, unbiased=False, xp=library.xp)
        lstm = pn.LSTM(3, 2, norm=norm, momentum=momentum, t_max=1, xp=library.xp, rng=0)
        if momentum is not None:
            layer(library.array(1e10 * x[0]), training=True)
            lstm(library.array(1e10 * x), training=True)
        layer(library.array(x[0]), training=True)
        lstm(library.array(x), training=True)
        u, weight = x[0].astype(np.float64), to_numpy(lstm.params["weight_ih_l0"]).astype(np.float64)
        np.testing.assert_allclose(to_numpy(layer.buffers["running_mean"]), u.mean(axis=0), rtol=2e-7)
        np.testing.assert_allclose(to_numpy(layer.buffers["running_var"]), u.var(axis=0), rtol=1e-5)
        found = to_numpy(lstm.buffers["norm_ih_l0.running_var"]).reshape(-1)
        np.testing.assert_allclose(found, (u @ weight.T).var(axis=0), rtol=2e-2)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_population_weighs_a_batch_by_its_values(ragged: bool, unbiased: bool, rng: np.random.Generator) -> None:
    """As the layer itself over all frames, if each had the statistics of its batch; a batch in which nothing counts weighs nothing."""
    layer = pn.Sequential(pn.Linear(3, 3, dtype="float64", rng=0), pn.BatchNorm(3, channel_axis=-1, unbiased=unbiased, dtype="float64"))
    xs = [rng.standard_normal((4, size, 3)) for size in (2, 7, 5, 3)]
    lengths = [[4, 1], [2, 4, 4, 3, 1, 0, 2], [1, 1, 4, 2, 2], [0, 0, 0]] if ragged else [[4] * x.shape[1] for x in xs]
    layer.estimate_population(zip(xs, map(np.array, lengths), strict=True) if ragged else xs)
    frames = [np.concatenate([x[:n, k] for k, n in enumerate(each)]) for x, each in zip(xs, lengths, strict=True)]
    frames = [f @ layer.params["0.weight"].T + layer.params["0.bias"] for f in frames if len(f)]
    counts = [len(f) for f in frames]
    mean = np.average([f.mean(axis=0) for f in frames], axis=0, weights=counts)
    var = np.average([f.var(axis=0, ddof=int(unbiased)) for f in frames], axis=0, weights=counts)
    np.testing.assert_allclose(layer.buffers["1.running_mean"], mean, **CLOSE)
    np.testing.assert_allclose(layer.buffers["1.running_var"], var, **CLOSE)
    assert set(layer.buffers) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert layer.buffers["1.num_batches_tracked"] == len(frames)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("t_max", [2, 4])
@pytest.mark.parametrize("norm", ["batch", "batch-input"])
def test_population_of_tables_weighs_by_live_sequences(norm: str, t_max: int, ragged: bool, rng: np.random.Generator) -> None:
    """Of each step, and of all steps together; the steps after `t_max` enter the last row with their own numbers."""
    layer = pn.GRU(4, 3, norm=norm, t_max=t_max, bidirectional=True, dtype="float64", rng=0)
    xs = [rng.standard_normal((4, size, 4)) for size in (3, 8)]
    lengths = [np.array([4, 4, 2]), np.array([3, 2, 2, 4, 4, 4, 3, 3])] if ragged else [np.full(x.shape[1], 4) for x in xs]
    layer.estimate_population(zip(xs, lengths, strict=True) if ragged else xs)
    for suffix in ("_l0", "_l0_reverse"):
        us: list[list[Any]] = [[] for _ in range(t_max if norm == "batch" else 1)]
        for x, each in zip(xs, lengths, strict=True):
            ordered = [x[:n, k][:: -1 if "reverse" in suffix else 1] @ layer.params[f"weight_ih{suffix}"].T for k, n in enumerate(each)]
            if norm == "batch-input":
                us[0].append(np.concatenate(ordered))
            else:
                for t in range(4):
                    us[min(t, t_max - 1)].append(np.stack([u[t] for u in ordered if len(u) > t]))
        for row, parts in enumerate(us):
            at = row if norm == "batch" else slice(None)
            weights = [len(p) for p in parts]
            for name, function in (("mean", np.mean), ("var", np.var)):
                expected = np.average([function(p, axis=0) for p in parts], axis=0, weights=weights)
                np.testing.assert_allclose(layer.buffers[f"norm_ih{suffix}.running_{name}"][at], expected, **CLOSE)


# -- how exact they are --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 5), (64, 6), (8, 4, 6, 7), (4096, 2)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_statistics_are_exact_at_every_mean(library: Library, dtype: str, shape: tuple[int, ...]) -> None:
    """Those that go to running averages, however large the mean is against the spread."""
    if dtype not in library.dtypes:
        return
    axes = tuple(a for a in range(len(shape)) if a != 1)
    for mean in (0.0, 1.0, 3.0, 10.0, 1e2, -1e3, 1e4, -1e6, 1e7):
        x = (mean + np.random.default_rng(int(abs(mean))).standard_normal(shape)).astype(dtype)
        first = x[tuple(slice(1) if a in axes else slice(None) for a in range(x.ndim))].astype(np.longdouble)
        beside = x.astype(np.longdouble) - first
        own = beside.mean(axis=axes, keepdims=True)
        exact = {"mean": (first + own).reshape(-1), "variance": ((beside - own) ** 2).mean(axis=axes)}
        layer = pn.BatchNorm(shape[1], momentum=1.0, unbiased=False, xp=library.support.module, dtype=dtype)
        layer(library.array(x, dtype), training=True)
        units = {"mean": np.maximum(np.abs(exact["mean"]), np.sqrt(exact["variance"])), "variance": exact["variance"]}
        for name, buffer in (("mean", "running_mean"), ("variance", "running_var")):
            off = np.abs(to_numpy(layer.buffers[buffer]).astype(np.longdouble) - exact[name]) / np.spacing(units[name].astype(dtype))
            assert np.max(off) <= STATISTICS_ULP[name], f"{name} at {mean}: {float(np.max(off))} ULP"
