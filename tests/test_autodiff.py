"""torch's autograd and JAX differentiate by the hand-written vjps: they get what they would find from the definitions, in less room."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from benchmarks.tables import ROOT
from portnorm.arrays import to_numpy, without_kernels
from tests.cases import OPS, PRESETS, OpCase, random_recurrent, random_state
from tests.processes import output_of
from tests.tolerances import AUTODIFF_FLOAT64, DIFFERENCES, OPERATION, relative

pytestmark = pytest.mark.peers


def of_torch(value: Any, dtype: str = "float64", requires_grad: bool = False) -> Any:
    import torch

    if not isinstance(value, np.ndarray | np.generic):
        return value
    tensor = torch.tensor(value)
    return tensor.to(getattr(torch, dtype)).requires_grad_(requires_grad) if tensor.is_floating_point() else tensor


def of_jax(value: Any, dtype: str = "float64") -> Any:
    import jax.numpy as jnp

    if not isinstance(value, np.ndarray | np.generic):
        return value
    return jnp.asarray(value, dtype=dtype if value.dtype == np.float64 else None)


def assert_same(mine: Any, theirs: Any) -> None:
    """To rounding, relative to the largest entry."""
    mine, theirs = to_numpy(mine), to_numpy(theirs)
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=AUTODIFF_FLOAT64 * max(1.0, float(np.abs(theirs).max(initial=0.0))))


def tensors_of(case: OpCase, rng: np.random.Generator) -> tuple[list[Any], dict[str, Any], list[Any]]:
    """Arguments, keywords, and those of the arguments that are differentiated."""
    arguments = [of_torch(a, requires_grad=True) for a in case.arguments(rng)]
    keywords = {name: of_torch(value) for name, value in case.keywords.items()}
    return arguments, keywords, [a for k, a in enumerate(arguments) if getattr(a, "requires_grad", False)]


@pytest.mark.parametrize("case", OPS, ids=lambda case: case.name)
def test_autograd_of_an_op(case: OpCase, rng: np.random.Generator) -> None:
    import torch

    arguments, keywords, wanted = tensors_of(case, rng)
    y = case.op(*arguments, **keywords)
    dy = torch.tensor(rng.standard_normal(tuple(y.shape)))
    mine = torch.autograd.grad(y, wanted, dy, retain_graph=True)
    assert {leaf.name() for leaf, _ in y.grad_fn.next_functions if leaf is not None} == {"torch::autograd::AccumulateGrad"}, "one node"
    with without_kernels(torch.Tensor):
        expected = case.op(*arguments, **keywords)
        theirs = mine if case.straight_through else torch.autograd.grad(expected, wanted, dy)
    assert_same(y, expected)
    for one, other in zip(mine, theirs, strict=True):
        assert_same(one, other)
    with pytest.raises(pn.UnsupportedError, match=r"`create_graph=True` .* use torch\.func"):
        torch.autograd.grad(y, wanted, dy, create_graph=True)


@pytest.mark.parametrize("case", OPS, ids=lambda case: case.name)
def test_jax_grad_of_an_op(case: OpCase, rng: np.random.Generator) -> None:
    import jax
    import jax.numpy as jnp

    given = case.arguments(rng)
    places = [k for k, a in enumerate(given) if isinstance(a, np.ndarray) and a.dtype == np.float64]
    dy = jnp.asarray(rng.standard_normal(np.shape(case.op(*given, **case.keywords))))
    keywords = {name: of_jax(value) for name, value in case.keywords.items()}

    def value(*changed: Any) -> Any:
        arguments = [of_jax(a) for a in given]
        for k, a in zip(places, changed, strict=True):
            arguments[k] = a
        return jnp.sum(case.op(*arguments, **keywords) * dy)

    wanted = tuple(of_jax(given[k]) for k in places)
    numbers = tuple(range(len(wanted)))
    mine = jax.jit(jax.grad(value, numbers))(*wanted)
    assert str(jax.make_jaxpr(value)(*wanted)).count("custom_jvp_call") == 1
    assert str(jax.make_jaxpr(jax.linearize(value, *wanted)[1])(*wanted)).count("vjp_transposed[") == 1, "one node"
    with definitions_of_jax():
        theirs = jax.jit(jax.grad(value, numbers))(*wanted)
    for one, other in zip(mine, theirs, strict=True):
        assert_same(one, other)
    others = tuple(of_jax(case.arguments(rng)[k]) for k in places)
    mapped = jax.jit(jax.vmap(jax.grad(value, numbers)))(*(jnp.stack(pair) for pair in zip(wanted, others, strict=True)))
    for k, expected in enumerate((theirs, jax.grad(value, numbers)(*others))):
        for one, other in zip(mapped, expected, strict=True):
            assert_same(one[k], other)


def definitions_of_jax() -> Any:
    """JAX differentiates the operations themselves in here."""
    from portnorm_backends.outermost import outermost

    return outermost()


def recurrent_pair(cell: str, norm: Any, xp: str, rng: np.random.Generator, **keywords: Any) -> tuple[Any, Any, Any]:
    """A layer of the library `xp`, an input and a state of it, all random."""
    reference = random_recurrent(cell, norm, rng, **keywords)
    layer = reference.to(xp=xp)
    state = tuple(layer._new(s, integer=s.ndim == 0) for s in random_state(reference, 3, rng))
    return layer, layer._new(rng.standard_normal((5, 3, 4))), state


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("lengths", [None, [5, 2, 3]], ids=["whole", "ragged"])
@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_autograd_of_a_recurrent_layer(cell: str, norm: str | None, lengths: Any, training: bool, rng: np.random.Generator) -> None:
    import torch

    layer, x, state = recurrent_pair(cell, norm, "torch", rng, bidirectional=True)
    wanted = [x, *layer.parameters().values(), *(s for s in state if s.is_floating_point())]
    for tensor in wanted:
        tensor.requires_grad_()
    cotangents: list[Any] = []

    def results() -> list[Any]:
        found = layer.apply(layer.params, layer.buffers, x, state, None if lengths is None else torch.tensor(lengths), training)
        y, last, buffers = found
        assert not any(b.requires_grad for b in buffers.values())
        out = [y, *(s for s in last if s.is_floating_point())]
        cotangents.extend(torch.tensor(rng.standard_normal(tuple(a.shape))) for a in out if len(cotangents) < len(out))
        return [*out, *buffers.values()]

    mine = results()
    count = len(cotangents)
    assert len({a.grad_fn for a in mine[:count]}) == 1, "one node for the whole layer"
    gradients = torch.autograd.grad(mine[:count], wanted, cotangents)
    with without_kernels(torch.Tensor):
        theirs = results_of_definition(layer, x, state, lengths, training)
        expected = torch.autograd.grad(theirs[:count], wanted, cotangents)
    for one, other in zip((*mine, *gradients), (*theirs, *expected), strict=True):
        assert_same(one, other)


def results_of_definition(layer: Any, x: Any, state: Any, lengths: Any, training: bool) -> list[Any]:
    import torch

    y, last, buffers, _ = layer.forward(
        layer.params, layer.buffers, x, state, None if lengths is None else torch.tensor(lengths), training, False
    )
    return [y, *(s for s in last if s.is_floating_point()), *buffers.values()]


SOME = [
    pytest.param(cell, norm, marks=() if (cell, norm) in (("LSTM", "layer"), ("GRU", "batch")) else pytest.mark.slow, id=f"{cell}-{norm}")
    for cell, norm in PRESETS
]


@pytest.mark.parametrize(("cell", "norm"), [p for p in SOME if p.values[0] == "LSTM" or p.values[1] in ("layer", "batch")])
def test_jax_grad_of_a_recurrent_layer(cell: str, norm: str | None, rng: np.random.Generator) -> None:
    import jax
    import jax.numpy as jnp

    layer, x, state = recurrent_pair(cell, norm, "jax", rng, bidirectional=True)
    floats = len(layer.cell.states)
    weights = [jnp.asarray(rng.standard_normal(shape)) for shape in ((5, 3, 6), *(s.shape for s in state[:floats]))]

    def loss(params: Any, x: Any, start: Any) -> Any:
        y, last, buffers = layer.apply(params, layer.buffers, x, (*start, *state[floats:]), jnp.asarray([5, 2, 3]), True)
        return sum(jnp.sum(a * w) for a, w in zip((y, *last[:floats]), weights, strict=True)), buffers

    def gradients() -> Any:
        return jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(layer.params, x, state[:floats]))

    mine = gradients()
    with definitions_of_jax():
        theirs = gradients()
    for one, other in zip(mine, theirs, strict=True):
        assert_same(one, other)


def test_jax_vmap_is_one_case_after_the_other(rng: np.random.Generator) -> None:
    import jax
    import jax.numpy as jnp

    layer, _, _ = recurrent_pair("LSTM", "layer", "jax", rng)
    xs, lengths = jnp.asarray(rng.standard_normal((2, 5, 3, 4))), jnp.asarray([[5, 2, 3], [1, 5, 0]])
    weight = jnp.asarray(rng.uniform(0.5, 2.0, 4))

    def loss(params: Any, x: Any, lengths: Any) -> Any:
        return jnp.sum(jnp.sin(layer.apply(params, {}, pn.layer_norm(30.0 + x, weight), None, lengths)[0]))

    mapped = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0, 0)))(layer.params, xs, lengths)
    one = jax.jit(jax.grad(loss))
    for k in range(2):
        for name, gradient in one(layer.params, xs[k], lengths[k]).items():
            assert_same(mapped[name][k], gradient)


CLOSED_OVER: dict[str, tuple[dict[str, Any], Any, Any, Any, str]] = {
    "lengths": ({}, lambda layer, x, v: layer(x, None, v)[0], [2, 3], [2, 4], "`lengths` reach from 2 to 4"),
    "a mask": ({}, lambda layer, x, v: layer(x, mask=v)[0], [[True, True], [False, True], [True, False]], None, ""),
    "a mask of all": ({"norm": "layer"}, lambda layer, x, v: layer(x, mask=v)[0], np.ones((3, 2), bool), None, ""),
    "a first h": (
        {"quantize": "int8"},
        lambda layer, x, v: layer(x, (v, 9.0 * v))[0],
        np.full((1, 2, 3), 0.5),
        np.full((1, 2, 3), 2.0),
        "h of up to 2",
    ),
    "a time": ({"norm": "batch"}, lambda layer, x, v: layer(x, (*layer.initial_state(2)[:2], v))[0], 1, -1, "`state` has time -1"),
    "integers": ({}, lambda layer, x, v: pn.embedding(v, x[:, 0, :]), [[0, 2], [1, 1]], [[0, 3]], "`ids` reach from 0 to 3"),
    "labels": ({}, lambda layer, x, v: pn.softmax_cross_entropy(x[0], v), [0, 3], None, ""),
    "random numbers": (
        {"dropout": 0.5, "num_layers": 2},
        lambda layer, x, v: layer(x, training=True, rng=dict.fromkeys(layer.random_shapes(3, 2), v))[0],
        np.full((1, 3, 2, 3), 0.7),
        np.full((1, 3, 2, 3), 1.7),
        "numbers that do not lie from 0 to 1",
    ),
    "weights": ({}, lambda layer, x, v: pn.quantized(layer)(x)[0], 0, None, ""),
}
"""Settings of a layer, what is computed with values that are closed over, right ones, wrong ones, and what is said of these."""


@pytest.mark.parametrize("place", CLOSED_OVER)
def test_jax_looks_at_values_that_a_function_closes_over(place: str, rng: np.random.Generator) -> None:
    """Inside of `jit` JAX traces what is done to any array, also to one whose values are there."""
    import jax
    import jax.numpy as jnp

    settings, compute, right, wrong, message = CLOSED_OVER[place]
    layer, x = pn.LSTM(4, 3, xp="jax", rng=0, dtype="float64", **settings), jnp.asarray(rng.standard_normal((3, 2, 4)))

    def gradient(values: Any) -> Any:
        return jax.grad(lambda x: jnp.sum(jnp.sin(compute(layer, x, values))))

    right = jnp.asarray(right)
    assert_same(jax.jit(gradient(right))(x), gradient(right)(x))
    if wrong is not None:
        with pytest.raises(pn.PortnormError, match=message):
            jax.jit(gradient(jnp.asarray(wrong)))(x)


@pytest.mark.parametrize("norm", [None, "layer"])
def test_a_step_outside_of_jit_compiles_nothing_again(norm: Any, rng: np.random.Generator) -> None:
    """A loop of one step was compiled at each call, for a quarter of a second."""
    import jax

    layer, _, _ = recurrent_pair("LSTM", norm, "jax", rng)
    x, compiled = jax.numpy.asarray(rng.standard_normal((4, 1, 3, 4))), []
    _, state = layer(x[0])
    layer(x[1], state)
    jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **more: compiled.append(event))
    try:
        for each in (x[2], x[3]):
            _, state = layer(each, state)
        assert not [event for event in compiled if "backend_compile" in event]
        jax.jit(lambda a: a + 1.5)(x)
        assert [event for event in compiled if "backend_compile" in event]
    finally:
        jax.monitoring.clear_event_listeners()


ONE_OF_EACH = {case.op.name: case for case in reversed(OPS) if not case.straight_through}
"""Forms of one Op differ in their vjp, which is tried above; what turns a vjp into tangents is the same for all."""


@pytest.mark.parametrize("case", ONE_OF_EACH.values(), ids=lambda case: case.name)
def test_jax_forward_mode_of_an_op(case: OpCase, rng: np.random.Generator) -> None:
    """Tangents are the transposed vjp, those of the definition, and differences of values; eager, compiled, mapped, and twice."""
    import jax
    import jax.numpy as jnp

    given = case.arguments(rng)
    places = [k for k, a in enumerate(given) if isinstance(a, np.ndarray) and a.dtype == np.float64]
    keywords = {name: of_jax(value) for name, value in case.keywords.items()}

    def value(*changed: Any) -> Any:
        arguments = [of_jax(a) for a in given]
        for k, a in zip(places, changed, strict=True):
            arguments[k] = a
        return case.op(*arguments, **keywords)

    wanted = tuple(of_jax(given[k]) for k in places)
    directions = [rng.standard_normal(given[k].shape) for k in places]
    for k, direction in zip(places, directions, strict=True):  # a weight of 0 has no gradient, but differences
        direction[(given[k] == 0) & (k in case.at_zero)] = 0.0
    moved = tuple(jnp.asarray(direction) for direction in directions)
    numbers = tuple(range(len(wanted)))
    y, dy = jax.jvp(value, wanted, moved)
    assert_same(y, value(*wanted))
    assert_same(jax.jit(lambda *t: jax.jvp(value, wanted, t)[1])(*moved), dy)
    with definitions_of_jax():
        assert_same(dy, jax.jvp(value, wanted, moved)[1])
    step = 1e-6
    ahead, behind = (value(*(a + sign * step * t for a, t in zip(wanted, moved, strict=True))) for sign in (1, -1))
    difference = (ahead - behind) / (2 * step)
    np.testing.assert_allclose(dy, difference, rtol=0, atol=DIFFERENCES * max(1.0, float(jnp.max(jnp.abs(difference), initial=0.0))))
    weight = jnp.asarray(rng.standard_normal(y.shape))
    back = jax.vjp(value, *wanted)[1](weight)
    assert_same(jnp.sum(weight * dy), sum(jnp.sum(a * t) for a, t in zip(back, moved, strict=True)))
    forward = jax.jit(jax.jacfwd(value, numbers))(*wanted)
    for one, other in zip(forward, jax.jit(jax.jacrev(value, numbers))(*wanted), strict=True):
        assert_same(one, other)

    def total(*changed: Any) -> Any:
        return jnp.sum(weight * value(*changed) ** 2)

    hessians = [jax.jit(f(g(total, numbers), numbers))(*wanted) for f, g in ((jax.jacfwd, jax.jacrev), (jax.jacrev, jax.jacfwd))]
    with definitions_of_jax():
        expected = jax.tree.leaves(jax.jit(jax.jacfwd(jax.jacrev(total, numbers), numbers))(*wanted))
    for hessian in hessians:
        for one, other in zip(jax.tree.leaves(hessian), expected, strict=True):
            assert_same(one, other)
    mapped = jax.vmap(lambda *t: jax.jvp(value, wanted, t)[1])(*(jnp.stack([t, 2.0 * t]) for t in moved))
    assert_same(mapped, jnp.stack([dy, 2.0 * dy]))


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("cell", "norm"), [p for p in SOME if p.values in (("LSTM", "layer"), ("GRU", "batch"), ("RNN", None))])
def test_jax_forward_mode_of_a_recurrent_layer(cell: str, norm: str | None, training: bool, rng: np.random.Generator) -> None:
    """Beside the definition, and the backward pass: ⟨w, J·t⟩ = ⟨Jᵀ·w, t⟩; with lengths, a state, counts of steps and buffers."""
    import jax
    import jax.numpy as jnp

    layer, x, state = recurrent_pair(cell, norm, "jax", rng, bidirectional=True)
    floats = len(layer.cell.states)

    def value(params: Any, x: Any, start: Any) -> Any:
        y, last, buffers = layer.apply(params, layer.buffers, x, (*start, *state[floats:]), jnp.asarray([5, 2, 3]), training)
        return (y, last[:floats]), buffers

    primals = (layer.params, x, state[:floats])
    tangents = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape)), primals)

    def forward() -> Any:
        return jax.jit(lambda *t: jax.jvp(lambda *a: value(*a)[0], primals, t)[1])(*tangents)

    mine = forward()
    with definitions_of_jax():
        for one, other in zip(jax.tree.leaves(mine), jax.tree.leaves(forward()), strict=True):
            assert_same(one, other)
    weights = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape)), mine)
    _, back, _ = jax.vjp(value, *primals, has_aux=True)

    def product(one: Any, other: Any) -> Any:
        return sum(jnp.sum(a * b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))

    assert_same(product(weights, mine), product(back(weights), tangents))
    assert float(abs(product(weights, mine))) > 1e-3


@pytest.mark.parametrize("wrapped", ["jit", "vmap", "scan", "checkpoint", "vmap of grad", "grad of vmap"])
def test_jax_reverse_mode_calls_the_vjp_in_every_transform(wrapped: str, rng: np.random.Generator, monkeypatch: Any) -> None:
    """And never transposes it, which would be right but slower."""
    import jax
    import jax.numpy as jnp

    from portnorm_backends import jax_derivatives

    xs, w = jnp.asarray(3.0 + rng.standard_normal((3, 2, 4))), jnp.asarray(rng.uniform(0.5, 2.0, 4))

    def each(x: Any, w: Any) -> Any:
        return jnp.sum(jnp.sin(pn.layer_norm(x, w)))

    def total(xs: Any, w: Any) -> Any:
        if wrapped in ("vmap", "grad of vmap"):
            return jnp.sum(jax.vmap(each, in_axes=(0, None))(xs, w))
        if wrapped == "scan":
            return jax.lax.scan(lambda c, x: (c + each(x, w), None), 0.0, xs)[0]
        if wrapped == "checkpoint":
            return sum(jax.checkpoint(each)(x, w) for x in xs)
        return sum(each(x, w) for x in xs)

    def gradient(xs: Any, w: Any) -> Any:
        if wrapped == "vmap of grad":
            dx, dw = jax.vmap(jax.grad(each, (0, 1)), in_axes=(0, None))(xs, w)
            return dx, jnp.sum(dw, axis=0)
        return (jax.jit if wrapped != "grad of vmap" else lambda f: f)(jax.grad(total, (0, 1)))(xs, w)

    def never(*args: Any, **keywords: Any) -> Any:
        raise AssertionError("the vjp was transposed")

    monkeypatch.setattr(jax_derivatives.jax, "vjp", never)
    mine = gradient(xs, w)
    monkeypatch.undo()
    with definitions_of_jax():
        for one, other in zip(mine, gradient(xs, w), strict=True):
            assert_same(one, other)


def test_jax_differentiates_the_backward_pass_again(rng: np.random.Generator) -> None:
    import jax
    import jax.numpy as jnp

    x, w = jnp.asarray(rng.standard_normal((2, 4))), jnp.asarray(rng.uniform(0.5, 2.0, 4))

    def loss(x: Any) -> Any:
        return jnp.sum(pn.layer_norm(x, w) ** 3)

    def twice(x: Any) -> Any:
        return jax.jit(jax.jacrev(jax.grad(loss)))(x)

    mine = twice(x)
    with definitions_of_jax():
        assert_same(mine, twice(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, from torch.func.hessian
def test_torch_func_follows_the_definitions(rng: np.random.Generator) -> None:
    """Maps, forward mode and second derivatives, which the vjp alone cannot give."""
    import torch

    xs, w = torch.tensor(rng.standard_normal((3, 2, 4))), torch.tensor(rng.uniform(0.5, 2.0, 4))

    def loss(x: Any) -> Any:
        return (pn.layer_norm(x, w) ** 3).sum()

    mapped = torch.func.vmap(torch.func.grad(loss))(xs)
    for x, gradient in zip(xs, mapped, strict=True):
        x.requires_grad_()
        assert_same(gradient, torch.autograd.grad(loss(x), x)[0])
    second = torch.func.hessian(loss)(xs[0].detach())
    x = xs[0].detach().requires_grad_()
    y, pullback = pn.vjp(pn.layer_norm, x, w)
    (dx, *_), direction = pullback(3.0 * y**2), torch.tensor(rng.standard_normal((2, 4)))
    assert_same(torch.autograd.grad(dx, x, direction)[0], torch.tensordot(direction, second, 2))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("peer", ["torch", "jax"])
def test_half_precision(peer: str, dtype: str, rng: np.random.Generator) -> None:
    """Values and gradients of the type of what they belong to, near those in float64 from the same numbers."""
    import jax
    import ml_dtypes

    narrow = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    x, w, b, dy = (a.astype(narrow).astype(np.float64) for a in rng.standard_normal((4, 6, 8)))
    w, b = w[0], b[0]
    y, pullback = pn.vjp(pn.layer_norm, x, w, b)
    expected = (y, *pullback(dy))
    if peer == "torch":
        import torch

        given = [of_torch(a, dtype, True) for a in (x, w, b)]
        theirs = pn.layer_norm(*given)
        found: Any = (theirs.detach(), *torch.autograd.grad(theirs, given, of_torch(dy, dtype)))
        found = [a.to(torch.float64) for a in found if str(a.dtype) == f"torch.{dtype}"]
    else:
        theirs, of = jax.vjp(pn.layer_norm, *(of_jax(a, dtype) for a in (x, w, b)))
        found = [a.astype("float64") for a in (theirs, *of(of_jax(dy, dtype))) if a.dtype == dtype]
    for one, other in zip(found, expected, strict=True):
        scale = max(1.0, float(np.abs(other).max()))
        np.testing.assert_allclose(to_numpy(one) / scale, other / scale, **relative(dtype, OPERATION))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("peer", ["torch", "jax"])
def test_half_precision_of_a_recurrent_layer(peer: str, dtype: str, rng: np.random.Generator) -> None:
    import jax
    import jax.numpy as jnp

    layer = random_recurrent("LSTM", "layer", rng).to(xp=peer).to(dtype=dtype)
    x = layer._new(rng.standard_normal((5, 3, 4)))
    if peer == "torch":
        for p in layer.parameters().values():
            p.requires_grad_()
        layer(x)[0].sum().backward()
        gradients = {name: p.grad for name, p in layer.parameters().items()}
    else:
        gradients = jax.jit(jax.grad(lambda params: jnp.sum(layer.apply(params, {}, x)[0])))(layer.params)
    for name, gradient in gradients.items():
        assert gradient.dtype == layer.dtype, name
        assert np.isfinite(to_numpy(gradient).astype(np.float64)).all()


ONE_OF_EACH = list({case.op.name: case for case in reversed(OPS)}.values())
"""The first case of every function."""


@pytest.fixture
def fresh_compiler() -> None:
    """Nothing that an earlier test compiled decides what is compiled now."""
    import torch

    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda case: case.op.name)
def test_torch_compile_of_an_op(case: OpCase, dynamic: bool, rng: np.random.Generator, request: pytest.FixtureRequest) -> None:
    import torch

    if dynamic and case.op.name == "batch_renorm":
        why = "array_api_compat's clip asks whether a bound is NaN, and torch cannot follow that of a number that may vary"
        request.applymarker(pytest.mark.xfail(raises=torch._dynamo.exc.Unsupported, reason=why, strict=True))
    arguments, keywords, wanted = tensors_of(case, rng)
    compiled = torch.compile(lambda *given: case.op(*given, **keywords), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    y, expected = compiled(*arguments), case.op(*arguments, **keywords)
    dy = torch.tensor(rng.standard_normal(tuple(y.shape)))
    assert_same(y, expected)
    for one, other in zip(torch.autograd.grad(y, wanted, dy), torch.autograd.grad(expected, wanted, dy), strict=True):
        assert_same(one, other)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize(
    "layer", [pn.Linear(5, 3, rng=0), pn.LSTM(5, 4, norm="layer", rng=0), pn.GRU(5, 4, rng=0)], ids=lambda layer: type(layer).__name__
)
def test_gradients_of_quantized_layers_go_straight_through_whoever_follows(layer: Any, quantize: Any, rng: np.random.Generator) -> None:
    """Eagerly by the vjp; compiled, and by torch.func, from the definition."""
    import torch

    module, x = pn.torch_module(pn.quantized(layer.to(dtype="float64"), quantize)), torch.tensor(rng.standard_normal((6, 4, 5)))

    def loss(run: Any, params: Any = None) -> Any:
        given = run(x) if params is None else torch.func.functional_call(module, params, (x,))
        y = given[0] if isinstance(given, tuple) else given
        return (y * torch.linspace(-1.0, 1.0, y.numel(), dtype=y.dtype).reshape(y.shape)).sum()

    names, values = zip(*module.named_parameters(), strict=True)
    expected = torch.autograd.grad(loss(module), values)
    by_compiler = torch.autograd.grad(loss(torch.compile(module, backend="aot_eager")), values)
    by_transform = torch.func.grad(lambda p: loss(module, p))(dict(zip(names, (v.detach() for v in values), strict=True)))
    for name, one, other in zip(names, expected, by_compiler, strict=True):
        assert_same(other, one)
        assert_same(by_transform[name], one)


@pytest.mark.parametrize("case", OPS, ids=lambda case: case.name)
def test_torch_vmap_of_an_op(case: OpCase, rng: np.random.Generator) -> None:
    import torch

    arguments, keywords, wanted = tensors_of(case, rng)
    places = [k for k, a in enumerate(arguments) if any(a is w for w in wanted)]
    others = [of_torch(case.arguments(rng)[k], requires_grad=True) for k in places]
    dy = torch.tensor(rng.standard_normal(tuple(case.op(*arguments, **keywords).shape)))

    def gradients(*changed: Any) -> Any:
        def value(*changed: Any) -> Any:
            given = list(arguments)
            for k, a in zip(places, changed, strict=True):
                given[k] = a
            return case.op(*given, **keywords)

        return torch.func.vjp(value, *changed)[1](dy)

    mapped = torch.func.vmap(gradients)(*(torch.stack(pair) for pair in zip(wanted, others, strict=True)))
    for k, one_case in enumerate((wanted, others)):
        for one, other in zip(mapped, gradients(*one_case), strict=True):
            assert_same(one[k], other)


@pytest.mark.parametrize("case", OPS, ids=lambda case: case.name)
def test_torch_func_gives_the_cotangents_of_the_vjp(case: OpCase, rng: np.random.Generator) -> None:
    """What is a constant to the vjp is one to who differentiates the definition too: r and d of batch renormalization."""
    import torch

    arguments, keywords, wanted = tensors_of(case, rng)
    places = [k for k, a in enumerate(arguments) if any(a is w for w in wanted)]

    def value(*changed: Any) -> Any:
        given = list(arguments)
        for k, a in zip(places, changed, strict=True):
            given[k] = a
        return case.op(*given, **keywords)

    y, pullback = pn.vjp(case.op, *arguments, **keywords)
    dy = torch.tensor(rng.standard_normal(tuple(y.shape)))
    expected = pullback(dy)
    for k, found in zip(places, torch.func.vjp(value, *wanted)[1](dy), strict=True):
        assert_same(found, expected[k])


def assert_compiled(layer: Any, backend: str, rng: np.random.Generator) -> None:
    """Values, statistics and gradients of a layer that torch compiles as one graph are those of the layer."""
    import torch

    x, lengths = layer._new(rng.standard_normal((3, 3, 4))), torch.tensor([3, 2, 3])
    parameters = [p.requires_grad_() for p in layer.parameters().values()]

    def run(x: Any) -> Any:
        y, _, buffers = layer.apply(layer.params, layer.buffers, x, None, lengths, True)
        return y, buffers

    (y, buffers), (expected, their_buffers) = torch.compile(run, fullgraph=True, backend=backend)(x), run(x)
    assert_same(y, expected)
    for name, buffer in their_buffers.items():
        assert not buffers[name].requires_grad
        assert_same(buffers[name], buffer)
    dy = torch.tensor(rng.standard_normal(tuple(y.shape)))
    for one, other in zip(torch.autograd.grad(y, parameters, dy), torch.autograd.grad(expected, parameters, dy), strict=True):
        assert_same(one, other)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("cell", "norm"), SOME)
def test_torch_compile_of_a_recurrent_layer(cell: str, norm: str | None, rng: np.random.Generator) -> None:
    assert_compiled(random_recurrent(cell, norm, rng).to(xp="torch"), "aot_eager", rng)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, from its inductor
def test_torch_compile_to_machine_code(rng: np.random.Generator) -> None:
    assert_compiled(random_recurrent("LSTM", "layer", rng).to(xp="torch"), "inductor", rng)


@pytest.mark.slow
def test_torch_compile_may_see_the_first_array_of_all() -> None:
    """In a process that has not called portnorm before, and with warnings as errors."""
    code = (
        "import torch, portnorm as pn\n"
        "f = torch.compile(lambda x: pn.layer_norm(x), fullgraph=True, backend='aot_eager')\n"
        "print(float((f(torch.tensor([[1.0, 2.0, 4.0]])).sum())) < 1e-6)"
    )
    assert output_of(code, PYTHONWARNINGS="error") == "True"


def saved_bytes(layer: Any, x: Any) -> int:
    """What autograd keeps of a training step, parameters and input left out, each storage counted once."""
    import torch

    own = {a.untyped_storage().data_ptr() for a in (x, *layer.params.values())}
    storages = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer.apply(layer.params, {}, x)[0]
    total = sum(storage.nbytes() for storage in storages.values())
    y.sum().backward()
    return total


def test_a_training_step_keeps_less_than_autograd_would() -> None:
    import torch

    layer = pn.LSTM(32, 64, norm="layer", xp=torch, rng=0)
    for p in layer.parameters().values():
        p.requires_grad_()
    x = torch.ones((50, 8, 32))
    mine = saved_bytes(layer, x)
    with without_kernels(torch.Tensor):
        assert mine < 0.4 * saved_bytes(layer, x)  # 0.33 measured


PEAK = """
import contextlib, torch, portnorm as pn
from portnorm.arrays import without_kernels
from portnorm.bench.worker import peak_kilobytes
torch.set_num_threads(1)
layer = pn.LSTM(64, 256, norm="layer", xp=torch, rng=0)
for p in layer.parameters().values():
    p.requires_grad_()
def step(steps):
    layer.apply(layer.params, {}, torch.ones((steps, 32, 64)))[0].sum().backward()
with HOW:
    step(2)
    before = peak_kilobytes()
    step(200)
print(peak_kilobytes() - before)
"""


@pytest.mark.slow
def test_the_peak_of_a_training_step_is_lower_than_with_autograd() -> None:
    mine, theirs = (int(output_of(PEAK.replace("HOW", how))) for how in ("contextlib.nullcontext()", "without_kernels(torch.Tensor)"))
    assert mine < 0.97 * theirs  # 0.88 measured


@pytest.mark.parametrize("peer", ["torch", "jax"])
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_gradients_of_no_steps(norm: str, peer: str, rng: np.random.Generator) -> None:
    """The last state is the first, and no parameter has a part in it."""
    layer, _, state = recurrent_pair("LSTM", norm, peer, rng)
    x = layer.xp.zeros((0, 3, 4), dtype=layer.dtype)
    if peer == "torch":
        wanted = [*(p.requires_grad_() for p in layer.params.values()), *(s.requires_grad_() for s in state[:2])]
        last = layer.apply(layer.params, layer.buffers, x, state)[1]
        (last[0].sum() + 2.0 * last[1].sum()).backward()
        *of_params, dh, dc = (a.grad for a in wanted)
    else:
        import jax

        def loss(params: Any, start: Any) -> Any:
            last = layer.apply(params, layer.buffers, x, (*start, *state[2:]))[1]
            return last[0].sum() + 2.0 * last[1].sum()

        grads, (dh, dc) = jax.grad(loss, (0, 1))(layer.params, state[:2])
        of_params = list(grads.values())
    assert all(float(abs(d).max()) == 0.0 for d in of_params)
    assert bool((dh == 1.0).all())
    assert bool((dc == 2.0).all())


def test_torch_does_not_record_where_it_is_told_not_to(rng: np.random.Generator) -> None:
    import torch

    x = torch.tensor(rng.standard_normal((2, 4)), requires_grad=True)
    with torch.no_grad():
        assert not pn.layer_norm(x).requires_grad
    assert not pn.layer_norm(x.detach()).requires_grad
    assert pn.layer_norm(x).requires_grad
    with pytest.raises(pn.UnsupportedError, match="`out` cannot take a result that autograd records"):
        pn.layer_norm(x, out=torch.empty_like(x))


def test_changing_an_array_before_the_backward_pass_is_an_error(rng: np.random.Generator) -> None:
    import torch

    w = torch.ones(4, dtype=torch.float64, requires_grad=True)
    y = pn.layer_norm(torch.tensor(rng.standard_normal((2, 4))), w)
    with torch.no_grad():
        w.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_layer_stays_trainable_where_it_moves(rng: np.random.Generator) -> None:
    """Its arrays in another type or library are its own, not results that depend on the first."""
    import torch

    layer = pn.Sequential(pn.LSTM(3, 4, norm="layer", xp=torch, rng=0), pn.Linear(4, 2, xp=torch, rng=0))
    for p in layer.parameters().values():
        p.requires_grad_()
    wide = layer.to(dtype="float64")
    assert all(p.is_leaf for p in wide.parameters().values())
    torch.optim.SGD([p.requires_grad_() for p in wide.parameters().values()], lr=0.1)
    x = rng.standard_normal((5, 2, 3)).astype("float32")
    there = layer.to(xp="jax")
    np.testing.assert_allclose(there(there._new(x))[0], layer.to(xp="numpy")(x)[0], rtol=1e-5, atol=1e-6)
    half = layer.to(dtype="bfloat16").to(xp="jax")
    assert {str(p.dtype) for p in half.parameters().values()} == {"bfloat16"}


@pytest.mark.parametrize("peer", ["torch", "jax"])
def test_dlpack_goes_in_and_out(peer: str, rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 4)).astype(np.float32)
    xp = importlib.import_module({"torch": "torch", "jax": "jax.numpy"}[peer])
    y = pn.layer_norm(xp.from_dlpack(x))
    np.testing.assert_allclose(np.from_dlpack(y), pn.layer_norm(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["torch_training", "optax_training", "mlx_training"])
def test_an_example_learns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "examples"))
    try:
        losses = importlib.import_module(name).main()
    finally:
        sys.modules.pop(name, None)
    assert losses[0] > 0.9
    assert losses[-1] < 0.1
