"""An array library of somebody else, as text: it computes with NumPy behind arrays of its own, and joins by an entry point.

Its functions are in an object, no module; its arrays have neither a device nor DLPack, and an array is no argument of NumPy.
"""

from __future__ import annotations

import os
from pathlib import Path

_ARRAYS = '''
import operator
import numpy

class Array:
    """Values of NumPy behind the operators of the standard."""

    __array_priority__ = 1.0
    __array_ufunc__ = None

    def __init__(self, values):
        self.values = numpy.asarray(values)

    dtype = property(lambda self: self.values.dtype)
    shape = property(lambda self: self.values.shape)
    ndim = property(lambda self: self.values.ndim)

    def __getitem__(self, key):
        return Array(self.values[inside(key)])

    def __setitem__(self, key, value):
        self.values[inside(key)] = inside(value)

    def __bool__(self):
        return bool(self.values)

    def __int__(self):
        return int(self.values)

    def __float__(self):
        return float(self.values)

    def __eq__(self, other):
        return Array(self.values == inside(other))

    __hash__ = None

def inside(value):
    if isinstance(value, tuple | list):
        return type(value)(map(inside, value))
    return value.values if isinstance(value, Array) else value

def outside(value):
    if isinstance(value, tuple | list):
        return type(value)(map(outside, value))
    return Array(value) if isinstance(value, numpy.ndarray | numpy.generic) else value

def _operator(function, reflected):
    if reflected:
        return lambda self, other: Array(function(inside(other), self.values))
    return lambda self, *other: Array(function(self.values, *map(inside, other)))

for name in ("add", "sub", "mul", "truediv", "matmul", "pow", "and", "or"):
    function = getattr(operator, f"__{name}__")
    setattr(Array, f"__{name}__", _operator(function, False))
    setattr(Array, f"__r{name}__", _operator(function, True))
for name in ("neg", "invert", "lt", "le", "gt", "ge", "ne"):
    setattr(Array, f"__{name}__", _operator(getattr(operator, f"__{name}__"), False))
'''

_LIBRARY = """
from array_api_compat import numpy as known
from portnorm.arrays import Library
from toywhole import Array, inside, outside

class Functions:
    def __getattr__(self, name):
        found = getattr(known, name)
        if isinstance(found, type) or not callable(found):
            return found
        def call(*args, device=None, **attrs):
            return outside(found(*inside(args), **{name: inside(value) for name, value in attrs.items()}))
        return call

LIBRARY = Library("toywhole", namespace=Functions(), device=lambda x: None, to_numpy=lambda x: x.values)
"""

FILES = {
    "toywhole/__init__.py": _ARRAYS,
    "toywhole/of_portnorm.py": _LIBRARY,
    "toywhole-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: toywhole\nVersion: 1.0\n",
    "toywhole-1.0.dist-info/entry_points.txt": "[portnorm.backends]\ntoywhole = toywhole.of_portnorm:LIBRARY\n",
}


def installed(folder: Path, files: dict[str, str]) -> str:
    """A `PYTHONPATH` where these files lie before everything else."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
