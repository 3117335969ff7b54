"""The safetensors container: eight bytes of header length, a JSON header, then the arrays' bytes.

Nothing in such a file can be executed. Reading checks every length and offset against the file before any array is made.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy

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


def write(path: str | os.PathLike[str], arrays: Mapping[str, NumPyArray], metadata: Mapping[str, str]) -> None:
    """Write arrays and a map of strings; an existing file is replaced only when the new one is complete."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, array in arrays.items():
        code = _CODES.get(array.dtype.newbyteorder("<"))
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
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {os.fspath(path)!r}: {error.strerror}") from error
    header, body = _header(data, os.fspath(path))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{os.fspath(path)!r} is damaged: its metadata is no map")
    arrays, end = {}, 0
    for name, entry in sorted(header.items(), key=_begin):
        arrays[name], end = _array(name, entry, body, end, os.fspath(path))
    if end != len(body):
        raise CheckpointError(f"{os.fspath(path)!r} is damaged: {len(body)} bytes of arrays where its header has {end}")
    return {name: arrays[name] for name in header}, {str(k): str(v) for k, v in metadata.items()}


def _header(data: bytes, path: str) -> tuple[dict[str, Any], memoryview]:
    if len(data) < 8:
        raise CheckpointError(f"{path!r} has {len(data)} bytes and is no safetensors file; it may be cut off")
    (size,) = struct.unpack("<Q", data[:8])
    if size > min(len(data) - 8, _HEADER_LIMIT):
        hint = "; it looks like a PyTorch or pickle file: convert it with safetensors first" if data[:2] in (b"PK", b"\x80\x02") else ""
        raise CheckpointError(f"{path!r} is no safetensors file or is cut off: header of {size} bytes in a file of {len(data)}{hint}")
    try:
        header = json.loads(data[8 : 8 + size])
    except ValueError as error:
        raise CheckpointError(f"{path!r} is damaged: its header is no JSON ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path!r} is damaged: its header is no map")
    return header, memoryview(data)[8 + size :]


def _begin(item: tuple[str, Any]) -> int:
    try:
        return int(item[1]["data_offsets"][0])
    except (KeyError, TypeError, ValueError, IndexError):
        return -1


def _array(name: str, entry: Any, body: memoryview, end: int, path: str) -> tuple[NumPyArray, int]:
    try:
        dtype, shape, (start, stop) = numpy.dtype(_DTYPES[entry["dtype"]]), tuple(map(int, entry["shape"])), map(int, entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path!r}: the entry of {name!r} is not understood: {entry!r}") from error
    if start != end or min(shape, default=0) < 0 or stop - start != math.prod(shape) * dtype.itemsize or stop > len(body):
        raise CheckpointError(f"{path!r} is damaged or cut off: {name!r} of shape {shape} at bytes {start} to {stop} of {len(body)}")
    return numpy.frombuffer(body[start:stop], dtype=dtype).reshape(shape).copy(), stop
