"""What calls of a recurrent layer on NumPy arrays share with those before them and beside them: never a value."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from portnorm.arrays import without_kernels
from portnorm_backends.cpu.memory import SMALL, Turns
from tests.cases import PRESETS
from tests.processes import in_threads

SHAPES = [(1, 1), (1, 5), (4, 2)]
"""Steps and sequences of a call: weights read as they lie, packed for one step, and packed for several."""

Changed = Callable[[pn.LSTM, str, np.ndarray[Any, Any]], None]


def in_place(layer: pn.LSTM, name: str, values: np.ndarray[Any, Any]) -> None:
    layer.params[name][...] = values


def below(layer: pn.LSTM, name: str, values: np.ndarray[Any, Any]) -> None:
    """In the memory that the array is a view of."""
    whole = np.ones((2, *values.shape), values.dtype)
    layer.params[name] = whole[1]
    layer(np.zeros((1, 1, layer.input_size), values.dtype))
    _, state = layer.step(np.zeros((1, layer.input_size), values.dtype))
    for _ in range(2):
        layer.step(np.zeros((1, layer.input_size), values.dtype), state)
    whole[1] = values


def replaced(layer: pn.LSTM, name: str, values: np.ndarray[Any, Any]) -> None:
    layer.params[name] = values


def elsewhere(layer: pn.LSTM, name: str, values: np.ndarray[Any, Any]) -> None:
    """An array with its values in another order, which can only be read."""
    layer.params[name] = np.asfortranarray(values)
    layer.params[name].flags.writeable = False


def assigned(layer: pn.LSTM, name: str, values: np.ndarray[Any, Any]) -> None:
    layer.assign({**layer.params, name: values})


def written_after_it_was_read_only(layer: pn.LSTM, name: str, values: np.ndarray[Any, Any]) -> None:
    """For one call, which may then have made a copy."""
    array, x = layer.params[name], np.zeros((1, layer.input_size), values.dtype)
    array.flags.writeable = False
    _, state = layer.step(x)
    layer.step(x, state)
    array.flags.writeable = True
    array[...] = values


CHANGES: list[Changed] = [in_place, below, replaced, elsewhere, assigned, written_after_it_was_read_only]


def random_layer(cell: str, norm: str | None, rng: np.random.Generator, **more: Any) -> Any:
    layer = getattr(pn, cell)(6, 8, norm=norm, rng=0, **more)
    layer.assign({name: rng.standard_normal(a.shape).astype(a.dtype) for name, a in layer.params.items()})
    return layer


def anew(layer: Any) -> Any:
    """A layer that nobody has called, of copies of the parameters, in the order in which their values lie: sums go by it."""
    made = type(layer)(**layer.config, dtype=layer.dtype)
    made.assign({name: a.copy("K") for name, a in layer.params.items()}, layer.buffers)
    return made


def assert_equal(found: Any, expected: Any) -> None:
    for a, b in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_parameters_changed_between_two_calls_are_noticed(cell: str, norm: str | None, change: Changed, rng: np.random.Generator) -> None:
    """Each of them, to the last bit: what is found once for all calls has none of their values."""
    layer = random_layer(cell, norm, rng)
    for steps, batch in SHAPES:
        x = rng.standard_normal((steps, batch, 6), np.float32)
        before, _ = layer(x)
        for name, parameter in list(layer.params.items()):
            change(layer, name, rng.standard_normal(parameter.shape, np.float32))
            assert_equal(layer(x), anew(layer)(x))
            _, state = layer.step(x[0])
            for _ in range(3):  # the last of which does not look at what the first ones saw
                assert_equal(layer(x), anew(layer)(x))
                assert_equal(layer.step(x[0], state), anew(layer).step(x[0], state))
        assert np.abs(layer(x)[0] - before).max() > 1e-3


MORE: list[dict[str, Any]] = [
    {},
    {"dtype": "float64"},
    {"num_layers": 2},
    {"batch_first": True},
    {"return_sequences": False},
    {"learned_state": True},
    {"quantize": "int8"},
]


@pytest.mark.parametrize("more", MORE, ids=str)
@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_a_later_step_is_that_of_a_layer_that_has_seen_none(
    cell: str, norm: str | None, more: dict[str, Any], rng: np.random.Generator
) -> None:
    """To the last bit, however the values lie, also where a variance leaves the range of the kernels."""
    layer = random_layer(cell, norm, rng, **more)
    for batch in (1, 2, 5):
        x = rng.standard_normal((6, batch, 6)).astype(layer.dtype)
        x[3] *= 1e18
        rows = [x[0], x[1], np.asfortranarray(x[2]), x[3], np.repeat(x[4], 2, axis=1)[:, ::2], x[5]]
        rows[5].flags.writeable = False
        for forms in (1, 2):
            state = None
            for row in rows:
                with np.errstate(all="ignore"):
                    found, expected = layer.step(row, state), anew(layer).step(row, state)
                assert_equal(found, expected)
                assert [a.shape for a in found[1]] == [a.shape for a in expected[1]]
                state = found[1]
                if forms == 2 and layer.num_layers == 1 and state[0].ndim == 3:
                    state = (*[a[0] for a in state[: len(layer.cell.states)]], *state[len(layer.cell.states) :])


@pytest.mark.parametrize("more", MORE, ids=str)
@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_a_later_call_is_that_of_a_layer_that_has_seen_none(
    cell: str, norm: str | None, more: dict[str, Any], rng: np.random.Generator
) -> None:
    """To the last bit, with and without a state, and after calls of other shapes and of training between."""
    layer = random_layer(cell, norm, rng, **more)
    for shape in ((1, 1), (4, 1), (3, 4), (4, 1), (0, 2), (2, 0), (4, 6)):
        for k in range(4):
            x = rng.standard_normal((*shape, 6)).astype(layer.dtype) * (1e18 if k == 2 else 1)
            x = np.ascontiguousarray(x.swapaxes(0, 1)) if layer.batch_first else x
            state = None if k == 0 else layer.initial_state(shape[1], noise=0.1, rng=k)
            with np.errstate(all="ignore"):
                assert_equal(layer(x, state), anew(layer)(x, state))
                assert_equal(layer(x), anew(layer)(x))
        layer(np.ones((2, 3, 6), layer.dtype), training=True)


@pytest.mark.parametrize("shape", [(1, 2), (5, 2)], ids=str)
@pytest.mark.parametrize(("cell", "norm"), [("LSTM", None), ("LSTM", "layer"), ("GRU", None), ("GRU", "layer"), ("RNN", None)])
def test_a_later_call_is_looked_at_no_more(
    cell: str, norm: str | None, shape: tuple[int, int], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = random_layer(cell, norm, rng, num_layers=2), rng.standard_normal((*shape, 6), np.float32)
    looked, look = [], layer.forward
    monkeypatch.setattr(layer, "forward", lambda *arguments: looked.append(arguments) or look(*arguments))
    _, state = layer(x)
    layer(x, state)
    assert len(looked) == 2
    for _ in range(3):
        _, state = layer(x, state)
        layer(x)
    if shape[0] == 1:
        layer.step(x[0], state)
    assert len(looked) == 2
    layer(x, training=True)
    layer(x, lengths=[1, 1])
    layer(x, mask=np.zeros(shape, bool))
    layer(x[:, :1], tuple(a[:, :1] for a in state))
    assert len(looked) == 6


@pytest.mark.parametrize("layers", [1, 2])
def test_what_does_not_fit_is_refused_in_a_later_step_as_in_the_first(layers: int, rng: np.random.Generator) -> None:
    layer, x = random_layer("LSTM", "layer", rng, num_layers=layers), rng.standard_normal((2, 6), np.float32)
    _, state = layer.step(x)
    for _ in range(2):
        layer.step(x, state)
    wide = x.astype("float64")
    wrong: list[tuple[Any, Any]] = [
        (wide, state),
        (x[:, :5], state),
        (x[:1], state),
        (x, tuple(a.astype("float64") for a in state)),
        (x, tuple(a[:, :1] for a in state)),
        (x, state[:1]),
        (x, (*state, state[0])),
        (x, tuple(a.tolist() for a in state)),
        (x.astype(">f4"), state),
        (x.tolist(), state),
    ]
    for arguments in wrong:
        with pytest.raises(pn.PortnormError) as found:
            layer.step(*arguments)
        with pytest.raises(pn.PortnormError) as expected:
            anew(layer).step(*arguments)
        assert str(found.value) == str(expected.value)
    layer.direction = "reverse"
    with pytest.raises(pn.UnsupportedError, match="cannot go step by step"):
        layer.step(x, state)


def test_a_copy_computes_its_steps_with_its_own_arrays(rng: np.random.Generator) -> None:
    layer, x = random_layer("GRU", "layer", rng), rng.standard_normal((2, 6), np.float32)
    _, state = layer.step(x)
    expected = layer.step(x, state)
    layer.step(x, state)
    for other in (layer.copy(), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_equal(other.step(x, state), expected)
        other.assign({name: -a for name, a in other.params.items()})
        other.norm = dataclasses.replace(other.variant, eps=0.5)
        assert_equal(other.step(x, state), anew(other).step(x, state))
        assert_equal(layer.step(x, state), expected)


@pytest.mark.parametrize(("cell", "first", "second"), [("GRU", "bias_ih_l0", "bias_hh_l0"), ("LSTM", "weight_ih_l0", "weight_hh_l0")])
def test_parameters_that_change_their_names_are_noticed(cell: str, first: str, second: str, rng: np.random.Generator) -> None:
    """Also where the same arrays come in the same order."""
    layer = getattr(pn, cell)(8, 8, rng=0)
    layer.assign({name: rng.standard_normal(a.shape).astype(a.dtype) for name, a in layer.params.items()})
    x = rng.standard_normal((2, 8), np.float32)
    _, state = layer.step(x)
    for _ in range(3):
        before, _ = layer.step(x, state)
    swapped = {first: second, second: first}
    layer.params = {swapped.get(name, name): a for name, a in layer.params.items()}
    assert_equal(layer.step(x, state), anew(layer).step(x, state))
    assert np.abs(layer.step(x, state)[0] - before).max() > 1e-3
    layer.params["another"] = layer.params.pop(first)
    with pytest.raises(KeyError, match=first.removesuffix("_l0")):
        layer.step(x, state)


@pytest.mark.parametrize("locked", [False, True], ids=["", "read-only once more"])
def test_weights_of_integers_cannot_be_written_to_and_others_are_read_anew(locked: bool, rng: np.random.Generator) -> None:
    layer, x = pn.quantized(random_layer("LSTM", None, rng)), rng.standard_normal((2, 6), np.float32)
    with pytest.raises(ValueError, match="WRITEABLE"):
        layer.params["weight_hh_l0"].flags.writeable = True
    layer.params["weight_hh_l0"] = own = layer.params["weight_hh_l0"].copy()
    own.flags.writeable = False
    _, state = layer.step(x)
    for _ in range(3):
        before, _ = layer.step(x, state)
    own.flags.writeable = True
    own[...] *= -2
    own.flags.writeable = not locked
    found, _ = layer.step(x, state)
    assert np.abs(found - before).max() > 1e-3
    np.testing.assert_allclose(found, anew(layer).step(x, state)[0], rtol=0, atol=1e-6)


def test_a_sum_over_processes_that_is_set_later_is_noticed(rng: np.random.Generator) -> None:
    layer, x = random_layer("LSTM", "layer", rng), rng.standard_normal((6, 3, 6), np.float32)
    for _ in range(3):
        layer(x)
    layer.reduce = lambda a: a
    other = anew(layer)
    other.reduce = layer.reduce
    assert_equal(layer(x), other(x))


def test_arrays_that_a_layer_has_no_longer_are_let_go(rng: np.random.Generator) -> None:
    """At its next call, of whatever shape."""
    layer, x = random_layer("LSTM", "layer", rng), rng.standard_normal((4, 2, 6), np.float32)
    for shape in (x, x[:1], x[:, :1]):
        for _ in range(3):
            layer(shape)
    old = [weakref.ref(a) for a in layer.params.values()]
    layer.assign({name: a.copy() for name, a in layer.params.items()})
    layer(x[:2])
    gc.collect()
    assert [ref() for ref in old] == [None] * len(old)


@pytest.mark.parametrize("sequences", [True, False])
@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_the_result_of_no_steps_is_none_of_the_state_that_came(
    cell: str, norm: str | None, sequences: bool, rng: np.random.Generator
) -> None:
    layer = random_layer(cell, norm, rng, return_sequences=sequences)
    state = layer.initial_state(3, noise=0.1, rng=0)
    y, after = layer(np.zeros((0, 3, 6), np.float32), state)
    for a in (y, *after):
        assert not any(np.shares_memory(a, b) for b in state)


def test_without_kernels_a_later_step_is_the_definition(rng: np.random.Generator) -> None:
    layer, x = random_layer("LSTM", "layer", rng), rng.standard_normal((2, 6), np.float32)
    _, state = layer.step(x)
    for _ in range(2):
        layer.step(x, state)
    with without_kernels(np.ndarray):
        found, expected = layer.step(x, state), anew(layer).step(x, state)
    assert_equal(found, expected)


@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_settings_changed_between_two_steps_are_noticed(cell: str, norm: str | None, rng: np.random.Generator) -> None:
    layer, x = random_layer(cell, norm, rng), rng.standard_normal((3, 1, 6), np.float32)
    for _ in range(3):
        layer(x)
    for name, value in (("direction", "reverse"), ("return_sequences", False), ("batch_first", True)):
        setattr(layer, name, value)
        for _ in range(3):
            assert_equal(layer(x), anew(layer)(x))


@pytest.mark.parametrize("more", MORE, ids=str)
@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_results_of_a_call_outlive_the_calls_after_it(cell: str, norm: str | None, more: dict[str, Any], rng: np.random.Generator) -> None:
    """Also where a result is written to, which changes no other: the room of calls is none of theirs."""
    layer = random_layer(cell, norm, rng, **more)
    for shape in ((6,), (1, 1, 6), (3, 1, 6)):
        call = layer.step if len(shape) == 1 else layer
        x, state, found, kept = rng.standard_normal((6, *((1, 6) if len(shape) == 1 else shape))).astype(layer.dtype), None, [], []
        x = x.swapaxes(1, 2) if layer.batch_first and x.ndim == 4 else x
        for one in x:
            h, state = call(one, state)
            found.append((h, *state))
            kept.append([np.copy(a) for a in found[-1]])
        for own, copies in zip(found, kept, strict=True):
            for a, b in zip(own, copies, strict=True):
                np.testing.assert_array_equal(a, b)
        expected = call(x[0])
        expected = expected[0].copy(), [a.copy() for a in expected[1]]
        arrays = [a for own in found for a in own if a.ndim]
        for i, array in enumerate(arrays):
            array[...] = i
        for i, array in enumerate(arrays):
            np.testing.assert_array_equal(array, i)
        assert_equal(call(x[0]), expected)


@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_a_step_does_not_hang_on_the_one_before_it(cell: str, norm: str | None, rng: np.random.Generator) -> None:
    """NaN, rows whose squares leave float32, and another batch have gone through the same room before."""
    layer, x = random_layer(cell, norm, rng), rng.standard_normal((2, 1, 6), np.float32)
    expected = anew(layer)(x)
    for value in (np.nan, 1e30, np.inf, 0.0):
        with np.errstate(all="ignore"):
            layer(np.full_like(x, value))
            _, state = layer(np.full((1, 1, 6), value, np.float32))
            for _ in range(3):
                layer.step(np.full((1, 6), value, np.float32), state)
        assert_equal(layer(x), expected)
        _, state = layer.step(x[0])
        assert_equal(layer.step(x[1], state), anew(layer).step(x[1], state))


def test_steps_in_several_threads_are_those_of_each_alone(rng: np.random.Generator) -> None:
    layer, x = random_layer("LSTM", "layer", rng), rng.standard_normal((8, 200, 1, 6), np.float32)

    def stream(k: int) -> list[np.ndarray[Any, Any]]:
        found, state = [], None
        for one in x[k]:
            h, state = layer.step(one, state)
            found.append(h)
        return found

    expected = [np.stack(stream(k)) for k in range(8)]
    found = [np.empty_like(alone) for alone in expected]
    in_threads(lambda k: np.stack(stream(k), out=found[k]))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("count", "made"), [(SMALL, 2), (SMALL + 1, 4)])
def test_room_is_taken_in_turns_unless_it_is_large(count: int, made: int) -> None:
    numbers = iter(range(10))
    rooms = Turns(lambda: next(numbers), count)
    taken = rooms.take(), rooms.take()
    for room in taken:
        rooms.give(room)
    rooms.take(), rooms.take()
    assert next(numbers) == made
