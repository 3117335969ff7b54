"""What is no array as the definitions take it: every function and layer says so in one error, whichever argument it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from tests.cases import OPS, OpCase
from tests.processes import output_of
from tests.tolerances import relative


class WithoutDevice:
    """An array with a namespace, but without the attributes that the standard asks for."""

    def __init__(self, values: Any):
        self.values = np.asarray(values)
        self.dtype, self.shape, self.ndim = self.values.dtype, self.values.shape, self.values.ndim

    def __array_namespace__(self, api_version: Any = None) -> Any:
        return np


class Refusing(WithoutDevice):
    def __array_namespace__(self, api_version: Any = None) -> Any:
        raise ValueError("no such version")


def matrix(a: Any) -> Any:
    return np.asarray(a).reshape(a.shape[0] if a.ndim else 1, -1).view(np.matrix)


def masked(a: Any) -> Any:
    return np.ma.MaskedArray(a, mask=np.zeros(np.shape(a), bool))


class Masked(np.ma.MaskedArray):  # type: ignore[type-arg,no-untyped-call,unused-ignore]
    """One of somebody's own."""


KINDS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a matrix": (matrix, "is a matrix; expected .* numpy.asarray makes an array of it"),
    "a masked array": (masked, "is a MaskedArray; expected .* its mask would be ignored"),
    "a masked array of another class": (lambda a: np.asarray(a).view(Masked), "is a Masked; expected .* its mask would be ignored"),
    "without device": (WithoutDevice, "is a WithoutDevice; expected .* `device`, which this one lacks"),
    "a namespace that fails": (Refusing, "is an array of tests, which does not work here: no such version"),
    "a list": (lambda a: np.asarray(a).tolist() if np.ndim(a) else [1.0], "is a list; expected an array"),
    "None": (lambda a: None, "is None; expected an array"),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def placed(case: OpCase, rng: np.random.Generator) -> list[tuple[str, int | str]]:
    """The arguments and keywords of a case that are arrays."""
    places: list[Any] = [k for k, a in enumerate(case.arguments(rng)) if isinstance(a, np.ndarray)]
    return places + [name for name, a in case.keywords.items() if isinstance(a, np.ndarray)]


PUBLIC = [case for case in OPS if case.op.name in pn.__all__]


@EVERY_KIND
@pytest.mark.parametrize("case", PUBLIC, ids=lambda case: case.name)
@pytest.mark.parametrize("derived", [False, True], ids=["call", "vjp"])
def test_every_argument_of_a_function(case: OpCase, kind: str, derived: bool, rng: np.random.Generator) -> None:
    make, message = KINDS[kind]
    for place in placed(case, rng):
        if kind == "None" and place != 0:
            continue  # that is to leave it out
        arguments, keywords = list(case.arguments(rng)), dict(case.keywords)
        if isinstance(place, int):
            arguments[place] = make(arguments[place])
        else:
            keywords[place] = make(keywords[place])
        with pytest.raises(pn.PortnormError, match=message) as caught:
            pn.vjp(case.op, *arguments, **keywords) if derived else case.op(*arguments, **keywords)
        assert str(caught.value).startswith("`")


X = np.random.default_rng(0).standard_normal((4, 3, 6)).astype(np.float32)
LAYERS: dict[str, tuple[pn.Layer, Any]] = {
    "LayerNorm": (pn.LayerNorm(6), X),
    "RMSNorm": (pn.RMSNorm(6), X),
    "BatchNorm": (pn.BatchNorm(3), X),
    "BatchRenorm": (pn.BatchRenorm(3), X),
    "InstanceNorm": (pn.InstanceNorm(3), X),
    "InstanceNorm, affine": (pn.InstanceNorm(3, affine=True), X),
    "GroupNorm": (pn.GroupNorm(1, 3), X),
    "Linear": (pn.Linear(6, 2, rng=0), X),
    "Embedding": (pn.Embedding(6, 2, rng=0), np.zeros((4, 3), int)),
    "LSTM": (pn.LSTM(6, 2, norm="layer", rng=0), X),
    "GRU": (pn.GRU(6, 2, norm="batch", rng=0), X),
    "RNN": (pn.RNN(6, 2, rng=0), X),
    "Sequential": (pn.Sequential(pn.LayerNorm(6), pn.LSTM(6, 2, rng=0)), X),
}


@EVERY_KIND
@pytest.mark.parametrize("name", LAYERS)
def test_every_argument_of_a_layer(name: str, kind: str) -> None:
    layer, x = LAYERS[name]
    make, message = KINDS[kind]
    for call in (layer, lambda x: layer(x, training=True), layer.vjp):
        with pytest.raises(pn.PortnormError, match=f"^`x` {message}"):
            call(make(x))
    if not layer.recurrent or kind == "None":
        return
    if kind != "a list":
        with pytest.raises(pn.PortnormError, match=f"^`lengths` {message}"):
            layer(x, lengths=make(np.array([4, 2, 1])))
    with pytest.raises(pn.PortnormError, match=f"^`mask` {message}"):
        layer(x, mask=make(np.ones((4, 3), bool)))


@EVERY_KIND
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_every_part_of_a_state(name: str, kind: str) -> None:
    layer, x = LAYERS[name]
    make, message = KINDS[kind]
    state = layer.initial_state(3)
    for k, part in enumerate(state):
        if part.ndim:
            with pytest.raises(pn.PortnormError, match=f"^`state` {message}"):
                layer(x, (*state[:k], make(part), *state[k + 1 :]))


@pytest.mark.parametrize("case", PUBLIC, ids=lambda case: case.name)
def test_a_long_double_is_an_error_or_computed(case: OpCase, rng: np.random.Generator) -> None:
    """No library but NumPy has the type, and no statistic is known to be right in it."""
    given = case.arguments(rng)
    arguments = [a.astype(np.longdouble) if isinstance(a, np.ndarray) and a.dtype == np.float64 else a for a in given]
    if case.op is pn.linear:
        np.testing.assert_allclose(case.op(*arguments, **case.keywords), case.op(*given, **case.keywords), **relative("float64"))
        return
    with pytest.raises(pn.DTypeError, match=r"^`\w+` has dtype (longdouble|float128); expected a real floating-point type such as float32"):
        case.op(*arguments, **case.keywords)


def test_a_long_double_in_a_layer() -> None:
    with pytest.raises(pn.DTypeError, match=r"`x` has dtype .* but the layer has"):
        pn.LayerNorm(6)(X.astype(np.longdouble))
    with pytest.raises(pn.DTypeError, match="`dtype` is"):
        pn.LayerNorm(6, dtype=np.longdouble)


def test_numbers_of_numpy_are_arrays_without_axes() -> None:
    one, two = np.float32(1.0), np.float32(3.0)
    loss = pn.mean_squared_error(one, two)
    assert (loss, loss.dtype) == (4.0, np.float32)
    for call in (
        pn.layer_norm,
        pn.rms_norm,
        pn.batch_norm,
        pn.instance_norm,
        lambda x: pn.group_norm(x, 1),
        pn.LayerNorm(1),
        pn.LSTM(1, 1),
    ):
        with pytest.raises(pn.ShapeError, match=r"`x` has shape \(\)|`axis` -1 does not exist: `x` has shape \(\)"):
            call(one)
    with pytest.raises(pn.ShapeError, match=r"`x` \(\)"):
        pn.linear(one, np.ones((2, 1), np.float32))
    table = np.eye(3, dtype=np.float32)
    np.testing.assert_array_equal(pn.embedding(np.int64(1), table), table[1])


def test_memory_that_lies_in_a_file_is_an_array(tmp_path: Any) -> None:
    np.save(tmp_path / "x.npy", X)
    np.testing.assert_allclose(pn.layer_norm(np.load(tmp_path / "x.npy", mmap_mode="r")), pn.layer_norm(X), **relative("float32"))


WITHOUT_X64 = """
import warnings
warnings.simplefilter("error")
import jax, numpy as np, portnorm as pn
def tried(call):
    try:
        call()
    except (pn.DTypeError, pn.CheckpointError) as error:
        return str(error)
    return "nothing"
pn.save(pn.LSTM(3, 4, norm="layer", dtype="float64"), "{path}")
for call in (
    lambda: pn.LayerNorm(3, xp="jax", dtype="float64"),
    lambda: pn.LSTM(3, 4, xp="jax", dtype="float64"),
    lambda: pn.Embedding(3, 4, xp="jax", dtype="float64"),
    lambda: pn.LSTM(3, 4).to(xp="jax", dtype="float64"),
    lambda: pn.LSTM(3, 4, dtype="float64").to(xp="jax"),
    lambda: pn.Sequential(pn.Linear(3, 4, dtype="float64")).to(xp="jax"),
    lambda: pn.LSTM(3, 4, xp="jax").to(dtype="float64"),
    lambda: pn.load("{path}", xp="jax"),
):
    print(tried(call))
jax.config.update("jax_enable_x64", True)
layer = pn.LayerNorm(3, xp="jax", dtype="float64")
print(layer(jax.numpy.ones((2, 3), dtype="float64")).dtype)
"""


@pytest.mark.peers
def test_a_type_that_jax_does_not_make_is_said_when_a_layer_is_made(tmp_path: Any) -> None:
    *errors, last = output_of(WITHOUT_X64.replace("{path}", str(tmp_path / "m.safetensors")), JAX_ENABLE_X64="0").splitlines()
    assert last == "float64"
    assert len(errors) == 8
    for error in errors:
        assert "`dtype` is float64, for which jax.numpy makes arrays of float32 here; " in error
        assert 'jax.config.update("jax_enable_x64", True)' in error
