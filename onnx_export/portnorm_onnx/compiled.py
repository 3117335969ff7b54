"""A model behind its own call signature, computed by onnxruntime: the exporter as a compiler for NumPy."""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy

from portnorm.arrays import is_bfloat16, leaves, library, mapped, require_extra
from portnorm.errors import DTypeError, ShapeError, UnsupportedError
from portnorm.layers.layer import Layer
from portnorm.layers.state import checked_time
from portnorm.padding import Mask
from portnorm.scalars import whole_number
from portnorm_onnx.export import export
from portnorm_onnx.signature import TIME, named_state
from portnorm_onnx.symbolic import NumPyArray

_Key = tuple[str, tuple[int, ...]]
_lock = threading.Lock()


def _renew_lock() -> None:
    """One that another thread held at the fork would never be let go in the child."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def compile(model: Layer, *, threads: int = 1) -> Compiled:  # noqa: A001  # the name that users of torch look for
    """`model` in inference mode as a function that onnxruntime computes: `y`, or `(y, state)` for a recurrent model, from NumPy arrays.

    The call takes what the model takes: `x`, `state`, `lengths` or `mask`. On the first call, and on the first with `lengths` and with
    `mask`, the model is exported to memory and checked as `portnorm.export` does; a model without time is compiled for every shape beyond
    the batch. Parameters and statistics are those of the moment of `compile`. Calls may come from many threads at once, and after a fork.
    `threads` are what onnxruntime computes one call with. Raises `UnsupportedError` for what is no layer, and what `portnorm.export`
    raises.

    >>> import numpy as np, portnorm as pn
    >>> lstm = pn.LSTM(3, 4, norm="layer", rng=0)
    >>> fast = pn.compile(lstm)
    >>> x = np.random.default_rng(0).standard_normal((7, 2, 3)).astype("float32")
    >>> y, state = fast(x, lengths=[7, 3])
    >>> bool(np.allclose(y, lstm(x, lengths=[7, 3])[0], atol=1e-5))
    True
    """
    if not isinstance(model, Layer):
        raise UnsupportedError(f"`model` is a {type(model).__name__}; expected a layer of portnorm")
    return Compiled(model, whole_number("threads", threads, 1))


class Compiled:
    """What `compile` gives; call it like the model."""

    def __init__(self, model: Layer, threads: int):
        self._model = model.to(xp="numpy").copy()
        self._narrow = is_bfloat16(self._model.dtype)
        if self._narrow:  # as on NumPy: computed in float32, and rounded once
            self._model = self._model.to(dtype="float32")
        self._threads = threads
        self._graphs: dict[_Key, bytes] = {}
        self._sessions: dict[tuple[int, _Key], Any] = {}
        self._state = self._model.initial_state(1)
        self._zeros: tuple[int, dict[str, NumPyArray]] = (-1, {})

    def __call__(self, x: NumPyArray, state: Any = None, lengths: Any = None, *, mask: Any = None) -> Any:
        if not isinstance(x, numpy.ndarray):
            raise UnsupportedError(f"`x` is a {type(x).__name__}; expected a NumPy array, which is what onnxruntime computes on")
        if self._narrow:
            return self._rounded(x, state, lengths, mask)
        return self._computed(x, state, lengths, mask)

    def _rounded(self, x: NumPyArray, state: Any, lengths: Any, mask: Any) -> Any:
        """The call of a model in bfloat16."""
        if not self._model.takes_integers and not is_bfloat16(x.dtype):
            raise DTypeError(f"`x` has dtype {x.dtype}; expected bfloat16, that of the compiled model")
        narrow = library(x).narrow
        assert narrow is not None
        return narrow.rounded(self._computed(narrow.wide(x), narrow.wide(state), lengths, mask))

    def _computed(self, x: NumPyArray, state: Any, lengths: Any, mask: Any) -> Any:
        model = self._model
        counted = model._checked(x, state, lengths, mask)
        if not model.takes_integers and x.dtype != model.dtype:
            raise DTypeError(f"`x` has dtype {x.dtype}; expected {model.dtype}, that of the compiled model")
        if x.size == 0:  # onnxruntime's loops take no sequence of no steps
            return model(x, state, lengths, mask=mask)
        feed = {"x": x.astype(numpy.int64, copy=False) if model.takes_integers else x}
        given = ""
        if isinstance(counted, Mask) or (counted is not None and not model.recurrent):
            given, feed["mask"] = "mask", self._mask(x, counted)
        elif counted is not None:
            given, feed["lengths"] = "lengths", numpy.asarray(counted, dtype=numpy.int64)
        if model.recurrent:
            feed |= self._states(x, state)
        session = self._session((given, () if model.recurrent else x.shape[1:]))
        y, *after = session.run(None, feed)
        if not model.recurrent:
            return y
        flat = iter(after)
        return y, mapped(lambda _: next(flat), self._state)

    def _states(self, x: NumPyArray, state: Any) -> dict[str, NumPyArray]:
        """The inputs for the state before the first step; `x` and `state` are held against what the model takes."""
        model, dims = self._model, self._model.input_dims()
        if x.ndim != len(dims) or any(isinstance(d, int) and d != n for d, n in zip(dims, x.shape, strict=True)):
            raise ShapeError(f"`x` has shape {x.shape}; expected ({', '.join(map(str, dims))})")
        batch, zeros = self._zeros
        if batch != x.shape[0 if model.batch_first else 1]:
            batch = x.shape[0 if model.batch_first else 1]
            zeros = named_state(model, model.initial_state(batch), "_0")
            self._zeros = batch, zeros
        if state is None:
            return zeros
        times = [name.endswith(f"{TIME}_0") for name in zeros]
        given = [numpy.asarray(checked_time(x, a) if times[k : k + 1] == [True] else a) for k, a in enumerate(leaves(state))]
        expected = [(a.shape, a.dtype.kind) for a in zeros.values()]
        if [(a.shape, a.dtype.kind) for a in given] != expected:
            shapes = ", ".join(f"{name.removesuffix('_0')} {a.shape}" for name, a in zeros.items())
            raise ShapeError(f"`state` has arrays of shapes {[a.shape for a in given]}; expected {shapes}")
        return {name: a.astype(zeros[name].dtype, copy=False) for name, a in zip(zeros, given, strict=True)}

    def _session(self, key: _Key) -> Any:
        """The session for this kind of call, of this process: one that was made before a fork is not used after it."""
        mine = (os.getpid(), key)
        if mine not in self._sessions:
            with _lock:
                if mine not in self._sessions:
                    if key not in self._graphs:
                        self._graphs[key] = self._exported(*key)
                    ort = require_extra("onnxruntime", "onnx")
                    options = ort.SessionOptions()
                    options.log_severity_level = 3
                    options.intra_op_num_threads, options.inter_op_num_threads = self._threads, 1
                    self._sessions[mine] = ort.InferenceSession(self._graphs[key], options, providers=["CPUExecutionProvider"])
        return self._sessions[mine]

    def _mask(self, x: NumPyArray, counted: Any) -> NumPyArray:
        """What counts of `x`, along all axes but those of its features."""
        valid, features = self._model.valid(x, counted), self._model.feature_axes(x.ndim)
        if any(valid.shape[axis] != 1 for axis in features):
            raise UnsupportedError(f"`mask` of shape {valid.shape} varies along the features, which no graph takes; call the model itself")
        shape = tuple(n for axis, n in enumerate(x.shape) if axis not in features)
        mask: NumPyArray = numpy.broadcast_to(numpy.squeeze(valid, axis=features), shape)
        return mask

    def _exported(self, given: str, shape: tuple[int, ...]) -> bytes:
        dims: tuple[int | str, ...] | None = None if self._model.recurrent else ("batch", *shape)
        report = export(
            self._model,
            None,
            target="onnxruntime",
            lengths=given == "lengths",
            mask=given == "mask",
            state=self._model.recurrent,
            input_shape=dims,
            dtype=self._model.dtype,
        )
        assert report.model is not None
        data: bytes = report.model.SerializeToString()
        return data

    def __repr__(self) -> str:
        return f"compile({self._model!r}, threads={self._threads})"
