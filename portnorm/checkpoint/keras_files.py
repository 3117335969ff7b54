"""HDF5 files, and what Keras writes into them: names of variables, its version, and the configuration of each layer."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy

from portnorm.arrays import require_extra
from portnorm.checkpoint.keras_settings import RECURRENT, Version, no_class, said_of
from portnorm.checkpoint.stored import Held, NumPyArray, Refusal, Said, Stored
from portnorm.errors import CheckpointError

_HARD = {"gate_activation": "hard_sigmoid_5"}
_CHANGED = {"recurrent_activation": ("gate_activation", "hard_sigmoid", "sigmoid"), "reset_after": ("reset", False, True)}
"""Settings whose default TensorFlow 2 changed: what says it here, and the default before and since."""
_VARIABLE = re.compile(r"(.*)/vars/(\d+)")


def archive(file: Any, members: zipfile.ZipFile, path: str) -> Held:
    """A `.keras` file: `file` is its weights."""
    config = _json(members.read("config.json"), path)
    metadata = _json(members.read("metadata.json"), path) if "metadata.json" in members.namelist() else {}
    return _held(file, config, _version(metadata.get("keras_version", "3")), None, path)


def hdf5(file: Any, path: str) -> Held:
    """An HDF5 file of Keras, old or new, or of anybody else."""
    inner = file.get("model_weights")
    written = file.attrs.get("keras_version", None if inner is None else inner.attrs.get("keras_version"))
    config = file.attrs.get("model_config")
    if config is not None:
        return _held(file, _json(config, path), _version(written or "2"), None, path)
    return _held(file, None, (), _unsaid(_text(written)) if written is not None else None, path)


def _unsaid(written: str) -> Said | None:
    """What weights without a configuration meant where nobody said otherwise: the gates of Keras before 2.3 were hard sigmoids, and before
    TensorFlow 2 a GRU reset before its matrix product.
    """
    version, tensorflow = _version(written), "tf" in written
    if version >= (2, 4) or (tensorflow and version >= (2, 3)):
        return None
    said = Said(f"the file of Keras {written}, which has no configuration,")
    if tensorflow and version >= (2, 2):
        for name, (ours, old, new) in _CHANGED.items():
            why = f"no {name}: it was {old!r} in TensorFlow 1 and {new!r} in TensorFlow 2, and both wrote this version"
            said.refused[name] = Refusal(why, (ours,))
    else:
        said.defaults = {"reset": "before", **(_HARD if version < (2, 3) else {})}
    return said


def _held(file: Any, config: Any, version: Version, said: Said | None, path: str) -> Held:
    held, names = Held({}), _Names(file)
    known: dict[int, Said] = {}
    layers: dict[str, Mapping[str, Any]] = {}
    ways: dict[str, list[_Within]] = {}
    for key, dataset in _in_order(file, dict(_datasets(file))).items():
        own = said
        if config is not None:
            way = _way(config, names.of(key), key.split("/"))
            if way:
                layers[key] = layer = way[-1].layer
                if id(layer) not in known:
                    known[id(layer)] = said_of(layer, version, f"{path!r}: the layer {_name(layer)!r}")
                own = known[id(layer)]
                key = _in_direction(key, layer)
                ways[key] = way
        held.arrays[key] = _stored(key, dataset, own, path)
    _call(held.arrays, layers, names, path)
    if ways:
        held.around = lambda said, keys, prefix: _around(said, keys, prefix, held.arrays, ways)
    keras = config is not None or said is not None or "keras_version" in file.attrs or "layer_names" in file.attrs
    held.format = "keras" if keras or any(_VARIABLE.fullmatch(f"/{key}") for key in held.arrays) else None
    return held


def _datasets(group: Any, prefix: str = "", seen: frozenset[int] = frozenset()) -> Iterator[tuple[str, Any]]:
    """(name, dataset) of all that is below a group; a link into another file is an error when it is asked for."""
    h5py = require_extra("h5py", "import")
    for name in group:
        link = group.get(name, getlink=True)
        entry = None if isinstance(link, h5py.ExternalLink) else group.get(name)
        if isinstance(entry, h5py.Group):
            address = int(h5py.h5o.get_info(entry.id).addr)
            if address not in seen:
                yield from _datasets(entry, f"{prefix}{name}/", seen | {address})
        else:
            yield f"{prefix}{name}", entry


def _in_order(file: Any, found: dict[str, Any]) -> dict[str, Any]:
    """The datasets in the order of the layers' weights, which old files keep beside them."""
    order: dict[str, None] = {}

    def visit(name: str, group: Any) -> None:
        for weight in group.attrs.get("weight_names", ()):
            order[f"{name}/{_text(weight)}"] = None

    file.visititems(visit)
    return {key: found[key] for key in (*(k for k in order if k in found), *(k for k in found if k not in order))}


def _stored(key: str, dataset: Any, said: Said | None, path: str) -> Stored:
    if dataset is None or not hasattr(dataset, "shape") or dataset.is_virtual or dataset.external:
        return Stored.unreadable(key, f"{path!r}: {key!r} is a link, or lies in another file; expected an array in this one", said)
    halves = dataset.dtype.kind == "V" and dataset.dtype.itemsize == 2 and _text(dataset.attrs.get("dtype", "")) == "bfloat16"

    def load() -> NumPyArray:
        array: NumPyArray = dataset[()]
        return (array.view(numpy.uint16).astype(numpy.uint32) << 16).view(numpy.float32) if halves else array

    return Stored(key, lambda: (dataset.shape or (), "bfloat16" if halves else dataset.dtype.name), load, said=said)


# -- names ---------------------------------------------------------------------------------------------------------------------------------


class _Name(NamedTuple):
    """What a group of the file is called."""

    text: str
    own: bool
    """Whether that is the layer's own name, and not its class and number."""


class _Names:
    """The names on the way to a variable, from the outside in."""

    def __init__(self, file: Any):
        self.file = file
        self.known: dict[str, str | None] = {}

    def of(self, key: str) -> list[_Name]:
        parts = key.split("/")
        numbered = _VARIABLE.fullmatch(key) is not None  # since then groups are called by class and number
        groups = ["/".join(parts[:k]) for k in range(1, len(parts) - numbered)]
        said = [self.known.setdefault(group, self._said(group)) for group in groups]
        return [_Name(own or group.rpartition("/")[2], own is not None or not numbered) for own, group in zip(said, groups, strict=True)]

    def _said(self, group: str) -> str | None:
        variables = self.file.get(f"{group}/vars")
        said = None if variables is None else variables.attrs.get("name")
        return None if said is None else _text(said)


def _layers(model: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    """The layers of a model; `None` for what is no model."""
    config = model.get("config")
    found = config if isinstance(config, list) else config.get("layers") if isinstance(config, Mapping) else None
    return [layer for layer in found if isinstance(layer, Mapping)] if isinstance(found, list) else None


def _name(layer: Mapping[str, Any]) -> str:
    config = layer.get("config")
    return str(config.get("name") if isinstance(config, Mapping) else layer.get("name"))


class _Within(NamedTuple):
    """A layer, or a model, in a model."""

    model: Mapping[str, Any]
    layer: Mapping[str, Any]
    group: str
    """What the keys of its arrays begin with."""


def _way(model: Mapping[str, Any], names: list[_Name], parts: list[str], start: int = 0) -> list[_Within]:
    """From the outside in to the layer that the outermost of these names is of: its own, or what Keras calls the n-th layer of a class."""
    layers, numbered = _layers(model) or [], _Numbered()
    known = {_Name(numbered(layer), own=False): layer for layer in layers} | {_Name(_name(layer), own=True): layer for layer in layers}
    for k, name in enumerate(names[start:], start):
        if name in known:
            layer = known[name]
            here = [_Within(model, layer, "/".join(parts[: k + 1]))]
            inner = [] if _layers(layer) is None else _way(layer, names, parts, k + 1)
            return here + inner if inner or _layers(layer) is None else []
    return []


_NOTHING = {"InputLayer", "Dropout", "GaussianNoise", "GaussianDropout", "AlphaDropout", "ActivityRegularization", "Identity"}
"""What computes nothing in evaluation, beside the kinds of SpatialDropout."""


def _computes(layer: Mapping[str, Any]) -> bool:
    kind, config = str(layer.get("class_name")), layer.get("config") or {}
    linear = kind == "Activation" and isinstance(config, Mapping) and config.get("activation") == "linear"
    return not (kind in _NOTHING or kind.startswith("SpatialDropout") or linear)


def _masks(layer: Mapping[str, Any]) -> bool:
    """Whether the layers behind it leave out steps."""
    config = layer.get("config") or {}
    return layer.get("class_name") == "Masking" or (isinstance(config, Mapping) and bool(config.get("mask_zero")))


def _around(said: Said, keys: Collection[str], prefix: str, arrays: Mapping[str, Stored], ways: Mapping[str, list[_Within]]) -> None:
    """What the models around a layer compute beside it is refused where it is all that was asked for of a sequential one, else a note."""
    way = next((ways[key] for key in keys if key in ways), [])
    alone = all(key in ways and ways[key][-1].layer is way[-1].layer for key in arrays if key.startswith(prefix)) if way else False
    for model, layer, group in reversed(way):
        layers, kind = _layers(model) or [], str(model.get("class_name"))
        at = next(k for k, other in enumerate(layers) if other is layer)
        for other in layers[:at] if layer is way[-1].layer and said.layer in RECURRENT.values() else ():
            if _masks(other):
                said.notes.append(f"the model calls it with the mask of its {other.get('class_name')}, which a call here takes as `mask`")
        if len(prefix.rstrip("/")) >= len(group):
            return
        beside = list(dict.fromkeys(str(other.get("class_name")) for other in layers if other is not layer and _computes(other)))
        if beside and alone and kind == "Sequential":
            why = f"{', '.join(beside)} beside it in the Sequential, which would be left out; prefix={group + '/'!r} names it alone"
            said.refused[beside[0]] = Refusal(why)
        elif beside:
            said.notes.append(f"of the {kind} around it {', '.join(beside)} and how they are joined are not read")


def _in_direction(key: str, layer: Mapping[str, Any]) -> str:
    """A key whose names say that a layer goes backward, as they do where Keras itself makes the second layer of a Bidirectional."""
    backward = (layer.get("config") or {}).get("backward_layer")
    name = _name(backward) if layer.get("class_name") == "Bidirectional" and isinstance(backward, Mapping) else ""
    head, found, tail = key.rpartition(f"/{name}/")
    return f"{head}/backward_{name}/{tail}" if name and found and not name.startswith("backward_") else key


class _Numbered:
    """`lstm`, `lstm_1`, … for the layers of a class in their order."""

    def __init__(self) -> None:
        self.count: dict[str, int] = {}

    def __call__(self, layer: Mapping[str, Any]) -> str:
        name = re.sub(r"([a-z])([A-Z])", r"\1_\2", re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", str(layer.get("class_name")))).lower()
        number = self.count[name] = self.count.get(name, -1) + 1
        return name if number == 0 else f"{name}_{number}"


_VARIABLES = {
    "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "layer_normalization": ("gamma", "beta"),
    "group_normalization": ("gamma", "beta"),
    "rms_normalization": ("scale",),
}
"""Variables of layers whose arrays alone do not say which they are, in their order."""


_READ = {"dense", "lstm_cell", "gru_cell", "simple_rnn_cell", *_VARIABLES}
_OTHERS = re.compile(r"(\w+_)?(embedding|attention|conv\w*)|einsum_dense|p_re_lu|(spectral_)?normalization")
"""What Keras calls layers with variables that are not read, where these may look like some that are."""


def _other_class(parent: str, name: str) -> str | None:
    """The class, as groups have it, of a layer that is not read. Those in lists are called by it; others by an attribute, or a name."""
    group, *outer = (part for part in reversed(parent.split("/")))
    kinds = [re.sub(r"_\d+$", "", called) for called in (group, name)]
    if outer[:1] == ["layers"]:
        return kinds[0] if kinds[0] not in _READ else None
    return None if _READ.intersection(kinds) else next((kind for kind in kinds if _OTHERS.fullmatch(kind)), None)


def _call(arrays: dict[str, Stored], layers: Mapping[str, Mapping[str, Any]], own: _Names, path: str) -> None:
    """Give the numbered variables of norms their names: by the configuration, or by how many there are."""
    groups: dict[str, list[int]] = {}
    for key in arrays:
        if match := _VARIABLE.fullmatch(key):
            groups.setdefault(match[1], []).append(int(match[2]))
    for parent, numbers in groups.items():
        keys = [f"{parent}/vars/{n}" for n in sorted(numbers)]
        layer = layers.get(keys[0])
        if layer is None and (other := _other_class(parent, own.of(keys[0])[-1].text)) is not None:
            unread = no_class(f"{path!r}: the layer {parent!r}", other)
            for key in keys:
                arrays[key].said = unread
        while layer is not None and layer.get("class_name") == "TimeDistributed":
            layer = layer["config"]["layer"]
        said = [_Numbered()(layer)] if layer is not None else [own.of(keys[0])[-1].text, parent.rpartition("/")[2]]
        kind = next((k for k in (re.sub(r"_\d+$", "", name) for name in said) if k in _VARIABLES), said[0])
        names = _VARIABLES.get(kind, ())
        if layer is not None:
            config = layer.get("config") or {}
            without = {"gamma": not config.get("scale", True), "beta": not config.get("center", True)}
            names = tuple(name for name in names if not without.get(name))
        elif len(keys) == 2 and kind == "batch_normalization":
            names = names[2:]
        if len(names) == len(keys):
            for key, name in zip(keys, names, strict=True):
                arrays[key].called = name
        elif names:
            for key in keys:
                arrays[key].problem = (
                    f"{key!r} is one of {len(keys)} arrays of a {kind}, and the file does not say whether it has {' or '.join(names[:2])}; "
                    "one with the configuration does, as model.save writes it for sequential and functional models"
                )


# -- text ----------------------------------------------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _json(text: Any, path: str) -> Any:
    try:
        found = json.loads(_text(text))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path!r} is damaged: its configuration is no JSON ({error})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path!r} is damaged: its configuration is no map")
    return found


def _version(written: Any) -> Version:
    return tuple(int(n) for n in re.findall(r"\d+", _text(written).partition("-")[0])[:3])
