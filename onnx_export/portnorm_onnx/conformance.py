"""Inference runtimes on the cases of `portnorm.conform`, and cases as files that makers of runtimes run with the harness they have."""

from __future__ import annotations

import json
import typing
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import onnx
from onnx import numpy_helper

import portnorm as pn
from portnorm.cells.variants import NormName
from portnorm.conform.cases import Case, NumPyArray, cases
from portnorm.conform.oracle import Truth, truth
from portnorm.conform.recurrent import REGIME, inputs, layer_of
from portnorm.conform.result import Result, compared
from portnorm.conform.tolerances import HORIZON
from portnorm.errors import ConformanceError, MissingExtraError, PortnormError, UnsupportedError
from portnorm.files import written_whole
from portnorm.layers.layer import Layer
from portnorm_onnx.build import Names
from portnorm_onnx.export import TYPES, Shape, trace
from portnorm_onnx.runtimes import RUNTIMES, session_of
from portnorm_onnx.storage import Draft
from portnorm_onnx.targets import TARGETS, TargetName
from portnorm_onnx.verify import ALL, check

OPSET = 23
"""The first with an operator for RMS normalization."""
RECURRENT_DTYPES = ("float32",)


def check_known(name: str) -> None:
    """Raise `UnsupportedError` for what is neither a library nor a runtime."""
    if name not in RUNTIMES:
        from portnorm.conform.libraries import LIBRARIES

        raise UnsupportedError(f"{name!r} is no library or runtime; expected some of {', '.join((*LIBRARIES, *RUNTIMES))}")


def version(name: str) -> str:
    """The version of a runtime; raises `MissingExtraError` where it is not installed."""
    return RUNTIMES[name].version()


def _layer(case: Case, arrays: dict[str, NumPyArray]) -> tuple[Layer, tuple[int | str, ...]]:
    """The layer of a case's operation with its parameters, and the shape of `x` with the batch unknown.

    Batch normalization has the statistics that are given, or those of its own `x`, so that the truth is the same as in training.
    """
    operation, shape = case.operation, case.shape
    kind = operation.name.split(" ")[0]
    channels = shape[operation.channel]
    made: Layer
    if kind == "layer_norm":
        made = pn.LayerNorm(channels, eps=case.eps)
    elif kind == "rms_norm":
        made = pn.RMSNorm(channels, eps=case.eps)
    elif kind == "group_norm":
        made = pn.GroupNorm(operation.groups or 1, channels, eps=case.eps)
    elif kind == "instance_norm":
        made = pn.InstanceNorm(channels, affine=True, eps=case.eps)
    else:
        made = pn.BatchNorm(channels, eps=case.eps)
    made = made.to(dtype="float32" if case.dtype == "bfloat16" else case.dtype)
    params = {name: arrays[name].astype(made.dtype) for name in made.params}
    buffers = dict(made.buffers)
    if "running_mean" in buffers:
        axes = operation.axes(shape)
        with numpy.errstate(all="ignore"):
            own = {"mean": arrays["x"].mean(axis=axes), "var": arrays["x"].var(axis=axes)}
        buffers |= {f"running_{s}": arrays.get(s, a) for s, a in own.items()}
    with numpy.errstate(over="ignore"):  # of values near the end of a type's range, of which the variance is beyond it
        made.assign(params, {name: numpy.asarray(a).astype(made.buffers[name].dtype) for name, a in buffers.items()})
    return made, ("batch", *shape[1:])


def graph_of(case: Case, arrays: dict[str, NumPyArray]) -> onnx.ModelProto:
    """The portable graph of a case."""
    layer, dims = _layer(case, arrays)
    shape = Shape(OPSET, TARGETS["portable"], case.dtype, True, False, False, False, dims, Names())
    return trace(layer, shape)


def of_runtime(name: str, version: str, case: Case, arrays: dict[str, NumPyArray], exact: Truth) -> Iterator[Result]:
    """One runtime on one case, forward."""
    about = (name, version, case.operation.name, case.regime.name, case.dtype)
    if case.dtype not in TYPES or 0 in case.shape:
        yield Result(*about, "forward", "not measured", detail="a graph needs at least one value")
        return
    if case.operation.name.startswith("batch_norm") and case.regime.name in ("NaN and Inf", "one value"):
        yield Result(*about, "forward", "not measured", detail="statistics that are given do not see the values")
        return
    try:
        proto = graph_of(case, arrays)
        kind = onnx.helper.tensor_dtype_to_np_dtype(proto.graph.input[0].type.tensor_type.elem_type)
        values = session_of(name, Draft(proto).loadable(), proto)({"x": arrays["x"].astype(kind)})["y"].astype(numpy.float64)
    except Exception as error:  # that of a runtime of one's own may be any
        yield Result(*about, "forward", "does not run", detail=_said(error), reproduce=case.reproduce())
        return
    if values.shape != case.shape:
        detail = f"the result has shape {values.shape}; expected {case.shape}"
        yield Result(*about, "forward", "does not run", detail=detail, reproduce=case.reproduce())
        return
    yield compared(about, "forward", values, exact.y, case, arrays, exact.axes)


def _said(error: Exception) -> str:
    return (str(error) if isinstance(error, PortnormError) else f"{type(error).__name__}: {error}")[:300]


def of_cells(
    name: str, version: str, dtypes: tuple[str, ...], starts: Callable[[str], bool], those: Iterable[tuple[str, NormName | None]]
) -> Iterator[Result]:
    """Cells and presets as portable graphs, one step and a whole run, in float32; each that `starts` says so of."""
    for cell, preset in those if set(dtypes) & set(RECURRENT_DTYPES) else ():
        if not starts(f"{name} / {cell} {preset or 'plain'} / {REGIME} / float32"):
            continue
        about = (name, version, f"{cell} {preset or 'plain'}", "normal", "float32")
        code = f"from portnorm.conform import recurrent\nlayer = recurrent.layer_of({cell!r}, {preset!r}).to(dtype='float32')"
        layer = layer_of(cell, preset).to(dtype="float32")
        case = (inputs().astype(numpy.float32), numpy.array([HORIZON, HORIZON // 2, 1]))
        try:
            report = check(Draft(_sequence_graph(cell, preset)), layer, runtimes=(name,), cases=[case])
        except ConformanceError as error:
            yield Result(*about, "one step", "beyond", detail=str(error), reproduce=code)
            continue
        except Exception as error:
            yield Result(*about, "one step", "does not run", detail=_said(error), reproduce=code)
            continue
        for side, found in (("one step", report.steps), ("trajectory", report.trajectories)):
            worst = max(found, key=lambda c: c.difference / c.allowed)
            unit = 2.0**-23
            yield Result(
                    *about, side, "ok", worst.difference / unit, None, worst.difference, None, worst.allowed / unit, 0, worst.case, code
                )  # fmt: skip


@cache
def _sequence_graph(cell: str, preset: NormName | None) -> onnx.ModelProto:
    shape = Shape(TARGETS["portable"].opset, TARGETS["portable"], "float32", True, False, True, False, None, Names())
    return trace(layer_of(cell, preset).to(dtype="float32"), shape)


# -- layers × targets × runtimes ---------------------------------------------------------------------------------------------------------


_OF_INTEGERS: tuple[tuple[str, NormName | None], ...] = (
    ("LSTM", None),
    ("LSTM", "layer"),
    ("LSTM", "batch"),
    ("GRU", None),
    ("GRU", "layer"),
    ("RNN", "layer"),
)


def layers() -> Iterator[tuple[str, Layer, dict[str, Any]]]:
    """Every layer and preset, with a name and what `export` has to be told."""
    for cell, table in pn.VARIANTS.items():
        for preset in table:
            yield f"{cell} {preset or 'plain'}", layer_of(cell, preset).to(dtype="float32"), {}
    rng = numpy.random.default_rng(0)
    stack = pn.LSTM(4, 5, norm="layer", num_layers=2, bidirectional=True, rng=0)
    plain: list[tuple[Layer, dict[str, Any]]] = [
        (pn.LayerNorm(7), {}),
        (pn.RMSNorm(7), {}),
        (pn.BatchNorm(6), {"input_shape": ("batch", 6, "height", "width")}),
        (pn.BatchRenorm(6), {}),
        (pn.InstanceNorm(6, affine=True), {"input_shape": ("batch", 6, "height", "width")}),
        (pn.GroupNorm(2, 6), {"input_shape": ("batch", 6, "height", "width")}),
        (pn.Linear(3, 4, rng=0), {}),
        (pn.Sequential(pn.Embedding(9, 4, rng=0), stack, pn.Linear(10, 3, rng=0)), {}),
    ]
    for layer, keywords in plain:
        arrays = {n: a + rng.uniform(0.1, 1.0, a.shape).astype(a.dtype) if a.ndim else a for n, a in layer.state_dict().items()}
        layer.load_state_dict(arrays)
        name = "Embedding, LSTM layer in both directions, Linear" if isinstance(layer, pn.Sequential) else type(layer).__name__
        yield name, layer, keywords
    for cell, preset in _OF_INTEGERS:
        yield f"{cell} {preset or 'plain'}, int8", layer_of(cell, preset).to(dtype="float32"), {"quantize": "int8"}
    yield "Linear, int8", pn.Linear(3, 4, rng=0), {"quantize": "int8"}


def support(progress: Callable[[str], None] = lambda what: None) -> dict[str, Any]:
    """Every layer × target, verified in onnxruntime and the target's own runtime; the portable graph in every runtime; why what fails does.

    `{"versions": {runtime: version}, "rows": [{"layer", "target" or "runtime", "status", "nodes", "detail"}]}`
    """
    versions, rows = {}, []
    for name, row in RUNTIMES.items():
        try:
            versions[name] = row.version()
        except MissingExtraError:
            versions[name] = ""
    for name, layer, keywords in layers():
        progress(name)
        for target in (name for name in typing.get_args(TargetName) if not TARGETS[name].further):
            try:
                report = pn.export(layer, None, target=target, **keywords)
                own = [name for name in TARGETS[target].runtimes if versions[name]]
                if report.model is not None and own:
                    check(Draft(report.model), layer, runtimes=own)
            except PortnormError as error:
                rows.append({"layer": name, "target": target, "status": "failed", "nodes": "", "detail": str(error)})
                continue
            nodes = "+".join(map(str, (report.nodes, *report.body_nodes)))
            rows.append({"layer": name, "target": target, "status": "passed", "nodes": nodes, "detail": ""})
            if target == "portable" and report.model is not None:
                for o in check(Draft(report.model), layer, runtimes=ALL).outcomes:
                    rows.append({"layer": name, "runtime": o.runtime, "status": o.status, "nodes": nodes, "detail": o.detail})
    return {"versions": versions, "rows": rows}


# -- cases as files ----------------------------------------------------------------------------------------------------------------------


def write_vectors(folder: Path, chosen: Iterable[Case] | None = None) -> list[str]:
    """Write cases in the layout of ONNX's backend tests: `test_<case>/model.onnx`, `test_data_set_0/input_0.pb` and `output_0.pb`.

    The outputs are the truth, rounded to the type of the case. Returns the names. Cases that are no graph (no values) are left out.
    """
    names = []
    for case in cases() if chosen is None else chosen:
        if 0 in case.shape or (case.operation.name.startswith("batch_norm") and case.regime.name in ("NaN and Inf", "one value")):
            continue
        arrays = case.arrays()
        proto, exact = graph_of(case, arrays), truth(case, arrays)
        name = "test_portnorm_" + "".join(c if c.isalnum() else "_" for c in case.name.replace(" / ", "__"))
        place = folder / name / "test_data_set_0"
        place.mkdir(parents=True, exist_ok=True)
        kind = onnx.helper.tensor_dtype_to_np_dtype(proto.graph.input[0].type.tensor_type.elem_type)
        with numpy.errstate(over="ignore"):
            y = exact.y.reshape(case.shape).astype(kind)
        for file, values, label in (("input_0.pb", arrays["x"].astype(kind), "x"), ("output_0.pb", y, "y")):
            _write(place / file, numpy_helper.from_array(values, label).SerializeToString())
        _write(folder / name / "model.onnx", proto.SerializeToString())
        tolerance = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 2e-6, "float64": 1e-12}[case.dtype]
        _write(folder / name / "data.json", json.dumps({"rtol": tolerance, "atol": tolerance}).encode())
        names.append(name)
    return names


def _write(path: Path, data: bytes) -> None:
    with written_whole(path) as file:
        file.write(data)
