"""Files appear complete or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from portnorm.errors import PortnormError
from portnorm.interrupts import undone


@contextlib.contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of `path` when the block ends well; on any exception `path` stays as it was.

    Raises `PortnormError` where the place cannot be written to, has no room, or is there and no file.
    """
    target = Path(path)
    try:
        if target.exists() and not target.is_file():
            raise PortnormError(f"cannot write {os.fspath(path)!r}: it is there, and no file")
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
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


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
