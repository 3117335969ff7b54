"""ddddocr (text in small pictures): the two-way LSTM and the scores of its two ONNX files, one of them quantized.

Run `python docs/examples/real_ddddocr.py`. The convolutions before stay with onnxruntime, which here gives the LSTM its real input.
`common_old.onnx` has int8 weights in a `DynamicQuantizeLSTM`. portnorm dequantizes them; the operator also rounds what they are multiplied
with, step by step, so the quantized file is compared twice: with the LSTM of the same numbers, and with itself as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.utils import Extractor
from side_by_side import Case, exported, main, package_file, session

import portnorm as pn

SEEN, SCORES = "227", "387"
"""What the files call the LSTM's input and the scores."""
QUANTIZED = ", quantized as it is"


@cache
def file(name: str) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    proto = onnx.load(package_file("ddddocr", f"ddddocr/{name}"))
    proto.graph.value_info.append(helper.make_tensor_value_info(SEEN, onnx.TensorProto.FLOAT, ["time", "batch", 512]))
    return proto, {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


def dequantized(arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    """(q − zero point) · scale; scales along the first axis, where there are several."""
    scale, zero, q = (arrays[f"{name}_{part}"] for part in ("scale", "zero_point", "quantized"))
    scale, zero = (a if a.ndim == 0 else a.reshape(a.shape + (1,) * (q.ndim - a.ndim)) for a in (scale, zero))
    return ((q.astype("float32") - zero.astype("float32")) * scale).astype("float32")


def load(name: str) -> pn.Sequential:
    """(time, batch, 512) to the scores of each letter at each step."""
    arrays = file(name)[1]
    weight = arrays["135"] if "135" in arrays else np.ascontiguousarray(dequantized(arrays, "135").T)
    scores = pn.Linear(weight.shape[1], weight.shape[0])
    scores.load_state_dict({"weight": weight, "bias": arrays["136"]})
    return pn.Sequential(pn.import_checkpoint(package_file("ddddocr", f"ddddocr/{name}")), scores)


def seen(name: str, width: int = 160) -> np.ndarray:
    """What the convolutions make of a picture of bright strokes, (1, 1, 64, width)."""
    picture = np.kron(np.random.default_rng(0).random((1, 1, 8, width // 8)) > 0.6, np.ones((8, 8))).astype("float32") * 2 - 1
    return session(Extractor(file(name)[0]).extract_model(["input1"], [SEEN])).run(None, {"input1": picture})[0]


def original(name: str, in_float32: bool = False) -> Any:
    """The end of the file from the LSTM on; `in_float32` with `LSTM` and `MatMul` of the dequantized numbers."""
    proto, arrays = file(name)
    end = Extractor(proto).extract_model([SEEN], [SCORES])
    if in_float32:
        _in_float32(end.graph, arrays)
    run = session(end)
    return lambda x: run.run(None, {SEEN: x})[0]


def _in_float32(graph: onnx.GraphProto, arrays: dict[str, np.ndarray]) -> None:
    lstm = next(node for node in graph.node if node.op_type == "DynamicQuantizeLSTM")
    for place, name in ((1, lstm.input[1]), (2, lstm.input[2])):
        weight = dequantized(arrays, name.removesuffix("_quantized")).transpose(0, 2, 1)
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(weight), f"weight{place}"))
        lstm.input[place] = f"weight{place}"
    del lstm.input[8:]
    lstm.op_type, lstm.domain = "LSTM", ""
    product = next(node for node in graph.node if node.op_type == "Mul" and node.output[0] == "381_MatMul")
    graph.initializer.append(numpy_helper.from_array(dequantized(arrays, "135"), "weight"))
    product.CopyFrom(helper.make_node("MatMul", ["380", "weight"], ["381_MatMul"]))


def case(name: str, kind: str = "", in_float32: bool = False) -> Case:
    model, x, theirs = load(name), seen(name), original(name, in_float32)
    graph = exported(model, lengths=False)
    calls = (lambda: model(x)[0]), (lambda: graph(x=x)[0]), (lambda: theirs(x).reshape(len(x), 1, -1))
    return Case("ddddocr", f"{name}{kind}, {len(x)} steps", "its file in onnxruntime", *calls)


def cases() -> Iterator[Case]:
    yield case("common.onnx")
    yield case("common_old.onnx", ", its numbers in float32", in_float32=True)
    yield case("common_old.onnx", QUANTIZED)


if __name__ == "__main__":
    main(cases)
