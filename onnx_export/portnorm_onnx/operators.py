"""ONNX's own normalization operators as graphs of one node, in every runtime that is at hand: subjects of `portnorm conform`."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
import onnx
from onnx import helper, numpy_helper

from portnorm.conform.cases import STATISTICS, NumPyArray
from portnorm.conform.subjects import Call, Subject, installed
from portnorm_onnx.elsewhere import ENGINES
from portnorm_onnx.engines import LOADS
from portnorm_onnx.runtimes import RUNTIMES
from portnorm_onnx.storage import Draft

OPERATORS: dict[str, tuple[str, int]] = {
    "layer_norm": ("LayerNormalization", 17),
    "rms_norm": ("RMSNormalization", 23),
    "group_norm": ("GroupNormalization", 21),
    "instance_norm": ("InstanceNormalization", 17),
    "batch_norm": ("BatchNormalization", 17),
    STATISTICS: ("BatchNormalization", 17),
}
"""The operator of each operation, and the operator set that its graph is of."""

IR_VERSION = 10


def graph_of(operation: str, x: NumPyArray, given: dict[str, NumPyArray], **attributes: Any) -> onnx.ModelProto:
    """One node from `x` to `y`, with its parameters as constants; in training also to `batch_mean` and `batch_var`."""
    kind, opset = OPERATORS[operation]
    own, kept = (helper.np_dtype_to_tensor_dtype(a.dtype) for a in (x, given.get("mean", x)))
    outputs = [helper.make_tensor_value_info("y", own, x.shape)]
    if attributes.get("training_mode"):
        outputs += [helper.make_tensor_value_info(f"batch_{name}", kept, given[name].shape) for name in ("mean", "var")]
    graph = helper.make_graph(
        [helper.make_node(kind, ["x", *given], [o.name for o in outputs], **attributes)],
        operation.replace(" ", "_"),
        [helper.make_tensor_value_info("x", own, x.shape)],
        outputs,
        [numpy_helper.from_array(a, name) for name, a in given.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=IR_VERSION)


Run = Callable[[NumPyArray], list[NumPyArray]]
Load = Callable[[onnx.ModelProto], Run]
"""What a runtime is here: a graph of one input, loaded, gives a function from x to all outputs in order."""


def _calls(load: Load) -> dict[str, Call]:
    @lru_cache(maxsize=8)
    def tried(model: bytes) -> Run | Exception:
        try:
            return load(onnx.load_from_string(model))
        except Exception as error:
            return error

    def loaded(model: bytes) -> Run:
        found = tried(model)
        if isinstance(found, Exception):
            raise found
        return found

    def run(operation: str, x: NumPyArray, given: dict[str, NumPyArray], **attributes: Any) -> list[NumPyArray]:
        return loaded(graph_of(operation, x, given, **attributes).SerializeToString())(x)

    def plain(operation: str, **fixed: Any) -> Call:
        def call(x: NumPyArray, weight: NumPyArray, bias: NumPyArray, eps: float) -> Any:
            parts = {"weight": weight} if operation == "rms_norm" else {"weight": weight, "bias": bias}
            return run(operation, x, parts, epsilon=eps, **fixed)[0]

        return call

    def group(x: NumPyArray, weight: NumPyArray, bias: NumPyArray, eps: float, groups: int) -> Any:
        return run("group_norm", x, {"weight": weight, "bias": bias}, epsilon=eps, num_groups=groups)[0]

    def training(x: NumPyArray, weight: NumPyArray, bias: NumPyArray, eps: float) -> Any:
        zero, one = (numpy.full(weight.shape, value, numpy.float32) for value in (0, 1))
        given = {"weight": weight, "bias": bias, "mean": zero, "var": one}
        return tuple(run("batch_norm", x, given, epsilon=eps, momentum=0.0, training_mode=1))

    def statistics(x: NumPyArray, weight: NumPyArray, bias: NumPyArray, eps: float, mean: NumPyArray, var: NumPyArray) -> Any:
        return run(STATISTICS, x, {"weight": weight, "bias": bias, "mean": mean, "var": var}, epsilon=eps)[0]

    return {
        "layer_norm": plain("layer_norm", axis=-1),
        "rms_norm": plain("rms_norm", axis=-1),
        "group_norm": group,
        "instance_norm": plain("instance_norm"),
        "batch_norm": training,
        STATISTICS: statistics,
    }


def _of_table(name: str) -> Load:
    """A runtime of `RUNTIMES`."""

    def load(model: onnx.ModelProto) -> Run:
        session = RUNTIMES[name].load(Draft(model).loadable())
        return lambda x: [session({"x": x})[o.name] for o in model.graph.output]

    return load


def _of_engine(name: str) -> Load:
    """A runtime of `engines.py`, in this process."""

    def load(model: onnx.ModelProto) -> Run:
        with TemporaryDirectory(prefix="portnorm-") as folder:
            path = Path(folder) / "m.onnx"
            onnx.save(model, path)
            session = LOADS[name](str(path))
        return lambda x: list(session({"x": x}).values())

    return load


ADVICE = {
    "onnxruntime": "no GroupNormalization-21; Reshape and InstanceNormalization, which `portnorm.export` writes, are right",
    "web": "no GroupNormalization-21; Reshape and InstanceNormalization are right",
    "reference": "no yardstick for float16, nor for GroupNormalization: compare with float64",
    "opencv": "subtract a common mean in front of the graph, or run it in onnxruntime",
    "mnn": "export in evaluation mode; write GroupNormalization and RMSNormalization in other operators, as `portnorm.export` does",
    "litert": "export in evaluation mode: training_mode=1 is ignored without a word",
    "tract": "blocks of a thousand values in longer rows; float32 around InstanceNormalization in float16",
    "tvm": "no GroupNormalization-21; float32 around InstanceNormalization in float16; momentum is taken the other way round",
    "iree": "float32 around what it does not compile in float16",
}


BOTH = ("float32", "float16")


def _row(name: str, load: Load, version: Callable[[], str], note: str = "graphs of one node", dtypes: tuple[str, ...] = BOTH) -> Subject:
    return Subject(f"onnx-{name}", version, _calls(load), dtypes=dtypes, note=note, advice=ADVICE.get(name, ""))


SUBJECTS = (
    *(_row(name, _of_table(name), RUNTIMES[name].version) for name in ("onnxruntime", "openvino", "tract", "web", "reference")),
    *(_row(name, _of_engine(name), installed(*ENGINES[name].packages)) for name in ("opencv", "mnn", "tvm", "iree", "tinygrad")),
    *(
        _row(name, _of_engine(name), installed(*ENGINES[name].packages), f"graphs of one node, converted by {by}", ("float32",))
        for name, by in (("ncnn", "pnnx"), ("litert", "onnx2tf"))
    ),
)
