"""The first answer waits for no compiler: definitions until the kernels are there, whatever happens to who compiles them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from portnorm.__main__ import main
from portnorm_backends.cpu import notes
from tests.processes import ROOT, output_of
from tests.tolerances import relative

pytest.importorskip("numba")

from portnorm_backends.cpu import families

CALL = """
import json, os, sys, threading, time
import numpy as np, portnorm as pn
from portnorm_backends.cpu import families, notes, warming
from portnorm_backends.cpu.rows import LastAxisResiduals

x, w = np.linspace(-3, 5, 160, dtype="float32").reshape(4, 40), np.linspace(0.5, 2, 40, dtype="float32")

def call():
    y, residuals = pn.layer_norm.forward(x, w, w)
    return y.tolist(), type(residuals) is LastAxisResiduals

def wait(until, seconds=100):
    end = time.monotonic() + seconds
    while not until() and time.monotonic() < end:
        time.sleep(0.01)
    return until()

def there():
    return np.dtype("float32") in warming.READY["rows"]
"""


def run(cache: Path, code: str, **environment: str) -> Any:
    """What the code prints as JSON, in a process that has the kernels compiled in the background and kept in this folder."""
    where = {"PORTNORM_KERNELS": "background", "NUMBA_CACHE_DIR": str(cache), **environment}
    return json.loads(output_of(CALL + code, **where))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the kernels of rows of float32, which a process compiled in the background."""
    folder = tmp_path_factory.mktemp("kernels")
    code = """
y, by_kernel = call()
imported = "numba" in sys.modules
wait(there)
print(json.dumps([y, by_kernel, imported, *call()]))
"""
    first, by_kernel, imported, later, later_by_kernel = run(folder, code)
    assert not by_kernel, "the first answer waited for the compiler"
    assert not imported
    assert later_by_kernel, "the kernels were not taken when they were there"
    np.testing.assert_allclose(later, first, **relative("float32"))
    return folder


def test_the_next_process_takes_what_is_kept(cache: Path) -> None:
    code = """
_, by_kernel = call()
from portnorm_backends.cpu import rowwise
stats = rowwise.forward(np.dtype("float32")).stats
print(json.dumps([by_kernel, sum(stats.cache_hits.values()), sum(stats.cache_misses.values()), sorted(map(str, warming._asked))]))
"""
    assert run(cache, code) == [True, 1, 0, []]


def test_a_note_of_what_is_no_longer_kept_is_none(cache: Path, tmp_path: Path) -> None:
    """Somebody cleared numba's cache but not the notes beside it."""
    (note,) = cache.glob("*rows-float32.json")
    (tmp_path / note.name).write_text(note.read_text().replace(".nbi", ".gone"))
    assert run(tmp_path, "print(json.dumps([warming._is_kept(('rows', 'float32')), call()[1]]))") == [False, False]


def test_kernels_for_training_are_those_for_inference_too(tmp_path: Path) -> None:
    code = """
notes.made_of = lambda: "x"
(notes.place() / "portnorm-x-LSTM-training-float32.json").write_text("[]")
print(json.dumps([warming._is_kept((name, "float32")) for name in ("LSTM", "LSTM training", "GRU")]))
"""
    assert run(tmp_path, code) == [True, True, False]


@pytest.mark.parametrize("how", ["the process fails", "the process is killed", "no process can be started"])
def test_who_cannot_compile_goes_on_with_the_definitions(how: str, tmp_path: Path) -> None:
    """And says so once, by `logging`; to wait for the kernels still gives them."""
    broken = {
        "the process fails": "lambda command, **how: real([sys.executable, '-c', 'raise SystemExit(\"no compiler\")'], **how)",
        "the process is killed": "lambda command, **how: real([sys.executable, '-c', 'import os; os.kill(os.getpid(), 9)'], **how)",
        "no process can be started": "lambda command, **how: real(['/nowhere'], **how)",
    }[how]
    code = f"""
import logging
said = []
warming.LOG.addHandler(type("Held", (logging.Handler,), {{"emit": lambda self, record: said.append(record.getMessage())}})())
real = warming.subprocess.Popen
warming.subprocess.Popen = {broken}
before = call()[1]
wait(lambda: said)
after = [call()[1] for _ in range(3)]
waited = pn.warm(pn.LayerNorm(40))
print(json.dumps([before, after, len(said), said[0], list(map(str, notes.place().glob("*.claim"))), call()[1]]))
"""
    before, after, count, said, claims, by_kernel = run(tmp_path, code)
    assert (before, after, count, claims, by_kernel) == (False, [False] * 3, 1, [], True)
    assert said.startswith("the kernels rows float32 could not be compiled, NumPy goes on without them: ")


def test_two_processes_compile_once(tmp_path: Path) -> None:
    code = """
real, started = warming.subprocess.Popen, []
warming.subprocess.Popen = lambda command, **how: (started.append(1), real(command, **how))[1]
call()
wait(there)
print(json.dumps([len(started), call()[1]]))
"""
    environment = {"PORTNORM_KERNELS": "background", "NUMBA_CACHE_DIR": str(tmp_path), "PATH": "", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", CALL + code]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, cwd=ROOT, text=True) for _ in range(2)]
    found = [json.loads(process.communicate(timeout=200)[0]) for process in both]
    assert sorted(found) == [[0, True], [1, True]]


def test_a_claim_of_a_process_that_is_no_more_holds_nobody_up(cache: Path, tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (note,) = cache.glob("*rows-float32.json")
    (tmp_path / note.with_suffix(".claim").name).write_text(str(ended.pid))
    assert run(tmp_path, "call(); wait(there); print(json.dumps(call()[1]))") is True


def test_a_claim_that_comes_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a process which looked just before was taken away by who looked just after, and both compiled."""
    note = tmp_path / "rows-float32.json"
    monkeypatch.setattr(notes, "note_of", lambda family: note)
    claim, left = note.with_suffix(".claim"), notes._is_left

    def and_then_somebody_comes(path: Path) -> bool:
        found = left(path)
        claim.write_text(str(os.getpid()))
        return found

    monkeypatch.setattr(notes, "_is_left", and_then_somebody_comes)
    with notes.claimed(("rows", "float32")) as mine:
        assert not mine
    assert claim.read_text() == str(os.getpid())


def test_without_a_place_to_keep_them_the_thread_compiles(tmp_path: Path) -> None:
    code = """
notes.place = lambda: None
before = call()[1]
wait(there)
print(json.dumps([before, call()[1]]))
"""
    assert run(tmp_path, code) == [False, True]


def test_a_process_may_end_while_kernels_are_loaded(cache: Path) -> None:
    code = """
warming._is_kept = lambda family: False  # as if they were compiled now
warming._compiled_elsewhere = lambda family: True
call()
wait(warming._loading.locked, 20)
print(json.dumps(None))
"""
    assert run(cache, code) is None


def test_a_fork_when_the_process_ends(cache: Path) -> None:
    """A handler that runs last may still fork: nothing holds the lock of the compiler for ever."""
    code = """
import atexit, warnings
warnings.simplefilter("ignore")

def last():
    child = os.fork()
    if child == 0:
        os._exit(0)
    print(json.dumps(os.waitpid(child, 0)[1]), flush=True)

atexit._clear()
atexit.register(last)
atexit.register(warming._stop)  # runs first
call()
wait(there)
"""
    assert run(cache, code) == 0


SURROUNDINGS = {
    "no home": ("""
def nobody(*_):
    raise RuntimeError("Could not determine home directory.")

warming.Path.expanduser = nobody
notes._HERE = warming.Path("/proc/nowhere")
del os.environ["NUMBA_CACHE_DIR"]
""", True),
    "numba without metadata": ("""
def none(_):
    raise warming.importlib.metadata.PackageNotFoundError("numba")

warming.importlib.metadata.version = none
""", True),
    "no thread to be had": ("""
def none(_):
    raise RuntimeError("can't start new thread")

threading.Thread.start = none
""", False),
}  # fmt: skip
"""What a process may lack, and whether it gets kernels all the same."""


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_a_call_is_answered_whatever_the_surroundings_lack(name: str, tmp_path: Path) -> None:
    code, compiles = SURROUNDINGS[name]
    code += f"""
first = call()[0]
done = wait(there, {100 if compiles else 0.1})
print(json.dumps([done, np.allclose(first, call()[0], atol=1e-5), call()[1]]))
"""
    assert run(tmp_path, code) == [compiles, True, compiles]


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="there is no fork")
def test_a_fork_while_kernels_are_loaded(cache: Path) -> None:
    code = """
import warnings
warnings.simplefilter("ignore")  # of a fork beside a thread
warming._is_kept = lambda family: False
warming._compiled_elsewhere = lambda family: True
call()
wait(warming._loading.locked, 20)
child = os.fork()
if child == 0:
    call()
    sys.exit(0 if wait(there, 60) and call()[1] else 1)
print(json.dumps([os.waitpid(child, 0)[1], wait(there, 60), call()[1]]))
"""
    assert run(cache, code) == [0, True, True]


# -- waiting -------------------------------------------------------------------------------------------------------------------------------


def test_who_has_waited_waits_for_nothing_else(cache: Path) -> None:
    code = """
found = pn.warm(pn.LayerNorm(40))
print(json.dumps([found, call()[1], sorted(map(str, warming._asked))]))
"""
    assert run(cache, code) == [["rows float32"], True, []]


LAYERS = {
    "LayerNorm": (lambda: pn.LayerNorm((8, 5)), ["rows"]),
    "LayerNorm of short rows": (lambda: pn.LayerNorm((8, 4)), ["rows", "short rows"]),
    "GroupNorm, whose rows hang on what is given": (lambda: pn.GroupNorm(2, 64), ["rows", "short rows"]),
    "BatchRenorm": (lambda: pn.BatchRenorm(3), ["channels"]),
    "GRU": (lambda: pn.GRU(2, 3, rng=0), ["rows", "channels", "products", "outer products", "GRU training", "short rows"]),
    "BN-LSTM": (
        lambda: pn.LSTM(2, 40, norm="batch", rng=0),
        ["rows", "channels", "products", "outer products", "LSTM training", "steps by batch"],
    ),
    "a model": (
        lambda: pn.Sequential(pn.LSTM(2, 3, rng=0), pn.Linear(3, 1, rng=0)),
        ["rows", "channels", "products", "outer products", "LSTM training", "short rows"],
    ),
    "bfloat16": (
        lambda: pn.Sequential(pn.LayerNorm(3, dtype="bfloat16"), pn.LSTM(3, 3, rng=0, dtype="bfloat16")),
        [
            "rows bfloat16",
            "rows",
            "short rows bfloat16",
            "short rows",
            "channels bfloat16",
            "channels",
            "products",
            "outer products",
            "LSTM training",
        ],
    ),
    "float16, of which there are no kernels": (lambda: pn.LayerNorm(3, dtype="float16"), []),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_waits_for_its_own_kernels(name: str) -> None:
    layer, expected = LAYERS[name]
    found = dict.fromkeys(" ".join(family) for family in families.needed((layer(),)))  # type: ignore[no-untyped-call]
    assert [family.removesuffix(" float32") for family in found] == expected


def test_what_cannot_be_waited_for_is_refused() -> None:
    with pytest.raises(pn.UnsupportedError, match="`dtype` is 'float16'; expected one of float32, float64, bfloat16"):
        pn.warm(dtype="float16")
    with pytest.raises(pn.UnsupportedError, match="`layers` has a str; expected layers of portnorm"):
        pn.warm("float32")  # type: ignore[arg-type]


def test_without_numba_there_is_nothing_to_wait_for() -> None:
    code = """
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "numba" else real(name, package)
import portnorm as pn
print(pn.warm(), pn.warm(pn.LayerNorm(3)))
"""
    assert output_of(code) == "[] []"


def test_the_command_line_says_what_is_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["kernels"]
    assert set(found["compiled"]) == {"float32", "float64", "bfloat16"}
    assert all(set(names) <= set(families.FAMILIES) for names in found["compiled"].values())
    assert main(["warm", "--dtype", "int8"]) == 2
    assert "`dtype` is 'int8'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype"), [*product(families.FAMILIES, ("float32", "float64")), *product(("rows", "short rows", "channels"), ("bfloat16",))]
)
def test_a_family_has_all_that_its_calls_need(family: str, dtype: str) -> None:
    """After it was loaded nothing of its own module is compiled any more, whichever layer or norm calls."""
    code = f"""
import numpy as np, portnorm as pn
from portnorm_backends.cpu import families, notes, warming
for other in ({family!r}, *([families.BY_BATCH] if {family!r}[0].isupper() else [])):
    warming._load((other, {dtype!r}))
from numba.core import event
compiled = []
class Listener(event.Listener):
    def on_start(self, found): compiled.append(str(found.data["dispatcher"]))
    def on_end(self, found): pass
event.register("numba:compile", Listener())
r = np.random.default_rng(0)
def a(*shape): return r.standard_normal(shape).astype(families.type_named({dtype!r}))
name, training = {family!r}.split()[0], {family!r}.endswith("training")
if name == "rows":
    for op, p in ((pn.layer_norm, 2), (pn.rms_norm, 1)):
        for shape, axis in (((4, 8), -1), ((2, 3, 8), -1), ((2, 3, 8), (1, 2))):
            w = [a(*((3, 8) if axis == (1, 2) else (8,))) for _ in range(p)]
            if op is pn.rms_norm and axis != -1: continue
            how = {{}} if op is pn.rms_norm else {{"axis": axis}}
            for weights in (w, []):
                y, pullback = pn.vjp(op, a(*shape), *weights, **how); pullback(y); op(a(*shape), *weights, **how)
    pn.group_norm(a(2, 4, 6), 2, a(4), a(4))
elif name == "integers":
    layer = pn.quantized(pn.LSTM(4, 3, rng=0, dtype={dtype!r}))
    for rows in (1, 3): layer.step(a(rows, 4), layer.initial_state(rows))
    pn.quantized(pn.Linear(4, 3, rng=0, dtype={dtype!r}))(a(2, 4))
elif name == "channels":
    for shape in ((4, 8), (2, 3, 5), (2, 3, 4, 4)):
        c = shape[1]
        y, pullback = pn.vjp(pn.batch_norm, a(*shape), a(c), a(c)); pullback(y)
        pn.batch_norm(a(*shape), mean=a(c), var=np.abs(a(c)))
elif name == "products":
    y, pullback = pn.vjp(pn.linear, a(64, 64), a(128, 64), a(128)); pullback(y); pn.linear(a(64, 64), a(128, 64))
elif name == "outer":
    y, pullback = pn.vjp(pn.linear, a(256, 128), a(128, 128)); pullback(y)
elif name == "short":
    for op, p in ((pn.layer_norm, 2), (pn.rms_norm, 1)):
        for rows in (3, 4096):
            op(a(rows, 8), *(a(8) for _ in range(p))); op(a(rows, 2, 8))
            y, pullback = pn.vjp(op, a(rows, 8), *(a(8) for _ in range(p))); pullback(y)
elif name == "steps":
    pn.LSTM(3, 4, norm="batch", rng=0, dtype={dtype!r})(a(5, 2, 3))
elif name == "updates":
    for optimizer in (pn.SGD(0.1), pn.SGD(0.1, 0.9), pn.RMSProp(), pn.Adam(), pn.AdamW()):
        params = {{"weight": a(3, 4)}}
        optimizer.update(params, params, optimizer.init(params))
else:
    for norm in (None, "layer", "batch"):
        layer = getattr(pn, name)(3, 4, norm=norm, rng=0, dtype={dtype!r})
        for x in (a(5, 2, 3), a(1, 2, 3)):
            for lengths in (None, [1, 1]):
                layer(x, lengths=lengths)
                if training:
                    y, _, pullback = layer.vjp(x, lengths=lengths, training=True); pullback(y)
modules = {{"rows": "rowwise", "short": "abreast", "channels": "channelwise", "integers": "integer_rows", "updates": "descending",
    "outer": "cpu.outer", "steps": "_over_batch"}}
own = modules.get(name, name.lower())
print([c for c in compiled if f".{{own}}." in c or own in c.split("(")[-1]])
"""
    assert output_of(code, timeout=600) == "[]"
