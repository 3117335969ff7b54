"""The CUDA kernels against the definitions: on the CPU, where g++ compiles the same sources and a stand-in plays CuPy, and on a GPU.

`emulated` runs wherever there is a g++, `gpu` where CuPy finds a device; what cannot run is skipped, and counted in the last line.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

import portnorm as pn
from benchmarks import gpu
from portnorm.arrays import leaves, mapped, without_kernels
from portnorm.norm.normalize import Normalized, normalize
from portnorm.scan import scan
from tests import test_libraries, test_normalize, test_optimizers
from tests.cases import COMBINATIONS, IMPLEMENTATIONS, LAYERS, OPS, PRESETS, OpCase, random_recurrent, random_state
from tests.conftest import LIBRARIES
from tests.cuda import fake_cupy
from tests.processes import output_of
from tests.tolerances import LARGE_MEAN, OPERATION, RECURRENT

CUPY = LIBRARIES["cupy"]
SOURCES = Path(__file__).parent.parent / "backends" / "portnorm_backends" / "cuda"
DTYPES: dict[str, Any] = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.fixture(scope="module", params=["emulated", "gpu"])
def cupy(request: pytest.FixtureRequest) -> Iterator[Any]:
    """CuPy, or what plays it."""
    if request.param == "emulated":
        with fake_cupy.installed() as fake:
            yield fake
        return
    real = pytest.importorskip("cupy", reason="CuPy is not installed: no kernel ran on a GPU")
    if real.cuda.runtime.getDeviceCount() == 0:
        pytest.skip("there is no GPU: no kernel ran on one")
    yield real


@pytest.fixture
def emulated(cupy: Any) -> Any:
    if not isinstance(cupy, ModuleType) or not hasattr(cupy, "RawModule") or cupy.RawModule is not fake_cupy.RawModule:
        pytest.skip("only the stand-in counts what happens on the device")
    return cupy


def kernel_residuals() -> tuple[type, type]:
    """The types by which one sees that a kernel computed."""
    modules = (importlib.import_module(f"portnorm_backends.cuda.{name}") for name in ("normalize", "recurrent"))
    return tuple(  # type: ignore[return-value]
        getattr(module, name) for module, name in zip(modules, ("KernelResiduals", "ScanKernelResiduals"), strict=True)
    )


def assert_close(found: Any, expected: Any, dtype: str, factor: float = 1.0) -> None:
    values = found.get()
    assert values.dtype == DTYPES[dtype]
    assert values.shape == expected.shape
    tolerance = OPERATION[dtype] * factor * max(1.0, float(np.max(np.abs(expected), initial=0.0)))
    np.testing.assert_allclose(values.astype(np.float64), expected, rtol=0, atol=tolerance)


def assert_normalizes(cupy: Any, dtype: str, x: Any, weight: Any, bias: Any, dy: Any, **attrs: Any) -> None:
    """A kernel takes these arguments, and its values and cotangents are those of the definition in float64."""
    arrays = [None if a is None else np.asarray(a).astype(DTYPES[dtype]) for a in (x, weight, bias, dy)]
    theirs = [None if a is None else cupy.asarray(a) for a in arrays]
    wide = [None if a is None else a.astype(np.float64) for a in arrays]
    y, residuals = normalize.forward(*theirs[:3], **attrs)
    assert type(residuals) is kernel_residuals()[0]
    expected, kept = normalize.definition(*wide[:3], **attrs)
    assert_close(y, expected, dtype)
    with without_kernels(np.ndarray):
        cotangents = normalize.vjp(kept, wide[3], **attrs)
    for a, b in zip(normalize.vjp(residuals, theirs[3], **attrs), cotangents, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert_close(a, b, dtype)


def drawn(rng: np.random.Generator, shape: tuple[int, ...], params: tuple[int, ...], mean: float = 8.0) -> tuple[Any, Any, Any, Any]:
    """x with |mean| ≫ std, gain, shift and cotangent."""
    return mean + rng.standard_normal(shape), rng.uniform(0.5, 2.0, params), rng.standard_normal(params), rng.standard_normal(shape)


# -- rows --------------------------------------------------------------------------------------------------------------------------------

LENGTHS = (1, 2, 3, 8, 31, 32, 33, 64, 100, 128, 255, 256, 257, 512, 1000, 1024, 4096, 5000, 8192, 8193, 16384, 16385, 2**17)


@pytest.mark.parametrize(
    ("length", "dtype"),
    [
        *((n, "float32") for n in LENGTHS),
        *(pytest.param(2**20, dtype, marks=pytest.mark.slow) for dtype in ("float32", "float16", "bfloat16")),
        *((n, "float64") for n in LENGTHS if n <= 8192),  # longer ones go to the definition
        *((n, "float16") for n in LENGTHS[1::2]),
        *((n, "bfloat16") for n in LENGTHS[::2]),
    ],
)
def test_rows(cupy: Any, dtype: str, length: int, rng: np.random.Generator) -> None:
    for rows in (1, 2, 67) if length <= 1024 else (3,) if length <= 16384 else (2,):
        x, weight, bias, dy = drawn(rng, (rows, length), (length,))
        attrs: dict[str, Any] = {"axes": (1,), "param_axes": (1,), "eps": 0.1 if length == 1 else 1e-5}
        for gain, shift in ((weight, bias), (None, bias), (weight, None), (None, None))[: 4 if rows == 2 or length > 1024 else 1]:
            assert_normalizes(cupy, dtype, x, gain, shift, dy, **attrs)
        assert_normalizes(cupy, dtype, x, weight, None, dy, center=False, **attrs)


@pytest.mark.parametrize("dtype", ["float32", *(pytest.param(name, marks=pytest.mark.slow) for name in ("float64", "float16"))])
@pytest.mark.parametrize(
    ("shape", "axes", "params"),
    [
        ((3, 2, 4, 5, 6), (2, 3, 4), (1, 2)),  # group normalization
        ((3, 2, 4, 3), (2, 3), (1, 2)),  # the same with few neighbours, which a pack of values crosses
        ((5, 4, 8), (2,), (1, 2)),  # the same without space
        ((3, 5, 7, 9), (2, 3), (1,)),  # instance normalization
        ((3, 5, 64), (2,), (1,)),
        ((2, 3, 4000), (2,), (1,)),
        ((2, 3, 4), (1, 2), (1, 2)),
        ((2, 3, 2, 9001), (2, 3), (1, 2)),  # long rows
        ((2, 2, 17000), (2,), (1,)),
        ((2, 17000), (1,), (1,)),
        ((1100, 40), (1,), (1,)),  # more rows than are added at a time
        ((3000, 2, 6), (2,), (1, 2)),
        ((700, 3, 40), (2,), (1,)),
    ],
)
def test_layouts_of_gain_and_shift(
    cupy: Any, dtype: str, shape: tuple[int, ...], axes: tuple[int, ...], params: tuple[int, ...], rng: np.random.Generator
) -> None:
    if dtype == "float64" and np.prod([shape[a] for a in axes]) > 8192:
        pytest.skip("rows of float64 that do not fit into registers go to the definition")
    x, weight, bias, dy = drawn(rng, shape, tuple(shape[a] for a in params))
    for gain, shift in ((weight, bias), (weight, None), (None, bias)):
        assert_normalizes(cupy, dtype, x, gain, shift, dy, axes=axes, param_axes=params, eps=1e-5)


@pytest.mark.parametrize("length", [64, 1024, 20000])
def test_rows_that_start_anywhere(cupy: Any, length: int, rng: np.random.Generator) -> None:
    """A packed kernel needs addresses that are multiples of 16."""
    x, weight, bias, dy = (a.astype(np.float32) for a in drawn(rng, (3, length), (length,)))
    expected = {}
    for offset in (0, 1):
        arrays = []
        for a in (x, weight, bias, dy):
            room = cupy.asarray(np.concatenate([np.zeros(offset, np.float32), a.ravel()]))
            arrays.append(cupy.reshape(room[offset:], a.shape))
        y, pullback = pn.vjp(pn.layer_norm, *arrays[:3])
        expected[offset] = [a.get() for a in (y, *pullback(arrays[3]))]
    for a, b in zip(*expected.values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=OPERATION["float32"] * np.max(np.abs(a)))


@pytest.mark.parametrize("shape", [(4, 33), (3, 1000), (2, 4096), (2, 17000)], ids=str)
def test_rows_with_a_mean_of_a_million_standard_deviations(cupy: Any, shape: tuple[int, int], rng: np.random.Generator) -> None:
    x = rng.normal(1e4, 0.01, shape).astype(np.float32)
    expected = normalize.definition(x.astype(np.float64), axes=(1,), param_axes=(1,), eps=1e-5)[0]
    y = normalize(cupy.asarray(x), axes=(1,), param_axes=(1,), eps=1e-5)
    np.testing.assert_allclose(y.get(), expected, rtol=0, atol=LARGE_MEAN * np.max(np.abs(expected)))


@pytest.mark.parametrize(("shape", "axes", "params"), [((2, 33), (1,), (1,)), ((2, 17001), (1,), (1,)), ((40, 3), (0,), (1,))])
@pytest.mark.parametrize("value", [0.1, -12345.67, 1e38, 1e-40])
def test_a_constant_row_gives_the_shift(
    cupy: Any, shape: tuple[int, int], axes: tuple[int, ...], params: tuple[int, ...], value: float, rng: np.random.Generator
) -> None:
    bias = rng.standard_normal(shape[params[0]]).astype(np.float32)
    x = cupy.asarray(np.full(shape, value, np.float32))
    y = normalize(x, None, cupy.asarray(bias), axes=axes, param_axes=params, eps=1e30 if abs(value) > 1e30 else 1e-5)
    np.testing.assert_array_equal(y.get(), np.broadcast_to(bias, shape))


@pytest.mark.parametrize(("shape", "axes", "params"), [((5, 33), (1,), (1,)), ((5, 17001), (1,), (1,)), ((40, 5), (0,), (1,))])
def test_squares_that_leave_the_type(
    cupy: Any, shape: tuple[int, int], axes: tuple[int, ...], params: tuple[int, ...], rng: np.random.Generator
) -> None:
    sizes = np.array([1e-36, 1e-25, 1.0, 1e20, 1e37])
    x = (rng.standard_normal(shape) * (sizes[:, None] if axes == (1,) else sizes)).astype(np.float32)
    dy = rng.standard_normal(shape).astype(np.float32)
    attrs: dict[str, Any] = {"axes": axes, "param_axes": params, "eps": 0.0}
    y, residuals = normalize.forward(cupy.asarray(x), **attrs)
    expected, kept = normalize.definition(x.astype(np.float64), **attrs)
    np.testing.assert_allclose(y.get(), expected, rtol=0, atol=5 * OPERATION["float32"])
    dx, cotangent = normalize.vjp(residuals, cupy.asarray(dy), **attrs)[0].get(), normalize.vjp(kept, dy.astype(np.float64), **attrs)[0]
    scale = np.max(np.abs(cotangent), axis=axes, keepdims=True)
    np.testing.assert_allclose(dx / scale, cotangent / scale, rtol=0, atol=5 * OPERATION["float32"])


# -- channels ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("shape", "channel"),
    [
        *(((rows, channels), 1) for rows in (2, 3, 67, 700) for channels in (1, 3, 32, 33, 128)),
        ((9000, 5), 1),
        ((2, 3, 4, 2), 1),
        ((4, 5, 7, 7), 1),
        ((3, 2, 32, 32), 1),
        ((2, 16, 9), 1),
        ((1, 3, 17000), 1),
        ((5, 6, 4), 2),
        ((4, 3000), 0),
        ((300, 7, 40), 0),
    ],
)
def test_channels(cupy: Any, dtype: str, shape: tuple[int, ...], channel: int, rng: np.random.Generator) -> None:
    # One variance of two values can be small by chance, and the cotangent large.
    x, weight, bias, dy = drawn(rng, shape, (shape[channel],))
    axes = tuple(a for a in range(len(shape)) if a != channel)
    attrs: dict[str, Any] = {"axes": axes, "param_axes": (channel,), "eps": 0.1 if shape[0] < 4 else 1e-5}
    assert_normalizes(cupy, dtype, x, weight, bias, dy, **attrs)
    assert_normalizes(cupy, dtype, x, None, bias, dy, center=False, **attrs)
    x = x.astype(DTYPES[dtype])
    mean, var = normalize.forward(cupy.asarray(x), **attrs)[1].statistics()
    np.testing.assert_allclose(mean.get(), np.mean(x.astype(np.float64), axis=axes, keepdims=True), rtol=OPERATION["float32"])
    np.testing.assert_allclose(var.get(), np.var(x.astype(np.float64), axis=axes, keepdims=True), rtol=2 * OPERATION["float32"])


@pytest.mark.parametrize("shape", [(2000, 5), (8, 5, 30, 30)], ids=str)
def test_channels_with_a_mean_of_a_million_standard_deviations(cupy: Any, shape: tuple[int, ...], rng: np.random.Generator) -> None:
    x = rng.normal(1e4, 0.01, shape).astype(np.float32)
    expected = pn.batch_norm(x.astype(np.float64))
    np.testing.assert_allclose(pn.batch_norm(cupy.asarray(x)).get(), expected, rtol=0, atol=LARGE_MEAN * np.max(np.abs(expected)))


# -- what a call of the library sees -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [pytest.param("float16", marks=pytest.mark.slow), "float32", "float64"])
@pytest.mark.parametrize("case", OPS, ids=lambda case: case.name)
def test_op(cupy: Any, case: OpCase, dtype: str, rng: np.random.Generator) -> None:
    test_libraries.test_op(case, CUPY, dtype, rng)


@pytest.mark.parametrize(
    "case", [case for case in OPS if "norm" in case.name or case.op in (pn.linear, pn.embedding)], ids=lambda c: c.name
)
def test_functions_of_bfloat16(cupy: Any, case: OpCase, rng: np.random.Generator) -> None:
    """By a kernel or by the definition, whatever CuPy makes of ml_dtypes' type; every array that a public function gives back has it."""

    def narrow(value: Any) -> Any:
        return value.astype(ml_dtypes.bfloat16) if isinstance(value, np.ndarray) and value.dtype == np.float64 else value

    def wide(value: Any) -> Any:
        return value.astype(np.float64) if isinstance(value, np.ndarray) and value.dtype == ml_dtypes.bfloat16 else value

    def theirs(value: Any) -> Any:
        return cupy.asarray(value) if isinstance(value, np.ndarray) else value

    # Without the mean of 30, beside which 8 bits hold nothing of the values.
    arguments = [narrow(a - 30.0 if k == 0 and a.size and a.mean() > 20 else a) for k, a in enumerate(case.arguments(rng))]
    keywords = {k: narrow(v - 30.0 if k == "mean" else v) for k, v in case.keywords.items()}
    expected, expected_pullback = pn.vjp(case.op, *map(wide, arguments), **{k: wide(v) for k, v in keywords.items()})
    dy = narrow(rng.standard_normal(expected.shape))
    y, pullback = pn.vjp(case.op, *map(theirs, arguments), **{k: theirs(v) for k, v in keywords.items()})
    for mine, other in zip((expected, *expected_pullback(wide(dy))), (y, *pullback(theirs(dy))), strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            assert_close(other, mine, "bfloat16")


def test_bfloat16_is_a_floating_type_of_cupy(cupy: Any) -> None:
    xp, own = CUPY.xp, np.dtype(ml_dtypes.bfloat16)
    assert [kind for kind in ("bool", "integral", "real floating", "complex floating", "numeric") if xp.isdtype(own, kind)] == [
        "real floating",
        "numeric",
    ]
    assert xp.isdtype(own, ("integral", own))
    assert not xp.isdtype(own, ("integral", np.dtype("float32")))
    assert not xp.isdtype(np.dtype("float32"), own)
    assert (xp.finfo(own).bits, float(xp.finfo(own).eps)) == (16, 2.0**-7)
    assert xp.finfo(np.float16).bits == 16
    # The names of a library are those that all of its functions and layers take.
    for given in ("bfloat16", own):
        with pytest.raises(pn.DTypeError, match=r"`dtype` is '?bfloat16'?[,;] .*; bfloat16 is a type of numpy, torch, jax and mlx"):
            pn.LSTM(2, 3, xp=xp, dtype=given)


@pytest.mark.parametrize("center", [True, False])
def test_public_normalizations_of_bfloat16_run_as_kernels(emulated: Any, center: bool, rng: np.random.Generator) -> None:
    x, weight, bias, dy = (emulated.asarray(a.astype(ml_dtypes.bfloat16)) for a in drawn(rng, (6, 16), (16,)))
    fake_cupy.counts.launches.clear()
    y, pullback = pn.vjp(pn.layer_norm, x, weight, bias) if center else pn.vjp(pn.rms_norm, x, weight)
    cotangents = pullback(dy)
    assert [a.dtype.name for a in (y, *cotangents)] == ["bfloat16"] * len((y, *cotangents))
    forward, backward, sums = fake_cupy.counts.launches
    assert forward.startswith("rows_forward<__nv_bfloat16, __nv_bfloat16, 8,")
    assert backward.startswith("rows_backward<__nv_bfloat16, __nv_bfloat16, 8,")
    assert sums == "sum_parts<__nv_bfloat16>"


def test_the_row_of_the_library_is_true(cupy: Any) -> None:
    test_libraries.test_the_row_of_a_library_is_true(CUPY)


@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_a_layer_moves_here_and_back(cupy: Any, cell: str, norm: str | None, rng: np.random.Generator) -> None:
    test_libraries.test_layer_moves_between_libraries(cell, norm, CUPY, rng)


@pytest.mark.parametrize("optimizer", [pn.SGD(0.1, momentum=0.5), pn.RMSProp(0.1), pn.Adam(0.1)], ids=lambda o: type(o).__name__)
def test_optimizer(cupy: Any, optimizer: Any, rng: np.random.Generator) -> None:
    test_libraries.test_optimizer(optimizer, CUPY, rng)
    test_optimizers.test_arrays_of_a_library_change_in_place_or_are_refused("adam", CUPY)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_clipping(cupy: Any, size: float, rng: np.random.Generator) -> None:
    test_libraries.test_clipping_keeps_the_direction_of_gradients_of_any_size(size, CUPY, rng)


def test_large_mean_in_float32(cupy: Any, rng: np.random.Generator) -> None:
    test_normalize.test_large_mean_in_float32(CUPY, rng)


@pytest.mark.parametrize("name", test_normalize.OUT)
def test_out_takes_the_result(cupy: Any, name: str, rng: np.random.Generator) -> None:
    test_normalize.test_out_takes_the_result(name, CUPY, rng)


def test_what_no_kernel_takes_goes_to_the_definition(cupy: Any, rng: np.random.Generator) -> None:
    x, mask = cupy.asarray(rng.standard_normal((6, 8))), cupy.asarray(rng.uniform(size=(6, 8)) < 0.7)
    rows: dict[str, Any] = {"axes": (1,), "param_axes": (1,), "eps": 1e-5}
    assert type(normalize.forward(x, **rows)[1]) is kernel_residuals()[0]
    for attrs in ({"mask": mask}, {"correction": 1}, {"eps_place": "std"}, {"reduce": lambda a: a}):
        assert type(normalize.forward(x, **rows, **attrs)[1]) is Normalized
    assert type(normalize.forward(cupy.permute_dims(x, (1, 0)), **rows)[1]) is Normalized
    assert type(normalize.forward(x, axes=(0,), param_axes=(1,), eps=1e-5)[1]) is Normalized  # channels in float64


def test_out_is_what_is_written_to(cupy: Any, rng: np.random.Generator) -> None:
    x, weight, bias, _ = (cupy.asarray(a.astype(np.float32)) for a in drawn(rng, (6, 8), (8,)))
    for norm in (pn.layer_norm, pn.batch_norm):
        expected = norm(x, weight, bias).get()
        fresh, own = cupy.empty((6, 8), dtype=np.float32), cupy.asarray(x.get())
        strided = cupy.asarray(np.zeros((6, 16), np.float32))[:, ::2]
        for given, out in ((x, fresh), (own, own), (x, strided)):
            assert norm(given, weight, bias, out=out) is out
            np.testing.assert_array_equal(out.get(), expected)


def test_gain_shift_and_cotangent_of_another_dtype(cupy: Any, rng: np.random.Generator) -> None:
    x, weight, bias, dy = drawn(rng, (5, 24), (24,))
    half = x.astype(np.float16)
    y, pullback = pn.vjp(pn.layer_norm, cupy.asarray(half), cupy.asarray(weight.astype(np.float32)), cupy.asarray(bias.astype(np.float16)))
    cotangents = pullback(cupy.asarray(dy.astype(np.float16)))
    assert [c.dtype.name for c in (y, *cotangents)] == ["float16", "float16", "float32", "float16"]
    expected, expected_pullback = pn.vjp(pn.layer_norm, half.astype(np.float64), weight, bias)
    for a, b in zip((y, *cotangents), (expected, *expected_pullback(dy)), strict=True):
        np.testing.assert_allclose(a.get(), b, atol=OPERATION["float16"] * np.max(np.abs(b)))


# -- recurrent layers --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("lengths", [None, [5, 2, 3]], ids=["whole", "ragged"])
@pytest.mark.parametrize("both", [pytest.param(False, id="forward"), pytest.param(True, id="both directions", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("cell", "norm"),
    [*PRESETS, *(pytest.param(*row, marks=pytest.mark.slow) for row in IMPLEMENTATIONS if row[1] != "fastrnns-decomposed")],
)
def test_recurrent(cupy: Any, cell: str, norm: str | None, both: bool, lengths: Any, training: bool, rng: np.random.Generator) -> None:
    test_libraries.test_recurrent(cell, norm, both, lengths, training, CUPY, rng)


@pytest.mark.slow
@pytest.mark.parametrize(("cell", "variant"), [pytest.param(*row.values, id=row.id) for row in COMBINATIONS])
def test_any_row_that_a_user_may_write(cupy: Any, cell: str, variant: pn.Variant, rng: np.random.Generator) -> None:
    for training in (False, True):
        test_libraries.test_recurrent(cell, variant, False, [5, 2, 3], training, CUPY, rng)


class Size(NamedTuple):
    steps: int
    batch: int
    hidden: int


SIZES = (Size(1, 1, 1), Size(3, 2, 31), Size(2, 33, 32), Size(2, 3, 100), Size(2, 70, 9), Size(2, 2, 513), Size(2, 1, 2049))


@pytest.mark.parametrize("size", [pytest.param(s, id=str(s), marks=[pytest.mark.slow] if s.hidden > 100 else []) for s in SIZES])
@pytest.mark.parametrize(
    ("cell", "norm", "dtype"),
    [
        *((cell, norm, "float32") for cell, norm in (("LSTM", None), ("LSTM", "layer-gates"), ("GRU", None), ("RNN", "layer"))),
        *(
            (cell, norm, dtype)
            for cell, norm in (("LSTM", "layer"), ("LSTM", "batch"), ("GRU", "layer"))
            for dtype in ("float32", "float16")
        ),
    ],
)
def test_recurrent_sizes(cupy: Any, cell: str, norm: str | None, size: Size, dtype: str, rng: np.random.Generator) -> None:
    """Rows of every number of hidden units for each thread, and batches of more rows than a block has."""
    if norm == "batch" and size.batch < (3 if dtype == "float32" else 32):
        pytest.skip("statistics of few sequences amplify rounding; those of one are an error")
    reference = random_recurrent(cell, norm, rng, inputs=2, hidden=size.hidden, hidden_init="uniform")
    small = 0.3 if size.hidden < 100 else 0.05
    reference.assign({n: (p if "norm" in n else small * p).astype(dtype).astype(np.float64) for n, p in reference.parameters().items()})
    layer = LAYERS[cell](2, size.hidden, norm=norm, t_max=4, hidden_init="uniform", xp=CUPY.xp, dtype=dtype)
    layer.load_state_dict(reference.state_dict())
    x, state = rng.standard_normal((size.steps, size.batch, 2)), random_state(reference, size.batch, rng)
    x, *state = (a.astype(dtype).astype(np.float64) if a.ndim else a for a in (x, *state))
    n = len(layer.cell.states)
    theirs = tuple(layer._new(s, integer=s.ndim == 0) for s in state)
    y, _, pullback = reference.vjp(x, tuple(state), training=True)
    dy = rng.standard_normal(y.shape).astype(dtype).astype(np.float64)
    their_y, _, their_pullback = layer.vjp(layer._new(x), theirs, training=True)
    dx, dstate, grads = pullback(dy)
    their_dx, their_dstate, their_grads = their_pullback(layer._new(dy))
    pairs = [(their_y, y), (their_dx, dx), *zip(their_dstate[:n], dstate[:n], strict=True), *((their_grads[k], grads[k]) for k in grads)]
    for a, b in pairs:
        tolerance = RECURRENT[dtype] * max(1.0, float(np.max(np.abs(b))))
        np.testing.assert_allclose(a.get().astype(np.float64), b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("ragged", [False, True], ids=["whole", "ragged"])
@pytest.mark.parametrize(
    ("cell", "norm"),
    [*((cell, norm) for cell in LAYERS for norm in (None, "layer", "batch")), ("LSTM", "layer-gates"), ("LSTM", "layer-state")],
)
def test_loops_of_bfloat16(cupy: Any, cell: str, norm: str | None, ragged: bool, rng: np.random.Generator) -> None:
    """The kernels of the time loop by themselves: layers of CuPy have no bfloat16."""
    layer, batch = random_recurrent(cell, norm, rng, hidden=9), 40
    direction = layer.places()[0][2]
    of_one_step = direction.cells[True]
    params = direction._loop_params(of_one_step, {name.replace("_l0", ""): a for name, a in layer.params.items()})
    state = tuple(rng.standard_normal((batch, 9)) for _ in of_one_step.states)
    dstate = tuple(rng.standard_normal((batch, 9)) for _ in of_one_step.states)
    u, dy = rng.standard_normal((3, batch, of_one_step.gates * 9)), rng.standard_normal((3, batch, 9))
    lengths = rng.permutation(np.arange(batch) % 4) if ragged else None
    given = mapped(lambda a: a.astype(ml_dtypes.bfloat16), ((u,), state, params, dstate, dy))

    def run(arrays: Any, lengths: Any) -> tuple[Any, list[Any]]:
        *arguments, dstate, dy = arrays
        found, kept = scan.forward(*arguments, cell=of_one_step, lengths=lengths)
        return kept, [*leaves(found), *leaves(scan.vjp(kept, (dstate, dy), cell=of_one_step, lengths=lengths))]

    with without_kernels(np.ndarray):
        _, expected = run(mapped(lambda a: a.astype(np.float64), given), lengths)
    kept, found = run(mapped(cupy.asarray, given), None if lengths is None else cupy.asarray(lengths))
    assert type(kept) is kernel_residuals()[1]
    outputs = len(of_one_step.states) + 1  # what follows them are statistics
    statistics = range(outputs, outputs + 2 * len(of_one_step.slots) * (norm == "batch"))
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == (np.float32 if k in statistics else ml_dtypes.bfloat16)
        np.testing.assert_allclose(a.get().astype(np.float64), b, rtol=0, atol=RECURRENT["bfloat16"] * max(1.0, float(np.max(np.abs(b)))))


def test_scan_is_taken_by_its_kernel(cupy: Any, rng: np.random.Generator) -> None:
    from portnorm.scan import ScanResiduals

    rows = (("layer", True), ("batch", True), ("tf-contrib-peephole", False), ("kiros-torch", False), ("batch", False))
    for norm, taken in rows:
        parted = norm == "batch" and not taken
        layer = pn.LSTM(3, 4, norm=norm, xp=CUPY.xp, rng=0, reduce=(lambda a: a) if parted else None)
        first = layer._new(rng.standard_normal((5, 2, 3)))
        state, time = layer._starts(layer.params, first), layer._placed(layer.buffers, first, None).time
        direction = layer.places()[0][2]
        params, buffers = ({n.replace("_l0", ""): a for n, a in group.items()} for group in (layer.params, layer.buffers))
        x = layer._new(rng.standard_normal((5, 2, 3)))
        kept = direction.forward(params, buffers, x, state[0], time=time, training=True, momentum=0.1)[3].scan
        assert type(kept) is (kernel_residuals()[1] if taken else ScanResiduals)


@pytest.mark.parametrize("norm", [None, "layer", "batch"])
def test_inference_equals_the_forward_pass_of_training(cupy: Any, norm: str | None, rng: np.random.Generator) -> None:
    """Without residuals one buffer serves all steps."""
    layer = pn.LSTM(3, 5, norm=norm, xp=CUPY.xp, rng=0)
    x = layer._new(rng.standard_normal((6, 4, 3)))
    for lengths in (None, [6, 1, 0, 3]):
        for layer.keeps_time in (True, False):
            y, last, _ = layer.vjp(x, lengths=lengths)
            alone, alone_last = layer(x, lengths=lengths)
            for a, b in zip((y, *last), (alone, *alone_last), strict=True):
                np.testing.assert_array_equal(a.get(), b.get())


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_one_launch_for_each_step_and_no_waiting(emulated: Any, norm: str, rng: np.random.Generator) -> None:
    layer = pn.LSTM(3, 5, norm=norm, xp=CUPY.xp, rng=0)
    found = []
    for steps in (4, 9):
        x, lengths = layer._new(rng.standard_normal((steps, 4, 3))), emulated.asarray(np.array([steps, 1, 2, steps]))
        fake_cupy.counts.launches.clear()
        waited = fake_cupy.counts.synchronizations
        y, _, pullback = layer.vjp(x, lengths=lengths, training=True)
        pullback(y)
        found.append((len(fake_cupy.counts.launches), fake_cupy.counts.synchronizations - waited))
    (few, once), (many, again) = found
    assert many - few == 2 * (9 - 4)
    assert once == again


# -- the kernels as programs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [3, 40, 300, 5000])
def test_rows_do_not_depend_on_the_order_of_threads(
    emulated: Any, length: int, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """A barrier that is missing would show: blocks, warps and lanes the other way round give the same bits."""
    x, weight, bias, dy = (emulated.asarray(a.astype(np.float32)) for a in drawn(rng, (9, length), (length,)))

    def run() -> list[Any]:
        y, pullback = pn.vjp(pn.layer_norm, x, weight, bias)
        wide, wide_pullback = pn.vjp(pn.group_norm, emulated.reshape(x, (3, 3, length)), 3, weight[:3], bias[:3])
        channels, channels_pullback = pn.vjp(pn.batch_norm, x, weight, bias)
        maps, maps_pullback = pn.vjp(pn.batch_norm, emulated.reshape(x, (3, 3, length)), weight[:3], bias[:3])
        cotangents = [*pullback(dy), *wide_pullback(wide)[2:], *channels_pullback(dy), *maps_pullback(maps)]
        return [a.get() for a in (y, wide, channels, maps, *cotangents)]

    expected = run()
    monkeypatch.setattr(fake_cupy, "backwards", True)
    for a, b in zip(run(), expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_long_rows_do_not_depend_on_the_order_of_threads(emulated: Any, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    x, weight, bias, dy = (emulated.asarray(a.astype(np.float32)) for a in drawn(rng, (2, 17000), (17000,)))
    found = []
    for backwards in (False, True):
        monkeypatch.setattr(fake_cupy, "backwards", backwards)
        y, pullback = pn.vjp(pn.layer_norm, x, weight, bias)
        found.append([a.get() for a in (y, *pullback(dy))])
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("hidden", [9, pytest.param(600, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("cell", "norm"), [("LSTM", "layer"), ("LSTM", "layer-gates"), ("LSTM", "batch"), ("GRU", "layer"), ("GRU", "batch")]
)
def test_steps_do_not_depend_on_the_order_of_threads(
    emulated: Any, cell: str, norm: str, hidden: int, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    layer = LAYERS[cell](2, hidden, norm=norm, t_max=4, hidden_init="uniform", xp=CUPY.xp, rng=0)
    x = layer._new(rng.standard_normal((3, 40 if hidden < 100 else 2, 2)))

    def run() -> list[Any]:
        y, last, pullback = layer.copy().vjp(x, training=True)
        dx, _, grads = pullback(y)
        return [a.get() for a in (y, last[0], dx, *grads.values())]

    expected = run()
    monkeypatch.setattr(fake_cupy, "backwards", True)
    for a, b in zip(run(), expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_structure_of_a_step_is_the_same_on_both_sides(emulated: Any) -> None:
    text = re.search(r"struct Step \{(.*?)\n\};", (SOURCES / "recurrent.cu").read_text(), re.DOTALL)
    assert text is not None
    lines = [line.partition("//")[0].strip() for line in text[1].splitlines()]
    names = [name for line in lines for name in re.findall(r"(\w+)\s*[,;]", line)]
    assert names == list(importlib.import_module("portnorm_backends.cuda.recurrent").STEP.names)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("file", ["rowwise", "channelwise", "recurrent"])
def test_every_kernel_compiles_for_gpus(emulated: Any, file: str, architecture: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc") or pytest.skip("nvcc is not installed: no kernel was compiled for a GPU")
    kernels = importlib.import_module("portnorm_backends.cuda.kernels")
    families = [(name, t, p) for name, family in kernels.KERNELS.items() if family.file == file for t, p in kernels.types()]
    # All of float, and of every other type those that hold the most values.
    names = {e for name, t, p in families for e in kernels.expressions(name, t, p)[0 if t == "float" else -1 :]}
    table = ",\n".join(f"(void*){name}" for name in sorted(names))
    text = tmp_path / "all.cu"
    text.write_text(f"{kernels.source(file)}\nconst void* table[] = {{{table}}};\n")
    command = [
        nvcc,
        "-std=c++17",
        f"-arch={architecture}",
        "-cubin",
        "-Werror",
        "all-warnings",
        str(text),
        "-o",
        str(tmp_path / "all.cubin"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "all.cubin").stat().st_size > 1000


def test_the_benchmark_measures_all_of_its_cases(emulated: Any) -> None:
    rows = gpu.bandwidth(emulated, ("float32", "float16", "bfloat16"), nbytes=2**14, turns=1)
    for dtype in ("float32", "float16", "bfloat16"):
        assert {row["what"].partition(" ")[0] for row in rows if row["dtype"] == dtype} == {"copy", "layer", "RMS", "group", "batch"}
    assert all(row[f"{way} GB/s"] > 0 for row in rows[1:7] for way in ("forward", "backward"))
    row = gpu.recurrent(emulated, (2, 3, 4, 5), turns=1)
    assert all(0 < row[name] < np.inf for name in ("LN-LSTM forward", "LN-LSTM training step"))


def test_the_benchmark_without_a_gpu_says_so_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "gpu.json")
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2
    assert "CuPy is not installed" in capsys.readouterr().err
    assert not (tmp_path / "gpu.json").exists()


def test_the_benchmark_keeps_what_it_found_before_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = SimpleNamespace(runtimeGetVersion=lambda: 13000, getDeviceProperties=lambda k: {"name": b"a GPU"})
    monkeypatch.setattr(gpu, "device", lambda: SimpleNamespace(__version__="14.2.0", cuda=SimpleNamespace(runtime=runtime)))
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "gpu.json")
    monkeypatch.setattr(gpu, "tests", lambda: {"status": 0, "summary": "1 passed", "failed": []})
    monkeypatch.setattr(gpu, "bandwidth", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gpu.main()
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert set(kept) == {"about", "tests"}
    assert kept["about"]["device"] == "a GPU"


# -- the emulation itself ------------------------------------------------------------------------------------------------------------------

_WRONG = """
#include "cuda_fp16.h"
__global__ void beyond(float* x) { x[threadIdx.x + 1] = 1.0f; }
__global__ void unordered(float* x) {
  __shared__ float room[64];
  room[threadIdx.x] = x[threadIdx.x];
  x[threadIdx.x] = room[63 - threadIdx.x];
}
__global__ void divergent(float* x) { if (threadIdx.x < 40) __syncthreads(); x[threadIdx.x] = 1.0f; }
extern "C" void run_beyond(const unsigned int* g, const unsigned int* b, void** a, int n) { emulation::launch(beyond, g, b, a, n); }
extern "C" void run_unordered(const unsigned int* g, const unsigned int* b, void** a, int n) { emulation::launch(unordered, g, b, a, n); }
extern "C" void run_divergent(const unsigned int* g, const unsigned int* b, void** a, int n) { emulation::launch(divergent, g, b, a, n); }
extern "C" uint16_t to_half(float x) { return __float2half_rn(x).bits; }
extern "C" float from_half(uint16_t bits) { return __half2float(__half{bits}); }
extern "C" uint16_t to_bfloat16(float x) { return __float2bfloat16_rn(x).bits; }
extern "C" float from_bfloat16(uint16_t bits) { return __bfloat162float(__nv_bfloat16{bits}); }
"""


@pytest.fixture
def wrong(emulated: Any) -> ctypes.CDLL:
    return ctypes.CDLL(str(fake_cupy.binary("wrong", _WRONG)))


def run_wrong(library: ctypes.CDLL, name: str, x: Any) -> None:
    address = ctypes.c_longlong(x.data.ptr)
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(address))
    getattr(library, f"run_{name}")((ctypes.c_uint * 3)(1, 1, 1), (ctypes.c_uint * 3)(64, 1, 1), pointers, 1)


def test_a_write_outside_of_an_array_is_seen(emulated: Any, wrong: ctypes.CDLL) -> None:
    x = emulated.zeros(64, dtype=np.float32)
    run_wrong(wrong, "beyond", x)
    with pytest.raises(AssertionError, match="outside of an array"):
        fake_cupy.check_guards()
    fake_cupy.forget_guards()


def test_a_missing_barrier_is_seen(emulated: Any, wrong: ctypes.CDLL) -> None:
    found = []
    for backwards in (0, 1):
        wrong.emulation_backwards(backwards)
        x = emulated.asarray(np.arange(64, dtype=np.float32))
        run_wrong(wrong, "unordered", x)
        found.append(x.get())
    assert not np.array_equal(*found)


def test_threads_that_leave_a_barrier_to_others_are_seen(wrong: ctypes.CDLL) -> None:
    code = f"""
import sys, ctypes, numpy as np
x = np.zeros(64, np.float32)
library, address = ctypes.CDLL({wrong._name!r}), ctypes.c_longlong(x.ctypes.data)
pointers = (ctypes.c_void_p * 1)(ctypes.addressof(address))
library.run_divergent((ctypes.c_uint * 3)(1, 1, 1), (ctypes.c_uint * 3)(64, 1, 1), pointers, 1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "wait at different places" in done.stderr
    assert done.returncode != 0


@pytest.mark.parametrize(("name", "dtype"), [("half", np.float16), ("bfloat16", ml_dtypes.bfloat16)])
def test_narrow_types_are_rounded_as_everywhere(wrong: ctypes.CDLL, name: str, dtype: Any, rng: np.random.Generator) -> None:
    narrow, widen = getattr(wrong, f"to_{name}"), getattr(wrong, f"from_{name}")
    narrow.argtypes, narrow.restype, widen.argtypes, widen.restype = [ctypes.c_float], ctypes.c_uint16, [ctypes.c_uint16], ctypes.c_float
    bits = np.arange(2**16, dtype=np.uint16)
    values = bits.view(dtype).astype(np.float32)
    np.testing.assert_array_equal(np.array([widen(int(b)) for b in bits], np.float32), values)
    with np.errstate(over="ignore", invalid="ignore"):
        some = np.concatenate([rng.standard_normal(9000) * 10.0 ** rng.integers(-9, 6, 9000), values[np.isfinite(values)][::7]]).astype(
            np.float32
        )
        middles = (values[:-1] + values[1:])[np.isfinite(values[:-1] + values[1:])][::3] / 2
        for part in (some, middles):
            np.testing.assert_array_equal(np.array([narrow(float(v)) for v in part], np.uint16), part.astype(dtype).view(np.uint16))


def test_the_stand_in_converts_nothing_by_itself(emulated: Any) -> None:
    with pytest.raises(TypeError, match="Implicit conversion"):
        np.asarray(emulated.zeros(3))
    with pytest.raises(TypeError, match="Unsupported type"):
        emulated.zeros(3) + np.zeros(3)


def test_a_machine_without_cupy_says_so() -> None:
    code = """
import sys
sys.modules["cupy"] = None
import portnorm as pn
try:
    pn.LSTM(2, 3, xp="cupy")
except pn.MissingExtraError as error:
    print(error)
"""
    assert output_of(code).startswith("`xp` names cupy, which cannot be imported: ")
