"""Normalizations of an exported program by torch's own operators, where `torch_module(layer, exact=False)` says that they will do.

The definition multiplies a row whose squares would leave the range of float32 by a power of two first. A backend of a phone takes neither
the comparison nor the branch, and cuts the program at each. torch's operators are as exact for all other rows: magnitudes from 1e-16 to
1e16 and a mean of up to a thousand standard deviations.
"""

from __future__ import annotations

from typing import Any

import torch

from portnorm.arrays import Array
from portnorm.dtypes import float32_value

_PLACES = {"mask": None, "mean": None, "var": None, "reduce": None, "out": None, "correction": 0, "eps_place": "variance"}
"""What the operators do not have, and its value where it is not asked for."""


class Plain:
    """`with Plain():` normalizations that are followed are torch's own operators."""

    on = False

    def __enter__(self) -> None:
        self._before, Plain.on = Plain.on, True

    def __exit__(self, *error: object) -> None:
        Plain.on = self._before


def is_followed() -> bool:
    """Whether a program or a trace is made now."""
    return bool(torch.compiler.is_exporting() or torch.jit.is_tracing())


def accepts(x: Array, *affine: Any, axes: tuple[int, ...], eps: float, **how: Any) -> bool:
    """Whether a program or a trace is made now that takes the operators, and they have what is asked for."""
    if not Plain.on or not is_followed():
        return False
    if x.dtype != torch.float32 or axes != tuple(range(x.ndim - len(axes), x.ndim)) or eps == 0:
        return False
    return all(how.get(name, default) == default for name, default in _PLACES.items())


def forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axes: tuple[int, ...],
    param_axes: tuple[int, ...],
    eps: float,
    center: bool = True,
    **how: Any,
) -> tuple[Array, None]:
    """`portnorm.norm.normalize`, without residuals: who exports differentiates by torch."""
    shape, whole = [x.shape[a] for a in axes], param_axes == axes
    gain, shift = (weight, bias) if whole else (None, None)
    if center:
        y = torch.nn.functional.layer_norm(x, shape, gain, shift, float32_value(eps))
    else:
        y = torch.nn.functional.rms_norm(x, shape, gain, float32_value(eps))
        y = y if shift is None else y + shift
    if not whole:
        along = [n if a in param_axes else 1 for a, n in enumerate(x.shape)]
        y = y if weight is None else y * weight.reshape(along)
        y = y if bias is None else y + bias.reshape(along)
    return y, None


def call(*args: Any, **attrs: Any) -> Array:
    """The result of `forward` alone."""
    return forward(*args, **attrs)[0]
