"""The benchmark: every engine computes the same, ratios are of what was measured, and what goes wrong is said."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from benchmarks import speed_tables
from benchmarks.tables import kept_of
from portnorm import bench
from portnorm.__main__ import main
from portnorm.bench import isa
from portnorm.bench.worker import Turns, difference
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


@pytest.mark.peers
@pytest.mark.parametrize("name", ["portnorm", "torch", "JAX jit"])
def test_nothing_is_left_out_by_those_who_have_both_directions(name: str) -> None:
    assert all(bench.ENGINES[name].make(work, work.data()) is not None for work in SMALL)


def test_works_are_told_apart_by_their_names() -> None:
    names = [work.name for work in bench.WORKS]
    assert len({*names}) == len(names)
    rows = [row for name in speed_tables.PARTS for row in (speed_tables.part_of(kept_of("speed"), name) or {"rows": []})["rows"]]
    assert rows
    assert all(bench.Work.of(row).name == row["work"] for row in rows)
    assert {"LN forward 4096×768", "BN with mask forward 100×32×512", "LSTM step 1×128×128", "Adam update 10×1000×1000"} <= {*names}
    assert "LN-LSTM forward+backward 100×32×128×256 float64" in names


def test_a_work_reaches_its_process_whole_and_an_older_one_where_it_can() -> None:
    """A process of an earlier commit, as `benchmarks.against` starts it, takes three fields."""
    for work in bench.WORKS:
        what, shape, *further = json.loads(json.dumps(work.fields))
        assert bench.Work(what, tuple(shape), *further) == work
    assert bench.Work("LN", (4, 32)).fields == ["LN", [4, 32], False]


def test_what_a_work_has_to_move_and_to_multiply() -> None:
    assert bench.Work("LN", (4, 32), True, dtype="float64").bytes == 5 * 8 * 4 * 32
    assert bench.Work("Adam", (3, 4, 5), kind="update").bytes == 7 * 4 * 60
    ragged, whole = (bench.Work("BN-LSTM", (7, 5, 4, 6), kind=kind) for kind in ("with lengths", ""))
    assert ragged.flops * 35 == whole.flops * int(ragged.lengths().sum())
    assert bench.Work("GRU", (2, 4, 6), kind="step").flops == 2 * 2 * 3 * 6 * (4 + 6)


def test_sequences_end_at_different_steps_and_one_of_them_last() -> None:
    lengths = bench.Work("BN-LSTM", (100, 32, 128, 256), kind="with lengths").lengths()
    assert lengths.max() == 100
    assert 1 <= lengths.min() < lengths.max()
    assert len({*lengths.tolist()}) > 8


def test_an_engine_that_computes_in_float32_is_found_out_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    numpy = bench.ENGINES["NumPy"]

    def narrow(work: bench.Work, data: dict[str, Any]) -> Any:
        return numpy.make(work, {name: a.astype("float32") for name, a in data.items()})

    monkeypatch.setitem(bench.ENGINES, "NumPy", numpy._replace(make=narrow))
    assert Turns("NumPy", bench.Work("LN", (4, 32))).run is not None
    with pytest.raises(ArithmeticError, match=r"NumPy is \S+ off in LN forward 4×32 float64"):
        Turns("NumPy", bench.Work("LN", (4, 32), dtype="float64"))


def test_updates_go_on_from_each_other() -> None:
    work = bench.Work("Adam", (3, 4, 5), kind="update")
    run = bench.ENGINES["portnorm"].make(work, work.data())
    assert run is not None
    first, second = ([np.array(a) for a in run()] for _ in range(2))
    assert len(first) == 9
    assert not any((a == b).all() for a, b in zip(first, second, strict=True))


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


def test_rows_have_the_fields_of_their_work() -> None:
    works = [work for work in SMALL if work.kind == "step" or (work.dtype == "float64" and work.what == "LN")]
    rows = bench.measure(works, ["portnorm", "NumPy"], seconds=0.01, rounds=1)
    assert [bench.Work.of(json.loads(json.dumps(row))) for row in rows] == works
    assert all({field.name for field in dataclasses.fields(bench.Work)} | {"work", "times"} == {*row} for row in rows)
    assert all(bench.rate(row) for row in rows)


def _kept(name: str) -> dict[str, Any]:
    """Two parts, of which one is as first results were, and of fewer works."""

    def row(work: bench.Work, *times: float) -> dict[str, Any]:
        engines = dict(zip(("portnorm", "torch"), times, strict=True))
        return {"work": work.name, **dataclasses.asdict(work), "times": {n: {"min": t, "turns": [t, 2 * t]} for n, t in engines.items()}}

    old, new = bench.Work("LN", (1, 64)), bench.Work("LSTM", (1, 128, 128), kind="step")
    machine = {"processor": "A processor", "isa": "AVX-512", "torch": "2.13.0"}
    found = {
        "machine": machine,
        "commit": "0",
        "cores 1": {"machine": machine, "commit": "1", "rows": [row(old, 1.0, 2.0), row(new, 1.0, 0.5)]},
        "held avx2": {"machine": machine | {"processor": "Another"}, "commit": "1", "rows": [row(new, 3.0, 1.0)]},
        "cores 2": [row(old, 1.0, 4.0)],
    }
    read: dict[str, Any] = json.loads(json.dumps(found))
    return read


def test_tables_have_a_column_for_each_part_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_tables, "kept_of", _kept)
    header, _, first, second = speed_tables.speed_best().splitlines()
    assert header == "| work | portnorm, ms | fastest peer, ms | which | one core | one core, held to AVX2 | two cores |"
    assert first.endswith("| torch | 0.50 | – | 0.25 |")
    assert second.startswith("| LSTM step 1×128×128 |")
    assert second.endswith("| torch | 2.00 | 3.00 | – |")
    assert speed_tables.speed().count("\n") == 3
    assert speed_tables.speed_in_short().splitlines()[2:] == [
        "- one core, AVX-512: 1.00 (1.00 to 1.00 in each of the 2 turns alone); of 2 works 1 are above 1.",
        "- one core, held to AVX2: 3.00 (3.00 to 3.00 in each of the 2 turns alone); of 1 works 1 are above 1; on Another (torch 2.13.0).",
        "- two cores, AVX-512: 0.25 (0.25 to 0.25 in each of the 2 turns alone); of 1 works 0 are above 1.",
    ]


def test_parts_are_measured_alone_and_the_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import speed

    def measured(works: Any, *engines: Any, progress: Any, **how: Any) -> list[dict[str, Any]]:
        progress("1 of 1")
        return [{"how": how}]

    monkeypatch.setattr(speed, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "measure", measured)
    monkeypatch.setattr(bench, "machine", lambda: {"isa": "AVX-512 with VNNI"})
    (tmp_path / "speed.json").write_text(json.dumps(_kept("speed")))
    speed.main(["held avx2", "growth"])
    found = json.loads((tmp_path / "speed.json").read_text())
    assert [*found] == ["cores 1", "held avx2", "cores 2", "growth"]
    assert found["held avx2"]["rows"] == [{"how": {"isa": "avx2", "rounds": 3}}]
    assert found["held avx2"]["machine"] == {"isa": "AVX-512 with VNNI"}
    assert found["cores 1"] == _kept("speed")["cores 1"]
    assert found["cores 2"] == {"machine": _kept("speed")["machine"], "commit": "0", "rows": _kept("speed")["cores 2"]}
    assert "held avx2: 1 of 1" in capsys.readouterr().out
    assert (tmp_path / "speed.svg").exists()
    monkeypatch.setattr(bench, "machine", lambda: {"isa": "AVX2"})
    with pytest.raises(SystemExit, match="no part is called held avx2 here; expected some of cores 1, cores 2, growth"):
        speed.main(["held avx2"])


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


@pytest.mark.peers
@pytest.mark.skipif("avx2" not in isa.flags(), reason="the processor has no AVX2")
def test_jax_takes_what_holds_it_to_an_older_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = bench.measure(SMALL[:1], ["JAX jit"], seconds=0.01, rounds=1, isa="avx2")
    assert {*row["times"]} == {"JAX jit"}
    for version, own in (("0.9.2", False), ("0.10.0", True), ("1.0", True)):
        monkeypatch.setattr("importlib.metadata.version", lambda _, version=version: version)
        assert ("ynn" in isa.environment_of("avx2")["XLA_FLAGS"]) == own


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
