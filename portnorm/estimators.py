"""Recurrent networks as estimators of scikit-learn: `SequenceClassifier` and `SequenceRegressor`, with its extra `sklearn`.

`X` is a list of arrays (time, features), which may differ in length, or an array (cases, time, features). A 2-D array is cases of one
feature: each row is a sequence, each column a step of it. As scikit-learn has it, `predict` takes as many columns as `fit` had; sequences
of any other length are given as a list, or as (cases, time, 1).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy

from portnorm.arrays import require_extra
from portnorm.cells.variants import NormName, Variant
from portnorm.layers.linear import Linear
from portnorm.layers.recurrent import GRU, LSTM, RNN, Recurrent
from portnorm.layers.sequential import Sequential
from portnorm.optimizers import AdamW
from portnorm.training.loop import fit
from portnorm.training.predict import predict

require_extra("sklearn", "sklearn")
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin  # noqa: E402
from sklearn.utils import check_array, check_random_state, column_or_1d  # noqa: E402
from sklearn.utils.multiclass import check_classification_targets  # noqa: E402
from sklearn.utils.validation import check_is_fitted, validate_data  # noqa: E402

NumPyArray = numpy.ndarray[Any, Any]

CELLS: dict[str, type[Recurrent]] = {"lstm": LSTM, "gru": GRU, "rnn": RNN}
"""By the names that `cell` takes."""


class _SequenceEstimator(BaseEstimator):  # type: ignore[misc]
    """What both share: the arguments, the net, and what `X` may be."""

    def __init__(
        self,
        cell: str = "lstm",
        *,
        norm: NormName | Variant | None = None,
        hidden_size: int = 32,
        num_layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        lr: float | Callable[[int], float] = 1e-2,
        weight_decay: float = 0.0,
        clip: float | None = 1.0,
        epochs: int = 50,
        batch_size: int = 32,
        validation_fraction: float = 0.1,
        patience: int | None = None,
        standardize: bool = True,
        dtype: str = "float32",
        random_state: Any = None,
        verbose: bool = False,
    ):
        self.cell = cell
        self.norm = norm
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bidirectional = bidirectional
        self.dropout = dropout
        self.recurrent_dropout = recurrent_dropout
        self.lr = lr
        self.weight_decay = weight_decay
        self.clip = clip
        self.epochs = epochs
        self.batch_size = batch_size
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.standardize = standardize
        self.dtype = dtype
        self.random_state = random_state
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if hasattr(self, "model_"):  # joblib may give arrays that lie in its file, which the kernels do not take
            self.model_.load_state_dict({name: numpy.array(a) for name, a in self.model_.state_dict().items()})

    def _fit(self, X: Any, y: NumPyArray, outputs: int) -> Self:
        sequences = self._sequences(X, fitting=True)
        if self.patience is not None and not 1 <= round(self.validation_fraction * len(sequences)) < len(sequences):
            raise ValueError(
                f"`validation_fraction` is {self.validation_fraction}, which with n_samples={len(sequences)} leaves none to validate with "
                "or none to train on; `patience` needs both"
            )
        if len(sequences) != len(y):
            raise ValueError(f"Found input variables with inconsistent numbers of samples: {[len(sequences), len(y)]}")
        steps = numpy.concatenate(sequences)
        self.mean_: NumPyArray
        self.scale_: NumPyArray
        self.mean_, self.scale_ = _spread(steps) if self.standardize else (numpy.zeros(steps.shape[1]), numpy.ones(steps.shape[1]))
        random = check_random_state(self.random_state)
        seeds = random.randint(numpy.iinfo(numpy.int32).max, size=3)
        net = self._net(outputs, max(map(len, sequences)), *map(int, seeds[:2]))
        # Kernels that come while it is trained would round otherwise than the definitions before them: not the same net for the same seed.
        importlib.import_module("portnorm_backends.cpu.warming").warm(net)
        self.history_ = fit(
            net,
            [self._scaled(s) for s in sequences],
            y,
            optimizer=AdamW(self.lr, weight_decay=self.weight_decay),
            epochs=self.epochs,
            batch=self.batch_size,
            clip=self.clip,
            validation=None if self.patience is None else self.validation_fraction,
            patience=self.patience,
            state_noise=0.1 if net.parts[0].timed else 0.0,  # type: ignore[attr-defined]
            rng=int(seeds[2]),
            progress=self.verbose,
        )
        self.model_ = net
        self.n_iter_ = len(self.history_.epochs)
        return self

    def _net(self, outputs: int, steps: int, *seeds: int) -> Sequential:
        if self.cell not in CELLS:
            raise ValueError(f"`cell` is {self.cell!r}; expected one of {', '.join(map(repr, CELLS))}")
        layer = CELLS[self.cell](
            len(self.mean_),
            self.hidden_size,
            norm=self.norm,
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            dropout=self.dropout,
            recurrent_dropout=self.recurrent_dropout,
            return_sequences=False,
            t_max=steps,
            dtype=self.dtype,
            rng=seeds[0],
        )
        return Sequential(layer, Linear(self.hidden_size * layer.num_directions, outputs, dtype=self.dtype, rng=seeds[1]))

    def _sequences(self, X: Any, *, fitting: bool = False) -> list[NumPyArray]:
        """A list of arrays (time, features) of numbers; raises `ValueError` and `TypeError` as scikit-learn does."""
        columns = False
        if isinstance(X, numpy.ndarray) and X.dtype == object and X.ndim == 1:
            X = [*X]
        if isinstance(X, list | tuple) and X and _is_ragged(X):
            sequences = [_sequence(s, k) for k, s in enumerate(X)]
        else:
            array = check_array(X, dtype="numeric", allow_nd=True, estimator=self, input_name="X")
            if array.ndim > 3:
                raise ValueError(f"Found array with dim {array.ndim}; expected (cases, time, features), or (cases, time) of one feature")
            columns = array.ndim == 2
            sequences = [*(array[:, :, None] if columns else array)]
        features = sequences[0].shape[1] if fitting else len(self.mean_)
        for k, s in enumerate(sequences):
            if not s.size:
                raise ValueError(f"X[{k}] has shape {s.shape}: 0 {'features' if len(s) else 'steps'}, while a minimum of 1 is required.")
            if s.shape[1] != features:
                whose = "X[0] has" if fitting else f"{type(self).__name__} is expecting"
                raise ValueError(f"X[{k}] has {s.shape[1]} features, but {whose} {features}")
        self._check_columns(X, columns, features, fitting)
        return sequences

    def _check_columns(self, X: Any, columns: bool, features: int, fitting: bool) -> None:
        """Keep, or compare, the number of columns and their names, as scikit-learn does; of other than 2-D arrays that of the features."""
        if fitting:
            self._columns = columns
            if not columns:
                self.__dict__.pop("feature_names_in_", None)
                self.n_features_in_ = features
        if columns and self._columns:
            validate_data(self, X, reset=fitting, skip_check_array=True)

    def _scaled(self, sequence: NumPyArray) -> NumPyArray:
        return ((sequence - self.mean_) / self.scale_).astype(self.dtype)

    def _outputs(self, X: Any) -> NumPyArray:
        """What the net gives for each sequence, in the order of `X`."""
        check_is_fitted(self)
        sequences = self._sequences(X)
        found: NumPyArray = predict(self.model_, [self._scaled(s) for s in sequences]).astype(numpy.float64)
        return found


class SequenceClassifier(ClassifierMixin, _SequenceEstimator):  # type: ignore[misc]
    """Classes of whole sequences by a recurrent net: its last hidden state, a linear layer, softmax; trained with `portnorm.fit`.

    `X` is a list of arrays (time, features), which may differ in length, or an array (cases, time, features), or (cases, time) of one
    feature; `y` (cases,) of labels of any kind. `cell` is `"lstm"`, `"gru"` or `"rnn"`, `norm` a row of its table or a `portnorm.Variant`
    (of a single feature `"layer"` keeps little but the sign, since it divides by its size); `lr` a number or a function of the number of
    updates before. With `patience` a part of the cases is held out, and training stops where the loss of these was not lowest for so many
    epochs. With `standardize` features have mean 0 and deviation 1 over all steps of the training sequences. After `fit` there are
    `model_`, a layer to be saved or exported, which takes standardized sequences (x − `mean_`) / `scale_`; `classes_`, `history_`,
    `n_iter_` (epochs) and `n_features_in_`. Raises as scikit-learn's estimators do.

    >>> import numpy as np
    >>> from portnorm.estimators import SequenceClassifier
    >>> from sklearn.model_selection import cross_val_score
    >>> rng = np.random.default_rng(0)
    >>> X = [np.sin(np.arange(n)[:, None] * (1 + k % 2)) for k, n in enumerate(rng.integers(8, 20, 60))]
    >>> y = ["slow", "fast"] * 30
    >>> classifier = SequenceClassifier("gru", hidden_size=8, epochs=40, random_state=0)
    >>> bool(cross_val_score(classifier, X, y, cv=3).min() > 0.9)
    True
    >>> classifier.fit(X, y).predict_proba(X[:2]).shape
    (2, 2)
    """

    def fit(self, X: Any, y: Any) -> Self:
        """Train a new net. The same `random_state`, the same net, as `portnorm.fit` says."""
        y = _targets(self, y)
        check_classification_targets(y)
        self.classes_, labels = numpy.unique(column_or_1d(y, warn=True), return_inverse=True)
        return self._fit(X, labels.astype(numpy.int64), len(self.classes_))

    def predict_proba(self, X: Any) -> NumPyArray:
        """(cases, classes), in the order of `classes_`."""
        logits = self._outputs(X)
        exponentials = numpy.exp(logits - logits.max(axis=1, keepdims=True))
        found: NumPyArray = exponentials / exponentials.sum(axis=1, keepdims=True)
        return found

    def predict(self, X: Any) -> NumPyArray:
        """(cases,): the most probable class."""
        logits = self._outputs(X)
        found: NumPyArray = self.classes_[numpy.argmax(logits, axis=1)]
        return found


class SequenceRegressor(RegressorMixin, _SequenceEstimator):  # type: ignore[misc]
    """Numbers for whole sequences by a recurrent net: its last hidden state and a linear layer, mean squared error.

    `y` is (cases,) or (cases, targets). Arguments and `X` as those of `SequenceClassifier`; with `standardize` targets too are trained with
    mean 0 and deviation 1, and predicted as they were given.

    >>> import numpy as np
    >>> from portnorm.estimators import SequenceRegressor
    >>> rng = np.random.default_rng(0)
    >>> X = [rng.standard_normal((n, 2)) for n in rng.integers(2, 9, 200)]
    >>> y = np.array([s[:, 0].sum() for s in X])
    >>> regressor = SequenceRegressor("gru", epochs=40, random_state=0).fit(X[:150], y[:150])
    >>> regressor.score(X[150:], y[150:]) > 0.9
    True
    """

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any) -> Self:
        """Train a new net. The same `random_state`, the same net, as `portnorm.fit` says."""
        y = check_array(_targets(self, y), ensure_2d=False, dtype="numeric", input_name="y", estimator=self).astype(numpy.float64)
        self._flat = y.ndim == 1
        y = y[:, None] if self._flat else y
        shape = numpy.zeros(y.shape[1]), numpy.ones(y.shape[1])
        self.target_mean_, self.target_scale_ = _spread(y) if self.standardize else shape
        return self._fit(X, ((y - self.target_mean_) / self.target_scale_).astype(self.dtype), y.shape[1])

    def predict(self, X: Any) -> NumPyArray:
        """(cases,) or (cases, targets), as `y` was."""
        found: NumPyArray = self._outputs(X) * self.target_scale_ + self.target_mean_
        return found[:, 0] if self._flat else found


def _targets(estimator: Any, y: Any) -> NumPyArray:
    if y is None:
        raise ValueError(f"{type(estimator).__name__} requires y to be passed, but the target y is None")
    found: NumPyArray = check_array(y, ensure_2d=False, dtype=None, input_name="y", ensure_min_samples=0)
    return found


def _spread(values: NumPyArray) -> tuple[NumPyArray, NumPyArray]:
    """Mean and deviation of each column; 1 for one that is constant."""
    values = values.astype(numpy.float64)
    mean, deviation = values.mean(axis=0), values.std(axis=0)
    rounding = len(values) * numpy.finfo(float).eps * numpy.abs(mean)
    return mean, numpy.where(deviation > rounding, deviation, 1.0)


def _is_ragged(X: Sequence[Any]) -> bool:
    """Whether the items are sequences that make no array together: of different lengths, or arrays with axes of their own."""
    return any(getattr(s, "ndim", 0) > 1 for s in X) or len({len(s) if hasattr(s, "__len__") else -1 for s in X}) > 1


def _sequence(s: Any, k: int) -> NumPyArray:
    array: NumPyArray = check_array(
        s, dtype="numeric", ensure_2d=False, allow_nd=True, ensure_min_samples=0, ensure_min_features=0, input_name=f"X[{k}]"
    )
    if array.ndim not in (1, 2):
        raise ValueError(f"X[{k}] has shape {array.shape}; expected (time, features), or (time,) of one feature")
    return array[:, None] if array.ndim == 1 else array
