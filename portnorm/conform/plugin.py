"""A pytest plugin: `pytest_plugins = ["portnorm.conform.plugin"]` gives the fixture `conformance_case`, one run for every case.

    def test_my_layer_norm(conformance_case):
        if conformance_case.operation.name == "layer_norm":
            result = conform.of_function(my_layer_norm, conformance_case)
            assert result.status == "ok", result.detail

`--conform-operation`, `--conform-regime` and `--conform-dtype` choose among the cases.
"""

from __future__ import annotations

from typing import Any

from portnorm.conform.cases import Case, cases


def pytest_addoption(parser: Any) -> None:
    """Options that choose among the cases; each may be given several times."""
    group = parser.getgroup("portnorm conformance")
    for what in ("operation", "regime", "dtype"):
        group.addoption(f"--conform-{what}", action="append", help=f"{what} of the conformance cases (default: all)")


def pytest_generate_tests(metafunc: Any) -> None:
    """Parametrize tests that take `conformance_case`."""
    if "conformance_case" in metafunc.fixturenames:
        chosen = [metafunc.config.getoption(f"conform_{what}") for what in ("operation", "regime", "dtype")]
        found: list[Case] = list(cases(*chosen))
        metafunc.parametrize("conformance_case", found, ids=[case.name for case in found])
