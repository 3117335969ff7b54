#!/usr/bin/env bash
# tensorflow 2.21.0: under `tf.function(jit_compile=True)` fused_batch_norm in training takes the variance as E[x²] − E[x]², where eager mode and a
# plain tf.function take it in two passes. At a mean of 10,000 standard deviations, or for a channel that is constant, the variance that comes
# back is negative: the result is NaN, and a model's running variance, once it was moved that way, makes NaN of every inference after it.
# The same line of user code is right until it is compiled.
#
# Seen: float32, mean 10,000: the smallest variance 0.9 in eager mode and as a graph, −81 in XLA; constant 1234: 0, and −3.4 with NaN in y.
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 tensorflow==2.21.0
TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy as np
import tensorflow as tf


def normalized(x):
    y, _, var = tf.compat.v1.nn.fused_batch_norm(x, tf.ones(4), tf.zeros(4), epsilon=1e-5, is_training=True)
    return y, var


def seen(run, x):
    y, var = run(x)
    return float(tf.reduce_min(var)), int(tf.reduce_sum(tf.cast(tf.math.is_nan(y), tf.int32)))


noise = np.random.default_rng(0).standard_normal((8, 6, 7, 4))
cases = {"mean 1e4": (1e4 + noise).astype("float32"), "constant 1234": np.full(noise.shape, 1234, "float32")}
ways = {"eager": normalized, "graph": tf.function(normalized), "XLA": tf.function(normalized, jit_compile=True)}
found = {(case, way): seen(run, tf.constant(x)) for case, x in cases.items() for way, run in ways.items()}
for (case, way), (var, nans) in found.items():
    print(f"{case:14} {way:6} smallest variance {var:8.3g}, {nans} NaN")
for case in cases:
    assert all(found[case, way][0] >= 0 and found[case, way][1] == 0 for way in ("eager", "graph")), "the behaviour has changed"
    assert found[case, "XLA"][0] < 0 and found[case, "XLA"][1] > 0, "the behaviour has changed"
PYTHON
