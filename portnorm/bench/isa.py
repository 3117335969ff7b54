"""Instruction sets: which one this processor has, and what holds libraries to an older one, as another machine would have it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy

from portnorm.errors import UnsupportedError

_AVX2 = ("avx2", "fma", "avx", "sse4.2", "sse4.1", "ssse3", "sse3", "sse2", "popcnt", "bmi", "bmi2", "f16c", "lzcnt", "movbe")

HELD: dict[str, dict[str, str]] = {
    "avx2": {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": ",".join(f"+{name}" for name in _AVX2),
        "OPENBLAS_CORETYPE": "Haswell",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
    },
}
"""By the name of an instruction set, what holds each library to it: numba, OpenBLAS, torch with what it compiles, its oneDNN and MKL, and
XLA. NumPy is told what to leave out; nothing holds onnxruntime.
"""

_OWN_PRODUCTS = "--xla_cpu_experimental_ynn_fusion_type="
"""What keeps XLA from multiplying matrices by YNNPACK, which nothing holds: it is faster than AVX2 can be. Only jaxlib from 0.10 on knows
the flag; an older one would end the process.
"""

_SHOWN = {"avx512_vnni": "AVX-512 with VNNI", "avx512f": "AVX-512", "avx2": "AVX2", "asimd": "NEON"}


def flags() -> frozenset[str]:
    """What the processor says that it has; empty where the system does not tell."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(named.split())


def shown() -> str:
    """The widest instruction set of this processor, in words; empty where the system does not tell."""
    found = flags()
    return next((words for name, words in _SHOWN.items() if name in found), "")


def environment_of(isa: str | None) -> dict[str, str]:
    """What holds a process to an instruction set; nothing for `None`. Raises `UnsupportedError` for one that there is not."""
    if isa is None:
        return {}
    if isa not in HELD:
        raise UnsupportedError(f"`isa` is {isa!r}; expected one of {', '.join(HELD)}, or none for what the processor has")
    if isa not in flags():
        raise UnsupportedError(f"`isa` is {isa!r}, which this processor does not have, or its system does not tell")
    found = numpy.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    wider = [name for name in found if name.startswith(("AVX512", "X86_V4"))]
    # torch.compile would find in its cache what it made for one instruction set, take it for another, and end the process.
    apart = {
        "TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid() if hasattr(os, 'getuid') else ''}_{isa}")
    }
    held = {**HELD[isa], **apart, **({"NPY_DISABLE_CPU_FEATURES": " ".join(wider)} if wider else {})}
    if _has_own_products():
        held["XLA_FLAGS"] += f" {_OWN_PRODUCTS}"
    return held


def _has_own_products() -> bool:
    from importlib.metadata import PackageNotFoundError, version  # slow to import

    try:
        return tuple(map(int, version("jaxlib").split(".")[:2])) >= (0, 10)
    except PackageNotFoundError:
        return False
