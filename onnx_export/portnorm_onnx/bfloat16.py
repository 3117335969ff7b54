"""bfloat16 for a runtime that has hardly an operator in it: the same graph in float32, where results may be rounded to bfloat16.

With rounding it computes what hardware for bfloat16 does: sums of products and statistics in float32, the result of every operator in
bfloat16. Without, it has all of the graph but its rounding, so that a small error in it shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy
import onnx
from onnx import helper, numpy_helper

from portnorm.errors import ExportError
from portnorm_onnx.storage import weights_of

_NARROW, _WIDE = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT

_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "output_datatype", "stash_type", "precision", "softmax_precision")
"""Attributes of ONNX operators that are types."""


def holds_bfloat16(message: Any) -> bool:
    """Whether a model, or a part of one, names the type anywhere."""
    return next(_narrow_parts(message), None) is not None


def in_float32(proto: onnx.ModelProto, *, rounded: bool) -> onnx.ModelProto:
    """A copy with float32 in every place of bfloat16; with `rounded`, what a node gave in bfloat16 goes through it.

    Raises `ExportError` where shape inference does not tell the type of what a node gives.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for part in list(_narrow_parts(copy)):
        if isinstance(part, onnx.TensorProto):
            part.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(part).astype(numpy.float32), part.name))
        elif isinstance(part, onnx.AttributeProto):
            part.i = _WIDE
        else:
            part.elem_type = _WIDE
    if rounded:
        _round(copy.graph, _typed(proto).graph)
    return copy


def _narrow_parts(message: Any) -> Iterator[Any]:
    """The tensors, types and attributes inside that name bfloat16."""
    if isinstance(message, onnx.TensorProto):
        if message.data_type == _NARROW:
            yield message
        return
    if isinstance(message, onnx.AttributeProto):
        if message.name in _TYPE_ATTRIBUTES and message.i == _NARROW:
            yield message
    elif getattr(message, "elem_type", None) == _NARROW:
        yield message
    for kind, value in message.ListFields():
        if kind.message_type is not None:
            for part in value if isinstance(value, Sequence) else (value,):
                yield from _narrow_parts(part)


def _typed(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that tells the type of every name; weights in bfloat16 lack their numbers, which inference has no use for."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for tensor in weights_of(copy.graph):
        if tensor.data_type == _NARROW:
            tensor.ClearField("raw_data")
    return onnx.shape_inference.infer_shapes(copy)


def _round(graph: onnx.GraphProto, typed: onnx.GraphProto) -> None:
    """Behind every node of `graph` that gives bfloat16 in `typed` two casts, there and back; in the bodies of loops too."""
    types = {v.name: v.type.tensor_type.elem_type for v in (*typed.value_info, *typed.output)}
    nodes: list[onnx.NodeProto] = []
    for n, own in zip(graph.node, typed.node, strict=True):
        nodes.append(n)
        bodies = [(a.g, b.g) for a, b in zip(n.attribute, own.attribute, strict=True) if a.type == onnx.AttributeProto.GRAPH]
        for inner in bodies:
            _round(*inner)
        for k, name in enumerate(n.output if not bodies else ()):
            if not name:
                continue
            if not types.get(name):
                raise ExportError(f"shape inference does not tell the type of {name!r}, which {n.op_type} (node {n.name!r}) gives")
            if types[name] == _NARROW:
                n.output[k], between = f"{name}.float32", f"{name}.bfloat16"
                nodes.append(helper.make_node("Cast", [n.output[k]], [between], to=_NARROW))
                nodes.append(helper.make_node("Cast", [between], [name], to=_WIDE))
    del graph.node[:]
    graph.node.extend(nodes)
