"""The time loop as one ONNX `Scan`: the body is traced once, on symbols for one step.

The body takes constants from outside and nothing else: what is computed outside enters as a state or as a scanned input, which every
runtime can do (OpenVINO cannot read an outer value that is no initializer).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy

from portnorm.arrays import leaves, mapped
from portnorm.errors import ExportError, UnsupportedError
from portnorm_onnx.build import planned
from portnorm_onnx.fold import Frame, table_rows
from portnorm_onnx.namespace import NAMESPACE
from portnorm_onnx.symbolic import Body, Node, SymbolicArray, constant, graph_input, node, opset_of

NODES = 10_000
"""The most that a loop may have when it is written out."""


@dataclass(frozen=True, eq=False)
class Same:
    """What the body kept but every step has alike: it is not stacked over time."""

    array: SymbolicArray


def loop(carry: Any, xs: Any, kept: Any = None, *, body: Any, reverse: bool = False) -> tuple[Any, Any, Any]:
    """`portnorm.scan.loop`: states are the arrays in `carry`; what the body keeps is stacked over time like its outputs."""
    initial, scanned = list(leaves(carry)), [a for a in leaves((xs, kept)) if not isinstance(a, Same)]
    opset = opset_of(*scanned, *initial)
    assert opset is not None, "the loop of an exported model has an input that is not constant"
    if scanned[0].dims[0] == 1 or opset.unroll or not opset.target.loops:
        name = "`unroll`" if opset.unroll else f"target {opset.target.name!r}, which has no loop,"
        return _step_by_step(carry, xs, kept, body, scanned[0].dims[0], name, reverse=reverse)
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


def _step_by_step(carry: Any, xs: Any, kept: Any, body: Any, steps: int | str, name: str, *, reverse: bool) -> tuple[Any, Any, Any]:
    """Without a loop: a sequence that is known to be one step, or of a number of steps for a runtime that has none."""
    if isinstance(steps, str):
        raise UnsupportedError(
            f"{name} writes every step out, but their number is open ({steps!r}); give it by `input_shape`, as (20, 'batch', 8)"
        )
    found = []
    for t in reversed(range(steps)) if reverse else range(steps):
        before = carry
        carry, *made = body(carry, *mapped(functools.partial(_step, t=t, steps=steps), (xs, kept)))
        found.append(made)
        if len(found) == 2:
            _check_size((before, found[0]), (carry, found), steps, name)
    return (carry, *_stacked(found[::-1] if reverse else found))


def _check_size(one: Any, two: Any, steps: int, name: str) -> None:
    """Raise `UnsupportedError` where so many steps, as long as the second is, are no graph that tools read."""
    first, both = (len(planned(a for a in leaves(found) if not isinstance(a, Same)).nodes) for found in (one, two))
    if (whole := first + (both - first) * (steps - 1)) > NODES:
        raise UnsupportedError(
            f"{name} would write {whole:,} nodes for {steps} steps; expected at most {NODES:,}: give fewer steps by `input_shape`"
            f"{', or leave `unroll` out for a loop of any length' if name == '`unroll`' else ''}; `streaming=True` gives one step"
        )


def _step(a: Any, t: int, steps: int) -> Any:
    """Step t of a scanned input."""
    if isinstance(a, Same):
        return a.array
    if a.constant is not None:
        return constant(a.constant[t if a.constant.shape[0] == steps else 0])
    if a.rows_of is not None:
        table, rows = a.rows_of
        return table_rows(table, _step(rows, t, steps))
    return NAMESPACE.squeeze(a, axis=0) if steps == 1 else node("Gather", a, constant(numpy.int64(t)), axis=0)


def _stacked(found: list[Any]) -> Any:
    """What the steps gave, in order along a first axis; what is alike in all stays so."""
    parts = [list(leaves(made)) for made in found]
    columns = iter([[step[k] for step in parts] for k in range(len(parts[0]))])

    def together(_: Any) -> Any:
        steps = next(columns)
        if isinstance(steps[0], Same):
            return steps[0]
        if all(a.constant is not None for a in steps):
            return constant(numpy.stack([a.constant for a in steps]))
        stacked: SymbolicArray = NAMESPACE.stack(steps, axis=0)
        return stacked

    return mapped(together, found[0])
