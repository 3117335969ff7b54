#!/usr/bin/env bash
# jax 0.10.2 on a CPU: an array of some values divided by one number above 2**126, a Python float, a scalar or a value along another axis, is 0
# everywhere: 3e38 / 3e38 too. XLA multiplies by the reciprocal, which is subnormal, and those are taken for 0. Divided by as many numbers the
# same quotients are 1, as they are of an array of one value. So x / max(abs(x)), which is to keep squares in range, makes zeros of the very
# arrays that it is for, with and without `jit`, and a norm that is taken so is 0. The same of float64 above 2**1022.
#
# Seen: 0 for 8 values by one number, 1 by 8 numbers, 1 for a single value; right up to 2**126 and 2**1022.
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 jax==0.10.2
JAX_PLATFORMS=cpu JAX_ENABLE_X64=1 "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp


def quotients(largest, dtype):
    x = jnp.full(8, largest, dtype)
    by_max = lambda x: x / jnp.max(jnp.abs(x))
    return {
        "by a number": x / largest,
        "by a scalar": x / jnp.asarray(largest, dtype),
        "by its maximum": by_max(x),
        "by its maximum, jit": jax.jit(by_max)(x),
        "along an axis": jnp.full((2, 8), largest, dtype) / jnp.full((2, 1), largest, dtype),
        "by as many": x / x,
        "one value": x[:1] / largest,
    }


for dtype, edge in (("float32", 2.0**126), ("float64", 2.0**1022)):
    for largest in (edge, 1.5 * edge):
        found = {name: set(a.ravel().tolist()) for name, a in quotients(largest, dtype).items()}
        print(f"{dtype} {largest:.3g}:", ", ".join(f"{name} {min(values):.0f}" for name, values in found.items()))
        for name, values in found.items():
            wrong = largest > edge and name not in ("by as many", "one value")
            assert values == {0.0 if wrong else 1.0}, "the behaviour has changed"
PYTHON
