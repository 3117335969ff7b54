"""From an empty cache to the first answer: `python -m benchmarks.first_call [TURNS]`, each library in fresh processes, pinned to one core.

Wall time from the start of the process, import included, and the processor's time of it (a process that compiles in the background
outlives it, and is not in that). The work is one training step (forward and backward) of an LSTM with layer normalization on (20, 4, 8),
and a layer normalization forward and backward; onnxruntime makes a session of the same cell and runs it.
Writes benchmarks/results/first_call.json.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from portnorm import bench

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "first_call.json"

_DATA = 'import numpy as np\nx = np.random.default_rng(0).standard_normal((20, 4, 8)).astype("float32")\n'

_PORTNORM_LSTM = f"""
{_DATA}
import portnorm as pn
layer = pn.LSTM(8, 32, norm="layer", rng=0)
y, state, pullback = layer.vjp(x, training=True)
pullback(np.ones_like(y))
"""

_PORTNORM_LN = f"""
{_DATA}
import portnorm as pn
w = np.ones(8, "float32")
y, pullback = pn.vjp(pn.layer_norm, x, w, w)
pullback(np.ones_like(y))
"""

_TORCH_LSTM = f"""
{_DATA}
import torch
from torch import nn

class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.ih, self.hh = nn.Linear(8, 128, bias=False), nn.Linear(32, 128, bias=False)
        self.n_ih, self.n_hh, self.n_c = nn.LayerNorm(128), nn.LayerNorm(128), nn.LayerNorm(32)

    def forward(self, x):
        h, c, ys = x.new_zeros(4, 32), x.new_zeros(4, 32), []
        u = self.n_ih(self.ih(x))
        for t in range(x.shape[0]):
            i, f, g, o = (u[t] + self.n_hh(self.hh(h))).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * self.n_c(c).tanh()
            ys.append(h)
        return torch.stack(ys)

Cell()(torch.from_numpy(x)).sum().backward()
"""

_TORCH_LN = f"""
{_DATA}
import torch
torch.nn.LayerNorm(8)(torch.from_numpy(x).requires_grad_()).sum().backward()
"""

_JAX_LN = f"""
{_DATA}
import jax, jax.numpy as jnp

def f(x, w):
    m = x.mean(-1, keepdims=True)
    return (((x - m) / jnp.sqrt(((x - m) ** 2).mean(-1, keepdims=True) + 1e-5)) * w).sum()

jax.block_until_ready(jax.jit(jax.value_and_grad(f, (0, 1)))(x, np.ones(8, "float32")))
"""

_JAX_LSTM = f"""
{_DATA}
import jax, jax.numpy as jnp

def norm(z):
    m = z.mean(-1, keepdims=True)
    return (z - m) / jnp.sqrt(((z - m) ** 2).mean(-1, keepdims=True) + 1e-5)

def f(p, x):
    u = norm(x @ p["ih"]) * p["a"]
    def step(s, u):
        h, c = s
        i, f, g, o = jnp.split(u + norm(h @ p["hh"]) * p["b"], 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(norm(c) * p["c"])
        return (h, c), h
    zeros = jnp.zeros((4, 32))
    return jax.lax.scan(step, (zeros, zeros), u)[1].sum()

r = np.random.default_rng(0)
p = {{"ih": r.standard_normal((8, 128)), "hh": r.standard_normal((32, 128)), "a": np.ones(128), "b": np.ones(128), "c": np.ones(32)}}
jax.block_until_ready(jax.jit(jax.value_and_grad(f))({{n: a.astype("float32") for n, a in p.items()}}, x))
"""

_ONNXRUNTIME = f"""
{_DATA}
import onnxruntime
session = onnxruntime.InferenceSession(MODEL, providers=["CPUExecutionProvider"])
session.run(None, {{"x": x}})
"""

WORKS: dict[str, dict[str, str]] = {
    "LN-LSTM forward+backward (20, 4, 8, 32)": {
        "portnorm": _PORTNORM_LSTM,
        "portnorm that waits": _PORTNORM_LSTM,
        "torch": _TORCH_LSTM,
        "JAX jit": _JAX_LSTM,
        "onnxruntime, forward": _ONNXRUNTIME,
    },
    "LN forward+backward (20, 4, 8)": {
        "portnorm": _PORTNORM_LN,
        "portnorm that waits": _PORTNORM_LN,
        "torch": _TORCH_LN,
        "JAX jit": _JAX_LN,
    },
}


def once(code: str, engine: str, cache: Path) -> dict[str, float]:
    """Seconds of the process until its answer, and of the processor until it has ended."""
    environment = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"), "JAX_PLATFORMS": "cpu"}
    environment |= {"NUMBA_CACHE_DIR": str(cache), "PORTNORM_KERNELS": "wait" if engine == "portnorm that waits" else "background"}
    pinned = ["taskset", "-c", "0"] if sys.platform == "linux" else []
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen(
        [*pinned, sys.executable, "-c", f"{code}\nprint(flush=True)\ninput()"],
        env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    if not process.stdout.readline():
        raise SystemExit(f"{engine} gave no answer")
    answer = time.perf_counter() - start
    process.communicate("\n")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"answer": answer, "processor": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def model(folder: Path) -> Path:
    import portnorm as pn

    pn.export(pn.LSTM(8, 32, norm="layer", rng=0), folder / "m.onnx", lengths=False)
    return folder / "m.onnx"


def main() -> None:
    """Measure and write."""
    turns = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    found: dict[str, Any] = {"machine": bench.machine(), "works": {}}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # somebody may still be compiling
        path = model(Path(folder))
        for work, engines in WORKS.items():
            times: dict[str, list[dict[str, float]]] = {}
            for turn in range(turns):
                for engine, code in engines.items():
                    cache = Path(folder) / f"{turn}-{len(times)}-{engine}-{work[:7]}"
                    times.setdefault(engine, []).append(once(code.replace("MODEL", repr(str(path))), engine, cache))
                    if engine.startswith("portnorm"):  # and the next process, which finds the kernels if they were ready
                        times.setdefault(f"{engine}, again", []).append(once(code, engine, cache))
                    if engine == "portnorm":  # what compiles for it would take the core from the next engine
                        once(code, "portnorm that waits", cache)
            found["works"][work] = {name: {key: [t[key] for t in of] for key in of[0]} for name, of in times.items()}
            for name, of in times.items():
                sys.stdout.write(
                    f"{work:45s} {name:28s} {min(t['answer'] for t in of):7.2f} s   processor {min(t['processor'] for t in of):7.2f} s\n"
                )
                sys.stdout.flush()
    OUT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
