"""Every tolerance of the tests, each with its reason. Loosening one needs a measured cause, written here."""

from __future__ import annotations

RELATIVE = {
    # Two float64 computations of the same formula in another order: a few hundred roundings of 1e-16, amplified by 1/std.
    "float64": 1e-10,
    # A float32 result against the float64 one: statistics of up to 1,000 values and products of up to 100 terms.
    "float32": 2e-5,
    # Inputs and results are rounded to 11 bits; statistics are float32.
    "float16": 4e-3,
}

# The issue's own bound for equality with torch in float64.
TORCH_FLOAT64 = 1e-6

# Central differences with step 1e-6 in float64: error of third order 1e-12 times the third derivative (large where a variance is small),
# and rounding 1e-16 / 1e-6. Two rows in a batch, or three features in a layer, make small variances.
DIFFERENCES = 5e-5

# float32, N(1e4, 0.01), against float64: the promise of the definitions; 4.5e-7 measured. torch is off by 0.18.
LARGE_MEAN = 2e-6

# onnxruntime's LSTM, GRU and RNN operators in float32 against the float64 run, five steps.
ONNX_OPERATOR = 1e-6


def relative(dtype: str) -> dict[str, float]:
    """`rtol` and `atol` for numpy.testing.assert_allclose; values are of order 1."""
    return {"rtol": RELATIVE[dtype], "atol": RELATIVE[dtype]}
