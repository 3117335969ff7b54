"""Numbers that integers of a few bits can say, simulated in the type of the array: what an int8 graph computes, anywhere, and trainable.

    q = round(x / m · n) within ±n,    y = q · m / n,    m = max |x| over the last axis, n = levels

A matrix product of two such arrays is the product of their integers, which is exact, times what stands outside of the sum. Weights have 64
levels to each side, seven bits: two products with eight unsigned bits then fit into the 16 bits in which x86 processors without VNNI add
them up (2 · 255 · 64 < 2¹⁵), where 127 levels would saturate without a word. Inputs have 127.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, get_args

from portnorm.affine import linear
from portnorm.arrays import Array, device_of, namespace, require_floating, require_given, statistics_dtype, xp_of
from portnorm.errors import UnsupportedError
from portnorm.op import op

QuantizeName = Literal["int8"]
"""The names that `quantize=` takes."""


WEIGHTS = 64
"""Levels of a weight to each side of 0. A power of two: quantizing what is quantized changes no bit."""
INPUTS = 127
"""Levels of what is multiplied with weights."""

_moved: ContextVar[float] = ContextVar("moved", default=0.0)


def checked_quantize(name: Any) -> QuantizeName | None:
    """`name`, or `UnsupportedError`."""
    if name is not None and name not in get_args(QuantizeName):
        raise UnsupportedError(f"`quantize` is {name!r}; expected {' or '.join(map(repr, get_args(QuantizeName)))}, or None")
    return name  # type: ignore[no-any-return]


@op
def fake_quantize(x: Array, *, levels: int = INPUTS, bound: float | None = None) -> tuple[Array, tuple[Array, ...]]:
    """The nearest of 2 · `levels` + 1 evenly spaced numbers from −m to m, for every number of `x` (…, features); ties go to the even one.

    m is the largest |x| of each row, or `bound` for all of them: what is beyond is taken for ±`bound`. The result has the dtype of `x`.
    Gradients go straight through (Bengio et al. 2013, arXiv 1308.3432): dx = dy, and 0 beyond a bound.
    Raises `DTypeError`, and `UnsupportedError` for a `bound` or `levels` that are not positive.

    >>> import numpy as np, portnorm as pn
    >>> pn.fake_quantize(np.array([[0.1, -0.26, 1.0], [10.0, 2.4, 0.0]]), levels=4)
    array([[ 0.  , -0.25,  1.  ],
           [10.  ,  2.5 ,  0.  ]])
    """
    require_given(x=x)
    xp = namespace(x=x)
    require_floating(xp, x=x)
    if not levels > 0 or (bound is not None and not bound > 0):
        raise UnsupportedError(f"`levels` is {levels} and `bound` {bound}; expected positive numbers")
    dtype = statistics_dtype(xp, x.dtype)
    wide = xp.astype(x, dtype, copy=False)
    largest: Array | float = 1.0 if bound is None else bound
    if bound is None and 0 not in x.shape[-1:]:
        least = xp.asarray(float(xp.finfo(dtype).smallest_normal), dtype=dtype, device=device_of(x))
        largest = xp.maximum(xp.max(xp.abs(wide), axis=-1, keepdims=True), least)
    step = xp.asarray(1.0 / levels, dtype=dtype, device=device_of(x))
    share = (wide if bound == 1.0 else wide / largest) / step
    if _moved.get():
        share = share + _moved.get()
    y = xp.clip(xp.round(share), float(-levels), float(levels)) * (step * largest)
    return xp.astype(y, x.dtype, copy=False), (() if bound is None else (x,))


@fake_quantize.backward
def _(residuals: tuple[Array, ...], dy: Array, *, levels: int = INPUTS, bound: float | None = None) -> tuple[Array]:
    if bound is None:
        return (dy,)
    (x,) = residuals
    xp = xp_of(x)
    return (xp.where(xp.abs(x) <= bound, dy, 0.0),)


@op
def integer_product(x: Array, weight: Array, *, bound: float | None = None) -> tuple[Array, tuple[Any, ...]]:
    """x · weightᵀ with `x` (…, inputs) as integers can say it, and `weight` (outputs, inputs) that was rounded to its integers before.

    Both vjps go straight through the rounding: dx = dy · weight, dweight = Σ dyᵀ · x̃ with the rounded x̃.

    >>> import numpy as np
    >>> integer_product(np.array([[0.5, 1.0]]), np.array([[1.0, 0.5], [0.0, 1.0]])).round(2)
    array([[1., 1.]])
    """
    rounded, residuals = fake_quantize.forward(x, bound=bound)
    y, of_product = linear.forward(rounded, weight)
    return y, (residuals, of_product)


@integer_product.backward
def _(residuals: tuple[Any, ...], dy: Array, *, bound: float | None = None) -> tuple[Array, Array]:
    of_rounding, of_product = residuals
    dx, dweight, _ = linear.vjp(of_product, dy)
    return fake_quantize.vjp(of_rounding, dx, bound=bound)[0], dweight


def is_rounding_moved() -> bool:
    """Whether the call is within `rounding_moved`."""
    return _moved.get() != 0.0


@contextmanager
def rounding_moved(by: float) -> Iterator[None]:
    """Within it every number of an input is rounded as if it were so many levels larger: what rounding before it can turn over, it does."""
    token = _moved.set(by)
    try:
        yield
    finally:
        _moved.reset(token)
