"""The affine layer."""

from __future__ import annotations

import math
from typing import Any

from portnorm.affine import linear
from portnorm.arrays import Array, DType, Namespace
from portnorm.layers.initial import Generator, generator, uniform
from portnorm.layers.layer import StatelessLayer
from portnorm.layers.pure import Arrays, Keep
from portnorm.padding import Counted
from portnorm.quantization import SCHEMES, QuantizeName, checked_quantize, fake_quantize, integer_product
from portnorm.scalars import switch, whole_number


class Linear(StatelessLayer):
    """y = x · weightᵀ + bias over the last axis, `weight` (out_features, in_features). Initial values and names as `torch.nn.Linear`.

    A call gives the dtype of the layer, and raises `ShapeError` and `DTypeError` where `x` does not fit it; `UnsupportedError` for sizes.

    >>> import numpy as np, portnorm as pn
    >>> pn.Linear(3, 2, rng=0)(np.zeros((5, 4, 3), dtype="float32")).shape
    (5, 4, 2)
    """

    in_features: int
    out_features: int
    bias: bool
    quantize: QuantizeName | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        quantize: QuantizeName | None = None,
        xp: Namespace | str | None = None,
        device: Any = None,
        dtype: DType = "float32",
        rng: int | Generator | None = None,
    ):
        sizes = {"in_features": whole_number("in_features", in_features, 1), "out_features": whole_number("out_features", out_features, 1)}
        super().__init__({**sizes, "bias": switch("bias", bias), "quantize": checked_quantize(quantize)}, xp, device, dtype)
        random, bound = generator(rng), 1.0 / math.sqrt(self.in_features)
        self.params["weight"] = self._new(uniform(random, bound, self.out_features, self.in_features))
        if self.bias:
            self.params["bias"] = self._new(uniform(random, bound, self.out_features))

    def input_dims(self) -> tuple[int | str, ...]:
        return ("batch", self.in_features)

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
        weight, bias = params["weight"], params.get("bias")
        if self.quantize is not None:
            scheme = SCHEMES[self.quantize]
            weight = fake_quantize(weight, **scheme.weights.arguments)
            if not keep:
                y = integer_product(x, weight, block=scheme.inputs.block)
                return (y if bias is None else y + bias), state, buffers, None
            x = fake_quantize(x, **scheme.inputs.arguments)
        if not keep:
            return linear(x, weight, bias), state, buffers, None
        y, residuals = linear.forward(x, weight, bias)
        return y, state, buffers, residuals

    def backward(self, residuals: Any, dy: Array | None, dstate: Any, training: bool) -> tuple[Array, Any, Arrays]:
        dx, dweight, dbias = linear.vjp(residuals, dy)
        return dx, dstate, {"weight": dweight} if dbias is None else {"weight": dweight, "bias": dbias}
