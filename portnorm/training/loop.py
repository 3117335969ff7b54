"""`fit`: epochs of shuffled batches, validation, early stop, checkpoints, on arrays of any library, by a model's own backward pass."""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy

from portnorm.arrays import constant, to_numpy
from portnorm.checkpoint.layers import save
from portnorm.checkpoint.training import Training
from portnorm.errors import PortnormError, UnsupportedError
from portnorm.layers.initial import Generator
from portnorm.layers.layer import Layer
from portnorm.layers.recurrent import Recurrent
from portnorm.optimizers import Adam, Optimizer
from portnorm.scalars import real_number, switch, whole_number
from portnorm.training.cases import Cases, parts, told_of_argument
from portnorm.training.history import History
from portnorm.training.progress import ProgressLine
from portnorm.training.resumed import Kept, RunFile, Told, resumed, told_of
from portnorm.training.targets import Loss, check_targets, evaluate, loss_of
from portnorm.training.update import update

Progress = Callable[[int, int, float], None]
"""Called after each update with the updates done, the updates in all, and the loss."""


def fit(
    model: Layer,
    x: Any,
    y: Any,
    lengths: Any = None,
    *,
    weights: Any = None,
    loss: Loss | None = None,
    optimizer: Optimizer | None = None,
    epochs: int = 10,
    batch: int = 32,
    whole_batches: bool = False,
    clip: float | None = 1.0,
    validation: tuple[Any, ...] | float | None = None,
    patience: int | None = None,
    state_noise: float = 0.0,
    rng: int | Generator | None = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool | Progress = True,
) -> History:
    """Train `model` in place on shuffled batches, by its own backward pass, and say what was measured.

    θ ← optimizer(θ, clip(∂ loss(model(x), y) / ∂θ)) for each batch.

    `x` is (time, cases, features), or (cases, time, features) with `batch_first`, with `lengths` (cases,); or a list of arrays (time,
    features) of different length, which are padded. A model without a recurrent layer takes (cases, …). `y` has a target for each case,
    (cases,) or (cases, targets), where the model gives one result for a sequence (`return_sequences=False`); else a target for each step,
    (time, cases) or (time, cases, targets) in the order of `x`, or a list as `x`. Integers are classes, without an axis for them; numbers
    need none for targets where the model gives just one. Padding enters neither a result nor the loss. `weights`
    (cases,), for targets of each step also (time, cases), say how much a target counts; 0 leaves it out, as does the label −100. `loss` is
    an Op of result, target and weights: unless stated `softmax_cross_entropy` for integers `y`, else `mean_squared_error`. `optimizer` is
    `Adam(1e-3)` unless stated; `clip` is the largest global norm of a gradient. An epoch has as few batches of at most `batch` cases as it
    takes, as even as they can be; with `whole_batches` all have just `batch`, and the few cases over are left out of that epoch.

    `validation` is a tuple of arguments, `(x, y)`, `(x, y, lengths)` or with weights, or the part of the cases that is held out (0.1).
    With `patience` training stops when its loss was not lowest for so many epochs, and ends with the parameters of the epoch in which it
    was, also where the epochs ran out. Batch normalization ends with population statistics (`Layer.estimate_population`); `state_noise` is
    the standard deviation of the initial h in training, for batch normalization of each step (see `LSTM.initial_state`).

    `rng`, a seed or a NumPy generator, gives the order of cases, dropout and noise: the same seed, the same numbers, on one machine with
    the same versions. Kernels that are compiled in the background round differently from the definitions, which compute until they are
    there; `portnorm.warm(model)` beforehand waits for them. After each epoch `checkpoint` is written, a `portnorm.Training`, complete or
    not at all. `portnorm.load` gives the model of that file: of a run that has ended the very one that `fit` leaves, of any other that of
    the best epoch so far with `patience`, else that of the last. With `resume` a run whose file is there goes on after its last epoch up to
    `epochs`, and ends with the very numbers of one that was not stopped. The file of another run is a `CheckpointError` that names what
    differs: the model, a setting, a rate of the optimizer, `rng`, or the numbers in `x`, `y`, `lengths`, `weights` and `validation`, of
    which checksums are kept. `epochs` and `patience` may be larger than before, `rng=None` goes on with the generator of the file, and
    functions (a schedule, a loss of one's own) are in no file and are taken as they are given: `lr=lambda step: …` changes a rate on the
    way. `progress` is True for a line on a terminal after two seconds, False, or a function of the updates done, the updates in all, and
    the loss.

    Arrays may be of any library that computes at once (NumPy, torch, JAX, array_api_strict, CuPy); parameters stay in it, on their device.
    Every update is computed by portnorm: for JAX's `jit`, torch's `compile` and their optimizers write the loop there (docs/training.md).
    Raises `ShapeError`, `DTypeError`, `UnsupportedError` before any work, and `PortnormError` where a loss or a gradient is not finite,
    before the update, so that the model is as the last one left it.

    >>> import numpy as np, portnorm as pn
    >>> rng = np.random.default_rng(0)
    >>> sequences = [rng.standard_normal((n, 1), dtype="float32") for n in rng.integers(3, 9, 64)]
    >>> rises = [int(s[-1, 0] > s[0, 0]) for s in sequences]
    >>> model = pn.Sequential(pn.GRU(1, 16, norm="layer", return_sequences=False, rng=0), pn.Linear(16, 2, rng=1))
    >>> history = pn.fit(model, sequences, rises, optimizer=pn.Adam(1e-2), epochs=30, validation=0.25, patience=10)
    >>> history.losses[0] > 0.6 and min(history.validation) < 0.5
    True
    """
    if not isinstance(model, Layer):
        raise UnsupportedError(f"`model` is a {type(model).__name__}; expected a layer of portnorm")
    epochs, batch = whole_number("epochs", epochs, 1), whole_number("batch", batch, 1)
    state_noise = real_number("state_noise", state_noise, 0.0, math.inf, "a number ≥ 0")
    _check_noise(model, state_noise)
    patience = None if patience is None else whole_number("patience", patience, 1)
    whole_batches, resume = switch("whole_batches", whole_batches), switch("resume", resume)
    progress = progress if callable(progress) else switch("progress", progress)
    if clip is not None:
        clip = real_number("clip", clip, 5e-324, math.inf, "a number > 0, or None")
    if patience is not None and validation is None:
        raise UnsupportedError("`patience` is given without `validation`, whose loss it is about")
    if resume and checkpoint is None:
        raise UnsupportedError("`resume` is True without `checkpoint`, the file of the run that was stopped")
    if checkpoint is not None:
        _check_place(checkpoint)
    cases = Cases.of(model, x, y, lengths, weights)
    chosen = loss_of(loss, cases)
    run = Training(model, optimizer or Adam(), rng=rng)
    params, buffers = {name: constant(p) for name, p in model.parameters().items()}, model.buffers  # of which no library records
    history: History = History()
    best: Kept | None = None
    told: Told = {}
    check_targets(model, cases, chosen)
    part = None if validation is None else _validation(model, cases, validation)
    if isinstance(part, Cases):
        check_targets(model, part, chosen)
    if checkpoint is not None:
        how = {"batch": batch, "whole_batches": whole_batches, "clip": clip, "state_noise": state_noise, "patience": patience}
        told = told_of(run, cases, part, **how, loss=chosen.name)
        if resume and Path(os.fspath(checkpoint)).exists():
            run, history, best, (params, buffers) = resumed(run, checkpoint, told, rng is None, epochs)
    cases, held_out = _held_out(cases, part, run)
    if whole_batches and batch > cases.count:
        raise UnsupportedError(f"`batch` is {batch}; expected 1 to {cases.count}, the number of cases, since `whole_batches` is True")
    model.assign(params, buffers)

    with contextlib.ExitStack() as stack:
        report = stack.enter_context(ProgressLine("training")) if progress is True else progress
        for epoch in range(len(history.epochs), epochs):
            if _is_over(history, patience):
                break
            order = run.rng.permutation(cases.count)
            orders = [order[k : k + batch] for k in range(0, len(order) - batch + 1, batch)] if whole_batches else parts(order, batch)
            for k, numbers in enumerate(orders):
                update(run, cases.take(numbers), chosen, clip, state_noise, history)
                if report:
                    report(epoch * len(orders) + k + 1, epochs * len(orders), history.losses[-1])
            history.epochs.append(float(numpy.mean(history.losses[-len(orders) :])))
            if held_out is not None:
                history.validation.append(evaluate(model, held_out, chosen, batch))
                if not math.isfinite(history.validation[-1]):
                    raise PortnormError(
                        f"the validation loss is {history.validation[-1]} after epoch {epoch + 1}; look for NaN in `validation`"
                    )
                if history.best_epoch == len(history.validation):
                    best = model.parameters(), dict(model.buffers)
            if checkpoint is not None:
                _save(run, checkpoint, told, history, best if patience is not None else None)
    history.stopped = _is_over(history, patience) and len(history.epochs) < epochs
    before = None if checkpoint is None else replace(run, model=model.copy(), rng=copy.deepcopy(run.rng))
    if patience is None:
        best = None
    if best is not None:
        model.assign(*best)
    _end_with_population(model, cases, batch, state_noise, run.rng)
    if before is not None:  # a run of more epochs goes on from here, while what it has come to is this model
        _save(before, checkpoint, told, history, best, (model.parameters(), dict(model.buffers)))
    return history


def _save(run: Training, path: Any, told: Any, history: History, best: Kept | None, result: Kept | None = None) -> None:
    """Write the run; what `load` gives of it is `result`, else the best so far, else the model as it is.

    Of the best epoch the buffers are noted too, which are population statistics in `result`; all of it where the file has other units.
    """
    noted = best if best is None or isinstance(path, RunFile) else best[1]
    run.notes = {**run.notes, "fit": told, "history": asdict(history), "best": noted}
    run.result = result or best
    if isinstance(path, RunFile):
        run.result = path.given(run.result or (run.model.parameters(), dict(run.model.buffers)))
    save(run, path)


def _end_with_population(model: Layer, cases: Cases, batch: int, noise: float, rng: Generator) -> None:
    """Population statistics of the training cases, where a layer that is trained keeps any."""
    keeping = [layer for layer in model.layers() if layer.buffers and not layer.evaluates and [*layer.layers()] == [layer]]
    if not keeping or model.evaluates:
        return

    def batches() -> Iterator[Any]:
        # At least as many cases in each as in training, so that the statistics of none are worse.
        for numbers in numpy.array_split(numpy.arange(cases.count), max(1, cases.count // batch)):
            part = cases.take(numbers)
            state = model.initial_state(part.count, noise=noise, rng=rng) if model.recurrent and noise else None
            yield part.x, part.lengths, state

    model.estimate_population(batches())


# -- what is checked before any work -------------------------------------------------------------------------------------------------------


def _check_noise(model: Layer, noise: float) -> None:
    if noise and not model.recurrent:
        raise UnsupportedError(f"`state_noise` is {noise}, but {type(model).__name__} has no recurrent layer")
    if noise and any(isinstance(layer, Recurrent) and layer.learned_state for layer in model.layers()):
        raise UnsupportedError(
            f"`state_noise` is {noise} for a layer with `learned_state`, which would not learn: the state that is given is no parameter"
        )


def _check_place(path: str | os.PathLike[str]) -> None:
    folder = Path(path).parent
    if not folder.is_dir():
        raise UnsupportedError(f"`checkpoint` is {os.fspath(path)!r}, and there is no directory {os.fspath(folder)!r}")
    if Path(path).is_dir():
        raise UnsupportedError(f"`checkpoint` is {os.fspath(path)!r}, which is a directory; expected a file such as run.safetensors")


def _validation(model: Layer, cases: Cases, given: Any) -> Cases | float:
    """Cases to validate with, or the share of those that are held out."""
    if isinstance(given, list | tuple):
        if not 2 <= len(given) <= 4:
            raise UnsupportedError(f"`validation` has {len(given)} parts; expected (x, y), (x, y, lengths) or (x, y, lengths, weights)")
        with told_of_argument("validation "):
            return Cases.of(model, *given, name="validation ")
    share = real_number("validation", given, 0.0, 1.0, "(x, y), (x, y, lengths), or a part of the cases such as 0.1")
    count = round(share * cases.count)
    if not 1 <= count < cases.count:
        raise UnsupportedError(
            f"`validation` is {share:g} of {cases.count} cases, which is {count}; expected one at least, and one to train on"
        )
    return share


def _held_out(cases: Cases, part: Cases | float | None, run: Training) -> tuple[Cases, Cases | None]:
    """Cases to train on and to validate with. Those that are held out are noted with the run, so that a resumed one has the same."""
    if not isinstance(part, float):
        return cases, part
    if "held_out" not in run.notes:
        run.notes["held_out"] = numpy.sort(run.rng.permutation(cases.count)[: round(part * cases.count)])
    held_out = to_numpy(run.notes["held_out"])
    return cases.take(numpy.setdiff1d(numpy.arange(cases.count), held_out)), cases.take(held_out)


def _is_over(history: History, patience: int | None) -> bool:
    best = history.best_epoch
    return patience is not None and best is not None and len(history.validation) - best >= patience
