"""What an ONNX graph does to the steps of a sequence before and after a recurrent node: turned around, or along another axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy
import onnx
from onnx import TensorProto, helper

from portnorm.checkpoint.onnx_constants import Scope, hinders
from portnorm.checkpoint.stored import NumPyArray
from portnorm.errors import CheckpointError

Axes = tuple[str | None, ...] | None
"""What each axis of a value is: the steps `t`, the batch `b`, features `f`, directions `d`; `None` where that is not known."""
_ROUNDING = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
_SAME = frozenset({"Identity", "Cast", "CastLike", "Dropout", "Pad", "ScatterElements", "Where"}) | _ROUNDING
"""Operators that leave each axis in its place, and the steps in their order."""
_EACH = frozenset({"Add", "Sub", "Mul", "Div", "Relu", "LeakyRelu", "PRelu", "Elu", "Gelu", "Sigmoid", "Tanh", "Clip", "Neg", "Abs", "Exp"})
_EACH |= {"Log", "Sqrt", "Pow", "Softplus", "Erf", "LayerNormalization", "RMSNormalization"}
"""Operators that compute something for each step, and leave each axis in its place."""
SEVERAL = " and "
"""Between the names of operators where several turn the steps, which may be back again."""
_LAYOUT = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze")
_NARROW = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16})
_FURTHER = 60
_END = 2**40
PLACED = ("GatherElements", "GatherND", "ScatterND")
"""Operators that take each value from a place of its own, in whatever order."""
_CHOOSING = frozenset({"Slice", "Gather", "ReverseSequence", "Compress", "Split", "Pad", "Tile", *PLACED})
"""Operators that take a part of a value, or put its parts elsewhere."""


@dataclass
class Before:
    """What lies between an input of the graph and a recurrent node."""

    ends: list[Axes] = field(default_factory=list)
    """The axes of the values that this begins with."""
    by: list[str] = field(default_factory=list)
    """The operators that move axes."""
    turned: str | None = None
    """What turns the steps around."""
    placed: str | None = None
    """What takes steps from places that the graph computes."""
    rounded: str | None = None
    """What rounds the values."""
    chosen: list[str] = field(default_factory=list)
    """What takes a part of the values, or puts them elsewhere, and leaves the steps in their order."""


class After(NamedTuple):
    """A value that is made of what a recurrent node gives, where something else than its layout begins."""

    axes: Axes
    turned: str | None


class Steps:
    """Follows the steps of one node through its graph."""

    def __init__(self, scope: Scope):
        self.scope = scope
        self.seen: dict[tuple[int, str], Axes] = {}
        self.given: set[tuple[int, str, bool]] = set()
        self.rounded: str | None = None
        """What rounds the output."""
        self.chosen: list[str] = []
        """What takes a part of the output, or puts it elsewhere, and leaves the steps in their order."""

    # -- before the node -----------------------------------------------------------------------------------------------------------------

    def before(self, name: str, axes: Axes) -> Before:
        """What was done to a value with these axes."""
        found = Before()
        self._back(self.scope, name, axes, found, computed=False, depth=0)
        return found

    def _back(self, at: Scope, name: str, axes: Axes, found: Before, *, computed: bool, depth: int) -> None:
        scope, name = at.at(name)
        if scope is None or depth > _FURTHER or scope.is_constant(name) or (computed and axes is None):
            return
        if (id(scope), name) in self.seen:
            return
        self.seen[id(scope), name] = axes
        end = found.ends if not computed else []
        node = scope.nodes.get(name)
        if node is None:
            entry = scope.entries.get(name)
            if entry is not None and entry.kind == "slice":
                if entry.backwards:
                    found.turned = _and(found.turned, f"{entry.node.op_type} (scan_input_directions)")
                axes = None if entry.axis is None else _with(axes, entry.axis)
                self._back(entry.scope, entry.name, axes, found, computed=computed, depth=depth + 1)
            else:
                end.append(axes)
            return
        move = _Move(scope, node, axes)
        if node.op_type in _EACH or (node.op_type == "MatMul" and scope.is_constant(node.input[1])):
            end.append(axes)
            for i in node.input if node.op_type not in ("LayerNormalization", "RMSNormalization") else node.input[:1]:
                self._back(scope, i, axes, found, computed=True, depth=depth + 1)
            return
        turned = move.turns()
        if turned is not None and turned.endswith("?"):
            found.placed = found.placed or turned[:-1]
        elif turned is not None:
            found.turned = _and(found.turned, turned)
        if not computed and (node.op_type in _ROUNDING or (node.op_type == "Cast" and move.said.get("to") in _NARROW)):
            found.rounded = found.rounded or node.op_type
        if node.op_type == "Gather" and scope.is_constant(node.input[0]):  # rows of a table
            end.append(axes)
            inner = None if axes is None else axes[: len(axes) - len(scope.shape(node.input[0])[0]) + 1]
            self._back(scope, node.input[1], inner, found, computed=True, depth=depth + 1)
            return
        elif not computed and turned is None and node.op_type in (*_CHOOSING, "Concat") and not move.is_step():
            found.chosen.append(node.op_type)
        sources = list(move.sources())
        if not sources:
            end.append(axes)
        for i, inner in sources:
            if node.op_type in ("Transpose", "Einsum") and not computed:
                found.by.append(node.op_type)
            self._back(scope, i, inner, found, computed=computed, depth=depth + 1)

    # -- after the node ------------------------------------------------------------------------------------------------------------------

    def after(self, outputs: dict[str, Axes]) -> list[After]:
        """Where the sequences end up that a node gives."""
        found = (end for name, axes in outputs.items() for end in self._forth(self.scope, name, axes, None, 0))
        return [end for end in found if end.turned is not None or (end.axes is not None and "t" in end.axes)]

    def _forth(self, scope: Scope, name: str, axes: Axes, turned: str | None, depth: int) -> Iterator[After]:
        if (id(scope), name, turned is None) in self.given:
            return
        self.given.add((id(scope), name, turned is None))
        self.seen.setdefault((id(scope), name), axes)
        readers = [n for n in scope.graph.node if name in n.input and n.op_type not in ("Shape", "Size")]
        inside = [k for k, o in enumerate(scope.graph.output) if o.name == name]
        if inside and scope.around is not None and scope.outer is not None:
            yield from self._out(scope, inside, axes, turned, depth)
        elif inside or depth > _FURTHER:
            yield After(axes if inside else None, turned)
            readers = readers if inside else []
        for node in readers:
            if node.op_type in _ROUNDING:
                self.rounded = node.op_type
            moved = self._moved(scope, node, name, axes)
            if moved is None:
                yield After(axes, turned)
                continue
            inner, again = moved
            if inner is None and axes is not None:
                yield After(axes, turned)
            if again is None and (node.op_type in _CHOOSING or (axes is None and node.op_type == "Transpose")):
                self.chosen.append(node.op_type)
            for output in node.output:
                if output and inner != ():
                    yield from self._forth(scope, output, inner, _and(turned, again), depth + 1)

    def _out(self, scope: Scope, places: list[int], axes: Axes, turned: str | None, depth: int) -> Iterator[After]:
        """Out of a body."""
        around, outer = scope.around, scope.outer
        assert around is not None
        assert outer is not None
        said = {a.name: helper.get_attribute_value(a) for a in around.attribute if a.type != onnx.AttributeProto.GRAPH}
        inputs = len(scope.graph.input) - int(said.get("num_scan_inputs", 2))  # a Loop's count and condition are no states
        skipped = 1 if around.op_type == "Loop" else 0
        for place in places:
            k = place - skipped
            if not 0 <= k < len(around.output) or not around.output[k]:
                continue
            if around.op_type == "If":
                yield from self._forth(outer, around.output[k], axes, turned, depth + 1)
            elif k >= inputs and around.op_type in ("Scan", "Loop"):
                ways, along = said.get("scan_output_directions", ()), said.get("scan_output_axes", ())
                slot = k - inputs
                again = f"{around.op_type} (scan_output_directions)" if slot < len(ways) and ways[slot] else None
                wide = _with(axes, int(along[slot]) if slot < len(along) else 0)
                yield from self._forth(outer, around.output[k], wide, _and(turned, again), depth + 1)

    def _moved(self, scope: Scope, node: onnx.NodeProto, name: str, axes: Axes) -> tuple[Axes, str | None] | None:
        """(axes, what turned the steps) after a node; no axes at all where one step is taken, `None` where it does something else."""
        said, kind = {a.name: helper.get_attribute_value(a) for a in node.attribute}, node.op_type
        if kind in _SAME:
            return axes, None
        if axes is None:
            return (None, None) if kind in _LAYOUT or (kind in _CHOOSING and name == node.input[0]) else None
        if kind == "Transpose":
            order = said.get("perm", range(len(axes))[::-1])
            return tuple(axes[p] for p in order) if len(order) == len(axes) else None, None
        if kind in ("Squeeze", "Unsqueeze"):
            places = _numbers(scope, node, said, "axes", 1)
            if places is None:
                return None, None
            if kind == "Squeeze":
                return tuple(a for k, a in enumerate(axes) if k not in {p % len(axes) for p in places}), None
            return _spread(axes, places), None
        if kind == "Reshape":
            shape = self.number(scope, node.input[1], {"t": 10007, "b": 10009})
            if len(axes) == 4 and shape is not None and shape.size == 3 and all(n >= 0 for n in shape.reshape(-1)[:2]):
                return (*axes[:2], "f"), None
            return None, None
        if kind == "Concat":
            return axes, _Move(scope, node, axes).certainly_turns()
        if kind == "Split":
            return axes, None
        move = _Move(scope, node, axes)
        if kind in ("Slice", "ReverseSequence", *PLACED) and name == node.input[0]:
            return axes, move.certainly_turns()
        if kind == "Gather" and name == node.input[0] and scope.is_constant(node.input[1]) and not scope.shape(node.input[1])[0]:
            place = int(said.get("axis", 0)) % len(axes)
            return () if axes[place] == "t" else tuple(a for k, a in enumerate(axes) if k != place), None
        return (axes, move.certainly_turns()) if kind == "Gather" and name == node.input[0] else None

    # -- numbers that shapes make ----------------------------------------------------------------------------------------------------------

    def number(self, at: Scope, name: str, sizes: dict[str, int]) -> NumPyArray | None:
        """What a value is where the axes that were seen have these sizes; `None` where it depends on something else."""
        return self._number(at, name, sizes, {}, 0)

    def _number(
        self, at: Scope, name: str, sizes: dict[str, int], known: dict[tuple[int, str], NumPyArray | None], depth: int
    ) -> NumPyArray | None:
        scope, name = at.at(name)
        if scope is None or depth > _FURTHER:
            return None
        if (id(scope), name) not in known:
            known[id(scope), name] = self._made(scope, name, sizes, known, depth)
        return known[id(scope), name]

    def _made(
        self, scope: Scope, name: str, sizes: dict[str, int], known: dict[tuple[int, str], NumPyArray | None], depth: int
    ) -> NumPyArray | None:
        try:
            if scope.is_constant(name):
                return scope.value(name)
            node = scope.nodes.get(name)
            if node is None or not node.input:
                return None
            if node.op_type in ("Shape", "Size"):
                of, called = scope.at(node.input[0])
                axes = self.seen.get((id(of), called))
                if axes is None:
                    return None
                shape = [sizes.get(a or "", 1013) for a in axes]
                if node.op_type == "Size":
                    return numpy.asarray(math.prod(shape))
                said = {a.name: a.i for a in node.attribute}
                return numpy.asarray(shape[said.get("start", 0) : said.get("end", len(shape))])
            if hinders(node, scope.file.version()) is not None:
                return None
            inputs = [self._number(scope, i, sizes, known, depth + 1) if i else None for i in node.input]
            if any(i and a is None for i, a in zip(node.input, inputs, strict=True)):
                return None
            return scope.file.run(node, inputs)[[o for o in node.output if o].index(name)]
        except CheckpointError:
            return None


def _and(one: str | None, other: str | None) -> str | None:
    """What turns steps around, once or several times."""
    return f"{one}{SEVERAL}{other}" if one and other else one or other


def layout(at: Scope, name: str) -> list[str]:
    """The operators that move the axes of a value right before it is read."""
    found: list[str] = []
    for _ in range(_FURTHER):
        scope, name = at.at(name)
        node = None if scope is None else scope.nodes.get(name)
        if scope is None or node is None or node.op_type not in ("Identity", "Cast", *_LAYOUT):
            break
        found += [node.op_type] if node.op_type in _LAYOUT else []
        at, name = scope, node.input[0]
    return found


class _Move:
    """A node that moves values, seen from its output, whose axes are known as far as they are."""

    def __init__(self, scope: Scope, node: onnx.NodeProto, axes: Axes):
        self.scope, self.node, self.axes = scope, node, axes
        self.said: dict[str, Any] = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.type != onnx.AttributeProto.GRAPH}

    def _may_be_steps(self, axis: int) -> bool:
        """Whether an axis has the steps, as far as is known."""
        return self.axes is None or "t" not in self.axes or not -len(self.axes) <= axis < len(self.axes) or self.axes[axis] == "t"

    def _value(self, k: int) -> NumPyArray | None:
        given = len(self.node.input) > k and self.node.input[k] and self.scope.is_constant(self.node.input[k])
        return self.scope.value(self.node.input[k]) if given else None

    def is_step(self) -> bool:
        """Whether this is the step of a loop."""
        return self.node.op_type == "Gather" and _way_of(self.scope, self.node.input[1]) is not None

    def turns(self) -> str | None:
        """The operator, where it brings the steps into another order; with a question mark where it may, by places that are not known."""
        rule = _TURNS.get(self.node.op_type)
        return rule(self) if rule is not None else None

    def certainly_turns(self) -> str | None:
        turned = self.turns()
        return None if turned is None or turned.endswith("?") else turned

    def slice(self) -> str | None:
        if len(self.node.input) < 5 or not self.node.input[4]:
            return None
        steps, axes = self._value(4), self._value(3) if self.node.input[3] else None
        if steps is None:
            return "Slice?"
        places = range(steps.size) if axes is None else axes.reshape(-1)
        turned = any(n < 0 and self._may_be_steps(int(p)) for n, p in zip(steps.reshape(-1), places, strict=False))
        return "Slice" if turned else None

    def gather(self) -> str | None:
        if self.scope.is_constant(self.node.input[0]):
            return None
        axis, places = int(self.said.get("axis", 0)), self._value(1)
        if places is not None:
            steady = places.ndim == 0 or (places.ndim == 1 and _is_ascending(places))
            return None if steady or not self._may_be_steps(axis) else "Gather"
        way = _way_of(self.scope, self.node.input[1])
        return None if way == "up" else "Gather" if way == "down" else "Gather?" if self._may_be_steps(axis) else None

    def gather_elements(self) -> str | None:
        axis, places = int(self.said.get("axis", 0)), self._value(1)
        if not self._may_be_steps(axis) or (places is not None and places.ndim and bool(numpy.all(numpy.diff(places, axis=axis) >= 0))):
            return None
        return self.node.op_type

    def gather_nd(self) -> str | None:
        places = self._value(1)
        plain = places is not None and places.ndim == 2 and places.shape[1] == 1 and not self.said.get("batch_dims", 0)
        if plain and (not self._may_be_steps(0) or _is_ascending(places[:, 0])):  # type: ignore[index]
            return None
        return self.node.op_type

    def reverse_sequence(self) -> str | None:
        return "ReverseSequence" if self._may_be_steps(int(self.said.get("time_axis", 0))) else None

    def concat(self) -> str | None:
        """Pieces of one value that are put together again in another order."""
        if not self._may_be_steps(int(self.said.get("axis", 0))):
            return None
        if self.axes is None:
            return "Concat?"
        last: dict[tuple[int, str], int] = {}
        for name in self.node.input:
            root, place = _piece(self.scope, name)
            if place <= last.get(root, -1):
                return self.node.op_type
            last[root] = place
        return None

    def sources(self) -> Iterator[tuple[str, Axes]]:
        """The values that this one is made of, and their axes; nothing where it is computed."""
        kind, axes, inputs = self.node.op_type, self.axes, self.node.input
        if kind == "Where":
            yield from ((i, axes) for i in inputs[1:])
        elif kind == "Concat":
            yield from ((i, axes) for i in dict.fromkeys(inputs))
        elif kind in _SAME or kind in ("Slice", "Split", "Compress", "ReverseSequence", *PLACED):
            yield inputs[0], axes
        elif kind == "Transpose":
            order = list(self.said.get("perm", () if axes is None else range(len(axes))[::-1]))
            fits = axes is not None and sorted(order) == list(range(len(axes)))
            yield inputs[0], tuple(axes[order.index(k)] for k in range(len(axes))) if fits and axes is not None else None
        elif kind == "Einsum":
            before, _, behind = _text(self.said.get("equation", b"")).replace(" ", "").partition("->")
            fits = axes is not None and len(inputs) == 1 and sorted(before) == sorted(behind) and len(behind) == len(axes)
            yield from [(inputs[0], tuple(axes[behind.index(c)] for c in before))] if fits and axes is not None else []
        elif kind in ("Squeeze", "Unsqueeze"):
            places = _numbers(self.scope, self.node, self.said, "axes", 1)
            if axes is None or places is None:
                yield inputs[0], None
            elif kind == "Squeeze":
                yield inputs[0], _spread(axes, places)
            else:
                gone = {p % len(axes) for p in places}
                yield inputs[0], tuple(a for k, a in enumerate(axes) if k not in gone)
        elif kind in ("Reshape", "Flatten", "Expand", "Tile"):
            yield inputs[0], None
        elif kind == "Gather":
            chosen = self._value(1)
            shape = self.scope.file.shape(inputs[1]) if chosen is None else chosen.shape
            rank = len(shape) if shape is not None else 0 if _way_of(self.scope, inputs[1]) is not None else None
            one = _with(axes, int(self.said.get("axis", 0))) if rank == 0 else None
            yield inputs[0], axes if rank == 1 else one


_TURNS: dict[str, Callable[[_Move], str | None]] = {
    "Slice": _Move.slice,
    "Gather": _Move.gather,
    "GatherElements": _Move.gather_elements,
    "GatherND": _Move.gather_nd,
    "ScatterElements": lambda move: "ScatterElements?",
    "ScatterND": lambda move: "ScatterND?",
    "ReverseSequence": _Move.reverse_sequence,
    "Concat": _Move.concat,
}


def _way_of(scope: Scope, name: str, depth: int = 0) -> str | None:
    """Whether places that a graph computes go `"up"` or `"down"`, from one to the next or from one run of a body to the next."""
    at, name = scope.at(name)
    if at is None or depth > _FURTHER:
        return None
    node, entry = at.nodes.get(name), at.entries.get(name)
    if entry is not None and entry.kind == "count":
        return "up"
    if entry is not None and entry.kind == "carried":
        node = at.nodes.get(entry.after)
    if node is None:
        return None
    if node.op_type in ("Identity", "Cast", "Unsqueeze", "Squeeze", "Reshape", "Slice", "Where"):
        return _way_of(at, node.input[1 if node.op_type == "Where" else 0], depth + 1)
    if node.op_type == "Range" and at.is_constant(node.input[2]) and at.value(node.input[2]) > 0:
        return "up"
    if node.op_type == "Add":
        down = any(at.is_constant(i) and numpy.any(at.value(i) < 0) for i in node.input)
        return "down" if down else "up" if any(at.is_constant(i) for i in node.input) else None
    return "down" if node.op_type in ("Sub", "Range") else None


def _piece(scope: Scope, name: str) -> tuple[tuple[int, str], int]:
    """The value that another one is a part of, and where it begins there; its own beginning where it is no part."""
    for _ in range(_FURTHER):
        at, name = scope.at(name)
        if at is None:
            break
        scope, node = at, at.nodes.get(name)
        if node is None:
            break
        if node.op_type == "Split":
            return (id(scope), node.input[0]), list(node.output).index(name)
        place = 1 if node.op_type in ("Slice", "Gather") else None
        if place is not None and len(node.input) > place and scope.is_constant(node.input[place]) and not scope.is_constant(node.input[0]):
            first = int(scope.value(node.input[place]).reshape(-1)[0])
            return (id(scope), node.input[0]), first if first >= 0 else _END + first
        if node.op_type not in ("Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape"):
            break
        name = node.input[0]
    return (id(scope), name), 0


def _is_ascending(places: NumPyArray) -> bool:
    counted = numpy.where(places < 0, places.astype(numpy.int64) + _END, places)
    return bool(numpy.all(numpy.diff(counted) >= 0))


def _with(axes: Axes, place: int) -> Axes:
    """Axes with one more, of which there is one value in what they are of: that of the steps, where there is none yet."""
    if axes is None:
        return None
    place = place % (len(axes) + 1)
    return (*axes[:place], None if "t" in axes else "t", *axes[place:])


def _spread(axes: tuple[str | None, ...], places: Sequence[int]) -> Axes:
    """Axes with those of one entry at some places."""
    rank, rest = len(axes) + len(places), iter(axes)
    gone = {p % rank for p in places}
    return tuple(None if k in gone else next(rest, None) for k in range(rank))


def _numbers(scope: Scope, node: onnx.NodeProto, said: dict[str, Any], name: str, place: int) -> list[int] | None:
    """Numbers of an attribute, which later operator sets have as an input."""
    if name in said:
        return [int(n) for n in said[name]]
    given = len(node.input) > place and node.input[place] and scope.is_constant(node.input[place])
    return [int(n) for n in scope.value(node.input[place]).reshape(-1)] if given else None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
