"""resemblyzer (who is speaking?): three LSTMs over the mel spectrum of 1.6 s of speech, a Linear, and the direction of what is positive.

Run `python docs/examples/real_resemblyzer.py`. The weights are a pickle of torch, in its format before 1.6: `prepared` reads it with torch,
weights only, and keeps safetensors. From there on torch is not needed.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock, patch

import numpy as np
from side_by_side import Row, difference, exported, main, milliseconds, package_file

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
    """The package's own module. What it imports besides torch is for sound files and is left out."""
    absent = {name: MagicMock() for name in ("librosa", "webrtcvad", "typing_extensions") if name not in sys.modules}
    with patch.dict(sys.modules, absent):
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


def compare() -> list[Row]:
    import torch

    with tempfile.TemporaryDirectory() as folder:
        model = load(prepared(Path(folder)))
    theirs, graph, x = original(), exported(model, lengths=False), spectrum()
    calls: dict[str, Net] = {
        "NumPy": lambda x: embedding(model(x)[0]),
        "ONNX": lambda x: embedding(graph(x=x)[0]),
        "original": theirs,
    }
    ms = milliseconds({name: lambda call=call: call(x) for name, call in calls.items()})
    batch = spectrum(3)
    expected = theirs(batch)
    differences = (difference(calls[name](batch), expected) for name in ("NumPy", "ONNX"))
    return [Row("resemblyzer", f"{FRAMES} frames", f"its torch {torch.__version__}", float(expected.max()), *differences, ms)]


if __name__ == "__main__":
    main(compare)
