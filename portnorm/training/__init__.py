"""Training in any array library: `fit`, the parts that it is made of for a loop of one's own, and the classifier of the demonstration.

`portnorm.fit(model, x, y)` is the door. A loop of one's own is `portnorm.Training` and a layer's `vjp`; see docs/training.md.
"""

from __future__ import annotations

from portnorm.checkpoint.training import Training
from portnorm.training.cases import Cases, pad_sequences
from portnorm.training.classifier import accuracy, classifier, loss_and_gradients, predictions, train
from portnorm.training.history import History
from portnorm.training.loop import Progress, fit
from portnorm.training.predict import predict
from portnorm.training.targets import evaluate

__all__ = [
    "Cases",
    "History",
    "Progress",
    "Training",
    "accuracy",
    "classifier",
    "evaluate",
    "fit",
    "loss_and_gradients",
    "pad_sequences",
    "predict",
    "predictions",
    "train",
]
