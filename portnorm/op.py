"""The seam: one named operation, its definition, its vector-Jacobian product, and the choice of who computes it.

An `Op` is made from its forward function, which returns `(y, residuals)`, and its backward function, which stands right below::

    @op
    def sigmoid(x):
        y = ...
        return y, (y,)

    @sigmoid.backward
    def _(residuals, dy):
        (y,) = residuals
        return (dy * y * (1 - y),)

A call binds its arguments to the signature of that function, however they are spelled, and is resolved by the type of the first array: a
library that has a kernel for this Op and these arguments computes it (the symbolic arrays of the ONNX exporter are such a library), else
the definition does, with functions of the array's own namespace.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

from portnorm.arrays import Array, Kernel, Library, is_concrete, leaves, library, namespace, require_given
from portnorm.dtypes import is_floating, is_kind
from portnorm.errors import ArgumentError, DTypeError, ShapeError, UnsupportedError

P = ParamSpec("P")
R = TypeVar("R")

OPS: dict[str, Op[..., Any]] = {}
"""Every Op by its name."""

Backward = Callable[..., tuple[Any, ...]]
Pullback = Callable[..., Any]


_TREES = (tuple, list, dict, type(None))
_NEEDED = inspect.Parameter.empty


class ByKeyword(dict[str, Callable[[], Any]]):
    """Cotangents of keyword arguments, each computed when it is asked for: what a vjp may return after those of the positional ones."""


class Op(Generic[P, R]):
    """An operation with a definition, a vjp and a seam. Call it like the function it was made from.

    `definition(*args, **attrs) -> (y, residuals)` is written in Array API terms and runs on every library.
    `vjp(residuals, dy, **attrs)` returns one cotangent per positional argument, `None` where there is none. A library that differentiates
    by itself (torch, JAX) takes the vjp in place of its own of the definition, where the Op is `differentiable`.
    Residuals are (nested) tuples of arrays; what is static is in `attrs`, which both directions get: the keyword-only arguments.
    """

    __wrapped__: Callable[P, tuple[R, Any]]
    __signature__: inspect.Signature

    def __init__(self, definition: Callable[P, tuple[R, Any]]):
        functools.update_wrapper(self, definition)
        self.name = definition.__name__
        self.definition = definition
        self.differentiable = False
        self._backward: Backward | None = None
        self._kernel_vjps: dict[type, Backward] = {}
        own = inspect.signature(definition)
        self.__signature__ = own.replace(return_annotation=_first_of(own.return_annotation))
        by_keyword = [p.name for p in own.parameters.values() if p.kind is p.KEYWORD_ONLY]
        self._defaults = {p.name: p.default for p in own.parameters.values() if p.name not in by_keyword}
        self._places = tuple(self._defaults)
        self._least, self._most = sum(d is _NEEDED for d in self._defaults.values()), len(self._defaults)
        self._keywords = frozenset(by_keyword)
        self._needed = frozenset(name for name in by_keyword if own.parameters[name].default is _NEEDED)
        self._complete = frozenset(() if self._needed else range(self._least, self._most + 1))
        OPS[self.name] = self

    def __get__(self, owner: Any, kind: Any = None) -> Op[P, R]:
        """Itself, as an attribute of a class too. What has this counts as a routine, of which `help` shows the signature."""
        return self

    def __call__(self, *args: P.args, **attrs: P.kwargs) -> R:
        bound: tuple[Any, ...] = args
        named: dict[str, Any] = attrs
        if named or len(bound) not in self._complete:
            bound, named = self.bind(bound, named)
        own = _library_of(bound)
        if own.autodiff is not None and self.differentiable and own.autodiff.records((bound, named)):
            recorded: R = own.autodiff.call(self, bound, named)
            return recorded
        kernel = self._kernel(own, bound, named)
        definition: Callable[..., tuple[R, Any]] = self.definition
        if kernel is None:
            return definition(*bound, **named)[0]
        result: R = kernel.call(*bound, **named)
        return result

    def forward(self, *args: P.args, **attrs: P.kwargs) -> tuple[R, Any]:
        """The result, and the residuals that `vjp` takes."""
        bound, named = self.bind(args, attrs)
        kernel = self._kernel(_library_of(bound), bound, named)
        if kernel is None or kernel.forward is None:
            definition: Callable[..., tuple[R, Any]] = self.definition
            return definition(*bound, **named)
        if kernel.vjp is not None and kernel.residuals is not None:
            self._kernel_vjps[kernel.residuals] = kernel.vjp
        return kernel.forward(*bound, **named)

    def again(self, *args: P.args, **attrs: P.kwargs) -> Callable[..., Any] | None:
        """What a kernel has for calls like this one that come one after another, as the steps of a stream do; `None` where it has nothing.

        Which arguments that takes anew, and what it gives, the kernel says.
        """
        bound, named = self.bind(args, attrs)
        kernel = self._kernel(_library_of(bound), bound, named)
        return None if kernel is None or kernel.again is None else kernel.again(*bound, **named)

    def vjp(self, residuals: Any, dy: Any, /, **attrs: Any) -> tuple[Any, ...]:
        """Cotangents of the positional arguments, from the residuals of `forward` and the cotangent of the result."""
        kernel_vjp = self._kernel_vjps.get(type(residuals))
        if kernel_vjp is not None:
            return kernel_vjp(residuals, dy, **attrs)
        if self._backward is None:
            raise UnsupportedError(f"{self.name} has no derivative")
        return self._backward(residuals, dy, **attrs)

    def backward(self, function: Backward) -> Backward:
        """Decorator: register `function(residuals, dy, **attrs)` as the vjp of the definition."""
        self._backward = function
        self.differentiable = True
        return function

    def bind(self, args: tuple[Any, ...], attrs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`(args, attrs)` as the Op takes them: what has a place by its place, and by name what can only be named.

        Raises `ArgumentError` for a name that the Op does not have, a value that is given twice, and one that is missing.
        """
        if self._least <= len(args) <= self._most and self._needed <= attrs.keys() <= self._keywords:
            return args, attrs
        named, placed = dict(attrs), list(args)
        rest = self._places[len(args) :]
        last = max((i for i, name in enumerate(rest) if name in named or self._defaults[name] is _NEEDED), default=-1)
        placed += [named.pop(name, self._defaults[name]) for name in rest[: last + 1]]
        if len(placed) > self._most or any(value is _NEEDED for value in placed) or not self._needed <= named.keys() <= self._keywords:
            raise self._refusal(args, attrs)
        return tuple(placed), named

    def _refusal(self, args: tuple[Any, ...], attrs: dict[str, Any]) -> ArgumentError:
        """Why these arguments are none of this Op."""
        takes = f"it takes {', '.join(self.__signature__.parameters)}"
        if len(args) > self._most:
            return ArgumentError(
                f"{self.name} got {len(args)} arguments by place; expected at most {self._most}: {', '.join(self._places)}"
            )
        for name in attrs:
            if name not in self._keywords and name not in self._defaults:
                return ArgumentError(f"{self.name} has no argument `{name}`; {takes}")
            if name in self._places[: len(args)]:
                return ArgumentError(f"{self.name} got `{name}` twice, by its place and by its name")
        given = {*self._places[: len(args)], *attrs}
        needed = {*self._needed, *(name for name, default in self._defaults.items() if default is _NEEDED)}
        missing = next(name for name in self.__signature__.parameters if name in needed and name not in given)
        return ArgumentError(f"{self.name} needs `{missing}`; {takes}")

    def _kernel(self, own: Library, args: tuple[Any, ...], attrs: dict[str, Any]) -> Kernel | None:
        kernel = own.kernels.get(self.name) if own.kernels else None
        if kernel is not None and kernel.accepts(*args, **attrs):
            return kernel
        return own.narrow.kernel(self) if own.narrow is not None and own.narrow.holds(*args) else None

    def __repr__(self) -> str:
        return f"<Op {self.name}>"


def _first_of(annotation: Any) -> Any:
    """What is annotated of the result alone: `"A"` of `"tuple[A, B]"`."""
    pair = ast.parse(annotation, mode="eval").body if isinstance(annotation, str) else None
    if isinstance(pair, ast.Subscript) and isinstance(pair.slice, ast.Tuple):
        return ast.unparse(pair.slice.elts[0])
    return inspect.Signature.empty


def _library_of(args: tuple[Any, ...]) -> Library:
    first = args[0] if args else None
    return library(first) if type(first) not in _TREES else library(next(leaves(args), None))


if TYPE_CHECKING:
    # For editors that do not follow a `ParamSpec`: to them it is a function with the signature of the one that it decorates.
    def op(definition):  # type: (Callable[P, tuple[R, Any]]) -> Op[P, R]
        """Decorator: make an `Op` of a forward function that returns `(y, residuals)`."""

        @functools.wraps(definition)
        def call(*args, **attrs):  # type: ignore[no-untyped-def]
            return definition(*args, **attrs)[0]

        return call  # type: ignore[return-value]
else:
    op = Op


def vjp(function: Op[..., Any], *args: Any, **attrs: Any) -> tuple[Any, Pullback]:
    """Value of an Op and its pullback: `y, pullback = vjp(op, *args, **attrs)`, then `dx, dw, … = pullback(dy)`.

    The pullback maps a cotangent of `y` (its shape and dtype) to one cotangent per argument, dy ↦ dyᵀ·∂y/∂args, in the order of the
    signature up to the last that was given, with `None` for what was `None`, left out, or is no array. Arguments that can only be given by
    name are constants. The arrays must not be changed in place before the pullback has been called: it reads them again.
    Raises `UnsupportedError` for what is no Op of portnorm, and what the Op raises; the pullback `ShapeError` where `dy` is not like `y`.

    >>> import numpy as np, portnorm as pn
    >>> x = np.array([[1.0, 2.0, 4.0]])
    >>> y, pullback = pn.vjp(pn.layer_norm, x, np.ones(3), bias=np.zeros(3))
    >>> dx, dw, db = pullback(np.array([[1.0, 0.0, 0.0]]))
    >>> dx.round(4), db
    (array([[ 0.2291, -0.3436,  0.1145]]), array([1., 0., 0.]))
    """
    if not isinstance(function, Op):
        raise UnsupportedError(f"`function` is {function!r}; expected an Op of portnorm such as portnorm.layer_norm")
    if attrs.get("out") is not None:
        raise UnsupportedError("`out` is for a call whose result is all that is wanted; leave it out here")
    args, attrs = function.bind(args, attrs)
    y, residuals = function.forward(*args, **attrs)

    def pullback(dy: Array) -> tuple[Any, ...]:
        _check_cotangent(y, dy)
        cotangents = function.vjp(residuals, dy, **attrs)
        return tuple(None if a is None else d for a, d in zip(args, cotangents, strict=False))

    return y, pullback


def require_cotangent(y: Any, dy: Any) -> None:
    """Raise `UnsupportedError` or `DTypeError` where `dy` is no array of real numbers of the library of `y`, and no number."""
    if isinstance(dy, int | float):
        return
    require_given(dy=dy)
    xp = namespace(y=y, dy=dy)
    if not (is_floating(xp, dy.dtype) or is_kind(xp, dy.dtype, "integral")):
        raise DTypeError(f"the cotangent `dy` has dtype {dy.dtype}; expected {y.dtype}, that of the result")


def _check_cotangent(y: Any, dy: Any) -> None:
    """Raise unless `dy` is an array like `y`, or a number for one without axes: of real numbers, and of the same library."""
    if type(dy) is not type(y) or dy.dtype != getattr(y, "dtype", None):
        require_cotangent(y, dy)
    shape, expected = getattr(dy, "shape", None), getattr(y, "shape", None)
    if expected is not None and tuple(shape or ()) != tuple(expected) and is_concrete(y):
        raise ShapeError(f"the cotangent `dy` has shape {shape} but the result has shape {tuple(expected)}")
