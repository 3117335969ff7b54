"""Names of the parameters of a recurrent layer: inside one direction, and with the suffix that says which one it is, as torch has it."""

from __future__ import annotations

from portnorm.layers.pure import Arrays


def in_direction(name: str, layer: int, direction: int) -> str:
    """The full name of what is called `name` inside one direction: `norm_c.weight` of layer 0 to `norm_c_l0.weight`."""
    return with_suffix(name, f"_l{layer}" + "_reverse" * direction)


def with_suffix(name: str, suffix: str) -> str:
    """`norm_c.weight` and `_l0` to `norm_c_l0.weight`."""
    head, dot, tail = name.partition(".")
    return head + suffix + dot + tail


_inner: dict[tuple[str, str], str] = {}
"""What `_without` has found: it is asked in every call, for every parameter."""


def without_suffix(arrays: Arrays, suffix: str) -> Arrays:
    """The arrays of one direction, by their names inside the cell."""
    found = {}
    for name, array in arrays.items():
        inner = _inner.get((name, suffix))
        if inner is None:
            inner = _inner.setdefault((name, suffix), _without(name, suffix))
        if inner:
            found[inner] = array
    return found


def _without(name: str, suffix: str) -> str:
    """`norm_c_l0.weight` and `_l0` to `norm_c.weight`; "" for the name of another direction."""
    head, dot, tail = name.partition(".")
    return head.removesuffix(suffix) + dot + tail if head.endswith(suffix) else ""
