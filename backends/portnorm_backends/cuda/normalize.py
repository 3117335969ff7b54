"""`normalize` on CuPy arrays: which kernel takes which arrays, and how its grid is laid out."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import cupy
import numpy

from portnorm.arrays import Array
from portnorm.dtypes import float32_value
from portnorm.norm.normalize import written
from portnorm_backends.cuda.kernels import BACKWARD, COLUMN_PACK, FORWARD, PACK, THREADS, TYPES, WITH_SUMS, launch, statistics_type


class KernelResiduals(NamedTuple):
    """What the vjp of a kernel needs: the input itself and its statistics. Nothing of the size of the input is made."""

    x: Array
    statistics_of_rows: Array  # (rows or channels, 4): the mean, what rounding left of it, 1 / σ, and the scale of each
    weight: Array | None
    bias: Array | None
    mean: Array | None  # μ and σ² of channels, of length 1 along the normalized axes
    var: Array | None
    counted: None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the array that was normalized."""
        shape: tuple[int, ...] = self.x.shape
        return shape

    def statistics(self, correction: int = 0) -> tuple[Array, Array]:
        """μ and the biased σ² of each channel."""
        return self.mean, self.var


class Plan(NamedTuple):
    """Arrays as the kernels take them."""

    t: str
    p: str
    rows: int
    length: int
    period: int  # rows after which gain and shift come again
    wide: int  # neighbours of a row that share a gain
    dtype: Any  # of the parameters, `p` in CuPy

    @property
    def vector(self) -> int:
        return PACK[self.t]


def _are_rows(ndim: int, axes: tuple[int, ...], param_axes: tuple[int, ...]) -> bool:
    if not axes or not param_axes:
        return False
    first, last = axes[0], param_axes[-1] + 1
    return axes[-1] - first == ndim - 1 - first == len(axes) - 1 and param_axes[0] <= first <= last == param_axes[0] + len(param_axes)


def _is_channel(ndim: int, axes: tuple[int, ...], param_axes: tuple[int, ...]) -> bool:
    return len(param_axes) == 1 and len(axes) == ndim - 1 and param_axes[0] not in axes


def _most_in_registers(t: str) -> int:
    """Values of a row that one block holds in both directions."""
    return THREADS * min(max(FORWARD[t]), max(BACKWARD[t]))


def accepts(
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
    reduce: Any = None,
    **attrs: Any,
) -> bool:
    """Contiguous values with their own biased variance: whole rows, or all axes but the one with the parameters; no parts in other
    processes.

    float64 takes rows that fit into the registers of a block; a channel or a longer row is merged from parts in float64, which would
    gain nothing there.
    """
    if mask is not None or mean is not None or reduce is not None or correction or eps_place != "variance":
        return False
    if type(x) is not cupy.ndarray or not x.size or x.dtype.name not in TYPES or not x.flags.c_contiguous:
        return False
    if _are_rows(x.ndim, axes, param_axes):
        length = math.prod(x.shape[axes[0] :])
        return bool(length <= _most_in_registers(TYPES[x.dtype.name]) or (x.dtype.name != "float64" and length < 2**31))
    return _is_channel(x.ndim, axes, param_axes) and x.dtype.name != "float64" and bool(x.size < 2**32)


def _plan(x: Array, parameters: tuple[Any, ...], axes: tuple[int, ...], param_axes: tuple[int, ...]) -> Plan:
    t = TYPES[x.dtype.name]
    dtypes = {p.dtype.name for p in parameters if p is not None}
    p, dtype = (t, x.dtype) if dtypes <= {x.dtype.name} else (statistics_type(t), statistics_dtype(t))
    if not _are_rows(x.ndim, axes, param_axes):
        (channel,) = param_axes
        count = x.shape[channel]
        return Plan(t, p, count, x.size // count, count, x.size // count, dtype)
    first, last = axes[0], param_axes[-1] + 1
    length = math.prod(x.shape[first:])
    period, wide = math.prod(x.shape[param_axes[0] : first]), length // math.prod(x.shape[first:last])
    return Plan(t, p, x.size // length, length, period, wide, dtype)


def _given(parameter: Any, dtype: Any) -> Any:
    """A parameter or a cotangent as a kernel takes it: contiguous and of one dtype."""
    return None if parameter is None else cupy.ascontiguousarray(parameter, dtype=dtype)


def statistics_dtype(t: str) -> Any:
    return numpy.dtype("float64" if t == "double" else "float32")


def _vector(width: int, length: int, *arrays: Any) -> int:
    """`width` where packs of so many values divide `length` and all arrays start at a multiple of 16 bytes (or of the pack); else 1."""
    fits = all(a is None or a.data.ptr % (width * a.dtype.itemsize) == 0 for a in arrays)
    return width if length % width == 0 and fits else 1


def _block(length: int, per: tuple[int, ...]) -> tuple[int, tuple[int, int]]:
    """(values of a thread, block) for rows in registers: a part of a warp, a warp, or a block for each row."""
    smallest = min(per)
    if length <= 32 * smallest:
        threads = 1 << max(0, math.ceil(length / smallest) - 1).bit_length()
        return smallest, (threads, 128 // threads)
    for each in per:
        if length <= 32 * each:
            return each, (32, 4)
    each = next((n for n in per if n >= 16 and length <= n * THREADS), max(per))
    return each, (32 * math.ceil(length / (32 * each)), 1)


def forward(
    x: Array,
    weight: Any = None,
    bias: Any = None,
    *,
    axes: tuple[int, ...],
    param_axes: tuple[int, ...],
    eps: float,
    center: bool = True,
    out: Any = None,
    **attrs: Any,
) -> tuple[Array, KernelResiduals]:
    with x.device:
        plan = _plan(x, (weight, bias), axes, param_axes)
        gain, shift = (_given(a, plan.dtype) for a in (weight, bias))
        y = out if _can_take(out, x, gain, shift) else cupy.empty_like(x)
        statistics = cupy.empty((plan.rows, 4), dtype=statistics_dtype(plan.t))
        # Where each channel is a row, somebody may ask for its statistics.
        along = tuple(n if k in param_axes else 1 for k, n in enumerate(x.shape)) if _is_channel(x.ndim, axes, param_axes) else None
        mean, var = (None if along is None else cupy.empty(along, dtype=statistics.dtype) for _ in range(2))
        if not _are_rows(x.ndim, axes, param_axes):
            _forward_of_channels(plan, x, gain, shift, y, statistics, mean, var, param_axes[0], float32_value(eps), center)
        elif plan.length > _most_in_registers(plan.t):
            shape = (plan.rows, 1, plan.length)
            _forward_of_parts(plan, shape, x, gain, shift, y, statistics, mean, var, float32_value(eps), center)
        else:
            per, block = _block(plan.length, FORWARD[plan.t])
            packed = (gain, shift) if plan.wide == 1 else ()
            template = (plan.t, plan.p, _vector(plan.vector, plan.length, x, y, *packed), per)
            grid = (math.ceil(plan.rows / block[1]), 1)
            at = (plan.rows, plan.period, plan.wide, plan.length, float32_value(eps), center)
            launch("rows_forward", template, grid, block, x, gain, shift, y, statistics, mean, var, *at)
        return written(y, out), KernelResiduals(x, statistics, weight, bias, mean, var)


def _can_take(out: Any, *others: Any) -> bool:
    """Whether a kernel can write into `out` while it reads the others."""
    if out is None or not out.flags.c_contiguous:
        return False
    return not any(a is not None and cupy.may_share_memory(out, a) for a in others)


def vjp(
    residuals: KernelResiduals, dy: Array, *, axes: tuple[int, ...], param_axes: tuple[int, ...], center: bool = True, **attrs: Any
) -> tuple[Any, Any, Any]:
    x, statistics, weight, bias, *_ = residuals
    with x.device:
        plan = _plan(x, (weight, bias), axes, param_axes)
        gain, g, dx = _given(weight, plan.dtype), _given(dy, x.dtype), cupy.empty_like(x)
        made: list[Any] = [None if a is None else cupy.empty(a.shape, dtype=plan.dtype) for a in (weight, bias)]
        if not _are_rows(x.ndim, axes, param_axes):
            _backward_of_channels(plan, x, g, gain, statistics, dx, made, param_axes[0], center)
        elif plan.length > _most_in_registers(plan.t):
            shape = (plan.rows, 1, plan.length)
            totals = _totals_of_parts(plan, shape, x, g, gain, statistics, None, None)
            _dx_of_parts(plan, shape, x, g, gain, statistics, totals, dx, center, False)
            _parameter_sums(plan, x, g, statistics, made)
        else:
            _backward_of_rows(plan, x, g, gain, statistics, dx, made, center)
        dweight, dbias = (None if a is None else d.astype(a.dtype, copy=False) for d, a in zip(made, (weight, bias), strict=True))
        return dx.astype(dy.dtype, copy=False), dweight, dbias


def _backward_of_rows(plan: Plan, x: Array, g: Array, gain: Any, statistics: Array, dx: Array, made: list[Any], center: bool) -> None:
    wanted = any(d is not None for d in made)
    fused = wanted and plan.period == plan.wide == 1 and plan.length <= THREADS * max(WITH_SUMS[plan.t])
    per, block = _block(plan.length, (WITH_SUMS if fused else BACKWARD)[plan.t])
    if fused and block == (32, 4):
        per, block = min(WITH_SUMS[plan.t]), (32 * math.ceil(plan.length / (32 * min(WITH_SUMS[plan.t]))), 1)
    packed = (gain,) if plan.wide == 1 else ()
    template = (plan.t, plan.p, _vector(plan.vector, plan.length, x, g, dx, *packed), per, "true" if fused else "false")
    blocks = math.ceil(plan.rows / block[1])
    if fused:
        blocks = min(blocks, max(_BLOCKS, blocks // 64))
    parts = cupy.empty((blocks, 2, plan.length), dtype="float64") if fused else None
    layout = (plan.rows, plan.period, plan.wide, plan.length)
    launch("rows_backward", template, (blocks, 1), block, x, g, gain, statistics, dx, parts, *layout, center)
    if fused:
        sum_parts(plan, parts, made)
    elif wanted:
        _parameter_sums(plan, x, g, statistics, made)


_BLOCKS = 512
"""Blocks that keep a device busy; a number of its own would make sums depend on the device."""


def _parameter_sums(plan: Plan, x: Array, g: Array, statistics: Array, made: list[Any]) -> None:
    """Cotangents of gain and shift of rows, in a reading of their own."""
    if all(d is None for d in made):
        return
    count, width = plan.rows // plan.period, plan.period * plan.length // plan.wide
    if plan.wide == 1:
        parts = column_parts(plan, x, g, statistics)
    else:
        threads = min(256, 1 << max(0, math.ceil(plan.wide / 4) - 1).bit_length())
        block = (threads, max(1, 128 // threads))
        parts = cupy.empty((count, 2, width), dtype="float64")
        grid = (math.ceil(plan.rows * plan.length // plan.wide / block[1]), 1)
        launch("run_sums", (plan.t,), grid, block, x, g, statistics, parts, plan.rows, plan.period, plan.wide, plan.length)
    sum_parts(plan, parts, made)


def column_parts(plan: Plan, x: Array, g: Array, statistics: Array) -> Array:
    """Parts of Σ g · x̂ and Σ g where every value of a row has a gain of its own."""
    count, width = plan.rows // plan.period, plan.period * plan.length
    per_block = max(64, math.ceil(count / 256))
    grid = (math.ceil(width / 32), math.ceil(count / per_block))
    parts = cupy.empty((grid[1], 2, width), dtype="float64")
    at = (plan.rows, plan.period, plan.length, per_block)
    launch("column_sums", (plan.t,), grid, (32, 8), x, g, statistics, parts, *at)
    return parts


def sum_parts(plan: Plan, parts: Array, made: list[Any]) -> None:
    """Sum over the first axis of (count, 2, width), 512 parts at a time, into the cotangents that are wanted."""
    while True:
        count, _, width = parts.shape
        left = math.ceil(count / 512)
        last = left == 1
        further = None if last else cupy.empty((left, 2, width), dtype="float64")
        grid = (math.ceil(2 * width / 32), left)
        launch("sum_parts", (plan.p,), grid, (32, 8), parts, further, *(made if last else (None, None)), count, width, 512)
        if last:
            return
        parts = further


# -- (outer, channels, inner), and long rows as channels with outer = 1 ------------------------------------------------------------------


def _splits(channels: int, count: int) -> int:
    """Blocks that share a channel: enough of them in all, none with less than a few values for each thread."""
    return max(1, min(math.ceil(4 * _BLOCKS / channels), count // 4096, 1024))


def _parts_shape(plan: Plan, shape: tuple[int, int, int], *arrays: Any) -> tuple[int, int, tuple[int, int]]:
    """(values of a pack, blocks that share a channel, grid)"""
    channels, outer, inner = shape
    splits = _splits(channels, outer * inner)
    return _vector(plan.vector, inner, *arrays), splits, (channels * splits, 1)


def _forward_of_parts(
    plan: Plan,
    shape: tuple[int, int, int],
    x: Array,
    gain: Any,
    shift: Any,
    y: Array,
    statistics: Array,
    mean: Any,
    var: Any,
    eps: float,
    center: bool,
) -> None:
    vector, splits, grid = _parts_shape(plan, shape, x, y)
    parts = cupy.empty((shape[0], splits, 4), dtype="float64")
    launch("channel_moments", (plan.t, vector), grid, (256, 1), x, parts, *shape, splits, center)
    launch("merge_moments", (), (shape[0], 1), (128, 1), parts, statistics, mean, var, splits, eps)
    template = (plan.t, plan.p, vector)
    at = (*shape, splits, plan.period, plan.wide)
    launch("channel_write", template, grid, (256, 1), x, gain, shift, statistics, y, *at)


def _totals_of_parts(
    plan: Plan, shape: tuple[int, int, int], x: Array, g: Array, gain: Any, statistics: Array, dweight: Any, dbias: Any
) -> Array:
    vector, splits, grid = _parts_shape(plan, shape, x, g)
    sums, totals = cupy.empty((shape[0], splits, 2), dtype="float64"), cupy.empty((shape[0], 2), dtype="float64")
    template = (plan.t, plan.p, vector)
    at = (*shape, splits, plan.period, plan.wide)
    launch("channel_sums", template, grid, (256, 1), x, g, gain, statistics, sums, *at)
    launch("merge_sums", (plan.p,), (shape[0], 1), (128, 1), sums, totals, dweight, dbias, splits)
    return totals


def _dx_of_parts(
    plan: Plan,
    shape: tuple[int, int, int],
    x: Array,
    g: Array,
    gain: Any,
    statistics: Array,
    totals: Array,
    dx: Array,
    center: bool,
    outside: bool,
) -> None:
    vector, splits, grid = _parts_shape(plan, shape, x, g, dx)
    template = (plan.t, plan.p, vector)
    at = (*shape, splits, plan.period, plan.wide, center, outside)
    launch("channel_dx", template, grid, (256, 1), x, g, gain, statistics, totals, dx, *at)


def _channel_shape(x: Array, channel: int) -> tuple[int, int, int]:
    """(channels, outer, inner)"""
    return x.shape[channel], math.prod(x.shape[:channel]), math.prod(x.shape[channel + 1 :])


def _columns(channels: int, rows: int, *arrays: Any) -> tuple[int, int, tuple[int, int]]:
    """(channels of a thread, rows of a block, grid) where the channels are the last axis."""
    vector = _vector(COLUMN_PACK, channels, *arrays)
    tiles = math.ceil(channels / (32 * vector))
    per_block = max(64, math.ceil(rows / min(1024, math.ceil(4 * _BLOCKS / tiles))))
    return vector, per_block, (tiles, math.ceil(rows / per_block))


def _forward_of_channels(
    plan: Plan,
    x: Array,
    gain: Any,
    shift: Any,
    y: Array,
    statistics: Array,
    mean: Array,
    var: Array,
    channel: int,
    eps: float,
    center: bool,
) -> None:
    channels, rows, inner = shape = _channel_shape(x, channel)
    if inner > 1:
        _forward_of_parts(plan, shape, x, gain, shift, y, statistics, mean, var, eps, center)
        return
    vector, per_block, grid = _columns(channels, rows, x, y)
    parts = cupy.empty((channels, grid[1], 4), dtype="float64")
    launch("column_moments", (plan.t, vector), grid, (32, 8), x, parts, rows, channels, per_block, center)
    launch("merge_moments", (), (channels, 1), (128, 1), parts, statistics, mean, var, grid[1], eps)
    template = (plan.t, plan.p, vector)
    launch("column_write", template, grid, (32, 8), x, gain, shift, statistics, y, rows, channels, per_block)


def _backward_of_channels(
    plan: Plan, x: Array, g: Array, gain: Any, statistics: Array, dx: Array, made: list[Any], channel: int, center: bool
) -> None:
    channels, rows, inner = shape = _channel_shape(x, channel)
    if inner > 1:
        totals = _totals_of_parts(plan, shape, x, g, None, statistics, *made)
        _dx_of_parts(plan, shape, x, g, gain, statistics, totals, dx, center, True)
        return
    vector, per_block, grid = _columns(channels, rows, x, g, dx)
    sums, totals = cupy.empty((channels, grid[1], 2), dtype="float64"), cupy.empty((channels, 2), dtype="float64")
    at = (rows, channels, per_block)
    launch("column_gradients", (plan.t, vector), grid, (32, 8), x, g, statistics, sums, *at)
    launch("merge_sums", (plan.p,), (channels, 1), (128, 1), sums, totals, *made, grid[1])
    template = (plan.t, plan.p, vector)
    launch("column_dx", template, grid, (32, 8), x, g, gain, statistics, totals, dx, *at, center)
