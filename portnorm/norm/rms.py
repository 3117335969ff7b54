"""Root mean square normalization: Zhang & Sennrich 2019, arXiv 1910.07467, equation 4; ε inside the root as torch and ONNX have it.

y = x / sqrt(mean(x²) + ε) · weight
"""

from __future__ import annotations

from typing import Any

from portnorm.arrays import Array
from portnorm.dtypes import statistics_dtype
from portnorm.norm.arguments import check_affine, check_out, checked_axes, checked_eps, checked_namespace
from portnorm.norm.normalize import Normalized, normalize
from portnorm.op import op


@op
def rms_norm(
    x: Array, weight: Array | None = None, *, axis: int | tuple[int, ...] = -1, eps: float | None = 1e-5, out: Array | None = None
) -> tuple[Array, Normalized]:
    """RMS normalization of `x` over `axis`.

    y = x / sqrt(mean(x²) + eps) · weight, the mean over `axis`; nothing is centred.

    `weight` has the shape of `x` at `axis`. The result has the shape and dtype of `x`; statistics are taken in at least float32.
    `eps` defaults to ONNX's 1e-5; `None` is the machine epsilon of the dtype of the statistics, as torch's default is.
    `out`, an array like `x`, takes the result and is returned.
    Raises `ShapeError`, `DTypeError`, and `UnsupportedError` for arrays of two libraries.

    >>> import numpy as np, portnorm as pn
    >>> pn.rms_norm(np.array([[3.0, 4.0]]), eps=0.0).round(4)
    array([[0.8485, 1.1314]])
    """
    xp = checked_namespace(x, weight, None)
    eps = float(xp.finfo(statistics_dtype(xp, x.dtype)).eps) if eps is None else checked_eps(eps)
    check_out(x, out)
    axes = checked_axes(x, axis)
    check_affine(x, axes, weight=weight)
    return normalize.forward(x, weight, None, axes=axes, param_axes=axes, eps=eps, center=False, out=out)


@rms_norm.backward
def _(residuals: Normalized, dy: Array, *, axis: int | tuple[int, ...] = -1, eps: float | None = 1e-5) -> tuple[Any, ...]:
    axes = checked_axes(dy, axis)
    return normalize.vjp(residuals, dy, axes=axes, param_axes=axes, center=False)[:2]
