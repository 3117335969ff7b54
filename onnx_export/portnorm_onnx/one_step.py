"""One step of a recurrent layer where no axis may stand for time, not even one of length 1."""

from __future__ import annotations

from typing import Any

from portnorm.recurrent import input_term
from portnorm.scan import scan
from portnorm_onnx.namespace import NAMESPACE


def linear_step(x: Any, params: Any, state: Any, loop: Any, *, cell: Any, lengths: Any = None, sequences: bool = True) -> Any:
    """`portnorm.recurrent.linear_scan` of one step, whose input term is made of the step itself."""
    u, _, _ = input_term(cell, params, NAMESPACE.squeeze(x, axis=0))
    return scan((NAMESPACE.expand_dims(u, axis=0),), state, loop, cell=cell, lengths=lengths, sequences=sequences, keep=False)


def accepts(x: Any, params: Any, state: Any, loop: Any, *, cell: Any, lengths: Any = None, sequences: bool = True) -> bool:
    """Whether the target's steps are flat."""
    return x.opset is not None and x.opset.target.flat_steps and x.dims[0] == 1 and lengths is None


linear_step.accepts = accepts  # type: ignore[attr-defined]
