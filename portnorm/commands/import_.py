"""`portnorm import`: weights that another library stored."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import portnorm
from portnorm.cells.variants import FUNCTIONS
from portnorm.errors import UnsupportedError
from portnorm.files import require_place
from portnorm.layers.recurrent import DIRECTIONS


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help=".safetensors, .npz, .h5, .keras or .onnx")
    parser.add_argument("-o", "--output", type=Path, required=True, help="checkpoint to write (.safetensors)")
    parser.add_argument("--format", default="auto", choices=("auto", *portnorm.FORMATS), help="who stored it (default: auto)")
    parser.add_argument("--prefix", default="", help="beginning of the names that are meant (default: that of all)")
    parser.add_argument("--layer", help="class of the layer, where arrays alone cannot tell (default: what they tell)")
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="KEY",
        help="a key that is neither asked for nor refused; may be repeated (default: none)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="what arrays do not say, such as batch_first=true (default: as the format has it)",
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    require_place("--output", options.output, ".safetensors")
    config = {}
    for setting in options.set:
        name, _, value = setting.partition("=")
        try:
            config[name] = value if value in FUNCTIONS or value in DIRECTIONS else json.loads(value)
        except ValueError:
            raise UnsupportedError(
                f"`--set` is {setting!r}; expected NAME=VALUE with a number, true, false, null, or one of "
                f"{', '.join((*FUNCTIONS, *DIRECTIONS))}"
            ) from None
    layer = portnorm.import_checkpoint(
        options.source, options.format, prefix=options.prefix, layer=options.layer, ignore=options.ignore, **config
    )
    portnorm.save(layer, options.output)
    if not options.json:
        print(f"{options.output}: {layer!r}\nrecognised as {layer.provenance}")
    return {"checkpoint": str(options.output), "layer": repr(layer), "provenance": layer.provenance}
