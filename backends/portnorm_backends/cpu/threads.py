"""Rows that do not know of each other, computed by several threads. They live for one call: a fork between calls finds none of them.

As many as NumPy's BLAS would take: `OPENBLAS_NUM_THREADS` or `OMP_NUM_THREADS`, else the processors that this process may use.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable


def _count() -> int:
    given = (os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS", "")).partition(",")[0]
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(int(given), processors) if given.isdigit() and int(given) else processors


def parts(rows: int, cost: float, multiple: int = 1) -> list[tuple[int, int]]:
    """Ranges of rows, one for each thread that is worth its start.

    `cost` is that of all rows, 1 where a thread begins to pay; all ranges but the last are a multiple of `multiple` rows.
    """
    threads = max(1, min(_count(), int(cost), -(-rows // multiple))) if cost >= 2 else 1
    step = -(-rows // threads // multiple) * multiple
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def each(ranges: list[tuple[int, int]], work: Callable[[int, int], None]) -> None:
    """`work(first, last)` for each range, at once, the first in this thread. What one raises is raised here."""
    raised: list[BaseException] = []

    def kept(first: int, last: int) -> None:
        try:
            work(first, last)
        except BaseException as error:  # raised again below
            raised.append(error)

    others = [threading.Thread(target=kept, args=part) for part in ranges[1:]]
    for thread in others:
        thread.start()
    kept(*ranges[0])
    for thread in others:
        thread.join()
    if raised:
        raise raised[0]
