"""What a run of training has measured."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy


@dataclass
class History:
    """What training measured."""

    losses: list[float] = field(default_factory=list)
    """Of every update: the mean over its batch before it, with dropout and statistics of the batch; cross-entropy in nats."""
    gradient_norms: list[float] = field(default_factory=list)
    """Of every gradient before clipping; empty where nothing is clipped."""
    epochs: list[float] = field(default_factory=list)
    """The mean of the losses of every epoch."""
    validation: list[float] = field(default_factory=list)
    """The loss of the validation cases after every epoch, in inference mode; empty without such cases."""
    stopped: bool = False
    """Whether it ended before all epochs, since nothing got better any more."""

    @property
    def best_epoch(self) -> int | None:
        """The epoch, counted from 1, after which the validation loss was lowest; `None` without validation."""
        return 1 + int(numpy.argmin(self.validation)) if self.validation else None

    def by_thirds(self) -> list[float]:
        """Mean loss at the end of each third of the budget: over its last tenth of all updates."""
        count = len(self.losses)
        ends = [max(1, round(count * k / 3)) for k in (1, 2, 3)]
        return [float(numpy.mean(self.losses[max(0, end - max(1, count // 10)) : end])) for end in ends]
