"""thinc: the weights of all layers and directions of an LSTM in one vector, and its first states, (2, depth, directions, hidden)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy

from portnorm.checkpoint.formats.row import NumPyArray, Row, rows
from portnorm.checkpoint.stored import Stored
from portnorm.errors import CheckpointError

_VECTOR, _STATES = "LSTM", "HC0"
_STARTS = ("c0", "h0")  # so thinc's loop takes them, although they are called H0 and C0
_KINDS = ("weight_ih", "bias_ih", "weight_hh", "bias_hh")


def thinc_rows() -> list[Row]:
    """As `thinc_pieces` cuts the vector."""
    reads = {name: rows(name) for name in sorted(_KINDS, reverse=True)}
    return [Row("thinc", "LSTM", reads, None, "fiog", (("{l}/0/", "{l}/1/"),), first={"h0": "h0", "c0": "c0"})]


def thinc_pieces(arrays: Mapping[str, Stored]) -> dict[str, Stored]:
    """Arrays by layer and direction, `0/1/weight_ih`, in place of a vector and the first states beside it."""
    found = dict(arrays)
    for key, vector in arrays.items():
        head = key.removesuffix(_VECTOR)
        states = arrays.get(head + _STATES)
        if not key.endswith(_VECTOR) or vector.ndim != 1 or states is None or states.ndim != 4:
            continue
        _, depth, directions, hidden = states.shape
        shapes = _shapes(depth, directions, hidden, _inputs(vector.shape[0], depth, directions, hidden))
        sizes = [int(numpy.prod(shape)) for shape in shapes.values()]
        if sum(sizes) != vector.shape[0] or min(sizes) < 1:
            raise CheckpointError(
                f"`{key}` has {vector.shape[0]} numbers, and `{head + _STATES}` the shape {states.shape}; expected the weights of {depth} "
                f"layer(s) of {hidden} features in {directions} direction(s)"
            )
        pieces = numpy.split(vector.read(), list(itertools.accumulate(sizes))[:-1])
        del found[key], found[head + _STATES]
        found |= {
            f"{head}{name}": Stored.of(f"{head}{name}", piece.reshape(shape), vector.said)
            for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
        }
        for n, d, (k, name) in itertools.product(range(depth), range(directions), enumerate(_STARTS)):
            found[f"{head}{n}/{d}/{name}"] = Stored.of(key, states.read()[k, n, d], states.said)
    return found


def thinc_vector(pieces: Mapping[str, NumPyArray]) -> dict[str, NumPyArray]:
    """What `thinc_pieces` takes apart."""
    places = list(dict.fromkeys(name.rpartition("/")[0] for name in pieces))
    directions = len({place.rpartition("/")[2] for place in places})
    hidden = pieces[f"{places[0]}/weight_hh"]
    states = numpy.zeros((2, len(places) // directions, directions, hidden.shape[1]), hidden.dtype)
    for (k, place), (n, name) in itertools.product(enumerate(places), enumerate(_STARTS)):
        states[n, k // directions, k % directions] = pieces.get(f"{place}/{name}", 0.0)
    return {_VECTOR: numpy.concatenate([pieces[f"{place}/{kind}"].reshape(-1) for place in places for kind in _KINDS]), _STATES: states}


def _shapes(depth: int, directions: int, hidden: int, inputs: int) -> dict[str, tuple[int, ...]]:
    """In the order of the vector."""
    found: dict[str, tuple[int, ...]] = {}
    for n, d in itertools.product(range(depth), range(directions)):
        widths = {"ih": inputs if n == 0 else directions * hidden, "hh": hidden}
        found |= {f"{n}/{d}/{kind}": (4 * hidden, widths[kind[-2:]]) if kind[0] == "w" else (4 * hidden,) for kind in _KINDS}
    return found


def _inputs(size: int, depth: int, directions: int, hidden: int) -> int:
    """The inputs of the first layer: what is left of the vector when everything else is taken away."""
    rest = sum(int(numpy.prod(shape)) for shape in _shapes(depth, directions, hidden, 0).values())
    return (size - rest) // max(1, 4 * hidden * directions)
