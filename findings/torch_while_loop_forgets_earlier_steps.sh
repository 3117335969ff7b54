#!/usr/bin/env bash
# torch 2.13.0 (CPU): autograd through the operator `while_loop` gives wrong gradients, without an error, where a state of the loop begins
# without a gradient, as a zero state does. Nothing then comes from a step to the step before: gradients are those of every step alone. So
# it is eagerly and in a program of torch.export. Where the first state has a gradient, if only of 0, they are right.
#
# Seen: h ← tanh(h W + x), five steps, from zeros: the gradient of W is off by more than a tenth of itself; from zeros plus a sum of no values
# of W it is right. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 torch==2.13.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch

torch.manual_seed(0)
weight, x = torch.randn(4, 4, requires_grad=True), torch.randn(5, 3, 4)


def steps(first):
    h = first
    for one in x:
        h = torch.tanh(h @ weight + one)
    return h


def loop(first):
    def goes_on(t, h):
        return t < 5

    def step(t, h):
        return t + 1, torch.tanh(h @ weight + x.index_select(0, t.reshape(1)).squeeze(0))

    return torch.while_loop(goes_on, step, (torch.zeros((), dtype=torch.int64), first))[1]


cotangent, zeros = torch.randn(3, 4), torch.zeros(3, 4)
expected, value = torch.autograd.grad(steps(zeros), weight, cotangent)[0], steps(zeros)
for name, first, is_right in (("zeros", zeros, False), ("zeros with a gradient", zeros + weight.flatten()[:0].sum(), True)):
    found = loop(first)
    assert torch.equal(found, value), "the behaviour has changed"
    off = (torch.autograd.grad(found, weight, cotangent)[0] - expected).abs().max() / expected.abs().max()
    print(f"from {name}: the same value; the gradient of the weights is off by {off:.1e} of its largest")
    assert (off < 1e-5) == is_right and (is_right or off > 0.1), "the behaviour has changed"
PYTHON
