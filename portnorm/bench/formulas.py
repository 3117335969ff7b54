"""What the peers write out alike: normalizations and cells, over what each library calls its functions.

A library's own operators stand in its own file (`peer_*.py`); here is what it has none for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from portnorm.bench.works import CELLS, GROUPS, Work


class Functions(NamedTuple):
    """What a library calls them."""

    split: Callable[[Any, int], Any]  # into so many parts along the last axis
    concat: Callable[[Any], Any]  # along the last axis
    sigmoid: Callable[[Any], Any]
    tanh: Callable[[Any], Any]
    norm: Callable[[Any, Any], Any]  # (a − μ) / sqrt(σ² + ε) over an axis, or several


def normalization(work: Work, lib: Functions, x: Any, p: Any) -> Any:
    """Layer, batch or group normalization, with its parameters."""
    if work.what == "LN":
        return lib.norm(x, -1) * p["weight"] + p["bias"]
    weight, bias = (p[name].reshape((-1, 1, 1)) for name in ("weight", "bias"))
    if work.what == "BN":
        return lib.norm(x, (0, 2, 3)) * weight + bias
    return lib.norm(x.reshape(x.shape[0], GROUPS, -1), -1).reshape(x.shape) * weight + bias


def input_term(work: Work, lib: Functions, p: Any, x: Any) -> Any:
    """Of all steps at once, with all that is added late."""
    u = x @ p["weight_ih_l0"].T
    axis = {"layer": -1, "batch": 1}.get(CELLS[work.what][1] or "")
    u = u if axis is None else _normalized(work, lib, u, axis) * p["norm_ih_l0.weight"]
    late = ("bias_l0", "bias_ih_l0", "norm_ih_l0.bias", *(() if "GRU" in work.what else ("bias_hh_l0", "norm_hh_l0.bias")))
    return sum((p[name] for name in late if name in p), u)


def cell(work: Work, lib: Functions, p: Any, u: Any, state: Any) -> Any:
    """One step: the new state, of which the first is the output."""
    axis, h = {"layer": -1, "batch": 0}.get(CELLS[work.what][1] or ""), state[0]
    a = h @ p["weight_hh_l0"].T
    if "GRU" in work.what:
        a = a + p["bias_hh_l0"] if axis is None else _normalized(work, lib, a, axis) * p["norm_hh_l0.weight"] + p["norm_hh_l0.bias"]
        (r, z, n), (ar, az, an) = lib.split(u, 3), lib.split(a, 3)
        r, z = lib.sigmoid(r + ar), lib.sigmoid(z + az)
        n = lib.tanh(n + r * an)
        return (n + z * (h - n),)
    a = a if axis is None else _normalized(work, lib, a, axis) * p["norm_hh_l0.weight"]
    i, f, g, o = lib.split(u + a, 4)
    c = lib.sigmoid(f) * state[1] + lib.sigmoid(i) * lib.tanh(g)
    inside = c if axis is None else lib.norm(c, axis) * p["norm_c_l0.weight"] + p["norm_c_l0.bias"]
    return lib.sigmoid(o) * lib.tanh(inside), c


def _normalized(work: Work, lib: Functions, a: Any, axis: int) -> Any:
    """The GRU of Ba et al. 2016 normalizes the candidate apart from the gates."""
    if work.what != "LN-GRU":
        return lib.norm(a, axis)
    gates = 2 * work.hidden
    return lib.concat([lib.norm(a[..., :gates], axis), lib.norm(a[..., gates:], axis)])
