"""Export: trace the model's own definition on symbolic arrays, check the graph, then write it."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy
import onnx

from portnorm.arrays import DType, library, mapped, to_numpy
from portnorm.dtypes import dtype_name
from portnorm.errors import ExportError, UnsupportedError
from portnorm.files import checked_path
from portnorm.layers.layer import Layer
from portnorm.layers.quantized import quantized, with_rounded_weights
from portnorm.layers.recurrent import recurrent_parts
from portnorm.quantization import QuantizeName
from portnorm.scalars import switch, switches
from portnorm_onnx.as_loop import as_loops
from portnorm_onnx.build import Names, build, keep_apart, put_inside
from portnorm_onnx.inputs import checked_cases, random_inputs
from portnorm_onnx.lowering import OPSETS, opset
from portnorm_onnx.metadata import described, on_numpy, rounded
from portnorm_onnx.namespace import NAMESPACE
from portnorm_onnx.report import Report, change_of
from portnorm_onnx.runtimes import loads_opset
from portnorm_onnx.signature import batch_axis, checked_dims, first_states, mask_dims, state_inputs, state_outputs, time_axis
from portnorm_onnx.storage import WIDE, Draft, as_function, file_size, is_large, size_of
from portnorm_onnx.symbolic import constant, graph_input
from portnorm_onnx.targets import (
    TARGETS,
    Target,
    TargetName,
    check_dims,
    check_dtype,
    check_integers,
    check_types,
    checker,
    target_of,
)
from portnorm_onnx.trainable import check_gradients, check_trainable, target_for_training
from portnorm_onnx.verify import check, streaming_trajectory

_EVERYWHERE = TARGETS["portable"].last_opset
TYPES = ("float16", "bfloat16", "float32", "float64")


def export(
    model: Layer,
    path: str | os.PathLike[str] | None,
    *,
    opset: int | None = None,
    target: TargetName = "portable",
    dtype: DType | None = None,
    streaming: bool = False,
    fold: bool = True,
    accurate: bool = False,
    unroll: bool = False,
    trainable: bool = False,
    lengths: bool = True,
    mask: bool = False,
    state: bool = False,
    input_shape: tuple[int | str, ...] | None = None,
    inputs: Iterable[Any] | None = None,
    names: Mapping[str, str] | None = None,
    prefix: str = "",
    function: bool = False,
    external_data: bool | None = None,
    metadata: bool = True,
    quantize: QuantizeName | None = None,
) -> Report:
    """Write `model` in inference mode as an ONNX file, after the graph was checked against the model in onnxruntime.

    The graph's input is `x`, its output `y`; lengths that are not fixed are named "batch" and "time". A recurrent model also takes
    `lengths` (batch,), int64, unless `lengths=False`; with `mask=True` any model takes `mask` in their stead, bool, shaped like `x` without
    its features: (time, batch) for a recurrent one, or (batch, time) with `batch_first`. With `state=True` a recurrent model takes `h_0`,
    `c_0` (and `time_0` for batch normalization) and gives `h_n`, `c_n`, `time_n`; a model of several recurrent layers has the layer's
    number before these names (`1.h_0`). With `streaming=True` the graph is one step: `x` (batch, features), the states, no time axis, no
    `lengths` and no `mask`.

    `target` names who will run the graph: "portable" (all of them), "onnxruntime", "openvino", "tract", "web" or "tensorrt"; any opset from
    17 to 26 (18 unless stated, for onnxruntime 23), and up to 28 where the target and the installed onnxruntime read it. "litert", "mnn",
    "ncnn", "iree", "tvm", "tinygrad", "c", "opencv" and "onnx2pytorch" go through a converter or a compiler, at opset 18 and in float32;
    most of them need numbers in `input_shape`, and where there is no loop every step is written out (docs/deploy.md). `dtype` converts
    first: float16, bfloat16, float32 or float64. `fold` writes batch normalization with fixed statistics into weights and tables, and plain
    cells as the operators LSTM, GRU and RNN; `fold=False` keeps each visible. `accurate=True` centres before operators that cancel where
    |mean| ≫ std, and leaves cells and statistics unfolded; in float16 it writes float32 around normalizations and products, which some
    processors sum in float16 (docs/runtimes.md says what it costs).

    `names` gives inputs and outputs other names ({"x": "features"}), `prefix` stands before every name inside, so that the graph merges
    into another with `onnx.compose`; `function=True` makes it one model-local function. `external_data` puts weights into a file of their
    own beside the model; by itself only where they exceed what one file can hold (2 GB). That file is named after its content, so an
    earlier one stays, since other models may refer to it, and is named in `report.left`.

    `unroll=True` writes every step of a loop out, for runtimes that have none: the same definition, as often as `input_shape` has steps,
    with each weight stored once. Plain cells stay one operator.

    `trainable=True` writes what onnxruntime-training differentiates, for training on a device: each parameter is an initializer under its
    name and in its shape, so that a step by its gradient is a step of the layer, and nothing is folded into it. It has no gradient for
    loops, which is an `UnsupportedError`; `export_training_step` writes an update of its own, for every layer and any onnxruntime.

    `input_shape` states the shape of `x` where the model leaves it open, such as the space of feature maps, or where lengths are fixed;
    strings name those that vary. Where it is left out, `x` has as many axes as the first of `inputs`. That of a streaming graph has no
    time: (1, 8).

    `quantize="int8"` writes `portnorm.quantized(model)`: products of integers, a quarter of the file, and less time where weights are large
    (docs/runtimes.md). The graph is checked against that layer as any other is, so that a runtime that gets integers wrong is found out;
    how far the results are from those of `model` on `inputs`, or on random input, is `report.change`. Needs float32. The file holds the
    rounded weights, and `load` gives that layer.

    The graph passes onnx's checker and strict shape inference and the two gates of `portnorm.verify`, on random input of several
    (time, batch) or on `inputs`; a streaming graph also gives, step by step, what the sequence graph gives. One in bfloat16, for which
    onnxruntime's CPU has hardly an operator, runs there in float32 with every result rounded. Only then the file appears; an existing
    one is replaced whole. `path=None` writes nothing; the model is then `report.model`.

    `portnorm.load` reads the layer back from the file, bit by bit: beside the graph it has the configuration, and what folding changed. Of
    a weight that the graph holds but for a factor or a mean that is two or three bits a number. `metadata=False` leaves all of it out.
    Raises `ExportError`, `ConformanceError`, `UnsupportedError`.

    >>> import portnorm as pn
    >>> report = pn.export(pn.LSTM(8, 16, norm="layer", rng=0), None)
    >>> report.nodes, report.body_nodes
    (6, (20,))
    """
    if not isinstance(model, Layer):
        raise UnsupportedError(f"`model` is a {type(model).__name__}; expected a layer of portnorm")
    streaming, lengths, mask, state = switches(streaming=streaming, lengths=lengths, mask=mask, state=state)
    fold, accurate, unroll, trainable = switches(fold=fold, accurate=accurate, unroll=unroll, trainable=trainable)
    function, metadata = switches(function=function, metadata=metadata)
    external_data = None if external_data is None else switch("external_data", external_data)
    row = target_of(target)
    version = checked_opset(opset, row)
    check_place(path)
    if trainable:
        row = target_for_training(row)
    if unroll and streaming:
        raise UnsupportedError("`unroll` is for sequences; a streaming graph is one step, without a loop")
    if streaming and mask:
        raise UnsupportedError("`mask` is for sequences; a streaming graph is one step, which is left out by not taking it")
    if streaming and (not model.recurrent or any(part.goes_back for part in recurrent_parts(model))):
        raise UnsupportedError("`streaming` needs a recurrent model that goes forward only; a reverse direction starts at the end")
    plain, model = model, model if quantize is None else quantized(model, quantize)
    kind = _dtype_of(model, dtype, row)
    model = rounded(on_numpy(model, "float32" if kind == "bfloat16" else kind), kind)
    if model.quantizes is not None:
        check_integers(row, kind, model.quantizes)
    if trainable:
        check_trainable(model, version, kind, function=function)
    named = Names(checked_prefix(prefix), checked_names(names))
    cases = None if inputs is None else [_on_numpy(case) for case in checked_cases(inputs)]
    dims = checked_dims(model, input_shape, streaming=streaming, like=cases[0][0] if cases else None)
    check_dims(row, dims, batch=batch_axis(model), time=time_axis(model), streaming=streaming)
    change = None
    if model.quantizes is not None:
        model = with_rounded_weights(model)
        plain = rounded(on_numpy(plain, kind), kind)
        change = change_of(plain, model, cases if cases is not None else random_inputs(model, dims, None))
        library(next(iter(model.params.values()))).release()
    del plain
    shape = Shape(
        version,
        row,
        kind,
        fold and not accurate,
        accurate,
        lengths and not mask,
        state,
        dims,
        named,
        streaming,
        mask=mask,
        metadata=metadata,
        unroll=unroll,
        trainable=trainable,
    )
    started = time.perf_counter()
    proto = trace(model, shape)
    seconds = time.perf_counter() - started
    check_names(proto, named)
    if trainable:
        check_gradients(proto)
    external = is_large(proto) if external_data is None else external_data
    with contextlib.ExitStack() as drafts:
        draft = drafts.enter_context(Draft(proto, path, external, aside=True))
        del proto
        if streaming:  # before anything runs, which needs room of its own
            looped = row if row.loops and row.sequences else TARGETS["portable"]
            whole = trace(model, shape._replace(streaming=False, state=True, lengths=False, names=Names(), trainable=False, target=looped))
            sequence = drafts.enter_context(Draft(whole, aside=True))
            del whole
        if function:
            draft.proto = as_function(draft.proto, prefix or type(model).__name__)
        elif not (external and "web" in row.runtimes):  # which finds no file of weights from inside of a loop
            put_inside(draft.proto)
        runtime = checker(draft.proto, kind)
        report = check(draft, model, runtimes=(runtime,), cases=cases, as_is=True)
        if streaming:
            report.trajectories += streaming_trajectory(draft, sequence, model, runtime)
        draft.publish()
    return dataclasses.replace(report, left=draft.left, model=draft.proto, size=file_size(draft.proto), seconds=seconds, change=change)


def checked_prefix(prefix: Any) -> str:
    """`prefix`, or `UnsupportedError` for what is no text."""
    if not isinstance(prefix, str):
        raise UnsupportedError(f"`prefix` is {prefix!r}; expected a text")
    return prefix


def checked_names(names: Any) -> dict[str, str]:
    """`names` as a dict; raises `UnsupportedError` for what maps no names to names."""
    if names is None:
        return {}
    if not isinstance(names, Mapping) or not all(isinstance(name, str) for pair in names.items() for name in pair):
        raise UnsupportedError(f"`names` is {names!r}; expected a mapping of names to others, such as {{'x': 'features'}}")
    return dict(names)


def _on_numpy(given: Any) -> Any:
    """Arrays of any library as those of NumPy."""
    return mapped(lambda a: to_numpy(a) if hasattr(a, "__array_namespace__") or hasattr(a, "device") else a, given)


class Shape(NamedTuple):
    """What was asked for, but for the model."""

    version: int
    target: Target
    dtype: str
    fold: bool
    accurate: bool
    lengths: bool
    state: bool
    input_shape: tuple[int | str, ...] | None
    names: Names
    streaming: bool = False
    gives: tuple[str, ...] | None = None
    """The outputs that are wanted; by itself `y`, and the states where they are inputs."""
    mask: bool = False
    metadata: bool = True
    """Whether the file says what its layer is."""
    unroll: bool = False
    trainable: bool = False


def checked_opset(opset: int | None, target: Target) -> int:
    """`opset`, or the default; raises `UnsupportedError` for one that the table, the target or onnxruntime lacks."""
    version = target.opset if opset is None else opset
    known = isinstance(version, int | numpy.integer) and version in OPSETS
    last = min(target.last_opset, max(OPSETS))
    if not known or version > last:
        others = [f"target={row.name!r}" for row in TARGETS.values() if known and version <= row.last_opset]
        way_out = f"; {' or '.join(others)} takes it" if others else ""
        raise UnsupportedError(f"`opset` is {opset!r}; expected a number from {min(OPSETS)} to {last} for target {target.name!r}{way_out}")
    if version > _EVERYWHERE and not loads_opset(version):
        raise UnsupportedError(f"`opset` is {opset!r}, which the installed onnxruntime does not load; expected at most {_EVERYWHERE}")
    return version


def check_place(path: str | os.PathLike[str] | None) -> None:
    """Raise `ExportError` now, not after the work, where nothing can be written."""
    if path is not None and not Path(checked_path("path", path)).resolve().parent.is_dir():
        raise ExportError(f"cannot write {os.fspath(path)!r}: there is no such directory")


def trace(model: Layer, shape: Shape) -> onnx.ModelProto:
    """The ONNX model of a layer on NumPy, not checked yet."""
    proto, names = _traced(model, shape)
    if shape.gives is None and shape.target.identities:  # else it becomes a part of a graph, or may not have them
        keep_apart(proto.graph, shape.names.prefix)
    if size_of(proto) > WIDE:
        gc.collect()  # symbolic arrays and nodes know each other, and hold what is in the model now
    if shape.metadata:
        described(proto, model, names=names, prefix=shape.names.prefix, dtype=shape.dtype, streaming=shape.streaming)
    return proto


def _traced(model: Layer, shape: Shape) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The model without metadata, and the names that were given."""
    dtype: Any = numpy.dtype(ml_dtypes.bfloat16 if shape.dtype == "bfloat16" else shape.dtype)
    stateful = shape.state or shape.streaming
    last = stateful if shape.gives is None else any(name != "y" for name in shape.gives)
    asked = {"accurate": shape.accurate, "unroll": shape.unroll, "trainable": shape.trainable}
    rows = opset(shape.version, shape.target, fold=shape.fold and not shape.trainable, final_state=last, **asked)
    dims = checked_dims(model, shape.input_shape, streaming=shape.streaming)
    axis, batch = 1 if model.batch_first else 0, dims[batch_axis(model)]
    if shape.streaming:
        dims = (*dims[:axis], *dims[axis + 1 :])
    given = graph_input("x", "int64" if model.takes_integers else dtype, dims, rows)
    x = NAMESPACE.expand_dims(given, axis=axis) if shape.streaming else given
    inputs, lengths = [given], None
    if shape.lengths and model.recurrent and not shape.streaming:
        lengths = graph_input("lengths", "int64", (batch,), rows)
        inputs.append(lengths)
    mask = graph_input("mask", "bool", mask_dims(model, dims), rows) if shape.mask else None
    if mask is not None:
        inputs.append(mask)
    kept = dtype if dtype.itemsize >= 4 else numpy.dtype("float32")  # of running statistics
    groups = ((model.params, dtype), (model.buffers, kept))
    params, buffers = ({n: constant(_cast(to_numpy(a), t), n) for n, a in group.items()} for group, t in groups)
    trained = {n: graph_input(n, a.dtype, a.dims, rows) for n, a in params.items()} if shape.trainable else {}
    before: Any = first_states(model)
    if stateful:
        states, before = state_inputs(model, rows, dtype, batch)
        inputs += states
    y, after, _ = model.apply(trained or params, buffers, x, before, lengths, mask=mask)
    outputs = {"y": NAMESPACE.squeeze(y, axis=axis) if shape.streaming and model.keeps_time else y}
    if last and model.recurrent:
        outputs |= state_outputs(model, rows, after, outputs["y"])
    if shape.gives is not None:
        outputs = {name: outputs[name] for name in shape.gives}
    proto = build(
        (*inputs, *trained.values()),
        outputs,
        shape.version,
        type(model).__name__,
        names=shape.names,
        defaults={shape.names.of(n): a.constant for n, a in params.items() if n in trained and a.constant is not None},
        captures=shape.target.captures or shape.trainable,  # loops are refused for what they lack, not for what they read
    )
    if shape.trainable:
        del proto.graph.input[len(inputs) :]  # of a parameter the initializer is left
    if shape.target.as_loop:
        as_loops(proto)
    check_types(proto, shape.target, shape.dtype)
    return proto, {n: shape.names.of(n) for n in (*(a.name or "" for a in inputs), *outputs) if shape.names.of(n) != n}


def _cast(values: Any, dtype: Any) -> Any:
    return values.astype(dtype, copy=False) if values.dtype.kind == "f" else values


def _dtype_of(model: Layer, dtype: DType | None, target: Target) -> str:
    """The name of the graph's floating type; raises `UnsupportedError` where the target does not compute in it."""
    name = dtype if isinstance(dtype, str) else dtype_name(model.xp, model.dtype if dtype is None else dtype)
    if name not in TYPES:
        raise UnsupportedError(f"`dtype` is {dtype!r}; expected one of {', '.join(TYPES)}")
    check_dtype(target, name)
    return name


def check_names(proto: onnx.ModelProto, names: Names) -> None:
    """Raise `UnsupportedError` for a name that was given to what is not there, or twice."""
    found = [v.name for v in (*proto.graph.input, *proto.graph.output)]
    unknown = [name for name, given in names.given.items() if given not in found]
    if unknown or len(set(found)) < len(found):
        raise UnsupportedError(f"`names` has {unknown or found}; expected different names for inputs and outputs of the graph")
