"""Nothing to compute: sequences without steps beside others, a batch of none, no steps. What a graph gives then, and who has no answer.

Eagerly the state stays as it came, and `y` has length 0, or is 0. So it is in a graph; but some operators of some runtimes give an error
there, or end the process: `no_steps` and `no_sequences` of a `Runtime` name them, and such a call is refused before it reaches them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy
import onnx
from onnx import numpy_helper

from portnorm.arrays import mapped
from portnorm.errors import ExportError
from portnorm.layers.layer import Layer
from portnorm_onnx.runtimes import ANY, FITTED, runtime_of
from portnorm_onnx.signature import batch_axis, mask_dims, time_axis
from portnorm_onnx.symbolic import NumPyArray
from portnorm_onnx.workers import Session

_STEPS, _SEQUENCES = 3, 3


def guarded(session: Session, runtime: str, proto: onnx.ModelProto, model: Layer, *, streaming: bool) -> Session:
    """`session`, which raises `ExportError` itself where the runtime has no answer, and where `x` has not the axes of the graph."""
    rank = len(proto.graph.input[0].type.tensor_type.shape.dim)

    def run(feed: Mapping[str, Any]) -> dict[str, Any]:
        if feed["x"].ndim != rank:
            raise ExportError(
                f"`x` of shape {feed['x'].shape} has {feed['x'].ndim} axes, the graph takes {rank}; export it with `inputs=[x]`, or with "
                "`input_shape`, which names the lengths that vary: ('batch', 8, 'height', 'width')"
            )
        lacking = unanswered(runtime, proto, model, feed["x"].shape, streaming=streaming)
        if lacking:
            raise ExportError(
                f"{runtime} does not run the graph on `x` of shape {feed['x'].shape}: it has no answer for {lacking}; leave such a call "
                "out, or call the model itself"
            )
        return session(feed)

    return run


def unanswered(runtime: str, proto: onnx.ModelProto, model: Layer, shape: Sequence[int], *, streaming: bool = False) -> str:
    """What the runtime has no answer for in this graph with an `x` of this shape: "no steps in a Scan", or nothing."""
    row, used = runtime_of(runtime), {n.op_type for n in proto.graph.node} | {ANY} | ({FITTED} if _is_fitted(proto.graph) else set())
    steps, sequences = (None, 0) if streaming else (time_axis(model), batch_axis(model))
    for what, axis, operators in (("no steps", steps, row.no_steps), ("no sequences", sequences, row.no_sequences)):
        found = sorted(operators & used)
        if axis is not None and shape[axis] == 0 and found:
            return f"{what} in {found[0]}"
    return ""


def _is_fitted(graph: onnx.GraphProto) -> bool:
    """Whether a Reshape takes one length over and finds out another."""
    shapes = {n.input[1] for n in graph.node if n.op_type == "Reshape"}
    found = [numpy_helper.to_array(t).tolist() for t in graph.initializer if t.name in shapes and not t.external_data]
    return any(0 in shape and -1 in shape for shape in found)


def empty_cases(
    model: Layer, dims: Sequence[int | str], like: NumPyArray, counts: str | None, *, streaming: bool
) -> list[tuple[NumPyArray, Any, Any]]:
    """(x, lengths or mask, state) of every kind of nothing that the open lengths in `dims` and the inputs of a graph allow.

    `like` is an `x` that the model takes; its values are repeated. A streaming graph is a step, and cannot have none.
    """
    batch, time = batch_axis(model), time_axis(model)
    kinds: list[dict[int | None, int]] = [{time: _STEPS, batch: _SEQUENCES}] if time is not None and counts is not None else []
    kinds += [{time: _STEPS, batch: 0}]
    kinds += [{time: 0, batch: _SEQUENCES}] if time is not None and not streaming else []
    rng, cases = numpy.random.default_rng(1), []

    def drawn(a: NumPyArray) -> NumPyArray:
        return numpy.asarray(rng.uniform(-1, 1, a.shape)).astype(a.dtype)

    for kind in kinds:
        if any(length == 0 and axis is not None and isinstance(dims[axis], int) for axis, length in kind.items()):
            continue
        shape = [n if isinstance(d, int) else kind.get(axis, n) for axis, (d, n) in enumerate(zip(dims, like.shape, strict=True))]
        x = numpy.resize(like, shape)
        counted: Any = None
        if time is None:
            counted = numpy.ones(mask_dims(model, shape), bool) if counts else None
        elif counts:
            lengths = numpy.arange(shape[batch]) % 2 * shape[time]  # 0, all, 0
            rows = numpy.arange(shape[time]) < lengths[:, None]
            counted = lengths if counts == "lengths" else rows if model.batch_first else rows.T
        cases.append((x, counted, floats(drawn, model.initial_state(shape[batch]))))
    return cases


def floats(change: Callable[[NumPyArray], NumPyArray], tree: Any) -> Any:
    """A state, or an array, with every floating-point array changed; counts stay as they are."""
    return mapped(lambda a: change(a) if a.dtype.kind == "f" else a, tree)
