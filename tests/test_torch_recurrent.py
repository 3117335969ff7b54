"""Recurrent modules in a torch model as torch's own: packed sequences, lengths, one step, attributes and methods."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from tests.cases import PRESETS

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.peers

CELLS = ["LSTM", "GRU", "RNN"]
LENGTHS = {"sorted": [5, 4, 2], "unsorted": [2, 5, 4], "one step": [1, 1, 1], "alike": [4, 4, 4]}


def pair(cell: str, layers: int = 1, bidirectional: bool = False, batch_first: bool = False, **more: Any) -> tuple[Any, Any]:
    """torch's module in float64, and ours with its weights."""
    torch.manual_seed(0)
    theirs = getattr(torch.nn, cell)(3, 4, layers, bidirectional=bidirectional, batch_first=batch_first, dtype=torch.float64, **more)
    return theirs, pn.torch_module(pn.import_checkpoint(theirs))


def states_of(theirs: Any, batch: int) -> Any:
    places = theirs.num_layers * (2 if theirs.bidirectional else 1)
    return [torch.randn(places, batch, n, dtype=torch.float64) for n in ([theirs.proj_size or 4, 4] if theirs.mode == "LSTM" else [4])]


def tensors(y: Any, state: Any) -> list[Any]:
    return [y.data, *([state] if isinstance(state, torch.Tensor) else state)]


@pytest.mark.parametrize("with_state", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize("order", LENGTHS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("cell", [*CELLS, "LSTM with projection"])
def test_packed_sequences_are_those_of_torch(
    cell: str, layers: int, bidirectional: bool, batch_first: bool, order: str, with_state: bool
) -> None:
    """Values, the order of the states, gradients of the input, the states and the parameters."""
    cell, _, projected = cell.partition(" with ")
    theirs, ours = pair(cell, layers, bidirectional, batch_first, **({"proj_size": 2} if projected else {}))
    x = torch.randn(3, 5, 3, dtype=torch.float64) if batch_first else torch.randn(5, 3, 3, dtype=torch.float64)
    found = []
    for module in (theirs, ours):
        torch.manual_seed(1)
        given = x.clone().requires_grad_()
        first = [s.requires_grad_() for s in states_of(theirs, 3)] if with_state else []
        packed = torch.nn.utils.rnn.pack_padded_sequence(given, LENGTHS[order], batch_first, enforce_sorted="unsorted" not in order)
        hx = None if not with_state else first[0] if module is theirs and cell != "LSTM" else tuple(first)
        y, after = module(packed, hx)
        results = tensors(y, after)
        loss = sum((a * torch.randn_like(a)).sum() for a in results)
        found.append((y, results, torch.autograd.grad(loss, [given, *first, *(a for _, a in sorted(module.named_parameters()))])))
    (y, expected, gradients), (mine, results, own) = found
    assert type(mine) is type(y)
    for a, b in ((mine.batch_sizes, y.batch_sizes), (mine.sorted_indices, y.sorted_indices), (mine.unsorted_indices, y.unsorted_indices)):
        assert (a is None and b is None) or torch.equal(a, b)
    for a, b in zip([*results, *own], [*expected, *gradients], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_a_packed_sequence_is_one_with_lengths(cell: str, norm: str | None, bidirectional: bool, training: bool) -> None:
    """For every variant; padding enters no statistic."""
    layer = getattr(pn, cell)(3, 4, norm=norm, bidirectional=bidirectional, t_max=3, rng=0, dtype="float64")
    module = pn.torch_module(layer).train(training)
    other, x = copy.deepcopy(module), torch.randn(5, 3, 3, dtype=torch.float64)
    expected, state = other(x, lengths=[2, 5, 4])
    y, after = module(torch.nn.utils.rnn.pack_padded_sequence(x, [2, 5, 4], enforce_sorted=False))
    padded, lengths = torch.nn.utils.rnn.pad_packed_sequence(y)
    assert lengths.tolist() == [2, 5, 4]
    for a, b in zip([padded, *after, *module.buffers()], [expected, *state, *other.buffers()], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("direction", ["forward", "reverse", "backwards"])
def test_what_is_packed_keeps_the_steps_of_its_sequence(direction: Any) -> None:
    module = pn.torch_module(pn.GRU(3, 4, direction=direction, rng=0))
    x = [torch.randn(n, 3) for n in (2, 4, 3)]
    y, _ = module(torch.nn.utils.rnn.pack_sequence(x, enforce_sorted=False))
    for found, one in zip(torch.nn.utils.rnn.unpack_sequence(y), x, strict=True):
        torch.testing.assert_close(found, module(one[:, None])[0][:, 0])


def test_packed_sequences_through_models_and_last_steps() -> None:
    model = pn.torch_module(pn.Sequential(pn.Embedding(7, 3, rng=0), pn.LSTM(3, 4, rng=0), pn.Linear(4, 2, rng=0)))
    ids = [torch.tensor([1, 2]), torch.tensor([3, 4, 5])]
    y, _ = model(torch.nn.utils.rnn.pack_sequence(ids, enforce_sorted=False))
    for found, one in zip(torch.nn.utils.rnn.unpack_sequence(y), ids, strict=True):
        torch.testing.assert_close(found, model(one[:, None])[0][:, 0])
    last = pn.torch_module(pn.LSTM(3, 4, return_sequences=False, rng=0))
    x = [torch.randn(n, 3) for n in (2, 4)]
    y, (h, _) = last(torch.nn.utils.rnn.pack_sequence(x, enforce_sorted=False))
    torch.testing.assert_close(y, h[0])


def test_what_a_packed_sequence_cannot_go_with_is_named() -> None:
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(3, 3), torch.randn(2, 3)])
    lstm = pn.torch_module(pn.LSTM(3, 4, rng=0))
    with pytest.raises(pn.UnsupportedError, match="expected no `lengths` beside it"):
        lstm(packed, lengths=[3, 2])
    with pytest.raises(pn.UnsupportedError, match="expected no `mask` beside it"):
        lstm(packed, mask=torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(pn.UnsupportedError, match=r"PackedSequence, which LayerNorm does not take; call it on `x.data`"):
        pn.torch_module(pn.LayerNorm(3))(packed)
    with pytest.raises(pn.ShapeError, match="3 features"):
        lstm(torch.nn.utils.rnn.pack_sequence([torch.randn(3, 5)]))


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.array, np.uint8, lambda n: list(np.array(n))])
@pytest.mark.parametrize("cell", CELLS)
def test_lengths_come_by_place_and_by_name(cell: str, kind: Any) -> None:
    """Third, as the signature has it; or second, as wrappers of torch's modules often have it."""
    module = pn.torch_module(getattr(pn, cell)(3, 4, rng=0))
    x, state, lengths = torch.randn(5, 3, 3), module.to_layer().initial_state(3, noise=1.0, rng=0), kind([2, 5, 0])
    torch.testing.assert_close(module(x, lengths=lengths)[0], module(x, lengths=[2, 5, 0])[0], rtol=0, atol=0)
    for given in (None, state):
        expected = module(x, state=given, lengths=[2, 5, 0])
        for found in (module(x, given, lengths), module(x, lengths, given)):
            for a, b in zip(tensors(*found), tensors(*expected), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch.testing.assert_close(pn.torch_module(pn.LayerNorm(3))(x, kind([2, 5, 0])), pn.torch_module(pn.LayerNorm(3))(x, lengths=[2, 5, 0]))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_step_by_step_is_the_whole_sequence(cell: str, norm: str | None, batch_first: bool) -> None:
    """Values, states and gradients."""
    module = pn.torch_module(getattr(pn, cell)(3, 4, norm=norm, num_layers=2, batch_first=batch_first, rng=0, dtype="float64")).eval()
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    y, last = module(x.transpose(0, 1) if batch_first else x)
    state, hs = None, []
    for one in x:
        h, state = module.step(one, state)
        hs.append(h)
    again = torch.stack(hs, 1 if batch_first else 0)
    for a, b in zip(tensors(again, state), tensors(y, last), strict=True):
        torch.testing.assert_close(a, b)
    weight = torch.randn_like(y)
    gradients = [torch.autograd.grad(found, list(module.parameters()), weight, allow_unused=True) for found in (again, y)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(pn.UnsupportedError, match="bidirectional layer cannot go step by step"):
        pn.torch_module(pn.LSTM(3, 4, bidirectional=True)).step(torch.ones(2, 3))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_a_layer_alone_steps_with_states_as_a_cell_of_torch_has_them(cell: str, norm: str | None, batch_first: bool) -> None:
    """From none, (batch, hidden) or (layers, batch, hidden), each given back as it came; a call goes on from the states of a step."""
    module = pn.torch_module(getattr(pn, cell)(3, 4, norm=norm, batch_first=batch_first, rng=0, dtype="float64")).eval()
    x, axis = torch.randn(5, 2, 3, dtype=torch.float64), int(batch_first)
    stacked = module.to_layer().initial_state(2, noise=1.0, rng=1)
    flat = tuple(a[0] if a.ndim else a for a in stacked)
    for first, shape in ((None, (2, 4)), (flat, (2, 4)), (stacked, (1, 2, 4))):
        y, last = module(x.transpose(0, 1) if batch_first else x, stacked if first is flat else first)
        hs, state = [], first
        for one in x[:3]:
            h, state = module.step(one, state)
            assert {tuple(a.shape) for a in state if a.ndim} == {shape}
            hs.append(h)
        assert torch.equal(state[0] if state[0].ndim == 2 else state[0][0], hs[-1])
        rest, state = module(x[3:].transpose(0, 1) if batch_first else x[3:], state)
        torch.testing.assert_close(torch.cat([torch.stack(hs, axis), rest], axis), y)
        for a, b in zip(state, last, strict=True):
            torch.testing.assert_close(a, b[0] if a.ndim == 2 else b)
    with pytest.raises(pn.ShapeError, match=r"`state` has h of shape \(2, 4\); expected .* = \(2, 2, 4\)"):
        pn.torch_module(getattr(pn, cell)(3, 4, norm=norm, num_layers=2, dtype="float64")).step(x[0], flat)


@pytest.mark.parametrize("cell", CELLS)
def test_a_step_is_that_of_the_cell_of_torch(cell: str) -> None:
    theirs, ours = getattr(torch.nn, f"{cell}Cell")(3, 4), pn.torch_module(getattr(pn, cell)(3, 4))
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            dict(ours.named_parameters())[f"{name}_l0"].copy_(p)
    x, state = torch.randn(2, 3), tuple(torch.randn(2, 4) for _ in range(2 if cell == "LSTM" else 1))
    expected = theirs(x, state if cell == "LSTM" else state[0])
    torch.testing.assert_close(ours.step(x, state)[1], expected if cell == "LSTM" else (expected,))
    again = theirs(x)
    torch.testing.assert_close(ours.step(x)[1], again if cell == "LSTM" else (again,))


ASKED = {
    "plain": {},
    "stack": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "no bias": {"bias": False},
    "projected": {"proj_size": 2, "num_layers": 2},
    "relu": {"nonlinearity": "relu"},
}


@pytest.mark.parametrize("kind", ASKED)
@pytest.mark.parametrize("cell", CELLS)
def test_a_module_has_all_that_torchs_has(cell: str, kind: str) -> None:
    if ("proj_size" in ASKED[kind] and cell != "LSTM") or ("nonlinearity" in ASKED[kind] and cell != "RNN"):
        with pytest.raises((TypeError, ValueError)):
            getattr(torch.nn, cell)(3, 4, **ASKED[kind])
        return
    theirs = getattr(torch.nn, cell)(3, 4, **ASKED[kind])
    ours = pn.torch_module(pn.import_checkpoint(theirs))
    names = [name for name in dir(theirs) if not name.startswith("_") and name not in dir(torch.nn.Module())]
    assert {"hidden_size", "flatten_parameters", "all_weights", "mode", "bias"} <= set(names)
    for name in names:
        value, mine = getattr(theirs, name), getattr(ours, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(mine, value)
        elif name == "all_weights":
            assert [[a.tolist() for a in row] for row in mine] == [[a.tolist() for a in row] for row in value]
        elif not callable(value):
            assert (type(mine), mine) == (type(value), value), name
    assert hasattr(ours, "nonlinearity") == (cell == "RNN")


@pytest.mark.parametrize("cell", CELLS)
def test_methods_of_torchs_modules(cell: str) -> None:
    theirs, ours = pair(cell, 2, True, batch_first=True)
    x, packed = torch.randn(3, 5, 3, dtype=torch.float64), torch.nn.utils.rnn.pack_sequence([torch.randn(3, 3, dtype=torch.float64)] * 2)
    assert ours.flatten_parameters() is None
    names = ["get_expected_hidden_size", *(["get_expected_cell_size"] if cell == "LSTM" else [])]
    for name in names:
        for given in ((x, None), (packed.data, packed.batch_sizes)):
            assert getattr(ours, name)(*given) == getattr(theirs, name)(*given)
    state: Any = states_of(theirs, 3)
    state = tuple(state) if cell == "LSTM" else state[0]
    order = torch.tensor([2, 0, 1])
    for a, b in zip(tensors(x, ours.permute_hidden(state, order)), tensors(x, theirs.permute_hidden(state, order)), strict=True):
        assert torch.equal(a, b)
    assert ours.permute_hidden(state, None) is state
    ours.check_forward_args(x, state, None)
    ours.check_forward_args(packed.data, tuple(s[:, :2] for s in state) if cell == "LSTM" else state[:, :2], packed.batch_sizes)
    with pytest.raises(pn.ShapeError, match="expected 3 axes"):
        ours.check_input(x[0], None)
    with pytest.raises(pn.DTypeError, match="float32"):
        ours.check_input(x.float(), None)
    with pytest.raises(pn.ShapeError, match="`hx`"):
        ours.check_forward_args(x[:1], state, None)


@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_parameters_are_drawn_anew(cell: str, norm: str | None) -> None:
    module = pn.torch_module(getattr(pn, cell)(3, 4, norm=norm, t_max=3, rng=0))
    before = {n: a.clone() for n, a in module.state_dict().items()}
    module.train()(torch.randn(5, 2, 3))
    torch.manual_seed(1)
    module.reset_parameters()
    fresh = {n: a.clone() for n, a in module.state_dict().items()}
    name = "weight_hh_l0.v" if norm == "weight" else "weight_hh_l0"
    assert not torch.equal(fresh[name], before[name])
    assert all(torch.equal(fresh[n], before[n]) for n, _ in module.named_buffers())
    torch.manual_seed(1)
    module.reset_parameters()
    assert all(torch.equal(module.state_dict()[n], a) for n, a in fresh.items())


def test_what_is_assigned_to_an_attribute_counts_or_is_refused() -> None:
    module = pn.torch_module(pn.LSTM(3, 4, rng=0))
    x = torch.randn(2, 5, 3)
    expected, _ = module(x.transpose(0, 1))
    module.batch_first = True
    torch.testing.assert_close(module(x)[0], expected.transpose(0, 1))
    module.dropout = 0.0
    with pytest.raises(pn.UnsupportedError, match="hidden_size"):
        module.hidden_size = 5
