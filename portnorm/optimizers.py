"""Optimizers as pure functions of parameters, gradients and a state, and clipping by the global norm.

state = optimizer.init(params)
params, state = optimizer.update(params, grads, state)

The state is kept, and an update computed, in at least float32; parameters keep their dtype, to which the new ones are rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from portnorm.arrays import Array, default_integer, device_of, namespace, require_floating, statistics_dtype, xp_of
from portnorm.errors import ShapeError, UnsupportedError
from portnorm.scalars import real_number
from portnorm.sums import total

Arrays = dict[str, Array]
OptimizerState = dict[str, Any]


class Optimizer(Protocol):
    """What training needs of an optimizer."""

    def init(self, params: Mapping[str, Array]) -> OptimizerState:
        """The state before the first update."""

    def update(self, params: Mapping[str, Array], grads: Mapping[str, Array], state: OptimizerState) -> tuple[Arrays, OptimizerState]:
        """New parameters and state; nothing is changed in place.

        Raises `UnsupportedError` where `grads` or the state have not just the names of `params`, `ShapeError` where shapes differ.
        """


def _first(name: str, arrays: Mapping[str, Array]) -> Array:
    for a in arrays.values():
        return a
    raise UnsupportedError(f"`{name}` is empty; expected arrays by name")


def _require_arrays(group: str, arrays: Mapping[str, Array]) -> None:
    """Raise `UnsupportedError` or `DTypeError` where one of them is no array of real floating-point numbers."""
    if not isinstance(arrays, Mapping):
        raise UnsupportedError(f"`{group}` is a {type(arrays).__name__}; expected arrays by name")
    for name, a in arrays.items():
        label = f"{group}[{name!r}]"
        require_floating(namespace(**{label: a}), **{label: a})


def _zeros(params: Mapping[str, Array]) -> Arrays:
    _require_arrays("params", params)
    return {name: xp_of(p).zeros_like(p, dtype=statistics_dtype(xp_of(p), p.dtype)) for name, p in params.items()}


def _wide(arrays: Mapping[str, Array]) -> Arrays:
    """The arrays in at least float32, where narrower types would lose small changes, squares and ε."""
    found = {}
    for name, a in arrays.items():
        xp, dtype = xp_of(a), a.dtype
        wide = statistics_dtype(xp, dtype)
        found[name] = a if wide is dtype or wide == dtype else xp.astype(a, wide)
    return found


def _moved(params: Mapping[str, Array], steps: Mapping[str, Array]) -> Arrays:
    """Parameters less a step each, in their own dtype."""
    found = {}
    for name, p in params.items():
        step = steps[name]
        if step.dtype == p.dtype:
            found[name] = p - step
        else:
            xp = xp_of(p)
            found[name] = xp.astype(xp.astype(p, step.dtype) - step, p.dtype)
    return found


def _check(params: Mapping[str, Array], **groups: Any) -> None:
    """Raise `UnsupportedError` for a group that lacks one of `params` or has one more, `ShapeError` where shapes differ."""
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


def _set_rate(optimizer: Any, name: str, low: float, high: float) -> None:
    """Keep a rate as a float; raises `UnsupportedError` for what is none, or does not lie from `low` to below `high`."""
    expected = f"a number from {low} to below {high}"
    value = real_number(name, getattr(optimizer, name), low, high, expected)
    if not value < high:
        raise UnsupportedError(f"`{name}` is {value}; expected {expected}")
    object.__setattr__(optimizer, name, value)


def _entry(state: Any, name: str) -> Any:
    """What a state has under this name; raises `UnsupportedError` for what is no state of this optimizer."""
    if not isinstance(state, Mapping) or state.get(name) is None:
        what = f"has no {name!r}" if isinstance(state, Mapping) else f"is a {type(state).__name__}"
        raise UnsupportedError(f"`state` {what}; expected what `init` or the last update gave")
    return state[name]


def _next(steps: Array) -> Array:
    """The number of updates after one more; raises `UnsupportedError` for what is no array."""
    namespace(**{"state['steps']": steps})
    return steps + 1


@dataclass(frozen=True)
class SGD:
    """v ← momentum · v + g;  θ ← θ − lr · v.  As `torch.optim.SGD`."""

    lr: float = 0.1
    momentum: float = 0.0

    def __post_init__(self) -> None:
        _set_rate(self, "lr", 0.0, float("inf"))
        _set_rate(self, "momentum", 0.0, 1.0)

    def init(self, params: Mapping[str, Array]) -> OptimizerState:
        return {"velocity": _zeros(params)} if self.momentum else {}

    def update(self, params: Mapping[str, Array], grads: Mapping[str, Array], state: OptimizerState) -> tuple[Arrays, OptimizerState]:
        _check(params, grads=grads, **({"state['velocity']": _entry(state, "velocity")} if self.momentum else {}))
        velocity = _wide(grads)
        if self.momentum:
            velocity = {n: self.momentum * state["velocity"][n] + g for n, g in velocity.items()}
        return _moved(params, {n: self.lr * velocity[n] for n in params}), {"velocity": velocity} if self.momentum else {}


@dataclass(frozen=True)
class RMSProp:
    """s ← decay · s + (1 − decay) · g²;  θ ← θ − lr · g / (√s + eps).  As `torch.optim.RMSprop`; Cooijmans et al. 2016 use decay 0.5."""

    lr: float = 1e-3
    decay: float = 0.9
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _set_rate(self, "lr", 0.0, float("inf"))
        _set_rate(self, "decay", 0.0, 1.0)
        _set_rate(self, "eps", 0.0, math.inf)

    def init(self, params: Mapping[str, Array]) -> OptimizerState:
        return {"square": _zeros(params)}

    def update(self, params: Mapping[str, Array], grads: Mapping[str, Array], state: OptimizerState) -> tuple[Arrays, OptimizerState]:
        _check(params, grads=grads, **{"state['square']": _entry(state, "square")})
        wide = _wide(grads)
        square = {n: self.decay * state["square"][n] + (1.0 - self.decay) * g * g for n, g in wide.items()}
        steps = {n: self.lr * wide[n] / (xp_of(p).sqrt(square[n]) + self.eps) for n, p in params.items()}
        return _moved(params, steps), {"square": square}


@dataclass(frozen=True)
class Adam:
    """m ← β₁m + (1−β₁)g;  s ← β₂s + (1−β₂)g²;  θ ← θ − lr · m̂ / (√ŝ + eps), m̂ and ŝ without their bias.  Kingma & Ba 2015, algorithm 1."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _set_rate(self, "lr", 0.0, float("inf"))
        _set_rate(self, "beta1", 0.0, 1.0)
        _set_rate(self, "beta2", 0.0, 1.0)
        _set_rate(self, "eps", 0.0, math.inf)

    def init(self, params: Mapping[str, Array]) -> OptimizerState:
        _require_arrays("params", params)
        first = _first("params", params)
        xp = xp_of(first)
        steps = xp.asarray(0, dtype=default_integer(xp), device=device_of(first))
        return {"mean": _zeros(params), "square": _zeros(params), "steps": steps}

    def update(self, params: Mapping[str, Array], grads: Mapping[str, Array], state: OptimizerState) -> tuple[Arrays, OptimizerState]:
        _check(params, grads=grads, **{f"state[{name!r}]": _entry(state, name) for name in ("mean", "square")})
        wide, steps = _wide(grads), _next(_entry(state, "steps"))
        mean = {n: self.beta1 * state["mean"][n] + (1.0 - self.beta1) * g for n, g in wide.items()}
        square = {n: self.beta2 * state["square"][n] + (1.0 - self.beta2) * g * g for n, g in wide.items()}
        likes = {m.dtype: m for m in mean.values()}
        counts = {dtype: xp_of(m).astype(steps, dtype) for dtype, m in likes.items()}
        rates = {dtype: (self.lr / (1.0 - self.beta1**count), 1.0 - self.beta2**count) for dtype, count in counts.items()}
        changes = {}
        for n, m in mean.items():
            rate, share = rates[m.dtype]
            changes[n] = rate * m / (xp_of(m).sqrt(square[n] / share) + self.eps)
        return _moved(params, changes), {"mean": mean, "square": square, "steps": steps}


OPTIMIZERS: dict[str, Any] = {"sgd": SGD, "rmsprop": RMSProp, "adam": Adam}
"""By the names that the command line takes."""


def clip_by_global_norm(grads: Mapping[str, Array], limit: float) -> tuple[Arrays, Array]:
    """Gradients scaled to a global L2 norm of at most `limit`, and the norm before: g ← g · min(1, limit / ‖g‖) (Pascanu et al. 2013).

    Gradients whose squares leave the range of the type are clipped like others. A gradient that is not finite gives a norm that is not.
    The norm is taken, and given, in at least float32; gradients keep their dtype.
    """
    limit = real_number("limit", limit, 5e-324, math.inf, "a number > 0")
    _require_arrays("grads", grads)
    first = _first("grads", grads)
    xp, wide = xp_of(first), _wide(grads)
    zero = xp.zeros((), dtype=statistics_dtype(xp, first.dtype), device=device_of(first))
    largest = zero
    for g in wide.values():
        largest = xp.maximum(largest, xp.max(xp.abs(g))) if 0 not in g.shape else largest
    # Divided by the largest entry first, so that squares of large gradients stay in range.
    unit = xp.where((largest > 0) & xp.isfinite(largest), largest, 1.0)
    ratio = xp.sqrt(sum((total((g / unit) ** 2, tuple(range(g.ndim))) for g in wide.values()), start=zero))
    norm = unit * ratio
    factor = xp.where(norm > limit, limit / unit / xp.where(norm > limit, ratio, 1.0), 1.0)
    return {n: xp.astype(wide[n] * factor, g.dtype, copy=False) for n, g in grads.items()}, norm
