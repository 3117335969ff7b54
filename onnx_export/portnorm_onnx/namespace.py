"""The Array API namespace of symbolic arrays. What is known is computed now, with NumPy; the rest becomes nodes by the lowering table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import array_api_compat.numpy as known
import ml_dtypes
import numpy
import onnx

from portnorm.errors import ExportError
from portnorm_onnx.symbolic import Dim, SymbolicArray, constant, dims_of, node, nodes, opset_of

_DTYPES = ("bool", "int32", "int64", "uint8", "float16", "float32", "float64")


class SymbolicNamespace:
    """Functions of the Array API standard over symbolic arrays, each looked up in the table of the arrays' operator set."""

    __name__ = "portnorm_onnx"

    def isdtype(self, dtype: Any, kind: Any) -> bool:
        if dtype == ml_dtypes.bfloat16:
            return kind in ("real floating", "numeric")
        return bool(known.isdtype(dtype, kind))

    def finfo(self, dtype: Any) -> Any:
        return ml_dtypes.finfo(dtype) if dtype == ml_dtypes.bfloat16 else known.finfo(dtype)  # type: ignore[no-untyped-call]

    def iinfo(self, dtype: Any) -> Any:
        return known.iinfo(dtype)

    def __getattr__(self, name: str) -> Any:
        if name in _DTYPES:
            return numpy.dtype(name)
        if name.startswith("__"):
            raise AttributeError(name)
        return _function(name)

    def zeros(self, shape: Any, *, dtype: Any = None, device: Any = None) -> SymbolicArray:
        return _filled(shape, 0, dtype)

    def full(self, shape: Any, value: Any, *, dtype: Any = None, device: Any = None) -> SymbolicArray:
        return _filled(shape, value, dtype)

    def zeros_like(self, x: SymbolicArray, *, dtype: Any = None, device: Any = None) -> SymbolicArray:
        return _filled(x.shape, 0, dtype or x.dtype)

    def ones_like(self, x: SymbolicArray, *, dtype: Any = None, device: Any = None) -> SymbolicArray:
        return _filled(x.shape, 1, dtype or x.dtype)

    def astype(self, x: SymbolicArray, dtype: Any, *, copy: bool = True) -> SymbolicArray:
        return x if x.dtype == numpy.dtype(dtype) else _function("astype")(x, dtype)

    def asarray(self, value: Any, *, dtype: Any = None, device: Any = None, copy: bool | None = None) -> SymbolicArray:
        if isinstance(value, SymbolicArray):
            return value
        return value.scalar() if isinstance(value, Dim) else constant(numpy.asarray(value, dtype=dtype))

    def arange(self, stop: Any, *, dtype: Any = None, device: Any = None) -> SymbolicArray:
        dtype = numpy.dtype(dtype or "int64")
        if isinstance(stop, int):
            return constant(numpy.arange(stop, dtype=dtype))
        end = self.astype(self.asarray(stop), dtype)
        return nodes("Range", 1, constant(dtype.type(0)), end, constant(dtype.type(1)), dims=dims_of((stop,)))[0]

    def __repr__(self) -> str:
        return "<Array API namespace of the ONNX exporter>"


def _function(name: str) -> Callable[..., Any]:
    def call(*args: Any, **attrs: Any) -> Any:
        arrays = _leaves((args, tuple(attrs.values())))
        if all(a.constant is not None for a in arrays if isinstance(a, SymbolicArray)) and not any(isinstance(a, Dim) for a in arrays):
            return _computed(name, args, attrs)
        opset = opset_of(*(a.array if isinstance(a, Dim) else a for a in arrays))
        if opset is None or name not in opset.rows:
            raise ExportError(f"the exporter has no row for the function {name!r} of the Array API standard")
        return opset.rows[name](*args, **attrs)

    return call


def _computed(name: str, args: Any, attrs: Any) -> Any:
    """A function of constants alone is a constant."""

    def values(a: Any) -> Any:
        if isinstance(a, tuple | list):
            return type(a)(values(item) for item in a)
        return a.constant if isinstance(a, SymbolicArray) else a

    if name == "getitem":
        return constant(values(args[0])[args[1]])
    named = [a.name for a in args if isinstance(a, SymbolicArray) and a.name] if name in _RENAMED else []
    with numpy.errstate(all="ignore"):  # what is infinite or NaN is so in the graph too
        found = getattr(known, name)(*values(args), **{k: values(v) for k, v in attrs.items()})
    return constant(found, named[0] + _RENAMED[name] if named else None)


# A rearranged parameter keeps its name, with this behind it.
_RENAMED = {"matrix_transpose": ".T", "reshape": ""}


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, tuple | list):
        return [leaf for branch in tree for leaf in _leaves(branch)]
    return [tree]


def _filled(shape: Any, value: Any, dtype: Any) -> SymbolicArray:
    shape, dtype = ((shape,) if isinstance(shape, int | Dim) else tuple(shape)), numpy.dtype(dtype or "float32")
    if all(isinstance(d, int) for d in shape):
        return constant(numpy.full(shape, value, dtype=dtype))
    if dtype == ml_dtypes.bfloat16:  # ConstantOfShape does not make it at every opset
        return nodes("Expand", 1, constant(numpy.full((), value, dtype=dtype)), shape_vector(shape), dims=dims_of(shape))[0]
    tensor = onnx.numpy_helper.from_array(numpy.full((1,), value, dtype=dtype))
    return nodes("ConstantOfShape", 1, shape_vector(shape), dims=dims_of(shape), value=tensor)[0]


def shape_vector(shape: tuple[Any, ...]) -> SymbolicArray:
    """A shape as an array of integers: a constant if it is known, else joined from the lengths of other arrays."""
    if all(isinstance(d, int) for d in shape):
        return constant(numpy.array(shape, dtype=numpy.int64))
    parts: list[SymbolicArray] = []
    for d in shape:
        last = parts[-1] if parts else None
        if isinstance(d, int) and last is not None and last.constant is not None:
            parts[-1] = constant(numpy.append(last.constant, d))
        elif isinstance(d, int):
            parts.append(constant(numpy.array([d], dtype=numpy.int64)))
        else:
            parts.append(d.vector() if isinstance(d, Dim) else node("Reshape", d, constant(numpy.array([1]))))
    return parts[0] if len(parts) == 1 else node("Concat", *parts, axis=0)


NAMESPACE = SymbolicArray.namespace = SymbolicNamespace()
