"""Arrays as short texts, and what tells two of them apart."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator
from typing import Any

import numpy

from portnorm_onnx.symbolic import NumPyArray

_BLOCK = 2**18
"""Numbers that are looked at together, so that a large weight is not there once more in float64."""


def checksum(values: NumPyArray) -> str:
    found = 0
    for rows in blocks(values.shape) if values.ndim and values.size else (...,):
        found = zlib.crc32(numpy.ascontiguousarray(values[rows]).reshape(-1).view(numpy.uint8).data, found)
    return f"{found:08x}"


def blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    rows = max(1, _BLOCK * shape[0] // max(1, int(numpy.prod(shape))))
    for first in range(0, shape[0], rows):
        yield slice(first, first + rows)


def same(a: NumPyArray, b: NumPyArray) -> bool:
    first, second = (numpy.ascontiguousarray(x).reshape(-1).view(numpy.uint8) for x in (a, b))
    return a.dtype == b.dtype and numpy.array_equal(first, second)


def packed(values: NumPyArray) -> str:
    """All first bytes, all second bytes, …: those with the exponent are alike."""
    planes = numpy.ascontiguousarray(values).reshape(-1).view(numpy.uint8).reshape(values.size, -1).T
    packer = zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)
    return base64.b64encode(packer.compress(numpy.ascontiguousarray(planes).tobytes()) + packer.flush()).decode()


def unpacked(text: str, dtype: Any, shape: tuple[int, ...]) -> NumPyArray:
    size = int(numpy.prod(shape)) * dtype.itemsize
    unpacker = zlib.decompressobj()
    data = unpacker.decompress(base64.b64decode(text), size + 1)
    if len(data) != size:
        raise ValueError(f"{len(data)} bytes; expected {size} for {dtype}{list(shape)}")
    planes = numpy.frombuffer(data, numpy.uint8).reshape(dtype.itemsize, -1)
    found: NumPyArray = numpy.ascontiguousarray(planes.T).reshape(-1).view(dtype).reshape(shape)
    return found
