"""One update of training as one graph: forward, backward, clipping and optimizer, traced from the same code that runs eagerly.

The inputs are the batch, then everything that an update changes: parameters, running statistics, the state of the optimizer. The latter
have their present values as defaults, and come out again as `next.<name>`; so a loop is `values = step(x, target, **values)`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import numpy

from portnorm.arrays import mapped, to_numpy
from portnorm.errors import ConformanceError, ExportError, UnsupportedError
from portnorm.layers.layer import Layer
from portnorm.losses import softmax_cross_entropy
from portnorm.op import Op, vjp
from portnorm.optimizers import Optimizer
from portnorm.scalars import switches
from portnorm.updates import clip_by_global_norm
from portnorm_onnx.bounds import FACTOR, FLOOR, ROUNDINGS, nudged, wide
from portnorm_onnx.build import build
from portnorm_onnx.export import check_place, checked_opset
from portnorm_onnx.inputs import random_inputs
from portnorm_onnx.lowering import training_opset
from portnorm_onnx.metadata import TRAINING, described
from portnorm_onnx.nothing import floats
from portnorm_onnx.report import Comparison, Report
from portnorm_onnx.runtimes import session_of
from portnorm_onnx.signature import first_states, named_state, state_inputs
from portnorm_onnx.storage import Draft
from portnorm_onnx.symbolic import NumPyArray, SymbolicArray, constant, graph_input
from portnorm_onnx.targets import TARGETS

OUT = "next."
"""What stands before the name of an input in the name of its new value."""

RANDOM = "random."
"""What stands before the name of what is drawn for an update."""

Values = dict[str, NumPyArray]


def export_training_step(
    model: Layer,
    loss: Op[..., Any],
    optimizer: Optimizer,
    path: str | os.PathLike[str] | None,
    *,
    clip: float | None = None,
    state: bool = False,
    lengths: bool = False,
    opset: int | None = None,
    metadata: bool = True,
) -> Report:
    """Write one training update of `model` as an ONNX graph that runs in an inference runtime, after it was checked in onnxruntime.

    (θ, buffers, s) ← optimizer(θ, clip(∂ loss(model(x), target) / ∂θ), s)

    Inputs: `x`, `target` (integers (…,) for `softmax_cross_entropy`, else like `y`), `lengths` if asked for, with `state=True` the states
    before the first step (`h_0`, …; the noise that a BN-LSTM trains with is given there), for a model that drops values the arrays of
    `model.random_shapes` as `random.<name>` (float32, uniform in [0, 1), new ones for each update), then every parameter and buffer by
    its name and the optimizer's state as `optimizer.<name>`; those are optional and start at the model's present values. Outputs: `loss`,
    with `clip` the norm of the gradient before clipping as `gradient_norm`, and `next.<name>` of everything that changes. Every loop over
    time is a `Scan`, so time and batch are free. `portnorm.load` reads the model from the file, with the values that are its defaults;
    `metadata=False` leaves out what it says of that.

    The graph is checked by three updates on random data, relative to how far eager training is from float64; only then the file appears.
    The bodies of the loops read parameters from outside, which onnxruntime allows. Raises `ExportError`, `ConformanceError`,
    `UnsupportedError`.

    >>> import numpy as np, onnxruntime, portnorm as pn
    >>> model = pn.Sequential(pn.LSTM(2, 4, norm="layer", return_sequences=False, rng=0), pn.Linear(4, 3, rng=0))
    >>> report = pn.export_training_step(model, pn.softmax_cross_entropy, pn.Adam(0.1), None)
    >>> session = onnxruntime.InferenceSession(report.model.SerializeToString())
    >>> names, values = [o.name for o in session.get_outputs()], {}
    >>> batch = {"x": np.random.default_rng(0).standard_normal((5, 6, 2)).astype("float32"), "target": np.arange(6) % 3}
    >>> for update in range(20):
    ...     results = dict(zip(names, session.run(names, batch | values)))
    ...     values = {name.removeprefix("next."): a for name, a in results.items() if name.startswith("next.")}
    >>> bool(results["loss"] < 0.5)
    True
    """
    version = checked_opset(opset, TARGETS["onnxruntime"])
    if not isinstance(model, Layer):
        raise UnsupportedError(f"`model` is a {type(model).__name__}; expected a layer of portnorm")
    if not isinstance(loss, Op):
        raise UnsupportedError(f"`loss` is {loss!r}; expected an Op of the result and a target, such as portnorm.softmax_cross_entropy")
    check_place(path)
    state, lengths, metadata = switches(state=state, lengths=lengths, metadata=metadata)
    model = model.to(xp="numpy")
    step = _Step(model, loss, optimizer, clip)
    started = time.perf_counter()
    proto = _trace(step, version, state=state, lengths=lengths)
    seconds = time.perf_counter() - started
    if metadata:
        described(proto, model, dtype=numpy.dtype(model.dtype).name, holds=TRAINING)
    with Draft(proto, path) as draft:
        draft.check_form()
        report = Report.of(proto, draft.path)
        report.seconds = seconds
        report.trajectories += _check(draft, step, state=state, lengths=lengths)
        draft.publish()
    return report


class _Step:
    """One update as a function of named arrays, of any library."""

    def __init__(self, model: Layer, loss: Op[..., Any], optimizer: Optimizer, clip: float | None):
        self.model, self.loss, self.optimizer, self.clip = model, loss, optimizer, clip
        self.state = optimizer.init(model.params)

    def initial(self) -> Values:
        """What an update changes, by name, as it is now."""
        named = {f"optimizer.{name}": a for name, a in _flat(self.state)}
        return {name: to_numpy(a) for name, a in {**self.model.params, **self.model.buffers, **named}.items()}

    def __call__(self, values: Mapping[str, Any], x: Any, target: Any, before: Any, lengths: Any, drawn: Any) -> dict[str, Any]:
        params, buffers = ({name: values[name] for name in group} for group in (self.model.params, self.model.buffers))
        flat = iter([values[f"optimizer.{name}"] for name, _ in _flat(self.state)])
        state = mapped(lambda _: next(flat), self.state)
        y, _, new_buffers, model_pullback = self.model.pure_vjp(params, buffers, x, before, lengths, training=True, rng=drawn)
        value, pullback = vjp(self.loss, y, target)
        grads = model_pullback(pullback(_one_like(value))[0])[2]
        found = {"loss": value}
        if self.clip is not None:
            grads, found["gradient_norm"] = clip_by_global_norm(grads, self.clip)
        new_params, state = self.optimizer.update(params, grads, state)
        changed = {**new_params, **{n: new_buffers[n] for n in buffers}, **{f"optimizer.{n}": a for n, a in _flat(state)}}
        return found | {OUT + name: a for name, a in changed.items()}


def _one_like(value: Any) -> Any:
    return value.__array_namespace__().ones_like(value) if isinstance(value, SymbolicArray) else numpy.ones_like(value)


def _flat(state: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """`{"mean": {"weight": a}, "steps": n}` to `mean.weight` and `steps`."""
    return [
        pair
        for name, a in state.items()
        for pair in ([(f"{name}.{inner}", b) for inner, b in _flat(a)] if isinstance(a, dict) else [(name, a)])
    ]


def _trace(step: _Step, version: int, *, state: bool, lengths: bool) -> Any:
    model, target = step.model, training_opset(version)
    x = graph_input("x", "int64" if model.takes_integers else model.dtype, model.input_dims(), target)
    batch = [x]
    initial = step.initial()
    given = {name: graph_input(name, a.dtype, a.shape, target) for name, a in initial.items()}
    lens = graph_input("lengths", "int64", ("batch",), target) if lengths and model.recurrent else None
    states, before = state_inputs(model, target, model.dtype, "batch") if state else ([], first_states(model))
    shapes = model.random_shapes("time", "batch")
    drawn = {name: graph_input(f"{RANDOM}{name}", "float32", shape, target) for name, shape in shapes.items()}
    y = model.apply({n: constant(a) for n, a in model.params.items()}, {n: constant(a) for n, a in model.buffers.items()}, x, before)[0]
    labels = _target(step.loss, y, target)
    batch += [labels, *([] if lens is None else [lens]), *states, *drawn.values()]
    outputs = step(given, x, labels, before, lens, drawn)
    unused = [n for n, a in outputs.items() if isinstance(a, SymbolicArray) and a.opset is None and a.constant is not None]
    if unused:
        raise ExportError(f"{unused[0]} does not depend on the batch")
    return build((*batch, *given.values()), outputs, version, "training_step", defaults=initial, captures=True)


def _target(loss: Op[..., Any], y: SymbolicArray, target: Any) -> SymbolicArray:
    if loss is softmax_cross_entropy:
        return graph_input("target", "int64", y.dims[:-1], target)
    return graph_input("target", y.dtype, y.dims, target)


UPDATES = 3


def _check(draft: Draft, step: _Step, *, state: bool, lengths: bool) -> list[Comparison]:
    """Three updates in the runtime against three eager ones, each output relative to the distance of the eager run to float64."""
    session = session_of("onnxruntime", draft.loadable(), draft.proto)
    dtype = numpy.dtype(step.model.dtype).name
    double = _Step(step.model.to(dtype="float64"), step.loss, step.optimizer, step.clip)
    rng = numpy.random.default_rng(0)
    x, lens = max(random_inputs(step.model, step.model.input_dims(), "lengths" if lengths else None), key=lambda case: case[0].size)
    batch = x.shape[0 if step.model.batch_first else 1] if step.model.recurrent else x.shape[0]
    before: Any = step.model.initial_state(batch, noise=0.1, rng=rng) if state else None
    y = step.model.apply(step.model.params, step.model.buffers, x, before, lens)[0]
    if step.loss is softmax_cross_entropy:
        labels: Any = rng.integers(0, y.shape[-1], y.shape[:-1])
    else:
        labels = rng.standard_normal(y.shape).astype(y.dtype)

    steps = x.shape[1 if step.model.batch_first else 0]
    shapes = step.model.random_shapes(steps, batch)
    drawn = [{name: rng.random(shape, dtype="float32") for name, shape in shapes.items()} for _ in range(UPDATES)]

    def run(one: _Step, change: Any) -> list[Values]:
        values, found = floats(change, one.initial()), list[Values]()
        inputs = floats(change, (x, labels, before))
        for _ in range(UPDATES):
            found.append(one(values, inputs[0], inputs[1], inputs[2], lens, drawn[len(found)]))
            values = _next(found[-1])
        return found

    feed: Values = {"x": x, "target": labels}
    if lens is not None:
        feed["lengths"] = lens
    if state:
        feed |= {name: numpy.asarray(a) for name, a in named_state(step.model, before, "_0").items()}
    exact, eager = run(double, wide), run(step, lambda a: a)
    nudges: list[list[Values]] | None = None
    comparisons: list[Comparison] = []
    values: Values = {}
    for update in range(UPDATES):
        result = session(feed | {RANDOM + name: a for name, a in drawn[update].items()} | values)
        values = _next(result)
        for name, a in result.items():
            truth = numpy.asarray(exact[update][name])
            difference, eager_difference = (_worst(numpy.asarray(b), truth) for b in (a, eager[update][name]))
            floor = FLOOR[dtype] * max(1.0, _largest(truth))
            if not difference <= FACTOR * eager_difference + floor:
                nudges = nudges or [run(step, lambda b, seed=seed: nudged(b, seed)) for seed in range(ROUNDINGS)]
                eager_difference = max(eager_difference, *(_worst(numpy.asarray(n[update][name]), truth) for n in nudges))
            allowed = FACTOR * eager_difference + floor
            comparisons.append(Comparison("onnxruntime", name, f"update {update + 1}", update + 1, difference, allowed, eager_difference))
            if not difference <= allowed:
                raise ConformanceError(
                    f"onnxruntime: {name!r} is {difference:.3g} from the float64 run after update {update + 1}; eager {dtype} is "
                    f"{eager_difference:.3g} from it, so at most {allowed:.3g} is allowed"
                )
    return [max((c for c in comparisons if c.steps == k + 1), key=lambda c: c.difference / c.allowed) for k in range(UPDATES)]


def _next(results: Mapping[str, Any]) -> Values:
    return {name.removeprefix(OUT): a for name, a in results.items() if name.startswith(OUT)}


def _largest(a: NumPyArray) -> float:
    return float(numpy.max(numpy.abs(a), initial=0.0))


def _worst(a: NumPyArray, b: NumPyArray) -> float:
    return _largest(a.astype(numpy.float64) - b.astype(numpy.float64))
