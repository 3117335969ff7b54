"""Two findings about where each normalization pays.

Section 6.6 of Ba, Kiros & Hinton 2016 (arXiv 1607.06450): a feed-forward net on permutation-invariant MNIST at batch 128 and 4; layer
normalization does not care, batch normalization suffers at 4. There 784-1000-1000-10; here scikit-learn's 8 × 8 digits and 64-100-100-10,
ReLU.

Laurent et al. 2016 (arXiv 1510.01378) and Deep Speech 2 (arXiv 1512.02595): batch normalization of the input term alone, h ← φ(BN(xW) +
hU), over batch and time. It trains faster; it helps deep recurrent nets and not shallow ones (Deep Speech 2, word error rate on the
development set: 1 layer 13.55 → 14.40, 3 layers 11.61 → 10.56). Here LSTM layers that read the digits row by row (8 steps of 8 pixels).
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np

import portnorm as pn
from benchmarks.papers.common import COLORS, Result, band, main, progress, spread
from portnorm.digits import Dataset, sequential_digits
from portnorm.training import accuracy, train

SEEDS, HIDDEN = 5, 100
DENSE_UPDATES, DENSE_LR = {128: 600, 4: 2400}, 0.001
STACK = {"epochs": 12, "hidden": 32, "batch": 48, "lr": 0.005}
NORMS: dict[str, Any] = {"plain": None, "BN": pn.BatchNorm, "LN": pn.LayerNorm}
VERTICAL: dict[str, Any] = {"plain": None, "BN": "batch-input"}
PUBLISHED = {"1": ("13.55", "14.40"), "3": ("11.61", "10.56")}


def dense(job: tuple[str, int, int, int]) -> dict[str, Any]:
    """Train 64-100-100-10 with a normalization before each ReLU, by the layers' own pullbacks."""
    name, batch, seed, updates = job
    data, held_out = (Dataset(part.x.transpose(1, 0, 2).reshape(len(part.labels), -1), part.labels, None) for part in sequential_digits())
    layers: list[Any] = []
    for k, (inputs, outputs) in enumerate(((64, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 10))):
        layers.append(pn.Linear(inputs, outputs, rng=10 * seed + k))
        layers += [NORMS[name](outputs)] if NORMS[name] is not None and outputs != 10 else []
        layers += ["relu"] if outputs != 10 else []
    named = {f"{k}.{n}": p for k, layer in enumerate(layers) if layer != "relu" for n, p in layer.parameters().items()}
    rng, adam, losses = np.random.default_rng(seed), pn.Adam(lr=DENSE_LR), []
    state = adam.init(named)
    for _ in range(updates):
        rows = rng.choice(len(data.labels), batch, replace=False)
        y, pullbacks = data.x[rows], []
        for layer in layers:
            if layer == "relu":
                pullbacks.append(lambda dy, open_=y > 0: (np.where(open_, dy, 0), {}))
                y = np.maximum(y, 0)
            else:
                y, pullback = layer.vjp(y, training=True)
                pullbacks.append(pullback)
        loss, loss_pullback = pn.vjp(pn.softmax_cross_entropy, y, data.labels[rows])
        dy, grads = loss_pullback(np.ones_like(loss))[0], {}
        for k in reversed(range(len(layers))):
            dy, own = pullbacks[k](dy)
            grads |= {f"{k}.{n}": g for n, g in own.items()}
        named, state = adam.update(named, {n: grads[n] for n in named}, state)
        for k, layer in enumerate(layers):
            if layer != "relu":
                layer.assign({n.partition(".")[2]: p for n, p in named.items() if n.startswith(f"{k}.")})
        losses.append(float(loss))
    y = held_out.x
    for layer in layers:
        y = np.maximum(y, 0) if layer == "relu" else layer(y)
    error = 100 * float(np.mean(np.argmax(y, axis=-1) != held_out.labels))
    return {"losses": np.asarray(losses).reshape(20, -1).mean(axis=1).tolist(), "error": error}


def stack(job: tuple[str, int, int, int]) -> dict[str, Any]:
    """Train a stack of LSTM layers, with or without batch normalization of the input terms."""
    name, layers, seed, epochs = job
    data, held_out = (
        Dataset(np.ascontiguousarray(part.x.reshape(8, 8, -1).transpose(0, 2, 1)), part.labels, None) for part in sequential_digits()
    )
    lstm = pn.LSTM(8, STACK["hidden"], norm=VERTICAL[name], num_layers=layers, return_sequences=False, forget_bias=1.0, rng=seed)
    model = pn.Sequential(lstm, pn.Linear(STACK["hidden"], 10, rng=seed))
    history = train(model, data, pn.Adam(lr=STACK["lr"]), epochs=epochs, batch=int(STACK["batch"]), clip=1.0, seed=seed)
    losses = np.asarray(history.losses).reshape(epochs, -1).mean(axis=1)
    return {"losses": losses.tolist(), "error": 100 * (1 - accuracy(model, held_out)), "training error": 100 * (1 - accuracy(model, data))}


def run(quick: bool) -> Result:
    seeds, updates, epochs = (1, {128: 20, 4: 20}, 1) if quick else (SEEDS, DENSE_UPDATES, int(STACK["epochs"]))
    first = [(name, batch, seed, updates[batch]) for batch in DENSE_UPDATES for name in NORMS for seed in range(seeds)]
    second = [(name, layers, seed, epochs) for layers in (1, 3) for name in VERTICAL for seed in range(seeds)]
    found: dict[str, dict[str, list[Any]]] = {}
    with progress("small batches", len(first) + len(second)) as advance, ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for jobs, work, kind in ((first, dense, "batch"), (second, stack, "layers")):
            for job, result in zip(jobs, pool.map(work, jobs), strict=True):  # type: ignore[arg-type]
                for key, value in result.items():
                    found.setdefault(f"{job[0]}, {kind} {job[1]}", {}).setdefault(key, []).append(value)
                advance()
    rows = []
    for name, entry in found.items():
        model, _, where = name.partition(", ")
        kind, _, number = where.partition(" ")
        published = {"batch": "figure 6 (no numbers)", "layers": "–"}[kind]
        if kind == "layers":
            published = f"{PUBLISHED[number][model == 'BN']} % word errors"
        last = [losses[-1] for losses in entry["losses"]]
        rows.append((where, model, published, spread(entry["error"], 1), spread(last, 3)))
    settings = {"hidden": HIDDEN, "updates": updates, "lr": DENSE_LR, "seeds": seeds, "stack": STACK, "dtype": "float32"}
    columns = ("", "norm", "published", "held-out error %", "training loss at the end")
    title = "Small batches (Ba et al. 2016, section 6.6) and vertical batch normalization (Laurent et al. 2016, Deep Speech 2)"
    return Result(title, columns, rows, finding(found), settings, found)


def finding(found: dict[str, dict[str, list[Any]]]) -> str:
    error = {name: float(np.mean(entry["error"])) for name, entry in found.items()}
    loss = {name: float(np.mean([losses[-1] for losses in entry["losses"]])) for name, entry in found.items()}
    robust = "as published" if loss["LN, batch 4"] < loss["BN, batch 4"] else "unlike what is published"
    held_out = np.abs(error["LN, batch 4"] - error["BN, batch 4"]) < np.std(found["LN, batch 4"]["error"] + found["BN, batch 4"]["error"])
    deep = "helps" if loss["BN, layers 3"] < loss["plain, layers 3"] else "does not help"
    shallow = "helps one layer too, unlike there" if loss["BN, layers 1"] < loss["plain, layers 1"] else "does not help one layer, as there"
    return (
        f"At batch 4 the training loss ends at {loss['LN, batch 4']:.3f} with LN and {loss['BN, batch 4']:.3f} with BN ({robust}: "
        f"LN is robust, BN "
        f"is not); the held-out errors, {error['LN, batch 4']:.1f} and {error['BN, batch 4']:.1f} %, "
        f"{'lie within their spread' if held_out else 'differ by more than their spread'}. At batch 128 they are "
        f"{error['LN, batch 128']:.1f} "
        f"and {error['BN, batch 128']:.1f} %. Vertical BN {deep} three LSTM layers, as in Deep Speech 2 (training loss "
        f"{loss['plain, layers 3']:.3f} → {loss['BN, layers 3']:.3f}, held-out error {error['plain, layers 3']:.1f} → "
        f"{error['BN, layers 3']:.1f} %), and {shallow} ({loss['plain, layers 1']:.3f} → {loss['BN, layers 1']:.3f}, "
        f"{error['plain, layers 1']:.1f} → {error['BN, layers 1']:.1f} %): with this budget what is seen is faster convergence."
    )


def draw(result: Result, figure: Any) -> None:
    for axes, (title, where) in zip(
        figure.subplots(1, 4),
        (("batch 128", "batch 128"), ("batch 4", "batch 4"), ("1 LSTM layer", "layers 1"), ("3 LSTM layers", "layers 3")),
        strict=True,
    ):
        for name, entry in result.measured.items():
            model, _, place = name.partition(", ")
            if place == where:
                band(axes, entry["losses"], model, color=COLORS[model])
        axes.set_title(title)
        axes.set_yscale("log")
        axes.set_xlabel("twentieth of all updates" if "batch" in where else "epoch")
        axes.legend()
    figure.axes[0].set_ylabel("training loss: median, lowest to highest")


if __name__ == "__main__":
    main("small_batches", run, draw, (16.0, 3.8))
