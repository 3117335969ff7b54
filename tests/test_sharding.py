"""JAX arrays in eight parts, each on a device of its own (simulated): statistics are those of the whole batch."""

from __future__ import annotations

import pytest

from tests.processes import output_of

pytestmark = pytest.mark.peers

DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_ENABLE_X64": "1"}

BATCH_NORM = """
import jax, jax.numpy as jnp, numpy as np, portnorm as pn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

mesh = Mesh(np.array(jax.devices()), ("batch",))
rng = np.random.default_rng(0)
x = 30.0 + rng.standard_normal((16, 3)) * np.arange(1, 17)[:, None]
w, b, dy = rng.uniform(0.5, 2.0, 3), rng.standard_normal(3), rng.standard_normal((16, 3))

def loss(x, w, b, dy):
    return jnp.sum(pn.batch_norm(x, w, b) * dy)

parted = [jax.device_put(a, NamedSharding(mesh, PartitionSpec("batch"))) for a in (x, dy)]
for function in (pn.batch_norm, jax.jit(pn.batch_norm)):
    y = function(parted[0], jnp.asarray(w), jnp.asarray(b))
    assert len(y.sharding.device_set) == 8
    np.testing.assert_allclose(y, pn.batch_norm(x, w, b), rtol=1e-10, atol=1e-10)
gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(parted[0], w, b, parted[1])
assert len(gradients[0].sharding.device_set) == 8
for mine, theirs in zip(gradients, pn.vjp(pn.batch_norm, x, w, b)[1](dy), strict=True):
    np.testing.assert_allclose(mine, theirs, rtol=1e-10, atol=1e-10)

layer = pn.BatchNorm(3, xp="jax", dtype="float64")
_, _, buffers = jax.jit(lambda x: layer.apply(layer.params, layer.buffers, x, training=True))(parted[0])
reference = pn.BatchNorm(3, dtype="float64")
reference(x, training=True)
for name, buffer in reference.buffers.items():
    np.testing.assert_allclose(buffers[name], buffer, rtol=1e-10)
print("equal")
"""

TRAINING = """
import jax, jax.numpy as jnp, numpy as np, portnorm as pn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

mesh = Mesh(np.array(jax.devices()), ("batch",))
lstm = pn.LSTM(2, 5, norm="batch", t_max=6, return_sequences=False, xp="jax", dtype="float64", rng=0)
model = pn.Sequential(lstm, pn.Linear(5, 3, xp="jax", dtype="float64", rng=0))
rng = np.random.default_rng(0)
xs, labels = rng.standard_normal((4, 6, 16, 2)), rng.integers(0, 3, (4, 16))
lengths = rng.integers(2, 7, (4, 16))
state = model.initial_state(16, noise=0.1, rng=0)

@jax.jit
def update(params, buffers, x, labels, lengths):
    def loss_of(params):
        logits, _, new = model.apply(params, buffers, x, state, lengths, training=True)
        return pn.softmax_cross_entropy(logits, labels), new
    (loss, new), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    return {n: p - 0.5 * grads[n] for n, p in params.items()}, new, loss

def trained(place):
    params, buffers, losses = model.params, model.buffers, []
    for x, y, n in zip(xs, labels, lengths, strict=True):
        params, buffers, loss = update(params, buffers, place(x, 1), place(y, 0), place(n, 0))
        losses.append(float(loss))
    return params, buffers, losses

def parted(a, batch_axis):
    axes = [None] * a.ndim
    axes[batch_axis] = "batch"
    return jax.device_put(a, NamedSharding(mesh, PartitionSpec(*axes)))

one, eight = trained(lambda a, _: jnp.asarray(a)), trained(parted)
assert one[2][0] != one[2][-1]
for mine, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
    np.testing.assert_allclose(mine, theirs, rtol=1e-8, atol=1e-8)
print("equal")
"""


def test_batch_norm_of_a_sharded_batch_has_the_statistics_of_all() -> None:
    assert output_of(BATCH_NORM, **DEVICES) == "equal"


def test_data_parallel_training_of_a_bn_lstm_is_training_on_one_device() -> None:
    assert output_of(TRAINING, **DEVICES) == "equal"
