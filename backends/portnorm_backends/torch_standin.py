"""Layers of portnorm that are called as the modules of torch were in whose places they stand, and say of themselves what these said."""

from __future__ import annotations

import inspect
import itertools
from typing import Any, NamedTuple

import torch

from portnorm.arrays import Array, leaves, mapped
from portnorm.errors import UnsupportedError
from portnorm.layers.layer import Layer
from portnorm.layers.recurrent import Recurrent
from portnorm_backends.torch_module import RecurrentModule, TorchModule
from portnorm_backends.torch_recurrent import counts

_OURS = ("x", "state", "lengths")
_NAMED = ("mask", "kept")
"""What is given by name alone."""
_PLAIN = (bool, int, float, str, type(None))


def stand_in(layer: Layer, module: torch.nn.Module) -> StandIn:
    """The layer in the form of `module`."""
    if not isinstance(layer, Recurrent):
        return StandIn(layer, module)
    return CellStandIn(layer, module) if isinstance(module, torch.nn.RNNCellBase) else RecurrentStandIn(layer, module)


class Form(NamedTuple):
    """How a state is nested."""

    places: Any
    """The state with numbers for its arrays, in order."""
    single: bool
    """Whether there is an array (batch, hidden) for each layer and direction."""

    @classmethod
    def of(cls, state: Any) -> Form:
        number = itertools.count()
        return cls(mapped(lambda _: next(number), state), all(a.ndim == 2 for a in leaves(state)))

    def given_back(self, state: tuple[Any, ...]) -> Any:
        """A state of the layer in this form."""
        arrays = [a[k] for k in range(state[0].shape[0]) for a in state] if self.single else list(state)
        return mapped(lambda k: arrays[k], self.places)


class StandIn(TorchModule):
    """A layer in the place of a module: it takes arguments by the names that this had, and has its plain attributes."""

    def __init__(self, layer: Layer, module: torch.nn.Module):
        super().__init__(layer)
        spread = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
        names = [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind in spread]
        self._names = {name: ours for name, ours in zip(names, _OURS, strict=False) if name not in (*_OURS, *_NAMED)}
        absent = {name: None for group in (module._parameters, module._buffers) for name, array in group.items() if array is None}
        plain = {
            name: value for name, value in vars(module).items() if name != "training" and not name.startswith("_") and _is_plain(value)
        }
        told = {name: value for name, value in {**absent, **plain}.items() if not hasattr(self, name)}
        self.__dict__.update(told)
        self._told = frozenset(told)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.__dict__.get("_told", ()):
            super().__setattr__(name, value)
        elif name in self._layer.config:
            setattr(self._layer, name, value)
            self.__dict__[name] = value
        elif value != self.__dict__[name]:
            raise UnsupportedError(
                f"`{name}` is {value!r}, but {self!r} computes as the module in whose place it stands did with {self.__dict__[name]!r}; "
                "change the module before it is swapped"
            )

    def bound(self, args: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by our names. Raises `TypeError` as Python does."""
        if len(args) > len(_OURS):
            raise TypeError(f"{len(args)} arguments are given by place; expected at most {len(_OURS)}: {', '.join(_OURS)}")
        given = dict(zip(_OURS, args, strict=False))
        for name, value in named.items():
            ours = self._names.get(name, name)
            if ours not in (*_OURS, *_NAMED):
                raise TypeError(f"it has no argument `{name}`; expected {', '.join([*_OURS, *_NAMED, *self._names])}")
            if ours in given:
                raise TypeError(f"`{name}` is given twice")
            given[ours] = value
        if counts(given.get("state")):
            given["state"], given["lengths"] = given.get("lengths"), given["state"]
        return given

    def forward(self, *args: Any, **named: Any) -> Any:
        """As the module was called."""
        return super().forward(**self.bound(args, named))


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(v) for v in value)
    return isinstance(value, _PLAIN)


class RecurrentStandIn(StandIn, RecurrentModule):
    """States go in and come out in the form of the module: nested tuples of (batch, hidden), one array as in torch.nn.GRU, or ours."""

    def __init__(self, layer: Recurrent, module: torch.nn.Module):
        super().__init__(layer, module)
        self._gives_state = True
        self._form: Form | None = None
        """That of the states that come out where none went in; `None` is the layer's own."""
        of_torch = isinstance(module, torch.nn.RNNBase | torch.nn.RNNCellBase)
        self._takes_one = of_torch
        """Whether a sequence comes without the axis of the batch too."""
        if of_torch:
            cell = isinstance(module, torch.nn.RNNCellBase)
            several = len(layer.cell.states) > 1
            self._form = Form((0, 1) if several else 0, cell) if cell or not several else None

    def forward(self, *args: Any, **named: Any) -> Any:
        """As the module was called."""
        y, state = self._run(**self.bound(args, named))
        return (y, state) if self._gives_state else y

    def _run(self, x: Any, state: Any = None, lengths: Any = None, mask: Any = None, kept: Any = None) -> tuple[Any, Any]:
        axis = 0 if self._layer.batch_first else 1
        alone = self._takes_one and isinstance(x, torch.Tensor) and x.ndim == 2
        if alone:
            x, state = x.unsqueeze(axis), None if state is None else mapped(lambda a: a.unsqueeze(1), state)
        form = self._form
        if state is not None:
            state, form = self._ours(state)
        y, after = TorchModule.forward(self, x, state, lengths, mask=mask, kept=kept)
        after = after if form is None else form.given_back(after)
        return (y.squeeze(axis), mapped(lambda a: a.squeeze(1), after)) if alone else (y, after)

    def step(self, x: Array, state: Any = None, kept: Any = None) -> tuple[Array, Any]:
        """One time step: `x` (batch, features) to `(h, state)`, the state in the form in which it came; `kept` as in `RecurrentModule`."""
        self._check_step(kept)
        axis = 1 if self._layer.batch_first else 0
        y, state = self._run(x.unsqueeze(axis), state, kept=kept)
        return y.squeeze(axis), state

    def _ours(self, state: Any) -> tuple[Any, Form]:
        """A state as the layer takes it, and the form it came in."""
        layer = self._layer
        form, arrays, count = Form.of(state), list(leaves(state)), len(layer.cell.states)
        if form.single and len(arrays) == count * layer.num_layers * layer.num_directions:
            arrays = [torch.stack(arrays[k::count]) for k in range(count)]
        return tuple(arrays), form


def _first(name: str) -> property:
    """The array that torch's cell has under this name."""
    return property(lambda self: self.arrays()[0].get(f"{name}_l0"))


class CellStandIn(RecurrentStandIn):
    """Called as torch.nn.LSTMCell, GRUCell and RNNCell are: one step, `x` (batch, features) or (features,), to (h, c) or h."""

    weight_ih, weight_hh, bias_ih, bias_hh = (_first(name) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))

    def forward(self, *args: Any, **named: Any) -> Any:
        """As the cell was called."""
        given = self.bound(args, named)
        x, state, kept = given.pop("x"), given.pop("state", None), given.pop("kept", None)
        if any(value is not None for value in given.values()):
            raise UnsupportedError(f"`{', '.join(given)}` of one step of {self!r}; expected `x` and a state")
        alone = x.ndim == 1
        if alone:
            x, state = x[None], None if state is None else mapped(lambda a: a[None], state)
        _, after = self.step(x, tuple(state) if isinstance(state, list) else state, kept)
        return mapped(lambda a: a[0], after) if alone else after
