"""Training: a stopped run and one that was not give the same bits; padding, weights and validation count as they say."""

from __future__ import annotations

import json
import math
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from portnorm import demo
from portnorm.arrays import to_numpy
from portnorm.checkpoint import safetensors
from portnorm.optimizers import OPTIMIZERS
from portnorm.training import Cases, History, evaluate
from portnorm.training import progress as progress_module
from portnorm_backends.cpu import warming
from tests.cases import IMPLEMENTATIONS, LAYERS, PRESETS
from tests.conftest import Library
from tests.tolerances import RECURRENT, relative

STEPS, CASES, FEATURES, CLASSES = 6, 9, 3, 3
LENGTHS = [6, 4, 1, 6, 2, 3, 5, 6, 2]


def some(rng: np.random.Generator, dtype: str = "float32") -> tuple[Any, Any]:
    return rng.standard_normal((STEPS, CASES, FEATURES)).astype(dtype), rng.integers(0, CLASSES, CASES)


def classifier(cell: str = "GRU", norm: Any = "layer", **keywords: Any) -> pn.Sequential:
    settings = {"return_sequences": False, "t_max": STEPS, "rng": 0, **keywords}
    layer = LAYERS[cell](FEATURES, 4, norm=norm, **settings)
    head = {name: settings[name] for name in ("dtype", "xp") if name in settings}
    return pn.Sequential(layer, pn.Linear(4 * layer.num_directions, CLASSES, rng=1, **head))


def bits(model: pn.Layer) -> dict[str, bytes]:
    return {name: to_numpy(a).tobytes() for name, a in model.state_dict().items()}


# -- a run as a file -----------------------------------------------------------------------------------------------------------------------

SCHEDULED = {f"{name} with a schedule": make(lr=lambda step: 0.02 / (1 + step)) for name, make in OPTIMIZERS.items()}
WAYS: dict[str, Any] = {name: make(lr=0.02) for name, make in OPTIMIZERS.items()} | {"momentum": pn.SGD(0.02, 0.9)} | SCHEDULED
GENERATORS = [np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64]


def updates(run: pn.Training, count: int) -> None:
    """Batches, dropout and a class for each, all drawn by the run's generator."""
    for _ in range(count):
        x, y = some(run.rng, np.dtype(run.model.dtype).name)
        logits, _, pullback = run.model.vjp(x, lengths=LENGTHS, training=True, rng=run.rng)
        loss, loss_pullback = pn.vjp(pn.softmax_cross_entropy, logits, y)
        run.update(pullback(loss_pullback(np.ones_like(loss))[0])[-1])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_a_run_from_a_file_goes_on_bit_by_bit(cell: str, norm: str | None, way: str, tmp_path: Path) -> None:
    optimizer, path = WAYS[way], tmp_path / "run.safetensors"
    model = classifier(cell, norm, num_layers=2, dropout=0.3, recurrent_dropout=0.2)
    pn.warm(model)
    run = pn.Training(model, optimizer, rng=3, notes={"losses": [0.1, math.inf], "best": {"a": np.arange(3.0)}, "pair": (None, True)})
    updates(run, 2)
    pn.save(run, path)
    updates(run, 3)
    same = pn.load(path, training=True, optimizer=optimizer if way in SCHEDULED else None)
    assert (same.step, same.notes["losses"], same.notes["pair"]) == (2, [0.1, math.inf], (None, True))
    np.testing.assert_array_equal(same.notes["best"]["a"], np.arange(3.0))
    updates(same, 3)
    assert bits(same.model) == bits(run.model)
    assert repr(same.optimizer) == repr(run.optimizer)
    assert same.rng.bit_generator.state == run.rng.bit_generator.state


@pytest.mark.parametrize("bit_generator", GENERATORS, ids=lambda b: b.__name__)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_every_generator_and_type(dtype: str, bit_generator: Any, tmp_path: Path) -> None:
    run = pn.Training(classifier(dtype=dtype, recurrent_dropout=0.5), pn.Adam(1e-2), rng=np.random.Generator(bit_generator(5)))
    updates(run, 1)
    run.rng.standard_normal(3, dtype="float32")  # half of a word is kept for the next draw
    pn.save(run, tmp_path / "run")
    same = pn.load(tmp_path / "run", training=True)
    for one in (run, same):
        updates(one, 2)
    assert bits(same.model) == bits(run.model)


def test_a_run_in_every_library(eager: Library, dtype_of_library: str, tmp_path: Path) -> None:
    xp, dtype = eager.xp, dtype_of_library
    run = pn.Training(classifier(xp=xp, dtype=dtype), pn.AdamW(1e-2))
    grads = [{n: eager.array(np.full(p.shape, k), dtype) for n, p in run.model.parameters().items()} for k in (0.5, -1.0)]
    run.update(grads[0])
    pn.save(run, tmp_path / "run")
    same = pn.load(tmp_path / "run", training=True, xp=xp)
    for one in (run, same):
        one.update(grads[1])
    assert bits(same.model) == bits(run.model)
    assert same.state is not None
    assert run.state is not None
    for name in ("mean", "square"):
        for key, a in run.state[name].items():
            assert same.state[name][key].dtype == a.dtype


def test_parts_that_evaluate_go_on_evaluating(tmp_path: Path) -> None:
    """Parts, and containers inside of others: a run that goes on would take their statistics else."""
    for name in ("whole", "inner", "part"):
        inner = pn.Sequential(pn.BatchNorm(4), pn.Linear(4, CLASSES, rng=1))
        model = pn.Sequential(classifier().parts[0], inner)
        chosen = {"whole": model, "inner": inner, "part": inner.parts[0]}
        chosen[name].eval()
        pn.save(pn.Training(model, pn.SGD()), tmp_path / "run")
        same: Any = pn.load(tmp_path / "run", training=True).model
        found = {"whole": same, "inner": same.parts[1], "part": same.parts[1].parts[0]}
        assert {key: layer.evaluates for key, layer in found.items()} == {key: key == name for key in chosen}


def test_a_file_of_a_run_gives_the_model_alone(tmp_path: Path) -> None:
    run = pn.Training(classifier(norm="batch"), pn.Adam(), rng=0)
    updates(run, 1)
    pn.save(run, tmp_path / "run.safetensors")
    assert bits(pn.load(tmp_path / "run.safetensors")) == bits(run.model)
    pn.save(run.model, tmp_path / "model.safetensors")
    with pytest.raises(pn.CheckpointError, match=r"holds a model and no state of its training"):
        pn.load(tmp_path / "model.safetensors", training=True)
    with pytest.raises(pn.UnsupportedError, match=r"`optimizer` is given, but without training=True"):
        pn.load(tmp_path / "model.safetensors", optimizer=pn.Adam())  # type: ignore[call-overload]
    with pytest.raises(pn.UnsupportedError, match=r"`layer` is a dict; expected a layer of portnorm, or a portnorm.Training"):
        pn.save({}, tmp_path / "m")  # type: ignore[arg-type]


class Slow:
    """An optimizer of one's own."""

    def init(self, params: Any) -> Any:
        return {"count": 0, "last": dict(params)}

    def update(self, params: Any, grads: Any, state: Any) -> Any:
        return {n: p - 0.1 * grads[n] for n, p in params.items()}, {"count": state["count"] + 1, "last": dict(params)}


def test_an_optimizer_of_ones_own(tmp_path: Path) -> None:
    run = pn.Training(classifier(), Slow(), rng=0)
    updates(run, 2)
    pn.save(run, tmp_path / "run")
    with pytest.raises(pn.CheckpointError, match=r"is a Slow, which is none of portnorm's.*load\(…, optimizer=…\)"):
        pn.load(tmp_path / "run", training=True)
    same = pn.load(tmp_path / "run", training=True, optimizer=Slow())
    assert same.state is not None
    assert same.state["count"] == 2
    for one in (run, same):
        updates(one, 1)
    assert bits(same.model) == bits(run.model)


def test_a_function_is_in_no_file(tmp_path: Path) -> None:
    pn.save(pn.Training(classifier(), pn.AdamW(lambda step: 0.1, decayed=lambda name, p: True)), tmp_path / "run")
    with pytest.raises(pn.CheckpointError, match=r"has a function for `lr`, `decayed`, and functions are in no file; give it again"):
        pn.load(tmp_path / "run", training=True)
    pn.save(pn.Training(classifier(), pn.AdamW(0.1, decayed=["*weight*"])), tmp_path / "run")
    assert pn.load(tmp_path / "run", training=True).optimizer == pn.AdamW(0.1, decayed=("*weight*",))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path, notes = tmp_path_factory.mktemp("runs") / "run", {"a": [np.ones(2), "b"]}
    run = pn.Training(pn.Linear(2, 1, rng=0), pn.Adam(), rng=np.random.Generator(np.random.SFC64(0)), notes=notes)
    run.result = pn.Linear(2, 1, rng=1).parameters(), {}
    pn.save(run, path)
    return path.read_bytes()


def test_a_file_that_is_cut_off_or_damaged_is_named(saved: bytes, tmp_path: Path) -> None:
    """Cut at every length, and with every byte of its header changed: a run, or one kind of error."""
    path, header = tmp_path / "run", 8 + int.from_bytes(saved[:8], "little")
    for length in range(0, len(saved), 7):
        path.write_bytes(saved[:length])
        with pytest.raises(pn.CheckpointError):
            pn.load(path, training=True)
    survived = 0
    for place in range(0, header, 3):
        path.write_bytes(saved[:place] + bytes([saved[place] ^ 5]) + saved[place + 1 :])
        try:
            survived += isinstance(pn.load(path, training=True), pn.Training)
        except pn.CheckpointError:
            continue
    assert survived < header / 6


@pytest.mark.parametrize("key", ["optimizer", "state", "step", "rng", "notes", "evaluates", "trained"])
@pytest.mark.parametrize("value", [None, 3, "x", {}, {"type": "Adam"}, {"array": "nothing"}, {"bit_generator": "os"}], ids=str)
def test_a_file_that_says_something_else_is_named(key: str, value: Any, saved: bytes, tmp_path: Path) -> None:
    (tmp_path / "run").write_bytes(saved)
    arrays, metadata = safetensors.read(tmp_path / "run")
    about = json.loads(metadata["portnorm.training"])
    if key == "step" and value == 3:
        value = -3
    about[key] = value
    safetensors.write(tmp_path / "run", arrays, {**metadata, "portnorm.training": json.dumps(about)})
    with pytest.raises(pn.CheckpointError):
        pn.load(tmp_path / "run", training=True)


def test_what_cannot_be_saved_leaves_what_was_there(tmp_path: Path) -> None:
    run, path = pn.Training(classifier(), pn.Adam(), rng=0), tmp_path / "run"
    pn.save(run, path)
    before = path.read_bytes()
    for notes in ({"f": print}, {"s": {1, 2}}, {3: 1.0}, {"deep": [{"f": object()}]}):
        run.notes = notes  # type: ignore[assignment]
        with pytest.raises(pn.CheckpointError, match="`notes"):
            pn.save(run, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("wrong", [{"model": 3}, {"optimizer": pn.Adam}, {"optimizer": 1e-3}, {"step": -1}], ids=str)
def test_a_run_of_something_else_is_named(wrong: dict[str, Any]) -> None:
    given = {"model": pn.Linear(2, 1), "optimizer": pn.Adam()} | wrong
    with pytest.raises(pn.UnsupportedError, match=f"`{next(iter(wrong))}` is"):
        pn.Training(**given)


# -- fit -----------------------------------------------------------------------------------------------------------------------------------


PUBLISHED = [(cell, name) for cell, name in IMPLEMENTATIONS if pn.IMPLEMENTATIONS[cell][name].eps]
"""Without those that divide by the spread of the first state, which is 0."""


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("cell", "norm"), PRESETS + PUBLISHED)
def test_fit_stopped_after_each_epoch_is_fit(cell: str, norm: str | None, dropout: float, tmp_path: Path, rng: np.random.Generator) -> None:
    x, y = some(rng)
    whole, pieces = (classifier(cell, norm, recurrent_dropout=dropout) for _ in range(2))
    pn.warm(whole)
    noise = 0.1 if whole.parts[0].timed else 0.0  # type: ignore[attr-defined]
    how: Any = {"batch": 4, "optimizer": pn.AdamW(0.02), "validation": 0.25, "patience": 9, "state_noise": noise, "rng": 7}
    expected = pn.fit(whole, x, y, LENGTHS, epochs=3, **how)
    for epochs in (1, 2, 3):
        found = pn.fit(pieces, x, y, LENGTHS, epochs=epochs, checkpoint=tmp_path / "run", resume=True, **how)
        if epochs < 3:
            pieces = classifier(cell, norm, recurrent_dropout=dropout, rng=5)
    assert found == expected
    assert bits(pieces) == bits(whole)


ENDINGS = [(cell, norm, patience) for cell, norm in PRESETS for patience in (None, 9)] + [("LSTM", "batch", 1), ("GRU", "layer", 1)]


@pytest.mark.parametrize(("cell", "norm", "patience"), ENDINGS)
def test_the_file_of_a_run_is_the_model_that_fit_leaves(cell: str, norm: str | None, patience: int | None, tmp_path: Path) -> None:
    """Of labels by chance, so that the last epoch is not the best: after every end, also where the run goes on."""
    rng, path = np.random.default_rng(3), tmp_path / "run.safetensors"
    (x, y), other = some(rng), some(rng)
    how: Any = {"batch": 3, "optimizer": pn.SGD(3.0, 0.5), "validation": other, "patience": patience, "checkpoint": path, "progress": False}
    model = classifier(cell, norm)
    how["state_noise"] = 0.1 if model.parts[0].timed else 0.0  # type: ignore[attr-defined]
    for epochs in (2, 5, 5):
        history = pn.fit(model, x, y, epochs=epochs, resume=True, **how)
        assert bits(pn.load(path)) == bits(model)
        run = pn.load(path, training=True)
        assert run.step == 3 * len(history.epochs)
        if patience == 9 and history.best_epoch != len(history.epochs):
            assert bits(run.model) != bits(model)  # it goes on from its last epoch
    alone = classifier(cell, norm)
    pn.fit(alone, x, y, epochs=5, **{**how, "checkpoint": None})
    assert bits(alone) == bits(model)


@pytest.mark.parametrize("patience", [None, 9])
def test_the_file_of_a_run_that_was_killed_is_the_best_so_far(patience: int | None, tmp_path: Path, rng: np.random.Generator) -> None:
    x, y = some(rng)
    seen: list[Any] = []
    model = classifier("LSTM", "batch-input")

    def interrupt(done: int, total: int, loss: float) -> None:
        if done % 3 == 1:
            seen.append(None if done == 1 else bits(pn.load(tmp_path / "run")))
        if done == 16:
            raise KeyboardInterrupt

    how: Any = {"batch": 3, "optimizer": pn.SGD(3.0), "validation": some(rng), "patience": patience, "checkpoint": tmp_path / "run"}
    with pytest.raises(KeyboardInterrupt):
        pn.fit(model, x, y, epochs=9, progress=interrupt, **how)
    run = pn.load(tmp_path / "run", training=True)
    validation = run.notes["history"]["validation"]
    best = int(np.argmin(validation))
    assert best < 4
    assert (seen[5] == bits(run.model)) == (patience is None)
    for epoch in range(1, 6):
        lowest = int(np.argmin(validation[:epoch]))
        assert (seen[epoch] == seen[lowest + 1]) == (patience is not None or lowest == epoch - 1)


def test_an_update_by_hand_forgets_what_fit_came_to(tmp_path: Path, rng: np.random.Generator) -> None:
    """Else the file of a run that goes on in a loop of one's own would give the model of before."""
    x, y = some(rng)
    pn.fit(classifier(norm="batch"), x, y, epochs=1, checkpoint=tmp_path / "run")
    run = pn.load(tmp_path / "run", training=True)
    assert run.result is not None
    updates(run, 1)
    pn.save(run, tmp_path / "run")
    assert bits(pn.load(tmp_path / "run")) == bits(run.model)


def test_a_run_that_was_interrupted_goes_on_from_its_last_epoch(tmp_path: Path, rng: np.random.Generator) -> None:
    x, y = some(rng)
    whole, stopped = classifier(), classifier()
    expected = pn.fit(whole, x, y, epochs=4, batch=3)

    def interrupt(done: int, total: int, loss: float) -> None:
        assert total == 12
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pn.fit(stopped, x, y, epochs=4, batch=3, checkpoint=tmp_path / "run", progress=interrupt)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert pn.load(tmp_path / "run", training=True).step == 6
    again = classifier(rng=9)
    assert pn.fit(again, x, y, epochs=4, batch=3, checkpoint=tmp_path / "run", resume=True) == expected
    assert bits(again) == bits(whole)


HERE: dict[str, Any] = {"epochs": 2, "batch": 3, "optimizer": pn.AdamW(0.01), "lengths": LENGTHS, "weights": np.ones(CASES), "rng": 3}
SPLIT = {**HERE, "validation": 0.25, "patience": 4}
FIXED = {**HERE, "validation": (np.ones((STEPS, 2, FEATURES), "float32"), np.array([0, 1]), [6, 3], np.ones(2))}


def fixed_but(place: int, value: Any) -> dict[str, Any]:
    return {"validation": tuple(value if k == place else part for k, part in enumerate(FIXED["validation"]))}


def changed(a: Any, at: Any, by: Any) -> Any:
    found = np.array(a)
    found[at] += by
    return found


OTHER: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "batch": (HERE, {"batch": 4}, "`batch` 3, which is 4 now"),
    "whole batches": (HERE, {"whole_batches": True}, "`whole_batches` False, which is True now"),
    "clip": (HERE, {"clip": None}, "`clip` 1.0, which is None now"),
    "noise": (HERE, {"state_noise": 0.1}, "`state_noise` 0.0, which is 0.1 now"),
    "cases": (HERE, {"cases": slice(0, 8)}, "`cases` 9, which is 8 now"),
    "model": (HERE, {"model": "RNN"}, "is of another model, Sequential"),
    "loss": (HERE, {"y": np.ones((CASES, CLASSES))}, "`loss` 'softmax_cross_entropy', which is 'mean_squared_error' now"),
    "optimizer": (HERE, {"optimizer": pn.SGD()}, "the optimizer AdamW, which is SGD now"),
    "an optimizer whose state is alike": (HERE, {"optimizer": pn.Adam(0.01)}, "the optimizer AdamW, which is Adam now"),
    "rate": (HERE, {"optimizer": pn.AdamW(0.02)}, "`lr` of its optimizer 0.01, which is 0.02 now; .*lr=lambda step"),
    "decay": (HERE, {"optimizer": pn.AdamW(0.01, weight_decay=0.5)}, "`weight_decay` of its optimizer 0.01, which is 0.5 now"),
    "what decays": (HERE, {"optimizer": pn.AdamW(0.01, decayed=["*"])}, r"`decayed` of its optimizer .*, which is \('\*',\) now"),
    "rate for a schedule": (
        {**HERE, "optimizer": pn.SGD(lambda step: 0.1)},
        {"optimizer": pn.SGD(0.1)},
        "`lr` .* a function, which is 0.1",
    ),
    "seed": (HERE, {"rng": 9}, "another `rng`; expected the seed"),
    "kind of generator": (HERE, {"rng": np.random.Generator(np.random.MT19937(3))}, "another `rng`"),
    "no validation": (SPLIT, {"validation": None, "patience": None}, "`validation` 0.25, which is None now"),
    "validation": (HERE, {"validation": 0.2}, "`validation` None, which is 0.2 now"),
    "share": (SPLIT, {"validation": 0.26}, "`validation` 0.25, which is 0.26 now"),
    "validation of its own": (SPLIT, {"validation": FIXED["validation"]}, "`validation` 0.25, which is 'cases of its own' now"),
    "less patience": (SPLIT, {"patience": 3}, "`patience` 4, which is 3 now; expected as much"),
    "patience": ({**SPLIT, "patience": None}, {"patience": 9}, "`patience` None, which is 9 now"),
    "fewer epochs": (HERE, {"epochs": 1}, "of 2 epochs; expected `epochs` of as many at least"),
    "x": (HERE, {"x": ((0, 4, 1), 1.0)}, "other numbers in `x`"),
    "y": (HERE, {"y": ((4,), -1)}, "other numbers in `y`"),
    "lengths": (HERE, {"lengths": [5, *LENGTHS[1:]]}, "other numbers in `lengths`"),
    "no lengths": (HERE, {"lengths": None}, "other numbers in `lengths`"),
    "weights": (HERE, {"weights": changed(np.ones(CASES), 2, 1)}, "other numbers in `weights`"),
    "no weights": (HERE, {"weights": None}, "other numbers in `weights`"),
    "x of validation": (FIXED, fixed_but(0, np.zeros((STEPS, 2, FEATURES), "float32")), "other numbers in `validation x`"),
    "y of validation": (FIXED, fixed_but(1, np.array([1, 1])), "other numbers in `validation y`"),
    "lengths of validation": (FIXED, fixed_but(2, [6, 2]), "other numbers in `validation lengths`"),
    "weights of validation": (FIXED, fixed_but(3, np.array([1.0, 0.5])), "other numbers in `validation weights`"),
}


@pytest.mark.parametrize("name", OTHER)
def test_a_checkpoint_of_another_run_is_named(name: str, tmp_path: Path) -> None:
    """Whatever would make other numbers; the model and the file stay as they were."""
    how, change, message = OTHER[name]
    x, y = some(np.random.default_rng(0))
    y = 1 + y % 2
    pn.fit(classifier(), x, y, checkpoint=tmp_path / "run", **how)
    file = (tmp_path / "run").read_bytes()
    given = {"x": x, "y": y, **how}
    for key, value in change.items():
        given[key] = changed(given[key], *value) if isinstance(value, tuple) and key in ("x", "y") else value
    cases, model = given.pop("cases", slice(None)), classifier(given.pop("model", "GRU"))
    given |= {"x": given["x"][:, cases], **{key: given[key][cases] for key in ("y", "lengths", "weights") if given[key] is not None}}
    before = bits(model)
    with pytest.raises(pn.CheckpointError, match=message):
        pn.fit(model, **{"epochs": 4, **given}, checkpoint=tmp_path / "run", resume=True)
    assert bits(model) == before
    assert (tmp_path / "run").read_bytes() == file


SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the same": (SPLIT, {}),
    "more epochs": (SPLIT, {"epochs": 5}),
    "more patience": (SPLIT, {"patience": 5}),
    "no patience": (SPLIT, {"patience": None}),
    "the generator of the file": (SPLIT, {"rng": None}),
    "a generator of that seed": (SPLIT, {"rng": np.random.Generator(np.random.PCG64(3))}),
    "a schedule of the same rates": (SPLIT, {"optimizer": pn.AdamW(lambda step: 0.01)}),
    "labels of another width": (SPLIT, {"y": "int8"}),
    "other numbers behind the lengths": (SPLIT, {"x": 7.0}),
    "cases of its own": (FIXED, {"epochs": 5}),
}


@pytest.mark.parametrize("name", SAME)
def test_a_checkpoint_of_the_same_run_is_taken_up(name: str, tmp_path: Path) -> None:
    """To the numbers of a run that had all from its start; its file is in turn of the same run."""
    how, change = SAME[name]
    x, y = some(np.random.default_rng(0))
    behind = np.arange(STEPS)[:, None] >= np.array(LENGTHS)
    pn.fit(classifier(), x, y, **how, checkpoint=tmp_path / "run")
    other_x = np.where(behind[:, :, None], np.float32(change["x"]), x) if "x" in change else x
    now = {"epochs": 4, **how, **change, "x": other_x, "y": y.astype(change.get("y", int))}
    for _ in range(2):
        model = classifier(rng=4)
        found = pn.fit(model, **now, checkpoint=tmp_path / "run", resume=True)
    whole = classifier()
    assert pn.fit(whole, **{**now, "rng": 3}) == found
    assert bits(whole) == bits(model)


def test_a_checkpoint_of_an_older_portnorm_is_named(tmp_path: Path, rng: np.random.Generator) -> None:
    x, y = some(rng)
    pn.fit(classifier(), x, y, epochs=1, checkpoint=tmp_path / "run")
    run = pn.load(tmp_path / "run", training=True)
    del run.notes["fit"]["rng"]
    pn.save(run, tmp_path / "run")
    with pytest.raises(pn.CheckpointError, match="is of an older portnorm, which did not note `rng`"):
        pn.fit(classifier(), x, y, epochs=2, checkpoint=tmp_path / "run", resume=True)


def test_other_parts_that_evaluate_are_another_run(tmp_path: Path, rng: np.random.Generator) -> None:
    x, y = some(rng)
    model = classifier(norm="batch")
    model.parts[0].eval()
    before = dict(model.buffers)
    pn.fit(model, x, y, epochs=1, checkpoint=tmp_path / "run")
    assert all(np.array_equal(a, before[name]) for name, a in model.buffers.items())
    with pytest.raises(pn.CheckpointError, match="of which other parts evaluate"):
        pn.fit(classifier(norm="batch"), x, y, epochs=2, checkpoint=tmp_path / "run", resume=True)


def test_a_language_model_of_words(rng: np.random.Generator) -> None:
    """Integers for x, a list of sequences of different length, and the next word for a target of each step."""
    words = [np.arange(n) % 4 for n in rng.integers(3, 9, 40)]
    model = pn.Sequential(pn.Embedding(4, 6, rng=0), pn.GRU(6, 8, norm="layer", rng=0), pn.Linear(8, 4, rng=1))
    history = pn.fit(model, [w[:-1] for w in words], [w[1:] for w in words], optimizer=pn.Adam(0.02), epochs=15)
    assert history.epochs[-1] < 0.1 * history.epochs[0]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("target", ["a class", "a number", "a class of each step", "numbers of each step"])
def test_what_stands_in_padding_changes_nothing(target: str, batch_first: bool, rng: np.random.Generator) -> None:
    """NaN behind the lengths of x and any label or number there in y; and lists of sequences are the same as padded ones."""
    each, floats = "each" in target, "number" in target
    x = rng.standard_normal((CASES, STEPS, FEATURES))
    shape = (CASES, STEPS) if each else (CASES,)
    y = rng.standard_normal((*shape, 2)) if floats else rng.integers(0, 2, shape)
    there = np.arange(STEPS) < np.array(LENGTHS)[:, None]
    ragged = [a[:n] for a, n in zip(x, LENGTHS, strict=True)]
    targets = [a[:n] for a, n in zip(y, LENGTHS, strict=True)] if each else y
    x = np.where(there[..., None], x, np.nan)
    if each:
        y = np.where(there[..., None], y, np.nan) if floats else np.where(there, y, 99)

    def turned(a: Any) -> Any:
        return a if batch_first or a.ndim < 2 or (not each and a is y) else a.swapaxes(0, 1)

    def run(*given: Any) -> Any:
        layer = pn.LSTM(FEATURES, 4, norm="layer", return_sequences=each, batch_first=batch_first, rng=0, dtype="float64")
        model = pn.Sequential(layer, pn.Linear(4, 2, rng=1, dtype="float64"))
        pn.warm(model)
        return pn.fit(model, *given, epochs=2, batch=4, validation=given), bits(model)

    padded = run(turned(x), turned(y), LENGTHS)
    assert padded == run(ragged, targets)
    objects = np.empty(CASES, dtype=object)
    objects[:] = ragged
    assert padded == run(objects, targets)
    assert all(map(math.isfinite, padded[0].losses))


def test_every_library_trains_as_numpy(eager: Library, rng: np.random.Generator) -> None:
    """Targets of each step with weights, ragged, validated; the model stays in its library."""
    x, _ = some(rng, eager.widest)
    y, weights = rng.integers(0, CLASSES, (STEPS, CASES)), rng.uniform(0.5, 2.0, (STEPS, CASES))

    def run(xp: Any, array: Any) -> Any:
        kind = eager.widest
        model = pn.Sequential(pn.GRU(FEATURES, 4, norm="layer", xp=xp, dtype=kind, rng=0), pn.Linear(4, CLASSES, rng=1, xp=xp, dtype=kind))
        given = array(x), array(y), LENGTHS
        history = pn.fit(model, *given, weights=array(weights), epochs=2, batch=CASES, validation=(*given, array(weights)))
        assert all(type(p) is type(given[0]) for p in model.parameters().values())
        return history, model.parameters()

    expected, params = run(None, np.asarray)
    found, theirs = run(eager.xp, eager.array)
    for key in ("losses", "gradient_norms", "validation"):
        np.testing.assert_allclose(getattr(found, key), getattr(expected, key), **relative(eager.widest, RECURRENT))
    for mine, other in zip(eager.values([*theirs.values()]), params.values(), strict=True):
        np.testing.assert_allclose(mine, other, **relative(eager.widest, RECURRENT))


def test_a_validation_loss_is_the_mean_over_all_that_counts(rng: np.random.Generator) -> None:
    """In batches of any size, of targets of each step with weights."""
    x, _ = some(rng)
    y, weights = rng.integers(0, CLASSES, (STEPS, CASES)), rng.uniform(0.5, 2.0, (STEPS, CASES))
    y[2, :4] = -100
    model = pn.Sequential(pn.GRU(FEATURES, 4, rng=0), pn.Linear(4, CLASSES, rng=1))
    there = np.arange(STEPS)[:, None] < np.array(LENGTHS)
    expected = float(pn.softmax_cross_entropy(model(x, lengths=LENGTHS)[0], y, np.where(there, weights, 0.0)))
    cases = Cases.of(model, x, y, LENGTHS, weights)
    for batch in (1, 4, 9):
        assert math.isclose(evaluate(model, cases, pn.softmax_cross_entropy, batch), expected, rel_tol=1e-6)
    of_cases = Cases.of(model, x, y, LENGTHS, weights[0])
    expected = float(pn.softmax_cross_entropy(model(x, lengths=LENGTHS)[0], y, np.where(there, weights[:1], 0.0)))
    assert math.isclose(evaluate(model, of_cases, pn.softmax_cross_entropy, 4), expected, rel_tol=1e-6)


def test_a_case_of_no_weight_is_not_trained_on(rng: np.random.Generator) -> None:
    x, y = some(rng)
    found = []
    for label in (0, 1):
        y[3], model = label, classifier()
        pn.fit(model, x, y, weights=np.arange(CASES) != 3, epochs=2, batch=4)
        found.append(bits(model))
    assert found[0] == found[1]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_a_gradient_that_is_not_finite_changes_nothing(cell: str, norm: str | None, clip: float | None, rng: np.random.Generator) -> None:
    """At 200 steps of zeros in front a norm inside the cell divides by √eps at each; a first state that is not 0 is a way out."""
    x = np.concatenate([np.zeros((200, 6, FEATURES), "float32"), rng.standard_normal((4, 6, FEATURES), dtype="float32")])
    y, model = rng.integers(0, CLASSES, 6), classifier(cell, norm, t_max=204)
    before = bits(model)
    inside = norm is not None and norm.startswith(("layer", "batch")) and "input" not in norm
    if inside:
        with pytest.raises(pn.PortnormError, match=r"the gradient of `[\w.]+` and \d+ more of \d+ is not finite at update 1, .* 1/√eps"):
            pn.fit(model, x, y, epochs=2, clip=clip)
        assert bits(model) == before
    history = pn.fit(model, x, y, epochs=2, clip=clip, state_noise=0.1)
    assert len(history.losses) == 2
    assert all(np.isfinite(to_numpy(a)).all() for a in model.state_dict().values())


def test_a_later_gradient_that_is_not_finite_leaves_what_was_learned(eager: Library, rng: np.random.Generator) -> None:
    """In every library, by an Op whose gradient ends: the model and its file are those of the epoch before."""
    from portnorm.op import op

    calls: list[int] = []

    @op
    def breaking(y: Any, target: Any) -> Any:
        return eager.xp.sum(y * target), (y, target)

    @breaking.backward
    def _(residuals: Any, dy: Any) -> Any:
        calls.append(1)
        return dy * residuals[1] * (math.inf if len(calls) == 3 else 1.0), None

    kind = eager.widest
    model = pn.Sequential(pn.BatchNorm(3, xp=eager.xp, dtype=kind), pn.Linear(3, 1, rng=0, xp=eager.xp, dtype=kind))
    x, y = (eager.array(rng.standard_normal((8, n)).astype(kind)) for n in (3, 1))
    seen: list[Any] = []

    def after(done: int, total: int, loss: float) -> None:
        seen.append(bits(model))

    with pytest.raises(pn.PortnormError, match=r"not finite at update 3, while the loss is .* or try a smaller learning rate"):
        pn.fit(model, x, y, loss=breaking, optimizer=pn.Adam(), epochs=5, progress=after)
    assert len(seen) == 2
    assert bits(model) == seen[-1]


def test_a_loss_that_is_not_finite_leaves_the_statistics(rng: np.random.Generator) -> None:
    x, y = some(rng)
    x[2, 3] = np.nan
    model = classifier("LSTM", "batch")
    before = bits(model)
    with pytest.raises(pn.PortnormError, match="the loss is nan after 0 updates; look for NaN"):
        pn.fit(model, x, y)
    assert bits(model) == before


def test_an_early_stop_ends_with_the_best(rng: np.random.Generator) -> None:
    """Of labels by chance: the parameters are those of the best epoch, as a run of so many epochs ends with them."""
    x, y = some(rng)
    model = classifier("LSTM", "batch-input")
    how: Any = {"batch": 3, "optimizer": pn.Adam(0.1), "validation": (*some(rng), LENGTHS)}
    history = pn.fit(model, x, y, epochs=50, patience=3, **how)
    assert history.stopped
    assert history.best_epoch is not None
    assert len(history.validation) == len(history.epochs) == history.best_epoch + 3 < 50
    until = classifier("LSTM", "batch-input")
    pn.fit(until, x, y, epochs=history.best_epoch, **how)
    assert bits(until) == bits(model)


@pytest.mark.parametrize("xp", [None, pytest.param("torch", marks=pytest.mark.peers), "array_api_strict"])
def test_targets_may_be_a_list(xp: Any, rng: np.random.Generator) -> None:
    """Of numbers, of scalars, and of arrays of one shape."""
    model = classifier(xp=xp)
    x, y = some(rng)
    array = model.xp.asarray
    found = []
    for targets in (array(y), y.tolist(), [*y]):
        model = classifier(xp=xp)
        pn.fit(model, array(x), targets, epochs=1)
        found.append(bits(model))
    assert found[1] == found[2] == found[0]
    rows = [array(row) for row in np.eye(CLASSES, dtype="float32")[y]]
    assert pn.fit(classifier(xp=xp), array(x), rows, epochs=1).losses


@pytest.mark.parametrize("xp", [None, pytest.param("torch", marks=pytest.mark.peers), "array_api_strict"])
@pytest.mark.parametrize("each", [False, True])
def test_one_number_of_each_needs_no_axis(each: bool, xp: Any, rng: np.random.Generator) -> None:
    """(cases,) is (cases, 1) to a model that gives (cases, 1), and so at each step: in training, in validation, with weights."""
    x, numbers = some(rng)[0], rng.standard_normal((STEPS, CASES) if each else CASES)
    found = []
    for y in (numbers, numbers[..., None]):
        layer = pn.GRU(FEATURES, 4, return_sequences=each, xp=xp, rng=0)
        model = pn.Sequential(layer, pn.Linear(4, 1, xp=xp, rng=1))
        array = model.xp.asarray
        given, weights = (array(x), array(y.astype("float32")), LENGTHS), array(np.linspace(0.5, 2.0, CASES, dtype="float32"))
        found.append((pn.fit(model, *given, weights=weights, epochs=1, batch=4, validation=(*given, weights)), bits(model)))
    assert found[0] == found[1]


def test_a_history_says_itself_in_a_line(rng: np.random.Generator) -> None:
    x, y = some(rng)
    assert repr(History()) == "History: no epoch yet, 0 updates"
    history = pn.fit(classifier(), x, y, batch=3, epochs=60, optimizer=pn.Adam(0.3), validation=some(rng), patience=2)
    line, count, best = str(history), len(history.epochs), history.best_epoch
    assert best is not None
    assert line.startswith(
        f"History: {count} epochs of {3 * count} updates in all, loss {history.epochs[0]:.4g} → {history.epochs[-1]:.4g}"
    )
    assert line.endswith(f", lowest after epoch {best} ({min(history.validation):.4g}); stopped early")
    assert len(line) < 200
    assert repr(pn.fit(classifier(), x, y, epochs=1)).count("→") == 0
    for field in (*vars(history), "best_epoch"):
        assert f"`{field}`:" in (History.__doc__ or ""), field


def test_every_case_is_in_every_epoch_once(rng: np.random.Generator) -> None:
    x, y = some(rng)
    x[:, :, 0] = np.arange(CASES)
    seen: list[Any] = []
    model = classifier(norm=None)
    vjp = model.vjp
    model.vjp = lambda x, *args, **kw: (seen.append(x[0, :, 0]), vjp(x, *args, **kw))[1]  # type: ignore[method-assign]
    pn.fit(model, x, y, epochs=2, batch=4)
    assert [len(a) for a in seen] == [3] * 6
    for half in (seen[:3], seen[3:]):
        assert sorted(np.concatenate(half)) == [*range(CASES)]
    assert not np.array_equal(np.concatenate(seen[:3]), np.concatenate(seen[3:]))
    seen.clear()
    pn.fit(model, x, y, epochs=1, batch=4, whole_batches=True)
    assert [len(a) for a in seen] == [4, 4]


def test_a_model_without_time_and_a_loss_of_ones_own(rng: np.random.Generator) -> None:
    from portnorm.op import op

    @op
    def absolute_error(y: Any, target: Any) -> Any:
        return np.mean(np.abs(y - target)), (y, target)

    @absolute_error.backward
    def _(residuals: Any, dy: Any) -> Any:
        y, target = residuals
        return dy * np.sign(y - target) / y.size, None

    x = rng.standard_normal((20, 3)).astype("float32")
    y = x @ np.float32([[1.0], [2.0], [-1.0]])
    model = pn.Sequential(pn.BatchNorm(3), pn.Linear(3, 1, rng=0))
    history = pn.fit(model, x, y, loss=absolute_error, optimizer=pn.Adam(0.05), epochs=60, batch=10)
    assert history.epochs[-1] < 0.2 * history.epochs[0]


@pytest.mark.peers
def test_what_is_not_computed_yet_is_named() -> None:
    import dask.array as da

    with pytest.raises(pn.UnsupportedError, match=r"`x` is an array whose values cannot be looked at yet .*x.compute\(\)"):
        pn.fit(classifier(xp=da), da.asarray(X), da.asarray(Y))


@pytest.mark.peers
def test_parameters_that_torch_records_are_trained_without_its_graph(rng: np.random.Generator) -> None:
    import torch

    model = classifier(xp=torch)
    for p in model.parameters().values():
        p.requires_grad_()
    x, y = some(rng)
    pn.fit(model, torch.tensor(x), torch.tensor(y), epochs=1)
    assert not any(p.requires_grad for p in model.parameters().values())


X, Y = np.zeros((STEPS, CASES, FEATURES), "float32"), np.zeros(CASES, int)
EACH = pn.Sequential(pn.GRU(FEATURES, 4, rng=0), pn.Linear(4, CLASSES, rng=0))
REFUSED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "no layer": ((print, X, Y), {}, pn.UnsupportedError, "`model` is a builtin_function_or_method"),
    "no epochs": ((None, X, Y), {"epochs": 0}, pn.UnsupportedError, "`epochs` is 0; expected at least 1"),
    "no batch": ((None, X, Y), {"batch": 0}, pn.UnsupportedError, "`batch` is 0"),
    "x is none": ((None, "x", Y), {}, pn.UnsupportedError, "`x` is a str; expected an array"),
    "no y": ((None, X, None), {}, pn.UnsupportedError, "`y` is None"),
    "no cases": ((None, X[:, :0], Y[:0]), {}, pn.UnsupportedError, r"`x` \(6, 0, 3\) has no cases"),
    "an empty list": ((None, [], []), {}, pn.UnsupportedError, "`x` is empty"),
    "features of a sequence": ((None, [X[:, 0], X[:, 1, :2]], Y[:2]), {}, pn.ShapeError, r"`x\[1\]` has shape \(6, 2\)"),
    "dtype of a sequence": ((None, [X[:, 0], X[:, 1].astype(float)], Y[:2]), {}, pn.DTypeError, r"`x\[1\]` has dtype float64"),
    "lengths of a list": ((None, [X[:, 0]], Y[:1], [6]), {}, pn.UnsupportedError, "`lengths` is given beside a list of sequences"),
    "targets of a list": ((EACH, [X[:, 0]], [Y[:5]]), {}, pn.ShapeError, r"`y\[0\]` has shape \(5,\); expected as many steps as `x\[0\]`"),
    "too few targets": ((None, X, Y[:5]), {}, pn.ShapeError, r"`y` has shape \(5,\); expected \(9, …\): one target for each case"),
    "targets of each step for the last": (
        (None, X, X[..., 0].astype(int)),
        {},
        pn.ShapeError,
        r"`y` has shape \(6, 9\); expected \(9, …\)",
    ),
    "a target for each step": ((EACH, X, Y), {}, pn.ShapeError, r"`y` has shape \(9,\); expected \(6, 9, …\): as many steps"),
    "width of targets": (
        (None, X, np.zeros((CASES, 2))),
        {},
        pn.ShapeError,
        r"`y` has shape \(9, 2\) and dtype float64; expected \(9, 3\) for a model that gives \(9, 3\)$",
    ),
    "a column of classes": ((None, X, Y[:, None]), {}, pn.ShapeError, r"`y` has shape \(9, 1\) .*; expected \(9,\) .*y\[\.\.\., 0\]"),
    "classes that are one-hot": ((None, X, np.eye(3, dtype=int)[Y]), {}, pn.ShapeError, r"`y` has shape \(9, 3\) .*y\.argmax\(-1\)"),
    "classes as floats": ((None, X, Y * 1.0), {}, pn.ShapeError, r"`y` has shape \(9,\) and dtype float64; .*\(9, 3\); .*y\.astype\(int\)"),
    "classes of each step as floats": (
        (EACH, X, X[..., 0]),
        {},
        pn.ShapeError,
        r"`y` has shape \(6, 9\) .*; expected \(6, 9, 3\) .*; .*y\.astype\(int\)",
    ),
    "classes as floats to validate with": (
        (None, X, Y),
        {"validation": (X[:, :5], Y[:5] * 1.0)},
        pn.DTypeError,
        r"^`validation y` has dtype float64; expected integers.*y\.astype\(int\)",
    ),
    "numbers to validate with": (
        (None, X, np.zeros((CASES, 3))),
        {"validation": (X[:, :5], np.zeros(5))},
        pn.ShapeError,
        r"^`validation y` has shape \(5,\) and dtype float64; expected \(5, 3\)",
    ),
    "a label to validate with": (
        (None, X, Y),
        {"validation": (X[:, :5], np.array([0, 1, 2, 0, 7]))},
        pn.ShapeError,
        r"^`validation y` has the label 7 at \(4,\)",
    ),
    "a label among those that are held out": (
        (None, X, Y + 3 * (np.arange(CASES) == 3)),
        {"validation": 0.5},
        pn.ShapeError,
        r"^`y` has the label 3 at \(3,\)",
    ),
    "dtype of x to validate with": (
        (None, X, Y),
        {"validation": (X.astype(float), Y)},
        pn.DTypeError,
        "^in `validation`: `x` has dtype float64",
    ),
    "lengths to validate with": ((None, X, Y), {"validation": (X, Y, [7] * 9)}, pn.ShapeError, "^in `validation`: `lengths` reach from 7"),
    "sequences to validate with": (
        (None, X, Y),
        {"validation": ([X[:, 0], X[:, 1, :2]], Y[:2])},
        pn.ShapeError,
        r"^`validation x\[1\]` has shape \(6, 2\)",
    ),
    "a label": ((None, X, Y + 3 * (np.arange(CASES) == 3)), {}, pn.ShapeError, r"`y` has the label 3 at \(3,\); expected 0 to 2"),
    "a negative label": ((None, X, Y - 1), {}, pn.ShapeError, r"`y` has the label -1 at \(0,\)"),
    "words for labels": ((None, X, ["a"] * CASES), {}, pn.DTypeError, "`y` has dtype <U1; expected real numbers"),
    "targets of each step in a list for the last": (
        (None, X, [np.zeros(n) for n in LENGTHS]),
        {},
        pn.ShapeError,
        r"`y` has arrays of the shapes \(1,\), \(2,\), .*; expected one shape",
    ),
    "lists of different length": ((None, X, [[0.0] * n for n in LENGTHS]), {}, pn.DTypeError, "`y` makes no array"),
    "truth values": ((None, X, Y == 0), {}, pn.DTypeError, "`y` has dtype bool"),
    "floats for classes": (
        (None, X, Y * 1.0),
        {"loss": pn.softmax_cross_entropy},
        pn.DTypeError,
        "`y` has dtype float64; expected integers",
    ),
    "a function for a loss": ((None, X, Y), {"loss": np.mean}, pn.UnsupportedError, "`loss` is"),
    "weights": ((None, X, Y), {"weights": np.ones((STEPS, CASES))}, pn.ShapeError, r"`weights` has shape \(6, 9\); expected \(9,\)"),
    "a sequence without steps": ((None, X, Y, [6] * 8 + [0]), {}, pn.UnsupportedError, "`lengths` has 0 at 8: a sequence without a step"),
    "lengths": ((None, X, Y, [7] * 9), {}, pn.ShapeError, "`lengths` reach from 7 to 7"),
    "dtype of x": ((None, X.astype(float), Y), {}, pn.DTypeError, "`x` has dtype float64 but the layer has"),
    "patience alone": ((None, X, Y), {"patience": 2}, pn.UnsupportedError, "`patience` is given without `validation`"),
    "all held out": ((None, X, Y), {"validation": 1.0}, pn.UnsupportedError, "`validation` is 1 of 9 cases, which is 9"),
    "none held out": ((None, X, Y), {"validation": 0.01}, pn.UnsupportedError, "`validation` is 0.01 of 9 cases, which is 0"),
    "validation of one": ((None, X, Y), {"validation": (X,)}, pn.UnsupportedError, "`validation` has 1 parts"),
    "validation that does not fit": ((None, X, Y), {"validation": (X, Y[:3])}, pn.ShapeError, "`validation y` has shape"),
    "resume of nothing": ((None, X, Y), {"resume": True}, pn.UnsupportedError, "`resume` is True without `checkpoint`"),
    "checkpoint nowhere": ((None, X, Y), {"checkpoint": "no/such/run"}, pn.UnsupportedError, "there is no directory 'no/such'"),
    "checkpoint of a directory": ((None, X, Y), {"checkpoint": "tests"}, pn.UnsupportedError, "which is a directory"),
    "whole batches": ((None, X, Y), {"batch": 10, "whole_batches": True}, pn.UnsupportedError, "`batch` is 10; expected 1 to 9"),
    "noise of what learns": ((classifier(learned_state=True), X, Y), {"state_noise": 0.1}, pn.UnsupportedError, "`learned_state`"),
    "NaN to validate with": (
        (None, X, Y),
        {"validation": (X + np.float32("nan"), Y), "optimizer": pn.SGD(0.0)},
        pn.PortnormError,
        "the validation loss is nan after epoch 1",
    ),
    "steps in another order": (
        (pn.Sequential(pn.GRU(FEATURES, 4, direction="backwards", rng=0), pn.Linear(4, CLASSES, rng=0)), X, X[..., 0].astype(int)),
        {},
        pn.UnsupportedError,
        "`model` gives the last step of `x` first",
    ),
    "NaN": ((None, X + np.float32("nan"), Y), {}, pn.PortnormError, "the loss is nan after 0 updates"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_fit_refuses(name: str) -> None:
    given, how, kind, message = REFUSED[name]
    model = given[0] or classifier()
    before = bits(model) if isinstance(model, pn.Layer) else None
    with pytest.raises(kind, match=message):
        pn.fit(model, *given[1:], progress=False, **how)
    assert before is None or bits(model) == before


def test_progress_is_shown_on_a_terminal_after_a_while(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By rich, or in a plain line without it; nothing where standard error is no terminal."""

    def shown(terminal: bool, rich: bool, patience: float) -> str:
        monkeypatch.setattr(progress_module, "PATIENCE", patience)
        monkeypatch.setattr(progress_module.sys.stderr, "isatty", lambda: terminal, raising=False)
        monkeypatch.setattr(progress_module.importlib.util, "find_spec", lambda name: object() if rich else None)
        with progress_module.ProgressLine("training") as line:
            for k in range(3):
                line(k + 1, 3, 0.25)
        found: str = capsys.readouterr().err
        return found

    for variable in ("TERM", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(variable, raising=False)
    assert "training: 3 of 3, loss 0.250" in shown(True, False, 0.0)
    assert "loss 0.250" in shown(True, True, 0.0)
    assert shown(True, False, 9.0) == shown(True, True, 9.0) == ""
    assert shown(False, False, 0.0) == shown(False, True, 0.0) == ""


def test_the_page_about_training_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parent.parent / "docs" / "training.md"
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)
    assert {p.name for p in tmp_path.iterdir()} == {"run.safetensors", "own.safetensors"}
    assert names["run"].step == 40
    assert min(names["history"].losses) > 0


def test_scikit_learn_around_an_estimator() -> None:
    folder = Path(__file__).parent.parent / "docs" / "examples"
    names = runpy.run_path(str(folder / "sklearn_training.py"))
    net, forest = names["main"](tries=2, epochs=15)
    assert net > forest + 0.1


def test_the_demonstration_waits_for_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that come while a net is trained round otherwise than the definitions: no two runs would give the same bits."""
    warmed: list[Any] = []

    def train(model: pn.Layer, *_: Any, **__: Any) -> Any:
        assert warmed == [(model,)]
        raise KeyboardInterrupt

    monkeypatch.setattr(warming, "warm", lambda *layers: warmed.append(layers))
    monkeypatch.setattr(demo, "train", train)
    with pytest.raises(KeyboardInterrupt):
        demo._train_one("LN-LSTM", demo.Budget(), None)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("size", [1e-8, 1.0, 1e6])
def test_weights_of_targets_have_no_size_whatever_the_type_of_targets(size: float, dtype: str, rng: np.random.Generator) -> None:
    """They are divided by their sum, which float16 would make 0 or infinite."""
    x, y = rng.standard_normal((5, 8, 3), np.float32), rng.standard_normal((8, 1)).astype(dtype)
    models: list[Any] = [pn.Sequential(pn.GRU(3, 4, return_sequences=False, rng=0), pn.Linear(4, 1, rng=1)) for _ in range(2)]
    losses = [
        pn.fit(model, x, y, weights=weights, epochs=2, progress=False).epochs
        for model, weights in zip(models, (np.full(8, size, np.float32), np.ones(8, np.float32)), strict=True)
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert losses[0][0] > losses[0][1] > 0
