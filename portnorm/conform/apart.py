"""Measure subjects in processes of their own, several at a time: one that ends its process, or gives no answer, is a row that says so."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from portnorm.conform.libraries import LIBRARIES
from portnorm.conform.result import Result
from portnorm.conform.subjects import subjects_of_others
from portnorm.errors import ConformanceError
from portnorm.interrupts import held_back, undone

SECONDS = 90.0
"""Longer than this for one case, with what a library imports and compiles for it, is no answer."""
ENDS = 3
"""After so many ends of its process, or one case without an answer, the rest of a subject is left out."""
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass
class Group:
    """Subjects that share a process, and the truths that are computed in it."""

    subjects: list[str]
    done: list[str] = field(default_factory=list)
    """Cases that were begun, so that another process goes on after them."""
    ends: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def groups_of(subjects: Sequence[str], jobs: int) -> list[Group]:
    """Others' normalizations each by itself, the libraries and runtimes of the tables dealt out. What compiles is first, since it takes
    longest, and together, since some of it is the same; then those of the tables.
    """
    others = subjects_of_others() if set(subjects) - {*LIBRARIES} else {}
    own = [name for name in subjects if name not in others]
    theirs = [name for name in subjects if name in others]
    dealt = [Group(part) for k in range(jobs) if (part := own[k::jobs])]
    compiled = [name for name in theirs if others[name].eager is not None]
    return [*([Group(compiled)] if compiled else []), *dealt, *(Group([name]) for name in theirs if others[name].eager is None)]


def measure_apart(
    subjects: Sequence[str],
    *,
    asked: dict[str, Any],
    modules: Sequence[str] = (),
    jobs: int | None = None,
    seconds: float = SECONDS,
    progress: Callable[[str], None] = lambda what: None,
) -> Iterator[Result]:
    """As `measure(subjects, **asked)`, in `jobs` processes at a time (by default as many as there are cores), which import `modules`.

    Results come as they are made, those of one subject in order.
    """
    jobs = jobs or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) or 1
    waiting: queue.Queue[Group] = queue.Queue()
    told: queue.Queue[Result | str | BaseException | None] = queue.Queue()
    for group in groups_of(subjects, jobs):
        waiting.put(group)
    stop = threading.Event()

    def work() -> None:
        try:
            while not stop.is_set():
                for said in _whole(waiting.get_nowait(), asked, modules, seconds, stop):
                    told.put(said)
        except queue.Empty:
            told.put(None)
        except BaseException as error:
            told.put(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(jobs)]
    try:
        for thread in threads:
            thread.start()
        left = jobs
        while left:
            said = told.get()
            if said is None:
                left -= 1
            elif isinstance(said, BaseException):
                raise said
            elif isinstance(said, str):
                progress(said)
            else:
                yield said
    finally:
        stop.set()


def _whole(group: Group, asked: dict[str, Any], modules: Sequence[str], seconds: float, stop: threading.Event) -> Iterator[Result | str]:
    """Everything of a group, in as many processes as that takes."""
    while group.subjects and not stop.is_set():
        before = len(group.done)
        why = ""
        for said in _process(group, asked, modules, seconds):
            if stop.is_set():
                return
            if isinstance(said, str) and said.startswith("!"):
                why = said[1:]
            else:
                yield said
        if not why:
            return
        if len(group.done) == before:
            raise ConformanceError(f"the process that measures {', '.join(group.subjects)} ended before its first case: {why}")
        yield from _ended(group, why)


def _ended(group: Group, why: str) -> Iterator[Result]:
    """A row for the case at which the process ended, and one for what is left out after it."""
    subject, operation, *regime, dtype = group.done[-1].split(" / ")
    case = f"from portnorm import conform\ncase = conform.find({operation!r}, {' / '.join(regime)!r}, {dtype!r})"
    about = (subject, group.versions.get(subject, ""))
    yield Result(*about, operation, " / ".join(regime), dtype, "forward", "does not run", detail=why, reproduce=case)
    group.ends[subject] = group.ends.get(subject, 0) + (ENDS if why.startswith("no answer") else 1)
    if group.ends[subject] >= ENDS:
        group.subjects.remove(subject)
        yield Result(*about, "all", "all", "all", "forward", "does not run", detail=f"{why}; the rest of its cases is left out")


def _process(group: Group, asked: dict[str, Any], modules: Sequence[str], seconds: float) -> Iterator[Result | str]:
    """What one process says; "!" and why, where it does not come to its end."""
    environment = {**dict.fromkeys(_THREADS, "1"), **os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    spec = json.dumps({**asked, "subjects": group.subjects, "skip": group.done, "modules": [*modules]})
    with tempfile.TemporaryFile() as errors:
        with held_back():
            process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "portnorm.conform.worker"],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            forget = undone(process.kill)
        silent = threading.Event()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(spec + "\n")
                process.stdin.close()
            except BrokenPipeError:  # said below
                pass
            for line in _lines(process, process.stdout, seconds, silent):
                said = json.loads(line)
                if "at" in said:
                    group.done.append(said["at"])
                    yield str(said["at"])
                elif "result" in said:
                    result = Result(**said["result"])
                    group.versions[result.subject] = result.version
                    yield result
                else:
                    return
            yield "!" + (f"no answer in {seconds:g} s" if silent.is_set() else _last_words(process.wait(), errors))
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
            forget()


def _lines(process: subprocess.Popen[str], stream: IO[str], seconds: float, silent: threading.Event) -> Iterator[str]:
    """The lines of a process, which is ended where one takes longer than `seconds`."""

    def late() -> None:
        silent.set()
        process.kill()

    while True:
        timer = threading.Timer(seconds, late)
        timer.daemon = True
        timer.start()
        line = stream.readline()
        timer.cancel()
        if not line:
            return
        yield line


def _last_words(code: int, errors: IO[bytes]) -> str:
    """How a process ended: its signal or exit status, and what it said last."""
    errors.seek(0)
    lines = [line.strip() for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    return f"its process ended with {how}" + (f": {lines[-1][:200]}" if lines else "")
