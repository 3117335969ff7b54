"""Nodes of an ONNX model, as `portnorm.checkpoint.containers` names their inputs."""

from __future__ import annotations

from dataclasses import replace

from portnorm.checkpoint.formats.row import Row, rows, whole, without


def onnx_rows() -> list[Row]:
    found = []
    for operator, gates, reset in (("LSTM", "iofg", "after"), ("GRU", "zrn", "after"), ("GRU", "zrn", "before"), ("RNN", "h", "after")):
        hidden = "R before reset" if reset == "before" else "R"
        reads = {"weight_ih": rows("W"), "weight_hh": rows(hidden), "bias_ih": rows("Wb"), "bias_hh": rows("Rb")}
        row = Row("onnx", operator, reads, None, gates, ((f"{operator}/0/", f"{operator}/1/"),), {"reset": reset})
        row = replace(row, first={"initial_h": "h0", "initial_c": "c0"} if operator == "LSTM" else {"initial_h": "h0"})
        kinds = [row]
        if operator == "LSTM":
            seen = {"peephole": whole("P", then=lambda p: p.reshape(3, -1)[[0, 2, 1]])}
            kinds.append(replace(row, reads={**reads, **seen}, changes={"reset": reset, "peepholes": True}))
        found += [kind for one in kinds for kind in (one, without(one, "bias_ih", "bias_hh", biases=()))]
    affine = {"weight": whole("scale"), "bias": whole("bias")}
    statistics = {"running_mean": whole("mean"), "running_var": whole("var")}
    for operator, layer, norm_reads, config in (
        ("BatchNormalization", "BatchNorm", {**affine, **statistics}, {"unbiased": False}),
        ("LayerNormalization", "LayerNorm", affine, {}),
        ("LayerNormalization", "LayerNorm", {"weight": whole("scale")}, {"bias": False}),
        ("InstanceNormalization", "InstanceNorm", affine, {"affine": True}),
        ("GroupNormalization", "GroupNorm", affine, {}),
        ("RMSNormalization", "RMSNorm", {"weight": whole("scale")}, {}),
    ):
        found.append(Row("onnx", layer, norm_reads, places=((f"{operator}/",),), config=config))
    return found
