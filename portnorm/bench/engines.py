"""Who computes: each engine makes of a work a function without arguments that computes it, and what that gave.

The peers are written as their users would write them: the library's own operators where it has them, else its array functions. A cell that
no peer has is one step function, `_cell`, over what each of them calls its functions.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy

import portnorm
from portnorm.bench.works import CELLS, GROUPS, NORMS, Arrays, Work
from portnorm.op import vjp

Run = Callable[[], Any]
"""Computes once. The result is `y`, or with a backward pass `(y, dx)`, as anything that NumPy takes."""


class Engine(NamedTuple):
    make: Callable[[Work, Arrays], Run | None]  # None where the engine has no such thing
    needs: tuple[str, ...] = ()
    own: bool = False  # of this library
    holds: bool = True  # whether something holds it to an older instruction set

    @property
    def is_there(self) -> bool:
        return all(importlib.util.find_spec(name) is not None for name in self.needs)


# -- this library ----------------------------------------------------------------------------------------------------------------------


def _portnorm(work: Work, data: Arrays) -> Run:
    if work.recurrent:
        layer = _layer(work, data)
        x, dy = data["x"], data["dy"]
        if not work.backward:
            return lambda: layer(x, training=work.what == "BN-LSTM")[0]

        def step() -> Any:
            y, _, pullback = layer.vjp(x, training=True)
            return y, pullback(dy)[0]

        return step
    arguments = _norm_arguments(work, data)
    if not work.backward:
        return lambda: NORMS[work.what](*arguments)

    def both() -> Any:
        y, pullback = vjp(NORMS[work.what], *arguments)
        return y, pullback(data["dy"])[0]

    return both


def _layer(work: Work, data: Arrays) -> Any:
    layer = work.layer()
    layer.load_state_dict({name: data[name] for name in layer.parameters()} | layer.buffers)
    return layer


def _norm_arguments(work: Work, data: Arrays) -> tuple[Any, ...]:
    groups = (GROUPS,) if work.what == "GN" else ()
    return data["x"], *groups, data["weight"], data["bias"]


def _portnorm_out(work: Work, data: Arrays) -> Run | None:
    if work.recurrent or work.backward:
        return None
    arguments, out = _norm_arguments(work, data), numpy.empty_like(data["x"])
    return lambda: NORMS[work.what](*arguments, out=out)


def _portnorm_compiled(work: Work, data: Arrays) -> Run | None:
    if not work.recurrent or work.backward or work.what == "BN-LSTM":
        return None
    model = portnorm.compile(_layer(work, data))
    return lambda: model(data["x"])[0]


# -- peers -----------------------------------------------------------------------------------------------------------------------------


def _normalized(work: Work, lib: Any, a: Any, axis: int) -> Any:
    """The GRU of Ba et al. 2016 normalizes the candidate apart from the gates."""
    if work.what != "LN-GRU":
        return lib.norm(a, axis)
    gates = 2 * work.shape[3]
    return lib.concat([lib.norm(a[..., :gates], axis), lib.norm(a[..., gates:], axis)])


def _cell(work: Work, lib: Any, p: Any, u: Any, state: Any) -> Any:
    """One step: the new state, of which the first is the output."""
    normalized, h = work.what[:2], state[0]
    axis = {"LN": -1, "BN": 0}.get(normalized)
    a = h @ p["weight_hh_l0"].T
    if "GRU" in work.what:
        a = a + p["bias_hh_l0"] if axis is None else _normalized(work, lib, a, axis) * p["norm_hh_l0.weight"] + p["norm_hh_l0.bias"]
        (r, z, n), (ar, az, an) = lib.split(u, 3), lib.split(a, 3)
        r, z = lib.sigmoid(r + ar), lib.sigmoid(z + az)
        n = lib.tanh(n + r * an)
        return (n + z * (h - n),)
    a = a if axis is None else _normalized(work, lib, a, axis) * p["norm_hh_l0.weight"]
    i, f, g, o = lib.split(u + a, 4)
    c = lib.sigmoid(f) * state[1] + lib.sigmoid(i) * lib.tanh(g)
    inside = c if axis is None else lib.norm(c, axis) * p["norm_c_l0.weight"] + p["norm_c_l0.bias"]
    return lib.sigmoid(o) * lib.tanh(inside), c


def _input_term(work: Work, lib: Any, p: Any, x: Any) -> Any:
    u = x @ p["weight_ih_l0"].T
    axis = {"LN": -1, "BN": 1}.get(work.what[:2])
    u = u if axis is None else _normalized(work, lib, u, axis) * p["norm_ih_l0.weight"]
    late = ("bias_l0", "bias_ih_l0", "norm_ih_l0.bias", *(() if "GRU" in work.what else ("bias_hh_l0", "norm_hh_l0.bias")))
    return sum((p[name] for name in late if name in p), u)


class _NumPy:
    split, tanh = staticmethod(lambda a, n: numpy.split(a, n, axis=-1)), staticmethod(numpy.tanh)
    concat = staticmethod(lambda parts: numpy.concatenate(parts, axis=-1))

    @staticmethod
    def norm(a: Any, axis: Any) -> Any:
        d = a - a.mean(axis=axis, keepdims=True)
        return d / numpy.sqrt((d * d).mean(axis=axis, keepdims=True) + numpy.float32(1e-5))

    @staticmethod
    def sigmoid(a: Any) -> Any:
        return 1 / (1 + numpy.exp(-a))


def _numpy(work: Work, data: Arrays) -> Run | None:
    """As one writes it down: two passes, no backward."""
    if work.backward:
        return None
    x, lib = data["x"], _NumPy
    if not work.recurrent:
        return lambda: _affine(work, lib, x, data)

    def run() -> Any:
        zeros = numpy.zeros((x.shape[1], work.shape[3]), numpy.float32)
        state: Any = (zeros, zeros) if "LSTM" in work.what else (zeros,)
        y = numpy.empty((*x.shape[:2], work.shape[3]), numpy.float32)
        for t, u in enumerate(_input_term(work, lib, data, x)):
            state = _cell(work, lib, data, u, state)
            y[t] = state[0]
        return y

    return run


def _affine(work: Work, lib: Any, x: Any, p: Any) -> Any:
    if work.what == "LN":
        return lib.norm(x, -1) * p["weight"] + p["bias"]
    along = (-1, 1, 1)
    if work.what == "BN":
        return lib.norm(x, (0, 2, 3)) * p["weight"].reshape(along) + p["bias"].reshape(along)
    grouped = x.reshape(x.shape[0], GROUPS, -1)
    return lib.norm(grouped, -1).reshape(x.shape) * p["weight"].reshape(along) + p["bias"].reshape(along)


def _torch(work: Work, data: Arrays, compiled: bool = False) -> Run | None:
    import torch

    functional = torch.nn.functional
    p = {name: torch.tensor(value, requires_grad=work.backward and name != "dy") for name, value in data.items()}
    x, dy = p.pop("x"), p.pop("dy")

    class Lib:
        split, sigmoid, tanh = staticmethod(lambda a, n: a.chunk(n, -1)), staticmethod(torch.sigmoid), staticmethod(torch.tanh)
        concat = staticmethod(lambda parts: torch.cat(parts, -1))

        @staticmethod
        def norm(a: Any, axis: Any) -> Any:
            if axis == -1:
                return functional.layer_norm(a, a.shape[-1:])
            d = a - a.mean(axis, keepdim=True)
            return d * torch.rsqrt((d * d).mean(axis, keepdim=True) + 1e-5)

    if not work.recurrent:
        own: dict[str, Any] = {
            "LN": lambda: functional.layer_norm(x, x.shape[-1:], p["weight"], p["bias"]),
            "BN": lambda: functional.batch_norm(x, None, None, p["weight"], p["bias"], True),
            "GN": lambda: functional.group_norm(x, GROUPS, p["weight"], p["bias"]),
        }
        forward = torch.compile(own[work.what]) if compiled else own[work.what]
    elif compiled:
        return None
    elif CELLS[work.what][1] is None:
        layer = getattr(torch.nn, work.what)(*work.shape[2:])
        layer.load_state_dict({name: value.detach() for name, value in p.items()})
        p = dict(layer.named_parameters())

        def forward() -> Any:
            return layer(x)[0]
    else:

        def forward() -> Any:
            zeros = torch.zeros(x.shape[1], work.shape[3])
            state: Any = (zeros, zeros) if "LSTM" in work.what else (zeros,)
            outputs = []
            for u in _input_term(work, Lib, p, x).unbind(0):
                state = _cell(work, Lib, p, u, state)
                outputs.append(state[0])
            return torch.stack(outputs)

    def inference() -> Any:
        with torch.no_grad():
            return forward()

    def step() -> Any:
        for leaf in (x, *p.values()):
            leaf.grad = None
        y = forward()
        y.backward(dy)
        return y.detach(), x.grad

    return step if work.backward else inference


def _jax(work: Work, data: Arrays) -> Run:
    import jax
    from jax import numpy as jnp

    class Lib:
        split, sigmoid, tanh = staticmethod(lambda a, n: jnp.split(a, n, -1)), staticmethod(jax.nn.sigmoid), staticmethod(jnp.tanh)
        concat = staticmethod(lambda parts: jnp.concatenate(parts, -1))

        @staticmethod
        def norm(a: Any, axis: Any) -> Any:
            d = a - a.mean(axis=axis, keepdims=True)
            return d * jax.lax.rsqrt((d * d).mean(axis=axis, keepdims=True) + 1e-5)

    def forward(x: Any, p: Any) -> Any:
        if not work.recurrent:
            return _affine(work, Lib, x, p)

        def step(state: Any, u: Any) -> Any:
            state = _cell(work, Lib, p, u, state)
            return state, state[0]

        zeros = jnp.zeros((x.shape[1], work.shape[3]), jnp.float32)
        return jax.lax.scan(step, (zeros, zeros) if "LSTM" in work.what else (zeros,), _input_term(work, Lib, p, x))[1]

    p = {name: jnp.asarray(value) for name, value in data.items()}
    x, dy = p.pop("x"), p.pop("dy")
    if not work.backward:
        run = jax.jit(forward)
        return lambda: jax.block_until_ready(run(x, p))

    def both(x: Any, p: Any, dy: Any) -> Any:
        y, pullback = jax.vjp(forward, x, p)
        return y, *pullback(dy)

    step = jax.jit(both)
    return lambda: jax.block_until_ready(step(x, p, dy))[:2]


def _onnxruntime(work: Work, data: Arrays) -> Run | None:
    """Its own operators: LayerNormalization, LSTM, GRU."""
    if work.backward or work.what not in ("LN", "LSTM", "GRU"):
        return None
    import onnxruntime

    layer = _layer(work, data) if work.recurrent else portnorm.LayerNorm(work.shape[-1])
    if not work.recurrent:
        layer.load_state_dict({name: data[name] for name in ("weight", "bias")})
    report = portnorm.export(layer, None, lengths=False) if work.recurrent else portnorm.export(layer, None)
    assert report.model is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(report.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": data["x"]})[0]


# -- what nobody can be faster than ----------------------------------------------------------------------------------------------------


def _copy(work: Work, data: Arrays) -> Run | None:
    """Of the input, into memory that is there: the floor of a normalization."""
    if work.recurrent or work.backward:
        return None
    out = numpy.empty_like(data["x"])
    return lambda: numpy.copyto(out, data["x"])


def _matmuls(work: Work, data: Arrays) -> Run | None:
    """The matrix products of a recurrent layer by NumPy, and nothing else."""
    if not work.recurrent:
        return None
    x, w, v = data["x"], data["weight_ih_l0"], data["weight_hh_l0"]
    rows, h = x.reshape(-1, x.shape[2]), numpy.zeros((x.shape[1], v.shape[1]), numpy.float32)
    a, all_a, all_h = (
        numpy.empty((len(h), len(v)), numpy.float32),
        numpy.zeros((len(rows), len(v)), numpy.float32),
        numpy.zeros((len(rows), v.shape[1]), numpy.float32),
    )

    def run() -> None:
        numpy.matmul(rows, w.T)
        for _ in range(len(x)):
            numpy.matmul(h, v.T, out=a)
        if work.backward:
            for _ in range(len(x)):
                numpy.matmul(a, v, out=h)
            numpy.matmul(all_a.T, all_h)
            numpy.matmul(all_a.T, rows)
            numpy.matmul(all_a, w)

    return run


ENGINES = {
    "portnorm": Engine(_portnorm, own=True),
    "portnorm out=": Engine(_portnorm_out, own=True),
    "portnorm compile": Engine(_portnorm_compiled, ("onnxruntime", "onnx"), own=True, holds=False),
    "torch": Engine(_torch, ("torch",)),
    "torch.compile": Engine(lambda work, data: _torch(work, data, compiled=True), ("torch",)),
    "JAX jit": Engine(_jax, ("jax",)),
    "onnxruntime": Engine(_onnxruntime, ("onnxruntime", "onnx"), holds=False),
    "NumPy": Engine(_numpy),
    "copy": Engine(_copy),
    "matmuls": Engine(_matmuls),
}
FLOORS = ("copy", "matmuls")
"""Not peers: they compute less."""
