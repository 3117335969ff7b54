"""A call that brings its own vjp is differentiated as a whole: what is called in it is not, in libraries that would see it (JAX, MLX)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_inside: ContextVar[bool] = ContextVar("inside a function that brings its own vjp", default=False)


def is_inside() -> bool:
    """Whether the call is part of one that is differentiated as a whole."""
    return _inside.get()


@contextlib.contextmanager
def outermost() -> Iterator[None]:
    """What is called in here is such a part."""
    token = _inside.set(True)
    try:
        yield
    finally:
        _inside.reset(token)
