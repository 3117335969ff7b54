"""What a model is made of, as a table: layers, the shapes of their results, and how many numbers each has learned or keeps."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from portnorm.arrays import Array
from portnorm.dtypes import default_integer
from portnorm.errors import UnsupportedError
from portnorm.scalars import whole_number

Shape = tuple[int | str, ...]

_PROBES = ({"batch": 3, "time": 5}, {"batch": 7, "time": 11})
"""Two lengths for each axis that varies, by which it is known again in a result; any other axis takes some of these too."""


@dataclass(frozen=True)
class SummaryRow:
    """One layer of a model, or one direction of a stack inside it."""

    name: str
    """Its place, as in the names of parameters: `0`, `1.2`; `l0_reverse` for a direction."""
    layer: str
    """What it is: its class, with the `norm` of a recurrent layer."""
    output: Shape
    """The shape of its result."""
    parameters: int
    """How many numbers are learned; 0 at a further place of a layer that came before."""
    statistics: int
    """How many numbers its buffers keep, such as running means."""
    inside: bool = False
    """Whether it is a part of the row before, and counted there."""


@dataclass(frozen=True)
class Summary:
    """The layers of a model; `str` of it is a table."""

    rows: tuple[SummaryRow, ...]
    parameters: int
    """In all."""
    statistics: int
    """In all."""
    size: int
    """Bytes of both."""

    def __str__(self) -> str:
        header = ("", "layer", "output", "parameters", "statistics")
        lines = [(r.name, r.layer, _written(r.output), f"{r.parameters:,}", f"{r.statistics:,}") for r in self.rows]
        total = ("", "in all", f"{self.size:,} bytes", f"{self.parameters:,}", f"{self.statistics:,}")
        widths = [max(len(line[k]) for line in (header, *lines, total)) for k in range(len(header))]
        rule = "  ".join("-" * width for width in widths)

        def laid(line: Sequence[str]) -> str:
            return "  ".join(
                cell.rjust(w) if k >= 3 else cell.ljust(w) for k, (cell, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()

        return "\n".join((laid(header), rule, *map(laid, lines), rule, laid(total)))


class Call(NamedTuple):
    """One call of a layer inside a model."""

    name: str
    layer: Any
    takes: tuple[int, ...]
    gives: tuple[int, ...]


Calls: TypeAlias = Generator[Call, None, Array]
"""Of a model, one after the other; returns its result."""


def summarized(model: Any, input_shape: Sequence[int] | None) -> Summary:
    """See `Layer.summary`, whose layers say themselves what they call (`calls`) and what is inside of them (`inside_of`)."""
    runs, named = _runs(model, input_shape)
    found = [list(model.calls(_example(model, shape), "")) for shape in runs]
    names = {tuple(sizes): name for name, sizes in zip(named, zip(*runs, strict=True), strict=False) if isinstance(name, str)}
    rows: list[SummaryRow] = []
    seen: set[int] = set()
    for calls in zip(*found, strict=True):
        layer, again = calls[0].layer, id(calls[0].layer) in seen
        seen.add(id(layer))
        takes, gives = (
            [_axis(sizes, names) for sizes in zip(*shapes, strict=True)] for shapes in zip(*(c[2:] for c in calls), strict=True)
        )
        counts = (0, 0) if again else (count(layer.params), count(layer.buffers))
        rows.append(SummaryRow(calls[0].name, layer.title, tuple(gives), *counts))
        rows += [] if again else layer.inside_of(tuple(takes), tuple(gives))
    size = sum(math.prod(a.shape) * _bytes(model, a) for a in model.state_dict().values())
    return Summary(tuple(rows), count(model.params), count(model.buffers), size)


def _runs(model: Any, input_shape: Any) -> tuple[list[tuple[int, ...]], Shape]:
    """The shapes to call the model on, and the names of axes whose length varies."""
    if input_shape is None:
        try:
            named: Shape = tuple(model.input_dims())
        except NotImplementedError:
            raise UnsupportedError(
                f"`input_shape` is not given, and {type(model).__name__} does not say it; give one such as (20, 4, 8)"
            ) from None
        return [tuple(d if isinstance(d, int) else probe.get(d, probe["batch"]) for d in named) for probe in _PROBES], named
    if isinstance(input_shape, str | int) or not isinstance(input_shape, Sequence):
        raise UnsupportedError(f"`input_shape` is {input_shape!r}; expected the lengths of all axes, such as (20, 4, 8)")
    return [tuple(whole_number("input_shape", n, 1) for n in input_shape)], ()


def _example(model: Any, shape: tuple[int, ...]) -> Array:
    """Numbers of this shape that any layer takes: ones, or the first of many words."""
    xp = model.xp
    if model.takes_integers:
        return xp.zeros(shape, dtype=default_integer(xp), device=model.device)
    return xp.ones(shape, dtype=model.dtype, device=model.device)


def _axis(sizes: tuple[int, ...], names: dict[tuple[int, ...], str]) -> int | str:
    """The name of an axis whose lengths are those of one of the input, its length where that is one, else `?`."""
    if sizes in names:
        return names[sizes]
    return sizes[0] if len({*sizes}) == 1 else "?"


def count(arrays: Mapping[str, Array]) -> int:
    """How many numbers there are in all."""
    return sum(math.prod(a.shape) for a in arrays.values())


def _bytes(model: Any, a: Array) -> int:
    known = getattr(a.dtype, "itemsize", None)
    if known is not None:
        return int(known)
    info = model.xp.finfo if model.xp.isdtype(a.dtype, "real floating") else model.xp.iinfo
    return int(info(a.dtype).bits) // 8


def _written(shape: Shape) -> str:
    return f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
