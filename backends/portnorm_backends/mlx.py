"""MLX: its functions with the standard's keywords, sums in blocks, and one `mx.custom_function` for every Op and layer.

MLX is lazy: residuals are further results of that function, which nobody computes where they are not asked for. Shapes are part of what is
traced, so `mx.compile(shapeless=True)` is an error of MLX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import mlx.core as mx
import numpy

from portnorm.arrays import Array, Autodiff, Differentiable, DType, Library
from portnorm.errors import UnsupportedError
from portnorm_backends.blocks import shortened
from portnorm_backends.flat import cotangents_of_call, put_together, taken_apart
from portnorm_backends.outermost import is_inside, outermost
from portnorm_backends.standard import Namespace, axes_of


class MLXNamespace(Namespace):
    """MLX's functions of the Array API standard.

    float64 is none of its types here: exp and all that is made of it is good to seven digits in it, and Apple's GPUs do not have it.
    """

    __name__ = "mlx.core"
    kinds: ClassVar = {
        "bool": ("bool",),
        "signed integer": ("int8", "int16", "int32", "int64"),
        "unsigned integer": ("uint8", "uint16", "uint32", "uint64"),
        "real floating": ("float16", "bfloat16", "float32"),
    }

    def __getattr__(self, name: str) -> Any:
        if name == "float64":
            raise AttributeError("MLX's float64 has the accuracy of float32 in much of what it computes")
        found = getattr(mx, "bool_" if name == "bool" else name)
        setattr(self, name, found)
        return found

    def asarray(self, obj: Any, /, *, dtype: DType = None, device: Any = None, copy: bool | None = None) -> Array:
        """`mx.array`; an array of this type is given back as it is."""
        _refuse(device)
        if isinstance(obj, mx.array):
            return obj if dtype in (None, obj.dtype) and not copy else mx.array(obj, dtype=dtype)
        return mx.array(obj, dtype=dtype)

    def astype(self, x: Array, dtype: DType, /, *, copy: bool = True, device: Any = None) -> Array:
        """`x` in another type. Arrays are values here: one of this type is no copy."""
        return x if x.dtype == dtype else x.astype(dtype)

    def zeros(self, shape: Any, *, dtype: DType = None, device: Any = None) -> Array:
        _refuse(device)
        return mx.zeros(shape, dtype=dtype or mx.float32)

    def ones(self, shape: Any, *, dtype: DType = None, device: Any = None) -> Array:
        _refuse(device)
        return mx.ones(shape, dtype=dtype or mx.float32)

    def full(self, shape: Any, fill_value: Any, *, dtype: DType = None, device: Any = None) -> Array:
        _refuse(device)
        return mx.full(shape, fill_value, dtype=dtype)

    def zeros_like(self, x: Array, /, *, dtype: DType = None, device: Any = None) -> Array:
        _refuse(device)
        return mx.zeros(x.shape, dtype=dtype or x.dtype)

    def ones_like(self, x: Array, /, *, dtype: DType = None, device: Any = None) -> Array:
        _refuse(device)
        return mx.ones(x.shape, dtype=dtype or x.dtype)

    def arange(self, start: Any, /, stop: Any = None, step: Any = 1, *, dtype: DType = None, device: Any = None) -> Array:
        _refuse(device)
        first, last = (0, start) if stop is None else (start, stop)
        return mx.arange(first, last, step, dtype=dtype)

    def reshape(self, x: Array, /, shape: Any, *, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("an array in another shape is another one")
        return mx.reshape(x, shape)

    def clip(self, x: Array, /, min: Any = None, max: Any = None) -> Array:  # noqa: A002  # as the standard names them
        return x if min is None and max is None else mx.clip(x, min, max)

    def argsort(self, x: Array, /, *, axis: int = -1, descending: bool = False, stable: bool = True) -> Array:
        """The order of integers, those that are alike as they came."""
        if descending or not self.isdtype(x.dtype, ("integral", "bool")):
            raise NotImplementedError("the order of integers alone, the smallest first")
        count = x.shape[axis]
        places = mx.arange(count).reshape([count if a == axis % x.ndim else 1 for a in range(x.ndim)])
        return mx.argsort(x.astype(mx.int64) * count + places, axis=axis)

    def take(self, x: Array, indices: Array, /, *, axis: int) -> Array:
        """NaN for an index that is none: MLX reads whatever lies there, and only what is not traced was looked at before."""
        indices = mx.stop_gradient(indices)
        if not self.isdtype(x.dtype, "real floating"):
            return mx.take(x, indices, axis=axis)
        there = mx.logical_and(indices >= 0, indices < x.shape[axis])
        found = mx.take(x, mx.where(there, indices, 0), axis=axis)
        return mx.where(there.reshape(*there.shape, *(1 for _ in range(x.ndim - axis - 1))), found, mx.nan)

    def take_along_axis(self, x: Array, indices: Array, /, *, axis: int) -> Array:
        return mx.take_along_axis(x, mx.stop_gradient(indices), axis=axis)

    def sum(self, x: Array, /, *, axis: Any = None, dtype: DType = None, keepdims: bool = False) -> Array:
        """The sum in at least float32, in blocks: MLX itself adds one after the other on a processor, which takes it longer too."""
        axes = axes_of(x, axis)
        if not x.size:
            return _reduced(mx.sum, x, axis, keepdims, mx.array(0, dtype=dtype or x.dtype))
        if not self.isdtype(x.dtype, "real floating"):
            return mx.sum(x, axis=axes, keepdims=keepdims) if axes else x
        if not axes:
            return x
        wide = x.astype(mx.float32)
        for a in axes:
            wide = shortened(
                wide, a, lambda a, axis: mx.sum(a, axis=axis), mx.reshape, lambda parts, axis: mx.concatenate(parts, axis=axis)
            )
        return mx.sum(wide, axis=axes, keepdims=keepdims).astype(dtype or x.dtype)

    def mean(self, x: Array, /, *, axis: Any = None, keepdims: bool = False) -> Array:
        count = 1
        for a in axes_of(x, axis):
            count *= x.shape[a]
        return (self.sum(x, axis=axis, dtype=mx.float32, keepdims=keepdims) / count).astype(x.dtype)

    def max(self, x: Array, /, *, axis: Any = None, keepdims: bool = False) -> Array:
        return _reduced(mx.max, x, axis, keepdims)

    def min(self, x: Array, /, *, axis: Any = None, keepdims: bool = False) -> Array:
        return _reduced(mx.min, x, axis, keepdims)

    def any(self, x: Array, /, *, axis: Any = None, keepdims: bool = False) -> Array:
        return _reduced(mx.any, x, axis, keepdims, mx.array(False))

    def all(self, x: Array, /, *, axis: Any = None, keepdims: bool = False) -> Array:
        return _reduced(mx.all, x, axis, keepdims, mx.array(True))


def _reduced(find: Callable[..., Array], x: Array, axis: Any, keepdims: bool, of_none: Array | None = None) -> Array:
    """What `find` makes of `x`, and `of_none` of no values; MLX 0.32 now and then never comes back from a reduction of an empty array."""
    axes = axes_of(x, axis)
    if x.size or (of_none is None and not all(x.shape[a] for a in axes)):  # the latter is an error of MLX
        return find(x, axis=axes, keepdims=keepdims)
    shape = [1 if a in axes else n for a, n in enumerate(x.shape) if keepdims or a not in axes]
    return mx.zeros(shape, dtype=x.dtype) if of_none is None else mx.broadcast_to(of_none, shape)


def _refuse(device: Any) -> None:
    if device is not None:
        raise UnsupportedError(f"`device` is {device!r}, but arrays of MLX have none: mx.set_default_device says where operations run")


def _moved(x: Array, device: Any) -> Array:
    _refuse(device)
    return x


def _call(function: Differentiable, args: tuple[Any, ...], attrs: dict[str, Any]) -> Any:
    out = attrs.get("out")
    if out is not None:
        with outermost():
            return function(*args, **attrs)
    arrays, form = taken_apart((args, attrs), _is_array)
    forms: dict[str, Any] = {"derivatives": 0}

    def of_definition(*arrays: Array) -> list[Array]:
        args, attrs = put_together(form, arrays)
        with outermost():
            y, residuals = function.forward(*args, **attrs)
        results, forms["results"] = taken_apart(y, _is_array)
        kept, forms["kept"] = taken_apart((residuals, attrs), _is_array)
        forms["count"] = len(results)
        return [*results, *kept]

    value = mx.custom_function(of_definition)

    @value.vjp  # type: ignore[untyped-decorator,unused-ignore]
    def _(primals: Any, cotangents: Any, outputs: Any) -> list[Array]:
        forms["derivatives"] += 1
        if forms["derivatives"] > 1:  # of the vjp itself, which read the residuals: they have cotangents now
            return _by_mlx(of_definition, _listed(primals), _listed(cotangents))
        given = _listed(cotangents)[: forms["count"]]
        residuals, attrs = put_together(forms["kept"], _listed(outputs)[forms["count"] :])
        with outermost():
            found = cotangents_of_call(form, function.vjp(residuals, put_together(forms["results"], given), **attrs))
        return [found[k].astype(a.dtype) if k in found else mx.zeros_like(a) for k, a in enumerate(_listed(primals))]

    outputs = _listed(value(*arrays))
    return put_together(forms["results"], outputs[: forms["count"]])


def _by_mlx(function: Callable[..., list[Array]], arrays: list[Array], cotangents: list[Array]) -> list[Array]:
    """The cotangents of arrays that MLX finds from the operations of a function."""
    places = [k for k, a in enumerate(arrays) if _is_floating(a)]

    def floating(*changed: Array) -> list[Array]:
        given = dict(zip(places, changed, strict=True))
        return [a for a in function(*(given.get(k, a) for k, a in enumerate(arrays))) if _is_floating(a)]

    _, found = mx.vjp(floating, [arrays[k] for k in places], [d for d in cotangents if _is_floating(d)])
    by_place = dict(zip(places, found, strict=True))
    return [by_place[k] if k in by_place else mx.zeros_like(a) for k, a in enumerate(arrays)]


def _is_floating(a: Array) -> bool:
    return bool(mx.issubdtype(a.dtype, mx.floating))


def _listed(arrays: Any) -> list[Array]:
    return [arrays] if _is_array(arrays) else list(arrays)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, mx.array)


def _is_concrete(x: Array) -> bool:
    """Whether the values are there: a traced array looks like any other until somebody asks for them."""
    try:
        mx.eval(x)
    except ValueError as error:
        if "transformation" not in str(error):
            raise
        return False
    return True


def _draws(rng: Any, shapes: list[tuple[int, ...]], x: Array) -> list[Array] | None:
    if not _is_array(rng):
        return None
    if rng.dtype != mx.uint32 or rng.shape != (2,):
        raise UnsupportedError(f"`rng` is an array {rng.dtype}{list(rng.shape)} of MLX; expected a key, such as mx.random.key(0)")
    keys = mx.random.split(rng, max(1, len(shapes)))
    return [mx.random.uniform(shape=shape, key=key) for key, shape in zip(keys, shapes, strict=False)]


def _to_numpy(x: Array) -> Any:
    return numpy.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x)


LIBRARY = Library(
    "mlx",
    namespace=MLXNamespace,
    device=lambda x: None,
    to_device=_moved,
    is_concrete=_is_concrete,
    autodiff=Autodiff(lambda args: not is_inside(), _call, mx.stop_gradient, is_passing=lambda x: not _is_concrete(x)),
    draws=_draws,
    to_numpy=_to_numpy,
)
