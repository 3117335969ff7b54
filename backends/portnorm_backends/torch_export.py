"""A torch model as one ONNX graph, in which every layer of portnorm is its own graph: one `Scan` for each direction of each layer.

While `torch.export` runs the model, a `TorchModule` does not compute: it leaves one node of the domain `portnorm` behind, with the shapes
that the layer's own graph has. torch translates all the rest, and then the layers' graphs take the places of these nodes.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from portnorm.errors import ExportError, UnsupportedError
from portnorm.layers.quantized import quantized
from portnorm.quantization import QuantizeName, checked_quantize
from portnorm.scalars import switch, switches
from portnorm_backends.torch_calls import DOMAIN, Given, Recorder, free_axes, given_of, is_floating, tensors_of, translated
from portnorm_backends.torch_cases import Cases
from portnorm_backends.torch_gate import Case, Eager, compared
from portnorm_backends.torch_module import TorchModule
from portnorm_backends.torch_stream import Stream
from portnorm_onnx.bfloat16 import holds_bfloat16
from portnorm_onnx.build import Names, copy_shared, keep_apart, keep_transposed, put_inside
from portnorm_onnx.export import TYPES, Shape, check_place, checked_opset
from portnorm_onnx.metadata import layers_described
from portnorm_onnx.report import Change, Outcome, Report
from portnorm_onnx.runtimes import runtime_of, session_of
from portnorm_onnx.splice import spliced, without_traces
from portnorm_onnx.storage import Draft, is_large
from portnorm_onnx.targets import Target, TargetName, check_dtype, checker, target_of

_OPSET_OF_BFLOAT16 = 22
"""The first in which ONNX's convolutions, poolings and recurrent operators take it."""


def export_torch(
    model: torch.nn.Module,
    args: Any,
    path: str | os.PathLike[str] | None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    opset: int | None = None,
    target: TargetName = "portable",
    fold: bool = True,
    accurate: bool = False,
    dtype: str | torch.dtype | None = None,
    streaming: bool = False,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    inputs: Iterable[Any] | None = None,
    external_data: bool | None = None,
    metadata: bool = True,
    quantize: QuantizeName | None = None,
) -> Report:
    """Write a whole torch model, with layers of portnorm in it, as an ONNX file, after the graph was checked against it in onnxruntime.

    `model` is any module that `torch.export` takes; its layers of portnorm are `portnorm.torch_module(...)` (see
    `portnorm.replace_modules`), called any number of times, with or without `state` and `lengths`. They become what `portnorm.export`
    makes of them, by the same `target`, `opset`, `fold` and `accurate`: one `Scan` for each direction, weights under the module's path
    (`encoder.rnn.weight_hh_l0`). The rest is torch's own translation, to which `target` gives the opset only. The model is exported in
    evaluation mode and left in the mode that it had.

    `dtype` converts a copy of the model, and the floating inputs that are given, first: float16, bfloat16, float32 or float64. The graph is
    held against that copy.

    `quantize="int8"` does to each layer of portnorm in a copy of the model what `portnorm.quantized` does; torch's own modules stay as they
    are. The graph is held against that copy, and `report.change` says how far its results are from those of the model.

    `streaming=True` is for sequences that come in pieces, of one step or of several as `args` has them: each recurrent layer that the model
    calls without a state takes it as an input, `encoder.rnn.h_0`, and gives the next, `encoder.rnn.h_n`. At first it is that of
    `layer.initial_state(batch)`, zeros unless one was learned.

    `args` is the tuple of example inputs, or the only one, and `kwargs` has those that the model is given by name; the graph has its inputs
    in the order of the model's signature. `dynamic_shapes` says in the form of `torch.onnx.export` which lengths are free, for example
    `{"x": {0: "time", 1: "batch"}}`; axes of one name have one length. `input_names` and `output_names` are those of the graph.

    Every layer's graph passes the two gates of `portnorm.verify`; the whole graph passes onnx's checker and strict shape inference, and in
    onnxruntime it is compared with the torch model on the example and with every free length at 1 and at two others, or on `inputs`, each a
    tuple like `args`, or with `kwargs` a pair `(args, kwargs)`. Where those are not given, numbers are drawn from the example's, integers
    (batch,) that become a layer's `lengths` follow the time axis, and what the model itself refuses is left out. A model that decides by a
    free length (`if x.shape[0] > 20`, `y[:10]`) is tried where it decides otherwise than on the example, and refused where the graph is
    wrong there; `torch.export.Dim("time", min=2, max=9)` in `dynamic_shapes` says that no other lengths come. The graph's distance to a
    float64 run of the model may be a small multiple of torch's own. Only then the file appears; an existing one is replaced whole. Returns
    a `Report`; `path=None` writes nothing, and the model is `report.model`. `portnorm.load(path, prefix="encoder.rnn")` reads a layer back;
    `metadata=False` leaves out what the file says of that. Raises `ExportError`, `ConformanceError`, `UnsupportedError`.

    A model that computes in bfloat16, all of it or a part, needs `target="openvino"` or `"tensorrt"`. onnxruntime's CPU has hardly an
    operator in bfloat16, so the graph runs there in float32 twice: with every result rounded to bfloat16, within the tolerances of that
    type, and without rounding, no further from float64 than torch's own run. A model with arrays in bfloat16 has opset 22 unless stated,
    the first whose convolutions take it. torch's `BatchNorm` right behind a convolution or `Linear` is an `ExportError`: onnxscript folds
    it into float32 weights.

    >>> import portnorm as pn
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), pn.torch_module(pn.LayerNorm(4)))
    >>> report = pn.export_torch(model, torch.ones(2, 3), None, dynamic_shapes=({0: "batch"},))
    >>> [n.op_type for n in report.model.graph.node]
    ['Gemm', 'LayerNormalization']
    """
    if not isinstance(model, torch.nn.Module):
        raise UnsupportedError(f"`model` is a {type(model).__name__}; expected a torch.nn.Module")
    fold, accurate, streaming, metadata = switches(fold=fold, accurate=accurate, streaming=streaming, metadata=metadata)
    external_data = None if external_data is None else switch("external_data", external_data)
    row = target_of(target)
    if row.further:
        raise UnsupportedError(
            f"`target` {target!r} is for layers of portnorm: the rest of this model is torch's own translation, which does not avoid what "
            "that runtime computes wrongly; export with target='portable', and compare there"
        )
    kind = None if dtype is None else _dtype_named(dtype, row)
    model = model if kind is None and quantize is None else copy.deepcopy(model)
    model = model if kind is None else model.to(kind)
    exact = model
    if quantize is not None:
        exact = copy.deepcopy(model).eval()
        _quantize(model, quantize)
    # torch takes one tensor in two places for one input.
    example = pytree.tree_map(lambda a: a.clone() if isinstance(a, torch.Tensor) else a, _converted(given_of(model, args, kwargs), kind))
    if opset is None and any(a.dtype == torch.bfloat16 for a in (*model.state_dict().values(), *tensors_of(example))):
        opset = max(row.opset, _OPSET_OF_BFLOAT16)
    version = checked_opset(opset, row)
    check_place(path)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        whole = model
        if streaming:
            model, exact = Stream(whole, *example), Stream(exact, *example)
            input_names, output_names = model.input_names(*example, input_names), model.output_names(output_names)
            dynamic_shapes = model.shapes(*example, dynamic_shapes)
            example = _piece(model, example)
        eager = Eager(model)
        eager(example)
        shape = Shape(version, row, "", fold and not accurate, accurate, False, False, None, Names(), metadata=False)
        recorder = Recorder(whole, shape)
        started = time.perf_counter()
        program, proto = translated(model, example, dynamic_shapes, recorder, version, input_names, output_names)
        parts = {call.name: call.inserted(recorder) for call in recorder.calls}
        proto = spliced(proto, DOMAIN, parts)
        without_traces(proto)
        keep_transposed(proto)
        keep_apart(proto.graph)
        copy_shared(proto.graph)
        put_inside(proto)
        if metadata:
            layers = {call.path: (call.layer, call.shape.dtype) for call in recorder.calls}
            layers_described(proto, {f"{path}." if path else "": layer for path, layer in layers.items()})
        seconds = time.perf_counter() - started
        external = is_large(proto) if external_data is None else external_data
        narrow = holds_bfloat16(proto)
        if narrow:
            check_dtype(row, "bfloat16", ", in which the model computes")
        with Draft(proto, path, external) as draft:
            draft.check_form()
            report = Report.of(draft.proto, draft.path)
            report.seconds = seconds
            for call in recorder.calls:
                steps, trajectories = call.checked()
                report.steps += steps
                report.trajectories += trajectories
            runtime = checker(proto, "bfloat16") if narrow and "bfloat16" not in row.only else "onnxruntime"
            made = Cases(program, proto, example, recorder.calls, free_axes(model, example, dynamic_shapes))
            if inputs is None:
                cases, refused = made.random(eager)
            else:
                pairs = (item if kwargs is not None else (item, None) for item in inputs)
                each = [_converted(given_of(whole, *pair), kind) for pair in pairs]
                each = [_piece(Stream(whole, *given), given) for given in each] if streaming else each
                cases, refused = [made.given(given) for given in each], []
            if not cases:
                raise UnsupportedError("`inputs` is empty; expected at least one, or nothing would be checked")
            beyond = made.beyond(eager, cases)
            for name in (runtime, "unrounded") if narrow else (runtime,):
                session = session_of(name, draft.loadable(), draft.proto)
                for position, case in enumerate((*cases, *beyond)):
                    try:
                        found = compared(eager, session, name, [case])
                        report.trajectories += found if position < len(cases) else []
                    except Exception as error:  # of the runtime too, which may refuse these shapes
                        if not case.beyond:
                            raise
                        raise ExportError(made.refusal(case, error)) from error
                detail = f"not compared at {', '.join(refused)}, which the model refuses" if refused else runtime_of(name).note
                report.outcomes.append(Outcome(name, runtime_of(name).version(), "passed", detail))
            report.change = None if quantize is None else Change.of(_pairs(Eager(exact), eager, cases))
            draft.publish()
            report.left = draft.left
        return report
    finally:
        for module, mode in modes.items():
            module.training = mode


def _quantize(model: torch.nn.Module, quantize: QuantizeName) -> None:
    """Let every layer of portnorm in the model compute its products with integers. Raises `UnsupportedError` where none has any."""
    modules = [module for module in model.modules() if isinstance(module, TorchModule)]
    parts = [part for module in modules for part in module._layer.layers() if "quantize" in part._settings]
    if not parts:
        checked_quantize(quantize)
        raise UnsupportedError(
            f"`quantize` is {quantize!r}, but {type(model).__name__} has no layer of portnorm with weights to quantize; "
            "portnorm.replace_modules makes torch's and your own ones layers of portnorm"
        )
    for module in modules:
        if any("quantize" in part._settings for part in module._layer.layers()):
            quantized(module.to_layer(), quantize)  # which looks at the weights
    for part in parts:
        part.quantize = quantize


def _pairs(before: Eager, after: Eager, cases: Sequence[Case]) -> Iterator[tuple[Any, Any]]:
    """The first result of both at every case."""
    for case in cases:
        yield before(case.args)[0], after(case.args)[0]


def _piece(stream: Stream, given: Given) -> Given:
    """A call of `stream` with what its model is given, at the beginning."""
    return Given((given.args, given.kwargs, stream.first), {})


def _dtype_named(dtype: str | torch.dtype, row: Target) -> torch.dtype:
    """A type of torch's; raises `UnsupportedError` where the target does not compute in it."""
    name = str(dtype).removeprefix("torch.")
    if name not in TYPES:
        raise UnsupportedError(f"`dtype` is {dtype!r}; expected one of {', '.join(TYPES)}")
    check_dtype(row, name)
    return getattr(torch, name)


def _converted(given: Given, kind: torch.dtype | None) -> Given:
    converted: Given = pytree.tree_map(lambda a: a.to(kind) if kind is not None and is_floating(a) else a, given)
    return converted
