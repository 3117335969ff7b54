"""Conformance: one table of cases, one float64 truth, every array library and every inference runtime measured against it.

    portnorm conform                         a table in the terminal
    portnorm conform --html report.html      one page with a heat map; --json and --junit for machines; --vectors DIR for makers of runtimes
    portnorm conform mine --import mine.py   a runtime, a library or a regime of one's own, in a module or a file

    portnorm conform keras-torch             another's own normalizations, and by which form each computes

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

Others' own normalizations are rows too, `Subject`, by the entry points of `portnorm.subjects`: torch's, Keras', flax', TensorFlow's, those
of ONNX in each runtime, and what any installed package names there (docs/accuracy.md). The command line measures every subject in a process
of its own, so that one which ends or hangs is a row that says so; `measure` runs in this one.

A runtime of one's own is two functions. `load(model)` takes the bytes of a model, or the path of one whose weights lie in files beside it.
It returns `run(inputs)`, which takes NumPy arrays by the names of the graph's inputs and returns all outputs by name, as NumPy arrays of
the types and shapes that the graph says; it is called many times, with other lengths and batches. What it cannot load or run it says by
`portnorm.ExportError`. `version()` returns a string, or raises `portnorm.MissingExtraError` where the runtime is not installed.
`portnorm.verify` takes it too, and on the command line `portnorm verify` and `portnorm bench` with `--import`.

    >>> from portnorm_onnx.runtimes import RUNTIMES, Runtime
    >>> def load(model):
    ...     import onnxruntime
    ...     session = onnxruntime.InferenceSession(model)
    ...     return lambda inputs: dict(zip([o.name for o in session.get_outputs()], session.run(None, dict(inputs))))
    >>> RUNTIMES["mine"] = Runtime("mine", load, version=lambda: "1.0", note="a line for tables")
    >>> [r.status for r in conform.measure(["mine"], operations=["rms_norm"], regimes=["normal"], dtypes=["float32"])]
    ['ok']
    >>> del RUNTIMES["mine"]

With `pytest_plugins = ["portnorm.conform.plugin"]` a test that takes the fixture `conformance_case` runs once for every case, or for its
own: `@pytest.mark.conformance(operations=["layer_norm"])`.
"""

from portnorm.conform.cases import OPERATIONS, REGIMES, Case, Operation, Regime, cases, find
from portnorm.conform.libraries import LIBRARIES, Library
from portnorm.conform.result import Result
from portnorm.conform.runner import measure, of_function
from portnorm.conform.subjects import Subject

__all__ = [
    "LIBRARIES",
    "OPERATIONS",
    "REGIMES",
    "Case",
    "Library",
    "Operation",
    "Regime",
    "Result",
    "Subject",
    "cases",
    "find",
    "measure",
    "of_function",
]
