"""`portnorm export`: a checkpoint as an ONNX file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import portnorm
from portnorm.files import require_place


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="what `portnorm train`, `portnorm import` or `pn.save` wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file to write (.onnx)")
    parser.add_argument("--opset", type=int, help="18 to 26, for some targets 28 (default: 18; 23 for onnxruntime)")
    parser.add_argument("--target", default="portable", help="who will run it (default: portable, which is all of them)")
    parser.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32", "float64"), help="type of the graph (default: that of the checkpoint)"
    )
    parser.add_argument(
        "--quantize", choices=("int8", "int4"), help="products of integers: a quarter of the file, or an eighth (default: none)"
    )
    parser.add_argument("--streaming", action="store_true", help="one step with explicit states instead of a sequence")
    parser.add_argument("--no-fold", action="store_true", help="keep normalizations and cells visible that could be folded away")
    parser.add_argument(
        "--accurate",
        action="store_true",
        help="centre where operators would cancel; in float16, float32 around products",
    )
    parser.add_argument("--prefix", default="", help="what stands before every name in the graph (default: nothing)")
    parser.add_argument("--function", action="store_true", help="write the model as one model-local function")
    parser.add_argument("--no-lengths", action="store_true", help="leave the input `lengths` out")
    parser.add_argument("--mask", action="store_true", help="take the input `mask` in place of `lengths`: padding in front, and gaps")
    parser.add_argument("--state", action="store_true", help="take the state as an input and give it out")
    parser.add_argument("--external-data", action="store_true", help="put the weights into a file of their own beside the model")
    parser.add_argument("--no-metadata", action="store_true", help="write the graph alone: smaller, and `load` cannot read it")


def run(options: argparse.Namespace) -> dict[str, Any]:
    require_place("--output", options.output, ".onnx")
    model = portnorm.load(options.checkpoint)
    report = portnorm.export(
        model,
        options.output,
        opset=options.opset,
        target=options.target,
        dtype=options.dtype,
        streaming=options.streaming,
        fold=not options.no_fold,
        accurate=options.accurate,
        lengths=not options.no_lengths,
        mask=options.mask,
        state=options.state,
        prefix=options.prefix,
        function=options.function,
        external_data=options.external_data or None,
        metadata=not options.no_metadata,
        quantize=options.quantize,
    )
    if not options.json:
        print(report)
    found: dict[str, Any] = report.to_dict()
    return found
