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
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from portnorm.arrays import is_bfloat16
from portnorm.errors import UnsupportedError
from portnorm.files import written_whole
from portnorm.interrupts import undone
from portnorm.layers.layer import Layer
from portnorm_backends.cpu.families import FAMILIES, OF_BITS, TRAINING, TYPES, Family, families_of, needed, parts_of, type_named
from portnorm_backends.cpu.layout import RANGE
from portnorm_backends.cpu.notes import claimed, note_of, numba_version, place

LOG = logging.getLogger("portnorm")

MODES = ("background", "wait")
MODE = os.environ.get("PORTNORM_KERNELS", MODES[0])
"""Who compiles: another process while this one computes, or the call that needs it."""
if MODE not in MODES:
    raise UnsupportedError(f"`PORTNORM_KERNELS` is {MODE!r} in the environment; expected one of {', '.join(MODES)}")


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
    return dtype in READY[family] or ((dtype in RANGE or (family in OF_BITS and is_bfloat16(dtype))) and _ask((family, dtype.name)))


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
    return type_named(family[1]) in READY[family[0]]


def _there(family: Family) -> None:
    for name in (family[0], family[0].removesuffix(TRAINING)):
        READY[name].add(type_named(family[1]))


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
        importlib.import_module("portnorm_backends.cpu.sharing").prepare()
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
    if embedded or place() is None:
        return False
    while True:
        with claimed(family) as mine:
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
    note = note_of(family)
    if folders and note is not None:
        files = sorted(str(file) for folder in folders for file in Path(folder).glob("*.nbi"))
        with written_whole(note) as file:
            file.write(json.dumps(files).encode())


def _is_kept(family: Family) -> bool:
    """Whether the cache is known to hold it."""
    name, dtype = family
    for own in (family, (f"{name}{TRAINING}", dtype)):
        note = note_of(own)
        with suppress(OSError, ValueError):
            if note is not None and all(map(os.path.exists, json.loads(note.read_text()))):
                return True
    return False


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
    if dtype not in TYPES:
        raise UnsupportedError(f"`dtype` is {dtype!r}; expected one of {', '.join(TYPES)}")
    families = dict.fromkeys(needed(layers) if layers else [own for name in FAMILIES for own in parts_of(name, dtype)])
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


def state() -> dict[str, Any]:
    """What `portnorm info` says: numba's version, the folder of the notes, and which kernels the cache holds, by type."""
    if importlib.util.find_spec("numba") is None:
        return {"numba": None}
    kept = {kind: [name for name in families_of(kind) if _is_kept((name, kind))] for kind in TYPES}
    return {"numba": numba_version(), "mode": MODE, "cache": str(place()), "compiled": kept}


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
