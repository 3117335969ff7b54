"""When a kernel may be taken. Compiling one takes longer than a first answer should, so the definitions compute until it is there.

The first call that wants a family of kernels starts a process that compiles it into numba's cache, where every later process finds it;
a thread of this one waits for that, loads what was compiled, and from then on the kernels are taken. Both ways keep the same bounds
(`tests/tolerances.py`). Who wants no such change between two calls waits: by `portnorm.warm(layer)`, by `portnorm warm` when a container
is built, or with PORTNORM_KERNELS=wait in the environment, with which the first call compiles what it needs itself.

What the cache holds is known without numba, whose import alone takes half a second: beside it lies a note for each family.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy

from portnorm.arrays import is_bfloat16, load_namespace
from portnorm.dtypes import dtype_name
from portnorm.errors import UnsupportedError
from portnorm.files import written_whole
from portnorm.interrupts import undone
from portnorm.layers.layer import Layer
from portnorm.layers.linear import Linear
from portnorm.layers.norms import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from portnorm.layers.recurrent import GRU, LSTM, RNN, Recurrent
from portnorm_backends import bfloat16
from portnorm_backends.cpu.layout import RANGE
from portnorm_backends.cpu.sources import digest

LOG = logging.getLogger("portnorm")

MODES = ("background", "wait")
MODE = os.environ.get("PORTNORM_KERNELS", MODES[0])
"""Who compiles: another process while this one computes, or the call that needs it."""
if MODE not in MODES:
    raise UnsupportedError(f"`PORTNORM_KERNELS` is {MODE!r} in the environment; expected one of {', '.join(MODES)}")

_HERE = Path(__file__).parent
_PATIENCE = 600.0
"""Seconds after which a note that somebody is compiling is one of a process that was ended."""

Family = tuple[str, str]
"""A name of `FAMILIES`, and the name of a type."""


# -- the families --------------------------------------------------------------------------------------------------------------------------


TRAINING = " training"
"""Ends the name of a family that has the backward loops too."""


def _rows(dtype: str) -> None:
    rowwise, kind = importlib.import_module("portnorm_backends.cpu.rowwise"), _type(dtype)
    rowwise.forward(kind), rowwise.backward(kind)
    if kind in RANGE:
        rowwise.last_axis(kind)


def _channels(dtype: str) -> None:
    channelwise, kind = importlib.import_module("portnorm_backends.cpu.channelwise"), _type(dtype)
    for inner in (False, True):
        channelwise.forward(kind, inner), channelwise.scale(kind, inner), channelwise.backward(kind, inner)


def _products(dtype: str) -> None:
    importlib.import_module("portnorm_backends.cpu.products").compiled_for(numpy.dtype(dtype))


def _integers(dtype: str) -> None:
    """Of float32 alone."""
    module, x = importlib.import_module("portnorm_backends.cpu.integer_rows"), numpy.ones((1, 2), numpy.float32)
    module.product(x, True, x.astype(module.INTEGER), x.astype(numpy.int8), x[0, :1].astype(numpy.int32), x[0, :1], x[:, :1])


def _loop(cell: type[Recurrent], training: bool) -> Callable[[str], None]:
    def calls(dtype: str) -> None:
        layer, x = cell(2, 3, norm="layer", rng=0, dtype=dtype), numpy.ones((3, 2, 2), dtype)
        y, *_, pullback = layer.vjp(x, training=training)
        layer(x)
        if training:
            pullback(y)

    return calls


FAMILIES: dict[str, Callable[[str], None]] = {
    "rows": _rows,
    "channels": _channels,
    "products": _products,
    "integers": _integers,
    **{cell.__name__: _loop(cell, False) for cell in (LSTM, GRU, RNN)},
    **{f"{cell.__name__}{TRAINING}": _loop(cell, True) for cell in (LSTM, GRU, RNN)},
}
"""What is compiled together, and what compiles all of it for a type of values. That for training has all of inference."""

_TYPES = (*map(str, RANGE), "bfloat16")
_OF_BITS = ("rows", "channels")
"""The families that there are for bfloat16 too; all else computes in float32 what is in it."""

_OF_LAYERS: dict[type[Layer], tuple[str, ...]] = {
    LayerNorm: ("rows",),
    RMSNorm: ("rows",),
    GroupNorm: ("rows",),
    BatchNorm: ("channels",),
    InstanceNorm: ("rows", "channels"),
    Linear: ("products",),
    Recurrent: ("rows", "channels", "products"),
    **{cell: (f"{cell.__name__}{TRAINING}",) for cell in (LSTM, GRU, RNN)},
}
"""What the calls of a layer take."""

READY: dict[str, set[Any]] = {name: set() for name in FAMILIES}
"""The types for which a family is there."""


# -- the choice ----------------------------------------------------------------------------------------------------------------------------


class _OfThread(threading.local):
    compiles = False


_own = _OfThread()
_wanted: queue.SimpleQueue[Family] = queue.SimpleQueue()
_asked: set[Family] = set()
_failed: set[Family] = set()
_lock = threading.RLock()
_loading = threading.Lock()
"""Held while kernels are compiled or loaded in this process."""
_compiling: set[subprocess.Popen[bytes]] = set()
_ends = False
"""Whether the process ends, and nothing is to be loaded any more."""


def ready(family: str, dtype: Any) -> bool:
    """Whether kernels of this family take values of this type, now; if not they are on their way."""
    return dtype in READY[family] or ((dtype in RANGE or (family in _OF_BITS and is_bfloat16(dtype))) and _ask((family, dtype.name)))


def _ask(wanted: Family) -> bool:
    if _own.compiles:
        return True
    if MODE == "wait":
        _there(wanted)
        return True
    if wanted in _asked:
        return False
    with _lock:
        if wanted in _asked:
            return False
        if _is_kept(wanted):
            _there(wanted)
            return True
        if not _asked:
            try:
                threading.Thread(target=_work, name="portnorm-kernels", daemon=True).start()
            except RuntimeError:  # the process ends, or has all threads that it may have
                return False
        _asked.add(wanted)
        _wanted.put(wanted)
    return False


def _is_there(family: Family) -> bool:
    return _type(family[1]) in READY[family[0]]


def _there(family: Family) -> None:
    for name in (family[0], family[0].removesuffix(TRAINING)):
        READY[name].add(_type(family[1]))


def _work() -> None:
    """What the thread does, for ever: one family after the other."""
    while True:
        family = _wanted.get()
        try:
            _provide(family)
        except Exception as error:
            _failed.add(family)
            if _ends:
                return
            LOG.warning("the kernels %s could not be compiled, NumPy goes on without them: %s", " ".join(family), error)


def _provide(family: Family) -> None:
    """Compile in another process, if it can leave what it made to this one, and load."""
    LOG.info("compiling the kernels %s in the background", " ".join(family))
    _say()
    started, kept = time.monotonic(), _compiled_elsewhere(family)
    with _loading:
        if _ends:
            return
        _load(family)
    LOG.info(
        "the kernels %s are there after %.1f s%s", " ".join(family), time.monotonic() - started, "" if kept else ", for this process alone"
    )


def _load(family: Family) -> None:
    """Have everything of a family in this process, from numba's cache where it is there."""
    name, dtype = family
    before, _own.compiles = _own.compiles, True
    try:
        FAMILIES[name](dtype)
    finally:
        _own.compiles = before
    _there(family)


@functools.cache  # once
def _say() -> None:
    if sys.stderr is not None and sys.stderr.isatty():
        sys.stderr.write("portnorm compiles kernels in the background, this time only; until they are there NumPy computes\n")


# -- another process -----------------------------------------------------------------------------------------------------------------------


def _compiled_elsewhere(family: Family) -> bool:
    """Whether another process has compiled it into the cache, this one's or one that somebody else has started."""
    embedded = not Path(sys.executable or "").name.startswith("python")
    if embedded or _place() is None:
        return False
    while True:
        with _claimed(family) as mine:
            if _is_kept(family):
                return True
            if mine:
                return _compiled_by_a_child(family)
        time.sleep(0.2)


def _compiled_by_a_child(family: Family) -> bool:
    roots = {str(Path(sys.modules[name].__path__[0]).parent): None for name in ("portnorm", "portnorm_backends")}
    path = os.pathsep.join([*roots, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-P", "-c", _ALONE, __spec__.name, *family]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": path, "PORTNORM_KERNELS": "wait"},
            stdin=subprocess.PIPE,  # see `_ALONE`
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,  # an interrupt of this process is none of it: the next one will find what it makes
        )
        _compiling.add(process)
        forget = undone(_abandon)
        try:
            code = process.wait()
        finally:
            forget()
            _compiling.discard(process)
        errors.seek(0)
        if code:
            raise RuntimeError(f"the process ended with {code}: {errors.read().decode(errors='replace').strip()[-500:]}")
    return _is_kept(family)


def _abandon() -> None:
    """End what compiles for this process, of which the user wants no more."""
    global _ends
    _ends = True
    for process in list(_compiling):
        process.kill()


_ALONE = """
import importlib, os, sys, threading
threading.Thread(target=lambda: os.read(0, 1) or os._exit(1), daemon=True).start()
importlib.import_module(sys.argv[1])._keep((sys.argv[2], sys.argv[3]))
"""
"""What the other process does. Where the one that started it is killed or interrupted it ends too; one that comes to its end says so, and
it goes on."""


def _keep(family: Family) -> None:
    """Compile, and note that it is in the cache if it is."""
    _load(family)
    folders = importlib.import_module("portnorm_backends.cpu.compiling").folders()
    note = _note(family)
    if folders and note is not None:
        files = sorted(str(file) for folder in folders for file in Path(folder).glob("*.nbi"))
        with written_whole(note) as file:
            file.write(json.dumps(files).encode())


def _is_kept(family: Family) -> bool:
    """Whether the cache is known to hold it."""
    name, dtype = family
    for own in (family, (f"{name}{TRAINING}", dtype)):
        note = _note(own)
        with suppress(OSError, ValueError):
            if note is not None and all(map(os.path.exists, json.loads(note.read_text()))):
                return True
    return False


def _note(family: Family) -> Path | None:
    place = _place()
    return None if place is None else place / f"portnorm-{_made_of()}-{'-'.join(family).replace(' ', '-')}.json"


@functools.cache
def _place() -> Path | None:
    """The folder of the notes: where numba was told to keep what it compiles, else beside these files, else in that of the user."""
    given = os.environ.get("NUMBA_CACHE_DIR")
    user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    for folder in [Path(given)] if given else [_HERE / "__pycache__", user / "portnorm"]:
        with suppress(OSError, RuntimeError):  # the latter of a user who has no home
            folder = folder.expanduser()
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    return None


@functools.cache
def _made_of() -> str:
    """What the compiled code hangs on: these sources, numba, Python, the processor, and what numba was told."""
    told = sorted(item for item in os.environ.items() if item[0].startswith("NUMBA_"))
    found = (digest(), _numba(), sys.version, platform.machine(), _processor(), told)
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def _numba() -> str:
    """Its version, without an import unless whoever packed it left the metadata out."""
    try:
        return importlib.metadata.version("numba")
    except importlib.metadata.PackageNotFoundError:
        return str(importlib.import_module("numba").__version__)


def _processor() -> list[str]:
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return sorted({line for line in lines if line.partition(":")[0].strip() in ("model name", "flags", "Features", "CPU part")})
    return [platform.processor()]


# -- one process at a time -----------------------------------------------------------------------------------------------------------------


@contextmanager
def _claimed(family: Family) -> Iterator[bool]:
    """Whether this process is the one to compile; others then wait for it."""
    note = _note(family)
    claim = None if note is None else note.with_suffix(".claim")
    if claim is None:
        yield True
        return
    if _is_free(family):
        claim.unlink(missing_ok=True)
    try:
        with claim.open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        yield False
        return
    forget = undone(lambda: claim.unlink(missing_ok=True))
    try:
        yield True
    finally:
        claim.unlink(missing_ok=True)
        forget()


def _is_free(family: Family) -> bool:
    """Whether nobody is compiling it, or somebody said so who is no more."""
    note = _note(family)
    assert note is not None
    claim = note.with_suffix(".claim")
    try:
        age, process = time.time() - claim.stat().st_mtime, int(claim.read_text() or "0")
    except (OSError, ValueError):
        return not claim.exists()
    if process:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass
    return age > _PATIENCE


# -- waiting -------------------------------------------------------------------------------------------------------------------------------


def warm(*layers: Layer, dtype: str = "float32") -> list[str]:
    """Compile, or wait for, all kernels that calls of these layers on NumPy arrays take; without layers every kernel for `dtype`.

    From then on no call of them waits for a compiler, or changes from the definitions to a kernel. What is compiled stays in numba's cache,
    for this process and later ones. Returns the names of what is there; without numba (extra `fast`), or for layers of another library,
    there is nothing to wait for. Raises `UnsupportedError` for a `dtype` of which there are no kernels, and for what is no layer.

    >>> import portnorm as pn
    >>> layer = pn.LayerNorm(3)
    >>> _ = pn.warm(layer)
    """
    if importlib.util.find_spec("numba") is None:
        return []
    if dtype not in _TYPES:
        raise UnsupportedError(f"`dtype` is {dtype!r}; expected one of {', '.join(_TYPES)}")
    families = dict.fromkeys(_needed(layers) if layers else [own for name in FAMILIES for own in _for(name, dtype)])
    for family in families:
        while family in _asked and family not in _failed and not _is_there(family):
            time.sleep(0.02)
        with _loading:
            if not _is_there(family):
                _keep(family)
    return [" ".join(family) for family in families]


@contextmanager
def waiting() -> Iterator[None]:
    """Meanwhile a call compiles the kernels that it needs itself, as with PORTNORM_KERNELS=wait."""
    global MODE
    before, MODE = MODE, "wait"
    try:
        yield
    finally:
        MODE = before


def _needed(layers: tuple[Layer, ...]) -> Iterator[Family]:
    for layer in layers:
        if not isinstance(layer, Layer):
            raise UnsupportedError(f"`layers` has a {type(layer).__name__}; expected layers of portnorm")
        for part in layer.layers():
            dtype = dtype_name(part.xp, part.dtype)
            if dtype in _TYPES and part.xp is load_namespace("numpy"):
                names = [name for kind, names in _OF_LAYERS.items() if isinstance(part, kind) for name in names]
                names += ["integers"] if part.quantizes is not None else []
                yield from (own for name in names for own in _for(name, dtype))


def _for(name: str, dtype: str) -> list[Family]:
    """What values of a type take of a family: bfloat16 that for float32 too, since what is computed as a whole is so in that."""
    bits = [(name, dtype)] if name in _OF_BITS else []
    return [*bits, (name, "float32")] if dtype == "bfloat16" else [(name, dtype)]


def _type(name: str) -> Any:
    return bfloat16.dtype() if name == "bfloat16" else numpy.dtype(name)


def state() -> dict[str, Any]:
    """What `portnorm info` says: numba's version, the folder of the notes, and which kernels the cache holds, by type."""
    if importlib.util.find_spec("numba") is None:
        return {"numba": None}
    kept = {kind: [name for name in FAMILIES if (name, kind) in _for(name, kind) and _is_kept((name, kind))] for kind in _TYPES}
    return {"numba": _numba(), "mode": MODE, "cache": str(_place()), "compiled": kept}


# -- the end, and a beginning --------------------------------------------------------------------------------------------------------------


@atexit.register
def _stop() -> None:
    """Let the thread end what it is doing in LLVM, which must not be torn down around it; it begins nothing more."""
    global _ends
    with _loading:
        _ends = True
    for process in list(_compiling):
        with suppress(OSError):
            os.write(process.stdin.fileno(), b".")  # type: ignore[union-attr]


def _after_fork() -> None:
    """The thread is not in the new process, which begins when nobody holds a lock of the compiler."""
    global _wanted, _lock, _loading
    _wanted, _lock, _loading = queue.SimpleQueue(), threading.RLock(), threading.Lock()
    _asked.clear()
    _compiling.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=lambda: _loading.acquire(), after_in_parent=lambda: _loading.release(), after_in_child=_after_fork)
