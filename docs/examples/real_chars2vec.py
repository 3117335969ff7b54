"""chars2vec (words to vectors by their spelling): two LSTMs in a file of stand-alone Keras 2.2, without TensorFlow.

Run `python docs/examples/real_chars2vec.py`. The file holds no configuration; Keras below 2.3 meant `hard_sigmoid` for the gates, and
clip(0.2 a + 0.5, 0, 1) by it. Today's Keras has another default and another function of that name, so the package's own code gives other
numbers there than its authors had; the comparison says what was meant.
"""

from __future__ import annotations

import os
import pickletools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from side_by_side import Case, exported, main, package_file

import portnorm as pn

os.environ.setdefault("KERAS_BACKEND", "torch")
MODELS = "chars2vec/trained_models/eng_{size}/{name}"
WORD = "normalization"


def weights(size: int) -> tuple[Path, list[str]]:
    """The file, and what it calls the two LSTMs: Keras numbered them on, model after model."""
    path = package_file("chars2vec", MODELS.format(size=size, name="weights.h5"))
    with h5py.File(path) as file:
        return path, [name.decode() for name in file.attrs["layer_names"] if name.startswith(b"lstm")]


def load(size: int) -> pn.Sequential:
    """The whole net: (batch, time, letters) to (batch, size)."""
    path, (first, second) = weights(size)
    lstm = pn.import_checkpoint(path, prefix=f"{first}/", batch_first=True)
    return pn.Sequential(lstm, pn.import_checkpoint(path, prefix=f"{second}/", batch_first=True, return_sequences=False))


def alphabet(size: int) -> dict[str, int]:
    """The letters and their places. They lie in a pickle, of which only the constants are looked at: nothing in it is run."""
    data = package_file("chars2vec", MODELS.format(size=size, name="model.pkl")).read_bytes()
    constants = [value for code, value, _ in pickletools.genops(data) if code.name.startswith(("BINUNICODE", "BININT"))][1:]
    return dict(zip(constants[::2], constants[1::2], strict=True))


def one_hot(word: str, letters: dict[str, int]) -> np.ndarray:
    """(1, time, letters), as the package feeds it; what is no letter is 0."""
    x = np.zeros((1, len(word), len(letters)), "float32")
    for t, letter in enumerate(word.lower()):
        if letter in letters:
            x[0, t, letters[letter]] = 1
    return x


def original(size: int) -> Any:
    """The package's model in Keras, with the gates that its version meant."""
    import keras

    def gate(a: Any) -> Any:
        return keras.ops.clip(0.2 * a + 0.5, 0.0, 1.0)

    path, names = weights(size)
    layers = [keras.layers.LSTM(size, return_sequences=name == names[0], recurrent_activation=gate) for name in names]
    model = keras.Sequential([keras.Input((None, len(alphabet(size)))), *layers])
    with h5py.File(path) as file:
        for name, layer in zip(names, layers, strict=True):
            layer.set_weights([file[f"{name}/{name}/{part}:0"][()] for part in ("kernel", "recurrent_kernel", "bias")])
    return lambda x: np.asarray(keras.ops.convert_to_numpy(model(x, training=False)))


def case(size: int) -> Case:
    import keras

    model, theirs, x = load(size), original(size), one_hot(WORD, alphabet(size))
    graph = exported(model, lengths=False)
    by, part = f"Keras {keras.__version__} on {keras.backend.backend()}", f"eng_{size}, {len(WORD)} letters"
    return Case("chars2vec", part, by, lambda: model(x)[0], lambda: graph(x=x)[0], lambda: theirs(x))


def cases() -> Iterator[Case]:
    yield from map(case, (50, 300))


if __name__ == "__main__":
    main(cases)
