"""The normalizations of NumPy arrays: which arrays a kernel takes, and in which form."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy

from portnorm.arrays import Array, Kernel, is_bfloat16
from portnorm.dtypes import float32_value
from portnorm.norm.arguments import LARGEST
from portnorm.norm.normalize import normalize, written
from portnorm_backends.cpu import memory, threads
from portnorm_backends.cpu.layout import RANGE, SHORT, NumPyArray, bits, computed, taken
from portnorm_backends.cpu.warming import READY, ready


class KernelResiduals(NamedTuple):
    """What the vjp of a kernel needs: the input itself and its statistics. Nothing of the size of the input is made."""

    x: NumPyArray
    kept: NumPyArray  # m, d and 1 / σ of each statistic; the mean is m + d. (rows, 3), (3, channels), or (3, groups, channels)
    weight: NumPyArray | None
    bias: NumPyArray | None
    laid_out: tuple[int, int] | None  # of rows: the shape of the parameters as the kernel takes them
    var: NumPyArray | None  # of channels: σ², of length 1 along the normalized axes
    counted: NumPyArray | None = None  # with a mask: the values that entered each statistic
    masked: tuple[NumPyArray, NumPyArray, tuple[int, ...]] | None = None
    """With a mask `x` has the rows that count alone: their places, the ends of groups among them, and the whole shape."""

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the array that was normalized."""
        shape: tuple[int, ...] = self.x.shape if self.masked is None else self.masked[2]
        return shape

    @property
    def mean(self) -> NumPyArray:
        """μ of each channel, of length 1 along the normalized axes."""
        assert self.var is not None
        mean: NumPyArray = self.kept[:2].sum(axis=0).reshape(self.var.shape)
        return mean

    def statistics(self, correction: int = 0) -> tuple[NumPyArray, NumPyArray]:
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
    var: Any = None,
    eps_place: str = "variance",
    correction: int = 0,
    reduce: Any = None,
    **attrs: Any,
) -> bool:
    """float32, float64 or bfloat16 values with their own biased variance: contiguous rows, or all axes but the one with the parameters.

    The latter with given statistics too, or where channels come last with a mask of rows.
    """
    if mask is not None and (mean is not None or not _masks_rows(x, mask, axes, param_axes)):
        return False
    if reduce is not None or correction or not (eps_place == "variance" or (eps_place == "floor" and eps == 0)):
        return False
    if type(x) is not numpy.ndarray or not x.size or not (x.dtype in RANGE or is_bfloat16(x.dtype)):
        return False
    if not x.flags.aligned:
        return False
    if _is_channel(x, axes, param_axes):
        shape = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
        statistics = () if mean is None and var is None else (mean, var)
        fits = x.flags.c_contiguous and all(type(s) is numpy.ndarray and s.shape == shape for s in statistics)
        return bool(fits and ready("channels", x.dtype))
    fits = mean is None and _are_rows(x, axes, param_axes) and _as_rows(x, axes[0]) is not None
    return fits and ready("rows", x.dtype)


def _masks_rows(x: Any, mask: Any, axes: tuple[int, ...], param_axes: tuple[int, ...]) -> bool:
    """Whether a mask says which rows of (…, channels) count, with statistics of all, or of those that some leading axes part."""
    last = type(x) is numpy.ndarray and x.dtype in RANGE and param_axes == (x.ndim - 1,) and axes[-1:] == (x.ndim - 2,)
    return (
        last
        and _is_channel(x, axes, param_axes)
        and type(mask) is numpy.ndarray
        and mask.dtype == bool
        and mask.ndim == x.ndim
        and mask.shape[-1] == 1
    )


def _are_rows(x: NumPyArray, axes: tuple[int, ...], param_axes: tuple[int, ...]) -> bool:
    if not axes or not param_axes:
        return False
    first, last = axes[0], param_axes[-1] + 1
    return axes[-1] - first == x.ndim - 1 - first == len(axes) - 1 and param_axes[0] <= first <= last == param_axes[0] + len(param_axes)


def _as_rows(x: NumPyArray, first: int) -> NumPyArray | None:
    """A view (rows, n) of n values from axis `first` on that lie beside each other; `None` where there is none."""
    if x.flags.c_contiguous:
        return x.reshape(-1, math.prod(x.shape[first:]))
    step = x.itemsize
    for axis in reversed(range(x.ndim)):
        if axis == first - 1:
            step = x.strides[axis]
        if x.shape[axis] != 1 and x.strides[axis] != step:
            return None
        step *= x.shape[axis]
    shape = (math.prod(x.shape[:first]), math.prod(x.shape[first:]))
    return numpy.lib.stride_tricks.as_strided(x, shape, (x.strides[first - 1], x.itemsize)) if first else None


def _is_channel(x: NumPyArray, axes: tuple[int, ...], param_axes: tuple[int, ...]) -> bool:
    """All axes but the channels, or of channels that come last those before them from some axis on."""
    if len(param_axes) != 1 or param_axes[0] in axes:
        return False
    return len(axes) == x.ndim - 1 or (param_axes[0] == x.ndim - 1 and bool(axes) and axes == tuple(range(axes[0], x.ndim - 1)))


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
    into = memory.room(x.shape, x.dtype) if out is None or not _can_take(out, x, weight, bias, mean, var) else out
    if mean is not None:
        return written(into, out), _scaled_channels(x, weight, bias, mean, var, param_axes, float32_value(eps), into)
    if mask is not None:
        found = _forward_of_counted(x, weight, bias, mask, axes[0], float32_value(eps), center, into)
    else:  # The channels of (channels, values) are rows too, but someone may ask for their statistics.
        made = _forward_of_channels if _is_channel(x, axes, param_axes) else _forward_of_rows
        found = made(x, weight, bias, axes, param_axes, float32_value(eps), center, into)
    if found is None:
        how = {"axes": axes, "param_axes": param_axes, "eps": eps, "center": center, "mask": mask, "out": out, **attrs}
        return normalize.definition(x, weight, bias, **how)
    return written(into, out), found


def _can_take(out: Any, *others: Any) -> bool:
    """Whether a kernel can write into `out` while it reads the others."""
    contiguous = type(out) is numpy.ndarray and out.flags.c_contiguous and out.flags.aligned and out.flags.writeable
    return bool(contiguous and not any(p is not None and numpy.may_share_memory(out, p) for p in others))


def _cotangents(p: Any, d: NumPyArray) -> NumPyArray | None:
    return None if p is None else d.astype(computed(p.dtype)).astype(p.dtype, copy=False).reshape(p.shape)


def _as_wide_as(x: NumPyArray, dy: Any) -> NumPyArray:
    """`x`, but for a cotangent of more bits in the type that was computed in: the cotangent is not rounded."""
    return x if x.dtype in RANGE or dy.dtype == x.dtype else x.astype(computed(x.dtype))


def _forward_of_rows(
    x: NumPyArray, weight: Any, bias: Any, axes: tuple[int, ...], param_axes: tuple[int, ...], eps: float, center: bool, y: NumPyArray
) -> KernelResiduals | None:
    """`y`; `None` where the definition has to do it. A row of parameters for each of the last rows, a value for each run of neighbours."""
    from portnorm_backends.cpu import abreast, rowwise

    first, last = axes[0], param_axes[-1] + 1
    rows = _as_rows(x, first)
    assert rows is not None
    shape = (math.prod(x.shape[param_axes[0] : first]), math.prod(x.shape[first:last]))
    own = computed(x.dtype)
    kept, parameters = numpy.empty((rows.shape[0], 3), dtype=own), (taken(weight, own, shape), taken(bias, own, shape))
    how, into = (eps, center, *RANGE[own]), bits(y.reshape(rows.shape))
    kernel = rowwise.forward(x.dtype)
    if _are_short(rows, shape, weight is None and bias is None):
        kernel, parameters = abreast.forward(x.dtype), (parameters[0].reshape(-1), parameters[1].reshape(-1))
    if not _each_row(kernel, bits(rows), parameters, how, into, kept, shape[0]):
        return None
    return KernelResiduals(x, kept, weight, bias, shape, None)


def _are_short(rows: NumPyArray, shape: tuple[int, int], alone: bool) -> bool:
    """Whether these are rows for the kernel that takes many at once: with a value of the parameters for each of theirs, or none."""
    n = rows.shape[1]
    return n <= SHORT and (alone or shape == (1, n)) and ready("short rows", rows.dtype)


_WORTH = 2**16
"""Values from which a thread pays: some thirty microseconds."""

_PIECES = 4
"""Ranges for each thread: one that woke late takes fewer."""


_ROWS_OF_SHARES = 32
"""Rows of a range at least that has shares of its own: these take as much as eight rows of float32."""


def _each_row(kernel: Any, rows: NumPyArray, parameters: Any, how: tuple[Any, ...], y: NumPyArray, kept: NumPyArray, multiple: int) -> bool:
    """The kernel over all rows, in threads where there are many; `kept` has a row for each or is not wanted."""
    if rows.size < 2 * _WORTH:
        return bool(kernel(rows, *parameters, *how, y, kept))
    fine = []

    def some(a: int, b: int) -> None:
        own = kept[a:b] if kept.shape[0] == rows.shape[0] else numpy.empty_like(kept)
        fine.append(kernel(rows[a:b], *parameters, *how, y[a:b], own))

    threads.each(threads.parts(rows.shape[0], rows.size / _WORTH, multiple, _PIECES), some)
    return all(fine)


def _vjp_of_rows(
    residuals: KernelResiduals, dy: NumPyArray, *, axes: tuple[int, ...] = (-1,), center: bool = True, **attrs: Any
) -> tuple[Any, Any, Any]:
    x, kept, weight, bias, shape, *_ = residuals
    x = _as_wide_as(x, dy)
    first, dtype, computing = axes[0] % x.ndim, x.dtype, kept.dtype
    rows = x if x.ndim == 2 and first == 1 else _as_rows(x, first)
    assert shape is not None
    assert rows is not None
    given = _as_rows(dy, first) if type(dy) is numpy.ndarray and dy.dtype == dtype and dy.flags.aligned else None
    by_value = shape[1] == rows.shape[1] and not (weight is None and bias is None)
    dx, part = memory.room(rows.shape, dtype), numpy.zeros((2, *(shape if by_value else (0, 0))), computing)
    dweight, dbias = (numpy.zeros((2, *(shape if p is not None else (0, 0)))) for p in (weight, bias))
    given = taken(dy, dtype, rows.shape) if given is None else given
    backward, own = _backward(dtype), taken(weight, computing, shape)
    values, given, into = bits(rows), bits(given), bits(dx)
    if rows.size < 2 * _WORTH:
        backward(values, given, own, kept, center, part, into, dweight, dbias)
    else:
        found = dict[int, tuple[NumPyArray, NumPyArray]]()

        def some(a: int, b: int) -> None:
            """The kernel over some rows, with shares of its own."""
            shares = (dweight.copy(), dbias.copy())
            found[a] = shares
            backward(values[a:b], given[a:b], own, kept[a:b], center, part.copy(), into[a:b], *shares)

        threads.each(threads.parts(rows.shape[0], rows.size / _WORTH, -(-_ROWS_OF_SHARES // shape[0]) * shape[0], _PIECES), some)
        ordered = [found[a] for a in sorted(found)]  # the same sums whoever was first
        dweight, dbias = (numpy.add.reduce([s[k] for s in ordered]) for k in (0, 1))
    dx = dx if rows is x else dx.reshape(x.shape)
    return dx if dy.dtype is dtype else dx.astype(dy.dtype, copy=False), _cotangents(weight, dweight[0]), _cotangents(bias, dbias[0])


class _Blocks(NamedTuple):
    """Values as the kernels of channels take them: (outer, channels, inner), or (rows, channels) where nothing comes after the channels."""

    values: NumPyArray
    ends: tuple[NumPyArray, ...]  # of rows: where each group with statistics of its own begins, and the last ends
    inner: bool

    def like(self, y: NumPyArray) -> NumPyArray:
        """Another array of this shape."""
        return bits(y.reshape(self.values.shape))


def _blocks(x: NumPyArray, channel: int, groups: int) -> _Blocks:
    inner = math.prod(x.shape[channel + 1 :])
    if inner > 1:
        return _Blocks(bits(x.reshape(-1, x.shape[channel], inner)), (), True)
    rows = x.reshape(-1, x.shape[channel])
    return _Blocks(bits(rows), (numpy.arange(groups + 1) * (rows.shape[0] // groups),), False)


_LINE = 16
"""Channels that lie beside each other of which a thread takes whole multiples, so that no two write into the same line of a cache."""


def _each_channel(kernel: Any, blocks: _Blocks, *others: Any) -> bool:
    """The kernel over all channels, in threads where there is much; whether it was right in all."""
    values, given, count = blocks.values, (blocks.values, *blocks.ends, *others), blocks.values.shape[1]
    if values.size < 2 * _WORTH:
        return kernel(0, count, *given) is not False
    ranges, fine = threads.parts(count, values.size / _WORTH, 1 if blocks.inner else _LINE, _PIECES), []
    threads.each(ranges, lambda a, b: fine.append(kernel(a, b, *given)))
    return False not in fine


def _forward_of_channels(
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
    shape = (count,) if blocks.inner else (blocks.ends[0].size - 1, count)
    kept, var = numpy.empty((3, *shape), dtype=own), numpy.empty(shape)
    parameters, how = (taken(weight, own, (count,)), taken(bias, own, (count,))), (eps, center, *RANGE[own])
    fine = _each_channel(channelwise.forward(dtype, blocks.inner), blocks, *parameters, *how, blocks.like(y), kept, var)
    return (kept, var.astype(own)) if fine else None


def _forward_of_counted(
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
    rows = x.reshape(-1, x.shape[-1]).take(places, axis=0)
    made = memory.room(rows.shape, x.dtype)
    found = _statistics(_Blocks(rows, (ends,), False), x.dtype, weight, bias, eps, center, made)
    if found is None:
        return None
    _put(made, places, y)
    kept, var = found
    shape = (*x.shape[:first], *(1 for _ in x.shape[first:-1]), x.shape[-1])
    counted = numpy.broadcast_to(sizes[:, None], var.shape).astype(var.dtype).reshape(shape)
    return KernelResiduals(rows, kept, weight, bias, None, var.reshape(shape), counted, (places, ends, x.shape))


def _put(rows: NumPyArray, places: NumPyArray, y: NumPyArray) -> None:
    """Rows at their places in `y` (…, values), and 0 elsewhere."""
    whole = y.reshape(-1, y.shape[-1])
    absent = numpy.ones(whole.shape[0], bool)
    absent[places] = False
    whole[absent], whole[places] = 0, rows


def _scaled_channels(
    x: NumPyArray, weight: Any, bias: Any, mean: NumPyArray, var: NumPyArray, param_axes: tuple[int, ...], eps: float, y: NumPyArray
) -> KernelResiduals:
    """`y` from given statistics."""
    from portnorm_backends.cpu import channelwise

    (channel,) = param_axes
    own, count = computed(x.dtype), x.shape[channel]
    m, spread = (s.astype(own, copy=False) for s in (mean, var))
    groups = spread.size // count
    blocks = _blocks(x, channel, groups)
    shape = (count,) if blocks.inner else (groups, count)
    kept = numpy.zeros((3, *shape), dtype=own)
    kept[0], kept[2] = m.reshape(shape), 1.0 / numpy.sqrt(spread.reshape(shape) + eps)
    parameters = (taken(weight, own, (count,)), taken(bias, own, (count,)))
    _each_channel(channelwise.scale(x.dtype, blocks.inner), blocks, *parameters, kept, blocks.like(y))
    return KernelResiduals(x, kept, weight, bias, None, spread)


def _vjp_of_channels(
    residuals: KernelResiduals, dy: NumPyArray, *, param_axes: tuple[int, ...], center: bool = True, mean: Any = None, **attrs: Any
) -> tuple[Any, Any, Any]:
    from portnorm_backends.cpu import channelwise

    x, kept, weight, bias, _, var, _, masked = residuals
    assert var is not None
    x, count = _as_wide_as(x, dy), kept.shape[-1]
    if masked is None:
        blocks, given = _blocks(x, param_axes[0], var.size // count), taken(dy, x.dtype, x.shape)
    else:
        places, ends, shape = masked
        blocks = _Blocks(x, (ends,), False)
        given = numpy.ascontiguousarray(dy, x.dtype).reshape(-1, count).take(places, axis=0)
    dx, dweight, dbias = memory.room(x.shape, x.dtype), numpy.empty(count), numpy.empty(count)
    kernel, how = channelwise.backward(x.dtype, blocks.inner), (center, mean is None)
    _each_channel(kernel, blocks, blocks.like(given), taken(weight, kept.dtype, (count,)), kept, *how, blocks.like(dx), dweight, dbias)
    if masked is not None:
        whole = memory.room(shape, x.dtype)
        _put(dx, places, whole)
        dx = whole
    return dx.astype(dy.dtype, copy=False), _cotangents(weight, dweight), _cotangents(bias, dbias)


def _vjp(residuals: KernelResiduals, dy: Array, **attrs: Any) -> tuple[Any, Any, Any]:
    return _vjp_of_channels(residuals, dy, **attrs) if residuals.laid_out is None else _vjp_of_rows(residuals, dy, **attrs)


# -- the last axis -------------------------------------------------------------------------------------------------------------------------


_ROWS = READY["rows"]


class LastAxisResiduals(KernelResiduals):
    """Residuals of a normalization of the last axis that was taken without detours."""


@functools.cache
def _plain(dtype: Any, short: bool) -> tuple[Any, ...]:
    """For rows of one type, short ones or others: the kernel, what it takes for no parameter, the bounds of σ² + ε, and room for statistics
    that nobody reads, so that it matters to no one who else writes there.
    """
    from portnorm_backends.cpu import abreast, rowwise

    kernel = abreast.forward(dtype) if short else rowwise.last_axis(dtype)
    return kernel, numpy.empty((0,), dtype=dtype), *RANGE[dtype], numpy.empty((1, 3), dtype)


@functools.cache
def _backward(dtype: Any) -> Any:
    from portnorm_backends.cpu import rowwise

    return rowwise.backward(dtype)


def _is_plain(x: Any, weight: Any = None, bias: Any = None, *, axis: Any = -1, eps: float = 1e-5, out: Any = None) -> bool:
    """Whether the arguments of a public function need no further look: contiguous arrays of one type, and the last axis."""
    if type(x) is not numpy.ndarray or type(axis) is not int or axis != -1 or type(eps) is not float or not 0 <= eps <= LARGEST:
        return False
    dtype, shape, flags = x.dtype, x.shape, x.flags
    if not (flags.c_contiguous and flags.aligned and x.size and shape and dtype in RANGE and (dtype in _ROWS or ready("rows", dtype))):
        return False
    for p in (weight, bias):
        if p is not None:
            if type(p) is not numpy.ndarray or p.dtype != dtype or p.shape != shape[-1:]:
                return False
            flags = p.flags
            if not (flags.c_contiguous and flags.aligned):
                return False
    return out is None or (_can_take(out, x, weight, bias) and out.dtype == x.dtype and out.shape == x.shape)


def last_axis(op: Any, center: bool) -> Kernel:
    """The kernel of a public function for the arguments that most calls have; what others need is done by its definition."""

    def call(x: NumPyArray, weight: Any = None, bias: Any = None, *, eps: float = 1e-5, out: Any = None, **attrs: Any) -> Any:
        kernel, none, smallest, largest, unread = _plain(x.dtype, x.shape[-1] <= SHORT and ready("short rows", x.dtype))
        rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        y, w, b = memory.like(x) if out is None else out, none if weight is None else weight, none if bias is None else bias
        into = y if x.ndim == 2 else y.reshape(rows.shape)
        if not _each_row(kernel, rows, (w, b), (float32_value(eps), center, smallest, largest), into, unread, 1):
            return op.definition(x, weight, *(() if bias is None else (bias,)), eps=eps, out=out)[0]
        return y

    def forward(x: NumPyArray, weight: Any = None, bias: Any = None, *, eps: float = 1e-5, out: Any = None, **attrs: Any) -> Any:
        kernel, none, smallest, largest, _ = _plain(x.dtype, x.shape[-1] <= SHORT and ready("short rows", x.dtype))
        rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        y, w, b = memory.like(x) if out is None else out, none if weight is None else weight, none if bias is None else bias
        kept = numpy.empty((rows.shape[0], 3), x.dtype)
        if not _each_row(kernel, rows, (w, b), (float32_value(eps), center, smallest, largest), y.reshape(rows.shape), kept, 1):
            return op.definition(x, weight, *(() if bias is None else (bias,)), eps=eps, out=out)
        return y, LastAxisResiduals(x, kept, weight, bias, (1, x.shape[-1]), None)

    def vjp(residuals: LastAxisResiduals, dy: NumPyArray, **attrs: Any) -> tuple[Any, ...]:
        return _vjp_of_rows(residuals, dy, center=center)

    return Kernel(call=call, forward=forward, vjp=vjp, residuals=LastAxisResiduals, accepts=_is_plain)


KERNEL = Kernel(
    call=lambda *args, **attrs: _forward(*args, **attrs)[0], forward=_forward, vjp=_vjp, residuals=KernelResiduals, accepts=_accepts
)
