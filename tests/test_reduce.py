"""Batch statistics over processes: what each computes of its part is what one would of the whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from benchmarks.readme import ROOT
from tests.tolerances import relative

PARTS = 2


WORKER = """
import sys
from datetime import timedelta

import numpy as np, torch, torch.distributed as dist, portnorm as pn

rank, place = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{place}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=60))

def total(a):
    a = a.clone()
    dist.all_reduce(a)
    return a

given = np.load(f"{place}/given.npz")
rows = slice(0, 5) if rank == 0 else slice(5, None)  # parts of different lengths
x, dy, mask = (torch.tensor(given[name][rows]) for name in ("x", "dy", "mask"))
w, b = torch.tensor(given["w"]), torch.tensor(given["b"])
found = {}

y, pullback = pn.vjp(pn.batch_norm, x, w, b, mask=mask, reduce=total)
dx, dw, db = pullback(dy)
found |= {"y": y, "dx": dx, "dw": total(dw), "db": total(db)}

layer = pn.BatchNorm(3, xp=torch, dtype="float64", reduce=total)
layer.assign({"weight": w.requires_grad_(), "bias": b.requires_grad_()})
x.requires_grad_()
for step in range(2):
    out = layer(x * (step + 1), training=True)
(out * dy).sum().backward()
found |= {"layer y": out.detach(), "layer dx": x.grad, "layer dw": total(w.grad), "layer db": total(b.grad)}
found |= {f"layer {name}": buffer for name, buffer in layer.buffers.items()}
np.savez(f"{place}/found{rank}.npz", **{name: a.numpy() for name, a in found.items()})
dist.destroy_process_group()
"""


@pytest.mark.peers
def test_two_processes_have_the_statistics_of_one(tmp_path: Path, rng: np.random.Generator) -> None:
    """torch.distributed with gloo; |mean| much larger than the standard deviation, and parts whose means differ."""
    x, dy = 1e4 + rng.standard_normal((12, 3)), rng.standard_normal((12, 3))
    x[:5] += 3.0
    w, b, mask = rng.uniform(0.5, 2.0, 3), rng.standard_normal(3), np.arange(12)[:, None] % 4 != 1
    np.savez(tmp_path / "given.npz", x=x, dy=dy, w=w, b=b, mask=mask)
    commands = [[sys.executable, "-c", WORKER, str(rank), str(tmp_path)] for rank in range(PARTS)]
    workers = [subprocess.Popen(c, cwd=ROOT, env=dict(os.environ), stderr=subprocess.PIPE, text=True) for c in commands]
    for worker in workers:
        _, said = worker.communicate(timeout=120)
        assert worker.returncode == 0, said
    parts = [dict(np.load(tmp_path / f"found{rank}.npz")) for rank in range(PARTS)]

    y, pullback = pn.vjp(pn.batch_norm, x, w, b, mask=mask)
    expected = dict(zip(("y", "dx", "dw", "db"), (y, *pullback(dy)), strict=True))
    layer = pn.BatchNorm(3, dtype="float64")
    layer.assign({"weight": w, "bias": b})
    layer(x, training=True)
    out, pullback = layer.vjp(2.0 * x, training=True)
    dx, grads = pullback(dy)
    expected |= {"layer y": out, "layer dx": 2.0 * dx, "layer dw": grads["weight"], "layer db": grads["bias"]}
    expected |= {f"layer {name}": buffer for name, buffer in layer.buffers.items()}
    for name, whole in expected.items():
        if whole.shape == (12, 3):
            np.testing.assert_allclose(np.concatenate([part[name] for part in parts]), whole, rtol=1e-9, atol=1e-9, err_msg=name)
        else:
            for part in parts:
                np.testing.assert_allclose(part[name], whole, rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.peers
def test_the_hook_is_a_psum_under_jax(rng: np.random.Generator) -> None:
    """Parts along a mapped axis: `jax.lax.psum` sums over them, also where JAX differentiates."""
    import jax
    import jax.numpy as jnp

    x, dy, w = 30.0 + rng.standard_normal((4, 6, 3)), rng.standard_normal((4, 6, 3)), rng.uniform(0.5, 2.0, 3)

    def part(x: Any, dy: Any) -> Any:
        y, pullback = pn.vjp(pn.batch_norm, x, jnp.asarray(w), reduce=lambda a: jax.lax.psum(a, "parts"))
        return y, pullback(dy)[0]

    y, dx = jax.jit(jax.vmap(part, axis_name="parts"))(jnp.asarray(x), jnp.asarray(dy))
    expected, pullback = pn.vjp(pn.batch_norm, x.reshape(24, 3), w)
    np.testing.assert_allclose(np.asarray(y).reshape(24, 3), expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(np.asarray(dx).reshape(24, 3), pullback(dy.reshape(24, 3))[0], rtol=1e-10, atol=1e-10)


def test_one_process_is_the_whole(rng: np.random.Generator) -> None:
    """A hook that has nothing to add changes nothing, in extreme rows too."""
    for size in (1e-17, 1.0, 1e15):
        x, dy = (size * (3.0 + rng.standard_normal((6, 3)))).astype("float32"), rng.standard_normal((6, 3)).astype("float32")
        (y, pullback), (expected, their_pullback) = (
            pn.vjp(pn.batch_norm, x, eps=1e-30, **keywords) for keywords in ({"reduce": lambda a: a}, {})
        )
        np.testing.assert_allclose(y, expected, **relative("float32"))
        scale = np.abs(their_pullback(dy)[0]).max()
        np.testing.assert_allclose(pullback(dy)[0] / scale, their_pullback(dy)[0] / scale, **relative("float32"))


def test_an_empty_part_is_an_error() -> None:
    with pytest.raises(pn.ShapeError, match=r"`x` \(0, 3\) is empty; expected a value for each channel in every process"):
        pn.batch_norm(np.ones((0, 3)), reduce=lambda a: a)
