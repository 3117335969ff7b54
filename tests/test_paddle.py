"""PaddlePaddle: its autograd and its programs go through the hand-written vjps or the definitions, and its arrays come and go."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from portnorm.arrays import mapped, to_numpy
from tests.cases import OPS, PRESETS, OpCase, random_recurrent, random_state
from tests.tolerances import OPERATION, RECURRENT, relative

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def paddle() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import paddle

    paddle.disable_signal_handler()
    return paddle


def tensors(paddle: Any, tree: Any, recorded: bool = False) -> Any:
    """Of the arrays in a tree, those with numbers that have gradients recorded by autograd."""
    return mapped(
        lambda a: paddle.to_tensor(a, stop_gradient=not recorded or a.dtype.kind != "f") if isinstance(a, np.ndarray) else a, tree
    )


@pytest.mark.parametrize("case", OPS, ids=lambda case: case.name)
def test_autograd_of_an_op(case: OpCase, paddle: Any, rng: np.random.Generator) -> None:
    given = [np.asarray(a) if isinstance(a, np.generic) else a for a in case.arguments(rng)]
    places = [k for k, a in enumerate(given) if isinstance(a, np.ndarray) and a.dtype == np.float64]
    y, pullback = pn.vjp(case.op, *given, **case.keywords)
    dy = np.asarray(rng.standard_normal(np.shape(y)))
    arguments = tensors(paddle, given, recorded=True)
    mine = case.op(*arguments, **tensors(paddle, case.keywords))
    np.testing.assert_allclose(to_numpy(mine), y, **relative("float64", OPERATION))
    found = paddle.grad(mine, [arguments[k] for k in places], paddle.to_tensor(dy))
    for d, k in zip(found, places, strict=True):
        expected = pullback(dy)[k]
        np.testing.assert_allclose(to_numpy(d), expected, rtol=1e-9, atol=1e-9 * max(1.0, float(np.abs(expected).max(initial=0.0))))


def layer_of(paddle: Any, cell: str, norm: Any, rng: np.random.Generator) -> tuple[Any, Any, Any, Any, Any]:
    """A layer of NumPy, the same in paddle, an input, a state and the cotangents of y and of each state."""
    reference = random_recurrent(cell, norm, rng, bidirectional=True)
    x, state = rng.standard_normal((5, 3, 4)), random_state(reference, 3, rng)
    cotangents = rng.standard_normal((5, 3, 6)), tuple(rng.standard_normal(s.shape) for s in state[: len(reference.cell.states)])
    return reference, reference.to(xp="paddle"), x, state, cotangents


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("cell", "norm"), PRESETS)
def test_autograd_of_a_recurrent_layer(cell: str, norm: str | None, training: bool, paddle: Any, rng: np.random.Generator) -> None:
    reference, layer, x, state, (dy, dlast) = layer_of(paddle, cell, norm, rng)
    y, last, pullback = reference.vjp(x, state, [5, 2, 3], training=training)
    dx, dstate, grads = pullback(dy, dlast)
    their_x, their_state = tensors(paddle, (x, state), recorded=True)
    for p in layer.params.values():
        p.stop_gradient = False
    their_y, their_last = layer(their_x, their_state, [5, 2, 3], training=training)
    loss = sum((a * paddle.to_tensor(w)).sum() for a, w in zip((their_y, *their_last), (dy, *dlast), strict=False))
    assert all(b.stop_gradient for b in layer.buffers.values())
    loss.backward()
    found = (their_y, *their_last, their_x.grad, *(s.grad for s in their_state[: len(dlast)]), *(layer.params[n].grad for n in grads))
    for mine, theirs in zip((y, *last, dx, *dstate[: len(dlast)], *grads.values()), found, strict=True):
        np.testing.assert_allclose(to_numpy(theirs), mine, **relative("float64", RECURRENT))
    for name, b in reference.buffers.items():
        np.testing.assert_allclose(to_numpy(layer.buffers[name]), b, **relative("float64", RECURRENT))


@pytest.mark.filterwarnings("ignore")  # of paddle's translation, which looks into every module that is there
def test_a_program_of_a_function(paddle: Any, rng: np.random.Generator) -> None:
    x, weight = rng.standard_normal((2, 4, 3)), rng.uniform(0.5, 2.0, 3)
    constant = paddle.to_tensor(weight)

    def twice(x: Any) -> Any:
        return 2.0 * pn.layer_norm(x, constant)

    found = paddle.jit.to_static(twice, full_graph=True)(paddle.to_tensor(x))
    np.testing.assert_allclose(to_numpy(found), 2.0 * pn.layer_norm(x, weight), rtol=1e-12)
    varying = [paddle.static.InputSpec([None, 4, 3], "float64")]
    with pytest.raises(ValueError, match=r"shape \(-1, 4, 3\) in a program of paddle"):
        paddle.jit.to_static(twice, input_spec=varying, full_graph=True)(paddle.to_tensor(x))


@pytest.mark.alone  # after hundreds of other tests paddle once did not name a value of the program
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("cell", "norm"), [("LSTM", "layer"), ("GRU", "batch")])
def test_a_program_of_a_layer(cell: str, norm: str, paddle: Any, rng: np.random.Generator) -> None:
    """Three steps: paddle takes long to build a program."""
    reference = random_recurrent(cell, norm, rng)
    layer, x, dy = reference.to(xp="paddle"), rng.standard_normal((3, 2, 4)), rng.standard_normal((3, 2, 3))
    y, _, pullback = reference.vjp(x, lengths=[3, 1])
    dx, _, grads = pullback(dy)
    counted, weight = paddle.to_tensor([3, 1]), paddle.to_tensor(dy)
    params = {n: p.clone() for n, p in layer.params.items()}
    their_x = paddle.to_tensor(x, stop_gradient=False)
    for p in params.values():
        p.stop_gradient = False

    def results(x: Any) -> Any:
        y = layer.apply(params, layer.buffers, x, None, counted)[0]
        return y, (y * weight).sum()

    their_y, loss = paddle.jit.to_static(results, full_graph=True)(their_x)
    loss.backward()
    np.testing.assert_allclose(to_numpy(their_y), y, **relative("float64", RECURRENT))
    np.testing.assert_allclose(to_numpy(their_x.grad), dx, **relative("float64", RECURRENT))
    for name, d in grads.items():
        np.testing.assert_allclose(to_numpy(params[name].grad), d, **relative("float64", RECURRENT))


def test_training_with_an_optimizer_of_paddle(paddle: Any, rng: np.random.Generator) -> None:
    model = pn.Sequential(pn.LSTM(2, 8, norm="layer", return_sequences=False, xp="paddle", rng=0), pn.Linear(8, 2, xp="paddle", rng=0))
    x = rng.standard_normal((6, 32, 2)).astype("float32")
    labels = paddle.to_tensor((x.sum((0, 2)) > 0).astype(int))
    for p in model.parameters().values():
        p.stop_gradient = False
    adam, losses = paddle.optimizer.Adam(0.03, parameters=list(model.parameters().values())), []
    for _ in range(30):
        loss = pn.softmax_cross_entropy(model(paddle.to_tensor(x), training=True)[0], labels)
        loss.backward()
        adam.step()
        adam.clear_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 2


def test_layers_go_everywhere(paddle: Any, tmp_path: Any, rng: np.random.Generator) -> None:
    layer = pn.LSTM(3, 4, norm="layer", xp="paddle", rng=0)
    x = rng.standard_normal((5, 2, 3)).astype("float32")
    expected = to_numpy(layer(paddle.to_tensor(x))[0])
    np.testing.assert_allclose(layer.to(xp="numpy")(x)[0], expected, atol=1e-6)
    np.testing.assert_allclose(pn.compile(layer)(x)[0], expected, atol=1e-5)
    pn.save(layer, tmp_path / "m.safetensors")
    pn.export(layer, tmp_path / "m.onnx")
    for name in ("m.safetensors", "m.onnx"):
        np.testing.assert_array_equal(to_numpy(pn.load(tmp_path / name, xp="paddle")(paddle.to_tensor(x))[0]), expected)
    there = pn.LSTM(3, 4, xp="paddle", device="cpu", rng=0).to(device="cpu", dtype="float64")
    assert {str(a.place) for a in there.state_dict().values()} == {"Place(cpu)"}
    np.testing.assert_array_equal(np.from_dlpack(pn.layer_norm(paddle.to_tensor(x))), to_numpy(pn.layer_norm(paddle.to_tensor(x))))


def test_numbers_that_paddle_takes_otherwise(paddle: Any) -> None:
    """The bits of uint16 for bfloat16, the root of ∞ for NaN, and numbers for float32."""
    xp = pn.LayerNorm(3, xp="paddle").xp
    np.testing.assert_array_equal(to_numpy(xp.asarray(np.array([1, 65535], dtype="uint16"))), [1, 65535])
    with pytest.raises(pn.DTypeError, match="beyond int64"):
        xp.asarray(np.array([2**64 - 1], dtype="uint64"))
    np.testing.assert_array_equal(to_numpy(xp.sqrt(paddle.full([20], np.inf))), np.full(20, np.inf))
    x = paddle.to_tensor(3.0, dtype="float64")
    assert float(xp.where(x > 5, x, 1 / 3)) == float(xp.minimum(x, 1 / 3)) == float(xp.clip(x, 0.0, 1 / 3)) == 1 / 3
    np.testing.assert_allclose(float(xp.mean(paddle.full([10**6], 0.1))), np.float32(0.1), rtol=1e-6)


def test_what_paddle_cannot_is_refused(paddle: Any) -> None:
    x = paddle.ones([2, 3])
    for dtype in ("float16", "bfloat16"):
        with pytest.raises(pn.DTypeError, match=f"`dtype` is '{dtype}', which paddle does not have"):
            pn.LSTM(3, 4, xp="paddle", dtype=dtype)
        with pytest.raises(pn.DTypeError, match=rf"`x` has dtype paddle\.{dtype}; expected a real floating-point type such as float32"):
            pn.layer_norm(x.astype(dtype))
    x.stop_gradient = False
    with pytest.raises(OSError, match="`create_graph=True` asks for a derivative of a derivative"):
        paddle.grad((pn.layer_norm(x) ** 2).sum(), [x], create_graph=True)
    with pytest.raises(pn.UnsupportedError, match=r"`out` cannot take a result that autograd records; .* paddle\.no_grad"):
        pn.layer_norm(x, out=paddle.ones([2, 3]))
    with pytest.raises(pn.ShapeError, match="`labels` reach from 0 to 9"):
        pn.softmax_cross_entropy(x, paddle.to_tensor([0, 9]))
