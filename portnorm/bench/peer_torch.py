"""torch: its own operators and modules where it has them, else its functions; and `torch.compile`, but for loops over time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from portnorm.bench.formulas import Functions, cell, input_term, normalization
from portnorm.bench.works import ADAM, CELLS, EPS, GROUPS, RATE, UPDATES, Arrays, Run, Work, parameters


def make(work: Work, data: Arrays, compiled: bool = False) -> Run | None:
    return {"norm": _norm, "sequence": _sequence, "step": _step, "update": _update}[work.room](work, data, compiled)


def compiled(work: Work, data: Arrays) -> Run | None:
    """Compiled for this work alone: of a function that has met other shapes torch makes one for all, and after eight it makes none."""
    import torch

    torch.compiler.reset()
    return None if work.room == "sequence" else make(work, data, compiled=True)


@functools.cache
def _functions() -> Functions:
    import torch

    def norm(a: Any, axis: Any) -> Any:
        if axis == -1:
            return torch.nn.functional.layer_norm(a, a.shape[-1:], eps=EPS)
        d = a - a.mean(axis, keepdim=True)
        return d * torch.rsqrt((d * d).mean(axis, keepdim=True) + EPS)

    return Functions(
        linear=lambda a, w: a @ w.T,
        split=lambda a, n: a.chunk(n, -1),
        concat=lambda parts: torch.cat(parts, -1),
        sigmoid=torch.sigmoid,
        tanh=torch.tanh,
        rsqrt=torch.rsqrt,
        where=torch.where,
        norm=norm,
    )


def _tensors(work: Work, data: Arrays) -> tuple[dict[str, Any], dict[str, Any]]:
    """What comes in, and the parameters."""
    import torch

    p = {name: torch.tensor(a, requires_grad=work.backward) for name, a in parameters(data).items()}
    given = {name: torch.tensor(a) for name, a in data.items() if name not in p}
    given["x"].requires_grad_(work.backward)
    return given, p


def _run(work: Work, forward: Callable[[], Any], given: dict[str, Any], p: dict[str, Any]) -> Run:
    import torch

    x, dy = given["x"], given["dy"]

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


def _norm(work: Work, data: Arrays, compiled: bool) -> Run:
    import torch

    functional, (given, p) = torch.nn.functional, _tensors(work, data)
    x, weight, bias, mean, var, mask = given["x"], p["weight"], p["bias"], *map(given.get, ("mean", "var", "mask"))

    def masked() -> Any:
        """The steps that count, taken out and put back: half the time of a formula with the mask as factors."""
        y = torch.zeros_like(x)
        y[mask] = functional.batch_norm(x[mask], None, None, weight, bias, True, eps=EPS)
        return y

    forward: Callable[[], Any] = {
        ("LN", ""): lambda: functional.layer_norm(x, x.shape[-1:], weight, bias, EPS),
        ("BN", ""): lambda: functional.batch_norm(x, None, None, weight, bias, True, eps=EPS),
        ("BN", "with statistics"): lambda: functional.batch_norm(x, mean, var, weight, bias, False, eps=EPS),
        ("BN", "with mask"): masked,
        ("GN", ""): lambda: functional.group_norm(x, GROUPS, weight, bias, EPS),
    }[work.what, work.kind]
    if compiled and mask is not None:  # how many count is not known before; a formula of all can be fused
        everything = {**p, "mask": mask[..., None].to(x.dtype)}
        return _run(work, torch.compile(lambda: normalization(work, _functions(), x, everything)), given, p)
    return _run(work, torch.compile(forward) if compiled else forward, given, p)


def _sequence(work: Work, data: Arrays, compiled: bool) -> Run:
    import torch

    lib, (given, p) = _functions(), _tensors(work, data)
    x, lengths = given["x"], given.get("lengths")
    if CELLS[work.what][1] is None:
        layer = getattr(torch.nn, work.what)(*work.shape[2:]).to(x.dtype)
        layer.load_state_dict({name: value.detach() for name, value in p.items()})
        return _run(work, lambda: layer(x)[0], given, dict(layer.named_parameters()))

    def forward() -> Any:
        state: Any = (x.new_zeros(x.shape[1], work.hidden),) * len(work.states)
        outputs = []
        for u in input_term(work, lib, p, x).unbind(0):
            state = cell(work, lib, p, u, state)
            outputs.append(state[0])
        return torch.stack(outputs)

    def ragged() -> Any:
        """The longest first, as in a packed sequence: a step has those that are still going, in four fifths of the time of a mask."""
        order = torch.argsort(lengths, descending=True)
        counts = given["mask"][:, order]
        state: Any = (x.new_zeros(x.shape[1], work.hidden),) * len(work.states)
        outputs = []
        terms = input_term(work, lib, p, x[:, order], counts[..., None].to(x.dtype))
        for u, going in zip(terms.unbind(0), counts.sum(1).tolist(), strict=True):
            state = cell(work, lib, p, u[:going], tuple(a[:going] for a in state))
            outputs.append(torch.nn.functional.pad(state[0], (0, 0, 0, len(u) - going)))
        return torch.stack(outputs)[:, torch.argsort(order)]

    return _run(work, forward if lengths is None else ragged, given, p)


def _step(work: Work, data: Arrays, compiled: bool) -> Run:
    import torch

    lib, (given, p) = _functions(), _tensors(work, data)
    state = tuple(given[name] for name in work.states)
    if CELLS[work.what][1] is None:
        own = getattr(torch.nn, f"{work.what}Cell")(*work.sizes[2:]).to(given["x"].dtype)
        own.load_state_dict({name.removesuffix("_l0"): value for name, value in p.items()})

        def forward(x: Any, state: Any) -> Any:
            return own(x, state) if len(state) == 2 else (own(x, state[0]),)
    else:

        def forward(x: Any, state: Any) -> Any:
            return cell(work, lib, p, input_term(work, lib, p, x), state)

    step = torch.compile(forward) if compiled else forward

    def run() -> Any:
        with torch.no_grad():
            return step(given["x"], state)

    return run


def _update(work: Work, data: Arrays, compiled: bool) -> Run | None:
    """By the fastest of torch's three ways, the fused one, which nothing is left to be compiled of. Each goes on from the one before."""
    import torch

    if compiled:
        return None
    params, grads, mean, square = ([*map(torch.tensor, data[name])] for name in "pgmv")
    optimizer = torch.optim.Adam(params, RATE, (ADAM.beta1, ADAM.beta2), ADAM.eps, fused=True)
    for p, g, m, v in zip(params, grads, mean, square, strict=True):
        p.grad = g
        optimizer.state[p] = {"step": torch.tensor(float(UPDATES)), "exp_avg": m, "exp_avg_sq": v}

    def run() -> Any:
        optimizer.step()
        return [*params, *mean, *square]

    return run
