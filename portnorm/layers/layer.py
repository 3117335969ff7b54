"""What every layer is: two pure functions, forward and backward, and an object that holds their parameters and buffers."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy

from portnorm.arrays import (
    Array,
    DType,
    Namespace,
    Narrow,
    constant,
    device_of,
    is_concrete,
    kept_name,
    library,
    load_namespace,
    namespace,
    require_lengths,
    to_numpy,
    xp_of,
)
from portnorm.dtypes import (
    default_integer,
    dtype_name,
    is_kind,
    is_longdouble,
    load_dtype,
    require_dtype,
    require_floating,
    statistics_dtype,
)
from portnorm.errors import CheckpointError, DTypeError, ShapeError, UnsupportedError
from portnorm.layers.initial import Generator
from portnorm.layers.randomness import Draw, uniform_numbers
from portnorm.layers.summary import Call, Calls, Shape, Summary, SummaryRow, summarized
from portnorm.op import require_cotangent
from portnorm.padding import Counted, Mask, is_whole, leading, mask_of, steps_of, valid, without_padding
from portnorm.quantization import QuantizeName
from portnorm.scalars import switch
from portnorm.statistics import BATCHES, VALUES

Arrays = dict[str, Array]

_NUMBERS = itertools.count(1)


class Layer:
    """Base of all layers.

    A subclass gives `forward` and `backward`, which are pure, and fills `params` and `buffers` when it is made. A layer is called as
    `y = layer(x)`, a recurrent one as `y, state = layer(x, state=None, lengths=None)`; `vjp` gives the pullback as well.
    With `training=True` a call also updates the running statistics that the layer holds; without it a call changes nothing.

    What a layer was made with are its attributes, under the names of the arguments. One that is changed counts from then on, and is what
    `portnorm.save` and `portnorm.export` write. It is checked as when the layer is made, and refused where the layer would have other
    arrays.

    >>> import numpy as np, portnorm as pn
    >>> layer: pn.Layer = pn.LayerNorm(3, dtype="float64")
    >>> y, pullback = layer.vjp(np.array([[1.0, 2.0, 4.0]]), training=True)
    >>> dx, grads = pullback(np.ones_like(y))
    >>> {name: a.shape for name, a in grads.items()}
    {'weight': (3,), 'bias': (3,)}
    """

    takes_integers: bool = False
    """Whether `x` holds integers, for example numbers of words; else it holds numbers of the layer's dtype."""
    is_one_op: bool = False
    """Whether a call is that of one Op, which rounds its result itself where the dtype is one that nobody computes in."""
    recurrent: bool = False
    """Whether a call takes and returns a state."""
    batch_first: bool = False
    """Whether sequences are (batch, time, features); else they are (time, batch, features)."""
    orders_axes: bool = False
    """Whether `batch_first` says something of the layer, since it takes whole sequences."""
    provenance: str = ""
    """Where the weights were imported from, and how that was recognised."""
    keeps_time: bool = True
    """Whether the result still has the time axis that the input had."""
    turns_time: bool = False
    """Whether the steps of the result are in the opposite order of those of the input."""
    evaluates: bool = False
    """Whether `eval` was called: the layer then computes as in evaluation, whatever the call around it says."""
    masks: bool = False
    """Whether `forward` says itself what `y` is at padding; else it is made 0 there."""
    masks_channels: bool = False
    """Whether a mask may vary along the features."""
    changes: str = "0"
    """Another text for every layer of this process, and after every change of an argument: whoever keeps something that was made of the
    configuration compares it. Not a number, of which `torch.compile` would think that the graph takes any."""
    drops: bool = False
    """Whether a call in training drops values at random, and so takes `rng`."""
    _settings: tuple[str, ...] = ()
    _given: tuple[str, ...] = ()

    def __init__(self, config: dict[str, Any], xp: Namespace | str | None, device: Any, dtype: DType):
        self.changes = str(next(_NUMBERS))
        self._settings = self._given = tuple(config)
        for name, value in config.items():
            setattr(self, name, value)
        self.xp = load_namespace(xp)
        self.device = device
        self.dtype = load_dtype(self.xp, dtype)
        if not is_kind(self.xp, self.dtype, "real floating"):
            raise DTypeError(f"`dtype` is {dtype}; expected a real floating-point type such as float32")
        require_dtype(self.xp, self.dtype, device)
        dtype_name(self.xp, self.dtype)  # one that CuPy has from another package has no name there
        self.params: Arrays = {}
        self.buffers: Arrays = {}

    @property
    def config(self) -> dict[str, Any]:
        """What another layer has to be made with to compute the same from the same arrays."""
        config = {name: getattr(self, name) for name in self._settings}
        return {name: value for name, value in config.items() if name != "quantize" or value is not None}

    def __setattr__(self, name: str, value: Any) -> None:
        if "params" in self.__dict__ and (name in self._settings or name in self._given):
            value = self._setting(name, value)
            super().__setattr__("changes", str(next(_NUMBERS)))
        elif name == "quantize" and "params" in self.__dict__ and value is not None:
            raise UnsupportedError(f"`quantize` is {value!r}, but {type(self).__name__} has no weights to quantize; expected None")
        super().__setattr__(name, value)

    def told(self) -> str:
        """The layer without its arrays, as a text for another process. Raises `CheckpointError` where they would not fit."""
        self.check_fit()
        return json.dumps({"version": 1, "dtype": dtype_name(self.xp, self.dtype), "layer": self.description()})

    def description(self) -> dict[str, Any]:
        """Its class and configuration in numbers, texts, lists and dicts."""
        return {"type": type(self).__name__, "config": {name: _plain(value) for name, value in self.config.items()}}

    def _setting(self, name: str, value: Any) -> Any:
        """A changed `value` of an argument, as the layer takes it when it is made.

        Raises as `__init__` does, and `UnsupportedError` where the layer would need other arrays than it has, or has no such argument.
        """
        if name not in self._settings:
            raise UnsupportedError(f"`{name}` of {type(self).__name__} is always {getattr(self, name)!r}")
        other, arrays = self._made_of({**self.config, name: value})
        if arrays != self._made_of(self.config)[1]:
            raise UnsupportedError(
                f"`{name}` is {value!r}, with which {type(self).__name__} would have other arrays than it has; make a new one"
            )
        return getattr(other, name)

    def _made_of(self, config: dict[str, Any]) -> tuple[Layer, dict[str, tuple[int, ...]]]:
        """A layer with this configuration, and the shapes of its arrays."""
        layer = type(self)(**config)
        return layer, {name: tuple(a.shape) for name, a in layer.state_dict().items()}

    # -- the pure form -------------------------------------------------------------------------------------------------------------

    def forward(
        self,
        params: Arrays,
        buffers: Arrays,
        x: Array,
        state: Any,
        lengths: Counted,
        training: bool,
        keep: bool,
        random: Arrays | None = None,
    ) -> tuple[Array, Any, Arrays, Any]:
        """`(y, state, buffers, residuals)`; without `keep` the residuals are not needed. `lengths` may be a `Mask` in its stead.

        `random` has the uniform numbers of `random_shapes`; nothing is dropped where it is `None`.
        """
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
        rng: Any = None,
    ) -> tuple[Array, Any, Arrays]:
        """The layer as a pure function: `(y, state, buffers)`. JAX transforms and the exporter use this form.

        `rng` is that of a call. torch's autograd and JAX's differentiate it as one function, by `backward`; running statistics are
        constants to them.
        Raises `CheckpointError` where `params` or `buffers` have not just the names and shapes of the layer's.
        """
        self._check_given(params, buffers)
        self._require_array(x)
        if mask is not None:
            lengths = mask_of(x, mask, self.feature_axes(x.ndim))
        random = uniform_numbers(self, params, x, rng) if training and self.drops else None
        return self._applied(params, buffers, x, state, lengths, training, random)

    def _require_array(self, x: Array) -> None:
        """Raise `UnsupportedError` or `DTypeError` where `x` is no array that a layer takes."""
        xp = namespace(x=x)
        if not self.takes_integers:
            require_floating(xp, x=x)

    def _applied(
        self, params: Arrays, buffers: Arrays, x: Array, state: Any, lengths: Counted, training: bool, random: Arrays | None = None
    ) -> tuple[Array, Any, Arrays]:
        training = self._trains(training)
        own = library(x)
        if own.narrow is not None and self._is_widened(own.narrow, params, x, lengths):
            params, buffers, x, state = own.narrow.wide((params, buffers, x, state))
            y, after, new = self._applied(params, buffers, x, state, lengths, training, random)
            return own.narrow.rounded(y), own.narrow.rounded(after), new
        autodiff = own.autodiff
        if lengths is not None:
            x = without_padding(x, self.valid(x, lengths))
        if autodiff is None or not (autodiff.records((params, buffers, x, state)) or (self.recurrent and autodiff.unrolls(self))):
            y, state, new, _ = self.forward(params, buffers, x, state, lengths, training, False, random)
        else:
            y, state, new = autodiff.call(LayerFunction(self, training), (params, buffers, x, state, lengths, random), {})
        there = None if lengths is None else self._there(y, lengths)
        y = y if there is None else xp_of(y).where(there, y, 0.0)
        return y, state, _constant(new) if training else buffers

    def pure_vjp(
        self,
        params: Arrays,
        buffers: Arrays,
        x: Array,
        state: Any = None,
        lengths: Counted = None,
        training: bool = False,
        *,
        rng: Any = None,
    ) -> tuple[Array, Any, Arrays, Callable[..., tuple[Array | None, Any, Arrays]]]:
        """`(y, state, buffers, pullback)` with `dx, dstate, grads = pullback(dy, dstate)`: what `apply` computes, with its vjp."""
        self._check_given(params, buffers)
        self._require_array(x)
        random = uniform_numbers(self, params, x, rng) if training and self.drops else None
        return self._applied_vjp(params, buffers, x, state, lengths, training, random)

    def _applied_vjp(
        self, params: Arrays, buffers: Arrays, x: Array, state: Any, lengths: Counted, training: bool, random: Arrays | None = None
    ) -> tuple[Array, Any, Arrays, Callable[..., tuple[Array | None, Any, Arrays]]]:
        training = self._trains(training)
        narrow = library(x).narrow
        if narrow is not None and self._is_widened(narrow, params, x, lengths):
            return self._narrowly_applied_vjp(narrow, params, buffers, x, state, lengths, training, random)
        if lengths is not None:
            x = without_padding(x, self.valid(x, lengths))
        y, out, new, residuals = self.forward(params, buffers, x, state, lengths, training, True, random)
        there = None if lengths is None else self._there(y, lengths)
        y = y if there is None else xp_of(y).where(there, y, 0.0)

        def pullback(dy: Array | None, dstate: Any = None) -> tuple[Array | None, Any, Arrays]:
            if there is not None and dy is not None:
                dy = xp_of(dy).where(there, dy, 0.0)
            return self.backward(residuals, dy, dstate, training)

        return y, out, new, pullback

    def _is_widened(self, narrow: Narrow, params: Arrays, x: Array, lengths: Counted) -> bool:
        """Whether the whole call is computed in the wider type."""
        itself = self.is_one_op and lengths is None
        return not itself and narrow.holds(x, next(iter(params.values()), None))

    def _narrowly_applied_vjp(
        self,
        narrow: Narrow,
        params: Arrays,
        buffers: Arrays,
        x: Array,
        state: Any,
        lengths: Counted,
        training: bool,
        random: Arrays | None,
    ) -> tuple[Array, Any, Arrays, Callable[..., tuple[Array | None, Any, Arrays]]]:
        """`_applied_vjp` in the wider type, whose results and cotangents are rounded."""
        wide = narrow.wide
        y, out, new, widely = self._applied_vjp(wide(params), wide(buffers), wide(x), wide(state), lengths, training, random)

        def pullback(dy: Array | None, dstate: Any = None) -> tuple[Array | None, Any, Arrays]:
            dx, dbefore, grads = widely(wide(dy), wide(dstate))
            of_arrays = {n: narrow.rounded(d) if narrow.holds(params[n]) else d for n, d in grads.items()}
            return narrow.rounded(dx) if narrow.holds(x) else dx, narrow.rounded(dbefore), of_arrays

        return narrow.rounded(y), narrow.rounded(out), new, pullback

    def _trains(self, training: Any) -> bool:
        """Whether a call with this `training` computes as in training; raises `UnsupportedError` for what is neither true nor false."""
        return (training if type(training) is bool else switch("training", training)) and not self.evaluates

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

    def __call__(
        self, x: Array, state: Any = None, lengths: Any = None, *, mask: Array | None = None, training: bool = False, rng: Any = None
    ) -> Any:
        """`y`, or `(y, state)` for a recurrent layer. `training=True` uses the batch's statistics and updates the running ones.

        Where `x` is (time, batch, features), `lengths` (batch,) counts each sequence's steps, and what follows them is padding. `mask` is
        True for what counts, wherever that is: (time, batch), or (batch, time) with `batch_first`; for a normalization with another
        channel axis shaped like `x` without that; or what broadcasts to `x`. What does not count enters nothing, whatever stands there: no
        value, no statistic, no gradient. There `y` is 0, as torch has it for packed sequences. Only a recurrent layer does as Keras does
        where a `mask` is given, and holds its state: a masked step repeats the result of the step before, or at first the state that came
        (0 if `bidirectional`), and what follows such a layer in a `Sequential` takes that for its input, unless it takes statistics over
        time. The cotangent of a repeated result counts; that of a 0 does not.

        `rng` is where a layer that drops values in training takes its randomness from: a seed, a `numpy.random.Generator`, under JAX or MLX
        a key (`jax.random.key(0)`, `mx.random.key(0)`, also inside `jit` or `compile`), with torch a `torch.Generator`; or the numbers
        themselves, a mapping of the names of `random_shapes` to arrays of numbers uniform in [0, 1), or of truth values, True for what is
        kept. A seed drops the same in every call. Raises `ArgumentError` where it is needed and missing; where nothing is drawn it is not
        looked at.
        """
        lengths = self._checked(x, state, lengths, mask)
        random = uniform_numbers(self, self.params, x, rng) if training and self.drops else None
        y, state, buffers = self._applied(self.params, self.buffers, x, state, lengths, training, random)
        if training:
            self._keep(buffers)
        return (y, state) if self.recurrent else y

    def vjp(
        self, x: Array, state: Any = None, lengths: Any = None, *, mask: Array | None = None, training: bool = False, rng: Any = None
    ) -> Any:
        """`y, pullback` with `dx, grads = pullback(dy)`; recurrent: `y, state, pullback` with `dx, dstate, grads = pullback(dy, dstate)`.

        Either cotangent of a recurrent layer may be `None` for zero. `grads` has the names of `parameters()`.
        """
        lengths = self._checked(x, state, lengths, mask)
        random = uniform_numbers(self, self.params, x, rng) if training and self.drops else None
        y, out, buffers, pure = self._applied_vjp(self.params, self.buffers, x, state, lengths, training, random)
        if training and not self.evaluates:
            self._keep(_constant(buffers))

        def pullback(dy: Array | None, dstate: Any = None) -> Any:
            if dy is not None and (type(dy) is not type(y) or dy.dtype != y.dtype):
                require_cotangent(y, dy)
            if dy is not None and tuple(getattr(dy, "shape", ())) != tuple(y.shape) and is_concrete(y):
                raise ShapeError(
                    f"the cotangent `dy` has shape {tuple(getattr(dy, 'shape', ()))} but the result has shape {tuple(y.shape)}"
                )
            if dy is None and not self.recurrent:
                raise UnsupportedError(f"`dy` is None; expected a cotangent of the result of {type(self).__name__}, an array like it")
            dx, dstate, grads = pure(dy, dstate)
            return (dx, dstate, grads) if self.recurrent else (dx, grads)

        return (y, out, pullback) if self.recurrent else (y, pullback)

    def eval(self) -> Self:
        """Compute as in evaluation from now on, in a training call too: the running statistics normalize, and stay as they are.

        For one part of a model that is trained: `model.parts[1].eval()`. Gradients go through it, and its parameters have theirs. Copies
        keep it; files do not, as those of torch.
        """
        self.evaluates = True
        return self

    def train(self) -> Self:
        """Follow the calls' `training` again, after `eval`."""
        self.evaluates = False
        return self

    def _keep(self, buffers: Arrays) -> None:
        """Hold these buffers from now on; raises `UnsupportedError` for those of a transformation, which are nothing after it."""
        for array in buffers.values():
            autodiff = library(array).autodiff
            if autodiff is not None and autodiff.is_passing(array):
                raise UnsupportedError(
                    f"{type(self).__name__} took statistics inside a transformation (jit, vmap, scan, grad …), where it cannot keep them "
                    "as running statistics; use the pure form there, y, state, buffers = layer.apply(params, buffers, x, "
                    "training=True), return the buffers from the transformation, and hold them by layer.assign(params, buffers)"
                )
        self.buffers = buffers

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
        """Hold these parameters (and buffers) from now on, as they are: what an optimizer returns.

        Raises `CheckpointError` for a missing or unknown name or a shape that does not fit; the layer is then as it was.
        """
        self._check_given(params, self.buffers if buffers is None else buffers)
        self.params = dict(params)
        if buffers is not None:
            self.buffers = dict(buffers)

    def _names(self) -> tuple[Set[str], Set[str]]:
        """Those of the parameters and of the buffers."""
        return self.params.keys(), self.buffers.keys()

    def _check_given(self, params: Mapping[str, Array], buffers: Mapping[str, Array]) -> None:
        """Raise `CheckpointError` unless both mappings have the names and shapes of the layer's, and no others."""
        for what, given, own in zip(("`params`", "`buffers`"), (params, buffers), self._names(), strict=True):
            _check_names(what, self, own, given)
        self._check_shapes({**params, **buffers})
        for name, array in {**params, **buffers}.items():
            if is_longdouble(array.dtype):
                raise DTypeError(f"`{name}` has dtype {array.dtype}; expected {_called(self.xp, self.dtype)}, that of the layer")

    def check_fit(self) -> None:
        """Raise `CheckpointError` unless the arrays fit the attributes, as those of a layer do that was just made."""
        self._check_shapes(self.state_dict())

    def _check_shapes(self, arrays: Mapping[str, Array]) -> None:
        """Raise `CheckpointError` unless each array has the shape of the layer's of that name."""
        for name, own in self.state_dict().items():
            expected = self._shape_of(name, own)
            if name not in arrays:
                continue
            shape = getattr(arrays[name], "shape", None)
            if shape is None:
                raise CheckpointError(f"`{name}` is {arrays[name]!r}; expected an array of shape {expected}")
            if tuple(shape) != expected:
                raise CheckpointError(f"`{name}` has shape {tuple(shape)}; expected {expected}")

    def _shape_of(self, name: str, array: Array) -> tuple[int, ...]:
        """The shape that `array` of this name has to have."""
        return tuple(array.shape)

    def load_state_dict(self, arrays: Mapping[str, Array]) -> None:
        """Take the arrays of a state dict, of any library, in the layer's own library, device and dtype.

        Raises `CheckpointError` for a missing or unknown name or a shape that does not fit; the layer is then as it was.
        """
        _check_names("the state dict", self, self.state_dict().keys(), arrays)
        self._check_shapes(arrays)
        for name, array in arrays.items():
            namespace(**{name: array})
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
        require_dtype(xp, self.dtype, device)
        dtype_name(xp, self.dtype)
        self.assign(*({n: self._converted(a, like=a, statistic=kept) for n, a in group.items()} for group, kept in groups))

    def copy(self) -> Self:
        """A copy that shares the arrays but not the places that hold them."""
        other = copy.copy(self)
        other.params, other.buffers = dict(self.params), dict(self.buffers)
        return other

    def __getstate__(self) -> dict[str, Any]:
        """For `copy.deepcopy` and for other processes: the namespace goes by its name."""
        return {**self.__dict__, "xp": kept_name(self.xp), "dtype": dtype_name(self.xp, self.dtype)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({**state, "changes": str(next(_NUMBERS))})
        self.xp = load_namespace(state["xp"])
        self.dtype = load_dtype(self.xp, state["dtype"])

    def _converted(self, array: Array, like: Array, statistic: bool) -> Array:
        floating = is_kind(xp_of(like), like.dtype, "real floating")
        dtype = self._dtype_of(statistic) if floating else default_integer(self.xp)
        if xp_of(array) is not self.xp:
            return self.xp.asarray(numpy.array(to_numpy(array)), dtype=dtype, device=self.device)
        (array,) = _constant({"": self.xp.astype(array, dtype)}).values()
        return array if self.device is None else library(array).to_device(array, self.device)

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
        Nothing is dropped at random while the statistics are taken.
        """
        if self.evaluates:
            raise UnsupportedError(f"{type(self).__name__} evaluates since `eval` was called, and takes no statistics; call `train` first")
        pure = self.copy()
        pure.forget_statistics()
        buffers = {**pure.buffers, **pure._counters()}
        count = 0
        for batch in batches:
            given = batch if isinstance(batch, tuple) else (batch,)
            if not 1 <= len(given) <= 3:
                raise UnsupportedError(f"`batches` gave a tuple of {len(given)}; expected x, (x, lengths) or (x, lengths, state)")
            x, lengths, state = (*given, None, None)[:3]
            lengths = pure._checked(x, state, lengths)
            buffers = pure._applied(pure.params, buffers, x, state, lengths, True)[2]
            count += 1
        if not count:
            raise UnsupportedError("`batches` is empty; expected at least one batch to take statistics of")
        counted = [b for n, b in buffers.items() if VALUES in n]
        if counted and all(is_concrete(b) and not bool(xp_of(b).any(b > 0)) for b in counted):
            raise UnsupportedError(f"`batches` gave {count} without statistics; expected one at least in which two values of a kind count")
        self._keep({name: buffers[name] for name in self.buffers})

    def _counters(self) -> Arrays:
        """Buffers that count values where there are some that count batches."""
        counters = {n.replace(BATCHES, VALUES): b for n, b in self.buffers.items() if BATCHES in n}
        return {name: self._new(numpy.zeros(b.shape), statistic=True) for name, b in counters.items()}

    def forget_statistics(self) -> None:
        """Set running statistics to their start and let every batch from now on weigh the same."""

    def initial_state(self, batch: int, *, noise: float = 0.0, rng: int | Generator | None = None) -> Any:
        """The state before the first step; `None` for a layer that has none."""
        return None

    def random_shapes(self, steps: Any, batch: Any) -> dict[str, tuple[Any, ...]]:
        """The names and shapes of the numbers that a call in training on so many steps and sequences takes, as `rng` may give them.

        For a recurrent layer, whether it has `batch_first` or not: `dropout` (layers − 1, time, batch, directions × hidden),
        `recurrent_dropout` (layers × directions, batch, hidden), `zoneout` (layers × directions, time, batch, hidden). The time is that of
        the steps as a direction takes them, a reverse one from the end. Parts of a `Sequential` have their place in front: `0.dropout`.

        >>> import portnorm as pn
        >>> pn.LSTM(3, 4, num_layers=2, dropout=0.2, recurrent_dropout=0.1).random_shapes(steps=7, batch=5)
        {'dropout': (1, 7, 5, 4), 'recurrent_dropout': (2, 5, 4)}
        """
        return {name: draw.shape for name, draw in self.draws(steps, batch).items()}

    def draws(self, steps: Any, batch: Any) -> dict[str, Draw]:
        """`random_shapes` with the part that is dropped."""
        return {}

    def input_dims(self) -> tuple[int | str, ...]:
        """The shape of `x` with names for the lengths that vary, as the exporter needs it."""
        raise NotImplementedError

    @property
    def quantizes(self) -> QuantizeName | None:
        """How products of the layer, or of a layer inside it, are computed with integers, or `None` where none is."""
        return next((part.quantize for part in self.layers() if getattr(part, "quantize", None) is not None), None)  # type: ignore[attr-defined]

    def layers(self) -> Iterator[Layer]:
        """This layer and all layers inside it."""
        yield self

    def summary(self, input_shape: tuple[int, ...] | list[int] | None = None) -> Summary:
        """What the model is made of: layers, the shapes of their results, parameters and statistics; `print` shows a table.

        The shapes are those of a call on `input_shape`, such as (time, batch, features); without it axes whose length varies have names.
        A stack has a row for each direction too. Parts are called one after the other, in inference mode, on ones. Raises `ShapeError`
        for an `input_shape` that does not fit, `UnsupportedError` for what is none, or where a layer of one's own needs it.

        >>> import portnorm as pn
        >>> model = pn.Sequential(pn.Embedding(96, 16), pn.LSTM(16, 8, norm="layer", num_layers=2), pn.Linear(8, 3))
        >>> print(model.summary())
              layer       output             parameters  statistics
        ----  ----------  -----------------  ----------  ----------
        0     Embedding   (time, batch, 16)       1,536           0
        1     LSTM layer  (time, batch, 8)        1,632           0
          l0              (time, batch, 8)          944           0
          l1              (time, batch, 8)          688           0
        2     Linear      (time, batch, 3)           27           0
        ----  ----------  -----------------  ----------  ----------
              in all      12,780 bytes            3,195           0
        >>> model.summary((20, 4)).rows[-1].output
        (20, 4, 3)
        """
        return summarized(self, input_shape)

    def calls(self, x: Array, name: str) -> Calls:
        """The calls of this layer, or of those inside it, on `x`, under the name that stands before theirs. Returns the result."""
        try:
            result = self(x)
        except ShapeError as error:
            raise ShapeError(f"`input_shape` does not fit: {error}") from error
        y = result[0] if self.recurrent else result
        yield Call(name, self, tuple(x.shape), tuple(y.shape))
        return y

    @property
    def title(self) -> str:
        """What a summary calls it."""
        return type(self).__name__

    def inside_of(self, takes: Shape, gives: Shape) -> list[SummaryRow]:
        """Further rows of a summary, of the parts of a layer that takes and gives arrays of these shapes."""
        return []

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.config.items())})"


class StatelessLayer(Layer):
    """A layer whose call gives `y` alone."""

    if TYPE_CHECKING:

        def __call__(
            self, x: Array, state: None = None, lengths: Any = None, *, mask: Array | None = None, training: bool = False, rng: Any = None
        ) -> Array: ...

        def vjp(
            self, x: Array, state: None = None, lengths: Any = None, *, mask: Array | None = None, training: bool = False, rng: Any = None
        ) -> tuple[Array, Callable[[Array], tuple[Array | None, Arrays]]]: ...


def _check_names(what: str, layer: Layer, own: Set[str], given: Mapping[str, Array]) -> None:
    """Raise `CheckpointError` unless `given` has these names, and no others."""
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{what} is a {type(given).__name__}; expected a mapping of the names of {type(layer).__name__} to arrays")
    if {*given} != {*own}:  # sets, which paddle's to_static follows, unlike the keys of a dict
        missing, unknown = [n for n in sorted(own) if n not in given], [n for n in given if n not in own]
        raise CheckpointError(f"{what} does not fit {type(layer).__name__}: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}")


def _constant(arrays: Arrays) -> Arrays:
    """The same arrays, through which no library differentiates."""
    return {name: constant(array) for name, array in arrays.items()}


@dataclass(frozen=True)
class LayerFunction:
    """A layer as a function of its arrays that brings its own vjp: `portnorm.arrays.Differentiable`."""

    layer: Layer
    training: bool

    def __call__(self, *args: Any, **attrs: Any) -> Any:
        params, buffers, x, state, lengths, random = args
        return self.layer.forward(params, buffers, x, state, lengths, self.training, False, random)[:3]

    def forward(self, *args: Any, **attrs: Any) -> tuple[Any, Any]:
        params, buffers, x, state, lengths, random = args
        y, state, buffers, residuals = self.layer.forward(params, buffers, x, state, lengths, self.training, True, random)
        return (y, state, buffers), residuals

    def vjp(self, residuals: Any, cotangent: Any, /, **attrs: Any) -> tuple[Any, ...]:
        dy, dstate, _ = cotangent
        dx, dstate, grads = self.layer.backward(residuals, dy, dstate, self.training)
        return grads, None, dx, dstate


def _called(xp: Namespace, dtype: DType) -> str:
    """What a type is called, here or in its library."""
    try:
        return dtype_name(xp, dtype)
    except DTypeError:
        return str(dtype)


def checked_call(
    layer: Layer, params: Mapping[str, Array], dtype: DType | None, x: Array, state: Any, lengths: Any, mask: Array | None = None
) -> Counted:
    """`lengths` or `mask` as `forward` takes it, after the arguments were found to fit `layer` with these parameters, of this dtype or any.

    Raises `ShapeError`, `DTypeError`, `UnsupportedError`.
    """
    if not layer.recurrent and state is not None:
        raise UnsupportedError(f"`state` is given, but {type(layer).__name__} has none")
    own = next(iter(params.values()), None)
    xp = namespace(x=x) if own is None or x is None else namespace(parameters=own, x=x)
    if layer.recurrent:
        require_lengths(x=x)
    if layer.takes_integers:
        if not is_kind(xp, x.dtype, "integral"):
            raise DTypeError(f"`x` has dtype {x.dtype}; expected integers")
    elif dtype is not None and x.dtype != dtype:
        given, own = _called(xp, x.dtype), _called(xp, dtype)
        way_out = f"layer.to(dtype={given!r})" if is_kind(xp, x.dtype, "real floating") else "layer.to(dtype=...)"
        raise DTypeError(f"`x` has dtype {given} but the layer has {own}; convert `x` to {own}, or the layer with {way_out}")
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
    if not is_kind(xp, lengths.dtype, "integral"):
        raise DTypeError(f"`lengths` has dtype {lengths.dtype}; expected integers")
    if tuple(lengths.shape) != (batch,):
        raise ShapeError(f"`lengths` has shape {tuple(lengths.shape)}; expected ({batch},), one for each sequence of `x` {tuple(x.shape)}")
    if is_concrete(lengths) and batch:
        low, high = int(xp.min(lengths)), int(xp.max(lengths))
        if low < 0 or high > steps:
            raise ShapeError(f"`lengths` reach from {low} to {high}; expected 0 to {steps}, the number of steps of `x` {tuple(x.shape)}")
    return xp.astype(lengths, default_integer(xp))


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
