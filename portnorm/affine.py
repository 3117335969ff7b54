"""The affine map, as one matrix product whatever the number of leading axes."""

from __future__ import annotations

import math

from portnorm.arrays import Array, Namespace, namespace, require_given, require_lengths, xp_of
from portnorm.dtypes import is_kind, require_real
from portnorm.errors import ShapeError
from portnorm.op import op
from portnorm.sums import total_like

Residuals = tuple[Array, Array, Array | None]


@op
def times_transposed(x: Array, weight: Array) -> tuple[Array, None]:
    """x · weightᵀ for `x` (rows, inputs) and `weight` (outputs, inputs), without checks: what a library may have as one operator."""
    xp = xp_of(x)
    return xp.matmul(x, xp.matrix_transpose(weight)), None


@op
def linear(x: Array, weight: Array, bias: Array | None = None) -> tuple[Array, Residuals]:
    """y = x · weightᵀ + bias, for `x` (…, inputs), `weight` (outputs, inputs) as torch stores it, and `bias` (outputs,).

    Result (…, outputs) in the common dtype. Raises `ShapeError` where the inputs differ.

    >>> import numpy as np, portnorm as pn
    >>> pn.linear(np.array([[1.0, 2.0]]), np.array([[3.0, 4.0], [5.0, 6.0]]), np.array([0.5, 0.0]))
    array([[11.5, 17. ]])
    """
    if weight is None:
        require_given(weight=weight)
    xp = namespace(x=x, weight=weight, bias=bias)
    require_lengths(x=x)
    if x.dtype != weight.dtype or not is_kind(xp, x.dtype, "real floating"):
        require_real(xp, x=x, weight=weight)
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ShapeError(f"`weight` has shape {tuple(weight.shape)}; expected (outputs, inputs) for the last axis of `x` {tuple(x.shape)}")
    y = times_transposed(_rows(xp, x), weight)
    if bias is not None:
        if tuple(bias.shape) != (weight.shape[0],):
            raise ShapeError(f"`bias` has shape {tuple(bias.shape)} but `weight` {tuple(weight.shape)} has {weight.shape[0]} outputs")
        y = y + bias
    return y if x.ndim == 2 else xp.reshape(y, (*x.shape[:-1], weight.shape[0])), (x, weight, bias)


@linear.backward
def _(residuals: Residuals, dy: Array) -> tuple[Array, Array, Array | None]:
    """dx = dy · weight,  dweight = Σ dyᵀ · x,  dbias = Σ dy over all leading axes."""
    x, weight, bias = residuals
    xp = xp_of(x)
    return input_cotangent(dy, weight), weight_cotangent(dy, x), None if bias is None else total_like(_rows(xp, dy), (0,))


@op
def input_cotangent(dy: Array, weight: Array) -> tuple[Array, None]:
    """dy · weight, as one matrix product, for `dy` (…, outputs) and `weight` (outputs, inputs), without checks."""
    xp = xp_of(dy)
    return xp.reshape(xp.matmul(_rows(xp, dy), weight), (*dy.shape[:-1], weight.shape[1])), None


@op
def weight_cotangent(dy: Array, x: Array) -> tuple[Array, None]:
    """Σ dyᵀ · x over all leading axes, as one matrix product, for `dy` (…, outputs) and `x` (…, inputs), without checks."""
    xp = xp_of(x)
    return xp.matmul(xp.matrix_transpose(_rows(xp, dy)), _rows(xp, x)), None


def _rows(xp: Namespace, x: Array) -> Array:
    return x if x.ndim == 2 else xp.reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]))
