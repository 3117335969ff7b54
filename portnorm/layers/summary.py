"""What a model is made of, as a table: layers, the shapes of their results, and how many numbers each has learned or keeps."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

from portnorm.arrays import Array, default_integer
from portnorm.errors import ShapeError, UnsupportedError
from portnorm.layers.layer import Arrays, Layer
from portnorm.layers.names import without_suffix
from portnorm.layers.recurrent import Recurrent
from portnorm.layers.sequential import Sequential
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


def summary(model: Layer, input_shape: Sequence[int] | None = None) -> Summary:
    """See `Layer.summary`."""
    if input_shape is None:
        try:
            named: Shape = tuple(model.input_dims())
        except NotImplementedError:
            raise UnsupportedError(
                f"`input_shape` is not given, and {type(model).__name__} does not say it; give one such as (20, 4, 8)"
            ) from None
        runs = [tuple(d if isinstance(d, int) else probe.get(d, probe["batch"]) for d in named) for probe in _PROBES]
    else:
        if isinstance(input_shape, str | int) or not isinstance(input_shape, Sequence):
            raise UnsupportedError(f"`input_shape` is {input_shape!r}; expected the lengths of all axes, such as (20, 4, 8)")
        runs, named = [tuple(whole_number("input_shape", n, 1) for n in input_shape)], ()
    found = [list(_calls(model, _example(model, shape), "")) for shape in runs]
    names = {tuple(sizes): name for name, sizes in zip(named, zip(*runs, strict=True), strict=False) if isinstance(name, str)}
    rows: list[SummaryRow] = []
    seen: set[int] = set()
    for places in zip(*found, strict=True):
        name, layer, *_ = places[0]
        before, shape = (tuple(_axis(sizes, names) for sizes in zip(*(p[k] for p in places), strict=True)) for k in (2, 3))
        again = id(layer) in seen
        seen.add(id(layer))
        rows.append(SummaryRow(name, _title(layer), shape, 0 if again else _count(layer.params), 0 if again else _count(layer.buffers)))
        if isinstance(layer, Recurrent) and layer.num_layers * layer.num_directions > 1 and not again:
            rows.extend(_directions(layer, before, shape))
    arrays = model.state_dict().values()
    size = sum(math.prod(a.shape) * _bytes(model, a) for a in arrays)
    return Summary(tuple(rows), _count(model.params), _count(model.buffers), size)


def _calls(model: Layer, x: Array, name: str) -> Generator[tuple[str, Layer, tuple[int, ...], tuple[int, ...]], None, Array]:
    """Each layer that is no container: its place, itself, and the shapes of what it takes and gives. Returns the result of all."""
    if isinstance(model, Sequential):
        for k, part in enumerate(model.parts):
            x = yield from _calls(part, x, f"{name}.{k}" if name else str(k))
        return x
    y = _result(model, x)
    yield name, model, tuple(x.shape), tuple(y.shape)
    return y


def _result(layer: Layer, x: Array) -> Array:
    try:
        result = layer(x)
    except ShapeError as error:
        raise ShapeError(f"`input_shape` does not fit: {error}") from error
    return result[0] if layer.recurrent else result


def _example(model: Layer, shape: tuple[int, ...]) -> Array:
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


def _directions(layer: Recurrent, before: Shape, after: Shape) -> Iterator[SummaryRow]:
    """Of a stack, each direction of each layer."""
    for k, (suffix, _, _) in enumerate(layer._places()):
        last = k // layer.num_directions == layer.num_layers - 1
        output = (*(after[:-1] if last else before[:-1]), layer.output_size)
        own = without_suffix(layer.params, suffix), without_suffix(layer.buffers, suffix)
        yield SummaryRow(f"  {suffix.removeprefix('_')}", "", output, _count(own[0]), _count(own[1]), inside=True)


def _title(layer: Layer) -> str:
    norm = getattr(layer, "norm", None)
    if not isinstance(layer, Recurrent) or norm is None:
        return type(layer).__name__
    return f"{type(layer).__name__} {norm if isinstance(norm, str) else norm.source}"


def _count(arrays: Arrays) -> int:
    return sum(math.prod(a.shape) for a in arrays.values())


def _bytes(model: Layer, a: Array) -> int:
    dtype = a.dtype
    known = getattr(dtype, "itemsize", None)
    if known is not None:
        return int(known)
    info = model.xp.finfo if model.xp.isdtype(dtype, "real floating") else model.xp.iinfo
    return int(info(dtype).bits) // 8


def _written(shape: Shape) -> str:
    return f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
