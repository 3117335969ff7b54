"""The scripts under benchmarks/papers: each runs in its small form, and the page is what the stored results say."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from matplotlib import pyplot

from benchmarks.papers.__main__ import NAMES, PAGE, page

QUICK = ("invariances", "initial_state", "gradients")


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES])
def test_a_small_run(name: str) -> None:
    script: Any = importlib.import_module(f"benchmarks.papers.{name}")
    result = script.run(True)
    assert all(len(row) == len(result.columns) for row in result.rows)
    assert "nan" not in result.table() + result.finding
    figure = pyplot.figure()
    script.draw(result, figure)
    pyplot.close(figure)


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run `python -m benchmarks.papers`"
