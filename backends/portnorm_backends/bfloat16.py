"""bfloat16 of ml_dtypes in NumPy arrays: computed in float32, and each result rounded once.

NumPy stores this type and hardly computes in it: its mean adds in bfloat16, its products have no BLAS, and with a number of Python it gives
float32. So a call on such arrays is the call on the same values in float32, which the kernels take too, and what comes of it is rounded.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy

from portnorm.arrays import Array, DType, Kernel, Narrow, is_bfloat16, mapped, require_extra
from portnorm.norm.arguments import check_out
from portnorm.op import ByKeyword, Op

_COMMON = ("linear", "integer_product")
"""Ops whose result has the common type of all arrays; that of others has the type of the first."""


_NORMS = ("normalize", "layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm")
_ITSELF = (*_NORMS, "sgd_step", "rmsprop_step", "adam_step")
"""Ops whose definition takes values of any type into float32 and rounds what comes of them, of an optimizer the parameters alone."""


class Residuals(NamedTuple):
    """Those of the call in float32, and the types of the arguments, which their cotangents have."""

    wide: Any
    types: tuple[DType | None, ...]
    by_keyword: dict[str, DType | None]


def dtype() -> DType:
    """The type as arrays of NumPy have it; raises `MissingExtraError` without ml_dtypes."""
    return numpy.dtype(require_extra("ml_dtypes", "bfloat16").bfloat16)


def _is_narrow(a: Any) -> bool:
    return is_bfloat16(getattr(a, "dtype", None))


def _holds(*arrays: Any) -> bool:
    for a in arrays:  # at every call that no kernel takes: a loop is half the time of `any`
        if type(a) is numpy.ndarray:
            if a.dtype.kind == "V" and is_bfloat16(a.dtype):
                return True
        elif _is_narrow(a):
            return True
    return False


def _wide(tree: Any) -> Any:
    return mapped(lambda a: numpy.asarray(a, dtype=numpy.float32) if _is_narrow(a) else a, tree)


def _as(a: Any, own: DType | None) -> Any:
    return a if a is None or own is None or a.dtype == own else numpy.asarray(a).astype(own)


def _rounded(tree: Any) -> Any:
    return mapped(lambda a: _as(a, dtype()) if getattr(getattr(a, "dtype", None), "kind", "") == "f" else a, tree)


def _type(a: Any) -> DType | None:
    own = getattr(a, "dtype", None)
    return own if own is not None and (own.kind == "f" or _is_narrow(a)) else None


def _rounds(op: Op[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether the result is in bfloat16."""
    types = [t for t in map(_type, args) if t is not None]
    return all(t.kind == "V" for t in types) if op.name in _COMMON else types[0].kind == "V"


@functools.cache
def _kernel(op: Op[..., Any]) -> Kernel | None:
    if op.name in _ITSELF:
        return None

    def forward(*args: Any, **attrs: Any) -> tuple[Any, Residuals]:
        out = attrs.pop("out", None)
        if out is not None:
            check_out(args[0], out)
        y, residuals = op.forward(*_wide(args), **_wide(attrs))
        y = _rounded(y) if _rounds(op, args) else y
        if out is not None:
            out[...] = y
            y = out
        types = {name: _type(a) for name, a in attrs.items()}
        return y, Residuals(residuals, tuple(map(_type, args)), types)

    def vjp(residuals: Residuals, dy: Array, **attrs: Any) -> tuple[Any, ...]:
        cotangents = op.vjp(residuals.wide, _wide(dy), **_wide(attrs))
        *found, last = cotangents if cotangents and isinstance(cotangents[-1], ByKeyword) else (*cotangents, None)
        placed = tuple(_as(d, own) for d, own in zip(found, residuals.types, strict=False))
        if last is None:
            return placed
        return (*placed, ByKeyword({name: functools.partial(_later, d, residuals.by_keyword.get(name)) for name, d in last.items()}))

    return Kernel(lambda *args, **attrs: forward(*args, **attrs)[0], forward, vjp, Residuals)


def _later(cotangent: Any, own: DType | None) -> Any:
    return _as(cotangent(), own)


NARROW = Narrow(_holds, _wide, _rounded, _kernel)
