"""Initial values of parameters, drawn with NumPy and then moved to where the layer lives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy

from portnorm.cells.cell import RecurrentCell
from portnorm.errors import UnsupportedError

if TYPE_CHECKING:  # NumPy loads its random module on first use, which takes as long as all of portnorm
    from numpy.random import Generator as Generator
else:
    Generator = "numpy.random.Generator"

NumPyArray: TypeAlias = "numpy.ndarray[Any, Any]"


def generator(rng: int | Generator | None) -> Generator:
    """A random generator from a seed, or the generator itself; raises `UnsupportedError` for what is neither."""
    try:
        if not isinstance(rng, bool):  # which NumPy takes for 0 and 1
            return numpy.random.default_rng(rng)
    except (TypeError, ValueError):
        pass
    raise UnsupportedError(f"`rng` is {rng!r}; expected a seed, which is a whole number ≥ 0, a numpy.random.Generator, or None")


_without: ContextVar[bool] = ContextVar("without", default=False)


@contextmanager
def without_values() -> Iterator[None]:
    """Layers that are made in here hold zeros in the place of what is drawn: arrays are loaded into them next, and to draw takes long."""
    token = _without.set(True)
    try:
        yield
    finally:
        _without.reset(token)


def uniform(rng: Generator, bound: float, *shape: int) -> NumPyArray:
    """U(−bound, bound): torch's recurrent and linear layers, with bound 1/√hidden or 1/√inputs."""
    return numpy.zeros(shape) if _without.get() else rng.uniform(-bound, bound, size=shape)


def normal(rng: Generator, *shape: int) -> NumPyArray:
    """N(0, 1): tables of embeddings, as torch has them."""
    return numpy.zeros(shape) if _without.get() else rng.standard_normal(shape)


def orthogonal(rng: Generator, rows: int, columns: int) -> NumPyArray:
    """A matrix with orthonormal rows or columns, whichever are fewer (Saxe et al. 2014), by QR of a Gaussian one."""
    if _without.get():
        return numpy.zeros((rows, columns))
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


class Start(NamedTuple):
    """Initial values that were asked for; `None` is the variant's own."""

    forget_bias: float | None
    hidden_init: HiddenInit | None
    proj_size: int


def initial_values(cell: RecurrentCell, inputs: int, hidden: int, t_max: int, start: Start, rng: Generator) -> Iterator[tuple[str, Any]]:
    """Names inside the cell and initial values of one direction's parameters."""
    variant, size, bound = cell.variant, cell.gates * hidden, 1.0 / math.sqrt(hidden)
    plain = variant.norm in (None, "weight")
    name_of_hidden = start.hidden_init or ("uniform" if plain else "orthogonal")
    weights = {"weight_ih": uniform(rng, bound, size, inputs) if plain else orthogonal(rng, size, inputs)}
    if variant.recurrence == "diagonal":
        weights["weight_hh"] = uniform(rng, 1.0, hidden, 1)
    else:
        weights["weight_hh"] = HIDDEN[name_of_hidden](rng, (hidden, start.proj_size or hidden), cell.gates, cell.candidate)
    for name, w in weights.items():
        if variant.norm == "weight":
            yield f"{name}.g", numpy.linalg.norm(w, axis=1, keepdims=True)
            yield f"{name}.v", w
        else:
            yield name, w
    if start.proj_size:
        yield "weight_hr", uniform(rng, bound, start.proj_size, hidden) if plain else orthogonal(rng, start.proj_size, hidden)
    wanted = variant.forget_bias or None if start.forget_bias is None else start.forget_bias
    for k, name in enumerate(dict.fromkeys((*variant.biases, *variant.early))):
        values = uniform(rng, bound, size) if plain else numpy.zeros(size)
        if cell.forget_gate is not None and wanted is not None:
            values[cell.forget_gate * hidden : (cell.forget_gate + 1) * hidden] = wanted if k == 0 else 0.0
        yield name, values
    if variant.peepholes:
        yield "peephole", uniform(rng, bound, 3, hidden) if plain else numpy.zeros((3, hidden))
    rows = (t_max,) if variant.affine == "step" else ()
    for slot in cell.names():
        width = cell.width(slot) * hidden
        if cell.scales(slot):
            yield f"{slot}.weight", numpy.full((*rows, width), variant.gain)
        if cell.shifts(slot):
            yield f"{slot}.bias", numpy.zeros((*rows, width))
