"""What is installed and imported: names in the wheel, a light import, extras named where they are missing."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import portnorm as pn
from portnorm.libraries import SUPPORT
from tests.processes import output_of

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_top_level_names_of_the_wheel(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    info = f"portnorm-{pn.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"portnorm", "portnorm_backends", "portnorm_onnx", info}
    for package in ("portnorm", "portnorm_backends", "portnorm_onnx"):
        assert f"{package}/py.typed" in names
        assert f"{package}/__init__.py" in names
    kernels = {f"portnorm_backends/cuda/{file}" for file in ("common.cuh", "rowwise.cu", "channelwise.cu", "recurrent.cu")}
    assert kernels | {
        "portnorm/conform/page.html",
        *(f"portnorm_onnx/web/{file}" for file in ("page.html", "page.py", "worker.mjs")),
    } <= set(names)


def test_the_source_distribution_has_what_the_two_commands_need(distributions: Path) -> None:
    (archive,) = distributions.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {"Makefile", "README.md", "LICENSE", "pyproject.toml", "tests/conftest.py", "benchmarks/readme.py"} <= names


def test_all_is_what_there_is() -> None:
    assert sorted(pn.__all__, key=lambda n: (n.upper() != n, n.lower() == n, n)) == pn.__all__
    assert all(getattr(pn, name) is not None for name in pn.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pn.nothing


def test_help_and_a_star_need_no_extra() -> None:
    code = """
import pydoc, sys
sys.modules.update(dict.fromkeys(["torch", "onnx", "onnxruntime", "onnxscript"]))
from portnorm import *
import portnorm
assert layer_norm is portnorm.layer_norm
text = pydoc.render_doc(portnorm, renderer=pydoc.plaintext)
print(all(name in text for name in portnorm.__all__))
"""
    assert output_of(code) == "True"


@pytest.mark.peers
def test_no_name_is_missing_with_torch() -> None:
    assert all(getattr(pn, name).__module__ != "portnorm" for name in pn._LAZY if name != "FORMATS")


def test_import_brings_in_nothing_but_numpy_and_array_api_compat() -> None:
    code = "import sys, numpy; before = set(sys.modules); import portnorm; print({m.split('.')[0] for m in set(sys.modules) - before})"
    found = eval(output_of(code), {"__builtins__": {}})  # of our own process
    assert {"portnorm", "array_api_compat"} <= found
    assert not found & {"onnx", "onnxruntime", "torch", "jax", "cupy", "dask", "matplotlib", "sklearn", "rich", "portnorm_onnx"}


def test_import_takes_at_most_50_ms_over_numpy(tmp_path: Path) -> None:
    """Compiled, as an installed package is, by the first run. Processor time, since other tests run beside this one."""
    code = "import numpy, time; t = time.process_time(); import portnorm; print((time.process_time() - t) * 1e3)"
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    output_of(code, **compiled)
    assert min(float(output_of(code, **compiled)) for _ in range(7)) < 50


def test_a_missing_extra_is_named() -> None:
    code = """
import sys
sys.modules["onnx"] = None
import portnorm
try:
    portnorm.export(None, ())
except portnorm.MissingExtraError as error:
    print(error)
"""
    assert output_of(code) == 'this needs the package onnx, which is not installed: pip install ".[onnx]" in a checkout of portnorm'


def test_one_function_says_how_an_extra_is_installed() -> None:
    """From a checkout, since portnorm is on no package index; and what is named is an extra."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    places = [path for folder in ("portnorm", "backends", "onnx_export", "docs") for path in (ROOT / folder).rglob("*.*")]
    for path in (ROOT / "README.md", *(path for path in places if path.suffix in (".py", ".md"))):
        text = path.read_text()
        assert not re.search(r"portnorm\[\w", text), path
        named = re.findall(r"""\binstall\(['"](\w+)['"]\)|require_extra\([^()]*, "(\w+)"\)|"\.\[([\w,-]+)\]\"""", text)
        assert {extra for found in named for extra in "".join(found).split(",")} <= {*extras}, path


def test_numpy_is_not_called_on_user_arrays() -> None:
    """Files of the mathematics import NumPy not at all, or for Python numbers only (`arrays.py`)."""
    for folder in ("norm", "cells"):
        for path in (ROOT / "portnorm" / folder).glob("*.py"):
            assert "numpy" not in path.read_text().replace("numpy as np, portnorm as pn", "").replace("import numpy as np", ""), path
    for name in ("op.py", "scan.py", "recurrent.py", "statistics.py", "affine.py", "lookup.py", "losses.py", "optimizers.py"):
        lines = [line for line in (ROOT / "portnorm" / name).read_text().splitlines() if line.startswith(("import numpy", "from numpy"))]
        assert lines == [], name


def test_every_array_library_comes_with_an_extra() -> None:
    """The one that its row names, or, where it is to be installed by itself, those of the tests."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {name: " ".join(lines) for name, lines in project["optional-dependencies"].items()}
    for row in SUPPORT.values():
        where = [extras[row.extra]] if row.extra else [*project["dependencies"], extras["test"], extras["peers"]]
        assert re.search(rf"(^| ){re.escape(row.package)}>=", " ".join(where)), row.name
        assert row.always or row.gpu or row.package in extras["peers"], row.name
