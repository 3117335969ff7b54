"""What an interrupt undoes: files that are not whole yet, and processes that were started. A command ends soon after it.

Python raises `KeyboardInterrupt` in the main thread when that comes back from compiled code, which may take seconds in a compiler or a
runtime. So whoever leaves something behind says here how it is undone, and a thread of the command line does so where the main thread
has not ended in time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

PATIENCE = 1.0
"""Seconds that the main thread has to end by itself."""

_came: list[int] = []
_held: list[object] = []
_undo: dict[object, Callable[[], object]] = {}


def undone(undo: Callable[[], object]) -> Callable[[], None]:
    """Have `undo` called at an interrupt of the command line, until what comes back is called."""
    key = object()
    _undo[key] = undo

    def forget() -> None:
        _undo.pop(key, None)

    return forget


def undo_all() -> None:
    """Undo everything, the latest first."""
    for key in reversed(list(_undo)):
        undo = _undo.pop(key, None)
        if undo is not None:
            with contextlib.suppress(Exception):
                undo()


def came() -> bool:
    """Whether there was an interrupt. Code that a library calls may have lost the exception, or made another one of it."""
    return bool(_came)


def _interrupted(number: int, frame: object) -> None:
    _came.append(number)
    if not _held:
        raise KeyboardInterrupt


def end() -> NoReturn:
    """End this process now, without what libraries do at the end of theirs: that of many takes seconds."""
    undo_all()
    sys.stderr.flush()
    os._exit(130)


def watch(say: Callable[[], None]) -> None:
    """End this process with 130, soon after an interrupt, where the main thread has not done so; called by the main thread."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, or somebody else's
        return
    signal.signal(signal.SIGINT, _interrupted)
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)  # written to at once, whatever the main thread is in
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))

    def wait() -> None:
        while os.read(told, 1) != bytes([signal.SIGINT]):
            pass
        time.sleep(PATIENCE)
        say()
        end()

    threading.Thread(target=wait, name="portnorm-interrupt", daemon=True).start()


@contextmanager
def held_back() -> Iterator[None]:
    """An interrupt of the command line comes after this block, in which a process is started and its end noted, and never to that process.

    Whoever started it ends it.
    """
    mask = getattr(signal, "pthread_sigmask", None)
    before = None if mask is None else mask(signal.SIG_BLOCK, {signal.SIGINT})  # which the process inherits
    _held.append(before)
    count = len(_came)
    try:
        yield
    finally:
        _held.pop()
        if mask is not None:
            mask(signal.SIG_SETMASK, before)
    if len(_came) > count and not _held:
        raise KeyboardInterrupt
