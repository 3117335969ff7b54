"""The time loop as one ONNX `Scan`: the body is traced once, on symbols for one step.

The body takes constants from outside and nothing else: what is computed outside enters as a state or as a scanned input, which every
runtime can do (OpenVINO cannot read an outer value that is no initializer).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy

from portnorm.arrays import leaves, mapped
from portnorm.errors import ExportError
from portnorm_onnx.fold import Frame, table_rows
from portnorm_onnx.symbolic import Body, Node, SymbolicArray, constant, graph_input, node, opset_of


@dataclass(frozen=True, eq=False)
class Same:
    """What the body kept but every step has alike: it is not stacked over time."""

    array: SymbolicArray


def loop(carry: Any, xs: Any, kept: Any = None, *, body: Any, reverse: bool = False) -> tuple[Any, Any, Any]:
    """`portnorm.scan.loop`: states are the arrays in `carry`; what the body keeps is stacked over time like its outputs."""
    initial, scanned = list(leaves(carry)), [a for a in leaves((xs, kept)) if not isinstance(a, Same)]
    opset = opset_of(*scanned, *initial)
    assert opset is not None, "the loop of an exported model has an input that is not constant"
    if scanned[0].dims[0] == 1:
        return _one_step(carry, xs, kept, body)
    inner = [graph_input("", a.dtype, a.dims, opset) for a in initial]
    frame = Frame(opset)
    first_serial = min((a.serial for a in inner), default=0)
    step = [frame.step(a) for a in scanned]
    steps = iter(step)
    step_xs, step_kept = mapped(lambda a: a.array if isinstance(a, Same) else next(steps), (xs, kept))
    states_of = iter(inner)
    new, outputs, keeps = body(mapped(lambda a: next(states_of), carry), step_xs, step_kept)
    keeps = mapped(lambda a: Same(a) if a.constant is not None or a.serial < first_serial else a, keeps)
    states, results = list(leaves(new)), [a for a in leaves((outputs, keeps)) if not isinstance(a, Same)]
    for before, after in zip(initial, states, strict=True):
        if (before.dtype, len(before.dims)) != (after.dtype, len(after.dims)):
            raise ExportError(f"a state of the loop changes its type from {before} to {after}")
    made = Node(
        "Scan", (*initial, *frame.scanned), {}, body=Body((*inner, *frame.steps), (*states, *results), len(initial), reverse, first_serial)
    )
    time = scanned[0].dims[0]
    made.outputs = (
        *(SymbolicArray(a.dtype, a.dims, opset, producer=made) for a in initial),
        *(SymbolicArray(a.dtype, (time, *a.dims), opset, producer=made) for a in results),
    )
    flat = iter(made.outputs)
    return mapped(lambda a: a if isinstance(a, Same) else next(flat), (new, outputs, keeps))  # type: ignore[no-any-return]


def _one_step(carry: Any, xs: Any, kept: Any, body: Any) -> tuple[Any, Any, Any]:
    """A sequence that is known to be one step needs no loop."""
    first = constant(numpy.array([0]))

    def step(a: Any) -> Any:
        if isinstance(a, Same):
            return a.array
        if a.rows_of is not None:
            table, rows = a.rows_of
            return table_rows(table, node("Squeeze", rows, first))
        return constant(a.constant[0]) if a.constant is not None else node("Squeeze", a, first)

    new, outputs, keeps = body(carry, *mapped(step, (xs, kept)))
    return (new, *mapped(lambda a: node("Unsqueeze", a, first), (outputs, keeps)))
