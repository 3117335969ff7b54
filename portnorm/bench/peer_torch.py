"""torch: its own operators and modules where it has them, else its functions; and `torch.compile`, but for loops over time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from portnorm.bench.formulas import Functions, cell, input_term
from portnorm.bench.works import CELLS, EPS, GROUPS, Arrays, Run, Work


def make(work: Work, data: Arrays) -> Run | None:
    return {"norm": _norm, "sequence": _sequence}[work.room](work, data)


def compiled(work: Work, data: Arrays) -> Run | None:
    return _norm(work, data, compiled=True) if work.room == "norm" else None


@functools.cache
def _functions() -> Functions:
    import torch

    def norm(a: Any, axis: Any) -> Any:
        if axis == -1:
            return torch.nn.functional.layer_norm(a, a.shape[-1:], eps=EPS)
        d = a - a.mean(axis, keepdim=True)
        return d * torch.rsqrt((d * d).mean(axis, keepdim=True) + EPS)

    return Functions(
        split=lambda a, n: a.chunk(n, -1), concat=lambda parts: torch.cat(parts, -1), sigmoid=torch.sigmoid, tanh=torch.tanh, norm=norm
    )


def _tensors(work: Work, data: Arrays) -> tuple[Any, Any, dict[str, Any]]:
    """x, dy, and the parameters."""
    import torch

    p = {name: torch.tensor(value, requires_grad=work.backward and name != "dy") for name, value in data.items()}
    return p.pop("x"), p.pop("dy"), p


def _run(work: Work, forward: Callable[[], Any], x: Any, dy: Any, p: dict[str, Any]) -> Run:
    import torch

    def inference() -> Any:
        with torch.no_grad():
            return (forward(),)

    def both() -> Any:
        for leaf in (x, *p.values()):
            leaf.grad = None
        y = forward()
        y.backward(dy)
        return y.detach(), x.grad

    return both if work.backward else inference


def _norm(work: Work, data: Arrays, compiled: bool = False) -> Run:
    import torch

    functional, (x, dy, p) = torch.nn.functional, _tensors(work, data)
    own: dict[str, Any] = {
        "LN": lambda: functional.layer_norm(x, x.shape[-1:], p["weight"], p["bias"], EPS),
        "BN": lambda: functional.batch_norm(x, None, None, p["weight"], p["bias"], True, eps=EPS),
        "GN": lambda: functional.group_norm(x, GROUPS, p["weight"], p["bias"], EPS),
    }
    return _run(work, torch.compile(own[work.what]) if compiled else own[work.what], x, dy, p)


def _sequence(work: Work, data: Arrays) -> Run:
    import torch

    lib, (x, dy, p) = _functions(), _tensors(work, data)
    if CELLS[work.what][1] is None:
        layer = getattr(torch.nn, work.what)(*work.shape[2:]).to(x.dtype)
        layer.load_state_dict({name: value.detach() for name, value in p.items()})
        return _run(work, lambda: layer(x)[0], x, dy, dict(layer.named_parameters()))

    def forward() -> Any:
        state: Any = (x.new_zeros(x.shape[1], work.hidden),) * work.states
        outputs = []
        for u in input_term(work, lib, p, x).unbind(0):
            state = cell(work, lib, p, u, state)
            outputs.append(state[0])
        return torch.stack(outputs)

    return _run(work, forward, x, dy, p)
