"""The gate of a whole torch model: how far the graph may be from a float64 run of the model, beside torch's own distance to it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy
import torch
from torch.utils import _pytree as pytree

from portnorm.arrays import to_numpy
from portnorm.errors import ConformanceError, DTypeError, ExportError
from portnorm_backends.torch_calls import Given, is_floating, tensors_of
from portnorm_backends.torch_limits import Limit
from portnorm_backends.torch_module import TorchModule
from portnorm_onnx.bounds import EPS, FACTOR, FLOOR, ROUNDINGS, nudged, of_turned_rounding
from portnorm_onnx.report import Comparison
from portnorm_onnx.workers import Session

Arrays = list["numpy.ndarray[Any, Any]"]


@dataclass(frozen=True)
class Case:
    """Inputs of the model, and the same by the names of the graph."""

    title: str
    args: Given
    feed: dict[str, Any]
    steps: int
    beyond: tuple[Limit, ...] = ()
    """What torch assumed while it traced the model and does not hold here."""


class Eager:
    """The torch model on its inputs: as it is, in float64, and with numbers that are moved by a rounding."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self._double: torch.nn.Module | None = copy.deepcopy(model).double()

    def __call__(self, args: Given) -> Arrays:
        return _outputs(self.model, args)

    def exact(self, args: Given) -> Arrays | None:
        """In float64; `None` for a model that makes numbers of another type by itself, which torch then refuses to mix."""
        if self._double is not None:
            wide = pytree.tree_map(lambda a: a.double() if is_floating(a) else a, args)
            try:
                return _outputs(self._double, wide)
            except (RuntimeError, DTypeError) as error:
                if "type" not in str(error):
                    raise
                self._double = None
        return None

    def rounded(self, args: Given, seed: int) -> Arrays:
        """With every parameter and input moved by at most one unit in the last place."""
        moved = {n: _nudged(a, seed) for n, a in (*self.model.named_parameters(), *self.model.named_buffers())}
        given = pytree.tree_map(lambda a: _nudged(a, seed) if is_floating(a) else a, args)
        return _outputs(lambda *a, **k: torch.func.functional_call(self.model, moved, a, k), given)

    def turned(self, args: Given) -> list[Arrays]:
        """Of a model with products of integers, the runs in which numbers near the middle of two are rounded to the other one."""
        if not any(isinstance(m, TorchModule) and m._layer.quantizes is not None for m in self.model.modules()):
            return []
        return of_turned_rounding(self, args)


def _nudged(a: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.as_tensor(nudged(to_numpy(a), seed, _dtype_of(a)), device=a.device, dtype=a.dtype)


def _dtype_of(a: torch.Tensor) -> str:
    return str(a.dtype).removeprefix("torch.")


def _outputs(model: Callable[..., Any], given: Given) -> Arrays:
    """The tensors that come out, in order, each of its own type: NumPy has bfloat16 from ml_dtypes."""
    with torch.no_grad():
        return [to_numpy(a).astype(_dtype_of(a), copy=False) for a in tensors_of(model(*given.args, **given.kwargs))]


class _Gate(NamedTuple):
    """How far a run of the graph may be from the float64 run of the model: `factor` times torch's own distance, and a floor."""

    factor: float
    floor: Mapping[str, float]
    """By the type of an output, relative to its largest value."""
    least: float
    """That value is taken to be so large at least."""


_GATE = _Gate(FACTOR, FLOOR, 1.0)


_GATES = {
    # Where nothing is computed in bfloat16 only constants of the graph are rounded to it. So it is no further from float64 than torch's own
    # run, which rounds every result, and half a unit in the last place where that is exact by luck; 0.56 of this is the most in 180 cases.
    # The gate above allows results in bfloat16 of size 1 an error of 0.05 to 0.3, which would hide a small part of a model.
    "unrounded": _Gate(1.0, dict.fromkeys(FLOOR, EPS["bfloat16"] / 2), 0.0)
}
"""Those of stand-ins for a runtime."""


def compared(eager: Eager, session: Session, runtime: str, cases: Sequence[Case]) -> list[Comparison]:
    """The graph's distance to the float64 run against torch's own distance to it, at every case."""
    found, gate = [], _GATES.get(runtime, _GATE)
    for case in cases:
        results, mine = session(case.feed), eager(case.args)
        if len(results) != len(mine):
            raise ExportError(f"the model has {len(mine)} outputs but the graph {len(results)}: {', '.join(results)}")
        exact = eager.exact(case.args)
        others = [] if exact is not None else [eager.rounded(case.args, seed) for seed in range(ROUNDINGS)]
        comparisons = []
        for k, ((name, result), own) in enumerate(zip(results.items(), mine, strict=True)):
            truth = own if exact is None else exact[k]
            if result.shape != own.shape:
                raise ConformanceError(f"{runtime}: {name!r} has shape {result.shape} but {own.shape} in torch, at {case.title}")
            floor = gate.floor[own.dtype.name] * max(gate.least, _largest(truth)) if own.dtype.name in gate.floor else 0.0
            spread = max(_distance(a, truth) for a in (own, *(other[k] for other in others)))
            difference = _distance(result, truth)
            if difference > gate.factor * spread + floor and not others:
                # How far torch itself is from float64 is a matter of luck where rounding is amplified.
                others = [eager.rounded(case.args, seed) for seed in range(ROUNDINGS)] + eager.turned(case.args)
                spread = max(spread, *(_distance(other[k], truth) for other in others))
            allowed = gate.factor * spread + floor
            comparisons.append(Comparison(runtime, name, case.title, case.steps, difference, allowed, spread))
            if not difference <= allowed:
                wrong = numpy.argwhere(~(numpy.abs(_wide(result) - _wide(truth)) <= allowed))
                where = f"; first at index {tuple(int(i) for i in wrong[0])}" if len(wrong) else ""
                raise ConformanceError(
                    f"{runtime}: output {name!r} is {difference:.3g} from the torch model at {case.title}; torch's own rounding is "
                    f"{spread:.3g}, so at most {allowed:.3g} is allowed{where}"
                )
        found.append(max(comparisons, key=lambda c: c.difference / c.allowed if c.allowed else 0.0))
    return found


def _wide(a: Any) -> Any:
    return a.astype(numpy.float64)


def _largest(a: Any) -> float:
    """The largest finite value."""
    return float(numpy.max(numpy.abs(_wide(a)), initial=0.0, where=numpy.isfinite(_wide(a))))


def _distance(a: Any, b: Any) -> float:
    """Largest absolute difference; NaN against NaN, and infinity against the same, is none."""
    a, b = _wide(a), _wide(b)
    same = (numpy.isnan(a) & numpy.isnan(b)) | (a == b)
    with numpy.errstate(invalid="ignore"):
        return float(numpy.max(numpy.where(same, 0.0, numpy.abs(a - b)), initial=0.0))
