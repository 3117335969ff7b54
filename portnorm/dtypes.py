"""Types of numbers: which there are, what a library calls them, and what is refused."""

from __future__ import annotations

import warnings
from typing import Any

import numpy

from portnorm.arrays import Array, DType, Namespace, is_bfloat16, library, name_of
from portnorm.errors import DTypeError
from portnorm.libraries import SUPPORT


def require_floating(xp: Namespace, **arrays: Array | None) -> None:
    """Raise `DTypeError` unless every named array holds real floating-point numbers."""
    for name, x in arrays.items():
        if x is not None and not is_floating(xp, x.dtype):
            raise DTypeError(f"`{name}` has dtype {x.dtype}; expected a real floating-point type such as float32{_elsewhere(x.dtype)}")


def require_real(xp: Namespace, **arrays: Array | None) -> None:
    """Raise `DTypeError` unless every named array holds real numbers or truth values."""
    for name, a in arrays.items():
        if a is not None and not is_kind(xp, a.dtype, "real floating", "integral", "bool"):
            raise DTypeError(f"`{name}` has dtype {a.dtype}; expected real numbers")


_KINDS = {"real floating": "f", "integral": "iu", "signed integer": "i", "unsigned integer": "u", "bool": "b"}
"""The standard's kinds of types as the letters of NumPy's own."""


def is_kind(xp: Namespace, dtype: DType, *kinds: str) -> bool:
    """Whether `dtype` is of one of these kinds of the standard: `xp.isdtype`, which in NumPy takes as long as a small kernel."""
    letter = getattr(dtype, "kind", "V")
    if letter == "V":
        try:
            return any(bool(xp.isdtype(dtype, kind)) for kind in kinds)
        except TypeError:  # a type that another package gave to NumPy
            return "real floating" in kinds and is_bfloat16(dtype)
    return any(letter in _KINDS[kind] for kind in kinds)


def is_floating(xp: Namespace, dtype: DType) -> bool:
    """Whether `dtype` holds real numbers in a floating-point format that ONNX has too, as NumPy's longdouble has not."""
    if getattr(dtype, "kind", "") == "f":  # NumPy's own, asked in every call
        return not is_longdouble(dtype)
    return is_kind(xp, dtype, "real floating") and not is_longdouble(dtype)


def is_longdouble(dtype: DType) -> bool:
    """Whether it is the type that every processor has in another format."""
    return getattr(dtype, "char", "") == "g"


def statistics_dtype(xp: Namespace, dtype: DType) -> DType:
    """The type in which statistics of `dtype` values are taken: at least float32."""
    kind = getattr(dtype, "kind", "")
    if kind == "f" or kind == "V":  # one of NumPy's own, which know their size, or of ml_dtypes
        return dtype if dtype.itemsize >= 4 else xp.float32
    return xp.float32 if xp.finfo(dtype).bits < 32 else dtype


_float32_values: dict[float, float] = {}


def float32_value(number: float) -> float:
    """`number` as float32 stores it: ONNX keeps epsilon so, and every library must see the same value.

    Remembered in a dict, which `torch.compile` follows, unlike `functools.lru_cache`.
    """
    try:
        return _float32_values[number]
    except KeyError:
        return _float32_values.setdefault(number, float(numpy.float32(number)))


def _elsewhere(dtype: DType) -> str:
    """Who has a type that is not there."""
    if is_longdouble(dtype):
        return "; x.astype('float64') converts it"
    *others, last = (row.name for row in SUPPORT.values() if "bfloat16" in row.dtypes)
    having = f"{', '.join(others)} and {last}"
    return f"; bfloat16 is a type of {having}" if str(dtype) == "bfloat16" else ""


def load_dtype(xp: Namespace, dtype: DType) -> DType:
    """A dtype of `xp` from its name ("float32"), or `dtype` itself."""
    if not isinstance(dtype, str):
        if getattr(dtype, "__name__", "") != "bfloat16":
            return dtype
        dtype = "bfloat16"  # the scalar type of ml_dtypes or of a library
    found = getattr(xp, dtype, None)
    if found is None:
        more = library(xp.zeros(1)).more_dtypes.get(dtype)
        if more is not None:
            return more()
        raise DTypeError(
            f"`dtype` is {dtype!r}, which {name_of(xp)} does not have; expected a type of its own such as float32{_elsewhere(dtype)}"
        )
    return found


def require_dtype(xp: Namespace, dtype: DType, device: Any = None) -> None:
    """Raise `DTypeError` unless an array of this dtype can be made, on this device or where arrays are made: not every library says no."""
    name = getattr(dtype, "__name__", dtype)
    try:
        with warnings.catch_warnings():  # what JAX warns of is an error below
            warnings.simplefilter("ignore")
            made = xp.zeros((1,), dtype=dtype, device=device).dtype
    except Exception as error:
        raise DTypeError(f"`dtype` is {name}, of which {name_of(xp)} makes no arrays here: {error}{_enabling(xp)}") from error
    if made != dtype:
        raise DTypeError(f"`dtype` is {name}, for which {name_of(xp)} makes arrays of {made} here{_enabling(xp)}")


def _enabling(xp: Namespace) -> str:
    hint = next((row.wide for row in SUPPORT.values() if row.name in name_of(xp).split(".") and row.wide), "")
    return f"; {hint}" if hint else ""


def dtype_name(xp: Namespace, dtype: DType) -> str:
    """The name of a numeric dtype of `xp`, the same in every library."""
    for name in ("float32", "float64", "float16", "bfloat16", "int64", "int32"):
        if hasattr(xp, name) and getattr(xp, name) == dtype:
            return name
    if str(dtype) in library(xp.zeros(1)).more_dtypes:
        return str(dtype)
    raise DTypeError(f"`dtype` is {dtype}; expected a floating-point type or a signed integer of 32 or 64 bits{_elsewhere(dtype)}")


def default_integer(xp: Namespace) -> DType:
    """The default integer type of a library: int64, or int32 under JAX without 64-bit types."""
    return xp.asarray(0).dtype
