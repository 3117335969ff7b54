"""Estimators of scikit-learn: its own checks, ragged sequences, and its tools around them."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.metrics import accuracy_score
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import estimator_checks_generator

import portnorm as pn
from portnorm.estimators import CELLS, SequenceClassifier, SequenceRegressor

Kind = type[SequenceClassifier] | type[SequenceRegressor]
KINDS: list[Kind] = [SequenceClassifier, SequenceRegressor]

CHECKED = [
    SequenceClassifier("gru", hidden_size=8, epochs=20, random_state=0),
    SequenceRegressor("gru", hidden_size=8, epochs=30, random_state=0),
    SequenceClassifier("rnn", norm="weight", hidden_size=4, epochs=20, patience=20, validation_fraction=0.2, random_state=0),
]


CHECKS = [pair for estimator in CHECKED for pair in estimator_checks_generator(estimator)]


@pytest.mark.parametrize(("estimator", "check"), CHECKS, ids=[f"{e}-{c.func.__name__}" for e, c in CHECKS])
def test_scikit_learns_own_checks(estimator: Any, check: Any) -> None:
    """None is expected to fail: a 2-D X is cases of one feature, with the columns that `fit` had."""
    check(estimator)


def ragged(count: int, rng: np.random.Generator, features: int = 2) -> list[Any]:
    return [rng.standard_normal((n, features)) for n in rng.integers(2, 9, count)]


def small(kind: Kind, **keywords: Any) -> Any:
    return kind(**{"cell": "gru", "hidden_size": 6, "epochs": 3, "random_state": 0} | keywords)


def targets(kind: Kind, X: Any) -> Any:
    sums = np.array([float(np.sum(s)) for s in X])
    return np.where(sums > 0, "up", "down") if kind is SequenceClassifier else sums


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("norm", [None, "layer", "batch", "batch-input", "weight"])
def test_every_cell_learns_to_count(kind: Kind, cell: str, norm: Any, rng: np.random.Generator) -> None:
    """One symbol up and another down: how far, or whether up at all. A third says nothing."""
    symbols = [rng.integers(0, 3, n) for n in rng.integers(2, 9, 240)]
    X = [np.eye(3)[s] for s in symbols]
    y = np.array([np.sum(s == 0) - np.sum(s == 1) for s in symbols])
    y = y > 0 if kind is SequenceClassifier else y * 1.0
    estimator = small(kind, cell=cell, norm=norm, hidden_size=16, epochs=25).fit(X[:180], y[:180])
    assert estimator.score(X[180:], y[180:]) > 0.8


@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_does_not_hang_on_the_sequences_beside_it(kind: Kind, rng: np.random.Generator) -> None:
    """Not on their number, order or length: what is padding for one is none for another."""
    X = ragged(30, rng)
    estimator = small(kind, dtype="float64").fit(X, targets(kind, X))
    ask = estimator.predict_proba if kind is SequenceClassifier else estimator.predict
    together = ask(X)
    np.testing.assert_allclose(np.concatenate([ask([s]) for s in X]), together, rtol=1e-12)
    np.testing.assert_allclose(ask(X[::-1])[::-1], together, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_forms_of_the_same_sequences(kind: Kind, rng: np.random.Generator) -> None:
    """An array of three axes, one of two, lists of arrays, of rows, and of plain numbers."""
    array = rng.standard_normal((20, 5))
    y = targets(kind, array)
    objects = np.empty(20, dtype=object)
    objects[:] = [*array[:, :, None]]
    forms: list[Any] = [objects, array[:, :, None], array, [*array[:, :, None]], [*array], array.tolist(), array[:, :, None].tolist()]
    found = [small(kind).fit(X, y).predict(forms[1]) for X in forms]
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])
    fitted = small(kind).fit(forms[1], y)
    for X in forms:
        np.testing.assert_array_equal(fitted.predict(X), found[0])


def test_the_number_of_columns_is_that_of_fit_and_a_list_is_free(rng: np.random.Generator) -> None:
    X, y = rng.standard_normal((20, 5)), np.arange(20) % 2
    fitted = small(SequenceClassifier).fit(X, y)
    assert fitted.n_features_in_ == 5
    with pytest.raises(ValueError, match="X has 3 features, but SequenceClassifier is expecting 5 features as input"):
        fitted.predict(X[:, :3])
    np.testing.assert_array_equal(fitted.predict([*X[:, :3], X[0, :2]])[:20], fitted.predict(X[:, :3, None]))
    of_lists = small(SequenceClassifier).fit([*X[:, :, None]], y)
    assert of_lists.n_features_in_ == 1
    assert of_lists.predict(X[:, :3]).shape == (20,)


@pytest.mark.parametrize("kind", KINDS)
def test_tools_of_scikit_learn(kind: Kind, rng: np.random.Generator) -> None:
    X = ragged(48, rng)
    y = targets(kind, X)
    halved = make_pipeline(FunctionTransformer(lambda sequences: [s / 2 for s in sequences]), small(kind))
    assert cross_val_score(halved, X, y, cv=3, error_score="raise").shape == (3,)
    assert len(cross_val_predict(small(kind), X, y, cv=3)) == 48
    name = kind.__name__.lower()
    search = GridSearchCV(halved, {f"{name}__norm": [None, "layer"], f"{name}__hidden_size": [3, 5]}, cv=2, error_score="raise")
    train, test, of_train, _ = train_test_split(X, y, random_state=0)
    search.fit(train, of_train)
    assert search.best_params_.keys() == {f"{name}__norm", f"{name}__hidden_size"}
    assert len(search.predict(test)) == len(test)
    twin = clone(small(kind, lr=0.5, norm=pn.VARIANTS["GRU"]["layer"]))
    assert twin.get_params()["lr"] == 0.5
    assert twin.set_params(norm="layer", epochs=1).fit(X, y).n_iter_ == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_state_gives_the_same_net(kind: Kind, rng: np.random.Generator) -> None:
    X = ragged(30, rng)
    y = targets(kind, X)
    first, second, other = (small(kind, recurrent_dropout=0.2, random_state=seed).fit(X, y) for seed in (1, 1, 2))
    thawed = pickle.loads(pickle.dumps(first))
    for name, a in first.model_.state_dict().items():
        np.testing.assert_array_equal(a, second.model_.state_dict()[name])
        np.testing.assert_array_equal(a, thawed.model_.state_dict()[name])
    np.testing.assert_array_equal(first.predict(X), thawed.predict(X))
    assert not np.array_equal(first.model_.parameters()["1.weight"], other.model_.parameters()["1.weight"])


def test_probabilities_and_labels_of_any_kind(rng: np.random.Generator) -> None:
    X = ragged(60, rng, 1)
    for labels in (["a", "b", "c"], [-1, 5, 7], [True, False, True]):
        y = np.array(labels)[np.arange(60) % 3]
        fitted = small(SequenceClassifier).fit(X, y)
        p = fitted.predict_proba(X)
        np.testing.assert_allclose(p.sum(axis=1), 1.0, rtol=1e-12)
        assert p.shape == (60, len(set(labels)))
        np.testing.assert_array_equal(fitted.predict(X), np.unique(labels)[p.argmax(axis=1)])
        assert fitted.score(X, y) == accuracy_score(y, fitted.predict(X))


@pytest.mark.parametrize("kind", KINDS)
def test_standardized_features_need_no_units(kind: Kind, rng: np.random.Generator) -> None:
    """Of sequences and of targets; a feature that never changes is none. The model that is left takes the standardized ones."""
    X = ragged(60, rng)
    y = targets(kind, X)
    units, shift = np.array([1e6, 1.0]), np.array([3e6, 0.0])
    moved = [s * units + shift for s in X]
    ours = small(kind, dtype="float64").fit(X, y)
    theirs = small(kind, dtype="float64").fit(moved, y if kind is SequenceClassifier else 1e3 * y - 5)
    if kind is SequenceClassifier:
        np.testing.assert_array_equal(ours.predict(X), theirs.predict(moved))
    else:
        np.testing.assert_allclose(1e3 * ours.predict(X) - 5, theirs.predict(moved), rtol=1e-6)
    constant = [np.concatenate([s, np.full((len(s), 1), 0.1)], axis=1) for s in X]
    assert small(kind).fit(constant, y).scale_[2] == 1.0
    x, lengths = pn.pad_sequences([(s - ours.mean_) / ours.scale_ for s in X])
    out = ours.model_(x, lengths=lengths)[0]
    if kind is SequenceClassifier:
        np.testing.assert_array_equal(ours.classes_[out.argmax(axis=1)], ours.predict(X))
    else:
        np.testing.assert_allclose(out[:, 0] * ours.target_scale_[0] + ours.target_mean_[0], ours.predict(X), rtol=1e-12)


def test_several_targets(rng: np.random.Generator) -> None:
    X = ragged(40, rng)
    y = np.stack([[s[:, 0].sum(), s[-1, 1]] for s in X])
    assert small(SequenceRegressor).fit(X, y).predict(X).shape == (40, 2)
    assert small(SequenceRegressor).fit(X, y[:, :1]).predict(X).shape == (40, 1)
    assert small(SequenceRegressor).fit(X, y[:, 0]).predict(X).shape == (40,)


def test_an_early_stop_holds_cases_out(rng: np.random.Generator) -> None:
    X = ragged(40, rng)
    fitted = small(SequenceClassifier, epochs=40, patience=2, lr=0.3).fit(X, np.arange(40) % 2)
    assert fitted.n_iter_ < 40
    assert len(fitted.history_.validation) == fitted.n_iter_


RAGGED = [np.ones((3, 2)), np.ones((4, 2)), np.ones((2, 2)), np.ones((3, 2))]
REFUSED: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "features": ([np.ones((3, 2)), np.ones((4, 3))], [0, 1], {}, r"X\[1\] has 3 features, but X\[0\] has 2"),
    "no steps": ([np.ones((3, 2)), np.ones((0, 2))], [0, 1], {}, r"X\[1\] has shape \(0, 2\): 0 steps"),
    "four axes": (np.ones((2, 2, 2, 2)), [0, 1], {}, "Found array with dim 4"),
    "a sequence of three axes": ([np.ones((2, 2, 2)), np.ones((2, 2))], [0, 1], {}, r"X\[0\] has shape \(2, 2, 2\)"),
    "NaN": ([np.ones((3, 2)), np.full((4, 2), np.nan)], [0, 1], {}, r"Input X\[1\] contains NaN"),
    "words": ([["a", "b"], ["c"]], [0, 1], {}, "could not convert string|dtype='numeric'"),
    "too few targets": (RAGGED, [0, 1], {}, "inconsistent numbers of samples"),
    "cell": (RAGGED, [0, 1, 0, 1], {"cell": "LSTM2"}, "`cell` is 'LSTM2'; expected one of 'lstm', 'gru', 'rnn'"),
    "norm": (RAGGED, [0, 1, 0, 1], {"norm": "layers"}, "`norm` is 'layers'"),
    "epochs": (RAGGED, [0, 1, 0, 1], {"epochs": 0}, "`epochs` is 0"),
    "lr": (RAGGED, [0, 1, 0, 1], {"lr": -1}, "`lr` is -1"),
    "held out": (
        RAGGED,
        [0, 1, 0, 1],
        {"patience": 1, "validation_fraction": 0.01},
        "`validation_fraction` is 0.01, which with n_samples=4",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit(name: str, kind: Kind) -> None:
    X, y, how, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        small(kind, **how).fit(X, y)


def test_sequences_of_other_features_than_fitted() -> None:
    fitted = small(SequenceClassifier).fit(RAGGED, [0, 1, 0, 1])
    with pytest.raises(ValueError, match=r"X\[0\] has 1 features, but SequenceClassifier is expecting 2"):
        fitted.predict([np.ones((3, 1)), np.ones((4, 1))])
