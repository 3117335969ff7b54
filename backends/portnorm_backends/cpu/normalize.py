"""The normalizations of NumPy arrays, by the kernels of `rows` and of `channels`."""

from __future__ import annotations

from typing import Any

import numpy

from portnorm.arrays import Array, Kernel, is_bfloat16
from portnorm.dtypes import float32_value
from portnorm.norm.normalize import normalize, written
from portnorm_backends.cpu import memory
from portnorm_backends.cpu.channels import forward_of_channels, forward_of_counted, is_channel, masks_rows, scaled_channels, vjp_of_channels
from portnorm_backends.cpu.layout import RANGE, NumPyArray, can_take
from portnorm_backends.cpu.residuals import KernelResiduals
from portnorm_backends.cpu.rows import are_rows, as_rows, forward_of_rows, vjp_of_rows
from portnorm_backends.cpu.warming import ready


def _accepts(
    x: Any,
    weight: Any = None,
    bias: Any = None,
    *,
    axes: tuple[int, ...],
    param_axes: tuple[int, ...],
    eps: float,
    mask: Any = None,
    mean: Any = None,
    var: Any = None,
    eps_place: str = "variance",
    correction: int = 0,
    reduce: Any = None,
    **attrs: Any,
) -> bool:
    """float32, float64 or bfloat16 values with their own biased variance: contiguous rows, or all axes but the one with the parameters.

    The latter with given statistics too, or where channels come last with a mask of rows.
    """
    if mask is not None and (mean is not None or not masks_rows(x, mask, axes, param_axes)):
        return False
    if reduce is not None or correction or not (eps_place == "variance" or (eps_place == "floor" and eps == 0)):
        return False
    if type(x) is not numpy.ndarray or not x.size or not (x.dtype in RANGE or is_bfloat16(x.dtype)):
        return False
    if not x.flags.aligned:
        return False
    if is_channel(x, axes, param_axes):
        shape = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
        statistics = () if mean is None and var is None else (mean, var)
        fits = x.flags.c_contiguous and all(type(s) is numpy.ndarray and s.shape == shape for s in statistics)
        return bool(fits and ready("channels", x.dtype))
    fits = mean is None and are_rows(x, axes, param_axes) and as_rows(x, axes[0]) is not None
    return fits and ready("rows", x.dtype)


def _forward(
    x: NumPyArray,
    weight: Any = None,
    bias: Any = None,
    *,
    axes: tuple[int, ...],
    param_axes: tuple[int, ...],
    eps: float,
    center: bool = True,
    out: Any = None,
    mean: Any = None,
    var: Any = None,
    mask: Any = None,
    **attrs: Any,
) -> tuple[NumPyArray, Any]:
    into = memory.room(x.shape, x.dtype) if out is None or not can_take(out, x, weight, bias, mean, var) else out
    if mean is not None:
        made = scaled_channels(x, weight, bias, mean, var, param_axes, float32_value(eps), into)
        return written(into, out), made
    if mask is not None:
        found = forward_of_counted(x, weight, bias, mask, axes[0], float32_value(eps), center, into)
    else:  # The channels of (channels, values) are rows too, but someone may ask for their statistics.
        of_kind = forward_of_channels if is_channel(x, axes, param_axes) else forward_of_rows
        found = of_kind(x, weight, bias, axes, param_axes, float32_value(eps), center, into)
    if found is None:
        how = {"axes": axes, "param_axes": param_axes, "eps": eps, "center": center, "mask": mask, "out": out, **attrs}
        return normalize.definition(x, weight, bias, **how)
    return written(into, out), found


def _vjp(residuals: KernelResiduals, dy: Array, **attrs: Any) -> tuple[Any, Any, Any]:
    return vjp_of_channels(residuals, dy, **attrs) if residuals.laid_out is None else vjp_of_rows(residuals, dy, **attrs)


KERNEL = Kernel(
    call=lambda *args, **attrs: _forward(*args, **attrs)[0], forward=_forward, vjp=_vjp, residuals=KernelResiduals, accepts=_accepts
)
