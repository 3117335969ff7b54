"""Normalizations of NumPy arrays over all axes but the channels: which a kernel takes, and in which form."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy

from portnorm.arrays import Kernel
from portnorm.dtypes import float32_value
from portnorm.norm.arguments import LARGEST
from portnorm_backends.cpu import memory
from portnorm_backends.cpu.layout import RANGE, NumPyArray, bits, can_take, computed, taken
from portnorm_backends.cpu.residuals import KernelResiduals, as_wide_as, cotangents, is_much, plan
from portnorm_backends.cpu.warming import ready


def masks_rows(x: Any, mask: Any, axes: tuple[int, ...], param_axes: tuple[int, ...]) -> bool:
    """Whether a mask says which rows of (…, channels) count, with statistics of all, or of those that some leading axes part."""
    last = type(x) is numpy.ndarray and x.dtype in RANGE and param_axes == (x.ndim - 1,) and axes[-1:] == (x.ndim - 2,)
    return (
        last
        and is_channel(x, axes, param_axes)
        and type(mask) is numpy.ndarray
        and mask.dtype == bool
        and mask.ndim == x.ndim
        and mask.shape[-1] == 1
    )


def is_channel(x: NumPyArray, axes: tuple[int, ...], param_axes: tuple[int, ...]) -> bool:
    """All axes but the channels, or of channels that come last those before them from some axis on."""
    if len(param_axes) != 1 or param_axes[0] in axes:
        return False
    return len(axes) == x.ndim - 1 or (param_axes[0] == x.ndim - 1 and bool(axes) and axes == tuple(range(axes[0], x.ndim - 1)))


class _Blocks(NamedTuple):
    """Values as the kernels of channels take them: (outer, channels, inner), or (rows, channels) where nothing comes after the channels."""

    values: NumPyArray
    rows: tuple[NumPyArray, ...]
    """Of rows: where each group with statistics of its own begins, and the last ends; and those that count, or none where all do."""
    inner: bool

    def like(self, y: NumPyArray) -> NumPyArray:
        """Another array of this shape."""
        return bits(y.reshape(self.values.shape))


_ALL = numpy.empty(0, numpy.int64)


def _blocks(x: NumPyArray, channel: int, groups: int) -> _Blocks:
    inner = math.prod(x.shape[channel + 1 :])
    if inner > 1:
        return _Blocks(bits(x.reshape(-1, x.shape[channel], inner)), (), True)
    rows = x.reshape(-1, x.shape[channel])
    return _Blocks(bits(rows), (numpy.arange(groups + 1) * (rows.shape[0] // groups), _ALL), False)


_LINE = 16
"""Channels that lie beside each other of which a thread takes whole multiples, so that no two write into the same line of a cache."""


def _each_channel(kernel: Any, blocks: _Blocks, *others: Any, apart: bool = False) -> bool:
    """The kernel over all channels, or where blocks are `apart` over these, in threads where there is much; whether it was right in all."""
    values, given, count = blocks.values, (blocks.values, *blocks.rows, *others), blocks.values.shape[1]
    count *= values.shape[0] if apart else 1
    if not is_much(values.size):
        return bool(kernel(0, count, *given))
    from portnorm_backends.cpu import sharing

    return sharing.call(kernel, plan(count, values.size, 1 if blocks.inner else _LINE), count, whole=given)


def forward_of_channels(
    x: NumPyArray, weight: Any, bias: Any, axes: tuple[int, ...], param_axes: tuple[int, ...], eps: float, center: bool, y: NumPyArray
) -> KernelResiduals | None:
    """`y`; `None` where the definition has to do it."""
    shape = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
    blocks = _blocks(x, param_axes[0], math.prod(shape) // x.shape[param_axes[0]])
    found = _statistics(blocks, x.dtype, weight, bias, eps, center, y)
    return None if found is None else KernelResiduals(x, found[0], weight, bias, None, found[1].reshape(shape))


def _statistics(
    blocks: _Blocks, dtype: Any, weight: Any, bias: Any, eps: float, center: bool, y: NumPyArray
) -> tuple[NumPyArray, NumPyArray] | None:
    """Fills `y`, and gives what is kept and σ² of each group and channel; `None` where the definition has to do it."""
    from portnorm_backends.cpu import channelwise

    own, count = computed(dtype), blocks.values.shape[1]
    shape = (count,) if blocks.inner else (blocks.rows[0].size - 1, count)
    kept, var = numpy.empty((3, *shape), dtype=own), numpy.empty(shape)
    parameters, how = (taken(weight, own, (count,)), taken(bias, own, (count,))), (eps, center, *RANGE[own])
    fine = _each_channel(channelwise.forward(dtype, blocks.inner), blocks, *parameters, *how, blocks.like(y), kept, var)
    return (kept, var.astype(own)) if fine else None


def forward_of_counted(
    x: NumPyArray, weight: Any, bias: Any, mask: NumPyArray, first: int, eps: float, center: bool, y: NumPyArray
) -> KernelResiduals | None:
    """`y` of the rows that count, and 0 elsewhere; `None` where the definition has to do it, as where none counts in a group of rows.

    Axes before the `first` part the groups.
    """
    counts = numpy.broadcast_to(mask[..., 0], x.shape[:-1]).reshape(math.prod(x.shape[:first]), -1)
    sizes = counts.sum(axis=1)
    if not sizes.size or not sizes.all():
        return None
    places, ends = numpy.flatnonzero(counts), numpy.concatenate((numpy.zeros(1, sizes.dtype), numpy.cumsum(sizes)))
    found = _statistics(_Blocks(x.reshape(-1, x.shape[-1]), (ends, places), False), x.dtype, weight, bias, eps, center, y)
    if found is None:
        return None
    _clear(y, places)
    kept, var = found
    shape = (*x.shape[:first], *(1 for _ in x.shape[first:-1]), x.shape[-1])
    counted = numpy.broadcast_to(sizes[:, None], var.shape).astype(var.dtype).reshape(shape)
    return KernelResiduals(x, kept, weight, bias, None, var.reshape(shape), counted, (ends, places))


def _clear(y: NumPyArray, places: NumPyArray) -> None:
    """0 in all rows (…, values) but these."""
    rows = y.reshape(-1, y.shape[-1])
    absent = numpy.ones(rows.shape[0], bool)
    absent[places] = False
    rows[absent] = 0


def scaled_channels(
    x: NumPyArray, weight: Any, bias: Any, mean: NumPyArray, var: NumPyArray, param_axes: tuple[int, ...], eps: float, y: NumPyArray
) -> KernelResiduals:
    """`y` from given statistics."""
    from portnorm_backends.cpu import channelwise

    (channel,) = param_axes
    own, count = computed(x.dtype), x.shape[channel]
    groups = var.size // count
    blocks = _blocks(x, channel, groups)
    kept = numpy.empty((3, count) if blocks.inner else (3, groups, count), own)
    m, rest, rstd = kept
    m[...], rest[...] = mean.reshape(m.shape), 0
    numpy.add(var.reshape(m.shape), eps, out=rstd)
    numpy.divide(1.0, numpy.sqrt(rstd, out=rstd), out=rstd)
    parameters = (taken(weight, own, (count,)), taken(bias, own, (count,)))
    _each_channel(channelwise.scale(x.dtype, blocks.inner), blocks, *parameters, kept, blocks.like(y), apart=blocks.inner)
    return KernelResiduals(x, kept, weight, bias, None, var.astype(own, copy=False))


def _is_plain(
    x: Any,
    weight: Any = None,
    bias: Any = None,
    *,
    mean: Any = None,
    var: Any = None,
    channel_axis: Any = 1,
    eps: Any = 1e-5,
    mask: Any = None,
    reduce: Any = None,
    out: Any = None,
) -> bool:
    """Whether the arguments of `batch_norm` need no further look: given statistics, and contiguous arrays of one type."""
    if type(x) is not numpy.ndarray or mean is None or var is None or mask is not None or reduce is not None:
        return False
    if type(channel_axis) is not int or not 0 <= channel_axis < x.ndim or x.ndim < 2 or type(eps) is not float or not 0 <= eps <= LARGEST:
        return False
    dtype, shape = x.dtype, (x.shape[channel_axis],)
    if not (dtype in RANGE and x.size and x.flags.c_contiguous and x.flags.aligned):
        return False
    for p in (weight, bias, mean, var):
        if p is not None and (type(p) is not numpy.ndarray or p.dtype != dtype or p.shape != shape):
            return False
    fits = out is None or (can_take(out, x, weight, bias, mean, var) and out.dtype == dtype and out.shape == x.shape)
    return fits and ready("channels", dtype)


def _given(
    x: NumPyArray,
    weight: Any = None,
    bias: Any = None,
    *,
    mean: Any,
    var: Any,
    channel_axis: int = 1,
    eps: float = 1e-5,
    out: Any = None,
    **attrs: Any,
) -> NumPyArray:
    y: NumPyArray = memory.like(x) if out is None else out
    scaled_channels(x, weight, bias, mean, var, (channel_axis,), float32_value(eps), y)
    return y


BATCH_NORM = Kernel(call=_given, accepts=_is_plain)
"""`batch_norm` for the arguments that most calls in inference have; what others need, and residuals, its definition makes."""


def vjp_of_channels(
    residuals: KernelResiduals, dy: NumPyArray, *, param_axes: tuple[int, ...], center: bool = True, mean: Any = None, **attrs: Any
) -> tuple[Any, Any, Any]:
    from portnorm_backends.cpu import channelwise

    x, kept, weight, bias, _, var, _, masked = residuals
    assert var is not None
    x, count = as_wide_as(x, dy), kept.shape[-1]
    blocks = _blocks(x, param_axes[0], var.size // count) if masked is None else _Blocks(x.reshape(-1, count), masked, False)
    given = taken(dy, x.dtype, x.shape)
    dx, dweight, dbias = memory.room(x.shape, x.dtype), numpy.empty(count), numpy.empty(count)
    kernel, how = channelwise.backward(x.dtype, blocks.inner), (center, mean is None)
    _each_channel(kernel, blocks, blocks.like(given), taken(weight, kept.dtype, (count,)), kept, *how, blocks.like(dx), dweight, dbias)
    if masked is not None:
        _clear(dx, masked[1])
    return dx.astype(dy.dtype, copy=False), cotangents(weight, dweight), cotangents(bias, dbias)
