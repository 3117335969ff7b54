"""Published cells in float64, each written as its source writes it, with the names and layouts that the source stores.

Nothing here comes from portnorm. `x` is (time, batch, inputs); the initial state is zero; every function returns (time, batch, hidden).
D, H and T below are inputs, hidden size and steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Arrays = dict[str, Any]


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def ln(x: Any, g: Any = 1.0, b: Any = 0.0, eps: float = 1e-5, ddof: int = 0) -> Any:
    eps = float(np.float32(eps))  # as every source and ONNX has it
    return g * (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, ddof=ddof, keepdims=True) + eps) + b


def ln_each(x: Any, parts: int, g: Any = 1.0, b: Any = 0.0, eps: float = 1e-5) -> Any:
    """Each gate apart."""
    return g * np.concatenate([ln(part, eps=eps) for part in np.split(x, parts, -1)], -1) + b


def bn(x: Any, mean: Any, var: Any, eps: float = 1e-5) -> Any:
    """With the batch's own statistics where none are given."""
    mean, var = (x.mean(0), x.var(0)) if mean is None else (mean, var)
    return (x - mean) / np.sqrt(var + float(np.float32(eps)))


def run(step: Callable[..., Any], x: Any, hidden: int, states: int = 1) -> Any:
    """`step(x, t, *state)` gives the state; the first is the output."""
    state, ys = (np.zeros((x.shape[1], hidden)),) * states, []
    for t in range(x.shape[0]):
        state = step(x[t], t, *state)
        ys.append(state[0])
    return np.stack(ys)


def lstm_step(gates: str, a: Any, c: Any, forget: float = 0.0) -> tuple[Any, Any]:
    """(σ(o), new c) from pre-activations whose gates are in the order given."""
    z = dict(zip(gates, np.split(a, 4, -1), strict=True))
    return sigmoid(z["o"]), sigmoid(z["f"] + forget) * c + sigmoid(z["i"]) * np.tanh(z["g"])


# -- plain ---------------------------------------------------------------------------------------------------------------------------------


def plain_lstm(gates: str, kernel: str, recurrent: str, bias: tuple[str, ...], transposed: bool, forget: float = 0.0) -> Any:
    def oracle(p: Arrays, x: Any, training: bool) -> Any:
        w, u = (p[k].T if transposed else p[k] for k in (kernel, recurrent))

        def step(x: Any, t: int, h: Any, c: Any) -> Any:
            o, c = lstm_step(gates, x @ w + h @ u + sum(p[b] for b in bias), c, forget)
            return o * np.tanh(c), c

        return run(step, x, u.shape[0], 2)

    return oracle


def torch_gru(p: Arrays, x: Any, training: bool) -> Any:
    def step(x: Any, t: int, h: Any) -> Any:
        (ur, uz, un), (ar, az, an) = (np.split(v @ p[f"weight_{s}_l0"].T + p[f"bias_{s}_l0"], 3, -1) for v, s in ((x, "ih"), (h, "hh")))
        z = sigmoid(uz + az)
        return ((1 - z) * np.tanh(un + sigmoid(ur + ar) * an) + z * h,)

    return run(step, x, p["weight_hh_l0"].shape[1])


def zrh_gru(recurrent_bias: Callable[[Arrays], Any], bias: Callable[[Arrays], Any], after: bool) -> Any:
    """Keras and haste: z, r, h."""

    def oracle(p: Arrays, x: Any, training: bool) -> Any:
        size = p["recurrent_kernel"].shape[0]

        def step(x: Any, t: int, h: Any) -> Any:
            xz, xr, xh = np.split(x @ p["kernel"] + bias(p), 3, -1)
            a = h @ p["recurrent_kernel"] + recurrent_bias(p)
            z, r = sigmoid(xz + a[:, :size]), sigmoid(xr + a[:, size : 2 * size])
            inner = r * a[:, 2 * size :] if after else (r * h) @ p["recurrent_kernel"][:, 2 * size :]
            return (z * h + (1 - z) * np.tanh(xh + inner),)

        return run(step, x, size)

    return oracle


def plain_rnn(kernel: str, recurrent: str, bias: tuple[str, ...], transposed: bool = False) -> Any:
    def oracle(p: Arrays, x: Any, training: bool) -> Any:
        w, u = (p[k].T if transposed else p[k] for k in (kernel, recurrent))
        return run(lambda x, t, h: (np.tanh(x @ w + h @ u + sum(p[b] for b in bias)),), x, u.shape[0])

    return oracle


# -- layer normalization -------------------------------------------------------------------------------------------------------------------


def fastrnns(p: Arrays, x: Any, training: bool, eps: float = 1e-5) -> Any:
    def step(x: Any, t: int, h: Any, c: Any) -> Any:
        a = ln(x @ p["weight_ih"].T, p["layernorm_i.weight"], p["layernorm_i.bias"], eps)
        a = a + ln(h @ p["weight_hh"].T, p["layernorm_h.weight"], p["layernorm_h.bias"], eps)
        o, c = lstm_step("ifgo", a, c)
        c = ln(c, p["layernorm_c.weight"], p["layernorm_c.bias"], eps)
        return o * np.tanh(c), c

    return run(step, x, p["weight_hh"].shape[1], 2)


def haste_lstm(zoneout: float = 0.0) -> Any:
    def oracle(p: Arrays, x: Any, training: bool) -> Any:
        def step(x: Any, t: int, h: Any, c: Any) -> Any:
            a = ln(x @ p["kernel"], p["gamma"][0]) + ln(h @ p["recurrent_kernel"], p["gamma"][1]) + p["bias"]
            o, c = lstm_step("igfo", a, c)
            new = o * np.tanh(ln(c, p["gamma_h"], p["beta_h"]))
            return zoneout * h + (1 - zoneout) * new, c

        return run(step, x, p["recurrent_kernel"].shape[0], 2)

    return oracle


def haste_gru(p: Arrays, x: Any, training: bool) -> Any:
    def step(x: Any, t: int, h: Any) -> Any:
        xz, xr, xg = np.split(ln(x @ p["kernel"], p["gamma"][0]) + p["bias"], 3, -1)
        az, ar, ag = np.split(ln(h @ p["recurrent_kernel"], p["gamma"][1]) + p["recurrent_bias"], 3, -1)
        z = sigmoid(xz + az)
        return (z * h + (1 - z) * np.tanh(xg + sigmoid(xr + ar) * ag),)

    return run(step, x, p["recurrent_kernel"].shape[0])


def tf_contrib(peepholes: bool) -> Any:
    def oracle(p: Arrays, x: Any, training: bool) -> Any:
        def step(x: Any, t: int, h: Any, c: Any) -> Any:
            i, j, f, o = np.split(np.concatenate([x, h], -1) @ p["kernel"], 4, -1)
            i, j, f, o = (
                ln(gate, p[f"{name}/gamma"], p[f"{name}/beta"], 1e-12)
                for gate, name in ((i, "input"), (j, "transform"), (f, "forget"), (o, "output"))
            )
            if peepholes:
                i, f = i + p["w_i_diag"] * c, f + p["w_f_diag"] * c
            c = sigmoid(f + 1.0) * c + sigmoid(i) * np.tanh(j)
            c = ln(c, p["state/gamma"], p["state/beta"], 1e-12)
            if peepholes:
                o = o + p["w_o_diag"] * c
            return sigmoid(o) * np.tanh(c), c

        return run(step, x, p["kernel"].shape[1] // 4, 2)

    return oracle


def tf_addons_lstm(p: Arrays, x: Any, training: bool) -> Any:
    def step(x: Any, t: int, h: Any, c: Any) -> Any:
        a = ln(x @ p["kernel"], p["kernel_norm/gamma"], p["kernel_norm/beta"], 1e-3)
        a = a + ln(h @ p["recurrent_kernel"], p["recurrent_norm/gamma"], p["recurrent_norm/beta"], 1e-3) + p["bias"]
        o, c = lstm_step("ifgo", a, c)
        c = ln(c, p["state_norm/gamma"], p["state_norm/beta"], 1e-3)
        return o * np.tanh(c), c

    return run(step, x, p["recurrent_kernel"].shape[0], 2)


def tf_addons_rnn(p: Arrays, x: Any, training: bool) -> Any:
    def step(x: Any, t: int, h: Any) -> Any:
        return (np.tanh(ln(x @ p["kernel"] + h @ p["recurrent_kernel"], p["layernorm/gamma"]) + p["bias"]),)

    return run(step, x, p["recurrent_kernel"].shape[0])


def kiros_lstm(p: Arrays, x: Any, training: bool) -> Any:
    def step(x: Any, t: int, h: Any, c: Any) -> Any:
        a = ln(x @ p["_W"] + p["_b"], p["_s1"], p["_b1"]) + ln(h @ p["_U"], p["_s2"], p["_b2"]) + p["_b"]
        o, c = lstm_step("ifog", a, c)
        return o * np.tanh(ln(c, p["_s3"], p["_b3"])), c

    return run(step, x, p["_U"].shape[0], 2)


def kiros_gru(p: Arrays, x: Any, training: bool) -> Any:
    def step(x: Any, t: int, h: Any) -> Any:
        gates = ln(h @ p["_U"], p["_s3"], p["_b3"]) + ln(x @ p["_W"] + p["_b"], p["_s1"], p["_b1"])
        r, u = np.split(sigmoid(gates), 2, -1)
        n = np.tanh(r * ln(h @ p["_Ux"], p["_s4"], p["_b4"]) + ln(x @ p["_Wx"] + p["_bx"], p["_s2"], p["_b2"]))
        return (u * h + (1 - u) * n,)

    return run(step, x, p["_Ux"].shape[0])


def supercell(p: Arrays, x: Any, training: bool) -> Any:
    def step(x: Any, t: int, h: Any, c: Any) -> Any:
        a = ln_each(x @ p["W_xh"] + h @ p["W_hh_i"] + p["bias"], 4, p["ln/ln_gamma"], p["ln/ln_beta"], 1e-3)
        o, c = lstm_step("igfo", a, c, forget=1.0)
        return o * np.tanh(ln(c, p["ln_c/ln_gamma"], p["ln_c/ln_beta"], 1e-3)), c

    return run(step, x, p["W_hh_i"].shape[0], 2)


def sonnet_lstm(norm: bool) -> Any:
    def oracle(p: Arrays, x: Any, training: bool) -> Any:
        def step(x: Any, t: int, h: Any, c: Any) -> Any:
            a = np.concatenate([x, h], -1) @ p["w_gates"]
            a = (ln(a, p["layer_norm/gamma"], p["layer_norm/beta"]) if norm else a) + p["b_gates"]
            o, c = lstm_step("igfo", a, c, forget=1.0)
            return o * np.tanh(c), c

        return run(step, x, p["w_gates"].shape[1] // 4, 2)

    return oracle


def icefall_lstm(p: Arrays, x: Any, training: bool) -> Any:
    def step(x: Any, t: int, h: Any, c: Any) -> Any:
        a = x @ p["weight_ih"].T + p["bias_ih"] + h @ p["weight_hh"].T + p["bias_hh"]
        gates = [
            ln(gate, p[f"layernorm_{n}.weight"], p[f"layernorm_{n}.bias"])
            for gate, n in zip(np.split(a, 4, -1), ("i", "f", "cx", "o"), strict=True)
        ]
        o, c = lstm_step("ifgo", np.concatenate(gates, -1), c)
        c = ln(c, p["layernorm_cy.weight"], p["layernorm_cy.bias"])
        return o * np.tanh(c), c

    return run(step, x, p["weight_hh"].shape[1], 2)


def icefall_gru(p: Arrays, x: Any, training: bool) -> Any:
    def step(x: Any, t: int, h: Any) -> Any:
        ir, iz, i_n = np.split(x @ p["weight_ih"].T + p["bias_ih"], 3, -1)
        hr, hz, hn = np.split(h @ p["weight_hh"].T + p["bias_hh"], 3, -1)
        r = sigmoid(ln(ir + hr, p["layernorm_r.weight"], p["layernorm_r.bias"]))
        z = sigmoid(ln(iz + hz, p["layernorm_i.weight"], p["layernorm_i.bias"]))
        n = np.tanh(ln(i_n + r * hn, p["layernorm_n.weight"], p["layernorm_n.bias"]))
        return (n + z * (h - n),)

    return run(step, x, p["weight_hh"].shape[1])


# -- batch normalization -------------------------------------------------------------------------------------------------------------------


def cooijmans(gain: str, bias: str, shift: str) -> Any:
    def oracle(p: Arrays, x: Any, training: bool) -> Any:
        def statistics(name: str, t: int) -> Any:
            return (None, None) if training else tuple(p[f"{name}_{s}"][min(t, len(p["a_mean"]) - 1)] for s in ("mean", "var"))

        def step(x: Any, t: int, h: Any, c: Any) -> Any:
            a = p[gain.format("a")] * bn(h @ p["Wa"], *statistics("a", t)) + p[bias]
            a = a + p[gain.format("b")] * bn(x @ p["Wx"], *statistics("b", t))
            g, f, i, o = np.split(a, 4, -1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            return sigmoid(o) * np.tanh(p[gain.format("c")] * bn(c, *statistics("c", t)) + p[shift]), c

        return run(step, x, p["Wa"].shape[0], 2)

    return oracle


def jihunchoi(p: Arrays, x: Any, training: bool) -> Any:
    t_max = sum(name.startswith("bn_c.running_mean") for name in p)

    def norm(x: Any, name: str, t: int) -> Any:
        t = min(t, t_max - 1)
        given = (None, None) if training else (p[f"{name}.running_mean_{t}"], p[f"{name}.running_var_{t}"])
        return p[f"{name}.weight"] * bn(x, *given) + p[f"{name}.bias"]

    def step(x: Any, t: int, h: Any, c: Any) -> Any:
        a = norm(h @ p["weight_hh"], "bn_hh", t) + norm(x @ p["weight_ih"], "bn_ih", t) + p["bias"]
        f, i, o, g = np.split(a, 4, -1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(norm(c, "bn_c", t)), c

    return run(step, x, p["weight_hh"].shape[0], 2)


def sonnet_batch(everywhere: bool) -> Any:
    def oracle(p: Arrays, x: Any, training: bool) -> Any:
        def norm(x: Any, name: str) -> Any:
            given = [None if training else p[f"batch_norm_{name}/batch_norm/moving_{s}"][0] for s in ("mean", "variance")]
            return bn(x, *given, eps=1e-3)

        def step(x: Any, t: int, h: Any, c: Any) -> Any:
            gx = x @ p["w_gates_X"]
            a = p["gamma_h"] * norm(h @ p["w_gates_H"], "h") + (p["gamma_x"] * norm(gx, "x") if everywhere else gx) + p["b_gates"]
            o, c = lstm_step("igfo", a, c, forget=1.0)
            return o * np.tanh(p["beta_c"] + p["gamma_c"] * norm(c, "c") if everywhere else c), c

        return run(step, x, p["w_gates_H"].shape[0], 2)

    return oracle


# -- the table -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """A format's layer: the shapes that it stores, and what it computes."""

    format: str
    layer: str
    shapes: dict[str, Any]
    oracle: Callable[[Arrays, Any, bool], Any]
    config: dict[str, Any] = field(default_factory=dict)
    training: bool = False
    """Whether training computes something else."""

    def arrays(self, rng: np.random.Generator) -> Arrays:
        def one(name: str, shape: Any) -> Any:
            if "var" in name:
                return rng.uniform(0.3, 1.5, shape)
            gain = any(word in name for word in ("gamma", "_s", "norm", "bn_")) and "weight_" not in name and len(shape) < 3
            return rng.standard_normal(shape) * 0.5 + (1.0 if gain and "beta" not in name and "bias" not in name else 0.0)

        return {name: one(name, (shape,) if isinstance(shape, int) else shape) for name, shape in self.shapes.items()}


D, H, T = 5, 4, 3  # inputs, hidden, steps with statistics of their own


def _kernels(gates: int, kernel: str = "kernel", recurrent: str = "recurrent_kernel") -> dict[str, Any]:
    return {kernel: (D, gates * H), recurrent: (H, gates * H)}


def _torch(gates: int, place: str = "_l0") -> dict[str, Any]:
    return {f"weight_ih{place}": (gates * H, D), f"weight_hh{place}": (gates * H, H)} | {
        f"bias_{s}{place}": gates * H for s in ("ih", "hh")
    }


def _ln(names: str, size: int, gain: str = "weight", shift: str = "bias", sep: str = ".") -> dict[str, Any]:
    return {f"{name}{sep}{p}": size for name in names.split() for p in (gain, shift)}


_COOIJMANS_STATISTICS = {f"{n}_{s}": (T, (1 if n == "c" else 4) * H) for n in "abc" for s in ("mean", "var")}
_TF = _ln("input transform forget output state", H, "gamma", "beta", "/")
_SONNET = {"w_gates_X": (D, 4 * H), "w_gates_H": (H, 4 * H), "b_gates": 4 * H, "gamma_h": 4 * H}
_JOINT = {"w_gates": (D + H, 4 * H), "b_gates": 4 * H}

PUBLISHED = [
    Published("torch", "LSTM", _torch(4), plain_lstm("ifgo", "weight_ih_l0", "weight_hh_l0", ("bias_ih_l0", "bias_hh_l0"), True)),
    Published("torch", "GRU", _torch(3), torch_gru),
    Published("torch", "RNN", _torch(1), plain_rnn("weight_ih_l0", "weight_hh_l0", ("bias_ih_l0", "bias_hh_l0"), True)),
    Published(
        "torch-fastrnns",
        "LSTM",
        {"weight_ih": (4 * H, D), "weight_hh": (4 * H, H)} | _ln("layernorm_i layernorm_h", 4 * H) | _ln("layernorm_c", H),
        lambda p, x, t: fastrnns(p, x, t),
    ),
    Published(
        "torch-fastrnns",
        "LSTM",
        {"weight_ih": (4 * H, D), "weight_hh": (4 * H, H)} | _ln("layernorm_i layernorm_h", 4 * H) | _ln("layernorm_c", H),
        lambda p, x, t: fastrnns(p, x, t, 0.1),
        {"eps": 0.1},
    ),
    Published("torch-fastrnns", "LSTM", _torch(4, ""), plain_lstm("ifgo", "weight_ih", "weight_hh", ("bias_ih", "bias_hh"), True)),
    Published("haste", "LSTM", _kernels(4) | {"bias": 4 * H}, plain_lstm("igfo", "kernel", "recurrent_kernel", ("bias",), False)),
    Published(
        "haste",
        "GRU",
        _kernels(3) | {"bias": 3 * H, "recurrent_bias": 3 * H},
        zrh_gru(lambda p: p["recurrent_bias"], lambda p: p["bias"], True),
    ),
    Published("haste", "LSTM", _kernels(4) | {"bias": 4 * H, "gamma": (2, 4 * H), "gamma_h": H, "beta_h": H}, haste_lstm()),
    Published(
        "haste",
        "LSTM",
        _kernels(4) | {"bias": 4 * H, "gamma": (2, 4 * H), "gamma_h": H, "beta_h": H},
        haste_lstm(0.2),
        {"zoneout": 0.2},
    ),
    Published("haste", "GRU", _kernels(3) | {"bias": 3 * H, "recurrent_bias": 3 * H, "gamma": (2, 3 * H)}, haste_gru),
    Published("tf-contrib", "LSTM", {"kernel": (D + H, 4 * H), **_TF}, tf_contrib(False)),
    Published(
        "tf-contrib",
        "LSTM",
        {"kernel": (D + H, 4 * H), **_TF, "w_f_diag": H, "w_i_diag": H, "w_o_diag": H, "bias": 4 * H},
        tf_contrib(True),
    ),
    Published(
        "tf-addons",
        "LSTM",
        _kernels(4)
        | {"bias": 4 * H}
        | _ln("kernel_norm recurrent_norm", 4 * H, "gamma", "beta", "/")
        | _ln("state_norm", H, "gamma", "beta", "/"),
        tf_addons_lstm,
    ),
    Published("tf-addons", "RNN", _kernels(1) | {"bias": H, "layernorm/gamma": H}, tf_addons_rnn),
    Published("keras", "LSTM", _kernels(4) | {"bias": 4 * H}, plain_lstm("ifgo", "kernel", "recurrent_kernel", ("bias",), False)),
    Published("keras", "GRU", _kernels(3) | {"bias": (2, 3 * H)}, zrh_gru(lambda p: p["bias"][1], lambda p: p["bias"][0], True)),
    Published("keras", "GRU", _kernels(3) | {"bias": 3 * H}, zrh_gru(lambda p: 0.0, lambda p: p["bias"], False)),
    Published("keras", "RNN", _kernels(1) | {"bias": H}, plain_rnn("kernel", "recurrent_kernel", ("bias",))),
    Published(
        "kiros",
        "LSTM",
        _kernels(4, "_W", "_U") | dict.fromkeys(("_b", "_b1", "_b2", "_s1", "_s2"), 4 * H) | {"_b3": H, "_s3": H},
        kiros_lstm,
    ),
    Published(
        "kiros",
        "GRU",
        _kernels(2, "_W", "_U")
        | _kernels(1, "_Wx", "_Ux")
        | dict.fromkeys(("_b", "_b1", "_s1", "_b3", "_s3"), 2 * H)
        | dict.fromkeys(("_bx", "_b2", "_s2", "_b4", "_s4"), H),
        kiros_gru,
    ),
    Published(
        "supercell",
        "LSTM",
        _kernels(4, "W_xh", "W_hh_i") | {"bias": 4 * H, "ln/ln_gamma": 4 * H, "ln/ln_beta": 4 * H, "ln_c/ln_gamma": H, "ln_c/ln_beta": H},
        supercell,
    ),
    Published(
        "cooijmans",
        "LSTM",
        _kernels(4, "Wx", "Wa")
        | {"a_gammas": 4 * H, "b_gammas": 4 * H, "ab_betas": 4 * H, "c_gammas": H, "c_betas": H}
        | _COOIJMANS_STATISTICS,
        cooijmans("{}_gammas", "ab_betas", "c_betas"),
        training=True,
    ),
    Published(
        "cooijmans",
        "LSTM",
        _kernels(4, "Wx", "Wa")
        | {"bn_a.gammas": 4 * H, "bn_b.gammas": 4 * H, "bn_a.betas": 4 * H, "bn_b.betas": 4 * H, "bn_c.gammas": H, "bn_c.betas": H}
        | _COOIJMANS_STATISTICS,
        cooijmans("bn_{}.gammas", "bn_a.betas", "bn_c.betas"),
        training=True,
    ),
    Published(
        "jihunchoi",
        "LSTM",
        _kernels(4, "weight_ih", "weight_hh")
        | {"bias": 4 * H}
        | _ln("bn_ih bn_hh", 4 * H)
        | _ln("bn_c", H)
        | {f"bn_{n}.running_{s}_{t}": (1 if n == "c" else 4) * H for n in ("ih", "hh", "c") for s in ("mean", "var") for t in range(T)},
        jihunchoi,
        training=True,
    ),
    Published("sonnet", "LSTM", _JOINT | _ln("layer_norm", 4 * H, "gamma", "beta", "/"), sonnet_lstm(True)),
    Published("sonnet", "LSTM", _JOINT, sonnet_lstm(False)),
    Published(
        "sonnet",
        "LSTM",
        _SONNET
        | {"gamma_x": 4 * H, "gamma_c": H, "beta_c": H}
        | {f"batch_norm_{n}/batch_norm/moving_{s}": (1, (1 if n == "c" else 4) * H) for n in "hxc" for s in ("mean", "variance")},
        sonnet_batch(True),
        training=True,
    ),
    Published(
        "sonnet",
        "LSTM",
        _SONNET | {f"batch_norm_h/batch_norm/moving_{s}": (1, 4 * H) for s in ("mean", "variance")},
        sonnet_batch(False),
        training=True,
    ),
    Published(
        "icefall",
        "LSTM",
        _torch(4, "") | _ln("layernorm_i layernorm_f layernorm_cx layernorm_o layernorm_cy", H),
        icefall_lstm,
    ),
    Published("icefall", "GRU", _torch(3, "") | _ln("layernorm_r layernorm_i layernorm_n", H), icefall_gru),
]
