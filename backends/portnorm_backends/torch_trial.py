"""The model around modules that are swapped: how it runs before, and whether it runs so after."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from portnorm.errors import UnsupportedError
from portnorm_backends.torch_alone import Recorded
from portnorm_backends.torch_compare import (
    SEEDS,
    Arrays,
    Call,
    Compared,
    Ran,
    arrays_in,
    changed,
    compare,
    copied_to,
    nudged,
    ran,
    steady,
    unit,
)
from portnorm_backends.torch_module import RecurrentModule
from portnorm_backends.torch_twin import Twin

ALONG = "gradients along random directions"


class Trial:
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
                with self._without_dropout(), self._counted(mode):
                    after = ran(self.model, self.call, mode, lambda: dict(self.model.named_buffers()))
            except Exception as error:  # whatever a model raises
                raise UnsupportedError(
                    f"`model` does not run any more after {swapped}, and was left as it was ({_name(mode)}): {_said(error)}"
                ) from error
            ways = sum(twin.check_directions(self.before[mode].gradients, after.gradients, title) for twin in self.twins)
            found += [Compared(_name(mode), ALONG, ways, None)] if ways else []
            before, near = self._ours(self.before[mode]), [self._ours(r) for r in self.near[mode]]
            left_out = {name for twin in self.twins for name in twin.unpaired()}
            after = after._replace(
                gradients={name: d for name, d in after.gradients.items() if name not in left_out},
                statistics={name: a for name, a in after.statistics.items() if name in before.statistics},
            )
            runs = functools.cache(functools.partial(self._again, mode))
            for what in ("values", "gradients", "statistics"):
                sides, others = (getattr(before, what), getattr(after, what)), [getattr(r, what) for r in near]
                again = functools.partial(_part, runs, what) if what != "statistics" else None
                done = compare(_name(mode), what, *sides, others, self.unit, title, before.terms, again)
                found += [done] if done is not None else []
        return found

    @contextlib.contextmanager
    def _counted(self, mode: bool) -> Iterator[None]:
        """Raises `UnsupportedError` where what stands for a module is not called in evaluation as often as that was."""
        count = dict.fromkeys([id(twin.made) for twin in self.twins], 0)

        def hook(made: torch.nn.Module, *_: Any) -> None:
            count[id(made)] += 1

        handles = [] if mode else [twin.made.register_forward_hook(hook) for twin in self.twins]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        for twin in self.twins if not mode else ():
            before, after = len(self.calls[id(twin.module)]), count[id(twin.made)]
            if before != after:
                raise UnsupportedError(
                    f"{twin.title} is called {before} times before the swap and {after} times after it: the model reaches the module in "
                    "another way than by its name, such as a function or a list that holds it; reach it by its name, or leave it out"
                )

    def _again(self, mode: bool, dtype: torch.dtype) -> tuple[Ran, Ran] | None:
        """Before and after the swap in another dtype, without statistics; `None` where the model does not run so."""
        with self._without_dropout():
            copies = copied_to(dtype, (self.model, [(twin.module, twin.made) for twin in self.twins]))
        if copies is None:
            return None
        model, pairs = copies
        call = self.call.fresh(lambda a: a.to(dtype))
        try:
            after = ran(model, call, mode, dict)
            for inner in model.modules():
                for module, made in pairs:
                    inner._modules |= {name: module for name, child in inner._modules.items() if child is made}
            return self._ours(ran(model, call, mode, dict)), after
        except Exception:  # whatever a model raises that has arrays of its own in one dtype
            return None

    def _ours(self, before: Ran) -> Ran:
        """With gradients by the names that parameters have after the swap, without those of parameters that have no twin."""
        names = {theirs: ours for twin in self.twins for theirs, ours in twin.names().items()}
        return before._replace(gradients={new: d for name, d in before.gradients.items() if (new := names.get(name, name)) is not None})


def _part(runs: Callable[[torch.dtype], tuple[Ran, Ran] | None], what: str, dtype: torch.dtype) -> tuple[Arrays, Arrays] | None:
    found = runs(dtype)
    return None if found is None else (getattr(found[0], what), getattr(found[1], what))


def _name(training: bool) -> str:
    return "training step" if training else "evaluation"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
