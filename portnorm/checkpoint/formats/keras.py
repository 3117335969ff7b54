"""Keras 3: TensorFlow's layout, by variable names or by the numbers that variables have in an .h5 file."""

from __future__ import annotations

import re
from collections.abc import Mapping

from portnorm.checkpoint.formats.row import NumPyArray, Row, columns, norms, rows, whole, without

_KERAS_PLACES = (("",), ("forward_layer/", "backward_layer/"))


def keras_rows() -> list[Row]:
    weights = {"weight_ih": columns("kernel"), "weight_hh": columns("recurrent_kernel")}
    bias, both = {"bias": rows("bias")}, {"bias_ih": rows("bias", at=0), "bias_hh": rows("bias", at=1)}
    found = []
    for layer, gates in (("LSTM", "ifgo"), ("RNN", "h")):
        row = Row("keras", layer, {**weights, **bias}, None, gates, _KERAS_PLACES, {"biases": ("bias",)})
        found += [row, without(row, "bias", biases=())]
    after = Row("keras", "GRU", {**weights, **both}, None, "zrn", _KERAS_PLACES)
    before = Row("keras", "GRU", {**weights, **bias}, None, "zrn", _KERAS_PLACES, {"reset": "before", "biases": ("bias",)})
    # Without a bias the arrays do not say where the reset gate is: where Keras has it by default, unless `reset="before"` is given.
    found += [after, before, without(after, "bias_ih", "bias_hh", biases=())]
    linear = Row("keras", "Linear", {"weight": whole("kernel", transposed=True), "bias": whole("bias")})
    names = {"gain": "gamma", "shift": "beta", "mean": "moving_mean", "var": "moving_variance", "rms": "scale"}
    batch = {"eps": 1e-3, "momentum": 0.01, "unbiased": False}
    return [*found, linear, without(linear, "bias"), *norms("keras", names, 1e-3, 1e-6, batch, -1)]


def keras_layernorm_rows() -> list[Row]:
    """The package keras-layernorm-rnn: γ after the sum, of each gate apart, the bias after it; gates are hard sigmoids by default."""
    kernels = {"weight_ih": columns("kernel"), "weight_hh": columns("recurrent_kernel")}
    bias, name = {"bias": rows("bias")}, "keras-layernorm-rnn"
    gains = rows(*(f"layer_normalization{n}/gamma" for n in ("", "_1", "_2", "_3")))
    normed = {"norm": "layer", "terms": "sum", "groups": "gate", "shift": False, "biases": ("bias",), "gate_activation": "hard_sigmoid_5"}
    lstm = Row(name, "LSTM", {**kernels, "norm_sum.weight": gains, **bias}, None, "ifgo", _KERAS_PLACES, normed)
    rnn = Row(name, "RNN", {**kernels, "norm_sum.weight": rows("layer_normalization/gamma"), **bias}, "tf-addons", "h", _KERAS_PLACES)
    return [row for kind in (lstm, rnn) for row in (kind, without(kind, "bias", biases=()))]


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


def keras_names(arrays: Mapping[str, NumPyArray]) -> dict[str, str]:
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
