"""Cells of libraries in float64, as `tests.oracles` has those of papers and repositories: names and layouts that the library stores, and
what it computes, written as its source writes it."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.oracles import (
    Arrays,
    D,
    H,
    Published,
    bn,
    icefall_gru,
    icefall_lstm,
    ln,
    lstm_step,
    plain_lstm,
    plain_rnn,
    run,
    sigmoid,
    torch_gru,
)


def renamed(oracle: Any, names: dict[str, str]) -> Any:
    """An oracle under other names."""
    return lambda p, x, training: oracle({ours: p[theirs] for ours, theirs in names.items()}, x, training)


def torch_cell(weight: str = "weight", bias: str = "bias") -> dict[str, str]:
    return {f"{ours}_{side}_l0": f"{theirs}_{side}" for ours, theirs in (("weight", weight), ("bias", bias)) for side in ("ih", "hh")}


def torch_shapes(gates: int, place: str = "", weight: str = "weight", bias: str = "bias") -> dict[str, Any]:
    return {f"{weight}_ih{place}": (gates * H, D), f"{weight}_hh{place}": (gates * H, H)} | {
        f"{bias}_{s}{place}": gates * H for s in ("ih", "hh")
    }


def without(oracle: Any, names: tuple[str, ...], rows: int) -> Any:
    """An oracle whose biases are 0."""
    return lambda p, x, training: oracle({**p, **dict.fromkeys(names, np.zeros(rows * H))}, x, training)


def bare(layer: str, place: str) -> Any:
    """torch's cell without biases."""

    def oracle(p: Arrays, x: Any, training: bool) -> Any:
        zeros = {f"bias_{side}_l0": np.zeros(GATES[layer] * H) for side in ("ih", "hh")}
        return TORCH[layer]({**{f"weight_{side}_l0": p[f"weight_{side}{place}"] for side in ("ih", "hh")}, **zeros}, x, training)

    return oracle


def folded(oracle: Any, name: str, g: str, v: str) -> Any:
    """torch's weight normalization of one matrix, along its first axis."""

    def of(p: Arrays, x: Any, training: bool) -> Any:
        return oracle({**p, name: p[g] * p[v] / np.sqrt((p[v] ** 2).sum(1, keepdims=True))}, x, training)

    return of


TORCH = {
    "LSTM": plain_lstm("ifgo", "weight_ih_l0", "weight_hh_l0", ("bias_ih_l0", "bias_hh_l0"), True),
    "GRU": torch_gru,
    "RNN": plain_rnn("weight_ih_l0", "weight_hh_l0", ("bias_ih_l0", "bias_hh_l0"), True),
}
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def one_matrix(layer: str, side: str, legacy: bool) -> Published:
    name = f"weight_{side}_l0"
    g, v = (f"{name}_g", f"{name}_v") if legacy else (f"parametrizations.{name}.original{k}" for k in (0, 1))
    shapes: dict[str, Any] = {n: s for n, s in torch_shapes(GATES[layer], "_l0").items() if n != name}
    shapes |= {g: (GATES[layer] * H, 1), v: (GATES[layer] * H, D if side == "ih" else H)}
    return Published("torch", layer, shapes, folded(TORCH[layer], name, g, v))


# -- one bias, and one inside the reset gate -----------------------------------------------------------------------------------------------


def inner_bias_gru(wx: str, wh: str, b: str, bn: str) -> Any:
    """MLX and equinox: r, z, n with new + z·(h − new)."""

    def oracle(p: Arrays, x: Any, training: bool) -> Any:
        def step(x: Any, t: int, h: Any) -> Any:
            (xr, xz, xn), (hr, hz, hn) = np.split(x @ p[wx].T + p[b], 3, -1), np.split(h @ p[wh].T, 3, -1)
            r, z = sigmoid(xr + hr), sigmoid(xz + hz)
            new = np.tanh(xn + r * (hn + p[bn]))
            return (new + z * (h - new),)

        return run(step, x, p[wh].shape[1])

    return oracle


# -- haiku ---------------------------------------------------------------------------------------------------------------------------------


def joint_lstm(kernel: str, bias: str, forget: float, peepholes: bool = False) -> Any:
    """TensorFlow 1 and haiku: a kernel for [x, h], gates i, g, f, o."""

    def oracle(p: Arrays, x: Any, training: bool) -> Any:
        def step(x: Any, t: int, h: Any, c: Any) -> Any:
            i, g, f, o = np.split(np.concatenate([x, h], -1) @ p[kernel] + p[bias], 4, -1)
            if peepholes:
                i, f = i + p["lstm_cell/w_i_diag"] * c, f + p["lstm_cell/w_f_diag"] * c
            c = sigmoid(f + forget) * c + sigmoid(i) * np.tanh(g)
            if peepholes:
                o = o + p["lstm_cell/w_o_diag"] * c
            return sigmoid(o) * np.tanh(c), c

        return run(step, x, p[kernel].shape[1] // 4, 2)

    return oracle


def haiku_gru(p: Arrays, x: Any, training: bool) -> Any:
    def step(x: Any, t: int, h: Any) -> Any:
        xz, xr, xa = np.split(x @ p["gru/w_i"], 3, -1)
        wz, wr, wa = np.split(p["gru/w_h"], 3, -1)
        bz, br, ba = np.split(p["gru/b"], 3)
        z, r = sigmoid(xz + h @ wz + bz), sigmoid(xr + h @ wr + br)
        a = np.tanh(xa + (r * h) @ wa + ba)
        return ((1 - z) * h + z * a,)

    return run(step, x, H)


def haiku_rnn(double_bias: bool) -> Any:
    def oracle(p: Arrays, x: Any, training: bool) -> Any:
        bias = p["vanilla_rnn/linear/b"] + (p["vanilla_rnn/linear_1/b"] if double_bias else 0.0)
        w, u = p["vanilla_rnn/linear/w"], p["vanilla_rnn/linear_1/w"]
        return run(lambda x, t, h: (np.maximum(x @ w + h @ u + bias, 0.0),), x, H)

    return oracle


# -- TensorFlow 1 --------------------------------------------------------------------------------------------------------------------------


def tensorflow_gru(kernel: str, bias: str) -> Any:
    def oracle(p: Arrays, x: Any, training: bool) -> Any:
        def step(x: Any, t: int, h: Any) -> Any:
            gates = sigmoid(np.concatenate([x, h], -1) @ p[f"gru_cell/gates/{kernel}"] + p[f"gru_cell/gates/{bias}"])
            r, u = np.split(gates, 2, -1)
            c = np.tanh(np.concatenate([x, r * h], -1) @ p[f"gru_cell/candidate/{kernel}"] + p[f"gru_cell/candidate/{bias}"])
            return (u * h + (1 - u) * c,)

        return run(step, x, H)

    return oracle


def tensorflow_rnn(p: Arrays, x: Any, training: bool) -> Any:
    kernel, bias = p["basic_rnn_cell/kernel"], p["basic_rnn_cell/bias"]
    return run(lambda x, t, h: (np.tanh(np.concatenate([x, h], -1) @ kernel + bias),), x, H)


# -- speechbrain ---------------------------------------------------------------------------------------------------------------------------


def li_gru(batch: bool) -> Any:
    """Gates a, z."""

    def oracle(p: Arrays, x: Any, training: bool) -> Any:
        w = x @ p["rnn.0.w.weight"].T
        if batch:
            flat = w.reshape(-1, w.shape[-1])
            mean, var = (flat.mean(0), flat.var(0)) if training else (p["rnn.0.norm.running_mean"], p["rnn.0.norm.running_var"])
            w = bn(w, mean, var) * p["rnn.0.norm.weight"] + p["rnn.0.norm.bias"]
        else:
            w = ln(w, p["rnn.0.norm.weight"], p["rnn.0.norm.bias"])

        def step(xt: Any, t: int, h: Any) -> Any:
            a, z = np.split(w[t] + h @ p["rnn.0.u.weight"].T, 2, -1)
            z = sigmoid(z)
            return (z * h + (1 - z) * np.maximum(a, 0),)

        return run(step, x, H)

    return oracle


# -- madmom --------------------------------------------------------------------------------------------------------------------------------


def madmom_gate(p: Arrays, name: str, x: Any, h: Any, c: Any = 0.0) -> Any:
    a = x @ p[f"{name}/weights"] + p[f"{name}/bias"] + h @ p[f"{name}/recurrent_weights"]
    return a + c * p[f"{name}/peephole_weights"] if f"{name}/peephole_weights" in p else a


def madmom_lstm(p: Arrays, x: Any, training: bool) -> Any:
    def step(x: Any, t: int, h: Any, c: Any) -> Any:
        i, f = (sigmoid(madmom_gate(p, name, x, h, c)) for name in ("input_gate", "forget_gate"))
        c = np.tanh(madmom_gate(p, "cell", x, h)) * i + c * f
        return np.tanh(c) * sigmoid(madmom_gate(p, "output_gate", x, h, c)), c

    return run(step, x, H, 2)


def madmom_gru(p: Arrays, x: Any, training: bool) -> Any:
    def step(x: Any, t: int, h: Any) -> Any:
        r, u = (sigmoid(madmom_gate(p, name, x, h)) for name in ("reset_gate", "update_gate"))
        n = np.tanh(x @ p["cell/weights"] + p["cell/bias"] + r * (h @ p["cell/recurrent_weights"]))
        return (u * n + (1 - u) * h,)

    return run(step, x, H)


def madmom_shapes(*gates: str, peepholes: bool = False) -> dict[str, Any]:
    found: dict[str, Any] = {f"{gate}/{name}": (size, H) for gate in gates for name, size in (("weights", D), ("recurrent_weights", H))}
    found |= {f"{gate}/bias": H for gate in gates}
    return found | ({f"{gate}/peephole_weights": H for gate in gates if gate != "cell"} if peepholes else {})


# -- thinc ---------------------------------------------------------------------------------------------------------------------------------


def thinc_lstm(p: Arrays, x: Any, training: bool) -> Any:
    """Input matrix, its bias, hidden matrix, its bias; gates f, i, o, g."""
    wx, bx, wh, bh = np.split(p["LSTM"], np.cumsum([4 * H * D, 4 * H, 4 * H * H]))
    wx, wh = wx.reshape(4 * H, D), wh.reshape(4 * H, H)

    def step(x: Any, t: int, h: Any, c: Any) -> Any:
        o, c = lstm_step("fiog", x @ wx.T + bx + h @ wh.T + bh, c)
        return o * np.tanh(c), c

    return run(step, x, H, 2)


# -- icefall -------------------------------------------------------------------------------------------------------------------------------

_LSTM_NORMS = {f"layernorm_{n}.{p}": H for n in ("i", "f", "cx", "o", "cy") for p in ("weight", "bias")}
_GRU_NORMS = {f"layernorm_{n}.{p}": H for n in ("r", "i", "n") for p in ("weight", "bias")}
_BIASES = ("bias_ih", "bias_hh")
P = 2  # outputs of a projection


def icefall_projected(bias: bool) -> Any:
    def oracle(p: Arrays, x: Any, training: bool) -> Any:
        biases = p["bias_ih"] + p["bias_hh"] if bias else 0.0

        def step(x: Any, t: int, h: Any, c: Any) -> Any:
            gates = np.split(x @ p["weight_ih"].T + h @ p["weight_hh"].T + biases, 4, -1)
            normed = [
                ln(a, p[f"layernorm_{n}.weight"], p[f"layernorm_{n}.bias"]) for a, n in zip(gates, ("i", "f", "cx", "o"), strict=True)
            ]
            o, c = lstm_step("ifgo", np.concatenate(normed, -1), c)
            c = ln(c, p["layernorm_cy.weight"], p["layernorm_cy.bias"])
            return (o * np.tanh(c)) @ p["weight_hr"].T, c

        state, ys = (np.zeros((x.shape[1], P)), np.zeros((x.shape[1], H))), []
        for t in range(x.shape[0]):
            state = step(x[t], t, *state)
            ys.append(state[0])
        return np.stack(ys)

    return oracle


# -- keras-layernorm-rnn -------------------------------------------------------------------------------------------------------------------


def keras_layernorm_lstm(p: Arrays, x: Any, training: bool) -> Any:
    """Gates are clip(0.2·a + 0.5, 0, 1), that package's default."""

    def step(x: Any, t: int, h: Any, c: Any) -> Any:
        net = np.split(x @ p["kernel"] + h @ p["recurrent_kernel"], 4, -1)
        gammas = [p[f"layer_normalization{n}/gamma"] for n in ("", "_1", "_2", "_3")]
        i, f, g, o = (ln(a, gamma) + b for a, gamma, b in zip(net, gammas, np.split(p["bias"], 4), strict=True))
        i, f, o = (np.clip(0.2 * a + 0.5, 0.0, 1.0) for a in (i, f, o))
        c = f * c + i * np.tanh(g)
        return o * np.tanh(c), c

    return run(step, x, H, 2)


def keras_layernorm_rnn(p: Arrays, x: Any, training: bool) -> Any:
    def step(x: Any, t: int, h: Any) -> Any:
        return (np.tanh(ln(x @ p["kernel"] + h @ p["recurrent_kernel"], p["layer_normalization/gamma"]) + p["bias"]),)

    return run(step, x, H)


# -- haste ---------------------------------------------------------------------------------------------------------------------------------


def indrnn(norm: bool) -> Any:
    def oracle(p: Arrays, x: Any, training: bool) -> Any:
        u = x @ p["kernel"]
        u = (ln(u, p["gamma"][0]) if norm else u) + p["bias"]
        return run(lambda xt, t, h: (np.tanh(u[t] + p["recurrent_scale"] * h),), x, H)

    return oracle


# -- the table -----------------------------------------------------------------------------------------------------------------------------


def _unbiased(shapes: dict[str, Any]) -> dict[str, Any]:
    return {name: shape for name, shape in shapes.items() if "bias" not in name or "norm" in name}


_PROJECTED: dict[str, Any] = {**torch_shapes(4), "weight_hh": (4 * H, P), "weight_hr": (P, H), **_LSTM_NORMS}
_JOINT = {"kernel": (D + H, 4 * H), "bias": 4 * H}
_HAIKU_RNN: dict[str, Any] = {"vanilla_rnn/linear/w": (D, H), "vanilla_rnn/linear/b": H, "vanilla_rnn/linear_1/w": (H, H)}
_LI_GRU: dict[str, Any] = {"rnn.0.w.weight": (2 * H, D), "rnn.0.u.weight": (2 * H, H), "rnn.0.norm.weight": 2 * H, "rnn.0.norm.bias": 2 * H}
_LSTM_GATES, _GRU_GATES = ("input_gate", "forget_gate", "cell", "output_gate"), ("reset_gate", "update_gate", "cell")

LIBRARY_CELLS = [
    *(Published("torch", layer, torch_shapes(GATES[layer]), renamed(TORCH[layer], torch_cell())) for layer in GATES),
    *(
        Published("torch", layer, _unbiased(torch_shapes(GATES[layer], place)), bare(layer, place))
        for layer in GATES
        for place in ("", "_l0")
    ),
    *(Published("torch", layer, torch_shapes(GATES[layer], "", "w", "b"), renamed(TORCH[layer], torch_cell("w", "b"))) for layer in GATES),
    *(one_matrix(layer, side, legacy) for layer in GATES for side in ("ih", "hh") for legacy in (True, False)),
    Published("icefall", "LSTM", _unbiased(torch_shapes(4)) | _LSTM_NORMS, without(icefall_lstm, _BIASES, 4)),
    Published("icefall", "GRU", _unbiased(torch_shapes(3)) | _GRU_NORMS, without(icefall_gru, _BIASES, 3)),
    Published("icefall", "LSTM", _PROJECTED, icefall_projected(True)),
    Published("icefall", "LSTM", _unbiased(_PROJECTED), icefall_projected(False)),
    Published("mlx", "LSTM", {"Wx": (4 * H, D), "Wh": (4 * H, H), "bias": 4 * H}, plain_lstm("ifgo", "Wx", "Wh", ("bias",), True)),
    Published("mlx", "LSTM", {"Wx": (4 * H, D), "Wh": (4 * H, H)}, plain_lstm("ifgo", "Wx", "Wh", (), True)),
    Published("mlx", "GRU", {"Wx": (3 * H, D), "Wh": (3 * H, H), "b": 3 * H, "bhn": H}, inner_bias_gru("Wx", "Wh", "b", "bhn")),
    Published("mlx", "RNN", {"Wxh": (H, D), "Whh": (H, H), "bias": H}, plain_rnn("Wxh", "Whh", ("bias",), True)),
    Published("mlx", "RNN", {"Wxh": (H, D), "Whh": (H, H)}, plain_rnn("Wxh", "Whh", (), True)),
    Published(
        "equinox",
        "LSTM",
        {"weight_ih": (4 * H, D), "weight_hh": (4 * H, H), "bias": 4 * H},
        plain_lstm("ifgo", "weight_ih", "weight_hh", ("bias",), True),
    ),
    Published(
        "equinox",
        "GRU",
        {"weight_ih": (3 * H, D), "weight_hh": (3 * H, H), "bias": 3 * H, "bias_n": H},
        inner_bias_gru("weight_ih", "weight_hh", "bias", "bias_n"),
    ),
    Published(
        "haiku", "LSTM", {"lstm/linear/w": (D + H, 4 * H), "lstm/linear/b": 4 * H}, joint_lstm("lstm/linear/w", "lstm/linear/b", 1.0)
    ),
    Published("haiku", "GRU", {"gru/w_i": (D, 3 * H), "gru/w_h": (H, 3 * H), "gru/b": 3 * H}, haiku_gru),
    Published("haiku", "RNN", {**_HAIKU_RNN, "vanilla_rnn/linear_1/b": H}, haiku_rnn(True)),
    Published("haiku", "RNN", _HAIKU_RNN, haiku_rnn(False)),
    *(Published("paddle", layer, torch_shapes(GATES[layer], "_l0"), TORCH[layer]) for layer in GATES),
    *(
        Published(
            "tensorflow",
            "LSTM",
            {f"{cell}/{name}": shape for name, shape in _JOINT.items()},
            joint_lstm(f"{cell}/kernel", f"{cell}/bias", forget),
        )
        for cell, forget in (("basic_lstm_cell", 1.0), ("lstm_cell", 1.0), ("cudnn_compatible_lstm_cell", 0.0))
    ),
    Published(
        "tensorflow",
        "LSTM",
        {f"lstm_cell/{name}": shape for name, shape in _JOINT.items()} | {f"lstm_cell/w_{gate}_diag": H for gate in "ifo"},
        joint_lstm("lstm_cell/kernel", "lstm_cell/bias", 1.0, peepholes=True),
    ),
    *(
        Published(
            "tensorflow",
            "GRU",
            {
                f"gru_cell/{part}/{name}": shape
                for part, width in (("gates", 2 * H), ("candidate", H))
                for name, shape in ((kernel, (D + H, width)), (bias, width))
            },
            tensorflow_gru(kernel, bias),
        )
        for kernel, bias in (("kernel", "bias"), ("weights", "biases"))
    ),
    Published("tensorflow", "RNN", {"basic_rnn_cell/kernel": (D + H, H), "basic_rnn_cell/bias": H}, tensorflow_rnn),
    Published(
        "speechbrain", "GRU", {**_LI_GRU, "rnn.0.norm.running_mean": 2 * H, "rnn.0.norm.running_var": 2 * H}, li_gru(True), training=True
    ),
    Published("speechbrain", "GRU", _LI_GRU, li_gru(False)),
    Published("haste", "RNN", {"kernel": (D, H), "recurrent_scale": H, "bias": H}, indrnn(False)),
    Published(
        "keras-layernorm-rnn",
        "RNN",
        {"kernel": (D, H), "recurrent_kernel": (H, H), "bias": H, "layer_normalization/gamma": H},
        keras_layernorm_rnn,
    ),
    Published("haste", "RNN", {"kernel": (D, H), "recurrent_scale": H, "bias": H, "gamma": (2, H)}, indrnn(True)),
    Published(
        "keras-layernorm-rnn",
        "LSTM",
        {
            "kernel": (D, 4 * H),
            "recurrent_kernel": (H, 4 * H),
            "bias": 4 * H,
            **{f"layer_normalization{n}/gamma": H for n in ("", "_1", "_2", "_3")},
        },
        keras_layernorm_lstm,
    ),
    Published("madmom", "LSTM", madmom_shapes(*_LSTM_GATES), madmom_lstm),
    Published("madmom", "LSTM", madmom_shapes(*_LSTM_GATES, peepholes=True), madmom_lstm),
    Published("madmom", "GRU", madmom_shapes(*_GRU_GATES), madmom_gru),
    Published(
        "madmom",
        "RNN",
        {"weights": (D, H), "recurrent_weights": (H, H), "bias": H},
        plain_rnn("weights", "recurrent_weights", ("bias",)),
    ),
]
THINC = Published("thinc", "LSTM", {"LSTM": 4 * H * (D + H + 2), "HC0": (2, 1, 1, H)}, thinc_lstm)
"""Apart from the others, since its one vector has everything, and its first states have to be 0."""
