"""The normalization layers: parameters and running statistics around the functions of `portnorm.norm`."""

from __future__ import annotations

from typing import Any

import numpy

from portnorm.arrays import Array, DType, Namespace
from portnorm.errors import ShapeError, UnsupportedError
from portnorm.layers.layer import StatelessLayer
from portnorm.layers.pure import Arrays, Keep
from portnorm.norm.arguments import checked_eps
from portnorm.norm.layer import layer_norm
from portnorm.norm.rms import rms_norm
from portnorm.op import ByKeyword, Op
from portnorm.padding import Counted
from portnorm.scalars import switch, whole_number

_PARAMETERS = ("weight", "bias")
"""In the order in which the Ops take them, whatever the order of a mapping is."""


class Norm(StatelessLayer):
    """A layer that calls one normalization Op with its weight and bias."""

    is_one_op = True
    op: Op[..., Any]

    def __init__(
        self,
        config: dict[str, Any],
        shape: tuple[int, ...],
        weight: bool,
        bias: bool,
        xp: Namespace | str | None,
        device: Any,
        dtype: DType,
    ):
        super().__init__(config, xp, device, dtype)
        if weight:
            self.params["weight"] = self._new(numpy.ones(shape))
        if bias:
            self.params["bias"] = self._new(numpy.zeros(shape))

    def operation(self, training: bool) -> Op[..., Any]:
        """The Op that is called."""
        return self.op

    def arguments(self, params: Arrays) -> tuple[Any, ...]:
        """What the Op takes after `x`."""
        return params.get("weight"), params.get("bias")

    def attributes(self, buffers: Arrays, x: Array, lengths: Counted, training: bool) -> dict[str, Any]:
        """The Op's keyword arguments."""
        return {}

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
        attributes = self.attributes(buffers, x, lengths, training)
        if not keep and not training:
            return self.operation(training)(x, *self.arguments(params), **attributes), state, buffers, None
        y, residuals = self.operation(training).forward(x, *self.arguments(params), **attributes)
        names = tuple(name for name in _PARAMETERS if name in params)
        return y, state, self.new_buffers(buffers, residuals, training), (residuals, attributes, names)

    def new_buffers(self, buffers: Arrays, residuals: Any, training: bool) -> Arrays:
        return buffers

    def backward(self, residuals: Any, dy: Array | None, dstate: Any, training: bool) -> tuple[Array, Any, Arrays]:
        residuals, attributes, names = residuals
        dx, *cotangents = self.operation(training).vjp(residuals, dy, **attributes)
        of_parameters = [d for d in cotangents if d is not None and not isinstance(d, ByKeyword)]
        return dx, dstate, dict(zip(names, of_parameters, strict=True))


class LayerNorm(Norm):
    """Layer normalization over the last axes, of shape `normalized_shape`. See `portnorm.layer_norm`; same as `torch.nn.LayerNorm`.

    >>> import numpy as np, portnorm as pn
    >>> pn.LayerNorm(3, dtype="float64")(np.array([[1.0, 2.0, 3.0]])).round(4)
    array([[-1.2247,  0.    ,  1.2247]])
    """

    op: Op[..., Any] = layer_norm

    normalized_shape: tuple[int, ...]
    eps: float | None
    affine: bool
    bias: bool

    def __init__(
        self,
        normalized_shape: int | tuple[int, ...],
        *,
        eps: float = 1e-5,
        affine: bool = True,
        bias: bool = True,
        xp: Namespace | str | None = None,
        device: Any = None,
        dtype: DType = "float32",
    ):
        shape, affine, bias = _shape(normalized_shape), switch("affine", affine), switch("bias", bias)
        config = {"normalized_shape": shape, "eps": self._checked_eps(eps), "affine": affine, "bias": bias}
        super().__init__(config, shape, affine, affine and bias, xp, device, dtype)

    def _checked_eps(self, eps: Any) -> float | None:
        return checked_eps(eps)

    def input_dims(self) -> tuple[int | str, ...]:
        return ("batch", *self.normalized_shape)

    def feature_axes(self, ndim: int) -> tuple[int, ...]:
        return tuple(range(ndim - len(self.normalized_shape), ndim))

    def attributes(self, buffers: Arrays, x: Array, lengths: Counted, training: bool) -> dict[str, Any]:
        shape = self.normalized_shape
        if tuple(x.shape[-len(shape) :]) != shape:
            raise ShapeError(f"`x` has shape {tuple(x.shape)}; expected (…, {', '.join(map(str, shape))})")
        if lengths is not None and self.eps == 0:
            raise UnsupportedError("`lengths` or `mask` with eps = 0: padding has no spread that could be divided by; use a small `eps`")
        return {"axis": -1 if len(shape) == 1 else tuple(range(-len(shape), 0)), "eps": self.eps}


class RMSNorm(LayerNorm):
    """RMS normalization over the last axes, of shape `normalized_shape`. See `portnorm.rms_norm`, of `eps=None` too.

    >>> import numpy as np, portnorm as pn
    >>> pn.RMSNorm(2, eps=0.0, dtype="float64")(np.array([[3.0, 4.0]])).round(4)
    array([[0.8485, 1.1314]])
    """

    op: Op[..., Any] = rms_norm

    def __init__(
        self,
        normalized_shape: int | tuple[int, ...],
        *,
        eps: float | None = 1e-5,
        affine: bool = True,
        xp: Namespace | str | None = None,
        device: Any = None,
        dtype: DType = "float32",
    ):
        own: Any = eps  # this class takes None too
        super().__init__(normalized_shape, eps=own, affine=affine, bias=False, xp=xp, device=device, dtype=dtype)
        self._settings = ("normalized_shape", "eps", "affine")

    def _checked_eps(self, eps: Any) -> float | None:
        return None if eps is None else checked_eps(eps)

    def arguments(self, params: Arrays) -> tuple[Any, ...]:
        return (params.get("weight"),)


def _shape(normalized_shape: int | tuple[int, ...]) -> tuple[int, ...]:
    given = normalized_shape if isinstance(normalized_shape, tuple | list) else (normalized_shape,)
    if not given:
        raise ShapeError("`normalized_shape` is empty; expected the lengths of one or more axes")
    return tuple(whole_number("normalized_shape", n, 1) for n in given)
