"""What torch's exporter says where it refuses a model, as what to do about it."""

from __future__ import annotations

import os
import re
import traceback
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

_SEEN_ONCE = re.compile(r"0/1 specialized due to hint of (\d) for dimension inputs\['([^']*)'\](.*?)\.shape\[(\d+)\]")
_FIXED = re.compile(r"You marked L\['([^']*)'\](.*?)\.size\(\)\[(\d+)\] as dynamic but your code specialized it to be a constant \((\d+)\)")
_BRANCH = re.compile(r'File "([^"]+)", line (\d+), in \S+\n\s*(\S.*)')
_NAMED = re.compile(r"top-level keys must be the arg names \[(.*?)\] of `inputs`, but here they are \[(.*?)\]")
_OUTSIDE = re.compile(
    r"Not all values of (\w+) = L\['([^']*)'\](.*?)\.size\(\)\[(\d+)\] in the specified range ?(.*?) satisfy the generated guard (.*)"
)
_SIZE = re.compile(r"L\['[^']*'\]\S*?\.size\(\)\[\d+\]")
_UNBOUNDED = re.compile(r" and \S+ <= IntInfinity\(\)")
_SUGGESTED = re.compile(r"^\s*\w+ = (Dim\(.*\))$", re.MULTILINE)
_OPSETS = re.compile(r"Target opset version (\d+) is not supported\. Supported range: (\d+) to (\d+)")
_PACKS = re.compile(r"\bpack\w*\(|pad_packed_sequence")
_NOT_THEIRS = tuple(os.path.join(os.path.dirname(path), "") for path in (torch.__file__, __file__))
_PYTHON = os.path.join(os.path.dirname(os.__file__), "")
ADVICE = (
    "compute what is right at every length: y[:min(10, y.shape[0])] for y[:10], y[max(0, y.shape[0] - 10):] for y[-10:], a mask or "
    "torch.where for an `if`"
)
_NOT_OURS = (
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
    reason = _packed(error, model) or _in_numpy(error) or next((found for rule in _RULES if (found := rule(said, model))), None)
    if reason is not None:
        return f"torch does not export the model: {reason}"
    own = " ".join(line.strip() for line in said.splitlines() if line.strip() and not any(word in line for word in _NOT_OURS))
    return f"torch does not export the model: {own or type(error).__name__}{_loops(model)}"


# -- packed sequences ----------------------------------------------------------------------------------------------------------------------


def packing(stack: Iterable[traceback.FrameSummary]) -> str:
    """Why a packed sequence is in no graph, the line of the model where one is, and the way out."""
    where = next((f" at {f.filename}:{f.lineno}, `{f.line}`" for f in reversed(list(stack)) if is_of_model(f.filename)), "")
    return (
        f"it computes with a packed sequence{where}: how many sequences have each step is then a matter of numbers in Python, which a "
        "graph does not have; leave out pack_padded_sequence and pad_packed_sequence, and give a recurrent layer of portnorm the padded "
        "array and `lengths`, y, state = rnn(x, lengths=lengths), which computes the same; its `y` has all steps of `x`, and is 0 at the "
        "padding"
    )


def _packed(error: BaseException | None, model: torch.nn.Module) -> str | None:
    while error is not None:
        frames = list(traceback.walk_tb(error.__traceback__))
        stack = traceback.extract_tb(error.__traceback__)
        if any(_packs(frame, line.line or "") for (frame, _), line in zip(frames, stack, strict=True)):
            held = _of_torch(model)
            first = (
                f"; portnorm.replace_modules(model, {_table(held)}, args=...) first puts one in the place of {_names(held)}" if held else ""
            )
            return packing(stack) + first
        error = error.__cause__ or error.__context__
    return None


def _in_numpy(error: Exception) -> str | None:
    if "numpy() is not supported" not in str(error):
        return None
    stack = traceback.extract_tb(error.__traceback__)
    where = next((f" at {f.filename}:{f.lineno}, `{f.line}`" for f in reversed(stack) if is_of_model(f.filename)), "")
    return (
        f"it computes with NumPy{where}, which torch does not follow, so that it would be missing in a graph; use torch's functions there"
    )


def _packs(frame: types.FrameType, line: str) -> bool:
    """Whether this is torch's packing, or one of its recurrent layers on what was packed, or a line that packs."""
    name = frame.f_code.co_filename
    if name == torch.nn.modules.rnn.__file__:
        return frame.f_locals.get("batch_sizes") is not None
    return name == torch.nn.utils.rnn.__file__ or (is_of_model(name) and _PACKS.search(line) is not None)


def is_of_model(file: str) -> bool:
    """Whether this is code of a model's: not torch's, of this package, or Python's own, beside whose modules those of others may lie."""
    return not file.startswith(_NOT_THEIRS) and (not file.startswith(_PYTHON) or "-packages" in file)


# -- what the text says --------------------------------------------------------------------------------------------------------------------


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


def _outside(said: str, model: torch.nn.Module) -> str | None:
    """Where the user declared a range by `Dim`, and the traced program holds for less."""
    places = [
        f"axis {axis} of {_input(name, inside)} is declared as {declared or dim}, but the model decides by it: what was traced holds where "
        + _SIZE.sub(dim, _UNBOUNDED.sub("", guard)).rstrip(".")
        for dim, name, inside, axis, declared, guard in _OUTSIDE.findall(said)
    ]
    if not places:
        return None
    suggested = _SUGGESTED.findall(said)
    way = f"; or declare torch.export.{', torch.export.'.join(suggested)} for what it is" if suggested else ""
    return (
        f"{', '.join(places)}; {ADVICE}{way}; or give the axis a name in the place of a `Dim`: then the graph is tried at all lengths, at "
        "which it may well be right"
    )


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


def _opsets(said: str, model: torch.nn.Module) -> str | None:
    found = _OPSETS.search(said)
    return None if found is None else f"`opset` is {found[1]}, and torch writes whole models in {found[2]} to {found[3]}"


_RULES: tuple[Callable[[str, torch.nn.Module], str | None], ...] = (_seen_once, _fixed, _outside, _branches, _named, _opsets)


def _input(name: str, inside: str) -> str:
    return f"`{name}`{inside}"


def _loops(model: torch.nn.Module) -> str:
    """The modules of torch's that it writes out step by step, and who swaps them."""
    found = _of_torch(model)
    if not found:
        return ""
    swap = f"portnorm.replace_modules(model, {_table(found)}, args=...)"
    return f"; torch writes the steps of {_names(found)} out for one length: {swap} keeps it free"


def _of_torch(model: torch.nn.Module) -> dict[type[torch.nn.RNNBase], str]:
    """The classes of torch's recurrent modules inside, each with the path of one."""
    found: dict[Any, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.RNNBase):
            found.setdefault(type(module), path)
    return found


def _names(found: Mapping[type[torch.nn.RNNBase], str]) -> str:
    return ", ".join(f"torch.nn.{kind.__name__} {path!r}" for kind, path in found.items())


def _table(found: Mapping[type[torch.nn.RNNBase], str]) -> str:
    return "{" + ", ".join(f'torch.nn.{kind.__name__}: "torch"' for kind in found) + "}"
