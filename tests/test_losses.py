"""Losses: labels of every integer type, labels that are none, cases that do not count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import portnorm as pn
from portnorm.arrays import is_concrete
from tests.conftest import Library
from tests.tolerances import relative

INTEGERS = [f"{sign}int{bits}" for bits in (8, 16, 32, 64) for sign in ("", "u")]


def entropy(logits: Any, labels: Any, weights: Any = None, ignored: Any = -100) -> tuple[Any, Any]:
    """The loss and its gradient, case by case, in NumPy."""
    loss, gradient, total = 0.0, np.zeros_like(logits), 0.0
    for k, label in np.ndenumerate(labels):
        w = 1.0 if weights is None else weights[k]
        if label == ignored or w == 0:
            continue
        p = np.exp(logits[k] - logits[k].max())
        p /= p.sum()
        loss -= w * np.log(p[label])
        gradient[k] = w * (p - np.eye(len(p))[label])
        total += w
    return loss / total, gradient / total


@pytest.mark.parametrize("dtype", INTEGERS)
def test_labels_of_any_integer_type_name_any_of_many_classes(dtype: str, library: Library, rng: np.random.Generator) -> None:
    logits, labels = rng.standard_normal((5, 300)), np.array([0, 3, 100, 127, 5], dtype=dtype)
    expected, gradient = entropy(logits, labels)
    loss, pullback = pn.vjp(pn.softmax_cross_entropy, library.array(logits), library.array(labels))
    found = library.values([loss, pullback(library.array(np.asarray(1.0)))[0]])
    np.testing.assert_allclose(found[0], expected, **relative(library.widest))
    np.testing.assert_allclose(found[1], gradient, **relative(library.widest))


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize(("dtype", "ignored"), [("int64", None), ("int8", -100), ("uint8", 255), ("int32", 2)])
def test_cases_to_ignore(dtype: str, ignored: int | None, weighed: bool, library: Library, rng: np.random.Generator) -> None:
    keywords: dict[str, Any] = {} if ignored is None else {"ignore_index": ignored}
    at = -100 if ignored is None else ignored
    logits, labels = rng.standard_normal((2, 3, 4)), np.array([[0, at, 3], [at, 1, 1]]).astype(dtype)
    weights = rng.uniform(0.5, 2.0, (2, 3)) if weighed else None
    logits[0, 1], logits[1, 0] = np.nan, np.inf  # padding, in which anything may stand
    expected, gradient = entropy(logits, labels, weights, at)
    given = (library.array(logits), library.array(labels), library.array(weights))
    loss, pullback = pn.vjp(pn.softmax_cross_entropy, *given, **keywords)
    found = library.values([loss, pullback(library.array(np.asarray(2.0)))[0]])
    np.testing.assert_allclose(found[0], expected, **relative(library.widest))
    np.testing.assert_allclose(found[1], 2 * gradient, **relative(library.widest))


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("wrong", [9, 3, -1, -101, 100])
def test_a_label_that_is_no_class(wrong: int, dtype: str, library: Library) -> None:
    """An error that names it where it can be seen, else NaN; nothing where the case has no weight."""
    if not np.iinfo(dtype).min <= wrong <= np.iinfo(dtype).max:
        wrong = np.iinfo(dtype).max
    if (library.name, dtype) == ("paddle", "uint64") and wrong > np.iinfo("int64").max:
        with pytest.raises(pn.DTypeError, match="beyond int64"):  # it has no such type
            library.array(np.array([wrong], dtype=dtype))
        return
    logits, labels = library.array(np.zeros((3, 3))), library.array(np.array([0, wrong, 2], dtype=dtype))
    weights, one = library.array(np.array([1.0, 0.0, 1.0])), library.array(np.asarray(1.0))
    np.testing.assert_allclose(library.values([pn.softmax_cross_entropy(logits, labels, weights)])[0], np.log(3.0))
    if is_concrete(labels):
        with pytest.raises(pn.ShapeError, match=r"`labels` reach from .*; expected 0 to 2, the classes of `logits` \(3, 3\)"):
            pn.softmax_cross_entropy(logits, labels)
    else:
        loss, pullback = pn.vjp(pn.softmax_cross_entropy, logits, labels)
        loss, gradient = library.values([loss, pullback(one)[0]])
        assert np.isnan(loss)
        np.testing.assert_array_equal(np.isnan(gradient), [[False] * 3, [True] * 3, [False] * 3])


@pytest.mark.peers
def test_a_label_that_is_no_class_and_cannot_be_looked_at_is_nan() -> None:
    labels = np.array([0, 7, -100])
    found = traced_by_jax(labels) + traced_by_torch(labels)
    for loss, gradient in found:
        assert np.isnan(loss)
        np.testing.assert_array_equal(np.isnan(gradient), [[False] * 3, [True] * 3, [False] * 3])


def traced_by_jax(labels: Any) -> list[tuple[Any, Any]]:
    import jax
    import jax.numpy as jnp

    value = jax.value_and_grad(pn.softmax_cross_entropy)
    return [jax.jit(value)(jnp.zeros((3, 3)), jnp.asarray(labels))]


def traced_by_torch(labels: Any) -> list[tuple[Any, Any]]:
    import torch

    gradient, loss = torch.func.grad_and_value(pn.softmax_cross_entropy)(torch.zeros(3, 3), torch.tensor(labels))
    return [(loss.numpy(), gradient.numpy())]


@pytest.mark.parametrize("loss", [pn.softmax_cross_entropy, pn.mean_squared_error], ids=lambda loss: loss.name)
@pytest.mark.parametrize("shape", [(2, 3), (0, 3)], ids=["weights of 0", "empty"])
def test_no_case_gives_no_loss_and_no_gradient(loss: Any, shape: tuple[int, ...], eager: Library) -> None:
    y, target = eager.array(np.full(shape, np.nan)), eager.array(np.full(shape, 1.0))
    if loss is pn.softmax_cross_entropy:
        target = eager.array(np.full(shape[:-1], 1))
    value, pullback = pn.vjp(loss, y, target, eager.array(np.zeros(shape[:-1])))
    value, gradient = eager.values([value, pullback(eager.array(np.asarray(1.0)))[0]])
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros(shape))


def test_weights_of_a_squared_error(library: Library, rng: np.random.Generator) -> None:
    """Of values, or of what the first axes count; NaN where the weight is 0 is padding."""
    y, target = rng.standard_normal((2, 4, 3, 2))
    for shape in ((4, 3, 2), (4, 3), (4,)):
        weights = rng.uniform(0.5, 2.0, shape)
        weights[1] = 0.0
        padded = y.copy()
        padded[1] = np.nan
        each = np.broadcast_to(weights.reshape(*shape, *(1,) * (3 - len(shape))), y.shape)
        expected, gradient = np.average((y - target) ** 2, weights=each), 2 * (y - target) * each / each.sum()
        loss, pullback = pn.vjp(pn.mean_squared_error, library.array(padded), library.array(target), library.array(weights))
        found = library.values([loss, *pullback(library.array(np.asarray(1.0)))[:2]])
        np.testing.assert_allclose(found[0], expected, **relative(library.widest))
        np.testing.assert_allclose(found[1], gradient, **relative(library.widest))
        np.testing.assert_allclose(found[2], -gradient, **relative(library.widest))


@pytest.mark.parametrize("shape", [(3, 2), (4, 2), (4, 3, 1), (1,), (4, 3, 2, 1)])
def test_weights_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(pn.ShapeError, match=r"`weights` has shape .*; expected \(4, 3, 2\)"):
        pn.mean_squared_error(np.zeros((4, 3, 2)), np.zeros((4, 3, 2)), np.ones(shape))
    with pytest.raises(pn.ShapeError, match=r"`weights` has shape .*; expected \(4, 3\), one for each of `labels`"):
        pn.softmax_cross_entropy(np.zeros((4, 3, 2)), np.zeros((4, 3), dtype=int), np.ones(shape))
