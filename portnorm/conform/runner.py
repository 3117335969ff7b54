"""Measure subjects on cases: libraries, runtimes and others' own normalizations, or a function of one's own, all in this process."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy

import portnorm as pn
from portnorm.arrays import require_extra
from portnorm.conform import recurrent
from portnorm.conform.cases import DTYPES, Case, NumPyArray, Operation, cases, statistics_type
from portnorm.conform.libraries import LIBRARIES, Library
from portnorm.conform.oracle import Truth, truth
from portnorm.conform.result import Result, compared
from portnorm.conform.subjects import Subject, subjects_of_others
from portnorm.errors import MissingExtraError, ShapeError, UnsupportedError

Progress = Callable[[str], None]


def measure(
    subjects: Sequence[str] = ("numpy",),
    *,
    operations: Iterable[str] | None = None,
    regimes: Iterable[str] | None = None,
    dtypes: Iterable[str] | None = None,
    skip: Collection[str] = (),
    progress: Progress = lambda what: None,
) -> Iterator[Result]:
    """Every named subject on every case: the definitions of portnorm on a library's arrays forward and backward, all else forward.

    Recurrent cells are among the operations by names such as "LSTM layer", and of the regime "normal". Others' own normalizations are
    measured in the regimes of the field, or in those that are named. A subject that is not installed gives one row that says so.
    `progress` is told "subject / operation / regime / dtype" before each, and what `skip` holds is left out.
    Raises `UnsupportedError` for a name that is none.
    """
    operations, regimes, dtypes = (None if some is None else list(some) for some in (operations, regimes, dtypes))
    others = subjects_of_others() if set(subjects) - {*LIBRARIES} else {}
    runtimes = [name for name in subjects if name not in LIBRARIES and name not in others]
    conformance: Any = require_extra("portnorm_onnx.conformance", "onnx") if runtimes else None
    for name in runtimes:
        conformance.check_known(name)
    chosen = list(cases(operations, regimes, dtypes))
    installed: dict[str, Any] = {}
    for name in subjects:
        try:
            row = LIBRARIES.get(name) or others.get(name)
            installed[name] = conformance.version(name) if row is None else row.version()
        except MissingExtraError as error:
            yield Result(name, "", "all", "all", "all", "forward", "not installed", detail=str(error))

    def starts(text: str) -> bool:
        if text in skip:
            return False
        progress(text)
        return True

    for case in chosen:
        field = (case.regime.field or regimes is not None) and (case.operation.field or operations is not None)
        due = [name for name in installed if (name not in others or field) and f"{name} / {case.name}" not in skip]
        if not due:
            continue
        arrays = case.arrays()
        exact = truth(case, arrays)
        for name in due:
            progress(f"{name} / {case.name}")
            if name in LIBRARIES:
                yield from of_library(LIBRARIES[name], installed[name], case, arrays, exact)
            elif name in others:
                yield from of_subject(others[name], installed[name], case, arrays, exact)
            else:
                yield from conformance.of_runtime(name, installed[name], case, arrays, exact)
    those, kinds = recurrent.chosen(operations, regimes), tuple(DTYPES if dtypes is None else dtypes)
    for name, version in installed.items():
        if name in LIBRARIES and not LIBRARIES[name].lazy:  # cells step by step take a library that computes at once
            yield from recurrent.of_cells(LIBRARIES[name], version, kinds, starts, those)
        elif name not in LIBRARIES and name not in others:
            yield from conformance.of_cells(name, version, kinds, starts, those)


def of_library(
    library: Library, version: str, case: Case, arrays: dict[str, NumPyArray] | None = None, exact: Truth | None = None
) -> Iterator[Result]:
    """portnorm's definitions on the arrays of one library."""
    if case.dtype not in library.dtypes:
        return
    about = (library.name, version, case.operation.name, case.regime.name, case.dtype)
    taken_as_0 = () if library.subnormals else case.regime.subnormal
    if "forward" in taken_as_0:
        yield Result(*about, "forward", "not measured", detail=f"{library.name} takes subnormal numbers as 0")
        return
    arrays = case.arrays() if arrays is None else arrays
    exact = truth(case, arrays) if exact is None else exact
    try:
        with library.context(), numpy.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = {name: library.array(a, _type_of(name, case)) for name, a in arrays.items()}
            found = _program(library, case.operation, case.eps, case.regime.gradient and "gradient" not in taken_as_0)(made)
            found = {side: library.values(a) for side, a in found.items()}
    except Exception as error:
        yield Result(*about, "forward", "does not run", detail=f"{type(error).__name__}: {error}", reproduce=case.reproduce())
        return
    for side, values in found.items():
        yield compared(about, side, values, exact.y if side == "forward" else exact.dx, case, arrays, exact.axes)


@cache
def _program(library: Library, operation: Operation, eps: float, gradient: bool) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The sides of an operation of its arrays by name. One for all regimes, so that they share what is compiled of it."""

    def sides(made: dict[str, Any]) -> dict[str, Any]:
        y, pullback = pn.vjp(operation.call, *operation.arguments(made["x"], made["weight"], made["bias"]), eps=eps, **_statistics(made))
        return {"forward": y, "gradient": pullback(made["dy"])[0]} if gradient else {"forward": y}

    return library.compiled(sides)


def _type_of(name: str, case: Case) -> str:
    return statistics_type(case.dtype) if name in ("mean", "var") else case.dtype


def _statistics(made: dict[str, Any]) -> dict[str, Any]:
    return {name: made[name] for name in ("mean", "var") if name in made}


def of_subject(
    subject: Subject, version: str, case: Case, arrays: dict[str, NumPyArray] | None = None, exact: Truth | None = None
) -> Iterator[Result]:
    """Another's own normalization on one case; what it has not, or does not run, is a row that says so."""
    about = (subject.name, version, case.operation.name, case.regime.name, case.dtype)
    if (why := subject.refusal(case.operation.name, case.dtype)) is not None:
        yield Result(*about, "forward", "not measured", detail=why)
        return
    arrays = case.arrays() if arrays is None else arrays
    exact = truth(case, arrays) if exact is None else exact
    try:
        with numpy.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = subject.run(case, arrays)
    except Exception as error:  # that of another's code may be any
        yield Result(*about, "forward", "does not run", detail=told(error), reproduce=case.reproduce())
        return
    if found["forward"].shape != case.shape:
        detail = f"the result has shape {found['forward'].shape}; expected {case.shape}"
        yield Result(*about, "forward", "does not run", detail=detail, reproduce=case.reproduce())
        return
    yield compared(about, "forward", found["forward"], exact.y, case, arrays, exact.axes)
    for side, values in found.items():
        if side != "forward":
            yield of_statistic(about, side, values, case, arrays)


def of_statistic(about: tuple[str, str, str, str, str], side: str, values: NumPyArray, case: Case, arrays: dict[str, NumPyArray]) -> Result:
    """The mean or the variance of each channel that a batch normalization returns in training. A negative variance is named."""
    axes, x = case.operation.axes(case.shape), arrays["x"].astype(numpy.longdouble)
    with numpy.errstate(all="ignore"):
        exact = x.mean(axis=axes) if side == "mean" else x.var(axis=axes)
    found = compared(about, side, values, exact, case, arrays, (), statistics_type(case.dtype))
    return found.beyond(f"{float(values.min()):.3g} is a negative variance") if side == "variance" and (values < 0).any() else found


def told(error: Exception) -> str:
    """What an error says, on one line that is not long."""
    return " ".join((str(error) if isinstance(error, pn.PortnormError) else f"{type(error).__name__}: {error}").split())[:300]


def of_function(function: Callable[..., Any], case: Case, *, library: str = "numpy", name: str = "function") -> Result:
    """Somebody's own `function(x, weight, bias, eps)` on one case, forward; arrays are of the named library and the case's type.

    The statistics of "batch_norm with statistics" are given by name, as `mean` and `var`. Where the library has no such type (float16 in
    array_api_strict), the status is `not measured`. Raises `ShapeError` for a result that is not like `x`.
    """
    if library not in LIBRARIES:
        raise UnsupportedError(f"`library` is {library!r}; expected one of {', '.join(LIBRARIES)}")
    row = LIBRARIES[library]
    about = (name, row.version(), case.operation.name, case.regime.name, case.dtype)
    if case.dtype not in row.dtypes:
        has = [other for other, support in LIBRARIES.items() if case.dtype in support.dtypes]
        detail = f"{library} has no {case.dtype}; `library` may be {' or '.join(map(repr, has))}"
        return Result(*about, "forward", "not measured", detail=detail)
    arrays = case.arrays()
    with row.context():
        made = {key: row.array(a, _type_of(key, case)) for key, a in arrays.items()}
        values = row.values(function(made["x"], made["weight"], made["bias"], case.eps, **_statistics(made)))
    if values.shape != case.shape:
        raise ShapeError(f"`function` gave shape {values.shape} for {case.name}; expected {case.shape}, that of `x`")
    exact = truth(case, arrays)
    return compared(about, "forward", values, exact.y, case, arrays, exact.axes)
