"""x · Wᵀ of a few rows, both as integers; compiled by numba, in whose loop over int16 × int8 LLVM finds the instruction that adds pairs."""

from __future__ import annotations

from typing import Any

import numpy as np

from portnorm_backends.cpu.compiling import compiled

_LEVELS = np.int32(127)
_STEP = np.float32(1.0) / np.float32(127.0)
_LEAST = np.finfo(np.float32).smallest_normal


@compiled()
def product(x: Any, bounded: bool, q: Any, weight: Any, steps: Any, y: Any) -> None:
    """y (rows, outputs) = x (rows, inputs) · (weight ⊙ steps)ᵀ, with `x` rounded into `q` as `fake_quantize` does."""
    for r in range(x.shape[0]):
        largest, none = np.float32(1.0), np.float32(0.0)  # the latter NaN where a number of the row is none, which an integer cannot be
        if bounded:
            for i in range(x.shape[1]):
                none += np.float32(0.0) if x[r, i] == x[r, i] else x[r, i]
        else:
            largest = _LEAST
            for i in range(x.shape[1]):
                largest, none = max(largest, abs(x[r, i])), none + (x[r, i] - x[r, i])
        for i in range(x.shape[1]):
            share = np.rint((x[r, i] / largest) / _STEP)
            q[r, i] = min(max(share, np.float32(-127.0)), np.float32(127.0))
        factor = _STEP * largest + none
        for j in range(weight.shape[0]):
            total = np.int32(0)
            for i in range(weight.shape[1]):
                total += np.int32(weight[j, i]) * np.int32(q[r, i])
            y[r, j] = np.float32(np.int32(total)) * (steps[j] * factor)  # numba adds up in 64 bits, of which LLVM then knows that 32 do
