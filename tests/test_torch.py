"""Equal to what people trust: torch, in float64, values and gradients and running statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import portnorm as pn
from tests.tolerances import TORCH_FLOAT64

pytestmark = pytest.mark.peers


def assert_close(mine: Any, theirs: Any) -> None:
    theirs = theirs.detach().numpy() if hasattr(theirs, "detach") else theirs
    np.testing.assert_allclose(mine, theirs, rtol=TORCH_FLOAT64, atol=TORCH_FLOAT64)


NORMS = {
    "layer": (lambda x, w, b: pn.layer_norm(x, w, b), lambda f, x, w, b: f.layer_norm(x, (5,), w, b), (4, 3, 5), 5),
    "group": (lambda x, w, b: pn.group_norm(x, 2, w, b), lambda f, x, w, b: f.group_norm(x, 2, w, b), (4, 6, 5), 6),
    "instance": (lambda x, w, b: pn.instance_norm(x, w, b), lambda f, x, w, b: f.instance_norm(x, weight=w, bias=b), (4, 3, 5, 2), 3),
    "batch": (lambda x, w, b: pn.batch_norm(x, w, b), lambda f, x, w, b: f.batch_norm(x, None, None, w, b, True), (4, 3, 5, 2), 3),
}


@pytest.mark.parametrize("name", NORMS)
def test_norm(name: str, rng: np.random.Generator) -> None:
    import torch

    mine, theirs, shape, size = NORMS[name]
    x, w, b = 10.0 + rng.standard_normal(shape), rng.standard_normal(size), rng.standard_normal(size)
    tensors = [torch.tensor(a, requires_grad=True) for a in (x, w, b)]
    expected = theirs(torch.nn.functional, *tensors)
    assert_close(mine(x, w, b), expected)
    dy = rng.standard_normal(shape)
    expected.backward(torch.tensor(dy))
    op = {"layer": pn.layer_norm, "group": pn.group_norm, "instance": pn.instance_norm, "batch": pn.batch_norm}[name]
    extra = (2,) if name == "group" else ()
    cotangents = pn.vjp(op, x, *extra, w, b)[1](dy)
    for cotangent, tensor in zip((c for c in cotangents if c is not None), tensors, strict=True):
        assert_close(cotangent, tensor.grad)


def test_rms_norm(rng: np.random.Generator) -> None:
    import torch

    x, w = rng.standard_normal((4, 5)), rng.standard_normal(5)
    assert_close(pn.rms_norm(x, w), torch.nn.functional.rms_norm(torch.tensor(x), (5,), torch.tensor(w), eps=1e-5))


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (2, 3, 4, 5)])
def test_batch_norm_layer_loads_and_follows_torch(shape: tuple[int, ...], momentum: float | None, rng: np.random.Generator) -> None:
    import torch

    kind = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d}[len(shape)]
    theirs = kind(3, momentum=momentum, dtype=torch.float64)
    torch.nn.init.normal_(theirs.weight)
    mine = pn.BatchNorm(3, momentum=momentum, dtype="float64")
    mine.load_state_dict(theirs.state_dict())
    for _ in range(3):
        x = 3.0 + rng.standard_normal(shape)
        assert_close(mine(x, training=True), theirs(torch.tensor(x)))
    for name, tensor in theirs.state_dict().items():
        assert_close(mine.state_dict()[name], tensor)
    theirs.eval()
    x = rng.standard_normal(shape)
    assert_close(mine(x), theirs(torch.tensor(x)))


@pytest.mark.parametrize(
    "keywords", [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True, "num_layers": 3}], ids=["one", "both", "batch first"]
)
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_plain_layer_with_every_gradient(cell: str, keywords: dict[str, Any], rng: np.random.Generator) -> None:
    import torch

    theirs = getattr(torch.nn, cell)(4, 5, dtype=torch.float64, **keywords)
    mine = getattr(pn, cell)(4, 5, dtype="float64", **keywords)
    mine.load_state_dict(theirs.state_dict())
    x = rng.standard_normal((6, 6, 4))
    places = keywords.get("num_layers", 1) * (2 if keywords.get("bidirectional") else 1)
    state = tuple(rng.standard_normal((places, 6, 5)) for _ in mine.cell.states)
    tensors = [torch.tensor(a, requires_grad=True) for a in (x, *state)]
    expected, last = theirs(tensors[0], tuple(tensors[1:]) if cell == "LSTM" else tensors[1])
    last = last if cell == "LSTM" else (last,)
    y, mine_last, pullback = mine.vjp(x, state)
    assert_close(y, expected)
    for a, b in zip(mine_last, last, strict=True):
        assert_close(a, b)
    dy, dlast = rng.standard_normal(y.shape), tuple(rng.standard_normal(s.shape) for s in mine_last)
    torch.autograd.backward([expected, *last], [torch.tensor(dy), *map(torch.tensor, dlast)])
    dx, dstate, grads = pullback(dy, dlast)
    for a, tensor in zip((dx, *dstate), tensors, strict=True):
        assert_close(a, tensor.grad)
    for name, parameter in theirs.named_parameters():
        assert_close(grads[name], parameter.grad)


def test_ragged_lstm_is_torchs_packed_lstm(rng: np.random.Generator) -> None:
    import torch
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    theirs = torch.nn.LSTM(4, 5, bidirectional=True, dtype=torch.float64)
    mine = pn.LSTM(4, 5, bidirectional=True, dtype="float64")
    mine.load_state_dict(theirs.state_dict())
    x, lengths = rng.standard_normal((6, 3, 4)), [3, 6, 1]
    packed = pack_padded_sequence(torch.tensor(x), torch.tensor(lengths), enforce_sorted=False)
    output, last = theirs(packed)
    y, state = mine(x, lengths=lengths)
    assert_close(y, pad_packed_sequence(output)[0])
    for a, b in zip(state, last, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (pn.SGD(0.1, momentum=0.5), lambda t, p: t.optim.SGD(p, lr=0.1, momentum=0.5)),
        (pn.RMSProp(0.01, decay=0.5), lambda t, p: t.optim.RMSprop(p, lr=0.01, alpha=0.5)),
        (pn.Adam(0.01), lambda t, p: t.optim.Adam(p, lr=0.01)),
    ],
    ids=["SGD", "RMSProp", "Adam"],
)
def test_optimizer(mine: Any, theirs: Any, rng: np.random.Generator) -> None:
    import torch

    start = rng.standard_normal((3, 4))
    tensor = torch.tensor(start, requires_grad=True)
    other, params = theirs(torch, [tensor]), {"w": start}
    state = mine.init(params)
    for _ in range(5):
        gradient = rng.standard_normal((3, 4))
        tensor.grad = torch.tensor(gradient)
        other.step()
        params, state = mine.update(params, {"w": gradient}, state)
        assert_close(params["w"], tensor)


def test_clip_and_cross_entropy(rng: np.random.Generator) -> None:
    import torch

    logits, labels = rng.standard_normal((7, 4)) * 3, rng.integers(0, 4, 7)
    tensor = torch.tensor(logits, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(tensor, torch.tensor(labels))
    loss.backward()
    mine, pullback = pn.vjp(pn.softmax_cross_entropy, logits, labels)
    assert_close(mine, loss)
    gradient = pullback(np.asarray(1.0))[0]
    assert_close(gradient, tensor.grad)
    norm = torch.nn.utils.clip_grad_norm_([tensor], 0.1)
    clipped, mine_norm = pn.clip_by_global_norm({"logits": gradient}, 0.1)
    assert_close(mine_norm, norm)
    np.testing.assert_allclose(clipped["logits"], tensor.grad.numpy(), rtol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, None])
def test_weight_norm(axis: int | None, rng: np.random.Generator) -> None:
    import torch

    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 3, dtype=torch.float64), dim=axis)
    g, v = (layer.parametrizations.weight.original0, layer.parametrizations.weight.original1)
    with torch.no_grad():
        g.copy_(torch.tensor(rng.standard_normal(g.shape)))
    w, pullback = pn.vjp(pn.weight_norm, v.detach().numpy(), g.detach().numpy(), axis=axis)
    assert_close(w, layer.weight)
    dw = rng.standard_normal((3, 4))
    layer.weight.backward(torch.tensor(dw))
    for mine, theirs in zip(pullback(dw), (v, g), strict=True):
        assert_close(mine, theirs.grad)


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_weight_normalized_layer(cell: str, rng: np.random.Generator) -> None:
    import torch

    theirs = getattr(torch.nn, cell)(4, 5, dtype=torch.float64)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        torch.nn.utils.parametrizations.weight_norm(theirs, name)
        with torch.no_grad():
            theirs.parametrizations[name].original0.mul_(1.3)
    state = {n: a for n, a in theirs.state_dict().items() if n.startswith("bias")}
    for name in ("weight_ih_l0", "weight_hh_l0"):
        state |= {f"{name}.g": theirs.parametrizations[name].original0, f"{name}.v": theirs.parametrizations[name].original1}
    mine = getattr(pn, cell)(4, 5, norm="weight", dtype="float64")
    mine.load_state_dict(state)
    x = rng.standard_normal((6, 3, 4))
    assert_close(mine(x)[0], theirs(torch.tensor(x))[0])
