"""onnxruntime: graphs of its own operators, written without this library's exporter; and sessions, with the threads of a process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy

from portnorm.bench.works import CELLS, EPS, Arrays, Run, Work


def make(work: Work, data: Arrays) -> Run | None:
    if work.backward or work.room == "update":
        return None
    return _norm(work, data) if work.room == "norm" else _plain_cell(work, data)


def threads() -> int:
    """As many as the environment says that others take."""
    return int(os.environ.get("OMP_NUM_THREADS", "1"))


def session(model: Any) -> Any:
    """What runs a graph."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads(), 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _graph(nodes: Sequence[Any], inputs: Arrays, outputs: Sequence[str], weights: Arrays) -> Run:
    """The nodes in a session that is fed with the inputs."""
    from onnx import TensorProto, helper, numpy_helper

    kind = {"float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE}
    graph = helper.make_graph(
        nodes,
        "work",
        [helper.make_tensor_value_info(name, kind[str(a.dtype)], a.shape) for name, a in inputs.items()],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(numpy.ascontiguousarray(a), name) for name, a in weights.items()],
    )
    run = session(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)).run
    return lambda: run(outputs, inputs)


def _norm(work: Work, data: Arrays) -> Run | None:
    from onnx import helper

    parameters = ("weight", "bias")
    names: tuple[str, ...] = parameters
    if work.what == "LN":
        node = helper.make_node("LayerNormalization", ["x", *parameters], ["y"], axis=-1, epsilon=EPS)
    elif work.kind == "with statistics":
        names = (*parameters, "mean", "var")
        node = helper.make_node("BatchNormalization", ["x", *names], ["y"], epsilon=EPS)
    else:
        return None
    return _graph([node], {"x": data["x"]}, ["y"], {name: data[name] for name in names})


_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}
"""ONNX's gates, as places among those of torch: i, o, f, c of i, f, g, o; and z, r, h of r, z, n."""


def _weights(work: Work, data: Arrays) -> Arrays:
    """Those of a plain cell, as the operator takes them."""

    def ordered(name: str) -> Any:
        gates = numpy.split(data[name], len(_GATES[work.what]))
        return numpy.concatenate([gates[k] for k in _GATES[work.what]])[None]

    biases = numpy.concatenate([ordered("bias_ih_l0"), ordered("bias_hh_l0")], axis=1)
    return {"W": ordered("weight_ih_l0"), "R": ordered("weight_hh_l0"), "B": biases}


def _plain_cell(work: Work, data: Arrays) -> Run | None:
    """The operator over a sequence, or over one step whose states come in and go out. It takes float32 alone."""
    from onnx import helper

    if CELLS[work.what][1] is not None or work.dtype != "float32":
        return None
    form: dict[str, Any] = {"hidden_size": work.hidden, **({"linear_before_reset": 1} if work.what == "GRU" else {})}
    weights = _weights(work, data)
    if work.room == "sequence":
        node = helper.make_node(work.what, ["x", *weights], ["with directions"], **form)
        flat = helper.make_node("Squeeze", ["with directions", "axes"], ["y"])
        return _graph([node, flat], {"x": data["x"]}, ["y"], {**weights, "axes": numpy.array([1])})
    after = [f"{name} after" for name in work.states]
    node = helper.make_node(work.what, ["x", *weights, "", *work.states], ["", *after], **form)
    return _graph([node], {name: data[name][None] for name in ("x", *work.states)}, after, weights)
