#!/usr/bin/env bash
# torch 2.13.0 (CPU): a package that AOTInductor compiles of a program with `Dim.AUTO` lengths gives as many steps as the example had, for an
# input of any other number of steps, and says nothing. torch.export takes a loop over time (nn.LSTM is one) and fixes the number of steps;
# the program itself refuses another number, since it keeps a guard, but the package keeps none. Surprising is where it happens: nn.LSTM
# alone comes out right at every length; between two Linear layers, as in any network, it does not.
#
# Seen: five steps in the example; nine given, five came back. Fails if that changes. It needs a C++ compiler.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 torch==2.13.0 setuptools==80.9.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch

AUTO = torch.export.Dim.AUTO


class Network(torch.nn.Module):
    """An LSTM between two Linear layers."""

    def __init__(self):
        super().__init__()
        self.first, self.rnn, self.last = torch.nn.Linear(4, 8), torch.nn.LSTM(8, 8), torch.nn.Linear(8, 2)

    def forward(self, x):
        return self.last(self.rnn(self.first(x))[0])


torch.manual_seed(0)
network = Network().eval()
with torch.no_grad():
    program = torch.export.export(network, (torch.randn(5, 3, 4),), dynamic_shapes=({0: AUTO, 1: AUTO},))
    package = torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(program, package_path="network.pt2"))
    for steps in (5, 9):
        x = torch.randn(steps, 3, 4)
        found, expected = package(x), network(x)
        try:
            said = f"gives {tuple(program.module()(x).shape)}"
        except Exception as error:
            said = f"refuses: {str(error).splitlines()[0]}"
        print(f"{steps} steps: the network gives {tuple(expected.shape)}, the package {tuple(found.shape)}; the program {said}")
        assert tuple(found.shape) == (5, 3, 2), "the behaviour has changed"
        assert ("refuses" in said) == (steps != 5), "the behaviour has changed"
        assert torch.allclose(found, expected[:5], atol=1e-5), "the behaviour has changed"
PYTHON
