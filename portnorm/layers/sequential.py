"""Layers one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

from portnorm.arrays import Array, DType, Namespace
from portnorm.errors import UnsupportedError
from portnorm.layers.initial import Generator, generator
from portnorm.layers.layer import Arrays, Layer
from portnorm.padding import Counted, Mask, steps_of


class Sequential(Layer):
    """Layers one after the other; parameter names are those of the parts with the part's number in front, as in torch.

    With a recurrent part it is called as `y, state = model(x, state=None, lengths=None)`, where `state` is the tuple of the states of
    the recurrent parts; else as `y = model(x)`. `lengths` or `mask` reaches every part, up to one that leaves the time axis out.

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
        super().__init__({}, first.xp, first.device, first.dtype)
        for k, part in enumerate(parts):
            if part.xp is not first.xp or part.dtype != first.dtype:
                raise UnsupportedError(
                    f"part {k} has {part.dtype} arrays of {part.xp.__name__} but part 0 has {first.dtype} of {first.xp.__name__}; "
                    "make them alike with layer.to(...)"
                )
        self.recurrent = any(part.recurrent for part in parts)
        self.takes_integers = first.takes_integers
        self.keeps_time = all(part.keeps_time for part in parts)
        self.batch_first = any(part.batch_first for part in parts)
        self.masks, self.masks_channels = parts[-1].masks, first.masks_channels

    # The arrays live in the parts: these views keep one place for each.
    @property
    def params(self) -> Arrays:
        return {f"{k}.{name}": a for k, part in enumerate(self.parts) for name, a in part.params.items()}

    @params.setter
    def params(self, arrays: Mapping[str, Array]) -> None:
        for k, part in enumerate(self.parts):
            part.params = _of_part(arrays, k) if arrays else part.params

    @property
    def buffers(self) -> Arrays:
        return {f"{k}.{name}": a for k, part in enumerate(self.parts) for name, a in part.buffers.items()}

    @buffers.setter
    def buffers(self, arrays: Mapping[str, Array]) -> None:
        for k, part in enumerate(self.parts):
            part.buffers = _of_part(arrays, k) if arrays else part.buffers

    def forward(
        self, params: Arrays, buffers: Arrays, x: Array, state: Any, lengths: Counted, training: bool, keep: bool
    ) -> tuple[Array, Any, Arrays, Any]:
        states = iter(state) if state is not None else iter([None] * len(self.parts))
        out, residuals, new_buffers = [], [], {}
        # Parts without a state do not know that the batch comes first.
        others = lengths
        if self.batch_first and lengths is not None and not isinstance(lengths, Mask):
            others = Mask(steps_of(x, lengths, True), (0, 1))
        for k, part in enumerate(self.parts):
            before = next(states, None) if part.recurrent else None
            counted = lengths if part.recurrent else others
            x, after, buffered, residual = part.forward(_of_part(params, k), _of_part(buffers, k), x, before, counted, training, keep)
            if part.recurrent:
                out.append(after)
            residuals.append(residual)
            new_buffers.update({f"{k}.{name}": a for name, a in buffered.items()})
            lengths, others = (lengths, others) if part.keeps_time else (None, None)
        return x, tuple(out), new_buffers, residuals

    def backward(self, residuals: Any, dy: Array | None, dstate: Any, training: bool) -> tuple[Array | None, Any, Arrays]:
        places = [k for k, part in enumerate(self.parts) if part.recurrent]
        cotangents = dict(zip(places, dstate if dstate is not None else [None] * len(places), strict=True))
        grads: Arrays = {}
        for k in reversed(range(len(self.parts))):
            if dy is None and not self.parts[k].recurrent:
                raise UnsupportedError("`dy` is None; expected a cotangent, since the model does not end in a recurrent layer")
            dy, dbefore, part_grads = self.parts[k].backward(residuals[k], dy, cotangents.get(k), training)
            if k in cotangents:
                cotangents[k] = dbefore
            grads.update({f"{k}.{name}": d for name, d in part_grads.items()})
        ordered = {name: grads[name] for name in self.params}
        return dy, tuple(cotangents[k] for k in places), ordered

    def copy(self) -> Self:
        other = type(self)(*(part.copy() for part in self.parts))
        return other

    def _place(self, xp: Namespace, device: Any, dtype: DType) -> None:
        for part in self.parts:
            part._place(xp, device, dtype)
        self.xp, self.device, self.dtype = xp, device, self.parts[0].dtype

    def forget_statistics(self) -> None:
        for part in self.parts:
            part.forget_statistics()

    def initial_state(self, batch: int, *, noise: float = 0.0, rng: int | Generator | None = None) -> tuple[Any, ...]:
        """The states before the first step of the recurrent parts. See `portnorm.LSTM.initial_state`."""
        random = generator(rng)
        return tuple(part.initial_state(batch, noise=noise, rng=random) for part in self.parts if part.recurrent)

    def input_dims(self) -> tuple[int | str, ...]:
        own = self.parts[0].input_dims()
        recurrent = next((part for part in self.parts if part.recurrent), None)
        return own if recurrent is None else (*recurrent.input_dims()[:-1], *(() if self.takes_integers else own[-1:]))

    def feature_axes(self, ndim: int) -> tuple[int, ...]:
        return self.parts[0].feature_axes(ndim)

    def layers(self) -> Iterator[Layer]:
        for part in self.parts:
            yield from part.layers()

    def __repr__(self) -> str:
        return f"Sequential({', '.join(map(repr, self.parts))})"


def _of_part(arrays: Mapping[str, Array], k: int) -> Arrays:
    return {name.removeprefix(f"{k}."): a for name, a in arrays.items() if name.startswith(f"{k}.")}
