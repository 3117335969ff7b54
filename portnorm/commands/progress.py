"""A line on a terminal that says how far a command is; nothing where standard error is none."""

from __future__ import annotations

import sys
import time


class ProgressLine:
    """Each call shows a text over the one before it; `clear` takes it away, for what is printed after it."""

    def __init__(self, quiet: bool = False):
        self._shows = not quiet and sys.stderr is not None and sys.stderr.isatty()
        self._started = time.monotonic()

    def __call__(self, text: str) -> None:
        if self._shows:
            print(f"\r\x1b[K{time.monotonic() - self._started:6.0f} s  {text}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._shows:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
