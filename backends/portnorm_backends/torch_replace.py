"""Modules of a torch model swapped for portnorm's, by class: their weights are read by the rows of `portnorm.checkpoint.formats`."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from portnorm.arrays import leaves, mapped
from portnorm.checkpoint.foreign import import_checkpoint
from portnorm.conform.tolerances import STEP_ULP, TRAJECTORY_FACTOR
from portnorm.errors import ConformanceError, PortnormError, UnsupportedError
from portnorm.layers.layer import Layer
from portnorm.layers.recurrent import Recurrent
from portnorm_backends.torch_module import TorchModule
from portnorm_backends.torch_settings import dropped_inside

Replacement = str | Callable[[torch.nn.Module], Layer]
Call = tuple[tuple[Any, ...], dict[str, Any]]


def replace_modules(
    model: torch.nn.Module, table: Mapping[type[torch.nn.Module], Replacement], *, args: Any = None, **config: Any
) -> list[str]:
    """Swap the modules of these classes inside `model`, in place, for `portnorm.torch_module` of the layers that compute the same.

    `table` has for each class the format of its weights (`portnorm.FORMATS`: `"torch-fastrnns"`, `"haste"`, `"icefall"`, `"torch"`, …), or
    a function from the module to a layer of portnorm that has its weights. `config` is what weights do not say, in the words of
    `portnorm.import_checkpoint` (`batch_first=True`, `eps=1e-3`), for all formats in the table; torch's own modules, and those inside
    others, say it themselves. A module is swapped with all that is inside it; one that is used at several places stays one.

    A replacement is called as its module was: it takes and gives states in that module's form (nested tuples of (batch, hidden) for each
    layer and direction as in fastrnns, one array as in torch.nn.GRU) as well as in portnorm's, and only `y` where that gave no state. It
    keeps the mode, the dtype and the device, and is frozen where all parameters were.

    Every replacement is compared in evaluation mode with what it replaces, on random input and random states, or, with `args`, the example
    inputs of `model`, on the calls that the model makes then. Only when all agree the model is changed. Returns the paths that were
    swapped. Raises `ConformanceError` with the difference, `CheckpointError` where weights do not fit a format, and `UnsupportedError`
    where there is no such module, or where it is called in a way that a layer cannot be called in.

    >>> import portnorm as pn
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    >>> pn.replace_modules(model, {torch.nn.BatchNorm1d: "torch"})
    ['1']
    """
    places = list(_places(model, table))
    if not places:
        names = ", ".join(kind.__name__ for kind in table)
        raise UnsupportedError(f"`model` has no module of {names} inside; expected at least one to swap")
    modules: dict[int, tuple[str, torch.nn.Module]] = {}
    for path, _, _, module in places:
        modules.setdefault(id(module), (path, module))
    made = {key: _replacement(path, module, _row(module, table), config) for key, (path, module) in modules.items()}
    calls = _recorded(model, modules, args if isinstance(args, tuple) else (args,)) if args is not None else {}
    for key, (path, module) in modules.items():
        _check(path, module, made[key], calls.get(key) if args is not None else None)
    for _, parent, name, module in places:
        parent._modules[name] = made[id(module)]
    return [path for path, *_ in places]


def _row(module: torch.nn.Module, table: Mapping[type[torch.nn.Module], Replacement]) -> Replacement | None:
    """What the table has for the module: the entry of the nearest class."""
    return next((table[kind] for kind in type(module).__mro__ if kind in table), None)


def _places(
    module: torch.nn.Module, table: Mapping[type[torch.nn.Module], Replacement], prefix: str = ""
) -> Iterator[tuple[str, torch.nn.Module, str, torch.nn.Module]]:
    """(path, parent, name, module) of the outermost modules that the table has."""
    for name, child in module._modules.items():
        if child is None:
            continue
        if _row(child, table) is not None:
            yield f"{prefix}{name}", module, name, child
        else:
            yield from _places(child, table, f"{prefix}{name}.")


def _replacement(path: str, module: torch.nn.Module, row: Replacement | None, config: dict[str, Any]) -> _Replaced:
    own = dict(module.named_parameters())
    if isinstance(row, str):
        lost = dropped_inside(module)
        if lost and "dropout" not in config:
            raise UnsupportedError(
                f"{path!r} has {lost[0]}, of which its weights do not say where it is; pass dropout=… for what is dropped between layers, "
                "as in torch.nn.LSTM, or 0 to leave it out"
            )
        layer = import_checkpoint(module, row, **config)
    else:
        assert row is not None
        layer = row(module)
        if not isinstance(layer, Layer):
            raise UnsupportedError(f"the function for {path!r} gives a {type(layer).__name__}; expected a layer of portnorm")
    made: _Replaced = _Replaced(layer)
    like = next((a for a in module.state_dict().values() if a.is_floating_point()), None)
    if like is not None:
        made = made.to(device=like.device, dtype=like.dtype)
    if own and not any(p.requires_grad for p in own.values()):
        made.requires_grad_(False)
    made.train(module.training)
    return made


class _Replaced(TorchModule):
    """A layer that is called as the module was in whose place it stands."""

    def __init__(self, layer: Layer):
        super().__init__(layer)
        self.gives_state = True
        self.form: _Form | None = None
        """That of the states that come out where none went in; `None` is the layer's own."""

    def forward(self, x: Any, state: Any = None, lengths: Any = None, *, mask: Any = None) -> Any:
        layer = self._layer
        if not isinstance(layer, Recurrent):
            return super().forward(x, state, lengths, mask=mask)
        form = self.form
        if state is not None:
            state, form = self._ours(state)
        y, state = super().forward(x, state, lengths, mask=mask)
        if not self.gives_state:
            return y
        return y, state if form is None else form.given_back(state)

    def _ours(self, state: Any) -> tuple[Any, _Form]:
        """A state as the layer takes it, and the form it came in."""
        layer = self._layer
        assert isinstance(layer, Recurrent)
        form, arrays, count = _Form.of(state), list(leaves(state)), len(layer.cell.states)
        if form.single and len(arrays) == count * layer.num_layers * layer.num_directions:
            arrays = [torch.stack(arrays[k::count]) for k in range(count)]
        return tuple(arrays), form


class _Form(NamedTuple):
    """How a state is nested."""

    places: Any
    """The state with numbers for its arrays, in order."""
    single: bool
    """Whether there is an array (batch, hidden) for each layer and direction."""

    @classmethod
    def of(cls, state: Any) -> _Form:
        number = itertools.count()
        return cls(mapped(lambda _: next(number), state), all(a.ndim == 2 for a in leaves(state)))

    def given_back(self, state: tuple[Any, ...]) -> Any:
        """A state of the layer in this form."""
        arrays = [a[k] for k in range(state[0].shape[0]) for a in state] if self.single else list(state)
        return mapped(lambda k: arrays[k], self.places)


def _recorded(
    model: torch.nn.Module, modules: Mapping[int, tuple[str, torch.nn.Module]], args: tuple[Any, ...]
) -> dict[int, list[tuple[Call, Any]]]:
    """The calls of the modules, and what came out, while the model runs on `args`."""
    calls: dict[int, list[tuple[Call, Any]]] = {key: [] for key in modules}

    def hook(module: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any], result: Any) -> None:
        calls[id(module)].append(((given, named), result))

    modes = {module: module.training for module in model.modules()}
    handles = [module.register_forward_hook(hook, with_kwargs=True) for _, module in modules.values()]
    try:
        with torch.no_grad():
            model.eval()(*args)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return calls


def _check(path: str, module: torch.nn.Module, made: _Replaced, calls: list[tuple[Call, Any]] | None) -> None:
    """Compare the replacement with the module, on the recorded calls or on random ones."""
    title = f"{path!r} ({type(module).__name__})"
    modes = [(inner, inner.training) for inner in (*module.modules(), *made.modules())]
    try:
        module.eval()
        made.eval()
        with torch.no_grad():
            if calls is None:
                return _check_random(title, module, made)
            if not calls:
                raise UnsupportedError(f"{title} is not called while the model runs on `args`, so it cannot be compared")
            for call, result in calls:
                _compare(title, made, call, result)
    finally:
        for inner, mode in modes:
            inner.training = mode


def _check_random(title: str, module: torch.nn.Module, made: _Replaced) -> None:
    """Compare on random input: without a state where the module takes that, and with a random state in the form that it takes."""
    x, states = _random_inputs(made)
    refused, agreed, differ = [], False, []
    for state in states:
        call: Call = ((x, *state), {})
        try:
            result = module(*call[0])
        except Exception as error:  # whatever somebody else's module raises where it is called in another way than it is meant to be
            refused.append(f"{type(error).__name__}: {error}".splitlines()[0])
            continue
        try:
            _compare(title, made, call, result)
            agreed = True
            if state:
                return
        except PortnormError as error:
            if not state:
                raise
            differ.append(error)  # it may have taken the arrays for a state in another form
    if differ:
        raise next((error for error in differ if isinstance(error, ConformanceError)), differ[0])
    if not agreed:
        how = f"`x` {tuple(x.shape)}, alone or with a state in a form that is known" if len(states) > 1 else f"`x` {tuple(x.shape)}"
        raise UnsupportedError(
            f"{title} cannot be called with {how}: {refused[0]}. Give `args`, the example inputs of the model, for the calls that it makes"
        )


def _random_inputs(made: _Replaced) -> tuple[torch.Tensor, list[tuple[Any, ...]]]:
    """`x`, and what may follow it: nothing, or a state in one of the forms that modules have."""
    layer = made.to_layer()
    generator = torch.Generator().manual_seed(0)
    lengths = {"batch": 3, "time": 5, "space": 7}
    shape = [d if isinstance(d, int) else lengths[d] for d in layer.input_dims()]
    arrays = list(made.state_dict().values())
    dtype = next((a.dtype for a in arrays if a.is_floating_point()), torch.get_default_dtype())
    device = next((a.device for a in arrays), torch.device("cpu"))

    def drawn(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator).to(device=device, dtype=dtype)

    x = torch.zeros(*shape, dtype=torch.int64, device=device) if layer.takes_integers else drawn(*shape)
    states: list[tuple[Any, ...]] = [()]
    if isinstance(layer, Recurrent) and not layer.timed:
        places, whole = (
            layer.num_layers * layer.num_directions,
            [drawn(layer.num_layers * layer.num_directions, 3, n) for n in layer.state_sizes()],
        )
        pairs = [tuple(s[k] for s in whole) for k in range(places)]
        nested = [pairs[k : k + layer.num_directions] for k in range(0, places, layer.num_directions)]
        states += [(tuple(whole),), (pairs,), (nested,)] + ([(pairs[0],)] if places == 1 else [])
        if len(whole) == 1:
            states += [(whole[0],)] + ([(pairs[0][0],)] if places == 1 else [])
    return x, states


def _compare(title: str, made: _Replaced, call: Call, result: Any) -> None:
    """Raise `ConformanceError` where the replacement gives another result, `UnsupportedError` where it gives one of another kind."""
    given, named = call
    if isinstance(made._layer, Recurrent):
        made.gives_state = not isinstance(result, torch.Tensor)
        if made.gives_state and (not isinstance(result, tuple | list) or len(result) != 2):
            raise UnsupportedError(f"{title} gives a {type(result).__name__}; expected `y`, or `y` and a state")
        if made.gives_state and len(given) < 2:
            made.form = _Form.of(result[1])
    try:
        mine = made(*given, **named)
    except TypeError as error:
        raise UnsupportedError(f"{title} is called in a way that {made!r} cannot be: {error}") from error
    double = copy.deepcopy(made).double()
    wide = pytree.tree_map(lambda a: a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a, (given, named))
    exact = pytree.tree_leaves(double(*wide[0], **wide[1]))
    theirs, ours = pytree.tree_leaves(result), pytree.tree_leaves(mine)
    shapes = [[tuple(a.shape) for a in side] for side in (theirs, ours)]
    if shapes[0] != shapes[1]:
        raise UnsupportedError(f"{title} gives arrays of the shapes {shapes[0]}, but {made!r} gives {shapes[1]}")
    for k, (a, b, truth) in enumerate(zip(theirs, ours, exact, strict=True)):
        largest = max(1.0, float(truth.abs().max())) if truth.numel() else 1.0
        floor = STEP_ULP * torch.finfo(b.dtype).eps * largest
        difference = float((a.double() - b.double()).abs().max()) if b.numel() else 0.0
        allowed = TRAJECTORY_FACTOR * (float((b.double() - truth).abs().max()) if b.numel() else 0.0) + floor
        if not difference <= allowed:
            what = "y" if k == 0 else f"array {k} of the state"
            raise ConformanceError(
                f"{title} and {made!r} differ by {difference:.3g} in {what}; rounding allows {allowed:.3g}. "
                "What weights do not say (`eps`, `batch_first`, …) can be given as keyword arguments"
            )
