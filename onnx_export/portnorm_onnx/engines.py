"""Runtimes that have a converter or a compiler of their own: each function takes a model's path and gives what runs it.

What runs it takes arrays by the names of the graph's inputs and gives those by the names of its outputs, in the graph's types. Nothing here
needs more than NumPy, onnx and the runtime, so that it runs in an environment that has no more (`engine_worker.py`). What a runtime does
not take it says by an exception of its own, or by `RefusedError`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import onnx

from portnorm_onnx.engine_c import c
from portnorm_onnx.engine_parts import Load, NumPyArray, RefusedError, Run, command, dims_of, fixed, graph_of, inside, kind_of, naming


def opencv(path: str) -> Run:
    """OpenCV's `cv2.dnn`, in the engine that it takes by itself."""
    import cv2

    net, graph = cv2.dnn.readNetFromONNX(path), graph_of(path)
    names, named = [o.name for o in graph.output], naming(graph.output)
    cv2.setNumThreads(1)

    def run(given: Mapping[str, NumPyArray]) -> dict[str, NumPyArray]:
        for name, a in given.items():
            net.setInput(numpy.ascontiguousarray(a), name)
        return named([a.copy() for a in net.forward(names)])

    return run


def mnn(path: str) -> Run:
    """MNN, converted by its own converter: its module mnnconvert runs pip when it is imported, `_tools` does not."""
    import _tools
    import MNN
    import MNN.expr
    import MNN.nn
    import MNN.numpy

    graph = graph_of(path)
    inputs, named = [i.name for i in graph.input], naming(graph.output)
    kinds = {"f": MNN.numpy.float32, "i": MNN.numpy.int32, "b": MNN.numpy.int32}
    with tempfile.TemporaryDirectory(prefix="portnorm-") as folder:
        made = f"{folder}/m.mnn"
        words = ["mnnconvert", "-f", "ONNX", "--modelFile", inside(path, folder), "--MNNModel", made, "--bizCode", "portnorm"]
        with contextlib.redirect_stdout(io.StringIO()):
            _tools.mnnconvert([*words, "--useOriginRNNImpl"])
        if not os.path.exists(made):
            raise RefusedError("MNN's converter writes no file for the graph")
        net = MNN.nn.load_module_from_file(made, inputs, [o.name for o in graph.output])

    def placed(a: NumPyArray) -> Any:
        laid = MNN.expr.placeholder([*a.shape], MNN.expr.NCHW, kinds[a.dtype.kind])
        laid.write(a.astype(numpy.float32 if a.dtype.kind == "f" else numpy.int32))
        return laid

    def run(given: Mapping[str, NumPyArray]) -> dict[str, NumPyArray]:
        found = net.onForward([placed(given[name]) for name in inputs])
        return named([numpy.array(MNN.expr.convert(a, MNN.expr.NCHW).read()) for a in found])

    return run


def ncnn(path: str) -> Run:
    """ncnn, converted by pnnx, which takes a first axis of length 1, or in front of images, for a batch; ncnn is given none."""
    import ncnn as library

    graph = graph_of(path)
    shapes = [fixed(i, "pnnx") for i in graph.input]
    rows = len(shapes) == 1 and len(shapes[0]) != 2 and shapes[0][0] > 1  # images, one after the other
    types = {"f": "f32", "i": "i64"}
    told = ",".join(f"[{','.join(map(str, s))}]{types[kind_of(i).kind]}" for i, s in zip(graph.input, shapes, strict=True))
    with tempfile.TemporaryDirectory(prefix="portnorm-") as folder:
        inside(path, folder)
        command("pnnx", "m.onnx", f"inputshape={told}", "fp16=0", folder=folder)
        net = library.Net()
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = net.opt.use_bf16_storage = False
        net.opt.num_threads = 1
        if net.load_param(f"{folder}/m.ncnn.param") or net.load_model(f"{folder}/m.ncnn.bin"):
            raise RefusedError("ncnn does not load what pnnx makes of the graph")

    outputs = [fixed(o, "ncnn") for o in graph.output]
    names, named = [i.name for i in graph.input], naming(graph.output)

    def one(given: Sequence[NumPyArray]) -> list[NumPyArray]:
        extractor = net.create_extractor()
        for k, a in enumerate(given):
            extractor.input(f"in{k}", library.Mat(numpy.ascontiguousarray(a, dtype=numpy.float32)).clone())
        found = [extractor.extract(f"out{k}") for k in range(len(outputs))]
        if any(code for code, _ in found):
            raise RefusedError(f"ncnn does not run the graph: {[code for code, _ in found]}")
        return [numpy.array(a) for _, a in found]

    def run(given: Mapping[str, NumPyArray]) -> dict[str, NumPyArray]:
        arrays = [given[name] for name in names]
        if rows:
            return named([numpy.stack([one([case])[0] for case in arrays[0]])])
        found = one([a[0] if a.shape[:1] == (1,) and a.ndim > 1 else a for a in arrays])
        return named([a.reshape(shape) for shape, a in zip(outputs, found, strict=True)])

    return run


def litert(path: str) -> Run:
    """LiteRT, converted by onnx2tf."""
    import onnx2tf
    from ai_edge_litert.interpreter import Interpreter

    graph = graph_of(path)
    shapes = {i.name: fixed(i, "LiteRT") for i in graph.input}
    folder = tempfile.TemporaryDirectory(prefix="portnorm-")
    keep = [n for n, shape in shapes.items() if len(shape) > 2]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            onnx2tf.convert(
                input_onnx_file_path=inside(path, folder.name),
                output_folder_path=folder.name,
                non_verbose=True,
                copy_onnx_input_output_names_to_tflite=True,
                keep_shape_absolutely_input_names=keep or None,
            )
    except SystemExit as error:
        raise RefusedError("onnx2tf does not convert the graph") from error
    interpreter = Interpreter(model_path=f"{folder.name}/m_float32.tflite", num_threads=1)
    interpreter.allocate_tensors()
    taken = {
        d["name"].removesuffix(":0").removeprefix("serving_default_"): (d["index"], d["dtype"], tuple(d["shape"]))
        for d in interpreter.get_input_details()
    }
    found = sorted(
        interpreter.get_output_details(), key=lambda d: [int(n) for n in re.findall(r"\d+", d["name"])]
    )  # Identity, Identity_1, …
    if len(found) != len(graph.output):
        raise RefusedError(f"onnx2tf makes {len(found)} outputs of {len(graph.output)}")
    indices, outputs, named, kept = (
        [d["index"] for d in found],
        [tuple(fixed(o, "LiteRT")) for o in graph.output],
        naming(graph.output),
        folder,
    )

    def run(given: Mapping[str, NumPyArray]) -> dict[str, NumPyArray]:
        assert kept
        for name, a in given.items():
            index, kind, shape = taken[name]
            interpreter.set_tensor(index, a if a.dtype == kind and a.shape == shape else a.astype(kind).reshape(shape))
        interpreter.invoke()
        return named([_channels_second(interpreter.get_tensor(k), shape) for k, shape in zip(indices, outputs, strict=True)])

    def steps(given: Mapping[str, NumPyArray], fed: Mapping[str, str]) -> list[NumPyArray]:
        """As docs/examples/deploy/in_litert.py has them."""
        gives = {o.name: k for o, k in zip(graph.output, indices, strict=True)}
        back = [(taken[into][0], gives[name]) for name, into in fed.items()]
        for into in fed.values():
            index, kind, shape = taken[into]
            interpreter.set_tensor(index, given[into].astype(kind).reshape(shape))
        (index, kind, shape), ys = taken["x"], []
        for x in given["x"].astype(kind).reshape(-1, *shape):
            interpreter.set_tensor(index, x)
            interpreter.invoke()
            ys.append(interpreter.get_tensor(gives["y"]))
            for into, k in back:
                interpreter.set_tensor(into, interpreter.get_tensor(k))
        return ys

    run.steps = steps  # type: ignore[attr-defined]
    return run


def _channels_second(a: NumPyArray, shape: tuple[int, ...]) -> NumPyArray:
    """A result in the order of the graph, where the converter has put channels last."""
    return a if a.shape == shape else numpy.moveaxis(a, -1, 1)


def tvm(path: str) -> Run:
    """TVM's relax, compiled by LLVM, without tuning."""
    import tvm as library
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    model = onnx.load(path)
    inputs, outputs = model.graph.input, model.graph.output
    shapes: dict[str, Any] = {}
    symbols: dict[str, Any] = {}
    for value in inputs:
        shapes[value.name] = [d if isinstance(d, int) else symbols.setdefault(d, library.tirx.Var(d, "int64")) for d in dims_of(value)]
    module = from_onnx(model, shape_dict=shapes, dtype_dict={i.name: str(kind_of(i)) for i in inputs}, keep_params_in_input=False)
    machine = relax.VirtualMachine(relax.build(module, target="llvm"), library.cpu())

    names, named = [i.name for i in inputs], naming(outputs)

    def run(given: Mapping[str, NumPyArray]) -> dict[str, NumPyArray]:
        found = machine["main"](*(library.runtime.tensor(given[name]) for name in names))
        return named([a.numpy() for a in ([found] if hasattr(found, "numpy") else found)])

    return run


def iree(path: str) -> Run:
    """IREE, compiled by LLVM for this processor."""
    from iree import compiler, runtime

    graph = graph_of(path)
    with tempfile.TemporaryDirectory(prefix="portnorm-") as folder:
        inside(path, folder)
        command("iree-import-onnx", "m.onnx", "-o", "m.mlir", folder=folder)
        made = compiler.tools.compile_file(
            f"{folder}/m.mlir", input_type="onnx", target_backends=["llvm-cpu"], extra_args=["--iree-llvmcpu-target-cpu=host"]
        )
    config = runtime.Config("local-sync")
    context = runtime.SystemContext(config=config)
    context.add_vm_module(runtime.VmModule.copy_buffer(config.vm_instance, made))
    function = context.modules.module[graph.name]
    names, named = [i.name for i in graph.input], naming(graph.output)

    def run(given: Mapping[str, NumPyArray]) -> dict[str, NumPyArray]:
        found = function(*(given[name] for name in names))
        return named([a.to_host() for a in (found if isinstance(found, tuple | list) else [found])])

    return run


def tinygrad(path: str) -> Run:
    """tinygrad's runner of ONNX graphs."""
    from tinygrad import Device, Tensor
    from tinygrad.nn.onnx import OnnxRunner

    try:
        _ = Device.DEFAULT
    except RuntimeError as error:
        raise RefusedError(
            f"tinygrad has no device here ({error}): on a processor it compiles by clang, which is found by its name or by CC"
        ) from None
    graph = graph_of(path)
    model = onnx.load(path).SerializeToString()
    names, named = [o.name for o in graph.output], naming(graph.output)
    nets: dict[tuple[Any, ...], Any] = {}  # one holds on to the lengths that it has met first

    def run(given: Mapping[str, NumPyArray]) -> dict[str, NumPyArray]:
        shapes = tuple(a.shape for a in given.values())
        if shapes not in nets:
            nets[shapes] = OnnxRunner(Tensor(model))
        found = nets[shapes]({name: Tensor(numpy.ascontiguousarray(a)) for name, a in given.items()})
        return named([found[name].numpy() for name in names])

    return run


def onnx2pytorch(path: str) -> Run:
    """A module of torch that onnx2pytorch makes of the graph."""
    import torch
    from onnx2pytorch import ConvertModel

    torch.set_num_threads(1)
    graph = graph_of(path)
    module = ConvertModel(onnx.load(path), experimental=True).eval()
    names, named = [i.name for i in graph.input], naming(graph.output)

    def run(given: Mapping[str, NumPyArray]) -> dict[str, NumPyArray]:
        with torch.no_grad():
            found = module(*(torch.from_numpy(numpy.ascontiguousarray(given[name])) for name in names))
        return named([a.numpy() for a in (found if isinstance(found, tuple | list) else [found])])

    return run


def onnxruntime(path: str) -> Run:
    """A build of onnxruntime that is in another environment: with OpenVINO where that is what it has."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    there = ort.get_available_providers()
    session = ort.InferenceSession(
        path, options, providers=[p for p in ("OpenVINOExecutionProvider", "CPUExecutionProvider") if p in there]
    )
    names = [o.name for o in session.get_outputs()]
    return lambda given: dict(zip(names, session.run(names, dict(given)), strict=True))


LOADS: dict[str, Load] = {
    "onnxruntime": onnxruntime,
    "mnn": mnn,
    "litert": litert,
    "ncnn": ncnn,
    "iree": iree,
    "tvm": tvm,
    "tinygrad": tinygrad,
    "c": c,
    "opencv": opencv,
    "onnx2pytorch": onnx2pytorch,
    "onnxruntime-openvino": onnxruntime,
}
