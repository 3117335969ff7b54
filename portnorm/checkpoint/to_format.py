"""Layers as other libraries store them: `to_format`, by the rows of `portnorm.checkpoint.formats`."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import numpy

from portnorm.arrays import to_numpy
from portnorm.cells.variants import Variant, variant_of
from portnorm.checkpoint.formats import FORMATS as FORMATS
from portnorm.checkpoint.formats import PIECES, ROWS
from portnorm.checkpoint.formats.row import Read, Row
from portnorm.checkpoint.formats.torch import BIASES
from portnorm.checkpoint.recognise import layers_of, placed
from portnorm.checkpoint.stored import NumPyArray
from portnorm.errors import UnsupportedError
from portnorm.layers.layer import Layer
from portnorm.layers.names import in_direction
from portnorm.layers.recurrent import Recurrent

_log = logging.getLogger("portnorm")


def to_format(layer: Layer, format: str) -> dict[str, NumPyArray]:  # noqa: A002
    """The arrays of a layer as another library stores them, by its names: what `import_checkpoint` reads, the other way round.

    `format` is one of `portnorm.FORMATS`, such as `"torch"` (what `load_state_dict` of torch.nn takes) or `"keras"` (by name; in the order
    of `layer.get_weights()`). NumPy arrays. Where the format has one bias and the layer two that are only ever added to each other, it gets
    their sum, and the log says so. Raises `UnsupportedError`, which names the difference, where the format has no such layer. Arrays do
    not hold everything: ε, `momentum`, `batch_first` are the reader's to know.

    >>> import portnorm as pn
    >>> {name: a.shape for name, a in pn.to_format(pn.LSTM(4, 3, rng=0), "torch").items()}
    {'weight_ih_l0': (12, 4), 'weight_hh_l0': (12, 3), 'bias_ih_l0': (12,), 'bias_hh_l0': (12,)}
    """
    if format not in FORMATS:
        raise UnsupportedError(f"`format` is {format!r}; expected one of {', '.join(map(repr, FORMATS))}")
    if not isinstance(layer, Layer):
        raise UnsupportedError(f"`layer` is a {type(layer).__name__}; expected a layer of portnorm")
    if layer.quantizes is not None:
        raise UnsupportedError(
            f"{layer!r} computes with integers, which no format says; `layer.quantize = None` makes it a layer whose arrays are all of it"
        )
    own = {name: to_numpy(a) for name, a in layer.state_dict().items()}
    layers, directions = (layer.num_layers, layer.num_directions) if isinstance(layer, Recurrent) else (1, 1)
    for row in ROWS:
        if row.format != format or row.layer != type(layer).__name__ or _differences(row, layer):
            continue
        joined = isinstance(layer, Recurrent) and _adds_biases(row, layer)
        held = _with_one_bias(own, layers, directions) if joined else own
        stored = {name for name in held if "num_batches_tracked" not in name}
        for templates in row.places:
            if len(templates) < directions or (layers > 1 and "{l}" not in templates[0]):
                continue
            found: dict[str, NumPyArray] = {}
            names: set[str] = set()
            for n, (d, template) in itertools.product(range(layers), enumerate(templates[:directions])):
                full = {name: in_direction(name, n, d) if isinstance(layer, Recurrent) else name for name in row.reads}
                first = {key: own[f] for key, name in row.first.items() if (f := in_direction(name, n, d)) in own}
                names |= {*full.values(), *(in_direction(row.first[key], n, d) for key in first)}
                if names <= stored:
                    found |= _written(row, {name: held[f] for name, f in full.items()}, template.format(l=n))
                    found |= {placed(key, template.format(l=n)): a for key, a in first.items()}
            if names == stored:
                if joined:
                    _log.info("to_format wrote bias_ih + bias_hh as the one bias of format %r", format)
                found |= {name: held[name] for name in row.unused if name in held}
                return PIECES[format][1](found) if format in PIECES else found
    raise UnsupportedError(f"format {format!r} has no {layer!r}{_why_not(layer, format)}")


def _why_not(layer: Layer, format: str) -> str:  # noqa: A002
    """In what the layers of a format differ from one that it cannot hold."""
    same = [row for row in ROWS if row.format == format and row.layer == type(layer).__name__]
    if not same:
        return f"; expected one of {', '.join(layers_of(format))}"
    nearest = min((_differences(row, layer) for row in same), key=len)
    if nearest:
        return f": the nearest there has {', '.join(nearest)}"
    sizes = f" {layer.num_layers} layers and {layer.num_directions} directions" if isinstance(layer, Recurrent) else ""
    return f": it has no place for{sizes} {', '.join(n for n in layer.params)}"


def _differences(row: Row, layer: Layer) -> list[str]:
    """In what a row's layer differs from `layer`, in words; nothing where it computes the same."""
    said = ["a form of its own, which is read and not written"] if any(_only_reads(read) for read in row.reads.values()) else []
    if not isinstance(layer, Recurrent):
        return said
    once = [name for name, read in row.reads.items() if read.at is not None and "running" in name]
    kept = [to_numpy(a) for name, a in layer.buffers.items() if once and "running" in name]
    if any(numpy.any(steps != steps[:1]) for steps in kept):
        said.append(f"statistics of one step where this has those of {kept[0].shape[0]}, which differ")
    if layer.direction != "forward":
        said.append(f"direction='forward' where this has {layer.direction!r}")
    if layer.learned_state and not row.first:
        said.append("learned_state=False where this has True")
    theirs = replace(variant_of(row.norm, row.layer, layer.cell.takes), **row.changes)
    for f in fields(Variant):
        other, own = getattr(theirs, f.name), getattr(layer.variant, f.name)
        if f.name in ("source", "gain", "forget_bias") or other == own or (f.name == "biases" and _adds_biases(row, layer)):
            continue
        if f.name == "output_activation" and theirs.activations() == layer.variant.activations():
            continue
        said.append(f"{f.name}={other!r} where this has {own!r}")
    return said


def _only_reads(read: Read) -> bool:
    """Whether nothing says how an array is written."""
    return (read.then is not None and read.back is None) or read.join is not None


def _adds_biases(row: Row, layer: Recurrent) -> bool:
    """Whether the layer's two biases are added to each other wherever it uses them, and the row has one in their place."""
    theirs = replace(variant_of(row.norm, row.layer, layer.cell.takes), **row.changes)
    apart = layer.cell(layer.variant).keeps_hidden_bias
    return layer.variant.biases == BIASES and theirs.biases == ("bias",) and not layer.variant.early and not theirs.early and not apart


def _with_one_bias(own: Mapping[str, NumPyArray], layers: int, directions: int) -> dict[str, NumPyArray]:
    found = dict(own)
    for n, d in itertools.product(range(layers), range(directions)):
        ih, hh = (found.pop(in_direction(name, n, d)) for name in BIASES)
        found[in_direction("bias", n, d)] = ih + hh
    return found


def _moved(own: dict[str, NumPyArray]) -> dict[str, NumPyArray]:
    """With the hidden bias of a GRU's gates in the input bias, where it does the same; that of the candidate stays in the reset gate."""
    inner = own["bias_hh"].copy()
    gates = slice(0, inner.shape[0] // 3 * 2)
    outer = own["bias_ih"].copy()
    outer[gates] += inner[gates]
    inner[gates] = 0
    return {**own, "bias_ih": outer, "bias_hh": inner}


def _written(row: Row, own: dict[str, NumPyArray], place: str) -> dict[str, NumPyArray]:
    """One direction's arrays under the names of a row."""
    found: dict[str, NumPyArray] = {}
    stacked: dict[str, dict[Any, Any]] = {}
    order, hidden = row.order, own["weight_hh"].shape[0] // len(row.gates) if "weight_hh" in own else 1
    if any(read.candidate for read in row.reads.values()):
        own = _moved(own)
    for name, read in row.reads.items():
        array, axis = own[name], 0 if name.startswith("weight") and not read.transposed else -1
        array = array if read.back is None else read.back(array)
        array = array.reshape(-1) if read.flat else array
        array = array.T if read.transposed else array
        if read.at is not None and "running" in name:
            array = array[0]  # the only row of statistics, or one of several that are alike
        if read.by_gate:
            blocks = numpy.split(array, len(order), axis=axis)
            array = numpy.concatenate([blocks[order.index(gate)] for gate in row.gates], axis=axis)
        if read.candidate:
            array = array[-hidden:]
        if "{t}" in read.keys[0]:
            found |= {placed(read.keys[0], place).replace("{t}", str(t)): step for t, step in enumerate(array)}
            continue
        # All keys but the first have one gate each.
        cuts = [array.shape[axis] - hidden * (len(read.keys) - 1 - k) for k in range(len(read.keys) - 1)]
        for key, piece in zip(read.keys, numpy.split(array, cuts, axis=-1 if read.transposed else 0), strict=True):
            if read.at is None and read.part is None:
                found[placed(key, place)] = piece
            elif read.among is not None:
                found[placed(key, place)] = numpy.stack([piece if k == read.at else numpy.ones_like(piece) for k in range(read.among)])
            else:
                stacked.setdefault(placed(key, place), {})[read.at if read.part is None else read.part] = piece
    for key, parts in stacked.items():
        joint = "input" in parts
        found[key] = numpy.concatenate([parts["input"], parts["hidden"]]) if joint else numpy.stack([parts[k] for k in sorted(parts)])
    return {key: numpy.ascontiguousarray(a) for key, a in found.items()}
