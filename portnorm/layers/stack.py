"""A stack of directions: what it is made of, and its forward and backward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy

from portnorm.arrays import Array, device_of, is_concrete, namespace, require_given, seen, xp_of
from portnorm.cells.cell import RecurrentCell
from portnorm.cells.variants import Variant
from portnorm.dropout import dropout
from portnorm.dtypes import default_integer
from portnorm.errors import DTypeError, ShapeError, UnsupportedError
from portnorm.layers.again import Again
from portnorm.layers.layer import Layer
from portnorm.layers.names import in_direction, with_suffix, without_suffix
from portnorm.layers.pure import Arrays, Every, Keep
from portnorm.layers.randomness import Draw, Drawn
from portnorm.layers.state import H_BOUND, PlacedState, checked_time
from portnorm.norm.normalize import Reduce
from portnorm.padding import Counted, Mask, are_in_front, pack_steps, unpack_steps
from portnorm.quantization import QuantizeName
from portnorm.recurrent import Direction, RecurrentResiduals
from portnorm.scan import reverse_sequences
from portnorm.sums import total_like


class StackResiduals(NamedTuple):
    """What the vjp of a stack needs: per layer and direction, and the shapes that the cotangent of a missing state takes."""

    directions: list[RecurrentResiduals]
    last: tuple[Array, ...]
    learned: Array | None  # the learned h where the layer started from it
    mask: Array | None  # (time, batch), where one was given
    packed: bool  # whether its steps had to be moved to the front
    kept: tuple[Array, ...]  # after each layer but the last, what dropout keeps
    dropout: float


class Stack(Layer):
    """Layers of one or two directions, one upon the other. `Recurrent` makes them."""

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
    reduce: Reduce | None
    variant: Variant

    _made: tuple[Any, tuple[tuple[str, int, Direction], ...]] | None
    _again: dict[tuple[int, ...], Again]
    """What computes the next call, by the shape of its `x`."""
    _last_shape: tuple[int, ...]

    @property
    def timed(self) -> bool:
        """Whether running statistics belong to time steps, which a state then counts."""
        return self.variant.timed

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

    def state_sizes(self) -> tuple[int, ...]:
        """The features of each state: those of the output, then the hidden ones."""
        return (self.output_size,) + (self.hidden_size,) * (len(self.cell.states) - 1)

    @property
    def learned(self) -> tuple[str, ...]:
        """The names of the learned first states inside one direction."""
        return tuple(f"{name}0" for name in self.cell.states) if self.learned_state else ()

    @property
    def goes_back(self) -> bool:
        """Whether it, or one of its directions, starts at the last step."""
        return self.num_directions == 2 or self.direction != "forward"

    @property
    def drops(self) -> bool:  # type: ignore[override]
        """Whether a call in training drops values at random: by `dropout`, `recurrent_dropout` or the variant's zoneout."""
        return bool(self.dropout or self.recurrent_dropout or self.variant.zoneout) and not self.evaluates

    def draws(self, steps: Any, batch: Any) -> dict[str, Draw]:
        if self.evaluates:
            return {}
        places, outputs = self.num_layers * self.num_directions, self.output_size
        every = {
            "dropout": Draw((self.num_layers - 1, steps, batch, self.num_directions * outputs), self.dropout),
            "recurrent_dropout": Draw((places, batch, outputs), self.recurrent_dropout),
            "zoneout": Draw((places, steps, batch, outputs), self.variant.zoneout),
        }
        return {name: draw for name, draw in every.items() if draw.p}

    def __getstate__(self) -> dict[str, Any]:
        """A copy finds again what computes its steps."""
        return {**super().__getstate__(), "_again": {}}

    # -- where things are ------------------------------------------------------------------------------------------------------------------

    def places(self) -> tuple[tuple[str, int, Direction], ...]:
        """(suffix of the names, input features, direction) of every layer and direction, in the order of the state's first axis.

        Made when they are first asked for, and again when an attribute that they depend on was changed.
        """
        depends = self.variant, self.t_max, self.keeps_time, self.reduce, self.direction, self.quantize
        if self._made is None or self._made[0] != depends:
            self._made = depends, tuple(self._new_places())
        return self._made[1]

    def _new_places(self) -> Iterator[tuple[str, int, Direction]]:
        usual = self.cell(self.variant, False, self.reduce, self.quantize, 1.0 if self.bounds_h else None)
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
    def bounds_h(self) -> bool:
        """Whether products of integers take |h| ≤ 1 for granted."""
        return self.quantize == "int8" and self.cell.bounds_h(self.variant) and not self.proj_size and not self.learned_state

    # -- forward and backward --------------------------------------------------------------------------------------------------------------

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
        for k, (suffix, _, direction) in enumerate(self.places()):
            own, kept = without_suffix(params, suffix), without_suffix(buffers, suffix)
            for name in self.learned:
                del own[name]
            masks = {} if drawn is None else drawn.of_place(k)
            y, after, buffered, residual = direction.forward(
                own,
                kept,
                x,
                states[k],
                time=time,
                lengths=lengths,
                training=training,
                keep=bool(keep),
                recompute=keep.steps if isinstance(keep, Every) else None,
                momentum=self.momentum,
                **masks,
            )
            if residual is not None:
                residuals.append(residual)
            last.append(after)
            new_buffers.update({with_suffix(name, suffix): a for name, a in buffered.items()})
            if mask is not None and k >= (self.num_layers - 1) * self.num_directions:
                y = self._shown(y, mask, lengths, states[k][0])
            directions.append(y)
            if len(directions) == self.num_directions:
                its_own = self.keeps_time or not isinstance(steps, int) or steps > 0  # else h is the state that came
                x = directions[0] if self.num_directions == 1 and its_own else xp.concat(directions, axis=-1)
                if drawn is not None and k // self.num_directions < len(drawn.between):
                    x = dropout(x, drawn.between[k // self.num_directions], p=self.dropout)
                directions = []
        y = xp.permute_dims(x, (1, 0, 2)) if self.batch_first and self.keeps_time else x
        fresh = len(last) == 1 and self.keeps_time and isinstance(steps, int) and steps > 0  # else it may be `y`, or the state that came
        out = tuple([parts[0][None, ...] if fresh else xp.stack(parts) for parts in zip(*last, strict=True)])
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
        places = list(enumerate(self.places()))
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

    # -- what is given ---------------------------------------------------------------------------------------------------------------------

    def _placed(self, buffers: Arrays, x: Array, state: Any) -> PlacedState:
        xp, batch, timed, count = xp_of(x), x.shape[1], self.timed, len(self.cell.states)
        places = self.num_layers * self.num_directions
        if state is None:
            return PlacedState(None, xp.zeros_like(buffers["num_batches_tracked_l0"][0]) if timed else None)
        if not isinstance(state, (tuple, list)) or len(state) != count + timed:
            length = f" of length {len(state)}" if isinstance(state, tuple | list) else ""
            names = (*self.cell.states, *(("time",) if timed else ()))
            raise ShapeError(f"`state` is {type(state).__name__}{length}; expected ({', '.join(names)}{',' * (len(names) == 1)})")
        dtype, bounds_h = x.dtype, self.bounds_h
        for name, array, size in zip(self.cell.states, state, self.state_sizes(), strict=False):
            expected = (places, batch, size)
            if type(array) is not numpy.ndarray or type(x) is not numpy.ndarray:  # else they are together
                require_given(state=array)
                namespace(x=x, state=array)
            if tuple(array.shape) != expected:
                raise ShapeError(
                    f"`state` has {name} of shape {tuple(array.shape)}; expected (layers × directions, batch, hidden) = {expected}"
                )
            known = seen(array) if bounds_h and name == "h" and 0 not in array.shape else None
            largest = 0.0 if known is None else float(xp_of(known).max(xp_of(known).abs(known)))
            if largest > H_BOUND:
                raise UnsupportedError(
                    f"`state` has an h of up to {largest:g}; expected at most 1, since `quantize` {self.quantize!r} "
                    "takes h for what the layer gives, which lies in (−1, 1)"
                )
            if array.dtype != dtype:
                raise DTypeError(f"`state` has {name} of dtype {array.dtype}; expected {dtype}, that of `x`")
        if timed:
            require_given(state=state[-1])
        split = [tuple([s[k, ...] for s in state[:count]]) for k in range(places)]
        return PlacedState(split, checked_time(x, state[-1]) if timed else None)

    def _starts(self, params: Arrays, x: Array) -> list[tuple[Array, ...]]:
        """The state before the first step of every layer and direction where none is given."""
        xp, places = xp_of(x), self.places()
        zeros = tuple(xp.zeros((x.shape[1], size), dtype=x.dtype, device=device_of(x)) for size in self.state_sizes())
        if not self.learned:
            return [zeros] * len(places)
        return [
            tuple(zero + params[with_suffix(name, suffix)][None, :] for zero, name in zip(zeros, self.learned, strict=True))
            for suffix, _, _ in places
        ]

    def _checked_cotangents(self, last: tuple[Array, ...], dstate: Any) -> tuple[Array, ...]:
        """The cotangent of each state, 0 where there is none; `dstate` is nested as the state is, with or without one of its time."""
        xp, count = xp_of(last[0]), len(last)
        given = (None,) * count if dstate is None else dstate
        if not isinstance(given, tuple | list) or len(given) not in (count, count + self.timed):
            length = f" of {len(given)} parts" if isinstance(given, tuple | list) else ""
            raise ShapeError(f"`dstate` is {type(given).__name__}{length}; expected {count} arrays, for {', '.join(self.cell.states)}")
        for name, s, d in zip(self.cell.states, last, given, strict=False):
            if d is not None and type(d) is not type(s):
                namespace(state=s, dstate=d)
            if d is not None and tuple(d.shape) != tuple(s.shape):
                raise ShapeError(f"`dstate` has {name} of shape {tuple(d.shape)}; expected {tuple(s.shape)}, that of the state")
        return tuple(xp.zeros_like(s) if d is None else d for s, d in zip(last, given, strict=False))

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


def _counted(mask: Array) -> Array:
    """(batch,): how many steps of each sequence a mask (time, batch) has."""
    xp = xp_of(mask)
    return xp.sum(xp.astype(mask, default_integer(xp)), axis=0)


def _where(there: Array, y: Array) -> Array:
    return xp_of(y).where(there, y, 0.0)
