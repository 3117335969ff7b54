"""Array libraries that come from outside, and arrays that cannot be taken: the first join by an entry point, the second are named."""

from __future__ import annotations

import types
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
        (CUPY_THAT_DOES_NOT_LOAD, "pn.LayerNorm(3, xp='cupy')", "MissingExtraError", ("`xp` names cupy", "libcuda.so.1", ".[cupy]")),
        (
            CUPY_WITHOUT_A_DEVICE,
            "pn.LayerNorm(3, xp='cupy')",
            "UnsupportedError",
            ("`xp` is 'cupy'", "cudaErrorNoDevice", ".[cupy]"),
        ),
        (
            CUPY_WITHOUT_A_DEVICE,
            "pn.layer_norm(__import__('cupy').ndarray())",
            "MissingExtraError",
            ("`x` is an array of cupy, which does not work here", ".[cupy]"),
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


def of_module(root: str) -> Any:
    """What looks like an array, of a library by that name."""
    return type("Array", (np.ndarray,), {"__module__": f"{root}.core"})((2, 4))


REFUSED: dict[str, tuple[Callable[[], Any], type[pn.PortnormError], str]] = {
    "a library nobody registered": (
        lambda: pn.layer_norm(Unregistered()),
        pn.UnsupportedError,
        r"`x` is a Unregistered; expected an array of numpy, .*, cupy, or of a library that the entry points of portnorm\.backends",
    ),
    **{
        f"an array of {root}": (
            lambda root=root: pn.layer_norm(of_module(root)),  # type: ignore[misc]
            pn.UnsupportedError,
            rf"`x` is a Array; expected an array of numpy, .*; {way_out} makes an array of it: .*",
        )
        for root, way_out in {
            "blosc2": r"numpy\.asarray",
            "tinygrad": r"x\.numpy\(\)",
            "tensorflow": r"x\.numpy\(\)",
            "mindspore": r"x\.asnumpy\(\)",
        }.items()
    },
    "a list": (lambda: pn.layer_norm([1.0, 2.0]), pn.UnsupportedError, r"`x` is a list; .* numpy\.asarray makes one"),
    "float8 of NumPy": (
        lambda: pn.layer_norm(float8()),
        pn.DTypeError,
        "`x` has dtype float8_e4m3fn; expected a real floating-point type such as float32",
    ),
    "a layer of bfloat16 in a library without it": (
        lambda: pn.LSTM(3, 4, dtype="bfloat16", xp="array_api_strict"),
        pn.DTypeError,
        "`dtype` is 'bfloat16', which array_api_strict does not have; .* such as float32; bfloat16 is a type of numpy, torch, jax and mlx",
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


class Sparse:
    """An array of a library that follows the standard as far as it goes, and that nobody registered."""

    __module__ = "sparsearrays.core"

    def __init__(self, values: Any):
        self.values, self.device = np.asarray(values), "cpu"
        self.dtype, self.shape, self.ndim = self.values.dtype, self.values.shape, self.values.ndim

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        def astype(x: Any, dtype: Any, copy: bool = True) -> Any:
            raise IndexError("only integers, slices and so on")

        found = types.ModuleType("sparsearrays")
        vars(found).update(isdtype=np.isdtype, finfo=np.finfo, float32=np.float32, astype=astype)
        return found


def test_what_a_library_lacks_is_named() -> None:
    x = Sparse(np.ones((2, 4), dtype="float32"))
    with pytest.raises(
        pn.UnsupportedError, match="sparsearrays has no `min`, a function of the Array API standard that this call needs; con"
    ):
        pn.embedding(Sparse(np.array([0, 1])), x)
    with pytest.raises(
        pn.UnsupportedError, match=r"`astype` of sparsearrays does not take what it is given here: only integers.*; convert"
    ):
        pn.layer_norm(x)


OTHER_KINDS: dict[str, tuple[Callable[[Any], Any], type[pn.PortnormError], str]] = {
    "matrix": (lambda a: a.view(np.matrix), pn.UnsupportedError, r"`{}` is a matrix; .* numpy\.asarray makes an array of it"),
    "masked array": (np.ma.masked_array, pn.UnsupportedError, r"`{}` is a MaskedArray; .* its mask would be ignored; x\.filled\(\.\.\.\)"),
    "longdouble": (lambda a: a.astype(np.longdouble), pn.DTypeError, r"`{}` has dtype (float128|longdouble); expected"),
}
X, ROW = np.ones((2, 3)), np.ones(3)
PLACES: dict[str, tuple[Callable[[Callable[[Any], Any]], Any], str]] = {
    "a function": (lambda kind: pn.layer_norm(kind(X)), "x"),
    "a weight": (lambda kind: pn.linear(X, kind(X)), "weight"),
    "a bias": (lambda kind: pn.linear(X, np.ones((2, 3)), kind(np.ones((2, 1)))[:, 0]), "bias"),
    "a target": (lambda kind: pn.mean_squared_error(X, kind(X)), "target"),
    "a cotangent": (lambda kind: pn.vjp(pn.layer_norm, X)[1](kind(X)), "dy"),
    "a layer": (lambda kind: pn.Linear(3, 2, dtype="float64")(kind(X)), "x"),
    "the pure form": (lambda kind: (m := pn.BatchNorm(3, dtype="float64")).apply(m.params, m.buffers, kind(X)), "x"),
    "the pure form of a recurrent layer": (lambda kind: (m := pn.LSTM(3, 2, dtype="float64")).pure_vjp(m.params, {}, kind(X)), "x"),
    "parameters": (lambda kind: pn.Adam().init({"w": kind(X)}), r"params\['w'\]"),
}


COMPUTED = ("a weight", "a bias", "a target")
"""Where a longdouble is right: an affine map, and what is converted."""


@pytest.mark.parametrize(("kind", "place"), [(k, p) for k in OTHER_KINDS for p in PLACES if k != "longdouble" or p not in COMPUTED])
def test_arrays_of_numpy_that_mean_something_else(kind: str, place: str) -> None:
    made, error, message = OTHER_KINDS[kind]
    call, name = PLACES[place]
    if kind == "matrix" and place == "a bias":
        name = r"\w+"  # a row of a matrix is a matrix
    if kind == "longdouble" and place == "a layer":
        message = "`x` has dtype (float128|longdouble) but the layer has float64; convert `x` to float64"
    if kind == "longdouble" and place == "a cotangent":
        message = "the cotangent `{}` has dtype (float128|longdouble); expected float64"
    with pytest.raises(error, match=message.format(name)):
        call(made)


def test_a_layer_of_longdouble() -> None:
    layer = pn.Linear(3, 2, dtype="float64")
    for call in (lambda: pn.Linear(3, 2, dtype=np.longdouble), lambda: layer.to(dtype=np.longdouble)):
        with pytest.raises(pn.DTypeError, match=r"`dtype` is .*longdouble.*; expected a floating-point type"):
            call()
    weight = layer.params["weight"].astype(np.longdouble)
    with pytest.raises(pn.DTypeError, match=r"`weight` has dtype .*; expected float64, that of the layer"):
        layer.assign({**layer.params, "weight": weight})
    with pytest.raises(pn.UnsupportedError, match="`weight` is a matrix"):
        layer.load_state_dict({**layer.state_dict(), "weight": weight.astype(float).view(np.matrix)})


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
