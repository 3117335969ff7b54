"""The formats of weights from elsewhere: one row for each layer that a format can hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from portnorm.checkpoint.formats.cells import CELLS, tensorflow_names
from portnorm.checkpoint.formats.flax import flax_names, flax_rows
from portnorm.checkpoint.formats.keras import keras_names, keras_rows
from portnorm.checkpoint.formats.onnx import onnx_rows
from portnorm.checkpoint.formats.row import NumPyArray, Row
from portnorm.checkpoint.formats.torch import torch_rows

ROWS: list[Row] = [*torch_rows(), *keras_rows(), *flax_rows(), *CELLS, *onnx_rows()]

FORMATS: tuple[str, ...] = tuple(dict.fromkeys(row.format for row in ROWS))
"""Names of the formats."""

NAMES: dict[str, Callable[[Mapping[str, NumPyArray]], dict[str, str]]] = {
    "keras": keras_names,
    "flax": flax_names,
    **dict.fromkeys(("tf-contrib", "tf-addons", "supercell", "sonnet"), tensorflow_names),
}
"""Formats whose keys have to be made plain before a row is looked for."""
