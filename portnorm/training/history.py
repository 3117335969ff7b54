"""What a run of training has measured."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy


@dataclass(repr=False)
class History:
    """What training measured; `print` says it in a line.

    - `losses`: of every update the mean over its batch before it, with dropout and statistics of the batch; cross-entropy in nats.
    - `gradient_norms`: of every gradient its global norm before clipping; empty with `clip=None`.
    - `epochs`: the mean of the losses of every epoch.
    - `validation`: the loss of the validation cases after every epoch, in inference mode; empty without such cases.
    - `stopped`: whether it ended before all epochs, by `patience`.
    - `best_epoch`: that of the lowest validation loss, counted from 1.

    >>> from portnorm.training import History
    >>> History([1.2, 0.9, 0.7, 0.6], [2.0, 1.5, 1.1, 1.0], [1.05, 0.65], [0.8, 0.9])
    History: 2 epochs of 4 updates in all, loss 1.05 → 0.65, validation loss 0.8 → 0.9, lowest after epoch 1 (0.8)
    """

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    epochs: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    stopped: bool = False

    @property
    def best_epoch(self) -> int | None:
        """The epoch, counted from 1, after which the validation loss was lowest; `None` without validation."""
        return 1 + int(numpy.argmin(self.validation)) if self.validation else None

    def by_thirds(self) -> list[float]:
        """Mean loss at the end of each third of the budget: over its last tenth of all updates."""
        count = len(self.losses)
        ends = [max(1, round(count * k / 3)) for k in (1, 2, 3)]
        return [float(numpy.mean(self.losses[max(0, end - max(1, count // 10)) : end])) for end in ends]

    def __repr__(self) -> str:
        if not self.epochs:
            return f"History: no epoch yet, {len(self.losses)} updates"
        said = [f"{len(self.epochs)} epochs of {len(self.losses)} updates in all", f"loss {_course(self.epochs)}"]
        if self.best_epoch is not None:
            lowest = self.validation[self.best_epoch - 1]
            said += [f"validation loss {_course(self.validation)}", f"lowest after epoch {self.best_epoch} ({lowest:.4g})"]
        return f"History: {', '.join(said)}{'; stopped early' if self.stopped else ''}"


def _course(values: list[float]) -> str:
    """The first and the last."""
    return " → ".join(f"{value:.4g}" for value in (values[:1] if len(values) == 1 else (values[0], values[-1])))
