"""The threads of the kernels on the CPU: how many, that they come back, and what becomes of what goes wrong in one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from _thread import interrupt_main
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

from portnorm_backends.cpu import compiling, sharing, threads
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
time.sleep(0.5)  # until the threads of NumPy's BLAS sleep
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
def test_the_number_follows_the_environment(
    environment: dict[str, str], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.delitem(sys.modules, "threadpoolctl", raising=False)
    monkeypatch.setattr(threads, "_at_most", threads._limit(environment, tmp_path))
    assert threads._count() == count


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({"cpu.max": "max 100000\n"}, 3),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "400000 100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu.max": "nonsense"}, 3),
    ],
    ids=str,
)
def test_the_number_is_no_more_than_a_control_group_gives_time_of(files: dict[str, str], count: int, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads._limit({"OMP_NUM_THREADS": "3"}, tmp_path) == count


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


# -- kernels that threads share -----------------------------------------------------------------------------------------------------------


def _squares(x: Any, y: Any, own: Any, factor: float) -> bool:
    """A kernel: y = factor · x², and in `own` how many rows; wrong where one is negative."""
    fine = True
    for k in range(x.shape[0]):
        y[k] = factor * x[k] * x[k]
        own[0] += 1
        if x[k] < 0:
            fine = False
    return fine


@pytest.fixture(scope="module")
def squares() -> Any:
    t = numba.float64
    given = (numba.types.Array(t, 1, "C", readonly=True), t[::1], numba.int64[::1], t)
    return sharing.shared(compiling.compiled(signatures=numba.boolean(*given))(_squares), 2, 1)


def squared(kernel: Any, rows: int, ranges: int, count: int = 3, wakes: int = 2, start: int = 0) -> bool:
    """Share a call, and look at what it did; whether it said that all was right."""
    step = -(-rows // ranges)
    plan = threads.Plan(count, step, -(-rows // step), wakes)
    x, y, own = np.arange(start, start + rows, dtype=float), np.full(rows, np.nan), np.zeros((plan.ranges, 1), np.int64)
    fine = sharing.call(kernel, plan, rows, (x, y), (own,), (2.0,))
    np.testing.assert_array_equal(y, 2 * x * x)
    assert own.sum() == rows
    assert own[:-1].tolist() == [[step]] * (plan.ranges - 1)
    return fine


@pytest.mark.parametrize("wakes", [0, 1, 2])
@pytest.mark.parametrize("rows", [1, 7, 1000, 100_000])
def test_a_shared_kernel_computes_each_range_once(rows: int, wakes: int, squares: Any, pool: threads._Pool) -> None:
    for ranges in (1, 2, 3, 8, 64):
        for _ in range(100):
            assert squared(squares, rows, min(rows, ranges), wakes=wakes)
    assert wakes <= pool.started <= (2 if wakes else 0)
    assert not squared(squares, rows, min(rows, 8), start=-1)


def test_threads_that_listen_take_part(pool: threads._Pool) -> None:
    """Ranges of one call are computed by three threads, of which none but the first had to be woken."""
    myself = numba.types.ExternalFunction("pthread_self", numba.uint64())

    def by_whom(x: Any, own: Any, turns: int) -> bool:
        for _ in range(turns):
            for k in range(x.shape[0]):
                x[k] = x[k] * 0.5 + 1
        own[0] = myself()
        return True

    given = (numba.float64[::1], numba.uint64[::1], numba.int64)
    kernel = sharing.shared(numba.njit([numba.boolean(*given)], nogil=True)(by_whom), 1, 1)
    who, until, wakes = set[int](), time.monotonic() + 60, 2
    while len(who) < 3 and time.monotonic() < until:
        own = np.zeros((12, 1), np.uint64)
        assert sharing.call(kernel, threads.Plan(3, 1000, 12, wakes), 12_000, (np.zeros(12_000),), (own,), (100,))
        who, wakes = set(own.ravel().tolist()), 0 if pool.states.all() else 2
    assert len(who) == 3


def test_every_caller_has_threads_of_its_own_while_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that compute for one caller are none for another, be it of kernels or of Python: it wakes some that sleep."""
    monkeypatch.setattr(threads, "_count", lambda: 9)
    monkeypatch.setattr(os, "cpu_count", lambda: 9)
    monkeypatch.setattr(threads, "_pool", threads._Pool())
    myself = numba.types.ExternalFunction("pthread_self", numba.uint64())
    nap = numba.types.ExternalFunction("usleep", numba.int32(numba.int32))

    def by_whom(own: Any, microseconds: int) -> bool:
        nap(microseconds)
        own[0] = myself()
        return True

    kernel = sharing.shared(numba.njit([numba.boolean(numba.uint64[::1], numba.int32)], nogil=True)(by_whom), 1)

    def call(counts: list[int]) -> None:
        own = np.zeros(12, np.uint64)
        assert sharing.call(kernel, threads.Plan(4, 1, 12, 3), 12, (own,), whole=(50_000,))
        counts.append(len(set(own.tolist())))

    def at_once() -> list[int]:
        counts, idents = list[int](), set[int]()
        callers = [threading.Thread(target=call, args=(counts,)) for _ in range(2)]
        for caller in callers:
            caller.start()
            time.sleep(0.02)  # until its threads are at work
        threads.each([(k, k + 1) for k in range(3)], lambda *_: idents.add(threading.get_ident()) or time.sleep(0.02))
        for caller in callers:
            caller.join()
        return [*counts, len(idents)]

    assert any(min(at_once()) >= 3 for _ in range(20))  # a busy machine may be late, and not always


def test_callers_at_once_share_kernels_and_python(squares: Any, pool: threads._Pool) -> None:
    """Some call kernels, others Python functions that take the same threads away from listening."""

    def call(k: int) -> None:
        for turn in range(200):
            if (k + turn) % 3:
                squared(squares, 1 + 37 * turn, 1 + turn % 9, wakes=turn % 3)
            else:
                assert computed(5) == [*range(5)]

    in_threads(call)
    assert settled(pool) == pool.started <= 2
    assert computed(7) == [*range(7)]


def test_threads_sleep_when_nobody_has_called_for_a_while(squares: Any, pool: threads._Pool) -> None:
    for _ in range(20):
        squared(squares, 100_000, 8)
        until = time.monotonic() + 10
        while pool.states.any() and time.monotonic() < until:
            time.sleep(0.001)
        assert not pool.states.any()
    assert settled(pool) == 2


def test_a_range_that_finds_no_memory_is_an_error(pool: threads._Pool) -> None:
    def kernel(start: int, stop: int, size: int) -> bool:
        return bool(np.empty(size if start else 1).size > 0)

    whole = numba.boolean(*(numba.int64,) * 3)
    shared = sharing.shared(numba.njit([whole], nogil=True)(kernel))
    plan = threads.Plan(3, 1, 4, 2)
    assert sharing.call(shared, plan, 4, whole=(1,))
    with pytest.raises(MemoryError, match="no memory for 4 ranges of 4 rows"):
        sharing.call(shared, plan, 4, whole=(2**60,))


def test_a_process_ends_while_threads_listen() -> None:
    """They are in compiled code then, which the interpreter does not wait for."""
    code = """
import numpy as np, portnorm as pn
from portnorm_backends.cpu import threads
threads._count = lambda: 3
pn.warm(pn.LayerNorm(512))
x, w = np.ones((1000, 512), np.float32), np.ones(512, np.float32)
for _ in range(3):
    pn.layer_norm(x, w, w)
print(threads._pool.started > 0)
"""
    for _ in range(5):
        assert output_of(code) == "True"


def test_a_child_of_a_fork_shares_with_threads_of_its_own() -> None:
    code = """
import os, numpy as np, portnorm as pn
from portnorm_backends.cpu import threads
threads._count = lambda: 3
x, w = np.random.default_rng(0).standard_normal((1000, 512), np.float32), np.ones(512, np.float32)
pn.warm(pn.LayerNorm(512))
expected = pn.layer_norm(x, w, w)
def same():
    return all((pn.layer_norm(x, w, w) == expected).all() for _ in range(50))
assert same() and threads._pool.started
children = []
for _ in range(5):
    child = os.fork()
    if child == 0:
        os._exit(0 if not threads._pool.started and same() and threads._pool.started else 1)
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], same())
"""
    assert output_of(code) == "[0, 0, 0, 0, 0] True"
