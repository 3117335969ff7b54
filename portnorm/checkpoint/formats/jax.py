"""Libraries on JAX besides flax: equinox, and haiku by the names of its modules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from portnorm.checkpoint.formats.row import NumPyArray, Row, candidate, columns, rows, whole, without

_ONE: dict[str, Any] = {"biases": ("bias",)}


def equinox_rows() -> list[Row]:
    """One bias, and one more inside the reset gate; without bias a cell is as torch stores it. Its norms have the ε of torch."""
    weights = {"weight_ih": rows("weight_ih"), "weight_hh": rows("weight_hh")}
    lstm = Row("equinox", "LSTM", {**weights, "bias": rows("bias")}, None, "ifgo", changes=_ONE)
    gru = Row("equinox", "GRU", {**weights, "bias_ih": rows("bias"), "bias_hh": candidate("bias_n")}, None, "rzn")
    linear = Row("equinox", "Linear", {"weight": whole("weight"), "bias": whole("bias")}, auto=False)
    gain, affine = {"weight": whole("weight")}, {"weight": whole("weight"), "bias": whole("bias")}
    return [
        lstm,
        without(lstm, "bias", biases=()),
        gru,
        without(gru, "bias_ih", "bias_hh", biases=()),
        linear,
        without(linear, "bias"),
        Row("equinox", "LayerNorm", affine, config={"eps": 1e-5}, auto=False),
        Row("equinox", "LayerNorm", gain, config={"eps": 1e-5, "bias": False}, auto=False),
        Row("equinox", "GroupNorm", affine, config={"eps": 1e-5}, auto=False),
        Row("equinox", "RMSNorm", gain, config={"eps": 1e-5}, auto=False),
    ]


def haiku_rows() -> list[Row]:
    """A core keeps its weights in modules of their own, `lstm/linear`. In its GRU z is what the candidate replaces; its RNN has ReLU."""
    joint = {"weight_ih": columns("w", part="input"), "weight_hh": columns("w", part="hidden"), "bias": rows("b")}
    places = (("lstm/linear/",), ("linear/",))
    before = {"biases": ("bias",), "reset": "before", "update": "replace"}
    gru = {"weight_ih": columns("w_i"), "weight_hh": columns("w_h"), "bias": rows("b")}
    sides = (("ih", "linear"), ("hh", "linear_1"))
    vanilla = {f"weight_{side}": columns(f"{module}/w") for side, module in sides}
    around = (("vanilla_rnn/",), ("",))
    biases = {f"bias_{side}": rows(f"{module}/b") for side, module in sides}
    twice = Row("haiku", "RNN", {**vanilla, **biases}, None, "h", around, {"activation": "relu"})
    once = Row("haiku", "RNN", {**vanilla, "bias": rows("linear/b")}, None, "h", around, {**_ONE, "activation": "relu"})
    affine, gain = {"weight": whole("scale"), "bias": whole("offset")}, {"weight": whole("scale")}
    # A module called "linear" is a layer of its own or that of an LSTM: where the shape fits both, `layer=` says which.
    linear = Row("haiku", "Linear", {"weight": whole("w", transposed=True), "bias": whole("b")}, places=(("",), ("linear/",)))
    return [
        Row("haiku", "LSTM", joint, None, "igfo", places, {**_ONE, "runtime_forget_bias": 1.0}),
        Row("haiku", "GRU", gru, None, "zrn", (("gru/",), ("",)), before),
        twice,
        once,
        linear,
        without(linear, "bias"),
        Row("haiku", "LayerNorm", affine, config={"eps": 1e-5}),
        Row("haiku", "LayerNorm", gain, config={"eps": 1e-5, "bias": False}, auto=False),
        Row("haiku", "GroupNorm", affine, config={"eps": 1e-5, "channel_axis": -1}),
        Row("haiku", "InstanceNorm", affine, config={"eps": 1e-5, "affine": True, "channel_axis": -1}),
        Row("haiku", "RMSNorm", gain, config={"eps": 1e-5}, auto=False),
    ]


def haiku_names(arrays: Mapping[str, NumPyArray]) -> dict[str, str]:
    """Keys in which a core called `my_lstm_1` is called `lstm`, where there is one."""
    plain = {key: re.sub(r"(^|/)\w*lstm\w*/linear/", r"\1lstm/linear/", key) for key in arrays}
    return plain if len(set(plain.values())) == len(plain) else {key: key for key in arrays}
