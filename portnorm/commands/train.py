"""`portnorm train`: an LSTM and a linear layer, on the sequences of a file. Everything is checked before anything is computed."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy

import portnorm
from portnorm.cells.variants import IMPLEMENTATIONS, VARIANTS
from portnorm.commands.progress import ProgressLine
from portnorm.digits import Dataset, NumPyArray, sequential_digits
from portnorm.errors import PortnormError, UnsupportedError
from portnorm.files import require_place
from portnorm.layers.sequential import Sequential
from portnorm.optimizers import OPTIMIZERS
from portnorm.scalars import real_number, whole_number
from portnorm.sequence_files import read
from portnorm.training import History, classifier
from portnorm.training.resumed import Kept, RunFile

_NORMS = {**VARIANTS["LSTM"], **IMPLEMENTATIONS["LSTM"]}
_BATCH = 48
_RESULTS = {"held_out_accuracy": "test_accuracy", "held_out_mse": "mean_squared_error", "held_out_r2": "r_squared"}
"""What is measured in the end, by the names of the JSON."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="model to write (.safetensors); as --data it takes x (cases, time, features)"
    )
    parser.add_argument(
        "--data",
        default="digits",
        help="an .npz file with x (cases, time, features), y (cases,) and maybe lengths (cases,); integers in y are classes, "
        "floating-point numbers what a regression gives; a fifth of the cases is held out (default: digits, those of scikit-learn)",
    )
    parser.add_argument("--norm", default="layer", choices=[name or "none" for name in _NORMS], help="variant (default: layer)")
    parser.add_argument("--hidden", type=int, default=48, help="size of the hidden state (default: 48)")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the data (default: 10)")
    parser.add_argument("--batch", type=int, help=f"sequences of an update (default: {_BATCH}, or all where there are fewer)")
    parser.add_argument("--optimizer", default="adam", choices=list(OPTIMIZERS), help="how parameters are updated (default: adam)")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate (default: 0.01)")
    parser.add_argument("--clip", type=float, default=1.0, help="largest global norm of the gradient (default: 1)")
    parser.add_argument(
        "--state-noise",
        type=float,
        metavar="D",
        help="standard deviation of the first state in training (default: 0.1 with statistics of each step, else 0)",
    )
    parser.add_argument(
        "--patience",
        type=int,
        help="stop where the loss of the cases that are held out was not lowest for so many epochs, and keep the epoch where it was "
        "(default: all epochs, and the last is kept)",
    )
    parser.add_argument("--checkpoint", type=Path, help="file of the run, a .safetensors written after each epoch (default: none)")
    parser.add_argument("--resume", action="store_true", help="go on with the run of --checkpoint, where that file is there")
    parser.add_argument("--seed", type=int, default=0, help="of the first parameters and the order of the data (default: 0)")


class _Task(NamedTuple):
    """What is learned: classes, or numbers, which have mean 0 and standard deviation 1 while they are."""

    training: Dataset
    held_out: Dataset
    outputs: int
    mean: NumPyArray | None = None
    scale: NumPyArray | None = None

    @classmethod
    def of(cls, training: Dataset, held_out: Dataset) -> _Task:
        y = training.labels
        if y.dtype.kind == "i":
            return cls(training, held_out, 1 + int(max(y.max(), held_out.labels.max())))
        mean, scale = y.mean(axis=0), y.std(axis=0)
        scale = numpy.where(scale > 0, scale, 1.0)
        training, held_out = (part._replace(labels=((part.labels - mean) / scale).astype(numpy.float32)) for part in (training, held_out))
        return cls(training, held_out, y.shape[1], mean, scale)

    def measured(self, model: Sequential) -> dict[str, Any]:
        """What the model gives for the sequences that are held out, in inference mode."""
        targets = self.held_out.labels
        y = numpy.concatenate([model(x.swapaxes(0, 1), lengths=lengths)[0] for x, lengths in self.held_out.batches(500)])
        loss = float((portnorm.softmax_cross_entropy if self.scale is None else portnorm.mean_squared_error)(y, targets))
        if self.scale is None:
            return {"held_out_loss": loss, "held_out_accuracy": float(numpy.mean(numpy.argmax(y, axis=-1) == targets))}
        errors = (y.astype(numpy.float64) - targets) ** 2
        spread = ((targets - targets.mean(axis=0)) ** 2).sum(axis=0)
        r2 = float(numpy.mean(1 - errors.sum(axis=0) / spread)) if (spread > 0).all() else None
        return {"held_out_loss": loss, "held_out_mse": float((errors * self.scale**2).mean()), "held_out_r2": r2}

    def in_units(self, kept: Kept) -> Kept:
        """Parameters whose last layer gives numbers as they are in the file."""
        params, buffers = kept
        if self.scale is None:
            return kept
        weight, bias = (params[name].astype(numpy.float64) for name in ("1.weight", "1.bias"))
        scaled = {"1.weight": weight * self.scale[:, None], "1.bias": bias * self.scale + self.mean}
        return params | {name: a.astype(numpy.float32) for name, a in scaled.items()}, buffers


def run(options: argparse.Namespace) -> dict[str, Any]:
    _check_numbers(options)
    _check_places(options)
    task = _Task.of(*_dataset(options.data))
    count, (steps, _, inputs) = len(task.training.labels), task.training.x.shape
    options.batch = min(_BATCH, count) if options.batch is None else options.batch
    if options.batch > count:
        raise UnsupportedError(f"`--batch` is {options.batch}; expected 1 to {count}, the sequences that are not held out")
    model = classifier(_norm(options), inputs, options.hidden, task.outputs, steps, options.seed, batch_first=True)
    kind = "classes" if task.scale is None else "numbers (a regression, since y is of floating-point numbers)"
    _show(options, f"{count} sequences of {steps} steps and {inputs} features, {len(task.held_out.labels)} held out; {task.outputs} {kind}")
    rows, history = _trained(model, task, options)
    measured = task.measured(model) if options.patience is not None else rows[-1]
    found = {name: measured[key] for key, name in _RESULTS.items() if key in measured}
    model.assign(*task.in_units((model.parameters(), model.buffers)))
    portnorm.save(model, options.output)
    kept = "" if options.patience is None else f"epoch {history.best_epoch} of {len(rows)}, chosen by the cases that are held out; "
    _show(options, f"{options.output}: {kept}{_in_words({key: measured[key] for key in _RESULTS if key in measured})}")
    _show(options, f"it takes x (cases, time, {inputs}){', lengths (cases,)' if task.training.lengths is not None else ''}")
    return {
        "checkpoint": str(options.output),
        "takes": ["cases", "time", inputs],
        "task": "classification" if task.scale is None else "regression",
        **found,
        "loss": rows[-1]["loss"],
        **({} if options.patience is None else {"best_epoch": history.best_epoch}),
        "epochs": rows,
    }


def _show(options: argparse.Namespace, text: str) -> None:
    if not options.json:
        print(text, flush=True)


def _norm(options: argparse.Namespace) -> Any:
    return None if options.norm == "none" else options.norm


def _check_numbers(options: argparse.Namespace) -> None:
    for name in ("hidden", "epochs", "batch", "patience"):
        if getattr(options, name) is not None:
            whole_number(f"--{name}", getattr(options, name), 1)
    whole_number("--seed", options.seed, 0)
    for name in ("lr", "clip"):
        real_number(f"--{name}", getattr(options, name), 5e-324, math.inf if name == "clip" else 1.7e308, "a number > 0")
    if options.state_noise is not None:
        real_number("--state-noise", options.state_noise, 0.0, 1.7e308, "a number ≥ 0")


def _check_places(options: argparse.Namespace) -> None:
    require_place("--output", options.output, ".safetensors")
    if options.resume and options.checkpoint is None:
        raise UnsupportedError("`--resume` is given without `--checkpoint`, the file of the run that was stopped")
    if options.checkpoint is not None:
        require_place("--checkpoint", options.checkpoint, ".safetensors")
        if options.checkpoint.resolve() == options.output.resolve():
            raise UnsupportedError(f"`--checkpoint` and `--output` are both {str(options.output)!r}; expected two files")


def _dataset(name: str) -> tuple[Dataset, Dataset]:
    """Training data, and the fifth of it that is held out."""
    if name == "digits":
        return sequential_digits()
    whole = read(name)
    order = numpy.random.default_rng(0).permutation(len(whole.labels))
    held = max(1, len(order) // 5)
    return whole.take(order[held:]), whole.take(order[:held])


def _trained(model: Sequential, task: _Task, options: argparse.Namespace) -> tuple[list[dict[str, Any]], History]:
    """Train in place, and show a row for each epoch. Without patience that of the last is measured with what training ends with.

    The last few sequences of an epoch that do not fill a batch are left out of it.
    """
    data, held_out, progress = task.training, task.held_out, ProgressLine(options.json)
    each, rows, losses = len(data.labels) // options.batch, dict[int, dict[str, Any]](), list[float]()

    def row(epoch: int, loss: float, measured: dict[str, Any]) -> None:
        progress.clear()
        rows[epoch] = {"epoch": epoch, "loss": loss, **measured}
        _show(options, f"epoch {epoch:>3} of {options.epochs}  {_in_words(rows[epoch])}")

    def report(done: int, total: int, loss: float) -> None:
        losses.append(loss)
        progress(f"epoch {-(-done // each)} of {options.epochs}, update {done} of {total}, loss {loss:.3f}")
        if done % each == 0 and (done < total or options.patience is not None):
            row(done // each, float(numpy.mean(losses[-each:])), task.measured(model))

    noise = options.state_noise
    with numpy.errstate(all="ignore"):
        try:
            history = portnorm.fit(
                model,
                data.x.swapaxes(0, 1),
                data.labels,
                data.lengths,
                optimizer=OPTIMIZERS[options.optimizer](lr=options.lr),
                epochs=options.epochs,
                batch=options.batch,
                whole_batches=True,
                clip=options.clip,
                state_noise=(0.1 if _NORMS[_norm(options)].timed else 0.0) if noise is None else noise,
                validation=None if options.patience is None else (held_out.x.swapaxes(0, 1), held_out.labels, held_out.lengths),
                patience=options.patience,
                rng=options.seed,
                checkpoint=None if options.checkpoint is None else RunFile(options.checkpoint, task.in_units),
                resume=options.resume,
                progress=report,
            )
        except PortnormError as error:
            if type(error) is not PortnormError:
                raise
            raise PortnormError(f"{error}; `--lr` is {options.lr}") from error  # what is not finite
        last = len(history.epochs)
        if options.patience is None:
            row(last, history.epochs[-1], task.measured(model))
    before = {k: {"epoch": k, "loss": loss} for k, loss in enumerate(history.epochs, 1)}  # of a run that was taken up
    before |= {k: {**before[k], "held_out_loss": loss} for k, loss in enumerate(history.validation, 1)}
    return [rows.get(k, before[k]) for k in range(1, last + 1)], history


def _in_words(row: dict[str, Any]) -> str:
    """The numbers of a row, those of the sequences that are held out last."""
    written: dict[str, Callable[[Any], str]] = {
        "loss": lambda v: f"loss {v:.4g}",
        "held_out_loss": lambda v: f"held out: loss {v:.4g}",
        "held_out_accuracy": lambda v: f"accuracy {v:.1%}",
        "held_out_mse": lambda v: f"mean squared error {v:.4g}",
        "held_out_r2": lambda v: "R² –" if v is None else f"R² {v:.3f}",
    }
    return "  ".join(write(row[key]) for key, write in written.items() if key in row)
