"""What models ask of torch.nn.LSTM, GRU and RNN beside a plain call: packed sequences, one step, attributes and methods."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from portnorm.arrays import Array
from portnorm.errors import DTypeError, ShapeError, UnsupportedError
from portnorm.layers.layer import Layer
from portnorm.layers.names import without_suffix


def unpacked(x: PackedSequence, layer: Layer, lengths: Any, mask: Any) -> tuple[Array, Array]:
    """The padded array in the layer's order of axes, and its lengths. Raises `UnsupportedError`."""
    if not layer.recurrent:
        raise UnsupportedError(
            f"`x` is a PackedSequence, which {type(layer).__name__} does not take; call it on `x.data`, and put the result into "
            "PackedSequence(y, x.batch_sizes, x.sorted_indices, x.unsorted_indices)"
        )
    if lengths is not None or mask is not None:
        given = "lengths" if lengths is not None else "mask"
        raise UnsupportedError(f"`x` is a PackedSequence, which says how long its sequences are; expected no `{given}` beside it")
    padded, counted = pad_packed_sequence(x, batch_first=layer.batch_first)
    return padded, counted.to(padded.device)


def packed_as(y: Array, x: PackedSequence, lengths: Array, layer: Layer) -> Array | PackedSequence:
    """`y` packed as `x` was, where it has the steps of `x`."""
    if not layer.keeps_time:
        return y
    counted, order = lengths.cpu(), x.sorted_indices
    if order is not None:
        y, counted = y.index_select(0 if layer.batch_first else 1, order), counted[order.cpu()]
    data = pack_padded_sequence(y, counted, layer.batch_first).data
    return PackedSequence(data, x.batch_sizes, order, x.unsorted_indices)


def padded_as(data: Array, x: PackedSequence) -> Array:
    """Values for those of a packed sequence, as (time, batch, features)."""
    padded, _ = pad_packed_sequence(PackedSequence(data, x.batch_sizes, x.sorted_indices, x.unsorted_indices))
    return padded


def counts(value: Any) -> bool:
    """Whether an argument is `lengths`, and no state: whole numbers along one axis."""
    if isinstance(value, torch.Tensor):
        return bool(value.ndim == 1 and not value.is_floating_point() and not value.is_complex())
    if isinstance(value, numpy.ndarray):
        return value.ndim == 1 and value.dtype.kind in "iu"
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(n, int | numpy.integer) for n in value)


def _of_layer(name: str) -> property:
    """An attribute of the layer, which looks at what is assigned to it."""
    return property(lambda self: getattr(self._layer, name), lambda self, value: setattr(self._layer, name, value))


class AsInTorch:
    """The attributes and methods of torch.nn.LSTM, GRU and RNN, of any recurrent layer.

    `bias` says whether there are biases, `mode` is the name of the cell, `all_weights` the parameters by layer and direction.
    """

    _layer: Any

    input_size = _of_layer("input_size")
    hidden_size = _of_layer("hidden_size")
    num_layers = _of_layer("num_layers")
    bidirectional = _of_layer("bidirectional")
    batch_first = _of_layer("batch_first")
    proj_size = _of_layer("proj_size")

    def arrays(self) -> tuple[dict[str, Array], dict[str, Array]]:
        """Parameters and buffers by the layer's names."""
        raise NotImplementedError

    @property
    def dropout(self) -> float:
        """Between layers, in training."""
        return float(getattr(self._layer, "dropout", 0.0))

    @dropout.setter
    def dropout(self, dropout: float) -> None:
        if hasattr(self._layer, "dropout"):
            self._layer.dropout = dropout
        elif dropout:
            raise UnsupportedError(f"`dropout` is {dropout}, which {type(self._layer).__name__} has not; expected 0")

    @property
    def bias(self) -> bool:
        return any(name.startswith("bias") for name in self._layer.params)

    @property
    def nonlinearity(self) -> str:
        """The function of an RNN."""
        if self._layer.cell.__name__ != "RNNCell":
            raise AttributeError(f"{type(self._layer).__name__} has no `nonlinearity`")
        return str(self._layer.variant.activation)

    @property
    def mode(self) -> str:
        name = self._layer.cell.__name__.removesuffix("Cell")
        return f"{name}_{self.nonlinearity.upper()}" if name == "RNN" else name

    @property
    def all_weights(self) -> list[list[Array]]:
        params, last = self.arrays()[0], "weight_hr"
        found = [without_suffix(params, suffix) for suffix, _, _ in self._layer.places()]
        return [[a for name, a in sorted(own.items(), key=lambda pair: pair[0] == last)] for own in found]

    def flatten_parameters(self) -> None:
        """Nothing: parameters are used where they are."""

    def reset_parameters(self) -> None:
        """Draw new initial values, by torch's generator; running statistics begin anew."""
        layer = self._layer
        seed = int(torch.randint(2**31 - 1, ()))
        fresh = type(layer)(layer.input_size, layer.hidden_size, **_without_sizes(layer.config), dtype="float64", rng=seed)
        with torch.no_grad():
            for group, new in zip(self.arrays(), (fresh.params, fresh.buffers), strict=True):
                for name, array in group.items():
                    array.copy_(torch.as_tensor(new[name]))

    def get_expected_hidden_size(self, input: Array, batch_sizes: Array | None) -> tuple[int, int, int]:  # noqa: A002  # torch's name
        return self._expected(input, batch_sizes, self._layer.output_size)

    def get_expected_cell_size(self, input: Array, batch_sizes: Array | None) -> tuple[int, int, int]:  # noqa: A002
        return self._expected(input, batch_sizes, self._layer.hidden_size)

    def _expected(self, x: Array, batch_sizes: Array | None, size: int) -> tuple[int, int, int]:
        layer = self._layer
        batch = int(batch_sizes[0]) if batch_sizes is not None else x.shape[0 if layer.batch_first else 1]
        return layer.num_layers * layer.num_directions, batch, size

    def check_input(self, input: Array, batch_sizes: Array | None) -> None:  # noqa: A002
        """Raise `ShapeError` or `DTypeError` where `input`, padded or the data of a packed sequence, does not fit."""
        axes = 3 if batch_sizes is None else 2
        if input.ndim != axes or input.shape[-1] != self._layer.input_size:
            raise ShapeError(f"`input` has shape {tuple(input.shape)}; expected {axes} axes, the last of {self._layer.input_size} features")
        own = next((a.dtype for a in self.arrays()[0].values()), input.dtype)
        if input.dtype != own and not torch.is_autocast_enabled(input.device.type):
            raise DTypeError(f"`input` has dtype {input.dtype} but the layer has {own}; convert one of them")

    def check_hidden_size(self, hx: Array, expected_hidden_size: tuple[int, int, int], msg: str = "expected {}, got {}") -> None:
        """Raise `ShapeError` where a state has another shape."""
        if tuple(hx.shape) != tuple(expected_hidden_size):
            raise ShapeError(f"`hx` has another shape: {msg.format(tuple(expected_hidden_size), list(hx.shape))}")

    def check_forward_args(self, input: Array, hidden: Any, batch_sizes: Array | None) -> None:  # noqa: A002
        """Raise as `check_input` and `check_hidden_size` do."""
        self.check_input(input, batch_sizes)
        states = hidden if isinstance(hidden, tuple | list) else (hidden,)
        for state, size in zip(states, self._layer.state_sizes(), strict=False):
            self.check_hidden_size(state, self._expected(input, batch_sizes, size))

    def permute_hidden(self, hx: Any, permutation: Array | None) -> Any:
        """The state of the sequences in another order."""
        if permutation is None:
            return hx
        if isinstance(hx, torch.Tensor):
            return hx.index_select(1, permutation)
        return tuple(state.index_select(1, permutation) for state in hx)


def _without_sizes(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in ("input_size", "hidden_size")}
