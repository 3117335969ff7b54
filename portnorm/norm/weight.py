"""Weight normalization: Salimans & Kingma 2016, arXiv 1602.07868, equation 2.

    w = g · v / max(‖v‖, ε),   the norm over every axis but those of the outputs

v / ‖v‖ is v / sqrt(mean(v²)) / √n: RMS normalization with ε / √n as the least root, so it is a row over the same core.
"""

from __future__ import annotations

import math
from typing import Any

from portnorm.affine import linear
from portnorm.arrays import Array, device_of, namespace, require_given, xp_of
from portnorm.dtypes import require_floating, statistics_dtype
from portnorm.errors import ShapeError
from portnorm.norm.arguments import checked_axes, checked_eps
from portnorm.norm.normalize import Axes, Normalized, normalize
from portnorm.op import op
from portnorm.scalars import real_number


@op
def weight_norm(v: Array, g: Array, *, axis: int | tuple[int, ...] | None = 0, eps: float = 0.0) -> tuple[Array, tuple[Normalized, Array]]:
    """Weights of length `g` and direction `v`: w = g · v / max(‖v‖, eps), with one norm for each entry along `axis`.

    `axis` names the axes that are kept (the outputs); `None` takes one norm of the whole array, as torch's `dim=None` does. `g` has one
    number per norm: the shape of `v` at `axis`, or torch's, with length 1 along the other axes. The result has the shape and dtype of
    `v`; norms are taken in at least float32, and rows near the ends of the range of the type are scaled first. `eps` is the least norm
    that divides, as in `torch.nn.functional.normalize` and Keras' `normalize`; neither the paper nor torch's `weight_norm` has one. A row
    of zeros, which has no direction, is 0, and so without `eps` are its gradients.
    Raises `ShapeError`, `DTypeError`, `UnsupportedError`.

    >>> import numpy as np, portnorm as pn
    >>> pn.weight_norm(np.array([[3.0, 4.0], [0.0, 2.0]]), np.array([10.0, 1.0]))
    array([[6., 8.],
           [0., 1.]])
    """
    require_given(g=g)
    xp = namespace(v=v, g=g)
    require_floating(xp, v=v, g=g)
    kept = () if axis is None else checked_axes(v, axis)
    expected = tuple(v.shape[a] for a in kept)
    as_torch = tuple(n if a in kept else 1 for a, n in enumerate(v.shape)) if kept else ()
    if tuple(g.shape) != expected and tuple(g.shape) != as_torch:  # not `in`, which torch.compile does not follow
        raise ShapeError(f"`g` has shape {tuple(g.shape)}; expected {expected} or {as_torch} for `v` {tuple(v.shape)} and `axis` {axis}")
    axes = _axes(v, kept)
    root = _root(v, axes)
    length = xp.astype(xp.reshape(g, expected), statistics_dtype(xp, g.dtype), copy=False) / root
    w, residuals = normalize.forward(v, length, None, eps=checked_eps(eps) / root, eps_place="floor", center=False, **axes)
    return w, (residuals, g)


@weight_norm.backward
def _(residuals: tuple[Normalized, Array], dw: Array, *, axis: int | tuple[int, ...] | None = 0, eps: float = 0.0) -> tuple[Any, ...]:
    normalized, g = residuals
    axes = _axes(dw, () if axis is None else checked_axes(dw, axis))
    root = _root(dw, axes)
    dv, dlength, _ = normalize.vjp(normalized, dw, center=False, eps=eps / root, eps_place="floor", **axes)
    xp = xp_of(g)
    dg = xp.reshape(dlength / root, g.shape)
    return dv, xp.astype(dg, g.dtype, copy=False)  # where a library takes a number in Python for float32, not for the type of the array


def weight_norm_init(v: Array, x: Array, *, scale: float = 1.0) -> tuple[Array, Array]:
    """Lengths `g` and a bias that give the outputs of a linear layer mean 0 and standard deviation `scale` on the batch `x`.

    Salimans & Kingma 2016, section 3: with t = x · v / ‖v‖, g = scale / sqrt(var(t) + 10⁻¹⁰) and bias = −mean(t) · g, over all leading
    axes of `x` (…, inputs); `v` is (outputs, inputs), as `portnorm.linear` takes it. The authors draw v from N(0, 0.05²). Both results are
    (outputs,), in the dtype of `v`. Raises `ShapeError`, `DTypeError`, `UnsupportedError`.

    >>> import numpy as np, portnorm as pn
    >>> rng = np.random.default_rng(0)
    >>> v, x = 0.05 * rng.standard_normal((2, 3)), 5 + rng.standard_normal((100, 3))
    >>> g, bias = pn.weight_norm_init(v, x)
    >>> y = pn.linear(x, pn.weight_norm(v, g), bias)
    >>> bool(abs(y.mean(0)).max() < 1e-12), y.std(0).round(6)
    (True, array([1., 1.]))
    """
    xp = namespace(v=v, x=x)
    require_floating(xp, v=v, x=x)
    if v.ndim != 2:
        raise ShapeError(f"`v` has shape {tuple(v.shape)}; expected (outputs, inputs)")
    scale = real_number("scale", scale, -math.inf, math.inf, "a number")
    t = linear(x, weight_norm(v, xp.ones(v.shape[0], dtype=v.dtype, device=device_of(v))))
    t = xp.astype(t, statistics_dtype(xp, t.dtype), copy=False)
    leading = tuple(range(t.ndim - 1))
    mean = xp.mean(t, axis=leading)
    g = scale / xp.sqrt(xp.mean((t - mean) ** 2, axis=leading) + 1e-10)
    return xp.astype(g, v.dtype, copy=False), xp.astype(-mean * g, v.dtype, copy=False)


def _root(v: Array, axes: Axes) -> float:
    """√n for the n values of a norm; 1 where there are none."""
    return math.sqrt(max(1, math.prod([v.shape[a] for a in axes["axes"]])))


def _axes(v: Array, kept: tuple[int, ...]) -> Axes:
    return {"axes": tuple(a for a in range(v.ndim) if a not in kept), "param_axes": kept}
