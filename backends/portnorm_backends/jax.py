"""JAX: the time loop is `lax.scan`, so that tracing and compiling do not grow with the number of steps."""

from __future__ import annotations

from typing import Any

import jax

from portnorm.arrays import Kernel, Library, leaves
from portnorm.scan import Body


def loop(carry: Any, xs: Any, kept: Any = None, *, body: Body, reverse: bool = False) -> tuple[Any, Any, Any]:
    """`portnorm.scan.loop`; what the body keeps is stacked over time."""

    def step(carry: Any, inputs: Any) -> tuple[Any, Any]:
        carry, outputs, keep = body(carry, *inputs)
        return carry, (outputs, keep)

    length = next(leaves(jax.tree.leaves((xs, kept)))).shape[0]
    carry, (outputs, keeps) = jax.lax.scan(step, carry, (xs, kept), length=length, reverse=reverse)
    return carry, outputs, keeps


LIBRARY = Library(
    "jax",
    kernels={"loop": Kernel(call=loop)},
    is_concrete=lambda x: not isinstance(x, jax.core.Tracer),
)
