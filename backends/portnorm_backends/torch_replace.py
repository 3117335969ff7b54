"""Modules of a torch model swapped for portnorm's, by class or name, after the model was run before and after."""

from __future__ import annotations

import difflib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from portnorm.checkpoint.foreign import import_checkpoint
from portnorm.errors import CheckpointError, UnsupportedError
from portnorm.layers.layer import Layer
from portnorm.layers.recurrent import Recurrent
from portnorm.scalars import switch
from portnorm_backends.torch_alone import check
from portnorm_backends.torch_attached import check_held, check_hooks, check_parametrized
from portnorm_backends.torch_compare import Call, Compared
from portnorm_backends.torch_settings import dropped_inside
from portnorm_backends.torch_standin import stand_in
from portnorm_backends.torch_trial import Trial
from portnorm_backends.torch_twin import Twin

Replacement = str | Callable[[torch.nn.Module], Layer]
Table = Mapping[type[torch.nn.Module] | str, Replacement]

_log = logging.getLogger("portnorm")


class Swapped(list[str]):
    """The paths of the modules that were swapped; as a `str`, what became of them, and what was compared."""

    def __init__(self, paths: list[str], twins: list[Twin], compared: list[Compared], note: str):
        super().__init__(paths)
        self.compared = compared
        """What of the model was compared before and after; nothing where it was not run."""
        self.note = note
        """What was not compared."""
        self._lines = [f"swapped {twin.title} for {type(twin.made._layer).__name__}" for twin in twins]

    def __str__(self) -> str:
        return "\n".join([*self._lines, *map(str, self.compared), *([self.note] if self.note else [])])


def replace_modules(
    model: torch.nn.Module,
    table: Table,
    *,
    args: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    training: bool = True,
    **config: Any,
) -> Swapped:
    """Swap modules inside `model`, in place, for `portnorm.torch_module` of the layers that compute the same.

    `table` has, for each class of modules or name of one (`"encoder.rnn"`, or the end of it, `"rnn"`), the format of its weights
    (`portnorm.FORMATS`: `"torch"`, `"torch-fastrnns"`, `"haste"`, `"icefall"`, …), or a function from the module to a layer of portnorm
    that has its weights. A name goes before a class, a class before those that it is derived from. `config` is what weights do not say,
    in the words of `portnorm.import_checkpoint` (`batch_first=True`, `eps=1e-3`), for all formats in the table; torch's own modules, and
    those inside others, say it themselves. A module is swapped with all that is inside it; one that is used at several places stays one.

    A replacement is called as its module was: by the same names of arguments, with states in that module's form (nested tuples of
    (batch, hidden) for each layer and direction as in fastrnns, one array as in torch.nn.GRU, one step as torch.nn.LSTMCell) as well as in
    portnorm's, with packed sequences, and gives only `y` where that gave no state. It has the plain attributes of its module, and those of
    torch.nn.LSTM. It keeps the mode, the dtype and the device, and what was frozen is. Hooks of the module, and parametrizations that no
    layer has, would be lost, and are refused by name. Its parameters are new: make an optimizer after the
    swap, since one that was made before goes on with those of the old modules.

    With `args`, the example inputs of `model` by place (a tuple, or the only one), or `kwargs`, those by name, the model is run before and
    after, with the same random numbers: in evaluation, where values are compared, and for one training step, where the gradients of all
    parameters and inputs and the running statistics are too (not with `training=False`). What may differ is what rounding does to this
    model, measured by runs from parameters that are moved by a unit in the last place. Every replacement is also compared alone, on the
    calls that the model makes. Without inputs nothing of the model is run, which the result and the log say, and each replacement is
    compared on random input and random states, in evaluation.

    Returns the list of the paths that were swapped, whose `str` says what was compared. Where anything differs or fails the model is
    left as it was: `ConformanceError` with the difference, `CheckpointError` where weights do not fit a format, and `UnsupportedError`
    where there is no such module, where it is called in a way that a layer cannot be called in, or where the model does not run.

    >>> import portnorm as pn
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    >>> swapped = pn.replace_modules(model, {torch.nn.BatchNorm1d: "torch"}, args=torch.randn(5, 3))
    >>> swapped
    ['1']
    >>> [f"{c.mode}: {c.what}" for c in swapped.compared]
    ['evaluation: values', 'training step: values', 'training step: gradients', 'training step: statistics']
    """
    _check_table(model, table)
    training = switch("training", training)
    places, rows = _found(model, table)
    firsts: dict[int, tuple[str, torch.nn.Module]] = {}
    for path, _, _, module in places:
        firsts.setdefault(id(module), (path, module))
    check_held(model, dict(firsts.values()))
    twins = {key: _twin(path, module, rows[key], config) for key, (path, module) in firsts.items()}
    _check_ties(model, list(twins.values()))
    trial = None
    if args is not None or kwargs is not None:
        trial = Trial(model, Call.of(args, kwargs), list(twins.values()), training)
    for key, twin in twins.items():
        check(twin, trial.calls[key] if trial is not None else None)
    for _, parent, name, module in places:
        parent._modules[name] = twins[id(module)].made
    try:
        compared = trial.compared() if trial is not None else []
    except BaseException:
        for _, parent, name, module in places:
            parent._modules[name] = module
        raise
    swapped = Swapped([path for path, *_ in places], list(twins.values()), compared, _note(trial, compared))
    _log.log(logging.INFO if trial is not None else logging.WARNING, "replace_modules %s", swapped)
    return swapped


def _note(trial: Trial | None, compared: list[Compared]) -> str:
    if trial is None:
        return (
            "nothing was run of the model, for want of `args` or `kwargs`, its inputs; each replacement alone was compared with "
            "its module, on random input in evaluation"
        )
    if not trial.modes[-1]:
        return "no training step was run: training=False"
    dropped = [twin.path for twin in trial.twins if getattr(twin.made, "dropout", 0.0)]
    missing = [what for what in ("gradients", "statistics") if not any(c.what.startswith(what) for c in compared)]
    notes = [f"the training step was run without the dropout of {', '.join(map(repr, dropped))}"] if dropped else []
    return "\n".join([*notes, *([f"the model has no {' and no '.join(missing)} to compare"] if missing else [])])


# -- what is swapped -----------------------------------------------------------------------------------------------------------------------


def _check_table(model: torch.nn.Module, table: Table) -> None:
    if not isinstance(model, torch.nn.Module):
        raise UnsupportedError(f"`model` is a {type(model).__name__}; expected a torch.nn.Module")
    if not isinstance(table, Mapping) or not table:
        came = "empty" if isinstance(table, Mapping) else f"a {type(table).__name__}"
        raise UnsupportedError(
            f'`table` is {came}; expected what to swap, such as {{torch.nn.LayerNorm: "torch"}} or {{"encoder.rnn": "torch"}}'
        )
    for key, given in table.items():
        if not isinstance(key, str) and not (isinstance(key, type) and issubclass(key, torch.nn.Module)):
            raise UnsupportedError(f"`table` has the key {key!r}; expected a class of modules, or the name of one as a str")
        if not isinstance(given, str) and not callable(given):
            raise UnsupportedError(
                f"`table` has {given!r} for {key!r}; expected the format of its weights, such as 'torch', or a function that "
                "makes a layer of it"
            )


def _found(model: torch.nn.Module, table: Table) -> tuple[list[tuple[str, torch.nn.Module, str, torch.nn.Module]], dict[int, Replacement]]:
    """(path, parent, name, module) of the outermost modules that the table has, and by module what it has for them."""
    paths = {path: module for path, module in model.named_modules(remove_duplicate=False) if path}
    named: dict[int, tuple[str, Replacement]] = {}
    for key, given in table.items():
        if isinstance(key, str):
            module = _of_name(key, paths)
            if named.setdefault(id(module), (key, given))[0] != key:
                raise UnsupportedError(f"`table` has {named[id(module)][0]!r} and {key!r}, which name one module; expected one of them")
    rows: dict[int, Replacement] = {}
    for module in paths.values():
        row = named[id(module)][1] if id(module) in named else next((table[kind] for kind in type(module).__mro__ if kind in table), None)
        if row is not None:
            rows[id(module)] = row
    places = list(_places(model, rows))
    reached = {id(module) for *_, module in places}
    for number, (name, _) in named.items():
        if number not in reached:
            raise UnsupportedError(
                f"`table` has {name!r}, which is inside a module that is swapped with all that is inside it; leave out one"
            )
    if not places:
        names = ", ".join(key if isinstance(key, str) else key.__name__ for key in table)
        own = next((table[kind] for kind in type(model).__mro__ if kind in table), None)
        way = ""
        if own is not None:
            layer = f"portnorm.import_checkpoint(model, {own!r})" if isinstance(own, str) else "the layer that your function gives"
            way = f"; it is itself a {type(model).__name__}, which cannot be swapped in place: model = portnorm.torch_module({layer})"
        elif any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
            way = "; modules of torch.jit have no classes: swap before the model is scripted or traced"
        raise UnsupportedError(f"`model` has no module of {names} inside; expected at least one to swap{way}")
    return places, rows


def _of_name(name: str, paths: Mapping[str, torch.nn.Module]) -> torch.nn.Module:
    """The module whose path is `name`, or the only one whose path ends so."""
    if name in paths:
        return paths[name]
    ends = {id(module): (path, module) for path, module in reversed(list(paths.items())) if path.endswith(f".{name}")}
    if len(ends) == 1:
        return next(iter(ends.values()))[1]
    if ends:
        raise UnsupportedError(
            f"`table` has {name!r}, which is the end of {', '.join(sorted(path for path, _ in ends.values()))}; expected one"
        )
    near = difflib.get_close_matches(name, paths, 3) or list(paths)[:8]
    raise UnsupportedError(f"`table` has {name!r}, but `model` has no module of that name; it has {', '.join(near) or 'none'}")


def _places(
    module: torch.nn.Module, rows: Mapping[int, Replacement], prefix: str = ""
) -> Iterator[tuple[str, torch.nn.Module, str, torch.nn.Module]]:
    for name, child in module._modules.items():
        if child is None:
            continue
        if id(child) in rows:
            yield f"{prefix}{name}", module, name, child
        else:
            yield from _places(child, rows, f"{prefix}{name}.")


def _twin(path: str, module: torch.nn.Module, row: Replacement, config: dict[str, Any]) -> Twin:
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedError(f"{path!r} was compiled by torch.jit, which keeps what it computes; swap before it is scripted or traced")
    if any(map(torch.nn.parameter.is_lazy, itertools.chain(module.parameters(), module.buffers()))):
        raise UnsupportedError(
            f"{path!r} ({type(module).__name__}) has no sizes yet; run the model once on its input: after that its class is one "
            "that is not lazy; swap it by that or by its name"
        )
    check_hooks(path, module)
    lost = dropped_inside(module) if isinstance(row, str) else []
    if lost and "dropout" not in config:
        raise UnsupportedError(
            f"{path!r} has {lost[0]}, of which its weights do not say where it is; pass dropout=… for what is dropped between layers, "
            "as in torch.nn.LSTM, or 0 to leave it out"
        )

    def layer_of(module: torch.nn.Module) -> Layer:
        if isinstance(row, str):
            return import_checkpoint(module, row, **config)
        layer = row(module)
        if not isinstance(layer, Layer):
            raise UnsupportedError(f"the function for {path!r} gives a {type(layer).__name__}; expected a layer of portnorm")
        return layer

    try:
        made = stand_in(layer_of(module), module)
    except CheckpointError as error:
        if isinstance(row, str):
            check_parametrized(path, module)
        raise CheckpointError(f"{path!r}: {error}") from error
    if isinstance(row, str) and not (isinstance(made._layer, Recurrent) and made._layer.variant.norm == "weight"):
        check_parametrized(path, module)
    if isinstance(module, torch.nn.RNNBase) and module.num_layers > 1 and getattr(made, "dropout", 0.0) != module.dropout:
        raise UnsupportedError(f"{path!r} has dropout={module.dropout} between its layers, which {made!r} has not")
    like = next((a for a in module.state_dict().values() if a.is_floating_point()), None)
    if like is not None:
        made = made.to(device=like.device, dtype=like.dtype)
    made.train(module.training)
    twin = Twin(path, module, made, layer_of)
    twin.freeze()
    return twin


def _check_ties(model: torch.nn.Module, twins: list[Twin]) -> None:
    """Raise `UnsupportedError` where a parameter that is trained belongs to a module and to something beside it: they would part."""
    inside = {id(m): twin for twin in twins for m in twin.module.modules()}
    owners: dict[int, list[tuple[str, Twin | None]]] = {}
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None and p.requires_grad:
                owners.setdefault(id(p), []).append((f"{path}.{name}".lstrip("."), inside.get(id(module))))
    for found in owners.values():
        if len(found) > 1 and any(twin is not None for _, twin in found):
            raise UnsupportedError(
                f"{' and '.join(repr(path) for path, _ in found)} are one parameter, which would be two after the swap, each trained "
                "alone; freeze it (requires_grad_(False)), or leave the module out"
            )
