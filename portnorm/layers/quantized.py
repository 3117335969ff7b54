"""Layers whose matrix products are those of integers."""

from __future__ import annotations

import dataclasses

from portnorm.arrays import library, seen, xp_of
from portnorm.errors import UnsupportedError
from portnorm.layers.embedding import Embedding
from portnorm.layers.layer import Layer
from portnorm.layers.recurrent import Recurrent
from portnorm.layers.sequential import Sequential
from portnorm.norm.weight import weight_norm
from portnorm.quantization import SCHEMES, QuantizeName, checked_quantize, fake_quantize


def quantized(layer: Layer, quantize: QuantizeName = "int8") -> Layer:
    """A copy of `layer` whose matrix products are those of integers, of eight bits or four: what `portnorm.export(quantize=)` writes.

    x Wᵀ becomes (m_x · q_x) (s_w · q_w)ᵀ: weights are integers within ±64 and a step s_w for each output, |w| of the largest divided by 64;
    inputs are integers within ±127 and a step m_x for each row, or 1/127 for an h that lies in (−1, 1). Tables of `Embedding` are rounded
    alike, row by row. Norms, biases, states and running statistics stay as they are. The copy has the same arrays, in their own type, and
    can be trained: gradients go straight through the rounding, so that the rounded net is the one whose loss falls. Setting
    `layer.quantize = "int8"` does the same to the layer itself, and `None` takes it back. In NumPy the matrices of the copy can only be
    read, and their integers are made once: with the extra `fast` a step of one sequence then reads a quarter of the bytes.

    `"int4"` has weights of four bits, each 128 neighbours in a row with a step of their own, and inputs in such blocks: an eighth of the
    bytes, at some cost in accuracy. Tables of `Embedding` have eight bits there too.

    Where h has the fixed step, a first state has to lie within ±1, as every state that the layer gives does.
    Raises `UnsupportedError` for another name, a layer without weights to quantize, and weights that are all 0 or not finite.

    >>> import numpy as np, portnorm as pn
    >>> lstm = pn.LSTM(3, 4, norm="layer", rng=0)
    >>> x = np.ones((7, 2, 3), dtype="float32")
    >>> bool(abs(pn.quantized(lstm)(x)[0] - lstm(x)[0]).max() < 0.02)
    True
    """
    checked_quantize(quantize)
    if not isinstance(layer, Layer):
        raise UnsupportedError(f"`layer` is a {type(layer).__name__}; expected a layer of portnorm")
    copy = layer.copy()
    parts = [part for part in copy.layers() if "quantize" in part._settings]
    if not parts:
        raise UnsupportedError(f"{type(layer).__name__} has no weights to quantize; expected Linear, Embedding, LSTM, GRU or RNN in it")
    for part in parts:
        _check_weights(part)
        part.quantize = quantize
        part.params = {name: library(a).fixed(a) if _is_matrix(part, name) else a for name, a in part.params.items()}
    return copy


def with_rounded_weights(layer: Layer) -> Layer:
    """A copy of a layer that `quantizes`, whose weights are what its integers say: it computes the same. Normalized ones are plain then.

    A zero is +0, as an integer has it.
    """
    if isinstance(layer, Sequential):
        homes = {k: with_rounded_weights(part) for k, part in enumerate(layer.parts) if layer.homes[k] == k}
        return Sequential(*(homes[k] for k in layer.homes))
    copy = layer.copy()
    if layer.quantizes is None:
        return copy
    if isinstance(layer, Recurrent) and layer.variant.norm == "weight":
        copy = _without_weight_norm(layer)
    scheme = SCHEMES[layer.quantizes]
    grid = (scheme.tables if isinstance(layer, Embedding) else scheme.weights).arguments
    copy.assign(copy.params | {name: fake_quantize(a[...], **grid) + 0.0 for name, a in copy.params.items() if _is_matrix(copy, name)})
    return copy


def _without_weight_norm(layer: Recurrent) -> Recurrent:
    """The same with the matrices themselves in the place of direction and length."""
    norm = None if layer.norm == "weight" else dataclasses.replace(layer.variant, norm=None)
    plain = type(layer)(**{**layer.config, "norm": norm}, xp=layer.xp, device=layer.device, dtype=layer.dtype)
    given = dict(layer.params)
    for name in [n for n in given if n.endswith(".v")]:
        matrix = name.removesuffix(".v")
        given[matrix] = weight_norm(given.pop(name), given.pop(f"{matrix}.g"))
    plain.assign(given)
    return plain


def _is_matrix(layer: Layer, name: str) -> bool:
    """Whether a parameter is multiplied with, or looked up, as integers."""
    diagonal = isinstance(layer, Recurrent) and layer.variant.recurrence == "diagonal"
    return "quantize" in layer._settings and name.startswith("weight") and not (diagonal and name.startswith("weight_hh"))


def _check_weights(layer: Layer) -> None:
    """Raise `UnsupportedError` where a matrix has no step: it is 0 everywhere, or not finite."""
    for name, a in layer.params.items():
        known = seen(a) if name.startswith("weight") and not name.endswith(".g") else None
        if known is None:
            continue
        xp = xp_of(known)
        largest = float(xp.max(xp.abs(known)))
        if not 0.0 < largest < float("inf"):
            what = "0 everywhere" if largest == 0.0 else "not finite"
            raise UnsupportedError(f"`{name}` of {type(layer).__name__} is {what}; expected weights that can be quantized")
