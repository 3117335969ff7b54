"""The affine map of NumPy arrays and its cotangents: where the products of `products` and `outer` are worth their packing."""

from __future__ import annotations

from typing import Any

import numpy

from portnorm.arrays import Kernel
from portnorm_backends.cpu.layout import RANGE, NumPyArray, taken
from portnorm_backends.cpu.warming import ready

_WORTH = 2**18
"""Multiplications from which the kernel is worth its call and the packing of the weights."""

_LONG = 2**22
"""Multiplications from which that for sums over many rows is worth being compiled."""


def _are_alike(*arrays: Any) -> bool:
    """Arrays of NumPy of one type for which there are kernels."""
    return all(type(a) is numpy.ndarray and a.dtype in RANGE and a.dtype == arrays[0].dtype for a in arrays)


def _is_worth(x: NumPyArray, weight: NumPyArray, contracted: int) -> bool:
    """A product over the last axis of x and that axis of the weights, for which BLAS would pack both.

    For a single row it need not, nor for few where the weights lie as it reads them.
    """
    if weight.ndim != 2 or x.ndim < 2 or not 0 < weight.shape[contracted] == x.shape[-1]:
        return False
    large = x.size * weight.shape[1 - contracted] >= _WORTH and x.size >= (2 if contracted == 1 else 8) * x.shape[-1]
    return large and ready("products", x.dtype)


def _takes(x: Any, weight: Any, bias: Any = None) -> bool:
    if bias is None:
        return _are_alike(x, weight) and _is_worth(x, weight, 1)
    return _are_alike(x, weight, bias) and bias.shape == weight.shape[:1] and _is_worth(x, weight, 1)


def _takes_back(dy: Any, weight: Any) -> bool:
    return _are_alike(dy, weight) and _is_worth(dy, weight, 0)


def _times(x: NumPyArray, weight: NumPyArray, bias: NumPyArray | None = None) -> NumPyArray:
    """x · weight + bias, for weights (k, n) with any strides."""
    from portnorm_backends.cpu import products

    rows = taken(x, x.dtype, (x.size // x.shape[-1], x.shape[-1]))
    return products.affine(rows, weight, bias).reshape(*x.shape[:-1], weight.shape[1])


def _linear(x: NumPyArray, weight: NumPyArray, bias: NumPyArray | None = None) -> tuple[NumPyArray, Any]:
    return _times(x, weight.T, bias), (x, weight, bias)


def _takes_many(dy: Any, x: Any) -> bool:
    if not _are_alike(dy, x) or dy.ndim < 2 or dy.shape[:-1] != x.shape[:-1] or dy.size * x.shape[-1] < _LONG:
        return False
    if not ready("outer products", x.dtype):
        return False
    from portnorm_backends.cpu import outer

    return outer.is_worth(x.shape[-1], x.itemsize)


def _weight_cotangent(dy: NumPyArray, x: NumPyArray) -> NumPyArray:
    from portnorm_backends.cpu import outer

    return outer.product(*(a.reshape(-1, a.shape[-1]) for a in (dy, x)))


KERNELS = {
    "linear": Kernel(call=lambda *args: _linear(*args)[0], forward=_linear, accepts=_takes),
    "input_cotangent": Kernel(call=_times, accepts=_takes_back),
    "weight_cotangent": Kernel(call=_weight_cotangent, accepts=_takes_many),
}
