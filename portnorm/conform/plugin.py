"""A pytest plugin: `pytest_plugins = ["portnorm.conform.plugin"]` gives the fixture `conformance_case`, one run for every case.

    @pytest.mark.conformance(operations=["layer_norm"])
    def test_my_layer_norm(conformance_case):
        result = conform.of_function(my_layer_norm, conformance_case)
        assert result.status == "ok", result.detail

The mark gives a test its own cases: `operations`, `regimes` and `dtypes`, as `portnorm.conform.cases` takes them, without those that
`library` ("numpy" unless told) has no type for. Without the mark a test has the cases of all operations. `--conform-operation`,
`--conform-regime` and `--conform-dtype` choose among these.
"""

from __future__ import annotations

from typing import Any

from portnorm.conform.cases import Case, cases, check_names
from portnorm.conform.libraries import LIBRARIES
from portnorm.errors import PortnormError, UnsupportedError

_OPTIONS = ("operation", "regime", "dtype")
_MARK = "conformance"


def pytest_addoption(parser: Any) -> None:
    """Options that choose among the cases; each may be given several times."""
    group = parser.getgroup("portnorm conformance")
    for what in _OPTIONS:
        group.addoption(f"--conform-{what}", action="append", help=f"{what} of the conformance cases (default: all)")


def pytest_configure(config: Any) -> None:
    """Make the mark known, and the names that are chosen by."""
    config.addinivalue_line("markers", f"{_MARK}(operations, regimes, dtypes, library): the conformance cases of a test")
    import pytest

    try:
        check_names(*(config.getoption(f"conform_{what}") for what in _OPTIONS))
    except PortnormError as error:
        raise pytest.UsageError(f"--conform-…: {error}") from None


def pytest_generate_tests(metafunc: Any) -> None:
    """Parametrize tests that take `conformance_case`."""
    if "conformance_case" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker(_MARK)
        own = dict(mark.kwargs) if mark is not None else {}
        library = own.pop("library", "numpy")
        if library not in LIBRARIES or (mark is not None and mark.args) or not own.keys() <= {f"{what}s" for what in _OPTIONS}:
            raise UnsupportedError(
                f"the mark `{_MARK}` has {mark.args or ''}{mark.kwargs}; expected operations=, regimes=, dtypes= and library=, one of "
                f"{', '.join(LIBRARIES)}"
            )
        asked = [metafunc.config.getoption(f"conform_{what}") for what in _OPTIONS]
        also = set(cases(*asked))
        found: list[Case] = [case for case in cases(**own) if case in also and case.dtype in LIBRARIES[library].dtypes]
        metafunc.parametrize("conformance_case", found, ids=[case.name for case in found])
