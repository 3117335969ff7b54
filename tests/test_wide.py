"""Models with wide weights: exported in seconds, with little more memory than the graph itself, and checked all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import portnorm as pn
import portnorm_onnx.checked as checked_module
import portnorm_onnx.export as export_module
import portnorm_onnx.fold as fold
import portnorm_onnx.storage as storage
from portnorm_backends.cpu import memory
from portnorm_onnx.storage import weights_of
from tests.processes import output_of
from tests.test_export import LAYERS, a_little_off, recurrent, spoiled
from tests.tolerances import ONNX_STEPS

CODE = """
import time
import portnorm as pn
from tests.processes import peak

small, model = (pn.{cell}(size, size, norm={norm!r}, dtype={dtype!r}, rng=0) for size in (8, 2048))
weights = sum(a.nbytes for a in model.params.values()) / 2**20
for keywords in {ways!r}:
    pn.export(small, {path!r}, **keywords)
    started = time.process_time()
    reports = []
    most = peak(lambda: reports.append(pn.export(model, {path!r}, **keywords)))
    seconds = time.process_time() - started  # of this process: others may be busy
    print(f"{{most / weights:.3f}} {{seconds:.3f}} {{len(reports[0].trajectories)}}")
"""
WAYS: list[dict[str, Any]] = [{}, {"target": "onnxruntime"}, {"external_data": True}, {"streaming": True}]
WIDEST: dict[tuple[str, Any, str], list[dict[str, Any]]] = {
    ("LSTM", None, "float32"): [*WAYS, {"quantize": "int8"}],
    ("LSTM", "layer", "float32"): [*WAYS, {"dtype": "float16"}, {"dtype": "float16", "streaming": True}],
    ("LSTM", "layer", "float16"): WAYS,
    ("LSTM", "weight", "float32"): [{"streaming": True}],
    ("LSTM", "batch-input", "float32"): [{"streaming": True}],
    ("GRU", "layer", "float32"): [{}],
}


@pytest.mark.slow
@pytest.mark.parametrize(("cell", "norm", "dtype"), WIDEST)
def test_hidden_2048_takes_seconds_and_few_times_its_weights(cell: str, norm: Any, dtype: str, tmp_path: Path) -> None:
    ways = WIDEST[cell, norm, dtype]
    lines = output_of(CODE.format(cell=cell, norm=norm, dtype=dtype, ways=ways, path=str(tmp_path / "m.onnx"))).splitlines()
    for way, line in zip(ways, lines, strict=True):
        memory, seconds, trajectories = map(float, line.split())
        assert trajectories, f"{way}: nothing was checked"
        rounds = "quantize" in way  # the rounded weights are there beside the others, and again in each eager run
        assert memory <= (4.0 if rounds else 3.0), f"{way}: {lines}"
        assert seconds <= 10, f"{way}: {lines}"


# -- the same ways for small weights, where everything can be tried --------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _everything_is_wide(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (checked_module, export_module, storage):
        monkeypatch.setattr(module, "WIDE", 0)
    monkeypatch.setattr(storage, "_SMALL", 64)


@pytest.mark.parametrize("keywords", [{}, {"function": True, "prefix": "a/"}, {"streaming": True}, {"dtype": "float16"}, {"state": True},
                                      {"target": "onnxruntime"}, {"external_data": True}], ids=str)  # fmt: skip
@pytest.mark.parametrize(("cell", "norm"), [("LSTM", None), ("LSTM", "layer"), ("LSTM", "batch"), ("GRU", "layer"), ("RNN", "batch-input")])
def test_the_file_is_the_model(cell: str, norm: Any, keywords: dict[str, Any], tmp_path: Path) -> None:
    layer, path = recurrent(cell, norm), tmp_path / "m.onnx"
    report = pn.export(layer, path, **keywords)
    assert report.worst_step is not None
    assert report.model is not None
    assert sorted(p.suffix for p in tmp_path.iterdir()) == ([".data", ".onnx"] if "external_data" in keywords else [".onnx"])
    assert report.size == path.stat().st_size
    assert onnx.load(path, load_external_data=False) == report.model
    assert pn.verify(path, layer).worst_step is not None
    if "dtype" not in keywords:
        for name, a in pn.load(path).state_dict().items():
            np.testing.assert_array_equal(a, layer.state_dict()[name])


@pytest.mark.parametrize("keywords", [{}, {"target": "onnxruntime"}, {"fold": False}], ids=str)
@pytest.mark.parametrize("norm", [None, "layer", "batch"])
def test_it_is_the_graph_that_is_written_for_small_weights(norm: Any, keywords: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = recurrent("LSTM", norm)
    wide = pn.export(layer, None, **keywords).model
    monkeypatch.undo()
    small = pn.export(layer, None, **keywords).model
    assert wide is not None
    assert small is not None
    for a, b in zip(weights_of(wide.graph), weights_of(small.graph), strict=True):
        assert a == b
    assert wide == small
    x = np.random.default_rng(0).standard_normal((4, 2, 5)).astype(np.float32)
    session = ort.InferenceSession(wide.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x, "lengths": np.array([4, 2])})
    np.testing.assert_allclose(y, layer(x, lengths=[4, 2])[0], rtol=0, atol=ONNX_STEPS)


@pytest.mark.parametrize(("layer", "keywords"), [row[:2] for row in LAYERS], ids=lambda v: repr(v) if isinstance(v, pn.Layer) else None)
def test_layers_without_time(layer: pn.Layer, keywords: dict[str, Any]) -> None:
    assert pn.export(layer, None, **keywords).trajectories


@pytest.mark.parametrize("name", ["weight_hh_l0", "weight_ih_l0"])
@pytest.mark.parametrize("norm", [None, "layer", "batch"])
def test_a_wrong_weight_is_found(norm: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace, path = export_module.trace, tmp_path / "m.onnx"
    monkeypatch.setattr(export_module, "trace", lambda *a, **k: spoiled(trace(*a, **k), name, a_little_off))
    with pytest.raises(pn.ConformanceError):
        pn.export(recurrent("LSTM", norm), path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("cell", "norm"), [("LSTM", "batch-input"), ("RNN", "batch-input")])
def test_a_folded_matrix_is_made_once(cell: str, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is added to the product afterwards: wide ones would be there once for every bias."""
    made: dict[bytes, set[int]] = {}
    kept, matrix = [], fold.Affine.matrix

    def counted(self: fold.Affine, dtype: Any) -> Any:
        found = matrix(self, dtype)
        if self.scale is not None:
            kept.append(found)
            made.setdefault(self.scale.tobytes() + self.weight.tobytes(), set()).add(id(found))
        return found

    monkeypatch.setattr(fold.Affine, "matrix", counted)
    pn.export(recurrent(cell, norm), None)
    assert len(kept) > len(made) > 0
    assert {len(arrays) for arrays in made.values()} == {1}


def test_memory_of_eager_runs_is_given_back() -> None:
    """That of large results waits for the next ones; here a runtime needs it next."""
    memory.room((2**20,), np.dtype("float32"))
    assert memory._waiting
    pn.export(recurrent("GRU", "weight"), None)
    assert not memory._waiting
