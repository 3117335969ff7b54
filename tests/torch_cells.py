"""Recurrent modules as people write them in torch: fastrnns (pytorch/benchmarks/fastrnns/custom_lstms.py) without TorchScript."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class LayerNormLSTMCell(nn.Module):
    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.weight_ih = nn.Parameter(0.5 * torch.randn(4 * hidden, inputs))
        self.weight_hh = nn.Parameter(0.5 * torch.randn(4 * hidden, hidden))
        self.layernorm_i, self.layernorm_h, self.layernorm_c = nn.LayerNorm(4 * hidden), nn.LayerNorm(4 * hidden), nn.LayerNorm(hidden)
        for norm in (self.layernorm_i, self.layernorm_h, self.layernorm_c):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)

    def forward(self, x: Any, state: Any) -> Any:
        hx, cx = state
        i, f, g, o = (self.layernorm_i(x @ self.weight_ih.t()) + self.layernorm_h(hx @ self.weight_hh.t())).chunk(4, 1)
        cy = self.layernorm_c(torch.sigmoid(f) * cx + torch.sigmoid(i) * torch.tanh(g))
        hy = torch.sigmoid(o) * torch.tanh(cy)
        return hy, (hy, cy)


class LSTMLayer(nn.Module):
    def __init__(self, inputs: int, hidden: int, reverse: bool = False):
        super().__init__()
        self.cell, self.reverse = LayerNormLSTMCell(inputs, hidden), reverse

    def forward(self, x: Any, state: Any) -> Any:
        ys = []
        for step in reversed(x.unbind(0)) if self.reverse else x.unbind(0):
            y, state = self.cell(step, state)
            ys.append(y)
        return torch.stack(ys[::-1] if self.reverse else ys), state


class BidirLSTMLayer(nn.Module):
    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.directions = nn.ModuleList([LSTMLayer(inputs, hidden), LSTMLayer(inputs, hidden, reverse=True)])

    def forward(self, x: Any, states: Any) -> Any:
        found = [layer(x, state) for layer, state in zip(self.directions, states, strict=True)]
        return torch.cat([y for y, _ in found], -1), [state for _, state in found]


class StackedLSTM(nn.Module):
    """`forward(x, states)` with a list over layers: of (h, c), or of a list over directions of (h, c)."""

    def __init__(self, inputs: int, hidden: int, layers: int = 2, bidirectional: bool = False):
        super().__init__()
        wide = hidden * (2 if bidirectional else 1)
        make = BidirLSTMLayer if bidirectional else LSTMLayer
        self.layers = nn.ModuleList([make(inputs if k == 0 else wide, hidden) for k in range(layers)])

    def forward(self, x: Any, states: Any) -> Any:
        new = []
        for layer, state in zip(self.layers, states, strict=True):
            x, state = layer(x, state)
            new.append(state)
        return x, new


class SequenceOnly(nn.Module):
    """A layer from zero states that gives `y` alone, batch first."""

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.layers, self.hidden = nn.ModuleList([LSTMLayer(inputs, hidden)]), hidden

    def forward(self, x: Any) -> Any:
        zeros = x.new_zeros(x.shape[0], self.hidden)
        return self.layers[0](x.transpose(0, 1), (zeros, zeros))[0].transpose(0, 1)
