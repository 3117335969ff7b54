"""The command line: thin, with exit codes, and JSON for machines."""

from __future__ import annotations

import argparse
import importlib
import json
import keyword
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from portnorm.__main__ import main
from portnorm.commands import COMMANDS, info
from portnorm.libraries import SUPPORT
from portnorm_onnx.runtimes import RUNTIMES
from tests.processes import ROOT, output_of

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = {
    re.split(r"[\[>=]", line)[0]
    for extra, lines in PROJECT["optional-dependencies"].items()
    if extra not in ("test", "tools", "peers", "all")
    for line in lines
    if not line.startswith("portnorm[")
}
"""The packages that extras bring to users."""


def json_of(capsys: Any, *arguments: str) -> Any:
    code = main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_train_export_verify_info(tmp_path: Path, capsys: Any) -> None:
    checkpoint, graph, data = (str(tmp_path / name) for name in ("m.safetensors", "m.onnx", "d.npz"))
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 60)
    x = rng.standard_normal((60, 5, 2)) + np.where(y, 2.0, -2.0)[:, None, None]
    np.savez(data, x=x, y=y, lengths=rng.integers(2, 6, 60))
    train = ["train", "--data", data, "--norm", "batch", "--hidden", "6", "--epochs", "8", "--batch", "16", "-o", checkpoint]
    code, found = json_of(capsys, *train)
    assert code == 0
    assert found["test_accuracy"] > 0.9
    code, report = json_of(capsys, "export", checkpoint, "-o", graph, "--opset", "20")
    assert code == 0
    assert report["opset"] == 20
    assert Path(graph).exists()
    code, report = json_of(capsys, "verify", graph, "--against", checkpoint)
    assert code == 0
    assert report["steps"]
    assert report["trajectories"]
    code, info = json_of(capsys, "info", checkpoint)
    assert code == 0
    assert "LSTM" in info["layer"]
    assert main(["export", checkpoint, "-o", graph]) == 0
    assert "nodes" in capsys.readouterr().out


def test_import(tmp_path: Path, capsys: Any) -> None:
    layer, weights, checkpoint = pn.LSTM(3, 4, norm="haste", rng=0), str(tmp_path / "w.npz"), str(tmp_path / "m.safetensors")
    np.savez(weights, **{f"rnn.{name}": a for name, a in pn.to_format(layer, "haste").items()})
    code, found = json_of(
        capsys, "import", weights, "-o", checkpoint, "--prefix", "rnn.", "--set", "batch_first=true", "--set", "zoneout=0.1"
    )
    assert code == 0
    assert found["provenance"].startswith("haste: LSTM(norm='haste')")
    loaded: Any = pn.load(checkpoint)
    assert (loaded.batch_first, loaded.variant.zoneout) == (True, 0.1)
    told = ["--set", "gate_activation=hard_sigmoid_5", "--set", "direction=reverse"]
    assert main(["import", weights, "-o", checkpoint, *told]) == 0
    loaded = pn.load(checkpoint)
    assert (loaded.variant.gate_activation, loaded.direction) == ("hard_sigmoid_5", "reverse")
    assert main(["import", weights, "-o", checkpoint]) == 0
    assert "recognised as haste" in capsys.readouterr().out
    for wrong in (["--set", "batch_first"], ["--set", "batch_first=yes"], ["--set", "unknown=1"], ["--format", "torch"], ["--prefix", "x"]):
        code, found = json_of(capsys, "import", weights, "-o", str(tmp_path / "none.safetensors"), *wrong)
        assert code == 2, found
    assert not (tmp_path / "none.safetensors").exists()


def test_verify_of_another_model_is_exit_code_1(tmp_path: Path, capsys: Any) -> None:
    for seed in (0, 1):
        pn.save(pn.LSTM(3, 4, norm="layer", rng=seed), tmp_path / f"{seed}.safetensors")
    graph = str(tmp_path / "m.onnx")
    assert main(["export", str(tmp_path / "0.safetensors"), "-o", graph]) == 0
    capsys.readouterr()
    code, found = json_of(capsys, "verify", graph, "--against", str(tmp_path / "1.safetensors"))
    assert code == 1
    assert found["error"] == "ConformanceError"


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "missing.safetensors", "-o", "m.onnx"],
        ["verify", "missing.onnx", "--against", "missing.safetensors"],
        ["train", "--data", "missing.npz", "-o", "m.safetensors"],
        ["info", "missing.safetensors"],
    ],
    ids=lambda a: a[0],
)
def test_an_error_is_one_line_and_exit_code_2(arguments: list[str], capsys: Any) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"portnorm {arguments[0]}: ")
    assert err.count("\n") == 1
    assert "missing" in err


@pytest.mark.parametrize("command", ["verify", "draw", "bench"])
def test_a_checkpoint_is_no_graph(command: str, tmp_path: Path, capsys: Any) -> None:
    path = str(tmp_path / "m.safetensors")
    pn.save(pn.Linear(2, 3, rng=0), path)
    assert main([command, path]) == 2
    assert capsys.readouterr().err.endswith(f"{path!r} is no ONNX model; a checkpoint becomes one by `portnorm export {path} -o …`\n")


KINDS = {
    "d.npz": (lambda path: np.savez(path, x=np.ones(99)), "it is one of NumPy: .*`portnorm import`.*`portnorm train --data"),
    "w.h5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "it is one of Keras or HDF5: .*`portnorm import`"),
    "w.pt": (lambda path: path.write_bytes(b"PK\x03\x04" + b"\x01" * 99), "it looks like a pickle of PyTorch: portnorm.import_checkpoint"),
}


@pytest.mark.parametrize("command", ["export", "info"])
@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_another_kind_is_no_checkpoint(name: str, command: str, tmp_path: Path, capsys: Any) -> None:
    make, message = KINDS[name]
    make(tmp_path / name)
    assert main([command, str(tmp_path / name), *(["-o", str(tmp_path / "m.onnx")] if command == "export" else [])]) == 2
    assert re.search(f"is no safetensors file or is cut off: .*; {message}", capsys.readouterr().err)


@pytest.mark.parametrize("arguments", [["info"], ["info", "--json"], ["warm", "--dtype", "float32"]], ids=" ".join)
def test_a_reader_that_goes_ends_a_command(arguments: list[str]) -> None:
    """As `head` does: no traceback, neither of the command nor of Python's end."""
    read, write = os.pipe()
    os.close(read)
    code = "import sys; from portnorm.__main__ import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, *arguments], stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_warm_names_the_types_that_info_shows(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["warm", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert ", ".join(json_of(capsys, "info")[1]["kernels"]["compiled"]) in shown


def test_info_without_a_file(capsys: Any) -> None:
    code, found = json_of(capsys, "info")
    assert code == 0
    assert found["portnorm"] == pn.__version__
    assert found["numpy"]
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "portnorm" in shown
    for name in (*RUNTIMES, *SUPPORT, *OPTIONAL, "numba", "cache"):
        assert re.search(rf"^  {re.escape(name)} ", shown, re.MULTILINE), name
    for name, row in RUNTIMES.items():
        try:
            assert found["runtimes"][name]["version"] == row.version()
        except pn.MissingExtraError as error:
            there = found["runtimes"][name]
            assert (there["version"], there["note"] in str(error)) == (None, True)  # noqa: PT017
    for name in OPTIONAL:
        assert found[name] == (version(name) if found[name] else None)
    assert set(found["kernels"]["compiled"]) == {"float32", "float64", "bfloat16"}


def test_info_says_not_installed(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every library, package and runtime that is not there, without an import of any."""

    def none(name: str, *_: Any) -> Any:
        raise PackageNotFoundError(name)

    extras = info._extras()
    monkeypatch.setattr(info, "_extras", lambda: extras)
    monkeypatch.setattr("importlib.metadata.version", none)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in (*OPTIONAL, "array_api_strict", "torch", "jax", "cupy", "onnxruntime", "numba"):
        assert all("not installed" in line for line in lines if line.startswith(f"  {name} ")), name
    assert any('pip install ".[onnx]" in a checkout' in line for line in lines)
    assert any('pip install ".[fast]" in a checkout' in line for line in lines)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_its_default(name: str) -> None:
    parser = argparse.ArgumentParser()
    importlib.import_module(f"portnorm.commands.{name}_" if keyword.iskeyword(name) else f"portnorm.commands.{name}").add_options(parser)
    for action in parser._actions:
        assert action.help, action
        if action.option_strings and action.nargs != 0 and not action.required:
            assert "(default: " in action.help, action.option_strings
            if action.default not in (None, []):
                assert f"(default: {str(action.default).removesuffix('.0')}" in action.help, action.option_strings


def test_help_loads_no_command(capsys: Any) -> None:
    code = "import sys; sys.argv = ['portnorm', '--help']\ntry:\n import portnorm.__main__ as m; m.main()\nfinally:\n"
    loaded = output_of(f"{code} print([n for n in sys.modules if n.startswith('portnorm.commands.') or n in ('onnx', 'numba', 'sklearn')])")
    assert loaded.splitlines()[-1] == "[]"
    for name in COMMANDS:
        assert f"    {name} " in loaded


@pytest.mark.slow
def test_demo_in_little(tmp_path: Path, capsys: Any) -> None:
    assert main(["demo", "--out", str(tmp_path), "--epochs", "1"]) == 0
    names = {f"{m}.{kind}" for m in ("lstm", "bn-lstm", "ln-lstm") for kind in ("onnx", "int8.onnx", "safetensors")}
    assert {p.name for p in tmp_path.iterdir()} == names | {"curves.png", "report.json"}
    report = json.loads((tmp_path / "report.json").read_text())
    assert [r["equal_predictions"] for r in report["results"]] == [1.0, 1.0, 1.0]
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("LSTM", "BN-LSTM", "LN-LSTM", "accuracy"))
