"""Graphs that tools can carry: numbers for lengths leave nothing to compute, bodies own what they read, outputs are read by nobody."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import compose, helper, utils

import portnorm as pn
from portnorm.__main__ import main
from portnorm.checkpoint.onnx_constants import graphs
from portnorm_onnx.runtimes import RUNTIMES
from tests.cases import HEAVY_PRESETS, random_recurrent

OF_LENGTHS = {"Shape", "Size", "ConstantOfShape", "Range"}
STEPS, BATCH, INPUTS = 5, 2, 3
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "whole, in both directions": ({"bidirectional": True}, {"lengths": False}),
    "ragged, in both directions": ({"bidirectional": True}, {}),
    "with a mask, backwards": ({"direction": "reverse"}, {"mask": True}),
    "stacked, batch first, from a state": ({"num_layers": 2, "batch_first": True}, {"state": True}),
    "last step, from a state": ({"return_sequences": False}, {"state": True}),
    "one step": ({}, {"streaming": True}),
    "one step of a stack": ({"num_layers": 2}, {"streaming": True}),
}


def shape_of(layer: Any, keywords: dict[str, Any], steps: int | str, batch: int | str) -> tuple[int | str, ...]:
    if keywords.get("streaming"):
        return batch, INPUTS
    return (batch, steps, INPUTS) if layer.batch_first else (steps, batch, INPUTS)


def exported(cell: str, norm: Any, form: str, rng: np.random.Generator, steps: Any = "time", batch: Any = "batch", **more: Any) -> Any:
    options, keywords = FORMS[form]
    layer = random_recurrent(cell, norm, rng, INPUTS, 4, **options).to(dtype="float32")
    return pn.export(layer, None, input_shape=shape_of(layer, keywords, steps, batch), **keywords, **more)


def operators(model: onnx.ModelProto) -> set[str]:
    return {n.op_type for graph in graphs(model.graph) for n in graph.node}


# -- lengths that are numbers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["portable", pytest.param("onnxruntime", marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("cell", "norm"), HEAVY_PRESETS)
def test_numbers_for_lengths_leave_none_to_be_computed(cell: str, norm: Any, form: str, target: Any, rng: np.random.Generator) -> None:
    report = exported(cell, norm, form, rng, STEPS, BATCH, target=target)
    assert not OF_LENGTHS & operators(report.model)
    assert not outputs_that_are_read(report.model)
    for value in (*report.model.graph.input, *report.model.graph.output):
        assert not any(d.dim_param for d in value.type.tensor_type.shape.dim)
    shape = tuple(d.dim_value for d in report.model.graph.input[0].type.tensor_type.shape.dim)
    compared = {c.case.partition(")")[0] for c in report.trajectories}
    assert form.startswith("one step") or compared == {f"x {shape}"[:-1]}


@pytest.mark.parametrize(("steps", "batch"), [(STEPS, "batch"), ("time", BATCH), (1, 1)])
@pytest.mark.parametrize("form", FORMS)
def test_one_number_is_a_number(form: str, steps: Any, batch: Any, rng: np.random.Generator) -> None:
    for norm in ("layer", "batch"):
        model = exported("GRU", norm, form, rng, steps, batch).model
        found = {d.dim_param for v in model.graph.input for d in v.type.tensor_type.shape.dim} - {""}
        assert found == {d for d in (steps, batch) if isinstance(d, str)} - ({"time"} if "one step" in form else set())


@pytest.mark.parametrize(
    "runtime",
    [pytest.param(n, marks=pytest.mark.runtime(n)) for n in RUNTIMES if n not in ("onnxruntime", "reference", "openvino-default")],
)
@pytest.mark.parametrize("form", FORMS)
def test_other_runtimes_run_them(form: str, runtime: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """The numbers of a graph's steps are constants then; the gate has no count to set."""
    options, keywords = FORMS[form]
    for cell, norm in (("LSTM", None), ("LSTM", "layer"), ("GRU", "batch")):
        layer, path = random_recurrent(cell, norm, rng, INPUTS, 4, **options).to(dtype="float32"), tmp_path / "m.onnx"
        for opset, steps in ((17, STEPS), (18, STEPS), (18, 1)):
            pn.export(layer, path, input_shape=shape_of(layer, keywords, steps, BATCH), opset=opset, **keywords)
            assert pn.verify(path, layer, runtimes=[runtime]).outcomes[0].status == "passed"


@pytest.mark.parametrize("text", ["batch=2", "2,3"])
def test_a_step_of_so_many_sequences_on_the_command_line(text: str, tmp_path: Path) -> None:
    pn.save(pn.LSTM(INPUTS, 4, norm="batch", rng=0), tmp_path / "m.safetensors")
    out = tmp_path / "m.onnx"
    assert main(["export", str(tmp_path / "m.safetensors"), "-o", str(out), "--shape", text, "--streaming"]) == 0
    assert not OF_LENGTHS & operators(onnx.load(out))


@pytest.mark.peers
@pytest.mark.parametrize("given", ["x", "lengths", "mask", "streaming"])
@pytest.mark.parametrize(("cell", "norm"), [("LSTM", None), ("LSTM", "batch"), ("GRU", "layer")])
def test_a_model_of_torch_with_fixed_lengths(cell: str, norm: Any, given: str) -> None:
    """Where `dynamic_shapes` leaves nothing open."""
    import torch

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = pn.torch_module(getattr(pn, cell)(INPUTS, 4, norm=norm, bidirectional=given != "streaming", rng=0))
            self.head = torch.nn.Linear(4 if given == "streaming" else 8, 2)

        def forward(self, x: Any, counted: Any = None) -> Any:
            y, state = self.rnn(x, **({} if counted is None else {given: counted}))
            return self.head(y), self.head(state[0][-1]) if given == "streaming" else y

    counted = {"lengths": torch.tensor([5, 3]), "mask": torch.arange(10).reshape(5, 2) % 3 > 0}
    args = (torch.randn(STEPS, BATCH, INPUTS), *([counted[given]] if given in counted else []))
    model = pn.export_torch(Model(), args, None, streaming=given == "streaming").model
    assert model is not None
    assert not OF_LENGTHS & operators(model)
    assert not outputs_that_are_read(model)


# -- bodies and outputs ------------------------------------------------------------------------------------------------------------------


def outputs_that_are_read(model: onnx.ModelProto) -> set[str]:
    return {o.name for o in model.graph.output} & {name for graph in graphs(model.graph) for n in graph.node for name in n.input}


def read_from_outside(model: onnx.ModelProto) -> Iterator[str]:
    """What bodies read of the graph around them."""
    for body in list(graphs(model.graph))[1:]:
        own = {v.name for v in (*body.input, *body.initializer)} | {name for n in body.node for name in n.output}
        yield from (name for n in body.node for name in n.input if name and name not in own)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("cell", "norm"), [("LSTM", None), ("LSTM", "layer"), ("LSTM", "batch"), ("GRU", "layer")])
def test_no_output_is_read_and_no_body_reads_constants_outside(cell: str, norm: Any, form: str, rng: np.random.Generator) -> None:
    for target in ("portable", "onnxruntime"):
        model = exported(cell, norm, form, rng, target=target).model
        assert not outputs_that_are_read(model)
        assert not {*read_from_outside(model)} & {t.name for t in model.graph.initializer}
        assert not [n.op_type for n in model.graph.node if n.op_type == "Identity" and n.input[0] in {o.name for o in model.graph.output}]


def of_two_places(norm: str) -> pn.Layer:
    """One layer at two places, with weights that are no vectors."""
    layer = pn.LSTM(160, 160, norm=norm, rng=0)  # type: ignore[arg-type]
    return pn.Sequential(layer, layer)


MODELS = {
    "BN-LSTM": lambda: pn.LSTM(INPUTS, 8, norm="batch", rng=0),
    "LN-GRU": lambda: pn.GRU(INPUTS, 8, norm="layer", rng=0),
    "loops that are alike": lambda: pn.LSTM(INPUTS, 8, norm="layer", num_layers=2, bidirectional=True, rng=0),
    "a layer at two places": lambda: of_two_places("layer"),
    "its statistics": lambda: of_two_places("batch"),
}


@pytest.mark.parametrize(("target", "external"), [("portable", False), ("onnxruntime", False), ("onnxruntime", True)])
@pytest.mark.parametrize("name", MODELS)
def test_what_onnx_makes_of_a_graph_computes_the_same(name: str, target: Any, external: bool, tmp_path: Path) -> None:
    """Names with a prefix, and the part of all that there is; also where weights are in a file of their own.

    Graphs for browsers do not hold those inside of a loop.
    """
    layer, path, part = MODELS[name](), tmp_path / "m.onnx", tmp_path / "part.onnx"
    model = pn.export(layer, path, target=target, external_data=external).model
    assert model is not None
    feed = {"x": np.random.default_rng(0).standard_normal((4, 2, layer.input_dims()[-1]), "float32"), "lengths": np.array([4, 2])}
    utils.extract_model(path, part, ["x", "lengths"], ["y"])
    named = compose.add_prefix(onnx.load(path), "pre_")
    onnx.checker.check_model(named, full_check=True)
    given = {f"pre_{key}": a for key, a in feed.items()}
    results = [
        ort.InferenceSession(source, providers=["CPUExecutionProvider"]).run(None, inputs)[0]
        for source, inputs in ((str(path), feed), (str(part), feed), (named.SerializeToString(), given))
    ]
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])
    for key, a in pn.load(path).state_dict().items():
        np.testing.assert_array_equal(a, layer.state_dict()[key])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_a_centred_weight_is_stored(cell: str, dtype: str, tmp_path: Path) -> None:
    """For onnxruntime no mean is taken of it when the graph runs; and the layer's own is loaded, bit by bit."""
    layer, path = getattr(pn, cell)(INPUTS, 8, norm="layer", dtype=dtype, rng=0), tmp_path / "m.onnx"
    for keywords in ({}, {"streaming": True}, {"lengths": False, "input_shape": (4, 1, INPUTS), "unroll": True}):
        model = pn.export(layer, path, target="onnxruntime", **keywords).model
        assert model is not None
        known = {t.name for graph in graphs(model.graph) for t in graph.initializer}
        normalized = [n for graph in graphs(model.graph) for n in graph.node if n.op_type == "RMSNormalization"]
        assert bool(normalized) == (cell == "LSTM")  # the others have a shift there, or normalize a sum
        assert "ReduceMean" not in operators(model)
        products = {n.output[0]: n for graph in graphs(model.graph) for n in graph.node if n.op_type == "MatMul"}
        assert all(products[n.input[0]].input[1] in known for n in normalized)
        for key, a in pn.load(path).state_dict().items():
            np.testing.assert_array_equal(a, layer.state_dict()[key])
        assert pn.verify(path).outcomes[0].status == "passed"


# -- opset 17 ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keywords", [{}, {"accurate": True}, {"quantize": "int8"}, {"streaming": True}, {"mask": True}], ids=str)
@pytest.mark.parametrize("norm", [None, "layer", "layer-gates", "batch", "weight"])
def test_at_opset_17_axes_are_attributes_and_sizes_are_said(norm: Any, keywords: dict[str, Any]) -> None:
    report = pn.export(pn.LSTM(INPUTS, 8, norm=norm, rng=0), None, opset=17, **keywords)
    assert report.model is not None
    assert report.opset == 17
    nodes = [n for graph in graphs(report.model.graph) for n in graph.node]
    for n in nodes:
        assert n.op_type != "Split" or (len(n.input) == 2 and "num_outputs" not in {a.name for a in n.attribute})
        if n.op_type in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1"):
            assert len(n.input) == 1
            assert helper.get_node_attr_value(n, "axes")
    assert norm != "layer" or "Split" in {n.op_type for n in nodes}


def test_a_training_step_at_opset_17() -> None:
    model = pn.Sequential(pn.LSTM(INPUTS, 4, norm="batch", rng=0), pn.LayerNorm(4), pn.Linear(4, 2, rng=0))
    assert pn.export_training_step(model, pn.softmax_cross_entropy, pn.AdamW(0.1), None, clip=1.0, opset=17).opset == 17
