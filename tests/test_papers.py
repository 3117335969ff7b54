"""What the papers state, as far as it needs no data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import portnorm as pn

RNG = np.random.default_rng(5)
CASES, INPUTS, UNITS = 7, 5, 6
X, W, GAIN, SHIFT = (
    RNG.standard_normal((CASES, INPUTS)),
    RNG.standard_normal((INPUTS, UNITS)),
    RNG.uniform(0.5, 2.0, UNITS),
    RNG.standard_normal(UNITS),
)

# y(x, w): a layer of units with each normalization; ε = 0, since invariance is exact only there.
NORMALIZED: dict[str, Callable[[Any, Any], Any]] = {
    "batch": lambda x, w: pn.batch_norm(x @ w, GAIN, SHIFT, eps=0.0),
    "weight": lambda x, w: x @ pn.weight_norm(w, GAIN, axis=1) + SHIFT,
    "layer": lambda x, w: pn.layer_norm(x @ w, GAIN, SHIFT, eps=0.0),
    "rms": lambda x, w: pn.rms_norm(x @ w, GAIN, eps=0.0) + SHIFT,
}
TRANSFORMS: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "matrix re-scaled": lambda x, w: (x, 3.0 * w),
    "matrix re-centred": lambda x, w: (x, w + RNG.standard_normal((INPUTS, 1))),
    "vectors re-scaled": lambda x, w: (x, w * RNG.uniform(0.5, 2.0, UNITS)),
    "data re-scaled": lambda x, w: (3.0 * x, w),
    "data re-centred": lambda x, w: (x + RNG.standard_normal(INPUTS), w),
    "one case re-scaled": lambda x, w: (x * np.where(np.arange(CASES) == 2, 3.0, 1.0)[:, None], w),
}
# Ba, Kiros & Hinton 2016, table 1, in the order of TRANSFORMS; the last row is not in the paper.
INVARIANT = {
    "batch": "yes no yes yes yes no",
    "weight": "yes no yes no no no",
    "layer": "yes yes no yes no yes",
    "rms": "yes no no yes no yes",
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("norm", NORMALIZED)
def test_invariances_of_table_1(norm: str, transform: str) -> None:
    expected = dict(zip(TRANSFORMS, INVARIANT[norm].split(), strict=True))[transform] == "yes"
    y, changed = NORMALIZED[norm](X, W), NORMALIZED[norm](*TRANSFORMS[transform](X, W))
    assert np.allclose(y, changed, rtol=1e-9, atol=1e-9) == expected


@pytest.mark.parametrize(("gain", "tolerance"), [(0.1, 2e-3), (0.3, 2e-5), (0.5, 2e-5), (1.0, 2e-5)])
def test_gradient_through_time_of_a_batch_normalized_rnn(gain: float, tolerance: float) -> None:
    """Cooijmans et al. 2016, figure 1a, in closed form: the gradient shrinks by 2γ / sinh 2γ per step; γ = 0.1 keeps it, γ = 1 loses it.

    With W_h = I and no more input every unit settles on two values over the batch, ±tanh γ where half of the cases have each: here the
    second half of the batch is the negative of the first. An uneven unit loses less, and after many steps it is all that is left.
    """
    size, steps, rng = 100, 500, np.random.default_rng(0)
    layer = pn.RNN(size, size, norm="batch", dtype="float64", t_max=1, rng=0)
    gains = {name: np.full(size, gain) for name in ("norm_ih_l0.weight", "norm_hh_l0.weight")}
    layer.assign({**layer.parameters(), **gains, "weight_hh_l0": np.eye(size)})
    half = np.concatenate([rng.standard_normal((20, size // 2, size)), np.zeros((steps - 20, size // 2, size))])
    x = np.concatenate([half, -half], axis=1)
    norms = []
    for left in (100, 20):
        _, state = layer(x[:-left], training=True)
        _, last, pullback = layer.vjp(x[-left:], state, training=True)
        dstate = pullback(None, (np.random.default_rng(1).standard_normal(last[0].shape), None))[1]
        norms.append(np.mean(np.linalg.norm(dstate[0][0], axis=1)))
    factor = (norms[0] / norms[1]) ** (1 / 80)
    np.testing.assert_allclose(factor, 2 * gain / np.sinh(2 * gain), rtol=tolerance)
