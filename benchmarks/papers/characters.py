"""Section 5.2 of Cooijmans et al. 2016 (arXiv 1603.09025): a language model over characters, and longer texts than in training.

Penn Treebank and text8 are not redistributed here; the stand-in is the English documentation inside Python's standard library
(`pydoc_data.topics`), its last tenth held out. BN-LSTMs train on T_max steps with statistics of their own for each step. At inference a
step after T_max uses the last row; `t_max=1` is one row for all steps. Bits per character on held-out text, from a zero state, in
sequences of T_max steps and in sequences many times longer.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pydoc_data.topics import topics
from typing import Any

import numpy as np

import portnorm as pn
from benchmarks.papers.common import COLORS, Result, main, progress

STEPS, BATCH, HIDDEN, EMBEDDED, LR, UPDATES, LONG = 50, 32, 128, 32, 0.005, 1500, 2000
MODELS: dict[str, tuple[Any, int]] = {"plain": (None, 1), "BN": ("batch", STEPS), "BN, one row": ("batch", 1), "LN": ("layer", 1)}
PUBLISHED = {"plain": "1.38", "BN": "1.32"}


def text() -> tuple[Any, Any, int]:
    """Character numbers of the training text and of the held-out text, and how many characters there are."""
    characters = np.frombuffer("\n".join(topics[k] for k in sorted(topics)).encode("utf-32-le"), dtype=np.uint32)
    names, ids = np.unique(characters, return_inverse=True)
    cut = len(ids) * 9 // 10
    return ids[:cut], ids[cut:], len(names)


def bits(logits: Any, targets: Any) -> Any:
    """−log₂ p of each target (time, batch)."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_p = np.take_along_axis(shifted, targets[..., None], axis=-1)[..., 0] - np.log(np.exp(shifted).sum(axis=-1))
    return -log_p / np.log(2)


def one(job: tuple[str, int, int]) -> dict[str, Any]:
    name, updates, long = job
    norm, t_max = MODELS[name]
    ids, held_out, count = text()
    rng = np.random.default_rng(0)
    lstm = pn.LSTM(EMBEDDED, HIDDEN, norm=norm, t_max=t_max, forget_bias=1.0, rng=0)
    model = pn.Sequential(pn.Embedding(count, EMBEDDED, rng=0), lstm, pn.Linear(HIDDEN, count, rng=0))
    adam, losses = pn.Adam(lr=LR), []
    state = adam.init(model.parameters())
    noise = 0.1 if norm == "batch" else 0.0

    def batch() -> tuple[Any, Any]:
        starts = rng.integers(0, len(ids) - STEPS - 1, BATCH)
        window = np.stack([ids[s : s + STEPS + 1] for s in starts], axis=1)
        return window[:-1], window[1:]

    for _ in range(updates):
        x, y = batch()
        logits, _, pullback = model.vjp(x, model.initial_state(BATCH, noise=noise, rng=rng), training=True)
        loss, loss_pullback = pn.vjp(pn.softmax_cross_entropy, logits, y)
        grads, _ = pn.clip_by_global_norm(pullback(loss_pullback(np.ones_like(loss))[0])[2], 1.0)
        params, state = adam.update(model.parameters(), grads, state)
        model.assign(params)
        losses.append(float(loss) / np.log(2))
    if norm == "batch":
        model.estimate_population((batch()[0], None, model.initial_state(BATCH, noise=noise, rng=rng)) for _ in range(50))

    def measured(length: int, number: int) -> Any:
        starts = np.linspace(0, len(held_out) - length - 1, number).astype(int)
        window = np.stack([held_out[s : s + length + 1] for s in starts], axis=1)
        return bits(model(window[:-1])[0], window[1:]).mean(axis=1)

    by_step = measured(long, 24)
    return {
        "training": np.asarray(losses).reshape(-1, max(1, updates // 50)).mean(axis=1).tolist(),
        "short": float(measured(STEPS, 400).mean()),
        "long": float(by_step.mean()),
        "after": float(by_step[STEPS:].mean()),
        "by_step": by_step.reshape(-1, STEPS).mean(axis=1).tolist(),
    }


def run(quick: bool) -> Result:
    updates, long = (50, 4 * STEPS) if quick else (UPDATES, LONG)
    found = {}
    with progress("language models", len(MODELS)) as advance, ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for name, result in zip(MODELS, pool.map(one, [(name, updates, long) for name in MODELS]), strict=True):
            found[name] = result
            advance()
    rows = [(n, PUBLISHED.get(n, "–"), f"{f['short']:.3f}", f"{f['long']:.3f}", f"{f['after']:.3f}") for n, f in found.items()]
    order = sorted(found, key=lambda n: found[n]["short"])
    finding = (
        f"After {updates} updates, on held-out sequences of {STEPS} characters, from best to worst: {', '.join(order)} "
        f"(published: BN before plain "
        f"by 0.06). On sequences of {long} characters, {long // STEPS} times T_max, the BN-LSTM has {found['BN']['after']:.3f} "
        f"bits per character "
        f"after T_max with the last row of its statistics ({found['BN']['after'] - found['BN']['short']:+.3f} against short "
        f"sequences), and "
        f"{found['BN, one row']['after']:.3f} with one row for all steps; the plain LSTM has {found['plain']['after']:.3f}."
    )
    settings = {
        "steps": STEPS,
        "batch": BATCH,
        "hidden": HIDDEN,
        "embedded": EMBEDDED,
        "lr": LR,
        "updates": updates,
        "clip": 1.0,
        "seed": 0,
    }
    settings |= {"characters": len(text()[0]) + len(text()[1]), "alphabet": text()[2], "dtype": "float32"}
    columns = ("model", "published (Penn Treebank, 1000 units)", f"T = {STEPS}", f"T = {long}", f"T = {long}, after step {STEPS}")
    return Result("Bits per character (Cooijmans et al. 2016, table 2 and figure 3)", columns, rows, finding, settings, found)


def draw(result: Result, figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    styles = {
        name: {"color": COLORS[name[:5].strip(", ") if name in COLORS else "BN"], "linestyle": "--" if "row" in name else "-"}
        for name in MODELS
    }
    for name, found in result.measured.items():
        every = result.settings["updates"] / len(found["training"])
        left.plot(every * np.arange(1, len(found["training"]) + 1), found["training"], label=name, **styles[name])
        right.plot(STEPS * (np.arange(len(found["by_step"])) + 0.5), found["by_step"], label=name, **styles[name])
    left.set_xlabel("update")
    left.set_ylabel("bits per character, training")
    right.set_xlabel("position in a held-out sequence")
    right.set_ylabel("bits per character")
    right.axvline(STEPS, color="black", linewidth=0.7)
    left.legend()
    right.legend()


if __name__ == "__main__":
    main("characters", run, draw, (11.0, 4.0))
