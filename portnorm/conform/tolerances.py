"""What is promised, each with its reason. ULP are units in the last place of the largest value of the same statistic."""

from __future__ import annotations

FORWARD_ULP = 8.0
"""A result of portnorm's definitions. Measured ≤ 7 over all regimes on NumPy, torch and JAX."""

GRADIENT_ULP = 32.0
"""The cotangent of the input: three sums where the result has two, and their difference."""

HALF_ULP = 2.0
"""float16 and bfloat16: statistics in float32 leave one rounding of the result, and one of the factor it is multiplied with."""

STATISTICS_ULP = 3.0
"""Mean and variance that go to running averages, of each channel by itself. In the tests portnorm's layers are within 2."""

STEP_ULP = 16.0
"""One step of a recurrent cell from the same state, in units of the largest value, at least of 1: a product summed in another order."""

TRAJECTORY_FACTOR = 10.0
"""A whole run: a multiple of the distance between NumPy's float32 run and the float64 run, since rounding grows with time."""

HORIZON = 24
"""Steps of a recurrent run."""


def limit(dtype: str, side: str) -> float:
    """The largest number of ULP of one value; `side` is "forward", "gradient", or the "mean" or "variance" that is returned."""
    if side in ("mean", "variance"):
        return STATISTICS_ULP
    if dtype in ("float16", "bfloat16"):
        return HALF_ULP * (1.0 if side == "forward" else 2.0)
    return FORWARD_ULP if side == "forward" else GRADIENT_ULP
