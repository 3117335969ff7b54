"""An array as integers that a graph holds, each row with a step of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy

from portnorm.quantization import integers_of
from portnorm_onnx.held import Base, Entry, Weight
from portnorm_onnx.integers import in_nibbles
from portnorm_onnx.packed import checksum, packed, same, unpacked
from portnorm_onnx.symbolic import NumPyArray


def of_integers(v: NumPyArray, weights: Mapping[str, Weight]) -> Entry | None:
    """`v` (rows, columns) as integers that the graph holds, all rows in one weight or some in each of several, and the step of each row."""
    blocks = list(_integer_blocks(weights, v.shape[1])) if v.ndim == 2 and v.dtype.kind == "f" and numpy.isfinite(v).all() else []
    if not blocks:
        return None
    q, steps = integers_of(v)
    if not same(q.astype(v.dtype) * steps[:, None], v):
        return None
    found: list[tuple[str, str, str, int]] = []
    row = 0
    while row < len(q):
        alike = [b for b in blocks if len(b[2]) and numpy.array_equal(q[row:][: len(b[2])], b[2])]
        if not alike:
            return None
        name, form, values = alike[0]
        found.append((name, form, checksum(values), len(values)))
        row += len(values)
    return {"integers": found, "steps": packed(steps)}


def out_of_integers(kept: Entry, base: Base, shape: tuple[int, ...], dtype: Any) -> NumPyArray | None:
    """The array again; `None` where a weight that it is made of is gone."""
    found = [base(name, form, total, (rows, *shape[1:])) for name, form, total, rows in kept["integers"]]
    known = [b for b in found if b is not None]
    steps = unpacked(kept["steps"], dtype, shape[:1])
    return numpy.concatenate(known).astype(dtype) * steps[:, None] if len(known) == len(found) else None


def of_nibbles(v: NumPyArray, weights: Mapping[str, Weight]) -> Entry | None:
    """The same for integers of four bits, two in a byte, where a block of each row has a step."""
    held = {n: w for n, w in weights.items() if n.endswith(".int4") and len(w.shape) == 3} if v.ndim == 2 and v.dtype == "f4" else {}
    if not held or not numpy.isfinite(v).all():
        return None
    q, steps, _ = in_nibbles(v, 2 * next(iter(held.values())).shape[2])
    found: list[tuple[str, str, list[int]]] = []
    row = 0
    while row < len(q):
        alike = [
            (n, w.read()) for n, w in held.items() if w.shape[1:] == q.shape[1:] and numpy.array_equal(q[row:][: w.shape[0]], w.read())
        ]
        if not alike:
            return None
        name, values = alike[0]
        found.append((name, checksum(values), list(values.shape)))
        row += len(values)
    kept = {"nibbles": found, "steps": packed(steps)}
    back = _numbers_of(q, steps, v.shape)
    return kept if same(back, v) else None


def out_of_nibbles(kept: Entry, base: Base, shape: tuple[int, ...], dtype: Any) -> NumPyArray | None:
    found = [base(name, "", total, tuple(own)) for name, total, own in kept["nibbles"]]
    known = [b for b in found if b is not None]
    if len(known) < len(found):
        return None
    q = numpy.concatenate(known)
    return _numbers_of(q, unpacked(kept["steps"], dtype, (q.shape[0], q.shape[1])), shape)


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
