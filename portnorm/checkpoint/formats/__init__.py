"""The formats of weights from elsewhere: one row for each layer that a format can hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from portnorm.checkpoint.formats.cells import CELLS
from portnorm.checkpoint.formats.flax import flax_names, flax_pieces, flax_rows
from portnorm.checkpoint.formats.jax import equinox_rows, haiku_names, haiku_rows
from portnorm.checkpoint.formats.keras import keras_layernorm_rows, keras_names, keras_rows
from portnorm.checkpoint.formats.madmom import madmom_rows
from portnorm.checkpoint.formats.mlx import mlx_rows
from portnorm.checkpoint.formats.onnx import onnx_rows
from portnorm.checkpoint.formats.paddle import paddle_names, paddle_rows
from portnorm.checkpoint.formats.row import NumPyArray, Row
from portnorm.checkpoint.formats.speechbrain import speechbrain_rows
from portnorm.checkpoint.formats.tensorflow import tensorflow_names, tensorflow_rows
from portnorm.checkpoint.formats.thinc import thinc_pieces, thinc_rows, thinc_vector
from portnorm.checkpoint.formats.torch import torch_pieces, torch_rows, unit_offset_rows
from portnorm.checkpoint.stored import Stored

ROWS: list[Row] = [
    *torch_rows(),
    *keras_rows(),
    *keras_layernorm_rows(),
    *flax_rows(),
    *CELLS,
    *onnx_rows(),
    *equinox_rows(),
    *haiku_rows(),
    *mlx_rows(),
    *paddle_rows(),
    *tensorflow_rows(),
    *speechbrain_rows(),
    *thinc_rows(),
    *madmom_rows(),
    *unit_offset_rows(),
]

FORMATS: tuple[str, ...] = tuple(dict.fromkeys(row.format for row in ROWS))
"""Names of the formats."""

NAMES: dict[str, Callable[[Mapping[str, Any]], dict[str, str]]] = {
    **dict.fromkeys(("keras", "keras-layernorm-rnn"), keras_names),
    "flax": flax_names,
    "haiku": haiku_names,
    "paddle": paddle_names,
    **dict.fromkeys(("tensorflow", "tf-contrib", "tf-addons", "supercell", "sonnet"), tensorflow_names),
}
"""Formats whose keys have to be made plain before a row is looked for; a key without a name is no weight."""

PIECES: dict[
    str, tuple[Callable[[Mapping[str, Stored]], dict[str, Stored]], Callable[[Mapping[str, NumPyArray]], dict[str, NumPyArray]]]
] = {"thinc": (thinc_pieces, thinc_vector), "torch": (torch_pieces, dict), "flax": (flax_pieces, dict)}
"""Formats whose arrays are not those of a layer: what makes these of them, and what puts them together again."""
