"""Both directions of differentiation in JAX from one vjp: a primitive for the tangent of a result, whose transpose is the vjp itself.

JAX makes a reverse pass by transposing a forward one, and takes a derivative rule for one of the two only: a function with a
`jax.custom_vjp` has no forward mode. So a call gets a `jax.custom_jvp`, in which all that follows from tangents is one operation,

    ẏ = J · ẋ,     J = (dy ↦ vjp(residuals, dy))ᵀ

In forward mode JAX transposes the vjp for it, which is linear in `dy`; in reverse mode the vjp is called as it is, and J is never made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend
import numpy
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad, batching, mlir

from portnorm.arrays import Array

Arrays = tuple[Array, ...]
Pull = Callable[[Arrays, Arrays], Sequence[Array | None]]
"""From what was kept and the cotangents of floating-point results, a cotangent for each tangent, `None` for zero."""

_tangents = jax.extend.core.Primitive("vjp_transposed")
"""`_tangents.bind(*kept, *tangents, pull=, count=, types=)`, where `count` arrays are kept: tangents of results of these `types`."""
_tangents.multiple_results = True


def tangents_of(pull: Pull, kept: Sequence[Array], tangents: Sequence[Any], results: Sequence[Array]) -> list[Any]:
    """A tangent of each of `results`, from those of arguments. Results that are no floating-point numbers have tangents without values."""
    known = [k for k, t in enumerate(tangents) if type(t) is not SymbolicZero]
    floating = [k for k, y in enumerate(results) if is_floating(y)]

    def pull_known(kept: Arrays, cotangents: Arrays) -> Sequence[Array | None]:
        found = pull(kept, cotangents)
        return [found[k] for k in known]

    types = tuple(results[k].aval.update(weak_type=False) for k in floating)
    made = _tangents.bind(*kept, *(tangents[k] for k in known), pull=pull_known, count=len(kept), types=types)
    by_place = dict(zip(floating, made, strict=True))
    return [by_place[k] if k in by_place else numpy.zeros(y.shape, jax.dtypes.float0) for k, y in enumerate(results)]


def is_floating(array: Array) -> bool:
    """Whether an array has a tangent."""
    return bool(jax.numpy.issubdtype(array.dtype, jax.numpy.floating))


def _evaluated(*arrays: Array, pull: Pull, count: int, types: Any) -> list[Array]:
    kept, tangents = arrays[:count], arrays[count:]

    def cotangents(*dys: Array) -> Arrays:
        found = pull(kept, dys)
        return tuple(jax.numpy.zeros_like(t) if d is None else d for t, d in zip(tangents, found, strict=True))

    # It is linear, so its own vjp is its transpose, wherever that is taken. `jax.linear_transpose` of a scan fails in JAX 0.5.
    _, transpose = jax.vjp(cotangents, *(ad.instantiate_zeros(ad.Zero(t)) for t in types))
    return list(transpose(tuple(tangents)))


def _transposed(dys: Sequence[Any], *arrays: Any, pull: Pull, count: int, types: Any) -> list[Any]:
    found = pull(arrays[:count], tuple(ad.instantiate_zeros(d) for d in dys))
    return [None] * count + [d if ad.is_undefined_primal(t) else None for t, d in zip(arrays[count:], found, strict=True)]


def _differentiated(arrays: Sequence[Array], dots: Sequence[Any], **params: Any) -> tuple[list[Array], list[Array]]:
    """For second derivatives JAX goes through the vjp, which is made of its own operations."""
    moved = [k for k, d in enumerate(dots) if type(d) is not ad.Zero]

    def value(*changed: Array) -> list[Array]:
        given = list(arrays)
        for k, a in zip(moved, changed, strict=True):
            given[k] = a
        return _evaluated(*given, **params)

    found: tuple[list[Array], list[Array]] = jax.jvp(value, [arrays[k] for k in moved], [dots[k] for k in moved])
    return found


def _batched(
    axis: Any, arrays: Sequence[Array], places: Sequence[int | None], *, pull: Pull, count: int, types: Any
) -> tuple[list[Array], list[int | None]]:
    """The same for all cases of `jax.vmap`: a primitive again, so that its transpose is the vjp mapped over them."""
    if all(place is None for place in places):
        return _tangents.bind(*arrays, pull=pull, count=count, types=types), [None] * len(types)
    mapped = functools.partial(jax.vmap, axis_size=axis.size, axis_name=axis.name, spmd_axis_name=axis.spmd_name)
    pull_all = mapped(pull, in_axes=(tuple(places[:count]), 0))
    tangents = [
        jax.numpy.broadcast_to(t, (axis.size, *t.shape)) if place is None else jax.numpy.moveaxis(t, place, 0)
        for t, place in zip(arrays[count:], places[count:], strict=True)
    ]
    every = tuple(jax.numpy.broadcast_to(ad.instantiate_zeros(ad.Zero(t)), (axis.size, *t.shape)).aval for t in types)
    return _tangents.bind(*arrays[:count], *tangents, pull=pull_all, count=count, types=every), [0] * len(types)


_tangents.def_impl(_evaluated)
_tangents.def_abstract_eval(lambda *_, types, **__: list(types))
mlir.register_lowering(_tangents, mlir.lower_fun(_evaluated, multiple_results=True))
ad.primitive_jvps[_tangents] = _differentiated
ad.primitive_transposes[_tangents] = _transposed
batching.fancy_primitive_batchers[_tangents] = _batched
