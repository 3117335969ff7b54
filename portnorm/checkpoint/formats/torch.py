"""torch.nn: its recurrent layers, also with weight normalization or a projection, its norms, its linear layer."""

from __future__ import annotations

from dataclasses import replace

import numpy

from portnorm.checkpoint.formats.row import OUR_GATES, Read, Row, norms, rows, tracking, whole, without

_TORCH_PLACES = (("_l{l}", "_l{l}_reverse"),)
_TORCH = {f"{kind}_{side}": rows(f"{kind}_{side}{{p}}") for kind in ("weight", "bias") for side in ("ih", "hh")}
BIASES = ("bias_ih", "bias_hh")


def torch_rows() -> list[Row]:
    found = []
    for layer, gates in OUR_GATES.items():
        plain = Row("torch", layer, _TORCH, None, gates, _TORCH_PLACES)
        found += [plain, without(plain, *BIASES, biases=())]
        if layer == "LSTM":
            projected = replace(plain, reads={**_TORCH, "weight_hr": Read(("weight_hr{p}",), by_gate=False)})
            found += [projected, without(projected, *BIASES, biases=())]
        for g, v in (("{w}_g", "{w}_v"), ("parametrizations.{w}.original0", "parametrizations.{w}.original1")):
            normed = {name: read for name, read in _TORCH.items() if name.startswith("bias")}
            for side in ("ih", "hh"):
                w = f"weight_{side}{{p}}"
                normed |= {f"weight_{side}.{part}": rows(key.replace("{w}", w)) for part, key in (("g", g), ("v", v))}
            found.append(Row("torch", layer, normed, "weight", gates, _TORCH_PLACES))
    linear = Row("torch", "Linear", {"weight": whole("weight"), "bias": whole("bias")})
    names = {"gain": "weight", "shift": "bias", "mean": "running_mean", "var": "running_var", "rms": "weight"}
    batch = {"eps": 1e-5, "momentum": 0.1, "unbiased": True}
    normalizing = norms("torch", names, 1e-5, _rms_eps, batch, 1)
    instance = [tracking(row) for row in normalizing if row.layer == "BatchNorm"]
    return [*found, linear, without(linear, "bias"), *normalizing, *instance]


def _rms_eps(dtype: str) -> float:
    """That of torch's RMSNorm without an `eps`: of the type that it computes in."""
    return float(numpy.finfo("float64" if dtype == "float64" else "float32").eps)
