"""What a live torch module says beside its weights: the ε, momentum, layout and functions that a state dict does not hold."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.nn.utils.parametrizations import _WeightNorm

from portnorm.arrays import to_numpy
from portnorm.checkpoint.stored import Held, Refusal, Said, Stored
from portnorm_backends.torch_attached import forward_hooks, parametrized

_EPS = ("eps", "epsilon", "variance_epsilon", "layer_norm_eps")
_LAYERS: dict[type[torch.nn.Module], str] = {
    torch.nn.modules.batchnorm._BatchNorm: "BatchNorm",
    torch.nn.modules.instancenorm._InstanceNorm: "InstanceNorm",
    torch.nn.GroupNorm: "GroupNorm",
    torch.nn.LayerNorm: "LayerNorm",
    torch.nn.RMSNorm: "RMSNorm",
    torch.nn.Linear: "Linear",
    torch.nn.Embedding: "Embedding",
    torch.nn.LSTM: "LSTM",
    torch.nn.GRU: "GRU",
    torch.nn.RNN: "RNN",
    torch.nn.LSTMCell: "LSTM",
    torch.nn.GRUCell: "GRU",
    torch.nn.RNNCell: "RNN",
}


def held(module: torch.nn.Module) -> Held:
    """The state dict of a module, and what the module that holds some of it says of them."""
    modules = dict(module.named_modules(remove_duplicate=False))
    of_class = {name: said_of(inner, name) for name, inner in modules.items() if _layer(inner) is not None}
    found = {}
    for key, tensor in module.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            found[key] = _stored(key, tensor, of_class.get(key.rpartition(".")[0]))
        else:
            found[key] = Stored.unreadable(key, f"`{key}` is {type(tensor).__name__}; expected a tensor{_PACKED}")
    return Held(found, said_of=lambda keys, prefix: _said_around(modules, keys, prefix))


_PACKED = ": modules that torch has quantized hold packed weights, and those before quantization are to be read"


def _stored(key: str, tensor: torch.Tensor, said: Said | None) -> Stored:
    if torch.nn.parameter.is_lazy(tensor):
        return Stored.unreadable(key, f"`{key}` is not there yet: a lazy module has its arrays after its first call", said)
    described = tuple(tensor.shape), str(tensor.dtype).rpartition(".")[2]
    return Stored(key, lambda: described, lambda: to_numpy(tensor.float() if described[1].startswith("float8") else tensor), said=said)


def _around(modules: dict[str, torch.nn.Module], keys: Iterable[str]) -> tuple[torch.nn.Module, str]:
    """The innermost module that all the keys are inside of."""
    shared = os.path.commonprefix([f"{key.rpartition('.')[0]}." for key in keys])  # noqa: RUF071  # by characters: the keys are no paths
    name = shared.rpartition(".")[0]
    while name not in modules:
        name = name.rpartition(".")[0]
    return modules[name], name


def _said_around(modules: dict[str, torch.nn.Module], keys: Iterable[str], prefix: str) -> Said:
    """The settings of the innermost module around the keys, and what computes beside it in what was asked for; a note of what is dropped
    there, or outside where nothing else is.
    """
    module, name = _around(modules, keys)
    said, count = said_of(module, name), len(module.state_dict())
    asked = prefix.removesuffix(".")
    while asked not in modules:
        asked = asked.rpartition(".")[0]
    for around, outer in _between(modules, asked, name):
        _beside(said, outer, modules[around], alone=len(modules[asked].state_dict()) == count, prefix=f"{name}.")
    while name and len(modules[name.rpartition(".")[0]].state_dict()) == count:
        name = name.rpartition(".")[0]
    said.notes += [f"{lost}, which is for training, is not read" for lost in dropped_inside(modules[name])]
    return said


def _between(modules: dict[str, torch.nn.Module], asked: str, name: str) -> Iterator[tuple[str, torch.nn.Module]]:
    """Modules around one, from the inside out to that which was asked for: the name of what is in it, and itself."""
    while name != asked and f"{name}.".startswith(f"{asked}." if asked else ""):
        inner, name = name, name.rpartition(".")[0]
        yield inner, modules[name]


_NOTHING = (torch.nn.Identity, torch.nn.modules.dropout._DropoutNd)
"""What computes nothing in evaluation."""


def _beside(said: Said, outer: torch.nn.Module, inner: torch.nn.Module, *, alone: bool, prefix: str) -> None:
    """What a module computes beside what is read of it. One that is known to is refused, unless the part was asked for."""
    kind = _kind(outer)
    for what in forward_hooks(outer) if alone else ():
        said.refused["hooks"] = Refusal(f"{what}, which may change what it computes")
    beside = [_kind(child).__name__ for child in outer.children() if child is not inner and not issubclass(_kind(child), _NOTHING)]
    if alone and beside and issubclass(kind, torch.nn.Sequential):
        why = f"{', '.join(beside)} beside it in the {kind.__name__}, which would be left out; prefix={prefix!r} names it alone"
        said.refused[beside[0]] = Refusal(why)
    elif beside or not kind.__module__.startswith("torch.") or issubclass(kind, torch.jit.ScriptModule):
        has = f" {', '.join(dict.fromkeys(beside))} and" if beside else ""
        said.notes.append(f"of the {_called(outer)} around it{has} what forward does beside are not read")


def _kind(module: torch.nn.Module) -> type[torch.nn.Module]:
    """The class of a module; of one that TorchScript has compiled that of torch, where it was made of one."""
    if isinstance(module, torch.jit.ScriptModule):
        where, _, name = re.sub(r"___torch_mangle_\d+\.", "", str(module._c._type().qualified_name())).rpartition(".")
        found = getattr(sys.modules.get(where.removeprefix("__torch__.")), name, None) if where.startswith("__torch__.torch.") else None
        if isinstance(found, type) and issubclass(found, torch.nn.Module):
            return found
    return type(module)


def _called(module: torch.nn.Module) -> str:
    """The name of a module's class."""
    return str(module.original_name) if isinstance(module, torch.jit.ScriptModule) else type(module).__name__


def _layer(module: torch.nn.Module) -> str | None:
    return next((name for kind, name in _LAYERS.items() if issubclass(_kind(module), kind)), None)


_COMPUTES = ("forward", "__call__", "_call_impl", "_wrapped_call_impl", "permute_hidden")
"""The methods of torch's modules that say what comes out of a call."""


def _own_method(module: torch.nn.Module) -> str | None:
    """The method that says what comes out of a call and is not torch's."""
    compiled = isinstance(module, torch.jit.ScriptModule)
    for name in _COMPUTES:
        where = next((kind.__module__ for kind in _kind(module).__mro__ if name in vars(kind)), "torch.nn.")
        if (name in vars(module) and not compiled) or not where.startswith("torch.nn."):
            return name
    return None


def said_of(module: torch.nn.Module, name: str) -> Said:
    """The settings of a module: torch's own by class, others by the norms inside them and by what they call their ε."""
    kind = _kind(module)
    said = Said(f"the module {name!r} of the class {_called(module)}" if name else f"the module of the class {_called(module)}")
    said.layer = _layer(module)
    own = _own_method(module) if said.layer is not None else None
    if own is not None:
        said.refused["forward"] = Refusal(f"a {own} of its own, which may compute something else than torch's class")
    if said.layer is None:
        _compiled(said, module)
    _attached(said, module, name)
    if issubclass(kind, torch.nn.RNN | torch.nn.RNNCell):
        _take(said, module, "nonlinearity", "activation")
    if issubclass(kind, torch.nn.RNNBase):
        _take(said, module, "batch_first")
        if "weight_ih_l1" in module.state_dict() and getattr(module, "dropout", True):
            _take(said, module, "dropout")
        return said
    if issubclass(kind, torch.nn.Embedding):
        _table(said, module)
    if issubclass(kind, torch.nn.GroupNorm):
        _take(said, module, "num_groups")
    if issubclass(kind, torch.nn.modules.batchnorm._NormBase):
        _tracking(said, module)
    if said.layer in _NORMS and not hasattr(module, "eps"):
        _take(said, module, "eps")
    inside = list(module.modules())
    _of_speechbrain(said, inside)
    for name, of in (("zoneout", float), ("batch_first", bool)):
        if said.layer is None and isinstance(getattr(module, name, None), of):
            said.values[name] = getattr(module, name)
    _only(
        said, "eps", [(m, getattr(m, n)) for m in inside for n in _EPS if isinstance(getattr(m, n, None), int | float) or _by_dtype(m, n)]
    )
    tracked = [m for m in inside if issubclass(_kind(m), torch.nn.modules.batchnorm._NormBase) and hasattr(m, "momentum")]
    _only(said, "momentum", [(m, m.momentum) for m in tracked if m.track_running_stats])
    if said.layer in _SIZES and not module.state_dict() and "track_running_stats" not in said.refused:
        sizes = {ours: _asked(said, module, theirs) for ours, theirs in _SIZES[said.layer].items()}
        said.alone = None if said.refused else {**sizes, **_but(said, "momentum"), "affine": False}
    return said


def _by_dtype(module: torch.nn.Module, name: str) -> bool:
    """Whether an ε is the one of the dtype."""
    return issubclass(_kind(module), torch.nn.RMSNorm) and getattr(module, name, 0.0) is None


def _asked(said: Said, module: torch.nn.Module, name: str, ours: str | None = None) -> Any:
    """A setting of a module, which is refused where a traced one has it no more."""
    if not hasattr(module, name):
        said.refused[name] = Refusal(f"no {name}, which torch.jit.trace does not keep; the module that was traced has it", (ours or name,))
    return getattr(module, name, None)


def _take(said: Said, module: torch.nn.Module, name: str, ours: str | None = None) -> None:
    value = _asked(said, module, name, ours)
    if name not in said.refused:
        said.values[ours or name] = value


_EAGER = "give the module that it was made of, or its state_dict() with the settings as arguments"


def _compiled(said: Said, module: torch.nn.Module) -> None:
    """What is no class with settings of its own, but what a compiler of torch has made of one."""
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        said.refused["torchscript"] = Refusal(f"a form that TorchScript has compiled, of which the settings are not read; {_EAGER}")
    elif kind is torch.nn.Module or any(base.__module__.startswith(("torch.fx.", "torch.export.")) for base in kind.__mro__):
        said.refused["graph"] = Refusal(f"no settings: they are in the graph that torch.export or torch.fx made; {_EAGER}")


_ACTIVATIONS: dict[type, str] = {torch.nn.ReLU: "relu", torch.nn.Tanh: "tanh"}


def _of_speechbrain(said: Said, inside: list[torch.nn.Module]) -> None:
    """What layers of its LiGRU say; those of its SLiGRU have the same arrays and normalize the hidden term too."""
    if any(_called(m) == "SLiGRU_Layer" for m in inside):
        said.refused["class"] = Refusal("layers of SLiGRU, which is another cell than LiGRU: it normalizes the hidden term too")
    layers = [m for m in inside if _called(m) == "LiGRU_Layer"]
    for m in layers:
        if _kind(m.act) not in _ACTIVATIONS:
            shown = getattr(m.act, "__name__", type(m.act).__name__)
            said.refused["nonlinearity"] = Refusal(f"the nonlinearity {shown}; expected ReLU or Tanh", ("activation",))
            return
    _only(said, "activation", [(m, _ACTIVATIONS[_kind(m.act)]) for m in layers])
    _only(said, "bidirectional", [(m, m.bidirectional) for m in layers])


def _attached(said: Said, module: torch.nn.Module, name: str) -> None:
    """What computes arrays of the module, or changes what it takes and gives: of arrays the formats read weight norm and pruning alone."""
    for _, array, by, remove in parametrized(name, module):
        if not remove.endswith(_READ) and by != _WeightNorm.__name__:
            why = f"{array!r} computed by {by}; {remove}(module, {array!r}) leaves the array itself"
            said.refused["parametrizations"] = Refusal(why)
    for what in forward_hooks(module):
        said.refused["hooks"] = Refusal(f"{what}, which may change what it computes")


_READ = (".remove_weight_norm", ".prune.remove")


_NORMS = ("BatchNorm", "InstanceNorm", "GroupNorm", "LayerNorm", "RMSNorm")
_SIZES = {
    "LayerNorm": {"normalized_shape": "normalized_shape"},
    "RMSNorm": {"normalized_shape": "normalized_shape", "eps": "eps"},
    "GroupNorm": {"num_features": "num_channels"},
    "InstanceNorm": {"num_features": "num_features"},
}
"""What gives a norm its size, and its ε where that may be `None`, by our names: asked of modules that have no arrays."""


def _table(said: Said, module: torch.nn.Module) -> None:
    """What torch does to the rows of an embedding in training, or to some of them, and a layer here does not."""
    if not hasattr(module, "padding_idx"):
        why = "no padding_idx, max_norm and the like, which torch.jit.trace does not keep; the module that was traced has them"
        said.refused["padding_idx"] = Refusal(why)
        return
    rows = {"padding_idx": "whose row it does not train", "max_norm": "to which it shortens the rows that are read"}
    for name, what in rows.items():
        if getattr(module, name) is not None:
            said.refused[name] = Refusal(f"{name}={getattr(module, name)}, {what}")
    for name, what in {"scale_grad_by_freq": "gradients by how often a row is read", "sparse": "gradients as sparse arrays"}.items():
        if getattr(module, name):
            said.refused[name] = Refusal(f"{name}=True, {what}")


def _but(said: Said, name: str) -> dict[str, Any]:
    return {n: value for n, value in said.values.items() if n != name}


def _tracking(said: Said, module: torch.nn.Module) -> None:
    """Whose statistics normalize, which `track_running_stats` says together with whether there are running ones."""
    if issubclass(_kind(module), torch.nn.SyncBatchNorm):
        said.refused["process_group"] = Refusal(
            "in training the statistics of all processes together, where BatchNorm here takes those of its own batch; for several "
            "processes swap it by a function that gives portnorm.import_checkpoint(module, 'torch', ignore=('process_group',)) with "
            "`reduce`, an attribute, set to what sums over them"
        )
    has = getattr(module, "running_mean", None) is not None
    tracks = getattr(module, "track_running_stats", has)
    if has and not hasattr(module, "momentum"):
        _take(said, module, "momentum")
    if issubclass(_kind(module), torch.nn.modules.batchnorm._BatchNorm) and not has:
        why = f"track_running_stats={tracks} and no running statistics: it takes those of the batch in evaluation too"
        said.refused["track_running_stats"] = Refusal(f"{why}, where {said.layer} here has its running ones; leave the module as it is")
    elif has and getattr(module, "momentum", 0.0) is None and said.layer == "InstanceNorm":
        said.refused["momentum"] = Refusal(
            "momentum=None, with which torch's InstanceNorm keeps its running statistics for ever", ("momentum",)
        )
    elif has != tracks:
        why = f"track_running_stats={tracks}, but {'has' if has else 'no'} running statistics"
        said.refused["track_running_stats"] = Refusal(f"{why}, so that training and evaluation differ from those of {said.layer} here")


def dropped_inside(module: torch.nn.Module) -> list[str]:
    """What a module drops in training and a layer in its place does not, in words: dropout that torch's recurrent layers do not do."""
    found = []
    for inner in module.modules():
        kind = _kind(inner)
        rate = getattr(inner, "p" if issubclass(kind, torch.nn.modules.dropout._DropoutNd) else "dropout", None)
        if isinstance(rate, int | float) and rate > 0 and not issubclass(kind, torch.nn.RNNBase):
            found.append(f"dropout={rate:g} of {_called(inner)}")
    return found


def _only(said: Said, name: str, found: list[tuple[torch.nn.Module, Any]]) -> None:
    """What all modules inside have alike."""
    values = {value for _, value in found}
    if len(values) == 1:
        said.values[name] = values.pop()
    elif values:
        shown = ", ".join(f"{value} in {type(module).__name__}" for module, value in found[:4])
        said.refused[name] = Refusal(f"modules whose {name} differ: {shown}", (name,))
