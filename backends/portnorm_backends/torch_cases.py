"""What a graph of a torch model is tried on: the example, and inputs of other lengths that are made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy
import onnx
import torch
from onnx import helper
from torch.utils import _pytree as pytree

from portnorm.arrays import to_numpy
from portnorm.errors import ExportError, UnsupportedError
from portnorm_backends.torch_calls import Call, Given, tensors_of
from portnorm_backends.torch_gate import Case, Eager
from portnorm_backends.torch_limits import LONGEST, by_symbol, declared, lengths_beyond, limits_of, refusal

_LEAST = 2
"""The smallest length that torch assumes of an axis that is free; what it makes of it holds for 1 too, or a check says so."""


def _refused(eager: Eager, case: Case) -> Exception | None:
    """What the model itself raises."""
    try:
        eager(case.args)
    except Exception as error:  # whatever somebody else's model raises
        return error
    return None


_LENGTHS: tuple[Callable[[int], int], ...] = (lambda k: 1, lambda k: 3 + 2 * k, lambda k: 24 - 5 * (k % 4))
"""For every case beside the example the free lengths, in their order."""


class Cases:
    """Inputs of several lengths, made of the example."""

    def __init__(
        self,
        program: torch.export.ExportedProgram,
        proto: onnx.ModelProto,
        example: Given,
        calls: Sequence[Call],
        said: Sequence[Any] | None = None,
    ):
        self.example = example
        self.names = [i.name for i in proto.graph.input]
        tensors = tensors_of(example)
        if len(tensors) != len(self.names):
            raise ExportError(f"the graph has the inputs {', '.join(self.names)}, but `args` and `kwargs` have {len(tensors)} tensors")
        self.tensors = tensors
        self.types = [helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type) for i in proto.graph.input]
        self.dims = [[d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in proto.graph.input]
        nodes = {n.name: n for n in program.graph.nodes}
        given = [nodes[name] for name in program.graph_signature.user_inputs if name in nodes]
        held = [n for n in given if isinstance(n.meta.get("val"), torch.Tensor)]
        self.measured = {d: n for dims, a in zip(self.dims, tensors, strict=True) for d, n in zip(dims, a.shape, strict=True)}
        self.symbols, self.derived = self._named(held)
        self.allowed = declared([None] * len(tensors) if said is None else said, self.dims)
        self.limits = limits_of(program, self.symbols, _LEAST)
        self.bounds = self._bounds(program)
        self.counts = self._counts(program, held, calls)

    def _named(self, held: Sequence[Any]) -> tuple[dict[Any, str], dict[str, Any]]:
        """Names of torch's symbols, and lengths that are expressions of these by the names that they have in the graph."""
        symbols, derived = {}, {}
        for node, dims in zip(held, self.dims, strict=True):
            for d, n in zip(dims, node.meta["val"].shape, strict=True):
                if isinstance(d, str) and isinstance(n, torch.SymInt):
                    if n.node.expr.is_symbol:
                        symbols[n.node.expr] = d
                    else:
                        derived[d] = n.node.expr
        return symbols, derived

    def _bounds(self, program: torch.export.ExportedProgram) -> dict[str, tuple[int, int]]:
        """The smallest and largest length that each name may have."""
        found: dict[str, tuple[int, int]] = {}
        for symbol, name in self.symbols.items():
            limits = program.range_constraints.get(symbol)
            low, high = found.get(name, self.allowed[name])
            if limits is not None:
                low = max(low, int(limits.lower) if limits.lower > _LEAST else 1)
                high = min(high, int(limits.upper)) if limits.upper.is_number and limits.upper < high else high
            found[name] = (low, high)
        return found

    def _counts(self, program: torch.export.ExportedProgram, held: Sequence[Any], calls: Sequence[Call]) -> dict[str, str]:
        """Integer inputs (batch,) that reach the `lengths` of a layer, and the name of the length that they count."""
        symbols, by_node = self.symbols, dict(zip(held, self.names, strict=True))
        found: dict[str, str] = {}
        for node in program.graph.nodes:
            call = next((c for c in calls if c.name in node.args), None) if "symbolic" in str(node.target) else None
            if call is None or not call.shape.lengths:
                continue
            x, counted = node.args[0][:2]
            steps = x.meta["val"].shape[1 if call.layer.batch_first else 0]
            names = [symbols[s] for s in steps.node.expr.free_symbols if s in symbols] if isinstance(steps, torch.SymInt) else []
            waiting, seen = [counted], set()
            while waiting:
                n = waiting.pop()
                if n not in seen:
                    seen.add(n)
                    waiting.extend(n.all_input_nodes)
            for n in seen & by_node.keys():
                value = n.meta["val"]
                if value.ndim == 1 and not value.is_floating_point() and names:
                    found[by_node[n]] = names[0]
        return found

    def given(self, args: Given) -> Case:
        """A case of these inputs."""
        tensors = tensors_of(args)
        if len(tensors) != len(self.names):
            raise UnsupportedError(f"`inputs` has {len(tensors)} tensors; expected {len(self.names)}: {', '.join(self.names)}")
        shapes = " ".join(f"{name} {tuple(a.shape)}" for name, a in zip(self.names, tensors, strict=True))
        feed = {name: to_numpy(a).astype(kind, copy=False) for name, a, kind in zip(self.names, tensors, self.types, strict=True)}
        free = {d: n for dims, a in zip(self.dims, tensors, strict=True) for d, n in zip(dims, a.shape, strict=True) if isinstance(d, str)}
        own = by_symbol(free, self.symbols)
        return Case(shapes, args, feed, max(free.values(), default=1), tuple(limit for limit in self.limits if not limit.at(own)))

    def random(self, eager: Eager) -> tuple[list[Case], list[str]]:
        """The example, and others with every free length at 1 and at two others; and what the model itself refuses of these."""
        cases, refused, reason = [self.given(self.example)], [], None
        for seed, rule in enumerate(_LENGTHS if self.bounds else ()):
            lengths = {name: min(max(rule(k), low), high) for k, (name, (low, high)) in enumerate(self.bounds.items())}
            case = self._at(lengths, seed)
            reason = _refused(eager, case)
            if reason is None:
                cases.append(case)
            else:
                refused.append(case.title)
        if len(refused) == len(_LENGTHS):
            raise ExportError(
                f"the model refuses all inputs that were made of the example, such as {refused[-1]}; give `inputs` to check it on: {reason}"
            ) from reason
        return cases, refused

    def _at(self, lengths: Mapping[str, int], seed: int) -> Case:
        """The case with these free lengths."""
        own = by_symbol(lengths, self.symbols)
        lengths = {**lengths, **{name: int(expression.subs(own)) for name, expression in self.derived.items()}}
        rng = numpy.random.default_rng(seed)
        drawn = iter([self._drawn(k, lengths, rng) for k in range(len(self.names))])
        flat, spec = pytree.tree_flatten(self.example)
        return self.given(pytree.tree_unflatten([next(drawn) if isinstance(a, torch.Tensor) else a for a in flat], spec))

    def beyond(self, eager: Eager, cases: Sequence[Case]) -> list[Case]:
        """Cases at lengths that are allowed but of which torch assumed that they do not come, without those that the model refuses."""
        free = {name: self.measured[name] for name in self.symbols.values()}
        found = []
        for seed, lengths in enumerate(lengths_beyond(self.limits, self.symbols, self.allowed, free)):
            if max(lengths.values()) > LONGEST:
                case = Case(
                    "", self.example, {}, 1, tuple(limit for limit in self.limits if not limit.at(by_symbol(lengths, self.symbols)))
                )
                raise ExportError(self.refusal(case, f"more than {LONGEST} is too long to be tried"))
            case = self._at(lengths, seed)
            if all(case.title != other.title for other in cases) and _refused(eager, case) is None:
                found.append(case)
        return found

    def refusal(self, case: Case, error: Exception | str) -> str:
        """Why the graph is wrong at this case."""
        axes = {
            d: f"axis {k} of `{name}`"
            for name, dims in zip(self.names, self.dims, strict=True)
            for k, d in enumerate(dims)
            if isinstance(d, str)
        }
        saw = error if isinstance(error, str) else f"at {case.title} the graph and the model differ: {error}"
        free = {name: self.measured[name] for name in self.symbols.values()}
        return refusal(case.beyond, self.limits, self.symbols, axes, free, saw)

    def _drawn(self, k: int, lengths: Mapping[str, int], rng: numpy.random.Generator) -> torch.Tensor:
        """Numbers of the example's input `k` in another shape."""
        name, tensor = self.names[k], self.tensors[k]
        values = to_numpy(tensor)
        shape = [lengths[d] if isinstance(d, str) else d for d in self.dims[k]]
        drawn: Any
        if name in self.counts:
            axis = self.counts[name]
            most = max(1, round(int(values.max(initial=1)) * lengths[axis] / self.measured[axis]))
            drawn = rng.integers(1, most + 1, shape)
            drawn[:1] = most
        elif values.dtype.kind == "f" and values.min() == values.max():
            drawn = rng.uniform(-1.0, 1.0, shape)  # of any sign, and as small as a state is
        else:
            drawn = rng.choice(values.ravel(), shape)
        return torch.as_tensor(drawn.astype(values.dtype), device=tensor.device, dtype=tensor.dtype)
