"""flax: cells and norms of linen and nnx."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy

from portnorm.checkpoint.formats.row import NumPyArray, Read, Row, columns, norms, rows, whole


def flax_rows() -> list[Row]:
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
        *norms("flax", names, 1e-6, 1e-6, batch, -1),
    ]


def flax_names(arrays: Mapping[str, NumPyArray]) -> dict[str, str]:
    """Keys by "/", without the collections and the cell that linen puts around them."""
    return {key: re.sub(r"(^|/)(params|batch_stats|cell)/", r"\1", key.replace(".", "/")) for key in arrays}
