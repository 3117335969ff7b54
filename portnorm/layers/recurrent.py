"""Recurrent layers: stacks of directions, with parameters named as torch names them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy

from portnorm.arrays import Array, DType, Namespace, device_of, is_concrete, namespace, require_given, xp_of
from portnorm.cells.cell import RecurrentCell
from portnorm.cells.gru import GRUCell
from portnorm.cells.lstm import LSTMCell
from portnorm.cells.rnn import RNNCell
from portnorm.cells.variants import NormName, Variant, variant_of
from portnorm.dropout import dropout
from portnorm.dtypes import default_integer
from portnorm.errors import DTypeError, ShapeError, UnsupportedError
from portnorm.layers.initial import HIDDEN, Generator, HiddenInit, Start, generator, initial_values
from portnorm.layers.layer import Arrays, Layer
from portnorm.layers.names import in_direction, with_suffix, without_suffix
from portnorm.layers.randomness import Draw, Drawn
from portnorm.layers.state import PlacedState, checked_time
from portnorm.layers.summary import Shape, SummaryRow, count
from portnorm.norm.normalize import Reduce
from portnorm.padding import Counted, Mask, are_in_front, pack_steps, unpack_steps
from portnorm.quantization import QuantizeName, checked_quantize
from portnorm.recurrent import Direction, RecurrentResiduals
from portnorm.scalars import real_number, switch, whole_number
from portnorm.scan import State, reverse_sequences
from portnorm.statistics import checked_momentum
from portnorm.sums import total_like

Way = Literal["forward", "reverse", "backwards"]
DIRECTIONS: tuple[str, ...] = get_args(Way)

_SIZES = ("input_size", "hidden_size", "norm", "num_layers", "bidirectional")
_RATES = ("dropout", "recurrent_dropout")
_FURTHER = ("t_max", "momentum", "proj_size", "learned_state", *_RATES, "quantize")
_SETTINGS = (*_SIZES, "batch_first", "return_sequences", "direction", *_FURTHER)


_H_BOUND = 1.0 + 2.0**-7
"""The largest |h| that may come where |h| ≤ 1 is taken for granted: so much is rounding in the narrowest type."""


class StackResiduals(NamedTuple):
    """What the vjp of a stack needs: per layer and direction, and the shapes that the cotangent of a missing state takes."""

    directions: list[RecurrentResiduals]
    last: tuple[Array, ...]
    learned: Array | None  # the learned h where the layer started from it
    mask: Array | None  # (time, batch), where one was given
    packed: bool  # whether its steps had to be moved to the front
    kept: tuple[Array, ...]  # after each layer but the last, what dropout keeps
    dropout: float


class Recurrent(Layer):
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

    if TYPE_CHECKING:  # what a call of `Layer` gives here

        def __call__(
            self, x: Array, state: Any = None, lengths: Any = None, *, mask: Array | None = None, training: bool = False, rng: Any = None
        ) -> tuple[Array, State]: ...

        def vjp(
            self, x: Array, state: Any = None, lengths: Any = None, *, mask: Array | None = None, training: bool = False, rng: Any = None
        ) -> tuple[Array, State, Callable[..., tuple[Array, State, Arrays]]]: ...

    cell: type[RecurrentCell]

    recurrent = True
    orders_axes = True
    masks = True

    input_size: int
    hidden_size: int
    num_layers: int
    bidirectional: bool
    return_sequences: bool
    t_max: int
    momentum: float | None
    proj_size: int
    direction: Literal["forward", "reverse", "backwards"]
    learned_state: bool
    dropout: float
    recurrent_dropout: float
    quantize: QuantizeName | None

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
        if direction not in DIRECTIONS or (bidirectional and direction != "forward"):
            expected = "'forward', since `bidirectional` has both" if bidirectional else "'forward', 'reverse' or 'backwards'"
            raise UnsupportedError(f"`direction` is {direction!r}; expected {expected}")
        sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers, "t_max": t_max}
        config: dict[str, Any] = {name: whole_number(name, value, 1) for name, value in sizes.items()}
        flags = {"bidirectional": bidirectional, "batch_first": batch_first, "return_sequences": return_sequences}
        config |= {name: switch(name, value) for name, value in flags.items()}
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
        if hidden_init not in (None, *HIDDEN):
            raise UnsupportedError(f"`hidden_init` is {hidden_init!r}; expected one of {', '.join(map(repr, HIDDEN))}, or None")
        if hidden_init is not None and self.variant.recurrence == "diagonal":
            raise UnsupportedError(
                f"`hidden_init` is {hidden_init!r}, but the variant's `recurrence` 'diagonal' has no hidden matrix; use None"
            )
        random = generator(rng)
        self._made: tuple[Any, tuple[tuple[str, int, Direction], ...]] | None = None
        for suffix, inputs, place in self._places():
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

    @property
    def learned(self) -> tuple[str, ...]:
        """The names of the learned first states inside one direction."""
        return tuple(f"{name}0" for name in self.cell.states) if self.learned_state else ()

    # -- what it is made of --------------------------------------------------------------------------------------------------------

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

    def _small(self, variant: Variant) -> dict[str, tuple[int, ...]]:
        """The shapes of a small layer's arrays."""
        layer = type(self)(1, 2, norm=variant, bidirectional=self.bidirectional, proj_size=1 if self.proj_size else 0)
        return {name: tuple(a.shape) for name, a in layer.state_dict().items()}

    @property
    def timed(self) -> bool:
        """Whether running statistics belong to time steps, which a state then counts."""
        return self._variant.timed

    @property
    def keeps_time(self) -> bool:
        """Whether the result still has the time axis that the input had."""
        return self.return_sequences

    @keeps_time.setter
    def keeps_time(self, keeps_time: bool) -> None:
        self.return_sequences = keeps_time

    @property
    def turns_time(self) -> bool:  # type: ignore[override]
        """Whether the result has the last step of the input first."""
        return self.direction == "backwards"

    @property
    def num_directions(self) -> int:
        """2 where it goes in both directions."""
        return 2 if self.bidirectional else 1

    @property
    def output_size(self) -> int:
        """The features of the output of one direction."""
        return self.proj_size or self.hidden_size

    # -- where things are ----------------------------------------------------------------------------------------------------------

    def _places(self) -> tuple[tuple[str, int, Direction], ...]:
        """(suffix of the names, input features, direction) of every layer and direction, in the order of the state's first axis.

        Made when they are first asked for, and again when an attribute that they depend on was changed.
        """
        depends = self.variant, self.t_max, self.keeps_time, self.reduce, self.direction, self.quantize
        if self._made is None or self._made[0] != depends:
            self._made = depends, tuple(self._new_places())
        return self._made[1]

    def _new_places(self) -> Iterator[tuple[str, int, Direction]]:
        usual = self.cell(self.variant, False, self.reduce, self.quantize, 1.0 if self._bounds_h else None)
        cells = usual, dataclasses.replace(usual, training=True)
        zoned = dataclasses.replace(cells[1], draws_zoneout=True) if self.variant.zoneout else cells[1]
        for layer in range(self.num_layers):
            inputs = self.input_size if layer == 0 else self.num_directions * self.output_size
            sequences = self.keeps_time or layer < self.num_layers - 1
            backwards = self.direction == "backwards" and layer == self.num_layers - 1
            for second in (False, True)[: self.num_directions]:
                suffix, reverse = in_direction("", layer, second), second or self.direction != "forward"
                yield suffix, inputs, Direction((*cells, zoned), self.hidden_size, self.t_max, reverse, sequences, backwards)

    @property
    def _bounds_h(self) -> bool:
        """Whether products of integers take |h| ≤ 1 for granted."""
        return self.quantize == "int8" and self.cell.bounds_h(self.variant) and not self.proj_size and not self.learned_state

    def _start_statistics(self) -> None:
        if self.variant.norm != "batch":
            return
        rows = (self.t_max,) if self.timed else ()
        for suffix, _, direction in self._places():
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
        for k, (suffix, _, _) in enumerate(self._places()):
            last = k // self.num_directions == self.num_layers - 1
            own = count(without_suffix(self.params, suffix)), count(without_suffix(self.buffers, suffix))
            output = (*(gives[:-1] if last else takes[:-1]), self.output_size)
            rows.append(SummaryRow(f"  {suffix.removeprefix('_')}", "", output, *own, inside=True))
        return rows if len(rows) > 1 else []

    # -- forward and backward ------------------------------------------------------------------------------------------------------

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
        self._check_input(x, training)
        if lengths is not None and self.variant.norm in ("layer", "rms") and self.variant.eps == 0:
            raise UnsupportedError("`lengths` or `mask` with eps = 0: padding has no spread that could be divided by; use a small `eps`")
        xp = xp_of(x)
        if self.batch_first:
            x = xp.permute_dims(x, (1, 0, 2))
        mask, packed = None, False
        if isinstance(lengths, Mask):
            mask = self._steps(x, lengths)
            lengths, packed = _counted(mask), not are_in_front(mask)
            x = pack_steps(x, mask) if packed else x
        states, time = state if isinstance(state, PlacedState) else self._placed(buffers, x, state)
        learned = params[with_suffix(self.learned[0], "_l0")] if self.learned and states is None else None
        states = self._starts(params, x) if states is None else states
        steps, residuals, last, new_buffers, directions = x.shape[0], [], [], {}, []
        drawn = Drawn.of(random, self.draws(*x.shape[:2]), x) if random and training else None
        for k, (suffix, _, direction) in enumerate(self._places()):
            own, kept = without_suffix(params, suffix), without_suffix(buffers, suffix)
            for name in self.learned:
                del own[name]
            masks = {} if drawn is None else drawn.of_place(k)
            y, after, buffered, residual = direction.forward(
                own, kept, x, states[k], time=time, lengths=lengths, training=training, keep=keep, momentum=self.momentum, **masks
            )
            if residual is not None:
                residuals.append(residual)
            last.append(after)
            new_buffers.update({with_suffix(name, suffix): a for name, a in buffered.items()})
            if mask is not None and k >= (self.num_layers - 1) * self.num_directions:
                y = self._shown(y, mask, lengths, states[k][0])
            directions.append(y)
            if len(directions) == self.num_directions:
                x = directions[0] if self.num_directions == 1 else xp.concat(directions, axis=-1)
                if drawn is not None and k // self.num_directions < len(drawn.between):
                    x = dropout(x, drawn.between[k // self.num_directions], p=self.dropout)
                directions = []
        y = xp.permute_dims(x, (1, 0, 2)) if self.batch_first and self.keeps_time else x
        fresh = len(last) == 1 and self.keeps_time and isinstance(steps, int) and steps > 0  # else it may be `y`, or the state that came
        out = tuple(parts[0][None, ...] if fresh else xp.stack(parts) for parts in zip(*last, strict=True))
        return (
            y,
            (*out, time + steps) if self.timed else out,
            new_buffers,
            StackResiduals(residuals, out, learned, mask, packed, () if drawn is None else drawn.between, self.dropout),
        )

    def backward(self, residuals: Any, dy: Array | None, dstate: Any, training: bool) -> tuple[Array, Any, Arrays]:
        xp, mask = xp_of(residuals.last[0]), residuals.mask
        if self.batch_first and self.keeps_time and dy is not None:
            dy = xp.permute_dims(dy, (1, 0, 2))
        dlast = self._checked_cotangents(residuals.last, dstate)
        places = list(enumerate(self._places()))
        dfirst: list[Any] = [None] * len(places)
        grads: Arrays = {}
        for layer in reversed(range(self.num_layers)):
            dx = None
            for side in range(self.num_directions):
                k, (suffix, _, direction) = places[layer * self.num_directions + side]
                own = None if dy is None else dy[..., side * self.output_size : (side + 1) * self.output_size]
                before = None
                if mask is not None and own is not None and layer == self.num_layers - 1:
                    own, before = self._shown_vjp(own, mask, _counted(mask))
                d, dfirst[k], shares = direction.vjp(residuals.directions[k], own, tuple(s[k, ...] for s in dlast), training=training)
                dfirst[k] = dfirst[k] if before is None else (dfirst[k][0] + before, *dfirst[k][1:])
                dx = d if dx is None else dx + d
                grads.update({with_suffix(name, suffix): g for name, g in shares.items()})
            dy = dx if layer == 0 or not residuals.kept else dropout.vjp(residuals.kept[layer - 1], dx, p=residuals.dropout)[0]
        for k, (suffix, _, _) in places:
            for name, d in zip(self.learned, dfirst[k], strict=False):
                total = total_like(d, (0,))
                grads[with_suffix(name, suffix)] = xp.zeros_like(total) if residuals.learned is None else total
        if residuals.packed:
            dy = pack_steps.vjp(mask, dy)[0]
        dx = xp.permute_dims(dy, (1, 0, 2)) if self.batch_first else dy
        return dx, tuple(xp.stack(parts) for parts in zip(*dfirst, strict=True)), {name: grads[name] for name in self.params}

    def _steps(self, x: Array, counted: Mask) -> Array:
        """A mask as (time, batch), that of `x` (time, batch, features)."""
        xp, mask = xp_of(x), counted.values
        if counted.axes != (0, 1):
            raise ShapeError(
                f"`mask` {tuple(mask.shape)} lies along the axes {counted.axes} of the input; expected the first two for a recurrent layer"
            )
        mask = xp.permute_dims(mask, (1, 0)) if self.batch_first else mask
        return mask if tuple(mask.shape) == tuple(x.shape[:2]) else xp.broadcast_to(mask, x.shape[:2])

    def _shown(self, y: Array, mask: Array, lengths: Array, first: Array) -> Array:
        """As Keras has it, the last result again where a step is left out, or `first`, and 0 beside another direction."""
        if not self.keeps_time:
            return y
        if self.num_directions == 2:
            return _where(mask[:, :, None], unpack_steps(y, mask, first))
        if self.direction == "forward":
            return unpack_steps(y, mask, first)
        xp = xp_of(y)
        y = unpack_steps(y if self.direction == "backwards" else reverse_sequences(y, lengths), xp.flip(mask, axis=0), first)
        return y if self.direction == "backwards" else xp.flip(y, axis=0)

    def _shown_vjp(self, dy: Array, mask: Array, lengths: Array) -> tuple[Array, Array | None]:
        """The cotangents of what the direction computed, and of the state before its first step where that is seen."""
        if not self.keeps_time:
            return dy, None
        if self.num_directions == 2:
            return pack_steps(_where(mask[:, :, None], dy), mask), None
        xp = xp_of(dy)
        if self.direction != "forward":
            mask = xp.flip(mask, axis=0)
        dy, _, before = unpack_steps.vjp(mask, xp.flip(dy, axis=0) if self.direction == "reverse" else dy)
        return reverse_sequences(dy, lengths) if self.direction == "reverse" else dy, before

    @property
    def goes_back(self) -> bool:
        """Whether it, or one of its directions, starts at the last step."""
        return self.num_directions == 2 or self.direction != "forward"

    def _checked_cotangents(self, last: tuple[Array, ...], dstate: Any) -> tuple[Array, ...]:
        """The cotangent of each state, 0 where there is none; `dstate` is nested as the state is, with or without one of its time."""
        xp, count = xp_of(last[0]), len(last)
        given = (None,) * count if dstate is None else dstate
        if not isinstance(given, tuple | list) or len(given) not in (count, count + self.timed):
            raise ShapeError(f"`dstate` is {type(given).__name__} of {getattr(given, '__len__', lambda: 'no')()} parts; expected {count}")
        for name, s, d in zip(self.cell.states, last, given, strict=False):
            if d is not None and tuple(d.shape) != tuple(s.shape):
                raise ShapeError(f"`dstate` has {name} of shape {tuple(d.shape)}; expected {tuple(s.shape)}, that of the state")
        return tuple(xp.zeros_like(s) if d is None else d for s, d in zip(last, given, strict=False))

    def step(self, x: Array, state: Any = None) -> tuple[Array, State]:
        """One time step for streaming: `x` (batch, features) to `(h, state)`; step by step equals the whole sequence."""
        self.check_goes_forward()
        xp = xp_of(x)
        y, state = self(xp.expand_dims(x, axis=1 if self.batch_first else 0), state)
        return (xp.squeeze(y, axis=1 if self.batch_first else 0) if self.keeps_time else y), state

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
        noise = real_number("noise", noise, 0.0, math.inf, "a number ≥ 0")
        first, *others = ((self.num_layers * self.num_directions, batch, size) for size in self.state_sizes())
        h = generator(rng).standard_normal(first) * noise if noise else numpy.zeros(first)
        time = (self._new(0, integer=True),) if self.timed else ()
        states = (self._new(h), *(self._new(numpy.zeros(shape)) for shape in others))
        if self.learned:
            learned = [self.xp.stack([self.params[with_suffix(name, suffix)] for suffix, _, _ in self._places()]) for name in self.learned]
            states = tuple(state + start[:, None, :] for state, start in zip(states, learned, strict=True))
        return (*states, *time)

    @property
    def drops(self) -> bool:  # type: ignore[override]
        """Whether a call in training drops values at random: by `dropout`, `recurrent_dropout` or the variant's zoneout."""
        return bool(self.dropout or self.recurrent_dropout or self._variant.zoneout) and not self.evaluates

    def draws(self, steps: Any, batch: Any) -> dict[str, Draw]:
        if self.evaluates:
            return {}
        places, outputs = self.num_layers * self.num_directions, self.output_size
        every = {
            "dropout": Draw((self.num_layers - 1, steps, batch, self.num_directions * outputs), self.dropout),
            "recurrent_dropout": Draw((places, batch, outputs), self.recurrent_dropout),
            "zoneout": Draw((places, steps, batch, outputs), self._variant.zoneout),
        }
        return {name: draw for name, draw in every.items() if draw.p}

    def state_sizes(self) -> tuple[int, ...]:
        """The features of each state: those of the output, then the hidden ones."""
        return (self.output_size, *(self.hidden_size for _ in self.cell.states[1:]))

    def _placed(self, buffers: Arrays, x: Array, state: Any) -> PlacedState:
        xp, batch, names = xp_of(x), x.shape[1], (*self.cell.states, *(("time",) if self.timed else ()))
        places = self.num_layers * self.num_directions
        if state is None:
            return PlacedState(None, xp.zeros_like(buffers["num_batches_tracked_l0"][0]) if self.timed else None)
        if not isinstance(state, tuple | list) or len(state) != len(names):
            length = f" of length {len(state)}" if isinstance(state, tuple | list) else ""
            raise ShapeError(f"`state` is {type(state).__name__}{length}; expected ({', '.join(names)})")
        for name, array, size in zip(self.cell.states, state, self.state_sizes(), strict=False):
            expected = (places, batch, size)
            require_given(state=array)
            namespace(x=x, state=array)
            if tuple(array.shape) != expected:
                raise ShapeError(
                    f"`state` has {name} of shape {tuple(array.shape)}; expected (layers × directions, batch, hidden) = {expected}"
                )
            if name == "h" and self._bounds_h and is_concrete(array) and 0 not in array.shape and float(xp.max(xp.abs(array))) > _H_BOUND:
                raise UnsupportedError(
                    f"`state` has an h of up to {float(xp.max(xp.abs(array))):g}; expected at most 1, since `quantize` {self.quantize!r} "
                    "takes h for what the layer gives, which lies in (−1, 1)"
                )
            if array.dtype != x.dtype:
                raise DTypeError(f"`state` has {name} of dtype {array.dtype}; expected {x.dtype}, that of `x`")
        require_given(state=state[-1])
        split = [tuple(s[k, ...] for s in state[: len(self.cell.states)]) for k in range(places)]
        return PlacedState(split, checked_time(x, state[-1]) if self.timed else None)

    def _shape_of(self, name: str, array: Array) -> tuple[int, ...]:
        """Where steps have statistics of their own, `t_max` says how many, and it may have been changed."""
        rows = self.timed and name in self.buffers
        return (self.t_max, *array.shape[1:]) if rows else tuple(array.shape)

    def _starts(self, params: Arrays, x: Array) -> list[tuple[Array, ...]]:
        """The state before the first step of every layer and direction where none is given."""
        xp, places = xp_of(x), self._places()
        zeros = tuple(xp.zeros((x.shape[1], size), dtype=x.dtype, device=device_of(x)) for size in self.state_sizes())
        if not self.learned:
            return [zeros] * len(places)
        return [
            tuple(zero + params[with_suffix(name, suffix)][None, :] for zero, name in zip(zeros, self.learned, strict=True))
            for suffix, _, _ in places
        ]

    def _check_input(self, x: Array, training: bool) -> None:
        if x.ndim != 3 or x.shape[2] != self.input_size:
            order = "(batch, time, features)" if self.batch_first else "(time, batch, features)"
            raise ShapeError(f"`x` has shape {tuple(x.shape)}; expected {order} with {self.input_size} features")
        batch, steps = x.shape[:2] if self.batch_first else (x.shape[1], x.shape[0])
        if training and self.variant.norm == "batch" and self.reduce is not None:
            self._check_parts(x, batch, steps, self.reduce)
        elif training and self.variant.norm == "batch" and batch == 1 and (self.timed or steps == 1):
            what = "one sequence" if self.timed else "one frame"
            raise ShapeError(f"`x` {tuple(x.shape)} has {what}; batch normalization in training needs at least two")

    def _check_parts(self, x: Array, batch: int, steps: int, reduce: Reduce) -> None:
        """Raise `ShapeError`, in every process, unless all have as many steps, and two sequences in all: else some would wait for ever."""
        xp = xp_of(x)
        told = reduce(xp.asarray([1, steps, steps * steps, batch], dtype=default_integer(xp), device=device_of(x)))
        if not is_concrete(told):
            return
        processes, total, squares, sequences = (int(n) for n in told)
        if processes * squares != total * total:
            raise ShapeError(
                f"`x` {tuple(x.shape)} has {steps} steps, but {total / processes:g} is the average of the {processes} processes that "
                "`reduce` sums over; expected as many in each: pad `x`, and give `lengths`"
            )
        if sequences == 0 or (sequences == 1 and (self.timed or steps == 1)):
            what = "no sequence" if sequences == 0 else "one sequence" if self.timed else "one frame"
            raise ShapeError(
                f"`x` {tuple(x.shape)} has {what} in all {processes} processes that `reduce` sums over; batch normalization in training "
                "needs at least two"
            )


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


def _counted(mask: Array) -> Array:
    """(batch,): how many steps of each sequence a mask (time, batch) has."""
    xp = xp_of(mask)
    return xp.sum(xp.astype(mask, default_integer(xp)), axis=0)


def _where(there: Array, y: Array) -> Array:
    return xp_of(y).where(there, y, 0.0)


def recurrent_parts(model: Layer) -> list[Recurrent]:
    """The recurrent layers of a model, in order."""
    return [layer for layer in model.layers() if isinstance(layer, Recurrent)]
