"""Conformance: one table of cases, one float64 truth, every array library and every inference runtime measured against it.

    portnorm conform                         a table in the terminal
    portnorm conform --html report.html      one page with a heat map; --json and --junit for machines; --vectors DIR for makers of runtimes

In Python, `measure(subjects)` yields a `Result` for each case. A function of one's own is measured by `of_function`, for example in a test:

    >>> import numpy as np
    >>> from portnorm import conform
    >>> def naive(x, weight, bias, eps):
    ...     mean = x.mean(axis=-1, keepdims=True)
    ...     return (x - mean) / np.sqrt(x.var(axis=-1, keepdims=True) + eps) * weight + bias
    >>> case = conform.find("layer_norm", "mean 1e4 std")
    >>> result = conform.of_function(naive, case)
    >>> result.status, result.max_ulp > 100
    ('beyond', True)

A regime is a row of `REGIMES`, an operation one of `OPERATIONS`, a library one of `LIBRARIES`, a runtime one of
`portnorm_onnx.runtimes.RUNTIMES`: adding to one of these tables adds to every measurement (`portnorm conform --import your_module`).
With `pytest_plugins = ["portnorm.conform.plugin"]` a test that takes the fixture `conformance_case` runs once for every case.
"""

from portnorm.conform.cases import OPERATIONS, REGIMES, Case, Operation, Regime, cases, find
from portnorm.conform.libraries import LIBRARIES, Library
from portnorm.conform.result import Result
from portnorm.conform.runner import measure, of_function

__all__ = [
    "LIBRARIES",
    "OPERATIONS",
    "REGIMES",
    "Case",
    "Library",
    "Operation",
    "Regime",
    "Result",
    "cases",
    "find",
    "measure",
    "of_function",
]
