"""What a check of a graph found, for people and for machines."""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import onnx
from onnx import helper

from portnorm.arrays import to_numpy
from portnorm.checkpoint.onnx_constants import graphs, tensors
from portnorm.layers.layer import Layer

_FEW = 2**17
"""Weights of a product below which its integers save no time in onnxruntime (docs/runtimes.md): 4 · 128 · 128 do not, 4 · 256 · 256 do."""


@dataclass(frozen=True)
class Comparison:
    """One comparison of a runtime with the eager run, at the output that came closest to what is allowed."""

    runtime: str
    output: str
    case: str
    steps: int
    """How many time steps were run; 1 for a model without time."""
    difference: float
    """Largest absolute difference: to the float64 run for a trajectory, to the eager step for one step."""
    allowed: float
    eager_difference: float
    """The eager run's own distance to the float64 run, over the same steps."""

    @property
    def share(self) -> float:
        """How much of what is allowed was needed."""
        return self.difference / self.allowed if self.allowed else float(self.difference > 0)


@dataclass(frozen=True)
class Outcome:
    """What came of one runtime."""

    runtime: str
    version: str
    status: str
    """`passed`, `differs`, `does not run` or `not installed`."""
    detail: str


@dataclass(frozen=True)
class Change:
    """How far a model whose products are those of integers is from the model with the weights as they were."""

    largest: float
    """The largest difference of any output."""
    mean: float
    same: float
    """The rate at which the largest feature of an output is the same."""

    @classmethod
    def of(cls, pairs: Iterable[tuple[Any, Any]]) -> Change:
        """From results before and after."""
        largest, total, count, same, rows = 0.0, 0.0, 0, 0, 0
        for before, after in pairs:
            difference = numpy.abs(before.astype(numpy.float64) - after)
            largest = max(largest, float(numpy.max(difference, initial=0.0)))
            total, count = total + float(difference.sum()), count + difference.size
            if difference.size and difference.ndim:
                equal = before.argmax(axis=-1) == after.argmax(axis=-1)
                same, rows = same + int(equal.sum()), rows + equal.size
        return cls(largest, total / max(count, 1), same / max(rows, 1))

    def __str__(self) -> str:
        return f"{self.largest:.2e} at most, {self.mean:.2e} on average; the largest feature is the same in {100 * self.same:.1f} %"


def change_of(plain: Layer, model: Layer, cases: Iterable[Any]) -> Change:
    """The change that integers make, from the outputs of `plain`, if it did not round, to those of `model`, which `quantizes`, over cases
    `(x, lengths or mask)`.
    """
    exact = plain.copy()
    for part in exact.layers():
        if getattr(part, "quantize", None) is not None:
            part.quantize = None

    def pairs() -> Iterator[tuple[Any, Any]]:
        for x, counted in cases:
            given = {} if counted is None else {"mask" if numpy.asarray(counted).dtype == bool else "lengths": counted}
            before, after = (to_numpy(y[0] if model.recurrent else y) for y in (exact(x, **given), model(x, **given)))
            yield before, after

    return Change.of(pairs())


@dataclass
class Report:
    """A checked graph: its size, how far each runtime was from the model, and what came of each runtime that was asked."""

    path: str | None
    opset: int
    nodes: int
    """Nodes of the graph, a `Scan` counted as one."""
    body_nodes: tuple[int, ...]
    """Nodes inside each `Scan`."""
    size: int
    """Bytes."""
    seconds: float = 0.0
    """Time that making the graph took, without the checks."""
    trajectories: list[Comparison] = field(default_factory=list)
    steps: list[Comparison] = field(default_factory=list)
    empty: list[Comparison] = field(default_factory=list)
    """Sequences without steps, a batch of none, no steps: where the runtime has an answer."""
    outcomes: list[Outcome] = field(default_factory=list)
    changes: tuple[str, ...] = ()
    """What a tool has changed in the file since it was exported."""
    change: Change | None = None
    """What integers have changed, where the graph has them."""
    left: tuple[str, ...] = ()
    """Files with the weights of earlier exports to the same path: this model does not read them, but a copy of an earlier one may."""
    model: onnx.ModelProto | None = field(default=None, repr=False)

    @classmethod
    def of(cls, proto: onnx.ModelProto, path: Path | None) -> Report:
        opset = next(o.version for o in proto.opset_import if o.domain == "")
        nodes, body_nodes = count_nodes(proto)
        return cls(None if path is None else str(path), opset, nodes, body_nodes, proto.ByteSize(), model=proto)

    @property
    def failures(self) -> list[Outcome]:
        """Runtimes that are there but differ or do not run the graph."""
        return [o for o in self.outcomes if o.status in ("differs", "does not run")]

    @property
    def worst_trajectory(self) -> float:
        """Largest distance of any runtime to the float64 run."""
        return max((c.difference for c in self.trajectories), default=0.0)

    @property
    def worst_step(self) -> float | None:
        """Largest difference of any runtime after one step from the same state; `None` for a graph without a loop."""
        return max((c.difference for c in self.steps), default=None)

    @property
    def horizon(self) -> int:
        """The longest run that was compared, in steps."""
        return max((c.steps for c in self.trajectories), default=0)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: everything but the model itself."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "model"}
        found["horizon"], found["remark"] = self.horizon, self.remark
        found["trajectories"] = [dataclasses.asdict(c) for c in self.trajectories]
        found["change"] = None if self.change is None else dataclasses.asdict(self.change)
        found["outcomes"] = [dataclasses.asdict(o) for o in self.outcomes]
        found["empty"] = [dataclasses.asdict(c) for c in self.empty]
        found["steps"] = [dataclasses.asdict(c) for c in self.steps]
        return found

    @property
    def remark(self) -> str:
        """What the check of products in float16 holds for; nothing where there are none."""
        if self.model is None or not any(map(_sums_float16, graphs(self.model.graph))):
            return ""
        own, others = ("float16", "float32") if platform.machine().lower() in ("arm64", "aarch64") else ("float32", "float16")
        arm = "ARM processors with half-precision arithmetic" if own == "float32" else "others"
        return (
            f"products of float16 were checked on {platform.machine()}, where they are summed in {own}; {arm} sum them in {others}. "
            "accurate=True writes float32 around them"
        )

    @property
    def _hardly(self) -> str:
        """Whether the matrices are so small that integers save bytes and no time."""
        graph = [] if self.model is None else graphs(self.model.graph)
        widest = max((math.prod(t.dims) for g in graph for t in tensors(g) if t.name.endswith((".int8", ".int4"))), default=_FEW)
        return "" if widest >= _FEW else "; products of so few weights hardly take less time so"

    def _of(self, outcome: Outcome) -> str:
        """One line: the nearest that a runtime that passed came to a limit, and what it runs on; the reason of another."""
        found = [c for c in (*self.steps, *self.trajectories) if c.runtime == outcome.runtime]
        if outcome.status != "passed" or not found:
            return outcome.detail
        worst = max(found, key=lambda c: c.share)
        return f"{worst.difference:.2e} of {worst.allowed:.2e} at {worst.case} ({outcome.detail})"

    def __str__(self) -> str:
        inside = "".join(f" + {n} in a Scan" for n in self.body_nodes)
        lines = [f"{self.path or 'model in memory'}: opset {self.opset}, {self.nodes} nodes{inside}, {self.size:,} bytes"]
        lines += [f"  changed by a tool: {change}" for change in self.changes]
        lines += [f"  {self.remark}"] if self.remark else []
        lines += [] if self.change is None else [f"  changed by integers: {self.change}{self._hardly}"]
        lines += [f"  left of earlier exports: {name}, which this model does not read" for name in self.left]
        if len(self.outcomes) > 1:
            lines += [f"  {o.runtime:<17} {o.version:<10} {o.status:<14} {self._of(o)}" for o in self.outcomes]
            return "\n".join(lines)
        lines += [f"  {'runtime':<17} {'gate':<34} {'output':<8} {'difference':>10} {'allowed':>10} {'eager':>10}"]
        for c in (*self.steps, *self.trajectories, *self.empty):
            numbers = f"{c.difference:>10.2e} {c.allowed:>10.2e} {c.eager_difference:>10.2e}"
            lines.append(f"  {c.runtime:<17} {c.case:<34} {c.output:<8} {numbers}")
        return "\n".join(lines)


def count_nodes(proto: onnx.ModelProto) -> tuple[int, tuple[int, ...]]:
    """(nodes of the graph, nodes inside each Scan)"""
    bodies = (helper.get_attribute_value(a) for n in proto.graph.node if n.op_type == "Scan" for a in n.attribute if a.name == "body")
    return len(proto.graph.node), tuple(len(body.node) for body in bodies)


_PRODUCTS = ("MatMul", "Gemm", "LSTM", "GRU", "RNN")


def _sums_float16(graph: onnx.GraphProto) -> bool:
    """Whether a graph has products of float16: not where numbers are converted before each."""
    types = {t.name: t.data_type for t in graph.initializer}
    types |= {v.name: v.type.tensor_type.elem_type for v in graph.input}
    cast = {name for n in graph.node if n.op_type == "Cast" for name in n.output}
    halves = any(kind == onnx.TensorProto.FLOAT16 for kind in types.values())
    return halves and any(name not in cast for n in graph.node if n.op_type in _PRODUCTS for name in n.input[:2])
