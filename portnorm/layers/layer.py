"""What every layer is: two pure functions, forward and backward, and an object that holds their parameters and buffers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import array_api_compat
import numpy

from portnorm.arrays import (
    Array,
    DType,
    Namespace,
    default_integer,
    device_of,
    dtype_name,
    is_concrete,
    library,
    load_dtype,
    load_namespace,
    namespace,
    require_lengths,
    to_numpy,
    xp_of,
)
from portnorm.errors import CheckpointError, DTypeError, ShapeError, UnsupportedError
from portnorm.layers.initial import Generator
from portnorm.padding import Counted, Mask, is_whole, leading, mask_of, steps_of, valid, without_padding

Arrays = dict[str, Array]


class Layer:
    """Base of all layers.

    A subclass gives `forward` and `backward`, which are pure, and fills `params` and `buffers` when it is made. A layer is called as
    `y = layer(x)`, a recurrent one as `y, state = layer(x, state=None, lengths=None)`; `vjp` gives the pullback as well.
    With `training=True` a call also updates the running statistics that the layer holds.
    """

    takes_integers: bool = False
    """Whether `x` holds integers, for example numbers of words; else it holds numbers of the layer's dtype."""
    recurrent: bool = False
    """Whether a call takes and returns a state."""
    batch_first: bool = False
    """Whether sequences are (batch, time, features); else they are (time, batch, features)."""
    provenance: str = ""
    """Where the weights were imported from, and how that was recognised."""
    keeps_time: bool = True
    """Whether the result still has the time axis that the input had."""
    masks: bool = False
    """Whether `forward` says itself what `y` is at padding; else it is made 0 there."""
    masks_channels: bool = False
    """Whether a mask may vary along the features."""

    def __init__(self, config: dict[str, Any], xp: Namespace | str | None, device: Any, dtype: DType):
        self.config = config
        self.xp = load_namespace(xp)
        self.device = device
        self.dtype = load_dtype(self.xp, dtype)
        if not self.xp.isdtype(self.dtype, "real floating"):
            raise DTypeError(f"`dtype` is {dtype}; expected a real floating-point type such as float32")
        dtype_name(self.xp, self.dtype)  # one that CuPy has from another package has no name there
        self.params: Arrays = {}
        self.buffers: Arrays = {}

    # -- the pure form -------------------------------------------------------------------------------------------------------------

    def forward(
        self, params: Arrays, buffers: Arrays, x: Array, state: Any, lengths: Counted, training: bool, keep: bool
    ) -> tuple[Array, Any, Arrays, Any]:
        """`(y, state, buffers, residuals)`; without `keep` the residuals are not needed. `lengths` may be a `Mask` in its stead."""
        raise NotImplementedError

    def backward(self, residuals: Any, dy: Array | None, dstate: Any, training: bool) -> tuple[Array | None, Any, Arrays]:
        """`(dx, dstate, dparams)`"""
        raise NotImplementedError

    def apply(
        self,
        params: Arrays,
        buffers: Arrays,
        x: Array,
        state: Any = None,
        lengths: Counted = None,
        training: bool = False,
        *,
        mask: Array | None = None,
    ) -> tuple[Array, Any, Arrays]:
        """The layer as a pure function: `(y, state, buffers)`. JAX transforms and the exporter use this form.

        torch's autograd and JAX's differentiate it as one function, by `backward`; running statistics are constants to them.
        """
        autodiff = library(x).autodiff
        if mask is not None:
            lengths = mask_of(x, mask, self.feature_axes(x.ndim))
        if lengths is not None:
            x = without_padding(x, self.valid(x, lengths))
        if autodiff is None or not autodiff.records((params, buffers, x, state)):
            y, state, new, _ = self.forward(params, buffers, x, state, lengths, training, False)
        else:
            y, state, new = autodiff.call(_Function(self, training), (params, buffers, x, state, lengths), {})
        there = None if lengths is None else self._there(y, lengths)
        y = y if there is None else xp_of(y).where(there, y, 0.0)
        return y, state, _constant(new) if training else buffers

    def pure_vjp(
        self, params: Arrays, buffers: Arrays, x: Array, state: Any = None, lengths: Counted = None, training: bool = False
    ) -> tuple[Array, Any, Arrays, Callable[..., tuple[Array | None, Any, Arrays]]]:
        """`(y, state, buffers, pullback)` with `dx, dstate, grads = pullback(dy, dstate)`: what `apply` computes, with its vjp."""
        if lengths is not None:
            x = without_padding(x, self.valid(x, lengths))
        y, out, new, residuals = self.forward(params, buffers, x, state, lengths, training, True)
        there = None if lengths is None else self._there(y, lengths)
        y = y if there is None else xp_of(y).where(there, y, 0.0)

        def pullback(dy: Array | None, dstate: Any = None) -> tuple[Array | None, Any, Arrays]:
            if there is not None and dy is not None:
                dy = xp_of(dy).where(there, dy, 0.0)
            return self.backward(residuals, dy, dstate, training)

        return y, out, new, pullback

    # -- padding -------------------------------------------------------------------------------------------------------------------

    def feature_axes(self, ndim: int) -> tuple[int, ...]:
        """The axes of an `x` of so many that hold features; a mask lies along the others."""
        return (ndim - 1,)

    def valid(self, x: Array, counted: Array | Mask) -> Array:
        """True where `x` counts, broadcastable to it; raises `ShapeError`."""
        return valid(x, counted, self.feature_axes(x.ndim), self.batch_first, self.masks_channels)

    def _there(self, y: Array, counted: Array | Mask) -> Array | None:
        """Where `y` has values that count, if it is to be 0 elsewhere and is not yet."""
        if self.masks or not self.keeps_time or (self.recurrent and isinstance(counted, Mask)):
            return None
        return leading(y, counted if isinstance(counted, Mask) else Mask(steps_of(y, counted, self.batch_first), (0, 1)))

    # -- the object ----------------------------------------------------------------------------------------------------------------

    def __call__(self, x: Array, state: Any = None, lengths: Any = None, *, mask: Array | None = None, training: bool = False) -> Any:
        """`y`, or `(y, state)` for a recurrent layer. `training=True` uses the batch's statistics and updates the running ones.

        Where `x` is (time, batch, features), `lengths` (batch,) counts each sequence's steps, and what follows them is padding. `mask` is
        True for what counts, wherever that is: (time, batch), or (batch, time) with `batch_first`; for a normalization with another
        channel axis shaped like `x` without that; or what broadcasts to `x`. What does not count enters nothing, whatever stands there: no
        value, no statistic, no gradient. There `y` is 0, as torch has it for packed sequences. Only a recurrent layer does as Keras does
        where a `mask` is given, and holds its state: a masked step repeats the result of the step before (0 if `bidirectional`), and what
        follows such a layer in a `Sequential` takes that for its input, unless it takes statistics over time. The cotangent of a repeated
        result counts; that of a 0 does not.
        """
        lengths = self._checked(x, state, lengths, mask)
        y, state, self.buffers = self.apply(self.params, self.buffers, x, state, lengths, training)
        return (y, state) if self.recurrent else y

    def vjp(self, x: Array, state: Any = None, lengths: Any = None, *, mask: Array | None = None, training: bool = False) -> Any:
        """`y, pullback` with `dx, grads = pullback(dy)`; recurrent: `y, state, pullback` with `dx, dstate, grads = pullback(dy, dstate)`.

        Either cotangent of a recurrent layer may be `None` for zero. `grads` has the names of `parameters()`.
        """
        lengths = self._checked(x, state, lengths, mask)
        y, out, buffers, pure = self.pure_vjp(self.params, self.buffers, x, state, lengths, training)
        self.buffers = _constant(buffers)

        def pullback(dy: Array | None, dstate: Any = None) -> Any:
            if dy is not None and is_concrete(y) and tuple(dy.shape) != tuple(y.shape):
                raise ShapeError(f"the cotangent `dy` has shape {tuple(dy.shape)} but the result has shape {tuple(y.shape)}")
            dx, dstate, grads = pure(dy, dstate)
            return (dx, dstate, grads) if self.recurrent else (dx, grads)

        return (y, out, pullback) if self.recurrent else (y, pullback)

    def _checked(self, x: Array, state: Any, lengths: Any, mask: Array | None = None) -> Counted:
        """`lengths` or `mask` as `forward` takes it, after `x` and it were found to fit the layer."""
        return checked_call(self, self.params, self.dtype, x, state, lengths, mask)

    def parameters(self) -> Arrays:
        """The trainable arrays by name: the very ones that the layer computes with.

        A torch optimizer that changes them in place changes the layer. Set `requires_grad_()` on them first, and again after `to` and
        `load_state_dict`, which make new ones.
        """
        return dict(self.params)

    def state_dict(self) -> Arrays:
        """Parameters and buffers by name."""
        return {**self.params, **self.buffers}

    def assign(self, params: Mapping[str, Array], buffers: Mapping[str, Array] | None = None) -> None:
        """Hold these parameters (and buffers) from now on, as they are: what an optimizer returns."""
        self.params = dict(params)
        if buffers is not None:
            self.buffers = dict(buffers)

    def load_state_dict(self, arrays: Mapping[str, Array]) -> None:
        """Take the arrays of a state dict, of any library, in the layer's own library, device and dtype.

        Raises `CheckpointError` for a missing or unknown name or a shape that does not fit; the layer is then as it was.
        """
        own = self.state_dict()
        missing, extra = [n for n in own if n not in arrays], [n for n in arrays if n not in own]
        if missing or extra:
            raise CheckpointError(
                f"state dict does not fit {type(self).__name__}: missing {missing or 'nothing'}, unknown {extra or 'nothing'}"
            )
        for name, array in own.items():
            if tuple(arrays[name].shape) != tuple(array.shape):
                raise CheckpointError(f"`{name}` has shape {tuple(arrays[name].shape)}; expected {tuple(array.shape)}")
        self.assign(*({n: self._converted(arrays[n], like=a) for n, a in group.items()} for group in (self.params, self.buffers)))

    def to(self, xp: Namespace | str | None = None, device: Any = None, dtype: DType | None = None) -> Self:
        """A copy of the layer with its arrays in another library, on another device, or of another floating dtype."""
        other, space = self.copy(), self.xp if xp is None else load_namespace(xp)
        if device is None and space is self.xp:
            device = self.device
        other._place(space, device, dtype or dtype_name(self.xp, self.dtype))
        return other

    def _place(self, xp: Namespace, device: Any, dtype: DType) -> None:
        arrays = (self.params, self.buffers)
        self.xp, self.device, self.dtype = xp, device, load_dtype(xp, dtype)
        self.assign(*({n: self._converted(a, like=a) for n, a in group.items()} for group in arrays))

    def copy(self) -> Self:
        """A copy that shares the arrays but not the places that hold them."""
        other = copy.copy(self)
        other.params, other.buffers = dict(self.params), dict(self.buffers)
        return other

    def __getstate__(self) -> dict[str, Any]:
        """For `copy.deepcopy` and for other processes: the namespace goes by its name."""
        return {**self.__dict__, "xp": self.xp.__name__, "dtype": dtype_name(self.xp, self.dtype)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.xp = load_namespace(state["xp"])
        self.dtype = load_dtype(self.xp, state["dtype"])

    def _converted(self, array: Array, like: Array) -> Array:
        floating = xp_of(like).isdtype(like.dtype, "real floating")
        dtype = self.dtype if floating else default_integer(self.xp)
        if xp_of(array) is not self.xp:
            return self.xp.asarray(numpy.array(to_numpy(array)), dtype=dtype, device=self.device)
        (array,) = _constant({"": self.xp.astype(array, dtype)}).values()
        return array if self.device is None else array_api_compat.to_device(array, self.device)

    def _new(self, values: Any, *, integer: bool = False) -> Array:
        """A new array of the layer's library, device and dtype."""
        dtype = default_integer(self.xp) if integer else self.dtype
        return self.xp.asarray(numpy.asarray(values), dtype=dtype, device=self.device)

    # -- running statistics --------------------------------------------------------------------------------------------------------

    def estimate_population(self, batches: Iterable[Any]) -> None:
        """Replace all running statistics by population statistics: the average over a full pass of the statistics of each batch.

        `batches` yields `x`, `(x, lengths)` or `(x, lengths, state)`. This is how Cooijmans et al. 2016 evaluate; the moving average is
        only a live estimate.
        """
        pure = self.copy()
        pure.forget_statistics()
        count = 0
        for batch in batches:
            x, lengths, state = (*(batch if isinstance(batch, tuple) else (batch,)), None, None)[:3]
            lengths = pure._checked(x, state, lengths)
            pure.buffers = pure.apply(pure.params, pure.buffers, x, state, lengths, training=True)[2]
            count += 1
        if not count:
            raise UnsupportedError("`batches` is empty; expected at least one batch to take statistics of")
        self.assign(self.params, pure.buffers)

    def forget_statistics(self) -> None:
        """Set running statistics to their start and let every batch from now on weigh the same."""

    def initial_state(self, batch: int, *, noise: float = 0.0, rng: int | Generator | None = None) -> Any:
        """The state before the first step; `None` for a layer that has none."""
        return None

    def input_dims(self) -> tuple[int | str, ...]:
        """The shape of `x` with names for the lengths that vary, as the exporter needs it."""
        raise NotImplementedError

    def layers(self) -> Iterator[Layer]:
        """This layer and all layers inside it."""
        yield self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.config.items())})"


def _constant(arrays: Arrays) -> Arrays:
    """The same arrays, through which no library differentiates."""
    constants = {}
    for name, array in arrays.items():
        autodiff = library(array).autodiff
        constants[name] = array if autodiff is None else autodiff.constant(array)
    return constants


@dataclass(frozen=True)
class _Function:
    """A layer as a function of its arrays that brings its own vjp: `portnorm.arrays.Differentiable`."""

    layer: Layer
    training: bool

    def __call__(self, *args: Any, **attrs: Any) -> Any:
        params, buffers, x, state, lengths = args
        return self.layer.forward(params, buffers, x, state, lengths, self.training, False)[:3]

    def forward(self, *args: Any, **attrs: Any) -> tuple[Any, Any]:
        params, buffers, x, state, lengths = args
        y, state, buffers, residuals = self.layer.forward(params, buffers, x, state, lengths, self.training, True)
        return (y, state, buffers), residuals

    def vjp(self, residuals: Any, cotangent: Any, /, **attrs: Any) -> tuple[Any, ...]:
        dy, dstate, _ = cotangent
        dx, dstate, grads = self.layer.backward(residuals, dy, dstate, self.training)
        return grads, None, dx, dstate


def checked_call(
    layer: Layer, params: Mapping[str, Array], dtype: DType | None, x: Array, state: Any, lengths: Any, mask: Array | None = None
) -> Counted:
    """`lengths` or `mask` as `forward` takes it, after the arguments were found to fit `layer` with these parameters, of this dtype or any.

    Raises `ShapeError`, `DTypeError`, `UnsupportedError`.
    """
    if not layer.recurrent and state is not None:
        raise UnsupportedError(f"`state` is given, but {type(layer).__name__} has none")
    own = next(iter(params.values()), None)
    xp = namespace(**({} if own is None else {"parameters": own}), x=x)
    if layer.recurrent:
        require_lengths(x=x)
    if layer.takes_integers:
        if not xp.isdtype(x.dtype, "integral"):
            raise DTypeError(f"`x` has dtype {x.dtype}; expected integers")
    elif dtype is not None and x.dtype != dtype:
        raise DTypeError(f"`x` has dtype {x.dtype} but the layer has {dtype}; convert `x`, or the layer with layer.to(dtype=...)")
    if mask is not None:
        if lengths is not None:
            raise UnsupportedError("`lengths` and `mask` are both given; expected one of them")
        counted = mask_of(x, mask, layer.feature_axes(x.ndim))
        layer.valid(x, counted)
        return None if is_whole(counted) else counted
    if lengths is None:
        return None
    lengths = checked_lengths(xp, x, lengths, layer.batch_first)
    if not layer.recurrent:
        layer.valid(x, lengths)
    return lengths


def checked_lengths(xp: Namespace, x: Array, lengths: Any, batch_first: bool = False) -> Array:
    """`lengths` as an integer array (batch,) of the library of `x`, each between 0 and the number of steps."""
    if x.ndim < 2:
        raise ShapeError(f"`x` has shape {tuple(x.shape)}; expected (time, batch, features) where `lengths` is given")
    steps, batch = (x.shape[1], x.shape[0]) if batch_first else x.shape[:2]
    if not hasattr(lengths, "__array_namespace__") and not hasattr(lengths, "dtype"):
        lengths = xp.asarray(numpy.asarray(lengths, dtype=int if batch == 0 else None), device=device_of(x))
    namespace(x=x, lengths=lengths)
    if not xp.isdtype(lengths.dtype, "integral"):
        raise DTypeError(f"`lengths` has dtype {lengths.dtype}; expected integers")
    if tuple(lengths.shape) != (batch,):
        raise ShapeError(f"`lengths` has shape {tuple(lengths.shape)}; expected ({batch},), one for each sequence of `x` {tuple(x.shape)}")
    if is_concrete(lengths) and batch and (bool(xp.any(lengths < 0)) or bool(xp.any(lengths > steps))):
        low, high = int(xp.min(lengths)), int(xp.max(lengths))
        raise ShapeError(f"`lengths` reach from {low} to {high}; expected 0 to {steps}, the number of steps of `x` {tuple(x.shape)}")
    return xp.astype(lengths, default_integer(xp))
