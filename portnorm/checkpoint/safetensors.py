"""The safetensors container: eight bytes of header length, a JSON header, then the arrays' bytes.

Nothing in such a file can be executed. Reading checks every length and offset against the file before any array is made, and takes from
the file the bytes of the arrays that are asked for.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Mapping, Set
from typing import Any, BinaryIO

import numpy

from portnorm.checkpoint.stored import Stored
from portnorm.errors import CheckpointError, DTypeError
from portnorm.files import written_whole

NumPyArray = numpy.ndarray[Any, Any]

_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "<i2",
    "I32": "<i4",
    "I64": "<i8",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
}
_CODES = {numpy.dtype(d): code for code, d in _DTYPES.items()}
_HEADER_LIMIT = 100_000_000


def write(
    path: str | os.PathLike[str], arrays: Mapping[str, NumPyArray], metadata: Mapping[str, str], *, halved: Set[str] = frozenset()
) -> None:
    """Write arrays and a map of strings; an existing file is replaced only when the new one is complete.

    `halved` names arrays of float32 whose values are those of bfloat16, as which they are written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    arrays = {name: _upper_half(a) if name in halved else a for name, a in arrays.items()}
    for name, array in arrays.items():
        code = "BF16" if name in halved else _CODES.get(array.dtype.newbyteorder("<"))
        if code is None:
            raise DTypeError(
                f"`{name}` has dtype {array.dtype}, which a safetensors file cannot hold; expected one of {', '.join(_DTYPES)}"
            )
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with written_whole(path) as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for array in arrays.values():
            file.write(numpy.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes())


def read(path: str | os.PathLike[str]) -> tuple[dict[str, NumPyArray], dict[str, str]]:
    """`(arrays, metadata)`. Raises `CheckpointError` for a file that is no safetensors file, or is damaged or cut off."""
    stored, metadata = entries(path)
    return {name: a.read() for name, a in stored.items()}, metadata


def entries(path: str | os.PathLike[str]) -> tuple[dict[str, Stored], dict[str, str]]:
    """`(arrays, metadata)` as `read`, but the arrays are in the file until they are asked for."""
    name = os.fspath(path)
    try:
        with open(path, "rb") as file:
            header, start = _header(file, os.fstat(file.fileno()).st_size, name)
            size = os.fstat(file.fileno()).st_size - start
    except OSError as error:
        raise CheckpointError(f"cannot read {name!r}: {error.strerror}") from error
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{name!r} is damaged: its metadata is no map")
    found, end = {}, 0
    for key, entry in sorted(header.items(), key=_offsets):
        found[key], end = _entry(key, entry, end, start, size, name)
    if end != size:
        raise CheckpointError(f"{name!r} is damaged: {size} bytes of arrays where its header has {end}")
    return {key: found[key] for key in header}, {str(k): str(v) for k, v in metadata.items()}


def _header(file: BinaryIO, total: int, path: str) -> tuple[dict[str, Any], int]:
    """The header, and where the arrays begin."""
    first = file.read(8)
    if len(first) < 8:
        raise CheckpointError(f"{path!r} has {len(first)} bytes and is no safetensors file; it may be cut off")
    (size,) = struct.unpack("<Q", first)
    if size > min(total - 8, _HEADER_LIMIT):
        raise CheckpointError(
            f"{path!r} is no safetensors file or is cut off: header of {size} bytes in a file of {total}{_hint(path, first)}"
        )
    try:
        header = json.loads(file.read(size))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path!r} is damaged: its header is no JSON ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path!r} is damaged: its header is no map")
    return header, 8 + size


def _hint(path: str, first: bytes) -> str:
    """What a file of another kind is, and what reads it."""
    weights = "weights that another library stored become a checkpoint by `portnorm import`"
    if path.endswith(".npz"):
        return f"; it is one of NumPy: {weights}, and sequences are data, `portnorm train --data {path}`"
    if first[:4] == b"\x89HDF" or path.endswith((".h5", ".hdf5", ".keras")):
        return f"; it is one of Keras or HDF5: {weights}"
    if first[:2] in (b"PK", b"\x80\x02"):
        return (
            "; it looks like a pickle of PyTorch: portnorm.import_checkpoint(torch.load(path, weights_only=True)) makes a layer of weights"
        )
    return ""


def _offsets(item: tuple[str, Any]) -> tuple[int, int]:
    """By which entries are sorted: one without bytes may begin where the next one does."""
    try:
        start, stop = map(int, item[1]["data_offsets"])
        return start, stop
    except (KeyError, TypeError, ValueError):
        return -1, -1


def _entry(key: str, entry: Any, end: int, start: int, size: int, path: str) -> tuple[Stored, int]:
    """An array whose bytes follow those before `end`, and where they end."""
    try:
        code, shape, (first, last) = str(entry["dtype"]), tuple(map(int, entry["shape"])), map(int, entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path!r}: the entry of {key!r} is not understood: {entry!r}") from error
    known = _DTYPES.get(code) or _RAW.get(code)
    fits = first == end and min(shape, default=0) >= 0 and first <= last <= size
    if not fits or (known is not None and last - first != math.prod(shape) * numpy.dtype(known).itemsize):
        raise CheckpointError(f"{path!r} is damaged or cut off: {key!r} of shape {shape} at bytes {first} to {last} of {size}")
    if known is None:
        expected = ", ".join((*_DTYPES, *_RAW))
        return Stored.unreadable(key, f"{path!r}: {key!r} has the type {code}; expected one of {expected}"), last

    def load() -> NumPyArray:
        try:
            with open(path, "rb") as file:
                file.seek(start + first)
                raw = numpy.fromfile(file, dtype=known, count=math.prod(shape))
        except OSError as error:
            raise CheckpointError(f"cannot read {path!r}: {error.strerror}") from error
        if raw.size != math.prod(shape):
            raise CheckpointError(f"{path!r} was cut off while it was read: {key!r} is not there any more")
        return (_FLOATS[code](raw) if code in _FLOATS else raw).reshape(shape)

    return Stored(key, lambda: (shape, _NAMES.get(code) or numpy.dtype(known).name), load), last


def _bfloat16(raw: NumPyArray) -> NumPyArray:
    return (raw.astype(numpy.uint32) << 16).view(numpy.float32)


def _upper_half(values: NumPyArray) -> NumPyArray:
    return (numpy.asarray(values, dtype=numpy.float32, order="C").view(numpy.uint32) >> 16).astype(numpy.uint16)


def _float8(exponent_bits: int, infinities: bool) -> Callable[[NumPyArray], NumPyArray]:
    """From bytes of sign, exponent and mantissa: 4 and 3 bits without infinities (E4M3), or 5 and 2 bits with them (E5M2)."""
    mantissa_bits, bias = 7 - exponent_bits, 2 ** (exponent_bits - 1) - 1
    code = numpy.arange(256)
    exponent, mantissa = (code >> mantissa_bits) & (2**exponent_bits - 1), code & (2**mantissa_bits - 1)
    fraction = mantissa / 2**mantissa_bits + (exponent > 0)
    table = fraction * 2.0 ** (numpy.maximum(exponent, 1) - bias)
    if infinities:
        table[exponent == 2**exponent_bits - 1] = numpy.nan
        table[code % 128 == 0b01111100] = numpy.inf
    else:
        table[code % 128 == 127] = numpy.nan
    table = numpy.where(code < 128, table, -table).astype(numpy.float32)
    return lambda raw: table[raw]


_RAW = {"BF16": "<u2", "F8_E4M3": "uint8", "F8_E5M2": "uint8", "U16": "<u2", "U32": "<u4", "U64": "<u8", "C64": "<c8"}
"""Types that are read, and but for the first not written."""
_NAMES = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_FLOATS = {"BF16": _bfloat16, "F8_E4M3": _float8(4, False), "F8_E5M2": _float8(5, True)}
