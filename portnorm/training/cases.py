"""Sequences with their targets: padded, checked against the model, and parted into batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy

from portnorm.arrays import Array, Namespace, device_of, is_concrete, namespace, require_given, to_numpy, xp_of
from portnorm.dtypes import default_integer, is_kind, require_real, statistics_dtype
from portnorm.errors import DTypeError, PortnormError, ShapeError, UnsupportedError
from portnorm.layers.arguments import checked_lengths
from portnorm.layers.layer import Layer
from portnorm.scalars import switch

NumPyArray = numpy.ndarray[Any, Any]


def pad_sequences(sequences: Sequence[Array], *, batch_first: bool = False) -> tuple[Array, Array]:
    """`(x, lengths)` of arrays (time, …) that differ in their first axis alone: x (time, cases, …), with 0 behind what is shorter.

    `lengths` (cases,) are integers of the same library, as layers and `fit` take them; nothing of what they leave out enters anything.
    With `batch_first` x is (cases, time, …). Raises `ShapeError` where other axes differ, `UnsupportedError` for no sequences.

    >>> import numpy as np, portnorm as pn
    >>> x, lengths = pn.pad_sequences([np.ones((3, 2)), np.ones((1, 2))])
    >>> x.shape, lengths
    ((3, 2, 2), array([3, 1]))
    """
    return padded("sequences", sequences, switch("batch_first", batch_first))


def padded(name: str, sequences: Any, batch_first: bool) -> tuple[Array, Array]:
    """As `pad_sequences`, of the argument of this name."""
    xp, first = checked_sequences(name, sequences), sequences[0]
    steps = max(a.shape[0] for a in sequences)
    whole = [xp.concat([a, _zeros(xp, a, steps - a.shape[0])], axis=0) if a.shape[0] < steps else a for a in sequences]
    lengths = xp.asarray([a.shape[0] for a in sequences], dtype=default_integer(xp), device=device_of(first))
    return xp.stack(whole, axis=0 if batch_first else 1), lengths


def checked_sequences(name: str, sequences: Any) -> Namespace:
    """The namespace of sequences that differ in their first axis alone; raises where they are none."""
    if not isinstance(sequences, list | tuple) or not sequences:
        what = "empty" if isinstance(sequences, list | tuple) else f"a {type(sequences).__name__}"
        raise UnsupportedError(f"`{name}` is {what}; expected a list of arrays (time, features)")
    xp = namespace(**{f"{name}[{k}]": a for k, a in enumerate(sequences)})
    first = sequences[0]
    for k, a in enumerate(sequences):
        if a.ndim < 1 or tuple(a.shape[1:]) != tuple(first.shape[1:]):
            raise ShapeError(f"`{name}[{k}]` has shape {tuple(a.shape)}; expected (time, {', '.join(map(str, first.shape[1:]))})")
        if a.dtype != first.dtype:
            raise DTypeError(f"`{name}[{k}]` has dtype {a.dtype}; expected {first.dtype}, that of the first")
    return xp


@contextlib.contextmanager
def told_of_argument(name: str) -> Iterator[None]:
    """Errors that do not name the argument of `fit` in which something is wrong are told of it."""
    try:
        yield
    except PortnormError as error:
        if not name or f"`{name.strip()}" in str(error):
            raise
        raise type(error)(f"in `{name.strip()}`: {error}") from error


def unpacked(a: Any) -> Any:
    """The sequences of a NumPy array of objects, as some keep what differs in length."""
    return [*a] if isinstance(a, numpy.ndarray) and a.dtype == object and a.ndim == 1 else a


def _gathered(xp: Namespace, x: Array, a: Any, name: str) -> Any:
    """A list of numbers, or of arrays of one shape, as an array beside `x`; raises `ShapeError` and `DTypeError`."""
    if not isinstance(a, list | tuple):
        return a
    shapes = {tuple(getattr(item, "shape", ())) for item in a}
    if len(shapes) > 1:
        raise ShapeError(f"`{name}` has arrays of the shapes {', '.join(map(str, sorted(shapes)))}; expected one shape, that of a target")
    try:
        return xp.stack([*a]) if shapes not in ({()}, set()) else xp.asarray(a, device=device_of(x))
    except (TypeError, ValueError) as error:
        raise DTypeError(f"`{name}` makes no array: {error}; expected numbers") from error


def _zeros(xp: Namespace, like: Array, steps: int) -> Array:
    return xp.zeros((steps, *like.shape[1:]), dtype=like.dtype, device=device_of(like))


@dataclass(frozen=True)
class Cases:
    """Inputs and targets of many cases, of one library. `Cases.of` checks them against a model; a batch is Cases too.

    `axis` is where the cases lie in `x`: 1 of (time, cases, features), or 0 where the model has `batch_first` or no recurrent layer. With
    `each_step` targets and weights have the same two first axes as `x`, else the cases come first in them.
    """

    x: Array
    y: Array
    lengths: Array | None
    weights: Array | None
    axis: int
    each_step: bool
    name: str = ""
    """What stands before the names of arguments in errors."""

    @classmethod
    def of(cls, model: Layer, x: Any, y: Any, lengths: Any = None, weights: Any = None, *, name: str = "") -> Cases:
        """The cases that `fit` takes; lists of sequences are padded. `name` stands before the arguments in errors.

        Raises `ShapeError`, `DTypeError` and `UnsupportedError`, all before anything is computed.
        """
        each_step, axis = model.recurrent and model.keeps_time, 0 if model.batch_first or not model.recurrent else 1
        if each_step and model.turns_time:
            raise UnsupportedError(
                "`model` gives the last step of `x` first, so that its steps are not those of `y`; use direction='reverse', which goes the "
                "same way, or return_sequences=False"
            )
        x, y = (unpacked(a) for a in (x, y))
        if isinstance(x, list | tuple):
            if lengths is not None:
                raise UnsupportedError(f"`{name}lengths` is given beside a list of sequences, which have lengths of their own")
            if each_step and isinstance(y, list | tuple):
                _check_alike(name, x, y)
                y, _ = padded(f"{name}y", y, axis == 0)
            x, lengths = padded(f"{name}x", x, axis == 0)
        xp = namespace(**{f"{name}x": x})
        y, weights = (_gathered(xp, x, a, f"{name}{what}") for a, what in ((y, "y"), (weights, "weights")))
        namespace(**{f"{name}x": x, f"{name}y": y, f"{name}weights": weights})
        require_given(**{f"{name}y": y})
        if not is_concrete(x):
            raise UnsupportedError(
                f"`{name}x` is an array whose values cannot be looked at yet (of Dask, or inside of jit); expected one that is, x.compute()"
            )
        if x.ndim <= axis:
            raise ShapeError(f"`{name}x` has shape {tuple(x.shape)}; expected (time, cases, features)")
        if is_kind(xp, y.dtype, "bool"):
            raise DTypeError(f"`{name}y` has dtype bool; expected integers for classes, or floating-point numbers")
        require_real(xp, **{f"{name}y": y, f"{name}weights": weights})
        if lengths is not None:
            if not model.recurrent:
                raise UnsupportedError(f"`{name}lengths` is given, but {type(model).__name__} has no recurrent layer")
            lengths = checked_lengths(xp, x, lengths, axis == 0)
            if not each_step and is_concrete(lengths) and lengths.shape[0] and int(xp.min(lengths)) == 0:
                empty = int(numpy.argmin(to_numpy(lengths)))
                raise UnsupportedError(
                    f"`{name}lengths` has 0 at {empty}: a sequence without a step, of which nothing can be learned; leave it out"
                )
        cases = cls(x, y, lengths, weights, axis, each_step, name)
        leading = tuple(x.shape[:2]) if each_step else (x.shape[axis],)
        if tuple(y.shape[: len(leading)]) != leading:
            what = (
                "as many steps and cases as `x`, whose results are those of each step" if each_step else "one target for each case of `x`"
            )
            raise ShapeError(f"`{name}y` has shape {tuple(y.shape)}; expected {_written(leading)}: {what} {tuple(x.shape)}")
        if weights is not None and tuple(weights.shape) not in {leading, (cases.count,)}:
            either = f"{leading} or " if each_step else ""
            raise ShapeError(f"`{name}weights` has shape {tuple(weights.shape)}; expected {either}({cases.count},)")
        if not cases.count:
            raise UnsupportedError(f"`{name}x` {tuple(x.shape)} has no cases; expected one at least")
        return cases

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self.x.shape[self.axis])

    def take(self, numbers: NumPyArray) -> Cases:
        """The cases with these numbers."""
        xp = xp_of(self.x)
        at = xp.asarray(numbers, dtype=default_integer(xp), device=device_of(self.x))

        def of(a: Array | None, axis: int) -> Array | None:
            return None if a is None else xp.take(a, at, axis=axis)

        targets = self.axis if self.each_step else 0
        along = targets if self.weights is not None and self.weights.ndim == 2 else 0
        return replace(self, x=of(self.x, self.axis), y=of(self.y, targets), lengths=of(self.lengths, 0), weights=of(self.weights, along))

    def batches(self, size: int) -> list[Cases]:
        """All cases in their order, in batches of `size` at most that differ by one case at most."""
        return [self.take(part) for part in parts(numpy.arange(self.count), size)]

    def counted(self) -> Array | None:
        """The weight of each target, shaped like the first axes of `y`: 0 where a step is padding; `None` where all count alike."""
        xp, weights = xp_of(self.x), self.weights
        dtype = statistics_dtype(xp, self.y.dtype) if is_kind(xp, self.y.dtype, "real floating") else xp.float32
        weights = None if weights is None else xp.astype(weights, dtype, copy=False)
        if not self.each_step:
            return weights
        if weights is not None and weights.ndim == 1:
            weights = weights[None, :] if self.axis == 1 else weights[:, None]
        if self.lengths is None:
            return None if weights is None else xp.broadcast_to(weights, self.x.shape[:2])
        steps = xp.arange(self.x.shape[1 - self.axis], dtype=self.lengths.dtype, device=device_of(self.x))
        there = steps[:, None] < self.lengths[None, :] if self.axis == 1 else steps[None, :] < self.lengths[:, None]
        return xp.astype(there, dtype) if weights is None else xp.where(there, weights, 0.0)


def parts(order: NumPyArray, size: int) -> list[NumPyArray]:
    """`order` in as few parts of at most `size` as it takes, as even as they can be."""
    return numpy.array_split(order, max(1, -(-len(order) // size)))


def _written(leading: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, leading))}, …)"


def _check_alike(name: str, x: Sequence[Any], y: Sequence[Any]) -> None:
    if len(x) != len(y):
        raise ShapeError(f"`{name}y` has {len(y)} sequences; expected {len(x)}, one for each of `x`")
    for k, (a, b) in enumerate(zip(x, y, strict=True)):
        if tuple(getattr(b, "shape", ()))[:1] != tuple(getattr(a, "shape", ()))[:1]:
            raise ShapeError(
                f"`{name}y[{k}]` has shape {tuple(getattr(b, 'shape', ()))}; expected as many steps as `{name}x[{k}]` "
                f"{tuple(getattr(a, 'shape', ()))}"
            )
