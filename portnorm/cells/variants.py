"""Every published way to normalize a recurrent cell, as rows over the same slots.

A recurrent layer has four places where a normalizer may sit: the input term xW (`norm_ih`), the hidden term hU (`norm_hh`), their sum
(`norm_sum`), and the cell state (`norm_c`). A GRU that resets before its matrix product has two hidden terms, of the gates (`norm_hh`) and
of the candidate (`norm_hn`). A variant says which are filled, with what, and where the biases are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from portnorm.errors import UnsupportedError


@dataclass(frozen=True)
class Variant:
    """Which normalizer sits in which slot of a recurrent cell. Defaults are the plain cell of torch.nn and ONNX."""

    source: str
    norm: Literal["layer", "batch", "weight"] | None = None
    """What normalizes: the slots by layer or batch statistics, or the weight matrices by their rows' lengths."""
    terms: Literal["separate", "sum", "input"] = "separate"
    """Whether xW and hU are normalized each for itself, or their sum, or xW alone."""
    statistics: Literal["step", "sequence"] = "step"
    """Batch normalization: whether each time step has statistics of its own, or all steps of a batch have them together."""
    groups: Literal["all", "candidate", "gate"] = "all"
    """Which gates share statistics in layer normalization: all of them, all but the candidate (GRU), or each gate has its own."""
    cell: Literal["copy", "state"] | None = None
    """Whether the normalized cell state only enters the output's tanh ("copy"), or also becomes the next state ("state")."""
    reset: Literal["after", "before"] = "after"
    """GRU: whether the reset gate multiplies the candidate's hidden term, or the hidden state before its matrix product."""
    shift: bool = True
    """Whether the normalizers of the gates have a bias β of their own."""
    biases: tuple[str, ...] = ("bias",)
    """Bias vectors that are added to the gates after normalization."""
    gain: float = 1.0
    """Initial value of every normalizer's weight γ."""
    forget_bias: float = 0.0
    """Initial value of the forget gate's slice of the bias."""
    runtime_forget_bias: float = 0.0
    """A constant added to the forget gate in every step, not stored."""
    eps: float = 1e-5

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UnsupportedError(f"`{name}` is {getattr(self, name)!r}; expected one of {', '.join(map(repr, allowed))}")
        if self.groups != "all" and self.norm != "layer":
            raise UnsupportedError(f"`groups` is {self.groups!r}, which only layer normalization can have")
        if self.statistics == "sequence" and (self.norm, self.terms, self.cell) != ("batch", "input", None):
            raise UnsupportedError("`statistics` is 'sequence', which is for batch normalization of the input term alone")
        if self.norm in (None, "weight") and self.cell is not None:
            raise UnsupportedError(f"`cell` is {self.cell!r} without a `norm` to normalize it with")
        if not self.eps >= 0:
            raise UnsupportedError(f"`eps` is {self.eps}; expected a number ≥ 0")

    def gate_slots(self) -> tuple[str, ...]:
        """The filled slots of the gates."""
        if self.norm in (None, "weight"):
            return ()
        separate = ("norm_ih", "norm_hh") if self.reset == "after" else ("norm_ih", "norm_hh", "norm_hn")
        return {"separate": separate, "sum": ("norm_sum",), "input": ("norm_ih",)}[self.terms]

    @property
    def timed(self) -> bool:
        """Whether running statistics belong to time steps."""
        return self.norm == "batch" and self.statistics == "step"

    def slots(self) -> tuple[str, ...]:
        """All filled slots."""
        return self.gate_slots() if self.cell is None else (*self.gate_slots(), "norm_c")


_CHOICES: dict[str, tuple[object, ...]] = {
    "norm": (None, "layer", "batch", "weight"),
    "terms": ("separate", "sum", "input"),
    "statistics": ("step", "sequence"),
    "groups": ("all", "candidate", "gate"),
    "cell": (None, "copy", "state"),
    "reset": ("after", "before"),
    "biases": (("bias_ih", "bias_hh"), ("bias",), ()),
}

_TORCH_BIASES = ("bias_ih", "bias_hh")

_ANY_CELL: dict[str | None, Variant] = {
    "batch-input": Variant(
        source="Laurent et al. 2016 (sequence-wise), Deep Speech 2", norm="batch", terms="input", statistics="sequence", shift=False
    ),
    "batch-input-frame": Variant(source="Laurent et al. 2016 (frame-wise)", norm="batch", terms="input", shift=False),
    "weight": Variant(source="Salimans & Kingma 2016, torch weight_norm of both matrices", norm="weight", biases=_TORCH_BIASES),
}
"""Presets that are the same for every cell."""

VARIANTS: dict[str, dict[str | None, Variant]] = {
    "LSTM": {
        None: Variant(source="torch.nn.LSTM, ONNX LSTM", biases=_TORCH_BIASES),
        "layer": Variant(source="Ba, Kiros & Hinton 2016, supplement", norm="layer", cell="copy"),
        "layer-gates": Variant(
            source="TensorFlow contrib LayerNormBasicLSTMCell",
            norm="layer",
            terms="sum",
            groups="gate",
            cell="state",
            biases=(),
            runtime_forget_bias=1.0,
            eps=1e-12,
        ),
        "layer-state": Variant(source="TensorFlow Addons LayerNormLSTMCell, PyTorch fastrnns", norm="layer", cell="state"),
        "batch": Variant(source="Cooijmans et al. 2016, section 3", norm="batch", cell="copy", shift=False, gain=0.1, forget_bias=1.0),
        **_ANY_CELL,
    },
    "GRU": {
        None: Variant(source="torch.nn.GRU, ONNX GRU with linear_before_reset=1", biases=_TORCH_BIASES),
        "layer": Variant(source="Ba, Kiros & Hinton 2016, supplement", norm="layer", groups="candidate", biases=()),
        "batch": Variant(source="as Cooijmans et al. 2016 for the LSTM", norm="batch", shift=False, gain=0.1),
        **_ANY_CELL,
    },
    "RNN": {
        None: Variant(source="torch.nn.RNN, ONNX RNN", biases=_TORCH_BIASES),
        "layer": Variant(source="Ba, Kiros & Hinton 2016, equation 4", norm="layer", terms="sum", biases=()),
        "batch": Variant(source="Cooijmans et al. 2016, figure 1", norm="batch", shift=False, gain=0.1),
        **_ANY_CELL,
    },
}
"""By cell and preset."""


def variant_of(norm: str | None | Variant, cell: str, takes: dict[str, tuple[object, ...]]) -> Variant:
    """The row of a cell's table that `norm` names, or `norm` itself if it is a row that the cell takes."""
    if isinstance(norm, Variant):
        for name, allowed in takes.items():
            if getattr(norm, name) not in allowed:
                raise UnsupportedError(
                    f"`{name}` is {getattr(norm, name)!r}, which {cell} has no place for; expected one of {', '.join(map(repr, allowed))}"
                )
        return norm
    try:
        return VARIANTS[cell][norm]
    except (KeyError, TypeError):
        names = ", ".join(repr(name) for name in VARIANTS[cell])
        raise UnsupportedError(f"`norm` is {norm!r}; expected one of {names} for {cell}, or a portnorm.Variant") from None
