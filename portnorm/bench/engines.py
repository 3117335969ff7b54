"""Who computes: each engine makes of a work a function without arguments that computes it, and gives what that was.

The peers are written as their users would write them, each in its file (`peer_*.py`): the library's own operators where it has them, else
its array functions. What none of them has an operator for is written once, in `formulas`, over what each of them calls its functions.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

from portnorm.bench import floors, own, peer_jax, peer_numpy, peer_onnxruntime, peer_torch
from portnorm.bench.works import Arrays, Run, Work


class Engine(NamedTuple):
    make: Callable[[Work, Arrays], Run | None]  # None where the engine has no such thing
    needs: tuple[str, ...] = ()
    own: bool = False  # of this library
    holds: bool = True  # whether something holds it to an older instruction set

    @property
    def is_there(self) -> bool:
        return all(importlib.util.find_spec(name) is not None for name in self.needs)


ENGINES = {
    "portnorm": Engine(own.make, own=True),
    "portnorm out=": Engine(own.out, own=True),
    "portnorm compile": Engine(own.compiled, ("onnxruntime", "onnx"), own=True, holds=False),
    "torch": Engine(peer_torch.make, ("torch",)),
    "torch.compile": Engine(peer_torch.compiled, ("torch",)),
    "JAX jit": Engine(peer_jax.make, ("jax",)),
    "onnxruntime": Engine(peer_onnxruntime.make, ("onnxruntime", "onnx"), holds=False),
    "NumPy": Engine(peer_numpy.make),
    "copy": Engine(floors.copy),
    "matmuls": Engine(floors.matmuls),
}
FLOORS = ("copy", "matmuls")
"""Not peers: they compute less."""
