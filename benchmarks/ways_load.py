"""Run artifacts where portnorm is not: `python benchmarks/ways_load.py`, a fresh process that reads jobs and answers each in a line.

A job is `[loader, artifact, inputs, outputs]`: a name of `LOADERS`, and paths of the artifact and of two files of arrays. The answer is
`null`, or what the error says.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Run = Callable[[list[Any]], Sequence[Any]]


def _arrays(found: Any) -> list[Any]:
    return [np.asarray(a.detach() if hasattr(a, "detach") else a) for a in found]


def jax_export(path: str) -> Run:
    import jax

    with open(path, "rb") as file:
        program = jax.export.deserialize(bytearray(file.read()))
    return lambda inputs: jax.tree.leaves(program.call(*inputs))


def jax_gradient(path: str) -> Run:
    import jax

    with open(path, "rb") as file:
        program = jax.export.deserialize(bytearray(file.read()))

    def run(inputs: list[Any]) -> list[Any]:
        x, dy, *params = inputs
        return list(jax.grad(lambda params: (program.call(params, x) * dy).sum())(params))

    return run


def _of_torch(call: Any) -> Run:
    import torch

    return lambda inputs: torch.utils._pytree.tree_leaves(call(*(torch.as_tensor(a) for a in inputs)))


def torch_export(path: str) -> Run:
    import torch

    return _of_torch(torch.export.load(path).module())


def aot_inductor(path: str) -> Run:
    import torch

    return _of_torch(torch._inductor.aoti_load_package(path))


def torch_trace(path: str) -> Run:
    import torch

    return _of_torch(torch.jit.load(path))


def _gradient_of_torch(module: Any) -> Run:
    import torch

    def run(inputs: list[Any]) -> list[Any]:
        x, dy = (torch.as_tensor(a) for a in inputs[:2])
        y = torch.utils._pytree.tree_leaves(module(x))[0]
        params = dict(sorted(module.named_parameters()))
        return list(torch.autograd.grad((y * dy).sum(), list(params.values())))

    return run


def torch_export_gradient(path: str) -> Run:
    import torch

    return _gradient_of_torch(torch.export.load(path).module())


def torch_trace_gradient(path: str) -> Run:
    import torch

    return _gradient_of_torch(torch.jit.load(path))


def executorch(path: str) -> Run:
    import torch
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")
    return lambda inputs: method.execute([torch.as_tensor(a) for a in inputs])


def litert(path: str) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(path)
    runner = interpreter.get_signature_runner()
    given, outputs = runner.get_input_details(), list(runner.get_output_details())

    def run(inputs: list[Any]) -> list[Any]:
        found = runner(**{name: a.astype(told["dtype"]) for (name, told), a in zip(given.items(), inputs, strict=True)})
        return [found[name] for name in sorted(outputs, key=lambda name: int(name.rpartition("_")[2]))]

    return run


def openvino(path: str) -> Run:
    import openvino

    # Elsewhere than with this hint it computes in bfloat16 on processors that have it.
    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda inputs: list(compiled(inputs).values())


def onnxruntime(path: str) -> Run:
    import onnxruntime as ort

    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = session.get_inputs()

    def run(inputs: list[Any]) -> list[Any]:
        feed = {i.name: a.reshape((1,) * (len(i.shape) - a.ndim) + a.shape) for i, a in zip(given, inputs, strict=True)}
        return list(session.run(None, feed))

    return run


def onnxruntime_update(path: str) -> Run:
    """What one update makes of parameters and statistics, in the order of their names."""
    import onnxruntime as ort

    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = sorted(o.name for o in session.get_outputs() if o.name.startswith("next.") and not o.name.startswith("next.optimizer"))
    return lambda inputs: list(session.run(names, dict(zip(("x", "target"), inputs, strict=True))))


def onnxruntime_training_step(path: str) -> Run:
    """What one step of gradient descent with rate 1 makes of the parameters, in the order of their names."""
    import onnx
    from onnxruntime.training import artifacts
    from onnxruntime.training.api import CheckpointState, Module, Optimizer

    def run(inputs: list[Any]) -> list[Any]:
        model = onnx.load(path)
        names = sorted(t.name for t in model.graph.initializer if not t.name.startswith("constant_"))
        with tempfile.TemporaryDirectory() as folder:
            artifacts.generate_artifacts(
                model, names, loss=artifacts.LossType.MSELoss, optimizer=artifacts.OptimType.SGD, artifact_directory=folder
            )
            written = onnx.load(f"{folder}/optimizer_model.onnx")
            written.ir_version = model.ir_version  # that of the installed onnx is later than what it reads
            onnx.save(written, f"{folder}/optimizer_model.onnx")
            state = CheckpointState.load_checkpoint(f"{folder}/checkpoint")
            module = Module(f"{folder}/training_model.onnx", state, f"{folder}/eval_model.onnx")
            optimizer = Optimizer(f"{folder}/optimizer_model.onnx", module)
            optimizer.set_learning_rate(1.0)
            module.train()
            module(*inputs)
            optimizer.step()
            return [np.array(state.parameters[name].data).reshape(shape_of(model, name)) for name in names]

    return run


def shape_of(model: Any, name: str) -> list[int]:
    return next(list(t.dims) for t in model.graph.initializer if t.name == name)


LOADERS = {
    f.__name__: f
    for f in (
        jax_export,
        jax_gradient,
        torch_export,
        torch_export_gradient,
        aot_inductor,
        torch_trace,
        torch_trace_gradient,
        executorch,
        litert,
        openvino,
        onnxruntime,
        onnxruntime_update,
        onnxruntime_training_step,
    )
}


def main() -> None:
    """Answer every job. portnorm cannot be imported, and whatever a runtime prints goes elsewhere."""
    sys.modules.update(dict.fromkeys(("portnorm", "portnorm_backends", "portnorm_onnx")))  # type: ignore[misc]
    with os.fdopen(os.dup(1), "w") as channel:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        loaded: tuple[Any, Any] = (None, None)
        for line in sys.stdin:
            loader, artifact, inputs, outputs = json.loads(line)
            said = None
            try:
                if loaded[0] != (loader, artifact):
                    loaded = (loader, artifact), LOADERS[loader](artifact)
                with np.load(inputs) as given:
                    found = _arrays(loaded[1]([given[str(k)] for k in range(len(given.files))]))
                np.savez(outputs, **{str(k): a for k, a in enumerate(found)})
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
            channel.write(json.dumps(said) + "\n")
            channel.flush()


if __name__ == "__main__":
    main()
