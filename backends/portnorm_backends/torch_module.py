"""A layer of portnorm inside a torch model: an `nn.Module` that holds the layer's arrays and calls its pure form."""

from __future__ import annotations

import contextlib
import functools
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import torch
from torch.nn.utils.rnn import PackedSequence

from portnorm.arrays import Array, mapped, xp_of
from portnorm.dtypes import float32_value
from portnorm.errors import ArgumentError, DTypeError, ExportError, ShapeError, UnsupportedError
from portnorm.layers.arguments import checked_call
from portnorm.layers.layer import Layer
from portnorm.layers.names import without_suffix
from portnorm.layers.pure import Arrays
from portnorm.layers.randomness import Draw
from portnorm.layers.recurrent import Recurrent, recurrent_parts
from portnorm.layers.state import is_of_one_cell, of_layers, of_one_cell
from portnorm.scalars import switch
from portnorm_backends.torch_plain import Plain
from portnorm_backends.torch_recurrent import AsInTorch, counts, packed_as, padded_as, unpacked
from portnorm_backends.torch_refusals import packing


def torch_module(layer: Layer, *, exact: bool = True) -> TorchModule:
    """`layer` as a `torch.nn.Module`, called as the layer is: `y = m(x)`, or `y, state = m(x, state=None, lengths=None)`.

    A recurrent layer takes a `PackedSequence` too, and then gives one, with states in the order in which the sequences were before they
    were packed, as torch's do; `m(x, lengths)` is `m(x, lengths=lengths)`. It has the attributes and methods of torch.nn.LSTM
    (`hidden_size`, `batch_first`, `flatten_parameters()`, …), and `h, state = m.step(x, state)` for one step, `x` (batch, features), with
    states as torch's cells have them.

    Parameters and buffers are copies of the layer's, under its names; a state dict of the module is one of the layer. `train()` takes the
    batch's statistics and updates the running ones, `eval()` takes those. What is dropped in training is drawn by torch's own generator
    (`torch.manual_seed`): on the CPU the same seed drops the same values between layers as in torch.nn.LSTM and its like, also of packed
    sequences; elsewhere only the part that is dropped and its scale are the same. What torch has not, `recurrent_dropout` and zoneout, is
    drawn after that. `recurrent_dropout` drops the same of h in every step of a call. For a sequence in several calls or steps
    `kept = m.kept(batch)` draws that once, for `m(x, state, kept=kept)` and `m.step(x, state, kept)`.
    Gradients, `.to(...)`, `copy.deepcopy`, `torch.func` and `torch.nn.utils.parametrize` work as with torch's own layers. Computation is
    in the dtype of the parameters: under autocast floating inputs and states are converted to it, as torch does for its own norms, and
    nothing inside is computed in less. As any module of torch it starts in training mode. Under `torch.compile` a recurrent layer is one
    node, compiled once for all lengths.

    Ways out. For ONNX `portnorm.export_torch`, which writes a model with such modules, each as its own checked graph. For a program with
    time and batch open `torch.export.export` with `Dim("T")` for time, of an example of two sequences or more: its loop is torch's
    `while_loop`, which AOTInductor and torch.onnx.export take too. For phones `m.step`, with a loop of your own around it. Without
    `Dim("T")`, and under `torch.jit.trace`, the steps of the example are written out; a trace, a program, and what OpenVINO makes of either
    refuse another number. A package of AOTInductor does not look unless `AOTI_RUNTIME_CHECK_INPUTS=1` is set where it runs: of such a
    program it gives the steps of the example for any input, without an error.

    With `exact=False` a program or a trace has torch's own `layer_norm` or `rms_norm` for each normalization along the last axes, in
    float32, which backends of phones take in fewer pieces. What is lost are rows of which the squares leave the range of float32,
    magnitudes above 1e16 or so. Calls outside of an export stay as they are.

    Raises `UnsupportedError` for what is no layer; a call raises what the layer raises.

    >>> import portnorm as pn
    >>> m = pn.torch_module(pn.LSTM(3, 4, norm="layer", rng=0))
    >>> y, (h, c) = m(torch.ones(7, 2, 3))
    >>> y.shape, y.requires_grad
    (torch.Size([7, 2, 4]), True)
    """
    return RecurrentModule(layer, exact) if isinstance(layer, Recurrent) else TorchModule(layer, exact)


class TorchModule(torch.nn.Module):  # type: ignore[misc]  # torch is not looked into
    """What `torch_module` gives."""

    recorder: Callable[..., Any] | None = None
    """What takes the calls while the model around is exported: `recorder(module, x, state, lengths, mask)`."""

    def __init__(self, layer: Layer, exact: bool = True):
        super().__init__()
        self._exact = switch("exact", exact)
        if not isinstance(layer, Layer):
            raise UnsupportedError(f"`layer` is a {type(layer).__name__}; expected a layer of portnorm")
        kept = layer.to(xp="torch")
        self._params, self._buffer_names = tuple(kept.params), tuple(kept.buffers)
        for name, array in kept.params.items():
            self._owner(name).register_parameter(name.rpartition(".")[2], torch.nn.Parameter(array.detach()))
        for name, array in kept.buffers.items():
            self._owner(name).register_buffer(name.rpartition(".")[2], array.detach())
        # The layer keeps the names, which its backward pass asks for, and arrays without values.
        for part in kept.layers():
            part.params, part.buffers = ({n: a.to("meta") for n, a in group.items()} for group in (part.params, part.buffers))
        self._layer, self._dtype = kept, kept.dtype
        for array in (*self.parameters(), *self.buffers(), torch.empty(0)):
            xp_of(array)  # known from now on: torch.compile cannot follow how a type is looked up for the first time
        for part in kept.layers():  # and torch.export warns where something is remembered
            eps = part.variant.eps if isinstance(part, Recurrent) else getattr(part, "eps", None)
            float32_value(torch.finfo(torch.float32).eps if eps is None else eps)
        for part in recurrent_parts(kept):
            for suffix, _, _ in part.places():
                without_suffix(part.params | part.buffers, suffix)

    def _apply(self, fn: Callable[[Array], Array], recurse: bool = True) -> TorchModule:
        """What `half()` and `to(...)` do: running statistics move, but stay in at least float32."""
        before = self.arrays()[1]
        super()._apply(fn, recurse)
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        for name, buffer in self.arrays()[1].items():
            if buffer.is_floating_point() and buffer.dtype.itemsize < 4:
                owner, _, last = name.rpartition(".")
                self.get_submodule(owner)._buffers[last] = before[name].to(device=buffer.device, dtype=torch.float32)
        return self

    def _owner(self, name: str) -> torch.nn.Module:
        """The module that holds the array of this name, made where it is missing: names with a point are those of modules inside."""
        module: torch.nn.Module = self
        for part in name.split(".")[:-1]:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module.get_submodule(part)
        return module

    def forward(
        self, x: Array, state: Any = None, lengths: Any = None, *, mask: Array | None = None, kept: Mapping[str, Array] | None = None
    ) -> Any:
        """`y`, or `(y, state)` for a recurrent layer; see `portnorm.Layer.__call__`. In training the running statistics are updated.

        `kept` is what recurrent dropout keeps where a sequence comes in several calls (see the method `kept`); without it a call draws its
        own. In evaluation it is not looked at.
        """
        if isinstance(x, PackedSequence):
            if self.recorder is not None:
                raise ExportError(f"the model cannot be exported: {packing(traceback.extract_stack())}")
            padded, counted = unpacked(x, self._layer, lengths, mask)
            y, state = self._called(padded, state, counted, None, kept, x)
            return packed_as(y, x, counted, self._layer), state
        return self._called(x, state, lengths, mask, kept)

    def _called(
        self,
        x: Array,
        state: Any,
        lengths: Any,
        mask: Array | None,
        kept: Mapping[str, Array] | None,
        packed: PackedSequence | None = None,
    ) -> Any:
        """A call on a padded array, which may have been `packed`."""
        if counts(state):
            state, lengths = lengths, state
        if isinstance(lengths, numpy.ndarray):
            lengths = torch.as_tensor(lengths, device=x.device)
        if self.recorder is not None:
            return self.recorder(self, x, state, lengths, mask)
        params, buffers = self.arrays()
        dtype = self._floating(params) if params or buffers else None
        if not torch.is_autocast_enabled(x.device.type):
            return self._computed(params, buffers, dtype, x, state, lengths, mask, kept, packed)
        with torch.autocast(x.device.type, enabled=False):
            x, state = mapped(functools.partial(_converted, dtype=dtype), (x, state))
            return self._computed(params, buffers, dtype, x, state, lengths, mask, kept, packed)

    def _computed(
        self,
        params: Arrays,
        buffers: Arrays,
        dtype: torch.dtype | None,
        x: Array,
        state: Any,
        lengths: Any,
        mask: Array | None,
        kept: Mapping[str, Array] | None,
        packed: PackedSequence | None,
    ) -> Any:
        lengths = checked_call(self._layer, params or buffers, dtype, x, state, lengths, mask)
        # A call in training changes the buffers in place, this one or one that comes before the backward pass of this one.
        copied = self.training or (torch.is_grad_enabled() and not torch.jit.is_tracing())
        before = {name: a.clone() for name, a in buffers.items()} if copied else buffers
        drawn = self._drawn(x, kept, packed) if self.training and self._layer.drops else None
        with contextlib.nullcontext() if self._exact else Plain():
            y, state, new = self._layer.apply(params, before, x, state, lengths, self.training, rng=drawn)
        if self.training:
            with torch.no_grad():
                for name, buffer in buffers.items():
                    buffer.copy_(new[name])
        return (y, state) if self._layer.recurrent else y

    def kept(self, batch: int) -> Arrays:
        """What recurrent dropout keeps of h in one sequence of each of `batch`, drawn by torch's generator; {} where it drops nothing.

        For a loop of one's own, in training and in evaluation alike:

            kept, state = m.kept(batch), None
            for one in x:
                h, state = m.step(one, state, kept)
        """
        if not self.training:
            return {}
        device = next((a.device for a in self.parameters()), None)
        draws = self._layer.draws(1, batch)
        return {name: torch.stack(_draws(draw, device)) for name, draw in draws.items() if _of_sequences(name)}

    def _drawn(self, x: Array, kept: Mapping[str, Array] | None = None, packed: PackedSequence | None = None) -> Arrays:
        """What is kept in this call, by torch's own generator: as much as its recurrent layers take from it, in the same order."""
        steps, batch = (x.shape[1], x.shape[0]) if self._layer.batch_first else x.shape[:2]
        draws, given = self._layer.draws(steps, batch), _given(kept)
        expected = {name: tuple(draw.shape) for name, draw in draws.items() if _of_sequences(name)}
        if given and {name: tuple(a.shape) for name, a in given.items()} != expected:
            shown = ", ".join(f"{name!r} {tuple(a.shape)}" for name, a in given.items())
            raise ShapeError(f"`kept` has {shown}; expected {expected}, as m.kept({batch}) draws it")
        return {
            name: given[name] if name in given else torch.stack(_draws(draw, x.device, packed if _of_values(name) else None))
            for name, draw in draws.items()
        }

    def arrays(self) -> tuple[Arrays, Arrays]:
        """Parameters and buffers by the layer's names, as they are now."""
        params, buffers = (
            {n: functools.reduce(getattr, n.split("."), self) for n in names} for names in (self._params, self._buffer_names)
        )
        return params, buffers

    def _floating(self, params: Arrays) -> torch.dtype:
        """The dtype of the layer: that of its parameters, where it has some."""
        return next((a.dtype for a in params.values() if a.is_floating_point()), self._dtype)

    def to_layer(self) -> Layer:
        """The layer of portnorm that shares the arrays as they are now: for `portnorm.save`, `portnorm.export`, `initial_state`."""
        params, buffers = ({n: a.detach() for n, a in group.items()} for group in self.arrays())
        layer, dtype = self._layer.copy(), self._floating(params)
        device = next((a.device for a in (*params.values(), *buffers.values())), None)
        for part in (layer, *layer.layers()):
            part.__dict__.update(device=device, dtype=dtype)
        layer.assign(params, buffers)
        return layer

    def __repr__(self) -> str:
        return f"torch_module({self._layer!r})"


class RecurrentModule(TorchModule, AsInTorch):
    """What `torch_module` gives for `LSTM`, `GRU` and `RNN`."""

    _layer: Recurrent

    def forward(
        self, x: Array, state: Any = None, lengths: Any = None, *, mask: Array | None = None, kept: Mapping[str, Array] | None = None
    ) -> Any:
        """As `TorchModule.forward`; a layer alone takes the states of a step too, and then gives such."""
        if counts(state):
            state, lengths = lengths, state
        layer, states = self._layer, len(self._layer.cell.states)
        alone = state is not None and layer.num_layers * layer.num_directions == 1 and is_of_one_cell(state, states)
        y, after = super().forward(x, of_layers(state, states) if alone else state, lengths, mask=mask, kept=kept)
        return y, of_one_cell(after, states) if alone else after

    def step(self, x: Array, state: Any = None, kept: Mapping[str, Array] | None = None) -> tuple[Array, Any]:
        """One time step, for a loop of one's own: `x` (batch, features) to `(h, state)`; step by step equals the whole sequence.

        A layer of one layer takes and gives its states as torch's cells do, each (batch, hidden): `(h, c)`, or `(h,)`. A state
        (layers, batch, hidden), as a call gives it, is taken too, and given where it came and of a stack. With batch statistics the time
        stands behind.

        With `recurrent_dropout` a step in training takes `kept`, what is kept in all steps of these sequences: `m.kept(batch)` draws it,
        once for every sequence. Dropout between layers and zoneout are drawn in each step, as in a whole call. Raises `ArgumentError`
        where `kept` is missing, and `UnsupportedError` where the layer does not go forward.
        """
        self._check_step(kept)
        axis = 1 if self._layer.batch_first else 0
        y, after = self(x.unsqueeze(axis), state, kept=kept)
        if state is None and self._layer.num_layers == 1:
            after = of_one_cell(after, len(self._layer.cell.states))
        return (y.squeeze(axis) if self._layer.keeps_time else y), after

    def _check_step(self, kept: Mapping[str, Array] | None) -> None:
        self._layer.check_goes_forward()
        if self.training and not _given(kept) and "recurrent_dropout" in self._layer.draws(1, 1):
            raise ArgumentError(
                f"`kept` is missing: {type(self._layer).__name__} has recurrent_dropout {self._layer.recurrent_dropout:g}, which in "
                "training drops the same of h in every step of a sequence; draw it once for each, kept = m.kept(batch), and give it to "
                "every step, m.step(x, state, kept); or call the module on whole sequences"
            )


def _converted(array: Array, dtype: torch.dtype | None) -> Array:
    return array if dtype is None or not array.is_floating_point() else array.to(dtype)


def _given(kept: Mapping[str, Array] | None) -> Arrays:
    """Raises `UnsupportedError` and `DTypeError` for what `TorchModule.kept` does not give."""
    if kept is not None and not isinstance(kept, Mapping):
        raise UnsupportedError(f"`kept` is a {type(kept).__name__}; expected what m.kept(batch) gives, arrays by name")
    for name, array in (kept or {}).items():
        if array.dtype != torch.bool and not array.is_floating_point():
            raise DTypeError(f"`kept` has {name!r} of dtype {array.dtype}; expected truth values, as m.kept(batch) gives them")
    return dict(kept or {})


def _of_sequences(name: str) -> bool:
    """Whether these are drawn once for a sequence, not for each step."""
    return name.rpartition(".")[2] == "recurrent_dropout"


def _of_values(name: str) -> bool:
    """Whether they are for the values between layers, of which a packed sequence has fewer than a padded array."""
    return name.rpartition(".")[2] == "dropout"


def _draws(draw: Draw, device: torch.device | None, packed: PackedSequence | None = None) -> list[Array]:
    """What is kept, for each place: drawn for the values of the packed sequence, as torch does, and then padded."""
    shape, drop = draw.shape[1:] if packed is None else (len(packed.data), *draw.shape[3:]), torch.nn.functional.dropout
    found = [drop(torch.ones(shape, device=device), draw.p) != 0 for _ in range(draw.shape[0])]
    return found if packed is None else [padded_as(a, packed) for a in found]
