"""Rows of the `normalize` Op: which ONNX normalization operator it is, if it is one.

The operators are kept whole: runtimes compute their statistics in float32 even in half-precision graphs, which a decomposition would not.
GroupNormalization is not used: its function body takes the variance as E[x²] − E[x]², which is wrong by 0.2 at mean 1000 and NaN at 10⁴.
"""

from __future__ import annotations

import math
from typing import Any

import array_api_compat.numpy as known
import numpy

from portnorm.dtypes import float32_value
from portnorm.norm.normalize import standard_deviation
from portnorm_onnx.fold import one_row, scaled
from portnorm_onnx.namespace import NAMESPACE
from portnorm_onnx.symbolic import SymbolicArray, constant, node, nodes
from portnorm_onnx.targets import LONG


def _fits(x: SymbolicArray, weight: Any, attrs: Any) -> str | None:
    """The operator that computes these arguments, or `None`."""
    attrs = _of_one_row(attrs)
    axes, params, opset = attrs["axes"], attrs["param_axes"], x.opset
    if _folds(x, attrs):
        return "folded"
    if attrs.get("mask") is not None or not attrs.get("center", True) or not _as_defined(attrs) or opset is None:
        return None
    if attrs.get("mean") is not None:
        others = tuple(a for a in range(x.ndim) if a != 1)
        known = attrs["mean"].constant is not None and attrs["var"].constant is not None
        # The operator is x · s + t, which cancels where |mean| ≫ std; OpenVINO and tract refuse statistics of a wider type than x.
        alike = attrs["mean"].dtype == x.dtype and not opset.accurate
        channels = axes == others and params == (1,) and known
        if channels and opset.target.broadcasts_to_maps:
            return "BatchNormalization twice" if x.ndim > 2 else None
        alike = alike and "BatchNormalization" not in opset.target.without
        return "BatchNormalization" if channels and alike else None
    if axes != tuple(range(axes[0], x.ndim)) or axes[0] == 0:
        return None
    static = all(isinstance(x.dims[a], int) for a in axes)
    instance = numpy.dtype(x.dtype).name in _INSTANCE_DTYPES and "InstanceNormalization" not in opset.target.without
    if params == (1,) and axes[0] == 2 and instance:
        return "InstanceNormalization"
    if static:
        alone = weight is None or params != axes  # whose gain would be ones
        return None if opset.trainable and alone else "LayerNormalization"
    return "grouped" if params == (1, 2) and axes[0] == 2 and instance else None


_INSTANCE_DTYPES = ("float16", "float32")
"""onnxruntime has no InstanceNormalization for other types; then the definition is traced."""


def _of_one_row(attrs: Any) -> Any:
    """The same, with given statistics that are all steps' as what they are."""
    return attrs if attrs.get("mean") is None else {**attrs, **{name: one_row(attrs[name]) for name in ("mean", "var")}}


def _folds(x: SymbolicArray, attrs: Any) -> bool:
    """Whether the statistics are given and one factor and one shift of each value, or step, are known before `x` is."""
    if attrs.get("mean") is None or attrs.get("mask") is not None or x.opset is None or not x.opset.fold:
        return False
    mean, var = attrs["mean"], attrs["var"]
    if x.affine is not None and mean.constant is not None and var.constant is not None:
        return bool(attrs["param_axes"] == (x.ndim - 1,) and mean.constant.size in (1, x.dims[-1]))
    by_step = all(s.step_of is not None or s.rows_of is not None or s.constant is not None for s in (mean, var))
    return bool(by_step) and attrs["param_axes"] == (x.ndim - 1,) and numpy.dtype(x.dtype).itemsize >= 4 and mean.constant is None


def _folded(x: SymbolicArray, weight: Any, bias: Any, eps: float, attrs: Any) -> SymbolicArray:
    """(x − μ) ⊙ s + bias with s = weight / σ; behind a matrix product, x ⊙ s + (bias − μ ⊙ s)."""
    mean, var, xp = attrs["mean"], attrs["var"], NAMESPACE
    if x.affine is not None and mean.constant is not None:
        std = standard_deviation(known, var.constant.astype(numpy.float64), float32_value(eps), attrs.get("eps_place", "variance"))
        factor = (1.0 if weight is None else weight.constant) / std
        return scaled(x, factor, (0.0 if bias is None else bias.constant) - mean.constant * factor)
    scale: SymbolicArray = 1.0 / standard_deviation(xp, var, float32_value(eps), attrs.get("eps_place", "variance"))
    scale = scale if weight is None else scale * weight
    if x.producer is None or x.producer.op_type not in ("MatMul", "Gemm"):
        y: SymbolicArray = (x - mean) * scale
        return y if bias is None else y + bias
    shift = -mean * scale if bias is None else bias - mean * scale
    y = x * scale + shift
    return y


def _as_defined(attrs: Any) -> bool:
    """Whether ε is in a biased variance, where every operator has it."""
    return attrs.get("eps_place", "variance") == "variance" and not attrs.get("correction", 0)


def normalize(x: SymbolicArray, weight: Any = None, bias: Any = None, *, eps: float, **attrs: Any) -> SymbolicArray:
    """`portnorm.norm.normalize`, where it is one operator, or one between a multiplication and an addition."""
    if x.opset is not None and x.opset.accurate and numpy.dtype(x.dtype).itemsize < 4:  # a sum of many would leave float16
        wide = {n: NAMESPACE.astype(a, numpy.float32) for n, a in (("weight", weight), ("bias", bias)) if a is not None}
        wide |= {n: NAMESPACE.astype(attrs[n], numpy.float32) for n in ("mean", "var") if attrs.get(n) is not None}
        y: SymbolicArray = normalize(NAMESPACE.astype(x, numpy.float32), eps=eps, **{**attrs, **wide})
        return NAMESPACE.astype(y, x.dtype)
    found = _fits(x, weight, attrs)
    assert found is not None  # `accepts` asks first
    return _ROWS[found](x, weight, bias, eps, _of_one_row(attrs))


def _layer(x: SymbolicArray, weight: Any, bias: Any, eps: float, attrs: Any) -> SymbolicArray:
    """Gain and shift may be over more than the normalized axes: it is enough that they broadcast to `x`."""
    axes, params = attrs["axes"], attrs["param_axes"]
    if axes == params and (product := _centred_product(x, axes)) is not None:
        if x.opset is not None and x.opset.target.centred_weights:
            square = NAMESPACE.mean(product * product, axis=axes, keepdims=True)
            return _scaled_by(product / NAMESPACE.sqrt(square + eps), weight, bias, params)
        if weight is not None and bias is None:
            return node("RMSNormalization", product, weight, axis=axes[0], epsilon=eps)
    if len(axes) > 1 and x.opset is not None and x.opset.target.one_axis:
        return _of_one_axis(x, weight, bias, eps, attrs)
    if x.opset is not None and x.opset.target.broadcasts_to_maps and _to_be_centred(x, axes, "LayerNormalization"):
        return _layer_of_maps(x, weight, bias, eps, attrs)
    x = _centred(x, axes, "LayerNormalization")
    wide = x.opset is not None and x.opset.target.wide_gains
    fits = params == tuple(range(params[0], x.ndim)) and (params[0] == axes[0] or (wide and params[0] < axes[0]))
    trainable = x.opset is not None and x.opset.trainable
    shift = bias if fits else None
    if shift is None and x.opset is not None and x.opset.target.biased_norms:
        shift = _filled(x, axes, 0)
    y, *_ = nodes(
        "LayerNormalization",
        3 if trainable else 1,
        x,
        weight if weight is not None and fits else _filled(x, axes, 1),
        weight * 0.0 if shift is None and trainable else shift,
        axis=axes[0],
        epsilon=eps,
    )
    return y if fits else _scaled_by(y, weight, bias, params)


def _of_one_axis(x: SymbolicArray, weight: Any, bias: Any, eps: float, attrs: Any) -> SymbolicArray:
    """The axes as one, and gain and shift behind."""
    axes, params = attrs["axes"], attrs["param_axes"]
    rows = NAMESPACE.reshape(x, (*x.shape[: axes[0]], math.prod(int(x.dims[a]) for a in axes)))
    last = (rows.ndim - 1,)
    y: SymbolicArray = NAMESPACE.reshape(_layer(rows, None, None, eps, {"axes": last, "param_axes": last}), x.shape)
    return _scaled_by(y, weight, bias, params)


def _layer_of_maps(x: SymbolicArray, weight: Any, bias: Any, eps: float, attrs: Any) -> SymbolicArray:
    """Rows as images (1, rows, 1, values), or of three axes and more (batch, rows, 1, values), each centred; gain and shift behind."""
    (first, *_), dims, batch = attrs["axes"], [int(n) for n in x.dims], int(x.ndim > 2)
    maps = NAMESPACE.reshape(x, (math.prod(dims[:batch]), math.prod(dims[batch:first]), 1, math.prod(dims[first:])))
    centred = maps - NAMESPACE.mean(maps, axis=(2, 3), keepdims=True)
    y = node("LayerNormalization", centred, _filled(maps, (3,), 1), _filled(maps, (3,), 0), axis=3, epsilon=eps)
    return _scaled_by(NAMESPACE.reshape(y, x.shape), weight, bias, attrs["param_axes"])


def _scaled_by(y: SymbolicArray, weight: Any, bias: Any, params: tuple[int, ...]) -> SymbolicArray:
    """Gain and shift behind an operator that has none."""
    along = tuple(y.shape[a] if a in params else 1 for a in range(y.ndim))
    y = y if weight is None else y * NAMESPACE.reshape(weight, along)
    return y if bias is None else y + NAMESPACE.reshape(bias, along)


def _instance(x: SymbolicArray, weight: Any, bias: Any, eps: float, attrs: Any) -> SymbolicArray:
    weight, bias = (_filled(x, (1,), value) if p is None else p for p, value in ((weight, 1), (bias, 0)))
    given = [_centred(x, attrs["axes"], "InstanceNormalization"), weight, bias]
    if x.opset is None or "InstanceNormalization" not in x.opset.target.narrow_statistics or numpy.dtype(x.dtype).itemsize >= 4:
        return node("InstanceNormalization", *given, epsilon=eps)
    y: SymbolicArray = node("InstanceNormalization", *(NAMESPACE.astype(a, numpy.float32) for a in given), epsilon=eps)
    return NAMESPACE.astype(y, x.dtype)


def _grouped(x: SymbolicArray, weight: Any, bias: Any, eps: float, attrs: Any) -> SymbolicArray:
    """Groups of channels over space of unknown size: instance normalization of (batch, groups, channels of a group, space)."""
    y = _instance(x, None, None, eps, {"axes": tuple(range(2, x.ndim))})
    along = (1, *x.dims[1:3], *(1 for _ in x.dims[3:]))
    y = y if weight is None else y * NAMESPACE.reshape(weight, along)
    return y if bias is None else y + NAMESPACE.reshape(bias, along)


def _centred(x: SymbolicArray, axes: tuple[int, ...], operator: str) -> SymbolicArray:
    """`x` less its mean where that was asked for, or needs to be: a runtime's operator then meets no mean that its statistics could cancel
    against. A mean that is not exact is one that the operator finds again, and takes exactly, since it is small.
    """
    if not _to_be_centred(x, axes, operator):
        return x
    centred: SymbolicArray = x - NAMESPACE.mean(x, axis=axes, keepdims=True)
    return centred


def _to_be_centred(x: SymbolicArray, axes: tuple[int, ...], operator: str) -> bool:
    if x.opset is None:
        return False
    return x.opset.accurate or operator in x.opset.target.one_pass or _is_long(x, axes, operator) or _is_pair(x, axes)


def _is_pair(x: SymbolicArray, axes: tuple[int, ...]) -> bool:
    """Whether a row has two values: they become −1 and 1, whatever they are, and show nothing but what an operator's mean is off."""
    return numpy.dtype(x.dtype).itemsize >= 4 and [x.dims[a] for a in axes if x.dims[a] != 1] == [2]


def _is_long(x: SymbolicArray, axes: tuple[int, ...], operator: str) -> bool:
    """Whether a row has, or may have, more values than the target's operator adds up well, and may have a mean: that of a product is
    not large, as that of data is.
    """
    if x.opset is None or numpy.dtype(x.dtype).itemsize < 4:  # whose own steps are larger than what such a sum loses
        return False
    product = x.affine is not None or (x.producer is not None and x.producer.op_type in ("MatMul", "Gemm"))
    known = [n for n in (x.dims[a] for a in axes) if isinstance(n, int)]
    long = len(known) < len(axes) or math.prod(known) >= LONG
    return operator in x.opset.target.sums_in_order and long and not product


def _centred_product(x: SymbolicArray, axes: tuple[int, ...]) -> SymbolicArray | None:
    """h·W less the mean of each row, as the product with W less the mean of its rows."""
    n, opset = x.producer, x.opset
    if n is None or n.op_type != "MatMul" or opset is None or not opset.fold:
        return None
    if not (opset.target.centred_weights or (opset.target.captures and opset.version >= 23)):
        return None
    h, weights = n.inputs
    if h is None or weights is None or weights.constant is None or axes != (x.ndim - 1,) or numpy.dtype(x.dtype).itemsize < 4:
        return None
    w = weights.constant.astype(numpy.float64)
    centred = (w - w.mean(axis=1, keepdims=True)).astype(weights.constant.dtype)
    return node("MatMul", h, constant(centred, None if weights.name is None else f"{weights.name}.centred"))


def _batch(x: SymbolicArray, weight: Any, bias: Any, eps: float, attrs: Any) -> SymbolicArray:
    weight, bias = (_filled(x, (1,), value) if p is None else p for p, value in ((weight, 1), (bias, 0)))
    mean, var = (NAMESPACE.reshape(attrs[s], (x.dims[1],)) for s in ("mean", "var"))
    return node("BatchNormalization", x, weight, bias, mean, var, epsilon=eps)


def _batch_twice(x: SymbolicArray, weight: Any, bias: Any, eps: float, attrs: Any) -> SymbolicArray:
    """x − m, and the rest behind: what computes x · s + t for given statistics has s = 1 and t = −m in the first, exactly."""
    ones, zeros, unit = (_filled(x, (1,), value) for value in (1, 0, 1 - eps))
    less = _batch(x, ones, zeros, eps, {"mean": attrs["mean"], "var": unit})
    return _batch(less, weight, bias, eps, {"mean": zeros, "var": attrs["var"]})


_ROWS = {
    "folded": _folded,
    "grouped": _grouped,
    "LayerNormalization": _layer,
    "InstanceNormalization": _instance,
    "BatchNormalization": _batch,
    "BatchNormalization twice": _batch_twice,
}


def normalize_with_rms(x: SymbolicArray, weight: Any = None, bias: Any = None, *, eps: float, **attrs: Any) -> SymbolicArray:
    """From operator set 23 on there is an operator for RMS normalization too."""
    if not _is_rms(x, bias, attrs):
        return normalize(x, weight, bias, eps=eps, **attrs)
    axes = attrs["axes"]
    return node("RMSNormalization", x, _filled(x, axes, 1) if weight is None else weight, axis=axes[0], epsilon=eps)


def _is_rms(x: SymbolicArray, bias: Any, attrs: Any) -> bool:
    axes = attrs["axes"]
    whole = axes == tuple(range(axes[0], x.ndim)) == attrs["param_axes"] and all(isinstance(x.dims[a], int) for a in axes)
    there = x.opset is not None and "RMSNormalization" not in x.opset.target.without
    return there and not attrs.get("center", True) and whole and bias is None and attrs.get("mask") is None and _as_defined(attrs)


def _filled(x: SymbolicArray, axes: tuple[int, ...], value: float) -> SymbolicArray:
    return constant(numpy.full([x.dims[a] for a in axes], value, dtype=x.dtype))


normalize.accepts = lambda x, weight=None, bias=None, **attrs: _fits(x, weight, attrs) is not None  # type: ignore[attr-defined]
normalize_with_rms.accepts = (  # type: ignore[attr-defined]
    lambda x, weight=None, bias=None, **attrs: _is_rms(x, bias, attrs) or _fits(x, weight, attrs) is not None
)
