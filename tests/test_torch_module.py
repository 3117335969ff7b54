"""Layers of portnorm as modules of torch, and modules of torch swapped for them."""

from __future__ import annotations

import copy
import doctest
import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from tests.cases import PRESETS
from tests.oracles import PUBLISHED, D, Published
from tests.processes import output_of
from tests.tolerances import PUBLISHED_FLOAT64, RECURRENT

LAYERS: dict[str, Callable[..., pn.Layer]] = {
    "LayerNorm": lambda **kw: pn.LayerNorm(4, **kw),
    "RMSNorm": lambda **kw: pn.RMSNorm(4, **kw),
    "BatchNorm": lambda **kw: pn.BatchNorm(4, channel_axis=-1, **kw),
    "BatchRenorm": lambda **kw: pn.BatchRenorm(4, channel_axis=-1, **kw),
    "GroupNorm": lambda **kw: pn.GroupNorm(2, 4, channel_axis=-1, **kw),
    "InstanceNorm": lambda **kw: pn.InstanceNorm(4, channel_axis=-1, affine=True, **kw),
    "Linear": lambda **kw: pn.Linear(4, 3, rng=0, **kw),
    "LSTM": lambda **kw: pn.LSTM(4, 5, rng=0, num_layers=2, bidirectional=True, **kw),
    "LSTM with layer norm": lambda **kw: pn.LSTM(4, 5, norm="layer", rng=0, **kw),
    "LSTM with batch norm": lambda **kw: pn.LSTM(4, 5, norm="batch", t_max=3, rng=0, **kw),
    "GRU with layer norm": lambda **kw: pn.GRU(4, 5, norm="layer", rng=0, **kw),
    "RNN with weight norm": lambda **kw: pn.RNN(4, 5, norm="weight", rng=0, **kw),
    "Sequential": lambda **kw: pn.Sequential(pn.BatchNorm(4, channel_axis=-1, **kw), pn.LSTM(4, 3, norm="layer", rng=0, **kw)),
}


WITH_BUFFERS = {
    **LAYERS,
    **{f"{cell}, {norm}": functools.partial(getattr(pn, cell), 4, 3, norm=norm, t_max=3, rng=0) for cell, norm in PRESETS},
}
"""Those of them that have buffers are what calls in training change."""


def drawn(layer: pn.Layer, rng: np.random.Generator) -> pn.Layer:
    """The layer with random gains, shifts and statistics."""
    groups = [
        {n: a + 0.3 * rng.uniform(size=a.shape).astype(a.dtype) if a.dtype.kind == "f" else a for n, a in group.items()}
        for group in (layer.params, layer.buffers)
    ]
    layer.assign(*groups)
    return layer


# -- what needs no torch ---------------------------------------------------------------------------------------------------------------


def test_the_names_do_not_import_torch() -> None:
    code = "import sys, portnorm; assert 'torch_module' in dir(portnorm); print('torch' in sys.modules)"
    assert output_of(code) == "False"


@pytest.mark.parametrize("name", ["torch_module", "replace_modules", "export_torch"])
def test_without_torch_the_extra_is_named(name: str) -> None:
    code = f"""
import sys
sys.modules["torch"] = None
import portnorm
try:
    portnorm.{name}(None)
except portnorm.MissingExtraError as error:
    print(error)
"""
    assert output_of(code) == 'this needs the package torch, which is not installed: pip install ".[torch]" in a checkout of portnorm'


# -- a layer as a module ---------------------------------------------------------------------------------------------------------------


@pytest.mark.peers
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_values_gradients_and_statistics_are_those_of_the_layer(name: str, training: bool, rng: np.random.Generator) -> None:
    import torch

    layer = drawn(LAYERS[name](dtype="float64"), rng)
    module = pn.torch_module(layer).train(training)
    x = rng.standard_normal((5, 3, 4))
    given = torch.tensor(x, requires_grad=True)
    if layer.recurrent:
        (expected, state, pullback), (y, after) = layer.vjp(x, training=training), module(given)
        for a, b in zip(pn.arrays.leaves(after), pn.arrays.leaves(state), strict=True):
            np.testing.assert_allclose(a.detach(), b, rtol=RECURRENT["float64"], atol=RECURRENT["float64"])
    else:
        (expected, pullback), y = layer.vjp(x, training=training), module(given)
    dy = rng.standard_normal(expected.shape)
    dx, *_, grads = pullback(dy)
    y.backward(torch.tensor(dy))
    np.testing.assert_allclose(y.detach(), expected, rtol=RECURRENT["float64"], atol=RECURRENT["float64"])
    np.testing.assert_allclose(given.grad, dx, rtol=1e-9, atol=1e-9)
    assert [n for n, _ in module.named_parameters()] == sorted(grads, key=[n for n, _ in module.named_parameters()].index)
    for n, p in module.named_parameters():
        np.testing.assert_allclose(p.grad, grads[n], rtol=1e-9, atol=1e-9, err_msg=n)
    for n, a in layer.state_dict().items():
        np.testing.assert_allclose(module.state_dict()[n], a, rtol=RECURRENT["float64"], atol=RECURRENT["float64"], err_msg=n)


@pytest.mark.peers
@pytest.mark.parametrize("name", LAYERS)
def test_a_state_dict_is_one_of_the_layer_and_loads_strictly(name: str, rng: np.random.Generator, tmp_path: Path) -> None:
    import torch

    layer, module = drawn(LAYERS[name](), rng), pn.torch_module(LAYERS[name]())
    assert set(module.state_dict()) == set(layer.state_dict())
    module.load_state_dict({n: torch.tensor(a) for n, a in layer.state_dict().items()})
    torch.save(module.state_dict(), tmp_path / "m.pt")
    again = pn.torch_module(LAYERS[name]())
    again.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True))
    for n, a in layer.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[n], a)
    arrays = dict(module.state_dict())
    missing = arrays.pop(next(iter(arrays)))
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict(arrays)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*other\.weight"):
        module.load_state_dict({**module.state_dict(), "other.weight": missing})
    np.testing.assert_array_equal(
        pn.torch_module(layer).to_layer().to(xp="numpy").state_dict().popitem()[1], layer.state_dict().popitem()[1]
    )


@pytest.mark.peers
def test_statistics_follow_in_training_only(rng: np.random.Generator) -> None:
    import torch

    module = pn.torch_module(pn.BatchNorm(4))
    x = torch.tensor(5.0 + rng.standard_normal((64, 4)), dtype=torch.float32)
    buffer = module.running_mean
    module.eval()(x)
    assert not module.running_mean.any()
    module.train()(x)
    assert module.running_mean is buffer  # changed in place, as torch does, so that whoever holds it sees it
    torch.testing.assert_close(buffer, 0.1 * x.mean(0))
    assert int(module.num_batches_tracked) == 1
    assert not any(a.requires_grad for a in module.buffers())


@pytest.mark.peers
@pytest.mark.parametrize("name", [name for name, make in WITH_BUFFERS.items() if make().buffers])
@pytest.mark.parametrize("order", ["evaluation first", "training first", "both in training"])
def test_a_call_in_training_between_a_call_and_its_backward_pass(order: str, name: str, rng: np.random.Generator) -> None:
    """Gradients of the first call are those that it has alone."""
    import torch

    layer = drawn(WITH_BUFFERS[name](dtype="float64"), rng)
    shape = tuple(4 if isinstance(n, str) else n for n in layer.input_dims())
    x, other = (torch.tensor(rng.standard_normal(shape), requires_grad=True) for _ in range(2))
    first, second = {"evaluation first": (False, True), "training first": (True, False), "both in training": (True, True)}[order]
    alone, disturbed = (pn.torch_module(layer) for _ in range(2))

    def result(module: Any, given: Any, training: bool) -> Any:
        y = module.train(training)(given)
        return y[0] if layer.recurrent else y

    expected = result(alone, x, first)
    weight = torch.tensor(rng.standard_normal(tuple(expected.shape)))
    theirs = torch.autograd.grad(expected, [x, *alone.parameters()], weight)
    y = result(disturbed, x, first)
    result(disturbed, other, second)
    torch.testing.assert_close(torch.autograd.grad(y, [x, *disturbed.parameters()], weight), theirs, rtol=0, atol=0)


@pytest.mark.peers
def test_copies_and_dtypes(rng: np.random.Generator) -> None:
    import torch

    module = pn.torch_module(pn.LSTM(4, 5, norm="batch", rng=0)).eval()
    x = torch.tensor(rng.standard_normal((6, 3, 4)))
    double = copy.deepcopy(module).double()
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    y, (_, _, time) = double(x)
    assert (y.dtype, time.dtype) == (torch.float64, torch.int64)
    torch.testing.assert_close(y, module(x.float())[0].double(), rtol=1e-5, atol=1e-5)
    half = copy.deepcopy(module).to(torch.bfloat16)
    assert half(x.bfloat16())[0].dtype == torch.bfloat16
    with pytest.raises(pn.DTypeError, match=r"float64 but the layer has float32"):
        module(x)
    with torch.no_grad():
        double.weight_hh_l0.zero_()
    assert module.weight_hh_l0.any()
    assert str(module.to_layer().to(dtype="float64").dtype) == "torch.float64"


@pytest.mark.peers
def test_under_autocast_it_computes_in_its_own_dtype(rng: np.random.Generator) -> None:
    import torch

    first, module = torch.nn.Linear(4, 4), pn.torch_module(pn.LSTM(4, 5, norm="layer", rng=0))
    x = torch.tensor(rng.standard_normal((6, 3, 4)), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        between = first(x)
        y, (h, _) = module(between, tuple(torch.ones(1, 3, 5, dtype=torch.bfloat16) for _ in range(2)))
        y.sum().backward()
    assert (between.dtype, y.dtype, h.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    torch.testing.assert_close(y, module(between.float(), (torch.ones(1, 3, 5),) * 2)[0], rtol=0, atol=0)
    assert first.weight.grad is not None


@pytest.mark.peers
def test_lengths_masks_and_states_are_those_of_the_layer(rng: np.random.Generator) -> None:
    import torch

    layer = pn.LSTM(4, 5, norm="layer", batch_first=True, bidirectional=True, rng=0, dtype="float64")
    module, x = pn.torch_module(layer), rng.standard_normal((3, 6, 4))
    lengths = np.array([6, 2, 0])
    state = tuple(rng.standard_normal((2, 3, 5)) for _ in range(2))
    expected = layer(x, state, lengths)[0]
    given: Any = (torch.tensor(x), tuple(map(torch.tensor, state)))
    mask = torch.tensor(np.arange(6) < lengths[:, None])
    for y in (module(*given, lengths=torch.tensor(lengths)), module(*given, [6, 2, 0]), module(*given, mask=mask)):
        np.testing.assert_allclose(y[0].detach(), expected, rtol=RECURRENT["float64"], atol=RECURRENT["float64"])
    forward = pn.torch_module(pn.GRU(4, 5, norm="layer", rng=0, dtype="float64"))
    whole, _ = forward(given[0])
    first, between = forward(given[0][:2])
    torch.testing.assert_close(torch.cat([first, forward(given[0][2:], between)[0]]), whole)


@pytest.mark.peers
def test_errors_are_those_of_the_layer() -> None:
    import torch

    with pytest.raises(pn.UnsupportedError, match="`layer` is a Linear; expected a layer of portnorm"):
        pn.torch_module(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    norm, lstm = pn.torch_module(pn.LayerNorm(3)), pn.torch_module(pn.LSTM(3, 2, rng=0))
    with pytest.raises(pn.UnsupportedError, match="`state` is given"):
        norm(torch.ones(2, 3), torch.ones(2))
    with pytest.raises(pn.ShapeError, match=r"\(4, 2, 5\)"):
        lstm(torch.ones(4, 2, 5))
    with pytest.raises(pn.ShapeError, match="`lengths` reach from 1 to 9"):
        lstm(torch.ones(4, 2, 3), lengths=torch.tensor([1, 9]))
    with pytest.raises(pn.DTypeError, match="expected integers"):
        pn.torch_module(pn.Embedding(3, 2, rng=0))(torch.ones(2))


@pytest.mark.peers
def test_it_trains_with_an_optimizer_and_functions_of_torch(rng: np.random.Generator) -> None:
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(pn.torch_module(pn.Embedding(7, 6, rng=0)), pn.torch_module(pn.LayerNorm(6)), torch.nn.Linear(6, 7))
    ids = torch.arange(7)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(ids), (ids + 1) % 7)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    module = pn.torch_module(pn.LSTM(3, 4, norm="layer", rng=0, dtype="float64")).eval()
    x = torch.tensor(rng.standard_normal((5, 2, 3)))

    def total(params: Any) -> Any:
        return torch.func.functional_call(module, params, x)[0].square().sum()

    grads = torch.func.grad(total)(dict(module.named_parameters()))
    total(dict(module.named_parameters())).backward()
    for n, p in module.named_parameters():
        torch.testing.assert_close(grads[n], p.grad)


@pytest.mark.peers
def test_parametrizations_of_torch_are_seen(rng: np.random.Generator) -> None:
    import torch

    module = pn.torch_module(pn.LSTM(3, 4, norm="layer", rng=0))
    x = torch.tensor(rng.standard_normal((5, 2, 3)), dtype=torch.float32)
    y, _ = module(x)
    torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    again, _ = module(x)
    torch.testing.assert_close(again, y, rtol=1e-5, atol=1e-5)
    again.sum().backward()
    assert dict(module.named_parameters())["parametrizations.weight_hh_l0.original0"].grad.any()


@pytest.mark.peers
@pytest.mark.parametrize("name", ["torch_module", "torch_replace", "torch_export"])
def test_the_examples_of_the_documentation(name: str) -> None:
    import torch

    module = importlib.import_module(f"portnorm_backends.{name}")
    failed, attempted = doctest.testmod(module, extraglobs={"torch": torch})
    assert failed == 0
    assert attempted >= 3


# -- modules swapped -------------------------------------------------------------------------------------------------------------------


def published_module(case: Published, arrays: Any) -> Any:
    """A module that holds a format's arrays under its names, and computes its published cell."""
    import torch

    class PublishedModule(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, a in arrays.items():
                owner: Any = self
                for part in name.split(".")[:-1]:
                    owner = owner._modules.setdefault(part, torch.nn.Module())
                owner.register_buffer(name.rpartition(".")[2], torch.tensor(a))

        def forward(self, x: Any) -> Any:
            return torch.tensor(case.oracle({n: a.numpy() for n, a in self.state_dict().items()}, x.numpy(), False))

    return PublishedModule()


@pytest.mark.peers
@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: f"{case.format}-{case.layer}")
def test_every_format_is_swapped_with_its_weights(case: Published, rng: np.random.Generator) -> None:
    import torch

    arrays = case.arrays(rng)
    if any("." in name and not name.rpartition(".")[2] for name in arrays):
        pytest.skip("torch has no such names")
    model = torch.nn.ModuleDict({"rnn": published_module(case, arrays)})
    x = torch.tensor(rng.standard_normal((5, 3, D)))
    expected = model["rnn"](x)
    assert pn.replace_modules(model, {type(model["rnn"]): case.format}, **case.config) == ["rnn"]
    y = model["rnn"].eval()(x)
    np.testing.assert_allclose(y.detach(), expected, rtol=PUBLISHED_FLOAT64, atol=PUBLISHED_FLOAT64)


@pytest.mark.peers
@pytest.mark.parametrize("example", [False, True], ids=["random", "example"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_swapped_module_is_called_as_before(bidirectional: bool, example: bool) -> None:
    """fastrnns: states go in as a list over layers, and come out so."""
    import torch

    from tests.torch_cells import StackedLSTM

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front = torch.nn.Linear(3, 4)
            self.encoder = torch.nn.ModuleDict({"rnn": StackedLSTM(4, 5, 2, bidirectional)})

        def forward(self, x: Any) -> Any:
            zeros = x.new_zeros(x.shape[1], 5)
            one = [(zeros, zeros)] * 2 if bidirectional else (zeros, zeros)
            y, states = self.encoder["rnn"](self.front(x), [one, one])
            h, c = states[1][1] if bidirectional else states[1]
            return y.sum(-1) + h.sum() + c.sum()

    torch.manual_seed(0)
    model, x = Model(), torch.randn(6, 3, 3)
    y = model(x)
    y.sum().backward()
    before = model.front.weight.grad.clone()
    assert pn.replace_modules(model, {StackedLSTM: "torch-fastrnns"}, args=x if example else None) == ["encoder.rnn"]
    model.zero_grad()
    again = model(x)
    again.sum().backward()
    torch.testing.assert_close(again, y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.front.weight.grad, before, rtol=1e-4, atol=1e-4)
    assert "encoder.rnn.weight_hh_l1" in dict(model.named_parameters())
    torch.testing.assert_close(copy.deepcopy(model)(x), again)


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "RNN with relu"])
def test_recurrent_modules_of_torch_are_swapped(kind: str) -> None:
    import torch

    torch.manual_seed(0)
    kind, _, relu = kind.partition(" with ")
    more = {"nonlinearity": relu} if relu else {}
    theirs = getattr(torch.nn, kind)(3, 4, num_layers=2, bidirectional=True, batch_first=True, **more)
    model, x = torch.nn.ModuleList([theirs]), torch.randn(2, 5, 3)
    pn.replace_modules(model, {torch.nn.RNNBase: "torch"})
    y, state = theirs(x)
    mine, after = model[0](x)
    torch.testing.assert_close(mine, y)
    torch.testing.assert_close(after, state)  # an array for GRU and RNN, (h, c) for LSTM
    torch.testing.assert_close(model[0](x, state)[0], theirs(x, state)[0])


@pytest.mark.peers
def test_norms_are_swapped_by_a_format_or_a_function() -> None:
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.LayerNorm(6), torch.nn.BatchNorm1d(6), torch.nn.GroupNorm(2, 6))
    model(3.0 + torch.randn(64, 6))
    x = torch.randn(5, 6)
    expected = model.eval()(x)

    def group(module: Any) -> pn.Layer:
        layer = pn.GroupNorm(module.num_groups, module.num_channels, eps=module.eps)
        layer.load_state_dict(module.state_dict())
        return layer

    table: Any = {torch.nn.LayerNorm: "torch", torch.nn.GroupNorm: group, torch.nn.BatchNorm1d: "torch"}
    assert pn.replace_modules(model, table) == ["1", "2", "3"]
    torch.testing.assert_close(model(x), expected)
    assert not model[2].training


@pytest.mark.peers
def test_a_module_that_gives_no_state(rng: np.random.Generator) -> None:
    import torch

    from tests.torch_cells import SequenceOnly

    torch.manual_seed(0)
    model = torch.nn.Sequential(SequenceOnly(3, 4), torch.nn.Linear(4, 2))
    x = torch.randn(2, 5, 3)
    y = model(x)
    assert pn.replace_modules(model, {SequenceOnly: "torch-fastrnns"}, batch_first=True) == ["0"]
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.peers
def test_a_module_at_two_places_stays_one_and_frozen_stays_frozen() -> None:
    import torch

    shared = torch.nn.LSTM(3, 3).requires_grad_(False).double()
    model = torch.nn.ModuleDict({"a": shared, "b": torch.nn.ModuleDict({"c": shared}), "d": torch.nn.LSTM(3, 3)})
    assert pn.replace_modules(model, {torch.nn.LSTM: "torch"}) == ["a", "b.c", "d"]
    assert model["a"] is model["b"]["c"]
    assert not any(p.requires_grad for p in model["a"].parameters())
    assert all(p.requires_grad for p in model["d"].parameters())
    assert next(model["a"].parameters()).dtype == torch.float64


@pytest.mark.peers
def test_what_disagrees_is_named_and_nothing_is_changed() -> None:
    import torch

    from tests.torch_cells import LayerNormLSTMCell, LSTMLayer, StackedLSTM

    class Wrong(StackedLSTM):
        def forward(self, x: Any, states: Any) -> Any:
            y, new = super().forward(x, states)
            return y + 1e-3 * y[:1], new

    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {"good": StackedLSTM(3, 4), "wrong": Wrong(3, 4), "norm": torch.nn.Sequential(torch.nn.LayerNorm(4, eps=1e-3))}
    )
    before = dict(model.named_modules())
    with pytest.raises(pn.ConformanceError, match=r"'wrong' \(Wrong\) and torch_module.*differ by .* in y; rounding allows"):
        pn.replace_modules(model, {StackedLSTM: "torch-fastrnns"})
    with pytest.raises(pn.ConformanceError, match=r"'0' \(LayerNorm\)"):
        pn.replace_modules(model["norm"], {torch.nn.LayerNorm: lambda module: pn.LayerNorm(4)})
    with pytest.raises(pn.UnsupportedError, match=r"'good\.layers\.0\.cell' \(LayerNormLSTMCell\) cannot be called with `x`.*Give `args`"):
        pn.replace_modules(model, {LayerNormLSTMCell: "torch-fastrnns"})
    with pytest.raises(pn.UnsupportedError, match="no module of GRU, RNN inside"):
        pn.replace_modules(model, {torch.nn.GRU: "torch", torch.nn.RNN: "torch"})
    with pytest.raises(pn.CheckpointError, match="haste"):
        pn.replace_modules(model, {LSTMLayer: "haste"})
    with pytest.raises(pn.UnsupportedError, match="gives a int; expected a layer"):
        pn.replace_modules(model, {LSTMLayer: lambda module: 1})  # type: ignore[dict-item, return-value]
    assert dict(model.named_modules()) == before


@pytest.mark.peers
def test_a_module_that_the_example_does_not_reach_is_not_swapped_unseen() -> None:
    import torch

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = torch.nn.GRU(3, 4), torch.nn.GRU(3, 4)

        def forward(self, x: Any) -> Any:
            return self.used(x)[0]

    with pytest.raises(pn.UnsupportedError, match=r"'unused' .*is not called while the model runs on `args`"):
        pn.replace_modules(Model(), {torch.nn.GRU: "torch"}, args=torch.ones(5, 2, 3))


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.parametrize("name", ["LayerNorm", "BatchNorm", "LSTM with layer norm"])
@pytest.mark.parametrize("training", [False, True])
def test_torch_compile_follows_a_module(name: str, training: bool, rng: np.random.Generator) -> None:
    """In one graph, values and gradients; with PyTorch's own code generation left out, which is not ours to test."""
    import torch

    torch.compiler.reset()  # other modules have been compiled, of which torch counts so many

    module = pn.torch_module(drawn(LAYERS[name](dtype="float64"), rng)).train(training)
    x = torch.tensor(rng.standard_normal((3, 5, 4)), requires_grad=True)

    def first(found: Any) -> Any:
        return found[0] if isinstance(found, tuple) else found

    expected = first(module(x))
    (dx,) = torch.autograd.grad(expected.square().sum(), x)
    found = first(torch.compile(module, fullgraph=True, backend="aot_eager")(x))
    (again,) = torch.autograd.grad(found.square().sum(), x)
    np.testing.assert_allclose(found.detach(), expected.detach(), atol=1e-12)
    np.testing.assert_allclose(again, dx, atol=1e-10)


@pytest.mark.peers
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", ["half", "bfloat16"])
def test_running_statistics_stay_wide_in_a_narrow_module(kind: str, affine: bool) -> None:
    """±400, whose variance float16 does not hold; alone, in a model, and there and back."""
    import torch

    outer = torch.nn.Sequential(pn.torch_module(pn.BatchNorm(3, affine=affine)))
    getattr(outer, kind)()
    x = torch.tensor([[400.0], [-400.0]]).repeat(8, 3).to(torch.float16 if kind == "half" else torch.bfloat16)
    for _ in range(10):
        y = outer(x)
    assert y.dtype == x.dtype
    m = outer[0]
    assert {b.dtype for n, b in m.named_buffers() if "running" in n} == {torch.float32}
    assert torch.isfinite(m.running_var).all()
    assert m.running_var.min() > 1e5
    outer.eval()
    assert outer(x).dtype == x.dtype
    assert pn.BatchNorm(3).to(xp="torch").buffers["running_var"].dtype == torch.float32
    assert m.to_layer().dtype == x.dtype
    outer.double()
    assert m.running_var.dtype == torch.float64
    assert outer(x.double()).dtype == torch.float64
