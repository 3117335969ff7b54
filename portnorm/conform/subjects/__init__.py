"""Others' own normalizations: a row for each, found by the entry points of `portnorm.subjects`, whoever brings them.

A subject is a name, a version and a table: operation → function. The entry point names a sequence of subjects in a module that imports
its library only when one of its functions is called, or its version is asked for:

    [project.entry-points."portnorm.subjects"]
    mine = "my_library.of_portnorm:SUBJECTS"
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

import numpy

from portnorm.conform.cases import Case, NumPyArray, statistics_type
from portnorm.errors import MissingExtraError, UnsupportedError

GROUP = "portnorm.subjects"

Call = Callable[..., Any]
"""`call(x, weight, bias, eps)`, for group_norm also `groups=`, and for "batch_norm with statistics" `mean=` and `var=`; returns y, or for
batch_norm in training `(y, mean, var)` with what would enter the running statistics."""


def installed(*packages: str) -> Callable[[], str]:
    """The version of the first package where all are installed; raises `MissingExtraError`."""

    def found() -> str:
        try:
            return {name: version(name) for name in packages}[packages[0]]
        except PackageNotFoundError as error:
            raise MissingExtraError(f"{error.name} is not installed: pip install {' '.join(packages)}") from None

    return found


@dataclass(frozen=True)
class Subject:
    """Normalizations of one library, in one way of calling it."""

    name: str
    version: Callable[[], str]
    """Its version; raises `MissingExtraError` where it is not installed."""
    calls: Mapping[str, Call]
    """Operation -> how it is called. One that is not here is refused by name, as "has no …"."""
    array: Callable[[NumPyArray, str], Any] = lambda a, dtype: a
    """Makes an argument of a NumPy array of the named type (bfloat16 is that of `ml_dtypes`)."""
    values: Callable[[Any], NumPyArray] = numpy.asarray
    """Makes a NumPy array of a result."""
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    refused: Mapping[str, str] = field(default_factory=dict)
    """Operation -> why it is not there, where that needs more words."""
    eager: str | None = None
    """The subject that computes the same without being compiled."""
    note: str = ""
    """A line for tables."""
    advice: str = ""
    """What to do where its answer is not right."""

    def refusal(self, operation: str, dtype: str) -> str | None:
        """Why an operation is not measured in a type, `None` where it is."""
        kind = kind_of(operation)
        if kind not in self.calls:
            return self.refused.get(kind, f"has no {kind}")
        return None if dtype in self.dtypes else f"has no {dtype}"

    def run(self, case: Case, arrays: Mapping[str, NumPyArray]) -> dict[str, NumPyArray]:
        """`{"forward": y}`, with "mean" and "variance" where they are returned, in float64."""
        made = {
            name: self.array(cast(arrays[name], dtype), dtype)
            for name, dtype in (("x", case.dtype), ("weight", case.dtype), ("bias", case.dtype))
        }
        more: dict[str, Any] = {} if case.operation.groups is None else {"groups": case.operation.groups}
        if case.operation.given:
            kept = statistics_type(case.dtype)
            more |= {name: self.array(cast(arrays[name], kept), kept) for name in ("mean", "var")}
        call = self.calls[kind_of(case.operation.name)]
        found = call(made["x"], made["weight"], made["bias"], case.eps, **more)
        results = found if isinstance(found, tuple) else (found,)
        names = ("forward", "mean", "variance")
        return {name: numpy.asarray(self.values(a)).astype(numpy.float64) for name, a in zip(names, results, strict=False)}


def kind_of(operation: str) -> str:
    """The operation as a library has it: that of a map is none of its own."""
    return operation.partition(" of ")[0]


def cast(a: NumPyArray, dtype: str) -> NumPyArray:
    """Values in a type of NumPy, or of `ml_dtypes`."""
    if dtype == "bfloat16":
        import ml_dtypes

        return a.astype(ml_dtypes.bfloat16)
    with numpy.errstate(over="ignore"):
        return a.astype(dtype)


@cache
def subjects_of_others() -> dict[str, Subject]:
    """All subjects by name; raises `UnsupportedError` where an entry point gives none, or two have one name."""
    found: dict[str, Subject] = {}
    for entry in entry_points(group=GROUP):
        rows: Iterable[Subject] = entry.load()
        for row in rows:
            if not isinstance(row, Subject) or row.name in found:
                what = f"a second {row.name!r}" if isinstance(row, Subject) else repr(row)
                raise UnsupportedError(f"the entry point {entry.name!r} of {GROUP} gives {what}; expected subjects with names of their own")
            found[row.name] = row
    return found
