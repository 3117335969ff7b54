"""A speech-like torch model with an LSTM of its own: trained, its LSTM swapped for portnorm's, exported as a whole, run at any length.

    python docs/examples/torch_speech.py [--out m.onnx]

The model has a convolution in front that halves the frame rate, a stack of layer-normalized LSTMs written as in fastrnns of
pytorch/benchmarks, and a linear head with one class per frame. torch's exporter writes the LSTM's loop out, step by step, for the one
length that it sees; in the graph of portnorm it is one `Scan` per layer.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

import portnorm as pn

MELS, HIDDEN, LAYERS, CLASSES = 40, 96, 2, 12
State = tuple[Tensor, Tensor]


class LayerNormLSTMCell(nn.Module):
    """One step: LN(x W_ihᵀ) + LN(h W_hhᵀ), c ← LN(σ(f) ⊙ c + σ(i) ⊙ tanh(g)), h ← σ(o) ⊙ tanh(c)."""

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.weight_ih = nn.Parameter(torch.randn(4 * hidden, inputs) / inputs**0.5)
        self.weight_hh = nn.Parameter(torch.randn(4 * hidden, hidden) / hidden**0.5)
        self.layernorm_i, self.layernorm_h = nn.LayerNorm(4 * hidden), nn.LayerNorm(4 * hidden)
        self.layernorm_c = nn.LayerNorm(hidden)

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        h, c = state
        i, f, g, o = (self.layernorm_i(x @ self.weight_ih.t()) + self.layernorm_h(h @ self.weight_hh.t())).chunk(4, 1)
        c = self.layernorm_c(torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g))
        h = torch.sigmoid(o) * torch.tanh(c)
        return h, (h, c)


class LSTMLayer(nn.Module):
    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.cell = LayerNormLSTMCell(inputs, hidden)

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        ys = []
        for step in x.unbind(0):
            y, state = self.cell(step, state)
            ys.append(y)
        return torch.stack(ys), state


class LayerNormLSTM(nn.Module):
    """A stack of layers, with a list of their states."""

    def __init__(self, inputs: int, hidden: int, layers: int):
        super().__init__()
        self.layers = nn.ModuleList([LSTMLayer(hidden if k else inputs, hidden) for k in range(layers)])

    def forward(self, x: Tensor, states: list[State]) -> tuple[Tensor, list[State]]:
        after = []
        for layer, state in zip(self.layers, states, strict=True):
            x, state = layer(x, state)
            after.append(state)
        return x, after


class SpeechModel(nn.Module):
    """(batch, mels, frames) to (batch, frames / 2, classes)."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Conv1d(MELS, HIDDEN, 3, stride=2, padding=1)
        self.rnn = LayerNormLSTM(HIDDEN, HIDDEN, LAYERS)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.front(x)).permute(2, 0, 1)
        zeros = x.new_zeros(x.shape[1], HIDDEN)
        y, _ = self.rnn(x, [(zeros, zeros)] * LAYERS)
        return self.head(y).transpose(0, 1)


def batch_of(frames: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sounds that are one of the classes from some frame on, and the class of every second frame."""
    kinds = torch.randint(0, CLASSES, (count, 2), generator=generator)
    turn = torch.randint(1, frames, (count, 1), generator=generator)
    labels = torch.where(torch.arange(frames) < turn, kinds[:, :1], kinds[:, 1:])
    bands = torch.nn.functional.one_hot(labels * (MELS // CLASSES), MELS).transpose(1, 2)
    return 2.0 * bands + 0.5 * torch.randn(count, MELS, frames, generator=generator), labels[:, ::2]


def train(model: nn.Module, updates: int, generator: torch.Generator) -> list[float]:
    """The loss of each update."""
    optimizer, losses = torch.optim.Adam(model.parameters(), 3e-3), []
    model.train()
    for _ in range(updates):
        x, labels = batch_of(24, 16, generator)
        loss = nn.functional.cross_entropy(model(x).transpose(1, 2), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def session(model: bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def latency(run: Any, x: Any) -> float:
    """Milliseconds of one call, the median of nine."""
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        run.run(None, {run.get_inputs()[0].name: x})
        seconds.append(time.perf_counter() - started)
    return 1e3 * float(np.median(seconds[1:]))


def nodes(graph: Any) -> int:
    """All nodes, those inside of loops too."""
    return sum(1 + sum(nodes(a.g) for a in n.attribute if a.type == onnx.AttributeProto.GRAPH) for n in graph.node)


def main(path: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    model = SpeechModel()
    losses = train(model, 20, generator)
    print(f"trained with the LSTM in torch:    loss {losses[0]:.2f} to {losses[-1]:.2f} in 20 updates")

    frames = 12
    x, _ = batch_of(frames, 1, generator)
    model.eval()
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        unrolled = torch.onnx.export(model, (x,), dynamo=True, opset_version=18, verbose=False)
    assert unrolled is not None
    proto = unrolled.model_proto
    seconds = time.perf_counter() - started
    data = proto.SerializeToString()
    print(f"torch.onnx.export, {frames} frames only: {seconds:5.1f} s, {nodes(proto.graph):4} nodes, {len(data):,} bytes")
    as_unrolled = latency(session(data), x.numpy())

    swapped = pn.replace_modules(model, {LayerNormLSTM: "torch-fastrnns"}, args=x)
    print(f"swapped for portnorm's, weights included: {', '.join(swapped)}")
    losses = train(model, 20, generator)
    print(f"trained on with the LSTM in portnorm: loss {losses[0]:.2f} to {losses[-1]:.2f} in 20 updates")

    example, _ = batch_of(frames, 3, generator)
    report = pn.export_torch(model, example, path, dynamic_shapes={"x": {0: "batch", 2: "frames"}})
    assert report.model is not None
    print(f"portnorm.export_torch, any length:  {report.seconds:5.1f} s, {nodes(report.model.graph):4} nodes, {report.size:,} bytes")
    print(report)

    run = session(path.read_bytes())
    print(f"\n{'frames':>7} {'batch':>6} {'ms':>8}   largest difference from torch")
    for length, count in ((2, 1), (frames, 1), (200, 1), (200, 8), (1000, 1)):
        x, _ = batch_of(length, count, generator)
        with torch.no_grad():
            expected = model.eval()(x).numpy()
        difference = float(np.abs(run.run(None, {"x": x.numpy()})[0] - expected).max())
        print(f"{length:>7} {count:>6} {latency(run, x.numpy()):>8.2f}   {difference:.1e}")
        assert difference < 1e-3
    print(f"torch's graph, {frames} frames: {as_unrolled:.2f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where the graph goes; a temporary file unless stated")
    given = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        main(given or Path(folder) / "speech.onnx")
