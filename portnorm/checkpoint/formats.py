"""The formats of weights from elsewhere: one row for each layer that a format can hold.

A row says which of portnorm's parameters is under which key, in which order the gates lie there, and whether matrices are transposed.
Names on the left are those inside one direction of a layer (`weight_ih`, `norm_c.bias`); `{p}` in a key stands for the place of a layer
and direction (`_l0_reverse`, `layers.0.cell.`). Gates are written i, f, g, o (Keras and TensorFlow call g c or j) and r, z, n (u and h
elsewhere).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy

NumPyArray = numpy.ndarray[Any, Any]

OUR_GATES = {"LSTM": "ifgo", "GRU": "rzn", "RNN": "h"}


@dataclass(frozen=True)
class Read:
    """Where one array lies: keys, joined along the gates, and how they are turned into ours."""

    keys: tuple[str, ...]
    transposed: bool = False
    """(inputs, gates · hidden) there, (gates · hidden, inputs) here."""
    by_gate: bool = True
    """The gates are in the format's order, and have to be put into ours; several keys are named in ours already."""
    at: int | None = None
    """The entry of the first axis that is meant."""
    part: str | None = None
    """Of a kernel for [x, h]: its "input" or "hidden" rows."""
    then: Callable[[NumPyArray], NumPyArray] | None = None


def rows(*keys: str, **how: Any) -> Read:
    """(gates · hidden, …) as here."""
    return Read(keys, by_gate=len(keys) == 1, **how)


def columns(*keys: str, **how: Any) -> Read:
    """(…, gates · hidden)."""
    return Read(keys, transposed=True, by_gate=len(keys) == 1, **how)


def whole(key: str, **how: Any) -> Read:
    """As it is, without gates."""
    return Read((key,), by_gate=False, **how)


def gain_and_shift(slot: str, gain: str, shift: str, by_gate: bool = True) -> dict[str, Read]:
    """γ and β of a slot."""
    return {f"{slot}.weight": Read((gain,), by_gate=by_gate), f"{slot}.bias": Read((shift,), by_gate=by_gate)}


@dataclass(frozen=True)
class Row:
    """One layer that a format can hold."""

    format: str
    layer: str
    reads: Mapping[str, Read]
    norm: str | None = None
    """Recurrent layers: the name of the variant."""
    gates: str = ""
    places: tuple[tuple[str, ...], ...] = (("",),)
    """What `{p}` can be: alternatives, each the template of the forward direction and, if there can be one, of the reverse."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """What differs from the named variant."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Arguments of the layer that are stored as numbers, and their keys."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the layer that are the format's defaults."""
    unused: tuple[str, ...] = ()
    """Keys that belong to the format and that its computation does not use."""
    zero: tuple[str, ...] = ()
    """Keys of a learned initial state, which a layer of portnorm is given with the call."""

    @property
    def title(self) -> str:
        return self.layer + (f"(norm={self.norm!r})" if self.norm else "")


def _without(row: Row, *names: str, **changes: Any) -> Row:
    """The same without some arrays."""
    reads = {name: read for name, read in row.reads.items() if name not in names}
    return replace(row, reads=reads, changes={**row.changes, **changes})


def _norms(library: str, keys: Mapping[str, str], eps: float, rms_eps: float, batch: Mapping[str, Any], channel_axis: int) -> list[Row]:
    """The normalization layers of a library, which differ in the names of their arrays and in ε."""
    g, b, mean, var, scale = (keys[name] for name in ("gain", "shift", "mean", "var", "rms"))
    affine = {"weight": whole(g), "bias": whole(b)}
    channels = {"channel_axis": channel_axis}
    statistics = {"running_mean": whole(mean), "running_var": whole(var)}
    counter = ("num_batches_tracked",) if library == "torch" else ()
    return [
        Row(library, "BatchNorm", {**affine, **statistics}, config={**batch, **channels}, unused=counter),
        Row(library, "BatchNorm", statistics, config={**batch, **channels, "affine": False}, unused=counter),
        Row(library, "LayerNorm", affine, config={"eps": eps}),
        Row(library, "LayerNorm", {"weight": whole(g)}, config={"eps": eps, "bias": False}),
        Row(library, "GroupNorm", affine, config={"eps": eps, **channels}),
        Row(library, "InstanceNorm", affine, config={"eps": eps, "affine": True, **channels}),
        Row(library, "RMSNorm", {"weight": whole(scale)}, config={"eps": rms_eps}),
    ]


# -- torch ---------------------------------------------------------------------------------------------------------------------------------

_TORCH_PLACES = (("_l{l}", "_l{l}_reverse"),)
_TORCH = {f"{kind}_{side}": rows(f"{kind}_{side}{{p}}") for kind in ("weight", "bias") for side in ("ih", "hh")}
_TORCH_BIASES = ("bias_ih", "bias_hh")


def _torch() -> list[Row]:
    found = []
    for layer, gates in OUR_GATES.items():
        plain = Row("torch", layer, _TORCH, None, gates, _TORCH_PLACES)
        found += [plain, _without(plain, *_TORCH_BIASES, biases=())]
        if layer == "LSTM":
            projected = replace(plain, reads={**_TORCH, "weight_hr": Read(("weight_hr{p}",), by_gate=False)})
            found += [projected, _without(projected, *_TORCH_BIASES, biases=())]
        for g, v in (("{w}_g", "{w}_v"), ("parametrizations.{w}.original0", "parametrizations.{w}.original1")):
            normed = {name: read for name, read in _TORCH.items() if name.startswith("bias")}
            for side in ("ih", "hh"):
                w = f"weight_{side}{{p}}"
                normed |= {f"weight_{side}.{part}": rows(key.replace("{w}", w)) for part, key in (("g", g), ("v", v))}
            found.append(Row("torch", layer, normed, "weight", gates, _TORCH_PLACES))
    linear = Row("torch", "Linear", {"weight": whole("weight"), "bias": whole("bias")})
    names = {"gain": "weight", "shift": "bias", "mean": "running_mean", "var": "running_var", "rms": "weight"}
    batch = {"eps": 1e-5, "momentum": 0.1, "unbiased": True}
    return [*found, linear, _without(linear, "bias"), *_norms("torch", names, 1e-5, float(numpy.finfo("float32").eps), batch, 1)]


# -- Keras 3: TensorFlow's layout, and the order of a layer's variables in an .h5 file -----------------------------------------------------

_KERAS_PLACES = (("",), ("forward_layer/", "backward_layer/"))


def _keras() -> list[Row]:
    weights = {"weight_ih": columns("kernel"), "weight_hh": columns("recurrent_kernel")}
    bias, both = {"bias": rows("bias")}, {"bias_ih": rows("bias", at=0), "bias_hh": rows("bias", at=1)}
    found = []
    for layer, gates in (("LSTM", "ifgo"), ("RNN", "h")):
        row = Row("keras", layer, {**weights, **bias}, None, gates, _KERAS_PLACES, {"biases": ("bias",)})
        found += [row, _without(row, "bias", biases=())]
    after = Row("keras", "GRU", {**weights, **both}, None, "zrn", _KERAS_PLACES)
    before = Row("keras", "GRU", {**weights, **bias}, None, "zrn", _KERAS_PLACES, {"reset": "before", "biases": ("bias",)})
    found += [after, before]
    linear = Row("keras", "Linear", {"weight": whole("kernel", transposed=True), "bias": whole("bias")})
    names = {"gain": "gamma", "shift": "beta", "mean": "moving_mean", "var": "moving_variance", "rms": "scale"}
    batch = {"eps": 1e-3, "momentum": 0.01, "unbiased": False}
    return [*found, linear, _without(linear, "bias"), *_norms("keras", names, 1e-3, 1e-6, batch, -1)]


_KERAS_VARIABLES = {
    (2, 2, 1): ("kernel", "recurrent_kernel", "bias"),
    (2, 2, 2): ("kernel", "recurrent_kernel", "bias"),
    (2, 2): ("kernel", "recurrent_kernel"),
    (2, 1): ("kernel", "bias"),
    (2,): ("kernel",),
    (1, 1, 1, 1): ("gamma", "beta", "moving_mean", "moving_variance"),
    (1, 1): ("gamma", "beta"),
    (1,): ("scale",),
}


def _keras_names(arrays: Mapping[str, NumPyArray]) -> dict[str, str]:
    """Plain names by key: without cells and ":0", and with names for the numbered variables of an .h5 file."""
    groups: dict[str, list[int]] = {}
    for key in arrays:
        if match := re.fullmatch(r"(.*?)vars/(\d+)", key):
            groups.setdefault(match[1], []).append(int(match[2]))
    numbered = {}
    for parent, numbers in groups.items():
        keys = [f"{parent}vars/{n}" for n in sorted(numbers)]
        for key, name in zip(keys, _KERAS_VARIABLES.get(tuple(arrays[k].ndim for k in keys), ()), strict=False):
            numbered[key] = f"{parent}{name}"
    found = {}
    for key in arrays:
        name = numbered.get(key, key).removesuffix(":0")
        name = re.sub(r"(^|/)(\w*_)?cell(_\d+)?/", r"\1", name)
        found[key] = re.sub(r"(^|/)(forward|backward)_[^/]*/", r"\1\2_layer/", name)
    return found


# -- flax ----------------------------------------------------------------------------------------------------------------------------------


def _flax() -> list[Row]:
    def split(side: str, gates: str, kind: str = "kernel") -> tuple[str, ...]:
        return tuple(f"{side}{gate}/{kind}" for gate in gates)

    def lstm(forget: str) -> Row:
        inputs = tuple(key.replace("if/", forget) for key in split("i", "ifgo"))
        reads = {"weight_ih": columns(*inputs), "weight_hh": columns(*split("h", "ifgo"))}
        return Row("flax", "LSTM", {**reads, "bias": rows(*split("h", "ifgo", "bias"))}, None, "ifgo", changes={"biases": ("bias",)})

    r = "rzn"
    zeros = {"bias_hh": Read(("hn/bias",), by_gate=False, then=lambda b: numpy.concatenate([numpy.zeros((2 * b.shape[0],), b.dtype), b]))}
    gru = {"weight_ih": columns(*split("i", r)), "weight_hh": columns(*split("h", r)), "bias_ih": rows(*split("i", r, "bias")), **zeros}
    dense = {"weight_ih": columns("dense_i/kernel"), "weight_hh": columns("dense_h/kernel")}
    simple = {"weight_ih": columns("i/kernel"), "weight_hh": columns("h/kernel"), "bias": rows("i/bias")}
    one: dict[str, Any] = {"biases": ("bias",)}
    names = {"gain": "scale", "shift": "bias", "mean": "mean", "var": "var", "rms": "scale"}
    batch = {"eps": 1e-5, "momentum": 0.01, "unbiased": False}
    return [
        lstm("if/"),
        lstm("if_/"),  # nnx: `if` is a keyword
        Row("flax", "GRU", gru, None, "rzn"),
        Row("flax", "RNN", simple, None, "h", changes=one),
        Row("flax", "LSTM", {**dense, "bias": rows("dense_h/bias")}, None, "ifgo", changes=one),
        Row("flax", "GRU", {**dense, "bias": rows("dense_i/bias")}, None, "rzn", changes=one),
        Row("flax", "RNN", {**dense, "bias": rows("dense_i/bias")}, None, "h", changes=one),
        Row("flax", "Linear", {"weight": whole("kernel", transposed=True), "bias": whole("bias")}),
        *_norms("flax", names, 1e-6, 1e-6, batch, -1),
    ]


def _flax_names(arrays: Mapping[str, NumPyArray]) -> dict[str, str]:
    """Keys by "/", without the collections and the cell that linen puts around them."""
    return {key: re.sub(r"(^|/)(params|batch_stats|cell)/", r"\1", key.replace(".", "/")) for key in arrays}


# -- cells of papers and repositories ------------------------------------------------------------------------------------------------------

_KERNELS = {"weight_ih": columns("kernel"), "weight_hh": columns("recurrent_kernel")}
_JOINT = {"weight_ih": columns("kernel", part="input"), "weight_hh": columns("kernel", part="hidden")}
_STACK = (("",), ("layers.{l}.cell.",), ("layers.{l}.directions.0.cell.", "layers.{l}.directions.1.cell."))
_CELL_BIASES = {"bias_ih": rows("bias_ih"), "bias_hh": rows("bias_hh")}
_CELL = {"weight_ih": rows("weight_ih"), "weight_hh": rows("weight_hh")}
_TF_GATES = ("input", "forget", "transform", "output")
_CONTRIB = {
    **_JOINT,
    "norm_sum.weight": rows(*(f"{gate}/gamma" for gate in _TF_GATES)),
    "norm_sum.bias": rows(*(f"{gate}/beta" for gate in _TF_GATES)),
    **gain_and_shift("norm_c", "state/gamma", "state/beta", by_gate=False),
}
_SONNET_STATISTICS = {
    f"norm_{slot}.running_{ours}": Read((f"batch_norm_{theirs}/batch_norm/moving_{name}",), by_gate=slot != "c", at=0)
    for slot, theirs in (("ih", "x"), ("hh", "h"), ("c", "c"))
    for ours, name in (("mean", "mean"), ("var", "variance"))
}
_SONNET_KERNELS = {"weight_ih": columns("w_gates_X"), "weight_hh": columns("w_gates_H"), "bias": rows("b_gates")}
_COOIJMANS_SLOTS = {"norm_ih": "b", "norm_hh": "a", "norm_c": "c"}


def _cooijmans(names: Mapping[str, str]) -> Row:
    reads = {"weight_ih": columns("Wx"), "weight_hh": columns("Wa"), "bias": rows(names["bias"])}
    for slot, letter in _COOIJMANS_SLOTS.items():
        by_gate = slot != "norm_c"
        reads[f"{slot}.weight"] = Read((names["gain"].format(letter),), by_gate=by_gate)
        for s in ("mean", "var"):
            reads[f"{slot}.running_{s}"] = Read((f"{letter}_{s}",), by_gate=by_gate)
    reads["norm_c.bias"] = whole(names["shift"])
    return Row("cooijmans", "LSTM", reads, "batch", "gfio", zero=("h0", "c0"), unused=tuple(names.get("unused", "").split()))


def _jihunchoi() -> Row:
    reads = {"weight_ih": columns("weight_ih"), "weight_hh": columns("weight_hh"), "bias": rows("bias")}
    for slot in ("ih", "hh", "c"):
        reads |= gain_and_shift(f"norm_{slot}", f"bn_{slot}.weight", f"bn_{slot}.bias", by_gate=slot != "c")
        reads |= {f"norm_{slot}.running_{s}": Read((f"bn_{slot}.running_{s}_{{t}}",), by_gate=slot != "c") for s in ("mean", "var")}
    return Row("jihunchoi", "LSTM", reads, "jihunchoi", "fiog", (("",), ("cell_{l}.",)))


_HASTE_BIASES = {"bias_ih": rows("bias"), "bias_hh": rows("recurrent_bias")}

_CELLS = [
    Row(
        "torch-fastrnns",
        "LSTM",
        {
            **_CELL,
            **gain_and_shift("norm_ih", "layernorm_i.weight", "layernorm_i.bias"),
            **gain_and_shift("norm_hh", "layernorm_h.weight", "layernorm_h.bias"),
            **gain_and_shift("norm_c", "layernorm_c.weight", "layernorm_c.bias", by_gate=False),
        },
        "fastrnns",
        "ifgo",
        _STACK,
    ),
    Row("torch-fastrnns", "LSTM", {**_CELL, **_CELL_BIASES}, None, "ifgo", _STACK),
    Row("haste", "LSTM", {**_KERNELS, "bias": rows("bias")}, None, "igfo", changes={"biases": ("bias",)}),
    Row("haste", "GRU", {**_KERNELS, **_HASTE_BIASES}, None, "zrn"),
    Row(
        "haste",
        "LSTM",
        {
            **_KERNELS,
            "bias": rows("bias"),
            "norm_ih.weight": rows("gamma", at=0),
            "norm_hh.weight": rows("gamma", at=1),
            **gain_and_shift("norm_c", "gamma_h", "beta_h", by_gate=False),
        },
        "haste",
        "igfo",
    ),
    Row(
        "haste",
        "GRU",
        {**_KERNELS, **_HASTE_BIASES, "norm_ih.weight": rows("gamma", at=0), "norm_hh.weight": rows("gamma", at=1)},
        "haste",
        "zrn",
    ),
    Row("tf-contrib", "LSTM", _CONTRIB, "layer-gates", "igfo"),
    Row(
        "tf-contrib",
        "LSTM",
        {**_CONTRIB, "peephole": rows("w_i_diag", "w_f_diag", "w_o_diag", then=lambda p: p.reshape(3, -1))},
        "tf-contrib-peephole",
        "igfo",
        unused=("bias",),
    ),
    Row(
        "tf-addons",
        "LSTM",
        {
            **_KERNELS,
            "bias": rows("bias"),
            **gain_and_shift("norm_ih", "kernel_norm/gamma", "kernel_norm/beta"),
            **gain_and_shift("norm_hh", "recurrent_norm/gamma", "recurrent_norm/beta"),
            **gain_and_shift("norm_c", "state_norm/gamma", "state_norm/beta", by_gate=False),
        },
        "tf-addons",
        "ifgo",
    ),
    Row("tf-addons", "RNN", {**_KERNELS, "bias": rows("bias"), "norm_sum.weight": rows("layernorm/gamma")}, "tf-addons", "h"),
    Row(
        "kiros",
        "LSTM",
        {
            "weight_ih": columns("_W"),
            "weight_hh": columns("_U"),
            "bias": rows("_b"),
            **gain_and_shift("norm_ih", "_s1", "_b1"),
            **gain_and_shift("norm_hh", "_s2", "_b2"),
            **gain_and_shift("norm_c", "_s3", "_b3", by_gate=False),
        },
        "kiros",
        "ifog",
    ),
    Row(
        "kiros",
        "GRU",
        {
            "weight_ih": columns("_W", "_Wx"),
            "weight_hh": columns("_U", "_Ux"),
            "bias": rows("_b", "_bx"),
            "norm_ih.weight": rows("_s1", "_s2"),
            "norm_ih.bias": rows("_b1", "_b2"),
            "norm_hh.weight": rows("_s3", "_s4"),
            "norm_hh.bias": rows("_b3", "_b4"),
        },
        "kiros",
        "rzn",
    ),
    Row(
        "supercell",
        "LSTM",
        {
            "weight_ih": columns("W_xh"),
            "weight_hh": columns("W_hh_i"),
            "bias": rows("bias"),
            **gain_and_shift("norm_sum", "ln/ln_gamma", "ln/ln_beta"),
            **gain_and_shift("norm_c", "ln_c/ln_gamma", "ln_c/ln_beta", by_gate=False),
        },
        "supercell",
        "igfo",
    ),
    _cooijmans({"bias": "ab_betas", "gain": "{}_gammas", "shift": "c_betas"}),
    _cooijmans({"bias": "bn_a.betas", "gain": "bn_{}.gammas", "shift": "bn_c.betas", "unused": "bn_b.betas"}),
    _jihunchoi(),
    Row(
        "sonnet",
        "LSTM",
        {
            "weight_ih": columns("w_gates", part="input"),
            "weight_hh": columns("w_gates", part="hidden"),
            "bias": rows("b_gates"),
            **gain_and_shift("norm_sum", "layer_norm/gamma", "layer_norm/beta"),
        },
        "sonnet",
        "igfo",
    ),
    Row(
        "sonnet",
        "LSTM",
        {"weight_ih": columns("w_gates", part="input"), "weight_hh": columns("w_gates", part="hidden"), "bias": rows("b_gates")},
        None,
        "igfo",
        changes={"biases": ("bias",), "runtime_forget_bias": 1.0},
    ),
    Row(
        "sonnet",
        "LSTM",
        {
            **_SONNET_KERNELS,
            "norm_ih.weight": rows("gamma_x"),
            "norm_hh.weight": rows("gamma_h"),
            **gain_and_shift("norm_c", "gamma_c", "beta_c", by_gate=False),
            **_SONNET_STATISTICS,
        },
        "sonnet-batch",
        "igfo",
    ),
    Row(
        "sonnet",
        "LSTM",
        {
            **_SONNET_KERNELS,
            "norm_hh.weight": rows("gamma_h"),
            **{name: read for name, read in _SONNET_STATISTICS.items() if name.startswith("norm_hh")},
        },
        "sonnet-batch-hidden",
        "igfo",
    ),
    Row(
        "icefall",
        "LSTM",
        {
            **_CELL,
            **_CELL_BIASES,
            "norm_sum.weight": rows(*(f"layernorm_{gate}.weight" for gate in ("i", "f", "cx", "o"))),
            "norm_sum.bias": rows(*(f"layernorm_{gate}.bias" for gate in ("i", "f", "cx", "o"))),
            **gain_and_shift("norm_c", "layernorm_cy.weight", "layernorm_cy.bias", by_gate=False),
        },
        "icefall",
        "ifgo",
        _STACK,
    ),
    Row(
        "icefall",
        "GRU",
        {
            **_CELL,
            **_CELL_BIASES,
            "norm_sum.weight": rows("layernorm_r.weight", "layernorm_i.weight"),
            "norm_sum.bias": rows("layernorm_r.bias", "layernorm_i.bias"),
            **gain_and_shift("norm_n", "layernorm_n.weight", "layernorm_n.bias", by_gate=False),
        },
        "icefall",
        "rzn",
        _STACK,
    ),
]


# -- ONNX nodes ----------------------------------------------------------------------------------------------------------------------------


def _onnx() -> list[Row]:
    found = []
    for operator, gates, reset in (("LSTM", "iofg", "after"), ("GRU", "zrn", "after"), ("GRU", "zrn", "before"), ("RNN", "h", "after")):
        hidden = "R before reset" if reset == "before" else "R"
        reads = {"weight_ih": rows("W"), "weight_hh": rows(hidden), "bias_ih": rows("Wb"), "bias_hh": rows("Rb")}
        row = Row("onnx", operator, reads, None, gates, ((f"{operator}/0/", f"{operator}/1/"),), {"reset": reset})
        found += [row, _without(row, *_TORCH_BIASES, biases=())]
        if operator == "LSTM":
            seen = {"peephole": whole("P", then=lambda p: p.reshape(3, -1)[[0, 2, 1]])}
            found.append(replace(row, reads={**reads, **seen}, changes={"reset": reset, "peepholes": True}))
    affine = {"weight": whole("scale"), "bias": whole("bias")}
    statistics = {"running_mean": whole("mean"), "running_var": whole("var")}
    for operator, layer, norm_reads, config in (
        ("BatchNormalization", "BatchNorm", {**affine, **statistics}, {"unbiased": False}),
        ("LayerNormalization", "LayerNorm", affine, {}),
        ("LayerNormalization", "LayerNorm", {"weight": whole("scale")}, {"bias": False}),
        ("InstanceNormalization", "InstanceNorm", affine, {"affine": True}),
        ("GroupNormalization", "GroupNorm", affine, {}),
        ("RMSNormalization", "RMSNorm", {"weight": whole("scale")}, {}),
    ):
        settings = {"eps": "epsilon", **({"num_groups": "num_groups"} if layer == "GroupNorm" else {})}
        places = ((f"{operator}/",),)
        found.append(Row("onnx", layer, norm_reads, places=places, settings=settings, config=config))
    return found


ROWS: list[Row] = [*_torch(), *_keras(), *_flax(), *_CELLS, *_onnx()]

FORMATS: tuple[str, ...] = tuple(dict.fromkeys(row.format for row in ROWS))
"""Names of the formats."""


def _tensorflow_names(arrays: Mapping[str, NumPyArray]) -> dict[str, str]:
    """Names of variables without the number of their output."""
    return {key: key.removesuffix(":0") for key in arrays}


NAMES: dict[str, Callable[[Mapping[str, NumPyArray]], dict[str, str]]] = {
    "keras": _keras_names,
    "flax": _flax_names,
    **dict.fromkeys(("tf-contrib", "tf-addons", "supercell", "sonnet"), _tensorflow_names),
}
"""Formats whose keys have to be made plain before a row is looked for."""
