"""A recurrent layer under `torch.compile` is one node: right in value, gradient and statistics, and as quickly compiled for any length."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from portnorm.arrays import leaves
from tests.cases import IMPLEMENTATIONS, PRESETS, random_recurrent, random_state
from tests.processes import output_of
from tests.test_autodiff import assert_same

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")]

SHAPES: dict[str, dict[str, Any]] = {
    "one": {},
    "both": {"bidirectional": True, "num_layers": 2},
    "reverse": {"direction": "reverse", "batch_first": True, "num_layers": 2},
    "backwards": {"direction": "backwards", "learned_state": True},
    "last": {"return_sequences": False, "bidirectional": True, "batch_first": True},
}
GIVEN = ("nothing", "state", "lengths", "mask")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Nothing that another test compiled decides what is compiled here."""
    import torch

    torch.compiler.reset()
    yield
    torch.compiler.reset()


def call_of(layer: Any, given: str, steps: int, rng: np.random.Generator) -> tuple[Any, dict[str, Any]]:
    """`x` and keywords, as tensors."""
    import torch

    x = torch.tensor(rng.standard_normal((4, steps, 4) if layer.batch_first else (steps, 4, 4)), requires_grad=True)
    lengths = torch.tensor([steps, min(steps, 1), 0, max(steps - 1, 0)])
    if given == "state":
        state = tuple(torch.tensor(a) for a in random_state(layer, 4, rng))
        return x, {"state": tuple(a.requires_grad_() if a.is_floating_point() else a for a in state)}
    if given == "mask":
        mask = torch.tensor(rng.uniform(size=(4, steps) if layer.batch_first else (steps, 4)) < 0.7)
        return x, {"mask": mask}
    return x, {"lengths": lengths} if given == "lengths" else {}


def outcome(run: Callable[..., Any], module: Any, x: Any, keywords: dict[str, Any], seed: int) -> list[Any]:
    """Results, gradients to everything that has one, and buffers after the call."""
    import torch

    y, state = run(x, **keywords)
    results = [y, *(s for s in leaves(state) if s.is_floating_point())]
    others = [s for s in leaves(state) if not s.is_floating_point()]
    wanted = [x, *module.parameters(), *(s for s in leaves(keywords.get("state")) if s.requires_grad)]
    draw = np.random.default_rng(seed)
    cotangents = [torch.tensor(draw.standard_normal(tuple(r.shape))) for r in results]
    gradients = torch.autograd.grad(results, wanted, cotangents, allow_unused=True)
    return [
        *results,
        *others,
        *(torch.zeros_like(w) if g is None else g for w, g in zip(wanted, gradients, strict=True)),
        *module.buffers(),
    ]


def assert_compiled(layer: Any, given: str, training: bool, rng: np.random.Generator, steps: int = 3) -> None:
    import torch

    mine, theirs = (pn.torch_module(layer).train(training) for _ in range(2))
    x, keywords = call_of(layer, given, steps, rng)
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager", dynamic=True)
    for found, expected in zip(outcome(compiled, mine, x, keywords, 7), outcome(theirs, theirs, x, keywords, 7), strict=True):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert_same(found, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_values_gradients_and_statistics(cell: str, norm: Any, shape: str, rng: np.random.Generator) -> None:
    """Each with one of the ways to call it, in evaluation or in training; the next test has all ways."""
    layer = random_recurrent(cell, norm, rng, **SHAPES[shape])
    k = list(SHAPES).index(shape) + PRESETS.index((cell, norm))
    assert_compiled(layer, GIVEN[k % len(GIVEN)], k % 2 == 0, rng)


@pytest.mark.parametrize("steps", [0, 1, 2, 6])
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize(("cell", "norm"), [("LSTM", "layer"), ("GRU", "batch"), ("RNN", "batch-input"), ("LSTM", None)])
def test_every_way_to_call_it(cell: str, norm: Any, given: str, steps: int, rng: np.random.Generator) -> None:
    assert_compiled(random_recurrent(cell, norm, rng, bidirectional=True), given, steps > 1, rng, steps)


@pytest.mark.slow
@pytest.mark.parametrize(("cell", "norm"), IMPLEMENTATIONS)
def test_published_implementations(cell: str, norm: str, rng: np.random.Generator) -> None:
    layer = random_recurrent(cell, norm, rng)
    assert_compiled(layer, "state", not layer.variant.zoneout, rng)


def test_a_row_of_ones_own(rng: np.random.Generator) -> None:
    """Whose text has quotes, and numbers that no literal names."""
    row = dataclasses.replace(pn.VARIANTS["LSTM"]["layer"], source="'mine' \"of\" {2026}\n", clip=float("inf"), eps=1e-3)
    assert_compiled(random_recurrent("LSTM", row, rng), "lengths", True, rng)


def test_a_layer_is_followed_outside_of_modules_too(rng: np.random.Generator) -> None:
    """Its pure form, and what is changed about it after it was compiled."""
    import torch

    layer = random_recurrent("GRU", "batch", rng).to(xp="torch")
    compiled = torch.compile(lambda x: layer.apply(layer.params, layer.buffers, x, training=True), fullgraph=True, backend="aot_eager")
    x = torch.tensor(rng.standard_normal((5, 4, 4)))
    for momentum in (0.1, 0.7, None):
        layer.momentum = momentum
        for found, expected in zip(leaves(compiled(x)), leaves(layer.apply(layer.params, layer.buffers, x, training=True)), strict=True):
            assert_same(found, expected)


@pytest.mark.parametrize("training", [False, True])
def test_a_sequential_is_one_node(training: bool, rng: np.random.Generator) -> None:
    """With one part that evaluates, one that is there twice, and the state of one of two."""
    import torch

    shared = random_recurrent("GRU", "layer", rng, hidden=4)
    frozen = pn.BatchNorm(4, channel_axis=-1, dtype="float64").eval()
    frozen.buffers["running_mean"] = rng.standard_normal(4)
    layer = pn.Sequential(frozen, shared, random_recurrent("LSTM", "batch", rng, hidden=4), shared, pn.Linear(4, 2, dtype="float64", rng=0))
    mine, theirs = (pn.torch_module(layer).train(training) for _ in range(2))
    x = torch.tensor(rng.standard_normal((5, 4, 4)), requires_grad=True)
    state = (None, tuple(torch.tensor(a) for a in random_state(layer.parts[2], 4, rng)), None)
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    graphs: list[Any] = []
    torch.compile(mine, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)(x, state)
    assert sum("portnorm.layer" in str(node.target) for node in graphs[0].graph.nodes) == 1
    theirs.load_state_dict(mine.state_dict())
    for found, expected in zip(
        outcome(compiled, mine, x, {"state": state}, 3), outcome(theirs, theirs, x, {"state": state}, 3), strict=True
    ):
        assert_same(found, expected)


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize(("cell", "norm"), [("LSTM", "layer"), ("GRU", "batch")])
def test_no_length_and_no_batch_is_compiled_twice(cell: str, norm: str, given: str, rng: np.random.Generator) -> None:
    import torch
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    layer = random_recurrent(cell, norm, rng, bidirectional=True)
    module = pn.torch_module(layer)
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for steps in (8, 100, 5, 3, 17):
        x, keywords = call_of(layer, given, steps, rng)
        compiled(x, **keywords)[0].sum().backward()
    assert counter.frame_count <= 2  # for the first length, and for all
    assert counter.op_count < 200  # of both graphs; the loop written out has as many for every two steps


def test_layers_that_differ_in_their_configuration_alone(rng: np.random.Generator) -> None:
    """With arrays of the same names and shapes, so that nothing else tells them apart."""
    import torch

    x = torch.tensor(rng.standard_normal((5, 4, 4)))
    for norm in ("layer", "layer-state", "layer"):
        module = pn.torch_module(random_recurrent("LSTM", norm, rng)).eval()
        assert_same(torch.compile(module, backend="aot_eager")(x)[0], module(x)[0])


def test_under_export_the_definition_stays_visible(rng: np.random.Generator, tmp_path: Any) -> None:
    """The program is loaded and run by a process in which portnorm cannot be imported."""
    import torch

    x = torch.tensor(rng.standard_normal((5, 4, 4)))
    for strict in (False, True):
        module = pn.torch_module(random_recurrent("GRU", "layer", rng)).eval()
        program = torch.export.export(module, (x,), strict=strict)
        assert not any("portnorm" in str(node.target) for node in program.graph.nodes)
        torch.export.save(program, tmp_path / "m.pt2")
        np.save(tmp_path / "x.npy", x.numpy())
        np.save(tmp_path / "y.npy", module(x)[0].detach().numpy())
        code = f"""
import sys
sys.modules["portnorm"] = sys.modules["portnorm_backends"] = None
import numpy, torch
run = torch.export.load({str(tmp_path / "m.pt2")!r}).module()
x, y = (torch.tensor(numpy.load({str(tmp_path)!r} + name)) for name in ("/x.npy", "/y.npy"))
print(bool(torch.allclose(run(x)[0], y)))
"""
        assert output_of(code) == "True"


@pytest.mark.slow
def test_a_graph_from_disk_computes_the_layer_that_it_was_compiled_for(tmp_path: Any) -> None:
    """Two processes with one cache: in the second another layer is compiled first."""
    code = """
import sys, torch, portnorm as pn
torch.manual_seed(0)
x = torch.randn(5, 4, 3)
for norm in NORMS:
    module = pn.torch_module(pn.LSTM(3, 4, norm=norm, rng=0)).eval()
    with torch.no_grad():
        assert torch.allclose(torch.compile(module)(x)[0], module(x)[0], atol=1e-6)
counters = torch._dynamo.utils.counters
print(counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"])
"""
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    assert output_of(code.replace("NORMS", "['layer']"), **cache) == "0"
    output_of(code.replace("NORMS", "['layer-state', 'layer', 'layer']"), **cache)


def test_what_has_no_text_is_followed(rng: np.random.Generator) -> None:
    """A function of the user's that sums over processes, and a class of the user's."""
    import torch

    mine_too = type("RNN", (pn.RNN,), {})
    x = torch.tensor(rng.standard_normal((3, 4, 4)))
    for layer in (pn.RNN(4, 3, norm="batch", reduce=lambda a: 2.0 * a, dtype="float64", rng=0), mine_too(4, 3, dtype="float64", rng=0)):
        mine, theirs = (pn.torch_module(layer) for _ in range(2))
        y, expected = torch.compile(mine, fullgraph=True, backend="aot_eager")(x)[0], theirs(x)[0]
        assert_same(y, expected)
        for found, buffer in zip(mine.buffers(), theirs.buffers(), strict=True):
            assert_same(found, buffer)


TRANSFORMS = ("grad", "vmap", "jvp")


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("how", TRANSFORMS)
def test_transformations_of_torch_are_followed(how: str, where: str, rng: np.random.Generator) -> None:
    """Compiled as a whole, and of what is compiled."""
    import torch

    module = pn.torch_module(random_recurrent("GRU", "layer", rng))
    x = torch.tensor(rng.standard_normal((3, 2, 4)))
    given = torch.stack([x, x + 1.0]) if how == "vmap" else x

    def transformed(function: Any, x: Any) -> Any:
        if how == "jvp":
            return torch.func.jvp(lambda a: function(a)[0], (x,), (torch.ones_like(x),))[1]
        return torch.func.vmap(lambda a: function(a)[0])(x) if how == "vmap" else torch.func.grad(lambda a: function(a)[0].sum())(x)

    def compiled(function: Any) -> Any:
        return torch.compile(function, backend="aot_eager")

    run = compiled(lambda x: transformed(module, x)) if where == "inside" else lambda x: transformed(compiled(module), x)
    assert_same(run(given), transformed(module, given))


def test_a_second_derivative_is_refused_by_name(rng: np.random.Generator) -> None:
    import torch

    module = pn.torch_module(random_recurrent("GRU", "layer", rng))
    x = torch.tensor(rng.standard_normal((3, 2, 4)), requires_grad=True)
    y, _ = torch.compile(module, backend="eager")(x)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(pn.UnsupportedError, match=r"for second derivatives use torch\.func"):
        dx.sum().backward()


def test_an_error_of_the_layer_comes_through(rng: np.random.Generator) -> None:
    import torch

    module = pn.torch_module(random_recurrent("LSTM", "batch", rng))
    compiled = torch.compile(module, backend="aot_eager")
    with pytest.raises(Exception, match="needs at least two"):
        compiled(torch.tensor(rng.standard_normal((3, 1, 4))))
    with pytest.raises(Exception, match=r"expected .*\b4\b"):
        compiled(torch.tensor(rng.standard_normal((3, 2, 5))))


@pytest.mark.slow
def test_compiling_takes_no_longer_for_more_steps_nor_than_a_loop_of_torch() -> None:
    """In a process of its own, without caches: T = 8, T = 100, and torch's cell in a Python loop at T = 8."""
    import benchmarks.compile_time

    times = benchmarks.compile_time.measured()
    assert times["portnorm, 100 steps"] < 1.5 * times["portnorm, 8 steps"] + 0.5
    assert max(times["portnorm, 8 steps"], times["portnorm, 100 steps"]) <= times["loop of torch.nn.LSTMCell, 8 steps"]
