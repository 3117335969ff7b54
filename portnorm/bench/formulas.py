"""What the peers write out alike: normalizations and cells, over what each library calls its functions.

A library's own operators stand in its own file (`peer_*.py`); here is what it has none for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from portnorm.bench.works import CELLS, EPS, GROUPS, Work


class Functions(NamedTuple):
    """What a library calls them."""

    linear: Callable[[Any, Any], Any]  # times weights, however the library keeps them
    split: Callable[[Any, int], Any]  # into so many parts along the last axis
    concat: Callable[[Any], Any]  # along the last axis
    sigmoid: Callable[[Any], Any]
    tanh: Callable[[Any], Any]
    rsqrt: Callable[[Any], Any]
    where: Callable[[Any, Any, Any], Any]
    norm: Callable[[Any, Any], Any]  # (a − μ) / sqrt(σ² + ε) over an axis, or several


def normalization(work: Work, lib: Functions, x: Any, p: Any) -> Any:
    """Layer, batch or group normalization; `p` has its parameters, and the mask (time, batch, 1) or the statistics that are given."""
    if work.what == "LN":
        return lib.norm(x, -1) * p["weight"] + p["bias"]
    if work.kind == "with mask":
        mask = p["mask"]
        return (_masked(lib, x, (0, 1), mask) * p["weight"] + p["bias"]) * mask
    along = (-1, 1, 1)
    if work.kind == "with statistics":
        scale = p["weight"] * lib.rsqrt(p["var"] + EPS)
        return x * scale.reshape(along) + (p["bias"] - p["mean"] * scale).reshape(along)
    found = lib.norm(x, (0, 2, 3)) if work.what == "BN" else lib.norm(x.reshape(x.shape[0], GROUPS, -1), -1).reshape(x.shape)
    return found * p["weight"].reshape(along) + p["bias"].reshape(along)


def input_term(work: Work, lib: Functions, p: Any, x: Any, mask: Any = None) -> Any:
    """Of all steps at once, with all that is added late; `mask` (time, batch, 1) is 1 where a sequence has not ended."""
    u = lib.linear(x, p["weight_ih_l0"])
    norm = CELLS[work.what][1]
    u = u if norm is None else _normalized(work, lib, u, 1, mask) * p["norm_ih_l0.weight"]
    late = ("bias_l0", "bias_ih_l0", "norm_ih_l0.bias", *(() if "GRU" in work.what else ("bias_hh_l0", "norm_hh_l0.bias")))
    return sum((p[name] for name in late if name in p), u)


def cell(work: Work, lib: Functions, p: Any, u: Any, state: Any, mask: Any = None) -> Any:
    """One step: the new state, of which the first is the output. Where `mask` (batch, 1) is 0 the state stays."""
    norm, h = CELLS[work.what][1], state[0]
    a = lib.linear(h, p["weight_hh_l0"])
    if "GRU" in work.what:
        a = a + p["bias_hh_l0"] if norm is None else _normalized(work, lib, a, 0, mask) * p["norm_hh_l0.weight"] + p["norm_hh_l0.bias"]
        (r, z, n), (ar, az, an) = lib.split(u, 3), lib.split(a, 3)
        r, z = lib.sigmoid(r + ar), lib.sigmoid(z + az)
        n = lib.tanh(n + r * an)
        new: tuple[Any, ...] = (n + z * (h - n),)
    else:
        a = a if norm is None else _normalized(work, lib, a, 0, mask) * p["norm_hh_l0.weight"]
        i, f, g, o = lib.split(u + a, 4)
        c = lib.sigmoid(f) * state[1] + lib.sigmoid(i) * lib.tanh(g)
        inside = c if norm is None else _normalized(work, lib, c, 0, mask) * p["norm_c_l0.weight"] + p["norm_c_l0.bias"]
        new = lib.sigmoid(o) * lib.tanh(inside), c
    return new if mask is None else tuple(lib.where(mask > 0, a, b) for a, b in zip(new, state, strict=True))


def _normalized(work: Work, lib: Functions, a: Any, batch: int, mask: Any) -> Any:
    """Over the features, or over the axis of the batch. The GRU of Ba et al. 2016 normalizes the candidate apart from the gates."""
    if CELLS[work.what][1] == "batch":
        return lib.norm(a, batch) if mask is None else _masked(lib, a, batch, mask)
    if work.what != "LN-GRU":
        return lib.norm(a, -1)
    gates = 2 * work.hidden
    return lib.concat([lib.norm(a[..., :gates], -1), lib.norm(a[..., gates:], -1)])


def _masked(lib: Functions, a: Any, axis: Any, mask: Any) -> Any:
    """`norm` over what counts, and 0 elsewhere."""
    count = mask.sum(axis=axis, keepdims=True)
    d = (a - (a * mask).sum(axis=axis, keepdims=True) / count) * mask
    return d * lib.rsqrt((d * d).sum(axis=axis, keepdims=True) / count + EPS)
