"""JAX: the time loop is `lax.scan`, so that tracing and compiling do not grow with the number of steps, and one `jax.custom_jvp` for every
Op and layer, whose transpose is the hand-written vjp."""

from __future__ import annotations

from typing import Any

import jax
import numpy

from portnorm.arrays import Array, Autodiff, Differentiable, Kernel, Library, leaves
from portnorm.errors import UnsupportedError
from portnorm.scan import Body
from portnorm_backends.flat import cotangents_of_call, put_together, taken_apart
from portnorm_backends.jax_derivatives import is_floating, tangents_of
from portnorm_backends.outermost import is_inside, outermost


def loop(carry: Any, xs: Any, kept: Any = None, *, body: Body, reverse: bool = False) -> tuple[Any, Any, Any]:
    """`portnorm.scan.loop`; what the body keeps is stacked over time. One step is no loop: outside of `jax.jit` each would be compiled."""
    length = next(leaves((xs, kept))).shape[0]
    if isinstance(length, int) and length == 1:
        carry, *found = body(carry, *jax.tree.map(lambda a: a[0], (xs, kept)))
        return carry, *jax.tree.map(lambda a: a[None], tuple(found))

    def step(carry: Any, inputs: Any) -> tuple[Any, Any]:
        carry, outputs, keep = body(carry, *inputs)
        return carry, (outputs, keep)

    carry, (outputs, keeps) = jax.lax.scan(step, carry, (xs, kept), reverse=reverse)
    return carry, outputs, keeps


def _rows_added(rows: Array, ids: Array, *, entries: int) -> Array:
    return jax.numpy.zeros((entries, rows.shape[1]), rows.dtype).at[ids].add(rows)


def _records(args: Any) -> bool:
    return not is_inside() and any(isinstance(a, jax.core.Tracer) for a in leaves(args))


def _call(function: Differentiable, args: tuple[Any, ...], attrs: dict[str, Any]) -> Any:
    arrays, form = taken_apart((args, attrs), _is_array)

    @jax.custom_jvp  # type: ignore[untyped-decorator]
    def value(*arrays: Array) -> Any:
        args, attrs = put_together(form, arrays)
        with outermost():
            return function(*args, **attrs)

    def derivative(arrays: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        args, attrs = put_together(form, arrays)
        with outermost():
            y, residuals = function.forward(*args, **attrs)
        kept, form_of_kept = taken_apart((residuals, attrs), _is_array)
        results, form_of_results = taken_apart(y, _is_array)
        dtypes = [a.dtype for a in arrays]

        def pull(kept: Any, dys: Any) -> list[Any]:
            given = iter(dys)
            dy = put_together(form_of_results, [next(given) if is_floating(a) else None for a in results])
            residuals, attrs = put_together(form_of_kept, kept)
            with outermost():
                found = cotangents_of_call(form, function.vjp(residuals, dy, **attrs))
            return [None if k not in found else found[k].astype(dtype) for k, dtype in enumerate(dtypes)]

        return y, put_together(form_of_results, tangents_of(pull, kept, tangents, results))

    value.defjvp(derivative, symbolic_zeros=True)
    return value(*arrays)


def _device(x: Any) -> Any:
    """The one device that an array is committed to; JAX places what is traced, a constant, sharded, or free to move."""
    if isinstance(x, jax.core.Tracer) or not getattr(x, "committed", False):
        return None
    return x.device if len(x.sharding.device_set) == 1 else None


def _seen(x: Array) -> Array:
    return numpy.asarray(x) if x.is_fully_addressable else x  # of which nobody can close over inside of a transformation


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | jax.core.Tracer)


def _draws(rng: Any, shapes: list[tuple[int, ...]], x: Array) -> list[Array] | None:
    if not _is_array(rng):
        return None
    if rng.ndim == 0 and jax.dtypes.issubdtype(rng.dtype, jax.numpy.integer):
        rng = jax.random.key(rng)  # a seed that came through a transformation
    if not jax.dtypes.issubdtype(rng.dtype, jax.dtypes.prng_key) and (rng.dtype.name, rng.ndim) != ("uint32", 1):
        raise UnsupportedError(f"`rng` is an array {rng.dtype.name}{list(rng.shape)} of JAX; expected a key, such as jax.random.key(0)")
    keys = jax.random.split(rng, max(1, len(shapes)))
    return [jax.random.uniform(key, shape, dtype="float32") for key, shape in zip(keys, shapes, strict=False)]


LIBRARY = Library(
    "jax",
    kernels={"loop": Kernel(call=loop), "rows_added": Kernel(call=_rows_added)},
    is_concrete=lambda x: not isinstance(x, jax.core.Tracer),
    seen=_seen,
    autodiff=Autodiff(_records, _call, jax.lax.stop_gradient, is_passing=lambda x: isinstance(x, jax.core.Tracer)),
    namespace=jax.numpy,  # while something is traced a constant can be of a type that is one of NumPy's too
    device=_device,
    draws=_draws,
    to_numpy=numpy.asarray,
)
