"""Layer normalization: Ba, Kiros & Hinton 2016, arXiv 1607.06450, equation 4 with the ε that every implementation adds.

y = (x − μ) / sqrt(σ² + ε) · weight + bias,   μ and σ² over the last axes of each case
"""

from __future__ import annotations

from typing import Any

from portnorm.arrays import Array
from portnorm.norm.arguments import check_affine, check_out, checked_axes, checked_eps, checked_namespace
from portnorm.norm.normalize import Normalized, normalize
from portnorm.op import op


@op
def layer_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axis: int | tuple[int, ...] = -1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> tuple[Array, Normalized]:
    """Layer normalization of `x` over `axis`.

    y = (x − μ) / sqrt(σ² + eps) · weight + bias, with the mean μ and the biased variance σ² of each case over `axis`.

    `weight` and `bias` have the shape of `x` at `axis`; either may be `None`. The result has the shape and dtype of `x`; statistics are
    taken in at least float32. LN over time and features of a (batch, time, features) array is `axis=(1, 2)`.
    `out`, an array like `x`, takes the result and is returned.
    Raises `ShapeError`, `DTypeError`, and `UnsupportedError` for arrays of two libraries. Same as `torch.nn.functional.layer_norm`.

    >>> import numpy as np, portnorm as pn
    >>> pn.layer_norm(np.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])).round(4)
    array([[-1.2247,  0.    ,  1.2247],
           [-1.2247,  0.    ,  1.2247]])
    """
    checked_namespace(x, weight, bias)
    check_out(x, out)
    axes = checked_axes(x, axis)
    check_affine(x, axes, weight=weight, bias=bias)
    return normalize.forward(x, weight, bias, axes=axes, param_axes=axes, eps=checked_eps(eps), out=out)


@layer_norm.backward
def _(residuals: Normalized, dy: Array, *, axis: int | tuple[int, ...] = -1, eps: float = 1e-5) -> tuple[Any, ...]:
    axes = checked_axes(dy, axis)
    return normalize.vjp(residuals, dy, axes=axes, param_axes=axes)
