"""Doors out of Python: how an artifact is made by each, as one would call it. `ways_load.py` runs it where portnorm is not."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import portnorm as pn
from benchmarks.ways_kinds import INPUTS, TRAINING, Way, inputs_of

LONGEST = 64
"""What ExecuTorch plans memory for."""


@dataclass(frozen=True)
class Door:
    """One way out; `make(layer, way, path)` writes an artifact and gives what is told of it beside."""

    name: str
    packages: tuple[str, ...]
    make: Callable[[pn.Layer, Way, Path], dict[str, Any]]
    load: str
    """Of `ways_load.py`; none where it cannot be run here."""
    suffix: str
    gradient: str = ""
    """What loads an artifact of the way `TRAINING`."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Of the environment where it is run."""
    ways: tuple[str, ...] = ()
    """Those alone, if any; the others are those of the door above."""
    environment: str = ""
    """Where it is run, beside the one where it is made, and what `packages` are in: `.venv-ways-training` of "training"."""
    updates: bool = False
    """Whether training gives parameters after an update, not gradients."""


# -- JAX -----------------------------------------------------------------------------------------------------------------------------------


def jax_export(layer: pn.Layer, way: Way, path: Path) -> dict[str, Any]:
    import jax

    own = layer.to(xp="jax")
    steps, batch = jax.export.symbolic_shape("T, B")

    def spec(a: Any, place: int) -> Any:
        open_ = ((0, batch),) if way.step else ((0, steps), (1, batch))
        shape = list(a.shape)
        for axis, name in open_ if a.ndim else ():
            if way.time if name is steps else way.batch:
                shape[axis] = name
        return jax.ShapeDtypeStruct(tuple(shape), jax.numpy.asarray(a).dtype)

    given = [spec(a, k) for k, a in enumerate(inputs_of(layer, way, way.sizes[0]))]
    names = sorted(own.params)

    def sequence(x: Any) -> Any:
        y, state, _ = own.apply(own.params, own.buffers, x)
        return (y, state)

    def trained(params: list[Any], x: Any) -> Any:
        return own.apply(dict(zip(names, params, strict=True)), own.buffers, x)[0]

    if way is TRAINING:
        given.insert(0, [jax.ShapeDtypeStruct(own.params[n].shape, own.params[n].dtype) for n in names])
    function = trained if way is TRAINING else (lambda x, *state: own.step(x, state)) if way.step else sequence
    program = jax.export.export(jax.jit(function))(*given)
    path.write_bytes(program.serialize(vjp_order=1 if way is TRAINING else 0))
    return {}


# -- torch ---------------------------------------------------------------------------------------------------------------------------------


def module_of(layer: pn.Layer, way: Way, exact: bool = True) -> tuple[Any, tuple[Any, ...]]:
    """A module that takes and gives arrays alone, and its example."""
    import torch

    inner = pn.torch_module(layer, exact=exact).eval()

    class Alone(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Any, *state: Any) -> Any:
            found = self.inner.step(x, state) if way.step else self.inner(x)
            return (found[0], *found[1]) if layer.recurrent else found

    return Alone().eval(), tuple(torch.as_tensor(a) for a in inputs_of(layer, way, way.sizes[0]))


def shapes_of(way: Way, example: tuple[Any, ...]) -> dict[str, Any]:
    import torch

    steps, batch = (torch.export.Dim(name, min=1, max=LONGEST) for name in ("T", "B"))

    def of(a: Any) -> Any:
        axes = {0: way.batch and batch} if way.step else {0: way.time and steps, 1: way.batch and batch}
        return {axis: name for axis, name in axes.items() if name} if a.ndim else None

    return {"x": of(example[0]), **({"state": tuple(of(a) for a in example[1:])} if way.step else {})}


def program_of(layer: pn.Layer, way: Way, exact: bool = True) -> Any:
    import torch

    model, example = module_of(layer, way, exact)
    return torch.export.export(model, example, dynamic_shapes=shapes_of(way, example))


def torch_export(layer: pn.Layer, way: Way, path: Path) -> dict[str, Any]:
    import torch

    torch.export.save(program := program_of(layer, way), path)
    return {"nodes": len(program.graph.nodes)}


def aot_inductor(layer: pn.Layer, way: Way, path: Path) -> dict[str, Any]:
    import torch

    torch._inductor.aoti_compile_and_package(program_of(layer, way), package_path=str(path))
    return {}


def traced(layer: pn.Layer, way: Way) -> Any:
    import torch

    model, example = module_of(layer, way)
    return torch.jit.trace(model, example)


def torch_trace(layer: pn.Layer, way: Way, path: Path) -> dict[str, Any]:
    import torch

    torch.jit.save(traced(layer, way), path)
    return {}


# -- phones --------------------------------------------------------------------------------------------------------------------------------


def lowered_by_executorch(module: Any, example: tuple[Any, ...], path: Path, shapes: Any = None) -> Any:
    """Written for XNNPACK; what became of the program."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = torch.export.export(module, example, dynamic_shapes=shapes)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)
    return lowered.exported_program()


def lowered_by_litert(module: Any, example: tuple[Any, ...], path: Path, shapes: Any = None) -> None:
    import litert_torch

    litert_torch.convert(module, example, dynamic_shapes=shapes).export(str(path))


def executorch(layer: pn.Layer, way: Way, path: Path, exact: bool = True) -> dict[str, Any]:
    model, example = module_of(layer, way, exact)
    nodes = lowered_by_executorch(model, example, path, shapes_of(way, example)).graph.nodes
    return {"delegates": sum("executorch_call_delegate" in str(node.target) for node in nodes)}


def litert(layer: pn.Layer, way: Way, path: Path, exact: bool = True) -> dict[str, Any]:
    from ai_edge_litert.interpreter import Interpreter

    model, example = module_of(layer, way, exact)
    lowered_by_litert(model, example, path, shapes_of(way, example) if way.time or way.batch else None)
    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    return {"delegates": sum(op["op_name"] == "DELEGATE" for op in interpreter._get_ops_details())}


def core_ml(layer: pn.Layer, way: Way, source: Any) -> dict[str, Any]:
    import coremltools

    def range_of(n: int) -> Any:
        return coremltools.RangeDim(1, LONGEST, default=n)

    def of(a: Any) -> Any:
        axes = (way.batch,) if way.step else (way.time, way.batch)
        shape = tuple(range_of(n) if n_open else n for n, n_open in zip(a.shape, (*axes, False, False), strict=False))
        return coremltools.TensorType(shape=shape or (1,), dtype=a.dtype if a.dtype.kind == "f" else "int32")

    given = [of(a) for a in inputs_of(layer, way, way.sizes[0])]
    coremltools.convert(
        source, inputs=given, compute_precision=coremltools.precision.FLOAT32, minimum_deployment_target=coremltools.target.iOS16
    )
    return {}


def core_ml_trace(layer: pn.Layer, way: Way, path: Path) -> dict[str, Any]:
    return core_ml(layer, way, traced(layer, way))


def core_ml_export(layer: pn.Layer, way: Way, path: Path) -> dict[str, Any]:
    return core_ml(layer, way, program_of(layer, way).run_decompositions())


# -- OpenVINO ------------------------------------------------------------------------------------------------------------------------------


def openvino_trace(layer: pn.Layer, way: Way, path: Path) -> dict[str, Any]:
    import openvino

    model, example = module_of(layer, way)
    axes = (way.batch,) if way.step else (way.time, way.batch)
    shapes = [[-1 if n_open else n for n, n_open in zip(a.shape, (*axes, False, False), strict=False)] for a in example]
    openvino.save_model(openvino.convert_model(model, example_input=example, input=shapes), path, compress_to_fp16=False)
    return {}


def openvino_export(layer: pn.Layer, way: Way, path: Path) -> dict[str, Any]:
    import openvino

    openvino.save_model(openvino.convert_model(program_of(layer, way)), path, compress_to_fp16=False)
    return {}


# -- ONNX ----------------------------------------------------------------------------------------------------------------------------------


def onnx(layer: pn.Layer, way: Way, path: Path) -> dict[str, Any]:
    if way is TRAINING:
        pn.export_training_step(layer, pn.mean_squared_error, pn.SGD(1.0), path)
        return {}
    if way.step:
        pn.export(layer, path, streaming=True, **({} if way.batch else {"input_shape": (way.sizes[0][1], INPUTS)}))
        return {}
    shape = ("time" if way.time else way.sizes[0][0], "batch" if way.batch else way.sizes[0][1], INPUTS)
    pn.export(layer, path, input_shape=shape, **({"lengths": False} if layer.recurrent else {}))
    return {}


def onnx_trainable(layer: pn.Layer, way: Way, path: Path) -> dict[str, Any]:
    """onnxruntime-training has operators up to opset 21."""
    pn.export(layer, path, trainable=True, input_shape=("time", "batch", INPUTS), lengths=False)
    return {}


TORCH = ("torch",)
PLAIN: dict[str, Any] = {"ways": ("fixed", "step", "step of one batch")}
"""Of a module of `torch_module(layer, exact=False)`, which differs by its normalizations alone."""
DOORS = (
    Door("jax.export", ("jax", "flatbuffers"), jax_export, "jax_export", ".jax", "jax_gradient"),
    Door("torch.export", TORCH, torch_export, "torch_export", ".pt2", "torch_export_gradient"),
    Door("AOTInductor", TORCH, aot_inductor, "aot_inductor", ".aoti.pt2"),
    Door(
        "AOTInductor, AOTI_RUNTIME_CHECK_INPUTS=1",
        TORCH,
        aot_inductor,
        "aot_inductor",
        ".aoti.pt2",
        settings={"AOTI_RUNTIME_CHECK_INPUTS": "1"},
        ways=("fixed",),
    ),
    Door("torch.jit.trace", TORCH, torch_trace, "torch_trace", ".pt", "torch_trace_gradient"),
    Door("ExecuTorch, XNNPACK", (*TORCH, "executorch"), executorch, "executorch", ".pte"),
    Door("ExecuTorch, exact=False", (*TORCH, "executorch"), functools.partial(executorch, exact=False), "executorch", ".pte", **PLAIN),
    Door("litert-torch", (*TORCH, "litert-torch"), litert, "litert", ".tflite"),
    Door("litert-torch, exact=False", (*TORCH, "litert-torch"), functools.partial(litert, exact=False), "litert", ".tflite", **PLAIN),
    Door("OpenVINO of a trace", (*TORCH, "openvino"), openvino_trace, "openvino", ".xml"),
    Door("OpenVINO of torch.export", (*TORCH, "openvino"), openvino_export, "openvino", ".xml"),
    Door("Core ML of a trace", (*TORCH, "coremltools"), core_ml_trace, "", ".none"),
    Door("Core ML of torch.export", (*TORCH, "coremltools"), core_ml_export, "", ".none"),
    Door("ONNX", ("onnx", "onnxruntime"), onnx, "onnxruntime", ".onnx", "onnxruntime_update", updates=True),
    Door(
        "onnxruntime-training",
        ("onnxruntime-training-cpu",),
        onnx_trainable,
        "onnxruntime_training_step",
        ".onnx",
        "onnxruntime_training_step",
        ways=("training",),
        environment="training",
        updates=True,
    ),
)
"""In the order of the table."""
