"""How the kernels are compiled by numba, and what their loops share."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numba
from numba.core import cgutils, event
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from portnorm_backends.cpu.lowering import WithoutCode
from portnorm_backends.cpu.registers import WIDTH
from portnorm_backends.cpu.sources import digest

F = TypeVar("F", bound=Callable[..., Any])

_MADE_OF = f"{digest()}_{WIDTH}"
"""Stands in the name of what is kept on disk."""


class _Progress(event.Listener):  # type: ignore[misc]
    """Says on a terminal that kernels are being compiled, once that has taken two seconds."""

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def on_start(self, found: Any) -> None:
        """Called by numba before it compiles a function, and again for what that one calls."""
        if not _is_ours(found):
            return
        mine = self._of_thread
        mine.depth = getattr(mine, "depth", 0) + 1
        if mine.depth == 1:
            mine.timer = threading.Timer(2.0, _say)
            mine.timer.daemon = True
            mine.timer.start()

    def on_end(self, found: Any) -> None:
        """Called by numba afterwards."""
        if _is_ours(found):
            self._of_thread.depth -= 1
            if self._of_thread.depth == 0:
                self._of_thread.timer.cancel()


def _is_ours(found: Any) -> bool:
    """Whether it is one of this library: somebody's own, which numba tells of too, need not even have a module."""
    return str(found.data["dispatcher"].py_func.__module__).startswith("portnorm_backends.")


@functools.cache  # once
def _say() -> None:
    if sys.stderr is not None and sys.stderr.isatty():
        sys.stderr.write("portnorm compiles kernels; where the result can be kept, this is the only time\n")


event.register("numba:compile", _Progress())


def compiled(*, signatures: Any = None, inner: bool = False) -> Callable[[F], F]:
    """Decorator: compiled on the first call without the interpreter's lock, and kept on disk where there is a place for it.

    Only compiled code calls what is `inner`, of which each caller has a copy of its own (`lowering`), and nobody any of it from C: a door
    that nobody uses takes a tenth of the time to compile.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True, "no_cpython_wrapper": inner}

    def compile_(function: F) -> F:
        if not function.__qualname__.endswith(_MADE_OF):  # of another type of values it has been here before
            function.__qualname__ = f"{function.__qualname__}_{_MADE_OF}"
        if inner:
            part: F = numba.njit(pipeline_class=WithoutCode, **options)(function)
            return part
        try:
            made: F = numba.njit(signatures, cache=True, **options)(function)
            _folders.add(made.stats.cache_path)  # type: ignore[attr-defined]
        except RuntimeError:  # no place on disk that can be written
            made = numba.njit(signatures, **options)(function)
            _folders.add(None)
        return made

    return compile_


_folders: set[str | None] = set()


def folders() -> list[str]:
    """Where numba keeps what was compiled; none where something could not be kept."""
    return [] if None in _folders else sorted(filter(None, _folders))


_entries: dict[Any, Callable[..., Any]] = {}


def entry(function: Any, key: Any, arguments: tuple[Any, ...]) -> Callable[..., Any]:
    """A compiled function for arguments whose types hang on `key` alone, without numba's look at the type of each in every call.

    That look takes 70 µs for the arrays of a recurrent step, which are in named tuples.
    """
    found = _entries.get((function, key))
    if found is None:
        kinds = tuple(numba.typeof(a) for a in arguments)
        function.compile(kinds)
        found = _entries[function, key] = function.overloads[kinds].entry_point
    return found


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def bare(typing: Any, x: Any) -> Any:
    """An array, or the arrays of a tuple, without owner, for a call during which the owner lives.

    Otherwise every slice counts a reference, atomically: it was half of the time of a recurrent step of 64 × 100. One that can only be read
    becomes one of the type of the others, so that what it is given to is compiled once; that must not write to it.
    """

    def strip(context: Any, builder: Any, kind: Any, value: Any) -> Any:
        if isinstance(kind, numba.types.Array):
            array = context.make_array(kind)(context, builder, value)
            array.meminfo, array.parent = (cgutils.get_null_value(pointer.type) for pointer in (array.meminfo, array.parent))
            return array._getvalue()
        if isinstance(kind, numba.types.BaseTuple):
            for i, inner in enumerate(kind):
                value = builder.insert_value(value, strip(context, builder, inner, builder.extract_value(value, i)), i)
        return value

    seen = x.copy(readonly=False) if isinstance(x, numba.types.Array) else x
    return seen(x), lambda context, builder, signature, args: strip(context, builder, x, args[0])


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def row_of(typing: Any, x: Any, r: Any) -> Any:
    """Row r of a matrix whose rows are contiguous but may lie apart, without owner."""
    row = numba.types.Array(x.dtype, 1, "C", readonly=not x.mutable)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        matrix, found = context.make_array(x)(context, builder, args[0]), context.make_array(row)(context, builder)
        start = cgutils.pointer_add(builder, matrix.data, builder.mul(args[1], builder.extract_value(matrix.strides, 0)))
        length, size = builder.extract_value(matrix.shape, 1), matrix.itemsize
        populate_array(found, builder.bitcast(start, matrix.data.type), [length], [size], size, None)
        return found._getvalue()

    return row(x, numba.types.int64), generate


def address_of(function: Any) -> int:
    """Where a function begins that was compiled for one signature."""
    (found,) = function.overloads.values()
    address: int = found.library.get_pointer_to_function(found.fndesc.llvm_func_name)
    return address


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def call_at(typing: Any, address: Any, arguments: Any, like: Any) -> Any:
    """Call what `address_of` gave, with arguments of its types; its result is of the type of `like`.

    What is called by its name instead is compiled again into whoever calls it.
    """
    result = numba.types.unliteral(like)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds, conventions = list(arguments), context.call_conv
        function = conventions.get_function_type(result, kinds).as_pointer()
        values = cgutils.unpack_tuple(builder, args[1], len(kinds))
        return conventions.call_function(builder, builder.inttoptr(args[0], function), result, kinds, values)[1]

    return result(numba.types.int64, arguments, result), generate


@compiled(inner=True)
def fill(y: Any, value: Any) -> None:
    """y[:] = value, in a fraction of the time that it takes to compile that; `copy` likewise."""
    for i in range(y.size):
        y[i] = value


@compiled(inner=True)
def copy(x: Any, y: Any) -> None:
    """y[:] = x."""
    for i in range(x.size):
        y[i] = x[i]
