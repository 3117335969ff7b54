"""What numba's cache holds, as notes beside it say, and who is compiling into it now."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from portnorm.interrupts import undone
from portnorm_backends.cpu.families import Family
from portnorm_backends.cpu.sources import digest

_HERE = Path(__file__).parent


_PATIENCE = 600.0
"""Seconds after which a note that somebody is compiling is one of a process that was ended."""


def note_of(family: Family) -> Path | None:
    folder = place()
    return None if folder is None else folder / f"portnorm-{made_of()}-{'-'.join(family).replace(' ', '-')}.json"


@functools.cache
def place() -> Path | None:
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
def made_of() -> str:
    """What the compiled code hangs on: these sources, numba, Python, the processor, and what numba was told."""
    told = sorted(item for item in os.environ.items() if item[0].startswith("NUMBA_"))
    found = (digest(), numba_version(), sys.version, platform.machine(), _processor(), told)
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def numba_version() -> str:
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


@contextmanager
def claimed(family: Family) -> Iterator[bool]:
    """Whether this process is the one to compile; others then wait for it."""
    note = note_of(family)
    claim = None if note is None else note.with_suffix(".claim")
    if claim is None:
        yield True
        return
    if _is_left(claim):
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


def _is_left(claim: Path) -> bool:
    """Whether it is there, and of somebody who is no more. One that comes meanwhile is somebody else's, and stays."""
    try:
        age, process = time.time() - claim.stat().st_mtime, int(claim.read_text() or "0")
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return claim.exists()
    if process:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass
    return age > _PATIENCE
