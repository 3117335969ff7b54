"""Weights from elsewhere: every format against its published cell in float64, the libraries themselves, and files that do not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import portnorm as pn
from tests.oracles import PUBLISHED, D, Published
from tests.tolerances import DIFFERENCES, PUBLISHED_FLOAT64

CASES = [
    pytest.param(case, training, id=f"{case.format}-{case.layer}-{k}-{'training' if training else 'inference'}")
    for k, case in enumerate(PUBLISHED)
    for training in (False, True)[: 1 + case.training]
]


def imported(case: Published, arrays: Any) -> Any:
    return pn.import_checkpoint(arrays, case.format, **case.config)


@pytest.mark.parametrize(("case", "training"), CASES)
def test_values_and_gradients_are_those_of_the_published_cell(case: Published, training: bool, rng: np.random.Generator) -> None:
    """Gradients against differences of the published cell, in a direction of its own parameters, which importing maps to one of ours."""
    p, x = case.arrays(rng), rng.standard_normal((5, 6, D))
    layer = imported(case, p)
    assert type(layer).__name__ == case.layer
    y, _, pullback = layer.vjp(x, training=training)
    np.testing.assert_allclose(y, case.oracle(p, x, training), rtol=PUBLISHED_FLOAT64, atol=PUBLISHED_FLOAT64)
    dy, step = rng.standard_normal(y.shape), 1e-6
    dx, _, grads = pullback(dy)
    for name in [n for n in p if not any(s in n for s in ("mean", "var"))]:
        direction = rng.standard_normal(p[name].shape)
        ends = [{**p, name: p[name] + sign * step * direction} for sign in (1, -1)]
        difference = sum(sign * np.sum(case.oracle(end, x, training) * dy) for sign, end in zip((1, -1), ends, strict=True)) / (2 * step)
        ours = [imported(case, {**p, name: p[name] + sign * direction}).parameters() for sign in (1, -1)]
        gradient = sum(np.sum(grads[n] * (ours[0][n] - ours[1][n]) / 2) for n in grads)
        np.testing.assert_allclose(gradient, difference, rtol=DIFFERENCES, atol=DIFFERENCES * max(1, abs(difference)))
    direction = rng.standard_normal(x.shape)
    ends = [np.sum(case.oracle(p, x + sign * step * direction, training) * dy) for sign in (1, -1)]
    np.testing.assert_allclose(np.sum(dx * direction), (ends[0] - ends[1]) / (2 * step), rtol=DIFFERENCES, atol=DIFFERENCES)


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: f"{case.format}-{case.layer}")
def test_out_again(case: Published, rng: np.random.Generator) -> None:
    """What a format stores comes back under its names, or, where it has two names for one layer, under those of the first."""
    p = case.arrays(rng)
    layer = imported(case, p)
    if case.config or "w_f_diag" in p:
        with pytest.raises(pn.UnsupportedError, match=case.format):
            pn.to_format(layer, case.format)
        return
    again = pn.to_format(layer, case.format)
    if "bn_a.gammas" not in p:
        assert set(again) == set(p)
        for name, array in again.items():
            np.testing.assert_array_equal(array, p[name])
    for name, array in imported(case, again).state_dict().items():
        np.testing.assert_array_equal(array, layer.state_dict()[name])


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: f"{case.format}-{case.layer}")
def test_missing_unknown_and_misshapen_arrays_are_named(case: Published, rng: np.random.Generator) -> None:
    p = case.arrays(rng)
    unused = {"bias"} if "w_f_diag" in p else {"bn_b.betas"}
    for name in sorted(set(p) - unused - {n for n in p if n.endswith(tuple(f"_{t}" for t in range(5)))}):
        others = {n: a for n, a in p.items() if n != name}
        try:
            pn.import_checkpoint(others, case.format)
        except pn.CheckpointError as error:
            assert name in str(error)  # noqa: PT017  # the exception is checked where there is one
        else:
            # A layer without it exists: without bias, without hidden weights, or plain.
            assert case.format in ("keras", "haste")
            assert name in ("bias", "recurrent_kernel", "gamma")
        for wrong in (p[name][..., None], np.ones((*p[name].shape[:-1], 0))):
            with pytest.raises(pn.CheckpointError, match=name.replace(".", r"\.")):
                pn.import_checkpoint({**p, name: wrong}, case.format)
    with pytest.raises(pn.CheckpointError, match="surplus"):
        pn.import_checkpoint({**p, "surplus": np.ones(3)}, case.format)
