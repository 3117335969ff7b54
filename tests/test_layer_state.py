"""What a layer holds: nothing is lost, nothing is kept that was not asked for, and what is saved is what computes."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from portnorm.layers.recurrent import Recurrent
from tests.cases import HEAVY_PRESETS, random_recurrent, random_state
from tests.conftest import Library
from tests.tolerances import relative

CLOSE = relative("float64")

LAYERS: dict[str, Callable[[], pn.Layer]] = {
    "LayerNorm": lambda: pn.LayerNorm(4, dtype="float64"),
    "RMSNorm": lambda: pn.RMSNorm(4, dtype="float64"),
    "BatchNorm": lambda: pn.BatchNorm(4, channel_axis=-1, dtype="float64"),
    "BatchRenorm": lambda: pn.BatchRenorm(4, channel_axis=-1, dtype="float64"),
    "InstanceNorm": lambda: pn.InstanceNorm(4, channel_axis=-1, affine=True, dtype="float64"),
    "GroupNorm": lambda: pn.GroupNorm(2, 4, channel_axis=-1, dtype="float64"),
    "Linear": lambda: pn.Linear(4, 4, dtype="float64", rng=0),
    "LSTM": lambda: pn.LSTM(4, 4, dtype="float64", rng=0),
    "BN-LSTM": lambda: pn.LSTM(4, 4, norm="batch", t_max=6, dtype="float64", rng=0),
    "BN-GRU, sequence-wise": lambda: pn.GRU(4, 4, norm="batch-input", dtype="float64", rng=0),
    "Sequential": lambda: pn.Sequential(
        pn.Linear(4, 4, dtype="float64", rng=0),
        pn.BatchNorm(4, channel_axis=-1, dtype="float64"),
        pn.LSTM(4, 4, norm="batch", t_max=6, dtype="float64", rng=0),
        pn.BatchNorm(4, channel_axis=-1, dtype="float64"),
    ),
}
WITH_STATISTICS = [name for name in LAYERS if LAYERS[name]().buffers]


def sequence(rng: np.random.Generator) -> Any:
    return 3.0 + rng.standard_normal((5, 3, 4))


def same(a: pn.Layer, b: pn.Layer) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# -- names and shapes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_assign_and_apply_are_as_strict_as_a_state_dict(name: str, rng: np.random.Generator) -> None:
    layer, x = LAYERS[name](), sequence(rng)
    params, buffers = layer.parameters(), dict(layer.buffers)
    first, before = next(iter(params)), layer.state_dict()
    lacking, more = {n: a for n, a in params.items() if n != first}, {**params, "nobody": np.ones(3)}
    wrong = {**params, first: np.ones((2, 7, 1))}
    narrow = {**params, first: params[first][:1, ...]}  # which would be broadcast
    pure: dict[str, Callable[[Any], Any]] = {
        "assign": layer.assign,
        "load_state_dict": lambda given: layer.load_state_dict({**given, **buffers} if isinstance(given, dict) else given),
        "apply": lambda given: layer.apply(given, buffers, x),
        "pure_vjp": lambda given: layer.pure_vjp(given, buffers, x),
    }
    for call in pure.values():
        for given in (lacking, more, wrong, narrow, {**params, first: None}, {**params, first: [1.0]}):
            with pytest.raises(pn.CheckpointError, match=f"{first}|nobody"):
                call(given)
        for none in (None, list(params)):
            with pytest.raises(pn.CheckpointError, match="expected a mapping of the names"):
                call(none)
    for given in (lacking, more):
        with pytest.raises(pn.CheckpointError, match=f"`params` does not fit .*({first}|nobody)"):
            layer.apply(given, buffers, x)
    if buffers:
        fewer = dict(list(buffers.items())[1:])
        with pytest.raises(pn.CheckpointError, match=f"`buffers` does not fit .*{next(iter(buffers))}"):
            layer.assign(params, fewer)
        with pytest.raises(pn.CheckpointError, match=f"`buffers` does not fit .*{next(iter(buffers))}"):
            layer.apply(params, fewer, x)
    assert {n: id(a) for n, a in layer.state_dict().items()} == {n: id(a) for n, a in before.items()}
    layer.assign(dict(reversed(params.items())), buffers)  # any order


OF_ANOTHER_DTYPE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a wider one": (lambda a: a - np.float64(0.1) * a, "float64"),
    "a narrower one": (lambda a: a.astype("float16"), "float16"),
    "integers": (lambda a: np.round(a).astype("int64"), "int64"),
}


@pytest.mark.parametrize("kind", OF_ANOTHER_DTYPE)
def test_assign_takes_no_arrays_of_another_dtype(kind: str, rng: np.random.Generator) -> None:
    """NumPy makes float64 of float32 times one of its own numbers."""
    changed, name = OF_ANOTHER_DTYPE[kind]
    layer, x = pn.LSTM(3, 4, norm="batch", rng=0), rng.standard_normal((5, 2, 3)).astype("float32")
    y, before = layer(x)[0], layer.state_dict()
    params, buffers = layer.params, layer.buffers
    for one, inside in ((layer, ""), (pn.Sequential(layer), "0.")):
        given, held = ({f"{inside}{n}": a for n, a in group.items()} for group in (params, buffers))
        for n, a in given.items():
            with pytest.raises(pn.DTypeError, match=f"`{n}` has dtype {name}; expected float32.*load_state_dict"):
                one.assign({**given, n: changed(a)})
        for n, a in held.items():
            if "num_batches" in n and kind == "integers":
                continue
            expected = "integers" if "num_batches" in n else "float32"
            with pytest.raises(pn.DTypeError, match=f"`{n}` has dtype {name}; expected {expected}"):
                one.assign(given, {**held, n: changed(a)})
    assert {n: id(a) for n, a in layer.state_dict().items()} == {n: id(a) for n, a in before.items()}
    layer.load_state_dict({n: a.astype("float64") for n, a in before.items()})
    assert {a.dtype for a in layer.params.values()} == {np.dtype("float32")}
    np.testing.assert_array_equal(layer(x)[0], y)
    wide = layer.to(dtype="float64")
    wide.assign({n: a.astype("float64") for n, a in before.items() if n in layer.params}, wide.buffers)
    half = layer.to(dtype="float16")
    half.assign(half.params, layer.buffers)  # whose statistics are of at least float32


@pytest.mark.parametrize("name", LAYERS)
def test_the_order_of_parameters_in_a_mapping_says_nothing(name: str, rng: np.random.Generator) -> None:
    """JAX gives mappings back in the order of their names."""
    layer, x = LAYERS[name](), sequence(rng)
    y, *_, pullback = layer.vjp(x, training=True)
    dy = rng.standard_normal(y.shape)
    expected = pullback(dy)[-1]
    other = LAYERS[name]()
    other.assign(dict(reversed(other.params.items())), dict(reversed(other.buffers.items())))
    y, *_, pullback = other.vjp(x, training=True)
    found = pullback(dy)[-1]
    for parameter in expected:
        np.testing.assert_array_equal(found[parameter], expected[parameter])
    for buffer, a in layer.buffers.items():
        np.testing.assert_array_equal(other.buffers[buffer], a)


@pytest.mark.peers
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_autodiff_gives_every_parameter_its_own_gradient(name: str, training: bool, rng: np.random.Generator) -> None:
    """By name, under JAX and torch: gradients of gain and shift have the same shape, and were once exchanged."""
    import jax
    import torch

    layer, x = LAYERS[name](), sequence(rng)
    of_jax, module = layer.to(xp="jax"), pn.torch_module(layer).train(training)
    y, *_, pullback = layer.vjp(x, training=training)
    dy = rng.standard_normal(y.shape)
    expected = pullback(dy)[-1]
    given = jax.numpy.asarray(x)
    found = jax.grad(lambda p: (of_jax.apply(p, of_jax.buffers, given, training=training)[0] * dy).sum())(of_jax.params)
    result = module(torch.tensor(x))
    ((result[0] if layer.recurrent else result) * torch.tensor(dy)).sum().backward()
    for parameter, tensor in module.named_parameters():
        np.testing.assert_allclose(found[parameter], expected[parameter], **relative("float64"))
        np.testing.assert_allclose(tensor.grad, expected[parameter], **relative("float64"))


# -- evaluation ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_a_call_without_training_puts_nothing_back(name: str, rng: np.random.Generator) -> None:
    """Not even what was there: between reading and writing back another thread may have trained."""
    layer, x = LAYERS[name](), sequence(rng)

    class Held(dict[str, Any]):
        pass

    for part in layer.layers():
        part.buffers = Held(part.buffers)
    layer(x)
    layer.vjp(x)
    assert all(type(part.buffers) is Held for part in layer.layers())


@pytest.mark.parametrize("name", LAYERS)
def test_training_is_true_or_false(name: str, rng: np.random.Generator) -> None:
    """ "False" is a text, and true: it would train without a word."""
    layer, x = LAYERS[name](), sequence(rng)
    before = layer.state_dict()
    calls: list[Callable[[Any], Any]] = [
        lambda training: layer(x, training=training),
        lambda training: layer.vjp(x, training=training),
        lambda training: layer.apply(layer.params, layer.buffers, x, training=training),
        lambda training: layer.pure_vjp(layer.params, layer.buffers, x, training=training),
    ]
    for call in calls:
        for wrong in ("False", None, 2):
            with pytest.raises(pn.UnsupportedError, match=f"`training` is {wrong!r}; expected True or False"):
                call(wrong)
        call(np.False_)
    assert all(layer.state_dict()[name] is a for name, a in before.items())
    layer(x, training=np.True_)
    assert not layer.buffers or any(layer.buffers[name] is not before[name] for name in layer.buffers)


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_training_beside_evaluation_keeps_every_update(name: str, rng: np.random.Generator) -> None:
    layer, alone, x = LAYERS[name](), LAYERS[name](), sequence(rng)
    stop = threading.Event()

    def evaluate() -> None:
        while not stop.is_set():
            layer(x)

    thread = threading.Thread(target=evaluate)
    thread.start()
    for _ in range(60):
        layer(x, training=True)
    stop.set()
    thread.join()
    for _ in range(60):
        alone(x, training=True)
    assert same(layer, alone)


def test_a_part_in_evaluation_keeps_its_statistics_while_the_model_trains(rng: np.random.Generator) -> None:
    """As `.eval()` on a part of a torch model: running statistics normalize, gradients go through, parameters have theirs."""
    model, x = LAYERS["Sequential"](), sequence(rng)
    model(x, training=True)
    frozen = model.parts[1].eval()  # type: ignore[attr-defined]
    kept, others = dict(frozen.buffers), dict(model.parts[3].buffers)  # type: ignore[attr-defined]
    y, _, pullback = model.vjp(x, training=True)
    dy = rng.standard_normal(y.shape)
    dx, _, grads = pullback(dy)
    assert all(np.array_equal(frozen.buffers[n], a) for n, a in kept.items())
    assert not any(np.array_equal(model.parts[3].buffers[n], a) for n, a in others.items())  # type: ignore[attr-defined]
    by_hand = frozen(model.parts[0](x))  # type: ignore[attr-defined]
    rest = pn.Sequential(*model.parts[2:])  # type: ignore[attr-defined]
    np.testing.assert_array_equal(y, rest(by_hand, training=True)[0])
    direction, step = rng.standard_normal(x.shape), 1e-6
    pure = [model.apply(model.params, model.buffers, x + s * direction, training=True)[0] for s in (step, -step)]
    assert abs(np.sum(dx * direction) - np.sum(dy * (pure[0] - pure[1])) / (2 * step)) < 1e-5 * np.abs(dx * direction).sum()
    assert np.abs(grads["1.weight"]).max() > 0
    assert not np.array_equal(model.copy().vjp(x, training=True)[0], model.parts[1].train() and model.vjp(x, training=True)[0])  # type: ignore[attr-defined]
    model.parts[1].eval()  # type: ignore[attr-defined]
    kept = dict(frozen.buffers)
    model.estimate_population([x, x])
    assert all(np.array_equal(frozen.buffers[n], a) for n, a in kept.items())


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_a_layer_in_evaluation_trains_as_it_evaluates(name: str, rng: np.random.Generator) -> None:
    layer, x = LAYERS[name](), sequence(rng)
    layer(x, training=True)
    before, expected = layer.state_dict(), layer(x)
    layer.eval()
    found = layer(x, training=True)
    for a, b in zip(found if isinstance(found, tuple) else (found,), expected if isinstance(expected, tuple) else (expected,), strict=True):
        np.testing.assert_equal(a, b)
    assert layer.state_dict().keys() == before.keys()
    assert all(np.array_equal(a, before[n]) for n, a in layer.state_dict().items())
    with pytest.raises(pn.UnsupportedError, match="call `train` first"):
        layer.estimate_population([x])
    layer.train()(x, training=True)
    assert not all(np.array_equal(a, before[n]) for n, a in layer.state_dict().items())


# -- attributes ------------------------------------------------------------------------------------------------------------------------

CHANGES: dict[str, tuple[Callable[[], pn.Layer], str, Any]] = {
    "eps of LayerNorm": (LAYERS["LayerNorm"], "eps", 0.5),
    "eps of RMSNorm": (LAYERS["RMSNorm"], "eps", 0.5),
    "eps of BatchNorm": (LAYERS["BatchNorm"], "eps", 0.5),
    "eps of GroupNorm": (LAYERS["GroupNorm"], "eps", 0.5),
    "groups of GroupNorm": (LAYERS["GroupNorm"], "num_groups", 4),
    "eps of InstanceNorm": (LAYERS["InstanceNorm"], "eps", 0.5),
    "momentum of BatchNorm": (LAYERS["BatchNorm"], "momentum", 0.5),
    "no momentum of BatchNorm": (LAYERS["BatchNorm"], "momentum", None),
    "estimator of BatchNorm": (LAYERS["BatchNorm"], "unbiased", False),
    "bound of BatchRenorm": (LAYERS["BatchRenorm"], "r_max", 1.0),
    "other bound of BatchRenorm": (LAYERS["BatchRenorm"], "d_max", 0.5),
    "momentum of BN-LSTM": (LAYERS["BN-LSTM"], "momentum", 0.5),
    "order of LSTM": (LAYERS["LSTM"], "batch_first", True),
    "last output of LSTM": (LAYERS["LSTM"], "return_sequences", False),
    "variant of BN-LSTM": (LAYERS["BN-LSTM"], "variant", dataclasses.replace(pn.VARIANTS["LSTM"]["batch"], eps=0.5)),
    "name of a variant": (lambda: pn.LSTM(4, 4, norm="layer", dtype="float64", rng=0), "norm", "di-engine"),
}


@pytest.mark.parametrize("name", [n for n in CHANGES if n != "name of a variant"])
def test_what_is_saved_is_what_computes(name: str, rng: np.random.Generator, tmp_path: Any) -> None:
    made, attribute, value = CHANGES[name]
    layer, x = made(), sequence(rng)
    before = made()
    setattr(layer, attribute, value)
    pn.save(layer, tmp_path / "m.safetensors")
    others = [pn.load(tmp_path / "m.safetensors"), layer.copy(), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    for other in others:
        assert getattr(other, attribute) == value
        for each in (other, layer.copy()):
            each(x, training=True)
    trained, first = layer.copy(), before.copy()
    results = [np.asarray(part) for part in _flat(trained(x, training=True))] + list(trained.buffers.values())
    for other in others:
        fresh = pn.load(tmp_path / "m.safetensors")
        again = [np.asarray(part) for part in _flat(fresh(x, training=True))] + list(fresh.buffers.values())
        assert all(np.array_equal(a, b) for a, b in zip(results, again, strict=True))
        assert other.config == layer.config
    old = [np.asarray(part) for part in _flat(first(x, training=True))] + list(first.buffers.values())
    assert not all(np.array_equal(a, b) for a, b in zip(results, old, strict=True))


def _flat(result: Any) -> list[Any]:
    return [a for part in result for a in _flat(part)] if isinstance(result, tuple) else [result]


def test_a_variant_that_needs_other_arrays_is_refused() -> None:
    layer = pn.LSTM(4, 4, norm="layer")
    for norm in (None, "batch", "weight", dataclasses.replace(layer.variant, shift=False)):
        with pytest.raises(pn.UnsupportedError, match="make a new LSTM of it"):
            layer.norm = norm
    assert layer.norm == "layer"
    gru = pn.GRU(4, 4, norm=pn.Variant("own", "rms", "sum"))
    with pytest.raises(pn.UnsupportedError, match="make a new GRU"):
        gru.variant = dataclasses.replace(gru.variant, reset=None)


# -- one layer at several places, and parts that do not fit ------------------------------------------------------------------------------


def tied(rng: np.random.Generator) -> tuple[pn.Sequential, pn.Sequential]:
    """A model with one Linear, one BatchNorm and one GRU at two places each, and one that has copies of them."""
    parts = (
        pn.Linear(4, 4, dtype="float64", rng=rng),
        pn.BatchNorm(4, channel_axis=-1, dtype="float64"),
        random_recurrent("GRU", "layer", rng, inputs=4, hidden=4),
    )
    return pn.Sequential(*parts, *parts), pn.Sequential(*parts, *(part.copy() for part in parts))


def test_a_layer_at_two_places_has_one_set_of_parameters(rng: np.random.Generator, tmp_path: Any) -> None:
    shared, apart = tied(rng)
    assert {name.partition(".")[0] for name in shared.parameters()} == {"0", "1", "2"}
    x = sequence(rng)
    y, state, pullback = shared.vjp(x, lengths=[5, 2, 0], training=False)
    expected, _, other = apart.vjp(x, lengths=[5, 2, 0], training=False)
    np.testing.assert_array_equal(y, expected)
    assert len(state) == 2
    dy = rng.standard_normal(y.shape)
    dx, _, grads = pullback(dy)
    other_dx, _, parts = other(dy)
    np.testing.assert_array_equal(dx, other_dx)
    for name, grad in grads.items():
        place, _, inner = name.partition(".")
        np.testing.assert_allclose(grad, parts[name] + parts[f"{int(place) + 3}.{inner}"], **CLOSE)
    optimizer = pn.SGD(0.1)
    params, _ = optimizer.update(shared.parameters(), grads, optimizer.init(shared.parameters()))
    shared.assign(params)
    assert shared.parts[0] is shared.parts[3]
    np.testing.assert_array_equal(shared.parts[3].params["weight"], params["0.weight"])
    pn.save(shared, tmp_path / "m.safetensors")
    again = pn.load(tmp_path / "m.safetensors")
    assert isinstance(again, pn.Sequential)
    for model in (again, shared.copy(), shared.to(dtype="float64"), copy.deepcopy(shared), pickle.loads(pickle.dumps(shared))):
        assert [part is model.parts[0] for part in model.parts] == [True, False, False, True, False, False]
        assert same(model, shared)
        np.testing.assert_array_equal(model(x)[0], shared(x)[0])


def test_statistics_of_a_layer_at_two_places_see_both(rng: np.random.Generator) -> None:
    norm, x = pn.BatchNorm(4, channel_axis=-1, dtype="float64"), sequence(rng)
    alone = norm.copy()
    pn.Sequential(norm, pn.LayerNorm(4, dtype="float64"), norm)(x, training=True)
    alone(pn.LayerNorm(4, dtype="float64")(alone(x, training=True)), training=True)
    assert int(norm.buffers["num_batches_tracked"]) == 2
    assert same(norm, alone)


@pytest.mark.parametrize("state", [False, True])
def test_a_layer_at_two_places_is_exported_once(state: bool, rng: np.random.Generator, tmp_path: Any) -> None:
    shared, _ = tied(rng)
    model = shared.to(dtype="float32")
    report = pn.export(model, tmp_path / "m.onnx", state=state)
    weights = [i.name for i in report.model.graph.initializer if i.name.endswith("weight")] if report.model is not None else []
    assert len(weights) == len(set(weights))
    again = pn.load(tmp_path / "m.onnx")
    assert isinstance(again, pn.Sequential)
    assert again.homes == model.homes
    assert same(again, model)


@pytest.mark.peers
def test_autodiff_adds_up_over_the_places_of_a_layer(rng: np.random.Generator) -> None:
    import jax
    import torch

    shared, _ = tied(rng)
    x = sequence(rng)
    y, _, pullback = shared.vjp(x)
    dy = rng.standard_normal(y.shape)
    _, _, grads = pullback(dy)
    module = pn.torch_module(shared).eval()
    (module(torch.tensor(x))[0] * torch.tensor(dy)).sum().backward()
    for name, parameter in module.named_parameters():
        np.testing.assert_allclose(parameter.grad, grads[name], **CLOSE)
    of_jax = shared.to(xp="jax")
    found = jax.grad(lambda p: (of_jax.apply(p, of_jax.buffers, jax.numpy.asarray(x))[0] * dy).sum())(of_jax.params)
    for name, grad in grads.items():
        np.testing.assert_allclose(found[name], grad, **CLOSE)


def test_a_layer_inside_two_parts_is_refused() -> None:
    inner = pn.Linear(4, 4)
    with pytest.raises(pn.UnsupportedError, match="part 1 holds a layer that part 0 holds too"):
        pn.Sequential(inner, pn.Sequential(inner, pn.Linear(4, 4)))
    nested = pn.Sequential(inner)
    assert pn.Sequential(nested, nested).homes == (0, 0)


def test_recurrent_parts_agree_on_their_first_axis() -> None:
    first, second = pn.LSTM(4, 4, batch_first=True), pn.GRU(4, 4)
    for parts in ((first, second), (first, pn.Sequential(pn.Linear(4, 4), second))):
        with pytest.raises(pn.UnsupportedError, match=r"part 0 takes .batch, time, features. but part 1 takes .time"):
            pn.Sequential(*parts)
    model = pn.Sequential(first, pn.GRU(4, 4, batch_first=True))
    model.parts[1].batch_first = False
    with pytest.raises(pn.UnsupportedError, match="same `batch_first`"):
        model(np.ones((2, 3, 4), "float32"))


def test_the_states_of_a_sequential_are_one_for_each_recurrent_part(rng: np.random.Generator) -> None:
    model = pn.Sequential(pn.LSTM(4, 4), pn.GRU(4, 4))
    x = sequence(rng).astype("float32")
    _, (lstm, gru) = model(x)
    for state in ((lstm,), (lstm, gru, gru), lstm[0], ()):
        with pytest.raises(pn.ShapeError, match=r"`state` is .*; expected a tuple of 2, the states of the recurrent parts"):
            model(x, state)


@pytest.mark.parametrize("name", [n for n in LAYERS if LAYERS[n]().recurrent and n != "Sequential"])
def test_a_cotangent_of_the_state_has_its_shape(name: str, rng: np.random.Generator) -> None:
    layer = LAYERS[name]()
    _, state, pullback = layer.vjp(sequence(rng))
    states = tuple(s for s in state if np.ndim(s))
    zeros = tuple(np.zeros_like(s) for s in states)
    for a, b in zip(pullback(None, zeros)[1], pullback(None, (None,) * len(states))[1], strict=True):
        np.testing.assert_array_equal(a, b)
    for wrong in (zeros[0], (*zeros, *zeros), (), (zeros[0][0], *zeros[1:]), (zeros[0][:, :1], *zeros[1:])):
        with pytest.raises(pn.ShapeError, match="`dstate` "):
            pullback(None, wrong)


def test_what_is_no_batch_is_named() -> None:
    x = np.ones((4, 3))
    for batches, message in (([(x, None, None, x)], "a tuple of 4; expected x"), ([()], "a tuple of 0"), ([], "is empty")):
        with pytest.raises(pn.UnsupportedError, match=f"`batches` .*{message}"):
            pn.BatchNorm(3, dtype="float64").estimate_population(batches)
    with pytest.raises(pn.UnsupportedError, match="`dy` is None"):
        pn.BatchNorm(3, dtype="float64").vjp(x)[1](None)  # type: ignore[arg-type]


# -- the time of a state -----------------------------------------------------------------------------------------------------------------


TIMES: dict[str, tuple[Any, type[pn.PortnormError], str]] = {
    "of each sequence": (np.array([3, 0]), pn.ShapeError, r"`state` has time of shape \(2,\); expected \(\)"),
    "one in a vector": (np.array([3]), pn.ShapeError, r"`state` has time of shape \(1,\)"),
    "a fraction": (np.asarray(1.5), pn.DTypeError, "`state` has time of dtype float64; expected an integer"),
    "before the start": (np.asarray(-1), pn.UnsupportedError, "`state` has time -1; expected the number of steps before"),
    "before the start, of Python": (-1, pn.UnsupportedError, "`state` has time -1"),
}


@pytest.mark.parametrize("name", TIMES)
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_a_time_that_is_no_number_of_steps_is_named(cell: str, name: str, rng: np.random.Generator) -> None:
    time, error, message = TIMES[name]
    layer = random_recurrent(cell, "batch", rng)
    x, state = rng.standard_normal((3, 2, 4)), random_state(layer, 2, rng)
    for call in (layer, layer.vjp, lambda *a: layer(*a, training=True), lambda x, s: layer.step(x[0], s), pn.compile(layer)):
        with pytest.raises(error, match=message):
            call(x, (*state[:-1], time))


def test_a_time_may_be_an_int(rng: np.random.Generator) -> None:
    layer = random_recurrent("LSTM", "batch", rng)
    x, state = rng.standard_normal((3, 2, 4)), random_state(layer, 2, rng)
    expected = layer(x, (*state[:-1], np.asarray(2)))[0]
    for time in (2, np.int32(2), np.uint8(2)):
        np.testing.assert_array_equal(layer(x, (*state[:-1], time))[0], expected)


# -- transformations ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.peers
@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_a_transformation_leaves_nothing_behind_in_a_layer(name: str, rng: np.random.Generator) -> None:
    import jax
    import torch

    x = sequence(rng)
    of_jax, of_torch = (LAYERS[name]().to(xp=xp) for xp in ("jax", "torch"))
    given, tensor = jax.numpy.asarray(x), torch.tensor(x)

    def first(y: Any) -> Any:
        return y[0] if isinstance(y, tuple) else y

    calls: list[tuple[pn.Layer, Callable[[], Any]]] = [
        (of_jax, lambda: jax.jit(lambda a: first(of_jax(a, training=True)))(given)),
        (of_jax, lambda: jax.vmap(lambda a: first(of_jax(a, training=True)))(given[None])),
        (of_jax, lambda: jax.lax.scan(lambda c, a: (c, first(of_jax(a, training=True))), 0, given[None])),
        (of_jax, lambda: jax.jit(lambda a: of_jax.estimate_population([a]))(given)),
        (of_torch, lambda: torch.func.vmap(lambda a: first(of_torch(a, training=True)))(tensor[None])),
        (of_torch, lambda: torch.func.grad(lambda a: first(of_torch(a, training=True)).sum())(tensor)),
    ]
    for layer, call in calls:
        before = dict(layer.buffers)
        with pytest.raises(pn.UnsupportedError, match=r"inside a transformation.* layer.apply\(params, buffers, x, training=True\)"):
            call()
        assert all(layer.buffers[n] is a for n, a in before.items())
    jax.grad(lambda a: first(of_jax(a, training=True)).sum())(given)  # where the values are there, they are kept
    assert not any(isinstance(a, jax.core.Tracer) for a in of_jax.buffers.values())
    of_jax = LAYERS[name]().to(xp="jax")
    evaluated = jax.jit(lambda a: first(of_jax(a)))(given)
    np.testing.assert_allclose(evaluated, first(LAYERS[name]()(x)), **relative("float64"))

    @jax.jit
    def update(params: Any, buffers: Any, a: Any) -> Any:
        return of_jax.apply(params, buffers, a, training=True)[2]

    of_jax.assign(of_jax.params, update(of_jax.params, of_jax.buffers, given))
    trained = LAYERS[name]()
    trained(x, training=True)
    for n, a in trained.buffers.items():
        np.testing.assert_allclose(of_jax.buffers[n], a, **relative("float64"))


@pytest.mark.parametrize(("cell", "norm"), HEAVY_PRESETS)
def test_a_call_in_evaluation_changes_no_array(cell: str, norm: str | None, library: Library, rng: np.random.Generator) -> None:
    layer: Recurrent = random_recurrent(cell, norm, rng)
    if "float64" in library.dtypes:
        there: Any = layer.to(xp=library.support.name)
        before = {n: np.array(library.values([a])[0]) for n, a in there.state_dict().items()}
        there(library.array(rng.standard_normal((3, 2, 4))), lengths=[3, 1])
        for n, a in there.state_dict().items():
            np.testing.assert_array_equal(library.values([a])[0], before[n])


# -- optimizers --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [pn.SGD(0.1), pn.SGD(0.1, momentum=0.9), pn.RMSProp(), pn.Adam(), pn.AdamW()], ids=repr)
def test_an_update_takes_just_the_gradients_of_the_parameters(optimizer: Any) -> None:
    params = {"weight": np.ones((3, 2)), "bias": np.ones(3)}
    grads, state = {name: 0.5 * p for name, p in params.items()}, optimizer.init(params)
    optimizer.update(params, dict(reversed(grads.items())), state)
    with pytest.raises(pn.UnsupportedError, match=r"`grads` does not fit `params`: missing \['bias'\], unknown nothing"):
        optimizer.update(params, {"weight": grads["weight"]}, state)
    with pytest.raises(pn.UnsupportedError, match=r"`grads` does not fit `params`: missing nothing, unknown \['more'\]"):
        optimizer.update(params, {**grads, "more": np.ones(3)}, state)
    for shape in ((3, 1), (2,), (), (1, 3, 2)):
        with pytest.raises(pn.ShapeError, match=r"`grads` has 'weight' of shape .*; expected \(3, 2\)"):
            optimizer.update(params, {**grads, "weight": np.ones(shape)}, state)
    for name, kept in state.items():
        for wrong in ({}, {**state, name: {}}) if isinstance(kept, dict) else ({n: s for n, s in state.items() if n != name},):
            with pytest.raises(pn.UnsupportedError, match="`state"):
                optimizer.update(params, grads, wrong)


def test_what_is_empty_or_no_number_is_named_by_optimizers() -> None:
    with pytest.raises(pn.UnsupportedError, match="`grads` is empty"):
        pn.clip_by_global_norm({}, 1.0)
    with pytest.raises(pn.UnsupportedError, match="`params` is empty"):
        pn.Adam().init({})
    for limit in (0.0, -1.0, float("nan"), None, "1"):
        with pytest.raises(pn.UnsupportedError, match=r"`limit` is .*; expected a number > 0"):
            pn.clip_by_global_norm({"w": np.ones(3)}, limit)  # type: ignore[arg-type]
    for lr in (None, "1", -0.1, float("nan"), float("inf")):
        with pytest.raises(pn.UnsupportedError, match="`lr` is "):
            pn.Adam(lr=lr)  # type: ignore[arg-type]


REFUSED: dict[str, tuple[Callable[[], pn.Layer], str, Any]] = {
    "gain of LayerNorm": (LAYERS["LayerNorm"], "affine", False),
    "shift of LayerNorm": (LAYERS["LayerNorm"], "bias", False),
    "shift of RMSNorm": (LAYERS["RMSNorm"], "bias", True),
    "shape of LayerNorm": (LAYERS["LayerNorm"], "normalized_shape", (3, 4)),
    "ε of LayerNorm": (LAYERS["LayerNorm"], "eps", "small"),
    "statistics of InstanceNorm": (LAYERS["InstanceNorm"], "track_running_stats", True),
    "axis of BatchNorm": (LAYERS["BatchNorm"], "channel_axis", 2.0),
    "channels of BatchNorm": (LAYERS["BatchNorm"], "num_features", 3),
    "momentum of BatchNorm": (LAYERS["BatchNorm"], "momentum", 2),
    "estimator of BatchRenorm": (LAYERS["BatchRenorm"], "unbiased", True),
    "bound of BatchRenorm": (LAYERS["BatchRenorm"], "r_max", 0.5),
    "groups of GroupNorm": (LAYERS["GroupNorm"], "num_groups", 3),
    "bias of Linear": (LAYERS["Linear"], "bias", False),
    "directions of LSTM": (LAYERS["LSTM"], "bidirectional", True),
    "layers of LSTM": (LAYERS["LSTM"], "num_layers", 2),
    "hidden features of LSTM": (LAYERS["LSTM"], "hidden_size", 5),
    "projection of LSTM": (LAYERS["LSTM"], "proj_size", 2),
    "first state of LSTM": (LAYERS["LSTM"], "learned_state", True),
    "direction of LSTM": (LAYERS["LSTM"], "direction", "backward"),
    "order of LSTM": (LAYERS["LSTM"], "batch_first", "no"),
    "momentum of BN-LSTM": (LAYERS["BN-LSTM"], "momentum", "fast"),
    "steps of BN-LSTM": (LAYERS["BN-LSTM"], "t_max", 0),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_attribute_is_refused_that_could_not_be_loaded_again(name: str) -> None:
    made, attribute, value = REFUSED[name]
    layer = made()
    before = getattr(layer, attribute)
    with pytest.raises(pn.PortnormError, match=f"`{attribute}`"):
        setattr(layer, attribute, value)
    assert getattr(layer, attribute) == before


@pytest.mark.parametrize(("attribute", "value"), [("dtype", "float64"), ("device", "cpu"), ("xp", np)])
def test_what_all_arrays_have_in_common_is_not_changed_beside_them(attribute: str, value: Any) -> None:
    for layer in (pn.LSTM(3, 4), pn.LayerNorm(3), pn.Sequential(pn.LayerNorm(3))):
        before = getattr(layer, attribute)
        with pytest.raises(pn.UnsupportedError, match=rf"`{attribute}` is .*to\({attribute}=…\) gives a copy"):
            setattr(layer, attribute, value)
        assert getattr(layer, attribute) is before
        assert layer.to(dtype="float64").dtype == np.float64


@pytest.mark.parametrize(
    ("name", "attribute", "value", "kept"),
    [
        ("LayerNorm", "eps", np.float32(0.5), 0.5),
        ("LayerNorm", "normalized_shape", np.int64(4), (4,)),
        ("BatchNorm", "momentum", np.float64(0.25), 0.25),
        ("BatchNorm", "unbiased", np.bool_(False), False),
        ("GroupNorm", "num_groups", np.int64(4), 4),
        ("BN-LSTM", "batch_first", 1, True),
    ],
)
def test_a_changed_attribute_is_kept_as_a_given_one_is(name: str, attribute: str, value: Any, kept: Any, tmp_path: Any) -> None:
    layer = LAYERS[name]()
    setattr(layer, attribute, value)
    pn.save(layer, tmp_path / "m.safetensors")
    for found in (getattr(layer, attribute), getattr(pn.load(tmp_path / "m.safetensors"), attribute)):
        assert found == kept
        assert type(found) is type(kept)


def test_no_file_is_written_of_statistics_that_do_not_fit(tmp_path: Any) -> None:
    layer = LAYERS["BN-LSTM"]()
    layer.t_max = 3  # type: ignore[attr-defined]
    with pytest.raises(pn.CheckpointError, match=r"expected \(3, 16\)"):
        pn.save(layer, tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


WAYS = {
    "made": lambda layer, path: layer,
    "of another type": lambda layer, path: layer.to(dtype="float64"),
    "a copy": lambda layer, path: copy.deepcopy(layer),
    "of another process": lambda layer, path: pickle.loads(pickle.dumps(layer)),
    "of a file": lambda layer, path: (pn.save(layer, path), pn.load(path))[1],
    "imported": lambda layer, path: pn.import_checkpoint(pn.to_format(layer, "torch")),
    "loaded": lambda layer, path: (layer.load_state_dict({n: a.copy(order="F") for n, a in layer.state_dict().items()}), layer)[1],
}


@pytest.mark.parametrize("way", WAYS)
def test_matrices_begin_with_a_cache_line(way: str, tmp_path: Path) -> None:
    """In NumPy, whichever way they came: a step reads them half as fast elsewhere."""
    made = pn.LSTM(9, 300, num_layers=2, rng=0)
    expected = {name: a.copy() for name, a in made.params.items()}
    layer = WAYS[way](made, tmp_path / "layer.safetensors")
    for name, a in layer.params.items():
        np.testing.assert_array_equal(a, expected[name])
        assert a.flags.c_contiguous
        assert a.flags.writeable
        assert a.ndim < 2 or a.ctypes.data % 64 == 0
