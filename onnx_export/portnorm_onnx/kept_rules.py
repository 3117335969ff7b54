"""An array as another one, which a graph holds, and a few units in the last place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy

from portnorm_onnx.held import Base, Entry, Weight, forms
from portnorm_onnx.packed import blocks, checksum, packed, same, unpacked
from portnorm_onnx.symbolic import NumPyArray

_SMALL = 1024
"""Bytes of an array that is kept whole, whatever the graph holds."""


_UNITS = {2: 2**7, 4: 2**15, 8: 2**15}
"""By the bytes of a number: so many units in the last place say that it has nothing to do with W."""


_APART = 1 / 16
"""The most numbers of an array like W that have nothing to do with it, such as a 0 that was centred; these are kept as they are."""


@dataclass(frozen=True)
class _Rule:
    """How an array is nearly made of W, or of two of them, and of a few numbers."""

    numbers: Callable[..., NumPyArray]
    """`numbers(v, W)`"""
    guess: Callable[..., NumPyArray]
    """`guess(W, numbers)`"""
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    """Of the numbers, for the shape of the array."""
    part: Callable[[NumPyArray, slice], NumPyArray]
    """The numbers of some rows."""
    sample: Callable[[NumPyArray], NumPyArray]
    """A piece of an array that has numbers of its own."""
    bases: int = 1
    """How many W there are, one after the other in the graph."""


def _factors(v: NumPyArray, w: NumPyArray) -> NumPyArray:
    found = numpy.zeros(len(v))
    for rows in blocks(v.shape):
        a, b = (m[rows].reshape(-1, v[0].size).astype(numpy.float64) for m in (v, w))
        squares = (b * b).sum(axis=1)
        numpy.divide((a * b).sum(axis=1), squares, out=found[rows], where=squares > 0)
    return found


def _terms(v: NumPyArray, w: NumPyArray) -> NumPyArray:
    found: NumPyArray = numpy.zeros(v.shape[1:])
    for rows in blocks(v.shape):
        found += (v[rows].astype(numpy.float64) - w[rows]).sum(axis=0)
    return found / len(v)


def _of_roots(v: NumPyArray, w: NumPyArray) -> NumPyArray:
    """g² by column, and ε: in W⁻² = (v + ε) / g² it is where the line through all steps of a column meets zero.

    Columns count by how far they spread, since rounding turns the line of one that hardly does.
    """
    v, inverse = v.astype(numpy.float64), 1.0 / numpy.square(w.astype(numpy.float64))
    mean, apart, line = v.mean(axis=0), v - v.mean(axis=0), inverse - inverse.mean(axis=0)
    found, weight = (
        inverse.mean(axis=0) * (apart * apart).sum(axis=0) / (apart * line).sum(axis=0) - mean,
        (apart * apart).sum(axis=0) / mean**2,
    )
    sound = numpy.isfinite(found) & numpy.isfinite(weight)
    eps = numpy.clip((found * weight)[sound].sum() / weight[sound].sum(), 0.0, 0.01) if weight[sound].any() else 0.0
    return numpy.stack([((v + eps) / inverse).mean(axis=0), numpy.full(v.shape[1:], eps)])


def _of_shifts(v: NumPyArray, w: NumPyArray, u: NumPyArray) -> NumPyArray:
    found: NumPyArray = (u + v.astype(numpy.float64) * w).mean(axis=0)
    return found


def _some_columns(a: NumPyArray) -> NumPyArray:
    return a[:, :: -(-a.shape[1] // 16)]


_RULES = {
    "factor": _Rule(
        _factors,
        lambda w, s: w.astype(numpy.float64) * s.reshape(-1, *(1,) * (w.ndim - 1)),
        lambda shape: shape[:1],
        lambda numbers, rows: numbers[rows],
        lambda a: a[:: -(-len(a) // 16)],
    ),
    "term": _Rule(
        _terms,
        lambda w, m: w.astype(numpy.float64) + m,
        lambda shape: shape[1:],
        lambda numbers, rows: numbers,
        _some_columns,
    ),
    "variance": _Rule(
        _of_roots,
        lambda w, n: n[0] / numpy.square(w.astype(numpy.float64)) - n[1],
        lambda shape: (2, *shape[1:]),
        lambda numbers, rows: numbers,
        _some_columns,
    ),
    "mean": _Rule(
        _of_shifts,
        lambda w, u, b: (b - u) / w.astype(numpy.float64),
        lambda shape: shape[1:],
        lambda numbers, rows: numbers,
        _some_columns,
        bases=2,
    ),
}


def of_another(v: NumPyArray, weights: Mapping[str, Weight], order: tuple[int, ...], step: str) -> Entry | None:
    """`v` as weights of the graph, a few numbers, and units in the last place; `None` where none are like it. The shortest."""
    kind = numpy.dtype(step)
    if v.nbytes < _SMALL or v.ndim < 2 or v.dtype.kind != "f" or not (v.dtype == kind or same(v.astype(kind).astype(v.dtype), v)):
        return None
    last: list[tuple[str, str, NumPyArray]] = []
    best, size = None, v.nbytes
    for name, weight in weights.items():
        for suffix, w in forms(weight, v.shape, order):
            if w.dtype.kind != "f":
                continue
            last = [*last[-1:], (name, suffix, w)]
            for title, rule in _RULES.items():
                bases = last[-rule.bases :]
                found = _told(v, [b for *_, b in bases], rule, kind) if len(bases) == rule.bases else None
                length = size if found is None else sum(len(str(part)) for part in found.values())
                if found is not None and length < size:
                    of = [(n, form, checksum(b)) for n, form, b in bases]
                    best, size = {"of": of, "rule": title, "step": step, **found}, length
                    if size < v.nbytes // 5:
                        return best
    return best


def out_of_another(kept: Entry, base: Base, shape: tuple[int, ...], dtype: Any) -> NumPyArray | None:
    """The array again; `None` where a weight that it is made of is gone."""
    bases = [base(name, form, total, shape) for name, form, total in kept["of"]]
    values = [v for v in bases if v is not None and v.shape == shape]
    rule = _RULES[kept["rule"]]
    if len(values) < len(bases) or len(values) != rule.bases:
        return None
    numbers = unpacked(kept["numbers"], numpy.dtype(numpy.float64), rule.shape(shape))
    units = unpacked(kept["units"], numpy.dtype(kept["counted"]), shape)
    step = numpy.dtype(kept["step"])
    found = numpy.empty(shape, dtype)
    with numpy.errstate(all="ignore"):
        for block in blocks(shape):
            guess = _order(rule.guess(*(v[block] for v in values), rule.part(numbers, block)).astype(step))
            found[block] = _values(guess + units[block], step)
    if "apart" in kept:
        many = (int(kept["apart"]),)
        found.reshape(-1)[unpacked(kept["places"], numpy.dtype(numpy.int64), many)] = unpacked(kept["values"], dtype, many)
    return found


def _told(v: NumPyArray, w: list[NumPyArray], rule: _Rule, step: Any) -> Entry | None:
    """The numbers of a rule, the units, and what neither tells; `None` where a piece of the array already says that this is too much."""
    with numpy.errstate(all="ignore"):  # an infinite weight is no number of a rule
        few, own = rule.sample(v), [rule.sample(b) for b in w]
        if _units(few, own, rule, rule.numbers(few, *own), step) is None:
            return None
        numbers = rule.numbers(v, *w)
        found = _units(v, w, rule, numbers, step)
    if found is None:
        return None
    units, apart = found
    made: Entry = {"numbers": packed(numbers), "counted": str(units.dtype), "units": packed(units)}
    if apart.size:
        made |= {"apart": apart.size, "places": packed(apart), "values": packed(v.reshape(-1)[apart])}
    return made


def _units(v: NumPyArray, w: list[NumPyArray], rule: _Rule, numbers: NumPyArray, step: Any) -> tuple[NumPyArray, NumPyArray] | None:
    """(How many units in the last place `v` is from what the rule says, in the narrowest type; places where that is too many)"""
    found, apart = numpy.empty(v.shape, numpy.int16), []
    for rows in blocks(v.shape):
        narrow = numpy.ascontiguousarray(v[rows].astype(step))
        guess = _order(rule.guess(*(b[rows] for b in w), rule.part(numbers, rows)).astype(step))
        k = _order(narrow) - guess
        bits = f"i{step.itemsize}"  # two zeros and two NaNs are one number each
        far = (numpy.abs(k) >= _UNITS[step.itemsize]) | (_values(guess + k, step).view(bits) != narrow.view(bits))
        k[far] = 0
        found[rows] = k
        apart.append(numpy.flatnonzero(far) + rows.start * v[0].size)
    places = numpy.concatenate(apart)
    if places.size > _APART * v.size:
        return None
    return (found.astype(numpy.int8) if numpy.max(numpy.abs(found), initial=0) < 2**7 else found), places


def _order(values: NumPyArray) -> NumPyArray:
    """Numbers of floating point as integers in the same order, one unit in the last place apart; differences may wrap around."""
    bits = values.view(f"i{values.dtype.itemsize}").astype(_wide(values.dtype))
    found: NumPyArray = numpy.where(bits < 0, _least(values.dtype) - bits, bits)
    return found


def _values(order: NumPyArray, step: Any) -> NumPyArray:
    bits = numpy.where(order < 0, _least(step) - order, order)
    found: NumPyArray = bits.astype(f"i{step.itemsize}").view(step)
    return found


def _wide(step: Any) -> Any:
    return numpy.dtype(f"i{max(4, step.itemsize)}")


def _least(step: Any) -> Any:
    return _wide(step).type(-(2 ** (8 * step.itemsize - 1)))
