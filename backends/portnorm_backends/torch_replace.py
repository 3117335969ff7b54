"""Modules of a torch model swapped for portnorm's, by class or name, after the model was run before and after."""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from portnorm.checkpoint.foreign import import_checkpoint
from portnorm.errors import CheckpointError, UnsupportedError
from portnorm.layers.layer import Layer
from portnorm_backends.torch_alone import Recorded, check
from portnorm_backends.torch_compare import SEEDS, Arrays, Call, Compared, Ran, arrays_in, changed, compare, nudged, ran, steady, unit
from portnorm_backends.torch_module import RecurrentModule
from portnorm_backends.torch_standin import stand_in
from portnorm_backends.torch_twin import Twin

Replacement = str | Callable[[torch.nn.Module], Layer]
Table = Mapping[type[torch.nn.Module] | str, Replacement]

_ALONG = "gradients along random directions"

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
    torch.nn.LSTM. It keeps the mode, the dtype and the device, and what was frozen is.

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
    places, rows = _found(model, table)
    firsts: dict[int, tuple[str, torch.nn.Module]] = {}
    for path, _, _, module in places:
        firsts.setdefault(id(module), (path, module))
    twins = {key: _twin(path, module, rows[key], config) for key, (path, module) in firsts.items()}
    _check_ties(model, list(twins.values()))
    trial = None
    if args is not None or kwargs is not None:
        trial = _Trial(model, Call.of(args, kwargs), list(twins.values()), training)
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


def _note(trial: _Trial | None, compared: list[Compared]) -> str:
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
        raise UnsupportedError(f"`model` has no module of {names} inside; expected at least one to swap")
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
        raise CheckpointError(f"{path!r}: {error}") from error
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


# -- the model around ----------------------------------------------------------------------------------------------------------------------


class _Trial:
    """The model as it runs before the swap, in evaluation and for a training step."""

    def __init__(self, model: torch.nn.Module, call: Call, twins: list[Twin], training: bool):
        self.model, self.call, self.twins = model, call, twins
        self.modes = (False, True) if training else (False,)
        self.unit = unit(model)
        self.calls: dict[int, list[Recorded]] = {id(twin.module): [] for twin in twins}
        self._inside = {id(module) for twin in twins for module in twin.module.modules()}
        self.before: dict[bool, Ran] = {}
        self.near: dict[bool, list[Ran]] = {}
        for mode in self.modes:
            self.before[mode] = self._first(mode)
            if not self.before[mode].values:
                raise UnsupportedError(
                    "`model` gives nothing that can be compared; expected arrays or numbers, or nested tuples and dicts of them"
                )
            steady(_name(mode), self.before[mode], self._run(mode, call), self.unit)
            self.near[mode] = []
            for seed in SEEDS:
                with nudged(model, seed) as near:
                    self.near[mode].append(self._run(mode, call.fresh(near)))

    def _first(self, mode: bool) -> Ran:
        """The run that the others are compared with; in evaluation the calls of the modules are kept."""

        def hook(module: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any], result: Any) -> None:
            device = next((a.device.type for a in arrays_in((given, named), "").values()), "cpu")
            narrow = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            self.calls[id(module)].append(
                Recorded(Call(given, named).fresh(), changed(lambda a: a.detach().clone(), result), device, narrow)
            )
            self.unit = max(self.unit, torch.finfo(narrow).eps if narrow is not None else 0.0)

        handles = [] if mode else [twin.module.register_forward_hook(hook, with_kwargs=True) for twin in self.twins]
        try:
            return self._run(mode, self.call)
        except Exception as error:  # whatever a model raises
            instead = "; training=False compares in evaluation alone" if mode else ""
            raise UnsupportedError(
                f"`model` does not run on `args` ({_name(mode)}), before anything was swapped: {_said(error)}; expected example inputs "
                f"that it takes{instead}"
            ) from error
        finally:
            for handle in handles:
                handle.remove()

    def _run(self, mode: bool, call: Call) -> Ran:
        with self._without_dropout():
            return ran(self.model, call, mode, self._statistics)

    @contextlib.contextmanager
    def _without_dropout(self) -> Iterator[None]:
        """Without that of the modules and of what stands for them, which draw other numbers of one generator."""
        found = [
            (m, m.dropout) for twin in self.twins for m in (twin.module, twin.made) if isinstance(m, torch.nn.RNNBase | RecurrentModule)
        ]
        for m, _ in found:
            m.dropout = 0.0
        try:
            yield
        finally:
            for m, dropout in found:
                m.dropout = dropout

    def _statistics(self) -> Arrays:
        """The buffers of the model outside of the modules, and those that the layers of the modules have now."""
        outside = {
            f"{path}.{name}".lstrip("."): a
            for path, module in self.model.named_modules()
            if id(module) not in self._inside
            for name, a in module._buffers.items()
            if a is not None
        }
        return {**outside, **{name: a for twin in self.twins for name, a in twin.statistics().items()}}

    def compared(self) -> list[Compared]:
        """The model after the swap compared with what it was before."""
        found = []
        for mode in self.modes:
            swapped = f"{', '.join(repr(twin.path) for twin in self.twins)} {'was' if len(self.twins) == 1 else 'were'} swapped"
            title = f"`model` before and after {swapped} ({_name(mode)})"
            try:
                with self._without_dropout():
                    after = ran(self.model, self.call, mode, lambda: dict(self.model.named_buffers()))
            except Exception as error:  # whatever a model raises
                raise UnsupportedError(
                    f"`model` does not run any more after {swapped}, and was left as it was ({_name(mode)}): {_said(error)}"
                ) from error
            ways = sum(twin.check_directions(self.before[mode].gradients, after.gradients, title) for twin in self.twins)
            found += [Compared(_name(mode), _ALONG, ways, None)] if ways else []
            before, near = self._ours(self.before[mode]), [self._ours(r) for r in self.near[mode]]
            left_out = {name for twin in self.twins for name in twin.unpaired()}
            after = after._replace(
                gradients={name: d for name, d in after.gradients.items() if name not in left_out},
                statistics={name: a for name, a in after.statistics.items() if name in before.statistics},
            )
            for what in ("values", "gradients", "statistics"):
                others = [getattr(r, what) for r in near]
                done = compare(_name(mode), what, getattr(before, what), getattr(after, what), others, self.unit, title)
                found += [done] if done is not None else []
        return found

    def _ours(self, before: Ran) -> Ran:
        """With gradients by the names that parameters have after the swap, without those of parameters that have no twin."""
        names = {theirs: ours for twin in self.twins for theirs, ours in twin.names().items()}
        return before._replace(gradients={new: d for name, d in before.gradients.items() if (new := names.get(name, name)) is not None})


def _name(training: bool) -> str:
    return "training step" if training else "evaluation"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
