"""How a call in training gets its randomness: always from outside, as arrays of numbers that are uniform in [0, 1).

`rng` is a seed, a generator, a key of JAX, or the arrays themselves. A layer says which arrays it takes (`Layer.random_shapes`), and
what is dropped for each; they are drawn before the call is differentiated or compiled, so that every library sees the same pure function.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

from portnorm.arrays import Array, device_of, is_concrete, leaves, library, namespace, seen, xp_of
from portnorm.dropout import kept, scale
from portnorm.dtypes import is_kind
from portnorm.errors import ArgumentError, DTypeError, ShapeError, UnsupportedError

if TYPE_CHECKING:
    from portnorm.layers.pure import Pure

Arrays = dict[str, Array]

_WAYS = (
    "a seed, a numpy.random.Generator, a key of jax.random or of mx.random for arrays of JAX or MLX, a torch.Generator for those of torch, "
    "or a mapping of layer.random_shapes(steps, batch) to arrays of numbers uniform in [0, 1)"
)


class Draw(NamedTuple):
    """Numbers that a layer takes for one call."""

    shape: tuple[Any, ...]
    p: float
    """The part of the values that is dropped."""


class Drawn(NamedTuple):
    """What a recurrent layer drops in one call; `None` and () where it drops nothing."""

    between: tuple[Array, ...] = ()  # after each layer but the last: (time, batch, directions × outputs), True where kept
    hidden: Array | None = None  # (layers × directions, batch, outputs): 0, or 1/(1−p), which h is multiplied with
    moves: Array | None = None  # (layers × directions, time, batch, outputs): True where h takes its new value

    @classmethod
    def of(cls, random: Mapping[str, Array], draws: Mapping[str, Draw], x: Array) -> Drawn:
        """From the uniform numbers of a call on `x`."""
        masks = {name: kept(random[name], draw.p) for name, draw in draws.items()}
        between, hidden = masks.get("dropout"), masks.get("recurrent_dropout")
        if hidden is not None:
            hidden = xp_of(x).astype(hidden, x.dtype) * scale(draws["recurrent_dropout"].p)
        parts = () if between is None else tuple(between[k, ...] for k in range(draws["dropout"].shape[0]))
        return cls(parts, hidden, masks.get("zoneout"))

    def of_place(self, k: int) -> dict[str, Array | None]:
        """What the k-th direction takes of it."""
        return {
            "hidden_mask": None if self.hidden is None else self.hidden[k, ...],
            "moves": None if self.moves is None else self.moves[k, ...],
        }


def uniform_numbers(layer: Pure, params: Mapping[str, Array], x: Array, rng: Any) -> Arrays:
    """The numbers that `layer` takes in training for a call on `x`, by name, drawn with `rng` or given by it.

    Raises `ArgumentError` without `rng`, and for names, `ShapeError`, `DTypeError` and `UnsupportedError` for arrays that do not fit.
    """
    first = (*x.shape[:2], 1, 1)[:2]
    steps, batch = reversed(first) if layer.batch_first else first
    shapes = layer.random_shapes(steps, batch)
    if rng is None:
        rates = ", ".join(f"{name} {draw.p:g}" for name, draw in layer.draws(steps, batch).items())
        raise ArgumentError(f"`rng` is missing: {type(layer).__name__} has {rates} in training; give rng=0, or another of {_WAYS}")
    if isinstance(rng, Mapping):
        _check_given(rng, shapes, x)
        return dict(rng)
    own = library(x)
    if own.draws is not None:
        drawn = own.draws(rng, list(shapes.values()), x)
        if drawn is not None:
            return dict(zip(shapes, drawn, strict=True))
    numbers = _numpy_numbers(rng, shapes.values(), x)
    if own.autodiff is not None and not all(is_concrete(a) for a in (x, *leaves(params))):
        raise UnsupportedError(
            f"`rng` is {rng!r} inside a transformation of {own.name} (jit, compile, grad, vmap …), which would draw once and for all; "
            f"give what is drawn outside of it or by it: {_WAYS}"
        )
    return {name: xp_of(x).asarray(a, device=device_of(x)) for name, a in zip(shapes, numbers, strict=True)}


def _numpy_numbers(rng: Any, shapes: Iterable[tuple[int, ...]], x: Array) -> Iterable[Any]:
    generator = rng
    if not isinstance(rng, numpy.random.Generator):
        try:
            seed = -1 if isinstance(rng, bool) else operator.index(rng)
        except TypeError:
            seed = -1
        if seed < 0:
            raise UnsupportedError(f"`rng` is {rng!r}; expected {_WAYS}")
        generator = numpy.random.default_rng(seed)
    return (generator.random(shape, dtype=numpy.float32) for shape in shapes)


def _check_given(given: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], x: Array) -> None:
    """Raise unless these are arrays of the library of `x`, of these names and shapes, of truth values or numbers from 0 to 1."""
    if given.keys() != shapes.keys():
        expected = ", ".join(f"{name!r} {shape}" for name, shape in shapes.items())
        raise ArgumentError(f"`rng` has {', '.join(map(repr, given)) or 'nothing'}; expected arrays for {expected}")
    for name, shape in shapes.items():
        array = given[name]
        xp = namespace(x=x, **{f"rng[{name!r}]": array})
        if tuple(array.shape) != tuple(shape):
            raise ShapeError(f"`rng` has {name!r} of shape {tuple(array.shape)}; expected {tuple(shape)}")
        if is_kind(xp, array.dtype, "bool"):
            continue
        if not is_kind(xp, array.dtype, "real floating"):
            raise DTypeError(f"`rng` has {name!r} of dtype {array.dtype}; expected numbers uniform in [0, 1), or True for what is kept")
        known = seen(array)
        if known is not None and 0 not in array.shape and not bool(xp_of(known).all((known >= 0) & (known <= 1))):
            raise UnsupportedError(
                f"`rng` has {name!r} with numbers that do not lie from 0 to 1; expected uniform ones, which are not scaled, or True for "
                "what is kept"
            )
