"""Checks of the arguments that the public normalizations share; each failure names the argument, what came and what was expected."""

from __future__ import annotations

from array_api_compat import is_writeable_array

from portnorm.arrays import Array, Namespace, namespace
from portnorm.dtypes import is_kind, require_floating
from portnorm.errors import DTypeError, ShapeError, UnsupportedError
from portnorm.scalars import real_number, whole_number

LARGEST = 3.4028235e38
"""The largest ε: the largest number of float32, as which ONNX stores it."""


def checked_namespace(x: Array, weight: Array | None, bias: Array | None, **more: Array | None) -> Namespace:
    """The namespace of all arrays, which must be floating and of one library and device."""
    xp = namespace(x=x, weight=weight, bias=bias, **more)
    require_floating(xp, x=x, weight=weight, bias=bias)
    return xp


def checked_eps(eps: float) -> float:
    """`eps` as a float, which must be finite and not negative."""
    if type(eps) is float and 0 <= eps <= LARGEST:
        return eps
    return real_number("eps", eps, 0, LARGEST, "a number ≥ 0")


def checked_axes(x: Array, axis: int | tuple[int, ...]) -> tuple[int, ...]:
    """`axis` as sorted non-negative axes of `x`."""
    given = tuple(whole_number("axis", a) for a in (axis if isinstance(axis, tuple | list) else (axis,)))
    if not given:
        raise ShapeError("`axis` is empty; expected at least one axis of `x`")
    for a in given:
        if not -x.ndim <= a < x.ndim:
            raise ShapeError(f"`axis` {a} does not exist: `x` has shape {tuple(x.shape)}")
    axes = tuple(sorted(a % x.ndim for a in given))
    if len(set(axes)) != len(axes):
        raise ShapeError(f"`axis` {axis} names an axis twice: `x` has shape {tuple(x.shape)}")
    return axes


def checked_channel_axis(x: Array, channel_axis: int, least_dimensions: int) -> int:
    """`channel_axis` as a non-negative axis of `x`, which must have `least_dimensions`."""
    if x.ndim < least_dimensions:
        raise ShapeError(f"`x` has shape {tuple(x.shape)}; expected at least {least_dimensions} dimensions")
    return checked_axes(x, whole_number("channel_axis", channel_axis))[0]


def check_out(x: Array, out: Array | None) -> None:
    """Raise unless `out` is `None` or an array like `x` that can be written to."""
    if out is None:
        return
    namespace(x=x, out=out)
    if tuple(out.shape) != tuple(x.shape):
        raise ShapeError(f"`out` has shape {tuple(out.shape)}; expected {tuple(x.shape)}, that of `x`")
    if out.dtype != x.dtype:
        raise DTypeError(f"`out` has dtype {out.dtype}; expected {x.dtype}, that of `x`")
    if hasattr(out, "__array_namespace__") and not is_writeable_array(out):  # which takes only such arrays for arrays
        raise UnsupportedError("`out` cannot be written to; leave it out and use the result")


def check_affine(x: Array, axes: tuple[int, ...], **parameters: Array | None) -> None:
    """Raise `ShapeError` unless each parameter has the shape of `x` at `axes`."""
    expected = tuple(x.shape[a] for a in axes)
    for name, parameter in parameters.items():
        if parameter is not None and tuple(parameter.shape) != expected:
            where = f"axis {axes[0]} of `x` {tuple(x.shape)} has length {expected[0]}"
            if len(axes) == 1 and axes[0] == x.ndim - 1:
                where = f"the last axis of `x` {tuple(x.shape)} has length {expected[0]}"
            if len(axes) > 1:
                where = f"the axes {axes} of `x` {tuple(x.shape)} have shape {expected}"
            raise ShapeError(f"`{name}` has shape {tuple(parameter.shape)} but {where}")


def checked_mask(xp: Namespace, x: Array, mask: Array | None, features: int | tuple[int, ...]) -> Array | None:
    """`mask` broadcastable to `x`: given either with as many axes as `x` (length 1 where it does not vary) or without the feature axes."""
    if mask is None:
        return None
    if not is_kind(xp, mask.dtype, "bool"):
        raise DTypeError(f"`mask` has dtype {mask.dtype}; expected bool, True where a value counts")
    away, full = (features,) if isinstance(features, int) else features, mask
    if mask.ndim == x.ndim - len(away):
        for axis in away:
            full = xp.expand_dims(full, axis=axis)
    if full.ndim != x.ndim or any(m not in (1, n) for m, n in zip(full.shape, x.shape, strict=True)):
        without = tuple(n for a, n in enumerate(x.shape) if a not in away)
        raise ShapeError(f"`mask` has shape {tuple(mask.shape)}; expected {without} or what broadcasts to `x` {tuple(x.shape)}")
    return full
