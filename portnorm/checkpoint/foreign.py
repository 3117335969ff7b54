"""Layers from weights that other libraries stored: `import_checkpoint`, over the rows of `portnorm.checkpoint.formats`."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import logging
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from typing import Any

import numpy

from portnorm.arrays import load_namespace
from portnorm.cells.variants import Variant, variant_of
from portnorm.checkpoint import containers
from portnorm.checkpoint.containers import Arrays
from portnorm.checkpoint.described import LAYERS
from portnorm.checkpoint.formats import FORMATS as FORMATS
from portnorm.checkpoint.formats import PIECES
from portnorm.checkpoint.formats.row import Read
from portnorm.checkpoint.layers import load
from portnorm.checkpoint.recognise import Fit, backward_key, expanded, fit_of, placed, some, unnamed
from portnorm.checkpoint.stored import Held, Said
from portnorm.errors import CheckpointError, UnsupportedError
from portnorm.layers.layer import Layer
from portnorm.layers.names import in_direction
from portnorm.layers.recurrent import Recurrent
from portnorm.layers.sequential import Sequential

_log = logging.getLogger("portnorm")
_VARIANT_FIELDS = {f.name for f in fields(Variant)}


def import_checkpoint(
    source: str | os.PathLike[str] | Mapping[str, Any] | Any,
    format: str = "auto",  # noqa: A002  # the name that users look for
    *,
    prefix: str = "",
    layer: str | None = None,
    ignore: Collection[str] = (),
    xp: Any = None,
    device: Any = None,
    dtype: Any = None,
    **config: Any,
) -> Layer:
    """The layer whose weights another library stored: normalization layers, LSTM, GRU, RNN, plain or normalized.

    `source` is a file (.safetensors or the index of several, .npz, .h5 and .keras with h5py, .onnx with onnx), a mapping of arrays, nested
    or not, or a `torch.nn.Module`; a file of `save` is read as `load` does. `format` is one of `portnorm.FORMATS`, or `"auto"` for the
    only one that fits; `layer.provenance` then says which it was, and why. `prefix` is the beginning of the names that are meant, such as
    `"encoder.lstm."` (or `"encoder"` for Kiros' `encoder_W`), where the file holds more; only what it names is read. `layer` names the
    class where arrays alone cannot tell, such as `"GroupNorm"`, or the only layer of a class in a file of many. Keys in `ignore` are
    neither asked for nor refused; what they would have given is as in a new layer (statistics that `estimate_population` is to take, for
    example). Settings of the file that a layer cannot have are refused by name; that name in `ignore` leaves them out.

    `config` is what arrays do not say: arguments of the layer (`batch_first=True`, `num_groups=4`) or fields of its `Variant`
    (`zoneout=0.1`, `eps=1e-3`). It goes before what the file says (a Keras configuration, ONNX attributes, a module's own settings), and
    that before the format's defaults, which `provenance` names. Batch statistics that are stored per step set `t_max`, a first state that
    is not 0 makes a layer with `learned_state`. speechbrain's directions share their weights: `bidirectional=True` says that there are two,
    unless a second layer does. Arrays keep their dtype unless `dtype` is given; float8 becomes float32, and bfloat16 too on NumPy and where
    the library does not have it. Raises `CheckpointError`, which names the key, where keys are missing or unknown, shapes do not fit, or
    several formats would; and `UnsupportedError` for an argument that there is not. Pickles (.pt) are refused.

    >>> import numpy as np, portnorm as pn
    >>> keras = {"kernel": np.ones((4, 12)), "recurrent_kernel": np.ones((3, 12)), "bias": np.zeros(12)}
    >>> pn.import_checkpoint(keras, "keras", batch_first=True).params["weight_ih_l0"].shape
    (12, 4)
    """
    if format not in ("auto", *FORMATS):
        raise UnsupportedError(f"`format` is {format!r}; expected 'auto' or one of {', '.join(map(repr, FORMATS))}")
    if not isinstance(prefix, str):
        raise UnsupportedError(f"`prefix` is {prefix!r}; expected a text, '' for all names")
    if isinstance(ignore, str):
        raise UnsupportedError(f"`ignore` is the text {ignore!r}; expected a collection of names: ignore=({ignore!r},)")
    if not isinstance(ignore, Collection) or not all(isinstance(name, str) for name in ignore):
        raise UnsupportedError(f"`ignore` is {ignore!r}; expected a collection of names, () for none")
    where = {"xp": xp, "device": device, "dtype": dtype}
    with containers.opened(source) as held:
        if held.own is not None:
            given = {"format": format != "auto" and format, "ignore": ignore, **config}
            return _own(source, held.own, prefix, layer, [name for name, value in given.items() if value or name in config], where)
        arrays = {key: a for key, a in held.arrays.items() if key.startswith(prefix)}
        alone = held.said_of([prefix], prefix) if held.said_of is not None and not arrays else None
        if alone is not None and (alone.alone is not None or alone.refused):
            return _without_arrays(alone, {**where, "dtype": dtype or "float32"}, config, set(ignore))
        if not arrays:
            begin = held.beginnings(prefix) if held.arrays else []
            known = f"; the keys begin with {', '.join(map(repr, begin[:8]))}{', …' * (len(begin) > 8)}" if begin else ""
            raise CheckpointError(f"no key starts with {prefix!r}{known}" if prefix else "the checkpoint holds no arrays")
        for name, (take_apart, _) in PIECES.items():
            if format in ("auto", name):
                arrays = take_apart(arrays)
        fit = _fit(arrays, prefix, format, layer, set(ignore), held)
        said = held.said_of(fit.keys.values(), prefix) if held.said_of is not None else _only_said(fit, arrays)
        if held.around is not None:
            held.around(said, fit.keys.values(), prefix)
        reader = _Reader(fit, arrays, set(ignore), said)
        made = reader.layer(where, config)
    made.provenance = f"{fit.row.format}: {fit.row.title}, whose keys are {', '.join(sorted({*fit.keys.values()} - reader.left))}"
    made.provenance += "".join(f"; {note}" for note in reader.notes(made))
    if reader.left:
        made.provenance += f"; left out, as `ignore` says: {some(reader.left)}"
    if left := unnamed(fit, arrays):
        made.provenance += f"; no weights of their own, and left out: {some(left)}"
    if held.left_out:
        made.provenance += f"; keys of random generators, which are no weights, were left out: {', '.join(held.left_out)}"
    _log.info("import_checkpoint took %s", made.provenance)
    return made


def _fit(arrays: Arrays, prefix: str, format: str, layer: str | None, ignore: set[str], held: Held) -> Fit:  # noqa: A002
    """The row that explains the arrays: of the format that the file is of, or of another whose recurrent cells no other format has."""
    wanted = held.format if format == "auto" and held.format is not None else format
    try:
        return fit_of(arrays, prefix, wanted, layer, ignore)
    except (CheckpointError, UnsupportedError) as error:
        if wanted == format or not held.because:
            raise
        with contextlib.suppress(CheckpointError, UnsupportedError):
            fit = fit_of(arrays, prefix, "auto", layer, ignore)
            if fit.row.gates:
                return fit
        raise type(error)(f"{error}; {held.because}, another has to be named by `format`") from None


def _own(path: Any, what: str, prefix: str, layer: str | None, given: list[str], where: dict[str, Any]) -> Layer:
    """The layer of a file that portnorm wrote, or the part of it that is meant, as `load` makes it: by the configuration in the file."""
    if given:
        raise UnsupportedError(
            f"{os.fspath(path)!r} is a file of portnorm, whose configuration says what its arrays are, and {', '.join(given)} would say "
            "otherwise; portnorm.load(path) is the layer as it was saved, and the state_dict() of that a mapping without a configuration"
        )
    made: Any = load(path, **where)
    for number in prefix.removesuffix(".").split(".") if prefix else ():
        parts = {str(k): part for k, part in enumerate(made.parts)} if isinstance(made, Sequential) else {}
        if number not in parts:
            known = f"; expected one of the parts {', '.join(repr(f'{k}.') for k in parts)}" if parts else ": it holds one layer"
            raise CheckpointError(f"`prefix` is {prefix!r}, which names no part of {os.fspath(path)!r}, a file of portnorm{known}")
        made = parts[number]
    if layer not in (None, type(made).__name__):
        found = [part for part in made.layers() if type(part).__name__ == layer]
        if len(found) != 1:
            raise CheckpointError(
                f"`layer` is {layer!r}, of which {os.fspath(path)!r}, a file of portnorm, has {len(found)}: it holds {made!r}; "
                "portnorm.load gives all of it"
            )
        (made,) = found
    own: Layer = made
    own.provenance = f"portnorm: {own!r}, as its configuration in the file says; that is of {what}"
    _log.info("import_checkpoint took %s", own.provenance)
    return own


def _without_arrays(said: Said, where: dict[str, Any], config: dict[str, Any], ignore: set[str]) -> Layer:
    """The layer of a module that has neither parameters nor statistics."""
    for name, refusal in said.refused.items():
        if said.alone is None or name not in ignore:
            raise CheckpointError(f"{said.title} has {refusal.why}")
    assert said.layer is not None
    made: Any = LAYERS[said.layer]
    try:
        layer: Layer = made(**{**(said.alone or {}), **config}, **where)
    except TypeError as error:
        raise UnsupportedError(f"{said.title}, which has no arrays, as {said.layer}: {error}") from error
    layer.provenance = f"{said.title}, which has no arrays; said by it: {', '.join(f'{n}={v!r}' for n, v in (said.alone or {}).items())}"
    _log.info("import_checkpoint took %s", layer.provenance)
    return layer


def _only_said(fit: Fit, arrays: Arrays) -> Said:
    """What the file says of the layer that all the arrays belong to."""
    found = {id(said): said for said in (arrays[key].said for key in fit.keys.values())}
    if len(found) > 1:
        titles = " and ".join("arrays of no layer" if said is None else said.title for said in found.values())
        raise CheckpointError(f"the keys {', '.join(map(repr, fit.keys.values()))} belong to more than one layer: {titles}")
    return next(iter(found.values())) or Said("")


class _Reader:
    """Turns the arrays of a fit into a layer."""

    def __init__(self, fit: Fit, arrays: Arrays, ignore: set[str], said: Said):
        self.fit, self.row, self.arrays, self.ignore, self.said = fit, fit.row, arrays, ignore, said
        self.order = fit.row.order
        self.made: type[Layer] = LAYERS[fit.row.layer]
        self.cell = self.made.cell if issubclass(self.made, Recurrent) else None
        self.stated: set[str] = set()
        self.filled: list[str] = []
        self.left = {key for key in arrays if key in ignore}
        """Keys that are not read because the caller said so."""

    def layer(self, where: dict[str, Any], config: dict[str, Any]) -> Layer:
        row = self.row
        self._check_settings(config)
        if row.shared and ({**self.said.values, **config}.get("bidirectional") or self._returns_both()):
            self.fit = replace(self.fit, places=[[place, place] for (place,) in self.fit.places])
        found = {
            (n, d, name): self._array(name, r, place)
            for n, places in enumerate(self.fit.places)
            for d, place in enumerate(places)
            for name, r in row.reads.items()
            if not self._is_left(set(self._originals(r, place)))
        }
        self._check_zero()
        first = self._first()
        if any(numpy.any(a) for a in first.values()):
            found |= first
            config = {"learned_state": True, **config}
        if where["dtype"] is None:
            where["dtype"] = self._dtype(found.values(), where["xp"])
        stated = self._stated()
        self.stated = {*stated, *config}
        recurrent = self.cell is not None
        arguments = self._recurrent(found, {**stated, **config}) if recurrent else self._plain(found, {**stated, **config})
        made: Any = self.made
        try:
            layer: Layer = made(**arguments, **where)
        except TypeError as error:
            if "missing" not in str(error):
                raise
            raise UnsupportedError(f"{row.layer} of format {row.format!r}: {error}; pass what is missing as an argument") from error
        values: dict[str, Any] = layer.state_dict()
        own = {name: tuple(a.shape) for name, a in values.items()}
        has_statistics = any("running" in name for _, _, name in found)
        for (n, d, name), array in found.items():
            full = in_direction(name, n, d) if recurrent else name
            timed = name.partition(".")[2].startswith("running") and recurrent and len(own.get(full, ())) == 2 and array.ndim == 1
            values[full] = array[None, :] if timed else array
            if name in row.reads and row.reads[name].flat and full in own and math.prod(own[full]) == array.size:
                values[full] = values[full].reshape(own[full])
            if own.get(full) != values[full].shape:
                keys = ", ".join(repr(k) for k in self._originals(row.reads[name], self.fit.places[n][d]))
                if full not in own:
                    given = ", ".join(f"{key}={value!r}" for key, value in {**self.said.values, **config}.items())
                    says = f"arrays say what there is: do without what says otherwise of {given}"
                    raise CheckpointError(f"{keys} would be `{full}`, which {layer!r} has not; {says}")
                raise CheckpointError(
                    f"{keys} give `{full}` the shape {values[full].shape}; expected {own.get(full)} for {layer!r} of format {row.format!r}"
                )
        if recurrent:
            self._check_fed(layer, found)
        for name, shape in own.items():
            if name.startswith("num_batches_tracked") and has_statistics:
                values[name] = self._tracked(name, shape)
        self.filled = [name for name in layer.params if not recurrent and (0, 0, name) not in found]
        layer.load_state_dict(values)
        return layer

    def _check_zero(self) -> None:
        for key in self.row.zero:
            original = self.fit.keys.get(key)
            if original is not None and original not in self.ignore and numpy.any(self.arrays[original].weights()):
                raise CheckpointError(
                    f"{original!r} is not 0, and a {self.row.layer} here has no such array; pass ignore=({original!r},) and use it after "
                    "the layer, as that does"
                )

    def _is_left(self, keys: set[str]) -> bool:
        """Whether one of the keys of an array is to be ignored, so that the others are not read either."""
        self.left |= keys & set(self.fit.keys.values()) if keys & self.ignore else set()
        return bool(keys & self.ignore)

    def _check_fed(self, layer: Layer, found: Collection[tuple[int, int, str]]) -> None:
        """Raise where a parameter is in no key, such as those of layers that only an argument speaks of."""
        places = [(n, d) for n, directions in enumerate(self.fit.places) for d in range(len(directions))]
        fed = {in_direction(name, n, d) for n, d, name in found}
        fed |= {in_direction(name, n, d) for n, d in places for name in self.row.reads}  # what is in `ignore` is as in a new layer
        strange = [name for name in layer.params if name not in fed and not name.startswith(("h0", "c0"))]
        if strange:
            raise CheckpointError(
                f"{layer!r} has {', '.join(f'`{n}`' for n in strange[:4])}, for which {self.row.title} has no arrays here"
            )

    def _returns_both(self) -> bool:
        """Whether a second layer takes twice the hidden size, so that there are two directions."""
        read = {name: self.row.reads[name] for name in ("weight_ih", "weight_hh")}
        places = [place for (place,) in self.fit.places[1:2]]
        return any(
            self._array("weight_ih", read["weight_ih"], p).shape[1] == 2 * self._array("weight_hh", read["weight_hh"], p).shape[1]
            for p in places
        )

    def _first(self) -> dict[tuple[int, int, str], Any]:
        """The states before the first step, by place."""
        return {
            (n, d, name): self.arrays[original].read().reshape(-1)
            for n, places in enumerate(self.fit.places)
            for d, place in enumerate(places)
            for key, name in self.row.first.items()
            if (original := self.fit.keys.get(placed(key, place))) is not None and not {original, key} & self.ignore
        }

    # -- what the file says beside the arrays ------------------------------------------------------------------------------------------

    def _check_settings(self, config: Mapping[str, Any]) -> None:
        """Raise where the file has a setting that is not read, or the caller one that there is not."""
        own = {name for name in inspect.signature(self.made).parameters if name != "reduce"}
        fields_ = _VARIANT_FIELDS if self.cell is not None else set()
        for name in config:
            if name not in own | fields_:
                near = difflib.get_close_matches(name, [*own, *fields_], 1)
                hint = f"did you mean {near[0]!r}? There are " if near else "expected one of "
                kinds = f"{self.row.layer}{' and fields of its Variant' if fields_ else ''}"
                raise UnsupportedError(f"`{name}` is no argument of {kinds}; {hint}{', '.join(sorted(own | fields_))}")
        for name, (why, ours, every) in self.said.refused.items():
            said = [o in {*config, *self.row.changes} for o in ours]
            answered = bool(ours) and ((all if every else any)(said) or not any(self._takes(o) for o in ours))
            if name not in self.ignore and not answered:
                instead = f"say {(' and ' if every else ' or ').join(f'{o}=…' for o in ours)} yourself, or " if ours else ""
                raise CheckpointError(f"{self.said.title} has {why}; {instead}pass ignore=({name!r},) where that makes no difference")
        backward = backward_key(self.fit, self.arrays)
        if backward is not None and "direction" not in {**self.said.values, **config}:
            raise CheckpointError(
                f"{backward!r} is the backward direction alone; pass direction='reverse', or take both by a shorter prefix"
            )

    def _stated(self) -> dict[str, Any]:
        """What the file says, but for what this layer has no use for, such as the ε of a cell without a normalizer."""
        plain = self.cell is not None and self.row.norm in (None, "weight")
        useless = {n for n in ("eps", "momentum", "zoneout", "batch_first") if not self._takes(n) or (plain and n in ("eps", "momentum"))}
        return {n: v for n, v in self.said.values.items() if n not in useless}

    def _takes(self, name: str) -> bool:
        """Whether an argument, or a field of a Variant, can be another one than the usual for this layer."""
        if self.cell is None or name not in _VARIANT_FIELDS:
            return name in inspect.signature(self.made).parameters
        return len(self.cell.takes.get(name, (None, None))) > 1

    def notes(self, layer: Layer) -> list[str]:
        """What somebody who uses the layer should know of how it was read."""
        names = ["eps", "momentum", "channel_axis"] if self.cell is None else []
        if isinstance(layer, Recurrent):
            functions = ["activation", *(["gate_activation"] if self._takes("gate_activation") else [])]
            functions += ["reset"] if self._takes("reset") and "reset" not in self.row.changes else []
            names = functions if self.row.format == "keras" or self.row.layer == "RNN" else []
            names += ["runtime_forget_bias"] if layer.variant.runtime_forget_bias else []
            names += ["eps"] if layer.variant.norm not in (None, "weight") else []
        source = layer.variant if isinstance(layer, Recurrent) else layer
        unsaid = [f"{n}={getattr(source, n)!r}" for n in names if n not in self.stated and hasattr(source, n)]
        said = [f"{name}={value!r}" for name, value in self.said.values.items() if name in self.stated]
        found = [f"said beside the arrays: {', '.join(said)}"] if said else []
        found += self.said.notes
        found += [f"not stored, taken as usual there: {', '.join(unsaid)}"] if unsaid else []
        if isinstance(layer, Recurrent) and "batch_first" not in self.stated:
            order = "batch, time" if layer.batch_first else "time, batch"
            found.append(f"not stored: the order of axes; x is ({order}, features), batch_first={not layer.batch_first} makes it the other")
        if any(read.flat for read in self.row.reads.values()) and "normalized_shape" not in self.stated:
            found.append("not stored: how many axes are normalized; normalized_shape=(…) says it")
        found += [f"not stored, so {'1' if name == 'weight' else '0'}: {name}" for name in self.filled]
        return found

    # -- arguments of the layers -----------------------------------------------------------------------------------------------------

    def _dtype(self, found: Collection[Any], xp: Any) -> str:
        """That of the arrays; bfloat16 where all are and the namespace has it, as NumPy's has not."""
        stored = {self.arrays[key].dtype for key in self.fit.keys.values()}
        if stored == {"bfloat16"} and hasattr(load_namespace(xp), "bfloat16"):
            return "bfloat16"
        floating = [a for a in found if a.dtype.kind == "f"]
        return numpy.result_type(*floating).name if floating else "float32"

    def _recurrent(self, found: Mapping[tuple[int, int, str], Any], config: dict[str, Any]) -> dict[str, Any]:
        row, cell = self.row, self.made
        assert issubclass(cell, Recurrent)
        names = {name for _, _, name in found}
        for side in ("weight_ih", "weight_hh"):
            if not {(0, 0, side), (0, 0, f"{side}.v")} & found.keys():
                raise CheckpointError(f"`{side}` cannot be left out, by `ignore` or otherwise: it gives the layer its size")
        rows, outputs = found[0, 0, "weight_hh" if "weight_hh" in names else "weight_hh.v"].shape
        hidden = rows // len(row.gates)
        inputs = found[0, 0, "weight_ih" if "weight_ih" in names else "weight_ih.v"].shape[-1]
        variant = variant_of(row.norm, row.layer, cell.cell.takes)
        before = {name: value for name, value in self.said.defaults.items() if self._takes(name)}
        changes = {**before, **row.changes, **{name: config.pop(name) for name in list(config) if name in _VARIANT_FIELDS}}
        norm: Any = replace(variant, **changes) if changes else row.norm
        by_step = [name for name, read in row.reads.items() if name.endswith("running_mean") and read.at is None]
        steps = [a.shape[0] for (_, _, name), a in found.items() if name in by_step and a.ndim == 2]
        if variant.timed and "t_max" not in config:
            config["t_max"] = max(steps, default=1)
        if "weight_hr" in names:
            config["proj_size"] = outputs
        sizes = {"num_layers": len(self.fit.places), "bidirectional": len(self.fit.places[0]) == 2}
        return {"input_size": inputs, "hidden_size": hidden, "norm": norm, **sizes, **row.config, "rng": 0, **config}

    def _plain(self, found: Mapping[tuple[int, int, str], Any], config: dict[str, Any]) -> dict[str, Any]:
        """What the shapes say of a layer that is not recurrent."""
        shape = next((found[0, 0, name].shape for name in ("weight", "bias", "running_mean", "running_var") if (0, 0, name) in found), None)
        if shape is None:
            raise CheckpointError(f"{', '.join(sorted(self.fit.keys.values()))}: all are in `ignore`; expected one that gives the size")
        rest = {**self.row.config, **config}
        if self.row.layer == "Linear":
            if len(shape) != 2:
                raise CheckpointError(f"`weight` has shape {shape}; expected a matrix")
            return {"in_features": shape[1], "out_features": shape[0], "bias": (0, 0, "bias") in found, **rest}
        if self.row.layer == "Embedding":
            return {"num_embeddings": shape[0], "embedding_dim": shape[1], **rest}
        if self.row.layer in ("LayerNorm", "RMSNorm"):
            return {"normalized_shape": shape, **rest}
        return {"num_features": shape[0] if shape else 0, **rest}

    # -- arrays ----------------------------------------------------------------------------------------------------------------------

    def _originals(self, read: Read, place: str) -> list[str]:
        names = [name for key in read.keys for name in expanded(key, place, self.fit.keys)]
        return [self.fit.keys.get(name, name) for name in names]

    def _tracked(self, name: str, shape: tuple[int, ...]) -> Any:
        original = self.fit.keys.get(name)
        return self.arrays[original].read() if original is not None else numpy.ones(shape, dtype=int)

    def _array(self, name: str, read: Read, place: str) -> Any:
        """The array that a row's entry describes, in our layout; rows lie one after the other, as matrix products read them fastest."""
        keys = self._originals(read, place)
        found = [self.arrays[key].weights() for key in keys]
        columns = sum(a.shape[1] for a in found if a.ndim == 2)
        pieces = [self._piece(a, key, read, columns // max(1, len(self.order))) for key, a in zip(keys, found, strict=True)]
        if read.join is not None:
            array = self._joined(read, pieces, keys)
        elif len(pieces) == 1:
            array = pieces[0]
        elif "{t}" in read.keys[0]:
            array = numpy.stack(pieces)
        else:
            try:
                array = numpy.concatenate(pieces, axis=-1 if read.transposed else 0)
            except ValueError as error:
                raise CheckpointError(f"{', '.join(map(repr, keys))} do not go together: {error}") from error
        if read.by_gate:
            array = self._in_our_order(array, 0 if name.startswith("weight") and not read.transposed else -1, keys[0])
        array = array.T if read.transposed else array
        if read.candidate:
            array = numpy.concatenate([numpy.zeros((len(self.order) - 1) * array.shape[0], array.dtype), array])
        try:
            return numpy.asarray(read.then(array) if read.then is not None else array, order="C")
        except (ValueError, IndexError) as error:
            raise CheckpointError(f"{', '.join(map(repr, keys))} have a shape that does not fit: {error}") from error

    def _joined(self, read: Read, pieces: list[Any], keys: list[str]) -> Any:
        assert read.join is not None
        try:
            return read.join(*pieces)
        except (ValueError, IndexError) as error:
            shapes = " and ".join(str(piece.shape) for piece in pieces)
            raise CheckpointError(f"{', '.join(map(repr, keys))} have the shapes {shapes}, which do not go together: {error}") from error

    def _piece(self, array: Any, key: str, read: Read, hidden: int) -> Any:
        if array.size == 0:
            raise CheckpointError(f"{key!r} has shape {array.shape} and no entries; expected weights")
        if read.at is not None:
            count = read.among or 1 + max(r.at or 0 for r in self.row.reads.values() if r.keys == read.keys)
            if array.ndim < 2 or array.shape[0] != count:
                raise CheckpointError(f"{key!r} has shape {array.shape}; expected {count} row{'s' * (count > 1)} of numbers")
            array = array[read.at]
        if (read.part is not None or read.transposed) and array.ndim != 2:
            raise CheckpointError(f"{key!r} has shape {array.shape}; expected a matrix")
        if read.part is not None:
            if not 0 < hidden < array.shape[0]:
                raise CheckpointError(
                    f"{key!r} has shape {array.shape}; expected inputs + hidden rows, where hidden is {hidden} by the columns"
                )
            array = array[:-hidden] if read.part == "input" else array[-hidden:]
        return array

    def _in_our_order(self, array: Any, axis: int, key: str) -> Any:
        gates = len(self.row.gates)
        if array.ndim == 0 or array.shape[axis] % gates:
            raise CheckpointError(f"{key!r} has shape {array.shape}, which is not {gates} gates along axis {axis}")
        blocks = numpy.split(array, gates, axis=axis)
        return numpy.concatenate([blocks[self.row.gates.index(gate)] for gate in self.order], axis=axis)
