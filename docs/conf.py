"""The reference site: `make docs`. Pages are the Markdown of this folder; those in reference/ take their text from the docstrings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from sphinx.ext.autodoc.mock import MockFinder

DOCS = Path(__file__).parent
ROOT = DOCS.parent
FOLDERS = [str(ROOT / folder) for folder in ("docs", ".", "backends", "onnx_export")]
sys.path[:0] = FOLDERS
sys.meta_path.insert(0, MockFinder(["torch", "onnxscript", "sympy", "sklearn"]))  # large, and only named here

from docstrings import first_sentence, restructured  # noqa: E402

import portnorm as pn  # noqa: E402

project, author, version, release = "portnorm", "the authors of portnorm", pn.__version__, pn.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["examples"]
nitpicky = True  # with -W a name or a link that leads nowhere ends the build
myst_heading_anchors = 3
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # shapes and dtypes are in the text
autodoc_member_order = "bysource"
smartquotes = False
toc_object_entries_show_parents = "hide"
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = f"portnorm {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = html_show_copyright = False
html_copy_source = False

ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/papers/README.md": "papers.md",
    "docs/adr": "decisions.md",
}
"""Files that the site shows as pages of its own, by which links to them become links to those."""

_LINK = re.compile(r"(\]\()([^)#\s]+)([^)]*\))")


def relinked(text: str, source: Path, page: Path) -> str:
    """`text` of the file `source` as part of `page`: links lead where they led."""

    def new(found: re.Match[str]) -> str:
        target = found[2]
        if target.startswith("http"):
            return found[0]
        path = os.path.normpath(source.parent / target)
        known = ELSEWHERE.get(os.path.relpath(path, ROOT))
        return found[1] + os.path.relpath(DOCS / known if known else path, page.parent) + found[3]

    return _LINK.sub(new, text)


def read_page(app: Any, name: str, content: list[str]) -> None:
    page = Path(app.env.doc2path(name))
    content[0] = relinked(content[0], page, page)
    if name == "reference/index":
        content[0] += names()
    if name == "reference/command-line":
        content[0] += commands()


def read_included(app: Any, path: Path, parent: str, content: list[str]) -> None:
    content[0] = relinked(content[0], (DOCS / path).resolve(), Path(app.env.doc2path(parent)))


PLACES = {name: f"portnorm.{name}" for name in pn.__all__} | {
    "Recurrent": "portnorm.layers.recurrent.Recurrent",
    "Report": "portnorm_onnx.report.Report",
}
"""Names in docstrings that become links."""

DATA = {
    "FORMATS": "The names that ``format=`` of :py:obj:`~portnorm.import_checkpoint` takes.",
    "IMPLEMENTATIONS": "The published cells that differ from the presets.",
    "VARIANTS": "The presets of ``norm=``.",
}
"""What is no function or class, so that it has no docstring."""


def names() -> str:
    """A table of all public names, each with what its docstring says first."""
    said = {name: DATA.get(name) or first_sentence(getattr(pn, name).__doc__, PLACES) for name in pn.__all__}
    rows = [f"   * - :py:obj:`~portnorm.{name}`\n     - {text}\n" for name, text in said.items()]
    return "```{eval-rst}\n.. list-table::\n   :class: names\n\n" + "".join(rows) + "```\n"


def commands() -> str:
    """What every command of the command line says of itself."""

    def told(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(FOLDERS), "COLUMNS": "88"}
        command = [sys.executable, "-m", "portnorm", *arguments, "--help"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    def shown(*arguments: str) -> str:
        return f"```text\n{told(*arguments)}```\n"

    names = re.findall(r"^    (\w+)  ", told(), flags=re.MULTILINE)
    return shown() + "".join(f"\n## portnorm {name}\n\n{shown(name)}" for name in names)


def plain_text(app: Any, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    lines[:] = restructured("\n".join(lines), PLACES)


def setup(app: Any) -> None:
    app.connect("source-read", read_page)
    app.connect("include-read", read_included)
    app.connect("autodoc-process-docstring", plain_text)
