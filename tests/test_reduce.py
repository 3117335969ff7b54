"""Batch statistics over processes: what each computes of its part is what one would of the whole."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from benchmarks.tables import ROOT
from tests.cases import IMPLEMENTATIONS, LAYERS, PRESETS, random_recurrent, random_state
from tests.processes import in_threads
from tests.tolerances import RAGGED_STACK_FLOAT64, RECURRENT, relative

PARTS = 2


class Meeting:
    """Processes as threads: `total(k)` is the hook of the k-th, which waits until all have brought an array."""

    def __init__(self, parties: int = PARTS):
        self.barrier, self.brought, self.messages = threading.Barrier(parties, timeout=20), [None] * parties, [0] * parties

    def total(self, k: int) -> Any:
        def reduce(a: Any) -> Any:
            self.brought[k] = a
            self.messages[k] += 1
            self.barrier.wait()
            assert len({(b.shape, b.dtype) for b in self.brought}) == 1, "MPI, NCCL and gloo sum arrays of one shape and type"
            found = sum(self.brought[1:], start=self.brought[0])
            self.barrier.wait()
            return found

        return reduce

    def all(self, work: Any) -> list[Any]:
        """`work(k, reduce)` of each; the first error of a thread is raised here."""
        found: list[Any] = [None] * len(self.brought)

        def run(k: int) -> None:
            try:
                found[k] = work(k, self.total(k))
            except Exception as error:
                found[k] = error

        in_threads(run, len(found))
        for result in found:
            if isinstance(result, Exception):
                raise result
        return found


BATCH_CELLS = [
    (cell, name)
    for table, rows in ((pn.VARIANTS, PRESETS), (pn.IMPLEMENTATIONS, IMPLEMENTATIONS))
    for cell, name in rows
    if table[cell][name].norm == "batch"
]


@pytest.mark.parametrize("lengths", [None, [2, 3, 5, 4, 1]], ids=["whole", "ragged"])
@pytest.mark.parametrize(("cell", "norm"), BATCH_CELLS)
def test_a_stack_in_parts_is_the_stack_on_the_whole_batch(cell: str, norm: str, lengths: Any, rng: np.random.Generator) -> None:
    """Two layers, both directions, parts of two and three sequences, of which those of the first end before the others."""
    whole = random_recurrent(cell, norm, rng, num_layers=2, bidirectional=True)
    x, state, dy = rng.standard_normal((5, 5, 4)), random_state(whole, 5, rng), rng.standard_normal((5, 5, 6))
    n = len(whole.cell.states)
    start = whole.copy()

    def work(k: int, reduce: Any) -> Any:
        rows = slice(0, 2) if k == 0 else slice(2, None)
        layer = start.copy()
        layer.reduce = reduce
        own = (*(s[:, rows, :] for s in state[:n]), *state[n:])
        y, last, pullback = layer.vjp(x[:, rows, :], own, None if lengths is None else lengths[rows], training=True)
        return (y, *last[:n]), pullback(dy[:, rows, :]), layer.buffers

    (first, second), meeting = (found := Meeting()).all(work), found
    assert meeting.messages[0] == meeting.messages[1] > 0
    y, last, pullback = whole.vjp(x, state, lengths, training=True)
    dx, dstate, grads = pullback(dy)
    for mine, theirs in zip(
        (y, *last[:n], dx, *dstate), zip(*((*p[0], p[1][0], *p[1][1]) for p in (first, second)), strict=True), strict=True
    ):
        np.testing.assert_allclose(np.concatenate(theirs, axis=1), mine, **relative("float64", RECURRENT))
    for name, gradient in grads.items():
        np.testing.assert_allclose(first[1][2][name] + second[1][2][name], gradient, **relative("float64", RECURRENT), err_msg=name)
    for name, buffer in whole.buffers.items():
        for part in (first, second):
            np.testing.assert_allclose(part[2][name], buffer, **relative("float64", RECURRENT), err_msg=name)


def test_a_sequence_in_each_process_is_enough(rng: np.random.Generator) -> None:
    """One sequence has no statistics; two processes with one each have."""
    x = rng.standard_normal((4, 2, 3))
    layer = pn.LSTM(3, 2, norm="batch", dtype="float64", rng=0)
    parts = Meeting().all(lambda k, reduce: _with(layer, reduce)(x[:, k : k + 1, :], training=True)[0])
    np.testing.assert_allclose(np.concatenate(parts, axis=1), layer(x, training=True)[0], **relative("float64", RECURRENT))


def _with(layer: Any, reduce: Any) -> Any:
    other = layer.copy()
    other.reduce = reduce
    return other


@pytest.mark.parametrize(
    ("steps", "batch", "message"),
    [
        ((4, 5), (2, 2), r"has . steps, but 4.5 is the average of the 2 processes that `reduce` sums over; .* pad `x`, and give `lengths`"),
        ((4, 3), (2, 0), r"has . steps, but 3.5 is the average of the 2 processes"),
        ((4, 4), (0, 0), r"has no sequence in all 2 processes that `reduce` sums over"),
        ((4, 4), (1, 0), r"has one sequence in all 2 processes that `reduce` sums over"),
    ],
    ids=["steps", "steps of an empty part", "empty", "one sequence"],
)
def test_parts_that_do_not_fit_are_an_error_in_every_process(steps: Any, batch: Any, message: str) -> None:
    """And not a process that waits for messages of another."""
    layer = pn.GRU(3, 2, norm="batch", rng=0)

    def work(k: int, reduce: Any) -> str:
        with pytest.raises(pn.ShapeError) as raised:
            _with(layer, reduce)(np.zeros((steps[k], batch[k], 3), "float32"), training=True)
        return str(raised.value)

    for said in Meeting().all(work):
        assert re.search(message, said)


def test_reduce_is_for_training_and_stays_with_copies(rng: np.random.Generator) -> None:
    asked: list[Any] = []

    def reduce(a: Any) -> Any:
        asked.append(a)
        return a

    for cell in LAYERS.values():
        layer = cell(3, 2, norm="batch", rng=0, reduce=reduce)
        x = rng.standard_normal((4, 2, 3)).astype("float32")
        layer(x)
        assert not asked
        assert layer.to(dtype="float64").reduce is reduce
        assert "reduce" not in layer.config
        layer(x, training=True)
        assert asked
        asked.clear()


PROCESS = """
import sys
from datetime import timedelta

import numpy as np, torch, torch.distributed as dist, portnorm as pn

rank, place = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{place}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=60))

def total(a):
    a = a.clone()
    dist.all_reduce(a)
    return a

given = np.load(f"{place}/given.npz")
"""

NORM = """
rows = slice(0, 5) if rank == 0 else slice(5, None)  # parts of different lengths
x, dy, mask = (torch.tensor(given[name][rows]) for name in ("x", "dy", "mask"))
w, b = torch.tensor(given["w"]), torch.tensor(given["b"])
found = {}

y, pullback = pn.vjp(pn.batch_norm, x, w, b, mask=mask, reduce=total)
dx, dw, db = pullback(dy)
found |= {"y": y, "dx": dx, "dw": total(dw), "db": total(db)}

layer = pn.BatchNorm(3, xp=torch, dtype="float64", reduce=total)
layer.assign({"weight": w.requires_grad_(), "bias": b.requires_grad_()})
x.requires_grad_()
for step in range(2):
    out = layer(x * (step + 1), training=True)
(out * dy).sum().backward()
found |= {"layer y": out.detach(), "layer dx": x.grad, "layer dw": total(w.grad), "layer db": total(b.grad)}
found |= {f"layer {name}": buffer for name, buffer in layer.buffers.items()}
"""

TRAINING = """
rows = slice(0, 2) if rank == 0 else slice(2, None)
found = {}
for cell in (pn.LSTM, pn.GRU, pn.RNN):
    recurrent = cell(3, 4, norm="batch", num_layers=2, t_max=4, xp=torch, dtype="float64", rng=0, reduce=total)
    model = pn.Sequential(recurrent, pn.Linear(4, 2, xp=torch, dtype="float64", rng=1))
    for x, dy, lengths in zip(given["x"], given["dy"], given["lengths"], strict=True):
        for p in model.parameters().values():
            p.requires_grad_()
        y, _ = model(torch.tensor(x[:, rows]), lengths=torch.tensor(lengths[rows]), training=True)
        (y * torch.tensor(dy[:, rows])).sum().backward()
        model.assign({name: (p - 0.1 * total(p.grad)).detach() for name, p in model.parameters().items()})
    found |= {f"{cell.__name__} {name}": a for name, a in model.state_dict().items()}
"""

END = """
np.savez(f"{place}/found{rank}.npz", **{name: a.numpy() for name, a in found.items()})
dist.destroy_process_group()
"""


def found_by(code: str, given: dict[str, Any], place: Path) -> list[dict[str, Any]]:
    """What each of the processes put into `found`."""
    np.savez(place / "given.npz", **given)
    commands = [[sys.executable, "-c", PROCESS + code + END, str(rank), str(place)] for rank in range(PARTS)]
    workers = [subprocess.Popen(c, cwd=ROOT, env=dict(os.environ), stderr=subprocess.PIPE, text=True) for c in commands]
    for worker in workers:
        _, said = worker.communicate(timeout=120)
        assert worker.returncode == 0, said
    return [dict(np.load(place / f"found{rank}.npz")) for rank in range(PARTS)]


@pytest.mark.peers
def test_data_parallel_training_of_two_processes_is_training_of_one(tmp_path: Path, rng: np.random.Generator) -> None:
    """Five updates of stacks with torch.distributed and torch's autograd, against one process with NumPy."""
    x, dy = rng.standard_normal((5, 6, 5, 3)), rng.standard_normal((5, 6, 5, 2))
    lengths = np.concatenate([rng.integers(1, 5, (5, 2)), rng.integers(4, 7, (5, 3))], axis=1)
    parts = found_by(TRAINING, {"x": x, "dy": dy, "lengths": lengths}, tmp_path)
    for cell in (pn.LSTM, pn.GRU, pn.RNN):
        recurrent = cell(3, 4, norm="batch", num_layers=2, t_max=4, dtype="float64", rng=0)
        model = pn.Sequential(recurrent, pn.Linear(4, 2, dtype="float64", rng=1))
        before = model.parameters()
        for batch, cotangent, counts in zip(x, dy, lengths, strict=True):
            _, _, pullback = model.vjp(batch, lengths=counts, training=True)
            grads = pullback(cotangent)[2]
            model.assign({name: p - 0.1 * grads[name] for name, p in model.parameters().items()})
        assert not any(np.allclose(before[name], p) for name, p in model.parameters().items())
        for name, whole in model.state_dict().items():
            for part in parts:
                np.testing.assert_allclose(part[f"{cell.__name__} {name}"], whole, rtol=1e-8, atol=1e-8, err_msg=name)


@pytest.mark.peers
def test_two_processes_have_the_statistics_of_one(tmp_path: Path, rng: np.random.Generator) -> None:
    """torch.distributed with gloo; |mean| much larger than the standard deviation, and parts whose means differ."""
    x, dy = 1e4 + rng.standard_normal((12, 3)), rng.standard_normal((12, 3))
    x[:5] += 3.0
    w, b, mask = rng.uniform(0.5, 2.0, 3), rng.standard_normal(3), np.arange(12)[:, None] % 4 != 1
    parts = found_by(NORM, {"x": x, "dy": dy, "w": w, "b": b, "mask": mask}, tmp_path)

    y, pullback = pn.vjp(pn.batch_norm, x, w, b, mask=mask)
    expected = dict(zip(("y", "dx", "dw", "db"), (y, *pullback(dy)), strict=True))
    layer = pn.BatchNorm(3, dtype="float64")
    layer.assign({"weight": w, "bias": b})
    layer(x, training=True)
    out, pullback = layer.vjp(2.0 * x, training=True)
    dx, grads = pullback(dy)
    expected |= {"layer y": out, "layer dx": 2.0 * dx, "layer dw": grads["weight"], "layer db": grads["bias"]}
    expected |= {f"layer {name}": buffer for name, buffer in layer.buffers.items()}
    for name, whole in expected.items():
        if whole.shape == (12, 3):
            np.testing.assert_allclose(np.concatenate([part[name] for part in parts]), whole, rtol=1e-9, atol=1e-9, err_msg=name)
        else:
            for part in parts:
                np.testing.assert_allclose(part[name], whole, rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.peers
def test_the_hook_is_a_psum_under_jax(rng: np.random.Generator) -> None:
    """Parts along a mapped axis: `jax.lax.psum` sums over them, also where JAX differentiates."""
    import jax
    import jax.numpy as jnp

    x, dy, w = 30.0 + rng.standard_normal((4, 6, 3)), rng.standard_normal((4, 6, 3)), rng.uniform(0.5, 2.0, 3)

    def part(x: Any, dy: Any) -> Any:
        y, pullback = pn.vjp(pn.batch_norm, x, jnp.asarray(w), reduce=lambda a: jax.lax.psum(a, "parts"))
        return y, pullback(dy)[0]

    y, dx = jax.jit(jax.vmap(part, axis_name="parts"))(jnp.asarray(x), jnp.asarray(dy))
    expected, pullback = pn.vjp(pn.batch_norm, x.reshape(24, 3), w)
    np.testing.assert_allclose(np.asarray(y).reshape(24, 3), expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(np.asarray(dx).reshape(24, 3), pullback(dy.reshape(24, 3))[0], rtol=1e-10, atol=1e-10)


@pytest.mark.peers
@pytest.mark.parametrize("cell", LAYERS)
def test_a_cell_under_psum(cell: str, rng: np.random.Generator) -> None:
    """Parts along a mapped axis; JAX differentiates the layer as one function, whose vjp sums over the parts too."""
    import jax
    import jax.numpy as jnp

    whole = random_recurrent(cell, "batch", rng)
    layer = whole.to(xp="jax")
    layer.reduce = lambda a: jax.lax.psum(a, "parts")
    x, dy = rng.standard_normal((2, 5, 3, 4)), rng.standard_normal((2, 5, 3, 3))

    def part(x: Any, dy: Any) -> Any:
        def loss(params: Any, x: Any) -> Any:
            y, _, buffers = layer.apply(params, layer.buffers, x, training=True)
            return jnp.sum(y * dy), (y, buffers)

        (_, kept), (grads, dx) = jax.value_and_grad(loss, (0, 1), has_aux=True)(layer.params, x)
        return kept, dx, grads

    (y, buffers), dx, grads = jax.jit(jax.vmap(part, axis_name="parts"))(jnp.asarray(x), jnp.asarray(dy))

    def joined(a: Any) -> Any:
        return np.concatenate(list(np.asarray(a)), axis=1)

    expected, _, pullback = whole.vjp(joined(x), training=True)
    their_dx, _, their_grads = pullback(joined(dy))
    np.testing.assert_allclose(joined(y), expected, **relative("float64", RECURRENT))
    np.testing.assert_allclose(joined(dx), their_dx, **relative("float64", RECURRENT))
    for name, gradient in their_grads.items():
        np.testing.assert_allclose(np.asarray(grads[name]).sum(0), gradient, **relative("float64", RECURRENT))
    for name, buffer in whole.buffers.items():
        np.testing.assert_allclose(np.asarray(buffers[name])[1], buffer, **relative("float64", RECURRENT))


def test_one_process_is_the_whole(rng: np.random.Generator) -> None:
    """A hook that has nothing to add changes nothing, in extreme rows too."""
    for size in (1e-17, 1.0, 1e15):
        x, dy = (size * (3.0 + rng.standard_normal((6, 3)))).astype("float32"), rng.standard_normal((6, 3)).astype("float32")
        (y, pullback), (expected, their_pullback) = (
            pn.vjp(pn.batch_norm, x, eps=1e-30, **keywords) for keywords in ({"reduce": lambda a: a}, {})
        )
        np.testing.assert_allclose(y, expected, **relative("float32"))
        scale = np.abs(their_pullback(dy)[0]).max()
        np.testing.assert_allclose(pullback(dy)[0] / scale, their_pullback(dy)[0] / scale, **relative("float32"))


@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (0, 1)], ids=str)
def test_a_whole_without_spread_is_an_error_in_every_process(counts: Any) -> None:
    def work(k: int, reduce: Any) -> str:
        with pytest.raises(pn.ShapeError) as raised:
            pn.batch_norm(np.ones((counts[k], 3)), reduce=reduce)
        return str(raised.value)

    for said in Meeting().all(work):
        assert ("is empty in every process" if sum(counts) == 0 else "is one value per channel in all processes") in said


@pytest.mark.parametrize("eps", [1e-5, 1e-30])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2), (4, 3, 0)], ids=str)
def test_an_empty_part_adds_nothing(shape: Any, masked: bool, eps: float, rng: np.random.Generator) -> None:
    """The other has what one process has, forward, backward and in the layer's statistics; where one part has a mask, too."""
    full = (5, *shape[1:]) if shape[0] == 0 else (4, 3, 6)
    x, dy = 1e4 + rng.standard_normal(full), rng.standard_normal(full)
    w, b = rng.uniform(0.5, 2.0, 3), rng.standard_normal(3)
    mask = np.arange(x[:, 0].size).reshape(x[:, 0].shape) % 4 != 1 if masked else None

    def layer(reduce: Any) -> Any:
        made = pn.BatchNorm(3, eps=eps, dtype="float64", reduce=reduce)
        made.load_state_dict({**made.state_dict(), "weight": w, "bias": b})
        return made

    def work(k: int, reduce: Any) -> Any:
        own = layer(reduce)
        part, cotangent = (x, dy) if k == 0 else (np.zeros(shape), np.zeros(shape))
        y, pullback = own.vjp(part, mask=mask if k == 0 else None, training=True)
        return y, *pullback(cotangent), own.buffers

    first, second = (found := Meeting()).all(work)
    assert found.messages[0] == found.messages[1]
    whole = layer(None)
    y, pullback = whole.vjp(x, mask=mask, training=True)
    dx, grads = pullback(dy)
    for mine, theirs in zip((*first[:2], *first[2].values()), (y, dx, *grads.values()), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-9)
    assert second[0].shape == second[1].shape == shape
    assert not any(np.any(g) for g in second[2].values())
    for name, buffer in whole.buffers.items():
        for part in (first, second):
            np.testing.assert_allclose(part[3][name], buffer, **relative("float64"))


@pytest.mark.parametrize("lengths", [None, [2, 3, 5, 4, 1]], ids=["whole", "ragged"])
@pytest.mark.parametrize(("cell", "norm"), BATCH_CELLS)
def test_an_empty_part_of_a_stack_adds_nothing(cell: str, norm: str, lengths: Any, rng: np.random.Generator) -> None:
    start = random_recurrent(cell, norm, rng, num_layers=2, bidirectional=True)
    x, dy = rng.standard_normal((5, 5, 4)), rng.standard_normal((5, 5, 6))

    def work(k: int, reduce: Any) -> Any:
        rows, layer = slice(0, 5 if k == 0 else 0), _with(start, reduce)
        y, _, pullback = layer.vjp(x[:, rows], None, None if lengths is None else lengths[rows], training=True)
        dx, _, grads = pullback(dy[:, rows])
        return y, dx, grads, layer.buffers

    first, second = (found := Meeting()).all(work)
    assert found.messages[0] == found.messages[1]
    whole = start.copy()
    y, _, pullback = whole.vjp(x, None, lengths, training=True)
    dx, _, grads = pullback(dy)
    for mine, theirs in zip((*first[:2], *first[2].values()), (y, dx, *grads.values()), strict=True):
        np.testing.assert_allclose(mine, theirs, **RAGGED_STACK_FLOAT64)
    assert second[0].shape == (5, 0, 6)
    assert not any(np.any(g) for g in second[2].values())
    for name, buffer in whole.buffers.items():
        for part in (first, second):
            np.testing.assert_allclose(part[3][name], buffer, **relative("float64", RECURRENT), err_msg=name)


def test_a_step_of_one_sequence_in_all_processes_changes_no_statistics(rng: np.random.Generator) -> None:
    """The longest sequences of two processes make one step with a variance; what only one of them has makes none."""
    start = pn.GRU(4, 3, norm="batch", dtype="float64", t_max=5, rng=0)
    x, lengths = rng.standard_normal((5, 4, 4)), [[3, 1], [4, 0]]

    def work(k: int, reduce: Any) -> Any:
        layer = _with(start, reduce)
        layer(x[:, 2 * k : 2 * k + 2], lengths=lengths[k], training=True)
        return layer.buffers

    for buffers in Meeting().all(work):
        np.testing.assert_array_equal(buffers["num_batches_tracked_l0"], [1, 1, 1, 0, 0])
        np.testing.assert_array_equal(buffers["norm_hh_l0.running_var"][3:], 1.0)


EMPTY = """
found = {}
if rank == 0:
    x, dy = torch.tensor(given["x"]), torch.tensor(given["dy"])
else:
    x, dy = (torch.zeros((6, 0, n), dtype=torch.float64) for n in (3, 4))
norm = pn.BatchNorm(3, channel_axis=-1, xp=torch, dtype="float64", reduce=total)
lstm = pn.LSTM(3, 4, norm="batch", t_max=4, xp=torch, dtype="float64", rng=0, reduce=total)
y, _, pullback = pn.Sequential(norm, lstm).vjp(x, training=True)
found |= {name: total(g) for name, g in pullback(dy)[2].items()}
found |= {f"buffer {name}": b for part in (norm, lstm) for name, b in part.buffers.items()}
for wrong in (torch.zeros((6, 0, 3), dtype=torch.float64), torch.zeros((6, 1 - rank, 3), dtype=torch.float64)):
    try:
        lstm(wrong, training=True)
        raise SystemExit("no error")
    except pn.ShapeError:
        pass
"""


@pytest.mark.peers
def test_an_empty_process_leaves_no_one_waiting(tmp_path: Path, rng: np.random.Generator) -> None:
    """With gloo, which waits for what is not sent: a part without sequences, and errors that both raise."""
    x, dy = rng.standard_normal((6, 5, 3)), rng.standard_normal((6, 5, 4))
    parts = found_by(EMPTY, {"x": x, "dy": dy}, tmp_path)
    norm, lstm = pn.BatchNorm(3, channel_axis=-1, dtype="float64"), pn.LSTM(3, 4, norm="batch", t_max=4, dtype="float64", rng=0)
    _, _, pullback = pn.Sequential(norm, lstm).vjp(x, training=True)
    expected = pullback(dy)[2] | {f"buffer {name}": b for part in (norm, lstm) for name, b in part.buffers.items()}
    for part in parts:
        for name, whole in expected.items():
            np.testing.assert_allclose(part[name], whole, rtol=1e-9, atol=1e-9, err_msg=name)
