"""What calls of a recurrent layer on NumPy arrays share with those before them and beside them: never a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import portnorm as pn
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
    whole[1] = values


def replaced(layer: pn.LSTM, name: str, values: np.ndarray[Any, Any]) -> None:
    layer.params[name] = values


def elsewhere(layer: pn.LSTM, name: str, values: np.ndarray[Any, Any]) -> None:
    """An array with its values in another order, which can only be read."""
    layer.params[name] = np.asfortranarray(values)
    layer.params[name].flags.writeable = False


def assigned(layer: pn.LSTM, name: str, values: np.ndarray[Any, Any]) -> None:
    layer.assign({**layer.params, name: values})


CHANGES: list[Changed] = [in_place, below, replaced, elsewhere, assigned]


def random_layer(cell: str, norm: str | None, rng: np.random.Generator, **more: Any) -> Any:
    layer = getattr(pn, cell)(6, 8, norm=norm, rng=0, **more)
    layer.assign({name: rng.standard_normal(a.shape, np.float32) for name, a in layer.params.items()})
    return layer


def anew(layer: Any) -> Any:
    """A layer that nobody has called, of copies of the parameters, in the order in which their values lie: sums go by it."""
    made = type(layer)(**layer.config)
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
            assert_equal(layer.step(x[0]), anew(layer).step(x[0]))
        assert np.abs(layer(x)[0] - before).max() > 1e-3


@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_settings_changed_between_two_steps_are_noticed(cell: str, norm: str | None, rng: np.random.Generator) -> None:
    layer, x = random_layer(cell, norm, rng), rng.standard_normal((3, 1, 6), np.float32)
    layer(x)
    for name, value in (("direction", "reverse"), ("return_sequences", False), ("batch_first", True)):
        setattr(layer, name, value)
        assert_equal(layer(x), anew(layer)(x))


@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_results_of_a_step_outlive_the_steps_after_it(cell: str, norm: str | None, rng: np.random.Generator) -> None:
    """Also where a result is written to: the room of calls is none of theirs."""
    layer, x, state = random_layer(cell, norm, rng), rng.standard_normal((6, 1, 6), np.float32), None
    found, kept = [], []
    for t in range(6):
        h, state = layer.step(x[t], state)
        found.append((h, *state))
        kept.append([np.copy(a) for a in found[-1]])
    for step, copies in zip(found, kept, strict=True):
        for a, b in zip(step, copies, strict=True):
            np.testing.assert_array_equal(a, b)
    expected = layer.step(x[0])
    expected = expected[0].copy(), [a.copy() for a in expected[1]]
    h, state = layer.step(x[0])
    for array in (h, *state[: len(layer.cell.states)]):
        array[...] = np.nan
    assert_equal(layer.step(x[0]), expected)


@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_a_step_does_not_hang_on_the_one_before_it(cell: str, norm: str | None, rng: np.random.Generator) -> None:
    """NaN, rows whose squares leave float32, and another batch have gone through the same room before."""
    layer, x = random_layer(cell, norm, rng), rng.standard_normal((2, 1, 6), np.float32)
    expected = anew(layer)(x)
    for value in (np.nan, 1e30, np.inf, 0.0):
        with np.errstate(all="ignore"):
            layer(np.full_like(x, value))
            layer(np.full((1, 1, 6), value, np.float32))
        assert_equal(layer(x), expected)


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
