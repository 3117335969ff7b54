"""Every published way to normalize a recurrent cell, as rows over the same slots.

A recurrent layer has four places where a normalizer may sit: the input term xW (`norm_ih`), the hidden term hU (`norm_hh`), their sum
(`norm_sum`), and the cell state (`norm_c`). A variant says which are filled, with what, and where the biases are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from portnorm.errors import UnsupportedError


@dataclass(frozen=True)
class Variant:
    """Which normalizer sits in which slot of a recurrent cell. Defaults are the plain cell of torch.nn and ONNX."""

    source: str
    norm: Literal["layer", "batch"] | None = None
    terms: Literal["separate", "sum"] = "separate"
    """Whether xW and hU are normalized each for itself, or their sum."""
    per_gate: bool = False
    """Whether each gate's slice has statistics of its own, or all gates together (layer normalization only)."""
    cell: Literal["copy", "state"] | None = None
    """Whether the normalized cell state only enters the output's tanh ("copy"), or also becomes the next state ("state")."""
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


VARIANTS: dict[str | None, Variant] = {
    None: Variant(source="torch.nn.LSTM, ONNX LSTM", biases=("bias_ih", "bias_hh")),
    "layer": Variant(source="Ba, Kiros & Hinton 2016, supplement", norm="layer", cell="copy"),
    "layer-gates": Variant(
        source="TensorFlow contrib LayerNormBasicLSTMCell",
        norm="layer",
        terms="sum",
        per_gate=True,
        cell="state",
        biases=(),
        runtime_forget_bias=1.0,
        eps=1e-12,
    ),
    "layer-state": Variant(source="TensorFlow Addons LayerNormLSTMCell, PyTorch fastrnns", norm="layer", cell="state"),
    "batch": Variant(source="Cooijmans et al. 2016, section 3", norm="batch", cell="copy", shift=False, gain=0.1, forget_bias=1.0),
}


def variant_of(norm: str | None | Variant) -> Variant:
    """The row of the table that `norm` names, or `norm` itself if it is a row."""
    if isinstance(norm, Variant):
        return norm
    try:
        return VARIANTS[norm]
    except (KeyError, TypeError):
        names = ", ".join(repr(name) for name in VARIANTS)
        raise UnsupportedError(f"`norm` is {norm!r}; expected one of {names}, or a portnorm.Variant") from None
