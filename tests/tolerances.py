"""Every tolerance of the tests, each with its reason. Loosening one needs a measured cause, written here."""

from __future__ import annotations

# One operation, its value and cotangents, against NumPy in float64.
OPERATION = {
    # The same formula in another order; 1.7e-13 measured.
    "float64": 1e-12,
    # 4.4e-7 measured.
    "float32": 2e-6,
    # Inputs and results are rounded to 11 bits; statistics are float32. 1.8e-3 measured.
    "float16": 4e-3,
    # The same with 8 bits.
    "bfloat16": 3.2e-2,
}

# A recurrent layer over five steps, values, cotangents and statistics.
RECURRENT = {
    "float64": 1e-12,
    # 2.5e-5 measured: statistics over three features or three rows, with variances as small as those have by chance, which amplify a
    # last bit over five steps. The definitions come to 1.2e-5, the compiled kernels, which round elsewhere, to 2.5e-5 (icefall's GRU).
    "float32": 5e-5,
    # Two or three steps whose states are rounded to 11 bits.
    "float16": 2e-2,
    # Up to 17 steps whose states are rounded to 8 bits, as everything that a model of torch does before and behind: 1.2e-2 measured. The
    # cotangents of three steps with statistics of a batch: 2.6e-2.
    "bfloat16": 5e-2,
}

# Equality with torch in float64, as promised.
TORCH_FLOAT64 = 1e-6

# Published cells written out in NumPy: the same formula in another order over five steps, some with eps = 1e-12 or none. 1e-13 measured.
PUBLISHED_FLOAT64 = 1e-10

# Keras and flax in float32 against layers with their weights: six steps in another order. 6e-7 measured.
LIBRARY_FLOAT32 = {"rtol": 2e-6, "atol": 2e-6}

# A stack of both directions by the kernels against the definitions, ragged, in float64: where two sequences are left, their variance
# amplifies a last bit. 5e-12 of values up to 31 measured.
RAGGED_STACK_FLOAT64 = {"rtol": 1e-10, "atol": 1e-10}

# Gradients that a library finds from the definitions, in float64, relative to the largest entry: the same sums in another order, of inputs
# whose mean is thirty standard deviations, or over five steps with variances of three values.
AUTODIFF_FLOAT64 = 1e-9

# Central differences with step 1e-6 in float64: error of third order 1e-12 times the third derivative (large where a variance is small:
# two rows in a batch, three features in a layer), and rounding 1e-16 / 1e-6. 3.4e-6 measured.
DIFFERENCES = 1e-5

# float32, N(1e4, 0.01), against float64: the promise of the definitions; 4.5e-7 measured. torch is off by 0.18.
LARGE_MEAN = 2e-6

# onnxruntime's LSTM, GRU and RNN operators in float32 against the float64 run, five steps.
ONNX_OPERATOR = 1e-6
# A few steps of normalized cells in a runtime against the eager run, both in float32: each divides by a deviation, so a unit in the last
# place becomes some tens.
ONNX_STEPS = 2e-5

# A torch model in onnxruntime, float32 in both, values of order 1: up to 60 steps of a layer-normalized net, which amplifies rounding.
EXPORTED_TORCH = 2e-5

# Real models in float32 against their packages, whole sequences, relative to the largest value: the same products in another order. 1.4e-6
# measured. The quantized LSTM of ddddocr also rounds each input and state to 8 bits, which dequantized weights do not: 2.4e-3 measured.
REAL_MODEL = 5e-6
REAL_MODEL_QUANTIZED = 1e-2

# A graph whose weights a tool has rounded to float16 (2⁻¹¹ of each) or to int8 (2⁻⁸ of the largest of a matrix), against the float64 run of
# the layer as it was, 24 steps: normalization over eight values amplifies both. 0.016 and 0.078 measured.
MADE_SMALLER = {"float16": 0.05, "int8": 0.2}

# A few steps with integers for weights, in a runtime and eagerly, both in float32: a number that lies in the middle of two steps may be
# rounded to either, which moves a gate by 1/127 of a weight.
INTEGERS = 5e-3
# One step of the kernels for products of integers against the definition: the same integers, and scales a unit in the last place apart, of
# sums that normalization over eight values amplifies.
INTEGERS_KERNEL = 1e-5

# A layer through torch.export, AOTInductor or jax.export beside the eager layer, both in float32, 40 steps of a layer-normalized net, which
# amplifies what fused loops round otherwise. 2.8e-6 measured; 5.8e-6 of torch's own layer_norm at a mean of 100 standard deviations.
WAYS_OUT = 1e-5
# Its gradients, relative to the largest of a parameter.
WAYS_OUT_GRADIENT = 1e-5

# Parameters after a few updates of an optimizer beside the same in float64, relative. 5.7e-6 measured of AdamW in float32.
OPTIMIZER = {"float64": 1e-12, "float32": 1e-5}

# Sums over thousands of like sequences inside a cell, in units in the last place: the promise for cotangents.
CELL_SUM_ULP = 32.0


# Mean and variance of a batch as they go to running averages, in units in the last place: of the mean, or of the standard deviation where
# that is larger, and of the variance. 1.0 and 1.99 measured, at means from 0 to 10⁷ standard deviations; 4.6 with the wrong sign in the
# last correction of the mean. What the variance is off by are the roundings of x̂ and of its square, of three values up to 2.6 units.
STATISTICS_ULP = {"mean": 1.0, "variance": 2.0}


def relative(dtype: str, table: dict[str, float] = OPERATION) -> dict[str, float]:
    """`rtol` and `atol` for numpy.testing.assert_allclose; values are of order 1."""
    return {"rtol": table[dtype], "atol": table[dtype]}
