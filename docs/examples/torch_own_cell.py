"""A recurrent cell of your own, with names of your own, in a torch model: swapped by a function, exported for any length.

    python docs/examples/torch_own_cell.py [--out m.onnx]

The cell is Ba, Kiros & Hinton 2016, equations 20 to 22, written from `nn.LSTMCell` and `nn.LayerNorm`. The function says which of its
arrays is which of ours; `replace_modules` then runs the model before and after, so a wrong assignment is an error and not another model.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

import portnorm as pn

FEATURES, HIDDEN, CLASSES = 8, 32, 5


class MyLNLSTM(nn.Module):
    """(i, f, g, o) = LN(x W_xᵀ) + LN(h W_hᵀ) + b;  c ← σ(f) ⊙ c + σ(i) ⊙ tanh(g);  h ← σ(o) ⊙ tanh(LN(c))"""

    def __init__(self, features: int, hidden: int):
        super().__init__()
        self.hidden, self.cell = hidden, nn.LSTMCell(features, hidden, bias=False)  # whose weights are used, and not its call
        self.bias = nn.Parameter(torch.zeros(4 * hidden))
        self.ln_x, self.ln_h, self.ln_c = nn.LayerNorm(4 * hidden), nn.LayerNorm(4 * hidden), nn.LayerNorm(hidden)

    def forward(self, x: Tensor) -> Tensor:  # (time, batch, features)
        h = c = x.new_zeros(x.shape[1], self.hidden)
        ys = []
        for step in x:
            z = self.ln_x(step @ self.cell.weight_ih.T) + self.ln_h(h @ self.cell.weight_hh.T) + self.bias
            i, f, g, o = z.chunk(4, dim=-1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(self.ln_c(c))
            ys.append(h)
        return torch.stack(ys)


def ours(module: MyLNLSTM) -> pn.LSTM:
    """The layer of portnorm with the module's arrays. `layer.summary()` and docs/variants.md say which names a variant has."""
    layer = pn.LSTM(module.cell.input_size, module.hidden, norm="layer")
    arrays = {
        "weight_ih_l0": module.cell.weight_ih,  # gates in the order i, f, g, o, as in torch
        "weight_hh_l0": module.cell.weight_hh,
        "bias_l0": module.bias,
        **{f"norm_ih_l0.{name}": array for name, array in module.ln_x.named_parameters()},
        **{f"norm_hh_l0.{name}": array for name, array in module.ln_h.named_parameters()},
        **{f"norm_c_l0.{name}": array for name, array in module.ln_c.named_parameters()},
    }
    layer.load_state_dict({name: array.detach() for name, array in arrays.items()})
    return layer


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = MyLNLSTM(FEATURES, HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x))


def main(out: Path) -> None:
    torch.manual_seed(0)
    tagger, x = Tagger().eval(), torch.randn(20, 2, FEATURES)
    with torch.no_grad():
        long = torch.randn(300, 1, FEATURES)
        before = tagger(long)
    print(pn.replace_modules(tagger, {MyLNLSTM: ours}, args=x))
    print(pn.export_torch(tagger, x, out, dynamic_shapes={"x": {0: "time", 1: "batch"}}))
    (tags,) = onnxruntime.InferenceSession(str(out)).run(None, {"x": long.numpy()})
    print(f"300 steps: {np.max(np.abs(tags - before.numpy())):.1e} from the model as it was")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "tagger.onnx")
    main(parser.parse_args().out)
