"""A layer as two pure functions, forward and backward, of the arrays that it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from portnorm.arrays import Array, Narrow, constant, library, namespace, xp_of
from portnorm.dtypes import require_floating
from portnorm.layers.randomness import Draw, uniform_numbers
from portnorm.padding import Counted, Mask, leading, mask_of, steps_of, valid, without_padding
from portnorm.scalars import switch, whole_number

Arrays = dict[str, Array]


class Every(NamedTuple):
    """Keep the states before every so many steps, from which the vjp computes the others again."""

    steps: int


Keep = bool | Every
"""What a forward pass keeps for a backward one: nothing, everything, or that."""


class Pure:
    """What a layer computes, whoever holds its arrays.

    A subclass gives `forward` and `backward`, and says by its attributes what is done around them.
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
    drops: bool = False
    """Whether a call in training drops values at random, and so takes `rng`."""

    def forward(
        self,
        params: Arrays,
        buffers: Arrays,
        x: Array,
        state: Any,
        lengths: Counted,
        training: bool,
        keep: Keep,
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
        random = self._drawn(params, x, training, rng)
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
        return y, state, constants(new) if training else buffers

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
        recompute: int | None = None,
    ) -> tuple[Array, Any, Arrays, Callable[..., tuple[Array | None, Any, Arrays]]]:
        """`(y, state, buffers, pullback)` with `dx, dstate, grads = pullback(dy, dstate)`: what `apply` computes, with its vjp.

        `recompute` as in `vjp`.
        """
        self._check_given(params, buffers)
        self._require_array(x)
        keep = kept_of(recompute)
        random = self._drawn(params, x, training, rng)
        return self._applied_vjp(params, buffers, x, state, lengths, training, random, keep)

    def _applied_vjp(
        self,
        params: Arrays,
        buffers: Arrays,
        x: Array,
        state: Any,
        lengths: Counted,
        training: bool,
        random: Arrays | None = None,
        keep: Keep = True,
    ) -> tuple[Array, Any, Arrays, Callable[..., tuple[Array | None, Any, Arrays]]]:
        training = self._trains(training)
        narrow = library(x).narrow
        if narrow is not None and self._is_widened(narrow, params, x, lengths):
            return self._narrowly_applied_vjp(narrow, params, buffers, x, state, lengths, training, random, keep)
        if lengths is not None:
            x = without_padding(x, self.valid(x, lengths))
        y, out, new, residuals = self.forward(params, buffers, x, state, lengths, training, keep, random)
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
        keep: Keep,
    ) -> tuple[Array, Any, Arrays, Callable[..., tuple[Array | None, Any, Arrays]]]:
        """`_applied_vjp` in the wider type, whose results and cotangents are rounded."""
        wide = narrow.wide
        y, out, new, widely = self._applied_vjp(wide(params), wide(buffers), wide(x), wide(state), lengths, training, random, keep)

        def pullback(dy: Array | None, dstate: Any = None) -> tuple[Array | None, Any, Arrays]:
            dx, dbefore, grads = widely(wide(dy), wide(dstate))
            of_arrays = {n: narrow.rounded(d) if narrow.holds(params[n]) else d for n, d in grads.items()}
            return narrow.rounded(dx) if narrow.holds(x) else dx, narrow.rounded(dbefore), of_arrays

        return narrow.rounded(y), narrow.rounded(out), new, pullback

    def _drawn(self, params: Arrays, x: Array, training: Any, rng: Any) -> Arrays | None:
        """The numbers that a call takes from `rng`; `None` where nothing is dropped."""
        return uniform_numbers(self, params, x, rng) if self._trains(training) and self.drops else None

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

    # -- randomness ------------------------------------------------------------------------------------------------------------------------

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

    def _check_given(self, params: Mapping[str, Array], buffers: Mapping[str, Array]) -> None:
        """Raise `CheckpointError` unless both mappings have the names and shapes of the layer's, and no others."""
        raise NotImplementedError


def kept_of(recompute: Any) -> Keep:
    """What a call with this `recompute` keeps; raises `UnsupportedError` for what is no number of steps."""
    return True if recompute is None else Every(whole_number("recompute", recompute, 1))


def constants(arrays: Arrays) -> Arrays:
    """The same arrays, through which no library differentiates."""
    return {name: constant(array) for name, array in arrays.items()}


@dataclass(frozen=True)
class LayerFunction:
    """A layer as a function of its arrays that brings its own vjp: `portnorm.arrays.Differentiable`."""

    layer: Pure
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
