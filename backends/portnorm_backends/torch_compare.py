"""A torch model run twice: what came out of it, its gradients and statistics, and how far rounding alone moves them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy
import torch
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from portnorm.arrays import Array
from portnorm.conform.tolerances import STEP_ULP, TRAJECTORY_FACTOR
from portnorm.errors import ConformanceError, UnsupportedError

Arrays = dict[str, Array]
Again = Callable[[torch.dtype], tuple[Arrays, Arrays] | None]
"""The same two runs in another dtype, where they can be had."""
SEEDS = (1, 2, 3)
"""Runs from parameters and inputs that are moved by one unit in the last place: how far they go is what rounding does to a model."""
_CAP = 0.1
"""Never more than this part of the largest value: where rounding moves more, as it does a variable that is constant but for rounding, it
would hide what is wrong, and runs in another dtype say whether something is."""
_SHRINKS = 2.0**-20
"""A difference that is rounding is so much smaller in float64 than in float32, or more: the unit is 2⁻²⁹ of it. A fault stays as large."""
_SMALL = 0.05
"""Sums that cancel, such as the gradient of a bias before a normalization, are as exact as their terms, taken to be this part of all."""
_WEIGHTS = 0x6E6F726D
"""The seed of the weights of the results: with one that people take too, inputs drawn from it equal the weights, and the gradient of a
normalization at its own input is 0."""
_RECORDS = (SimpleNamespace, torch.distributions.Distribution)
"""Results whose attributes are looked at, besides dataclasses."""
_EPS = ("eps", "epsilon", "variance_epsilon", "layer_norm_eps")


class Call(NamedTuple):
    """What a model or a module is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, args: Any, kwargs: Mapping[str, Any] | None) -> Call:
        """`args` is the tuple of arguments by place, or the only one; a packed sequence is one."""
        several = isinstance(args, tuple) and not hasattr(args, "_fields")
        return cls(() if args is None else args if several else (args,), dict(kwargs or {}))

    def fresh(self, change: Callable[[Array], Array] = torch.Tensor.clone) -> Call:
        """The same with tensors of its own, floating ones changed."""
        return Call(*changed(lambda a: change(a.detach()) if a.is_floating_point() else a.clone(), tuple(self)))


class Ran(NamedTuple):
    """What a run leaves behind, by name."""

    values: Arrays
    gradients: Arrays
    statistics: Arrays
    terms: dict[str, float]
    """How large the terms of the gradient of an input are, which a normalization of two values, for example, all but cancels."""


class Compared(NamedTuple):
    """What of two runs was compared."""

    mode: str
    what: str
    arrays: int
    difference: float | None
    """The largest one, as a part of what rounding allows there; `None` of what is compared along random directions."""

    def __str__(self) -> str:
        apart = "" if self.difference is None else f", at most {self.difference:.2g} of what rounding allows apart"
        return f"{self.mode}: {self.arrays} {self.what} agree{apart}"


def _is_packed(value: Any) -> bool:
    return isinstance(value, PackedSequence)


def changed(change: Callable[[Array], Array], tree: Any) -> Any:
    """`tree` with every tensor changed; of packed sequences the data."""

    def leaf(a: Any) -> Any:
        if isinstance(a, PackedSequence):
            return PackedSequence(change(a.data), a.batch_sizes, a.sorted_indices, a.unsorted_indices)
        return change(a) if isinstance(a, torch.Tensor) else a

    return pytree.tree_map(leaf, tree, is_leaf=_is_packed)


def arrays_in(tree: Any, name: str) -> Arrays:
    """The arrays and numbers of nested results, by where they are."""
    found: Arrays = {}
    for path, leaf in pytree.tree_flatten_with_path(tree, is_leaf=_is_packed)[0]:
        place = name + pytree.keystr(path)
        if isinstance(leaf, PackedSequence):
            found[f"{place}.data"], found[f"{place}.batch_sizes"] = leaf.data, leaf.batch_sizes
            if leaf.sorted_indices is not None:
                found[f"{place}.sorted_indices"] = leaf.sorted_indices
        elif isinstance(leaf, torch.Tensor | bool | int | float | numpy.ndarray | numpy.number):
            found[place] = torch.as_tensor(leaf)
        elif (dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)) or isinstance(leaf, _RECORDS):
            found |= arrays_in(vars(leaf), place)
    return found


# -- one run -------------------------------------------------------------------------------------------------------------------------------


def ran(model: torch.nn.Module, call: Call, training: bool, statistics: Callable[[], Arrays]) -> Ran:
    """A run in evaluation, or one training step: the gradients of a sum with random weights. `model` and the arguments stay as they are.

    A model that is in training already is run with its parts in the modes that they have.
    """
    with as_it_was(model), same_chance(model), torch.set_grad_enabled(training):
        if not training:
            model.eval()
        elif not model.training:
            model.train()
        _let_go(model)
        own = call.fresh(lambda a: a.clone().requires_grad_(training))
        given = changed(lambda a: a.clone() if a.requires_grad else a, tuple(own))
        values = arrays_in(model(*given[0], **given[1]), "result")
        gradients: Arrays = {}
        terms: dict[str, float] = {}
        if training:
            inputs = {**arrays_in(own.args, "args"), **arrays_in(own.kwargs, "kwargs")}
            gradients, largest = _gradients(values, {**dict(model.named_parameters()), **inputs})
            reach = largest * max((_spread(a) for a in values.values() if a.requires_grad), default=0.0)
            terms = {name: reach / spread for name, a in inputs.items() if name in gradients and (spread := _spread(a))}
        kept = {name: a.detach().clone() for name, a in statistics().items()} if training else {}
        return Ran({name: a.detach().clone() for name, a in values.items()}, gradients, kept, terms)


def _let_go(model: torch.nn.Module) -> None:
    """Part what the modules keep of an earlier call, such as a state, from the graph of that call, which may be gone."""
    for module in model.modules():
        for name, value in vars(module).items():
            if any(isinstance(a, torch.Tensor) and a.grad_fn is not None for a in _tensors(value)):
                vars(module)[name] = pytree.tree_map(lambda a: a.detach() if isinstance(a, torch.Tensor) else a, value)


def _tensors(value: Any) -> list[Any]:
    return pytree.tree_leaves(value) if isinstance(value, dict | list | tuple | torch.Tensor) else []


def _gradients(values: Arrays, of: Arrays) -> tuple[Arrays, float]:
    """Those of a sum of all floating results with random weights, and the largest of these."""
    wanted = {name: a for name, a in of.items() if a.requires_grad}
    generator = torch.Generator().manual_seed(_WEIGHTS)
    outputs = [a for a in values.values() if a.requires_grad]
    if not outputs or not wanted:
        return {}, 0.0
    weights = [torch.randn(a.shape, generator=generator).to(device=a.device, dtype=a.dtype) for a in outputs]
    found = torch.autograd.grad(outputs, list(wanted.values()), weights, allow_unused=True)
    gradients = {name: torch.zeros_like(a) if d is None else d.detach() for (name, a), d in zip(wanted.items(), found, strict=True)}
    return gradients, max(map(_largest, weights))


@contextlib.contextmanager
def as_it_was(model: torch.nn.Module) -> Iterator[None]:
    """Afterwards every module of the model has the attributes, parameters, buffers and modes that it had before."""
    tensors: dict[int, tuple[Array, Array]] = {}

    def held(value: Any) -> Any:
        for a in _tensors(value):
            if isinstance(a, torch.Tensor) and id(a) not in tensors:
                tensors[id(a)] = a, a.detach().clone()
        return copy.copy(value) if isinstance(value, dict | list | set | deque) else value

    before = [(module, {name: (value, held(value)) for name, value in vars(module).items()}) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            own = vars(module)
            for name in [name for name in own if name not in attributes]:
                del own[name]
            for name, (value, content) in attributes.items():
                own[name] = value
                if content is not value:
                    _refill(value, content)
        for a, content in tensors.values():
            if not torch.equal(a, content):
                a.data.copy_(content)  # which a graph of an earlier call does not see


def _refill(value: Any, content: Any) -> None:
    """Put into a container what it had."""
    value.clear()
    (value.extend if isinstance(value, list | deque) else value.update)(content)


@contextlib.contextmanager
def same_chance(model: torch.nn.Module) -> Iterator[None]:
    """The same random numbers in every run, of torch, NumPy and Python; afterwards those that would have come."""
    devices = sorted({a.device.index or 0 for a in model.parameters() if a.device.type == "cuda"})
    python, of_numpy = random.getstate(), numpy.random.get_state()  # the generator that models use
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            random.seed(0)
            numpy.random.seed(0)
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(of_numpy)


# -- what rounding does --------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def nudged(model: torch.nn.Module, seed: int) -> Iterator[Callable[[Array], Array]]:
    """The model with every parameter and statistic moved by at most one unit in the last place, and every ε by one of float32, to which
    portnorm rounds it; gives what moves inputs so.
    """
    generator = torch.Generator().manual_seed(seed)

    def near(a: Array) -> Array:
        moves = torch.randint(-1, 2, a.shape, generator=generator).to(device=a.device, dtype=a.dtype)
        return a * (1 + torch.finfo(a.dtype).eps * moves)

    with as_it_was(model):
        for a in (*model.parameters(), *model.buffers()):
            if a.is_floating_point():
                a.data.copy_(near(a.data))
        for module in model.modules():
            for name in _EPS:
                if isinstance(vars(module).get(name), float):
                    vars(module)[name] *= 1 + (seed - 2) * float(torch.finfo(torch.float32).eps)
        yield near


def unit(model: torch.nn.Module) -> float:
    """The relative distance of numbers of the widest kind that the model computes with: of the narrowest floating dtype inside."""
    return max((torch.finfo(a.dtype).eps for a in (*model.parameters(), *model.buffers()) if a.is_floating_point()), default=0.0)


def compare(
    mode: str,
    what: str,
    before: Arrays,
    after: Arrays,
    near: Sequence[Arrays],
    least: float,
    title: str,
    terms: Mapping[str, float] | None = None,
    again: Again | None = None,
) -> Compared | None:
    """Raise `ConformanceError` where two runs differ by more than rounding explains; `title` says of what the runs are.

    Rounding allows `TRAJECTORY_FACTOR` times what the runs `near` differ by, and `STEP_ULP` units of the largest value. `terms` says how
    large the terms of gradients are that may cancel. Where rounding moves more than a small part of a result, runs `again` in float64, or
    in float32, have to differ by as much less, or more.
    """
    if before.keys() != after.keys():
        lacking, new = [n for n in before if n not in after], [n for n in after if n not in before]
        raise ConformanceError(f"{title}: the {what} {lacking or 'none'} are missing, {new or 'none'} are new")
    top, most = max((_largest(a) for a in before.values()), default=0.0), 0.0
    for name, a in before.items():
        b = after[name]
        if a.shape != b.shape:
            raise ConformanceError(f"{title}: {name} has the shape {tuple(b.shape)}, which was {tuple(a.shape)}")
        eps = max([least, *(torch.finfo(v.dtype).eps for v in (a, b) if v.is_floating_point())]) if a.is_floating_point() else 0.0
        largest = max(_largest(a), _SMALL * max(top, (terms or {}).get(name, 0.0)) if what == "gradients" else 0.0)
        least_allowed = STEP_ULP * eps * largest
        moved = max((_distance(a, other[name]) for other in near if other[name].shape == a.shape), default=0.0)
        explained = TRAJECTORY_FACTOR * moved + least_allowed
        allowed = max(least_allowed, min(explained, _CAP * largest))
        difference = _distance(a, b)
        if allowed < difference <= explained and again is not None and _is_rounding(name, again, difference, explained, eps):
            allowed = explained
        if not difference <= allowed:
            raise ConformanceError(f"{title} differ by {difference:.3g} in {name}; rounding allows {allowed:.3g}")
        most = max(most, difference / allowed if allowed else 0.0)
    return Compared(mode, what, len(before), most) if before else None


def _is_rounding(name: str, again: Again, difference: float, explained: float, eps: float) -> bool:
    """Whether a difference in float64 is as much smaller than that in float32 as rounding makes it."""
    fine = eps < torch.finfo(torch.float32).eps
    others = again(torch.float32 if fine else torch.float64)
    if others is None:
        return False
    apart = _distance(others[0][name], others[1][name])
    return difference <= _SHRINKS * apart if fine else apart <= _SHRINKS * explained


def copied_to(dtype: torch.dtype, modules: Any) -> Any:
    """Copies of the modules in a tuple or list, which know one another as these do; `None` where one cannot be copied."""
    try:
        copies = copy.deepcopy(modules)
    except (RuntimeError, TypeError):  # what a module keeps of a graph, or a handle of the system
        return None
    for module in pytree.tree_leaves(copies):
        module.to(dtype)
    return copies


def _wide(a: Array) -> Array:
    return a.detach().to(torch.complex128 if a.is_complex() else torch.float64)


def _largest(a: Array) -> float:
    finite = _wide(a).abs()
    finite = finite[torch.isfinite(finite)]
    return float(finite.max()) if finite.numel() else 0.0


def _spread(a: Array) -> float:
    """From the smallest to the largest value."""
    finite = _wide(a).abs() if a.is_complex() else _wide(a)
    finite = finite[torch.isfinite(finite)]
    return float(finite.max() - finite.min()) if finite.numel() else 0.0


def _distance(a: Array, b: Array) -> float:
    """The largest difference; of what is not finite 0 where both are the same."""
    a, b = _wide(a), _wide(b).to(a.device)
    apart = torch.where((a == b) | (torch.isnan(a) & torch.isnan(b)), 0.0, (a - b).abs())
    return float(torch.nan_to_num(apart, nan=torch.inf).max()) if apart.numel() else 0.0


def steady(mode: str, first: Ran, again: Ran, least: float) -> None:
    """Raise `UnsupportedError` where a model gives something else each time, so that nothing can be compared with it."""
    try:
        for what in ("values", "gradients", "statistics"):
            compare(mode, what, getattr(first, what), getattr(again, what), (), least, "two runs")
    except ConformanceError as error:
        raise UnsupportedError(
            f"`model` gives something else each time that it is run on `args` ({mode}): {error}. It has to draw its random numbers from "
            "the generators of torch, NumPy or Python, whose seeds are set, to be compared"
        ) from error
