"""Recurrent cells: one step from the same state by a hard gate, a whole run by a soft one, since rounding grows with time."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import numpy

import portnorm as pn
from portnorm.arrays import leaves, mapped
from portnorm.cells.variants import NormName
from portnorm.conform.cases import cells
from portnorm.conform.libraries import Library
from portnorm.conform.result import Result
from portnorm.conform.tolerances import HORIZON, STEP_ULP, TRAJECTORY_FACTOR
from portnorm.layers.recurrent import Recurrent

CELLS = {"LSTM": pn.LSTM, "GRU": pn.GRU, "RNN": pn.RNN}
_EPS = {"float32": 2.0**-23, "float64": 2.0**-52}


def layer_of(cell: str, preset: NormName | None) -> Recurrent:
    """A float64 layer whose every parameter and statistic is random, with float32 values."""
    rng = numpy.random.default_rng(zlib.crc32(f"{cell} {preset}".encode()))
    layer = CELLS[cell](12, 16, norm=preset, t_max=HORIZON // 2, dtype="float64", rng=rng)
    params = {n: p + 0.1 * rng.standard_normal(p.shape) for n, p in layer.params.items()}
    buffers = {n: b + (1 if n.startswith("num") else rng.uniform(0.1, 1.0, b.shape)) for n, b in layer.buffers.items()}
    layer.assign(
        *({n: a.astype(numpy.float32).astype(a.dtype) if a.dtype.kind == "f" else a for n, a in g.items()} for g in (params, buffers))
    )
    return layer


def inputs() -> Any:
    """(time, batch, features), with float32 values."""
    return numpy.random.default_rng(0).standard_normal((HORIZON, 3, 12)).astype(numpy.float32).astype(numpy.float64)


REGIME = "normal"
"""That of every run of a cell."""


def chosen(operations: Collection[str] | None, regimes: Collection[str] | None) -> list[tuple[str, NormName | None]]:
    """The cells and presets that are asked for: all of them unless operations or regimes are named."""
    if regimes is not None and REGIME not in regimes:
        return []
    every = [(cell, preset) for cell, table in pn.VARIANTS.items() for preset in table]
    return [pair for pair, name in zip(every, cells(), strict=True) if operations is None or name in operations]


def of_cells(
    library: Library,
    version: str,
    dtypes: tuple[str, ...],
    starts: Callable[[str], bool],
    those: Iterable[tuple[str, NormName | None]],
) -> Iterator[Result]:
    """Cells and presets on the arrays of one library, in float32 and float64; each that `starts` says so of."""
    for cell, preset in those:
        for dtype in ("float32", "float64"):
            if dtype in dtypes and dtype in library.dtypes and starts(f"{library.name} / {cell} {preset or 'plain'} / {REGIME} / {dtype}"):
                yield from _of_cell(library, version, cell, preset, dtype)


def _of_cell(library: Library, version: str, cell: str, preset: NormName | None, dtype: str) -> Iterator[Result]:
    name = f"{cell} {preset or 'plain'}"
    about = (library.name, version, name, "normal", dtype)
    code = f"from portnorm.conform import recurrent\nlayer = recurrent.layer_of({cell!r}, {preset!r})\nx = recurrent.inputs()"
    exact, x = layer_of(cell, preset), inputs()
    eager = exact.to(dtype=dtype)
    try:
        with library.context(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer = exact.to(xp=library.module, dtype=dtype)
            run = library.compiled(lambda x, state: layer(x, state))

            def given(a: Any) -> Any:
                return library.array(a, dtype) if a.dtype.kind == "f" else layer._new(a, integer=True)

            state, worst, place = exact.initial_state(3), 0.0, 0
            for t in range(HORIZON):
                _, after = run(given(x[t : t + 1]), mapped(given, state))
                _, true = exact(x[t : t + 1], state)
                for a, b in zip(leaves(after), leaves(true), strict=True):
                    if b.ndim:
                        units = numpy.max(numpy.abs(library.values(a) - b)) / (_EPS[dtype] * max(1.0, float(numpy.max(numpy.abs(b)))))
                        worst, place = (float(units), t) if units > worst else (worst, place)
                state = true
            whole = library.values(run(given(x), mapped(given, exact.initial_state(3)))[0])
    except Exception as error:
        yield Result(*about, "one step", "does not run", detail=f"{type(error).__name__}: {error}", reproduce=code)
        return
    status = "ok" if worst <= STEP_ULP else "beyond"
    yield Result(*about, "one step", status, worst, limit=STEP_ULP, detail=f"worst at step {place} of {HORIZON}", reproduce=code)
    if dtype != "float32":  # nothing more exact is at hand to say how far a float64 run may be
        return
    true = exact(x)[0]
    off, own = float(numpy.max(numpy.abs(whole - true))), float(numpy.max(numpy.abs(eager(x.astype(dtype))[0] - true)))
    allowed = TRAJECTORY_FACTOR * own + 8 * _EPS[dtype]
    yield Result(
        *about, "trajectory", "ok" if off <= allowed else "beyond", off / _EPS[dtype], None, off, None, allowed / _EPS[dtype], 0,
        f"after {HORIZON} steps; NumPy's own {dtype} run is {own:.2g} from float64", code,
    )  # fmt: skip
