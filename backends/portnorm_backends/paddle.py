"""PaddlePaddle: its functions with the standard's names and keywords, sums in blocks, and one `PyLayer` for every Op and layer.

Where a program is built (`paddle.jit.to_static`), it is built of the definitions, which paddle differentiates by itself.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import numpy
import paddle

from portnorm.arrays import Array, Autodiff, Differentiable, DType, Library, leaves, mapped
from portnorm.errors import DTypeError, ShapeError, UnsupportedError
from portnorm_backends.blocks import shortened
from portnorm_backends.flat import cotangents_of_call, put_together, taken_apart
from portnorm_backends.standard import Namespace, axes_of


class PaddleNamespace(Namespace):
    """Paddle's functions of the Array API standard.

    float16 and bfloat16 are none of its types here: on a processor paddle has no product, mean or maximum of them.
    """

    __name__ = "paddle"
    kinds: ClassVar = {
        "bool": ("bool",),
        "signed integer": ("int8", "int16", "int32", "int64"),
        "unsigned integer": ("uint8",),
        "real floating": ("float32", "float64"),
    }

    def __getattr__(self, name: str) -> Any:
        if name in ("float16", "bfloat16"):
            raise AttributeError(f"paddle computes hardly anything in {name} on a processor")
        found = getattr(paddle, "transpose" if name == "permute_dims" else name)
        setattr(self, name, found)
        return found

    def asarray(self, obj: Any, /, *, dtype: DType = None, device: Any = None, copy: bool | None = None) -> Array:
        """`paddle.to_tensor`; a tensor of this type is given back as it is."""
        if not _is_tensor(obj):
            if getattr(obj, "dtype", None) in _WIDENED:
                obj = _signed(obj)
            return paddle.to_tensor(obj, dtype=dtype, place=device)
        same = dtype is None or obj.dtype == dtype
        return (obj.clone() if copy else obj) if same else obj.astype(dtype)

    def astype(self, x: Array, dtype: DType, /, *, copy: bool = True, device: Any = None) -> Array:
        return x if x.dtype == dtype else x.astype(dtype)

    def zeros(self, shape: Any, *, dtype: DType = None, device: Any = None) -> Array:
        return paddle.zeros(_shape(shape), dtype=dtype or paddle.float32, device=device)

    def ones(self, shape: Any, *, dtype: DType = None, device: Any = None) -> Array:
        return paddle.ones(_shape(shape), dtype=dtype or paddle.float32, device=device)

    def full(self, shape: Any, fill_value: Any, *, dtype: DType = None, device: Any = None) -> Array:
        return paddle.full(_shape(shape), fill_value, dtype=dtype, device=device)

    def zeros_like(self, x: Array, /, *, dtype: DType = None, device: Any = None) -> Array:
        return paddle.zeros_like(x, dtype=dtype, device=device)

    def ones_like(self, x: Array, /, *, dtype: DType = None, device: Any = None) -> Array:
        return paddle.ones_like(x, dtype=dtype, device=device)

    def arange(self, start: Any, /, stop: Any = None, step: Any = 1, *, dtype: DType = None, device: Any = None) -> Array:
        return paddle.arange(start, stop, step, dtype=dtype, device=device)

    def reshape(self, x: Array, /, shape: Any, *, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("whether it is the same memory is not known")
        return paddle.reshape(x, list(shape))

    def expand_dims(self, x: Array, /, *, axis: int) -> Array:
        return paddle.unsqueeze(x, axis)

    def where(self, condition: Array, x1: Any, x2: Any, /) -> Array:
        """Numbers take the type of the other array: as they are, paddle takes them for float32."""
        like = x1 if _is_tensor(x1) else x2
        return paddle.where(condition, *(a if _is_tensor(a) else _number(a, like) for a in (x1, x2)))

    def maximum(self, x1: Any, x2: Any, /) -> Array:
        return paddle.maximum(x1, x2 if _is_tensor(x2) else _number(x2, x1))

    def minimum(self, x1: Any, x2: Any, /) -> Array:
        return paddle.minimum(x1, x2 if _is_tensor(x2) else _number(x2, x1))

    def clip(self, x: Array, /, min: Any = None, max: Any = None) -> Array:  # noqa: A002  # as the standard names them
        x = x if min is None else self.maximum(x, min)
        return x if max is None else self.minimum(x, max)

    def matrix_transpose(self, x: Array, /) -> Array:
        return x.mT

    def concat(self, arrays: Any, /, *, axis: int = 0) -> Array:
        return paddle.concat(list(arrays), axis=axis)

    def stack(self, arrays: Any, /, *, axis: int = 0) -> Array:
        return paddle.stack(list(arrays), axis=axis)

    def take(self, x: Array, indices: Array, /, *, axis: int) -> Array:
        return paddle.index_select(x, indices, axis=axis)

    def take_along_axis(self, x: Array, indices: Array, /, *, axis: int) -> Array:
        return paddle.take_along_axis(x, indices, axis, broadcast=False)

    def argsort(self, x: Array, /, *, axis: int = -1, descending: bool = False, stable: bool = True) -> Array:
        return paddle.argsort(x, axis=axis, descending=descending, stable=stable)

    def cumulative_sum(self, x: Array, /, *, axis: int) -> Array:
        return paddle.cumsum(x, axis=axis)

    def sum(self, x: Array, /, *, axis: Any = None, dtype: DType = None, keepdims: bool = False) -> Array:
        """The sum in blocks and their sums again."""
        axes = axes_of(x, axis)
        if not axes:
            return x
        if self.isdtype(x.dtype, "real floating"):
            for a in axes:
                x = shortened(x, a, _added, lambda a, shape: paddle.reshape(a, list(shape)), lambda parts, a: paddle.concat(parts, axis=a))
        return paddle.sum(x, axis=list(axes), keepdim=keepdims)

    def mean(self, x: Array, /, *, axis: Any = None, keepdims: bool = False) -> Array:
        count = math.prod([x.shape[a] for a in axes_of(x, axis)])
        return self.sum(x, axis=axis, keepdims=keepdims) / _number(count, x)  # in a program a number is one of float32

    def sqrt(self, x: Array, /) -> Array:
        """That of an infinite number is infinite; paddle gives NaN for some."""
        return paddle.where(x == math.inf, x, paddle.sqrt(x))

    def max(self, x: Array, /, *, axis: Any = None, keepdims: bool = False) -> Array:
        return self._extreme(paddle.max, x, axis, keepdims)

    def min(self, x: Array, /, *, axis: Any = None, keepdims: bool = False) -> Array:
        return self._extreme(paddle.min, x, axis, keepdims)

    def _extreme(self, function: Callable[..., Array], x: Array, axis: Any, keepdims: bool) -> Array:
        if not x.ndim:
            return x
        narrow = self.isdtype(x.dtype, "integral") and x.dtype != paddle.int64  # of which paddle has no maximum
        found = function(x.astype("int64") if narrow else x, axis=list(axes_of(x, axis)), keepdim=keepdims)
        return found.astype(x.dtype) if narrow else found


_WIDENED = (numpy.uint16, numpy.uint32, numpy.uint64)
"""Types of NumPy that paddle has not; the bits of the first it takes for bfloat16."""


def _signed(values: Any) -> Any:
    if values.size and int(values.max()) > numpy.iinfo(numpy.int64).max:
        raise DTypeError(f"`obj` has dtype {values.dtype} and numbers beyond int64, the largest integers of paddle")
    return values.astype(numpy.int64)


def _added(x: Array, axis: int) -> Array:
    return paddle.sum(x, axis=axis)


def _number(value: Any, like: Array) -> Array:
    """A number in the type of an array, or where it has a fraction and that is none for it, in float32."""
    dtype = paddle.float32 if isinstance(value, float) and "float" not in str(like.dtype) else like.dtype
    return paddle.full([], value, dtype=dtype)


def _shape(shape: Any) -> list[int]:
    return [shape] if isinstance(shape, int) else list(shape)


class _Recorded(paddle.autograd.PyLayer):  # type: ignore[misc]
    """`forward(function, form, found, *arrays)` puts the form of the value into `found`; `form` is that of `(args, attrs)`."""

    @staticmethod
    def forward(ctx: Any, function: Differentiable, form: Any, found: dict[str, Any], *arrays: Array) -> tuple[Any, ...]:
        args, attrs = put_together(form, arrays)
        value, residuals = function.forward(*args, **attrs)
        outputs, found["value"] = taken_apart(value, _is_tensor)
        outputs = [a.clone() if any(a is b for b in arrays) else a for a in outputs]
        kept, form_of_kept = taken_apart((residuals, attrs), _is_tensor)
        ctx.save_for_backward(*kept)
        ctx.function, ctx.forms = function, (form, found["value"], form_of_kept)
        ctx.needed = [not a.stop_gradient for a in arrays]
        ctx.mark_non_differentiable(*(a for a in outputs if "float" not in str(a.dtype)))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *given: Array) -> Any:
        if paddle.is_grad_enabled():
            raise UnsupportedError(
                "`create_graph=True` asks for a derivative of a derivative, which a node of portnorm in paddle does not have"
            )
        form, form_of_value, form_of_kept = ctx.forms
        residuals, attrs = put_together(form_of_kept, ctx.saved_tensor())
        cotangents = ctx.function.vjp(residuals, put_together(form_of_value, given), **attrs)
        found = cotangents_of_call(form, cotangents, ctx.needed.__getitem__)
        return tuple(found.get(k) if needed else None for k, needed in enumerate(ctx.needed))


def _records(args: Any) -> bool:
    if not paddle.in_dynamic_mode():
        for a in filter(_is_tensor, leaves(args)):
            if -1 in a.shape:
                raise ShapeError(
                    f"an array has shape {tuple(a.shape)} in a program of paddle, with -1 for a length that may vary; "
                    "leave `input_spec` out, or state every length in it: each shape is a program of its own then"
                )
        return any(map(_is_eager, leaves(args)))
    if not paddle.is_grad_enabled():
        return False
    return any(_is_tensor(a) and not a.stop_gradient for a in leaves(args))


def _call(function: Differentiable, args: tuple[Any, ...], attrs: dict[str, Any]) -> Any:
    if not paddle.in_dynamic_mode():  # of the program that is built, as which tensors enter it
        args, attrs = mapped(lambda a: paddle.assign(a) if _is_eager(a) else a, (args, attrs))
        return function(*args, **attrs)
    if attrs.get("out") is not None:
        raise UnsupportedError("`out` cannot take a result that autograd records; leave it out, or call under paddle.no_grad()")
    arrays, form = taken_apart((args, attrs), _is_tensor)
    found: dict[str, Any] = {}
    outputs = _Recorded.apply(function, form, found, *arrays)
    return put_together(found["value"], [outputs] if _is_tensor(outputs) else outputs)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, paddle.Tensor | paddle.pir.Value)


def _is_eager(leaf: Any) -> bool:
    return isinstance(leaf, paddle.Tensor) and not isinstance(leaf, paddle.pir.Value)


def _to_numpy(x: Array) -> Any:
    x = x.detach()
    return (x.astype("float32") if x.dtype == paddle.bfloat16 else x).numpy()


# What is called where a program is built is called as it stands, and not translated by paddle first.
paddle.jit.ignore_module([sys.modules["portnorm"], sys.modules["portnorm_backends"]])

LIBRARY = Library(
    "paddle",
    namespace=PaddleNamespace,
    device=lambda x: x.place if paddle.in_dynamic_mode() else None,
    to_device=lambda x, device: x.to(device),
    is_concrete=lambda x: bool(paddle.in_dynamic_mode()),
    autodiff=Autodiff(_records, _call, constant=lambda x: x.detach()),
    to_numpy=_to_numpy,
)
