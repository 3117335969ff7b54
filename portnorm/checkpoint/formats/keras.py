"""Keras: TensorFlow's layout, or CuDNN's, by variable names or by the numbers that variables have in an .h5 file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import numpy

from portnorm.checkpoint.formats.row import NumPyArray, Read, Row, columns, norms, rows, whole, without

_KERAS_PLACES = (("",), ("forward_layer/", "backward_layer/"), ("cells/{l}/",))


def keras_rows() -> list[Row]:
    weights = {"weight_ih": columns("kernel"), "weight_hh": columns("recurrent_kernel")}
    bias, both = {"bias": rows("bias")}, {"bias_ih": rows("bias", at=0), "bias_hh": rows("bias", at=1)}
    found = []
    for layer, gates in (("LSTM", "ifgo"), ("RNN", "h")):
        row = Row("keras", layer, {**weights, **bias}, None, gates, _KERAS_PLACES, {"biases": ("bias",)})
        found += [row, without(row, "bias", biases=())]
    after = Row("keras", "GRU", {**weights, **both}, None, "zrn", _KERAS_PLACES, {"reset": "after"})
    before = Row("keras", "GRU", {**weights, **bias}, None, "zrn", _KERAS_PLACES, {"reset": "before", "biases": ("bias",)})
    # Without a bias the arrays do not say where the reset gate is: where Keras has it by default, unless the file or the caller says it.
    unbiased = Row("keras", "GRU", weights, None, "zrn", _KERAS_PLACES, {"biases": ()})
    found += [after, before, unbiased, *_cudnn()]
    linear = Row("keras", "Linear", {"weight": whole("kernel", transposed=True), "bias": whole("bias")})
    names = {"gain": "gamma", "shift": "beta", "mean": "moving_mean", "var": "moving_variance", "rms": "scale"}
    batch = {"eps": 1e-3, "momentum": 0.01, "unbiased": False}
    return [*found, linear, without(linear, "bias"), *norms("keras", names, 1e-3, 1e-6, batch, -1)]


def keras_layernorm_rows() -> list[Row]:
    """The package keras-layernorm-rnn: γ after the sum, of each gate apart, the bias after it; gates are hard sigmoids by default."""
    kernels = {"weight_ih": columns("kernel"), "weight_hh": columns("recurrent_kernel")}
    bias, name = {"bias": rows("bias")}, "keras-layernorm-rnn"
    gains = rows(*(f"layer_normalization{n}/gamma" for n in ("", "_1", "_2", "_3")))
    normed = {"norm": "layer", "terms": "sum", "groups": "gate", "shift": False, "biases": ("bias",), "gate_activation": "hard_sigmoid_5"}
    lstm = Row(name, "LSTM", {**kernels, "norm_sum.weight": gains, **bias}, None, "ifgo", _KERAS_PLACES, normed)
    rnn = Row(name, "RNN", {**kernels, "norm_sum.weight": rows("layer_normalization/gamma"), **bias}, "tf-addons", "h", _KERAS_PLACES)
    return [row for kind in (lstm, rnn) for row in (kind, without(kind, "bias", biases=()))]


def _cudnn() -> list[Row]:
    """CuDNNLSTM and CuDNNGRU: under the names of the plain layers, with two biases in one and the matrices of each gate transposed."""

    def inputs(gates: int) -> Callable[[NumPyArray], NumPyArray]:
        return lambda w: numpy.concatenate([gate.T.reshape(gate.shape) for gate in numpy.split(w, gates)])

    def hidden(gates: int) -> Callable[[NumPyArray], NumPyArray]:
        return lambda w: numpy.concatenate([gate.T for gate in numpy.split(w, gates)])

    def half(k: int) -> Callable[[NumPyArray], NumPyArray]:
        def taken(b: NumPyArray) -> NumPyArray:
            z, r, n = numpy.split(numpy.split(b, 2)[k], 3)
            return numpy.concatenate([r, z, n])

        return taken

    def weights(gates: int) -> dict[str, Read]:
        return {
            "weight_ih": columns("kernel", then=inputs(gates)),
            "weight_hh": columns("recurrent_kernel", then=hidden(gates)),
        }

    own = {"gate_activation": "sigmoid", "activation": "tanh"}
    both = {"bias": whole("bias", blocks=8, then=lambda b: numpy.add(*numpy.split(b, 2)))}
    two = {f"bias_{side}": whole("bias", blocks=6, then=half(k)) for k, side in enumerate(("ih", "hh"))}
    return [
        Row("keras", "LSTM", {**weights(4), **both}, None, "ifgo", _KERAS_PLACES, {"biases": ("bias",), **own}),
        Row("keras", "GRU", {**weights(3), **two}, None, "zrn", _KERAS_PLACES, {"reset": "after", **own}),
    ]


_KERAS_VARIABLES = {
    (2, 2, 1): ("kernel", "recurrent_kernel", "bias"),
    (2, 2, 2): ("kernel", "recurrent_kernel", "bias"),
    (2, 2): ("kernel", "recurrent_kernel"),
    (2, 1): ("kernel", "bias"),
    (2,): ("kernel",),
    (1, 1, 1, 1): ("gamma", "beta", "moving_mean", "moving_variance"),
    (1, 1): ("gamma", "beta"),
    (1,): ("scale",),
}


def keras_names(arrays: Mapping[str, NumPyArray]) -> dict[str, str]:
    """Plain names by key: without cells and ":0", with numbers for the cells of a stack, and with names for the numbered variables."""
    groups: dict[str, list[int]] = {}
    for key in arrays:
        if match := re.fullmatch(r"(.*?)vars/(\d+)", key):
            groups.setdefault(match[1], []).append(int(match[2]))
    numbered = {}
    for parent, numbers in groups.items():
        keys = [f"{parent}vars/{n}" for n in sorted(numbers)]
        names = _KERAS_VARIABLES.get(tuple(arrays[k].ndim for k in keys), ())
        for k, key in enumerate(keys):
            name = getattr(arrays[key], "called", None) or (names[k] if k < len(names) else None)
            if name is not None:
                numbered[key] = f"{parent}{name}"
    found = {key: numbered.get(key, key).removesuffix(":0") for key in arrays}
    places = _stacked(found.values())
    for key, name in found.items():
        if match := _IN_STACK.search(name):
            head, tail = name[: match.start(2)], name[match.end() :]
            name = head + places.get((head, match[3]), name[match.start(2) : match.end()]) + tail
        name = re.sub(r"(^|/)(\w*_)?cell(_\d+)?/", r"\1", name)
        found[key] = re.sub(r"(^|/)(forward|backward)_[^/]*/", r"\1\2_layer/", name)
    return found


_IN_STACK = re.compile(r"(^|/)((?:cell/)?(?:cells|stacked_rnn_cells(?:_\d+)?)/)((?:\w+_)?cell(?:_\d+)?)/")


def _stacked(names: Iterable[str]) -> dict[tuple[str, str], str]:
    """What stands for the cells of each stack, by where the stack is and the name of the cell."""
    stacks: dict[str, dict[str, str]] = {}
    for name in names:
        if match := _IN_STACK.search(name):
            stacks.setdefault(name[: match.start(2)], {})[name] = match[3]
    places = {}
    for parent, named in stacks.items():
        cells, listed = list(dict.fromkeys(named.values())), list(named) == sorted(named)
        numbers = [int(cell.rpartition("_")[2]) if cell[-1].isdecimal() else 0 for cell in cells]
        order = [cell for _, cell in sorted(zip(numbers, cells, strict=True))]
        if len(cells) == 1:
            places[parent, cells[0]] = ""
        elif cells == order or listed:  # by HDF5, in the order of the alphabet; else the numbers are not the order in the stack
            places |= {(parent, cell): f"cells/{k}/" for k, cell in enumerate(order)}
    return places
