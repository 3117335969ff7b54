"""Normalized cells of papers and repositories, each as its source stores it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from portnorm.checkpoint.formats.row import NumPyArray, Read, Row, columns, gain_and_shift, peepholes, rows, whole, without

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
    return Row("cooijmans", "LSTM", reads, "batch", "gfio", first={"h0": "h0", "c0": "c0"}, unused=tuple(names.get("unused", "").split()))


def _jihunchoi() -> Row:
    reads = {"weight_ih": columns("weight_ih"), "weight_hh": columns("weight_hh"), "bias": rows("bias")}
    for slot in ("ih", "hh", "c"):
        reads |= gain_and_shift(f"norm_{slot}", f"bn_{slot}.weight", f"bn_{slot}.bias", by_gate=slot != "c")
        reads |= {f"norm_{slot}.running_{s}": Read((f"bn_{slot}.running_{s}_{{t}}",), by_gate=slot != "c") for s in ("mean", "var")}
    return Row("jihunchoi", "LSTM", reads, "jihunchoi", "fiog", (("",), ("cell_{l}.",)))


def _column(u: NumPyArray) -> NumPyArray:
    if u.ndim != 1:
        raise ValueError(f"expected one axis, not {u.ndim}")
    return u[:, None]


_SCALE = Read(("recurrent_scale",), by_gate=False, then=_column, back=lambda u: u[:, 0])
_INDRNN = {"weight_ih": columns("kernel"), "weight_hh": _SCALE, "bias": rows("bias")}


def _icefall() -> list[Row]:
    """Each gate apart, with biases or without; the LSTM with a projection too."""
    gates, candidate = ("i", "f", "cx", "o"), gain_and_shift("norm_n", "layernorm_n.weight", "layernorm_n.bias", by_gate=False)
    lstm = Row(
        "icefall",
        "LSTM",
        {
            **_CELL,
            **_CELL_BIASES,
            "norm_sum.weight": rows(*(f"layernorm_{gate}.weight" for gate in gates)),
            "norm_sum.bias": rows(*(f"layernorm_{gate}.bias" for gate in gates)),
            **gain_and_shift("norm_c", "layernorm_cy.weight", "layernorm_cy.bias", by_gate=False),
        },
        "icefall",
        "ifgo",
        _STACK,
    )
    projected = replace(lstm, reads={**lstm.reads, "weight_hr": whole("weight_hr")})
    gru = Row(
        "icefall",
        "GRU",
        {
            **_CELL,
            **_CELL_BIASES,
            "norm_sum.weight": rows("layernorm_r.weight", "layernorm_i.weight"),
            "norm_sum.bias": rows("layernorm_r.bias", "layernorm_i.bias"),
            **candidate,
        },
        "icefall",
        "rzn",
        _STACK,
    )
    return [row for kind in (lstm, projected, gru) for row in (kind, without(kind, "bias_ih", "bias_hh", early=()))]


_HASTE_BIASES = {"bias_ih": rows("bias"), "bias_hh": rows("recurrent_bias")}

CELLS = [
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
    Row("haste", "RNN", _INDRNN, "indrnn", "h"),
    Row("haste", "RNN", {**_INDRNN, "norm_ih.weight": rows("gamma", at=0, among=2)}, "haste", "h"),  # γ of hU is stored and not used
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
        {**_CONTRIB, "peephole": peepholes("w_i_diag", "w_f_diag", "w_o_diag")},
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
    *_icefall(),
]
