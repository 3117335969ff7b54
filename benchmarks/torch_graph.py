"""The graph that torch.onnx.export writes of a layer-normalized LSTM beside ours: `python -m benchmarks.torch_graph` measures and draws.

Writes benchmarks/results/torch_graph.json and docs/static/torch_graph.svg, the picture of the README, which is made of that file alone.
Both graphs compute the same LSTM with the same weights; lengths of the example are called free in both exports.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULT, PICTURE = ROOT / "benchmarks" / "results" / "torch_graph.json", ROOT / "docs" / "static" / "torch_graph.svg"
STEPS, OTHER = 40, 60
INPUTS, HIDDEN = 16, 32

KINDS = {
    "matrix product": ("#4c78a8", ("MatMul",)),
    "normalization": ("#e45756", ("LayerNormalization",)),
    "sigmoid, tanh": ("#54a24b", ("Sigmoid", "Tanh")),
    "sum, product": ("#b279a2", ("Add", "Mul")),
    "moving data": ("#9aa0a6", ()),
}
SIZE, GAP = 11, 2
WIDTH, LEFT = 574, 20


def measure() -> dict[str, Any]:
    """The operators of both graphs, in order, and what each gives for sequences longer than the example."""
    import numpy as np
    import onnxruntime
    import torch

    import portnorm as pn

    sys.path.insert(0, str(ROOT / "docs" / "examples"))
    from torch_speech import LSTMLayer

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = LSTMLayer(INPUTS, HIDDEN)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            zeros = x.new_zeros(x.shape[1], HIDDEN)
            return self.rnn(x, (zeros, zeros))[0]

    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(STEPS, 2, INPUTS)
    free = {"x": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=free, verbose=False)
    assert program is not None
    theirs, seconds = program.model_proto, time.perf_counter() - started
    pn.replace_modules(model, {LSTMLayer: "torch-fastrnns"}, args=x)
    report = pn.export_torch(model, x, None, dynamic_shapes={"x": {0: "time", 1: "batch"}})
    assert report.model is not None
    loop = next(n for n in report.model.graph.node if n.op_type == "Scan")
    longer = np.random.default_rng(0).standard_normal((OTHER, 2, INPUTS)).astype("float32")

    def steps_of(proto: Any) -> int:
        session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        return int(session.run(None, {"x": longer})[0].shape[0])

    return {
        "versions": {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__},
        "steps": STEPS,
        "longer": OTHER,
        "torch": {
            "nodes": [n.op_type for n in theirs.graph.node],
            "bytes": len(theirs.SerializeToString()),
            "seconds": seconds,
            "steps of the longer": steps_of(theirs),
        },
        "portnorm": {
            "nodes": [n.op_type for n in report.model.graph.node],
            "body": [n.op_type for n in next(a.g for a in loop.attribute if a.name == "body").node],
            "bytes": report.size,
            "seconds": report.seconds,
            "steps of the longer": steps_of(report.model),
        },
    }


def _color(operator: str) -> str:
    return next((color for color, operators in KINDS.values() if operator in operators), KINDS["moving data"][0])


def _square(x: float, y: float, operator: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{SIZE - GAP}" height="{SIZE - GAP}" rx="1.5" fill="{_color(operator)}"/>'


def _text(x: float, y: float, what: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}"{f" class={kind!r}" if kind else ""}>{what}</text>'.replace("'", '"')


def _kilobytes(count: int) -> str:
    return f"{count / 1000:,.0f} kB"


def _parts(found: dict[str, Any]) -> Iterator[str]:
    """The picture from top to bottom; the squares are nodes, a column for each step."""
    theirs, ours, steps = found["torch"], found["portnorm"], found["steps"]
    version = found["versions"]["torch"].partition("+")[0]
    rows = -(-len(theirs["nodes"]) // steps)
    yield _text(LEFT, 30, f"torch.onnx.export (torch {version}): {len(theirs['nodes'])} nodes, {_kilobytes(theirs['bytes'])}", "head")
    for k, operator in enumerate(theirs["nodes"]):
        yield _square(LEFT + SIZE * (k // rows), 44 + SIZE * (k % rows), operator)
    y = 44 + SIZE * rows + 18
    given, said = found["longer"], theirs["steps of the longer"]
    yield _text(LEFT, y, f"{steps} steps, written out. Given {given} steps, it returns {said}, without an error.")
    y += 42
    whole = f"{len(ours['nodes'])} nodes + {len(ours['body'])} in a loop, {_kilobytes(ours['bytes'])}"
    yield _text(LEFT, y, f"pn.export_torch: {whole}", "head")
    y += 14
    before = [operator for operator in ours["nodes"] if operator != "Scan"]
    for k, operator in enumerate(before):
        yield _square(LEFT + SIZE * k, y + 8, operator)
    x = LEFT + SIZE * len(before) + 8
    yield f'<rect x="{x}" y="{y}" width="{SIZE * len(ours["body"]) + 52}" height="{SIZE + 14}" rx="5" class="loop"/>'
    yield _text(x + 8, y + 17, "Scan")
    for k, operator in enumerate(ours["body"]):
        yield _square(x + 46 + SIZE * k, y + 8, operator)
    y += SIZE + 14 + 20
    yield _text(LEFT, y, f"One step, for any length and batch. Given {given} steps, it returns {ours['steps of the longer']}.")
    y += 34
    x = LEFT
    for name, (color, _) in KINDS.items():
        yield f'<rect x="{x:g}" y="{y - 9}" width="9" height="9" rx="1.5" fill="{color}"/>'
        yield _text(x + 14, y, name, "small")
        x += 28 + 6.4 * len(name)
    yield f"<!-- {y + 18} -->"


def picture(found: dict[str, Any]) -> str:
    """The SVG. It has a ground of its own, so that it can be read on a light and a dark page."""
    *parts, last = _parts(found)
    height = int(last.split()[1])
    style = (
        "text{font:14px system-ui,sans-serif;fill:#1f2328}.head{font-weight:600}.small{font-size:12px}"
        ".ground{fill:#fff;stroke:#d0d7de}.loop{fill:none;stroke:#57606a}"
        "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.ground{fill:#161b22;stroke:#30363d}.loop{stroke:#9198a1}}"
    )
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img">\n'
        f"<title>A layer-normalized LSTM as an ONNX graph: written out step by step by torch, one Scan by portnorm</title>\n"
        f"<style>{style}</style>\n"
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8" class="ground"/>\n{body}\n</svg>\n'
    )


def main() -> None:
    """Measure, keep, draw."""
    found = measure()
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    PICTURE.write_text(picture(found))


if __name__ == "__main__":
    main()
