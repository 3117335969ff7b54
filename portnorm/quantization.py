"""Numbers that integers of a few bits can say, simulated in the type of the array: what an int8 graph computes, anywhere, and trainable.

    q = round(x / m · n) within ±n,    y = q · m / n,    m = max |x| over the last axis or a block of it, n = levels

A matrix product of two such arrays is the product of their integers, which is exact, times what stands outside of the sum. Weights have 64
levels to each side, seven bits: two products with eight unsigned bits then fit into the 16 bits in which x86 processors without VNNI add
them up (2 · 255 · 64 < 2¹⁵), where 127 levels would saturate without a word. Inputs have 127.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, get_args

from portnorm.affine import linear
from portnorm.arrays import Array, constant, device_of, library, namespace, require_given, xp_of
from portnorm.dtypes import require_floating, statistics_dtype
from portnorm.errors import UnsupportedError
from portnorm.op import op
from portnorm.scalars import real_number, switch, whole_number

QuantizeName = Literal["int8", "int4"]
"""The names that `quantize=` takes."""


class Grid(NamedTuple):
    """The numbers that are left of a row: `fake_quantize` takes these as its arguments."""

    levels: int
    """To each side of 0."""
    block: int | None = None
    """How many neighbours in a row share a step; `None` for all of them."""
    lopsided: bool = False
    """Whether there is a level less on the side where the largest number is not: 16 numbers, and not 17, for four bits."""

    @property
    def arguments(self) -> dict[str, Any]:
        """By name, without those that are usual."""
        return {name: value for name, value in self._asdict().items() if name == "levels" or value}


class Scheme(NamedTuple):
    """How weights, what is multiplied with them, and tables of embeddings are rounded."""

    weights: Grid
    inputs: Grid
    tables: Grid


WEIGHTS = 64
"""Levels of a weight of eight bits. A power of two: quantizing what is quantized changes no bit."""
INPUTS = 127
"""Levels of what is multiplied with weights."""

SCHEMES: dict[QuantizeName, Scheme] = {
    "int8": Scheme(Grid(WEIGHTS), Grid(INPUTS), Grid(WEIGHTS)),
    "int4": Scheme(Grid(8, 128, True), Grid(INPUTS, 128), Grid(WEIGHTS)),
}
"""The latter is what onnxruntime's MatMulNBits computes with `accuracy_level` 4, in blocks of 128."""

_moved: ContextVar[float] = ContextVar("moved", default=0.0)
_movers = 0
"""How many blocks of `rounding_moved` there are now; a compiler that follows a call can read this, and not the other."""


def checked_quantize(name: Any) -> QuantizeName | None:
    """`name`, or `UnsupportedError`."""
    if name is not None and (not isinstance(name, str) or name not in get_args(QuantizeName)):
        raise UnsupportedError(f"`quantize` is {name!r}; expected {' or '.join(map(repr, get_args(QuantizeName)))}, or None")
    return name  # type: ignore[return-value]


@op
def fake_quantize(
    x: Array, *, levels: int = INPUTS, bound: float | None = None, block: int | None = None, lopsided: bool = False
) -> tuple[Array, tuple[Array, ...]]:
    """The nearest of 2 · `levels` + 1 evenly spaced numbers from −m to m, for every number of `x` (…, features); ties go to the even one.

    m is the largest |x| of each row, or of each `block` of neighbours in it, or `bound` for all of them: what is beyond is taken for
    ±`bound`. `lopsided` leaves out the last number on the side where ±m is not. The result has the dtype of `x`.
    Gradients go straight through (Bengio et al. 2013, arXiv 1308.3432): dx = dy, and 0 beyond a bound.
    Raises `DTypeError`, and `UnsupportedError` for `levels`, a `bound` or a `block` that are not positive.

    >>> import numpy as np, portnorm as pn
    >>> pn.fake_quantize(np.array([[0.1, -0.26, 1.0], [10.0, 2.4, 0.0]]), levels=4)
    array([[ 0.  , -0.25,  1.  ],
           [10.  ,  2.5 ,  0.  ]])
    """
    require_given(x=x)
    xp = namespace(x=x)
    require_floating(xp, x=x)
    levels = whole_number("levels", levels, 1)
    bound = None if bound is None else real_number("bound", bound, 0.0, math.inf, "a positive number, or None")
    block = None if block is None else whole_number("block", block, 1)
    lopsided = switch("lopsided", lopsided)
    if bound is not None and not 0.0 < bound < math.inf:
        raise UnsupportedError(f"`bound` is {bound}; expected a positive number, or None")
    dtype = statistics_dtype(xp, x.dtype)
    wide = xp.astype(x, dtype, copy=False)
    if bound is None and block is not None and wide.ndim and isinstance(wide.shape[-1], int) and wide.shape[-1] > block:
        y = _whole(_on_grid(_in_blocks(wide, block), levels, None, lopsided), wide.shape)
    else:
        y = _on_grid(wide, levels, bound, lopsided)
    if is_rounding_moved():
        y = y * _about_one(y)
    y = xp.astype(y, x.dtype, copy=False)
    if library(x).autodiff is not None:  # one that differentiates this finds what the vjp gives
        inside = x if bound is None else xp.clip(x, -bound, bound)
        y = constant(y) + (inside - constant(inside))
    return y, (() if bound is None else (x,))


def _on_grid(x: Array, levels: int, bound: float | None, lopsided: bool) -> Array:
    """Each number as so many steps, with one step for all or for each row."""
    xp, place = xp_of(x), {"dtype": x.dtype, "device": device_of(x)}
    unit = xp.asarray(1.0 / levels, **place)
    if bound is not None or 0 in x.shape[-1:]:
        largest: Array | float = 1.0 if bound is None else bound
    else:
        least = xp.asarray(float(xp.finfo(x.dtype).smallest_normal), **place)
        largest = xp.maximum(xp.max(xp.abs(x), axis=-1, keepdims=True), least)
        if lopsided:  # −levels steps are the largest number itself, of either sign
            largest = xp.where(xp.max(x, axis=-1, keepdims=True) == largest, -largest, largest)
    share = (x if bound == 1.0 else x / largest) / unit
    if is_rounding_moved():
        share = share + _moved.get()
    return xp.clip(xp.round(share), float(-levels), float(levels - lopsided)) * (unit * largest)


def _about_one(x: Array) -> Array:
    """(features,): 1 and at most one unit in its last place more or less, as sums in float32 differ; what is rounded does not show that."""
    xp = xp_of(x)
    turn = xp.arange(x.shape[-1], dtype=x.dtype, device=device_of(x)) * (1.7 if _moved.get() > 0 else 2.3)
    return 1.0 + float(xp.finfo(x.dtype).eps) * xp.round(xp.cos(turn))


def _in_blocks(x: Array, block: int) -> Array:
    """(…, features) as (…, blocks, block), with 0 behind the last."""
    xp, rest = xp_of(x), -x.shape[-1] % block
    if rest:
        x = xp.concat((x, xp.zeros((*x.shape[:-1], rest), dtype=x.dtype, device=device_of(x))), axis=-1)
    return xp.reshape(x, (*x.shape[:-1], x.shape[-1] // block, block))


def _whole(x: Array, shape: tuple[Any, ...]) -> Array:
    """And back."""
    found: Array = xp_of(x).reshape(x, (*shape[:-1], x.shape[-2] * x.shape[-1]))
    return found if found.shape[-1] == shape[-1] else found[..., : shape[-1]]


@fake_quantize.backward
def _(
    residuals: tuple[Array, ...],
    dy: Array,
    *,
    levels: int = INPUTS,
    bound: float | None = None,
    block: int | None = None,
    lopsided: bool = False,
) -> tuple[Array]:
    if bound is None:
        return (dy,)
    (x,) = residuals
    xp = xp_of(x)
    return (xp.where(xp.abs(x) <= bound, dy, 0.0),)


@op
def integer_product(x: Array, weight: Array, *, bound: float | None = None, block: int | None = None) -> tuple[Array, tuple[Any, ...]]:
    """x · weightᵀ with `x` (…, inputs) as integers can say it, and `weight` (outputs, inputs) that was rounded to its integers before.

    Both vjps go straight through the rounding: dx = dy · weight, dweight = Σ dyᵀ · x̃ with the rounded x̃.

    >>> import numpy as np
    >>> integer_product(np.array([[0.5, 1.0]]), np.array([[1.0, 0.5], [0.0, 1.0]])).round(2)
    array([[1., 1.]])
    """
    rounded, residuals = fake_quantize.forward(x, bound=bound, block=block)
    y, of_product = linear.forward(rounded, weight)
    return y, (residuals, of_product)


@integer_product.backward
def _(residuals: tuple[Any, ...], dy: Array, *, bound: float | None = None, block: int | None = None) -> tuple[Array, Array]:
    of_rounding, of_product = residuals
    dx, dweight, _ = linear.vjp(of_product, dy)
    return fake_quantize.vjp(of_rounding, dx, bound=bound)[0], dweight


def integers_of(rounded: Array) -> tuple[Array, Array]:
    """(q, s) of weights (rows, columns) that were rounded to eight bits: integers within ±64, and the step (rows,) of each row."""
    xp = xp_of(rounded)
    steps = xp.max(xp.abs(rounded), axis=1) / WEIGHTS
    return xp.astype(xp.round(rounded / xp.where(steps > 0, steps, xp.ones_like(steps))[:, None]), xp.int8), steps


def is_rounding_moved() -> bool:
    """Whether the call is within `rounding_moved`."""
    return _movers != 0 and _moved.get() != 0.0


@contextmanager
def rounding_moved(by: float) -> Iterator[None]:
    """Within it every number of an input is rounded as if it were so many levels larger: what rounding before it can turn over, it does.

    What comes out is moved by at most a unit in the last place.
    """
    global _movers
    token, _movers = _moved.set(by), _movers + 1
    try:
        yield
    finally:
        _moved.reset(token)
        _movers -= 1
