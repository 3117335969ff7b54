"""Whole models of torch as ONNX graphs, with portnorm's layers as loops: each compared again here, in onnxruntime, against the model."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import onnx
import pytest

import portnorm as pn
from portnorm.arrays import leaves
from portnorm.checkpoint.onnx_constants import graphs
from portnorm_onnx.runtimes import session_of
from portnorm_onnx.signature import state_names
from tests.processes import output_of
from tests.tolerances import EXPORTED_TORCH, RECURRENT, relative

pytestmark = pytest.mark.peers


def outputs(proto_or_path: Any, *arrays: Any) -> list[Any]:
    """What onnxruntime makes of the inputs, in order."""
    import onnxruntime

    model = str(proto_or_path) if isinstance(proto_or_path, Path) else proto_or_path.SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: np.asarray(a) for i, a in zip(session.get_inputs(), arrays, strict=True)})


def speech(layer: pn.Layer, features: int) -> Any:
    """A model around a recurrent layer: `y` for `x` and `lengths`, and the first array of the last state."""
    import torch

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front = torch.nn.Linear(3, 4)
            self.encoder = torch.nn.ModuleDict({"rnn": pn.torch_module(layer), "norm": pn.torch_module(pn.LayerNorm(features))})
            self.head = torch.nn.Linear(features, 2)

        def forward(self, x: Any, lengths: Any) -> Any:
            y, state = self.encoder["rnn"](self.front(x), lengths=lengths)
            return self.head(self.encoder["norm"](y)), state[0]

    torch.manual_seed(0)
    return Model()


def test_layers_are_loaded_back_by_the_path_of_their_module(tmp_path: Path) -> None:
    """The file says who wrote it and which layers are in it; a layer comes back bit by bit, and the whole is no layer."""
    import torch

    layer, path = pn.LSTM(4, 5, norm="weight", num_layers=2, rng=0), tmp_path / "m.onnx"
    args, dynamic = (torch.randn(6, 2, 3), torch.tensor([6, 4])), {"x": {0: "time", 1: "batch"}, "lengths": {0: "batch"}}
    report = pn.export_torch(speech(layer, 5), args, path, dynamic_shapes=dynamic)
    back = pn.load(path, prefix="encoder.rnn")
    assert back.state_dict().keys() == layer.state_dict().keys()
    for name, a in layer.state_dict().items():
        np.testing.assert_array_equal(back.state_dict()[name], a, err_msg=name)
    assert isinstance(pn.load(path, prefix="encoder.norm."), pn.LayerNorm)
    with pytest.raises(
        pn.CheckpointError, match=r"written by portnorm.export_torch: it holds a torch model.*'encoder.rnn.', 'encoder.norm.'"
    ):
        pn.load(path)
    with pytest.raises(pn.UnsupportedError, match=r"holds a torch model"):
        pn.verify(path)
    alone = pn.export_torch(speech(layer, 5), args, None, dynamic_shapes=dynamic, metadata=False)
    assert alone.model is not None
    assert not alone.model.metadata_props
    assert alone.size < report.size


def test_a_layer_that_is_the_whole_model_is_loaded_without_its_path(tmp_path: Path) -> None:
    import torch

    layer = pn.GRU(4, 5, norm="layer", rng=0)
    pn.export_torch(pn.torch_module(layer), torch.randn(6, 2, 4), tmp_path / "m.onnx", dynamic_shapes=({0: "time", 1: "batch"},))
    back = pn.load(tmp_path / "m.onnx")
    for name, a in layer.state_dict().items():
        np.testing.assert_array_equal(back.state_dict()[name], a, err_msg=name)
    pn.export_torch(torch.nn.Linear(3, 2), torch.ones(1, 3), tmp_path / "m.onnx")
    with pytest.raises(pn.CheckpointError, match="layers in it: none"):
        pn.load(tmp_path / "m.onnx")


LAYERS: dict[str, tuple[Any, int]] = {
    "LSTM, layer norm": (lambda: pn.LSTM(4, 5, norm="layer", rng=0), 5),
    "LSTM, plain, projected": (lambda: pn.LSTM(4, 5, proj_size=3, rng=0), 3),
    "LSTM, batch norm": (lambda: pn.LSTM(4, 5, norm="batch", t_max=3, rng=0), 5),
    "GRU, both directions, batch first": (lambda: pn.GRU(4, 5, norm="layer", bidirectional=True, batch_first=True, rng=0), 10),
    "RNN, two layers": (lambda: pn.RNN(4, 5, num_layers=2, rng=0), 5),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_in_the_middle_is_one_loop_for_any_length(name: str, tmp_path: Path) -> None:
    import torch

    make, features = LAYERS[name]
    layer = make()
    model, path = speech(layer, features), tmp_path / "m.onnx"
    time, batch = (1, 0) if layer.batch_first else (0, 1)
    free = {"x": {time: "time", batch: "batch"}, "lengths": {0: "batch"}}
    report = pn.export_torch(model, (torch.randn(4, 4, 3), torch.tensor([4, 3, 1, 2])), path, dynamic_shapes=free)
    assert model.training
    loops = sum(n.op_type in ("Scan", "LSTM", "GRU", "RNN") for n in report.model.graph.node)
    assert loops == layer.num_layers * layer.num_directions
    assert report.nodes < 60
    assert onnx.load(path) == report.model
    rng = np.random.default_rng(1)
    for steps, rows in ((1, 1), (1, 3), (7, 2), (60, 5)):
        x = torch.tensor(rng.standard_normal((rows, steps, 3) if layer.batch_first else (steps, rows, 3)), dtype=torch.float32)
        lengths = torch.tensor(rng.integers(1, steps + 1, rows))
        with torch.no_grad():
            expected = model.eval()(x, lengths)
        for mine, theirs in zip(outputs(path, x, lengths), expected, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=EXPORTED_TORCH, atol=EXPORTED_TORCH)
    model.train()


def test_the_graph_says_what_it_is_and_not_where_it_was_made() -> None:
    import torch

    model = speech(pn.LSTM(4, 5, norm="layer", rng=0), 5)
    report = pn.export_torch(
        model,
        (torch.randn(4, 2, 3), torch.tensor([4, 2])),
        None,
        dynamic_shapes={"x": {0: "time", 1: "batch"}, "lengths": {0: "batch"}},
        input_names=["features", "lengths"],
        output_names=["logits", "h"],
    )
    graph = report.model.graph
    assert [i.name for i in graph.input] == ["features", "lengths"]
    assert [o.name for o in graph.output] == ["logits", "h"]
    dims = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)]
    assert dims == [["time", "batch", 3], ["batch"], ["time", "batch", 2], [1, "batch", 5]]
    (scan,) = (n for n in graph.node if n.op_type == "Scan")
    weights = {t.name for t in (*graph.initializer, *next(a.g for a in scan.attribute if a.name == "body").initializer)}
    assert {"encoder.rnn.weight_ih_l0.T", "encoder.rnn.weight_hh_l0.T", "encoder.rnn.norm_c_l0.weight"} <= weights
    assert [o.domain for o in report.model.opset_import] == [""]
    text = report.model.SerializeToString()
    assert b".py" not in text
    assert b"stack_trace" not in text
    assert report.seconds > 0
    assert {c.case.split(":")[0] for c in report.steps} == {"encoder.rnn"}
    assert {c.case for c in report.trajectories if not c.case.startswith("encoder")} == {
        "features (4, 2, 3) lengths (2,)",
        "features (1, 1, 3) lengths (1,)",
        "features (3, 5, 3) lengths (5,)",
        "features (24, 19, 3) lengths (19,)",
    }


def test_a_layer_that_is_called_twice_and_its_states(tmp_path: Path) -> None:
    """Each loop has weights of its own, under the layer's name; states go from one call to the next, in and out of the graph."""
    import torch

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.other = pn.torch_module(pn.LSTM(4, 4, norm="layer", rng=0)), pn.torch_module(pn.GRU(4, 4, norm="layer", rng=0))
            self.alias = self.rnn

        def forward(self, x: Any, state: Any) -> Any:
            y, state = self.rnn(x, state)
            y, state = self.alias(y, state)
            return self.other(y)[0], state

    torch.manual_seed(0)
    model = Model()
    zeros = torch.zeros(1, 3, 4)
    free = {"x": {0: "time", 1: "batch"}, "state": ({1: "batch"}, {1: "batch"})}
    report = pn.export_torch(model, (torch.randn(5, 3, 4), (zeros, zeros)), tmp_path / "m.onnx", dynamic_shapes=free)
    kinds = [n.op_type for n in report.model.graph.node]
    assert kinds.count("Scan") == 3
    names = [t.name for graph in graphs(report.model.graph) for t in graph.initializer]
    assert [n for n in names if "weight_hh" in n] == ["rnn.weight_hh_l0.T", "rnn.weight_hh_l0.T_inside_1", "other.weight_hh_l0.T"]
    assert not any("weight" in name and "call_" in name for name in names)
    onnx.checker.check_model(onnx.compose.add_prefix(report.model, "pre_"), full_check=True)
    assert pn.load(tmp_path / "m.onnx", prefix="rnn").state_dict().keys() == model.rnn.to_layer().state_dict().keys()
    x, h, c = torch.randn(9, 2, 4), torch.randn(1, 2, 4), torch.randn(1, 2, 4)
    with torch.no_grad():
        y, state = model(x, (h, c))
    for mine, theirs in zip(outputs(tmp_path / "m.onnx", x, h, c), (y, *state), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=EXPORTED_TORCH, atol=EXPORTED_TORCH)


def test_inputs_by_name(tmp_path: Path) -> None:
    """In any order, with one that is left out, one that is no tensor, and one that is a state."""
    import torch

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = pn.torch_module(pn.GRU(3, 4, norm="layer", rng=0))

        def forward(self, x: Any, bias: Any = None, *, state: Any = None, lengths: Any = None, scale: float = 1.0) -> Any:
            y, last = self.rnn(x, state, lengths=lengths)
            return y * scale if bias is None else y * scale + bias, last

    torch.manual_seed(0)
    model, path = Model(), tmp_path / "m.onnx"
    x, h, lengths = torch.randn(5, 2, 3), torch.randn(1, 2, 4), torch.tensor([5, 3])
    kwargs = {"lengths": lengths, "scale": 2.0, "state": (h,)}
    free = {"x": {0: "time", 1: "batch"}, "lengths": {0: "batch"}, "scale": None, "state": ({1: "batch"},)}
    report = pn.export_torch(model, x, path, kwargs=kwargs, dynamic_shapes=free)
    assert [i.name for i in report.model.graph.input] == ["x", "state_0", "lengths"]
    assert len(report.trajectories) > 3
    x, h, lengths = torch.randn(9, 3, 3), torch.randn(1, 3, 4), torch.tensor([9, 1, 4])
    with torch.no_grad():
        y, (last,) = model(x, lengths=lengths, state=(h,), scale=2.0)
    for mine, theirs in zip(outputs(path, x, h, lengths), (y, last), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=EXPORTED_TORCH, atol=EXPORTED_TORCH)

    alone = pn.export_torch(model, (), None, kwargs={"x": x, "scale": 0.5}, inputs=[((), {"x": x, "scale": 0.5}), ((x,), {"scale": 0.5})])
    assert [i.name for i in alone.model.graph.input] == ["x"]
    assert [c.case for c in alone.trajectories if c.case.startswith("x")] == ["x (9, 3, 3)"] * 2
    with pytest.raises(pn.UnsupportedError, match=r"`args` and `kwargs` do not fit the model: .*'length'; its inputs are \(x: .*, lengths"):
        pn.export_torch(model, x, None, kwargs={"length": lengths})


def test_integers_a_mask_and_several_layers_in_a_row() -> None:
    import torch

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = pn.torch_module(pn.Embedding(11, 6, rng=0))
            self.stack = pn.torch_module(pn.Sequential(pn.LSTM(6, 4, norm="layer-gates", rng=0), pn.Linear(4, 3, rng=0)))
            self.norm = pn.torch_module(pn.GroupNorm(3, 3))

        def forward(self, ids: Any) -> Any:
            y, _ = self.stack(self.embed(ids), mask=ids != 0)
            return self.norm(y.permute(1, 2, 0))

    torch.manual_seed(0)
    ids = torch.randint(1, 11, (6, 4))
    ids[4:, 1] = 0
    report = pn.export_torch(Model(), ids, None, dynamic_shapes={"ids": {0: "time", 1: "batch"}}, inputs=[ids, ids[:1], ids[2:5, :1]])
    assert [c.case for c in report.trajectories if c.case.startswith("ids")] == ["ids (6, 4)", "ids (1, 4)", "ids (3, 1)"]
    assert [n.op_type for n in report.model.graph.node].count("Scan") == 1


@pytest.mark.parametrize(("opset", "target"), [(18, "tract"), (21, "portable"), (None, "onnxruntime")])
def test_opsets_and_targets(opset: Any, target: str) -> None:
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), pn.torch_module(pn.RMSNorm(4)), torch.nn.GELU())
    report = pn.export_torch(model, torch.randn(2, 3), None, dynamic_shapes=({0: "batch"},), opset=opset, target=target)
    version = opset or 23
    assert report.opset == version
    assert ("RMSNormalization" in {n.op_type for n in report.model.graph.node}) == (version >= 23)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_dtypes(dtype: str) -> None:
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), pn.torch_module(pn.LayerNorm(4))).to(getattr(torch, dtype))
    target = "portable" if dtype == "float16" else "onnxruntime"
    x = torch.randn(2, 3).to(getattr(torch, dtype))
    report = pn.export_torch(model, x, None, dynamic_shapes=({0: "batch"},), target=target)
    assert outputs(report.model, x)[0].dtype == dtype


@pytest.mark.parametrize("fixed", [False, True])
def test_a_speech_model_in_float16(fixed: bool, tmp_path: Path) -> None:
    """With products of transposed arrays, torch's and ours, in the form in which onnxruntime loads them in float16."""
    import torch

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = torch.nn.Conv1d(3, 4, 3, padding=1), torch.nn.LayerNorm(4)
            self.rnn = pn.torch_module(pn.LSTM(4, 5, norm="layer", batch_first=True, rng=0))
            self.head = torch.nn.Linear(5, 2, bias=False)

        def forward(self, x: Any, lengths: Any) -> Any:
            y = torch.nn.functional.gelu(self.norm(self.conv(x).transpose(1, 2)))
            return torch.softmax(self.head(self.rnn(y, lengths=lengths)[0].transpose(0, 1)), -1)

    torch.manual_seed(0)
    model = Model().half()
    free = None if fixed else {"x": {0: "batch", 2: "time"}, "lengths": {0: "batch"}}
    args = (torch.randn(2, 3, 9).half(), torch.tensor([9, 5]))
    report = pn.export_torch(model, args, tmp_path / "m.onnx", dynamic_shapes=free)
    assert {c.runtime for c in report.trajectories} == {"onnxruntime"}
    x, lengths = args if fixed else (torch.randn(4, 3, 17), torch.tensor([17, 3, 1, 9]))
    with torch.no_grad():
        exact = model.double()(x.half().double(), lengths)
    (y,) = outputs(tmp_path / "m.onnx", x.half(), lengths)
    assert y.dtype == "float16"
    np.testing.assert_allclose(y, exact, atol=RECURRENT["float16"])


class InBfloat16:
    """A speech model with layers of torch's own before, between and behind: convolution, GELU, LayerNorm, attention, softmax."""

    FREE: ClassVar[dict[str, Any]] = {"x": {0: "batch", 2: "time"}, "lengths": {0: "batch"}}

    @staticmethod
    def model(layer: pn.Layer) -> Any:
        import torch

        class Model(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.norm = torch.nn.Conv1d(3, 4, 3, padding=1), torch.nn.LayerNorm(4)
                self.rnn, self.rms = pn.torch_module(layer), pn.torch_module(pn.RMSNorm(5))
                self.head = torch.nn.Linear(5, 2)

            def forward(self, x: Any, lengths: Any) -> Any:
                y = torch.nn.functional.gelu(self.norm(self.conv(x).transpose(1, 2)))
                y, state = self.rnn(y, lengths=lengths)
                y = self.rms(y)[:, None]
                y = torch.nn.functional.scaled_dot_product_attention(y, y, y)[:, 0]
                return torch.softmax(self.head(y), -1), state[0]

        torch.manual_seed(0)
        return Model().bfloat16()

    @staticmethod
    def args(batch: int, time: int) -> Any:
        import torch

        lengths = torch.randint(1, time + 1, (batch,))
        lengths[0] = time
        return torch.randn(batch, 3, time).bfloat16(), lengths


def in_runtime(runtime: str, path: Path, args: Any) -> list[Any]:
    """Results of bfloat16 inputs and lengths, in float64."""
    x, lengths = args
    feed = {"x": x.float().numpy().astype(ml_dtypes.bfloat16), "lengths": lengths.numpy()}
    return [a.astype(np.float64) for a in session_of(runtime, str(path))(feed).values()]


LAYERS_IN_BFLOAT16 = {
    "LSTM, layer norm": lambda: pn.LSTM(4, 5, norm="layer", batch_first=True, rng=0),
    "GRU, batch norm": lambda: pn.GRU(4, 5, norm="batch", t_max=3, batch_first=True, rng=0),
    "RNN, plain, two layers": lambda: pn.RNN(4, 5, num_layers=2, batch_first=True, rng=0),
}


@pytest.mark.parametrize("name", LAYERS_IN_BFLOAT16)
@pytest.mark.parametrize("runtime", ["rounded", pytest.param("openvino", marks=pytest.mark.runtime("openvino"))])
def test_a_model_in_bfloat16(name: str, runtime: str, tmp_path: Path) -> None:
    import torch

    model, path = InBfloat16.model(LAYERS_IN_BFLOAT16[name]()), tmp_path / "m.onnx"
    report = pn.export_torch(model, InBfloat16.args(2, 9), path, dynamic_shapes=InBfloat16.FREE, target="openvino")
    assert report.opset == 22
    assert [v.type.tensor_type.elem_type for v in (report.model.graph.input[0], *report.model.graph.output)] == [16, 16, 16]
    whole = [c for c in report.trajectories if c.case.startswith("x")]
    assert [(c.runtime, c.case) for c in whole] == [
        (runtime, f"x ({batch}, 3, {time}) lengths ({batch},)")
        for runtime in ("rounded", "unrounded")
        for batch, time in ((2, 9), (1, 1), (3, 5), (24, 19))
    ]
    assert [o.runtime for o in report.outcomes] == ["rounded", "unrounded"]
    double = copy.deepcopy(model).double().eval()
    for batch, time in ((1, 1), (4, 17)):
        x, lengths = InBfloat16.args(batch, time)
        with torch.no_grad():
            exact = double(x.double(), lengths)
        for mine, theirs in zip(in_runtime(runtime, path, (x, lengths)), exact, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=RECURRENT["bfloat16"])


def test_a_model_that_is_bfloat16_in_part() -> None:
    """By autocast, and between two conversions: there is no float64 run to compare with."""
    import torch

    class Autocast(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.rnn, self.head = (
                torch.nn.Linear(3, 4),
                pn.torch_module(pn.GRU(4, 4, norm="layer", rng=0)),
                torch.nn.Linear(4, 2),
            )

        def forward(self, x: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                y = self.head(self.rnn(self.front(x))[0])
            return y.float()

    torch.manual_seed(0)
    x, free = torch.randn(5, 2, 3), {"x": {0: "time", 1: "batch"}}
    report = pn.export_torch(Autocast(), x, None, dynamic_shapes=free, target="openvino")
    assert {c.runtime for c in report.trajectories} == {"rounded", "unrounded"}
    assert {c.runtime for c in report.steps} == {"onnxruntime"}  # the layer is in float32
    assert report.model.graph.output[0].type.tensor_type.elem_type == 1
    with pytest.raises(pn.UnsupportedError, match=r"'portable' does not compute in bfloat16, in which the model computes .*'openvino'"):
        pn.export_torch(Autocast(), x, None, dynamic_shapes=free)
    with pytest.raises(pn.ExportError, match=r"onnxruntime .* does not load the graph: .* implementation for MatMul"):
        pn.export_torch(Autocast(), x, None, dynamic_shapes=free, target="onnxruntime")


def test_a_bfloat16_graph_that_is_off_by_little_is_not_written(tmp_path: Path) -> None:
    """By a sixteenth, which the tolerances of bfloat16 allow; what runs without rounding tells."""
    import torch

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = pn.torch_module(pn.LayerNorm(16))

        def forward(self, x: Any) -> Any:
            return self.norm(x) * (1.0625 if torch.compiler.is_exporting() else 1.0)

    model, x = Model().bfloat16(), torch.randn(8, 16).bfloat16()
    with pytest.raises(pn.ConformanceError, match=r"^unrounded: output 'mul' is 0\.1.* from the torch model at x \(8, 16\)"):
        pn.export_torch(model, x, tmp_path / "m.onnx", target="openvino")
    assert list(tmp_path.iterdir()) == []


def test_a_module_of_portnorm_alone_with_lengths_that_are_fixed(tmp_path: Path) -> None:
    import torch

    layer = pn.LSTM(3, 4, norm="layer", rng=0)
    x = torch.randn(5, 2, 3)
    report = pn.export_torch(pn.torch_module(layer), x, tmp_path / "m.onnx")
    np.testing.assert_allclose(outputs(report.model, x)[0], layer(x.numpy())[0], rtol=EXPORTED_TORCH, atol=EXPORTED_TORCH)
    assert len(report.trajectories) == 1
    assert report.outcomes[0].status == "passed"


def test_weights_beside_the_model(tmp_path: Path) -> None:
    import torch

    model, x = torch.nn.Sequential(torch.nn.Linear(8, 16), pn.torch_module(pn.Linear(16, 64, rng=0))), torch.randn(2, 8)
    pn.export_torch(model, x, tmp_path / "m.onnx", external_data=True)
    files = sorted(p.name for p in tmp_path.iterdir())
    assert len(files) == 2
    assert files[1].startswith("m.onnx.")
    with torch.no_grad():
        np.testing.assert_allclose(outputs(tmp_path / "m.onnx", x)[0], model(x), rtol=EXPORTED_TORCH, atol=EXPORTED_TORCH)


def test_a_model_that_cannot_go_to_float64_is_held_against_its_own_rounding() -> None:
    import torch

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = pn.torch_module(pn.LSTM(3, 4, norm="layer", rng=0))

        def forward(self, x: Any) -> Any:
            return self.rnn(x, (torch.zeros(1, x.shape[1], 4), torch.zeros(1, x.shape[1], 4)))[0]

    report = pn.export_torch(Model(), torch.randn(5, 2, 3), None, dynamic_shapes={"x": {0: "time", 1: "batch"}})
    assert all(c.eager_difference > 0 for c in report.trajectories)


def test_what_the_model_refuses_is_left_out_and_said() -> None:
    import torch

    class Model(torch.nn.Module):
        def __init__(self, least: int) -> None:
            super().__init__()
            self.least, self.rnn = least, pn.torch_module(pn.GRU(3, 4, norm="layer", rng=0))

        def forward(self, x: Any) -> Any:
            if not torch.compiler.is_exporting() and x.shape[0] < self.least:
                raise ValueError("too short")
            return self.rnn(x)[0]

    free, x = {"x": {0: "time"}}, torch.randn(30, 2, 3)
    report = pn.export_torch(Model(2), x, None, dynamic_shapes=free)
    assert report.outcomes[0].detail == "not compared at x (1, 2, 3), which the model refuses"
    assert [c.case for c in report.trajectories] == ["x (30, 2, 3)", "x (3, 2, 3)", "x (24, 2, 3)"]
    with pytest.raises(pn.ExportError, match=r"refuses all inputs .* such as x \(24, 2, 3\); give `inputs`.*: too short"):
        pn.export_torch(Model(30), x, None, dynamic_shapes=free)
    assert len(pn.export_torch(Model(30), x, None, dynamic_shapes=free, inputs=[x]).trajectories) == 1


def test_a_front_end_that_shortens_time_and_limits_that_are_known() -> None:
    import torch

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.rnn = torch.nn.Conv1d(3, 4, 3, 2), pn.torch_module(pn.LSTM(4, 4, batch_first=True, rng=0))

        def forward(self, x: Any, lengths: Any) -> Any:
            return self.rnn(self.conv(x).transpose(1, 2), lengths=(lengths - 1) // 2)[1][0]

    free = {"x": {2: torch.export.Dim("frames", min=5, max=20)}, "lengths": None}
    report = pn.export_torch(Model(), (torch.randn(2, 3, 9), torch.tensor([9, 5])), None, dynamic_shapes=free)
    assert [c.case for c in report.trajectories] == [f"x (2, 3, {n}) lengths (2,)" for n in (9, 5, 5, 20)]
    assert {c.output for c in report.trajectories} == {report.model.graph.output[0].name}  # the last state alone: `y` is not made


def on_states(rule: Any) -> Any:
    """A model whose result is `rule` of a recurrent layer's."""
    import torch

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = pn.torch_module(pn.GRU(4, 5, norm="layer", rng=0))

        def forward(self, x: Any) -> Any:
            return rule(self.rnn(x)[0])

    return Model().eval()


def of_few(y: Any) -> Any:
    if y.shape[0] < 5:
        return y * (2.0 if y.shape[0] >= 3 else 1.0)
    return y


BY_LENGTH: dict[str, tuple[Any, str, str]] = {
    # What the program assumes, and the range in which it holds.
    "the first ten": (lambda y: y[:10], r"`time < 10`", "max=9"),
    "the mean of the first ten": (lambda y: y[:10].mean(0), r"`time < 10`", "max=9"),
    "the last ten": (lambda y: y[-10:], r"`\(-1\)\*time > -10`", "max=9"),
    "few, at some of which it is right": (of_few, r"`time >= 5` from .*test_export_torch.py:\d+, `if y.shape\[0\] < 5:`", "min=5"),
    "many": (lambda y: y * (2.0 if y.shape[0] > 20 else 1.0), r"`time <= 20` from .*test_export_torch.py", "max=20"),
    "very many": (lambda y: y * (2.0 if y.shape[0] > 300 else 1.0), r"`time <= 300` from .*test_export_torch.py", "max=300"),
    "one length alone": (lambda y: y * (2.0 if y.shape[0] == 2 else 1.0), r"`time != 2` from .*test_export_torch.py", "min=3"),
    "even ones": (lambda y: y * (2.0 if y.shape[0] % 2 else 1.0), r"`\(time % 2\) == 0` from .*test_export_torch.py", ""),
    "one step": (lambda y: y * (2.0 if y.shape[0] == 1 else 1.0), r"`time >= 2`", "min=2"),
    "one step of several": (lambda y: y * (2.0 if y.shape[0] == 1 and y.shape[1] > 1 else 1.0), r"`time >= 2`", "min=2"),
    "many of a large batch": (lambda y: y * (2.0 if y.shape[0] > 20 and y.shape[1] > 3 else 1.0), r"`time <= 20` from", "max=20"),
    "one by another": (lambda y: y * (2.0 if y.shape[1] > y.shape[0] else 1.0), r"`batch <= time` from .*test_export_torch.py", "min=3"),
}


@pytest.mark.parametrize("name", BY_LENGTH)
def test_a_model_that_decides_by_a_free_length_is_refused(name: str, tmp_path: Path) -> None:
    """`torch.export` keeps the decision that the example took; the file would be wrong without a word wherever another one is right."""
    import torch

    rule, condition, declared = BY_LENGTH[name]
    path, x = tmp_path / "m.onnx", torch.randn(6, 3, 4)
    ways = (
        rf"leave the axis out of `dynamic_shapes`; or declare .*torch\.export\.Dim\('time', {declared}\)" if declared else "`if`; or leave"
    )
    with pytest.raises(pn.ExportError, match=rf"the graph holds where {condition}.*'time'\) (is|are) free; at x \(\d+, .*differ.*{ways}"):
        pn.export_torch(on_states(rule), x, path, dynamic_shapes={"x": {0: "time", 1: "batch"}})
    assert not path.exists()
    with pytest.raises(pn.ExportError, match=condition):  # inputs of one's own do not say that others will not come
        pn.export_torch(on_states(rule), x, path, dynamic_shapes={"x": {0: "time", 1: "batch"}}, inputs=[x])
    assert pn.export_torch(on_states(rule), x, path).path == str(path)


@pytest.mark.parametrize("hint", [False, True], ids=["Dim", "hint"])
@pytest.mark.parametrize(
    "name", [name for name, row in BY_LENGTH.items() if row[2] and name not in ("one by another", "many of a large batch")]
)
def test_a_range_that_is_declared_is_taken_at_its_word(name: str, hint: bool) -> None:
    """Lengths outside of it are not tried; a range that is too wide is refused, whoever finds it."""
    import torch

    rule, _, declared = BY_LENGTH[name]
    ends = {key: int(value) for key, _, value in [declared.partition("=")]}
    of = torch.export.Dim.DYNAMIC if hint else lambda **ends: torch.export.Dim("time", **ends)
    low, high = ends.get("min", 3), min(ends.get("max", 9), 40)
    x = torch.randn(6, 3, 4)
    report = pn.export_torch(on_states(rule), x, None, dynamic_shapes={"x": {0: of(min=low, max=high)}})
    tried = [int(re.findall(r"\d+", c.case)[0]) for c in report.trajectories]
    assert min(tried) >= low
    assert max(tried) <= high
    wide = {"min": low - 1, "max": high} if "min" in ends else {"min": low, "max": ends["max"] + 2}
    with pytest.raises(pn.ExportError, match=r"min\(10, y.shape\[0\]\).*torch\.export\.Dim|min\(10, y.shape\[0\]\).*give the axis a name"):
        pn.export_torch(on_states(rule), x, None, dynamic_shapes={"x": {0: of(**wide)}})


AT_EVERY_LENGTH: dict[str, Any] = {
    "at most four": lambda y: y[: min(4, y.shape[0])] * 1.0,
    "the last ten": lambda y: y[max(0, y.shape[0] - 10) :] * 1.0,
    "narrow": lambda y: y.narrow(0, 0, min(10, y.shape[0])),
    "a piece": lambda y: y[2:4],
    "the sum of a piece": lambda y: y[2:4].sum(0),
    "all but the first": lambda y: y[1:],
    "all but the last two": lambda y: y[:-2],
    "the last one": lambda y: y[-1],
    "every second": lambda y: y[::2],
    "padded": lambda y: y.new_zeros(8, y.shape[1], 5)[: max(0, 8 - y.shape[0])].sum(0) + y.sum(0),
}


@pytest.mark.parametrize("name", AT_EVERY_LENGTH)
def test_a_model_that_is_right_at_every_length_is_exported(name: str, tmp_path: Path) -> None:
    """torch has conditions for many of these, beyond which its translation is right all the same."""
    import torch

    model, path = on_states(AT_EVERY_LENGTH[name]), tmp_path / "m.onnx"
    pn.export_torch(model, torch.randn(6, 3, 4), path, dynamic_shapes={"x": {0: "time", 1: "batch"}})
    for steps in (1, 2, 3, 4, 5, 9, 10, 11, 30):
        x = torch.randn(steps, 2, 4)
        with torch.no_grad():
            np.testing.assert_allclose(outputs(path, x)[0], model(x), atol=EXPORTED_TORCH, rtol=EXPORTED_TORCH)


def test_lengths_that_the_model_refuses_are_no_reason_to_refuse_it() -> None:
    """A table of positions has an end, where the model itself stops."""
    import torch

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.positions = pn.torch_module(pn.LayerNorm(4)), torch.nn.Parameter(torch.randn(40, 1, 4))

        def forward(self, x: Any) -> Any:
            return self.norm(x + self.positions[: x.shape[0]])

    report = pn.export_torch(Model(), torch.randn(6, 3, 4), None, dynamic_shapes={"x": {0: "time"}})
    assert all(c.difference <= c.allowed for c in report.trajectories)


def test_a_graph_that_differs_is_not_written(tmp_path: Path) -> None:
    import torch

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = pn.torch_module(pn.LayerNorm(3))

        def forward(self, x: Any) -> Any:
            return self.norm(x) * (1.001 if torch.compiler.is_exporting() else 1.0)

    path = tmp_path / "m.onnx"
    path.write_bytes(b"as it was")
    with pytest.raises(pn.ConformanceError, match=r"onnxruntime: output 'mul' is 0\.00.* from the torch model at x \(2, 3\)"):
        pn.export_torch(Model(), torch.randn(2, 3), path)
    assert path.read_bytes() == b"as it was"
    assert list(tmp_path.iterdir()) == [path]


def test_errors_name_the_argument(tmp_path: Path) -> None:
    import torch

    norm = pn.torch_module(pn.LayerNorm(3))
    x = torch.randn(2, 3)
    with pytest.raises(pn.UnsupportedError, match="`model` is a LayerNorm; expected a torch"):
        pn.export_torch(pn.LayerNorm(3), x, None)  # type: ignore[arg-type]
    with pytest.raises(
        pn.UnsupportedError, match=r"'portable' does not compute in bfloat16, the dtype of layer '0' .*'openvino' or 'tensorrt'"
    ):
        pn.export_torch(torch.nn.Sequential(norm).bfloat16(), x.bfloat16(), None)
    with pytest.raises(pn.UnsupportedError, match=r"'onnxruntime' has no \w+ in bfloat16 .*target='openvino' or 'tensorrt' has it"):
        pn.export_torch(pn.torch_module(pn.RNN(3, 4)).bfloat16(), torch.randn(4, 2, 3).bfloat16(), None, target="onnxruntime")
    norm.float()
    with pytest.raises(pn.UnsupportedError, match="`target` 'tensorrt' does not compute in float64, the dtype of layer '0'"):
        pn.export_torch(torch.nn.Sequential(norm).double(), x.double(), None, target="tensorrt")
    norm.float()
    with pytest.raises(pn.UnsupportedError, match=r"`target` 'mnn' is for layers of portnorm: .* export with target='portable'"):
        pn.export_torch(torch.nn.Sequential(norm), x, None, target="mnn")
    with pytest.raises(pn.ExportError, match="no such directory"):
        pn.export_torch(norm, x, tmp_path / "absent" / "m.onnx")
    with pytest.raises(pn.UnsupportedError, match="`opset` is 9"):
        pn.export_torch(norm, x, None, opset=9)
    with pytest.raises(pn.UnsupportedError, match="`inputs` is empty"):
        pn.export_torch(norm, x, None, inputs=[])
    with pytest.raises(pn.UnsupportedError, match="`inputs` has 2 tensors; expected 1: x"):
        pn.export_torch(norm, x, None, inputs=[(x, x)])

    class Branches(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x if x.sum() > 0 else -x

    with pytest.raises(pn.ExportError, match="torch does not export the model"):
        pn.export_torch(Branches(), x, None)

    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = pn.torch_module(pn.GroupNorm(1, 3, channel_axis=-1))

        def forward(self, x: Any, lengths: Any) -> Any:
            return self.norm(x, lengths=lengths)

    with pytest.raises(pn.UnsupportedError, match="layer 'norm' is called with `lengths`"):
        pn.export_torch(Masked(), (torch.randn(4, 2, 3), torch.tensor([4, 2])), None)


FREE = {"x": {0: "time", 1: "batch"}}


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_layer_of_torch_that_remains_is_named_and_exported_right_once_swapped(kind: str) -> None:
    """At a length that was not traced; and without `dynamic_shapes` it is exported as it is."""
    import torch

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = getattr(torch.nn, kind)(3, 4), torch.nn.Linear(4, 2)

        def forward(self, x: Any) -> Any:
            return self.head(self.rnn(x)[0])

    model, x = Model(), torch.randn(5, 2, 3)
    with pytest.raises(pn.ExportError) as raised:
        pn.export_torch(model, x, None, dynamic_shapes=FREE)
    said = str(raised.value)
    assert "axis 0 of `x` to 5" in said
    assert f"torch.nn.{kind} 'rnn'" in said
    assert f'portnorm.replace_modules(model, {{torch.nn.{kind}: "torch"}}' in said
    assert "TORCH_LOGS" not in said
    assert "draft_export" not in said
    expected = model.eval()(torch.ones(9, 4, 3)).detach()
    pn.replace_modules(model, {getattr(torch.nn, kind): "torch"}, args=x)
    report = pn.export_torch(model, x, None, dynamic_shapes=FREE)
    (found,) = outputs(report.model, np.ones((9, 4, 3), np.float32))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_refusals_of_torch_say_what_to_do() -> None:
    import torch

    class Loop(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = torch.nn.GRUCell(3, 4)

        def forward(self, x: Any) -> Any:
            h = x.new_zeros(x.shape[1], 4)
            for t in range(x.shape[0]):
                h = self.cell(x[t], h)
            return h

    class Branches(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x if x.sum() > 0 else -x

    class InNumPy(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.as_tensor(x.numpy() * 2)

    class Both(torch.nn.Module):
        def forward(self, x: Any, y: Any) -> Any:
            return x + y

    x = torch.randn(5, 2, 3)
    cases: list[tuple[Any, Any, Any, str]] = [
        (Loop(), x, FREE, r"fixes axis 0 of `x` to 5, which `dynamic_shapes` says is free; a Python loop over it"),
        (Branches(), x, None, r"asks for values at .*test_export_torch\.py:\d+, `return x if x\.sum\(\) > 0 else -x`.*torch\.where"),
        (InNumPy(), x, None, r"computes with NumPy at .*test_export_torch\.py:\d+, `return torch\.as_tensor\(x\.numpy\(\) \* 2\)`"),
        (Both(), (x, x), {"x": {0: "time"}}, r"`dynamic_shapes` names 'x'; expected every input, 'x', 'y'"),
        (torch.nn.Linear(3, 2), x[:1], ({0: "time"},), r"axis 0 of `input` has length 1 in the example.* give an example of 2 or more"),
        (torch.nn.Linear(3, 2), x[:1, :1], ({0: "a", 1: "b"},), r"axis 0 of `input` has length 1, axis 1 of `input` has length 1 in the"),
    ]
    for model, args, dynamic_shapes, message in cases:
        with pytest.raises(pn.ExportError, match=f"torch does not export the model: .*{message}") as raised:
            pn.export_torch(model, args, None, dynamic_shapes=dynamic_shapes)
        assert not any(word in str(raised.value) for word in ("TORCH", "draft_export", "http", "mark_dynamic", "specialized"))


def test_an_opset_that_torch_does_not_write_is_named() -> None:
    import torch

    told = r"`opset` is 27, (and torch writes whole models in 18 to \d+$|which the installed onnxruntime does not load)"
    with pytest.raises(pn.PortnormError, match=told):
        pn.export_torch(pn.torch_module(pn.LayerNorm(3)), torch.randn(5, 3), None, opset=27, target="onnxruntime")


@pytest.mark.parametrize("axis", [3, 7, -1, "time"])
@pytest.mark.parametrize("form", ["by name", "in order", "inside"])
def test_a_free_axis_that_an_input_does_not_have_is_named(form: str, axis: Any) -> None:
    import torch

    class Model(torch.nn.Module):
        def forward(self, x: Any, more: Any) -> Any:
            return x + more["y"][0]

    x = torch.randn(5, 2, 3)
    said: Any = {
        "by name": {"x": {axis: "t"}, "more": {"y": [None]}},
        "in order": ({axis: "t"}, {"y": [None]}),
        "inside": {"x": None, "more": {"y": [{axis: "t"}]}},
    }[form]
    where = r"more\.y\.0" if form == "inside" else "x"
    with pytest.raises(
        pn.UnsupportedError, match=rf"`dynamic_shapes` has axis {axis!r} of `{where}`.*\(5, 2, 3\); expected one of 0, 1, 2"
    ):
        pn.export_torch(Model(), (x, {"y": [x]}), None, dynamic_shapes=said)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("swapped", [False, True], ids=["of torch", "swapped"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_packing_is_named_with_what_computes_the_same(kind: str, swapped: bool, streaming: bool) -> None:
    """At the line of the model, whatever of torch's the lengths stop at; and the way out that is named exports the same values."""
    import torch
    from torch.nn.utils.rnn import pack_padded_sequence as pack
    from torch.nn.utils.rnn import pack_sequence
    from torch.nn.utils.rnn import pad_packed_sequence as pad

    class Packs(torch.nn.Module):
        def __init__(self, how: Any) -> None:
            super().__init__()
            self.rnn, self.how = getattr(torch.nn, kind)(3, 4, batch_first=True), how

        def forward(self, x: Any, lengths: Any) -> Any:
            return self.how(self.rnn, x, lengths)

    def through(rnn: Any, x: Any, lengths: Any) -> Any:
        return pad(rnn(pack(x, lengths, batch_first=True, enforce_sorted=False))[0], batch_first=True)[0]

    ways: dict[str, Any] = {
        "by an array": through,
        "by a list": lambda rnn, x, lengths: through(rnn, x, lengths.tolist()),
        "sorted, on the CPU": lambda rnn, x, lengths: rnn(pack(x, lengths.cpu(), batch_first=True))[0].data,
        "each": lambda rnn, x, lengths: rnn(pack_sequence([x[0], x[1]]))[0].data * lengths.sum(),
        "as an input": lambda rnn, x, lengths: rnn(x)[0].data * lengths.sum(),
    }
    lengths, free = torch.tensor([5, 3]), {"x": {0: "batch", 1: "time"}, "lengths": {0: "batch"}}
    for way, how in ways.items():
        torch.manual_seed(0)
        x: Any = torch.randn(2, 5, 3)
        given = (pack(x, [5, 3], batch_first=True) if way == "as an input" else x, lengths)
        model = Packs(how)
        if swapped:
            pn.replace_modules(model, {"rnn": "torch"}, args=given)
        elif streaming:
            continue  # which needs a layer of portnorm first, and says so
        with pytest.raises(pn.ExportError) as raised:
            pn.export_torch(model, given, None, streaming=streaming)
        said = str(raised.value)
        assert re.search(
            r"packed sequence at .*test_export_torch\.py:\d+, `.*rnn\(.*y, state = rnn\(x, lengths=lengths\), which computes", said
        ), way
        assert (f'portnorm.replace_modules(model, {{torch.nn.{kind}: "torch"}}' in said) == (not swapped)
        assert "portnorm_backends" not in said
        assert "torch.where" not in said
    if swapped and not streaming:
        model = Packs(through).eval()
        expected = model(x, lengths)
        pn.replace_modules(model, {"rnn": "torch"}, args=(x, lengths))
        model.how = lambda rnn, x, lengths: rnn(x, lengths=lengths)[0]
        pn.export_torch(model, (x, lengths), None, dynamic_shapes=free)
        torch.testing.assert_close(model(x, lengths), expected)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_dtype_converts_a_copy_first(dtype: str) -> None:
    import onnx
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), pn.torch_module(pn.LayerNorm(4)))
    x = torch.randn(4, 3)
    report = pn.export_torch(
        model,
        x,
        None,
        dtype=dtype,
        dynamic_shapes=({0: "batch"},),
        inputs=[x, x[:3]],
        target="openvino" if dtype == "bfloat16" else "portable",
    )
    name = onnx.TensorProto.DataType.Name(report.model.graph.input[0].type.tensor_type.elem_type)
    assert name == {"float32": "FLOAT", "float64": "DOUBLE"}.get(dtype, dtype.upper())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert x.dtype == torch.float32
    with pytest.raises(pn.UnsupportedError, match="`dtype` is 'int8'; expected one of float16"):
        pn.export_torch(model, x, None, dtype="int8")
    with pytest.raises(pn.UnsupportedError, match="'portable' does not compute in bfloat16"):
        pn.export_torch(model, x, None, dtype=torch.bfloat16)


@pytest.mark.slow
def test_the_example_runs_from_end_to_end(tmp_path: Path) -> None:
    """It compares the exported model with torch's at several lengths by itself."""
    code = f"""
import runpy, sys
sys.argv = ["torch_speech.py", "--out", {str(tmp_path / "m.onnx")!r}]
runpy.run_path("docs/examples/torch_speech.py", run_name="__main__")
"""
    printed = output_of(code)
    assert "16 in a Scan + 16 in a Scan" in printed
    assert "swapped for portnorm's, weights included: rnn" in printed
    assert (tmp_path / "m.onnx").exists()


@pytest.mark.slow
def test_the_example_of_a_cell_of_ones_own_runs(tmp_path: Path) -> None:
    code = f"""
import runpy, sys
sys.argv = ["torch_own_cell.py", "--out", {str(tmp_path / "m.onnx")!r}]
runpy.run_path("docs/examples/torch_own_cell.py", run_name="__main__")
"""
    *_, far = output_of(code).splitlines()
    assert far.startswith("300 steps: ")
    assert float(far.split()[2]) < 5e-5


def test_without_onnxscript_the_extra_is_named() -> None:
    code = """
import sys
sys.modules["onnxscript"] = None
import portnorm
portnorm.torch_module
try:
    portnorm.export_torch(None, ())
except portnorm.MissingExtraError as error:
    print(error)
"""
    assert output_of(code) == 'this needs the package onnxscript, which is not installed: pip install ".[torch]" in a checkout of portnorm'


# -- in pieces -------------------------------------------------------------------------------------------------------------------------


def piecewise(layer: pn.Layer, dtype: Any = None) -> Any:
    import torch

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.rnn, self.head = torch.nn.Linear(3, 4), pn.torch_module(layer), torch.nn.Linear(5, 2)

        def forward(self, x: Any, scale: Any) -> Any:
            return self.head(self.rnn(self.front(x))[0]) * scale

    torch.manual_seed(0)
    return Model().to(dtype)


PIECES: dict[str, Any] = {
    "LSTM": lambda: pn.LSTM(4, 5, rng=0),
    "LSTM of two layers": lambda: pn.LSTM(4, 5, norm="layer", num_layers=2, rng=0),
    "LSTM by step": lambda: pn.LSTM(4, 5, norm="batch", rng=0),
    "LSTM that learned its state": lambda: pn.LSTM(4, 5, learned_state=True, rng=0),
    "GRU, batch first": lambda: pn.GRU(4, 5, norm="layer", batch_first=True, rng=0),
    "RNN": lambda: pn.RNN(4, 5, rng=0),
    "a model": lambda: pn.Sequential(pn.LSTM(4, 6, norm="layer", rng=0), pn.GRU(6, 5, rng=1)),
}


@pytest.mark.parametrize("name", PIECES)
def test_a_model_in_pieces_is_the_model(name: str, tmp_path: Path) -> None:
    """Pieces of several lengths, each from the states that the last one gave; at first those that the layer has by itself."""
    import torch

    layer, path = PIECES[name](), tmp_path / "m.onnx"
    if layer.buffers or any(part.buffers for part in layer.layers()):
        layer(np.random.default_rng(0).standard_normal((6, 4, 4)).astype("float32"), training=True)
    model = piecewise(layer)
    time, axes = (1, {0: "batch", 1: "time"}) if layer.batch_first else (0, {0: "time", 1: "batch"})
    pn.export_torch(model, (torch.randn(2, 2, 3), torch.ones(())), path, dynamic_shapes={"x": axes, "scale": None}, streaming=True)
    session = session_of("onnxruntime", path.read_bytes())
    x = torch.randn((3, 9, 3) if time else (9, 3, 3))
    names = [f"rnn.{n}" for n in state_names(layer)]
    state: dict[str, Any] = dict(zip([f"{n}_0" for n in names], leaves(layer.initial_state(3)), strict=True))
    found = []
    for a, b in ((0, 1), (1, 5), (5, 9)):
        got = session({"x": x.narrow(time, a, b - a).numpy(), "scale": np.array(2.0, "float32"), **state})
        found.append(got["output"])
        state = {f"{n}_0": got[f"{n}_n"] for n in names}
    with torch.no_grad():
        whole = model.eval()(x, torch.tensor(2.0))
    np.testing.assert_allclose(np.concatenate(found, axis=time), whole, **relative("float32", RECURRENT))


def test_one_step_of_a_fixed_batch_in_float16(tmp_path: Path) -> None:
    """What a device takes: every length is known."""
    import torch

    report = pn.export_torch(
        piecewise(pn.GRU(4, 5, rng=0)), (torch.randn(1, 1, 3), torch.ones(())), None, streaming=True, dtype="float16",
        input_names=["frame", "gain"], output_names=["scores"],
    )  # fmt: skip
    graph = report.model.graph
    assert [i.name for i in graph.input] == ["frame", "gain", "rnn.h_0"]
    assert [o.name for o in graph.output] == ["scores", "rnn.h_n"]
    assert all(d.dim_value for i in graph.input for d in i.type.tensor_type.shape.dim)


def test_what_cannot_come_in_pieces_is_refused() -> None:
    import torch

    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = pn.torch_module(pn.GRU(3, 3, rng=0))

        def forward(self, x: Any) -> Any:
            return self.rnn(self.rnn(x)[0])[0]

    x = torch.randn(2, 2, 3)
    with pytest.raises(pn.UnsupportedError, match=r"`streaming`: 'rnn' is called twice"):
        pn.export_torch(Twice(), x, None, streaming=True)
    with pytest.raises(pn.UnsupportedError, match="calls no recurrent layer of portnorm without a state"):
        pn.export_torch(torch.nn.Linear(3, 3), x, None, streaming=True)
    with pytest.raises(pn.UnsupportedError, match="a bidirectional layer cannot go step by step"):
        pn.export_torch(pn.torch_module(pn.LSTM(3, 4, bidirectional=True, rng=0)), x, None, streaming=True)
    model = torch.nn.Sequential(pn.torch_module(pn.GRU(3, 3, rng=0)))
    assert model[0].recorder is None
    pn.export_torch(model[0], x, None, streaming=True)
    assert model[0].recorder is None
    assert model.training


def quantizable(cell: type[Any] = pn.LSTM, norm: Any = "layer") -> Any:
    """A layer of torch in front of layers of portnorm."""
    import torch

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before = torch.nn.Linear(7, 6)
            self.rnn = pn.torch_module(cell(6, 16, norm=norm, rng=0))
            self.after = pn.torch_module(pn.Linear(16, 5, rng=0))

        def forward(self, x: Any) -> Any:
            y, _ = self.rnn(torch.tanh(self.before(x)))
            return self.after(y)

    torch.manual_seed(0)
    return Model()


@pytest.mark.parametrize(
    ("cell", "norm", "streaming"),
    [
        (pn.LSTM, None, False),
        (pn.LSTM, "layer", True),
        (pn.GRU, "layer", False),
        (pn.GRU, None, True),
        (pn.RNN, "batch", False),
        (pn.LSTM, "weight", False),
    ],
)
def test_layers_of_portnorm_with_products_of_integers(cell: type[Any], norm: Any, streaming: bool, tmp_path: Path) -> None:
    import torch

    model, x, path = quantizable(cell, norm).eval(), torch.randn(9, 3, 7), tmp_path / "m.onnx"
    before, arrays = model(x), {name: a.clone() for name, a in model.state_dict().items()}
    report = pn.export_torch(model, x, path, dynamic_shapes={"x": {0: "time", 1: "batch"}}, quantize="int8", streaming=streaming)
    assert report.model is not None
    operators = [n.op_type for g in graphs(report.model.graph) for n in g.node]
    assert operators.count("MatMulInteger") == 3
    assert operators.count("MatMul") + operators.count("Gemm") == 1
    assert report.change is not None
    assert 0 < report.change.largest < 0.5
    assert pn.load(path, prefix="rnn").quantizes == "int8"
    assert torch.equal(model(x), before)  # the model itself stays as it was
    assert all(torch.equal(a, arrays[name]) for name, a in model.state_dict().items())


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"quantize": "int5"}, "`quantize` is 'int5'"),
        ({"target": "tensorrt"}, "target 'tensorrt' has no MatMulInteger"),
        ({"dtype": "float16"}, "`quantize` of a graph in float16"),
    ],
)
def test_torch_models_that_cannot_be_quantized(keywords: Any, message: str, tmp_path: Path) -> None:
    import torch

    with pytest.raises(pn.UnsupportedError, match=message):
        pn.export_torch(quantizable(), torch.randn(9, 3, 7), tmp_path / "m.onnx", **{"quantize": "int8", **keywords})
    with pytest.raises(pn.UnsupportedError, match="Linear has no layer of portnorm with weights to quantize"):
        pn.export_torch(torch.nn.Linear(7, 6), torch.randn(3, 7), tmp_path / "m.onnx", quantize="int8")
    assert not list(tmp_path.iterdir())
