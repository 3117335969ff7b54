"""torch.nn: its recurrent layers and cells, also with weight normalization or a projection, its norms, its linear layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy

from portnorm.checkpoint.formats.row import OUR_GATES, NumPyArray, Read, Row, norms, rows, tracking, unit_offset, whole, without
from portnorm.checkpoint.stored import Stored
from portnorm.errors import CheckpointError

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
        found += [kind for row in kinds for kind in (row, without(row, *BIASES, biases=()))]
    linear = Row("torch", "Linear", {"weight": whole("weight"), "bias": whole("bias")})
    names = {"gain": "weight", "shift": "bias", "mean": "running_mean", "var": "running_var", "rms": "weight"}
    batch = {"eps": 1e-5, "momentum": 0.1, "unbiased": True}
    linears = [linear, *(_normalized_linear(linear, g, v) for g, v in _WEIGHT_NORMS)]
    found += [row for line in linears for row in (line, without(line, "bias"))]
    normalizing = norms("torch", names, 1e-5, None, batch, 1)
    instance = [tracking(row) for row in normalizing if row.layer == "BatchNorm"]
    table = Row("torch", "Embedding", {"weight": whole("weight")}, asked=True)
    return [*found, *normalizing, *instance, table]


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
    if v.size == 0 or numpy.broadcast_shapes(g.shape, v.shape) != v.shape:
        raise ValueError("expected a matrix with entries, and a length for each row, each column, or all")
    axes = tuple(k for k in range(v.ndim) if g.size == 1 or g.shape[k] == 1)
    wide = v.astype(numpy.result_type(v.dtype, numpy.float32))
    weight: NumPyArray = g / numpy.sqrt(numpy.sum(wide * wide, axis=axes, keepdims=True)) * wide
    return weight.astype(v.dtype, copy=False)


def _normalized_linear(row: Row, g: str, v: str) -> Row:
    keys = tuple(key.replace("{w}", "weight") for key in (g, v))
    return replace(row, reads={**row.reads, "weight": Read(keys, by_gate=False, join=normalized)})


_MATRIX = r"(?P<name>weight_(?:ih|hh|hr)\w*?)"
_NORMED = (
    re.compile(rf"(?P<head>(?:.*[./])?){_MATRIX}_(?P<part>[gv])"),
    re.compile(rf"(?P<head>(?:.*[./])?)parametrizations\.{_MATRIX}\.original(?P<part>[01])"),
)


def torch_pieces(arrays: Mapping[str, Stored]) -> dict[str, Stored]:
    """Matrices of recurrent layers in place of their lengths g and directions v, but where all of a layer have these by rows: that is the
    variant "weight". Pruned arrays in place of these and their masks; what else is parametrized is named.
    """
    arrays = _without_parametrizations(arrays)
    pairs: dict[str, dict[str, dict[str, Stored]]] = {}
    for key, a in arrays.items():
        for match in (m for form in _NORMED if (m := form.fullmatch(key))):
            pairs.setdefault(match["head"], {}).setdefault(match["name"], {})["v" if match["part"] in "v1" else "g"] = a
    found = dict(arrays)
    for head, matrices in pairs.items():
        beside = any(re.fullmatch(_MATRIX, key.removeprefix(head)) for key in arrays if key not in _keys(matrices))
        by_rows = all(len(pair["g"].shape) == 2 and pair["g"].shape[1] == 1 for pair in matrices.values() if "g" in pair)
        if by_rows and not beside and {name[7:9] for name in matrices} == {"ih", "hh"}:
            continue
        for name, pair in matrices.items():
            full = f"{head}{name}"
            if full in arrays:
                continue
            for a in pair.values():
                del found[a.key]
            found[full] = _folded(full, **pair) if len(pair) == 2 else _halved(full, *pair.values())
    return found


_PARAMETRIZED = re.compile(r"(?P<head>(?:.*[./])?)parametrizations\.(?P<name>\w+)\.(?P<part>.+)")
_HOOKED = re.compile(r"(?P<head>(?:.*[./])?)(?P<name>\w+)_(?P<part>orig|mask|u|v)")
_WAY_OUT = {
    _PARAMETRIZED: "torch.nn.utils.parametrize.remove_parametrizations(module, {!r})",
    _HOOKED: "torch.nn.utils.remove_spectral_norm(module, {!r})",
}


def _without_parametrizations(arrays: Mapping[str, Stored]) -> dict[str, Stored]:
    """With the arrays themselves in place of what they are made of, where that is not weight normalization."""
    found = dict(arrays)
    for form, advice in _WAY_OUT.items():
        groups: dict[tuple[str, str], dict[str, Stored]] = {}
        for key, a in arrays.items():
            if match := form.fullmatch(key):
                groups.setdefault((match["head"], match["name"]), {})[match["part"]] = a
        for (head, name), parts in groups.items():
            full = f"{head}{name}"
            if full in arrays or not parts.keys() & {"original", "orig", "original2"}:
                continue
            for a in parts.values():
                del found[a.key]
            if parts.keys() == {"orig", "mask"}:
                found[full] = _pruned(full, parts["orig"], parts["mask"])
            else:
                of = ", ".join(repr(a.key) for a in parts.values())
                problem = f"{full!r} is made of {of}; {advice.format(name)} leaves the array itself"
                whole = next(a for part, a in parts.items() if part.startswith("orig"))
                found[full] = Stored(full, partial(_described, whole), whole.read, said=whole.said, problem=problem)
    return found


def _described(a: Stored) -> tuple[tuple[int, ...], str]:
    return a.shape, a.dtype


def _pruned(key: str, whole: Stored, mask: Stored) -> Stored:
    def load() -> NumPyArray:
        if whole.shape != mask.shape:
            raise CheckpointError(f"{whole.key!r} and {mask.key!r} have the shapes {whole.shape} and {mask.shape}; expected the same")
        weights = whole.weights()
        pruned: NumPyArray = weights * mask.read().astype(weights.dtype)
        return pruned

    return Stored(key, partial(_described, whole), load, said=whole.said, problem=whole.problem or mask.problem)


def _keys(matrices: Mapping[str, Mapping[str, Stored]]) -> set[str]:
    return {a.key for pair in matrices.values() for a in pair.values()}


def _halved(key: str, half: Stored) -> Stored:
    other = half.key[:-1] + {"g": "v", "v": "g", "0": "1", "1": "0"}[half.key[-1]]
    return Stored.unreadable(key, f"{half.key!r} needs {other!r}, which is missing", half.said)


def _folded(key: str, g: Stored, v: Stored) -> Stored:
    if v.ndim != 2 or 0 in v.shape:
        return Stored.unreadable(key, f"{v.key!r} has shape {v.shape}; expected a matrix with entries", v.said)

    def load() -> NumPyArray:
        try:
            return normalized(g.weights(), v.weights())
        except ValueError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{g.key!r} and {v.key!r} have the shapes {g.shape} and {v.shape}: {error}") from error

    return Stored(key, lambda: (v.shape, v.dtype), load, said=v.said, problem=g.problem or v.problem)


def _biases(row: Row) -> dict[str, Read]:
    return {name: read for name, read in row.reads.items() if name in BIASES}
