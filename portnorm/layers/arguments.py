"""What a layer is given: that it fits, before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import numpy

from portnorm.arrays import Array, DType, Namespace, device_of, namespace, require_lengths, seen, xp_of
from portnorm.dtypes import default_integer, dtype_name, is_kind
from portnorm.errors import CheckpointError, DTypeError, ShapeError, UnsupportedError
from portnorm.layers.pure import Pure
from portnorm.padding import Counted, is_whole, mask_of


def check_names(what: str, layer: Pure, own: Set[str], given: Mapping[str, Array]) -> None:
    """Raise `CheckpointError` unless `given` has these names, and no others."""
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{what} is a {type(given).__name__}; expected a mapping of the names of {type(layer).__name__} to arrays")
    if {*given} != {*own}:  # sets, which paddle's to_static follows, unlike the keys of a dict
        missing, unknown = [n for n in sorted(own) if n not in given], [n for n in given if n not in own]
        raise CheckpointError(f"{what} does not fit {type(layer).__name__}: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}")


def called(xp: Namespace, dtype: DType) -> str:
    """What a type is called, here or in its library."""
    try:
        return dtype_name(xp, dtype)
    except DTypeError:
        return str(dtype)


def checked_call(
    layer: Pure, params: Mapping[str, Array], dtype: DType | None, x: Array, state: Any, lengths: Any, mask: Array | None = None
) -> Counted:
    """`lengths` or `mask` as `forward` takes it, after the arguments were found to fit `layer` with these parameters, of this dtype or any.

    Raises `ShapeError`, `DTypeError`, `UnsupportedError`.
    """
    if not layer.recurrent and state is not None:
        raise UnsupportedError(f"`state` is given, but {type(layer).__name__} has none")
    own = next(iter(params.values()), None)
    xp = namespace(x=x) if own is None or x is None else namespace(parameters=own, x=x)
    if layer.recurrent:
        require_lengths(x=x)
    if layer.takes_integers:
        if not is_kind(xp, x.dtype, "integral"):
            raise DTypeError(f"`x` has dtype {x.dtype}; expected integers")
    elif dtype is not None and x.dtype != dtype:
        given, own = called(xp, x.dtype), called(xp, dtype)
        if given == "object":
            raise DTypeError("`x` has dtype object; portnorm.pad_sequences([*x]) makes an array of sequences that differ in length")
        way_out = f"layer.to(dtype={given!r})" if is_kind(xp, x.dtype, "real floating") else "layer.to(dtype=...)"
        raise DTypeError(f"`x` has dtype {given} but the layer has {own}; convert `x` to {own}, or the layer with {way_out}")
    if mask is not None:
        if lengths is not None:
            raise UnsupportedError("`lengths` and `mask` are both given; expected one of them")
        counted = mask_of(x, mask, layer.feature_axes(x.ndim))
        layer.valid(x, counted)
        return None if is_whole(counted) else counted
    if lengths is None:
        return None
    lengths = checked_lengths(xp, x, lengths, layer.batch_first)
    if not layer.recurrent:
        layer.valid(x, lengths)
    return lengths


def checked_lengths(xp: Namespace, x: Array, lengths: Any, batch_first: bool = False) -> Array:
    """`lengths` as an integer array (batch,) of the library of `x`, each between 0 and the number of steps."""
    if x.ndim < 2:
        raise ShapeError(f"`x` has shape {tuple(x.shape)}; expected (time, batch, features) where `lengths` is given")
    steps, batch = (x.shape[1], x.shape[0]) if batch_first else x.shape[:2]
    if not hasattr(lengths, "__array_namespace__") and not hasattr(lengths, "dtype"):
        lengths = xp.asarray(numpy.asarray(lengths, dtype=int if batch == 0 else None), device=device_of(x))
    namespace(x=x, lengths=lengths)
    if not is_kind(xp, lengths.dtype, "integral"):
        raise DTypeError(f"`lengths` has dtype {lengths.dtype}; expected integers")
    if tuple(lengths.shape) != (batch,):
        raise ShapeError(f"`lengths` has shape {tuple(lengths.shape)}; expected ({batch},), one for each sequence of `x` {tuple(x.shape)}")
    known = seen(lengths) if batch else None
    if known is not None:
        low, high = int(xp_of(known).min(known)), int(xp_of(known).max(known))
        if low < 0 or high > steps:
            raise ShapeError(f"`lengths` reach from {low} to {high}; expected 0 to {steps}, the number of steps of `x` {tuple(x.shape)}")
    return xp.astype(lengths, default_integer(xp))
