"""What the cells have in common: their variant, their slots, and what the layer around the loop has to know of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from portnorm.affine import times_transposed
from portnorm.arrays import Array, xp_of
from portnorm.cells.slots import Slot, Slots
from portnorm.cells.variants import Variant
from portnorm.norm.normalize import Reduce
from portnorm.pointwise import ACTIVATIONS, Activation
from portnorm.quantization import SCHEMES, QuantizeName, fake_quantize, integer_product
from portnorm.scan import Params, State


@dataclass(frozen=True)
class RecurrentCell:
    """One time step for `portnorm.scan`, its variant fixed; a batch-norm slot takes the batch's statistics when `training`."""

    variant: Variant
    training: bool = False
    reduce: Reduce | None = None
    """The sum over all processes that have a part of the batch, for its statistics."""
    quantize: QuantizeName | None = None
    """How what is multiplied with weights is rounded to what integers can say (`portnorm.quantization`), as the weights already are."""
    h_bound: float | None = None
    """The largest |h|, if it is known: then its integers need not be looked for in each row."""
    draws_zoneout: bool = False
    """Whether a step is given which features zoneout leaves as they were; else it takes the expectation."""
    late_biases: dict[str, tuple[str, ...]] = field(init=False, compare=False, repr=False)
    """By the slot whose shift their sum is: the parameters that are added to the gates after normalization."""
    slots: dict[str, Slot] = field(init=False, compare=False, repr=False)
    """The normalizers inside the loop, by the name of their slot."""
    input_slot: Slot | None = field(init=False, compare=False, repr=False)
    """The normalizer of the input term, which is outside the loop."""
    early_biases: tuple[tuple[str, ...], tuple[str, ...]] = field(init=False, compare=False, repr=False)
    """Biases that are added before normalization: to the input term, and to the hidden term inside the loop."""
    inside: tuple[tuple[str, str | None], ...] = field(init=False, compare=False, repr=False)
    """Names of what a step reads beside its matrices; of a shift that is a sum of late biases, with the slot."""

    states: ClassVar[tuple[str, ...]]
    """Names of the states; the first is the output."""
    takes: ClassVar[dict[str, tuple[object, ...]]]
    """What a variant may say for this cell."""
    forget_gate: ClassVar[int | None] = None
    """Place of the forget gate among the gates."""
    projects: ClassVar[bool] = False
    """Whether the output can be projected by `weight_hr`."""
    candidate: ClassVar[int]
    """Place of the candidate among the gates."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "late_biases", self._late_biases())
        object.__setattr__(self, "slots", self._slots())
        object.__setattr__(self, "input_slot", self._input_slot())
        object.__setattr__(self, "early_biases", self._early_biases())
        object.__setattr__(self, "inside", tuple(self._inside()))
        object.__setattr__(
            self, "_hash", hash((type(self), self.variant, self.training, self.reduce, self.quantize, self.h_bound, self.draws_zoneout))
        )

    def __hash__(self) -> int:
        """Computed once: a cell is looked up in every call."""
        return self._hash  # type: ignore[attr-defined, no-any-return]

    @property
    def gates(self) -> int:
        """How many slices of hidden size the weights have."""
        raise NotImplementedError

    @property
    def functions(self) -> tuple[Activation, Activation, Activation]:
        """What the variant names: of the gates, of the candidate, of the cell state."""
        gates, candidate, state = self.variant.activations()
        return ACTIVATIONS[gates], ACTIVATIONS[candidate], ACTIVATIONS[state]

    @property
    def hidden_apart(self) -> bool:
        """Whether something happens to the hidden term before it is added to the input term."""
        return False

    @property
    def keeps_hidden_bias(self) -> bool:
        """Whether the late bias of the hidden term has to stay with it; else it is added with the input term, for all steps at once."""
        return self.hidden_apart

    # -- slots ---------------------------------------------------------------------------------------------------------------------

    def names(self) -> tuple[str, ...]:
        """All filled slots."""
        return (*self.variant.gate_slots(), *(() if self.variant.cell is None else ("norm_c",)))

    def width(self, slot: str) -> int:
        """How many slices of hidden size a slot normalizes."""
        return 1 if slot == "norm_c" else self.gates

    def partition(self, slot: str) -> tuple[int, ...]:
        """How many gates each part with statistics of its own has."""
        width = self.width(slot)
        if self.variant.groups == "candidate" and width == self.gates > 1:
            return (width - 1, 1)
        return (1,) * width if self.variant.groups == "gate" else (width,)

    def scales(self, slot: str) -> bool:
        """Whether a slot has a gain of its own."""
        return slot == "norm_c" or self.variant.scale

    def shifts(self, slot: str) -> bool:
        """Whether a slot has a bias of its own; one that is narrower than the gates leaves that to the input term."""
        return slot == "norm_c" or (self.variant.shift and not (slot == "norm_hh" and self.width(slot) < self.gates))

    def _input_slot(self) -> Slot | None:
        if "norm_ih" not in self.names():
            return None
        scale, shift = self.variant.scale, self._is_shifted("norm_ih")
        return Slot(self.variant, self.partition("norm_ih"), self.training, scale, shift, reduce=self.reduce)

    def _slots(self) -> dict[str, Slot]:
        found = {
            name: Slot(self.variant, self.partition(name), self.training, self.scales(name), self._is_shifted(name), reduce=self.reduce)
            for name in self.names()
            if name != "norm_ih"
        }
        if "norm_hh" not in found and self.late_biases.get("norm_hh"):
            found["norm_hh"] = Slot(self.variant, normalizes=False)
        return found

    def _is_shifted(self, slot: str) -> bool:
        constant = self.variant.runtime_forget_bias != 0 and slot in ("norm_ih", "norm_sum")
        return slot == "norm_c" or constant or bool(self.late_biases.get(slot))

    # -- biases --------------------------------------------------------------------------------------------------------------------

    def _late_biases(self) -> dict[str, tuple[str, ...]]:
        own = tuple(f"{slot}.bias" for slot in ("norm_ih", "norm_hh", "norm_sum") if slot in self.names() and self.shifts(slot))
        every = (*self.variant.biases, *own)
        if "norm_sum" in self.names():
            return {"norm_sum": every}
        hidden = tuple(name for name in every if self.keeps_hidden_bias and name in ("bias_hh", "norm_hh.bias"))
        return {"norm_ih": tuple(name for name in every if name not in hidden), "norm_hh": hidden}

    def portion(self, slot: str) -> tuple[int, int]:
        """Which gates of a bias vector, from the first to before the last, shift a slot."""
        return (0, self.gates)

    def _early_biases(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        inside = self.hidden_apart or not {"norm_ih", "norm_hh"}.isdisjoint(self.names())
        hidden = tuple(name for name in self.variant.early if name == "bias_hh" and inside)
        return tuple(name for name in self.variant.early if name not in hidden), hidden

    def _inside(self) -> Iterator[tuple[str, str | None]]:
        for name in (*self.early_biases[1], *self.extra()):
            yield name, None
        for slot, own in self.slots.items():
            for kind in own.parameters():
                yield f"{slot}.{kind}", slot if kind == "bias" and slot in self.late_biases else None

    # -- what enters the loop --------------------------------------------------------------------------------------------------------

    def given(self) -> tuple[str, ...]:
        """Names of what a step has for itself beside the input term: statistics unless training, gains and shifts by step, zoneout's
        mask."""
        statistics = () if self.training or self.variant.norm != "batch" else ("mean", "var")
        tracked = [name for name, slot in self.slots.items() if slot.normalizes]
        return (*(f"{name}.{s}" for name in tracked for s in statistics), *self.stepwise(), *(("zoneout",) if self.draws_zoneout else ()))

    def stepwise(self) -> tuple[str, ...]:
        """Names of the gains and shifts that each step has for itself."""
        if self.variant.affine == "shared":
            return ()
        return tuple(f"{name}.{p}" for name, slot in self.slots.items() for p in slot.parameters())

    @classmethod
    def bounds_h(cls, variant: Variant) -> bool:
        """Whether |h| is at most 1 after every step: it is a mean of tanhs, or one that a gate lets through in part."""
        gates, candidate, state = variant.activations()
        return "sigmoid" in gates and (state if cls.forget_gate is not None else candidate) == "tanh"

    def shared(self) -> tuple[str, ...]:
        own = tuple(f"{name}.{p}" for name, slot in self.slots.items() for p in slot.parameters())
        return tuple(name for name in (*own, *self.extra()) if name not in self.stepwise())

    def extra(self) -> tuple[str, ...]:
        """Names of parameters that only this variant of the cell has inside the loop."""
        return ()

    def normalizers(self, params: Params, x: tuple[Array, ...], active: Array | None) -> Slots:
        """The slots of one step, whose inputs are `x`."""
        return Slots(self.slots, {**params, **dict(zip(self.given(), x[1:], strict=True))}, active)

    def hidden_term(self, params: Mapping[str, Array], h: Array, start: int = 0, stop: int | None = None) -> Array:
        """h · W_hhᵀ with its early bias, of the features from `start` to `stop`; h ⊙ w_hh by the variant."""
        rows, bias = params["weight_hh"], params.get("bias_hh")
        if (start, stop) != (0, None):
            rows, bias = rows[start:stop, :], None if bias is None else bias[start:stop]
        by_feature = self.variant.recurrence == "diagonal"
        a = h * xp_of(h).matrix_transpose(rows) if by_feature else self.product(params, h, rows)
        return a if bias is None else a + bias

    def product(self, params: Mapping[str, Array], h: Array, weight: Array) -> Array:
        """h · weightᵀ, of integers where the cell is to `quantize`; `h` may be what gates make of it."""
        if self.quantize is None:
            return times_transposed(h, weight)
        return integer_product(h, weight, bound=self._bound(params), block=SCHEMES[self.quantize].inputs.block)

    def factor(self, params: Mapping[str, Array], h: Array) -> Array:
        """h as `product` sees it, for the gradient of the weight."""
        if self.quantize is None or self.variant.recurrence == "diagonal":
            return h
        return fake_quantize(h, bound=self._bound(params), **SCHEMES[self.quantize].inputs.arguments)

    def _bound(self, params: Mapping[str, Array]) -> float | None:
        return None if "hidden_mask" in params else self.h_bound

    def dropped(self, params: Mapping[str, Array], h: Array) -> Array:
        """h as its matrix product sees it, in training with recurrent dropout (Gal & Ghahramani 2016): h ⊙ m, m the same in every step.

        m (batch, outputs) is 0 or 1/(1−p). It is its own vjp.
        """
        m = params.get("hidden_mask")
        return h if m is None else h * m

    def moves(self, x: tuple[Array, ...]) -> Array | None:
        """(batch, outputs): where h takes its new value; `None` where that is not drawn."""
        return x[-1] if self.draws_zoneout else None

    def stays(self, before: Array, after: Array, moves: Array | None) -> Array:
        """The hidden state with the part of it that zoneout leaves as it was (Krueger et al. 2017): what was drawn, or its expectation."""
        if moves is not None:
            return xp_of(after).where(moves, after, before)
        p = self.variant.zoneout
        return after + p * (before - after) if p else after

    def stays_vjp(self, dh: Array, moves: Array | None) -> tuple[Array | float, Array]:
        """(cotangent of h before the step through `stays`, cotangent of the new h)"""
        if moves is not None:
            xp = xp_of(dh)
            return xp.where(xp.logical_not(moves), dh, 0.0), xp.where(moves, dh, 0.0)
        p = self.variant.zoneout
        return (p * dh, (1.0 - p) * dh) if p else (0.0, dh)

    def step(self, params: Params, state: State, x: tuple[Array, ...], active: Array | None) -> tuple[State, State, Any]:
        """`x` is the input term (batch, gates · hidden), then what `given` names."""
        raise NotImplementedError

    def step_vjp(self, params: Params, residuals: Any, dstate: State, active: Array | None) -> tuple[State, tuple[Array, ...], Params]:
        """Stacked over time: the cotangent of the input term; then, for the gradient of the hidden weights, slice by slice of
        its rows, the cotangent of a hidden term and what the weights were multiplied with; the same for a projection; then
        the cotangents of what `stepwise` names."""
        raise NotImplementedError
