"""What a row of the table of formats is made of.

A row is one layer that a format can hold. It says which of portnorm's parameters is under which key, in which order the gates lie there,
and whether matrices are transposed. Names on the left are those inside one direction of a layer (`weight_ih`, `norm_c.bias`); `{p}` in a
key stands for the place of a layer and direction (`_l0_reverse`, `layers.0.cell.`), `{t}` for a time step. Gates are written i, f, g, o
(Keras and TensorFlow call g c or j) and r, z, n (u and h elsewhere).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy

from portnorm.cells.variants import NormName

NumPyArray = numpy.ndarray[Any, Any]

OUR_GATES = {"LSTM": "ifgo", "GRU": "rzn", "RNN": "h"}


@dataclass(frozen=True)
class Read:
    """Where one array lies: keys, joined along the gates, and how they are turned into ours."""

    keys: tuple[str, ...]
    transposed: bool = False
    """(inputs, gates · hidden) there, (gates · hidden, inputs) here."""
    by_gate: bool = True
    """The gates are in the format's order, and have to be put into ours; several keys are named in ours already."""
    at: int | None = None
    """The entry of the first axis that is meant."""
    among: int | None = None
    """How many entries the first axis has, where not all are read; the others are written as 1."""
    part: str | None = None
    """Of a kernel for [x, h]: its "input" or "hidden" rows."""
    blocks: int | None = None
    """How often the hidden size a bias has, where that is not once for each gate."""
    then: Callable[[NumPyArray], NumPyArray] | None = None
    back: Callable[[NumPyArray], NumPyArray] | None = None
    """The inverse of `then`; without it the row is not written."""
    join: Callable[..., NumPyArray] | None = None
    """What makes one array of those under the keys, if they are not pieces of it."""
    flat: bool = False
    """Stored with one axis, whatever the axes here."""
    candidate: bool = False
    """GRU: the bias of the hidden term, of which the format has the candidate's part; that of the gates is 0, or in the other bias."""


def rows(*keys: str, **how: Any) -> Read:
    """(gates · hidden, …) as here."""
    return Read(keys, by_gate=len(keys) == 1, **how)


def columns(*keys: str, **how: Any) -> Read:
    """(…, gates · hidden)."""
    return Read(keys, transposed=True, by_gate=len(keys) == 1, **how)


def whole(key: str, **how: Any) -> Read:
    """As it is, without gates."""
    return Read((key,), by_gate=False, **how)


def candidate(key: str) -> Read:
    """(hidden,): the bias inside the reset gate."""
    return Read((key,), by_gate=False, candidate=True)


def peepholes(*keys: str) -> Read:
    """(hidden,) each, of the gates i, f and o."""
    return rows(*keys, then=lambda p: p.reshape(3, -1), back=lambda p: p.reshape(-1))


def unit_offset(key: str) -> Read:
    """A gain that is stored less 1, and becomes γ in at least float32."""
    return Read((key,), by_gate=False, then=lambda w: w.astype(numpy.result_type(w.dtype, numpy.float32)) + 1, back=lambda w: w - 1)


def gain_and_shift(slot: str, gain: str, shift: str, by_gate: bool = True) -> dict[str, Read]:
    """γ and β of a slot."""
    return {f"{slot}.weight": Read((gain,), by_gate=by_gate), f"{slot}.bias": Read((shift,), by_gate=by_gate)}


@dataclass(frozen=True)
class Row:
    """One layer that a format can hold."""

    format: str
    layer: str
    reads: Mapping[str, Read]
    norm: NormName | None = None
    """Recurrent layers: the name of the variant."""
    gates: str = ""
    places: tuple[tuple[str, ...], ...] = (("",),)
    """What `{p}` can be: alternatives, each the template of the forward direction and, if there can be one, of the reverse."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """What differs from the named variant."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the layer that are the format's defaults."""
    unused: tuple[str, ...] = ()
    """Keys that belong to the format and that its computation does not use."""
    zero: tuple[str, ...] = ()
    """Keys of what the format adds and no layer here does: where they are there they have to be 0."""
    first: Mapping[str, str] = field(default_factory=dict)
    """By key: which state before the first step it has, "h0" or "c0". They need not be there; a layer learns them unless all are 0."""
    auto: bool = True
    """Whether `format="auto"` may take it: not where another library has the same names for something else, and is meant more often."""
    separators: str = "./"
    """Letters after which the names that belong to a layer may begin."""
    shared: bool = False
    """Both directions of a bidirectional layer have the same weights, which are stored once."""
    asked: bool = False
    """Whether it is only meant where its class is named: its arrays are those of a layer that is more common."""

    @property
    def title(self) -> str:
        return self.layer + (f"(norm={self.norm!r})" if self.norm else "")

    @property
    def backward(self) -> re.Pattern[str] | None:
        """What plain names of the backward direction have in them; `None` where a layer has one direction."""
        templates = dict.fromkeys(re.escape(two[1]).replace(r"\{l\}", r"\d+") for two in self.places if len(two) > 1)
        ends = [rf"{t}(?=$|[._])" if t.startswith("_") else rf"(?:^|[./]){t}" for t in templates]
        return re.compile("|".join(ends)) if ends else None

    @property
    def order(self) -> str:
        """Its gates in our order."""
        return "".join(gate for gate in OUR_GATES.get(self.layer, "") if gate in self.gates)


def without(row: Row, *names: str, **changes: Any) -> Row:
    """The same without some arrays."""
    reads = {name: read for name, read in row.reads.items() if name not in names}
    return replace(row, reads=reads, changes={**row.changes, **changes})


def norms(
    library: str, keys: Mapping[str, str], eps: float, rms_eps: float | None, batch: Mapping[str, Any], channel_axis: int
) -> list[Row]:
    """The normalization layers of a library, which differ in the names of their arrays and in ε. A γ that is not stored is 1, a β 0."""
    g, b, mean, var, scale = (keys[name] for name in ("gain", "shift", "mean", "var", "rms"))
    affine = {"weight": whole(g), "bias": whole(b)}
    gain, shift = {"weight": whole(g)}, {"bias": whole(b)}
    channels = {"channel_axis": channel_axis}
    statistics = {"running_mean": whole(mean), "running_var": whole(var)}
    counter = ("num_batches_tracked",) if library == "torch" else ()
    return [
        Row(library, "BatchNorm", {**affine, **statistics}, config={**batch, **channels}, unused=counter),
        *(Row(library, "BatchNorm", {**one, **statistics}, config={**batch, **channels}, unused=counter) for one in (gain, shift)),
        Row(library, "BatchNorm", statistics, config={**batch, **channels, "affine": False}, unused=counter),
        Row(library, "LayerNorm", affine, config={"eps": eps}),
        Row(library, "LayerNorm", gain, config={"eps": eps, "bias": False}),
        Row(library, "LayerNorm", shift, config={"eps": eps}),
        *(Row(library, "GroupNorm", some, config={"eps": eps, **channels}) for some in (affine, gain, shift)),
        *(Row(library, "InstanceNorm", some, config={"eps": eps, "affine": True, **channels}) for some in (affine, gain, shift)),
        Row(library, "RMSNorm", {"weight": whole(scale)}, config={"eps": rms_eps}),
    ]


def tracking(row: Row) -> Row:
    """An InstanceNorm with running statistics, from the row of a BatchNorm."""
    config = {name: value for name, value in row.config.items() if name != "unbiased"}
    return replace(row, layer="InstanceNorm", config={"affine": True, **config, "track_running_stats": True}, asked=True)
