"""Initial values of parameters, drawn with NumPy and then moved to where the layer lives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy

if TYPE_CHECKING:  # NumPy loads its random module on first use, which takes as long as all of portnorm
    from numpy.random import Generator as Generator
else:
    Generator = "numpy.random.Generator"

NumPyArray: TypeAlias = "numpy.ndarray[Any, Any]"


def generator(rng: int | Generator | None) -> Generator:
    """A random generator from a seed, or the generator itself."""
    return numpy.random.default_rng(rng)


def uniform(rng: Generator, bound: float, *shape: int) -> NumPyArray:
    """U(−bound, bound): torch's recurrent and linear layers, with bound 1/√hidden or 1/√inputs."""
    return rng.uniform(-bound, bound, size=shape)


def orthogonal(rng: Generator, rows: int, columns: int) -> NumPyArray:
    """A matrix with orthonormal rows or columns, whichever are fewer (Saxe et al. 2014), by QR of a Gaussian one."""
    q, r = numpy.linalg.qr(rng.standard_normal((max(rows, columns), min(rows, columns))))
    q = q * numpy.where(numpy.diag(r) < 0, -1.0, 1.0)
    return q if rows >= columns else q.T
