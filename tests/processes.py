"""Code in a Python process of its own, and in many threads at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable

from benchmarks.tables import ROOT


def output_of(code: str, timeout: float = 120, **environment: str) -> str:
    """What `code` prints; fails with its traceback."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def peak(work: Callable[[], object]) -> float:
    """MB that the process has at most while it works, beyond what it has before."""
    with open("/proc/self/clear_refs", "w") as marks:
        marks.write("5")  # what it has now is the most so far: the kernel takes over the peak of who started the process
    before = _memory("VmRSS")
    work()
    return _memory("VmHWM") - before


def _memory(what: str) -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(what))


def in_threads(work: Callable[[int], None], count: int = 8) -> None:
    """`work(0)` … `work(count − 1)`, all at once."""
    threads = [threading.Thread(target=work, args=(k,)) for k in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
