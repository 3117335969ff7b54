"""A module and the layer in its place: which parameters are which, and their gradients where none are alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from portnorm.arrays import to_numpy
from portnorm.errors import ConformanceError, UnsupportedError
from portnorm.layers.layer import Layer
from portnorm_backends.torch_compare import Arrays, as_it_was
from portnorm_backends.torch_standin import StandIn

_DIRECTIONS = 2
_STEP = 2.0**-6
"""How far parameters are moved to see what the format makes of that: exact where it sorts and adds, good to _STEP² where it divides."""
_ALONG = 1e-3
"""Of the length of the gradient: the error of that, and of float32. A gradient that is wrong is wrong by its own size."""


@dataclass
class Twin:
    """A module that is to be swapped, and what is made of it."""

    path: str
    module: torch.nn.Module
    made: StandIn
    layer_of: Callable[[torch.nn.Module], Layer]
    """The layer that computes what the module does with the weights that it has now."""

    @property
    def title(self) -> str:
        return f"{self.path!r} ({type(self.module).__name__})"

    @cached_property
    def pairs(self) -> dict[str, str] | None:
        """The module's names of parameters by ours, where each has the values of one of ours; cells have no numbers of layers."""
        ours, found = dict(self.made.named_parameters()), {}
        for name, p in self.module.named_parameters():
            own = name if name in ours else f"{name}_l0"
            if own not in ours or ours[own].shape != p.shape or not torch.equal(ours[own], p):
                return None
            found[own] = name
        return found if len(found) == len(ours) else None

    def freeze(self) -> None:
        """Freeze what is frozen in the module."""
        theirs = dict(self.module.named_parameters())
        frozen = {name for name, p in theirs.items() if not p.requires_grad}
        if theirs and frozen == theirs.keys():
            self.made.requires_grad_(False)
        elif frozen and self.pairs is None:
            raise UnsupportedError(
                f"{self.title} has {', '.join(map(repr, sorted(frozen)))} frozen and the rest not, but {self.made!r} has none that are "
                "alike; freeze all or none before the swap, and the layer's own after it"
            )
        elif frozen:
            for name, p in self.made.named_parameters():
                p.requires_grad_((self.pairs or {})[name] not in frozen)

    def statistics(self) -> Arrays:
        """The layer's buffers, of what the module holds now, by their names in the model."""
        counted = not isinstance(self.module, torch.nn.modules.instancenorm._InstanceNorm)  # torch's has a counter that never counts
        names = [name for name, _ in self.made.named_buffers() if counted or name != "num_batches_tracked"]
        if not names:
            return {}
        buffers = self.layer_of(self.module).to(xp="torch").buffers
        return {f"{self.path}.{name}": buffers[name] for name in names}

    def names(self) -> dict[str, str | None]:
        """By the model's name of a parameter of the module that of its twin, `None` where it has none."""
        pairs = None if self.pairs is None else {theirs: f"{self.path}.{ours}" for ours, theirs in self.pairs.items()}
        return {f"{self.path}.{name}": None if pairs is None else pairs[name] for name, _ in self.module.named_parameters()}

    def unpaired(self) -> set[str]:
        """The model's names of the layer's parameters where none has a twin."""
        return set() if self.pairs is not None else {f"{self.path}.{name}" for name, _ in self.made.named_parameters()}

    def check_directions(self, before: Arrays, after: Arrays, title: str) -> int:
        """Where no parameters are alike, compare how fast the result changes when the module's are moved, and ours with them.

        Gives in how many directions that was done. Raises `ConformanceError`.
        """
        theirs = {name: before[full] for name, _ in self.module.named_parameters() if (full := f"{self.path}.{name}") in before}
        if self.pairs is not None or not theirs:
            return 0
        length = sum(float(d.double().square().sum()) for d in theirs.values()) ** 0.5
        for seed in range(_DIRECTIONS):
            generator = torch.Generator().manual_seed(seed)
            way = {name: torch.randn(d.shape, generator=generator, dtype=torch.float64) for name, d in theirs.items()}
            (theirs_on, ours_on), (theirs_back, ours_back) = (self._moved(way, sign * _STEP) for sign in (1, -1))
            way = {name: (theirs_on[name] - theirs_back[name]) / (2 * _STEP) for name in way}  # as far as the dtype lets them go
            ours = {name: (ours_on[name] - ours_back[name]) / (2 * _STEP) for name in ours_on}
            expected = sum(float((d.double().cpu() * way[name]).sum()) for name, d in theirs.items())
            own = {name: after.get(f"{self.path}.{name}") for name in ours}
            found = sum(float((d.double().cpu() * ours[name]).sum()) for name, d in own.items() if d is not None)
            if not abs(found - expected) <= _ALONG * length:
                raise ConformanceError(
                    f"{title} differ in the gradients of {self.path!r}: along a random direction {found:.6g}, which was {expected:.6g}"
                )
        return _DIRECTIONS

    def _moved(self, way: Arrays, step: float) -> tuple[Arrays, Arrays]:
        """The parameters of the module, moved, and those of the layer that is made of it then, in float64."""
        with as_it_was(self.module):
            for name, p in self.module.named_parameters():
                if name in way:
                    p.data.add_((step * way[name]).to(device=p.device, dtype=p.dtype))
            theirs = {name: p.detach().to(device="cpu", dtype=torch.float64, copy=True) for name, p in self.module.named_parameters()}
            made = self.layer_of(self.module).params
            return theirs, {name: torch.tensor(to_numpy(a), dtype=torch.float64) for name, a in made.items()}
