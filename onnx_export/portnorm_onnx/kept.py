"""What it takes, beside a graph, to have an array again bit by bit.

    v                                    its bytes, sorted by place and packed
    v = q · s                            integers that the graph holds, and a step for each row
    v = c                                one number for all: tools leave out a gain of 1 and a shift of 0
    v = round(W ⊙ s) + k                 folded into W: the graph holds each row times a factor of its own
    v = round(W + m) + k                 centred in W: the graph holds each column less its mean
    v = round((g / W)² - ε) + k          a variance of each step: the graph holds the table W = g / √(v + ε)
    v = round((b - U) / W) + k           a mean of each step, beside it the table U = b - v·W
                                         k counts units in the last place, few and mostly 0, which pack to two or three bits

Every entry has the checksum of its array, by which a weight that a tool has renamed is found and one that it has changed is noticed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy

from portnorm_onnx.held import Base, Entry, Weight
from portnorm_onnx.kept_integers import of_integers, of_nibbles, out_of_integers, out_of_nibbles
from portnorm_onnx.kept_rules import of_another, out_of_another
from portnorm_onnx.packed import blocks, checksum, packed, same, unpacked
from portnorm_onnx.symbolic import NumPyArray


def entry(values: NumPyArray, held: bool, weights: Mapping[str, Weight], order: tuple[int, ...], step: str) -> Entry:
    """What to keep of an array: of one that the graph holds the checksum alone. `step` is the type in whose last place is counted."""
    found: Entry = {"dtype": str(values.dtype), "shape": list(values.shape), "sum": checksum(values)}
    first = values.reshape(-1)[:1]
    if values.ndim and values.size and numpy.isfinite(first[0]) and _is_all(values, first):
        return found | {"fill": first[0].item()}
    if held:
        return found
    integers = of_integers(values, weights) or of_nibbles(values, weights)
    if integers is not None:
        return found | integers
    return found | (of_another(values, weights, order, step) or {"data": packed(values)})


def _is_all(values: NumPyArray, first: NumPyArray) -> bool:
    return all(same(numpy.full_like(values[rows], first[0]), values[rows]) for rows in blocks(values.shape))


def restored(kept: Entry, base: Base) -> NumPyArray | None:
    """The array of an entry; `base(name, form, checksum, shape)` gives a weight that it is made of. `None` where that is gone."""
    shape, dtype = tuple(kept["shape"]), numpy.dtype(kept["dtype"])
    if "fill" in kept:
        return numpy.full(shape, kept["fill"], dtype)
    if "data" in kept:
        return unpacked(kept["data"], dtype, shape)
    if "integers" in kept:
        return out_of_integers(kept, base, shape, dtype)
    if "nibbles" in kept:
        return out_of_nibbles(kept, base, shape, dtype)
    if "of" not in kept:
        return None
    return out_of_another(kept, base, shape, dtype)
