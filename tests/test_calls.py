"""A call: arguments in every spelling, the signature that is shown, numbers and switches of every kind."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import pydoc
import typing
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from portnorm.checkpoint.described import from_json, to_json
from portnorm.layers.initial import HIDDEN, HiddenInit
from portnorm.op import OPS as ALL_OPS
from portnorm.op import Op
from portnorm_onnx.targets import TARGETS, TargetName
from tests.cases import LAYERS, OPS, OpCase
from tests.conftest import Library
from tests.tolerances import relative

PUBLIC = [getattr(pn, name) for name in pn.__all__ if isinstance(getattr(pn, name), Op)]


def spelled(case: OpCase, args: tuple[Any, ...], first: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a case with those from number `first` on given by name."""
    names = list(inspect.signature(case.op).parameters)[: len(args)]
    return args[:first], dict(zip(names[first:], args[first:], strict=True))


def arrays(library: Library, case: OpCase, dtype: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def made(a: Any) -> Any:
        if not isinstance(a, np.ndarray):
            return a
        return library.array(a, dtype if a.dtype.kind == "f" else None)

    return tuple(map(made, case.arguments(np.random.default_rng(0)))), {n: made(a) for n, a in case.keywords.items()}


@pytest.mark.parametrize("case", OPS, ids=lambda case: case.name)
def test_what_is_given_by_name_is_what_is_given_by_place(library: Library, dtype_of_library: str, case: OpCase) -> None:
    """Value and cotangents, bit by bit, whatever is named: all but the first, or all."""
    dtype = dtype_of_library
    args, keywords = arrays(library, case, dtype)
    y, pullback = pn.vjp(case.op, *args, **keywords)
    dy = library.array(np.random.default_rng(1).standard_normal(y.shape), dtype)
    expected = [y, *(d for d in pullback(dy) if d is not None)]
    for first in (1, 0):
        placed, named = spelled(case, args, first)
        again, pullback = pn.vjp(case.op, *placed, **named, **keywords)
        found = [again, *(d for d in pullback(dy) if d is not None)]
        assert len(found) == len(expected)
        called = case.op(*placed, **named, **keywords)
        for a, b in zip(library.values([*found, called]), library.values([*expected, case.op(*args, **keywords)]), strict=True):
            np.testing.assert_array_equal(a, b)


def _of_torch(case: OpCase, named: int) -> list[Any]:
    import torch

    args = tuple(torch.tensor(a) if isinstance(a, np.ndarray) else a for a in case.arguments(np.random.default_rng(0)))
    args = tuple(a.requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in args)
    keywords = {n: torch.tensor(a) if isinstance(a, np.ndarray) else a for n, a in case.keywords.items()}
    placed, given = spelled(case, args, named)
    y = case.op(*placed, **given, **keywords)
    (y * torch.tensor(np.random.default_rng(1).standard_normal(tuple(y.shape)))).sum().backward()
    return [a.grad if a.grad is None else a.grad.numpy() for a in args if torch.is_tensor(a) and a.is_floating_point()]


def _of_jax(case: OpCase, named: int) -> list[Any]:
    import jax

    args = case.arguments(np.random.default_rng(0))
    floating = [k for k, a in enumerate(args) if isinstance(a, np.ndarray) and a.dtype.kind == "f"]
    keywords = {n: jax.numpy.asarray(a) if isinstance(a, np.ndarray) else a for n, a in case.keywords.items()}

    def loss(values: list[Any]) -> Any:
        given = [jax.numpy.asarray(a) if isinstance(a, np.ndarray) else a for a in args]
        for k, value in zip(floating, values, strict=True):
            given[k] = value
        placed, by_name = spelled(case, tuple(given), named)
        y = case.op(*placed, **by_name, **keywords)
        return (y * np.random.default_rng(1).standard_normal(y.shape)).sum()

    return [np.asarray(d) for d in jax.grad(loss)([jax.numpy.asarray(args[k]) for k in floating])]


@pytest.mark.peers
@pytest.mark.parametrize("gradients", [_of_torch, _of_jax])
@pytest.mark.parametrize("case", OPS, ids=lambda case: case.name)
def test_autodiff_reaches_what_is_given_by_name(case: OpCase, gradients: Callable[[OpCase, int], list[Any]]) -> None:
    by_place, by_name = gradients(case, len(case.arguments(np.random.default_rng(0)))), gradients(case, 1)
    assert any(d is not None for d in by_place)
    for a, b in zip(by_name, by_place, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            np.testing.assert_allclose(a, b, **relative("float64"))


@pytest.mark.peers
@pytest.mark.parametrize("masked", [False, True])
def test_autodiff_reaches_given_statistics(masked: bool) -> None:
    """`mean` and `var` can only be given by name; their gradient is that of the formula, under torch and JAX."""
    import jax
    import torch

    rng = np.random.default_rng(0)
    x, dy = 3.0 + rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 3, 4))
    given = {
        "weight": rng.standard_normal(3),
        "bias": rng.standard_normal(3),
        "mean": rng.standard_normal(3),
        "var": rng.uniform(0.5, 2, 3),
    }
    mask = rng.random((2, 4)) > 0.3 if masked else None

    def formula(a: Any, p: dict[str, Any]) -> Any:
        weight, bias, mean, var = (p[n][:, None] for n in given)
        y = (a - mean) / (var + float(np.float32(1e-5))) ** 0.5 * weight + bias
        return y if mask is None else y * mask[:, None, :]

    exact = jax.grad(lambda p: (formula(x, p) * dy).sum())(given)
    kept = {} if mask is None else {"mask": jax.numpy.asarray(mask)}
    found = jax.grad(lambda p: (pn.batch_norm(jax.numpy.asarray(x), **p, **kept) * dy).sum())(given)
    tensors = {n: torch.tensor(a, requires_grad=True) for n, a in given.items()}
    of_torch = {} if mask is None else {"mask": torch.tensor(mask)}
    (pn.batch_norm(torch.tensor(x), **tensors, **of_torch) * torch.tensor(dy)).sum().backward()
    for name in given:
        np.testing.assert_allclose(found[name], exact[name], **relative("float64"))
        np.testing.assert_allclose(tensors[name].grad, exact[name], **relative("float64"))


@pytest.mark.parametrize("op", PUBLIC, ids=lambda op: op.name)
def test_the_signature_that_is_shown_is_the_one_of_a_call(op: Op[..., Any]) -> None:
    """To `inspect`, `help` and, as far as it can be run here, an editor: parameters as they are written, and the array alone as result."""
    shown, written = inspect.signature(op), inspect.signature(op.definition)
    assert shown.parameters == written.parameters
    assert shown.return_annotation == "Array"
    text = pydoc.render_doc(op, renderer=pydoc.plaintext)
    first = next(iter(shown.parameters.values()))
    assert f"{op.name}({first}" in text.replace("(\n    ", "(")  # newer Pythons break long lines
    assert str(op.__doc__).partition("\n")[0] in text


X = np.random.default_rng(0).standard_normal((2, 4, 3))
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "unknown": (lambda: pn.layer_norm(X, bais=X), "layer_norm has no argument `bais`; it takes x, weight, bias, axis, eps, out"),  # type: ignore[call-arg]
    "of another function": (lambda: pn.rms_norm(X, bias=X[0, 0]), "rms_norm has no argument `bias`"),  # type: ignore[call-arg]
    "by place of another function": (
        lambda: pn.rms_norm(X, X[0, 0], X[0, 0]),
        "rms_norm got 3 arguments by place; expected at most 2: x, weight",
    ),  # type: ignore[call-arg]
    "twice": (lambda: pn.layer_norm(X, x=X), "layer_norm got `x` twice"),  # type: ignore[misc]
    "missing": (lambda: pn.group_norm(X), "group_norm needs `num_groups`"),  # type: ignore[call-arg]
    "none at all": (lambda: pn.layer_norm(), "layer_norm needs `x`"),  # type: ignore[call-arg]
    "unknown, of a vjp": (lambda: pn.vjp(pn.batch_norm, X, wieght=X), "batch_norm has no argument `wieght`"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named_with_the_function(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises(pn.ArgumentError, match=message):
        call()


def test_the_names_that_editors_offer_are_those_of_the_tables() -> None:
    names = {name for table in (pn.VARIANTS, pn.IMPLEMENTATIONS) for rows in table.values() for name in rows}
    from portnorm.cells.variants import NormName

    assert {*typing.get_args(NormName), None} == names
    assert set(typing.get_args(HiddenInit)) == set(HIDDEN)
    assert typing.get_args(TargetName) == tuple(TARGETS)


def test_every_op_has_a_place_for_each_argument_that_is_an_array() -> None:
    """What can only be named is a constant to a vjp; given statistics are the one exception, and tested above."""
    for op in ALL_OPS.values():
        named = {
            p.name
            for p in inspect.signature(op.definition).parameters.values()
            if p.kind is p.KEYWORD_ONLY and "Array" in str(p.annotation)
        }
        assert named <= {"mask", "out", "mean", "var", "lengths"}, op.name


SIZED: dict[str, Callable[[Callable[[Any], Any]], pn.Layer]] = {
    "LayerNorm": lambda of: pn.LayerNorm(of(4)),
    "LayerNorm of two axes": lambda of: pn.LayerNorm((of(2), of(4))),
    "RMSNorm": lambda of: pn.RMSNorm([of(4)]),  # type: ignore[arg-type]
    "BatchNorm": lambda of: pn.BatchNorm(of(4), channel_axis=of(-1)),
    "BatchRenorm": lambda of: pn.BatchRenorm(of(4)),
    "InstanceNorm": lambda of: pn.InstanceNorm(of(4)),
    "GroupNorm": lambda of: pn.GroupNorm(of(2), of(4)),
    "Linear": lambda of: pn.Linear(of(3), of(4)),
    "Embedding": lambda of: pn.Embedding(of(3), of(4)),
    "LSTM": lambda of: pn.LSTM(of(3), of(4), num_layers=of(2), t_max=of(5), proj_size=of(2)),
    "GRU": lambda of: pn.GRU(of(3), of(4), norm="batch", t_max=of(5)),
    "RNN": lambda of: pn.RNN(of(3), of(4)),
}


@pytest.mark.parametrize("of", [np.int64, np.int32, np.uint8, lambda n: np.asarray(n)], ids=["int64", "int32", "uint8", "array"])
@pytest.mark.parametrize("name", SIZED)
def test_a_size_may_be_an_integer_of_numpy(name: str, of: Callable[[Any], Any], tmp_path: Any) -> None:
    """As `labels.max() + 1` is; the layer is saved and loaded like any other."""
    layer = SIZED[name](lambda n: of(n) if n >= 0 or of is not np.uint8 else n)
    assert layer.config == SIZED[name](int).config
    assert all(type(v) is not np.int64 for v in layer.config.values())
    pn.save(layer, tmp_path / "m.safetensors")
    assert pn.load(tmp_path / "m.safetensors").config == layer.config


@pytest.mark.parametrize("value", [2.5, "4", None, True, 0, -1], ids=repr)
@pytest.mark.parametrize("name", [n for n in SIZED if n != "LayerNorm of two axes"])
def test_a_size_that_is_none_is_named(name: str, value: Any) -> None:
    with pytest.raises((pn.UnsupportedError, pn.ShapeError), match=r"`\w+` is "):
        SIZED[name](lambda n: value)


NUMBERS: dict[str, Callable[[Any], pn.Layer]] = {
    "LayerNorm": lambda of: pn.LayerNorm(4, eps=of(0.5), affine=of(True), bias=of(False)),
    "RMSNorm": lambda of: pn.RMSNorm(4, eps=of(0.5), affine=of(True)),
    "BatchNorm": lambda of: pn.BatchNorm(4, eps=of(0.5), momentum=of(0.25), unbiased=of(True)),
    "BatchRenorm": lambda of: pn.BatchRenorm(4, eps=of(0.5), momentum=of(0.25), r_max=of(2.0), d_max=of(4.0)),
    "InstanceNorm": lambda of: pn.InstanceNorm(4, eps=of(0.5), affine=of(True)),
    "GroupNorm": lambda of: pn.GroupNorm(2, 4, eps=of(0.5), affine=of(True)),
    "LSTM": lambda of: pn.LSTM(3, 4, momentum=of(0.5), forget_bias=of(1.0), bidirectional=of(True), batch_first=of(True)),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_or_a_switch_may_be_one_of_numpy(name: str) -> None:
    layer = NUMBERS[name](lambda v: np.bool_(v) if isinstance(v, bool) else np.float32(v))
    assert json.loads(to_json(layer)) == json.loads(to_json(NUMBERS[name](lambda v: v)))
    assert from_json(to_json(layer)).config == layer.config


REAL: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "LayerNorm": (lambda **how: pn.LayerNorm(4, **how), ("eps",)),
    "RMSNorm": (lambda **how: pn.RMSNorm(4, **how), ("eps",)),
    "BatchNorm": (lambda **how: pn.BatchNorm(4, **how), ("eps", "momentum")),
    "BatchRenorm": (lambda **how: pn.BatchRenorm(4, **how), ("eps", "momentum", "r_max", "d_max")),
    "InstanceNorm": (lambda **how: pn.InstanceNorm(4, **how), ("eps",)),
    "GroupNorm": (lambda **how: pn.GroupNorm(2, 4, **how), ("eps",)),
    **{
        cell: (functools.partial(LAYERS[cell], 3, 4, num_layers=2), ("dropout", "recurrent_dropout", "momentum"))
        for cell in ("LSTM", "GRU", "RNN")
    },
    "forget bias": (functools.partial(pn.LSTM, 3, 4), ("forget_bias",)),
    "Variant": (functools.partial(pn.Variant, "here"), tuple(f.name for f in dataclasses.fields(pn.Variant) if "float" in f.type)),
    "first state": (lambda **how: pn.LSTM(3, 4).initial_state(2, **how), ("noise",)),
    "weight_norm": (lambda **how: pn.weight_norm(X[0], X[0, :, 0], **how), ("eps",)),
    "weight_norm_init": (lambda **how: pn.weight_norm_init(X[0], X[0], **how), ("scale",)),
    "SGD": (pn.SGD, ("lr", "momentum")),
    "Adam": (pn.Adam, ("lr", "beta1", "beta2", "eps")),
}
"""What takes numbers that need not be whole, and their names."""


def truths() -> list[Any]:
    """True, of Python and of arrays."""
    return [True, False, np.True_, np.asarray(True)]


@pytest.mark.parametrize("name", REAL)
def test_a_truth_value_is_no_number(name: str) -> None:
    """As it is none where a number is to be whole: `dropout=True` would drop all. Made with it, or assigned."""
    make, settings = REAL[name]
    assert settings
    for setting in settings:
        for value in (*truths(), "1"):
            with pytest.raises(pn.UnsupportedError, match=rf"`{setting}` is .*; expected a"):
                make(**{setting: value})
            made = make()
            if isinstance(made, pn.Layer) and setting != "forget_bias":
                with pytest.raises(pn.UnsupportedError, match=rf"`{setting}` is .*; expected a"):
                    setattr(made, setting, value)


@pytest.mark.peers
def test_a_truth_value_of_torch_is_no_number() -> None:
    """Though Python takes it for one."""
    import torch

    for make in (lambda v: pn.LSTM(3, 4, num_layers=v), lambda v: pn.LSTM(3, 4, recurrent_dropout=v), lambda v: pn.LayerNorm(v)):
        with pytest.raises(pn.UnsupportedError, match=r"tensor\(True\); expected a"):
            make(torch.tensor(True))


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(pn.Variant) if "bool" in f.type])
def test_a_switch_of_a_variant_is_true_or_false(name: str) -> None:
    assert getattr(pn.Variant("here", **{name: np.True_}), name) is True
    with pytest.raises(pn.UnsupportedError, match=rf"`{name}` is 'no'; expected True or False"):
        pn.Variant("here", **{name: "no"})


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "layer_norm": lambda x, **how: pn.layer_norm(x, **how),
    "rms_norm": lambda x, **how: pn.rms_norm(x, **how),
    "batch_norm": lambda x, **how: pn.batch_norm(x, **how),
    "instance_norm": lambda x, **how: pn.instance_norm(x, **how),
    "group_norm": lambda x, **how: pn.group_norm(x, 2, **how),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_eps_and_axes_are_numbers_of_any_kind(name: str, dtype: str) -> None:
    x, axis = X.astype(dtype), "axis" if name in ("layer_norm", "rms_norm") else "channel_axis"
    expected = FUNCTIONS[name](x, eps=0.5, **{axis: 1})
    for eps in (np.float32(0.5), np.float64(0.5), np.asarray(0.5)):
        np.testing.assert_array_equal(FUNCTIONS[name](x, eps=eps, **{axis: np.int64(1)}), expected)
    np.testing.assert_array_equal(FUNCTIONS[name](x, eps=1, **{axis: np.uint8(1)}), FUNCTIONS[name](x, eps=1.0, **{axis: 1}))
    for eps in (-1e-5, float("nan"), float("inf"), "small", [1e-5, 1e-5], *(() if name == "rms_norm" else (None,))):
        with pytest.raises(pn.UnsupportedError, match=r"`eps` is .*; expected a number ≥ 0"):
            FUNCTIONS[name](x, eps=eps)
    for wrong in (None, 1.0, "1"):
        with pytest.raises(pn.UnsupportedError, match=rf"`{axis}` is .*; expected a whole number"):
            FUNCTIONS[name](x, **{axis: wrong})


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_rms_norm_without_eps_has_that_of_torch(dtype: str, tmp_path: Any) -> None:
    """`eps=None` is the machine epsilon of the dtype of the statistics, as in torch.nn.RMSNorm; saved and exported as such."""
    x, wide = (1e-4 * X).astype(dtype), "float64" if dtype == "float64" else "float32"
    expected = x.astype("float64") / np.sqrt(np.mean(x.astype("float64") ** 2, axis=-1, keepdims=True) + np.finfo(wide).eps)
    np.testing.assert_allclose(pn.rms_norm(x, eps=None), expected, **relative(dtype))
    layer = pn.RMSNorm(3, eps=None, dtype=dtype)
    np.testing.assert_allclose(layer(x), expected, **relative(dtype))
    pn.save(layer, tmp_path / "m.safetensors")
    assert pn.load(tmp_path / "m.safetensors").config["eps"] is None
    if dtype != "float16":
        pn.export(layer, tmp_path / "m.onnx", inputs=[x.reshape(-1, 3)])
