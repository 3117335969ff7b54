"""Inference runtimes behind one small interface: load a model, run it on named arrays. One row per runtime, each loaded when it is named.

A runtime whose errors can end the process that it runs in (tract), or that is no Python package, runs in a process of its own
(`workers.py`).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy
import onnx
from onnx import helper

from portnorm.arrays import require_extra
from portnorm.errors import ConformanceError, ExportError, MissingExtraError, UnsupportedError, install
from portnorm_onnx.bfloat16 import holds_bfloat16, in_float32
from portnorm_onnx.elsewhere import ENGINES, load, version_of
from portnorm_onnx.storage import Draft, Loadable, is_large
from portnorm_onnx.web.page import Page
from portnorm_onnx.workers import Session, Worker


@dataclass(frozen=True)
class Runtime:
    """How one runtime is found and used."""

    name: str
    load: Callable[[Loadable], Session]
    version: Callable[[], str]
    """Its version; raises `MissingExtraError` where it is not installed."""
    note: str = ""
    no_steps: frozenset[str] = frozenset()
    """Operators that a sequence of no steps gets no answer from: an error, a wrong shape, or the end of the process."""
    no_sequences: frozenset[str] = frozenset()
    """The same for a batch of no sequences."""

    def __post_init__(self) -> None:
        for field in ("no_steps", "no_sequences"):
            names = getattr(self, field)
            if isinstance(names, str) or not all(isinstance(name, str) for name in names):
                raise UnsupportedError(f"`{field}` of the runtime {self.name!r} is {names!r}; expected names of operators, as ('Scan',)")
            object.__setattr__(self, field, frozenset(names))


def _package(name: str, extra: str) -> Callable[[], str]:
    def version() -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise MissingExtraError(f"{name} is not installed: {install(extra)}") from None

    return version


# -- in this process ---------------------------------------------------------------------------------------------------------------------


def _onnxruntime(provider: str) -> Callable[[Loadable], Session]:
    def load(model: Loadable) -> Session:
        ort = require_extra("onnxruntime", "onnx")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        if not isinstance(model, bytes):  # weights that lie aside are wide: they are not to be there in another form as well
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_cpu_mem_arena = False  # a float16 product takes its weights in float32, which the arena keeps for each shape
        try:
            session = ort.InferenceSession(model, options, providers=[provider])
        except Exception as error:
            raise ExportError(f"onnxruntime {ort.__version__} does not load the graph: {error}") from error
        names = [o.name for o in session.get_outputs()]

        def run(inputs: Mapping[str, Any]) -> dict[str, Any]:
            try:
                if any(a.dtype == ml_dtypes.bfloat16 for a in inputs.values()):
                    given = {n: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(*_typed(a)) for n, a in inputs.items()}
                    return dict(zip(names, map(_from_ort, session.run_with_ort_values(names, given)), strict=True))
                return dict(zip(names, session.run(names, dict(inputs)), strict=True))
            except Exception as error:
                raise ExportError(f"onnxruntime {ort.__version__} does not run the graph: {error}") from error

        return run

    return load


@functools.cache
def loads_opset(version: int) -> bool:
    """Whether the installed onnxruntime loads models of this operator set; it names those that it is not made for only by its error."""
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "one", values[:1], values[1:])
    try:
        _onnxruntime("CPUExecutionProvider")(
            helper.make_model_gen_version(graph, opset_imports=[helper.make_opsetid("", version)]).SerializeToString()
        )
    except ExportError:
        return False
    return True


def _typed(a: Any) -> tuple[Any, int]:
    """An array as onnxruntime takes it, with its ONNX type; NumPy has no bfloat16 of its own."""
    kind = int(helper.np_dtype_to_tensor_dtype(a.dtype))
    return (numpy.ascontiguousarray(a).view(numpy.uint16) if a.dtype == ml_dtypes.bfloat16 else a), kind


def _from_ort(value: Any) -> Any:
    if value.element_type() != onnx.TensorProto.BFLOAT16:
        return value.numpy()
    count = int(numpy.prod(value.shape(), dtype=int))
    data = (ctypes.c_uint16 * count).from_address(value.data_ptr())
    return numpy.array(data, dtype=numpy.uint16).view(ml_dtypes.bfloat16).reshape(value.shape())


def _in_float32(rounded: bool) -> Callable[[Loadable], Session]:
    def load(model: Loadable) -> Session:
        proto = onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(model)
        halves = {o.name for o in proto.graph.output if holds_bfloat16(o)} if rounded else set()
        wide = in_float32(proto, rounded=rounded)
        with tempfile.TemporaryDirectory(prefix="portnorm-") as folder, Draft(wide, Path(folder) / "m.onnx", is_large(wide)) as draft:
            session = _onnxruntime("CPUExecutionProvider")(draft.loadable())

        def run(inputs: Mapping[str, Any]) -> dict[str, Any]:
            given = {n: a.astype(numpy.float32) if a.dtype == ml_dtypes.bfloat16 else a for n, a in inputs.items()}
            return {n: a.astype(ml_dtypes.bfloat16) if n in halves else a for n, a in session(given).items()}

        return run

    return load


def _cuda_version() -> str:
    ort = require_extra("onnxruntime", "onnx")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise MissingExtraError("onnxruntime has no CUDA provider here: pip install onnxruntime-gpu on a machine with a GPU")
    return str(ort.__version__)


def _openvino_module() -> Any:
    """OpenVINO without its telemetry, which would send from a process that it forks. Where it is imported already it stays as it is."""
    if "openvino" not in sys.modules:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # then it takes its own stub
    return require_extra("openvino", "runtimes")


def _openvino(hint: Mapping[str, str]) -> Callable[[Loadable], Session]:
    def load(model: Loadable) -> Session:
        openvino = _openvino_module()
        try:
            core = openvino.Core()
            compiled = core.compile_model(core.read_model(model), "CPU", dict(hint))
        except Exception as error:
            raise ExportError(f"OpenVINO does not load the graph: {_last_line(error)}") from error
        names = output_names(model)  # OpenVINO may name an output after something else that has the same value

        def run(inputs: Mapping[str, Any]) -> dict[str, Any]:
            try:
                given = {n: a if a.dtype != ml_dtypes.bfloat16 else _bfloat16_tensor(openvino, a) for n, a in inputs.items()}
                found = compiled(given)
            except Exception as error:
                raise ExportError(f"OpenVINO does not run the graph: {_last_line(error)}") from error
            arrays = [numpy.array(found[k]) for k in range(len(names))]
            kinds = [o.get_element_type() == openvino.Type.bf16 for o in compiled.outputs]
            return {n: a.view(ml_dtypes.bfloat16) if half else a for n, a, half in zip(names, arrays, kinds, strict=True)}

        return run

    return load


def _bfloat16_tensor(openvino: Any, a: Any) -> Any:
    tensor = openvino.Tensor(openvino.Type.bf16, openvino.Shape(a.shape))
    tensor.data.view(numpy.uint16)[...] = a.view(numpy.uint16)  # which OpenVINO shows as float16
    return tensor


def output_names(model: Loadable) -> list[str]:
    """The names of the outputs, in order."""
    proto = onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(model, load_external_data=False)
    return [o.name for o in proto.graph.output]


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _reference(model: Loadable) -> Session:
    onnx_reference = require_extra("onnx.reference", "onnx")
    try:
        evaluator = onnx_reference.ReferenceEvaluator(model)
    except Exception as error:
        raise ExportError(f"onnx's reference evaluator does not load the graph: {_last_line(error)}") from error

    def run(inputs: Mapping[str, Any]) -> dict[str, Any]:
        try:
            with numpy.errstate(all="ignore"):
                return dict(zip(evaluator.output_names, evaluator.run(None, dict(inputs)), strict=True))
        except Exception as error:
            raise ExportError(f"onnx's reference evaluator does not run the graph: {_last_line(error)}") from error

    return run


# -- in a process of its own -------------------------------------------------------------------------------------------------------------


def _tract(model: Loadable) -> Session:
    return Worker.of("tract", [sys.executable, "-m", "portnorm_onnx.tract_worker"]).load(model)


_WEB = "onnxruntime-web"


def web_package() -> Path:
    """The folder of the npm package, beside the environment or in the working directory; raises `MissingExtraError`."""
    for folder in (Path(sys.prefix) / "web", Path.cwd()):
        package = folder / "node_modules" / _WEB
        if (package / "package.json").is_file():
            return package
    raise MissingExtraError(f'{_WEB} is not installed: npm install --prefix "{Path(sys.prefix) / "web"}" {_WEB}')


def _web_version() -> str:
    if shutil.which("node") is None:
        raise MissingExtraError("Node.js is not installed")
    return str(json.loads((web_package() / "package.json").read_text())["version"])


def _web(model: Loadable) -> Session:
    return Worker.of(_WEB, ["node", str(Path(__file__).parent / "web" / "worker.mjs"), str(web_package())]).load(model)


def _page_version() -> str:
    if chromium() is None:
        raise MissingExtraError("Chromium is not installed")
    return str(json.loads((web_package() / "package.json").read_text())["version"])


def chromium() -> str | None:
    """Where Chromium or Chrome is."""
    return next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


def _page(model: Loadable) -> Session:
    return Page.of(web_package(), str(chromium())).load(model)


FITTED = "Reshape to (0, …, −1)"
"""A Reshape that takes one length over, and finds out another by it."""
ANY = "any operator"
"""Every graph has one: the runtime is not asked for nothing at all."""
_ORT: dict[str, frozenset[str]] = {
    "no_steps": frozenset({"Scan", "Loop", "GRU"}),
    "no_sequences": frozenset({"LSTM", "GRU", "DynamicQuantizeLSTM", FITTED}),
}
_LOOPS = frozenset({"Scan", "Loop"})
_RECURRENT = frozenset({"Scan", "Loop", "LSTM", "GRU", "RNN"})

RUNTIMES: dict[str, Runtime] = {
    row.name: row
    for row in (
        Runtime("onnxruntime", _onnxruntime("CPUExecutionProvider"), _package("onnxruntime", "onnx"), "CPU", **_ORT),
        Runtime("onnxruntime-cuda", _onnxruntime("CUDAExecutionProvider"), _cuda_version, "CUDA provider", _RECURRENT, _RECURRENT),
        Runtime("openvino", _openvino({"INFERENCE_PRECISION_HINT": "f32"}), _package("openvino", "runtimes"), "CPU, float32 hint", _LOOPS),
        Runtime("openvino-default", _openvino({}), _package("openvino", "runtimes"), "CPU, its own choice of precision", _LOOPS),
        Runtime("tract", _tract, _package("tract", "runtimes"), "CPU, in a process of its own", _RECURRENT),
        Runtime("web", _web, _web_version, "WebAssembly in Node.js", **_ORT),
        Runtime("web-page", _page, _page_version, "WebAssembly in a page of headless Chromium", **_ORT),
        Runtime("reference", _reference, _package("onnx", "onnx"), "onnx's own evaluator", _RECURRENT, frozenset({FITTED})),
    )
}
"""Runtimes by name. What CUDA does with nothing was not tried; so it is not asked."""

FURTHER: dict[str, Runtime] = {
    name: Runtime(
        name,
        functools.partial(load, name),
        functools.partial(version_of, name),
        engine.note,
        *(tuple(_ORT.values()) if name.startswith("onnxruntime-") else (frozenset({ANY}), frozenset({ANY}))),
    )
    for name, engine in ENGINES.items()
}
"""Runtimes that are not asked for by "all", since a graph is made for most of them (`targets.py`), or that are onnxruntime once more."""

STAND_INS: dict[str, Runtime] = {
    row.name: row
    for row in (
        Runtime(
            "rounded", _in_float32(True), _package("onnxruntime", "onnx"), "onnxruntime's CPU in float32, bfloat16 by rounding", **_ORT
        ),
        Runtime(
            "unrounded", _in_float32(False), _package("onnxruntime", "onnx"), "onnxruntime's CPU with float32 in place of bfloat16", **_ORT
        ),
    )
}
"""What a graph in bfloat16 is checked by, since no runtime here has the operators: onnxruntime on the same graph in float32."""


def runtime_of(name: str) -> Runtime:
    """The row of a runtime; raises `UnsupportedError`."""
    rows = {**RUNTIMES, **FURTHER, **STAND_INS}
    if name not in rows:
        raise UnsupportedError(f"`runtimes` names {name!r}; expected all, or some of {', '.join(rows)}")
    return rows[name]


def session_of(runtime: str, model: Loadable, proto: onnx.ModelProto | None = None) -> Session:
    """A model loaded in the named runtime. Raises `MissingExtraError` where that is not installed, `ExportError` where it cannot.

    `proto` is the same model, where it is at hand. A call raises `ExportError` for whatever the runtime raises, `ConformanceError` where
    it does not give what the graph says.
    """
    row = runtime_of(runtime)
    row.version()
    session = row.load(model)
    if proto is None:
        proto = onnx.load_model_from_string(model) if isinstance(model, bytes) else onnx.load(model, load_external_data=False)
    expected = {o.name: o.type.tensor_type for o in proto.graph.output}

    def run(inputs: Mapping[str, Any]) -> dict[str, Any]:
        try:
            found = session(inputs)
        except ExportError:
            raise
        except Exception as error:
            given = ", ".join(f"{n} {tuple(numpy.shape(a))}" for n, a in inputs.items())
            hint = "; if it has no answer for a length of 0, its row of RUNTIMES names the operators in `no_steps` or `no_sequences`"
            nothing = any(0 in numpy.shape(a) for a in inputs.values())
            raise ExportError(
                f"{runtime} does not run the graph on {given}: {type(error).__name__}: {error}{hint if nothing else ''}"
            ) from error
        _check_outputs(runtime, expected, found)
        return found

    return run


def _check_outputs(runtime: str, expected: Mapping[str, Any], found: Any) -> None:
    """Raise `ConformanceError` unless all outputs are there, as arrays of the type and with the axes that the graph says."""
    if not isinstance(found, Mapping) or not expected.keys() <= found.keys():
        given = sorted(found) if isinstance(found, Mapping) else type(found).__name__
        raise ConformanceError(f"{runtime} gave {given or 'nothing'}; expected arrays by the names of the outputs, {', '.join(expected)}")
    for name, said in expected.items():
        array = found[name]
        if not isinstance(array, numpy.ndarray):
            raise ConformanceError(f"{runtime} gave {type(array).__name__} for {name!r}; expected an array of NumPy")
        types = [helper.tensor_dtype_to_np_dtype(said.elem_type)]
        types += [numpy.dtype("float32")] * (said.elem_type == onnx.TensorProto.BFLOAT16)  # NumPy has no bfloat16 of its own
        if array.dtype not in types:
            raise ConformanceError(f"{runtime} gave {array.dtype} for {name!r}, which the graph says is {types[0]}")
        if said.HasField("shape") and array.ndim != len(said.shape.dim):
            raise ConformanceError(f"{runtime} gave {name!r} with {array.ndim} axes, the graph says {len(said.shape.dim)}")
