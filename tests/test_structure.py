"""How the parts hang together: imports run one way, also those inside functions, and the ground does not know what stands on it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"portnorm": ROOT, "portnorm_backends": ROOT / "backends", "portnorm_onnx": ROOT / "onnx_export"}

DOORS = (
    "portnorm",
    "portnorm.loaders",
    "portnorm.__main__",
    "portnorm.commands",
    "portnorm.conform",
    "portnorm.bench",
    "portnorm.demo",
    "portnorm.estimators",
)
"""What may name backends and exporter: what users call, and what reads files by their ending."""
READERS = ("portnorm.checkpoint.layers", "portnorm.checkpoint.containers")


_IMPORTING = ("import_module", "require_extra")


def _name(file: Path, root: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(file, root): file for package, root in PACKAGES.items() for file in sorted((root / package).rglob("*.py"))}


def imported(tree: ast.AST, *, later: bool = True) -> Iterator[str]:
    """The modules that a module imports when it is imported, and `later` when it is called, by statements and by name.

    What only types need is left out.
    """
    if isinstance(tree, ast.If) and "TYPE_CHECKING" in ast.unparse(tree.test):
        return
    if not later and isinstance(tree, ast.FunctionDef | ast.Lambda):
        return
    if isinstance(tree, ast.Import):
        yield from (alias.name for alias in tree.names)
    if isinstance(tree, ast.ImportFrom) and tree.module is not None:
        for alias in tree.names:
            inner = f"{tree.module}.{alias.name}"
            yield inner if inner in MODULES else tree.module
    if isinstance(tree, ast.Call) and ast.unparse(tree.func).split(".")[-1] in _IMPORTING and isinstance(tree.args[0], ast.Constant):
        yield str(tree.args[0].value)
    for child in ast.iter_child_nodes(tree):
        yield from imported(child, later=later)


IMPORTS = {name: {m for m in imported(ast.parse(file.read_text())) if m in MODULES} - {name} for name, file in MODULES.items()}


def test_no_two_files_need_each_other() -> None:
    """By whatever way round, also inside functions."""
    try:
        order = [*TopologicalSorter(IMPORTS).static_order()]
    except CycleError as error:
        pytest.fail(" → ".join(reversed(error.args[1])))
    assert order.index("portnorm.libraries") < order.index("portnorm.arrays") < order.index("portnorm.layers.layer")
    assert order.index("portnorm.loaders") < order.index("portnorm")


@pytest.mark.parametrize("name", [name for name in MODULES if name.split(".")[0] == "portnorm" and not name.startswith(DOORS[1:])])
def test_the_ground_names_no_library_of_arrays_or_graphs(name: str) -> None:
    above = {m for m in IMPORTS[name] if m.startswith(("portnorm_backends", "portnorm_onnx"))}
    assert not above or name in ("portnorm", *READERS)


@pytest.mark.parametrize("name", [name for name in MODULES if name.split(".")[0] == "portnorm"])
def test_doors_load_what_stands_on_the_ground_when_it_is_asked_for(name: str) -> None:
    at_once = imported(ast.parse(MODULES[name].read_text()), later=False)
    assert not [m for m in at_once if m.startswith(("portnorm_backends", "portnorm_onnx"))]


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("portnorm_onnx")])
def test_graphs_do_not_know_how_a_library_computes(name: str) -> None:
    assert not {m for m in IMPORTS[name] if m.startswith("portnorm_backends")}
