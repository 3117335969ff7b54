"""Nested arguments, results and residuals as a list of their arrays and a form: torch and JAX differentiate functions of arrays alone.

A form is the same nesting with a `Place` for each array, and with everything else as it was: `None`, numbers, names, cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from portnorm.arrays import Array, mapped
from portnorm.op import ByKeyword


@dataclass(frozen=True)
class Place:
    """Where an array lies in the list."""

    index: int


def taken_apart(tree: Any, is_array: Callable[[Any], bool]) -> tuple[list[Array], Any]:
    """The arrays of a tree, and its form."""
    arrays: list[Array] = []

    def place(leaf: Any) -> Any:
        if not is_array(leaf):
            return leaf
        arrays.append(leaf)
        return Place(len(arrays) - 1)

    return arrays, mapped(place, tree)


def put_together(form: Any, arrays: Sequence[Array]) -> Any:
    """The tree of this form with these arrays."""
    return mapped(lambda leaf: arrays[leaf.index] if isinstance(leaf, Place) else leaf, form)


def cotangents_of_call(form: Any, cotangents: tuple[Any, ...], wanted: Callable[[int], bool] = lambda place: True) -> dict[int, Array]:
    """By the place of its array in `form`, that of `(args, attrs)`, each cotangent that a vjp returned and that is wanted."""
    args, attrs = form
    found = cotangents_at(args, cotangents)
    if cotangents and isinstance(cotangents[-1], ByKeyword):
        places = {name: attrs[name].index for name in cotangents[-1] if isinstance(attrs.get(name), Place)}
        found |= {place: cotangents[-1][name]() for name, place in places.items() if wanted(place)}
    return found


def cotangents_at(form: Any, cotangents: Any) -> dict[int, Array]:
    """By the place of its array in `form`, each cotangent of a tree that is nested alike, with `None` for what has none.

    A tuple of cotangents may be shorter, as that of a state is, which leaves the count of steps out.
    """
    if cotangents is None:
        return {}
    if isinstance(form, Place):
        return {form.index: cotangents}
    if isinstance(form, dict):
        pairs = [(form[name], cotangents[name]) for name in form]
    else:
        pairs = list(zip(form, cotangents, strict=False)) if isinstance(form, tuple | list) else []
    return {index: d for branch, d_branch in pairs for index, d in cotangents_at(branch, d_branch).items()}
