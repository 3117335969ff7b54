"""Where boxes and lines of a directed graph are drawn: in layers from the top, each box below what it takes (Sugiyama et al. 1981).

A box may be as large as the picture of a whole graph inside it; where its lines come in and go out, its ports, are its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

GAP, ROW_GAP = 26.0, 30.0
"""Between boxes beside each other, and between layers."""
_LANE = 10.0
"""What a line that goes past a layer takes of it."""
_SWEEPS, _ROUNDS = 12, 160


@dataclass(eq=False)
class Box:
    """What is placed; ports are distances from its left side."""

    width: float
    height: float
    inputs: list[float] = field(default_factory=list)
    outputs: list[float] = field(default_factory=list)
    reach: dict[int, float] = field(default_factory=dict)
    """How far below its top the line to an input port ends, where that is inside."""
    leave: dict[int, float] = field(default_factory=dict)
    """The same of output ports, above its bottom."""
    lane: bool = False
    """Whether it is no box, but a line that goes past."""
    layer: int = 0
    x: float = 0.0
    y: float = 0.0


@dataclass(frozen=True)
class Edge:
    """A line from an output port of a box to an input port of another."""

    source: Box
    output: int
    target: Box
    input: int

    @property
    def start(self) -> float:
        return self.source.x + self.source.outputs[self.output]

    @property
    def end(self) -> float:
        return self.target.x + self.target.inputs[self.input]


@dataclass
class Placed:
    """The size of a drawing, and the points of each edge in turn: (x, top, bottom) of the layers that it passes."""

    width: float
    height: float
    lines: list[list[tuple[float, float, float]]]


def place(boxes: Sequence[Box], edges: Sequence[Edge], first: Sequence[Box] = (), last: Sequence[Box] = ()) -> Placed:
    """Give every box its place. The edges have no circle, and boxes are in an order in which each comes behind what it takes.

    `first` and `last` are those that are to be in the first layer and in the last.
    """
    _layer(boxes, edges, first, last)
    chains = [_chain(edge) for edge in edges]
    parts = [edge for chain in chains for edge in chain]
    rows: list[list[Box]] = [[] for _ in range(1 + max((b.layer for b in boxes), default=0))]
    for box in boxes:
        rows[box.layer].append(box)
    for chain in chains:
        for edge in chain[:-1]:
            rows[edge.target.layer].append(edge.target)
    above, below = _neighbours(parts)
    _order(rows, above, below)
    _across(rows, above, below)
    tops, y = [], 0.0
    for row in rows:
        height = max((box.height for box in row), default=0.0)
        tops.append((y, y + height))
        for box in row:
            box.y = y
        y += height + ROW_GAP
    everything = [box for row in rows for box in row]
    left = min((box.x for box in everything), default=0.0)
    for box in everything:
        box.x -= left
    width = max((box.x + box.width for box in everything), default=0.0)
    return Placed(width, max(0.0, y - ROW_GAP), [_line(chain, tops) for chain in chains])


def _layer(boxes: Sequence[Box], edges: Sequence[Edge], first: Sequence[Box], last: Sequence[Box]) -> None:
    """As high as what it takes allows; what takes nothing is just above who needs it first."""
    incoming: dict[Box, list[Box]] = {box: [] for box in boxes}
    outgoing: dict[Box, list[Box]] = {box: [] for box in boxes}
    for edge in edges:
        incoming[edge.target].append(edge.source)
        outgoing[edge.source].append(edge.target)
    for box in boxes:
        box.layer = max((source.layer + 1 for source in incoming[box]), default=0)
    for box in boxes:
        if not incoming[box] and outgoing[box] and box not in first:
            box.layer = min(target.layer for target in outgoing[box]) - 1
    inner = max((box.layer for box in boxes if box not in last), default=0)
    for box in last:
        box.layer = inner + 1


def _chain(edge: Edge) -> list[Edge]:
    """The edge by a lane in each layer that it passes."""
    found, source, output = [], edge.source, edge.output
    for layer in range(edge.source.layer + 1, edge.target.layer):
        lane = Box(_LANE, 0.0, [_LANE / 2], [_LANE / 2], lane=True, layer=layer)
        found.append(Edge(source, output, lane, 0))
        source, output = lane, 0
    return [*found, Edge(source, output, edge.target, edge.input)]


_Neighbours = dict[Box, list[tuple[Box, float, float]]]
"""Of a box the others, with the port of that one and its own."""


def _neighbours(parts: Iterable[Edge]) -> tuple[_Neighbours, _Neighbours]:
    above: _Neighbours = {}
    below: _Neighbours = {}
    for e in parts:
        taken, given = e.target.inputs[e.input], e.source.outputs[e.output]
        above.setdefault(e.target, []).append((e.source, given, taken))
        below.setdefault(e.source, []).append((e.target, taken, given))
    return above, below


def _order(rows: list[list[Box]], above: _Neighbours, below: _Neighbours) -> None:
    """Sweep down and up: each box to where its neighbours are on average, so that few lines cross; the best of all is kept."""
    best, fewest = [list(row) for row in rows], _crossings(rows, below)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        neighbours = above if down else below
        for row in rows if down else reversed(rows):
            places = {box: k for other in rows for k, box in enumerate(other)}

            def middle(box: Box, places: dict[Box, int] = places, neighbours: _Neighbours = neighbours) -> float:
                found = [places[other] + port / max(1.0, other.width) for other, port, _ in neighbours.get(box, ())]
                return sum(found) / len(found) if found else places[box]

            row.sort(key=middle)
        count = _crossings(rows, below)
        if count < fewest:
            best, fewest = [list(row) for row in rows], count
    for row, kept in zip(rows, best, strict=True):
        row[:] = kept


def _crossings(rows: list[list[Box]], below: _Neighbours) -> int:
    total = 0
    for row, following in pairwise(rows):
        places = {box: k for k, box in enumerate(following)}
        ends = [
            (k + own / max(1.0, box.width), places[other] + port / max(1.0, other.width))
            for k, box in enumerate(row)
            for other, port, own in below.get(box, ())
            if other in places
        ]
        ends.sort()
        total += sum(b > d for k, (a, b) in enumerate(ends) for c, d in ends[k + 1 :] if c > a)
    return total


def _across(rows: list[list[Box]], above: _Neighbours, below: _Neighbours) -> None:
    """Each box as near to below and above its neighbours as the others in its layer allow; lanes are straight before all."""
    for row in rows:
        x = 0.0
        for box in row:
            box.x = x
            x += box.width + GAP
    for turn in range(_ROUNDS):
        for row in rows if turn % 2 == 0 else reversed(rows):
            wanted, weights = [], []
            for box in row:
                both = (*above.get(box, ()), *below.get(box, ()))
                pulls = [(other.x + port - own, 8.0 if box.lane and other.lane else 2.0 if box.lane else 1.0) for other, port, own in both]
                weight = sum(w for _, w in pulls)
                wanted.append(sum(x * w for x, w in pulls) / weight if pulls else box.x)
                weights.append(weight or 0.1)
            for box, x in zip(row, _apart(row, wanted, weights), strict=True):
                box.x = x


def _apart(row: Sequence[Box], wanted: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The nearest places to those that are wanted, by least squares, where nothing overlaps: an isotonic regression, by pooling."""
    offsets, offset = [], 0.0
    for k, box in enumerate(row):
        offsets.append(offset)
        gap = GAP if k + 1 == len(row) or not (box.lane and row[k + 1].lane) else 0.0
        offset += box.width + gap
    pools: list[list[float]] = []  # sum, weight, count
    for x, shift, weight in zip(wanted, offsets, weights, strict=True):
        pools.append([(x - shift) * weight, weight, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, weight, count = pools.pop()
            pools[-1] = [pools[-1][0] + total, pools[-1][1] + weight, pools[-1][2] + count]
    means = [total / weight for total, weight, count in pools for _ in range(int(count))]
    return [mean + shift for mean, shift in zip(means, offsets, strict=True)]


def _line(chain: Sequence[Edge], tops: Sequence[tuple[float, float]]) -> list[tuple[float, float, float]]:
    first, last = chain[0], chain[-1]
    bottom = first.source.y + first.source.height
    points = [(first.start, bottom - first.source.leave.get(first.output, 0.0), tops[first.source.layer][1])]
    points += [(edge.end, *tops[edge.target.layer]) for edge in chain[:-1]]
    return [*points, (last.end, last.target.y, last.target.y + last.target.reach.get(last.input, 0.0))]
