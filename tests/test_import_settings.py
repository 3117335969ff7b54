"""What files say beside their arrays: each setting is read, and the layer computes what its library does, or it is refused by name."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from tests.oracles import D, H
from tests.tolerances import LIBRARY_FLOAT32, PUBLISHED_FLOAT64, TORCH_FLOAT64

SEQUENCES = {"return_sequences": True}

# -- Keras, written by Keras ---------------------------------------------------------------------------------------------------------------

KERAS: dict[str, Callable[[Any], Any]] = {
    "LSTM, relu": lambda k: k.LSTM(H, activation="relu", **SEQUENCES),
    "LSTM, hard sigmoid gates": lambda k: k.LSTM(H, recurrent_activation="hard_sigmoid", **SEQUENCES),
    "LSTM, relu gates, sigmoid": lambda k: k.LSTM(H, recurrent_activation="relu", activation="sigmoid", **SEQUENCES),
    "GRU, hard sigmoid gates, relu": lambda k: k.GRU(H, recurrent_activation="hard_sigmoid", activation="relu", **SEQUENCES),
    "GRU, reset before": lambda k: k.GRU(H, reset_after=False, activation="hard_sigmoid", **SEQUENCES),
    "SimpleRNN, relu": lambda k: k.SimpleRNN(H, activation="relu", **SEQUENCES),
    "LSTM, backwards": lambda k: k.LSTM(H, go_backwards=True, **SEQUENCES),
    "GRU, backwards, the last": lambda k: k.GRU(H, go_backwards=True),
    "LSTM, the last": lambda k: k.LSTM(H),
    "both directions": lambda k: k.Bidirectional(k.LSTM(H, activation="relu", **SEQUENCES)),
    "both directions, the second by another name": lambda k: k.Bidirectional(
        k.LSTM(H, **SEQUENCES), backward_layer=k.LSTM(H, go_backwards=True, name="second", **SEQUENCES)
    ),
    "both directions, the last": lambda k: k.Bidirectional(k.GRU(H)),
    "a stack of cells": lambda k: k.RNN([k.LSTMCell(H), k.LSTMCell(H)], **SEQUENCES),
    "a stack of three cells": lambda k: k.RNN([k.GRUCell(H, recurrent_activation="hard_sigmoid") for _ in range(3)], **SEQUENCES),
    "a cell, backwards": lambda k: k.RNN(k.SimpleRNNCell(H, activation="relu"), go_backwards=True, **SEQUENCES),
    "a stack of cells, backwards": lambda k: k.RNN([k.LSTMCell(H), k.LSTMCell(H)], go_backwards=True, **SEQUENCES),
    "LayerNormalization": lambda k: k.LayerNormalization(epsilon=0.1),
    "LayerNormalization of two axes": lambda k: k.LayerNormalization(axis=[1, 2], epsilon=0.1),
    "LayerNormalization, gain alone": lambda k: k.LayerNormalization(center=False, epsilon=0.1),
    "LayerNormalization, shift alone": lambda k: k.LayerNormalization(scale=False, epsilon=0.1),
    "BatchNormalization": lambda k: k.BatchNormalization(epsilon=0.1, momentum=0.8),
    "BatchNormalization of time": lambda k: k.BatchNormalization(axis=1),
    "BatchNormalization, gain alone": lambda k: k.BatchNormalization(center=False),
    "BatchNormalization, shift alone": lambda k: k.BatchNormalization(scale=False),
    "BatchNormalization, neither": lambda k: k.BatchNormalization(center=False, scale=False),
    "GroupNormalization": lambda k: k.GroupNormalization(5, epsilon=0.1),
    "GroupNormalization, gain alone": lambda k: k.GroupNormalization(5, center=False, epsilon=0.1),
    "RMSNormalization": lambda k: k.RMSNormalization(epsilon=0.1),
    "RMSNormalization of two axes": lambda k: k.RMSNormalization(axis=[1, 2], epsilon=0.1),
    "each step": lambda k: k.TimeDistributed(k.LayerNormalization(epsilon=0.1)),
    "each step, BatchNormalization": lambda k: k.TimeDistributed(k.BatchNormalization(epsilon=0.1)),
    "each step, BatchNormalization of the first axis that is seen": lambda k: k.TimeDistributed(k.BatchNormalization(axis=1)),
    "each step, Dense": lambda k: k.TimeDistributed(k.Dense(3)),
    "LSTM, called backward": lambda k: k.LSTM(H, name="backward_lstm", **SEQUENCES),
    "GRU, called forward": lambda k: k.GRU(H, name="forward_gru", go_backwards=True, **SEQUENCES),
    "Dense": lambda k: k.Dense(3),
}
REFUSED_OF_KERAS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "merge_mode": (lambda k: k.Bidirectional(k.LSTM(H, **SEQUENCES), merge_mode="sum"), "merge_mode='sum'"),
    "activation": (lambda k: k.LSTM(H, activation="softsign", **SEQUENCES), "activation='softsign'"),
    "no activation": (lambda k: k.LSTM(H, activation=None, **SEQUENCES), "activation='linear'"),
    "recurrent_activation": (lambda k: k.GRU(H, recurrent_activation="elu", **SEQUENCES), "recurrent_activation='elu'"),
    "directions that differ": (
        lambda k: k.Bidirectional(k.LSTM(H, **SEQUENCES), backward_layer=k.LSTM(H, activation="relu", go_backwards=True, **SEQUENCES)),
        "activation differ: 'tanh' and 'relu'",
    ),
    "cells that differ": (
        lambda k: k.RNN([k.LSTMCell(H), k.LSTMCell(H, recurrent_activation="hard_sigmoid")], **SEQUENCES),
        "recurrent_activation differ: 'sigmoid', 'hard_sigmoid'",
    ),
    "axis": (lambda k: k.LayerNormalization(axis=1), r"axis=.*1.*; expected the last axes"),
    "Dense with more": (lambda k: k.Dense(3, activation="softmax"), "activation='softmax'"),
    "zero_output_for_mask": (lambda k: k.GRU(H, zero_output_for_mask=True, **SEQUENCES), "zero_output_for_mask=True"),
    "each step, groups": (
        lambda k: k.TimeDistributed(k.GroupNormalization(5)),
        "a TimeDistributed around it, so that each step is normalized alone",
    ),
    "another class": (lambda k: k.Conv1D(3, 2), "of the class Conv1D has a class that is not read"),
}


def keras_model(made: Callable[[Any], Any], rng: np.random.Generator, *before: Any) -> Any:
    import keras

    model = keras.Sequential([keras.Input((6, D), dtype="float32"), *before, made(keras.layers)])
    for weight in model.weights:
        positive = any(word in weight.path for word in ("var", "gamma", "scale"))
        weight.assign(rng.uniform(0.2, 1.0, weight.shape) * (1 if positive else rng.choice([-1, 1], weight.shape)))
    return model


def computed(layer: Any, x: Any) -> Any:
    """What a layer gives for (batch, time, features), in that order."""
    if not layer.recurrent:
        return layer(x)
    if layer.batch_first:
        return layer(x)[0]
    y = layer(x.transpose(1, 0, 2))[0]
    return y.transpose(1, 0, 2) if y.ndim == 3 else y


pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras' own variables


@pytest.mark.peers
@pytest.mark.parametrize("ending", ["keras", "h5"])
@pytest.mark.parametrize("kind", KERAS)
def test_keras_settings_are_read(kind: str, ending: str, tmp_path: Path, rng: np.random.Generator) -> None:
    theirs = keras_model(KERAS[kind], rng)
    theirs.save(tmp_path / f"m.{ending}")
    if ending == "h5" and "two axes" in kind:  # such a file does not say how many axes there are
        with pytest.raises(pn.CheckpointError, match=r"axis=\[1, 2\] of an input of unknown shape"):
            pn.import_checkpoint(tmp_path / "m.h5")
        return
    layer: Any = pn.import_checkpoint(tmp_path / f"m.{ending}")
    assert not layer.recurrent or layer.batch_first
    x = rng.standard_normal((3, 6, D)).astype("float32")
    np.testing.assert_allclose(computed(layer, x), np.asarray(theirs(x)), **LIBRARY_FLOAT32)
    if "momentum" in layer.config and "BatchNorm" in kind:
        assert layer.momentum == pytest.approx(0.2 if kind == "BatchNormalization" else 0.01)


@pytest.mark.peers
@pytest.mark.parametrize("ending", ["keras", "h5"])
@pytest.mark.parametrize("kind", REFUSED_OF_KERAS)
def test_keras_settings_that_no_layer_has_are_refused(kind: str, ending: str, tmp_path: Path, rng: np.random.Generator) -> None:
    made, message = REFUSED_OF_KERAS[kind]
    keras_model(made, rng).save(tmp_path / f"m.{ending}")
    with pytest.raises(pn.CheckpointError, match=message):
        pn.import_checkpoint(tmp_path / f"m.{ending}")


@pytest.mark.peers
@pytest.mark.parametrize("axis", [1, 2, -1])
@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_axes_in_a_layer_for_each_step_are_counted_without_it(axis: int, ending: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """All are of one length, so that a wrong one is not seen by the shapes."""
    import keras

    theirs = keras.Sequential(
        [keras.Input((4, 4, 4)), keras.layers.TimeDistributed(keras.layers.BatchNormalization(axis=axis, epsilon=0.1))]
    )
    theirs.set_weights([rng.uniform(0.2, 1.0, w.shape) for w in theirs.get_weights()])
    theirs.save(tmp_path / f"m.{ending}")
    layer: Any = pn.import_checkpoint(tmp_path / f"m.{ending}")
    assert "TimeDistributed takes the statistics of each step apart in training" in layer.provenance
    x = rng.standard_normal((3, 4, 4, 4)).astype("float32")
    np.testing.assert_allclose(layer(x), np.asarray(theirs(x)), **LIBRARY_FLOAT32)


CALLED: dict[str, tuple[Callable[..., Any], str]] = {
    "by name": (lambda k, x, h: k.GRU(H, **SEQUENCES)(x, initial_state=h), "initial_state, which a call here takes as `state`"),
    "in its place": (lambda k, x, h: k.LSTM(H, **SEQUENCES)(x, [h, h]), "initial_state, which a call here takes as `state`"),
    "both directions": (
        lambda k, x, h: k.Bidirectional(k.GRU(H, **SEQUENCES))(x, initial_state=[h, h]),
        "initial_state, which a call here takes as `state`",
    ),
    "mask": (lambda k, x, h: k.GRU(H, **SEQUENCES)(k.Masking()(x)), "mask, which a call here takes as `mask`"),
    "nothing": (lambda k, x, h: k.GRU(H, **SEQUENCES)(x), ""),
}


@pytest.mark.peers
@pytest.mark.parametrize("ending", ["keras", "h5"])
@pytest.mark.parametrize("kind", CALLED)
def test_how_a_model_calls_a_layer_is_said(kind: str, ending: str, tmp_path: Path) -> None:
    import keras

    made, note = CALLED[kind]
    x, h = keras.Input((6, D)), keras.Input((H,))
    keras.Model([x, h], made(keras.layers, x, h)).save(tmp_path / f"m.{ending}")
    said = pn.import_checkpoint(tmp_path / f"m.{ending}").provenance
    assert note in said
    assert ("the model calls it with" in said) == bool(note)


CALLED_BEFORE: dict[str, Any] = {
    "an input for each": [[["x", 0, 0, {}], ["h", 0, 0, {}]]],
    "by name": [[["x", 0, 0, {"initial_state": [["h", 0, 0]]}]]],
    "nothing": [[["x", 0, 0, {}]]],
}


@pytest.mark.parametrize("kind", CALLED_BEFORE)
def test_how_a_model_of_keras_2_calls_a_layer_is_said(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    layer = {"class_name": "LSTM", "name": "lstm_1", "config": {"name": "lstm_1"}, "inbound_nodes": CALLED_BEFORE[kind]}
    config = {"class_name": "Functional", "config": {"layers": [layer]}}
    said = pn.import_checkpoint(old_file(tmp_path / "w.h5", keras_arrays(4, rng), "2.9.0", config)).provenance
    assert ("the model calls it with initial_state" in said) == (kind != "nothing")


@pytest.mark.peers
def test_a_norm_that_is_always_in_training_is_refused(tmp_path: Path) -> None:
    import keras

    x = keras.Input((6, D))
    keras.Model(x, keras.layers.BatchNormalization()(x, training=True)).save(tmp_path / "m.keras")
    with pytest.raises(pn.CheckpointError, match=r"a call with training=True.*ignore=\('training',\)"):
        pn.import_checkpoint(tmp_path / "m.keras")


@pytest.mark.peers
@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_each_layer_of_a_model_has_its_own_settings(ending: str, tmp_path: Path, rng: np.random.Generator) -> None:
    import keras

    inner = keras.Sequential([keras.layers.LSTM(H, activation="relu", return_sequences=True, name="other")], name="inside")
    x = keras.Input((6, D))
    y = inner(keras.layers.LSTM(H, recurrent_activation="hard_sigmoid", return_sequences=True, name="mine")(x))
    model = keras.Model(x, keras.layers.LSTM(H, go_backwards=True, name="third")(y))
    model.compile("adam", "mse")
    model.train_on_batch(rng.standard_normal((2, 6, D)), rng.standard_normal((2, H))) if keras.backend.backend() != "numpy" else None
    model.save(tmp_path / f"m.{ending}")
    places = {
        "keras": ("layers/lstm/", "layers/sequential/", "layers/lstm_1/"),
        "h5": tuple(f"model_weights/{n}/" for n in ("mine", "inside", "third")),
    }
    layers: list[Any] = [pn.import_checkpoint(tmp_path / f"m.{ending}", prefix=p) for p in places[ending]]
    assert [layer.variant.activations()[:2] for layer in layers] == [("hard_sigmoid_6", "tanh"), ("sigmoid", "relu"), ("sigmoid", "tanh")]
    a = rng.standard_normal((3, 6, D)).astype("float32")
    expected = np.asarray(model(a))
    for layer in layers:
        a = computed(layer, a)
    np.testing.assert_allclose(a, expected, **LIBRARY_FLOAT32)
    with pytest.raises(pn.CheckpointError, match=r"more than one layer.*prefix='"):
        pn.import_checkpoint(tmp_path / f"m.{ending}")


AROUND: dict[str, Callable[[Any], list[Any]]] = {
    "ReLU": lambda layers: [layers.LSTM(H, return_sequences=True), layers.ReLU()],
    "Activation": lambda layers: [layers.LSTM(H, return_sequences=True), layers.Activation("tanh")],
    "Rescaling": lambda layers: [layers.Rescaling(2.0), layers.LSTM(H, return_sequences=True)],
    "Masking": lambda layers: [layers.Masking(0.0), layers.LSTM(H, return_sequences=True)],
    "UnitNormalization": lambda layers: [layers.LayerNormalization(), layers.UnitNormalization()],
    "": lambda layers: [
        layers.Dropout(0.5),
        layers.LSTM(H, return_sequences=True),
        layers.SpatialDropout1D(0.5),
        layers.Activation("linear"),
    ],
}


@pytest.mark.peers
@pytest.mark.parametrize("ending", ["keras", "h5"])
@pytest.mark.parametrize("inside", [False, True], ids=["", "inside a model"])
@pytest.mark.parametrize("kind", AROUND)
def test_what_a_model_of_keras_computes_around_a_layer_is_not_dropped(
    kind: str, inside: bool, ending: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    import keras

    sequential = keras.Sequential([keras.Input((6, D)), *AROUND[kind](keras.layers)], name="inner")
    x = keras.Input((6, D))
    model = keras.Model(x, keras.layers.Permute((2, 1))(sequential(x))) if inside else sequential
    model.save(tmp_path / f"m.{ending}")
    if kind:
        with pytest.raises(pn.CheckpointError, match=rf"has {kind} beside it in the Sequential.*; prefix='(.*)' names it alone") as refused:
            pn.import_checkpoint(tmp_path / f"m.{ending}")
        prefix = str(refused.value).partition("prefix='")[2].partition("'")[0]
        alone: Any = pn.import_checkpoint(tmp_path / f"m.{ending}", prefix=prefix)
        ignored: Any = pn.import_checkpoint(tmp_path / f"m.{ending}", ignore=(kind,))
        assert ("of the Functional around it Permute" in ignored.provenance) is inside
        assert "beside" not in alone.provenance.replace("said beside", "")
        assert ("with the mask of its Masking, which a call here takes as `mask`" in alone.provenance) is (kind == "Masking")
    else:
        ignored = pn.import_checkpoint(tmp_path / f"m.{ending}")
    a = rng.standard_normal((2, 6, D)).astype("float32")
    own = next(layer for layer in sequential.layers if layer.weights)
    np.testing.assert_allclose(computed(ignored, a), np.asarray(own(a)), **LIBRARY_FLOAT32)


@pytest.mark.peers
def test_the_mask_of_an_embedding_is_told_of(tmp_path: Path) -> None:
    import keras

    keras.Sequential([keras.Input((6,)), keras.layers.Embedding(9, D, mask_zero=True), keras.layers.GRU(H)]).save(tmp_path / "m.keras")
    layer: Any = pn.import_checkpoint(tmp_path / "m.keras", layer="GRU")
    assert "with the mask of its Embedding, which a call here takes as `mask`" in layer.provenance
    assert "of the Sequential around it Embedding" in layer.provenance


@pytest.mark.peers
@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("name", ["GRU", "LSTMCell", "LayerNormalization", "Dense"])
def test_a_class_of_somebody_is_not_taken_for_that_of_keras(name: str, registered: bool, tmp_path: Path, rng: np.random.Generator) -> None:
    """It has the name and the variables of one, and may compute anything."""
    import keras

    def call(self: Any, inputs: Any, *others: Any, **more: Any) -> Any:
        return getattr(keras.layers, name).call(self, 2 * inputs, *others, **more)

    base = getattr(keras.layers, name)
    body = {"call": call} if name in ("LayerNormalization", "Dense") else {}
    kind = type(name, (base,), body)
    kind = keras.saving.register_keras_serializable("somebody")(kind) if registered else kind

    def made(k: Any) -> Any:
        layer = kind(*(() if "Norm" in name else (H,)))
        return k.RNN(layer) if name == "LSTMCell" else layer

    keras_model(made, rng).save(tmp_path / "m.keras")
    ours = {"LayerNormalization": "LayerNorm", "Dense": "Linear"}.get(name, name.removesuffix("Cell"))
    setting = "cell" if name == "LSTMCell" else "class_name"
    for asked in (None, ours):
        with pytest.raises(pn.CheckpointError, match=rf"{name} \(not Keras' own\).*ignore=\('{setting}',\)"):
            pn.import_checkpoint(tmp_path / "m.keras", layer=asked)
    assert type(pn.import_checkpoint(tmp_path / "m.keras", layer=ours, ignore=(setting,))).__name__ == ours


NAMED_ACROSS = {
    "each other": ("lstm_1", "lstm"),
    "the next number": ("lstm_1", "lstm_2"),
    "a group of the file": ("layers", "cell"),
    "what holds the variables": ("vars", "forward_layer"),
}


@pytest.mark.peers
@pytest.mark.parametrize("named", [True, False], ids=["today", "without the layers' own names"])
@pytest.mark.parametrize("names", NAMED_ACROSS)
def test_settings_go_to_their_layer_whatever_it_is_called(names: str, named: bool, tmp_path: Path, rng: np.random.Generator) -> None:
    """Groups are called by class and number. Older files have nothing else to tell two layers apart."""
    import h5py
    import keras

    first, second = NAMED_ACROSS[names]
    before = keras.layers.LSTM(D, activation="hard_sigmoid", go_backwards=True, name=first, **SEQUENCES)
    theirs = keras_model(lambda k: k.LSTM(H, name=second, **SEQUENCES), rng, before)
    theirs.save(tmp_path / "m.keras")
    with zipfile.ZipFile(tmp_path / "m.keras") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with h5py.File(io.BytesIO(members["model.weights.h5"]), "r+") as file:
        if not named:
            file.visititems(lambda _, group: group.attrs.pop("name", None) and None)
        weights = file.id.get_file_image() if file.flush() is None else b""
    with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, weights if name == "model.weights.h5" else content)
    x = rng.standard_normal((3, 6, D)).astype("float32")
    a: Any = x
    for prefix in ("layers/lstm/", "layers/lstm_1/"):
        a = computed(pn.import_checkpoint(tmp_path / "m.keras", prefix=prefix), a)
    np.testing.assert_allclose(a, np.asarray(theirs(x)), **LIBRARY_FLOAT32)


@pytest.mark.peers
def test_a_backward_direction_is_not_taken_for_a_forward_one(tmp_path: Path, rng: np.random.Generator) -> None:
    theirs = keras_model(lambda k: k.Bidirectional(k.LSTM(H, **SEQUENCES)), rng)
    theirs.save(tmp_path / "m.keras")
    place = {"prefix": "layers/bidirectional/backward_layer/"}
    with pytest.raises(pn.CheckpointError, match="the backward direction alone; pass direction='reverse'"):
        pn.import_checkpoint(tmp_path / "m.keras", **place)
    x = rng.standard_normal((3, 6, D)).astype("float32")
    y = computed(pn.import_checkpoint(tmp_path / "m.keras", **place, direction="reverse"), x)
    np.testing.assert_allclose(y, np.asarray(theirs(x))[..., H:], **LIBRARY_FLOAT32)


@pytest.mark.peers
def test_an_ignored_setting_and_one_that_the_caller_says(tmp_path: Path, rng: np.random.Generator) -> None:
    theirs = keras_model(lambda k: k.Bidirectional(k.LSTM(H, activation="softsign", dropout=0.3, **SEQUENCES), merge_mode="sum"), rng)
    theirs.save(tmp_path / "m.keras")
    layer: Any = pn.import_checkpoint(tmp_path / "m.keras", ignore=("merge_mode",), activation="tanh")
    assert layer.variant.activations() == ("sigmoid", "tanh", "tanh")
    assert "dropout=0.3, which is for training, is left out" in layer.provenance


@pytest.mark.peers
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", ["SimpleRNN", "LSTM", "GRU"])
def test_recurrent_dropout_of_keras_is_kept_where_it_is_the_same(kind: str, both: bool, tmp_path: Path, rng: np.random.Generator) -> None:
    """Cells with gates mask h for each of them apart, which no layer here does, and say so."""

    def made(k: Any) -> Any:
        inner = getattr(k, kind)(H, recurrent_dropout=0.25, **SEQUENCES)
        return k.Bidirectional(inner) if both else inner

    keras_model(made, rng).save(tmp_path / "m.keras")
    layer: Any = pn.import_checkpoint(tmp_path / "m.keras")
    assert layer.recurrent_dropout == (0.25 if kind == "SimpleRNN" else 0.0)
    noted = "recurrent_dropout=0.25, which is for training and masks h for each gate apart, is left out" in layer.provenance
    assert noted == (kind != "SimpleRNN")


@pytest.mark.peers
def test_weights_of_keras_without_a_configuration_say_what_was_taken(tmp_path: Path, rng: np.random.Generator) -> None:
    keras_model(lambda k: k.LSTM(H), rng).save_weights(tmp_path / "m.weights.h5")
    said = pn.import_checkpoint(tmp_path / "m.weights.h5").provenance
    assert "not stored, taken as usual there: activation='tanh', gate_activation='sigmoid'" in said
    keras_model(lambda k: k.BatchNormalization(center=False, scale=False), rng).save_weights(tmp_path / "b.weights.h5")
    layer: Any = pn.import_checkpoint(tmp_path / "b.weights.h5")
    assert isinstance(layer, pn.BatchNorm)
    assert not layer.params
    keras_model(lambda k: k.BatchNormalization(scale=False, name="named"), rng).save_weights(tmp_path / "c.weights.h5")
    with pytest.raises(pn.CheckpointError, match=r"does not say whether it has gamma or beta; one with the configuration does"):
        pn.import_checkpoint(tmp_path / "c.weights.h5")


NOT_READ: dict[str, tuple[Callable[[Any], Any], tuple[int, ...]]] = {
    "embedding": (lambda k: k.Embedding(10, 4), (6,)),
    "einsum_dense": (lambda k: k.EinsumDense("abc,dc->abd", output_shape=(None, 8), bias_axes="d"), (6, 8)),
    "p_re_lu": (lambda k: k.PReLU(shared_axes=[1]), (6, 8)),
    "additive_attention": (lambda k: k.AdditiveAttention(), (6, 8)),
    "mine": (lambda k: type("Mine", (k.Dense,), {})(3), (6, 8)),
}


def attributes_of(keras: Any, **layers: Any) -> Any:
    """A model whose layers are attributes, by which a file calls them."""

    class Model(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            for name, layer in layers.items():
                setattr(self, name, layer)
            self.built = True

    return Model()


@pytest.mark.peers
@pytest.mark.parametrize(("kind", "listed"), [(kind, True) for kind in NOT_READ] + [(kind, False) for kind in NOT_READ if kind != "mine"])
def test_weights_of_other_classes_are_not_taken_for_those_of_a_linear(kind: str, listed: bool, tmp_path: Path) -> None:
    import keras

    made, shape = NOT_READ[kind]
    layer, x = made(keras.layers), keras.Input(shape)
    y = layer([x, x]) if "attention" in kind else layer(x)
    (keras.Model(x, y) if listed else attributes_of(keras, tail=layer)).save_weights(tmp_path / "m.weights.h5")
    with pytest.raises(pn.CheckpointError, match=rf"of the class {kind} has a class that is not read.*ignore=\('class_name',\)"):
        pn.import_checkpoint(tmp_path / "m.weights.h5")


@pytest.mark.peers
def test_names_of_attributes_do_not_hide_a_class_that_is_read(tmp_path: Path, rng: np.random.Generator) -> None:
    import keras

    inner = keras.layers.Dense(3)
    inner.build((None, D))
    attributes_of(keras, embedding=inner).save_weights(tmp_path / "m.weights.h5")
    x = rng.standard_normal((2, D)).astype("float32")
    np.testing.assert_allclose(pn.import_checkpoint(tmp_path / "m.weights.h5")(x), np.asarray(inner(x)), **LIBRARY_FLOAT32)


@pytest.mark.peers
@pytest.mark.parametrize("ending", ["keras", "weights.h5"])
def test_the_list_says_which_classes_are_not_read(ending: str, tmp_path: Path) -> None:
    import keras

    k = keras.layers
    model = keras.Sequential(
        [keras.Input((6,)), k.Embedding(9, D), k.LSTM(H, **SEQUENCES), k.GRU(H, **SEQUENCES), k.PReLU(shared_axes=[1])]
    )
    (model.save if ending == "keras" else model.save_weights)(tmp_path / f"m.{ending}")
    names = "1 Embedding, 1 PReLU" if ending == "keras" else "1 embedding, 1 p_re_lu"
    with pytest.raises(pn.CheckpointError, match=rf"keras GRU.*keras LSTM.*; beside {names} \(classes that are not read\)$"):
        pn.import_checkpoint(tmp_path / f"m.{ending}")
    with pytest.raises(pn.CheckpointError, match=r"(?i)embedding has a class that is not read"):
        pn.import_checkpoint(tmp_path / f"m.{ending}", prefix="layers/embedding/")
    assert isinstance(pn.import_checkpoint(tmp_path / f"m.{ending}", prefix="layers/embedding/", ignore=("class_name",)), pn.Linear)


def old_file(path: Path, arrays: dict[str, Any], version: str | None, config: Any = None) -> Path:
    """An HDF5 file as Keras wrote it before 2019."""
    import h5py

    with h5py.File(path, "w") as file:
        if version is not None:
            file.attrs["keras_version"] = version.encode()
        if config is not None:
            file.attrs["model_config"] = json.dumps(config).encode()
        for name, array in arrays.items():
            file[f"lstm_1/lstm_1/{name}:0"] = array
    return path


def keras_arrays(gates: int, rng: np.random.Generator, bias: int | None = None) -> dict[str, Any]:
    shapes = {"kernel": (D, gates * H), "recurrent_kernel": (H, gates * H), "bias": (bias or gates * H,)}
    return {name: rng.standard_normal(shape).astype("float32") for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("version", "function"),
    [("2.2.0", "hard_sigmoid_5"), ("2.1.6-tf", "hard_sigmoid_5"), ("2.3.1", "sigmoid"), ("2.4.0-tf", "sigmoid"), (None, "sigmoid")],
)
def test_old_weights_meant_hard_sigmoids(version: str | None, function: str, tmp_path: Path, rng: np.random.Generator) -> None:
    p = keras_arrays(4, rng)
    layer: Any = pn.import_checkpoint(old_file(tmp_path / "w.h5", p, version), "keras")
    x = rng.standard_normal((6, 3, D)).astype("float32")
    gate = {"hard_sigmoid_5": lambda a: np.clip(0.2 * a + 0.5, 0, 1), "sigmoid": lambda a: 1 / (1 + np.exp(-a))}[function]
    h = c = np.zeros((3, H))
    for t in range(6):
        i, f, g, o = np.split(x[t] @ p["kernel"] + h @ p["recurrent_kernel"] + p["bias"], 4, -1)
        c = gate(f) * c + gate(i) * np.tanh(g)
        h = gate(o) * np.tanh(c)
    np.testing.assert_allclose(layer(x)[0][-1], h, **LIBRARY_FLOAT32)
    given: Any = pn.import_checkpoint(tmp_path / "w.h5", "keras", gate_activation="hard_sigmoid_6")
    assert given.variant.gate_activation == "hard_sigmoid_6"


def test_a_version_that_meant_either_has_to_be_told(tmp_path: Path, rng: np.random.Generator) -> None:
    path = old_file(tmp_path / "w.h5", keras_arrays(4, rng), "2.2.4-tf")
    with pytest.raises(pn.CheckpointError, match=r"'hard_sigmoid' in TensorFlow 1 and 'sigmoid' in TensorFlow 2.*gate_activation=…"):
        pn.import_checkpoint(path)
    told: Any = pn.import_checkpoint(path, gate_activation="sigmoid")
    assert told.variant.gate_activation == "sigmoid"
    plain = old_file(tmp_path / "rnn.h5", keras_arrays(1, rng), "2.2.4-tf")
    assert isinstance(pn.import_checkpoint(plain), pn.RNN)  # it has no gates


RESETS: list[tuple[str, dict[str, Any] | None, str]] = [
    ("2.2.0", None, "before"),
    ("2.3.1", None, "before"),
    ("2.1.6-tf", None, "before"),
    ("2.3.0-tf", None, "after"),
    ("2.4.0", None, "after"),
    ("2.1.2", {}, "before"),
    ("2.2.4", {"reset_after": True}, "after"),
    ("2.15.0", {"reset_after": False}, "before"),
]


@pytest.mark.parametrize(("version", "config", "place"), RESETS)
@pytest.mark.parametrize("bias", [0, 1, 2])
def test_where_a_gru_of_keras_resets(
    version: str, config: dict[str, Any] | None, place: str, bias: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Its bias says so. Without one the configuration does, or the version that had no such setting."""
    p = keras_arrays(3, rng)
    b = rng.standard_normal((max(bias, 1), 3 * H)).astype("float32") * bool(bias)
    place = {0: place, 1: "before", 2: "after"}[bias]
    p = {"kernel": p["kernel"], "recurrent_kernel": p["recurrent_kernel"], **({"bias": b if bias == 2 else b[0]} if bias else {})}
    own = {"name": "lstm_1", "recurrent_activation": "sigmoid", **({} if config is None else config), "use_bias": bool(bias)}
    if "reset_after" in own:
        own["reset_after"] = place == "after"
    layers = None if config is None else {"class_name": "Sequential", "config": [{"class_name": "GRU", "config": own}]}
    given = {} if config is not None else {"gate_activation": "sigmoid"}
    layer: Any = pn.import_checkpoint(old_file(tmp_path / "w.h5", p, version, layers), "keras", layer="GRU", **given)
    x = rng.standard_normal((3, 5, D)).astype("float32")
    w, u, c, d = (np.split(a, 3, -1) for a in (p["kernel"], p["recurrent_kernel"], b[0], b[1] if bias == 2 else 0 * b[0]))
    h = np.zeros((3, H))
    for t in range(5):
        z, r = (1 / (1 + np.exp(-(x[:, t] @ w[k] + c[k] + h @ u[k] + d[k]))) for k in (0, 1))
        n = np.tanh(x[:, t] @ w[2] + c[2] + ((r * h) @ u[2] if place == "before" else r * (h @ u[2] + d[2])))
        h = z * h + (1 - z) * n
    y = computed(layer, x)
    np.testing.assert_allclose(y[:, -1] if y.ndim == 3 else y, h, **LIBRARY_FLOAT32)


def test_where_a_gru_resets_has_to_be_told_or_is_said(tmp_path: Path, rng: np.random.Generator) -> None:
    p = keras_arrays(3, rng)
    del p["bias"]
    assert "reset='after'" in pn.import_checkpoint(p, "keras").provenance
    path = old_file(tmp_path / "w.h5", p, "2.2.4-tf")
    with pytest.raises(pn.CheckpointError, match=r"no reset_after: it was False in TensorFlow 1 and True in TensorFlow 2.*reset=…"):
        pn.import_checkpoint(path, gate_activation="sigmoid")
    told: Any = pn.import_checkpoint(path, gate_activation="sigmoid", reset="before")
    assert told.variant.reset == "before"


@pytest.mark.parametrize("time_major", [True, False, None])
def test_a_configuration_says_which_axis_is_time(time_major: bool | None, tmp_path: Path, rng: np.random.Generator) -> None:
    own = {"name": "lstm_1", **({} if time_major is None else {"time_major": time_major})}
    config = {"class_name": "Sequential", "config": [{"class_name": "LSTM", "config": own}]}
    layer: Any = pn.import_checkpoint(old_file(tmp_path / "w.h5", keras_arrays(4, rng), "2.9.0", config))
    assert layer.batch_first is not bool(time_major)


@pytest.mark.parametrize("bias", [0, 2 * 4 * H])
def test_cudnn_lstm(bias: int, tmp_path: Path, rng: np.random.Generator) -> None:
    """Blocks (inputs, hidden) hold (hidden, inputs) row by row; the recurrent ones are transposed; the biases are added."""
    p = keras_arrays(4, rng, 2 * 4 * H)
    layer: Any = pn.import_checkpoint(old_file(tmp_path / "w.h5", p, "2.2.0"))
    assert layer.variant.gate_activation == "sigmoid"
    x = rng.standard_normal((5, 3, D)).astype("float32")
    w = [k.reshape(H, D).T for k in np.split(p["kernel"], 4, 1)]
    u = [k.T for k in np.split(p["recurrent_kernel"], 4, 1)]
    b = np.split(p["bias"][: 4 * H] + p["bias"][4 * H :], 4)
    h = c = np.zeros((3, H))
    for t in range(5):
        i, f, g, o = (x[t] @ w[k] + h @ u[k] + b[k] for k in range(4))
        c = c / (1 + np.exp(-f)) + np.tanh(g) / (1 + np.exp(-i))
        h = np.tanh(c) / (1 + np.exp(-o))
    np.testing.assert_allclose(layer(x)[0][-1], h, **LIBRARY_FLOAT32)


def test_cudnn_gru(tmp_path: Path, rng: np.random.Generator) -> None:
    p = keras_arrays(3, rng, 2 * 3 * H)
    layer: Any = pn.import_checkpoint(old_file(tmp_path / "w.h5", p, "2.2.0"))
    x = rng.standard_normal((5, 3, D)).astype("float32")
    w = [k.reshape(H, D).T for k in np.split(p["kernel"], 3, 1)]
    u = [k.T for k in np.split(p["recurrent_kernel"], 3, 1)]
    b, d = (np.split(half, 3) for half in np.split(p["bias"], 2))
    h = np.zeros((3, H))
    for t in range(5):
        z, r = (1 / (1 + np.exp(-(x[t] @ w[k] + b[k] + h @ u[k] + d[k]))) for k in (0, 1))
        h = z * h + (1 - z) * np.tanh(x[t] @ w[2] + b[2] + r * (h @ u[2] + d[2]))
    np.testing.assert_allclose(layer(x)[0][-1], h, **LIBRARY_FLOAT32)


def test_hard_sigmoid_of_a_configuration_is_that_of_its_version(tmp_path: Path, rng: np.random.Generator) -> None:
    config = {
        "class_name": "Sequential",
        "config": [{"class_name": "LSTM", "config": {"name": "lstm_1", "recurrent_activation": "hard_sigmoid"}}],
    }
    for version, slope in (("2.2.4", 5), ("2.15.0", 5), ("3.3.0", 6)):
        layer: Any = pn.import_checkpoint(old_file(tmp_path / f"{slope}.h5", keras_arrays(4, rng), version, config))
        assert layer.variant.gate_activation == f"hard_sigmoid_{slope}"


# -- names that become one ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", ["keras", "auto"])
def test_two_cells_do_not_become_one(format_: str, rng: np.random.Generator) -> None:
    cells = {name: keras_arrays(4, rng) for name in ("lstm_cell", "lstm_cell_1")}
    with pytest.raises(pn.CheckpointError, match=r"prefix='lstm_cell/'.*prefix='lstm_cell_1/'"):
        pn.import_checkpoint(cells, format_)
    first = pn.import_checkpoint(cells, "keras", prefix="lstm_cell/")
    np.testing.assert_array_equal(first.params["bias_l0"], cells["lstm_cell"]["bias"])


@pytest.mark.parametrize("format_", ["keras", "tf-contrib", "sonnet", "haste", "flax"])
def test_names_that_become_the_same_are_refused(format_: str, rng: np.random.Generator) -> None:
    first, second = {"flax": ("params/cell/i", "cell/i")}.get(format_, ("kernel", "kernel:0"))
    arrays = {"recurrent_kernel": np.ones((H, 4 * H)), first: np.ones((D, 4 * H)), second: np.ones((D, 4 * H))}
    with pytest.raises(pn.CheckpointError, match=r"kernel|cell/i"):
        pn.import_checkpoint(arrays, format_)


def test_two_nestings_of_one_name_are_refused() -> None:
    with pytest.raises(pn.CheckpointError, match="two entries have the name 'a/weight'"):
        pn.import_checkpoint({"a": {"weight": np.ones((2, 3))}, "a/weight": np.ones((2, 3))})


@pytest.mark.peers
def test_a_stack_of_cells_by_its_paths(rng: np.random.Generator) -> None:
    theirs = keras_model(lambda k: k.RNN([k.LSTMCell(H), k.LSTMCell(H)], **SEQUENCES), rng)
    arrays = {weight.path: weight.numpy() for weight in theirs.weights}
    x = rng.standard_normal((3, 6, D)).astype("float32")
    layer: Any = pn.import_checkpoint(arrays, "keras")
    assert layer.num_layers == 2
    np.testing.assert_allclose(computed(layer, x), np.asarray(theirs(x)), **LIBRARY_FLOAT32)
    cells = list(dict.fromkeys(name.split("/")[-2] for name in arrays))
    tenth = {
        name.replace(f"/{cell}/", f"/lstm_cell_{9 + cells.index(cell)}/"): a for name, a in arrays.items() for cell in [name.split("/")[-2]]
    }
    for some in (tenth, dict(sorted(tenth.items()))):  # as they are in the stack, or by the alphabet, as HDF5 lists them
        again: Any = pn.import_checkpoint(some, "keras")
        np.testing.assert_array_equal(computed(again, x), computed(layer, x))
    ninth = dict(sorted(tenth.items(), key=lambda item: "cell_9/" in item[0]))
    with pytest.raises(pn.CheckpointError, match="more than one layer"):
        pn.import_checkpoint(ninth, "keras")
    swapped = dict(sorted(arrays.items(), key=lambda item: "cell_1/" not in item[0] and "cell/" in item[0]))
    if list(swapped) != list(arrays):  # the numbers say another order than the mapping
        with pytest.raises(pn.CheckpointError):
            pn.import_checkpoint(swapped, "keras")


def test_statistics_of_more_steps_than_a_format_has_are_not_cut_off(rng: np.random.Generator) -> None:
    from tests.oracles import PUBLISHED

    case = next(c for c in PUBLISHED if c.format == "sonnet" and "gamma_x" in c.shapes)
    p = case.arrays(rng)
    wide = {name: np.repeat(a, 3, axis=0) if "moving" in name else a for name, a in p.items()}
    with pytest.raises(pn.CheckpointError, match=r"has shape \(3, 16\); expected 1 row of numbers"):
        pn.import_checkpoint(wide, "sonnet")


# -- torch -------------------------------------------------------------------------------------------------------------------------------


def torch_module(name: str, *args: Any, **keywords: Any) -> Any:
    import torch

    module = getattr(torch.nn, name)(*args, **keywords).double()
    for parameter in module.parameters():
        parameter.data = parameter.data + 0.3 * torch.randn_like(parameter)
    return module


TORCH: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "RMSNorm": (("RMSNorm", 8), {"eps": 1e-6}, "eps"),
    "RMSNorm without eps": (("RMSNorm", 8), {}, "eps"),
    "LayerNorm": (("LayerNorm", 8), {"eps": 1e-3}, "eps"),
    "LayerNorm without bias": (("LayerNorm", 8), {"bias": False, "eps": 1e-3}, "eps"),
    "BatchNorm": (("BatchNorm1d", 8), {"momentum": 0.01, "eps": 1e-3}, "momentum"),
    "BatchNorm of all batches": (("BatchNorm1d", 8), {"momentum": None}, "momentum"),
    "BatchNorm without bias": (("BatchNorm1d", 8), {"bias": False}, "eps"),
    "BatchNorm without affine": (("BatchNorm1d", 8), {"affine": False, "momentum": 0.3}, "momentum"),
    "GroupNorm": (("GroupNorm", 2, 8), {"eps": 1e-3}, "eps"),
    "GroupNorm without bias": (("GroupNorm", 2, 8), {"bias": False}, "num_groups"),
    "InstanceNorm": (("InstanceNorm1d", 8), {"affine": True, "eps": 1e-3}, "eps"),
    "InstanceNorm with statistics": (("InstanceNorm1d", 8), {"affine": True, "track_running_stats": True, "momentum": 0.3}, "momentum"),
    "InstanceNorm of statistics alone": (("InstanceNorm1d", 8), {"track_running_stats": True, "eps": 0.1}, "eps"),
    "Linear": (("Linear", 8, 3), {}, "in_features"),
}


@pytest.mark.peers
@pytest.mark.parametrize("kind", TORCH)
@pytest.mark.parametrize("under", ["", "b.", "again."], ids=["alone", "inside a model", "by its second name"])
def test_a_live_module_says_its_settings(kind: str, under: str, rng: np.random.Generator) -> None:
    import torch

    (name, *args), keywords, attribute = TORCH[kind]
    theirs = torch_module(name, *args, **keywords)
    if keywords.get("track_running_stats"):
        theirs(3.0 + 2.0 * torch.randn(4, 8, 5).double())
    theirs.eval()
    beside = torch.nn.LayerNorm(8, eps=0.5).double()
    model = torch.nn.ModuleDict({"a": beside, "b": theirs, "again": theirs}) if under else theirs
    layer: Any = pn.import_checkpoint(model, prefix=under)
    assert getattr(layer, attribute, layer.config.get(attribute)) == getattr(theirs, attribute)
    x = 1e-4 * rng.standard_normal((4, 8, 5) if "Instance" in name or "Group" in name else (4, 8))
    np.testing.assert_allclose(layer(x), theirs(torch.asarray(x)).detach(), rtol=TORCH_FLOAT64, atol=1e-8)  # ε is rounded to float32


@pytest.mark.peers
@pytest.mark.parametrize("affine", [False, True])
def test_running_statistics_of_instance_norm_follow_as_in_torch(affine: bool, rng: np.random.Generator) -> None:
    import torch

    theirs = torch_module("InstanceNorm1d", 8, affine=affine, track_running_stats=True, momentum=0.3)
    layer: Any = pn.import_checkpoint(theirs)
    assert isinstance(pn.import_checkpoint(theirs.state_dict(), "torch"), pn.BatchNorm)  # the arrays of the two are alike
    assert isinstance(pn.import_checkpoint(theirs.state_dict(), "torch", layer="InstanceNorm"), pn.InstanceNorm)
    for _ in range(3):
        x = 3.0 + 2.0 * rng.standard_normal((4, 8, 5))
        for training in (True, False):
            expected = theirs.train(training)(torch.asarray(x)).detach()
            np.testing.assert_allclose(layer(x, training=training), expected, rtol=TORCH_FLOAT64, atol=TORCH_FLOAT64)
    for name, buffer in theirs.state_dict().items():
        if "running" in name:
            np.testing.assert_allclose(layer.state_dict()[name], buffer, rtol=PUBLISHED_FLOAT64)
    model = torch.nn.Sequential(theirs.float())
    assert pn.replace_modules(model, {torch.nn.InstanceNorm1d: "torch"}) == ["0"]


def test_running_statistics_of_instance_norm_leave_out_what_does_not_count(rng: np.random.Generator) -> None:
    """Values that are masked, and cases in which all are."""
    x = rng.standard_normal((6, 2, 3))
    kept = {name: pn.InstanceNorm(3, channel_axis=-1, track_running_stats=True, dtype="float64") for name in ("whole", "padded", "nothing")}
    kept["whole"](x[:4], training=True)
    kept["padded"](np.concatenate([x[:4], 1e3 * x[4:]]), lengths=[4, 4], training=True)
    kept["nothing"](x, lengths=[0, 0], training=True)
    for name in ("running_mean", "running_var"):
        np.testing.assert_allclose(kept["padded"].buffers[name], kept["whole"].buffers[name], rtol=1e-12)
        np.testing.assert_array_equal(kept["nothing"].buffers[name], float("var" in name))


@pytest.mark.peers
def test_replaced_modules_keep_their_eps(rng: np.random.Generator) -> None:
    import torch

    model = torch.nn.Sequential(torch.nn.RMSNorm(8, eps=1e-6), torch.nn.BatchNorm1d(8, momentum=0.01))
    x = torch.full((2, 8), 1e-4)
    expected = model.eval()(x).detach()
    pn.replace_modules(model, {torch.nn.RMSNorm: "torch", torch.nn.BatchNorm1d: "torch"})
    assert model[0].to_layer().eps == 1e-6
    assert model[1].to_layer().momentum == 0.01
    torch.testing.assert_close(model(x), expected)


@pytest.mark.peers
def test_the_norms_inside_a_cell_say_their_eps(rng: np.random.Generator) -> None:
    import torch

    class Cell(torch.nn.Module):
        def __init__(self, eps: float, other: float) -> None:
            super().__init__()
            self.weight_ih = torch.nn.Parameter(torch.randn(4 * H, D))
            self.weight_hh = torch.nn.Parameter(torch.randn(4 * H, H))
            self.layernorm_i, self.layernorm_h = (torch.nn.LayerNorm(4 * H, eps=eps) for _ in range(2))
            self.layernorm_c = torch.nn.LayerNorm(H, eps=other)

    layer: Any = pn.import_checkpoint(Cell(0.1, 0.1), "torch-fastrnns")
    assert layer.variant.eps == 0.1
    with pytest.raises(pn.CheckpointError, match=r"modules whose eps differ.*eps=…"):
        pn.import_checkpoint(Cell(0.1, 0.2), "torch-fastrnns")
    mixed = Cell(0.1, 0.1)
    mixed.unread = torch.nn.RMSNorm(H)  # whose ε is that of the dtype
    with pytest.raises(pn.CheckpointError, match=r"modules whose eps differ.*None in RMSNorm"):
        pn.import_checkpoint(mixed, "torch-fastrnns", ignore=("unread.weight",))
    bare: Any = pn.import_checkpoint(Cell(0.1, 0.1).state_dict(), "torch-fastrnns")
    assert "not stored, taken as usual there: eps=1e-05" in bare.provenance


@pytest.mark.peers
def test_what_a_module_of_somebody_says_by_its_attributes(rng: np.random.Generator) -> None:
    import torch

    class Haste(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel, self.recurrent_kernel = (torch.nn.Parameter(torch.randn(n, 4 * H)) for n in (D, H))
            self.bias = torch.nn.Parameter(torch.randn(4 * H))
            self.zoneout, self.batch_first = 0.25, True

    layer: Any = pn.import_checkpoint(Haste(), "haste")
    assert (layer.variant.zoneout, layer.batch_first) == (0.25, True)
    assert "zoneout=0.25, batch_first=True" in layer.provenance


def test_a_bare_state_dict_says_which_eps_was_taken() -> None:
    layer: Any = pn.import_checkpoint({"weight": np.ones(8)}, "torch", layer="RMSNorm")
    assert layer.eps is None
    assert "taken as usual there: eps=None" in layer.provenance
    given: Any = pn.import_checkpoint({"weight": np.ones(8)}, "torch", layer="RMSNorm", eps=1e-6)
    assert given.eps == 1e-6
    assert "as usual" not in given.provenance


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("layer", ["BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm"])
@pytest.mark.parametrize("ignored", [False, True])
def test_norms_with_one_of_gain_and_shift(layer: str, name: str, ignored: bool, rng: np.random.Generator) -> None:
    statistics = {"running_mean": rng.standard_normal(6), "running_var": rng.uniform(0.5, 2.0, 6)} if layer == "BatchNorm" else {}
    value, more = rng.standard_normal(6), {"num_groups": 2} if layer == "GroupNorm" else {}
    other = {"weight": "bias", "bias": "weight"}[name]
    whole = {"weight": np.ones(6), "bias": np.zeros(6), **statistics}
    x = rng.standard_normal((3, 6)) if layer in ("BatchNorm", "LayerNorm") else rng.standard_normal((3, 6, 4))
    expected: Any = pn.import_checkpoint({**whole, name: value}, "torch", layer=layer, **more)
    found: Any = pn.import_checkpoint({name: value, **statistics}, "torch", layer=layer, ignore=(other,) if ignored else (), **more)
    np.testing.assert_array_equal(found(x), expected(x))


@pytest.mark.peers
@pytest.mark.parametrize("ours", ["LSTM", "GRU", "RNN"])
def test_a_live_recurrent_module(ours: str, rng: np.random.Generator) -> None:
    import torch

    more = {"nonlinearity": "relu"} if ours == "RNN" else {}
    theirs = torch_module(ours, D, H, 2, batch_first=True, bidirectional=True, dropout=0.5, **more).eval()
    layer: Any = pn.import_checkpoint(theirs)
    assert layer.dropout == 0.5
    assert "dropout=0.5" in layer.provenance
    with pytest.warns(UserWarning, match="num_layers=1"):
        alone = torch_module(ours, D, H, 1, dropout=0.5)  # which drops nothing
    single: Any = pn.import_checkpoint(alone)
    assert single.dropout == 0
    x = rng.standard_normal((3, 6, D))
    np.testing.assert_allclose(layer(x)[0], theirs(torch.asarray(x))[0].detach(), rtol=PUBLISHED_FLOAT64, atol=PUBLISHED_FLOAT64)


@pytest.mark.peers
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("name", ["LayerNorm", "LSTM"])
def test_a_forward_of_somebody_is_not_taken_for_that_of_torch(name: str, own: bool) -> None:
    torch = pytest.importorskip("torch")
    kind = getattr(torch.nn, name)
    body = {"forward": lambda self, x: kind.forward(self, 2 * x)} if own else {}
    module = type("Mine", (kind,), body)(*((4,) if name == "LayerNorm" else (4, 3)))
    if own:
        with pytest.raises(pn.CheckpointError, match=r"the class Mine has a forward of its own.*ignore=\('forward',\)"):
            pn.import_checkpoint(module)
    assert type(pn.import_checkpoint(module, ignore=("forward",))).__name__ == name


def new(name: str) -> Any:
    import torch

    return getattr(torch.nn.utils.parametrizations, name)


def old(name: str) -> Any:
    import torch

    return getattr(torch.nn.utils, name)


def scaled(module: Any, name: str) -> Any:
    import torch

    class Twice(torch.nn.Module):
        def forward(self, whole: Any) -> Any:
            return 2 * whole

    torch.nn.utils.parametrize.register_parametrization(module, name, Twice())
    return module


MADE_OF_OTHERS: dict[str, tuple[Callable[..., Any], bool]] = {
    "spectral norm": (lambda *of: new("spectral_norm")(*of), True),
    "spectral norm by a hook": (lambda *of: old("spectral_norm")(*of), True),
    "orthogonal": (lambda *of: new("orthogonal")(*of), True),
    "a function of somebody": (scaled, True),
    "one after weight norm": (lambda module, name: scaled(new("weight_norm")(module, name), name), False),
}
"""How an array is parametrized, and whether the names of a state dict show it."""


@pytest.mark.peers
@pytest.mark.parametrize("live", [True, False], ids=["module", "state dict"])
@pytest.mark.parametrize("kind", MADE_OF_OTHERS)
@pytest.mark.parametrize("name", ["LSTM", "Linear"])
def test_arrays_that_are_made_of_others_are_named_and_the_way_out_works(name: str, kind: str, live: bool, rng: np.random.Generator) -> None:
    import torch

    wrap, shown = MADE_OF_OTHERS[kind]
    array = "weight_hh_l0" if name == "LSTM" else "weight"
    theirs = wrap(torch_module(name, D, H), array).eval()
    if live or shown:
        with pytest.raises(pn.CheckpointError, match=rf"remove_\w+\(module, '{array}'\) leaves the array itself"):
            pn.import_checkpoint(theirs if live else theirs.state_dict(), "torch", layer=name)
    x = rng.standard_normal((6, 3, D))
    expected = theirs(torch.asarray(x))
    remove = old("remove_spectral_norm") if "hook" in kind else torch.nn.utils.parametrize.remove_parametrizations
    plain = remove(theirs, array)
    y: Any = pn.import_checkpoint(plain if live else plain.state_dict(), "torch", layer=name)(x)
    ours, its = (y[0], expected[0]) if name == "LSTM" else (y, expected)
    np.testing.assert_allclose(ours, its.detach(), rtol=PUBLISHED_FLOAT64, atol=PUBLISHED_FLOAT64)


@pytest.mark.peers
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", ["GRU", "Linear"])
def test_hooks_that_may_change_what_a_module_computes_are_named(name: str, before: bool, rng: np.random.Generator) -> None:
    theirs = torch_module(name, D, H)
    plain = pn.import_checkpoint(theirs, layer=name)

    def twice(module: Any, *of: Any) -> None:
        """Somebody's."""

    handle = theirs.register_forward_pre_hook(twice) if before else theirs.register_forward_hook(twice)
    with pytest.raises(pn.CheckpointError, match=rf"a forward {'pre-' if before else ''}hook, .*twice.*ignore=\('hooks',\)"):
        pn.import_checkpoint(theirs, layer=name)
    pn.import_checkpoint(theirs, layer=name, ignore=("hooks",))
    handle.remove()
    np.testing.assert_array_equal(next(iter(pn.import_checkpoint(theirs, layer=name).params.values())), next(iter(plain.params.values())))


@pytest.mark.peers
@pytest.mark.parametrize("live", [True, False], ids=["module", "state dict"])
@pytest.mark.parametrize("name", ["GRU", "Linear"])
def test_pruned_arrays_are_read_with_their_masks(name: str, live: bool, rng: np.random.Generator) -> None:
    import torch
    from torch.nn.utils import prune

    theirs = torch_module(name, D, H)
    prune.random_unstructured(theirs, "weight_ih_l0" if name == "GRU" else "weight", 0.5)
    x = rng.standard_normal((6, 3, D))
    y: Any = pn.import_checkpoint(theirs if live else theirs.state_dict(), "torch", layer=name)(x)
    expected = theirs(torch.asarray(x))
    ours, its = (y[0], expected[0]) if name == "GRU" else (y, expected)
    np.testing.assert_allclose(ours, its.detach(), rtol=PUBLISHED_FLOAT64, atol=PUBLISHED_FLOAT64)


@pytest.mark.peers
@pytest.mark.parametrize(("name", "arguments"), [("LazyLinear", (3,)), ("LazyBatchNorm1d", ())])
def test_a_lazy_module_has_no_arrays_yet(name: str, arguments: tuple[int, ...]) -> None:
    import torch

    with pytest.raises(pn.CheckpointError, match="`weight` is not there yet: a lazy module has its arrays after its first call"):
        pn.import_checkpoint(getattr(torch.nn, name)(*arguments), "torch")


@pytest.mark.parametrize("given", [{}, {"batch_first": False}, {"batch_first": True}], ids=str)
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_that_arrays_do_not_say_the_order_of_axes_is_said(cell: str, given: dict[str, bool]) -> None:
    arrays = pn.to_format(getattr(pn, cell)(3, 4, rng=0), "torch")
    layer = pn.import_checkpoint(arrays, "torch", **given)
    said = "not stored: the order of axes; x is (time, batch, features), batch_first=True makes it the other"
    assert (said in layer.provenance) == (not given)


# -- torch: what compilers leave of a module, and what is beside one ----------------------------------------------------------------------

X_OF_TORCH: dict[str, tuple[int, ...]] = {"Linear": (4, 8), "LayerNorm": (4, 8), "RMSNorm": (4, 8), "BatchNorm1d": (4, 8)}
COMPILED: dict[str, tuple[tuple[Any, ...], dict[str, Any], list[str]]] = {
    "RNN": (("RNN", 8, H), {"nonlinearity": "relu", "batch_first": True}, ["activation", "batch_first"]),
    "LSTM": (("LSTM", 8, H, 2), {"dropout": 0.3}, ["batch_first", "dropout"]),
    "GRU": (("GRU", 8, H), {"bidirectional": True}, ["batch_first"]),
    "LayerNorm": (("LayerNorm", 8), {"eps": 0.1}, ["eps"]),
    "RMSNorm": (("RMSNorm", 8), {"eps": 0.1}, ["eps"]),
    "BatchNorm": (("BatchNorm1d", 8), {"eps": 0.1, "momentum": 0.3}, ["momentum", "eps"]),
    "BatchNorm of all batches": (("BatchNorm1d", 8), {"momentum": None}, ["momentum", "eps"]),
    "GroupNorm": (("GroupNorm", 2, 8), {"eps": 0.1}, ["num_groups", "eps"]),
    "InstanceNorm": (("InstanceNorm1d", 8), {"affine": True, "eps": 0.1}, ["eps"]),
    "InstanceNorm with statistics": (
        ("InstanceNorm1d", 8),
        {"affine": True, "track_running_stats": True, "eps": 0.1, "momentum": 0.3},
        ["momentum", "eps"],
    ),
    "Linear": (("Linear", 8, 3), {}, []),
}
"""A module of torch, and what it says beside its weights, in our words and the order in which it is asked for."""


def within(module: Any, inside: bool) -> Any:
    """A module, or one around it whose forward gives its first result."""
    import torch

    class Around(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    class First(Around):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)[0]

    if not inside:
        return module
    return First() if isinstance(module, torch.nn.RNNBase) else Around()


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "inside a model"])
@pytest.mark.parametrize("kind", COMPILED)
def test_what_torchscript_keeps_is_read_and_the_rest_asked_for(
    kind: str, inside: bool, how: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    import torch

    (name, *args), keywords, asked = COMPILED[kind]
    theirs = torch_module(name, *args, **keywords).eval()
    x = (
        rng.standard_normal((4, 6, 8))
        if theirs.__module__.endswith("rnn")
        else 3 * rng.standard_normal((4, 8, 6)[: 3 - (name in X_OF_TORCH)])
    )
    model = within(theirs, inside).eval()
    compiled: Any = torch.jit.script(model) if how == "script" else torch.jit.trace(model, torch.asarray(x))
    compiled.save(str(tmp_path / "m.pt"))
    plain: Any = pn.import_checkpoint(theirs)
    given: dict[str, Any] = {}
    for source in (compiled, torch.jit.load(str(tmp_path / "m.pt"))):
        given = {}
        for setting in asked if how == "trace" else ():
            with pytest.raises(pn.CheckpointError, match=rf"torch\.jit\.trace does not keep.*say {setting}=…"):
                pn.import_checkpoint(source, layer=type(plain).__name__, **given)
            given[setting] = plain.variant.activation if setting == "activation" else getattr(plain, setting, plain.config.get(setting))
        layer: Any = pn.import_checkpoint(source, layer=type(plain).__name__, **given)
        assert layer.config == plain.config
        y, expected = layer(x), theirs(torch.asarray(x))
        ours, its = (y[0], expected[0]) if plain.recurrent else (y, expected)
        np.testing.assert_allclose(ours, its.detach(), rtol=TORCH_FLOAT64, atol=1e-8)  # ε is rounded to float32


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The tensor attribute:UserWarning")
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "inside a model"])
def test_what_torch_has_made_a_graph_of_says_no_settings(inside: bool) -> None:
    import torch

    model, x = within(torch.nn.RNN(8, H, nonlinearity="relu"), inside).eval(), torch.ones(4, 2, 8)
    graphs: list[tuple[Any, str]] = [(torch.export.export(model, (x,)).module(), "RNN")]
    graphs += [] if inside else [(torch.fx.symbolic_trace(torch.nn.LayerNorm(8, eps=0.1)), "LayerNorm")]
    for graph, layer in graphs:
        with pytest.raises(pn.CheckpointError, match=r"no settings: they are in the graph.*state_dict\(\) with the settings as arguments"):
            pn.import_checkpoint(graph, layer=layer)
    found: Any = pn.import_checkpoint(graphs[0][0].state_dict(), activation="relu")
    y = model(x) if inside else model(x)[0]
    np.testing.assert_allclose(found(x.numpy())[0], y.detach(), **LIBRARY_FLOAT32)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("frozen", [False, True])
def test_a_class_of_somebody_in_torchscript_says_no_settings(frozen: bool) -> None:
    import torch

    class Normed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias, self.eps = torch.nn.Parameter(torch.ones(8)), torch.nn.Parameter(torch.ones(8)), 0.1

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.layer_norm(x, [8], self.weight, self.bias, self.eps)

    compiled = torch.jit.script(Normed().eval())
    with pytest.raises(pn.CheckpointError, match=r"the class Normed has a form that TorchScript has compiled.*state_dict\(\)"):
        pn.import_checkpoint(torch.jit.freeze(compiled) if frozen else compiled, layer="LayerNorm")


def _beside(kind: str) -> Any:
    import torch
    from torch.ao.nn.intrinsic import LinearReLU

    nn = torch.nn
    made: dict[str, Callable[[], Any]] = {
        "ReLU": lambda: nn.Sequential(nn.Linear(D, H), nn.ReLU()),
        "Tanh": lambda: nn.Sequential(nn.LayerNorm(D), nn.Dropout(0.5), nn.Tanh()),
        "Flatten": lambda: nn.Sequential(nn.Flatten(0, 1), nn.Sequential(nn.Linear(D, H))),
        "fused": lambda: LinearReLU(nn.Linear(D, H), nn.ReLU()),
    }
    return made[kind]().eval()


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("scripted", [False, True])
@pytest.mark.parametrize(("kind", "prefix"), [("ReLU", "0."), ("Tanh", "0."), ("Flatten", "1.0."), ("fused", "0.")])
def test_what_computes_beside_a_module_is_not_dropped(kind: str, prefix: str, scripted: bool, rng: np.random.Generator) -> None:
    import torch

    model = _beside(kind)
    source = torch.jit.script(model) if scripted else model
    beside = {"fused": "ReLU"}.get(kind, kind)
    with pytest.raises(
        pn.CheckpointError, match=rf"{beside} beside it in the .*prefix='{prefix}' names it alone; .*ignore=\('{beside}',\)"
    ):
        pn.import_checkpoint(source)
    x = rng.standard_normal((6, 3, D)).astype("float32")
    inner = model.get_submodule(prefix.removesuffix("."))
    for asked in ({"prefix": prefix}, {"prefix": prefix[:-1]}, {"ignore": (beside,)}):
        layer: Any = pn.import_checkpoint(source, **asked)
        np.testing.assert_allclose(layer(x), inner(torch.asarray(x)).detach(), **LIBRARY_FLOAT32)


@pytest.mark.peers
def test_what_surrounds_a_module_is_said() -> None:
    import torch

    class Tagger(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.act, self.drop = torch.nn.GRU(D, H), torch.nn.ReLU(), torch.nn.Dropout(0.5)

        def forward(self, x: Any) -> Any:
            return self.act(self.drop(self.rnn(x)[0]))

    hooked = torch.nn.Sequential(torch.nn.GRU(D, H))
    hooked.register_forward_hook(lambda module, given, found: found)
    with pytest.raises(pn.CheckpointError, match=r"a forward hook, .* of Sequential.*ignore=\('hooks',\)"):
        pn.import_checkpoint(hooked)
    assert isinstance(pn.import_checkpoint(hooked, prefix="0."), pn.GRU)
    around = "of the Tagger around it ReLU and what forward does beside are not read"
    assert around in pn.import_checkpoint(Tagger()).provenance
    assert around not in pn.import_checkpoint(Tagger(), prefix="rnn.").provenance
    model = torch.nn.Sequential(torch.nn.Embedding(9, D), torch.nn.GRU(D, H), torch.nn.ReLU())
    assert "of the Sequential around it Embedding, ReLU" in pn.import_checkpoint(model, layer="GRU").provenance
