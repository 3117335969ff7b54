"""Rates that change with the step, moments that go on, weights that decay."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from portnorm.arrays import without_kernels
from portnorm.optimizers import OPTIMIZERS
from portnorm_backends.cpu import memory
from tests.cases import IMPLEMENTATIONS, LAYERS, PRESETS
from tests.conftest import Library
from tests.tolerances import OPTIMIZER

STEPS = 5
GRADS = [np.random.default_rng(k).standard_normal((2, 3)) for k in range(STEPS)]


def schedule(step: Any) -> Any:
    """Of arithmetic alone, so that it takes arrays too."""
    return 0.1 * 0.5 ** (step // 2)


def run(make: Any, rates: Any, array: Any = np.asarray) -> list[Any]:
    """The parameters after each update, with a new optimizer for each where `rates` is a list."""
    params = {"weight": array(np.ones((2, 3)))}
    state, found = make(lr=0.1).init(params), []
    for k, g in enumerate(GRADS):
        optimizer = make(lr=rates[k]) if isinstance(rates, list) else make(lr=rates)
        params, state = optimizer.update(params, {"weight": array(g)}, state)
        found.append(params["weight"])
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_schedule_is_the_rate_of_each_step(name: str, library: Library) -> None:
    """As other optimizers with these rates on one state; the first step is 0."""
    make = OPTIMIZERS[name]
    expected = run(make, [schedule(k) for k in range(STEPS)])
    assert not np.allclose(expected[-1], run(make, 0.1)[-1])
    found = library.values(run(make, schedule, library.array))
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=OPTIMIZER[library.widest])


KERNELS = {
    **{name: make(lr=0.1) for name, make in OPTIMIZERS.items()},
    "momentum": pn.SGD(0.1, 0.9),
    "no decay": pn.AdamW(0.1, weight_decay=0.0),
}


@pytest.mark.parametrize("past", [False, True], ids=["", "past the caches"])
@pytest.mark.parametrize("size", [(1,), (3, 5), (1, 2**18 + 3)], ids=["one", "few", "for threads"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_gives_the_bits_of_the_definition(
    name: str, dtype: str, size: tuple[int, ...], past: bool, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """Also of gradients that are 0, tiny, or not finite; what is given stays as it was."""
    monkeypatch.setattr(memory, "CACHED", 0 if past else 2**62)
    optimizer, start = KERNELS[name], rng.standard_normal(size).astype(dtype)
    own, other = {"weight": start.copy()}, {"weight": start.copy()}
    state, expected = optimizer.init(own), optimizer.init(other)
    for scale in (1.0, 0.0, 1e-30, 1e4, np.inf):
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):
            g = (rng.standard_normal(size) * scale).astype(dtype)
            before, given = own["weight"].copy(), {k: dict(v) for k, v in state.items() if isinstance(v, dict)}
            kept = own
            own, state = optimizer.update(own, {"weight": g}, state)
            with without_kernels(np.ndarray):
                other, expected = optimizer.update(other, {"weight": g}, expected)
        np.testing.assert_array_equal(kept["weight"], before)
        np.testing.assert_array_equal(own["weight"], other["weight"])
        for group in given:
            np.testing.assert_array_equal(state[group]["weight"], expected[group]["weight"])
            assert not np.shares_memory(state[group]["weight"], given[group]["weight"])


@pytest.mark.parametrize("kind", ["columns", "every second", "reversed", "read-only", "unaligned", "without axes"])
@pytest.mark.parametrize("name", KERNELS)
def test_a_parameter_may_lie_in_memory_as_it_likes(name: str, kind: str, rng: np.random.Generator) -> None:
    values = np.array(1.5) if kind == "without axes" else rng.standard_normal((4, 6))
    g, optimizer = rng.standard_normal(values.shape), KERNELS[name]
    there = {
        "columns": lambda: np.asfortranarray(values),
        "every second": lambda: np.repeat(values, 2, axis=1)[:, ::2],
        "reversed": lambda: values[::-1].copy()[::-1],
        "read-only": lambda: np.frombuffer(values.tobytes()).reshape(4, 6),
        "unaligned": lambda: np.frombuffer(b"." + values.tobytes(), offset=1).reshape(4, 6),
        "without axes": lambda: values,
    }[kind]()
    found, _ = optimizer.update({"weight": there}, {"weight": g}, optimizer.init({"weight": there}))
    expected, _ = optimizer.update({"weight": values}, {"weight": g}, optimizer.init({"weight": values}))
    np.testing.assert_array_equal(found["weight"], expected["weight"])
    np.testing.assert_array_equal(there, values)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_schedule_of_python_sees_a_number(name: str) -> None:
    """`math` and `if` work where values can be looked at."""
    seen = []

    def cosine(step: int) -> float:
        seen.append(step)
        return 0.1 if step < 2 else 0.05 * (1 + math.cos(math.pi * step / STEPS))

    run(OPTIMIZERS[name], cosine)
    assert seen == [*range(STEPS)]
    assert all(type(step) is int for step in seen)


@pytest.mark.parametrize("rate", [-0.1, math.nan, math.inf, None, "1"], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_a_schedule_gives_is_checked(name: str, rate: Any) -> None:
    optimizer, params = OPTIMIZERS[name](lr=lambda step: rate if step == 1 else 0.1), {"weight": np.ones(2)}
    params, state = optimizer.update(params, params, optimizer.init(params))
    with pytest.raises(pn.UnsupportedError, match=r"`lr\(1\)` is .*; expected a number from 0.0"):
        optimizer.update(params, params, state)


@pytest.mark.peers
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_schedule_under_jit(name: str) -> None:
    import jax
    import jax.numpy as jnp

    optimizer, params = OPTIMIZERS[name](lr=schedule), {"weight": jnp.ones((2, 3))}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for k, g in enumerate(GRADS):
        params, state = update(params, {"weight": jnp.asarray(g, dtype=params["weight"].dtype)}, state)
        np.testing.assert_allclose(params["weight"], run(OPTIMIZERS[name], schedule)[k], rtol=2e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_schedule_in_a_graph_of_an_update(name: str) -> None:
    """Three updates, which `export_training_step` compares with eager ones."""
    model = pn.Sequential(pn.GRU(2, 3, norm="layer", return_sequences=False, rng=0), pn.Linear(3, 2, rng=0))
    report = pn.export_training_step(model, pn.softmax_cross_entropy, OPTIMIZERS[name](lr=schedule), None)
    assert [comparison.steps for comparison in report.trajectories] == [1, 2, 3]


# -- decay ---------------------------------------------------------------------------------------------------------------------------------


def decayed(optimizer: Any, params: dict[str, Any]) -> set[str]:
    """The parameters that move where every gradient is 0."""
    zero = {name: np.zeros_like(p) for name, p in params.items()}
    after, _ = optimizer.update(params, zero, optimizer.init(params))
    for name, p in params.items():
        moves = not np.array_equal(after[name], p)
        np.testing.assert_allclose(after[name], p * (1 - 0.1 * 0.5) if moves else p, rtol=1e-6)
    return {name for name, p in params.items() if not np.array_equal(after[name], p)}


@pytest.mark.parametrize(("cell", "norm"), PRESETS + IMPLEMENTATIONS)
def test_matrices_decay_and_neither_biases_nor_gains(cell: str, norm: str | None) -> None:
    layer = LAYERS[cell](3, 4, norm=norm, num_layers=2, bidirectional=True, learned_state=True, t_max=3, rng=0)
    model = pn.Sequential(pn.Embedding(5, 3, rng=0), layer, pn.LayerNorm(8), pn.Linear(8, 2, rng=0))
    params = {name: p + 0.5 for name, p in model.parameters().items()}
    found = decayed(pn.AdamW(0.1, weight_decay=0.5), params)
    weights = {name for name in params if ".weight_" in name and not name.endswith(".v")}
    assert found == weights | {name for name in params if ".peephole" in name} | {"0.weight", "3.weight"}
    assert len(weights) == 8


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        (["*weight_hh*"], {"weight_hh_l0"}),
        (("*",), {"weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"}),
        ([], set()),
        (lambda name, p: name == "bias_ih_l0" and p.shape == (12,), {"bias_ih_l0"}),
    ],
    ids=["a pattern", "all", "none", "a function"],
)
def test_who_decays_may_be_chosen(chosen: Any, names: set[str]) -> None:
    params = {name: p + 0.5 for name, p in pn.GRU(3, 4, rng=0).parameters().items()}
    assert decayed(pn.AdamW(0.1, weight_decay=0.5, decayed=chosen), params) == names


def test_a_decay_that_fits_nothing_is_named() -> None:
    params = pn.GRU(3, 4, rng=0).parameters()
    with pytest.raises(pn.UnsupportedError, match=r"`decayed` has '\*wieght\*', which fits none of the parameters weight_ih_l0"):
        pn.AdamW(decayed=["*wieght*"]).init(params)
    for wrong in ("*", None, 3, [3]):
        with pytest.raises(pn.UnsupportedError, match=r"`decayed` is .*; expected patterns of names"):
            pn.AdamW(decayed=wrong)  # type: ignore[arg-type]
    for wrong in (-0.1, math.nan, None, True):
        with pytest.raises(pn.UnsupportedError, match="`weight_decay`"):
            pn.AdamW(weight_decay=wrong)  # type: ignore[arg-type]


@pytest.mark.peers
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_that_of_torch_and_of_optax(decay: float, library: Library) -> None:
    import optax
    import torch

    theirs = torch.nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
    of_torch = torch.optim.AdamW([theirs], lr=0.1, weight_decay=decay)
    mine, params = pn.AdamW(lr=0.1, weight_decay=decay), {"weight": library.array(np.ones((2, 3)))}
    of_optax, other = optax.adamw(0.1, weight_decay=decay), np.ones((2, 3))
    state, optax_state = mine.init(params), of_optax.init(other)
    for g in GRADS:
        theirs.grad = torch.tensor(g)
        of_torch.step()
        changes, optax_state = of_optax.update(g, optax_state, other)
        other = other + changes
        params, state = mine.update(params, {"weight": library.array(g)}, state)
        found = library.values([params["weight"]])[0]
        np.testing.assert_allclose(found, theirs.detach().numpy(), rtol=OPTIMIZER[library.widest])
        np.testing.assert_allclose(found, other, rtol=1e-5)


def test_a_decay_follows_the_schedule() -> None:
    params = {"weight": np.ones((1, 1))}
    adamw = pn.AdamW(lr=lambda step: 0.1 / (step + 1), weight_decay=0.5)
    state = adamw.init(params)
    for _ in range(2):
        params, state = adamw.update(params, {"weight": np.zeros((1, 1))}, state)
    np.testing.assert_allclose(params["weight"], (1 - 0.1 * 0.5) * (1 - 0.05 * 0.5), rtol=1e-12)


def test_moments_go_on_where_a_rate_is_replaced() -> None:
    params = {"weight": np.ones((2, 3))}
    adam = pn.Adam(0.1)
    _, state = adam.update(params, {"weight": GRADS[0]}, adam.init(params))
    slower, _ = dataclasses.replace(adam, lr=0.05).update(params, {"weight": GRADS[1]}, state)
    same, _ = adam.update(params, {"weight": GRADS[1]}, state)
    np.testing.assert_allclose(params["weight"] - slower["weight"], 0.5 * (params["weight"] - same["weight"]), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [(1,), (3, 5), (1, 2**18 + 3)], ids=["one", "few", "for threads"])
@pytest.mark.parametrize("name", KERNELS)
def test_an_update_in_place_gives_the_same_bits(name: str, size: tuple[int, ...], dtype: str, rng: np.random.Generator) -> None:
    optimizer = KERNELS[name]
    params = {n: rng.standard_normal(size).astype(dtype) for n in ("weight", "other.weight")}
    own = {n: p.copy() for n, p in params.items()}
    state, changing = optimizer.init(params), optimizer.init(own)
    for _ in range(3):
        grads = {n: rng.standard_normal(size).astype(dtype) for n in params}
        params, state = optimizer.update(params, grads, state)
        given, there = dict(own), {n: dict(a) for n, a in changing.items() if isinstance(a, dict)}
        result, after = optimizer.update(own, grads, changing, in_place=True)
        assert after is changing
        assert all(result[n] is given[n] for n in given)
        assert all(changing[n][m] is there[n][m] for n in there for m in there[n])
        assert int(changing["steps"]) == int(state["steps"])
        for n in params:
            np.testing.assert_array_equal(own[n], params[n])
            for group in there:
                np.testing.assert_array_equal(changing[group][n], state[group][n])


@pytest.mark.parametrize("name", KERNELS)
def test_arrays_of_a_library_change_in_place_or_are_refused(name: str, library: Library) -> None:
    optimizer, grads = KERNELS[name], {"weight": library.array(GRADS[0])}
    params = {"weight": library.array(np.ones((2, 3)))}
    state = optimizer.init(params)
    expected = library.values([optimizer.update(params, grads, state)[0]["weight"]])[0]
    if library.name in ("jax", "dask", "paddle", "numpy-readonly"):
        with pytest.raises(pn.UnsupportedError, match="cannot be written to; leave `in_place` out"):
            optimizer.update(params, grads, state, in_place=True)
        expected = np.ones((2, 3))
    else:
        optimizer.update(params, grads, state, in_place=True)
    np.testing.assert_array_equal(library.values([params["weight"]])[0], expected)


def _adam(params: dict[str, Any], grads: dict[str, Any] | None = None, state: Any = None) -> Any:
    adam = pn.Adam()
    state = adam.init(params) if state is None else state
    return adam.update(params, {n: np.ones_like(p) for n, p in params.items()} if grads is None else grads, state, in_place=True)


def test_what_an_update_in_place_would_spoil_is_refused() -> None:
    whole = np.ones((4, 6))
    locked = whole.copy()
    locked.flags.writeable = False
    mixed = pn.Adam().init({"a": whole})
    for call, message in (
        (lambda: _adam({"a": locked}), r"params\['a'\]` cannot be written to"),
        (lambda: _adam({"a": whole, "b": whole}), r"lies in the memory of"),
        (lambda: _adam({"a": whole[:3], "b": whole[2:]}), r"params\['b'\]` lies in the memory of `params\['a'\]"),
        (lambda: _adam({"a": whole[1:]}, {"a": whole[:-1]}), r"lies in the memory of"),
        (lambda: _adam({"a": np.broadcast_to(np.ones(3), (2, 3))}), "cannot be written to"),
        (lambda: _adam({"b": whole, "a": np.lib.stride_tricks.as_strided(np.ones(3), (2, 3), (0, 8))}), "has one place for several values"),
        (lambda: _adam({"a": whole}, None, {**mixed, "square": {"a": mixed["mean"]["a"]}}), r"state\['square'\]\['a'\]` lies in"),
        (lambda: _adam({"a": whole}, {"a": mixed["mean"]["a"]}, mixed), "lies in the memory of"),
    ):
        with pytest.raises(pn.UnsupportedError, match=message):
            call()
        np.testing.assert_array_equal(whole, np.ones((4, 6)))
    with pytest.raises(pn.UnsupportedError, match="`in_place` is 'yes'"):
        pn.SGD().update({"a": whole}, {"a": whole}, pn.SGD().init({"a": whole}), in_place="yes")  # type: ignore[arg-type]
    _adam({"a": whole[:2], "b": whole[2:]}, {"a": np.ones((2, 6)), "b": np.ones((2, 6))})
    _adam({"a": whole[:, ::-1]}, {"a": np.ones((4, 6))})


def test_a_run_is_updated_in_place(rng: np.random.Generator) -> None:
    runs = [pn.Training(pn.Sequential(pn.LSTM(3, 4, norm="layer", rng=0), pn.Linear(4, 2, rng=1)), pn.AdamW(0.1)) for _ in range(2)]
    x, dy = rng.standard_normal((5, 2, 3), np.float32), rng.standard_normal((5, 2, 2), np.float32)
    held = dict(runs[0].model.parameters())
    for _ in range(3):
        for run, how in zip(runs, ({"in_place": True}, {}), strict=True):
            _, _, pullback = run.model.vjp(x, training=True)
            run.update(pullback(dy)[2], **how)
    for name, p in runs[0].model.parameters().items():
        assert p is held[name]
        np.testing.assert_array_equal(p, runs[1].model.parameters()[name])
    assert runs[0].step == int(runs[0].state["steps"]) == 3  # type: ignore[index]


def test_one_gradient_of_two_parameters_may_be_one_array() -> None:
    params, g = {"a": np.ones(3), "b": np.ones(3)}, np.ones(3)
    _adam(params, {"a": g, "b": g})
    np.testing.assert_allclose(params["a"], params["b"])
    np.testing.assert_array_equal(g, np.ones(3))
