"""The time loop as one ONNX `Scan`: the body is traced once, on symbols for one step.

The body takes constants from outside and nothing else: what is computed outside enters as a state or as a scanned input, which every
runtime can do (OpenVINO cannot read an outer value that is no initializer).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from portnorm.arrays import leaves
from portnorm.errors import ExportError
from portnorm_onnx.symbolic import Body, Node, SymbolicArray, graph_input, opset_of

_count = itertools.count()


def loop(carry: Any, xs: Any, kept: Any = None, *, body: Any, reverse: bool = False) -> tuple[Any, Any, Any]:
    """`portnorm.scan.loop`: states are the arrays in `carry`; what the body keeps is stacked over time like its outputs."""
    initial, scanned = list(leaves(carry)), list(leaves((xs, kept)))
    opset = opset_of(*scanned, *initial)
    assert opset is not None, "the loop of an exported model has an input that is not constant"
    inner = [graph_input("", a.dtype, a.dims, opset) for a in initial]
    step = [graph_input("", a.dtype, a.dims[1:], opset) for a in scanned]
    first_serial = min(a.serial for a in (*inner, *step))
    step_xs, step_kept = _rebuilt((xs, kept), iter(step))
    new, outputs, keeps = body(_rebuilt(carry, iter(inner)), step_xs, step_kept)
    states, results = list(leaves(new)), list(leaves((outputs, keeps)))
    for before, after in zip(initial, states, strict=True):
        if (before.dtype, len(before.dims)) != (after.dtype, len(after.dims)):
            raise ExportError(f"a state of the loop changes its type from {before} to {after}")
    made = Node(
        "Scan",
        (*initial, *scanned),
        {"num_scan_inputs": len(scanned)},
        body=Body((*inner, *step), (*states, *results), first_serial),
    )
    if reverse:
        made.attributes |= {"scan_input_directions": [1] * len(scanned), "scan_output_directions": [1] * len(results)}
    time = scanned[0].dims[0]
    made.outputs = (
        *(SymbolicArray(a.dtype, a.dims, opset, producer=made) for a in initial),
        *(SymbolicArray(a.dtype, (time, *a.dims), opset, producer=made) for a in results),
    )
    flat = iter(made.outputs)
    last = _rebuilt(new, flat)
    return (last, *_rebuilt((outputs, keeps), flat))


def _rebuilt(tree: Any, flat: Iterator[Any]) -> Any:
    """`tree` with its arrays replaced, in order, by those of `flat`."""
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_rebuilt(branch, flat) for branch in tree))
    if isinstance(tree, tuple | list):
        return type(tree)(_rebuilt(branch, flat) for branch in tree)
    return None if tree is None else next(flat)
