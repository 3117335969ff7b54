"""Docstrings of portnorm are plain text; this is how they become reStructuredText for the reference.

Text means what it says: `*`, `_` and `|` mark nothing up, and a name in backticks is code, with a link where it is a public name. A
paragraph that begins with equations (`y = …;  h ← …`) shows each on a line of its own. Indented lines are kept as they are, but for
lists of `name: what it is`.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from types import MappingProxyType

_EQUATION = re.compile(r"(\([\w, ]+\)|[A-Za-zθ]+) (=|←) (?!`)")
_FIELD = re.compile(r"(\w+): (.*)")
_MARKS = re.compile(r"([\\*_|])")
_CODE = re.compile(r"(`+)(.+?)\1")


def restructured(text: str, places: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    """The lines of a docstring as reStructuredText; `places` has the names that the reference knows, each with its full name.

    >>> restructured("y = a * x_0, for `x`. See `LSTM`.", {"LSTM": "portnorm.LSTM"})
    ['| y = a \\\\* x\\\\_0, for ``x``.', '', 'See :py:obj:`~portnorm.LSTM`.', '']
    """
    lines: list[str] = []
    for block in re.split(r"\n\s*\n", textwrap.dedent(text).strip("\n")):
        for part in _parts(block.split("\n")):
            lines += [*_block(part, places), ""]
    return lines


def first_sentence(text: str, places: Mapping[str, str]) -> str:
    """What stands first in a docstring, as one line of reStructuredText."""
    paragraph = " ".join(re.split(r"\n\s*\n", textwrap.dedent(text).strip())[0].split("\n"))
    return _inline(re.match(r".*?(?:[.:](?=\s+[A-Z`]|$)|$)", paragraph)[0].rstrip(":"), places)  # type: ignore[index]


def _parts(block: list[str]) -> list[list[str]]:
    """Lines without a blank one between them, parted where indentation or an example begins or ends."""
    parts: list[list[str]] = []
    kind = ""
    for line in block:
        example = line.startswith(">>> ") or (kind == "example")
        now = "example" if example else "indented" if line.startswith(" ") else "text"
        if now != kind:
            parts.append([])
        parts[-1].append(line)
        kind = now
    return parts


def _block(lines: list[str], places: Mapping[str, str]) -> list[str]:
    if lines[0].startswith(">>> "):
        return lines
    if not lines[0].startswith(" "):
        lines = _joined_code(lines)
        if not _EQUATION.match(lines[0]):
            return [_inline(line, places) for line in lines]
        equations, after = _statements(" ".join(lines))
        return [*(f"| {_inline(line, places)}" for line in equations), "", _inline(after, places)]
    plain = textwrap.dedent("\n".join(lines)).split("\n")
    if plain[0].startswith(">>> "):
        return plain
    heads = [line for line in plain if not line.startswith(" ")]
    if all(_FIELD.fullmatch(line) for line in heads):
        return [f"- ``{m[1]}``: {_inline(m[2], places)}" if (m := _FIELD.fullmatch(line)) else _inline(line, places) for line in plain]
    return [".. code-block:: text", "", *(f"   {line}" for line in plain)]


def _statements(paragraph: str) -> tuple[list[str], str]:
    """The equations that a paragraph begins with, each by itself, and the sentences behind them."""
    first = re.match(r"(?:.*?\S\.(?= +[A-Z`])|.*)", paragraph)
    assert first is not None
    return re.split(r"(?<=;) +", first[0]), paragraph[first.end() :].strip()


def _joined_code(lines: list[str]) -> list[str]:
    """Lines in which no code goes on in the next."""
    text = _CODE.sub(lambda found: found[0].replace("\n", " "), "\n".join(lines))
    return re.sub(_CODE.pattern, lambda found: found[0].replace("\n", " "), text, flags=re.DOTALL).split("\n")


def _inline(line: str, places: Mapping[str, str]) -> str:
    out, at = [], 0
    for found in _CODE.finditer(line):
        out += [_text(line[at : found.start()]), _code(found[2], places)]
        at = found.end()
        if line[at : at + 1].isalnum():
            out.append("\\ ")
    return "".join([*out, _text(line[at:])])


def _text(text: str) -> str:
    """Plain text; a page that it names becomes a link."""
    return re.sub(r"\bdocs/([\w-]+)\.md", r":doc:`docs/\1.md </\1>`", _MARKS.sub(r"\\\1", text))


def _code(code: str, places: Mapping[str, str]) -> str:
    name = code.removeprefix("portnorm.").removeprefix("pn.")
    return f":py:obj:`~{places[name]}`" if name in places else f"``{code}``"
