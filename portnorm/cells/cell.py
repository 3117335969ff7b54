"""What the cells have in common: their variant, their slots, and what the layer around the loop has to know of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from portnorm.arrays import Array
from portnorm.cells.slots import Slot
from portnorm.cells.variants import Variant
from portnorm.scan import Params, State


@dataclass(frozen=True)
class RecurrentCell:
    """One time step for `portnorm.scan`, its variant fixed; a batch-norm slot takes the batch's statistics when `training`."""

    variant: Variant
    training: bool = False

    gates: ClassVar[int]
    """How many slices of hidden size the weights have."""
    states: ClassVar[tuple[str, ...]]
    """Names of the states; the first is the output."""
    takes: ClassVar[dict[str, tuple[object, ...]]]
    """What a variant may say for this cell."""
    forget_gate: ClassVar[int | None] = None
    """Place of the forget gate among the gates."""

    @property
    def hidden_bias(self) -> bool:
        """Whether the bias of the hidden term has to stay with it; else it is added with the input term, for all steps at once."""
        return False

    def width(self, slot: str) -> int:
        """How many slices of hidden size a slot normalizes."""
        return 1 if slot in ("norm_c", "norm_hn") else self.gates

    def partition(self, slot: str) -> tuple[int, ...]:
        """How many gates each part with statistics of its own has."""
        width = self.width(slot)
        if self.variant.groups == "candidate" and width == self.gates > 1:
            return (width - 1, 1)
        return (1,) * width if self.variant.groups == "gate" else (width,)

    def input_slot(self) -> Slot | None:
        """The normalizer of the input term, which is outside the loop."""
        return Slot(self.variant, self.partition("norm_ih"), self.training) if "norm_ih" in self.variant.gate_slots() else None

    def slots(self) -> dict[str, Slot]:
        """The normalizers inside the loop, by the name of their slot."""
        v, found = self.variant, {}
        for name in v.slots():
            shifts = {"norm_hh": self.hidden_bias and (v.shift or "bias_hh" in v.biases), "norm_hn": False}.get(name, True)
            found[name] = Slot(v, self.partition(name), self.training, shifts)
        if "norm_hh" not in found and self.hidden_bias and "bias_hh" in v.biases:
            found["norm_hh"] = Slot(v, shift=True, normalizes=False)
        return {name: slot for name, slot in found.items() if name != "norm_ih"}

    def shared(self) -> tuple[str, ...]:
        return tuple(f"{name}.{p}" for name, slot in self.slots().items() for p in slot.parameters())

    def step(self, params: Params, state: State, x: tuple[Array, ...], active: Array | None) -> tuple[State, State, Any]:
        """`x` is the input term (batch, gates · hidden), then per batch-norm slot its mean and variance unless training."""
        raise NotImplementedError

    def step_vjp(self, params: Params, residuals: Any, dstate: State, active: Array | None) -> tuple[State, tuple[Array, ...], Params]:
        """Stacked over time: the cotangent of the input term; then, for the gradient of the hidden weights, slice by slice of
        its rows, the cotangent of a hidden term and what the weights were multiplied with."""
        raise NotImplementedError
