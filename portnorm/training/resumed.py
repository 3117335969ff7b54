"""A run of `fit` that is taken up again: what its file says of it, and whether it is the run that is asked for now."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy

from portnorm.arrays import Array, to_numpy
from portnorm.checkpoint.layers import load
from portnorm.checkpoint.training import Training, drawn_from, inside, settings
from portnorm.errors import CheckpointError
from portnorm.training.cases import Cases, NumPyArray
from portnorm.training.history import History
from portnorm.updates import Arrays

Kept = tuple[Arrays, Arrays]
"""Parameters and buffers of an epoch."""


class RunFile(os.PathLike[str]):
    """The file of a run whose model is trained in other units than it gives in the end: `load` gives of it what `given` makes of arrays."""

    def __init__(self, path: str | os.PathLike[str], given: Callable[[Kept], Kept]):
        self.path, self.given = path, given

    def __fspath__(self) -> str:
        return os.fspath(self.path)


Told = dict[str, Any]
"""What makes a run the one that it is, beside its model: settings, and checksums of what it is trained on."""


def told_of(run: Training, cases: Cases, validation: Any, **given: Any) -> Told:
    """What the file of a run that begins says of it; `validation` is a share, or cases, or `None`, and `given` are other settings."""
    own = {f"validation {name}": number for name, number in _checksums(validation).items()} if isinstance(validation, Cases) else {}
    return {
        **given,
        "validation": "cases of its own" if isinstance(validation, Cases) else validation,
        "cases": cases.count,
        "optimizer": settings(run.optimizer),
        "rng": _checksum_of_text(json.dumps(drawn_from(run.rng))),
        "data": {**_checksums(cases), **own},
    }


def resumed(run: Training, path: Any, told: Told, any_rng: bool, epochs: int) -> tuple[Training, History, Kept | None, Kept]:
    """The run of a file with the model and the optimizer that are given, what it measured, its best arrays, and those that it has now.

    `told` is what a new run would say; what the file says of its generator is put into it where any will do. Raises `CheckpointError`
    where it is another run.
    """
    model, name = run.model, os.fspath(path)
    old = load(path, xp=model.xp, device=model.device, training=True, optimizer=run.optimizer)
    if old.model.told() != model.told():
        raise CheckpointError(f"`checkpoint` {name!r} is of another model, {old.model!r}; expected {model!r}")
    if [layer.evaluates for layer in inside(old.model)] != [layer.evaluates for layer in inside(model)]:
        raise CheckpointError(
            f"`checkpoint` {name!r} is of a model of which other parts evaluate; call `eval` and `train` of them as before"
        )
    before = old.notes.get("fit")
    measured = old.notes.get("history")
    if not isinstance(before, dict) or not isinstance(measured, dict) or measured.keys() != asdict(History()).keys():
        raise CheckpointError(
            f"`checkpoint` {name!r} is of a run that `fit` did not write; go on by pn.load(…, training=True) and its update"
        )
    if missing := [key for key in told if key not in before]:
        raise CheckpointError(
            f"`checkpoint` {name!r} is of an older portnorm, which did not note `{missing[0]}`, so that nobody can tell whether it is this "
            "run; go on by pn.load(…, training=True) and its update, or train anew with another `checkpoint`"
        )
    if any_rng:
        told["rng"] = before["rng"]
    _require_same(f"`checkpoint` {name!r}", before, told)
    assert run.state is not None
    assert old.state is not None
    if _shape(old.state) != _shape(run.state):
        raise CheckpointError(f"`checkpoint` {name!r} has the state of another optimizer than {run.optimizer!r}")
    history = History(**measured)
    if len(history.epochs) > epochs:
        raise CheckpointError(f"`checkpoint` {name!r} is of a run of {len(history.epochs)} epochs; expected `epochs` of as many at least")
    best = old.notes.get("best")
    if isinstance(best, dict):  # the moving statistics of the best epoch alone, where `result` has those of the population
        best = (old.model.parameters() if old.result is None else old.result[0]), best
    taken_up = Training(model, run.optimizer, old.state, old.step, old.rng, old.notes)
    return taken_up, history, best, (old.model.parameters(), old.model.buffers)


def _require_same(name: str, before: Told, told: Told) -> None:
    for key, value in told.items():
        was = before[key]
        if key == "optimizer":
            _require_same_optimizer(name, was, value)
        elif key == "data":
            for what in {**value, **was}:
                if value.get(what) != was.get(what):
                    raise CheckpointError(f"{name} is of a run with other numbers in `{what}`; expected the same, or another `checkpoint`")
        elif key == "patience":
            if value is not None and (was is None or value < was):
                raise CheckpointError(f"{name} is of a run with `patience` {was}, which is {value} now; expected as much, more, or None")
        elif key == "rng":
            if was != value:
                raise CheckpointError(
                    f"{name} is of a run with another `rng`; expected the seed that it began with, or None to go on with the generator of "
                    "the file (one that was drawn from since is another)"
                )
        elif was != value:
            raise CheckpointError(f"{name} is of a run with `{key}` {was!r}, which is {value!r} now; expected the same")


def _require_same_optimizer(name: str, was: Any, now: Any) -> None:
    """The settings of an optimizer are those of the file; a function, which is in no file, may be in the place of a number."""
    if was["type"] != now["type"]:
        raise CheckpointError(f"{name} is of a run with the optimizer {was['type']}, which is {now['type']} now; expected the same")
    for key, value in now.get("config", {}).items():
        there = was.get("config", {}).get(key, "a function")
        if there != value:
            hint = "; a rate that changes on the way is a function of the updates before, lr=lambda step: …" if key == "lr" else ""
            raise CheckpointError(
                f"{name} is of a run with `{key}` of its optimizer {there}, which is {value} now; expected the same{hint}"
            )


def _shape(state: Any) -> Any:
    if isinstance(state, dict):
        return {name: _shape(branch) for name, branch in state.items()}
    return tuple(getattr(state, "shape", ()))


# -- checksums -----------------------------------------------------------------------------------------------------------------------------


def _checksums(cases: Cases) -> dict[str, str | None]:
    """Of every array. What stands behind the lengths is left out, since nothing of it enters a run."""
    there = None
    if cases.lengths is not None:
        there = numpy.arange(cases.x.shape[1 - cases.axis])[:, None] < to_numpy(cases.lengths)[None, :]
        there = there if cases.axis == 1 else there.T
    of_targets = there if cases.each_step else None
    of_weights = of_targets if cases.weights is not None and cases.weights.ndim == 2 else None
    return {
        "lengths": _checksum(cases.lengths),  # first, since others are looked at by them
        "x": _checksum(cases.x, there),
        "y": _checksum(cases.y, of_targets),
        "weights": _checksum(cases.weights, of_weights),
    }


def _checksum(array: Array | None, there: NumPyArray | None = None) -> str | None:
    if array is None:
        return None
    values = to_numpy(array)
    if there is not None:
        values = numpy.where(there.reshape(*there.shape, *(1 for _ in values.shape[2:])), values, values.dtype.type(0))
    kind = numpy.dtype(numpy.int64) if values.dtype.kind in "iu" else values.dtype
    values = numpy.ascontiguousarray(values, dtype=kind.newbyteorder("<"))
    found = hashlib.blake2b(f"{kind.name} {values.shape}".encode(), digest_size=16)
    found.update(values.reshape(-1).view(numpy.uint8).data)
    return found.hexdigest()


def _checksum_of_text(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
