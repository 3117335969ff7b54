"""A layer whose library came through the entry points does all that a layer of a library of the table does."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import portnorm as pn
from portnorm.arrays import to_numpy
from tests.cases import LAYERS, PRESETS, random_recurrent, random_state
from tests.processes import output_of
from tests.toy import FILES, installed

NAME = "toywhole"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the library is installed, for this process too."""
    path = tmp_path_factory.mktemp("site")
    installed(path, FILES)
    sys.path.insert(0, str(path))
    yield path
    sys.path.remove(str(path))
    for name in [name for name in sys.modules if name.partition(".")[0] == NAME]:
        del sys.modules[name]


MODELS: dict[str, Callable[[], pn.Layer]] = {
    "LSTM": lambda: pn.LSTM(3, 4, norm="layer", rng=0, xp=NAME),
    "GRU with statistics": lambda: pn.GRU(3, 4, norm="batch", rng=0, xp=NAME),
    "BatchNorm": lambda: pn.BatchNorm(3, channel_axis=-1, xp=NAME),
    "without parameters": lambda: pn.LayerNorm(3, affine=False, xp=NAME),
    "Sequential": lambda: pn.Sequential(pn.LSTM(3, 4, rng=0, xp=NAME), pn.Linear(4, 2, rng=0, xp=NAME)),
}


def assert_alike(model: pn.Layer, other: pn.Layer) -> None:
    """Both compute the same, each in its own library."""
    x = np.random.default_rng(1).standard_normal((5, 2, 3)).astype("float32")
    results = [m(m.xp.asarray(x)) for m in (model, other)]
    mine, theirs = (to_numpy(y[0] if model.recurrent else y) for y in results)
    np.testing.assert_allclose(theirs, mine, rtol=1e-5, atol=1e-6)


def exported(model: pn.Layer, tmp_path: Path) -> pn.Layer:
    pn.export(model, tmp_path / "m.onnx")
    return pn.load(tmp_path / "m.onnx", xp=NAME)


def saved(model: pn.Layer, tmp_path: Path) -> pn.Layer:
    pn.save(model, tmp_path / "m.safetensors")
    return pn.load(tmp_path / "m.safetensors", xp=NAME)


def loaded(model: pn.Layer, tmp_path: Path) -> pn.Layer:
    other = model.to(xp="numpy")
    other.load_state_dict(model.state_dict())
    again = model.copy()
    again.load_state_dict(other.state_dict())
    return again


VERBS: dict[str, Callable[[pn.Layer, Path], pn.Layer]] = {
    "copy": lambda model, _: model.copy(),
    "copy.copy": lambda model, _: copy.copy(model),
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "export": exported,
    "save": saved,
    "load_state_dict": loaded,
    "there and back": lambda model, _: model.to(xp="numpy").to(xp=NAME),
    "to its namespace": lambda model, _: model.to(xp=model.xp),
    "dtype and back": lambda model, _: model.to(dtype="float64").to(dtype="float32"),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("verb", VERBS)
def test_a_layer_of_another_library(verb: str, model: str, folder: Path, tmp_path: Path) -> None:
    layer = MODELS[model]()
    other = VERBS[verb](layer, tmp_path)
    assert other.xp is layer.xp
    assert other.dtype == layer.dtype
    assert all(type(a) is type(layer.xp.zeros(1)) for a in other.state_dict().values())
    assert_alike(layer, other)


@pytest.mark.parametrize("model", MODELS)
def test_the_layer_is_compiled_by_onnxruntime(model: str, folder: Path) -> None:
    layer = MODELS[model]()
    x = np.random.default_rng(1).standard_normal((5, 2, 3)).astype("float32")
    mine, theirs = (y[0] if layer.recurrent else y for y in (layer(layer.xp.asarray(x)), pn.compile(layer)(x)))
    np.testing.assert_allclose(theirs, to_numpy(mine), rtol=1e-5, atol=1e-6)


def test_a_pickle_of_it_is_read_in_another_process(folder: Path, tmp_path: Path) -> None:
    layer = MODELS["LSTM"]()
    (tmp_path / "layer.pickle").write_bytes(pickle.dumps(layer))
    code = f"""
import pickle, sys
layer = pickle.load(open({str(tmp_path / "layer.pickle")!r}, "rb"))
print(layer, sys.modules["toywhole.of_portnorm"].LIBRARY.namespace is layer.xp)
"""
    assert output_of(code, PYTHONPATH=installed(folder, FILES)) == f"{layer} True"


@pytest.mark.parametrize(("cell", "norm"), [row for row in PRESETS if row[0] == "LSTM"])
def test_its_layers_are_trained(cell: str, norm: str | None, folder: Path, rng: np.random.Generator) -> None:
    reference = random_recurrent(cell, norm, rng)
    layer = LAYERS[cell](4, 3, norm=norm, t_max=4, xp=NAME, dtype="float64")
    layer.load_state_dict(reference.state_dict())
    x, state = rng.standard_normal((5, 3, 4)), random_state(reference, 3, rng)
    y, _, pullback = reference.vjp(x, state, [5, 2, 3], training=True)
    dx, _, grads = pullback(y)
    their_y, _, their_pullback = layer.vjp(layer.xp.asarray(x), tuple(map(layer.xp.asarray, state)), [5, 2, 3], training=True)
    their_dx, _, their_grads = their_pullback(their_y)
    for mine, theirs in zip((y, dx, *grads.values()), (their_y, their_dx, *their_grads.values()), strict=True):
        np.testing.assert_allclose(to_numpy(theirs), mine, rtol=1e-9, atol=1e-10)


def test_a_name_that_no_library_has() -> None:
    with pytest.raises(pn.UnsupportedError, match=r"`xp` is 'toyhole'; expected .* or one of numpy, .* entry points of portnorm\.backends"):
        pn.LayerNorm(3, xp="toyhole")
