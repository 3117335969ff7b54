"""What is attached to a module of torch and would not be on what stands in its place: hooks, parametrizations of its parameters, and what
holds the module beside its name in the model."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.nn.utils import parametrize

from portnorm.errors import UnsupportedError

_HOOKS = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward pre-hook",
    "_backward_hooks": "a backward hook",
    "_state_dict_pre_hooks": "a state-dict pre-hook",
    "_state_dict_hooks": "a state-dict hook",
    "_load_state_dict_pre_hooks": "a pre-hook of load_state_dict",
    "_load_state_dict_post_hooks": "a hook of load_state_dict",
}
_HOOKS_OF_TENSORS = {"_backward_hooks": "a gradient hook", "_post_accumulate_grad_hooks": "a post-accumulate-grad hook"}
_OF_TORCH = "torch.nn.utils."
"""Where the hooks of torch's own are that compute a parameter, or store what it is computed from."""
_REMOVED_BY = {
    "WeightNorm": "torch.nn.utils.remove_weight_norm",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm",
    "BasePruningMethod": "torch.nn.utils.prune.remove",
}
"""What takes those off that compute one, by their class."""


def check_hooks(path: str, module: torch.nn.Module) -> None:
    """Raise `UnsupportedError` where the module, or one inside it, has a hook that its replacement would not have."""
    for inner_path, inner in module.named_modules(prefix=path):
        found = [(what, hook) for name, what in _HOOKS.items() for hook in vars(inner).get(name, {}).values()]
        of = {id(hook): inner_path for _, hook in found}
        for name, p in inner._parameters.items():
            for attribute, what in _HOOKS_OF_TENSORS.items() if p is not None else ():
                added = [(what, hook) for hook in (getattr(p, attribute) or {}).values()]
                of |= {id(hook): f"{inner_path}.{name}" for _, hook in added}
                found += added
        for what, hook in found:
            if not _is_of_torch(hook):
                raise UnsupportedError(
                    f"{of[id(hook)]!r} has {what}, {_name(hook)}, which the layer in the place of {path!r} would not have; remove it "
                    "before the swap (the `remove()` of its handle), and register it on the replacement afterwards where it is still wanted"
                )


def forward_hooks(module: torch.nn.Module) -> list[str]:
    """Those of a module, or of one inside it, that are not torch's own, in words."""
    return [
        f"{_HOOKS[name]}, {_name(hook)}, of {type(inner).__name__}"
        for inner in module.modules()
        for name in ("_forward_pre_hooks", "_forward_hooks")
        for hook in vars(inner).get(name, {}).values()
        if not _is_of_torch(hook)
    ]


def check_parametrized(path: str, module: torch.nn.Module) -> None:
    """Raise `UnsupportedError` where a parameter is computed from others, which would be trained in place of these."""
    for inner_path, name, by, remove in parametrized(path, module):
        raise UnsupportedError(
            f"{inner_path!r} has {name!r} computed by {by}, and the layer in the place of {path!r} would train {name!r} itself; make it a "
            f"plain parameter before the swap, {remove}(module, {name!r}), or leave the module out"
        )


def parametrized(path: str, module: torch.nn.Module) -> Iterator[tuple[str, str, str, str]]:
    """(path of the module, parameter, what computes it, what makes it plain)."""
    for inner_path, inner in module.named_modules(prefix=path, remove_duplicate=False):
        if parametrize.is_parametrized(inner):
            for name, by in inner.parametrizations.items():
                yield inner_path, name, " and ".join(type(p).__name__ for p in by), "torch.nn.utils.parametrize.remove_parametrizations"
        for hook in inner._forward_pre_hooks.values():
            kind = _computes_a_parameter(hook)
            if kind is not None:
                yield inner_path, getattr(hook, "name", getattr(hook, "_tensor_name", "")), type(hook).__name__, _REMOVED_BY[kind]


_OWN = {"_modules", "_parameters", "_buffers"}
"""What a module says by the names of its modules, parameters and buffers."""
_DEPTH = 4
"""So many containers and functions inside one another are looked into."""


def check_held(model: torch.nn.Module, swapped: Mapping[str, torch.nn.Module]) -> None:
    """Raise `UnsupportedError` where the model goes on with a module after the swap: what `torch.compile`, a list or a function holds."""
    inside = {id(m) for module in swapped.values() for m in module.modules()}
    known = {id(module): path for path, module in swapped.items()}
    known |= {id(p): f"{path}.{name}" for path, module in swapped.items() for name, p in module.named_parameters()}
    for path, holder in model.named_modules():
        if id(holder) in inside:
            continue
        wrapped = dict(holder.named_children()).get("_orig_mod")
        if wrapped is not None and id(wrapped) in known:
            raise UnsupportedError(
                f"{path!r} was made by torch.compile and goes on with the module that it was made of; swap it by the name {path!r}, or "
                "before it is compiled"
            )
        for name, value in vars(holder).items():
            found = next(_held(value, known, _DEPTH), None) if name not in _OWN else None
            if found is not None:
                where = f"{path!r} ({type(holder).__name__})" if path else f"the {type(holder).__name__}"
                raise UnsupportedError(
                    f"`{name}` of {where} holds {found!r} and would go on with it after the swap; swap before that is set, or take it away "
                    "and set it anew afterwards"
                )


def _held(value: Any, known: Mapping[int, str], depth: int) -> Iterator[str]:
    """The names of what is known in containers, optimizers and bound methods, and of what functions have from around them or by default."""
    if id(value) in known:
        yield known[id(value)]
    inner: Any = ()
    if isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        inner = value
    elif isinstance(value, types.MethodType):
        inner = (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        inner = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.FunctionType):
        around = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
        inner = (*around, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    elif isinstance(value, torch.optim.Optimizer):
        inner = [p for group in value.param_groups for p in group["params"]]
    for item in inner if depth else ():
        yield from _held(item, known, depth - 1)


def hooks_of_all() -> str:
    """A hint where a hook that was registered for all modules may change what one gives."""
    module = torch.nn.modules.module
    found = [_name(hook) for group in (module._global_forward_pre_hooks, module._global_forward_hooks) for hook in group.values()]
    return f". {', '.join(found)} is a hook of all modules (torch.nn.modules.module), which may tell them apart" if found else ""


def _computes_a_parameter(hook: Any) -> str | None:
    """The class of torch's that this hook is of, where it is one of those that compute a parameter."""
    kinds = [kind.__name__ for kind in type(hook).__mro__ if kind.__module__.startswith(_OF_TORCH)]
    return next((kind for kind in kinds if kind in _REMOVED_BY), None)


def _is_of_torch(hook: Any) -> bool:
    """Whether it belongs to a parameter that torch computes."""
    hook = getattr(hook, "hook", hook)
    return str(getattr(hook, "__module__", "")).startswith(_OF_TORCH)


def _name(hook: Any) -> str:
    """As whoever registered it calls it; torch wraps some."""
    hook = getattr(hook, "hook", hook)
    return f"`{getattr(hook, '__qualname__', type(hook).__name__)}`"
