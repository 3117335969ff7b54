"""`predict`: what a model gives for each case by itself, in the order of the cases, however they are batched and padded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import portnorm as pn
from tests.cases import LAYERS, PRESETS
from tests.conftest import Library
from tests.tolerances import RECURRENT, relative

LENGTHS = (5, 2, 7, 1, 2, 6)


def model(cell: str, norm: str | None, each: bool, batch_first: bool, **keywords: Any) -> pn.Sequential:
    settings = {"dtype": "float64", **keywords}
    layer = LAYERS[cell](3, 4, norm=norm, return_sequences=each, batch_first=batch_first, t_max=7, rng=0, **settings)
    return pn.Sequential(layer, pn.Linear(4, 2, rng=1, **settings))


def alone(net: pn.Layer, sequence: Any) -> Any:
    """The results of one sequence, without an axis of cases."""
    y = net(sequence[None] if net.batch_first else sequence[:, None])[0]
    return y[0] if net.batch_first or y.ndim == 2 else y[:, 0]


@pytest.mark.parametrize("batch", [2, 256])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_each_sequence_is_as_by_itself(cell: str, norm: str | None, each: bool, batch_first: bool, batch: int) -> None:
    rng = np.random.default_rng(0)
    net, sequences = model(cell, norm, each, batch_first), [rng.standard_normal((n, 3)) for n in LENGTHS]
    x, lengths = pn.pad_sequences(sequences, batch_first=batch_first)
    x = np.where(x == 0, np.nan, x)
    found, padded = pn.predict(net, sequences, batch=batch), pn.predict(net, x, lengths, batch=batch)
    if each:
        padded = padded if batch_first else padded.swapaxes(0, 1)
        assert isinstance(found, list)
    else:
        assert found.shape == (6, 2)
    for k, sequence in enumerate(sequences):
        expected = alone(net, sequence)
        for y in (found[k], padded[k][: len(sequence)] if each else padded[k]):
            np.testing.assert_allclose(y, expected, **relative("float64", RECURRENT))


def test_in_every_library(eager: Library, rng: np.random.Generator) -> None:
    """Of lists and of arrays; the results are of the library."""
    kind = eager.widest
    net, ours = (model("GRU", "layer", False, False, dtype=kind, xp=xp) for xp in (eager.xp, None))
    sequences = [rng.standard_normal((n, 3)).astype(kind) for n in (2, 1, 2)]
    found = pn.predict(net, [eager.array(s) for s in sequences], batch=2)
    assert type(found) is type(eager.array(sequences[0]))
    x, lengths = pn.pad_sequences(sequences)
    again = pn.predict(net, eager.array(x), lengths.tolist(), batch=2)
    for y in (found, again):
        np.testing.assert_allclose(eager.values([y])[0], pn.predict(ours, sequences), **relative(kind, RECURRENT))


def test_a_model_without_time(rng: np.random.Generator) -> None:
    net, x = pn.Linear(3, 2, rng=0), rng.standard_normal((9, 3), dtype="float32")
    np.testing.assert_allclose(pn.predict(net, x, batch=4), net(x), rtol=1e-6)


X = np.ones((5, 6, 3))
GRU, EACH, TURNED = model("GRU", None, False, False), model("GRU", None, True, False), pn.GRU(3, 4, direction="backwards", dtype="float64")
OBJECTS = np.empty(2, dtype=object)
OBJECTS[:] = [X[:, 0], X[:2, 0]]
REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "no layer": (lambda: pn.predict(print, X), pn.UnsupportedError, "`model` is a builtin"),  # type: ignore[arg-type]
    "no batch": (lambda: pn.predict(GRU, X, batch=0), pn.UnsupportedError, "`batch` is 0"),
    "nothing": (lambda: pn.predict(GRU, []), pn.UnsupportedError, "`x` is empty"),
    "no array": (lambda: pn.predict(GRU, "x"), pn.UnsupportedError, "`x` is a str"),
    "lists": (lambda: pn.predict(GRU, [[1.0], [2.0]]), pn.UnsupportedError, r"`x\[0\]` is a list"),
    "no cases axis": (lambda: pn.predict(GRU, X[0, 0]), pn.ShapeError, r"`x` has shape \(3,\)"),
    "features": (lambda: pn.predict(GRU, [X[:, 0], X[:, 0, :2]]), pn.ShapeError, r"`x\[1\]` has shape \(5, 2\)"),
    "dtype": (lambda: pn.predict(GRU, [X[:, 0].astype("float32")]), pn.DTypeError, "`x` has dtype float32 but the layer has float64"),
    "lengths of a list": (lambda: pn.predict(GRU, [X[:, 0]], [5]), pn.UnsupportedError, "`lengths` is given beside a list"),
    "lengths": (lambda: pn.predict(GRU, X, [9] * 6), pn.ShapeError, "`lengths` reach from 9"),
    "lengths without time": (lambda: pn.predict(pn.Linear(3, 2), X[0], [1]), pn.UnsupportedError, "Linear has no recurrent layer"),
    "a list without time": (lambda: pn.predict(pn.Linear(3, 2), [X[0]]), pn.UnsupportedError, "Linear has no recurrent layer"),
    "the last step first": (lambda: pn.predict(TURNED, [X[:, 0]]), pn.UnsupportedError, "gives the last step of `x` first"),
    "a list in a call": (lambda: GRU([X[:, 0], X[:2, 0]]), pn.UnsupportedError, "`x` is a list; .*pad_sequences of sequences.*predict"),
    "objects in a call": (lambda: GRU(OBJECTS), pn.DTypeError, r"`x` has dtype object; portnorm.pad_sequences\(\[\*x\]\) makes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    call, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        call()
