"""Measure subjects on cases: every library and runtime that is asked for, or a function of one's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy

import portnorm as pn
from portnorm.arrays import require_extra
from portnorm.conform import recurrent
from portnorm.conform.cases import DTYPES, Case, NumPyArray, cases
from portnorm.conform.libraries import LIBRARIES, Library
from portnorm.conform.oracle import Truth, is_measurable, truth
from portnorm.conform.result import Result, compared
from portnorm.errors import MissingExtraError, UnsupportedError

Progress = Callable[[str], None]


def measure(
    subjects: Sequence[str] = ("numpy",),
    *,
    operations: Iterable[str] | None = None,
    regimes: Iterable[str] | None = None,
    dtypes: Iterable[str] | None = None,
    progress: Progress = lambda what: None,
) -> Iterator[Result]:
    """Every named library and runtime on every case; the definitions of portnorm forward and backward, runtimes forward.

    Recurrent cells are among the operations by names such as "LSTM layer", and of the regime "normal". A subject that is not installed
    gives one row that says so. Raises `UnsupportedError` for a name that is none.
    """
    operations, regimes, dtypes = (None if some is None else list(some) for some in (operations, regimes, dtypes))
    runtimes = [name for name in subjects if name not in LIBRARIES]
    conformance: Any = require_extra("portnorm_onnx.conformance", "onnx") if runtimes else None
    for name in runtimes:
        conformance.check_known(name)
    chosen = list(cases(operations, regimes, dtypes))
    installed: dict[str, Any] = {}
    for name in subjects:
        try:
            installed[name] = LIBRARIES[name].version() if name in LIBRARIES else conformance.version(name)
        except MissingExtraError as error:
            yield Result(name, "", "all", "all", "all", "forward", "not installed", detail=str(error))
    for case in chosen:
        progress(case.name)
        if not is_measurable(case):
            yield Result("truth", "", case.operation.name, case.regime.name, case.dtype, "forward", "not measured", detail="no wider type")
            continue
        arrays = case.arrays()
        exact = truth(case, arrays)
        for name, version in installed.items():
            if name in LIBRARIES:
                yield from of_library(LIBRARIES[name], version, case, arrays, exact)
            else:
                yield from conformance.of_runtime(name, version, case, arrays, exact)
    those, kinds = recurrent.chosen(operations, regimes), tuple(DTYPES if dtypes is None else dtypes)
    for name, version in installed.items():
        if name in LIBRARIES and not LIBRARIES[name].lazy:  # cells step by step take a library that computes at once
            yield from recurrent.of_cells(LIBRARIES[name], version, kinds, progress, those)
        elif name not in LIBRARIES:
            yield from conformance.of_cells(name, version, kinds, progress, those)


def of_library(
    library: Library, version: str, case: Case, arrays: dict[str, NumPyArray] | None = None, exact: Truth | None = None
) -> Iterator[Result]:
    """portnorm's definitions on the arrays of one library."""
    if case.dtype not in library.dtypes:
        return
    about = (library.name, version, case.operation.name, case.regime.name, case.dtype)
    if case.regime.name == "subnormal" and not library.subnormals:
        yield Result(*about, "forward", "not measured", detail=f"{library.name} takes subnormal numbers as 0")
        return
    arrays = case.arrays() if arrays is None else arrays
    exact = truth(case, arrays) if exact is None else exact
    try:
        with library.context(), numpy.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = {name: library.array(a, case.dtype) for name, a in arrays.items()}
            arguments = case.operation.arguments(made["x"], made["weight"], made["bias"])
            y, pullback = pn.vjp(case.operation.call, *arguments, eps=case.eps)
            found = {"forward": library.values(y)}
            if case.regime.gradient:
                found["gradient"] = library.values(pullback(made["dy"])[0])
    except Exception as error:
        yield Result(*about, "forward", "does not run", detail=f"{type(error).__name__}: {error}", reproduce=case.reproduce())
        return
    for side, values in found.items():
        yield compared(about, side, values, exact.y if side == "forward" else exact.dx, case, arrays, exact.axes)


def of_function(function: Callable[..., Any], case: Case, *, library: str = "numpy", name: str = "function") -> Result:
    """Somebody's own `function(x, weight, bias, eps)` on one case, forward; arrays are of the named library and the case's type.

    Where the library has no such type (float16 in array_api_strict), or this machine none that is wider, the status is `not measured`.
    """
    if library not in LIBRARIES:
        raise UnsupportedError(f"`library` is {library!r}; expected one of {', '.join(LIBRARIES)}")
    row = LIBRARIES[library]
    about = (name, row.version(), case.operation.name, case.regime.name, case.dtype)
    if case.dtype not in row.dtypes:
        has = [other for other, support in LIBRARIES.items() if case.dtype in support.dtypes]
        detail = f"{library} has no {case.dtype}; `library` may be {' or '.join(map(repr, has))}"
        return Result(*about, "forward", "not measured", detail=detail)
    if not is_measurable(case):
        return Result(*about, "forward", "not measured", detail="no wider type")
    arrays = case.arrays()
    with row.context():
        made = {key: row.array(a, case.dtype) for key, a in arrays.items()}
        values = row.values(function(made["x"], made["weight"], made["bias"], case.eps))
    exact = truth(case, arrays)
    return compared(about, "forward", values, exact.y, case, arrays, exact.axes)
