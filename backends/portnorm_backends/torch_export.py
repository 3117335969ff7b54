"""A torch model as one ONNX graph, in which every layer of portnorm is its own graph: one `Scan` for each direction of each layer.

While `torch.export` runs the model, a `TorchModule` does not compute: it leaves one node of the domain `portnorm` behind, with the shapes
that the layer's own graph has. torch translates all the rest, and then the layers' graphs take the places of these nodes.
"""

from __future__ import annotations

import copy
import inspect
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy
import onnx
import torch
from onnx import helper
from onnx.inliner import inline_local_functions
from torch.utils import _pytree as pytree

from portnorm.arrays import dtype_name, leaves, mapped, to_numpy
from portnorm.errors import ConformanceError, DTypeError, ExportError, PortnormError, UnsupportedError
from portnorm.layers.layer import Layer, checked_call
from portnorm.layers.quantized import quantized, with_rounded_weights
from portnorm.quantization import QuantizeName, checked_quantize
from portnorm_backends.torch_limits import LONGEST, Limit, by_symbol, declared, lengths_beyond, limits_of, refusal
from portnorm_backends.torch_module import TorchModule
from portnorm_backends.torch_refusals import explained
from portnorm_backends.torch_stream import Stream
from portnorm_onnx.bfloat16 import holds_bfloat16
from portnorm_onnx.build import Names, keep_transposed
from portnorm_onnx.export import TYPES, Shape, checked_opset, checked_path, trace
from portnorm_onnx.metadata import layers_described
from portnorm_onnx.report import Change, Comparison, Outcome, Report
from portnorm_onnx.runtimes import runtime_of, session_of
from portnorm_onnx.signature import state_names
from portnorm_onnx.splice import Inserted, spliced, without_traces
from portnorm_onnx.storage import Draft, is_large
from portnorm_onnx.targets import Target, TargetName, check_dtype, check_integers, checker, target_of
from portnorm_onnx.verify import EPS, FACTOR, FLOOR, ROUNDINGS, check, nudged, of_turned_rounding
from portnorm_onnx.workers import Session

Arrays = list["numpy.ndarray[Any, Any]"]
DOMAIN = "portnorm"
"""That of the nodes that stand for layers."""
_OPSET_OF_BFLOAT16 = 22
"""The first in which ONNX's convolutions, poolings and recurrent operators take it."""
_LEAST = 2
"""The smallest length that torch assumes of an axis that is free; what it makes of it holds for 1 too, or a check says so."""


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
    row = target_of(target)
    kind = None if dtype is None else _dtype_named(dtype, row)
    model = model if kind is None and quantize is None else copy.deepcopy(model)
    model = model if kind is None else model.to(kind)
    exact = model
    if quantize is not None:
        exact = copy.deepcopy(model).eval()
        _quantize(model, quantize)
    # torch takes one tensor in two places for one input.
    example = pytree.tree_map(lambda a: a.clone() if isinstance(a, torch.Tensor) else a, _converted(_given(model, args, kwargs), kind))
    if opset is None and any(a.dtype == torch.bfloat16 for a in (*model.state_dict().values(), *_tensors(example))):
        opset = max(row.opset, _OPSET_OF_BFLOAT16)
    version = checked_opset(opset, row)
    checked_path(path)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        whole = model
        if streaming:
            model, exact = Stream(whole, *example), Stream(exact, *example)
            input_names, output_names = model.input_names(*example, input_names), model.output_names(output_names)
            dynamic_shapes = model.shapes(*example, dynamic_shapes)
            example = _piece(model, example)
        eager = _Eager(model)
        eager(example)
        shape = Shape(version, row, "", fold and not accurate, accurate, False, False, None, Names(), metadata=False)
        recorder = _Recorder(whole, shape)
        started = time.perf_counter()
        program, proto = _translated(model, example, dynamic_shapes, recorder, version, input_names, output_names)
        parts = {call.name: call.inserted(recorder) for call in recorder.calls}
        proto = spliced(proto, DOMAIN, parts, inside=external_data is not True)
        without_traces(proto)
        keep_transposed(proto)
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
            made = _Cases(program, proto, example, recorder.calls, _free_axes(model, example, dynamic_shapes))
            if inputs is None:
                cases, refused = made.random(eager)
            else:
                pairs = (item if kwargs is not None else (item, None) for item in inputs)
                each = [_converted(_given(whole, *pair), kind) for pair in pairs]
                each = [_piece(Stream(whole, *given), given) for given in each] if streaming else each
                cases, refused = [made.given(given) for given in each], []
            if not cases:
                raise UnsupportedError("`inputs` is empty; expected at least one, or nothing would be checked")
            beyond = made.beyond(eager, cases)
            for name in (runtime, "unrounded") if narrow else (runtime,):
                session = session_of(name, draft.loadable())
                for position, case in enumerate((*cases, *beyond)):
                    try:
                        found = _compared(eager, session, name, [case])
                        report.trajectories += found if position < len(cases) else []
                    except Exception as error:  # of the runtime too, which may refuse these shapes
                        if not case.beyond:
                            raise
                        raise ExportError(made.refusal(case, error)) from error
                detail = f"not compared at {', '.join(refused)}, which the model refuses" if refused else runtime_of(name).note
                report.outcomes.append(Outcome(name, runtime_of(name).version(), "passed", detail))
            report.change = None if quantize is None else Change.of(_pairs(_Eager(exact), eager, cases))
            draft.publish()
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


def _pairs(before: _Eager, after: _Eager, cases: Sequence[_Case]) -> Iterator[tuple[Any, Any]]:
    """The first result of both at every case."""
    for case in cases:
        yield before(case.args)[0], after(case.args)[0]


class Given(NamedTuple):
    """What a model is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _given(model: torch.nn.Module, args: Any, kwargs: Mapping[str, Any] | None) -> Given:
    """A call of the model, its keywords in the order of its signature, as the graph has them."""
    args, kwargs = args if isinstance(args, tuple) else (args,), kwargs or {}
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UnsupportedError(f"`args` and `kwargs` do not fit the model: {error}; its inputs are {signature}") from None
    known = [name for name in signature.parameters if name in kwargs]
    return Given(args, {name: kwargs[name] for name in (*known, *(name for name in kwargs if name not in known))})


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
    converted: Given = pytree.tree_map(lambda a: a.to(kind) if kind is not None and _is_floating(a) else a, given)
    return converted


def _free_axes(model: torch.nn.Module, example: Given, dynamic_shapes: Any) -> tuple[Any, ...] | None:
    """What `dynamic_shapes` says of each tensor, in the order of the graph's inputs: torch counts numbers and `None` among these.

    Raises `UnsupportedError` for an axis that a tensor does not have; where it does not fit the inputs torch says so.
    """
    if dynamic_shapes is None:
        return None
    bound = inspect.signature(model.forward).bind(*example.args, **example.kwargs).arguments

    def of(value: Any, said: Any, path: str = "") -> Iterator[Any]:
        if isinstance(value, torch.Tensor):
            for axis in said if isinstance(said, dict) else ():
                if axis not in range(value.ndim):
                    raise UnsupportedError(
                        f"`dynamic_shapes` has axis {axis!r} of `{path}`, whose shape is {tuple(value.shape)}; expected one of "
                        f"{', '.join(map(str, range(value.ndim)))}"
                    )
            yield said
        elif isinstance(value, tuple | list | dict):
            for k, (name, item) in enumerate(value.items() if isinstance(value, dict) else enumerate(value)):
                there = said.get(name) if isinstance(said, dict) else said[k] if isinstance(said, tuple | list) and k < len(said) else None
                yield from of(item, there, f"{path}.{name}" if path else str(name))

    named = pytree.tree_map(lambda d: None if d is torch.export.Dim.AUTO else d, dynamic_shapes)
    return tuple(of(dict(bound), named))


# -- from torch to a graph with nodes for the layers -----------------------------------------------------------------------------------


@dataclass
class _Call:
    """One call of a layer while the model was traced."""

    name: str
    """The operator type of its node."""
    path: str
    layer: Layer
    shape: Shape
    alone: bool = True
    wanted: tuple[str, ...] = ("y",)
    """The outputs that the model reads."""

    @property
    def inputs(self) -> tuple[str, ...]:
        states = [f"{name}_0" for name in state_names(self.layer)] if self.shape.state else []
        counted = ("lengths",) if self.shape.lengths else ("mask",) if self.shape.mask else ()
        return ("x", *counted, *states)

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("y", *(f"{name}_n" for name in state_names(self.layer)))

    def graph(self, names: Names, outputs: tuple[str, ...]) -> onnx.ModelProto:
        """The layer's graph with these outputs."""
        return trace(self.layer, self.shape._replace(names=names, gives=outputs))

    def inserted(self, recorder: _Recorder) -> Inserted:
        """What replaces the node."""
        self.alone = sum(call.path == self.path for call in recorder.calls) == 1

        def graph(names: Names, outputs: tuple[str, ...]) -> onnx.ModelProto:
            self.wanted = outputs
            return self.graph(names, outputs)

        return Inserted(self.inputs, self.outputs, f"{self.path}." if self.path else "", self.alone, graph)

    def checked(self) -> tuple[list[Comparison], list[Comparison]]:
        """The two gates of `portnorm.verify` for the layer alone, under its path: steps, and trajectories of a layer without steps."""
        proto = self.graph(Names(), tuple(name for name in self.outputs if name == "y" or name in self.wanted))
        try:
            with Draft(proto) as draft:
                report = check(draft, self.layer, runtimes=(checker(proto, self.shape.dtype),))
        except ConformanceError as error:
            raise ConformanceError(f"layer {self.path or type(self.layer).__name__}: {error}") from error
        title = self.path or "layer"
        steps, trajectories = ([replace(c, case=f"{title}: {c.case}") for c in found] for found in (report.steps, report.trajectories))
        return steps, [] if steps else trajectories


@dataclass
class _Recorder:
    """Takes the calls of the layers while the model is traced, and leaves a node for each."""

    model: torch.nn.Module
    shape: Shape
    calls: list[_Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        # The arrays are read now: while the model is traced they have no values, and a module at two places is two with one layer.
        self._layers: dict[int, tuple[str, str, Layer]] = {}
        for path, module in self.model.named_modules():
            if isinstance(module, TorchModule):
                layer = module.to_layer()
                kind = dtype_name(layer.xp, layer.dtype)
                check_dtype(self.shape.target, kind, f", the dtype of layer {path!r}")
                # NumPy has no bfloat16: the same numbers in float32.
                layer = layer.to(xp="numpy", dtype="float32" if kind == "bfloat16" else kind)
                if layer.quantizes is not None:
                    check_integers(self.shape.target, kind, layer.quantizes)
                    layer = with_rounded_weights(layer)
                self._layers[id(module._layer)] = path, kind, layer

    def __call__(self, module: TorchModule, x: Any, state: Any, lengths: Any, mask: Any) -> Any:
        path, kind, layer = self._layers[id(module._layer)]
        dtype = getattr(torch, kind)
        if torch.is_autocast_enabled(x.device.type):
            x, state = mapped(lambda a: a.to(dtype) if a.is_floating_point() else a, (x, state))
        checked_call(module.to_layer(), {}, dtype if any(True for _ in module.parameters()) else None, x, state, None, mask)
        if lengths is not None and not layer.recurrent:
            raise UnsupportedError(f"layer {path!r} is called with `lengths`, which is exported for recurrent layers only")
        if layer.takes_integers:
            x = x.to(torch.int64)
        counted = [] if lengths is None else [torch.as_tensor(lengths, device=x.device).to(torch.int64)]
        if mask is not None:
            away = [axis for axis in layer.feature_axes(x.ndim) if mask.ndim == x.ndim]
            shape_of_mask = [n for axis, n in enumerate(x.shape) if axis not in layer.feature_axes(x.ndim)]
            mask = mask.squeeze(away) if away else mask
            counted = [mask if tuple(mask.shape) == tuple(shape_of_mask) else mask.expand(shape_of_mask)]
        own = layer.input_dims() if layer.recurrent else tuple(f"d{k}" for k in range(x.ndim))
        free = [isinstance(d, str) and (layer.recurrent or not isinstance(n, int)) for d, n in zip(own, x.shape, strict=True)]
        dims = tuple(d if is_free else int(n) for d, n, is_free in zip(own, x.shape, free, strict=True))
        shape = self.shape._replace(
            dtype=kind, lengths=lengths is not None, mask=mask is not None, state=state is not None, input_shape=dims
        )
        call = _Call(f"call_{len(self.calls)}", path, layer, shape)
        self.calls.append(call)
        lengths_of = dict(zip(own, x.shape, strict=True))
        types = [o.type.tensor_type for o in call.graph(Names(), call.outputs).graph.output]
        shapes = [[d.dim_value if d.HasField("dim_value") else lengths_of[d.dim_param] for d in t.shape.dim] for t in types]
        results = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{call.name}", [x, *counted, *leaves(state)], dtypes=[t.elem_type for t in types], shapes=shapes, version=1
        )
        if not layer.recurrent:
            return results[0]
        rest = iter(results[1:])
        return results[0], mapped(lambda _: next(rest), layer.initial_state(1))


def _translated(
    model: torch.nn.Module,
    example: Given,
    dynamic_shapes: Any,
    recorder: _Recorder,
    version: int,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> tuple[torch.export.ExportedProgram, onnx.ModelProto]:
    """torch's translation of the model."""
    hints = pytree.tree_map(lambda d: torch.export.Dim.DYNAMIC if isinstance(d, str) else d, dynamic_shapes)
    inside = [module for module in model.modules() if isinstance(module, TorchModule)]
    for module in inside:
        module.recorder = recorder
    with warnings.catch_warnings():
        # What torch's exporter says of its own code and modules, and of two axes that were given one name.
        warnings.filterwarnings("ignore", message=r".*LeafSpec", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r"# The axis name", category=UserWarning)
        warnings.filterwarnings("ignore", message=r"The tensor attributes? .*_flat_weights", category=UserWarning)
        try:
            free = _free_axes(model, example, dynamic_shapes)
            program = torch.export.export(model, example.args, example.kwargs, dynamic_shapes=hints, strict=False)
            made = torch.onnx.export(
                program,
                dynamo=True,
                dynamic_shapes=free,
                opset_version=version,
                input_names=input_names,
                output_names=output_names,
                verbose=False,
            )
            assert made is not None
            proto: onnx.ModelProto = made.model_proto
        except PortnormError:
            raise
        except Exception as error:
            raise ExportError(explained(error, model)) from error
        finally:
            for module in inside:
                del module.recorder
    if proto.functions:
        proto = inline_local_functions(proto)
    found = next(o.version for o in proto.opset_import if o.domain == "")
    if found != version:
        raise ExportError(f"torch translates the model at opset {found}, not {version}; ask for `opset={found}`")
    return program, proto


# -- is it the same? -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    """Inputs of the model, and the same by the names of the graph."""

    title: str
    args: Given
    feed: dict[str, Any]
    steps: int
    beyond: tuple[Limit, ...] = ()
    """What torch assumed while it traced the model and does not hold here."""


class _Eager:
    """The torch model on its inputs: as it is, in float64, and with numbers that are moved by a rounding."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self._double: torch.nn.Module | None = copy.deepcopy(model).double()

    def __call__(self, args: Given) -> Arrays:
        return _outputs(self.model, args)

    def exact(self, args: Given) -> Arrays | None:
        """In float64; `None` for a model that makes numbers of another type by itself, which torch then refuses to mix."""
        if self._double is not None:
            wide = pytree.tree_map(lambda a: a.double() if _is_floating(a) else a, args)
            try:
                return _outputs(self._double, wide)
            except (RuntimeError, DTypeError) as error:
                if "type" not in str(error):
                    raise
                self._double = None
        return None

    def rounded(self, args: Given, seed: int) -> Arrays:
        """With every parameter and input moved by at most one unit in the last place."""
        moved = {n: _nudged(a, seed) for n, a in (*self.model.named_parameters(), *self.model.named_buffers())}
        given = pytree.tree_map(lambda a: _nudged(a, seed) if _is_floating(a) else a, args)
        return _outputs(lambda *a, **k: torch.func.functional_call(self.model, moved, a, k), given)

    def turned(self, args: Given) -> list[Arrays]:
        """Of a model with products of integers, the runs in which numbers near the middle of two are rounded to the other one."""
        if not any(isinstance(m, TorchModule) and m._layer.quantizes is not None for m in self.model.modules()):
            return []
        return of_turned_rounding(self, args)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [a for a in pytree.tree_leaves(tree) if isinstance(a, torch.Tensor)]


def _is_floating(a: Any) -> bool:
    return isinstance(a, torch.Tensor) and a.is_floating_point()


def _nudged(a: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.as_tensor(nudged(to_numpy(a), seed, _dtype_of(a)), device=a.device, dtype=a.dtype)


def _dtype_of(a: torch.Tensor) -> str:
    return str(a.dtype).removeprefix("torch.")


def _outputs(model: Callable[..., Any], given: Given) -> Arrays:
    """The tensors that come out, in order, each of its own type: NumPy has bfloat16 from ml_dtypes."""
    with torch.no_grad():
        return [to_numpy(a).astype(_dtype_of(a), copy=False) for a in _tensors(model(*given.args, **given.kwargs))]


class _Gate(NamedTuple):
    """How far a run of the graph may be from the float64 run of the model: `factor` times torch's own distance, and a floor."""

    factor: float
    floor: Mapping[str, float]
    """By the type of an output, relative to its largest value."""
    least: float
    """That value is taken to be so large at least."""


_GATE = _Gate(FACTOR, FLOOR, 1.0)
_GATES = {
    # Where nothing is computed in bfloat16 only constants of the graph are rounded to it. So it is no further from float64 than torch's own
    # run, which rounds every result, and half a unit in the last place where that is exact by luck; 0.56 of this is the most in 180 cases.
    # The gate above allows results in bfloat16 of size 1 an error of 0.05 to 0.3, which would hide a small part of a model.
    "unrounded": _Gate(1.0, dict.fromkeys(FLOOR, EPS["bfloat16"] / 2), 0.0)
}
"""Those of stand-ins for a runtime."""


def _compared(eager: _Eager, session: Session, runtime: str, cases: Sequence[_Case]) -> list[Comparison]:
    """The graph's distance to the float64 run against torch's own distance to it, at every case."""
    found, gate = [], _GATES.get(runtime, _GATE)
    for case in cases:
        results, mine = session(case.feed), eager(case.args)
        if len(results) != len(mine):
            raise ExportError(f"the model has {len(mine)} outputs but the graph {len(results)}: {', '.join(results)}")
        exact = eager.exact(case.args)
        others = [] if exact is not None else [eager.rounded(case.args, seed) for seed in range(ROUNDINGS)]
        comparisons = []
        for k, ((name, result), own) in enumerate(zip(results.items(), mine, strict=True)):
            truth = own if exact is None else exact[k]
            if result.shape != own.shape:
                raise ConformanceError(f"{runtime}: {name!r} has shape {result.shape} but {own.shape} in torch, at {case.title}")
            floor = gate.floor[own.dtype.name] * max(gate.least, _largest(truth)) if own.dtype.name in gate.floor else 0.0
            spread = max(_distance(a, truth) for a in (own, *(other[k] for other in others)))
            difference = _distance(result, truth)
            if difference > gate.factor * spread + floor and not others:
                # How far torch itself is from float64 is a matter of luck where rounding is amplified.
                others = [eager.rounded(case.args, seed) for seed in range(ROUNDINGS)] + eager.turned(case.args)
                spread = max(spread, *(_distance(other[k], truth) for other in others))
            allowed = gate.factor * spread + floor
            comparisons.append(Comparison(runtime, name, case.title, case.steps, difference, allowed, spread))
            if not difference <= allowed:
                wrong = numpy.argwhere(~(numpy.abs(_wide(result) - _wide(truth)) <= allowed))
                where = f"; first at index {tuple(int(i) for i in wrong[0])}" if len(wrong) else ""
                raise ConformanceError(
                    f"{runtime}: output {name!r} is {difference:.3g} from the torch model at {case.title}; torch's own rounding is "
                    f"{spread:.3g}, so at most {allowed:.3g} is allowed{where}"
                )
        found.append(max(comparisons, key=lambda c: c.difference / c.allowed if c.allowed else 0.0))
    return found


def _wide(a: Any) -> Any:
    return a.astype(numpy.float64)


def _largest(a: Any) -> float:
    """The largest finite value."""
    return float(numpy.max(numpy.abs(_wide(a)), initial=0.0, where=numpy.isfinite(_wide(a))))


def _distance(a: Any, b: Any) -> float:
    """Largest absolute difference; NaN against NaN, and infinity against the same, is none."""
    a, b = _wide(a), _wide(b)
    same = (numpy.isnan(a) & numpy.isnan(b)) | (a == b)
    with numpy.errstate(invalid="ignore"):
        return float(numpy.max(numpy.where(same, 0.0, numpy.abs(a - b)), initial=0.0))


def _refused(eager: _Eager, case: _Case) -> Exception | None:
    """What the model itself raises."""
    try:
        eager(case.args)
    except Exception as error:  # whatever somebody else's model raises
        return error
    return None


_LENGTHS: tuple[Callable[[int], int], ...] = (lambda k: 1, lambda k: 3 + 2 * k, lambda k: 24 - 5 * (k % 4))
"""For every case beside the example the free lengths, in their order."""


class _Cases:
    """Inputs of several lengths, made of the example."""

    def __init__(
        self,
        program: torch.export.ExportedProgram,
        proto: onnx.ModelProto,
        example: Given,
        calls: Sequence[_Call],
        said: Sequence[Any] | None = None,
    ):
        self.example = example
        self.names = [i.name for i in proto.graph.input]
        tensors = _tensors(example)
        if len(tensors) != len(self.names):
            raise ExportError(f"the graph has the inputs {', '.join(self.names)}, but `args` and `kwargs` have {len(tensors)} tensors")
        self.tensors = tensors
        self.types = [helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type) for i in proto.graph.input]
        self.dims = [[d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in proto.graph.input]
        nodes = {n.name: n for n in program.graph.nodes}
        given = [nodes[name] for name in program.graph_signature.user_inputs if name in nodes]
        held = [n for n in given if isinstance(n.meta.get("val"), torch.Tensor)]
        self.measured = {d: n for dims, a in zip(self.dims, tensors, strict=True) for d, n in zip(dims, a.shape, strict=True)}
        self.symbols, self.derived = self._named(held)
        self.allowed = declared([None] * len(tensors) if said is None else said, self.dims)
        self.limits = limits_of(program, self.symbols, _LEAST)
        self.bounds = self._bounds(program)
        self.counts = self._counts(program, held, calls)

    def _named(self, held: Sequence[Any]) -> tuple[dict[Any, str], dict[str, Any]]:
        """Names of torch's symbols, and lengths that are expressions of these by the names that they have in the graph."""
        symbols, derived = {}, {}
        for node, dims in zip(held, self.dims, strict=True):
            for d, n in zip(dims, node.meta["val"].shape, strict=True):
                if isinstance(d, str) and isinstance(n, torch.SymInt):
                    if n.node.expr.is_symbol:
                        symbols[n.node.expr] = d
                    else:
                        derived[d] = n.node.expr
        return symbols, derived

    def _bounds(self, program: torch.export.ExportedProgram) -> dict[str, tuple[int, int]]:
        """The smallest and largest length that each name may have."""
        found: dict[str, tuple[int, int]] = {}
        for symbol, name in self.symbols.items():
            limits = program.range_constraints.get(symbol)
            low, high = found.get(name, self.allowed[name])
            if limits is not None:
                low = max(low, int(limits.lower) if limits.lower > _LEAST else 1)
                high = min(high, int(limits.upper)) if limits.upper.is_number and limits.upper < high else high
            found[name] = (low, high)
        return found

    def _counts(self, program: torch.export.ExportedProgram, held: Sequence[Any], calls: Sequence[_Call]) -> dict[str, str]:
        """Integer inputs (batch,) that reach the `lengths` of a layer, and the name of the length that they count."""
        symbols, by_node = self.symbols, dict(zip(held, self.names, strict=True))
        found: dict[str, str] = {}
        for node in program.graph.nodes:
            call = next((c for c in calls if c.name in node.args), None) if "symbolic" in str(node.target) else None
            if call is None or not call.shape.lengths:
                continue
            x, counted = node.args[0][:2]
            steps = x.meta["val"].shape[1 if call.layer.batch_first else 0]
            names = [symbols[s] for s in steps.node.expr.free_symbols if s in symbols] if isinstance(steps, torch.SymInt) else []
            waiting, seen = [counted], set()
            while waiting:
                n = waiting.pop()
                if n not in seen:
                    seen.add(n)
                    waiting.extend(n.all_input_nodes)
            for n in seen & by_node.keys():
                value = n.meta["val"]
                if value.ndim == 1 and not value.is_floating_point() and names:
                    found[by_node[n]] = names[0]
        return found

    def given(self, args: Given) -> _Case:
        """A case of these inputs."""
        tensors = _tensors(args)
        if len(tensors) != len(self.names):
            raise UnsupportedError(f"`inputs` has {len(tensors)} tensors; expected {len(self.names)}: {', '.join(self.names)}")
        shapes = " ".join(f"{name} {tuple(a.shape)}" for name, a in zip(self.names, tensors, strict=True))
        feed = {name: to_numpy(a).astype(kind, copy=False) for name, a, kind in zip(self.names, tensors, self.types, strict=True)}
        free = {d: n for dims, a in zip(self.dims, tensors, strict=True) for d, n in zip(dims, a.shape, strict=True) if isinstance(d, str)}
        own = by_symbol(free, self.symbols)
        return _Case(shapes, args, feed, max(free.values(), default=1), tuple(limit for limit in self.limits if not limit.at(own)))

    def random(self, eager: _Eager) -> tuple[list[_Case], list[str]]:
        """The example, and others with every free length at 1 and at two others; and what the model itself refuses of these."""
        cases, refused, reason = [self.given(self.example)], [], None
        for seed, rule in enumerate(_LENGTHS if self.bounds else ()):
            lengths = {name: min(max(rule(k), low), high) for k, (name, (low, high)) in enumerate(self.bounds.items())}
            case = self._at(lengths, seed)
            reason = _refused(eager, case)
            if reason is None:
                cases.append(case)
            else:
                refused.append(case.title)
        if len(refused) == len(_LENGTHS):
            raise ExportError(
                f"the model refuses all inputs that were made of the example, such as {refused[-1]}; give `inputs` to check it on: {reason}"
            ) from reason
        return cases, refused

    def _at(self, lengths: Mapping[str, int], seed: int) -> _Case:
        """The case with these free lengths."""
        own = by_symbol(lengths, self.symbols)
        lengths = {**lengths, **{name: int(expression.subs(own)) for name, expression in self.derived.items()}}
        rng = numpy.random.default_rng(seed)
        drawn = iter([self._drawn(k, lengths, rng) for k in range(len(self.names))])
        flat, spec = pytree.tree_flatten(self.example)
        return self.given(pytree.tree_unflatten([next(drawn) if isinstance(a, torch.Tensor) else a for a in flat], spec))

    def beyond(self, eager: _Eager, cases: Sequence[_Case]) -> list[_Case]:
        """Cases at lengths that are allowed but of which torch assumed that they do not come, without those that the model refuses."""
        free = {name: self.measured[name] for name in self.symbols.values()}
        found = []
        for seed, lengths in enumerate(lengths_beyond(self.limits, self.symbols, self.allowed, free)):
            if max(lengths.values()) > LONGEST:
                case = _Case(
                    "", self.example, {}, 1, tuple(limit for limit in self.limits if not limit.at(by_symbol(lengths, self.symbols)))
                )
                raise ExportError(self.refusal(case, f"more than {LONGEST} is too long to be tried"))
            case = self._at(lengths, seed)
            if all(case.title != other.title for other in cases) and _refused(eager, case) is None:
                found.append(case)
        return found

    def refusal(self, case: _Case, error: Exception | str) -> str:
        """Why the graph is wrong at this case."""
        axes = {
            d: f"axis {k} of `{name}`"
            for name, dims in zip(self.names, self.dims, strict=True)
            for k, d in enumerate(dims)
            if isinstance(d, str)
        }
        saw = error if isinstance(error, str) else f"at {case.title} the graph and the model differ: {error}"
        free = {name: self.measured[name] for name in self.symbols.values()}
        return refusal(case.beyond, self.limits, self.symbols, axes, free, saw)

    def _drawn(self, k: int, lengths: Mapping[str, int], rng: numpy.random.Generator) -> torch.Tensor:
        """Numbers of the example's input `k` in another shape."""
        name, tensor = self.names[k], self.tensors[k]
        values = to_numpy(tensor)
        shape = [lengths[d] if isinstance(d, str) else d for d in self.dims[k]]
        drawn: Any
        if name in self.counts:
            axis = self.counts[name]
            most = max(1, round(int(values.max(initial=1)) * lengths[axis] / self.measured[axis]))
            drawn = rng.integers(1, most + 1, shape)
            drawn[:1] = most
        elif values.dtype.kind == "f" and values.min() == values.max():
            drawn = rng.uniform(-1.0, 1.0, shape)  # of any sign, and as small as a state is
        else:
            drawn = rng.choice(values.ravel(), shape)
        return torch.as_tensor(drawn.astype(values.dtype), device=tensor.device, dtype=tensor.dtype)
