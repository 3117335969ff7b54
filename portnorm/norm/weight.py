"""Weight normalization: Salimans & Kingma 2016, arXiv 1602.07868, equation 2.

    w = g · v / ‖v‖,   the norm over every axis but those of the outputs

v / ‖v‖ is v / sqrt(mean(v²)) / √n: RMS normalization without ε, so it is a row over the same core.
"""

from __future__ import annotations

import math
from typing import Any

from portnorm.arrays import Array, xp_of
from portnorm.errors import ShapeError
from portnorm.norm.arguments import checked_axes, checked_namespace
from portnorm.norm.normalize import Axes, Normalized, normalize
from portnorm.op import op


@op
def weight_norm(v: Array, g: Array, *, axis: int | tuple[int, ...] | None = 0) -> tuple[Array, tuple[Normalized, Array]]:
    """Weights of length `g` and direction `v`: w = g · v / ‖v‖, with one norm for each entry along `axis`.

    `axis` names the axes that are kept (the outputs); `None` takes one norm of the whole array, as torch's `dim=None` does. `g` has one
    number per norm: the shape of `v` at `axis`, or torch's, with length 1 along the other axes. The result has the shape and dtype of
    `v`. No ε: a row of zeros has no direction and gives NaN. Rows near the ends of the range of the type are scaled first.
    Raises `ShapeError`, `DTypeError`, `UnsupportedError`.

    >>> import numpy as np, portnorm as pn
    >>> pn.weight_norm(np.array([[3.0, 4.0], [0.0, 2.0]]), np.array([10.0, 1.0]))
    array([[6., 8.],
           [0., 1.]])
    """
    xp = checked_namespace(v, g, None)
    kept = () if axis is None else checked_axes(v, axis)
    expected = tuple(v.shape[a] for a in kept)
    as_torch = tuple(n if a in kept else 1 for a, n in enumerate(v.shape)) if kept else ()
    if tuple(g.shape) not in (expected, as_torch):
        raise ShapeError(f"`g` has shape {tuple(g.shape)}; expected {expected} or {as_torch} for `v` {tuple(v.shape)} and `axis` {axis}")
    axes = _axes(v, kept)
    length = xp.reshape(g, expected) / math.sqrt(math.prod(v.shape[a] for a in axes["axes"]))
    w, residuals = normalize.forward(v, length, None, eps=0.0, center=False, **axes)
    return w, (residuals, g)


@weight_norm.backward
def _(residuals: tuple[Normalized, Array], dw: Array, *, axis: int | tuple[int, ...] | None = 0) -> tuple[Any, ...]:
    normalized, g = residuals
    axes = _axes(dw, () if axis is None else checked_axes(dw, axis))
    dv, dlength, _ = normalize.vjp(normalized, dw, center=False, **axes)
    return dv, xp_of(g).reshape(dlength / math.sqrt(math.prod(dw.shape[a] for a in axes["axes"])), g.shape)


def _axes(v: Array, kept: tuple[int, ...]) -> Axes:
    return {"axes": tuple(a for a in range(v.ndim) if a not in kept), "param_axes": kept}
