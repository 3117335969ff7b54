#!/usr/bin/env bash
# flax 0.12.8 (nnx), jax 0.10.2: `nnx.BatchNorm(…, dtype=jnp.float16)` keeps its running statistics in float32 and takes those of a batch in
# float32, but in evaluation rounds mean and variance to float16 before it normalizes. A variance beyond 65,504, of values around ±300, becomes
# infinite: every output is the shift alone. The same layer in training is right.
#
# Seen: values around ±300: at most 0.001 off in training, the result exactly 0 in evaluation. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 jax==0.10.2 flax==0.12.8
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import jax.numpy as jnp
import numpy as np
from flax import nnx

rng = np.random.default_rng(0)
x = (rng.choice([-300.0, 300.0], (256, 4)) * rng.uniform(0.9, 1.1, (256, 4))).astype(np.float16)
wide = x.astype(np.float64)
exact = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)

layer = nnx.BatchNorm(4, momentum=0.0, dtype=jnp.float16, rngs=nnx.Rngs(0))  # momentum 0: the running statistics are those of this batch
trained = np.asarray(layer(jnp.asarray(x), use_running_average=False), np.float64)
evaluated = np.asarray(layer(jnp.asarray(x), use_running_average=True), np.float64)
kept = layer.var.get_value()
off = np.abs(trained - exact).max()
print(f"running variance {float(kept[0]):.0f} in {kept.dtype}; training is {off:.2g} off; the largest value in evaluation is {np.abs(evaluated).max():.2g}")
assert kept.dtype == jnp.float32 and float(kept[0]) > 65504, "the behaviour has changed"
assert off < 2e-3 and np.abs(evaluated).max() == 0.0, "the behaviour has changed"
PYTHON
