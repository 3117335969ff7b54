"""A line that says how far something has come: by rich where it is installed, on a terminal, and only where it takes over two seconds."""

from __future__ import annotations

import importlib.util
import sys
import time
from types import TracebackType
from typing import Any, Self

PATIENCE = 2.0
"""Seconds for which nothing is shown."""

_BETWEEN = 0.1


class ProgressLine:
    """Calls of `show(done, total, loss)` on standard error; leaves nothing behind where it is no terminal.

    >>> with ProgressLine("training") as line:
    ...     line(1, 10, 0.5)
    """

    def __init__(self, title: str):
        self.title = title
        self._started = self._shown = time.monotonic()
        self._bars: Any = None
        self._plain = False

    def __call__(self, done: int, total: int, loss: float) -> None:
        now = time.monotonic()
        if now - self._started < PATIENCE or (now - self._shown < _BETWEEN and done < total):
            return
        self._shown = now
        if self._bars is None and not self._plain:
            self._plain = not self._open(total)
        if self._bars is not None:
            self._bars.update(self._task, completed=done, total=total, loss=loss)
        elif sys.stderr is not None and sys.stderr.isatty():
            seconds = (now - self._started) / max(1, done) * (total - done)
            sys.stderr.write(f"\r\x1b[K{self.title}: {done} of {total}, loss {loss:.3f}, {seconds:.0f} s to go")
            sys.stderr.flush()

    def _open(self, total: int) -> bool:
        """Whether rich shows it from now on."""
        if importlib.util.find_spec("rich") is None:
            return False
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        if not (console.is_terminal or console.is_jupyter):
            return False
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"))
        self._bars = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
        self._task = self._bars.add_task(self.title, total=total, loss=float("nan"))
        self._bars.start()
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()
        elif self._plain and sys.stderr is not None and sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
