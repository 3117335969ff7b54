"""Code in a Python process of its own, and in many threads at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable

from benchmarks.readme import ROOT


def output_of(code: str, timeout: float = 120, **environment: str) -> str:
    """What `code` prints; fails with its traceback."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def memory(what: str) -> float:
    """MB of this process: "VmRSS" now, or "VmHWM" at most so far (which `getrusage` takes over from who started the process)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(what))


def in_threads(work: Callable[[int], None], count: int = 8) -> None:
    """`work(0)` … `work(count − 1)`, all at once."""
    threads = [threading.Thread(target=work, args=(k,)) for k in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
