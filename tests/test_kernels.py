"""Kernels against the definitions they stand for: random shapes, strides, types and masks; threads, forks, and other libraries beside."""

from __future__ import annotations

import os
import shutil
import tracemalloc
from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import portnorm as pn
from benchmarks.tables import ROOT
from portnorm.arrays import leaves, library, without_kernels
from portnorm.libraries import SUPPORT
from portnorm.norm.normalize import Normalized, normalize
from portnorm_backends.cpu import affine, memory, outer, products, recurrent, registers, residuals, threads
from portnorm_backends.cpu.recurrent import LoopResiduals
from portnorm_backends.cpu.residuals import KernelResiduals
from portnorm_backends.cpu.warming import ready
from tests.processes import in_threads, output_of
from tests.tolerances import OPERATION, RECURRENT

NARROW = np.dtype(ml_dtypes.bfloat16)
KERNELS = sorted(library(np.zeros(1)).kernels)


def test_the_kernels_are_there() -> None:
    """The test environment has numba; without it everything below would compare the definitions with themselves."""
    assert sorted(SUPPORT["numpy"].kernels) == KERNELS


@pytest.mark.parametrize("center", [True, False], ids=["centred", "not centred"])
@pytest.mark.parametrize("parameters", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("n", [1, 2, 7, 8, 15, 16, 17, 31, 32, 33])
@pytest.mark.parametrize("dtype", [np.dtype("float32"), np.dtype("float64"), NARROW], ids=str)
def test_a_short_row_hangs_on_its_own_values_alone(
    dtype: Any, n: int, parameters: tuple[bool, bool], center: bool, rng: np.random.Generator
) -> None:
    """Many at once as the definition has them, and each alone, or wherever it lies, with the same bits; the mean is up to 10⁴ σ."""
    values = rng.standard_normal((300, n)) * 10.0 ** rng.integers(-3, 3, (300, 1))
    x = (values + np.where(rng.random((300, 1)) < 0.5, 0.0, 1e4 * np.abs(values).mean(axis=1, keepdims=True))).astype(dtype)
    x[7] = 3.0
    w, b = (rng.standard_normal(n).astype(dtype) if given else None for given in parameters)
    assert ready("short rows", dtype)
    attrs: dict[str, Any] = {"axes": (1,), "param_axes": (1,), "eps": 1e-3, "center": center}
    y = normalize(x, w, b, **attrs)
    with without_kernels(np.ndarray):
        expected = normalize(x, w, b, **attrs)
    allowed = OPERATION[dtype.name] * max(1.0, float(np.max(np.abs(wider(expected)))))
    np.testing.assert_allclose(wider(y), wider(expected), rtol=0, atol=allowed)
    apart = np.zeros((300, n + 3), dtype)
    apart[:, :n] = x
    np.testing.assert_array_equal(normalize(apart[:, :n], w, b, **attrs), y)
    for start, stop in ((0, 1), (7, 8), (299, 300), (3, 40), (140, 300)):
        np.testing.assert_array_equal(normalize(x[start:stop], w, b, **attrs), y[start:stop])


@pytest.mark.parametrize("center", [True, False], ids=["centred", "not centred"])
@pytest.mark.parametrize("parameters", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("n", [1, 2, 7, 8, 15, 16, 17, 31, 32, 33])
@pytest.mark.parametrize("dtype", [np.dtype("float32"), np.dtype("float64"), NARROW], ids=str)
def test_so_does_its_cotangent(dtype: Any, n: int, parameters: tuple[bool, bool], center: bool, rng: np.random.Generator) -> None:
    """And those of gains and shifts are the definition's, of many rows or one; the mean is 10 σ."""
    x, dy = ((shift + rng.standard_normal((300, n))).astype(dtype) for shift in (10.0, 0.0))
    w, b = (rng.standard_normal(n).astype(dtype) if given else None for given in parameters)
    assert ready("short rows", dtype)
    attrs: dict[str, Any] = {"axes": (1,), "param_axes": (1,), "eps": 1e-3, "center": center}

    def back(x: Any, dy: Any) -> Any:
        return pn.vjp(normalize, x, w, b, **attrs)[1](dy)

    dx, *shares = back(x, dy)
    with without_kernels(np.ndarray):
        expected = back(x, dy)
    for mine, theirs in zip((dx, *shares), expected, strict=True):
        if theirs is not None:
            allowed = 3 * OPERATION[dtype.name] * max(1.0, float(np.max(np.abs(wider(theirs)))))
            np.testing.assert_allclose(wider(mine), wider(theirs), rtol=0, atol=allowed)
    apart, given = (np.zeros((300, n + 3), dtype) for _ in range(2))
    apart[:, :n], given[:, 2 : n + 2] = x, dy
    np.testing.assert_array_equal(back(apart[:, :n], given[:, 2 : n + 2])[0], dx)
    for start, stop in ((0, 1), (7, 8), (299, 300), (3, 40), (140, 300)):
        np.testing.assert_array_equal(back(x[start:stop], dy[start:stop])[0], dx[start:stop])


@pytest.mark.parametrize("n", [3, 15, 31])
def test_what_is_beside_a_short_row_in_its_registers_enters_nothing(n: int, rng: np.random.Generator) -> None:
    """Not where the mean over ε has no place in the type either."""
    assert ready("short rows", np.dtype("float32"))
    x, dy = np.full((40, n), 1e30, "float32"), rng.standard_normal((40, n)).astype("float32")
    dx = pn.vjp(pn.layer_norm, x, eps=1e-20)[1](dy)[0]
    np.testing.assert_allclose(dx, 1e10 * (dy - dy.mean(axis=1, keepdims=True)), rtol=1e-5, atol=1e4)


@pytest.mark.parametrize("n", [3, 16, 32])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1e30])
def test_a_short_row_that_leaves_the_range_changes_no_other(n: int, wrong: float, rng: np.random.Generator) -> None:
    assert ready("short rows", np.dtype("float32"))
    x = rng.standard_normal((100, n)).astype("float32")
    y = normalize(x, axes=(1,), param_axes=(1,), eps=1e-5)
    x[41, 1] = wrong
    with without_kernels(np.ndarray), np.errstate(all="ignore"):
        expected = normalize(x, axes=(1,), param_axes=(1,), eps=1e-5)
    with np.errstate(all="ignore"):
        found = normalize(x, axes=(1,), param_axes=(1,), eps=1e-5)
    np.testing.assert_array_equal(found[41], expected[41])
    others = np.arange(100) != 41
    np.testing.assert_allclose(found[others], y[others], rtol=0, atol=OPERATION["float32"] * float(np.max(np.abs(y))))


@st.composite
def calls(draw: Any) -> tuple[np.ndarray[Any, Any], dict[str, Any], bool | None]:
    """An array, arguments of `normalize`, and whether a kernel takes them; `None` where that hangs on axes of one value."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    first = draw(st.integers(0, len(shape) - 1))
    start = draw(st.integers(0, len(shape) - 1))
    params = tuple(range(start, draw(st.integers(start + 1, len(shape)))))
    axes = tuple(range(first, len(shape)))
    if len(shape) > 1 and draw(st.booleans()):
        axes, params = tuple(a for a in range(len(shape)) if a != first), (first,)
    elif len(shape) > 1 and draw(st.booleans()):
        axes = tuple(range(first + 1))
    elif len(shape) > 2 and draw(st.booleans()):
        axes, params = tuple(range(1 + first % (len(shape) - 2), len(shape) - 1)), (len(shape) - 1,)
    dtype = draw(st.sampled_from([*map(np.dtype, ("float32", "float64", "float16")), NARROW]))
    layout = draw(st.sampled_from(["whole", "whole", "rows apart", "strided"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    mean = draw(st.sampled_from([0.0, 30.0, 1000.0]))
    x = (mean + rng.standard_normal(shape if layout == "whole" else (*shape[:-1], 2 * shape[-1]))).astype(dtype)
    x = {"whole": x, "rows apart": x[..., : shape[-1]], "strided": x[..., ::2]}[layout]
    attrs: dict[str, Any] = {"axes": axes, "param_axes": params, "eps": draw(st.sampled_from([1e-5, 0.1])), "center": draw(st.booleans())}
    masked = draw(st.booleans()) and draw(st.booleans())
    if masked:
        attrs["mask"] = rng.uniform(size=(*shape[:-1], draw(st.sampled_from([1, shape[-1]])))) < 0.7
    along = tuple(shape[a] for a in params)
    for name in ("weight", "bias"):
        attrs[name] = rng.standard_normal(along).astype(dtype) if draw(st.booleans()) else None
    rows = axes == tuple(range(axes[0], len(shape))) and params[0] <= axes[0] <= params[-1] + 1
    channel = len(params) == 1 and sorted((*axes, *params)) == list(range(len(shape)))
    steps = params == (len(shape) - 1,) and axes == tuple(range(axes[0], len(shape) - 1))
    if draw(st.integers(0, 3)) == 0:
        shorter = tuple(1 if a in axes else n for a, n in enumerate(shape))
        attrs["mean"], attrs["var"] = rng.standard_normal(shorter).astype(dtype), rng.uniform(0.1, 2.0, shorter).astype(dtype)
        rows = False
    last = params == (len(shape) - 1,) and axes[-1] == len(shape) - 2
    of_rows = masked and attrs["mask"].shape[-1] == 1 and last and (channel or steps) and "mean" not in attrs
    if of_rows and dtype in (np.float32, np.float64) and attrs["mask"].any(axis=(*axes, -1)).all():
        return x, attrs, True if x.flags.c_contiguous else None if 1 in shape else False
    if dtype == np.float16 or masked or not (rows or channel or steps):
        return x, attrs, False
    if x.flags.c_contiguous:
        return x, attrs, True
    if 1 in shape:
        return x, attrs, None
    return x, attrs, layout == "rows apart" and rows and axes == (len(shape) - 1,) and not channel


@settings(max_examples=300, deadline=None)
@given(calls())
def test_normalize_is_what_its_definition_is(call: tuple[np.ndarray[Any, Any], dict[str, Any], bool | None]) -> None:
    x, attrs, taken = call
    weight, bias = attrs.pop("weight"), attrs.pop("bias")
    dy = np.random.default_rng(0).standard_normal(x.shape).astype(x.dtype)

    def both() -> tuple[Any, Any, Any]:
        y, residuals = normalize.forward(x, weight, bias, **attrs)
        np.testing.assert_array_equal(normalize(x, weight, bias, **attrs), y)
        return y, normalize.vjp(residuals, dy, **attrs), type(residuals)

    found, cotangents, kind = both()
    assert taken is None or kind is (KernelResiduals if taken else Normalized)
    with without_kernels(np.ndarray):
        expected, expected_cotangents, own = both()
    assert own is Normalized
    assert found.dtype == expected.dtype
    tolerance = OPERATION[x.dtype.name]
    found, expected, *cotangents = (wider(a) for a in (found, expected, *cotangents))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(1.0, float(np.max(np.abs(expected)))))
    for a, b, p in zip(cotangents, expected_cotangents, (x, weight, bias), strict=True):
        assert (a is None) == (b is None) == (p is None)
        if p is not None:
            assert (a.shape, b.dtype) == (p.shape, p.dtype)
            np.testing.assert_allclose(a, wider(b), rtol=0, atol=10 * tolerance * max(1.0, float(np.max(np.abs(wider(b))))))


def wider(a: Any) -> Any:
    """Numbers that NumPy subtracts and compares."""
    return a.astype(np.float32) if a is not None and a.dtype == NARROW else a


# -- recurrent cells -----------------------------------------------------------------------------------------------------------------------

CELLS = [(cell, name) for cell in pn.VARIANTS for name in (*pn.VARIANTS[cell], *pn.IMPLEMENTATIONS[cell])]

TAKEN = {
    "LSTM": {
        None,
        "layer",
        "layer-gates",
        "layer-state",
        "batch",
        "batch-input",
        "batch-input-frame",
        "weight",
        "fastrnns",
        "haste",
    },
    "GRU": {None, "layer", "batch", "batch-input", "batch-input-frame", "weight"},
    "RNN": {None, "layer", "batch", "batch-input", "batch-input-frame", "weight"},
}
"""Variants that must not fall back to the definition."""


@st.composite
def sequences(draw: Any) -> tuple[pn.LSTM | pn.GRU | pn.RNN, Any, Any, bool]:
    """A layer of any variant, its input, lengths or `None`, and whether it trains."""
    cell, name = draw(st.sampled_from(CELLS))
    dtype = draw(st.sampled_from(["float32", "float64"]))
    variant = {**pn.VARIANTS[cell], **pn.IMPLEMENTATIONS[cell]}[name]
    size, seed = draw(st.integers(1 if variant.eps > 0 else 4, 9)), draw(st.integers(0, 2**32))
    options = {"t_max": draw(st.integers(1, 5)), "bidirectional": draw(st.booleans()), "return_sequences": draw(st.booleans())}
    layer = getattr(pn, cell)(3, size, norm=name, dtype=dtype, rng=seed, **options)
    rng = np.random.default_rng(seed)
    for key, p in layer.params.items():
        layer.params[key] = p + (0.3 * rng.standard_normal(p.shape)).astype(dtype)
    training = draw(st.booleans())
    batch = draw(st.integers(2 if training and layer.variant.norm == "batch" else 1, 6))
    x = (1 + rng.standard_normal((draw(st.integers(1, 6)), batch, 3))).astype(dtype)
    lengths = rng.integers(1, len(x) + 1, batch) if draw(st.booleans()) and layer.variant.eps > 0 else None
    return layer, x, lengths, training


def whole(layer: Any, x: Any, lengths: Any, training: bool) -> list[Any]:
    """Everything that a layer computes, forward and backward."""
    state, buffers = layer.initial_state(x.shape[1], noise=0.5, rng=1), dict(layer.buffers)
    y, after, pullback = layer.vjp(x, state=state, lengths=lengths, training=training)
    dy = np.random.default_rng(2).standard_normal(y.shape).astype(y.dtype)
    found = [y, after, pullback(dy, tuple(np.ones_like(a) for a in after[: len(layer.cell.states)])), layer.buffers]
    layer.buffers = buffers
    return list(leaves([*found, layer(x, state=state, lengths=lengths)[0]]))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(sequences())
def test_a_cell_is_what_its_definition_is(call: tuple[Any, Any, Any, bool]) -> None:
    """In float64 to the last digits; in float32 as near to float64 as the definition is, since six steps amplify rounding as they like."""
    layer, x, lengths, training = call
    found = whole(layer, x, lengths, training)
    with without_kernels(np.ndarray):
        expected = whole(layer, x, lengths, training)
        exact = expected if x.dtype == np.float64 else whole(layer.to(dtype="float64"), x.astype(np.float64), lengths, training)
    for a, b, e in zip(found, expected, exact, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        size = max(1.0, float(np.max(np.abs(e), initial=0.0)))
        floor = 1e-9 if x.dtype == np.float64 else RECURRENT["float32"]
        np.testing.assert_allclose(a, e, rtol=0, atol=floor * size + 10 * float(np.max(np.abs(b - e), initial=0.0)))


@pytest.mark.parametrize(("cell", "name"), [(cell, name) for cell, names in TAKEN.items() for name in sorted(names, key=str)])
@pytest.mark.parametrize("batch", [2, 5, 40])
def test_the_presets_are_computed_by_kernels(cell: str, name: str | None, batch: int, rng: np.random.Generator) -> None:
    """With weights of a size that takes each way to the product, forward and backward; nothing here goes to the definition."""
    layer = getattr(pn, cell)(3, 192 if batch == 40 else 4, norm=name, rng=0)
    x = rng.standard_normal((3, batch, 3)).astype(np.float32)
    places = [residual.scan for residual in layer.forward(layer.params, layer.buffers, x, None, None, True, True)[3].directions]
    assert [type(place) for place in places] == [LoopResiduals]
    found = whole(layer, x, None, True)
    with without_kernels(np.ndarray):
        expected = whole(layer, x, None, True)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=10 * RECURRENT["float32"] * max(1.0, float(np.max(np.abs(b), initial=0.0))))


@pytest.mark.parametrize(("cell", "name"), [(cell, name) for cell, names in TAKEN.items() for name in sorted(names, key=str)])
def test_inference_makes_the_input_term_as_the_steps_come_to_it(
    cell: str, name: str | None, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values as with the whole of it, over many parts, of which the last is shorter, and with sequences that end between."""
    layer, x = getattr(pn, cell)(5, 7, norm=name, rng=0, dtype="float64"), rng.standard_normal((17, 3, 5))
    monkeypatch.setattr(products, "ROWS", 12)
    calls_: list[tuple[int, ...]] = []
    monkeypatch.setattr(recurrent, "input_terms", counting(recurrent.input_terms, calls_))
    for lengths in (None, np.array([17, 6, 8])):
        y, last = layer(x, lengths=lengths)
        with without_kernels(np.ndarray):
            expected, after = layer(x, lengths=lengths)
        for a, b in zip((y, *last), (expected, *after), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
    by_batch = layer.variant.norm == "batch"  # each step has statistics of its own
    assert calls_ == [] if by_batch else calls_ == 2 * [(4, 3), (4, 3), (4, 3), (4, 3), (1, 3)]


def counting(make: Any, calls_: list[tuple[int, ...]]) -> Any:
    """`_input_terms` that says of which steps and sequences it is asked for."""

    def made(*arguments: Any) -> Any:
        def of_thread(first: int, last: int) -> Any:
            count, of_steps = make(*arguments)(first, last)

            def told(t: int, stop: int) -> Any:
                calls_.append((stop - t, last - first))
                return of_steps(t, stop)

            return count, told

        return of_thread

    return made


@pytest.mark.parametrize(
    "name", ["weight_hh_l0", "weight_ih_l0", "norm_ih_l0.weight", "norm_hh_l0.weight", "norm_c_l0.bias", "norm_c_l0.weight"]
)
@pytest.mark.parametrize("change", [lambda p: p[:-1], lambda p: p[..., :1], lambda p: p[:0]], ids=["short", "one", "none"])
def test_parameters_of_another_shape_never_reach_compiled_code(name: str, change: Any, rng: np.random.Generator) -> None:
    """Which would read beyond them: it is an error, or what the definition makes of it."""
    layer, x = pn.LSTM(3, 4, norm="layer", rng=0), rng.standard_normal((4, 2, 3)).astype(np.float32)
    layer.params[name] = change(layer.params[name])
    try:
        y, _ = layer(x)
    except ValueError:
        return
    with without_kernels(np.ndarray):
        expected, _ = layer(x)
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0"])
def test_a_step_whose_squares_leave_the_type_goes_to_the_definition(name: str, rng: np.random.Generator) -> None:
    layer = pn.LSTM(3, 4, norm="layer", rng=0)
    layer.params[name] = layer.params[name] * np.float32(1e25)
    x = rng.standard_normal((4, 2, 3)).astype(np.float32)
    y, _ = layer(x)
    with without_kernels(np.ndarray):
        expected, _ = layer(x)
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_sigmoid_and_tanh_are_within_four_units(name: str, dtype: Any) -> None:
    """Wherever the result is a normal number; NaN stays NaN, and nothing overflows."""
    from portnorm_backends.cpu import pointwise
    from portnorm_backends.cpu.compiling import compiled
    from portnorm_backends.cpu.vectors import elementwise

    formula = getattr(pointwise, name)
    loop = elementwise(lambda x: (formula(x),))

    @compiled()
    def evaluate(x: Any, y: Any) -> None:
        loop(x.size, (x,), (y,))

    limits = {"sigmoid": (1e-3, 1.0, 20.0, 87.0 if dtype is np.float32 else 700.0), "tanh": (1e-20, 1e-3, 1.0, 30.0)}
    x = np.concatenate([np.linspace(-limit, limit, 32 * 625) for limit in limits[name]]).astype(dtype)
    y, special = np.empty_like(x), np.array([np.nan, np.inf, -np.inf], dtype)
    evaluate(x, y)
    wide = x.astype(np.longdouble)
    exact = np.tanh(wide) if name == "tanh" else 1 / (1 + np.exp(-wide))
    normal = np.abs(exact) >= np.finfo(dtype).tiny
    assert np.max(np.abs(y - exact)[normal] / np.spacing(np.abs(exact[normal]).astype(dtype))) <= 4
    evaluate(special, special)
    np.testing.assert_allclose(special, [np.nan, 1, -1 if name == "tanh" else 0], atol=1e-30)


@pytest.mark.parametrize("make", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("norm", [None, "layer"])
@pytest.mark.parametrize("lengths", [None, [6, 0, 3, 1, 6, 5, 2, 2, 4, 6, 1]], ids=["whole", "ragged"])
def test_threads_give_what_one_gives(
    make: str, norm: str | None, lengths: Any, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """Values bit by bit; sums over sequences in another order."""
    layer, x = getattr(pn, make)(5, 7, norm=norm, rng=0), rng.standard_normal((6, 11, 5)).astype(np.float32)
    monkeypatch.setattr(affine, "_WORTH", 1)
    expected = whole(layer, x, lengths, True)
    ranges = parted(monkeypatch)
    found = whole(layer, x, lengths, True)
    assert [(0, 4), (4, 8), (8, 11)] in ranges
    np.testing.assert_array_equal(found[0], expected[0])
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * max(1.0, float(np.max(np.abs(b), initial=0.0))))


@pytest.mark.parametrize("groups", [1, 4])
def test_rows_in_threads(groups: int, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    x, w, dy = rng.standard_normal((11, 8, 6)), rng.standard_normal(8), rng.standard_normal((11, 8, 6))
    own = np.ones(6)

    def both() -> list[Any]:
        y, pullback = pn.vjp(pn.group_norm, x, groups, w, w)
        z, back = pn.vjp(pn.layer_norm, x, own, own)
        return [
            y,
            *pullback(dy)[:1],
            *pullback(dy)[2:],
            z,
            *back(dy),
            pn.layer_norm(x, own, own),
            pn.linear(x, np.ones((9, 6)), np.ones(9)),
        ]

    monkeypatch.setattr(affine, "_WORTH", 1)
    expected = both()
    ranges = parted(monkeypatch)
    for a, b in zip(both(), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
    assert max(len(r) for r in ranges) >= 3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(5, 40, 7), (9, 40), (3, 9, 40)], ids=str)
def test_channels_in_threads(shape: tuple[int, ...], dtype: Any, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    """Bit by bit: a channel is computed by one thread, and so as by one."""
    x, dy = ((100 + rng.standard_normal(shape)).astype(dtype) for _ in range(2))
    w, b, mean = (rng.standard_normal(40).astype(dtype) for _ in range(3))
    own, given = {"channel_axis": 2 if shape[-1] == 40 and len(shape) == 3 else 1}, {"mean": mean, "var": 1 + mean**2}

    def all_three() -> list[Any]:
        y, pullback = pn.vjp(pn.batch_norm, x, w, b, **own)
        z, back = pn.vjp(pn.batch_norm, x, w, b, **own, **given)
        return [y, *pullback(dy), z, *back(dy)]

    expected = all_three()
    ranges = parted(monkeypatch)
    for found, alone in zip(all_three(), expected, strict=True):
        np.testing.assert_array_equal(found, alone)
    assert max(len(r) for r in ranges) >= 3


def test_no_bit_depends_on_which_thread_is_first(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    x, dy, w = rng.standard_normal((64, 40)), rng.standard_normal((64, 40)), rng.standard_normal(40)
    layer = pn.LSTM(5, 7, norm="layer", dtype="float64", rng=0)
    seen, dh = rng.standard_normal((6, 19, 5)), rng.standard_normal((6, 19, 7))
    parted(monkeypatch)

    def gradients(order: int) -> list[Any]:
        monkeypatch.setattr(threads, "each", lambda ranges, work: [work(*part) for part in ranges[::order]])
        return [*pn.vjp(pn.layer_norm, x, w, w)[1](dy), *leaves(layer.vjp(seen)[2](dh))]

    for forwards, backwards in zip(gradients(1), gradients(-1), strict=True):
        np.testing.assert_array_equal(forwards, backwards)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("counts", [0, 1, 2, 11, 15])
@pytest.mark.parametrize("shape", [(15, 40), (5, 3, 40)], ids=str)
def test_rows_that_a_mask_lets_count(shape: tuple[int, ...], counts: int, dtype: Any, rng: np.random.Generator) -> None:
    """As the definition, |mean| ≫ std, and whatever stands where nothing counts; the results there are 0."""
    x, dy = ((100 + rng.standard_normal(shape)).astype(dtype) for _ in range(2))
    w, b = (rng.standard_normal(40).astype(dtype) for _ in range(2))
    mask = rng.permutation(np.arange(15) < counts).reshape((*shape[:-1], 1))
    x, dy = np.where(mask, x, np.nan).astype(dtype), np.where(mask, dy, np.inf).astype(dtype)
    attrs = {"channel_axis": -1, "mask": mask}

    def both() -> list[Any]:
        (y, residuals), into = pn.batch_norm.forward(x, w, b, **attrs), np.ones_like(x)
        assert pn.batch_norm(x, w, b, **attrs, out=into) is into
        return [y, into, *residuals.statistics(), residuals.counted, *pn.batch_norm.vjp(residuals, dy, channel_axis=-1, mask=mask)]

    assert (type(pn.batch_norm.forward(x, w, b, **attrs)[1]) is KernelResiduals) is (counts > 0)
    found = both()
    with without_kernels(np.ndarray):
        expected = both()
    for a, e in zip(found, expected, strict=True):
        scale = float(np.max(np.abs(e), initial=1.0))
        np.testing.assert_allclose(a, e, rtol=0, atol=(2e-5 if dtype is np.float32 else 1e-11) * scale)
    for a in (found[0], found[1], found[5]):
        assert not np.any(a[np.broadcast_to(~mask, a.shape)])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("parameters", [True, False])
@pytest.mark.parametrize("sizes", [(5, 3, 1), (5, 5, 5), (2, 0, 4), (0, 0, 0)], ids=str)
def test_steps_whose_rows_a_mask_lets_count(sizes: tuple[int, ...], parameters: bool, dtype: Any, rng: np.random.Generator) -> None:
    """Statistics for each step, of as many sequences as it has; a step that nobody has is for the definition."""
    shape = (2, len(sizes), 5, 24)
    x, dy = ((50 + rng.standard_normal(shape)).astype(dtype) for _ in range(2))
    w, b = (rng.standard_normal(24).astype(dtype) if parameters else None for _ in range(2))
    mask = np.array([[rng.permutation(np.arange(5) < size) for size in sizes] for _ in range(2)])[..., None]
    x, dy = np.where(mask, x, np.nan).astype(dtype), np.where(mask, dy, np.inf).astype(dtype)
    attrs: dict[str, Any] = {"axes": (2,), "param_axes": (3,), "eps": 1e-5, "mask": mask}

    def both() -> tuple[list[Any], type]:
        y, residuals = normalize.forward(x, w, b, **attrs)
        found = [y, *residuals.statistics(), residuals.counted, *normalize.vjp(residuals, dy, **attrs)]
        return [a for a in found if a is not None], type(residuals)

    with np.errstate(invalid="ignore", divide="ignore"):
        found, kind = both()
        with without_kernels(np.ndarray):
            expected, _ = both()
    assert (kind is KernelResiduals) is (0 not in sizes)
    for a, e in zip(found, expected, strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        scale = float(np.max(np.abs(e), initial=1.0))
        np.testing.assert_allclose(a, e, rtol=0, atol=(2e-5 if dtype is np.float32 else 1e-11) * scale)


def parted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let three threads pay for everything; the ranges that they get, as they come."""
    ranges, plan = [], threads.plan

    def seen(rows: int, *args: Any) -> Any:
        found = plan(rows, *args)
        ranges.append([(k, min(k + found.step, rows)) for k in range(0, rows, found.step)])
        return found

    monkeypatch.setattr(threads, "_count", lambda: 3)
    monkeypatch.setattr(threads, "plan", seen)
    for module in (recurrent, products, outer, residuals):
        monkeypatch.setattr(module, "_WORTH", 1)
    monkeypatch.setattr(residuals, "_WAKES", 1)
    return ranges


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("columns", "outputs"), [*product([1, 2, 4, 5, 40, 300, 512], [1, 33, 100]), (600, 1000), (1024, 700)])
def test_products_of_packed_weights(dtype: Any, columns: int, outputs: int, rng: np.random.Generator) -> None:
    """For every number of rows that tiles have, beside what is left over; weights of any layout, with a shift or none.

    Rows of 512 and 1024 lie in few places of a cache, and the larger weights in none.
    """
    w, shift = rng.standard_normal((columns, outputs)).astype(dtype), rng.standard_normal(outputs).astype(dtype)
    tolerance = 4 * np.finfo(dtype).eps * columns**0.5
    for rows in (1, 2, 3, 4, 5, 11, 12, 13, 27, 250):
        x = rng.standard_normal((rows, columns)).astype(dtype)
        x.flags.writeable = False
        size = np.abs(x).astype(np.float64) @ np.abs(w) + np.abs(shift)
        for laid in (w, np.asfortranarray(w), np.repeat(w, 2, axis=1)[:, ::2], unaligned(w)):
            for own in (shift, None):
                expected = x.astype(np.float64) @ w + (0 if own is None else own)
                assert np.max(np.abs(products.affine(x, laid, own) - expected) / size) < tolerance
                if rows <= products.FEW:  # of weights that are not packed
                    y = np.empty_like(expected, dtype)
                    products.affine_map(laid, own, rows)(x, y)
                    assert np.max(np.abs(y - expected) / size) < tolerance


@pytest.mark.parametrize("columns", [256, 1024, 8192])
def test_a_product_of_many_terms_rounds_as_one_of_few(columns: int, rng: np.random.Generator) -> None:
    """Of numbers whose mean is not 0, whose sums one after the other lose twelve times as much at 8192; 5 eps measured."""
    for rows in (1, 5, 20):
        x, w = ((1 + rng.standard_normal(shape)).astype(np.float32) for shape in ((rows, columns), (columns, 64)))
        exact, size = x.astype(np.float64) @ w, np.abs(x).astype(np.float64) @ np.abs(w)
        assert np.max(np.abs(products.affine(x, w) - exact) / size) < 8 * np.finfo(np.float32).eps


@pytest.mark.parametrize("room", [1, 2**14, 2**18])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("columns", "outputs"), [*product([5, 40, 300, 512], [1, 33, 100, 200])])
def test_products_in_panels_are_those_with_packed_weights(
    dtype: Any, columns: int, outputs: int, room: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, however many panels are packed at a time, alone and by threads."""
    w, shift = rng.standard_normal((columns, outputs)).astype(dtype), rng.standard_normal(outputs).astype(dtype)
    for rows in (5, 12, 27, 240):
        x = rng.standard_normal((rows, columns)).astype(dtype)
        for laid in (w, np.asfortranarray(w), np.repeat(w, 2, axis=1)[:, ::2]):
            for own in (shift, None):
                expected = products.affine(x, laid, own)
                for ways in (1, 3):
                    with monkeypatch.context() as patch:
                        if ways > 1:
                            parted(patch)
                        patch.setattr(products, "_NEAR", 0)
                        patch.setattr(products, "_PACKED", room)
                        np.testing.assert_array_equal(products.affine(x, laid, own), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("outputs", [1, 8, 33, 100, 500])
@pytest.mark.parametrize("columns", [1, 5, 40, 512])
def test_few_rows_give_the_same_by_threads(
    dtype: Any, columns: int, outputs: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, with weights as they lie, of which each thread reads some rows."""
    w, shift = rng.standard_normal((outputs, columns)).astype(dtype), rng.standard_normal(outputs).astype(dtype)
    for rows in range(1, products.FEW + 1):
        x = rng.standard_normal((rows, columns)).astype(dtype)
        for laid in (w, np.repeat(w, 2, axis=0)[::2]):
            for own in (shift, None):
                expected, found = (np.full((rows, outputs), np.nan, dtype) for _ in range(2))
                products.from_rows(laid, own)(x, expected)
                np.testing.assert_allclose(expected, x @ w.T + (0 if own is None else own), rtol=1e-4, atol=1e-4)
                with monkeypatch.context() as patch:
                    ranges = parted(patch)
                    patch.setattr(products, "_READ", 1)
                    patch.setattr(products, "_NEAR", 1)
                    products.from_rows(laid, own)(x, found)
                    assert (len(ranges[0]) > 1) is (outputs * w.itemsize > 64)
                np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("columns", [700, 1031])
@pytest.mark.parametrize("outputs", [1029, 2051])
def test_large_weights_are_read_in_two_places_with_the_same_bits(columns: int, outputs: int, rows: int, rng: np.random.Generator) -> None:
    """Whatever ranges of them threads have."""
    w, x = rng.standard_normal((outputs, columns), np.float32), rng.standard_normal((rows, columns), np.float32)
    shift = rng.standard_normal(outputs, np.float32)
    kernel, found = products.compiled_for("direct", np.dtype("float32")), np.full((rows, outputs), np.nan, np.float32)
    kernel(0, outputs, x, w, shift, found)
    exact, size = x.astype(np.float64) @ w.T + shift, np.abs(x).astype(np.float64) @ np.abs(w.T) + np.abs(shift)
    assert np.max(np.abs(found - exact) / size) < 4 * np.finfo(np.float32).eps * columns**0.5
    for length in (16, 1040):
        again = np.full_like(found, np.nan)
        for start in range(0, outputs, length):
            kernel(start, min(start + length, outputs), x, w, shift, again)
        np.testing.assert_array_equal(again, found)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("columns", [1, 12, 13, 100, 481])
@pytest.mark.parametrize("rows", [1, 5, 256, 257, 1200])
def test_sums_of_outer_products(dtype: Any, columns: int, rows: int, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    """Of any layout, with any number of rows and columns left over; the same bits by threads, of which each has columns of its own.

    Sums of many terms are made in parts, so that their error hardly grows with the rows.
    """
    x, tolerance = (3 + rng.standard_normal((rows, columns))).astype(dtype), 16 * np.finfo(dtype).eps
    for others in (1, 16, 33, 64):
        y = (2 - rng.standard_normal((rows, others))).astype(dtype)
        y.flags.writeable = False
        expected, size = x.astype(np.longdouble).T @ y, np.abs(x).T.astype(np.float64) @ np.abs(y)
        alone = outer.product(x, y)
        for one, other in ((x, y), (np.asfortranarray(x), y), (x, np.repeat(y, 2, axis=1)[:, ::2]), (unaligned(x), unaligned(y))):
            np.testing.assert_array_equal(outer.product(one, other), alone)
        assert np.max(np.abs(alone - expected) / size) < tolerance
        with monkeypatch.context() as threaded:
            ranges = parted(threaded)
            np.testing.assert_array_equal(outer.product(x, y), alone)
        assert len(ranges[-1]) > 1 or columns <= 12


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(300, 70), (4, 75, 70)], ids=str)
def test_cotangents_of_an_affine_map_are_computed_by_kernels(
    dtype: Any, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """Where most columns of the panels are there; else BLAS has them."""
    x, w, bias, dy = (rng.standard_normal(s).astype(dtype) for s in (shape, (40, 70), (40,), (*shape[:-1], 40)))
    monkeypatch.setattr(affine, "_WORTH", 1)
    monkeypatch.setattr(affine, "_LONG", 1)
    taken: list[tuple[int, ...]] = []

    def noting(kernel: Any) -> Any:
        return lambda a, *more: taken.append(a.shape) or kernel(a, *more)

    monkeypatch.setattr(products, "affine", noting(products.affine))
    monkeypatch.setattr(outer, "product", noting(outer.product))
    found = pn.vjp(pn.linear, x, w, bias)[1](dy)
    assert taken == [(300, 70), (300, 40), *([(300, 40)] if outer.is_worth(70, x.itemsize) else [])]
    with without_kernels(np.ndarray):
        expected = pn.vjp(pn.linear, x, w, bias)[1](dy)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=8 * np.finfo(dtype).eps * float(np.max(np.abs(b))))


@pytest.mark.parametrize(
    ("cell", "norm"), [("LSTM", None), ("LSTM", "layer"), ("GRU", None), ("GRU", "layer"), ("RNN", None), ("RNN", "batch")]
)
@pytest.mark.parametrize("batch", [1, 4, 5])
@pytest.mark.parametrize("size", [7, 512])
def test_one_step(cell: str, norm: str | None, batch: int, size: int, rng: np.random.Generator) -> None:
    """Of few sequences without packing the weights; forward and backward."""
    layer, x = getattr(pn, cell)(5, size, norm=norm, rng=0, dtype="float64"), rng.standard_normal((1, batch, 5))
    for training in (False, True)[: 1 if batch == 1 and norm == "batch" else 2]:
        found = [layer(x)[0], *whole(layer, x, None, training)]
        with without_kernels(np.ndarray):
            expected = [layer(x)[0], *whole(layer, x, None, training)]
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)


# -- memory --------------------------------------------------------------------------------------------------------------------------------


def address(a: Any) -> int:
    return int(a.__array_interface__["data"][0])


def test_large_results_use_memory_that_no_array_is_left_on() -> None:
    memory._waiting.clear()
    shape, single = (1024, 1024), np.dtype("float32")
    first = memory.room(shape, single)
    assert first.flags.writeable
    assert address(first) % 64 == 0
    first[...] = 1
    place, part = address(first), first[10:].T
    del first
    second = memory.room(shape, single)
    second[...] = 2
    assert (part == 1).all()
    assert address(second) != place
    del part
    assert address(memory.room(shape, single)) == place


def test_memory_is_cold_once_much_else_was_handed_out() -> None:
    """Since it was handed out itself, not since it came back; fresh memory is not, nor is a small array."""
    memory.release()
    shape, single = (1024, 1024), np.dtype("float32")
    first, cold = memory.room_and_cold(shape, single)
    assert not cold
    del first
    assert not memory.room_and_cold(shape, single)[1]
    other = [memory.room((2**21,), single) for _ in range(3)]
    assert not memory.room_and_cold(shape, single)[1]
    other += [memory.room((2**21,), single) for _ in range(4)]
    assert memory.room_and_cold(shape, single)[1]
    assert not memory.room_and_cold((2,), single)[1]
    del other


@pytest.mark.parametrize("parameters", [2, 1, 0])
@pytest.mark.parametrize("n", [768, 770, 16])
@pytest.mark.parametrize("dtype", [np.dtype("float32"), np.dtype("float64"), NARROW], ids=str)
def test_what_goes_past_the_caches_has_the_same_bits(
    dtype: Any, n: int, parameters: int, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """Also of rows that do not begin with a cache line, and by threads."""
    x, w = rng.standard_normal((2**20 // n, n)).astype(dtype), [rng.standard_normal(n).astype(dtype) for _ in range(parameters)]
    monkeypatch.setattr(memory, "CACHED", 2**62)
    expected = pn.layer_norm(x, *w)
    monkeypatch.setattr(memory, "CACHED", 0)
    np.testing.assert_array_equal(pn.layer_norm(x, *w), expected)
    np.testing.assert_array_equal(pn.vjp(pn.layer_norm, x, *w)[0], expected)


def test_memory_that_waits_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "KEPT", 2**23)
    memory._waiting.clear()

    def waiting() -> int:
        return sum(size * len(blocks) for size, blocks in memory._waiting.items())

    for count in (2**20, 2**21, 3 * 2**20, 2**22, 2**20, 2**24):
        some = [memory.room((count,), np.dtype("uint8")) for _ in range(6)]
        del some
        assert waiting() <= 2**23
    assert waiting() > 0


def test_results_of_threads_do_not_share_memory(rng: np.random.Generator) -> None:
    x = rng.standard_normal((8, 1024, 512)).astype(np.float32)
    w = np.ones(512, np.float32)
    expected, failed = [pn.layer_norm(a, w, w) for a in x], []

    def work(k: int) -> None:
        kept: list[Any] = []
        for _ in range(20):
            kept = [*kept[-2:], pn.layer_norm(x[k], w, w)]
            if not all(np.array_equal(y, expected[k]) for y in kept):
                failed.append(k)

    in_threads(work)
    assert failed == []


def test_a_kernel_is_compiled_anew_when_what_it_calls_has_changed(tmp_path: Path) -> None:
    """numba looks at the file of a function only; `rnn_forward` is in another one than tanh."""
    shutil.copytree(ROOT / "backends" / "portnorm_backends", tmp_path / "portnorm_backends", ignore=shutil.ignore_patterns("__pycache__"))
    code = """
import numpy as np, portnorm as pn, portnorm_backends
layer = pn.RNN(2, 3, rng=0)
print(portnorm_backends.__file__, layer(np.ones((2, 1, 2), "float32"))[0].sum())
"""
    path = os.pathsep.join(str(p) for p in (tmp_path, ROOT, ROOT / "onnx_export"))
    before = output_of(code, PYTHONPATH=path).split()
    assert before[0].startswith(str(tmp_path))
    file = tmp_path / "portnorm_backends" / "cpu" / "pointwise.py"
    source = file.read_text()
    assert "return e * reciprocal(e + 2.0)" in source
    file.write_text(source.replace("e + 2.0", "e + 3.0"))
    assert output_of(code, PYTHONPATH=path).split()[1] != before[1]


# -- rows and channels ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rows_whose_squares_leave_the_type_go_to_the_definition(dtype: str, rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 8)).astype(dtype)
    x[1] *= np.finfo(dtype).max / 10
    y, residuals = normalize.forward(x, axes=(1,), param_axes=(1,), eps=1e-5)
    assert isinstance(residuals, Normalized if dtype == "float64" else Normalized | KernelResiduals)
    with without_kernels(np.ndarray):
        np.testing.assert_allclose(y, normalize(x, axes=(1,), param_axes=(1,), eps=1e-5), atol=1e-6)


@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 2, 5), (0, 4)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("parameters", ["none", "weight", "both"])
def test_the_last_axis(shape: tuple[int, ...], dtype: str, parameters: str, rng: np.random.Generator) -> None:
    """The public functions, whose kernels take plain arguments without detours."""
    x, w, b = (rng.standard_normal(s).astype(dtype) for s in (shape, shape[-1:], shape[-1:]))
    given_ = {"none": (), "weight": (w,), "both": (w, b)}[parameters]
    for function, arguments in ((pn.layer_norm, given_), (pn.rms_norm, given_[:1])):
        y, pullback = pn.vjp(function, x, *arguments)
        found = [y, function(x, *arguments), function(x, *arguments, axis=x.ndim - 1), *pullback(x)]
        with without_kernels(np.ndarray):
            y, pullback = pn.vjp(function, x, *arguments)
            expected = [y, y, y, *pullback(x)]
        for a, e in zip(found, expected, strict=True):
            assert (a.shape, a.dtype) == (e.shape, e.dtype)
            np.testing.assert_allclose(a, e, atol=10 * OPERATION[dtype] * max(1.0, float(np.max(np.abs(e), initial=0.0))))


def test_read_only_arrays_need_no_version_of_their_own(rng: np.random.Generator) -> None:
    from portnorm_backends.cpu import rowwise

    x, w = rng.standard_normal((3, 8)), rng.standard_normal(8)
    expected, pullback = pn.vjp(pn.layer_norm, x, w, w)
    cotangents = pullback(x)
    for a in (x, w):
        a.flags.writeable = False
    y, pullback = pn.vjp(pn.layer_norm, x, w, w)
    for a, b in zip((y, *pullback(x)), (expected, *cotangents), strict=True):
        np.testing.assert_array_equal(a, b)
    kernels: Any = rowwise.forward(x.dtype)
    assert len(kernels.signatures) == 1


def unaligned(a: Any) -> Any:
    room = np.zeros(a.nbytes + 1, np.uint8)[1:]
    room[:] = np.frombuffer(a.tobytes(), np.uint8)
    return room.view(a.dtype).reshape(a.shape)


@pytest.mark.parametrize(
    "change",
    [lambda a: a.astype(a.dtype.newbyteorder()), unaligned, np.asfortranarray, lambda a: np.repeat(a, 2, axis=-1)[..., ::2]],
    ids=["other byte order", "unaligned", "Fortran order", "strided"],
)
@pytest.mark.parametrize("which", ["x", "parameters", "cotangent"])
def test_arrays_of_any_layout(change: Any, which: str, rng: np.random.Generator) -> None:
    x, w, dy = (rng.standard_normal(s).astype(np.float32) for s in ((6, 8), 8, (6, 8)))
    expected, pullback = pn.vjp(pn.layer_norm, x, w, w)
    cotangents = pullback(dy)
    x, w, dy = change(x) if which == "x" else x, change(w) if which == "parameters" else w, change(dy) if which == "cotangent" else dy
    y, pullback = pn.vjp(pn.layer_norm, x, w, w)
    for a, b in zip((y, *pullback(dy)), (expected, *cotangents), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("shape", [(64, 16384), (16384, 64)])
def test_no_temporary_of_the_size_of_the_input(
    shape: tuple[int, int], count: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "_count", lambda: count)
    x, w = rng.standard_normal(shape).astype(np.float32), np.ones(shape[1], np.float32)
    forward, backward = [], []
    for _ in range(3):  # of which the least: another thread may have something of its own
        before = y = dx = pullback = None
        memory.release()  # else what other tests have left may be given back meanwhile
        before, pullback = pn.vjp(pn.layer_norm, x, w, w)
        pullback(before)
        tracemalloc.start()
        y, pullback = pn.vjp(pn.layer_norm, x, w, w)
        forward.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.reset_peak()
        dx, _, _ = pullback(y)
        backward.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert min(forward) < 1.5 * y.nbytes
    assert min(backward) < 2.5 * dx.nbytes  # with y, which lives


@pytest.mark.parametrize(("what", "calls_"), [("layer_norm", 1000), ("LSTM", 100)])
def test_many_threads_at_once(what: str, calls_: int, rng: np.random.Generator) -> None:
    """8 threads forward and backward, bit by bit as alone."""
    given_, failed = rng.standard_normal((8, 5, 4, 64)).astype(np.float32), []
    w = rng.standard_normal(64).astype(np.float32)
    layer = pn.LSTM(64, 8, norm="layer", rng=0)

    def run(k: int) -> list[Any]:
        if what == "LSTM":
            y, _, pull = layer.vjp(given_[k], training=True)
            return [y, *leaves(pull(y))]
        y, pullback = pn.vjp(pn.layer_norm, given_[k], w, w)
        return [y, *pullback(y)]

    expected = [run(k) for k in range(8)]

    def work(k: int) -> None:
        for _ in range(calls_):
            if not all(np.array_equal(a, b) for a, b in zip(run(k), expected[k], strict=True)):
                failed.append(k)

    in_threads(work)
    assert failed == []


CALL = """
import numpy as np, portnorm as pn
def call():
    x = np.random.default_rng(0).standard_normal((64, 512)).astype("float32")
    y, pullback = pn.vjp(pn.layer_norm, x, np.ones(512, "float32"), np.zeros(512, "float32"))
    h, _, back = pn.LSTM(512, 8, norm="layer", rng=0).vjp(x[:, None, :], training=True)
    return float(np.abs(y).sum() + np.abs(pullback(x)[0]).sum() + np.abs(back(h)[0]).sum())
"""


FORK = """
import os, threading
def fork():
    child = os.fork()
    if child == 0:
        found = []
        inner = [threading.Thread(target=lambda: found.append(call())) for _ in range(4)]
        [t.start() for t in inner]
        [t.join() for t in inner]
        os._exit(0 if found == [expected] * 4 else 1)
    return child
def code(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
expected = call()
threads = [threading.Thread(target=call) for _ in range(4)]
[t.start() for t in threads]
"""
NORM_ONLY = """
def call():
    total = 0.0
    for _ in range(50):
        y, pullback = pn.vjp(pn.layer_norm, x, w, w)
        total += float(np.abs(y).sum() + np.abs(pullback(x)[0]).sum())
    return total
x = np.random.default_rng(0).standard_normal((64, 512)).astype("float32")
w = np.ones(512, "float32")
"""


def test_after_a_fork_and_from_threads_of_the_child() -> None:
    assert output_of(CALL + FORK + "[t.join() for t in threads]; print([code(fork()) for _ in range(5)])") == "[0, 0, 0, 0, 0]"


@pytest.mark.parametrize(
    ("call", "environment"), [(CALL + NORM_ONLY, {}), (CALL, {"OPENBLAS_NUM_THREADS": "1"})], ids=["norm", "recurrent"]
)
def test_a_fork_while_other_threads_are_in_kernels(call: str, environment: dict[str, str]) -> None:
    """Our kernels alone: the products of NumPy's BLAS have no threads of their own here (docs/speed.md)."""
    during = "children = [fork() for _ in range(5)]; [t.join() for t in threads]; print([code(c) for c in children])"
    assert output_of(call + FORK + during, **environment) == "[0, 0, 0, 0, 0]"


@pytest.mark.peers
def test_beside_torch_and_onnxruntime() -> None:
    """All three compute in turns, in one process, whichever was imported first."""
    for order in ("import torch, onnxruntime", "call(); import torch, onnxruntime"):
        code = f"""{CALL}
{order}
expected = call()
layer = torch.nn.LayerNorm(512)
fast = pn.compile(pn.LayerNorm(512))
x = np.ones((64, 512), "float32")
for _ in range(50):
    layer(torch.ones(64, 512)).sum().backward()
    fast(x)
    assert call() == expected
print("same")
"""
        assert output_of(code) == "same"


def test_without_numba_there_are_no_compiled_kernels_and_the_same_numbers() -> None:
    hidden = f"import sys; sys.modules['numba'] = None\n{CALL}\nfrom portnorm.arrays import library\n"
    *kernels, value = output_of(hidden + "print(*library(np.ones(1)).kernels, call())").split()
    assert kernels == ["embedding", "rows_added"]  # which NumPy itself has
    # 64 steps of an LN-LSTM amplify the last bit; 1.2e-6 measured.
    assert float(value) == pytest.approx(float(output_of(CALL + "print(call())")), rel=1e-5)


BYTES = registers.has_products_of_bytes() or registers.has_avx2()


@pytest.mark.parametrize("name", ["of_words", *(["of_bytes"] if BYTES else [])])
@pytest.mark.parametrize("inputs", [1, 3, 255, 256, 257, 1000])
def test_products_of_integers_are_exact(name: str, inputs: int, rng: np.random.Generator) -> None:
    """Also of the largest: 127 · 64 in every place, of one sign and of both."""
    from portnorm_backends.cpu import integer_rows

    x = rng.integers(-127, 128, (4, inputs))
    x[1], x[2], x[3] = 127, -127, 0
    weight = rng.integers(-64, 65, (5, inputs)).astype(np.int8)
    weight[1], weight[2] = 64, -64
    totals, sums = np.empty(5, np.int32), weight.sum(axis=-1, dtype=np.int32)
    for row in x:
        q = (row + 128).astype(np.uint8) if name == "of_bytes" else row.astype(np.int16)
        getattr(integer_rows, name)(q, weight, sums, totals)
        assert totals.tolist() == (weight.astype(np.int64) @ row).tolist()


def test_a_function_without_a_module_compiles_beside_the_kernels() -> None:
    """numba tells whoever listens of every function, somebody's too, such as those that `exec` makes."""
    made: dict[str, Any] = {}
    exec("def twice(x):\n    return 2 * x", made)
    made["twice"].__module__ = None
    assert pytest.importorskip("numba").njit(made["twice"])(3) == 6
