"""Bad input gives one clear error that names the argument, what it got and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import portnorm as pn

X = np.ones((2, 5, 4), dtype=np.float32)
SEQUENCE = np.ones((6, 3, 4), dtype=np.float32)


def lstm(**keywords: Any) -> pn.LSTM:
    return pn.LSTM(4, 3, rng=0, **keywords)


def strict(a: Any) -> Any:
    import array_api_strict

    return array_api_strict.asarray(a)


CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "weight of another length": (
        lambda: pn.layer_norm(X, np.ones(3, np.float32)),
        pn.ShapeError,
        r"`weight` has shape \(3,\) but the last axis of `x` \(2, 5, 4\) has length 4",
    ),
    "bias over two axes": (lambda: pn.layer_norm(X, None, X[0, 0], axis=(1, 2)), pn.ShapeError, r"`bias` has shape \(4,\).*\(5, 4\)"),
    "out of another shape": (lambda: pn.layer_norm(X, out=X[0].copy()), pn.ShapeError, r"`out` has shape \(5, 4\); expected \(2, 5, 4\)"),
    "out of another type": (lambda: pn.rms_norm(X, out=X.astype(float)), pn.DTypeError, "`out` has dtype float64; expected float32"),
    "out in a vjp": (lambda: pn.vjp(pn.layer_norm, X, out=X), pn.UnsupportedError, "`out` is for a call"),
    "axis that is not there": (lambda: pn.layer_norm(X, axis=3), pn.ShapeError, r"`axis` 3 does not exist.*\(2, 5, 4\)"),
    "axis twice": (lambda: pn.rms_norm(X, axis=(-1, 2)), pn.ShapeError, r"`axis` .* twice"),
    "no axis": (lambda: pn.layer_norm(X, axis=()), pn.ShapeError, "`axis` is empty"),
    "negative eps": (lambda: pn.layer_norm(X, eps=-1.0), pn.UnsupportedError, "`eps` is -1.0"),
    "eps that is NaN": (lambda: pn.layer_norm(X, eps=float("nan")), pn.UnsupportedError, "`eps` is nan"),
    "integers": (lambda: pn.layer_norm(np.ones((2, 3), dtype=int)), pn.DTypeError, "`x` has dtype int64; expected a real floating"),
    "complex": (lambda: pn.rms_norm(np.ones((2, 3), dtype=complex)), pn.DTypeError, "`x` has dtype complex128"),
    "a list": (lambda: pn.layer_norm([1.0, 2.0]), pn.UnsupportedError, "`x` is a list; expected an array"),
    "None": (lambda: pn.layer_norm("x"), pn.UnsupportedError, "`x` is a str"),
    "two libraries": (
        lambda: pn.layer_norm(X, strict(np.ones(4, np.float32))),
        pn.UnsupportedError,
        "`weight` is an array of array_api_strict but `x` is one of numpy",
    ),
    "groups that do not divide": (lambda: pn.group_norm(X, 3), pn.ShapeError, "`num_groups` is 3.*5 channels; expected a divisor"),
    "no groups": (lambda: pn.group_norm(X, 0), pn.ShapeError, "`num_groups` is 0"),
    "channels at the batch axis": (lambda: pn.group_norm(X, 1, channel_axis=0), pn.ShapeError, "`channel_axis` 0 is the batch axis"),
    "instance norm without space": (lambda: pn.instance_norm(X[0]), pn.ShapeError, "at least 3 dimensions"),
    "mean without var": (lambda: pn.batch_norm(X[0], mean=X[0, 0]), pn.UnsupportedError, "`mean` is given but `var` is not"),
    "one value per channel": (lambda: pn.batch_norm(X[0, :1]), pn.ShapeError, "one value per channel"),
    "mask of numbers": (lambda: pn.batch_norm(X, mask=np.ones((2, 4))), pn.DTypeError, "`mask` has dtype float64; expected bool"),
    "mask of another shape": (lambda: pn.batch_norm(X, mask=np.ones((2, 3), bool)), pn.ShapeError, r"`mask` has shape \(2, 3\).*\(2, 4\)"),
    "cotangent of another shape": (lambda: pn.vjp(pn.layer_norm, X)[1](X[0]), pn.ShapeError, r"`dy` has shape \(5, 4\)"),
    "vjp of what is no Op": (lambda: pn.vjp(np.tanh, X), pn.UnsupportedError, "expected an Op of portnorm"),
    "linear inputs": (lambda: pn.linear(X, np.ones((2, 3), np.float32)), pn.ShapeError, r"`weight` has shape \(2, 3\)"),
    "lengths of weights": (lambda: pn.weight_norm(X[0], X[0]), pn.ShapeError, r"`g` has shape \(5, 4\); expected \(5,\) or \(5, 1\)"),
    "labels of another shape": (lambda: pn.softmax_cross_entropy(X, np.zeros(2, int)), pn.ShapeError, r"`labels` has shape \(2,\)"),
    "labels of numbers": (lambda: pn.softmax_cross_entropy(X[0], np.zeros(5)), pn.DTypeError, "`labels` has dtype float64"),
    "unknown preset": (lambda: lstm(norm="layers"), pn.UnsupportedError, "`norm` is 'layers'; expected one of None, 'layer'"),
    "preset of no name": (lambda: lstm(norm=["layer"]), pn.UnsupportedError, "`norm` is"),
    "a seed of truth": (lambda: pn.GRU(3, 4, rng=True), pn.UnsupportedError, "`rng` is True; expected a seed"),
    "a seed of a name": (lambda: pn.Linear(2, 3, rng="0"), pn.UnsupportedError, "`rng` is '0'; expected a seed"),
    "a seed below 0": (lambda: lstm().initial_state(2, noise=0.1, rng=-1), pn.UnsupportedError, "`rng` is -1; expected a seed"),
    "a tolerance of truth": (
        lambda: pn.verify("m.onnx", tolerance=True),
        pn.UnsupportedError,
        "`tolerance` is True; expected a number that is not",
    ),
    "no hidden units": (lambda: pn.LSTM(4, 0), pn.UnsupportedError, "`hidden_size` is 0; expected at least 1"),
    "t_max of 0": (lambda: lstm(norm="batch", t_max=0), pn.UnsupportedError, "`t_max` is 0"),
    "unknown library": (lambda: lstm(xp="tensorflow"), pn.UnsupportedError, "`xp` is 'tensorflow'; expected"),
    "unknown dtype": (lambda: lstm(dtype="float31"), pn.DTypeError, "`dtype` is 'float31'"),
    "integer dtype": (lambda: lstm(dtype="int64"), pn.DTypeError, "`dtype` is int64"),
    "features": (lambda: lstm()(SEQUENCE[..., :2]), pn.ShapeError, r"`x` has shape \(6, 3, 2\); expected \(time, batch, features\) with 4"),
    "axes of the sequence": (lambda: lstm(batch_first=True)(SEQUENCE[0]), pn.ShapeError, r"expected \(batch, time, features\)"),
    "dtype of the sequence": (lambda: lstm()(SEQUENCE.astype(float)), pn.DTypeError, "`x` has dtype float64 but the layer has .*float32"),
    "library of the sequence": (lambda: lstm()(strict(SEQUENCE)), pn.UnsupportedError, "`x` is an array of array_api_strict but `param"),
    "negative lengths": (lambda: lstm()(SEQUENCE, lengths=[3, -1, 2]), pn.ShapeError, "`lengths` reach from -1 to 3; expected 0 to 6"),
    "lengths beyond the end": (lambda: lstm()(SEQUENCE, lengths=[3, 7, 2]), pn.ShapeError, "`lengths` reach from 2 to 7; expected 0 to 6"),
    "padding without eps": (
        lambda: lstm(norm="fastrnns-decomposed")(SEQUENCE, lengths=[1, 2, 3]),
        pn.UnsupportedError,
        "`lengths` or `mask` with eps = 0",
    ),
    "a mask of weights": (lambda: lstm()(SEQUENCE, mask=np.ones((6, 3))), pn.DTypeError, "`mask` has dtype float64; expected bool"),
    "a mask of another shape": (
        lambda: lstm()(SEQUENCE, mask=np.ones((3, 6), bool)),
        pn.ShapeError,
        r"`mask` has shape \(3, 6\); expected \(6, 3\)",
    ),
    "a mask of features in a recurrent layer": (
        lambda: lstm()(SEQUENCE, mask=np.arange(6 * 3 * 4).reshape(6, 3, 4) % 5 > 0),
        pn.ShapeError,
        r"`mask` \(6, 3, 4\) lies along the axes \(0, 1, 2\) of the input; expected .* all but \(2,\)",
    ),
    "a mask along other axes than those of a later part": (
        lambda: pn.Sequential(pn.BatchNorm(3), pn.Linear(4, 2))(SEQUENCE, mask=np.eye(6, 4, dtype=bool)),
        pn.ShapeError,
        r"`mask` \(6, 4\) lies along the axes \(0, 2\) of the input; expected .* the first ones, and not the last",
    ),
    "a mask of features before a linear layer": (
        lambda: pn.Sequential(pn.BatchNorm(4, channel_axis=-1), pn.Linear(4, 2))(SEQUENCE, mask=np.indices((6, 3, 4)).sum(0) % 2 > 0),
        pn.ShapeError,
        r"`mask` \(6, 3, 4\) lies along the axes \(0, 1, 2\) of the input; expected .* the first ones, and not the last",
    ),
    "padding of rows without eps": (
        lambda: pn.LayerNorm(4, eps=0.0)(SEQUENCE, lengths=[1, 2, 3]),
        pn.UnsupportedError,
        "`lengths` or `mask` with eps = 0",
    ),
    "lengths where there is no time": (
        lambda: pn.Linear(4, 2)(np.ones((3, 4), "float32"), lengths=[1, 2, 3, 1]),
        pn.ShapeError,
        r"`lengths` needs `x` as \(time, batch, features\); got \(3, 4\)",
    ),
    "a mask and lengths": (
        lambda: lstm()(SEQUENCE, lengths=[1, 2, 3], mask=np.ones((6, 3), bool)),
        pn.UnsupportedError,
        "`lengths` and `mask` are both given",
    ),
    "as many lengths": (lambda: lstm()(SEQUENCE, lengths=[3]), pn.ShapeError, r"`lengths` has shape \(1,\); expected \(3,\)"),
    "lengths that are no integers": (lambda: lstm()(SEQUENCE, lengths=[1.0, 2.0, 3.0]), pn.DTypeError, "`lengths` has dtype float64"),
    "state of a plain layer": (lambda: pn.Linear(4, 2)(SEQUENCE, SEQUENCE), pn.UnsupportedError, "`state` is given, but Linear has none"),
    "state of another shape": (
        lambda: lstm()(SEQUENCE, (np.zeros((2, 3, 3)), np.zeros((1, 3, 3)))),
        pn.ShapeError,
        r"`state` has h of shape \(2, 3, 3\).* \(1, 3, 3\)",
    ),
    "dtype of the state": (
        lambda: lstm()(SEQUENCE, (np.zeros((1, 3, 3)), np.zeros((1, 3, 3)))),
        pn.DTypeError,
        "`state` has h of dtype float64; expected float32",
    ),
    "library of the state": (
        lambda: lstm()(SEQUENCE, (strict(np.zeros((1, 3, 3), np.float32)),) * 2),
        pn.UnsupportedError,
        "`state` is an array of array_api_strict but `x` is one of numpy",
    ),
    "a sequence of integers": (lambda: lstm()(SEQUENCE.astype(int)), pn.DTypeError, "`x` has dtype int64 but the layer has"),
    "unknown variant": (lambda: pn.Variant(source="", norm="group"), pn.UnsupportedError, "`norm` is 'group'"),  # type: ignore[arg-type]
    "batch norm per gate": (lambda: pn.Variant(source="", norm="batch", groups="gate"), pn.UnsupportedError, "`groups` is 'gate'"),
    "a preset of another cell": (
        lambda: pn.GRU(4, 3, norm="layer-gates"),
        pn.UnsupportedError,
        "`norm` is 'layer-gates'; expected one of None, 'layer', 'batch', .* for GRU",
    ),
    "a slot that a cell has not": (
        lambda: pn.RNN(4, 3, norm=pn.Variant(source="", norm="layer", cell="copy")),
        pn.UnsupportedError,
        "`cell` is 'copy', which RNN has no place for",
    ),
    "forget bias of a GRU": (lambda: pn.GRU(4, 3, forget_bias=1.0), pn.UnsupportedError, "GRU has no forget gate"),
    "cell without norm": (lambda: pn.Variant(source="", cell="copy"), pn.UnsupportedError, "`cell` is 'copy' without a `norm`"),
    "state without time": (
        lambda: lstm(norm="batch")(SEQUENCE, (X, X)),
        pn.ShapeError,
        r"`state` is tuple of length 2; expected \(h, c, time\)",
    ),
    "batch norm of one sequence": (
        lambda: lstm(norm="batch")(SEQUENCE[:, :1], training=True),
        pn.ShapeError,
        "one sequence; batch normalization in training needs at least two",
    ),
    "batch norm of one frame": (
        lambda: lstm(norm="batch-input")(SEQUENCE[:1, :1], training=True),
        pn.ShapeError,
        "one frame; batch normalization in training needs at least two",
    ),
    "statistics by sequence of what is not the input": (
        lambda: pn.Variant(source="", norm="batch", statistics="sequence"),
        pn.UnsupportedError,
        "`statistics` is 'sequence', which is for batch normalization of the input term alone",
    ),
    "step of both directions": (lambda: lstm(bidirectional=True).step(SEQUENCE[0]), pn.UnsupportedError, "bidirectional"),
    "population of nothing": (lambda: lstm(norm="batch").estimate_population([]), pn.UnsupportedError, "`batches` is empty"),
    "numbers for an embedding": (lambda: pn.Embedding(5, 2)(SEQUENCE), pn.DTypeError, "`x` has dtype float32; expected integers"),
    "ids that are not there": (
        lambda: pn.Embedding(5, 2)(np.array([[0, 5]])),
        pn.ShapeError,
        "`ids` reach from 0 to 5; expected 0 to 4",
    ),
    "no layers": (lambda: pn.Sequential(), pn.UnsupportedError, "`parts`"),
    "layers of two dtypes": (
        lambda: pn.Sequential(lstm(), pn.Linear(3, 2, dtype="float64")),
        pn.UnsupportedError,
        r"part 1 has .*float64.* but part 0 has .*float32",
    ),
    "momentum": (lambda: pn.BatchNorm(3, momentum=2.0), pn.UnsupportedError, "`momentum` is 2.0"),
    "momentum of a recurrent layer": (lambda: lstm(norm="batch", momentum=-1.0), pn.UnsupportedError, "`momentum` is -1.0"),
    "channels of the layer": (lambda: pn.BatchNorm(3)(X), pn.ShapeError, r"expected length 3 at axis 1"),
    "shape of the layer": (lambda: pn.LayerNorm((5, 3))(X), pn.ShapeError, r"expected \(…, 5, 3\)"),
    "learning rate": (lambda: pn.SGD(lr=-1.0), pn.UnsupportedError, "`lr` is -1.0"),
    "clip to nothing": (lambda: pn.clip_by_global_norm({"w": X}, 0.0), pn.UnsupportedError, "`limit` is 0.0"),
    "export of what is no layer": (lambda: pn.export(np.tanh, None), pn.UnsupportedError, "`model` is a ufunc"),  # type: ignore[arg-type]
    "export to nowhere": (lambda: pn.export(lstm(), "/no/such/place/m.onnx"), pn.ExportError, "no such directory"),
    "save to nowhere": (lambda: pn.save(lstm(), "/no/such/place/m"), pn.PortnormError, "cannot write '/no/such/place/m': No such file"),
    "save to a directory": (lambda: pn.save(lstm(), "tests"), pn.PortnormError, "cannot write 'tests': Is a directory"),
    "a path that is a number": (lambda: pn.export(lstm(), 3), pn.UnsupportedError, "`path` is 3; expected the path of a file"),  # type: ignore[arg-type]
    "a file of no name": (lambda: pn.save(lstm(), None), pn.UnsupportedError, "`path` is None; expected the path"),  # type: ignore[arg-type]
    "a name that is a list": (lambda: pn.load(["m"]), pn.UnsupportedError, r"`path` is \['m'\]; expected the path"),  # type: ignore[call-overload]
    "verify of no file": (lambda: pn.verify(None), pn.UnsupportedError, "`path` is None; expected the path"),  # type: ignore[arg-type]
    "checkpoint that is not there": (lambda: pn.load("/no/such/file"), pn.CheckpointError, "cannot read '/no/such/file'"),
}


@pytest.mark.parametrize("name", CASES)
def test_message(name: str) -> None:
    call, kind, message = CASES[name]
    with pytest.raises(kind, match=message) as caught:
        call()
    assert isinstance(caught.value, pn.PortnormError)


def test_every_error_is_of_one_family() -> None:
    import portnorm.errors as errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert all(issubclass(kind, pn.PortnormError) for kind in kinds)
    assert {kind.__name__ for kind in kinds} <= set(pn.__all__)


@pytest.mark.peers
def test_two_devices() -> None:
    import torch

    x, weight = torch.ones((2, 4)), torch.ones(4, device="meta")
    with pytest.raises(pn.UnsupportedError, match="`weight` is on device meta but `x` is on cpu"):
        pn.layer_norm(x, weight)


def test_two_devices_of_array_api_strict() -> None:
    import array_api_strict as xp

    x, weight = xp.ones((2, 4)), xp.ones(4, device=xp.Device("device1"))
    with pytest.raises(pn.UnsupportedError, match=r"`weight` is on device .*device1.* but `x` is on"):
        pn.layer_norm(x, weight)
