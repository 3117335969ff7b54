"""Weights from elsewhere: every format against its published cell in float64, the libraries themselves, and files that do not fit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import portnorm as pn
from portnorm.checkpoint import safetensors
from tests import oracles
from tests.oracles import D, H, Published
from tests.oracles_libraries import LIBRARY_CELLS, THINC
from tests.tolerances import DIFFERENCES, LIBRARY_FLOAT32, ONNX_OPERATOR, PUBLISHED_FLOAT64

PUBLISHED = [*oracles.PUBLISHED, *LIBRARY_CELLS]
CASES = [
    pytest.param(case, training, id=f"{case.format}-{case.layer}-{k}-{'training' if training else 'inference'}")
    for k, case in enumerate(PUBLISHED)
    for training in (False, True)[: 1 + case.training]
]


def imported(case: Published, arrays: Any) -> Any:
    return pn.import_checkpoint(arrays, case.format, **case.config)


@pytest.mark.parametrize(("case", "training"), CASES)
def test_values_and_gradients_are_those_of_the_published_cell(case: Published, training: bool, rng: np.random.Generator) -> None:
    """Gradients against differences of the published cell, in a direction of its own parameters, which importing maps to one of ours."""
    p, x = case.arrays(rng), rng.standard_normal((5, 6, D))
    layer = imported(case, p)
    assert type(layer).__name__ == case.layer
    y, _, pullback = layer.vjp(x, training=training)
    np.testing.assert_allclose(y, case.oracle(p, x, training), rtol=PUBLISHED_FLOAT64, atol=PUBLISHED_FLOAT64)
    dy, step = rng.standard_normal(y.shape), 1e-6
    dx, _, grads = pullback(dy)
    for name in [n for n in p if not any(s in n for s in ("mean", "var"))]:
        direction = rng.standard_normal(p[name].shape)
        ends = [{**p, name: p[name] + sign * step * direction} for sign in (1, -1)]
        difference = sum(sign * np.sum(case.oracle(end, x, training) * dy) for sign, end in zip((1, -1), ends, strict=True)) / (2 * step)
        ours = [imported(case, {**p, name: p[name] + sign * step * direction}).parameters() for sign in (1, -1)]
        gradient = sum(np.sum(grads[n] * (ours[0][n] - ours[1][n]) / (2 * step)) for n in grads)
        np.testing.assert_allclose(gradient, difference, rtol=DIFFERENCES, atol=DIFFERENCES * max(1, abs(difference)))
    direction = rng.standard_normal(x.shape)
    ends = [np.sum(case.oracle(p, x + sign * step * direction, training) * dy) for sign in (1, -1)]
    np.testing.assert_allclose(np.sum(dx * direction), (ends[0] - ends[1]) / (2 * step), rtol=DIFFERENCES, atol=DIFFERENCES)


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: f"{case.format}-{case.layer}")
def test_out_again(case: Published, rng: np.random.Generator) -> None:
    """What a format stores comes back under its names, or, where it has two names for one layer, under those of the first."""
    p = case.arrays(rng)
    layer = imported(case, p)
    if case.config:
        with pytest.raises(pn.UnsupportedError, match=case.format):
            pn.to_format(layer, case.format)
        return
    again = pn.to_format(layer, case.format)
    if set(again) <= set(p):
        assert set(p) - set(again) <= ({"bias"} if "w_f_diag" in p else set())  # which is stored there and not used
        for name, array in again.items():
            read = slice(1) if name == "gamma" and "recurrent_scale" in p else slice(None)  # the other row enters nothing there
            np.testing.assert_array_equal(array[read], p[name][read])
    else:
        assert case.format in ("torch", "tensorflow") or "bn_a.gammas" in p
    for name, array in imported(case, again).state_dict().items():
        np.testing.assert_array_equal(array, layer.state_dict()[name])


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: f"{case.format}-{case.layer}")
def test_missing_unknown_and_misshapen_arrays_are_named(case: Published, rng: np.random.Generator) -> None:
    p = case.arrays(rng)
    unused = {"bias"} if "w_f_diag" in p else {"bn_b.betas"}
    for name in sorted(set(p) - unused - {n for n in p if n.endswith(tuple(f"_{t}" for t in range(5)))}):
        others = {n: a for n, a in p.items() if n != name}
        try:
            pn.import_checkpoint(others, case.format)
        except pn.CheckpointError as error:
            # What is left of a cell whose gates are modules of their own are layers too.
            apart = case.format in ("haiku", "madmom") and "more than one" in str(error)
            apart = apart or (name == "recurrent_scale" and "recurrent_kernel" in str(error))  # as near
            assert name in str(error) or apart  # noqa: PT017  # the exception is checked where there is one
        else:
            # A layer without it exists: without bias, without hidden weights, or plain.
            assert name.rpartition("/")[2] in ("bias", "b", "recurrent_kernel", "recurrent_weights", "gamma")
        for wrong in (p[name][..., None], np.ones((*p[name].shape[:-1], 0))):
            with pytest.raises(pn.CheckpointError, match=name.replace(".", r"\.")):
                pn.import_checkpoint({**p, name: wrong}, case.format)
    with pytest.raises(pn.CheckpointError, match="surplus"):
        pn.import_checkpoint({**p, "surplus": np.ones(3)}, case.format)


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: f"{case.format}-{case.layer}")
def test_imported_layers_become_graphs(case: Published, rng: np.random.Generator) -> None:
    """The way from other people's weights to an inference runtime."""
    report = pn.export(imported(case, {name: a.astype("float32") for name, a in case.arrays(rng).items()}), None)
    assert report.worst_step is not None


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: f"{case.format}-{case.layer}")
def test_imported_arrays_lie_as_those_of_a_new_layer(case: Published, rng: np.random.Generator) -> None:
    """Many formats store matrices transposed; a view of one would make products on NumPy up to twice as slow."""
    state = imported(case, case.arrays(rng)).state_dict()
    assert not [name for name, a in state.items() if not a.flags.c_contiguous]


# -- stacks, directions, prefixes, guesses -------------------------------------------------------------------------------------------------


def test_stacks_and_directions_of_torch_and_fastrnns(rng: np.random.Generator) -> None:
    layer = pn.LSTM(5, 4, num_layers=2, bidirectional=True, dtype="float64", rng=rng)
    x = rng.standard_normal((6, 3, 5))
    again = pn.import_checkpoint({f"encoder.rnn.{n}": a for n, a in layer.state_dict().items()}, "torch", prefix="encoder.rnn.")
    np.testing.assert_array_equal(again(x)[0], layer(x)[0])
    normed = pn.LSTM(5, 4, norm="fastrnns", num_layers=2, bidirectional=True, dtype="float64", rng=rng)
    arrays = pn.to_format(normed, "torch-fastrnns")
    assert "layers.1.directions.1.cell.layernorm_c.bias" in arrays
    np.testing.assert_array_equal(pn.import_checkpoint(arrays, "torch-fastrnns")(x)[0], normed(x)[0])
    with pytest.raises(pn.CheckpointError, match=r"layers\.1\.directions\.1\.cell\.weight_hh"):
        pn.import_checkpoint({n: a for n, a in arrays.items() if n != "layers.1.directions.1.cell.weight_hh"}, "torch-fastrnns")


@pytest.mark.parametrize("container", ["safetensors", "npz", "h5", "mapping"])
def test_containers(container: str, tmp_path: Path, rng: np.random.Generator) -> None:
    layer, path = pn.GRU(5, 4, norm="haste", rng=rng), tmp_path / f"w.{container}"
    arrays = {f"model/gru/{n}": a for n, a in pn.to_format(layer, "haste").items()}
    source: Any = path
    if container == "safetensors":
        safetensors.write(path, arrays, {})
    elif container == "npz":
        np.savez(path, **arrays)
    elif container == "h5":
        import h5py

        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array
    else:
        source = {"model": {"gru": pn.to_format(layer, "haste")}}
    again = pn.import_checkpoint(source, "auto")
    assert again.provenance.startswith("haste: GRU(norm='haste'), whose keys are ")
    assert again.dtype == np.float32
    for name, array in layer.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name], array)


def test_auto_says_what_it_took_and_refuses_to_guess(caplog: pytest.LogCaptureFixture, rng: np.random.Generator) -> None:
    for case in PUBLISHED:
        arrays = case.arrays(rng)
        several = case.layer == "LSTM" and list(arrays) == [
            "kernel",
            "recurrent_kernel",
            "bias",
        ]  # Keras or haste: the gates' order differs
        if several:
            with pytest.raises(pn.CheckpointError, match=f"fit more than one.*{case.format!r}"):
                pn.import_checkpoint(arrays)
        else:
            # torch, fastrnns and paddle store cells without norms alike.
            plain = ("torch", "torch-fastrnns", "paddle")
            found = pn.import_checkpoint(arrays, **case.config).provenance
            assert found.startswith(tuple(f"{name}: {case.layer}" for name in (plain if case.format in plain else (case.format,)))), found
    with caplog.at_level(logging.INFO, logger="portnorm"):
        pn.import_checkpoint(pn.to_format(pn.LSTM(3, 2, rng=0), "torch"))
    assert "torch: LSTM" in caplog.text
    with pytest.raises(pn.CheckpointError, match=r"fit more than one.*GroupNorm"):
        pn.import_checkpoint({"weight": np.ones(4), "bias": np.ones(4)}, "torch")
    groups = pn.import_checkpoint({"weight": np.ones(4), "bias": np.ones(4)}, "torch", layer="GroupNorm", num_groups=2)
    assert isinstance(groups, pn.GroupNorm)
    with pytest.raises(pn.UnsupportedError, match="num_groups"):
        pn.import_checkpoint({"weight": np.ones(4), "bias": np.ones(4)}, "torch", layer="GroupNorm")


def test_ignored_keys_are_as_in_a_new_layer(rng: np.random.Generator) -> None:
    """Cooijmans' scripts store no usable statistics and take them anew before evaluation."""
    case = next(case for case in PUBLISHED if case.format == "cooijmans")
    p = case.arrays(rng)
    statistics = [name for name in p if name.endswith(("_mean", "_var"))]
    layer: Any = pn.import_checkpoint({n: a for n, a in p.items() if n not in statistics}, "cooijmans", ignore=statistics, t_max=3)
    assert not layer.buffers["num_batches_tracked_l0"].any()
    layer.estimate_population([rng.standard_normal((3, 6, D))])
    assert layer.buffers["num_batches_tracked_l0"].all()
    with pytest.raises(pn.CheckpointError, match="`weight_hh` cannot be left out"):
        pn.import_checkpoint({n: a for n, a in p.items() if n != "Wa"}, "cooijmans", ignore=("Wa",))


def test_whole_numbers_are_weights_too() -> None:
    layer = pn.import_checkpoint({"weight": np.ones((2, 3), int), "bias": np.zeros(2, int)}, "torch")
    assert layer.dtype == np.float32


def test_a_file_of_several_layers_says_which_there_are(rng: np.random.Generator) -> None:
    file = {
        "encoder": pn.to_format(pn.LSTM(3, 4, rng=rng), "torch"),
        "decoder.rnn": pn.to_format(pn.GRU(3, 4, norm="haste", rng=rng), "haste"),
    }
    with pytest.raises(pn.CheckpointError, match=r"more than one layer.*prefix='decoder\.' \(haste GRU.*prefix='encoder/' \(torch LSTM\)"):
        pn.import_checkpoint(file)
    assert isinstance(pn.import_checkpoint(file, prefix="decoder."), pn.GRU)
    with pytest.raises(pn.CheckpointError, match="no key starts with 'other'"):
        pn.import_checkpoint(file, prefix="other")


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "pytorch_model.bin", "w.pkl", "w.ckpt"])
def test_pickles_are_refused_unread(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04N.")
    with pytest.raises(pn.CheckpointError, match="save_file"):
        pn.import_checkpoint(tmp_path / name)


@pytest.mark.parametrize("name", ["w.safetensors", "w.npz", "w.h5", "w.keras", "w.onnx", "w.txt"])
@pytest.mark.parametrize("content", [b"", b"\x93NUMPY garbage" * 9, None], ids=["empty", "garbage", "absent"])
def test_files_that_cannot_be_read(name: str, content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(pn.CheckpointError, match="w"):
        pn.import_checkpoint(tmp_path / name)


def test_no_pickles_inside_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", weight=np.array([{}], dtype=object))
    with pytest.raises(pn.CheckpointError, match="cannot be read"):
        pn.import_checkpoint(tmp_path / "w.npz", "torch", layer="RMSNorm")
    with pytest.raises(pn.CheckpointError, match="`a/b`"):
        pn.import_checkpoint({"a": {"b": "text"}})


@pytest.mark.parametrize("format_", ["mlx", "equinox", "flax"])
def test_two_biases_become_one_and_that_of_the_candidate(format_: str, rng: np.random.Generator) -> None:
    """Outside the reset gate only their sum counts."""
    layer, x = pn.GRU(D, H, dtype="float64", rng=rng), rng.standard_normal((5, 6, D))
    again: Any = pn.import_checkpoint(pn.to_format(layer, format_), format_)
    np.testing.assert_allclose(again(x)[0], layer(x)[0], rtol=PUBLISHED_FLOAT64)
    assert not again.params["bias_hh_l0"][: 2 * H].any()


def test_directions_that_share_their_weights(rng: np.random.Generator) -> None:
    """speechbrain stores them once; both are given, and two that differ cannot be written."""
    case = stored("speechbrain", "GRU", "running_mean")
    p, x = case.arrays(rng), rng.standard_normal((5, 6, D))
    layer: Any = pn.import_checkpoint(p, bidirectional=True)
    np.testing.assert_allclose(layer(x)[0][..., :H], case.oracle(p, x, False), rtol=PUBLISHED_FLOAT64)
    np.testing.assert_allclose(layer(x)[0][::-1, :, H:], case.oracle(p, x[::-1], False), rtol=PUBLISHED_FLOAT64)
    with pytest.raises(pn.UnsupportedError, match="speechbrain"):
        pn.to_format(layer, "speechbrain")


@pytest.mark.parametrize("by", ["all keys", "a prefix"])
@pytest.mark.parametrize("format_", ["torch", "keras", "flax", "torch-fastrnns", "paddle", "tensorflow", "madmom"])
def test_a_backward_direction_alone_is_no_forward_one(format_: str, by: str, rng: np.random.Generator) -> None:
    both = pn.LSTM(D, H, bidirectional=True, rng=0, norm=pn.Variant("one bias", biases=("bias",)) if format_ == "madmom" else None)
    stored = pn.to_format(both, format_)
    both.load_state_dict({name: 2 * a if name.endswith("_reverse") else a for name, a in both.state_dict().items()})
    backward = {f"net/{key}": a for key, a in pn.to_format(both, format_).items() if not np.array_equal(a, stored[key])}
    names = [key.rpartition("/")[0].split("/") for key in backward]
    shared = [name for name, *others in zip(*names, strict=False) if set(others) <= {name}]
    given: dict[str, Any] = {"prefix": f"{'/'.join(shared)}/"} if by == "a prefix" else {}
    with pytest.raises(pn.CheckpointError, match=r"the backward direction alone; pass direction='reverse'"):
        pn.import_checkpoint(backward, format_, layer="LSTM", **given)
    layer = pn.import_checkpoint(backward, format_, layer="LSTM", direction="reverse", **given)
    x = rng.standard_normal((6, 3, D)).astype("float32")
    np.testing.assert_allclose(layer(x)[0], both(x)[0][..., H:], **LIBRARY_FLOAT32)


def test_thinc_keeps_everything_in_one_vector(rng: np.random.Generator) -> None:
    p, x = {**THINC.arrays(rng), "HC0": np.zeros((2, 1, 1, H))}, rng.standard_normal((5, 6, D))
    layer = pn.import_checkpoint({f"encoder.{name}": a for name, a in p.items()})
    np.testing.assert_allclose(layer(x)[0], THINC.oracle(p, x, False), rtol=PUBLISHED_FLOAT64, atol=PUBLISHED_FLOAT64)
    again = pn.to_format(layer, "thinc")
    assert set(again) == set(p)
    for name, array in again.items():
        np.testing.assert_array_equal(array, p[name])
    with pytest.raises(pn.CheckpointError, match=r"`LSTM` has 175 numbers, and `HC0` the shape \(2, 1, 1, 4\)"):
        pn.import_checkpoint({**p, "LSTM": p["LSTM"][:-1]}, "thinc")
    with pytest.raises(pn.CheckpointError, match="LSTM"):
        pn.import_checkpoint({"LSTM": p["LSTM"]}, "thinc")
    with pytest.raises(pn.CheckpointError, match="surplus"):
        pn.import_checkpoint({**p, "surplus": np.ones(3)}, "thinc")


# -- names and places ----------------------------------------------------------------------------------------------------------------------


def in_places(case: Published, places: list[str], rng: np.random.Generator, inputs: int = D) -> dict[str, Any]:
    """A case's arrays once for each place; those of a kernel for [x, h] take the outputs of the place before."""
    return {f"{place}{name}": a for place in places for name, a in case.arrays(rng).items()}


def stored(format_: str, layer: str, part: str) -> Published:
    return next(
        case for case in LIBRARY_CELLS if case.format == format_ and case.layer == layer and any(part in name for name in case.shapes)
    )


SCOPES: dict[str, tuple[str, str, list[str], int]] = {
    "one cell": ("LSTM", "basic_lstm_cell/", ["rnn/"], 1),
    "numbers of outputs": ("LSTM", "basic_lstm_cell/", ["rnn/"], 1),
    "both directions": ("GRU", "gru_cell/", ["bidirectional_rnn/fw/", "bidirectional_rnn/bw/"], 2),
    "both directions of an RNN": ("RNN", "basic_rnn_cell/", ["net/bidirectional_rnn/fw/", "net/bidirectional_rnn/bw/"], 2),
}


@pytest.mark.parametrize("name", SCOPES)
@pytest.mark.parametrize("cut", ["", "all", "all but the cell"])
def test_scopes_of_tensorflow(cut: str, name: str, rng: np.random.Generator) -> None:
    """Whatever part of a scope's name is given as `prefix`, and with the number of the output behind."""
    layer, cell, places, directions = SCOPES[name]
    case, end = stored("tensorflow", layer, cell + ("gates/kernel" if layer == "GRU" else "kernel")), ":0" if "numbers" in name else ""
    arrays = {f"{key}{end}": a for key, a in in_places(case, places, rng).items()}
    if cut and directions == 2:
        places = [places[0].rpartition("fw/")[0]]
    prefix = {"": "", "all": f"{places[0]}{cell if directions == 1 else ''}", "all but the cell": places[0]}[cut]
    made: Any = pn.import_checkpoint(arrays, prefix=prefix)
    assert made.provenance.startswith(f"tensorflow: {layer}")
    assert made.num_directions == directions


@pytest.mark.parametrize("end", ["", ":0"])
@pytest.mark.parametrize("slots", [("Adam", "Adam_1"), ("Momentum",), ("ExponentialMovingAverage",)])
def test_what_an_optimizer_keeps_beside_a_variable_is_left_out_and_said(slots: tuple[str, ...], end: str, rng: np.random.Generator) -> None:
    arrays = pn.to_format(pn.LSTM(D, H, norm=pn.Variant("TF", biases=("bias",), runtime_forget_bias=1.0), rng=0), "tensorflow")
    stored = {f"rnn/{name}{end}": a for name, a in arrays.items()} | {"global_step": np.int64(3)}
    stored |= {f"rnn/{name}/{slot}{end}": np.zeros_like(a) for name, a in arrays.items() for slot in slots}
    with pytest.raises(pn.CheckpointError, match=r"prefix='rnn/' \(tensorflow LSTM\); beside 1 other arrays, such as 'global_step'"):
        pn.import_checkpoint(stored)
    layer = pn.import_checkpoint(stored, prefix="rnn/")
    x = rng.standard_normal((5, 3, D)).astype("float32")
    np.testing.assert_array_equal(layer(x)[0], pn.import_checkpoint(arrays, "tensorflow")(x)[0])
    assert f"no weights of their own, and left out: rnn/basic_lstm_cell/bias/{slots[0]}{end}, " in layer.provenance
    assert "runtime_forget_bias=1.0" in layer.provenance


def test_a_stack_of_tensorflow_is_one_layer(rng: np.random.Generator) -> None:
    for around, directions in (("cell_{}/", 1), ("cell_{}/bidirectional_rnn/{}/", 2)):
        arrays = {}
        for n in (0, 1):
            for d in ("fw", "bw")[:directions]:
                width = (D if n == 0 else directions * H) + H
                place = "rnn/multi_rnn_cell/" + around.format(n, d)
                arrays |= {f"{place}lstm_cell/kernel": rng.standard_normal((width, 4 * H)), f"{place}lstm_cell/bias": np.zeros(4 * H)}
        layer: Any = pn.import_checkpoint(arrays)
        assert (layer.num_layers, layer.num_directions) == (2, directions)
        assert layer.variant.runtime_forget_bias == 1.0


@pytest.mark.parametrize("cell", ["odd_lstm_cell", "my_gru_cell_1", "residual_rnn_cell"])
@pytest.mark.parametrize("format_", ["auto", "keras", "flax"])
@pytest.mark.parametrize("end", ["", ":0"])
def test_a_kernel_inside_a_cell_is_no_linear_layer(cell: str, format_: str, end: str, rng: np.random.Generator) -> None:
    arrays = {f"rnn/{cell}/kernel{end}": rng.standard_normal((D + H, 4 * H)), f"rnn/{cell}/bias{end}": np.zeros(4 * H)}
    for prefix in ("", "rnn/", f"rnn/{cell}/"):
        with pytest.raises(pn.CheckpointError, match="kernel"):
            pn.import_checkpoint(arrays, format_, prefix=prefix)


@pytest.mark.parametrize("layer", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("prefix", ["", "enc_", "encoder.rnn_", "encoder/"])
def test_short_names(prefix: str, layer: str, rng: np.random.Generator) -> None:
    """As g2p-en stores torch's GRU, with other arrays beside, or alone."""
    case = stored("torch", layer, "w_ih")
    p, x = case.arrays(rng), rng.standard_normal((4, 3, D))
    arrays = {f"{prefix}{name}": a for name, a in p.items()}
    for source, how in ((arrays, ""), ({**arrays, "fc_w": np.ones((3, H)), "dec_emb": np.ones((3, H))}, prefix)):
        if source is arrays or prefix:
            made: Any = pn.import_checkpoint(source, prefix=how)
            np.testing.assert_allclose(made(x)[0], case.oracle(p, x, False), rtol=PUBLISHED_FLOAT64)


@pytest.mark.parametrize(("layer", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("short", [False, True])
def test_the_nearest_layer_is_the_one_whose_shapes_fit(layer: str, gates: int, short: bool, rng: np.random.Generator) -> None:
    """Those of torch have the same names; an embedding lies beside."""
    names = ("w_ih", "w_hh", "b_ih", "b_hh") if short else ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    shapes = ((gates * 5, 3), (gates * 5, 5), (gates * 5,), (gates * 5,))
    arrays = {f"enc_{name}": rng.standard_normal(shape) for name, shape in zip(names, shapes, strict=True)}
    with pytest.raises(pn.CheckpointError, match=rf"do not fit 'torch' {layer}, the nearest: .*unknown \['enc_emb'\]"):
        pn.import_checkpoint({**arrays, "enc_emb": rng.standard_normal((7, 3))}, prefix="enc_")
    assert type(pn.import_checkpoint({**arrays, "enc_emb": 0.0}, prefix="enc_", ignore=["enc_emb"])).__name__ == layer


def test_haiku_does_not_tell_a_linear_module_from_an_lstm(rng: np.random.Generator) -> None:
    """`linear` is what a module of either calls its weights, where the LSTM has a name of its own."""
    arrays = {"core/linear/w": rng.standard_normal((D + H, 4 * H)), "core/linear/b": rng.standard_normal(4 * H)}
    with pytest.raises(pn.CheckpointError, match=r"fit more than one.*layer='(Linear|LSTM)'.*layer='(Linear|LSTM)'"):
        pn.import_checkpoint(arrays, "haiku")
    assert isinstance(pn.import_checkpoint(arrays, "haiku", layer="LSTM"), pn.LSTM)
    assert isinstance(pn.import_checkpoint(arrays, "haiku", layer="Linear"), pn.Linear)
    shapes = {"core/linear/w": np.ones((D, 3)), "core/linear/b": np.ones(3)}
    assert isinstance(pn.import_checkpoint(shapes, "haiku"), pn.Linear)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    ("format_", "layer", "bias"), [("gemma", "RMSNorm", False), ("xlstm", "LayerNorm", True), ("xlstm", "LayerNorm", False)]
)
def test_gains_that_are_stored_less_one(format_: str, layer: str, bias: bool, dtype: str, rng: np.random.Generator) -> None:
    """y = x̂ · (1 + weight) + bias; half precision has no place for 1 + weight, so γ is float32."""
    p = {"weight": (0.01 * rng.standard_normal(6)).astype(dtype)} | ({"bias": rng.standard_normal(6).astype(dtype)} if bias else {})
    made = pn.import_checkpoint(p, format_, layer=layer)
    assert made.dtype == np.result_type(dtype, "float32")
    x = rng.standard_normal((3, 6))
    center = x - x.mean(-1, keepdims=True) if layer == "LayerNorm" else x
    eps = float(np.float32(1e-5 if layer == "LayerNorm" else 1e-6))
    exact = center / np.sqrt((center * center).mean(-1, keepdims=True) + eps) * (1 + p["weight"].astype(float)) + p.get("bias", 0.0)
    tolerance = LIBRARY_FLOAT32 if made.dtype == np.float32 else {"rtol": PUBLISHED_FLOAT64, "atol": PUBLISHED_FLOAT64}
    np.testing.assert_allclose(made(x.astype(made.dtype)), exact, **tolerance)
    again = pn.to_format(made, format_)
    assert set(again) == set(p)
    np.testing.assert_allclose(again["weight"], p["weight"], atol=1e-7)


def test_a_bias_that_rms_norm_has_no_place_for_is_named() -> None:
    arrays = {"weight": np.full(4, 2.0), "bias": np.ones(4)}
    with pytest.raises(pn.CheckpointError, match=r"'bias' is not 0, and a RMSNorm here has no such array; pass ignore=\('bias',\)"):
        pn.import_checkpoint(arrays, "equinox", layer="RMSNorm")
    for some in (arrays | {"bias": np.zeros(4)}, {"weight": arrays["weight"]}):
        np.testing.assert_array_equal(pn.import_checkpoint(some, "equinox", layer="RMSNorm").params["weight"], arrays["weight"])
    left = pn.import_checkpoint(arrays, "equinox", layer="RMSNorm", ignore=("bias",))
    assert "left out, as `ignore` says: bias" in left.provenance


LEARNED: dict[str, tuple[str, dict[str, Any], Any]] = {
    "cooijmans": ("LSTM", {"h0": H, "c0": H}, {}),
    "madmom LSTM": ("LSTM", {"init": H, "cell_init": H}, {"h0": "init", "c0": "cell_init"}),
    "madmom GRU": ("GRU", {"hid_init": H}, {"h0": "hid_init"}),
    "madmom RNN": ("RNN", {"init": H}, {"h0": "init"}),
}


@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_first_state_is_where_sequences_start(name: str, rng: np.random.Generator) -> None:
    """All zeros are as if they were not there; anything else becomes parameters, in the values, the gradients and the file again."""
    kind, shapes, keys = LEARNED[name]
    case = next(case for case in PUBLISHED if case.format == name.split()[0] and case.layer == kind)
    p, x = case.arrays(rng), rng.standard_normal((2, 6, D))
    assert "h0_l0" not in imported(case, {**p, **{key: np.zeros(size) for key, size in shapes.items()}}).params
    first = {key: rng.standard_normal(size) for key, size in shapes.items()}
    layer, plain = imported(case, {**p, **first}), imported(case, p)
    state = tuple(np.broadcast_to(first[keys.get(s, s)], (1, 6, H)) for s in ("h0", "c0")[: len(first)])
    expected = plain(x, (*state, np.asarray(0)) if plain.timed else state)[0]
    np.testing.assert_allclose(layer(x)[0], expected, rtol=PUBLISHED_FLOAT64)
    assert not np.allclose(plain(x)[0], expected)
    again = pn.to_format(layer, case.format)
    for key, array in first.items():
        np.testing.assert_array_equal(again[key], array)
    without = pn.import_checkpoint({**p, **first}, case.format, ignore=tuple(first))
    np.testing.assert_array_equal(without(x)[0], plain(x)[0])


# -- the libraries themselves --------------------------------------------------------------------------------------------------------------


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "weight_norm", "legacy weight_norm", "no bias", "projection"])
def test_torch_recurrent(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    import torch
    from torch.nn.utils.parametrizations import weight_norm

    torch.manual_seed(0)
    sizes: Any = {"num_layers": 2, "bidirectional": True, "dtype": torch.float64}
    sizes |= {"proj_size": 2} if kind == "projection" else {}
    theirs: Any = getattr(torch.nn, kind if kind in ("LSTM", "GRU", "RNN") else "LSTM")(5, 4, bias=kind != "no bias", **sizes)
    if kind == "weight_norm":
        for name in [n for n, _ in theirs.named_parameters() if n.startswith("weight")]:
            weight_norm(theirs, name)
    arrays = {name: a.detach().numpy() for name, a in theirs.state_dict().items()}
    if kind == "legacy weight_norm":  # as torch.nn.utils.weight_norm stored it
        arrays = {
            f"{n}{s}": part
            for n, a in arrays.items()
            for s, part in ((("_g", np.linalg.norm(a, axis=1, keepdims=True)), ("_v", 3.0 * a)) if n.startswith("weight") else (("", a),))
        }
    np.savez(tmp_path / "w.npz", **arrays)
    layer, x = pn.import_checkpoint(tmp_path / "w.npz", "torch"), rng.standard_normal((6, 3, 5))
    np.testing.assert_allclose(layer(x)[0], theirs(torch.asarray(x))[0].detach(), rtol=PUBLISHED_FLOAT64, atol=PUBLISHED_FLOAT64)
    if "weight_norm" not in kind:
        theirs.load_state_dict({name: torch.asarray(a) for name, a in pn.to_format(layer, "torch").items()})


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["BatchNorm1d", "LayerNorm", "GroupNorm", "InstanceNorm1d", "RMSNorm", "Linear"])
def test_torch_norms(kind: str, rng: np.random.Generator) -> None:
    import torch

    options: Any = {"GroupNorm": (2, 6), "InstanceNorm1d": (6,), "Linear": (6, 3)}.get(kind, (6,))
    extra: Any = {"affine": True} if kind == "InstanceNorm1d" else {}
    theirs = getattr(torch.nn, kind)(*options, **extra, dtype=torch.float64)
    for p in theirs.parameters():
        p.data = torch.asarray(rng.standard_normal(p.shape))
    x = torch.asarray(rng.standard_normal((4, 6) if kind not in ("GroupNorm", "InstanceNorm1d") else (4, 6, 5)))
    if kind == "BatchNorm1d":
        theirs(x * 3.0)
    layer = pn.import_checkpoint(
        dict(theirs.state_dict()), "torch", layer=kind.removesuffix("1d"), **({"num_groups": 2} if kind == "GroupNorm" else {})
    )
    # Without eps torch takes that of the dtype; imported is that of float32, torch's default dtype.
    tolerance = 1e-6 if kind == "RMSNorm" else PUBLISHED_FLOAT64
    np.testing.assert_allclose(layer(x.numpy()), theirs.eval()(x).detach(), rtol=tolerance, atol=tolerance)
    assert set(pn.to_format(layer, "torch")) == set(theirs.state_dict())


KERAS = {
    "LSTM": lambda k: k.layers.LSTM(4, return_sequences=True),
    "LSTM without bias": lambda k: k.layers.LSTM(4, return_sequences=True, use_bias=False),
    "GRU": lambda k: k.layers.GRU(4, return_sequences=True),
    "GRU, reset before": lambda k: k.layers.GRU(4, return_sequences=True, reset_after=False),
    "SimpleRNN": lambda k: k.layers.SimpleRNN(4, return_sequences=True),
    "Bidirectional": lambda k: k.layers.Bidirectional(k.layers.GRU(4, return_sequences=True)),
    "BatchNormalization": lambda k: k.layers.BatchNormalization(),
    "LayerNormalization": lambda k: k.layers.LayerNormalization(),
    "GroupNormalization": lambda k: k.layers.GroupNormalization(5),
    "RMSNormalization": lambda k: k.layers.RMSNormalization(),
    "Dense": lambda k: k.layers.Dense(3),
}


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras' own variables
@pytest.mark.parametrize("container", [".weights.h5", ".keras", "paths"])
@pytest.mark.parametrize("kind", KERAS)
def test_keras(kind: str, container: str, tmp_path: Path, rng: np.random.Generator) -> None:
    import keras

    theirs = keras.Sequential([keras.Input((None, D), dtype="float32"), KERAS[kind](keras)])
    for weight in theirs.weights:
        weight.assign(rng.uniform(0.2, 1.0, weight.shape) * (1 if "var" in weight.path or "gamma" in weight.path else rng.choice([-1, 1])))
    source: Any = tmp_path / f"m{container}"
    if container == "paths":
        source = {weight.path: weight.numpy() for weight in theirs.weights}
    elif container == ".keras":
        theirs.save(source)
    else:
        theirs.save_weights(source)
    which = {"GroupNormalization": {"layer": "GroupNorm", "num_groups": 5}, "LayerNormalization": {"layer": "LayerNorm"}}.get(kind, {})
    layer: Any = pn.import_checkpoint(source, "keras", **which)
    x = rng.standard_normal((3, 6, D)).astype("float32")
    in_file = container == ".keras"  # only the configuration says that the batch comes first
    y = layer(x if in_file else x.transpose(1, 0, 2))[0] if layer.recurrent else layer(x)
    y = y.transpose(1, 0, 2) if layer.recurrent and not in_file else y
    np.testing.assert_allclose(y, np.asarray(theirs(x)), **LIBRARY_FLOAT32)
    for weight, array in zip(theirs.weights, pn.to_format(layer, "keras").values(), strict=True):
        np.testing.assert_array_equal(array, weight.numpy())


@pytest.mark.peers
@pytest.mark.parametrize(
    "kind", ["LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell", "LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm"]
)
@pytest.mark.parametrize("interface", ["linen", "nnx"])
def test_flax(interface: str, kind: str, rng: np.random.Generator) -> None:
    import jax
    from flax import linen, nnx

    x = rng.standard_normal((3, 6, D)).astype("float32")
    cell = kind.endswith("Cell")
    extra: Any = {"GroupNorm": {"num_groups": 5}, "BatchNorm": {"use_running_average": True}}.get(kind, {})

    def drawn(tree: Any) -> Any:
        return jax.tree.map(lambda a: rng.uniform(0.2, 1.0, a.shape).astype("float32"), tree)

    if interface == "linen":
        made = getattr(linen, kind)(H) if cell else getattr(linen, kind)(**extra)
        module = linen.RNN(made) if cell else made
        arrays = drawn(module.init(jax.random.key(0), x))
        expected = module.apply(arrays, x)
    else:
        sizes: Any = (D, H) if cell else (D,)
        made = getattr(nnx, kind)(*sizes, **extra, rngs=nnx.Rngs(0))
        graph, params, rest = nnx.split(made, (nnx.Param, nnx.BatchStat), ...)
        arrays = drawn(nnx.to_pure_dict(params))
        nnx.replace_by_pure_dict(params, arrays)
        made = nnx.merge(graph, params, rest)
        expected = nnx.RNN(made)(x) if cell else made(x)
    which: Any = {"layer": kind, **({"num_groups": 5} if kind == "GroupNorm" else {})} if not cell else {}
    layer: Any = pn.import_checkpoint(arrays, "flax", **which)
    y = layer(x.transpose(1, 0, 2))[0].transpose(1, 0, 2) if layer.recurrent else layer(x)
    np.testing.assert_allclose(y, np.asarray(expected), **LIBRARY_FLOAT32)


# -- ONNX ----------------------------------------------------------------------------------------------------------------------------------


def onnx_model(operator: str, arrays: dict[str, Any], inputs: tuple[str, ...], **attributes: Any) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    initializers = [numpy_helper.from_array(a, n) for n, a in arrays.items()]
    names = [n if n in (*arrays, "x") else "" for n in inputs]
    node = helper.make_node(operator, names, ["y"], name="a_node", **attributes)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None] * 3)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "g", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def run_onnx(model: Any, x: Any) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize(
    "kind",
    ["LSTM", "LSTM with peepholes", "LSTM without bias", "LSTM with peepholes, without bias", "GRU", "GRU, linear before reset", "RNN"],
)
def test_onnx_recurrent(kind: str, directions: int, tmp_path: Path, rng: np.random.Generator) -> None:
    import onnx

    operator = kind[:4].strip(",") if kind.startswith("LSTM") else kind[:3]
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[operator]
    shapes = {"W": (gates * H, D), "R": (gates * H, H), "B": (2 * gates * H,), "P": (3 * H,)}
    left = {"P"} if "peepholes" not in kind else set()
    left |= {"B"} if "without" in kind else set()
    arrays = {n: rng.standard_normal((directions, *s)).astype("float32") * 0.5 for n, s in shapes.items() if n not in left}
    attributes: Any = {"linear_before_reset": 1} if "linear" in kind else {}
    attributes["direction"] = "bidirectional" if directions == 2 else "forward"
    model = onnx_model(
        operator, arrays, ("x", "W", "R", "B", "", "", "", "P")[: 8 if operator == "LSTM" else 4], hidden_size=H, **attributes
    )
    onnx.save(model, tmp_path / "m.onnx")
    x = rng.standard_normal((6, 3, D)).astype("float32")
    layer: Any = pn.import_checkpoint(tmp_path / "m.onnx", "onnx")
    expected = run_onnx(model, x)  # (time, directions, batch, hidden)
    y = layer(x)[0].reshape(6, 3, directions, H).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(y, expected, rtol=ONNX_OPERATOR, atol=ONNX_OPERATOR)


@pytest.mark.parametrize("kind", [f"{name}Normalization" for name in ("Layer", "RMS", "Instance", "Batch", "Group")])
def test_onnx_norms(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    import onnx

    names = {"RMSNormalization": ("scale",), "BatchNormalization": ("scale", "bias", "mean", "var")}.get(kind, ("scale", "bias"))
    arrays = {n: rng.uniform(0.5, 1.5, 6).astype("float32") for n in names}
    attributes: Any = {"epsilon": 0.25} | ({"num_groups": 3} if kind == "GroupNormalization" else {})
    model = onnx_model(kind, arrays, ("x", *names), **attributes)
    onnx.save(model, tmp_path / "m.onnx")
    x = rng.standard_normal((2, 6, 6)).astype("float32")
    layer: Any = pn.import_checkpoint(tmp_path / "m.onnx")
    np.testing.assert_allclose(layer(x), run_onnx(model, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("attribute", "value"), [("activations", ["Sigmoid", "Softsign", "Tanh"]), ("clip", 1.0), ("input_forget", 1)])
def test_onnx_attributes_that_portnorm_has_not_are_named(attribute: str, value: Any, tmp_path: Path) -> None:
    import onnx

    arrays = {"W": np.ones((1, 4 * H, D), "float32"), "R": np.ones((1, 4 * H, H), "float32")}
    onnx.save(onnx_model("LSTM", arrays, ("x", "W", "R"), hidden_size=H, **{attribute: value}), tmp_path / "m.onnx")
    with pytest.raises(pn.CheckpointError, match=f"a_node.*{attribute}"):
        pn.import_checkpoint(tmp_path / "m.onnx")


KEYS = sorted(
    {name for case in PUBLISHED for name in case.shapes} | {"weight", "running_mean", "running_var", "scale", "num_batches_tracked"}
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.dictionaries(st.sampled_from(KEYS), st.lists(st.integers(1, 9), max_size=3), min_size=1, max_size=9),
    st.sampled_from(("auto", *pn.FORMATS)),
    st.sampled_from([None, *range(len(PUBLISHED))]),
    st.booleans(),
)
def test_any_arrays_give_a_layer_that_runs_or_an_error_of_the_family(
    shapes: dict[str, list[int]], format_: str, base: int | None, complete: bool
) -> None:
    """Wrong shapes, missing and foreign keys, in any mixture; what is accepted computes finite numbers."""
    rng = np.random.default_rng(0)
    arrays: Any = {name: np.ones(shape) for name, shape in shapes.items()}
    if base is not None:
        whole = PUBLISHED[base].arrays(rng)
        arrays = whole if complete else {**whole, **{name: a for name, a in arrays.items() if name in whole}}
        format_ = PUBLISHED[base].format if complete else format_
    try:
        layer: Any = pn.import_checkpoint(arrays, format_)
    except pn.PortnormError:
        return
    if layer.recurrent:
        assert np.isfinite(layer(np.ones((2, 3, layer.input_size), dtype=layer.dtype))[0]).all()
