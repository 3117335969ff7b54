"""chars2vec (words to vectors by their spelling): two LSTMs in a file of stand-alone Keras 2.2, without TensorFlow.

Run `python docs/examples/real_chars2vec.py`. The file holds no configuration; Keras below 2.3 meant `hard_sigmoid` for the gates, and
clip(0.2 a + 0.5, 0, 1) by it. Today's Keras has another default and another function of that name, so the package's own code gives other
numbers there than its authors had; the comparison says what was meant.
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from typing import Any

import numpy as np
from side_by_side import Case, exported, main, package_file

import portnorm as pn

MODELS = "chars2vec/trained_models/eng_{size}/{name}"
WORD = "normalization"


def load(size: int) -> pn.Sequential:
    """The whole net: (batch, time, letters) to (batch, size)."""
    weights = package_file("chars2vec", MODELS.format(size=size, name="weights.h5"))
    first = pn.import_checkpoint(weights, prefix="lstm_1/", batch_first=True)
    return pn.Sequential(first, pn.import_checkpoint(weights, prefix="lstm_2/", batch_first=True, return_sequences=False))


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
    import h5py
    import keras

    def gate(a: Any) -> Any:
        return keras.ops.clip(0.2 * a + 0.5, 0.0, 1.0)

    layers = [keras.layers.LSTM(size, return_sequences=n == 1, recurrent_activation=gate) for n in (1, 2)]
    model = keras.Sequential([keras.Input((None, len(alphabet(size)))), *layers])
    with h5py.File(package_file("chars2vec", MODELS.format(size=size, name="weights.h5"))) as file:
        for n, layer in enumerate(layers, 1):
            layer.set_weights([file[f"lstm_{n}/lstm_{n}/{name}:0"][()] for name in ("kernel", "recurrent_kernel", "bias")])
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
