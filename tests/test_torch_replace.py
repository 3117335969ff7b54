"""Modules of a torch model swapped for layers: the model is run before and after, and is left as it was where that differs."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import portnorm as pn

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.peers
pack, pad = torch.nn.utils.rnn.pack_padded_sequence, torch.nn.utils.rnn.pad_packed_sequence

CELLS = ["LSTM", "GRU", "RNN"]
IDS, LENGTHS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 1], [2, 4, 0, 0, 0], [3, 1, 2, 0, 0]]), torch.tensor([5, 4, 2, 3])


class Tagger(torch.nn.Module):  # type: ignore[misc]
    """As people write one: packed sequences, a first state of its own, attributes of the module, dropout, a norm with statistics."""

    def __init__(self, cell: str = "LSTM", layers: int = 2, bidirectional: bool = True, batch_first: bool = True, ragged: bool = True):
        super().__init__()
        torch.manual_seed(0)
        wide = 5 * (2 if bidirectional else 1)
        self.embed, self.norm = torch.nn.Embedding(10, 6), torch.nn.LayerNorm(6, eps=1e-3)
        self.rnn = getattr(torch.nn, cell)(6, 5, layers, bidirectional=bidirectional, batch_first=batch_first)
        self.bn, self.drop, self.out = torch.nn.BatchNorm1d(wide, momentum=0.3), torch.nn.Dropout(0.3), torch.nn.Linear(wide, 3)
        self.ragged, self.calls, self.last = ragged, [0], None

    def forward(self, ids: Any, lengths: Any) -> Any:
        self.rnn.flatten_parameters()
        self.calls.append(len(self.calls))
        x = self.norm(self.embed(ids))
        x = x if self.rnn.batch_first else x.transpose(0, 1)
        first = x.new_ones(self.rnn.num_layers * (2 if self.rnn.bidirectional else 1), ids.shape[0], self.rnn.hidden_size)
        hx = (first, 0.5 * first) if self.rnn.mode == "LSTM" else first
        given = pack(x, lengths, self.rnn.batch_first, enforce_sorted=False) if self.ragged else x
        y, state = self.rnn(given, hx=hx)
        y = pad(y, self.rnn.batch_first)[0] if self.ragged else y
        self.last = y
        pooled = y.sum(1 if self.rnn.batch_first else 0)
        return {"scores": self.out(self.drop(self.bn(pooled))), "state": state}


def what_it_is(model: Any) -> Any:
    """All that a swap that fails must leave alone."""
    attributes = [
        (path, {n: repr(v) for n, v in vars(m).items() if n not in ("_parameters", "_buffers")}) for path, m in model.named_modules()
    ]
    arrays = {n: a.detach().clone() for n, a in model.state_dict().items()}
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return attributes, arrays, grads, [id(m) for m in model.modules()], [id(p) for p in model.parameters()]


def assert_same(before: Any, after: Any) -> None:
    assert before[0] == after[0]
    assert before[3:] == after[3:]
    for old, new in zip(before[1:3], after[1:3], strict=True):
        assert old.keys() == new.keys()
        for name, a in old.items():
            assert (a is None and new[name] is None) or torch.equal(a, new[name]), name


# -- what is run -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ragged", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_the_model_is_run_before_and_after(cell: str, layers: int, bidirectional: bool, batch_first: bool, ragged: bool) -> None:
    model = Tagger(cell, layers, bidirectional, batch_first, ragged)
    other = copy.deepcopy(model)
    table = {"rnn": "torch", torch.nn.LayerNorm: "torch", torch.nn.BatchNorm1d: "torch"}
    swapped = pn.replace_modules(model, table, args=(IDS, LENGTHS))
    assert swapped == ["norm", "rnn", "bn"]
    assert [(c.mode, c.what) for c in swapped.compared] == [
        ("evaluation", "values"),
        ("training step", "values"),
        ("training step", "gradients"),
        ("training step", "statistics"),
    ]
    arrays = {c.what: c.arrays for c in swapped.compared}
    assert arrays["gradients"] == sum(1 for _ in other.parameters())
    assert arrays["statistics"] == 3
    assert "training step: 3 statistics agree" in str(swapped)
    assert f"swapped 'rnn' ({cell}) for {cell}" in str(swapped)
    assert (model.calls, model.last) == ([0], None)  # the runs leave no trace
    for training in (False, True):
        found = []
        for m in (model, other):
            torch.manual_seed(3)
            found.append(m.train(training)(ids=IDS, lengths=LENGTHS))
        torch.testing.assert_close(*found)


def test_without_inputs_it_is_said_that_nothing_was_run(caplog: pytest.LogCaptureFixture) -> None:
    swapped = pn.replace_modules(Tagger(), {torch.nn.LSTM: "torch"})
    assert swapped == ["rnn"]
    assert swapped.compared == []
    assert "nothing was run of the model, for want of `args`" in str(swapped)
    assert "nothing was run of the model" in caplog.text
    caplog.clear()
    assert "nothing was run" not in str(pn.replace_modules(Tagger(), {torch.nn.LSTM: "torch"}, args=(IDS, LENGTHS)))
    assert "nothing was run" not in caplog.text


def test_inputs_come_by_name_too_and_one_packed_sequence_is_one() -> None:
    by_name = pn.replace_modules(Tagger(), {"rnn": "torch"}, kwargs={"ids": IDS, "lengths": LENGTHS})
    both = pn.replace_modules(Tagger(), {"rnn": "torch"}, args=IDS, kwargs={"lengths": LENGTHS})
    assert len(by_name.compared) == len(both.compared) == 4

    class Packed(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.rnn = torch.nn.GRU(3, 4)

        def forward(self, x: Any) -> Any:
            return self.rnn(x)[0]

    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(2, 3), torch.randn(3, 3)], enforce_sorted=False)
    swapped = pn.replace_modules(Packed(), {"rnn": "torch"}, args=packed)
    assert [c.arrays for c in swapped.compared] == [3, 3, 5]  # data, sizes, order; four parameters and the input


def test_a_training_step_can_be_left_out() -> None:
    swapped = pn.replace_modules(Tagger(), {"rnn": "torch"}, args=(IDS, LENGTHS), training=False)
    assert [c.mode for c in swapped.compared] == ["evaluation"]
    assert "no training step was run: training=False" in str(swapped)
    with pytest.raises(pn.UnsupportedError, match=r"does not run on `args` \(training step\).*more than 1 value.*training=False"):
        pn.replace_modules(Tagger(), {"rnn": "torch"}, args=(IDS[:1], LENGTHS[:1]))
    with pytest.raises(pn.UnsupportedError, match=r"does not run on `args` \(evaluation\), before anything was swapped: TypeError"):
        pn.replace_modules(Tagger(), {"rnn": "torch"}, args=IDS)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_of_every_dtype(dtype: str) -> None:
    class Model(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.rnn = torch.nn.LayerNorm(3), torch.nn.GRU(3, 4)

        def forward(self, x: Any) -> Any:
            return self.rnn(self.norm(x))

    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    swapped = pn.replace_modules(Model().to(kind), {"norm": "torch", "rnn": "torch"}, args=torch.randn(5, 2, 3).to(kind))
    assert [c.what for c in swapped.compared] == ["values", "values", "gradients"]


# -- what differs ----------------------------------------------------------------------------------------------------------------------


def gradient_lost(module: Any) -> pn.Layer:
    """Right values, half of the gradients."""
    layer = pn.import_checkpoint(module)

    class Lost(type(layer)):  # type: ignore[misc]
        def backward(self, residuals: Any, dy: Any, dstate: Any, training: bool) -> Any:
            dx, dstate, grads = super().backward(residuals, dy, dstate, training)
            return dx, dstate, {n: 0.5 * g if n == "weight_hh_l0" else g for n, g in grads.items()}

    layer.__class__ = Lost
    return layer


def momentum_lost(module: Any) -> pn.Layer:
    return pn.import_checkpoint(module, momentum=0.1)


def eps_lost(module: Any) -> pn.Layer:
    return pn.import_checkpoint(module, eps=1e-5)


WRONG: dict[str, tuple[str, Callable[[Any], pn.Layer], str]] = {
    "gradients": ("rnn", gradient_lost, r"'rnn' was swapped \(training step\) differ by .* in rnn\.weight_hh_l0"),
    "statistics": ("bn", momentum_lost, r"'bn' was swapped \(training step\) differ by .* in bn\.running_mean"),
    "values": ("norm", eps_lost, r"'norm' \(LayerNorm\) and torch_module.* differ by .* in y"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_differs_is_named_and_the_model_is_as_it_was(what: str) -> None:
    model = Tagger()
    model(IDS, LENGTHS)["scores"].sum().backward()
    model.last = None
    model.bn.eval()
    model.bn.train()
    name, row, message = WRONG[what]
    before = what_it_is(model)
    with pytest.raises(pn.ConformanceError, match=message):
        pn.replace_modules(model, {name: row}, args=(IDS, LENGTHS))
    assert_same(before, what_it_is(model))


class Asks(torch.nn.Module):  # type: ignore[misc]
    """A model that asks its module what only torch's knows."""

    def __init__(self, ask: Callable[[Any], Any], training: bool = False):
        super().__init__()
        self.rnn, self.ask, self.only = torch.nn.GRU(3, 4), ask, training

    def forward(self, x: Any) -> Any:
        y, _ = self.rnn(x)
        return y * (self.ask(self.rnn) if self.training or not self.only else 1.0)


@pytest.mark.parametrize("training", [False, True])
def test_a_model_that_fails_or_goes_another_way_after_the_swap(training: bool) -> None:
    mode = "training step" if training else "evaluation"
    x, model = torch.randn(5, 2, 3), Asks(lambda rnn: len(rnn._flat_weights_names), training)
    before = what_it_is(model)
    with pytest.raises(
        pn.UnsupportedError, match=rf"does not run any more after 'rnn' was swapped, and was left as it was \({mode}\): Attr"
    ):
        pn.replace_modules(model, {"rnn": "torch"}, args=x)
    assert_same(before, what_it_is(model))
    model = Asks(lambda rnn: 2.0 if isinstance(rnn, torch.nn.GRU) else 1.0, training)
    before = what_it_is(model)
    with pytest.raises(pn.ConformanceError, match=rf"'rnn' was swapped \({mode}\) differ by .* in result; rounding allows"):
        pn.replace_modules(model, {"rnn": "torch"}, args=x)
    assert_same(before, what_it_is(model))


def test_a_model_without_results_or_with_others_each_time() -> None:
    generator = torch.Generator()
    with pytest.raises(pn.UnsupportedError, match=r"gives something else each time that it is run on `args` \(evaluation\)"):
        pn.replace_modules(Asks(lambda rnn: float(torch.rand((), generator=generator))), {"rnn": "torch"}, args=torch.randn(5, 2, 3))

    class Silent(Asks):
        def forward(self, x: Any) -> Any:
            super().forward(x)

    with pytest.raises(pn.UnsupportedError, match="gives nothing that can be compared"):
        pn.replace_modules(Silent(lambda rnn: 1.0), {"rnn": "torch"}, args=torch.randn(5, 2, 3))


def test_random_numbers_are_the_same_before_and_after_and_go_on() -> None:
    """Of torch, NumPy and Python, as teacher forcing and dropout draw them."""
    model = Asks(lambda rnn: random.random() + float(np.random.rand()) + float(torch.rand(())))
    states = []
    for swap in (False, True):
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        if swap:
            pn.replace_modules(model, {"rnn": "torch"}, args=torch.ones(5, 2, 3))
        states.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert states[0] == states[1]


def test_dropout_goes_along_or_is_refused() -> None:
    """By the format it does; a function of a user's that forgets it is told so."""
    model = torch.nn.ModuleList([torch.nn.LSTM(3, 4, 2, dropout=0.5)])
    with pytest.raises(pn.UnsupportedError, match=r"'0' has dropout=0\.5 between its layers"):
        pn.replace_modules(model, {"0": lambda m: pn.import_checkpoint(copy.deepcopy(m).apply(lambda m: setattr(m, "dropout", 0.0)))})
    pn.replace_modules(model, {"0": "torch"})
    assert model[0].dropout == model[0].to_layer().dropout == 0.5


class Forgetful(torch.nn.Module):  # type: ignore[misc]
    """A recurrent module of somebody that drops in training, which no weight says."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_ih_l0, self.weight_hh_l0 = torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Any) -> Any:
        h, ys = x.new_zeros(x.shape[1], 4), []
        for one in torch.nn.functional.dropout(x, 0.5, self.training):
            h = torch.tanh(one @ self.weight_ih_l0.T + h @ self.weight_hh_l0.T)
            ys.append(h)
        return torch.stack(ys)


def test_what_only_training_shows_is_seen() -> None:
    model = torch.nn.Sequential(Forgetful())
    table: Any = {Forgetful: lambda m: pn.import_checkpoint(m, "torch", layer="RNN")}
    with pytest.raises(pn.ConformanceError, match=r"\(training step\) differ"):
        pn.replace_modules(model, table, args=torch.randn(5, 2, 3))
    assert pn.replace_modules(model, table, args=torch.randn(5, 2, 3), training=False) == ["0"]


@pytest.mark.parametrize("cast_back", [False, True])
def test_under_autocast_its_rounding_is_allowed(cast_back: bool) -> None:
    class Model(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.front, self.rnn, self.norm = torch.nn.Linear(3, 3), torch.nn.LSTM(3, 4), torch.nn.LayerNorm(4)

        def forward(self, x: Any) -> Any:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.norm(self.rnn(self.front(x))[0])
            return y.float() if cast_back else y

    swapped = pn.replace_modules(Model(), {"rnn": "torch", "norm": "torch"}, args=torch.randn(5, 2, 3))
    assert [c.what for c in swapped.compared] == ["values", "values", "gradients"]
    with pytest.raises(pn.ConformanceError):
        pn.replace_modules(Model(), {"rnn": gradient_lost}, args=torch.randn(5, 2, 3))


def test_graphs_and_states_of_earlier_calls_stay() -> None:
    class Stateful(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.state, self.seen = torch.nn.LSTM(3, 4), None, {"states": []}

        def forward(self, x: Any) -> Any:
            y, self.state = self.rnn(x, self.state)
            self.seen["states"].append(self.state[0])
            return y

    model, x = Stateful(), torch.randn(5, 2, 3)
    loss, kept = model(x).sum(), None
    theirs, kept = model.rnn, model.state
    assert pn.replace_modules(model, {"rnn": "torch"}, args=x) == ["rnn"]
    assert model.state is kept
    assert len(model.seen["states"]) == 1
    loss.backward()
    assert theirs.weight_hh_l0.grad is not None


@dataclasses.dataclass
class Output:
    y: Any
    spread: Any


def test_results_of_any_kind_are_looked_into() -> None:
    class Model(Asks):
        def forward(self, x: Any) -> Any:
            y = super().forward(x)
            return Output({"y": [y, 3]}, torch.distributions.Normal(y, y.exp()))

    swapped = pn.replace_modules(Model(lambda rnn: 1.0), {"rnn": "torch"}, args=torch.randn(5, 2, 3))
    assert swapped.compared[0].arrays >= 4


@pytest.mark.parametrize("old", [False, True], ids=["parametrized", "old"])
def test_gradients_of_weight_norm(old: bool) -> None:
    model = torch.nn.Sequential(torch.nn.GRU(3, 4))
    norm = torch.nn.utils.weight_norm if old else torch.nn.utils.parametrizations.weight_norm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for name in ("weight_ih_l0", "weight_hh_l0"):
            norm(model[0], name)
    swapped = pn.replace_modules(model, {"0": "torch"}, args=torch.randn(5, 2, 3))
    assert "training step: 2 gradients along random directions agree" in str(swapped)
    assert model[0].to_layer().norm == "weight"


# -- gradients of parameters in another form ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_gradients_of_parameters_that_have_other_names(bidirectional: bool, wrong: bool) -> None:
    from tests.torch_cells import StackedLSTM

    class Model(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.front, self.rnn = torch.nn.Linear(3, 4), StackedLSTM(4, 5, 2, bidirectional)

        def forward(self, x: Any) -> Any:
            zeros = x.new_zeros(x.shape[1], 5)
            one = [(zeros, zeros)] * 2 if bidirectional else (zeros, zeros)
            return self.rnn(self.front(x), states=[one, one])

    def halved(module: Any) -> pn.Layer:
        layer = pn.import_checkpoint(module, "torch-fastrnns")

        class Halved(type(layer)):  # type: ignore[misc]
            def backward(self, residuals: Any, dy: Any, dstate: Any, training: bool) -> Any:
                dx, dstate, grads = super().backward(residuals, dy, dstate, training)
                return dx, dstate, {n: 0.5 * g if n == "weight_hh_l1" else g for n, g in grads.items()}

        layer.__class__ = Halved
        return layer

    model, x = Model(), torch.randn(6, 3, 3)
    if wrong:
        with pytest.raises(pn.ConformanceError, match="differ in the gradients of 'rnn': along a random direction"):
            pn.replace_modules(model, {StackedLSTM: halved}, args=x)
        return
    swapped = pn.replace_modules(model, {StackedLSTM: "torch-fastrnns"}, args=x)
    found = {c.what: c.arrays for c in swapped.compared if c.mode == "training step"}
    assert found["gradients along random directions"] == 2
    assert found["gradients"] == 3  # of `front` and the input


def test_what_is_frozen_stays_frozen_one_by_one() -> None:
    from tests.torch_cells import StackedLSTM

    model = torch.nn.ModuleDict({"rnn": torch.nn.LSTM(3, 4), "cell": torch.nn.GRUCell(3, 4), "norm": torch.nn.LayerNorm(4)})
    model["rnn"].weight_ih_l0.requires_grad_(False)
    model["cell"].bias_hh.requires_grad_(False)
    model["norm"].bias.requires_grad_(False)
    pn.replace_modules(model, {"rnn": "torch", "cell": "torch", "norm": "torch"})
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"rnn.weight_ih_l0", "cell.bias_hh_l0", "norm.bias"}
    stack = torch.nn.ModuleDict({"rnn": StackedLSTM(3, 4)})
    stack["rnn"].layers[0].cell.weight_ih.requires_grad_(False)
    with pytest.raises(pn.UnsupportedError, match=r"'layers\.0\.cell\.weight_ih' frozen and the rest not"):
        pn.replace_modules(stack, {"rnn": "torch-fastrnns"})


def test_a_parameter_that_is_shared_is_not_parted() -> None:
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 4), "out": torch.nn.Linear(4, 5)})
    model["out"].weight = model["embed"].weight
    with pytest.raises(pn.UnsupportedError, match=r"'embed\.weight' and 'out\.weight' are one parameter"):
        pn.replace_modules(model, {torch.nn.Linear: "torch"})
    model["out"].weight.requires_grad_(False)
    assert pn.replace_modules(model, {torch.nn.Linear: "torch"}) == ["out"]


# -- which modules ---------------------------------------------------------------------------------------------------------------------


def nested() -> Any:
    return torch.nn.ModuleDict(
        {
            "encoder": torch.nn.ModuleDict({"rnn": torch.nn.GRU(3, 4), "norm": torch.nn.LayerNorm(4)}),
            "decoder": torch.nn.ModuleDict({"rnn": torch.nn.GRU(3, 4), "cell": torch.nn.LSTMCell(3, 4)}),
        }
    )


@pytest.mark.parametrize(
    ("keys", "paths"),
    [
        (["encoder.rnn"], ["encoder.rnn"]),
        (["cell"], ["decoder.cell"]),
        (["norm", torch.nn.GRU], ["encoder.rnn", "encoder.norm", "decoder.rnn"]),
        (["decoder.rnn", torch.nn.LayerNorm], ["encoder.norm", "decoder.rnn"]),
    ],
)
def test_names_are_keys_as_classes_are(keys: list[Any], paths: list[str]) -> None:
    model = nested()
    before = {path: type(model.get_submodule(path)) for path in ("encoder.rnn", "encoder.norm", "decoder.rnn", "decoder.cell")}
    assert pn.replace_modules(model, dict.fromkeys(keys, "torch")) == paths
    for path, kind in before.items():
        assert (type(model.get_submodule(path)) is kind) == (path not in paths)


def test_a_name_goes_before_a_class() -> None:
    model = nested()
    seen = []

    def row(module: Any) -> pn.Layer:
        seen.append(module)
        return pn.import_checkpoint(module)

    encoder = model["encoder"]["rnn"]
    pn.replace_modules(model, {torch.nn.GRU: "torch", "encoder.rnn": row})
    assert seen == [encoder]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, r"`table` is empty; expected what to swap"),
        ([torch.nn.LayerNorm], r"`table` is a list; expected what to swap"),
        ({3: "torch"}, r"`table` has the key 3; expected a class of modules, or the name of one"),
        ({None: "torch"}, r"`table` has the key None; expected a class"),
        ({int: "torch"}, r"`table` has the key <class 'int'>; expected a class of modules"),
        ({torch.nn.LayerNorm(4): "torch"}, r"`table` has the key LayerNorm\(.*; expected a class of modules"),
        ({"0": 3}, r"`table` has 3 for '0'; expected the format of its weights"),
        ({"0": None}, r"`table` has None for '0'; expected the format of its weights"),
    ],
)
def test_a_table_of_another_kind_is_refused(table: Any, message: str) -> None:
    with pytest.raises(pn.UnsupportedError, match=message):
        pn.replace_modules(torch.nn.Sequential(torch.nn.LayerNorm(4)), table)


@pytest.mark.parametrize("kind", [torch.nn.GRU, torch.nn.RNNBase])
def test_a_model_that_is_the_module_itself_is_said(kind: Any) -> None:
    with pytest.raises(
        pn.UnsupportedError, match=r"it is itself a GRU.*portnorm\.torch_module\(portnorm\.import_checkpoint\(model, 'torch'\)\)"
    ):
        pn.replace_modules(torch.nn.GRU(4, 5), {kind: "torch"})
    with pytest.raises(pn.UnsupportedError, match=r"`model` is a int; expected a torch\.nn\.Module"):
        pn.replace_modules(3, {kind: "torch"})  # type: ignore[arg-type]


def test_names_that_are_not_there_or_not_one() -> None:
    model = nested()
    with pytest.raises(pn.UnsupportedError, match=r"has 'rnn', which is the end of decoder\.rnn, encoder\.rnn; expected one"):
        pn.replace_modules(model, {"rnn": "torch"})
    with pytest.raises(pn.UnsupportedError, match=r"no module of that name; it has .*encoder\.rnn"):
        pn.replace_modules(model, {"encoder.rn": "torch"})
    with pytest.raises(pn.UnsupportedError, match=r"'encoder\.rnn', which is inside a module that is swapped"):
        pn.replace_modules(model, {"encoder": "torch", "encoder.rnn": "torch"})
    with pytest.raises(pn.UnsupportedError, match=r"'cell' and 'decoder\.cell', which name one module"):
        pn.replace_modules(model, {"cell": "torch", "decoder.cell": "torch"})
    shared = torch.nn.ModuleDict({"a": torch.nn.GRU(3, 4)})
    shared["b"] = shared["a"]
    assert pn.replace_modules(shared, {"b": "torch"}) == ["a", "b"]
    assert shared["a"] is shared["b"]


# -- how replacements are called -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_a_replacement_is_called_in_every_way_of_torchs(cell: str, layers: int, bidirectional: bool, batch_first: bool) -> None:
    theirs = getattr(torch.nn, cell)(3, 4, layers, bidirectional=bidirectional, batch_first=batch_first)
    model = torch.nn.ModuleDict({"rnn": theirs})
    pn.replace_modules(model, {"rnn": "torch"})
    ours = model["rnn"]
    places = layers * (2 if bidirectional else 1)
    x, one = torch.randn(2, 2, 3), torch.randn(5, 3)
    hx, h1 = (tuple(torch.randn(*shape) for _ in range(2)) for shape in ((places, 2, 4), (places, 4)))
    hx, h1 = (hx, h1) if cell == "LSTM" else (hx[0], h1[0])
    packed = pack(x, [1, 2], batch_first, enforce_sorted=False)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x,), {}),
        ((x, hx), {}),
        ((), {"input": x, "hx": hx}),
        ((x,), {"hx": None}),
        ((one,), {}),
        ((one, h1), {}),
        ((packed, hx), {}),
        ((packed,), {}),
    ]
    for args, named in calls:
        torch.testing.assert_close(ours(*args, **named), theirs(*args, **named), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("by", ["class", "name"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", [*CELLS, "RNN with relu"])
def test_cells_in_a_loop_of_ones_own(cell: str, bias: bool, by: str) -> None:
    cell, _, function = cell.partition(" with ")

    class Loop(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.cell = getattr(torch.nn, f"{cell}Cell")(3, 4, bias=bias, **({"nonlinearity": function} if function else {}))
            self.out = torch.nn.Linear(4, 2)

        def forward(self, x: Any) -> Any:
            state, ys = self.cell(x[0]), []
            for one in x[1:]:
                state = self.cell(one, hx=state)
                ys.append(state[0] if isinstance(state, tuple) else state)
            scale = self.cell.hidden_size * self.cell.input_size * self.cell.weight_hh.shape[0]
            return self.out(torch.stack(ys)) / scale, self.cell.bias, self.cell.bias_ih is None

    model = Loop()
    theirs = model.cell
    swapped = pn.replace_modules(model, {type(theirs) if by == "class" else "cell": "torch"}, args=torch.randn(5, 2, 3))
    assert [(c.mode, c.what, c.arrays) for c in swapped.compared][2] == ("training step", "gradients", 4 + 3 if bias else 2 + 3)
    x, h, c = torch.randn(2, 3), torch.randn(2, 4), torch.randn(2, 4)
    state = (h, c) if cell == "LSTM" else h
    calls = [(x,), (x, state), (x[0],), (x[0], (h[0], c[0]) if cell == "LSTM" else h[0])]
    for args in calls:
        torch.testing.assert_close(model.cell(*args), theirs(*args), rtol=1e-5, atol=1e-6)
    expected = theirs(x, state)
    y, after = model.cell.step(x, state)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(y, expected[0] if cell == "LSTM" else expected, rtol=1e-5, atol=1e-6)
    whole, _ = pn.torch_module(model.cell.to_layer())(x[None])
    torch.testing.assert_close(whole[0], model.cell.step(x)[0])
    for name in [n for n in dir(theirs) if not n.startswith("_") and n not in dir(torch.nn.Module()) and not callable(getattr(theirs, n))]:
        value = getattr(theirs, name)
        assert torch.equal(getattr(model.cell, name), value) if isinstance(value, torch.Tensor) else getattr(model.cell, name) == value, (
            name
        )
    with pytest.raises(pn.UnsupportedError, match="one step of"):
        model.cell(x, lengths=[1, 1])


class Wrapper(torch.nn.Module):  # type: ignore[misc]
    """Takes lengths second, packs inside, and has attributes of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.LSTM(3, 4, batch_first=True)
        self.hidden_dim, self.name, self.sizes, self.absent = 4, "wrapper", [3, 4], None

    def forward(self, frames: Any, frame_lengths: Any, memory: Any = None) -> Any:
        y, state = self.inner(pack(frames, frame_lengths, True, enforce_sorted=False), memory)
        return pad(y, True)[0], state


def test_lengths_second_and_attributes_of_ones_own() -> None:
    class Model(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.rnn = Wrapper()

        def forward(self, x: Any, lengths: Any) -> Any:
            y, state = self.rnn(x, lengths)
            z, _ = self.rnn(frames=y[..., :3], frame_lengths=lengths, memory=state)
            return z.reshape(-1, self.rnn.hidden_dim), self.rnn.sizes, self.rnn.absent is None

    model = Model()
    pn.replace_modules(model, {Wrapper: lambda m: pn.import_checkpoint(m.inner)}, args=(torch.randn(3, 5, 3), torch.tensor([2, 5, 3])))
    assert model.rnn.name == "wrapper"
    model.rnn.hidden_dim = 4
    with pytest.raises(pn.UnsupportedError, match=r"`hidden_dim` is 5, but .* computes as the module in whose place it stands"):
        model.rnn.hidden_dim = 5
    with pytest.raises(TypeError, match="no argument `frame`"):
        model.rnn(frame=1)


def test_settings_of_a_norm_that_are_assigned_count() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3, affine=False))
    other = copy.deepcopy(model)
    pn.replace_modules(model, {torch.nn.BatchNorm1d: "torch"})
    assert (model[0].num_features, model[0].weight, model[0].track_running_stats) == (3, None, True)
    x = torch.randn(8, 3)
    for m in (model, other):
        m[0].momentum, m[0].eps = 0.7, 0.1
        m(x)
    torch.testing.assert_close(model[0].running_mean, other[0].running_mean)
    torch.testing.assert_close(model(x), other(x))


# -- norms ---------------------------------------------------------------------------------------------------------------------------------

NORMS: dict[str, tuple[tuple[Any, ...], tuple[int, ...]]] = {
    "LayerNorm": ((4,), (5, 4)),
    "LayerNorm over two axes": (((3, 4),), (5, 3, 4)),
    "RMSNorm": ((4,), (5, 4)),
    "GroupNorm": ((2, 4), (5, 4, 3)),
    "BatchNorm1d": ((4,), (5, 4)),
    "BatchNorm2d": ((4,), (5, 4, 3, 2)),
    "BatchNorm3d": ((4,), (5, 4, 3, 2, 2)),
    "InstanceNorm1d": ((4,), (5, 4, 7)),
    "InstanceNorm2d": ((4,), (5, 4, 3, 2)),
    "InstanceNorm3d": ((4,), (5, 4, 3, 2, 2)),
}
SAID: dict[str, dict[str, Any]] = {
    "as usual": {},
    "eps": {"eps": 1e-2},
    "without elements": {"elementwise_affine": False},
    "without affine": {"affine": False},
    "affine": {"affine": True},
    "without bias": {"bias": False},
    "momentum": {"momentum": 0.3},
    "of all batches": {"momentum": None},
    "statistics": {"track_running_stats": True, "affine": True},
    "statistics, not affine": {"track_running_stats": True, "affine": False, "eps": 1e-2},
    "no statistics": {"track_running_stats": False},
    "nothing": {"track_running_stats": False, "affine": False},
}


def norms() -> list[Any]:
    found = []
    for name, (args, shape) in NORMS.items():
        for kind, said in SAID.items():
            make = getattr(torch.nn, name.partition(" ")[0])
            try:
                make(*args, **said)
            except TypeError:  # it has no such setting
                continue
            found.append(pytest.param(make, args, said, shape, id=f"{name}-{kind}"))
    return found


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("example", [False, True], ids=["random", "example"])
@pytest.mark.parametrize(("make", "args", "said", "shape"), norms())
def test_a_norm_says_its_settings(make: Any, args: Any, said: dict[str, Any], shape: tuple[int, ...], example: bool, dtype: str) -> None:
    """Swapped by its class, and as the module in training and evaluation; or refused by the setting that no layer here has."""
    torch.manual_seed(0)
    theirs = make(*args, **said).to(getattr(torch, dtype))
    x = 2.0 + torch.randn(shape, dtype=getattr(torch, dtype))
    theirs(x)
    model = torch.nn.Sequential(copy.deepcopy(theirs))
    table, given = {make: "torch"}, x if example else None
    if "BatchNorm" in make.__name__ and not theirs.track_running_stats:
        with pytest.raises(pn.CheckpointError, match=r"'0': .*track_running_stats=False and no running statistics"):
            pn.replace_modules(model, table, args=given)
        return
    assert pn.replace_modules(model, table, args=given) == ["0"]
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 1e-7, "atol": 1e-7}
    for training in (True, False):
        torch.testing.assert_close(model.train(training)(x), theirs.train(training)(x), **tolerance)
    layer = model[0].to_layer()
    assert layer.eps == theirs.eps
    for name, buffer in theirs.named_buffers():
        if "running" in name:
            torch.testing.assert_close(getattr(model[0], name), buffer, **tolerance)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("after", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("before", ["float16", "bfloat16", "float32", "float64"])
def test_an_eps_that_follows_the_dtype_goes_on_to(before: str, after: str, affine: bool) -> None:
    """torch.nn.RMSNorm without an `eps` has that of the type it computes in when it is called, which counts for small inputs."""
    model = torch.nn.Sequential(torch.nn.RMSNorm(4, elementwise_affine=affine)).to(getattr(torch, before))
    other, x = copy.deepcopy(model), 1e-4 * torch.randn(8, 4, dtype=torch.float64)
    pn.replace_modules(model, {torch.nn.RMSNorm: "torch"}, args=x.to(getattr(torch, before)))
    model, other, x = (a.to(getattr(torch, after)) for a in (model, other, x))
    tolerance = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-6, "float64": 1e-7}[after]  # torch's ε is a float64, ours a float32
    torch.testing.assert_close(model(x), other(x), rtol=tolerance, atol=tolerance)


EMBEDDINGS: dict[str, dict[str, Any]] = {
    "padding_idx=0": {"padding_idx": 0},
    "max_norm=1.0": {"max_norm": 1.0},
    "scale_grad_by_freq=True": {"scale_grad_by_freq": True},
    "sparse=True": {"sparse": True},
}


@pytest.mark.parametrize("key", [torch.nn.Embedding, "0"])
@pytest.mark.parametrize("sizes", [(6, 6), (10, 3)])
@pytest.mark.parametrize("example", [False, True], ids=["random", "example"])
def test_an_embedding_is_a_layer_here(key: Any, sizes: tuple[int, int], example: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(*sizes))
    other, ids = copy.deepcopy(model), torch.tensor([[1, 2], [0, 5]])
    assert pn.replace_modules(model, {key: "torch"}, args=ids if example else None) == ["0"]
    assert isinstance(model[0].to_layer(), pn.Embedding)
    torch.testing.assert_close(model(ids), other(ids), rtol=0, atol=0)


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_what_an_embedding_does_only_in_torch_is_refused(name: str) -> None:
    model, ids = torch.nn.Sequential(torch.nn.Embedding(6, 4, **EMBEDDINGS[name])), torch.tensor([1, 0])
    left = name.partition("=")[0]
    with pytest.raises(pn.CheckpointError, match=rf"'0': .*{name},? .*ignore=\('{left}',\)"):
        pn.replace_modules(model, {torch.nn.Embedding: "torch"}, args=ids)
    if left == "padding_idx":  # what was ignored is seen where the model is trained on it
        with pytest.raises(pn.ConformanceError, match="training step"):
            pn.replace_modules(model, {torch.nn.Embedding: "torch"}, args=ids, ignore=(left,))
    if left == "max_norm":  # which shortens them in evaluation too
        with pytest.raises(pn.ConformanceError, match="differ by"):
            pn.replace_modules(model, {torch.nn.Embedding: "torch"}, args=ids, ignore=(left,))
    else:
        assert pn.replace_modules(model, {torch.nn.Embedding: "torch"}, args=ids, ignore=(left,), training=False) == ["0"]


def test_statistics_of_several_processes_are_refused() -> None:
    model = torch.nn.Sequential(torch.nn.SyncBatchNorm(4))
    for key in (torch.nn.SyncBatchNorm, torch.nn.modules.batchnorm._BatchNorm, "0"):
        with pytest.raises(pn.CheckpointError, match=r"'0': .*SyncBatchNorm has in training the statistics of all processes.*`reduce`"):
            pn.replace_modules(model, {key: "torch"})

    def summed(module: Any) -> Any:
        layer: Any = pn.import_checkpoint(module, "torch", ignore=("process_group",))
        layer.reduce = lambda a: a
        return layer

    assert pn.replace_modules(model, {torch.nn.SyncBatchNorm: summed}) == ["0"]
    assert model[0].to_layer().reduce is not None


@pytest.mark.parametrize("name", ["LazyBatchNorm1d", "LazyInstanceNorm1d", "LazyLinear"])
def test_a_module_without_sizes_is_to_be_run_once(name: str) -> None:
    lazy, x = getattr(torch.nn, name), torch.randn(8, 3, 5)
    model = torch.nn.Sequential(lazy(4) if name == "LazyLinear" else lazy(affine=True))
    for key in (lazy, "0"):
        with pytest.raises(pn.UnsupportedError, match=rf"'0' \({name}\) has no sizes yet; run the model once"):
            pn.replace_modules(model, {key: "torch"}, args=x)
    model(x)
    assert pn.replace_modules(model, {type(model[0]): "torch"}, args=x) == ["0"]


@pytest.mark.parametrize("name", ["BatchNorm1d", "InstanceNorm1d"])
def test_statistics_that_are_there_and_not_followed_are_refused(name: str) -> None:
    module = getattr(torch.nn, name)(4, track_running_stats=True)
    module.track_running_stats = False
    with pytest.raises(pn.CheckpointError, match=r"track_running_stats=False, but has running statistics"):
        pn.replace_modules(torch.nn.Sequential(module), {type(module): "torch"})
    for kind in (torch.nn.InstanceNorm1d, torch.nn.InstanceNorm2d):
        with pytest.raises(pn.CheckpointError, match="momentum=None"):
            pn.import_checkpoint(kind(4, track_running_stats=True, momentum=None))


BARE: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "BatchNorm1d": (lambda: torch.nn.BatchNorm1d(4, affine=False), (6, 4)),
    "BatchNorm1d of two": (lambda: torch.nn.BatchNorm1d(4, affine=False), (2, 4)),
    "BatchNorm2d": (lambda: torch.nn.BatchNorm2d(4, affine=False), (5, 4, 3, 2)),
    "GroupNorm": (lambda: torch.nn.GroupNorm(2, 4, affine=False), (5, 4, 3, 2)),
    "InstanceNorm1d": (lambda: torch.nn.InstanceNorm1d(4), (5, 4, 7)),
    "InstanceNorm2d": (lambda: torch.nn.InstanceNorm2d(4), (5, 4, 3, 2)),
    "LayerNorm": (lambda: torch.nn.LayerNorm(8, elementwise_affine=False), (5, 8)),
    "RMSNorm": (lambda: torch.nn.RMSNorm(8, elementwise_affine=False), (5, 8)),
}
"""Norms without parameters, so that the gradient of the input is the only one."""
PLACES = [(3.0, 2.0), (1.0, 100.0), (1.0, 0.0), (1e-3, 1.0)]
"""The scale and the mean of an input."""
CONSTANT = [(1e-6, 5.0), (0.0, 100.1), (1e-3, 1e4)]
"""Those of inputs that are constant but for rounding, which is then all of a result, or most of it."""


@pytest.mark.parametrize(("scale", "offset"), PLACES)
@pytest.mark.parametrize("name", BARE)
def test_a_norm_without_parameters_is_swapped_wherever_its_input_lies(name: str, scale: float, offset: float) -> None:
    """From every seed, also one with which the weights of the results could be drawn: a gradient that cancels says nothing of the swap."""
    make, shape = BARE[name]
    for seed in range(6):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(make())
        swapped = pn.replace_modules(model, {"0": "torch"}, args=scale * torch.randn(shape) + offset)
        assert ("training step", "gradients", 1) in [(c.mode, c.what, c.arrays) for c in swapped.compared]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BARE)
def test_a_norm_without_parameters_is_swapped_where_its_input_is_constant_but_for_rounding(name: str, dtype: Any) -> None:
    """There rounding moves a result by all of it; that it is rounding shows in the other dtype, and so does what is none."""
    make, shape = BARE[name]
    for scale, offset in CONSTANT:
        torch.manual_seed(0)
        x = scale * torch.randn(shape, dtype=dtype) + offset
        pn.replace_modules(torch.nn.Sequential(make()).to(dtype), {"0": "torch"}, args=x)
    x = CONSTANT[0][0] * torch.randn(shape, dtype=dtype) + CONSTANT[0][1]
    with pytest.raises(pn.ConformanceError, match="differ by"):
        pn.replace_modules(torch.nn.Sequential(make()).to(dtype), {"0": wrong("eps")}, args=x)


def wrong(part: str) -> Callable[[Any], pn.Layer]:
    """The layer with a fault that models show in little: ε, the divisor of the variance, or a gradient without a small part of it."""

    def made(module: Any) -> pn.Layer:
        if part == "eps":
            return pn.import_checkpoint(module, "torch", eps=1e-3)
        if part == "momentum":
            return pn.import_checkpoint(module, "torch", momentum=0.11)
        layer = pn.import_checkpoint(module, "torch")

        class Wrong(type(layer)):  # type: ignore[misc]
            def forward(self, *args: Any) -> Any:
                y, *rest = super().forward(*args)
                return y * (1 - 1e-3 if part == "variance" else 1.0), *rest

            def backward(self, residuals: Any, dy: Any, dstate: Any, training: bool) -> Any:
                dx, *rest = super().backward(residuals, dy, dstate, training)
                return dx + (1e-2 * dy if part == "gradient" else 0.0), *rest

        layer.__class__ = Wrong
        return layer

    return made


@pytest.mark.parametrize(
    ("name", "part"),
    [(name, part) for name in BARE for part in ("eps", "variance", "gradient", "momentum") if part != "momentum" or "Batch" in name],
)
def test_a_norm_without_parameters_that_is_wrong_is_refused(name: str, part: str) -> None:
    make, shape = BARE[name]
    for scale, offset in ((3.0, 2.0), (1.0, 0.0)):
        for seed in range(2):
            torch.manual_seed(seed)
            with pytest.raises(pn.ConformanceError, match="differ by"):
                pn.replace_modules(torch.nn.Sequential(make()), {"0": wrong(part)}, args=scale * torch.randn(shape) + offset)


# -- what is attached to a module ----------------------------------------------------------------------------------------------------------


def seen(*args: Any) -> None:
    """A hook that only looks."""


def doubled(module: Any, *given: Any) -> Any:
    """A hook that changes the last of what it gets: what went in, came out, or comes back."""
    return tuple(2 * a if isinstance(a, torch.Tensor) else a for a in given[-1])


HOOKS: dict[str, Callable[[Any, Any], Any]] = {
    "a forward hook": lambda m, hook: m.register_forward_hook(hook),
    "a forward pre-hook": lambda m, hook: m.register_forward_pre_hook(hook),
    "a backward hook": lambda m, hook: m.register_full_backward_hook(hook),
    "a backward pre-hook": lambda m, hook: m.register_full_backward_pre_hook(hook),
    "a gradient hook": lambda m, hook: m.weight_hh_l0.register_hook(hook),
    "a post-accumulate-grad hook": lambda m, hook: m.weight_hh_l0.register_post_accumulate_grad_hook(hook),
    "a state-dict pre-hook": lambda m, hook: m.register_state_dict_pre_hook(hook),
    "a state-dict hook": lambda m, hook: m.register_state_dict_post_hook(hook),
    "a pre-hook of load_state_dict": lambda m, hook: m.register_load_state_dict_pre_hook(hook),
    "a hook of load_state_dict": lambda m, hook: m.register_load_state_dict_post_hook(hook),
}


@pytest.mark.parametrize(
    ("what", "hook"),
    [(what, hook) for what in HOOKS for hook in (seen, doubled) if hook is seen or "ward" in what],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_hook_that_would_be_lost_is_named(what: str, hook: Any) -> None:
    """Of the module, of one inside it, or of a parameter; with inputs and without, whatever the row is. Those around it are no matter."""
    x = torch.randn(5, 2, 3)
    row: Callable[[Any], pn.Layer] = lambda m: pn.import_checkpoint(m)  # noqa: E731
    for given in (None, x):
        for replacement in ("torch", row):
            model = torch.nn.ModuleDict({"encoder": torch.nn.Sequential(torch.nn.GRU(3, 4))})
            model["encoder"].forward = lambda x, model=model: model["encoder"][0](x)
            outer = torch.nn.Sequential(model["encoder"])
            handle = HOOKS[what](model["encoder"][0], hook)
            before = what_it_is(outer)
            with pytest.raises(
                pn.UnsupportedError, match=rf"'0\.0.* has {what}, `{hook.__name__}`, which the layer in the place of '0\.0' would"
            ):
                pn.replace_modules(outer, {torch.nn.GRU: replacement}, args=given)
            assert_same(before, what_it_is(outer))
            handle.remove()
            outer[0].register_forward_hook(lambda m, i, o: None)
            assert pn.replace_modules(outer, {torch.nn.GRU: replacement}, args=given) == ["0.0"]


def test_a_hook_of_a_module_inside_is_named() -> None:
    class Model(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.rnn = Wrapper()

        def forward(self, x: Any, lengths: Any) -> Any:
            return self.rnn(x, lengths)

    model = Model()
    model.rnn.inner.register_forward_hook(seen)
    with pytest.raises(pn.UnsupportedError, match=r"'rnn\.inner' has a forward hook, `seen`, which the layer in the place of 'rnn' would"):
        pn.replace_modules(model, {Wrapper: lambda m: pn.import_checkpoint(m.inner)})


PARAMETRIZED: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "of one's own": (
        lambda m: torch.nn.utils.parametrize.register_parametrization(m, "weight_hh_l0", torch.nn.Tanh(), unsafe=True),
        "Tanh",
        "parametrize.remove_parametrizations",
    ),
    "spectral norm": (
        lambda m: torch.nn.utils.parametrizations.spectral_norm(m, "weight_hh_l0"),
        "_SpectralNorm",
        "parametrize.remove_parametrizations",
    ),
    "orthogonal": (
        lambda m: torch.nn.utils.parametrizations.orthogonal(m, "weight_hh_l0"),
        "_Orthogonal",
        "parametrize.remove_parametrizations",
    ),
    "weight norm of one": (
        lambda m: torch.nn.utils.parametrizations.weight_norm(m, "weight_hh_l0"),
        "_WeightNorm",
        "parametrize.remove_parametrizations",
    ),
    "old weight norm of one": (lambda m: torch.nn.utils.weight_norm(m, "weight_hh_l0"), "WeightNorm", "remove_weight_norm"),
    "old spectral norm": (lambda m: torch.nn.utils.spectral_norm(m, "weight_hh_l0"), "SpectralNorm", "remove_spectral_norm"),
    "pruned": (
        lambda m: importlib.import_module("torch.nn.utils.prune").l1_unstructured(m, "weight_hh_l0", 0.5),
        "L1Unstructured",
        "prune.remove",
    ),
}


@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_a_parameter_that_is_computed_is_named_with_what_makes_it_plain(kind: str) -> None:
    """Both matrices with weight norm are the variant of that name (`test_gradients_of_weight_norm`); nothing else is."""
    attach, by, remove = PARAMETRIZED[kind]
    for given in (None, torch.randn(5, 2, 3)):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.GRU(3, 4))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            attach(model[0])
        model(torch.randn(5, 2, 3))
        with pytest.raises(pn.UnsupportedError, match=rf"'0' has 'weight_hh_l0' computed by {by}, .*{remove}\(module, 'weight_hh_l0'\)"):
            pn.replace_modules(model, {"0": "torch"}, args=given)
        function: Any = torch
        for part in ("nn", "utils", *remove.split(".")):
            function = getattr(function, part)
        function(model[0], "weight_hh_l0")
        assert pn.replace_modules(model, {"0": "torch"}, args=given) == ["0"]


def test_a_forward_of_one_module_alone_is_named() -> None:
    model = torch.nn.Sequential(torch.nn.GRU(3, 4))
    plain = model[0].forward
    model[0].forward = lambda *args, **named: tuple(2 * a for a in plain(*args, **named))
    with pytest.raises(pn.CheckpointError, match=r"'0': the module .*GRU has a forward of its own"):
        pn.replace_modules(model, {"0": "torch"})
    del model[0].forward
    assert pn.replace_modules(model, {"0": "torch"}) == ["0"]


class Own(torch.nn.GRU):  # type: ignore[misc]
    """A call that is not torch's, and a forward that is."""

    def __call__(self, *args: Any, **named: Any) -> Any:
        return tuple(2 * a for a in super().__call__(*args, **named))


def test_a_call_of_a_class_alone_is_named() -> None:
    for given in (None, torch.randn(5, 2, 3)):
        with pytest.raises(pn.CheckpointError, match=r"'0': the module .*Own has a __call__ of its own"):
            pn.replace_modules(torch.nn.Sequential(Own(3, 4)), {torch.nn.GRU: "torch"}, args=given)


def test_a_hook_of_all_modules_is_named_where_a_module_differs() -> None:
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, i, o: 2 * o if type(m) is torch.nn.LayerNorm else None)
    try:
        with pytest.raises(pn.ConformanceError, match=r"differ by .*<lambda>` is a hook of all modules"):
            pn.replace_modules(torch.nn.Sequential(torch.nn.LayerNorm(4)), {"0": "torch"}, args=torch.randn(5, 4))
    finally:
        handle.remove()


# -- what goes on with a module ------------------------------------------------------------------------------------------------------------


class Holder(torch.nn.Module):  # type: ignore[misc]
    """Calls its layer by what is in `held`, from which `run` takes it."""

    def __init__(self, hold: Callable[[Any], Any], run: Callable[[Any], Any] = lambda held: held):
        super().__init__()
        self.rnn = torch.nn.GRU(3, 4)
        self.held, self.run = hold(self.rnn), run

    def forward(self, x: Any) -> Any:
        return self.run(self.held)(x)[0]


HELD: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], str]] = {
    "a list": (lambda m: [m], lambda held: held[0], "'rnn'"),
    "a dict in a tuple": (lambda m: ({"a": m},), lambda held: held[0]["a"], "'rnn'"),
    "a method": (lambda m: m.forward, lambda held: held, "'rnn'"),
    "a partial": (lambda m: functools.partial(m, hx=None), lambda held: held, "'rnn'"),
    "a function": (lambda m: lambda x: m(x), lambda held: held, "'rnn'"),
    "a default": (lambda m: lambda x, m=m: m(x), lambda held: held, "'rnn'"),
    "an optimizer": (
        lambda m: torch.optim.SGD(m.parameters(), 0.1),
        lambda held: lambda x: (x * held.param_groups[0]["lr"],),
        r"'rnn\.weight_ih_l0'",
    ),
    "a parameter": (lambda m: [m, m.bias_hh_l0][1:], lambda held: lambda x: (x * held[0][0],), r"'rnn\.bias_hh_l0'"),
}


@pytest.mark.parametrize("kind", HELD)
def test_what_would_go_on_with_a_module_is_named(kind: str) -> None:
    """With inputs and without: the model would compute with weights that nobody trains, and nothing would be seen of it at first."""
    hold, run, name = HELD[kind]
    x = torch.randn(5, 2, 3)
    for given in (None, x):
        model = torch.nn.Sequential(Holder(hold, run))
        before = what_it_is(model)
        with pytest.raises(pn.UnsupportedError, match=rf"`held` of '0' \(Holder\) holds {name.replace('rnn', '0[.]rnn')} and would go on"):
            pn.replace_modules(model, {torch.nn.GRU: "torch"}, args=given)
        assert_same(before, what_it_is(model))


def test_a_module_that_is_reached_where_nobody_looks_is_named() -> None:
    class Hidden:
        """Not looked into."""

    def hold(module: Any) -> Any:
        found = Hidden()
        found.module = module
        return found

    for run, after in ((lambda held: held.module, 0), (lambda held: lambda x: held.module(held.module.me(x)[0] @ torch.ones(4, 3)), 1)):
        model = Holder(hold, run)
        model.held.module.me = lambda x, model=model: model.rnn(x)
        before = what_it_is(model)
        with pytest.raises(
            pn.UnsupportedError, match=rf"'rnn' \(GRU\) is called {after + 1} times before the swap and {after} times after"
        ):
            pn.replace_modules(model, {torch.nn.GRU: "torch"}, args=torch.randn(5, 2, 3))
        assert_same(before, what_it_is(model))


def test_a_compiled_module_inside_is_swapped_as_a_whole_or_not_at_all() -> None:
    for given in (None, torch.randn(5, 2, 3)):
        model = torch.nn.Sequential(torch.nn.GRU(3, 4))
        model[0] = torch.compile(model[0], backend="eager")
        with pytest.raises(pn.UnsupportedError, match=r"'0' was made by torch\.compile .*; swap it by the name '0', or before"):
            pn.replace_modules(model, {torch.nn.GRU: "torch"}, args=given)
        assert pn.replace_modules(model, {"0": "torch"}, args=given) == ["0"]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_modules_of_torch_jit_are_named() -> None:
    model = torch.nn.Sequential(torch.jit.script(torch.nn.LayerNorm(4)))
    with pytest.raises(pn.UnsupportedError, match=r"'0' was compiled by torch\.jit"):
        pn.replace_modules(model, {"0": "torch"}, args=torch.randn(5, 4))
    for whole in (model, torch.jit.trace(torch.nn.Sequential(torch.nn.LayerNorm(4)), torch.randn(5, 4))):
        with pytest.raises(pn.UnsupportedError, match=r"no module of LayerNorm inside; .*before the model is scripted or traced"):
            pn.replace_modules(whole, {torch.nn.LayerNorm: "torch"}, args=torch.randn(5, 4))


def test_a_call_that_a_layer_does_not_take_is_named_with_its_module() -> None:
    with pytest.raises(pn.UnsupportedError, match=r"'0' \(InstanceNorm1d\) is called in a way that .* cannot be: `x` has shape \(4, 6\)"):
        pn.replace_modules(torch.nn.Sequential(torch.nn.InstanceNorm1d(4)), {"0": "torch"}, args=torch.randn(4, 6))
