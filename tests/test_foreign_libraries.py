"""Array libraries that come from outside, and arrays that cannot be taken: the first join by an entry point, the second are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portnorm as pn
from tests.processes import output_of
from tests.toy import installed

TOY = '''
"""A library of arrays with nothing but what portnorm's checks ask; all arithmetic is in its kernel."""
import numpy

class Array:
    def __init__(self, values):
        self.values = numpy.asarray(values)
        self.dtype, self.shape, self.ndim = self.values.dtype, self.values.shape, self.values.ndim

def isdtype(dtype, kind):
    return numpy.isdtype(dtype, kind)
'''

KERNELS = """
from typing import Any, NamedTuple

import toyarrays
from portnorm.arrays import Kernel, Library
from portnorm.norm.normalize import normalize
from toyarrays import Array

class Residuals(NamedTuple):
    values: Any

calls = []

def forward(x, weight=None, bias=None, **attrs):
    calls.append("forward")
    y, residuals = normalize.definition(x.values, *(None if p is None else p.values for p in (weight, bias)), **attrs)
    return Array(y), Residuals(residuals)

def vjp(residuals, dy, **attrs):
    calls.append("vjp")
    return tuple(None if d is None else Array(d) for d in normalize.vjp(residuals.values, dy.values, **attrs))

def accepts(x, weight=None, bias=None, **attrs):
    return attrs.get("center", True)

KERNEL = Kernel(lambda *args, **attrs: forward(*args, **attrs)[0], forward, vjp, Residuals, accepts)
LIBRARY = Library("toyarrays", kernels={"normalize": KERNEL}, namespace=toyarrays, device=lambda x: None)
"""


def test_a_library_joins_by_its_entry_point(tmp_path: Path, rng: np.random.Generator) -> None:
    """Installed as pip does it, in a process that has not heard of it."""
    path = installed(
        tmp_path,
        {
            "toyarrays/__init__.py": TOY,
            "toyarrays/of_portnorm.py": KERNELS,
            "toyarrays-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: toyarrays\nVersion: 1.0\n",
            "toyarrays-1.0.dist-info/entry_points.txt": "[portnorm.backends]\ntoyarrays = toyarrays.of_portnorm:LIBRARY\n",
        },
    )
    x, w, dy = rng.standard_normal((2, 4)), rng.uniform(0.5, 2.0, 4), rng.standard_normal((2, 4))
    code = f"""
import sys, numpy, portnorm as pn
from numpy import array
from toyarrays import Array
assert "toyarrays.of_portnorm" not in sys.modules
x, w, dy = {x!r}, {w!r}, {dy!r}
y, pullback = pn.vjp(pn.layer_norm, Array(x), Array(w))
dx, dw = pullback(Array(dy))
expected, their_pullback = pn.vjp(pn.layer_norm, x, w)
numpy.testing.assert_allclose(y.values, expected, rtol=1e-12)
for mine, theirs in zip((dx, dw), their_pullback(dy), strict=True):
    numpy.testing.assert_allclose(mine.values, theirs, rtol=1e-12, atol=1e-12)
print(pn.layer_norm(Array(x)).shape, *sys.modules["toyarrays.of_portnorm"].calls)
try:
    pn.layer_norm(Array(x), w)
except pn.UnsupportedError as error:
    print(error)
"""
    assert output_of(code, PYTHONPATH=path).splitlines() == [
        "(2, 4) forward vjp forward",
        "`weight` is an array of numpy but `x` is one of toyarrays; convert one of them first",
    ]


CUPY_THAT_DOES_NOT_LOAD = 'raise ImportError("libcuda.so.1: cannot open shared object file")'
CUPY_WITHOUT_A_DEVICE = """
class ndarray:
    dtype, shape, ndim = "float32", (2, 4), 2

    def __array_namespace__(self, api_version=None):
        raise RuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")

def zeros(shape):
    raise RuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
"""


@pytest.mark.parametrize(
    ("cupy", "call", "kind", "messages"),
    [
        (CUPY_THAT_DOES_NOT_LOAD, "pn.LayerNorm(3, xp='cupy')", "MissingExtraError", ("`xp` names cupy", "libcuda.so.1", "portnorm[cupy]")),
        (
            CUPY_WITHOUT_A_DEVICE,
            "pn.LayerNorm(3, xp='cupy')",
            "UnsupportedError",
            ("`xp` is 'cupy'", "cudaErrorNoDevice", "portnorm[cupy]"),
        ),
        (
            CUPY_WITHOUT_A_DEVICE,
            "pn.layer_norm(__import__('cupy').ndarray())",
            "MissingExtraError",
            ("`x` is an array of cupy, which does not work here", "portnorm[cupy]"),
        ),
    ],
    ids=["not loaded", "no device", "an array without a device"],
)
def test_cupy_without_its_runtime(cupy: str, call: str, kind: str, messages: tuple[str, ...], tmp_path: Path) -> None:
    """A package of that name that behaves as CuPy does on a machine without a GPU."""
    code = f"""
import portnorm as pn
try:
    {call}
except pn.{kind} as error:
    print(error)
"""
    said = output_of(code, PYTHONPATH=installed(tmp_path, {"cupy/__init__.py": cupy}))
    assert all(message in said for message in messages), said


class Unregistered:
    """What looks like an array and belongs to no library that anybody registered."""

    dtype, shape, ndim = np.dtype("float32"), (2, 4), 2


def float8() -> Any:
    import ml_dtypes

    return np.ones((2, 4), dtype=ml_dtypes.float8_e4m3fn)


REFUSED: dict[str, tuple[Callable[[], Any], type[pn.PortnormError], str]] = {
    "a library nobody registered": (
        lambda: pn.layer_norm(Unregistered()),
        pn.UnsupportedError,
        r"`x` is a Unregistered; expected an array of numpy, .*, cupy, or of a library that the entry points of portnorm\.backends",
    ),
    "a list": (lambda: pn.layer_norm([1.0, 2.0]), pn.UnsupportedError, r"`x` is a list; .* numpy\.asarray makes one"),
    "float8 of NumPy": (
        lambda: pn.layer_norm(float8()),
        pn.DTypeError,
        "`x` has dtype float8_e4m3fn; expected a real floating-point type such as float32",
    ),
    "a layer of bfloat16 in a library without it": (
        lambda: pn.LSTM(3, 4, dtype="bfloat16", xp="array_api_strict"),
        pn.DTypeError,
        "`dtype` is 'bfloat16', which array_api_strict does not have; .* such as float32; bfloat16 is a type of numpy and torch and jax",
    ),
    "a layer that moves to bfloat16": (
        lambda: pn.LayerNorm(3, xp="array_api_strict").to(dtype="bfloat16"),
        pn.DTypeError,
        "`dtype` is 'bfloat16', which .*array_api_strict does not have",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_taken_is_named(name: str) -> None:
    call, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.peers
@pytest.mark.parametrize("peer", ["torch", "jax.numpy"])
def test_arrays_of_two_libraries(peer: str) -> None:
    import importlib

    theirs = importlib.import_module(peer).ones(4)
    root = peer.partition(".")[0]
    with pytest.raises(pn.UnsupportedError, match=f"`weight` is an array of {root}.* but `x` is one of numpy; convert one of them first"):
        pn.layer_norm(np.ones((2, 4)), theirs)
    with pytest.raises(pn.UnsupportedError, match=f"`weight` is an array of numpy but `x` is one of {root}.*; convert one of them first"):
        pn.layer_norm(theirs, np.ones(4))


@pytest.mark.peers
def test_jax_arrays_of_two_devices() -> None:
    code = """
import jax, jax.numpy as jnp, portnorm as pn
first, second = jax.devices()
x, weight = jax.device_put(jnp.ones((2, 4)), first), jax.device_put(jnp.ones(4), second)
try:
    pn.layer_norm(x, weight)
except pn.UnsupportedError as error:
    print(error)
print(pn.layer_norm(jax.device_put(x, second), weight).device == second, pn.layer_norm(x, jnp.ones(4)).device == first)
"""
    assert output_of(code, XLA_FLAGS="--xla_force_host_platform_device_count=2").splitlines() == [
        "`weight` is on device cpu:1 but `x` is on cpu:0; move one of them first",
        "True True",
    ]
