"""Every test that needs a GPU, then timings on it, into one file: `python -m benchmarks.gpu` writes benchmarks/results/gpu.json.

Bandwidth of the normalizations beside that of a copy on the device in the same run; the same in torch, compiled torch and Triton where a
torch with CUDA is installed; LN-LSTM beside cuDNN's plain LSTM and a loop in torch. What was found is written after each part. Without
CuPy or a GPU it says so, writes nothing and ends with status 2; with a failed test it goes on and ends with status 1.
"""

from __future__ import annotations

import importlib
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import portnorm as pn

RESULTS = Path(__file__).parent / "results" / "gpu.json"
BYTES = 2**28
"""Of each array that bandwidth is measured with: several times what a cache holds."""
TURNS = 30
LONG = (100, 64, 512, 1024)
SMALL = tuple((100, batch, hidden, hidden) for hidden in (128, 256) for batch in (1, 8, 32))
"""(time, batch, inputs, hidden)"""


def device() -> Any:
    """CuPy with a GPU; ends with status 2 where there is none."""
    try:
        cupy = importlib.import_module("cupy")
        count = cupy.cuda.runtime.getDeviceCount()
    except ImportError as error:
        why = f"CuPy is not installed ({error})"
    except Exception as error:  # CuPy without a driver raises an error of its own
        why = f"CuPy finds no GPU ({error})"
    else:
        if count:
            return cupy
        why = "CuPy finds no GPU"
    print(f"{why}: nothing was tested or measured, and nothing was written", file=sys.stderr)
    raise SystemExit(2)


def tests() -> dict[str, Any]:
    """What the tests on a GPU came to."""
    command = [sys.executable, "-m", "pytest", "tests/test_cuda.py", "-k", "gpu", "-q", "--no-header"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    print("\n".join((*failed, lines[-1])))
    return {"status": done.returncode, "summary": lines[-1], "failed": failed}


def milliseconds(cupy: Any, call: Callable[[], Any], turns: int = TURNS) -> float:
    """The median time of a call on the device, between two events on its stream."""
    for _ in range(3):
        call()
    found = []
    for _ in range(turns):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        call()
        end.record()
        end.synchronize()
        found.append(cupy.cuda.get_elapsed_time(start, end))
    return statistics.median(found)


# -- bandwidth ---------------------------------------------------------------------------------------------------------------------------


def cases(size: int) -> Iterator[tuple[str, tuple[int, ...], Callable[..., Any], tuple[int, ...]]]:
    """(name, shape, normalization of (x, weight, bias), shape of weight and bias) for arrays of so many values."""
    for n in (64, 1024, 8192, 2**17):
        if n <= size:
            yield f"layer norm, rows of {n}", (size // n, n), _layer_norm, (n,)
    n = min(1024, size)
    yield f"RMS norm, rows of {n}", (size // n, n), _rms_norm, (n,)
    side = 32 if size >= 2**20 else 4
    shape = (math.ceil(size / (64 * side * side)), 64, side, side)
    yield "group norm, 8 groups of feature maps", shape, _group_norm, (64,)
    yield "batch norm of feature maps", shape, _batch_norm, (64,)
    yield "batch norm of rows", (size // 256, 256), _batch_norm, (256,)


def _layer_norm(x: Any, weight: Any, bias: Any) -> Any:
    return pn.vjp(pn.layer_norm, x, weight, bias)


def _rms_norm(x: Any, weight: Any, bias: Any) -> Any:
    return pn.vjp(pn.rms_norm, x, weight)


def _group_norm(x: Any, weight: Any, bias: Any) -> Any:
    return pn.vjp(pn.group_norm, x, 8, weight, bias)


def _batch_norm(x: Any, weight: Any, bias: Any) -> Any:
    return pn.vjp(pn.batch_norm, x, weight, bias)


def bandwidth(cupy: Any, dtypes: tuple[str, ...], nbytes: int = BYTES, turns: int = TURNS) -> list[dict[str, Any]]:
    """GB/s forward (one read, one write) and backward (two reads, one write), and as part of a copy's."""
    rows = []
    for dtype in dtypes:
        if dtype == "bfloat16":
            importlib.import_module("ml_dtypes")  # which NumPy and CuPy have the type from
        size = nbytes // np.dtype(dtype).itemsize
        source = cupy.asarray(np.random.default_rng(0).standard_normal(size).astype(dtype))
        target = cupy.empty_like(source)
        copied = 2 * source.nbytes / milliseconds(cupy, lambda to=target, of=source: cupy.copyto(to, of), turns) / 1e6
        rows.append({"what": "copy on the device", "dtype": dtype, "GB/s": copied})
        print(f"{dtype:8} copy on the device: {copied:.0f} GB/s")
        for name, shape, norm, params in cases(size):
            x = cupy.asarray(np.random.default_rng(0).standard_normal(shape).astype(dtype))
            weight, bias = (cupy.asarray(np.random.default_rng(k).uniform(0.5, 1.5, params).astype(dtype)) for k in (1, 2))
            y, pullback = norm(x, weight, bias)
            forward = 2 * x.nbytes / milliseconds(cupy, lambda n=norm, a=(x, weight, bias): n(*a), turns) / 1e6
            backward = 3 * x.nbytes / milliseconds(cupy, lambda p=pullback, d=y: p(d), turns) / 1e6
            row = {"what": name, "dtype": dtype, "shape": list(shape), "forward GB/s": forward, "backward GB/s": backward}
            row |= {"forward of copy": forward / copied, "backward of copy": backward / copied}
            row |= {} if dtype == "bfloat16" else _torch_bandwidth(cupy, name, x, weight, bias, turns)
            rows.append(row)
            print(f"{dtype:8} {name}: forward {forward / copied:.0%} of the copy, backward {backward / copied:.0%}")
    return rows


def torch_with_cuda() -> Any:
    """torch, or `None` where it is not installed or has no GPU."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def _torch_norms(torch: Any) -> dict[str, Callable[..., Any]]:
    f = torch.nn.functional
    return {
        "layer": lambda x, w, b: f.layer_norm(x, x.shape[1:], w, b),
        "RMS": lambda x, w, b: f.rms_norm(x, x.shape[1:], w, 1e-5),
        "group": lambda x, w, b: f.group_norm(x, 8, w, b),
        "batch": lambda x, w, b: f.batch_norm(x, None, None, w, b, training=True),
    }


def _torch_bandwidth(cupy: Any, name: str, x: Any, weight: Any, bias: Any, turns: int) -> dict[str, float]:
    """The same arrays in torch: eager, compiled, and for rows a Triton kernel."""
    torch = torch_with_cuda()
    if torch is None:
        return {}
    kind = name.partition(" ")[0]
    arrays = [torch.from_dlpack(a).requires_grad_() for a in (x, weight, bias)]
    norm = _torch_norms(torch)[kind]
    found = {}
    with torch.cuda.stream(torch.cuda.ExternalStream(cupy.cuda.get_current_stream().ptr)):
        for title, function in (("torch", norm), ("torch.compile", torch.compile(norm))):
            y = function(*arrays)
            wanted = arrays if kind != "RMS" else arrays[:2]
            with torch.no_grad():
                found[f"{title} forward GB/s"] = 2 * x.nbytes / milliseconds(cupy, lambda f=function: f(*arrays), turns) / 1e6
            time = milliseconds(cupy, lambda y=y, w=wanted: torch.autograd.grad(y, w, y.detach(), retain_graph=True), turns)
            found[f"{title} backward GB/s"] = 3 * x.nbytes / time / 1e6
        if kind == "layer" and x.shape[1] <= 2**15:
            triton = importlib.import_module("benchmarks.triton_layer_norm")
            plain = [a.detach() for a in arrays]
            found["Triton forward GB/s"] = 2 * x.nbytes / milliseconds(cupy, lambda: triton.layer_norm(*plain), turns) / 1e6
    return found


# -- recurrent layers --------------------------------------------------------------------------------------------------------------------


def recurrent(cupy: Any, shape: tuple[int, int, int, int], turns: int = TURNS) -> dict[str, Any]:
    """Milliseconds of an LN-LSTM forward and of a training step, beside cuDNN's plain LSTM and a loop in torch."""
    steps, batch, inputs, hidden = shape
    x = cupy.asarray(np.random.default_rng(0).standard_normal((steps, batch, inputs)).astype(np.float32))
    layer = pn.LSTM(inputs, hidden, norm="layer", xp="cupy", rng=0)

    def train() -> None:
        y, _, pullback = layer.vjp(x)
        pullback(y)

    row: dict[str, Any] = {"shape": list(shape), "LN-LSTM forward": milliseconds(cupy, lambda: layer(x), turns)}
    row["LN-LSTM training step"] = milliseconds(cupy, train, turns)
    torch = torch_with_cuda()
    if torch is not None:
        with torch.cuda.stream(torch.cuda.ExternalStream(cupy.cuda.get_current_stream().ptr)):
            row |= _torch_recurrent(cupy, torch, x, inputs, hidden, turns)
    print(f"{shape}: " + "  ".join(f"{name} {value:.2f} ms" for name, value in row.items() if name != "shape"))
    return row


def _torch_recurrent(cupy: Any, torch: Any, x: Any, inputs: int, hidden: int, turns: int) -> dict[str, float]:
    theirs = torch.from_dlpack(x)
    plain = torch.nn.LSTM(inputs, hidden, device="cuda")
    options: dict[str, Any] = {"device": "cuda", "requires_grad": True}
    weights = [torch.randn(4 * hidden, n, **options) for n in (inputs, hidden)]
    gains = [torch.ones(n, **options) for n in (4 * hidden, 4 * hidden, hidden)]
    shifts = [torch.zeros(n, **options) for n in (4 * hidden, 4 * hidden, hidden)]
    f = torch.nn.functional

    def loop() -> Any:
        """The cell of Ba, Kiros & Hinton 2016, step by step."""
        h = c = torch.zeros(theirs.shape[1], hidden, device="cuda")
        u, ys = f.layer_norm(theirs @ weights[0].T, gains[0].shape, gains[0], shifts[0]), []
        for t in range(theirs.shape[0]):
            z = u[t] + f.layer_norm(h @ weights[1].T, gains[1].shape, gains[1], shifts[1])
            i, g_f, g, o = z.chunk(4, dim=-1)
            c = g_f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * f.layer_norm(c, gains[2].shape, gains[2], shifts[2]).tanh()
            ys.append(h)
        return torch.stack(ys)

    def forward() -> None:
        with torch.no_grad():
            loop()

    def train() -> None:
        y = loop()
        torch.autograd.grad(y, (*weights, *gains, *shifts), y.detach())

    def cudnn() -> None:
        with torch.no_grad():
            plain(theirs)

    return {
        "cuDNN plain LSTM forward": milliseconds(cupy, cudnn, turns),
        "torch LN-LSTM forward": milliseconds(cupy, forward, turns),
        "torch LN-LSTM training step": milliseconds(cupy, train, turns),
    }


def main() -> int:
    """Test, measure, write."""
    cupy = device()
    about = {"cupy": cupy.__version__, "CUDA": cupy.cuda.runtime.runtimeGetVersion(), "portnorm": pn.__version__, "turns": TURNS}
    about["device"] = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    torch = torch_with_cuda()
    about["torch"] = None if torch is None else torch.__version__
    parts: dict[str, Callable[[], Any]] = {
        "tests": tests,
        "bandwidth": lambda: bandwidth(cupy, ("float32", "float16")),
        "recurrent": lambda: [recurrent(cupy, shape) for shape in (LONG, *SMALL)],
        "bandwidth of bfloat16": lambda: bandwidth(cupy, ("bfloat16",)),
    }
    found: dict[str, Any] = {"about": about}
    for name, part in parts.items():
        found[name] = part()
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written: {RESULTS}")
    return 1 if found["tests"]["status"] else 0


if __name__ == "__main__":
    sys.exit(main())
