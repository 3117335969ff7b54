"""Layer normalization of rows as a Triton kernel, one row a program: what `benchmarks.gpu` measures the CUDA kernels against."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _rows(x, weight, bias, y, n, eps, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    at = tl.arange(0, block)
    inside = at < n
    values = tl.load(x + row * n + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values, axis=0) / n
    centred = tl.where(inside, values - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / n + eps)
    gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * n + at, centred * rstd * gain + shift, mask=inside)


def layer_norm(x: Any, weight: Any, bias: Any, eps: float = 1e-5) -> Any:
    """Over the last axis of a contiguous (rows, n)."""
    y = torch.empty_like(x)
    block = triton.next_power_of_2(x.shape[1])
    _rows[(x.shape[0],)](x, weight, bias, y, x.shape[1], eps, block=block, num_warps=min(max(block // 256, 1), 16))
    return y
