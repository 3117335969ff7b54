"""Cells of TensorFlow 1, by the names of their scopes: kernels for [x, h], and 1 added to the forget gate at run time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from portnorm.checkpoint.formats.row import NumPyArray, Read, Row, columns, peepholes, rows

_AROUND = (("{}",), ("fw/{}", "bw/{}"), ("cell_{{l}}/{}",), ("cell_{{l}}/bidirectional_rnn/fw/{}", "cell_{{l}}/bidirectional_rnn/bw/{}"))
_NAMES = (("kernel", "bias"), ("weights", "biases"))  # since 1.2, before


def tensorflow_rows() -> list[Row]:
    found = []
    for kernel, bias in _NAMES:
        joint = {"weight_ih": columns(kernel, part="input"), "weight_hh": columns(kernel, part="hidden"), "bias": rows(bias)}
        seen = {"peephole": peepholes("w_i_diag", "w_f_diag", "w_o_diag")}
        for cell, forget in (("basic_lstm_cell", 1.0), ("lstm_cell", 1.0), ("cudnn_compatible_lstm_cell", 0.0)):
            changes = {"biases": ("bias",), "runtime_forget_bias": forget}
            found.append(Row("tensorflow", "LSTM", joint, None, "igfo", _places(cell), changes))
            if cell == "lstm_cell":
                found.append(Row("tensorflow", "LSTM", {**joint, **seen}, None, "igfo", _places(cell), {**changes, "peepholes": True}))
        keys = (f"gates/{kernel}", f"candidate/{kernel}")
        gru: dict[str, Read] = {
            "weight_ih": columns(*keys, part="input"),
            "weight_hh": columns(*keys, part="hidden"),
            "bias": rows(f"gates/{bias}", f"candidate/{bias}"),
        }
        before: dict[str, Any] = {"biases": ("bias",), "reset": "before"}
        found.append(Row("tensorflow", "GRU", gru, None, "rzn", _places("gru_cell"), before))
        found.append(Row("tensorflow", "RNN", joint, None, "h", _places("basic_rnn_cell"), {"biases": ("bias",)}))
    return found


def tensorflow_names(arrays: Mapping[str, NumPyArray]) -> dict[str, str]:
    """Variables without the number of their output. What has a variable's name before its own, `kernel/Adam`, is an optimizer's."""
    plain = {key: key.removesuffix(":0") for key in arrays}
    variables = set(plain.values())
    return {key: name for key, name in plain.items() if name.rpartition("/")[0] not in variables}


def _places(cell: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(template.format(f"{cell}/").replace("{{", "{").replace("}}", "}") for template in one) for one in _AROUND)
