"""What optimizers share: arrays by name, checked and widened; rates, of each step too; parameters that are moved; clipping."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

import numpy
from array_api_compat import is_writeable_array

from portnorm.arrays import Array, DType, device_of, is_concrete, namespace, xp_of
from portnorm.dtypes import require_floating, statistics_dtype
from portnorm.errors import ShapeError, UnsupportedError
from portnorm.scalars import real_number
from portnorm.sums import total

Arrays = dict[str, Array]
OptimizerState = dict[str, Any]

Rate: TypeAlias = float | Callable[[Any], Any]
"""A learning rate, or a function that gives it from the number of updates before."""

Decayed: TypeAlias = Callable[[str, Array], bool] | Collection[str]
"""Which parameters decay: a function of name and array, or patterns of names (`"*weight_hh*"`)."""


# -- arrays by name ------------------------------------------------------------------------------------------------------------------------


def first_of(name: str, arrays: Mapping[str, Array]) -> Array:
    """Any of the arrays; raises `UnsupportedError` where there is none."""
    for a in arrays.values():
        return a
    raise UnsupportedError(f"`{name}` is empty; expected arrays by name")


def require_names(group: str, arrays: Any) -> None:
    """Raise `UnsupportedError` for what is no mapping."""
    if not isinstance(arrays, Mapping):
        raise UnsupportedError(f"`{group}` is a {type(arrays).__name__}; expected arrays by name")


def require_arrays(group: str, arrays: Mapping[str, Array]) -> None:
    """Raise `UnsupportedError` or `DTypeError` where one of them is no array of real floating-point numbers."""
    require_names(group, arrays)
    for name, a in arrays.items():
        label = f"{group}[{name!r}]"
        require_floating(namespace(**{label: a}), **{label: a})


def zeros(params: Mapping[str, Array]) -> Arrays:
    """Of the parameters' shapes, in at least float32."""
    require_arrays("params", params)
    return {name: xp_of(p).zeros_like(p, dtype=statistics_dtype(xp_of(p), p.dtype)) for name, p in params.items()}


def wide(arrays: Mapping[str, Array]) -> Arrays:
    """The arrays in at least float32, where narrower types would lose small changes, squares and ε."""
    found = {}
    for name, a in arrays.items():
        xp, dtype = xp_of(a), a.dtype
        at_least = statistics_dtype(xp, dtype)
        found[name] = a if at_least is dtype or at_least == dtype else xp.astype(a, at_least)
    return found


def check(params: Mapping[str, Array], **groups: Any) -> None:
    """Raise `UnsupportedError` for a group that lacks one of `params` or has one more, `ShapeError` where shapes differ."""
    require_names("params", params)
    for group, arrays in groups.items():
        names = arrays.keys() if isinstance(arrays, Mapping) else ()
        if names != params.keys():
            missing, unknown = [n for n in params if n not in names], [n for n in names if n not in params]
            raise UnsupportedError(
                f"`{group}` does not fit `params`: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}; expected the same names"
            )
        for name, p in params.items():
            a = arrays[name]
            if type(a) is not type(p) or a.dtype != p.dtype:
                label = f"{group}[{name!r}]"
                require_floating(namespace(**{label: a, "params": p}), **{label: a})
            if a.shape != p.shape and tuple(a.shape) != tuple(p.shape):
                raise ShapeError(f"`{group}` has {name!r} of shape {tuple(a.shape)}; expected {tuple(p.shape)}, that of the parameter")


def require_in_place(params: Mapping[str, Array], grads: Mapping[str, Array], state: Mapping[str, Any]) -> None:
    """Raise `UnsupportedError` where an array that is to change cannot be written to, or lies in the memory of another."""
    if not isinstance(state, MutableMapping):
        raise UnsupportedError(f"`state` is a {type(state).__name__}; expected a dict, whose number of steps changes in place too")
    changing = {f"params[{name!r}]": p for name, p in params.items()}
    for group, arrays in state.items():
        changing |= {f"state[{group!r}][{name!r}]": a for name, a in arrays.items()} if isinstance(arrays, Mapping) else {}
    for label, a in changing.items():
        if (why := _why_fixed(a)) is not None:
            raise UnsupportedError(f"`{label}` {why}; leave `in_place` out, and take the arrays that `update` gives")
    read = {f"grads[{name!r}]": g for name, g in grads.items()}
    spans = sorted((*span, label, label in changing) for label, a in (*changing.items(), *read.items()) if (span := _span(a)) is not None)
    written, any_end = (0, ""), (0, "")
    for start, stop, label, changes in spans:
        end, other = max(written, any_end) if changes else written
        if start < end:
            raise UnsupportedError(f"`{label}` lies in the memory of `{other}`; leave `in_place` out, or copy one of them")
        written, any_end = max(written, (stop, label)) if changes else written, max(any_end, (stop, label))


def _span(a: Array) -> tuple[int, int] | None:
    """From which to before which address an array lies; of a library that does not say it, itself counts as such a place."""
    if math.prod(a.shape) == 0:
        return None
    start, size, steps = _layout(a) or (id(a), 1, [0] * a.ndim)
    ends = [(n - 1) * step for n, step in zip(a.shape, steps, strict=True)]
    return start + sum(min(end, 0) for end in ends), start + sum(max(end, 0) for end in ends) + size


def _layout(a: Array) -> tuple[int, int, Sequence[int]] | None:
    """The address of the first value, the bytes of one, and those from one to the next along each axis; `None` where nothing says it."""
    array = getattr(a, "_array", a)  # of array_api_strict
    if isinstance(array, numpy.ndarray):
        return array.ctypes.data, array.itemsize, array.strides
    if hasattr(a, "data_ptr"):  # torch
        return a.data_ptr(), a.element_size(), [step * a.element_size() for step in a.stride()]
    if hasattr(getattr(a, "data", None), "ptr"):  # CuPy
        return a.data.ptr, a.dtype.itemsize, a.strides
    return None


def _why_fixed(a: Array) -> str | None:
    """Why an array cannot be changed value by value; `None` where it can."""
    if getattr(a, "requires_grad", False):
        return "requires a gradient"
    if not is_writeable_array(a) or not is_concrete(a):
        return "cannot be written to"
    layout = _layout(a)
    repeats = layout is not None and any(n > 1 and step == 0 for n, step in zip(a.shape, layout[2], strict=True))
    return "has one place for several values" if repeats else None


# -- the state -----------------------------------------------------------------------------------------------------------------------------


def entry(state: Any, name: str) -> Any:
    """What a state has under this name; raises `UnsupportedError` for what is no state of this optimizer."""
    if not isinstance(state, Mapping) or state.get(name) is None:
        what = f"has no {name!r}" if isinstance(state, Mapping) else f"is a {type(state).__name__}"
        raise UnsupportedError(f"`state` {what}; expected what `init` or the last update gave")
    return state[name]


def counted(state: Any) -> Array:
    """The number of updates before this one; raises `UnsupportedError` for what is no array."""
    steps = entry(state, "steps")
    namespace(**{"state['steps']": steps})
    return steps


# -- rates ---------------------------------------------------------------------------------------------------------------------------------


def set_rate(optimizer: Any, name: str, low: float, high: float) -> None:
    """Keep a rate as a float; raises `UnsupportedError` for what is none, or does not lie from `low` to below `high`."""
    object.__setattr__(optimizer, name, _rate(name, getattr(optimizer, name), low, high))


def set_learning_rate(optimizer: Any) -> None:
    """Keep `lr` as a float, or as the function that it is."""
    if not callable(optimizer.lr):
        set_rate(optimizer, "lr", 0.0, math.inf)


def shown(optimizer: Any) -> str:
    """An optimizer as a call that makes it, with the names of functions in it."""
    given = {field.name: getattr(optimizer, field.name) for field in dataclasses.fields(optimizer)}
    values = {name: getattr(value, "__qualname__", repr(value)) for name, value in given.items()}
    return f"{type(optimizer).__name__}({', '.join(f'{name}={value}' for name, value in values.items())})"


def _rate(name: str, value: Any, low: float, high: float) -> float:
    expected = f"a number from {low} to below {high}"
    rate = real_number(name, value, low, high, expected)
    if not rate < high:
        raise UnsupportedError(f"`{name}` is {rate}; expected {expected}")
    return rate


def rates(lr: Rate, steps: Array, arrays: Mapping[str, Array]) -> dict[DType, Any]:
    """The learning rate after so many updates, for arrays of each dtype: a float, or an array where `steps` cannot be looked at."""
    likes = {a.dtype: a for a in arrays.values()}
    if not callable(lr):
        return dict.fromkeys(likes, lr)
    if is_concrete(steps):
        return dict.fromkeys(likes, _rate(f"lr({int(steps)})", lr(int(steps)), 0.0, math.inf))
    found = {}
    for dtype, a in likes.items():
        xp = xp_of(a)
        rate = lr(xp.astype(steps, dtype))
        found[dtype] = xp.astype(rate, dtype) if hasattr(rate, "dtype") else _rate("lr", rate, 0.0, math.inf)
    return found


# -- what decays ---------------------------------------------------------------------------------------------------------------------------


def weights_only(name: str, p: Array) -> bool:
    """Whether a parameter is a matrix of weights: what decays unless `AdamW` is told otherwise.

    Arrays of two or more axes are, except those of a normalizer inside a cell (`norm_…`). Biases, gains and first states have one axis.
    Of a weight-normalized matrix (Salimans & Kingma 2016) the lengths `….g` decay, which shrinks the matrix; the directions `….v` do not,
    since their length says nothing. A `LayerNorm` or `RMSNorm` over several axes has gains of as many, which no name tells from weights:
    where a model has one, give `decayed` patterns.

    >>> import portnorm as pn
    >>> lstm = pn.LSTM(3, 4, norm="layer", rng=0)
    >>> [name for name, p in lstm.parameters().items() if pn.weights_only(name, p)]
    ['weight_ih_l0', 'weight_hh_l0']
    """
    return len(p.shape) >= 2 and not name.endswith(".v") and not any(part.startswith("norm_") for part in name.split("."))


def checked_decayed(decayed: Any) -> Decayed:
    """`decayed` as a function or a tuple of patterns; raises `UnsupportedError` for what is neither."""
    if callable(decayed):
        chosen: Decayed = decayed
        return chosen
    if (
        isinstance(decayed, str)
        or not isinstance(decayed, Collection)
        or getattr(decayed, "ndim", 1) != 1
        or not all(isinstance(pattern, str) for pattern in decayed)
    ):
        raise UnsupportedError(
            f"`decayed` is {decayed!r}; expected patterns of names such as ['*weight_hh*'], or a function of name and array"
        )
    return tuple(decayed)


def names_that_decay(decayed: Decayed, params: Mapping[str, Array]) -> set[str]:
    """The names among `params`; raises `UnsupportedError` for a pattern that fits none of them."""
    require_names("params", params)
    if callable(decayed):
        return {name for name, p in params.items() if decayed(name, p)}
    for pattern in decayed:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in params):
            raise UnsupportedError(f"`decayed` has {pattern!r}, which fits none of the parameters {', '.join(params)}")
    return {name for name in params for pattern in decayed if fnmatch.fnmatchcase(name, pattern)}


# -- clipping ------------------------------------------------------------------------------------------------------------------------------


_SMALL = 2.0**-64
"""The square of which, and all between, every type has with all of its bits."""


def clip_by_global_norm(grads: Mapping[str, Array], limit: float) -> tuple[Arrays, Array]:
    """Gradients scaled to a global L2 norm of at most `limit`, and the norm before: g ← g · min(1, limit / ‖g‖) (Pascanu et al. 2013).

    Gradients whose squares leave the range of the type are clipped like others. A gradient that is not finite gives a norm that is not.
    The norm is taken, and given, in at least float32; gradients keep their dtype. Raises `DTypeError`, and `UnsupportedError` for a
    `limit` that is not above 0.

    >>> import numpy as np, portnorm as pn
    >>> grads, norm = pn.clip_by_global_norm({"weight": np.array([[3.0, 0.0]]), "bias": np.array([4.0])}, 1.0)
    >>> float(norm), grads["bias"]
    (5.0, array([0.8]))
    """
    limit = real_number("limit", limit, 5e-324, math.inf, "a number > 0")
    require_arrays("grads", grads)
    first = first_of("grads", grads)
    xp, widened = xp_of(first), wide(grads)
    zero = xp.zeros((), dtype=statistics_dtype(xp, first.dtype), device=device_of(first))
    largest = zero
    for g in widened.values():
        largest = xp.maximum(largest, xp.max(xp.abs(g))) if 0 not in g.shape else largest
    # Divided by the largest entry first, so that squares of large gradients stay in range, or by a part of it, which some multiply with the
    # reciprocal of: that of 3e38 is 0 where small numbers are flushed.
    unit = xp.where((largest > 0) & xp.isfinite(largest), largest, 1.0)
    unit = xp.where(unit > 1.0, 2.0**-8 * unit, unit)
    ratio = xp.sqrt(sum((total((g / unit) ** 2, tuple(range(g.ndim))) for g in widened.values()), start=zero))
    norm = unit * ratio
    clips = norm > limit
    ratio = xp.where(clips, ratio, 1.0)
    factor = xp.where(clips, limit / unit / ratio, 1.0)
    if isinstance(factor, numpy.ndarray | numpy.number) and float(factor) >= _SMALL:  # of which one can ask without waiting for it
        return {n: xp.astype(widened[n] * factor, g.dtype, copy=False) for n, g in grads.items()}, norm
    # A factor that its type may have few bits for is taken in two.
    first = xp.where(factor < _SMALL, _SMALL, xp.ones_like(factor))
    second = xp.where(factor < _SMALL, limit / (unit * first) / ratio, factor)
    return {n: xp.astype(widened[n] * first * second, g.dtype, copy=False) for n, g in grads.items()}, norm
