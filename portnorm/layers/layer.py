"""What every layer is: two pure functions, forward and backward, and an object that holds their parameters and buffers."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import TYPE_CHECKING, Any, Self

import numpy

from portnorm.arrays import (
    Array,
    DType,
    Namespace,
    is_concrete,
    kept_name,
    library,
    load_namespace,
    namespace,
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
    statistics_dtype,
)
from portnorm.errors import CheckpointError, DTypeError, ShapeError, UnsupportedError
from portnorm.layers.arguments import called, check_names, checked_call
from portnorm.layers.initial import Generator
from portnorm.layers.pure import Arrays, Pure, constants, kept_of
from portnorm.layers.summary import Call, Calls, Shape, Summary, SummaryRow, summarized
from portnorm.op import require_cotangent
from portnorm.padding import Counted
from portnorm.quantization import QuantizeName
from portnorm.statistics import BATCHES, VALUES

_NUMBERS = itertools.count(1)
_WHERE = ("xp", "device", "dtype")
"""What all arrays of a layer have in common."""


class Layer(Pure):
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

    provenance: str = ""
    """Where the weights were imported from, and how that was recognised."""
    changes: str = "0"
    """Another text for every layer of this process, and after every change of an argument: whoever keeps something that was made of the
    configuration compares it. Not a number, of which `torch.compile` would think that the graph takes any."""
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
        elif name in _WHERE and name in self.__dict__:
            raise UnsupportedError(
                f"`{name}` is {value!r}, but the arrays of a layer stay what they are; to({name}=…) gives a copy with others"
            )
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
        params = self.params  # of a model they are put together anew each time
        lengths = checked_call(self, params, self.dtype, x, state, lengths, mask)
        random = self._drawn(params, x, training, rng)
        y, state, buffers = self._applied(params, self.buffers, x, state, lengths, training, random)
        if training:
            self._keep(buffers)
        return (y, state) if self.recurrent else y

    def vjp(
        self,
        x: Array,
        state: Any = None,
        lengths: Any = None,
        *,
        mask: Array | None = None,
        training: bool = False,
        rng: Any = None,
        recompute: int | None = None,
    ) -> Any:
        """`y, pullback` with `dx, grads = pullback(dy)`; recurrent: `y, state, pullback` with `dx, dstate, grads = pullback(dy, dstate)`.

        Either cotangent of a recurrent layer may be `None` for zero. `grads` has the names of `parameters()`.
        `recompute=k` saves memory: recurrent layers keep the state before every k-th step alone, and `pullback` computes the steps between
        again, bit by bit as they were. Some tens of steps are a good k.
        """
        lengths, keep = self._checked(x, state, lengths, mask), kept_of(recompute)
        random = self._drawn(self.params, x, training, rng)
        y, out, buffers, pure = self._applied_vjp(self.params, self.buffers, x, state, lengths, training, random, keep)
        if training and not self.evaluates:
            self._keep(constants(buffers))

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

        Raises `CheckpointError` for a missing or unknown name or a shape that does not fit, `DTypeError` for another dtype than the
        layer's, which `load_state_dict` converts; the layer is then as it was.
        """
        self._check_given(params, self.buffers if buffers is None else buffers)
        self._check_dtypes(params, buffers or {})
        self.params = dict(params)
        if buffers is not None:
            self.buffers = dict(buffers)

    def _names(self) -> tuple[Set[str], Set[str]]:
        """Those of the parameters and of the buffers."""
        return self.params.keys(), self.buffers.keys()

    def _check_given(self, params: Mapping[str, Array], buffers: Mapping[str, Array]) -> None:
        """Raise `CheckpointError` unless both mappings have the names and shapes of the layer's, and no others."""
        for what, given, own in zip(("`params`", "`buffers`"), (params, buffers), self._names(), strict=True):
            check_names(what, self, own, given)
        self._check_shapes({**params, **buffers})
        for name, array in {**params, **buffers}.items():
            if is_longdouble(array.dtype):
                raise DTypeError(f"`{name}` has dtype {array.dtype}; expected {called(self.xp, self.dtype)}, that of the layer")

    def _check_dtypes(self, params: Mapping[str, Array], buffers: Mapping[str, Array]) -> None:
        """Raise `DTypeError` unless the arrays are of the layer's dtype, its statistics of theirs, and its counters integers."""
        own = self.buffers if buffers else {}
        for group, statistic in ((params, False), (buffers, True)):
            expected = self._dtype_of(statistic)
            for name, array in group.items():
                if array.dtype == expected and name not in own:
                    continue
                xp, wanted = namespace(**{name: array}), called(self.xp, expected)
                if statistic and is_kind(xp_of(own[name]), own[name].dtype, "integral"):
                    fits, wanted = is_kind(xp, array.dtype, "integral"), "integers"
                else:
                    fits = called(xp, array.dtype) == wanted
                if not fits:
                    came = called(xp, array.dtype)
                    raise DTypeError(
                        f"`{name}` has dtype {came}; expected {wanted}, that of the layer; convert it, or give all arrays to "
                        f"`load_state_dict`, which does{_also(self.xp, came)}"
                    )

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
        check_names("the state dict", self, self.state_dict().keys(), arrays)
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
        self.__dict__.update(xp=xp, device=device, dtype=load_dtype(xp, dtype))
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
        xp = load_namespace(state["xp"])
        self.__dict__.update({**state, "xp": xp, "dtype": load_dtype(xp, state["dtype"]), "changes": str(next(_NUMBERS))})
        self.params = {name: a if library(a).stored is None else self._stored(a, a.dtype) for name, a in self.params.items()}

    def _converted(self, array: Array, like: Array, statistic: bool) -> Array:
        floating = is_kind(xp_of(like), like.dtype, "real floating")
        dtype = self._dtype_of(statistic) if floating else default_integer(self.xp)
        if xp_of(array) is not self.xp:
            array = to_numpy(array)
            if xp_of(array) is not self.xp:
                return self.xp.asarray(numpy.array(array), dtype=dtype, device=self.device)
        (array,) = constants({"": self._stored(array, dtype)}).values()
        return array if self.device is None else library(array).to_device(array, self.device)

    def _dtype_of(self, statistic: bool) -> DType:
        """That of the layer, and of its running statistics at least float32: else small changes of them, and large variances, were lost."""
        return statistics_dtype(self.xp, self.dtype) if statistic else self.dtype

    def _new(self, values: Any, *, integer: bool = False, statistic: bool = False) -> Array:
        """A new array of the layer's library, device and dtype."""
        dtype, array = default_integer(self.xp) if integer else self._dtype_of(statistic), numpy.asarray(values)
        return self._stored(array, dtype) if xp_of(array) is self.xp else self.xp.asarray(array, dtype=dtype, device=self.device)

    def _stored(self, array: Array, dtype: DType) -> Array:
        """A copy of an array of the layer's library in a type of it."""
        stored = library(array).stored
        return self.xp.astype(array, dtype) if stored is None else stored(array, dtype)

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
        if not hasattr(batches, "__iter__") or (hasattr(batches, "ndim") and not batches.ndim):
            raise UnsupportedError(
                f"`batches` is {batches!r}; expected a list of x, (x, lengths) or (x, lengths, state), or what yields them"
            )
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
            self,
            x: Array,
            state: None = None,
            lengths: Any = None,
            *,
            mask: Array | None = None,
            training: bool = False,
            rng: Any = None,
            recompute: int | None = None,
        ) -> tuple[Array, Callable[[Array], tuple[Array | None, Arrays]]]: ...


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _also(xp: Namespace, name: str) -> str:
    """How a layer takes arrays of this dtype, where it can be made of it."""
    return f"; layer.to(dtype={name!r}) takes it" if is_kind(xp, getattr(xp, name, xp.int64), "real floating") else ""
