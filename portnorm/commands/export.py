"""`portnorm export`: a checkpoint as an ONNX file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import portnorm
from portnorm.errors import UnsupportedError
from portnorm.files import require_place
from portnorm.layers.layer import Layer


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="what `portnorm train`, `portnorm import` or `pn.save` wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file to write (.onnx)")
    parser.add_argument("--opset", type=int, help="18 to 26, for some targets 28 or 18 alone (default: 18; 23 for onnxruntime)")
    parser.add_argument(
        "--target", default="portable", help="who will run it: onnxruntime, litert, mnn, c, … (default: portable; docs/runtimes.md has all)"
    )
    parser.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32", "float64"), help="type of the graph (default: that of the checkpoint)"
    )
    parser.add_argument(
        "--quantize", choices=("int8", "int4"), help="products of integers: a quarter of the file, or an eighth (default: none)"
    )
    parser.add_argument("--streaming", action="store_true", help="one step with explicit states instead of a sequence")
    parser.add_argument("--unroll", action="store_true", help="write every step of a loop out (needs --shape with their number)")
    parser.add_argument(
        "--shape",
        type=_shape,
        metavar="time=5,batch=1",
        help="lengths of x that are fixed, by name; or all in order, as batch,8,height,width (default: what the model says)",
    )
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
        unroll=options.unroll,
        input_shape=_input_shape(model, options.shape, options.streaming),
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


def _shape(text: str) -> dict[str, int] | tuple[int | str, ...]:
    """Lengths by name, or in order."""
    parts = [part.strip() for part in text.split(",")]
    try:
        if all("=" in part for part in parts):
            return {name.strip(): int(length) for name, length in (part.split("=") for part in parts)}
        if not any("=" in part or not part for part in parts):
            return tuple(int(part) if part.lstrip("-").isdigit() else part for part in parts)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is neither lengths by name, as time=5,batch=1, nor all in order, as batch,8,height,width")


def _input_shape(model: Layer, given: dict[str, int] | tuple[int | str, ...] | None, streaming: bool) -> tuple[int | str, ...] | None:
    """The shape of `x` where some of its lengths are fixed."""
    if not isinstance(given, dict):
        return given
    dims = tuple(d for d in model.input_dims() if not (streaming and d == "time"))
    unknown = [name for name in given if name not in dims]
    if unknown:
        names = ", ".join(d for d in dims if isinstance(d, str))
        raise UnsupportedError(f"`--shape` names {unknown[0]!r}; {type(model).__name__} has {names or 'no open lengths'}")
    return tuple(given.get(d, d) if isinstance(d, str) else d for d in dims)
