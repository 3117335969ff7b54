"""What every layer is: two pure functions, forward and backward, and an object that holds their parameters and buffers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
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
    statistics_dtype,
    to_numpy,
    xp_of,
)
from portnorm.errors import CheckpointError, DTypeError, ShapeError, UnsupportedError
from portnorm.layers.initial import Generator
from portnorm.statistics import BATCHES, VALUES

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
        self, params: Arrays, buffers: Arrays, x: Array, state: Any, lengths: Array | None, training: bool, keep: bool
    ) -> tuple[Array, Any, Arrays, Any]:
        """`(y, state, buffers, residuals)`; without `keep` the residuals are not needed."""
        raise NotImplementedError

    def backward(self, residuals: Any, dy: Array | None, dstate: Any, training: bool) -> tuple[Array | None, Any, Arrays]:
        """`(dx, dstate, dparams)`"""
        raise NotImplementedError

    def apply(
        self, params: Arrays, buffers: Arrays, x: Array, state: Any = None, lengths: Array | None = None, training: bool = False
    ) -> tuple[Array, Any, Arrays]:
        """The layer as a pure function: `(y, state, buffers)`. JAX transforms and the exporter use this form.

        torch's autograd and JAX's differentiate it as one function, by `backward`; running statistics are constants to them.
        """
        autodiff = library(x).autodiff
        if autodiff is None or not autodiff.records((params, buffers, x, state)):
            y, state, new, _ = self.forward(params, buffers, x, state, lengths, training, False)
        else:
            y, state, new = autodiff.call(_Function(self, training), (params, buffers, x, state, lengths), {})
        return y, state, _constant(new) if training else buffers

    # -- the object ----------------------------------------------------------------------------------------------------------------

    def __call__(self, x: Array, state: Any = None, lengths: Any = None, *, mask: Array | None = None, training: bool = False) -> Any:
        """`y`, or `(y, state)` for a recurrent layer. `training=True` uses the batch's statistics and updates the running ones.

        Where `x` is (time, batch, features), `lengths` (batch,) counts each sequence's steps, or `mask` (time, batch) is True for them;
        with `batch_first` the mask is (batch, time). Padding comes last.
        """
        lengths = self._checked(x, state, lengths, mask)
        y, state, self.buffers = self.apply(self.params, self.buffers, x, state, lengths, training)
        return (y, state) if self.recurrent else y

    def vjp(self, x: Array, state: Any = None, lengths: Any = None, *, mask: Array | None = None, training: bool = False) -> Any:
        """`y, pullback` with `dx, grads = pullback(dy)`; recurrent: `y, state, pullback` with `dx, dstate, grads = pullback(dy, dstate)`.

        Either cotangent of a recurrent layer may be `None` for zero. `grads` has the names of `parameters()`.
        """
        lengths = self._checked(x, state, lengths, mask)
        y, out, buffers, residuals = self.forward(self.params, self.buffers, x, state, lengths, training, True)
        self.buffers = _constant(buffers)

        def pullback(dy: Array | None, dstate: Any = None) -> Any:
            if dy is not None and is_concrete(y) and tuple(dy.shape) != tuple(y.shape):
                raise ShapeError(f"the cotangent `dy` has shape {tuple(dy.shape)} but the result has shape {tuple(y.shape)}")
            dx, dstate, grads = self.backward(residuals, dy, dstate, training)
            return (dx, dstate, grads) if self.recurrent else (dx, grads)

        return (y, out, pullback) if self.recurrent else (y, pullback)

    def _checked(self, x: Array, state: Any, lengths: Any, mask: Array | None = None) -> Array | None:
        """`lengths` or those of `mask` as an array, after `x` and it were found to fit the layer."""
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
        groups = ((self.params, False), (self.buffers, True))
        self.assign(*({n: self._converted(arrays[n], like=a, statistic=kept) for n, a in group.items()} for group, kept in groups))

    def to(self, xp: Namespace | str | None = None, device: Any = None, dtype: DType | None = None) -> Self:
        """A copy of the layer with its arrays in another library, on another device, or of another floating dtype."""
        other, space = self.copy(), self.xp if xp is None else load_namespace(xp)
        if device is None and space is self.xp:
            device = self.device
        other._place(space, device, dtype or dtype_name(self.xp, self.dtype))
        return other

    def _place(self, xp: Namespace, device: Any, dtype: DType) -> None:
        groups = ((self.params, False), (self.buffers, True))
        self.xp, self.device, self.dtype = xp, device, load_dtype(xp, dtype)
        self.assign(*({n: self._converted(a, like=a, statistic=kept) for n, a in group.items()} for group, kept in groups))

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

    def _converted(self, array: Array, like: Array, statistic: bool) -> Array:
        floating = xp_of(like).isdtype(like.dtype, "real floating")
        dtype = self._dtype_of(statistic) if floating else default_integer(self.xp)
        if xp_of(array) is not self.xp:
            return self.xp.asarray(numpy.array(to_numpy(array)), dtype=dtype, device=self.device)
        (array,) = _constant({"": self.xp.astype(array, dtype)}).values()
        return array if self.device is None else array_api_compat.to_device(array, self.device)

    def _dtype_of(self, statistic: bool) -> DType:
        """That of the layer, and of its running statistics at least float32: else small changes of them, and large variances, were lost."""
        return statistics_dtype(self.xp, self.dtype) if statistic else self.dtype

    def _new(self, values: Any, *, integer: bool = False, statistic: bool = False) -> Array:
        """A new array of the layer's library, device and dtype."""
        dtype = default_integer(self.xp) if integer else self._dtype_of(statistic)
        return self.xp.asarray(numpy.asarray(values), dtype=dtype, device=self.device)

    # -- running statistics --------------------------------------------------------------------------------------------------------

    def estimate_population(self, batches: Iterable[Any]) -> None:
        """Replace all running statistics by population statistics: the average over a full pass of the statistics of each batch.

        A batch weighs as much as the values that its statistics were taken of: its frames, or at a step the sequences that reach it.
        `batches` yields `x`, `(x, lengths)` or `(x, lengths, state)`. This is how Cooijmans et al. 2016 evaluate, with batches of one size;
        as theirs, the population variance is the average of the batches' variances (of whichever kind the layer keeps, biased or
        unbiased), without the variance of their means. The moving average is only a live estimate.
        """
        pure = self.copy()
        pure.forget_statistics()
        pure.buffers = {**pure.buffers, **pure._counters()}
        count = 0
        for batch in batches:
            x, lengths, state = (*(batch if isinstance(batch, tuple) else (batch,)), None, None)[:3]
            lengths = pure._checked(x, state, lengths)
            pure.buffers = pure.apply(pure.params, pure.buffers, x, state, lengths, training=True)[2]
            count += 1
        if not count:
            raise UnsupportedError("`batches` is empty; expected at least one batch to take statistics of")
        self.assign(self.params, {name: pure.buffers[name] for name in self.buffers})

    def _counters(self) -> Arrays:
        """Buffers that count values where there are some that count batches."""
        counters = {n.replace(BATCHES, VALUES): b for n, b in self.buffers.items() if BATCHES in n}
        return {name: self._new(numpy.zeros(b.shape), statistic=True) for name, b in counters.items()}

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
) -> Array | None:
    """`lengths` or those of `mask` as an array, after the arguments were found to fit `layer` with these parameters, of this dtype or any.

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
        lengths = lengths_of_mask(xp, x, mask, layer.batch_first)
    return None if lengths is None else checked_lengths(xp, x, lengths, layer.batch_first)


def lengths_of_mask(xp: Namespace, x: Array, mask: Array, batch_first: bool = False) -> Array:
    """The number of steps of each sequence from a mask (time, batch) that is True for them, and False for the padding after them."""
    if x.ndim != 3:
        raise ShapeError(f"`x` has shape {tuple(x.shape)}; expected (time, batch, features) where `mask` is given")
    namespace(x=x, mask=mask)
    if not xp.isdtype(mask.dtype, "bool"):
        raise DTypeError(f"`mask` has dtype {mask.dtype}; expected bool, True for the steps of a sequence")
    if tuple(mask.shape) != tuple(x.shape[:2]):
        raise ShapeError(f"`mask` has shape {tuple(mask.shape)}; expected {tuple(x.shape[:2])}, the first axes of `x` {tuple(x.shape)}")
    steps = xp.astype(mask, default_integer(xp))
    time = 1 if batch_first else 0
    if is_concrete(mask) and mask.shape[time] > 1:
        later, earlier = (steps[:, 1:], steps[:, :-1]) if batch_first else (steps[1:, :], steps[:-1, :])
        if bool(xp.any(later > earlier)):
            raise UnsupportedError("`mask` is True after a False; expected padding to come last in every sequence")
    return xp.sum(steps, axis=time)


def checked_lengths(xp: Namespace, x: Array, lengths: Any, batch_first: bool = False) -> Array:
    """`lengths` as an integer array (batch,) of the library of `x`, each between 0 and the number of steps."""
    if x.ndim < 2:
        raise ShapeError(f"`x` has shape {tuple(x.shape)}; expected (time, batch, features) where `lengths` is given")
    steps, batch = (x.shape[1], x.shape[0]) if batch_first else x.shape[:2]
    if not hasattr(lengths, "__array_namespace__") and not hasattr(lengths, "dtype"):
        lengths = xp.asarray(numpy.asarray(lengths), device=device_of(x))
    namespace(x=x, lengths=lengths)
    if not xp.isdtype(lengths.dtype, "integral"):
        raise DTypeError(f"`lengths` has dtype {lengths.dtype}; expected integers")
    if tuple(lengths.shape) != (batch,):
        raise ShapeError(f"`lengths` has shape {tuple(lengths.shape)}; expected ({batch},), one for each sequence of `x` {tuple(x.shape)}")
    if is_concrete(lengths) and batch and (bool(xp.any(lengths < 0)) or bool(xp.any(lengths > steps))):
        low, high = int(xp.min(lengths)), int(xp.max(lengths))
        raise ShapeError(f"`lengths` reach from {low} to {high}; expected 0 to {steps}, the number of steps of `x` {tuple(x.shape)}")
    return xp.astype(lengths, default_integer(xp))
