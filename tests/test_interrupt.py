"""Ctrl-C ends every command within two seconds, wherever it is: no process is left, and no file that is not whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import onnx
import pytest

import portnorm as pn
from benchmarks.tables import ROOT
from portnorm import interrupts
from portnorm.files import written_whole
from portnorm_onnx.storage import Draft
from tests.processes import output_of

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")


def processes(token: str) -> dict[int, str]:
    """The command lines of all processes that were started with this in their environment, in whatever session they are."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if token.encode() in (folder / "environ").read_bytes() and (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def heeding() -> None:
    """A shell lets what it runs in the background ignore interrupts, and what that starts as well."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def begun(token: str, process: int) -> bool:
    """Whether the command waits for interrupts: in a thread of its own."""
    return len(list(Path(f"/proc/{process}/task").iterdir())) > 1


def with_workers(token: str, process: int) -> bool:
    return sum("spawn_main" in line for line in processes(token).values()) > 0


def compiling(token: str, process: int) -> bool:
    return any("portnorm_backends.cpu.warming" in line for line in processes(token).values())


def with_browser(token: str, process: int) -> bool:
    return any("--user-data-dir" in line for line in processes(token).values())


def marks(name: str) -> list[pytest.MarkDecorator]:
    if "browser" in name:
        return [pytest.mark.runtime("web-page"), pytest.mark.alone]
    return [] if name.startswith(("demo, while it", "train")) else [pytest.mark.slow, pytest.mark.alone]


COMMANDS: dict[str, tuple[list[str], Callable[[str, int], bool], float]] = {
    "demo, while it trains": (["demo", "--out", "out"], with_workers, 4.0),
    "demo, while its processes start": (["demo", "--out", "out"], with_workers, 0.0),
    "train": (["train", "-o", "m.safetensors"], begun, 1.0),
    "train, while another process compiles": (["train", "-o", "m.safetensors"], compiling, 1.0),
    "warm": (["warm"], begun, 3.0),
    "bench": (["bench", "portnorm", "NumPy"], begun, 2.0),
    "conform": (["conform", "numpy", "onnxruntime"], begun, 3.0),
    "verify, while a browser starts": (["verify", "m.onnx", "--runtime", "web-page"], with_browser, 0.0),
    "verify, in a browser": (["verify", "m.onnx", "--runtime", "web-page"], with_browser, 0.7),
    "bench, in a browser": (["bench", "m.onnx", "--runtime", "web-page", "--seconds", "5"], with_browser, 2.0),
}
ENDS = 2.0
"""Seconds."""


@pytest.mark.parametrize("whom", ["the process", "its group"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in COMMANDS])
def test_an_interrupt_ends_a_command_and_all_that_it_started(name: str, whom: str, tmp_path: Path) -> None:
    command, ready, then = COMMANDS[name]
    token = uuid.uuid4().hex
    if "m.onnx" in command:
        pn.export(pn.LSTM(64, 256, norm="layer", num_layers=4, rng=0), tmp_path / "m.onnx")  # not verified before the interrupt
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")} if name in ("warm", "train, while another process compiles") else {}
    packages = os.pathsep.join(str(ROOT / folder) for folder in ("", "backends", "onnx_export"))
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment = {**os.environ, **cache, **threads, "TOKEN": token, "PYTHONPATH": packages, "PORTNORM_KERNELS": "background"}
    with (tmp_path / "said").open("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "portnorm", *command],
            cwd=tmp_path,
            env=environment,
            stdout=said,
            stderr=said,
            start_new_session=True,
            preexec_fn=heeding,
        )
        try:
            until = time.monotonic() + 60
            while not ready(token, process.pid):
                assert process.poll() is None, (tmp_path / "said").read_text()
                assert time.monotonic() < until
                time.sleep(0.05)
            time.sleep(then)
            assert process.poll() is None, (tmp_path / "said").read_text()
            started = time.monotonic()
            (os.kill if whom == "the process" else os.killpg)(process.pid, signal.SIGINT)
            code = process.wait(20)
            seconds = time.monotonic() - started
            while (left := processes(token)) and time.monotonic() < started + ENDS:
                time.sleep(0.05)
        finally:
            for number in processes(token):
                os.kill(number, signal.SIGKILL)
    assert seconds < ENDS
    assert (code, left) == (130, {})
    text = (tmp_path / "said").read_text()
    assert text.count(f"portnorm {command[0]}: interrupted") == 1
    assert "could not be compiled" not in text
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "said"]
    assert not [path for path in files if path.suffix == ".claim" or ("/cache/" not in str(path) and path.name.startswith("."))]
    for path in files:
        if path.suffix == ".safetensors":
            pn.load(path)


def test_what_an_interrupt_undoes_is_forgotten_when_it_is_whole(tmp_path: Path) -> None:
    before = dict(interrupts._undo)
    with written_whole(tmp_path / "a") as file:
        file.write(b"1")
        assert len(interrupts._undo) == len(before) + 1
    assert interrupts._undo == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_interrupt_takes_files_away_that_are_not_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the thread does for a main thread that is in compiled code: here a graph with weights beside it, and a file."""
    monkeypatch.setattr(interrupts, "_undo", {})
    layer = pn.Linear(300, 300, rng=0)
    report = pn.export(layer, tmp_path / "m.onnx", external_data=True)
    names = {path.name for path in tmp_path.iterdir()}
    draft = Draft(onnx.load(report.path), tmp_path / "n.onnx", external=True)
    with ExitStack() as stack:
        stack.enter_context(written_whole(tmp_path / "b")).write(np.zeros(10).tobytes())
        assert {path.name for path in tmp_path.iterdir()} > names
        interrupts.undo_all()
        assert {path.name for path in tmp_path.iterdir()} == names
        stack.pop_all()  # nor does anything put them back
    del draft
    assert interrupts._undo == {}


def test_what_is_there_and_no_file_stays_as_it_is(tmp_path: Path) -> None:
    """A file that is put in the place of a pipe or a device would take that away."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(pn.PortnormError, match="it is there, and no file"):
        pn.save(pn.Linear(2, 3, rng=0), tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_an_interrupt_while_a_process_is_started_comes_when_its_end_is_noted() -> None:
    code = """
import os, signal, subprocess, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from portnorm import interrupts
interrupts.watch(lambda: None)
try:
    with interrupts.held_back():
        os.kill(os.getpid(), signal.SIGINT)
        process = subprocess.Popen([sys.executable, "-c", "import signal; print(signal.SIGINT in signal.pthread_sigmask(0, ())); input()"],
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        interrupts.undone(process.kill)
        told = process.stdout.readline().decode().strip()
        print("noted", told)
except KeyboardInterrupt:
    interrupts.undo_all()
    print("interrupted", process.wait() == -signal.SIGKILL, interrupts.came())
    sys.stdout.flush()
    os._exit(0)
"""
    assert output_of(code).splitlines() == ["noted True", "interrupted True True"]
