"""torch.nn: its recurrent layers and cells, also with weight normalization or a projection, its norms, its linear layer."""

from __future__ import annotations

from dataclasses import replace

import numpy

from portnorm.checkpoint.formats.row import OUR_GATES, NumPyArray, Read, Row, norms, rows, tracking, unit_offset, whole, without

_TORCH_PLACES = (("_l{l}", "_l{l}_reverse"), ("",))
_SIDES = ("ih", "hh")
_WEIGHT_NORMS = (("{w}_g", "{w}_v"), ("parametrizations.{w}.original0", "parametrizations.{w}.original1"))
BIASES = ("bias_ih", "bias_hh")


def torch_reads(weight: str = "weight", bias: str = "bias") -> dict[str, Read]:
    """The four arrays of a layer and direction."""
    return {f"{ours}_{side}": rows(f"{theirs}_{side}{{p}}") for ours, theirs in (("weight", weight), ("bias", bias)) for side in _SIDES}


def torch_rows() -> list[Row]:
    found = []
    for layer, gates in OUR_GATES.items():
        plain = Row("torch", layer, torch_reads(), None, gates, _TORCH_PLACES)
        short = replace(plain, reads=torch_reads("w", "b"), places=(("",),), separators="./_")
        kinds = [plain, short]
        if layer == "LSTM":
            kinds.append(replace(plain, reads={**torch_reads(), "weight_hr": Read(("weight_hr{p}",), by_gate=False)}))
        for g, v in _WEIGHT_NORMS:
            keys = {side: tuple(key.replace("{w}", f"weight_{side}{{p}}") for key in (g, v)) for side in _SIDES}
            both = {f"weight_{side}.{part}": rows(key) for side in _SIDES for part, key in zip("gv", keys[side], strict=True)}
            kinds.append(Row("torch", layer, {**both, **_biases(plain)}, "weight", gates, _TORCH_PLACES))
            kinds += [replace(plain, reads={**plain.reads, f"weight_{s}": Read(keys[s], join=normalized)}) for s in _SIDES]
        found += [kind for row in kinds for kind in (row, without(row, *BIASES, biases=()))]
    linear = Row("torch", "Linear", {"weight": whole("weight"), "bias": whole("bias")})
    linears = [linear, *(_normalized_linear(linear, g, v) for g, v in _WEIGHT_NORMS)]
    names = {"gain": "weight", "shift": "bias", "mean": "running_mean", "var": "running_var", "rms": "weight"}
    batch = {"eps": 1e-5, "momentum": 0.1, "unbiased": True}
    found += [row for line in linears for row in (line, without(line, "bias"))]
    normalizing = norms("torch", names, 1e-5, _rms_eps, batch, 1)
    instance = [tracking(row) for row in normalizing if row.layer == "BatchNorm"]
    return [*found, *normalizing, *instance]


def unit_offset_rows() -> list[Row]:
    """Norms that multiply by 1 + weight: Gemma's, and those of the xlstm package. Their names are those of torch."""
    gemma = Row("gemma", "RMSNorm", {"weight": unit_offset("weight")}, config={"eps": 1e-6}, auto=False)
    layer = Row("xlstm", "LayerNorm", {"weight": unit_offset("weight"), "bias": whole("bias")}, config={"eps": 1e-5}, auto=False)
    alone = replace(layer, reads={"weight": unit_offset("weight")}, config={"eps": 1e-5, "bias": False})
    return [gemma, layer, alone, replace(gemma, format="xlstm")]


def normalized(g: NumPyArray, v: NumPyArray) -> NumPyArray:
    """g · v / ‖v‖, the norm over the axes along which g has one entry (torch's `dim`)."""
    if v.ndim != 2 or g.ndim not in (0, 2):
        raise ValueError("expected a matrix and lengths with as many axes")
    axes = tuple(k for k in range(v.ndim) if g.size == 1 or g.shape[k] == 1)
    weight: NumPyArray = g / numpy.sqrt(numpy.sum(v * v, axis=axes, keepdims=True)) * v
    return weight.astype(v.dtype, copy=False)


def _normalized_linear(row: Row, g: str, v: str) -> Row:
    keys = tuple(key.replace("{w}", "weight") for key in (g, v))
    return replace(row, reads={**row.reads, "weight": Read(keys, by_gate=False, join=normalized)})


def _biases(row: Row) -> dict[str, Read]:
    return {name: read for name, read in row.reads.items() if name in BIASES}


def _rms_eps(dtype: str) -> float:
    """That of torch's RMSNorm without an `eps`: of the type that it computes in."""
    return float(numpy.finfo("float64" if dtype == "float64" else "float32").eps)
