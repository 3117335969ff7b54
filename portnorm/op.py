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

A call is resolved by the type of the first array: a library that has a kernel for this Op and these arguments computes it
(the symbolic arrays of the ONNX exporter are such a library), else the definition does, with functions of the array's own namespace.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

from portnorm.arrays import Array, Kernel, Library, is_concrete, leaves, library
from portnorm.errors import ShapeError, UnsupportedError

P = ParamSpec("P")
R = TypeVar("R")

OPS: dict[str, Op[..., Any]] = {}
"""Every Op by its name."""

Backward = Callable[..., tuple[Any, ...]]
Pullback = Callable[..., Any]


_TREES = (tuple, list, dict, type(None))


class Op(Generic[P, R]):
    """An operation with a definition, a vjp and a seam. Call it like the function it was made from.

    `definition(*args, **attrs) -> (y, residuals)` is written in Array API terms and runs on every library.
    `vjp(residuals, dy, **attrs)` returns one cotangent per positional argument, `None` where there is none. A library that differentiates
    by itself (torch, JAX) takes the vjp in place of its own of the definition, where the Op is `differentiable`.
    Residuals are (nested) tuples of arrays; what is static is in `attrs`, which both directions get.
    """

    __wrapped__: Callable[P, tuple[R, Any]]

    def __init__(self, definition: Callable[P, tuple[R, Any]]):
        functools.update_wrapper(self, definition)
        self.name = definition.__name__
        self.definition = definition
        self.differentiable = False
        self._backward: Backward | None = None
        self._kernel_vjps: dict[type, Backward] = {}
        OPS[self.name] = self

    def __call__(self, *args: P.args, **attrs: P.kwargs) -> R:
        own = _library_of(args)
        if own.autodiff is not None and self.differentiable and own.autodiff.records(args):
            recorded: R = own.autodiff.call(self, args, attrs)
            return recorded
        kernel = self._kernel(own, args, attrs)
        if kernel is None:
            return self.definition(*args, **attrs)[0]
        result: R = kernel.call(*args, **attrs)
        return result

    def forward(self, *args: P.args, **attrs: P.kwargs) -> tuple[R, Any]:
        """The result, and the residuals that `vjp` takes."""
        kernel = self._kernel(_library_of(args), args, attrs)
        if kernel is None or kernel.forward is None:
            return self.definition(*args, **attrs)
        if kernel.vjp is not None and kernel.residuals is not None:
            self._kernel_vjps[kernel.residuals] = kernel.vjp
        return kernel.forward(*args, **attrs)

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

    def _kernel(self, own: Library, args: tuple[Any, ...], attrs: dict[str, Any]) -> Kernel | None:
        kernel = own.kernels.get(self.name) if own.kernels else None
        return kernel if kernel is not None and kernel.accepts(*args, **attrs) else None

    def __repr__(self) -> str:
        return f"<Op {self.name}>"


def _library_of(args: tuple[Any, ...]) -> Library:
    first = args[0] if args else None
    return library(first) if type(first) not in _TREES else library(next(leaves(args), None))


def op(definition: Callable[P, tuple[R, Any]]) -> Op[P, R]:
    """Decorator: make an `Op` of a forward function that returns `(y, residuals)`."""
    return Op(definition)


def vjp(function: Op[..., Any], *args: Any, **attrs: Any) -> tuple[Any, Pullback]:
    """Value of an Op and its pullback: `y, pullback = vjp(op, *args, **attrs)`, then `dx, dw, … = pullback(dy)`.

    The pullback maps a cotangent of `y` (its shape and dtype) to one cotangent per positional argument,
    dy ↦ dyᵀ·∂y/∂args, with `None` for arguments that were `None` or are no arrays. Keyword arguments are constants. The arrays must not be
    changed in place before the pullback has been called: it reads them again.

    >>> import numpy as np, portnorm as pn
    >>> x = np.array([[1.0, 2.0, 4.0]])
    >>> y, pullback = pn.vjp(pn.layer_norm, x, np.ones(3), np.zeros(3))
    >>> dx, dw, db = pullback(np.array([[1.0, 0.0, 0.0]]))
    >>> dx.round(4), db
    (array([[ 0.2291, -0.3436,  0.1145]]), array([1., 0., 0.]))
    """
    if not isinstance(function, Op):
        raise UnsupportedError(f"`function` is {function!r}; expected an Op of portnorm such as portnorm.layer_norm")
    if attrs.get("out") is not None:
        raise UnsupportedError("`out` is for a call whose result is all that is wanted; leave it out here")
    y, residuals = function.forward(*args, **attrs)

    def pullback(dy: Array) -> tuple[Any, ...]:
        _check_cotangent(y, dy)
        cotangents = function.vjp(residuals, dy, **attrs)
        return tuple(None if a is None else d for a, d in zip(args, cotangents, strict=False))

    return y, pullback


def _check_cotangent(y: Any, dy: Any) -> None:
    shape, expected = getattr(dy, "shape", None), getattr(y, "shape", None)
    if expected is not None and is_concrete(y) and tuple(shape or ()) != tuple(expected):
        raise ShapeError(f"the cotangent `dy` has shape {shape} but the result has shape {tuple(expected)}")
