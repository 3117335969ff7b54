"""A stand-in for CuPy on a machine without a GPU: its arrays, its namespace, and kernels that run in the emulation of `emulation.h`.

As with CuPy, nothing converts to NumPy by itself (`__array__` raises), and reading a value waits for the device, which is counted in
`synchronizations`. Memory is given out between guards that are NaN and filled with NaN: a kernel that writes outside of an array is an
error at once, and one that reads there, or before anything was written, shows in its result.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import array_api_compat.numpy as numpy_namespace
import numpy as np
import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parent.parent / "backends" / "portnorm_backends" / "cuda"
COMPILER = shutil.which("g++")
OPTIONS = (
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-shared",
    "-fno-strict-aliasing",
    "-U_FORTIFY_SOURCE",
    "-ffp-contract=off",
    "-Wno-unknown-pragmas",
)
_GUARD = 512


class Device:
    """The one device."""

    id = 0

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device)

    def __hash__(self) -> int:
        return 0


class _Counts:
    """What a run did that costs on a device."""

    synchronizations = 0
    launches: list[str] = []  # noqa: RUF012  # one for the process


counts = _Counts()
_memory: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


class _Room(np.ndarray):  # type: ignore[type-arg]
    """Bytes with a guard before and after them."""


def _room(size: int) -> Any:
    whole = np.full(size + 3 * _GUARD, 0xFF, np.uint8).view(_Room)
    _memory[id(whole)] = whole
    start = -whole.ctypes.data % _GUARD + _GUARD
    whole.inside = (start, start + size)
    return whole


def check_guards() -> None:
    """Fail if anything wrote outside of an array."""
    for whole in list(_memory.values()):
        start, end = whole.inside
        if (np.asarray(whole[:start]) != 0xFF).any() or (np.asarray(whole[end:]) != 0xFF).any():
            raise AssertionError("a kernel wrote outside of an array")


def forget_guards() -> None:
    """After an error that was meant."""
    _memory.clear()


def _allocated(shape: Any, dtype: Any) -> Any:
    """NumPy memory between guards, filled with NaN."""
    dtype, shape = np.dtype(dtype), (shape,) if isinstance(shape, int) else tuple(shape)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    whole = _room(size)
    start, end = whole.inside
    return whole[start:end].view(np.ndarray).view(dtype).reshape(shape)


class _Event:
    """A place on the stream, which here is the time."""

    at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        counts.synchronizations += 1


class _Pointer:
    def __init__(self, address: int):
        self.ptr = address


class ndarray:  # noqa: N801  # CuPy's name
    """An array "on the device"."""

    def __init__(self, values: Any):
        self.values = values

    shape = property(lambda self: self.values.shape)
    ndim = property(lambda self: self.values.ndim)
    size = property(lambda self: self.values.size)
    dtype = property(lambda self: self.values.dtype)
    flags = property(lambda self: self.values.flags)
    strides = property(lambda self: self.values.strides)
    nbytes = property(lambda self: self.values.nbytes)
    device = property(lambda self: Device())
    data = property(lambda self: _Pointer(self.values.ctypes.data))
    T = property(lambda self: ndarray(self.values.T))
    __array_priority__ = 100
    __hash__ = None  # type: ignore[assignment]

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`.")

    def get(self) -> Any:
        counts.synchronizations += 1
        return self.values.copy()

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[ndarray]:
        return (self[k] for k in range(len(self)))

    def __getitem__(self, key: Any) -> ndarray:
        return ndarray(np.asarray(self.values[_unwrapped(key)]))

    def __setitem__(self, key: Any, value: Any) -> None:
        self.values[_unwrapped(key)] = _unwrapped(value)

    def astype(self, dtype: Any, copy: bool = True) -> ndarray:
        return _wrapped(self.values.astype(dtype)) if copy or np.dtype(dtype) != self.dtype else self

    def reshape(self, *shape: Any) -> ndarray:
        return ndarray(self.values.reshape(*shape))

    def __repr__(self) -> str:
        return f"fake {self.values!r}"


def _reads(kind: Callable[[Any], Any]) -> Callable[[ndarray], Any]:
    def read(self: ndarray) -> Any:
        counts.synchronizations += 1
        return kind(self.values)

    return read


def _operator(name: str) -> Callable[..., Any]:
    def operate(self: ndarray, *others: Any) -> Any:
        if any(isinstance(o, np.ndarray) for o in others):
            raise TypeError(f"Unsupported type {type(others[0])}")
        with np.errstate(all="ignore"):
            result = getattr(self.values, name)(*map(_unwrapped, others))
        return result if result is NotImplemented else _wrapped(result)

    return operate


ndarray.__module__ = "cupy"
for _name in ("bool", "int", "float", "index"):
    setattr(ndarray, f"__{_name}__", _reads({"bool": bool, "int": int, "float": float, "index": int}[_name]))
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
    for _side in ("", "r"):
        setattr(ndarray, f"__{_side}{_name}__", _operator(f"__{_side}{_name}__"))
for _name in ("neg", "pos", "abs", "invert", "lt", "le", "gt", "ge", "eq", "ne"):
    setattr(ndarray, f"__{_name}__", _operator(f"__{_name}__"))


def _wrapped(result: Any) -> Any:
    if isinstance(result, np.ndarray | np.generic):
        values = np.asarray(result)
        base: Any = values
        while isinstance(base, np.ndarray) and not isinstance(base, _Room):
            base = base.base
        if base is None:
            owned = _allocated(values.shape, values.dtype)
            owned[...] = values
            values = owned
        return ndarray(values)
    if isinstance(result, tuple | list):
        return type(result)(_wrapped(r) for r in result)
    return result


def _unwrapped(value: Any) -> Any:
    if isinstance(value, ndarray):
        return value.values
    if type(value) in (tuple, list):
        return type(value)(_unwrapped(v) for v in value)
    return value


_CREATES = ("asarray", "array", "zeros", "ones", "full", "empty", "arange", "linspace", "eye")


def _function(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        keywords.pop("device", None)
        if name not in _CREATES and any(isinstance(a, np.ndarray) for a in (*args, *keywords.values())):
            raise TypeError(f"Unsupported type {np.ndarray}")
        out = keywords.pop("out", None)
        with np.errstate(all="ignore"):
            result = function(*map(_unwrapped, args), **{k: _unwrapped(v) for k, v in keywords.items()})
        if out is not None:
            if out.shape != result.shape or out.dtype != result.dtype:
                raise ValueError(f"`out` is {out.shape} {out.dtype}; the result is {result.shape} {result.dtype}")
            out.values[...] = result
            return out
        return _wrapped(result)

    return call


class _Namespace(types.ModuleType):
    """`array_api_compat.numpy` on fake arrays."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(numpy_namespace, name)
        if not callable(found) or isinstance(found, type) or name in ("isdtype", "finfo", "iinfo", "result_type", "can_cast"):
            return found
        made = _function(name, found)
        setattr(self, name, made)
        return made


def _empty(shape: Any, dtype: Any = float) -> ndarray:
    return ndarray(_allocated(shape, dtype))


# -- kernels -----------------------------------------------------------------------------------------------------------------------------


def binary(name: str, lines: str) -> Path:
    """A shared library of some lines of C++, compiled once for each text of the sources."""
    texts = [p.read_text() for folder in (SOURCES, HERE) for p in sorted(folder.glob("*.[ch]*"))]
    digest = hashlib.sha256("".join((*texts, lines, *OPTIONS)).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"portnorm-emulation-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    made = folder / f"{re.sub('[^a-z_0-9]', '_', name)}-{digest}.so"
    with (folder / f"{made.stem}.lock").open("w") as lock, tempfile.TemporaryDirectory(dir=folder) as room:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be at it
        if not made.exists():
            text, new = Path(room) / "kernels.cpp", Path(room) / "kernels.so"
            text.write_text(lines)
            assert COMPILER is not None
            command = [COMPILER, *OPTIONS, "-I", str(SOURCES), "-I", str(HERE), str(text), "-o", str(new)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(done.stderr)
            new.replace(made)
    return made


@functools.cache
def _compiled(file: str, expressions: tuple[str, ...]) -> ctypes.CDLL:
    rows = "\n".join(
        f'extern "C" void run_{k}(const unsigned int* grid, const unsigned int* block, void** arguments, int given)'
        f" {{ emulation::launch({expression}, grid, block, arguments, given); }}"
        for k, expression in enumerate(expressions)
    )
    return ctypes.CDLL(str(binary(f"{file}_{expressions[0]}", f'#include "{file}.cu"\n{rows}\n')))


backwards = False
"""Whether blocks, warps and lanes run in the opposite order."""


class RawModule:
    """A `.cu` file, compiled by g++ with the kernels that are named, and those that differ from them in numbers alone."""

    def __init__(self, *, code: str, options: tuple[str, ...], name_expressions: tuple[str, ...]):
        assert options == ("--std=c++17",)
        kernels = importlib.import_module("portnorm_backends.cuda.kernels")
        (self.file,) = (path.stem for path in SOURCES.glob("*.cu") if kernels.source(path.stem) == code)
        families = (kernels.expressions(name, t, p) for t, p in kernels.types() for name in kernels.KERNELS)
        self.expressions = next(family for family in families if set(name_expressions) <= set(family))

    def get_function(self, name: str) -> Callable[..., None]:
        library = _compiled(self.file, self.expressions)
        run = getattr(library, f"run_{self.expressions.index(name)}")

        def launch(grid: tuple[int, int, int], block: tuple[int, int, int], args: tuple[Any, ...]) -> None:
            counts.launches.append(name)
            library.emulation_backwards(int(backwards))
            values = [_by_value(a) for a in args]
            pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
            run((ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block), pointers, len(values))
            check_guards()

        return launch


def _by_value(argument: Any) -> Any:
    """As CuPy passes it: a Python number in 8 bytes, a NumPy scalar or structure in its own."""
    if isinstance(argument, int):
        return ctypes.c_longlong(argument)
    if isinstance(argument, float):
        return ctypes.c_double(argument)
    assert isinstance(argument, np.bool_ | np.ndarray), type(argument)
    raw = np.asarray(argument).tobytes()
    return (ctypes.c_char * len(raw)).from_buffer_copy(raw)


def _module() -> _Namespace:
    cupy = _Namespace("cupy")
    cupy.ndarray = ndarray
    cupy.RawModule = RawModule
    cupy.empty = _function("empty", lambda shape, dtype=float: _empty(shape, dtype).values)
    cupy.empty_like = lambda x: _empty(x.shape, x.dtype)
    cupy.ascontiguousarray = lambda a, dtype=None: _wrapped(np.ascontiguousarray(a.values, dtype=dtype or a.dtype))
    # CuPy's product has the common type of the arrays; NumPy's of two arrays of bfloat16 is float32.
    cupy.matmul = _function("matmul", lambda a, b: np.matmul(a, b).astype(np.result_type(a, b), copy=False))
    cupy.asnumpy = lambda a: a.get()
    cupy.copyto = lambda to, of: to.__setitem__(..., of)
    cupy.cuda = types.SimpleNamespace(
        runtime=types.SimpleNamespace(getDevice=lambda: 0),
        Device=lambda *_: Device(),
        Event=_Event,
        get_elapsed_time=lambda start, end: (end.at - start.at) * 1e3,
    )
    cupy.__version__ = "14.0.0"
    return cupy


@contextlib.contextmanager
def installed() -> Iterator[Any]:
    """`import cupy` gives the stand-in, and portnorm's own module for CuPy runs on it."""
    import portnorm.arrays as registry

    if COMPILER is None:
        pytest.skip("g++ is not installed: CUDA kernels are not run on the CPU")
    cupy = _module()
    own = ("portnorm_backends.cupy", *(f"portnorm_backends.cuda.{name}" for name in ("kernels", "normalize", "recurrent")))
    names = {"cupy": cupy, "array_api_compat.cupy": cupy, **dict.fromkeys(own)}
    before = {name: sys.modules.pop(name, None) for name in names}
    sys.modules.update({name: module for name, module in names.items() if module is not None})
    known = array_api_helpers_cache_clear()
    try:
        yield cupy
    finally:
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update({name: module for name, module in before.items() if module is not None})
        registry._libraries.pop(ndarray, None)
        registry._namespaces.pop(ndarray, None)
        known()


def array_api_helpers_cache_clear() -> Callable[[], None]:
    """Forget what array_api_compat remembers of types, now and when what this returns is called."""
    import array_api_compat.common._helpers as helpers

    cached = [f for f in vars(helpers).values() if hasattr(f, "cache_clear")]

    def clear() -> None:
        for f in cached:
            f.cache_clear()

    clear()
    return clear
