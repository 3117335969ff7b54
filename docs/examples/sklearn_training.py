"""Which net, of which size, for how long? scikit-learn searches, with cross-validation, and says whether a net is needed at all.

The task: name the class of a noisy sine of 12 to 30 steps by its frequency. Run `python docs/examples/sklearn_training.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import classification_report
from sklearn.model_selection import RandomizedSearchCV, cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from portnorm.estimators import SequenceClassifier


def waves(count: int, rng: np.random.Generator) -> tuple[list[Any], Any]:
    """Sequences (time, 1) and which of three frequencies each has."""
    labels = rng.integers(0, 3, count)
    steps, phases = rng.integers(12, 31, count), rng.uniform(0, 2 * np.pi, count)
    x = [np.sin(np.arange(n) * (k + 1) * 0.3 + phase) for n, k, phase in zip(steps, labels, phases, strict=True)]
    return [(s + 0.3 * rng.standard_normal(len(s)))[:, None] for s in x], labels


def summaries(sequences: list[Any]) -> Any:
    """What a model without time can be told of each: mean, deviation, and how much one step changes."""
    return np.array([[s.mean(), s.std(), np.abs(np.diff(s[:, 0])).mean()] for s in sequences])


def main(tries: int = 4, epochs: int = 20) -> tuple[float, float]:
    """The accuracy of the best net on sequences that nothing has seen, and that of a forest of summaries."""
    X, y = waves(300, np.random.default_rng(0))
    seen, unseen, of_seen, of_unseen = train_test_split(X, y, test_size=100, stratify=y, random_state=0)

    forest = make_pipeline(FunctionTransformer(summaries), RandomForestClassifier(random_state=0))
    print(f"a random forest of three numbers of each sequence: {cross_val_score(forest, seen, of_seen, cv=3).mean():.1%}, cross-validated")

    choices = {"cell": ["lstm", "gru"], "norm": [None, "batch"], "hidden_size": [8, 16], "lr": [3e-3, 1e-2, 3e-2]}
    net = SequenceClassifier(epochs=epochs, random_state=0)
    search = RandomizedSearchCV(net, choices, n_iter=tries, cv=3, random_state=0, error_score="raise").fit(seen, of_seen)
    print(f"the best of {tries} nets: {search.best_score_:.1%}, cross-validated, with {search.best_params_}")
    print(classification_report(of_unseen, search.predict(unseen), target_names=["slow", "middle", "fast"]))

    best = search.best_estimator_
    print(best.model_.summary())  # a layer like any other: portnorm.save and portnorm.export take it
    return search.score(unseen, of_unseen), forest.fit(seen, of_seen).score(unseen, of_unseen)


if __name__ == "__main__":
    main()
