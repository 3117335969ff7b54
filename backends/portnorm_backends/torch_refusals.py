"""What torch's exporter says where it refuses a model, as what to do about it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

_SEEN_ONCE = re.compile(r"0/1 specialized due to hint of (\d) for dimension inputs\['([^']*)'\](.*?)\.shape\[(\d+)\]")
_FIXED = re.compile(r"You marked L\['([^']*)'\](.*?)\.size\(\)\[(\d+)\] as dynamic but your code specialized it to be a constant \((\d+)\)")
_BRANCH = re.compile(r'File "([^"]+)", line (\d+), in \S+\n\s*(\S.*)')
_NAMED = re.compile(r"top-level keys must be the arg names \[(.*?)\] of `inputs`, but here they are \[(.*?)\]")
_ADVICE = (
    "TORCH_LOGS",
    "TORCHDYNAMO_",
    "draft_export",
    "docs.google.com",
    "pytorch.org",
    "mark_dynamic",
    "occurred when calling torch.export",
)


def explained(error: Exception, model: torch.nn.Module) -> str:
    """Which axis or line of the model torch cannot take, and the way out."""
    said = str(error)
    reason = next((found for rule in _RULES if (found := rule(said, model))), None)
    if reason is not None:
        return f"torch does not export the model: {reason}"
    own = " ".join(line.strip() for line in said.splitlines() if line.strip() and not any(word in line for word in _ADVICE))
    return f"torch does not export the model: {own or type(error).__name__}{_loops(model)}"


def _seen_once(said: str, model: torch.nn.Module) -> str | None:
    places = [f"axis {axis} of {_input(name, inside)} has length {n}" for n, name, inside, axis in _SEEN_ONCE.findall(said)]
    if not places:
        return None
    return f"{', '.join(places)} in the example, but is free by `dynamic_shapes`; give an example of 2 or more there"


def _fixed(said: str, model: torch.nn.Module) -> str | None:
    places = [f"axis {axis} of {_input(name, inside)} to {n}" for name, inside, axis, n in _FIXED.findall(said)]
    if not places:
        return None
    way = _loops(model) or (
        "; a Python loop over it, or a number made of it by int(), does that: compute with the axis as a whole, or with x.shape, and put a "
        "recurrent layer of portnorm (portnorm.torch_module) in place of a loop over time"
    )
    return f"the model fixes {', '.join(places)}, which `dynamic_shapes` says is free{way}; or leave the axis out of `dynamic_shapes`"


def _branches(said: str, model: torch.nn.Module) -> str | None:
    if "data-dependent" not in said:
        return None
    places = _BRANCH.findall(said)
    where = f" at {places[-1][0]}:{places[-1][1]}, `{places[-1][2].strip()}`" if places else ""
    return f"it asks for values{where}, which a graph does not have while it is made; torch.where chooses inside of one{_loops(model)}"


def _named(said: str, model: torch.nn.Module) -> str | None:
    found = _NAMED.search(said)
    if found is None:
        return None
    return f"`dynamic_shapes` names {found[2]}; expected every input, {found[1]}, with None for one whose lengths are all fixed"


_RULES: tuple[Callable[[str, torch.nn.Module], str | None], ...] = (_seen_once, _fixed, _branches, _named)


def _input(name: str, inside: str) -> str:
    return f"`{name}`{inside}"


def _loops(model: torch.nn.Module) -> str:
    """The modules of torch's that it writes out step by step, and who swaps them."""
    found: dict[Any, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.RNNBase):
            found.setdefault(type(module), path)
    if not found:
        return ""
    held = ", ".join(f"torch.nn.{kind.__name__} {path!r}" for kind, path in found.items())
    table = ", ".join(f'torch.nn.{kind.__name__}: "torch"' for kind in found)
    return f"; torch writes the steps of {held} out for one length: portnorm.replace_modules(model, {{{table}}}, args=...) keeps it free"
