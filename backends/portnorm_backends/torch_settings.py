"""What a live torch module says beside its weights: the ε, momentum, layout and functions that a state dict does not hold."""

from __future__ import annotations

import os
from collections.abc import Iterable
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
    modules = dict(module.named_modules())
    of_class = {name: said_of(inner, name) for name, inner in modules.items() if _layer(inner) is not None}
    found = {}
    for key, tensor in module.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            found[key] = _stored(key, tensor, of_class.get(key.rpartition(".")[0]))
        else:
            found[key] = Stored.unreadable(key, f"`{key}` is {type(tensor).__name__}; expected a tensor{_PACKED}")
    return Held(found, said_of=lambda keys: _said_around(modules, keys))


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


def _said_around(modules: dict[str, torch.nn.Module], keys: Iterable[str]) -> Said:
    """The settings of the innermost module around the keys, and a note of what is dropped there, or outside where nothing else is."""
    module, name = _around(modules, keys)
    said, count = said_of(module, name), len(module.state_dict())
    while name and len(modules[name.rpartition(".")[0]].state_dict()) == count:
        name = name.rpartition(".")[0]
    said.notes += [f"{lost}, which is for training, is not read" for lost in dropped_inside(modules[name])]
    return said


def _layer(module: torch.nn.Module) -> str | None:
    return next((name for kind, name in _LAYERS.items() if isinstance(module, kind)), None)


_COMPUTES = ("forward", "__call__", "_call_impl", "_wrapped_call_impl", "permute_hidden")
"""The methods of torch's modules that say what comes out of a call."""


def _own_method(module: torch.nn.Module) -> str | None:
    """The method that says what comes out of a call and is not torch's."""
    for name in _COMPUTES:
        where = next((kind.__module__ for kind in type(module).__mro__ if name in vars(kind)), "torch.")
        if name in vars(module) or not where.startswith("torch."):
            return name
    return None


def said_of(module: torch.nn.Module, name: str) -> Said:
    """The settings of a module: torch's own by class, others by the norms inside them and by what they call their ε."""
    kind = type(module).__name__
    said = Said(f"the module {name!r} of the class {kind}" if name else f"the module of the class {kind}", layer=_layer(module))
    own = _own_method(module) if said.layer is not None else None
    if own is not None:
        said.refused["forward"] = Refusal(f"a {own} of its own, which may compute something else than torch's class")
    _attached(said, module, name)
    if isinstance(module, torch.nn.RNN | torch.nn.RNNCell):
        said.values["activation"] = module.nonlinearity
    if isinstance(module, torch.nn.RNNBase):
        said.values["batch_first"] = module.batch_first
        if module.dropout and module.num_layers > 1:
            said.values["dropout"] = module.dropout
        return said
    if isinstance(module, torch.nn.Embedding):
        _table(said, module)
    if isinstance(module, torch.nn.GroupNorm):
        said.values["num_groups"] = module.num_groups
    if isinstance(module, torch.nn.modules.batchnorm._NormBase):
        _tracking(said, module)
    inside = list(module.modules())
    for name, of in (("zoneout", float), ("batch_first", bool)):
        if said.layer is None and isinstance(getattr(module, name, None), of):
            said.values[name] = getattr(module, name)
    _only(said, "eps", [(m, getattr(m, n)) for m in inside for n in _EPS if isinstance(getattr(m, n, None), int | float)])
    _only(
        said, "momentum", [(m, m.momentum) for m in inside if isinstance(m, torch.nn.modules.batchnorm._NormBase) and m.track_running_stats]
    )
    if said.layer in _SIZES and not module.state_dict() and "track_running_stats" not in said.refused:
        said.alone = {
            **{ours: getattr(module, theirs) for ours, theirs in _SIZES[said.layer].items()},
            **_but(said, "momentum"),
            "affine": False,
        }
    return said


def _attached(said: Said, module: torch.nn.Module, name: str) -> None:
    """What computes arrays of the module, or changes what it takes and gives: of arrays the formats read weight norm and pruning alone."""
    for _, array, by, remove in parametrized(name, module):
        if not remove.endswith(_READ) and by != _WeightNorm.__name__:
            why = f"{array!r} computed by {by}; {remove}(module, {array!r}) leaves the array itself"
            said.refused["parametrizations"] = Refusal(why)
    for what in forward_hooks(module):
        said.refused["hooks"] = Refusal(f"{what}, which may change what it computes")


_READ = (".remove_weight_norm", ".prune.remove")


_SIZES = {
    "LayerNorm": {"normalized_shape": "normalized_shape"},
    "RMSNorm": {"normalized_shape": "normalized_shape", "eps": "eps"},
    "GroupNorm": {"num_features": "num_channels"},
    "InstanceNorm": {"num_features": "num_features"},
}
"""What gives a norm its size, and its ε where that may be `None`, by our names: asked of modules that have no arrays."""


def _table(said: Said, module: torch.nn.Embedding) -> None:
    """What torch does to the rows of an embedding in training, or to some of them, and a layer here does not."""
    rows = {"padding_idx": "whose row it does not train", "max_norm": "to which it shortens the rows that are read"}
    for name, what in rows.items():
        if getattr(module, name) is not None:
            said.refused[name] = Refusal(f"{name}={getattr(module, name)}, {what}")
    for name, what in {"scale_grad_by_freq": "gradients by how often a row is read", "sparse": "gradients as sparse arrays"}.items():
        if getattr(module, name):
            said.refused[name] = Refusal(f"{name}=True, {what}")


def _but(said: Said, name: str) -> dict[str, Any]:
    return {n: value for n, value in said.values.items() if n != name}


def _tracking(said: Said, module: torch.nn.modules.batchnorm._NormBase) -> None:
    """Whose statistics normalize, which `track_running_stats` says together with whether there are running ones."""
    if isinstance(module, torch.nn.SyncBatchNorm):
        said.refused["process_group"] = Refusal(
            "in training the statistics of all processes together, where BatchNorm here takes those of its own batch; for several "
            "processes swap it by a function that gives portnorm.import_checkpoint(module, 'torch', ignore=('process_group',)) with "
            "`reduce`, an attribute, set to what sums over them"
        )
    has, tracks = module.running_mean is not None, module.track_running_stats
    if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and not has:
        why = f"track_running_stats={tracks} and no running statistics: it takes those of the batch in evaluation too"
        said.refused["track_running_stats"] = Refusal(f"{why}, where {said.layer} here has its running ones; leave the module as it is")
    elif has and module.momentum is None and said.layer == "InstanceNorm":
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
        rate = inner.p if isinstance(inner, torch.nn.modules.dropout._DropoutNd) else getattr(inner, "dropout", None)
        if isinstance(rate, int | float) and rate > 0 and not isinstance(inner, torch.nn.RNNBase):
            found.append(f"dropout={rate:g} of {type(inner).__name__}")
    return found


def _only(said: Said, name: str, found: list[tuple[torch.nn.Module, Any]]) -> None:
    """A number that all modules inside have alike."""
    values = {value for _, value in found}
    if len(values) == 1:
        said.values[name] = values.pop()
    elif values:
        shown = ", ".join(f"{value} in {type(module).__name__}" for module, value in found[:4])
        said.refused[name] = Refusal(f"norms whose {name} differ: {shown}", (name,))
