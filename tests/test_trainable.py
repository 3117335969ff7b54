"""Graphs for onnxruntime-training: parameters as they are, every input that a gradient takes, and refusals with a way out.

That a step of its is a step of ours is measured by `make ways-out`, in an environment of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

import portnorm as pn
from portnorm.__main__ import main
from portnorm_onnx.trainable import OPERATORS
from tests.tolerances import RECURRENT, relative

OPEN, FIXED = {"lengths": False}, {"lengths": False, "unroll": True, "input_shape": (3, "batch", 4)}
KINDS: dict[str, tuple[Callable[[], pn.Layer], dict[str, Any]]] = {
    "LSTM": (lambda: pn.LSTM(4, 6, rng=0), OPEN),
    "GRU in two directions": (lambda: pn.GRU(4, 6, num_layers=2, bidirectional=True, rng=0), {}),
    "weight-normed": (lambda: pn.LSTM(4, 6, norm="weight", rng=0), OPEN),
    "last step": (lambda: pn.LSTM(4, 6, num_layers=2, bidirectional=True, return_sequences=False, rng=0), {}),
    "with a mask": (lambda: pn.LSTM(4, 6, rng=0), {"mask": True}),
    "fixed": (lambda: pn.LSTM(4, 6, num_layers=2, rng=0), {"input_shape": (3, 2, 4), **OPEN}),
    "learned state": (lambda: pn.GRU(4, 6, learned_state=True, rng=0), OPEN),
    "one layer twice": (lambda: pn.Sequential(layer := pn.GRU(4, 4, rng=0), layer), OPEN),
    "LN-LSTM, every step": (lambda: pn.LSTM(4, 6, norm="layer", num_layers=2, rng=0), FIXED),
    "LN-GRU, every step": (lambda: pn.GRU(4, 6, norm="layer", rng=0), FIXED),
    "RNN, every step": (lambda: pn.RNN(4, 6, rng=0), FIXED),
    "LayerNorm": (lambda: pn.LayerNorm(4), {}),
    "norms without gains": (
        lambda: pn.Sequential(pn.LayerNorm(4, affine=False), pn.Linear(4, 4, rng=0), pn.LayerNorm(4, affine=False)),
        {},
    ),
    "RMSNorm": (lambda: pn.RMSNorm(4), {}),
    "GroupNorm": (lambda: pn.GroupNorm(2, 4), {"input_shape": ("batch", 4, "width")}),
    "InstanceNorm": (lambda: pn.InstanceNorm(4, affine=True), {"input_shape": ("batch", 4, "width")}),
    "a model": (lambda: pn.Sequential(pn.Embedding(7, 4, rng=0), pn.LayerNorm(4), pn.LSTM(4, 6, rng=0), pn.Linear(6, 3, rng=0)), OPEN),
}


def feed_of(model: onnx.ModelProto) -> dict[str, Any]:
    rng, sizes, found = np.random.default_rng(0), {"time": 3, "batch": 2, "width": 5}, {}
    for value in model.graph.input:
        shape = [d.dim_value or sizes[d.dim_param] for d in value.type.tensor_type.shape.dim]
        kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        drawn = (
            rng.standard_normal(shape) if kind.kind == "f" else rng.integers(0, 2, shape) if kind.kind == "b" else rng.integers(1, 4, shape)
        )
        found[value.name] = drawn.astype(kind)
    return found


@pytest.mark.parametrize("name", KINDS)
def test_what_its_gradients_take_is_there(name: str, tmp_path: Path) -> None:
    make, keywords = KINDS[name]
    layer, path = make(), tmp_path / "m.onnx"
    model = pn.export(layer, path, trainable=True, **keywords).model
    assert model is not None
    graph, params = model.graph, layer.parameters()
    weights = {t.name: t for t in graph.initializer}
    assert {n.op_type for n in graph.node} <= OPERATORS
    for key, p in params.items():
        np.testing.assert_array_equal(numpy_helper.to_array(weights[key]), p)
    floats = [t for key, t in weights.items() if t.data_type == onnx.TensorProto.FLOAT and key not in params]
    assert all(len(np.unique(numpy_helper.to_array(t))) == 1 for t in floats)  # zeros and ones; nothing is made of parameters
    for n in graph.node:
        if n.op_type == "LayerNormalization":
            assert (len(n.input), len(n.output)) == (3, 3)
        if n.op_type in ("LSTM", "GRU"):
            assert all(n.input[k] for k in (0, 1, 2, 3, 5, *([6] if n.op_type == "LSTM" else [])))
    assert not twice_without_a_parameter(model, set(params))
    back = pn.load(path).state_dict()
    for key, a in layer.state_dict().items():
        np.testing.assert_array_equal(back[key], a)


def twice_without_a_parameter(model: onnx.ModelProto, trained: set[str]) -> list[str]:
    """What no parameter goes into and two inputs read that have a gradient in any case: the builder gives both the same name."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.value_info, *inferred.input)
    floats = {v.name for v in values if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    floats |= {t.name for t in inferred.initializer if t.data_type == onnx.TensorProto.FLOAT}
    reached, read = set(trained), Counter[str]()
    for n in model.graph.node:
        if reached & {*n.input}:
            reached |= {*n.output}
        if n.op_type in ("LSTM", "GRU", "LayerNormalization", "Concat"):
            read.update(name for name in n.input if name in floats - reached)
    return [name for name, count in read.items() if count > 1]


@pytest.mark.parametrize("name", KINDS)
def test_other_numbers_in_it_are_other_parameters(name: str) -> None:
    """Nothing is folded: what training makes of an initializer is what it makes of the layer."""
    make, keywords = KINDS[name]
    layer, rng = make(), np.random.default_rng(1)
    model = pn.export(layer, None, trainable=True, **keywords).model
    assert model is not None
    layer.assign({key: (p + 0.3 * rng.standard_normal(p.shape)).astype(p.dtype) for key, p in layer.parameters().items()})
    for t in model.graph.initializer:
        if t.name in layer.parameters():
            t.CopyFrom(numpy_helper.from_array(layer.parameters()[t.name], t.name))
    feed = feed_of(model)
    found = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(["y"], feed)[0]
    result = layer(feed.pop("x"), **feed)
    np.testing.assert_allclose(found, result[0] if layer.recurrent else result, **relative("float32", RECURRENT))


WAY_OUT = "portnorm.export_training_step writes an update of its own"
REFUSED: dict[str, tuple[Callable[[], pn.Layer], dict[str, Any], str]] = {
    "a loop": (lambda: pn.LSTM(4, 6, norm="layer", rng=0), {}, f"no gradient for Scan .*{WAY_OUT}.*`unroll=True`"),
    "the loop of a plain cell": (lambda: pn.RNN(4, 6, rng=0), {}, f"no gradient for Scan .*{WAY_OUT}"),
    "statistics of a cell": (lambda: pn.LSTM(4, 6, norm="batch", rng=0), {}, f"running statistics .*{WAY_OUT}"),
    "statistics": (lambda: pn.BatchNorm(4), {}, f"BatchNorm has running statistics .*{WAY_OUT}"),
    "dropout": (lambda: pn.LSTM(4, 6, num_layers=2, dropout=0.2, rng=0), {}, f"drops values in training.*{WAY_OUT}"),
    "integers": (lambda: pn.LSTM(4, 6, rng=0), {"quantize": "int8"}, f"products are of integers; {WAY_OUT}"),
    "a late opset": (lambda: pn.LSTM(4, 6, rng=0), {"opset": 23}, "`opset` is 23; onnxruntime-training reads up to 21"),
    "another target": (lambda: pn.LSTM(4, 6, rng=0), {"target": "onnxruntime"}, "`trainable` is for target 'portable'"),
    "float16": (lambda: pn.LSTM(4, 6, rng=0), {"dtype": "float16"}, "`trainable` of a graph in float16; expected float32"),
    "a function": (lambda: pn.LSTM(4, 6, rng=0), {"function": True}, "`trainable` with `function=True`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_gradient_there_is_refused(name: str, tmp_path: Path) -> None:
    make, keywords, told = REFUSED[name]
    with pytest.raises(pn.UnsupportedError, match=told):
        pn.export(make(), tmp_path / "m.onnx", trainable=True, **keywords)
    assert not [*tmp_path.iterdir()]


def test_a_step_alone_and_the_command_line(tmp_path: Path) -> None:
    layer, path = pn.LSTM(4, 6, norm="layer", rng=0), tmp_path / "m.onnx"
    assert pn.export(layer, path, trainable=True, streaming=True, prefix="p/").worst_step is not None
    assert "p/norm_hh_l0.weight" in {t.name for t in onnx.load(path).graph.initializer}
    pn.save(pn.GRU(4, 6, rng=0), tmp_path / "m.safetensors")
    assert main(["export", str(tmp_path / "m.safetensors"), "-o", str(path), "--trainable"]) == 0
    assert "weight_hh_l0" in {t.name for t in onnx.load(path).graph.initializer}
