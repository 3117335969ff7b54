"""sleepecg (sleep stages by heart beats): the whole net of its .keras file, where epochs without data are masked.

Run `python docs/examples/real_sleepecg.py`. BatchNormalization, Dense, ReLU, two bidirectional GRUs, Dense, softmax. portnorm writes the
layers before the ReLU as one graph and those after it as another, which `onnx.compose` puts together.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side import Case, main, package_file, session

import portnorm as pn

os.environ.setdefault("KERAS_BACKEND", "torch")  # as the package does
FEATURES, MASKED = 36, -1.0
Net = Callable[[np.ndarray], np.ndarray]


@contextmanager
def weights(name: str) -> Any:
    """The .keras file inside the package's .zip."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(package_file("sleepecg", f"sleepecg/classifiers/{name}.zip")) as file:
        yield Path(file.extract("classifier.keras", folder))


def load(name: str) -> tuple[pn.Sequential, pn.Sequential]:
    """The layers before the ReLU, and those after it up to the scores. Dense has a softmax, which is left to the caller."""
    with weights(name) as path:
        before = [pn.import_checkpoint(path, prefix=f"layers/{part}/") for part in ("batch_normalization", "dense")]
        both = [pn.import_checkpoint(path, prefix=f"layers/bidirectional{n}/", batch_first=True) for n in ("", "_1")]
        scores = pn.import_checkpoint(path, prefix="layers/dense_1/", ignore=["activation"])
    return pn.Sequential(*before), pn.Sequential(*both, scores)


def mask_of(x: np.ndarray) -> np.ndarray:
    """Keras' Masking: an epoch counts where any feature has another value."""
    return (x != MASKED).any(axis=-1)


def probabilities(scores: np.ndarray, mask: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """The softmax. portnorm gives 0 where there is no epoch; Keras' Dense goes on to add its bias there."""
    scores = np.where(mask[:, :, None], scores, bias)
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def in_numpy(name: str) -> Net:
    before, after = load(name)
    bias = after.params["2.bias"]

    def net(x: np.ndarray) -> np.ndarray:
        mask = mask_of(x)
        return probabilities(after(np.maximum(before(x), 0), mask=mask)[0], mask, bias)

    return net


def in_onnx(name: str) -> Net:
    """One graph: x and mask to scores."""
    from onnx import compose, helper, parser

    before, after = load(name)
    first = pn.export(before, None, input_shape=("batch", "time", FEATURES), prefix="before/").model
    last = pn.export(after, None, mask=True, prefix="after/", names={"mask": "mask"}).model
    width = before.params["1.bias"].shape[0]
    relu = parser.parse_graph(f"g (float[batch, time, {width}] z) => (float[batch, time, {width}] r) {{ r = Relu(z) }}")
    middle = helper.make_model(relu, opset_imports=first.opset_import, ir_version=first.ir_version)
    whole = compose.merge_models(first, middle, io_map=[(first.graph.output[0].name, "z")])
    whole = compose.merge_models(whole, last, io_map=[("r", next(i.name for i in last.graph.input if i.name != "mask"))])
    run, given, bias = session(whole), whole.graph.input[0].name, after.params["2.bias"]

    def net(x: np.ndarray) -> np.ndarray:
        mask = mask_of(x)
        return probabilities(run.run(None, {given: x, "mask": mask})[0], mask, bias)

    return net


def original(name: str) -> Net:
    import keras

    with weights(name) as path:
        model = keras.models.load_model(path)
    return lambda x: np.asarray(keras.ops.convert_to_numpy(model(x, training=False)))


def night(epochs: int, batch: int = 1) -> np.ndarray:
    """Features of a night in epochs of 30 s: padding in front, as the package pads, and holes where no heart beat was found."""
    random = np.random.default_rng(0)
    x = random.standard_normal((batch, epochs, FEATURES)).astype("float32") * 2
    x[random.random((batch, epochs)) < 0.1] = MASKED
    x[:, : epochs // 10] = MASKED
    return x


def case(name: str, epochs: int = 960, batch: int = 1) -> Case:
    import keras

    x, sides = night(epochs, batch), (in_numpy(name), in_onnx(name), original(name))
    by = f"Keras {keras.__version__} on {keras.backend.backend()}"
    return Case("sleepecg", f"{name}, {epochs} epochs", by, *(partial(side, x) for side in sides))


def cases() -> Iterator[Case]:
    yield from map(case, ("ws-gru-mesa", "wrn-gru-mesa"))


if __name__ == "__main__":
    main(cases)
