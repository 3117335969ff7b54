"""`portnorm train`: training on a file of sequences."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy

import portnorm
from portnorm.arrays import require_extra
from portnorm.cells.variants import IMPLEMENTATIONS, VARIANTS
from portnorm.digits import Dataset
from portnorm.errors import UnsupportedError
from portnorm.optimizers import OPTIMIZERS

_NORMS = {**VARIANTS["LSTM"], **IMPLEMENTATIONS["LSTM"]}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=Path, required=True, help="checkpoint to write (.safetensors)")
    parser.add_argument("--data", default="digits", help="`digits`, or an .npz file with x (cases, time, features), y, and maybe lengths")
    parser.add_argument("--norm", default="layer", choices=[name or "none" for name in _NORMS], help="variant (default: layer)")
    parser.add_argument("--hidden", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--optimizer", default="adam", choices=list(OPTIMIZERS))
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate (default: 0.01)")
    parser.add_argument("--clip", type=float, default=1.0, help="largest global norm of the gradient (default: 1)")
    parser.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> dict[str, Any]:
    from portnorm import training

    rich_progress = require_extra("rich.progress", "demo")
    data, held_out = _dataset(options.data)
    classes = int(max(data.labels.max(), held_out.labels.max())) + 1
    norm = None if options.norm == "none" else options.norm
    model = training.classifier(norm, data.x.shape[2], options.hidden, classes, data.x.shape[0], options.seed)
    with rich_progress.Progress(disable=options.json) as bars:
        task = bars.add_task(options.norm, total=None)
        history = training.train(
            model,
            data,
            OPTIMIZERS[options.optimizer](lr=options.lr),
            epochs=options.epochs,
            batch=options.batch,
            clip=options.clip,
            state_noise=0.1 if _NORMS[norm].timed else 0.0,
            seed=options.seed,
            progress=lambda done, total, loss: bars.update(task, completed=done, total=total, description=f"loss {loss:.3f}"),
        )
    portnorm.save(model, options.output)
    found = {"checkpoint": str(options.output), "test_accuracy": training.accuracy(model, held_out), "loss": history.by_thirds()[-1]}
    if not options.json:
        print(f"{options.output}: held-out accuracy {found['test_accuracy']:.1%}, training loss {found['loss']:.3f}")
    return found


def _dataset(name: str) -> tuple[Dataset, Dataset]:
    """Training data, and the fifth of it that is held out."""
    from portnorm.digits import sequential_digits

    if name == "digits":
        return sequential_digits()
    try:
        with numpy.load(name, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        x = numpy.ascontiguousarray(arrays["x"].astype(numpy.float32).transpose(1, 0, 2))
        whole = Dataset(x, arrays["y"].astype(numpy.int64), arrays.get("lengths"))
    except (OSError, KeyError, ValueError) as error:
        raise UnsupportedError(f"`--data` {name!r} is no .npz file with x (cases, time, features) and y (cases,): {error}") from error
    order = numpy.random.default_rng(0).permutation(len(whole.labels))
    held = max(1, len(order) // 5)
    return whole.take(order[held:]), whole.take(order[:held])
