"""`portnorm train`: what is no data, no number or no place is an error by name before any work; what is learned is what the file says."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from portnorm.__main__ import main
from portnorm.commands import train
from tests.processes import ROOT

Arrays = dict[str, Any]


def arrays(count: int = 40, **changed: Any) -> Arrays:
    """Sequences in two classes that are easy to tell apart; an array that is `None` is left out."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, count)
    x = rng.standard_normal((count, 5, 2)).astype(np.float32) + np.where(y, 2, -2)[:, None, None].astype(np.float32)
    return {key: a for key, a in ({"x": x, "y": y} | changed).items() if a is not None}


X, Y = (arrays()[key] for key in "xy")


def put(a: Any, at: Any, value: Any) -> Any:
    changed = a.copy()
    changed[at] = value
    return changed


def ragged() -> Any:
    found = np.empty(40, dtype=object)
    found[:] = [X[k, : k % 5 + 1] for k in range(40)]
    return found


FILES: dict[str, tuple[Arrays, str]] = {
    "labels below 0": (arrays(y=Y - 1), "`y` .* reaches from -1 to 0"),
    "one label below 0": (arrays(y=put(Y, 3, -100)), "`y` .* reaches from -100"),
    "as many classes as cases": (arrays(y=np.arange(40) + 1), "fewer than cases"),
    "one class": (arrays(y=0 * Y), "`y` .* is 0 everywhere: nothing to learn"),
    "labels of each step": (arrays(y=np.tile(Y[:, None], 5)), r"`y` .* shape \(40, 5\); expected \(cases,\)"),
    "no label axis": (arrays(y=np.int64(1)), r"`y` .* shape \(\)"),
    "words": (arrays(y=np.array(["a"] * 40)), "`y` .* dtype <U1"),
    "bytes": (arrays(y=np.array([b"a"] * 40)), "`y` .* dtype"),
    "complex": (arrays(y=1j * Y), "`y` .* dtype complex128"),
    "dates": (arrays(y=Y.astype("datetime64[s]")), "`y` .* dtype datetime64"),
    "objects": (
        arrays(y=np.array([0, "a"] * 20, dtype=object)),
        r"`y` of .* is an array of Python objects, which is not read; save numbers, y\.astype\(int\)",
    ),
    "sequences of different length": (arrays(x=ragged()), r"`x` of .* Python objects.*pad_sequences\(sequences, batch_first=True\)"),
    "targets that are NaN": (arrays(y=put(Y.astype(float), 7, np.nan)), r"`y` .* nan at \(7,\)"),
    "targets that are infinite": (arrays(y=put(Y.astype(float), 7, -np.inf)), r"`y` .* -inf at \(7,\)"),
    "targets beyond float32": (arrays(y=1e300 * Y), "`y` .* inf at .*float32"),
    "targets that are all alike": (arrays(y=np.full(40, 0.5)), "`y` .* is 0.5 everywhere"),
    "targets of each step": (arrays(y=np.ones((40, 5, 2))), "`y` .* shape"),
    "no targets": (arrays(y=np.ones((40, 0))), "`y` .* shape"),
    "fewer labels": (arrays(y=Y[:30]), r"`y` .* shape \(30,\); expected 40 in front"),
    "more labels": (arrays(y=np.tile(Y, 2)), r"`y` .* shape \(80,\); expected 40 in front"),
    "fewer targets": (arrays(y=X[:30, 0, 0]), r"`y` .* shape \(30,\); expected 40 in front"),
    "x without time": (arrays(x=X[:, 0]), r"`x` .* shape \(40, 2\)"),
    "x with one more axis": (arrays(x=X[..., None]), "`x` .* shape"),
    "x of words": (arrays(x=X.astype(str)), "`x` .* dtype <U"),
    "x of complex numbers": (arrays(x=X.astype(complex)), "`x` .* dtype complex128"),
    "x with NaN": (arrays(x=put(X, (3, 4, 1), np.nan)), r"`x` .* nan at \(3, 4, 1\)"),
    "x with infinity": (arrays(x=put(X, (3, 4, 1), np.inf)), r"`x` .* inf at \(3, 4, 1\)"),
    "x beyond float32": (arrays(x=put(X.astype(float), (3, 4, 1), 1e39)), r"`x` .* inf at \(3, 4, 1\)"),
    "no cases": (arrays(x=X[:0], y=Y[:0]), "`x` .* nothing in it"),
    "one case": (arrays(x=X[:1], y=Y[:1]), "`x` .* two cases at least"),
    "no steps": (arrays(x=X[:, :0]), "`x` .* nothing in it"),
    "no features": (arrays(x=X[..., :0]), "`x` .* nothing in it"),
    "lengths beyond the steps": (arrays(lengths=put(np.full(40, 5), 2, 6)), "`lengths` .* from 5 to 6; expected 1 to 5"),
    "lengths below 0": (arrays(lengths=put(np.full(40, 5), 2, -1)), "`lengths` .* from -1 to 5"),
    "a length of 0": (arrays(lengths=put(np.full(40, 5), 2, 0)), "`lengths` .* from 0 to 5"),
    "lengths that are no integers": (arrays(lengths=np.full(40, 5.0)), "`lengths` .* dtype float64; expected integers"),
    "fewer lengths": (arrays(lengths=np.full(39, 5)), r"`lengths` .* shape \(39,\)"),
    "lengths in two axes": (arrays(lengths=np.full((40, 1), 5)), r"`lengths` .* shape \(40, 1\)"),
    "a misspelled name": (arrays(lenghts=np.full(40, 3)), "'lenghts' .did you mean 'lengths'"),
    "another letter case": (arrays(X=X, x=None), "'X' .did you mean 'x'"),
    "a name of nothing here": (arrays(weights=Y), "unknown names: 'weights';"),
    "no x": (arrays(x=None), "has no 'x'"),
    "no y": (arrays(y=None), "has no 'y'"),
    "nothing": ({}, "has no 'x' and no 'y'"),
}


def refused(capsys: Any, folder: Path, arguments: list[str]) -> str:
    """The error of a call that leaves a checkpoint that was there as it was, and writes nothing beside it."""
    output, before = folder / "m.safetensors", b"an older checkpoint"
    output.write_bytes(before)
    files = sorted(folder.iterdir())
    code = main(["train", "-o", str(output), "--json", *arguments])
    captured = capsys.readouterr()
    assert code == 2, captured
    assert (output.read_bytes(), sorted(folder.iterdir())) == (before, files)
    assert captured.err.count("\n") == 1
    error = json.loads(captured.out)
    assert issubclass(getattr(pn, error["error"]), pn.PortnormError)
    return str(error["message"])


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: Any) -> Any:
        raise AssertionError("a model was made before all was checked")

    monkeypatch.setattr(train, "classifier", work)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.usefixtures("no_work")
@pytest.mark.filterwarnings("error")
def test_data_that_does_not_fit_is_refused(name: str, tmp_path: Path, capsys: Any) -> None:
    data, expected = FILES[name]
    np.savez(tmp_path / "d.npz", **data)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        said = refused(capsys, tmp_path, ["--data", "d.npz"])
    assert "'d.npz'" in said
    assert re.search(expected, said), said


def zipped(path: Path) -> None:
    np.savez_compressed(path, **arrays())


def cut(path: Path) -> None:
    zipped(path)
    path.write_bytes(path.read_bytes()[:300])


def changed(path: Path) -> None:
    np.savez(path, **arrays())
    data = bytearray(path.read_bytes())
    data[1000] ^= 0xFF
    path.write_bytes(bytes(data))


def one_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, X)


def words_in_a_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for key in "xy":
            file.writestr(f"{key}.npy", "no array")


NO_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "is not there": (lambda path: None, "cannot be read: No such file"),
    "a folder": (lambda path: path.mkdir(), "cannot be read: Is a directory"),
    "empty": (lambda path: path.touch(), "no .npz file"),
    "text": (lambda path: path.write_text("1, 2, 3\n"), "no .npz file"),
    "numbers of a pickle": (lambda path: path.write_bytes(b"\x80\x04]\x94."), "no .npz file"),
    "one array": (one_array, "a single array"),
    "cut off": (cut, "no .npz file"),
    "changed": (changed, "damaged .npz file"),
    "words in a zip": (words_in_a_zip, "a zip file with 'x', 'y', which is no array"),
}


@pytest.mark.parametrize("name", NO_FILES)
@pytest.mark.usefixtures("no_work")
def test_a_file_that_is_none_is_refused(name: str, tmp_path: Path, capsys: Any) -> None:
    make, expected = NO_FILES[name]
    make(tmp_path / "d.npz")
    said = refused(capsys, tmp_path, ["--data", str(tmp_path / "d.npz")])
    assert re.search(expected, said), said
    assert "expected an .npz file with x" in said


NUMBERS = [
    *((option, value) for option in ("hidden", "epochs", "batch", "patience") for value in ("0", "-1")),
    ("batch", "33"),
    ("seed", "-1"),
    *((option, value) for option in ("lr", "clip") for value in ("nan", "0", "-0.1", "-inf")),
    *(("state-noise", value) for value in ("nan", "-0.1", "inf")),
    ("lr", "inf"),
]


@pytest.mark.parametrize(("option", "value"), NUMBERS)
@pytest.mark.usefixtures("no_work")
def test_a_number_out_of_range_is_refused(option: str, value: str, tmp_path: Path, capsys: Any) -> None:
    np.savez(tmp_path / "d.npz", **arrays())
    said = refused(capsys, tmp_path, ["--data", str(tmp_path / "d.npz"), f"--{option}={value}"])
    assert said.startswith(f"`--{option}` is {float(value) if option in ('lr', 'clip', 'state-noise') else value}; expected ")


@pytest.mark.parametrize("option", ["hidden", "epochs", "batch", "seed", "lr", "clip", "norm", "optimizer"])
def test_what_is_no_number_or_name_is_refused(option: str, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "-o", str(tmp_path / "m.safetensors"), f"--{option}", "some"])
    assert ended.value.code == 2
    assert f"argument --{option}: invalid" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["train", "import", "export"])
@pytest.mark.parametrize("where", ["no/m", "is a folder", "is a file/m", "m.other", "m"])
@pytest.mark.usefixtures("no_work")
def test_a_place_that_cannot_be_written_to_is_refused_before_any_work(command: str, where: str, tmp_path: Path, capsys: Any) -> None:
    ending = ".onnx" if command == "export" else ".safetensors"
    path = tmp_path / (where if where == "m" or "." in where else f"{where}{ending}")
    if where.startswith("is a folder"):
        path.mkdir()
    if where.startswith("is a file"):
        path.parent.touch()
    files = sorted(tmp_path.rglob("*"))
    source = [] if command == "train" else ["nothing-is-read.npz"]
    assert main([command, *source, "-o", str(path)]) == 2
    assert f"UnsupportedError: `--output` is {str(path)!r}" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == files


def test_a_loss_that_is_not_finite_leaves_the_old_checkpoint(tmp_path: Path, capsys: Any) -> None:
    np.savez(tmp_path / "d.npz", **arrays(y=X[:, :, 0].sum(1)))
    said = refused(capsys, tmp_path, ["--data", str(tmp_path / "d.npz"), "--lr", "1e30", "--optimizer", "sgd", "--norm", "none"])
    assert "after" in said
    assert "`--lr` is 1e+30" in said


# -- what is learned -----------------------------------------------------------------------------------------------------------------------


def trained(capsys: Any, folder: Path, data: Arrays, *options: str) -> tuple[Any, Any]:
    np.savez(folder / "d.npz", **data)
    assert main(["train", "--data", str(folder / "d.npz"), "-o", str(folder / "m.safetensors"), "--hidden", "8", "--json", *options]) == 0
    return json.loads(capsys.readouterr().out), pn.load(folder / "m.safetensors")


@pytest.mark.parametrize("dtype", ["int8", "uint64", "int32", "bool"])
def test_integers_are_classes(dtype: str, tmp_path: Path, capsys: Any) -> None:
    found, model = trained(capsys, tmp_path, arrays(120, y=None) | {"y": arrays(120)["y"].astype(dtype)}, "--epochs", "12")
    assert found["task"] == "classification"
    assert found["test_accuracy"] > 0.9
    assert [row["epoch"] for row in found["epochs"]] == list(range(1, 13))
    assert all(set(row) == {"epoch", "loss", "held_out_loss", "held_out_accuracy"} for row in found["epochs"])
    assert found["epochs"][-1]["held_out_loss"] < found["epochs"][0]["held_out_loss"]
    assert found["takes"] == ["cases", "time", 2]
    assert model(np.zeros((3, 5, 2), np.float32))[0].shape == (3, 2)


@pytest.mark.parametrize("norm", [name or "none" for name in train._NORMS if name != "fastrnns-decomposed"])
def test_every_variant_learns(norm: str, tmp_path: Path, capsys: Any) -> None:
    found, model = trained(capsys, tmp_path, arrays(60, lengths=np.arange(60) % 5 + 1), "--epochs", "4", "--norm", norm, "--batch", "12")
    losses = [row["loss"] for row in found["epochs"]]
    assert losses[-1] < losses[0]
    assert np.isfinite(model(np.ones((1, 5, 2), np.float32))[0]).all()


def test_a_variant_without_eps_takes_no_lengths(tmp_path: Path, capsys: Any) -> None:
    np.savez(tmp_path / "d.npz", **arrays(lengths=np.arange(40) % 5 + 1))
    assert "eps = 0" in refused(capsys, tmp_path, ["--data", str(tmp_path / "d.npz"), "--norm", "fastrnns-decomposed"])


@pytest.mark.parametrize("outputs", [None, 1, 2])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e5])
def test_floating_point_numbers_are_a_regression_in_their_own_unit(outputs: int | None, size: float, tmp_path: Path, capsys: Any) -> None:
    """The checkpoint gives the numbers of the file, and the errors are of these: computed here again, from what is held out."""
    data = arrays(150)
    sums = data["x"][:, :, :1].sum(axis=1) if outputs is None else data["x"].sum(axis=1)[:, :outputs]
    y = size * (3 + (sums[:, 0] if outputs is None else sums))
    found, model = trained(capsys, tmp_path, data | {"y": y}, "--epochs", "30", "--batch", "20", "--lr", "0.02")
    assert found["task"] == "regression"
    assert "test_accuracy" not in found
    assert found["r_squared"] > 0.8
    held_out = np.random.default_rng(0).permutation(150)[:30]
    given = model(data["x"][held_out])[0]
    errors = (given - y.reshape(150, -1)[held_out]) ** 2
    assert found["mean_squared_error"] == pytest.approx(float(errors.mean()), rel=1e-3)
    spread = ((y - y[held_out].mean(axis=0)) ** 2).reshape(150, -1)[held_out]
    assert found["r_squared"] == pytest.approx(float(np.mean(1 - errors.sum(axis=0) / spread.sum(axis=0))), rel=1e-3)
    assert {"held_out_loss", "held_out_mse", "held_out_r2"} < set(found["epochs"][0])


def test_what_stands_behind_lengths_may_be_anything(tmp_path: Path, capsys: Any) -> None:
    lengths = np.random.default_rng(1).integers(1, 6, 60)
    data = arrays(60)
    behind = np.arange(5) >= lengths[:, None]
    one, other = (
        trained(capsys, tmp_path, data | {"x": np.where(behind[:, :, None], value, data["x"]), "lengths": lengths}, "--epochs", "2")
        for value in (0, np.nan)
    )
    assert one[0]["epochs"] == other[0]["epochs"]


def test_few_cases_are_one_batch(tmp_path: Path, capsys: Any) -> None:
    found, _ = trained(capsys, tmp_path, arrays(10), "--epochs", "1")
    assert found["epochs"][0]["epoch"] == 1
    two, _ = trained(capsys, tmp_path, arrays(2, y=np.array([0.0, 1.0])), "--epochs", "1")
    assert two["r_squared"] is None  # of one case


def test_the_same_seed_gives_the_same_bits(tmp_path: Path, capsys: Any) -> None:
    files = []
    for seed in ("5", "5", "6"):
        trained(capsys, tmp_path, arrays(), "--epochs", "2", "--seed", seed)
        files.append((tmp_path / "m.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize("patience", [[], ["--patience", "9"]], ids=["all", "patience"])
@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
@pytest.mark.parametrize("task", ["classes", "numbers"])
def test_a_run_that_was_stopped_goes_on(task: str, norm: str, patience: list[str], tmp_path: Path, capsys: Any) -> None:
    """To the model of a run that was not, and its file gives that model, in the units of the data."""
    data = arrays(60, lengths=np.arange(60) % 5 + 1)
    if task == "numbers":
        data["y"] = 1e3 * (3 + data["x"][:, 0, 0])
    run, how = ["--checkpoint", str(tmp_path / "run.safetensors")], ["--norm", norm, "--batch", "12", "--lr", "0.3", *patience]
    whole, expected = trained(capsys, tmp_path, data, *how, "--epochs", "4")
    for epochs in ("2", "4", "4"):
        found, model = trained(capsys, tmp_path, data, *how, *run, "--epochs", epochs, "--resume")
        given = pn.load(tmp_path / "run.safetensors").state_dict()
        assert all(np.array_equal(a, given[name]) for name, a in model.state_dict().items())
    assert all(np.array_equal(a, model.state_dict()[name]) for name, a in expected.state_dict().items())
    results = {"test_accuracy", "mean_squared_error", "r_squared", "loss", "best_epoch"} & {*whole}
    assert {key: found[key] for key in results} == {key: whole[key] for key in results}
    assert [row["loss"] for row in found["epochs"]] == [row["loss"] for row in whole["epochs"]]
    assert ("best_epoch" in whole) == bool(patience)


def test_the_file_of_a_regression_that_was_killed_is_in_the_units_of_its_data(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, run = arrays(150), tmp_path / "run.safetensors"
    y = 1e5 * (3 + data["x"].sum(axis=1))
    measured = train._Task.measured

    def killed(task: Any, model: Any) -> Any:
        if run.exists():
            raise KeyboardInterrupt
        return measured(task, model)

    monkeypatch.setattr(train._Task, "measured", killed)
    np.savez(tmp_path / "d.npz", **(data | {"y": y}))
    given = ["--data", str(tmp_path / "d.npz"), "-o", str(tmp_path / "m.safetensors"), "--checkpoint", str(run), "--batch", "20", "--json"]
    assert main(["train", *given]) == 130
    assert not (tmp_path / "m.safetensors").exists()
    assert abs(float(pn.load(run)(data["x"])[0].mean()) / float(y.mean()) - 1) < 0.5


def test_patience_keeps_the_best_epoch(tmp_path: Path, capsys: Any) -> None:
    """Of labels by chance, which are learned by heart: what is written is what the best row measured."""
    data = arrays(60, y=np.random.default_rng(5).standard_normal(60))
    found, model = trained(capsys, tmp_path, data, "--epochs", "60", "--batch", "12", "--lr", "0.05", "--patience", "3")
    rows, best = found["epochs"], found["best_epoch"]
    assert len(rows) == best + 3 < 60
    assert best == 1 + int(np.argmin([row["held_out_loss"] for row in rows]))
    assert found["mean_squared_error"] == rows[best - 1]["held_out_mse"] < rows[-1]["held_out_mse"]
    held_out = np.random.default_rng(0).permutation(60)[:12]
    errors = (model(data["x"][held_out])[0][:, 0] - data["y"][held_out]) ** 2
    assert found["mean_squared_error"] == pytest.approx(float(errors.mean()), rel=1e-3)


def test_another_run_is_refused_by_name(tmp_path: Path, capsys: Any) -> None:
    run, place = ["--checkpoint", str(tmp_path / "run.safetensors")], ["--data", str(tmp_path / "d.npz")]
    trained(capsys, tmp_path, arrays(), *run, "--epochs", "2")
    size = ["--hidden", "8", "--epochs", "2"]
    assert "another `rng`; expected the seed" in refused(capsys, tmp_path, [*place, *run, *size, "--resume", "--seed", "1"])
    assert "`lr` of its optimizer 0.01, which is 0.02" in refused(capsys, tmp_path, [*place, *run, *size, "--resume", "--lr", "0.02"])
    np.savez(tmp_path / "d.npz", **arrays(x=X + 1))
    assert "other numbers in `x`" in refused(capsys, tmp_path, [*place, *run, *size, "--resume"])


@pytest.mark.usefixtures("no_work")
def test_a_run_needs_a_file_of_its_own(tmp_path: Path, capsys: Any) -> None:
    np.savez(tmp_path / "d.npz", **arrays())
    place = ["--data", str(tmp_path / "d.npz")]
    assert "`--resume` is given without `--checkpoint`" in refused(capsys, tmp_path, [*place, "--resume"])
    assert "expected two files" in refused(capsys, tmp_path, [*place, "--checkpoint", str(tmp_path / "m.safetensors")])
    assert "`--checkpoint` is" in refused(capsys, tmp_path, [*place, "--checkpoint", str(tmp_path / "no" / "r.safetensors")])


def test_steps_of_zeros_in_front_are_named(tmp_path: Path, capsys: Any) -> None:
    x = np.concatenate([np.zeros((40, 200, 2), np.float32), X], axis=1)
    np.savez(tmp_path / "d.npz", **arrays(x=x))
    place = ["--data", str(tmp_path / "d.npz"), "--epochs", "1"]
    said = refused(capsys, tmp_path, place)
    assert re.search(r"the gradient of `[\w.]+` and \d+ more of \d+ is not finite at update 1.*state_noise", said), said
    found, _ = trained(capsys, tmp_path, arrays(x=x), "--epochs", "1", "--state-noise", "0.1")
    assert np.isfinite(found["loss"])


def test_rows_of_epochs_need_no_rich(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", **arrays())
    code = "import sys; sys.modules['rich'] = None; from portnorm.__main__ import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "train", "--data", str(tmp_path / "d.npz"), "-o", str(tmp_path / "m.safetensors")]
    done = subprocess.run([*command, "--epochs", "3"], capture_output=True, text=True, cwd=ROOT, check=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith("epoch")]
    assert [row.split()[:4] for row in rows] == [["epoch", str(k), "of", "3"] for k in (1, 2, 3)]
    assert all("loss" in row and "held out: loss" in row and "accuracy" in row for row in rows)
    assert "Traceback" not in done.stderr


def test_every_option_says_its_default() -> None:
    parser = argparse.ArgumentParser()
    train.add_options(parser)
    for action in parser._actions:
        if action.option_strings and action.nargs != 0 and not action.required:
            assert "default: " in (action.help or ""), action.option_strings
            if action.default is not None:
                assert f"(default: {str(action.default).removesuffix('.0')}" in (action.help or ""), action.option_strings
