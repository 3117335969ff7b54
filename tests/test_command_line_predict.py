"""`portnorm predict`: what it writes is what the model gives, with cases in front; what is no data is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from portnorm.__main__ import main

X = np.random.default_rng(0).standard_normal((7, 5, 3))
LENGTHS = np.array([5, 1, 4, 2, 5, 3, 1])


@pytest.mark.parametrize("ending", ["safetensors", "onnx"])
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_what_is_written_is_what_the_model_gives(
    dtype: Any, batch_first: bool, each: bool, ending: str, tmp_path: Path, capsys: Any
) -> None:
    layer = pn.GRU(3, 4, norm="layer", return_sequences=each, batch_first=batch_first, rng=0, dtype=dtype)
    model, path = pn.Sequential(layer, pn.Linear(4, 2, rng=1, dtype=dtype)), tmp_path / f"m.{ending}"
    (pn.save if ending == "safetensors" else pn.export)(model, path)
    np.savez(tmp_path / "d.npz", x=X, lengths=LENGTHS, y=np.zeros(7, int))
    capsys.readouterr()
    assert main(["predict", str(path), str(tmp_path / "d.npz"), "-o", str(tmp_path / "out.npz"), "--json"]) == 0
    expected = model((X if batch_first else X.swapaxes(0, 1)).astype(dtype), lengths=LENGTHS)[0]
    expected = expected.swapaxes(0, 1) if each and not batch_first else expected
    assert json.loads(capsys.readouterr().out)["shape"] == list(expected.shape)
    with np.load(tmp_path / "out.npz") as found:
        np.testing.assert_array_equal(found["y"], expected)


def test_what_train_wrote_predicts(tmp_path: Path, capsys: Any) -> None:
    """From the files alone: classes of cases that were trained on, and of one case without labels."""
    y = np.random.default_rng(1).integers(0, 2, 60)
    x = np.random.default_rng(2).standard_normal((60, 5, 2)) + np.where(y, 2, -2)[:, None, None]
    data, model, out = (str(tmp_path / name) for name in ("d.npz", "m.safetensors", "out.npz"))
    np.savez(data, x=x, y=y)
    assert main(["train", "--data", data, "-o", model, "--epochs", "12", "--hidden", "8"]) == 0
    assert main(["predict", model, data, "-o", out]) == 0
    assert f"{out}: y (60, 2)" in capsys.readouterr().out
    with np.load(out) as found:
        assert np.mean(found["y"].argmax(axis=1) == y) > 0.9
    np.savez(data, x=x[:1])
    assert main(["predict", model, data, "-o", out]) == 0


REFUSED: dict[str, tuple[Any, str, str]] = {
    "no recurrent layer": (pn.Linear(3, 2, rng=0), "d.npz", "has no recurrent layer"),
    "features": (pn.GRU(2, 4, rng=0), "d.npz", "`x` has shape (5, 7, 3)"),
    "no file": (pn.GRU(3, 4, rng=0), "none.npz", "`data` is "),
    "no x": (pn.GRU(3, 4, rng=0), "y.npz", "which has no 'x'"),
    "NaN": (pn.GRU(3, 4, rng=0), "nan.npz", "`x` of "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, tmp_path: Path, capsys: Any) -> None:
    model, data, message = REFUSED[name]
    pn.save(model, tmp_path / "m.safetensors")
    for file, arrays in {"d": {"x": X}, "y": {"y": LENGTHS}, "nan": {"x": X * np.nan}}.items():
        np.savez(tmp_path / f"{file}.npz", **arrays)
    assert main(["predict", str(tmp_path / "m.safetensors"), str(tmp_path / data), "-o", str(tmp_path / "out.npz")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.npz").exists()
