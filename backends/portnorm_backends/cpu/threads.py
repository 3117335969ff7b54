"""Rows that do not know of each other, computed by several threads.

As many as NumPy's BLAS takes at the moment: what `threadpoolctl` has told it, else `OPENBLAS_NUM_THREADS` or `OMP_NUM_THREADS` as they were
when this was loaded, else the processors that this process may use, and no more than its control group gives it time of.

The threads outlive a call and wait for the next. For some 200 microseconds they listen, for calls of kernels that need no interpreter
(`sharing`); then each sleeps on a lock of its own, which costs nothing. Whoever has something to compute wakes some and begins: what none
of them has taken when it comes to it, it computes itself, so that it waits only for what is being computed. A child of a fork has none of
them, and starts its own.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from portnorm_backends.cpu import memory

Range = tuple[int, int]
Work = Callable[[int, int], None]

ASLEEP, LISTENS, CLAIMED, GIVEN, WORKS = range(5)
"""What a thread does, as its line of the board says."""

STATE, JOB, BEFORE, ROUSED, LEAVE = range(5)
"""The words of a line: that, what it was given to compute, the state that it was in before, whether it was woken to listen, and whether it
comes back to the interpreter.
"""

LINE = 8
"""Words of a line, that of a cache."""


def _limit(environment: Mapping[str, str], groups: Path) -> int:
    """The most that the environment and the control group of this process allow."""
    given = (environment.get("OPENBLAS_NUM_THREADS") or environment.get("OMP_NUM_THREADS", "")).partition(",")[0]
    found = [int(given)] if given.isdigit() and int(given) else []
    with contextlib.suppress(OSError, ValueError):  # microseconds of processors in a period, or "max"
        quota, period = (groups / "cpu.max").read_text().split()
        found.append(math.ceil(int(quota) / int(period)))
    with contextlib.suppress(OSError, ValueError):
        quota, period = ((groups / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        found += [math.ceil(int(quota) / int(period))] if int(quota) > 0 else []
    return max(1, min(found, default=sys.maxsize))


_at_most = _limit(os.environ, Path("/sys/fs/cgroup"))


def _count() -> int:
    found = min(_at_most, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if "threadpoolctl" in sys.modules:  # nobody else can have told NumPy's BLAS anything
        found = min([found, *(blas.num_threads for blas in _blas())])
    return found


@functools.cache
def _blas() -> list[Any]:
    """Those that are loaded, NumPy's among them; each says its `num_threads` when it is asked."""
    found = sys.modules["threadpoolctl"].ThreadpoolController().lib_controllers
    return [library for library in found if library.user_api == "blas"]


class Plan(NamedTuple):
    """How a number of rows is computed."""

    threads: int
    step: int  # rows of a range, but for the last
    ranges: int  # their number
    wakes: int = 0
    """How many are worth waking for it if they sleep."""


def plan(rows: int, cost: float, multiple: int = 1, pieces: int = 1, wakes: int = 0) -> Plan:
    """Ranges of rows for threads that are worth it, for each of them up to so many `pieces`, of which each takes the next when it is free.

    `cost` is that of all rows, 1 where a thread begins to pay; all ranges but the last are a multiple of `multiple` rows.
    """
    threads = max(1, min(_count(), int(cost), -(-rows // multiple))) if cost >= 2 else 1
    count = threads if threads == 1 else min(threads * pieces, max(threads, int(cost)))
    step = -(-rows // count // multiple) * multiple
    return Plan(threads, step, -(-rows // step) if step else 1, wakes)


def parts(rows: int, cost: float, multiple: int = 1, pieces: int = 1) -> list[Range]:
    """The ranges of a `plan`."""
    step = plan(rows, cost, multiple, pieces).step
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


class _Job:
    """Ranges that are to be computed, by whoever takes them."""

    def __init__(self, ranges: list[Range], work: Work) -> None:
        self.work, self.left, self.open = work, deque(ranges), len(ranges)
        self.raised: list[BaseException] = []
        self.counting, self.done = threading.Lock(), threading.Lock()
        self.done.acquire()

    def take(self) -> bool:
        """Compute one more range, but for the note that it is done; whether there was one."""
        try:
            part = self.left.popleft()
        except IndexError:
            return False
        try:
            self.work(*part)
        except BaseException as error:  # raised again by who waits
            self.raised.append(error)
        return True

    def finished(self, count: int = 1) -> None:
        with self.counting:
            self.open -= count
            if not self.open:
                self.done.release()

    def wait(self) -> None:
        """Until all is computed. What interrupts that is raised afterwards, and what nobody has taken is left out."""
        while self.open:
            try:
                self.done.acquire()
            except BaseException as error:
                self.raised.insert(0, error)
                dropped = 0
                with contextlib.suppress(IndexError):
                    while True:
                        self.left.popleft()
                        dropped += 1
                if dropped:
                    self.finished(dropped)


def _listen_to_none(place: int) -> None:
    """While there are no kernels that call."""


_listen: Callable[[int], None] = _listen_to_none


def listen_by(function: Callable[[int], None]) -> None:
    """Let threads listen at their lines of the board so, from now on."""
    global _listen
    _listen = function


class _Helper:
    """A thread that helps with one job after another."""

    def __init__(self, pool: _Pool, line: Any) -> None:
        self.pool, self.line = pool, line
        self.place: int = line.ctypes.data
        self.job: _Job | None = None
        self.woken = threading.Lock()
        self.woken.acquire()
        threading.Thread(target=self.run, name="portnorm", daemon=True).start()

    def run(self) -> None:
        while True:
            self.woken.acquire()
            job, self.job = self.job, None
            if job is not None:
                self.line[LEAVE] = self.line[ROUSED] = 0
                taken = job.take()
                while taken and job.left:
                    job.finished()
                    taken = job.take()
                self.pool.waiting.append(self)  # before who waits for the last range goes on, and looks for help again
                if taken:
                    job.finished()
                del job  # and with it the arrays
            _listen(self.place)

    def computes(self) -> bool:
        """Whether a kernel has it, or is about to."""
        return self.line[STATE] not in (ASLEEP, LISTENS)

    def sleeps(self) -> bool:
        """Whether it sleeps, and nobody has woken it."""
        return bool(self.line[STATE] == ASLEEP and not self.line[ROUSED])

    def wake(self, job: _Job) -> None:
        """Let it compute something; for whoever has taken it from those that wait."""
        self.job, self.line[LEAVE] = job, 1
        self._go_on()

    def rouse(self) -> None:
        """Let it listen."""
        self.line[ROUSED] = 1
        self._go_on()

    def _go_on(self) -> None:
        with contextlib.suppress(RuntimeError):  # somebody else has said so
            self.woken.release()


class _Pool:
    """The helpers of a process, one less than there may be threads, whoever calls."""

    def __init__(self) -> None:
        self.waiting: list[_Helper] = []
        self.starting, self.started = threading.RLock(), 0
        self.board = memory.aligned((os.cpu_count() or 1, LINE), numpy.dtype("int64"))
        self.board[...] = 0
        self.states, self.place = self.board[:, STATE], self.board.ctypes.data
        self.lines = 0
        """Those that have been given to a helper."""

    def helper(self) -> _Helper | None:
        """One that waits, or a new one; `None` where all that there may be are at work, or none can be started."""
        busy = []
        try:
            with contextlib.suppress(IndexError):
                while (helper := self.waiting.pop()).computes():
                    busy.append(helper)
                return helper
            return self._start()
        finally:
            self.waiting += busy

    def _start(self) -> _Helper | None:
        with self.starting:
            if self.started >= _count() - 1 or self.lines == len(self.board):
                return None
            self.started += 1
            self.lines += 1
            line = self.board[self.lines - 1]
        try:
            return _Helper(self, line)
        except RuntimeError:  # as while the interpreter ends
            with self.starting:
                self.started -= 1
            return None

    def listening(self) -> int:
        """How many listen, or will in a moment."""
        found: int = self.states[: self.lines].tolist().count(LISTENS)
        return found + int(numpy.count_nonzero(self.board[: self.lines, ROUSED]))

    def rouse(self, count: int) -> None:
        """Let so many more listen."""
        for helper in self.waiting.copy():
            if count and helper.sleeps():
                helper.rouse()
                count -= 1
        while count and (new := self._start()) is not None:
            self.waiting.append(new)
            new.rouse()
            count -= 1


_pool = _Pool()


def _forget() -> None:
    """In the child of a fork, which has none of the threads."""
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def board_for(plan: Plan) -> tuple[int, int]:
    """Where those who help with a plan listen: the place of their lines, and the number of these."""
    pool, wanted = _pool, min(plan.threads - 1, plan.wakes)
    if wanted and wanted > (there := pool.listening()):
        pool.rouse(wanted - there)
    return pool.place, pool.lines


def each(ranges: list[Range], work: Work) -> None:
    """`work(first, last)` for each range, at once. What one raises is raised here, when all are done."""
    if len(ranges) == 1:
        return work(*ranges[0])
    job = _Job(ranges, work)
    for _ in range(min(len(ranges), _count()) - 1):
        helper = None
        try:
            helper = _pool.helper()
            if helper is None:
                break
            helper.wake(job)
        except BaseException:  # an interrupt
            _pool.waiting += [] if helper is None or helper.job is job else [helper]
            raise
    while job.take():
        job.finished()
    job.wait()
    if job.raised:
        raise job.raised[0]
    return None
