"""Sums of like terms by the kernels. Each addition rounds in the same direction: what one accumulator adds up must not grow with the array.

Also run for registers of other widths (`test_registers`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from portnorm.conform.result import ulp
from portnorm.conform.tolerances import FORWARD_ULP, GRADIENT_ULP
from portnorm.dtypes import float32_value
from tests.tolerances import CELL_SUM_ULP

Shape = tuple[int, ...]
Array = np.ndarray[Any, Any]

VALUES = (1.1, 1.9438, 2.77, 3.9)

ABOUT: dict[str, Callable[[np.random.Generator, Array], Array]] = {
    "constant": lambda rng, x: x,
    "within 1e-3": lambda rng, x: x + rng.uniform(-1e-3, 1e-3, x.shape),
    "1e-3 to either side": lambda rng, x: x + rng.choice([-1e-3, 1e-3], x.shape),
    "within an ULP": lambda rng, x: x + rng.integers(-1, 2, x.shape) * np.spacing(x),
}
"""What becomes of an array of one value."""


@dataclass(frozen=True)
class Place:
    """A normalization in a place where n values or rows make up a sum."""

    name: str
    call: Callable[..., Any]
    """`call(x, weight, bias)`, the forward result and its pullback."""
    shape: Callable[[int], Shape]
    """Of n values; groups of channels are an axis of their own."""
    axes: Shape
    """Of a statistic."""
    parameter: Shape
    """The axes of gain and shift."""
    center: bool = True


def _rms(x: Array, weight: Array, bias: Array) -> Any:
    return pn.vjp(pn.rms_norm, x, weight)


def _layer(x: Array, weight: Array, bias: Array) -> Any:
    return pn.vjp(pn.layer_norm, x, weight, bias)


def _batch(x: Array, weight: Array, bias: Array) -> Any:
    return pn.vjp(pn.batch_norm, x, weight, bias)


def _group(x: Array, weight: Array, bias: Array) -> Any:
    batch, groups, channels, *others = x.shape
    y, pullback = pn.vjp(pn.group_norm, x.reshape(batch, groups * channels, *others), groups, weight, bias)
    return y, lambda dy: pullback(dy.reshape(y.shape))


PLACES = [
    Place("rows of rms_norm", _rms, lambda n: (2, n), (1,), (1,), center=False),
    Place("rows of layer_norm", _layer, lambda n: (2, n), (1,), (1,)),
    Place("many rows of rms_norm", _rms, lambda n: (n, 24), (1,), (1,), center=False),
    Place("many rows of layer_norm", _layer, lambda n: (n, 24), (1,), (1,)),
    Place("channels of group_norm", _group, lambda n: (1, 2, n // 2, 4), (2, 3), (1, 2)),
    Place("many rows of group_norm", _group, lambda n: (n, 2, 2, 3), (2, 3), (1, 2)),
    Place("rows of batch_norm", _batch, lambda n: (n, 6), (0,), (1,)),
    Place("many small maps of batch_norm", _batch, lambda n: (n, 3, 2), (0, 2), (1,)),
    Place("large maps of batch_norm", _batch, lambda n: (2, 3, n), (0, 2), (1,)),
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("count", [96, 4096, pytest.param(65536, marks=pytest.mark.slow)])
@pytest.mark.parametrize("place", PLACES, ids=lambda p: p.name)
def test_like_terms(place: Place, count: int, dtype: str, rng: np.random.Generator) -> None:
    """The result within 8 ULP of its largest value, cotangents within 32; those of gain and shift from a cotangent of like values."""
    shape = place.shape(count)
    own = tuple(n if a in place.parameter else 1 for a, n in enumerate(shape))
    weight, dy = rng.uniform(0.5, 2.0, own).astype(dtype), rng.standard_normal(shape).astype(dtype)
    for value in VALUES if count < 2**16 else VALUES[1:3]:
        for name, about in ABOUT.items():
            x, like = (about(rng, np.full(shape, v, dtype)).astype(dtype) for v in (value, 1.7))
            y, pullback = place.call(x, weight.reshape(-1), np.zeros(weight.size, dtype))
            exact_y, exact_dx, _ = truth(place, x, weight, dy)
            *_, exact = truth(place, x, weight, like)
            which = f"{name}, {value}"
            assert off(y, exact_y, dtype, place.axes) <= FORWARD_ULP, which
            assert off(pullback(dy)[0], exact_dx, dtype, place.axes) <= GRADIENT_ULP, which
            last = [d for d in pullback(like) if d is not None][-1]  # the sum of dy · x̂ cancels where x̂ is centred; dy does not
            assert off(last, exact[int(place.center)], dtype, None) <= GRADIENT_ULP, which


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("op", [pn.layer_norm, pn.rms_norm], ids=lambda op: op.name)
@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((100, 100, 3), (0, 1)),
        ((2, 16000), (1,)),
        ((2, 500, 32), (1, 2)),
        ((2, 130, 1, 64), (1, 2, 3)),
        ((300, 7), (0,)),
        ((3, 5, 7), (0, 2)),
    ],
    ids=str,
)
def test_like_terms_in_any_order_of_memory(shape: Shape, axes: Shape, op: Any, order: Any, rng: np.random.Generator) -> None:
    """Also of values that do not lie beside each other, or along the first axes: NumPy adds those one after the other."""
    for values in (np.full(shape, 1e4), rng.uniform(1, 2, shape)):
        x, dy = (np.asarray(a.astype(np.float32), order=order) for a in (values, rng.standard_normal(shape)))
        y, pullback = pn.vjp(op, x, axis=axes, eps=1e-3)
        z = x.astype(np.float64)
        z = z - z.mean(axis=axes, keepdims=True) if op is pn.layer_norm else z
        rstd = 1 / np.sqrt((z * z).mean(axis=axes, keepdims=True) + float32_value(1e-3))
        g = dy - dy.mean(axis=axes, keepdims=True, dtype=np.float64) if op is pn.layer_norm else dy
        dx = rstd * (g - z * rstd * (dy * z * rstd).mean(axis=axes, keepdims=True))
        for found, exact, limit in ((y, z * rstd, FORWARD_ULP), (pullback(dy)[0], dx, GRADIENT_ULP)):
            assert np.max(np.abs(found - exact)) <= limit * np.spacing(np.float32(np.max(np.abs(exact)) + 1e-30))


def truth(place: Place, x: Array, weight: Array, dy: Array) -> tuple[Array, Array, list[Array]]:
    """y, dx and the cotangents of gain and shift in a wider type."""
    x, weight, dy = (a.astype(np.longdouble) for a in (x, weight, dy))

    def mean(a: Array) -> Array:
        made: Array = a.mean(axis=place.axes, keepdims=True)
        return made

    z = x - mean(x) if place.center else x
    z = z - mean(z) if place.center else z
    rstd = 1 / np.sqrt(mean(z * z) + np.longdouble(float32_value(1e-5)))
    xhat, g = z * rstd, dy * weight
    dx = rstd * ((g - mean(g) if place.center else g) - xhat * mean(g * xhat))
    others = tuple(a for a in range(x.ndim) if a not in place.parameter)
    return xhat * weight, dx, [(dy * xhat).sum(axis=others), dy.sum(axis=others)]


def off(found: Array, exact: Array, dtype: str, axes: Any) -> float:
    """The largest error in units in the last place of the largest value along `axes`."""
    largest = np.max(np.abs(exact), axis=axes, keepdims=True)
    error = np.abs(found.astype(np.longdouble).reshape(exact.shape) - exact)
    return float(np.max(error / ulp(largest, dtype)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("cell", "norm"), [("RNN", "layer"), ("LSTM", "layer"), ("LSTM", "batch"), ("GRU", "batch"), ("RNN", "batch")])
def test_like_sequences_in_a_cell(cell: str, norm: str, dtype: str, rng: np.random.Generator) -> None:
    """4,096 times the same eight sequences have their statistics, and 4,096 times the cotangents of gain and shift in the loop."""
    times, layer = 4096, getattr(pn, cell)(3, 4, norm=norm, dtype=dtype, rng=0)
    x, dy = rng.standard_normal((2, 8, 3)).astype(dtype), rng.uniform(1, 2, (2, 8, 4)).astype(dtype)
    state, buffers = layer.initial_state(8, noise=0.5, rng=1), dict(layer.buffers)

    def run(many: int) -> tuple[dict[str, Array], dict[str, Array]]:
        layer.buffers = dict(buffers)
        given = tuple(np.tile(s, (1, many, 1)) if s.ndim == 3 else s for s in state)
        _, after, pullback = layer.vjp(np.tile(x, (1, many, 1)), state=given, training=True)
        _, _, grads = pullback(np.tile(dy, (1, many, 1)), tuple(np.zeros_like(a) for a in after[: len(layer.cell.states)]))
        return grads, layer.buffers

    once, statistics = run(1)
    often, statistics_often = run(times)
    inside = [name for name in once if name.startswith(("norm_hh", "norm_c", "norm_sum"))]
    assert inside
    for name in inside:
        assert off(often[name], times * once[name].astype(np.longdouble), dtype, None) <= CELL_SUM_ULP, name
    for name, s in statistics.items():
        if name.endswith("running_var"):
            assert off(statistics_often[name], s.astype(np.longdouble), dtype, None) <= CELL_SUM_ULP, name


def test_what_is_not_finite_stays_what_it_is() -> None:
    """An infinite term makes a sum infinite, not what rounding loses of it."""
    x = np.random.default_rng(0).standard_normal((200, 8, 6)).astype(np.float32)
    dy = np.ones_like(x)
    dy[3, 2, 1] = np.inf
    for function, shape in ((pn.layer_norm, (1600, 6)), (pn.batch_norm, (1600, 6)), (pn.batch_norm, (200, 8, 6))):
        given = x.reshape(shape)
        ones = np.ones(8 if len(shape) == 3 else 6, np.float32)
        *_, dbias = pn.vjp(function, given, ones, ones)[1](dy.reshape(shape))
        assert np.isinf(dbias).sum() == 1
        assert not np.isnan(dbias).any()
