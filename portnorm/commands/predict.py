"""`portnorm predict`: what a model gives for the sequences of a file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy

import portnorm
from portnorm.arrays import to_numpy
from portnorm.dtypes import dtype_name
from portnorm.errors import UnsupportedError
from portnorm.files import require_place, written_whole
from portnorm.sequence_files import read_inputs


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="what `portnorm train` or `pn.save` wrote, or an .onnx file of portnorm")
    parser.add_argument("data", type=Path, help="an .npz file with x (cases, time, features) and maybe lengths (cases,); y is left alone")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="file to write (.npz), with y: of each case a row; of classes y.argmax(axis=1)"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    require_place("--output", options.output, ".npz")
    model = portnorm.load(options.model)
    if not model.recurrent:
        raise UnsupportedError(f"{str(options.model)!r} holds {model!r}, which has no recurrent layer; expected a model of sequences")
    kind = dtype_name(model.xp, model.dtype)
    x, lengths = read_inputs(options.data, "float32" if kind == "bfloat16" else kind)
    x = model.xp.asarray(x if model.batch_first else numpy.ascontiguousarray(x.swapaxes(0, 1)), dtype=model.dtype)
    y = to_numpy(portnorm.predict(model, x, lengths))
    if model.keeps_time and not model.batch_first:
        y = y.swapaxes(0, 1)
    with written_whole(options.output) as file:
        numpy.savez(file, y=y)
    if not options.json:
        print(f"{options.output}: y {y.shape}")
    return {"predictions": str(options.output), "shape": list(y.shape)}
