"""A summary says what a call gives and what a model holds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from tests.cases import IMPLEMENTATIONS, LAYERS, PRESETS
from tests.conftest import Library

PUBLISHED = [(cell, name) for cell, name in IMPLEMENTATIONS if pn.IMPLEMENTATIONS[cell][name].eps]
"""Without those that divide by the spread of the first state, which is 0."""


@pytest.mark.parametrize("sequences", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("cell", "norm"), PRESETS + PUBLISHED)
def test_shapes_and_counts_are_those_of_the_model(cell: str, norm: str | None, batch_first: bool, sequences: bool) -> None:
    layer = LAYERS[cell](3, 4, norm=norm, num_layers=2, bidirectional=True, batch_first=batch_first, return_sequences=sequences, t_max=6)
    layer.assign({n: np.ones_like(p) for n, p in layer.params.items()})
    model = pn.Sequential(layer, pn.Linear(8, 2))
    found = model.summary((6, 5, 3))
    assert found.rows[-1].output == model(np.ones((6, 5, 3), "float32"))[0].shape
    parts = [row for row in found.rows if row.inside]
    assert [row.name.strip() for row in parts] == ["l0", "l0_reverse", "l1", "l1_reverse"]
    assert [row.output for row in parts] == [(6, 5, 4)] * 2 + [(*found.rows[0].output[:-1], 4)] * 2
    whole = [row for row in found.rows if not row.inside]
    for key in ("parameters", "statistics"):
        arrays = model.parameters() if key == "parameters" else model.buffers
        count = sum(a.size for a in arrays.values())
        assert getattr(found, key) == sum(getattr(row, key) for row in whole) == count
        assert sum(getattr(row, key) for row in parts) == getattr(whole[0], key)
    assert found.size == sum(a.nbytes for a in model.state_dict().values())
    named = model.summary()
    order = ("batch", "time") if batch_first else ("time", "batch")
    assert named.rows[-1].output == ((*order, 2) if sequences else ("batch", 2))
    assert [row.parameters for row in named.rows] == [row.parameters for row in found.rows]


def test_in_every_library(library: Library, dtype_of_library: str) -> None:
    model = pn.Sequential(pn.GRU(3, 4, xp=library.xp, dtype=dtype_of_library), pn.LayerNorm(4, xp=library.xp, dtype=dtype_of_library))
    found = model.summary()
    size = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}[dtype_of_library]
    assert (found.parameters, found.size) == (116, 116 * size)
    assert found.rows[-1].output == ("time", "batch", 4)


class Halves(pn.Layer):
    """A layer of one's own, which leaves out every second step and says nothing of its input."""

    recurrent = False

    def __init__(self) -> None:
        super().__init__({}, None, None, "float32")
        self.params["scale"] = self._new(np.ones(7))

    def forward(self, params: Any, buffers: Any, x: Any, *rest: Any) -> Any:
        return x[::2], None, buffers, None


def test_layers_of_ones_own_nested_ones_and_one_at_two_places() -> None:
    twice = pn.Linear(3, 3)
    model = pn.Sequential(twice, pn.Sequential(Halves(), pn.LayerNorm(3)), twice, pn.BatchNorm(3, channel_axis=-1))
    found = model.summary((9, 2, 3))
    assert [(row.name, row.layer, row.output, row.parameters, row.statistics) for row in found.rows] == [
        ("0", "Linear", (9, 2, 3), 12, 0),
        ("1.0", "Halves", (5, 2, 3), 7, 0),
        ("1.1", "LayerNorm", (5, 2, 3), 6, 0),
        ("2", "Linear", (5, 2, 3), 0, 0),
        ("3", "BatchNorm", (5, 2, 3), 6, 7),
    ]
    assert found.parameters == 31
    assert "1.0  Halves     (5, 2, 3)" in str(found)
    assert Halves().summary((4, 2)).rows[0].output == (2, 2)
    with pytest.raises(pn.UnsupportedError, match=r"`input_shape` is not given, and Halves does not say it"):
        Halves().summary()


def test_a_length_that_is_no_other_is_no_name() -> None:
    assert pn.Sequential(pn.GRU(3, 4), Halves()).summary().rows[-1].output == ("?", "batch", 4)


ALONE = [(pn.LayerNorm((3, 4)), ("batch", 3, 4)), (pn.BatchNorm(3), ("batch", 3)), (pn.Embedding(5, 2), ("time", "batch", 2))]


@pytest.mark.parametrize(("layer", "output"), ALONE, ids=repr)
def test_a_layer_that_says_what_it_takes(layer: pn.Layer, output: Any) -> None:
    assert layer.summary().rows[0].output == output


@pytest.mark.parametrize("layer", [pn.InstanceNorm(3), pn.GroupNorm(1, 3)], ids=repr)
def test_a_layer_that_takes_any_number_of_axes(layer: pn.Layer) -> None:
    assert layer.summary((2, 3, 5)).rows[0].output == (2, 3, 5)


@pytest.mark.parametrize(
    ("shape", "kind", "message"),
    [
        ((20, 4, 9), pn.ShapeError, r"`input_shape` does not fit: `x` has shape \(20, 4, 9\)"),
        ((20, 4), pn.ShapeError, "`input_shape` does not fit"),
        ((20, 0, 3), pn.UnsupportedError, "`input_shape` is 0; expected at least 1"),
        ((20, "batch", 3), pn.UnsupportedError, "`input_shape` is 'batch'; expected a whole number"),
        (20, pn.UnsupportedError, "`input_shape` is 20; expected the lengths of all axes"),
    ],
    ids=str,
)
def test_a_shape_that_does_not_fit(shape: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        pn.Sequential(pn.GRU(3, 4), pn.Linear(4, 2)).summary(shape)


def test_a_summary_changes_nothing() -> None:
    model = pn.LSTM(3, 4, norm="batch", rng=0)
    before = {name: a.copy() for name, a in model.state_dict().items()}
    found = model.summary()
    assert math.prod(n for n in found.rows[0].output if isinstance(n, int)) == 4
    for name, a in model.state_dict().items():
        np.testing.assert_array_equal(a, before[name])
