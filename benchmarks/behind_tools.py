"""Tools that stand between an exported file and a device, each as one would call it: a row for each way of calling.

`run(source, path)` writes `path`; only `look` writes nothing. What a tool imports is imported when it runs.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import portnorm as pn
from benchmarks.behind_graphs import HIDDEN, feed_of, target_of
from portnorm.checkpoint.onnx_constants import graphs
from portnorm.layers.recurrent import Recurrent
from portnorm_onnx.metadata import graph_facts

ROUNDED = {"float16": 0.05, "int8": 0.2}
"""What is allowed where a tool rounds on purpose, as the tests allow it: `tests/tolerances.py` says why."""


@dataclass(frozen=True)
class Tool:
    """One way of calling a tool."""

    name: str
    section: str
    """Its heading in docs/behind-the-export.md."""
    packages: tuple[str, ...]
    run: Callable[[Path, Path], None]
    rounds: str = ""
    """The type of the weights that it is there to make."""
    suffix: str = ".onnx"
    keywords: Mapping[str, Any] = field(default_factory=dict)
    """For `portnorm.export`."""
    outputs: Mapping[str, str] = field(default_factory=dict)
    """What an output is called afterwards."""
    prefix: str | None = None
    """For `portnorm.load`."""
    whole: Callable[[pn.Layer], pn.Layer] = lambda layer: layer
    """What the file then computes, from the layer."""


# -- simplifiers -------------------------------------------------------------------------------------------------------------------------


def edited(change: Callable[[onnx.ModelProto], onnx.ModelProto]) -> Callable[[Path, Path], None]:
    """A tool that takes a model and gives one."""
    return lambda source, path: onnx.save(change(onnx.load(source)), path)


def onnxsim(**keywords: Any) -> Callable[[Path, Path], None]:
    def change(model: onnx.ModelProto) -> onnx.ModelProto:
        import onnxsim

        return onnxsim.simplify(model, **keywords)[0]

    return edited(change)


def onnxslim(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnxslim

    return onnxslim.slim(model)


def onnxoptimizer(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnxoptimizer

    return onnxoptimizer.optimize(model)


def onnxscript(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnxscript import optimizer

    return optimizer.optimize(model)


def onnxruntime_saves(level: str) -> Callable[[Path, Path], None]:
    def run(source: Path, path: Path) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.optimized_model_filepath, options.log_severity_level = str(path), 4
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
        ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])

    return run


# -- integers ----------------------------------------------------------------------------------------------------------------------------


def quantize_dynamic(**keywords: Any) -> Callable[[Path, Path], None]:
    def run(source: Path, path: Path) -> None:
        from onnxruntime.quantization import quantize_dynamic

        quantize_dynamic(source, path, **keywords)

    return run


def quantize_static(source: Path, path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = iter([feed_of(onnx.load(source), seed) for seed in range(4)])

        def get_next(self) -> Any:
            return next(self.feeds, None)

    quantize_static(source, path, Reader())


def nncf(source: Path, path: Path) -> None:
    import nncf

    model = onnx.load(source)
    onnx.save(nncf.quantize(model, nncf.Dataset([feed_of(model, seed) for seed in range(4)]), subset_size=4), path)


def portnorm_int8(source: Path, path: Path) -> None:
    """The way out: the exporter's own."""
    _again(source, path, quantize="int8")


# -- float16 -----------------------------------------------------------------------------------------------------------------------------


def float16(package: str, **keywords: Any) -> Callable[[Path, Path], None]:
    def run(source: Path, path: Path) -> None:
        if package == "onnxruntime":
            from onnxruntime.transformers.float16 import convert_float_to_float16
        elif package == "onnxmltools":
            from onnxmltools.utils import convert_float_to_float16
        else:
            from onnxconverter_common.float16 import convert_float_to_float16
        onnx.save(convert_float_to_float16(onnx.load(source), **keywords), path)

    return run


def float16_sorted(source: Path, path: Path) -> None:
    """With the nodes in an order that ONNX allows, which the converter leaves to others."""
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    made = OnnxModel(convert_float_to_float16(onnx.load(source), keep_io_types=True))
    made.topological_sort()
    onnx.save(made.model, path)


def portnorm_float16(source: Path, path: Path) -> None:
    _again(source, path, dtype="float16")


def _again(source: Path, path: Path, **keywords: Any) -> None:
    """The layer in `source`, exported once more."""
    model = onnx.load(source)
    pn.export(pn.load(source), path, target=target_of(model), streaming=graph_facts(model)["streaming"], **keywords)


# -- another version, another form -------------------------------------------------------------------------------------------------------


def converted(by: int) -> Callable[[Path, Path], None]:
    def change(model: onnx.ModelProto) -> onnx.ModelProto:
        from onnx import version_converter

        return version_converter.convert_version(model, model.opset_import[0].version + by)

    return edited(change)


def outside(threshold: int) -> Callable[[Path, Path], None]:
    def run(source: Path, path: Path) -> None:
        onnx.save_model(onnx.load(source), path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=threshold)

    return run


def ort_format(source: Path, path: Path) -> None:
    from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort

    with tempfile.TemporaryDirectory() as folder:
        convert_onnx_models_to_ort(source, Path(folder), [OptimizationStyle.Fixed])
        shutil.copyfile(next(Path(folder).glob("*.ort")), path)


# -- looking -----------------------------------------------------------------------------------------------------------------------------

_READS = """
import * as fs from "node:fs";
const [folder, file] = process.argv.slice(2);
const load = (id) => import(`file://${folder}/${id.replace("./", "")}.js`);
const [base, view] = [await load("base"), await load("view")];
const fails = (error) => { throw error; };
const context = {
    identifier: "m.onnx", stream: new base.BinaryStream(fs.readFileSync(file)), entries: new Map(), require: load, error: fails,
    asset: (name) => fs.readFileSync(`${folder}/${name}`, "utf-8"),
};
const host = { environment: () => undefined, require: load, event() {}, exception: fails };
const model = await new view.ModelFactoryService(host).open(context);
const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
const nodes = (graph) => sum(graph.nodes.map((n) => 1 + sum(n.attributes.map((a) => a.value?.nodes ? nodes(a.value) : 0))));
console.log(sum(model.modules.map(nodes)));
"""


def netron(source: Path, path: Path) -> None:
    """Its reader of models, run in Node.js without the page; sees every node, those in bodies too, or this raises."""
    import netron

    if shutil.which("node") is None:
        raise RuntimeError("Node.js is not here, in which netron's reader runs")
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "netron"
        shutil.copytree(Path(netron.__file__).parent, own)
        (own / "package.json").write_text('{"type": "module"}')
        script = Path(folder) / "read.mjs"
        script.write_text(_READS)
        done = subprocess.run(["node", script, own, source], capture_output=True, text=True)
    there = sum(len(g.node) for g in graphs(onnx.load(source).graph))
    if done.returncode or int(done.stdout) != there:
        raise RuntimeError(f"netron read {done.stdout.strip() or 'nothing'} of {there} nodes; {done.stderr.strip()[-200:]}")
    shutil.copyfile(source, path)


# -- parts and wholes --------------------------------------------------------------------------------------------------------------------


def unchanging(features: int) -> pn.Linear:
    head = pn.Linear(features, features)
    head.load_state_dict({"weight": np.eye(features, dtype=np.float32), "bias": np.zeros(features, np.float32)})
    return head


def with_head(layer: pn.Layer) -> pn.Layer:
    features = layer.hidden_size * layer.num_directions if isinstance(layer, Recurrent) else HIDDEN
    return pn.Sequential(layer, unchanging(features))


def merged(source: Path, path: Path, **keywords: Any) -> None:
    """Behind `y` a `Linear` that leaves everything as it is, so that the results are to be the same."""
    first = onnx.load(source)
    y = next(o for o in first.graph.output if o.name.rpartition("/")[2] == "y")
    dims = [d.dim_param or d.dim_value for d in y.type.tensor_type.shape.dim]
    head = unchanging(dims[-1])
    opset = first.opset_import[0].version
    second = pn.export(head, None, target=target_of(first), opset=opset, input_shape=tuple(dims), **keywords).model
    assert second is not None
    prefixes = {} if keywords else {"prefix1": "body/", "prefix2": "head/"}
    onnx.save(onnx.compose.merge_models(first, second, [(y.name, second.graph.input[0].name)], **prefixes), path)


def merged_by_recipe(source: Path, path: Path) -> None:
    merged(source, path, prefix="head/")


def extracted(source: Path, path: Path) -> None:
    model = onnx.load(source)
    onnx.utils.extract_model(source, path, [i.name for i in model.graph.input], [o.name for o in model.graph.output])


def extracted_with_metadata(source: Path, path: Path) -> None:
    extracted(source, path)
    part = onnx.load(path)
    part.metadata_props.extend(onnx.load(source).metadata_props)
    onnx.save(part, path)


_DYNAMIC = ("quantize_dynamic", ("onnxruntime",))
_STATIC = ("quantize_static", ("onnxruntime",))
_HALF = "float16 converters"
_SUBGRAPH: dict[str, Any] = {"extra_options": {"EnableSubgraph": True}}

TOOLS = (
    Tool("onnxsim", "onnxsim", ("onnxsim",), onnxsim()),
    Tool("onnxsim, include_subgraph", "onnxsim", ("onnxsim",), onnxsim(include_subgraph=True)),
    Tool("onnxslim", "onnxslim", ("onnxslim",), edited(onnxslim)),
    Tool("onnxoptimizer", "onnxoptimizer", ("onnxoptimizer",), edited(onnxoptimizer)),
    Tool("onnxscript.optimizer", "onnxscript's optimizer", ("onnxscript",), edited(onnxscript)),
    Tool("onnxruntime saves, basic", "onnxruntime's optimizer", ("onnxruntime",), onnxruntime_saves("BASIC")),
    Tool("onnxruntime saves, all", "onnxruntime's optimizer", ("onnxruntime",), onnxruntime_saves("ALL")),
    Tool("quantize_dynamic", *_DYNAMIC, quantize_dynamic(), "int8"),
    Tool("quantize_dynamic, EnableSubgraph", *_DYNAMIC, quantize_dynamic(**_SUBGRAPH), "int8"),
    Tool("quantize_dynamic, EnableSubgraph, reduce_range", *_DYNAMIC, quantize_dynamic(reduce_range=True, **_SUBGRAPH), "int8"),
    Tool("quantize_static", *_STATIC, quantize_static, "int8"),
    Tool("nncf.quantize", "nncf", ("nncf",), nncf, "int8"),
    Tool('`export(quantize="int8")` instead', "quantize_dynamic", (), portnorm_int8, "int8"),
    Tool("onnxruntime float16", _HALF, ("onnxruntime",), float16("onnxruntime"), "float16"),
    Tool("onnxruntime float16, keep_io_types", _HALF, ("onnxruntime",), float16("onnxruntime", keep_io_types=True), "float16"),
    Tool("onnxruntime float16, keep_io_types, sorted", _HALF, ("onnxruntime",), float16_sorted, "float16"),
    Tool("onnxconverter-common float16", _HALF, ("onnxconverter-common",), float16("onnxconverter-common"), "float16"),
    Tool(
        "onnxconverter-common float16, keep_io_types",
        _HALF,
        ("onnxconverter-common",),
        float16("onnxconverter-common", keep_io_types=True),
        "float16",
    ),
    Tool("onnxmltools float16", _HALF, ("onnxmltools",), float16("onnxmltools"), "float16"),
    Tool('`export(dtype="float16")` instead', _HALF, (), portnorm_float16, "float16"),
    Tool("version_converter, 2 up", "version_converter", ("onnx",), converted(2)),
    Tool("version_converter, 1 down", "version_converter", ("onnx",), converted(-1)),
    Tool("external data, from 0 bytes", "external data", ("onnx",), outside(0)),
    Tool("external data, from 64 bytes", "external data", ("onnx",), outside(64)),
    Tool("convert_onnx_models_to_ort", "ORT format", ("onnxruntime",), ort_format, suffix=".ort"),
    Tool("netron", "netron", ("netron",), netron),
    Tool("compose.add_prefix", "onnx.compose", ("onnx",), edited(lambda model: onnx.compose.add_prefix(model, "body/"))),
    Tool("compose.merge_models", "onnx.compose", ("onnx",), merged, outputs={"y": "head/y"}, whole=with_head),
    Tool(
        "compose.merge_models, exported with a prefix",
        "onnx.compose",
        ("onnx",),
        merged_by_recipe,
        keywords={"prefix": "body/"},
        outputs={"y": "head/y"},
        prefix="body/",
        whole=with_head,
    ),
    Tool("utils.extract_model", "onnx.utils.extract_model", ("onnx",), extracted),
    Tool("utils.extract_model, metadata copied", "onnx.utils.extract_model", ("onnx",), extracted_with_metadata),
)
"""In the order of the table."""
