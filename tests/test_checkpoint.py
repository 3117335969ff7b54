"""Checkpoints: what is saved comes back, other readers can read it, damage is named, nothing is executed or half written."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

import portnorm as pn
from portnorm.checkpoint import safetensors as container
from tests.cases import LAYERS, PRESETS

MODELS = [
    *(
        pn.Sequential(LAYERS[cell](3, 4, norm=name, num_layers=2, bidirectional=True, t_max=5, rng=0), pn.Linear(8, 2, rng=0))
        for cell, name in PRESETS
    ),
    pn.LSTM(2, 3, norm=pn.Variant(source="test", norm="layer", cell="state", gain=0.5), dtype="float64", rng=0),
    pn.Embedding(5, 3, rng=0),
    pn.LayerNorm((3, 4), eps=1e-3),
    pn.RMSNorm(4),
    pn.BatchNorm(3, momentum=None, channel_axis=-1),
    pn.GroupNorm(2, 4),
    pn.InstanceNorm(4, affine=True),
    pn.InstanceNorm(4, track_running_stats=True, momentum=None),
    pn.LSTM(3, 4, direction="backwards", rng=0),
]


@pytest.mark.parametrize("model", MODELS, ids=repr)
def test_what_is_saved_comes_back(model: pn.Layer, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    pn.save(model, path)
    back = pn.load(path)
    assert repr(back) == repr(model)
    assert back.dtype == model.dtype
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(back.state_dict()[name], array)
        assert back.state_dict()[name].dtype == array.dtype


def test_the_safetensors_package_reads_and_writes_the_same(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    model, path = MODELS[1], tmp_path / "m.safetensors"
    pn.save(model, path)
    theirs = load_file(path)
    assert set(theirs) == set(model.state_dict())
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(theirs[name], array)
    arrays = {"a": np.arange(6, dtype=np.int64).reshape(2, 3), "b": np.float16([1.5]), "empty": np.zeros((0, 3)), "scalar": np.array(2.0)}
    save_file(arrays, path, {"note": "x"})
    mine, metadata = container.read(path)
    assert metadata == {"note": "x"}
    assert set(mine) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(mine[name], array)


def _saved() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "m"
        pn.save(pn.Linear(3, 2, rng=0), path)
        return path.read_bytes()


SAVED = _saved()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(length=st.integers(0, len(SAVED) - 1))
def test_a_file_that_is_cut_off_is_named(length: int, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "cut"
    path.write_bytes(SAVED[:length])
    with pytest.raises(pn.CheckpointError):
        pn.load(path)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(place=st.integers(0, len(SAVED) - 1), flip=st.integers(1, 255))
def test_a_damaged_byte_gives_a_layer_or_one_kind_of_error(place: int, flip: int, tmp_path_factory: Any) -> None:
    damaged = bytearray(SAVED)
    damaged[place] ^= flip
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(bytes(damaged))
    with contextlib.suppress(pn.CheckpointError):
        assert isinstance(pn.load(path), pn.Layer)


class Bomb:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("a checkpoint was executed",))


def test_a_pickle_is_refused_and_not_executed(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(pickle.dumps(Bomb(), protocol=2) + b"\x00" * 64)
    with pytest.raises(pn.CheckpointError, match=r"it looks like a pickle of PyTorch: .*weights_only=True"):
        pn.load(path)


def test_a_foreign_safetensors_file_says_what_to_do(tmp_path: Path) -> None:
    container.write(tmp_path / "m", {"a": np.zeros(3)}, {})
    with pytest.raises(pn.CheckpointError, match="load_state_dict"):
        pn.load(tmp_path / "m")


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}},
        {"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
        {"a": 7},
        [1, 2],
    ],
    ids=range(8),
)
def test_a_header_that_does_not_fit_its_file(header: Any, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "m").write_bytes(struct.pack("<Q", len(text)) + text + b"\x00" * 8)
    with pytest.raises(pn.CheckpointError):
        container.read(tmp_path / "m")


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    pn.save(pn.Linear(3, 2, rng=0), path)
    before = path.read_bytes()
    monkeypatch.setattr(container, "written_whole", _interrupted(container.written_whole))
    with pytest.raises(KeyboardInterrupt):
        pn.save(pn.Linear(3, 2, rng=1), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def _interrupted(written_whole: Any) -> Any:
    import contextlib

    @contextlib.contextmanager
    def interrupted(path: Any) -> Any:
        with written_whole(path) as file:
            yield file
            raise KeyboardInterrupt

    return interrupted


def test_a_state_dict_that_does_not_fit_leaves_the_layer_as_it_was() -> None:
    layer = pn.LSTM(3, 4, norm="layer", rng=0)
    before = layer.state_dict()
    good = pn.LSTM(3, 4, norm="layer", rng=1).state_dict()
    for wrong, message in [
        ({k: v for k, v in good.items() if k != "bias_l0"}, "missing.*bias_l0"),
        ({**good, "extra": np.zeros(1)}, "unknown.*extra"),
        ({**good, "bias_l0": np.zeros(3)}, r"`bias_l0` has shape \(3,\); expected \(16,\)"),
    ]:
        with pytest.raises(pn.CheckpointError, match=message):
            layer.load_state_dict(wrong)
        assert all(layer.state_dict()[name] is array for name, array in before.items())


def test_layers_can_be_copied_and_sent_to_other_processes() -> None:
    model = MODELS[4]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.copy()):
        assert repr(other) == repr(model)
        other.assign({name: p + 1 for name, p in other.parameters().items()})
        assert not np.array_equal(other.parameters()["1.bias"], model.parameters()["1.bias"])


@pytest.mark.parametrize("suffix", ["safetensors", "onnx"])
def test_loading_draws_no_values(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be overwritten, and orthogonal matrices of 2048 features take ten seconds."""
    model = pn.Sequential(pn.Embedding(9, 5, rng=0), pn.GRU(5, 6, norm="layer", rng=0), pn.Linear(6, 2, rng=0))
    path = tmp_path / f"m.{suffix}"
    (pn.save if suffix == "safetensors" else pn.export)(model, path)
    monkeypatch.setattr(np.linalg, "qr", None)
    monkeypatch.setattr(np.random, "default_rng", lambda seed=None: None)
    back = pn.load(path)
    for name, a in model.state_dict().items():
        np.testing.assert_array_equal(back.state_dict()[name], a)
    monkeypatch.undo()
    assert np.any(pn.GRU(5, 6, norm="layer").params["weight_hh_l0"])


def test_a_name_as_long_as_the_system_takes_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 243 + ".safetensors")
    pn.save(pn.LayerNorm(3), path)
    assert isinstance(pn.load(path), pn.LayerNorm)
