"""The lengths for which the program holds that torch traced of a model, and lengths beyond these, at which it may be wrong.

`if x.shape[0] > 20` or `y[:10]` decides by the example's length, and torch notes for which lengths that was the same decision. A graph has
no such notes: its lengths are free. Many do no harm, since the translation computes the same on both sides, so they are tried.
"""

from __future__ import annotations

import itertools
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import sympy
import torch
from torch.utils._sympy.printers import PythonPrinter

from portnorm_backends.torch_refusals import ADVICE, is_of_model

MOST = 2**31
"""More than any length."""
LONGEST = 2**17
"""Longer ones are not tried: a loop over so many steps takes minutes."""
_TRACED = re.compile(r'File "([^"]+)", line (\d+), in \S+\n\s*(\S.*)')


class Limit(NamedTuple):
    """What torch assumed of the lengths while it traced the model."""

    holds: Any
    """A condition of sympy's, on torch's symbols."""
    where: str
    """The line of the model, or nothing."""
    usual: bool = False
    """Whether torch assumes this of every free length, and mostly without need."""

    def at(self, own: Mapping[Any, int]) -> bool:
        """Whether it holds at these lengths, or says nothing of them."""
        return self.holds.subs(own) is not sympy.false

    def says(self, names: Mapping[Any, str]) -> str:
        known = {symbol: sympy.Symbol(name, integer=True) for symbol, name in names.items() if symbol in self.holds.free_symbols}
        return f"`{PythonPrinter().doprint(self.holds.xreplace(known))}`{self.where}"


def limits_of(program: torch.export.ExportedProgram, symbols: Mapping[Any, str], least: int) -> list[Limit]:
    """The conditions on the symbols that have names: torch's guards, and ranges from `least` on that no guard is behind."""
    values = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and isinstance(n.meta.get("val"), torch.Tensor)]
    modes = [mode for value in values if (mode := getattr(value, "fake_mode", None)) is not None and mode.shape_env is not None]
    guards = modes[0].shape_env.guards if modes else []
    found = {g.expr: Limit(g.expr, _where(g, program)) for g in guards if g.expr.free_symbols and g.expr.free_symbols <= symbols.keys()}
    for symbol in symbols:
        limits = program.range_constraints.get(symbol)
        own = [limit for limit in found.values() if limit.holds.free_symbols == {symbol}]
        if limits is None:
            continue
        low = max(int(limits.lower), least)  # torch takes every free length for more than 1, whatever it says of the range
        if all(limit.at({symbol: low - 1}) for limit in own):
            found[symbol >= low] = Limit(symbol >= low, "", usual=low == least)
        if limits.upper.is_number and limits.upper < MOST and all(limit.at({symbol: int(limits.upper) + 1}) for limit in own):
            found[symbol <= limits.upper] = Limit(symbol <= limits.upper, "")
    return list(found.values())


def _where(guard: Any, program: torch.export.ExportedProgram) -> str:
    """The line of the model: that of an `if`, or the one that gives one of torch's functions a number which is in the condition."""
    frame = guard.sloc.framework_loc
    if isinstance(frame, traceback.FrameSummary) and is_of_model(frame.filename):
        return f" from {frame.filename}:{frame.lineno}, `{frame.line}`"
    numbers = {abs(int(n)) for n in guard.expr.atoms(sympy.Integer)}
    for node in program.graph.nodes:
        given = {abs(a) for a in node.args if isinstance(a, int)} if "slice" in str(node.target) else set()
        lines = [place for place in _TRACED.findall(node.meta.get("stack_trace") or "") if is_of_model(place[0])]
        if lines and any(n > 1 for n in given & numbers):
            return f" from {lines[-1][0]}:{lines[-1][1]}, `{lines[-1][2].strip()}`"
    return ""


Bounds = Mapping[str, tuple[int, int]]


def declared(said: Sequence[Any], dims: Sequence[Sequence[str | int]]) -> dict[str, tuple[int, int]]:
    """The smallest and largest length of each name that `dynamic_shapes` allows; `said` is what it says of each tensor."""
    found: dict[str, tuple[int, int]] = {}
    for axes, names in zip(said, dims, strict=True):
        for k, name in enumerate(names):
            given = None if axes is None else axes.get(k) if isinstance(axes, dict) else axes[k]
            if isinstance(name, str):
                low, high = (getattr(given, end, None) for end in ("min", "max"))
                first, last = found.get(name, (1, MOST))
                found[name] = max(first, low or 1), min(last, high if isinstance(high, int) else MOST)
    return found


def lengths_beyond(
    limits: Sequence[Limit], symbols: Mapping[Any, str], allowed: Bounds, measured: Mapping[str, int]
) -> Iterator[dict[str, int]]:
    """Lengths that are allowed and at which a limit does not hold: next to where that begins, further away, and the smallest."""
    seen = []
    for limit in limits:
        own = sorted({symbols[s] for s in limit.holds.free_symbols})
        points = [p for p in _points(limit, own, allowed, measured) if not limit.at(by_symbol(p, symbols))]
        for name in own:
            below = [p for p in points if p[name] < measured[name]]
            above = [p for p in points if p[name] >= measured[name]]
            further = [p for p in above if 2 * p[name] >= 3 * above[0][name]]
            # Beyond the limit others may count: `if x.shape[0] > 20 and x.shape[1] > 3` stops asking at the first on the example.
            ends = [p for p in (*below[-1:], *further[:1]) if p[name] > 1]
            varied = [
                {**{other: min(max(n, low), high) for other, (low, high) in allowed.items() if other in p}, **{o: p[o] for o in own}}
                for p in ends
                for n in (1, 24)
            ]
            for point in (*below[:1], *below[-2:], *above[:2], *further[:1], *varied):
                if point not in seen:
                    seen.append(point)
                    yield point


def by_symbol(lengths: Mapping[str, int], symbols: Mapping[Any, str]) -> dict[Any, int]:
    return {symbol: lengths[name] for symbol, name in symbols.items()}


def _points(limit: Limit, own: Sequence[str], allowed: Bounds, measured: Mapping[str, int]) -> list[dict[str, int]]:
    """Each of these names at many lengths, small ones and those near numbers in the condition; or two and more at some."""
    numbers = {abs(int(n)) for n in limit.holds.atoms(sympy.Integer)} - {0}
    near = {*numbers, *(a * b for a in numbers for b in numbers), *(a // b for a in numbers for b in numbers)}
    many = {*range(1, 25), *(2**k for k in range(5, 17)), *(n + k for n in near for k in (-1, 0, 1, 2)), *(2 * n + 1 for n in near)}
    few = {1, 2, 3, 4, 5, 7, 8, 24, *(n for n in numbers if n < 1000)}

    def inside(name: str) -> list[int]:
        low, high = allowed[name]
        return sorted({min(max(n, low), high) for n in (many if len(own) == 1 else few)})

    return [{**measured, **dict(zip(own, each, strict=True))} for each in itertools.product(*(inside(name) for name in own[:3]))]


def refusal(
    beyond: Sequence[Limit],
    limits: Sequence[Limit],
    symbols: Mapping[Any, str],
    axes: Mapping[str, str],
    measured: Mapping[str, int],
    saw: str,
) -> str:
    """Which axis is not free in the program that was traced, why, and the way out; `saw` is what was found beyond the limits."""
    names = sorted({symbols[s] for limit in beyond for s in limit.holds.free_symbols})
    needed = [limit for limit in limits if limit in beyond or not limit.usual]
    ranges = {name: _range_of(name, needed, symbols, measured) for name in names}
    ways = [f"torch.export.Dim({name!r}, {ends})" for name, ends in ranges.items() if ends]
    way = f"; or declare in it for what it is, {', '.join(ways)}" if ways else ""
    free = " and ".join(f"{axes[name]} ({name!r})" for name in names)
    return (
        f"the model was traced on the example and decided by its lengths: the graph holds where "
        f"{' and '.join(limit.says(symbols) for limit in beyond)}, but by `dynamic_shapes` {free} {'is' if len(names) == 1 else 'are'} "
        f"free; {saw}; {ADVICE}; or leave the axis out of `dynamic_shapes`{way}"
    )


def _range_of(name: str, limits: Sequence[Limit], symbols: Mapping[Any, str], measured: Mapping[str, int]) -> str:
    """The lengths around the example's at which all limits hold, those of other names as in the example, as arguments of `Dim`."""
    low, high = 1, MOST
    for limit in limits:
        if any(symbols[s] == name for s in limit.holds.free_symbols):
            points = [p[name] for p in _points(limit, [name], {name: (1, MOST)}, measured) if not limit.at(by_symbol(p, symbols))]
            low = max([low, *(n + 1 for n in points if n < measured[name])])
            high = min([high, *(n - 1 for n in points if n > measured[name])])
    return ", ".join([*([f"min={low}"] if low > 1 else []), *([f"max={high}"] if high < MOST else [])]) if low < high else ""
