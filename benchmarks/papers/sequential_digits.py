"""Section 5.1 of Cooijmans et al. 2016 (arXiv 1603.09025): images read pixel by pixel, in order and permuted.

MNIST (784 steps) is not redistributed here; the stand-in is scikit-learn's real 8 × 8 digits, 64 steps, 1,437 for training and 360 held
out. The permutation is one fixed true permutation; the paper's released code draws 784 indices with replacement, which keeps about 63 %
of the pixels. All models have the same size and budget, Adam, and a forget bias of 1; noise of standard deviation 0.1 on the initial
state for BN, as in the paper.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import numpy as np

import portnorm as pn
from benchmarks.papers.common import COLORS, Result, band, main, progress, spread
from portnorm.digits import Dataset, sequential_digits
from portnorm.training import accuracy, classifier, train

EPOCHS, HIDDEN, BATCH, LR, SEEDS = 16, 48, 48, 0.01, 5
MODELS: dict[str, Any] = {"plain": None, "BN": "batch", "LN": "layer"}
PUBLISHED = {("plain", "in order"): "98.9", ("BN", "in order"): "99.0", ("plain", "permuted"): "90.2", ("BN", "permuted"): "95.4"}
GAINS = (0.1, 0.3, 1.0)


def one(job: tuple[str, Any, str, int, int]) -> dict[str, Any]:
    """Train one model: the mean loss of every epoch, and the share of held-out images that it names."""
    _, norm, order, seed, epochs = job
    data, held_out = (_ordered(part, order) for part in sequential_digits())
    model = classifier(norm, data.x.shape[2], HIDDEN, 10, data.x.shape[0], seed)
    noise = 0.1 if isinstance(norm, pn.Variant) or norm == "batch" else 0.0
    history = train(model, data, pn.Adam(lr=LR), epochs=epochs, batch=BATCH, clip=1.0, state_noise=noise, seed=seed)
    losses = np.asarray(history.losses).reshape(epochs, -1).mean(axis=1)
    return {"losses": losses.tolist(), "accuracy": 100 * accuracy(model, held_out)}


def _ordered(data: Dataset, order: str) -> Dataset:
    if order == "in order":
        return data
    return Dataset(np.ascontiguousarray(data.x[np.random.default_rng(64).permutation(data.x.shape[0])]), data.labels, data.lengths)


def run(quick: bool) -> Result:
    seeds, epochs = (1, 1) if quick else (SEEDS, EPOCHS)
    jobs: list[tuple[str, Any, str, int, int]] = [
        (name, norm, order, seed, epochs) for order in ("in order", "permuted") for name, norm in MODELS.items() for seed in range(seeds)
    ]
    for gain in GAINS[1:]:
        norm = replace(pn.VARIANTS["LSTM"]["batch"], gain=gain)
        jobs += [(f"BN, γ = {gain}", norm, "permuted", seed, epochs) for seed in range(min(seeds, 3))]
    found: dict[str, dict[str, list[Any]]] = {}
    with progress("digits", len(jobs)) as advance, ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for job, result in zip(jobs, pool.map(one, jobs), strict=True):
            entry = found.setdefault(f"{job[0]}, {job[2]}", {"losses": [], "accuracy": []})
            entry["losses"].append(result["losses"])
            entry["accuracy"].append(result["accuracy"])
            advance()
    rows = []
    for name in found:
        model, _, order = name.rpartition(", ")
        entry = found[name]
        final = [losses[-1] for losses in entry["losses"]]
        rows.append((model, order, PUBLISHED.get((model, order), "–"), spread(entry["accuracy"], 1), spread(final, 2), str(len(final))))
    means = {name: float(np.mean(entry["accuracy"])) for name, entry in found.items()}
    best = {order: max(MODELS, key=lambda m, o=order: means[f"{m}, {o}"]) for order in ("in order", "permuted")}
    gains = ", ".join(f"{means[f'BN, γ = {g}, permuted' if g != 0.1 else 'BN, permuted']:.1f} % with γ = {g}" for g in GAINS)
    finding = (
        f"Best on held-out images: {best['in order']} in order, {best['permuted']} permuted; BN against plain "
        f"{means['BN, in order'] - means['plain, in order']:+.1f} and {means['BN, permuted'] - means['plain, permuted']:+.1f} "
        f"points (published: "
        f"+0.1 and +5.2 on MNIST). γ: {gains} on the permuted digits. LN has one input feature per step here, of which LN(xW) "
        f"keeps little but "
        "the sign."
    )
    settings = {"epochs": epochs, "hidden": HIDDEN, "batch": BATCH, "lr": LR, "seeds": seeds, "clip": 1.0, "dtype": "float32"}
    columns = ("model", "pixels", "published accuracy % (MNIST)", "measured accuracy % (digits)", "training loss, last epoch", "seeds")
    return Result("Sequential and permuted digits (Cooijmans et al. 2016, table 1)", columns, rows, finding, settings, found)


def draw(result: Result, figure: Any) -> None:
    axes = figure.subplots(1, 3)
    for panel, order in zip(axes, ("in order", "permuted"), strict=False):
        for name in MODELS:
            band(panel, result.measured[f"{name}, {order}"]["losses"], name, color=COLORS[name])
        panel.set_title(f"digits {order}")
        panel.set_xlabel("epoch")
        panel.set_ylim(0, 2.4)
        panel.legend()
    axes[0].set_ylabel("training loss (nats): median, lowest to highest")
    for k, gain in enumerate(GAINS):
        name = "BN, permuted" if gain == 0.1 else f"BN, γ = {gain}, permuted"
        band(axes[2], result.measured[name]["losses"], f"γ = {gain}", color=f"C{k}")
    axes[2].set_title("BN-LSTM, permuted, by γ")
    axes[2].set_ylim(0, 2.4)
    axes[2].legend()


if __name__ == "__main__":
    main("sequential_digits", run, draw, (14.0, 4.2))
