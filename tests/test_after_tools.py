"""Files that a tool has changed: what is loaded is what was saved, a right graph passes, and anything else is said by name."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper, version_converter

import portnorm as pn
from portnorm.__main__ import main
from portnorm.checkpoint.onnx_constants import graphs
from portnorm.layers.recurrent import Recurrent
from portnorm_onnx.kept import entry, restored
from portnorm_onnx.keys import props_of, set_props
from portnorm_onnx.packed import checksum
from portnorm_onnx.storage import weights_of
from tests.cases import HEAVY_PRESETS, LAYERS
from tests.test_export import lstm, recurrent
from tests.tolerances import MADE_SMALLER

TARGETS = ("portable", "onnxruntime")
Tool = Callable[[Path, Path], None]


def optimized(level: str) -> Tool:
    """What onnxruntime writes of a graph that it has optimized: constants are folded, nodes sorted anew."""

    def tool(source: Path, path: Path) -> None:
        options = ort.SessionOptions()
        options.optimized_model_filepath, options.log_severity_level = str(path), 4
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
        ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])

    return tool


def edited(change: Callable[[onnx.ModelProto], onnx.ModelProto | None]) -> Tool:
    def tool(source: Path, path: Path) -> None:
        model = onnx.load(source)
        onnx.save(change(model) or model, path)

    return tool


def replaced(model: onnx.ModelProto, names: dict[str, str]) -> None:
    for graph in graphs(model.graph):
        for n in graph.node:
            for k, name in enumerate(n.input):
                n.input[k] = names.get(name, name)
        for tensor in graph.initializer:
            tensor.name = names.get(tensor.name, tensor.name)


def deduplicated(model: onnx.ModelProto) -> None:
    """One tensor for all that are equal, as simplifiers do."""
    for graph in graphs(model.graph):
        known: dict[Any, str] = {}
        for t in list(graph.initializer):
            first = known.setdefault((t.data_type, tuple(t.dims), t.raw_data), t.name)
            if first != t.name:
                graph.initializer.remove(t)
                replaced(model, {t.name: first})


def renamed(model: onnx.ModelProto) -> None:
    replaced(model, {t.name: f"w{k}" for k, t in enumerate(weights_of(model.graph))})


def renamed_at_the_ends(model: onnx.ModelProto) -> None:
    """Inputs and outputs under other names, so that the places tell which is which."""
    names = {v.name: f"v{k}" for k, v in enumerate((*model.graph.input, *model.graph.output))}
    for value in (*model.graph.input, *model.graph.output):
        value.name = names[value.name]
    for n in model.graph.node:
        for ends in (n.input, n.output):
            ends[:] = [names.get(end, end) for end in ends]


def as_nodes(model: onnx.ModelProto) -> None:
    """Constant nodes in the place of initializers."""
    for graph in graphs(model.graph):
        for t in reversed(graph.initializer):
            graph.node.insert(0, helper.make_node("Constant", [], [t.name], value=t))
        del graph.initializer[:]


def outside(source: Path, path: Path) -> None:
    """Everything from 64 bytes on in a file of its own, also what lies in the body of a loop."""
    onnx.save_model(onnx.load(source), path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=64)


def upgraded(model: onnx.ModelProto) -> onnx.ModelProto:
    converted: onnx.ModelProto = version_converter.convert_version(model, model.opset_import[0].version + 2)
    return converted


def slimmed(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnxslim

    found: onnx.ModelProto = onnxslim.slim(model)
    return found


def folded_by_onnxscript(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnxscript import optimizer

    found: onnx.ModelProto = optimizer.optimize(model)
    return found


TOOLS: dict[str, Tool] = {
    "onnxruntime basic": optimized("BASIC"),
    "onnxruntime extended": optimized("EXTENDED"),
    "equal weights made one": edited(deduplicated),
    "folded, then made one": lambda source, path: (optimized("BASIC")(source, path), edited(deduplicated)(path, path))[1],
    "weights renamed": edited(renamed),
    "all names with a prefix": edited(lambda model: onnx.compose.add_prefix(model, "pre_")),
    "inputs and outputs renamed": edited(renamed_at_the_ends),
    "weights as nodes": edited(as_nodes),
    "external data": outside,
    "converted to a later opset": edited(upgraded),
    "printed and parsed": edited(lambda model: onnx.parser.parse_model(onnx.printer.to_text(model))),
}
"""Tools that leave every number as it is."""
PEERS: dict[str, Tool] = {"onnxslim": edited(slimmed), "onnxscript": edited(folded_by_onnxscript)}
SAME = [*TOOLS, *(pytest.param(name, marks=pytest.mark.peers) for name in PEERS)]


@functools.cache
def exported(cell: str, norm: str | None, target: Any) -> tuple[Recurrent, bytes]:
    """Every layer in two directions, so that the loops can change places."""
    layer = recurrent(cell, norm, bidirectional=True)
    model = pn.export(layer, None, target=target).model
    assert model is not None
    return layer, model.SerializeToString()


def after(tool: str, cell: str, norm: str | None, target: str, folder: Path) -> tuple[Recurrent, Path]:
    layer, data = exported(cell, norm, target)
    source, path = folder / "as_exported.onnx", folder / "m.onnx"
    source.write_bytes(data)
    {**TOOLS, **PEERS}[tool](source, path)
    return layer, path


def assert_same(back: pn.Layer, layer: pn.Layer) -> None:
    own, there = layer.state_dict(), back.state_dict()
    assert own.keys() == there.keys()
    for name, a in own.items():
        assert (a.dtype, a.shape, a.tobytes()) == (there[name].dtype, there[name].shape, there[name].tobytes()), name


@pytest.mark.parametrize("tool", SAME)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("cell", "norm"), HEAVY_PRESETS)
def test_a_tool_that_changes_no_number(cell: str, norm: str | None, target: str, tool: str, tmp_path: Path) -> None:
    """What is loaded is what was saved, bit by bit, and both gates pass: every step, at its own statistics."""
    layer, path = after(tool, cell, norm, target, tmp_path)
    assert_same(pn.load(path), layer)
    report = pn.verify(path, layer) if target == "portable" else pn.verify(path)
    assert report.steps
    assert all("as the first" not in c.case for c in report.steps)


@pytest.mark.parametrize("tool", [t for t in SAME if t != "external data"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("keywords", [{"norm": "layer"}, {"norm": "batch", "t_max": 3}, {"norm": "weight"}, {"norm": None}], ids=str)
def test_fresh_layers_whose_gains_are_ones_and_shifts_zeros(keywords: Any, target: Any, tool: str, tmp_path: Path) -> None:
    """Equal weights become one, and adding 0 is left out: the numbers are loaded all the same."""
    layer, source, path = pn.LSTM(5, 8, **keywords, rng=0), tmp_path / "source.onnx", tmp_path / "m.onnx"
    pn.export(layer, source, target=target)
    {**TOOLS, **PEERS}[tool](source, path)
    assert_same(pn.load(path), layer)
    pn.verify(path, layer)


def test_layers_of_several_counts_after_folding(tmp_path: Path) -> None:
    """Two layers count their steps, a third has none; the count of each is a constant that a folder takes away."""
    second = recurrent("GRU", "batch", bidirectional=True)
    model = pn.Sequential(lstm("batch"), pn.Linear(8, 5, rng=0), second, pn.LSTM(16, 3, rng=1))
    source, path = tmp_path / "source.onnx", tmp_path / "m.onnx"
    pn.export(model, source)
    optimized("BASIC")(source, path)
    assert "time_0" not in str([t.name for t in onnx.load(path).graph.initializer])
    pn.verify(path, model)
    assert_same(pn.load(path), model)


def spoiled_row(path: Path, row: int) -> None:
    """One row of the largest table of the graph a little off."""
    model = onnx.load(path)
    rows = {n.input[0] for n in model.graph.node if n.op_type == "Gather"}
    tensor = max((t for t in model.graph.initializer if t.name in rows), key=lambda t: len(t.raw_data))
    values = numpy_helper.to_array(tensor).copy()
    values[row] += 1e-4
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, path)


@pytest.mark.parametrize("row", range(4))
@pytest.mark.parametrize("tool", ["onnxruntime basic", "clamped in another way"])
def test_a_wrong_row_of_a_folded_table_is_found(tool: str, row: int, tmp_path: Path) -> None:
    layer, path = after("onnxruntime basic", "LSTM", "batch", "portable", tmp_path)
    if tool != "onnxruntime basic":
        edited(clamped_in_another_way)(path, path)
    spoiled_row(path, row)
    with pytest.raises(pn.ConformanceError, match="A tool has changed the file: nodes: Add"):
        pn.verify(path, layer)


def clamped_in_another_way(model: onnx.ModelProto) -> None:
    """min(a, b) as -max(-a, -b): where the number of a step was is not to be seen."""
    for k, n in reversed(list(enumerate(model.graph.node))):
        if n.op_type == "Min":
            less = [helper.make_node("Neg", [name], [f"{n.output[0]}_{name}"]) for name in n.input]
            made = [*less, helper.make_node("Max", [m.output[0] for m in less], [f"{n.output[0]}_max"])]
            back = helper.make_node("Neg", [f"{n.output[0]}_max"], [n.output[0]])
            model.graph.node.remove(n)
            for m in (back, *reversed(made)):
                model.graph.node.insert(k, m)


def test_a_count_that_is_nowhere_to_be_set(tmp_path: Path) -> None:
    """Then a step is compared with an eager one that is the first, and the report says so; the trajectory goes through all rows."""
    layer, path = after("onnxruntime basic", "LSTM", "batch", "portable", tmp_path)
    edited(clamped_in_another_way)(path, path)
    report = pn.verify(path, layer)
    assert [c.case for c in report.steps] == ["one step at each of 24, counted as the first"]


# -- numbers that are changed ------------------------------------------------------------------------------------------------------------


def narrow(source: Path, path: Path, **keywords: Any) -> None:
    """onnxruntime's converter, which puts the casts of inputs behind what reads them and leaves it to others to sort the nodes."""
    from onnxruntime.transformers import float16

    model = float16.convert_float_to_float16(onnx.load(source), **keywords)
    nodes, given = list(model.graph.node), {i.name for i in model.graph.input}
    nodes.sort(key=lambda n: not (n.op_type == "Cast" and n.input[0] in given))
    made = helper.make_graph(nodes, "g", model.graph.input, model.graph.output, model.graph.initializer)
    model.graph.CopyFrom(made)
    onnx.save(model, path)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("cell", "norm"), HEAVY_PRESETS)
def test_a_file_in_float16(cell: str, norm: str | None, target: str, keep: bool, tmp_path: Path) -> None:
    """Rounded weights are loaded with a warning that names them; no gate of float32 passes, one that was asked for does."""
    layer, data = exported(cell, norm, target)
    source, path = tmp_path / "source.onnx", tmp_path / "m.onnx"
    source.write_bytes(data)
    narrow(source, path, keep_io_types=keep)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        back = pn.load(path)
    other = [name for name, a in layer.state_dict().items() if not np.array_equal(back.state_dict()[name], a)]
    text = " ".join(str(w.message) for w in told if w.category is pn.ChangedFileWarning)
    assert all(f"{name} (float" in text for name in other)
    assert all(said in text for said in ("other numbers than were exported", "A tool has changed the file: ", "float16"))
    assert other or norm == "weight"  # small matrices are kept whole beside what is made of them
    for name, a in layer.state_dict().items():
        np.testing.assert_allclose(back.state_dict()[name], a, rtol=2**-10, atol=2**-10)
    with pytest.raises(pn.PortnormError, match=r"A tool has changed the file.*float16.*`tolerance=`"):
        pn.verify(path, layer)
    report = pn.verify(path, layer, tolerance=MADE_SMALLER["float16"])
    assert any("float16" in change for change in report.changes)
    assert "changed by a tool" in str(report)
    assert report.steps
    with warnings.catch_warnings(record=True):
        pn.verify(path, tolerance=MADE_SMALLER["float16"])
    with pytest.raises(pn.ConformanceError, match=r"at most 1e-07 is allowed"):
        pn.verify(path, layer, tolerance=1e-7)


@pytest.mark.parametrize("keywords", [{}, {"num_layers": 2}, {"bidirectional": True}], ids=str)
@pytest.mark.parametrize("norm", [None, "layer", "batch", "weight"])
def test_a_quantized_file(norm: str | None, keywords: dict[str, Any], tmp_path: Path) -> None:
    """Weights are integers, and their names are gone: the error says which, and what has happened."""
    from onnxruntime.quantization import quantize_dynamic

    layer, source, path = recurrent("LSTM", norm, **keywords), tmp_path / "source.onnx", tmp_path / "m.onnx"
    pn.export(layer, source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_dynamic(source, path, extra_options={"EnableSubgraph": True})
    with pytest.raises(pn.CheckpointError, match=r"does not hold weight_.*A tool has changed the file: .*int8"):
        pn.load(path)
    with pytest.raises(pn.ConformanceError, match=r"`tolerance=`"):
        pn.verify(path, layer)
    assert pn.verify(path, layer, tolerance=MADE_SMALLER["int8"]).steps


def test_a_weight_that_was_edited(tmp_path: Path) -> None:
    layer, path = lstm("layer"), tmp_path / "m.onnx"
    pn.export(layer, path)
    model = onnx.load(path)
    tensor = next(t for t in weights_of(model.graph) if t.name == "weight_hh_l0.T")
    values = numpy_helper.to_array(tensor) + np.float32(0.25)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, path)
    with pytest.warns(pn.ChangedFileWarning, match=r"what is loaded: weight_hh_l0 \(float32\)$"):
        back = pn.load(path)
    np.testing.assert_array_equal(back.state_dict()["weight_hh_l0"], values.T)


@pytest.mark.parametrize("keywords", [{"num_layers": 2}, {"bidirectional": True}], ids=str)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("cell", "norm"), HEAVY_PRESETS)
def test_a_prefix_leaves_several_loops_valid(cell: str, norm: str | None, target: str, keywords: dict[str, Any]) -> None:
    """Of a fresh layer, whose loops share what is alike."""
    model = pn.export(LAYERS[cell](3, 20, norm=norm, rng=0, **keywords), None, target=target).model  # type: ignore[arg-type]
    onnx.checker.check_model(onnx.compose.add_prefix(model, "pre_"), full_check=True)


def test_weights_come_back_as_they_lay(tmp_path: Path) -> None:
    pn.export(lstm("layer", num_layers=2), tmp_path / "m.onnx")
    assert all(a.flags.c_contiguous for a in pn.load(tmp_path / "m.onnx").state_dict().values())


def test_a_graph_that_a_tool_has_left_unsorted(tmp_path: Path) -> None:
    layer, path = lstm("layer"), tmp_path / "m.onnx"
    model = pn.export(layer, None).model
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))
    onnx.save(model, path)
    with pytest.raises(pn.ExportError, match="a tool has left the nodes in another order"):
        pn.verify(path, layer)


def test_changes_are_none_in_a_file_as_it_was_exported(tmp_path: Path) -> None:
    for k, keywords in enumerate(({}, {"function": True, "prefix": "p/"}, {"external_data": True}, {"streaming": True}, {"mask": True})):
        path = tmp_path / f"{k}.onnx"
        pn.export(lstm("batch"), path, **keywords)
        assert pn.verify(path).changes == ()


@pytest.mark.parametrize("tolerance", [-1.0, float("nan"), float("inf")])
def test_tolerances_that_are_none(tolerance: float, tmp_path: Path) -> None:
    pn.export(lstm(None), tmp_path / "m.onnx")
    with pytest.raises(pn.UnsupportedError, match="`tolerance` is"):
        pn.verify(tmp_path / "m.onnx", tolerance=tolerance)


# -- metadata ----------------------------------------------------------------------------------------------------------------------------

FORMS: list[dict[str, Any]] = [
    {},
    {"state": True},
    {"streaming": True, "prefix": "a/"},
    {"mask": True, "state": True, "prefix": "a."},
    {"lengths": False, "names": {"x": "frames", "y": "out"}},
    {"function": True, "prefix": "p/"},
    {"dtype": "float64"},
    {"external_data": True},
]


@pytest.mark.parametrize("keywords", FORMS, ids=str)
@pytest.mark.parametrize(("cell", "norm"), HEAVY_PRESETS)
def test_a_graph_alone(cell: str, norm: str | None, keywords: dict[str, Any], tmp_path: Path) -> None:
    """Without metadata the inputs are known by their places, and the file is checked against a model that is given."""
    layer, path = recurrent(cell, norm), tmp_path / "m.onnx"
    report = pn.export(layer, path, metadata=False, **keywords)
    assert report.model is not None
    assert not report.model.metadata_props
    again = pn.verify(path, layer)
    assert [c.case for c in again.steps] == [c.case for c in report.steps]
    for call in (pn.load, pn.verify):
        with pytest.raises(pn.CheckpointError, match=r"was not written by portnorm.export, or with `metadata=False`"):
            call(path)


def test_a_bfloat16_graph_alone(tmp_path: Path) -> None:
    layer = lstm("layer")
    pn.export(layer, tmp_path / "m.onnx", metadata=False, dtype="bfloat16", target="openvino")
    assert pn.verify(tmp_path / "m.onnx", layer, runtimes="rounded").steps


def trained(cell: str, norm: str | None, **keywords: Any) -> Any:
    """Of a size at which weights are most of the file, no two numbers alike."""
    rng = np.random.default_rng(0)
    layer = {"LSTM": pn.LSTM, "GRU": pn.GRU, "RNN": pn.RNN}[cell](32, 64, norm=norm, t_max=2, rng=0, **keywords)
    values = {n: (p * (1 + 0.3 * rng.standard_normal(p.shape)) + 0.01).astype(p.dtype) for n, p in layer.parameters().items()}
    buffers = {n: (b + rng.uniform(0.1, 1.0, b.shape)).astype(b.dtype) for n, b in layer.buffers.items()}
    layer.assign(values, buffers)
    return layer


@pytest.mark.parametrize(
    ("target", "dtype"),
    [("portable", d) for d in ("float16", "float32", "float64")] + [("onnxruntime", "float32"), ("openvino", "bfloat16")],
)
@pytest.mark.parametrize(("cell", "norm"), HEAVY_PRESETS)
def test_what_the_graph_holds_is_not_stored_twice(cell: str, norm: str | None, target: Any, dtype: str, tmp_path: Path) -> None:
    """Beside the graph there is at most a quarter of the matrices' bytes (a third in narrow types), and what is not among these."""
    layer, path = trained(cell, norm).to(dtype="float32" if dtype == "bfloat16" else dtype), tmp_path / "m.onnx"
    whole = pn.export(layer, path, target=target, dtype=dtype)
    alone = pn.export(layer, None, target=target, dtype=dtype, metadata=False)
    arrays = layer.state_dict()
    width = 2 if dtype in ("float16", "bfloat16") else 8 if dtype == "float64" else 4
    matrices = sum(a.size * width for n, a in arrays.items() if n.startswith("weight") and a.shape[-1] > 1)
    others = sum(a.nbytes for n, a in arrays.items() if not (n.startswith("weight") and a.shape[-1] > 1))
    assert whole.size - alone.size < matrices / (3 if width == 2 else 4) + 1.5 * others + 6000
    back = pn.load(path)
    if dtype != "bfloat16":
        assert_same(back, layer)


def test_external_weights_leave_the_model_small(tmp_path: Path) -> None:
    layer = pn.LSTM(64, 256, norm="weight", rng=0)
    layer.assign({n: p * np.float32(1.1) for n, p in layer.parameters().items()})
    pn.export(layer, tmp_path / "m.onnx", external_data=True, lengths=False)
    assert (tmp_path / "m.onnx").stat().st_size < sum(p.nbytes for p in layer.parameters().values()) / 8
    assert_same(pn.load(tmp_path / "m.onnx"), layer)


@pytest.mark.parametrize("metadata", [True, False])
@pytest.mark.parametrize("keywords", [{}, {"lengths": False}, {"mask": True}, {"target": "onnxruntime", "lengths": False}], ids=str)
@pytest.mark.parametrize("direction", ["forward", "reverse", "backwards"])
@pytest.mark.parametrize("norm", [None, "weight", "batch-input"])
def test_a_node_with_a_direction_around_it_is_not_imported(
    norm: str | None, direction: str, keywords: dict[str, Any], metadata: bool, tmp_path: Path
) -> None:
    """It is seen in the graph, whether or not the file says so: the node alone would be a layer that goes the other way."""
    pn.export(pn.GRU(3, 4, norm=norm, direction=direction, rng=0), tmp_path / "m.onnx", metadata=metadata, **keywords)
    if direction == "forward":
        assert pn.import_checkpoint(tmp_path / "m.onnx").config.get("direction") in (None, "forward")
        return
    with pytest.raises(pn.CheckpointError, match=r"goes from the last step to the first.*say direction=") as caught:
        pn.import_checkpoint(tmp_path / "m.onnx")
    other = {"reverse": "backwards", "backwards": "reverse"}[direction]
    assert f"direction={other!r} here" not in str(caught.value)
    assert pn.import_checkpoint(tmp_path / "m.onnx", direction=direction).config["direction"] == direction


def test_a_training_step_gives_the_model_back(tmp_path: Path) -> None:
    model = pn.Sequential(lstm("batch"), pn.Linear(8, 3, rng=0))
    for metadata in (True, False):
        report = pn.export_training_step(model, pn.mean_squared_error, pn.SGD(0.1), tmp_path / "t.onnx", metadata=metadata)
        assert report.model is not None
        assert bool(report.model.metadata_props) == metadata
        if metadata:
            assert_same(pn.load(tmp_path / "t.onnx"), model)
            with pytest.raises(pn.UnsupportedError, match="holds one update of training"):
                pn.verify(tmp_path / "t.onnx")
        else:
            with pytest.raises(pn.CheckpointError, match="was not written by"):
                pn.load(tmp_path / "t.onnx")


def test_one_of_merged_graphs_is_loaded_by_its_prefix(tmp_path: Path) -> None:
    first, second, path = lstm("layer"), pn.Linear(8, 3, rng=0), tmp_path / "m.onnx"
    parts = [
        pn.export(layer, None, prefix=prefix, **k).model for layer, prefix, k in ((first, "a/", {"lengths": False}), (second, "b/", {}))
    ]
    onnx.save(onnx.compose.merge_models(*parts, io_map=[("a/y", "b/x")]), path)
    with pytest.raises(pn.CheckpointError, match="`prefix=` says which"):
        pn.load(path)
    assert_same(pn.load(path, prefix="a/"), first)
    assert_same(pn.load(path, prefix="b/"), second)
    with pytest.raises(pn.CheckpointError, match="`prefix` is 'c/'"):
        pn.load(path, prefix="c/")
    pn.save(second, tmp_path / "m.safetensors")
    with pytest.raises(pn.UnsupportedError, match=r"no \.onnx file"):
        pn.load(tmp_path / "m.safetensors", prefix="a/")


def lifted(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights of bodies at the top, where some tools put them, under names with a prefix."""
    for body in list(graphs(model.graph))[1:]:
        model.graph.initializer.extend(body.initializer)
        del body.initializer[:]
    return onnx.compose.add_prefix(model, "pre_")


@pytest.mark.parametrize(
    ("cell", "norm", "keywords", "change", "told"),
    [
        ("LSTM", "layer", {}, lifted, r"renamed 'norm_ih_l0\.weight' but not where a loop reads it"),
        (
            "GRU",
            None,
            {"function": True},
            lambda model: onnx.compose.add_prefix(model, "pre_"),
            "renamed ONNX's own operator as it did the function of its name",
        ),
    ],
    ids=["lifted weights", "function"],
)
def test_names_that_compose_leaves_as_they_were(cell: str, norm: Any, keywords: Any, change: Any, told: str, tmp_path: Path) -> None:
    """The way out that is named, `prefix=`, gives a file that passes."""
    layer, path = recurrent(cell, norm), tmp_path / "m.onnx"
    pn.export(layer, path, **keywords)
    onnx.save(change(onnx.load(path)), tmp_path / "p.onnx")
    with pytest.raises(pn.ExportError, match=f"{told}.*`prefix=` of export"):
        pn.verify(tmp_path / "p.onnx", layer)
    pn.export(layer, path, prefix="pre_", **keywords)
    assert pn.verify(path).worst_step is not None


def test_a_graph_with_more_behind_the_layer(tmp_path: Path) -> None:
    made = pn.export(lstm("layer"), None, lengths=False).model
    kind = helper.make_tensor_value_info
    ends = [[kind(name, onnx.TensorProto.FLOAT, ["time", "batch", 8])] for name in ("q", "z")]
    behind = helper.make_graph([helper.make_node("Relu", ["q"], ["z"])], "behind", *ends)
    other = helper.make_model(behind, opset_imports=list(made.opset_import), ir_version=made.ir_version)
    onnx.save(onnx.compose.merge_models(made, other, io_map=[("y", "q")]), tmp_path / "m.onnx")
    with pytest.raises(pn.ExportError, match="of x, z, has 'y' inside: it holds more than the layer"):
        pn.verify(tmp_path / "m.onnx")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pn.save(lstm("layer"), tmp_path / "m.safetensors")
    saved, path, small = str(tmp_path / "m.safetensors"), tmp_path / "m.onnx", tmp_path / "small.onnx"
    assert main(["export", saved, "-o", str(path)]) == 0
    narrow(path, small)
    assert main(["verify", str(small), "--against", saved]) == 1
    assert "A tool has changed the file" in capsys.readouterr().err
    assert main(["verify", str(small), "--against", saved, "--tolerance", "0.05"]) == 0
    assert "changed by a tool: " in capsys.readouterr().out
    assert main(["export", saved, "-o", str(path), "--no-metadata", "--external-data"]) == 0
    assert not onnx.load(path, load_external_data=False).metadata_props
    assert main(["verify", str(path), "--against", saved]) == 0


# -- one array beside another ------------------------------------------------------------------------------------------------------------


class InMemory:
    def __init__(self, values: Any):
        self.values, self.shape = values, values.shape

    def read(self) -> Any:
        return self.values


def special(dtype: str) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    v = rng.standard_normal((40, 24)).astype(dtype)
    info, signs = np.finfo(dtype), v.copy()
    signs[3, ::2] = -0.0
    edges = v.copy()
    edges[1, :6] = [np.inf, -np.inf, np.nan, info.max, info.tiny, info.smallest_subnormal]
    return {"random": v, "negative zeros": signs, "edges": edges, "zero row": np.where(np.arange(40)[:, None], v, 0).astype(dtype)}


@pytest.mark.parametrize("case", special("float32"))
@pytest.mark.parametrize("rule", ["factor", "term", "neither"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_an_array_is_had_again_bit_by_bit(dtype: str, rule: str, case: str) -> None:
    v, rng = special(dtype)[case], np.random.default_rng(1)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wide = v.astype("float64")
        made = {"factor": wide * rng.uniform(0.5, 2.0, (40, 1)), "term": wide - wide.mean(axis=0), "neither": rng.standard_normal(v.shape)}
        w = InMemory(np.ascontiguousarray(made[rule].astype(dtype).T))
        kept = entry(v, False, {"w": w}, (), dtype)
        assert ("of" in kept) == (rule == "factor" or (rule == "term" and case != "edges"))
        back = restored(kept, lambda of, form, total, shape: w.read().T)
    assert back is not None
    assert (back.dtype, back.shape, back.tobytes()) == (v.dtype, v.shape, v.tobytes())
    assert checksum(back) == kept["sum"]


STATISTICS: dict[str, Callable[[Any, Any], None]] = {
    "random": lambda v, gain: None,
    "a step that never came": lambda v, gain: v.__setitem__(-1, 1.0),
    "no spread": lambda v, gain: v.__setitem__((slice(None), slice(6)), 0.5),
    "a gain of 0": lambda v, gain: gain.__setitem__(3, 0.0),
    "a NaN": lambda v, gain: v.__setitem__((2, 5), np.nan),
    "far from 0": lambda v, gain: v.__iadd__(50),
    "tiny": lambda v, gain: v.__imul__(1e-4),
}


@pytest.mark.parametrize("case", STATISTICS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_statistics_of_each_step_are_had_again_bit_by_bit(dtype: str, case: str) -> None:
    """Out of g / √(v + ε) and b - m·g / √(v + ε), which the graph looks up by step."""
    rng = np.random.default_rng(0)
    var, mean, gain = rng.uniform(0.1, 2.0, (40, 24)), rng.standard_normal((40, 24)), rng.uniform(0.5, 2.0, 24)
    STATISTICS[case](var, gain)
    STATISTICS[case](mean, gain)
    var, mean = var.astype(dtype), mean.astype(dtype)
    with np.errstate(all="ignore"):
        scale = gain / np.sqrt(var.astype("float64") + 1e-5)
        tables = {"scale": scale, "shift": rng.standard_normal(24) - mean * scale}
        weights = {name: InMemory(t.astype(dtype)[:, None]) for name, t in tables.items()}
    for rule, statistic in {"variance": var, "mean": mean}.items():
        kept = entry(statistic, False, weights, (), dtype)
        assert kept["rule"] == rule
        back = restored(kept, lambda of, form, total, shape: weights[of].read()[:, 0])
        assert back is not None
        assert back.tobytes() == statistic.tobytes()
        assert checksum(back) == kept["sum"]


@pytest.mark.parametrize("cell", [pn.LSTM, pn.GRU, pn.RNN], ids=lambda c: c.__name__)
def test_statistics_of_each_step_are_not_stored_twice(cell: Any, tmp_path: Path, rng: np.random.Generator) -> None:
    layer = cell(64, 128, norm="batch", rng=0)
    for _ in range(3):
        layer(rng.standard_normal((100, 8, 64), dtype=np.float32), training=True)
    sizes = [pn.export(layer, tmp_path / f"{metadata}.onnx", metadata=metadata).size for metadata in (True, False)]
    assert sizes[0] <= 1.12 * sizes[1]
    for name, a in pn.load(tmp_path / "True.onnx").state_dict().items():
        np.testing.assert_array_equal(a, layer.state_dict()[name])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("cell", "norm"), HEAVY_PRESETS)
def test_a_number_that_a_tool_has_changed_is_told_wherever_it_is(cell: str, norm: str | None, target: str, tmp_path: Path) -> None:
    """Also in what is made of weights that the file keeps beside, and in the body of a loop; where nothing was changed nothing is said."""
    _, data = exported(cell, norm, target)
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    pn.load(path)
    floats = [k for k, t in enumerate(weights_of(onnx.load_from_string(data).graph)) if t.data_type == onnx.TensorProto.FLOAT]
    assert len(floats) > 1
    for k in floats:
        model = onnx.load_from_string(data)
        tensor = list(weights_of(model.graph))[k]
        values = numpy_helper.to_array(tensor).copy()
        values.reshape(-1)[0] += 0.5
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        onnx.save(model, path)
        with pytest.warns(pn.ChangedFileWarning, match="holds other numbers than were exported"):
            pn.load(path)


@pytest.mark.parametrize("numbers", [None, [], "all", {"no such weight": "00000000"}], ids=str)
def test_what_is_recorded_of_numbers_may_be_anything(numbers: Any, tmp_path: Path) -> None:
    layer, path = pn.GRU(3, 4, norm="layer", rng=0), tmp_path / "m.onnx"
    pn.export(layer, path)
    model = onnx.load(path)
    props = props_of(model)
    props["portnorm.graph"] = json.dumps(json.loads(props["portnorm.graph"]) | {"numbers": numbers})
    set_props(model, props)
    onnx.save(model, path)
    for name, a in pn.load(path).state_dict().items():
        np.testing.assert_array_equal(a, layer.state_dict()[name])
