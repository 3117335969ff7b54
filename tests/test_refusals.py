"""What is no number, no array or no state is named, wherever it is given."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import portnorm as pn

X = np.random.default_rng(0).standard_normal((4, 6))
LABELS = np.array([0, 1, 2, 0])
PARAMS = {"a": X}

NEEDED: dict[str, Callable[[Any], Any]] = {
    "g": lambda a: pn.weight_norm(X, a),
    "weight": lambda a: pn.linear(X, a),
    "weight of embedding": lambda a: pn.embedding(LABELS, a),
    "labels": lambda a: pn.softmax_cross_entropy(X, a),
    "target": lambda a: pn.mean_squared_error(X, a),
    "dy": lambda a: pn.vjp(pn.layer_norm, X)[1](a),
    "grads": lambda a: pn.SGD().update(PARAMS, {"a": a}, {}),
    "grads of clipping": lambda a: pn.clip_by_global_norm({"a": a}, 1.0),
    "params": lambda a: pn.Adam().init({"a": a}),
    "state": lambda a: pn.LSTM(6, 2, norm="batch", dtype="float64")(X[None], (np.zeros((1, 4, 2)), np.zeros((1, 4, 2)), a)),
}


@pytest.mark.parametrize("value", [None, "x", [1.0], X.astype(complex), np.ma.masked_array(X)], ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("name", NEEDED)
def test_what_is_no_array_of_real_numbers_is_named(name: str, value: Any) -> None:
    with pytest.raises(pn.PortnormError, match=f"`{name.partition(' ')[0]}"):
        NEEDED[name](value)


@pytest.mark.parametrize("op", [pn.batch_norm, pn.group_norm, pn.instance_norm, pn.batch_renorm], ids=lambda op: op.name)
@pytest.mark.parametrize("axis", [[1], (0, 1), None, 1.0, "1"], ids=str)
def test_a_channel_axis_is_one_number(op: Any, axis: Any) -> None:
    more = {"mean": np.zeros(6), "var": np.ones(6)} if op is pn.batch_renorm else {}
    given = {"num_groups": 2} if op is pn.group_norm else {}
    with pytest.raises(pn.UnsupportedError, match="`channel_axis`"):
        pn.vjp(op, X[..., None], channel_axis=axis, **more, **given)


@pytest.mark.parametrize("given", [{}, {"mean": np.zeros(6)}, {"var": np.ones(6)}], ids=str)
def test_what_can_only_be_named_is_asked_for_by_name(given: dict[str, Any]) -> None:
    for call in (pn.batch_renorm, lambda x, **k: pn.vjp(pn.batch_renorm, x, **k)):
        with pytest.raises(pn.ArgumentError, match=f"batch_renorm needs `{'var' if 'mean' in given else 'mean'}`"):
            call(X, **given)


@pytest.mark.parametrize("index", ["0", 1.5, True, np.array([1, 2])], ids=str)
def test_an_ignored_label_is_a_whole_number(index: Any) -> None:
    with pytest.raises(pn.UnsupportedError, match="`ignore_index`"):
        pn.softmax_cross_entropy(X, LABELS, ignore_index=index)


def test_an_ignored_label_that_no_label_can_be_ignores_none() -> None:
    assert pn.softmax_cross_entropy(X, LABELS, ignore_index=2**70) == pn.softmax_cross_entropy(X, LABELS)


@pytest.mark.parametrize("name", ["lr", "beta1", "beta2", "eps"])
def test_rates_of_optimizers_are_numbers(name: str) -> None:
    for value in (None, "x", -1.0, np.ones(2), float("nan")):
        with pytest.raises(pn.UnsupportedError, match=f"`{name}`"):
            pn.Adam(**{name: value})
    assert type(getattr(pn.Adam(**{name: np.float64(0.5)}), name)) is float


@pytest.mark.parametrize("optimizer", [pn.SGD(0.1, 0.9), pn.RMSProp(), pn.Adam()], ids=lambda o: type(o).__name__)
def test_a_state_that_is_none_is_named(optimizer: Any) -> None:
    for state in (None, [], {}, {"steps": 0}):
        with pytest.raises(pn.UnsupportedError, match="`state"):
            optimizer.update(PARAMS, PARAMS, state)


SEQUENCE = np.ones((3, 2, 4), np.float32)
MADE: dict[str, tuple[Any, ...]] = {
    "BatchNorm": (4,),
    "BatchRenorm": (4,),
    "GRU": (4, 3),
    "GroupNorm": (2, 4),
    "InstanceNorm": (4,),
    "LSTM": (4, 3),
    "LayerNorm": (4,),
    "Linear": (4, 3),
    "RMSNorm": (4,),
    "RNN": (4, 3),
}
"""How layers with switches are made."""
SWITCHED: dict[str, Callable[..., Any]] = {
    **{name: lambda name=name, **given: getattr(pn, name)(*args_of(name), **given) for name in MADE},
    "Variant": lambda **given: pn.Variant("a cell", "layer", **given),
    "Layer.__call__": lambda **given: pn.LSTM(4, 3)(SEQUENCE, **given),
    "Layer.vjp": lambda **given: pn.LSTM(4, 3).vjp(SEQUENCE, **given),
    "Layer.apply": lambda **given: (m := pn.LSTM(4, 3)).apply(m.params, {}, SEQUENCE, **given),
    "Layer.pure_vjp": lambda **given: (m := pn.LSTM(4, 3)).pure_vjp(m.params, {}, SEQUENCE, **given),
    "export": lambda **given: pn.export(pn.LSTM(4, 3), None, **given),
    "export_torch": lambda **given: pn.export_torch(module_of_torch(), (SEQUENCE,), None, **given),
    "export_training_step": lambda **given: pn.export_training_step(pn.LSTM(4, 3), pn.mean_squared_error, pn.SGD(), None, **given),
    "fake_quantize": lambda **given: pn.fake_quantize(X, **given),
    "fit": lambda **given: pn.fit(pn.Linear(6, 3), X.astype("float32"), LABELS, **given),
    "load": lambda **given: pn.load("no file", **given),
    "pad_sequences": lambda **given: pn.pad_sequences([X, X[:2]], **given),
    "replace_modules": lambda **given: pn.replace_modules(module_of_torch(), {"0": "torch"}, **given),
    "torch_module": lambda **given: pn.torch_module(pn.Linear(4, 3), **given),
}
"""Public functions with switches, each called with one of them."""


def args_of(name: str) -> tuple[Any, ...]:
    return MADE[name]


def module_of_torch() -> Any:
    import torch

    return torch.nn.Sequential(torch.nn.Linear(4, 3))


def switches() -> list[Any]:
    """Every public function and method of `Layer` with its parameters that are True or False, by the signatures."""
    found = []
    for name in pn.__all__:
        function = getattr(pn, name)
        if not callable(function) or (isinstance(function, type) and issubclass(function, Exception)):
            continue
        methods = ("__call__", "vjp", "apply", "pure_vjp") if name == "Layer" else ()
        for title, each in {name: function, **{f"{name}.{m}": getattr(function, m) for m in methods}}.items():
            if title == "Layer":
                continue
            needs_torch = title in ("export_torch", "replace_modules", "torch_module")
            found += [
                pytest.param(title, p.name, marks=[pytest.mark.peers] * needs_torch, id=f"{title}({p.name})")
                for p in inspect.signature(each).parameters.values()
                if isinstance(p.default, bool) or "bool" in str(p.annotation).replace(" ", "").split("|")
            ]
    return found


@pytest.mark.parametrize(("function", "parameter"), switches())
def test_a_switch_is_true_or_false(function: str, parameter: str) -> None:
    for value in ("no", [5, 2], 2, np.ones(2, bool), np.zeros(0)):
        with pytest.raises(pn.UnsupportedError, match=f"`{parameter}` is .*; expected True or False"):
            SWITCHED[function](**{parameter: value})


def test_a_switch_may_come_from_an_array() -> None:
    for value in (1, np.True_, np.asarray(True)):
        assert pn.LSTM(4, 3, bidirectional=value).bidirectional is True
    model = pn.export(pn.LSTM(4, 3), None, lengths=np.False_, metadata=False).model
    assert [i.name for i in model.graph.input] == ["x"]


OTHER_KINDS: dict[str, tuple[Callable[[Any], Any], tuple[Any, ...]]] = {
    "mean": (lambda v: pn.batch_renorm(X, mean=v, var=np.ones(6)), (None, [1.0])),
    "var": (lambda v: pn.batch_renorm(X, mean=np.ones(6), var=v), (None, [1.0])),
    "params of SGD": (lambda v: pn.SGD().update(v, PARAMS, {}), (None, [X], X)),
    "params of Adam": (lambda v: pn.Adam().update(v, PARAMS, pn.Adam().init(PARAMS)), (None, [X], X)),
    "params of AdamW": (lambda v: pn.AdamW().update(v, PARAMS, pn.AdamW().init(PARAMS)), (None, [X], X)),
    "params of a state": (lambda v: pn.AdamW(decayed=["a"]).init(v), (None, [X], X)),
    "decayed": (lambda v: pn.AdamW(decayed=v), (None, 1.0, "a", np.asarray(1.0))),
    "batch": (lambda v: pn.LSTM(4, 3).initial_state(v), (None, -1, "a", 2.5, [2], True)),
    "batch of a model": (lambda v: pn.Sequential(pn.LSTM(4, 3)).initial_state(v), (None, -1, "a")),
    "levels": (lambda v: pn.fake_quantize(X.astype("float32"), levels=v), (None, [1], "4", 0)),
    "block": (lambda v: pn.fake_quantize(X.astype("float32"), block=v), ([1], "4", np.ones(2), 0)),
    "batches": (lambda v: pn.LSTM(4, 3, norm="batch").estimate_population(v), (None, 3, np.asarray(1.0))),
    "dstate": (lambda v: pn.LSTM(4, 3).vjp(SEQUENCE)[2](None, v), ([1, 2], 1.0, np.asarray(1.0), [None])),
    "biases": (lambda v: pn.Variant("a cell", biases=v), (X, ["bias"], "bias")),
    "activation": (lambda v: pn.Variant("a cell", activation=v), (X, 1, None)),
    "bidirectional": (lambda v: pn.LSTM(4, 3, bidirectional=v), (X, "no")),
    "direction": (lambda v: pn.LSTM(4, 3, direction=v), (X, None, [1])),
    "hidden_init": (lambda v: pn.LSTM(4, 3, hidden_init=v), (X, 1, "ones")),
    "quantize": (lambda v: pn.LSTM(4, 3, quantize=v), (X, ["int8"], 8)),
    "input_shape": (lambda v: pn.export(pn.Linear(3, 4), None, input_shape=v), (3, "x", 2.5)),
    "inputs": (lambda v: pn.export(pn.Linear(3, 4), None, inputs=v), (3, "x", [[1.0, 2.0]], [(X,)], np.ones(3), np.asarray(1.0))),
    "names": (lambda v: pn.export(pn.Linear(3, 4), None, names=v), (["a"], "x", {"x": 3})),
    "prefix": (lambda v: pn.export(pn.Linear(3, 4), None, prefix=v), (None, 3, ["a"])),
    "target": (lambda v: pn.export(pn.Linear(3, 4), None, target=v), (["web"], None, 3, X)),
    "opset": (lambda v: pn.export(pn.Linear(3, 4), None, opset=v), ([18], "18", X)),
    "threads": (lambda v: pn.compile(pn.Linear(3, 4), threads=v), (None, "2", 0)),
}
"""Arguments that are no arrays of numbers, and values of other kinds."""


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_an_argument_of_another_kind_is_named(name: str) -> None:
    call, values = OTHER_KINDS[name]
    for value in values:
        with pytest.raises(pn.PortnormError, match=f"`{name.partition(' ')[0]}`"):
            call(value)
