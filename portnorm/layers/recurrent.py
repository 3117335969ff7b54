"""Recurrent layers: stacks of directions, with parameters named as torch names them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy

from portnorm.arrays import Array, DType, Namespace, namespace
from portnorm.cells.gru import GRUCell
from portnorm.cells.lstm import LSTMCell
from portnorm.cells.rnn import RNNCell
from portnorm.cells.variants import NormName, Variant, variant_of
from portnorm.errors import UnsupportedError
from portnorm.layers.again import again
from portnorm.layers.initial import HIDDEN, Generator, HiddenInit, Start, generator, initial_values
from portnorm.layers.layer import Layer
from portnorm.layers.names import with_suffix, without_suffix
from portnorm.layers.pure import Arrays
from portnorm.layers.stack import Stack
from portnorm.layers.state import is_of_one_cell, of_layers, of_one_cell
from portnorm.layers.summary import Shape, SummaryRow, count
from portnorm.norm.normalize import Reduce
from portnorm.quantization import QuantizeName, checked_quantize
from portnorm.scalars import choice, real_number, switch, whole_number
from portnorm.scan import State
from portnorm.statistics import checked_momentum

Way = Literal["forward", "reverse", "backwards"]
DIRECTIONS: tuple[str, ...] = get_args(Way)

_SIZES = ("input_size", "hidden_size", "norm", "num_layers", "bidirectional")
_RATES = ("dropout", "recurrent_dropout")
_FURTHER = ("t_max", "momentum", "proj_size", "learned_state", *_RATES, "quantize")
_SHAPES = 8
"""Of `x` for which what a step has settled is kept."""
_SETTINGS = (*_SIZES, "batch_first", "return_sequences", "direction", *_FURTHER)


class Recurrent(Stack):
    """What `LSTM`, `GRU` and `RNN` share: stacks, directions, states, running statistics.

    `x` is (time, batch, features), or (batch, time, features) with `batch_first`, in the layer's dtype. `y` likewise has
    directions × hidden features, or is (batch, directions × hidden), the h after each sequence's last step, with
    `return_sequences=False`. A state is a tuple of arrays (layers × directions, batch, hidden); where batch statistics belong to steps, the
    number of steps comes after them.

    Parameters are `weight_ih_l0`, `weight_hh_l0`, … as in torch; a reverse direction has the suffix `_reverse`.

    Arguments of a call, besides `x`:
      state: what the steps before have left; unless given it is 0, or what was learned.
      lengths: (batch,), the number of steps of each sequence. What follows is padding: it gives 0, and enters nothing.
      mask: (time, batch), or (batch, time) with `batch_first`: True for the steps that there are, wherever they lie. A masked step is none.
        It holds the state, and gives the result of the step before once more, or the state that came where there is none, but 0 with
        `bidirectional`. It is not counted among the steps that have statistics of their own. That is Keras' `Masking`, as `lengths` are
        torch's packed sequences.
      training: whether batch statistics are those of the batch, and whether values are dropped.
      rng: what draws the dropped values: a seed, a generator, a key of JAX, or the numbers.

    Arguments of the layer:
      norm: the name of a row of `portnorm.VARIANTS` or `portnorm.IMPLEMENTATIONS`, or a `portnorm.Variant`.
      return_sequences: whether `y` has all steps, or the last alone.
      direction: `"reverse"` goes from the last step to the first, with `y` in the order of `x` (ONNX); with `"backwards"` `y` has the last
        step of `x` first (Keras' `go_backwards`).
      t_max: how many steps have batch statistics of their own; later ones share the last.
      momentum: the weight of a new value in the running statistics; `None` is the plain average of all.
      forget_bias: in place of the variant's own. New weights are torch's for the plain cell; for the others orthogonal matrices, with the
        gain and the forget bias of the variant.
      hidden_init: another start of the hidden weights: `"uniform"`, `"orthogonal"` gate by gate, `"identity"` in every gate, or
        `"identity candidate"`, that of Cooijmans et al. 2016.
      proj_size: LSTM: the features of h, if they are to be fewer than those of c.
      learned_state: whether the state before the first step is learned: parameters `h0_l0`, `c0_l0`, … (hidden,), 0 at first, from which
        sequences start where no `state` is given.
      dropout: the part of the output of each layer but the last that is dropped in training, as in torch.
      recurrent_dropout: the part of h that is dropped in training where it enters the product with the hidden weights, the same in every
        step of a call (Gal & Ghahramani 2016). What is carried beside the product, as z ⊙ h in a GRU, is whole. What is kept is divided by
        1 − p.
      quantize: `"int8"` or `"int4"`: products of integers, as in `portnorm.quantized`.
      reduce: for batches that are parted among processes, as in `portnorm.batch_norm`; not saved with the layer. It sums an array over all
        processes, each of which calls with sequences of its own, perhaps none, padded to the same number of steps.
      xp: the library of the arrays, a module or its name. `device` and `dtype` are those of the parameters.
      rng: a seed or generator for the first weights.

    Where fewer than two sequences are left at a step, there is no variance: the step is normalized to the shift alone, and the running
    statistics of the step, and its count of batches, stay as they were; so do all of them after an empty batch.
    Raises `ShapeError` (also for batch normalization in training with one sequence), `DTypeError`, `UnsupportedError`.

    >>> import numpy as np, portnorm as pn
    >>> lstm = pn.LSTM(3, 4, num_layers=2, bidirectional=True, return_sequences=False, rng=0)
    >>> y, (h, c) = lstm(np.ones((7, 2, 3), dtype="float32"), lengths=[7, 5])
    >>> y.shape, h.shape
    ((2, 8), (4, 2, 4))
    """

    if TYPE_CHECKING:  # what that of `Layer` gives here

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
        ) -> tuple[Array, State, Callable[..., tuple[Array, State, Arrays]]]: ...

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        norm: NormName | Variant | None = None,
        num_layers: int = 1,
        bidirectional: bool = False,
        batch_first: bool = False,
        return_sequences: bool = True,
        direction: Way = "forward",
        t_max: int = 100,
        momentum: float | None = 0.1,
        forget_bias: float | None = None,
        hidden_init: HiddenInit | None = None,
        proj_size: int = 0,
        learned_state: bool = False,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        quantize: QuantizeName | None = None,
        reduce: Reduce | None = None,
        xp: Namespace | str | None = None,
        device: Any = None,
        dtype: DType = "float32",
        rng: int | Generator | None = None,
    ):
        flags = {"bidirectional": bidirectional, "batch_first": batch_first, "return_sequences": return_sequences}
        config: dict[str, Any] = {name: switch(name, value) for name, value in flags.items()}
        bidirectional = config["bidirectional"]
        if not isinstance(direction, str) or direction not in DIRECTIONS or (bidirectional and direction != "forward"):
            expected = "'forward', since `bidirectional` has both" if bidirectional else "'forward', 'reverse' or 'backwards'"
            raise UnsupportedError(f"`direction` is {direction!r}; expected {expected}")
        sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers, "t_max": t_max}
        config = {**{name: whole_number(name, value, 1) for name, value in sizes.items()}, **config}
        config |= {"direction": direction, "learned_state": switch("learned_state", learned_state)}
        config |= {"momentum": checked_momentum(momentum), "proj_size": whole_number("proj_size", proj_size)}
        if not 0 <= config["proj_size"] < config["hidden_size"] or (proj_size and not self.cell.projects):
            raise UnsupportedError(f"`proj_size` is {proj_size}; expected 0, or for the LSTM a number below `hidden_size` {hidden_size}")
        config["quantize"] = checked_quantize(quantize)
        rates = {"dropout": dropout, "recurrent_dropout": recurrent_dropout}
        config |= {name: real_number(name, p, 0.0, 1.0, "a number from 0 to 1") for name, p in rates.items()}
        if config["dropout"] and config["num_layers"] == 1:
            raise UnsupportedError(
                f"`dropout` is {config['dropout']:g}, which is between layers, but `num_layers` is 1; expected 0, or more layers "
                "(`recurrent_dropout` is inside a layer)"
            )
        super().__init__({name: config.get(name, norm) for name in _SETTINGS}, xp, device, dtype)
        if forget_bias is not None:
            if self.cell.forget_gate is None:
                raise UnsupportedError(f"`forget_bias` is {forget_bias}, but {type(self).__name__} has no forget gate")
            forget_bias = real_number("forget_bias", forget_bias, -math.inf, math.inf, "a number, or None")
        self.reduce = reduce
        choice("hidden_init", hidden_init, (None, *HIDDEN))
        if hidden_init is not None and self.variant.recurrence == "diagonal":
            raise UnsupportedError(
                f"`hidden_init` is {hidden_init!r}, but the variant's `recurrence` 'diagonal' has no hidden matrix; use None"
            )
        random = generator(rng)
        self._made, self._again, self._last_shape = None, {}, ()
        for suffix, inputs, place in self.places():
            start = Start(forget_bias, hidden_init, self.proj_size)
            values = initial_values(place.cells[0], inputs, self.hidden_size, self.t_max, start, random)
            self.params |= {with_suffix(name, suffix): self._new(v) for name, v in values}
            first = zip(self.learned, self.state_sizes(), strict=False)
            self.params |= {with_suffix(name, suffix): self._new(numpy.zeros(size)) for name, size in first}
        self._start_statistics()

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that make such a layer, without those that few layers have."""
        usual = {"direction": "forward", "learned_state": False, "dropout": 0.0, "recurrent_dropout": 0.0}
        return {name: value for name, value in super().config.items() if usual.get(name, self) != value}

    # -- changes ---------------------------------------------------------------------------------------------------------------------------

    @property
    def norm(self) -> NormName | Variant | None:
        """The name of the variant, or the variant itself where it is no row of the tables, or no longer the one that was named."""
        return self._norm if self._variant is self._named else self._variant

    @norm.setter
    def norm(self, norm: NormName | Variant | None) -> None:
        variant = variant_of(norm, type(self).__name__, self.cell.takes)
        if "params" in self.__dict__:
            self._check_arrays(variant)
        self._norm, self._variant, self._named = norm, variant, variant

    @property
    def variant(self) -> Variant:
        """The row of the cell's table that is computed. Another may be set, if it has the same parameters and statistics."""
        return self._variant

    @variant.setter
    def variant(self, variant: Variant) -> None:
        self.norm = variant

    def _check_arrays(self, variant: Variant) -> None:
        """Raise `UnsupportedError` where a variant has other parameters or statistics than those that are there."""
        own, other = (self._small(v) for v in (self._variant, variant))
        if own != other:
            new, gone = [n for n in other if other[n] != own.get(n)], [n for n in own if n not in other]
            raise UnsupportedError(
                f"`norm` is {variant!r}, which computes with {', '.join(new) or 'less'} and has no place for "
                f"{', '.join(gone) or 'nothing'}; make a new {type(self).__name__} of it"
            )

    def _small(self, variant: Variant) -> dict[str, tuple[int, ...]]:
        """The shapes of a small layer's arrays."""
        layer = type(self)(1, 2, norm=variant, bidirectional=self.bidirectional, proj_size=1 if self.proj_size else 0)
        return {name: tuple(a.shape) for name, a in layer.state_dict().items()}

    def _setting(self, name: str, value: Any) -> Any:
        if name == "norm":  # which looks at it itself
            return value
        if name == "t_max":  # the statistics of so many steps may be assigned next
            return whole_number(name, value, 1)
        if name in ("input_size", "hidden_size", "proj_size") and whole_number(name, value) != getattr(self, name):
            raise UnsupportedError(
                f"`{name}` is {value!r}, but the arrays of the {type(self).__name__} are of {getattr(self, name)}; make a new one"
            )
        return super()._setting(name, value)

    def _made_of(self, config: dict[str, Any]) -> tuple[Layer, dict[str, tuple[int, ...]]]:
        """A small layer, since its sizes are not what is changed."""
        small = {"input_size": 1, "hidden_size": 2, "proj_size": 1 if config["proj_size"] else 0, "t_max": 1, "norm": self._variant}
        return super()._made_of({**config, **small})

    def resize(self, sizes: Mapping[str, int]) -> None:
        """Compute with arrays of other sizes than the layer's own: for the pure form alone, which is given them."""
        self.__dict__.update(sizes)
        self._made = None

    # -- statistics ------------------------------------------------------------------------------------------------------------------------

    def _start_statistics(self) -> None:
        if self.variant.norm != "batch":
            return
        rows = (self.t_max,) if self.timed else ()
        for suffix, _, direction in self.places():
            cell = direction.cells[0]
            for slot in cell.names():
                shape = (*rows, cell.width(slot) * self.hidden_size)
                self.buffers[f"{slot}{suffix}.running_mean"] = self._new(numpy.zeros(shape), statistic=True)
                self.buffers[f"{slot}{suffix}.running_var"] = self._new(numpy.ones(shape), statistic=True)
            self.buffers[f"num_batches_tracked{suffix}"] = self._new(numpy.zeros(rows, dtype=int), integer=True)

    def forget_statistics(self) -> None:
        self.momentum = None
        self._start_statistics()

    def input_dims(self) -> tuple[int | str, ...]:
        return ("batch", "time", self.input_size) if self.batch_first else ("time", "batch", self.input_size)

    @property
    def title(self) -> str:
        """What a summary calls it: its class and variant."""
        norm = self.norm.source if isinstance(self.norm, Variant) else self.norm
        return type(self).__name__ if norm is None else f"{type(self).__name__} {norm}"

    def inside_of(self, takes: Shape, gives: Shape) -> list[SummaryRow]:
        """Of a stack, each direction of each layer."""
        rows = []
        for k, (suffix, _, _) in enumerate(self.places()):
            last = k // self.num_directions == self.num_layers - 1
            own = count(without_suffix(self.params, suffix)), count(without_suffix(self.buffers, suffix))
            output = (*(gives[:-1] if last else takes[:-1]), self.output_size)
            rows.append(SummaryRow(f"  {suffix.removeprefix('_')}", "", output, *own, inside=True))
        return rows if len(rows) > 1 else []

    # -- calls -----------------------------------------------------------------------------------------------------------------------------

    def __call__(
        self, x: Array, state: Any = None, lengths: Any = None, *, mask: Array | None = None, training: bool = False, rng: Any = None
    ) -> tuple[Array, State]:
        """`(y, state)`; see `Layer` and the arguments of a call above."""
        if type(x) is not numpy.ndarray or lengths is not None or mask is not None or training is not False:
            called: tuple[Array, State] = super().__call__(x, state, lengths, mask=mask, training=training, rng=rng)
            return called
        found = self._called_again(x, state)
        if found is None:
            found = super().__call__(x, state)
            self._note(x, found[1])
        return found

    def _called_again(self, x: Array, state: Any, *, step: bool = False) -> tuple[Array, State] | None:
        """The call by what earlier ones have settled; `None` where they have not."""
        known = self._again.get(x.shape)
        return None if known is None else known(self, x, state, step)

    def _note(self, x: Array, state: State) -> None:
        """Keep what computes such a call, with this state after it, once there was one of its shape before; and nothing that is of arrays
        which the layer has no longer.
        """
        kept = {shape: a for shape, a in self._again.items() if a.holds(self)} if len(self._again) < _SHAPES else {}
        made = again(self, x, state) if self._last_shape == x.shape else None
        self._again, self._last_shape = kept if made is None else {**kept, x.shape: made}, x.shape

    # -- step by step ----------------------------------------------------------------------------------------------------------------------

    def step(self, x: Array, state: Any = None) -> tuple[Array, State]:
        """One time step for streaming: `x` (batch, features) to `(h, state)`; step by step equals the whole sequence.

        A layer alone takes (batch, hidden) for each state too, and then gives that. Under `jax.jit` a step is a pure function of `x` and
        `state`; `apply` is one of the parameters too.

        >>> import numpy as np, portnorm as pn
        >>> lstm = pn.LSTM(3, 4, norm="layer", rng=0)
        >>> state = (np.zeros((2, 4), "float32"), np.zeros((2, 4), "float32"))
        >>> h, (h_n, c_n) = lstm.step(np.ones((2, 3), "float32"), state)
        >>> h.shape, c_n.shape
        ((2, 4), (2, 4))
        """
        found, first = None, self.batch_first
        if type(x) is numpy.ndarray and x.ndim == 2:
            found = self._called_again(x[:, None] if first else x[None], state, step=True)
        if found is None:
            self.check_goes_forward()
            namespace(x=x)
            states = len(self.cell.states)
            alone = state is not None and self.num_layers == 1 and is_of_one_cell(state, states)
            y, after = self(x[:, None, ...] if first else x[None, ...], of_layers(state, states) if alone else state)
            found = y, of_one_cell(after, states) if alone else after
        y, after = found
        return (y if not self.return_sequences else y[:, 0, ...] if first else y[0, ...]), after

    def check_goes_forward(self) -> None:
        """Raise `UnsupportedError` where it cannot go step by step."""
        if self.goes_back:
            who = "a bidirectional layer" if self.num_directions == 2 else f"a layer with direction={self.direction!r}"
            raise UnsupportedError(f"{who} cannot go step by step; it starts at the end")

    def initial_state(self, batch: int, *, noise: float = 0.0, rng: int | Generator | None = None) -> State:
        """The state before the first step for `batch` sequences: zeros, or what was learned; with `noise` h has N(0, noise²) added.

        Noise is for training with batch normalization, where Cooijmans et al. 2016 use 0.1: without it, steps at which all sequences are
        still alike have variance 0, and what follows amplifies rounding by γ/√eps per step.
        """
        batch = whole_number("batch", batch, 0)
        noise = real_number("noise", noise, 0.0, math.inf, "a number ≥ 0")
        first, *others = ((self.num_layers * self.num_directions, batch, size) for size in self.state_sizes())
        h = generator(rng).standard_normal(first) * noise if noise else numpy.zeros(first)
        time = (self._new(0, integer=True),) if self.timed else ()
        states = (self._new(h), *(self._new(numpy.zeros(shape)) for shape in others))
        if self.learned:
            learned = [self.xp.stack([self.params[with_suffix(name, suffix)] for suffix, _, _ in self.places()]) for name in self.learned]
            states = tuple(state + start[:, None, :] for state, start in zip(states, learned, strict=True))
        return (*states, *time)

    def _shape_of(self, name: str, array: Array) -> tuple[int, ...]:
        """Where steps have statistics of their own, `t_max` says how many, and it may have been changed."""
        rows = self.timed and name in self.buffers
        return (self.t_max, *array.shape[1:]) if rows else tuple(array.shape)


class LSTM(Recurrent):
    """Long short-term memory, plain or normalized, with a projection of the output to `proj_size` where that is given (Sak et al. 2014).

    (i, f, g, o) = N_ih(x W_ihᵀ) + N_hh(h W_hhᵀ) + b;  c ← σ(f) ⊙ c + σ(i) ⊙ tanh(g);  h ← σ(o) ⊙ tanh(N_c(c))

    `norm`: `None` is torch.nn.LSTM and ONNX LSTM, `"layer"` Ba et al. 2016, `"layer-gates"` and `"layer-state"` those of TensorFlow and
    fastrnns, `"batch"` Cooijmans et al. 2016. The state is `(h, c)`, with `norm="batch"` `(h, c, time)`. Gates are stored in the order
    i, f, g, o. Arguments, shapes and errors: see `Recurrent`.

    >>> import numpy as np, portnorm as pn
    >>> lstm = pn.LSTM(3, 4, norm="layer", rng=0)
    >>> y, (h, c) = lstm(np.ones((7, 2, 3), dtype="float32"))
    >>> y.shape, h.shape, bool((y[-1] == h[0]).all())
    ((7, 2, 4), (1, 2, 4), True)
    """

    cell = LSTMCell


class GRU(Recurrent):
    """Gated recurrent unit, plain or normalized, with the reset gate after the hidden matrix product, or before it by a `Variant`.

    (r, z, n) = split of u = N_ih(x W_ihᵀ) + b_ih and a = N_hh(h W_hhᵀ) + b_hh;  r = σ(u_r + a_r), z = σ(u_z + a_z),
    n = tanh(u_n + r ⊙ a_n);  h ← (1 − z) ⊙ n + z ⊙ h

    `norm`: `None` is torch.nn.GRU, `"layer"` Ba et al. 2016 (gates together, candidate apart), `"batch"` normalizes both terms per step.
    The state is `(h,)`, with `norm="batch"` `(h, time)`. Gates are stored in the order r, z, n. See `Recurrent`.

    >>> import numpy as np, portnorm as pn
    >>> y, (h,) = pn.GRU(3, 4, norm="layer", rng=0)(np.ones((7, 2, 3), dtype="float32"))
    >>> y.shape, h.shape
    ((7, 2, 4), (1, 2, 4))
    """

    cell = GRUCell


class RNN(Recurrent):
    """Simple recurrent network with tanh, plain or normalized:  h ← tanh(N_ih(x W_ihᵀ) + N_hh(h W_hhᵀ) + b).

    `norm`: `None` is torch.nn.RNN, `"layer"` Ba et al. 2016, equation 4 (one normalizer on the sum), `"batch"` normalizes both terms per
    step. The state is `(h,)`, with `norm="batch"` `(h, time)`. See `Recurrent`.

    >>> import numpy as np, portnorm as pn
    >>> y, (h,) = pn.RNN(3, 4, rng=0)(np.ones((7, 2, 3), dtype="float32"))
    >>> y.shape, h.shape
    ((7, 2, 4), (1, 2, 4))
    """

    cell = RNNCell


def recurrent_parts(model: Layer) -> list[Recurrent]:
    """The recurrent layers of a model, in order."""
    return [layer for layer in model.layers() if isinstance(layer, Recurrent)]
