"""NumPy: kernels compiled by numba where it is installed (extra `fast`), else the definitions alone.

numba itself is imported when the first array comes that a kernel takes. The kernels run in the calling thread and start none.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any, NamedTuple

import numpy

from portnorm.arrays import Array, Kernel, Library, float32_value
from portnorm.norm.normalize import normalize
from portnorm_backends import recurrent
from portnorm_backends.recurrent import RANGE

NumPyArray = numpy.ndarray[Any, Any]


class KernelResiduals(NamedTuple):
    """What the vjp of a kernel needs: the input itself and its statistics. Nothing of the size of the input is made."""

    x: NumPyArray
    kept: NumPyArray  # m, d and 1 / σ of each statistic; the mean is m + d. (rows, 3), or (3, channels)
    weight: NumPyArray | None
    bias: NumPyArray | None
    laid_out: tuple[int, int] | None  # of rows: the shape of the parameters as the kernel takes them
    var: NumPyArray | None  # of channels: σ², of length 1 along the normalized axes
    counted: None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the array that was normalized."""
        shape: tuple[int, ...] = self.x.shape
        return shape

    @property
    def mean(self) -> NumPyArray:
        """μ of each channel, of length 1 along the normalized axes."""
        assert self.var is not None
        mean: NumPyArray = self.kept[:2].sum(axis=0).reshape(self.var.shape)
        return mean

    def statistics(self) -> tuple[NumPyArray, NumPyArray]:
        """μ and the biased σ² of each channel."""
        assert self.var is not None
        return self.mean, self.var


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
    eps_place: str = "variance",
    correction: int = 0,
    **attrs: Any,
) -> bool:
    """Contiguous float32 or float64 values with their own biased variance: whole rows, or all axes but the one with the parameters."""
    if mask is not None or mean is not None or correction or eps_place != "variance":
        return False
    if type(x) is not numpy.ndarray or not x.size or x.dtype.name not in RANGE or not x.dtype.isnative:
        return False
    return bool(x.flags.c_contiguous and x.flags.aligned) and (_are_rows(x, axes, param_axes) or _is_channel(x, axes, param_axes))


def _are_rows(x: NumPyArray, axes: tuple[int, ...], param_axes: tuple[int, ...]) -> bool:
    if not axes or not param_axes:
        return False
    first, last = axes[0], param_axes[-1] + 1
    return axes[-1] - first == x.ndim - 1 - first == len(axes) - 1 and param_axes[0] <= first <= last == param_axes[0] + len(param_axes)


def _is_channel(x: NumPyArray, axes: tuple[int, ...], param_axes: tuple[int, ...]) -> bool:
    return len(param_axes) == 1 and len(axes) == x.ndim - 1 and param_axes[0] not in axes


def _forward(
    x: NumPyArray,
    weight: Any = None,
    bias: Any = None,
    *,
    axes: tuple[int, ...],
    param_axes: tuple[int, ...],
    eps: float,
    center: bool = True,
    **attrs: Any,
) -> tuple[NumPyArray, Any]:
    made = _forward_of_rows if _are_rows(x, axes, param_axes) else _forward_of_channels
    found = made(x, weight, bias, axes, param_axes, float32_value(eps), center)
    if found is None:
        return normalize.definition(x, weight, bias, axes=axes, param_axes=param_axes, eps=eps, center=center, **attrs)
    return found


def _given(p: Any, x: NumPyArray, shape: tuple[int, ...]) -> NumPyArray:
    """A parameter or a cotangent as a kernel takes it: in the type of `x`, contiguous and aligned, empty where there is none."""
    if p is None:
        return numpy.empty((0,) * len(shape), dtype=x.dtype)
    values = numpy.ascontiguousarray(p, dtype=x.dtype)
    return (values if values.flags.aligned else values.copy()).reshape(shape)


def _cotangents(p: Any, d: NumPyArray) -> NumPyArray | None:
    return None if p is None else d.astype(p.dtype).reshape(p.shape)


def _forward_of_rows(
    x: NumPyArray, weight: Any, bias: Any, axes: tuple[int, ...], param_axes: tuple[int, ...], eps: float, center: bool
) -> tuple[NumPyArray, KernelResiduals] | None:
    """`None` where the definition has to do it. A row of parameters for each of the last rows, a value for each run of neighbours."""
    from portnorm_backends import rowwise

    first, last = axes[0], param_axes[-1] + 1
    rows = x.reshape(-1, math.prod(x.shape[first:]))
    shape = (math.prod(x.shape[param_axes[0] : first]), math.prod(x.shape[first:last]))
    y, kept = numpy.empty_like(rows), numpy.empty((rows.shape[0], 3), dtype=x.dtype)
    parameters = (_given(weight, x, shape), _given(bias, x, shape))
    if not rowwise.forward(x.dtype.name)(rows, *parameters, eps, center, *RANGE[x.dtype.name], y, kept):
        return None
    return y.reshape(x.shape), KernelResiduals(x, kept, weight, bias, shape, None)


def _vjp_of_rows(residuals: KernelResiduals, dy: NumPyArray, *, center: bool = True, **attrs: Any) -> tuple[Any, Any, Any]:
    from portnorm_backends import rowwise

    x, kept, weight, bias, shape, *_ = residuals
    assert shape is not None
    rows = x.reshape(kept.shape[0], -1)
    by_value = shape[1] == rows.shape[1] and not (weight is None and bias is None)
    dx, room = numpy.empty_like(rows), numpy.zeros((2, *(shape if by_value else (0, 0))), dtype=x.dtype)
    dweight, dbias = (numpy.zeros(shape if p is not None else (0, 0)) for p in (weight, bias))
    given = _given(dy, x, rows.shape)
    rowwise.backward(x.dtype.name)(rows, given, _given(weight, x, shape), kept, center, room, dx, dweight, dbias)
    return dx.reshape(x.shape).astype(dy.dtype, copy=False), _cotangents(weight, dweight), _cotangents(bias, dbias)


def _by_channel(x: NumPyArray, channel: int) -> NumPyArray:
    """(outer, channels, inner), or (rows, channels) where nothing comes after the channels."""
    inner = math.prod(x.shape[channel + 1 :])
    return x.reshape((-1, x.shape[channel], inner) if inner > 1 else (-1, x.shape[channel]))


def _forward_of_channels(
    x: NumPyArray, weight: Any, bias: Any, axes: tuple[int, ...], param_axes: tuple[int, ...], eps: float, center: bool
) -> tuple[NumPyArray, KernelResiduals] | None:
    """`None` where the definition has to do it."""
    from portnorm_backends import channelwise

    (channel,) = param_axes
    blocks, count = _by_channel(x, channel), x.shape[channel]
    y, kept, var = numpy.empty_like(blocks), numpy.empty((3, count), dtype=x.dtype), numpy.empty(count)
    parameters = (_given(weight, x, (count,)), _given(bias, x, (count,)))
    kernel = channelwise.forward(x.dtype.name, blocks.ndim == 3)
    if not kernel(blocks, *parameters, eps, center, *RANGE[x.dtype.name], y, kept, var):
        return None
    variance = var.astype(x.dtype).reshape(tuple(count if a == channel else 1 for a in range(x.ndim)))
    return y.reshape(x.shape), KernelResiduals(x, kept, weight, bias, None, variance)


def _vjp_of_channels(
    residuals: KernelResiduals, dy: NumPyArray, *, param_axes: tuple[int, ...], center: bool = True, **attrs: Any
) -> tuple[Any, Any, Any]:
    from portnorm_backends import channelwise

    x, kept, weight, bias, *_ = residuals
    blocks, count = _by_channel(x, param_axes[0]), kept.shape[1]
    dx, dweight, dbias = numpy.empty_like(blocks), numpy.empty(count), numpy.empty(count)
    given = _given(dy, x, blocks.shape)
    kernel = channelwise.backward(x.dtype.name, blocks.ndim == 3)
    kernel(blocks, given, _given(weight, x, (count,)), kept, center, dx, dweight, dbias)
    return dx.reshape(x.shape).astype(dy.dtype, copy=False), _cotangents(weight, dweight), _cotangents(bias, dbias)


def _vjp(residuals: KernelResiduals, dy: Array, **attrs: Any) -> tuple[Any, Any, Any]:
    return _vjp_of_channels(residuals, dy, **attrs) if residuals.laid_out is None else _vjp_of_rows(residuals, dy, **attrs)


_KERNELS = {
    "normalize": Kernel(
        call=lambda *args, **attrs: _forward(*args, **attrs)[0],
        forward=_forward,
        vjp=_vjp,
        residuals=KernelResiduals,
        accepts=_accepts,
    ),
    "scan": recurrent.KERNEL,
}

# 8 MB in float32: enough rows for a matrix product at full speed, and memory that the allocator has at hand again.
LIBRARY = Library("numpy", kernels=_KERNELS if importlib.util.find_spec("numba") is not None else {}, at_once=2**21)
