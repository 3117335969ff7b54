"""paddle.nn: torch's names for recurrent layers, each array twice; its own for norms and for a projection."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import numpy

from portnorm.checkpoint.formats.row import OUR_GATES, NumPyArray, Read, Row, norms, whole, without
from portnorm.checkpoint.formats.torch import BIASES, torch_reads

_PLACES = (("_l{l}", "_l{l}_reverse"), ("",))


def paddle_rows() -> list[Row]:
    found = []
    for layer, gates in OUR_GATES.items():
        plain = Row("paddle", layer, torch_reads(), None, gates, _PLACES)
        kinds = [plain]
        if layer == "LSTM":
            projection = {"weight_hr": Read(("weight_ho{p}",), transposed=True, by_gate=False)}
            kinds.append(replace(plain, reads={**torch_reads(), **projection}))
        found += [kind for row in kinds for kind in (row, without(row, *BIASES, biases=()))]
    linear = Row("paddle", "Linear", {"weight": whole("weight", transposed=True), "bias": whole("bias")}, auto=False)
    layer_norm = {"weight": whole("weight", flat=True), "bias": whole("bias", flat=True)}
    names = {"gain": "weight", "shift": "bias", "mean": "_mean", "var": "_variance", "rms": "weight"}
    batch = {"eps": 1e-5, "momentum": 0.1, "unbiased": False}
    instance = {"weight": whole("scale"), "bias": whole("bias")}
    return [
        *found,
        linear,
        without(linear, "bias"),
        Row("paddle", "Embedding", {"weight": whole("weight")}, auto=False, asked=True),
        *(
            replace(row, auto=False, reads={n: layer_norm[n] for n in row.reads} if row.layer == "LayerNorm" else row.reads)
            for row in norms("paddle", names, 1e-5, 1e-5, batch, 1)
            if row.layer != "InstanceNorm"
        ),
        Row("paddle", "InstanceNorm", instance, config={"eps": 1e-5, "affine": True, "channel_axis": 1}, auto=False),
    ]


def paddle_names(arrays: Mapping[str, NumPyArray]) -> dict[str, str]:
    """Keys as torch has them: `0.cell_bw.weight_ih` is `weight_ih_l0_reverse`.

    Paddle stores each array by both names, of which the second is left out: with a projection those are shifted, `bias_ih_l0_reverse` has
    what is a matrix. One that is equal to none of its layer's stays, and its first name is refused.
    """
    found, cells = {key: key for key in arrays}, dict[str, list[NumPyArray]]()
    for key, array in arrays.items():
        if match := re.fullmatch(r"((?:.*[./])?)(\d+)\.cell(?:_(fw|bw))?\.(\w+)", key):
            head, layer, direction, name = match.groups()
            found[key] = f"{head}{name}_l{layer}{'_reverse' if direction == 'bw' else ''}"
            cells.setdefault(head, []).append(array)
    for key, array in arrays.items():
        match = re.fullmatch(r"((?:.*[./])?)(?:weight|bias)_(?:ih|hh)_l\d+(?:_reverse)?", key)
        if match and any(own.shape == array.shape and numpy.array_equal(own, array) for own in cells.get(match[1], ())):
            del found[key]
    return {key: name if name == key or name not in found else key for key, name in found.items()}
