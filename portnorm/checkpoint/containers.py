"""Arrays by name out of a file of any kind that cannot run code: safetensors, npz, HDF5 and Keras files, and the nodes of an ONNX model.

Nothing is read here but names, shapes and settings; arrays are read when the layer is made.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy

from portnorm.arrays import require_extra, to_numpy
from portnorm.checkpoint import keras_files, safetensors
from portnorm.checkpoint.described import OWN_KEY
from portnorm.checkpoint.stored import Held, NumPyArray, Stored
from portnorm.checkpoint.training import TRAINING_KEY
from portnorm.errors import CheckpointError, UnsupportedError

Arrays = dict[str, Stored]

_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")


@contextlib.contextmanager
def opened(source: Any) -> Iterator[Held]:
    """What a file, a mapping or a live `torch.nn.Module` holds; readable while it is open.

    Names of nested mappings, and of lists of mappings, are joined by "/". Raises `CheckpointError` where the file cannot be read, and for a
    pickle, which is never opened.
    """
    if isinstance(source, Mapping):
        yield _mapping(source)
        return
    if any(kind.__module__.startswith("torch.nn.") for kind in type(source).__mro__):
        yield require_extra("portnorm_backends.torch_settings", "torch").held(source)
        return
    if not isinstance(source, str | os.PathLike):
        way_out = "; source.state_dict() is a mapping" if hasattr(source, "state_dict") else ""
        expected = "expected a file, a mapping of arrays, or a torch.nn.Module"
        raise UnsupportedError(f"`source` is a {type(source).__name__}; {expected}{way_out}")
    path = Path(source)
    if path.suffix in _PICKLES:
        raise CheckpointError(
            f"{os.fspath(path)!r} is a pickle, which can run code when it is read. Where you trust it, read it with torch and give the "
            "state dict instead of the file: w = torch.load(path, map_location='cpu', weights_only=True), then import_checkpoint(w). Where "
            "that is a dict with more in it, the state dict is one of its entries (state_dict, model_state, model, …), and "
            "prefix='model_state/' names it; where it is a module, import_checkpoint takes its state_dict(). "
            "safetensors.torch.save_file(w, 'w.safetensors') keeps it in a file without code"
        )
    ending = next((known for known in _READERS if path.name.endswith(known)), None)
    if ending is None:
        raise CheckpointError(f"{os.fspath(path)!r} has the ending {path.suffix!r}; expected one of {', '.join(_READERS)}")
    with contextlib.ExitStack() as stack:
        with _named(path):
            held = _READERS[ending](path, stack)
        yield held


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of a file's own library as `CheckpointError`."""
    try:
        yield
    except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, zipfile.BadZipFile) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{os.fspath(path)!r} cannot be read: {error}") from error


# -- mappings ------------------------------------------------------------------------------------------------------------------------------


def _mapping(source: Mapping[Any, Any]) -> Held:
    held = Held({})
    for key, value in _leaves(source, ""):
        if str(getattr(value, "dtype", "")).startswith("key<"):
            held.left_out.append(key)
        elif key in held.arrays:
            raise CheckpointError(f"two entries have the name {key!r}, when nested names are joined by '/'; expected each once")
        elif isinstance(value, numpy.ma.MaskedArray):
            problem = f"{key!r} is a masked array, whose mask would be lost; expected an array of numbers: array.filled(0)"
            held.arrays[key] = Stored.unreadable(key, problem)
        else:
            held.arrays[key] = Stored(key, _description(value), _values(value))
    return held


def _leaves(tree: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, list | tuple) and any(isinstance(entry, Mapping) for entry in value):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def _description(value: Any) -> Callable[[], tuple[tuple[int, ...], str]]:
    def describe() -> tuple[tuple[int, ...], str]:
        shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
        if shape is not None and dtype is not None:
            return tuple(shape), str(getattr(dtype, "name", dtype)).rpartition(".")[2]
        try:
            array = numpy.asarray(value)
        except (ValueError, TypeError):
            return (), type(value).__name__
        return array.shape, array.dtype.name if array.dtype.kind in "fiubc" else type(value).__name__

    return describe


def _values(value: Any) -> Callable[[], NumPyArray]:
    def values() -> Any:
        dtype = str(getattr(value, "dtype", ""))
        if dtype.startswith("torch.float8"):  # which only torch can widen
            widened = value.float()
        elif dtype == "mlx.core.bfloat16":
            widened = value.astype(require_extra("mlx.core", "mlx").float32)
        else:
            widened = value
        array: NumPyArray = to_numpy(widened) if dtype else numpy.asarray(widened)
        return array

    return values


# -- files ---------------------------------------------------------------------------------------------------------------------------------


def _safetensors(path: Path, stack: contextlib.ExitStack) -> Held:
    stored, metadata = safetensors.entries(path)
    held = _of_writer(Held(stored), metadata)
    if OWN_KEY in metadata:
        held.own = "a run of training, of which the layer alone is read" if TRAINING_KEY in metadata else "a layer"
    return held


_WRITERS = {"mlx": "mlx", "pd": "paddle", "paddle": "paddle", "flax": "flax"}
"""The format of weights, by what metadata call it. Those of "pt" and "tf" come from many libraries, and "np" says nothing."""


def _of_writer(held: Held, metadata: Mapping[str, str]) -> Held:
    written = metadata.get("format", "")
    if written in _WRITERS:
        held.format, held.because = _WRITERS[written], f"that the file is of this format is said by its metadata, format={written!r}"
    return held


def _shards(path: Path, stack: contextlib.ExitStack) -> Held:
    """An index of safetensors files beside it: its `weight_map` says which of them has an array."""
    index = json.loads(path.read_bytes())
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or any(not isinstance(name, str) or Path(name).name != name for name in places.values()):
        raise CheckpointError(f"{os.fspath(path)!r} is damaged: expected a map `weight_map` from arrays to names of files beside it")
    held = Held({})
    for name in dict.fromkeys(places.values()):
        said = [key for key, place in places.items() if place == name]
        try:
            stored, metadata = safetensors.entries(path.with_name(name))
        except CheckpointError as error:  # which does not stop what lies in the others
            held.arrays |= {key: Stored.unreadable(key, str(error)) for key in said}
            continue
        if strange := sorted({*stored} ^ {*said}):
            raise CheckpointError(f"{os.fspath(path)!r} and {name!r} do not agree whether {strange[0]!r} is in the latter")
        held.arrays |= {key: stored[key] for key in said}
        _of_writer(held, metadata)
    return held


def _npz(path: Path, stack: contextlib.ExitStack) -> Held:
    file = numpy.load(stack.enter_context(path.open("rb")), allow_pickle=False)
    if not hasattr(file, "files"):
        raise CheckpointError(f"{os.fspath(path)!r} is a single array; expected an .npz file with names")
    stack.enter_context(file)
    return Held({name: Stored(name, _header_of(file, name), partial(file.__getitem__, name)) for name in file.files})


def _header_of(file: Any, name: str) -> Callable[[], tuple[tuple[int, ...], str]]:
    """Shape and type out of the head of a member."""

    def describe() -> tuple[tuple[int, ...], str]:
        members = file.zip.namelist()
        if f"{name}.npy" not in members:
            return (), "bytes"
        with file.zip.open(f"{name}.npy") as member:
            version = numpy.lib.format.read_magic(member)
            head = numpy.lib.format.read_array_header_1_0 if version == (1, 0) else numpy.lib.format.read_array_header_2_0
            shape, _, dtype = head(member)
        return shape, dtype.name

    return describe


def _hdf5(path: Path, stack: contextlib.ExitStack) -> Held:
    return keras_files.hdf5(stack.enter_context(require_extra("h5py", "import").File(path, "r")), os.fspath(path))


def _keras(path: Path, stack: contextlib.ExitStack) -> Held:
    h5py = require_extra("h5py", "import")
    archive = stack.enter_context(zipfile.ZipFile(path))
    # Copied out, in one pass: what seeks in a member gets wrong bytes from some Pythons (3.12.7 to 3.13.1) where it is stored as it is.
    weights = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
    with archive.open("model.weights.h5") as member:
        shutil.copyfileobj(member, weights, 1 << 20)
    return keras_files.archive(stack.enter_context(h5py.File(weights, "r")), archive, os.fspath(path))


def _onnx(path: Path, stack: contextlib.ExitStack) -> Held:
    require_extra("onnx", "onnx")
    from portnorm.checkpoint import onnx_nodes

    return onnx_nodes.held(path)


_READERS: dict[str, Callable[[Path, contextlib.ExitStack], Held]] = {
    ".safetensors": _safetensors,
    ".safetensors.index.json": _shards,
    ".npz": _npz,
    ".h5": _hdf5,
    ".hdf5": _hdf5,
    ".keras": _keras,
    ".onnx": _onnx,
}
