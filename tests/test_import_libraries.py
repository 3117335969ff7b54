"""Layers that other libraries made, imported and compared with the library's own forward pass; in float64 where the library has it."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from tests.oracles import D, H
from tests.tolerances import LIBRARY_FLOAT32, PUBLISHED_FLOAT64, TORCH_FLOAT64

pytestmark = pytest.mark.peers

Made = tuple[Any, Callable[[Any], Any]]
"""What a library stores, and its forward pass over (time, batch, features)."""

FLOAT64 = {"rtol": PUBLISHED_FLOAT64, "atol": PUBLISHED_FLOAT64}


def drawn(tree: Any, rng: np.random.Generator, dtype: str = "float64") -> Any:
    """A nested mapping of random arrays of the same shapes; variances are positive."""
    if isinstance(tree, dict):
        return {name: drawn(part, rng, dtype) for name, part in tree.items()}
    return (rng.uniform(0.2, 1.0, np.shape(tree)) * rng.choice([-1, 1], np.shape(tree))).astype(dtype)


def compared(arrays: Any, forward: Callable[[Any], Any], x: Any, tolerance: dict[str, float], format_: str, **config: Any) -> Any:
    """The layer, whose values are those of the library."""
    layer: Any = pn.import_checkpoint(arrays, format_, **config)
    y = layer(x)[0] if layer.recurrent else layer(x)
    np.testing.assert_allclose(y, forward(x), **tolerance)
    return layer


def is_written_alike(layer: Any, format_: str, arrays: Any) -> None:
    """What `to_format` makes of the layer is what the library stores."""
    again = pn.to_format(layer, format_)
    assert set(again) == set(arrays)
    for name, array in again.items():
        np.testing.assert_array_equal(array, np.asarray(arrays[name]))


# -- torch, Keras --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_torch_cells(kind: str, bias: bool, rng: np.random.Generator) -> None:
    import torch

    theirs: Any = getattr(torch.nn, f"{kind}Cell")(D, H, bias=bias, dtype=torch.float64)

    def forward(x: Any) -> Any:
        state, ys = None, []
        for step in torch.asarray(x):
            state = theirs(step, state)
            ys.append(state[0] if kind == "LSTM" else state)
        return torch.stack(ys).detach().numpy()

    for prefix in ("", "decoder.cell."):
        arrays = {f"{prefix}{name}": a.detach().numpy() for name, a in theirs.state_dict().items()}
        layer = compared(arrays, forward, rng.standard_normal((6, 3, D)), FLOAT64, "torch", prefix=prefix)
        assert type(layer).__name__ == kind


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "weight_hh_l1"])
@pytest.mark.parametrize("dim", [0, 1, None])
def test_torch_weight_norm_of_one_matrix(name: str, dim: int | None, rng: np.random.Generator) -> None:
    import torch
    from torch.nn.utils.parametrizations import weight_norm

    two = name.endswith("l1")
    theirs = torch.nn.GRU(D, H, num_layers=1 + two, dtype=torch.float64)
    for normed in ("weight_hh_l0", "weight_hh_l1") if two else (name,):
        weight_norm(theirs, normed, dim=dim)
    for p in theirs.parameters():
        p.data = torch.asarray(rng.standard_normal(p.shape))
    arrays = {key: a.detach().numpy() for key, a in theirs.state_dict().items()}
    compared(arrays, lambda x: theirs(torch.asarray(x))[0].detach().numpy(), rng.standard_normal((6, 3, D)), FLOAT64, "torch")


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("normed", ["ih", "hh", "hr", "ih hh", "ih hh hr"])
@pytest.mark.parametrize("where", ["_l0", "_l0_reverse", "_l1", "everywhere"])
def test_torch_weight_norm_of_some_matrices(where: str, normed: str, dim: int | None, rng: np.random.Generator) -> None:
    """In one layer and direction or in all, with a projection where that is normalized."""
    import torch
    from torch.nn.utils.parametrizations import weight_norm

    projection = 2 if "hr" in normed or dim == 0 else 0
    theirs = torch.nn.LSTM(D, H, num_layers=2, bidirectional=True, proj_size=projection, dtype=torch.float64)
    for place in ("_l0", "_l0_reverse", "_l1", "_l1_reverse") if where == "everywhere" else (where,):
        for side in normed.split():
            weight_norm(theirs, f"weight_{side}{place}", dim=dim)
    for p in theirs.parameters():
        p.data = torch.asarray(rng.standard_normal(p.shape))
    arrays = {key: a.detach().numpy() for key, a in theirs.state_dict().items()}
    compared(arrays, lambda x: theirs(torch.asarray(x))[0].detach().numpy(), rng.standard_normal((6, 3, D)), FLOAT64, "torch")


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("bias", [True, False])
def test_torch_linear_with_weight_norm(bias: bool, dim: int | None, rng: np.random.Generator) -> None:
    import torch
    from torch.nn.utils.parametrizations import weight_norm

    theirs = weight_norm(torch.nn.Linear(D, H, bias=bias, dtype=torch.float64), dim=dim)
    arrays = {key: a.detach().numpy() for key, a in theirs.state_dict().items()}
    compared(arrays, lambda x: theirs(torch.asarray(x)).detach().numpy(), rng.standard_normal((6, D)), FLOAT64, "torch")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras' own variables
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("container", [".weights.h5", "paths"])
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "SimpleRNNCell", "GRU", "Bidirectional"])
def test_keras_cells(kind: str, container: str, bias: bool, tmp_path: Path, rng: np.random.Generator) -> None:
    import keras

    if kind.endswith("Cell"):
        made = keras.layers.RNN(getattr(keras.layers, kind)(H, use_bias=bias), return_sequences=True)
    else:
        made = keras.layers.GRU(H, return_sequences=True, use_bias=bias)
    made = keras.layers.Bidirectional(made) if kind == "Bidirectional" else made
    theirs = keras.Sequential([keras.Input((None, D), dtype="float32"), made])
    for weight in theirs.weights:
        weight.assign(rng.uniform(-1.0, 1.0, weight.shape))
    source: Any = tmp_path / f"m{container}"
    if container == "paths":
        source = {weight.path: weight.numpy() for weight in theirs.weights}
    else:
        theirs.save_weights(source)
    x = rng.standard_normal((6, 3, D)).astype("float32")
    layer = compared(source, lambda x: np.asarray(theirs(x.transpose(1, 0, 2))).transpose(1, 0, 2), x, LIBRARY_FLOAT32, "keras")
    for weight, array in zip(theirs.weights, pn.to_format(layer, "keras").values(), strict=True):
        np.testing.assert_array_equal(array, weight.numpy())


def test_keras_gru_without_bias_whose_reset_gate_comes_before(rng: np.random.Generator) -> None:
    """The arrays do not say so; the caller does."""
    import keras

    theirs = keras.layers.GRU(H, return_sequences=True, use_bias=False, reset_after=False)
    theirs.build((None, None, D))
    arrays = {
        "kernel": rng.standard_normal((D, 3 * H)).astype("float32"),
        "recurrent_kernel": rng.standard_normal((H, 3 * H)).astype("float32"),
    }
    theirs.set_weights(list(arrays.values()))
    x = rng.standard_normal((6, 3, D)).astype("float32")
    compared(
        arrays,
        lambda x: np.asarray(theirs(x.transpose(1, 0, 2))).transpose(1, 0, 2),
        x,
        LIBRARY_FLOAT32,
        "keras",
        layer="GRU",
        reset="before",
    )


# -- MLX -----------------------------------------------------------------------------------------------------------------------------------


MLX = {
    "LSTM": lambda nn: nn.LSTM(D, H),
    "LSTM without bias": lambda nn: nn.LSTM(D, H, bias=False),
    "GRU": lambda nn: nn.GRU(D, H),
    "GRU without bias": lambda nn: nn.GRU(D, H, bias=False),
    "RNN": lambda nn: nn.RNN(D, H),
    "RNN without bias": lambda nn: nn.RNN(D, H, bias=False),
    "LayerNorm": lambda nn: nn.LayerNorm(D),
    "LayerNorm without bias": lambda nn: nn.LayerNorm(D, bias=False),
    "RMSNorm": lambda nn: nn.RMSNorm(D),
    "BatchNorm": lambda nn: nn.BatchNorm(D),
    "Linear": lambda nn: nn.Linear(D, H),
}


@pytest.mark.parametrize("container", ["mapping", "safetensors"])
@pytest.mark.parametrize("kind", MLX)
def test_mlx(kind: str, container: str, tmp_path: Path, rng: np.random.Generator) -> None:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    theirs: Any = MLX[kind](nn)
    arrays = {name: np.asarray(a) for name, a in tree_flatten(theirs.parameters())}
    arrays = {name: np.abs(a) if "var" in name else a for name, a in drawn(arrays, rng, "float32").items()}
    theirs.load_weights([(name, mx.array(a)) for name, a in arrays.items()])
    theirs.eval()

    def forward(x: Any) -> Any:
        y = theirs(mx.array(x.transpose(1, 0, 2)))
        return np.asarray(y[0] if isinstance(y, tuple) else y).transpose(1, 0, 2)

    source: Any = {**arrays}
    if container == "safetensors":
        source = tmp_path / "w.safetensors"
        mx.save_safetensors(str(source), dict(tree_flatten(theirs.parameters())), {"format": "mlx"})
    which: Any = {"layer": kind.split()[0]} if "Norm" in kind else {}
    layer = compared(source, forward, rng.standard_normal((6, 3, D)).astype("float32"), LIBRARY_FLOAT32, "mlx", **which)
    is_written_alike(layer, "mlx", arrays)


def test_mlx_arrays_of_bfloat16(rng: np.random.Generator) -> None:
    nn, mx = pytest.importorskip("mlx.nn"), pytest.importorskip("mlx.core")
    halves = {name: a.astype(mx.bfloat16) for name, a in nn.LSTM(D, H).parameters().items()}
    layer = pn.import_checkpoint(halves)
    np.testing.assert_array_equal(layer.params["weight_ih_l0"], np.array(halves["Wx"].astype(mx.float32)))


def test_mlx_puts_other_channels_into_groups() -> None:
    """Channel c belongs to group c mod groups by default, and no file says whether it was made so."""
    with pytest.raises(pn.UnsupportedError, match="`layer` is 'GroupNorm', which format 'mlx' has not"):
        pn.import_checkpoint({"weight": np.ones(4), "bias": np.ones(4)}, "mlx", layer="GroupNorm", num_groups=2)


# -- equinox, haiku, flax ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_equinox_cells(kind: str, bias: bool, rng: np.random.Generator) -> None:
    import equinox
    import jax

    theirs = getattr(equinox.nn, f"{kind}Cell")(D, H, use_bias=bias, key=jax.random.key(0))
    arrays = {name: np.asarray(getattr(theirs, name)) for name in ("weight_ih", "weight_hh", "bias", "bias_n") if hasattr(theirs, name)}
    arrays = {name: a for name, a in arrays.items() if a.dtype != object}

    def forward(x: Any) -> Any:
        def step(state: Any, x: Any) -> Any:
            state = jax.vmap(theirs)(x, state)
            return state, state[0] if kind == "LSTM" else state

        zeros = jax.numpy.zeros((x.shape[1], H))
        return jax.lax.scan(step, (zeros, zeros) if kind == "LSTM" else zeros, x)[1]

    layer = compared(arrays, forward, rng.standard_normal((6, 3, D)), FLOAT64, "equinox")
    is_written_alike(layer, "equinox", arrays)


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm", "Linear"])
def test_equinox_layers(kind: str, rng: np.random.Generator) -> None:
    import equinox
    import jax

    options: Any = {"RMSNorm": {"use_bias": False}, "Linear": {"out_features": H, "key": jax.random.key(0)}}.get(kind, {})
    theirs = getattr(equinox.nn, kind)(D, **options)
    arrays = drawn({name: np.asarray(getattr(theirs, name)) for name in ("weight", "bias") if getattr(theirs, name) is not None}, rng)
    theirs = equinox.tree_at(lambda m: [getattr(m, name) for name in arrays], theirs, [jax.numpy.asarray(a) for a in arrays.values()])
    layer = compared(arrays, jax.vmap(theirs), rng.standard_normal((4, D)), FLOAT64, "equinox", layer=kind)
    is_written_alike(layer, "equinox", arrays)


HAIKU = {
    "LSTM": lambda hk: hk.LSTM(H),
    "LSTM of another name": lambda hk: hk.LSTM(H, name="encoder_lstm"),
    "GRU": lambda hk: hk.GRU(H),
    "VanillaRNN": lambda hk: hk.VanillaRNN(H),
    "VanillaRNN with one bias": lambda hk: hk.VanillaRNN(H, double_bias=False),
    "Linear": lambda hk: hk.Linear(H),
    "LayerNorm": lambda hk: hk.LayerNorm(-1, create_scale=True, create_offset=True),
    "LayerNorm, gain alone": lambda hk: hk.LayerNorm(-1, create_scale=True, create_offset=False),
    "LayerNorm, shift alone": lambda hk: hk.LayerNorm(-1, create_scale=False, create_offset=True),
    "GroupNorm, shift alone": lambda hk: hk.GroupNorm(D, create_scale=False),
    "InstanceNorm, gain alone": lambda hk: hk.InstanceNorm(create_scale=True, create_offset=False),
    "RMSNorm": lambda hk: hk.RMSNorm(-1),
    "BatchNorm": lambda hk: hk.BatchNorm(True, True, 0.9),
    "BatchNorm, shift alone": lambda hk: hk.BatchNorm(False, True, 0.9),
    "BatchNorm, neither": lambda hk: hk.BatchNorm(False, False, 0.9),
}


@pytest.mark.parametrize("inside", [True, False], ids=["inside a module", "alone"])
@pytest.mark.parametrize("kind", HAIKU)
def test_haiku(kind: str, inside: bool, rng: np.random.Generator) -> None:
    import haiku as hk

    ours = kind.partition(",")[0]
    recurrent = not ours.endswith(("Linear", "Norm"))

    def run(x: Any, training: bool) -> Any:
        made: Any = HAIKU[kind](hk)
        if ours == "BatchNorm":
            return made(x, is_training=training)
        return hk.dynamic_unroll(made, x, made.initial_state(x.shape[1]))[0] if recurrent else made(x)

    class Net(hk.Module):  # type: ignore[misc]
        def __call__(self, x: Any, training: bool) -> Any:
            return run(x, training)

    theirs = hk.transform_with_state((lambda x, training: Net()(x, training)) if inside else run)
    x = rng.standard_normal((6, 3, D))
    parameters, state = theirs.init(0, x, True)
    _, state = theirs.apply(parameters, state, None, x, True)
    parameters = drawn({name: dict(part) for name, part in parameters.items()}, rng)
    arrays = {**parameters, **state}
    which: Any = {"layer": ours} if not recurrent else {}
    which |= {"num_groups": D} if ours == "GroupNorm" else {}
    layer = compared(arrays, lambda x: theirs.apply(parameters, state, None, x, False)[0], x, FLOAT64, "haiku", **which)
    if ours == "BatchNorm":
        return  # which is read and not written: its arrays have an axis for each of x
    again = pn.to_format(layer, "haiku")
    if recurrent:
        np.testing.assert_array_equal(pn.import_checkpoint(again, "haiku")(x)[0], layer(x)[0])


@pytest.mark.parametrize("kind", ["LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell"])
@pytest.mark.parametrize("interface", ["linen", "nnx", "nnx.state", "orbax"])
def test_flax_bidirectional(interface: str, kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """Both directions are one layer; of nnx with the state of random numbers beside, and as orbax gives it back."""
    import jax
    from flax import linen, nnx

    x = rng.standard_normal((3, 6, D)).astype("float32")
    if interface == "linen":
        module = linen.Bidirectional(*(linen.RNN(getattr(linen, kind)(H)) for _ in range(2)))
        arrays: Any = jax.tree.map(lambda a: rng.uniform(0.2, 1.0, a.shape).astype("float32"), module.init(jax.random.key(0), x))
        expected = module.apply(arrays, x)
    else:
        theirs = nnx.Bidirectional(*(nnx.RNN(getattr(nnx, kind)(D, H, rngs=nnx.Rngs(k))) for k in range(2)), rngs=nnx.Rngs(2))
        arrays, expected = nnx.state(theirs), theirs(x)
        if interface == "nnx":
            arrays = nnx.to_pure_dict(nnx.state(theirs, nnx.Param))
        if interface == "orbax":
            import orbax.checkpoint

            with orbax.checkpoint.StandardCheckpointer() as checkpointer:
                checkpointer.save(tmp_path / "c", arrays)
                checkpointer.wait_until_finished()
                arrays = checkpointer.restore(tmp_path / "c")
    forward = lambda _: np.asarray(expected).transpose(1, 0, 2)  # noqa: E731
    layer = compared(arrays, forward, x.transpose(1, 0, 2), LIBRARY_FLOAT32, "flax")
    assert layer.num_directions == 2


def test_flax_dense_without_bias(rng: np.random.Generator) -> None:
    from flax import linen

    arrays = {"params": {"kernel": rng.standard_normal((D, H)).astype("float32")}}
    compared(arrays, lambda x: linen.Dense(H, use_bias=False).apply(arrays, x), np.ones((2, D), "float32"), LIBRARY_FLOAT32, "flax")


@pytest.mark.parametrize("interface", ["linen", "nnx"])
@pytest.mark.parametrize("wrapper", ["WeightNorm", "SpectralNorm"])
def test_kernels_that_flax_normalizes_are_named(wrapper: str, interface: str, rng: np.random.Generator) -> None:
    """What is stored is another kernel than the one that is used."""
    import jax
    from flax import linen, nnx
    from flax.traverse_util import flatten_dict

    if interface == "linen":
        module: Any = getattr(linen, wrapper)(linen.Dense(H))
        update: Any = {"update_stats": True} if wrapper == "SpectralNorm" else {}
        arrays = {"/".join(path): a for path, a in flatten_dict(module.init(jax.random.key(0), np.ones((2, D)), **update)).items()}
    else:
        module = getattr(nnx, wrapper)(nnx.Linear(D, H, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
        arrays = {"/".join(map(str, path)): a[...] for path, a in nnx.to_flat_state(nnx.state(module))}
    for format_ in ("auto", "flax"):
        for prefix in ("", next(key for key in arrays if key.endswith("layer_instance/bias")).removesuffix("bias")):
            with pytest.raises(pn.CheckpointError, match=r"layer_instance/kernel' is normalized by the WeightNorm or SpectralNorm"):
                pn.import_checkpoint(arrays, format_, prefix=prefix)


# -- paddle, speechbrain, thinc ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paddle() -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own compiler cache
        import paddle

    paddle.disable_signal_handler()  # of crashes in other libraries too
    return paddle


PADDLE: dict[str, Callable[[Any], Any]] = {
    "LSTM": lambda nn: nn.LSTM(D, H),
    "LSTM of two layers, both directions": lambda nn: nn.LSTM(D, H, num_layers=2, direction="bidirect"),
    "LSTM with a projection": lambda nn: nn.LSTM(D, H, proj_size=2),
    "LSTM of two layers, both directions, with a projection": lambda nn: nn.LSTM(D, H, num_layers=2, direction="bidirect", proj_size=2),
    "GRU": lambda nn: nn.GRU(D, H),
    "SimpleRNN": lambda nn: nn.SimpleRNN(D, H),
    "Linear": lambda nn: nn.Linear(D, H),
    "LayerNorm": lambda nn: nn.LayerNorm(D),
    "LayerNorm of two axes": lambda nn: nn.LayerNorm([3, D]),
    "BatchNorm": lambda nn: nn.BatchNorm1D(D),
    "InstanceNorm": lambda nn: nn.InstanceNorm1D(3),
}


@pytest.mark.parametrize("kind", PADDLE)
def test_paddle(kind: str, paddle: Any, rng: np.random.Generator) -> None:
    theirs = PADDLE[kind](paddle.nn)
    recurrent = "LSTM" in kind or kind in ("GRU", "SimpleRNN")
    for name, p in theirs.state_dict().items():
        values = rng.uniform(0.2, 1.0, p.shape) * (1 if "variance" in name else rng.choice([-1, 1], p.shape))
        p.set_value(values.astype("float32"))
    theirs.eval()
    arrays = {name: p.numpy() for name, p in theirs.state_dict().items()}
    x = rng.standard_normal((6, 3, D)).astype("float32")
    x = x[0] if kind == "BatchNorm" else x

    def forward(x: Any) -> Any:
        if not recurrent:
            return theirs(paddle.to_tensor(x)).numpy()
        return theirs(paddle.to_tensor(x.transpose(1, 0, 2)))[0].numpy().transpose(1, 0, 2)

    which: Any = {"layer": kind.split()[0]} if "Norm" in kind else {}
    which |= {"normalized_shape": (3, D)} if "two axes" in kind else {}
    layer = compared(arrays, forward, x, LIBRARY_FLOAT32, "paddle", **which)
    if recurrent:  # whose names are paddle's alone
        assert pn.import_checkpoint(arrays).provenance == layer.provenance
    again = pn.to_format(layer, "paddle")
    for name, array in again.items():
        if match := re.fullmatch(r"(\w+)_l(\d)(_reverse)?", name):  # the name by which no other array goes
            cell = "cell" if layer.num_directions == 1 else "cell_bw" if match[3] else "cell_fw"
            name = f"{match[2]}.{cell}.{match[1]}"
        np.testing.assert_array_equal(array, arrays[name])


def test_a_layer_of_paddle_is_no_module_of_torch(paddle: Any) -> None:
    theirs = paddle.nn.GRU(D, H)
    with pytest.raises(pn.UnsupportedError, match=r"`source` is a GRU; expected .*; source\.state_dict\(\) is a mapping"):
        pn.import_checkpoint(theirs)
    assert isinstance(pn.import_checkpoint(theirs.state_dict(), "paddle"), pn.GRU)


def test_paddle_copies_that_differ_are_named(paddle: Any) -> None:
    arrays = {name: p.numpy().copy() for name, p in paddle.nn.GRU(D, H).state_dict().items()}
    arrays["0.cell.weight_hh"][0, 0] += 1
    with pytest.raises(pn.CheckpointError, match=r"unknown \['0\.cell\.weight_hh'\]"):
        pn.import_checkpoint(arrays, "paddle")


@pytest.fixture(scope="module")
def speechbrain() -> Any:
    """The module of its recurrent layers alone, which needs nothing but torch; the package as a whole needs torchaudio and more."""
    found = importlib.util.find_spec("speechbrain")
    assert found is not None, "speechbrain is not installed"
    assert found.submodule_search_locations
    root = Path(found.submodule_search_locations[0])
    stubs: dict[str, Any] = {name: types.ModuleType(name) for name in ("speechbrain.nnet.attention", "speechbrain.utils.logger")}
    stubs["speechbrain.nnet.attention"].__dict__.update(
        dict.fromkeys(("ContentBasedAttention", "KeyValueAttention", "LocationAwareAttention"))
    )
    stubs["speechbrain.utils.logger"].get_logger = lambda name: None
    before = {name: sys.modules.get(name) for name in stubs}
    sys.modules.update(stubs)
    try:
        spec = importlib.util.spec_from_file_location("recurrent_layers_of_speechbrain", root / "nnet" / "RNN.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["speechbrain"] = types.ModuleType("speechbrain")
        spec.loader.exec_module(module)
    finally:
        for name in ("speechbrain", *before):
            sys.modules.pop(name, None)
    return module


@pytest.mark.parametrize("normalization", ["batchnorm", "layernorm"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_speechbrain(layers: int, bidirectional: bool, normalization: str, speechbrain: Any, rng: np.random.Generator) -> None:
    import torch

    theirs = speechbrain.LiGRU(
        H, (3, 6, D), num_layers=layers, bidirectional=bidirectional, normalization=normalization, nonlinearity="relu"
    ).double()
    for name, p in theirs.state_dict().items():
        if "norm" in name and p.dtype == torch.float64:
            p.copy_(torch.asarray(rng.uniform(0.2, 1.0, p.shape)))
    theirs.eval()
    arrays = {name: p.numpy() for name, p in theirs.state_dict().items()}
    both: Any = {"bidirectional": True} if bidirectional and layers == 1 else {}  # a second layer shows it by its inputs
    with torch.no_grad():
        layer = compared(
            arrays,
            lambda x: theirs(torch.asarray(x.transpose(1, 0, 2)))[0].numpy().transpose(1, 0, 2),
            rng.standard_normal((6, 3, D)),
            {"rtol": TORCH_FLOAT64, "atol": TORCH_FLOAT64},  # torch does not round ε to float32
            "speechbrain",
            **both,
        )
    assert layer.num_directions == 1 + bidirectional


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("first", [False, True], ids=["from zero", "from first states"])
def test_thinc(first: bool, both: bool, depth: int, rng: np.random.Generator) -> None:
    from thinc.api import LSTM
    from thinc.types import Padded

    size = H * (1 + both)
    theirs = LSTM(nO=size, nI=D, bi=both, depth=depth).initialize()
    vector = rng.uniform(-0.5, 0.5, theirs.get_param("LSTM").shape).astype("float32")
    theirs.set_param("LSTM", vector)
    if first:
        theirs.set_param("HC0", rng.uniform(-0.5, 0.5, theirs.get_param("HC0").shape).astype("float32"))
    arrays = {name: np.asarray(theirs.get_param(name)) for name in ("LSTM", "HC0")}

    def forward(x: Any) -> Any:
        time, batch = x.shape[:2]
        counts = np.full(time, batch, "int32")
        padded = Padded(x, counts, np.full(batch, time, "int32"), np.arange(batch, dtype="int32"))
        return theirs.predict(padded).data

    layer = compared(arrays, forward, rng.standard_normal((6, 3, D)).astype("float32"), LIBRARY_FLOAT32, "thinc")
    is_written_alike(layer, "thinc", arrays)


def test_a_live_ligru_says_its_nonlinearity_and_directions(speechbrain: Any, rng: np.random.Generator) -> None:
    import torch

    x = rng.standard_normal((6, 3, D))
    for given in ({}, {"nonlinearity": "tanh"}, {"bidirectional": True}, {"bidirectional": True, "num_layers": 2}):
        theirs = speechbrain.LiGRU(H, (3, 6, D), **given).double().eval()
        with torch.no_grad():
            expected = theirs(torch.asarray(x.transpose(1, 0, 2)))[0].numpy().transpose(1, 0, 2)
        layer = compared(theirs, lambda _, y=expected: y, x, {"rtol": TORCH_FLOAT64, "atol": TORCH_FLOAT64}, "auto")
        assert layer.num_directions == 1 + bool(given.get("bidirectional"))
    with pytest.raises(pn.CheckpointError, match=r"the nonlinearity sin; expected ReLU or Tanh.*activation=…"):
        pn.import_checkpoint(speechbrain.LiGRU(H, (3, 6, D), nonlinearity="sin"))
    with pytest.raises(pn.CheckpointError, match="layers of SLiGRU, which is another cell"):
        pn.import_checkpoint(speechbrain.SLiGRU(H, (3, 6, D)))
