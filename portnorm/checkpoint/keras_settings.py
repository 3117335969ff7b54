"""What the configuration of a Keras layer says, in the words of portnorm: every setting is read, means nothing here, or is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from portnorm.checkpoint.stored import Refusal, Said

Version = tuple[int, ...]
Reading = Callable[[Any, "Reader"], None]

CELLS = {"LSTMCell": "LSTM", "GRUCell": "GRU", "SimpleRNNCell": "RNN"}
RECURRENT = {"LSTM": "LSTM", "GRU": "GRU", "SimpleRNN": "RNN", "CuDNNLSTM": "LSTM", "CuDNNGRU": "GRU"}
NORMS = {
    "BatchNormalization": "BatchNorm",
    "LayerNormalization": "LayerNorm",
    "GroupNormalization": "GroupNorm",
    "RMSNormalization": "RMSNorm",
}


class Reader:
    """Collects what the settings of one layer say."""

    def __init__(self, title: str, version: Version, shape: Any, before: int):
        self.said, self.version, self.shape, self.before = Said(title), version, shape, before

    def refuse(self, name: str, why: str, *ours: str) -> None:
        self.said.refused[name] = Refusal(why, ours)

    def read(self, config: Mapping[str, Any], table: Mapping[str, Reading]) -> None:
        for name, value in config.items():
            if name in table:
                table[name](value, self)
            elif name not in _INERT and not name.endswith(_INERT_ENDINGS) and value is not None:
                self.refuse(name, f"{name}={value!r}, which is not known here")


def said_of(layer: Mapping[str, Any], version: Version, title: str, before: int = 0) -> Said:
    """What the configuration of a layer, as Keras writes it, says; it may not see some axes, which come before those that it does."""
    kind, config = _kind(layer), dict(layer.get("config") or {})
    if kind == "TimeDistributed" and isinstance(config.get("layer"), Mapping):
        return said_of({**config["layer"], "inbound_nodes": layer.get("inbound_nodes")}, version, title, before + 1)
    reader = Reader(f"{title} of the class {kind}", version, (layer.get("build_config") or {}).get("input_shape"), before)
    reader.said.kind = kind
    if kind == "Bidirectional" and isinstance(config.get("layer"), Mapping):
        _bidirectional(config, reader)
    elif kind in RECURRENT or kind == "RNN":
        _recurrent(layer, reader)
    elif kind in NORMS:
        reader.said.layer = NORMS[kind]
        reader.read(config, _NORM[kind])
    elif kind == "Dense":
        reader.said.layer = "Linear"
        reader.read(config, _DENSE)
    else:
        _no_class(reader)
    if before:
        _each_step(kind, reader)
    _called(kind, layer.get("inbound_nodes") or [], reader)
    return reader.said


def _each_step(kind: str, reader: Reader) -> None:
    """What is different where a TimeDistributed calls the layer for each step."""
    if kind == "GroupNormalization":
        why = "a TimeDistributed around it, so that each step is normalized alone, where a GroupNorm here takes all but the batch"
        reader.refuse("TimeDistributed", f"{why}: make that axis one with the batch")
    elif kind == "BatchNormalization":
        reader.said.notes.append("TimeDistributed takes the statistics of each step apart in training, a BatchNorm here those of all")
    elif reader.said.layer in RECURRENT.values():
        reader.said.notes.append("TimeDistributed calls it for each entry of axis 1: make that axis one with the batch")


def _called(kind: str, nodes: Iterable[Any], reader: Reader) -> None:
    """How a functional model calls the layer, where that changes what it computes."""
    recurrent = reader.said.layer in RECURRENT.values()
    for node in nodes:
        if isinstance(node, Mapping):
            args, given = list(node.get("args") or []), dict(node.get("kwargs") or {})
        else:  # before Keras 3: [layer, node, tensor, arguments] for each input
            args = [entry for entry in node if isinstance(entry, list)] if isinstance(node, list) else []
            given = {name: value for entry in args if isinstance(entry[-1], Mapping) for name, value in entry[-1].items()}
        given = dict(zip(("inputs", "initial_state", "mask"), args, strict=False)) | given if recurrent else given
        for name, ours in (("initial_state", "state"), ("mask", "mask")):
            note = f"the model calls it with {name}, which a call here takes as `{ours}`"
            if recurrent and given.get(name) is not None and note not in reader.said.notes:
                reader.said.notes.append(note)
        if kind == "BatchNormalization" and given.get("training") is True:
            reader.refuse("training", "a call with training=True, which takes the statistics of the batch in evaluation too")


def _kind(layer: Mapping[str, Any]) -> str:
    """The class of a layer; one that is not Keras' own may have the name of one that is."""
    kind, module = str(layer.get("class_name")), layer.get("module", "keras")
    own = isinstance(module, str) and module.partition(".")[0] in ("keras", "keras_core", "tensorflow", "tf_keras")
    return kind if own and layer.get("registered_name") is None else f"{kind} (not Keras' own)"


def _no_class(reader: Reader) -> None:
    reader.refuse("class_name", f"a class that is not read; expected {', '.join((*RECURRENT, 'RNN', 'Bidirectional', *NORMS))} or Dense")


def no_class(title: str, kind: str) -> Said:
    """What is said of a layer of a class that is not read."""
    reader = Reader(f"{title} of the class {kind}", (), None, 0)
    reader.said.kind = kind
    _no_class(reader)
    return reader.said


# -- recurrent layers ----------------------------------------------------------------------------------------------------------------------


def _recurrent(layer: Mapping[str, Any], reader: Reader) -> None:
    kind, config = _kind(layer), dict(layer.get("config") or {})
    reader.said.values |= {"batch_first": True, "direction": "forward"}
    if config.get("zero_output_for_mask") and config.get("return_sequences"):
        why = "zero_output_for_mask=True; a layer here repeats its last result at steps that `mask` leaves out"
        reader.refuse("zero_output_for_mask", why)
    if kind in RECURRENT:
        reader.said.layer = RECURRENT[kind]
        reader.read(config, _SEQUENCE | _CELL)
        _old_reset(kind, config, reader)
        return
    if kind != "RNN":
        return _no_class(reader)
    reader.read({name: value for name, value in config.items() if name != "cell"}, _SEQUENCE)
    cell = config.get("cell") or {}
    stacked = _kind(cell) == "StackedRNNCells"
    cells = (cell.get("config") or {}).get("cells", []) if stacked else [cell]
    kinds = {_kind(c) for c in cells}
    if len(kinds) != 1 or not kinds <= set(CELLS):
        reader.refuse("cell", f"cells of the classes {', '.join(sorted(kinds))}; expected one of {', '.join(CELLS)} for all")
        return
    settings = [dict(c.get("config") or {}) for c in cells]
    for name in _differing(settings, _CELL):
        reader.refuse(name, f"cells whose {name} differ: {', '.join(repr(s.get(name)) for s in settings)}", *_OURS.get(name, ()))
    (kind,) = kinds
    reader.said.layer = CELLS[kind]
    reader.read(settings[0], _CELL)
    _old_reset(kind, settings[0], reader)


def _old_reset(kind: str, config: Mapping[str, Any], reader: Reader) -> None:
    """Before there was `reset_after`, a GRU reset before its matrix product."""
    if kind in ("GRU", "GRUCell") and "reset_after" not in config:
        reader.said.defaults["reset"] = "before"


def _bidirectional(config: dict[str, Any], reader: Reader) -> None:
    forward, backward = config["layer"], config.get("backward_layer")
    _recurrent(forward, reader)
    reader.said.refused.pop("zero_output_for_mask", None)  # as both directions have it in every Bidirectional, and here
    if reader.said.values.pop("direction", "forward") != "forward":
        reader.refuse("go_backwards", "a forward layer with go_backwards=True")
    if isinstance(backward, Mapping):
        if _kind(backward) != _kind(forward):
            reader.refuse("backward_layer", f"a backward layer of the class {_kind(backward)}")
        sides = [dict(side.get("config") or {}) for side in (forward, backward)]
        if not sides[1].get("go_backwards", True):
            reader.refuse("go_backwards", "a backward layer with go_backwards=False")
        for name in _differing(sides, {**_SEQUENCE, **_CELL, "cell": _inert}):
            if name != "go_backwards":
                reader.refuse(
                    name, f"directions whose {name} differ: {sides[0].get(name)!r} and {sides[1].get(name)!r}", *_OURS.get(name, ())
                )
    own = {name: value for name, value in config.items() if name not in ("layer", "backward_layer")}
    reader.read(own, {"merge_mode": _merge_mode, "dtype": _dtype})


def _differing(settings: list[dict[str, Any]], names: Iterable[str]) -> list[str]:
    return [name for name in names if name != "dtype" and any(s.get(name) != settings[0].get(name) for s in settings)]


def _inert(value: Any, reader: Reader) -> None:
    """What makes no difference to what a trained layer computes, or what the arrays themselves say."""


def _function(name: str, ours: str) -> Reading:
    def read(value: Any, reader: Reader) -> None:
        known = {"tanh": "tanh", "relu": "relu", "sigmoid": "sigmoid"}
        known["hard_sigmoid"] = "hard_sigmoid_6" if reader.version >= (3,) else "hard_sigmoid_5"
        if isinstance(value, Mapping) and str(value.get("module") or "keras").startswith("keras") and isinstance(value.get("config"), str):
            value = value["config"]
        if isinstance(value, str) and value in known:
            reader.said.values[ours] = known[value]
        else:
            shown = value.get("config", value.get("class_name")) if isinstance(value, Mapping) else value or "linear"
            reader.refuse(name, f"{name}={shown!r}; expected one of {', '.join(map(repr, known))}", ours)

    return read


def _only(name: str, *allowed: Any) -> Reading:
    def read(value: Any, reader: Reader) -> None:
        if value not in allowed:
            reader.refuse(name, f"{name}={value!r}; expected {' or '.join(map(repr, allowed))}")

    return read


def _noted(text: str) -> Reading:
    def read(value: Any, reader: Reader) -> None:
        if value:
            reader.said.notes.append(text.format(value))

    return read


def _merge_mode(value: Any, reader: Reader) -> None:
    if value != "concat":
        reader.refuse("merge_mode", f"merge_mode={value!r}; a layer here gives both directions side by side, which is 'concat'")


def _go_backwards(value: Any, reader: Reader) -> None:
    if value:
        reader.said.values["direction"] = "backwards"


def _say(ours: str, of: Callable[[Any], Any] = lambda value: value) -> Reading:
    return lambda value, reader: reader.said.values.update({ours: of(value)})


_INERT_ENDINGS = ("_initializer", "_regularizer", "_constraint")
_INERT = {"name", "trainable", "seed", "batch_input_shape", "batch_shape", "input_shape", "input_dim", "input_length", "units", "use_bias"}


def _dtype(value: Any, reader: Reader) -> None:
    name = (value.get("config") or {}).get("name", "?") if isinstance(value, Mapping) else value
    if name is not None and str(name).removeprefix("mixed_") not in ("float16", "bfloat16", "float32", "float64"):
        reader.refuse("dtype", f"dtype={name!r}; expected a floating-point type")


_SEQUENCE: dict[str, Reading] = {
    "dtype": _dtype,
    "return_sequences": _say("return_sequences", bool),
    "return_state": _inert,
    "go_backwards": _go_backwards,
    "stateful": _noted("stateful=True: a call here starts from zeros unless it is given the `state` of the call before"),
    "unroll": _inert,
    "time_major": _say("batch_first", lambda value: not value),
    "zero_output_for_mask": _inert,
    "implementation": _inert,
}


def _recurrent_dropout(value: Any, reader: Reader) -> None:
    """One mask for a sequence, as here, where there is one gate; cells with several have a mask for each."""
    if value and reader.said.layer == "RNN":
        reader.said.values["recurrent_dropout"] = float(value)
    elif value:
        reader.said.notes.append(f"recurrent_dropout={value}, which is for training and masks h for each gate apart, is left out")


_CELL: dict[str, Reading] = {
    "dtype": _dtype,
    "activation": _function("activation", "activation"),
    "recurrent_activation": _function("recurrent_activation", "gate_activation"),
    "unit_forget_bias": _inert,
    "implementation": _inert,
    "dropout": _noted("dropout={}, which is for training, is left out"),
    "recurrent_dropout": _recurrent_dropout,
    "reset_after": _say("reset", lambda value: "after" if value else "before"),
}
_OURS = {"activation": ("activation",), "recurrent_activation": ("gate_activation",), "reset_after": ("reset",)}

# -- norms and Dense -----------------------------------------------------------------------------------------------------------------------


def _axes(value: Any, reader: Reader) -> list[int] | None:
    """The axes, from the end, where the configuration says how many there are; `None` where it does not."""
    axes = [int(a) for a in value] if isinstance(value, list | tuple) else [int(value)]
    if any(a >= 0 for a in axes):
        if not isinstance(reader.shape, list | tuple):
            return None
        axes = [a - len(reader.shape) if a >= 0 else a for a in axes]
    return axes


def _last_axes(value: Any, reader: Reader) -> None:
    axes = _axes(value, reader)
    if axes is None or axes != list(range(-len(axes), 0)):
        known = "" if axes is not None else " of an input of unknown shape"
        reader.refuse("axis", f"axis={value!r}{known}; expected the last axes")


def _channel_axis(value: Any, reader: Reader) -> None:
    axes = [int(a) for a in value] if isinstance(value, list | tuple) else [int(value)]
    if len(axes) != 1:
        reader.refuse("axis", f"axis={value!r}; expected one axis", "channel_axis")
    else:
        reader.said.values["channel_axis"] = axes[0] + (reader.before if axes[0] >= 0 else 0)


def _groups(value: Any, reader: Reader) -> None:
    if value != -1:
        reader.said.values["num_groups"] = int(value)
    else:
        reader.refuse("groups", "groups=-1, a group for each channel; expected their number", "num_groups")


_AFFINE: dict[str, Reading] = {"dtype": _dtype, "epsilon": _say("eps", float), "center": _inert, "scale": _inert}
_NORM: dict[str, dict[str, Reading]] = {
    "BatchNormalization": {
        **_AFFINE,
        "axis": _channel_axis,
        "momentum": _say("momentum", lambda value: round(1.0 - float(value), 12)),
        "renorm": _only("renorm", False, None),
        "renorm_momentum": _inert,
        "renorm_clipping": _inert,
        "virtual_batch_size": _only("virtual_batch_size", None),
        "adjustment": _only("adjustment", None),
        "mode": _only("mode", 0),
        "fused": _inert,
        "synchronized": _inert,
    },
    "LayerNormalization": {**_AFFINE, "axis": _last_axes, "rms_scaling": _only("rms_scaling", False)},
    "GroupNormalization": {**_AFFINE, "axis": _channel_axis, "groups": _groups},
    "RMSNormalization": {**_AFFINE, "axis": _last_axes},
}


def _linear(value: Any, reader: Reader) -> None:
    if value not in (None, "linear"):
        reader.refuse("activation", f"activation={value!r}, which a Linear does not have: it is to be applied to its result")


_DENSE: dict[str, Reading] = {"dtype": _dtype, "activation": _linear}
