"""Files appear complete or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from portnorm.errors import PortnormError, UnsupportedError
from portnorm.interrupts import undone


def checked_path(name: str, path: Any) -> str:
    """`path` as a text; raises `UnsupportedError` for what is none."""
    if isinstance(path, str | os.PathLike):
        found = os.fspath(path)
        if isinstance(found, str):
            return found
    raise UnsupportedError(f"`{name}` is {path!r}; expected the path of a file, a text or a pathlib.Path")


@contextlib.contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of `path` when the block ends well; on any exception `path` stays as it was.

    Raises `PortnormError` where the place cannot be written to, has no room, or is there and no file.
    """
    target = Path(path)
    try:
        if target.exists() and not target.is_file():
            what = "Is a directory" if target.is_dir() else "it is there, and no file"  # a pipe, or a device, which must stay one
            raise PortnormError(f"cannot write {os.fspath(path)!r}: {what}")
        handle, name = tempfile.mkstemp(prefix=f".{target.name[:40]}.", dir=target.parent)
        forget = undone(lambda: os.unlink(name))
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise
        finally:
            forget()
    except OSError as error:
        raise PortnormError(f"cannot write {os.fspath(path)!r}: {error.strerror or error}") from error


def require_place(option: str, path: str | os.PathLike[str], *endings: str) -> None:
    """Raise before any work where a file could not be written to `path` in the end, or does not end as files of its kind do."""
    target, name = Path(path), os.fspath(path)
    if endings and target.suffix not in endings:
        raise UnsupportedError(f"`{option}` is {name!r}; expected a name that ends in {' or '.join(endings)}")
    if not target.parent.is_dir():
        raise UnsupportedError(f"`{option}` is {name!r}, and there is no directory {os.fspath(target.parent)!r}")
    if target.exists() and not target.is_file():
        raise UnsupportedError(f"`{option}` is {name!r}, which is there and no file")
    try:
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        raise UnsupportedError(f"`{option}` is {name!r}, where nothing can be written: {error.strerror or error}") from error


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
