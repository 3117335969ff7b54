"""The threads of the kernels on the CPU: how many, that they come back, and what becomes of what goes wrong in one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from _thread import interrupt_main
from typing import Any

import pytest

from portnorm_backends.cpu import threads
from tests.processes import in_threads, output_of


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> threads._Pool:
    """Threads of its own, of which there may be three in all."""
    monkeypatch.setattr(threads, "_count", lambda: 3)
    monkeypatch.setattr(threads, "_pool", threads._Pool())
    return threads._pool


def settled(pool: threads._Pool) -> int:
    """How many threads wait, once none is at work any more."""
    until = time.monotonic() + 10
    while len(pool.waiting) < pool.started and time.monotonic() < until:
        time.sleep(0.001)
    return len(pool.waiting)


def computed(count: int) -> list[int]:
    """The numbers of so many ranges of one row, as they were computed."""
    found: list[int] = []
    threads.each([(k, k + 1) for k in range(count)], lambda first, last: found.append(first))
    return sorted(found)


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("multiple", [1, 3, 16])
@pytest.mark.parametrize("cost", [0, 1.9, 2, 3.5, 1000])
def test_ranges_are_of_whole_multiples_and_of_what_pays(cost: float, multiple: int, pieces: int, pool: Any) -> None:
    for rows in (1, 2, 15, 16, 17, 100):
        ranges = threads.parts(rows, cost, multiple, pieces)
        assert [k for a, b in ranges for k in range(a, b)] == [*range(rows)]
        assert all((b - a) % multiple == 0 for a, b in ranges[:-1])
        assert len(ranges) <= (1 if cost < 2 else max(min(3, cost), min(cost, 3 * pieces)))


def test_each_range_is_computed_once_and_threads_come_back(pool: threads._Pool) -> None:
    for _ in range(300):
        assert computed(7) == [*range(7)]
    assert pool.started <= 2
    assert settled(pool) == pool.started


def test_ranges_are_computed_at_once(pool: threads._Pool) -> None:
    met = threading.Barrier(3, timeout=30)
    threads.each([(0, 1), (1, 2), (2, 3)], lambda first, last: met.wait() and None)


def test_callers_share_the_threads_and_wait_for_none(pool: threads._Pool) -> None:
    totals = [0] * 8

    def call(k: int) -> None:
        for _ in range(100):
            totals[k] += sum(computed(5))

    in_threads(call)
    assert totals == [1000] * 8
    assert pool.started <= 2


def test_what_a_thread_raises_is_raised_when_all_are_done(pool: threads._Pool) -> None:
    done = []

    def work(first: int, last: int) -> None:
        if first == 2:
            raise ValueError(f"from {first} on")
        time.sleep(0.01)
        done.append(first)

    with pytest.raises(ValueError, match="from 2 on"):
        threads.each([(k, k + 1) for k in range(6)], work)
    assert sorted(done) == [0, 1, 3, 4, 5]
    assert settled(pool) == pool.started


def test_an_interrupt_waits_for_what_is_being_computed(pool: threads._Pool) -> None:
    started, done, main = threading.Event(), [], threading.main_thread()
    assert threading.current_thread() is main

    def work(first: int, last: int) -> None:
        if threading.current_thread() is main:
            assert started.wait(30)  # until a helper is at work
            return
        started.set()
        time.sleep(0.5)  # until the main thread waits
        interrupt_main()
        time.sleep(0.2)
        done.append(first)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # who was started in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            threads.each([(k, k + 1) for k in range(2)], work)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(done) == 1


def test_a_child_of_a_fork_has_threads_of_its_own() -> None:
    code = """
import os, time
from portnorm_backends.cpu import threads
threads._count = lambda: 3
def call():
    found = []
    threads.each([(k, k + 1) for k in range(9)], lambda first, last: (time.sleep(0.001), found.append(first)))
    return sorted(found) == [*range(9)] and threads._pool.started > 0
assert call()
children = []
for _ in range(5):
    child = os.fork()
    if child == 0:
        os._exit(0 if not threads._pool.started and call() and call() else 1)
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], call())
"""
    assert output_of(code) == "[0, 0, 0, 0, 0] True"


def test_a_process_ends_while_threads_wait() -> None:
    code = """
from portnorm_backends.cpu import threads
threads._count = lambda: 3
threads.each([(k, k + 1) for k in range(9)], lambda first, last: None)
print("done")
"""
    assert output_of(code) == "done"


def test_threads_that_wait_cost_nothing() -> None:
    code = """
import time
from portnorm_backends.cpu import threads
threads._count = lambda: 3
threads.each([(k, k + 1) for k in range(9)], lambda first, last: time.sleep(0.001))
before = time.process_time()
time.sleep(1)
print(time.process_time() - before < 0.02)
"""
    assert output_of(code) == "True"


@pytest.mark.parametrize(
    ("environment", "count"),
    [({}, 4), ({"OMP_NUM_THREADS": "2"}, 2), ({"OMP_NUM_THREADS": "2,1"}, 2), ({"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "3"}, 1)],
    ids=str,
)
def test_the_number_follows_the_environment(environment: dict[str, str], count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.delitem(sys.modules, "threadpoolctl", raising=False)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert threads._count() == count


@pytest.mark.skipif(len(getattr(os, "sched_getaffinity", lambda _: ())(0)) < 2, reason="one processor")
def test_the_number_follows_threadpoolctl() -> None:
    code = """
import portnorm
from portnorm_backends.cpu import threads
before = threads._count()
import threadpoolctl
with threadpoolctl.threadpool_limits(1):
    inside = threads._count()
print(before, inside, threads._count())
"""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert found[0] == found[2] > found[1] == "1"
