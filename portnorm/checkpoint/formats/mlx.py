"""mlx.nn: its recurrent layers, one direction each, and its norms, whose channels come last."""

from __future__ import annotations

from dataclasses import replace

from portnorm.checkpoint.formats.row import Row, candidate, norms, rows, whole, without


def mlx_rows() -> list[Row]:
    """`GroupNorm` is not among them: by default it puts channel c into group c mod groups, which no file tells from neighbours."""
    weights = {"weight_ih": rows("Wx"), "weight_hh": rows("Wh")}
    lstm = Row("mlx", "LSTM", {**weights, "bias": rows("bias")}, None, "ifgo", changes={"biases": ("bias",)})
    gru = Row("mlx", "GRU", {**weights, "bias_ih": rows("b"), "bias_hh": candidate("bhn")}, None, "rzn")
    simple = {"weight_ih": rows("Wxh"), "weight_hh": rows("Whh"), "bias": rows("bias")}
    rnn = Row("mlx", "RNN", simple, None, "h", changes={"biases": ("bias",)})
    names = {"gain": "weight", "shift": "bias", "mean": "running_mean", "var": "running_var", "rms": "weight"}
    batch = {"eps": 1e-5, "momentum": 0.1, "unbiased": True}
    linear = Row("mlx", "Linear", {"weight": whole("weight"), "bias": whole("bias")}, auto=False)
    return [
        lstm,
        without(lstm, "bias", biases=()),
        gru,
        without(gru, "bias_ih", "bias_hh", biases=()),
        rnn,
        without(rnn, "bias", biases=()),
        linear,
        without(linear, "bias"),
        Row("mlx", "Embedding", {"weight": whole("weight")}, auto=False, asked=True),
        *(replace(row, auto=False) for row in norms("mlx", names, 1e-5, 1e-5, batch, -1) if row.layer != "GroupNorm"),
    ]
