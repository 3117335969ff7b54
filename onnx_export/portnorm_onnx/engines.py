"""Runtimes that are measured on graphs of one node: each function loads a model of one input `x` and gives what runs it.

What a runtime does not take it says by an exception of its own.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import onnx

from portnorm.errors import ExportError

NumPyArray = numpy.ndarray[Any, Any]
Run = Callable[[NumPyArray], list[NumPyArray]]


def _shape(model: onnx.ModelProto) -> list[int]:
    return [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]


def _command(*words: str, folder: str) -> None:
    """Run a converter; raises `ExportError` with the end of what it says."""
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        raise ExportError(f"{words[0]} does not convert the graph: {next((line for line in said if 'rror' in line), said[-1])[:250]}")


def opencv(model: onnx.ModelProto) -> Run:
    import cv2

    net = cv2.dnn.readNetFromONNX(numpy.frombuffer(model.SerializeToString(), numpy.uint8))
    names = [o.name for o in model.graph.output]

    def run(x: NumPyArray) -> list[NumPyArray]:
        net.setInput(x, "x")
        return [numpy.array(a) for a in net.forward(names)]

    return run


def mnn(model: onnx.ModelProto) -> Run:
    import _tools  # MNN's converter; its module mnnconvert runs pip when it is imported
    import MNN
    import MNN.expr
    import MNN.nn
    import MNN.numpy

    names = [o.name for o in model.graph.output]
    with tempfile.TemporaryDirectory(prefix="portnorm-") as folder:
        source, made = f"{folder}/m.onnx", f"{folder}/m.mnn"
        onnx.save(model, source)
        with contextlib.redirect_stdout(io.StringIO()):
            _tools.mnnconvert(["mnnconvert", "-f", "ONNX", "--modelFile", source, "--MNNModel", made, "--bizCode", "portnorm"])
        if not os.path.exists(made):
            raise ExportError("MNN's converter writes no file for the graph")
        net = MNN.nn.load_module_from_file(made, ["x"], names)

    def run(x: NumPyArray) -> list[NumPyArray]:
        given = MNN.expr.placeholder([*x.shape], MNN.expr.NCHW, MNN.numpy.float32)
        given.write(x.astype(numpy.float32))
        found = net.onForward([given])
        return [numpy.array(MNN.expr.convert(a, MNN.expr.NCHW).read()) for a in found]

    return run


def ncnn(model: onnx.ModelProto) -> Run:
    import ncnn as library

    shape = _shape(model)
    if len(shape) == 2:  # an axis without a meaning in front is its batch, which it has not
        shape = [1, *shape]
    with tempfile.TemporaryDirectory(prefix="portnorm-") as folder:
        onnx.save(model, f"{folder}/m.onnx")
        _command("pnnx", "m.onnx", f"inputshape=[{','.join(map(str, _shape(model)))}]f32", "fp16=0", folder=folder)
        net = library.Net()
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = net.opt.use_bf16_storage = False
        net.opt.num_threads = 1
        if net.load_param(f"{folder}/m.ncnn.param") or net.load_model(f"{folder}/m.ncnn.bin"):
            raise ExportError("ncnn does not load what pnnx makes of the graph")

    def one(x: NumPyArray) -> NumPyArray:
        extractor = net.create_extractor()
        extractor.input("in0", library.Mat(numpy.ascontiguousarray(x)).clone())
        code, found = extractor.extract("out0")
        if code:
            raise ExportError(f"ncnn does not run the graph: {code}")
        return numpy.array(found)

    if len(_shape(model)) == 2:
        return lambda x: [one(x.astype(numpy.float32))]
    return lambda x: [numpy.stack([one(case) for case in x.astype(numpy.float32)])]


def litert(model: onnx.ModelProto) -> Run:
    import onnx2tf
    from ai_edge_litert.interpreter import Interpreter

    folder = tempfile.TemporaryDirectory(prefix="portnorm-")
    onnx.save(model, f"{folder.name}/m.onnx")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            onnx2tf.convert(input_onnx_file_path=f"{folder.name}/m.onnx", output_folder_path=folder.name, non_verbose=True)
    except SystemExit as error:
        raise ExportError("onnx2tf does not convert the graph") from error
    interpreter = Interpreter(model_path=f"{folder.name}/m_float32.tflite", num_threads=1)
    interpreter.allocate_tensors()
    (given,), found = interpreter.get_input_details(), interpreter.get_output_details()
    kept = folder

    def run(x: NumPyArray) -> list[NumPyArray]:
        assert kept
        laid = numpy.moveaxis(x, 1, -1) if x.ndim > 2 else x  # channels last is what it converts to
        interpreter.set_tensor(given["index"], laid.astype(given["dtype"]))
        interpreter.invoke()
        results = [interpreter.get_tensor(o["index"]) for o in found]
        return [numpy.moveaxis(a, -1, 1) if a.ndim > 2 else a for a in results]

    return run


def tvm(model: onnx.ModelProto) -> Run:
    import tvm as library
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    kind = str(onnx.helper.tensor_dtype_to_np_dtype(model.graph.input[0].type.tensor_type.elem_type))
    module = from_onnx(model, shape_dict={"x": _shape(model)}, dtype_dict={"x": kind}, keep_params_in_input=False)
    machine = relax.VirtualMachine(relax.build(module, target="llvm"), library.cpu())

    def run(x: NumPyArray) -> list[NumPyArray]:
        found = machine["main"](library.runtime.tensor(x))
        return [a.numpy() for a in ([found] if hasattr(found, "numpy") else found)]

    return run


def iree(model: onnx.ModelProto) -> Run:
    from iree import compiler, runtime

    with tempfile.TemporaryDirectory(prefix="portnorm-") as folder:
        onnx.save(model, f"{folder}/m.onnx")
        _command("iree-import-onnx", "m.onnx", "-o", "m.mlir", folder=folder)
        made = compiler.tools.compile_file(
            f"{folder}/m.mlir", input_type="onnx", target_backends=["llvm-cpu"], extra_args=["--iree-llvmcpu-target-cpu=host"]
        )
    config = runtime.Config("local-task")
    context = runtime.SystemContext(config=config)
    context.add_vm_module(runtime.VmModule.copy_buffer(config.vm_instance, made))
    function = context.modules.module[model.graph.name]

    def run(x: NumPyArray) -> list[NumPyArray]:
        found = function(x)
        return [numpy.array(a.to_host()) for a in (found if isinstance(found, tuple | list) else [found])]

    return run


def tinygrad(model: onnx.ModelProto) -> Run:
    from tinygrad import Tensor
    from tinygrad.nn.onnx import OnnxRunner

    with tempfile.TemporaryDirectory(prefix="portnorm-") as folder:
        onnx.save(model, f"{folder}/m.onnx")
        net = OnnxRunner(f"{folder}/m.onnx")
    names = [o.name for o in model.graph.output]

    def run(x: NumPyArray) -> list[NumPyArray]:
        found = net({"x": Tensor(x)})
        return [found[name].numpy() for name in names]

    return run
