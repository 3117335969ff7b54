"""What a file holds beside what is asked for: rare types, entries of other kinds, sizes; and the errors, as somebody reads them."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import portnorm as pn
from portnorm.checkpoint import containers, safetensors
from tests.oracles import D, H
from tests.processes import output_of
from tests.tolerances import LIBRARY_FLOAT32

ARRAYS = pn.to_format(pn.LSTM(D, H, rng=0), "torch")

# -- safetensors -------------------------------------------------------------------------------------------------------------------------


def written(path: Path, entries: dict[str, tuple[str, Any]], metadata: Any = ...) -> Path:
    """A safetensors file with these types and bytes, in this order."""
    header: dict[str, Any] = {} if metadata is ... else {"__metadata__": metadata}
    body = b""
    for name, (code, array) in entries.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": code, "shape": list(np.shape(array)), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


NARROW = {"BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}


@pytest.mark.parametrize("code", NARROW)
def test_every_value_of_a_narrow_type(code: str, tmp_path: Path) -> None:
    count = 2 ** (8 * np.dtype(NARROW[code]).itemsize)
    raw = np.arange(count, dtype="uint16" if count > 256 else "uint8")
    path = written(tmp_path / "w.safetensors", {"a": (code, raw)})
    np.testing.assert_array_equal(safetensors.read(path)[0]["a"], raw.view(NARROW[code]).astype("float32"))


@pytest.mark.parametrize("code", NARROW)
@pytest.mark.parametrize("source", ["safetensors", "mapping"])
def test_weights_of_a_narrow_type_come_as_float32(code: str, source: str, tmp_path: Path) -> None:
    narrow = {name: a.astype(NARROW[code]) for name, a in ARRAYS.items()}
    entries = {name: (code, a.view("uint8" if a.dtype.itemsize == 1 else "uint16")) for name, a in narrow.items()}
    given: Any = written(tmp_path / "w.safetensors", entries) if source == "safetensors" else narrow
    layer = pn.import_checkpoint(given, "torch")
    assert layer.dtype == np.float32
    for name, array in layer.params.items():
        np.testing.assert_array_equal(array, narrow[name].astype("float32"))


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int16", "uint16", "uint32", "uint64"])
@pytest.mark.parametrize("name", ["weight_ih_l0", "bias_hh_l0"])
def test_what_is_quantized_or_the_bits_of_another_type_is_named(name: str, dtype: str) -> None:
    with pytest.raises(pn.CheckpointError, match=f"'{name}' has the type {dtype}; expected floating-point numbers"):
        pn.import_checkpoint(ARRAYS | {name: ARRAYS[name].astype(dtype)}, "torch")


@pytest.mark.parametrize("value", [None, "text", [[1.0], [1.0, 2.0]]], ids=["None", "text", "ragged"])
def test_what_is_no_array_is_named(value: Any) -> None:
    with pytest.raises(pn.CheckpointError, match=r"`bias_hh_l0` is .*; expected an array of numbers"):
        pn.import_checkpoint(ARRAYS | {"bias_hh_l0": value})


def test_masks_are_not_dropped() -> None:
    with pytest.raises(pn.CheckpointError, match="'bias_hh_l0' is a masked array"):
        pn.import_checkpoint(ARRAYS | {"bias_hh_l0": np.ma.masked_less(ARRAYS["bias_hh_l0"], 0)})


@pytest.mark.peers
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_tensors_of_eight_bits_come_as_float32(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    tensors = {name: torch.tensor(a).to(getattr(torch, dtype)) for name, a in ARRAYS.items()}
    layer = pn.import_checkpoint(tensors)
    for name, array in layer.params.items():
        np.testing.assert_array_equal(array, tensors[name].float().numpy())


@pytest.mark.peers
def test_what_is_no_tensor_of_a_module_is_named() -> None:
    torch = pytest.importorskip("torch")

    class Packed(torch.nn.LayerNorm):  # type: ignore[misc, name-defined]
        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[f"{prefix}packed"] = object()

    with pytest.raises(pn.CheckpointError, match="`packed` is object; expected a tensor: modules that torch has quantized"):
        pn.import_checkpoint(Packed(4))
    assert isinstance(pn.import_checkpoint(Packed(4), ignore=("packed",)), pn.LayerNorm)


@pytest.mark.peers
@pytest.mark.parametrize("xp", ["torch", "jax.numpy"])
def test_bfloat16_stays_where_the_library_has_it(xp: str, tmp_path: Path) -> None:
    entries = {name: ("BF16", a.astype(ml_dtypes.bfloat16).view("uint16")) for name, a in ARRAYS.items()}
    layer = pn.import_checkpoint(written(tmp_path / "w.safetensors", entries), "torch", xp=xp)
    assert "bfloat16" in str(layer.dtype)


@pytest.mark.parametrize("code", ["U16", "U32", "U64", "C64", "F4", "F6_E2M3", "something"])
def test_what_is_not_asked_for_never_stops_what_is(code: str, tmp_path: Path) -> None:
    known = {"U16": "uint16", "U32": "uint32", "U64": "uint64", "C64": "complex64"}
    other = (code, np.ones(4, known.get(code, "uint8")))
    entries = {"other.x": other, **{f"lstm.{n}": ("F32", a) for n, a in ARRAYS.items()}, "scalar": ("F32", np.float32(3))}
    path = written(tmp_path / "w.safetensors", entries, None)
    assert isinstance(pn.import_checkpoint(path, prefix="lstm."), pn.LSTM)
    inside = written(tmp_path / "v.safetensors", {"weight": other}, None)
    if code.startswith("U"):
        np.testing.assert_array_equal(safetensors.read(inside)[0]["weight"], np.ones(4))
    else:
        with pytest.raises(pn.CheckpointError, match=f"'weight' has the type {'complex64' if code == 'C64' else code}"):
            pn.import_checkpoint(inside, "torch", layer="RMSNorm")


@pytest.mark.parametrize("metadata", [None, {}, {"format": "mlx"}, ...])
def test_metadata_may_be_null(metadata: Any, tmp_path: Path) -> None:
    path = written(tmp_path / "w.safetensors", {n: ("F32", a) for n, a in ARRAYS.items()}, metadata)
    assert isinstance(pn.import_checkpoint(path), pn.LSTM)


def test_entries_without_bytes_may_begin_where_others_do(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    a = np.arange(3, dtype="<f4")
    header = {
        "full": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]},
        "empty": {"dtype": "F32", "shape": [0, 7], "data_offsets": [0, 0]},
        "last": {"dtype": "F32", "shape": [0], "data_offsets": [12, 12]},
        "scalar": {"dtype": "F32", "shape": [], "data_offsets": [12, 16]},
    }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + a.tobytes() + np.float32(7).tobytes())
    found = safetensors.read(path)[0]
    assert {name: x.shape for name, x in found.items()} == {"full": (3,), "empty": (0, 7), "last": (0,), "scalar": ()}
    assert found["scalar"] == 7


# -- entries of other kinds --------------------------------------------------------------------------------------------------------------


class Untouchable:
    """An array that must not be looked at."""

    @property
    def dtype(self) -> Any:
        raise AssertionError("looked at")

    shape = property(lambda self: (_ for _ in ()).throw(AssertionError("looked at")))

    def __array__(self, *args: Any, **keywords: Any) -> Any:
        raise AssertionError("converted")


def test_what_prefix_and_ignore_leave_out_is_not_looked_at() -> None:
    def instance(name: str) -> Any:
        return type(name, (), {"__array__": Untouchable.__array__})()

    nested = {"lstm": dict(ARRAYS), "other": {"a": instance("Lazy"), "b": "text", "c": [{"x": 1}, [2, 3]]}}
    assert isinstance(pn.import_checkpoint(nested, prefix="lstm/"), pn.LSTM)
    assert isinstance(pn.import_checkpoint({**ARRAYS, "extra": instance("Lazy")}, ignore=("extra",)), pn.LSTM)


def test_a_text_for_ignore_is_not_taken_letter_by_letter() -> None:
    """The bias of this layer is called "b", a letter of the other's name."""
    arrays = pn.to_format(pn.GRU(3, 4, rng=0), "mlx")
    with pytest.raises(pn.UnsupportedError, match=r"`ignore` is the text 'bhn'; expected a collection of names: ignore=\('bhn',\)"):
        pn.import_checkpoint(arrays, "mlx", ignore="bhn")


@pytest.mark.parametrize("kind", [list, tuple])
def test_lists_of_mappings_are_read_by_their_numbers(kind: Any) -> None:
    """Trees of MLX, haiku's states and optimizers have them; a list of numbers is an array."""
    layers = [pn.to_format(pn.LSTM(n, 4, rng=n), "mlx") for n in (3, 4)]
    tree = {"encoder": {"layers": kind(layers)}, "schedule": [1.0, 2.0]}
    with pytest.raises(pn.CheckpointError, match=r"prefix='encoder/layers/0/' \(mlx LSTM\) and 1 more with other numbers"):
        pn.import_checkpoint(tree)
    second: Any = pn.import_checkpoint(tree, prefix="encoder/layers/1/")
    np.testing.assert_array_equal(second.params["weight_ih_l0"], layers[1]["Wx"])


@pytest.mark.peers
def test_keys_of_random_generators_are_left_out_and_said() -> None:
    import jax

    layer = pn.import_checkpoint({**ARRAYS, "rngs": {"default": {"key": jax.random.key(0)}}}, "torch")
    assert "keys of random generators, which are no weights, were left out: rngs/default/key" in layer.provenance


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.ones((4 * H, D), complex), "'weight_ih_l0' has the type complex128; expected real numbers"),
        (np.ones((4 * H, D), np.longdouble), "'weight_ih_l0' has the type (longdouble|float128); expected real numbers of at most 64 bits"),
        (np.full((4 * H, D), "a"), "weight_ih_l0"),
        (np.full((4 * H, D), None), "weight_ih_l0"),
    ],
)
def test_arrays_that_are_no_weights_are_named(value: Any, message: str) -> None:
    with pytest.raises(pn.CheckpointError, match=message):
        pn.import_checkpoint({**ARRAYS, "weight_ih_l0": value}, "torch")


def test_arrays_of_another_byte_order(tmp_path: Path) -> None:
    import h5py

    turned = {name: a.astype(">f4") for name, a in ARRAYS.items()}
    np.savez(tmp_path / "w.npz", **turned)
    with h5py.File(tmp_path / "w.h5", "w") as file:
        for name, a in turned.items():
            file[name] = a
    for source in (turned, tmp_path / "w.npz", tmp_path / "w.h5"):
        layer = pn.import_checkpoint(source, "torch")
        assert layer.dtype == np.float32
        np.testing.assert_array_equal(layer.params["weight_ih_l0"], ARRAYS["weight_ih_l0"])


def test_bfloat16_that_numpy_saved_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", **{n: a.astype(ml_dtypes.bfloat16) for n, a in ARRAYS.items()})
    with pytest.raises(pn.CheckpointError, match=r"ml_dtypes' bfloat16; save array\.astype\('float32'\)"):
        pn.import_checkpoint(tmp_path / "w.npz", "torch")


def test_links_of_hdf5(tmp_path: Path) -> None:
    """One inside the file is followed, one into another file never is."""
    import h5py

    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["a"] = ARRAYS["bias_hh_l0"]
    with h5py.File(tmp_path / "w.h5", "w") as file:
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0"):
            file[f"real/{name}"] = ARRAYS[name]
            file[f"lstm/{name}"] = h5py.SoftLink(f"/real/{name}")
        file["real/around"] = file["real"]
        file["lstm/bias_hh_l0"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "/a")
    with pytest.raises(pn.CheckpointError, match="'lstm/bias_hh_l0' is a link, or lies in another file"):
        pn.import_checkpoint(tmp_path / "w.h5", prefix="lstm/")
    with h5py.File(tmp_path / "w.h5", "a") as file:
        del file["lstm/bias_hh_l0"]
        file["lstm/bias_hh_l0"] = ARRAYS["bias_hh_l0"]
    np.testing.assert_array_equal(pn.import_checkpoint(tmp_path / "w.h5", prefix="lstm/").params["weight_ih_l0"], ARRAYS["weight_ih_l0"])


def test_what_is_no_number_in_hdf5_is_not_dropped(tmp_path: Path) -> None:
    import h5py

    with h5py.File(tmp_path / "w.h5", "w") as file:
        for name, a in ARRAYS.items():
            file[name] = a
        file["note"] = "text"
        file["mask"] = np.ones(3, bool)
    with pytest.raises(pn.CheckpointError, match="`note` is object; expected an array of numbers"):
        pn.import_checkpoint(tmp_path / "w.h5", "torch")
    with pytest.raises(pn.CheckpointError, match=r"unknown \['mask'\]"):
        pn.import_checkpoint(tmp_path / "w.h5", "torch", ignore=("note",))


# -- files of many layers, and people who look at them -------------------------------------------------------------------------------------

MODEL = {
    **{f"encoder.lstm.{n}": a for n, a in ARRAYS.items()},
    "embedding.weight": np.ones((100, 8), "float32"),
    "step": np.array(3),
    "head.weight": np.ones((2, 4), "float32"),
    "head.bias": np.ones(2, "float32"),
    "norm.weight": np.ones(4, "float32"),
    "norm.bias": np.ones(4, "float32"),
    "optimizer/vars/0": np.array(1),
}


def test_a_whole_model_lists_its_parts() -> None:
    with pytest.raises(pn.CheckpointError) as caught:
        pn.import_checkpoint(MODEL)
    said = str(caught.value)
    assert "name one" in said
    assert "prefix='encoder.' (torch LSTM)" in said
    assert "prefix='norm.' (torch " in said
    assert "LayerNorm" in said
    assert "beside 2 Linear" in said
    assert "2 other arrays, such as 'step'" in said
    assert said.index("encoder.") < said.index("norm.")


@pytest.mark.parametrize("extra", ["embedding.weight", "step", "optimizer/vars/0", "head.weight"])
def test_one_array_more_does_not_hide_the_list(extra: str) -> None:
    keys = {name: a for name, a in MODEL.items() if name.startswith("encoder.")} | {extra: MODEL[extra]}
    with pytest.raises(pn.CheckpointError, match=r"prefix='encoder\.' \(torch LSTM\)"):
        pn.import_checkpoint(keys)
    for source in (keys, MODEL):
        layer = pn.import_checkpoint(source, layer="LSTM")
        np.testing.assert_array_equal(layer.params["weight_ih_l0"], ARRAYS["weight_ih_l0"])
        assert "encoder.lstm.weight_ih_l0" in layer.provenance


def in_shards(folder: Path, **changed: Any) -> Path:
    """A layer in two files, and their index."""
    parts = {f"{n}.safetensors": {f"rnn.{key}": a for key, a in ARRAYS.items() if ("ih" in key) == bool(n)} for n in (0, 1)}
    for name, arrays in parts.items():
        safetensors.write(folder / name, arrays, {})
    places = {key: name for name, arrays in parts.items() for key in arrays}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": places, **changed}))
    return path


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    layer = pn.import_checkpoint(in_shards(tmp_path), prefix="rnn.")
    for name, a in ARRAYS.items():
        np.testing.assert_array_equal(layer.params[name], a)
    safetensors.write(tmp_path / "2.safetensors", {"norm.weight": np.ones(3), "norm.bias": np.ones(3)}, {})
    part = in_shards(tmp_path, weight_map={"norm.weight": "2.safetensors", "norm.bias": "2.safetensors", "other": "not there.safetensors"})
    assert isinstance(pn.import_checkpoint(part, prefix="norm.", layer="LayerNorm"), pn.LayerNorm)  # a file that is missing stops nothing
    with pytest.raises(pn.CheckpointError, match=r"not there\.safetensors"):
        pn.import_checkpoint(part, prefix="other")


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (None, "is damaged: expected a map `weight_map`"),
        ({"rnn.weight_hh_l0": "../0.safetensors"}, "is damaged: expected a map `weight_map`"),
        ({"rnn.weight_hh_l0": 3}, "is damaged: expected a map `weight_map`"),
        ({"rnn.weight_hh_l0": "0.safetensors"}, r"'0\.safetensors' do not agree whether 'rnn\.bias_hh_l0' is in the latter"),
        ({"rnn.weight_ih_l0": "0.safetensors"}, r"'0\.safetensors' do not agree whether 'rnn\.bias_hh_l0' is in the latter"),
        ({"rnn.weight_hh_l0": "2.safetensors"}, "No such file"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_named(places: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(pn.CheckpointError, match=message):
        pn.import_checkpoint(in_shards(tmp_path, weight_map=places))


def test_layers_with_the_keys_of_the_nearest_are_listed() -> None:
    first, second = ({"w": np.ones((n + 4, 16)), "b": np.ones(16)} for n in (3, 4))
    with pytest.raises(pn.CheckpointError, match=r"prefix='lstm/' \(haiku LSTM\), prefix='lstm_1/' \(haiku LSTM\)"):
        pn.import_checkpoint({"lstm/linear": first, "lstm_1/linear": second})


BATCH_NORM = {"bn.weight": (4,), "bn.bias": (4,), "bn.running_mean": (4,), "bn.running_var": (4,), "bn.num_batches_tracked": ()}


def test_the_counter_of_a_batch_norm_does_not_hide_it() -> None:
    model = MODEL | {name: np.ones(shape, "float32" if shape else "int64") for name, shape in BATCH_NORM.items()}
    with pytest.raises(pn.CheckpointError, match=r"prefix='bn\.' \(torch BatchNorm\)"):
        pn.import_checkpoint(model)
    assert isinstance(pn.import_checkpoint(model, layer="BatchNorm"), pn.BatchNorm)


@pytest.mark.parametrize("name", ["GRU", "BatchNorm", "RNN"])
def test_a_class_that_is_not_there_says_what_is(name: str) -> None:
    with pytest.raises(pn.CheckpointError, match=rf"there is no {name}; .*prefix='encoder\.' \(torch LSTM\)"):
        pn.import_checkpoint(MODEL, layer=name)


def test_short_names_of_several_parts_are_listed() -> None:
    short = {f"{part}_{n[0]}_{n[-5:-3]}": a for part in ("enc", "dec") for n, a in ARRAYS.items()}
    with pytest.raises(pn.CheckpointError, match=r"prefix='dec_' \(torch LSTM\), prefix='enc_' \(torch LSTM\)"):
        pn.import_checkpoint(short | {"enc_emb": np.ones((7, 3)), "fc_w": np.ones((4, 2)), "fc_b": np.ones(4)})


@pytest.mark.parametrize("config", [{"num_layers": 3}, {"bidirectional": True}, {"peepholes": True}, {"norm": "layer"}])
def test_parameters_that_only_an_argument_speaks_of_are_named(config: dict[str, Any]) -> None:
    """They would be those of a new layer."""
    with pytest.raises(pn.CheckpointError, match=r"LSTM.* has `.*for which LSTM has no arrays"):
        pn.import_checkpoint(ARRAYS, **config)


def test_two_of_a_class_have_to_be_told_apart() -> None:
    two = MODEL | {f"decoder.{n}": a for n, a in ARRAYS.items()}
    with pytest.raises(pn.CheckpointError, match=r"prefix='decoder\.'.*prefix='encoder\.'"):
        pn.import_checkpoint(two, layer="LSTM")


def test_many_layers_of_a_kind_are_one_entry() -> None:
    many = {f"blocks.{k}.{norm}.{p}": np.ones(4) for k in range(30) for norm in ("norm1", "norm2") for p in ("weight", "bias")}
    with pytest.raises(pn.CheckpointError, match=r"prefix='blocks\.0\.norm1\.' .* and 59 more with other numbers") as caught:
        pn.import_checkpoint(many, "torch")
    assert len(str(caught.value)) < 400


def test_a_prefix_that_is_not_there_says_what_is() -> None:
    with pytest.raises(pn.CheckpointError, match=r"no key starts with 'lstm\.'; the keys begin with 'encoder\.', 'embedding\.', 'step'"):
        pn.import_checkpoint(MODEL, prefix="lstm.")
    with pytest.raises(pn.CheckpointError, match=r"no key starts with 'encoder\.gru\.'; the keys begin with 'encoder\.lstm\.'$"):
        pn.import_checkpoint(MODEL, prefix="encoder.gru.")


@pytest.mark.parametrize(
    ("first", "second"),
    [("i2h", "h2h"), ("x2h", "h2h"), ("weight_input", "weight_hidden"), ("w_ih", "w_hh"), ("W_r", "U_r"), ("Wx.r", "Wh.r")],
)
def test_a_cell_of_somebody_is_told_what_works(first: str, second: str) -> None:
    keys = {f"cell.{first}.weight": np.ones((16, 5)), f"cell.{second}.weight": np.ones((16, 4)), "cell.ln_c.weight": np.ones(4)}
    with pytest.raises(pn.CheckpointError, match=r"a recurrent cell of your own.*pn\.Variant.*load_state_dict.*pn\.to_format"):
        pn.import_checkpoint(keys, "torch")


@pytest.mark.parametrize("format_", ["torch-fastrnns", "haste", "icefall"])
@pytest.mark.parametrize("before", ["", "cell.", "rnn."])
def test_normalizers_by_other_names_are_not_to_be_ignored(before: str, format_: str) -> None:
    """The matrices have the names of the format, and the normalizers others: without these it would be another cell."""
    names = {"weight_ih": (32, 4), "weight_hh": (32, 8), "ln_x.weight": (32,), "ln_x.bias": (32,), "ln_c.weight": (8,), "ln_c.bias": (8,)}
    with pytest.raises(pn.CheckpointError, match=r"a recurrent cell of your own.*pn\.Variant.*replace_modules takes a function"):
        pn.import_checkpoint({before + name: np.ones(shape, np.float32) for name, shape in names.items()}, format_)


def test_the_ways_that_an_error_names_work(rng: np.random.Generator) -> None:
    """As the error says: a Variant and a function of names."""
    theirs = {
        "cell.i2h.weight": rng.standard_normal((16, 5)),
        "cell.h2h.weight": rng.standard_normal((16, 4)),
        "cell.i2h.bias": np.ones(16),
    }
    theirs |= {"cell.ln_c.weight": np.ones(4), "cell.ln_c.bias": np.zeros(4)}
    layer = pn.LSTM(5, 4, norm=pn.Variant("mine", norm="layer", terms=None, cell="copy"), dtype="float64")
    names = {"weight_ih_l0": "i2h.weight", "weight_hh_l0": "h2h.weight", "bias_l0": "i2h.bias", "norm_c_l0.weight": "ln_c.weight"}
    names |= {"norm_c_l0.bias": "ln_c.bias"}
    layer.load_state_dict({ours: theirs[f"cell.{names[ours]}"] for ours in layer.state_dict()})
    assert np.isfinite(layer(rng.standard_normal((3, 2, 5)))[0]).all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_group": 2}, r"`num_group` is no argument of LSTM and fields of its Variant; did you mean 'norm'|`num_group` is no argument"),
        ({"epsilon": 1e-3}, "`epsilon` is no argument of LSTM.*expected one of|did you mean 'eps'"),
        ({"bath_first": True}, "`bath_first` is no argument of LSTM.*did you mean 'batch_first'"),
    ],
)
def test_an_argument_that_there_is_not_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(pn.UnsupportedError, match=message) as caught:
        pn.import_checkpoint(ARRAYS, "torch", **config)
    assert "missing" not in str(caught.value)


def test_a_field_of_a_cell_is_no_argument_of_a_norm() -> None:
    with pytest.raises(pn.UnsupportedError, match="`zoneout` is no argument of LayerNorm"):
        pn.import_checkpoint({"weight": np.ones(3)}, "torch", layer="LayerNorm", zoneout=0.1)


@pytest.mark.parametrize("source", [None, 3, [np.ones(3)], np.ones(3)])
def test_sources_of_another_kind(source: Any) -> None:
    with pytest.raises(pn.UnsupportedError, match=f"`source` is a {type(source).__name__}; expected a file, a mapping"):
        pn.import_checkpoint(source)


@pytest.mark.peers
@pytest.mark.parametrize("form", ["state dict", "inside a dict", "old format"])
def test_the_advice_for_pickles_works(form: str, tmp_path: Path) -> None:
    """As it is written in the error, for files as people have them."""
    import torch

    theirs = torch.nn.LSTM(D, H)
    inside = {"step": 7, "model_state": theirs.state_dict(), "optimizer_state": {"param_groups": [{"lr": 0.1}], "state": {}}}
    held = theirs.state_dict() if form == "state dict" else inside
    torch.save(held, tmp_path / "w.pt", _use_new_zipfile_serialization=form != "old format")
    with pytest.raises(pn.CheckpointError) as caught:
        pn.import_checkpoint(tmp_path / "w.pt")
    assert "w = torch.load(path, map_location='cpu', weights_only=True), then import_checkpoint(w)" in str(caught.value)
    w = torch.load(tmp_path / "w.pt", map_location="cpu", weights_only=True)
    layer = pn.import_checkpoint(w, prefix="" if form == "state dict" else "model_state/")
    np.testing.assert_array_equal(layer.params["weight_ih_l0"], theirs.weight_ih_l0.detach())
    if form != "state dict":
        assert isinstance(pn.import_checkpoint(w, layer="LSTM"), pn.LSTM)


def test_the_help_of_a_variant_explains_every_field() -> None:
    text = inspect.getdoc(pn.Variant) or ""
    for field in dataclasses.fields(pn.Variant):
        assert f"\n  {field.name}: " in text, field.name


# -- memory --------------------------------------------------------------------------------------------------------------------------------

MEGABYTES = 48


def large(path: Path, megabytes: int = MEGABYTES) -> Path:
    """A file of so many MB beside an LSTM."""
    arrays = {f"big.{k}": np.full((megabytes // 8, 2**20 // 4), k, "float32") for k in range(8)} | {
        f"lstm.{n}": a for n, a in ARRAYS.items()
    }
    if path.suffix == ".safetensors":
        safetensors.write(path, arrays, {})
    elif path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix in (".h5", ".keras"):
        import h5py

        weights = path if path.suffix == ".h5" else path.with_suffix(".inner")
        with h5py.File(weights, "w") as file:
            for name, a in arrays.items():
                file[name] = a
        if path.suffix == ".keras":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("config.json", "{}")
                archive.write(weights, "model.weights.h5")
    else:
        import onnx

        from tests.test_import import onnx_model

        model = onnx_model(
            "LSTM", {**arrays_of_a_node(), **{n: a for n, a in arrays.items() if n.startswith("big")}}, ("x", "W", "R"), hidden_size=H
        )
        onnx.save(model, path, save_as_external_data=True, location="m.bin", size_threshold=1024)
    return path


def arrays_of_a_node() -> dict[str, Any]:
    return {"W": np.ones((1, 4 * H, D), "float32"), "R": np.ones((1, 4 * H, H), "float32")}


@pytest.mark.parametrize("ending", ["safetensors", "npz", "h5", "keras", "onnx"])
def test_memory_is_for_what_is_asked_for(ending: str, tmp_path: Path) -> None:
    """What a process needs to read a small layer out of a file of 48 MB, when it has read one out of 8 MB and imported what it takes."""
    (tmp_path / "first").mkdir()
    first, path = large(tmp_path / "first" / f"m.{ending}", 8), large(tmp_path / f"m.{ending}")
    prefix, format_ = ("", "auto") if ending == "onnx" else ("lstm.", "torch")
    code = f"""
import portnorm as pn
from tests.processes import peak

pn.import_checkpoint({str(first)!r}, {format_!r}, prefix={prefix!r})
print(peak(lambda: pn.import_checkpoint({str(path)!r}, {format_!r}, prefix={prefix!r})))
"""
    assert float(output_of(code)) < MEGABYTES / 6
    assert os.path.getsize(path.with_name("m.bin") if ending == "onnx" else path) >= MEGABYTES * 2**20


def test_containers_describe_what_they_hold(tmp_path: Path) -> None:
    for ending in ("safetensors", "npz", "h5"):
        with containers.opened(large(tmp_path / f"m.{ending}")) as held:
            for name, a in ARRAYS.items():
                stored = held.arrays[f"lstm.{name}"]
                assert (stored.shape, stored.dtype, stored.ndim) == (a.shape, "float32", a.ndim)
                np.testing.assert_array_equal(np.asarray(stored), a)


def test_damaged_bytes_of_npz_give_a_layer_or_one_family_of_errors(tmp_path: Path, rng: np.random.Generator) -> None:
    np.savez(tmp_path / "w.npz", **ARRAYS)
    whole = (tmp_path / "w.npz").read_bytes()
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.integers(len(damaged))] ^= rng.integers(1, 256)
        (tmp_path / "w.npz").write_bytes(bytes(damaged))
        with contextlib.suppress(pn.PortnormError):
            assert isinstance(pn.import_checkpoint(tmp_path / "w.npz"), pn.Layer)


# -- what the metadata of safetensors say ------------------------------------------------------------------------------------------------

SAVED: dict[str, Any] = {
    "reverse": lambda: pn.LSTM(D, H, direction="reverse", batch_first=True, rng=0),
    "relu": lambda: pn.RNN(D, H, norm=pn.Variant("", activation="relu", biases=("bias_ih", "bias_hh")), rng=0),
    "a variant": lambda: pn.GRU(D, H, norm="layer", rng=0),
    "eps": lambda: pn.LayerNorm(D, eps=0.5),
    "channel axis": lambda: pn.BatchNorm(D, channel_axis=-1, eps=0.5),
    "integers": lambda: pn.quantized(pn.LSTM(D, H, rng=0)),
    "several": lambda: pn.Sequential(pn.LSTM(D, H, batch_first=True, rng=0), pn.LayerNorm(H, eps=0.5)),
}


@pytest.mark.parametrize("kind", SAVED)
def test_a_file_of_portnorm_is_read_as_its_configuration_says(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    saved = SAVED[kind]()
    pn.save(saved, tmp_path / "m.safetensors")
    again = pn.import_checkpoint(tmp_path / "m.safetensors")
    assert repr(again) == repr(saved)
    assert "as its configuration in the file says" in again.provenance
    x = rng.standard_normal((6, 3, D)).astype("float32")
    y, expected = again(x), saved(x)
    np.testing.assert_allclose(*((y[0], expected[0]) if saved.recurrent else (y, expected)), **LIBRARY_FLOAT32)
    for given in ({"format": "torch"}, {"ignore": ("bias",)}, {"batch_first": False}):
        with pytest.raises(pn.UnsupportedError, match=rf"{next(iter(given))} would say otherwise; portnorm\.load"):
            pn.import_checkpoint(tmp_path / "m.safetensors", **given)


def test_a_file_of_training_gives_its_layer(tmp_path: Path) -> None:
    layer = pn.Linear(D, H, rng=0)
    pn.save(pn.Training(layer, pn.Adam(1e-3)), tmp_path / "m.safetensors")
    again = pn.import_checkpoint(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(again.params["weight"], layer.params["weight"])
    assert again.provenance.endswith("that is of a run of training, of which the layer alone is read")


def test_a_part_of_a_file_of_portnorm(tmp_path: Path) -> None:
    saved, path = SAVED["several"](), tmp_path / "m.safetensors"
    pn.save(saved, path)
    for asked in ({"prefix": "1."}, {"prefix": "1"}, {"layer": "LayerNorm"}, {"prefix": "1.", "layer": "LayerNorm"}):
        assert repr(pn.import_checkpoint(path, **asked)) == repr(saved.parts[1])
    with pytest.raises(pn.CheckpointError, match=r"`prefix` is '2\.', which names no part of .*expected one of the parts '0\.', '1\.'"):
        pn.import_checkpoint(path, prefix="2.")
    with pytest.raises(pn.CheckpointError, match=r"`layer` is 'GRU', of which .* has 0: it holds Sequential"):
        pn.import_checkpoint(path, layer="GRU")


def _square(*_: Any) -> dict[str, Any]:
    return {"weight": np.arange(9.0).reshape(3, 3), "bias": np.ones(3)}


def _statistics(*_: Any) -> dict[str, Any]:
    return {name: np.arange(1.0, 4.0) for name in ("weight", "bias", "running_mean", "running_var")}


WRITERS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("pd", "paddle", "Linear", _square()),
    ("mlx", "mlx", "BatchNorm", _statistics()),
    ("mlx", "mlx", "Embedding", {"weight": np.ones((5, 3))}),
    ("flax", "flax", "LayerNorm", {"scale": np.ones(3), "bias": np.ones(3)}),
    ("pt", "torch", "Linear", _square()),
    ("np", "torch", "BatchNorm", _statistics()),
]


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize(("written", "format_", "layer", "arrays"), WRITERS, ids=lambda value: value if isinstance(value, str) else "")
def test_the_writer_in_the_metadata_is_the_format(
    written: str, format_: str, layer: str, arrays: dict[str, Any], shards: bool, tmp_path: Path, rng: np.random.Generator
) -> None:
    path = tmp_path / "m.safetensors"
    safetensors.write(path, arrays, {"format": written})
    if shards:
        path = tmp_path / "m.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": dict.fromkeys(arrays, "m.safetensors")}))
    found, expected = pn.import_checkpoint(path, layer=layer), pn.import_checkpoint(arrays, format_, layer=layer)
    assert found.provenance == expected.provenance
    x = np.array([[0, 1, 2]]) if layer == "Embedding" else rng.standard_normal((2, 3, 3))
    np.testing.assert_array_equal(found(x), expected(x))


def test_weights_of_another_than_the_writer_are_told_apart_by_format(tmp_path: Path) -> None:
    arrays = pn.to_format(pn.GroupNorm(2, 4), "torch")  # which MLX groups in another way
    safetensors.write(tmp_path / "m.safetensors", arrays, {"format": "mlx"})
    with pytest.raises(pn.UnsupportedError, match=r"said by its metadata, format='mlx', another has to be named by `format`"):
        pn.import_checkpoint(tmp_path / "m.safetensors", layer="GroupNorm", num_groups=2)
    found = pn.import_checkpoint(tmp_path / "m.safetensors", "torch", layer="GroupNorm", num_groups=2)
    assert isinstance(found, pn.GroupNorm)


# -- arguments -----------------------------------------------------------------------------------------------------------------------------

TWO = pn.to_format(pn.LSTM(D, H, num_layers=2, rng=0), "torch")
ARGUMENTS: list[tuple[dict[str, Any], Any, str]] = [
    ({"ignore": ("weight_hh_l0",)}, pn.CheckpointError, "`weight_hh` cannot be left out"),
    ({"ignore": ("weight_ih_l0",)}, pn.CheckpointError, "`weight_ih` cannot be left out"),
    ({"ignore": None}, pn.UnsupportedError, "`ignore` is None; expected a collection of names"),
    ({"ignore": ([],)}, pn.UnsupportedError, r"`ignore` is \(\[\],\); expected a collection of names"),
    ({"prefix": None}, pn.UnsupportedError, "`prefix` is None; expected a text"),
    ({"prefix": 3}, pn.UnsupportedError, "`prefix` is 3; expected a text"),
    (
        {"num_layers": 1},
        pn.CheckpointError,
        "'weight_ih_l1' would be `weight_ih_l1`, .* has not; arrays say what there is: do without what says otherwise of num_layers=1",
    ),
]


@pytest.mark.parametrize(("given", "kind", "message"), ARGUMENTS, ids=[str(given) for given, _, _ in ARGUMENTS])
def test_arguments_that_cannot_be_are_named(given: dict[str, Any], kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        pn.import_checkpoint(TWO, "torch", **given)


@pytest.mark.parametrize(("layer", "given"), [("Linear", {"bias": False}), ("BatchNorm", {"affine": False})])
def test_arrays_that_an_argument_leaves_no_place_for_are_named(layer: str, given: dict[str, Any]) -> None:
    whole = {"weight": np.ones((3, 4)), "bias": np.ones(3)} if layer == "Linear" else {name: np.ones(3) for name in _statistics()}
    with pytest.raises(
        pn.CheckpointError,
        match=rf"which {layer}\(.*has not; arrays say what there is: do without what says otherwise of {next(iter(given))}=False",
    ):
        pn.import_checkpoint(whole, "torch", layer=layer, **given)


def test_what_is_ignored_is_not_said_to_be_read() -> None:
    said = pn.import_checkpoint(ARRAYS, "torch", ignore=("bias_hh_l0",)).provenance
    assert "whose keys are bias_ih_l0, weight_hh_l0, weight_ih_l0;" in said
    assert said.endswith("left out, as `ignore` says: bias_hh_l0")


def test_the_only_embedding_of_a_model_is_found() -> None:
    model = {"emb.weight": np.ones((9, D)), **{f"rnn.{name}": a for name, a in ARRAYS.items()}}
    assert isinstance(pn.import_checkpoint(model, layer="Embedding"), pn.Embedding)


@pytest.mark.parametrize(
    "beside", [("lora.lora_a", "lora.lora_b"), ("lora_A.default.weight",), ("weight_scale",), ("weight_scale_inv",), ("scales",)]
)
@pytest.mark.parametrize("inside", ["", "base_layer."])
def test_what_changes_a_matrix_is_not_advised_to_be_ignored(inside: str, beside: tuple[str, ...]) -> None:
    arrays = {f"{inside}weight": np.ones((H, D)), f"{inside}bias": np.ones(H), **{name: np.ones((2, 2)) for name in beside}}
    with pytest.raises(pn.CheckpointError, match="make one array of these and the matrix beside first") as caught:
        pn.import_checkpoint(arrays, layer="Linear")
    assert "`ignore`" not in str(caught.value)
    with pytest.raises(pn.CheckpointError, match="what changes nothing that the layer computes goes into `ignore`"):
        pn.import_checkpoint({"weight": np.ones((H, D)), "bias": np.ones(H), "step": np.ones(())}, layer="Linear")
