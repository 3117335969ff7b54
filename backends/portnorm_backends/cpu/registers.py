"""The vector registers that the kernels are compiled for.

`WIDTH` is read when a module of kernels is loaded. The tests set it before that, and so try the kernels for the registers of every
processor on any one: LLVM makes a register that a processor lacks of several that it has.
"""

from __future__ import annotations

from numba.core.registry import cpu_target


def _features() -> frozenset[str]:
    """What numba lets LLVM use, which can be less than this processor has."""
    named = cpu_target.target_context.codegen().magic_tuple()[2]
    return frozenset(name[1:] for name in named.split(",") if name.startswith("+"))


_FEATURES = _features()

WIDTH = 64 if "avx512f" in _FEATURES else 32 if _FEATURES & {"avx", "avx2"} else 16
"""Bytes of a register."""


def has_products_of_bytes() -> bool:
    """Whether one instruction multiplies 64 pairs of bytes and adds up each four of them (VNNI)."""
    return has_avx512() and "avx512vnni" in _FEATURES


def has_avx2() -> bool:
    """Whether pairs of bytes are multiplied and added up in 16 bits, 32 at a time."""
    return WIDTH >= 32 and "avx2" in _FEATURES


def has_avx512() -> bool:
    """Whether a register is one of AVX-512, whose instructions LLVM has no other word for."""
    return WIDTH == 64 and "avx512f" in _FEATURES
