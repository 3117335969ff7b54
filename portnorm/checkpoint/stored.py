"""One array of a file, read when it is asked for, and what the file says of its layer beside the arrays."""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy

from portnorm.errors import CheckpointError

NumPyArray = numpy.ndarray[Any, Any]

_WIDENED = ("bfloat16", "float8")


class Refusal(NamedTuple):
    """Why a setting of a file is not read."""

    why: str
    ours: tuple[str, ...] = ()
    """Arguments here that say it instead."""
    every: bool = False
    """Whether each of them stands for a part, so that all have to be said."""


@dataclass
class Said:
    """What a file says of one layer beside its arrays."""

    title: str
    """Where the file has the layer, and what it calls it."""
    layer: str | None = None
    """Its class here, where that is known."""
    kind: str | None = None
    """Its class there."""
    alone: dict[str, Any] | None = None
    """All arguments of the layer, where it has no arrays that could say some of them."""
    values: dict[str, Any] = field(default_factory=dict)
    """Arguments of the layer, and fields of its `Variant`."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Fields of the `Variant` that went without saying when the file was written."""
    refused: dict[str, Refusal] = field(default_factory=dict)
    """Settings that no layer here has, by their names in the file."""
    notes: list[str] = field(default_factory=list)
    """What was read in another form than the file has it, and what a call has to do."""


class Stored:
    """An array that is not in memory: its shape and type, and how to read it.

    `describe` gives (shape, name of the type) and `load` the values; neither is called for what nobody asks for. `said` belongs to its
    layer, `called` is the name of an array that has a number in the file, and `problem` is why it cannot be read.
    """

    def __init__(
        self,
        key: str,
        describe: Callable[[], tuple[tuple[int, ...], str]],
        load: Callable[[], NumPyArray],
        *,
        said: Said | None = None,
        called: str | None = None,
        problem: str | None = None,
    ):
        self.key, self._describe, self._load, self.said, self.called, self.problem = key, describe, load, said, called, problem

    @classmethod
    def of(cls, key: str, array: NumPyArray, said: Said | None = None) -> Stored:
        """One that is in memory."""
        return cls(key, lambda: (array.shape, array.dtype.name), lambda: array, said=said)

    @classmethod
    def unreadable(cls, key: str, problem: str, said: Said | None = None) -> Stored:
        """One of which there is only the name."""
        return cls(key, lambda: ((), "nothing"), lambda: numpy.zeros(()), said=said, problem=problem)

    @cached_property
    def _described(self) -> tuple[tuple[int, ...], str]:
        with self._named():
            shape, name = self._describe()
        return tuple(map(int, shape)), name

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Errors of a file's own library as `CheckpointError`."""
        try:
            yield
        except (OSError, EOFError, ValueError, LookupError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{self.key!r} cannot be read: {error}") from error

    @property
    def shape(self) -> tuple[int, ...]:
        return self._described[0]

    @property
    def dtype(self) -> str:
        """The name of the type that is stored."""
        return self._described[1]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def read(self) -> NumPyArray:
        """The values, in the machine's byte order; types of 8 bits and bfloat16 come as float32. Raises `CheckpointError`."""
        if self.problem is not None:
            raise CheckpointError(self.problem)
        name = self.dtype
        with self._named():
            array = numpy.asarray(self._load())
        if name.startswith(_WIDENED) and array.dtype != numpy.float32:
            array = array.astype(numpy.float32)
        if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
            raise CheckpointError(f"{self.key!r} has the type {name}; expected real numbers of at most 64 bits{_WAY_OUT.get(name, '')}")
        return array.astype(array.dtype.newbyteorder("="), copy=False)

    def weights(self) -> NumPyArray:
        """The values of parameters: whole numbers of 32 or 64 bits are numbers, narrow ones are quantized, or the bits of another type."""
        array = self.read()
        if array.dtype.kind == "b" or (array.dtype.kind in "iu" and (array.dtype.kind == "u" or array.dtype.itemsize < 4)):
            raise CheckpointError(
                f"{self.key!r} has the type {self.dtype}; expected floating-point numbers{_MEANS.get(array.dtype.name, _QUANTIZED)}"
            )
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NumPyArray:
        return self.read() if dtype is None else self.read().astype(dtype)


_QUANTIZED = ": quantized weights are to be multiplied by their scale first"
_MEANS = {
    "bool": "; a mask is no weight",
    "uint16": ". If these are the bits of bfloat16 (paddle gives them so), array.view(ml_dtypes.bfloat16) says it",
}
_WAY_OUT = {
    "void16": ": numpy.save does not keep the type of ml_dtypes' bfloat16; save array.astype('float32')",
    "void8": ": numpy.save does not keep the types of ml_dtypes; save array.astype('float32')",
}


@dataclass
class Held:
    """What a file or a mapping holds."""

    arrays: dict[str, Stored]
    format: str | None = None
    """The format, where the kind of file leaves no other, or its writer is named in it."""
    because: str = ""
    """What in the file says the format."""
    own: str | None = None
    """What portnorm wrote, with its configuration, where the file is its own."""
    said_of: Callable[[Iterable[str], str], Said] | None = None
    """What is said of the layer that has these keys, asked for by this prefix, where that does not belong to each array."""
    around: Callable[[Said, Collection[str], str], None] | None = None
    """Adds what a model computes around the layer that has these keys, in what was asked for by this prefix."""
    left_out: list[str] = field(default_factory=list)
    """Keys of what is no weight by its nature, such as keys of random generators."""

    def beginnings(self, prefix: str) -> list[str]:
        """What the keys begin with, below as much of `prefix` as there is."""
        ends = [0, *(k + 1 for k, letter in enumerate(prefix) if letter in "./")]
        start = max(end for end in ends if any(key.startswith(prefix[:end]) for key in self.arrays))
        below = (key for key in self.arrays if key.startswith(prefix[:start]))
        return list(dict.fromkeys(key[: next((k + 1 for k in range(start, len(key)) if key[k] in "./"), len(key))] for key in below))
