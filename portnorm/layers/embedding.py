"""The layer in front of a language model."""

from __future__ import annotations

from typing import Any

from portnorm.arrays import Array, DType, Namespace
from portnorm.layers.initial import Generator, generator, normal
from portnorm.layers.layer import StatelessLayer
from portnorm.layers.pure import Arrays, Keep
from portnorm.lookup import embedding
from portnorm.padding import Counted
from portnorm.quantization import SCHEMES, QuantizeName, checked_quantize, fake_quantize
from portnorm.scalars import whole_number


class Embedding(StatelessLayer):
    """A vector for each of `num_embeddings` entries: integers (time, batch) to (time, batch, embedding_dim), as `torch.nn.Embedding`.

    A call raises `DTypeError` where `x` are no integers, `ShapeError` for an entry that there is not; `UnsupportedError` for sizes.

    >>> import numpy as np, portnorm as pn
    >>> model = pn.Sequential(pn.Embedding(96, 16, rng=0), pn.LSTM(16, 8, norm="layer", rng=0))
    >>> model(np.zeros((5, 2), dtype=int))[0].shape
    (5, 2, 8)
    """

    takes_integers = True

    num_embeddings: int
    embedding_dim: int
    quantize: QuantizeName | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        quantize: QuantizeName | None = None,
        xp: Namespace | str | None = None,
        device: Any = None,
        dtype: DType = "float32",
        rng: int | Generator | None = None,
    ):
        sizes = {"num_embeddings": num_embeddings, "embedding_dim": embedding_dim}
        config = {name: whole_number(name, value, 1) for name, value in sizes.items()}
        super().__init__({**config, "quantize": checked_quantize(quantize)}, xp, device, dtype)
        self.params["weight"] = self._new(normal(generator(rng), self.num_embeddings, self.embedding_dim))

    def input_dims(self) -> tuple[int | str, ...]:
        return ("time", "batch")

    def feature_axes(self, ndim: int) -> tuple[int, ...]:
        return ()

    def forward(
        self,
        params: Arrays,
        buffers: Arrays,
        x: Array,
        state: Any,
        lengths: Counted,
        training: bool,
        keep: Keep,
        random: Arrays | None = None,
    ) -> tuple[Array, Any, Arrays, Any]:
        weight = params["weight"]
        if self.quantize is not None:
            weight = fake_quantize(weight, **SCHEMES[self.quantize].tables.arguments)
        if not keep:
            return embedding(x, weight), state, buffers, None
        y, residuals = embedding.forward(x, weight)
        return y, state, buffers, residuals

    def backward(self, residuals: Any, dy: Array | None, dstate: Any, training: bool) -> tuple[Array | None, Any, Arrays]:
        return None, dstate, {"weight": embedding.vjp(residuals, dy)[1]}
