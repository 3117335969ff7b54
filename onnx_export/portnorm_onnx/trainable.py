"""Graphs that onnxruntime-training differentiates: `export(..., trainable=True)`.

Its gradient builder asks more of a graph than running does. Parameters have to be there as they are, one initializer each, so that a step
by a gradient is a step of the layer. LayerNormalization is given a shift, and gives its mean and its inverse deviation too; LSTM and GRU
are given their first states and biases. Each input of these operators, and of Concat, gets a gradient, wanted or not, that is named after
it. Where two had one input that no parameter goes into, there would be two of a name: so zeros are a parameter times 0.

What it has no gradient for is refused here. There it ends in an error that names neither the layer nor a way out.
"""

from __future__ import annotations

import dataclasses

import onnx

from portnorm.errors import UnsupportedError
from portnorm.layers.layer import Layer
from portnorm_onnx.targets import Target

LAST_OPSET = 21
"""The last that onnxruntime-training 1.19 reads."""

OPERATORS = frozenset(
    {"LSTM", "GRU", "LayerNormalization", "MatMul", "Add", "Sub", "Mul", "Div", "Sqrt", "Sigmoid", "Tanh", "Split", "Slice", "Concat"}
    | {"Gather", "GatherElements", "Squeeze", "Unsqueeze", "Reshape", "Transpose", "Expand", "Identity", "Where", "ReduceMean", "ReduceSum"}
    # What only lengths, masks and conditions are made of, which have no gradient.
    | {"Abs", "ReduceMax", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal", "And", "Or", "Not", "Cast", "CumSum", "Min", "Max"}
    | {"Shape", "Range", "ConstantOfShape", "ScatterElements"}
)
"""Those of our graphs that it differentiates, each measured by a step (`make ways-out`)."""

_WAY_OUT = "portnorm.export_training_step writes an update of its own, which runs in any onnxruntime"


def target_for_training(target: Target) -> Target:
    """The same target without what has no gradient; raises `UnsupportedError` for one with operators of its own."""
    if target.name != "portable":
        raise UnsupportedError(
            f"`trainable` is for target 'portable', which has what onnxruntime-training differentiates; not {target.name!r}"
        )
    return dataclasses.replace(target, without=target.without | {"InstanceNormalization"})


def check_trainable(model: Layer, version: int, dtype: str, *, function: bool) -> None:
    """Raise `UnsupportedError` for what trains in another way than it infers, and what onnxruntime-training does not read."""
    if function:
        raise UnsupportedError("`trainable` with `function=True`, in which onnxruntime-training finds no gradients; leave one of both out")
    if version > LAST_OPSET:
        raise UnsupportedError(f"`opset` is {version}; onnxruntime-training reads up to {LAST_OPSET}")
    if dtype != "float32":
        raise UnsupportedError(f"`trainable` of a graph in {dtype}; expected float32: convert with `dtype='float32'`")
    if model.quantizes is not None:
        raise UnsupportedError(f"`trainable` of a model whose products are of integers; {_WAY_OUT}")
    if model.buffers:
        raise UnsupportedError(
            f"`trainable`: {type(model).__name__} has running statistics ({next(iter(model.buffers))}), and trains on those of the batch, "
            f"which a graph for inference does not; {_WAY_OUT}"
        )
    if model.random_shapes("time", "batch"):
        raise UnsupportedError(
            f"`trainable`: {type(model).__name__} drops values in training, which a graph for inference does not; {_WAY_OUT}"
        )


def check_gradients(proto: onnx.ModelProto) -> None:
    """Raise `UnsupportedError` for a node that onnxruntime-training has no gradient for."""
    n = next((n for n in proto.graph.node if n.op_type not in OPERATORS), None)
    if n is not None:
        loop = ", or with `unroll=True` and a number of steps in `input_shape` there is no loop" if n.op_type == "Scan" else ""
        raise UnsupportedError(f"`trainable`: onnxruntime-training has no gradient for {n.op_type} (node {n.name!r}); {_WAY_OUT}{loop}")
