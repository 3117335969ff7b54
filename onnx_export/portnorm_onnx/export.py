"""Export: trace the model's own definition on symbolic arrays, check the graph, then write it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy

from portnorm.arrays import DType, to_numpy
from portnorm.checkpoint.layers import to_json
from portnorm.errors import ExportError, UnsupportedError
from portnorm.files import written_whole
from portnorm.layers.layer import Layer
from portnorm.layers.recurrent import PlacedState, Recurrent, recurrent_parts
from portnorm_onnx.build import build
from portnorm_onnx.lowering import OPSETS, opset
from portnorm_onnx.report import Report
from portnorm_onnx.symbolic import Opset, SymbolicArray, constant, graph_input
from portnorm_onnx.verify import check

DEFAULT_OPSET = 18
_METADATA = "portnorm"
_TIME = "time_0"


def export(
    model: Layer,
    path: str | os.PathLike[str] | None,
    *,
    opset: int | None = None,
    dtype: DType | None = None,
    lengths: bool = True,
    state: bool = False,
    input_shape: tuple[int | str, ...] | None = None,
    inputs: Iterable[Any] | None = None,
) -> Report:
    """Write `model` in inference mode as an ONNX file, after the graph was checked against the model in onnxruntime.

    The graph's input is `x`, its output `y`; lengths that are not fixed are named "batch" and "time". A recurrent model also takes
    `lengths` (batch,), int64, unless `lengths=False`; with `state=True` it takes `h_0`, `c_0` (and `time_0` for batch normalization)
    and gives `h_n`, `c_n`, `time_n`. Each direction of a recurrent layer is one `Scan`. Any opset from 18 to 26; 18 unless stated.
    `input_shape` states the shape of `x` where the model leaves it open, with strings for lengths that vary; `dtype` converts first.

    The graph passes onnx's checker and strict shape inference and the two gates of `portnorm.verify`, on random input of several
    (time, batch) or on `inputs`. Only then the file appears; an existing one is replaced whole. `path=None` writes nothing; the model is
    then `report.model`. Raises `ExportError`, `ConformanceError`, `UnsupportedError`.

    >>> import portnorm as pn
    >>> report = pn.export(pn.LSTM(8, 16, norm="layer", rng=0), None)
    >>> report.nodes, report.body_nodes
    (7, (19,))
    """
    version = checked_opset(opset)
    if not isinstance(model, Layer):
        raise UnsupportedError(f"`model` is a {type(model).__name__}; expected a layer of portnorm")
    checked_path(path)
    model = model.to(xp="numpy", dtype=dtype)
    started = time.perf_counter()
    proto = trace(model, version, lengths=lengths, state=state, input_shape=input_shape)
    seconds = time.perf_counter() - started
    cases = None if inputs is None else [item if isinstance(item, tuple) else (item, None) for item in inputs]
    report = check(proto, model, runtimes=("onnxruntime",), cases=cases, path=None if path is None else Path(path))
    report.seconds = seconds
    if path is not None:
        with written_whole(path) as file:
            file.write(proto.SerializeToString())
    return report


def checked_opset(opset: int | None) -> int:
    """`opset`, or the default; raises `UnsupportedError` for one that there are no rows for."""
    version = DEFAULT_OPSET if opset is None else opset
    if version not in OPSETS:
        raise UnsupportedError(f"`opset` is {opset!r}; expected a number from {min(OPSETS)} to {max(OPSETS)}")
    return version


def checked_path(path: str | os.PathLike[str] | None) -> None:
    """Raise `ExportError` now, not after the work, where nothing can be written."""
    if path is not None and not Path(path).resolve().parent.is_dir():
        raise ExportError(f"cannot write {os.fspath(path)!r}: there is no such directory")


def trace(
    model: Layer, version: int, *, lengths: bool = True, state: bool = False, input_shape: tuple[int | str, ...] | None = None
) -> Any:
    """The ONNX model of a layer on NumPy, not checked yet."""
    target = opset(version)
    dims = tuple(input_shape) if input_shape is not None else model.input_dims()
    x = graph_input("x", "int64" if model.takes_integers else model.dtype, dims, target)
    inputs, feed = [x], {}
    if lengths and model.recurrent:
        feed["lengths"] = graph_input("lengths", "int64", ("batch",), target)
        inputs.append(feed["lengths"])
    params, buffers = ({n: constant(to_numpy(a), n) for n, a in group.items()} for group in (model.params, model.buffers))
    if state:
        given = state_inputs(model, target)
        inputs += given
        before: Any = tuple(given) if isinstance(model, Recurrent) else (tuple(given),)
    else:
        before = placed_zeros(model, x)
    y, after, _ = model.apply(params, buffers, x, before, feed.get("lengths"))
    outputs = {"y": y}
    if state:
        last = after if isinstance(model, Recurrent) else after[0]
        outputs |= dict(zip((f"{a.name.removesuffix('_0')}_n" for a in given if a.name), last, strict=True))
    return build(tuple(inputs), outputs, version, type(model).__name__, {_METADATA: to_json(model)})


def state_inputs(model: Layer, target: Opset) -> list[SymbolicArray]:
    parts = recurrent_parts(model)
    if len(parts) != 1:
        raise UnsupportedError(f"`state=True` needs a model with one recurrent layer; this one has {len(parts)}")
    (layer,) = parts
    places = layer.num_layers * layer.num_directions
    inputs = [
        graph_input(f"{name}_0", layer.dtype, (places, "batch", size), target)
        for name, size in zip(layer.cell.states, layer.state_sizes(), strict=True)
    ]
    return [*inputs, graph_input(_TIME, "int64", (), target)] if layer.timed else inputs


def placed_zeros(model: Layer, x: SymbolicArray) -> Any:
    """Zero states as the directions take them. The number of steps before is a named constant, so that a check can set it."""
    parts = recurrent_parts(model)
    if not parts:
        return None
    xp = x.__array_namespace__()
    states = []
    for layer in parts:
        batch = x.shape[0 if layer.batch_first else 1]
        zeros = tuple(xp.zeros((batch, size), dtype=layer.dtype) for size in layer.state_sizes())
        time_before = constant(numpy.int64(0), _TIME) if layer.timed else None
        states.append(PlacedState([zeros] * (layer.num_layers * layer.num_directions), time_before))
    return states[0] if isinstance(model, Recurrent) else tuple(states)
