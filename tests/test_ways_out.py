"""Ways out of Python beside ONNX: programs of torch.export and jax.export keep time and batch open, and are right at every size.

Each is made of five steps and three sequences, and is then asked for other numbers of both.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from benchmarks.behind_graphs import random_numbers
from portnorm.arrays import leaves, mapped
from tests.cases import PRESETS, random_recurrent, random_state
from tests.processes import output_of
from tests.test_autodiff import of_jax
from tests.tolerances import WAYS_OUT, WAYS_OUT_GRADIENT

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")]

SIZES = [(5, 3), (9, 2), (40, 1), (1, 1), (1, 3)]

FORMS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "plain": ({}, ()),
    "lengths": ({}, ("lengths",)),
    "state": ({}, ("state",)),
    "both directions, stacked": ({"bidirectional": True, "num_layers": 2}, ("lengths", "state")),
    "last step": ({"return_sequences": False, "batch_first": True}, ("lengths",)),
    "mask": ({"direction": "reverse"}, ("mask",)),
}
"""Arguments of the layer, and what is given beside `x`."""

CASES = [
    *(("LSTM", "layer", form) for form in FORMS),
    ("LSTM", None, "lengths"),
    ("LSTM", "batch", "state"),
    ("LSTM", "weight", "plain"),
    ("GRU", None, "state"),
    ("GRU", "layer", "both directions, stacked"),
    ("RNN", "batch-input", "lengths"),
]


def layer_of(cell: str, norm: str | None, form: str) -> Any:
    """With lengths of its own that no open one happens to have: torch takes equal numbers of the example for one."""
    layer = random_recurrent(cell, norm, np.random.default_rng(0), hidden=6, **FORMS[form][0])
    return layer.to(dtype="float32")


def inputs_of(layer: Any, given: tuple[str, ...], steps: int, batch: int) -> dict[str, Any]:
    """Arrays of NumPy by argument."""
    rng = np.random.default_rng([steps, batch])
    x = rng.standard_normal((batch, steps, 4) if layer.batch_first else (steps, batch, 4)).astype(np.float32)
    found: dict[str, Any] = {"x": x}
    if "lengths" in given:
        found["lengths"] = np.array([steps, max(steps - 3, 0), 1][:batch])
    if "mask" in given:
        found["mask"] = rng.uniform(size=(steps, batch)) < 0.7
    if "state" in given:
        found["state"] = tuple(a.astype(np.float32) if a.dtype.kind == "f" else a for a in map(np.asarray, random_state(layer, batch, rng)))
    return found


def assert_close(found: Any, expected: Any) -> None:
    pairs = list(zip(found, expected, strict=True))
    assert pairs
    for a, b in pairs:
        assert np.shape(a) == np.shape(b)
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=WAYS_OUT)


# -- jax.export ----------------------------------------------------------------------------------------------------------------------------


def _to_jax(a: Any) -> Any:
    return of_jax(np.asarray(a), "float32")


def exported_by_jax(layer: Any, given: tuple[str, ...], function: Any) -> Any:
    """`function(params, inputs)` with symbolic time and batch."""
    import jax

    def symbolic(a: Any, name: str) -> Any:
        if name == "lengths":
            shape = [batch]
        elif name == "state":
            shape = [batch if axis == 1 else n for axis, n in enumerate(a.shape)]
        else:
            shape = [batch, steps, *a.shape[2:]] if layer.batch_first else [steps, batch, *a.shape[2:]]
        return jax.ShapeDtypeStruct(tuple(shape), a.dtype)

    steps, batch = jax.export.symbolic_shape("T, B")
    inputs = {n: jax.tree.map(lambda a, n=n: symbolic(_to_jax(a), n), v) for n, v in inputs_of(layer, given, 5, 3).items()}
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), layer.params)
    return jax.export.export(jax.jit(function))(params, inputs)


@pytest.mark.parametrize(("cell", "norm", "form"), CASES)
def test_jax_export_keeps_time_and_batch_open(cell: str, norm: str | None, form: str) -> None:
    import jax

    given, own = FORMS[form][1], layer_of(cell, norm, form)
    layer = own.to(xp="jax")

    def function(params: Any, inputs: Any) -> Any:
        y, state, _ = layer.apply(params, layer.buffers, **inputs)
        return y, state

    program = exported_by_jax(layer, given, function)
    for size in SIZES:
        inputs = inputs_of(own, given, *size)
        found = program.call(layer.params, jax.tree.map(_to_jax, inputs))
        assert_close(jax.tree.leaves(found), [*leaves(own(**inputs))])


def test_jax_export_keeps_the_gradient(tmp_path: Path) -> None:
    """In a file that a process reads which has JAX alone; beside the vjp of the layer in NumPy."""
    import jax

    own = layer_of("LSTM", "layer", "lengths")
    layer = own.to(xp="jax")
    program = exported_by_jax(layer, ("lengths",), lambda params, inputs: layer.apply(params, layer.buffers, **inputs)[0])
    (tmp_path / "program").write_bytes(program.serialize(vjp_order=1))
    inputs = inputs_of(own, ("lengths",), 9, 2)
    y, _, pullback = own.vjp(**inputs)
    dy = np.random.default_rng(1).standard_normal(y.shape).astype(np.float32)
    np.savez(tmp_path / "given.npz", **own.params, **inputs, dy=dy)
    code = f"""
import sys, jax, numpy
for name in ("portnorm", "portnorm_backends"):
    sys.modules[name] = None
folder = {str(tmp_path)!r}
params = dict(numpy.load(folder + "/given.npz"))
inputs, dy = {{name: params.pop(name) for name in ("x", "lengths")}}, params.pop("dy")
with open(folder + "/program", "rb") as file:
    program = jax.export.deserialize(file.read())
numpy.savez(folder + "/found.npz", **jax.grad(lambda params: (program.call(params, inputs) * dy).sum())(params))
"""
    output_of(code, JAX_PLATFORMS="cpu", JAX_ENABLE_X64=str(int(jax.config.jax_enable_x64)))
    found, (_, _, expected) = np.load(tmp_path / "found.npz"), pullback(dy)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert np.abs(gradient).max() > 0
        np.testing.assert_allclose(found[name], gradient, rtol=0, atol=WAYS_OUT_GRADIENT * np.abs(gradient).max())


@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_a_step_is_a_pure_function_with_states_as_a_cell_has_them(cell: str, norm: str | None) -> None:
    """In an artifact of `jax.jit` with any number of sequences; the whole sequence by steps."""
    import jax

    own = random_recurrent(cell, norm, np.random.default_rng(0)).to(dtype="float32")
    layer, (batch,) = own.to(xp="jax"), jax.export.symbolic_shape("B")
    x = inputs_of(own, (), 3, 2)["x"]
    state = tuple(a.astype("float32") if a.ndim else a for a in map(np.asarray, random_state(own, 2, np.random.default_rng(1), time=0)))
    given = jax.tree.map(_to_jax, (x[0], tuple(a[0] if a.ndim else a for a in state)))
    program = jax.export.export(jax.jit(layer.step))(
        *jax.tree.map(lambda a: jax.ShapeDtypeStruct((batch, *a.shape[1:]) if a.ndim else (), a.dtype), given)
    )
    expected, last = own(x, state)
    found = given[1]
    for t in range(3):
        h, found = program.call(_to_jax(x[t]), found)
        assert {tuple(a.shape) for a in found if a.ndim} == {(2, own.hidden_size)}
        np.testing.assert_allclose(np.asarray(h), expected[t], rtol=0, atol=WAYS_OUT)
    assert_close([a[None] if a.ndim else a for a in found], last)


# -- torch.export --------------------------------------------------------------------------------------------------------------------------


class Model:
    """A torch module with a layer in it; made here, so that torch is imported when a test asks for it."""

    def __new__(cls, layer: Any) -> Any:
        import torch

        class Around(torch.nn.Module):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.inner = pn.torch_module(layer)

            def forward(self, x: Any, lengths: Any = None, state: Any = None, mask: Any = None) -> Any:
                return self.inner(x, state, lengths, mask=mask)

        return Around().eval()


def given_to_torch(layer: Any, given: tuple[str, ...], steps: int, batch: int) -> tuple[Any, ...]:
    import torch

    inputs = inputs_of(layer, given, steps, batch)
    return tuple(mapped(torch.as_tensor, inputs.get(name)) for name in ("x", "lengths", "state", "mask"))


def exported_by_torch(layer: Any, given: tuple[str, ...], strict: bool = False) -> tuple[Any, Any]:
    import torch

    model, T, B = Model(layer), torch.export.Dim("T"), torch.export.Dim("B")
    states = None
    if "state" in given:
        states = tuple({1: B} if a.ndim else None for a in map(np.asarray, random_state(layer, 3, np.random.default_rng(0))))
    shapes = {
        "x": {0: B, 1: T} if layer.batch_first else {0: T, 1: B},
        "lengths": {0: B} if "lengths" in given else None,
        "state": states,
        "mask": {0: T, 1: B} if "mask" in given else None,
    }
    return model, torch.export.export(model, given_to_torch(layer, given, 5, 3), dynamic_shapes=shapes, strict=strict)


STRICT = [("LSTM", "layer", "both directions, stacked"), ("GRU", None, "state"), ("RNN", "batch-input", "lengths")]
"""Where the code is followed instead of its operations, it takes three times as long."""


@pytest.mark.parametrize(("cell", "norm", "form", "strict"), [*((*case, False) for case in CASES), *((*case, True) for case in STRICT)])
def test_torch_export_keeps_time_and_batch_open(cell: str, norm: str | None, form: str, strict: bool) -> None:
    import torch

    given, layer = FORMS[form][1], layer_of(cell, norm, form)
    model, program = exported_by_torch(layer, given, strict)
    for size in SIZES:
        inputs = given_to_torch(layer, given, *size)
        found = torch.utils._pytree.tree_leaves(program.module()(*inputs))
        assert_close([a.detach() for a in found], [a.detach() for a in torch.utils._pytree.tree_leaves(model(*inputs))])


ASKED = {"everything": "", "the recurrent weights alone": "weight_hh", "the input alone": "x", "the state alone": "state"}
"""What has a gradient, by the beginning of its name."""


@pytest.mark.parametrize(("cell", "norm"), [("LSTM", "layer"), ("GRU", None)])
def test_autograd_differentiates_an_exported_program(cell: str, norm: str | None) -> None:
    """Through every step, whatever has a gradient: beside the vjp of the layer in NumPy."""
    import torch

    layer, given = layer_of(cell, norm, "state"), FORMS["state"][1]
    loaded = exported_by_torch(layer, given)[1].module()
    params = {name.removeprefix("inner."): p for name, p in loaded.named_parameters()}
    y, _, pullback = layer.vjp(**inputs_of(layer, given, 9, 2))
    dy = np.random.default_rng(1).standard_normal(y.shape).astype(np.float32)
    dx, dstate, grads = pullback(dy)
    expected = {**grads, "x": dx, **{f"state {k}": part for k, part in enumerate(dstate)}}
    for beginning in ASKED.values():
        x, lengths, state, mask = given_to_torch(layer, given, 9, 2)
        found = {**params, "x": x, **{f"state {k}": part for k, part in enumerate(state)}}
        assert found.keys() == expected.keys()
        asked = {name: a for name, a in found.items() if name.startswith(beginning)}
        for name, a in found.items():
            a.requires_grad_(name in asked)
        gradients = torch.autograd.grad(loaded(x, lengths, state, mask)[0], list(asked.values()), torch.as_tensor(dy))
        for name, gradient in zip(asked, gradients, strict=True):
            assert np.abs(expected[name]).max() > 0
            np.testing.assert_allclose(
                gradient, expected[name], rtol=0, atol=WAYS_OUT_GRADIENT * np.abs(expected[name]).max(), err_msg=name
            )


def test_an_exported_program_is_as_large_for_any_number_of_steps_and_loads_without_portnorm(tmp_path: Path) -> None:
    import torch

    layer = layer_of("LSTM", "layer", "plain")
    model, program = exported_by_torch(layer, ())
    kinds = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert sum(getattr(kind, "__name__", "") == "while_loop" for kind in kinds) == 1
    assert not [kind for kind in kinds if "portnorm" in str(kind)]
    torch.export.save(program, tmp_path / "program.pt2")
    x = given_to_torch(layer, (), 40, 2)[0]
    np.save(tmp_path / "x.npy", x)
    code = f"""
import sys, numpy
for name in ("portnorm", "portnorm_backends"):
    sys.modules[name] = None
import torch
folder = {str(tmp_path)!r}
y, _ = torch.export.load(folder + "/program.pt2").module()(torch.as_tensor(numpy.load(folder + "/x.npy")), None, None, None)
numpy.save(folder + "/y.npy", y.detach())
"""
    output_of(code)
    assert_close([np.load(tmp_path / "y.npy")], [model(x)[0].detach()])


def test_fixed_steps_are_written_out_and_others_refused() -> None:
    import torch

    layer = layer_of("LSTM", "layer", "plain")
    program = torch.export.export(Model(layer), given_to_torch(layer, (), 3, 2))
    assert not [node for node in program.graph.nodes if "while_loop" in str(node.target)]
    with pytest.raises(AssertionError, match=r"size\(\)\[0\] == 3"):
        program.module()(*given_to_torch(layer, (), 4, 2))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of torch's own code
@pytest.mark.parametrize("freezing", [False, True])
def test_a_compiled_package_keeps_time_and_batch_open(freezing: bool, tmp_path: Path) -> None:
    """AOTInductor checks no lengths: what is written out gives the steps that it was exported with for any."""
    import torch

    layer = layer_of("LSTM", "layer", "both directions, stacked")
    model, program = exported_by_torch(layer, given := FORMS["both directions, stacked"][1])
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "m.pt2"), inductor_configs={"freezing": freezing}
        )
    package = torch._inductor.aoti_load_package(path)
    for size in SIZES:
        inputs = given_to_torch(layer, given, *size)
        found = torch.utils._pytree.tree_leaves(package(*inputs))
        assert_close([a.detach() for a in found], [a.detach() for a in torch.utils._pytree.tree_leaves(model(*inputs))])


TRACED = {
    "LSTM": lambda: layer_of("LSTM", "layer", "lengths"),
    "BN-LSTM": lambda: layer_of("LSTM", "batch", "lengths"),
    "GRU": lambda: layer_of("GRU", None, "both directions, stacked"),
    "layer norm": lambda: pn.LayerNorm(4),
    "batch norm": lambda: pn.BatchNorm(4, channel_axis=-1),
    "group norm": lambda: pn.GroupNorm(2, 4, channel_axis=-1),
    "Linear": lambda: pn.Linear(4, 2, rng=0),
    "both": lambda: pn.Sequential(pn.LSTM(4, 3, rng=0), pn.LayerNorm(3)),
}


PLAIN = {
    "LN-LSTM": lambda: pn.LSTM(4, 6, norm="layer", num_layers=2, rng=0),
    "LN-LSTM, of each gate": lambda: pn.LSTM(4, 6, norm="layer-gates", rng=0),
    "RMS-LSTM": lambda: pn.LSTM(4, 6, norm=dataclasses.replace(pn.VARIANTS["LSTM"]["layer"], norm="rms"), rng=0),
    "LN-GRU": lambda: pn.GRU(4, 6, norm="layer", rng=0),
    "BN-LSTM": lambda: pn.LSTM(4, 6, norm="batch", rng=0),
    "LayerNorm": lambda: pn.LayerNorm(4),
    "RMSNorm": lambda: pn.RMSNorm(4),
    "GroupNorm of a map": lambda: pn.GroupNorm(3, 3),
    "GroupNorm": lambda: pn.GroupNorm(2, 4, channel_axis=-1),
}
"""Layers whose normalizations torch has as operators, and two that have none: over the batch, and with channels behind."""


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("name", PLAIN)
def test_normalizations_without_a_guard_are_as_right_and_have_no_branches(name: str, traced: bool) -> None:
    import torch

    layer = random_numbers(PLAIN[name]())
    x = np.random.default_rng(0).standard_normal((5, 3, 4)).astype("float32") + 100
    x = np.reshape(x, (5, 3, 2, 2)) if name == "GroupNorm of a map" else x
    exact, plain = (pn.torch_module(layer, exact=exact).eval() for exact in (True, False))
    given = (torch.as_tensor(x),)
    made = torch.jit.trace(plain, given) if traced else torch.export.export(plain, given)
    text = str(made.inlined_graph if traced else made.graph)
    found = leaves((made if traced else made.module())(*given))
    for a, b in zip(found, leaves(layer(x)), strict=True):
        np.testing.assert_allclose(a.detach().numpy(), b, rtol=WAYS_OUT, atol=WAYS_OUT)
    has = name not in ("BN-LSTM", "GroupNorm")
    assert ("layer_norm" in text or "rms_norm" in text) == has
    assert not (has and ("where" in text or "amax" in text))
    largest = 1e30 * given[0]  # outside of an export nothing changes
    for a, b in zip(leaves(plain(largest)), leaves(exact(largest)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_exact_is_true_or_false() -> None:
    with pytest.raises(pn.UnsupportedError, match="`exact` is 'no'; expected True or False"):
        pn.torch_module(pn.LayerNorm(4), exact="no")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", TRACED)
def test_a_traced_module_has_values_and_gradients_of_the_module(name: str) -> None:
    """For the number of steps of its example; lengths are an input."""
    import torch

    layer = TRACED[name]()
    counted = ("lengths",) if layer.recurrent else ()
    model = pn.torch_module(layer).eval()

    class Around(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Any, *lengths: Any) -> Any:
            return self.inner(x, **dict(zip(("lengths",), lengths, strict=False)))

    rng = np.random.default_rng(0)
    x = [torch.as_tensor(rng.standard_normal((5, 3, 4)).astype(np.float32)) for _ in range(2)]
    lengths = [(torch.tensor(n),) if counted else () for n in ([5, 2, 3], [1, 4, 5])]
    around = Around().eval()
    traced = torch.jit.trace(around, (x[0], *lengths[0]))
    found, expected = (torch.utils._pytree.tree_leaves(f(x[1], *lengths[1])) for f in (traced, around))
    assert_close([a.detach() for a in found], [a.detach() for a in expected])
    gradients = []
    for leaves_ in (found, expected):
        model.zero_grad()
        leaves_[0].square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=WAYS_OUT_GRADIENT * max(1.0, float(b.abs().max())))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("cell", "norm", "form"), [("LSTM", "layer", "plain"), ("LSTM", "batch", "plain"), ("GRU", None, "last step"), ("RNN", None, "mask")]
)
def test_a_trace_refuses_another_number_of_steps(cell: str, norm: str | None, form: str, tmp_path: Path) -> None:
    """Read from its file, too, and for more sequences than it was made of."""
    import torch

    layer = layer_of(cell, norm, form)
    model = pn.torch_module(layer).eval()
    x = {steps: torch.as_tensor(inputs_of(layer, (), steps, 4)["x"]) for steps in (4, 5, 9, 10)}
    torch.jit.save(torch.jit.trace(model, (x[5].narrow(0 if layer.batch_first else 1, 0, 2),)), tmp_path / "trace.pt")
    loaded = torch.jit.load(tmp_path / "trace.pt")
    assert_close([loaded(x[5])[0].detach()], [model(x[5])[0].detach()])
    for steps in (4, 9, 10):
        with pytest.raises(RuntimeError, match=r"shape '\[5, .*is invalid for input of size"):
            loaded(x[steps])
