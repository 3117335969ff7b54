"""How long torch.compile takes for a recurrent layer of portnorm, and for a plain loop of torch over an LSTM cell.

    python -m benchmarks.compile_time

Each in a process of its own, without caches on disk, first call and backward pass, after something small was compiled.
"""

from __future__ import annotations

import os
import subprocess
import sys

_CODE = """
import time, torch, portnorm as pn
torch.set_num_threads(1)


class Loop(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = torch.nn.LSTMCell(8, 16)

    def forward(self, x):
        h = c = x.new_zeros(x.shape[1], 16)
        outputs = []
        for t in range(x.shape[0]):
            h, c = self.cell(x[t], (h, c))
            outputs.append(h)
        return torch.stack(outputs), (h, c)


def run(function, x):
    y = function(x)
    (y[0] if isinstance(y, tuple) else y).square().sum().backward()


run(torch.compile(torch.nn.Linear(8, 8)), torch.ones(2, 8, requires_grad=True))
module = {module}
x = torch.randn({steps}, 4, 8, requires_grad=True)
started = time.perf_counter()
run(torch.compile(module, fullgraph=True), x)
print(time.perf_counter() - started)
"""

_LAYER = 'pn.torch_module(pn.LSTM(8, 16, norm="layer", rng=0))'
CASES = {
    "portnorm, 8 steps": (_LAYER, 8),
    "portnorm, 100 steps": (_LAYER, 100),
    "loop of torch.nn.LSTMCell, 8 steps": ("Loop()", 8),
}


def measured() -> dict[str, float]:
    """Seconds, by case."""
    environment = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    found = {}
    for name, (module, steps) in CASES.items():
        code = _CODE.format(module=module, steps=steps)
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, check=True)
        found[name] = float(done.stdout)
    return found


if __name__ == "__main__":
    for name, seconds in measured().items():
        print(f"{name:40} {seconds:6.2f} s")
