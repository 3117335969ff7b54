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

import base64
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy

from portnorm.quantization import integers_of
from portnorm_onnx.integers import in_nibbles
from portnorm_onnx.symbolic import NumPyArray

Entry = dict[str, Any]


class Weight(Protocol):
    """A weight of a graph, which is read when it is asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self) -> NumPyArray: ...


_SMALL = 1024
"""Bytes of an array that is kept whole, whatever the graph holds."""
_BLOCK = 2**18
"""Numbers that are looked at together, so that a large weight is not there once more in float64."""
_UNITS = {2: 2**7, 4: 2**15, 8: 2**15}
"""By the bytes of a number: so many units in the last place say that it has nothing to do with W."""
_APART = 1 / 16
"""The most numbers of an array like W that have nothing to do with it, such as a 0 that was centred; these are kept as they are."""


@dataclass(frozen=True)
class Form:
    """How a weight lies in the graph: the way back to ours, and from ours to its shape there."""

    suffix: str
    back: Callable[[NumPyArray, tuple[int, ...]], NumPyArray]
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]


def _in_our_order(values: NumPyArray, order: tuple[int, ...]) -> NumPyArray:
    blocks = values[0].reshape(len(order), -1, *values.shape[2:])
    found: NumPyArray = blocks[numpy.argsort(order)].reshape(values.shape[1:])
    return found


FORMS = {
    form.suffix: form
    for form in (
        Form("", lambda v, _: v, lambda shape: shape),
        Form(".T", lambda v, _: v.T, lambda shape: shape[::-1]),
        Form(".gates", _in_our_order, lambda shape: (1, *shape)),
        Form(".steps", lambda v, _: v[:, 0], lambda shape: (*shape[:1], 1, *shape[1:])),
    )
}
"""By the end of a name: as it is, transposed, with the gates in ONNX's order, with room for a batch in each row of a table."""


def forms(weight: Weight, shape: tuple[int, ...], order: tuple[int, ...]) -> Iterator[tuple[str, NumPyArray]]:
    """A weight of the graph in every form in which it can be an array of this shape of ours."""
    for suffix, form in FORMS.items():
        if form.shape(shape) == weight.shape and (order or suffix != ".gates"):
            yield suffix, form.back(in_float32(weight.read()), order)


def in_float32(values: NumPyArray) -> NumPyArray:
    """NumPy has no bfloat16 of its own, and neither has a layer on it."""
    return values.astype(numpy.float32) if values.dtype == ml_dtypes.bfloat16 else values


def checksum(values: NumPyArray) -> str:
    found = 0
    for rows in _blocks(values.shape) if values.ndim and values.size else (...,):
        found = zlib.crc32(numpy.ascontiguousarray(values[rows]).reshape(-1).view(numpy.uint8).data, found)
    return f"{found:08x}"


def entry(values: NumPyArray, held: bool, weights: Mapping[str, Weight], order: tuple[int, ...], step: str) -> Entry:
    """What to keep of an array: of one that the graph holds the checksum alone. `step` is the type in whose last place is counted."""
    found: Entry = {"dtype": str(values.dtype), "shape": list(values.shape), "sum": checksum(values)}
    first = values.reshape(-1)[:1]
    if values.ndim and values.size and numpy.isfinite(first[0]) and _is_all(values, first):
        return found | {"fill": first[0].item()}
    if held:
        return found
    integers = _of_integers(values, weights) or _of_nibbles(values, weights)
    if integers is not None:
        return found | integers
    return found | (_of_another(values, weights, order, step) or {"data": _packed(values)})


def _is_all(values: NumPyArray, first: NumPyArray) -> bool:
    return all(_same(numpy.full_like(values[rows], first[0]), values[rows]) for rows in _blocks(values.shape))


def restored(kept: Entry, base: Callable[[str, str, str, tuple[int, ...]], NumPyArray | None]) -> NumPyArray | None:
    """The array of an entry; `base(name, form, checksum, shape)` gives a weight that it is made of. `None` where that is gone."""
    shape, dtype = tuple(kept["shape"]), numpy.dtype(kept["dtype"])
    if "fill" in kept:
        return numpy.full(shape, kept["fill"], dtype)
    if "data" in kept:
        return _unpacked(kept["data"], dtype, shape)
    if "integers" in kept:
        blocks = [base(name, form, total, (rows, *shape[1:])) for name, form, total, rows in kept["integers"]]
        known = [b for b in blocks if b is not None]
        steps = _unpacked(kept["steps"], dtype, shape[:1])
        return numpy.concatenate(known).astype(dtype) * steps[:, None] if len(known) == len(blocks) else None
    if "nibbles" in kept:
        return _out_of_nibbles(kept, base, shape, dtype)
    if "of" not in kept:
        return None
    bases = [base(name, form, total, shape) for name, form, total in kept["of"]]
    values = [v for v in bases if v is not None and v.shape == shape]
    rule = _RULES[kept["rule"]]
    if len(values) < len(bases) or len(values) != rule.bases:
        return None
    numbers = _unpacked(kept["numbers"], numpy.dtype(numpy.float64), rule.shape(shape))
    units = _unpacked(kept["units"], numpy.dtype(kept["counted"]), shape)
    step = numpy.dtype(kept["step"])
    found = numpy.empty(shape, dtype)
    with numpy.errstate(all="ignore"):
        for block in _blocks(shape):
            guess = _order(rule.guess(*(v[block] for v in values), rule.part(numbers, block)).astype(step))
            found[block] = _values(guess + units[block], step)
    if "apart" in kept:
        many = (int(kept["apart"]),)
        found.reshape(-1)[_unpacked(kept["places"], numpy.dtype(numpy.int64), many)] = _unpacked(kept["values"], dtype, many)
    return found


# -- an array as integers, each row with a step of its own ---------------------------------------------------------------------------------


def _of_integers(v: NumPyArray, weights: Mapping[str, Weight]) -> Entry | None:
    """`v` (rows, columns) as integers that the graph holds, all rows in one weight or some in each of several, and the step of each row."""
    blocks = list(_integer_blocks(weights, v.shape[1])) if v.ndim == 2 and v.dtype.kind == "f" and numpy.isfinite(v).all() else []
    if not blocks:
        return None
    q, steps = integers_of(v)
    if not _same(q.astype(v.dtype) * steps[:, None], v):
        return None
    found: list[tuple[str, str, str, int]] = []
    row = 0
    while row < len(q):
        same = [b for b in blocks if len(b[2]) and numpy.array_equal(q[row:][: len(b[2])], b[2])]
        if not same:
            return None
        name, form, values = same[0]
        found.append((name, form, checksum(values), len(values)))
        row += len(values)
    return {"integers": found, "steps": _packed(steps)}


def _of_nibbles(v: NumPyArray, weights: Mapping[str, Weight]) -> Entry | None:
    """The same for integers of four bits, two in a byte, where a block of each row has a step."""
    held = {n: w for n, w in weights.items() if n.endswith(".int4") and len(w.shape) == 3} if v.ndim == 2 and v.dtype == "f4" else {}
    if not held or not numpy.isfinite(v).all():
        return None
    q, steps, _ = in_nibbles(v, 2 * next(iter(held.values())).shape[2])
    found: list[tuple[str, str, list[int]]] = []
    row = 0
    while row < len(q):
        same = [(n, w.read()) for n, w in held.items() if w.shape[1:] == q.shape[1:] and numpy.array_equal(q[row:][: w.shape[0]], w.read())]
        if not same:
            return None
        name, values = same[0]
        found.append((name, checksum(values), list(values.shape)))
        row += len(values)
    kept = {"nibbles": found, "steps": _packed(steps)}
    back = _numbers_of(q, steps, v.shape)
    return kept if _same(back, v) else None


def _out_of_nibbles(kept: Entry, base: Any, shape: tuple[int, ...], dtype: Any) -> NumPyArray | None:
    parts = [base(name, "", total, tuple(own)) for name, total, own in kept["nibbles"]]
    if any(part is None for part in parts):
        return None
    q = numpy.concatenate(parts)
    return _numbers_of(q, _unpacked(kept["steps"], dtype, (q.shape[0], q.shape[1])), shape)


def _numbers_of(q: NumPyArray, steps: NumPyArray, shape: tuple[int, ...]) -> NumPyArray:
    integers = numpy.stack([q & 15, q >> 4], axis=-1).reshape(*q.shape[:2], -1).astype(steps.dtype) - 8
    found: NumPyArray = (integers * steps[..., None]).reshape(len(q), -1)[:, : shape[1]] + 0.0
    return found


def _integer_blocks(weights: Mapping[str, Weight], columns: int) -> Iterator[tuple[str, str, NumPyArray]]:
    for name, weight in weights.items():
        if len(weight.shape) != 2 or columns not in weight.shape:
            continue
        values = weight.read()
        if values.dtype == numpy.int8:
            yield from ((name, form, a) for form, a in (("", values), (".T", values.T)) if a.shape[1] == columns)


# -- an array as another one and a few units in the last place ------------------------------------------------------------------------


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
    for rows in _blocks(v.shape):
        a, b = (m[rows].reshape(-1, v[0].size).astype(numpy.float64) for m in (v, w))
        squares = (b * b).sum(axis=1)
        numpy.divide((a * b).sum(axis=1), squares, out=found[rows], where=squares > 0)
    return found


def _terms(v: NumPyArray, w: NumPyArray) -> NumPyArray:
    found: NumPyArray = numpy.zeros(v.shape[1:])
    for rows in _blocks(v.shape):
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


def _of_another(v: NumPyArray, weights: Mapping[str, Weight], order: tuple[int, ...], step: str) -> Entry | None:
    """`v` as weights of the graph, a few numbers, and units in the last place; `None` where none are like it. The shortest."""
    kind = numpy.dtype(step)
    if v.nbytes < _SMALL or v.ndim < 2 or v.dtype.kind != "f" or not (v.dtype == kind or _same(v.astype(kind).astype(v.dtype), v)):
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
    made: Entry = {"numbers": _packed(numbers), "counted": str(units.dtype), "units": _packed(units)}
    if apart.size:
        made |= {"apart": apart.size, "places": _packed(apart), "values": _packed(v.reshape(-1)[apart])}
    return made


def _units(v: NumPyArray, w: list[NumPyArray], rule: _Rule, numbers: NumPyArray, step: Any) -> tuple[NumPyArray, NumPyArray] | None:
    """(How many units in the last place `v` is from what the rule says, in the narrowest type; places where that is too many)"""
    found, apart = numpy.empty(v.shape, numpy.int16), []
    for rows in _blocks(v.shape):
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


def _blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    rows = max(1, _BLOCK * shape[0] // max(1, int(numpy.prod(shape))))
    for first in range(0, shape[0], rows):
        yield slice(first, first + rows)


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


# -- bytes ------------------------------------------------------------------------------------------------------------------------------


def _same(a: NumPyArray, b: NumPyArray) -> bool:
    first, second = (numpy.ascontiguousarray(x).reshape(-1).view(numpy.uint8) for x in (a, b))
    return a.dtype == b.dtype and numpy.array_equal(first, second)


def _packed(values: NumPyArray) -> str:
    """All first bytes, all second bytes, …: those with the exponent are alike."""
    planes = numpy.ascontiguousarray(values).reshape(-1).view(numpy.uint8).reshape(values.size, -1).T
    packer = zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)
    return base64.b64encode(packer.compress(numpy.ascontiguousarray(planes).tobytes()) + packer.flush()).decode()


def _unpacked(text: str, dtype: Any, shape: tuple[int, ...]) -> NumPyArray:
    size = int(numpy.prod(shape)) * dtype.itemsize
    unpacker = zlib.decompressobj()
    data = unpacker.decompress(base64.b64decode(text), size + 1)
    if len(data) != size:
        raise ValueError(f"{len(data)} bytes; expected {size} for {dtype}{list(shape)}")
    planes = numpy.frombuffer(data, numpy.uint8).reshape(dtype.itemsize, -1)
    found: NumPyArray = numpy.ascontiguousarray(planes.T).reshape(-1).view(dtype).reshape(shape)
    return found
