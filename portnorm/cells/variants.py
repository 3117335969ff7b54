"""Every published way to normalize a recurrent cell, as rows over the same slots.

A recurrent layer has these places where a normalizer may sit: the input term xW (`norm_ih`), the hidden term hU (`norm_hh`), their sum
(`norm_sum`), and the cell state (`norm_c`). The candidate of a GRU may have one apart: of its hidden term where the reset gate comes
before the matrix product (`norm_hn`), or of its sum where the gates have one of theirs (`norm_n`). A variant says which are filled, with
what, and where the biases are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from portnorm.errors import UnsupportedError
from portnorm.norm.arguments import LARGEST
from portnorm.scalars import choice, real_number, switch

Function = Literal["tanh", "relu", "sigmoid", "hard_sigmoid_5", "hard_sigmoid_6"]
FUNCTIONS: tuple[str, ...] = get_args(Function)


@dataclass(frozen=True, repr=False)
class Variant:
    """One recurrent cell: which normalizer sits where, and where the biases are. Without arguments, the plain cell of torch.nn and ONNX.

    The fields are places in these equations. x W and h U have a slice of hidden size for each gate. N is a normalizer where the fields put
    one, and does nothing elsewhere.

        a = N_ih(x W + b₀) + N_hh(h U + b₁) + b        or, with terms="sum",   a = N_sum(x W + b₀ + h U + b₁) + b

        LSTM   (i, f, g, o) = split(a);   i, f see p ⊙ c, o sees p ⊙ c' (`peepholes`);   f has `runtime_forget_bias` added
               c' = clip(σ(f) ⊙ c + σ(i) ⊙ φ(g));      h' = σ(o) ⊙ ψ(N_c(c'))
        GRU    (r, z) = σ(split(a));   n = φ(…), the reset gate in it as `reset` says;   h' = (1 − z) ⊙ n + z ⊙ h
        RNN    h' = φ(a)

    and h ← zoneout · h + (1 − zoneout) · h', in training h or h' by a draw. A normalizer is N(v) = γ ⊙ (v − mean) / √(var + ε) + β.

    Fields:
      source: where the cell was published; free text.
      norm: what N is: "layer", "rms" (without the mean) or "batch"; "weight" divides the rows of W and U by their lengths; `None` is no N.
      terms: which terms of `a` have an N: "separate" N_ih and N_hh, "sum" N_sum, "input" N_ih alone, "hidden" N_hh alone, `None` none.
      statistics: batch normalization: mean and var of each time "step", or of the whole "sequence". How many steps have running
        statistics of their own says the layer's `t_max`: 1 makes one set for all.
      affine: batch normalization: γ and β are "shared" by all steps, or each "step" up to `t_max` has its own.
      groups: layer and RMS normalization: which gates of `a` have mean and var together: "all", all but the "candidate" n (GRU), or each
        "gate" by itself.
      cell: N_c of the LSTM: a "copy" of c' is normalized for ψ alone; with "state" what N_c gives is the next c as well; `None` no N_c.
      reset: GRU: n = φ(x W_n + r ⊙ h U_n) is "after", φ(x W_n + (r ⊙ h) U_n) "before", φ(r ⊙ (x W_n + h U_n)) "sum"; `None` has no r
        (Li-GRU).
      update: GRU: whether z is the part of h that is kept, as above, "keep", or the part that n replaces, h' = (1 − z) ⊙ h + z ⊙ n,
        "replace".
      recurrence: RNN: whether U is a "matrix", or "diagonal", one number for each unit: h ⊙ u (IndRNN); `weight_hh` is then (hidden, 1).
      scale: whether N_ih, N_hh and N_sum have a γ.
      shift: whether N_ih, N_hh and N_sum have a β.
      early: names of the vectors that N sees: ("bias_ih", "bias_hh") are b₀ and b₁, ("bias",) is b₀ alone; () is none.
      biases: names of the vectors in b: ("bias",), ("bias_ih", "bias_hh") or (). A name that is in `early` too is one vector, added twice.
        In a GRU with reset="after" "bias_hh" stays with h U: n = φ(x W_n + b_ih + r ⊙ (h U_n + b_hh)); with terms="sum" it is in b.
      gain: what γ is in a new layer.
      forget_bias: what the slice of b for f is in a new LSTM.
      runtime_forget_bias: LSTM: a number added to f in every step, which is no parameter.
      eps: ε.
      eps_place: where ε is added: to the "variance", or to its root, "std": (v − mean) / (√var + ε).
      variance: which var is divided by n − 1 in place of n: none, "biased"; the "running" one, as in torch; or "unbiased", all.
      activation: φ: "tanh", "relu", "sigmoid", "hard_sigmoid_5" = clip(v / 5 + ½, 0, 1) or "hard_sigmoid_6" = clip(v / 6 + ½, 0, 1).
      gate_activation: σ of the gates i, f, o, r, z, by the same names. Keras before 3 and ONNX call hard_sigmoid_5 hard sigmoid; Keras 3,
        torch and JAX call hard_sigmoid_6 so.
      output_activation: LSTM: ψ, by the same names; `None` is the same as φ.
      peepholes: LSTM: whether the gates see the cell state (Gers & Schmidhuber 2000): i and f the one before the step, o the one after.
      clip: LSTM: the largest magnitude of c', or `None`.
      zoneout: the part of h that stays as it was (Krueger et al. 2017; their c has none here): in training the features that stay are
        drawn in every step, inference takes the expectation.

    Raises `UnsupportedError` for a value that a field does not take, and for fields that do not go together.

    >>> import portnorm as pn
    >>> mine = pn.Variant("mine", norm="rms", terms="sum", groups="gate", biases=("bias",))
    >>> sorted(pn.LSTM(3, 4, norm=mine).params)
    ['bias_l0', 'norm_sum_l0.bias', 'norm_sum_l0.weight', 'weight_hh_l0', 'weight_ih_l0']
    """

    source: str
    norm: Literal["layer", "rms", "batch", "weight"] | None = None
    terms: Literal["separate", "sum", "input", "hidden"] | None = "separate"
    statistics: Literal["step", "sequence"] = "step"
    affine: Literal["shared", "step"] = "shared"
    groups: Literal["all", "candidate", "gate"] = "all"
    cell: Literal["copy", "state"] | None = None
    reset: Literal["after", "before", "sum"] | None = "after"
    update: Literal["keep", "replace"] = "keep"
    recurrence: Literal["matrix", "diagonal"] = "matrix"
    scale: bool = True
    shift: bool = True
    early: tuple[str, ...] = ()
    biases: tuple[str, ...] = ("bias",)
    gain: float = 1.0
    forget_bias: float = 0.0
    runtime_forget_bias: float = 0.0
    eps: float = 1e-5
    eps_place: Literal["variance", "std"] = "variance"
    variance: Literal["biased", "running", "unbiased"] = "biased"
    activation: Function = "tanh"
    gate_activation: Function = "sigmoid"
    output_activation: Function | None = None
    peepholes: bool = False
    clip: float | None = None
    zoneout: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            choice(name, getattr(self, name), allowed)
        if self.groups != "all" and self.norm not in ("layer", "rms"):
            raise UnsupportedError(f"`groups` is {self.groups!r}, which only layer and RMS normalization can have")
        if self.statistics == "sequence" and (self.norm, self.terms, self.cell) != ("batch", "input", None):
            raise UnsupportedError("`statistics` is 'sequence', which is for batch normalization of the input term alone")
        if self.affine == "step" and not self.timed:
            raise UnsupportedError("`affine` is 'step', which is for batch normalization with statistics per step")
        if self.norm in (None, "weight") and self.cell is not None:
            raise UnsupportedError(f"`cell` is {self.cell!r} without a `norm` to normalize it with")
        if self.norm not in (None, "weight") and self.terms is None and self.cell is None:
            raise UnsupportedError(f"`norm` is {self.norm!r}, but `terms` and `cell` leave it no place; name one, or use norm=None")
        if self.eps_place == "std" and self.norm == "weight":
            raise UnsupportedError("`eps_place` is 'std', but weight normalization has no eps")
        if self.recurrence == "diagonal" and self.norm == "weight":
            raise UnsupportedError("`recurrence` is 'diagonal', which has no matrix that `norm` 'weight' could normalize")
        for name, (low, high, expected) in _NUMBERS.items():
            value = getattr(self, name)
            if value is not None or "None" not in expected:
                object.__setattr__(self, name, real_number(name, value, low, high, expected))
        for name in ("scale", "shift", "peepholes"):
            object.__setattr__(self, name, switch(name, getattr(self, name)))

    def __repr__(self) -> str:
        """What differs from the plain cell."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "source"}
        said = [f"{f.name}={own[f.name]!r}" for f in fields(self) if f.name != "source" and own[f.name] != f.default]
        return f"Variant({', '.join([repr(self.source), *said])})"

    def gate_slots(self) -> tuple[str, ...]:
        """The filled slots of the gates."""
        if self.norm in (None, "weight") or self.terms is None:
            return ()
        hidden = ("norm_hh", "norm_hn") if self.reset == "before" else ("norm_hh",)
        return {"separate": ("norm_ih", *hidden), "sum": ("norm_sum",), "input": ("norm_ih",), "hidden": hidden}[self.terms]

    def activations(self) -> tuple[str, str, str]:
        """The functions of the gates, of the candidate, and of the cell state."""
        return self.gate_activation, self.activation, self.output_activation or self.activation

    @property
    def timed(self) -> bool:
        """Whether running statistics belong to time steps."""
        return self.norm == "batch" and self.statistics == "step"

    def where(self) -> str:
        """The terms of the gates that are normalized, in a few words."""
        if self.norm in (None, "weight") or self.terms is None:
            return "–"
        return {"sum": "xW + hU", "separate": "xW and hU", "input": "xW", "hidden": "hU"}[self.terms]


_INFINITE = float("inf")
_NUMBERS: dict[str, tuple[float, float, str]] = {
    "gain": (-_INFINITE, _INFINITE, "a number"),
    "forget_bias": (-_INFINITE, _INFINITE, "a number"),
    "runtime_forget_bias": (-_INFINITE, _INFINITE, "a number"),
    "eps": (0.0, LARGEST, "a number ≥ 0"),
    "clip": (math.nextafter(0.0, 1.0), _INFINITE, "a positive number, or None"),
    "zoneout": (0.0, math.nextafter(1.0, 0.0), "a number ≥ 0 and < 1"),
}
"""From and to where the fields that are numbers may lie."""
_BIASES = (("bias_ih", "bias_hh"), ("bias",), ())
_CHOICES: dict[str, tuple[object, ...]] = {
    "norm": (None, "layer", "rms", "batch", "weight"),
    "terms": ("separate", "sum", "input", "hidden", None),
    "statistics": ("step", "sequence"),
    "affine": ("shared", "step"),
    "groups": ("all", "candidate", "gate"),
    "cell": (None, "copy", "state"),
    "reset": ("after", "before", "sum", None),
    "update": ("keep", "replace"),
    "recurrence": ("matrix", "diagonal"),
    "early": _BIASES,
    "biases": _BIASES,
    "eps_place": ("variance", "std"),
    "variance": ("biased", "running", "unbiased"),
    "activation": FUNCTIONS,
    "gate_activation": FUNCTIONS,
    "output_activation": (None, *FUNCTIONS),
}

_TORCH_BIASES = ("bias_ih", "bias_hh")

NormName = Literal[
    "layer",
    "layer-gates",
    "layer-state",
    "batch",
    "batch-input",
    "batch-input-frame",
    "weight",
    "kiros",
    "kiros-torch",
    "fastrnns",
    "fastrnns-decomposed",
    "haste",
    "tf-addons",
    "tf-contrib-peephole",
    "supercell",
    "sonnet",
    "di-engine",
    "icefall",
    "seba-1511",
    "jihunchoi",
    "olavhn",
    "iassael",
    "hellozgy",
    "mrubio-chavarria",
    "sonnet-batch",
    "sonnet-batch-hidden",
    "dreamer",
    "elektrisches-schaf",
    "li-gru",
    "indrnn",
    "liao-poggio",
]
"""The names that `norm=` takes, of all cells: those of the tables below, as type checkers and editors see them."""

_ANY_CELL: dict[NormName | None, Variant] = {
    "batch-input": Variant(
        source="Laurent et al. 2016 (sequence-wise), Deep Speech 2", norm="batch", terms="input", statistics="sequence", shift=False
    ),
    "batch-input-frame": Variant(source="Laurent et al. 2016 (frame-wise)", norm="batch", terms="input", shift=False),
    "weight": Variant(source="Salimans & Kingma 2016, torch weight_norm of both matrices", norm="weight", biases=_TORCH_BIASES),
}
"""Presets that are the same for every cell."""

VARIANTS: dict[str, dict[NormName | None, Variant]] = {
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
        "layer-state": Variant(source="as TensorFlow Addons, with the ε of torch", norm="layer", cell="state"),
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


_LAYER_SUM: dict[str, Any] = {"norm": "layer", "terms": "sum"}
_BATCH: dict[str, Any] = {"norm": "batch", "cell": "copy", "gain": 0.1}

IMPLEMENTATIONS: dict[str, dict[NormName | None, Variant]] = {
    "LSTM": {
        "kiros": Variant("ryankiros/layer-norm, layers.py (the bias twice)", "layer", cell="copy", early=("bias",)),
        "kiros-torch": Variant("ryankiros/layer-norm, LSTM_LN.lua; DRAW in Ba et al. 2016", "layer", None, cell="copy", eps_place="std"),
        "fastrnns": Variant("PyTorch benchmarks/fastrnns, LayerNormLSTMCell", "layer", cell="state", biases=()),
        "fastrnns-decomposed": Variant("the same with decompose_layernorm", "layer", cell="state", biases=(), eps=0.0),
        "haste": Variant("lmnt-com/haste, LayerNormLSTM", "layer", cell="copy", shift=False, forget_bias=1.0),
        "tf-addons": Variant("TensorFlow Addons, LayerNormLSTMCell", "layer", cell="state", forget_bias=1.0, eps=1e-3),
        "tf-contrib-peephole": Variant(
            "TensorFlow contrib, LayerNormLSTMCell",
            **_LAYER_SUM,
            groups="gate",
            cell="state",
            biases=(),
            runtime_forget_bias=1.0,
            eps=1e-12,
            peepholes=True,
        ),
        "supercell": Variant(
            "hardmaru/supercell, LSTMCell",
            **_LAYER_SUM,
            groups="gate",
            cell="copy",
            early=("bias",),
            biases=(),
            runtime_forget_bias=1.0,
            eps=1e-3,
        ),
        "sonnet": Variant("Sonnet 1, LSTM(use_layer_norm=True)", **_LAYER_SUM, runtime_forget_bias=1.0),
        "di-engine": Variant("DI-engine, ding/torch_utils/network/rnn.py", "layer"),
        "icefall": Variant("k2-fsa/icefall, LayerNormLSTMCell", **_LAYER_SUM, groups="gate", cell="state", early=_TORCH_BIASES, biases=()),
        "seba-1511": Variant(
            "seba-1511/lstms.pth, LayerNormLSTM", "layer", cell="state", early=_TORCH_BIASES, biases=(), eps=1e-6, variance="unbiased"
        ),
        "jihunchoi": Variant("jihunchoi/recurrent-batch-normalization-pytorch", **_BATCH, variance="running"),
        "olavhn": Variant("OlavHN/bnlstm (with t_max=1)", **_BATCH, eps=1e-3),
        "iassael": Variant("iassael/torch-bnlstm (with t_max=1)", **_BATCH, early=("bias",), biases=(), variance="running"),
        "hellozgy": Variant("hellozgy/bnlstm-pytorch (with t_max=1)", "batch", cell="copy", scale=False, shift=False, variance="running"),
        "mrubio-chavarria": Variant("mrubio-chavarria/batch_norm_lstm (whose directions share their norms)", **_BATCH, variance="running"),
        "sonnet-batch": Variant(
            "Sonnet 1, BatchNormLSTM (with t_max=max_unique_stats)", **_BATCH, shift=False, runtime_forget_bias=1.0, eps=1e-3
        ),
        "sonnet-batch-hidden": Variant(
            "Sonnet 1, BatchNormLSTM as it is by default", "batch", "hidden", gain=0.1, shift=False, runtime_forget_bias=1.0, eps=1e-3
        ),
    },
    "GRU": {
        "kiros": Variant("ryankiros/layer-norm, layers.py", "layer", groups="candidate", early=("bias",), biases=()),
        "haste": Variant("lmnt-com/haste, LayerNormGRU", "layer", shift=False, biases=_TORCH_BIASES),
        "dreamer": Variant(
            "Dreamer 2, GRUCell(norm=True); its update gate is 1 − z, less 1",
            **_LAYER_SUM,
            reset="sum",
            early=("bias",),
            biases=(),
            eps=1e-3,
        ),
        "icefall": Variant("k2-fsa/icefall, LayerNormGRUCell", **_LAYER_SUM, groups="gate", early=_TORCH_BIASES, biases=()),
        "elektrisches-schaf": Variant(
            "ElektrischesSchaf/LayerNorm_GRU",
            "layer",
            groups="candidate",
            update="replace",
            scale=False,
            shift=False,
            early=_TORCH_BIASES,
            biases=(),
        ),
        "li-gru": Variant(
            "Ravanelli et al. 2018, SpeechBrain LiGRU (which counts padding)",
            "batch",
            "input",
            "sequence",
            reset=None,
            biases=(),
            variance="running",
            activation="relu",
        ),
    },
    "RNN": {
        "tf-addons": Variant("TensorFlow Addons, LayerNormSimpleRNNCell", **_LAYER_SUM, shift=False),
        "indrnn": Variant("Li et al. 2018; lmnt-com/haste, IndRNN (the paper with ReLU)", recurrence="diagonal"),
        "haste": Variant("lmnt-com/haste, LayerNormIndRNN", "layer", "input", shift=False, recurrence="diagonal"),
        "liao-poggio": Variant("Liao & Poggio 2016, time-specific batch normalization", "batch", "sum", affine="step", biases=()),
    },
}
"""Published implementations that differ from the presets, by cell and name; `norm=` takes these names too."""


def variant_of(norm: NormName | Variant | None, cell: str, takes: dict[str, tuple[object, ...]]) -> Variant:
    """The row of a cell's table that `norm` names, or `norm` itself if it is a row that the cell takes."""
    if isinstance(norm, Variant):
        for name, allowed in takes.items():
            if getattr(norm, name) not in allowed:
                raise UnsupportedError(
                    f"`{name}` is {getattr(norm, name)!r}, which {cell} has no place for; expected one of {', '.join(map(repr, allowed))}"
                )
        return norm
    table: dict[NormName | None, Variant] = {**VARIANTS[cell], **IMPLEMENTATIONS[cell]}
    try:
        return table[norm]
    except (KeyError, TypeError):
        names = ", ".join(repr(name) for name in table)
        raise UnsupportedError(f"`norm` is {norm!r}; expected one of {names} for {cell}, or a portnorm.Variant") from None
