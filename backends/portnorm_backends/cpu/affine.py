"""The affine map of NumPy arrays: where the packed product of `products` is worth its packing."""

from __future__ import annotations

from typing import Any

import numpy

from portnorm.arrays import Kernel
from portnorm_backends.cpu.layout import RANGE, NumPyArray, taken
from portnorm_backends.cpu.warming import ready

_WORTH = 2**18
"""Multiplications from which the kernel is worth its call and the packing of the weights."""


def _is_worth(x: Any, weight: Any, bias: Any = None) -> bool:
    """Matrices of one type of which BLAS would make the product and NumPy then the sum; for few rows it need not pack."""
    arrays = (x, weight) if bias is None else (x, weight, bias)
    for a in arrays:
        if type(a) is not numpy.ndarray:
            return False
    outputs, inputs = weight.shape if weight.ndim == 2 else (0, 0)
    if x.size * outputs < _WORTH or any(a.dtype not in RANGE or a.dtype != x.dtype for a in arrays):
        return False
    fits = 0 < inputs == x.shape[-1] and (bias is None or bias.shape == (outputs,)) if x.ndim > 1 else False
    return bool(fits and x.size >= 8 * inputs and ready("products", x.dtype))


def _linear(x: NumPyArray, weight: NumPyArray, bias: NumPyArray | None = None) -> tuple[NumPyArray, Any]:
    from portnorm_backends.cpu import products

    rows = taken(x, x.dtype, (x.size // x.shape[-1], x.shape[-1]))
    y = products.affine(rows, weight.T, bias)
    return y.reshape(*x.shape[:-1], weight.shape[0]), (x, weight, bias)


KERNEL = Kernel(call=lambda *args: _linear(*args)[0], forward=_linear, accepts=_is_worth)
