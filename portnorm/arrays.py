"""Which library an array belongs to, and what that library does in its own way; the libraries themselves are rows of `libraries.py`.

Everything here is looked up once per array *type* and remembered, so that a call on a small array does not pay for it.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeAlias

import array_api_compat
import numpy

from portnorm.errors import MissingExtraError, ShapeError, UnsupportedError, install
from portnorm.libraries import LOADERS, SUPPORT

Array: TypeAlias = Any
"""An array of any library that follows the Array API standard. The standard has no type for it that checkers understand."""

Namespace: TypeAlias = Any
"""The module of functions that belongs to an array (`xp` in the standard)."""

DType: TypeAlias = Any


class Kernel(NamedTuple):
    """What one library does in its own way for one Op.

    `accepts(*args, **attrs)` says whether the kernel takes these arguments; where it does not, the Op's definition runs.
    `vjp` is found again by the type of the residuals, so a kernel with a `vjp` returns residuals of a type of its own.
    """

    call: Callable[..., Any]
    forward: Callable[..., tuple[Any, Any]] | None = None
    vjp: Callable[..., Any] | None = None
    residuals: type | None = None
    accepts: Callable[..., bool] = lambda *args, **attrs: True
    again: Callable[..., Callable[..., Any] | None] | None = None
    """`again(*args, **attrs)`: a function that computes such an accepted call again, see `Op.again`."""


class Differentiable(Protocol):
    """What a library's own automatic differentiation can be taught: every Op, and every layer with its training mode."""

    def __call__(self, *args: Any, **attrs: Any) -> Any:
        """The value alone."""

    def forward(self, *args: Any, **attrs: Any) -> tuple[Any, Any]:
        """`(value, residuals)`; both are nested tuples, lists and dicts of arrays, with `None` and what is static."""

    def vjp(self, residuals: Any, cotangent: Any, /, **attrs: Any) -> tuple[Any, ...]:
        """One cotangent per positional argument, nested like it; `None` stands for zero, and so does what is left out at the end."""


class Autodiff(NamedTuple):
    """How a library with automatic differentiation calls a function that brings its own vjp. Keyword arguments are constants to it."""

    records: Callable[[Any], bool]
    """Whether a call on these arguments, in any nesting, is being differentiated or traced now."""
    call: Callable[[Differentiable, tuple[Any, ...], dict[str, Any]], Any]
    constant: Callable[[Array], Array]
    """An array with the same values, of which nothing is differentiated."""
    is_passing: Callable[[Array], bool] = lambda x: False
    """Whether an array stands for others while a transformation runs, and is nothing after it."""
    unrolls: Callable[[Any], bool] = lambda layer: False
    """Whether a compiler follows the calls now that would write out every step of this recurrent layer, and can be given it as one call."""


class Narrow(NamedTuple):
    """How a library computes with a floating type that it stores and does not compute in: in a wider one, rounding each result once."""

    holds: Callable[..., bool]
    """Whether one of these arrays is of such a type; other arguments are not."""
    wide: Callable[[Any], Any]
    """The arrays of such a type, in any nesting, in the wider one, and all else as it is."""
    rounded: Callable[[Any], Any]
    """The floating arrays in any nesting in the narrow type."""
    kernel: Callable[[Any], Kernel | None]
    """An Op that takes such arrays; `None` where its definition does."""


@dataclass(frozen=True)
class Library:
    """One array library: its name and what it does better than the definitions."""

    name: str
    kernels: Mapping[str, Kernel] = field(default_factory=lambda: MappingProxyType({}))
    is_concrete: Callable[[Array], bool] = lambda x: True
    """False for an array whose values cannot be looked at now (traced or symbolic)."""
    seen: Callable[[Array], Array] = lambda x: x
    """A concrete array as one whose values can be looked at while others are traced, where a library traces what is done to any of its."""
    autodiff: Autodiff | None = None
    namespace: Namespace | Callable[[], Namespace] | None = None
    """The module of its functions, or what makes it when it is first asked for; `None` for the one that array-api-compat finds."""
    device: Callable[[Array], Any] = array_api_compat.device
    """Where an array is, as creation functions take it; `None` where the library itself finds the place."""
    at_once: int | None = None
    """Values of a recurrent layer's input term that are made at a time where nothing is kept for a vjp; `None`: those of all steps."""
    stored: Callable[[Array, DType], Array] | None = None
    """A copy of an array in a type, where what is read over and over lies best; `None`: as `astype` makes it."""
    fixed: Callable[[Array], Array] = lambda x: x
    """An array with the same values that nobody can change: what is made of it may be kept."""
    draws: Callable[[Any, list[tuple[int, ...]], Array], list[Array] | None] | None = None
    """Numbers uniform in [0, 1) of these shapes, for a call on an array, by a source of the library's own; `None` for any other source."""
    to_numpy: Callable[[Array], Any] | None = None
    """The values as an array of NumPy; `None` where DLPack or `__array__` gives them."""
    to_device: Callable[[Array, Any], Array] = array_api_compat.to_device
    """An array on another device."""
    narrow: Narrow | None = None
    """What stands in for arithmetic in a type that arrays can have."""
    more_dtypes: Mapping[str, Callable[[], DType]] = field(default_factory=lambda: MappingProxyType({}))
    """Types that arrays can have and the namespace does not name."""
    release: Callable[[], None] = lambda: None
    """Gives back to the system the memory that waits for later results, before something that needs much of its own."""


_ENTRY_POINTS = "portnorm.backends"

_libraries: dict[type, Library] = {}
_namespaces: dict[type, Namespace] = {}


def library(x: Array) -> Library:
    """The library of `x`, memoised on its type."""
    try:
        return _libraries[type(x)]
    except KeyError:
        return _libraries.setdefault(type(x), _find_library(type(x)))


@contextlib.contextmanager
def without_kernels(array_type: type) -> Iterator[None]:
    """The definitions alone on arrays of this type, in the whole process: what tests and measurements hold kernels against."""
    known = _libraries.get(array_type)
    own = _find_library(array_type)
    _libraries[array_type] = Library(own.name, narrow=own.narrow, more_dtypes=own.more_dtypes)
    try:
        yield
    finally:
        del _libraries[array_type]
        if known is not None:
            _libraries[array_type] = known


_OF_ANOTHER_KIND = {
    "blosc2": "numpy.asarray makes an array of it: sums of its arrays are those of NumPy",
    "tinygrad": "x.numpy() makes an array of it: its tensors do not follow the Array API standard",
    "tensorflow": "x.numpy() makes an array of it: its tensors do not follow the Array API standard",
    "mindspore": "x.asnumpy() makes an array of it: its tensors do not follow the Array API standard",
}
"""Libraries by the root module of their arrays with which these functions do not work, and what to give instead."""

_ANOTHER_MEANING = {
    "matrix": "numpy.asarray makes an array of it",
    "MaskedArray": "its mask would be ignored; x.filled(...) makes an array of it, and `mask=` or `lengths=` leave values out",
}
"""Arrays of NumPy that compute something else than its arrays do, and what to give instead."""


def _find_library(array_type: type) -> Library:
    root = _root_of(array_type)
    if root in LOADERS:
        load = LOADERS[root]
        return Library(root) if load is None else load()
    return _library_from_outside(root) or Library(root)


def _library_from_outside(root: str) -> Library | None:
    """The library that an entry point of this name brings."""
    from importlib.metadata import entry_points

    for entry in entry_points(group=_ENTRY_POINTS, name=root):
        found: Library = entry.load()
        return found
    return None


def leaves(tree: Any) -> Iterator[Array]:
    """The arrays in nested tuples, lists and dicts, `None` left out."""
    if isinstance(tree, tuple | list):
        for branch in tree:
            yield from leaves(branch)
    elif isinstance(tree, dict):
        yield from leaves(tuple(tree.values()))
    elif tree is not None:
        yield tree


def mapped(change: Callable[[Array], Any], tree: Any) -> Any:
    """`tree` with every array changed, in the order of `leaves`."""
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(mapped(change, branch) for branch in tree))
    if isinstance(tree, tuple | list):
        return type(tree)(mapped(change, branch) for branch in tree)
    if isinstance(tree, dict):
        return {name: mapped(change, branch) for name, branch in tree.items()}
    return None if tree is None else change(tree)


def xp_of(x: Array) -> Namespace:
    """The namespace of one array that is known to be one; the inner functions use this."""
    try:
        return _namespaces[type(x)]
    except KeyError:
        return _namespaces.setdefault(type(x), _find_namespace(x))


def _find_namespace(x: Array) -> Namespace:
    """The functions of an array whose type is met for the first time; raises `TypeError` where it is no array of the standard."""
    if isinstance(x, numpy.ndarray):
        for kind in type(x).__mro__:
            if kind.__name__ in _ANOTHER_MEANING and _root_of(kind) == "numpy":
                raise TypeError(_ANOTHER_MEANING[kind.__name__])
    if _root(x) in _OF_ANOTHER_KIND:
        raise TypeError(_OF_ANOTHER_KIND[_root(x)])
    own = library(x).namespace
    found = array_api_compat.array_namespace(x) if own is None else _made(own)
    missing = [name for name in ("dtype", "ndim", "shape") if not hasattr(x, name)]
    with contextlib.suppress(AttributeError):
        device_of(x)
        if not missing:
            return found if own is not None or _root(x) in LOADERS else _of_outside(found)
    raise TypeError(f"the standard's arrays have `{(*missing, 'device')[0]}`, which this one lacks")


class OutsideNamespace:
    """The functions of a library that nobody has registered; one that is missing or fails is an error that names it."""

    def __init__(self, functions: Namespace):
        self.functions, self.__name__ = functions, name_of(functions)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.functions, name, None)
        if found is None:
            if name.startswith("__") or name in _TYPES:
                raise AttributeError(name)
            raise UnsupportedError(
                f"{self.__name__} has no `{name}`, a function of the Array API standard that this call needs; {_CONVERT}"
            )
        if callable(found) and not isinstance(found, type):
            found = self._named(name, found)
        setattr(self, name, found)
        return found

    def _named(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **attrs: Any) -> Any:
            try:
                return function(*args, **attrs)
            except Exception as error:
                raise UnsupportedError(f"`{name}` of {self.__name__} does not take what it is given here: {error}; {_CONVERT}") from error

        return call


_CONVERT = "convert its arrays to those of another library, such as numpy"
_TYPES = ("float16", "bfloat16", "float32", "float64", "int32", "int64")
_made_namespaces: dict[Any, Namespace] = {}


def _of_outside(functions: Namespace) -> Namespace:
    """One for all types of arrays of a library."""
    key = name_of(functions)
    try:
        return _made_namespaces[key]
    except KeyError:
        return _made_namespaces.setdefault(key, OutsideNamespace(functions))


def _made(own: Namespace | Callable[[], Namespace]) -> Namespace:
    """The namespace that a library has, or makes; one for all types of its arrays."""
    if not callable(own):
        return own
    try:
        return _made_namespaces[own]
    except KeyError:
        return _made_namespaces.setdefault(own, own())


def namespace(**arrays: Array | None) -> Namespace:
    """The one namespace of the named arrays, for the functions that users call.

    Raises `UnsupportedError` where an argument is no array, or where they belong to two libraries or two devices.
    """
    first = None
    for x in arrays.values():
        if type(x) is numpy.ndarray:  # which have no devices, and nothing more to be looked at
            first = x
        elif x is not None or first is None:
            return _namespace_of_all(arrays)
    return xp_of(first)


def _namespace_of_all(arrays: Mapping[str, Array | None]) -> Namespace:
    """The same of arrays of any kind."""
    first_name, first, xp, device = "", None, None, None
    for name, x in arrays.items():
        if x is None and xp is not None:
            continue
        try:
            x_space = xp_of(x)
        except TypeError as error:
            raise _no_array(name, x, error) from None
        except Exception as error:
            raise MissingExtraError(
                f"`{name}` is an array of {_root(x)}, which does not work here: {error}; {_remedy(_root(x))}"
            ) from error
        if xp is None:
            first_name, first, xp = name, x, x_space
        elif x_space is not xp:
            raise UnsupportedError(
                f"`{name}` is an array of {_root(x)} but `{first_name}` is one of {_root(first)}; convert one of them first"
            )
        elif type(x) is not numpy.ndarray:
            device, other = device_of(first) if device is None else device, device_of(x)
            if device is not None and other is not None and other != device:
                raise UnsupportedError(f"`{name}` is on device {other} but `{first_name}` is on {device}; move one of them first")
    return xp


def require_given(**arrays: Array | None) -> None:
    """Raise `UnsupportedError` where one of the named arrays is `None`."""
    for name, x in arrays.items():
        if x is None:
            raise _no_array(name, x, TypeError())


def _no_array(name: str, x: Any, error: TypeError) -> UnsupportedError:
    said = str(error)
    known = said in (*_ANOTHER_MEANING.values(), *_OF_ANOTHER_KIND.values()) or said.startswith("the standard's")
    why = said if known else "numpy.asarray makes one of numbers"
    if isinstance(x, list | tuple) and any(getattr(item, "ndim", 0) for item in x):
        why += ", portnorm.pad_sequences of sequences that differ in length; portnorm.predict and fit take these as they are"
    return UnsupportedError(
        f"`{name}` is {'None' if x is None else f'a {type(x).__name__}'}; expected an array of {', '.join(SUPPORT)}, or of a library "
        f"that the entry points of {_ENTRY_POINTS} name; {why}"
    )


def _root(x: Array) -> str:
    return _root_of(type(x))


def _root_of(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def device_of(x: Array) -> Any:
    """The device of `x`, as creation functions of its namespace take it."""
    return library(x).device(x)


def is_bfloat16(dtype: DType) -> bool:
    """Whether it is the type of ml_dtypes, which NumPy's functions do not know."""
    return getattr(dtype, "kind", "") == "V" and getattr(dtype, "name", "") == "bfloat16"


def require_lengths(**arrays: Array | None) -> None:
    """Raise `ShapeError` unless every length of the named arrays is known: Dask has NaN where a length comes from values."""
    for name, x in arrays.items():
        if x is not None and type(x) is not numpy.ndarray and any(isinstance(n, float) for n in x.shape):
            raise ShapeError(
                f"`{name}` has shape {tuple(x.shape)}, with lengths that are not known yet; x.compute_chunk_sizes() finds them"
            )


def load_namespace(xp: Namespace | str | None) -> Namespace:
    """The Array API namespace for `xp`: a module (`numpy`, `torch`, `jax.numpy`, …), its name, or `None` for NumPy.

    A name is one of `portnorm.libraries`, of an entry point, or of any module whose functions follow the standard.
    """
    module: Any = xp
    if xp is None or isinstance(xp, str):
        module = _named(xp or "numpy")
    try:
        return xp_of(module.zeros(1))
    except Exception as error:
        root = name_of(module).partition(".")[0]
        raise UnsupportedError(f"`xp` is {xp!r}, which makes no arrays here: {error}; {_remedy(root)}") from error


def _named(name: str) -> Any:
    """What makes arrays of the library of this name."""
    full = name.removeprefix("array_api_compat.")
    root = full.partition(".")[0]
    row = SUPPORT.get(root)
    own = _library_from_outside(root) if row is None else None
    if own is not None and own.namespace is not None:
        return _made(own.namespace)
    try:
        return importlib.import_module(full if row is None else row.module)
    except ImportError as error:
        if row is not None:
            raise MissingExtraError(f"`xp` names {root}, which cannot be imported: {error}; {_remedy(root)}") from error
        raise UnsupportedError(
            f"`xp` is {name!r}; expected an Array API namespace, or one of {', '.join(SUPPORT)}, or the name of a library "
            f"that the entry points of {_ENTRY_POINTS} name"
        ) from error


def name_of(xp: Namespace) -> str:
    """What a namespace is called."""
    return str(getattr(xp, "__name__", type(xp).__name__))


def kept_name(xp: Namespace) -> Any:
    """The name by which `load_namespace` finds `xp` in another process; `xp` itself, for pickle, where it has none."""
    x = xp.zeros(1)
    for name in (library(x).name, _root(x), name_of(xp)):
        with contextlib.suppress(UnsupportedError, MissingExtraError):
            if load_namespace(name) is xp:
                return name
    return xp


def _remedy(root: str) -> str:
    """What helps where a library does not work."""
    return SUPPORT[root].remedy() if root in SUPPORT else "install or mend it, or use another library, such as numpy"


def to_numpy(x: Array) -> Any:
    """A NumPy copy or view of `x`, from any library and device; bfloat16 comes as float32, which not every library takes from NumPy."""
    own = None if isinstance(x, numpy.ndarray | numpy.generic) else library(x).to_numpy
    if own is not None:
        found = own(x)
    else:
        found = numpy.from_dlpack(x) if hasattr(x, "__dlpack__") and not isinstance(x, numpy.ndarray) else numpy.asarray(x)
    return found.astype(numpy.float32) if is_bfloat16(found.dtype) else found


def is_concrete(x: Array) -> bool:
    """Whether the values of `x` can be looked at now."""
    return library(x).is_concrete(x)


def seen(x: Array) -> Array | None:
    """`x`, or an array of NumPy in its stead, to look at its values now, by functions of `xp_of(...)`; `None` where nobody can."""
    own = library(x)
    return own.seen(x) if own.is_concrete(x) else None


def constant(x: Array) -> Array:
    """The same array, through which no library differentiates."""
    autodiff = library(x).autodiff
    return x if autodiff is None else autodiff.constant(x)


def require_extra(module: str, extra: str) -> Any:
    """Import an optional dependency, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = (error.name or module).partition(".")[0]
        raise MissingExtraError(f"this needs the package {missing}, which is not installed: {install(extra)}") from error
