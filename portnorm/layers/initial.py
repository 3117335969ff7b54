"""Initial values of parameters, drawn with NumPy and then moved to where the layer lives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

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


def identity_candidate(rng: Generator, shape: tuple[int, int], gates: int, candidate: int) -> NumPyArray:
    """The identity for the candidate, and one matrix with orthonormal columns for all other gates (Cooijmans et al. 2016, section 5)."""
    hidden, outputs = shape
    others = orthogonal(rng, (gates - 1) * hidden, outputs) if gates > 1 else numpy.zeros((0, outputs))
    return numpy.concatenate([others[: candidate * hidden], numpy.eye(*shape), others[candidate * hidden :]])


HiddenInit = Literal["uniform", "orthogonal", "identity", "identity candidate"]
"""The names that `hidden_init=` takes."""

HIDDEN: dict[HiddenInit, Callable[[Generator, tuple[int, int], int, int], NumPyArray]] = {
    "uniform": lambda rng, shape, gates, candidate: uniform(rng, 1.0 / math.sqrt(shape[0]), gates * shape[0], shape[1]),
    "orthogonal": lambda rng, shape, gates, candidate: numpy.concatenate([orthogonal(rng, *shape) for _ in range(gates)]),
    "identity": lambda rng, shape, gates, candidate: numpy.concatenate([numpy.eye(*shape)] * gates),
    "identity candidate": identity_candidate,
}
"""Initial hidden weights (gates · hidden, outputs), from the shape of one gate's, the number of gates and the place of the candidate."""
