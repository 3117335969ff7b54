"""Layers one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, Self

from portnorm.arrays import Array, DType, Namespace, name_of, xp_of
from portnorm.errors import ShapeError, UnsupportedError
from portnorm.layers.initial import Generator, generator
from portnorm.layers.layer import Layer
from portnorm.layers.pure import Arrays, Keep
from portnorm.layers.randomness import Draw
from portnorm.layers.summary import Calls
from portnorm.padding import Counted, Mask, steps_of
from portnorm.quantization import QuantizeName


class Sequential(Layer):
    """Layers one after the other; parameter names are those of the parts with the part's number in front, as in torch.

    With a recurrent part it is called as `y, state = model(x, state=None, lengths=None)`, where `state` is the tuple of the states of
    the recurrent parts; else as `y = model(x)`. `lengths` or `mask` reaches every part, up to one that leaves the time axis out.
    A layer that is a part twice has one set of parameters, under the number of its first place; its gradients are the sum over both places.
    Raises `UnsupportedError` for parts that are no layers, or of which only some are `batch_first`; a call raises what the parts raise.

    >>> import numpy as np, portnorm as pn
    >>> model = pn.Sequential(pn.LSTM(1, 8, norm="layer", rng=0), pn.Linear(8, 2, rng=0))
    >>> y, state = model(np.zeros((5, 3, 1), dtype="float32"), lengths=[5, 3, 1])
    >>> y.shape
    (5, 3, 2)
    """

    def __init__(self, *parts: Layer):
        if not parts or not all(isinstance(part, Layer) for part in parts):
            raise UnsupportedError(f"`parts` is {parts!r}; expected one or more layers")
        first = parts[0]
        self.parts = parts
        self.homes = tuple(next(k for k, other in enumerate(parts) if other is part) for part in parts)
        """By part, the number of the first part that is the same layer."""
        self._owned = frozenset(self.params), frozenset(self.buffers)
        super().__init__({}, first.xp, first.device, first.dtype)
        for k, part in enumerate(parts):
            if part.xp is not first.xp or part.dtype != first.dtype:
                raise UnsupportedError(
                    f"part {k} has {part.dtype} arrays of {name_of(part.xp)} but part 0 has {first.dtype} of {name_of(first.xp)}; "
                    "make them alike with layer.to(...)"
                )
        self.recurrent = any(part.recurrent for part in parts)
        self.takes_integers = first.takes_integers
        self.masks_channels = first.masks_channels
        self._check_places()

    def _check_places(self) -> None:
        """Raise `UnsupportedError` where a layer is in two parts of different kinds, or where parts differ in what their first axis is."""
        seen: dict[int, int] = {}
        for k, part in self._places():
            for layer in part.layers():
                if seen.setdefault(id(layer), k) != k:
                    raise UnsupportedError(
                        f"part {k} holds a layer that part {seen[id(layer)]} holds too: {layer!r}; where one layer is at several places, "
                        "make each of them a part of the same Sequential"
                    )
        orders = {layer.batch_first: k for k, part in reversed(self._places()) for layer in part.layers() if layer.orders_axes}
        if len(orders) > 1:
            raise UnsupportedError(
                f"part {orders[True]} takes (batch, time, features) but part {orders[False]} takes (time, batch, features); make all with "
                "the same `batch_first`"
            )

    def description(self) -> dict[str, Any]:
        """Its parts; one that is an earlier part again says which."""
        places = enumerate(self.homes)
        return {"type": "Sequential", "parts": [self.parts[k].description() if k == at else {"as": k} for at, k in places]}

    @property
    def keeps_time(self) -> bool:  # type: ignore[override]
        """Whether the result still has the time axis that the input had."""
        return all(part.keeps_time for part in self.parts)

    @property
    def turns_time(self) -> bool:  # type: ignore[override]
        """Whether the result has the last step of the input first."""
        return sum(part.turns_time for part in self.parts) % 2 == 1

    @property
    def quantize(self) -> QuantizeName | None:
        """How products of the parts are computed with integers. Set, it is that of every part that has weights."""
        return self.quantizes

    @quantize.setter
    def quantize(self, quantize: QuantizeName | None) -> None:
        for part in (layer for layer in self.layers() if "quantize" in layer._settings):
            part.quantize = quantize

    @property
    def masks(self) -> bool:  # type: ignore[override]
        """Whether the last part says itself what `y` is at padding."""
        return self.parts[-1].masks

    @property
    def batch_first(self) -> bool:  # type: ignore[override]
        """Whether sequences are (batch, time, features)."""
        return any(part.batch_first for part in self.parts)

    # The arrays live in the parts: these views keep one place for each. A layer that is a part twice has the names of its first place.
    def _places(self) -> list[tuple[int, Layer]]:
        """Each layer with the number of its first place."""
        return [(k, part) for k, (part, home) in enumerate(zip(self.parts, self.homes, strict=True)) if home == k]

    @property
    def params(self) -> Arrays:
        return {f"{k}.{name}": a for k, part in self._places() for name, a in part.params.items()}

    @params.setter
    def params(self, arrays: Mapping[str, Array]) -> None:
        own = _by_part(arrays)
        for k, part in self._places():
            part.params = own.get(k, {}) if arrays else part.params

    @property
    def buffers(self) -> Arrays:
        return {f"{k}.{name}": a for k, part in self._places() for name, a in part.buffers.items()}

    @buffers.setter
    def buffers(self, arrays: Mapping[str, Array]) -> None:
        own = _by_part(arrays)
        for k, part in self._places():
            part.buffers = own.get(k, {}) if arrays else part.buffers

    def _names(self) -> tuple[Set[str], Set[str]]:
        return self._owned

    def _shape_of(self, name: str, array: Array) -> tuple[int, ...]:
        place, _, inner = name.partition(".")
        return self.parts[int(place)]._shape_of(inner, array)

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
        if len({part.batch_first for part in self.parts if part.recurrent}) > 1:
            self._check_places()
        states = iter(self._checked_states(state))
        out, residuals, given, kept = [], [], _by_part(params), _by_part(buffers)
        drawn, buffers = None if random is None else _by_part(random), dict(buffers)
        # Parts without a state do not know that the batch comes first.
        others = lengths
        if self.batch_first and lengths is not None and not isinstance(lengths, Mask):
            others = Mask(steps_of(x, lengths, True), (0, 1))
        for place, (k, part) in enumerate(zip(self.homes, self.parts, strict=True)):
            before = next(states) if part.recurrent else None
            counted = lengths if part.recurrent else others
            trained = training and not part.evaluates
            own = None if drawn is None else drawn.get(place, {})
            x, after, buffered, residual = part.forward(given.get(k, {}), kept.get(k, {}), x, before, counted, trained, keep, own)
            if part.recurrent:
                out.append(after)
            residuals.append((residual, trained))
            kept[k] = {**kept.get(k, {}), **buffered}  # a layer at two places goes on from those of the first
            buffers.update({f"{k}.{name}": a for name, a in buffered.items()})
            lengths, others = (lengths, others) if part.keeps_time else (None, None)
            if part.turns_time and isinstance(others, Mask):
                # Steps have changed their places. A recurrent part takes the mask as it came all the same, as Keras has it.
                time = 1 if self.batch_first else 0
                others = others._replace(values=xp_of(x).flip(others.values, axis=time))
        return x, tuple(out), buffers, residuals

    def _checked_states(self, state: Any) -> Sequence[Any]:
        """The state of each recurrent part."""
        count = sum(part.recurrent for part in self.parts)
        if state is None:
            return [None] * count
        if not isinstance(state, tuple | list) or len(state) != count:
            what = f"of length {len(state)}" if isinstance(state, tuple | list) else "no tuple"
            raise ShapeError(f"`state` is {type(state).__name__} {what}; expected a tuple of {count}, the states of the recurrent parts")
        return state

    def backward(self, residuals: Any, dy: Array | None, dstate: Any, training: bool) -> tuple[Array | None, Any, Arrays]:
        places = [k for k, part in enumerate(self.parts) if part.recurrent]
        cotangents = dict(zip(places, dstate if dstate is not None else [None] * len(places), strict=True))
        grads: Arrays = {}
        for k in reversed(range(len(self.parts))):
            if dy is None and not self.parts[k].recurrent:
                raise UnsupportedError("`dy` is None; expected a cotangent, since the model does not end in a recurrent layer")
            residual, trained = residuals[k]
            dy, dbefore, part_grads = self.parts[k].backward(residual, dy, cotangents.get(k), trained)
            if k in cotangents:
                cotangents[k] = dbefore
            for inner, d in part_grads.items():
                name = f"{self.homes[k]}.{inner}"
                grads[name] = grads[name] + d if name in grads else d
        ordered = {name: grads[name] for name in self.params}
        return dy, tuple(cotangents[k] for k in places), ordered

    def copy(self) -> Self:
        copies = {k: part.copy() for k, part in self._places()}
        other = type(self)(*(copies[k] for k in self.homes))
        other.evaluates = self.evaluates
        return other

    def _place(self, xp: Namespace, device: Any, dtype: DType) -> None:
        for _, part in self._places():
            part._place(xp, device, dtype)
        self.__dict__.update(xp=xp, device=device, dtype=self.parts[0].dtype)

    def forget_statistics(self) -> None:
        for _, part in self._places():
            if not part.evaluates:
                part.forget_statistics()

    def initial_state(self, batch: int, *, noise: float = 0.0, rng: int | Generator | None = None) -> tuple[Any, ...]:
        """The states before the first step of the recurrent parts. See `portnorm.LSTM.initial_state`."""
        random = generator(rng)
        return tuple(part.initial_state(batch, noise=noise, rng=random) for part in self.parts if part.recurrent)

    @property
    def drops(self) -> bool:  # type: ignore[override]
        """Whether a call in training drops values at random."""
        return not self.evaluates and any(part.drops for part in self.parts)

    def draws(self, steps: Any, batch: Any) -> dict[str, Draw]:
        if self.evaluates:
            return {}
        return {f"{k}.{name}": draw for k, part in enumerate(self.parts) for name, draw in part.draws(steps, batch).items()}

    def input_dims(self) -> tuple[int | str, ...]:
        own = self.parts[0].input_dims()
        recurrent = next((part for part in self.parts if part.recurrent), None)
        return own if recurrent is None else (*recurrent.input_dims()[:-1], *(() if self.takes_integers else own[-1:]))

    def feature_axes(self, ndim: int) -> tuple[int, ...]:
        return self.parts[0].feature_axes(ndim)

    def calls(self, x: Array, name: str) -> Calls:
        for k, part in enumerate(self.parts):
            x = yield from part.calls(x, f"{name}.{k}" if name else str(k))
        return x

    def layers(self) -> Iterator[Layer]:
        for _, part in self._places():
            yield from part.layers()

    def __repr__(self) -> str:
        return f"Sequential({', '.join(map(repr, self.parts))})"


_homes: dict[str, tuple[int, str]] = {}
"""What `_home` has found: it is asked in every call, for every name. `torch.compile` follows a dict, and warns of `functools.lru_cache`."""


def _home(name: str) -> tuple[int, str]:
    """The part of an array, and its name there."""
    found = _homes.get(name)
    if found is None:
        k, _, inner = name.partition(".")
        found = _homes[name] = int(k), inner
    return found


def _by_part(arrays: Mapping[str, Array]) -> dict[int, Arrays]:
    """The arrays of each part that has some, by their names in it."""
    found: dict[int, Arrays] = {}
    for name, array in arrays.items():
        k, inner = _home(name)
        found.setdefault(k, {})[inner] = array
    return found
