"""Rows of `portnorm.IMPLEMENTATIONS` and `VARIANTS` that no format stores, against the cell as its source or paper writes it, in float64.

`p` has portnorm's own names without the suffix of the place; gates are in portnorm's order: LSTM i, f, g, o; GRU r, z, n. What the source
has in another order or with another sign is said where it is. Those that a format stores are in tests/test_import.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from portnorm.checkpoint.formats import ROWS
from tests.cases import LAYERS, random_recurrent, random_state
from tests.oracles import Arrays, bn, ln, lstm_step, run, sigmoid
from tests.tolerances import DIFFERENCES, PUBLISHED_FLOAT64

T_MAX = 4


def given(p: Arrays, slot: str, t: int, training: bool) -> Any:
    """Running mean and variance, or none in training, where the batch's own are taken."""
    tables = [p[f"{slot}.running_{s}"] for s in ("mean", "var")]
    return (None, None) if training else tuple(a if a.ndim == 1 else a[min(t, len(a) - 1)] for a in tables)


def lstm(
    gates: Callable[[Arrays, Any, Any, int, bool], Any], cell: Callable[[Arrays, Any, int, bool], Any] | None = None, state: bool = False
) -> Any:
    """An LSTM from its pre-activations, and from what enters the tanh, or is the state itself."""

    def oracle(p: Arrays, x: Any, training: bool) -> Any:
        def step(x: Any, t: int, h: Any, c: Any) -> Any:
            o, c = lstm_step("ifgo", gates(p, x @ p["weight_ih"].T, h @ p["weight_hh"].T, t, training), c)
            normed = c if cell is None else cell(p, c, t, training)
            return o * np.tanh(normed), normed if state else c

        return run(step, x, p["weight_hh"].shape[1], 2)

    return oracle


def ln_c(p: Arrays, c: Any, t: int, training: bool) -> Any:
    return ln(c, p["norm_c.weight"], p["norm_c.bias"])


def bn_c(eps: float = 1e-5) -> Any:
    return lambda p, c, t, training: p["norm_c.weight"] * bn(c, *given(p, "norm_c", t, training), eps) + p["norm_c.bias"]


def ln_two(p: Arrays, xw: Any, hu: Any, t: int, training: bool) -> Any:
    return ln(xw, p["norm_ih.weight"], p["norm_ih.bias"]) + ln(hu, p["norm_hh.weight"], p["norm_hh.bias"]) + p["bias"]


def bn_two(eps: float = 1e-5, gain: bool = True, shift: bool = True) -> Any:
    def gates(p: Arrays, xw: Any, hu: Any, t: int, training: bool) -> Any:
        total = p["bias"]
        for slot, term in (("norm_ih", xw), ("norm_hh", hu)):
            term = bn(term, *given(p, slot, t, training), eps)
            total = total + (term * p[f"{slot}.weight"] if gain else term) + (p[f"{slot}.bias"] if shift else 0.0)
        return total

    return gates


def iassael_gates(p: Arrays, xw: Any, hu: Any, t: int, training: bool) -> Any:
    """The bias is that of nn.Linear of the input, below its normalizer."""
    terms = (("norm_ih", xw + p["bias"]), ("norm_hh", hu))
    return sum(bn(a, *given(p, slot, t, training)) * p[f"{slot}.weight"] + p[f"{slot}.bias"] for slot, a in terms)


def kiros_torch_cell(p: Arrays, c: Any, t: int, training: bool) -> Any:
    """LSTM_LN.lua: ε is added to the standard deviation."""
    d = c - c.mean(-1, keepdims=True)
    return d / (np.sqrt((d * d).mean(-1, keepdims=True)) + float(np.float32(1e-5))) * p["norm_c.weight"] + p["norm_c.bias"]


def seba_gates(p: Arrays, xw: Any, hu: Any, t: int, training: bool) -> Any:
    normed = [ln(a + p[f"bias_{s}"], p[f"norm_{s}.weight"], p[f"norm_{s}.bias"], 1e-6, ddof=1) for s, a in (("ih", xw), ("hh", hu))]
    return normed[0] + normed[1]


def gru(step: Callable[..., Any]) -> Any:
    """`step(p, x, h, t, training)` to the new h."""

    def oracle(p: Arrays, x: Any, training: bool) -> Any:
        hidden = p["weight_hh"].shape[1]
        # Statistics over all steps of a batch, where a step asks for them.
        return run(lambda xt, t, h: (step(p, x if training else None, xt, h, t, training),), x, hidden)

    return oracle


def dreamer(p: Arrays, whole: Any, x: Any, h: Any, t: int, training: bool) -> Any:
    """update·cand + (1 − update)·h with update = σ(v − 1): here z = 1 − update, of which γ and β have the other sign, and β is 1 more."""
    size = h.shape[-1]
    sign, more = np.ones(3 * size), np.zeros(3 * size)
    sign[size : 2 * size], more[size : 2 * size] = -1.0, 1.0
    gain, shift = sign * p["norm_sum.weight"], sign * (p["norm_sum.bias"] - more)  # as Dreamer stores them
    a = ln(x @ p["weight_ih"].T + h @ p["weight_hh"].T + p["bias"], gain, shift, 1e-3)
    reset, update, cand = np.split(a, 3, -1)
    update = sigmoid(update - 1)
    return update * np.tanh(sigmoid(reset) * cand) + (1 - update) * h


def elektrisches_schaf(p: Arrays, whole: Any, x: Any, h: Any, t: int, training: bool) -> Any:
    size = h.shape[-1]
    i2h, h2h = x @ p["weight_ih"].T + p["bias_ih"], h @ p["weight_hh"].T + p["bias_hh"]
    r, z = np.split(sigmoid(ln(i2h[:, : 2 * size]) + ln(h2h[:, : 2 * size])), 2, -1)
    candidate = np.tanh(ln(i2h[:, 2 * size :]) + r * ln(h2h[:, 2 * size :]))
    return (1 - z) * h + z * candidate


def li_gru(p: Arrays, whole: Any, x: Any, h: Any, t: int, training: bool) -> Any:
    """Batch normalization of xW over batch and time."""
    mean, var = p["norm_ih.running_mean"], p["norm_ih.running_var"]
    if training:
        u = (whole @ p["weight_ih"].T).reshape(-1, p["weight_ih"].shape[0])
        mean, var = u.mean(0), u.var(0)
    w = p["norm_ih.weight"] * bn(x @ p["weight_ih"].T, mean, var) + p["norm_ih.bias"] + h @ p["weight_hh"].T
    z, a = np.split(w, 2, -1)
    z = sigmoid(z)
    return z * h + (1 - z) * np.maximum(a, 0)


def paper_gru(p: Arrays, whole: Any, x: Any, h: Any, t: int, training: bool) -> Any:
    """Ba et al. 2016, supplement, equations 22 to 24, with 1 − z for their z."""
    size = h.shape[-1]
    xw, hu = x @ p["weight_ih"].T, h @ p["weight_hh"].T

    def normed(a: Any, slot: str, part: slice) -> Any:
        return ln(a[:, part], p[f"{slot}.weight"][part], p[f"{slot}.bias"][part])

    gates, last = slice(0, 2 * size), slice(2 * size, None)
    r, z = np.split(sigmoid(normed(hu, "norm_hh", gates) + normed(xw, "norm_ih", gates)), 2, -1)
    return z * h + (1 - z) * np.tanh(normed(xw, "norm_ih", last) + r * normed(hu, "norm_hh", last))


def batch_gru(p: Arrays, whole: Any, x: Any, h: Any, t: int, training: bool) -> Any:
    u = bn(x @ p["weight_ih"].T, *given(p, "norm_ih", t, training)) * p["norm_ih.weight"] + p["bias"]
    a = bn(h @ p["weight_hh"].T, *given(p, "norm_hh", t, training)) * p["norm_hh.weight"]
    (ur, uz, un), (ar, az, an) = np.split(u, 3, -1), np.split(a, 3, -1)
    z = sigmoid(uz + az)
    return z * h + (1 - z) * np.tanh(un + sigmoid(ur + ar) * an)


def paper_rnn(p: Arrays, whole: Any, x: Any, h: Any, t: int, training: bool) -> Any:
    return np.tanh(ln(x @ p["weight_ih"].T + h @ p["weight_hh"].T, p["norm_sum.weight"], p["norm_sum.bias"]))


def batch_rnn(p: Arrays, whole: Any, x: Any, h: Any, t: int, training: bool) -> Any:
    terms = (("norm_ih", x @ p["weight_ih"].T), ("norm_hh", h @ p["weight_hh"].T))
    return np.tanh(sum(bn(a, *given(p, slot, t, training)) * p[f"{slot}.weight"] for slot, a in terms) + p["bias"])


def liao_poggio(p: Arrays, whole: Any, x: Any, h: Any, t: int, training: bool) -> Any:
    """Mean, variance, gain and shift of a step are its own."""
    a, row = x @ p["weight_ih"].T + h @ p["weight_hh"].T, min(t, T_MAX - 1)
    return np.tanh(p["norm_sum.weight"][row] * bn(a, *given(p, "norm_sum", t, training)) + p["norm_sum.bias"][row])


def input_term(p: Arrays, whole: Any, x: Any, t: int, training: bool) -> Any:
    """Laurent et al. 2016: BN(xW), over the sequence (whose statistics have no axis of time) or over one frame."""
    w = p["weight_ih"].T
    if p["norm_ih.running_mean"].ndim == 2:
        normed = bn(x @ w, *given(p, "norm_ih", t, training))
    else:
        u = (whole @ w).reshape(-1, w.shape[1]) if training else None
        normed = bn(x @ w, *((u.mean(0), u.var(0)) if u is not None else (p["norm_ih.running_mean"], p["norm_ih.running_var"])))
    return p["norm_ih.weight"] * normed + p["bias"]


def vertical_lstm(p: Arrays, x: Any, training: bool) -> Any:
    def step(xt: Any, t: int, h: Any, c: Any) -> Any:
        o, c = lstm_step("ifgo", input_term(p, x, xt, t, training) + h @ p["weight_hh"].T, c)
        return o * np.tanh(c), c

    return run(step, x, p["weight_hh"].shape[1], 2)


def vertical_gru(p: Arrays, whole: Any, x: Any, h: Any, t: int, training: bool) -> Any:
    (ur, uz, un), (ar, az, an) = np.split(input_term(p, whole, x, t, training), 3, -1), np.split(h @ p["weight_hh"].T, 3, -1)
    z = sigmoid(uz + az)
    return z * h + (1 - z) * np.tanh(un + sigmoid(ur + ar) * an)


def vertical_rnn(p: Arrays, whole: Any, x: Any, h: Any, t: int, training: bool) -> Any:
    return np.tanh(input_term(p, whole, x, t, training) + h @ p["weight_hh"].T)


VERTICAL = {
    (cell, name): oracle
    for name in ("batch-input", "batch-input-frame")
    for cell, oracle in (("LSTM", vertical_lstm), ("GRU", gru(vertical_gru)), ("RNN", gru(vertical_rnn)))
}
ORACLES: dict[tuple[str, str], Any] = {
    ("LSTM", "layer"): lstm(ln_two, ln_c),
    ("LSTM", "layer-state"): lstm(ln_two, ln_c, state=True),
    ("LSTM", "di-engine"): lstm(ln_two),
    ("LSTM", "kiros-torch"): lstm(lambda p, xw, hu, t, training: xw + hu + p["bias"], kiros_torch_cell),
    ("LSTM", "seba-1511"): lstm(
        seba_gates, lambda p, c, t, training: ln(c, p["norm_c.weight"], p["norm_c.bias"], 1e-6, ddof=1), state=True
    ),
    ("LSTM", "batch"): lstm(bn_two(shift=False), bn_c()),
    ("LSTM", "olavhn"): lstm(bn_two(1e-3), bn_c(1e-3)),
    ("LSTM", "iassael"): lstm(iassael_gates, bn_c()),
    ("LSTM", "hellozgy"): lstm(bn_two(gain=False, shift=False), bn_c()),
    ("LSTM", "mrubio-chavarria"): lstm(bn_two(), bn_c()),
    ("GRU", "layer"): gru(paper_gru),
    ("GRU", "batch"): gru(batch_gru),
    ("GRU", "dreamer"): gru(dreamer),
    ("GRU", "elektrisches-schaf"): gru(elektrisches_schaf),
    ("GRU", "li-gru"): gru(li_gru),
    ("RNN", "layer"): gru(paper_rnn),
    ("RNN", "batch"): gru(batch_rnn),
    ("RNN", "liao-poggio"): gru(liao_poggio),
    **VERTICAL,
}
ONE_SET = {"olavhn", "iassael", "hellozgy"}
"""Rows whose statistics are the same at all steps."""


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("cell", "name"), ORACLES)
def test_values_and_gradients_are_those_of_the_published_cell(cell: str, name: str, training: bool, rng: np.random.Generator) -> None:
    layer = random_recurrent(cell, name, rng)
    if name in ONE_SET:
        layer = LAYERS[cell](4, 3, norm=name, dtype="float64", t_max=1, rng=rng)
        layer.assign({n: p + 0.3 * rng.standard_normal(p.shape) for n, p in layer.parameters().items()})
    params, buffers = ({n.replace("_l0", ""): a for n, a in group.items()} for group in (layer.parameters(), layer.buffers))
    x, oracle = rng.standard_normal((6, 5, 4)), ORACLES[cell, name]
    y, _, pullback = layer.vjp(x, training=training)
    np.testing.assert_allclose(y, oracle({**params, **buffers}, x, training), rtol=PUBLISHED_FLOAT64, atol=PUBLISHED_FLOAT64)
    dy, step = rng.standard_normal(y.shape), 1e-6
    dx, _, grads = pullback(dy)
    for key, gradient in {"x": dx, **{n.replace("_l0", ""): g for n, g in grads.items()}}.items():
        at = x if key == "x" else params[key]
        direction = rng.standard_normal(at.shape)
        ends = []
        for sign in (1, -1):
            moved = at + sign * step * direction
            ends.append(
                np.sum(oracle({**params, **buffers} | ({} if key == "x" else {key: moved}), moved if key == "x" else x, training) * dy)
            )
        difference = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(np.sum(gradient * direction), difference, rtol=DIFFERENCES, atol=DIFFERENCES * max(1, abs(difference)))


@pytest.mark.parametrize("early", [(), ("bias",), ("bias_ih", "bias_hh")], ids=str)
@pytest.mark.parametrize("terms", ["separate", "sum", "input", "hidden", None])
@pytest.mark.parametrize(("cell", "gates"), [("LSTM", 4), ("RNN", 1)])
def test_terms_and_early_biases_are_where_the_equation_of_a_variant_has_them(
    cell: str, gates: int, terms: Any, early: tuple[str, ...], rng: np.random.Generator
) -> None:
    """a = N_ih(x W + b₀) + N_hh(h U + b₁) + b, or N_sum(x W + b₀ + h U + b₁) + b."""
    norm = None if terms is None else "layer"
    layer: Any = LAYERS[cell](3, 4, norm=pn.Variant("mine", norm=norm, terms=terms, early=early), dtype="float64", rng=rng)
    layer.assign({n: rng.standard_normal(a.shape) for n, a in layer.parameters().items()})
    p = {n.replace("_l0", ""): a for n, a in layer.parameters().items()}
    x, h, c = rng.standard_normal((1, 2, 3)), rng.standard_normal((2, 4)), rng.standard_normal((2, 4))

    def normalized(slot: str, v: Any) -> Any:
        return ln(v, p[f"{slot}.weight"], p[f"{slot}.bias"], 1e-5) if f"{slot}.weight" in p else v

    xw = x[0] @ p["weight_ih"].T + (p[early[0]] if early else 0.0)
    hu = h @ p["weight_hh"].T + (p["bias_hh"] if "bias_hh" in early else 0.0)
    a = normalized("norm_sum", xw + hu) if terms == "sum" else normalized("norm_ih", xw) + normalized("norm_hh", hu)
    a = a + p["bias"]
    expected = np.tanh(a)
    if cell == "LSTM":
        i, f, g, o = np.split(a, gates, axis=-1)
        expected = sigmoid(o) * np.tanh(sigmoid(f) * c + sigmoid(i) * np.tanh(g))
    y, _ = layer(x, tuple(s[None] for s in ((h, c) if cell == "LSTM" else (h,))))
    np.testing.assert_allclose(y[0], expected, rtol=1e-6, atol=1e-6)  # ε is float32's


LESS_ONE = {"jihunchoi", "iassael", "hellozgy", "mrubio-chavarria", "li-gru"}
"""Rows whose source keeps its running variances by torch's batch normalization, which divides them by n − 1."""
BATCH_ROWS = [
    (cell, name, slot)
    for cell in LAYERS
    for name, row in {**pn.VARIANTS[cell], **pn.IMPLEMENTATIONS[cell]}.items()
    if row.norm == "batch"
    for slot in row.gate_slots()
]


@pytest.mark.parametrize(("cell", "name", "slot"), BATCH_ROWS)
def test_running_statistics_are_those_of_the_source(cell: str, name: str, slot: str, rng: np.random.Generator) -> None:
    """What the first step leaves behind, whose inputs are known without running the cell: (1 − m)·before + m·(mean, variance)."""
    layer = random_recurrent(cell, name, rng, momentum=0.25)
    x, state = rng.standard_normal((1, 5, 4)), random_state(layer, 5, rng, time=0)
    xw, hu = x[0] @ layer.params["weight_ih_l0"].T, state[0][0] @ layer.params["weight_hh_l0"].T
    early = layer.params["bias_l0"] if "bias" in layer.variant.early else 0.0
    a = {"norm_ih": xw + early, "norm_hh": hu, "norm_sum": xw + hu}[slot]
    before = {s: layer.buffers[f"{slot}_l0.running_{s}"] for s in ("mean", "var")}
    layer(x, state, training=True)
    for s, seen in (("mean", a.mean(0)), ("var", a.var(0, ddof=name in LESS_ONE))):
        row = (0,) if before[s].ndim == 2 else ()
        np.testing.assert_allclose(layer.buffers[f"{slot}_l0.running_{s}"][row], 0.75 * before[s][row] + 0.25 * seen, rtol=1e-12)


def test_every_row_is_tested() -> None:
    """Here, as a format in tests/test_import.py, or, without a normalizer of its own, against torch."""
    stored = {(row.layer, row.norm) for row in ROWS} | {("LSTM", "fastrnns-decomposed")}  # tested as fastrnns with another eps
    rows = {(cell, name) for cell in LAYERS for name in (*pn.VARIANTS[cell], *pn.IMPLEMENTATIONS[cell])}
    assert {(cell, name) for cell, name in rows - stored - set(ORACLES) if name not in (None, "weight")} == set()


@pytest.mark.parametrize(("cell", "name"), [(cell, name) for cell in LAYERS for name in pn.IMPLEMENTATIONS[cell]])
def test_published_cells_pass_through_files(cell: str, name: str, tmp_path: Any, rng: np.random.Generator) -> None:
    layer, x = random_recurrent(cell, name, rng), rng.standard_normal((5, 3, 4))
    state = random_state(layer, 3, rng)  # without ε a state of zeros has no direction
    pn.save(layer, tmp_path / "m.safetensors")
    np.testing.assert_array_equal(pn.load(tmp_path / "m.safetensors")(x, state)[0], layer(x, state)[0])


def test_zoneout_in_inference_is_the_expectation(rng: np.random.Generator) -> None:
    layer, x = random_recurrent("GRU", pn.Variant("", biases=("bias_ih", "bias_hh"), zoneout=0.25), rng), rng.standard_normal((1, 3, 4))
    plain = random_recurrent("GRU", None, np.random.default_rng(20261120))
    assert np.isfinite(layer(x)[0]).all()
    plain.load_state_dict(layer.state_dict())
    np.testing.assert_allclose(layer(x)[0], 0.75 * plain(x)[0], rtol=1e-12)  # h before is 0


@pytest.mark.parametrize("name", ["uniform", "orthogonal", "identity", "identity candidate"])
def test_starts_of_the_hidden_weights(name: str) -> None:
    layer = pn.LSTM(3, 5, norm="batch", hidden_init=name, dtype="float64", rng=0)
    w = layer.params["weight_hh_l0"]
    i, f, g, o = np.split(w, 4)
    if name == "uniform":
        assert np.max(np.abs(w)) <= 1 / np.sqrt(5)
        assert np.max(np.abs(w)) > 0.9 / np.sqrt(5)
    if name == "orthogonal":
        for block in (i, f, g, o):
            np.testing.assert_allclose(block @ block.T, np.eye(5), atol=1e-12)
    if name == "identity":
        np.testing.assert_array_equal(w, np.concatenate([np.eye(5)] * 4))
    if name == "identity candidate":  # [I | orthogonal (H × 3H)], in Cooijmans' code the transpose of this
        np.testing.assert_array_equal(g, np.eye(5))
        others = np.concatenate([i, f, o])
        np.testing.assert_allclose(others.T @ others, np.eye(5), atol=1e-12)
    with pytest.raises(pn.UnsupportedError, match="`hidden_init` is 'zeros'"):
        pn.LSTM(3, 5, hidden_init="zeros")
