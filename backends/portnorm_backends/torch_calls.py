"""A torch model while it is traced: each layer of portnorm in it leaves one node behind, and says what its graph is."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import onnx
import torch
from onnx.inliner import inline_local_functions
from torch.utils import _pytree as pytree

from portnorm.arrays import leaves, mapped
from portnorm.dtypes import dtype_name
from portnorm.errors import ConformanceError, ExportError, PortnormError, UnsupportedError
from portnorm.layers.arguments import checked_call
from portnorm.layers.layer import Layer
from portnorm.layers.quantized import with_rounded_weights
from portnorm_backends.torch_module import TorchModule
from portnorm_backends.torch_refusals import explained
from portnorm_onnx.build import Names
from portnorm_onnx.export import Shape, trace
from portnorm_onnx.report import Comparison
from portnorm_onnx.signature import state_names
from portnorm_onnx.splice import Inserted
from portnorm_onnx.storage import Draft
from portnorm_onnx.targets import check_dtype, check_integers, checker
from portnorm_onnx.verify import check

DOMAIN = "portnorm"
"""That of the nodes that stand for layers."""


class Given(NamedTuple):
    """What a model is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def given_of(model: torch.nn.Module, args: Any, kwargs: Mapping[str, Any] | None) -> Given:
    """A call of the model, its keywords in the order of its signature, as the graph has them."""
    args, kwargs = args if isinstance(args, tuple) else (args,), kwargs or {}
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UnsupportedError(f"`args` and `kwargs` do not fit the model: {error}; its inputs are {signature}") from None
    known = [name for name in signature.parameters if name in kwargs]
    return Given(args, {name: kwargs[name] for name in (*known, *(name for name in kwargs if name not in known))})


def free_axes(model: torch.nn.Module, example: Given, dynamic_shapes: Any) -> tuple[Any, ...] | None:
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


@dataclass
class Call:
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

    def inserted(self, recorder: Recorder) -> Inserted:
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
class Recorder:
    """Takes the calls of the layers while the model is traced, and leaves a node for each."""

    model: torch.nn.Module
    shape: Shape
    calls: list[Call] = field(default_factory=list)

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
        free = [isinstance(d, str) and (not isinstance(n, int) or n == 0) for d, n in zip(own, x.shape, strict=True)]
        dims = tuple(d if is_free else int(n) for d, n, is_free in zip(own, x.shape, free, strict=True))
        shape = self.shape._replace(
            dtype=kind, lengths=lengths is not None, mask=mask is not None, state=state is not None, input_shape=dims
        )
        call = Call(f"call_{len(self.calls)}", path, layer, shape)
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


def translated(
    model: torch.nn.Module,
    example: Given,
    dynamic_shapes: Any,
    recorder: Recorder,
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
            free = free_axes(model, example, dynamic_shapes)
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


def tensors_of(tree: Any) -> list[torch.Tensor]:
    return [a for a in pytree.tree_leaves(tree) if isinstance(a, torch.Tensor)]


def is_floating(a: Any) -> bool:
    return isinstance(a, torch.Tensor) and a.is_floating_point()
