"""Normalization layers and normalized recurrent networks, written once for every array library, with checked ONNX export."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from portnorm import loaders
from portnorm.affine import linear
from portnorm.cells.variants import IMPLEMENTATIONS, VARIANTS, Variant
from portnorm.errors import (
    ArgumentError,
    ChangedFileWarning,
    CheckpointError,
    ConformanceError,
    DTypeError,
    ExportError,
    MissingExtraError,
    PortnormError,
    ShapeError,
    UnsupportedError,
)
from portnorm.layers.channels import BatchNorm, BatchRenorm, GroupNorm, InstanceNorm
from portnorm.layers.embedding import Embedding
from portnorm.layers.layer import Layer
from portnorm.layers.linear import Linear
from portnorm.layers.norms import LayerNorm, RMSNorm
from portnorm.layers.quantized import quantized
from portnorm.layers.recurrent import GRU, LSTM, RNN
from portnorm.layers.sequential import Sequential
from portnorm.lookup import embedding
from portnorm.losses import mean_squared_error, softmax_cross_entropy
from portnorm.norm.batch import batch_norm
from portnorm.norm.batch_renorm import batch_renorm
from portnorm.norm.group import group_norm
from portnorm.norm.instance import instance_norm
from portnorm.norm.layer import layer_norm
from portnorm.norm.rms import rms_norm
from portnorm.norm.weight import weight_norm, weight_norm_init
from portnorm.op import vjp
from portnorm.optimizers import SGD, Adam, AdamW, RMSProp
from portnorm.quantization import fake_quantize
from portnorm.updates import clip_by_global_norm, weights_only

if TYPE_CHECKING:
    from portnorm.checkpoint.foreign import FORMATS, import_checkpoint
    from portnorm.checkpoint.layers import load, save
    from portnorm.checkpoint.to_format import to_format
    from portnorm.checkpoint.training import Training
    from portnorm.training import fit, pad_sequences, predict
    from portnorm_backends.cpu.warming import warm
    from portnorm_backends.torch_export import export_torch
    from portnorm_backends.torch_module import torch_module
    from portnorm_backends.torch_replace import replace_modules
    from portnorm_onnx.compiled import compile  # noqa: A004
    from portnorm_onnx.export import export
    from portnorm_onnx.training_step import export_training_step
    from portnorm_onnx.verify import verify

__version__ = "0.2.0"

loaders.fill()

# Loaded on first use: what reads and writes files, and what needs an extra. Each with the packages that it needs.
_LAZY: dict[str, tuple[str, tuple[str, ...]]] = {
    "save": ("portnorm.checkpoint.layers", ()),
    "load": ("portnorm.checkpoint.layers", ()),
    "Training": ("portnorm.checkpoint.training", ()),
    "fit": ("portnorm.training", ()),
    "pad_sequences": ("portnorm.training", ()),
    "predict": ("portnorm.training", ()),
    "FORMATS": ("portnorm.checkpoint.foreign", ()),
    "import_checkpoint": ("portnorm.checkpoint.foreign", ()),
    "to_format": ("portnorm.checkpoint.to_format", ()),
    "compile": ("portnorm_onnx.compiled", ("onnx",)),
    "export": ("portnorm_onnx.export", ("onnx",)),
    "export_torch": ("portnorm_backends.torch_export", ("torch", "onnx", "onnxscript")),
    "export_training_step": ("portnorm_onnx.training_step", ("onnx",)),
    "replace_modules": ("portnorm_backends.torch_replace", ("torch",)),
    "torch_module": ("portnorm_backends.torch_module", ("torch",)),
    "verify": ("portnorm_onnx.verify", ("onnx",)),
    "warm": ("portnorm_backends.cpu.warming", ()),
}

__all__ = [
    "FORMATS",
    "GRU",
    "IMPLEMENTATIONS",
    "LSTM",
    "RNN",
    "SGD",
    "VARIANTS",
    "Adam",
    "AdamW",
    "ArgumentError",
    "BatchNorm",
    "BatchRenorm",
    "ChangedFileWarning",
    "CheckpointError",
    "ConformanceError",
    "DTypeError",
    "Embedding",
    "ExportError",
    "GroupNorm",
    "InstanceNorm",
    "Layer",
    "LayerNorm",
    "Linear",
    "MissingExtraError",
    "PortnormError",
    "RMSNorm",
    "RMSProp",
    "Sequential",
    "ShapeError",
    "Training",
    "UnsupportedError",
    "Variant",
    "batch_norm",
    "batch_renorm",
    "clip_by_global_norm",
    "compile",
    "embedding",
    "export",
    "export_torch",
    "export_training_step",
    "fake_quantize",
    "fit",
    "group_norm",
    "import_checkpoint",
    "instance_norm",
    "layer_norm",
    "linear",
    "load",
    "mean_squared_error",
    "pad_sequences",
    "predict",
    "quantized",
    "replace_modules",
    "rms_norm",
    "save",
    "softmax_cross_entropy",
    "to_format",
    "torch_module",
    "verify",
    "vjp",
    "warm",
    "weight_norm",
    "weight_norm_init",
    "weights_only",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'portnorm' has no attribute {name!r}")
    module, packages = _LAZY[name]
    try:
        for package in packages:
            from portnorm.arrays import require_extra

            require_extra(package, "torch" if "torch" in packages else "onnx")
    except MissingExtraError as error:
        return _without_its_extra(name, str(error))
    return getattr(importlib.import_module(module), name)


def _without_its_extra(name: str, problem: str) -> Callable[..., NoReturn]:
    """What stands for a function whose packages are missing: `help(portnorm)` and `from portnorm import *` work, a call names the extra."""

    def missing(*_: object, **__: object) -> NoReturn:
        raise MissingExtraError(problem)

    missing.__name__ = missing.__qualname__ = name
    missing.__doc__ = problem
    return missing


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
