"""A torch model that gets its sequences in pieces: the states of its recurrent layers as inputs and outputs of their own.

    out, states = Stream(model, example)(args, kwargs, states)

Each recurrent layer of portnorm that the model calls once, and without a state, starts from the one that is given and gives the next.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree

from portnorm.arrays import Array, leaves, mapped
from portnorm.errors import UnsupportedError
from portnorm.layers.recurrent import recurrent_parts
from portnorm_backends.torch_module import TorchModule
from portnorm_onnx.signature import state_names

States = dict[str, tuple[Array, ...]]


class Stream(torch.nn.Module):  # type: ignore[misc]  # torch is not looked into
    """`model` with states; it is run once, on `args` and `kwargs`, to see which layers take one.

    Raises `UnsupportedError` where there is none, where one is called twice, and where one starts at the end of its sequence.
    """

    def __init__(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]):
        super().__init__()
        self.model = model
        self.first: States = {}
        """The states before the first piece, by the path of the module."""
        with self._taken(self._begin), torch.no_grad():
            found = model(*args, **kwargs)
        if not self.first:
            raise UnsupportedError(
                "`streaming`: the model calls no recurrent layer of portnorm without a state of its own; swap those of torch by "
                "portnorm.replace_modules first, or leave `streaming` out"
            )
        self.outputs = _tensors(found)
        """How many tensors the model gives."""

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], states: States) -> tuple[Any, States]:
        """What the model gives for a piece after `states`, and the states after it."""
        after: States = {}

        def carried(path: str, module: TorchModule, x: Array, lengths: Any, mask: Any) -> tuple[Array, Any]:
            batch = x.shape[0 if module._layer.batch_first else 1]
            for a in leaves(states[path]):
                if a.ndim > 1:
                    torch._check(a.shape[1] == batch)  # torch does not look into the layer, and would take it for another length
            y, after[path] = module(x, states[path], lengths, mask=mask)
            return y, after[path]

        with self._taken(carried):
            out = self.model(*args, **kwargs)
        return out, {path: after[path] for path in states}

    def _begin(self, path: str, module: TorchModule, x: Array, lengths: Any, mask: Any) -> Any:
        if path in self.first:
            raise UnsupportedError(f"`streaming`: {path!r} is called twice, and would need two states; give it one in the model")
        layer = module.to_layer()
        for part in recurrent_parts(layer):
            part.check_goes_forward()
        self.first[path] = layer.initial_state(x.shape[0 if layer.batch_first else 1])
        return module(x, None, lengths, mask=mask)

    @contextmanager
    def _taken(self, call: Callable[..., Any]) -> Iterator[None]:
        """Meanwhile `call(path, module, x, lengths, mask)` takes the calls without a state; inside it the module is as it was."""
        found = [
            (path, module) for path, module in self.model.named_modules() if isinstance(module, TorchModule) and module._layer.recurrent
        ]
        before = [module.recorder for _, module in found]

        def taker(path: str, inner: Any) -> Callable[..., Any]:
            def take(module: TorchModule, x: Any, state: Any, lengths: Any, mask: Any) -> Any:
                module.recorder = inner
                try:
                    return module(x, state, lengths, mask=mask) if state is not None else call(path, module, x, lengths, mask)
                finally:
                    module.recorder = take

            return take

        for (path, module), inner in zip(found, before, strict=True):
            module.recorder = taker(path, inner)
        try:
            yield
        finally:
            for (_, module), inner in zip(found, before, strict=True):
                module.recorder = inner

    def names(self, end: str) -> list[str]:
        """Those of the states in the graph: `encoder.rnn.h` with this end."""
        prefixes = {path: f"{path}." if path else "" for path in self.first}
        return [f"{prefixes[path]}{name}{end}" for path in self.first for name in state_names(self.model.get_submodule(path)._layer)]

    def input_names(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], given: Sequence[str] | None) -> list[str]:
        """Those of the model's tensors, by its signature where they are not given, and of the states."""
        bound = inspect.signature(self.model.forward).bind(*args, **kwargs).arguments
        own = [name if isinstance(value, torch.Tensor) else f"{name}_{k}" for name, value in bound.items() for k in range(_tensors(value))]
        return [*(own if given is None else given), *self.names("_0")]

    def output_names(self, given: Sequence[str] | None) -> list[str]:
        own = ["output"] if self.outputs == 1 else [f"output_{k}" for k in range(self.outputs)]
        return [*(own if given is None else given), *self.names("_n")]

    def shapes(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: Any) -> Any:
        """`dynamic_shapes`, said of the model, for `forward`: the batch of the states is free where torch finds it so."""
        if dynamic_shapes is None:
            return None
        bound = inspect.signature(self.model.forward).bind(*args, **kwargs)
        if isinstance(dynamic_shapes, Mapping):
            said = [dynamic_shapes.get(name) for name in bound.arguments]
        else:
            said = [*dynamic_shapes, *[None] * (len(bound.arguments) - len(dynamic_shapes))]
        by_name = dict(zip(bound.arguments, said, strict=True))
        batch = {path: mapped(lambda a: {1: torch.export.Dim.AUTO} if a.ndim > 1 else None, state) for path, state in self.first.items()}
        places = list(by_name.values())
        return tuple(places[: len(args)]), {name: by_name.get(name) for name in kwargs}, batch


def _tensors(tree: Any) -> int:
    return sum(isinstance(a, torch.Tensor) for a in pytree.tree_leaves(tree))
