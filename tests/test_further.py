"""Targets whose runtimes have an environment of their own: what their graphs have and have not; how such a runtime is found and started.

What the runtimes make of the graphs is measured by `make runtimes-more`; its table is held by `test_further_table.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, shape_inference

import portnorm as pn
from benchmarks.further import KINDS, goes_back, shape_of
from portnorm_onnx import elsewhere, frames
from portnorm_onnx.build import Names
from portnorm_onnx.elsewhere import ENGINES, VARIABLE, version_of, worker_of
from portnorm_onnx.export import Shape, trace
from portnorm_onnx.metadata import on_numpy
from portnorm_onnx.runtimes import FURTHER, RUNTIMES
from portnorm_onnx.signature import batch_axis, checked_dims, time_axis
from portnorm_onnx.targets import TARGETS, Target, check_dims
from portnorm_onnx.workers import Worker

FURTHER_TARGETS = {name: row for name, row in TARGETS.items() if row.further}
RECURRENT = ("LSTM", "GRU", "RNN")


def graphs(row: Target) -> Iterator[tuple[str, onnx.ModelProto]]:
    """The graph of every kind of layer, of a step and of a sequence, where the target takes it."""
    for name, kind in ((name, kind) for name, kind in KINDS.items() if not kind.mean):
        layer = on_numpy(kind.make(), "float32")
        for way in ("step", "fixed", "batch open"):
            if way == "step" and (not layer.recurrent or goes_back(layer)):
                continue
            dims = checked_dims(layer, shape_of(kind, way), streaming=way == "step")
            try:
                check_dims(row, dims, batch=batch_axis(layer), time=time_axis(layer), streaming=way == "step")
                shape = Shape(row.opset, row, "float32", True, False, way == "batch open", False, dims, Names(), way == "step")
                yield f"{name}, {way}", trace(layer, shape)
            except pn.UnsupportedError:
                assert way == "batch open" or not row.sequences or row.lacks or row.flat_states


def products(graph: onnx.GraphProto) -> Iterator[tuple[onnx.NodeProto, set[str]]]:
    """Products of a graph and of the bodies in it, with the names of the weights beside them."""
    weights = {t.name for t in graph.initializer}
    for n in graph.node:
        if n.op_type in ("MatMul", "Gemm"):
            yield n, weights
        for a in n.attribute:
            if a.type == onnx.AttributeProto.GRAPH:
                yield from products(a.g)


@pytest.mark.parametrize("target", [name for name, row in FURTHER_TARGETS.items() if row.output_rows])
@pytest.mark.parametrize("norm", ["layer", "layer-gates", "batch-input-frame"])
def test_weights_lie_in_the_graph_as_in_the_layer(norm: Any, target: str) -> None:
    """A row for each output, whose values a product reads in order."""
    layer = pn.LSTM(3, 4, norm=norm, rng=0).to(dtype="float32")
    proto = pn.export(layer, None, target=target, streaming=True, input_shape=(1, 3)).model  # type: ignore[arg-type]
    assert proto is not None
    found = [n for n, _ in products(proto.graph)]
    assert [n.op_type for n in found] == ["Gemm", "Gemm"]
    assert all(helper.get_node_attr_value(n, "transB") == 1 for n in found)
    held = {t.name: list(t.dims) for t in proto.graph.initializer}
    assert [held[n.input[1]] for n in found] == [[16, 3], [16, 4]]


@pytest.mark.parametrize("target", FURTHER_TARGETS)
def test_a_graph_has_nothing_that_its_target_does_not_take(target: str) -> None:
    row, seen = FURTHER_TARGETS[target], 0
    for title, proto in graphs(row):
        seen += 1
        graph = proto.graph
        known = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        inferred = shape_inference.infer_shapes(proto, data_prop=True).graph
        dims = {
            v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim] for v in (*inferred.value_info, *inferred.output)
        }
        made = {name: n.op_type for n in graph.node for name in n.output}
        types = {n.op_type for n in graph.node}
        assert not types & (row.without | row.lacks | ({"Scan"} if not row.loops or row.as_loop else set())), title
        assert row.fused or not types & set(RECURRENT), title
        assert proto.opset_import[0].version <= row.last_opset, title
        for v in graph.input:
            shape = [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim]
            assert row.scalars or shape, title
            assert row.open_shapes or all(isinstance(d, int) for d in shape), title
            assert not row.flat_states or len(shape) < 3 or not v.name.endswith("_0"), title
        begun = [start for n in graph.node if n.op_type == "Loop" for start in n.input[2:]]
        assert len({*begun}) == len(begun), f"{title}: states that begin as one value"
        for n in graph.node:
            given = {a.name: helper.get_attribute_value(a) for a in n.attribute}
            if n.op_type in RECURRENT:
                assert list(n.input[4:5]) in ([], [""]), f"{title}: sequence_lens"
                assert given.get("direction", b"forward") == b"forward", title
                assert row.resets_before or n.op_type != "GRU" or given["linear_before_reset"] == 1, title
                assert not row.fused_start or not any(end in known for end in n.input[5:7]), f"{title}: a first state that is known"
            if n.op_type == "Slice" and len(n.input) == 5:
                assert row.backward_slices or known[n.input[4]].min() > 0, title
            if n.op_type == "Where" and not row.where_broadcasts:
                last = n.input[2]
                lengths = list(known[last].shape) if last in known else dims[last]
                assert set(lengths) <= {1} or lengths == dims[n.output[0]], f"{title}: {lengths} for {dims[n.output[0]]}"
            if n.op_type == "LayerNormalization":
                assert not row.biased_norms or len(n.input) == 3, title
                scale = known[n.input[1]].ndim if n.input[1] in known else 1
                assert not row.one_axis or scale == 1, title
            if n.op_type in row.one_pass:
                assert made.get(n.input[0]) == "Sub", f"{title}: not centred"
            if row.flat_states:
                assert n.op_type != "Identity", title
        if row.output_rows:
            assert not [n.name for n, weights in products(graph) if n.op_type == "MatMul" and n.input[1] in weights], title
    assert seen > 10


@pytest.mark.parametrize("target", FURTHER_TARGETS)
def test_a_graph_is_checked_in_onnxruntime_and_holds_its_layer(target: Any, tmp_path: Path) -> None:
    """Whether the runtime of the target is there or not."""
    step = pn.LSTM(3, 4, norm="layer", rng=0)
    assert pn.export(step, tmp_path / "m.onnx", target=target, streaming=True, input_shape=(1, 3)).steps[0].runtime == "onnxruntime"
    layers = [(tmp_path / "m.onnx", step)]
    if TARGETS[target].sequences:
        both = pn.GRU(3, 4, norm="layer", bidirectional=True, rng=0)
        layers.append((tmp_path / "both.onnx", both))
        assert pn.export(both, tmp_path / "both.onnx", target=target, input_shape=(4, 2, 3)).trajectories
    for path, layer in layers:
        again = pn.load(path)
        for name, array in layer.state_dict().items():
            np.testing.assert_array_equal(again.state_dict()[name], array)
        assert pn.verify(path).outcomes[0].status == "passed"


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "an open length": (
        "litert",
        {},
        r"target 'litert' takes fixed shapes only; 'time', 'batch' of `x` is open: .*`input_shape`, as \(20, 1, 3\)",
    ),
    "an open batch of a step": ("c", {"streaming": True}, r"target 'c' takes fixed shapes only; 'batch' of `x` is open: .* as \(1, 3\)"),
    "a sequence": ("ncnn", {"input_shape": (5, 1, 3)}, "target 'ncnn' takes one step at a time; export with `streaming=True`"),
    "two sequences": (
        "ncnn",
        {"streaming": True, "input_shape": (2, 3)},
        "target 'ncnn' takes one sequence; `input_shape` has a batch of 2",
    ),
    "open steps": ("mnn", {}, r"target 'mnn', which has no loop, writes every step out, but their number is open \('time'\)"),
    "another type": ("tvm", {"dtype": "float64"}, "`target` 'tvm' does not compute in float64"),
    "a later opset": ("iree", {"opset": 23}, "`opset` is 23; expected a number from 17 to 18 for target 'iree'"),
    "integers": ("mnn", {"quantize": "int8", "input_shape": (5, 1, 3)}, "target 'mnn' has no MatMulInteger"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_target_does_not_take_is_refused_with_the_way_out(case: str) -> None:
    target, keywords, message = REFUSED[case]
    with pytest.raises(pn.UnsupportedError, match=message):
        pn.export(pn.LSTM(3, 4, norm="layer", rng=0), None, target=target, **keywords)


@pytest.mark.parametrize("target", [name for name, row in FURTHER_TARGETS.items() if not row.open_shapes])
def test_open_lengths_are_refused(target: Any) -> None:
    for layer in (pn.LayerNorm(3), pn.BatchNorm(3)):
        with pytest.raises(
            pn.UnsupportedError, match=rf"target '{target}' takes fixed shapes only; 'batch' of `x` is open: .* as \(1, 3\)"
        ):
            pn.export(layer, None, target=target)


def test_an_operator_that_is_lacking_is_named() -> None:
    with pytest.raises(pn.UnsupportedError, match=r"target 'ncnn' has no Gather \(node 'Gather_0'\)"):
        pn.export(pn.LSTM(3, 4, norm="batch", t_max=4, rng=0), None, target="ncnn", streaming=True, input_shape=(1, 3))
    with pytest.raises(pn.UnsupportedError, match=r"target 'ncnn' takes states of one layer, \(batch, features\), and this one has 2"):
        pn.export(pn.LSTM(3, 4, num_layers=2, rng=0), None, target="ncnn", streaming=True, input_shape=(1, 3))


# -- environments -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No environment but those that a test makes in this folder."""
    monkeypatch.setattr(Worker, "_running", {})
    monkeypatch.setattr(elsewhere.sys, "prefix", str(tmp_path / "own" / ".venv"))
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def environment(folder: Path, engine: str, python: str) -> Path:
    """One that has the packages of an engine, by their names, and an interpreter."""
    for package in ENGINES[engine].packages:
        about = folder / "lib" / "python3.11" / "site-packages" / f"{package.replace('-', '_')}-1.2.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
    (folder / "bin").mkdir()
    (folder / "bin" / "python").write_text(f"#!/bin/sh\n{python}\n")
    (folder / "bin" / "python").chmod(0o755)
    return folder


@pytest.mark.parametrize("name", ENGINES)
def test_a_runtime_that_is_in_no_environment_says_how_it_is_installed(name: str, nowhere: Path) -> None:
    with pytest.raises(
        pn.MissingExtraError, match=f"{ENGINES[name].packages[0]} is not installed: `make runtimes-more` .* {VARIABLE} names"
    ):
        FURTHER[name].version()


@pytest.mark.parametrize("way", ["variable", "working directory", "beside"])
def test_a_runtime_is_found(way: str, nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = {
        "variable": nowhere / "a",
        "working directory": nowhere / ".venv-more-phones",
        "beside": nowhere / "own" / ".venv-accuracy-x",
    }[way]
    folder.mkdir(parents=True)
    environment(folder, "mnn", "exit 3")
    if way == "variable":
        monkeypatch.setenv(VARIABLE, f"{nowhere / 'missing'}:{folder}")
    assert version_of("mnn") == "1.2"
    with pytest.raises(pn.MissingExtraError):
        version_of("ncnn")


def test_a_process_that_ends_is_an_error_and_others_go_on(nowhere: Path, tmp_path: Path) -> None:
    """Where a graph ends the process of its runtime, this one lives."""
    environment(nowhere / ".venv-more-phones", "mnn", "echo 'an error: no luck' >&2; exit 3")
    path = tmp_path / "m.onnx"
    pn.export(pn.LSTM(3, 4, norm="layer", rng=0), path, target="mnn", streaming=True, input_shape=(1, 3))
    with pytest.raises(pn.ExportError, match="mnn does not load the graph: its process ended with 3: an error: no luck"):
        pn.verify(path, runtimes="mnn")
    assert pn.verify(path).outcomes[0].status == "passed"


def test_a_process_that_gives_no_answer_can_be_ended(nowhere: Path) -> None:
    environment(nowhere / ".venv-more-phones", "mnn", "exec sleep 60")
    model = pn.export(pn.LayerNorm(3), None, target="mnn").model
    assert model is not None
    timer = threading.Timer(0.3, lambda: Worker.end("mnn"))
    timer.start()
    with pytest.raises(pn.ExportError, match="mnn does not load the graph: its process ended with -9"):
        FURTHER["mnn"].load(model.SerializeToString())
    timer.join()


def test_a_bare_environment_runs_graphs(nowhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker needs NumPy, onnx and the runtime; portnorm is not to be imported there. Here it is the onnxruntime of the tests."""
    (tmp_path / "portnorm.py").write_text("raise ImportError('portnorm is not here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    layer = pn.LSTM(3, 4, norm="layer", rng=0)
    model = pn.export(layer, None, streaming=True, input_shape=(1, 3)).model
    assert model is not None
    x = np.random.default_rng(0).standard_normal((5, 1, 3)).astype("float32")
    zeros = {name: np.zeros((1, 1, 4), np.float32) for name in ("h_0", "c_0")}
    worker = worker_of("onnxruntime")
    found = worker.load_looped(model.SerializeToString(), {"h_n": "h_0", "c_n": "c_0"})({"x": x, **zeros})
    np.testing.assert_allclose(found["y"], layer(x)[0], atol=2e-6)
    assert found["microseconds"].shape == (frames.TURNS,)
    with pytest.raises(pn.ExportError, match=r"onnxruntime does not run the graph: .*h_0"):
        worker.load(model.SerializeToString())({"x": x[0]})
    np.testing.assert_allclose(worker.load(model.SerializeToString())({"x": x[0], **zeros})["y"], layer(x)[0][0], atol=2e-6)


def test_a_session_may_have_a_loop_of_its_own() -> None:
    def session(given: Any) -> Any:
        raise AssertionError("its own loop is asked")

    session.steps = lambda given, fed: given["x"] + len(fed)  # type: ignore[attr-defined]
    found = frames.looped(session, {"x": np.zeros((4, 2))}, {"h_n": "h_0"})
    np.testing.assert_array_equal(found["y"], np.ones((4, 2)))


def test_the_tables_name_the_same_runtimes() -> None:
    assert {*FURTHER} == {*ENGINES}
    assert not {*FURTHER} & {*RUNTIMES}
    assert {runtime for row in FURTHER_TARGETS.values() for runtime in row.runtimes} == {
        n for n in ENGINES if not n.startswith("onnxruntime-")
    }
