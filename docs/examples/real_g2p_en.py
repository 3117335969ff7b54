"""g2p-en (English spelling to phonemes): a GRU reads the letters, another writes phonemes greedily, from one .npz file.

Run `python docs/examples/real_g2p_en.py`. The names in the file are torch's, shortened, under the prefixes `enc_` and `dec_`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
from side_by_side import Case, exported, main, package_file

import portnorm as pn

LETTERS = {letter: k for k, letter in enumerate(["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"])}
START, END, MOST = 2, 3, 20
Net = Callable[[str], np.ndarray]


def load() -> tuple[pn.Sequential, pn.Sequential]:
    """The encoder, letters (time, batch) to all its states; and the decoder, one phoneme (time, batch) to scores of the next."""
    path = package_file("g2p-en", "g2p_en/checkpoint20.npz")
    arrays = np.load(path)

    def side(name: str) -> list[pn.Layer]:
        embedding = pn.Embedding(*arrays[f"{name}_emb"].shape)
        embedding.load_state_dict({"weight": arrays[f"{name}_emb"]})
        return [embedding, pn.import_checkpoint(path, prefix=f"{name}_", ignore=[f"{name}_emb"])]

    scores = pn.Linear(*reversed(arrays["fc_w"].shape))
    scores.load_state_dict({"weight": arrays["fc_w"], "bias": arrays["fc_b"]})
    return pn.Sequential(*side("enc")), pn.Sequential(*side("dec"), scores)


def indices(word: str) -> np.ndarray:
    """(time, 1), with the end of the word."""
    return np.array([[LETTERS.get(letter, 1)] for letter in word] + [[LETTERS["</s>"]]])


def greedy(encode: Any, step: Any, word: str) -> np.ndarray:
    """The scores of each step, whose largest is the next phoneme.

    `encode` gives the state after the word, `step` (scores, state) after a phoneme.
    """
    state, phoneme, scores = encode(indices(word)), START, []
    for _ in range(MOST):
        logits, state = step(np.array([phoneme]), state)
        scores.append(logits[0])
        phoneme = int(logits.argmax())
        if phoneme == END:
            break
    return np.array(scores)


def in_numpy() -> Net:
    encoder, decoder = load()
    embedding, gru, scores = decoder.parts

    def step(phoneme: np.ndarray, state: Any) -> Any:
        h, state = gru.step(embedding(phoneme), state)
        return scores(h), state

    def encode(x: np.ndarray) -> Any:
        _, (state,) = encoder(x)
        return state

    return lambda word: greedy(encode, step, word)


def in_onnx() -> Net:
    """The encoder as a graph of sequences, the decoder as one of a single step."""
    encoder, decoder = load()
    encode, decode = exported(encoder, lengths=False, state=True), exported(decoder, streaming=True)
    zeros = np.zeros((1, 1, 256), "float32")

    def step(phoneme: np.ndarray, state: Any) -> Any:
        return decode(x=phoneme, h_0=state)

    return lambda word: greedy(lambda x: encode(x=x, h_0=zeros)[1], step, word)


def original() -> Any:
    """The package's own class. Importing it would download dictionaries, which only words that are in them need; they are left out."""
    absent = {name: MagicMock() for name in ("nltk", "nltk.corpus", "nltk.tokenize", "g2p_en.expand")}
    with patch.dict(sys.modules, absent):
        from g2p_en.g2p import G2p

        return G2p()


def scores_of(theirs: Any, word: str) -> np.ndarray:
    """What the package's `predict` computes and does not give: the scores of each step."""
    found = []

    class Seen(np.ndarray):
        def argmax(self, *axis: Any, **options: Any) -> Any:
            found.append(np.asarray(self)[0].copy())
            return np.asarray(self).argmax(*axis, **options)

    with patch.object(theirs, "fc_b", theirs.fc_b.view(Seen)):
        theirs.predict(word)
    return np.array(found)


def cases(words: tuple[str, ...] = ("activationist",)) -> Iterator[Case]:
    sides = in_numpy(), in_onnx(), original()
    yield from (case(word, *sides) for word in words)


def case(word: str, ours: Net, graph: Net, theirs: Any) -> Case:
    part, by = f"scores of each phoneme of {word!r}", f"its NumPy {np.__version__}"
    calls = partial(ours, word), partial(graph, word), partial(scores_of, theirs, word)
    return Case("g2p-en", part, by, *calls, timed=lambda: theirs.predict(word))


if __name__ == "__main__":
    main(cases)
