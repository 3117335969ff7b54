"""bfloat16 in NumPy arrays: every call is that in float32 with its result rounded once, and layers go wherever those of other types go."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numba
import numpy as np
import pytest

import portnorm as pn
from portnorm.arrays import leaves
from portnorm.checkpoint import safetensors
from portnorm_backends.cpu.channelwise import same
from portnorm_backends.cpu.residuals import KernelResiduals
from tests.cases import LAYERS, OPS, PRESETS, OpCase, random_state
from tests.processes import output_of

NARROW = np.dtype(ml_dtypes.bfloat16)


def narrow(tree: Any) -> Any:
    return pn.arrays.mapped(lambda a: np.asarray(a).astype(NARROW) if getattr(a, "dtype", np.dtype(int)).kind == "f" else a, tree)


def wide(tree: Any) -> Any:
    return pn.arrays.mapped(lambda a: np.asarray(a).astype(np.float32) if getattr(a, "dtype", None) == NARROW else a, tree)


def assert_rounded(found: Any, expected: Any) -> None:
    """The values of float32, rounded once."""
    mine, theirs = [*leaves(found)], [*leaves(expected)]
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == (NARROW if b.dtype.kind == "f" else b.dtype)
        np.testing.assert_array_equal(a, narrow(b))


@pytest.mark.parametrize("case", OPS, ids=lambda case: case.name)
def test_an_op_is_that_of_float32_rounded_once(case: OpCase, rng: np.random.Generator) -> None:
    arguments = narrow(case.arguments(rng))
    y, pullback = pn.vjp(case.op, *arguments, **narrow(case.keywords))
    expected, expected_pullback = pn.vjp(case.op, *wide(arguments), **wide(narrow(case.keywords)))
    assert type(y) is np.ndarray
    assert_rounded(y, expected)
    dy = narrow(np.asarray(rng.standard_normal(y.shape)))
    assert_rounded(pullback(dy), expected_pullback(wide(dy)))


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("lengths", [None, [5, 2, 3]], ids=["whole", "ragged"])
@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_a_layer_is_that_of_float32_rounded_once(
    cell: str, norm: str | None, lengths: Any, training: bool, rng: np.random.Generator
) -> None:
    layer = LAYERS[cell](4, 3, norm=norm, t_max=4, bidirectional=True, dtype="bfloat16", rng=rng)
    twin = layer.to(dtype="float32")
    x, state = narrow((rng.standard_normal((5, 3, 4)), random_state(layer, 3, rng)))
    y, last, pullback = layer.vjp(x, state, lengths, training=training)
    their_y, their_last, their_pullback = twin.vjp(wide(x), wide(state), lengths, training=training)
    assert_rounded((y, last), (their_y, their_last))
    dy, dlast = narrow((rng.standard_normal(y.shape), tuple(rng.standard_normal(s.shape) for s in last[: len(layer.cell.states)])))
    assert_rounded(pullback(dy, dlast), their_pullback(wide(dy), wide(dlast)))
    for name, buffer in layer.buffers.items():
        np.testing.assert_array_equal(buffer, twin.buffers[name])
        assert buffer.dtype == twin.buffers[name].dtype
    assert_rounded(layer(x, state, lengths), twin(wide(x), wide(state), lengths))


def test_a_layer_has_the_parameters_of_its_type() -> None:
    model = pn.Sequential(pn.Embedding(7, 4, dtype="bfloat16", rng=0), pn.GRU(4, 3, norm="batch", dtype="bfloat16", rng=0))
    assert {a.dtype for a in model.params.values()} == {NARROW}
    assert {a.dtype for a in model.buffers.values()} == {np.dtype("float32"), np.dtype("int64")}
    ids = np.array([[0, 6], [2, 3]])
    y, _, pullback = model.vjp(ids, training=True)
    assert {a.dtype for a in (y, *pullback(y)[2].values())} == {NARROW}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parameters_may_be_wider_than_values(dtype: str, rng: np.random.Generator) -> None:
    """What mixed precision does: values in bfloat16, weights, and their gradients, in a type of more bits."""
    x, weight = narrow(rng.standard_normal((3, 8))), rng.uniform(0.5, 2, 8).astype(dtype)
    y, pullback = pn.vjp(pn.layer_norm, x, weight)
    dx, dweight = pullback(y)
    assert (y.dtype, dx.dtype, dweight.dtype) == (NARROW, NARROW, weight.dtype)
    assert_rounded(y, pn.layer_norm(wide(x), weight))
    assert pn.linear(x, weight[None, :].astype("float32")).dtype == np.float32
    assert pn.layer_norm(wide(x), narrow(np.ones(8))).dtype == np.float32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_values_for_a_wide_layer_are_refused(dtype: str) -> None:
    x = np.ones((2, 3), dtype=NARROW if dtype == "bfloat16" else dtype)
    for layer in (pn.Linear(3, 2), pn.LayerNorm(3), pn.BatchNorm(3)):
        with pytest.raises(pn.DTypeError, match=rf"`x` has dtype {dtype} but the layer has float32; .*layer\.to\(dtype='{dtype}'\)"):
            layer(x)


def test_out_takes_the_result(rng: np.random.Generator) -> None:
    x = narrow(rng.standard_normal((3, 8)))
    out = np.empty_like(x)
    assert pn.rms_norm(x, out=out) is out
    np.testing.assert_array_equal(out, pn.rms_norm(x))
    with pytest.raises(pn.DTypeError, match="`out` has dtype float32; expected bfloat16"):
        pn.rms_norm(x, out=wide(x))


def saved(model: pn.Layer, folder: Path) -> pn.Layer:
    pn.save(model, folder / "m.safetensors")
    stored, _ = safetensors.entries(folder / "m.safetensors")
    assert {stored[name].dtype for name in model.params} == {"bfloat16"}
    return pn.load(folder / "m.safetensors")


def exported(model: pn.Layer, folder: Path) -> pn.Layer:
    pn.export(model, folder / "m.onnx", target="tensorrt")
    return pn.load(folder / "m.onnx", dtype="bfloat16")


def imported(model: pn.Layer, folder: Path) -> pn.Layer:
    pn.save(model, folder / "m.safetensors")
    arrays, _ = safetensors.read(folder / "m.safetensors")
    again = pn.import_checkpoint(arrays, "torch", dtype="bfloat16")
    assert again.dtype == NARROW
    return again


WAYS: dict[str, Callable[[pn.Layer, Path], pn.Layer]] = {
    "copy": lambda model, _: model.copy(),
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "save": saved,
    "export": exported,
    "import": imported,
    "float64 and back": lambda model, _: model.to(dtype="float64").to(dtype=ml_dtypes.bfloat16),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_layer_stays_what_it_is(way: str, tmp_path: Path) -> None:
    model = pn.LSTM(4, 3, dtype="bfloat16", rng=0)
    other = WAYS[way](model, tmp_path)
    assert other.dtype == NARROW
    for name, a in model.state_dict().items():
        assert other.state_dict()[name].dtype == a.dtype
        np.testing.assert_array_equal(other.state_dict()[name], a)


@pytest.mark.parametrize(
    "model",
    [
        lambda: pn.LSTM(4, 3, norm="layer", dtype="bfloat16", rng=0),
        lambda: pn.Sequential(pn.Embedding(7, 4, dtype="bfloat16", rng=0), pn.GRU(4, 3, dtype="bfloat16", rng=0)),
        lambda: pn.RMSNorm(4, dtype="bfloat16"),
    ],
    ids=["LSTM", "Embedding and GRU", "RMSNorm"],
)
def test_onnxruntime_computes_the_same(model: Callable[[], pn.Layer], rng: np.random.Generator) -> None:
    layer = model()
    x = rng.integers(0, 7, (5, 2)) if layer.takes_integers else narrow(rng.standard_normal((5, 2, 4)))
    mine, theirs = (y[0] if layer.recurrent else y for y in (layer(x), pn.compile(layer)(x)))
    assert theirs.dtype == NARROW
    np.testing.assert_allclose(wide(theirs), wide(mine), rtol=2**-7, atol=2**-12)
    if not layer.takes_integers:
        with pytest.raises(pn.DTypeError, match="`x` has dtype float32"):
            pn.compile(layer)(wide(x))


def test_a_layer_is_trained(rng: np.random.Generator) -> None:
    model = pn.Sequential(
        pn.LSTM(2, 8, norm="layer", return_sequences=False, dtype="bfloat16", rng=0), pn.Linear(8, 2, dtype="bfloat16", rng=0)
    )
    x = narrow(rng.standard_normal((6, 32, 2)))
    labels = (wide(x).sum((0, 2)) > 0).astype(int)
    adam = pn.Adam(lr=0.03)
    state, losses = adam.init(model.parameters()), []
    for _ in range(30):
        logits, _, pullback = model.vjp(x, training=True)
        loss, loss_pullback = pn.vjp(pn.softmax_cross_entropy, logits, labels)
        grads, _ = pn.clip_by_global_norm(pullback(loss_pullback(NARROW.type(1))[0])[2], 1.0)
        params, state = adam.update(model.parameters(), grads, state)
        model.assign(params)
        losses.append(float(loss))
    assert {a.dtype for a in model.params.values()} == {NARROW}
    assert losses[-1] < losses[0] / 2


def test_without_its_package_the_error_says_what_brings_it() -> None:
    code = """
import sys
sys.modules["ml_dtypes"] = None
import portnorm as pn
try:
    pn.LSTM(3, 4, dtype="bfloat16")
except pn.MissingExtraError as error:
    print(error)
"""
    assert output_of(code).endswith('pip install ".[bfloat16]" in a checkout of portnorm')


FORMS: dict[str, tuple[Any, tuple[int, ...], int | tuple[int, ...], dict[str, Any]]] = {
    "rows": (pn.layer_norm, (5, 70), 70, {}),
    "rows of one value for each gain": (pn.layer_norm, (3, 2, 35), (2, 35), {"axis": (1, 2)}),
    "rows without a mean": (pn.rms_norm, (4, 33), 33, {}),
    "groups": (pn.group_norm, (3, 4, 35), 4, {}),
    "cases": (pn.instance_norm, (3, 4, 35), 4, {}),
    "channels": (pn.batch_norm, (6, 3, 35), 3, {}),
    "columns": (pn.batch_norm, (70, 35), 35, {}),
}


@pytest.mark.parametrize("wide_parameters", [False, True], ids=["all", "values"])
@pytest.mark.parametrize("form", FORMS)
def test_kernels_read_and_write_its_bits(form: str, wide_parameters: bool, rng: np.random.Generator) -> None:
    """Values of mean 3, whole and mixed: the kernel of float32 gives what is rounded, and nothing of the size of x is made wide."""
    op, shape, parameters, how = FORMS[form]
    more = (2,) if form == "groups" else ()
    x = narrow(3 + rng.standard_normal(shape).astype(np.float32))
    count = 1 if form == "rows without a mean" else 2
    own = [rng.uniform(0.5, 2.0, parameters).astype(np.float32) for _ in range(count)]
    own = own if wide_parameters else narrow(own)
    y, residuals = op.forward(x, *more, *own, **how)
    assert isinstance(residuals, KernelResiduals)
    assert residuals.x.dtype == NARROW
    expected, their = op.forward(wide(x), *more, *wide(own), **how)
    assert isinstance(their, KernelResiduals)
    assert_rounded(y, expected)
    dy = narrow(rng.standard_normal(shape))
    for given in (dy, wide(dy) * np.float32(1.001)):  # a cotangent of more bits is not rounded
        of_x, *of_parameters = (d for d in op.vjp(residuals, given, **how) if d is not None)
        of_wide, *of_wide_parameters = (d for d in op.vjp(their, wide(given), **how) if d is not None)
        assert of_x.dtype == given.dtype
        np.testing.assert_array_equal(wide(of_x), wide(of_wide.astype(given.dtype)))
        for found, true, p in zip(of_parameters, of_wide_parameters, own, strict=True):
            assert found.dtype == p.dtype
            np.testing.assert_array_equal(wide(found), wide(true.astype(p.dtype)))


def test_kernels_round_as_the_type_does() -> None:
    """To the nearest, ties to even; the smallest numbers, infinities and what is no number too."""
    bits = np.arange(2**16, dtype=np.uint32)
    between = np.concatenate([(bits << 16) | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).view(np.float32)
    found = np.empty(between.shape, np.uint16)
    _copied(between.size, between, found)
    with np.errstate(invalid="ignore"):
        expected = between.astype(NARROW)
    nothing = np.isnan(between)
    np.testing.assert_array_equal(np.isnan(found.view(NARROW).astype(np.float32)), nothing)
    np.testing.assert_array_equal(found[~nothing], expected.view(np.uint16)[~nothing])
    back = np.empty_like(between)
    _copied(found.size, found, back)
    np.testing.assert_array_equal(back, found.view(NARROW).astype(np.float32))


@numba.njit
def _copied(n: int, x: Any, y: Any) -> None:
    same(n, (x,), (y,))
