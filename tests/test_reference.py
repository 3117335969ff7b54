"""The reference site, as far as it can be seen without its generator: every public name has one place, and its text is right there."""

from __future__ import annotations

import ast
import inspect
import re
import sys

import pytest

import portnorm as pn
from benchmarks.tables import ROOT

DOCS = ROOT / "docs"
sys.path.append(str(DOCS))
from docstrings import first_sentence, restructured  # noqa: E402

PLACES = {name: f"portnorm.{name}" for name in pn.__all__}


def docstring_of(name: str) -> str | None:
    """The docstring of a public name; where its extra is not installed, as it is written in the one file that defines it."""
    found = getattr(pn, name)
    if found.__module__ != "portnorm":
        return inspect.cleandoc(found.__doc__) if found.__doc__ else None
    modules = (ast.parse(path.read_text()) for folder in ("backends", "onnx_export") for path in (ROOT / folder).rglob("*.py"))
    (node,) = (n for module in modules for n in module.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name)
    return ast.get_docstring(node)


DOCSTRINGS = {n: text for n in pn.__all__ if not isinstance(getattr(pn, n), dict | tuple) and (text := docstring_of(n)) is not None}


def test_every_public_name_stands_on_one_page() -> None:
    found = [
        (name, page.name)
        for page in (DOCS / "reference").glob("*.md")
        for name in re.findall(
            r"^\.\. (?:auto(?:function|class|exception)|py:data):: portnorm\.(\w+)$", page.read_text(), flags=re.MULTILINE
        )
    ]
    assert sorted(name for name, _ in found) == sorted(pn.__all__)


def test_every_page_is_in_the_menu() -> None:
    menu = (DOCS / "index.md").read_text().split()
    pages = {str(page.relative_to(DOCS).with_suffix("")) for page in (*DOCS.glob("*.md"), *(DOCS / "reference").glob("*.md"))}
    assert {name for name in pages if name != "index"} == {name for name in pages if name in menu}


def test_every_function_and_class_has_a_docstring() -> None:
    assert {n for n in pn.__all__ if not isinstance(getattr(pn, n), dict | tuple)} == set(DOCSTRINGS)


def test_every_function_and_class_is_shown_in_an_example() -> None:
    """One of its own, or where it is used beside another: `load` with `save`."""
    lines = [line for text in DOCSTRINGS.values() for line in text.splitlines() if line.startswith((">>> ", "... "))]
    shown = set(re.findall(r"\bpn\.(\w+)", "\n".join(lines)))
    named = {n for n in DOCSTRINGS if not n.endswith(("Error", "Warning"))}
    assert named <= shown


def test_every_function_and_class_says_what_it_raises() -> None:
    """By itself, or as another name does: a layer as its function, `LSTM` as `Recurrent`."""
    says = {n for n, text in DOCSTRINGS.items() if re.search(r"`\w+Error`|\bRaises\b", text)} | {"Recurrent"}
    refers = {n for n, text in DOCSTRINGS.items() if says & set(re.findall(r"`(?:portnorm\.)?(\w+)`", text))}
    silent = {n for n in DOCSTRINGS if not n.endswith(("Error", "Warning"))} - says - refers
    assert silent == {"weights_only"}  # a predicate of any name and array


def plain(lines: list[str]) -> str:
    """What a reader of the built page sees of our reStructuredText, in words."""
    text = "\n".join(line for line in lines if line != ".. code-block:: text")
    text = re.sub(r":py:obj:`~portnorm\.(\w+)`", r"`\1`", text)
    text = re.sub(r":doc:`(docs/[\w-]+\.md) </[\w-]+>`", r"\1", text)
    text = re.sub(r"^\| |^- ", "", text.replace("``", "`"), flags=re.MULTILINE)
    return " ".join(re.sub(r"\\([\\*_|])|\\ ", r"\1", text).split())


@pytest.mark.parametrize("name", DOCSTRINGS)
def test_nothing_of_a_docstring_is_lost(name: str) -> None:
    """The same words in the same order, whatever is done for their form."""
    text = (
        re.sub(r"^  (\w+): ", r"  `\1`: ", DOCSTRINGS[name], flags=re.MULTILINE) if "\n  source: " in DOCSTRINGS[name] else DOCSTRINGS[name]
    )
    expected = " ".join(re.sub(r"`(?:portnorm|pn)\.(\w+)`", r"`\1`", text).split())
    assert plain(restructured(DOCSTRINGS[name], PLACES)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Twice *x*, x_ and |x|.", ["Twice \\*x\\*, x\\_ and \\|x\\|.", ""]),
        ("y = 2 · x;  z = y_1. Then more.", ["| y = 2 · x;", "| z = y\\_1.", "", "Then more.", ""]),
        ("y = x, with\n`a` two\nlines.", ["| y = x, with ``a`` two lines.", "", "", ""]),
        ("Of `b` and\n`pn.vjp` and `vjp`s.", ["Of ``b`` and", ":py:obj:`~portnorm.vjp` and :py:obj:`~portnorm.vjp`\\ s.", ""]),
        ("Code `over\ntwo` lines.", ["Code ``over two`` lines.", ""]),
        (
            "Fields:\n  a_b: what `x` is,\n    and more.\n  c: d.",
            ["Fields:", "", "- ``a_b``: what ``x`` is,", "  and more.", "- ``c``: d.", ""],
        ),
        ("So:\n\n    a = b   * c\n\nAnd.", ["So:", "", ".. code-block:: text", "", "   a = b   * c", "", "And.", ""]),
        ("See docs/real-models.md.", ["See :doc:`docs/real-models.md </real-models>`.", ""]),
        ("Text.\n>>> f(*x)\n1", ["Text.", "", ">>> f(*x)", "1", ""]),
    ],
    ids=("marks", "equations", "equation of lines", "links", "code of two lines", "fields", "kept lines", "page", "example"),
)
def test_forms(text: str, expected: list[str]) -> None:
    assert restructured(text, PLACES) == expected


def test_first_sentence() -> None:
    assert first_sentence("The x, e.g. of\n`vjp`: it is. More.\n\nAnd.", PLACES) == "The x, e.g. of :py:obj:`~portnorm.vjp`: it is."
