"""Optimizers as functions of parameters, gradients and a state, pure unless they are told to write in place.

state = optimizer.init(params)
params, state = optimizer.update(params, grads, state)
params, state = optimizer.update(params, grads, state, in_place=True)  # writes into both, as other optimizers do

The state is kept, and an update computed, in at least float32; parameters keep their dtype, to which the new ones are rounded once. An
optimizer is settings alone, and all that it remembers is in the state: `dataclasses.replace(adam, lr=1e-4)` goes on from the same moments.
A learning rate may be a function of the number of updates before, `lr(0)` being that of the first. It is given an int; where values cannot
be looked at (under `jax.jit`, in Dask, in an exported graph) an array of floats without axes, on which arithmetic works and `if` does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from portnorm.arrays import Array, device_of, xp_of
from portnorm.descent import adam_step, moved, rmsprop_step, sgd_step, written
from portnorm.dtypes import default_integer
from portnorm.scalars import switch
from portnorm.updates import (
    Arrays,
    Decayed,
    OptimizerState,
    Rate,
    check,
    checked_decayed,
    counted,
    entry,
    first_of,
    names_that_decay,
    rates,
    require_arrays,
    require_in_place,
    set_learning_rate,
    set_rate,
    shown,
    weights_only,
    wide,
    zeros,
)


class Optimizer(Protocol):
    """What training needs of an optimizer."""

    def init(self, params: Mapping[str, Array]) -> OptimizerState:
        """The state before the first update: arrays, alone or in dicts."""

    def update(self, params: Mapping[str, Array], grads: Mapping[str, Array], state: OptimizerState) -> tuple[Arrays, OptimizerState]:
        """New parameters and state; nothing is changed in place.

        Raises `UnsupportedError` where `grads` or the state have not just the names of `params`, `ShapeError` where shapes differ.
        """


def _no_steps(params: Mapping[str, Array]) -> Array:
    """The number of updates before the first."""
    require_arrays("params", params)
    first = first_of("params", params)
    xp = xp_of(first)
    return xp.asarray(0, dtype=default_integer(xp), device=device_of(first))


def _places(
    params: Mapping[str, Array], grads: Mapping[str, Array], state: OptimizerState, in_place: bool, *names: str
) -> Callable[[str], Any]:
    """Where what becomes of a parameter and of what is remembered of it under `names` is written; `None` for arrays of their own."""
    if not switch("in_place", in_place):
        return lambda _: None
    require_in_place(params, grads, state)
    return lambda n: (params[n], *(state[name][n] for name in names))


def _updated(
    found: Mapping[str, tuple[Array, ...]], state: OptimizerState, steps: Array, in_place: bool, *names: str
) -> tuple[Arrays, OptimizerState]:
    """Parameters and the state after an update, from both together by the name of the parameter."""
    params = {n: arrays[0] for n, arrays in found.items()}
    if in_place:
        state["steps"] = steps
        return params, state
    return params, {**{name: {n: arrays[k] for n, arrays in found.items()} for k, name in enumerate(names, 1)}, "steps": steps}


@dataclass(frozen=True)
class SGD:
    """v ← momentum · v + g;  θ ← θ − lr · v.  As `torch.optim.SGD`.

    `lr` is a number or a function of the number of updates before. Raises `UnsupportedError` for rates out of range.

    >>> import numpy as np, portnorm as pn
    >>> sgd, params = pn.SGD(lr=lambda step: 0.5 * 0.1**step), {"weight": np.ones(2)}
    >>> state = sgd.init(params)
    >>> for _ in range(2):  # steps of 0.5 and 0.05
    ...     params, state = sgd.update(params, {"weight": np.array([1.0, 0.0])}, state)
    >>> params["weight"]
    array([0.45, 1. ])
    """

    lr: Rate = 0.1
    momentum: float = 0.0

    __repr__ = shown

    def __post_init__(self) -> None:
        set_learning_rate(self)
        set_rate(self, "momentum", 0.0, 1.0)

    def init(self, params: Mapping[str, Array]) -> OptimizerState:
        """The number of updates, 0; with momentum v = 0, shaped like each parameter, in at least float32.

        Raises `UnsupportedError` where `params` is empty or no mapping of arrays, `DTypeError` for other than real floating numbers.
        """
        steps = _no_steps(params)
        return {"velocity": zeros(params), "steps": steps} if self.momentum else {"steps": steps}

    def update(
        self, params: Mapping[str, Array], grads: Mapping[str, Array], state: OptimizerState, *, in_place: bool = False
    ) -> tuple[Arrays, OptimizerState]:
        """New parameters, in their own dtype, and the next state, by the equation of the class.

        `grads` are named and shaped like `params`; `state` is what `init` or the last update gave. Both it and `params` stay as they were,
        unless the update is `in_place`: then their arrays are written to and given back, and no memory is needed for others. Raises
        `UnsupportedError` for names that differ, for what is no state of this optimizer, and in place for arrays that cannot be written to
        or share memory, `ShapeError` where shapes differ.
        """
        check(params, grads=grads, **({"state['velocity']": entry(state, "velocity")} if self.momentum else {}))
        steps, widened, out = counted(state), wide(grads), _places(params, grads, state, in_place, *["velocity"] * bool(self.momentum))
        lr = rates(self.lr, steps, widened)
        if not self.momentum:
            moves = {n: written(out(n), (moved(params[n], lr[g.dtype] * g),)) for n, g in widened.items()}
            return _updated(moves, state, steps + 1, in_place)
        known = state["velocity"]
        found = {n: sgd_step(params[n], g, known[n], lr[g.dtype], self.momentum, out=out(n)) for n, g in widened.items()}
        return _updated(found, state, steps + 1, in_place, "velocity")


@dataclass(frozen=True)
class RMSProp:
    """s ← decay · s + (1 − decay) · g²;  θ ← θ − lr · g / (√s + eps).  As `torch.optim.RMSprop`; Cooijmans et al. 2016 use decay 0.5.

    `lr` is a number or a function of the number of updates before. Raises `UnsupportedError` for rates out of range.

    >>> import numpy as np, portnorm as pn
    >>> rmsprop, params = pn.RMSProp(lr=0.1, decay=0.75), {"weight": np.ones(2)}
    >>> params, state = rmsprop.update(params, {"weight": np.array([3.0, -0.01])}, rmsprop.init(params))
    >>> params["weight"].round(4)  # the first step is lr / √(1 − decay), whatever the size of the gradient
    array([0.8, 1.2])
    """

    lr: Rate = 1e-3
    decay: float = 0.9
    eps: float = 1e-8

    __repr__ = shown

    def __post_init__(self) -> None:
        set_learning_rate(self)
        set_rate(self, "decay", 0.0, 1.0)
        set_rate(self, "eps", 0.0, math.inf)

    def init(self, params: Mapping[str, Array]) -> OptimizerState:
        """s = 0, shaped like each parameter, in at least float32, and the number of updates, 0.

        Raises `UnsupportedError` where `params` is empty or no mapping of arrays, `DTypeError` for other than real floating numbers.
        """
        return {"square": zeros(params), "steps": _no_steps(params)}

    def update(
        self, params: Mapping[str, Array], grads: Mapping[str, Array], state: OptimizerState, *, in_place: bool = False
    ) -> tuple[Arrays, OptimizerState]:
        """New parameters, in their own dtype, and the next state, by the equation of the class. Arguments and errors as `SGD.update`."""
        check(params, grads=grads, **{"state['square']": entry(state, "square")})
        widened, steps, out = wide(grads), counted(state), _places(params, grads, state, in_place, "square")
        lr, known = rates(self.lr, steps, widened), state["square"]
        found = {n: rmsprop_step(params[n], g, known[n], lr[g.dtype], self.decay, self.eps, out=out(n)) for n, g in widened.items()}
        return _updated(found, state, steps + 1, in_place, "square")


@dataclass(frozen=True)
class Adam:
    """m ← β₁m + (1−β₁)g;  s ← β₂s + (1−β₂)g²;  θ ← θ − lr · m̂ / (√ŝ + eps), m̂ and ŝ without their bias.  Kingma & Ba 2015, algorithm 1.

    m̂ = m / (1 − β₁ᵗ) and ŝ = s / (1 − β₂ᵗ) at the t-th update. `lr` is a number or a function of the number of updates before. Raises
    `UnsupportedError` for rates out of range.

    >>> import numpy as np, portnorm as pn
    >>> adam, params = pn.Adam(lr=0.1), {"weight": np.ones(2)}
    >>> params, state = adam.update(params, {"weight": np.array([3.0, -0.01])}, adam.init(params))
    >>> params["weight"].round(4)  # the first step is lr, whatever the size of the gradient
    array([0.9, 1.1])
    >>> from dataclasses import replace
    >>> adam = replace(adam, lr=0.01)  # the moments and their count are in `state`, and go on
    >>> params, state = adam.update(params, {"weight": np.array([3.0, -0.01])}, state)
    >>> params["weight"].round(4), int(state["steps"])
    (array([0.89, 1.11]), 2)
    """

    lr: Rate = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    __repr__ = shown

    def __post_init__(self) -> None:
        set_learning_rate(self)
        set_rate(self, "beta1", 0.0, 1.0)
        set_rate(self, "beta2", 0.0, 1.0)
        set_rate(self, "eps", 0.0, math.inf)

    def init(self, params: Mapping[str, Array]) -> OptimizerState:
        """m = s = 0, shaped like each parameter, in at least float32, and the number of updates, 0.

        Raises `UnsupportedError` where `params` is empty or no mapping of arrays, `DTypeError` for other than real floating numbers.
        """
        return {"mean": zeros(params), "square": zeros(params), "steps": _no_steps(params)}

    def update(
        self, params: Mapping[str, Array], grads: Mapping[str, Array], state: OptimizerState, *, in_place: bool = False
    ) -> tuple[Arrays, OptimizerState]:
        """New parameters, in their own dtype, and the next state, by the equation of the class. Arguments and errors as `SGD.update`."""
        return self._update(params, grads, state, 0.0, set(), in_place)

    def _update(
        self,
        params: Mapping[str, Array],
        grads: Mapping[str, Array],
        state: OptimizerState,
        weight_decay: float,
        decaying: set[str],
        in_place: bool,
    ) -> tuple[Arrays, OptimizerState]:
        check(params, grads=grads, **{f"state[{name!r}]": entry(state, name) for name in ("mean", "square")})
        widened, before, out = wide(grads), counted(state), _places(params, grads, state, in_place, "mean", "square")
        steps = before + 1
        lr = rates(self.lr, before, widened)
        likes = {g.dtype: xp_of(g) for g in widened.values()}
        counts = {dtype: xp.astype(steps, dtype) for dtype, xp in likes.items()}
        scales = {dtype: lr[dtype] / (1.0 - self.beta1**count) for dtype, count in counts.items()}
        roots = {dtype: 1.0 / likes[dtype].sqrt(1.0 - self.beta2**count) for dtype, count in counts.items()}
        rest = (self.beta1, self.beta2, self.eps)
        found = {}
        for n, g in widened.items():
            decay = lr[g.dtype] * weight_decay if n in decaying else None
            known = params[n], g, state["mean"][n], state["square"][n]
            found[n] = adam_step(*known, scales[g.dtype], roots[g.dtype], *rest, decay, out=out(n))
        return _updated(found, state, steps, in_place, "mean", "square")


@dataclass(frozen=True)
class AdamW(Adam):
    """`Adam` with weights that decay beside it:  θ ← θ − lr · (m̂ / (√ŝ + eps) + weight_decay · θ).  Loshchilov & Hutter 2019, algorithm 2.

    The decay enters neither m nor s. It is multiplied with `lr`, as in `torch.optim.AdamW` and `optax.adamw`; the paper multiplies it with
    the schedule alone, relative to its start. `decayed` says which parameters decay: a function of name and array, or patterns of names
    (`["*weight_hh*", "1.weight"]`; one that fits no parameter is an error). Unless stated those are the matrices of weights: neither biases
    nor the gains and shifts of normalizers, see `portnorm.weights_only`. torch decays every parameter; `decayed=["*"]` does.

    >>> import numpy as np, portnorm as pn
    >>> adamw, params = pn.AdamW(lr=0.1, weight_decay=0.5), {"weight": np.ones((1, 2)), "bias": np.ones(1)}
    >>> params, state = adamw.update(params, {"weight": np.zeros((1, 2)), "bias": np.zeros(1)}, adamw.init(params))
    >>> params
    {'weight': array([[0.95, 0.95]]), 'bias': array([1.])}
    """

    weight_decay: float = 0.01
    decayed: Decayed = weights_only

    __repr__ = shown

    def __post_init__(self) -> None:
        super().__post_init__()
        set_rate(self, "weight_decay", 0.0, math.inf)
        object.__setattr__(self, "decayed", checked_decayed(self.decayed))

    def init(self, params: Mapping[str, Array]) -> OptimizerState:
        """As that of `Adam`, which it is. Raises `UnsupportedError` also for a pattern of `decayed` that fits no parameter."""
        names_that_decay(self.decayed, params)
        return super().init(params)

    def update(
        self, params: Mapping[str, Array], grads: Mapping[str, Array], state: OptimizerState, *, in_place: bool = False
    ) -> tuple[Arrays, OptimizerState]:
        """New parameters, in their own dtype, and the next state, by the equation of the class. Arguments and errors as `SGD.update`."""
        decaying = names_that_decay(self.decayed, params) if self.weight_decay else set[str]()
        return self._update(params, grads, state, self.weight_decay, decaying, in_place)


OPTIMIZERS: dict[str, Any] = {"sgd": SGD, "rmsprop": RMSProp, "adam": Adam, "adamw": AdamW}
"""By the names that the command line takes."""
