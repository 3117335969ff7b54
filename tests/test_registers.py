"""The kernels for the vector registers of other processors, on this one: tests of `test_sums` and `test_kernels` again, in processes of
their own, since a module of kernels is made for one width (`portnorm_backends.cpu.registers`)."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.tables import ROOT
from portnorm_backends.cpu.registers import WIDTH
from tests.processes import output_of

WIDTHS = (16, 32, 64)

OTHERS = [width for width in WIDTHS if width != WIDTH]
"""Those that the tests of this process do not have; the widest of them is what most other processors have."""

FEW = [
    "tests/test_sums.py::test_like_terms[rows of rms_norm-4096-float32]",
    "tests/test_sums.py::test_like_terms[many rows of layer_norm-4096-float32]",
    "tests/test_bfloat16.py::test_kernels_round_as_the_type_does",
    "tests/test_kernels.py::test_arrays_of_any_layout",
    "tests/test_kernels.py::test_the_presets_are_computed_by_kernels[5-RNN-layer]",
    "tests/test_kernels.py::test_products_of_integers_are_exact",
    "tests/test_kernels.py::test_sums_of_outer_products",
]
"""The norms of rows and a cell: what takes little time to compile."""


@pytest.mark.parametrize("width", OTHERS)
def test_rows_and_a_cell(width: int) -> None:
    assert passed(width, *FEW) > len(FEW)


@pytest.mark.slow
@pytest.mark.parametrize("width", OTHERS[-1:])
def test_all_kernels(width: int) -> None:
    """What does not start processes, which would have the registers of this processor."""
    apart = "fork or compiled_anew or without_numba or threads_at_once or beside"
    assert passed(width, "tests/test_sums.py", "tests/test_kernels.py", "-k", f"not ({apart})", timeout=3600) > 150


def passed(width: int, *which: str, timeout: float = 600) -> int:
    """How many of these tests pass; fails where one does not, or is skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--registers={width}", *which]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    *_, last = done.stdout.strip().splitlines()
    assert "skipped" not in last
    return int(last.split()[0])


@pytest.mark.parametrize("width", WIDTHS)
def test_kernels_are_compiled_for_the_width(width: int) -> None:
    """A panel of a product has the columns of two registers; nothing of AVX-512 is asked for where registers are narrower."""
    code = f"""
from portnorm_backends.cpu import registers
registers.WIDTH = {width}
from portnorm_backends.cpu.tiles import columns_of
print(2 * columns_of(4), registers.has_avx512() and {width} < 64)
"""
    assert output_of(code, PYTHONPATH=PATH) == f"{width} False"


PATH = ":".join(str(ROOT / folder) for folder in (".", "backends", "onnx_export"))


@pytest.mark.parametrize(("features", "width"), [("+avx512f", 64), ("+avx2", 32), ("+sse4.2", 16), ("+neon", 16)])
def test_what_numba_may_not_use_is_not_used(features: str, width: int) -> None:
    """`NUMBA_CPU_FEATURES` names what a processor has in whose stead this one compiles."""
    code = "from portnorm_backends.cpu import registers; print(registers.WIDTH)"
    assert output_of(code, PYTHONPATH=PATH, NUMBA_CPU_FEATURES=features, NUMBA_CPU_NAME="generic") == str(width)
