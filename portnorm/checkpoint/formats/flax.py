"""flax: cells and norms of linen and nnx."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from portnorm.checkpoint.formats.row import NumPyArray, Row, candidate, columns, norms, rows, whole, without
from portnorm.checkpoint.stored import Stored

_PLACES = (("",), ("forward_rnn/", "backward_rnn/"))
_STATE_OF_RANDOM = r"(^|/)rngs/([^/]+/)?(key|count)$"


def flax_rows() -> list[Row]:
    def split(side: str, gates: str, kind: str = "kernel") -> tuple[str, ...]:
        return tuple(f"{side}{gate}/{kind}" for gate in gates)

    def lstm(forget: str) -> Row:
        inputs = tuple(key.replace("if/", forget) for key in split("i", "ifgo"))
        reads = {"weight_ih": columns(*inputs), "weight_hh": columns(*split("h", "ifgo"))}
        return Row("flax", "LSTM", {**reads, "bias": rows(*split("h", "ifgo", "bias"))}, None, "ifgo", _PLACES, {"biases": ("bias",)})

    r = "rzn"
    inner = {"bias_hh": candidate("hn/bias")}
    gru = {"weight_ih": columns(*split("i", r)), "weight_hh": columns(*split("h", r)), "bias_ih": rows(*split("i", r, "bias")), **inner}
    dense = {"weight_ih": columns("dense_i/kernel"), "weight_hh": columns("dense_h/kernel")}
    simple = {"weight_ih": columns("i/kernel"), "weight_hh": columns("h/kernel"), "bias": rows("i/bias")}
    one: dict[str, Any] = {"biases": ("bias",)}
    names = {"gain": "scale", "shift": "bias", "mean": "mean", "var": "var", "rms": "scale"}
    batch = {"eps": 1e-5, "momentum": 0.01, "unbiased": False}
    linear = Row("flax", "Linear", {"weight": whole("kernel", transposed=True), "bias": whole("bias")})
    return [
        lstm("if/"),
        lstm("if_/"),  # nnx: `if` is a keyword
        Row("flax", "GRU", gru, None, "rzn", _PLACES),
        Row("flax", "RNN", simple, None, "h", _PLACES, one),
        Row("flax", "LSTM", {**dense, "bias": rows("dense_h/bias")}, None, "ifgo", _PLACES, one),
        Row("flax", "GRU", {**dense, "bias": rows("dense_i/bias")}, None, "rzn", _PLACES, one),
        Row("flax", "RNN", {**dense, "bias": rows("dense_i/bias")}, None, "h", _PLACES, one),
        linear,
        without(linear, "bias"),
        *norms("flax", names, 1e-6, 1e-6, batch, -1),
    ]


def flax_names(arrays: Mapping[str, NumPyArray]) -> dict[str, str]:
    """Keys by "/", without the collections and the cell that linen puts around them, the "value" of a variable of nnx, and the state of
    random numbers beside."""
    plain = {key: re.sub(r"/value$", "", key.replace(".", "/")) for key in arrays}
    return {key: re.sub(r"(^|/)(params|batch_stats|cell)/", r"\1", n) for key, n in plain.items() if not re.search(_STATE_OF_RANDOM, n)}


_WRAPPED = re.compile(r"(^|[./])layer_instance[./]kernel(/value)?$")
_WRAPPING = re.compile(
    r"(^|[./])(layer_instance[./]kernel[./](scale|u|sigma)|scales[./].*kernel.*|batch_stats[./]\(.*kernel.*\))(/value)?$"
)


def flax_pieces(arrays: Mapping[str, Stored]) -> dict[str, Stored]:
    """Without what WeightNorm and SpectralNorm make a kernel of, which is named: it is another than the one that is stored."""
    wrapped = [key for key in arrays if _WRAPPED.search(key)]
    if not wrapped:
        return dict(arrays)
    found = {key: a for key, a in arrays.items() if not _WRAPPING.search(key)}
    for key in wrapped:
        a = arrays[key]
        problem = (
            f"{key!r} is normalized by the WeightNorm or SpectralNorm around its layer before it is used; give the kernel that this makes, "
            "by the names of the layer alone"
        )
        found[key] = Stored(key, lambda a=a: (a.shape, a.dtype), a.read, said=a.said, problem=problem)  # type: ignore[misc]
    return found
