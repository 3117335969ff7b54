"""resemblyzer (who is speaking?): three LSTMs over the mel spectrum of 1.6 s of speech, a Linear, and the direction of what is positive.

Run `python docs/examples/real_resemblyzer.py`. The weights are a pickle of torch, in its format before 1.6: `prepared` reads it with torch,
weights only, and keeps safetensors. From there on torch is not needed.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import MagicMock, patch

import numpy as np
from side_by_side import Case, exported, main, package_file

import portnorm as pn

FRAMES, MELS = 160, 40
Net = Callable[[np.ndarray], np.ndarray]


def prepared(folder: Path) -> Path:
    """The state dict of the model as safetensors; the file holds an optimizer's state beside it."""
    import torch
    from safetensors.torch import save_file

    kept = torch.load(package_file("resemblyzer", "resemblyzer/pretrained.pt"), map_location="cpu", weights_only=True)
    save_file(kept["model_state"], folder / "resemblyzer.safetensors")
    return folder / "resemblyzer.safetensors"


def load(path: Path) -> pn.Sequential:
    """Spectra (batch, frames, mels) to (batch, 256)."""
    lstm = pn.import_checkpoint(path, prefix="lstm.", batch_first=True, return_sequences=False)
    return pn.Sequential(lstm, pn.import_checkpoint(path, prefix="linear."))


def embedding(raw: np.ndarray) -> np.ndarray:
    positive = np.maximum(raw, 0)
    return positive / np.linalg.norm(positive, axis=1, keepdims=True)


def original() -> Net:
    """The package's own module. What it needs to read sound is left out."""
    with patch.dict(sys.modules, {"resemblyzer.audio": MagicMock()}):
        from resemblyzer.voice_encoder import VoiceEncoder
    import torch

    module = VoiceEncoder("cpu", verbose=False).eval()

    def net(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.from_numpy(x)).numpy()

    return net


def spectrum(batch: int = 1) -> np.ndarray:
    """Energies that change slowly, with the spread of speech: most are small."""
    random = np.random.default_rng(0)
    walk = np.cumsum(random.standard_normal((batch, FRAMES, MELS)), axis=1) * 0.3
    return np.exp(walk - walk.max(axis=(1, 2), keepdims=True)).astype("float32")


def cases(batch: int = 1) -> Iterator[Case]:
    import torch

    with tempfile.TemporaryDirectory() as folder:
        model = load(prepared(Path(folder)))
    theirs, graph, x = original(), exported(model, lengths=False), spectrum(batch)
    calls = (lambda: embedding(model(x)[0])), (lambda: embedding(graph(x=x)[0])), (lambda: theirs(x))
    yield Case("resemblyzer", f"{FRAMES} frames", f"its torch {torch.__version__}", *calls)


if __name__ == "__main__":
    main(cases)
