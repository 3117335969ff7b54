"""The benchmark: every engine computes the same, ratios are of what was measured, and what goes wrong is said."""

from __future__ import annotations

import json
from typing import Any

import pytest

import portnorm as pn
from portnorm import bench
from portnorm.__main__ import main
from portnorm.bench import isa
from portnorm.bench.worker import difference
from portnorm.bench.works import ALLOWED

SMALL = [
    *(bench.Work("LN", (4, 32), backward) for backward in (False, True)),
    *(bench.Work(what, (2, 8, 3, 3), backward) for what in ("BN", "GN") for backward in (False, True)),
    *(bench.Work(what, (5, 3, 4, 6), backward) for what in ("LSTM", "LN-LSTM", "BN-LSTM", "GRU", "LN-GRU") for backward in (False, True)),
    bench.Work("BN", (2, 8, 3, 3), kind="with statistics"),
    *(bench.Work("BN", (5, 3, 8), backward, "with mask") for backward in (False, True)),
    *(bench.Work("BN-LSTM", (7, 5, 4, 6), backward, "with lengths") for backward in (False, True)),
    *(bench.Work(what, (2, 4, 6), kind="step") for what in ("LSTM", "LN-LSTM", "GRU")),
    *(bench.Work("LN", (4, 32), backward, dtype="float64") for backward in (False, True)),
    *(bench.Work(what, (5, 3, 4, 6), backward, dtype="float64") for what in ("LSTM", "LN-LSTM") for backward in (False, True)),
    bench.Work("Adam", (3, 4, 5), kind="update"),
]
HEAVY = ("torch", "torch.compile", "JAX jit")
COMPUTING = [name for name in bench.ENGINES if name not in ("copy", "matmuls", "torch.compile")]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.peers] if name in HEAVY else []) for name in COMPUTING])
def test_every_engine_computes_what_float64_does(name: str) -> None:
    made = [work for work in SMALL if bench.ENGINES[name].make(work, work.data()) is not None]
    assert made
    for work in made:
        assert difference(name, work) < ALLOWED[work.dtype] / 10, work.name


def test_rows_have_what_was_measured() -> None:
    rows = bench.measure([SMALL[0], SMALL[6]], ["portnorm", "NumPy", "copy", "matmuls"], seconds=0.01, rounds=2)
    norm, recurrent = rows
    assert set(norm["times"]) == {"portnorm", "NumPy", "copy"}
    assert set(recurrent["times"]) == {"portnorm", "NumPy", "matmuls"}
    assert bench.best_peer(norm) == ("NumPy", norm["times"]["NumPy"]["min"])
    assert bench.ratio(norm) == norm["times"]["portnorm"]["min"] / norm["times"]["NumPy"]["min"]
    assert bench.rate(norm) == pytest.approx(2 * 4 * 4 * 32 / norm["times"]["portnorm"]["min"] / 1e6)
    for t in (t for row in rows for t in row["times"].values()):
        assert len(t["turns"]) == 2
        assert t["runs"] >= 2
        assert min(t["turns"]) == t["min"] <= t["median"]
        assert t["peak_kb"] > 0


def test_a_process_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(pn.UnsupportedError, match="`engines` has 'pen and paper'"):
        bench.measure(SMALL[:1], ["pen and paper"])
    with pytest.raises(pn.UnsupportedError, match="the process of NumPy ended with 1"):
        bench.measure([bench.Work("LN", (0,))], ["NumPy"])


def test_an_older_instruction_set_holds_every_engine_that_is_measured(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa, "flags", lambda: frozenset({"avx2", "avx512f"}))
    assert isa.shown() == "AVX-512"
    held = isa.environment_of("avx2")
    assert {"NUMBA_CPU_FEATURES", "OPENBLAS_CORETYPE", "ATEN_CPU_CAPABILITY", "XLA_FLAGS", "TORCHINDUCTOR_CACHE_DIR"} <= {*held}
    assert "avx512" not in " ".join(value.lower() for name, value in held.items() if name != "NPY_DISABLE_CPU_FEATURES")
    assert isa.environment_of(None) == {}
    (row,) = bench.measure(SMALL[:1], ["NumPy", "onnxruntime"], seconds=0.01, rounds=1, isa="avx2")
    assert {*row["times"]} == {"NumPy"}
    arguments = ["bench", "NumPy", "onnxruntime", "--isa", "avx2", "--only", "LN forward 32", "--seconds", "0.01", "--rounds", "1"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "held to avx2" in shown
    assert "nothing holds them to avx2: onnxruntime" in shown


def test_an_instruction_set_that_cannot_be_measured(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa, "flags", lambda: frozenset({"asimd"}))
    assert isa.shown() == "NEON"
    with pytest.raises(pn.UnsupportedError, match="`isa` is 'avx2', which this processor does not have"):
        bench.measure(SMALL[:1], ["NumPy"], isa="avx2")
    with pytest.raises(pn.UnsupportedError, match="`isa` is 'avx9'; expected one of avx2"):
        bench.measure(SMALL[:1], ["NumPy"], isa="avx9")
    assert main(["bench", "onnxruntime", "--isa", "avx2", "--only", "LN"]) == 2
    assert "nothing holds onnxruntime to avx2" in capsys.readouterr().err


def test_the_command(capsys: Any) -> None:
    arguments = ["bench", "portnorm", "NumPy", "--only", "LN forward 32", "--seconds", "0.01", "--rounds", "1"]
    assert main(arguments) == 0
    assert "LN forward 32×256" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["rows"][0]["times"]) == {"portnorm", "NumPy"}
    assert main(["bench", "--only", "nothing"]) == 2
