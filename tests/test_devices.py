"""Arrays stay where they are: on a second device, of a library that refuses to mix devices and to become NumPy's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import array_api_strict as xp
import numpy as np
import pytest

import portnorm as pn
from tests.cases import IMPLEMENTATIONS, OPS, PRESETS, OpCase, random_recurrent, random_state

DEVICE = xp.Device("device1")


def _refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("an array was converted to NumPy")


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """Arrays on the device, of which none may be converted."""
    xp.set_array_api_strict_flags(boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=())
    array_type = type(xp.zeros(1))
    for name in ("__array__", "__buffer__", "__dlpack__"):
        monkeypatch.setattr(array_type, name, _refuse)
    return functools.partial(xp.asarray, device=DEVICE)


def test_the_guard_sees_a_conversion(on_device: Any) -> None:
    for convert in (np.asarray, np.from_dlpack):
        with pytest.raises(AssertionError, match="converted to NumPy"):
            convert(on_device(np.ones(3)))


def test_two_devices_in_one_call_are_an_error(on_device: Any) -> None:
    x, elsewhere = on_device(np.ones((2, 3))), xp.asarray(np.ones(3))
    with pytest.raises(pn.UnsupportedError, match=r"`weight` is on device .* but `x` is on .*device1"):
        pn.layer_norm(x, elsewhere)
    layer = pn.LSTM(3, 4, norm="layer", xp=xp, device=DEVICE, dtype="float64")
    with pytest.raises(pn.UnsupportedError, match=r"`x` is on device .*; move one of them first"):
        layer(xp.asarray(np.ones((5, 2, 3))))
    with pytest.raises(pn.UnsupportedError, match="`lengths` is on device"):
        layer(on_device(np.ones((5, 2, 3))), lengths=xp.asarray(np.array([5, 2])))
    with pytest.raises(pn.UnsupportedError, match="`state` is on device"):
        layer(on_device(np.ones((5, 2, 3))), tuple(xp.asarray(np.zeros((1, 2, 4))) for _ in range(2)))


@pytest.mark.parametrize("case", OPS, ids=lambda case: case.name)
def test_op(case: OpCase, on_device: Any, rng: np.random.Generator) -> None:
    def placed(value: Any) -> Any:
        return on_device(value) if isinstance(value, np.ndarray) else value

    arguments = [placed(a) for a in case.arguments(rng)]
    y, pullback = pn.vjp(case.op, *arguments, **{k: placed(v) for k, v in case.keywords.items()})
    found = [y, *pullback(on_device(rng.standard_normal(y.shape)))]
    assert all(a.device == DEVICE for a in found if a is not None)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    ("cell", "norm", "given"),
    [
        *((cell, norm, "lengths") for cell, norm in (*PRESETS, *IMPLEMENTATIONS) if norm != "fastrnns-decomposed"),
        ("LSTM", "layer", "mask"),
        ("LSTM", "batch", "mask"),
        ("GRU", "layer", "list"),
    ],
)
def test_recurrent(cell: str, norm: str | None, given: str, training: bool, on_device: Any, rng: np.random.Generator) -> None:
    reference = random_recurrent(cell, norm, rng, bidirectional=True)
    layer = type(reference)(4, 3, norm=norm, t_max=4, bidirectional=True, xp=xp, device=DEVICE, dtype="float64")
    layer.load_state_dict(reference.state_dict())
    x, state, lengths = rng.standard_normal((5, 3, 4)), random_state(reference, 3, rng), np.array([5, 2, 3])
    mask = np.arange(5)[:, None] < lengths
    how: dict[str, Any] = {"lengths": {"lengths": on_device(lengths)}, "mask": {"mask": on_device(mask)}, "list": {"lengths": [5, 2, 3]}}[
        given
    ]
    y, last, pullback = layer.vjp(on_device(x), tuple(on_device(s) for s in state), **how, training=training)
    dx, dstate, grads = pullback(y, last[: len(layer.cell.states)])
    for array in (y, *last, dx, *dstate, *grads.values(), *layer.buffers.values()):
        assert array.device == DEVICE


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_layers_of_norms(training: bool, on_device: Any, rng: np.random.Generator) -> None:
    options: dict[str, Any] = {"xp": xp, "device": DEVICE, "dtype": "float64"}
    layers = (
        pn.LayerNorm(4, **options),
        pn.RMSNorm(4, **options),
        pn.GroupNorm(2, 6, **options),
        pn.InstanceNorm(6, **options),
        pn.BatchNorm(6, **options),
        pn.Linear(4, 3, rng=0, **options),
    )
    x = on_device(rng.standard_normal((5, 6, 4)))
    for layer in layers:
        y, pullback = layer.vjp(x, training=training)
        dx, grads = pullback(y)
        assert all(a.device == DEVICE for a in (y, dx, *grads.values(), *layer.buffers.values()))
