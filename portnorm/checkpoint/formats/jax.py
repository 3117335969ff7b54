"""Libraries on JAX besides flax: equinox, and haiku by the names of its modules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
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
        Row("equinox", "RMSNorm", gain, config={"eps": 1e-5}, zero=("bias",), auto=False),
    ]


def _flat(a: NumPyArray) -> NumPyArray:
    if a.size != max(a.shape, default=1):
        raise ValueError("expected one axis that is longer than 1")
    return a.reshape(-1)


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
    gain, shift = {"weight": whole("scale")}, {"bias": whole("offset")}
    affine, channels = {**gain, **shift}, {"eps": 1e-5, "channel_axis": -1}
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
        Row("haiku", "LayerNorm", shift, config={"eps": 1e-5}, auto=False),
        *(Row("haiku", "GroupNorm", some, config=channels, auto=some is affine) for some in (affine, gain, shift)),
        *(Row("haiku", "InstanceNorm", some, config={**channels, "affine": True}, auto=some is affine) for some in (affine, gain, shift)),
        *_haiku_batch_norm(),
        Row("haiku", "RMSNorm", gain, config={"eps": 1e-5}, auto=False),
    ]


def _haiku_batch_norm() -> list[Row]:
    """Arrays have an axis for each of x, all but the channels' of length 1; what evaluation takes of a moving average is its `average`."""
    gain, shift = {"weight": whole("scale", then=_flat)}, {"bias": whole("offset", then=_flat)}
    statistics = {f"running_{s}": whole(f"~/{s}_ema/average", then=_flat) for s in ("mean", "var")}
    unused = tuple(f"~/{s}_ema/{part}" for s in ("mean", "var") for part in ("hidden", "counter"))
    config = {"eps": 1e-5, "unbiased": False, "channel_axis": -1}
    row = Row("haiku", "BatchNorm", {**gain, **shift, **statistics}, config=config, unused=unused)
    some = (replace(row, reads={**one, **statistics}) for one in (gain, shift))
    return [row, *some, replace(row, reads=statistics, config={**config, "affine": False})]


def haiku_names(arrays: Mapping[str, NumPyArray]) -> dict[str, str]:
    """Keys in which a core called `my_lstm_1` is called `lstm`, where there is one."""
    plain = {key: re.sub(r"(^|/)\w*lstm\w*/linear/", r"\1lstm/linear/", key) for key in arrays}
    return plain if len(set(plain.values())) == len(plain) else {key: key for key in arrays}
