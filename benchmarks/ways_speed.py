"""How long an LN-LSTM takes behind three doors, and the least that each door allows: `python -m benchmarks.ways_speed`, or `make ways-out`.

The least is a module written by hand that has the matrix products of the layer, cuts the result into gates, and leaves everything else
out. All of a table run in one process on one core, in turns. Results stand beside those of `ways_out.py`, as "speed".
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch.nn import functional

import portnorm as pn
from benchmarks.ways_load import executorch
from benchmarks.ways_out import RESULTS

STEPS, WIDE = 100, 512
"""Of a sequence of one case, in and out."""
INPUTS, HIDDEN = 64, 256
"""Of a step of one case."""
TURNS, SECONDS = 15, 0.1
"""Each has so many turns of so many seconds."""

ONNX = "the ONNX file in onnxruntime"

Run = Callable[[], Any]


class ByHand(torch.nn.Module):
    """One step of an LN-LSTM as one writes it with `torch.nn.functional`, or its products alone."""

    def __init__(self, features: int, hidden: int, products: bool):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(*shape, generator=generator) / hidden**0.5)

        self.hidden, self.products = hidden, products
        self.from_x, self.from_h = drawn(4 * hidden, features), drawn(4 * hidden, hidden)
        self.gains = torch.nn.ParameterList([1 + drawn(n) for n in (4 * hidden, 4 * hidden, hidden)])
        self.shift, self.late = drawn(4 * hidden), drawn(hidden)

    def of_input(self, x: Any) -> Any:
        u = functional.linear(x, self.from_x)
        return u if self.products else functional.layer_norm(u, (4 * self.hidden,), self.gains[0], self.shift)

    def goes_on(self, u: Any, h: Any, c: Any) -> tuple[Any, Any]:
        z = functional.linear(h, self.from_h)
        if self.products:
            i, f, g, o = (u + z).chunk(4, -1)
            return i + o, f + g
        i, f, g, o = (u + functional.layer_norm(z, (4 * self.hidden,), self.gains[1])).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(functional.layer_norm(c, (self.hidden,), self.gains[2], self.late)), c

    def forward(self, x: Any, h: Any, c: Any) -> tuple[Any, Any]:
        return self.goes_on(self.of_input(x), h, c)


class Sequence(torch.nn.Module):
    """All steps of it, by torch's `while_loop`."""

    def __init__(self, cell: ByHand):
        super().__init__()
        self.cell = cell

    def forward(self, x: Any) -> tuple[Any, Any, Any]:
        u = self.cell.of_input(x)
        h = x.new_zeros(x.shape[1], self.cell.hidden)

        def step(t: Any, h: Any, c: Any, y: Any) -> tuple[Any, Any, Any, Any]:
            at = t.reshape(1)
            h, c = self.cell.goes_on(u.index_select(0, at).squeeze(0), h, c)
            return t + 1, h, c, y.index_copy(0, at, h.unsqueeze(0))

        start = (torch.zeros((), dtype=torch.int64), h, h.clone(), x.new_zeros(*x.shape[:2], self.cell.hidden))
        _, h, c, y = torch.while_loop(lambda t, *_: t < x.shape[0], step, start)
        return y, h, c


class Step(torch.nn.Module):
    """A step of our layer, of arrays alone; what it gives is its state h."""

    def __init__(self, layer: pn.LSTM, exact: bool):
        super().__init__()
        self.inner = pn.torch_module(layer, exact=exact)

    def forward(self, x: Any, h: Any, c: Any) -> tuple[Any, Any]:
        _, (h, c) = self.inner.step(x, (h, c))
        return h, c


def packaged(module: torch.nn.Module, folder: Path, *, frozen: bool) -> Run:
    """By AOTInductor, with time and batch open."""
    x, example = torch.randn(STEPS, 1, WIDE), torch.randn(5, 3, WIDE)
    path = folder / f"{len([*folder.iterdir()])}.pt2"
    with torch.no_grad():
        program = torch.export.export(module.eval(), (example,), dynamic_shapes=({0: torch.export.Dim("T"), 1: torch.export.Dim("B")},))
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs={"freezing": frozen})
    package = torch._inductor.aoti_load_package(str(path))
    return lambda: package(x)


def in_onnxruntime(layer: pn.LSTM, feed: dict[str, Any], **keywords: Any) -> Run:
    model, options = pn.export(layer, None, **keywords).model, onnxruntime.SessionOptions()
    assert model is not None
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return lambda: session.run(None, feed)


def sequences(folder: Path) -> dict[str, Run]:
    """LN-LSTM of a hundred steps."""
    layer = pn.LSTM(WIDE, WIDE, norm="layer", rng=0)
    x = np.random.default_rng(0).standard_normal((STEPS, 1, WIDE)).astype("float32")
    return {
        ONNX: in_onnxruntime(layer, {"x": x}, lengths=False),
        "AOTInductor": packaged(pn.torch_module(layer), folder, frozen=False),
        "AOTInductor, freezing": packaged(pn.torch_module(layer), folder, frozen=True),
        "by hand, freezing": packaged(Sequence(ByHand(WIDE, WIDE, products=False)), folder, frozen=True),
        "its products alone, freezing": packaged(Sequence(ByHand(WIDE, WIDE, products=True)), folder, frozen=True),
    }


def interpreted(path: str) -> Callable[[list[Any]], list[Any]]:
    """A file of LiteRT on one thread, without the names that its runner looks up."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(path, num_threads=1)
    interpreter.allocate_tensors()
    taken, gives = ([d["index"] for d in details] for details in (interpreter.get_input_details(), interpreter.get_output_details()))

    def run(inputs: list[Any]) -> list[Any]:
        for index, a in zip(taken, inputs, strict=True):
            interpreter.set_tensor(index, a)
        interpreter.invoke()
        return [interpreter.get_tensor(index) for index in gives]

    return run


def phones(door: str, folder: Path) -> dict[str, Run]:
    """A step of an LN-LSTM by a door to phones."""
    from benchmarks.ways_doors import lowered_by_executorch, lowered_by_litert

    lower, load = {"LiteRT": (lowered_by_litert, interpreted), "ExecuTorch": (lowered_by_executorch, executorch)}[door]
    layer = pn.LSTM(INPUTS, HIDDEN, norm="layer", rng=0)
    modules = {
        "exact": Step(layer, exact=True),
        "`exact=False`": Step(layer, exact=False),
        "by hand": ByHand(INPUTS, HIDDEN, products=False),
        "its products alone": ByHand(INPUTS, HIDDEN, products=True),
    }
    rng = np.random.default_rng(0)
    given = [rng.standard_normal((1, n)).astype("float32") for n in (INPUTS, HIDDEN, HIDDEN)]
    runs: dict[str, Run] = {}
    for k, (name, module) in enumerate(modules.items()):
        path = folder / f"{door}{k}"
        lower(module.eval(), tuple(map(torch.as_tensor, given)), path)
        run = load(str(path))
        runs[name] = lambda run=run: run(given)
    x, h, c = given
    feed = {"x": x, "h_0": h[None], "c_0": c[None]}
    return runs | {ONNX: in_onnxruntime(layer, feed, streaming=True, input_shape=(1, INPUTS))}


def in_turns(runs: dict[str, Run]) -> list[dict[str, Any]]:
    """The least microseconds of each, over the first of them, also by turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(TURNS):
        for name, run in runs.items():
            ends, best = time.perf_counter() + SECONDS, float("inf")
            while (started := time.perf_counter()) < ends:
                run()
                best = min(best, time.perf_counter() - started)
            times[name].append(best * 1e6)
    first = next(iter(times.values()))
    rows = []
    for name, mine in times.items():
        ratios = [a / b for a, b in zip(mine, first, strict=True)]
        row = {"what": name, "microseconds": round(min(mine), 1), "ratio": round(min(mine) / min(first), 3)}
        rows.append(row | {"ratios": [round(min(ratios), 3), round(max(ratios), 3)]})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="ways-") as folder:
        found = {
            f"{STEPS} steps, {WIDE} features": in_turns(sequences(Path(folder))),
            **{f"{door}, a step, {HIDDEN} features": in_turns(phones(door, Path(folder))) for door in ("ExecuTorch", "LiteRT")},
        }
    kept = json.loads(RESULTS.read_text())
    RESULTS.write_text(json.dumps(kept | {"speed": found}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
