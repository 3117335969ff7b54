"""`portnorm draw`: a graph as a picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from portnorm.arrays import require_extra
from portnorm.files import require_place


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("graph", type=Path, help="any .onnx file")
    parser.add_argument("-o", "--output", type=Path, help="picture to write (default: beside the graph, with the ending .svg)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    output = options.graph.with_suffix(".svg") if options.output is None else options.output
    require_place("--output", output, ".svg")
    found: dict[str, Any] = require_extra("portnorm_onnx.draw", "onnx").draw(options.graph, output)
    if not options.json:
        inside = "".join(f" + {n} in a loop" for n in found["body_nodes"])
        print(f"{output}: {found['nodes']} nodes{inside}, {found['width']} × {found['height']} pixels")
    return found
