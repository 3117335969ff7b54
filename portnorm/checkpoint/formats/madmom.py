"""madmom: layers by the attributes of their objects, each gate apart, with peepholes, and with a first state that was learned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from portnorm.checkpoint.formats.row import Read, Row, columns, peepholes, rows, whole

_PLACES = (("",), ("fwd_layer/", "bwd_layer/"))
_ONE: dict[str, Any] = {"biases": ("bias",)}


def madmom_rows() -> list[Row]:
    def gates(*names: str) -> dict[str, Read]:
        weights, recurrent, bias = (tuple(f"{name}/{key}" for name in names) for key in ("weights", "recurrent_weights", "bias"))
        return {"weight_ih": columns(*weights), "weight_hh": columns(*recurrent), "bias": rows(*bias)}

    lstm = Row("madmom", "LSTM", gates("input_gate", "forget_gate", "cell", "output_gate"), None, "ifgo", _PLACES, _ONE)
    lstm = replace(lstm, first={"init": "h0", "cell_init": "c0"})
    seen = peepholes(*(f"{gate}/peephole_weights" for gate in ("input_gate", "forget_gate", "output_gate")))
    gru = gates("reset_gate", "update_gate", "cell")
    simple = {"weight_ih": columns("weights"), "weight_hh": columns("recurrent_weights"), "bias": rows("bias")}
    return [
        lstm,
        replace(lstm, reads={**lstm.reads, "peephole": seen}, changes={**_ONE, "peepholes": True}),
        Row("madmom", "GRU", gru, None, "rzn", _PLACES, {**_ONE, "update": "replace"}, first={"hid_init": "h0", "init": "h0"}),
        Row("madmom", "RNN", simple, None, "h", _PLACES, _ONE, first={"init": "h0"}),
        Row("madmom", "Linear", {"weight": whole("weights", transposed=True), "bias": whole("bias")}),
    ]
